//! The image of a task's mappings, with those added that CRIU was not shown.
//!
//! `mm-<pid>.img`: u32 LE magics `0x54564319`, `0x57492820`, then one record of a u32 length and a protobuf
//! message `mm_entry`, in which each field 14 is a mapping: `vma_entry {1: start, 2: end, 3: pgoff,
//! 4: shmid, 5: prot, 6: flags, 7: status, 8: fd, 9: madv, 10: fdflags}`; of a file shmid is its id. Restore wants them in the order of addresses;
//! guards (`MADV_GUARD_INSTALL`), which lie within others, come last. Source: CRIU images/mm.proto, vma.proto,
//! criu/include/image.h.

use std::ops::Range;

use anyhow::{Result, anyhow, bail};
use protobuf::rt::WireType;
use protobuf::{CodedInputStream, CodedOutputStream};

use super::images::{after_magics, fields, take_bytes, take_record};

const MM: u32 = 0x5749_2820;
const COMMON: u32 = 0x5456_4319;
/// Field of `mm_entry`.
const MAPPING: u32 = 14;
/// `VMA_AREA_REGULAR`, `VMA_AREA_HEAP`, `VMA_FILE_SHARED`, `VMA_ANON_PRIVATE`, `VMA_AREA_GUARD`.
const REGULAR: u64 = 1 << 0;
const HEAP: u64 = 1 << 5;
const FILE_SHARED: u64 = 1 << 7;
const ANON_PRIVATE: u64 = 1 << 9;
const GUARD: u64 = 1 << 16;

/// An anonymous mapping, as CRIU would have written it down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingRecord {
    /// Its addresses.
    pub range: Range<u64>,
    /// Where in a file it would be.
    pub offset: u64,
    /// `PROT_*`.
    pub access: u64,
    /// Without a reservation: `MAP_NORESERVE`.
    pub unreserved: bool,
    /// Kept in memory: `MAP_LOCKED`.
    pub locked: bool,
    /// Whether it is the one of brk(2).
    pub heap: bool,
    /// The inode of the memory that it shares with others; private without.
    pub shared: Option<u64>,
    /// `1 << MADV_*` of each advice that lasts.
    pub advice: u64,
}

impl MappingRecord {
    /// As the image has it; `file` gives the identifier of the file that stands for shared memory.
    fn message(&self, file: &dyn Fn(u64) -> Option<u32>) -> Result<Vec<u8>> {
        let lent = |inode| file(inode).ok_or_else(|| anyhow!("no file for shared memory {inode}"));
        let file = self.shared.map(lent).transpose()?;
        let (mut flags, status) = match file {
            Some(_) => (libc::MAP_SHARED as u64, FILE_SHARED),
            None => ((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64, ANON_PRIVATE),
        };
        if self.unreserved {
            flags |= libc::MAP_NORESERVE as u64;
        }

        if self.locked {
            flags |= libc::MAP_LOCKED as u64;
        }

        let status = REGULAR | status | if self.heap { HEAP } else { 0 };

        let mut body = Vec::new();
        let mut out = CodedOutputStream::vec(&mut body);
        let Range { start, end } = self.range;
        let id = u64::from(file.unwrap_or(0));
        let values = [start, end, self.offset, id, self.access, flags, status];
        for (number, value) in (1..).zip(values) {
            out.write_uint64(number, value)?;
        }

        out.write_sint64(8, -1)?;
        if self.advice != 0 {
            out.write_uint64(9, self.advice)?;
        }
        if file.is_some() {
            out.write_uint64(10, libc::O_RDWR as u64)?;
        }
        out.flush()?;
        drop(out);

        Ok(body)
    }
}

/// An `mm` image, taken apart.
#[derive(Debug)]
pub struct MmImage {
    /// All fields but the mappings.
    rest: Vec<u8>,
    /// By address.
    areas: Vec<(Range<u64>, Vec<u8>)>,
    guards: Vec<Vec<u8>>,
}

impl MmImage {
    /// Reads it.
    ///
    /// # Errors
    /// When it is none, or cut short.
    pub fn parse(bytes: &[u8]) -> Result<MmImage> {
        let mut rest = after_magics(bytes, MM)?;
        let record = take_record(&mut rest)?;
        if !rest.is_empty() {
            bail!("something follows a task's mappings");
        }
        let mut image = MmImage { rest: Vec::new(), areas: Vec::new(), guards: Vec::new() };
        let mut input = CodedInputStream::from_bytes(record);
        let mut from = 0;
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            let (number, wire) = (tag >> 3, tag & 7);
            if number == MAPPING && wire == WireType::LengthDelimited as u32 {
                image.take(take_bytes(&mut input, record)?.to_vec())?;
            } else {
                let wire = WireType::new(wire).ok_or_else(|| anyhow!("bad wire type"))?;
                input.skip_field(wire)?;
                let field = record.get(from..input.pos() as usize);
                image.rest.extend(field.ok_or_else(|| anyhow!("a field cut short"))?);
            }
            from = input.pos() as usize;
        }
        Ok(image)
    }

