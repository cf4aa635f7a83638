//! From `Prepare` to a copy that is restored and held.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::{Guest, Input, Inputs, MAX_LANES, RESTORE_LIMIT, SILENCE};
use crate::connections::{self, Coming, Landing};
use crate::criu::interposer::Interposer;
use crate::files::apply::{Applied, Applying};
use crate::files::tmpfs::{Mounted, Tmpfs};
use crate::files::tree;
use crate::memory::serve::Server;
use crate::memory::will::Will;
use crate::migration::checkpoint::restore::{Go, RestoreEvent, RestoreJob, RestorePlan};
use crate::migration::journal::{State, workdir};
use crate::migration::preflight::{checks, host};
use crate::migration::protocol::talk::{self, Heard, Speaker};
use crate::migration::protocol::{MAX_TASKS, Message};
use crate::migration::recovery::settle::{self, Call};
use crate::migration::recovery::successors::PageGuards;
use crate::migration::transfer::intake::{self, Stage, want};
use crate::migration::transfer::parcels::STREAM;
use crate::oci::cgroup::Cgroup;
use crate::oci::warm::Warm;
use crate::sys::netns::NetNs;
use crate::sys::{fault, process};
use crate::tasks::locks::{self, Held};
use crate::tasks::settings;
use crate::transport::connect;
use crate::transport::frame::Frame;

impl Guest {
    pub(super) fn until_ready(
        &mut self,
        speaker: &Speaker,
        inputs: &mut Inputs,
        tell: &Sender<Input>,
        stage: &Stage,
    ) -> Result<()> {
        fault::point("destination.prepare")?;
        self.streams.open(&self.plan)?;
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
        let (mut warm, mut came, mut held, mut set) = (None, 0, Vec::new(), Vec::new());
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
                Input::Heard(Heard::Message(Message::Connections { list })) => {
                    self.await_connections(list, tell)?;
                }
                Input::Awaited(lacking) => speaker.say(&Message::Awaited { lacking })?,
                Input::Heard(Heard::Message(Message::Dumped {
                    tasks,
                    connections,
                    locks,
                    settings,
                })) => {
                    let too_many = locks.len() > locks::MOST || settings.len() > settings::MOST;
                    if tasks.len() > MAX_TASKS || too_many {
                        bail!(
                            "a container of {} tasks, {} locks, {} settings",
                            tasks.len(),
                            locks.len(),
                            settings.len()
                        );
                    }
                    fault::point("destination.restore")?;
                    self.begin_restore()?;
                    dumped = Some(tasks);
                    (came, held, set) = (connections, locks, settings);
                }
                Input::Heard(Heard::Message(Message::MemoryDone { left })) => {
                    self.left = left;
                    memory_done = true;
                }
                Input::Restore(RestoreEvent::Restored(pid, criu)) => {
                    self.release = Some(criu);
                    let init = process::start_time(pid).map(|t| (pid, t));
                    self.journal.record.init = init;
                    self.mark("restored");
                    self.land_connections(pid, came)?;
                    self.hold_locks(pid, &held)?;
                    self.changed = settings::set(&Cgroup::of_process(pid)?.processes()?, &set)?;
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
        while !self.guard.as_ref().is_some_and(PageGuards::can_go_on) {
            // CRIU was quicker than the last pages, or than whoever takes its tasks in.
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
        if let (true, Some(tasks)) = (self.plan.verify, &dumped) {
            self.verify(tasks, speaker, inputs)?;
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
        // Its end may be on its way still.
        if self.criu().is_some_and(|criu| !process::lives(criu)) {
            bail!("CRIU was killed when it had restored");
        }
        speaker.say(&Message::Ready)?;
        fault::point("destination.said-ready")
    }

    /// The CRIU that restores.
    fn criu(&self) -> Option<i32> {
        let text = fs::read_to_string(self.work.work().join(workdir::CRIU_PID)).ok()?;
        text.trim().parse().ok()
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

    /// Prepares for connections that will come beside the images.
    fn await_connections(&mut self, list: Vec<Coming>, tell: &Sender<Input>) -> Result<()> {
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
        if self.landing.is_none() {
            let namespace = self.network.namespace().map(NetNs::try_clone).transpose()?;
            let floating = self.plan.floating.is_some();
            if namespace.is_none() && !floating {
                bail!("connections of a container without a network");
            }
            let tell = tell.clone();
            // The hand-over may have ended already.
            let prepared = move |lacking| drop(tell.send(Input::Awaited(lacking)));
            self.landing = Some(Landing::start(namespace, floating, prepared)?);
        }
        self.landing.as_ref().map_or(Ok(()), |landing| landing.announce(list))
    }

    /// Puts connections into the tasks that CRIU has restored.
    fn land_connections(&mut self, init: i32, came: usize) -> Result<()> {
        let Some(landing) = self.landing.take() else {
            if came > 0 {
                bail!("connections that were not announced");
            }
            return Ok(());
        };
        let landed = landing.finish()?;
        self.mark("connections made");
        if landed.count() != came {
            bail!("{came} connections were sent, {} have come", landed.count());
        }
        landed.land(&Cgroup::of_process(init)?.processes()?)?;
        self.landed = Some(landed);
        self.mark("connections landed");
        Ok(())
    }

    /// Has the tasks that CRIU has restored hold the locks that they held on the source.
    fn hold_locks(&mut self, init: i32, held: &[Held]) -> Result<()> {
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
        if name == connections::STREAM {
            let landing = self.landing.as_ref();
            let landing = landing.ok_or_else(|| anyhow!("connections that were not announced"))?;
            return landing.feed(bytes.to_vec());
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
        staged.extend(placing.stage(&self.plan.parents)?);
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

    pub(super) fn tell_restore(&self, go: Go) -> Result<()> {
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
        let pagemaps = self.pagemaps(tasks)?;
        let will = Arc::new(Will::new()?);
        self.guard = Some(PageGuards::start(&self.journal, will.clone())?);
        // The hand-over may have ended already.
        let (wanted, made, ended) = (tell.clone(), tell.clone(), tell.clone());
        let want = move |vpid, at, pages| drop(wanted.send(Input::Want(vpid, at, pages)));
        let ready = move || drop(made.send(Input::Guarded));
        let end = move |e| drop(ended.send(Input::Pages(e)));
        stage.serve(|staging| server.start(staging, &pagemaps, will, want, ready, end))?;
        self.mark("last page is here");
        Ok(())
    }
}
