//! One probing connection: asks by its timetable, checks every answer.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;

use crate::common::pages::{Content, Page};
use crate::common::wire::{ANSWER, Answer, Count, Op, Request};
use crate::record::{Answered, Nanos, Track};

/// What all connections together know about the server.
#[derive(Default)]
pub struct Knowledge {
    /// Seed, content and number of pages, as the first answer said.
    formula: Option<(u64, u64, u64)>,
    /// For each page, the server's count at the newest sight of it, and the generation then.
    seen: HashMap<u64, (u64, u64)>,
}

/// A connection and its timetable.
pub struct Link {
    /// What was seen on it.
    pub track: Track,
    stream: TcpStream,
    number: u64,
    every: Nanos,
    /// The next appointment.
    slot: Nanos,
    /// The sequence number of the last question.
    sequence: u64,
    /// When it was asked, while the answer is outstanding.
    asked: Option<Nanos>,
    /// Bytes of a question that the socket would not take yet.
    unsent: Vec<u8>,
    frame: [u8; ANSWER],
    received: usize,
    last_of_connection: u64,
    last_of_server: u64,
}

impl Link {
    /// Takes over a connected stream; the first question is due at `slot`.
    pub fn new(
        stream: TcpStream,
        number: u64,
        (opened, slot, every): (Nanos, Nanos, Nanos),
    ) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            track: Track::new(opened),
            stream,
            number,
            every,
            slot,
            sequence: 0,
            asked: None,
            unsent: Vec::new(),
            frame: [0; ANSWER],
            received: 0,
            last_of_connection: 0,
            last_of_server: 0,
        })
    }

    /// For epoll.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether it is still in use.
    pub fn is_alive(&self) -> bool {
        self.track.lost.is_none()
    }

    /// When to ask next, unless an answer is outstanding.
    pub fn due(&self) -> Option<Nanos> {
        (self.is_alive() && self.asked.is_none()).then_some(self.slot)
    }

    /// Asks, and makes the next appointment: the first of the timetable after `now`.
    pub fn ask(&mut self, now: Nanos) {
        self.sequence += 1;
        let request = Request { op: Op::Count, connection: self.number, sequence: self.sequence };
        self.unsent.extend_from_slice(&request.encode());
        self.asked = Some(now);
        // Appointments missed while an answer was late are dropped, not made up for.
        self.slot += (now.saturating_sub(self.slot) / self.every + 1) * self.every;
        self.push(now);
    }

    /// Sends what is still unsent. One small question always fits into a live socket, so that no
    /// EPOLLOUT is awaited: `receive` tries again whenever anything happens.
    fn push(&mut self, now: Nanos) {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(written) => drop(self.unsent.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.lose(now, format!("sending: {error}")),
            }
        }
    }

    /// Takes in what has arrived.
    pub fn receive(&mut self, now: Nanos, knowledge: &mut Knowledge) {
        self.push(now);
        while self.is_alive() {
            match self.stream.read(&mut self.frame[self.received..]) {
                Ok(0) => self.lose(now, "closed by the server (FIN)".to_owned()),
                Ok(length) => {
                    self.received += length;
                    if self.received == ANSWER {
                        self.received = 0;
                        self.take(now, knowledge);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.lose(now, cause(&error)),
            }
        }
    }

    /// Gives up a connection whose answer is overdue.
    pub fn give_up_after(&mut self, limit: Nanos, now: Nanos) {
        if let Some(asked) = self.asked
            && now.saturating_sub(asked) > limit
            && self.is_alive()
        {
            self.lose(now, format!("no answer for {} s", limit / 1_000_000_000));
        }
    }

    fn lose(&mut self, now: Nanos, cause: String) {
        self.track.lost = Some((now, cause));
        // Closed at the end of the program: a FIN now would show in the server's state.
    }

    fn take(&mut self, now: Nanos, knowledge: &mut Knowledge) {
        // Checked after the time was taken, so that checking costs no precision.
        if let Err(why) = self.check(knowledge) {
            let (number, sequence) = (self.number, self.sequence);
            self.track.wrong.push((now, format!("connection {number} request {sequence}: {why}")));
        }
        if let Some(asked) = self.asked.take() {
            self.track.answers.push(Answered { at: now, latency: now - asked });
        }
    }

    fn check(&mut self, knowledge: &mut Knowledge) -> Result<(), String> {
        let answer = Answer::decode(&self.frame).ok_or("not an answer")?;
        expect("op", answer.to.op as u64, Op::Count as u64)?;
        expect("connection", answer.to.connection, self.number)?;
        expect("sequence", answer.to.sequence, self.sequence)?;
        if self.asked.is_none() {
            return Err("an answer that nobody asked for".to_owned());
        }
        let count = Count::from_body(answer.body);
        // Take over what was said before judging it, or one fault would be reported for ever.
        let before = std::mem::replace(&mut self.last_of_connection, count.of_connection);
        let server_before = std::mem::replace(&mut self.last_of_server, count.of_server);
        expect("count of the connection", count.of_connection, before + 1)?;
        if count.of_server <= server_before {
            let now = count.of_server;
            return Err(format!("the server's count went from {server_before} to {now}"));
        }
        knowledge.check(&count)
    }
}

impl Knowledge {
    fn check(&mut self, count: &Count) -> Result<(), String> {
        let formula = (count.seed, count.content, count.pages);
        let known = *self.formula.get_or_insert(formula);
        if formula != known {
            return Err(format!("seed, content, pages were {known:?} and are {formula:?}"));
        }
        let content = Content::from_code(count.content).ok_or("unknown content")?;
        if count.page >= count.pages {
            return Err(format!("page {} of {}", count.page, count.pages));
        }
        // Answers of different connections may be read in another order than they were given:
        // only a later count may not show an earlier generation.
        let newest = self.seen.entry(count.page).or_insert((0, 0));
        let before = *newest;
        if count.of_server > before.0 {
            *newest = (count.of_server, count.generation);
            if count.generation < before.1 {
                let (page, generation, old) = (count.page, count.generation, before.1);
                return Err(format!("page {page} went from generation {old} to {generation}"));
            }
        }
        let page = Page::expected(content, count.seed, count.page, count.generation);
        if page.hash() != count.hash {
            let Count { page, generation, .. } = count;
            return Err(format!("page {page} is not what generation {generation} must hold"));
        }
        Ok(())
    }
}

fn expect(what: &str, got: u64, want: u64) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("{what} is {got}, not {want}")) }
}

fn cause(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionReset => "reset by the server (RST)".to_owned(),
        io::ErrorKind::TimedOut => "timed out in the kernel".to_owned(),
        _ => error.to_string(),
    }
}
