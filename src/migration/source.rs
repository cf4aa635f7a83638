//! The source's role: [`migrate`] from the first look at the container to its end here.
//!
//! ```text
//!            inspect        connect, plan       make ready, copy     freeze, dump, restore
//!  ─────────▶ Looked ──────▶ Accepted ─────────▶ Begun ─────────────▶ Begun ──── commit ───▶ Committed
//!              │ refused       │ refused           │ any error           │ any error            │
//!              ▼               ▼                   ▼                     ▼                      ▼
//!            exit 3          exit 3             runs on here (1)      runs on here (1)     done (0), or
//!                                                                                          in doubt (4)
//! ```
//!
//! [`Begun`] can only end in two ways: `runs_on`, which undoes everything, or `commit`, which
//! consumes it. [`Committed`] has no way back: nothing in it can thaw the container or lift the
//! fence, and its functions return no error that anybody could take for a reason to.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::ask::{Accepted, Input, Inputs, Options, ask};
use super::carry::{self, Memory, MemoryEvent, Order};
use super::dump::{DumpEvent, DumpJob, DumpPlan, Go};
use super::early::Early;
use super::guards::SourceGuard;
use super::haul::{self, Haul, HaulEvent};
use super::hooks::Hooks;
use super::inspect::Subject;
use super::journal::{self, Journal, Lock, Record, Role, State};
use super::keeper::Keeper;
use super::lanes::Lane;
use super::parcels::{SpeakerFile, send_file};
use super::protocol::{Message, Standing, Verdict};
use super::rest::Brought;
use super::talk::{Heard, Speaker};
use super::workdir::WorkDir;
use super::{descriptors, floating, forecast, forward, host, recover, rest, settle, watched};
use crate::criu::interposer::Interposer;
use crate::files::place::Placing;
use crate::files::{tmpfs, tree};
use crate::memory::pages;
use crate::memory::rounds::Tracking;
use crate::network::hook::About;
use crate::network::host_side::Silence;
use crate::network::sockets::Lookout;
use crate::network::unread::Homes;
use crate::network::{Capture, Hook, HostSide, Placement, Replay, fence};
use crate::oci::runtime::Runtime;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::fault;
use crate::sys::netns::NetNs;
use crate::sys::process;
use crate::transport::connect::Closer;
use crate::transport::frame::{self, Frame, Run};

/// From the freeze to the commit: a hand-over that takes longer is given up.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// How long nothing may be heard of the destination while it makes everything ready and takes in
/// memory.
const PREPARE_LIMIT: Duration = Duration::from_secs(45);
/// The same while it takes in files: bringing them to the disk is silent work.
const FILES_LIMIT: Duration = Duration::from_secs(900);
/// How long the other side may take to end after the last word.
const GOODBYE_LIMIT: Duration = Duration::from_secs(60);
/// From the resume until the last staged page is installed.
const WHOLE_LIMIT: Duration = Duration::from_secs(600);
/// How long a lost destination is looked for after the commit.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// The image in which CRIU notes what it did about open files without their names.
const REMAPS: &str = "remap-fpath.img";
/// An image that holds nothing: two numbers that say what it is.
const EMPTY_IMAGE: u64 = 8;

/// `ferry check CONTAINER DESTINATION`, and with a `forecast` of what would go `migrate --dry-run`.
///
/// # Errors
/// Everything that stands in the way.
pub fn check(
    runtime: &Runtime,
    options: &Options,
    forecast: bool,
    reporter: &mut Reporter,
) -> Result<(), Failed> {
    let mut accepted = ask(runtime, options, reporter)?;
    if forecast {
        match forecast::forecast(&mut accepted, options.memory.pace.rate()) {
            Ok(forecast) => reporter.report.forecast = Some(forecast),
            Err(e) => {
                accepted.closer.close();
                return Err(Failed::refused(e));
            }
        }
    }
    drop(accepted.speaker);
    accepted.closer.wait(GOODBYE_LIMIT);
    Ok(())
}

