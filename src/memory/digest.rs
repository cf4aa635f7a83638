//! Digests of a container's memory, page by page: the source tells those of its frozen tasks, and the
//! destination compares them with the memory of the tasks that it has restored, before any of them runs.
//!
//! Told are all populated pages of private mappings, whoever carried them: those that Ferry did and those
//! that went in CRIU's images; and what memory is shared (`MAP_SHARED | MAP_ANONYMOUS`, System V,
//! memfd_create(2)), once. Not told are pages that are a file's own, and what the kernel maps for itself
//! (the vDSO). A page that is not populated counts as zeros.
//!
//! Memory that changes without the task running is masked on both sides: [`Mask`].

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::pages::{self, Reader, Task, is_kernels};
use crate::criu::vdso::Foreign;
use crate::sys::maps::{self, Mapping};
use crate::sys::memory::{self, PAGE};
use crate::sys::process::proc_text;

/// The name under which records come over the link, several in each piece.
pub const STREAM: &str = "digests";
/// Pages read at a time: 1 MiB.
pub(super) const BATCH: usize = 256;
/// Digests that go in one piece.
const PIECE: usize = 8 << 10;
/// Most records that go in one piece: a range that is empty has no digest.
const RECORDS: usize = 1 << 10;
/// Most masked places: two for each thread of a large container.
pub const MOST_MASKS: usize = 100_000;
/// Most bytes of one: an area for restartable sequences is some dozens of bytes long.
const LONGEST_MASK: u64 = 1024;

/// No task has memory from here on.
pub(super) const END: u64 = 1 << 57;

/// Bytes that the kernel writes to without the task running: its area for restartable sequences, in which
/// it keeps the number of the CPU. rseq(2)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mask {
    /// The process, as the container numbers it.
    pub vpid: i32,
    /// The first byte.
    pub at: u64,
    /// Number of them.
    pub length: u64,
}

/// A seed that nobody can foresee.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's own source of randomness, one key a process.
    std::hash::RandomState::new().build_hasher().finish()
}

/// What the source tells, in the order of addresses within each task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DigestRecord {
    /// A private mapping of a task. Those of its pages follow that are populated.
    Range {
        /// The process, as the container numbers it.
        vpid: i32,
        /// Its first byte.
        start: u64,
        /// One past its last.
        end: u64,
    },
    /// Neighbouring pages of the latest range.
    Pages {
        /// Where the first is.
        start: u64,
        /// Their digests.
        digests: Vec<u64>,
    },
    /// Shared memory. Those of its pages follow that have contents.
    Shared {
        /// A process that has it mapped, as the container numbers it.
        vpid: i32,
        /// Address.
        at: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// Neighbouring pages of the latest shared memory.
    Data {
        /// Where the first is, in bytes.
        offset: u64,
        /// Their digests.
        digests: Vec<u64>,
    },
    /// That was all.
    End {
        /// So many pages were told.
        pages: u64,
    },
}

/// How a page becomes a digest.
#[derive(Debug)]
pub struct Digester {
    seed: u64,
    /// By task and page number: first byte in the page, and how many.
    masks: HashMap<(i32, u64), Vec<(usize, usize)>>,
}

impl Digester {
    /// With a seed that nobody in the container can know.
    ///
    /// # Errors
    /// When there are more masks than a container can need, or one is too long.
    pub fn new(seed: u64, masks: &[Mask]) -> Result<Digester> {
        let is_wrong =
            |mask: &Mask| mask.length > LONGEST_MASK || mask.at.saturating_add(mask.length) > END;
        if masks.len() > MOST_MASKS || masks.iter().any(is_wrong) {
            bail!("{} places that are not to be compared, or nonsense", masks.len());
        }
        let mut all: HashMap<(i32, u64), Vec<(usize, usize)>> = HashMap::new();
        for mask in masks {
            let (mut at, end) = (mask.at, mask.at + mask.length);
            while at < end {
                let page = at / PAGE as u64;
                let next = end.min((page + 1) * PAGE as u64);
                let within = ((at % PAGE as u64) as usize, (next - at) as usize);
                all.entry((mask.vpid, page)).or_default().push(within);
                at = next;
            }
        }
        Ok(Digester { seed, masks: all })
    }

