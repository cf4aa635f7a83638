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

pub(crate) mod ask;
mod committed;
pub(crate) mod forecast;
mod frozen;
pub(crate) mod watch;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use self::ask::{Accepted, Input, Inputs, Options, ask};
use self::committed::Committed;
use super::checkpoint::dump::{DumpEvent, DumpJob, DumpPlan, Go, LiftedPlace};
use super::forwarding as forward;
use super::journal::workdir::WorkDir;
use super::journal::{self, Journal, Lock, Record, Role, State};
use super::network::floating;
use super::network::hooks::Hooks;
use super::network::keeper::Keeper;
use super::preflight::host;
use super::preflight::inspect::Subject;
use super::protocol::Message;
use super::protocol::talk::{Heard, Speaker};
use super::recovery::guards::SourceGuard;
use super::recovery::{recover, settle, word};
use super::transfer::carry::{self, Memory, MemoryEvent, Order};
use super::transfer::early::Early;
use super::transfer::haul::{self, Haul, HaulEvent};
use super::transfer::lanes::Lane;
use crate::connections::{self, Coming, Lifted, Lifting, Vault};
use crate::criu::interposer::Interposer;
use crate::files::logs::Logs;
use crate::files::place::Placing;
use crate::memory::rounds::Tracking;
use crate::network::hook::About;
use crate::network::host_side::Silence;
use crate::network::sockets::Lookout;
use crate::network::unread::Homes;
use crate::network::{Capture, Hook, HostSide, Placement, Replay, fence};
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::Runtime;
use crate::problem::Problems;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::netns::NetNs;
use crate::sys::{arch, fault, process};
use crate::tasks::locks::Held;
use crate::tasks::mend::Watch;
use crate::tasks::settings::Setting;
use crate::tasks::watched;
use crate::transport::connect::Closer;
use crate::transport::frame::{Frame, Run};

/// From the freeze to the commit: a hand-over that takes longer is given up.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// How long nothing may be heard while memory is compared.
const VERIFY_LIMIT: Duration = Duration::from_secs(120);
/// How long nothing may be heard of the destination while it makes everything ready and takes in
/// memory.
const PREPARE_LIMIT: Duration = Duration::from_secs(45);
/// The same while it takes in files: bringing them to the disk is silent work.
const FILES_LIMIT: Duration = Duration::from_secs(900);
/// How long the other side may take to end after the last word. It does so without us, too; and a bridge
/// whose port has gone with the container may have another address now, so that nothing comes from there.
const GOODBYE_LIMIT: Duration = Duration::from_secs(10);
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
    // Each task takes some.
    connections::raise_limit().map_err(Failed::refused)?;
    // Before anything is looked at: what is seen is to hold until the end.
    let lock = settle_earlier(runtime, state_dir, options).map_err(Failed::refused)?;
    let accepted = ask(runtime, options, reporter)?;
    let mut begun = Begun::new(accepted, lock, runtime, state_dir, options)?;
    match begun.hand_over(reporter) {
        Ok(()) => match begun.commit() {
            Ok(committed) => committed.finish(reporter),
            Err((begun, e)) => Err(begun.runs_on(e, reporter)),
        },
        Err(e) => Err(begun.runs_on(e, reporter)),
    }
}

/// Keeps others from migrating the container, when earlier migrations of it are settled.
fn settle_earlier(
    runtime: &Runtime,
    state_dir: &std::path::Path,
    options: &Options,
) -> Result<Lock> {
    // Without it there is nothing that could be locked.
    if let Some(problem) = host::not_root() {
        return Err(Problems(vec![problem]).into());
    }
    let (root, container) = (runtime.root(), &options.wishes.container);
    settle::sweep(state_dir, root, container)?;
    let way = format!("to {}", options.destination);
    let lock = Lock::take(state_dir, root, container, &way)?;
    word::tell_again(state_dir, root, container, &options.destination)?;
    Ok(lock)
}

