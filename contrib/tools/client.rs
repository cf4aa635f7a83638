//! ferry-probe: the client that watches a counter-server through a migration.
//!
//! It holds a number of TCP connections and never opens one again. On each it
//! asks by a fixed timetable on CLOCK_MONOTONIC (one question outstanding; a
//! late answer is followed at once by the next question), checks every answer
//! against the formula, and keeps when it came. See [`record`] for what a pause
//! is, [`control`] for how a script marks moments and asks for reports, [`link`]
//! for what is checked.
//!
//! Exit code: 0 if nothing was lost or wrong, 1 otherwise, 2 if it never came to probing.
#[path = "../../bundles/common/mod.rs"]
mod common;
mod control;
mod link;
mod record;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde_json::json;

use control::{Command, Control, say};
use link::{Knowledge, Link};
use record::{Nanos, Report, Track, report};

/// Watch a counter-server over TCP connections that are never opened again.
///
/// Commands on stdin: mark NAME, report [since NAME], verify, stats, quit.
#[derive(Parser)]
struct Options {
    /// The server
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// How many connections to hold
    #[arg(long, default_value_t = 10)]
    connections: u64,
    /// How often to ask on each
    #[arg(long, default_value = "2ms", value_parser = common::units::duration)]
    every: Duration,
    /// How long to go on; without it until SIGINT, SIGTERM, `quit` or the end of stdin
    #[arg(long = "for", value_parser = common::units::duration, value_name = "DURATION")]
    length: Option<Duration>,
    /// Count a connection as lost when an answer is out for so long
    #[arg(long, default_value = "60s", value_parser = common::units::duration)]
    give_up: Duration,
    /// At the end have the server check all its memory
    #[arg(long)]
    verify: bool,
    /// Write the report of the whole time to this file at the end
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const TIMER: u64 = 0;
const SIGNALS: u64 = 1;
const BELL: u64 = 2;
const FIRST_LINK: u64 = 3;

/// How often to look for what has no event: overdue answers.
const LOOK_ROUND: Nanos = 100_000_000;
/// Delays of the probe itself that are worth keeping.
const NOTABLE: Nanos = 200_000;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ferry-probe: {error}");
            ExitCode::from(2)
        }
    }
}

/// Nanoseconds on CLOCK_MONOTONIC.
fn now() -> Nanos {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    nix::time::clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos() as Nanos)
}

fn run(options: &Options) -> io::Result<bool> {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let to = options.to.to_socket_addrs()?.next();
    let to = to.ok_or_else(|| io::Error::other("the server's name has no address"))?;

    let mut probe = Probe::connect(options, to)?;
    let watch =
        |fd: BorrowedFd, token| probe.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token));
    watch(signals.as_fd(), SIGNALS)?;
    watch(probe.timer.as_fd(), TIMER)?;
    watch(probe.control.bell.as_fd(), BELL)?;
    say(&json!({ "ready": true, "connections": options.connections }));
    probe.run()?;

    let end = now();
    if options.verify {
        say(&control::asked(to, common::wire::Op::Verify));
    }
    let all = probe.report("start", probe.start, end);
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&all)? + "\n")?;
    }
    eprintln!("{}", all.summary());
    Ok(all.is_clean())
}

struct Probe<'a> {
    options: &'a Options,
    to: SocketAddr,
    epoll: Epoll,
    timer: TimerFd,
    control: Control,
    links: Vec<Link>,
    /// When which connection is to ask; an entry that is no longer true is skipped.
    timetable: BinaryHeap<Reverse<(Nanos, usize)>>,
    knowledge: Knowledge,
    marks: BTreeMap<String, Nanos>,
    start: Nanos,
    /// The time that the timer is set to.
    alarm: Nanos,
    /// When the probe itself was late, and how much.
    late: Vec<(Nanos, Nanos)>,
}

