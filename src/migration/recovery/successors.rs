//! Those who go on when whoever takes a container in is killed: they fill its memory, let it run, take
//! questions and new links of the source, and do the rest of his work.
//!
//! From the moment on in which pages are put into tasks there are always two of them who wait. Each has all
//! descriptors that he has ([`Successor`]), the tasks' userfaultfds among them, so that no task can
//! read zeros in the place of a page; and the [`Will`] says what is missing. One waits for the end
//! of all who were there before it, so that one at a time goes on.
//!
//! No task can be kept from reading zeros when all of them are killed: the kernel closes what they have, and
//! neither stops nor ends anybody who waits on it. So nothing that ends Ferry may end them with it: they
//! are in another session and another control group, and no victims of the memory killer's.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::decide::{self, CopyPhase, Pages, Released, hear, pages, released};
use super::undo;
use super::verdicts::{self, ControlCall};
use crate::criu::interposer::carry_on;
use crate::memory::serve::{self, Ended, LeftServer, Served, Stranded};
use crate::memory::will::{Will, WillWord};
use crate::migration::journal::criu;
use crate::migration::journal::{Journal, Record};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::migration::protocol::{Message, Standing};
use crate::migration::transfer::receiver::{self, Backlog, Current, Stage, send_missing, want};
use crate::oci::cgroup::{self, Cgroup};
use crate::sys::fault;
use crate::sys::process::{self, ProcessId};
use crate::sys::successor::{Successor, inherited};
use crate::tasks::criu_rescue;
use crate::transport::backoff::Backoff;
use crate::transport::connect;
use crate::transport::frame::PageRun;

/// Number of those that wait.
const WAITING: usize = 2;
/// Between two tries to end a copy that does not end, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Time that CRIU may take for a step of its end.
const CRIU_STEP: Duration = Duration::from_secs(60);

/// The two successors of whoever serves pages, and the thread that replaces one that has died.
#[derive(Debug)]
pub struct PageGuards {
    will: Arc<Will>,
    /// By what CRIU is released, if it is to be.
    criu: Option<OwnedFd>,
    stop: UnixStream,
    thread: JoinHandle<()>,
}

impl PageGuards {
    /// Starts them, and sees to it that there are always as many.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn start(journal: &Journal, will: Arc<Will>) -> Result<PageGuards> {
        let path = fs::canonicalize(journal.path())?;
        let number = will.number().to_string();
        let arguments = [b"/proc/self/exe", &b"__guard"[..], b"pages", path.as_os_str().as_bytes()];
        let arguments = arguments.into_iter().chain([number.as_bytes()]).map(<[u8]>::to_vec);
        let mut row = Row {
            successor: Successor::new(c"/proc/self/exe", arguments.collect())?,
            own: ProcessId::this(),
            pidfd: process::pidfd_open(ProcessId::this().pid)?,
            place: journal.record.work.guards(),
            waiting: Vec::new(),
            ended: Vec::new(),
        };
        row.fill().context("cannot start the guard process")?;
        let (stop, stopped) = UnixStream::pair()?;
        let keep = move || row.keep_full(stopped);
        let thread = std::thread::Builder::new().name("guards".into()).spawn(keep)?;
        Ok(PageGuards { will, criu: None, stop, thread })
    }

    /// Tells whether they know all that they need.
    pub fn can_go_on(&self) -> bool {
        self.will.is_made()
    }

    /// CRIU is to be released, whatever becomes of this process.
    pub fn take_criu(&mut self, criu: OwnedFd) {
        use std::os::fd::AsRawFd;
        self.will.note_descriptor(WillWord::Criu, Some(criu.as_raw_fd()));
        self.criu = Some(criu);
    }

    /// It is not.
    pub fn leave_criu(&mut self) {
        self.will.note_descriptor(WillWord::Criu, None);
        self.criu = None;
    }

    /// They go on when this process ends.
    pub fn leave(self) {
        let _ = self.stop.into_raw_fd();
    }

    /// Everything is done, or undone.
    pub fn dismiss(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}

/// Those who wait, in their order.
struct Row {
    successor: Successor,
    own: ProcessId,
    pidfd: OwnedFd,
    place: PathBuf,
    waiting: Vec<(i32, OwnedFd)>,
    /// Those who were killed: whoever came after one knows him by this descriptor.
    ended: Vec<OwnedFd>,
}

