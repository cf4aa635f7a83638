//! The source's first conversation: a look at the container, the greeting, the plan, the answer. And
//! the queue in which everything that happens from then on stands in line.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::watchdog::Watchdog;
use crate::engine::handover;
use crate::engine::image::{self, ImageCourse};
use crate::files::layers::LayerStore;
use crate::files::overlay::Overlay;
use crate::files::root::Root;
use crate::files::walk;
use crate::migration::checkpoint::dump::DumpEvent;
use crate::migration::forwarding as forward;
use crate::migration::options::MigrateOptions;
use crate::migration::preflight::contested;
use crate::migration::preflight::source_checks::{Roots, SourceContainer, inspect, replaced};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter, Session};
use crate::migration::protocol::{Message, Place};
use crate::migration::recovery::decide::has_heard;
use crate::migration::transfer::file_sender::{FileEvent, FilesToCopy};
use crate::migration::transfer::image_sender::ImageEvent;
use crate::migration::transfer::memory_sender::{self, MemoryEvent};
use crate::oci::runtime::Runtime;
use crate::problem::{Advice, Problem, Problems, advice};
use crate::report::exit::Failed;
use crate::report::progress::{CopiedImage, Layers, Reporter};
use crate::sys::{fault, host};
use crate::tasks::locks::{self, FoundLock};
use crate::transport::connect::{Closer, Cutter, Destination};

/// Until the other Ferry has answered at all; ssh may ask for a key's passphrase.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Until the destination has looked for layers: it may have to read them.
const LAYERS_LIMIT: Duration = Duration::from_secs(900);
/// How often a link is asked for a sign of life while clients wait.
const PULSE: Duration = Duration::from_millis(500);
/// A link without any for so long is dead: a cable is out, a host has stopped. ssh does not say so.
const DEAD: Duration = Duration::from_secs(6);
/// Bytes that may stand between us and the other host: pipes, ssh, TCP.
const BUFFERS: f64 = (8 << 20) as f64;
/// After a signal: what is being written may still be written.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the user wants.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// What of it the plan needs.
    pub wishes: MigrateOptions,
    /// Where to.
    pub destination: Destination,
    /// How memory is to go.
    pub memory: memory_sender::MemoryOptions,
    /// `--timeout`: gives up when the hand-over is not committed by then.
    pub timeout: Option<Duration>,
    /// Leave the away-mark afterwards.
    pub leave_mark: bool,
    /// Remove what was copied, once it runs there.
    pub remove_files: bool,
}

/// Something that happened.
#[derive(Debug)]
pub(super) enum SourceInput {
    FromPeer(FromPeer),
    Dump(DumpEvent),
    Memory(MemoryEvent),
    Files(FileEvent),
    Image(ImageEvent),
    /// An echo on a further link, by its number, or its end.
    Channel(usize, Option<u64>),
    Signal(i32),
    /// Home has a link to the destination, or why it has none.
    Joined(Result<()>),
}

/// Who a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The other host.
    Destination,
    /// CRIU, here, with the container frozen.
    Dump,
}

impl Awaited {
    /// Says who has not kept a limit.
    fn not_within(self, limit: Duration) -> anyhow::Error {
        let seconds = limit.as_secs();
        match self {
            Awaited::Destination => {
                anyhow!("nothing was heard of the destination for {seconds} s")
            }
            Awaited::Dump => advice(
                format!("CRIU has not dumped the container within {seconds} s"),
                "large address space that is reserved and not used makes a dump long, as do \
                 thousands of processes; `--timeout` ends it sooner",
            ),
        }
    }
}

/// The link, and everything that happens, in one queue.
pub(super) struct SourceInputs {
    pub(super) queue: Receiver<SourceInput>,
    pub(super) tell: Sender<SourceInput>,
    /// The user's own limit, which no other outlasts.
    pub(super) user: Option<Instant>,
    /// The deadline is the user's.
    by_user: bool,
    /// Who has to do something before the deadline.
    pub(super) awaited: Awaited,
    /// For what goes on now, and when that is over.
    limit: Duration,
    pub(super) deadline: Instant,
    pub(super) interrupted: bool,
    /// The link has ended.
    pub(super) gone: bool,
    /// The destination has said that nothing of it will run there.
    pub(super) undone_there: bool,
    /// The destination owns the container: what the further links were for is over.
    pub(super) committed: bool,
    /// While clients wait: the link is asked for signs of life.
    pulse: Option<PeerWriter>,
    /// Since when it has not answered.
    asked: Option<Instant>,
    /// How long that may be.
    patience: Duration,
    /// Something has come over the link.
    heard: bool,
    pub(super) watch: Watchdog,
}

