//! Memory that CRIU's dump does not see, in time with it. What may be hidden, and why:
//! [`crate::criu::hidden`].
//!
//! ```text
//! before        each task's mappings are looked at; a file is put over each smaps, for CRIU alone
//! at the freeze maps, which is cheap, says which are still there; the files are filled
//! beside CRIU   what is populated in hidden ones is listed
//! post-dump     records and pages are added to the images, and each mapping must be there once
//! until commit  all flags are looked at once more: another one than thought, and nothing is handed over
//! ```
//!
//! A task that has come meanwhile has no file, so CRIU sees all of it. Nothing here fails a dump but what
//! would make a wrong image: whatever cannot be hidden, CRIU is shown.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::criu::hidden::{AdviceChange, Drawn, KnownMappings};
use crate::criu::vdso::Foreign;
use crate::criu::{images, lent, mm};
use crate::memory::pages::{self, Task};
use crate::memory::shared::SharedMemory;
use crate::migration::journal::workdir::CriuPath;
use crate::oci::cgroup::Cgroup;
use crate::problem::advice;
use crate::sys::maps;
use crate::sys::memory::{PAGE, PageRegion};
use crate::sys::process::{self, proc_text};
use crate::sys::smaps;

/// With less memory the flags are looked at beside CRIU, so that a change is still in time for the images.
/// With more that would keep CRIU waiting: nobody maps anything into a task meanwhile.
const AT_ONCE: u64 = 128 << 20;
/// Time that a thread of a frozen task may take to be seen standing.
const PATIENCE: Duration = Duration::from_millis(20);

/// What is hidden from a dump.
#[derive(Debug)]
pub struct Hiding {
    directory: PathBuf,
    /// Tasks with a file, by number.
    looked: HashMap<i32, Looked>,
    /// Shared memory that the rounds read, too.
    shared: SharedMemory,
    work: Option<JoinHandle<Result<Vec<Hidden>>>>,
}

#[derive(Debug)]
struct Looked {
    /// With the number, a name that is not used twice.
    started: Option<u64>,
    known: KnownMappings,
}

/// A task, frozen.
#[derive(Debug)]
struct Hidden {
    task: Task,
    drawn: Drawn,
    /// What is populated of what is hidden.
    regions: Vec<PageRegion>,
    /// Where it was looked already: what is not as it was thought to be.
    changes: Option<Vec<AdviceChange>>,
}

/// What was added to the images.
#[derive(Debug)]
pub struct Added {
    /// Number of mappings.
    pub mappings: usize,
    /// Populated pages of theirs.
    pub pages: u64,
    /// Tasks of which it is not certain yet that it is right.
    pub unchecked: Unchecked,
}

/// See [`Added::unchecked`].
#[derive(Debug)]
pub struct Unchecked(Vec<Hidden>);

impl Hiding {
    /// Looks at the running tasks, and makes the files below `work`, for CRIU to find: none of them has
    /// anything in it before the tasks are frozen, so that CRIU can do nothing with one too early.
    ///
    /// # Errors
    /// When there is no room for files.
    pub fn prepare(work: &CriuPath, cgroup: &Cgroup, shared: SharedMemory) -> Result<Hiding> {
        let directory = work.mappings();
        fs::create_dir(&directory)?;
        let mut looked = HashMap::new();
        for pid in cgroup.processes()? {
            if let Some(found) = Looked::look(pid) {
                fs::write(directory.join(pid.to_string()), "")?;
                looked.insert(pid, found);
            }
        }
        Ok(Hiding { directory, looked, shared, work: None })
    }

    /// Returns where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Looks again, shortly before the freeze, at those that have other mappings since.
    pub fn look_again(&mut self) {
        for (pid, looked) in &mut self.looked {
            let same = proc_text(*pid, "maps").is_ok_and(|maps| looked.known.is_of(&maps));
            if !same
                && let Some(now) = Looked::look(*pid)
                && now.started == looked.started
            {
                *looked = now;
            }
        }
    }

