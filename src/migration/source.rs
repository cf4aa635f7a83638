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

use std::io::{BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::carry::{self, Memory, MemoryEvent, Order};
use super::dump::{DumpEvent, DumpJob, DumpPlan, Go};
use super::inspect::{Subject, Wishes, inspect};
use super::journal::{self, Journal, Lock, Record, Role, State};
use super::keeper::Keeper;
use super::protocol::{Message, Standing, Verdict};
use super::rest::Brought;
use super::talk::{self, Heard, Speaker};
use super::watch::Watch;
use super::workdir::WorkDir;
use super::{host, recover, rest, settle};
use crate::criu::interposer::Interposer;
use crate::files::{tmpfs, tree};
use crate::memory::pages;
use crate::network::problem::Problem;
use crate::network::{Capture, fence};
use crate::oci::runtime::Runtime;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::fault;
use crate::sys::netns::NetNs;
use crate::sys::process;
use crate::transport::connect::{Closer, Cutter, Destination};
use crate::transport::frame::{self, Frame, Run};

/// From the freeze to the commit: a hand-over that takes longer is given up.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// How long nothing may be heard of the destination while it makes everything ready and takes in
/// memory.
const PREPARE_LIMIT: Duration = Duration::from_secs(45);
/// Until the other Ferry has answered at all; ssh may ask for a key's passphrase.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// How long the other side may take to end after the last word.
const GOODBYE_LIMIT: Duration = Duration::from_secs(60);
/// From the resume until the last staged page is installed.
const WHOLE_LIMIT: Duration = Duration::from_secs(600);
/// How long a lost destination is looked for after the commit.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// After a signal: what is being written may still be written.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the user wants.
#[derive(Clone, Debug)]
pub struct Options {
    /// What of it the plan needs.
    pub wishes: Wishes,
    /// Where to.
    pub destination: Destination,
    /// How memory is to go.
    pub memory: carry::Wishes,
    /// `--timeout`: gives up when the hand-over is not committed by then.
    pub timeout: Option<Duration>,
    /// Leave the away-mark afterwards.
    pub leave_mark: bool,
}

/// Something that happened.
#[derive(Debug)]
enum Input {
    Heard(Heard),
    Dump(DumpEvent),
    Memory(MemoryEvent),
    Signal(i32),
}

/// The link, and everything that happens, in one queue.
struct Inputs {
    queue: Receiver<Input>,
    tell: Sender<Input>,
    /// For what goes on now, and when that is over.
    limit: Duration,
    deadline: Instant,
    interrupted: bool,
    /// The link has ended.
    gone: bool,
    /// Something has come over the link.
    heard: bool,
    watch: Watch,
}

impl Inputs {
    /// The next thing that happens and that is no reason to give up.
    fn next(&mut self) -> Result<Input> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let input = self.queue.recv_timeout(left).map_err(|e| match e {
            RecvTimeoutError::Timeout => anyhow!("the time for it is over"),
            RecvTimeoutError::Disconnected => anyhow!("nobody is left to do it"),
        })?;
        self.judge(input)
    }

    /// What has happened already, without waiting.
    fn pending(&mut self) -> Result<Option<Input>> {
        self.queue.try_recv().ok().map(|input| self.judge(input)).transpose()
    }

    fn judge(&mut self, input: Input) -> Result<Input> {
        self.heard |= matches!(&input, Input::Heard(heard) if !matches!(heard, Heard::Gone(None)));
        match input {
            Input::Signal(signal) => {
                self.interrupted = true;
                bail!("interrupted by {}", talk::signal_name(signal))
            }
            Input::Heard(Heard::Gone(why)) => {
                self.gone = true;
                bail!(
                    "the link to the destination broke: {}",
                    why.unwrap_or("it was closed".into())
                )
            }
            Input::Heard(Heard::Message(Message::Failed { phase, why })) => {
                bail!("the destination failed while {phase}: {why}")
            }
            Input::Dump(DumpEvent::Ended(Err(e))) => Err(e),
            Input::Memory(MemoryEvent::Failed(e)) => bail!("sending memory: {e}"),
            input => Ok(input),
        }
    }

    fn until(&mut self, limit: Duration) {
        self.limit = limit;
        self.by(Instant::now() + limit);
    }

    /// The time counts anew.
    fn again(&mut self) {
        self.until(self.limit);
    }

    fn by(&mut self, deadline: Instant) {
        self.deadline = deadline;
        self.watch.until(deadline);
    }
}

