//! A system call made by another process, from outside: ptrace(2).
//!
//! One thread of the target is stopped for some hundred microseconds, its registers are pointed at
//! the `syscall` instruction that the kernel's own vDSO contains, one step is made, and everything
//! is put back. No byte of the target's memory is written. A system call that was interrupted by
//! it goes on by the kernel's own restart; epoll_wait(2) and a few others return `EINTR` once, as
//! they do for any debugger.
//!
//! What depends on the architecture is in [`arch`].

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// `PTRACE_O_SUSPEND_SECCOMP`: the target's own filters must not judge our calls.
const SUSPEND_SECCOMP: i32 = 1 << 21;
/// `PTRACE_EVENT_STOP`
const EVENT_STOP: i32 = 128;

/// The registers of one architecture, and how a system call is made with them.
#[cfg(target_arch = "x86_64")]
mod arch {
    /// Registers as ptrace(2) hands them out.
    pub type Registers = libc::user_regs_struct;
    /// The `syscall` instruction.
    pub const INSTRUCTION: &[u8] = &[0x0f, 0x05];
    /// What we call.
    pub const USERFAULTFD: u64 = libc::SYS_userfaultfd as u64;
    /// What we call.
    pub const CLOSE: u64 = libc::SYS_close as u64;
    /// What we call.
    pub const MUNMAP: u64 = libc::SYS_munmap as u64;

    /// Registers that make a call when the instruction at `at` runs.
    pub fn call(saved: &Registers, at: u64, number: u64, arguments: [u64; 2]) -> Registers {
        let mut registers = *saved;
        registers.rip = at;
        registers.rax = number;
        [registers.rdi, registers.rsi] = arguments;
        // Not in a system call: the kernel must not restart the one that was interrupted now.
        registers.orig_rax = u64::MAX;
        registers
    }

    /// Where the thread is.
    pub fn position(registers: &Registers) -> u64 {
        registers.rip
    }

    /// What the call returned.
    pub fn result(registers: &Registers) -> i64 {
        registers.rax as i64
    }
}

/// Makes a thread call userfaultfd(2) and hands the new descriptor to `take` by its number in the
/// target, before it is closed there again.
///
/// # Errors
/// `Unsupported` on other architectures; the system's error when the thread has ended, cannot be
/// traced (somebody traces it already), or the call fails.
#[cfg(target_arch = "x86_64")]
pub fn userfaultfd_of<T>(
    tid: i32,
    flags: u64,
    take: impl FnOnce(i32) -> io::Result<T>,
) -> io::Result<T> {
    let at = instruction(tid)?;
    let stopped = Stopped::new(tid)?;
    let fd = stopped.call(at, arch::USERFAULTFD, [flags, 0])?;
    let taken = take(fd as i32);
    // It stays open in the target if this fails, which nothing but the target's end can cause.
    stopped.call(at, arch::CLOSE, [fd as u64, 0])?;
    taken
}

/// See above.
#[cfg(not(target_arch = "x86_64"))]
pub fn userfaultfd_of<T>(_: i32, _: u64, _: impl FnOnce(i32) -> io::Result<T>) -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Makes a task call munmap(2), unless one of its threads runs there; whether it did.
///
/// # Errors
/// As [`userfaultfd_of`].
#[cfg(target_arch = "x86_64")]
pub fn unmap_in(pid: i32, start: u64, end: u64) -> io::Result<bool> {
    let at = instruction(pid)?;
    let mut stopped = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        if let Some(tid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
            stopped.push(Stopped::new(tid)?);
        }
    }
    let Some(first) = stopped.first() else { return Err(io::ErrorKind::NotFound.into()) };
    if stopped.iter().any(|s| (start..end).contains(&arch::position(&s.saved))) {
        return Ok(false);
    }
    first.call(at, arch::MUNMAP, [start, end - start])?;
    Ok(true)
}

