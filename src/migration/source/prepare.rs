//! Making ready while the container runs: both sides, its files, its memory, the dump up to the freeze.

use anyhow::{Result, anyhow};

use super::inputs::SourceInput;
use super::{FILES_LIMIT, IMAGE_LIMIT, PREPARE_LIMIT, SourceMigration};
use crate::connections::{self, ComingConnection, Extraction};
use crate::criu::hidden;
use crate::criu::interposer::Interposer;
use crate::engine::handover;
use crate::engine::image::ImageCourse;
use crate::files::tmpfs::Tmpfs;
use crate::memory::rounds::Tracking;
use crate::memory::shared::SharedMemory;
use crate::migration::checkpoint::dump::{DumpEvent, DumpJob, DumpPlan};
use crate::migration::forwarding as forward;
use crate::migration::network::hooks::Hooks;
use crate::migration::preflight::host;
use crate::migration::protocol::Message;
use crate::migration::protocol::session::FromPeer;
use crate::migration::transfer::channels::Channel;
use crate::migration::transfer::file_sender::{self, FileEvent, FileTransfer};
use crate::migration::transfer::image_sender::{self, ImageEvent};
use crate::migration::transfer::memory_sender::{MemoryEvent, MemoryOrder, MemoryTransfer};
use crate::network::hook::About;
use crate::network::sockets::SockDiag;
use crate::network::{Hook, HostSide, Placement};
use crate::oci::cgroup::Cgroup;
use crate::report::progress::Reporter;
use crate::sys::netns::NetNs;
use crate::sys::{arch, fault, mntns};
use crate::tasks::epoll;
use crate::tasks::losses::{self, Scene, watches};

impl SourceMigration {
    pub(super) fn prepare(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.prepare")?;
        self.peer.send(&Message::Prepare)?;
        self.inputs.until(PREPARE_LIMIT);
        self.open_channels()?;
        self.copy_image(reporter)?;
        self.send_papers()?;

        // First, and alone: memory would only change while files go.
        self.copy_files(reporter)?;
        let mut joined = !self.start_forwarding()?;
        self.prepare_hook()?;
        self.start_dump()?;
        let tell = self.inputs.tell.clone();
        let told = move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(SourceInput::Memory(event));
        };

        let (wishes, cgroup) = (self.memory_options.clone(), &self.subject.cgroup);
        let shared = self.shared.clone();
        self.memory =
            Some(MemoryTransfer::start(cgroup, &self.peer, &self.channels, wishes, shared, told)?);
        self.send_streams(false)?;

        let (mut prepared, mut at_freeze, mut settled, mut early) = (false, false, false, false);
        while !(prepared && at_freeze && settled && joined && self.unanswered == 0) {
            match self.next(reporter)? {
                SourceInput::Joined(_) => {
                    reporter.mark("the way to forward stands");
                    joined = true;
                }
                SourceInput::FromPeer(FromPeer::Message(Message::Prepared)) => {
                    reporter.mark("destination is ready");
                    prepared = true;
                    self.announce_connections()?;
                }
                SourceInput::FromPeer(FromPeer::Message(Message::Awaited { lacking })) => {
                    self.await_answer(&lacking)?;
                }
                SourceInput::Dump(DumpEvent::AtFreeze) => at_freeze = true,
                SourceInput::Files(FileEvent::Converged) => {}
                SourceInput::Memory(MemoryEvent::Converged(next)) => {
                    reporter.settled(next);
                    // An engine takes its time to make a container: memory has changed meanwhile.
                    settled = self.subject.plan.engine.is_none() || prepared;
                    early = !settled;
                    self.engage()?;
                }
                _ => {}
            }

            if prepared && std::mem::take(&mut early) {
                self.tell_memory(MemoryOrder::Again)?;
            }
        }

        if self.tell_files(file_sender::FileOrder::Again) {
            // What has changed while memory went.
            self.inputs.until(FILES_LIMIT);
            while !matches!(self.next(reporter)?, SourceInput::Files(FileEvent::Converged)) {}
        }

