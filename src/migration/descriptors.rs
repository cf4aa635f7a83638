//! Open files of a container's tasks that CRIU cannot carry: found while it still runs, rather than
//! in the freeze.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};

use crate::network::problem::Problem;
use crate::sys::process;

/// How `/proc/PID/fd` shows an io_uring. io_uring(7)
const IO_URING: &str = "anon_inode:[io_uring]";

/// What stands in the way: one problem for io_uring, and one for each device.
pub fn problems(pids: &[i32]) -> Vec<Problem> {
    let mut found: Vec<Problem> = Vec::new();
    let mut seen = Vec::new();
    for &pid in pids {
        // Whoever has ended meanwhile has nothing open.
        let Ok(list) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for path in list.flatten().map(|entry| entry.path()) {
            let Ok(target) = fs::read_link(&path) else { continue };
            if let Some(problem) = problem(pid, &target, || fs::metadata(&path).ok())
                && !seen.contains(&target)
            {
                found.push(problem);
                seen.push(target);
            }
        }
    }
    found
}

/// Has the kernel make ready what CRIU asks of each descriptor in the freeze: it makes the files of
/// `/proc/PID/fdinfo` when they are first seen, and keeps them.
pub fn warm(pids: &[i32]) {
    for pid in pids {
        // Whoever has ended meanwhile has none.
        let _ = fs::read_dir(format!("/proc/{pid}/fdinfo")).map(|list| list.count());
    }
}

fn problem(
    pid: i32,
    target: &Path,
    metadata: impl FnOnce() -> Option<Metadata>,
) -> Option<Problem> {
    let who = || {
        let name = process::proc_text(pid, "comm").unwrap_or_default();
        format!("process {pid} ({})", name.trim())
    };
    if target == Path::new(IO_URING) {
        return Some(
            Problem::new(
                "the container uses io_uring",
                format!("CRIU cannot carry the one that {} has", who()),
            )
            .hint(
                "most programs do without: by a setting of their own, or where a seccomp profile \
                 or the sysctl kernel.io_uring_disabled=2 denies it to them; then start it again",
            ),
        );
    }
    // Sockets, pipes and the like have no path.
    if !target.is_absolute() {
        return None;
    }
    let metadata = metadata()?;
    let kind = metadata.file_type();
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    let kind = match (kind.is_char_device(), kind.is_block_device()) {
        (true, _) if carried(major, minor) => return None,
        (true, _) => "character",
        (_, true) => "block",
        _ => return None,
    };
    Some(
        Problem::new(
            format!("the container has the device {} open", target.display()),
            format!("{} does; CRIU cannot carry {kind} device {major}:{minor}", who()),
        )
        .hint("have the program close it, or start the container without this device"),
    )
}

/// Character devices that are the same everywhere, or that CRIU makes again
/// (Documentation/admin-guide/devices.txt).
fn carried(major: u64, minor: u64) -> bool {
    match major {
        // null, zero, full, random, urandom
        1 => matches!(minor, 3 | 5 | 7..=9),
        // tty, console (a bind mount of a pseudo-terminal has that one's number), ptmx
        5 => minor <= 2,
        // pts
        136..=143 => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_go_along_is_no_problem() {
        let look = |path: &str| problem(1, Path::new(path), || fs::metadata(path).ok());
        for path in ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/ptmx", "/proc/self/exe", "/"] {
            assert_eq!(look(path), None, "{path}");
        }
        assert_eq!(problem(1, Path::new("socket:[7]"), || None), None);
        assert_eq!(problem(1, Path::new("anon_inode:[eventpoll]"), || None), None);
        assert!(carried(136, 5) && !carried(10, 200) && !carried(1, 1) && !carried(195, 0));
        assert!(problem(1, Path::new(IO_URING), || None).is_some_and(|p| p.fatal));
    }

    #[test]
    fn our_own_open_device_is_found() {
        // Readable by anybody, where there is one.
        let Ok(_open) = fs::File::open("/dev/kmsg") else { return };
        let found = problems(&[std::process::id() as i32]);
        let device = found.iter().find(|p| p.what.contains("/dev/kmsg"));
        assert!(device.is_some_and(|p| p.why.contains("1:11") && !p.hint.is_empty()), "{found:?}");
    }
}
