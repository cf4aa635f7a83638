//! Calls in which a thread waits, and what becomes of them when it is stopped from outside.
//!
//! The kernel begins most calls anew by itself. Two kinds it does not, for whoever is frozen here and goes
//! on elsewhere:
//!
//! - those with a time limit that it keeps in mind and continues by restart_syscall(2): nanosleep(2),
//!   clock_nanosleep(2), poll(2), futex(2). What it keeps in mind does not go along, and CRIU lets such a
//!   call end with `EINTR`;
//! - those that end with `EINTR` after any stop: epoll_wait(2), sigtimedwait(2), semop(2), io_getevents(2),
//!   and what waits at a socket with a time limit of its own. signal(7)
//!
//! Programs that no signal has ever come to need not expect `EINTR`. So such a call is made to begin anew
//! (`ERESTARTNOHAND`: the kernel still ends it if a handler runs), for the time that is left.
//!
//! **When that is over** goes along with the thread: in the upper half of the register that holds the number
//! of the call, where the kernel does not look (Linux 5.14) and that no program sees again. The clock is the
//! container's own (`CLOCK_MONOTONIC` in its time namespace), which stands still while nobody runs.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use super::process::proc_text;
use super::sched;

/// The kernel's own results, which no program gets to see: linux/errno.h.
pub(super) const RESTART_BLOCK: i64 = -516;
pub(super) const INTERRUPTED: i64 = -(libc::EINTR as i64);

/// A deadline is told in units of 2^24 ns, 17 ms, and has 29 bits: it is known within 52 days.
const UNIT: u32 = 24;
const BITS: u32 = 29;
const WINDOW: u64 = 1 << BITS;
const SECOND: u64 = 1_000_000_000;

/// Calls that restart_syscall(2) continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitKind {
    Nanosleep,
    ClockNanosleep,
    Poll,
    Futex,
}

const KINDS: [WaitKind; 4] =
    [WaitKind::Nanosleep, WaitKind::ClockNanosleep, WaitKind::Poll, WaitKind::Futex];

impl WaitKind {
    fn number(self) -> i64 {
        match self {
            WaitKind::Nanosleep => libc::SYS_nanosleep,
            WaitKind::ClockNanosleep => libc::SYS_clock_nanosleep,
            #[cfg(target_arch = "x86_64")]
            WaitKind::Poll => libc::SYS_poll,
            // There is ppoll(2) only, which the kernel begins anew.
            #[cfg(not(target_arch = "x86_64"))]
            WaitKind::Poll => -1,
            WaitKind::Futex => libc::SYS_futex,
        }
    }
}

/// Where a call has its time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimeLimit {
    /// It has none, or one that names a moment.
    Nowhere,
    /// In this argument, in milliseconds.
    Milliseconds(usize),
    /// Where this argument points to; what is left goes to where the other one points to.
    Time(usize, Option<usize>),
    /// With its socket, or where this argument points to; it begins anew.
    Anew,
}

/// A call in which a thread is, or was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SystemCall {
    /// The number, with what is in the upper half of it.
    pub(super) number: u64,
    pub(super) arguments: [u64; 6],
}

impl SystemCall {
    /// Of `/proc/TID/syscall`: number, arguments, stack, position. None where the thread runs, or waits for
    /// something else than a call. proc_pid_syscall(5)
    fn parse(text: &str) -> Option<SystemCall> {
        let mut words = text.split_ascii_whitespace();
        let number: i64 = words.next()?.parse().ok()?;
        let mut arguments = [0; 6];
        for argument in &mut arguments {
            *argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
        Some(SystemCall { number: u64::try_from(number).ok()?, arguments })
    }

    /// Its number alone.
    pub(super) fn plain(self) -> i64 {
        (self.number as u32).into()
    }

    fn kind(self) -> Option<WaitKind> {
        KINDS.into_iter().find(|kind| kind.number() == self.plain())
    }

    /// Returns where it has its time limit, if it is one that restart_syscall(2) continues.
    pub(super) fn continued(self) -> Option<TimeLimit> {
        const WAIT: u64 = 0;
        let [first, second, third, ..] = self.arguments;
        let limit = match self.kind()? {
            WaitKind::Nanosleep => TimeLimit::Time(0, Some(1)),
            // A moment is no matter of ours; nor is the time that a processor has worked.
            WaitKind::ClockNanosleep => {
                let own = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME];
                let own = own.contains(&(first as i32)) || first as i32 == libc::CLOCK_TAI;
                (own && second as i32 & libc::TIMER_ABSTIME == 0)
                    .then_some(TimeLimit::Time(2, Some(3)))?
            }
            WaitKind::Poll if third as i32 > 0 => TimeLimit::Milliseconds(2),
            WaitKind::Poll => TimeLimit::Nowhere,
            // All but this one name a moment.
            WaitKind::Futex if second & 0x7f == WAIT && self.arguments[3] != 0 => {
                TimeLimit::Time(3, None)
            }
            WaitKind::Futex => TimeLimit::Nowhere,
        };
        Some(limit)
    }