    /// The digest of a page of a task, whose masked bytes are made zero.
    pub fn page(&self, vpid: i32, at: u64, bytes: &mut [u8]) -> u64 {
        self.mask(vpid, at, bytes);
        self.plain(bytes)
    }

    /// The digest of bytes as they are.
    pub fn plain(&self, bytes: &[u8]) -> u64 {
        xxh3_64_with_seed(bytes, self.seed)
    }

    /// Makes the masked bytes of a page zero.
    pub fn mask(&self, vpid: i32, at: u64, bytes: &mut [u8]) {
        for &(from, length) in self.masks.get(&(vpid, at / PAGE as u64)).into_iter().flatten() {
            bytes[from..from + length].fill(0);
        }
    }
}

/// Tells the memory of frozen tasks, in pieces. How many pages.
///
/// # Errors
/// When a task has ended, a page cannot be read, or `say` fails.
pub fn tell(
    tasks: &[Task],
    digester: &Digester,
    say: &mut dyn FnMut(&[DigestRecord]) -> Result<()>,
) -> Result<u64> {
    let mut teller = Teller { digester, say, records: Vec::new(), waiting: 0, pages: 0 };
    let mut told = HashSet::new();
    for &task in tasks {
        let text = proc_text(task.pid, "maps")?;
        let reader = Reader::open(task.pid)?;
        // Another kernel's vDSO has jumps in it to the one's that is there: others on each host.
        let foreign = Foreign::of(task.pid, &text);
        let jumps = |mapping: &Mapping| {
            mapping.is_anonymous() && foreign.is_some_and(|vdso| vdso.begins_at(mapping.start))
        };
        for mapping in maps::parse(&text).filter(|one| !is_kernels(one) && !jumps(one)) {
            if !mapping.is_shared() {
                teller.range(task, &reader, (mapping.start, mapping.end))?;
            } else if let Some(shared) = shared_memory(task.pid, &mapping)? {
                let meta = shared.metadata()?;
                if told.insert((meta.dev(), meta.ino())) {
                    teller.shared(task.vpid, mapping.start, &shared, meta.len())?;
                }
            }
        }
    }

    let pages = teller.pages;
    teller.add(DigestRecord::End { pages }, 0)?;
    teller.flush()?;

    Ok(pages)
}

struct Teller<'a> {
    digester: &'a Digester,
    say: &'a mut dyn FnMut(&[DigestRecord]) -> Result<()>,
    records: Vec<DigestRecord>,
    /// Digests in these.
    waiting: usize,
    pages: u64,
}

impl Teller<'_> {
    fn add(&mut self, record: DigestRecord, digests: usize) -> Result<()> {
        self.records.push(record);
        self.waiting += digests;
        self.pages += digests as u64;
        if self.waiting >= PIECE || self.records.len() >= RECORDS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        (self.say)(&self.records)?;
        self.records.clear();
        self.waiting = 0;
        Ok(())
    }

    fn range(&mut self, task: Task, reader: &Reader, (start, end): (u64, u64)) -> Result<()> {
        self.add(DigestRecord::Range { vpid: task.vpid, start, end }, 0)?;
        let mut buffer = vec![0; BATCH * PAGE];
        for region in pages::populated_in(task.pid, &[(start, end)])? {
            for (at, count) in batches(region.start, region.end) {
                let bytes = &mut buffer[..count * PAGE];
                let mut missing = None;
                reader.read(&[(at, count)], bytes, |i| missing = Some(i))?;
                if let Some(i) = missing {
                    bail!(
                        "page {:#x} of task {} cannot be read",
                        at + (i * PAGE) as u64,
                        task.vpid
                    );
                }
                let digests = (at..).step_by(PAGE).zip(bytes.chunks_exact_mut(PAGE));
                let digests = digests.map(|(at, page)| self.digester.page(task.vpid, at, page));
                let digests = digests.collect();
                self.add(DigestRecord::Pages { start: at, digests }, count)?;
            }
        }
        Ok(())
    }

    fn shared(&mut self, vpid: i32, at: u64, file: &File, size: u64) -> Result<()> {
        self.add(DigestRecord::Shared { vpid, at, size }, 0)?;
        let mut buffer = vec![0; BATCH * PAGE];
        for (start, end) in contents(file, size)? {
            for (offset, count) in batches(start, end) {
                read_padded(file, &mut buffer[..count * PAGE], offset)?;
                let pages = buffer[..count * PAGE].chunks_exact(PAGE);
                let digests = pages.map(|page| self.digester.plain(page)).collect();
                self.add(DigestRecord::Data { offset, digests }, count)?;
            }
        }
        Ok(())
    }
}