impl SourceInputs {
    /// The next thing that happens and that is no reason to give up.
    pub(super) fn next(&mut self) -> Result<SourceInput> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let input = match &self.pulse {
            None => self.queue.recv_timeout(left),
            Some(peer) => loop {
                match self.queue.recv_timeout(left.min(PULSE)) {
                    Err(RecvTimeoutError::Timeout) if Instant::now() < self.deadline => {
                        // Counted from the first question: nobody listened while images went out.
                        let asked = *self.asked.get_or_insert_with(Instant::now);
                        if asked.elapsed() > self.patience {
                            // Nothing will come over it any more.
                            self.gone = true;
                            bail!(
                                "the link to the destination is dead: not a sign of life for {} s",
                                self.patience.as_secs()
                            );
                        }

                        // Its answer counts, nothing else of it.
                        peer.send(&Message::Echo { number: 0 })?;
                    }
                    other => break other,
                }
            },
        };

        let input = input.map_err(|e| match e {
            RecvTimeoutError::Timeout if self.by_user => anyhow!("the time of --timeout is over"),
            RecvTimeoutError::Timeout => self.awaited.not_within(self.limit),
            RecvTimeoutError::Disconnected => anyhow!("nobody is left to do it"),
        })?;

        self.judge(input)
    }

    /// Returns what has happened already, without waiting.
    pub(super) fn pending(&mut self) -> Result<Option<SourceInput>> {
        self.queue.try_recv().ok().map(|input| self.judge(input)).transpose()
    }

    fn judge(&mut self, input: SourceInput) -> Result<SourceInput> {
        // What the link still takes is a sign, too: on a slow one an echo stands behind it.
        if matches!(
            &input,
            SourceInput::FromPeer(_) | SourceInput::Memory(MemoryEvent::Progress(..))
        ) {
            self.asked = None;
        }

        self.heard |= matches!(&input, SourceInput::FromPeer(heard) if !matches!(heard, FromPeer::Gone(None)));
        match input {
            SourceInput::Signal(signal) => {
                self.interrupted = true;
                bail!("interrupted by {}", session::signal_name(signal))
            }
            SourceInput::FromPeer(FromPeer::Gone(why)) => {
                self.gone = true;
                bail!(
                    "the link to the destination broke: {}",
                    why.unwrap_or("it was closed".into())
                )
            }
            SourceInput::FromPeer(FromPeer::Message(Message::Resolved { standing })) => {
                self.undone_there |= has_heard(standing);
                Ok(input)
            }
            SourceInput::FromPeer(FromPeer::Message(Message::Failed { phase, why, hints })) => {
                Err(Advice::with(format!("the destination failed while {phase}: {why}"), hints))
            }
            SourceInput::Channel(_, None) if !self.committed => bail!("a further link broke"),
            SourceInput::Dump(DumpEvent::Ended(Err(e)) | DumpEvent::Checked(Err(e))) => Err(e),
            SourceInput::Memory(MemoryEvent::Failed(e)) => bail!("sending memory: {e}"),
            SourceInput::Files(FileEvent::Failed(e)) => bail!("sending files: {e}"),
            SourceInput::Image(ImageEvent::Failed(e)) => bail!("sending the image: {e}"),
            SourceInput::Joined(Err(e)) => Err(e),
            input => Ok(input),
        }
    }

    pub(super) fn until(&mut self, limit: Duration) {
        let limit = fault::limit(limit);
        self.limit = limit;
        let own = Instant::now() + limit;
        self.by_user = self.user.is_some_and(|user| user < own);
        self.deadline = self.user.map_or(own, |user| user.min(own));
        self.watch.until(self.deadline);
    }

    /// Waits for so long that the destination says that it has undone everything. Whatever else comes is
    /// of no interest any more.
    pub(super) fn await_undone(&mut self, limit: Duration) {
        self.until(limit);
        while !(self.gone || self.undone_there) && Instant::now() < self.deadline {
            let _ = self.next();
        }
    }

    /// Clients wait from here on: a dead link must be known as dead soon. `rate` is what the link
    /// has carried, in bytes a second, if that is known.
    pub(super) fn start_heartbeat(&mut self, peer: &PeerWriter, rate: Option<f64>) {
        // On a slow link a question stands behind all that is in its buffers.
        let drained = rate.map_or(Duration::ZERO, |rate| {
            Duration::try_from_secs_f64(BUFFERS / rate).unwrap_or(Duration::MAX)
        });
        self.patience = DEAD.saturating_add(drained);
        self.asked = None;
        self.pulse = Some(peer.clone());
    }

    /// It has been decided without the link.
    pub(super) fn stop_heartbeat(&mut self) {
        self.pulse = None;
    }

    /// The time counts anew.
    pub(super) fn again(&mut self) {
        self.until(self.limit);
    }
}

