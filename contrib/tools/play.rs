//! A player in a game of Teeworlds 0.7: comes in as the game's own client does, gives inputs fifty
//! times a second, takes snapshots of the world, and never comes in a second time.
//!
//! ```text
//! client                                   server
//! token ─────────────────────────────────▶
//!       ◀───────────────────────────────── token
//! connect ───────────────────────────────▶
//!       ◀───────────────────────────────── accept
//! info ──────────────────────────────────▶
//!       ◀───────────────────────────────── map change
//! ready ─────────────────────────────────▶
//!       ◀───────────────────────────────── connection is ready
//! start info ────────────────────────────▶
//!       ◀───────────────────────────────── ready to enter
//! enter ─────────────────────────────────▶
//! input (tick of the last snapshot) ─────▶     again and again; those that count ("vital")
//!       ◀───────────────────────────────── snapshot, input's timing    are numbered and repeated
//! ```
//!
//! Each input is answered with its timing, which tells what was lost on the way there or back. A
//! server that stood still makes up for the ticks, but sends one snapshot for all of them: such are
//! `missed`, of which none was ever sent, or one was lost.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use crate::{Words, common, connect, hear, ms};

#[derive(Args)]
pub struct Options {
    /// The server
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// How long to go on; without it until `finish`
    #[arg(long = "for", value_parser = common::units::duration, value_name = "DURATION")]
    length: Option<Duration>,
    /// The server's program: how often each byte occurs stands in it, and both ends make their
    /// Huffman code of that
    #[arg(long, default_value = "/usr/games/teeworlds-server", value_name = "FILE")]
    program: PathBuf,
}

/// A tick of the game. There is a snapshot of every second one.
const TICK: Duration = Duration::from_millis(20);
const PER_SNAPSHOT: i32 = 2;
/// How long a server may be silent, as the game's own client has it.
const PATIENCE: Duration = Duration::from_secs(10);
/// After so long what counts is said again.
const AGAIN: Duration = Duration::from_secs(1);
const VERSION: &str = "0.7 802f1be60a05665f";
const NAME: &str = "ferry";

/// The token of a packet to a server that has not told its own.
const NOBODY: u32 = u32::MAX;
const MINE: u32 = 0x00fe_4479;
/// What asks for a token is so long that its answer is no longer.
const TOKEN_REQUEST: usize = 512;
const SEQUENCES: u16 = 1 << 10;

// Flags of a packet.
const CONTROL: u8 = 1;
const RESEND: u8 = 2;
const COMPRESSED: u8 = 4;
const CONNLESS: u8 = 8;
// What a control packet is about.
const KEEP_ALIVE: u8 = 0;
const CONNECT: u8 = 1;
const ACCEPT: u8 = 2;
const CLOSE: u8 = 4;
const TOKEN: u8 = 5;

/// Messages, as they stand on the wire: of the engine (odd) and of the game (even).
mod message {
    const fn system(number: i32) -> i32 {
        number << 1 | 1
    }
    const fn game(number: i32) -> i32 {
        number << 1
    }
    pub const INFO: i32 = system(1);
    pub const MAP_CHANGE: i32 = system(2);
    pub const CON_READY: i32 = system(5);
    pub const SNAP: i32 = system(6);
    pub const SNAP_EMPTY: i32 = system(7);
    pub const SNAP_SINGLE: i32 = system(8);
    pub const INPUT_TIMING: i32 = system(10);
    pub const READY: i32 = system(18);
    pub const ENTER: i32 = system(19);
    pub const INPUT: i32 = system(20);
    pub const CHAT: i32 = game(3);
    pub const READY_TO_ENTER: i32 = game(8);
    pub const SAY: i32 = game(24);
    pub const START_INFO: i32 = game(27);
}

pub fn run(options: &Options) -> io::Result<()> {
    let mut player = Player {
        socket: connect(&options.to)?,
        code: Huffman::of(&std::fs::read(&options.program)?)?,
        token: NOBODY,
        connected: false,
        heard: 0,
        resend: false,
        said: 0,
        unheard: VecDeque::new(),
        tick: 0,
        parts: (0, 0),
        intended: 0,
        open: BTreeSet::new(),
        inputs: 0,
        snapshots: 0,
        missed: 0,
        refused: 0,
        chats: 0,
        last: Instant::now(),
        silence: Duration::ZERO,
        left: None,
    };
    player.come_in()?;
    println!("{}", json!({ "ready": true }));
    player.play(&Words::listen(options.length))?;
    println!("{}", player.report());
    Ok(())
}