        Ok(())
    }

    /// Where files are copied: until little is left to copy, and what there is has its place.
    pub(super) fn copy_files(&mut self, reporter: &mut Reporter) -> Result<()> {
        let Some(load) = self.subject.load.clone() else { return Ok(()) };
        let tell = self.inputs.tell.clone();
        let told = move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(SourceInput::Files(event));
        };
        self.inputs.until(FILES_LIMIT);
        // What is written through an overlay, the kernel does not tell of the file system below.
        let listen = self.memory_options.tracking != Tracking::Hash && load.merged.is_none();
        let cgroup = &self.subject.cgroup;
        let pace = &self.memory_options.pace;
        self.file_transfer =
            Some(FileTransfer::start(&load, listen, cgroup, (&self.peer, pace), told)?);
        while !matches!(self.next(reporter)?, SourceInput::Files(FileEvent::Converged)) {}
        reporter.files_settled();
        fault::point("source.copied")?;
        self.inputs.until(PREPARE_LIMIT);
        self.peer.send(&Message::Copied)
    }

    /// Where the destination's engine lacks the image: until it has it.
    fn copy_image(&mut self, reporter: &mut Reporter) -> Result<()> {
        let (Some(wanted), ImageCourse::Copied { there }) =
            (&self.subject.plan.engine, self.subject.engine.image)
        else {
            return Ok(());
        };

        fault::point("source.image")?;
        let tell = self.inputs.tell.clone();
        let told = move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(SourceInput::Image(event));
        };
        reporter.phase("copy-image", "copying the image");
        self.inputs.until(IMAGE_LIMIT);
        let link = (&self.peer, &self.memory_options.pace);
        image_sender::start(wanted.engine, &wanted.image, there, link, told)?;

        loop {
            match self.next(reporter)? {
                SourceInput::Image(ImageEvent::Done(bytes)) => {
                    reporter.image_sent(bytes);
                    self.inputs.again();
                }
                SourceInput::FromPeer(FromPeer::Message(Message::ImageTaken)) => break,
                _ => {}
            }
        }

        reporter.mark("the engine there has the image");
        self.inputs.until(PREPARE_LIMIT);
        Ok(())
    }

    /// Returns what its engine knows of it.
    pub(super) fn send_papers(&mut self) -> Result<()> {
        let plan = &self.subject.plan;
        let Some(wanted) = &plan.engine else { return Ok(()) };
        let engine = handover::of(wanted.engine).ok_or_else(|| anyhow!("an unknown engine"))?;
        let papers = engine.papers(&plan.container, self.runtime.root(), &self.work)?;
        fault::point("source.papers")?;
        self.peer.send(&Message::Papers(Box::new(papers)))
    }

    /// Once, when most of the memory has gone: the destination's engine is to make the container.
    pub(super) fn engage(&mut self) -> Result<()> {
        if self.subject.plan.engine.is_none() || std::mem::replace(&mut self.engaged, true) {
            return Ok(());
        }
        self.peer.send(&Message::Engage)
    }

    /// Where the address stays: a link from its home to the destination. Whether one is being made.
    pub(super) fn start_forwarding(&mut self) -> Result<bool> {
        let Some((namespace, _, image)) = &self.subject.network else { return Ok(false) };
        let wanted =
            forward::steps::establish(&self.journal.record, &self.subject.plan, namespace, image)?;
        if wanted {
            let (record, tell) = (self.journal.record.clone(), self.inputs.tell.clone());
            // The hand-over may have ended already.
            let join = move || drop(tell.send(SourceInput::Joined(forward::steps::join(&record))));
            std::thread::Builder::new().name("join".into()).spawn(join)?;
        }
        Ok(wanted)
    }

    /// Tells whether there is somebody to tell.
    pub(super) fn tell_files(&self, order: file_sender::FileOrder) -> bool {
        self.file_transfer.as_ref().is_some_and(|files| files.orders.send(order).is_ok())
    }

    /// The further links that are wished for, as soon as the destination takes them.
    pub(super) fn open_channels(&mut self) -> Result<()> {
        if self.memory_options.streams < 2 {
            return Ok(());
        }
        while !matches!(
            self.inputs.next()?,
            SourceInput::FromPeer(FromPeer::Message(Message::AcceptChannels))
        ) {}
        let destination = self.journal.record.destination.clone();
        let destination = destination.ok_or_else(|| anyhow!("no destination is known"))?;
        let migration = &self.subject.plan.migration;
        for number in 1..self.memory_options.streams {
            let tell = self.inputs.tell.clone();
            let told = move |echo| tell.send(SourceInput::Channel(number, echo)).is_ok();
            self.channels.push(Channel::open(&destination, migration, told)?);
        }
        Ok(())
    }

    /// Where the user has named a network hook.
    pub(super) fn prepare_hook(&mut self) -> Result<()> {
        if let (Placement::Hook(program), Some((_, netns, image))) =
            (&self.subject.plan.placement, &self.subject.network)
        {
            let record = &self.journal.record;
            let about = About {
                role: "source",
                migration: &record.migration,
                container: &record.container,
                peer: &record.peer,
                netns,
            };
            self.hooks = Some(Hooks::prepare(Hook::new(program, about, image), &self.work)?);
        }
        Ok(())
    }

    pub(super) fn start_dump(&mut self) -> Result<()> {
        let (criu, version) = host::criu()?;
        let plan = &self.subject.plan;
        let network = self.subject.container_network();
        let armed = network.arm(&plan.migration, &self.work)?.map(Box::new);
        let side = self.subject.plan.network.as_ref();
        if let Some(side) = side.and_then(|i| HostSide::new(i, &self.subject.plan.migration)) {
            self.work.note_host_side(&side)?;
            self.silence = Some(side.arm(&NetNs::current()?)?);
        }

        let hide = hidden::was_tried(version) && mntns::has_own(self.subject.state.pid);
        let shared = SharedMemory::default();
        self.shared = hide.then(|| shared.clone());
        let plan = DumpPlan {
            runtime: self.runtime.clone(),
            container: self.subject.plan.container.clone(),
            cgroup: self.subject.cgroup.clone(),
            images: self.work.images(),
            work: self.work.criu(),
            tmpfs: self.subject.plan.tmpfs.iter().flat_map(Tmpfs::places).cloned().collect(),
            watched: self.watched()?,
            external: self.subject.plan.streams.iter().filter_map(|s| s.external.clone()).collect(),
            network: armed,
            sock_diag: network.sock_diag(&self.subject.cgroup)?,
            homes: network.homes(),
            interposer: Interposer::new(&self.work, &criu, self.criu_namespace()?)?,
            namespace: self.criu_namespace()?,
            peer: self.peer.clone(),
            orders: self.guard.orders.clone(),
            watch: self.watch.clone(),
            extracted: self.extracted.clone(),
            vouched: epoll::worth_vouching(&self.subject.cgroup.processes()?),
            hide,
            shared,
        };

        let tell = self.inputs.tell.clone();
        self.dump = Some(DumpJob::start(plan, move |event| {
            // The hand-over may have ended already.
            let _ = tell.send(SourceInput::Dump(event));
        })?);

        Ok(())
    }

    /// Paths in the container by which CRIU finds what is watched there.
    fn watched(&self) -> Result<Vec<String>> {
        let tasks = self.subject.cgroup.processes()?;
        let scene = Scene { init: self.subject.state.pid, tasks: &tasks };
        Ok(watches::paths(scene, &losses::files::all(&tasks)))
    }

    pub(super) fn criu_namespace(&self) -> Result<Option<NetNs>> {
        match &self.subject.network {
            Some((namespace, _, _)) if self.subject.plan.criu_inside() => {
                Ok(Some(namespace.try_clone()?))
            }
            _ => Ok(None),
        }
    }

    /// Looks for the container's sockets, where it has a network.
    pub(super) fn sock_diag(&self) -> Result<Option<SockDiag>> {
        self.subject.container_network().sock_diag(&self.subject.cgroup)
    }

    /// Tells the destination of the connections that we shall carry, where there are many.
    pub(super) fn announce_connections(&mut self) -> Result<()> {
        let subject = &self.subject;
        let network = subject.container_network();
        // Where it has no address nobody is connected; elsewhere nothing can be done to frozen tasks.
        if !network.is_there() || !arch::SUPPORTED || !matches!(subject.cgroup, Cgroup::V2(_)) {
            return Ok(());
        }
        let sock_diag = self.sock_diag()?;
        let mut sock_diag = sock_diag.ok_or_else(|| anyhow!("there is no network"))?;
        let mut extraction = Extraction::new(network.namespace(), self.vault.clone(), &self.work)?;
        let coming = extraction.look(&mut sock_diag, &subject.cgroup.processes()?)?;
        if coming.len() < connections::MANY && !coming.iter().any(ComingConnection::listens) {
            return Ok(());
        }
        self.extraction = Some((Box::new(extraction), sock_diag));
        self.announce(&coming)
    }

    /// Announces those that have come since.
    pub(super) fn look_for_connections(&mut self) -> Result<()> {
        let Some((extraction, sock_diag)) = &mut self.extraction else { return Ok(()) };
        let coming = extraction.look(sock_diag, &self.subject.cgroup.processes()?)?;
        self.announce(&coming)
    }

    pub(super) fn announce(&mut self, coming: &[ComingConnection]) -> Result<()> {
        for some in coming.chunks(connections::BATCH) {
            self.peer.send(&Message::Connections { list: some.to_vec() })?;
            self.unanswered += 1;
        }
        Ok(())
    }

    /// The destination has made ready for those of an announcement, but for these.
    pub(super) fn await_answer(&mut self, lacking: &[u32]) -> Result<()> {
        self.unanswered = self.unanswered.saturating_sub(1);
        self.extraction.iter_mut().try_for_each(|(extraction, _)| extraction.leave(lacking))
    }
}
