//! Shared memory that has come apart, has holes, and is written to by two processes all the time.

use std::io;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{BOTH, PAGE, done, map};

/// Pages of each segment but the one that is cut.
const PAGES: usize = 256;
/// Of these, what is given back.
const HOLE: std::ops::Range<usize> = 100..150;
/// From here on the second mapping of the pierced one begins, and so long it is.
const WINDOW: std::ops::Range<usize> = 32..96;

/// The segments, by address.
pub struct Shared {
    /// Of which only the first half is mapped.
    cut: usize,
    /// A place for all of it.
    room: usize,
    pierced: usize,
    window: usize,
    locked: usize,
    busy: usize,
    writer: Option<Writer>,
}

/// Writes numbers, and keeps in private memory what they are.
#[derive(Clone)]
struct Writer {
    at: usize,
    written: Arc<Mutex<Vec<u64>>>,
}

impl Shared {
    pub fn new() -> io::Result<Shared> {
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let [cut, pierced, busy, locked] = [1, 2, 3, 4].map(|_| map(PAGES * PAGE, BOTH, shared));
        let room = map(PAGES * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)?;
        let (cut, pierced, busy, locked) = (cut?, pierced?, busy?, locked?);
        for page in 0..PAGES {
            write(cut + page * PAGE, 1000 + page as u64);
            write(pierced + page * PAGE, 2000 + page as u64);
            write(locked + page * PAGE, 3000 + page as u64);
        }
        // SAFETY: this mapping. The limit may not allow it, which is no matter here.
        let _ = unsafe { libc::mlock(locked as *const _, PAGES * PAGE) };
        // Of nothing, mremap(2) makes another mapping of the same memory.
        let window = remap(pierced + WINDOW.start * PAGE, 0, WINDOW.len(), None)?;
        // SAFETY: within these mappings, to which nothing refers.
        unsafe {
            done(libc::munmap((cut + PAGES / 2 * PAGE) as *mut _, PAGES / 2 * PAGE))?;
            let hole = (pierced + HOLE.start * PAGE) as *mut _;
            done(libc::madvise(hole, HOLE.len() * PAGE, libc::MADV_REMOVE))?;
        }
        Ok(Shared { cut, room, pierced, window, locked, busy, writer: None })
    }

    /// Begins to write to one half of what both processes have.
    pub fn write(&mut self, second: bool) {
        let at = self.busy + if second { PAGES / 2 * PAGE } else { 0 };
        let writer = Writer { at, written: Arc::new(Mutex::new(vec![0; PAGES / 2])) };
        self.writer = Some(writer.clone());
        std::thread::spawn(move || writer.run());
    }

    /// Whether all of it is as it was; `first` looks at what only one can at a time.
    pub fn look(&self, first: bool) -> Result<(), String> {
        let right = |at: usize, page: usize, value: u64| match read(at) {
            found if found == [value; 3] => Ok(()),
            found => Err(format!("shared page {page} is {found:?}, not {value}")),
        };
        for page in (0..PAGES).filter(|page| !HOLE.contains(page)) {
            right(self.pierced + page * PAGE, page, 2000 + page as u64)?;
        }
        for page in 0..PAGES {
            right(self.locked + page * PAGE, page, 3000 + page as u64)?;
        }
        for page in WINDOW {
            let at = self.window + (page - WINDOW.start) * PAGE;
            right(at, page, 2000 + page as u64)?;
        }
        if self.populated()? != PAGES - HOLE.len() {
            return Err(format!("{} pages are populated", self.populated()?));
        }

        let writer = self.writer.as_ref().ok_or("nobody writes")?;
        let written = writer.written.lock().unwrap_or_else(PoisonError::into_inner);
        for (page, value) in written.iter().enumerate() {
            right(writer.at + page * PAGE, page, *value)?;
        }
        drop(written);
        if first { self.look_behind_the_cut(right).map_err(|e| e.to_string()) } else { Ok(()) }
    }

    /// Has all of the memory mapped once more, for a moment.
    fn look_behind_the_cut(
        &self,
        right: impl Fn(usize, usize, u64) -> Result<(), String>,
    ) -> io::Result<()> {
        let all = remap(self.cut, PAGES / 2, PAGES, Some(self.room))?;
        let found =
            (0..PAGES).try_for_each(|page| right(all + page * PAGE, page, 1000 + page as u64));
        // SAFETY: the second half, to which nothing refers.
        done(unsafe { libc::munmap((all + PAGES / 2 * PAGE) as *mut _, PAGES / 2 * PAGE) })?;
        remap(all, PAGES / 2, PAGES / 2, Some(self.cut))?;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: where nothing is mapped any more.
        let room =
            unsafe { libc::mmap(self.room as *mut _, PAGES * PAGE, libc::PROT_NONE, none, -1, 0) };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        found.map_err(io::Error::other)
    }

    /// Pages of the pierced one that are in memory: mincore(2).
    fn populated(&self) -> Result<usize, String> {
        let mut there = [0_u8; PAGES];
        // SAFETY: there is a byte for each page of the mapping.
        let result = unsafe {
            libc::mincore(self.pierced as *mut _, PAGES * PAGE, there.as_mut_ptr().cast())
        };
        done(result).map_err(|e| e.to_string())?;
        Ok(there.iter().filter(|one| **one & 1 == 1).count())
    }
}

impl Writer {
    fn run(&self) {
        for turn in 1_u64.. {
            let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            let page = turn as usize * 7 % written.len();
            write(self.at + page * PAGE, turn);
            written[page] = turn;
            drop(written);
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

fn write(at: usize, value: u64) {
    for word in [0, PAGE / 2, PAGE - 8] {
        // SAFETY: a page of one of these mappings.
        unsafe { ((at + word) as *mut u64).write_volatile(value) };
    }
}

fn read(at: usize) -> [u64; 3] {
    // SAFETY: a page of one of these mappings.
    [0, PAGE / 2, PAGE - 8].map(|word| unsafe { ((at + word) as *const u64).read_volatile() })
}

/// Pages of a mapping that become so many, at another place.
fn remap(at: usize, pages: usize, now: usize, place: Option<usize>) -> io::Result<usize> {
    let (old, new) = (pages * PAGE, now * PAGE);
    let fixed = if place.is_some() { libc::MREMAP_FIXED } else { 0 };
    let flags = libc::MREMAP_MAYMOVE | fixed;
    let place: *mut libc::c_void = place.map_or(null_mut(), |place| place as *mut _);
    // SAFETY: what is there is moved, and nothing refers to either place.
    let moved = unsafe { libc::mremap(at as *mut _, old, new, flags, place) };
    if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(moved as usize) }
}
