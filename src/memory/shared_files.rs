//! The destination's half of [shared memory](super::shared): files that CRIU is [lent](crate::criu::lent), filled
//! as pages come.
//!
//! ```text
//! before there is a control group   pages wait in files of Ferry's own
//! CRIU waits for the images         they are moved, and the next ones written, through a process in that group
//! CRIU begins                       what is left goes straight into the files: little, and seldom a new page
//! ```
//!
//! All files are there from the beginning, as CRIU gets its descriptors when it starts. Which of them stand for
//! memory, and how long they are, the source says with the images.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FallocateFlags, fallocate};

use super::digest::{batches, contents, read_padded};
use super::holder::MemoryHolder;
use crate::criu::lent::{self, LentFile};
use crate::sys::memory::{PAGE, memory_file};
use crate::sys::shared_memory::nameless_file;

/// One past the last byte that a file can have.
const END: u64 = 1 << 47;
/// Bytes that are moved before others have their turn.
const TURN: u64 = 8 << 20;

/// The files, and how they are written.
#[derive(Debug)]
pub struct SharedFiles {
    files: Vec<SharedFile>,
    way: WritingWay,
    /// The files are as long as they will be.
    finished: bool,
    /// Most bytes of all together.
    limit: u64,
}

#[derive(Debug)]
struct SharedFile {
    file: File,
    length: u64,
    /// What waits for a control group, in the same places.
    waiting: Option<File>,
    /// What both take of memory.
    bytes: u64,
}

/// Through whose memory.
#[derive(Debug)]
enum WritingWay {
    /// There is no control group yet.
    Waiting,
    /// Through that of one who is in it.
    Held(MemoryHolder),
    /// Through ours.
    Straight,
}

impl SharedFiles {
    /// All that CRIU may be lent, empty. They may take so many bytes together.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(limit: u64) -> Result<SharedFiles> {
        let make = |_| {
            let file = nameless_file().context("cannot make shared memory")?;
            Ok(SharedFile { file, length: 0, waiting: None, bytes: 0 })
        };
        let files = (0..lent::MOST).map(make).collect::<Result<_>>()?;
        Ok(SharedFiles { files, way: WritingWay::Waiting, finished: false, limit })
    }

    /// Other descriptors of them, for CRIU, in the order of their numbers.
    ///
    /// # Errors
    /// When there are none left.
    pub fn descriptors(&self) -> Result<Vec<OwnedFd>> {
        self.files.iter().map(|one| Ok(one.file.try_clone()?.into())).collect()
    }

    /// The file for frames of that number, which may be as long as that.
    fn file(
        &mut self,
        number: i32,
        at: u64,
        pages: usize,
    ) -> Result<(&mut SharedFile, &mut WritingWay, u32)> {
        let end = (pages as u64).saturating_mul(PAGE as u64).saturating_add(at);
        if !at.is_multiple_of(PAGE as u64) || end > END {
            bail!("shared memory at {at:#x}");
        }
        let index = number.unsigned_abs().wrapping_sub(1) as usize;
        let Some(one) = self.files.get_mut(index).filter(|_| number < 0) else {
            bail!("shared memory with the number {number}");
        };
        if one.length < end {
            if self.finished {
                bail!("shared memory {number} is longer than the source has said");
            }
            one.file.set_len(end)?;
            one.length = end;
        }
        Ok((one, &mut self.way, number.unsigned_abs()))
    }

    /// Takes in pages.
    ///
    /// # Errors
    /// When there is no room, or there can be no such memory.
    pub fn put(&mut self, number: i32, at: u64, bytes: &[u8]) -> Result<()> {
        let (one, way, number) = self.file(number, at, bytes.len().div_ceil(PAGE))?;
        one.write(way, number, at, bytes)?;
        self.within_limit()
    }

    /// Takes in pages of zeros: holes.
    ///
    /// # Errors
    /// As [`SharedFiles::put`].
    pub fn put_zeros(&mut self, number: i32, at: u64, pages: usize) -> Result<()> {
        let (one, _, _) = self.file(number, at, pages)?;
        punch(&one.file, at, (pages * PAGE) as u64)?;
        one.drop_waiting(at, (pages * PAGE) as u64)
    }

    /// There is a control group, and who writes through one of its processes; or, `None`, there is none to be had.
    pub fn hold(&mut self, holder: Option<MemoryHolder>) {
        self.way = holder.map_or(WritingWay::Straight, WritingWay::Held);
    }

    /// Moves some of what has waited; whether that was all.
    ///
    /// # Errors
    /// When there is no room.
    pub fn settle(&mut self) -> Result<bool> {
        let mut buffer = Vec::new();
        for (number, one) in (1..).zip(&mut self.files) {
            let Some(waiting) = &one.waiting else { continue };
            let waiting = waiting.try_clone()?;
            let mut moved = 0;
            for (start, end) in contents(&waiting, one.length)? {
                for (at, pages) in batches(start, end) {
                    if moved >= TURN {
                        return Ok(false);
                    }
                    buffer.resize(pages * PAGE, 0);
                    read_padded(&waiting, &mut buffer, at)?;
                    one.place(&mut self.way, number, at, &buffer)?;
                    punch(&waiting, at, buffer.len() as u64)?;
                    moved += buffer.len() as u64;
                }
            }
            one.waiting = None;
        }
        Ok(true)
    }

    /// CRIU is about to begin: the files are these, and as long as that.
    ///
    /// # Errors
    /// When there is no room for what has waited.
    pub fn finish(&mut self, lent: &[LentFile]) -> Result<()> {
        while !self.settle()? {}
        (self.way, self.finished) = (WritingWay::Straight, true);
        for file in lent {
            let one = self.files.get_mut(file.number.wrapping_sub(1) as usize);
            let one = one.context("shared memory of another number")?;
            one.file.set_len(file.bytes)?;
            one.length = file.bytes;
        }
        Ok(())
    }

    /// A peer may send what it likes.
    fn within_limit(&self) -> Result<()> {
        let bytes = self.files.iter().fold(0_u64, |sum, one| sum.saturating_add(one.bytes));
        if bytes > self.limit {
            bail!("more shared memory comes than the plan announced");
        }
        Ok(())
    }
}

