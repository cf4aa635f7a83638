//! Memory that a process denies itself: none that can be written and executed (MDWE). It asks, and sets
//! it, by prctl(2) itself, or is made to ([`Stopped::call`](super::stopped::Stopped::call)). Linux 6.3.

/// `PR_SET_MDWE`, `PR_GET_MDWE` of linux/prctl.h.
const SET: u64 = 65;
const GET: u64 = 66;

/// The arguments by which a process asks for its flags.
pub const ASK: [u64; 5] = [GET, 0, 0, 0, 0];

/// The arguments by which it sets them, for good.
pub fn deny(flags: u64) -> [u64; 5] {
    [SET, flags, 0, 0, 0]
}

/// Tells whether this kernel has them.
pub fn known() -> bool {
    // SAFETY: no pointers.
    unsafe { libc::prctl(GET as i32, 0, 0, 0, 0) >= 0 }
}
