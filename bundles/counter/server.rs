//! counter-server: a TCP server whose answers prove that nothing was lost.
//!
//! It holds memory that a formula foretells (`common/pages.rs`), counts the
//! requests of every connection, and with each answer shows the checksum of
//! one page. A client that checks the answers (`ferry-probe`) therefore sees
//! lost or repeated requests, connections that changed places, and stale or
//! damaged pages. With `--dirty` the memory keeps changing meanwhile.
//!
//! One thread and one epoll serve everything; `--threads` adds threads that
//! only keep rewriting and checking memory of their own, so that a migration
//! has more than one thread to carry, and `--files` one that keeps changing
//! files and checks them against what it remembers. `--direct` reads past the page cache.
#[path = "../common/mod.rs"]
mod common;
mod connection;
mod direct;
mod files;
mod threads;

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{Backlog, listen};

use common::pages::{Content, Memory, PAGE, SplitMix};
use common::wire::{Answer, Count, Op, Request, Stats, Verdict};
use connection::Connection;
use direct::{Aio, Direct};
use files::Files;
use threads::Threads;

/// Answer counts over TCP from memory that a formula foretells.
#[derive(Parser)]
struct Options {
    /// Where to listen
    #[arg(long, default_value = "0.0.0.0:7000", value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// How much memory to hold
    #[arg(long, default_value = "64M", value_parser = common::units::size)]
    memory: u64,
    /// Hold it as anonymous shared memory
    #[arg(long)]
    shared: bool,
    /// What to fill it with
    #[arg(long, default_value = "random")]
    content: Content,
    /// The first input of the formula
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many pages to rewrite every second
    #[arg(long, default_value_t = 0, value_name = "PAGES_PER_S")]
    dirty: u64,
    /// Rewrite only within the first so much memory
    #[arg(long, value_parser = common::units::size, value_name = "SIZE")]
    hot: Option<u64>,
    /// Run so many more threads, each rewriting and checking memory of its own
    #[arg(long, default_value_t = 0)]
    threads: u64,
    /// Keep changing and checking files in this directory
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    /// How large the largest of them is
    #[arg(long, default_value = "4M", value_parser = common::units::size, value_name = "SIZE")]
    files_size: u64,
    /// How many of its pages to rewrite every second
    #[arg(long, default_value_t = 200, value_name = "PAGES_PER_S")]
    files_rate: u64,
    /// Keep reading this file past the page cache, and checking what was read
    #[arg(long, value_name = "FILE")]
    direct: Option<PathBuf>,
    /// Make a ring of Linux AIO
    #[arg(long, value_name = "HOW")]
    aio: Option<Aio>,
    /// Write a numbered line to stdout every second
    #[arg(long)]
    log_to_stdout: bool,
}

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// How often memory is rewritten: small ticks, so that the writes lie evenly in time.
const TICK: Duration = Duration::from_millis(2);
/// Pages that are checked at a time for VERIFY, so that the others need not wait for all of it.
const VERIFY_STEP: usize = 128;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("counter-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<()> {
    // As many connections as are allowed at all; being refused more is no reason not to start.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    // Blocked and read from a descriptor: as pid 1 of a container the default action would be
    // to ignore the signal. Before any thread starts, so that all inherit the mask.
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;

    let mut server = Server::new(options)?;
    server.watch(&signals, SIGNALS)?;
    say("ready");
    server.serve()
}