impl SharedFile {
    fn write(&mut self, way: &mut WritingWay, number: u32, at: u64, bytes: &[u8]) -> Result<()> {
        if matches!(way, WritingWay::Waiting) {
            if self.waiting.is_none() {
                self.waiting = Some(memory_file(c"ferry-shared")?);
            }
            if let Some(waiting) = &self.waiting {
                waiting.write_all_at(bytes, at)?;
            }
            return self.count();
        }
        self.place(way, number, at, bytes)?;
        self.drop_waiting(at, bytes.len() as u64)?;
        self.count()
    }

    /// Writes to the file itself.
    fn place(&self, way: &mut WritingWay, number: u32, at: u64, bytes: &[u8]) -> Result<()> {
        match way {
            WritingWay::Held(holder) => holder.write(number, &self.file, at, bytes),
            WritingWay::Waiting | WritingWay::Straight => Ok(self.file.write_all_at(bytes, at)?),
        }
    }

    /// What has waited is out of date.
    fn drop_waiting(&self, at: u64, bytes: u64) -> Result<()> {
        self.waiting.as_ref().map_or(Ok(()), |waiting| punch(waiting, at, bytes))
    }

    fn count(&mut self) -> Result<()> {
        let blocks = |file: &File| Ok::<_, std::io::Error>(file.metadata()?.blocks());
        let waiting = self.waiting.as_ref().map_or(Ok(0), blocks)?;
        self.bytes = (blocks(&self.file)? + waiting) * 512;
        Ok(())
    }
}

