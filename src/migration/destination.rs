//! The destination's role: [`receive`] takes one migration in over a link.
//!
//! ```text
//!            Plan              Prepare            Dumped, MemoryDone       Commit
//!  ─────────▶ Asked ──────────▶ Preparing ───────▶ Restoring ────────────▶ Ready ─────────▶ Running
//!               │ Refuse          │ any error        │ any error             │ Abort
//!               ▼                 ▼                  ▼                       ▼
//!            nothing made      all undone         all undone              all undone
//! ```
//!
//! Until `Ready` a lost link means that the source runs on: everything is undone. From `Ready` on
//! the source may have committed without our knowing: the copy is held, runs no instruction, and
//! waits for the verdict over the link, over a later one (`Settle`), or from the operator.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::arrival::Arrival;
use super::forward::Course;
use super::forward::carrier::Word;
use super::guards::PageGuard;
use super::intake::{self, Backlog, Current, Stage};
use super::journal::{self, Journal, Lock, Record, Role, State};
use super::layers::{self, Coming};
use super::parcels::{Images, STREAM};
use super::protocol::{self, MAX_TASKS, Message, Plan, Standing, Verdict};
use super::restore::{Go, RestoreEvent, RestoreJob, RestorePlan};
use super::settle::{self, Call};
use super::streams::Streams;
use super::talk::{self, Heard, Speaker};
use super::workdir::WorkDir;
use super::{checks, forward, host, recover, workdir};
use crate::criu::images;
use crate::criu::interposer::Interposer;
use crate::files::apply::{Applied, Applying};
use crate::files::layers::validate as validate_layers;
use crate::files::place::{Placing, Target};
use crate::files::tmpfs::{Mounted, Tmpfs};
use crate::files::tree;
use crate::files::walk::Size;
use crate::memory::serve::{Ended, Served, Server};
use crate::memory::staging::Staging;
use crate::network::problem::Problem;
use crate::oci::runtime::Runtime;
use crate::oci::warm::Warm;
use crate::report::exit::Told;
use crate::sys::fault;
use crate::sys::memory::PAGE;
use crate::sys::process;
use crate::transport::connect::{self, Closer, Link};
use crate::transport::frame::{Frame, Run};

/// How long a source may be silent before it is given up, while it still owns the container.
const SILENCE: Duration = Duration::from_secs(300);
/// The same while it reads layers.
const LAYERS_LIMIT: Duration = Duration::from_secs(900);
/// How long the restore may take.
const RESTORE_LIMIT: Duration = Duration::from_secs(120);
/// Most further links.
const MAX_LANES: usize = 64;

#[derive(Debug)]
enum Input {
    Heard(Heard),
    Restore(RestoreEvent),
    Call(Call),
    Pages(Ended),
    /// From whoever makes copies of trees.
    Files(Applied),
    /// The copies are on the disk.
    Synced,
    /// A task waits for pages that are on the source.
    Want(i32, u64, usize),
    /// A further link has ended.
    LaneEnded(String),
    Signal(i32),
}

/// Takes one migration, or one question, in over a link.
///
/// # Errors
/// When the container is not taken in; the source has been told, if it could be.
pub fn receive(link: Link, runtime: &Runtime, state_dir: &Path) -> Result<()> {
    let (speaker, reader, mut closer) = talk::split(link);
    let (tell, queue) = channel();
    let (stage, current, backlog) = (Stage::default(), Current::default(), Backlog::default());
    let heard = tell.clone();
    intake::listen(reader, &speaker, &stage, &current, &backlog, move |h| {
        heard.send(Input::Heard(h)).is_ok()
    })?;
    let caught = tell.clone();
    talk::catch_signals(move |signal| caught.send(Input::Signal(signal)).is_ok())?;
    let mut inputs = Inputs { queue };
    let place = Place { runtime, state_dir, stage, current, backlog };
    let result = converse(&speaker, &mut inputs, &tell, &place, &closer);
    closer.close();
    result
}

/// Where a migration is taken in.
struct Place<'a> {
    runtime: &'a Runtime,
    state_dir: &'a Path,
    stage: Stage,
    current: Current,
    backlog: Backlog,
}

struct Inputs {
    queue: Receiver<Input>,
}

impl Inputs {
    /// The next thing that happens; the source's giving up is an error.
    fn next(&mut self, limit: Duration) -> Result<Input> {
        match self.queue.recv_timeout(limit) {
            Ok(input) => judge(input),
            Err(RecvTimeoutError::Timeout) => bail!("the source is silent"),
            Err(RecvTimeoutError::Disconnected) => bail!("nobody is left to do it"),
        }
    }

    /// What has happened already, without waiting.
    fn pending(&mut self) -> Result<Option<Input>> {
        self.queue.try_recv().ok().map(judge).transpose()
    }
}

