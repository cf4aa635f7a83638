//! sleepers: threads that wait, each in another system call, and say what it has returned.
//!
//! Not by the C library, which calls again after `EINTR`. Each call has the same time limit. A line of the
//! file `/said` for each: its name, what it has returned (0, or the error's number), how long it has taken by
//! the clock of the host and by the container's own, in milliseconds, and how often it has been called. The
//! file `/ready` is there when all of them wait.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;

#[path = "../common/units.rs"]
#[allow(dead_code)]
mod units;

/// Wait in every way that there is.
#[derive(Parser)]
struct Options {
    /// The time limit of each call
    #[arg(long, default_value = "20s", value_parser = units::duration)]
    limit: Duration,
    /// Sleep, as busybox does, once, and end: with 1 if that was interrupted
    #[arg(long)]
    once: bool,
}

/// A call with a time limit; what it has returned.
type Call = fn(&libc::timespec) -> i64;

const CALLS: &[(&str, Call)] = &[
    ("nanosleep", nanosleep),
    ("nanosleep-rest", nanosleep_rest),
    ("nanosleep-same", nanosleep_same),
    ("clock_nanosleep", clock_nanosleep),
    ("poll", poll),
    ("poll-event", poll_event),
    ("ppoll", ppoll),
    ("select", select),
    ("futex", futex),
    ("futex-until", futex_until),
    ("epoll_wait", epoll_wait),
    ("epoll_pwait", epoll_pwait),
    ("epoll-event", epoll_event),
    ("sigtimedwait", sigtimedwait),
    ("semtimedop", semtimedop),
    ("recv", recv),
];

