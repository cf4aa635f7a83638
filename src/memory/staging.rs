//! Pages on the destination, from their arrival until they are in the restored task.

use std::fs::File;
use std::os::fd::RawFd;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::table::PageTable;
use crate::sys::memory::{Arena, PAGE};

/// Where a page's contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageSlot {
    /// Number of the page in the arena.
    At(u32),
    /// All zero.
    Zero,
    /// Still on the source, as this page of the task.
    Remote(u64),
}

/// Entries of the index. Everything else is a slot, counted from `FIRST`.
const NONE: u32 = 0;
const ZERO: u32 = 1;
const REMOTE: u32 = 2;
const FIRST: u32 = 3;

/// The pages received so far.
#[derive(Debug)]
pub struct Staging {
    arena: Arena,
    /// Slots handed out so far; those that were given back are in `free`.
    used: usize,
    free: Vec<u32>,
    /// Pages without contents here: they take no slot, but room in the index.
    empty: usize,
    index: PageTable<u32>,
}

/// Slots that are in use: all up to a number, but some.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSlots {
    used: usize,
    free: Vec<u32>,
}

impl Staging {
    /// Room for `pages` pages: the most that the plan has announced. Memory is taken only as they
    /// come.
    ///
    /// # Errors
    /// When the address space for it cannot be had.
    pub fn new(pages: usize) -> Result<Staging> {
        let pages = pages.clamp(1, (u32::MAX - FIRST) as usize);
        let arena = Arena::new(pages * PAGE)?;
        Ok(Staging { arena, used: 0, free: Vec::new(), empty: 0, index: PageTable::new(NONE) })
    }

    /// The number of the descriptor behind it.
    pub fn number(&self) -> RawFd {
        self.arena.number()
    }

    /// Returns which slots are in use.
    pub fn kept(&self) -> KeptSlots {
        KeptSlots { used: self.used, free: self.free.clone() }
    }