/// `ferry migrate`.
///
/// # Errors
/// With the exit code that says what has become of the container.
pub fn migrate(
    runtime: &Runtime,
    state_dir: &std::path::Path,
    options: &Options,
    reporter: &mut Reporter,
) -> Result<(), Failed> {
    reporter.report.container.clone_from(&options.wishes.container);
    reporter.report.destination = options.destination.to_string();
    let accepted = ask(runtime, options, reporter)?;
    let mut begun = Begun::new(accepted, runtime, state_dir, options)?;
    match begun.hand_over(reporter) {
        Ok(()) => match begun.commit() {
            Ok(committed) => committed.finish(reporter),
            Err((begun, e)) => Err(begun.runs_on(e, reporter)),
        },
        Err(e) => Err(begun.runs_on(e, reporter)),
    }
}

/// What of the container's files is of no use here when it runs there. Layers may be others', too.
fn removable(subject: &Subject) -> Vec<PathBuf> {
    let load = subject.load.iter();
    let mut list: Vec<PathBuf> = load.flat_map(|l| &l.roots[l.layers..]).cloned().collect();
    if let Some(upper) = subject.layered.overlay().and_then(|o| o.upper.as_ref())
        && list.contains(&upper.path)
    {
        list.push(upper.work.clone());
    }
    list
}

/// The migration has begun: there is a journal, and perhaps more to undo.
struct Begun {
    subject: Subject,
    speaker: Speaker,
    closer: Closer,
    inputs: Inputs,
    runtime: Runtime,
    journal: Journal,
    work: WorkDir,
    guard: SourceGuard,
    dump: Option<DumpJob>,
    /// Keeps this host from answering for the container, from the commit on.
    silence: Option<Silence>,
    hooks: Option<Hooks>,
    memory: Option<Memory>,
    haul: Option<Haul>,
    early: Option<Early>,
    memory_wishes: carry::Wishes,
    /// Further links for memory.
    lanes: Vec<Lane>,
    /// Pages that stayed here for after the commit.
    left: u64,
    keeper: Option<Keeper>,
    frozen_since: Option<Instant>,
    /// No second migration of the same container meanwhile.
    _lock: Lock,
    limit: Option<Instant>,
}

impl Begun {
    fn new(
        accepted: Accepted,
        runtime: &Runtime,
        state_dir: &std::path::Path,
        options: &Options,
    ) -> Result<Begun, Failed> {
        let Accepted { subject, speaker, closer, inputs } = accepted;
        let plan = &subject.plan;
        settle::sweep(state_dir, runtime.root(), &plan.container).map_err(Failed::refused)?;
        let lock =
            Lock::take(state_dir, runtime.root(), &plan.container).map_err(Failed::refused)?;
        let work = WorkDir::create(&plan.migration).map_err(Failed::refused)?;
        let record = Record {
            migration: plan.migration.clone(),
            container: plan.container.clone(),
            role: Role::Source,
            peer: options.destination.to_string(),
            destination: Some(options.destination.clone()),
            runtime: runtime.program().to_owned(),
            root: options.wishes.root.clone(),
            systemd_cgroup: options.wishes.systemd_cgroup,
            cgroup: Some(subject.cgroup.clone()),
            init: process::start_time(subject.state.pid).map(|t| (subject.state.pid, t)),
            network_path: subject.network.as_ref().map(|n| n.1.clone()),
            network_identity: subject.network.as_ref().and_then(|n| n.0.identity().ok()),
            network_ours: true,
            leave_mark: options.leave_mark,
            placing: Placing::default(),
            forward: subject.forward.clone(),
            remove: if options.remove_files { removable(&subject) } else { Vec::new() },
            unmount: subject.load.as_ref().and_then(|l| Some(l.merged.as_ref()?.0.clone())),
            work: work.path().to_owned(),
            worker: journal::this_process(),
            begun: journal::unix_time(),
        };
        let mut journal = Journal::create(state_dir, record).map_err(Failed::refused)?;
        let guard = match SourceGuard::spawn(&journal) {
            Ok(guard) => guard,
            Err(e) => {
                let _ = journal.write(State::Aborted);
                return Err(Failed::from(e));
            }
        };
        Ok(Begun {
            subject,
            speaker,
            closer,
            inputs,
            runtime: runtime.clone(),
            journal,
            work,
            guard,
            dump: None,
            silence: None,
            hooks: None,
            memory: None,
            haul: None,
            early: None,
            memory_wishes: options.memory.clone(),
            lanes: Vec::new(),
            left: 0,
            keeper: None,
            frozen_since: None,
            _lock: lock,
            limit: options.timeout.map(|t| Instant::now() + t),
        })
    }

