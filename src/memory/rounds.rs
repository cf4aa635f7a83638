//! Reading memory in rounds: each round hands on the pages whose contents are not what was handed
//! on before. The first round takes everything; the last one, in the freeze, the rest.
//!
//! What changed is asked of the kernel where it can tell ([`Tracker`]): a round then costs what was
//! written, and 1 ms a GiB. Older kernels can tell by [`soft_dirty`] bits, if the container stands still
//! for a moment. Where neither is there, every populated page is read and compared by its hash
//! (xxh3: 23 GB/s here, so the round runs at the speed of reading). That needs nothing of the kernel;
//! its cost is a read of the whole memory a round.
//!
//! Of every page that the destination has a hash is kept, 8 bytes. So a page that was written to
//! without becoming another is not sent, nor one that is like a page over there: that goes as a
//! reference ([`Sink::same`]).

use std::collections::HashMap;
use std::io;

use anyhow::{Result, bail};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::pages::{self, Reader, Task};
use super::soft_dirty;
use super::table::PageTable;
use super::track::Tracker;
use crate::sys::memory::{PAGE, PageRegion};
use crate::sys::process;

/// Pages read at a time: 1 MiB, where the kernel's copying is at its fastest.
const BATCH: usize = 256;
/// Most separate runs in one read (`UIO_MAXIOV`).
const RUNS: usize = 1024;

/// Where pages go.
pub trait Sink {
    /// A run of pages with their contents, at most 256.
    ///
    /// # Errors
    /// When they cannot be sent.
    fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()>;
    /// A run of pages that are all zero.
    ///
    /// # Errors
    /// When it cannot be sent.
    fn zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()>;
    /// A run of pages that are like others, of that task and address, which were handed on earlier
    /// and not since.
    ///
    /// # Errors
    /// When it cannot be sent.
    fn same(&mut self, vpid: i32, vaddr: u64, from: (i32, u64), pages: usize) -> Result<()>;
    /// A run of pages that stay here until after the commit; what was sent of them is out of date.
    ///
    /// # Errors
    /// When it cannot be sent.
    fn remote(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()>;
}

/// What a round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryRoundStats {
    /// Pages looked at.
    pub scanned: u64,
    /// Pages handed on with their contents.
    pub sent: u64,
    /// Pages handed on as zero.
    pub zero: u64,
    /// Pages handed on as like others.
    pub same: u64,
    /// Pages that were written to, and are as they were.
    pub unchanged: u64,
}

impl MemoryRoundStats {
    /// Adds another's numbers.
    pub fn add(&mut self, other: MemoryRoundStats) {
        self.scanned += other.scanned;
        self.sent += other.sent;
        self.zero += other.zero;
        self.same += other.same;
        self.unchanged += other.unchanged;
    }
}

/// How it is found out what changed: `--tracking`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Tracking {
    /// Asynchronous write protection: what is asked for where nobody asks.
    #[value(name = "auto")]
    WriteProtect,
    /// Soft-dirty bits.
    SoftDirty,
    /// Comparing hashes.
    Hash,
}

/// The best that this kernel can, if it can that.
pub fn best(wanted: Tracking) -> Tracking {
    match wanted {
        Tracking::WriteProtect if Tracker::supported() => Tracking::WriteProtect,
        Tracking::WriteProtect | Tracking::SoftDirty if soft_dirty::supported() => {
            Tracking::SoftDirty
        }
        _ => Tracking::Hash,
    }
}

/// What has been handed on so far, by the container's number of the task.
#[derive(Debug)]
pub struct Rounds {
    tracking: Tracking,
    tasks: HashMap<i32, KnownTask>,
    sent: SentPages,
}

#[derive(Debug, Default)]
struct KnownTask {
    /// Host's number and start time: the container's number may be used again.
    identity: (i32, u64),
    tracker: Option<Tracker>,
    /// Watched pages that were told as written and could not be read: they are not told again.
    again: Vec<u64>,
}

/// What a look at a task found: pages that must be looked at.
#[derive(Debug, Default)]
pub struct FoundPages {
    regions: Vec<PageRegion>,
    /// The first so many are those that a tracker told.
    told: usize,
}

impl Rounds {
    /// Asks the kernel in the way of `tracking`; see [`best`] for what it can. `seed` makes the hashes ones that
    /// nobody in the container can know.
    pub fn new(tracking: Tracking, seed: u64) -> Rounds {
        Rounds { tracking, tasks: HashMap::new(), sent: SentPages::new(seed) }
    }

