//! Shared memory that no file has: `MAP_SHARED | MAP_ANONYMOUS`, as PostgreSQL's buffers, before the freeze.
//!
//! CRIU writes all of it into its images while the container stands still. So Ferry reads it in rounds as it does
//! private memory, and CRIU is not shown it ([`crate::criu::hidden`]). Over there it is put in place as it
//! comes ([`super::shared_files`]), and CRIU maps what is there already ([`crate::criu::lent`]).
//!
//! What was written since the round before, a comparison of hashes tells: whoever wrote may have ended since, and
//! what a task's own page table says of shared pages has gone with it. So a round costs a read of all that is
//! populated; the last one, in the freeze, by several threads beside CRIU's dump.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow};
use nix::fcntl::{FcntlArg, fcntl};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::digest::contents;
use super::readers::{self, Readers};
use super::rounds::{MemoryRoundStats, Sink, is_zero};
use super::table::PageTable;
use crate::criu::lent::{self, LentFile};
use crate::sys::maps::{self, Mapping};
use crate::sys::memory::{self, PAGE};
use crate::sys::process::proc_text;

/// What is smaller takes CRIU no time.
const SMALLEST: u64 = 64 << 10;
/// Time that the last look at shared memory may take longer than CRIU's dump.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells whether frames of that number in place of a task's are of a segment.
pub fn is_segment(number: i32) -> bool {
    number < 0
}

/// A segment of which all is over there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedSegment {
    /// The file that stands for it.
    pub file: LentFile,
    /// Pages that are populated.
    pub pages: u64,
}

/// What the rounds have of shared memory, for whoever decides what CRIU sees.
#[derive(Clone, Debug, Default)]
pub struct SharedMemory(Arc<(Mutex<SharedState>, Condvar)>);

#[derive(Debug, Default)]
struct SharedState {
    /// Inodes of segments that went along in the latest round, and the numbers of their files over there.
    known: HashMap<u64, u32>,
    /// After the last round, by inode.
    placed: Option<HashMap<u64, PlacedSegment>>,
    gone: bool,
}

impl SharedMemory {
    fn state(&self) -> MutexGuard<'_, SharedState> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inodes of the segments that were read before the freeze, and the numbers of their files over there.
    pub fn known(&self) -> HashMap<u64, u32> {
        self.state().known.clone()
    }

    /// Returns what is over there, as soon as all was read in the freeze.
    ///
    /// # Errors
    /// When nobody reads it any more.
    pub fn placed(&self) -> Result<HashMap<u64, PlacedSegment>> {
        let waits = |state: &mut SharedState| state.placed.is_none() && !state.gone;
        let state = self.0.1.wait_timeout_while(self.state(), PATIENCE, waits);
        let (state, _) = state.unwrap_or_else(PoisonError::into_inner);
        state.placed.clone().ok_or_else(|| anyhow!("shared memory was not read in the freeze"))
    }

    /// Nobody wants them any more: whoever waits is not to wait until they are read.
    pub fn give_up(&self) {
        self.tell(|state| state.gone = true);
    }

    fn tell(&self, change: impl FnOnce(&mut SharedState)) {
        change(&mut self.state());
        self.0.1.notify_all();
    }
}

/// The source's half: segments, and what of them is over there.
#[derive(Debug)]
pub struct Segments {
    shared: SharedMemory,
    seed: u64,
    /// By inode: they are held open, so that no other one gets their numbers.
    all: BTreeMap<u64, Segment>,
    /// Numbers that are free, the next one last.
    free: Vec<u32>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    /// Of the file over there.
    number: u32,
    /// Of each page that is over there, or [`NONE`].
    hashes: PageTable<u64>,
    /// Pages that have one.
    known: u64,
}

/// Of a page that is not populated, and of one of zeros; others are larger.
const NONE: u64 = 0;
const ZEROS: u64 = 1;

/// A segment that some task has mapped.
#[derive(Debug)]
struct Mapped {
    /// By which it can be opened.
    place: PathBuf,
    end: u64,
}

impl Drop for Segments {
    fn drop(&mut self) {
        self.shared.give_up();
    }
}

impl Segments {
    /// None so far; tells `shared` what there is. With hashes that nobody in the container can know.
    pub fn new(shared: SharedMemory, seed: u64) -> Segments {
        Segments { shared, seed, all: BTreeMap::new(), free: (1..=lent::MOST).rev().collect() }
    }

