//! What a regular file holds, piece by piece: all of it, or what differs from what was sent before.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use anyhow::Result;
use xxhash_rust::xxh3::xxh3_64;

use super::ops::{self, BLOCK, Step};
use super::tree::extents;

/// Bytes that are compared, and sent again, as one. Databases write pages of this size.
const GRAIN: usize = 4096;
/// Files above this size are sent by the grains that differ.
const LARGE: u64 = 1 << 20;

/// What the copy of a large file holds.
#[derive(Debug)]
pub(super) struct Sums {
    size: u64,
    /// A sum of each grain, 0 for a hole. Two grains with the same sum by chance are far less likely
    /// than a disk that gives back something else than was written.
    grains: Vec<u64>,
}

/// What was sent.
#[derive(Debug)]
pub(super) struct Sent {
    /// Of a large file.
    pub(super) sums: Option<Sums>,
    /// Bytes that were read.
    pub(super) read: u64,
    /// Whether it was certainly all that it held when it was looked at, or later.
    pub(super) certain: bool,
}

/// Parts of a file that may have been written to.
pub(super) trait Touched {
    /// Whether something of these bytes may have changed.
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
    before: Option<Sums>,
    touched: Option<&dyn Touched>,
    out: &mut impl Write,
    went: &mut dyn FnMut(u64),
) -> Result<Sent> {
    let mut sending = Sending {
        data: extents(file, size)?,
        at: 0,
        sums: Vec::new(),
        run: None,
        out,
        went,
        sum: size > LARGE,
    };
    let mut buffer = vec![0; BLOCK];
    let (mut read, mut certain) = (0, true);
    let mut at = 0;
    while at < size {
        let end = (at + BLOCK as u64).min(size);
        let old = before.as_ref().map(|b| b.range(at, end));
        if !sending.has_data(at, end) {
            sending.hole(at, end, old)?;
        } else if let (Some(touched), Some(old), Some(before)) = (touched, old, &before)
            // Where the file ended, something else may be now.
            && !(before.size != size && before.size / BLOCK as u64 <= at / BLOCK as u64)
            && !touched.any(at, end)
        {
            sending.sums.extend_from_slice(old);
        } else {
            let block = &mut buffer[..(end - at) as usize];
            let n = read_block(file, block, at)?;
            read += n as u64;
            if n < block.len() {
                // It has become shorter: the next round will say so.
                block[n..].fill(0);
                certain = false;
            }
            sending.block(at, block, old)?;
        }
        at = end;
    }
    let sums = sending.sum.then_some(Sums { size, grains: sending.sums });
    Ok(Sent { sums, read, certain })
}

impl Sums {
    /// Those of these bytes, as far as there were so many.
    fn range(&self, from: u64, to: u64) -> &[u64] {
        let number = |at: u64| (at.div_ceil(GRAIN as u64) as usize).min(self.grains.len());
        &self.grains[number(from)..number(to)]
    }
}

struct Sending<'a, W> {
    /// Where there is data, and how far that was looked at.
    data: Vec<(u64, u64)>,
    at: usize,
    sums: Vec<u64>,
    /// Grains of the block that are alike: from where, and whether they are to be sent.
    run: Option<(u64, What)>,
    out: &'a mut W,
    went: &'a mut dyn FnMut(u64),
    /// Whether somebody wants the sums.
    sum: bool,
}

/// What is to be said of a grain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Nothing,
    Data,
    Hole,
}

impl<W: Write> Sending<'_, W> {
    /// Whether there is any data; asked in order.
    fn has_data(&mut self, from: u64, to: u64) -> bool {
        while self.data.get(self.at).is_some_and(|(start, length)| start + length <= from) {
            self.at += 1;
        }
        self.data.get(self.at).is_some_and(|(start, _)| *start < to)
    }

    fn hole(&mut self, from: u64, to: u64, old: Option<&[u64]>) -> Result<()> {
        // A sum that no grain with contents has but by chance, which only costs a hole.
        if old.is_some_and(|old| old.iter().any(|sum| *sum != 0)) {
            ops::write(self.out, &Step::Hole(from, to - from))?;
        }
        if self.sum {
            self.sums.resize(self.sums.len() + (to - from).div_ceil(GRAIN as u64) as usize, 0);
        }
        Ok(())
    }

    fn block(&mut self, at: u64, block: &[u8], old: Option<&[u64]>) -> Result<()> {
        for (i, grain) in block.chunks(GRAIN).enumerate() {
            let from = at + (i * GRAIN) as u64;
            let sum = match self.has_data(from, from + grain.len() as u64) {
                false => 0,
                true if self.sum => xxh3_64(grain).max(1),
                true => 1,
            };
            let what = match old.map(|old| old.get(i)) {
                Some(Some(was)) if *was == sum => What::Nothing,
                Some(Some(_)) if sum == 0 => What::Hole,
                // Nothing is there yet.
                _ if sum == 0 => What::Nothing,
                _ => What::Data,
            };
            if self.sum {
                self.sums.push(sum);
            }
            if self.run.is_none_or(|(_, before)| before != what) {
                self.end_run(at, block, from)?;
                self.run = Some((from, what));
            }
        }
        self.end_run(at, block, at + block.len() as u64)
    }

    /// Says what is to be said of the grains up to here.
    fn end_run(&mut self, at: u64, block: &[u8], to: u64) -> Result<()> {
        match self.run.take() {
            Some((from, What::Data)) => {
                ops::write(self.out, &Step::Data(from, (to - from) as u32))?;
                self.out.write_all(&block[(from - at) as usize..(to - at) as usize])?;
                (self.went)(to - from);
            }
            Some((from, What::Hole)) => ops::write(self.out, &Step::Hole(from, to - from))?,
            _ => {}
        }
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