    /// What was handed on so far has arrived. `in_order`: what is handed on now arrives in that
    /// order; otherwise a page is not said to be like one that may come after it.
    pub fn arrived(&mut self, in_order: bool) {
        self.sent.round += 1;
        self.sent.in_order = in_order;
    }

    /// Returns how changes are found: what was asked for, unless no task could be watched so.
    pub fn tracking(&self) -> Tracking {
        match self.tracking {
            Tracking::WriteProtect if !self.is_watching() => Tracking::Hash,
            tracking => tracking,
        }
    }

    /// Tells whether anything is known only by the kernel having seen it written to.
    pub fn is_watching(&self) -> bool {
        self.tasks.values().any(|k| k.tracker.is_some())
    }

    /// Tells whether tasks must stand still while it is looked for what they have written.
    pub fn wants_them_still(&self) -> bool {
        self.tracking == Tracking::SoftDirty
    }

    /// One round over a task. It may be running; a page that changes while it is read is taken
    /// again by the next round. A `frozen` task cannot be made to do anything, so one that is not
    /// watched yet will not be.
    ///
    /// # Errors
    /// When the sink fails. A task that has ended is no error: it has no pages left.
    pub fn round(
        &mut self,
        task: Task,
        frozen: bool,
        sink: &mut dyn Sink,
    ) -> Result<MemoryRoundStats> {
        let found = self.find(task, frozen)?;
        self.hand_on(task, found, frozen, sink)
    }

    /// The first half of a round: which pages must be looked at. For this half the tasks must stand
    /// still if [`Rounds::wants_them_still`].
    ///
    /// # Errors
    /// When it cannot be found out. Of a task that has ended nothing must be looked at.
    pub fn find(&mut self, task: Task, frozen: bool) -> Result<FoundPages> {
        match self.look(task, frozen) {
            // A frozen task that has ended was killed: what CRIU has written of it is out of date.
            Err(e) if task_is_gone(&e) && !frozen => Ok(FoundPages::default()),
            other => other,
        }
    }

    /// The second half: reads them, and hands on what the destination has not.
    ///
    /// # Errors
    /// As [`Rounds::round`].
    pub fn hand_on(
        &mut self,
        task: Task,
        found: FoundPages,
        frozen: bool,
        sink: &mut dyn Sink,
    ) -> Result<MemoryRoundStats> {
        match self.try_hand_on(task, &found, frozen, sink) {
            Err(e) if task_is_gone(&e) && !frozen => Ok(MemoryRoundStats::default()),
            other => other,
        }
    }

    fn try_hand_on(
        &mut self,
        task: Task,
        found: &FoundPages,
        frozen: bool,
        sink: &mut dyn Sink,
    ) -> Result<MemoryRoundStats> {
        let mut missing = Vec::new();
        let stats = send(task, &found.regions, &mut self.sent, sink, &mut missing)?;
        if let (true, Some(page)) = (frozen, missing.first()) {
            bail!("page {:#x} of task {} cannot be read", page * PAGE as u64, task.vpid);
        }
        let told = &found.regions[..found.told];
        let told =
            |page: &u64| told.iter().any(|r| (r.start..r.end).contains(&(page * PAGE as u64)));
        if let Some(known) = self.tasks.get_mut(&task.vpid) {
            known.again = missing.into_iter().filter(told).collect();
        }
        Ok(stats)
    }

    /// For post-copy: tells what of a frozen task has to follow, without reading it. The regions.
    ///
    /// # Errors
    /// When the sink fails, or the task has ended.
    pub fn leave(&mut self, task: Task, sink: &mut dyn Sink) -> Result<Vec<(u64, u64)>> {
        let found = self.look(task, true)?;
        for region in &found.regions {
            let pages = ((region.end - region.start) / PAGE as u64) as usize;
            sink.remote(task.vpid, region.start, pages)?;
        }
        Ok(found.regions.iter().map(|r| (r.start, r.end)).collect())
    }

