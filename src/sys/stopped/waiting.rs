//! A stopped thread that was in a call in which it waits: see [`waits`](crate::sys::waits).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{PATIENCE, Stopped, general, set_general, set_signal_mask, signal_mask, wait_stop};
use crate::sys::arch;
use crate::sys::waits::{
    Clock, INTERRUPTED, Processors, RESTART_BLOCK, SeenWait, SystemCall, TimeLimit, time,
};

/// Results that the kernel replaces before a program sees them: linux/errno.h.
const RESTARTS: std::ops::RangeInclusive<i64> = RESTART_BLOCK..=-512;
/// Below its stack pointer a program may keep something. System V ABI, AMD64 supplement, 3.2.2
const RED_ZONE: u64 = 128;

/// How often a thread goes to sleep when it is stopped, and when it is frozen.
const STOP: u64 = 1;
const FREEZE: u64 = 1;

/// What becomes of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// There was none, or the kernel sees to it.
    Unchanged,
    /// It goes on.
    GoesOn,
    /// It ends with `EINTR`: somebody has stopped the thread before, and nobody can tell what it waits for.
    Ends,
}

impl Stopped {
    /// The call in which it was, and what that would have returned.
    fn interrupted(&self) -> Option<(SystemCall, i64)> {
        if !arch::native(&self.general) {
            return None;
        }
        let (number, arguments) = arch::in_call(&self.general)?;
        Some((SystemCall { number, arguments }, arch::result(&self.general)))
    }

    /// The call that it is about to continue: let go after a stop it had not come to that when it was
    /// stopped again. restart_syscall(2)
    fn about_to_continue(&self, clock: &Clock, before: Option<(&SeenWait, u64)>) -> Option<u64> {
        let (number, arguments) = arch::upcoming(&self.general);
        let next = SystemCall { number, arguments };
        if !arch::native(&self.general) || next.plain() != libc::SYS_restart_syscall {
            return None;
        }
        let mut code = [0; arch::INSTRUCTION.len()];
        let memory = File::open(format!("/proc/{}/mem", self.tid)).ok()?;
        memory.read_exact_at(&mut code, arch::position(&self.general)).ok()?;
        if code != arch::INSTRUCTION {
            return None;
        }
        if let Some(call) = next.continued_by() {
            return Some(call.number);
        }
        // By the kernel's own doing, which leaves there what the call was.
        let (number, _) = arch::in_call(&self.general)?;
        let call = SystemCall { number, arguments };
        let limit = call.continued()?;
        Some(call.bearing(call.deadline(self.tid.as_raw(), limit, clock, before), clock.now()))
    }

    fn set(&mut self, change: impl FnOnce(&mut arch::Registers)) -> Wait {
        change(&mut self.general);
        self.changed = true;
        Wait::GoesOn
    }