fn judge(input: Input) -> Result<Input> {
    match input {
        Input::Heard(Heard::Gone(why)) => {
            bail!("the link to the source broke: {}", why.unwrap_or("it was closed".into()))
        }
        Input::Heard(Heard::Message(Message::Abort { why })) => {
            bail!("the source gave up: {why}")
        }
        // Whoever asks learns from the journal when everything is undone.
        Input::Call(Call::Verdict(Some(Verdict::Abort), _)) => bail!("the source has given up"),
        Input::LaneEnded(why) => bail!("a further link to the source broke: {why}"),
        Input::Files(Applied::Failed(why)) => bail!("taking files in: {why}"),
        Input::Restore(RestoreEvent::Ended(Err(e))) => Err(e),
        Input::Restore(RestoreEvent::Died) => bail!("CRIU was killed when it had restored"),
        // Nothing has run yet: closing what is held lets nobody read zeros.
        Input::Pages(Ended { result: Err(e), .. }) => Err(e),
        Input::Signal(signal) if signal != libc::SIGHUP => {
            bail!("interrupted by {}", talk::signal_name(signal))
        }
        input => Ok(input),
    }
}

fn converse(
    speaker: &Speaker,
    inputs: &mut Inputs,
    tell: &Sender<Input>,
    place: &Place,
    closer: &Closer,
) -> Result<()> {
    let Place { runtime, state_dir, stage, current, backlog } = place;
    speaker.say(&talk::hello())?;
    let plan = loop {
        match inputs.next(SILENCE)? {
            Input::Heard(Heard::Message(Message::Hello(theirs))) => talk::check_hello(&theirs)?,
            Input::Heard(Heard::Message(Message::Plan(plan))) => break plan,
            Input::Heard(Heard::Message(Message::Settle { migration, verdict })) => {
                let said = match settle::answer(state_dir, &migration, verdict) {
                    Ok(standing) => Message::Settled { standing },
                    Err(e) => Message::Failed { phase: "settling".into(), why: format!("{e:#}") },
                };
                return speaker.say(&said);
            }
            Input::Heard(Heard::Message(
                again @ (Message::Resume { .. } | Message::Join { .. }),
            )) => {
                let further = matches!(again, Message::Join { .. });
                let (Message::Resume { migration } | Message::Join { migration }) = again else {
                    bail!("no other message is meant here");
                };
                let Closer::Stdio(input, output) = closer else {
                    bail!("this link cannot be handed on");
                };
                let standing = settle::hand_link(
                    state_dir,
                    &migration,
                    further,
                    input.as_fd(),
                    output.as_fd(),
                )?;
                return match standing {
                    Some(standing) => speaker.say(&Message::Settled { standing }),
                    None => Ok(()),
                };
            }
            Input::Heard(Heard::Message(Message::Forward(word))) => {
                let (Word::Carry { id, links }, Closer::Stdio(input, output)) = (*word, closer)
                else {
                    bail!("this link cannot be handed on");
                };
                let taken = forward::away::take_link(state_dir, &id, links, input, output);
                return taken.or_else(|e| {
                    let why = format!("{e:#}");
                    speaker.say(&Message::Failed { phase: "forwarding".into(), why })
                });
            }
            _ => bail!("the source begins with something else than a plan"),
        }
    };
    plan.validate()?;
    let runtime =
        Runtime::new(runtime.program().to_owned(), plan.root.clone(), plan.systemd_cgroup);
    if !plan.check_only {
        settle::sweep(state_dir, runtime.root(), &plan.container)?;
    }
    let found = checks::look(&plan, &runtime);
    let (copies, course) = (found.copies, found.course);
    let (fatal, warnings): (Vec<_>, Vec<_>) = found.problems.into_iter().partition(|p| p.fatal);
    if !fatal.is_empty() {
        return speaker.say(&Message::Refuse { problems: fatal });
    }
    if !plan.check_only {
        // Before the source is told to go on: its first pages follow right after `Prepare`, and
        // the reading thread takes them in whether or not this one has got that far.
        let pages = usize::try_from(checks::staging_bytes(&plan))? / PAGE;
        let fresh = Staging::new(pages)?;
        stage.keep(fresh);
    }
    // Now, as the source takes its probes away when it has our answer.
    let shared = Streams::shared(&plan.streams);
    let accept =
        Message::Accept { warnings, shared: shared.clone(), copies: copies.clone(), course };
    speaker.say(&accept)?;
    let mut incoming = Incoming::default();
    if !copies.is_empty() {
        match announced(&plan, &copies, speaker, inputs, state_dir)? {
            Announced::Room(all) => incoming = *all,
            Announced::Problems(problems) => return speaker.say(&Message::Refuse { problems }),
            // Nothing was made.
            Announced::Nothing => return Ok(()),
        }
        speaker.say(&Message::Room)?;
    }
    if plan.check_only {
        // It may try the link out. It has seen enough when that ends.
        while inputs.next(SILENCE).is_ok() {}
        return Ok(());
    }
    match inputs.next(SILENCE) {
        Ok(Input::Heard(Heard::Message(Message::Prepare))) => {}
        Ok(_) => bail!("the source does not follow the protocol"),
        // It changed its mind: nothing was made.
        Err(_) => return Ok(()),
    }
    let guest =
        match Guest::new(*plan, &shared, incoming, course, runtime, state_dir, backlog.clone()) {
            Ok(guest) => guest,
            Err(e) => {
                let why = format!("{e:#}");
                let told = speaker.say(&Message::Failed { phase: "preparing".into(), why }).is_ok();
                return Err(if told { Told(e).into() } else { e });
            }
        };
    guest.take_in(speaker, inputs, tell, stage, current)
}