impl Row {
    fn fill(&mut self) -> Result<()> {
        while self.waiting.len() < WAITING {
            let waiting = self.waiting.iter().map(|(_, pidfd)| pidfd.as_fd());
            let before: Vec<BorrowedFd> = [self.pidfd.as_fd()].into_iter().chain(waiting).collect();
            let (pid, pidfd) = self.successor.start(&before)?;
            // Whoever runs out of memory is to find another victim. Needs CAP_SYS_RESOURCE;
            // proc_pid_oom_score_adj(5).
            let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000");
            // Whoever ends a session or a unit ends all that is in its group at once.
            let left = cgroup::move_to_root(pid);
            let _ = left.inspect_err(|e| tracing::warn!("a guard stays in its group: {e:#}"));
            self.waiting.push((pid, pidfd));
        }
        self.note()
    }

    /// Others must know that somebody has the container: at any moment, so that the file is replaced.
    fn note(&self) -> Result<()> {
        let now = |pid: i32| ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 });
        let all = self.waiting.iter().map(|(pid, _)| now(*pid));
        let lines = [self.own].into_iter().chain(all).map(|one| format!("{one}\n"));
        let fresh = self.place.with_extension("new");
        fs::write(&fresh, lines.collect::<String>())?;
        Ok(fs::rename(&fresh, &self.place)?)
    }

    fn keep_full(&mut self, stopped: UnixStream) {
        loop {
            let waiting = self.waiting.iter().map(|(_, pidfd)| pidfd.as_fd());
            let all: Vec<BorrowedFd> = [stopped.as_fd()].into_iter().chain(waiting).collect();
            match process::wait_readable(&all, None) {
                Ok(ready) if !ready.contains(&0) => {}
                _ => break,
            }
            for (pid, pidfd) in self.waiting.extract_if(.., |(_, pidfd)| process::has_ended(pidfd))
            {
                let _ = waitpid(Pid::from_raw(pid), None);
                self.ended.push(pidfd);
            }
            if let Err(e) = self.fill() {
                tracing::error!("a guard was killed, and there can be no other: {e:#}");
            }
        }
        for (pid, pidfd) in self.waiting.drain(..) {
            let _ = process::pidfd_kill(&pidfd, libc::SIGKILL);
            let _ = waitpid(Pid::from_raw(pid), None);
        }
    }
}

/// What was left.
struct Estate {
    will: Arc<Will>,
    criu: Option<OwnedFd>,
    staging: Option<OwnedFd>,
    lazy: Option<OwnedFd>,
    snapshot: Option<OwnedFd>,
    uffds: Vec<OwnedFd>,
}

impl Estate {
    /// Takes of what this process has been started with what the will names, and all userfaultfds;
    /// closes the rest.
    fn take(will: RawFd) -> Result<Estate> {
        use std::os::fd::AsRawFd;
        let all = inherited().context("descriptors of a killed process")?;
        let mut all: BTreeMap<RawFd, _> =
            all.into_iter().map(|one| (one.fd.as_raw_fd(), one)).collect();
        let file = all.remove(&will).ok_or_else(|| anyhow!("no will"))?;
        let will = Arc::new(Will::adopt(file.fd)?);
        let mut named =
            |word| will.descriptor(word).and_then(|number| all.remove(&number)).map(|one| one.fd);
        let (criu, staging) = (named(WillWord::Criu), named(WillWord::Staging));
        let (lazy, snapshot) = (named(WillWord::Lazy), named(WillWord::Snapshot));
        let uffds = all.into_values().filter(|one| one.what.contains("[userfaultfd]"));
        let uffds = uffds.map(|one| one.fd).collect();
        Ok(Estate { criu, staging, lazy, snapshot, uffds, will })
    }
}

/// Ends those who wait behind this process: what they have would stay open.
fn end_others(record: &Record) {
    let own = ProcessId::this();
    for guard in record.guards().into_iter().filter(|guard| *guard != own) {
        let Ok(pidfd) = process::pidfd_open(guard.pid) else { continue };
        // Whoever the descriptor stands for: it was he after it had been opened.
        if guard.is_alive() {
            let _ = process::pidfd_kill(&pidfd, libc::SIGKILL);
            let _ = process::wait_readable(&[pidfd.as_fd()], None);
        }
    }
}

