//! The container's engine on the destination: it makes the container, and ours is the call of its
//! runtime.
//!
//! ```text
//! Image…   what the engine lacks of the image   (it takes it in)
//! Papers   what the engine there knows of it        (networks and volumes are made, files come)
//! Engage   ours makes it: storage, network, monitor
//! Engaged  its runtime is called: the bundle, the network, the log are there; runc is started below
//!          that call, and held
//! Dumped   the root file system and the log are filled
//! …        the call ends as the migration does
//! ```
//!
//! An engine that makes the network only when it knows the first process (docker) gets one that is
//! restored and held: in a namespace of ours, where an [`Understudy`](crate::network::Understudy) had stood
//! in for that network. And where it has opened the log before it calls its runtime, what the container has
//! said since goes the way of all that it says: through its standard streams.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::{DestinationInput, IncomingMigration};
use crate::engine::calls::{self, EngineCall, EngineVerb};
use crate::engine::command::Running;
use crate::engine::handover::{self, Handover};
use crate::engine::image::intake::ImageIntake;
use crate::engine::image::{self, ImageCourse};
use crate::engine::papers::{EngineCourse, EngineWants, Made, Papers};
use crate::engine::{json_log, networks};
use crate::files::{mounting, tree};
use crate::migration::journal::Record;
use crate::migration::protocol::Plan;
use crate::migration::recovery::engines;
use crate::migration::transfer::image_files::{SHM, SHM_PLACE};
use crate::network::curtain;
use crate::oci::bundle::Bundle;
use crate::sys::fault;
use crate::sys::netns::NetNs;

/// Until an engine that was asked to make a container has called its runtime.
const ENGAGE_LIMIT: Duration = Duration::from_secs(60);
/// Until an engine has noticed that its runtime is done.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// A log may have grown by so much since it was looked at.
const GROWTH: u64 = 1 << 30;

/// Returns where what the container has changed of its image is until the engine has made a place for it: in
/// the same mount, as it is renamed.
pub(super) fn upper(plan: &Plan, wanted: &EngineWants) -> PathBuf {
    wanted.store.root.join(&wanted.store.driver).join(format!("ferry-{}", plan.migration))
}

/// Returns what there will be to undo.
pub(super) fn made(plan: &Plan, wanted: &EngineWants, course: &EngineCourse) -> Made {
    let upper = upper(plan, wanted);
    Made {
        engine: wanted.engine,
        container: plan.container.to_string(),
        name: wanted.name.clone(),
        volumes: wanted.volumes.iter().map(|volume| volume.name.clone()).collect(),
        networks: networks::made(wanted, &course.networks),
        image: image::made(&wanted.image, course.image),
        log: upper.with_extension("log"),
        noted: upper.with_extension("volumes"),
        upper,
    }
}

/// The engine's part of an incoming migration, and how far it has come.
pub(super) struct EnginePart {
    handover: &'static dyn Handover,
    course: ImageCourse,
    /// The image, as it comes.
    image: Option<ImageIntake>,
    most_log: u64,
    upper: PathBuf,
    papers: Option<Papers>,
    /// Where the log is, so far.
    log: Option<(PathBuf, File)>,
    /// Where the engine has opened its log already: how much is in that. The rest is for these.
    said: Option<(u64, [Option<File>; 2])>,
    running: Option<Running>,
    call: Option<EngineCall>,
    /// As the engine has made it.
    bundle: Option<Bundle>,
}

impl EnginePart {
    pub(super) fn new(wanted: &EngineWants, course: ImageCourse) -> Result<EnginePart> {
        let handover = handover::of(wanted.engine);
        Ok(EnginePart {
            handover: handover.ok_or_else(|| anyhow!("an engine that is not known here"))?,
            course,
            image: None,
            most_log: wanted.log.unwrap_or(0).saturating_add(GROWTH),
            upper: PathBuf::new(),
            papers: None,
            log: None,
            said: None,
            running: None,
            call: None,
            bundle: None,
        })
    }

    pub(super) fn know(&mut self, papers: &Papers) {
        self.papers = Some(papers.clone());
    }

    pub(super) fn take_call(&mut self) -> Option<EngineCall> {
        self.call.take()
    }

    pub(super) fn bundle(&self) -> Option<&Bundle> {
        self.bundle.as_ref()
    }

    /// Tells whether its image is to come.
    pub(super) fn awaits_image(&self) -> bool {
        matches!(self.course, ImageCourse::Copied { .. })
    }

    /// A part of the image begins.
    pub(super) fn image_part(&mut self, digest: &str, bytes: u64) -> Result<()> {
        self.intake()?.begins(digest, bytes)
    }