    /// Returns what somebody who has died had staged. Which pages they are, nothing in it tells.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn adopt(file: File, kept: KeptSlots) -> Result<Staging> {
        let (arena, KeptSlots { used, free }) = (Arena::adopt(file)?, kept);
        if used * PAGE > arena.capacity() {
            bail!("more pages than there is room for");
        }
        Ok(Staging { arena, used, free, empty: 0, index: PageTable::new(NONE) })
    }

    fn capacity(&self) -> usize {
        self.arena.capacity() / PAGE
    }

    /// A slot for a page. Neighbours get neighbouring ones as long as there are new ones.
    fn slot(&mut self) -> Result<u32> {
        if self.used < self.capacity() {
            self.used += 1;
            return Ok(self.used as u32 - 1);
        }
        match self.free.pop() {
            Some(slot) => Ok(slot),
            None => bail!("more memory comes than the plan announced"),
        }
    }

    /// Takes in a run of pages, replacing what was there before.
    ///
    /// # Errors
    /// When more comes than was announced, or the address is no page's.
    pub fn put(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        for (page, bytes) in numbers(vaddr, bytes.len() / PAGE)?.zip(bytes.chunks_exact(PAGE)) {
            let slot = self.slot_of(vpid, page)?;
            self.arena.bytes_mut(slot as usize * PAGE, PAGE).copy_from_slice(bytes);
        }
        Ok(())
    }

    /// The slot of a page that gets contents.
    fn slot_of(&mut self, vpid: i32, page: u64) -> Result<u32> {
        let known = self.index.get(vpid, page);
        if known >= FIRST {
            return Ok(known - FIRST);
        }
        let slot = self.slot()?;
        if known != NONE {
            self.empty -= 1;
        }
        *self.index.at(vpid, page) = slot + FIRST;
        Ok(slot)
    }

    /// Notes pages as zero.
    ///
    /// # Errors
    /// When more comes than was announced, or the address is no page's.
    pub fn put_zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        numbers(vaddr, pages)?.try_for_each(|page| self.put_empty(vpid, page, ZERO))
    }

    /// Notes that pages are still on the source: what came of them before is out of date.
    ///
    /// # Errors
    /// When more comes than was announced, or the address is no page's.
    pub fn put_remote(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        numbers(vaddr, pages)?.try_for_each(|page| self.put_empty(vpid, page, REMOTE))
    }

    fn put_empty(&mut self, vpid: i32, page: u64, what: u32) -> Result<()> {
        let before = std::mem::replace(self.index.at(vpid, page), what);
        if before >= FIRST {
            self.release(before - FIRST, 1);
        }
        if before == NONE || before >= FIRST {
            self.empty += 1;
            if self.empty > self.capacity() {
                bail!("more empty pages come than the plan announced");
            }
        }
        Ok(())
    }

    /// Takes in a run of pages whose contents are those of other pages that came before.
    ///
    /// # Errors
    /// When those did not come, or as [`Staging::put`].
    pub fn put_same(&mut self, to: (i32, u64), from: (i32, u64), pages: usize) -> Result<()> {
        for (to_page, from_page) in numbers(to.1, pages)?.zip(numbers(from.1, pages)?) {
            let source = self.index.get(from.0, from_page);
            if source < FIRST {
                bail!("page {from_page:#x} of task {} is to be copied and is not here", from.0);
            }
            let slot = self.slot_of(to.0, to_page)?;
            // A page like itself is nobody's honest word, and no reason to end.
            if slot == source - FIRST {
                continue;
            }
            self.arena.copy_within((source - FIRST) as usize * PAGE, slot as usize * PAGE, PAGE);
        }
        Ok(())
    }

    /// Returns where `pages` pages of a task are, from the one at `vaddr` on: runs of pages whose contents
    /// follow each other, how many pages and where the first is; none where they did not come. The freeze waits
    /// for this, and a container has millions: neighbours are looked at four bytes after four bytes.
    pub fn find(
        &self,
        vpid: i32,
        vaddr: u64,
        pages: u64,
    ) -> impl Iterator<Item = (u32, Option<PageSlot>)> {
        let first = vaddr / PAGE as u64;
        let mut at = first;
        self.index.values(vpid, first, pages).flat_map(move |(count, entries)| {
            let start = at;
            at += count;
            runs(start, count, entries)
        })
    }

    /// Keeps a page that nothing in the index leads to; gives its slot.
    ///
    /// # Errors
    /// When more comes than was announced.
    pub fn keep(&mut self, bytes: &[u8]) -> Result<u32> {
        let slot = self.slot()?;
        self.arena.bytes_mut(slot as usize * PAGE, PAGE).copy_from_slice(bytes);
        Ok(slot)
    }

    /// The contents of `pages` neighbouring slots.
    pub fn bytes(&self, slot: u32, pages: usize) -> &[u8] {
        self.arena.bytes(slot as usize * PAGE, pages * PAGE)
    }

    /// Gives the memory of slots back whose pages are installed, or out of date.
    pub fn release(&mut self, slot: u32, pages: usize) {
        // What cannot be given back now is given back with the arena.
        let _ = self.arena.release(slot as usize * PAGE, pages * PAGE);
        self.free.extend(slot..slot + pages as u32);
    }
}

/// The runs in a piece of the index, whose first page is `first`.
fn runs(
    first: u64,
    count: u64,
    entries: Option<&[u32]>,
) -> impl Iterator<Item = (u32, Option<PageSlot>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let Some(entries) = entries else {
            let all = (at == 0 && count > 0).then_some((count as u32, None));
            at += 1;
            return all;
        };

        let rest = entries.get(at..).filter(|rest| !rest.is_empty())?;
        let entry = rest[0];
        let step = u32::from(entry >= FIRST);

        // Of contents each is behind the one before; the others are all alike.
        let next = rest.windows(2).position(|two| two[0].wrapping_add(step) != two[1]);

        // No entry is the largest number, behind which would come what is none: there is no room for it.
        let length = next.map_or(rest.len(), |n| n + 1);
        let slot = match entry {
            NONE => None,
            ZERO => Some(PageSlot::Zero),
            REMOTE => Some(PageSlot::Remote(first + at as u64)),
            slot => Some(PageSlot::At(slot - FIRST)),
        };

        at += length;
        Some((length as u32, slot))
    })
}