/// See above.
#[cfg(not(target_arch = "x86_64"))]
pub fn unmap_in(_: i32, _: u64, _: u64) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The address of a system call instruction in a thread's vDSO.
#[cfg(target_arch = "x86_64")]
fn instruction(tid: i32) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{tid}/maps"))?;
    let range = maps
        .lines()
        .find(|l| l.ends_with("[vdso]"))
        .and_then(|l| l.split(' ').next())
        .and_then(|r| r.split_once('-'))
        .and_then(|(a, b)| {
            Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?))
        });
    let (start, end) = range.ok_or_else(|| io::Error::other("the task has no vDSO"))?;
    let mut code = vec![0; (end - start) as usize];
    fs::File::open(format!("/proc/{tid}/mem"))?.read_exact_at(&mut code, start)?;
    code.windows(arch::INSTRUCTION.len())
        .position(|w| w == arch::INSTRUCTION)
        .map(|i| start + i as u64)
        .ok_or_else(|| io::Error::other("the vDSO makes no system call"))
}

/// A thread that stands still, with all signals held back. Goes on where it was on drop.
#[cfg(target_arch = "x86_64")]
struct Stopped {
    tid: Pid,
    saved: arch::Registers,
    mask: u64,
}

#[cfg(target_arch = "x86_64")]
impl Stopped {
    fn new(tid: i32) -> io::Result<Stopped> {
        let tid = Pid::from_raw(tid);
        let options = ptrace::Options::from_bits_retain(SUSPEND_SECCOMP);
        if ptrace::seize(tid, options).is_err() {
            // Without CONFIG_CHECKPOINT_RESTORE there is no such option; without a filter in the
            // target it is not needed.
            ptrace::seize(tid, ptrace::Options::empty())?;
        }
        let prepared = ptrace::interrupt(tid)
            .map_err(io::Error::from)
            .and_then(|()| wait_stop(tid))
            .and_then(|()| Ok((ptrace::getregs(tid)?, signal_mask(tid)?)))
            .and_then(|(saved, mask)| {
                // SIGTRAP stays open: the trap of a single step that finds it blocked resets the
                // process's handler for it.
                set_signal_mask(tid, !(1 << (libc::SIGTRAP - 1)))?;
                Ok(Stopped { tid, saved, mask })
            });
        if prepared.is_err() {
            let _ = ptrace::detach(tid, None);
        }
        prepared
    }

    fn call(&self, at: u64, number: u64, arguments: [u64; 2]) -> io::Result<i64> {
        ptrace::setregs(self.tid, arch::call(&self.saved, at, number, arguments))?;
        loop {
            ptrace::step(self.tid, None)?;
            match waitpid(self.tid, Some(WaitPidFlag::__WALL))? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break,
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                // A stop for somebody else's SIGSTOP: it counts again when we are gone.
                _ => {}
            }
        }
        match arch::result(&ptrace::getregs(self.tid)?) {
            error @ -4095..=-1 => Err(io::Error::from_raw_os_error(-error as i32)),
            value => Ok(value),
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Stopped {
    fn drop(&mut self) {
        // Each can only fail when the thread has been killed.
        let _ = ptrace::setregs(self.tid, self.saved);
        let _ = set_signal_mask(self.tid, self.mask);
        let _ = ptrace::detach(self.tid, None);
    }
}

/// Waits for the stop that PTRACE_INTERRUPT makes, letting signals through that come before it.
#[cfg(target_arch = "x86_64")]
fn wait_stop(tid: Pid) -> io::Result<()> {
    loop {
        match waitpid(tid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceEvent(_, _, EVENT_STOP) => return Ok(()),
            WaitStatus::Stopped(_, signal) => ptrace::cont(tid, signal)?,
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            _ => {}
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn signal_mask(tid: Pid) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes as many bytes as the size that is passed into a live variable.
    let r = unsafe {
        libc::ptrace(libc::PTRACE_GETSIGMASK, tid.as_raw(), size_of::<u64>(), &raw mut mask)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(mask) }
}

#[cfg(target_arch = "x86_64")]
fn set_signal_mask(tid: Pid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the size that is passed from a live variable.
    let r = unsafe {
        libc::ptrace(libc::PTRACE_SETSIGMASK, tid.as_raw(), size_of::<u64>(), &raw const mask)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
