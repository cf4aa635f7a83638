//! Staged pages put into restored tasks: the daemon at the other end of CRIU's
//! `lazy-pages.socket`.
//!
//! CRIU restores with `lazy_pages`: it makes the mappings, registers them with a userfaultfd and
//! sends us that descriptor for each task (an i32 pid as the container sees it, then one byte with
//! the descriptor; a negative pid is a zombie without one; at the end the u32 `0x52535446`). We
//! install pages from the background in big batches and, ahead of them, those that a task waits
//! for. When everything is in, the descriptors are closed, and the memory is the task's own.
//!
//! Pages that are still on the source (post-copy) arrive while the tasks run, those that a task waits
//! for first: the daemon asks for them and installs each as it comes.
//!
//! Closing a descriptor while pages are missing would let the task read zeros, so the destination
//! ends a container whose pages cannot all be installed rather than letting it run on. If the daemon
//! itself is killed, whoever has its descriptors goes on by its [`Will`].
//! Sources: userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst, criu/uffd.c.

mod install;
mod succession;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, raise};

use super::pending::Pending;
use super::staging::{PageSlot, Staging};
use super::will::{Author, Missing, Snapshot, Will, WillWord};
use crate::criu::images::PagemapEntry;
use crate::sys::memory::{PAGE, UffdEvent, uffd_read, uffd_wake, uffd_zero};
use crate::sys::panics::{Panicked, caught};
use crate::sys::{fault, process, scm};
use crate::transport::frame::PageRun;

pub use succession::{LeftServer, Stranded, succeed};

/// Name of the socket in CRIU's work directory.
pub const SOCKET: &str = "lazy-pages.socket";

/// CRIU has ended before it had restored everything. Whoever has started it knows why.
#[derive(Clone, Copy, Debug)]
pub struct CriuClosed;

impl std::fmt::Display for CriuClosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CRIU closed the lazy-pages socket")
    }
}

impl std::error::Error for CriuClosed {}
const FINISHED: i32 = 0x5253_5446;
/// Pages fetched from the source with one that a task waits for: what lies behind it is likely to be
/// wanted next.
const AROUND: u32 = 16;

/// What the daemon is told while it serves.
#[derive(Debug)]
pub enum PageArrival {
    /// Pages of a task, by the address that they had on the source.
    Pages(i32, u64, Vec<u8>),
    /// Pages that are zero.
    Zeros(PageRun),
    /// Somebody wants to know what is still on the source (task, address, pages); and those that a
    /// task waits for are asked for once more. A new link is there.
    Missing(Sender<Vec<PageRun>>),
}

/// The way to a serving daemon.
#[derive(Debug)]
pub struct Intake {
    queue: SyncSender<PageArrival>,
    wake: Arc<EventFd>,
}

impl Intake {
    /// Hands something in; waits while the daemon has enough to do.
    ///
    /// # Errors
    /// When the daemon cannot be woken.
    pub fn hand_in(&self, arrived: PageArrival) -> Result<()> {
        // Whoever has all pages may have ended already.
        if self.queue.send(arrived).is_ok() {
            self.wake.write(1)?;
        }
        Ok(())
    }
}

/// Messages that wait for the daemon: 16 MiB.
const WAITING: usize = 16;

/// What the daemon has done when it ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Served {
    /// Pages installed.
    pub pages: u64,
    /// Faults that a task waited for.
    pub faults: u64,
    /// The longest that serving one of them took, in µs, and all of them together. A page that had
    /// to be fetched from the source counts from the fault until it was there.
    pub worst_fault_us: u64,
    /// See `worst_fault_us`.
    pub faults_us: u64,
    /// Pages that came from the source after the resume.
    pub fetched: u64,
}

impl Served {
    /// A task has waited since then.
    fn took(&mut self, since: Instant) {
        let took = since.elapsed().as_micros() as u64;
        self.worst_fault_us = self.worst_fault_us.max(took);
        self.faults_us += took;
    }
}

/// A run of pages that the source still has: a page's number there, and how many follow each other.
fn remote_run(vpid: i32, page: u64, pages: u32) -> PageRun {
    PageRun { vpid, start: page * PAGE as u64, pages: pages as usize }
}

#[derive(Debug)]
struct ServedTask {
    uffd: OwnedFd,
    /// The task whose pages these were on the source; a child of a fork has its parent's.
    vpid: i32,
    pending: Pending,
    /// What is still on the source.
    remote: Pending,
    /// Some of it has another address than on the source.
    moved: bool,
    /// Pages that the task waits for, which are on the source, by their address here: since when.
    waiting: HashMap<u64, Instant>,
    /// Where the background is; it goes up and starts again at the bottom.
    cursor: u64,
    /// The restore has not finished: a mapping that is not there may only not be registered yet.
    early: bool,
    gone: bool,
}

