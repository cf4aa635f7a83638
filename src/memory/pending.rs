//! What of a task's memory is still to be installed, as runs of pages by their address.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::staging::{PageSlot, Staging};
use crate::criu::images::{PE_LAZY, PagemapEntry};
use crate::sys::memory::{PAGE, UffdEvent};

/// A run of neighbouring pages that are still to be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRun {
    /// Number of them.
    pub pages: u32,
    /// Where the first is; the others follow it.
    pub slot: PageSlot,
}

impl PendingRun {
    /// Behind the last, where the first is at `start`.
    pub fn end(&self, start: u64) -> u64 {
        start + u64::from(self.pages) * PAGE as u64
    }
    /// The part of the run from its n-th page.
    pub fn from(&self, n: u32) -> PendingRun {
        let slot = match self.slot {
            PageSlot::At(s) => PageSlot::At(s + n),
            PageSlot::Zero => PageSlot::Zero,
            PageSlot::Remote(page) => PageSlot::Remote(page + u64::from(n)),
        };
        PendingRun { pages: self.pages - n, slot }
    }
}

/// What is still missing in a task, by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending(pub BTreeMap<u64, PendingRun>);

impl Pending {
    /// Everything that CRIU left to us, from where it is staged.
    ///
    /// # Errors
    /// When a page is nowhere.
    pub fn new(vpid: i32, entries: &[PagemapEntry], staging: &Staging) -> Result<Pending> {
        let mut all = Pending::default();
        let mut last: Option<(u64, PendingRun)> = None;
        for entry in entries.iter().filter(|e| e.flags & PE_LAZY != 0) {
            let mut at = entry.vaddr;
            for (pages, slot) in staging.find(vpid, entry.vaddr, entry.pages) {
                let slot =
                    slot.ok_or_else(|| anyhow!("page {at:#x} of task {vpid} did not arrive"))?;
                let start = at;
                at += u64::from(pages) * PAGE as u64;
                if let Some((first, run)) = &mut last {
                    let follows = match (run.slot, slot) {
                        (PageSlot::At(a), PageSlot::At(b)) => b == a + run.pages,
                        (PageSlot::Zero, PageSlot::Zero) => true,
                        (PageSlot::Remote(a), PageSlot::Remote(b)) => b == a + u64::from(run.pages),
                        _ => false,
                    };

                    if follows && run.end(*first) == start && run.pages < u32::MAX - pages {
                        run.pages += pages;
                        continue;
                    }
                    all.0.insert(*first, *run);
                }
                last = Some((start, PendingRun { pages, slot }));
            }
        }

        if let Some((start, run)) = last {
            all.0.insert(start, run);
        }

        Ok(all)
    }

    /// Takes out what lies in `[start, end)`.
    pub fn take(&mut self, start: u64, end: u64) -> Vec<(u64, PendingRun)> {
        let mut taken = Vec::new();
        let first = self.0.range(..=start).next_back().map_or(start, |(s, _)| *s);
        let keys: Vec<u64> = self.0.range(first..end).map(|(s, _)| *s).collect();
        for key in keys {
            let run = self.0[&key];
            if run.end(key) <= start {
                continue;
            }
            self.0.remove(&key);
            let before = (start.saturating_sub(key) / PAGE as u64) as u32;
            let (from, mut run) = (key + u64::from(before) * PAGE as u64, {
                if before > 0 {
                    self.0.insert(key, PendingRun { pages: before, slot: run.slot });
                }
                run.from(before)
            });

            if run.end(from) > end {
                let keep = ((end - from) / PAGE as u64) as u32;
                self.0.insert(end, run.from(keep));
                run.pages = keep;
            }
            taken.push((from, run));
        }

        taken
    }

    /// Returns what a task did to its memory; whether any of it has been moved.
    pub fn change(&mut self, event: UffdEvent) -> bool {
        match event {
            UffdEvent::Remap(from, to, length) => {
                let moved = self.take(from, from + length);
                self.put_back(moved.into_iter().map(|(start, run)| (start - from + to, run)));
                true
            }
            UffdEvent::Remove(start, end) | UffdEvent::Unmap(start, end) => {
                self.take(start, end);
                false
            }
            UffdEvent::Fault(_) | UffdEvent::Fork(_) => false,
        }
    }

    /// Takes out all runs that are still on the source.
    pub fn take_remote(&mut self) -> Pending {
        let (remote, here) = std::mem::take(&mut self.0)
            .into_iter()
            .partition(|(_, run)| matches!(run.slot, PageSlot::Remote(_)));
        self.0 = here;
        Pending(remote)
    }