    /// The hand-over up to the commit, in order.
    fn hand_over(&mut self, reporter: &mut Reporter) -> Result<()> {
        reporter.phase("prepare", "making ready on both sides, copying memory");
        self.prepare(reporter)?;
        reporter.mark("ready for the freeze");
        self.freeze(reporter)?;
        self.dump(reporter)?;
        self.transfer(reporter)?;
        self.await_ready(reporter)
    }

    fn prepare(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.prepare")?;
        self.speaker.say(&Message::Prepare)?;
        self.inputs.until(PREPARE_LIMIT);
        self.obey_limit();
        self.open_lanes()?;
        // First, and alone: memory would only change while files go.
        self.copy_files(reporter)?;
        let mut joined = !self.start_forwarding()?;
        self.prepare_hook()?;
        self.start_dump()?;
        let tell = self.inputs.tell.clone();
        let told = move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(Input::Memory(event));
        };
        let (wishes, cgroup) = (self.memory_wishes.clone(), &self.subject.cgroup);
        self.memory = Some(Memory::start(cgroup, &self.speaker, &self.lanes, wishes, told)?);
        self.send_streams(false)?;
        let (mut prepared, mut at_freeze, mut settled) = (false, false, false);
        while !(prepared && at_freeze && settled && joined) {
            match self.next(reporter)? {
                Input::Joined(_) => {
                    reporter.mark("the way to forward stands");
                    joined = true;
                }
                Input::Heard(Heard::Message(Message::Prepared)) => {
                    reporter.mark("destination is ready");
                    prepared = true;
                }
                Input::Dump(DumpEvent::AtFreeze) => at_freeze = true,
                Input::Files(HaulEvent::Settled) => {}
                Input::Memory(MemoryEvent::Settled(next)) => {
                    reporter.settled(next);
                    settled = true;
                }
                _ => {}
            }
        }
        if self.tell_haul(haul::Order::Again) {
            // What has changed while memory went.
            self.inputs.until(FILES_LIMIT);
            self.obey_limit();
            while !matches!(self.next(reporter)?, Input::Files(HaulEvent::Settled)) {}
        }
        Ok(())
    }

    /// Where files are copied: until little is left to copy, and what there is has its place.
    fn copy_files(&mut self, reporter: &mut Reporter) -> Result<()> {
        let Some(load) = self.subject.load.clone() else { return Ok(()) };
        let tell = self.inputs.tell.clone();
        let told = move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(Input::Files(event));
        };
        self.inputs.until(FILES_LIMIT);
        self.obey_limit();
        // What is written through an overlay, the kernel does not tell of the file system below.
        let listen = self.memory_wishes.tracking != Tracking::Hash && load.merged.is_none();
        let cgroup = &self.subject.cgroup;
        let pace = &self.memory_wishes.pace;
        self.haul = Some(Haul::start(&load, listen, cgroup, (&self.speaker, pace), told)?);
        while !matches!(self.next(reporter)?, Input::Files(HaulEvent::Settled)) {}
        reporter.files_settled();
        fault::point("source.copied")?;
        self.inputs.until(PREPARE_LIMIT);
        self.obey_limit();
        self.speaker.say(&Message::Copied)
    }

    /// Where the address stays: a link from its home to the destination. Whether one is being made.
    fn start_forwarding(&mut self) -> Result<bool> {
        let Some((namespace, _, image)) = &self.subject.network else { return Ok(false) };
        let wanted = forward::steps::establish(&self.journal.record, namespace, image)?;
        if wanted {
            let (record, tell) = (self.journal.record.clone(), self.inputs.tell.clone());
            // The hand-over may have ended already.
            let join = move || drop(tell.send(Input::Joined(forward::steps::join(&record))));
            std::thread::Builder::new().name("join".into()).spawn(join)?;
        }
        Ok(wanted)
    }

    /// Whether there is somebody to tell.
    fn tell_haul(&self, order: haul::Order) -> bool {
        self.haul.as_ref().is_some_and(|haul| haul.orders.send(order).is_ok())
    }

    /// The further links that are wished for, as soon as the destination takes them.
    fn open_lanes(&mut self) -> Result<()> {
        if self.memory_wishes.streams < 2 {
            return Ok(());
        }
        while !matches!(self.inputs.next()?, Input::Heard(Heard::Message(Message::Open))) {}
        let destination = self.journal.record.destination.clone();
        let destination = destination.ok_or_else(|| anyhow!("no destination is known"))?;
        let migration = &self.subject.plan.migration;
        for number in 1..self.memory_wishes.streams {
            let tell = self.inputs.tell.clone();
            let told = move |echo| tell.send(Input::Lane(number, echo)).is_ok();
            self.lanes.push(Lane::open(&destination, migration, told)?);
        }
        Ok(())
    }

    /// Where the user has named a network hook.
    fn prepare_hook(&mut self) -> Result<()> {
        let placement = self.subject.plan.placement.parse();
        if let (Ok(Placement::Hook(program)), Some((_, netns, image))) =
            (placement, &self.subject.network)
        {
            let record = &self.journal.record;
            let about = About {
                role: "source",
                migration: &record.migration,
                container: &record.container,
                peer: &record.peer,
                netns,
            };
            self.hooks = Some(Hooks::prepare(Hook::new(&program, about, image), self.work.path())?);
        }
        Ok(())
    }

    fn start_dump(&mut self) -> Result<()> {
        let (criu, _) = host::criu()?;
        let plan = &self.subject.plan;
        let (network, lookout) = match (&self.subject.network, &plan.floating) {
            (Some((namespace, _, image)), _) => {
                let both = (fence::arm(namespace)?, Capture::prepare(namespace, image)?);
                (Some(Box::new(both)), Some(Lookout::new(namespace)?))
            }
            (None, Some(all)) => {
                let (work, cgroup) = (self.work.path(), &self.subject.cgroup);
                let (fence, capture, lookout) = floating::arm(all, &plan.migration, work, cgroup)?;
                (Some(Box::new((fence, capture))), Some(lookout))
            }
            (None, None) => (None, None),
        };
        let side = self.subject.plan.network.as_ref();
        if let Some(side) = side.and_then(|i| HostSide::new(i, &self.subject.plan.migration)) {
            recover::note_host_side(self.work.path(), &side)?;
            self.silence = Some(side.arm(&NetNs::current()?)?);
        }
        let plan = DumpPlan {
            runtime: self.runtime.clone(),
            container: self.subject.plan.container.clone(),
            cgroup: self.subject.cgroup.clone(),
            images: self.work.images(),
            work: self.work.work(),
            tmpfs: self.subject.plan.tmpfs.iter().map(|t| t.place.clone()).collect(),
            external: self.subject.plan.streams.iter().filter_map(|s| s.external.clone()).collect(),
            network,
            lookout,
            homes: match (&self.subject.network, &plan.floating) {
                (Some((_, _, image)), _) => Homes::of(image),
                (None, Some(all)) => all.homes(),
                (None, None) => Homes::default(),
            },
            interposer: Interposer::new(self.work.path(), &criu, self.criu_namespace()?)?,
            namespace: self.criu_namespace()?,
            vouched: watched::worth_vouching(&self.subject.cgroup.processes()?),
        };
        let tell = self.inputs.tell.clone();
        self.dump = Some(DumpJob::start(plan, move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(Input::Dump(event));
        })?);
        Ok(())
    }

    fn criu_namespace(&self) -> Result<Option<NetNs>> {
        match &self.subject.network {
            Some((namespace, _, _)) if self.subject.plan.criu_inside() => {
                Ok(Some(namespace.try_clone()?))
            }
            _ => Ok(None),
        }
    }

    fn go(&self, go: Go) -> Result<()> {
        let job = self.dump.as_ref().ok_or_else(|| anyhow!("no dump under way"))?;
        job.go.send(go).map_err(|_| anyhow!("the dump has ended"))
    }

    fn freeze(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.freeze")?;
        recover::leave_mark(&self.journal)?;
        self.inputs.until(FREEZE_LIMIT);
        self.obey_limit();
        let rounds = &reporter.report.rounds;
        // Rounds of less tell nothing of the link.
        let telling = rounds.iter().rev().find(|r| r.wire_bytes > 1 << 20);
        let rate = telling.map(|r| r.wire_bytes as f64 * 1000.0 / r.ms.max(1.0));
        self.inputs.feel_pulse(&self.speaker, rate);
        self.speaker.say(&Message::Freezing)?;
        descriptors::warm(&self.subject.cgroup.processes()?);
        self.early = Some(Early::start(self.work.images(), self.speaker.clone())?);
        self.go(Go::Freeze)?;
        loop {
            if let Input::Dump(DumpEvent::Frozen { since, network, came }) = self.next(reporter)? {
                self.frozen_since = Some(since);
                reporter.mark_at("freeze", since);
                reporter.mark("frozen, fence closed");
                if let Some(network) = network {
                    let (_, capture) = *network;
                    self.keeper = Some(Keeper::start(capture, came, self.speaker.clone())?);
                }
                break;
            }
        }
        self.tell_haul(haul::Order::Frozen);
        self.tell_memory(Order::Frozen)
    }

    fn tell_memory(&self, order: Order) -> Result<()> {
        let memory = self.memory.as_ref().ok_or_else(|| anyhow!("memory is not being sent"))?;
        memory.orders.send(order).map_err(|_| anyhow!("memory is not being sent any more"))
    }

    fn dump(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.dump")?;
        // While CRIU works.
        recover::note_sockets(&self.journal.record, &self.subject.cgroup.processes()?)?;
        let (mut dumped, mut hauled) = (false, self.haul.is_none());
        while !(dumped && hauled) {
            match self.next(reporter)? {
                Input::Dump(DumpEvent::Dumped) => {
                    reporter.mark("dumped");
                    dumped = true;
                }
                Input::Files(HaulEvent::Done) => {
                    reporter.mark("last file is sent");
                    hauled = true;
                }
                _ => {}
            }
        }
        // An open file that has lost the name it was opened by, and has another one, gets one more
        // of CRIU's for the restore. That has happened while the last files went.
        let remaps = std::fs::metadata(self.work.images().join(REMAPS));
        if remaps.is_ok_and(|m| m.len() > EMPTY_IMAGE) && self.tell_haul(haul::Order::Named) {
            while !matches!(self.next(reporter)?, Input::Files(HaulEvent::Done)) {}
            reporter.mark("names that CRIU gave are sent");
        }
        Ok(())
    }

    fn transfer(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.transfer")?;
        self.tell_memory(Order::Dumped)?;
        self.send_streams(true)?;
        self.send_tmpfs()?;
        let tasks = pages::tasks(&self.subject.cgroup.processes()?)?;
        let sent = self.early.as_mut().map(Early::end).transpose()?.unwrap_or_default();
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        for entry in std::fs::read_dir(self.work.images())? {
            let entry = entry?;
            let name = entry.file_name();
            if sent.contains(&name) {
                continue;
            }
            let name = name.to_str().ok_or_else(|| anyhow!("an image file with a strange name"))?;
            send_file(&self.speaker, name, &entry.path(), 0, &mut buffer)?;
        }
        recover::keep_sockets(&self.journal.record)?;
        self.speaker.say(&Message::Dumped { tasks: tasks.iter().map(|t| t.vpid).collect() })?;
        reporter.mark("images are sent");
        Ok(())
    }

    /// The contents of the tmpfs mounts that CRIU leaves to us, as they are after it has made its
    /// link remaps.
    fn send_tmpfs(&self) -> Result<()> {
        let root = PathBuf::from(format!("/proc/{}/root", self.subject.state.pid));
        for (i, one) in self.subject.plan.tmpfs.iter().enumerate() {
            // The container may have put something in the way since it was looked at.
            let place = tmpfs::open_in(&root, &one.place)
                .with_context(|| format!("opening the tmpfs {}", one.place))?;
            let (speaker, pace) = (&self.speaker, &self.memory_wishes.pace);
            let file = SpeakerFile { speaker, name: format!("tmpfs-{i}"), at: 0, pace };
            let mut out = BufWriter::with_capacity(frame::MAX_FILE_PIECE, file);
            tree::pack(&process::path_of(&place), &mut out)
                .with_context(|| format!("reading the tmpfs {}", one.place))?;
            out.flush()?;
        }
        Ok(())
    }

    /// Logs outside the container: all of it before the freeze, in the freeze what came since.
    fn send_streams(&mut self, rest: bool) -> Result<()> {
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        for (i, stream) in self.subject.plan.streams.iter_mut().enumerate() {
            if !stream.sent {
                continue;
            }
            let path = PathBuf::from(format!("/proc/{}/fd/{i}", self.subject.state.pid));
            let from = if rest { stream.size } else { 0 };
            stream.size =
                send_file(&self.speaker, &format!("stream-{i}"), &path, from, &mut buffer)?;
        }
        Ok(())
    }

    fn await_ready(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.sent")?;
        loop {
            if matches!(self.next(reporter)?, Input::Heard(Heard::Message(Message::Ready))) {
                break;
            }
        }
        reporter.mark("destination has restored");
        fault::point("source.commit")?;
        // Bad news that came meanwhile is the last that can stop it.
        while let Some(input) = self.inputs.pending()? {
            self.take_note(input, reporter);
        }
        Ok(())
    }

    /// The next thing that the hand-over itself must do something about.
    fn next(&mut self, reporter: &mut Reporter) -> Result<Input> {
        loop {
            let input = self.inputs.next()?;
            if let Some(input) = self.take_note(input, reporter) {
                return Ok(input);
            }
        }
    }

    /// What goes on with memory is noted, and passed on to whoever carries it.
    fn take_note(&mut self, input: Input, reporter: &mut Reporter) -> Option<Input> {
        let order = match input {
            Input::Memory(MemoryEvent::Round(round)) => {
                reporter.round(round);
                return None;
            }
            Input::Memory(MemoryEvent::Progress(raw, wire)) => {
                // As long as it goes on it may take its time; `--timeout` is the user's limit.
                self.inputs.again();
                self.obey_limit();
                reporter.progress(raw, wire, self.subject.plan.resident_bytes);
                return None;
            }
            Input::Files(HaulEvent::Round(round)) => {
                reporter.files_round(round);
                return None;
            }
            Input::Files(HaulEvent::Progress(bytes)) => {
                self.inputs.again();
                self.obey_limit();
                reporter.files_progress(bytes);
                return None;
            }
            Input::Heard(Heard::Message(Message::Applied { round })) => {
                self.tell_haul(haul::Order::Applied(round));
                return None;
            }
            Input::Memory(MemoryEvent::Done(left)) => {
                self.left = left;
                reporter.report.postcopy_pages = left;
                reporter.mark("last page before the commit is sent");
                return None;
            }
            Input::Memory(MemoryEvent::AllSent) => {
                reporter.mark("last page is sent");
                return None;
            }
            Input::Heard(Heard::Message(Message::Echo { number })) => Order::Echoed(0, number),
            Input::Lane(lane, Some(number)) => Order::Echoed(lane, number),
            Input::Lane(_, None) => return None,
            Input::Heard(Heard::Frame(Frame::Run(Run::Want, vpid, at, pages))) => {
                Order::Want(vpid, at, pages)
            }
            other => return Some(other),
        };
        // It may have sent everything already.
        let _ = self.tell_memory(order);
        None
    }

    fn obey_limit(&mut self) {
        if let Some(limit) = self.limit {
            self.inputs.no_later_than(limit);
        }
    }

    /// **The commit.** When the journal has taken it the destination owns the container.
    fn commit(mut self) -> Result<Committed, (Box<Begun>, anyhow::Error)> {
        match self.journal.write(State::Committed) {
            Ok(()) => {
                self.inputs.watch.decided();
                self.inputs.committed = true;
                // Nobody can give it up any more.
                self.limit = None;
                Ok(Committed(self))
            }
            Err(e) => Err((Box::new(self), e)),
        }
    }

    /// The way back: the container runs on here, as if nothing had happened.
    fn runs_on(mut self, error: anyhow::Error, reporter: &mut Reporter) -> Failed {
        let why = format!("{error:#}");
        // A commit that the disk did not take for certain is taken back before anything else: the
        // last line counts.
        if self.journal.state() == State::Committed {
            let _ = self.journal.write(State::Begun);
        }
        // The destination learns it while we clean up; if the link is what broke, from the guard.
        let broken = self.inputs.gone;
        // From here on only the link's own end says that the destination has undone everything.
        self.inputs.let_pulse_go();
        let speaker = self.speaker.clone();
        let told = std::thread::spawn(move || speaker.say(&Message::Abort { why }).is_ok());
        if let Some(job) = self.dump.take() {
            let _ = job.go.send(Go::Verdict(false));
            job.join();
        }
        let undone = recover::source_runs_on(&mut self.journal);
        if let Some(keeper) = self.keeper.take() {
            // It may be writing into a link that is stuck.
            let patience = Instant::now() + Duration::from_millis(200);
            while !told.is_finished() && Instant::now() < patience {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            if !told.is_finished() {
                self.closer.close();
            }
            let subject = &self.subject;
            keeper.give_back(|| match (&subject.network, &subject.plan.floating) {
                (Some((namespace, _, image)), _) => Ok(Replay::prepare(namespace, image)?),
                (None, Some(all)) => floating::replay_here(all, &subject.plan.migration),
                (None, None) => Err(anyhow!("there is no network")),
            });
        }
        if let Some(since) = self.frozen_since {
            reporter.mark("runs on here");
            reporter.report.frozen_ms = Some(since.elapsed().as_secs_f64() * 1000.0);
        }
        // The destination closes the link when it has undone everything. The link may be stuck, and
        // a writer in it.
        self.inputs.until(Duration::from_secs(2));
        while !self.inputs.gone && Instant::now() < self.inputs.deadline {
            // Whatever else comes is of no interest any more.
            let _ = self.inputs.next();
        }
        let knows =
            !broken && self.inputs.gone && told.is_finished() && told.join().unwrap_or(false);
        if knows {
            self.guard.dismiss();
        } else {
            self.guard.send_word();
        }
        self.closer.close();
        drop(self.memory.take());
        self.work.keep();
        let text = match undone {
            Ok(()) => error.context("the migration was given up; the container runs on here"),
            Err(e) => error.context(format!(
                "the migration was given up, and not everything could be undone: {e:#}"
            )),
        };
        Failed::from(text)
    }
}

