//! Which parts of some very large files were written to, told by the kernel as their pages become
//! dirty: so that no round but the first has to read all of them.
//!
//! A page that is written to while it is dirty is not told of again. So before a file is read its
//! dirty pages go to the disk; what is written after that is told of, and read once more.
//!
//! This holds where everything that changes a file's contents passes the page cache, or is told of
//! otherwise: on ext4, where direct writes and changes of a file's layout have points of their own.
//! Not with `data=journal` or DAX.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use anyhow::Result;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use super::contents::Touched;
use super::ops::BLOCK;
use crate::sys::memory::PAGE;
use crate::sys::tracepoint::{self, Traced, Tracing};

/// Smaller files are read faster than it pays.
const VERY_LARGE: u64 = 64 << 20;
/// Most files that are asked for: the kernel compares each page with each.
const MOST_FILES: usize = 16;
/// Most blocks of one.
const MOST_BLOCKS: usize = 1 << 20;
/// Bytes for each processor to tell in, some 20,000 pages.
const ROOM: usize = 1 << 20;
/// Pages that the largest folio has: `MAX_PAGECACHE_ORDER` of include/linux/pagemap.h.
const LARGEST_FOLIO: u64 = 512;

/// A page, or a folio of several, has become dirty. All other points tell of what goes another way,
/// and before it is done: a file to which that happens is not followed any more.
const DIRTY: usize = 0;
const POINTS: [(&str, &str, &[&str]); 7] = [
    ("writeback", "writeback_dirty_folio", &["ino", "index"]),
    ("iomap", "iomap_dio_rw_begin", &["ino"]),
    ("ext4", "ext4_fallocate_enter", &["ino", "mode"]),
    ("ext4", "ext4_punch_hole", &["ino"]),
    ("ext4", "ext4_zero_range", &["ino"]),
    ("ext4", "ext4_collapse_range", &["ino"]),
    ("ext4", "ext4_insert_range", &["ino"]),
];
/// `FALLOC_FL_KEEP_SIZE`: by itself it changes nothing that can be read.
const KEEP_SIZE: u64 = 1;

/// Hears of writes to the files that it was told to.
#[derive(Debug)]
pub(super) struct Writes {
    tracing: Tracing,
    /// By inode.
    files: HashMap<u64, WrittenBlocks>,
    /// What was written to otherwise.
    unfit: HashSet<u64>,
    /// Something was missed.
    lost: bool,
}

/// Blocks of a file, by number.
#[derive(Debug, Default)]
pub(super) struct WrittenBlocks {
    blocks: HashSet<u64>,
}

impl Touched for WrittenBlocks {
    fn any(&self, from: u64, to: u64) -> bool {
        let blocks = from / BLOCK as u64..to.div_ceil(BLOCK as u64);
        blocks.into_iter().any(|block| self.blocks.contains(&block))
    }
}

impl WrittenBlocks {
    /// Of a folio only the beginning is told; it lies at a multiple of its size.
    fn folio(&mut self, at: u64) {
        let most = at & at.wrapping_neg();
        let pages = if at == 0 { LARGEST_FOLIO } else { most.min(LARGEST_FOLIO) };
        let in_block = (BLOCK / PAGE) as u64;
        self.blocks.extend(at / in_block..at.saturating_add(pages).div_ceil(in_block));
    }

    /// Adds what another one has.
    pub(super) fn add(&mut self, other: &WrittenBlocks) {
        self.blocks.extend(&other.blocks);
    }
}

impl Writes {
    /// Hears of no file yet.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(super) fn new() -> Result<Writes> {
        let tracing = Tracing::open(tracepoint::find(&POINTS)?, ROOM)?;
        Ok(Writes { tracing, files: HashMap::new(), unfit: HashSet::new(), lost: false })
    }

    /// Tells whether this file can be asked for, and pays.
    pub(super) fn suits(file: &File) -> bool {
        let large = file.metadata().is_ok_and(|m| m.size() >= VERY_LARGE);
        large
            && fstatfs(file).is_ok_and(|s| s.filesystem_type() == EXT4_SUPER_MAGIC)
            && file.metadata().is_ok_and(|m| passes_the_cache(m.dev()))
    }

    /// Asks for one more file; whether what is written to it is heard from now on.
    pub(super) fn follow(&mut self, ino: u64) -> bool {
        if self.files.contains_key(&ino) {
            return true;
        }
        if self.files.len() >= MOST_FILES || self.unfit.contains(&ino) {
            return false;
        }
        let all = self.files.keys().chain([&ino]);
        let filter: Vec<String> = all.map(|ino| format!("ino == {ino}")).collect();
        let heard = self.tracing.only(&filter.join(" || "));
        if let Err(e) = &heard {
            tracing::debug!("writes are not followed: {e}");
            return false;
        }
        self.files.insert(ino, WrittenBlocks::default());
        true
    }

    /// Says what is known to have been written to a file once more at the next call.
    pub(super) fn remember(&mut self, ino: u64, heard: &WrittenBlocks) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.add(heard);
        }
    }

    /// Returns what was written to a file since the last call; none if that is not known.
    pub(super) fn take(&mut self, ino: u64) -> Option<WrittenBlocks> {
        self.drain();
        if self.lost {
            // Whoever asks from now on begins anew.
            self.files.clear();
            self.lost = false;
        }
        self.files.get_mut(&ino).map(std::mem::take)
    }

    /// Makes room for more to be heard.
    pub(super) fn drain(&mut self) {
        let (files, unfit, lost) = (&mut self.files, &mut self.unfit, &mut self.lost);
        self.tracing.read(&mut |traced| match traced {
            Traced::Lost => *lost = true,
            Traced::Hit(DIRTY, &[ino, index]) => {
                if let Some(file) = files.get_mut(&ino) {
                    file.folio(index);
                    *lost |= file.blocks.len() > MOST_BLOCKS;
                }
            }
            Traced::Hit(_, &[_, mode]) if mode & !KEEP_SIZE == 0 => {}
            Traced::Hit(_, values) => {
                let followed = values.first().filter(|ino| files.remove(ino).is_some());
                unfit.extend(followed);
            }
        });
    }

    /// Readable when there is much to hear.
    pub(super) fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.tracing.wakers()
    }
}

/// Tells whether the file system of this device was mounted without what makes writes go another way.
fn passes_the_cache(device: u64) -> bool {
    let device = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut options = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        (words.nth(2)? == device).then(|| words.next_back())?
    });
    let odd = |options: &str| {
        options.split(',').any(|o| o == "data=journal" || o == "dax" || o == "dax=always")
    };
    options.next().is_some_and(|first| !odd(first)) && !options.any(odd)
}