    /// Returns where it has its time limit, if it is one that ends with `EINTR` after any stop. `is_socket`
    /// tells of a descriptor.
    pub(super) fn ended(self, is_socket: impl FnOnce(i32) -> bool) -> Option<TimeLimit> {
        let limit = |argument: usize, has: TimeLimit| match self.arguments[argument] {
            0 => TimeLimit::Nowhere,
            _ => has,
        };

        match self.plain() {
            #[cfg(target_arch = "x86_64")]
            libc::SYS_epoll_wait => Some(self.epoll()),
            libc::SYS_epoll_pwait => Some(self.epoll()),
            libc::SYS_epoll_pwait2 => Some(limit(3, TimeLimit::Anew)),
            libc::SYS_rt_sigtimedwait => Some(limit(2, TimeLimit::Anew)),
            libc::SYS_semtimedop => Some(limit(3, TimeLimit::Anew)),
            libc::SYS_semop => Some(TimeLimit::Nowhere),
            libc::SYS_io_getevents => Some(limit(4, TimeLimit::Anew)),
            libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_sendto
            | libc::SYS_sendmsg => is_socket(self.arguments[0] as i32).then_some(TimeLimit::Anew),
            _ => None,
        }
    }

    fn epoll(self) -> TimeLimit {
        if self.arguments[3] as i32 > 0 { TimeLimit::Milliseconds(3) } else { TimeLimit::Nowhere }
    }

    /// Returns how long it was to wait, in nanoseconds.
    fn whole(self, tid: i32, limit: TimeLimit) -> Option<u64> {
        match limit {
            TimeLimit::Milliseconds(at) => Some(u64::from(self.arguments[at] as u32) * 1_000_000),
            TimeLimit::Time(at, _) => time_at(tid, self.arguments[at]).ok()?,
            TimeLimit::Nowhere | TimeLimit::Anew => None,
        }
    }

    /// Returns what the kernel has written down as left, as it does when such a call is interrupted.
    fn rest(self, tid: i32, limit: TimeLimit) -> Option<u64> {
        let TimeLimit::Time(_, Some(at)) = limit else { return None };
        (self.arguments[at] != 0).then(|| time_at(tid, self.arguments[at]).ok()?)?
    }

    /// When it is over, at the latest, if it was interrupted just now: `before` was seen before that, and the
    /// thread has been stopped as often since, by us.
    pub(super) fn deadline(
        self,
        tid: i32,
        limit: TimeLimit,
        clock: &Clock,
        before: Option<(&SeenWait, u64)>,
    ) -> Option<u64> {
        let now = clock.now();
        // Else it has waited for something else meanwhile, or for the same once more.
        let same = |(seen, stops): &(&SeenWait, u64)| {
            (seen.call.plain(), seen.call.arguments) == (self.plain(), self.arguments)
                && Slept::of(tid).is_some_and(|slept| slept.often <= seen.often + stops)
        };
        let rest = || self.rest(tid, limit).map(|left| now.saturating_add(left));
        self.marked(now)
            .or_else(rest)
            .or_else(|| before.filter(same)?.0.deadline)
            .or_else(|| Some(now.saturating_add(self.whole(tid, limit)?)))
    }

    /// The moment that its number bears.
    pub(super) fn marked(self, now: u64) -> Option<u64> {
        let mark = self.number >> 32;
        // Zero stands for none, as it does in every call that a program makes.
        let low = mark & (WINDOW - 1);
        if low == 0 {
            return None;
        }
        let unit = now >> UNIT;
        let ahead = low.wrapping_sub(unit) & (WINDOW - 1);
        let at =
            if ahead < WINDOW / 2 { unit + ahead } else { (unit + ahead).saturating_sub(WINDOW) };
        Some(at << UNIT)
    }

    /// The number that it begins anew by, and that bears the moment at which it is over.
    pub(super) fn bearing(self, deadline: Option<u64>, now: u64) -> u64 {
        self.plain() as u64 | mark(deadline, now) << 32
    }

