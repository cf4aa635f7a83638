//! Mount namespaces: [mount_namespaces(7)](https://man7.org/linux/man-pages/man7/mount_namespaces.7.html).

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::{io, thread};

use nix::sched::{CloneFlags, setns, unshare};

/// The root of the mount namespace that a process is in, only to be looked at, whatever root its tasks
/// have given themselves: chroot(2), setns(2).
///
/// # Errors
/// `ENOENT` when the process is gone, `EPERM` without CAP_SYS_ADMIN.
pub fn root_of(pid: i32) -> io::Result<OwnedFd> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    let enter = move || {
        // A thread that shares its root with others cannot enter.
        unshare(CloneFlags::CLONE_FS)?;
        setns(&namespace, CloneFlags::CLONE_NEWNS)?;
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        Ok(OpenOptions::new().read(true).custom_flags(flags).open("/")?.into())
    };
    let thread = thread::Builder::new().name("mounts".into()).spawn(enter)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that looks has died")))
}

/// Tells whether a process is in another mount namespace than this one, as far as can be seen.
pub fn has_own(pid: i32) -> bool {
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt"));
    matches!((of("self"), of(&pid.to_string())), (Ok(ours), Ok(other)) if ours != other)
}