/// Prints a line; a reader that has gone away is no reason to stop serving.
fn say(line: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

struct Server {
    epoll: Epoll,
    listener: TcpListener,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    accepted: u64,
    memory: Memory,
    counts: u64,
    walk: SplitMix,
    verifying: Vec<Verifying>,
    dirtier: Option<Dirtier>,
    threads: Threads,
    files: Option<Arc<Files>>,
    direct: Option<Arc<Direct>>,
    log: Option<Log>,
}

impl Server {
    fn new(options: &Options) -> io::Result<Self> {
        let count = (options.memory as usize / PAGE).max(1);
        let memory = if options.shared {
            Memory::shared(options.content, options.seed, count)?
        } else {
            Memory::new(options.content, options.seed, count)
        };

        let hot = options.hot.map_or(count, |bytes| (bytes as usize / PAGE).clamp(1, count));
        let listener = TcpListener::bind(options.listen)?;
        listener.set_nonblocking(true)?;

        // A thousand clients that come at once must not be turned away to retransmit.
        listen(&listener, Backlog::MAXCONN)?;
        let server = Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            listener,
            connections: Vec::new(),
            free: Vec::new(),
            accepted: 0,
            memory,
            counts: 0,
            walk: SplitMix(options.seed),
            verifying: Vec::new(),
            dirtier: (options.dirty > 0).then(|| Dirtier::new(options.dirty, 0..hot)),
            threads: Threads::start(options.threads, options.seed),
            files: match &options.files {
                Some(dir) => {
                    let how = (options.files_size, options.files_rate);
                    Some(Files::start(dir, how, options.seed)?)
                }
                None => None,
            },
            direct: match &options.direct {
                Some(path) => Some(Direct::start(path, options.seed)?),
                None => None,
            },
            log: options.log_to_stdout.then(Log::new),
        };

        options.aio.map_or(Ok(()), direct::ring)?;
        server.watch(&server.listener, LISTENER)?;
        Ok(server)
    }

    fn watch(&self, fd: impl std::os::fd::AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let ready = match self.epoll.wait(&mut events, self.patience()) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..ready] {
                match event.data() {
                    SIGNALS => return Ok(()),
                    LISTENER => self.accept()?,
                    token => self.attend((token - FIRST_CONNECTION) as usize)?,
                }
            }
            if let Some(dirtier) = &mut self.dirtier {
                dirtier.turn(&mut self.memory);
            }
            self.verify_a_little()?;
            if let Some(log) = &mut self.log {
                log.turn(self.counts, self.memory.rewrites);
            }
        }
    }

    /// How long there is nothing to do if nobody asks.
    fn patience(&self) -> EpollTimeout {
        let wait = |time: Duration| EpollTimeout::try_from(time).unwrap_or(EpollTimeout::ZERO);
        if !self.verifying.is_empty() {
            EpollTimeout::ZERO
        } else if self.dirtier.is_some() {
            wait(TICK)
        } else if self.log.is_some() {
            wait(Duration::from_millis(100))
        } else {
            EpollTimeout::NONE
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    // Out of descriptors, or a client that left already: serve the others. The
                    // sleep keeps a full table from turning into a busy loop.
                    eprintln!("counter-server: accept: {error}");
                    std::thread::sleep(Duration::from_millis(10));
                    return Ok(());
                }
            };
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let connection = Connection::new(stream)?;
            self.watch(connection.stream(), FIRST_CONNECTION + slot as u64)?;
            self.connections[slot] = Some(connection);
            self.accepted += 1;
        }
    }

    /// Reads what a connection asks, answers, and forgets it if it has ended.
    fn attend(&mut self, slot: usize) -> io::Result<()> {
        // An event of this round may concern a connection that the same round has closed.
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else {
            return Ok(());
        };
        let alive = connection.receive();
        while let Some(frame) = connection.next_request() {
            let Some(request) = Request::decode(&frame) else {
                eprintln!("counter-server: a request that is none; closing the connection");
                return self.forget(slot, connection);
            };
            match request.op {
                Op::Count => {
                    connection.counts += 1;
                    let body = self.count(connection.counts).body();
                    connection.send(&Answer { to: request, body }.encode());
                }
                Op::Stats => {
                    let body = self.stats().body();
                    connection.send(&Answer { to: request, body }.encode());
                }
                Op::Verify => self.verifying.push(Verifying::new(slot, request)),
            }
        }

        self.put_back(slot, connection, alive)
    }

    /// Writes what there is to write and puts the connection back where it was.
    fn put_back(&mut self, slot: usize, mut connection: Connection, alive: bool) -> io::Result<()> {
        if !alive || !connection.flush() {
            return self.forget(slot, connection);
        }
        if let Some(interest) = connection.changed_interest() {
            let mut event = EpollEvent::new(interest, FIRST_CONNECTION + slot as u64);
            self.epoll.modify(connection.stream(), &mut event)?;
        }
        self.connections[slot] = Some(connection);
        Ok(())
    }

    fn forget(&mut self, slot: usize, connection: Connection) -> io::Result<()> {
        self.epoll.delete(connection.stream())?;
        self.verifying.retain(|work| work.slot != slot);
        self.free.push(slot);
        Ok(())
    }

    fn count(&mut self, of_connection: u64) -> Count {
        self.counts += 1;
        let page = self.walk.below(self.memory.len());
        let (generation, hash) = self.memory.look(page);
        Count {
            of_connection,
            of_server: self.counts,
            page: page as u64,
            generation,
            hash,
            seed: self.memory.seed,
            content: self.memory.content.code(),
            pages: self.memory.len() as u64,
        }
    }

    fn stats(&self) -> Stats {
        Stats {
            pages: self.memory.len() as u64,
            seed: self.memory.seed,
            counts: self.counts,
            rewrites: self.memory.rewrites,
            // The one who asks is out of its slot at this moment.
            connections: 1 + self.connections.iter().flatten().count() as u64,
            accepted: self.accepted,
            threads: self.threads.count,
            beats: self.threads.beats()
                + self.files.as_ref().map_or(0, |f| f.beats.load(Relaxed))
                + self.direct.as_ref().map_or(0, |d| d.beats.load(Relaxed)),
        }
    }

    fn verify_a_little(&mut self) -> io::Result<()> {
        let Some(work) = self.verifying.first_mut() else { return Ok(()) };
        let end = (work.next + VERIFY_STEP).min(self.memory.len());
        work.bad_pages += self.memory.bad_pages(work.next..end);
        work.next = end;
        if end < self.memory.len() {
            return Ok(());
        }
        let work = self.verifying.remove(0);
        let verdict = Verdict {
            pages: self.memory.len() as u64,
            bad_pages: work.bad_pages,
            bad_table: u64::from(!self.memory.table_is_whole()),
            bad_in_threads: self.threads.bad_pages()
                + self.files.as_ref().map_or(0, |f| f.bad.load(Relaxed))
                + self.direct.as_ref().map_or(0, |d| d.bad.load(Relaxed)),
            files_line: self.files.as_ref().map_or(0, |f| f.line.load(Relaxed)),
            files_errno: self.files.as_ref().map_or(0, |f| f.errno.load(Relaxed)),
        };
        let Some(mut connection) = self.connections[work.slot].take() else { return Ok(()) };
        connection.send(&Answer { to: work.request, body: verdict.body() }.encode());
        self.put_back(work.slot, connection, true)
    }
}