/// Says what stands in the way, all of it.
pub fn refusal(problems: &[Problem]) -> Failed {
    let text: Vec<String> = problems.iter().filter(|p| p.fatal).map(ToString::to_string).collect();
    Failed::refused(anyhow!("{}", text.join("\n")))
}

/// A container that the destination would take.
struct Accepted {
    subject: Subject,
    speaker: Speaker,
    closer: Closer,
    inputs: Inputs,
}

/// Looks at the container and asks the destination; nothing is touched.
fn ask(runtime: &Runtime, options: &Options, reporter: &mut Reporter) -> Result<Accepted, Failed> {
    reporter.phase("inspect", "looking at the container");
    let mut subject = inspect(runtime, &options.wishes).map_err(|p| refusal(&p))?;
    reporter.report.migration.clone_from(&subject.plan.migration);
    reporter.phase("connect", &format!("asking {}", options.destination));
    let link = options.destination.connect().map_err(Failed::refused)?;
    let (speaker, reader, mut closer) = talk::split(link);
    let (tell, queue) = channel();
    // A shell that has ended already needs no cutting.
    let watch =
        Watch::start(closer.cutter().unwrap_or(Cutter::Nothing)).map_err(Failed::refused)?;
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut inputs = Inputs {
        queue,
        tell,
        limit: ANSWER_LIMIT,
        deadline,
        interrupted: false,
        gone: false,
        heard: false,
        watch: watch.clone(),
    };
    watch.until(deadline);
    let heard = inputs.tell.clone();
    talk::listen(reader, move |h| heard.send(Input::Heard(h)).is_ok()).map_err(Failed::refused)?;
    let caught = inputs.tell.clone();
    let hurried = watch.clone();
    talk::catch_signals(move |signal| {
        hurried.hurry(PATIENCE);
        caught.send(Input::Signal(signal)).is_ok()
    })
    .map_err(Failed::refused)?;
    let greeted = greet(&speaker, &mut inputs);
    if let Err(e) = greeted {
        drop(speaker);
        // A shell that could not get there says more than the end of its stream.
        let text = if inputs.interrupted || inputs.heard {
            e
        } else {
            e.context(options.destination.explain(&mut closer))
        };
        closer.close();
        return Err(Failed::refused(text));
    }
    let answer = (|| {
        speaker.say(&Message::Plan(Box::new(subject.plan.clone())))?;
        loop {
            match inputs.next()? {
                Input::Heard(Heard::Message(Message::Accept { warnings, shared })) => {
                    return Ok(Ok((warnings, shared)));
                }
                Input::Heard(Heard::Message(Message::Refuse { problems })) => {
                    return Ok(Err(problems));
                }
                _ => {}
            }
        }
    })();
    subject.probes.clear();
    match answer {
        Ok(Ok((warnings, shared))) => {
            // What both hosts see need not be sent, nor what two streams share a second time.
            let mut seen = Vec::new();
            for (i, stream) in subject.plan.streams.iter_mut().enumerate() {
                let twice = seen.contains(&stream.external);
                seen.push(stream.external.clone());
                stream.sent = stream.external.is_some() && !twice && !shared.contains(&i);
            }
            for warning in warnings {
                reporter.problem(warning);
            }
            Ok(Accepted { subject, speaker, closer, inputs })
        }
        Ok(Err(problems)) => {
            closer.close();
            Err(refusal(&problems))
        }
        Err(e) => {
            closer.close();
            Err(Failed::refused(e))
        }
    }
}