/// A region in pieces that are read at once: where each begins, and its pages.
pub(super) fn batches(start: u64, end: u64) -> impl Iterator<Item = (u64, usize)> {
    let step = BATCH * PAGE;
    (start..end).step_by(step).map(move |at| {
        let bytes = (end - at).min(step as u64) as usize;
        (at, bytes.div_ceil(PAGE))
    })
}

/// Returns what is behind a shared mapping, if that is memory and no file: an inode of the kernel's own tmpfs,
/// which nobody has mounted. None, too, where the task has unmapped it since it was listed.
///
/// # Errors
/// When it cannot be opened. Needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`; proc_pid_map_files(5).
pub(super) fn shared_memory(pid: i32, mapping: &Mapping<'_>) -> Result<Option<File>> {
    // The names are the kernel's, and anybody's: whoever has another one is spared the look.
    let names = ["/dev/zero", "/SYSV", "/memfd:"];
    if !names.iter().any(|name| mapping.name.starts_with(name)) {
        return Ok(None);
    }
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot look at {path}")),
    };
    if meta.dev() != memory::shared_device()? {
        return Ok(None);
    }
    Ok(Some(File::open(&path).with_context(|| format!("cannot open {path}"))?))
}

/// Returns where a file of that size has contents, in whole pages: a hole has none, and reading it is not to
/// make it.
pub(super) fn contents(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    use nix::unistd::{Whence, lseek64};
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek64(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64 / PAGE as u64 * PAGE as u64,
            Err(nix::errno::Errno::ENXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = lseek64(file, start as i64, Whence::SeekHole)? as u64;
        let end = end.min(size).next_multiple_of(PAGE as u64);
        found.push((start, end));
        at = end;
    }
    Ok(found)
}

/// Reads that many bytes; behind the file's end there are zeros.
pub(super) fn read_padded(file: &File, into: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    into[done..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_bytes_do_not_count_and_others_do() {
        let mask = Mask { vpid: 7, at: 0x1ff0, length: 32 };
        let digester = Digester::new(1, &[mask]).unwrap();
        let digest = |vpid, at, changed: usize| {
            let mut page = [3; PAGE];
            page[changed] = 9;
            digester.page(vpid, at, &mut page)
        };
        // The last sixteen bytes of one page, and the first of the next.
        assert_eq!(digest(7, 0x1000, 4080), digest(7, 0x1000, 4095));
        assert_ne!(digest(7, 0x1000, 4079), digest(7, 0x1000, 4078));
        assert_eq!(digest(7, 0x2000, 0), digest(7, 0x2000, 15));
        assert_ne!(digest(7, 0x2000, 16), digest(7, 0x2000, 17));
        assert_ne!(digest(8, 0x1000, 4080), digest(8, 0x1000, 4095));
        let other = Digester::new(2, &[]).unwrap();
        assert_ne!(other.plain(&[1; PAGE]), digester.plain(&[1; PAGE]));
        assert!(Digester::new(0, &[Mask { length: 1 << 20, ..mask }]).is_err());
        assert!(Digester::new(0, &[Mask { at: u64::MAX - 3, ..mask }]).is_err());
    }

    #[test]
    fn regions_are_cut_into_pieces() {
        let step = (BATCH * PAGE) as u64;
        let list: Vec<_> = batches(step, 2 * step + 1).collect();
        assert_eq!(list, [(step, BATCH), (2 * step, 1)]);
        assert_eq!(batches(5, 5).count(), 0);
    }
}
