//! A thread of another task, stopped from outside: ptrace(2).
//!
//! It is seized and interrupted, which no signal handler notices; where a control group has frozen
//! it, it is frozen again when it is let go.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use std::{fs, io};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::process::proc_text;
use super::waits::{Clock, Processors, SeenWait};
use super::{arch, maps};

mod waiting;

pub use waiting::{Wait, wait_no_longer};

/// `PTRACE_O_SUSPEND_SECCOMP`: the target's own filters must not judge our calls.
const SUSPEND_SECCOMP: i32 = 1 << 21;
/// `PTRACE_EVENT_STOP`
const EVENT_STOP: i32 = 128;
/// Time that a thread may take to stop where nobody says otherwise: it only has to leave the kernel.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked whether one of many has stopped: wait(2) knows no time limit.
const GLANCE: Duration = Duration::from_micros(100);
/// Stops that are gone through for one instruction.
const STEPS: usize = 1000;
/// Longest vDSO: those of today have two pages.
const MAX_VDSO: u64 = 64 << 10;
/// `NT_PRSTATUS`: the register set of the general registers. linux/elf.h
const GENERAL: usize = 1;

/// `PTRACE_GET_RSEQ_CONFIGURATION` of linux/ptrace.h.
const RSEQ_CONFIGURATION: u32 = 0x420f;

/// A thread that stands still. Goes on where it was on drop.
#[derive(Debug)]
pub struct Stopped {
    tid: Pid,
    /// With which general registers it will go on.
    general: arch::Registers,
    /// With which signals blocked.
    mask: u64,
    /// Whether either was changed.
    changed: bool,
}

/// Everything that a thread needs to go on where it stood when this was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadState {
    /// The thread.
    pub tid: i32,
    /// Its blocked signals.
    pub mask: u64,
    /// The general registers, as the kernel lays them out.
    pub general: Vec<u8>,
    /// All others.
    pub extended: Vec<u8>,
}

impl ThreadState {
    /// The thread's stack pointer; none where it is from another machine.
    pub fn stack(&self) -> Option<u64> {
        if !arch::SUPPORTED || self.general.len() != size_of::<arch::Registers>() {
            return None;
        }
        // SAFETY: there are as many bytes, and any make valid numbers.
        let registers = unsafe { self.general.as_ptr().cast::<arch::Registers>().read_unaligned() };
        Some(arch::stack(&registers))
    }
}

impl Stopped {
    /// Stops a thread, within a second.
    ///
    /// # Errors
    /// As [`Stopped::within`].
    pub fn new(tid: i32) -> io::Result<Stopped> {
        Stopped::within(tid, Instant::now() + PATIENCE)
    }

    /// Stops a thread if it can be stopped until then. A call in which it waits goes on when it is let go.
    ///
    /// # Errors
    /// As [`Stopped::standing`].
    pub fn within(tid: i32, until: Instant) -> io::Result<Stopped> {
        let clock = Clock::of(tid);
        let before = SeenWait::of(tid, &clock, &mut Processors::default());
        let mut stopped = Stopped::standing(tid, until)?;
        stopped.wait_on(&clock, before.as_ref());
        Ok(stopped)
    }