    /// The tasks stand still, and CRIU has not begun: writes what it is to see. `hides` says whether it
    /// finds the files at all; `stacks` where a task's threads have their stacks, if that is known.
    ///
    /// # Errors
    /// When a task has ended, or there is no room. CRIU must not go on then.
    pub fn draw(
        &mut self,
        cgroup: &Cgroup,
        hides: bool,
        stacks: &dyn Fn(i32) -> Option<Vec<u64>>,
    ) -> Result<()> {
        let began = Instant::now();
        let (mut hidden, mut resident) = (Vec::new(), 0);
        let mut shared: HashSet<u64> =
            if hides { self.shared.known().into_keys().collect() } else { HashSet::new() };
        let tasks = pages::tasks(&cgroup.processes()?)?;
        let standing: Vec<_> =
            tasks.iter().map(|task| self.standing(*task, hides, stacks)).collect();
        // Of shared memory all mappings are hidden, or none.
        let drawn = loop {
            let mut drawn = Vec::new();
            let mut seen = HashSet::new();
            for (task, pointers) in tasks.iter().zip(&standing) {
                let one = match pointers {
                    Some((looked, Some(pointers))) => looked.draw(task.pid, pointers, &shared)?,
                    _ => None,
                };
                match &one {
                    Some(one) => seen.extend(one.seen.iter().copied()),
                    None if shared.is_empty() => {}
                    None => seen.extend(shared_of(task.pid)?),
                }
                drawn.push(one);
            }

            let before = shared.len();
            shared.retain(|inode| !seen.contains(inode));
            if shared.len() == before {
                break drawn;
            }
            tracing::debug!(?seen, "CRIU has to see shared memory");
        };

        for ((task, drawn), known) in tasks.into_iter().zip(drawn).zip(standing) {
            let file = self.directory.join(task.pid.to_string());
            match (known, drawn) {
                // There is no file, or it lies over that of another task, which has ended.
                (None, _) => {}
                (Some(_), Some(drawn)) => {
                    fs::write(&file, &drawn.text)?;
                    resident += resident_bytes(task.pid);
                    hidden.push(Hidden { task, drawn, regions: Vec::new(), changes: None });
                }
                (Some(_), None) => fs::write(&file, proc_text(task.pid, "smaps")?)?,
            }
        }

        let at_once = resident <= AT_ONCE || hidden.iter().any(|one| one.drawn.unsure);
        tracing::debug!("mappings are hidden: {} us", began.elapsed().as_micros());
        let work = move || {
            for one in &mut hidden {
                one.regions = pages::populated_anonymous(one.task.pid, &one.ranges())?;
            }
            if at_once {
                for one in &mut hidden {
                    one.changes = Some(one.check()?);
                }
            }
            Ok(hidden)
        };

        self.work = Some(std::thread::Builder::new().name("hidden".into()).spawn(work)?);
        Ok(())
    }

    /// Returns what is known of a frozen task, if it has a file, and where its threads' stacks are, if anything
    /// may be hidden.
    fn standing(
        &self,
        task: Task,
        hides: bool,
        stacks: &dyn Fn(i32) -> Option<Vec<u64>>,
    ) -> Option<(&Looked, Option<Vec<u64>>)> {
        let looked = self.looked.get(&task.pid)?;
        if process::start_time(task.pid) != looked.started {
            return None;
        }
        let pointers = || stacks(task.pid).or_else(|| await_stacks(task.pid));
        Some((looked, hides.then(pointers).flatten()))
    }

    /// CRIU has dumped: adds to the images what it has not seen.
    ///
    /// # Errors
    /// When the images would not be those of the tasks: CRIU has seen what it was not shown, or lacks
    /// what it was; or flags have changed as none can.
    pub fn add(&mut self, images: &Path) -> Result<Added> {
        let work = self.work.take().ok_or_else(|| anyhow!("nothing was hidden"))?;
        let hidden = work.join().unwrap_or_else(|_| Err(anyhow!("the thread has died")))?;
        let began = Instant::now();
        let (mut mappings, mut pages) = (0, 0);
        let numbers = self.shared.known();
        for one in &hidden {
            one.add(images, &numbers).with_context(|| format!("process {}", one.task.vpid))?;
            mappings += one.drawn.hidden.len();
            pages += one.regions.iter().map(|r| (r.end - r.start) / PAGE as u64).sum::<u64>();
        }
        pages += self.lend(images, &hidden)?;
        tracing::debug!("{mappings} mappings were added: {} us", began.elapsed().as_micros());
        let unchecked = hidden.into_iter().filter(|one| one.changes.is_none()).collect();
        Ok(Added { mappings, pages, unchecked: Unchecked(unchecked) })
    }
}

impl Hiding {
    /// Says which files stand for the shared memory that CRIU has not seen; how many pages are populated.
    fn lend(&self, images: &Path, hidden: &[Hidden]) -> Result<u64> {
        let inodes: HashSet<u64> =
            hidden.iter().flat_map(|one| one.drawn.unseen.iter().copied()).collect();
        if inodes.is_empty() {
            return Ok(0);
        }

        let seen = match fs::read(images.join("memfd.img")) {
            Ok(bytes) => images::parse_memfds(&bytes)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e.into()),
        };
        let began = Instant::now();
        let placed = self.shared.placed()?;
        tracing::debug!("shared memory was waited for: {} us", began.elapsed().as_micros());

        let (mut files, mut pages) = (Vec::new(), 0);
        for inode in inodes {
            let seen = seen.contains(&(inode as u32));
            if seen || images.join(format!("pagemap-shmem-{inode}.img")).exists() {
                // A descriptor of it, which was on its way through a socket.
                return Err(advice(
                    format!(
                        "shared memory (inode {inode}) has a descriptor that was not there before"
                    ),
                    "try again",
                ));
            }
            let there = placed.get(&inode);
            let there = there.ok_or_else(|| anyhow!("shared memory {inode} was not read"))?;
            files.push(there.file);
            pages += there.pages;
        }

        files.sort_unstable_by_key(|file| file.number);
        fs::write(images.join(lent::LIST), lent::list(&files)?)?;
        let place = images.join("files.img");
        fs::write(&place, lent::with_files(&fs::read(&place)?, &files)?)?;

        Ok(pages)
    }
}

