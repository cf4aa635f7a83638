//! crowd-server: holds connections in every state that a connection can be in.
//!
//! What it does with one is told by the first bytes that come on it ([`Plan`]): how much it sends,
//! whether it says that it sends no more, whether it reads. When it is released, by a line on the
//! control port, it reads and sends the rest on all of them. What came is compared with what had to
//! come, byte by byte; the control port gives the account.
//!
//! At its door come short visits: a request, an answer, closed. It is opened only every few
//! milliseconds, so that connections wait in the backlog most of the time.
#[path = "../common/mod.rs"]
mod common;

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

use common::crowd::{CONTROL, DOOR, FILL, PLAN, PORT, Part, Plan, REST, Stream, VISIT};

/// How long the door stays shut, and how long no connection of the crowd is looked at.
const TICK: Duration = Duration::from_millis(2);
/// Small buffers fill up soon.
const BUFFER: usize = 32 << 10;
const PIECE: usize = 4096;

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crowd-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bind(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    // Before listening would be better: connections inherit it all the same.
    setsockopt(&listener, sockopt::SndBuf, &BUFFER)?;
    setsockopt(&listener, sockopt::RcvBuf, &BUFFER)?;
    listen(&listener, Backlog::MAXCONN)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn serve() -> io::Result<()> {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK)?;
    let (crowd, control, door) = (bind(PORT)?, bind(CONTROL)?, bind(DOOR)?);
    let mut guests: Vec<Guest> = Vec::new();
    let mut visits: Vec<TcpStream> = Vec::new();

    let mut callers: Vec<TcpStream> = Vec::new();
    let mut released = false;
    println!("ready");
    let mut tick = Instant::now();

    loop {
        await_any(&[signals.as_fd(), control.as_fd()], &guests, &callers, tick)?;
        if signals.read_signal()?.is_some() {
            return Ok(());
        }
        accept_into(&control, |s| callers.push(s))?;
        callers.retain_mut(|caller| heed(caller, &mut released, &guests).is_ok());
        if Instant::now() < tick {
            continue;
        }

        tick = Instant::now() + TICK;
        accept_into(&crowd, |s| guests.push(Guest::new(s)))?;
        accept_into(&door, |s| visits.push(s))?;
        guests.iter_mut().for_each(|guest| guest.turn(released));

        // One whose request has not come yet is looked at again.
        visits.retain_mut(|visit| !answer(visit));
    }
}

/// Until the next tick, or until somebody at the control port wants something.
fn await_any(
    always: &[BorrowedFd],
    guests: &[Guest],
    callers: &[TcpStream],
    tick: Instant,
) -> io::Result<()> {
    let fds = always.iter().copied().chain(callers.iter().map(AsFd::as_fd));
    let echoes = guests.iter().filter(|g| g.part().echo).map(|g| g.stream.as_fd());
    let mut fds: Vec<_> = fds.chain(echoes).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    let left = tick.saturating_duration_since(Instant::now()).as_millis() as i32 + 1;
    match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn accept_into(listener: &TcpListener, mut take: impl FnMut(TcpStream)) -> io::Result<()> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                take(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Whoever left while he waited.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(e) => return Err(e),
        }
    }
}

/// A short visit; true when it is over. What is not sent yet the kernel sends after the close.
fn answer(visit: &mut TcpStream) -> bool {
    let mut request = [0; 8];
    match visit.read(&mut request) {
        Ok(8) => {
            let stream = Stream::new(u64::from_le_bytes(request), true);
            // A visitor who has gone counts himself.
            let _ = visit.write_all(&stream.next(VISIT as usize));
            true
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => false,
        _ => true,
    }
}

/// A word on the control port. An error means that the caller has gone.
fn heed(caller: &mut TcpStream, released: &mut bool, guests: &[Guest]) -> io::Result<()> {
    let mut bytes = [0; 64];
    let length = match caller.read(&mut bytes) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(length) => length,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        Err(e) => return Err(e),
    };

    caller.set_nonblocking(false)?;
    match &bytes[..length] {
        b"release\n" => {
            *released = true;
            caller.write_all(b"released\n")?;
        }
        b"report\n" => {
            let mut text = String::new();
            for guest in guests {
                let Some(plan) = guest.plan else { continue };
                let (number, Stream { at, bad, .. }) = (plan.number, guest.input);
                let (sent, over, why) = (guest.output.at, guest.over, &guest.failed);
                let _ = writeln!(text, "{number} {at} {bad} {sent} {over} {}", why.is_empty());
            }
            text.push_str("end\n");
            caller.write_all(text.as_bytes())?;
        }
        _ => return Err(io::ErrorKind::InvalidData.into()),
    }

    caller.set_nonblocking(true)
}