fn main() -> ExitCode {
    let options = Options::parse();
    let limit = libc::timespec {
        tv_sec: options.limit.as_secs() as libc::time_t,
        tv_nsec: options.limit.subsec_nanos().into(),
    };
    if options.once {
        return if nanosleep_same(&limit) == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match run(limit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = fs::write("/said", format!("failed: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

fn run(limit: libc::timespec) -> io::Result<()> {
    // What is waited for is for nobody else: every thread inherits that.
    // SAFETY: the set is a live variable that is filled before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGUSR1);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }

    let said = Mutex::new(File::create("/said")?);
    std::thread::scope(|scope| {
        for &(name, call) in CALLS {
            let said = &said;
            scope.spawn(move || {
                let (began, by_host) = (Instant::now(), SystemTime::now());
                let result = call(&limit);
                let took = by_host.elapsed().unwrap_or_default().as_millis();
                let own = began.elapsed().as_millis();
                let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = writeln!(said, "{name} {result} {took} {own}");
            });
        }

        await_all_asleep();
        let _ = fs::write("/ready", "");
    });

    // Until somebody ends us: there is something to look at.
    loop {
        std::thread::park();
    }
}

/// Nobody tells when a thread has gone to sleep.
fn await_all_asleep() {
    let own = std::process::id().to_string();
    let asleep = |thread: fs::DirEntry| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        thread.file_name() == own.as_str() || stat.contains(") S ")
    };
    while !fs::read_dir("/proc/self/task").is_ok_and(|list| list.flatten().all(asleep)) {
        std::thread::yield_now();
    }
}

/// 0, or the error.
fn outcome(result: libc::c_long) -> i64 {
    if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or(-1).into() } else { result }
}

fn milliseconds(limit: &libc::timespec) -> libc::c_long {
    limit.tv_sec * 1000 + limit.tv_nsec / 1_000_000
}

fn nanosleep(limit: &libc::timespec) -> i64 {
    // SAFETY: the kernel reads a live structure.
    outcome(unsafe { libc::syscall(libc::SYS_nanosleep, limit, 0usize) })
}

fn nanosleep_rest(limit: &libc::timespec) -> i64 {
    let mut rest = *limit;
    // SAFETY: the kernel reads the one, and writes the other; both live.
    outcome(unsafe { libc::syscall(libc::SYS_nanosleep, limit, &raw mut rest) })
}

/// As musl's and busybox' sleep(3) does it.
fn nanosleep_same(limit: &libc::timespec) -> i64 {
    let mut both = *limit;
    let both = &raw mut both;
    // SAFETY: the kernel reads and writes a live structure.
    outcome(unsafe { libc::syscall(libc::SYS_nanosleep, both, both) })
}

fn clock_nanosleep(limit: &libc::timespec) -> i64 {
    // SAFETY: the kernel reads a live structure.
    outcome(unsafe {
        libc::syscall(libc::SYS_clock_nanosleep, libc::CLOCK_MONOTONIC, 0, limit, 0usize)
    })
}

#[cfg(target_arch = "x86_64")]
fn poll_one(fd: i32, limit: &libc::timespec) -> i64 {
    let mut one = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: the kernel reads and writes one live structure.
    outcome(unsafe { libc::syscall(libc::SYS_poll, &raw mut one, 1, milliseconds(limit)) })
}

#[cfg(not(target_arch = "x86_64"))]
fn poll_one(fd: i32, limit: &libc::timespec) -> i64 {
    let mut one = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: the kernel reads and writes live structures.
    outcome(unsafe { libc::syscall(libc::SYS_ppoll, &raw mut one, 1, limit, 0usize, 0usize) })
}

/// A pair of sockets, one of which has something to read when the time is over.
fn later(limit: &libc::timespec) -> UnixStream {
    let (one, mut other) = UnixStream::pair().expect("a pair of sockets");
    let limit = *limit;
    std::thread::spawn(move || {
        let until = Instant::now() + Duration::new(limit.tv_sec as u64, limit.tv_nsec as u32);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        let _ = other.write_all(b"x");
        // It is not to be at its end.
        std::mem::forget(other);
    });
    one
}

fn poll(limit: &libc::timespec) -> i64 {
    let (one, _other) = UnixStream::pair().expect("a pair of sockets");
    poll_one(one.as_raw_fd(), limit)
}

/// Without a limit, and something happens.
fn poll_event(limit: &libc::timespec) -> i64 {
    let one = later(limit);
    let forever = libc::timespec { tv_sec: -1, tv_nsec: 0 };
    poll_one(one.as_raw_fd(), if cfg!(target_arch = "x86_64") { &forever } else { limit })
}

fn ppoll(limit: &libc::timespec) -> i64 {
    // SAFETY: the kernel reads a live structure; there are no descriptors.
    outcome(unsafe { libc::syscall(libc::SYS_ppoll, 0usize, 0, limit, 0usize, 0usize) })
}

fn select(limit: &libc::timespec) -> i64 {
    // SAFETY: the kernel reads a live structure; there are no descriptors.
    outcome(unsafe { libc::syscall(libc::SYS_pselect6, 0, 0usize, 0usize, 0usize, limit, 0usize) })
}

static WORD: AtomicU32 = AtomicU32::new(7);

fn futex(limit: &libc::timespec) -> i64 {
    let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel reads two live variables.
    outcome(unsafe {
        libc::syscall(libc::SYS_futex, WORD.as_ptr(), wait, 7, limit, 0usize, 0usize)
    })
}

/// With a moment for its limit.
fn futex_until(limit: &libc::timespec) -> i64 {
    let wait = libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG;
    WORD.load(Ordering::Relaxed);
    // SAFETY: the kernel writes one live variable, and reads that and another.
    outcome(unsafe {
        let mut until = std::mem::zeroed::<libc::timespec>();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut until);
        until.tv_sec += limit.tv_sec;
        libc::syscall(
            libc::SYS_futex,
            WORD.as_ptr(),
            wait,
            7,
            &raw const until,
            0usize,
            u32::MAX as usize,
        )
    })
}

#[cfg(target_arch = "x86_64")]
fn epoll_wait(limit: &libc::timespec) -> i64 {
    epoll(-1, libc::SYS_epoll_wait, milliseconds(limit))
}

#[cfg(not(target_arch = "x86_64"))]
fn epoll_wait(limit: &libc::timespec) -> i64 {
    epoll_pwait(limit)
}

fn epoll_pwait(limit: &libc::timespec) -> i64 {
    epoll(-1, libc::SYS_epoll_pwait, milliseconds(limit))
}

fn epoll_event(limit: &libc::timespec) -> i64 {
    let one = later(limit);
    epoll(one.as_raw_fd(), libc::SYS_epoll_pwait, -1)
}

fn epoll(watched: i32, number: libc::c_long, limit: libc::c_long) -> i64 {
    let mut events = [libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 }];
    // SAFETY: the kernel reads and writes live structures, not more of them than there are.
    outcome(unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        if watched >= 0
            && libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, watched, events.as_mut_ptr()) != 0
        {
            return -1;
        }
        libc::syscall(number, epoll, events.as_mut_ptr(), 1, limit, 0usize, 8usize)
    })
}

fn sigtimedwait(limit: &libc::timespec) -> i64 {
    let set = 1u64 << (libc::SIGUSR1 - 1);
    // SAFETY: the kernel reads live structures of the size that is passed.
    outcome(unsafe {
        libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, 0usize, limit, 8usize)
    })
}

fn semtimedop(limit: &libc::timespec) -> i64 {
    // Waits for somebody to add to it.
    let mut less = libc::sembuf { sem_num: 0, sem_op: -1, sem_flg: 0 };
    // SAFETY: the kernel reads live structures.
    outcome(unsafe {
        let set = libc::semget(libc::IPC_PRIVATE, 1, 0o600);
        libc::syscall(libc::SYS_semtimedop, set, &raw mut less, 1, limit)
    })
}

fn recv(limit: &libc::timespec) -> i64 {
    let (one, _other) = UnixStream::pair().expect("a pair of sockets");
    let limit = Duration::new(limit.tv_sec as u64, limit.tv_nsec as u32);
    one.set_read_timeout(Some(limit)).expect("a time limit");
    let mut byte = [0u8];
    // SAFETY: the kernel writes one live byte at most.
    outcome(unsafe {
        libc::syscall(
            libc::SYS_recvfrom,
            one.as_raw_fd(),
            byte.as_mut_ptr(),
            1usize,
            0,
            0usize,
            0usize,
        )
    })
}