    /// The number of restart_syscall(2), which bears that moment and what it continues.
    pub(super) fn continuing(self, deadline: Option<u64>, now: u64) -> Option<u64> {
        let kind = KINDS.iter().position(|kind| Some(*kind) == self.kind())? as u64;
        let mark = mark(deadline, now);
        (mark != 0).then_some(libc::SYS_restart_syscall as u64 | (mark | kind << BITS) << 32)
    }

    /// The call that restart_syscall(2) continues, if its number bears that.
    pub(super) fn continued_by(self) -> Option<SystemCall> {
        if self.plain() != libc::SYS_restart_syscall || (self.number >> 32) & (WINDOW - 1) == 0 {
            return None;
        }
        let kind = KINDS[(self.number >> (32 + BITS)) as usize & 3];
        let mark = (self.number >> 32) & (WINDOW - 1);
        Some(SystemCall { number: kind.number() as u64 | mark << 32, ..self })
    }
}

/// Rounded up: nobody wakes too early.
fn mark(deadline: Option<u64>, now: u64) -> u64 {
    let Some(deadline) = deadline.filter(|_| *MARKS) else { return 0 };
    let unit = deadline.div_ceil(1 << UNIT);
    // What lies too far ahead would be taken for something else.
    if unit.saturating_sub(now >> UNIT) >= WINDOW / 2 {
        return 0;
    }
    match unit & (WINDOW - 1) {
        0 => 1,
        mark => mark,
    }
}

/// Whether the kernel leaves the upper half of a call's number alone, and gives a container a clock of its
/// own.
static MARKS: LazyLock<bool> = LazyLock::new(|| {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    cfg!(target_arch = "x86_64")
        && version >= (5, 14)
        && fs::exists("/proc/self/ns/time").unwrap_or(false)
});

/// `struct timespec` in a task's memory, in nanoseconds; nothing if it is none.
fn time_at(tid: i32, at: u64) -> io::Result<Option<u64>> {
    let mut bytes = [0; 16];
    File::open(format!("/proc/{tid}/mem"))?.read_exact_at(&mut bytes, at)?;
    let number = |from| u64::from_ne_bytes(std::array::from_fn(|i| bytes[from + i]));
    let (seconds, rest) = (number(0), number(8));
    Ok((rest < SECOND && seconds <= i64::MAX as u64)
        .then(|| seconds.saturating_mul(SECOND).saturating_add(rest)))
}

/// `struct timespec`.
pub(super) fn time(nanoseconds: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(nanoseconds / SECOND).to_ne_bytes());
    bytes[8..].copy_from_slice(&(nanoseconds % SECOND).to_ne_bytes());
    bytes
}

/// The clock of a container. time_namespaces(7)
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    offset: i64,
}

impl Clock {
    /// Of the container that a process is in.
    pub fn of(pid: i32) -> Clock {
        let text = proc_text(pid, "timens_offsets").unwrap_or_default();
        let offset = text.lines().find_map(|line| {
            let mut words = line.split_ascii_whitespace();
            words.next().filter(|clock| *clock == "monotonic")?;
            let (seconds, rest): (i64, i64) =
                (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            seconds.checked_mul(SECOND as i64)?.checked_add(rest)
        });
        Clock { offset: offset.unwrap_or(0) }
    }

    /// Returns what it shows, in nanoseconds.
    pub(super) fn now(&self) -> u64 {
        now().saturating_add_signed(self.offset)
    }
}

/// This host's.
fn now() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one live structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * SECOND + now.tv_nsec as u64
}

/// What was seen of a thread that waits, while it did.
#[derive(Clone, Copy, Debug)]
pub struct SeenWait {
    call: SystemCall,
    /// When it is over at the latest: where the kernel tells since when it waits.
    deadline: Option<u64>,
    /// How often the thread had gone to sleep.
    often: u64,
}

impl SeenWait {
    /// Looks at a thread, which notices nothing. Nothing if it is in no such call, or in one that may take
    /// as long as it likes.
    pub fn of(tid: i32, clock: &Clock, processors: &mut Processors) -> Option<SeenWait> {
        let call = SystemCall::parse(&proc_text(tid, "syscall").ok()?)?;
        let limit = call.continued().or_else(|| call.ended(|_| false))?;
        let whole = call.whole(tid, limit)?;
        let slept = Slept::of(tid)?;
        let since = processors.since(tid, &slept);
        let since = since.map(|since| since.saturating_add_signed(clock.offset));
        let deadline = since.map(|since| since.saturating_add(whole));
        Some(SeenWait { call, deadline, often: slept.often })
    }
}

