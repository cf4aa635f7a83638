//! Frames: a fixed header, then the payload. Little-endian.
//!
//! ```text
//! u8 kind │ u8×3 zero │ u32 payload length │ u64 xxh3 of the payload, seeded with the kind
//! ```
//!
//! Every length is checked against its kind's bound before anything is allocated, and every
//! payload against its checksum before anything is believed.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, anyhow, bail};
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use super::codec::Codec;
use crate::sys::memory::PAGE;

/// Header bytes.
pub const HEADER: usize = 16;
/// Longest control message: a plan with a large config.json and a thousand mounts is below 1 MiB.
pub const MAX_CONTROL: usize = 4 << 20;
/// Most pages in one frame.
pub const MAX_PAGES: usize = 256;
/// Most pages in one frame without contents.
pub const MAX_RUN: usize = 1 << 18;
/// Longest piece of a file in one frame.
pub const MAX_FILE_PIECE: usize = 1 << 20;
/// Longest captured network frame: a 64 KiB GSO frame with its headers.
pub const MAX_PACKET: usize = 70_000;
/// Longest file name.
pub const MAX_NAME: usize = 255;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message of the protocol, JSON.
    Control(Vec<u8>),
    /// Pages of a task's memory: number in the container, address, contents.
    Pages(i32, u64, Vec<u8>),
    /// Pages without contents, and what about them.
    Run(RunKind, PageRun),
    /// Pages whose contents are those of others that came before.
    Same(Same),
    /// A piece of an image file: name, offset, contents.
    File(String, u64, Vec<u8>),
    /// A network frame that the fence held back.
    Packet(Vec<u8>),
}

/// Neighbouring pages of a task's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageRun {
    /// The task's number in the container.
    pub vpid: i32,
    /// Address of the first page.
    pub start: u64,
    /// How many they are.
    pub pages: usize,
}

/// What about a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RunKind {
    /// They are all zero.
    Zero = ZEROS,
    /// They stay on the source until after the commit.
    Remote = REMOTE,
    /// To the source: they are wanted now.
    Want = WANT,
}

/// See [`Frame::Same`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Same {
    /// Task and address.
    pub to: (i32, u64),
    /// Task and address that they are like.
    pub from: (i32, u64),
    /// Number of them.
    pub pages: usize,
}

const CONTROL: u8 = 1;
const PAGES: u8 = 2;
const ZEROS: u8 = 3;
const FILE: u8 = 4;
const PACKET: u8 = 5;
const SAME: u8 = 6;
const REMOTE: u8 = 7;
const WANT: u8 = 8;

/// Bytes before the pages: task, codec, address, xxh3 of the pages as they were read, how many.
const PAGES_HEAD: usize = 32;

/// Writes a frame whose payload stands in two pieces, so that pages need not be copied together.
fn write(out: &mut impl Write, kind: u8, head: &[u8], body: &[u8]) -> io::Result<()> {
    let sum = if body.is_empty() {
        xxh3_64_with_seed(head, u64::from(kind))
    } else {
        let mut hasher = Xxh3::with_seed(u64::from(kind));
        hasher.update(head);
        hasher.update(body);
        hasher.digest()
    };
    let mut header = [0u8; HEADER];
    header[0] = kind;
    header[4..8].copy_from_slice(&((head.len() + body.len()) as u32).to_le_bytes());
    header[8..].copy_from_slice(&sum.to_le_bytes());
    out.write_all(&header)?;
    out.write_all(head)?;
    out.write_all(body)
}

/// Writes a control message.
pub fn write_control(out: &mut impl Write, json: &[u8]) -> io::Result<()> {
    write(out, CONTROL, json, &[])
}

/// Writes a run of at most [`MAX_PAGES`] pages, `packed` if a codec was used.
pub fn write_pages(
    out: &mut impl Write,
    vpid: i32,
    vaddr: u64,
    bytes: &[u8],
    packed: Option<(Codec, &[u8])>,
) -> io::Result<()> {
    let (codec, body) = packed.unwrap_or((Codec::None, bytes));
    let mut head = [0u8; PAGES_HEAD];
    head[..4].copy_from_slice(&vpid.to_le_bytes());
    head[4] = codec as u8;
    head[8..16].copy_from_slice(&vaddr.to_le_bytes());
    if packed.is_some() {
        // What is not packed is covered by the frame's own checksum.
        head[16..24].copy_from_slice(&xxh3_64(bytes).to_le_bytes());
    }
    head[24..].copy_from_slice(&((bytes.len() / PAGE) as u64).to_le_bytes());
    write(out, PAGES, &head, body)
}