fn punch(file: &File, at: u64, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, how, i64::try_from(at)?, i64::try_from(bytes)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file of that number.
    fn file(files: &SharedFiles, number: usize) -> File {
        files.descriptors().unwrap().swap_remove(number - 1).into()
    }

    fn lent(number: u32, pages: u64) -> LentFile {
        LentFile { number, bytes: pages * PAGE as u64 }
    }

    fn pages(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512 / PAGE as u64
    }

    fn first_byte(file: &File, page: u64) -> u8 {
        let mut bytes = [0; PAGE];
        read_padded(file, &mut bytes, page * PAGE as u64).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    #[test]
    fn what_comes_early_waits_until_it_can_be_charged() {
        let mut files = SharedFiles::new(u64::MAX).unwrap();
        let one = file(&files, 1);
        files.put(-1, 0, &[1; 8 * PAGE]).unwrap();
        files.put(-1, 8 << 20, &[2; PAGE]).unwrap();
        files.put_zeros(-1, PAGE as u64, 1).unwrap();
        assert_eq!((pages(&one), one.metadata().unwrap().len()), (0, (8 << 20) + PAGE as u64));

        // Whatever comes while it is moved, is newer.
        files.hold(None);
        files.put(-1, 2 * PAGE as u64, &[3; PAGE]).unwrap();
        while !files.settle().unwrap() {}
        assert_eq!([0, 1, 2, 3, 2048].map(|page| first_byte(&one, page)), [1, 0, 3, 1, 2]);
        assert_eq!(pages(&one), 8);
        assert!(files.files[0].waiting.is_none());
    }

    #[test]
    fn files_are_as_long_as_the_source_says() {
        let mut files = SharedFiles::new(u64::MAX).unwrap();
        files.put(-1, 0, &[1; 4 * PAGE]).unwrap();
        files.finish(&[lent(1, 3), lent(2, 9)]).unwrap();
        assert_eq!([1, 2].map(|n| file(&files, n).metadata().unwrap().len()), [3 << 12, 9 << 12]);
        // The last pages may come later, and no others.
        files.put(-2, 8 << 12, &[5; PAGE]).unwrap();
        assert_eq!(first_byte(&file(&files, 2), 8), 5);
        assert!(files.put(-2, 9 << 12, &[5; PAGE]).is_err());
        assert!(files.put_zeros(-1, 3 << 12, 1).is_err());
    }

    #[test]
    fn a_peer_makes_no_more_and_no_longer_ones_than_there_can_be() {
        let mut files = SharedFiles::new(10 << 20).unwrap();
        let page = [1; PAGE];
        for (number, at) in
            [(-65, 0), (0, 0), (1, 0), (i32::MIN, 0), (-1, 7), (-1, END), (-1, u64::MAX - 4095)]
        {
            assert!(files.put(number, at, &page).is_err(), "{number} {at:#x}");
            assert!(files.put_zeros(number, at, 1).is_err(), "{number} {at:#x}");
        }
        assert!(files.put_zeros(-1, 0, usize::MAX / PAGE).is_err());
        assert!(files.finish(&[lent(65, 1)]).is_err());

        let mut files = SharedFiles::new(10 << 20).unwrap();
        let put = |files: &mut SharedFiles, number: i32| {
            (0..5).try_for_each(|n| files.put(number, n << 20, &[1; 1 << 20]))
        };
        put(&mut files, -1).unwrap();
        put(&mut files, -1).unwrap();
        put(&mut files, -64).unwrap();
        assert!(put(&mut files, -2).unwrap_err().to_string().contains("announced"));
    }

    #[test]
    fn fuzz_shared_files() {
        use crate::fuzz::{Target, found};
        // Kind, number, page, pages.
        let sample: Vec<u8> = (0..6).flat_map(|kind| [kind, 1, 16, 0, 0, 0, 0, 3]).collect();
        let target = Target::new("shared-files").sample(sample);
        target.words(&[&[0xff; 5], &[0, 0, 0, 0, 2]]).cost(40).room(4 << 20).run(|bytes| {
            let mut files = SharedFiles::new(64 << 10)?;
            for step in bytes.chunks_exact(8) {
                let [kind, number, page @ .., pages] = step else { unreachable!() };
                let number = i32::from(*number as i8);
                let at = page.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)) << 12;
                match kind % 4 {
                    0 => files.put(number, at, &vec![*kind; usize::from(*pages) * PAGE])?,
                    1 => files.put_zeros(number, at, usize::from(*pages))?,
                    2 => drop(files.settle()?),
                    _ => files.finish(&[lent(u32::from(number.unsigned_abs() as u8), at >> 12)])?,
                }
            }
            found(&[files.files.iter().filter(|one| one.length > 0).count()])
        });
    }
}
