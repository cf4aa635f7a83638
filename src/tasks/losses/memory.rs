//! Mappings that a checkpoint stumbles over, or that cost more of the freeze than anybody waits.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Scene, field, limits, who};
use crate::oci::bundle::Bundle;
use crate::problem::Problem;
use crate::sys::process;
use crate::tasks::unsupported::MAX_NAMELESS;

/// Most address space of private mappings, used or not: CRIU looks through all of it in the freeze,
/// at some 20 ms a GiB.
const MOST: u64 = 64 << 30;
/// From here on it is told.
const MUCH: u64 = 16 << 30;
/// Milliseconds of the freeze for each GiB of it.
const COST: u64 = 19;
/// KiB that several processes share, from which on it is told.
const MUCH_SHARED: u64 = 64 << 10;
/// Not files, although the kernel gives them names of such. proc_pid_maps(5)
const NO_FILES: [&str; 5] = ["/dev/zero", "/memfd:", "/SYSV", "/[aio]", "/anon_hugepage"];

/// A line of proc_pid_maps(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MappedLine<'a> {
    start: u64,
    end: u64,
    /// `rwxp`
    may: &'a str,
    name: &'a str,
}

/// Everything about mappings.
pub fn problems(scene: Scene<'_>, bundle: Option<&Bundle>) -> Vec<Problem> {
    let mut found = Vec::new();
    let (mut reserved, mut most) = (0u64, (0u64, 0));
    for &pid in scene.tasks {
        // Whoever has ended meanwhile has none.
        let Ok(maps) = process::proc_text(pid, "maps") else { continue };
        let own = private(&maps);
        reserved = reserved.saturating_add(own);
        most = most.max((own, pid));
        found.extend(not_to_be_entered(&maps).map(|name| entered(pid, name)));
        found.extend(nameless(pid, &maps));
    }
    found.extend(space(reserved, most));
    let own = |pid: &i32| process::proc_text(*pid, "status").ok().map(|text| kib_of(&text));
    let all: u64 = scene.tasks.iter().filter_map(own).sum();
    if scene.tasks.len() > 1 {
        let rollup = |pid: &i32| process::proc_text(*pid, "smaps_rollup").ok();
        let shares = scene.tasks.iter().filter_map(rollup).map(|text| share(&text));
        found.extend(shared_by_fork(all, shares.sum()));
    }
    found.extend(bundle.and_then(|bundle| limits::too_small(scene.init, bundle, all)));
    found
}

/// KiB of private memory that a process has. `/proc/PID/status`, proc_pid_status(5)
fn kib_of(status: &str) -> u64 {
    kib(status, "RssAnon") + kib(status, "VmSwap")
}

/// Its share of them: what several have counts in parts. `/proc/PID/smaps_rollup`, proc_pid_smaps(5)
fn share(rollup: &str) -> u64 {
    kib(rollup, "Pss_Anon") + kib(rollup, "SwapPss")
}

fn kib(text: &str, name: &str) -> u64 {
    let kib = field(text, name).and_then(|rest| rest.strip_suffix(" kB")?.parse::<u32>().ok());
    u64::from(kib.unwrap_or(0))
}

/// What processes share since a fork, until one writes to it (copy-on-write), is each one's own after
/// the restore. KiB.
fn shared_by_fork(all: u64, own: u64) -> Option<Problem> {
    let more = all.saturating_sub(own);
    let much = more >= MUCH_SHARED && more >= own / 10;
    much.then(|| {
        Problem::new(
            "processes of the container share memory since a fork, and will not over there",
            format!("they have {} MiB here, and will have {} MiB there", own >> 10, all >> 10),
        )
        .hint("see that the destination, and the container's memory limit, have room for it")
        .warning()
    })
}

fn parse(line: &str) -> Option<MappedLine<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let may = fields.next().filter(|may| may.len() == 4)?;
    let name = fields.nth(3).unwrap_or_default().trim_start();
    Some(MappedLine { start: number(start)?, end: number(end)?, may, name })
}

/// Bytes of address space in private mappings.
fn private(maps: &str) -> u64 {
    let private = maps.lines().filter_map(parse).filter(|m| m.may.ends_with('p'));
    // The kernel's own, at the very end.
    private
        .filter(|m| m.start < 1 << 63)
        .fold(0, |sum: u64, m| sum.saturating_add(m.end.saturating_sub(m.start)))
}

/// The first executable mapping, where nobody can write to it, not even ptrace(2): CRIU begins there.
fn not_to_be_entered(maps: &str) -> Option<&str> {
    let first = maps.lines().filter_map(parse).find(|m| m.may.as_bytes()[2] == b'x')?;
    let shared = first.may.ends_with('s') && first.may.as_bytes()[1] != b'w';
    shared.then_some(first.name)
}

fn entered(pid: i32, name: &str) -> Problem {
    Problem::new(
        format!("the container shares executable memory: {name}"),
        format!(
            "{} has it below its program, read-only: CRIU begins its work there and cannot",
            who(pid)
        ),
    )
    .hint("PHP: opcache.jit_buffer_size=0; others: have no code in shared memory")
}

