//! The destination's role: [`receive`] takes one migration in over a link.
//!
//! ```text
//!  ─▶ Asked ── Prepare ─▶ Preparing ── Freezing ─▶ Frozen ── Dumped ─▶ Restoring
//!       │ Refuse             │ any error             │ any error         │ any error
//!       ▼                    ▼                       ▼                   ▼
//!     nothing made         all undone              all undone          all undone
//!
//!     Restoring ── Hold ─▶ Ready ── Commit ─▶ Running
//!                            │ Abort
//!                            ▼
//!                          all undone
//!
//!     Restoring ── Compare ─▶ Comparing ── Hold ─▶ Ready               (with --verify)
//! ```
//!
//! [`Phase`](phase::Phase) is that, and refuses what does not belong in a phase.
//!
//! Until `Ready` a lost link means that the source runs on: everything is undone. From `Ready` on
//! the source may have committed without our knowing: the copy is held, runs no instruction, and
//! waits for the verdict over the link, over a later one (`Resolve`), or from the operator.

mod announced;
mod committed;
mod engine;
mod outstanding;
mod phase;
mod ready;
mod shared;
mod verdict;
mod verify;

use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use self::announced::{Announced, Incoming, announced};
use self::committed::{Around, CommittedMigration};
use self::engine::EnginePart;
use super::checkpoint::restore::{RestoreEvent, RestoreJob};
use super::checkpoint::streams::Streams;
use super::forwarding as forward;
use super::journal::workdir::WorkDir;
use super::journal::{self, Journal, Lock, Record, Role, State};
use super::network::arrival::NetworkArrival;
use super::preflight::destination_checks;
use super::protocol::forwarding::{AddressDecision, ForwardMessage};
use super::protocol::session::{self, FromPeer, PeerWriter};
use super::protocol::{Message, Plan, Standing, variant};
use super::recovery::decide::{Act, CopyEvent, CopyPhase, hear};
use super::recovery::successors::PageGuards;
use super::recovery::undo;
use super::recovery::verdicts::{self, ControlCall};
use super::transfer::image_files::ImageFiles;
use super::transfer::receiver::{self, Backlog, Current, Stage};
use crate::connections::{Installation, Installed};
use crate::engine::calls;
use crate::engine::papers::EngineCourse;
use crate::files::apply::{Applied, Applying};
use crate::files::place::{CopyTarget, Placing};
use crate::files::tmpfs::MountedTmpfs;
use crate::memory::serve::{CriuClosed, Ended, Server};
use crate::memory::shared_files::SharedFiles;
use crate::memory::staging::Staging;
use crate::memory::will::Will;
use crate::network::{Placement, ReleaseSet};
use crate::oci::runtime::Runtime;
use crate::problem::Problem;
use crate::report::exit::ToldError;
use crate::sys::fault;
use crate::sys::memory::PAGE;
use crate::sys::perf::DummyEvent;
use crate::sys::process::ProcessId;
use crate::transport::connect::{Closer, Link};
use crate::transport::frame::PageRun;

/// Time that a source may be silent before it is given up, while it still owns the container.
const SILENCE: Duration = Duration::from_secs(300);
/// The same while it reads layers.
const LAYERS_LIMIT: Duration = Duration::from_secs(900);
/// The same while its engine gives an image.
const IMAGE_LIMIT: Duration = Duration::from_secs(1800);
/// Time that the restore may take.
const RESTORE_LIMIT: Duration = Duration::from_secs(120);
/// Time that CRIU and the runtime may take to end when the restore has failed.
const CRIU_ENDS: Duration = Duration::from_secs(5);
/// Most further links.
const MAX_CHANNELS: usize = 64;

#[derive(Debug)]
enum DestinationInput {
    FromPeer(FromPeer),
    Restore(RestoreEvent),
    Call(ControlCall),
    /// The engine has called its runtime; or it has not, and why.
    Engaged(Result<calls::EngineCall>),
    Pages(Ended),
    /// From whoever makes copies of trees.
    Files(Applied),
    /// The copies are on the disk.
    Synced,
    /// The hook that leads its packets here has ended.
    Led,
    /// That it may run is.
    Noted,
    /// The container's init has ended.
    TasksEnded,
    /// Sockets for connections are prepared, but for these.
    Awaited(Vec<u32>),
    /// Whoever guards the pages can go on by himself.
    Guarded,
    /// Shared memory that came early is where it belongs.
    Settled(Result<()>),
    /// A task waits for pages that are on the source.
    Want(PageRun),
    /// A further link has ended.
    ChannelEnded(String),
    Signal(i32),
}

