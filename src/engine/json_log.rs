//! docker's log of a container, a line of JSON for each line (or part of one) that it says.
//!
//! docker opens it before it calls its runtime, and does not see afterwards what others write to it. So
//! what is known by then is laid there beforehand; what comes later is said anew, through the pipes that
//! docker reads from: it has that host's time then.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Deserialize;

use crate::sys::process;

/// docker cuts lines at 16 KiB, each byte of which may need six.
const MAX_LINE: u64 = 1 << 20;
/// Until docker has read what is said.
const LIMIT: Duration = Duration::from_secs(10);

/// A line.
#[derive(Deserialize)]
struct LogLine {
    log: String,
    stream: String,
}

/// Copies what is whole in `staged` to its place, which must be free or empty; how many bytes that is.
///
/// # Errors
/// When it cannot be copied.
pub(crate) fn place(staged: &File, place: &Path) -> Result<u64> {
    let what = || format!("cannot write {}", place.display());
    let mut open = File::options();
    let open = open.write(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW);
    let mut log = open.open(place).with_context(what)?;
    let whole = whole(staged)?;
    let from = File::open(process::path_of(staged))?;
    std::io::copy(&mut from.take(whole), &mut log).with_context(what)?;
    Ok(whole)
}

/// Bytes until the end of the last whole line.
fn whole(staged: &File) -> Result<u64> {
    let mut end = staged.metadata()?.len();
    let mut piece = vec![0; 64 << 10];
    while end > 0 {
        let from = end.saturating_sub(piece.len() as u64);
        let piece = &mut piece[..(end - from) as usize];
        staged.read_exact_at(piece, from)?;
        if let Some(at) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(from + at as u64 + 1);
        }
        end = from;
    }
    Ok(0)
}

/// Says what stands behind `from`, on standard output and error.
///
/// # Errors
/// When it is no log, or nobody reads it.
pub(crate) fn say(staged: &File, from: u64, pipes: [Option<File>; 2]) -> Result<()> {
    let whole = whole(staged)?;
    let mut file = File::open(process::path_of(staged))?;
    file.seek(SeekFrom::Start(from))?;
    let mut lines = BufReader::new(file.take(whole.saturating_sub(from)));
    for pipe in pipes.iter().flatten() {
        // Whoever does not read must not hold us for ever.
        fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let until = Instant::now() + LIMIT;
    loop {
        let mut line = Vec::new();
        lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let line: LogLine = serde_json::from_slice(&line).context("the container's log")?;
        let pipe = if line.stream == "stderr" { &pipes[1] } else { &pipes[0] };
        let pipe = pipe.as_ref().ok_or_else(|| anyhow!("the engine does not read its log"))?;
        write_all(pipe, line.log.as_bytes(), until)?;
    }
}

fn write_all(mut pipe: &File, mut bytes: &[u8], until: Instant) -> Result<()> {
    while !bytes.is_empty() {
        match pipe.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    bail!("the engine does not read the container's log");
                }
                let timeout = PollTimeout::try_from(left.as_millis() as i32 + 1);
                let timeout = timeout.unwrap_or(PollTimeout::MAX);
                let mut set = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
                poll(&mut set, timeout)?;
            }
            Err(e) => return Err(e).context("the engine does not read the container's log"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(stream: &str, text: &str) -> String {
        let line =
            serde_json::json!({ "log": text, "stream": stream, "time": "2026-01-01T00:00:00Z" });
        format!("{line}\n")
    }

    #[test]
    fn what_is_whole_is_laid_there_and_the_rest_is_said() {
        let top = tempfile::tempdir().unwrap();
        let staged = top.path().join("staged");
        let early = line("stdout", "line 1\n");
        let late =
            [line("stdout", "line 2\n"), line("stderr", "half "), line("stderr", "a line\n")];
        // A piece ends where it ends.
        let (half, rest) = late[0].split_at(10);

        std::fs::write(&staged, format!("{early}{half}")).unwrap();
        let file = File::options().read(true).write(true).open(&staged).unwrap();
        let log = top.path().join("x-json.log");
        let from = place(&file, &log).unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap(), early);
        assert_eq!(from, early.len() as u64);

        let more = format!("{rest}{}{}", late[1], late[2]);
        file.write_all_at(more.as_bytes(), (early.len() + half.len()) as u64).unwrap();
        let (out, err) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
        let end = |pipe: std::io::PipeWriter| Some(File::from(std::os::fd::OwnedFd::from(pipe)));
        say(&file, from, [end(out.1), end(err.1)]).unwrap();
        let read = |mut pipe: std::io::PipeReader| {
            let mut text = String::new();
            pipe.read_to_string(&mut text).unwrap();
            text
        };

        assert_eq!(read(out.0), "line 2\n");
        assert_eq!(read(err.0), "half a line\n");
        assert!(say(&file, from, [None, None]).is_err());
    }
}
