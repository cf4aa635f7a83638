//! Reading memory in rounds: each round hands on the pages whose contents are not what was handed
//! on before. The first round takes everything; the last one, in the freeze, the rest.
//!
//! What changed is asked of the kernel where it can tell ([`Tracker`]): a round then costs what was
//! written, and 1 ms a GiB. Where it cannot, a 128-bit hash of each populated page is compared
//! (xxh3: 23 GB/s here, so the round runs at the speed of reading). That needs nothing of the kernel;
//! its cost is a read of the whole memory a round.

use std::collections::HashMap;
use std::io;

use anyhow::{Result, bail};
use xxhash_rust::xxh3::xxh3_128;

use super::pages::{self, Reader, Task};
use super::track::Tracker;
use crate::sys::memory::{PAGE, PageRegion};
use crate::sys::process;

/// Pages read at a time: 1 MiB, where the kernel's copying is at its fastest.
const BATCH: usize = 256;
/// Most separate runs in one read (`UIO_MAXIOV`).
const RUNS: usize = 1024;

/// Where pages go.
pub trait Sink {
    /// A run of pages with their contents.
    ///
    /// # Errors
    /// When they cannot be sent.
    fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()>;
    /// A run of pages that are all zero.
    ///
    /// # Errors
    /// When it cannot be sent.
    fn zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()>;
}

/// What a round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RoundStats {
    /// Pages looked at.
    pub scanned: u64,
    /// Pages handed on with their contents.
    pub sent: u64,
    /// Pages handed on as zero.
    pub zero: u64,
}

/// How it is found out what changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracking {
    /// Asynchronous write protection.
    WriteProtect,
    /// Comparing hashes.
    Hash,
}

/// What has been handed on so far, by the container's number of the task.
#[derive(Debug)]
pub struct Rounds {
    tracking: Tracking,
    tasks: HashMap<i32, Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Host's number and start time: the container's number may be used again.
    identity: (i32, u64),
    tracker: Option<Tracker>,
    /// Page number → hash, of what no tracker watches.
    sent: HashMap<u64, u128>,
    /// Watched pages that were told as written and could not be read: they are not told again.
    again: Vec<u64>,
}

impl Rounds {
    /// Asks the kernel where it can tell, if `tracking` says so.
    pub fn new(tracking: Tracking) -> Rounds {
        Rounds { tracking, tasks: HashMap::new() }
    }

    /// How changes are found: what was asked for, unless the kernel cannot.
    pub fn tracking(&self) -> Tracking {
        let watched = self.tasks.values().any(|k| k.tracker.is_some());
        if watched { Tracking::WriteProtect } else { Tracking::Hash }
    }

    /// One round over a task. It may be running; a page that changes while it is read is taken
    /// again by the next round. A `frozen` task cannot be made to do anything, so one that is not
    /// watched yet will not be.
    ///
    /// # Errors
    /// When the sink fails. A task that has ended is no error: it has no pages left.
    pub fn round(&mut self, task: Task, frozen: bool, sink: &mut dyn Sink) -> Result<RoundStats> {
        match self.try_round(task, frozen, sink) {
            // A frozen task that has ended was killed: what CRIU has written of it is out of date.
            Err(e) if task_is_gone(&e) && !frozen => Ok(RoundStats::default()),
            other => other,
        }
    }

    fn try_round(&mut self, task: Task, frozen: bool, sink: &mut dyn Sink) -> Result<RoundStats> {
        let known = self.tasks.entry(task.vpid).or_default();
        let identity = (task.pid, process::start_time(task.pid).unwrap_or(0));
        if known.identity != identity {
            *known = Known { identity, ..Known::default() };
            if self.tracking == Tracking::WriteProtect && !frozen {
                // Whoever cannot be watched is compared.
                known.tracker = Tracker::attach(task).ok();
            }
        }
        let mappings = pages::anonymous_mappings(task.pid)?;
        let looked = known.tracker.as_mut().map(|t| t.look(task, &mappings));
        let mut missing = Vec::new();
        let stats = match looked {
            None => {
                let regions = pages::populated_in(task.pid, &mappings)?;
                send(task, &regions, Some(&mut known.sent), sink, &mut missing)?
            }
            Some(Ok(mut written)) => {
                for page in std::mem::take(&mut known.again) {
                    let at = page * PAGE as u64;
                    let there = pages::populated_in(task.pid, &[(at, at + PAGE as u64)])?;
                    written.regions.extend(there);
                }
                let mut stats = send(task, &written.regions, None, sink, &mut known.again)?;
                missing.extend(&known.again);
                if written.unwatched.is_empty() {
                    // What was compared before may have been written to while it was watched.
                    known.sent.clear();
                } else {
                    let regions = pages::populated_in(task.pid, &written.unwatched)?;
                    let known = Some(&mut known.sent);
                    stats.add(send(task, &regions, known, sink, &mut missing)?);
                }
                stats
            }
            // It lives in other memory since an exec, or something that nobody foresaw: compared
            // from here on. What it had sent before says nothing about this memory.
            Some(Err(_)) => {
                known.tracker = None;
                known.sent.clear();
                let regions = pages::populated_in(task.pid, &mappings)?;
                send(task, &regions, Some(&mut known.sent), sink, &mut missing)?
            }
        };
        if let (true, Some(page)) = (frozen, missing.first()) {
            bail!("page {:#x} of task {} cannot be read", page * PAGE as u64, task.vpid);
        }
        Ok(stats)
    }
}

