//! The source's role: [`migrate`] from the first look at the container to its end here.
//!
//! ```text
//!            inspect        connect, plan       make ready, copy     freeze, dump, restore
//!  ──▶ SourceContainer ───▶ Accepted ─────────▶ SourceMigration ───────────────────── commit ───▶ Committed
//!              │ refused       │ refused           │ any error           │ any error            │
//!              ▼               ▼                   ▼                     ▼                      ▼
//!            exit 3          exit 3             runs on here (1)      runs on here (1)     done (0), or
//!                                                                                          in doubt (4)
//! ```
//!
//! [`SourceMigration`] can only end in two ways: `runs_on`, which undoes everything, or `commit`, which
//! consumes it. [`Committed`] has no way back: nothing in it can thaw the container or lift the
//! fence, and its functions return no error that anybody could take for a reason to.

mod committed;
pub(crate) mod forecast;
mod frozen;
mod inputs;
pub(crate) mod negotiate;
mod prepare;
mod rollback;
pub(crate) mod watchdog;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use self::committed::Committed;
use self::inputs::{SourceInput, SourceInputs};
use self::negotiate::{Accepted, SourceOptions, negotiate};
use super::checkpoint::dump::{DumpEvent, DumpJob, DumpOrder, ExtractedPlace};
use super::journal::workdir::WorkDir;
use super::journal::{self, Journal, Lock, Record, Role, State};
use super::network::held_packets::PacketBuffer;
use super::network::hooks::Hooks;
use super::preflight::host;
use super::preflight::source_checks::SourceContainer;
use super::protocol::Message;
use super::protocol::session::{FromPeer, PeerWriter};
use super::recovery::guards::SourceGuard;
use super::recovery::{verdicts, word};
use super::transfer::channels::Channel;
use super::transfer::early_images::EarlyImages;
use super::transfer::file_sender::{self, FileEvent, FileTransfer};
use super::transfer::image_sender::ImageEvent;
use super::transfer::memory_sender::{self, MemoryEvent, MemoryOrder, MemoryTransfer};
use crate::connections::{self, Extracted, Extraction, Vault};
use crate::engine::papers::Made;
use crate::files::logs::Logs;
use crate::files::place::Placing;
use crate::files::sockets::Renamed;
use crate::memory::shared::SharedMemory;
use crate::network::host_side::ProxyArpBlock;
use crate::network::sockets::SockDiag;
use crate::oci::runtime::Runtime;
use crate::problem::Problems;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::perf::DummyEvent;
use crate::sys::process::ProcessId;
use crate::tasks::criu_rescue::TracerWatch;
use crate::tasks::locks::HeldLock;
use crate::tasks::settings::Setting;
use crate::tasks::sockets::SocketSettings;
use crate::transport::connect::Closer;
use crate::transport::frame::{Frame, RunKind};

/// From the freeze to the commit: a hand-over that takes longer is given up.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// Time that nothing may be heard while memory is compared.
const VERIFY_LIMIT: Duration = Duration::from_secs(120);
/// Time that nothing may be heard of the destination while it makes everything ready and takes in
/// memory.
const PREPARE_LIMIT: Duration = Duration::from_secs(45);
/// The same while it takes in files: bringing them to the disk is silent work.
const FILES_LIMIT: Duration = Duration::from_secs(900);
/// Time that the other side may take to end after the last word. It does so without us, too; and a bridge
/// whose port has gone with the container may have another address now, so that nothing comes from there.
const GOODBYE_LIMIT: Duration = Duration::from_secs(10);
/// Time that the destination may take to undo what it has when it has been told that the container stays.
const UNDONE_LIMIT: Duration = Duration::from_secs(2);
/// The same while an image goes: the engines here and there keep silent while they put it together.
const IMAGE_LIMIT: Duration = Duration::from_secs(1800);
/// From the resume until the last staged page is installed.
const WHOLE_LIMIT: Duration = Duration::from_secs(600);
/// Time that a lost destination is looked for after the commit.
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
    options: &SourceOptions,
    forecast: bool,
    reporter: &mut Reporter,
) -> Result<(), Failed> {
    let mut accepted = negotiate(runtime, options, reporter)?;
    if forecast {
        match forecast::forecast(&mut accepted, options.memory.pace.rate()) {
            Ok(forecast) => reporter.report.forecast = Some(forecast),
            Err(e) => {
                accepted.closer.close();
                return Err(Failed::refused(e));
            }
        }
    }
    drop(accepted.peer);
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
    options: &SourceOptions,
    reporter: &mut Reporter,
) -> Result<(), Failed> {
    reporter.report.container = options.wishes.container.to_string();
    reporter.report.destination = options.destination.to_string();
    // Each task takes some.
    connections::raise_limit().map_err(Failed::refused)?;
    // Before anything is looked at: what is seen is to hold until the end.
    let lock = settle_earlier(runtime, state_dir, options).map_err(Failed::refused)?;
    let accepted = negotiate(runtime, options, reporter)?;
    let mut source = SourceMigration::new(accepted, lock, runtime, state_dir, options)?;
    match source.hand_over(reporter) {
        Ok(()) => match source.commit() {
            Ok(committed) => committed.finish(reporter),
            Err((source, e)) => Err(source.runs_on(e, reporter)),
        },
        Err(e) => Err(source.runs_on(e, reporter)),
    }
}

