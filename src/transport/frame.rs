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
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::sys::memory::PAGE;

/// Header bytes.
pub const HEADER: usize = 16;
/// Longest control message: a plan with a large config.json and a thousand mounts is below 1 MiB.
pub const MAX_CONTROL: usize = 4 << 20;
/// Most pages in one frame.
pub const MAX_PAGES: usize = 256;
/// Most zero pages in one frame.
pub const MAX_ZEROS: usize = 1 << 18;
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
    /// Zero pages: number in the container, address, how many.
    Zeros(i32, u64, usize),
    /// A piece of an image file: name, offset, contents.
    File(String, u64, Vec<u8>),
    /// A network frame that the fence held back.
    Packet(Vec<u8>),
}

const CONTROL: u8 = 1;
const PAGES: u8 = 2;
const ZEROS: u8 = 3;
const FILE: u8 = 4;
const PACKET: u8 = 5;

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

/// Writes a run of pages, in as many frames as it takes.
pub fn write_pages(out: &mut impl Write, vpid: i32, vaddr: u64, bytes: &[u8]) -> io::Result<()> {
    for (i, piece) in bytes.chunks(MAX_PAGES * PAGE).enumerate() {
        let mut head = [0u8; 16];
        head[..4].copy_from_slice(&vpid.to_le_bytes());
        head[8..].copy_from_slice(&(vaddr + (i * MAX_PAGES * PAGE) as u64).to_le_bytes());
        write(out, PAGES, &head, piece)?;
    }
    Ok(())
}

/// Writes a run of zero pages.
pub fn write_zeros(
    out: &mut impl Write,
    vpid: i32,
    mut vaddr: u64,
    mut pages: usize,
) -> io::Result<()> {
    while pages > 0 {
        let some = pages.min(MAX_ZEROS);
        let mut head = [0u8; 24];
        head[..4].copy_from_slice(&vpid.to_le_bytes());
        head[8..16].copy_from_slice(&vaddr.to_le_bytes());
        head[16..].copy_from_slice(&(some as u64).to_le_bytes());
        write(out, ZEROS, &head, &[])?;
        vaddr += (some * PAGE) as u64;
        pages -= some;
    }
    Ok(())
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
            Ok(0) => bail!("the link was cut inside a frame"),
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
        PAGES => 16 + MAX_PAGES * PAGE,
        ZEROS => 24,
        FILE => 12 + MAX_NAME + MAX_FILE_PIECE,
        PACKET => MAX_PACKET,
        _ => bail!("what came is not Ferry's protocol (frame kind {kind})"),
    };
    if header[1..4] != [0; 3] || length > most {
        bail!("a frame of kind {kind} with {length} bytes, more than the {most} allowed");
    }
    let mut payload = vec![0; length];
    input.read_exact(&mut payload).context("the link was cut inside a frame")?;
    if xxh3_64_with_seed(&payload, u64::from(kind)) != sum {
        bail!("a frame of kind {kind} arrived damaged");
    }
    decode(kind, payload).map(Some)
}

fn decode(kind: u8, mut payload: Vec<u8>) -> Result<Frame> {
    let short = || anyhow!("a frame of kind {kind} is too short");
    let word = |at: usize| -> Result<u64> {
        let bytes = payload.get(at..at + 8).ok_or_else(short)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    };
    Ok(match kind {
        CONTROL => Frame::Control(payload),
        PAGES => {
            let (vpid, vaddr) = (word(0)? as i32, word(8)?);
            payload.drain(..16);
            if payload.is_empty() || !payload.len().is_multiple_of(PAGE) {
                bail!("a frame with pages in part");
            }
            Frame::Pages(vpid, vaddr, payload)
        }
        ZEROS => {
            let pages = usize::try_from(word(16)?)?;
            if pages > MAX_ZEROS {
                bail!("a frame with {pages} zero pages");
            }
            Frame::Zeros(word(0)? as i32, word(8)?, pages)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut out = Vec::new();
        write_control(&mut out, b"{\"a\":1}").unwrap();
        write_pages(&mut out, 7, 0x1000, &vec![9; 300 * PAGE]).unwrap();
        write_zeros(&mut out, 7, 0x9000, 5).unwrap();
        write_file(&mut out, "core-1.img", 12, b"xyz").unwrap();
        write_packet(&mut out, b"frame").unwrap();
        out
    }

    fn read_all(mut bytes: &[u8]) -> Result<Vec<Frame>> {
        let mut all = Vec::new();
        while let Some(frame) = read(&mut bytes)? {
            all.push(frame);
        }
        Ok(all)
    }

    #[test]
    fn what_is_written_is_read() {
        let all = read_all(&sample()).unwrap();
        assert_eq!(all.len(), 6);
        assert_eq!(all[0], Frame::Control(b"{\"a\":1}".to_vec()));
        let Frame::Pages(7, at, bytes) = &all[2] else { panic!("{:?}", all[2]) };
        assert_eq!((*at, bytes.len()), (0x1000 + 256 * PAGE as u64, 44 * PAGE));
        assert_eq!(all[3], Frame::Zeros(7, 0x9000, 5));
        assert_eq!(all[4], Frame::File("core-1.img".into(), 12, b"xyz".to_vec()));
        assert_eq!(all[5], Frame::Packet(b"frame".to_vec()));
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
        write_zeros(&mut whole, 7, 0x9000, 5).unwrap();
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
}