    /// Stops a thread that stands still already, as its control group is frozen; or one of which nobody minds
    /// that a call in which it waits comes to its end.
    ///
    /// # Errors
    /// `Unsupported` on other architectures; the system's error when the thread has ended or
    /// somebody traces it already; `TimedOut` when it sleeps uninterruptibly. It stops as soon as it
    /// wakes then, until the calling thread ends: call this on one that does.
    pub fn standing(tid: i32, until: Instant) -> io::Result<Stopped> {
        if !arch::SUPPORTED {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let tid = Pid::from_raw(tid);
        let options = ptrace::Options::from_bits_retain(SUSPEND_SECCOMP);
        if let Err(e) = ptrace::seize(tid, options) {
            // Without CONFIG_CHECKPOINT_RESTORE there is no such option, and a process that has a
            // filter itself may not use it. A filter in the target might end it for our calls.
            if !is_unfiltered(&proc_text(tid.as_raw(), "status")?) {
                return Err(e.into());
            }
            ptrace::seize(tid, ptrace::Options::empty())?;
        }

        let prepared = ptrace::interrupt(tid)
            .map_err(io::Error::from)
            .and_then(|()| wait_stop(tid, until))
            .and_then(|()| Ok((general(tid)?, signal_mask(tid)?)));
        match prepared {
            Ok((general, mask)) => Ok(Stopped { tid, general, mask, changed: false }),
            Err(e) => {
                let _ = ptrace::detach(tid, None);
                Err(e)
            }
        }
    }

    /// Returns where it is in its program.
    pub fn position(&self) -> u64 {
        arch::position(&self.general)
    }

    /// Returns what it needs to go on from here.
    ///
    /// # Errors
    /// When it has been killed.
    pub fn state(&self) -> io::Result<ThreadState> {
        let mut extended = vec![0; arch::EXTENDED_MAX];
        let got = register_set(libc::PTRACE_GETREGSET, self.tid, arch::EXTENDED, &mut extended)?;
        extended.truncate(got);
        let general = bytes_of(&self.general).to_vec();
        Ok(ThreadState { tid: self.tid.as_raw(), mask: self.mask, general, extended })
    }

    /// Returns where it has its area for restartable sequences, and of what length: the kernel writes there
    /// whenever the thread goes on. None for a thread that has none, or before Linux 5.13. rseq(2)
    pub fn sequences(&self) -> Option<(u64, u64)> {
        let mut area = [0u8; 24];
        // SAFETY: the kernel writes at most as many bytes as the size that is passed into a live array:
        // `struct ptrace_rseq_configuration` of linux/ptrace.h.
        let r = unsafe {
            libc::ptrace(RSEQ_CONFIGURATION, self.tid.as_raw(), area.len(), area.as_mut_ptr())
        };
        let at = u64::from_ne_bytes(std::array::from_fn(|i| area[i]));
        let length = u32::from_ne_bytes(std::array::from_fn(|i| area[8 + i]));
        (r > 0 && at != 0).then_some((at, length.into()))
    }

    /// Makes it go on from `state`, with no breakpoint in its way, instead of from where it is.
    ///
    /// # Errors
    /// When it has been killed, or the state is none of this kind of processor.
    pub fn assume(&mut self, state: &ThreadState) -> io::Result<()> {
        let mut general = self.general;
        let into = bytes_of_mut(&mut general);
        if into.len() != state.general.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        into.copy_from_slice(&state.general);
        (self.general, self.mask, self.changed) = (general, state.mask, true);
        arch::clear_breakpoints(self.tid)?;
        let mut extended = state.extended.clone();
        register_set(libc::PTRACE_SETREGSET, self.tid, arch::EXTENDED, &mut extended)?;
        Ok(())
    }

    /// Makes it do a system call, with all signals held back; `at` is where an
    /// [instruction](instruction) for it stands. Its control group must not be frozen.
    ///
    /// # Errors
    /// What the call failed with; `ESRCH` when it has been killed; `Unsupported` for a program of
    /// another kind.
    pub fn call<const N: usize>(
        &mut self,
        at: u64,
        number: i64,
        arguments: [u64; N],
    ) -> io::Result<i64> {
        const { assert!(N <= 6) };
        if !arch::native(&self.general) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut all = [0; 6];
        all[..N].copy_from_slice(&arguments);
        self.changed = true;
        // SIGTRAP stays open: the trap of a single step that finds it blocked resets the process's
        // handler for it.
        set_signal_mask(self.tid, !(1 << (libc::SIGTRAP - 1)))?;
        let mut registers = arch::call(&self.general, at, number, all);
        set_general(self.tid, &mut registers)?;
        self.step()?;
        match arch::result(&general(self.tid)?) {
            error @ -4095..=-1 => Err(io::Error::from_raw_os_error(-error as i32)),
            value => Ok(value),
        }
    }
}

impl Stopped {
    /// Makes it do one instruction.
    fn step(&mut self) -> io::Result<()> {
        for _ in 0..STEPS {
            ptrace::step(self.tid, None)?;
            match waitpid(self.tid, Some(WaitPidFlag::__WALL))? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => return Ok(()),
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                // There is no instruction to be done.
                WaitStatus::Stopped(_, Signal::SIGSEGV | Signal::SIGBUS | Signal::SIGILL) => {
                    return Err(io::Error::from_raw_os_error(libc::EFAULT));
                }
                // A stop for somebody else's SIGSTOP: it counts again when we are gone.
                _ => {}
            }
        }
        Err(io::Error::other("the task is stopped again and again"))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Each can only fail when the thread has been killed.
        if self.changed {
            let _ = set_general(self.tid, &mut self.general);
            let _ = set_signal_mask(self.tid, self.mask);
        }
        let _ = ptrace::detach(self.tid, None);
    }
}

