//! Which pages a task has: its private anonymous mappings, and what of them is populated.
//!
//! The choice is CRIU's (criu/mem.c, criu/include/vma.h): pages present or swapped that are
//! neither the zero page nor the file's own. Guard pages look swapped and cannot be read, so they
//! are left out (since Linux 6.13). Reading a page that is not listed would populate it in the
//! task.
//!
//! Whether a page is the file's own the kernel looks up page by page, which is most of a scan's time. Where
//! no file is mapped it is not asked: 7 times as fast.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use crate::sys::maps::Mapping;
use crate::sys::memory::{PAGE, PageRegion, ScanFilter, category, pagemap_scan, read_process};
use crate::sys::process::proc_text;

/// What looks like private memory, and is the kernel's.
const SPECIAL: &[&str] =
    &["[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]", "[sigpage]", "[vectors]", "[uprobes]"];

/// A process of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// As this host numbers it.
    pub pid: i32,
    /// As the container numbers it: the name of its image files.
    pub vpid: i32,
}

/// The container's processes that have memory, out of host's numbers; those that have just ended
/// are left out.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn tasks(pids: &[i32]) -> Result<Vec<Task>> {
    let mut found = Vec::with_capacity(pids.len());
    for &pid in pids {
        let status = match proc_text(pid, "status") {
            Ok(s) => s,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => continue,
            Err(e) => return Err(e.into()),
        };
        let field = |name: &str| {
            status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim).unwrap_or_default()
        };
        if field("State:").starts_with('Z') || field("State:").starts_with('X') {
            continue;
        }
        let vpid = field("NSpid:").split_whitespace().last().and_then(|p| p.parse().ok());
        found
            .push(Task { pid, vpid: vpid.with_context(|| format!("process {pid} has no NSpid"))? });
    }
    Ok(found)
}

/// The addresses of a task's private anonymous mappings.
///
/// # Errors
/// `NotFound` where the task has ended.
pub fn anonymous_mappings(pid: i32) -> Result<Vec<(u64, u64)>> {
    let text = proc_text(pid, "maps")?;
    let mut found = Vec::new();
    for line in text.lines() {
        let mapping = Mapping::parse(line)
            .with_context(|| format!("cannot read a line of /proc/{pid}/maps"))?;
        if mapping.is_anonymous() && !mapping.is_shared() && !is_kernels(&mapping) {
            found.push((mapping.start, mapping.end));
        }
    }
    Ok(found)
}

/// Tells whether a mapping is the kernel's own: each kernel has its own contents there.
pub fn is_kernels(mapping: &Mapping<'_>) -> bool {
    mapping.inode == 0 && SPECIAL.contains(&mapping.name)
}

/// Finds populated pages with as few system calls as the kernel allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finder {
    /// `PAGEMAP_SCAN` that knows guard pages (Linux 6.13 and newer).
    ScanWithGuards,
    /// `PAGEMAP_SCAN` (Linux 6.7).
    Scan,
    /// `/proc/PID/pagemap`, entry by entry.
    Pagemap,
}

impl Finder {
    fn probe() -> Finder {
        let Ok(own) = File::open("/proc/self/pagemap") else { return Finder::Pagemap };
        let at = (&raw const own) as u64 & !(PAGE as u64 - 1);
        let mut found = Vec::new();
        for finder in [Finder::ScanWithGuards, Finder::Scan] {
            let wanted = wanted(RegionKind::Private, finder.guard());
            if pagemap_scan(&own, at, at + PAGE as u64, wanted, &mut found).is_ok() {
                return finder;
            }
        }
        Finder::Pagemap
    }

    fn guard(self) -> u64 {
        if self == Finder::ScanWithGuards { category::GUARD } else { 0 }
    }
}

/// What may be mapped where populated pages are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RegionKind {
    /// A file's own pages are not wanted.
    Private,
    /// There are none.
    Anonymous,
}

fn wanted(kind: RegionKind, guard: u64) -> ScanFilter {
    let file = if kind == RegionKind::Private { category::FILE } else { 0 };
    let out = category::PFNZERO | file | guard;
    let any_of = category::PRESENT | category::SWAPPED;
    ScanFilter { inverted: out, mask: out, any_of, protect: false }
}

/// The populated private anonymous pages of a task, in ascending order.
///
/// # Errors
/// `NotFound` where the task has ended.
pub fn populated(pid: i32) -> Result<Vec<PageRegion>> {
    populated_anonymous(pid, &anonymous_mappings(pid)?)
}

/// The same for some of its private anonymous mappings. What has become another mapping since it was
/// listed may tell pages of a file's.
///
/// # Errors
/// `NotFound` where the task has ended.
pub fn populated_anonymous(pid: i32, mappings: &[(u64, u64)]) -> Result<Vec<PageRegion>> {
    find(RegionKind::Anonymous, pid, mappings)
}

/// The populated pages of some private mappings, whether or not of files, that are the task's own.
///
/// # Errors
/// `NotFound` where the task has ended.
pub fn populated_in(pid: i32, mappings: &[(u64, u64)]) -> Result<Vec<PageRegion>> {
    find(RegionKind::Private, pid, mappings)
}

fn find(kind: RegionKind, pid: i32, mappings: &[(u64, u64)]) -> Result<Vec<PageRegion>> {
    static FINDER: std::sync::OnceLock<Finder> = std::sync::OnceLock::new();
    let finder = *FINDER.get_or_init(Finder::probe);
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = Vec::new();
    for &(start, end) in mappings {
        match finder {
            Finder::Pagemap => read_pagemap(&pagemap, start, end, &mut found)?,
            finder => {
                let wanted = wanted(kind, finder.guard());
                pagemap_scan(&pagemap, start, end, wanted, &mut found)?;
            }
        }
    }
    Ok(found)
}

