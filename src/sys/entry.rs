//! The first lines that run: C's `main` instead of Rust's.
//!
//! Rust's own start-up ignores SIGPIPE and opens `/dev/null` on standard streams that arrive
//! closed. `execve(2)` undoes neither, so a runtime started through ferry would see another
//! world than one started directly; and it costs a fifth of a millisecond on every call.
//! A pass-through therefore goes without it, and what stays is what wants it: see
//! [`become_rust_program`].

use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStrExt;

/// C's argument vector as the words that the caller wrote.
///
/// # Safety
///
/// `argv` must point to `argc` pointers to C strings, as C's `main` gets them.
pub unsafe fn arguments(argc: c_int, argv: *const *const c_char) -> Vec<OsString> {
    (0..usize::try_from(argc).unwrap_or(0))
        .map(|i| {
            // SAFETY: `i` is below `argc`, and the caller vouches for the vector.
            let word = unsafe { CStr::from_ptr(*argv.add(i)) };
            OsStr::from_bytes(word.to_bytes()).to_owned()
        })
        .collect()
}

/// Does what Rust's start-up would have done, for a process that is going to stay.
///
/// SIGPIPE is ignored, so that a broken pipe is an error and not the end; and no standard
/// stream is closed, so that no file that is opened later is taken for one.
pub fn become_rust_program() {
    // SAFETY: SIG_IGN is a valid disposition and runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    for fd in 0..3 {
        // SAFETY: F_GETFD takes no pointer and changes nothing, whatever the number; `open`
        // gets a C string, and takes the lowest free number, which is `fd`: those below it
        // are open.
        unsafe {
            if libc::fcntl(fd, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
}

/// Makes a function from the command line to an exit code the program's `main`, for a crate that
/// says `#![no_main]`.
#[macro_export]
macro_rules! c_main {
    ($dispatch:path) => {
        // SAFETY: this is the program's only `main`, and has its signature.
        #[unsafe(no_mangle)]
        extern "C" fn main(
            argc: std::ffi::c_int,
            argv: *const *const std::ffi::c_char,
        ) -> std::ffi::c_int {
            // SAFETY: these are the arguments of C's `main`, as they came.
            let arguments = unsafe { $crate::sys::entry::arguments(argc, argv) };
            // A panic must not leave a C function. 101 is what Rust makes of one.
            let code = std::panic::catch_unwind(|| $dispatch(arguments)).unwrap_or(101);
            // Unlike returning, this also writes out what is buffered.
            std::process::exit(code.into())
        }
    };
}
