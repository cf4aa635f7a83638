//! The destination's side of [`digest`](super::digest): restored tasks, none of which has run yet,
//! compared with what the source tells of its own.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::digest::{
    BATCH, DigestRecord, Digester, END, batches, contents, read_padded, shared_memory,
};
use super::pages::{self, Reader, Task, is_kernels};
use crate::criu::images::{PE_LAZY, PagemapEntry};
use crate::sys::maps;
use crate::sys::memory::PAGE;
use crate::sys::process::proc_text;

/// How often it is looked whether pages are in: nobody tells.
const GLANCE: Duration = Duration::from_millis(1);
/// Most differing pages that are named.
const NAMED: usize = 3;

/// A comparison under way.
#[derive(Debug)]
pub struct Comparison {
    digester: Digester,
    tasks: HashMap<i32, Own>,
    /// The range or the shared memory that the source is telling of.
    open: OpenRecord,
    pages: u64,
    found: Differences,
}

/// A restored task.
#[derive(Debug)]
struct Own {
    pid: i32,
    reader: Reader,
    /// What it has mapped privately.
    mapped: Vec<(u64, u64)>,
    /// Of that, files: first byte, one past the last, and where in the file the first is.
    files: Vec<(u64, u64, u64)>,
}

impl Own {
    /// Returns what a page is where nobody has written to it: zeros, or the file's. CRIU makes some of a file's
    /// pages the task's own, such as locked ones.
    fn untouched(&self, at: u64) -> Result<[u8; PAGE]> {
        let mut page = [0; PAGE];
        let file = self.files.iter().find(|(start, end, _)| (*start..*end).contains(&at));
        if let Some((start, end, offset)) = file {
            let path = format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid);
            let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
            read_padded(&file, &mut page, offset + (at - start))?;
        }
        Ok(page)
    }
}

#[derive(Debug)]
enum OpenRecord {
    Nothing,
    /// With what is populated here, and was not told.
    Range(i32, Vec<(u64, u64)>),
    /// With what has contents here, and was not told.
    Shared(i32, u64, File, Vec<(u64, u64)>),
    Done,
}

