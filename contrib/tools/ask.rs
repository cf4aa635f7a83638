//! Questions at fixed times over UDP, whatever becomes of those before: each has a number of its own,
//! so that every answer is known to be the answer to one of them.
//!
//! ```text
//! burst N   asks N questions at once
//! mark      forgets the slowest answer and the longest silence so far
//! report    {"sent":…,"unanswered":…}
//! finish    asks no more, awaits what is missing, reports
//! quit      ends without a word
//! ```

use std::io;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::{Words, common, connect, hear, ms};

#[derive(Args)]
pub struct Options {
    /// The server
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// What it speaks
    #[arg(long = "as", value_enum, default_value_t = Speech::Echo)]
    speech: Speech,
    /// How often to ask
    #[arg(long, default_value = "2ms", value_parser = common::units::duration)]
    every: Duration,
    /// How long to go on; without it until `finish`
    #[arg(long = "for", value_parser = common::units::duration, value_name = "DURATION")]
    length: Option<Duration>,
    /// An answer that takes so long is late: a resolver would have asked again
    #[arg(long, default_value = "1s", value_parser = common::units::duration)]
    late: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Speech {
    /// What comes back is to be what went
    Echo,
    /// Queries for the address of nN.lab.test
    Dns,
}

/// How long `finish` waits for an answer that is missing.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two questions nothing is looked after but stdin.
const GLANCE: Duration = Duration::from_millis(20);

impl Speech {
    fn question(self, number: u64) -> Vec<u8> {
        match self {
            Speech::Echo => {
                [number.to_be_bytes(), number.wrapping_mul(2_654_435_761).to_be_bytes()].concat()
            }
            Speech::Dns => {
                // RFC 1035: the ID, recursion desired, one question; its name, type A, class IN.
                let mut query = (number as u16).to_be_bytes().to_vec();
                query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
                for label in [&format!("n{number}"), "lab", "test"] {
                    query.push(label.len() as u8);
                    query.extend(label.as_bytes());
                }
                query.extend([0, 0, 1, 0, 1]);
                query
            }
        }
    }

    /// Which question this answers; `None` for what answers none.
    fn answered(self, answer: &[u8]) -> Option<u64> {
        let number = match self {
            Speech::Echo => u64::from_be_bytes(*answer.first_chunk()?),
            Speech::Dns => {
                let name = answer.get(13..13 + usize::from(*answer.get(12)?))?;
                str::from_utf8(name).ok()?.strip_prefix('n')?.parse().ok()?
            }
        };
        let question = self.question(number);
        let right = match self {
            Speech::Echo => answer == question,
            // An answer, without an error, to this question, with one record.
            Speech::Dns => {
                answer.len() > question.len()
                    && answer[..2] == question[..2]
                    && answer[2] & 0x80 != 0
                    && answer[3] & 0x0f == 0
                    && answer[4..8] == [0, 1, 0, 1]
                    && answer[12..question.len()] == question[12..]
            }
        };
        right.then_some(number)
    }
}

struct Asker<'a> {
    options: &'a Options,
    socket: UdpSocket,
    /// When each was asked, until it is answered.
    open: Vec<Option<Instant>>,
    answered: u64,
    late: u64,
    wrong: u64,
    twice: u64,
    refused: u64,
    last: Instant,
    slowest: Duration,
    silence: Duration,
    /// When the latest question was asked that has been answered, and the longest time that one was
    /// answered after one that had been asked later.
    newest: Option<Instant>,
    overtaken: u64,
    overtaken_by: Duration,
}

pub fn run(options: &Options) -> io::Result<()> {
    let socket = connect(&options.to)?;
    let mut asker = Asker {
        options,
        socket,
        open: Vec::new(),
        answered: 0,
        late: 0,
        wrong: 0,
        twice: 0,
        refused: 0,
        last: Instant::now(),
        slowest: Duration::ZERO,
        silence: Duration::ZERO,
        newest: None,
        overtaken: 0,
        overtaken_by: Duration::ZERO,
    };
    asker.ask();
    asker.listen(Instant::now() + PATIENCE, true);
    if asker.answered == 0 {
        return Err(io::Error::other("the server does not answer"));
    }
    println!("{}", json!({ "ready": true }));
    if asker.go_on(&Words::listen(options.length)) {
        asker.listen(Instant::now() + PATIENCE, true);
        println!("{}", asker.report());
    }
    Ok(())
}

impl Asker<'_> {
    /// Whether there is to be a report at the end.
    fn go_on(&mut self, words: &Words) -> bool {
        let mut next = Instant::now();
        loop {
            while let Some(word) = words.next() {
                match word.split_once(' ').unwrap_or((&word, "")) {
                    ("finish", _) => return true,
                    ("quit", _) => return false,
                    ("report", _) => println!("{}", self.report()),
                    ("mark", _) => {
                        (self.slowest, self.silence) = Default::default();
                        println!("{}", json!({ "mark": true }));
                    }
                    ("burst", count) => {
                        (0..count.parse().unwrap_or(0)).for_each(|_| self.ask());
                        println!("{}", json!({ "burst": self.open.len() }));
                    }
                    _ => println!("{}", json!({ "error": format!("unknown word {word:?}") })),
                }
            }
            while Instant::now() >= next {
                self.ask();
                next += self.options.every;
            }
            self.listen(next.min(Instant::now() + GLANCE), false);
        }
    }

    fn ask(&mut self) {
        let question = self.options.speech.question(self.open.len() as u64);
        self.open.push(Some(Instant::now()));
        match self.socket.send(&question) {
            // ICMP: a host without the container has answered for it, to one of those before.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                self.refused += 1;
                let _ = self.socket.send(&question);
            }
            // Not sent is not answered.
            _ => {}
        }
    }

    /// Until then; or, with `all`, until nothing is missing.
    fn listen(&mut self, until: Instant, all: bool) {
        let mut buffer = [0; 2048];
        while !all || self.unanswered() > 0 {
            match hear(&self.socket, &mut buffer, until) {
                Ok(Some(length)) => self.take(&buffer[..length]),
                Ok(None) => return,
                Err(_) => self.refused += 1,
            }
            if Instant::now() >= until {
                return;
            }
        }
    }

    fn take(&mut self, answer: &[u8]) {
        let now = Instant::now();
        self.silence = self.silence.max(now - self.last);
        self.last = now;
        let number = self.options.speech.answered(answer).and_then(|n| usize::try_from(n).ok());
        match number.and_then(|number| self.open.get_mut(number)) {
            None => self.wrong += 1,
            Some(question) => match question.take() {
                None => self.twice += 1,
                Some(asked) => {
                    self.answered += 1;
                    self.late += u64::from(now - asked > self.options.late);
                    self.slowest = self.slowest.max(now - asked);
                    self.note_order(asked);
                }
            },
        }
    }

    fn note_order(&mut self, asked: Instant) {
        match self.newest {
            Some(newest) if newest > asked => {
                self.overtaken += 1;
                self.overtaken_by = self.overtaken_by.max(newest - asked);
            }
            _ => self.newest = Some(asked),
        }
    }

    fn unanswered(&self) -> u64 {
        self.open.len() as u64 - self.answered
    }

    fn report(&self) -> Value {
        json!({
            "sent": self.open.len(), "unanswered": self.unanswered(), "late": self.late,
            "wrong": self.wrong, "twice": self.twice, "refused": self.refused,
            "overtaken": self.overtaken, "overtaken_by_ms": ms(self.overtaken_by),
            "slowest_ms": ms(self.slowest), "silence_ms": ms(self.silence.max(self.last.elapsed())),
        })
    }
}