/// Tells whether a thread is in a call that restart_syscall(2) would continue.
pub fn is_continued(tid: i32) -> bool {
    let call = proc_text(tid, "syscall").ok().and_then(|text| SystemCall::parse(&text));
    call.is_some_and(|call| call.continued().is_some())
}

/// The clocks of this host's processors: each has one of its own for its scheduler.
#[derive(Debug, Default)]
pub struct Processors {
    /// How far each is behind this host's clock, in nanoseconds; none where that cannot be told.
    behind: HashMap<usize, Option<u64>>,
}

impl Processors {
    /// Since when a thread has not run, by this host's clock, or later: the scheduler's own clock stands still
    /// where a hypervisor takes the processor away. proc_pid_sched(5)
    fn since(&mut self, tid: i32, slept: &Slept) -> Option<u64> {
        let stat = proc_text(tid, "stat").ok()?;
        let processor: usize =
            stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(36)?.parse().ok()?;
        // A thread for each look at one would take longer than all the rest.
        let behind = *self.behind.entry(processor).or_insert_with(|| behind(processor));
        slept.ran.checked_add(behind?).map(|since| since.min(now()))
    }
}

/// Compares a processor's clock with this host's, there.
fn behind(processor: usize) -> Option<u64> {
    let compare = move || {
        let mut one = vec![0; processor / 8 + 1];
        one[processor / 8] = 1 << (processor % 8);
        let own = nix::unistd::gettid().as_raw();
        sched::set_cpus(own, &one).ok()?;
        std::thread::yield_now();
        let now = now();
        now.checked_sub(Slept::of(own)?.ran)
    };
    std::thread::spawn(compare).join().ok()?
}

/// What the scheduler tells of a thread. proc_pid_sched(5)
struct Slept {
    /// When it has run last, by the clock of its processor, in nanoseconds.
    ran: u64,
    /// How often it has gone to sleep.
    often: u64,
}

impl Slept {
    fn of(tid: i32) -> Option<Slept> {
        Slept::parse(&proc_text(tid, "sched").ok()?)
    }