/// Writes a run of pages without contents.
pub fn write_run(out: &mut impl Write, what: RunKind, run: PageRun) -> io::Result<()> {
    let PageRun { vpid, start: mut vaddr, mut pages } = run;
    while pages > 0 {
        let some = pages.min(MAX_RUN);
        let mut head = [0u8; 24];
        head[..4].copy_from_slice(&vpid.to_le_bytes());
        head[8..16].copy_from_slice(&vaddr.to_le_bytes());
        head[16..].copy_from_slice(&(some as u64).to_le_bytes());
        write(out, what as u8, &head, &[])?;
        vaddr += (some * PAGE) as u64;
        pages -= some;
    }
    Ok(())
}

/// Writes a run of pages that are like others.
pub fn write_same(out: &mut impl Write, same: Same) -> io::Result<()> {
    let mut head = [0u8; 32];
    head[..4].copy_from_slice(&same.to.0.to_le_bytes());
    head[4..8].copy_from_slice(&same.from.0.to_le_bytes());
    head[8..16].copy_from_slice(&same.to.1.to_le_bytes());
    head[16..24].copy_from_slice(&same.from.1.to_le_bytes());
    head[24..].copy_from_slice(&(same.pages as u64).to_le_bytes());
    write(out, SAME, &head, &[])
}

/// Writes a piece of an image file.
pub fn write_file(out: &mut impl Write, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut head = Vec::with_capacity(12 + name.len());
    head.extend((name.len() as u32).to_le_bytes());
    head.extend(offset.to_le_bytes());
    head.extend(name.as_bytes());
    write(out, FILE, &head, bytes)
}

/// Writes a captured network frame.
pub fn write_packet(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    write(out, PACKET, bytes, &[])
}

/// Reads one frame; `None` at the end of the stream, which may come only between frames.
///
/// # Errors
/// When the stream is cut inside a frame, a length is over its bound, or the checksum is wrong.
pub fn read(input: &mut impl Read) -> Result<Option<Frame>> {
    let mut header = [0u8; HEADER];
    let mut got = 0;
    while got < HEADER {
        match input.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => bail!(CUT),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("reading from the link"),
        }
    }

    let kind = header[0];
    let length = u32::from_le_bytes(header[4..8].try_into().expect("four bytes")) as usize;
    let sum = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
    let most = match kind {
        CONTROL => MAX_CONTROL,
        PAGES => PAGES_HEAD + MAX_PAGES * PAGE,
        ZEROS | REMOTE | WANT => 24,
        SAME => 32,
        FILE => 12 + MAX_NAME + MAX_FILE_PIECE,
        PACKET => MAX_PACKET,
        _ => bail!("what came is not Ferry's protocol (frame kind {kind})"),
    };

    if header[1..4] != [0; 3] || length > most {
        bail!("a frame of kind {kind} with {length} bytes, more than the {most} allowed");
    }

    // Pages come by themselves: nothing is to be moved behind what stands before them.
    let mut head = [0; PAGES_HEAD];
    let head = match kind {
        PAGES if length >= PAGES_HEAD => &mut head[..],
        _ => &mut [],
    };

    input.read_exact(head).context(CUT)?;
    let mut payload = Vec::with_capacity(length - head.len());

    // Bytes are not set to zero only to be written over.
    input.by_ref().take((length - head.len()) as u64).read_to_end(&mut payload).context(CUT)?;
    if head.len() + payload.len() < length {
        bail!(CUT);
    }

    let found = if head.is_empty() {
        xxh3_64_with_seed(&payload, u64::from(kind))
    } else {
        let mut hasher = Xxh3::with_seed(u64::from(kind));
        hasher.update(head);
        hasher.update(&payload);
        hasher.digest()
    };

    if found != sum {
        bail!("a frame of kind {kind} arrived damaged");
    }

    if kind == PAGES { decode_pages(head, payload) } else { decode(kind, payload) }.map(Some)
}

