//! What the process was given at `execve`, before the Rust runtime changed it.
//!
//! Rust's start-up ignores SIGPIPE and opens `/dev/null` on standard streams that
//! arrive closed. Neither is undone by `execve(2)`, so a runtime started through
//! ferry would see another world than one started directly. Both facts are recorded
//! by a constructor that runs before that start-up, and put back by [`restore`].

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

static SIGPIPE_IGNORED: AtomicBool = AtomicBool::new(false);
/// Bit n is set when standard stream n was closed.
static CLOSED_STREAMS: AtomicU8 = AtomicU8::new(0);

// SAFETY: `.init_array` holds pointers to functions of the C ABI, which the loader calls
// once, on the only thread; `record` uses nothing that needs Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static RECORD: extern "C" fn() = record;

extern "C" fn record() {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only asks; `now` is valid for the write, and all-zero is a
    // valid `sigaction` should the call fail.
    let ignored = unsafe {
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), now.as_mut_ptr());
        now.assume_init().sa_sigaction == libc::SIG_IGN
    };
    SIGPIPE_IGNORED.store(ignored, Ordering::Relaxed);
    let mut closed = 0;
    for fd in 0..3 {
        // SAFETY: F_GETFD takes no pointer and changes nothing, whatever the number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            closed |= 1 << fd;
        }
    }
    CLOSED_STREAMS.store(closed, Ordering::Relaxed);
}

/// Puts SIGPIPE and the standard streams back to what the caller gave us.
///
/// Only for use right before [execve(2)](https://man7.org/linux/man-pages/man2/execve.2.html):
/// after it, writing to a standard stream may write nowhere.
pub fn restore() {
    if !SIGPIPE_IGNORED.load(Ordering::Relaxed) {
        // SAFETY: SIG_DFL is a valid disposition and runs no code of ours.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    let closed = CLOSED_STREAMS.load(Ordering::Relaxed);
    for fd in (0..3).filter(|fd| closed & (1 << fd) != 0) {
        // SAFETY: the stream was closed when we started; what is open on the number now is
        // the runtime's `/dev/null`, which nobody owns.
        unsafe { libc::close(fd) };
    }
}