/// The slow way: 8 bytes a page. Documentation/admin-guide/mm/pagemap.rst: bit 63 present,
/// 62 swapped, 61 file or shared. The zero page cannot be told here; it costs a read, no more.
fn read_pagemap(pagemap: &File, start: u64, end: u64, found: &mut Vec<PageRegion>) -> Result<()> {
    let mut buffer = [0u8; 8 * 512];
    let mut at = start;
    while at < end {
        let pages = (((end - at) / PAGE as u64) as usize).min(512);
        pagemap.read_exact_at(&mut buffer[..pages * 8], at / PAGE as u64 * 8)?;
        for (i, raw) in buffer[..pages * 8].chunks_exact(8).enumerate() {
            let entry = u64::from_ne_bytes(raw.try_into().expect("chunks of eight"));
            if entry >> 62 == 0 || entry >> 61 & 1 == 1 {
                continue;
            }
            let page = at + (i * PAGE) as u64;
            match found.last_mut() {
                Some(last) if last.end == page => last.end += PAGE as u64,
                _ => found.push(PageRegion { start: page, end: page + PAGE as u64, categories: 0 }),
            }
        }
        at += (pages * PAGE) as u64;
    }
    Ok(())
}

/// Reads a task's memory: fast where the mapping is readable, through `/proc/PID/mem` where it is
/// not (`PROT_NONE` pages hold data too).
#[derive(Debug)]
pub struct Reader {
    pid: i32,
    mem: File,
}

impl Reader {
    /// # Errors
    /// When the task has ended.
    pub fn open(pid: i32) -> Result<Reader> {
        Ok(Reader { pid, mem: File::open(format!("/proc/{pid}/mem"))? })
    }

    /// Reads the pages of `runs` (address, pages) in order into `into`. Calls `missing` with the
    /// index of every page that could not be read (unmapped since it was listed): its bytes mean
    /// nothing.
    ///
    /// # Errors
    /// When the task has ended.
    pub fn read(
        &self,
        runs: &[(u64, usize)],
        into: &mut [u8],
        mut missing: impl FnMut(usize),
    ) -> Result<()> {
        let places: Vec<(u64, usize)> = runs.iter().map(|&(a, n)| (a, n * PAGE)).collect();
        let total: usize = places.iter().map(|p| p.1).sum();
        let done = match read_process(self.pid, &places, &mut into[..total]) {
            Ok(n) => n / PAGE,
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => 0,
            Err(e) => return Err(e.into()),
        };
        // What is left goes page by page: a hole of one page must not lose its neighbours.
        let pages = runs.iter().flat_map(|&(a, n)| (0..n as u64).map(move |i| a + i * PAGE as u64));
        for (i, at) in pages.enumerate().skip(done) {
            match self.mem.read_exact_at(&mut into[i * PAGE..][..PAGE], at) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(e.into()),
                Err(_) => missing(i),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_wrote_is_listed_and_read_back() {
        let data: Vec<u8> = (0..64 * PAGE).map(|i| (i / PAGE) as u8 ^ i as u8).collect();
        let pid = std::process::id() as i32;
        let start = (data.as_ptr() as u64).next_multiple_of(PAGE as u64);
        let found = populated(pid).unwrap();
        assert!(found.iter().any(|r| r.start <= start && start < r.end));
        let mut got = vec![0; 16 * PAGE];
        let runs = [(start, 8), (start + 32 * PAGE as u64, 8)];
        Reader::open(pid).unwrap().read(&runs, &mut got, |_| panic!("all is there")).unwrap();
        let skew = start as usize - data.as_ptr() as usize;
        assert_eq!(got[..8 * PAGE], data[skew..][..8 * PAGE]);
        assert_eq!(got[8 * PAGE..], data[skew + 32 * PAGE..][..8 * PAGE]);
    }

    #[test]
    fn no_file_needs_to_be_asked_for_where_none_is_mapped() {
        // A task that stands still, with mappings of files that it has written to.
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let asleep = || proc_text(pid, "stat").unwrap().contains("(sleep) S");
        while !asleep() {
            std::thread::yield_now();
        }

        let text = proc_text(pid, "maps").unwrap();
        let files: Vec<_> = crate::sys::maps::parse(&text)
            .filter(|m| !m.is_anonymous() && !m.is_shared())
            .map(|m| (m.start, m.end))
            .collect();
        let anonymous = anonymous_mappings(pid).unwrap();

        let asked = populated_in(pid, &anonymous).unwrap();
        let unasked = populated_anonymous(pid, &anonymous).unwrap();
        let (own, all) =
            (populated_in(pid, &files).unwrap(), populated_anonymous(pid, &files).unwrap());
        let count = |list: &[PageRegion]| list.iter().map(|r| r.end - r.start).sum::<u64>();

        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(asked, unasked);
        assert!(count(&asked) > 0);

        // Its code is the files' own, its data is not.
        assert!(count(&own) > 0 && count(&own) < count(&all));
    }

    #[test]
    fn own_task_has_its_number() {
        let pid = std::process::id() as i32;
        let list = tasks(&[pid]).unwrap();
        assert_eq!(list[0].pid, pid);
        assert!(list[0].vpid > 0);
    }
}
