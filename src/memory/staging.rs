//! Pages on the destination, from their arrival until they are in the restored task.

use std::collections::HashMap;

use anyhow::{Result, bail};

use crate::sys::memory::{Arena, PAGE};

/// Where a page's contents are: a slot of the arena, or nowhere as it is all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Number of the page in the arena.
    At(u32),
    /// All zero.
    Zero,
}

/// The pages received so far.
#[derive(Debug)]
pub struct Staging {
    arena: Arena,
    used: usize,
    /// Entries of zero pages: they take no slot, but room in the index.
    zeros: usize,
    index: HashMap<i32, HashMap<u64, Slot>>,
}

impl Staging {
    /// Room for `pages` pages: the most that the plan has announced. Memory is taken only as they
    /// come.
    ///
    /// # Errors
    /// When the address space for it cannot be had.
    pub fn new(pages: usize) -> Result<Staging> {
        let arena = Arena::new(pages.max(1) * PAGE)?;
        Ok(Staging { arena, used: 0, zeros: 0, index: HashMap::new() })
    }

    /// Takes in a run of pages, replacing what was there before.
    ///
    /// # Errors
    /// When more comes than was announced, or the address is no page's.
    pub fn put(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let task = self.index.entry(vpid).or_default();
        for (page, bytes) in numbers(vaddr, bytes.len() / PAGE)?.zip(bytes.chunks_exact(PAGE)) {
            let slot = match task.get(&page) {
                Some(&Slot::At(slot)) => slot as usize,
                _ => {
                    if (self.used + 1) * PAGE > self.arena.capacity() {
                        bail!("more memory comes than the plan announced");
                    }
                    self.used += 1;
                    task.insert(page, Slot::At(self.used as u32 - 1));
                    self.used - 1
                }
            };
            self.arena.bytes_mut(slot * PAGE, PAGE).copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Notes pages as zero.
    ///
    /// # Errors
    /// When the address is no page's.
    pub fn put_zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        let task = self.index.entry(vpid).or_default();
        for page in numbers(vaddr, pages)? {
            // The slot that it may have had is not used again: a page that turns zero is rare.
            if task.insert(page, Slot::Zero).is_none() {
                self.zeros += 1;
                if self.zeros * PAGE > self.arena.capacity() {
                    bail!("more zero pages come than the plan announced");
                }
            }
        }
        Ok(())
    }

    /// Where a page of a task is.
    pub fn find(&self, vpid: i32, vaddr: u64) -> Option<Slot> {
        self.index.get(&vpid)?.get(&(vaddr / PAGE as u64)).copied()
    }

    /// The contents of `pages` neighbouring slots.
    pub fn bytes(&self, slot: u32, pages: usize) -> &[u8] {
        self.arena.bytes(slot as usize * PAGE, pages * PAGE)
    }

    /// Gives the memory of slots back that are installed.
    pub fn release(&self, slot: u32, pages: usize) {
        // What cannot be given back now is given back with the arena.
        let _ = self.arena.release(slot as usize * PAGE, pages * PAGE);
    }

    /// Bytes that came.
    pub fn staged_bytes(&self) -> u64 {
        (self.used * PAGE) as u64
    }
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

    #[test]
    fn the_last_version_of_a_page_counts() {
        let mut staging = Staging::new(3).unwrap();
        staging.put(1, 0x1000, &[1; 2 * PAGE]).unwrap();
        staging.put(1, 0x2000, &[2; PAGE]).unwrap();
        let Some(Slot::At(slot)) = staging.find(1, 0x2000) else { panic!("lost") };
        assert_eq!(staging.bytes(slot, 1), [2; PAGE]);
        staging.put_zeros(1, 0x2000, 1).unwrap();
        assert_eq!(staging.find(1, 0x2000), Some(Slot::Zero));
        assert_eq!(staging.find(2, 0x2000), None);
        assert_eq!(staging.staged_bytes(), 2 * PAGE as u64);
    }

    #[test]
    fn more_than_announced_or_nonsense_is_refused() {
        let mut staging = Staging::new(1).unwrap();
        staging.put(1, 0x1000, &[1; PAGE]).unwrap();
        assert!(staging.put(1, 0x2000, &[1; PAGE]).is_err());
        assert!(staging.put(1, 0x1001, &[1; PAGE]).is_err());
        assert!(staging.put_zeros(1, u64::MAX - 4095, 1).is_err());
        assert!(staging.put_zeros(1, 1 << 57, 1).is_err());
    }
}
