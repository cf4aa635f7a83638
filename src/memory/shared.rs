//! Shared memory that no file has: `MAP_SHARED | MAP_ANONYMOUS`, as PostgreSQL's buffers, before the freeze.
//!
//! CRIU writes all of it into its images while the container stands still. So Ferry reads it in rounds as it does
//! private memory, and CRIU is not shown it ([`crate::criu::hidden`]). It goes into a file over there, which is
//! the pages image from which CRIU fills it in the restore.
//!
//! ```text
//! a segment   page 0  1  2  3  4  5  …      what is populated gets a slot, in the order in which it is found
//!                  │     ╲  │
//! its image   slot 0  1   2   …             without gaps, as CRIU reads them; pagemap-shmem says which is which
//! ```
//!
//! What was written since the round before, a comparison of hashes tells: whoever wrote may have ended since, and
//! what a task's own page table says of shared pages has gone with it. So a round costs a read of all that is
//! populated, 10 GB/s and more, the last one beside CRIU's dump.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::digest::{contents, read_padded};
use super::rounds::{MemoryRoundStats, Sink, is_zero};
use super::table::PageTable;
use crate::sys::maps::{self, Mapping};
use crate::sys::memory::{self, PAGE};
use crate::sys::process::proc_text;

/// Most segments that go before the freeze; CRIU takes care of others.
const MOST: i32 = 64;
/// What is smaller takes CRIU no time.
const SMALLEST: u64 = 64 << 10;
/// Pages read at a time.
const BATCH: usize = 256;
/// Numbers of pages images from here on are Ferry's; CRIU counts its own from 1.
const FIRST_IMAGE: u32 = 0x4000_0000;
/// Time that the last look at shared memory may take longer than CRIU's dump.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tells whether frames of that number in place of a task's are of a segment.
pub fn is_segment(number: i32) -> bool {
    number < 0
}

/// The segment whose frames have that number: its pages image.
fn image(number: i32) -> u32 {
    FIRST_IMAGE + number.unsigned_abs()
}

fn file_name(number: i32) -> String {
    format!("pages-{}.img", image(number))
}

/// Where a segment's pages are when all of them are over there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedPages {
    /// Number of its pages image.
    pub image: u32,
    /// Page of the segment, and how many follow it: in the order of the image.
    pub runs: Vec<(u64, u64)>,
}

impl PlacedPages {
    /// One past the last page.
    pub fn end(&self) -> u64 {
        self.runs.iter().map(|(page, pages)| page + pages).max().unwrap_or(0)
    }
}

/// What the rounds have of shared memory, for whoever decides what CRIU sees.
#[derive(Clone, Debug, Default)]
pub struct SharedMemory(Arc<(Mutex<SharedState>, Condvar)>);

#[derive(Debug, Default)]
struct SharedState {
    /// Inodes of segments that went along in the latest round.
    known: HashSet<u64>,
    /// After the last round, by inode.
    placed: Option<HashMap<u64, PlacedPages>>,
    gone: bool,
}

impl SharedMemory {
    fn state(&self) -> MutexGuard<'_, SharedState> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inodes of the segments that were read before the freeze.
    pub fn known(&self) -> HashSet<u64> {
        self.state().known.clone()
    }

    /// Returns where their pages are, as soon as all were read in the freeze.
    ///
    /// # Errors
    /// When nobody reads them any more.
    pub fn placed(&self) -> Result<HashMap<u64, PlacedPages>> {
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
    numbers: i32,
}

#[derive(Debug)]
struct Segment {
    file: File,
    /// Instead of a task's in frames: -1, -2 ...
    number: i32,
    /// Pages up to here are mapped.
    end: u64,
    slots: Vec<SharedPage>,
    /// Of each page, or [`NO_SLOT`].
    slot_of: PageTable<u32>,
    round: u32,
}

#[derive(Clone, Copy, Debug)]
struct SharedPage {
    page: u64,
    /// Of what is over there.
    hash: u64,
    /// When it was last seen populated.
    round: u32,
}

/// Of nothing, and of a page of zeros; others are larger.
const NONE: u64 = 0;
const ZEROS: u64 = 1;
/// Of a page that has none.
const NO_SLOT: u32 = u32::MAX;

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
        Segments { shared, seed, all: BTreeMap::new(), numbers: 0 }
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
        self.all.retain(|inode, _| mapped.contains_key(inode));
        for (inode, one) in mapped {
            if let Some(segment) = self.all.get_mut(&inode) {
                segment.end = one.end;
            } else if self.numbers < MOST
                && let Some(file) = open(&one.place, device, inode)
            {
                self.numbers += 1;
                self.all.insert(inode, Segment::new(file, -self.numbers, one.end));
            }
        }

