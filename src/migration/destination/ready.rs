//! From `Prepare` to a copy that is restored and held.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::engine::EnginePart;
use super::phase::{Dumped, Event, Phase, Ready};
use super::shared;
use super::{
    DestinationInput, DestinationInputs, IMAGE_LIMIT, IncomingMigration, MAX_CHANNELS,
    RESTORE_LIMIT, SILENCE,
};
use crate::connections::{self, ComingConnection, Installation, Installed};
use crate::criu::interposer::Interposer;
use crate::files::apply::{Applied, Applying};
use crate::files::tmpfs::{MountedTmpfs, Tmpfs};
use crate::files::{sockets, tree};
use crate::memory::serve::Server;
use crate::memory::will::Will;
use crate::migration::checkpoint::restore::{RestoreEvent, RestoreJob, RestoreOrder, RestorePlan};
use crate::migration::forwarding::published;
use crate::migration::journal::forward_role::ForwardRole;
use crate::migration::journal::{State, workdir};
use crate::migration::preflight::{destination_checks, host};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::migration::protocol::{Message, variant};
use crate::migration::recovery::successors::PageGuards;
use crate::migration::recovery::verdicts::{self, ControlCall};
use crate::migration::transfer::image_files::{IMAGE, LOG, STREAM};
use crate::migration::transfer::receiver::{self, Stage, want};
use crate::oci::cgroup::Cgroup;
use crate::oci::cgroup_warmer::CgroupWarmer;
use crate::sys::fault;
use crate::sys::netns::NetNs;
use crate::sys::process::{self, ProcessId};
use crate::tasks::locks::{self, HeldLock};
use crate::tasks::{settings, sockets as task_sockets};
use crate::transport::connect;
use crate::transport::frame::Frame;

impl IncomingMigration {
    pub(super) fn until_ready(
        &mut self,
        peer: &PeerWriter,
        inputs: &mut DestinationInputs,
        tell: &Sender<DestinationInput>,
        stage: &Stage,
    ) -> Result<Ready> {
        fault::point("destination.prepare")?;
        if self.engine.is_none() {
            // An engine's runtime has been given some.
            self.streams.open(&self.plan)?;
        }

        // From the beginning: a source that lost this link, and gave up, says so over another.
        let call = tell.clone();
        verdicts::take_calls(&self.work, move |c| call.send(DestinationInput::Call(c)).is_ok())?;
        peer.send(&Message::AcceptChannels)?;
        self.doing = "making the network";
        let note = self.journal.record.forward.as_ref();
        if self.engine.is_none() || self.plan.network.is_none() {
            let place = workdir::network_place(&self.plan);
            self.network.make(&self.plan, &self.work, place, note)?;
        }

        if !self.plan.tmpfs.is_empty() {
            let base = self.work.tmpfs();
            self.tmpfs = Some(MountedTmpfs::new(&base, &self.plan.tmpfs)?);
        }
        if let Some(note) = note.filter(|n| n.part == ForwardRole::ArrivesWithoutConnections) {
            published::arrive(note, &self.plan)?;
        }

        fault::point("destination.network")?;
        self.have_made()?;

        // Before they are handed to whoever takes files in.
        let copies = !self.incoming.is_empty();
        let image = self.engine.as_ref().is_some_and(EnginePart::awaits_image);
        let phase = Phase::Asked { copies, engine: self.plan.engine.is_some(), image };
        let phase = phase.step(Event::Prepare)?;
        if copies {
            self.take_files(tell)?;
        } else {
            self.start_restore(tell)?;
        }

        let phase = self.restored(phase, peer, inputs, tell, stage)?;
        let phase = match &phase {
            Phase::Restoring { dumped, .. } if self.plan.verify => {
                let tasks = dumped.tasks.clone();
                self.verify(&tasks, phase.step(Event::Compare)?, peer, inputs)?
            }
            _ => phase,
        };

        let phase = phase.step(Event::Hold)?;
        let Phase::Ready(ready) = phase else { bail!("it is not ready") };
        self.doing = "waiting for the verdict";

        // Not synced: a crash of this host loses the copy with the note about it.
        self.journal.note(State::Ready)?;
        fault::point("destination.ready")?;

        // Bad news that came meanwhile comes before this.
        while let Some(input) = inputs.pending()? {
            self.keep_pace(&phase, input, peer)?;
        }

        // Its end may be on its way still.
        if self.criu().is_some_and(|criu| !process::lives(criu)) {
            bail!("CRIU was killed when it had restored");
        }
        peer.send(&Message::Ready)?;
        fault::point("destination.said-ready")?;

        Ok(ready)
    }

