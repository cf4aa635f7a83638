//! Pages put into the tasks: those that come from the source, and those that were staged.

use anyhow::{Context, Result, bail};

use super::Daemon;
use crate::memory::pending::{Pending, PendingRun};
use crate::memory::staging::{PageSlot, Staging};
use crate::sys::memory::{PAGE, uffd_copy, uffd_wake, uffd_zero};

/// Pages installed at a time in the background: long enough for UFFDIO_COPY's full speed, short
/// enough that a fault does not wait for long behind it (0.4 ms).
const BATCH: u32 = 256;

impl Daemon {
    /// Puts pages that came from the source where they are missing: into every task of that family.
    pub(super) fn arrive(
        &mut self,
        vpid: i32,
        first: u64,
        pages: u64,
        bytes: Option<&[u8]>,
    ) -> Result<()> {
        // A task that CRIU has not made yet.
        if let Some(list) = self.pending.get_mut(&vpid) {
            for (at, run) in list.take_origin(first, pages, false) {
                match run.slot {
                    PageSlot::Remote(origin) => {
                        for n in 0..run.pages {
                            let slot =
                                stage(&mut self.staging, bytes, origin + u64::from(n) - first)?;
                            list.add(at + u64::from(n) * PAGE as u64, slot);
                        }
                    }
                    _ => list.put_back([(at, run)]),
                }
            }
        }

        for index in 0..self.targets.len() {
            let target = &mut self.targets[index];
            if target.vpid != vpid {
                continue;
            }
            for (at, run) in target.remote.take_origin(first, pages, target.moved) {
                let PageSlot::Remote(origin) = run.slot else { continue };
                self.served.fetched += u64::from(run.pages);
                for n in 0..run.pages {
                    let slot = stage(&mut self.staging, bytes, origin + u64::from(n) - first)?;
                    let page = at + u64::from(n) * PAGE as u64;
                    let waited = self.targets[index].waiting.remove(&page);
                    match waited {
                        // Ahead of its neighbours.
                        Some(since) => {
                            self.install(index, page, PendingRun { pages: 1, slot })?;
                            self.served.took(since);
                        }
                        None => self.targets[index].pending.add(page, slot),
                    }
                }
            }
        }

        Ok(())
    }

    /// One batch for each task that has something left.
    pub(super) fn background(&mut self) -> Result<()> {
        for index in 0..self.targets.len() {
            let target = &mut self.targets[index];
            let next = target
                .pending
                .0
                .range(target.cursor..)
                .next()
                .or_else(|| target.pending.0.iter().next())
                .map(|(s, r)| (*s, *r));
            let Some((start, run)) = next else { continue };
            let pages = run.pages.min(BATCH);
            let end = start + u64::from(pages) * PAGE as u64;
            target.cursor = end;
            for (start, run) in target.pending.take(start, end) {
                self.install(index, start, run)?;
            }
        }
        Ok(())
    }

    /// Installs a run that has been taken out of the pending ones; puts back what has to wait.
    pub(super) fn install(
        &mut self,
        index: usize,
        mut start: u64,
        mut run: PendingRun,
    ) -> Result<()> {
        while run.pages > 0 {
            let target = &mut self.targets[index];
            let length = run.pages as usize * PAGE;
            let (done, result) = match run.slot {
                PageSlot::At(slot) => {
                    uffd_copy(&target.uffd, start, self.staging.bytes(slot, run.pages as usize))
                }
                PageSlot::Zero => uffd_zero(&target.uffd, start, length),
                // Only what is here is ever pending.
                PageSlot::Remote(_) => bail!("a page that has not come is to be installed"),
            };

            let mut pages = (done / PAGE) as u32;
            if pages > 0 {
                self.served.pages += u64::from(pages);
                give_back(&mut self.staging, self.shared, run.slot, pages);
            }

            if let Err(e) = result {
                match e.raw_os_error() {
                    // The first page not installed is there already: go on behind it.
                    Some(libc::EEXIST) => {
                        let _ = uffd_wake(&target.uffd, start + done as u64, PAGE as u64);
                        give_back(&mut self.staging, self.shared, run.from(pages).slot, 1);
                        pages += 1;
                    }
                    // The run may end in another mapping: a part of it does not. What waits for the end
                    // of the restore is compared before it, where that is wished for.
                    Some(libc::ENOENT) if target.early && run.pages - pages > 1 => {
                        let mut rest = run.from(pages);
                        let (at, half) =
                            (start + u64::from(pages) * PAGE as u64, rest.pages.div_ceil(2));
                        let behind = at + u64::from(half) * PAGE as u64;
                        target.pending.put_back([(behind, rest.from(half))]);
                        rest.pages = half;
                        (start, run) = (at, rest);
                        continue;
                    }
                    // Not registered yet, or an event has to be read first.
                    Some(libc::ENOENT) if target.early => {
                        let rest = run.from(pages);
                        target.pending.put_back([(start + u64::from(pages) * PAGE as u64, rest)]);
                        target.cursor = 0;
                        self.stalled = true;
                        return Ok(());
                    }
                    Some(libc::EAGAIN) => {
                        let (start, run) =
                            (start + u64::from(pages) * PAGE as u64, run.from(pages));
                        if run.pages > 0 {
                            target.pending.put_back([(start, run)]);
                        }
                        return Ok(());
                    }
                    // Unmapped since: an event that says so may be on its way. Page by page, so
                    // that what is still mapped gets its own.
                    Some(libc::ENOENT) if run.pages - pages > 1 => {
                        let rest = run.from(pages);
                        let at = start + u64::from(pages) * PAGE as u64;
                        for n in 0..rest.pages {
                            let one = PendingRun { pages: 1, slot: rest.from(n).slot };
                            self.install(index, at + u64::from(n) * PAGE as u64, one)?;
                        }
                        return Ok(());
                    }
                    Some(libc::ENOENT) => {
                        give_back(&mut self.staging, self.shared, run.from(pages).slot, 1);
                        pages += 1;
                    }
                    Some(libc::ESRCH | libc::ENOSPC) => {
                        target.gone = true;
                        target.pending = Pending::default();
                        return Ok(());
                    }
                    _ => return Err(e).context("putting a page into the restored task"),
                }
            }
            continue_after(&mut start, &mut run, pages);
        }

        Ok(())
    }
}

/// Keeps one of the pages that came.
fn stage(staging: &mut Staging, bytes: Option<&[u8]>, index: u64) -> Result<PageSlot> {
    Ok(match bytes {
        None => PageSlot::Zero,
        Some(bytes) => PageSlot::At(staging.keep(&bytes[index as usize * PAGE..][..PAGE])?),
    })
}

/// What no task needs any more, unless another one may.
fn give_back(staging: &mut Staging, shared: bool, slot: PageSlot, pages: u32) {
    if let (PageSlot::At(slot), false) = (slot, shared) {
        staging.release(slot, pages as usize);
    }
}

fn continue_after(start: &mut u64, run: &mut PendingRun, pages: u32) {
    *start += u64::from(pages) * PAGE as u64;
    *run = run.from(pages.min(run.pages));
}