        let mut sum = MemoryRoundStats::default();
        for segment in self.all.values_mut() {
            sum.add(segment.hand_on(self.seed, sink)?);
        }
        let known = self.all.keys().copied().collect();
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
            let Some(one) = mapped.get(inode) else { continue };
            segment.end = one.end;
            sum.add(segment.hand_on(self.seed, sink)?);
            placed.insert(*inode, segment.placed());
        }
        self.shared.tell(|state| state.placed = Some(placed));
        Ok(sum)
    }
}

impl Segment {
    fn new(file: File, number: i32, end: u64) -> Segment {
        let (slots, slot_of) = (Vec::new(), PageTable::new(NO_SLOT));
        Segment { file, number, end, slots, slot_of, round: 0 }
    }

    /// Hands on what has another content than over there.
    fn hand_on(&mut self, seed: u64, sink: &mut dyn Sink) -> Result<MemoryRoundStats> {
        self.round += 1;
        let mut stats = MemoryRoundStats::default();
        let mut buffer = vec![0; BATCH * PAGE];
        let size = self.file.metadata()?.len().min(self.end * PAGE as u64);
        for (start, end) in contents(&self.file, size)? {
            for at in (start..end).step_by(BATCH * PAGE) {
                let bytes = (end - at).min((BATCH * PAGE) as u64) as usize;
                let buffer = &mut buffer[..bytes];
                read_padded(&self.file, buffer, at)?;
                self.hand_on_batch(at / PAGE as u64, buffer, seed, sink, &mut stats)?;
            }
        }
        self.close_gaps(seed, sink, &mut stats)?;
        Ok(stats)
    }

    /// Neighbours in the image, of one kind, together.
    fn hand_on_batch(
        &mut self,
        first: u64,
        buffer: &[u8],
        seed: u64,
        sink: &mut dyn Sink,
        stats: &mut MemoryRoundStats,
    ) -> Result<()> {
        // What is open: its first slot, where in the buffer it begins, how many pages, whether zero.
        let mut open: Option<(u32, usize, usize, bool)> = None;
        let number = self.number;
        let mut close = |run: Option<(u32, usize, usize, bool)>| match run {
            Some((slot, _, pages, true)) => sink.zeros(number, address(slot), pages),
            Some((slot, from, pages, false)) => {
                sink.pages(number, address(slot), &buffer[from * PAGE..][..pages * PAGE])
            }
            None => Ok(()),
        };

        for (i, bytes) in buffer.chunks_exact(PAGE).enumerate() {
            let slot = self.slot(first + i as u64)?;
            let hash = hash(bytes, seed);
            let zero = hash == ZEROS;
            stats.scanned += 1;
            let known = &mut self.slots[slot as usize];
            known.round = self.round;
            if std::mem::replace(&mut known.hash, hash) == hash {
                stats.unchanged += 1;
                close(open.take())?;
                continue;
            }

            if zero {
                stats.zero += 1;
            } else {
                stats.sent += 1;
            }

            match &mut open {
                Some((start, _, pages, of)) if *of == zero && *start + *pages as u32 == slot => {
                    *pages += 1;
                }
                _ => {
                    close(open.take())?;
                    open = Some((slot, i, 1, zero));
                }
            }
        }

        close(open)
    }

    /// The slot of a page; a new one where it has none.
    fn slot(&mut self, page: u64) -> Result<u32> {
        let slot = self.slot_of.at(0, page);
        if *slot == NO_SLOT {
            *slot = u32::try_from(self.slots.len())?;
            self.slots.push(SharedPage { page, hash: NONE, round: 0 });
        }
        Ok(*slot)
    }