struct Player {
    socket: UdpSocket,
    code: Huffman,
    token: u32,
    connected: bool,
    /// Number of the last chunk that counts and has been heard, and whether one is missing.
    heard: u16,
    resend: bool,
    /// The same of what we say, and what the server has not heard of that.
    said: u16,
    unheard: VecDeque<(u16, Vec<u8>, Instant)>,
    /// Of the last whole snapshot; and of one that comes in parts, how many there are.
    tick: i32,
    parts: (i32, i32),
    /// The tick that the last input was for; those that are not answered.
    intended: i32,
    open: BTreeSet<i32>,
    inputs: u64,
    snapshots: u64,
    missed: i32,
    refused: u64,
    chats: u64,
    last: Instant,
    silence: Duration,
    /// Why the server has sent us away.
    left: Option<String>,
}

impl Player {
    fn come_in(&mut self) -> io::Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.snapshots == 0 {
            match (self.token, self.connected) {
                (NOBODY, _) => self.control(TOKEN)?,
                (_, false) => self.control(CONNECT)?,
                _ => self.say_again(AGAIN)?,
            }
            self.listen(Instant::now() + 5 * TICK)?;
            if Instant::now() > until {
                return Err(io::Error::other("the server lets nobody in"));
            }
        }
        // The way in was no game: it may have begun before the server had its socket.
        (self.silence, self.missed, self.snapshots, self.refused) = Default::default();
        Ok(())
    }

    fn play(&mut self, words: &Words) -> io::Result<()> {
        let mut next = Instant::now();
        loop {
            match words.next().as_deref() {
                Some("finish") => break,
                Some("report") => println!("{}", self.report()),
                Some(word) => println!("{}", json!({ "error": format!("unknown word {word:?}") })),
                None => {}
            }
            next += TICK;
            self.input()?;
            self.say_again(AGAIN)?;
            self.listen(next)?;
            if self.last.elapsed() > PATIENCE {
                return Err(io::Error::other("the server is silent"));
            }
        }
        // What the game thinks of us is what it tells everybody that we have said.
        let mut chat = Packer::new(message::SAY);
        chat.int(1).int(-1).text("all here");
        self.vital(chat)?;
        let until = Instant::now() + PATIENCE;
        while (self.chats == 0 || !self.open.is_empty()) && Instant::now() < until {
            self.say_again(AGAIN)?;
            // No input any more; but the server is to hear what we have of its.
            self.packet(CONTROL, 0, &[KEEP_ALIVE])?;
            self.listen(Instant::now() + TICK)?;
        }
        Ok(())
    }

    fn report(&self) -> Value {
        json!({
            "inputs": self.inputs, "inputs_unanswered": self.open.len(),
            "snapshots": self.snapshots, "missed": self.missed, "refused": self.refused,
            "silence_ms": ms(self.silence.max(self.last.elapsed())), "heard_in_chat": self.chats > 0,
            // We come in once, and are still there, or this would be an error.
            "reconnects": 0,
        })
    }

    /// Runs to the left and to the right, jumps now and then: who does nothing is sent away.
    fn input(&mut self) -> io::Result<()> {
        self.intended = (self.intended + 1).max(self.tick + 2);
        let direction = if self.intended / 50 % 2 == 0 { -1 } else { 1 };
        let jump = i32::from(self.intended % 75 < 5);
        let mut input = Packer::new(message::INPUT);
        input.int(self.tick).int(self.intended).int(40);
        for value in [direction, 100, 0, jump, 0, 0, 0, 0, 0, 0] {
            input.int(value);
        }
        input.int(0);
        self.inputs += 1;
        self.open.insert(self.intended);
        let chunk = chunk(None, false, &input.0);
        self.packet(0, 1, &chunk)
    }

    // ------------------------------------------------------------ out

    fn vital(&mut self, message: Packer) -> io::Result<()> {
        self.said = (self.said + 1) % SEQUENCES;
        let bytes = chunk(Some(self.said), false, &message.0);
        self.packet(0, 1, &bytes)?;
        self.unheard.push_back((self.said, message.0, Instant::now()));
        Ok(())
    }

    fn say_again(&mut self, after: Duration) -> io::Result<()> {
        let mut again = Vec::new();
        for (number, message, at) in &mut self.unheard {
            if at.elapsed() >= after {
                *at = Instant::now();
                again.push(chunk(Some(*number), true, message));
            }
        }
        again.iter().try_for_each(|bytes| self.packet(0, 1, bytes))
    }

    fn control(&mut self, what: u8) -> io::Result<()> {
        let mut bytes = vec![what];
        bytes.extend(MINE.to_be_bytes());
        bytes.resize(1 + TOKEN_REQUEST, 0);
        self.packet(CONTROL, 0, &bytes)
    }

    fn packet(&mut self, flags: u8, chunks: u8, bytes: &[u8]) -> io::Result<()> {
        let flags = flags | if std::mem::take(&mut self.resend) { RESEND } else { 0 };
        let [high, low] = self.heard.to_be_bytes();
        let mut packet = vec![flags << 2 | high, low, chunks];
        packet.extend(self.token.to_be_bytes());
        packet.extend(bytes);
        match self.socket.send(&packet) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                self.refused += 1;
                Ok(())
            }
            sent => sent.map(drop),
        }
    }

    // ------------------------------------------------------------ in

    fn listen(&mut self, until: Instant) -> io::Result<()> {
        let mut buffer = [0; 2048];
        while Instant::now() < until {
            match hear(&self.socket, &mut buffer, until) {
                Ok(Some(length)) => self.take(&buffer[..length])?,
                Ok(None) => break,
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => self.refused += 1,
                Err(e) => return Err(e),
            }
            if let Some(why) = &self.left {
                return Err(io::Error::other(format!("the server has sent us away: {why}")));
            }
        }
        Ok(())
    }

    fn take(&mut self, packet: &[u8]) -> io::Result<()> {
        let Some((head, body)) = packet.split_at_checked(7) else { return Ok(()) };
        let flags = head[0] >> 2;
        if flags & CONNLESS != 0 || head[3..7] != MINE.to_be_bytes() {
            return Ok(());
        }
        self.silence = self.silence.max(self.last.elapsed());
        self.last = Instant::now();
        let acknowledged = u16::from(head[0] & 3) << 8 | u16::from(head[1]);
        let behind = |n: u16| (acknowledged + SEQUENCES - n) % SEQUENCES < SEQUENCES / 2;
        self.unheard.retain(|(number, ..)| !behind(*number));
        if flags & RESEND != 0 {
            self.say_again(Duration::ZERO)?;
        }
        if flags & CONTROL != 0 {
            return self.obey(body);
        }
        let unpacked = if flags & COMPRESSED != 0 { self.code.unpack(body) } else { body.to_vec() };
        let mut rest = &unpacked[..];
        for _ in 0..head[2] {
            let Some((number, message, left)) = next_chunk(rest) else { break };
            rest = left;
            if let Some(number) = number {
                if number != (self.heard + 1) % SEQUENCES {
                    // One before it is missing, unless it is one that we have.
                    let old = (self.heard + SEQUENCES - number) % SEQUENCES < SEQUENCES / 2;
                    self.resend |= !old;
                    continue;
                }
                self.heard = number;
            }
            self.understand(message)?;
        }
        Ok(())
    }

    fn obey(&mut self, body: &[u8]) -> io::Result<()> {
        match (body.first(), body.get(1..5)) {
            (Some(&TOKEN), Some(token)) if self.token == NOBODY => {
                self.token = u32::from_be_bytes([token[0], token[1], token[2], token[3]]);
                self.control(CONNECT)
            }
            (Some(&ACCEPT), _) if !self.connected => {
                self.connected = true;
                let mut info = Packer::new(message::INFO);
                info.text(VERSION).text("").int(0x0705);
                self.vital(info)
            }
            (Some(&CLOSE), _) => {
                let why = String::from_utf8_lossy(&body[1..]);
                self.left = Some(why.trim_end_matches('\0').to_owned());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn understand(&mut self, message: &[u8]) -> io::Result<()> {
        let mut rest = message;
        let Some(kind) = int(&mut rest) else { return Ok(()) };
        match kind {
            message::MAP_CHANGE => self.vital(Packer::new(message::READY)),
            message::CON_READY => {
                let mut start = Packer::new(message::START_INFO);
                start.text(NAME).text("").int(-1);
                for part in ["standard", "", "", "standard", "standard", "standard"] {
                    start.text(part);
                }
                for _ in 0..12 {
                    start.int(0);
                }
                self.vital(start)
            }
            message::READY_TO_ENTER => self.vital(Packer::new(message::ENTER)),
            message::SNAP | message::SNAP_EMPTY | message::SNAP_SINGLE => {
                let (Some(tick), Some(_)) = (int(&mut rest), int(&mut rest)) else { return Ok(()) };
                let parts = if kind == message::SNAP { int(&mut rest).unwrap_or(1) } else { 1 };
                self.parts =
                    if self.parts.0 == tick { (tick, self.parts.1 + 1) } else { (tick, 1) };
                if self.parts.1 == parts && tick > self.tick {
                    self.missed += (tick - self.tick) / PER_SNAPSHOT - 1;
                    self.snapshots += 1;
                    self.tick = tick;
                }
                Ok(())
            }
            message::INPUT_TIMING => {
                int(&mut rest).map(|tick| self.open.remove(&tick));
                Ok(())
            }
            message::CHAT => {
                self.chats += u64::from(message.windows(8).any(|w| w == b"all here"));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn chunk(number: Option<u16>, again: bool, message: &[u8]) -> Vec<u8> {
    let flags = u8::from(number.is_some()) | u8::from(again) << 1;
    let mut bytes = vec![flags << 6 | (message.len() >> 6) as u8, message.len() as u8 & 0x3f];
    if let Some(number) = number {
        bytes[1] |= (number >> 2) as u8 & 0xc0;
        bytes.push(number as u8);
    }
    bytes.extend(message);
    bytes
}

/// Its number, if it counts; the message; and what follows.
fn next_chunk(bytes: &[u8]) -> Option<(Option<u16>, &[u8], &[u8])> {
    let (head, mut rest) = bytes.split_first_chunk::<2>()?;
    let length = usize::from(head[0] & 0x3f) << 6 | usize::from(head[1] & 0x3f);
    let mut number = None;
    if head[0] >> 6 & 1 != 0 {
        let (low, after) = rest.split_first()?;
        number = Some(u16::from(head[1] & 0xc0) << 2 | u16::from(*low));
        rest = after;
    }
    let (message, rest) = rest.split_at_checked(length)?;
    Some((number, message, rest))
}

/// A message in the making.
struct Packer(Vec<u8>);

impl Packer {
    fn new(kind: i32) -> Packer {
        let mut new = Packer(Vec::new());
        new.int(kind);
        new
    }

    /// Six bits and the sign, then seven at a time; the top bit says that more follows.
    fn int(&mut self, value: i32) -> &mut Packer {
        let sign = if value < 0 { 0x40 } else { 0 };
        let mut left = (if value < 0 { !value } else { value }).cast_unsigned();
        let mut byte = sign | (left & 0x3f) as u8;
        left >>= 6;
        while left != 0 {
            self.0.push(byte | 0x80);
            byte = (left & 0x7f) as u8;
            left >>= 7;
        }
        self.0.push(byte);
        self
    }

    fn text(&mut self, text: &str) -> &mut Packer {
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }
}

fn int(bytes: &mut &[u8]) -> Option<i32> {
    let mut take = || {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        Some(*first)
    };
    let mut byte = take()?;
    let negative = byte & 0x40 != 0;
    let (mut value, mut shift) = (u32::from(byte & 0x3f), 6);
    while byte & 0x80 != 0 && shift < 32 {
        byte = take()?;
        value |= u32::from(byte & 0x7f) << shift;
        shift += 7;
    }
    let value = value.cast_signed();
    Some(if negative { !value } else { value })
}

/// The code that packets come in.
struct Huffman {
    /// The two ways on from each inner node: symbols are below [`Huffman::SYMBOLS`].
    ways: Vec<[usize; 2]>,
}

impl Huffman {
    /// All bytes, and the end.
    const SYMBOLS: usize = 257;
    const END: usize = 256;
    /// How often 0 and 1 occur: what the list begins with.
    const BEGINS: [u32; 2] = [1 << 30, 4545];

    fn of(program: &[u8]) -> io::Result<Huffman> {
        let begins = Huffman::BEGINS.map(u32::to_le_bytes).concat();
        let at = program.windows(begins.len()).position(|bytes| bytes == begins);
        let list = at.and_then(|at| program.get(at..at + 4 * Huffman::END));
        let list =
            list.ok_or_else(|| io::Error::other("this program has no list of frequencies"))?;
        let (counts, _) = list.as_chunks::<4>();
        let counts = counts.iter().map(|count| u64::from(u32::from_le_bytes(*count)));
        Ok(Huffman::made_of(counts.chain([1])))
    }

    fn made_of(counts: impl Iterator<Item = u64>) -> Huffman {
        let mut nodes: Vec<(u64, usize)> = counts.zip(0..).collect();
        let mut ways = Vec::new();
        // The rarest two become one, again and again; of equal ones, those that were there first stay
        // in front.
        loop {
            nodes.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
            let (Some(last), Some(other)) = (nodes.pop(), nodes.pop()) else { break };
            nodes.push((last.0 + other.0, Huffman::SYMBOLS + ways.len()));
            ways.push([last.1, other.1]);
        }
        Huffman { ways }
    }

    fn unpack(&self, bytes: &[u8]) -> Vec<u8> {
        let mut unpacked = Vec::new();
        let root = self.ways.len() - 1;
        let mut at = root;
        for bit in bytes.iter().flat_map(|byte| (0..8).map(move |n| usize::from(byte >> n & 1))) {
            let next = self.ways[at][bit];
            match next {
                Huffman::END => break,
                symbol if symbol < Huffman::END => {
                    unpacked.push(symbol as u8);
                    at = root;
                }
                node => at = node - Huffman::SYMBOLS,
            }
        }
        unpacked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        for value in [0, 1, -1, 63, 64, -64, -65, 8191, 1 << 20, i32::MAX, i32::MIN] {
            let packed = Packer(Vec::new()).int(value).0.clone();
            let mut rest = &packed[..];
            assert_eq!((int(&mut rest), rest.len()), (Some(value), 0), "{value}");
        }
        assert_eq!(int(&mut &[0x80][..]), None);
    }

    #[test]
    fn chunks_come_back() {
        let message = [7; 700];
        for number in [None, Some(0), Some(255), Some(256), Some(1023)] {
            let bytes = chunk(number, false, &message);
            assert_eq!(next_chunk(&bytes), Some((number, &message[..], &[][..])));
            assert_eq!(next_chunk(&bytes[..bytes.len() - 1]), None);
        }
    }

    /// The bits that lead to a symbol.
    fn bits(code: &Huffman, symbol: usize) -> Vec<u8> {
        let (mut found, mut at) = (Vec::new(), symbol);
        while let Some(up) = code.ways.iter().position(|ways| ways.contains(&at)) {
            found.insert(0, u8::from(code.ways[up][1] == at));
            at = Huffman::SYMBOLS + up;
        }
        found
    }

    #[test]
    fn the_code_is_unpacked_and_ends() {
        // 0 is by far the most frequent, the end the rarest.
        let code = Huffman::made_of((0..256).map(|n| 1000 - n).map(|n| n * n * n).chain([1]));
        assert!(bits(&code, 0).len() < bits(&code, Huffman::END).len());
        let text = b"what is packed\0\xff";
        let symbols = text.iter().map(|byte| usize::from(*byte)).chain([Huffman::END, 7, 7]);
        let all: Vec<u8> = symbols.flat_map(|symbol| bits(&code, symbol)).collect();
        let packed: Vec<u8> = all
            .chunks(8)
            .map(|byte| byte.iter().enumerate().map(|(n, bit)| bit << n).sum::<u8>())
            .collect();
        assert_eq!(code.unpack(&packed), text);
        assert!(code.unpack(&[]).is_empty());
    }
}
