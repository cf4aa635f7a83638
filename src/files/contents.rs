//! What a regular file holds, piece by piece: all of it, or what differs from what was sent before.
//!
//! A hole costs nothing, however large it is: neither time nor memory nor a word. lseek(2), `SEEK_DATA`

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::Result;
use xxhash_rust::xxh3::xxh3_64;

use super::ops::{self, BLOCK, FileStep};
use super::tree::Extents;

/// Bytes that are compared, and sent again, as one. Databases write pages of this size.
const GRAIN: u64 = 4096;
/// Files above this size are sent by the grains that differ.
const LARGE: u64 = 1 << 20;
/// In files with more data than this a whole block is compared: sums of grains would be too many.
const VERY_LARGE: u64 = 64 << 30;
/// Most pieces of data, with holes between them, of which sums are kept. A file that has more of them
/// is sent as a whole when it has changed.
const MOST_RUNS: usize = 1 << 20;

/// What the copy of a large file holds: a sum of each grain that is no hole. Two grains with the same
/// sum by chance are far less likely than a disk that gives back something else than was written.
#[derive(Debug)]
pub(super) struct GrainSums {
    size: u64,
    /// Bytes of a grain.
    grain: u64,
    /// Grains that follow one another: the number of the first, and where its sum is.
    runs: Vec<(u64, usize)>,
    sums: Vec<u64>,
}

/// What was sent.
#[derive(Debug)]
pub(super) struct SentFile {
    /// Of a large file.
    pub(super) sums: Option<GrainSums>,
    /// Bytes that were read.
    pub(super) read: u64,
    /// Whether it was certainly all that it held when it was looked at, or later.
    pub(super) certain: bool,
}

/// Parts of a file that may have been written to.
pub(super) trait Touched {
    /// Tells whether something of these bytes may have changed.
    fn any(&self, from: u64, to: u64) -> bool;
}

/// Sends a file of this size: all that is no hole, or, where the copy holds `before`, what differs
/// from it. What `touched` says that nobody has written to is not read. `went` hears of bytes sent.
///
/// # Errors
/// When it cannot be read, or `out` fails.
pub(super) fn send(
    file: &File,
    size: u64,
    before: Option<GrainSums>,
    touched: Option<&dyn Touched>,
    out: &mut impl Write,
    went: &mut dyn FnMut(u64),
) -> Result<SentFile> {
    let very_large = file.metadata()?.blocks() > VERY_LARGE / 512;
    let chosen = if very_large { BLOCK as u64 } else { GRAIN };
    let grain = before.as_ref().map_or(chosen, |before| before.grain);
    let sums = GrainSums { size, grain, runs: Vec::new(), sums: Vec::new() };
    let sums = (size > LARGE).then_some(sums);
    let mut sending = Sending { before, sums, size, grain, out, went };
    let mut buffer = vec![0; BLOCK];
    let (mut read, mut certain) = (0, true);
    let mut at = 0;

    for extent in Extents::of(file, size) {
        let (start, length) = extent?;
        // In whole grains: a file system may tell of less.
        let from = (start / grain * grain).max(at);
        let to = (start + length).div_ceil(grain).saturating_mul(grain).min(size);
        sending.hole(at, from)?;
        at = from;
        while at < to {
            let end = (at / BLOCK as u64 + 1).saturating_mul(BLOCK as u64).min(to);
            if !sending.keep(at, end, touched) {
                let block = &mut buffer[..(end - at) as usize];
                let n = read_block(file, block, at)?;
                read += n as u64;
                if n < block.len() {
                    // It has become shorter: the next round will say so.
                    block[n..].fill(0);
                    certain = false;
                }
                sending.block(at, block)?;
            }
            at = end;
        }
    }

    sending.hole(at, size)?;
    let sums = sending.sums.filter(|sums| sums.runs.len() <= MOST_RUNS);
    Ok(SentFile { sums, read, certain })
}