/// Takes one migration, or one question, in over a link.
///
/// # Errors
/// When the container is not taken in; the source has been told, if it could be.
pub fn receive(link: Link, runtime: &Runtime, state_dir: &Path) -> Result<()> {
    // Each task takes some.
    crate::connections::raise_limit()?;
    let (peer, reader, mut closer) = session::split(link);
    let (tell, queue) = channel();
    let (stage, current, backlog) = (Stage::default(), Current::default(), Backlog::default());
    let heard = tell.clone();
    receiver::listen(reader, &peer, &stage, &current, &backlog, move |h| {
        heard.send(DestinationInput::FromPeer(h)).is_ok()
    })?;
    let caught = tell.clone();
    session::catch_signals(move |signal| caught.send(DestinationInput::Signal(signal)).is_ok())?;
    let mut inputs = DestinationInputs { queue, stage: stage.clone() };
    let place = ReceiveContext { runtime, state_dir, stage, current, backlog };
    let result = converse(&peer, &mut inputs, &tell, &place, &closer);
    closer.close();
    result
}

/// Where a migration is taken in.
struct ReceiveContext<'a> {
    runtime: &'a Runtime,
    state_dir: &'a Path,
    stage: Stage,
    current: Current,
    backlog: Backlog,
}

struct DestinationInputs {
    queue: Receiver<DestinationInput>,
    /// Who hears what does not come to the queue.
    stage: Stage,
}

/// Until when a source that was last heard then is waited for, if it is not silent for too long now.
fn patience(heard: Option<Instant>, limit: Duration, now: Instant) -> Option<Instant> {
    heard.map(|heard| heard + limit).filter(|until| *until > now)
}

impl DestinationInputs {
    /// The next thing that happens; the source's giving up is an error.
    fn next(&mut self, limit: Duration) -> Result<DestinationInput> {
        let limit = fault::limit(limit);
        let mut until = Instant::now() + limit;
        loop {
            match self.queue.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(input) => return self.explain(judge(input)),
                Err(RecvTimeoutError::Timeout) => {
                    let later = patience(self.stage.heard(), limit, Instant::now());
                    until = later.ok_or_else(|| anyhow!("the source is silent"))?;
                }
                Err(RecvTimeoutError::Disconnected) => bail!("nobody is left to do it"),
            }
        }
    }

    /// Returns what has happened already, without waiting.
    fn pending(&mut self) -> Result<Option<DestinationInput>> {
        self.queue.try_recv().ok().map(|input| self.explain(judge(input))).transpose()
    }

    /// Where CRIU has only broken off its connection: what it says of that itself, which comes later.
    fn explain(&mut self, judged: Result<DestinationInput>) -> Result<DestinationInput> {
        let error = match judged {
            Err(error) if error.is::<CriuClosed>() => error,
            judged => return judged,
        };
        let until = Instant::now() + CRIU_ENDS;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.queue.recv_timeout(left).map(judge) {
                Ok(Err(other)) if !other.is::<CriuClosed>() => return Err(other),
                Ok(_) => {}
                Err(_) => return Err(error),
            }
        }
    }
}

