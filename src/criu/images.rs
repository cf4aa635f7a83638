//! The image files that Ferry reads: which pages of which task CRIU left to us, and which descriptors
//! a task has.
//!
//! `pagemap-<pid>.img`: u32 LE magics `0x54564319`, `0x56084025`, then records of a u32 length and
//! a protobuf message; first `pagemap_head {1: pages_id}`, then `pagemap_entry {1: vaddr,
//! 2: compat_nr_pages, 4: flags, 5: nr_pages}`; CRIU 4.1 and older count in field 2.
//! `ids-<pid>.img`: one record, in which field 2 is the number of a table of descriptors;
//! `fdinfo-<table>.img`: a record `fdinfo_entry {1: file, 2: flags, 3: type, 4: fd}` for each.
//! Source: CRIU images/pagemap.proto, core.proto, fdinfo.proto, criu/include/magic.h.

use anyhow::{Result, anyhow, bail};
use protobuf::{CodedInputStream, CodedOutputStream};

use crate::sys::memory::PAGE;

/// Pages of the entry lie in the pages image.
pub const PE_PRESENT: u32 = 1 << 2;
/// Pages of the entry were left to us.
pub const PE_LAZY: u32 = 1 << 1;

const MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];
/// A pagemap with more entries than this is refused: 16 million separate runs of pages.
const MAX_ENTRIES: usize = 1 << 24;

/// One past the highest address that any task has, on any machine.
const MAX_ADDRESS: u64 = 1 << 57;

const COMMON: u32 = 0x5456_4319;
const IDS: u32 = 0x5443_2030;
const FDINFO: u32 = 0x5621_3732;

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

impl PagemapEntry {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.vaddr.saturating_add(self.pages.saturating_mul(PAGE as u64))
    }
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
    let mut entries: Vec<PagemapEntry> = Vec::new();
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
        let entry = PagemapEntry {
            vaddr: vaddr.ok_or_else(|| anyhow!("a pagemap entry without an address"))?,
            pages: if pages > 0 { pages } else { compat },
            flags: flags.unwrap_or(PE_PRESENT),
        };
        // CRIU writes them so. Otherwise a page could come twice, and a small image name very many.
        if entry.end() > MAX_ADDRESS || entries.last().is_some_and(|e| e.end() > entry.vaddr) {
            bail!("a pagemap whose entries overlap, or that no task can have");
        }
        entries.push(entry);
        if entries.len() > MAX_ENTRIES {
            bail!("a pagemap with too many entries");
        }
    }
    Ok((pages_id, entries))
}

/// The number of a task's table of descriptors, out of its `ids` image.
///
/// # Errors
/// When it is not one, or cut short.
pub fn parse_table(bytes: &[u8]) -> Result<u32> {
    let mut rest = after_magics(bytes, IDS)?;
    let record = fields(take_record(&mut rest)?)?;
    let table = record.iter().find(|field| field.0 == 2);
    table.map(|field| field.1 as u32).ok_or_else(|| anyhow!("a task without descriptors"))
}

/// The image of a table of descriptors, with more of them: each of `numbers`, rising, is another one of
/// what `like` stands for.
///
/// # Errors
/// When it is none, or cut short, has no `like`, or has one of the numbers already.
pub fn with_descriptors(bytes: &[u8], like: i32, numbers: &[i32]) -> Result<Vec<u8>> {
    let mut rest = after_magics(bytes, FDINFO)?;
    let (mut all, mut pattern) = (Vec::new(), None);
    while !rest.is_empty() {
        let record = take_record(&mut rest)?;
        let entry = fields(record)?;
        let field = |number| entry.iter().find(|f| f.0 == number).map(|f| f.1);
        let number = field(4).ok_or_else(|| anyhow!("a descriptor without a number"))? as i32;
        if number == like {
            pattern = field(1).zip(field(3));
        }
        all.push((number, record.to_vec()));
    }
    let (file, kind) = pattern.ok_or_else(|| anyhow!("there is no descriptor {like}"))?;
    for &number in numbers {
        let mut record = Vec::new();
        let mut out = CodedOutputStream::vec(&mut record);
        for (field, value) in [(1, file), (2, 0), (3, kind), (4, number as u64)] {
            out.write_uint64(field, value)?;
        }
        out.flush()?;
        drop(out);
        all.push((number, record));
    }
    // CRIU puts them in order; it is quick where they are.
    all.sort_by_key(|(number, _)| *number);
    if all.windows(2).any(|two| two[0].0 == two[1].0) {
        bail!("two descriptors of one number");
    }
    let mut whole = [COMMON, FDINFO].map(u32::to_le_bytes).concat();
    for (_, record) in all {
        whole.extend((record.len() as u32).to_le_bytes());
        whole.extend(record);
    }
    Ok(whole)
}