/// Keeps others from migrating the container, when earlier migrations of it are settled.
fn settle_earlier(
    runtime: &Runtime,
    state_dir: &std::path::Path,
    options: &SourceOptions,
) -> Result<Lock> {
    // Without it there is nothing that could be locked.
    if let Some(problem) = host::not_root() {
        return Err(Problems(vec![problem]).into());
    }
    let (root, container) = (runtime.root(), &options.wishes.container);
    verdicts::sweep(state_dir, root, container)?;
    let way = format!("to {}", options.destination);
    let lock = Lock::take(state_dir, root, container, &way)?;
    word::tell_again(state_dir, root, container, &options.destination)?;
    Ok(lock)
}

/// Returns what of the container's files is of no use here when it runs there. Layers may be others', too.
fn removable(subject: &SourceContainer) -> Vec<PathBuf> {
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
struct SourceMigration {
    subject: SourceContainer,
    peer: PeerWriter,
    closer: Closer,
    inputs: SourceInputs,
    runtime: Runtime,
    journal: Journal,
    work: WorkDir,
    guard: SourceGuard,
    /// Watches over whoever works in the tasks.
    watch: TracerWatch,
    /// Shared memory that goes before the freeze, where CRIU need not see it.
    shared: Option<SharedMemory>,
    dump: Option<DumpJob>,
    /// Where connections are between being taken out of the tasks and the end, whatever that is.
    vault: Arc<Vault>,
    /// Those that will be taken out, and where they are looked for.
    extraction: Option<(Box<Extraction>, SockDiag)>,
    /// Announcements of theirs to which the destination has not answered yet.
    unanswered: usize,
    extracted: ExtractedPlace,
    /// Keeps this host from answering for the container, from the commit on.
    silence: Option<ProxyArpBlock>,
    hooks: Option<Hooks>,
    memory: Option<MemoryTransfer>,
    file_transfer: Option<FileTransfer>,
    early: Option<EarlyImages>,
    /// The file locks that the frozen tasks hold.
    locks: Vec<HeldLock>,
    /// What sockets have that CRIU does not carry.
    sockets: Vec<SocketSettings>,
    /// Sockets whose files were renamed.
    renamed: Vec<Renamed>,
    /// What they have set for themselves with the kernel.
    settings: Vec<Setting>,
    memory_options: memory_sender::MemoryOptions,
    /// Further links for memory.
    channels: Vec<Channel>,
    /// It is still looked at whether the images are right.
    unchecked: bool,
    /// Pages that stayed here for after the commit.
    left: u64,
    packet_buffer: Option<PacketBuffer>,
    frozen_since: Option<Instant>,
    /// Has CRIU's breakpoints cost nothing in the freeze.
    _event: Option<DummyEvent>,
    /// No second migration of the same container meanwhile.
    _lock: Lock,
    /// Bytes of the engine's log that have gone, and which file that is.
    log_sent: (u64, Option<u64>),
    /// The destination's engine has been told to make the container.
    engaged: bool,
    /// A signal has come after the commit.
    stopping: bool,
}

impl SourceMigration {
    fn new(
        accepted: Accepted,
        lock: Lock,
        runtime: &Runtime,
        state_dir: &std::path::Path,
        options: &SourceOptions,
    ) -> Result<SourceMigration, Failed> {
        let Accepted { subject, peer, closer, inputs } = accepted;
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
            init: ProcessId::of(subject.state.pid),
            network_path: subject.network.as_ref().map(|n| n.1.clone()),
            network_identity: subject.network.as_ref().and_then(|n| n.0.identity().ok()),
            engine: plan.engine.as_ref().map(|wanted| Made::nothing(wanted, &plan.container)),
            network_ours: true,
            leave_mark: options.leave_mark,
            placing: Placing::default(),
            logs: Logs::default(),
            forward: subject.forward.clone(),
            remove: if options.remove_files { removable(&subject) } else { Vec::new() },
            unmount: subject.load.as_ref().and_then(|l| Some(l.merged.as_ref()?.0.clone())),
            work: work.clone(),
            worker: ProcessId::this(),
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

        let watch = TracerWatch::new(&subject.cgroup, &work.criu());
        Ok(SourceMigration {
            subject,
            peer,
            closer,
            inputs,
            runtime: runtime.clone(),
            journal,
            work,
            guard,
            watch,
            shared: None,
            dump: None,
            vault,
            extraction: None,
            unanswered: 0,
            extracted: ExtractedPlace::default(),
            silence: None,
            hooks: None,
            memory: None,
            file_transfer: None,
            early: None,
            locks: Vec::new(),
            sockets: Vec::new(),
            renamed: Vec::new(),
            settings: Vec::new(),
            memory_options: options.memory.clone(),
            channels: Vec::new(),
            unchecked: false,
            left: 0,
            packet_buffer: None,
            frozen_since: None,
            _event: DummyEvent::if_possible(),
            _lock: lock,
            log_sent: (0, None),
            engaged: false,
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

    fn take_lifted(&self) -> Option<Extracted> {
        self.extracted.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn go(&self, go: DumpOrder) -> Result<()> {
        let job = self.dump.as_ref().ok_or_else(|| anyhow!("no dump under way"))?;
        job.go.send(go).map_err(|_| anyhow!("the dump has ended"))
    }

    /// The next thing that the hand-over itself must do something about.
    fn next(&mut self, reporter: &mut Reporter) -> Result<SourceInput> {
        loop {
            let input = self.inputs.next()?;
            if let Some(input) = self.take_note(input, reporter) {
                return Ok(input);
            }
        }
    }

    /// What goes on with memory is noted, and passed on to whoever carries it.
    fn take_note(&mut self, input: SourceInput, reporter: &mut Reporter) -> Option<SourceInput> {
        let order = match input {
            SourceInput::Memory(MemoryEvent::Round(round)) => {
                reporter.round(round);
                if let Err(e) = self.engage() {
                    // The link says so itself.
                    tracing::debug!("{e:#}");
                }
                return None;
            }
            SourceInput::Memory(MemoryEvent::Progress(raw, wire)) => {
                // As long as it goes on it may take its time; `--timeout` is the user's limit.
                self.inputs.again();
                reporter.progress(raw, wire, self.subject.plan.resident_bytes);
                return None;
            }
            SourceInput::Dump(DumpEvent::Checked(_)) => {
                self.unchecked = false;
                return Some(input);
            }
            SourceInput::Files(FileEvent::Round(round)) => {
                reporter.files_round(round);
                return None;
            }
            SourceInput::Files(FileEvent::Progress(bytes)) => {
                self.inputs.again();
                reporter.files_progress(bytes);
                return None;
            }
            SourceInput::Image(ImageEvent::Progress(bytes)) => {
                self.inputs.again();
                reporter.image_progress(bytes);
                return None;
            }
            SourceInput::FromPeer(FromPeer::Message(Message::Applied { round })) => {
                self.tell_files(file_sender::FileOrder::Applied(round));
                return None;
            }
            SourceInput::Memory(MemoryEvent::Done(left)) => {
                self.left = left;
                reporter.report.postcopy_pages = left;
                reporter.mark("last page before the commit is sent");
                return None;
            }
            SourceInput::Memory(MemoryEvent::AllSent) => {
                reporter.mark("last page is sent");
                return None;
            }
            SourceInput::FromPeer(FromPeer::Message(Message::Echo { number })) => {
                MemoryOrder::Echoed(0, number)
            }
            SourceInput::Channel(channel, Some(number)) => MemoryOrder::Echoed(channel, number),
            SourceInput::Channel(_, None) => return None,
            SourceInput::FromPeer(FromPeer::Frame(Frame::Run(RunKind::Want, run))) => {
                MemoryOrder::Want(run)
            }
            other => return Some(other),
        };

        // It may have sent everything already.
        let _ = self.tell_memory(order);
        None
    }

    /// **The commit.** When the journal has taken it the destination owns the container.
    fn commit(mut self) -> Result<Committed, (Box<SourceMigration>, anyhow::Error)> {
        match self.journal.write(State::Committed) {
            Ok(()) => {
                // It must get there, whatever was to be over by now.
                self.inputs.watch.decided();
                self.inputs.committed = true;
                // Nobody can give it up any more.
                self.inputs.user = None;
                Ok(Committed(self))
            }
            Err(e) => Err((Box::new(self), e)),
        }
    }
}
