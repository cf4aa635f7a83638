//! Reads that change memory without the page tables knowing: O_DIRECT, open(2).
//!
//! The kernel finds the pages that such a read is to fill before it asks the device, which writes to
//! them whenever it likes. A [`Tracker`](crate::memory::track::Tracker) sees that the pages were found, not
//! that they were written to: a look in between counts them as written, and protects them; who then
//! reads them before the device has come, has old contents, and is never told of the new ones.
//!
//! So after a look, and before any page is read, each thread is stopped and let go again: it stops
//! where it leaves the kernel, so that each read that was on its way at the look is over. One that
//! begins later finds pages that are protected again, and shows at the next look. That takes as long as the
//! slowest disk operation; it is therefore only for containers that have a file open that may be
//! read so.
//!
//! Requests that outlive the system call that made them are another matter: libaio and io_uring are
//! refused.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::sys::process::{proc_head, proc_text};

/// File systems that read through the page cache unless a file was opened with O_DIRECT: what is
/// read is copied by the processor, and that shows. FUSE, 9p, SMB and others may do otherwise.
const CACHED: &[&str] = &[
    "bpf",
    "btrfs",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "devtmpfs",
    "erofs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hugetlbfs",
    "iso9660",
    "mqueue",
    "nfs",
    "nfs4",
    "overlay",
    "proc",
    "ramfs",
    "rootfs",
    "securityfs",
    "squashfs",
    "sysfs",
    "tmpfs",
    "tracefs",
    "vfat",
    "xfs",
];

/// Tells whether any of these processes has a file open from which a device may write into its memory.
///
/// A file that one thread closes while another reads from it is not seen; no program that can rely
/// on what it has read does that.
pub fn may_be_read_into(pids: &[i32]) -> bool {
    let own = ProcessMounts::of(std::process::id() as i32);
    pids.iter().any(|pid| task_may(*pid, &own))
}

fn task_may(pid: i32, outside: &ProcessMounts) -> bool {
    // Whoever has ended meanwhile has no memory.
    let Ok(list) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let mut mounts = None;
    list.flatten().any(|entry| {
        let Ok(target) = fs::read_link(entry.path()) else { return false };
        if !is_file(&target) {
            return false;
        }
        let number = entry.file_name();
        let Ok(info) = proc_head(pid, &format!("fdinfo/{}", number.to_string_lossy())) else {
            return false;
        };
        let mounts = mounts.get_or_insert_with(|| ProcessMounts::of(pid));
        // A standard stream may be the host's.
        is_direct(&info, |id| mounts.kind(id).or_else(|| outside.kind(id)))
    })
}

/// Tells whether a link in `/proc/PID/fd` leads to a file and not to a socket, pipe, timer or the like.
fn is_file(target: &Path) -> bool {
    let bytes = target.as_os_str().as_bytes();
    let other: [&[u8]; 4] = [b"socket:", b"pipe:", b"anon_inode:", b"/memfd:"];
    !other.iter().any(|kind| bytes.starts_with(kind))
}

/// Judges by `/proc/PID/fdinfo`, and what the mount of a number is.
fn is_direct<'a>(info: &str, kind: impl FnOnce(&str) -> Option<&'a str>) -> bool {
    let field = |name: &str| info.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    let flags = field("flags:").and_then(|f| i32::from_str_radix(f, 8).ok());
    let Some(flags) = flags else { return true };
    // Nothing is read through these.
    if flags & libc::O_ACCMODE == libc::O_WRONLY || flags & (libc::O_PATH | libc::O_DIRECTORY) != 0
    {
        return false;
    }
    let cached = || field("mnt_id:").and_then(kind).is_some_and(|kind| CACHED.contains(&kind));
    flags & libc::O_DIRECT != 0 || !cached()
}

/// A process's mounts.
struct ProcessMounts(String);

impl ProcessMounts {
    fn of(pid: i32) -> ProcessMounts {
        ProcessMounts(proc_text(pid, "mountinfo").unwrap_or_default())
    }

    /// The file system of a mount, by its number. proc_pid_mountinfo(5)
    fn kind(&self, id: &str) -> Option<&str> {
        let line = self.0.lines().find(|line| line.split(' ').next() == Some(id))?;
        // Spaces in names are escaped: the first lone dash ends the optional fields.
        line.split(' ').skip_while(|field| *field != "-").nth(1)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;
    use crate::fuzz::{Target, found};

    const MOUNTS: &str = "\
        21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        22 21 0:40 / /fuse rw - fuse.x srv rw\n\
        23 21 0:41 / /\\040-\\040ext4 rw - 9p srv rw\n";

    fn judge(flags: i32, mount: &str) -> bool {
        let mounts = ProcessMounts(MOUNTS.into());
        let info = format!("pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t{mount}\nino:\t5\n");
        is_direct(&info, |id| mounts.kind(id))
    }

    #[test]
    fn only_what_is_read_past_the_page_cache_counts() {
        assert!(!judge(libc::O_RDWR, "21"));
        assert!(judge(libc::O_RDWR | libc::O_DIRECT, "21"));
        assert!(judge(libc::O_RDONLY | libc::O_DIRECT, "21"));
        assert!(!judge(libc::O_WRONLY | libc::O_DIRECT, "21"));
        assert!(!judge(libc::O_PATH | libc::O_DIRECT, "21"));
        // Nobody knows how these read.
        assert!(judge(libc::O_RDONLY, "22") && judge(libc::O_RDONLY, "23"));
        assert!(judge(libc::O_RDONLY, "99"), "a mount that is not known");
        assert!(!judge(libc::O_RDONLY | libc::O_DIRECTORY, "22"));
        assert!(is_direct("", |_| None), "a line that is not known");
    }

    #[test]
    fn sockets_and_the_like_are_no_files() {
        for name in ["socket:[5]", "pipe:[7]", "anon_inode:[eventpoll]", "/memfd:x (deleted)"] {
            assert!(!is_file(Path::new(name)), "{name}");
        }
        assert!(is_file(Path::new("/srv/socket:[5]")) && is_file(Path::new("(unreachable)/x")));
    }

    #[test]
    fn a_task_with_a_file_open_so_is_found() {
        let mut child = std::process::Command::new("sleep");
        child.arg("60").stdin(std::process::Stdio::null());
        child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "x").unwrap();
        let run = |child: &mut std::process::Command| {
            let mut child = child.spawn().unwrap();
            let found = may_be_read_into(&[child.id() as i32]);
            child.kill().unwrap();
            child.wait().unwrap();
            found
        };
        let cached = run(child.stdin(fs::File::open(&path).unwrap()));
        // Where the file system knows it.
        let direct = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        let Ok(direct) = direct else { return };
        let direct = run(child.stdin(direct));
        assert!(direct && !may_be_read_into(&[]));
        let own = ProcessMounts::of(std::process::id() as i32);
        let known = own.0.lines().any(|l| l.contains(" - ext4 ") || l.contains(" - overlay "));
        assert!(!cached || !known, "a file that is read through the cache counts");
    }

    #[test]
    fn fuzz_open_files() {
        let info = "pos:\t0\nflags:\t0100002\nmnt_id:\t21\nino:\t5\n";
        let target = Target::new("open-files").sample([info, "\0", MOUNTS].concat());
        target.words(&[b"flags:", b"mnt_id:", b" - ", b"\0"]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let (info, mounts) = text.split_once('\0').unwrap_or((&text, ""));
            let mounts = ProcessMounts(mounts.into());
            let said = [is_direct(info, |id| mounts.kind(id)), is_file(Path::new(info))];
            found(&said.map(usize::from))
        });
    }
}