/// What of the container's files is of no use here when it runs there. Layers may be others', too.
fn removable(subject: &Subject) -> Vec<PathBuf> {
    let load = subject.load.iter();
    let places = load.flat_map(|l| &l.roots[l.layers..]).map(|root| root.place().to_owned());
    let mut list: Vec<PathBuf> = places.collect();
    let real = |path: &std::path::Path| std::fs::canonicalize(path).ok();
    if let Some(upper) = subject.layered.overlay().and_then(|o| o.upper.as_ref())
        && real(&upper.path).is_some_and(|path| list.contains(&path))
    {
        list.extend(real(&upper.work));
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
    /// Watches over whoever works in the tasks.
    watch: Watch,
    dump: Option<DumpJob>,
    /// Where connections are between being taken out of the tasks and the end, whatever that is.
    vault: Arc<Vault>,
    /// Those that will be taken out, and where they are looked for.
    lifting: Option<(Box<Lifting>, Lookout)>,
    /// Announcements of theirs to which the destination has not answered yet.
    unanswered: usize,
    lifted: LiftedPlace,
    /// Keeps this host from answering for the container, from the commit on.
    silence: Option<Silence>,
    hooks: Option<Hooks>,
    memory: Option<Memory>,
    haul: Option<Haul>,
    early: Option<Early>,
    /// The file locks that the frozen tasks hold.
    locks: Vec<Held>,
    /// What they have set for themselves with the kernel.
    settings: Vec<Setting>,
    memory_wishes: carry::Wishes,
    /// Further links for memory.
    lanes: Vec<Lane>,
    /// Pages that stayed here for after the commit.
    left: u64,
    keeper: Option<Keeper>,
    frozen_since: Option<Instant>,
    /// No second migration of the same container meanwhile.
    _lock: Lock,
    /// A signal has come after the commit.
    stopping: bool,
}

impl Begun {
    fn new(
        accepted: Accepted,
        lock: Lock,
        runtime: &Runtime,
        state_dir: &std::path::Path,
        options: &Options,
    ) -> Result<Begun, Failed> {
        let Accepted { subject, speaker, closer, inputs } = accepted;
        let plan = &subject.plan;
        let work = WorkDir::create(&plan.migration).map_err(Failed::refused)?;
        let (version, boot) = journal::stamp();
        let record = Record {
            version,
            boot,
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
            logs: Logs::default(),
            forward: subject.forward.clone(),
            remove: if options.remove_files { removable(&subject) } else { Vec::new() },
            unmount: subject.load.as_ref().and_then(|l| Some(l.merged.as_ref()?.0.clone())),
            work: work.path().to_owned(),
            worker: process::this_process(),
            begun: journal::unix_time(),
        };
        let mut journal = Journal::create(state_dir, record).map_err(Failed::refused)?;
        let started = Vault::new()
            .and_then(|vault| Ok((SourceGuard::spawn(&journal, &vault)?, Arc::new(vault))));
        let (guard, vault) = match started {
            Ok(both) => both,
            Err(e) => {
                let _ = journal.write(State::Aborted);
                return Err(Failed::from(e));
            }
        };
        let watch = Watch::new(&subject.cgroup, &work.work());
        Ok(Begun {
            subject,
            speaker,
            closer,
            inputs,
            runtime: runtime.clone(),
            journal,
            work,
            guard,
            watch,
            dump: None,
            vault,
            lifting: None,
            unanswered: 0,
            lifted: LiftedPlace::default(),
            silence: None,
            hooks: None,
            memory: None,
            haul: None,
            early: None,
            locks: Vec::new(),
            settings: Vec::new(),
            memory_wishes: options.memory.clone(),
            lanes: Vec::new(),
            left: 0,
            keeper: None,
            frozen_since: None,
            _lock: lock,
            stopping: false,
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
        while !(prepared && at_freeze && settled && joined && self.unanswered == 0) {
            match self.next(reporter)? {
                Input::Joined(_) => {
                    reporter.mark("the way to forward stands");
                    joined = true;
                }
                Input::Heard(Heard::Message(Message::Prepared)) => {
                    reporter.mark("destination is ready");
                    prepared = true;
                    self.announce_connections()?;
                }
                Input::Heard(Heard::Message(Message::Awaited { lacking })) => {
                    self.await_answer(&lacking);
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
        // What is written through an overlay, the kernel does not tell of the file system below.
        let listen = self.memory_wishes.tracking != Tracking::Hash && load.merged.is_none();
        let cgroup = &self.subject.cgroup;
        let pace = &self.memory_wishes.pace;
        self.haul = Some(Haul::start(&load, listen, cgroup, (&self.speaker, pace), told)?);
        while !matches!(self.next(reporter)?, Input::Files(HaulEvent::Settled)) {}
        reporter.files_settled();
        fault::point("source.copied")?;
        self.inputs.until(PREPARE_LIMIT);
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
            journal::workdir::note_host_side(self.work.path(), &side)?;
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
            speaker: self.speaker.clone(),
            orders: self.guard.orders.clone(),
            watch: self.watch.clone(),
            lifted: self.lifted.clone(),
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

    /// Looks for the container's sockets, where it has a network.
    fn lookout(&self) -> Result<Option<Lookout>> {
        let subject = &self.subject;
        Ok(match (&subject.network, &subject.plan.floating) {
            (_, Some(all)) => Some(floating::lookout(all, &subject.cgroup)?),
            (Some((namespace, ..)), None) => Some(Lookout::new(namespace)?),
            (None, None) => None,
        })
    }

    /// Tells the destination of the connections that we shall carry, where there are many.
    fn announce_connections(&mut self) -> Result<()> {
        let subject = &self.subject;
        let namespace = subject.network.as_ref().map(|(namespace, ..)| namespace);
        // Where it has no address nobody is connected; elsewhere nothing can be done to frozen tasks.
        let may = namespace.is_some() || subject.plan.floating.is_some();
        if !may || !arch::SUPPORTED || !matches!(subject.cgroup, Cgroup::V2(_)) {
            return Ok(());
        }
        let lookout = self.lookout()?;
        let mut lookout = lookout.ok_or_else(|| anyhow!("there is no network"))?;
        let mut lifting = Lifting::new(namespace, self.vault.clone(), self.work.path())?;
        let coming = lifting.look(&mut lookout, &subject.cgroup.processes()?)?;
        if coming.len() < connections::MANY {
            return Ok(());
        }
        self.lifting = Some((Box::new(lifting), lookout));
        self.announce(&coming)
    }

    /// Announces those that have come since.
    fn look_for_connections(&mut self) -> Result<()> {
        let Some((lifting, lookout)) = &mut self.lifting else { return Ok(()) };
        let coming = lifting.look(lookout, &self.subject.cgroup.processes()?)?;
        self.announce(&coming)
    }

    fn announce(&mut self, coming: &[Coming]) -> Result<()> {
        for some in coming.chunks(connections::BATCH) {
            self.speaker.say(&Message::Connections { list: some.to_vec() })?;
            self.unanswered += 1;
        }
        Ok(())
    }

    /// The destination has made ready for those of an announcement, but for these.
    fn await_answer(&mut self, lacking: &[u32]) {
        self.unanswered = self.unanswered.saturating_sub(1);
        self.lifting.iter_mut().for_each(|(lifting, _)| lifting.leave(lacking));
    }

    fn take_lifted(&self) -> Option<Lifted> {
        self.lifted.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn go(&self, go: Go) -> Result<()> {
        let job = self.dump.as_ref().ok_or_else(|| anyhow!("no dump under way"))?;
        job.go.send(go).map_err(|_| anyhow!("the dump has ended"))
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
                reporter.progress(raw, wire, self.subject.plan.resident_bytes);
                return None;
            }
            Input::Files(HaulEvent::Round(round)) => {
                reporter.files_round(round);
                return None;
            }
            Input::Files(HaulEvent::Progress(bytes)) => {
                self.inputs.again();
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

    /// **The commit.** When the journal has taken it the destination owns the container.
    fn commit(mut self) -> Result<Committed, (Box<Begun>, anyhow::Error)> {
        match self.journal.write(State::Committed) {
            Ok(()) => {
                self.inputs.committed = true;
                // Nobody can give it up any more.
                self.inputs.user = None;
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
            let _ = self.journal.write(State::Returning);
        }
        // The destination learns it while we clean up; if the link breaks, from the guard.
        self.inputs.let_pulse_go();
        // What is undone has limits of its own.
        self.inputs.user = None;
        let speaker = self.speaker.clone();
        let told = std::thread::spawn(move || speaker.say(&Message::Abort { why }).is_ok());
        if let Some(job) = self.dump.take() {
            job.give_up();
        }
        // Nobody is at them any more when this returns.
        drop(self.take_lifted());
        let hands = recover::Hands::Own {
            orders: &self.guard.orders,
            watch: &self.watch,
            vault: &self.vault,
        };
        let undone = recover::source_runs_on(&mut self.journal, &hands);
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
            let cgroup = self.journal.record.cgroup.as_ref();
            keeper.give_back(cgroup, || match (&subject.network, &subject.plan.floating) {
                (Some((namespace, _, image)), _) => Ok(Replay::prepare(namespace, image)?),
                (None, Some(all)) => floating::replay_here(all, &subject.plan.migration),
                (None, None) => Err(anyhow!("there is no network")),
            });
        }
        if let Some(since) = self.frozen_since {
            reporter.mark("runs on here");
            reporter.report.frozen_ms = Some(since.elapsed().as_secs_f64() * 1000.0);
        }
        // The destination says when it has undone everything. The link may be stuck, and a writer in it;
        // that it ends says nothing: the word may not have got there.
        self.inputs.until(Duration::from_secs(2));
        while !(self.inputs.gone || self.inputs.undone_there)
            && Instant::now() < self.inputs.deadline
        {
            // Whatever else comes is of no interest any more.
            let _ = self.inputs.next();
        }
        // It stays as long as it has something that is to be put back.
        if self.inputs.undone_there && undone.is_ok() {
            // Else it is told once more.
            let _ = self.journal.note_told().inspect_err(|e| tracing::error!("{e:#}"));
            self.guard.dismiss();
        } else {
            self.guard.send_word();
        }
        self.closer.close();
        drop(self.memory.take());
        self.work.keep();
        let text = match undone {
            Ok(()) if self.journal.record.init_lives() => {
                error.context("the migration was given up; the container runs on here")
            }
            Ok(()) => error.context("the migration was given up; the container has ended here"),
            Err(e) => error.context(format!(
                "the migration was given up, and not everything could be undone: {e:#}"
            )),
        };
        Failed::from(text)
    }
}