/// `ferry __guard pages JOURNAL WILL`: everybody before has been killed.
///
/// # Errors
/// When what is left cannot be brought to an end.
pub fn go_on(journal: &Path, will: RawFd) -> Result<()> {
    let estate = Estate::take(will)?;
    let mut journal = Journal::open(journal)?;
    end_others(&journal.record);
    let _held = journal.hold()?;
    match pages(journal.state()) {
        Pages::Nothing => return Ok(()),
        Pages::GoOn => {}
        Pages::Discard => {
            // It is CRIU's own code that may wait in them for memory, and keep it from giving up. Without
            // anybody to answer, it does.
            drop(estate);
            return undo::discard_destination(&mut journal);
        }
    }

    let _ = fault::point("successor.begin");
    let (tell, events) = channel();
    let mut guards = PageGuards::start(&journal, estate.will.clone());
    let _ = guards.as_ref().inspect_err(|e| tracing::error!("{e:#}"));
    let stage = Stage::default();
    let filling = match Filling::start(estate, &journal.record, &stage, &tell, &mut guards) {
        Ok(filling) => filling,
        Err(Stranded { why, held }) => {
            tracing::error!("{why:#}");
            return discard(&mut journal, held);
        }
    };

    let call = tell.clone();
    let calls = fault::point("successor.calls").and_then(|()| {
        verdicts::take_calls(&journal.record.work, move |c| {
            call.send(SuccessorEvent::Call(c)).is_ok()
        })
    });

    if let Err(e) = calls {
        tracing::error!("nobody can be answered: {e:#}");
        if filling.lacks {
            // No link will bring the rest. Whoever fills it does so until it has ended.
            return discard(&mut journal, Vec::new());
        }
    }

    let _ = fault::point("successor.serving");
    let (peer, served) = match filling.wait(&journal.record, &events, &stage, &tell) {
        ServingEnd::Whole(peer, served) => (peer, served),
        ServingEnd::Lost(held) => return discard(&mut journal, held),
    };

    undo::note_all_in(&journal.record.work);
    let kept = undo::finish_destination(&mut journal);
    if let Ok(guards) = guards {
        guards.dismiss();
    }

    if let (Some(peer), Ok(())) = (peer, &kept) {
        // Else it asks.
        let _ = peer.send(&Message::MemoryComplete(served));
    }

    kept
}

/// Ends the copy, however long that takes. What is `held`, and whatever else this process has open, is
/// closed when its tasks have ended, and not before: whoever of them waits for a page would read zeros.
fn discard(journal: &mut Journal, held: Vec<OwnedFd>) -> Result<()> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let done = undo::discard_destination(journal);
        if done.is_ok() || !undo::copy_lives(&journal.record) {
            drop(held);
            return done;
        }
        let _ = done.inspect_err(|e| tracing::error!("{e:#}; trying again"));
        // What keeps it from ending nobody tells.
        backoff.park();
    }
}

enum SuccessorEvent {
    Call(ControlCall),
    FromPeer(FromPeer),
    Want(PageRun),
    Pages(Ended),
    /// CRIU has come to its end.
    Released,
}

enum ServingEnd {
    /// It runs with all of its memory; perhaps the source waits to hear of it.
    Whole(Option<PeerWriter>, Served),
    /// There is no such container, or it can never have its memory.
    Lost(Vec<OwnedFd>),
}

/// A container whose memory comes in, while it is let run.
struct Filling {
    /// Something is still on the source.
    lacks: bool,
    served: Option<Served>,
    running: bool,
    link: Option<PeerWriter>,
}

impl Filling {
    fn start(
        estate: Estate,
        record: &Record,
        stage: &Stage,
        tell: &Sender<SuccessorEvent>,
        guards: &mut Result<PageGuards>,
    ) -> Result<Filling, Stranded> {
        let Estate { will, criu, staging, lazy, snapshot, uffds } = estate;
        let mut filling = Filling { lacks: false, served: None, running: false, link: None };
        if will.read(WillWord::Done) == 0 {
            let (Some(snapshot), Some(staging), Some(lazy)) = (snapshot, staging, lazy) else {
                let why = anyhow!("who was killed had not come far enough for anybody to go on");
                return Err(Stranded { why, held: uffds });
            };
            let (snapshot, staging, lazy) = (snapshot.into(), staging.into(), lazy.into());
            let left = LeftServer { snapshot, staging, lazy, uffds };
            let (wanted, ended) = (tell.clone(), tell.clone());
            let want = move |run| drop(wanted.send(SuccessorEvent::Want(run)));
            let end = move |e| drop(ended.send(SuccessorEvent::Pages(e)));
            let (intake, lacks) = serve::succeed(will, left, want, end)?;
            stage.serve_by(intake);
            filling.lacks = lacks;
        } else {
            filling.served = Some(Served::default());
        }

        // Whoever fills it has what its tasks wait on.
        let stranded = |why: std::io::Error| Stranded { why: why.into(), held: Vec::new() };
        let (record, tell) = (record.clone(), tell.clone());
        let release = criu.as_ref().map(OwnedFd::try_clone).transpose().map_err(stranded)?;
        if let (Ok(guards), Some(criu)) = (guards, criu) {
            guards.take_criu(criu);
        }

        let work = move || {
            if let Some(criu) = release {
                release_criu(&record, &criu);
            }
            criu::wait_for(&record.work);
            let _ = tell.send(SuccessorEvent::Released);
        };

        let begun = std::thread::Builder::new().name("release".into()).spawn(work);
        begun.map(|_| filling).map_err(stranded)
    }