/// After the commit: the destination owns the container. There is no way back from here.
struct Committed(Begun);

impl Committed {
    /// Tells the destination, learns that it runs, and clears away what is frozen here.
    fn finish(self, reporter: &mut Reporter) -> Result<(), Failed> {
        let mut begun = self.0;
        reporter.mark("committed");
        let _ = fault::point("source.committed");
        begun.inputs.until(FREEZE_LIMIT);
        let running = Committed::hand_on(&mut begun, reporter);
        if let Some(job) = begun.dump.take() {
            // CRIU leaves the tasks as they are: frozen.
            let _ = job.go.send(Go::Verdict(true));
            job.join();
        }
        let standing = match running {
            true => Standing::Running,
            false if begun.left > 0 => Committed::bring_rest(&mut begun, reporter),
            false => Committed::look_for(&begun, reporter),
        };
        if standing != Standing::Running {
            begun.guard.dismiss();
            begun.closer.close();
            begun.work.keep();
            let id = &begun.journal.record.container;
            return Err(Failed::in_doubt(anyhow!(
                "the container was handed over to {peer}, and {peer} does not answer that it runs: \
                 its copy {what}.\nWhat is here stays frozen and unreachable.\nhint: `ferry resolve \
                 {id}` when {peer} can be reached again; if it is gone for good, `ferry resolve {id} \
                 --keep` lets it run on here",
                peer = begun.journal.record.peer,
                what = standing.describe(),
            )));
        }
        if !running {
            // What the keeper still writes to this link, nobody reads.
            begun.closer.close();
        }
        let _ = fault::point("source.let-go");
        let (keeper, hooks) = (begun.keeper.take(), begun.hooks.take());
        let (mut packets, mut trouble) = (0, None);
        let done = recover::source_lets_go(&mut begun.journal, || {
            // Until packets are led elsewhere they come here, and are sent along.
            trouble = hooks.and_then(Hooks::switched);
            if let Some(keeper) = keeper {
                packets = keeper.stop();
            }
        });
        reporter.report.packets = packets;
        if let Some(e) = trouble {
            reporter.warning(&format!("{e}"));
        }
        let _ = fault::point("source.finish");
        // The destination would find out by itself.
        let _ = begun.speaker.say(&Message::Finished);
        begun.guard.dismiss();
        let lanes: u64 = begun.lanes.iter().map(Lane::bytes).sum();
        reporter.report.wire_bytes = begun.speaker.bytes() + lanes;
        drop(begun.speaker);
        begun.closer.wait(GOODBYE_LIMIT);
        begun.work.keep();
        reporter.mark("cleared away here");
        if let Err(e) = done {
            reporter
                .warning(&format!("it runs there, but not everything here is cleared away: {e:#}"));
        }
        Ok(())
    }