/// The listening end, made before the restore starts.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// What was done, or why it could not be.
    pub result: Result<Served>,
    /// After an error: as long as these live, a task that needs a missing page waits; when they
    /// are closed it reads zeros. So the tasks must have been ended by then.
    pub held: Vec<OwnedFd>,
}

impl Server {
    /// Listens in CRIU's work directory.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(work: &Path) -> Result<Server> {
        let path = work.join(SOCKET);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Server { listener })
    }

    /// Starts serving; `tell` is called once, at the end. Every page in `pagemaps` must be staged.
    /// Whoever has this process's descriptors can go on with the `will`, once `ready` has been called.
    ///
    /// # Errors
    /// When a page is missing: the restore must not go on then.
    ///
    /// Pages that are on the source are asked for with `want` (task, address, pages), and come in by
    /// the [`Intake`].
    pub fn start(
        self,
        staging: Staging,
        pagemaps: &HashMap<i32, Vec<PagemapEntry>>,
        will: Arc<Will>,
        want: impl Fn(PageRun) + Send + 'static,
        ready: impl Fn() + Send + 'static,
        tell: impl FnOnce(Ended) + Send + 'static,
    ) -> Result<Intake> {
        let mut pending = HashMap::new();
        for (&vpid, entries) in pagemaps {
            pending.insert(vpid, Pending::new(vpid, entries, &staging)?);
        }
        let mut daemon = Daemon::new(staging, will, want)?;
        daemon.pending = pending;
        daemon.ready = Box::new(ready);

        let started = daemon.spawn(tell, move |daemon| {
            let served = caught(|| {
                daemon.make_will()?;
                let (criu, _) = self.listener.accept()?;
                daemon.run(criu)?;
                fault::point("memory.served")
            });

            if served.as_ref().is_err_and(|e| e.is::<Panicked>()) && daemon.will.is_made() {
                // The container may run already, and an error would end it. Whoever has this process's
                // descriptors goes on as if it had been killed; once, for he says when it happens to him.
                let _ = raise(Signal::SIGKILL);
            }
            served
        });

        // No task is there that could miss anything.
        started.map_err(|stranded| stranded.why)
    }
}

impl ServedTask {
    fn new(uffd: OwnedFd, vpid: i32, mut pending: Pending) -> ServedTask {
        let remote = pending.take_remote();
        ServedTask {
            uffd,
            vpid,
            pending,
            remote,
            moved: false,
            waiting: HashMap::new(),
            cursor: 0,
            early: true,
            gone: false,
        }
    }
}

struct Daemon {
    staging: Staging,
    pending: HashMap<i32, Pending>,
    targets: Vec<ServedTask>,
    served: Served,
    finished: bool,
    /// The background ran into a mapping that is not registered yet.
    stalled: bool,
    /// Every page was in.
    all_in: bool,
    /// After a fork two tasks may want the same slot.
    shared: bool,
    /// A task of the will has gone since.
    outdated: bool,
    will: Arc<Will>,
    author: Author,
    arrivals: Receiver<PageArrival>,
    intake: Option<Intake>,
    wake: Arc<EventFd>,
    want: Box<dyn Fn(PageRun) + Send>,
    ready: Box<dyn Fn() + Send>,
}

impl Daemon {
    fn new(
        staging: Staging,
        will: Arc<Will>,
        want: impl Fn(PageRun) + Send + 'static,
    ) -> Result<Daemon> {
        let (queue, arrivals) = sync_channel(WAITING);
        let wake = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?);
        will.note_descriptor(WillWord::Staging, Some(staging.number()));

