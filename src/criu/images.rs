//! The image files that Ferry reads: which pages of which task CRIU left to us, and which descriptors
//! a task has.
//!
//! `pagemap-<pid>.img`: u32 LE magics `0x54564319`, `0x56084025`, then records of a u32 length and
//! a protobuf message; first `pagemap_head {1: pages_id}`, then `pagemap_entry {1: vaddr,
//! 2: compat_nr_pages, 4: flags, 5: nr_pages}`; CRIU 4.1 and older count in field 2.
//! `ids-<pid>.img`: one record, in which field 2 is the number of a table of descriptors;
//! `core-<pid>.img`: one record, in whose message 3 (`task_core_entry`) field 6 is the command's name;
//! `memfd.img` has a record `memfd_inode_entry {1: name,
//! 5: inode …}` for each that CRIU has seen.
//! `fdinfo-<table>.img`: a record `fdinfo_entry {1: file, 2: flags, 3: type, 4: fd}` for each.
//! Source: CRIU images/pagemap.proto, core.proto, fdinfo.proto, criu/include/magic.h.

use anyhow::{Result, anyhow, bail};
use protobuf::{CodedInputStream, CodedOutputStream};

use crate::sys::memory::{PAGE, PageRegion};

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
const CORE: u32 = 0x5505_3847;
const IDS: u32 = 0x5443_2030;
const FDINFO: u32 = 0x5621_3732;
const MEMFD: u32 = 0x4845_3499;

/// A run of pages in a task's pagemap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapEntry {
    /// Address of the first.
    pub vaddr: u64,
    /// Number of them.
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

/// A pagemap image, with further entries of pages that were left to us, rising.
///
/// # Errors
/// When it is none, or cut short, or has one of the pages already.
pub fn with_lazy(bytes: &[u8], more: &[PageRegion]) -> Result<Vec<u8>> {
    let mut rest = after_magics(bytes, MAGIC[1])?;
    let head = take_record(&mut rest)?;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let record = take_record(&mut rest)?;
        let vaddr = fields(record)?.iter().find(|f| f.0 == 1).map(|f| f.1);
        all.push((
            vaddr.ok_or_else(|| anyhow!("a pagemap entry without an address"))?,
            record.to_vec(),
        ));
    }

    for region in more {
        let pages = (region.end - region.start) / PAGE as u64;
        let mut record = Vec::new();
        let mut out = CodedOutputStream::vec(&mut record);
        for (field, value) in [(1, region.start), (2, 0), (4, u64::from(PE_LAZY)), (5, pages)] {
            out.write_uint64(field, value)?;
        }
        out.flush()?;
        drop(out);
        all.push((region.start, record));
    }

    all.sort_by_key(|(vaddr, _)| *vaddr);
    let mut whole = MAGIC.map(u32::to_le_bytes).concat();
    for record in std::iter::once(head).chain(all.iter().map(|(_, record)| &record[..])) {
        whole.extend((record.len() as u32).to_le_bytes());
        whole.extend(record);
    }

    // Each page once, or the destination would refuse it.
    parse_pagemap(&whole)?;
    Ok(whole)
}

/// The numbers of shared memory that CRIU has dumped as memfds, out of their image: inodes, the lower half.
///
/// # Errors
/// When it is not one, or cut short.
pub fn parse_memfds(bytes: &[u8]) -> Result<Vec<u32>> {
    let mut rest = after_magics(bytes, MEMFD)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let record = fields(take_record(&mut rest)?)?;
        found.extend(record.iter().filter(|field| field.0 == 5).map(|field| field.1 as u32));
    }
    Ok(found)
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

/// Reads the command's name in the image of a task.
///
/// # Errors
/// When it is none, or cut short.
pub fn parse_command(bytes: &[u8]) -> Result<String> {
    let mut rest = after_magics(bytes, CORE)?;
    let task = bytes_field(take_record(&mut rest)?, 3)?;
    let name = bytes_field(task.ok_or_else(|| anyhow!("a thread's image"))?, 6)?;
    let name = name.ok_or_else(|| anyhow!("a task without a command"))?;
    // The kernel has no room for more: proc_pid_comm(5).
    Ok(String::from_utf8_lossy(&name[..name.len().min(16)]).into_owned())
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

pub(super) fn after_magics(bytes: &[u8], kind: u32) -> Result<&[u8]> {
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

pub(super) fn take_record<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = take_u32(rest)? as usize;
    if length > rest.len() {
        bail!("an image file cut short");
    }
    let (record, tail) = rest.split_at(length);
    *rest = tail;
    Ok(record)
}

/// The varint fields of a small message; others are skipped.
pub(super) fn fields(record: &[u8]) -> Result<Vec<(u32, u64)>> {
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

/// Returns what a field has that is text, or another message, with `input` at its length in `record`. Not
/// `read_bytes`, which sets memory aside for whatever length is claimed.
pub(super) fn take_bytes<'a>(
    input: &mut CodedInputStream<'_>,
    record: &'a [u8],
) -> Result<&'a [u8]> {
    let length = input.read_raw_varint32()?;
    let rest = record.get(input.pos() as usize..).unwrap_or_default();
    let bytes = rest.get(..length as usize).ok_or_else(|| anyhow!("cut short"))?;
    input.skip_raw_bytes(length)?;
    Ok(bytes)
}