const CUT: &str = "the link was cut inside a frame";

fn decode_pages(head: &[u8], mut payload: Vec<u8>) -> Result<Frame> {
    let word = |at: usize| -> Result<u64> {
        let bytes = head.get(at..at + 8).ok_or_else(|| anyhow!("pages without a head"))?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    };
    let (vpid, vaddr, sum) = (word(0)? as i32, word(8)?, word(16)?);
    let pages = usize::try_from(word(24)?)?;
    let codec = Codec::from_wire(head[4])?;
    if pages == 0 || pages > MAX_PAGES {
        bail!("a frame with {pages} pages");
    }
    if codec != Codec::None {
        payload = codec.unpack(&payload, pages * PAGE)?;
        if xxh3_64(&payload) != sum {
            bail!("memory that unpacks to something else");
        }
    }
    if payload.len() != pages * PAGE {
        bail!("a frame with pages in part");
    }
    Ok(Frame::Pages(vpid, vaddr, payload))
}

fn decode(kind: u8, mut payload: Vec<u8>) -> Result<Frame> {
    let short = || anyhow!("a frame of kind {kind} is too short");
    let word = |at: usize| -> Result<u64> {
        let bytes = payload.get(at..at + 8).ok_or_else(short)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    };

    Ok(match kind {
        CONTROL => Frame::Control(payload),
        ZEROS | REMOTE | WANT => {
            let what = match kind {
                ZEROS => RunKind::Zero,
                REMOTE => RunKind::Remote,
                _ => RunKind::Want,
            };
            let pages = run_length(word(16)?)?;
            Frame::Run(what, PageRun { vpid: word(0)? as i32, start: word(8)?, pages })
        }
        SAME => {
            let tasks = word(0)?;
            Frame::Same(Same {
                to: (tasks as i32, word(8)?),
                from: ((tasks >> 32) as i32, word(16)?),
                pages: run_length(word(24)?)?,
            })
        }
        FILE => {
            let name_length = word(0)? as u32 as usize;
            let offset_bytes = payload.get(4..12).ok_or_else(short)?;
            let offset = u64::from_le_bytes(offset_bytes.try_into().expect("eight bytes"));
            if name_length > MAX_NAME {
                bail!("a file name of {name_length} bytes");
            }

            let name = payload.get(12..12 + name_length).ok_or_else(short)?;
            let name = String::from_utf8(name.to_vec()).context("a file name")?;
            payload.drain(..12 + name_length);
            Frame::File(name, offset, payload)
        }
        PACKET => Frame::Packet(payload),
        _ => bail!("frame kind {kind}"),
    })
}