/// Waits until each of these threads has left the system call that it was in: they are stopped, and
/// go on as soon as they have. Those that end have left it, too. Call this on a thread that ends.
///
/// # Errors
/// `TimedOut` when one is still inside; `EPERM` when somebody traces one already.
pub fn await_outside(tids: &[i32], until: Instant) -> io::Result<()> {
    let mut inside = 0usize;
    let (mut seen, mut processors) = (HashMap::new(), Processors::default());
    for &tid in tids {
        let clock = Clock::of(tid);
        seen.insert(tid, (clock, SeenWait::of(tid, &clock, &mut processors)));
        let thread = Pid::from_raw(tid);
        match ptrace::seize(thread, ptrace::Options::empty()) {
            Ok(()) => {
                inside += 1;
                // Otherwise it has been killed, and the wait tells.
                let _ = ptrace::interrupt(thread);
            }
            Err(Errno::ESRCH) => {}
            Err(e) if runs(tid) => return Err(e.into()),
            Err(_) => {}
        }
    }

    let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
    while inside > 0 {
        match waitpid(None, Some(flags)) {
            // On its way out, with a signal or without: if it cannot be let go, it has been killed.
            Ok(WaitStatus::PtraceEvent(thread, ..)) => drop(waiting::let_go(thread, &seen)),
            Ok(WaitStatus::Stopped(thread, signal)) => drop(ptrace::detach(thread, signal)),
            Ok(WaitStatus::StillAlive) if Instant::now() > until => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Ok(WaitStatus::StillAlive) => {
                std::thread::park_timeout(GLANCE);
                continue;
            }
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {}
            Err(Errno::ECHILD) => break,
            Err(e) => return Err(e.into()),
            Ok(_) => continue,
        }
        inside -= 1;
    }

    Ok(())
}

/// Tells whether a thread is there, and has not ended.
fn runs(tid: i32) -> bool {
    let status = proc_text(tid, "status").unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| !state.trim().starts_with(['Z', 'X']))
}

/// The address of a system call instruction in a thread's vDSO.
///
/// # Errors
/// When it has none, or is gone.
pub fn instruction(tid: i32) -> io::Result<u64> {
    let (start, end) =
        vdso(&proc_text(tid, "maps")?).ok_or_else(|| io::Error::other("the task has no vDSO"))?;
    let mut code = vec![0; (end - start) as usize];
    fs::File::open(format!("/proc/{tid}/mem"))?.read_exact_at(&mut code, start)?;
    code.windows(arch::INSTRUCTION.len())
        .position(|w| w == arch::INSTRUCTION)
        .map(|i| start + i as u64)
        .ok_or_else(|| io::Error::other("the vDSO makes no system call"))
}

/// Returns where the vDSO is, by the text of a `maps` file.
fn vdso(text: &str) -> Option<(u64, u64)> {
    let found = maps::parse(text).find(|m| m.is_special("[vdso]"))?;
    (found.end - found.start <= MAX_VDSO).then_some((found.start, found.end))
}

/// Tells whether no filter judges the system calls of a thread, by its `status`: proc_pid_status(5).
/// Kernels without seccomp have no such line.
fn is_unfiltered(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    line.is_none_or(|mode| mode.trim() == "0")
}

/// Sees to it that `killed` is called after a process has been told to die by a signal and before
/// anything of it is gone: those whom it traces stand still until that has returned. Works while
/// this process lives.
///
/// A second SIGKILL while `killed` runs cuts it short. ptrace(2), `PTRACE_O_TRACEEXIT`.
///
/// # Errors
/// When it cannot be traced.
pub fn before_death(pid: i32, killed: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let pid = Pid::from_raw(pid);
    let (seized, wait) = std::sync::mpsc::channel();

    // Only the thread that has seized a process hears of it.
    std::thread::Builder::new().name("deathbed".into()).spawn(move || {
        let result = ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACEEXIT);
        let failed = result.is_err();
        let _ = seized.send(result);
        if failed {
            return;
        }

        loop {
            let passed_on = match waitpid(pid, Some(WaitPidFlag::__WALL)) {
                Ok(WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXIT)) => {
                    // As wait(2) will say it: the low seven bits are the signal.
                    if ptrace::getevent(pid).is_ok_and(|status| status & 0x7f != 0) {
                        killed();
                    }
                    let _ = ptrace::detach(pid, None);
                    return;
                }
                // It has been stopped, and stays so until somebody has it go on.
                Ok(WaitStatus::PtraceEvent(_, signal, EVENT_STOP)) if is_stop(signal) => {
                    listen(pid)
                }
                Ok(WaitStatus::PtraceEvent(..)) => ptrace::cont(pid, None),
                Ok(WaitStatus::Stopped(_, signal)) => ptrace::cont(pid, signal),
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(_) => return,
                Ok(_) => Ok(()),
            };

            // Killed in between: the next wait tells.
            let _ = passed_on;
        }
    })?;

    Ok(wait.recv().map_err(io::Error::other)??)
}

/// A signal whose default is to stop a process. signal(7)
fn is_stop(signal: Signal) -> bool {
    matches!(signal, Signal::SIGSTOP | Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU)
}

/// Leaves a process stopped that was stopped by a signal, and hears of what becomes of it: PTRACE_LISTEN,
/// ptrace(2).
fn listen(pid: Pid) -> nix::Result<()> {
    // SAFETY: no address is passed.
    Errno::result(unsafe { libc::ptrace(libc::PTRACE_LISTEN, pid.as_raw(), 0, 0) }).map(drop)
}

