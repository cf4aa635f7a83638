//! What `crowd-server` and `ferry-crowd` must agree about: ports, the first bytes of a connection,
//! and what every byte after them has to be.

/// Connections of all kinds; each begins with a [`Plan`].
pub const PORT: u16 = 7100;
/// The test's own connection: `release` and `report` as lines.
pub const CONTROL: u16 = 7101;
/// Short visits: eight bytes in, [`VISIT`] bytes out, closed by the server at once.
pub const DOOR: u16 = 7102;
/// Bytes that a short visit gets.
pub const VISIT: u64 = 20_000;
/// What either side still sends when the server has been released.
pub const REST: u64 = 50_000;
/// Length of a [`Plan`] on the wire.
pub const PLAN: usize = 16;
/// Stands for as many bytes as the socket takes.
pub const FILL: u32 = u32::MAX;

/// What one side does before the release.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Bytes that it sends.
    pub send: u32,
    /// Whether it says that it sends no more.
    pub shut: bool,
    /// Whether it reads.
    pub read: bool,
    /// Whether it sends back what it reads, and nothing else.
    pub echo: bool,
}

/// The first bytes of a connection: its number, and the server's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub number: u64,
    pub server: Part,
}

impl Plan {
    pub fn encode(&self) -> [u8; PLAN] {
        let Part { send, shut, read, echo } = self.server;
        let flags = u32::from(shut) | u32::from(read) << 1 | u32::from(echo) << 2;
        let mut bytes = [0; PLAN];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..12].copy_from_slice(&send.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; PLAN]) -> Self {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let number = u64::from(word(0)) | u64::from(word(4)) << 32;
        let has = |bit: u32| word(12) >> bit & 1 == 1;
        let server = Part { send: word(8), shut: has(0), read: has(1), echo: has(2) };
        Self { number, server }
    }
}

/// A stream of bytes that a formula foretells.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    seed: u64,
    /// Bytes so far.
    pub at: u64,
    /// How many of those that came were not the foretold ones.
    pub bad: u64,
}

impl Stream {
    /// What the server (or else the client) sends on a connection.
    pub fn new(number: u64, from_server: bool) -> Self {
        Self { seed: number << 1 | u64::from(from_server), at: 0, bad: 0 }
    }

    fn byte(&self, at: u64) -> u8 {
        let mut x = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at >> 3);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)).to_le_bytes()[(at & 7) as usize]
    }

    /// The next bytes to be sent; [`Stream::at`] does not move.
    pub fn next(&self, count: usize) -> Vec<u8> {
        (0..count as u64).map(|i| self.byte(self.at + i)).collect()
    }

    /// Takes in bytes that came.
    pub fn check(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.bad += u64::from(*byte != self.byte(self.at));
            self.at += 1;
        }
    }
}