    /// Pages that are populated no more leave no gap: the last ones get their slots.
    fn close_gaps(
        &mut self,
        seed: u64,
        sink: &mut dyn Sink,
        stats: &mut MemoryRoundStats,
    ) -> Result<()> {
        let mut page = [0; PAGE];
        let mut at = 0;
        while at < self.slots.len() {
            if self.slots[at].round == self.round {
                at += 1;
                continue;
            }
            let gone = self.slots.swap_remove(at);
            *self.slot_of.at(0, gone.page) = NO_SLOT;

            let Some(moved) = self.slots.get_mut(at) else { break };
            if moved.round == self.round {
                *self.slot_of.at(0, moved.page) = at as u32;
                read_padded(&self.file, &mut page, moved.page * PAGE as u64)?;
                moved.hash = hash(&page, seed);
                sink.pages(self.number, address(at as u32), &page)?;
                stats.sent += 1;
            }
        }

        Ok(())
    }

    fn placed(&self) -> PlacedPages {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for slot in &self.slots {
            match runs.last_mut() {
                Some((page, pages)) if *page + *pages == slot.page => *pages += 1,
                _ => runs.push((slot.page, 1)),
            }
        }
        PlacedPages { image: image(self.number), runs }
    }
}

fn address(slot: u32) -> u64 {
    u64::from(slot) * PAGE as u64
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

/// The destination's half: the pages images of segments.
#[derive(Debug)]
pub struct SharedImages {
    directory: PathBuf,
    open: HashMap<i32, File>,
}

impl SharedImages {
    /// Files in that directory, which is nobody else's.
    pub fn new(directory: &Path) -> SharedImages {
        SharedImages { directory: directory.to_owned(), open: HashMap::new() }
    }

    fn file(&mut self, number: i32) -> Result<&File> {
        if !self.open.contains_key(&number) {
            if !(-MOST..0).contains(&number) {
                bail!("shared memory with the number {number}");
            }
            let path = self.directory.join(file_name(number));
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let file = file.with_context(|| format!("cannot make {}", path.display()))?;
            self.open.insert(number, file);
        }
        self.open.get(&number).ok_or_else(|| anyhow!("no such shared memory"))
    }

    /// Takes in pages.
    ///
    /// # Errors
    /// When there is no room, or there can be no such segment.
    pub fn put(&mut self, number: i32, at: u64, bytes: &[u8]) -> Result<()> {
        check(at, bytes.len() / PAGE)?;
        Ok(self.file(number)?.write_all_at(bytes, at)?)
    }

    /// Takes in pages of zeros.
    ///
    /// # Errors
    /// As [`SharedImages::put`].
    pub fn put_zeros(&mut self, number: i32, at: u64, pages: usize) -> Result<()> {
        check(at, pages)?;
        let file = self.file(number)?;
        let (bytes, size) = ((pages * PAGE) as u64, file.metadata()?.len());
        if size < at + bytes {
            file.set_len(at + bytes)?;
        }
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(file, how, at as i64, bytes as i64)?)
    }
}

