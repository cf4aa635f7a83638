//! What whoever fills restored tasks would leave to a successor, should he be killed: the *will*, memory
//! that both map and that is always complete.
//!
//! ```text
//! 0     words: numbers of descriptors, what has been reached
//! 4096  the log: what was read of userfaultfds, since the snapshot
//! ```
//!
//! The snapshot, in a file of its own, says what of which task's memory was missing, and where it was. It
//! and the log tell what may be missing now. Nothing is noted of pages that were put in since: where one is,
//! no other can be put (`EEXIST`), and where one has been given up, moved or unmapped since, the
//! log says so, as its task waits until that was read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::pending::{Pending, PendingRun};
use super::staging::KeptSlots;
use crate::sys::memory::{Arena, UFFD_MESSAGE, UffdEvent, memory_file};

/// Numbers in the will. Descriptors count from one: nothing is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WillWord {
    /// The descriptor of the staged pages.
    Staging = 1,
    /// That on which CRIU tells its tasks' userfaultfds.
    Lazy = 2,
    /// That by which CRIU is released.
    Criu = 3,
    /// CRIU has said its last on the former.
    Finished = 4,
    /// Every page is in; the userfaultfds may be open still.
    Done = 5,
    /// The snapshot's descriptor, and above that its number.
    Snapshot = 6,
}

const LOG: usize = 4096;
/// Bytes of an entry: of which snapshot it is one, of which userfaultfd, what was read.
const ENTRY: usize = 16 + UFFD_MESSAGE;
/// Entries that there is room for; then a new snapshot is due.
const ENTRIES: usize = 1 << 16;

/// Memory of Ferry and its successors (memfd_create(2)), in which the former keeps what the latter need.
#[derive(Debug)]
pub struct Will {
    arena: Arena,
}

impl Will {
    /// An empty one.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> Result<Will> {
        Ok(Will { arena: Arena::new(LOG + ENTRIES * ENTRY)? })
    }

    /// That of somebody who has died.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn adopt(file: OwnedFd) -> Result<Will> {
        let arena = Arena::adopt(File::from(file))?;
        (arena.capacity() == LOG + ENTRIES * ENTRY)
            .then_some(Will { arena })
            .ok_or_else(|| anyhow!("no will"))
    }

    /// Its descriptor.
    pub fn number(&self) -> RawFd {
        self.arena.number()
    }

    /// Notes a number.
    pub fn note(&self, word: WillWord, value: u64) {
        self.arena.word(word as usize * 8).store(value, Ordering::SeqCst);
    }

    /// Reads one.
    pub fn read(&self, word: WillWord) -> u64 {
        self.arena.word(word as usize * 8).load(Ordering::SeqCst)
    }

    /// Notes a descriptor, or that there is none.
    pub fn note_descriptor(&self, word: WillWord, number: Option<RawFd>) {
        self.note(word, number.map_or(0, |number| number as u64 + 1));
    }

    /// The number of a descriptor.
    pub fn descriptor(&self, word: WillWord) -> Option<RawFd> {
        (self.read(word) as u32).checked_sub(1).map(|number| number as RawFd)
    }

    /// Tells whether there is a snapshot: whoever comes after can go on.
    pub fn is_made(&self) -> bool {
        self.read(WillWord::Snapshot) != 0
    }
}

/// What is missing in one task.
#[derive(Debug, Serialize, Deserialize)]
pub struct Missing {
    /// Number of its userfaultfd.
    pub uffd: RawFd,
    /// The container's number of the task whose pages these were on the source.
    pub vpid: i32,
    /// Whether some of it has another address than on the source.
    pub moved: bool,
    /// Runs of pages by their address.
    pub runs: Vec<(u64, PendingRun)>,
}

/// All that is missing.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// What is staged.
    pub staging: KeptSlots,
    /// By task.
    pub tasks: Vec<Missing>,
}

/// Whoever writes the will.
#[derive(Debug)]
pub struct Author {
    /// The arena of it, mapped once more: others read its words.
    arena: Arena,
    /// The current snapshot.
    file: Option<File>,
    number: u64,
    entries: usize,
}

impl Author {
    /// The only one of a will.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn new(will: &Will) -> Result<Author> {
        let file = will.arena.file()?;
        let number = will.read(WillWord::Snapshot) >> 32;
        Ok(Author { arena: Arena::adopt(file)?, file: None, number, entries: 0 })
    }

    /// Writes down what is missing: from here on the log begins anew.
    ///
    /// # Errors
    /// When there is no memory for it; what stood there before counts then.
    pub fn snapshot(&mut self, will: &Will, all: &Snapshot) -> Result<()> {
        let bytes = postcard::to_stdvec(all)?;
        let mut file = memory_file(c"ferry-snapshot")?;
        file.write_all(&bytes)?;
        self.number += 1;
        self.entries = 0;
        will.note(WillWord::Snapshot, self.number << 32 | (file.as_raw_fd() as u64 + 1));
        // What it replaces is closed when it is not named any more.
        self.file = Some(file);
        Ok(())
    }

    /// Tells whether there is no room in the log.
    pub fn is_full(&self) -> bool {
        self.entries == ENTRIES
    }

    /// As long as there is no snapshot, nobody needs what is in the log.
    pub fn forget(&mut self) {
        self.entries = 0;
    }

    /// Returns where the next message of a userfaultfd is to be read into. It stays there if it is
    /// [kept](Author::keep).
    pub fn place(&mut self, uffd: RawFd) -> &mut [u8; UFFD_MESSAGE] {
        let at = LOG + self.entries * ENTRY;
        self.arena.bytes_mut(at, ENTRY).fill(0);
        self.arena.word(at + 8).store(uffd as u64, Ordering::SeqCst);
        self.arena.word(at).store(self.number, Ordering::SeqCst);
        let message = self.arena.bytes_mut(at + 16, UFFD_MESSAGE);
        message.try_into().expect("as long as a message")
    }

    /// What was read last stays.
    pub fn keep(&mut self) {
        self.entries += 1;
    }
}