    /// The next bytes of it.
    pub(super) fn image_bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.intake()?.feed(at, bytes)
    }

    fn intake(&mut self) -> Result<&mut ImageIntake> {
        self.image.as_mut().ok_or_else(|| anyhow!("an image that was not asked for"))
    }

    /// A piece of the log.
    pub(super) fn log(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let (path, file) =
            self.log.as_ref().ok_or_else(|| anyhow!("a log that was not announced"))?;
        if at.saturating_add(bytes.len() as u64) > self.most_log {
            bail!("a log longer than was announced");
        }
        file.write_all_at(bytes, at).with_context(|| format!("writing {}", path.display()))
    }

    /// The last of it has come: to its place.
    pub(super) fn fill(&self, images: &Path) -> Result<()> {
        let bundle = self.bundle.as_ref().ok_or_else(|| anyhow!("the engine has not made it"))?;
        mounting::refill(&bundle.rootfs()?, &self.upper)?;
        let packed = images.join(SHM);
        if let Ok(packed) = File::open(&packed) {
            let mounts = bundle.bind_mounts();
            let place = mounts.iter().find(|mount| mount.destination == Path::new(SHM_PLACE));
            let place = place.ok_or_else(|| anyhow!("the engine has made no {SHM_PLACE}"))?;
            tree::unpack(&place.source, &mut BufReader::with_capacity(256 << 10, packed))
                .with_context(|| format!("filling {SHM_PLACE}"))?;
        }
        Ok(())
    }

    /// Nobody expects anything any more; it is waited for by whoever takes the container away.
    pub(super) fn give_up(mut self) -> Option<Running> {
        drop(self.call.take());
        self.running.take()
    }

    /// The container runs: the engine learns it, and has it.
    pub(super) fn settle(mut self, record: &Record) {
        if let Some(running) = self.running.take()
            && let Err(e) = running.finish(SETTLE_LIMIT)
        {
            let engine = record.engine.as_ref().map(|made| made.engine.to_string());
            tracing::error!(
                "the container runs here, and {} does not know it: {e:#}",
                engine.unwrap_or_default()
            );
        }
        engines::keep(record);
    }
}

impl IncomingMigration {
    /// Networks and volumes, by the engine, before anything is put there.
    pub(super) fn have_made(&mut self) -> Result<()> {
        let Some(engine) = &mut self.engine else { return Ok(()) };
        let (Some(wanted), Some(made)) = (&self.plan.engine, &self.journal.record.engine) else {
            return Ok(());
        };
        self.doing = "having the engine make networks and volumes";
        engine.upper.clone_from(&made.upper);
        engine.handover.make(wanted, made)?;
        match engine.course {
            ImageCourse::There => {}
            ImageCourse::Named => image::name(engine.handover.images(), made)?,
            ImageCourse::Copied { there } => {
                let intake = ImageIntake::new(&wanted.image, there, &made.archive())?;
                engine.image = Some(intake);
            }
        }
        if wanted.log.is_some() {
            let mut open = File::options();
            let file = open.read(true).write(true).create_new(true).mode(0o600).open(&made.log);
            let what = || format!("cannot write {}", made.log.display());
            engine.log = Some((made.log.clone(), file.with_context(what)?));
        }
        Ok(())
    }

    /// All of the image has come: the engine takes it in.
    pub(super) fn take_image(&mut self) -> Result<()> {
        self.doing = "having the engine take the image in";
        let made = self.journal.record.engine.as_ref().ok_or_else(|| anyhow!("no engine"))?;
        let engine = engine_of(&mut self.engine)?;
        let intake = engine.image.take();
        intake.ok_or_else(|| anyhow!("an image that was not asked for"))?.finish()?;
        image::take(engine.handover.images(), made)?;
        fault::point("destination.image-taken")
    }

