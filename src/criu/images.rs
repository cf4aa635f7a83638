//! The image files that Ferry reads: which pages of which task CRIU left to us.
//!
//! `pagemap-<pid>.img`: u32 LE magics `0x54564319`, `0x56084025`, then records of a u32 length and
//! a protobuf message; first `pagemap_head {1: pages_id}`, then `pagemap_entry {1: vaddr,
//! 2: compat_nr_pages, 4: flags, 5: nr_pages}`; CRIU 4.1 and older count in field 2.
//! Source: CRIU images/pagemap.proto, criu/include/magic.h.

use anyhow::{Result, anyhow, bail};
use protobuf::CodedInputStream;

/// Pages of the entry lie in the pages image.
pub const PE_PRESENT: u32 = 1 << 2;
/// Pages of the entry were left to us.
pub const PE_LAZY: u32 = 1 << 1;

const MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];
/// A pagemap with more entries than this is refused: 16 million separate runs of pages.
const MAX_ENTRIES: usize = 1 << 24;

/// A run of pages in a task's pagemap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapEntry {
    /// Address of the first.
    pub vaddr: u64,
    /// How many.
    pub pages: u64,
    /// `PE_*`.
    pub flags: u32,
}

/// Reads a pagemap image: the id of its pages image, and its entries.
///
/// # Errors
/// When it is not one, or cut short.
pub fn parse_pagemap(bytes: &[u8]) -> Result<(u32, Vec<PagemapEntry>)> {
    let mut rest = bytes;
    for magic in MAGIC {
        if take_u32(&mut rest)? != magic {
            bail!("not a pagemap image");
        }
    }
    let head = take_record(&mut rest)?;
    let pages_id = fields(head)?
        .iter()
        .find(|f| f.0 == 1)
        .map(|f| f.1 as u32)
        .ok_or_else(|| anyhow!("a pagemap without a pages id"))?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (mut vaddr, mut compat, mut pages, mut flags) = (None, 0, 0, None);
        let mut in_parent = false;
        for (number, value) in fields(take_record(&mut rest)?)? {
            match number {
                1 => vaddr = Some(value),
                2 => compat = value,
                3 => in_parent = value != 0,
                4 => flags = Some(value as u32),
                5 => pages = value,
                _ => {}
            }
        }
        if in_parent {
            bail!("a pagemap that leans on a parent image, which Ferry never asks for");
        }
        entries.push(PagemapEntry {
            vaddr: vaddr.ok_or_else(|| anyhow!("a pagemap entry without an address"))?,
            pages: if pages > 0 { pages } else { compat },
            flags: flags.unwrap_or(PE_PRESENT),
        });
        if entries.len() > MAX_ENTRIES {
            bail!("a pagemap with too many entries");
        }
    }
    Ok((pages_id, entries))
}

fn take_u32(rest: &mut &[u8]) -> Result<u32> {
    let (head, tail) =
        rest.split_first_chunk::<4>().ok_or_else(|| anyhow!("an image file cut short"))?;
    *rest = tail;
    Ok(u32::from_le_bytes(*head))
}

fn take_record<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = take_u32(rest)? as usize;
    if length > rest.len() {
        bail!("an image file cut short");
    }
    let (record, tail) = rest.split_at(length);
    *rest = tail;
    Ok(record)
}

/// The varint fields of a small message; others are skipped.
fn fields(record: &[u8]) -> Result<Vec<(u32, u64)>> {
    let mut input = CodedInputStream::from_bytes(record);
    let mut found = Vec::with_capacity(5);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let (number, wire) = (tag >> 3, tag & 7);
        if wire == 0 {
            found.push((number, input.read_raw_varint64()?));
        } else {
            input.skip_field(
                protobuf::rt::WireType::new(wire).ok_or_else(|| anyhow!("bad wire type"))?,
            )?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::CodedOutputStream;

    fn image(entries: &[(u64, u64, u32)], modern: bool) -> Vec<u8> {
        fn record(out: &mut Vec<u8>, write: impl FnOnce(&mut CodedOutputStream)) {
            let mut body = Vec::new();
            let mut stream = CodedOutputStream::vec(&mut body);
            write(&mut stream);
            stream.flush().unwrap();
            drop(stream);
            out.extend((body.len() as u32).to_le_bytes());
            out.extend(body);
        }
        let mut out = Vec::new();
        out.extend(MAGIC[0].to_le_bytes());
        out.extend(MAGIC[1].to_le_bytes());
        record(&mut out, |s| s.write_uint32(1, 9).unwrap());
        for &(vaddr, pages, flags) in entries {
            record(&mut out, |s| {
                s.write_uint64(1, vaddr).unwrap();
                s.write_uint32(2, if modern { 0 } else { pages as u32 }).unwrap();
                s.write_uint32(4, flags).unwrap();
                if modern {
                    s.write_uint64(5, pages).unwrap();
                }
            });
        }
        out
    }

    #[test]
    fn both_generations_of_pagemaps_are_read() {
        let list = [(0x1000, 3, PE_LAZY), (0x9000, 1, PE_PRESENT)];
        for modern in [true, false] {
            let (id, entries) = parse_pagemap(&image(&list, modern)).unwrap();
            assert_eq!(id, 9);
            assert_eq!(entries[0], PagemapEntry { vaddr: 0x1000, pages: 3, flags: PE_LAZY });
            assert_eq!(entries[1].pages, 1);
        }
    }

    #[test]
    fn a_pagemap_cut_anywhere_is_an_error_or_shorter_never_a_panic() {
        let whole = image(&[(0x1000, 3, PE_LAZY), (0x9000, 1, PE_PRESENT)], true);
        for length in 0..whole.len() {
            if let Ok((_, entries)) = parse_pagemap(&whole[..length]) {
                assert!(entries.len() < 2);
            }
        }
    }
}