/// Tells whether an image can have pages there.
fn check(at: u64, pages: usize) -> Result<()> {
    let end = (at / PAGE as u64).saturating_add(pages as u64);
    if !at.is_multiple_of(PAGE as u64) || end > u64::from(u32::MAX) {
        bail!("shared memory at {at:#x}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 700;

    /// Images over there, and how many pages came with contents.
    struct Over(SharedImages, usize);

    impl Sink for Over {
        fn pages(&mut self, number: i32, at: u64, bytes: &[u8]) -> Result<()> {
            assert!(bytes.len() <= BATCH * PAGE);
            self.1 += bytes.len() / PAGE;
            self.0.put(number, at, bytes)
        }
        fn zeros(&mut self, number: i32, at: u64, pages: usize) -> Result<()> {
            self.0.put_zeros(number, at, pages)
        }
        fn same(&mut self, _: i32, _: u64, _: (i32, u64), _: usize) -> Result<()> {
            bail!("shared memory is not like anything")
        }
        fn remote(&mut self, _: i32, _: u64, _: usize) -> Result<()> {
            bail!("shared memory does not stay")
        }
    }

    fn over(name: &str) -> (Over, PathBuf) {
        let directory = std::env::temp_dir().join(format!("ferry-{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        (Over(SharedImages::new(&directory), 0), directory)
    }

    fn segment() -> Segment {
        let file = memory::memory_file(c"test").unwrap();
        file.set_len(PAGES * PAGE as u64).unwrap();
        Segment::new(file, -3, PAGES)
    }

    fn write(segment: &Segment, page: u64, value: u8) {
        segment.file.write_all_at(&[value; PAGE], page * PAGE as u64).unwrap();
    }

    fn punch(segment: &Segment, page: u64, pages: u64) {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, bytes) = ((page * PAGE as u64) as i64, (pages * PAGE as u64) as i64);
        fallocate(&segment.file, how, at, bytes).unwrap();
    }

    /// What CRIU would make of the image, as it reads it, is what the segment is: and nothing more is populated.
    fn is_there(segment: &Segment, directory: &Path) {
        let PlacedPages { image, runs } = segment.placed();
        let file = File::open(directory.join(format!("pages-{image}.img"))).unwrap();
        let (mut at, mut filled) = (0, HashSet::new());
        let (mut here, mut there) = ([0; PAGE], [0; PAGE]);
        for (first, pages) in runs {
            for page in first..first + pages {
                file.read_exact_at(&mut there, at).unwrap();
                read_padded(&segment.file, &mut here, page * PAGE as u64).unwrap();
                assert!(here == there, "page {page}");
                assert!(filled.insert(page), "page {page} comes twice");
                at += PAGE as u64;
            }
        }
        let size = segment.end * PAGE as u64;
        for (start, end) in contents(&segment.file, size).unwrap() {
            let pages = start / PAGE as u64..end / PAGE as u64;
            pages.for_each(|page| assert!(filled.remove(&page), "page {page} is missing"));
        }
        assert!(filled.is_empty(), "{filled:?} are not populated");
    }

    #[test]
    fn only_what_has_changed_goes() {
        let (mut over, directory) = over("shared");
        let mut segment = segment();
        for page in (0..300).chain(400..410) {
            write(&segment, page, (page as u8).wrapping_add(1));
        }

        let first = segment.hand_on(7, &mut over).unwrap();
        // One of them is all zero: 255 + 1.
        assert_eq!((first.scanned, first.sent, first.zero, over.1), (310, 309, 1, 309));
        is_there(&segment, &directory);
        let again = segment.hand_on(7, &mut over).unwrap();
        assert_eq!((again.sent, again.zero, again.unchanged), (0, 0, 310));

        write(&segment, 3, 77);
        write(&segment, 401, 0);
        write(&segment, 350, 9);
        punch(&segment, 10, 20);
        let third = segment.hand_on(7, &mut over).unwrap();

        // The last twenty have moved into the gap, too.
        assert_eq!((third.sent, third.zero), (22, 1));
        is_there(&segment, &directory);
        assert_eq!(segment.placed().runs.iter().map(|run| run.1).sum::<u64>(), 291);

        segment.end = 300;
        segment.hand_on(7, &mut over).unwrap();
        is_there(&segment, &directory);
        assert!(segment.placed().end() <= 300);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn any_sequence_of_changes_gives_equal_contents() {
        let (mut over, directory) = over("shared-any");
        let mut segment = segment();
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
            segment.end = PAGES - next(2) * next(PAGES);
            segment.hand_on(7, &mut over).unwrap();
            is_there(&segment, &directory);
        }
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_peer_makes_no_more_images_and_no_larger_ones_than_there_can_be() {
        let (mut over, directory) = over("shared-peer");
        let page = [1; PAGE];
        for (number, at) in
            [(-65, 0), (0, 0), (1, 0), (i32::MIN, 0), (-1, 7), (-1, u64::MAX - 4095)]
        {
            assert!(over.0.put(number, at, &page).is_err(), "{number} {at:#x}");
            assert!(over.0.put_zeros(number, at, 1).is_err(), "{number} {at:#x}");
        }
        assert!(over.0.put_zeros(-1, 0, usize::MAX / PAGE).is_err());
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        // What is there already is not ours to write to.
        fs::write(directory.join("pages-1073741825.img"), "x").unwrap();
        assert!(over.0.put(-1, 0, &page).is_err());
        fs::remove_dir_all(directory).unwrap();
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
        let (mut over, directory) = over("shared-none");
        segments.last_round(&[], &mut over).unwrap();
        assert!(shared.placed().unwrap().is_empty());
        fs::remove_dir_all(directory).unwrap();
    }
}
