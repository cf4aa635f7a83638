//! What makes hardware breakpoints quick: perf_event_open(2).
//!
//! CRIU stops the code that it puts into a task by a breakpoint, which to the kernel is an event of
//! that task's. With the first such event on a machine the kernel changes code that all schedulers
//! run through, and waits until every processor has seen that: 6 to 16 ms, in the freeze. As long as
//! any event of a task's is open it has nothing to change.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// `PERF_TYPE_SOFTWARE`, `PERF_COUNT_SW_DUMMY`, `PERF_FLAG_FD_CLOEXEC`, `PERF_ATTR_SIZE_VER0`.
const TYPE_SOFTWARE: u64 = 1;
const COUNT_DUMMY: u64 = 9;
const FD_CLOEXEC: u64 = 1 << 3;
const ATTR_SIZE: u64 = 64;
/// Of struct perf_event_attr: `exclude_kernel` and `exclude_hv`. More is not asked for, so that
/// `perf_event_paranoid` forbids it to fewer.
const ONLY_USER: u64 = 1 << 5 | 1 << 6;

/// An open event that counts nothing.
#[derive(Debug)]
pub struct DummyEvent(#[expect(dead_code, reason = "it is held, not used")] OwnedFd);

impl DummyEvent {
    /// Opens one, of the calling thread's. It counts as long as it is open, whether or not that
    /// thread lives.
    ///
    /// # Errors
    /// `EACCES`, `EPERM` or `ENOSYS` where `perf_event_paranoid`, seccomp or the kernel does not allow it.
    pub fn open() -> io::Result<DummyEvent> {
        // type and size, config, sample_period, sample_type, read_format, flags, wakeup, -
        let attr: [u64; 8] =
            [TYPE_SOFTWARE | ATTR_SIZE << 32, COUNT_DUMMY, 0, 0, 0, ONLY_USER, 0, 0];
        // SAFETY: the structure has the size that it says.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, FD_CLOEXEC)
        };
        let fd = Errno::result(fd)?;
        // SAFETY: it is new, and nobody else's.
        Ok(DummyEvent(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// The same where nothing depends on it.
    pub fn if_possible() -> Option<DummyEvent> {
        DummyEvent::open()
            .inspect_err(|e| {
                tracing::debug!("no perf event is held open, breakpoints are slow: {e}")
            })
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_held_open_where_it_may_be() {
        let held = || {
            std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter(|entry| {
                std::fs::read_link(entry.path())
                    .is_ok_and(|to| to == std::path::Path::new("anon_inode:[perf_event]"))
            })
        };
        match DummyEvent::open() {
            Ok(event) => {
                assert!(held().count() > 0);
                drop(event);
            }
            Err(e) => {
                let kind = e.raw_os_error();
                assert!(matches!(kind, Some(libc::EACCES | libc::EPERM | libc::ENOSYS)), "{e}");
            }
        }
    }
}