impl GrainSums {
    /// Adds the sum of a grain behind all others.
    fn push(&mut self, number: u64, sum: u64) {
        // Beyond that they are of no use, and need no memory.
        if self.runs.len() > MOST_RUNS {
            return;
        }
        let next = self.runs.last().map(|(first, at)| first + (self.sums.len() - at) as u64);
        if next != Some(number) {
            self.runs.push((number, self.sums.len()));
        }
        self.sums.push(sum);
    }

    /// The runs that have grains among these or behind them: numbers, from and to, and their sums.
    fn runs_from(&self, number: u64) -> impl Iterator<Item = (u64, u64, &[u64])> {
        let end = move |i: usize| self.runs.get(i + 1).map_or(self.sums.len(), |next| next.1);
        let first = self.runs.partition_point(|(first, _)| *first <= number).saturating_sub(1);
        (first..self.runs.len()).map(move |i| {
            let (first, at) = self.runs[i];
            let sums = &self.sums[at..end(i)];
            (first, first + sums.len() as u64, sums)
        })
    }

    /// The sum of a grain; none of a hole.
    fn of(&self, number: u64) -> Option<u64> {
        let (first, _, sums) = self.runs_from(number).next()?;
        sums.get(usize::try_from(number.checked_sub(first)?).ok()?).copied()
    }
}

struct Sending<'a, W> {
    /// What the copy has.
    before: Option<GrainSums>,
    /// What it will have, if somebody wants to know.
    sums: Option<GrainSums>,
    size: u64,
    grain: u64,
    out: &'a mut W,
    went: &'a mut dyn FnMut(u64),
}

impl<W: Write> Sending<'_, W> {
    /// There is nothing from here to there; says so where the copy has something.
    fn hole(&mut self, from: u64, to: u64) -> Result<()> {
        let Some(before) = self.before.as_ref().filter(|_| from < to) else { return Ok(()) };
        let grain = self.grain;
        for (first, end, _) in before.runs_from(from / grain) {
            let (start, end) = (first.saturating_mul(grain), end.saturating_mul(grain));
            if start >= to {
                break;
            }
            let (start, end) = (start.max(from), end.min(to));
            if start < end {
                ops::write(self.out, &FileStep::Hole(start, end - start))?;
            }
        }
        Ok(())
    }

    /// Tells whether the copy certainly holds these bytes already.
    fn keep(&mut self, at: u64, end: u64, touched: Option<&dyn Touched>) -> bool {
        let (Some(touched), Some(before)) = (touched, &self.before) else { return false };
        // Where the file ended, something else may be now.
        let ended = before.size != self.size && before.size / BLOCK as u64 <= at / BLOCK as u64;
        if ended || touched.any(at, end) {
            return false;
        }
        if let Some(sums) = &mut self.sums {
            for number in at / self.grain..end.div_ceil(self.grain) {
                before.of(number).into_iter().for_each(|sum| sums.push(number, sum));
            }
        }
        true
    }

    /// Sends of these bytes, which are no hole, what the copy does not hold.
    fn block(&mut self, at: u64, block: &[u8]) -> Result<()> {
        let mut differs: Option<usize> = None;
        for (i, grain) in block.chunks(self.grain as usize).enumerate() {
            let begins = i * self.grain as usize;
            let number = (at + begins as u64) / self.grain;
            let same = self.sums.as_mut().is_some_and(|sums| {
                let sum = xxh3_64(grain);
                sums.push(number, sum);
                self.before.as_ref().is_some_and(|before| before.of(number) == Some(sum))
            });
            if !same {
                differs.get_or_insert(begins);
            } else if let Some(from) = differs.take() {
                self.data(at, &block[..begins], from)?;
            }
        }
        differs.map_or(Ok(()), |from| self.data(at, block, from))
    }

    /// Sends the rest of a block, which is at `at`, from a place in it on.
    fn data(&mut self, at: u64, block: &[u8], from: usize) -> Result<()> {
        let rest = &block[from..];
        ops::write(self.out, &FileStep::Data(at + from as u64, rest.len() as u32))?;
        self.out.write_all(rest)?;
        (self.went)(rest.len() as u64);
        Ok(())
    }
}

fn read_block(file: &File, block: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < block.len() {
        match file.read_at(&mut block[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