fn judge(input: DestinationInput) -> Result<DestinationInput> {
    match input {
        DestinationInput::FromPeer(FromPeer::Gone(why)) => {
            bail!("the link to the source broke: {}", why.unwrap_or("it was closed".into()))
        }
        DestinationInput::FromPeer(FromPeer::Message(Message::Abort { why })) => {
            bail!("the source gave up: {why}")
        }
        DestinationInput::Call(ControlCall::Verdict(verdict, ref reply)) => {
            let event = verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict);
            let (act, standing) = hear(CopyPhase::Arriving, event);
            // Whoever asks may have gone; or learns from the journal when everything is undone.
            standing.map_or(Ok(()), |standing| reply.send(standing)).ok();
            match act {
                Act::Wait | Act::Run => Ok(input),
                Act::Undo => bail!("the source has given up"),
            }
        }
        DestinationInput::Call(ControlCall::Discard(_)) => {
            bail!("the operator wants it to end here")
        }
        DestinationInput::ChannelEnded(why) => bail!("a further link to the source broke: {why}"),
        DestinationInput::Files(Applied::Failed(why)) => bail!("taking files in: {why}"),
        DestinationInput::Restore(RestoreEvent::Ended(Err(e))) => Err(e),
        DestinationInput::Settled(Err(e)) => Err(e),
        DestinationInput::Restore(RestoreEvent::Died) => {
            bail!("CRIU was killed when it had restored")
        }
        // Nothing has run yet: closing what is held lets nobody read zeros.
        DestinationInput::Pages(Ended { result: Err(e), .. }) => Err(e),
        DestinationInput::Signal(signal) if signal != libc::SIGHUP => {
            bail!("interrupted by {}", session::signal_name(signal))
        }
        input => Ok(input),
    }
}

fn converse(
    peer: &PeerWriter,
    inputs: &mut DestinationInputs,
    tell: &Sender<DestinationInput>,
    place: &ReceiveContext,
    closer: &Closer,
) -> Result<()> {
    match first_message(peer, inputs)? {
        Message::Plan(plan) => migration(*plan, peer, inputs, tell, place),
        Message::Resolve { migration, verdict } => {
            let said = match verdicts::answer(place.state_dir, &migration, verdict) {
                Ok(standing) => {
                    verdicts::note_answer(place.state_dir, &migration);
                    Message::Resolved { standing }
                }
                Err(e) => Message::failed("settling", &e),
            };
            peer.send(&said)
        }
        Message::Resume { migration } => hand_on(&migration, false, peer, closer, place),
        Message::Join { migration } => hand_on(&migration, true, peer, closer, place),
        Message::Forward(word) => {
            let (ForwardMessage::Carry { id, links }, Closer::Stdio(input, output)) =
                (*word, closer)
            else {
                bail!("this link cannot be handed on");
            };
            let taken = forward::away::take_link(place.state_dir, &id, links, input, output);
            taken.or_else(|e| peer.send(&Message::failed("forwarding", &e)))
        }
        other => bail!("the source begins with {}, which is no plan", variant(&other)),
    }
}

/// Greets, demands a greeting, and then what the link is for.
fn first_message(peer: &PeerWriter, inputs: &mut DestinationInputs) -> Result<Message> {
    peer.send(&session::hello())?;
    let mut next = || loop {
        if let DestinationInput::FromPeer(heard) = inputs.next(SILENCE)? {
            return Ok::<_, anyhow::Error>(heard);
        }
    };
    session::greeting(next()?)?;
    match next()? {
        FromPeer::Message(message) => Ok(message),
        _ => bail!("the source does not say what it wants"),
    }
}

/// Gives a link to the process that holds the container: a `further` one, or one for that which broke.
fn hand_on(
    migration: &str,
    further: bool,
    peer: &PeerWriter,
    closer: &Closer,
    place: &ReceiveContext,
) -> Result<()> {
    let Closer::Stdio(input, output) = closer else { bail!("this link cannot be handed on") };
    let (input, output) = (input.as_fd(), output.as_fd());
    let standing = verdicts::hand_link(place.state_dir, migration, further, input, output)?;
    standing.map_or(Ok(()), |standing| peer.send(&Message::Resolved { standing }))
}