fn run_length(pages: u64) -> Result<usize> {
    let pages = usize::try_from(pages)?;
    if pages > MAX_RUN {
        bail!("a run of {pages} pages");
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Random, Target};

    fn sample() -> Vec<u8> {
        let mut out = Vec::new();
        write_control(&mut out, b"{\"a\":1}").unwrap();
        write_pages(&mut out, 7, 0x1000, &vec![9; 200 * PAGE], None).unwrap();
        write_run(&mut out, RunKind::Zero, run(7, 0x9000, 5)).unwrap();
        write_run(&mut out, RunKind::Want, run(-7, 0x9000, MAX_RUN + 1)).unwrap();
        write_same(&mut out, SAME_RUN).unwrap();
        let (bytes, mut packed) = (vec![3; 16 * PAGE], Vec::new());
        Codec::Lz4.pack(&bytes, &mut packed).unwrap();
        write_pages(&mut out, 7, 0x5000, &bytes, Some((Codec::Lz4, &packed))).unwrap();
        write_file(&mut out, "core-1.img", 12, b"xyz").unwrap();
        write_packet(&mut out, b"frame").unwrap();
        out
    }

    const SAME_RUN: Same = Same { to: (3, 0x1000), from: (-4, 0x7f_0000_0000), pages: 2 };

    fn read_all(mut bytes: &[u8]) -> Result<Vec<Frame>> {
        let mut all = Vec::new();
        while let Some(frame) = read(&mut bytes)? {
            all.push(frame);
        }
        Ok(all)
    }

    fn run(vpid: i32, start: u64, pages: usize) -> PageRun {
        PageRun { vpid, start, pages }
    }

    #[test]
    fn what_is_written_is_read() {
        let all = read_all(&sample()).unwrap();
        assert_eq!(all.len(), 9);
        assert_eq!(all[0], Frame::Control(b"{\"a\":1}".to_vec()));
        assert_eq!(all[1], Frame::Pages(7, 0x1000, vec![9; 200 * PAGE]));
        assert_eq!(all[2], Frame::Run(RunKind::Zero, run(7, 0x9000, 5)));
        assert_eq!(all[3], Frame::Run(RunKind::Want, run(-7, 0x9000, MAX_RUN)));
        assert_eq!(all[4], Frame::Run(RunKind::Want, run(-7, 0x9000 + (MAX_RUN * PAGE) as u64, 1)));
        assert_eq!(all[5], Frame::Same(SAME_RUN));
        assert_eq!(all[6], Frame::Pages(7, 0x5000, vec![3; 16 * PAGE]));
        assert_eq!(all[7], Frame::File("core-1.img".into(), 12, b"xyz".to_vec()));
    }

    #[test]
    fn every_cut_inside_a_frame_is_an_error() {
        let mut whole = Vec::new();
        write_control(&mut whole, b"{\"a\":1}").unwrap();
        write_file(&mut whole, "core-1.img", 12, b"xyz").unwrap();
        let boundary = HEADER + 7;
        for length in 0..whole.len() {
            let result = read_all(&whole[..length]);
            assert_eq!(result.is_ok(), length == 0 || length == boundary, "cut at {length}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut whole = Vec::new();
        write_run(&mut whole, RunKind::Zero, run(7, 0x9000, 5)).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut bad = whole.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_over_the_bound_allocate_nothing() {
        let mut header = [0u8; HEADER];
        header[0] = CONTROL;
        header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(read(&mut header.as_slice()).unwrap_err().to_string().contains("allowed"));
    }

    /// Frames whose checksums are right, as a hostile peer's are.
    #[test]
    fn fuzz_frames() {
        let seal = |bytes: &mut Vec<u8>, _: &mut Random| {
            let mut at = 0;
            while let Some(header) = bytes.get(at..at + HEADER) {
                let length = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
                let end = (at + HEADER).saturating_add(length).min(bytes.len());
                let kind = header[0];
                let sum = xxh3_64_with_seed(&bytes[at + HEADER..end], u64::from(kind));
                let length = (end - at - HEADER) as u32;
                bytes[at + 1..at + 4].fill(0);
                bytes[at + 4..at + 8].copy_from_slice(&length.to_le_bytes());
                bytes[at + 8..at + HEADER].copy_from_slice(&sum.to_le_bytes());
                at = end;
            }
        };

        let (zeros, mut zstd) = (vec![0; 2 * PAGE], Vec::new());
        let mut packed = Vec::new();
        Codec::Zstd.pack(&zeros, &mut zstd).unwrap();
        write_pages(&mut packed, 1, 0x1000, &zeros, Some((Codec::Zstd, &zstd))).unwrap();
        let (mut small, mut lz4) = (Vec::new(), Vec::new());
        Codec::Lz4.pack(&zeros, &mut lz4).unwrap();
        write_pages(&mut small, 1, 0x1000, &zeros, Some((Codec::Lz4, &lz4))).unwrap();
        write_pages(&mut small, 1, 0x1000, &zeros[..PAGE], None).unwrap();
        write_control(&mut small, b"{}").unwrap();

        write_run(&mut small, RunKind::Remote, run(7, 0x9000, 5)).unwrap();
        write_same(&mut small, SAME_RUN).unwrap();
        write_file(&mut small, "core-1.img", 12, b"xyz").unwrap();
        write_packet(&mut small, b"frame").unwrap();

        // The longest message, or the longest run of pages packed and unpacked.
        let target = Target::new("frames").room(MAX_CONTROL + (1 << 20));
        target.sample(small).sample(packed).repair(seal).run(|bytes| read_all(bytes).map(drop));
    }
}