    /// Lines such as `se.exec_start    :    1510926.021982`.
    fn parse(text: &str) -> Option<Slept> {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.rsplit_once(' ')?.1)
        };
        let (milliseconds, rest) = value("se.exec_start")?.split_once('.')?;
        let (milliseconds, rest): (u64, u64) = (milliseconds.parse().ok()?, rest.parse().ok()?);
        let ran = milliseconds.checked_mul(1_000_000)?.checked_add(rest)?;
        Some(Slept { ran, often: value("nr_voluntary_switches")?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    fn call(number: i64, arguments: [u64; 6]) -> SystemCall {
        SystemCall { number: number as u64, arguments }
    }

    #[test]
    fn calls_are_read() {
        let text =
            "230 0x0 0x0 0x7ffe5313e400 0x7ffe5313e440 0x0 0x0 0x7ffe5313e3e8 0x7f3590e33503\n";
        let wanted = [0, 0, 0x7ffe_5313_e400, 0x7ffe_5313_e440, 0, 0];
        assert_eq!(SystemCall::parse(text), Some(call(230, wanted)));
        for none in ["running\n", "-1 0x7ffe5313e3e8 0x7f3590e33503\n", "230 0x0\n", ""] {
            assert_eq!(SystemCall::parse(none), None);
        }
    }

    #[test]
    fn limits_are_found() {
        let of = |number, arguments| call(number, arguments).continued();
        assert_eq!(of(libc::SYS_nanosleep, [8, 0, 0, 0, 0, 0]), Some(TimeLimit::Time(0, Some(1))));
        let relative = [libc::CLOCK_REALTIME as u64, 0, 8, 9, 0, 0];
        assert_eq!(of(libc::SYS_clock_nanosleep, relative), Some(TimeLimit::Time(2, Some(3))));
        let moment = [1, libc::TIMER_ABSTIME as u64, 8, 0, 0, 0];
        let own_time = [libc::CLOCK_PROCESS_CPUTIME_ID as u64, 0, 8, 0, 0, 0];
        assert_eq!(of(libc::SYS_clock_nanosleep, moment), None);
        assert_eq!(of(libc::SYS_clock_nanosleep, own_time), None);
        assert_eq!(of(libc::SYS_futex, [8, 128, 7, 9, 0, 0]), Some(TimeLimit::Time(3, None)));

        assert_eq!(of(libc::SYS_futex, [8, 128, 7, 0, 0, 0]), Some(TimeLimit::Nowhere));
        assert_eq!(of(libc::SYS_futex, [8, 0x189, 7, 9, 0, 0]), Some(TimeLimit::Nowhere));
        assert_eq!(of(libc::SYS_read, [8, 0, 7, 9, 0, 0]), None);
        let ended = |number, arguments| call(number, arguments).ended(|number| number == 3);
        assert_eq!(
            ended(libc::SYS_epoll_pwait, [3, 8, 1, 7, 0, 8]),
            Some(TimeLimit::Milliseconds(3))
        );

        let forever = [3, 8, 1, u64::from(u32::MAX), 0, 8];
        assert_eq!(ended(libc::SYS_epoll_pwait, forever), Some(TimeLimit::Nowhere));
        assert_eq!(ended(libc::SYS_rt_sigtimedwait, [8, 0, 0, 8, 0, 0]), Some(TimeLimit::Nowhere));
        assert_eq!(ended(libc::SYS_recvfrom, [3, 0, 0, 8, 0, 0]), Some(TimeLimit::Anew));
        assert_eq!(ended(libc::SYS_recvfrom, [4, 0, 0, 8, 0, 0]), None);
        assert_eq!(ended(libc::SYS_nanosleep, [8, 0, 0, 0, 0, 0]), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_moment_goes_along_with_the_number() {
        const DAY: u64 = 86_400 * SECOND;
        let poll = call(libc::SYS_poll, [8, 1, 500, 0, 0, 0]);
        assert_eq!(poll.marked(7), None);
        for now in [0, 1, DAY, 400 * DAY + 7, 1000 * DAY] {
            for left in [0, 1, SECOND / 1000, SECOND, 30 * DAY] {
                let deadline = now + left;
                let number = poll.bearing(Some(deadline), now);
                let borne = SystemCall { number, ..poll };
                assert_eq!(borne.plain(), libc::SYS_poll);
                assert!(number as i64 > 0);

                // Asked a little earlier or later, also by a clock that has stood still meanwhile.
                for asked in [now, now + DAY, now.saturating_sub(DAY)] {
                    let at = borne.marked(asked).unwrap();
                    assert!(
                        (deadline..=deadline + (2 << UNIT)).contains(&at),
                        "{now} {left}: {at}"
                    );
                }

                let at = borne.marked(now).unwrap();
                assert_eq!(
                    SystemCall { number: borne.bearing(Some(at), now), ..poll }.marked(now),
                    Some(at)
                );

                let number = borne.continuing(Some(deadline), now).unwrap();
                let continued = SystemCall { number, ..poll }.continued_by().unwrap();
                assert_eq!((continued.plain(), continued.marked(now)), (libc::SYS_poll, Some(at)));
            }

            assert_eq!(poll.bearing(Some(now + 90 * DAY), now), libc::SYS_poll as u64);
            assert_eq!(poll.bearing(None, now), libc::SYS_poll as u64);
        }

        assert_eq!(call(libc::SYS_restart_syscall, [0; 6]).continued_by(), None);
        assert_eq!(poll.continuing(None, 7), None);
    }

    /// What the kernel tells of a thread is for a good part what the thread has chosen.
    #[test]
    fn fuzz_waits() {
        let sample =
            "230 0x0 0x0 0x7ffe5313e400 0x7ffe5313e440 0x0 0x0 0x7ffe5313e3e8 0x7f3590e33503\n";
        let sched = "se.exec_start  :   1510926.021982\nnr_voluntary_switches  :  1\n";
        Target::new("waits").sample(sample).sample(sched).words(&[b"0x", b"202", b"-1"]).run(
            |bytes| {
                let text = String::from_utf8_lossy(bytes);
                let slept = Slept::parse(&text).map(|slept| slept.ran ^ slept.often);
                let Some(call) = SystemCall::parse(&text) else {
                    return found(&[0, usize::from(slept.is_some())]);
                };
                let moment = call.marked(call.arguments[5]);
                let borne = SystemCall { number: call.bearing(moment, call.arguments[5]), ..call };
                let _ = (borne.continuing(moment, 7), borne.continued_by(), borne.continued());
                found(&[1, usize::from(moment.is_some()), usize::from(call.continued().is_some())])
            },
        );
    }
}
