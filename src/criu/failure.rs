//! Why a run of CRIU has failed, in its own words: which lines of its log tell of it, which process they
//! are about, and what is known of what to do.
//!
//! A line is `[(SECONDS)] [PID: ]Error (FILE:LINE): TEXT`. The number in front is that of a restored task
//! in the container; in a dump's log numbers stand in the text, and are the host's. What CRIU quotes of
//! paths and names is the container's choice: it is bounded here, and made harmless where it is told.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Error, anyhow};

use super::causes;
use crate::problem::{Advise, advice};

/// How much of a log is read, from its end.
const MOST: u64 = 1 << 20;
/// Lines that are told: the first errors, which name the cause, and the last ones, where it ended.
const FIRST: usize = 4;
const LAST: usize = 2;
/// Longest line that is told, in characters.
const LONGEST: usize = 600;
/// Lines of a log that `--debug` tells.
const DEBUGGED: usize = 200;

/// Lines of CRIU's that are called errors and stop nothing.
const NOISE: [&str; 1] = [
    // Tried, and done without, where CAP_SYS_RESOURCE is missing.
    "Can't setup RLIMIT_NOFILE",
];

/// Returns how much CRIU is to write into its log, as its `-v` has it: warnings and errors, or all of it where
/// `--debug` shows that.
pub fn log_level() -> i32 {
    if tracing::enabled!(tracing::Level::DEBUG) { 4 } else { 2 }
}

/// Returns what CRIU did not do, with the lines of its log that tell of errors, or its last ones; which process
/// it was about, as `name` calls the one of that number; and a hint where the cause is known. CRIU's `answer`
/// is one of these lines, and is not said twice.
pub fn explained(
    what: &str,
    log: &Path,
    answer: Error,
    name: impl Fn(i32) -> Option<String>,
) -> Error {
    let text = end_of(log).unwrap_or_default();
    for line in last(text.lines().collect(), DEBUGGED) {
        tracing::debug!("{}: {line}", log.file_name().unwrap_or_default().display());
    }
    let said = answer.to_string();
    let lines = errors(&text);
    let process = process(&lines).and_then(name).map(|name| format!(" ({name})"));
    let what = format!("{what}{}", process.unwrap_or_default());

    // CRIU may have been killed before its log was written.
    let hint = causes::hint(lines.iter().copied().chain([&*said]));

    let quoted = quoted(&lines);
    // An empty one is part of everything.
    let known = lines.iter().any(|line| line.contains(said.trim())) || is_noise(&said);
    let known = known || said.trim().is_empty();
    let whole = match (quoted.is_empty(), known) {
        (true, true) => format!("{what}, and CRIU does not say why"),
        (true, false) => what,
        (false, _) => format!("{what}: {quoted}"),
    };

    match (known, hint) {
        (true, None) => anyhow!(whole),
        (true, Some(hint)) => advice(whole, hint),
        (false, None) => answer.context(whole),
        (false, Some(hint)) => Err::<(), _>(answer).advise(whole, hint).unwrap_err(),
    }
}

fn is_noise(line: &str) -> bool {
    NOISE.iter().any(|noise| line.contains(noise))
}

fn end_of(log: &Path) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The lines that tell of errors; of a log without any the last ones.
fn errors(log: &str) -> Vec<&str> {
    // Other lines may have the word in their text.
    let wanted = |line: &&str| line.contains("Error (") && !is_noise(line);
    let lines: Vec<&str> = log.lines().filter(wanted).collect();
    if lines.is_empty() { last(log.lines().collect(), FIRST + LAST) } else { lines }
}

fn last(mut lines: Vec<&str>, most: usize) -> Vec<&str> {
    lines.split_off(lines.len().saturating_sub(most))
}

/// As they are told: the first and the last of them, none longer than is of use.
fn quoted(lines: &[&str]) -> String {
    let bounded = |line: &str| match line.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line.to_owned(),
    };
    let mut told: Vec<String> = lines.iter().map(|line| bounded(line.trim())).collect();
    if told.len() > FIRST + LAST {
        let between = FIRST..told.len() - LAST;
        let left_out = format!("… ({} lines)", between.len());
        told.splice(between, [left_out]);
    }
    told.join("; ")
}

/// The process that the errors are about.
fn process(lines: &[&str]) -> Option<i32> {
    let restored = lines.iter().find_map(|line| {
        let (head, _) = line.split_once(": Error (")?;
        head.rsplit([' ', ')']).next()?.parse().ok().filter(|pid| *pid > 0)
    });
    restored.or_else(|| lines.iter().find_map(|line| named(line)))
}