/// The page numbers of a run; refuses addresses that no task can have.
fn numbers(vaddr: u64, pages: usize) -> Result<std::ops::Range<u64>> {
    let first = vaddr / PAGE as u64;
    let in_user_space = vaddr.checked_add((pages * PAGE) as u64).is_some_and(|end| end <= 1 << 57);
    if !vaddr.is_multiple_of(PAGE as u64) || !in_user_space {
        bail!("no page has the address {vaddr:#x}");
    }
    Ok(first..first + pages as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use crate::criu::images::{PE_LAZY, PagemapEntry};
    use crate::fuzz::{Target, found};
    use crate::memory::pending::Pending;

    fn find(staging: &Staging, vpid: i32, vaddr: u64) -> Option<PageSlot> {
        staging.find(vpid, vaddr, 1).next().unwrap().1
    }

    #[test]
    fn a_page_like_itself_stays_as_it_is() {
        let mut staging = Staging::new(2).unwrap();
        staging.put(1, 0x1000, &[7; PAGE]).unwrap();
        staging.put_same((1, 0x1000), (1, 0x1000), 1).unwrap();
        let Some(PageSlot::At(slot)) = find(&staging, 1, 0x1000) else { panic!("lost") };
        assert_eq!(staging.bytes(slot, 1), [7; PAGE]);
    }

    #[test]
    fn the_last_version_of_a_page_counts() {
        let mut staging = Staging::new(3).unwrap();
        staging.put(1, 0x1000, &[1; 2 * PAGE]).unwrap();
        staging.put(1, 0x2000, &[2; PAGE]).unwrap();
        let Some(PageSlot::At(slot)) = find(&staging, 1, 0x2000) else { panic!("lost") };
        assert_eq!(staging.bytes(slot, 1), [2; PAGE]);
        staging.put_zeros(1, 0x2000, 1).unwrap();
        assert_eq!(find(&staging, 1, 0x2000), Some(PageSlot::Zero));
        staging.put_remote(1, 0x1000, 1).unwrap();
        assert_eq!(find(&staging, 1, 0x1000), Some(PageSlot::Remote(1)));
        assert_eq!(find(&staging, 2, 0x2000), None);
    }

    #[test]
    fn slots_that_were_given_back_are_used_again() {
        let mut staging = Staging::new(2).unwrap();
        staging.put(1, 0x1000, &[1; 2 * PAGE]).unwrap();
        assert!(staging.put(1, 0x3000, &[3; PAGE]).is_err());
        staging.put_remote(1, 0x1000, 1).unwrap();
        staging.put(1, 0x3000, &[3; PAGE]).unwrap();
        let Some(PageSlot::At(slot)) = find(&staging, 1, 0x3000) else { panic!("lost") };
        assert_eq!(staging.bytes(slot, 1), [3; PAGE]);
        assert!(staging.put(1, 0x1000, &[1; PAGE]).is_err());
    }

    #[test]
    fn equal_pages_are_copied_from_what_came_before() {
        let mut staging = Staging::new(4).unwrap();
        staging.put(1, 0x1000, &[7; 2 * PAGE]).unwrap();
        staging.put_same((2, 0x9000), (1, 0x1000), 2).unwrap();
        // A later version of the one does not change the other.
        staging.put(1, 0x1000, &[8; PAGE]).unwrap();
        let Some(PageSlot::At(slot)) = find(&staging, 2, 0x9000) else { panic!("lost") };
        assert_eq!(staging.bytes(slot, 1), [7; PAGE]);
        assert!(staging.put_same((2, 0x9000), (1, 0x5000), 1).is_err());
    }

    #[test]
    fn more_than_announced_or_nonsense_is_refused() {
        let mut staging = Staging::new(1).unwrap();
        staging.put(1, 0x1000, &[1; PAGE]).unwrap();
        assert!(staging.put(1, 0x2000, &[1; PAGE]).is_err());
        assert!(staging.put(1, 0x1001, &[1; PAGE]).is_err());
        assert!(staging.put_zeros(1, u64::MAX - 4095, 1).is_err());
        assert!(staging.put_zeros(1, 1 << 57, 1).is_err());
        assert!(staging.put_zeros(1, 0x8000, 2).is_err());
    }

    /// Whatever comes, in whatever order, is where it belongs: compared with a map that is as simple as
    /// can be. Nothing of it may take more room than was announced.
    #[test]
    fn fuzz_pages() {
        const ROOM: usize = 40;
        // Kind, task, page, pages, from.
        let some = |kind: u8| vec![kind, 1, 16, 0, 0, 0, 0, 3, 17];
        let target = Target::new("pages").sample((0..6).flat_map(some).collect::<Vec<u8>>());
        target.words(&[&[0xff; 5], &[0, 0, 0, 0, 2]]).cost(4).room(4 << 20).run(|bytes| {
            let mut staging = Staging::new(ROOM)?;
            let mut model: BTreeMap<(i32, u64), PageSlot> = BTreeMap::new();
            let mut contents: BTreeMap<(i32, u64), u8> = BTreeMap::new();
            let mut entries: Vec<PagemapEntry> = Vec::new();
            for step in bytes.chunks_exact(9) {
                let [kind, task, page @ .., pages, from] = step else { unreachable!() };
                let task = i32::from(task % 2);
                let page: u64 = page.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
                let (vaddr, from) = (page << 12, u64::from(*from));
                let all = page..page + u64::from(*pages);
                let pages = usize::from(*pages);
                entries.push(PagemapEntry { vaddr, pages: pages as u64, flags: PE_LAZY });
                match kind % 5 {
                    0 => {
                        staging.put(task, vaddr, &vec![*kind; pages.min(4) * PAGE])?;
                        for page in all.take(4) {
                            model.insert((task, page), PageSlot::At(0));
                            contents.insert((task, page), *kind);
                        }
                    }
                    1 => {
                        staging.put_zeros(task, vaddr, pages)?;
                        model.extend(all.map(|page| ((task, page), PageSlot::Zero)));
                    }
                    2 => {
                        staging.put_remote(task, vaddr, pages)?;
                        model.extend(all.map(|page| ((task, page), PageSlot::Remote(page))));
                    }
                    3 => {
                        staging.put_same((task, vaddr), (task, from << 12), pages)?;
                        for (to, from) in all.zip(from..) {
                            model.insert((task, to), PageSlot::At(0));
                            contents.insert((task, to), contents[&(task, from)]);
                        }
                    }
                    // As an image tells it, which is the peer's, too.
                    _ => {
                        entries.sort_by_key(|entry| entry.vaddr);
                        let _ = Pending::new(task, &entries, &staging).map(|mut pending| {
                            pending.take(vaddr, vaddr + (pages * PAGE) as u64);
                            pending.take_remote();
                        });
                    }
                }

                let full = model.values().filter(|slot| matches!(slot, PageSlot::At(_))).count();
                assert!(full <= ROOM && model.len() - full <= ROOM);
            }

            for (&(task, page), slot) in &model {
                match (find(&staging, task, page << 12), slot) {
                    (Some(PageSlot::At(found)), PageSlot::At(_)) => {
                        let byte = contents[&(task, page)];
                        assert!(staging.bytes(found, 1).iter().all(|b| *b == byte));
                    }
                    (there, wanted) => assert_eq!(there, Some(*wanted), "page {page} of {task}"),
                }
            }

            let full = model.values().filter(|slot| matches!(slot, PageSlot::At(_))).count();
            found(&[full, model.len() - full])
        });
    }
}