/// A VERIFY on its way through memory.
struct Verifying {
    slot: usize,
    request: Request,
    next: usize,
    bad_pages: u64,
}

impl Verifying {
    fn new(slot: usize, request: Request) -> Self {
        Self { slot, request, next: 0, bad_pages: 0 }
    }
}

/// Rewrites pages in random order at a steady rate.
struct Dirtier {
    rate: u64,
    range: Range<usize>,
    order: SplitMix,
    last: Instant,
    /// Pages due, in fractions.
    due: f64,
}

impl Dirtier {
    fn new(rate: u64, range: Range<usize>) -> Self {
        Self { rate, range, order: SplitMix(!0), last: Instant::now(), due: 0.0 }
    }

    fn turn(&mut self, memory: &mut Memory) {
        let now = Instant::now();
        // After a migration the clock may have leapt either way: it is another host's. A leap
        // forward must not become one great burst, nor one back a long rest.
        let passed = now.saturating_duration_since(self.last).min(10 * TICK);
        self.last = now;
        self.due += passed.as_secs_f64() * self.rate as f64;
        while self.due >= 1.0 {
            self.due -= 1.0;
            memory.rewrite(self.range.start + self.order.below(self.range.len()));
        }
    }
}

/// A numbered line every second.
struct Log {
    lines: u64,
    last: Instant,
}

impl Log {
    fn new() -> Self {
        Self { lines: 0, last: Instant::now() }
    }

    fn turn(&mut self, counts: u64, rewrites: u64) {
        let now = Instant::now();
        // `now < last` happens on a host that has been up for less long.
        if now >= self.last && now - self.last < Duration::from_secs(1) {
            return;
        }
        self.last = now;
        self.lines += 1;
        say(&format!("line {} counts {counts} rewrites {rewrites}", self.lines));
    }
}

#[cfg(test)]
mod tests {
    use super::common::pages::Page;
    use super::*;

    #[test]
    fn a_rewritten_page_is_what_the_formula_says() {
        for content in [Content::Random, Content::Text, Content::Zero] {
            for mut memory in [Memory::new(content, 7, 4), Memory::shared(content, 7, 4).unwrap()] {
                memory.rewrite(2);
                assert_eq!(memory.look(2), (1, Page::expected(content, 7, 2, 1).hash()));
                assert_eq!(memory.bad_pages(0..4), 0);
                assert!(memory.table_is_whole());
            }
        }
    }

    #[test]
    fn pages_differ_in_every_input() {
        let hash = |seed, index, generation| {
            Page::expected(Content::Random, seed, index, generation).hash()
        };
        let hashes = [hash(1, 0, 0), hash(0, 1, 0), hash(0, 0, 1), hash(0, 0, 0), hash(1, 1, 1)];
        let distinct: std::collections::BTreeSet<_> = hashes.into_iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }

    #[test]
    fn four_pages_of_five_are_zeros() {
        let mut seen = std::collections::BTreeMap::new();
        for index in 0..1000 {
            *seen.entry(Page::expected(Content::Zero, 1, index, 3).hash()).or_insert(0) += 1;
        }
        let zeros = *seen.values().max().expect("a thousand");
        assert!((750..850).contains(&zeros), "{zeros} of 1000");
        assert_eq!(seen.len(), 1000 - zeros + 1, "the others differ");
    }

    #[test]
    fn frames_survive_the_wire() {
        let to = Request { op: Op::Verify, connection: 3, sequence: u64::MAX };
        assert_eq!(Request::decode(&to.encode()), Some(to));
        let answer = Answer { to, body: [1, 2, 3, 4, 5, 6, 7, 8] };
        assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        assert_eq!(Request::decode(&[0; common::wire::REQUEST]), None);
    }
}