/// Files that are to come.
#[derive(Debug, Default)]
struct Incoming {
    /// Where the trees go.
    targets: Vec<Target>,
    /// What was announced of them; first of lacking layers.
    sizes: Vec<Size>,
    /// The overlay that is mounted of some.
    coming: Option<Coming>,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.targets.is_empty() && self.coming.is_none()
    }
}

/// What came of it when the source told what it has.
enum Announced {
    Room(Box<Incoming>),
    Problems(Vec<Problem>),
    /// It changed its mind.
    Nothing,
}

/// Hears what there is to copy, looks for what is here already, and for room.
fn announced(
    plan: &Plan,
    copies: &[usize],
    speaker: &Speaker,
    inputs: &mut Inputs,
    state_dir: &Path,
) -> Result<Announced> {
    let mut incoming = Incoming::default();
    let (mut staged, mut lacking) = (PathBuf::new(), 0);
    if let Some(overlay) = layers::wanted(plan, copies) {
        let all = match inputs.next(LAYERS_LIMIT) {
            Ok(Input::Heard(Heard::Message(Message::Layers { layers })))
                if layers.len() == overlay.lower.len() =>
            {
                layers
            }
            Ok(_) => bail!("the source does not follow the protocol"),
            Err(_) => return Ok(Announced::Nothing),
        };
        validate_layers(&all)?;
        let place = checks::bundle_here(plan)?.0.rootfs()?;
        match Coming::plan(plan, overlay, &place, &all, state_dir) {
            Ok((coming, numbers)) => {
                (staged, lacking) = (coming.store().join("layer"), numbers.len());
                speaker.say(&Message::Lacking { layers: numbers })?;
                incoming.coming = Some(coming);
            }
            Err(problem) => return Ok(Announced::Problems(vec![*problem])),
        }
    }
    incoming.targets = targets(plan, copies, incoming.coming.as_ref())?;
    incoming.sizes = match inputs.next(SILENCE) {
        Ok(Input::Heard(Heard::Message(Message::Trees { sizes })))
            if sizes.len() == lacking + incoming.targets.len() =>
        {
            sizes
        }
        Ok(_) => bail!("the source does not follow the protocol"),
        Err(_) => return Ok(Announced::Nothing),
    };
    let places = std::iter::repeat_n(staged.as_path(), lacking);
    let places = places.chain(incoming.targets.iter().map(|t| t.path.as_path()));
    let problems = checks::room_for(places.zip(&incoming.sizes))?;
    Ok(match problems.is_empty() {
        true => Announced::Room(Box::new(incoming)),
        false => Announced::Problems(problems),
    })
}

/// Where the trees go.
fn targets(plan: &Plan, copies: &[usize], coming: Option<&Coming>) -> Result<Vec<Target>> {
    let (here, _) = checks::bundle_here(plan)?;
    let mut targets = Vec::new();
    for number in copies {
        let probe = &plan.probes[*number];
        let root = probe.place == protocol::Place::Rootfs;
        let path = match coming.filter(|_| root) {
            Some(coming) => coming.upper.as_ref().map(|u| u.path.clone()),
            None => {
                let path = probe.place.path(&here);
                Some(path.ok_or_else(|| anyhow!("config.json does not have {}", probe.what))?)
            }
        };
        targets.extend(path.map(|path| Target { path, own: root, single: probe.file }));
    }
    Ok(targets)
}

/// A container on its way in, and all that was made for it.
struct Guest {
    plan: Plan,
    runtime: Runtime,
    journal: Journal,
    work: WorkDir,
    state_dir: PathBuf,
    network: Arrival,
    restore: Option<RestoreJob>,
    server: Option<Server>,
    /// Pages are being installed; told when they are all in.
    serving: bool,
    pages: Option<Ended>,
    guard: Option<PageGuard>,
    streams: Streams,
    /// What is copied.
    incoming: Incoming,
    /// Whoever makes the copies.
    applying: Option<Applying>,
    tmpfs: Option<Mounted>,
    images: Images,
    lanes: Vec<UnixStream>,
    backlog: Backlog,
    phase: &'static str,
    began: Instant,
    marks: Vec<(String, f64)>,
    /// Pages that stay on the source until after the commit.
    left: u64,
    /// The link to the source works, as far as is known.
    link: bool,
    _lock: Lock,
}

