//! The probe's control interface: commands as lines on stdin, answers as JSON lines on stdout.
//!
//! ```text
//! mark NAME            {"mark":"NAME"}
//! report [since NAME]  the report of the window from that mark (or the start) until now
//! verify               the server checks all its memory: {"verify":{"bad_pages":0,…}}
//! stats                {"stats":{…}}
//! quit                 ends the probe, as does the end of stdin unless --for is given
//! ```
//! `verify` and `stats` go over a connection of their own, opened for them.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::{Value, json};

use crate::common::wire::{ANSWER, Answer, Op, Request, Stats, Verdict};
use crate::record::Nanos;

/// How long a server may take to check all its memory.
const PATIENCE: Duration = Duration::from_secs(120);

/// Something that was said on stdin.
pub enum Command {
    Mark(String),
    /// Of the window since this mark, or since the start.
    Report(Option<String>),
    Ask(Op),
    Quit,
    /// The end of stdin.
    End,
    Unknown(String),
}

/// The commands, and the descriptor that tells when there are some.
pub struct Control {
    pub bell: Arc<EventFd>,
    /// When each was read, and what it was.
    pub commands: Receiver<(Nanos, Command)>,
}

impl Control {
    /// Starts to read stdin: in a thread, because it may be a file that epoll refuses.
    pub fn start(clock: fn() -> Nanos) -> io::Result<Self> {
        let bell = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (sender, commands) = channel();
        let ring = Arc::clone(&bell);
        thread::spawn(move || listen(clock, &sender, &ring));
        Ok(Self { bell, commands })
    }
}

fn listen(clock: fn() -> Nanos, sender: &mpsc::Sender<(Nanos, Command)>, ring: &EventFd) {
    for line in io::stdin().lines().map_while(Result::ok) {
        if !line.trim().is_empty() {
            let _ = sender.send((clock(), parse(&line)));
            let _ = ring.write(1);
        }
    }
    let _ = sender.send((clock(), Command::End));
    let _ = ring.write(1);
}

fn parse(line: &str) -> Command {
    let words: Vec<_> = line.split_whitespace().collect();
    match words[..] {
        ["mark", name] => Command::Mark(name.to_owned()),
        ["report"] => Command::Report(None),
        ["report", "since", name] => Command::Report(Some(name.to_owned())),
        ["verify"] => Command::Ask(Op::Verify),
        ["stats"] => Command::Ask(Op::Stats),
        ["quit"] => Command::Quit,
        _ => Command::Unknown(line.to_owned()),
    }
}

/// Writes a line to stdout; nobody listening is no error.
pub fn say(value: &Value) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{value}").and_then(|()| stdout.flush());
}

/// Asks the server over a new connection, in a thread of its own, and says what it answers.
pub fn ask(to: SocketAddr, op: Op) {
    thread::spawn(move || say(&asked(to, op)));
}

/// The same, waiting for the answer.
pub fn asked(to: SocketAddr, op: Op) -> Value {
    let name = if op == Op::Verify { "verify" } else { "stats" };
    match exchange(to, op) {
        Ok(value) => json!({ name: value }),
        Err(error) => json!({ name: null, "error": error.to_string() }),
    }
}

fn exchange(to: SocketAddr, op: Op) -> io::Result<Value> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&Request { op, connection: 0, sequence: 0 }.encode())?;
    let mut frame = [0; ANSWER];
    stream.read_exact(&mut frame)?;
    let Some(answer) = Answer::decode(&frame) else {
        return Err(io::Error::other("the server's answer makes no sense"));
    };
    Ok(match op {
        Op::Verify => json!(Verdict::from_body(answer.body)),
        _ => json!(Stats::from_body(answer.body)),
    })
}
