//! System calls made by another process, from outside.
//!
//! One thread of the target is [stopped](Stopped) for some hundred microseconds, its registers are
//! pointed at the system call instruction that the kernel's own vDSO contains, one step is made,
//! and everything is put back. No byte of the target's memory is written. A system call that was
//! interrupted by it goes on by the kernel's own restart; epoll_wait(2) and a few others return
//! `EINTR` once, as they do for any debugger.

use std::time::Instant;
use std::{fs, io};

use super::stopped::{Stopped, instruction};

/// Makes a thread call userfaultfd(2) and hands the new descriptor to `take` by its number in the
/// target, before it is closed there again.
///
/// # Errors
/// `Unsupported` on processors that [`crate::sys::arch`] does not know; the system's error when the
/// thread has ended, cannot be traced (somebody traces it already), or the call fails; `TimedOut`
/// as [`Stopped::within`].
pub fn userfaultfd_of<T>(
    tid: i32,
    flags: u64,
    until: Instant,
    take: impl FnOnce(i32) -> io::Result<T>,
) -> io::Result<T> {
    let at = instruction(tid)?;
    let mut stopped = Stopped::within(tid, until)?;
    let fd = stopped.call(at, libc::SYS_userfaultfd, [flags])?;
    let taken = take(fd as i32);
    // It stays open in the target if this fails, which nothing but the target's end can cause.
    stopped.call(at, libc::SYS_close, [fd as u64])?;
    taken
}

/// Makes a task call munmap(2), unless one of its threads runs there; whether it did.
///
/// # Errors
/// As [`userfaultfd_of`].
pub fn unmap_in(pid: i32, start: u64, end: u64) -> io::Result<bool> {
    // On a thread that ends: see `Stopped::within`.
    std::thread::scope(|scope| {
        let work = scope.spawn(|| unmap_here(pid, start, end));
        work.join().unwrap_or_else(|_| Err(io::Error::other("the thread has died")))
    })
}

fn unmap_here(pid: i32, start: u64, end: u64) -> io::Result<bool> {
    let at = instruction(pid)?;
    let mut stopped = Vec::new();
    for tid in threads(pid)? {
        stopped.push(Stopped::new(tid)?);
    }
    if stopped.iter().any(|s| (start..end).contains(&s.position())) {
        return Ok(false);
    }
    let Some(first) = stopped.first_mut() else { return Err(io::ErrorKind::NotFound.into()) };
    first.call(at, libc::SYS_munmap, [start, end - start])?;
    Ok(true)
}

/// The threads of a process.
///
/// # Errors
/// When it is gone.
pub fn threads(pid: i32) -> io::Result<Vec<i32>> {
    let list = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(list.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}