    fn is_socket(&self, number: i32) -> bool {
        let target = fs::read_link(format!("/proc/{}/fd/{number}", self.tid));
        target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:["))
    }

    /// Has it wait on here, where it was stopped and goes on in the same moment. The kernel knows for how
    /// long; that is noted where it would otherwise be forgotten of what call.
    pub(super) fn wait_on(&mut self, clock: &Clock, before: Option<&SeenWait>) -> Wait {
        let Some((call, result)) = self.interrupted() else { return Wait::Unchanged };
        let (tid, now) = (self.tid.as_raw(), clock.now());
        let before = before.map(|seen| (seen, STOP));
        if result != RESTART_BLOCK {
            return self.wait_anew(call, result, clock, before);
        }
        let number = match (call.continued_by(), call.continued()) {
            (Some(_), _) => call.number,
            (None, Some(TimeLimit::Nowhere)) => return self.set(|r| arch::again(r, call.number)),
            (None, Some(limit)) => {
                let deadline = call.deadline(tid, limit, clock, before);
                let Some(number) = call.continuing(deadline, now) else { return Wait::Unchanged };
                number
            }
            (None, None) => return Wait::Unchanged,
        };
        self.set(|r| arch::enter(r, number))
    }

    /// Has it wait on wherever it goes on, here or elsewhere, whenever that is: the call begins anew, and
    /// bears for how long. It was frozen in this moment, and `before` was seen just before.
    pub fn wait_elsewhere(&mut self, clock: &Clock, before: Option<&SeenWait>) -> Wait {
        let before = before.map(|seen| (seen, FREEZE + STOP));
        if let Some(number) = self.about_to_continue(clock, before) {
            return self.set(|r| arch::enter_here(r, number));
        }
        let Some((call, result)) = self.interrupted() else { return Wait::Unchanged };
        let (tid, now) = (self.tid.as_raw(), clock.now());
        if result != RESTART_BLOCK {
            return self.wait_anew(call, result, clock, before);
        }
        let call = call.continued_by().unwrap_or(call);
        let number = match call.continued() {
            Some(TimeLimit::Nowhere) => call.number,
            Some(limit) => call.bearing(call.deadline(tid, limit, clock, before), now),
            None => return Wait::Ends,
        };
        self.set(|r| arch::again(r, number))
    }

    /// Returns what ends with `EINTR` after any stop.
    fn wait_anew(
        &mut self,
        call: SystemCall,
        result: i64,
        clock: &Clock,
        before: Option<(&SeenWait, u64)>,
    ) -> Wait {
        let limit = (result == INTERRUPTED).then(|| call.ended(|number| self.is_socket(number)));
        let Some(limit) = limit.flatten() else { return Wait::Unchanged };
        if let TimeLimit::Milliseconds(at) = limit
            && let Some(deadline) = call.deadline(self.tid.as_raw(), limit, clock, before)
        {
            let left = milliseconds(deadline.saturating_sub(clock.now()));
            arch::set_argument(&mut self.general, at, left);
        }
        self.set(|r| arch::again(r, call.number))
    }

    /// Makes it wait for no longer than it should, if it has begun to wait anew after
    /// [`Stopped::wait_elsewhere`]. It may go on, and has its memory.
    fn wait_until(&mut self, clock: &Clock) -> io::Result<Wait> {
        let now = clock.now();
        let Some((call, RESTART_BLOCK)) = self.interrupted() else { return Ok(Wait::Unchanged) };
        let (Some(limit), Some(deadline)) = (call.continued(), call.marked(now)) else {
            return Ok(Wait::Unchanged);
        };
        let left = deadline.saturating_sub(now);
        let mut registers = self.general;
        let memory =
            File::options().read(true).write(true).open(format!("/proc/{}/mem", self.tid))?;
        let place = arch::stack(&self.general).wrapping_sub(RED_ZONE + 16) & !15;

        let mut borrowed = [0; 16];
        match limit {
            TimeLimit::Milliseconds(at) => {
                arch::set_argument(&mut registers, at, milliseconds(left))
            }
            TimeLimit::Time(at, _) => {
                memory.read_exact_at(&mut borrowed, place)?;
                memory.write_all_at(&time(left.max(1)), place)?;
                arch::set_argument(&mut registers, at, place);
            }
            TimeLimit::Nowhere | TimeLimit::Anew => return Ok(Wait::Unchanged),
        }

        arch::enter(&mut registers, call.plain() as u64);
        let result = self.begin(&mut registers);
        if let TimeLimit::Time(..) = limit {
            memory.write_all_at(&borrowed, place)?;
        }

        let result = result?;
        Ok(match call.continuing(Some(deadline), now) {
            Some(number) if result == RESTART_BLOCK => self.set(|r| arch::enter(r, number)),
            _ if RESTARTS.contains(&result) => self.set(|r| arch::set_result(r, result)),
            _ => self.set(|r| arch::returned(r, result)),
        })
    }

    /// Makes it begin a call with these registers, and interrupts that; what it would have returned. The
    /// kernel knows how to continue it then.
    fn begin(&mut self, registers: &mut arch::Registers) -> io::Result<i64> {
        self.changed = true;
        // As in `call`; and no signal is to end it.
        set_signal_mask(self.tid, !(1 << (libc::SIGTRAP - 1)))?;
        set_general(self.tid, registers)?;
        self.reach_boundary()?;
        ptrace::interrupt(self.tid)?;
        self.reach_boundary()?;
        let result = arch::result(&general(self.tid)?);
        // The first interrupt was over when it stopped there.
        ptrace::interrupt(self.tid)?;
        ptrace::cont(self.tid, None)?;
        wait_stop(self.tid, Instant::now() + PATIENCE)?;
        Ok(result)
    }

    /// Up to the beginning of a call, or to its end.
    fn reach_boundary(&mut self) -> io::Result<()> {
        loop {
            ptrace::syscall(self.tid, None)?;
            match waitpid(self.tid, Some(WaitPidFlag::__WALL))? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => return Ok(()),
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                WaitStatus::Stopped(_, Signal::SIGSEGV | Signal::SIGBUS | Signal::SIGILL) => {
                    return Err(io::Error::from_raw_os_error(libc::EFAULT));
                }
                _ => {}
            }
        }
    }
}