/// Answers a plan, and takes the container in.
fn migration(
    plan: Plan,
    peer: &PeerWriter,
    inputs: &mut DestinationInputs,
    tell: &Sender<DestinationInput>,
    place: &ReceiveContext,
) -> Result<()> {
    let ReceiveContext { runtime, state_dir, stage, current, backlog } = place;
    plan.validate()?;
    let runtime =
        Runtime::new(runtime.program().to_owned(), plan.root.clone(), plan.systemd_cgroup);
    if !plan.check_only {
        verdicts::sweep(state_dir, runtime.root(), &plan.container)?;
    }

    let mut found = destination_checks::look(&plan, &runtime, state_dir);
    // Now, as the source takes its probes away when it has our answer.
    let streams = Streams::find(&plan, &mut found.problems);
    let (copies, course, engine) = (found.copies, found.course, found.engine);
    let (fatal, warnings): (Vec<_>, Vec<_>) = found.problems.into_iter().partition(|p| p.fatal);
    if !fatal.is_empty() {
        return peer.send(&Message::Refuse { problems: fatal });
    }

    if !plan.check_only {
        // Before the source is told to go on: its first pages follow right after `Prepare`, and
        // the reading thread takes them in whether or not this one has got that far.
        let pages = usize::try_from(destination_checks::staging_bytes(&plan))? / PAGE;
        let fresh = Staging::new(pages)?;
        stage.keep(fresh);
    }

    let shared = streams.shared();
    let accept = Message::Accept {
        warnings,
        shared,
        copies: copies.clone(),
        course,
        engine: engine.clone(),
    };
    peer.send(&accept)?;
    let mut incoming = Incoming::default();
    if !copies.is_empty() || plan.engine.is_some() {
        match announced(&plan, &copies, peer, inputs, state_dir)? {
            Announced::Room(all) => incoming = *all,
            Announced::Problems(problems) => return peer.send(&Message::Refuse { problems }),
            // Nothing was made.
            Announced::Nothing => return Ok(()),
        }
        peer.send(&Message::SpaceOk)?;
    }

    if plan.check_only {
        // It may try the link out. It has seen enough when that ends.
        while inputs.next(SILENCE).is_ok() {}
        return Ok(());
    }

    match inputs.next(SILENCE) {
        Ok(DestinationInput::FromPeer(FromPeer::Message(Message::Prepare))) => {}
        Ok(_) => bail!("the source does not follow the protocol"),
        // It changed its mind: nothing was made.
        Err(_) => return Ok(()),
    }

    let begin = || {
        let shared = SharedFiles::new(destination_checks::shared_bytes(&plan))?;
        let lent = shared.descriptors()?;
        let (way, backlog) = ((course, &engine), backlog.clone());
        let mut guest =
            IncomingMigration::new(plan, streams, incoming, way, runtime, state_dir, backlog)?;
        guest.lent = lent;
        Ok((guest, shared))
    };
    let (guest, shared) = match begin() {
        Ok(begun) => begun,
        Err(e) => {
            let told = peer.send(&Message::failed("preparing", &e)).is_ok();
            return Err(if told { ToldError(e).into() } else { e });
        }
    };

    // Its first pages may have come already, and wait for this.
    stage.keep_shared(shared);
    guest.take_in(peer, inputs, tell, stage, current)
}

/// A container on its way in, and all that was made for it.
struct IncomingMigration {
    plan: Plan,
    runtime: Runtime,
    journal: Journal,
    work: WorkDir,
    state_dir: PathBuf,
    network: NetworkArrival,
    restore: Option<RestoreJob>,
    server: Option<Server>,
    pages: Option<Ended>,
    guard: Option<PageGuards>,
    /// What they go on by.
    will: Option<Arc<Will>>,
    /// What CRIU is released by, for the guard.
    release: Option<OwnedFd>,
    /// What is released with it.
    release_set: Arc<Mutex<Option<ReleaseSet>>>,
    streams: Streams,
    /// What is copied.
    incoming: Incoming,
    /// Whoever makes the copies.
    applying: Option<Applying>,
    tmpfs: Option<MountedTmpfs>,
    /// Connections that come, and those that have.
    installation: Option<Installation>,
    installed: Option<Installed>,
    /// What is not as it was on the source, to be told.
    changed: Vec<Problem>,
    images: ImageFiles,
    /// Shared memory, for CRIU.
    lent: Vec<OwnedFd>,
    channels: Vec<UnixStream>,
    backlog: Backlog,
    /// What its engine does here, if it has one.
    engine: Option<EnginePart>,
    /// What it is at, for people.
    doing: &'static str,
    began: Instant,
    marks: Vec<(String, f64)>,
    /// Has CRIU's breakpoints cost nothing in the freeze.
    _event: Option<DummyEvent>,
    _lock: Lock,
}