    /// A round over the segments that these processes have mapped, which may be running.
    ///
    /// # Errors
    /// When the sink fails, or a segment cannot be read.
    pub fn round(&mut self, processes: &[i32], sink: &mut dyn Sink) -> Result<MemoryRoundStats> {
        let device = memory::shared_device()?;
        let mut mapped = mapped(processes)?;
        let held = if mapped.is_empty() { HashSet::new() } else { held(processes, device) };
        mapped.retain(|inode, one| one.end * PAGE as u64 >= SMALLEST && !held.contains(inode));
        let mut sum = MemoryRoundStats::default();
        let (kept, gone) = std::mem::take(&mut self.all)
            .into_iter()
            .partition(|(inode, _)| mapped.contains_key(inode));
        let gone: BTreeMap<u64, Segment> = gone;
        self.all = kept;
        for (inode, one) in mapped {
            if !self.all.contains_key(&inode)
                && let Some(file) = open(&one.place, device, inode)
                && let Some(number) = self.free.pop()
            {
                self.all.insert(inode, Segment::new(file, number));
            }
        }

        for segment in self.all.values_mut() {
            // What runs is to have the processors.
            sum.add(segment.hand_on(Readers::One, self.seed, sink)?);
        }
        // Their files are empty, and another's, when all of this round has arrived.
        for mut segment in gone.into_values() {
            segment.drop_holes(&[], sink, &mut sum)?;
            self.free.push(segment.number);
        }
        let known = self.all.iter().map(|(inode, segment)| (*inode, segment.number)).collect();
        self.shared.tell(|state| state.known = known);

        Ok(sum)
    }

    /// The last one: the tasks are frozen. Only of segments that earlier rounds know.
    ///
    /// # Errors
    /// As [`Segments::round`].
    pub fn last_round(
        &mut self,
        processes: &[i32],
        sink: &mut dyn Sink,
    ) -> Result<MemoryRoundStats> {
        let mut sum = MemoryRoundStats::default();
        let mapped = if self.all.is_empty() { HashMap::new() } else { mapped(processes)? };
        let mut placed = HashMap::new();
        for (inode, segment) in &mut self.all {
            // What nobody has mapped any more, nobody will ask for.
            if mapped.contains_key(inode) {
                sum.add(segment.hand_on(Readers::Several, self.seed, sink)?);
                placed.insert(*inode, segment.placed()?);
            }
        }
        self.shared.tell(|state| state.placed = Some(placed));
        Ok(sum)
    }
}

impl Segment {
    fn new(file: File, number: u32) -> Segment {
        Segment { file, number, hashes: PageTable::new(NONE), known: 0 }
    }

    /// Hands on what has another content than over there: all of it, as what no task has mapped at the moment
    /// may come to light again (mremap(2)).
    fn hand_on(
        &mut self,
        readers: Readers,
        seed: u64,
        sink: &mut dyn Sink,
    ) -> Result<MemoryRoundStats> {
        let mut stats = MemoryRoundStats::default();
        let populated = contents(&self.file, self.file.metadata()?.len())?;
        let file = self.file.try_clone()?;
        readers::read(
            &file,
            &populated,
            readers,
            |page| hash(page, seed),
            &mut |first, bytes, hashes| self.compare(first, bytes, hashes, sink, &mut stats),
        )?;
        self.drop_holes(&populated, sink, &mut stats)?;
        Ok(stats)
    }

    /// Hands on those of neighbouring pages that are others over there: those of one kind together.
    fn compare(
        &mut self,
        first: u64,
        bytes: &[u8],
        hashes: &[u64],
        sink: &mut dyn Sink,
        stats: &mut MemoryRoundStats,
    ) -> Result<()> {
        stats.scanned += hashes.len() as u64;
        let (number, mut from) = (-(self.number as i32), 0);
        while from < hashes.len() {
            let zero = hashes[from] == ZEROS;
            if !self.note(first + from as u64, hashes[from]) {
                stats.unchanged += 1;
                from += 1;
                continue;
            }

            let mut to = from + 1;
            while to < hashes.len()
                && (hashes[to] == ZEROS) == zero
                && self.note(first + to as u64, hashes[to])
            {
                to += 1;
            }
            let (at, pages) = ((first + from as u64) * PAGE as u64, to - from);
            if zero {
                stats.zero += pages as u64;
                sink.zeros(number, at, pages)?;
            } else {
                stats.sent += pages as u64;
                sink.pages(number, at, &bytes[from * PAGE..to * PAGE])?;
            }
            from = to;
        }
        Ok(())
    }

    /// Notes what a page is over there from now on; whether it was another one.
    fn note(&mut self, page: u64, hash: u64) -> bool {
        let before = std::mem::replace(self.hashes.at(0, page), hash);
        self.known += u64::from(before == NONE);
        before != hash
    }

