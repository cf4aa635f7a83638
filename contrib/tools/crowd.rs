//! ferry-crowd: the client of crowd-server. It brings connections of all kinds into the state that
//! they are to be in, says `ready`, keeps some busy and comes and goes with others, and when it is
//! told to `finish` sees whether any was lost and whether every byte has arrived, at both ends.
//!
//! Exit code: 0 if nothing was lost or wrong, 1 otherwise, 2 if it never came to `ready`.
#[path = "../../bundles/common/mod.rs"]
mod common;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage};
use nix::sys::socket::{connect, setsockopt, socket, sockopt};
use serde_json::{Value, json};

use common::crowd::{CONTROL, DOOR, FILL, PORT, Part, Plan, REST, Stream, VISIT};

/// Hold connections of all kinds to a crowd-server. Commands on stdin: visits, finish.
#[derive(Parser)]
struct Options {
    /// The server's address
    #[arg(long)]
    to: IpAddr,
    /// How many connections of each kind
    #[arg(long, default_value_t = 10)]
    each: u64,
    /// How many threads come and go
    #[arg(long, default_value_t = 4)]
    visitors: u64,
    /// A connection that is silent for so long is lost
    #[arg(long, default_value = "20s", value_parser = common::units::duration)]
    give_up: Duration,
}

/// Small buffers fill up soon.
const BUFFER: usize = 32 << 10;
const PIECE: usize = 4096;