impl IncomingMigration {
    fn new(
        plan: Plan,
        streams: Streams,
        incoming: Incoming,
        (course, of_engine): (AddressDecision, &EngineCourse),
        runtime: Runtime,
        state_dir: &Path,
        backlog: Backlog,
    ) -> Result<IncomingMigration> {
        let way = format!("from {}", plan.source);
        let lock = Lock::take(state_dir, runtime.root(), &plan.container, &way)?;
        let work = WorkDir::create(&plan.migration)?;
        let (version, boot) = journal::stamp();
        let record = Record {
            version,
            boot,
            migration: plan.migration.clone(),
            container: plan.container.clone(),
            role: Role::Destination,
            peer: plan.source.clone(),
            destination: None,
            runtime: runtime.program().to_owned(),
            root: plan.root.clone(),
            systemd_cgroup: plan.systemd_cgroup,
            cgroup: None,
            init: None,
            // An engine says later where it has made it.
            network_path: journal::workdir::network_place(&plan).filter(|_| plan.engine.is_none()),
            network_identity: None,
            engine: plan.engine.as_ref().map(|wanted| engine::made(&plan, wanted, of_engine)),
            network_ours: plan.network.is_some() && plan.placement != Placement::Keep,
            leave_mark: false,
            placing: placing(&plan, &incoming)?,
            logs: streams.logs(),
            forward: journal::forward_role::ForwardRecord::of_destination(&plan, course),
            remove: Vec::new(),
            unmount: None,
            work: work.clone(),
            worker: ProcessId::this(),
            begun: journal::unix_time(),
        };

        let journal = Journal::create(state_dir, record)?;
        let images = ImageFiles::new(work.images());
        let engine = plan
            .engine
            .as_ref()
            .map(|wanted| EnginePart::new(wanted, of_engine.image))
            .transpose()?;

        Ok(IncomingMigration {
            plan,
            runtime,
            journal,
            work,
            state_dir: state_dir.to_owned(),
            network: NetworkArrival::default(),
            restore: None,
            server: None,
            pages: None,
            guard: None,
            will: None,
            release: None,
            release_set: Arc::default(),
            streams,
            incoming,
            applying: None,
            tmpfs: None,
            installation: None,
            installed: None,
            changed: Vec::new(),
            images,
            lent: Vec::new(),
            channels: Vec::new(),
            backlog,
            engine,
            doing: "preparing",
            began: Instant::now(),
            marks: Vec::new(),
            _event: DummyEvent::if_possible(),
            _lock: lock,
        })
    }

    fn mark(&mut self, name: &str) {
        let ms = self.began.elapsed().as_secs_f64() * 1000.0;
        self.marks.push((name.into(), (ms * 1000.0).round() / 1000.0));
    }

    /// From `Prepare` to the end.
    fn take_in(
        mut self,
        peer: &PeerWriter,
        inputs: &mut DestinationInputs,
        tell: &Sender<DestinationInput>,
        stage: &Stage,
        current: &Current,
    ) -> Result<()> {
        let ready = match self.until_ready(peer, inputs, tell, stage) {
            Ok(ready) => ready,
            Err(e) => {
                let failed = Message::failed(self.doing, &e);
                // Undone first: a second try must find the place free. The source does not wait
                // for us, it runs on when it hears, or when the link is cut.
                stage.close_shared();
                let undone = self.undo(Vec::new());
                let told = peer.send(&failed).is_ok();
                undone?;
                say_undone(peer);
                return Err(if told { ToldError(e).into() } else { e });
            }
        };

        match self.await_verdict(ready, peer, inputs) {
            None => {
                self.undo(Vec::new())?;
                say_undone(peer);
                Ok(())
            }
            Some(outstanding) => {
                let around = Around { tell, stage, current };
                let committed =
                    CommittedMigration::commit(self, outstanding, peer.clone(), around)?;
                committed.go_on(inputs)
            }
        }
    }