/// Says what stands in the way, all of it.
pub fn refusal(problems: &[Problem]) -> Failed {
    let fatal = problems.iter().filter(|p| p.fatal).cloned().collect();
    Failed::refused(Problems(fatal).into())
}

/// A container that the destination would take.
pub(super) struct Accepted {
    pub(super) subject: SourceContainer,
    pub(super) peer: PeerWriter,
    pub(super) closer: Closer,
    pub(super) inputs: SourceInputs,
}

/// Looks at the container and asks the destination; nothing is touched.
pub(super) fn negotiate(
    runtime: &Runtime,
    options: &SourceOptions,
    reporter: &mut Reporter,
) -> Result<Accepted, Failed> {
    reporter.phase("inspect", "looking at the container");
    let mut subject = inspect(runtime, &options.wishes).map_err(|p| refusal(&p))?;
    if options.remove_files && subject.plan.engine.is_some() {
        let why = "what is its files is the engine's, which still knows the container";
        let problem = Problem::new("--source-files remove is not for an engine's container", why);
        return Err(refusal(&[problem.hint("remove it here with the engine, when it has left")]));
    }

    reporter.report.migration.clone_from(&subject.plan.migration);
    std::mem::take(&mut subject.warnings).into_iter().for_each(|warning| reporter.problem(warning));
    let locks = subject.cgroup.processes().and_then(|pids| locks::look(&pids));
    let locks = locks.map_err(Failed::refused)?;
    reporter.phase("connect", &format!("asking {}", options.destination));
    let (tell, queue) = channel();
    let heard = tell.clone();
    let hear = move |h| heard.send(SourceInput::FromPeer(h)).is_ok();
    let session = Session::begin(&options.destination, hear).map_err(Failed::refused)?;

    let Session { peer, mut closer } = session;
    // A shell that has ended already needs no cutting.
    let watch =
        Watchdog::start(closer.cutter().unwrap_or(Cutter::Nothing)).map_err(Failed::refused)?;
    let mut inputs = SourceInputs {
        queue,
        tell,
        user: options.timeout.map(|timeout| Instant::now() + timeout),
        by_user: false,
        awaited: Awaited::Destination,
        limit: ANSWER_LIMIT,
        deadline: Instant::now(),
        interrupted: false,
        pulse: None,
        asked: None,
        patience: DEAD,
        gone: false,
        undone_there: false,
        committed: false,
        heard: false,
        watch: watch.clone(),
    };

    inputs.until(ANSWER_LIMIT);
    let caught = inputs.tell.clone();
    let hurried = watch.clone();
    session::catch_signals(move |signal| {
        hurried.hurry(PATIENCE);
        caught.send(SourceInput::Signal(signal)).is_ok()
    })
    .map_err(Failed::refused)?;

    let greeted = await_greeting(&mut inputs);
    if let Err(e) = greeted {
        drop(peer);
        // A shell that could not get there says more than the end of its stream.
        let text = if inputs.interrupted || inputs.heard {
            e
        } else {
            let why = options.destination.explain(&mut closer);
            Advice::over(why, e)
        };

        closer.close();
        return Err(Failed::refused(text));
    }

    let answer = (|| {
        peer.send(&Message::Plan(Box::new(subject.plan.clone())))?;
        loop {
            match inputs.next()? {
                SourceInput::FromPeer(FromPeer::Message(Message::Accept {
                    warnings,
                    shared,
                    copies,
                    course,
                    image,
                })) => {
                    subject.image = image;
                    subject.forward =
                        crate::migration::journal::forward_role::ForwardRecord::of_source(
                            &subject.plan,
                            course,
                        );
                    return Ok(Ok((warnings, shared, copies)));
                }
                SourceInput::FromPeer(FromPeer::Message(Message::Refuse { problems })) => {
                    return Ok(Err(problems));
                }
                _ => {}
            }
        }
    })();

    subject.probes.clear();
    if let Ok(Ok((_, _, copies))) = &answer {
        subject.copies.clone_from(copies);
    }
    let found = subject.found.take();
    let answer = match (answer, found) {
        (Ok(Ok((warnings, shared, copies))), Some(found))
            if !copies.is_empty() || subject.plan.engine.is_some() =>
        {
            announce(&mut subject, &found, options, &peer, &mut inputs, &copies, reporter)
                .map(|refused| refused.map_or(Ok((warnings, shared)), Err))
        }
        (Ok(Ok((warnings, shared, _))), _) => Ok(Ok((warnings, shared))),
        (Ok(Err(problems)), _) => Ok(Err(problems)),
        (Err(e), _) => Err(e),
    };

    match answer {
        Ok(Ok((warnings, shared))) => {
            if let Some(note) = &subject.forward
                && let Err(e) = forward::steps::check(&subject.plan, note, &options.destination)
            {
                closer.close();
                return Err(Failed::refused(e));
            }

            if let Some(problem) = announce_image(&subject, reporter) {
                closer.close();
                return Err(refusal(&[problem]));
            }

            if let Some(note) = &subject.forward {
                reporter.phase("forward", note.words(&subject.plan));
            }

            // What both hosts see need not be sent, nor what two streams share a second time.
            let mut seen = Vec::new();
            for (i, stream) in subject.plan.streams.iter_mut().enumerate() {
                let twice = seen.contains(&stream.external);
                seen.push(stream.external.clone());
                stream.sent = stream.external.is_some() && !twice && !shared.contains(&i);
            }

            if let Some(problem) = contested(&subject, &locks) {
                closer.close();
                return Err(refusal(&[problem]));
            }
            for warning in warnings {
                reporter.problem(warning);
            }
            Ok(Accepted { subject, peer, closer, inputs })
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

/// Locks that were seen before, are held still, and cannot be taken over there as long as they are.
fn contested(subject: &SourceContainer, before: &[FoundLock]) -> Option<Problem> {
    let mut locks = locks::look(&subject.cgroup.processes().ok()?).ok()?;
    locks.retain(|found| before.contains(found));
    contested::problem(subject, &locks)
}

/// Tells the destination how much there is to copy; what stands in the way of that.
fn announce(
    subject: &mut SourceContainer,
    found: &Roots,
    options: &SourceOptions,
    peer: &PeerWriter,
    inputs: &mut SourceInputs,
    copies: &[usize],
    reporter: &mut Reporter,
) -> Result<Option<Vec<Problem>>> {
    let mut sizes = Vec::new();
    let mut load = FilesToCopy::default();
    let root = subject.plan.probes.iter().position(|p| p.place == Place::Rootfs);
    let root = root.filter(|root| copies.contains(root));
    let overlay = subject.layered.overlay().filter(|_| root.is_some()).cloned();
    if let (Some(overlay), Some(state_dir)) = (&overlay, &options.wishes.state_dir) {
        let roots = &mut load.roots;
        match announce_layers(overlay, state_dir, peer, inputs, reporter, roots)? {
            Ok(lacking) => load.layers = lacking,
            Err(problems) => return Ok(Some(problems)),
        }
        for root in &load.roots {
            sizes.push(walk::measure(&root.path())?);
        }
    }

    if let Some(why) = subject.layered.only_merged().filter(|_| root.is_some()) {
        reporter.problem(
            Problem::new("the root file system is copied as one tree, not layer by layer", why)
                .warning(),
        );
    }

    for number in copies {
        let probe = subject.plan.probes.get(*number);
        let probe = probe.ok_or_else(|| anyhow!("the destination wants what is not there"))?;
        let opened = found.list.get(*number);
        let opened = opened.ok_or_else(|| anyhow!("config.json does not have {}", probe.what))?;
        let opened = match &overlay {
            Some(overlay) if Some(*number) == root => {
                let Some(upper) = &overlay.upper else { continue };
                load.merged = Some((opened.place().to_owned(), upper.path.clone()));
                Root::open(&upper.path)?
            }
            _ => {
                let other = replaced(&found.inside, &probe.what, &probe.place, opened);
                if let Some(problem) = other {
                    return Ok(Some(vec![problem]));
                }
                opened.clone()
            }
        };

        let size = walk::measure(&opened.path())
            .with_context(|| format!("the {} cannot be copied", probe.what))?;
        let words =
            format!("{}: copied, {} MiB, {} files", probe.what, size.bytes >> 20, size.entries);
        reporter.phase("files", &words);

        load.roots.push(opened);
        let mut all = size;
        if Some(*number) == root {
            for layer in &sizes[..load.layers] {
                all.bytes += layer.bytes;
                all.entries += layer.entries;
            }
        }

        subject.sizes.push((*number, all));
        sizes.push(size);
        inputs.again();
    }

    if subject.plan.engine.is_some()
        && let Some(overlay) = subject.layered.overlay()
        && let Some(upper) = &overlay.upper
    {
        // The image is there, and what was changed of it comes last.
        let opened = Root::open(&upper.path)?;
        let size = walk::measure(&opened.path())?;
        let words =
            format!("changes of the image: {} MiB, {} files", size.bytes >> 20, size.entries);
        reporter.phase("files", &words);
        load.merged = Some((subject.bundle.rootfs()?, upper.path.clone()));
        load.roots.push(opened);
        sizes.push(size);
    }

    subject.load = Some(load);
    peer.send(&Message::Trees { sizes })?;
    loop {
        match inputs.next()? {
            SourceInput::FromPeer(FromPeer::Message(Message::SpaceOk)) => return Ok(None),
            SourceInput::FromPeer(FromPeer::Message(Message::Refuse { problems })) => {
                return Ok(Some(problems));
            }
            _ => {}
        }
    }
}

/// Tells the user what becomes of an engine's image; why it cannot be copied, as far as that shows here.
fn announce_image(subject: &SourceContainer, reporter: &mut Reporter) -> Option<Problem> {
    let (Some(wanted), ImageCourse::Copied { there }) = (&subject.plan.engine, subject.image)
    else {
        return None;
    };
    let image = &wanted.image;
    let copied = CopiedImage {
        name: image.name.clone(),
        there: there.min(image.layers.len()),
        copied: image.layers.len().saturating_sub(there),
        bytes: image.bytes,
    };

    reporter.phase("image", &copied.words());
    reporter.report.image = Some(copied);
    let engine = handover::of(wanted.engine)?;
    let room = image::room(&engine.images().scratch(wanted), image.bytes, &host::name());
    room.inspect_err(|e| tracing::debug!("{e:#}")).ok().flatten()
}

/// Tells the destination which layers the overlay has, and learns which it lacks: these are put among
/// the roots. Reading one for the first time takes its while.
fn announce_layers(
    overlay: &Overlay,
    state_dir: &Path,
    peer: &PeerWriter,
    inputs: &mut SourceInputs,
    reporter: &mut Reporter,
    roots: &mut Vec<Root>,
) -> Result<Result<usize, Vec<Problem>>> {
    let mut store = LayerStore::open(state_dir);
    let mut layers = Vec::new();
    for lower in &overlay.lower {
        layers.push(store.look(&lower.path)?);
    }

    store.save();
    peer.send(&Message::Layers { layers })?;
    inputs.until(LAYERS_LIMIT);
    let lacking = loop {
        match inputs.next()? {
            SourceInput::FromPeer(FromPeer::Message(Message::Lacking { layers })) => break layers,
            SourceInput::FromPeer(FromPeer::Message(Message::Refuse { problems })) => {
                return Ok(Err(problems));
            }
            _ => {}
        }
    };

    inputs.until(ANSWER_LIMIT);
    for (i, number) in lacking.iter().enumerate() {
        let lower = overlay.lower.get(*number).filter(|_| i == 0 || lacking[i - 1] < *number);
        let lower = lower.ok_or_else(|| anyhow!("the destination wants what is not there"))?;
        roots.push(Root::open(&lower.path)?);
    }

    let layers = Layers { there: overlay.lower.len() - lacking.len(), copied: lacking.len() };
    reporter.report.layers = Some(layers);
    let words = format!("layers: {} there, {} to be copied", layers.there, layers.copied);
    reporter.phase("layers", &words);

    Ok(Ok(lacking.len()))
}

fn await_greeting(inputs: &mut SourceInputs) -> Result<()> {
    loop {
        if let SourceInput::FromPeer(first) = inputs.next()? {
            let theirs = session::greeting(first)?;
            if theirs.host == host::identity() {
                bail!("source and destination are the same host");
            }
            return Ok(());
        }
    }
}