    /// Takes out what is missing of these pages of the source, wherever they belong now.
    pub fn take_origin(&mut self, first: u64, pages: u64, moved: bool) -> Vec<(u64, PendingRun)> {
        let (start, end) = (first * PAGE as u64, (first + pages) * PAGE as u64);
        if !moved {
            return self.take(start, end);
        }
        let overlaps = |run: &PendingRun| match run.slot {
            PageSlot::Remote(page) => page < first + pages && first < page + u64::from(run.pages),
            _ => false,
        };
        let hit: Vec<(u64, PendingRun)> =
            self.0.iter().filter(|(_, run)| overlaps(run)).map(|(at, run)| (*at, *run)).collect();
        let mut taken = Vec::new();
        for (at, run) in hit {
            let PageSlot::Remote(page) = run.slot else { continue };
            let from = first.saturating_sub(page);
            let to = (first + pages - page).min(u64::from(run.pages));
            taken.extend(self.take(at + from * PAGE as u64, at + to * PAGE as u64));
        }
        taken
    }

    /// Adds one page; neighbours become one run.
    pub fn add(&mut self, at: u64, slot: PageSlot) {
        let before = self.0.range_mut(..at).next_back();
        if let Some((start, run)) = before
            && run.end(*start) == at
            && run.pages < u32::MAX
            && match (run.slot, slot) {
                (PageSlot::At(a), PageSlot::At(b)) => b == a + run.pages,
                (PageSlot::Zero, PageSlot::Zero) => true,
                _ => false,
            }
        {
            run.pages += 1;
            return;
        }
        self.0.insert(at, PendingRun { pages: 1, slot });
    }

    /// The run that holds an address, from there: where its contents are, and at most `most` pages.
    pub fn range(&self, at: u64, most: u32) -> Option<(PageSlot, u32)> {
        let (start, run) = self.0.range(..=at).next_back()?;
        let rest = run.from(((at - start) / PAGE as u64).min(u64::from(run.pages)) as u32);
        (rest.pages > 0).then(|| (rest.slot, rest.pages.min(most)))
    }

    /// Puts runs (back) in.
    pub fn put_back(&mut self, list: impl IntoIterator<Item = (u64, PendingRun)>) {
        self.0.extend(list);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged() -> (Staging, Vec<PagemapEntry>) {
        let mut staging = Staging::new(16).unwrap();
        staging.put(5, 0x10000, &[1; 4 * PAGE]).unwrap();
        staging.put_zeros(5, 0x14000, 2).unwrap();
        staging.put(5, 0x16000, &[2; PAGE]).unwrap();
        let lazy = |vaddr, pages| PagemapEntry { vaddr, pages, flags: PE_LAZY };
        let present = PagemapEntry { vaddr: 0x30000, pages: 1, flags: 4 };
        (staging, vec![lazy(0x10000, 7), present])
    }

    #[test]
    fn neighbours_become_runs_and_missing_pages_are_found_out() {
        let (staging, entries) = staged();
        let pending = Pending::new(5, &entries, &staging).unwrap();
        let runs: Vec<_> = pending.0.iter().map(|(s, r)| (*s, r.pages)).collect();
        assert_eq!(runs, [(0x10000, 4), (0x14000, 2), (0x16000, 1)]);
        let missing = [PagemapEntry { vaddr: 0x17000, pages: 1, flags: PE_LAZY }];
        assert!(Pending::new(5, &missing, &staging).is_err());
        assert!(Pending::new(6, &entries, &staging).is_err());
    }

    #[test]
    fn taking_from_the_middle_leaves_both_ends() {
        let (staging, entries) = staged();
        let mut pending = Pending::new(5, &entries, &staging).unwrap();
        let taken = pending.take(0x11000, 0x15000);
        let shape: Vec<_> = taken.iter().map(|(s, r)| (*s, r.pages, r.slot)).collect();
        assert_eq!(shape, [(0x11000, 3, PageSlot::At(1)), (0x14000, 1, PageSlot::Zero)]);
        let left: Vec<_> = pending.0.iter().map(|(s, r)| (*s, r.pages)).collect();
        assert_eq!(left, [(0x10000, 1), (0x15000, 1), (0x16000, 1)]);
        assert!(pending.take(0x40000, 0x50000).is_empty());
        pending.put_back(taken);
        let whole: u32 = pending.0.values().map(|r| r.pages).sum();
        assert_eq!(whole, 7);
    }
}