/// A kind of connection: its name, and what server and client do before the release.
struct Kind(&'static str, Part, Part);

const IDLE: Part = Part { send: 0, shut: false, read: true, echo: false };
const DEAF: Part = Part { read: false, ..IDLE };
const FILL_AND_SHUT: Part = Part { send: FILL, shut: true, ..IDLE };
const KINDS: [Kind; 11] = [
    Kind("idle", IDLE, IDLE),
    Kind("client has shut", IDLE, Part { send: 1000, shut: true, ..IDLE }),
    Kind("server has shut", Part { send: 1000, shut: true, ..IDLE }, IDLE),
    Kind("unread at the server", DEAF, Part { send: 20_000, ..IDLE }),
    Kind("unread at the client", Part { send: 20_000, ..IDLE }, DEAF),
    Kind("unsent at the server", Part { send: FILL, ..IDLE }, DEAF),
    Kind("unsent at the client", DEAF, Part { send: FILL, ..IDLE }),
    Kind("unsent at both", Part { send: FILL, ..DEAF }, Part { send: FILL, ..DEAF }),
    // FIN-WAIT-1 at the server: its FIN stands behind what is not sent.
    Kind("server has shut, unsent", FILL_AND_SHUT, DEAF),
    // LAST-ACK and CLOSING: the same after the client's FIN, and before it.
    Kind("both have shut, client first", FILL_AND_SHUT, Part { send: 1000, shut: true, ..DEAF }),
    Kind("both have shut, server first", FILL_AND_SHUT, Part { send: 999, shut: true, ..DEAF }),
];
/// Where the numbers of those begin that are no connections of a kind.
const BUSY: u64 = 1 << 32;
const VISITS: u64 = 1 << 33;

fn main() -> ExitCode {
    let options = Options::parse();
    let crowd = match Crowd::gather(&options) {
        Ok(crowd) => crowd,
        Err(error) => {
            eprintln!("ferry-crowd: {error}");
            return ExitCode::from(2);
        }
    };
    say(&json!({ "ready": true, "connections": crowd.guests.len() + crowd.busy.len() }));
    for line in io::stdin().lines().map_while(Result::ok) {
        match line.as_str() {
            "visits" => say(&json!({ "visits": crowd.visits.done.load(Ordering::Relaxed) })),
            "finish" => break,
            _ => say(&json!({ "error": format!("unknown command {line:?}") })),
        }
    }
    match crowd.finish() {
        Ok(report) => {
            say(&report);
            ExitCode::from(u8::from(report["problems"] != json!([])))
        }
        Err(error) => {
            say(&json!({ "problems": [format!("the server gives no account: {error}")] }));
            ExitCode::FAILURE
        }
    }
}

fn say(value: &Value) {
    println!("{value}");
}

/// What a loop in a thread is told, and tells.
#[derive(Clone, Default)]
struct Loop {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    problems: Arc<Mutex<Vec<String>>>,
    longest: Arc<AtomicU64>,
}

impl Loop {
    fn run(
        &self,
        what: &'static str,
        mut turn: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> JoinHandle<()> {
        let me = self.clone();
        std::thread::spawn(move || {
            while !me.stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                if let Err(e) = turn() {
                    let mut problems = me.problems.lock().expect("no other thread has panicked");
                    problems.push(format!("{what}: {e}"));
                    return;
                }
                me.done.fetch_add(1, Ordering::Relaxed);
                let took = began.elapsed().as_micros() as u64;
                me.longest.fetch_max(took, Ordering::Relaxed);
            }
        })
    }
}

struct Crowd {
    guests: Vec<Guest>,
    busy: Vec<JoinHandle<()>>,
    echoes: Loop,
    visitors: Vec<JoinHandle<()>>,
    visits: Loop,
    control: BufReader<TcpStream>,
    give_up: Duration,
}

impl Crowd {
    fn gather(options: &Options) -> io::Result<Crowd> {
        let address = |port| SocketAddr::new(options.to, port);
        let mut guests = Vec::new();
        for kind in &KINDS {
            for _ in 0..options.each {
                let number = guests.len() as u64;
                guests.push(Guest::new(address(PORT), kind, number, options.give_up)?);
            }
        }
        // Each is in its state when neither side has anything to do any more.
        let mut control = BufReader::new(open(address(CONTROL), options.give_up)?);
        let end = Instant::now() + options.give_up;
        let mut before = Vec::new();
        loop {
            for guest in &mut guests {
                guest.fill()?;
            }
            let sent: Vec<u64> = guests.iter().map(|g| g.output.at).collect();
            let now = (account(&mut control)?, sent);
            let learnt = now.0.len() == guests.len();
            if learnt && before.last() == Some(&now) {
                break;
            }
            if Instant::now() > end {
                return Err(io::Error::other("the connections do not come to rest"));
            }
            before = vec![now];
            // Nobody tells when a queue is full.
            std::thread::sleep(Duration::from_millis(50));
        }
        for guest in &mut guests {
            guest.shut_if_planned()?;
        }
        let echoes = Loop::default();
        let mut busy = Vec::new();
        for i in 0..options.each {
            let mut echo = Echo::new(address(PORT), BUSY + i, options.give_up)?;
            busy.push(echoes.run("busy", move || echo.turn()));
        }
        let visits = Loop::default();
        let number = Arc::new(AtomicU64::new(VISITS));
        let visitors = (0..options.visitors).map(|_| {
            let (number, to, give_up) = (number.clone(), address(DOOR), options.give_up);
            visits.run("short visit", move || {
                visit(to, number.fetch_add(1, Ordering::Relaxed), give_up)
            })
        });
        let visitors = visitors.collect();
        let give_up = options.give_up;
        Ok(Crowd { guests, busy, echoes, visitors, visits, control, give_up })
    }

    fn finish(mut self) -> io::Result<Value> {
        self.visits.stop.store(true, Ordering::Relaxed);
        self.echoes.stop.store(true, Ordering::Relaxed);
        for thread in self.visitors.into_iter().chain(self.busy) {
            let _ = thread.join();
        }
        let mut problems = Vec::new();
        for list in [&self.visits.problems, &self.echoes.problems] {
            problems.extend(list.lock().map(|l| l.clone()).unwrap_or_default());
        }
        self.control.get_mut().write_all(b"release\n")?;
        let mut line = String::new();
        self.control.read_line(&mut line)?;
        // All at once: whoever waits for another's end would wait for ever.
        let ends: Vec<_> = self
            .guests
            .into_iter()
            .map(|mut guest| {
                std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
                    let end = guest.end().map_err(|e| e.to_string());
                    (guest, end)
                })
            })
            .collect();
        let mut kinds = BTreeMap::<&str, u64>::new();
        let mut ended = Vec::new();
        for thread in ends {
            let (guest, end) = thread?.join().map_err(|_| io::Error::other("a thread panicked"))?;
            match end {
                Ok(()) => ended.push(guest),
                Err(e) => problems.push(format!("{} {}: {e}", guest.kind, guest.number)),
            }
        }
        // What the client's kernel still has to send the server gets a little later.
        let until = Instant::now() + self.give_up;
        let account = loop {
            let account = account(&mut self.control)?;
            let over = ended.iter().all(|g| account.get(&g.number).is_some_and(|t| t.over));
            if over || Instant::now() > until {
                break account;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        for guest in ended {
            let theirs = account.get(&guest.number).copied().unwrap_or_default();
            match guest.compare(theirs) {
                Ok(()) => *kinds.entry(guest.kind).or_default() += 1,
                Err(e) => problems.push(format!("{} {}: {e}", guest.kind, guest.number)),
            }
        }
        let longest = |l: &Loop| l.longest.load(Ordering::Relaxed) as f64 / 1000.0;
        let done = |l: &Loop| l.done.load(Ordering::Relaxed);
        Ok(json!({
            "problems": problems, "whole": kinds,
            "echoes": done(&self.echoes), "longest_echo_ms": longest(&self.echoes),
            "visits": done(&self.visits), "longest_visit_ms": longest(&self.visits),
        }))
    }
}

/// What the server says of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Theirs {
    got: u64,
    bad: u64,
    sent: u64,
    over: bool,
    well: bool,
}

fn account(control: &mut BufReader<TcpStream>) -> io::Result<HashMap<u64, Theirs>> {
    control.get_mut().write_all(b"report\n")?;
    let mut list = HashMap::new();
    loop {
        let mut line = String::new();
        if control.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line == "end\n" {
            return Ok(list);
        }
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |i: usize| words.get(i).and_then(|w| w.parse().ok()).unwrap_or(u64::MAX);
        let is = |i: usize| words.get(i) == Some(&"true");
        let theirs =
            Theirs { got: number(1), bad: number(2), sent: number(3), over: is(4), well: is(5) };
        list.insert(number(0), theirs);
    }
}