/// Pages that are not what they are on the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Number of them.
    pub pages: u64,
    /// The first of them: process, as the container numbers it, its name, and address.
    pub first: Vec<(i32, String, u64)>,
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages of memory are not what they are on the source: ", self.pages)?;
        for (i, (vpid, name, at)) in self.first.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}process {vpid} ({}) at {at:#x}", name.escape_debug())?;
        }
        match self.pages.saturating_sub(self.first.len() as u64) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl Comparison {
    /// Of tasks that stand still, and have all of their memory.
    ///
    /// # Errors
    /// When one has ended.
    pub fn new(tasks: &[Task], digester: Digester) -> Result<Comparison> {
        let mut all = HashMap::new();
        for task in tasks {
            let text = proc_text(task.pid, "maps")?;
            let private = maps::parse(&text).filter(|m| !m.is_shared() && !is_kernels(m));
            let private: Vec<_> = private.collect();
            let mapped = private.iter().map(|m| (m.start, m.end)).collect();
            let files = private.iter().filter(|m| m.inode != 0);
            let files = files.map(|m| (m.start, m.end, m.offset)).collect();
            let reader = Reader::open(task.pid)?;
            all.insert(task.vpid, Own { pid: task.pid, reader, mapped, files });
        }
        let found = Differences::default();
        Ok(Comparison { digester, tasks: all, open: OpenRecord::Nothing, pages: 0, found })
    }

    /// Compares what the source has told next. Whether that was the last of it.
    ///
    /// # Errors
    /// When it makes no sense, or a task has ended. Pages that differ are no error yet.
    pub fn take(&mut self, records: Vec<DigestRecord>) -> Result<bool> {
        for record in records {
            match record {
                DigestRecord::Range { vpid, start, end } => {
                    self.close()?;
                    let own = self.own(vpid)?;
                    let here = pages::populated_in(own.pid, &within(&own.mapped, (start, end)))?;
                    let here = here.iter().map(|region| (region.start, region.end)).collect();
                    self.open = OpenRecord::Range(vpid, here);
                }
                DigestRecord::Pages { start, digests } => self.pages(start, &digests)?,
                DigestRecord::Shared { vpid, at, size } => {
                    self.close()?;
                    self.shared(vpid, at, size)?;
                }
                DigestRecord::Data { offset, digests } => self.data(offset, &digests)?,
                DigestRecord::End { pages } => {
                    self.close()?;
                    if pages != self.pages {
                        bail!("{pages} pages were to be compared, {} came", self.pages);
                    }
                    self.open = OpenRecord::Done;
                }
            }
        }

        Ok(matches!(self.open, OpenRecord::Done))
    }

    /// Returns how many pages are the same.
    ///
    /// # Errors
    /// Those that are not.
    pub fn verdict(self) -> Result<u64> {
        match self.found.pages {
            0 => Ok(self.pages),
            _ => Err(anyhow!("{}", self.found)),
        }
    }

    fn own(&self, vpid: i32) -> Result<&Own> {
        self.tasks.get(&vpid).ok_or_else(|| anyhow!("there is no process {vpid} here"))
    }

    fn pages(&mut self, start: u64, digests: &[u64]) -> Result<()> {
        let OpenRecord::Range(vpid, extra) = &mut self.open else { bail!("pages of no task") };
        let (vpid, count) = (*vpid, digests.len());
        let end = end_of(start, count)?;
        *extra = without(extra, (start, end));
        self.pages += count as u64;

        let own = self.own(vpid)?;
        let mapped = within(&own.mapped, (start, end));
        let here = pages::populated_in(own.pid, &mapped)?;
        let is_mapped = |at: u64| mapped.iter().any(|(from, to)| (*from..*to).contains(&at));

        // Where nothing is populated there are zeros; reading would have a task wait for them.
        let mut bytes = vec![0; count * PAGE];
        let mut missing = Vec::new();
        for region in here {
            for (at, pages) in batches(region.start, region.end) {
                let from = (at - start) as usize;
                let into = &mut bytes[from..from + pages * PAGE];
                own.reader.read(&[(at, pages)], into, |i| missing.push(at + (i * PAGE) as u64))?;
            }
        }

        let list = (start..).step_by(PAGE).zip(bytes.chunks_exact_mut(PAGE)).zip(digests);
        let differ: Vec<u64> = list
            .filter_map(|((at, page), told)| {
                let same = self.digester.page(vpid, at, page) == *told;
                let same = same && is_mapped(at) && !missing.contains(&at);
                (!same).then_some(at)
            })
            .collect();
        differ.into_iter().for_each(|at| self.differs(vpid, at));

        Ok(())
    }

    fn shared(&mut self, vpid: i32, at: u64, size: u64) -> Result<()> {
        let pid = self.own(vpid)?.pid;
        let text = proc_text(pid, "maps")?;
        let mapping = maps::parse(&text).find(|m| (m.start..m.end).contains(&at));
        let file = mapping.filter(|m| m.is_shared()).map(|m| shared_memory(pid, &m)).transpose()?;
        let Some(file) = file.flatten() else {
            bail!("process {vpid} has no shared memory at {at:#x} here");
        };
        let here = file.metadata()?.len();
        if here != size {
            bail!("shared memory of process {vpid} has {here} bytes here, {size} on the source");
        }
        let extra = contents(&file, size)?;
        self.open = OpenRecord::Shared(vpid, at, file, extra);
        Ok(())
    }

    fn data(&mut self, offset: u64, digests: &[u64]) -> Result<()> {
        let OpenRecord::Shared(vpid, at, file, extra) = &mut self.open else {
            bail!("pages of no shared memory");
        };
        let end = end_of(offset, digests.len())?;
        *extra = without(extra, (offset, end));
        self.pages += digests.len() as u64;

        let mut bytes = vec![0; digests.len() * PAGE];
        read_padded(file, &mut bytes, offset)?;
        let (vpid, at) = (*vpid, *at);
        let list = (offset..).step_by(PAGE).zip(bytes.chunks_exact(PAGE)).zip(digests);
        let differ: Vec<u64> = list
            .filter(|((_, page), told)| self.digester.plain(page) != **told)
            .map(|((offset, _), _)| at.saturating_add(offset))
            .collect();
        differ.into_iter().for_each(|at| self.differs(vpid, at));
        Ok(())
    }

    /// What is here and was not told must be as if nobody had written to it.
    fn close(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.open, OpenRecord::Nothing) {
            OpenRecord::Nothing => {}
            OpenRecord::Done => bail!("more comes than all"),
            OpenRecord::Range(vpid, extra) => {
                let own = self.own(vpid)?;
                let mut differ = Vec::new();
                let mut buffer = vec![0; BATCH * PAGE];
                for (at, count) in extra.iter().flat_map(|(from, to)| batches(*from, *to)) {
                    let bytes = &mut buffer[..count * PAGE];
                    own.reader.read(&[(at, count)], bytes, |_| {})?;
                    for (at, page) in (at..).step_by(PAGE).zip(bytes.chunks_exact_mut(PAGE)) {
                        let mut untouched = own.untouched(at)?;
                        self.digester.mask(vpid, at, page);
                        self.digester.mask(vpid, at, &mut untouched);
                        differ.extend((*page != untouched[..]).then_some(at));
                    }
                }
                differ.into_iter().for_each(|at| self.differs(vpid, at));
            }
            OpenRecord::Shared(vpid, start, file, extra) => {
                let mut page = [0; PAGE];
                for (from, to) in extra {
                    for offset in (from..to).step_by(PAGE) {
                        read_padded(&file, &mut page, offset)?;
                        if page.iter().any(|byte| *byte != 0) {
                            self.differs(vpid, start.saturating_add(offset));
                        }
                    }
                }
            }
        }

        Ok(())
    }

    fn differs(&mut self, vpid: i32, at: u64) {
        self.found.pages += 1;
        if self.found.first.len() < NAMED {
            let pid = self.tasks.get(&vpid).map_or(0, |own| own.pid);
            let name = proc_text(pid, "comm").unwrap_or_default();
            self.found.first.push((vpid, name.trim_end_matches('\n').to_owned(), at));
        }
    }
}

