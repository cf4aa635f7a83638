//! Open files of a container's tasks that CRIU cannot carry: found while it still runs, rather than
//! in the freeze.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::files::probe::inode_in;
use crate::oci::migratable::CURE;
use crate::problem::Problem;
use crate::sys::process;

/// How `/proc/PID/fd` shows an io_uring. io_uring(7)
const IO_URING: &str = "anon_inode:[io_uring]";

/// Longest file without a name that goes along: CRIU puts it among the images, in the freeze.
pub const MAX_NAMELESS: u32 = 64 << 20;

/// Returns what stands in the way: one problem for io_uring, and one for each device, FIFO and nameless file.
pub fn problems(pids: &[i32]) -> Vec<Problem> {
    let mut found: Vec<Problem> = Vec::new();
    let mut seen = Vec::new();
    let mut fifos = HashMap::new();
    for &pid in pids {
        // Whoever has ended meanwhile has nothing open.
        let Ok(list) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for path in list.flatten().map(|entry| entry.path()) {
            let Ok(target) = fs::read_link(&path) else { continue };
            if let Some(problem) = problem(pid, &target, || fs::metadata(&path).ok())
                && !seen.contains(&target)
            {
                found.push(problem);
                seen.push(target.clone());
            }
            if let Some(fifo) = named_fifo(pid, &path, &target) {
                fifos.insert(fifo, target);
            }
        }
    }
    found.extend(shared_fifos(&fifos, pids));
    found
}

/// Device and inode of a FIFO that this descriptor leads to and that has a name in the container.
/// What is only known outside is a standard stream.
fn named_fifo(pid: i32, descriptor: &Path, target: &Path) -> Option<(u64, u64)> {
    let inode = |meta: Metadata| meta.file_type().is_fifo().then(|| (meta.dev(), meta.ino()));
    let open = inode(fs::metadata(descriptor).ok().filter(|_| target.is_absolute())?)?;
    (inode_in(&process::root_of(pid), target) == Some(open)).then_some(open)
}

/// FIFOs that somebody else has open, too: whose end would stay behind.
fn shared_fifos(fifos: &HashMap<(u64, u64), PathBuf>, pids: &[i32]) -> Vec<Problem> {
    if fifos.is_empty() {
        return Vec::new();
    }
    let number = |name: OsString| name.to_str()?.parse::<i32>().ok();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let others = all.filter_map(|entry| number(entry.file_name())).filter(|p| !pids.contains(p));
    let mut found = BTreeMap::new();
    for pid in others {
        let Ok(list) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for open in list.flatten().filter_map(|entry| fs::metadata(entry.path()).ok()) {
            if let Some(path) = fifos.get(&(open.dev(), open.ino())) {
                found.entry(path).or_insert(pid);
            }
        }
    }

    let problem = |(path, pid): (&PathBuf, i32)| {
        Problem::new(
            format!("the FIFO {} has another end outside of the container", path.display()),
            format!("{} has it open, and would stay behind", who(pid)),
        )
        .hint("end that process first, or have both in the container; a socket can be reached over there")
    };

    found.into_iter().map(problem).collect()
}

/// A process, for people.
fn who(pid: i32) -> String {
    let name = process::proc_text(pid, "comm").unwrap_or_default();
    format!("process {pid} ({})", name.trim())
}

/// Has the kernel make ready what CRIU asks of each descriptor in the freeze: it makes the files of
/// `/proc/PID/fdinfo` when they are first seen, and keeps them.
pub fn prime_fdinfo(pids: &[i32]) {
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
    if target == Path::new(IO_URING) {
        return Some(
            Problem::new(
                "the container uses io_uring",
                format!("CRIU cannot carry the one that {} has", who(pid)),
            )
            .hint(format!(
                "most programs do without: by a setting of their own, or where it is denied to them by a \
                 seccomp profile or the sysctl kernel.io_uring_disabled=2; {CURE}; then start it again"
            )),
        );
    }

    // Sockets, pipes and the like have no path.
    if !target.is_absolute() {
        return None;
    }
    let metadata = metadata()?;
    if metadata.is_file() && metadata.nlink() == 0 && metadata.size() > MAX_NAMELESS.into() {
        return Some(
            Problem::new(
                format!("the container has a large file without a name open: {}", target.display()),
                format!(
                    "{} has it, of {} MiB; at most {} go along in the freeze",
                    who(pid),
                    metadata.size() >> 20,
                    MAX_NAMELESS >> 20
                ),
            )
            .hint("have the program close it, or delete it later"),
        );
    }

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
            format!("{} does; CRIU cannot carry {kind} device {major}:{minor}", who(pid)),
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
    fn a_fifo_between_inside_and_outside_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _open = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let own = std::process::id() as i32;
        let about = |found: Vec<Problem>| found.into_iter().find(|p| p.what.contains("FIFO"));
        assert_eq!(about(problems(&[own])), None, "nobody else has it");
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .stdin(fs::OpenOptions::new().read(true).write(true).open(&path).unwrap())
            .spawn()
            .unwrap();
        let found = about(problems(&[own]));
        let both = about(problems(&[own, other.id() as i32]));
        other.kill().unwrap();
        other.wait().unwrap();
        let words = format!("process {} (sleep)", other.id());
        assert!(found.is_some_and(|p| p.why.contains(&words) && !p.hint.is_empty()));
        assert_eq!(both, None, "both go");
    }

    #[test]
    fn a_large_file_without_a_name_is_found() {
        let file = tempfile::tempfile().unwrap();
        let about = || problems(&[std::process::id() as i32]);
        let is_it = |p: &Problem| p.what.contains("without a name");
        file.set_len(u64::from(MAX_NAMELESS)).unwrap();
        assert!(!about().iter().any(is_it));
        file.set_len(u64::from(MAX_NAMELESS) + 1).unwrap();
        assert!(about().iter().any(is_it));
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