impl Unchecked {
    /// Tells whether all is known to be right.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Looks at the flags of the tasks, which still stand frozen.
    ///
    /// # Errors
    /// When the images are not those of the tasks.
    pub fn verdict(self) -> Result<()> {
        let began = Instant::now();
        for one in self.0 {
            if let Some(change) = one.check()?.first() {
                return Err(changed(&format!("{change:x?} of process {}", one.task.vpid)));
            }
        }
        tracing::debug!("all flags are as they were: {} us", began.elapsed().as_micros());
        Ok(())
    }
}

impl Looked {
    /// None where the task has ended, or a line is not understood.
    fn look(pid: i32) -> Option<Looked> {
        let started = process::start_time(pid);
        let known = known(pid, &proc_text(pid, "smaps").ok()?)?;
        started.is_some().then_some(Looked { started, known })
    }

    /// Returns what CRIU is shown of the frozen task. Where a mapping has come that it must see, all are looked
    /// at again.
    fn draw(&self, pid: i32, stacks: &[u64], shared: &HashSet<u64>) -> Result<Option<Drawn>> {
        let maps = proc_text(pid, "maps")?;
        if let Some(drawn) = self.known.draw(&maps, stacks, shared) {
            return Ok(Some(drawn));
        }
        tracing::debug!("process {pid} has a mapping that it had not before");
        let now = known(pid, &proc_text(pid, "smaps")?);
        Ok(now.and_then(|now| now.draw(&maps, stacks, shared)))
    }
}

/// What a task's smaps tells, if it is understood.
fn known(pid: i32, smaps: &str) -> Option<KnownMappings> {
    Some(KnownMappings::parse(smaps)?.with_vdso(Foreign::of(pid, smaps)))
}

impl Hidden {
    /// All private memory that is hidden but pages that CRIU sees.
    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut shown = self.drawn.shown.iter().peekable();
        let mut all = Vec::new();
        for record in self.drawn.hidden.iter().filter(|record| record.shared.is_none()) {
            let Range { mut start, end } = record.range;
            while let Some(page) = shown.next_if(|page| page.start < end) {
                all.push((start, page.start));
                start = page.end;
            }
            all.push((start, end));
        }
        all.retain(|(start, end)| start < end);
        all
    }

    fn check(&self) -> Result<Vec<AdviceChange>> {
        let text = proc_text(self.task.pid, "smaps")?;
        let now = smaps::parse(&text).ok_or_else(|| changed("a line of smaps"))?;
        self.drawn.check(&now).map_err(|why| changed(&why))
    }

    /// Adds to the images of the task; `numbers` are those of the files that stand for shared memory.
    fn add(&self, images: &Path, numbers: &HashMap<u64, u32>) -> Result<()> {
        let vpid = self.task.vpid;
        let mut records = self.drawn.hidden.clone();
        let mut seen = Vec::new();
        for change in self.changes.iter().flatten() {
            match change {
                AdviceChange::Hidden(now) => {
                    let of = |record: &&mut mm::MappingRecord| record.range == now.range;
                    records.iter_mut().filter(of).for_each(|record| record.clone_from(now));
                }
                AdviceChange::Seen(start, advice) => seen.push((*start, *advice)),
            }
        }

        let path = images.join(format!("mm-{vpid}.img"));
        let mut image = mm::MmImage::parse(&fs::read(&path)?)?;
        for page in &self.drawn.shown {
            image.remove(page)?;
        }

        image.add(&records, &|inode| numbers.get(&inode).map(|number| lent::id(*number)))?;
        for (start, advice) in seen {
            image.advise(start, advice)?;
        }
        let lacks = |range: &&Range<u64>| !image.has_once(range);
        if let Some(range) = self.drawn.ranges().find(lacks) {
            bail!("the mapping at {:#x} is not in CRIU's image", range.start);
        }

        fs::write(&path, image.bytes()?)?;

        let path = images.join(format!("pagemap-{vpid}.img"));
        Ok(fs::write(&path, images::with_lazy(&fs::read(&path)?, &self.regions)?)?)
    }
}

fn changed(what: &str) -> anyhow::Error {
    advice(
        format!(
            "what the kernel knows of the container's memory changed when it was frozen: {what}"
        ),
        "try again: the container has called madvise or mlock at that moment",
    )
}

/// Right after the freeze a thread may be seen to run for a moment.
fn await_stacks(pid: i32) -> Option<Vec<u64>> {
    let until = Instant::now() + PATIENCE;
    loop {
        match process::stack_pointers(pid) {
            Ok(pointers) => return Some(pointers),
            Err(_) if Instant::now() < until => std::thread::yield_now(),
            Err(_) => return None,
        }
    }
}

/// Inodes of shared memory that a task has mapped.
fn shared_of(pid: i32) -> Result<HashSet<u64>> {
    let text = proc_text(pid, "maps")?;
    let mappings = maps::parse(&text).filter(maps::Mapping::is_nameless);
    Ok(mappings.map(|mapping| mapping.inode).collect())
}

/// proc_pid_statm(5)
fn resident_bytes(pid: i32) -> u64 {
    let text = proc_text(pid, "statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * PAGE as u64
}
