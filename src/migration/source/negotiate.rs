//! The source's first conversation: a look at the container, the greeting, the plan, the answer.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::inputs::{ANSWER_LIMIT, SourceInput, SourceInputs};
use super::watchdog::Watchdog;
use crate::engine::handover;
use crate::engine::image::{self, ImageCourse};
use crate::files::layers::LayerStore;
use crate::files::overlay::Overlay;
use crate::files::root::Root;
use crate::files::walk;
use crate::migration::forwarding as forward;
use crate::migration::journal::forward_role::ForwardRecord;
use crate::migration::options::MigrateOptions;
use crate::migration::preflight::contested;
use crate::migration::preflight::source_checks::{SourceContainer, inspect};
use crate::migration::preflight::source_files::{Roots, replaced};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter, Session};
use crate::migration::protocol::{Message, Place, Stream};
use crate::migration::transfer::file_sender::FilesToCopy;
use crate::migration::transfer::memory_sender;
use crate::oci::runtime::Runtime;
use crate::problem::{Advice, Problem, Problems};
use crate::report::exit::Failed;
use crate::report::progress::{CopiedImage, Layers, NewNetwork, Reporter};
use crate::sys::host;
use crate::tasks::locks::{self, FoundLock};
use crate::transport::connect::{Closer, Cutter, Destination};

/// Until the destination has looked for layers: it may have to read them.
const LAYERS_LIMIT: Duration = Duration::from_secs(900);
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

/// Says what stands in the way, all of it.
pub fn refusal(problems: &[Problem]) -> Failed {
    Failed::refused(fatal(problems).into())
}

fn fatal(problems: &[Problem]) -> Problems {
    Problems(problems.iter().filter(|p| p.fatal).cloned().collect())
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
    let (peer, closer, inputs) = connect(options).map_err(Failed::refused)?;
    let mut accepted = Accepted { subject, peer, closer, inputs };
    match agree(&mut accepted, options, &locks, reporter) {
        Ok(()) => Ok(accepted),
        Err(e) => {
            accepted.closer.close();
            Err(Failed::refused(e))
        }
    }
}

/// Reaches the other host, and hears its Ferry's greeting.
fn connect(options: &SourceOptions) -> Result<(PeerWriter, Closer, SourceInputs)> {
    let (tell, queue) = channel();
    let heard = tell.clone();
    let hear = move |h| heard.send(SourceInput::FromPeer(h)).is_ok();
    let Session { peer, mut closer } = Session::begin(&options.destination, hear)?;

    // A shell that has ended already needs no cutting.
    let watch = Watchdog::start(closer.cutter().unwrap_or(Cutter::Nothing))?;
    let user = options.timeout.map(|timeout| Instant::now() + timeout);
    let mut inputs = SourceInputs::new((tell, queue), user, watch.clone());

    let caught = inputs.tell.clone();
    session::catch_signals(move |signal| {
        watch.hurry(PATIENCE);
        caught.send(SourceInput::Signal(signal)).is_ok()
    })?;

    if let Err(e) = await_greeting(&mut inputs) {
        drop(peer);
        // A shell that could not get there says more than the end of its stream.
        let said = inputs.interrupted || inputs.heard;
        let error =
            if said { e } else { Advice::over(options.destination.explain(&mut closer), e) };
        closer.close();
        return Err(error);
    }

    Ok((peer, closer, inputs))
}

/// Sends the plan, and all that the destination asks for before it agrees.
fn agree(
    accepted: &mut Accepted,
    options: &SourceOptions,
    locks: &[FoundLock],
    reporter: &mut Reporter,
) -> Result<()> {
    let Accepted { subject, peer, inputs, .. } = accepted;
    let answer = send_plan(subject, peer, inputs)?;

    if let Some(found) = subject.found.take()
        && (!subject.copies.is_empty() || subject.plan.engine.is_some())
    {
        announce_files(subject, &found, options, (peer, inputs), reporter)?;
    }

    if let Some(note) = &subject.forward {
        forward::steps::check(&subject.plan, note, &options.destination)?;
    }
    announce_networks(subject, reporter);
    announce_image(subject, reporter)?;
    if let Some(note) = &subject.forward {
        reporter.phase("forward", note.words(&subject.plan));
    }

    leave_out(&mut subject.plan.streams, &answer.shared);
    contested(subject, locks)?;
    for warning in answer.warnings {
        reporter.problem(warning);
    }

    Ok(())
}

/// What the destination says of a plan that it accepts, beside what the subject keeps.
struct PlanAnswer {
    warnings: Vec<Problem>,
    /// Numbers of standard streams whose files it sees.
    shared: Vec<usize>,
}