/// Returns what may be missing, as the will has it.
///
/// # Errors
/// When it cannot be read.
pub fn read(will: &Will, snapshot: &mut File) -> Result<Snapshot> {
    let mut bytes = Vec::new();
    snapshot.seek(SeekFrom::Start(0))?;
    snapshot.read_to_end(&mut bytes)?;
    let mut all: Snapshot = postcard::from_bytes(&bytes).context("a will")?;
    let number = will.read(WillWord::Snapshot) >> 32;
    replay(&mut all, (0..ENTRIES).map_while(|i| entry(&will.arena, i, number)))?;
    Ok(all)
}

fn entry(arena: &Arena, i: usize, snapshot: u64) -> Option<(RawFd, [u8; UFFD_MESSAGE])> {
    let bytes = arena.bytes(LOG + i * ENTRY, ENTRY);
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
    let message: [u8; UFFD_MESSAGE] = std::array::from_fn(|i| bytes[16 + i]);
    // One that was prepared, and into which nothing was read.
    (word(0) == snapshot && message[0] != 0).then_some((word(8) as RawFd, message))
}

/// Brings a snapshot up to date.
fn replay(
    all: &mut Snapshot,
    log: impl Iterator<Item = (RawFd, [u8; UFFD_MESSAGE])>,
) -> Result<()> {
    // The last one with a number is the one that has it.
    let mut by_number: HashMap<RawFd, (i32, bool, Pending)> = HashMap::new();
    for task in all.tasks.drain(..) {
        let runs = Pending(task.runs.into_iter().collect());
        by_number.insert(task.uffd, (task.vpid, task.moved, runs));
    }

    for (uffd, message) in log {
        let event = UffdEvent::parse(&message)?;
        let Some((vpid, moved, pending)) = by_number.get_mut(&uffd) else { continue };
        match event {
            Some(UffdEvent::Fork(child)) => {
                let copy = (*vpid, *moved, pending.clone());
                by_number.insert(child, copy);
            }
            Some(event) => *moved |= pending.change(event),
            None => {}
        }
    }

    let missing = |(uffd, (vpid, moved, runs)): (RawFd, (i32, bool, Pending))| Missing {
        uffd,
        vpid,
        moved,
        runs: runs.0.into_iter().collect(),
    };

    all.tasks = by_number.into_iter().map(missing).collect();
    all.tasks.sort_by_key(|task| task.uffd);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::staging::PageSlot;
    use super::*;

    fn message(kind: u8, words: [u64; 3]) -> [u8; UFFD_MESSAGE] {
        let mut message = [0; UFFD_MESSAGE];
        message[0] = kind;
        for (i, word) in words.iter().enumerate() {
            message[8 + i * 8..16 + i * 8].copy_from_slice(&word.to_ne_bytes());
        }
        message
    }

    fn log(author: &mut Author, uffd: RawFd, kind: u8, words: [u64; 3]) {
        *author.place(uffd) = message(kind, words);
        author.keep();
    }

    fn snapshot(runs: Vec<(u64, PendingRun)>) -> Snapshot {
        let tasks = vec![Missing { uffd: 7, vpid: 1, moved: false, runs }];
        Snapshot { staging: KeptSlots::default(), tasks }
    }

    fn read_back(will: &Will, author: &Author) -> Vec<Missing> {
        let mut file = author.file.as_ref().unwrap().try_clone().unwrap();
        read(will, &mut file).unwrap().tasks
    }

    /// Whatever was read before it was killed counts, and nothing that stood there before.
    #[test]
    fn a_will_tells_what_may_be_missing() {
        let will = Will::new().unwrap();
        let mut author = Author::new(&will).unwrap();
        assert!(!will.is_made());
        let run = |pages, slot| PendingRun { pages, slot };
        let all = snapshot(vec![
            (0x10000, run(4, PageSlot::At(3))),
            (0x20000, run(2, PageSlot::Remote(5))),
        ]);

        author.snapshot(&will, &all).unwrap();
        assert!(will.is_made());
        log(&mut author, 7, 0x15, [0x11000, 0x12000, 0]);
        log(&mut author, 7, 0x13, [9, 0, 0]);
        log(&mut author, 7, 0x16, [0x12000, 0x14000, 0]);
        log(&mut author, 9, 0x14, [0x20000, 0x50000, 0x2000]);

        // A fault is not kept; the last one has been read, and nothing come of it yet.
        *author.place(7) = message(0x12, [0, 0x10000, 0]);
        *author.place(9) = message(0x15, [0x10000, 0x11000, 0]);
        let tasks = read_back(&will, &author);
        let shape: Vec<_> = tasks.iter().map(|t| (t.uffd, t.vpid, t.moved, &t.runs[..])).collect();
        let here = (0x10000, run(1, PageSlot::At(3)));
        let far = run(2, PageSlot::Remote(5));
        let child = [(0x12000, run(2, PageSlot::At(5))), (0x50000, far)];
        assert_eq!(shape, [(7, 1, false, &[here, (0x20000, far)][..]), (9, 1, true, &child[..])]);

        // A new one begins a log of its own.
        author.snapshot(&will, &snapshot(vec![here])).unwrap();
        assert_eq!(read_back(&will, &author)[0].runs, [here]);
    }
}