/// Large mapped files that have no name any more: CRIU puts them among the images.
fn nameless(pid: i32, maps: &str) -> Option<Problem> {
    let deleted = maps.lines().filter_map(parse).filter(|m| {
        m.name.ends_with(" (deleted)") && !NO_FILES.iter().any(|no| m.name.starts_with(no))
    });
    let mut seen = "";
    for mapping in deleted {
        if mapping.name == seen {
            continue;
        }
        seen = mapping.name;
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);

        // CRIU counts what is stored, holes not.
        let Ok(meta) = fs::metadata(link) else { continue };
        let size = meta.blocks().saturating_mul(512);
        if meta.is_file() && meta.nlink() == 0 && size > MAX_NAMELESS.into() {
            return Some(
                Problem::new(
                    format!("the container has a large file without a name mapped: {seen}"),
                    format!(
                        "{} has it, of {} MiB; at most {} go along in the freeze",
                        who(pid),
                        size >> 20,
                        MAX_NAMELESS >> 20
                    ),
                )
                .hint("start the program again, if it was replaced; or have it unmap the file"),
            );
        }
    }

    None
}

fn space(all: u64, (most, pid): (u64, i32)) -> Option<Problem> {
    if all <= MUCH {
        return None;
    }
    let seconds = (all >> 30).saturating_mul(COST) as f64 / 1e3;
    let why = format!(
        "{} GiB in all, {} of {}; CRIU looks through all of it while the container stands still: some \
         {seconds:.1} s",
        all >> 30,
        most >> 30,
        who(pid)
    );
    let problem = Problem::new("the container has reserved a great deal of address space", why).hint(
        "let it reserve less, also of what it does not use: MariaDB by --innodb-buffer-pool-size-max, \
         Java \
         by -XX:-UseZGC, .NET by DOTNET_GCRegionRange; no sanitizers",
    );
    Some(if all > MOST { problem } else { problem.warning() })
}

/// Tells whether the first mapping, which is the program's, has a flag: `lo` where it is locked, `lf` where a
/// page is only when it is touched. proc_pid_smaps(5)
pub(crate) fn first_is_locked(pid: i32, flag: &str) -> bool {
    use std::io::Read;
    let mut text = [0; 2048];
    let read = fs::File::open(format!("/proc/{pid}/smaps")).and_then(|mut f| f.read(&mut text));
    let text = String::from_utf8_lossy(&text[..read.unwrap_or(0)]).into_owned();
    let flags = text.lines().find_map(|line| line.strip_prefix("VmFlags:"));
    flags.is_some_and(|flags| flags.split_ascii_whitespace().any(|has| has == flag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    const PROGRAM: &str = "\
        55d000000000-55d000001000 r--p 00000000 08:01 5 /bin/a b (deleted)\n\
        55d000001000-55d000002000 r-xp 00001000 08:01 5 /bin/a b (deleted)\n\
        7f0000000000-7f4000000000 ---p 00000000 00:00 0 \n\
        7f5000000000-7f5000100000 rw-s 00000000 00:01 9 /dev/zero (deleted)\n\
        ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";

    #[test]
    fn mappings_are_read() {
        let first = parse(PROGRAM.lines().next().unwrap()).unwrap();
        assert_eq!((first.end - first.start, first.name), (4096, "/bin/a b (deleted)"));
        for wrong in ["", "x", "1-2", "1-2 r", "zz-1 r-xp 0 0 0", "1-2 \u{fffd}\u{fffd} 0"] {
            assert_eq!(parse(wrong).map(|m| m.name), None, "{wrong}");
        }
        assert_eq!(private(PROGRAM), (256 << 30) + 8192);
    }

    #[test]
    fn what_is_shared_by_fork_is_told() {
        let rollup = "0-1 ---p 0 0 0 [rollup]\nRss: 9 kB\nPss_Anon:      100 kB\nSwapPss:   3 kB\n";
        assert_eq!((share(rollup), share("")), (103, 0));
        assert_eq!(kib_of("VmRSS:\t 9 kB\nRssAnon:\t     150 kB\nVmSwap:\t       7 kB\n"), 157);
        assert_eq!(shared_by_fork(100 << 10, 40 << 10), None, "it is little");
        assert_eq!(shared_by_fork(1100 << 20, 1030 << 20), None, "it is a small part");
        let told = shared_by_fork(300 << 10, 100 << 10).unwrap();
        assert!(!told.fatal && told.why.contains("100 MiB here, and will have 300 MiB"), "{told}");
    }

    #[test]
    fn reserved_space_is_told_and_refused() {
        let fatal = |gib: u64| space(gib << 30, (gib << 30, 1)).map(|p| p.fatal);
        assert_eq!(
            (fatal(16), fatal(17), fatal(64), fatal(65)),
            (None, Some(false), Some(false), Some(true))
        );
        assert!(space(256 << 30, (1 << 30, 1)).unwrap().why.contains("4.9 s"));
    }

    #[test]
    fn criu_must_be_able_to_begin() {
        assert_eq!(not_to_be_entered(PROGRAM), None);
        let shared = format!("40000000-48000000 r-xs 0 00:01 7 /dev/zero (deleted)\n{PROGRAM}");
        assert_eq!(not_to_be_entered(&shared), Some("/dev/zero (deleted)"));
        assert_eq!(not_to_be_entered(&shared.replace("r-xs", "rwxs")), None);
        assert_eq!(
            not_to_be_entered(&format!("{PROGRAM}{}", "7f6000000000-7f6000001000 r-xs 0 0 0 /x")),
            None
        );
    }

    #[test]
    fn fuzz_maps_for_losses() {
        let own = fs::read_to_string("/proc/self/maps").unwrap();
        let some: Vec<&str> = own.lines().step_by(7).take(8).collect();
        let target = Target::new("maps-for-losses").sample(some.join("\n"));
        target.words(&[b" (deleted)", b"r-xs", b"ffffffffff600000"]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            // Of a process that nobody is.
            let _ = nameless(i32::MAX, &text);
            let first = not_to_be_entered(&text).is_some();
            found(&[(64 - private(&text).leading_zeros()) as usize % 21, first.into()])
        });
    }
}