    fn wait(
        mut self,
        record: &Record,
        events: &Receiver<SuccessorEvent>,
        stage: &Stage,
        tell: &Sender<SuccessorEvent>,
    ) -> ServingEnd {
        let (current, backlog) = (Current::default(), Backlog::default());
        // As long as the latest link is ours to use, whoever brought it waits.
        let mut brought = None;

        loop {
            if let (true, Some(served)) = (self.running, self.served) {
                drop(brought);
                return ServingEnd::Whole(self.link, served);
            }
            let Ok(event) = events.recv() else { return ServingEnd::Lost(Vec::new()) };
            match event {
                SuccessorEvent::Released => {
                    let alive = undo::restored_init(record).is_some_and(ProcessId::is_alive);
                    if released(alive) == Released::Discard {
                        return ServingEnd::Lost(Vec::new());
                    }
                    self.running = true;
                    let opened = undo::open_destination(record);
                    let _ = opened.inspect_err(|e| tracing::error!("{e:#}"));
                }
                SuccessorEvent::Pages(Ended { result: Ok(served), .. }) => {
                    self.served = Some(served)
                }
                SuccessorEvent::Pages(Ended { result: Err(e), held }) => {
                    tracing::error!("not all of its memory can be put into the container: {e:#}");
                    return ServingEnd::Lost(held);
                }
                SuccessorEvent::Want(run) => {
                    // The next link is told of it anew.
                    let told = |peer: &mut PeerWriter| want(peer, run).is_ok();
                    self.link = self.link.take_if(told);
                }
                SuccessorEvent::FromPeer(FromPeer::Gone(_)) => self.link = None,
                SuccessorEvent::FromPeer(_) | SuccessorEvent::Call(ControlCall::Channel(..)) => {}
                SuccessorEvent::Call(ControlCall::Discard(reply)) => {
                    match (self.lacks, self.served) {
                        // The operator knows that nobody will bring the rest. Whoever asks learns from the
                        // journal when everything is undone.
                        (true, None) => return ServingEnd::Lost(Vec::new()),
                        _ => drop(reply.send(Standing::Waiting)),
                    }
                }
                SuccessorEvent::Call(ControlCall::Verdict(verdict, reply)) => {
                    let heard =
                        verdict.map_or(decide::CopyEvent::Asked, decide::CopyEvent::Verdict);
                    let lacking = self.lacks && self.served.is_none();
                    // Whole it is when the journal says so.
                    let phase = CopyPhase::Started { running: self.running, whole: false, lacking };
                    if let (_, Some(standing)) = hear(phase, heard) {
                        // Whoever asks may have gone.
                        let _ = reply.send(standing);
                    }
                }
                SuccessorEvent::Call(ControlCall::Link(input, output, held)) => {
                    let heard = tell.clone();
                    let hear = move |h| heard.send(SuccessorEvent::FromPeer(h)).is_ok();
                    let taken = connect::adopt(input, output).and_then(|new| {
                        let (peer, reader, _) = session::split(new);
                        receiver::listen(reader, &peer, stage, &current, &backlog, hear)?;
                        send_missing(&peer, stage)?;
                        Ok(peer)
                    });

                    // One that hears nothing comes again.
                    let _ = taken.as_ref().inspect_err(|e| tracing::error!("a new link: {e:#}"));
                    self.link = taken.ok();
                    drop(brought.replace(held));
                }
            }
        }
    }
}

/// Lets a restored container run, which was to run when its Ferry was killed.
fn release_criu(record: &Record, criu: &OwnedFd) {
    // The same for whatever has not been woken yet; nothing of it is heard before the fence is open.
    if let Some(cgroup) =
        undo::restored_init(record).and_then(|init| Cgroup::of_process(init.pid).ok())
    {
        criu_rescue::sockets(&cgroup);
    }
    // Whether it runs then can be seen.
    if let Err(e) = carry_on(criu, CRIU_STEP) {
        tracing::error!("CRIU, releasing the container: {e:#}");
    }
}