    /// Whether the destination has said that it runs.
    fn hand_on(begun: &mut Begun, reporter: &mut Reporter) -> bool {
        if let Some(Err(e)) = begun.silence.as_mut().map(Silence::begin) {
            reporter.warning(&format!("{e}"));
        }
        if begun.speaker.say(&Message::Commit).is_err() {
            return false;
        }
        if let Some(hooks) = &mut begun.hooks {
            hooks.switch();
        }
        // Whoever has nothing left does not care.
        let _ = begun.tell_memory(Order::Serve);
        loop {
            match begun.next(reporter) {
                Ok(Input::Heard(Heard::Message(Message::Running(arrival)))) => {
                    reporter.mark("runs there");
                    reporter.report.frozen_ms =
                        begun.frozen_since.map(|s| s.elapsed().as_secs_f64() * 1000.0);
                    reporter.report.arrival = arrival.marks;
                    // What is frozen here stays until the last page is in over there.
                    begun.inputs.until(WHOLE_LIMIT);
                }
                Ok(Input::Heard(Heard::Message(Message::Whole(served)))) => {
                    reporter.mark("all of it is there");
                    reporter.report.served = Some(served);
                    return true;
                }
                Ok(_) => {}
                // Too late for Ctrl-C: what is decided is carried through.
                Err(_) if std::mem::take(&mut begun.inputs.interrupted) => {
                    reporter.warning("the container has been handed over: finishing");
                }
                Err(e) => {
                    reporter.warning(&format!("{e:#}; looking for the destination"));
                    return false;
                }
            }
        }
    }