fn greet(speaker: &Speaker, inputs: &mut Inputs) -> Result<()> {
    speaker.say(&talk::hello())?;
    loop {
        if let Input::Heard(Heard::Message(Message::Hello(theirs))) = inputs.next()? {
            talk::check_hello(&theirs)?;
            if theirs.host == host::identity() {
                bail!("source and destination are the same host");
            }
            return Ok(());
        }
    }
}

/// `ferry check CONTAINER DESTINATION`, and `migrate --dry-run`.
///
/// # Errors
/// Everything that stands in the way.
pub fn check(runtime: &Runtime, options: &Options, reporter: &mut Reporter) -> Result<(), Failed> {
    let mut accepted = ask(runtime, options, reporter)?;
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

/// The migration has begun: there is a journal, and perhaps more to undo.
struct Begun {
    subject: Subject,
    speaker: Speaker,
    closer: Closer,
    inputs: Inputs,
    runtime: Runtime,
    journal: Journal,
    work: WorkDir,
    guard: Guard,
    dump: Option<DumpJob>,
    memory: Option<Memory>,
    memory_wishes: carry::Wishes,
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
            network_path: plan.network_path.clone(),
            network_identity: subject.network.as_ref().and_then(|n| n.0.identity().ok()),
            network_ours: true,
            leave_mark: options.leave_mark,
            work: work.path().to_owned(),
            worker: journal::this_process(),
            begun: journal::unix_time(),
        };
        let mut journal = Journal::create(state_dir, record).map_err(Failed::refused)?;
        let guard = match Guard::spawn(&journal) {
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
            memory: None,
            memory_wishes: options.memory,
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
        self.start_dump()?;
        let tell = self.inputs.tell.clone();
        let wishes = self.memory_wishes;
        let memory = Memory::start(&self.subject.cgroup, &self.speaker, wishes, move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(Input::Memory(event));
        })?;
        self.memory = Some(memory);
        self.send_streams(false)?;
        let (mut prepared, mut at_freeze, mut settled) = (false, false, false);
        while !(prepared && at_freeze && settled) {
            match self.next(reporter)? {
                Input::Heard(Heard::Message(Message::Prepared)) => {
                    reporter.mark("destination is ready");
                    prepared = true;
                }
                Input::Dump(DumpEvent::AtFreeze) => at_freeze = true,
                Input::Memory(MemoryEvent::Settled(next)) => {
                    reporter.settled(next);
                    settled = true;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn start_dump(&mut self) -> Result<()> {
        let (criu, _) = host::criu()?;
        let network = match &self.subject.network {
            None => None,
            Some((namespace, _, image)) => {
                Some(Box::new((fence::arm(namespace)?, Capture::prepare(namespace, image)?)))
            }
        };
        let plan = DumpPlan {
            runtime: self.runtime.clone(),
            container: self.subject.plan.container.clone(),
            cgroup: self.subject.cgroup.clone(),
            images: self.work.images(),
            work: self.work.work(),
            tmpfs: self.subject.plan.tmpfs.iter().map(|t| t.place.clone()).collect(),
            external: self.subject.plan.streams.iter().filter_map(|s| s.external.clone()).collect(),
            network,
            interposer: Interposer::new(self.work.path(), &criu, self.criu_namespace()?)?,
            namespace: self.criu_namespace()?,
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
        self.speaker.say(&Message::Freezing)?;
        self.go(Go::Freeze)?;
        loop {
            if let Input::Dump(DumpEvent::Frozen { since, network }) = self.next(reporter)? {
                self.frozen_since = Some(since);
                reporter.mark_at("freeze", since);
                reporter.mark("frozen, fence closed");
                if let Some(network) = network {
                    let (_, capture) = *network;
                    self.keeper = Some(Keeper::start(capture, self.speaker.clone())?);
                }
                break;
            }
        }
        self.tell_memory(Order::Frozen)
    }

    fn tell_memory(&self, order: Order) -> Result<()> {
        let memory = self.memory.as_ref().ok_or_else(|| anyhow!("memory is not being sent"))?;
        memory.orders.send(order).map_err(|_| anyhow!("memory is not being sent any more"))
    }

    fn dump(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.dump")?;
        loop {
            if matches!(self.next(reporter)?, Input::Dump(DumpEvent::Dumped)) {
                break;
            }
        }
        reporter.mark("dumped");
        Ok(())
    }

    fn transfer(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.transfer")?;
        self.tell_memory(Order::Dumped)?;
        self.send_streams(true)?;
        self.send_tmpfs()?;
        let tasks = pages::tasks(&self.subject.cgroup.processes()?)?;
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        for entry in std::fs::read_dir(self.work.images())? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| anyhow!("an image file with a strange name"))?;
            send_file(&self.speaker, name, &entry.path(), 0, &mut buffer)?;
        }
        recover::keep_sockets(&self.journal.record, &self.subject.cgroup.processes()?)?;
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
            let file = SpeakerFile { speaker: &self.speaker, name: format!("tmpfs-{i}"), at: 0 };
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
            Input::Heard(Heard::Message(Message::Echo { number })) => Order::Echoed(number),
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
            self.inputs.by(self.inputs.deadline.min(limit));
        }
    }

    /// **The commit.** When the journal has taken it the destination owns the container.
    fn commit(mut self) -> Result<Committed, (Box<Begun>, anyhow::Error)> {
        match self.journal.write(State::Committed) {
            Ok(()) => {
                self.inputs.watch.decided();
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
            keeper.give_back(self.subject.network.as_ref());
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
        let keeper = begun.keeper.take();
        let mut packets = 0;
        let done = recover::source_lets_go(&mut begun.journal, || {
            if let Some(keeper) = keeper {
                packets = keeper.stop();
            }
        });
        reporter.report.packets = packets;
        let _ = fault::point("source.finish");
        // The destination would find out by itself.
        let _ = begun.speaker.say(&Message::Finished);
        begun.guard.dismiss();
        reporter.report.wire_bytes = begun.speaker.bytes();
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
        if begun.speaker.say(&Message::Commit).is_err() {
            return false;
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
        let (record, wishes) = (begun.journal.record.clone(), begun.memory_wishes);
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

/// A file on the other side, written from its beginning.
struct SpeakerFile<'a> {
    speaker: &'a Speaker,
    name: String,
    at: u64,
}

impl Write for SpeakerFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let most = &bytes[..bytes.len().min(frame::MAX_FILE_PIECE)];
        self.speaker.file(&self.name, self.at, most).map_err(std::io::Error::other)?;
        self.at += most.len() as u64;
        Ok(most.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends a file from an offset to its end; returns the end.
fn send_file(
    speaker: &Speaker,
    name: &str,
    path: &std::path::Path,
    from: u64,
    buffer: &mut [u8],
) -> Result<u64> {
    use std::io::Seek;
    let what = || format!("cannot read {}", path.display());
    let mut file = std::fs::File::open(path).with_context(what)?;
    let mut at = file.seek(std::io::SeekFrom::Start(from)).with_context(what)?;
    loop {
        let n = file.read(buffer).with_context(what)?;
        // An empty file is sent too: CRIU looks for it.
        if n > 0 || at == 0 {
            speaker.file(name, at, &buffer[..n])?;
        }
        at += n as u64;
        if n == 0 {
            return Ok(at);
        }
    }
}

/// The process that brings the container back if this one is killed.
struct Guard {
    child: Child,
}

impl Guard {
    fn spawn(journal: &Journal) -> Result<Guard> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("__guard").arg(journal.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        process::in_new_session(&mut command);
        Ok(Guard { child: command.spawn().context("cannot start the guard process")? })
    }

    /// The container runs on, and the destination may not know it: the guard goes on telling it.
    fn send_word(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            let _ = pipe.write_all(b"t");
        }
    }

    /// There is nothing to guard any more.
    fn dismiss(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            let _ = pipe.write_all(b"d");
        }
        let _ = self.child.wait();
    }
}