    /// Pages that are populated no more (MADV_REMOVE) are holes over there, too.
    fn drop_holes(
        &mut self,
        populated: &[(u64, u64)],
        sink: &mut dyn Sink,
        stats: &mut MemoryRoundStats,
    ) -> Result<()> {
        let there: u64 = populated.iter().map(|(start, end)| (end - start) / PAGE as u64).sum();
        if self.known == there {
            return Ok(());
        }
        let mut gone = self.hashes.others(0, NONE);
        gone.retain(|page| {
            let at = page * PAGE as u64;
            let next = populated.partition_point(|(_, end)| *end <= at);
            populated.get(next).is_none_or(|(start, _)| *start > at)
        });

        for run in gone.chunk_by(|one, next| one + 1 == *next) {
            sink.zeros(-(self.number as i32), run[0] * PAGE as u64, run.len())?;
            stats.zero += run.len() as u64;
            run.iter().for_each(|page| *self.hashes.at(0, *page) = NONE);
        }
        self.known -= gone.len() as u64;
        Ok(())
    }

    fn placed(&self) -> Result<PlacedSegment> {
        let file = LentFile { number: self.number, bytes: self.file.metadata()?.len() };
        Ok(PlacedSegment { file, pages: self.known })
    }
}

fn hash(page: &[u8], seed: u64) -> u64 {
    if is_zero(page) { ZEROS } else { xxh3_64_with_seed(page, seed) | 2 }
}

/// Segments that some of these processes have mapped, by inode.
fn mapped(processes: &[i32]) -> Result<HashMap<u64, Mapped>> {
    let mut found: HashMap<u64, Mapped> = HashMap::new();
    for pid in processes {
        let text = match proc_text(*pid, "maps") {
            Ok(text) => text,
            // It has ended.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => continue,
            Err(e) => return Err(e.into()),
        };
        for mapping in maps::parse(&text).filter(Mapping::is_nameless) {
            let Mapping { start, end, offset, inode, .. } = mapping;
            let place = || format!("/proc/{pid}/map_files/{start:x}-{end:x}").into();
            let one = found.entry(inode).or_insert_with(|| Mapped { place: place(), end: 0 });
            one.end = one.end.max((offset.saturating_add(end - start)) / PAGE as u64);
        }
    }
    Ok(found)
}

/// Opens a segment; none where that is another one by now, or a memfd of a program's own, which may have seals.
fn open(place: &Path, device: u64, inode: u64) -> Option<File> {
    // Where that is not allowed, CRIU takes care of it.
    let file = File::open(place)
        .inspect_err(|e| tracing::debug!("shared memory at {}: {e}", place.display()))
        .ok()?;
    let meta = file.metadata().ok()?;
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS);
    let sealed = seals.is_ok_and(|seals| seals != libc::F_SEAL_SEAL);
    let is_it = meta.is_file() && (meta.dev(), meta.ino()) == (device, inode);
    (is_it && !sealed).then_some(file)
}