/// Waits for the stop that PTRACE_INTERRUPT makes, letting signals through that come before it.
fn wait_stop(tid: Pid, until: Instant) -> io::Result<()> {
    let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
    loop {
        match waitpid(tid, Some(flags))? {
            WaitStatus::PtraceEvent(_, _, EVENT_STOP) => return Ok(()),
            // It takes some microseconds, and wait(2) knows no time limit.
            WaitStatus::StillAlive if Instant::now() > until => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            WaitStatus::StillAlive => std::thread::yield_now(),
            WaitStatus::Stopped(_, signal) => ptrace::cont(tid, signal)?,
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            _ => {}
        }
    }
}

fn general(tid: Pid) -> io::Result<arch::Registers> {
    // SAFETY: registers are numbers; all of them may be zero.
    let mut registers: arch::Registers = unsafe { std::mem::zeroed() };
    register_set(libc::PTRACE_GETREGSET, tid, GENERAL, bytes_of_mut(&mut registers))?;
    Ok(registers)
}

fn set_general(tid: Pid, registers: &mut arch::Registers) -> io::Result<()> {
    register_set(libc::PTRACE_SETREGSET, tid, GENERAL, bytes_of_mut(registers)).map(drop)
}

/// Reads or writes a register set; how many bytes of `bytes` it has.
fn register_set(request: u32, tid: Pid, set: usize, bytes: &mut [u8]) -> io::Result<usize> {
    let mut piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the kernel reads or writes at most iov_len bytes of a live buffer.
    let r = unsafe { libc::ptrace(request, tid.as_raw(), set, &raw mut piece) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(piece.iov_len) }
}

fn bytes_of(registers: &arch::Registers) -> &[u8] {
    // SAFETY: plain numbers without padding, and as many bytes as the type has.
    unsafe {
        std::slice::from_raw_parts((&raw const *registers).cast(), size_of::<arch::Registers>())
    }
}

fn bytes_of_mut(registers: &mut arch::Registers) -> &mut [u8] {
    // SAFETY: as above; any bytes make valid numbers.
    unsafe {
        std::slice::from_raw_parts_mut((&raw mut *registers).cast(), size_of::<arch::Registers>())
    }
}

fn signal_mask(tid: Pid) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes as many bytes as the size that is passed into a live variable.
    let r = unsafe {
        libc::ptrace(libc::PTRACE_GETSIGMASK, tid.as_raw(), size_of::<u64>(), &raw mut mask)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(mask) }
}

fn set_signal_mask(tid: Pid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the size that is passed from a live variable.
    let r = unsafe {
        libc::ptrace(libc::PTRACE_SETSIGMASK, tid.as_raw(), size_of::<u64>(), &raw const mask)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_vdso_is_one() {
        let real = "7ffd000-7fff000 r-xp 00000000 00:00 0                          [vdso]\n";
        let others = "\
            10000-40010000 r-xp 00000000 08:01 77                     /z[vdso]\n\
            50000-60000 r-xp 00000000 08:01 78                        [vdso]\n\
            60000-70000 rw-p 00000000 00:00 0                         [anon:[vdso]]\n\
            80000-90000 r-xp 00000000 08:01 79                        /z [vdso]\n";
        assert_eq!(vdso(&format!("{others}{real}")), Some((0x7ff_d000, 0x7ff_f000)));
        assert_eq!(vdso(others), None);
        assert_eq!(vdso("10000-40010000 r-xp 00000000 00:00 0  [vdso]\n"), None, "too long");
        assert!(vdso(&proc_text(std::process::id() as i32, "maps").unwrap()).is_some());
    }

    #[test]
    fn all_threads_are_waited_for_and_go_on() {
        // One sleeps, one computes, and one has ended.
        let mut children = ["sleep 60", "while :; do :; done", "exit 0"]
            .map(|program| std::process::Command::new("sh").args(["-c", program]).spawn().unwrap());
        let pids = children.each_ref().map(|child| child.id() as i32);
        while runs(pids[2]) {
            std::thread::yield_now();
        }

        for _ in 0..3 {
            let until = Instant::now() + PATIENCE;
            std::thread::scope(|scope| scope.spawn(|| await_outside(&pids, until)).join())
                .unwrap()
                .unwrap();
        }

        for pid in &pids[..2] {
            let status = proc_text(*pid, "status").unwrap();
            assert!(
                status.contains("TracerPid:\t0\n") && !status.contains("State:\tt"),
                "{status}"
            );
        }

        for child in &mut children {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    #[test]
    fn a_filter_is_never_overlooked() {
        assert!(is_unfiltered("Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n"));
        assert!(is_unfiltered("Name:\tx\n"));
        assert!(!is_unfiltered("Seccomp:\t2\n") && !is_unfiltered("Seccomp:\t1\n"));
    }
}