    /// Returns how many pages of a task a round would have to look at now.
    ///
    /// # Errors
    /// When the kernel cannot tell. A task that has ended has none.
    pub fn left(&self, task: Task) -> Result<Option<u64>> {
        let tracker = self.tasks.get(&task.vpid).and_then(|k| k.tracker.as_ref());
        let counted = match (tracker, self.tracking) {
            (Some(tracker), _) => {
                pages::anonymous_mappings(task.pid).and_then(|m| tracker.count(task, &m))
            }
            (None, Tracking::SoftDirty) => pages::anonymous_mappings(task.pid)
                .and_then(|m| soft_dirty::written(task, &m))
                .map(|found| found.iter().map(|r| (r.end - r.start) / PAGE as u64).sum()),
            _ => return Ok(None),
        };
        match counted {
            Err(e) if task_is_gone(&e) => Ok(Some(0)),
            other => other.map(Some),
        }
    }

    /// Finds what must be looked at, and starts to watch anew.
    fn look(&mut self, task: Task, frozen: bool) -> Result<FoundPages> {
        let known = self.tasks.entry(task.vpid).or_default();
        let identity = (task.pid, process::start_time(task.pid).unwrap_or(0));
        let new = known.identity != identity;
        if new {
            *known = KnownTask { identity, ..KnownTask::default() };
            if self.tracking == Tracking::WriteProtect && !frozen {
                // Whoever cannot be watched is compared.
                known.tracker = Tracker::attach(task).ok();
            }
        }

        let mappings = pages::anonymous_mappings(task.pid)?;
        if self.tracking == Tracking::SoftDirty {
            let mut regions = if new {
                pages::populated_anonymous(task.pid, &mappings)?
            } else {
                soft_dirty::written(task, &mappings)?
            };

            for page in std::mem::take(&mut known.again) {
                let at = page * PAGE as u64;
                regions.extend(pages::populated_in(task.pid, &[(at, at + PAGE as u64)])?);
            }
            soft_dirty::clear(task)?;
            let told = regions.len();
            return Ok(FoundPages { regions, told });
        }

        let looked = known.tracker.as_mut().map(|t| t.look(task, &mappings));
        match looked {
            None => Ok(FoundPages {
                regions: pages::populated_anonymous(task.pid, &mappings)?,
                told: 0,
            }),
            Some(Ok(mut written)) => {
                for page in std::mem::take(&mut known.again) {
                    let at = page * PAGE as u64;
                    let there = pages::populated_in(task.pid, &[(at, at + PAGE as u64)])?;
                    written.regions.extend(there);
                }
                let told = written.regions.len();
                let mut regions = written.regions;
                regions.extend(pages::populated_anonymous(task.pid, &written.unwatched)?);
                Ok(FoundPages { regions, told })
            }
            // It lives in other memory since an exec, or something that nobody foresaw: compared
            // from here on.
            Some(Err(_)) => {
                known.tracker = None;
                Ok(FoundPages {
                    regions: pages::populated_anonymous(task.pid, &mappings)?,
                    told: 0,
                })
            }
        }
    }
}

/// What the destination has.
#[derive(Debug)]
struct SentPages {
    seed: u64,
    /// Half a hash of each page's contents; 0: nothing.
    table: PageTable<u64>,
    /// Whole hashes, each in the one place where it can be, and a page that had those contents when
    /// it was handed on. 6 MiB: finds what was sent among the last GiB or so.
    places: Vec<PagePlace>,
    round: u32,
    in_order: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct PagePlace {
    hash: u128,
    task: i32,
    page: u64,
    /// In which round it was handed on.
    round: u32,
}

/// What is to be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageAction {
    /// Nothing: it is over there, or could not be read.
    Skip,
    Data,
    Zero,
    /// As that page.
    Same(i32, u64),
}

const PLACES: usize = 1 << 18;
/// What stands in the table for a page of zeros.
const ZERO_PAGE: u64 = 1;

impl SentPages {
    fn new(seed: u64) -> SentPages {
        SentPages { seed, table: PageTable::new(0), places: Vec::new(), round: 0, in_order: true }
    }

    /// Decides about a page, and notes that it has been handed on so.
    fn judge(&mut self, vpid: i32, page: u64, bytes: &[u8]) -> PageAction {
        if is_zero(bytes) {
            let before = std::mem::replace(self.table.at(vpid, page), ZERO_PAGE);
            return if before == ZERO_PAGE { PageAction::Skip } else { PageAction::Zero };
        }
        let hash = xxh3_128_with_seed(bytes, self.seed);

        // Neither "nothing" nor "zero".
        let half = |hash: u128| (hash as u64) | 2;
        if std::mem::replace(self.table.at(vpid, page), half(hash)) == half(hash) {
            return PageAction::Skip;
        }

        if self.places.is_empty() {
            self.places.resize(PLACES, PagePlace::default());
        }
        let place = &mut self.places[(hash >> 64) as usize % PLACES];
        let is_there = place.hash == hash
            && (place.task, place.page) != (vpid, page)
            && (self.in_order || place.round != self.round);
        // What was there may have been overwritten by a later version.
        if is_there && self.table.get(place.task, place.page) == half(hash) {
            return PageAction::Same(place.task, place.page);
        }

        *place = PagePlace { hash, task: vpid, page, round: self.round };
        PageAction::Data
    }
}