        Ok(Daemon {
            staging,
            pending: HashMap::new(),
            targets: Vec::new(),
            served: Served::default(),
            finished: false,
            stalled: false,
            all_in: false,
            shared: false,
            outdated: false,
            author: Author::new(&will)?,
            will,
            arrivals,
            intake: Some(Intake { queue, wake: wake.clone() }),
            wake,
            want: Box::new(want),
            ready: Box::new(|| ()),
        })
    }

    /// On a thread of its own.
    fn spawn(
        mut self,
        tell: impl FnOnce(Ended) + Send + 'static,
        work: impl FnOnce(&mut Daemon) -> Result<()> + Send + 'static,
    ) -> Result<Intake, Stranded> {
        let Some(intake) = self.intake.take() else {
            return Err(Stranded { why: anyhow!("it serves already"), held: self.give_up() });
        };

        // Where there can be no thread, what it was to have is not lost with it.
        let place = Arc::new(Mutex::new(Some(self)));
        let own = place.clone();
        let taken = move |place: &Mutex<Option<Daemon>>| {
            place.lock().unwrap_or_else(PoisonError::into_inner).take()
        };
        let serve = move || {
            let Some(mut daemon) = taken(&own) else { return };
            // Not even by a panic may anything be closed here.
            let result = caught(|| work(&mut daemon)).map(|()| daemon.served);
            if result.is_ok() {
                let _ = fault::point("memory.done");
                // All is in: whoever touches memory that never had contents must not wait for
                // somebody to give it some, as he would while anybody holds a descriptor.
                daemon.targets.clear();
            }
            tell(Ended { result, held: daemon.give_up() });
        };

        match std::thread::Builder::new().name("pages".into()).spawn(serve) {
            Ok(_) => Ok(intake),
            Err(e) => {
                let held = taken(&place).map(Daemon::give_up).unwrap_or_default();
                Err(Stranded { why: e.into(), held })
            }
        }
    }

    /// Returns what tasks wait on.
    fn give_up(self) -> Vec<OwnedFd> {
        self.targets.into_iter().map(|target| target.uffd).collect()
    }

    /// Tells whether CRIU has made all tasks that something is missing in.
    fn all_here(&self) -> bool {
        self.pending.values().all(|pending| pending.0.is_empty())
    }

    /// Writes down what is missing, when all tasks are here.
    fn make_will(&mut self) -> Result<()> {
        if !self.all_here() {
            self.author.forget();
            return Ok(());
        }
        let missing = |target: &ServedTask| Missing {
            uffd: target.uffd.as_raw_fd(),
            vpid: target.vpid,
            moved: target.moved,
            runs: target.pending.0.iter().chain(&target.remote.0).map(|(s, r)| (*s, *r)).collect(),
        };
        let tasks = self.targets.iter().map(missing).collect();
        self.author.snapshot(&self.will, &Snapshot { staging: self.staging.kept(), tasks })?;
        self.outdated = false;
        (self.ready)();
        Ok(())
    }

    fn run(&mut self, mut criu: UnixStream) -> Result<()> {
        self.will.note_descriptor(WillWord::Lazy, Some(criu.as_raw_fd()));
        loop {
            let idle = self.targets.iter().all(|t| t.pending.0.is_empty());
            if idle && self.targets.iter().all(|t| t.remote.0.is_empty()) {
                if self.finished {
                    // Before anything is closed: whoever comes after has nothing to fill any more.
                    self.will.note(WillWord::Done, 1);
                    return Ok(());
                }

                if !self.all_in && self.all_here() {
                    // What comes yet is CRIU's last word.
                    self.all_in = true;
                    fault::point("memory.all-in")?;
                }
            }

            let timeout = if idle {
                PollTimeout::NONE
            } else if self.stalled {
                PollTimeout::from(1u8)
            } else {
                PollTimeout::ZERO
            };

            let targets = self.targets.len();
            let ready = {
                let mut set: Vec<PollFd> = self
                    .targets
                    .iter()
                    .map(|t| PollFd::new(t.uffd.as_fd(), PollFlags::POLLIN))
                    .collect();
                set.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));

                if !self.finished {
                    set.push(PollFd::new(criu.as_fd(), PollFlags::POLLIN));
                }
                match poll(&mut set, timeout) {
                    Ok(_) => {}
                    Err(Errno::EINTR) => continue,
                    Err(e) => return Err(e.into()),
                }

                set.iter()
                    .map(|p| p.revents().is_some_and(|r| !r.is_empty()))
                    .collect::<Vec<bool>>()
            };

            for (index, _) in ready.iter().enumerate().filter(|(_, r)| **r) {
                // Behind the targets that were there when we polled.
                match index.checked_sub(targets) {
                    None => self.events(index)?,
                    Some(0) => self.arrivals()?,
                    Some(_) => self.hello(&mut criu)?,
                }
            }

            self.stalled = false;
            self.background()?;
            let before = self.targets.len();
            self.targets.retain(|t| !t.gone);
            self.outdated |= self.targets.len() < before;
        }
    }

    /// A message of CRIU's: a task's descriptor, or the end of the restore.
    fn hello(&mut self, criu: &mut UnixStream) -> Result<()> {
        let mut number = [0; 4];
        let vpid = match criu.read_exact(&mut number) {
            Ok(()) => i32::from_le_bytes(number),
            // It has nothing to say any more, whatever became of it.
            Err(_) if self.will.is_made() => FINISHED,
            Err(e) => return Err(e).context(CriuClosed),
        };

        if vpid == FINISHED {
            self.finished = true;
            self.will.note(WillWord::Finished, 1);
            if let Some(vpid) = self.pending.iter().find(|(_, p)| !p.0.is_empty()).map(|(v, _)| v) {
                bail!("CRIU asked for no pages for task {vpid}");
            }
            for target in &mut self.targets {
                target.early = false;
            }
            return Ok(());
        }

        if vpid < 0 {
            return Ok(());
        }
        let (_, mut fds) = scm::receive(&*criu)?.ok_or(CriuClosed)?;
        let uffd = fds.pop().ok_or_else(|| anyhow!("CRIU sent no userfaultfd"))?;
        let pending = self.pending.remove(&vpid).unwrap_or_default();
        self.targets.push(ServedTask::new(uffd, vpid, pending));

        // Whoever comes later with nothing missing need not stand in it; but the number of one that has
        // gone, and does, may be his.
        if self.all_here() && (self.outdated || !self.will.is_made()) {
            self.make_will()?;
        }

        Ok(())
    }

    /// Everything that a task's descriptor has to say.
    fn events(&mut self, index: usize) -> Result<()> {
        loop {
            if self.author.is_full() {
                self.make_will()?;
            }
            let uffd = &self.targets[index].uffd;
            let event = match uffd_read(uffd, self.author.place(uffd.as_raw_fd())) {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                    self.targets[index].gone = true;
                    return Ok(());
                }
                Err(e) => return Err(e).context("reading a userfaultfd"),
            };

            if !matches!(event, UffdEvent::Fault(_)) {
                self.author.keep();
            }
            let target = &mut self.targets[index];
            match event {
                UffdEvent::Fault(at) => {
                    let page = at & !(PAGE as u64 - 1);
                    let began = Instant::now();
                    self.served.faults += 1;
                    let wanted = target.pending.take(page, page + PAGE as u64);
                    let remote = target.remote.range(page, AROUND);
                    if let (true, Some((PageSlot::Remote(origin), pages))) =
                        (wanted.is_empty(), remote)
                    {
                        target.waiting.entry(page).or_insert(began);
                        (self.want)(remote_run(target.vpid, origin, pages));
                        continue;
                    }

                    if wanted.is_empty() {
                        // Never had contents, or came in since the task stumbled.
                        match uffd_zero(&target.uffd, page, PAGE).1 {
                            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                                let _ = uffd_wake(&target.uffd, page, PAGE as u64);
                            }
                            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                                let _ = uffd_wake(&target.uffd, page, PAGE as u64);
                            }
                            _ => {}
                        }
                    }

                    for (start, run) in wanted {
                        self.install(index, start, run)?;
                    }
                    self.served.took(began);
                }
                UffdEvent::Fork(number) => {
                    self.shared = true;
                    let (pending, remote) = (target.pending.clone(), target.remote.clone());
                    let (vpid, moved, early) = (target.vpid, target.moved, !self.finished);
                    let child = ServedTask::new(process::adopt_fd(number)?, vpid, pending);
                    self.targets.push(ServedTask { remote, moved, early, ..child });
                }
                change => {
                    target.moved |= target.pending.change(change);
                    target.remote.change(change);
                }
            }
        }
    }

    /// Returns what came from the source, and questions.
    fn arrivals(&mut self) -> Result<()> {
        let _ = self.wake.read();
        while let Ok(arrived) = self.arrivals.try_recv() {
            match arrived {
                PageArrival::Pages(vpid, at, bytes) => {
                    let first = at / PAGE as u64;
                    self.arrive(vpid, first, (bytes.len() / PAGE) as u64, Some(&bytes))?;
                }
                PageArrival::Zeros(run) => {
                    self.arrive(run.vpid, run.start / PAGE as u64, run.pages as u64, None)?;
                }
                PageArrival::Missing(reply) => {
                    let _ = reply.send(self.missing());
                    for target in &self.targets {
                        for &page in target.waiting.keys() {
                            if let Some((PageSlot::Remote(origin), pages)) =
                                target.remote.range(page, AROUND)
                            {
                                (self.want)(remote_run(target.vpid, origin, pages));
                            }
                        }
                    }
                }
            }
        }

        Ok(())
    }

    /// Returns what is still on the source.
    fn missing(&self) -> Vec<PageRun> {
        let of = |vpid: i32, list: &Pending| -> Vec<PageRun> {
            let remote = list.0.values().filter_map(|run| match run.slot {
                PageSlot::Remote(page) => Some(remote_run(vpid, page, run.pages)),
                _ => None,
            });
            remote.collect()
        };
        let mut all: Vec<_> = self.targets.iter().flat_map(|t| of(t.vpid, &t.remote)).collect();
        // Those whose tasks CRIU has not made yet.
        all.extend(self.pending.iter().flat_map(|(vpid, list)| of(*vpid, list)));
        all.sort_unstable();
        all.dedup();
        all
    }
}