/// One past the last of so many pages.
fn end_of(start: u64, pages: usize) -> Result<u64> {
    let end = start.checked_add((pages * PAGE) as u64);
    let end = end.filter(|end| *end <= END && start.is_multiple_of(PAGE as u64));
    end.ok_or_else(|| anyhow!("no pages lie at {start:#x}"))
}

/// The parts of rising ranges that lie in another.
fn within(list: &[(u64, u64)], (start, end): (u64, u64)) -> Vec<(u64, u64)> {
    let parts = list.iter().map(|(from, to)| (start.max(*from), end.min(*to)));
    parts.filter(|(from, to)| from < to).collect()
}

/// The parts of ranges that do not lie in another.
fn without(list: &[(u64, u64)], (start, end): (u64, u64)) -> Vec<(u64, u64)> {
    let parts = list.iter().flat_map(|&(from, to)| [(from, to.min(start)), (from.max(end), to)]);
    parts.filter(|(from, to)| from < to).collect()
}

/// Waits until a task has every page that CRIU has left to be brought.
///
/// # Errors
/// Names the first page that it has not by then.
pub fn await_pages(task: Task, entries: &[PagemapEntry], until: Instant) -> Result<()> {
    let pagemap = File::open(format!("/proc/{}/pagemap", task.pid))?;
    for entry in entries.iter().filter(|entry| entry.flags & PE_LAZY != 0) {
        let mut at = entry.vaddr;
        let end = end_of(at, usize::try_from(entry.pages)?)?;
        while at < end {
            at = first_missing(&pagemap, at, end).context("looking for pages")?;
            if at < end {
                if Instant::now() > until {
                    bail!("page {at:#x} of process {} has not come", task.vpid);
                }
                std::thread::park_timeout(GLANCE);
            }
        }
    }
    Ok(())
}