    fn take(&mut self, area: Vec<u8>) -> Result<()> {
        let all = fields(&area)?;
        let field = |number| all.iter().find(|f| f.0 == number).map(|f| f.1);
        if field(7) == Some(GUARD) {
            self.guards.push(area);
            return Ok(());
        }
        let (start, end) =
            field(1).zip(field(2)).ok_or_else(|| anyhow!("a mapping without addresses"))?;
        if start >= end {
            bail!("a mapping of nothing");
        }
        self.areas.push((start..end, area));
        Ok(())
    }

    /// Adds mappings that CRIU was not shown; `file` gives the identifier of the file that stands for shared memory,
    /// by inode.
    ///
    /// # Errors
    /// When it has seen one of them: then there would be two.
    pub fn add(
        &mut self,
        hidden: &[MappingRecord],
        file: &dyn Fn(u64) -> Option<u32>,
    ) -> Result<()> {
        for record in hidden {
            self.areas.push((record.range.clone(), record.message(file)?));
        }
        self.areas.sort_by_key(|(range, _)| range.start);
        match self.areas.windows(2).find(|two| two[0].0.end > two[1].0.start) {
            Some(two) => bail!("CRIU has seen what it was not shown, at {:#x}", two[1].0.start),
            None => Ok(()),
        }
    }

    /// Takes a mapping out that CRIU was shown, and that is none: part of one that it was not.
    ///
    /// # Errors
    /// When it has not seen it as it was shown.
    pub fn remove(&mut self, range: &Range<u64>) -> Result<()> {
        let found = self.areas.iter().position(|(area, _)| area == range);
        let found = found.ok_or_else(|| anyhow!("CRIU has not seen {:#x}", range.start))?;
        self.areas.remove(found);
        Ok(())
    }

    /// Notes another advice for a mapping that CRIU was shown.
    ///
    /// # Errors
    /// When there is no mapping that begins there.
    pub fn advise(&mut self, start: u64, advice: u64) -> Result<()> {
        let found = self.areas.iter_mut().find(|(range, _)| range.start == start);
        let (_, area) = found.ok_or_else(|| anyhow!("CRIU has not seen {start:#x}"))?;
        // The last of two fields of a number counts; those that CRIU writes once come before.
        let mut out = CodedOutputStream::vec(area);
        out.write_uint64(9, advice)?;
        out.flush()?;
        drop(out);
        Ok(())
    }

    /// Tells whether exactly one mapping of the image holds all of a range. CRIU makes one of neighbours of the
    /// kernel's.
    pub fn has_once(&self, range: &Range<u64>) -> bool {
        let next = self.areas.partition_point(|(area, _)| area.end <= range.start);
        self.areas
            .get(next)
            .is_some_and(|(area, _)| area.start <= range.start && area.end >= range.end)
    }

    /// Whether an address is in one of the mappings.
    pub fn covers(&self, address: u64) -> bool {
        self.areas.iter().any(|(area, _)| area.contains(&address))
    }