/// A connection of the crowd.
struct Guest {
    stream: TcpStream,
    head: Vec<u8>,
    plan: Option<Plan>,
    input: Stream,
    output: Stream,
    /// Where the output ends, once that is known.
    end: Option<u64>,
    shut: bool,
    eof: bool,
    /// Both directions have ended.
    over: bool,
    failed: String,
}

impl Guest {
    fn new(stream: TcpStream) -> Self {
        let none = Stream::new(0, false);
        Self {
            stream,
            head: Vec::new(),
            plan: None,
            input: none,
            output: none,
            end: None,
            shut: false,
            eof: false,
            over: false,
            failed: String::new(),
        }
    }

    fn part(&self) -> Part {
        self.plan.map_or(Part::default(), |p| p.server)
    }

    fn turn(&mut self, released: bool) {
        if self.over {
            return;
        }
        if let Err(e) = self.go_on(released) {
            self.failed = e.to_string();
            self.over = true;
        }
    }

    fn go_on(&mut self, released: bool) -> io::Result<()> {
        let Some(plan) = self.plan else { return self.learn() };
        let part = plan.server;
        if part.read || released {
            self.read()?;
        }

        let full = match (part.echo, part.send) {
            (true, _) => {
                self.send_to(self.input.at)?;
                false
            }
            (_, FILL) if self.end.is_none() && !released => self.send_to(u64::MAX)?,
            (_, FILL) => false,
            (_, send) => {
                self.send_to(u64::from(send))?;
                false
            }
        };

        // What did not fit any more is where a stream that is shut ends.
        if part.shut && self.end.is_none() && (full || self.output.at == u64::from(part.send)) {
            self.end = Some(self.output.at);
        }
        if released && !part.echo && self.end.is_none() {
            self.end = Some(self.output.at + REST);
        }

        if let (true, Some(end)) = (released, self.end) {
            self.send_to(end)?;
        }
        let ended = self.end == Some(self.output.at) || part.echo && self.eof;
        if ended && !self.shut {
            self.stream.shutdown(Shutdown::Write)?;
            self.shut = true;
        }
        self.over = self.shut && self.eof;

        Ok(())
    }

    fn learn(&mut self) -> io::Result<()> {
        let mut bytes = [0; PLAN];
        let length = match self.stream.read(&mut bytes[..PLAN - self.head.len()]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(e) => return unless_later(e),
        };
        self.head.extend(&bytes[..length]);
        if let Ok(bytes) = <&[u8; PLAN]>::try_from(self.head.as_slice()) {
            let plan = Plan::decode(bytes);
            self.plan = Some(plan);
            self.input = Stream::new(plan.number, false);
            self.output = Stream::new(plan.number, true);
            if plan.server.echo {
                // What comes back is what was sent.
                self.output = Stream::new(plan.number, false);
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; PIECE];
        while !self.eof {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.eof = true,
                Ok(length) => self.input.check(&buffer[..length]),
                Err(e) => return unless_later(e),
            }
        }
        Ok(())
    }

    /// Sends up to a place in the stream; true if the socket is full before that.
    fn send_to(&mut self, end: u64) -> io::Result<bool> {
        while self.output.at < end {
            let count = (end - self.output.at).min(PIECE as u64) as usize;
            match self.stream.write(&self.output.next(count)) {
                Ok(length) => self.output.at += length as u64,
                Err(e) => return unless_later(e).map(|()| true),
            }
        }
        Ok(false)
    }
}

fn unless_later(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}