/// Reads regions and hands on what the destination has not. Page numbers that could not be read go
/// to `unread`.
fn send(
    task: Task,
    regions: &[PageRegion],
    sent: &mut SentPages,
    sink: &mut dyn Sink,
    unread: &mut Vec<u64>,
) -> Result<MemoryRoundStats> {
    let reader = Reader::open(task.pid)?;
    let mut stats = MemoryRoundStats::default();
    let mut buffer = vec![0u8; BATCH * PAGE];
    let mut runs: Vec<(u64, usize)> = Vec::with_capacity(RUNS);
    let mut waiting = 0;
    let mut flush = |runs: &mut Vec<(u64, usize)>| -> Result<()> {
        if runs.is_empty() {
            return Ok(());
        }
        let mut missing = Vec::new();
        reader.read(runs, &mut buffer, |i| missing.push(i))?;
        let numbers =
            runs.iter().flat_map(|&(at, n)| (0..n as u64).map(move |i| at / PAGE as u64 + i));
        unread.extend(numbers.enumerate().filter(|(i, _)| missing.contains(i)).map(|(_, n)| n));

        judge_and_send(task.vpid, runs, &buffer, &missing, sent, sink, &mut stats)?;
        runs.clear();
        Ok(())
    };

    for region in regions {
        let mut at = region.start;
        while at < region.end {
            let pages = (((region.end - at) as usize) / PAGE).min(BATCH - waiting);
            runs.push((at, pages));
            at += (pages * PAGE) as u64;
            waiting += pages;
            if waiting == BATCH || runs.len() == RUNS {
                flush(&mut runs)?;
                waiting = 0;
            }
        }
    }

    flush(&mut runs)?;
    Ok(stats)
}

fn task_is_gone(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| {
        e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
    })
}

/// Hands on what was read, neighbours together.
fn judge_and_send(
    vpid: i32,
    runs: &[(u64, usize)],
    buffer: &[u8],
    missing: &[usize],
    sent: &mut SentPages,
    sink: &mut dyn Sink,
    stats: &mut MemoryRoundStats,
) -> Result<()> {
    let mut index = 0;
    for &(start, pages) in runs {
        let first = index;
        // The kind of the run that is open, and where it began.
        let mut open = (PageAction::Skip, 0);
        let mut close = |kind: PageAction, from: usize, to: usize| -> Result<()> {
            let at = start + (from * PAGE) as u64;
            match kind {
                PageAction::Skip => Ok(()),
                PageAction::Zero => sink.zeros(vpid, at, to - from),
                PageAction::Same(of, page) => {
                    sink.same(vpid, at, (of, page * PAGE as u64), to - from)
                }
                PageAction::Data => {
                    sink.pages(vpid, at, &buffer[(first + from) * PAGE..(first + to) * PAGE])
                }
            }
        };

        for i in 0..pages {
            let bytes = &buffer[index * PAGE..][..PAGE];
            let kind = if missing.contains(&index) {
                PageAction::Skip
            } else {
                stats.scanned += 1;
                let kind = sent.judge(vpid, start / PAGE as u64 + i as u64, bytes);
                match kind {
                    PageAction::Skip => stats.unchanged += 1,
                    PageAction::Data => stats.sent += 1,
                    PageAction::Zero => stats.zero += 1,
                    PageAction::Same(..) => stats.same += 1,
                }
                kind
            };

            let goes_on = match (open.0, kind) {
                (PageAction::Same(of, page), PageAction::Same(of2, page2)) => {
                    of == of2 && page2 == page + (i - open.1) as u64
                }
                (a, b) => a == b,
            };

            if !goes_on {
                close(open.0, open.1, i)?;
                open = (kind, i);
            }
            index += 1;
        }
        close(open.0, open.1, pages)?;
    }

    Ok(())
}

/// Tells whether a page is all zero; stops at the first word that is not.
pub(super) fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

#[cfg(test)]
mod tests;