    /// As it is written to the file.
    ///
    /// # Errors
    /// When it has become too large.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut body = self.rest.clone();
        let mut out = CodedOutputStream::vec(&mut body);
        for area in self.areas.iter().map(|(_, area)| area).chain(&self.guards) {
            out.write_bytes(MAPPING, area)?;
        }
        out.flush()?;
        drop(out);
        let length = u32::try_from(body.len())?.to_le_bytes();
        Ok([&COMMON.to_le_bytes()[..], &MM.to_le_bytes(), &length, &body].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Target;

    fn record(start: u64, end: u64) -> MappingRecord {
        let range = start..end;
        MappingRecord {
            range,
            offset: 0,
            access: 3,
            unreserved: false,
            locked: false,
            heap: false,
            shared: None,
            advice: 0,
        }
    }

    /// Returns what CRIU writes for two mappings, and a guard in the first.
    fn image() -> Vec<u8> {
        let mut body = Vec::new();
        let mut out = CodedOutputStream::vec(&mut body);
        out.write_uint64(1, 0x40_0000).unwrap();
        for (start, end, status) in
            [(0x1000, 0x3000, REGULAR), (0x9000, 0xa000, 5), (0x2000, 0x3000, GUARD)]
        {
            let mut area = Vec::new();
            let mut inner = CodedOutputStream::vec(&mut area);
            for (number, value) in
                [(1, start), (2, end), (3, 0), (4, 0), (5, 1), (6, 2), (7, status)]
            {
                inner.write_uint64(number, value).unwrap();
            }

            inner.write_sint64(8, -1).unwrap();
            inner.flush().unwrap();
            drop(inner);
            out.write_bytes(MAPPING, &area).unwrap();
        }

        out.write_int32(15, 1).unwrap();
        out.flush().unwrap();
        drop(out);
        let head = [COMMON, MM, body.len() as u32].map(u32::to_le_bytes).concat();

        [head, body].concat()
    }

    #[test]
    fn what_was_hidden_comes_in_order_and_guards_last() {
        let mut image = MmImage::parse(&image()).unwrap();
        image.add(&[record(0xb000, 0xc000), record(0x3000, 0x9000)], &|_| None).unwrap();
        let all = MmImage::parse(&image.bytes().unwrap()).unwrap();
        let ranges: Vec<_> = all.areas.iter().map(|(range, _)| range.clone()).collect();
        assert_eq!(ranges, [0x1000..0x3000, 0x3000..0x9000, 0x9000..0xa000, 0xb000..0xc000]);
        assert_eq!((all.guards.len(), all.rest.len()), (1, 7));
        assert!(all.has_once(&(0x3000..0x9000)) && all.has_once(&(0x1000..0x2000)));
        assert!(!all.has_once(&(0x2000..0x4000)) && !all.has_once(&(0xa000..0xb000)));
    }

    #[test]
    fn nothing_is_there_twice() {
        for range in [0x1000..0x3000, 0x0000..0x2000, 0x2000..0x4000, 0x0000..0xb000] {
            let mut image = MmImage::parse(&image()).unwrap();
            assert!(image.add(&[record(range.start, range.end)], &|_| None).is_err(), "{range:x?}");
        }
        let mut image = MmImage::parse(&image()).unwrap();
        assert!(image.add(&[record(0x3000, 0x5000), record(0x4000, 0x6000)], &|_| None).is_err());
    }

    #[test]
    fn a_part_that_was_shown_gives_way_to_the_whole() {
        let mut image = MmImage::parse(&image()).unwrap();
        assert!(image.remove(&(0x1000..0x2000)).is_err());
        image.remove(&(0x9000..0xa000)).unwrap();
        image.add(&[record(0x8000, 0xb000)], &|_| None).unwrap();
        assert!(image.has_once(&(0x8000..0xb000)));
    }

    #[test]
    fn a_record_is_what_criu_writes() {
        let mut one = record(0x7000, 0x8000);
        (one.unreserved, one.locked, one.heap, one.advice) = (true, true, true, 1 << 14);
        let found = fields(&one.message(&|_| None).unwrap()).unwrap();
        let wanted = [0x7000, 0x8000, 0, 0, 3, 0x6022, 1 | 32 | 512, 1, 1 << 14];
        assert_eq!(found, (1..).zip(wanted).collect::<Vec<_>>());
        let shared = MappingRecord { shared: Some(99), offset: 0x1000, ..record(0x7000, 0x8000) };
        let found = fields(&shared.message(&|inode| (inode == 99).then_some(7)).unwrap()).unwrap();
        let wanted = [0x7000, 0x8000, 0x1000, 7, 3, 1, 1 | 128, 1];
        assert_eq!(found, (1..).zip(wanted).chain([(10, 2)]).collect::<Vec<_>>());
        assert!(shared.message(&|_| None).is_err());
    }

    /// Memory is taken for what is there, not for what is claimed.
    #[test]
    fn a_mapping_that_claims_gigabytes_is_cut_short() {
        let body = [0x72, 0xff, 0xff, 0xff, 0xff, 0x07, 1, 2, 3];
        let head = [COMMON, MM, body.len() as u32].map(u32::to_le_bytes).concat();
        let why = MmImage::parse(&[&head[..], &body].concat()).unwrap_err();
        assert!(why.to_string().contains("cut short"), "{why}");
    }

    #[test]
    fn an_advice_is_changed() {
        let mut image = MmImage::parse(&image()).unwrap();
        image.advise(0x9000, 6).unwrap();
        assert!(image.advise(0x4000, 6).is_err());
        let all = MmImage::parse(&image.bytes().unwrap()).unwrap();
        assert_eq!(fields(&all.areas[1].1).unwrap().last(), Some(&(9, 6)));
    }

    #[test]
    fn fuzz_mm() {
        Target::new("mm").sample(image()).run(|bytes| {
            let mut image = MmImage::parse(bytes)?;
            image.add(&[record(0x3000, 0x9000)], &|_| None)?;
            assert!(image.has_once(&(0x3000..0x9000)));
            MmImage::parse(&image.bytes()?).map(drop)
        });
    }
}
