//! A filter of this process's own system calls: seccomp(2).

use std::io;

/// `KCMP_EPOLL_TFD` of linux/kcmp.h: kcmp(2) compares a file with one that an epoll watches.
const EPOLL_TARGET: u32 = 7;
// Offsets in `struct seccomp_data` of linux/seccomp.h.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The low half of the third argument, on a little-endian machine.
const THIRD: u32 = 32;

/// `AUDIT_ARCH_*` of linux/audit.h.
#[cfg(target_arch = "x86_64")]
const HERE: u32 = 0xc000_003e;
/// `AUDIT_ARCH_*` of linux/audit.h.
#[cfg(target_arch = "aarch64")]
const HERE: u32 = 0xc000_00b7;
/// None: no call is ever of this kind.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const HERE: u32 = 0;

/// From now on, and over execve(2), this process and its children are told by kcmp(2) that whatever
/// they ask about is what an epoll watches, without a look at it.
///
/// # Errors
/// Without `CAP_SYS_ADMIN` or `CONFIG_SECCOMP_FILTER`: then nothing has changed.
pub fn epoll_targets_are_right() -> io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };

    // Goes on with the next step, or that many further on.
    let unless = |k, further| libc::sock_filter { code: EQUAL, jt: 0, jf: further, k };
    let mut program = [
        step(LOAD, ARCHITECTURE),
        unless(HERE, 5),
        step(LOAD, NUMBER),
        unless(libc::SYS_kcmp as u32, 3),
        step(LOAD, THIRD),
        unless(EPOLL_TARGET, 1),
        // An error of number 0 is none: the call returns 0, "the same".
        step(RETURN, libc::SECCOMP_RET_ERRNO),
        step(RETURN, libc::SECCOMP_RET_ALLOW),
    ];

    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program is alive as long as the call takes, and as long as it says.
    let r = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter)
    };

    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

    use super::super::process::watches;
    use super::*;

    #[test]
    fn the_filter_answers_for_epoll_and_for_nothing_else() {
        // The filter is one thread's.
        let checked = std::thread::spawn(|| {
            let me = std::process::id() as i32;
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
            let (read, write) = nix::unistd::pipe().unwrap();
            epoll.add(&read, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
            let number = epoll.0.as_raw_fd();
            assert!(watches(me, number, read.as_raw_fd()).unwrap());
            assert!(watches(me, number, write.as_raw_fd()).is_err());
            if epoll_targets_are_right().is_err() {
                return false;
            }

            assert!(watches(me, number, write.as_raw_fd()).unwrap());
            // SAFETY: kcmp takes numbers only, for KCMP_FILE.
            let same = unsafe {
                libc::syscall(libc::SYS_kcmp, me, me, 0, read.as_raw_fd(), write.as_raw_fd())
            };
            assert_ne!(same, 0);
            true
        });

        if !checked.join().unwrap() {
            eprintln!("skipped: this needs CAP_SYS_ADMIN and seccomp filters");
        }
    }
}