/// Inodes of memory of which one of these processes has a descriptor: CRIU has to see that.
fn held(processes: &[i32], device: u64) -> HashSet<u64> {
    let mut found = HashSet::new();
    for pid in processes {
        let Ok(list) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in list.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let may_be =
                |name: &str| target.as_os_str().as_encoded_bytes().starts_with(name.as_bytes());
            if (may_be("/memfd:") || may_be("/dev/zero"))
                && let Ok(meta) = fs::metadata(entry.path())
                && meta.dev() == device
            {
                found.insert(meta.ino());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::fcntl::{FallocateFlags, fallocate};

    use super::super::digest::read_padded;
    use super::super::shared_files::SharedFiles;
    use super::*;

    const PAGES: u64 = 700;
    const NUMBER: u32 = 3;

    /// Files over there, one of them to look at, and how many pages came with contents.
    struct Over(SharedFiles, File, usize);

    impl Sink for Over {
        fn pages(&mut self, number: i32, at: u64, bytes: &[u8]) -> Result<()> {
            assert!(bytes.len() <= 256 * PAGE);
            self.2 += bytes.len() / PAGE;
            self.0.put(number, at, bytes)
        }
        fn zeros(&mut self, number: i32, at: u64, pages: usize) -> Result<()> {
            self.0.put_zeros(number, at, pages)
        }
        fn same(&mut self, _: i32, _: u64, _: (i32, u64), _: usize) -> Result<()> {
            unreachable!("shared memory is not like anything")
        }
        fn remote(&mut self, _: i32, _: u64, _: usize) -> Result<()> {
            unreachable!("shared memory does not stay")
        }
    }

    fn over() -> Over {
        let files = SharedFiles::new(u64::MAX).unwrap();
        let one = files.descriptors().unwrap().swap_remove(NUMBER as usize - 1);
        Over(files, one.into(), 0)
    }

    fn segment() -> Segment {
        let file = memory::memory_file(c"test").unwrap();
        file.set_len(PAGES * PAGE as u64).unwrap();
        Segment::new(file, NUMBER)
    }

    fn write(segment: &Segment, page: u64, value: u8) {
        segment.file.write_all_at(&[value; PAGE], page * PAGE as u64).unwrap();
    }

    fn punch(segment: &Segment, page: u64, pages: u64) {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, bytes) = ((page * PAGE as u64) as i64, (pages * PAGE as u64) as i64);
        fallocate(&segment.file, how, at, bytes).unwrap();
    }

    /// What tasks find over there is what the segment is; what has contents there has some here.
    fn is_there(segment: &Segment, over: &mut Over) {
        over.0.finish(&[segment.placed().unwrap().file]).unwrap();
        let size = segment.file.metadata().unwrap().len();
        assert_eq!(over.1.metadata().unwrap().len(), size);
        let (mut here, mut there) = ([0; PAGE], [0; PAGE]);
        for at in (0..size).step_by(PAGE) {
            read_padded(&segment.file, &mut here, at).unwrap();
            read_padded(&over.1, &mut there, at).unwrap();
            assert!(here == there, "page {}", at / PAGE as u64);
        }
        let has = |file, at: u64| {
            let populated = contents(file, size).unwrap();
            populated.iter().any(|(start, end)| (*start..*end).contains(&at))
        };
        let more = |at: &u64| has(&over.1, *at) && !has(&segment.file, *at);
        assert_eq!((0..size).step_by(PAGE).find(more), None);
    }

    #[test]
    fn only_what_has_changed_goes() {
        let (mut over, mut segment) = (over(), segment());
        for page in (0..300).chain(400..410) {
            write(&segment, page, (page as u8).wrapping_add(1));
        }
        let mut round = |segment: &mut Segment, readers| {
            let stats = segment.hand_on(readers, 7, &mut over).unwrap();
            (stats.scanned, stats.sent, stats.zero, stats.unchanged)
        };

        // One of them is all zero: 255 + 1.
        assert_eq!(round(&mut segment, Readers::One), (310, 309, 1, 0));
        assert_eq!(round(&mut segment, Readers::One), (310, 0, 0, 310));
        write(&segment, 3, 77);
        write(&segment, 401, 0);
        write(&segment, 350, 9);
        punch(&segment, 10, 20);
        // What is a hole now, is told, too.
        assert_eq!(round(&mut segment, Readers::Several), (291, 2, 21, 288));
        assert_eq!(round(&mut segment, Readers::Several), (291, 0, 0, 291));
        assert_eq!(segment.placed().unwrap().pages, 291);
        is_there(&segment, &mut over);
        assert_eq!(over.2, 311);
    }

    #[test]
    fn any_sequence_of_changes_gives_equal_contents() {
        let (mut over, mut segment) = (over(), segment());
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..60 {
            for _ in 0..next(40) {
                let (page, pages) = (next(PAGES), next(60) + 1);
                let pages = pages.min(PAGES - page);
                match next(3) {
                    0 => punch(&segment, page, pages),
                    _ => (page..page + pages).for_each(|page| write(&segment, page, next(3) as u8)),
                }
            }
            let readers = if next(2) == 0 { Readers::One } else { Readers::Several };
            segment.hand_on(readers, 7, &mut over).unwrap();
            is_there(&segment, &mut over);
        }
    }

    #[test]
    fn who_waits_for_a_last_round_hears_that_there_is_none() {
        let shared = SharedMemory::default();
        drop(Segments::new(shared.clone(), 7));
        assert!(shared.placed().is_err());

        // A dump that is given up while the last round goes on: not after all of its patience.
        let (shared, began) = (SharedMemory::default(), std::time::Instant::now());
        let segments = Segments::new(shared.clone(), 7);
        let waits = shared.clone();
        let waiting = std::thread::spawn(move || waits.placed().is_err());
        shared.give_up();
        assert!(waiting.join().unwrap() && began.elapsed() < PATIENCE / 2);
        drop(segments);

        let shared = SharedMemory::default();
        let mut segments = Segments::new(shared.clone(), 7);
        segments.last_round(&[], &mut over()).unwrap();
        assert!(shared.placed().unwrap().is_empty());
    }
}
