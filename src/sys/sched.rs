//! How the kernel schedules another task's input and output: ioprio_get(2).

use std::io;

/// `IOPRIO_CLASS_RT` of linux/ioprio.h.
pub const REALTIME: i32 = 1;
/// `IOPRIO_CLASS_IDLE`.
pub const IDLE: i32 = 3;

/// A task's class.
///
/// # Errors
/// When it has ended.
pub fn io_class(tid: i32) -> io::Result<i32> {
    const WHO_PROCESS: libc::c_int = 1;
    const CLASS_SHIFT: libc::c_long = 13;
    // SAFETY: no pointers.
    let priority = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, tid) };
    if priority < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((priority >> CLASS_SHIFT) as i32)
}