fn after_magics(bytes: &[u8], kind: u32) -> Result<&[u8]> {
    let mut rest = bytes;
    if [take_u32(&mut rest)?, take_u32(&mut rest)?] != [COMMON, kind] {
        bail!("an image of another kind");
    }
    Ok(rest)
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
    use protobuf::CodedOutputStream;

    use super::*;
    use crate::fuzz::Target;

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
    fn a_pagemap_names_each_page_once_and_only_those_that_can_be() {
        let flags = PE_LAZY;
        for (list, good) in [
            (&[(0x1000, 3, flags), (0x4000, 1, flags)][..], true),
            (&[(0x1000, 3, flags), (0x3000, 1, flags)], false),
            (&[(0x4000, 1, flags), (0x1000, 1, flags)], false),
            (&[(MAX_ADDRESS - 0x1000, 1, flags)], true),
            (&[(MAX_ADDRESS - 0x1000, 2, flags)], false),
            (&[(u64::MAX, u64::MAX, flags)], false),
        ] {
            assert_eq!(parse_pagemap(&image(list, true)).is_ok(), good, "{list:x?}");
        }
    }

    #[test]
    fn descriptors_are_added_in_order() {
        // As CRIU writes them: standard input, a listening socket, an epoll.
        let entry = |file: u8, flags: u8, kind: u8, number: u8| {
            [8, 0, 0, 0, 0x08, file, 0x10, flags, 0x18, kind, 0x20, number].to_vec()
        };
        let head = [COMMON, FDINFO].map(u32::to_le_bytes).concat();
        let old = [head.clone(), entry(1, 0, 1, 0), entry(2, 1, 4, 5), entry(3, 1, 7, 9)].concat();
        let new = with_descriptors(&old, 9, &[4, 7, 12]).unwrap();
        let wanted = [
            entry(1, 0, 1, 0),
            entry(3, 0, 7, 4),
            entry(2, 1, 4, 5),
            entry(3, 0, 7, 7),
            entry(3, 1, 7, 9),
            entry(3, 0, 7, 12),
        ];
        assert_eq!(new, [vec![head], wanted.to_vec()].concat().concat());
        assert!(with_descriptors(&old, 9, &[5]).is_err());
        assert!(with_descriptors(&old, 8, &[4]).is_err());
        for cut in 0..old.len() {
            let _ = with_descriptors(&old[..cut], 0, &[4]);
        }
        let ids = [COMMON, IDS].map(u32::to_le_bytes).concat();
        let ids = [ids, vec![4, 0, 0, 0, 0x08, 1, 0x10, 77]].concat();
        assert_eq!(parse_table(&ids).unwrap(), 77);
        assert!(parse_table(&old).is_err() && parse_table(&ids[..10]).is_err());
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

    #[test]
    fn fuzz_images() {
        let pagemap = image(&[(0x1000, 3, PE_LAZY), (0x9000, 1, PE_PRESENT)], true);
        let entry = [8, 0, 0, 0, 0x08, 1, 0x10, 0, 0x18, 1, 0x20, 9];
        let table = [&[COMMON, FDINFO].map(u32::to_le_bytes).concat()[..], &entry, &entry].concat();
        let ids = [&[COMMON, IDS].map(u32::to_le_bytes).concat()[..], &[4, 0, 0, 0, 8, 1, 16, 77]];
        let target = Target::new("images").sample(pagemap).sample(table).sample(ids.concat());
        target.run(|bytes| {
            let pagemap = parse_pagemap(bytes).map(|(_, entries)| {
                let mut before = 0;
                for entry in entries {
                    assert!(entry.vaddr >= before && entry.end() <= MAX_ADDRESS);
                    before = entry.end();
                }
            });
            let descriptors = with_descriptors(bytes, 9, &[4, 7, 12]).map(drop);
            pagemap.or(descriptors).or(parse_table(bytes).map(drop))
        });
    }
}