    /// From `Prepare` until the tasks are restored, and whoever fills them could be succeeded.
    fn restored(
        &mut self,
        mut phase: Phase,
        peer: &PeerWriter,
        inputs: &mut DestinationInputs,
        tell: &Sender<DestinationInput>,
        stage: &Stage,
    ) -> Result<Phase> {
        let mut warm = None;
        loop {
            let restored = matches!(phase, Phase::Restoring { restored: true, .. });
            // CRIU may be quicker than the last pages, or than whoever takes its tasks in.
            if restored && self.guard.as_ref().is_some_and(PageGuards::can_go_on) {
                return Ok(phase);
            }

            let limit = match &phase {
                _ if restored => RESTORE_LIMIT,
                // Its engine there puts it together before the first byte comes.
                Phase::Preparing(now) if now.lacks_image() => IMAGE_LIMIT,
                _ => SILENCE,
            };
            match inputs.next(limit)? {
                DestinationInput::Restore(RestoreEvent::AtRequest(criu)) => {
                    phase = phase.step(Event::Held)?;
                    self.begin_guard()?;
                    shared::settle(criu, stage, tell)?;
                }
                DestinationInput::Settled(_) => {
                    fault::point("destination.prepared")?;
                    peer.send(&Message::Prepared)?;
                }
                DestinationInput::FromPeer(FromPeer::Frame(Frame::File(name, at, bytes))) => {
                    phase = phase.step(Event::File)?;
                    self.file(&name, at, &bytes)?;
                }
                DestinationInput::Files(Applied::Round(round)) => {
                    peer.send(&Message::Applied { round })?
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Copied)) => {
                    phase = phase.step(Event::Copied)?;
                    fault::point("destination.copied")?;
                    self.journal.record.placing.put()?;
                    // The runtime looks for the root file system when it starts.
                    if self.engine.is_none() {
                        self.start_restore(tell)?;
                    }
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::ImagePart {
                    digest,
                    bytes,
                })) => {
                    phase = phase.step(Event::ImagePart)?;
                    self.engine.iter_mut().try_for_each(|e| e.image_part(&digest, bytes))?;
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::ImageSent)) => {
                    phase = phase.step(Event::ImageSent)?;
                    self.take_image()?;
                    peer.send(&Message::ImageTaken)?;
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Papers(papers))) => {
                    phase = phase.step(Event::Papers)?;
                    self.engine.iter_mut().for_each(|engine| engine.know(&papers));
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Engage)) => {
                    phase = phase.step(Event::Engage)?;
                    self.engage(tell)?;
                }
                DestinationInput::Engaged(call) => {
                    phase = phase.step(Event::Called)?;
                    self.engaged(call)?;
                    self.start_restore(tell)?;
                }
                DestinationInput::Call(ControlCall::Channel(input, output, held)) => {
                    self.join(input, output, held, stage, tell)?;
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Freezing)) => {
                    phase = phase.step(Event::Freezing)?;
                    warm = Some(CgroupWarmer::start()?);
                    self.network.take(&self.work)?;
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Connections { list })) => {
                    phase = phase.step(Event::Connections)?;
                    self.await_connections(list, tell)?;
                }
                DestinationInput::Awaited(lacking) => peer.send(&Message::Awaited { lacking })?,
                DestinationInput::FromPeer(FromPeer::Message(Message::Sockets { list })) => {
                    phase = phase.step(Event::Sockets(list))?;
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Dumped {
                    tasks,
                    connections,
                    locks,
                    settings,
                    renamed,
                })) => {
                    let sockets = Vec::new();
                    let dumped = Dumped { tasks, connections, locks, settings, renamed, sockets };
                    phase = phase.step(Event::Dumped(Box::new(dumped)))?;
                    fault::point("destination.restore")?;
                    self.begin_restore(stage)?;
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::MemoryDone { left })) => {
                    phase = phase.step(Event::MemoryDone(left))?;
                }
                DestinationInput::Restore(RestoreEvent::Restored(pid, criu)) => {
                    phase = phase.step(Event::Restored)?;
                    self.release = Some(criu);
                    if let Phase::Restoring { dumped, .. } = &phase {
                        self.complete(pid, dumped)?;
                    }
                    drop(warm.take());
                }
                other => self.keep_pace(&phase, other, peer)?,
            }

            if let Phase::Restoring { dumped, left: Some(_), .. } = &phase
                && let Some(server) = self.server.take()
            {
                self.serve(&dumped.tasks, server, stage, tell)?;
            }
        }
    }

    /// Returns what may come at any time; a message that does not belong in the phase is refused.
    pub(super) fn keep_pace(
        &mut self,
        phase: &Phase,
        input: DestinationInput,
        peer: &PeerWriter,
    ) -> Result<()> {
        match input {
            DestinationInput::FromPeer(FromPeer::Frame(Frame::Packet(bytes)))
                if phase.takes_packets() =>
            {
                self.network.keep(&bytes)
            }
            DestinationInput::Want(run) => want(peer, run),
            DestinationInput::FromPeer(FromPeer::Message(message)) => {
                Err(phase.refuse_message(&message))
            }
            DestinationInput::FromPeer(FromPeer::Frame(frame)) => {
                Err(phase.refuse(&variant(&frame)))
            }
            // Of our own, all else says how far it is, and is looked at where that counts.
            _ => Ok(()),
        }
    }

    /// Returns what CRIU has restored, and what it leaves to us.
    fn complete(&mut self, pid: i32, dumped: &Dumped) -> Result<()> {
        self.journal.record.init = ProcessId::of(pid);
        self.mark("restored");
        self.started()?;
        self.install_connections(pid, dumped.connections)?;
        let note = self.journal.record.forward.as_ref();
        published::join(note, &self.plan, self.network.namespace(), pid)?;
        self.hold_locks(pid, &dumped.locks)?;
        sockets::to_current_names(&process::root_of(pid), &dumped.renamed)?;

        let tasks = Cgroup::of_process(pid)?.processes()?;
        self.changed = settings::set(&tasks, &dumped.settings)?;
        let namespace = NetNs::of_pid(pid as u32)?;
        self.changed.extend(self.installed.as_ref().and_then(Installed::changed));
        self.changed.extend(task_sockets::set(&namespace, &tasks, &dumped.sockets)?);
        let groups = task_sockets::joined(pid).into_iter();
        let groups: Vec<_> = groups.map(|one| (one.interface, one.group)).collect();
        self.network.add_groups(&groups);
        fault::point("destination.restored")
    }

    /// What is released with the container is known.
    pub(super) fn have_released(&mut self) {
        let mut set = self.release_set.lock().unwrap_or_else(PoisonError::into_inner);
        *set = self.network.release();
    }

    /// The CRIU that restores.
    fn criu(&self) -> Option<i32> {
        let text = fs::read_to_string(self.work.criu().pid()).ok()?;
        text.trim().parse().ok()
    }

    fn start_restore(&mut self, tell: &Sender<DestinationInput>) -> Result<()> {
        self.doing = "preparing the restore";
        let (criu, _) = host::criu()?;
        let targets: Vec<&str> = self.plan.streams.iter().map(|s| s.target.as_str()).collect();
        fs::write(self.work.images().join("descriptors.json"), serde_json::to_vec(&targets)?)?;
        let streams = self.streams.plan()?;
        self.have_released();

        let call = self.engine.as_mut().and_then(EnginePart::take_call);
        let made = self.engine.as_ref().and_then(EnginePart::bundle);
        self.server = Some(Server::listen(&self.work.criu())?);
        let namespace = match self.network.namespace() {
            Some(namespace) if self.plan.criu_inside() => Some(namespace.try_clone()?),
            _ => None,
        };
        let lent = std::mem::take(&mut self.lent);
        let plan = RestorePlan {
            runtime: self.runtime.clone(),
            container: self.journal.record.id_here(),
            bundle: made.map_or_else(|| self.plan.bundle.clone(), |bundle| bundle.path.clone()),
            root: match made {
                Some(bundle) => Some(bundle.rootfs()?),
                None => self.journal.record.placing.mounting().map(|m| m.place().to_owned()),
            },
            call,
            images: self.work.images(),
            work: self.work.criu(),
            streams,
            tmpfs: self
                .tmpfs_places()
                .flat_map(|(t, p)| t.places().map(move |place| (place.clone(), p.clone())))
                .collect(),
            console_socket: self.plan.console_socket.clone(),
            loopback: self.plan.loopback.clone(),
            release: self.release_set.clone(),
            lent: lent.iter().map(shared::identity).collect::<Result<_>>()?,
            interposer: {
                let mut interposer = Interposer::new(&self.work, &criu, namespace)?;
                interposer.lend(lent);
                interposer
            },
        };

        let tell = tell.clone();
        self.restore = Some(RestoreJob::start(plan, move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(DestinationInput::Restore(event));
        })?);

        Ok(())
    }

    /// Prepares for connections that will come beside the images.
    fn await_connections(
        &mut self,
        list: Vec<ComingConnection>,
        tell: &Sender<DestinationInput>,
    ) -> Result<()> {
        if list.len() > connections::BATCH {
            bail!("{} connections in one message", list.len());
        }
        if let Some(floating) = &self.plan.floating {
            // Elsewhere the namespace is the container's.
            let own = floating.addresses();
            let strange = list.iter().find(|c| !own.contains(&c.local.ip().to_canonical()));
            if let Some(strange) = strange {
                bail!("a connection at {}, which is not the container's", strange.local);
            }
        }

        if self.installation.is_none() {
            let namespace = self.network.namespace().map(NetNs::try_clone).transpose()?;
            let floating = self.plan.floating.is_some();
            if namespace.is_none() && !floating {
                bail!("connections of a container without a network");
            }
            let tell = tell.clone();
            // The hand-over may have ended already.
            let prepared = move |lacking| drop(tell.send(DestinationInput::Awaited(lacking)));
            self.installation = Some(Installation::start(namespace, floating, prepared)?);
        }

        self.installation.as_ref().map_or(Ok(()), |installation| installation.announce(list))
    }

    /// Puts connections into the tasks that CRIU has restored.
    fn install_connections(&mut self, init: i32, came: usize) -> Result<()> {
        let Some(installation) = self.installation.take() else {
            if came > 0 {
                bail!("connections that were not announced");
            }
            return Ok(());
        };
        let installed = installation.finish()?;
        self.mark("connections made");
        if installed.count() != came {
            bail!("{came} connections were sent, {} have come", installed.count());
        }
        installed.install(&Cgroup::of_process(init)?.processes()?)?;
        self.installed = Some(installed);
        self.mark("connections landed");
        Ok(())
    }

    /// Has the tasks that CRIU has restored hold the locks that they held on the source.
    fn hold_locks(&mut self, init: i32, held: &[HeldLock]) -> Result<()> {
        if !held.is_empty() {
            locks::hold(&Cgroup::of_process(init)?.processes()?, held)?;
            self.mark("locks held");
        }
        Ok(())
    }

    /// One more link that brings memory. Whoever brought it waits until it is dropped.
    fn join(
        &mut self,
        input: OwnedFd,
        output: OwnedFd,
        held: UnixStream,
        stage: &Stage,
        tell: &Sender<DestinationInput>,
    ) -> Result<()> {
        if self.channels.len() >= MAX_CHANNELS {
            bail!("more than {MAX_CHANNELS} further links");
        }
        let (peer, reader, _) = session::split(connect::adopt(input, output)?);
        peer.send(&Message::Joined)?;
        let tell = tell.clone();
        receiver::listen_channel(reader, peer, stage, move |why| {
            // The hand-over may have ended already.
            let _ = tell.send(DestinationInput::ChannelEnded(why));
        })?;
        self.channels.push(held);
        Ok(())
    }

    /// A piece of an image file, or of a log.
    fn file(&mut self, name: &str, at: u64, bytes: &[u8]) -> Result<()> {
        self.backlog.done(bytes.len());
        if name == connections::STREAM {
            let installation = self.installation.as_ref();
            let installation =
                installation.ok_or_else(|| anyhow!("connections that were not announced"))?;
            return installation.feed(bytes.to_vec());
        }
        if name == IMAGE {
            let engine = self.engine.as_mut().ok_or_else(|| anyhow!("an image of no engine's"))?;
            return engine.image_bytes(at, bytes);
        }
        if name == LOG {
            let engine = self.engine.as_mut().ok_or_else(|| anyhow!("a log of no engine's"))?;
            return engine.log(at, bytes);
        }
        if name == STREAM {
            let applying = self.applying.as_ref();
            return applying.ok_or_else(|| anyhow!("files that were not announced"))?.feed(bytes);
        }
        match name.strip_prefix("stream-") {
            Some(number) => self.streams.write(number, at, bytes),
            None => self.images.write(name, at, bytes),
        }
    }

    fn begin_restore(&mut self, stage: &Stage) -> Result<()> {
        self.doing = "restoring";
        self.began = Instant::now();
        self.images.close();
        shared::finish(&self.work.images(), stage)?;
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
        if let Some(engine) = &self.engine {
            engine.fill(&self.work.images())?;
            self.mark("the engine's root file system is filled");
        }
        self.mark("restore begins");
        self.tell_restore(RestoreOrder::Restore)
    }

    /// Makes the places of the trees that are copied, and whoever fills them.
    fn take_files(&mut self, tell: &Sender<DestinationInput>) -> Result<()> {
        self.doing = "taking files in";
        let placing = &self.journal.record.placing;
        let mut staged = Vec::new();
        if let Some(coming) = &self.incoming.coming {
            coming.stage()?;
            staged = coming.staged();
        }
        staged.extend(placing.stage(&self.plan.parents)?);
        let (_, there) = destination_checks::bundle_here(&self.plan)?;
        if !there && self.engine.is_none() {
            let config = serde_json::to_vec_pretty(&self.plan.config)?;
            placing.write(&self.plan.bundle.join("config.json"), &config)?;
        }
        let roots: Vec<_> = staged.into_iter().zip(self.incoming.sizes.iter().copied()).collect();
        let tell = tell.clone();
        // The hand-over may have ended already.
        let told = move |applied| drop(tell.send(DestinationInput::Files(applied)));
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

    pub(super) fn tell_restore(&self, go: RestoreOrder) -> Result<()> {
        let job = self.restore.as_ref().ok_or_else(|| anyhow!("no restore under way"))?;
        job.go.send(go).map_err(|_| anyhow!("the restore has ended"))
    }

    /// Whoever goes on if this process is killed: there before the container is frozen, as nobody has
    /// time for that afterwards.
    fn begin_guard(&mut self) -> Result<()> {
        let will = Arc::new(Will::new()?);
        self.guard = Some(PageGuards::start(&self.journal, will.clone())?);
        self.will = Some(will);
        Ok(())
    }

    /// All pages are here: into the tasks with them.
    fn serve(
        &mut self,
        tasks: &[i32],
        server: Server,
        stage: &Stage,
        tell: &Sender<DestinationInput>,
    ) -> Result<()> {
        let pagemaps = self.pagemaps(tasks)?;
        let will = self.will.clone().ok_or_else(|| anyhow!("nobody would go on"))?;
        // The hand-over may have ended already.
        let (wanted, made, ended) = (tell.clone(), tell.clone(), tell.clone());
        let want = move |run| drop(wanted.send(DestinationInput::Want(run)));
        let ready = move || drop(made.send(DestinationInput::Guarded));
        let end = move |e| drop(ended.send(DestinationInput::Pages(e)));
        stage.serve(|staging| server.start(staging, &pagemaps, will, want, ready, end))?;
        self.mark("last page is here");
        Ok(())
    }
}