/// Lets a thread go that has stopped in this moment; a call in which it waits goes on.
pub(super) fn let_go(tid: Pid, seen: &HashMap<i32, (Clock, Option<SeenWait>)>) -> io::Result<()> {
    if let Some((clock, before)) = seen.get(&tid.as_raw())
        && let (Ok(general), Ok(mask)) = (general(tid), signal_mask(tid))
    {
        // Dropped, it is let go.
        Stopped { tid, general, mask, changed: false }.wait_on(clock, before.as_ref());
        return Ok(());
    }
    Ok(ptrace::detach(tid, None)?)
}

fn milliseconds(nanoseconds: u64) -> u64 {
    nanoseconds.div_ceil(1_000_000).min(i32::MAX as u64)
}

/// Makes a thread that has begun a call anew, after [`Stopped::wait_elsewhere`], wait for no longer than it
/// should. Of another it notices nothing.
///
/// # Errors
/// As [`Stopped::within`].
pub fn wait_no_longer(tid: i32, clock: &Clock, until: Instant) -> io::Result<Wait> {
    let before = SeenWait::of(tid, clock, &mut Processors::default());
    let mut thread = Stopped::standing(tid, until)?;
    let done = thread.wait_until(clock);
    if !matches!(done, Ok(Wait::GoesOn)) {
        thread.wait_on(clock, before.as_ref());
    }
    done
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::sys::process::proc_text;

    const LIMIT: Duration = Duration::from_secs(3);
    /// When they are stopped.
    const AT: Duration = Duration::from_millis(1500);

    /// A call with a limit of three seconds, what it returns when they are over, and whether it may begin
    /// anew.
    const CALLS: &[(&str, &str, bool)] = &[
        ("35, $limit, 0", "0", false),
        ("35, $limit, $rest", "0", false),
        ("230, 1, 0, $limit, 0", "0", false),
        ("7, 0, 0, 3000", "0", false),
        ("271, 0, 0, $limit, 0, 0", "0", false),
        ("202, $word, 128, 7, $limit, 0, 0", "110", false),
        ("232, syscall(291, 0), $events, 1, 3000", "0", false),
        ("281, syscall(291, 0), $events, 1, 3000, 0, 8", "0", false),
        ("128, $set, 0, $limit, 8", "11", true),
    ];

    struct Waiting {
        child: Child,
        began: Instant,
        call: &'static str,
        returns: &'static str,
        anew: bool,
    }

    impl Waiting {
        fn all() -> Vec<Waiting> {
            let all = CALLS.iter().map(|&(call, returns, anew)| {
                // What it waits for is not to end it: SIGUSR1.
                let program = format!(
                    "my ($limit, $rest) = (pack('qq', 3, 0), pack('qq', 9, 9));
                     my ($word, $events, $set) = (pack('Lx4', 7), pack('x64'), pack('Q', 1 << 9));
                     syscall(14, 0, $set, 0, 8);
                     print syscall({call}) < 0 ? $! + 0 : 0;"
                );

                let child = Command::new("perl")
                    .args(["-e", &program])
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                Waiting { child, began: Instant::now(), call, returns, anew }
            });

            let mut all: Vec<Waiting> = all.collect();
            for one in &mut all {
                // The interpreter sleeps in reads while it loads.
                let number = format!("{} ", one.call.split(',').next().unwrap());
                while !proc_text(one.pid(), "syscall").unwrap().starts_with(&number) {
                    one.began = Instant::now();
                    std::thread::yield_now();
                }
            }

            all
        }

        fn pid(&self) -> i32 {
            self.child.id() as i32
        }

        /// Waits for that moment, and for the end; `stopped` is when it was stopped last.
        fn ended(self, stopped: Instant) {
            let Waiting { child, began, call, returns, anew } = self;
            let said = child.wait_with_output().unwrap();
            let (took, since) = (began.elapsed(), stopped.elapsed());
            assert_eq!(String::from_utf8_lossy(&said.stdout), returns, "{call}");
            // It may have begun a little earlier.
            assert!(took + Duration::from_millis(500) > LIMIT, "{call}: {took:?}");
            assert!(anew || since < LIMIT, "{call} has begun anew: {took:?}");
        }
    }

    fn pass(all: &[Waiting]) {
        while all.iter().any(|one| one.began.elapsed() < AT) {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// Ends them on threads of their own: they end at the same time.
    fn end(all: Vec<(Waiting, Instant)>) {
        std::thread::scope(|scope| {
            for (one, stopped) in all {
                scope.spawn(move || one.ended(stopped));
            }
        });
    }

    #[test]
    fn calls_go_on_when_a_thread_was_stopped() {
        let all = Waiting::all();
        pass(&all);
        let stop = |one: Waiting| {
            for _ in 0..3 {
                drop(Stopped::new(one.pid()).unwrap());
            }
            (one, Instant::now())
        };
        end(all.into_iter().map(stop).collect());
    }

    /// The kernel forgets what a thread waits for that has been let go and has not come to its call before it
    /// is carried to another host.
    #[test]
    fn what_has_not_been_continued_yet_begins_anew() {
        let clock = Clock::of(std::process::id() as i32);
        let wanted = |call: SystemCall| {
            let deadline = call.deadline(0, TimeLimit::Milliseconds(2), &clock, None);
            call.bearing(deadline, clock.now())
        };
        let poll = SystemCall { number: libc::SYS_poll as u64, arguments: [0, 0, 3000, 0, 0, 0] };
        let by_us = poll.continuing(Some(clock.now() + 3_000_000_000), clock.now()).unwrap();
        let by_the_kernel = libc::SYS_restart_syscall as u64;
        let mut child =
            Command::new("perl").args(["-e", "syscall(7, 0, 0, 3000)"]).spawn().unwrap();
        let tid = child.id() as i32;

        while !proc_text(tid, "syscall").unwrap().starts_with("7 ") {
            std::thread::yield_now();
        }
        let mut thread = Stopped::standing(tid, Instant::now() + PATIENCE).unwrap();
        let stood = thread.general;
        for (next, before) in [(by_us, u64::MAX), (by_the_kernel, libc::SYS_poll as u64)] {
            thread.general = stood;
            // Back before the instruction, as both leave it.
            arch::enter(&mut thread.general, next);
            thread.general.orig_rax = before;
            assert_eq!(thread.wait_elsewhere(&clock, None), Wait::GoesOn, "{next:#x}");
            let (number, arguments) = arch::upcoming(&thread.general);
            let anew = SystemCall { number, arguments };
            assert_eq!((anew.plain(), anew.marked(0).is_some()), (libc::SYS_poll, true));

            let (bound, now) = (wanted(poll), clock.now());
            let bound = SystemCall { number: bound, ..poll }.marked(now);
            assert!(anew.marked(now) <= bound, "{number:#x}");
            assert_eq!(arch::position(&thread.general), arch::position(&stood) - 2);
        }

        // Elsewhere in its program the same number means nothing.
        thread.general = stood;
        arch::enter_here(&mut thread.general, by_us);
        assert_eq!(thread.wait_elsewhere(&clock, None), Wait::Unchanged);
        (thread.general, thread.changed) = (stood, false);
        drop(thread);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// As if between the two it had been carried to another host; and once more.
    #[test]
    fn calls_go_on_elsewhere_for_what_is_left() {
        let all = Waiting::all();
        pass(&all);
        let stop = |one: Waiting| {
            let clock = Clock::of(one.pid());
            for _ in 0..2 {
                let seen = SeenWait::of(one.pid(), &clock, &mut Processors::default());
                let until = Instant::now() + PATIENCE;
                let mut thread = Stopped::standing(one.pid(), until).unwrap();
                thread.wait_elsewhere(&clock, seen.as_ref());
                drop(thread);
                // It makes its call.
                while proc_text(one.pid(), "syscall").unwrap().starts_with("running") {
                    std::thread::yield_now();
                }
                let until = Instant::now() + PATIENCE;
                wait_no_longer(one.pid(), &clock, until).unwrap();
            }
            (one, Instant::now())
        };
        end(all.into_iter().map(stop).collect());
    }
}