    /// The link broke while the destination runs and pages are here: brings them over new ones.
    fn bring_rest(begun: &mut Begun, reporter: &mut Reporter) -> Standing {
        begun.closer.close();
        let (record, wishes) = (begun.journal.record.clone(), begun.memory_wishes.clone());
        let queue = &begun.inputs.queue;
        let end = rest::bring(&record, wishes, &mut |why| {
            if let Some(why) = why {
                reporter.warning(&format!("{why}; trying again"));
            }
            // Too late to give up, but nobody has to stand by: `ferry resolve` goes on with it.
            !queue.try_iter().any(|input| matches!(input, Input::Signal(_)))
        });
        match end {
            Brought::Whole(served) => {
                reporter.mark("all of it is there");
                reporter.report.served = served;
                Standing::Running
            }
            Brought::Gone => Standing::Gone,
            Brought::Stopped => Standing::Partial,
        }
    }

    /// The link broke at the worst moment: asks over new ones.
    fn look_for(begun: &Begun, reporter: &mut Reporter) -> Standing {
        let until = Instant::now() + SETTLE_LIMIT;
        let mut pause = Duration::from_millis(100);
        loop {
            match settle::ask(&begun.journal.record, Some(Verdict::Commit)) {
                Ok(Standing::Waiting) => {}
                Ok(standing) => return standing,
                Err(e) if Instant::now() > until => {
                    reporter.warning(&format!("{e:#}"));
                    return Standing::Waiting;
                }
                Err(_) => {}
            }
            if Instant::now() > until {
                return Standing::Waiting;
            }
            // Between two tries to reach a host there is nothing to wait on but time.
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }
}