/// Sends the plan; an error is all that the destination has against it.
fn send_plan(
    subject: &mut SourceContainer,
    peer: &PeerWriter,
    inputs: &mut SourceInputs,
) -> Result<PlanAnswer> {
    peer.send(&Message::Plan(Box::new(subject.plan.clone())))?;
    let answer = loop {
        if let Message::Accept { warnings, shared, copies, course, engine } = answer(inputs)? {
            subject.engine = engine;
            subject.forward = ForwardRecord::of_source(&subject.plan, course);
            subject.copies = copies;
            break PlanAnswer { warnings, shared };
        }
    };
    subject.probes.clear();
    Ok(answer)
}

/// Waits for a message; a refusal is an error.
fn answer(inputs: &mut SourceInputs) -> Result<Message> {
    loop {
        match inputs.next()? {
            SourceInput::FromPeer(FromPeer::Message(Message::Refuse { problems })) => {
                return Err(fatal(&problems).into());
            }
            SourceInput::FromPeer(FromPeer::Message(message)) => return Ok(message),
            _ => {}
        }
    }
}

/// What both hosts see need not be sent, nor what two streams share a second time.
fn leave_out(streams: &mut [Stream], shared: &[usize]) {
    let mut seen = Vec::new();
    for (i, stream) in streams.iter_mut().enumerate() {
        let twice = seen.contains(&stream.external);
        seen.push(stream.external.clone());
        stream.sent = stream.external.is_some() && !twice && !shared.contains(&i);
    }
}

/// Locks that were seen before, are held still, and cannot be taken over there as long as they are: an error.
fn contested(subject: &SourceContainer, before: &[FoundLock]) -> Result<()> {
    let pids = subject.cgroup.processes().unwrap_or_default();
    let mut locks = locks::look(&pids).unwrap_or_default();
    locks.retain(|found| before.contains(found));
    contested::problem(subject, &locks)
        .map_or(Ok(()), |problem| Err(Problems(vec![problem]).into()))
}

/// Tells the destination how much there is to copy; an error is what stands in the way of that.
fn announce_files(
    subject: &mut SourceContainer,
    found: &Roots,
    options: &SourceOptions,
    (peer, inputs): (&PeerWriter, &mut SourceInputs),
    reporter: &mut Reporter,
) -> Result<()> {
    let copies = subject.copies.clone();
    let mut sizes = Vec::new();
    let mut load = FilesToCopy::default();
    let root = subject.plan.probes.iter().position(|p| p.place == Place::Rootfs);
    let root = root.filter(|root| copies.contains(root));
    let overlay = subject.layered.overlay().filter(|_| root.is_some()).cloned();
    if let (Some(overlay), Some(state_dir)) = (&overlay, &options.wishes.state_dir) {
        let roots = &mut load.roots;
        load.layers = announce_layers(overlay, state_dir, (peer, inputs), reporter, roots)?;
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

    for number in &copies {
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
                    return Err(Problems(vec![problem]).into());
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
    while !matches!(answer(inputs)?, Message::SpaceOk) {}
    Ok(())
}

/// Tells the user which networks the engine there will make.
fn announce_networks(subject: &SourceContainer, reporter: &mut Reporter) {
    let networks = subject.plan.engine.iter().flat_map(|wanted| &wanted.networks);
    for network in networks.filter(|network| subject.engine.networks.contains(&network.name)) {
        let new = NewNetwork {
            name: network.name.clone(),
            driver: network.driver.clone(),
            subnets: network.subnets.clone(),
        };
        reporter.phase("network", &new.words());
        reporter.report.networks.push(new);
    }
}

/// Tells the user what becomes of an engine's image; an error is why it cannot be copied, as far as that shows
/// here.
fn announce_image(subject: &SourceContainer, reporter: &mut Reporter) -> Result<()> {
    let (Some(wanted), ImageCourse::Copied { there }) =
        (&subject.plan.engine, subject.engine.image)
    else {
        return Ok(());
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
    let Some(engine) = handover::of(wanted.engine) else { return Ok(()) };
    let room = image::room(&engine.images().scratch(wanted), image.bytes, &host::name());
    let problem = room.inspect_err(|e| tracing::debug!("{e:#}")).ok().flatten();
    problem.map_or(Ok(()), |problem| Err(Problems(vec![problem]).into()))
}

/// Tells the destination which layers the overlay has, and learns which it lacks: these are put among
/// the roots. Reading one for the first time takes its while.
fn announce_layers(
    overlay: &Overlay,
    state_dir: &Path,
    (peer, inputs): (&PeerWriter, &mut SourceInputs),
    reporter: &mut Reporter,
    roots: &mut Vec<Root>,
) -> Result<usize> {
    let mut store = LayerStore::open(state_dir);
    let mut layers = Vec::new();
    for lower in &overlay.lower {
        layers.push(store.look(&lower.path)?);
    }

    store.save();
    peer.send(&Message::Layers { layers })?;
    inputs.until(LAYERS_LIMIT);
    let lacking = loop {
        if let Message::Lacking { layers } = answer(inputs)? {
            break layers;
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

    Ok(lacking.len())
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