    fn dismiss_guard(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// The container runs, and nothing is to come any more: leaves. The source has `finished`, or will ask.
    fn settle_in(mut self, finished: bool) -> Result<()> {
        if let Some(job) = self.restore.take() {
            job.join();
        }
        std::mem::take(&mut self.network).settle();
        let _ = fault::point("destination.finish");
        drop(self.tmpfs.take());
        let cleared = destination_checks::clear_mark(&self.plan, &self.runtime, &self.state_dir);
        let came_back = cleared.as_ref().is_ok_and(|was| *was);
        let kept = undo::settle_files(&self.journal.record, came_back);
        // What could not be done stays open, for `ferry resolve` to try again.
        if let Some(engine) = self.engine.take() {
            engine.settle(&self.journal.record);
        }
        let written = kept.and_then(|()| self.journal.write(State::Finished));
        if finished {
            // Else the source will ask.
            let _ = self.journal.note_told().inspect_err(|e| tracing::error!("{e:#}"));
        }
        self.dismiss_guard();
        written.and(cleared.map(|_| ()))
    }

    /// Nothing of it stays here. What is `held` is closed when its tasks have ended: where they do not,
    /// whoever waits for the end of this process has it, and goes on.
    fn undo(mut self, held: Vec<OwnedFd>) -> Result<()> {
        let _ = fault::point("destination.undo");
        // CRIU gives up where nobody can answer it.
        drop(self.release.take());
        self.guard.iter_mut().for_each(PageGuards::leave_criu);

        // Nothing more is written to what is taken away.
        drop(self.applying.take());

        // CRIU may be waiting for pages that will never come: with nobody to ask it gives up.
        drop(self.server.take());

        // Whatever ends now, ends without a word.
        drop((self.installation.take(), self.installed.take()));
        if let Some(job) = self.restore.take() {
            job.abandon(&self.work);
        }

        match self.engine {
            None => drop(std::mem::take(&mut self.network)),
            Some(_) => std::mem::take(&mut self.network).leave_to_engine(),
        }
        drop(self.tmpfs.take());
        self.streams.undo();

        // It is told by the end of its runtime's call, or finds nobody who expects that.
        let engine = self.engine.take().map(EnginePart::give_up);
        let undone = undo::discard_destination(&mut self.journal);
        drop(engine);
        if undone.is_err() && undo::copy_lives(&self.journal.record) {
            self.guard.take().into_iter().for_each(PageGuards::leave);
            held.into_iter().for_each(|fd| _ = fd.into_raw_fd());
        } else {
            self.dismiss_guard();
        }

        undone
    }
}

/// The source need not tell anybody any more that it has given up. One that has not heard this does, and
/// is answered.
fn say_undone(peer: &PeerWriter) {
    let _ = peer.send(&Message::Resolved { standing: Standing::NeverRan });
}

/// Returns where copies are staged and put, and what else has to be made for them.
fn placing(plan: &Plan, incoming: &Incoming) -> Result<Placing> {
    if incoming.is_empty() {
        return Ok(Placing::default());
    }
    let (_, there) = destination_checks::bundle_here(plan)?;
    let config = (!there && plan.engine.is_none()).then(|| plan.bundle.join("config.json"));
    let mut targets = incoming.targets.clone();
    let coming = incoming.coming.as_ref();
    // Last, as nothing is announced of it: it comes to its place as it is staged, empty.
    let work = coming.and_then(|c| c.upper.as_ref()).map(|u| u.work.clone());
    targets.extend(work.map(|path| CopyTarget { path, own: true, single: false }));
    let placing = Placing::plan(&plan.migration, &targets, config.as_slice())?;
    Ok(match coming {
        Some(coming) => placing.with_overlay(coming.mounting.clone(), coming.staged()),
        None => placing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that is copied for longer than any limit is a sign of life, too.
    #[test]
    fn who_sends_memory_is_not_silent() {
        let (now, limit) = (Instant::now(), Duration::from_secs(300));
        let (long_ago, just_now) = (now.checked_sub(2 * limit), now.checked_sub(limit / 3));
        assert_eq!(patience(None, limit, now), None);
        assert_eq!(patience(long_ago, limit, now), None);
        assert_eq!(patience(just_now, limit, now), Some(now + limit * 2 / 3));
    }
}