fn open(to: SocketAddr, give_up: Duration) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Before it connects, so that the window is small from the beginning.
    setsockopt(&fd, sockopt::SndBuf, &BUFFER)?;
    setsockopt(&fd, sockopt::RcvBuf, &BUFFER)?;
    let stream = TcpStream::from(fd);
    // It also limits how long connect(2) takes.
    stream.set_write_timeout(Some(give_up))?;
    stream.set_read_timeout(Some(give_up))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&stream), &SockaddrStorage::from(to))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection of a kind.
struct Guest {
    kind: &'static str,
    number: u64,
    part: Part,
    stream: TcpStream,
    input: Stream,
    output: Stream,
    shut: bool,
}

impl Guest {
    fn new(to: SocketAddr, kind: &Kind, number: u64, give_up: Duration) -> io::Result<Self> {
        let Kind(kind, server, part) = *kind;
        let mut stream = open(to, give_up)?;
        stream.write_all(&Plan { number, server }.encode())?;
        let (input, output) = (Stream::new(number, true), Stream::new(number, false));
        let mut guest = Self { kind, number, part, stream, input, output, shut: false };
        if kind.ends_with("client first") {
            // The server looks at its connections only now and then: it hears all this at once.
            guest.fill()?;
            guest.shut_if_planned()?;
        }
        Ok(guest)
    }

    /// Sends what is planned, or as much as goes.
    fn fill(&mut self) -> io::Result<()> {
        let end = if self.part.send == FILL { u64::MAX } else { u64::from(self.part.send) };
        self.stream.set_nonblocking(true)?;
        while self.output.at < end {
            let count = (end - self.output.at).min(PIECE as u64) as usize;
            match self.stream.write(&self.output.next(count)) {
                Ok(length) => self.output.at += length as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        self.stream.set_nonblocking(false)
    }

    fn shut_if_planned(&mut self) -> io::Result<()> {
        if self.part.shut && !self.shut {
            self.shut = true;
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// Sends the rest while everything is read, to the end.
    fn end(&mut self) -> io::Result<()> {
        let (mut sink, mut output, shut) = (self.stream.try_clone()?, self.output, self.shut);
        let sending = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
            let end = output.at + REST;
            while !shut && output.at < end {
                let count = (end - output.at).min(PIECE as u64) as usize;
                sink.write_all(&output.next(count))?;
                output.at += count as u64;
            }
            if !shut {
                sink.shutdown(Shutdown::Write)?;
            }
            Ok::<_, io::Error>(output)
        })?;
        let mut buffer = [0; PIECE];
        let reading = loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(length) => self.input.check(&buffer[..length]),
                Err(e) => break Err(e),
            }
        };
        self.output = sending.join().map_err(|_| io::Error::other("a thread panicked"))??;
        reading
    }

    fn compare(&self, theirs: Theirs) -> Result<(), String> {
        let mine = (self.output.at, self.input.at);
        match theirs {
            Theirs { got, bad: 0, sent, over: true, well: true }
                if (got, sent) == mine && self.input.bad == 0 =>
            {
                Ok(())
            }
            _ => Err(format!(
                "sent {}, got {} of which {} wrong; the server says {theirs:?}",
                mine.0, mine.1, self.input.bad
            )),
        }
    }
}

/// A connection that is never idle.
struct Echo {
    stream: TcpStream,
    output: Stream,
    input: Stream,
}

impl Echo {
    fn new(to: SocketAddr, number: u64, give_up: Duration) -> io::Result<Self> {
        let mut stream = open(to, give_up)?;
        let server = Part { echo: true, ..IDLE };
        stream.write_all(&Plan { number, server }.encode())?;
        let output = Stream::new(number, false);
        Ok(Self { stream, output, input: output })
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut bytes = self.output.next(64);
        self.stream.write_all(&bytes)?;
        self.output.at += 64;
        self.stream.read_exact(&mut bytes)?;
        self.input.check(&bytes);
        match self.input.bad {
            0 => Ok(()),
            _ => Err(io::Error::other("something else came back")),
        }
    }
}

/// Comes, asks, takes everything, goes.
fn visit(to: SocketAddr, number: u64, give_up: Duration) -> io::Result<()> {
    let at = |step: &'static str| move |e: io::Error| io::Error::other(format!("{step}: {e}"));
    let mut stream = open(to, give_up).map_err(at("connecting"))?;
    stream.write_all(&number.to_le_bytes()).map_err(at("asking"))?;
    let mut input = Stream::new(number, true);
    let mut buffer = [0; PIECE];
    loop {
        match stream.read(&mut buffer).map_err(at("reading"))? {
            0 => break,
            length => input.check(&buffer[..length]),
        }
    }
    match (input.at, input.bad) {
        (VISIT, 0) => Ok(()),
        (got, bad) => Err(io::Error::other(format!("got {got} of {VISIT} bytes, {bad} wrong"))),
    }
}