impl Guest {
    fn new(
        plan: Plan,
        shared: &[usize],
        incoming: Incoming,
        course: Course,
        runtime: Runtime,
        state_dir: &Path,
        backlog: Backlog,
    ) -> Result<Guest> {
        let lock = Lock::take(state_dir, runtime.root(), &plan.container)?;
        let work = WorkDir::create(&plan.migration)?;
        let streams = Streams::open(&plan, shared)?;
        let record = Record {
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
            network_path: plan.network_place(),
            network_identity: None,
            network_ours: plan.network.is_some() && plan.placement != "keep",
            leave_mark: false,
            placing: placing(&plan, &incoming)?,
            forward: forward::Note::of_destination(&plan, course),
            remove: Vec::new(),
            unmount: None,
            work: work.path().to_owned(),
            worker: journal::this_process(),
            begun: journal::unix_time(),
        };
        let journal = Journal::create(state_dir, record)?;
        let images = Images::new(work.images());
        Ok(Guest {
            plan,
            runtime,
            journal,
            work,
            state_dir: state_dir.to_owned(),
            network: Arrival::default(),
            restore: None,
            server: None,
            serving: false,
            pages: None,
            guard: None,
            streams,
            incoming,
            applying: None,
            tmpfs: None,
            images,
            lanes: Vec::new(),
            backlog,
            phase: "preparing",
            began: Instant::now(),
            marks: Vec::new(),
            left: 0,
            link: true,
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
        speaker: &Speaker,
        inputs: &mut Inputs,
        tell: &Sender<Input>,
        stage: &Stage,
        current: &Current,
    ) -> Result<()> {
        let ready = self.until_ready(speaker, inputs, tell, stage);
        let verdict = match ready {
            Ok(()) => self.await_verdict(speaker, inputs),
            Err(e) => {
                let failed = Message::Failed { phase: self.phase.into(), why: format!("{e:#}") };
                // Undone first: a second try must find the place free. The source does not wait
                // for us, it runs on when it hears, or when the link is cut.
                let undone = self.undo();
                let told = speaker.say(&failed).is_ok();
                return undone.and(Err(if told { Told(e).into() } else { e }));
            }
        };
        match verdict {
            Verdict::Abort => self.undo(),
            Verdict::Commit => self.run(speaker.clone(), inputs, tell, stage, current),
        }
    }

    fn until_ready(
        &mut self,
        speaker: &Speaker,
        inputs: &mut Inputs,
        tell: &Sender<Input>,
        stage: &Stage,
    ) -> Result<()> {
        fault::point("destination.prepare")?;
        // From the beginning: a source that lost this link, and gave up, says so over another.
        let call = tell.clone();
        settle::take_calls(self.work.path(), move |c| call.send(Input::Call(c)).is_ok())?;
        speaker.say(&Message::Open)?;
        self.phase = "making the network";
        self.network.make(&self.plan, self.work.path(), self.journal.record.forward.as_ref())?;
        if !self.plan.tmpfs.is_empty() {
            let base = workdir::tmpfs_base(self.work.path());
            self.tmpfs = Some(Mounted::new(&base, &self.plan.tmpfs)?);
        }
        fault::point("destination.network")?;
        if self.incoming.is_empty() {
            self.start_restore(tell)?;
        } else {
            self.take_files(tell)?;
        }
        let (mut dumped, mut memory_done, mut restored) = (None, false, false);
        let mut warm = None;
        while !restored {
            match inputs.next(SILENCE)? {
                Input::Restore(RestoreEvent::AtRequest) => {
                    fault::point("destination.prepared")?;
                    speaker.say(&Message::Prepared)?;
                }
                Input::Heard(Heard::Frame(Frame::File(name, at, bytes))) => {
                    self.file(&name, at, &bytes)?;
                }
                Input::Files(Applied::Round(round)) => speaker.say(&Message::Applied { round })?,
                Input::Heard(Heard::Message(Message::Copied)) => {
                    fault::point("destination.copied")?;
                    self.journal.record.placing.put()?;
                    // The runtime looks for the root file system when it starts.
                    self.start_restore(tell)?;
                }
                Input::Heard(Heard::Frame(Frame::Packet(bytes))) => self.network.keep(&bytes)?,
                Input::Want(vpid, at, pages) => want(speaker, vpid, at, pages)?,
                Input::Call(Call::Lane(input, output, held)) => {
                    self.join(input, output, held, stage, tell)?;
                }
                Input::Heard(Heard::Message(Message::Freezing)) => {
                    warm = Some(Warm::start()?);
                    self.network.take(self.work.path())?;
                }
                Input::Heard(Heard::Message(Message::Dumped { tasks })) => {
                    if tasks.len() > MAX_TASKS {
                        bail!("a container of {} tasks", tasks.len());
                    }
                    fault::point("destination.restore")?;
                    self.begin_restore()?;
                    dumped = Some(tasks);
                }
                Input::Heard(Heard::Message(Message::MemoryDone { left })) => {
                    self.left = left;
                    memory_done = true;
                }
                Input::Restore(RestoreEvent::Restored(pid)) => {
                    let init = process::start_time(pid).map(|t| (pid, t));
                    self.journal.record.init = init;
                    self.mark("restored");
                    fault::point("destination.restored")?;
                    restored = true;
                    drop(warm.take());
                }
                _ => {}
            }
            if memory_done
                && let (Some(tasks), Some(server)) =
                    (dumped.as_ref(), self.server.take_if(|_| dumped.is_some()))
            {
                self.serve(tasks, server, stage, tell)?;
            }
        }
        while !self.serving {
            // CRIU was quicker than the last pages.
            match inputs.next(RESTORE_LIMIT)? {
                Input::Heard(Heard::Message(Message::MemoryDone { left })) => {
                    self.left = left;
                    if let (Some(tasks), Some(server)) = (&dumped, self.server.take()) {
                        self.serve(tasks, server, stage, tell)?;
                    }
                }
                Input::Heard(Heard::Frame(Frame::Packet(bytes))) => self.network.keep(&bytes)?,
                Input::Want(vpid, at, pages) => want(speaker, vpid, at, pages)?,
                _ => {}
            }
        }
        self.phase = "waiting for the verdict";
        // Not synced: a crash of this host loses the copy with the note about it.
        self.journal.note(State::Ready)?;
        fault::point("destination.ready")?;
        // Bad news that came meanwhile comes before this.
        while let Some(input) = inputs.pending()? {
            match input {
                Input::Heard(Heard::Frame(Frame::Packet(bytes))) => self.network.keep(&bytes)?,
                Input::Want(vpid, at, pages) => want(speaker, vpid, at, pages)?,
                _ => {}
            }
        }
        speaker.say(&Message::Ready)?;
        fault::point("destination.said-ready")
    }

    fn start_restore(&mut self, tell: &Sender<Input>) -> Result<()> {
        self.phase = "preparing the restore";
        let (criu, _) = host::criu()?;
        let targets: Vec<&str> = self.plan.streams.iter().map(|s| s.target.as_str()).collect();
        fs::write(self.work.images().join("descriptors.json"), serde_json::to_vec(&targets)?)?;
        let streams = self.streams.plan()?;
        self.server = Some(Server::listen(&self.work.work())?);
        let namespace = match self.network.namespace() {
            Some(namespace) if self.plan.criu_inside() => Some(namespace.try_clone()?),
            _ => None,
        };
        let plan = RestorePlan {
            runtime: self.runtime.clone(),
            container: self.plan.container.clone(),
            bundle: self.plan.bundle.clone(),
            root: self.journal.record.placing.mounting().map(|m| m.place().to_owned()),
            images: self.work.images(),
            work: self.work.work(),
            streams,
            tmpfs: self.tmpfs_places().map(|(t, p)| (t.place.clone(), p)).collect(),
            console_socket: self.plan.console_socket.clone(),
            loopback: self.plan.loopback.clone(),
            gate: self.network.gate(),
            interposer: Interposer::new(self.work.path(), &criu, namespace)?,
        };
        let tell = tell.clone();
        self.restore = Some(RestoreJob::start(plan, move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(Input::Restore(event));
        })?);
        Ok(())
    }

    /// One more link that brings memory. Whoever brought it waits until it is dropped.
    fn join(
        &mut self,
        input: OwnedFd,
        output: OwnedFd,
        held: UnixStream,
        stage: &Stage,
        tell: &Sender<Input>,
    ) -> Result<()> {
        if self.lanes.len() >= MAX_LANES {
            bail!("more than {MAX_LANES} further links");
        }
        let (speaker, reader, _) = talk::split(connect::adopt(input, output)?);
        speaker.say(&Message::Joined)?;
        let tell = tell.clone();
        intake::listen_lane(reader, speaker, stage, move |why| {
            // The hand-over may have ended already.
            let _ = tell.send(Input::LaneEnded(why));
        })?;
        self.lanes.push(held);
        Ok(())
    }

    /// A piece of an image file, or of a log.
    fn file(&mut self, name: &str, at: u64, bytes: &[u8]) -> Result<()> {
        self.backlog.done(bytes.len());
        if name == STREAM {
            let applying = self.applying.as_ref();
            return applying.ok_or_else(|| anyhow!("files that were not announced"))?.feed(bytes);
        }
        match name.strip_prefix("stream-") {
            Some(number) => self.streams.write(number, at, bytes),
            None => self.images.write(name, at, bytes),
        }
    }

    fn begin_restore(&mut self) -> Result<()> {
        self.phase = "restoring";
        self.began = Instant::now();
        self.images.close();
        for (i, (tmpfs, place)) in self.tmpfs_places().enumerate() {
            let packed = File::open(self.work.images().join(format!("tmpfs-{i}")))?;
            tree::unpack(&place, &mut BufReader::with_capacity(256 << 10, packed))
                .with_context(|| format!("filling the tmpfs {}", tmpfs.place))?;
        }
        self.streams.settle()?;
        if let Some(applying) = self.applying.take() {
            applying.finish().context("taking files in")?;
        }
        if let Some(mounting) = self.journal.record.placing.mounting() {
            mounting.mount()?;
        }
        self.mark("restore begins");
        self.tell_restore(Go::Restore)
    }

    /// Makes the places of the trees that are copied, and whoever fills them.
    fn take_files(&mut self, tell: &Sender<Input>) -> Result<()> {
        self.phase = "taking files in";
        let placing = &self.journal.record.placing;
        let mut staged = Vec::new();
        if let Some(coming) = &self.incoming.coming {
            coming.stage()?;
            staged = coming.staged();
        }
        staged.extend(placing.stage()?);
        let (_, there) = checks::bundle_here(&self.plan)?;
        if !there {
            let config = serde_json::to_vec_pretty(&self.plan.config)?;
            placing.write(&self.plan.bundle.join("config.json"), &config)?;
        }
        let roots: Vec<_> = staged.into_iter().zip(self.incoming.sizes.iter().copied()).collect();
        let tell = tell.clone();
        // The hand-over may have ended already.
        let told = move |applied| drop(tell.send(Input::Files(applied)));
        self.applying = Some(match self.incoming.coming.take() {
            Some(coming) => Applying::start(&roots, coming.after_first_round(told))?,
            None => Applying::start(&roots, told)?,
        });
        Ok(())
    }

    fn tmpfs_places(&self) -> impl Iterator<Item = (&Tmpfs, PathBuf)> {
        let mounted = self.tmpfs.iter();
        mounted.flat_map(|m| self.plan.tmpfs.iter().enumerate().map(|(i, t)| (t, m.place(i))))
    }

    fn tell_restore(&self, go: Go) -> Result<()> {
        let job = self.restore.as_ref().ok_or_else(|| anyhow!("no restore under way"))?;
        job.go.send(go).map_err(|_| anyhow!("the restore has ended"))
    }

    /// All pages are here: into the tasks with them.
    fn serve(
        &mut self,
        tasks: &[i32],
        server: Server,
        stage: &Stage,
        tell: &Sender<Input>,
    ) -> Result<()> {
        let mut pagemaps = HashMap::new();
        for &vpid in tasks {
            let path = self.work.images().join(format!("pagemap-{vpid}.img"));
            match fs::read(&path) {
                Ok(bytes) => {
                    let (_, entries) = images::parse_pagemap(&bytes)
                        .with_context(|| format!("pagemap of task {vpid}"))?;
                    pagemaps.insert(vpid, entries);
                }
                // A task that ended in the freeze's last moment: CRIU knows it as a zombie.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e.into()),
            }
        }
        let guard = PageGuard::spawn(&self.journal)?;
        let to_guard = guard.socket.try_clone()?;
        self.guard = Some(guard);
        // The hand-over may have ended already.
        let (wanted, ended) = (tell.clone(), tell.clone());
        let want = move |vpid, at, pages| drop(wanted.send(Input::Want(vpid, at, pages)));
        let end = move |e| drop(ended.send(Input::Pages(e)));
        stage.serve(|staging| server.start(staging, &pagemaps, to_guard, want, end))?;
        self.serving = true;
        self.mark("last page is here");
        Ok(())
    }

    /// Restored and held: the source decides, however long it takes.
    fn await_verdict(&mut self, speaker: &Speaker, inputs: &mut Inputs) -> Verdict {
        loop {
            let input = match inputs.queue.recv_timeout(SILENCE) {
                Ok(input) => input,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Verdict::Abort,
            };
            match input {
                Input::Heard(Heard::Message(Message::Commit)) => return Verdict::Commit,
                Input::Heard(Heard::Message(Message::Abort { .. })) => return Verdict::Abort,
                Input::Heard(Heard::Frame(Frame::Packet(bytes))) => {
                    // A damaged one is the sender's timer's business.
                    let _ = self.network.keep(&bytes);
                }
                Input::Call(Call::Verdict(Some(verdict), reply)) => {
                    let standing = match verdict {
                        Verdict::Commit => Standing::Running,
                        Verdict::Abort => Standing::Gone,
                    };
                    // Told before it is so: from here on it can only come true or, with this
                    // process, be undone. The source asks again before it lets go of anything.
                    let _ = reply.send(if verdict == Verdict::Commit {
                        Standing::Waiting
                    } else {
                        standing
                    });
                    return verdict;
                }
                Input::Call(Call::Verdict(None, reply)) => {
                    let _ = reply.send(Standing::Waiting);
                }
                Input::Pages(Ended { result: Ok(served), held }) => {
                    self.pages = Some(Ended { result: Ok(served), held });
                }
                // Its memory cannot be put into it; there is nothing that could run.
                Input::Pages(Ended { result: Err(e), .. }) => {
                    let phase = self.phase.to_owned();
                    let _ = speaker.say(&Message::Failed { phase, why: format!("{e:#}") });
                    return Verdict::Abort;
                }
                // The copy has died while it was held; there is nothing to run any more.
                Input::Restore(RestoreEvent::Ended(_) | RestoreEvent::Died) => {
                    let why = "the restored copy was killed while it waited".to_owned();
                    let phase = self.phase.to_owned();
                    let _ = speaker.say(&Message::Failed { phase, why });
                    return Verdict::Abort;
                }
                Input::Want(vpid, at, pages) => drop(want(speaker, vpid, at, pages)),
                // A later link, or the operator, brings the verdict.
                Input::Heard(Heard::Gone(_)) => self.link = false,
                // A signal is no verdict either.
                Input::Heard(_)
                | Input::Restore(_)
                | Input::Signal(_)
                | Input::LaneEnded(_)
                | Input::Files(_)
                | Input::Synced
                | Input::Call(Call::Link(..) | Call::Lane(..)) => {}
            }
        }
    }

    /// It is ours: opens the fence, lets it run, tells everybody. No way back.
    fn run(
        mut self,
        mut speaker: Speaker,
        inputs: &mut Inputs,
        tell: &Sender<Input>,
        stage: &Stage,
        current: &Current,
    ) -> Result<()> {
        self.mark("commit");
        let _ = fault::point("destination.commit");
        if let Err(e) = self.journal.note(State::Committed) {
            // The source's journal has it on disk: whoever asks there learns the same.
            tracing::error!("{e:#}");
        }
        // From here on what was made is the container's: no error may take it away again but one
        // that says that there is no container.
        self.streams.keep();
        let _ = fault::point("destination.committed");
        // If it has ended, that stands in the queue.
        let _ = self.tell_restore(Go::Verdict(true));
        let mut link = self.link;
        let mut served = self.pages.take().and_then(|ended| ended.result.ok());
        // As long as the latest link is ours to use, whoever brought it waits.
        let mut brought = None;
        let (mut running, mut ended) = (false, false);
        let mut finished = false;
        // Files that were copied, on the disk.
        let mut synced = self.incoming.is_empty();
        while !(running && ended && synced && served.is_some() && (finished || !link)) {
            match inputs.queue.recv_timeout(RESTORE_LIMIT) {
                Ok(Input::Restore(RestoreEvent::Released(opened))) => {
                    self.network.open(opened);
                    self.mark("fence open");
                    let _ = fault::point("destination.open");
                }
                Ok(Input::Restore(RestoreEvent::AtResume)) => {
                    self.mark("sockets alive");
                    self.network.replay();
                    let _ = self.tell_restore(Go::Resume);
                }
                Ok(Input::Restore(RestoreEvent::Running)) => {
                    running = true;
                    self.mark("running");
                    let _ = fault::point("destination.running");
                    self.network.replay();
                    self.network.announce();
                    let arrival = protocol::Arrival {
                        pid: self.journal.record.init.map_or(0, |i| i.0),
                        marks: self.marks.clone(),
                        packets: self.network.replayed,
                    };
                    link &= speaker.say(&Message::Running(Box::new(arrival))).is_ok();
                    if !synced {
                        self.sync(tell);
                    }
                    if let Some(served) = served.filter(|_| synced) {
                        link &= self.say_whole(&speaker, served);
                    }
                }
                Ok(Input::Synced) => {
                    synced = true;
                    if let Some(served) = served.filter(|_| running) {
                        link &= self.say_whole(&speaker, served);
                    }
                }
                Ok(Input::Pages(Ended { result: Ok(all), .. })) => {
                    served = Some(all);
                    if running && synced {
                        link &= self.say_whole(&speaker, all);
                    }
                }
                Ok(Input::Want(vpid, at, pages)) => {
                    link &= want(&speaker, vpid, at, pages).is_ok();
                }
                Ok(Input::Call(Call::Link(input, output, held))) => {
                    tracing::info!("the source is back over a new link");
                    let heard = tell.clone();
                    let hear = move |h| heard.send(Input::Heard(h)).is_ok();
                    let backlog = &self.backlog;
                    let taken = connect::adopt(input, output).and_then(|new| {
                        let (other, reader, _) = talk::split(new);
                        intake::listen(reader, &other, stage, current, backlog, hear)?;
                        Ok(other)
                    });
                    match taken {
                        Ok(other) => speaker = other,
                        Err(e) => {
                            // It hears nothing, and comes again.
                            tracing::error!("the new link to the source: {e:#}");
                            continue;
                        }
                    }
                    drop(brought.replace(held));
                    link = match served {
                        Some(served) if running && synced => self.say_whole(&speaker, served),
                        _ => say_missing(&speaker, stage).is_ok(),
                    };
                }
                Ok(Input::Pages(Ended { result: Err(e), held })) => {
                    let failed = e.context("not all of its memory can be put into the container");
                    let why = format!("{failed:#}");
                    // Ended while whoever misses a page still waits for it.
                    let undone = self.undo();
                    drop(held);
                    let _ = speaker.say(&Message::Failed { phase: "starting".into(), why });
                    undone?;
                    return Err(failed);
                }
                Ok(Input::Restore(RestoreEvent::Ended(result))) => {
                    ended = true;
                    if let Err(e) = result
                        && !running
                    {
                        let failed = e.context("the copy died after the commit");
                        let why = format!("{failed:#}");
                        // First of all so that nobody takes what is left of it for a container
                        // that runs. The source still has it, frozen.
                        let undone = self.undo();
                        let _ = speaker.say(&Message::Failed { phase: "starting".into(), why });
                        undone?;
                        return Err(failed);
                    }
                }
                Ok(Input::Heard(Heard::Frame(Frame::Packet(bytes)))) => {
                    let _ = self.network.keep(&bytes);
                    if running {
                        self.network.replay();
                    }
                }
                Ok(Input::Heard(Heard::Message(Message::Finished))) => finished = true,
                Ok(Input::Heard(Heard::Gone(_))) => link = false,
                Ok(Input::Call(Call::Verdict(_, reply))) => {
                    let now = match (running, served.is_some() && synced) {
                        (true, true) => Standing::Running,
                        (true, false) if self.left > 0 => Standing::Partial,
                        _ => Standing::Waiting,
                    };
                    let _ = reply.send(now);
                }
                Ok(_) => {}
                // Pages that are still on the source may take as long as they like.
                Err(_) if served.is_none() && self.left > 0 => {}
                Err(_) => link = false,
            }
        }
        drop(brought);
        self.settle_in()
    }

    /// Brings the copies to the disk, while the container runs.
    fn sync(&self, tell: &Sender<Input>) {
        let (placing, tell) = (self.journal.record.placing.clone(), tell.clone());
        let work = move || {
            if let Err(e) = placing.sync() {
                // The container runs on them all the same; the journal's own disk may be another.
                tracing::error!("what was copied may not be on the disk: {e:#}");
            }
            let _ = tell.send(Input::Synced);
        };
        // Without a thread of its own, it takes this one's time.
        let threaded = std::thread::Builder::new().name("sync".into()).spawn(work.clone());
        if threaded.is_err() {
            work();
        }
    }

    /// Tells the source that what is frozen there is needed no more; whether it could be told. The
    /// journal knows it first: who asks later must not be told otherwise.
    fn say_whole(&mut self, speaker: &Speaker, served: Served) -> bool {
        self.mark("whole");
        // The source may remove its files: what is here must outlast a loss of power by then.
        let noted = match self.incoming.is_empty() {
            true => self.journal.note(State::Whole),
            false => self.journal.write(State::Whole),
        };
        if let Err(e) = noted {
            tracing::error!("{e:#}");
        }
        speaker.say(&Message::Whole(served)).is_ok()
    }

    fn dismiss_guard(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// The container runs: waits for its last pages, and leaves.
    fn settle_in(mut self) -> Result<()> {
        if let Some(job) = self.restore.take() {
            job.join();
        }
        std::mem::take(&mut self.network).settle();
        let _ = fault::point("destination.finish");
        drop(self.tmpfs.take());
        let cleared = checks::clear_mark(&self.plan, &self.runtime, &self.state_dir);
        let came_back = cleared.as_ref().is_ok_and(|was| *was);
        let kept = recover::settle_files(&self.journal.record, came_back);
        // What could not be done stays open, for `ferry resolve` to try again.
        let written = kept.and_then(|()| self.journal.write(State::Finished));
        self.dismiss_guard();
        written.and(cleared.map(|_| ()))
    }

    /// Nothing of it stays here.
    fn undo(mut self) -> Result<()> {
        let _ = fault::point("destination.undo");
        // Nothing more is written to what is taken away.
        drop(self.applying.take());
        // CRIU may be waiting for pages that will never come: with nobody to ask it gives up.
        drop(self.server.take());
        if let Some(job) = self.restore.take() {
            job.join();
        }
        drop(std::mem::take(&mut self.network));
        drop(self.tmpfs.take());
        self.streams.undo();
        let undone = recover::destination_discards(&mut self.journal);
        self.dismiss_guard();
        undone
    }
}

/// Where copies are staged and put, and what else has to be made for them.
fn placing(plan: &Plan, incoming: &Incoming) -> Result<Placing> {
    if incoming.is_empty() {
        return Ok(Placing::default());
    }
    let (_, there) = checks::bundle_here(plan)?;
    let config = (!there).then(|| plan.bundle.join("config.json"));
    let mut targets = incoming.targets.clone();
    let coming = incoming.coming.as_ref();
    // Last, as nothing is announced of it: it comes to its place as it is staged, empty.
    let work = coming.and_then(|c| c.upper.as_ref()).map(|u| u.work.clone());
    targets.extend(work.map(|path| Target { path, own: true, single: false }));
    let placing = Placing::plan(&plan.migration, &targets, config.as_slice())?;
    Ok(match coming {
        Some(coming) => placing.with_overlay(coming.mounting.clone(), coming.staged()),
        None => placing,
    })
}

/// Asks the source for pages that a task waits for.
fn want(speaker: &Speaker, vpid: i32, at: u64, pages: usize) -> Result<()> {
    speaker.run(Run::Want, vpid, at, pages)?;
    speaker.flush()
}

/// Tells a source that is back what is missing here.
fn say_missing(speaker: &Speaker, stage: &Stage) -> Result<()> {
    let missing = stage.missing()?;
    let mut pages = 0;
    for (vpid, at, n) in missing {
        speaker.run(Run::Want, vpid, at, n)?;
        pages += n as u64;
    }
    speaker.say(&Message::Missing { pages })
}