impl<'a> Probe<'a> {
    /// Opens all connections.
    fn connect(options: &'a Options, to: SocketAddr) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut streams = Vec::new();
        for _ in 0..options.connections {
            streams.push(TcpStream::connect_timeout(&to, Duration::from_secs(10))?);
        }
        let every = (options.every.as_nanos() as Nanos).max(1);
        let start = now();
        let mut links = Vec::new();
        let mut timetable = BinaryHeap::new();
        for (number, stream) in streams.into_iter().enumerate() {
            // Spread over the interval, so that together they look at the server all the time.
            let slot = start + every * number as u64 / options.connections;
            let token = FIRST_LINK + number as u64;
            epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
            links.push(Link::new(stream, number as u64, (start, slot, every))?);
            timetable.push(Reverse((slot, number)));
        }
        Ok(Self {
            options,
            to,
            epoll,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?,
            control: Control::start(now)?,
            links,
            timetable,
            knowledge: Knowledge::default(),
            marks: BTreeMap::new(),
            start,
            alarm: start,
            late: Vec::new(),
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let end = self.options.length.map_or(Nanos::MAX, |d| self.start + d.as_nanos() as Nanos);
        let mut next_look = self.start;
        let mut events = [EpollEvent::empty(); 256];
        while now() < end {
            self.ask_what_is_due();
            if now() >= next_look {
                next_look = now() + LOOK_ROUND;
                let (limit, now) = (self.options.give_up.as_nanos() as Nanos, now());
                self.links.iter_mut().for_each(|link| link.give_up_after(limit, now));
            }
            let next = self.timetable.peek().map_or(Nanos::MAX, |Reverse((at, _))| *at);
            self.set_alarm(next.min(next_look).min(end))?;
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..ready] {
                match event.data() {
                    SIGNALS => return Ok(()),
                    TIMER => self.note_lateness(),
                    BELL if self.obey() => return Ok(()),
                    BELL => {}
                    token => self.hear((token - FIRST_LINK) as usize)?,
                }
            }
        }
        Ok(())
    }

    fn ask_what_is_due(&mut self) {
        while let Some(Reverse((at, number))) = self.timetable.peek().copied() {
            let now = now();
            if at > now {
                return;
            }
            self.timetable.pop();
            if self.links[number].due() == Some(at) {
                self.links[number].ask(now);
            }
        }
    }

    /// Takes in answers of a connection and puts its next question into the timetable.
    fn hear(&mut self, number: usize) -> io::Result<()> {
        let link = &mut self.links[number];
        link.receive(now(), &mut self.knowledge);
        if let Some(at) = link.due() {
            self.timetable.push(Reverse((at, number)));
        } else if !link.is_alive() {
            self.epoll.delete(link.stream())?;
        }
        Ok(())
    }

    fn set_alarm(&mut self, at: Nanos) -> io::Result<()> {
        self.alarm = at;
        let at = TimeSpec::from_duration(Duration::from_nanos(at));
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
        Ok(self.timer.set(Expiration::OneShot(at), flags)?)
    }

    /// Called when the alarm rang: the time since then is the probe's own delay.
    fn note_lateness(&mut self) {
        let now = now();
        let late = now.saturating_sub(self.alarm);
        if late > NOTABLE {
            self.late.push((now, late));
        }
    }

    /// Carries out the next thing that was said on stdin; true if that was to end.
    fn obey(&mut self) -> bool {
        let _ = self.control.bell.read();
        let Ok((at, command)) = self.control.commands.try_recv() else { return false };
        // One at a time: whoever says the next at once must not keep us from the connections.
        let _ = self.control.bell.write(1);
        match command {
            Command::Mark(name) => {
                say(&json!({ "mark": name, "at_ms": (at - self.start) as f64 / 1e6 }));
                self.marks.insert(name, at);
            }
            Command::Report(name) => {
                let name = name.as_deref().unwrap_or("start");
                match self.marks.get(name).or((name == "start").then_some(&self.start)) {
                    Some(since) => say(&json!(self.report(name, *since, at))),
                    None => say(&json!({ "error": format!("no mark {name:?}") })),
                }
            }
            Command::Ask(op) => control::ask(self.to, op),
            Command::Quit => return true,
            // A script in the background has no stdin: with --for it need not have one.
            Command::End if self.options.length.is_some() => {}
            Command::End => return true,
            Command::Unknown(line) => {
                let hint = "mark NAME, report [since NAME], verify, stats, quit";
                say(&json!({ "error": format!("unknown command {line:?}"), "hint": hint }));
            }
        }
        false
    }

    fn report(&self, name: &str, since: Nanos, until: Nanos) -> Report {
        let tracks: Vec<&Track> = self.links.iter().map(|link| &link.track).collect();
        report(name, (since, until), &tracks, &self.late)
    }
}