/// A field of a message that is text, or another message.
fn bytes_field(record: &[u8], wanted: u32) -> Result<Option<&[u8]>> {
    let mut input = CodedInputStream::from_bytes(record);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let (number, wire) = (tag >> 3, tag & 7);
        if (number, wire) == (wanted, 2) {
            return Ok(Some(take_bytes(&mut input, record)?));
        }
        let wire = protobuf::rt::WireType::new(wire).ok_or_else(|| anyhow!("bad wire type"))?;
        input.skip_field(wire)?;
    }
    Ok(None)
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
    fn memfds_are_found() {
        let mut image = [COMMON, MEMFD].map(u32::to_le_bytes).concat();
        for inode in [77, 78] {
            // A name, owners, a size, the inode, seals.
            let record = [10, 1, b'x', 16, 0, 24, 0, 32, 9, 40, inode, 48, 1];
            image.extend((record.len() as u32).to_le_bytes());
            image.extend(record);
        }
        assert_eq!(parse_memfds(&image).unwrap(), [77, 78]);
        assert!(parse_memfds(&image[..image.len() - 1]).is_err());
        assert!(parse_memfds(&[COMMON, CORE].map(u32::to_le_bytes).concat()).is_err());
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
    fn pages_are_added_in_order_and_once() {
        let old = image(&[(0x1000, 3, PE_PRESENT), (0x9000, 1, PE_LAZY)], true);
        let region = |start, end| PageRegion { start, end, categories: 0 };
        let new = with_lazy(&old, &[region(0x4000, 0x6000), region(0xa000, 0xb000)]).unwrap();
        let list = [
            (0x1000, 3, PE_PRESENT),
            (0x4000, 2, PE_LAZY),
            (0x9000, 1, PE_LAZY),
            (0xa000, 1, PE_LAZY),
        ];
        assert_eq!(new, image(&list, true));
        assert!(with_lazy(&old, &[region(0x3000, 0x5000)]).is_err());
        assert!(with_lazy(&old[..old.len() - 1], &[]).is_err());
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
    fn a_command_is_read() {
        let head = [COMMON, CORE].map(u32::to_le_bytes).concat();
        let record =
            |message: &[u8]| [&head[..], &(message.len() as u32).to_le_bytes(), message].concat();
        // `mtype: 1`, `tc: {task_state: 1, comm: "init"}`
        let core = record(b"\x08\x01\x1a\x08\x08\x01\x32\x04init");
        assert_eq!(parse_command(&core).unwrap(), "init");
        for cut in 0..core.len() {
            assert!(parse_command(&core[..cut]).is_err(), "{cut}");
        }
        assert!(parse_command(&record(b"\x08\x01")).is_err());
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
        let core = [COMMON, CORE].map(u32::to_le_bytes).concat();
        let core = [&core[..], &[10, 0, 0, 0, 8, 1, 0x1a, 6, 8, 1, 0x32, 2], b"me"].concat();
        let target = Target::new("images").sample(pagemap).sample(table).sample(ids.concat());
        let memfd = [COMMON, MEMFD].map(u32::to_le_bytes).concat();
        let target =
            target.sample(core).sample([&memfd[..], &[4, 0, 0, 0, 40, 77, 48, 1]].concat());
        target.run(|bytes| {
            let pagemap = parse_pagemap(bytes).map(|(_, entries)| {
                let mut before = 0;
                for entry in entries {
                    assert!(entry.vaddr >= before && entry.end() <= MAX_ADDRESS);
                    before = entry.end();
                }
            });

            let descriptors = with_descriptors(bytes, 9, &[4, 7, 12]).map(drop);
            let command = parse_command(bytes).map(|name| assert!(name.len() <= 48));
            let memfds = parse_memfds(bytes).map(drop);
            pagemap.or(descriptors).or(parse_table(bytes).map(drop)).or(command).or(memfds)
        });
    }
}