    /// Has the engine make the container.
    pub(super) fn engage(&mut self, tell: &Sender<DestinationInput>) -> Result<()> {
        let (Some(engine), Some(wanted), Some(made)) =
            (&mut self.engine, &self.plan.engine, &self.journal.record.engine)
        else {
            bail!("there is no engine");
        };

        self.doing = "having the engine make the container";
        let papers = engine.papers.take().ok_or_else(|| anyhow!("nothing is known of it"))?;
        let verb = engine.handover.verb();
        if let Some(image) = &self.plan.network {
            let softly = verb == EngineVerb::Create;
            curtain::draw(image, &self.plan.migration, &NetNs::current()?, softly)?;
        }

        let (root, work) = (self.runtime.root(), &self.work);
        let id = engine.handover.create(wanted, made, &papers, work)?;
        if let Some(place) = engine.handover.log(wanted, &id)
            && let Some((_, staged)) = &engine.log
        {
            engine.said = Some((json_log::place(staged, &place)?, [None, None]));
        }

        let expected = calls::expect(verb, &id, root, work, ENGAGE_LIMIT)?;
        let running = engine.handover.start(&id, work)?;
        let ended = running.pidfd()?;
        engine.running = Some(running);
        let tell = tell.clone();
        let wait = move || {
            let call = expected.call(ended, Instant::now() + ENGAGE_LIMIT);
            // The hand-over may have ended already.
            let _ = tell.send(DestinationInput::Engaged(call));
        };

        std::thread::Builder::new().name("engine".into()).spawn(wait)?;
        Ok(())
    }

    /// Its runtime is called.
    pub(super) fn engaged(&mut self, call: Result<EngineCall>) -> Result<()> {
        let Some(engine) = &mut self.engine else { bail!("there is no engine") };
        let call = match (call, engine.running.take()) {
            (Ok(call), running) => {
                engine.running = running;
                call
            }
            // It says more than that it has ended.
            (Err(e), Some(running)) => {
                return Err(match running.finish(Duration::ZERO) {
                    Err(why) => why.context("the engine does not make the container"),
                    Ok(()) => e,
                });
            }
            (Err(e), None) => return Err(e),
        };

        let bundle = Bundle::load(&call.called.bundle)?;
        mounts_are_there(&self.plan, &bundle)?;
        if let Some((_, pipes)) = &mut engine.said {
            *pipes = call.pipes()?;
        } else if let Some((_, staged)) = engine.log.take() {
            let place = bundle.path.join("ctr.log");
            let what = || format!("cannot write {}", place.display());
            let mut log = File::options();
            let log = log.read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&place);
            let mut log = log.with_context(what)?;
            std::io::copy(&mut File::open(crate::sys::process::path_of(&staged))?, &mut log)
                .with_context(what)?;
            engine.log = Some((place, log));
        }

        engine.call = Some(call);
        if self.plan.network.is_some() && engine.handover.verb() == EngineVerb::Create {
            self.doing = "making the network";
            self.network.stand_in(&self.plan, &self.work)?;
        } else if self.plan.network.is_some() {
            self.doing = "looking at the network that the engine has made";
            let Some(Some(place)) = bundle.namespace("network") else {
                bail!("the engine has made no network namespace");
            };
            let text = place.to_str().ok_or_else(|| anyhow!("a namespace that is not UTF-8"))?;
            fs::write(self.work.network_place(), text)?;

            let note = self.journal.record.forward.as_ref();
            self.network.make(&self.plan, &self.work, Some(place), note)?;

            // Its own fence is closed from now on.
            curtain::lift(&self.plan.migration, &NetNs::current()?)?;
        }

        engine_of(&mut self.engine)?.bundle = Some(bundle);
        fault::point("destination.engaged")
    }

    /// It is restored, and the engine has started it: what was missing until then.
    pub(super) fn started(&mut self) -> Result<()> {
        let Some(engine) = self.engine.as_mut().filter(|e| e.handover.verb() == EngineVerb::Create)
        else {
            return Ok(());
        };
        if let (Some((from, pipes)), Some((_, staged))) = (engine.said.take(), &engine.log) {
            json_log::say(staged, from, pipes)?;
        }
        self.mark("the engine has started it");
        if self.plan.network.is_some() {
            self.doing = "looking at the network that the engine has made";
            let note = self.journal.record.forward.as_ref();
            self.network.enter(&self.plan, &self.work, note)?;
            self.have_released();
            // Its own fence is closed from now on.
            curtain::lift(&self.plan.migration, &NetNs::current()?)?;
        }
        fault::point("destination.started")
    }
}

fn engine_of(engine: &mut Option<EnginePart>) -> Result<&mut EnginePart> {
    engine.as_mut().ok_or_else(|| anyhow!("there is no engine"))
}

/// CRIU puts the container's mounts on those of the same place here.
fn mounts_are_there(plan: &Plan, here: &Bundle) -> Result<()> {
    let there = Bundle { path: plan.bundle.clone(), config: plan.config.clone() };
    let mounts = here.bind_mounts();
    for mount in there.bind_mounts() {
        if mounts.iter().all(|m| m.destination != mount.destination) {
            bail!("the engine here has not made the mount {}", mount.destination.display());
        }
    }
    Ok(())
}