/// The first page of a range that is neither in memory nor in swap; the range's end if there is none.
fn first_missing(pagemap: &File, start: u64, end: u64) -> io::Result<u64> {
    let mut buffer = [0; 8 * 512];
    let mut at = start;
    while at < end {
        let pages = ((end - at) / PAGE as u64).min(512) as usize;
        pagemap.read_exact_at(&mut buffer[..pages * 8], at / PAGE as u64 * 8)?;
        // Bits 63 and 62: Documentation/admin-guide/mm/pagemap.rst.
        let missing = buffer[..pages * 8].chunks_exact(8).position(|entry| entry[7] >> 6 == 0);
        if let Some(i) = missing {
            return Ok(at + (i * PAGE) as u64);
        }
        at += (pages * PAGE) as u64;
    }
    Ok(end)
}

/// For tests of what follows: changes a byte of a task's memory.
///
/// # Errors
/// When it has none, or has ended.
#[cfg(any(test, feature = "faults"))]
pub fn spoil(task: Task) -> Result<u64> {
    let regions = pages::populated(task.pid)?;
    let at = regions.last().ok_or_else(|| anyhow!("no memory"))?.start + 17;
    let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", task.pid))?;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at)?;
    memory.write_all_at(&[!byte[0]], at)?;
    Ok(at / PAGE as u64 * PAGE as u64)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::super::digest::{self, Mask};
    use super::*;

    #[test]
    fn ranges_are_cut() {
        let list = [(0, 10), (20, 30), (40, 50)];
        assert_eq!(within(&list, (5, 45)), [(5, 10), (20, 30), (40, 45)]);
        assert_eq!(within(&list, (10, 20)), []);
        assert_eq!(without(&list, (5, 45)), [(0, 5), (45, 50)]);
        assert_eq!(without(&list, (22, 23)), [(0, 10), (20, 22), (23, 30), (40, 50)]);
        assert!(end_of(0x1000, 1).is_ok() && end_of(0x1001, 1).is_err());
        assert!(end_of(u64::MAX - 4095, 2).is_err());
    }

    #[test]
    fn differences_are_named_and_counted() {
        let first = (1..4).map(|n| (n, "a\nb".to_owned(), 0x1000)).collect();
        let text = Differences { pages: 5, first }.to_string();
        assert!(text.starts_with("5 pages of memory are not what they are on the source: "));
        assert!(text.contains("process 1 (a\\nb) at 0x1000, ") && text.ends_with(" and 2 more"));
    }

    /// A program that does nothing, for good: it waits in the middle of a read.
    fn idle() -> (Child, Task) {
        let mut child = Command::new("sh")
            .args(["-c", "echo; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let pid = child.id() as i32;
        let asleep = || proc_text(pid, "stat").unwrap().contains(" S ");
        while !asleep() {
            std::thread::yield_now();
        }
        (child, Task { pid, vpid: 7 })
    }

    fn told(task: Task, digester: &Digester) -> Vec<DigestRecord> {
        let mut all = Vec::new();
        digest::tell(&[task], digester, &mut |records| {
            all.extend_from_slice(records);
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn a_changed_byte_is_found_in_another_task() {
        let (mut child, task) = idle();
        let digester = || Digester::new(5, &[]).unwrap();
        let records = told(task, &digester());
        let mut same = Comparison::new(&[task], digester()).unwrap();
        assert!(same.take(records.clone()).unwrap());
        assert!(same.verdict().unwrap() > 20);

        let page = spoil(task).unwrap();
        let mut other = Comparison::new(&[task], digester()).unwrap();
        assert!(other.take(records.clone()).unwrap());
        let text = format!("{:#}", other.verdict().unwrap_err());
        assert_eq!(
            text,
            format!(
                "1 pages of memory are not what they are on the source: process 7 (sh) at {page:#x}"
            )
        );

        // Unless it is masked: at the source, where its records come from, too.
        let mask = Mask { vpid: 7, at: page + 17, length: 1 };
        let masked = || Digester::new(5, &[mask]).unwrap();
        let records = told(task, &masked());
        spoil(task).unwrap();
        let mut again = Comparison::new(&[task], masked()).unwrap();
        assert!(again.take(records).unwrap());
        again.verdict().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_only_here_must_be_zeros() {
        let (mut child, task) = idle();
        let digester = || Digester::new(5, &[]).unwrap();
        let mut records = told(task, &digester());
        let last = records.iter().rposition(|r| matches!(r, DigestRecord::Pages { .. })).unwrap();
        let DigestRecord::Pages { digests, .. } = records.remove(last) else { panic!("no pages") };
        for record in &mut records {
            if let DigestRecord::End { pages } = record {
                *pages -= digests.len() as u64;
            }
        }
        let mut other = Comparison::new(&[task], digester()).unwrap();
        assert!(other.take(records).unwrap());
        assert!(other.verdict().is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_the_files_may_be_the_tasks_own() {
        let (mut child, task) = idle();
        let digester = || Digester::new(5, &[]).unwrap();
        let records = told(task, &digester());
        // The last page of its code: read-only, and so far nobody's but the file's.
        let text = proc_text(task.pid, "maps").unwrap();
        let code = maps::parse(&text).find(|m| m.inode != 0 && m.perms == "r-xp").unwrap();
        let at = code.end - PAGE as u64 + 7;
        let path = format!("/proc/{}/mem", task.pid);
        let memory = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at).unwrap();
        let compared = |byte: u8| {
            memory.write_all_at(&[byte], at).unwrap();
            let mut other = Comparison::new(&[task], digester()).unwrap();
            assert!(other.take(records.clone()).unwrap());
            other.verdict()
        };
        assert!(compared(byte[0]).is_ok());
        assert!(compared(!byte[0]).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn nonsense_is_refused() {
        let (mut child, task) = idle();
        let new = || Comparison::new(&[task], Digester::new(5, &[]).unwrap()).unwrap();
        let pages = |start| DigestRecord::Pages { start, digests: vec![1] };
        assert!(new().take(vec![pages(0x1000)]).is_err());
        assert!(new().take(vec![DigestRecord::Range { vpid: 8, start: 0, end: 1 }]).is_err());
        assert!(new().take(vec![DigestRecord::Shared { vpid: 7, at: 0, size: 1 }]).is_err());
        assert!(new().take(vec![DigestRecord::End { pages: 1 }]).is_err());
        assert!(new().take(vec![DigestRecord::End { pages: 0 }; 2]).is_err());
        let range = DigestRecord::Range { vpid: 7, start: 0, end: u64::MAX };
        assert!(new().take(vec![range.clone(), pages(0x1001)]).is_err());
        // Where nothing is mapped, nothing is the same.
        let mut other = new();
        let zeros = Digester::new(5, &[]).unwrap().plain(&[0; PAGE]);
        let nowhere = DigestRecord::Pages { start: 0x1000, digests: vec![zeros] };
        other.take(vec![DigestRecord::Range { vpid: 7, start: 0, end: 0x2000 }, nowhere]).unwrap();
        assert!(other.take(vec![DigestRecord::End { pages: 1 }]).unwrap());
        assert!(other.verdict().is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