impl RoundStats {
    /// Adds another's numbers.
    pub fn add(&mut self, other: RoundStats) {
        self.scanned += other.scanned;
        self.sent += other.sent;
        self.zero += other.zero;
    }
}

/// Reads regions and hands them on; with `known`, only what differs from it. Page numbers that
/// could not be read go to `unread`.
fn send(
    task: Task,
    regions: &[PageRegion],
    mut known: Option<&mut HashMap<u64, u128>>,
    sink: &mut dyn Sink,
    unread: &mut Vec<u64>,
) -> Result<RoundStats> {
    let reader = Reader::open(task.pid)?;
    let mut stats = RoundStats::default();
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
        hand_on(task.vpid, runs, &buffer, &missing, known.as_deref_mut(), sink, &mut stats)?;
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

/// Compares what was read with what is known and hands on the difference, neighbours together.
fn hand_on(
    vpid: i32,
    runs: &[(u64, usize)],
    buffer: &[u8],
    missing: &[usize],
    mut known: Option<&mut HashMap<u64, u128>>,
    sink: &mut dyn Sink,
    stats: &mut RoundStats,
) -> Result<()> {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Same,
        Data,
        Zero,
    }
    let mut index = 0;
    for &(start, pages) in runs {
        let first = index;
        let mut open = (Kind::Same, 0);
        let mut close = |kind: Kind, from: usize, to: usize| -> Result<()> {
            let at = start + (from * PAGE) as u64;
            match kind {
                Kind::Same => Ok(()),
                Kind::Zero => sink.zeros(vpid, at, to - from),
                Kind::Data => {
                    sink.pages(vpid, at, &buffer[(first + from) * PAGE..(first + to) * PAGE])
                }
            }
        };
        for i in 0..pages {
            let bytes = &buffer[index * PAGE..][..PAGE];
            let kind = if missing.contains(&index) {
                Kind::Same
            } else {
                stats.scanned += 1;
                let number = start / PAGE as u64 + i as u64;
                let same = known.as_deref_mut().is_some_and(|known| {
                    let hash = xxh3_128(bytes);
                    known.insert(number, hash) == Some(hash)
                });
                if same {
                    Kind::Same
                } else if is_zero(bytes) {
                    stats.zero += 1;
                    Kind::Zero
                } else {
                    stats.sent += 1;
                    Kind::Data
                }
            };
            if kind != open.0 {
                close(open.0, open.1, i)?;
                open = (kind, i);
            }
            index += 1;
        }
        close(open.0, open.1, pages)?;
    }
    Ok(())
}

/// Whether a page is all zero; stops at the first word that is not.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Copy(HashMap<u64, Vec<u8>>, usize);

    impl Sink for Copy {
        fn pages(&mut self, _: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
            for (i, page) in bytes.chunks_exact(PAGE).enumerate() {
                self.0.insert(vaddr + (i * PAGE) as u64, page.to_vec());
                self.1 += 1;
            }
            Ok(())
        }
        fn zeros(&mut self, _: i32, vaddr: u64, pages: usize) -> Result<()> {
            for i in 0..pages {
                self.0.insert(vaddr + (i * PAGE) as u64, vec![0; PAGE]);
            }
            Ok(())
        }
    }

    /// A child that does nothing: its memory stands still while we look at it.
    #[test]
    fn a_second_round_over_a_still_task_sends_nothing() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let task = Task { pid: child.id() as i32, vpid: 1 };
        // It is settled when it waits for its standard input.
        let wchan = format!("/proc/{}/syscall", task.pid);
        while !std::fs::read_to_string(&wchan).unwrap_or_default().starts_with("0 0x0 ") {
            std::thread::yield_now();
        }
        let (mut rounds, mut copy) = (Rounds::new(Tracking::Hash), Copy::default());
        let first = rounds.round(task, false, &mut copy).unwrap();
        assert!(first.sent > 10, "{first:?}");
        let second = rounds.round(task, false, &mut copy).unwrap();
        assert_eq!((second.sent, second.zero), (0, 0));
        assert_eq!(second.scanned, first.scanned);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(rounds.round(task, false, &mut copy).unwrap(), RoundStats::default());
    }

    #[test]
    fn runs_are_cut_where_the_kind_changes() {
        let mut buffer = vec![0u8; 6 * PAGE];
        buffer[PAGE] = 1;
        buffer[2 * PAGE + 5] = 2;
        buffer[5 * PAGE + 4095] = 3;
        let (mut known, mut copy) = (HashMap::new(), Copy::default());
        let mut stats = RoundStats::default();
        let runs = [(0x1000, 4), (0x9000, 2)];
        hand_on(7, &runs, &buffer, &[3], Some(&mut known), &mut copy, &mut stats).unwrap();
        assert_eq!((stats.scanned, stats.sent, stats.zero), (5, 3, 2));
        assert_eq!(copy.0[&0x2000][0], 1);
        assert_eq!(copy.0[&0x3000][5], 2);
        assert_eq!(copy.0[&0xa000][4095], 3);
        assert!(!copy.0.contains_key(&0x4000), "a page that could not be read is not sent");
        assert_eq!(copy.1, 3);
    }
}
