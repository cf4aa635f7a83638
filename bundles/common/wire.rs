//! The counter's protocol: fixed frames of little-endian `u64`s over TCP.
//!
//! A request is `{op, connection, sequence}`; an answer repeats these three and
//! adds eight words whose meaning depends on the op: [`Count`], [`Verdict`] or
//! [`Stats`]. Fixed sizes keep the client's clock honest: one read, one answer.

/// Bytes of a request.
pub const REQUEST: usize = 3 * 8;
/// Bytes of an answer.
pub const ANSWER: usize = 11 * 8;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The next count of this connection, and the checksum of some page.
    Count,
    /// Check all memory.
    Verify,
    /// How the server is set up and what it has done.
    Stats,
}

impl Op {
    // Readable in a packet dump.
    const ALL: [(Self, u64); 3] = [
        (Self::Count, u64::from_le_bytes(*b"FERcount")),
        (Self::Verify, u64::from_le_bytes(*b"FERvrify")),
        (Self::Stats, u64::from_le_bytes(*b"FERstats")),
    ];

    fn code(self) -> u64 {
        Self::ALL[self as usize].1
    }

    fn from_code(code: u64) -> Option<Self> {
        Self::ALL.iter().find(|(_, c)| *c == code).map(|(op, _)| *op)
    }
}

/// A frame from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub op: Op,
    /// The client's number for this connection; only repeated.
    pub connection: u64,
    /// The client's number for this request; only repeated.
    pub sequence: u64,
}

impl Request {
    pub fn encode(&self) -> [u8; REQUEST] {
        words([self.op.code(), self.connection, self.sequence])
    }

    /// `None` if this is no request of ours.
    pub fn decode(frame: &[u8; REQUEST]) -> Option<Self> {
        let [op, connection, sequence] = numbers(frame);
        Some(Self { op: Op::from_code(op)?, connection, sequence })
    }
}

/// A frame from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request it answers.
    pub to: Request,
    /// See [`Count`], [`Verdict`], [`Stats`].
    pub body: [u64; 8],
}

impl Answer {
    pub fn encode(&self) -> [u8; ANSWER] {
        let Request { op, connection, sequence } = self.to;
        let [a, b, c, d, e, f, g, h] = self.body;
        words([op.code(), connection, sequence, a, b, c, d, e, f, g, h])
    }

    /// `None` if this is no answer of ours.
    pub fn decode(frame: &[u8; ANSWER]) -> Option<Self> {
        let [op, connection, sequence, body @ ..] = numbers::<ANSWER, 11>(frame);
        Some(Self { to: Request { op: Op::from_code(op)?, connection, sequence }, body })
    }
}

/// The body of an answer to [`Op::Count`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// How many counts this connection has had, this one included.
    pub of_connection: u64,
    /// How many counts the server has given in all.
    pub of_server: u64,
    /// A page of the server's memory …
    pub page: u64,
    /// … its generation …
    pub generation: u64,
    /// … and the checksum of what the page holds at this moment.
    pub hash: u64,
    /// What the client needs for the formula: seed, content, and the number of pages.
    pub seed: u64,
    pub content: u64,
    pub pages: u64,
}

impl Count {
    pub fn body(&self) -> [u64; 8] {
        let Self { of_connection, of_server, page, generation, hash, seed, content, pages } = *self;
        [of_connection, of_server, page, generation, hash, seed, content, pages]
    }

    pub fn from_body(body: [u64; 8]) -> Self {
        let [of_connection, of_server, page, generation, hash, seed, content, pages] = body;
        Self { of_connection, of_server, page, generation, hash, seed, content, pages }
    }
}

/// The body of an answer to [`Op::Verify`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verdict {
    /// How many pages were looked at.
    pub pages: u64,
    /// How many of them are not what the formula says.
    pub bad_pages: u64,
    /// 0 if the table of generations adds up, 1 if not.
    pub bad_table: u64,
    /// Wrong pages that the extra threads saw in their own memory, ever.
    pub bad_in_threads: u64,
    /// Where the thread with files found the first wrong thing: the line of `counter/files.rs`, or 0
    /// and the error's number.
    pub files_line: u64,
    pub files_errno: u64,
}

impl Verdict {
    pub fn body(&self) -> [u64; 8] {
        let Self { pages, bad_pages, bad_table, bad_in_threads, files_line, files_errno } = *self;
        [pages, bad_pages, bad_table, bad_in_threads, files_line, files_errno, 0, 0]
    }

    pub fn from_body(body: [u64; 8]) -> Self {
        let [pages, bad_pages, bad_table, bad_in_threads, files_line, files_errno, ..] = body;
        Self { pages, bad_pages, bad_table, bad_in_threads, files_line, files_errno }
    }
}

/// The body of an answer to [`Op::Stats`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    pub pages: u64,
    pub seed: u64,
    /// Counts given since the start.
    pub counts: u64,
    /// Pages rewritten since the start.
    pub rewrites: u64,
    /// Connections open now, and accepted since the start.
    pub connections: u64,
    pub accepted: u64,
    /// Extra threads, and how often they came round.
    pub threads: u64,
    pub beats: u64,
}

impl Stats {
    pub fn body(&self) -> [u64; 8] {
        let Self { pages, seed, counts, rewrites, connections, accepted, threads, beats } = *self;
        [pages, seed, counts, rewrites, connections, accepted, threads, beats]
    }

    pub fn from_body(body: [u64; 8]) -> Self {
        let [pages, seed, counts, rewrites, connections, accepted, threads, beats] = body;
        Self { pages, seed, counts, rewrites, connections, accepted, threads, beats }
    }
}

fn words<const N: usize, const B: usize>(numbers: [u64; N]) -> [u8; B] {
    const { assert!(N * 8 == B) }
    let mut frame = [0; B];
    for (to, number) in frame.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
        *to = number.to_le_bytes();
    }
    frame
}

fn numbers<const B: usize, const N: usize>(frame: &[u8; B]) -> [u64; N] {
    const { assert!(N * 8 == B) }
    let mut chunks = frame.as_chunks::<8>().0.iter();
    std::array::from_fn(|_| u64::from_le_bytes(*chunks.next().expect("as many as asserted")))
}