/// A number that the text of a line gives to a process.
fn named(line: &str) -> Option<i32> {
    ["(pid: ", "(pid ", "non-zombie ", "zombie ", " PID ", " pid "].iter().find_map(|word| {
        let (_, rest) = line.split_once(word)?;
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..end].parse().ok().filter(|pid| *pid > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};
    use crate::problem::Advice;

    fn told(text: &str, answer: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        std::fs::write(&log, text).unwrap();
        let name = |pid| Some(format!("process {pid} (x)"));
        format!("{:#}", explained("CRIU cannot dump", &log, anyhow!("{}", answer.to_owned()), name))
    }

    #[test]
    fn only_errors_are_quoted_and_none_twice() {
        let text = "(00.000040) Error (criu/cr-service.c:7): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                    (00.000050) Warn  (criu/x.c:1): Error is a word\n\
                    (00.010000) Error (criu/files.c:9): Can't dump file 7 of that kind\n\
                    (00.010001) kernel: done\n";
        let line = "(00.010000) Error (criu/files.c:9): Can't dump file 7 of that kind";
        assert_eq!(
            told(text, "Can't dump file 7 of that kind"),
            format!("CRIU cannot dump: {line}")
        );
        assert_eq!(told(text, ""), format!("CRIU cannot dump: {line}"));
        // CRIU answers with its first error, whether or not it stopped it.
        let first = text.lines().next().unwrap();
        assert_eq!(told(text, first), format!("CRIU cannot dump: {line}"));
        assert_eq!(told(text, "it was killed"), format!("CRIU cannot dump: {line}: it was killed"));
        assert_eq!(told("", "it was killed"), "CRIU cannot dump: it was killed");
        assert_eq!(told("", ""), "CRIU cannot dump, and CRIU does not say why");
    }

    #[test]
    fn a_process_is_named() {
        for (line, pid) in [
            ("(00.038123)      1: Error (criu/file-lock.c:661): Can not set ofd lock!", Some(1)),
            (
                "     6: Error (criu/files-reg.c:2267): Can't open file mnt/file: No such file or directory",
                Some(6),
            ),
            (
                "(00.050000) Error (criu/cr-dump.c:1703): Dump eventpoll (pid: 14987) failed with -1",
                Some(14987),
            ),
            (
                "(00.020000) Error (compel/src/lib/infect.c:261): Unseizable non-zombie 10757 found, state S, err -1/10",
                Some(10757),
            ),
            (
                "(10.010000) Error (criu/seize.c:335): zombie 9433 (comm ) found while seizing",
                Some(9433),
            ),
            (
                "(00.020000) Error (compel/src/lib/infect.c:635): Can't inject syscall blob (pid: 77)",
                Some(77),
            ),
            ("(00.020000) Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle", None),
        ] {
            assert_eq!(process(&[line]), pid, "{line}");
        }

        let two = "(00.020000) Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle\n\
                   (00.020100) Error (criu/cr-dump.c:1698): Dump files (pid: 31) failed with -1\n";
        assert!(told(two, "").starts_with("CRIU cannot dump (process 31 (x)): (00.020000) Error"));
    }

    #[test]
    fn long_stories_are_cut_in_the_middle() {
        let line = |n: usize| format!("(00.1) Error (criu/x.c:{n}): {}\n", "ä".repeat(n * 100));
        let text: String = (1..40).map(line).collect();
        let told = told(&text, "");
        assert!(told.contains("(criu/x.c:1)") && told.contains("(criu/x.c:39)"), "{told}");
        assert!(told.contains("; … (33 lines); "), "{told}");
        assert!(told.chars().count() < 7 * LONGEST, "{}", told.len());
    }

    #[test]
    fn a_known_cause_comes_with_a_hint_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("restore.log");
        let line = "(00.04)      1: Error (criu/file-lock.c:661): Can not set ofd lock!\n";
        std::fs::write(&log, line).unwrap();
        let error = explained("CRIU cannot restore", &log, anyhow!("it ended"), |_| None);
        let hints = error.downcast_ref::<Advice>().unwrap().hints();
        assert!(hints.len() == 1 && hints[0].contains("lock"), "{hints:?}");
        assert!(format!("{error:#}").ends_with("ofd lock!: it ended"), "{error:#}");
        std::fs::write(&log, "(00.04) Error (criu/x.c:1): something new\n").unwrap();
        let error = explained("CRIU cannot restore", &log, anyhow!(""), |_| None);
        assert!(error.downcast_ref::<Advice>().is_none());
    }

    #[test]
    fn fuzz_criu_logs() {
        let sample = "(00.038123)      1: Error (criu/x.c:1): Can't dump file 7 (pid: 9) failed\n";
        let target = Target::new("criu-logs").sample(sample).sample(sample.repeat(9));
        target.words(&[b"Error (", b"(pid: ", b"non-zombie ", b": "]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let lines = errors(&text);
            assert!(quoted(&lines).chars().count() <= (FIRST + LAST + 1) * (LONGEST + 20));
            assert!(process(&lines).is_none_or(|pid| pid > 0));
            found(&[lines.len().min(9), causes::hint(lines.into_iter()).map_or(0, str::len)])
        });
    }
}
