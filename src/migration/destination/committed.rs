//! The copy is ours: it is let run, its memory and its files come in, and everybody is told. No way
//! back.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Error, Result, anyhow};

use super::outstanding::{Outstanding, ToTell};
use super::{DestinationInput, DestinationInputs, IncomingMigration, RESTORE_LIMIT};
use crate::connections::Installed;
use crate::criu::barrier;
use crate::memory::serve::{Ended, Served};
use crate::migration::checkpoint::restore::{RestoreEvent, RestoreOrder};
use crate::migration::checkpoint::streams::Streams;
use crate::migration::journal::{State, criu};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::migration::protocol::{self, Message, Standing};
use crate::migration::recovery::decide::{CopyEvent, hear};
use crate::migration::recovery::undo;
use crate::migration::recovery::verdicts::ControlCall;
use crate::migration::transfer::receiver::{self, Current, Stage, send_missing, want};
use crate::oci::cgroup::Cgroup;
use crate::report::exit::ToldError;
use crate::sys::{fault, process};
use crate::tasks::waits;
use crate::transport::connect;
use crate::transport::frame::Frame;

/// Time that a task may take to come to a call that it begins anew, where it has to be brought memory.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who is told on this host, and where what comes is kept.
pub(super) struct Around<'a> {
    /// What happens beside the thread that decides is told here.
    pub(super) tell: &'a Sender<DestinationInput>,
    /// Memory that has come.
    pub(super) stage: &'a Stage,
    /// The link that is the latest.
    pub(super) current: &'a Current,
}

/// Why there is no container after all.
enum NoContainer {
    /// It could not be let run, or not with all of its memory. The descriptors are those that whoever
    /// misses a page waits on: closed when his tasks have ended.
    Failed(Error, Vec<OwnedFd>),
    /// The operator knows that nobody will bring the rest.
    Discarded(Sender<Standing>),
    /// Nobody waits for the rest of its memory any more, and nobody brings it.
    Lost,
}

/// A migration whose container runs here, or is about to.
pub(super) struct CommittedMigration<'a> {
    migration: IncomingMigration,
    todo: Outstanding,
    peer: PeerWriter,
    around: Around<'a>,
    /// As long as the latest link is ours to use, whoever brought it waits.
    brought: Option<UnixStream>,
    /// Has tasks wait for no longer than they should.
    waits: Option<JoinHandle<()>>,
}

impl<'a> CommittedMigration<'a> {
    /// Writes the commit down, and lets it go on from where it is held.
    ///
    /// # Errors
    /// When it cannot be written down: then all is undone, and the source takes it back.
    pub(super) fn commit(
        mut migration: IncomingMigration,
        mut todo: Outstanding,
        peer: PeerWriter,
        around: Around<'a>,
    ) -> Result<CommittedMigration<'a>> {
        migration.mark("commit");
        let _ = fault::point("destination.commit");

        // From here on it is the guard who goes on if this process is killed.
        if let (Some(guard), Some(criu)) = (&mut migration.guard, migration.release.take()) {
            guard.take_criu(criu);
        }
        if let Err(e) = migration.journal.note(State::Committed) {
            // Nothing runs of which that is not known: the source takes it back.
            let undone = migration.undo(Vec::new());
            let _ = peer.send(&Message::failed("starting", &e));
            return Err(undone.err().unwrap_or_else(|| ToldError(e).into()));
        }

        // From here on what was made is the container's: no error may take it away again but one
        // that says that there is no container.
        migration.streams = Streams::default();
        let _ = fault::point("destination.committed");

        // Before anything can run that would find them asleep.
        migration.installed.iter().for_each(Installed::wake);

        // If it has ended, that stands in the queue.
        let _ = migration.tell_restore(RestoreOrder::Verdict(true));
        // Beside what CRIU has to do yet.
        if let Some(init) = migration.journal.record.init {
            migration.network.make_room(init.pid);
        }
        todo.served = migration.pages.take().and_then(|ended| ended.result.ok());
        migration.bring_to_disk(around.tell);

        Ok(CommittedMigration { migration, todo, peer, around, brought: None, waits: None })
    }

    /// Goes on until nobody has anything to do for it any more, here or there.
    ///
    /// # Errors
    /// When there is no container after all: CRIU has died, its memory cannot be put in or was lost.
    pub(super) fn go_on(mut self, inputs: &DestinationInputs) -> Result<()> {
        while !self.todo.is_over() {
            match inputs.queue.recv_timeout(fault::limit(RESTORE_LIMIT)) {
                Ok(input) => {
                    if let Err(why) = self.hear(input) {
                        return Err(self.end(why));
                    }
                }
                Err(_) => self.todo = self.todo.after_silence(),
            }

            while let Some(what) = self.todo.untold() {
                self.todo.link &= match what {
                    ToTell::Running => self.migration.say_running(&self.peer),
                    ToTell::Whole(served) => self.migration.say_whole(&self.peer, served),
                };
                self.todo.told(what);
            }

            if self.todo.is_lost() {
                return Err(self.end(NoContainer::Lost));
            }
        }

        drop(self.brought);
        // It works in the tasks: not to be ended in the middle of that.
        let _ = self.waits.map(JoinHandle::join);

        self.migration.settle_in(self.todo.finished)
    }

    fn hear(&mut self, input: DestinationInput) -> Result<(), NoContainer> {
        match input {
            DestinationInput::Restore(event) => return self.hear_restore(event),
            DestinationInput::Call(call) => return self.hear_call(call),
            DestinationInput::FromPeer(heard) => self.hear_peer(heard),
            DestinationInput::Pages(Ended { result: Ok(all), .. }) => {
                self.todo.served = Some(all);
                if self.todo.running {
                    undo::note_all_in(&self.migration.work);
                }
            }
            DestinationInput::Pages(Ended { result: Err(e), held }) => {
                let failed = e.context("not all of its memory can be put into the container");
                return Err(NoContainer::Failed(failed, held));
            }
            DestinationInput::Want(run) => self.todo.link &= want(&self.peer, run).is_ok(),
            DestinationInput::Noted => self.todo.noted = true,
            DestinationInput::Synced => self.todo.synced = true,
            DestinationInput::Led => self.todo.led = true,
            DestinationInput::TasksEnded => self.todo.alive = false,
            // What the restore was to wait for is over, and a signal is no verdict.
            DestinationInput::Signal(_)
            | DestinationInput::ChannelEnded(_)
            | DestinationInput::Files(_)
            | DestinationInput::Guarded
            | DestinationInput::Engaged(_)
            | DestinationInput::Settled(_)
            | DestinationInput::Awaited(_) => {}
        }
        Ok(())
    }

    fn hear_restore(&mut self, event: RestoreEvent) -> Result<(), NoContainer> {
        match event {
            RestoreEvent::Released(opened) => {
                let heard = self.around.tell.clone();
                let led = move || drop(heard.send(DestinationInput::Led));
                self.todo.led = !self.migration.network.open(opened, led);
                self.migration.mark("fence open");
                let _ = fault::point("destination.open");
            }
            RestoreEvent::AtResume => {
                self.migration.mark("sockets alive");
                self.migration.network.replay();
                let _ = self.migration.tell_restore(RestoreOrder::Resume);
            }
            RestoreEvent::Running => self.it_runs(),
            RestoreEvent::Ended(result) => {
                self.todo.restored = true;
                if let Err(e) = result
                    && !self.todo.running
                {
                    self.migration.note_unstarted();
                    let failed = e.context("the copy died after the commit");
                    return Err(NoContainer::Failed(failed, Vec::new()));
                }
            }
            // It has been restored, and the verdict was spoken.
            RestoreEvent::AtRequest(_) | RestoreEvent::Restored(..) | RestoreEvent::Died => {}
        }
        Ok(())
    }

    fn it_runs(&mut self) {
        let migration = &mut self.migration;
        self.todo.running = true;
        migration.mark("running");
        self.waits = migration.have_them_wait();
        migration.watch_tasks(self.around.tell);
        if self.todo.served.is_some() {
            undo::note_all_in(&migration.work);
        }

        // What the container closes is to be closed, from now on.
        migration.installed.take().into_iter().for_each(Installed::settle);
        let _ = fault::point("destination.running");
        migration.network.replay();
        migration.network.announce();
        if !self.todo.synced {
            migration.sync(self.around.tell);
        }
    }

    fn hear_peer(&mut self, heard: FromPeer) {
        match heard {
            FromPeer::Frame(Frame::Packet(bytes)) => {
                // A damaged one is the sender's timer's business.
                let _ = self.migration.network.keep(&bytes);
                if self.todo.running {
                    self.migration.network.replay();
                }
            }
            FromPeer::Frame(_) => {}
            FromPeer::Message(message) => {
                self.todo.hear(&message).unwrap_or_else(|e| tracing::warn!("{e:#}"));
            }
            FromPeer::Gone(_) => self.todo.link = false,
        }
    }

    fn hear_call(&mut self, call: ControlCall) -> Result<(), NoContainer> {
        match call {
            ControlCall::Link(input, output, held) => self.take_link(input, output, held),
            ControlCall::Discard(reply) if self.todo.lacks() => {
                return Err(NoContainer::Discarded(reply));
            }
            ControlCall::Discard(reply) => drop(reply.send(self.todo.stays())),
            ControlCall::Verdict(verdict, reply) => {
                let event = verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict);
                if let (_, Some(standing)) = hear(self.todo.phase(), event) {
                    let _ = reply.send(standing);
                }
            }
            ControlCall::Channel(..) => {}
        }
        Ok(())
    }

    /// The source has come back, after the link was gone.
    fn take_link(&mut self, input: OwnedFd, output: OwnedFd, held: UnixStream) {
        tracing::info!("the source is back over a new link");
        let heard = self.around.tell.clone();
        let hear = move |h| heard.send(DestinationInput::FromPeer(h)).is_ok();
        let (stage, current) = (self.around.stage, self.around.current);
        let backlog = &self.migration.backlog;
        let taken = connect::adopt(input, output).and_then(|new| {
            let (other, reader, _) = session::split(new);
            receiver::listen(reader, &other, stage, current, backlog, hear)?;
            Ok(other)
        });

        match taken {
            Ok(other) => self.peer = other,
            // It hears nothing, and comes again.
            Err(e) => return tracing::error!("the new link to the source: {e:#}"),
        }

        drop(self.brought.replace(held));
        self.todo.link = match self.todo.served {
            Some(served) if self.todo.told_whole => self.migration.say_whole(&self.peer, served),
            _ => send_missing(&self.peer, stage).is_ok(),
        };
    }

    /// There is no container after all. First of all what is left of it goes, so that nobody takes that
    /// for one that runs: the source still has it, frozen, unless it ran here. Then who asks hears it.
    fn end(self, why: NoContainer) -> Error {
        let (migration, peer) = (self.migration, self.peer);
        match why {
            NoContainer::Failed(why, held) => {
                let undone = migration.undo(held);
                let _ = peer.send(&Message::failed("starting", &why));
                undone.err().unwrap_or(why)
            }
            NoContainer::Discarded(reply) => match migration.undo(Vec::new()) {
                Ok(()) => {
                    let _ = reply.send(Standing::Gone);
                    anyhow!("it was ended before it had all of its memory, by the operator's word")
                }
                Err(e) => e,
            },
            NoContainer::Lost => match migration.undo(Vec::new()) {
                Ok(()) => anyhow!("its tasks have ended before all of its memory was there"),
                Err(e) => e,
            },
        }
    }
}

impl IncomingMigration {
    /// Writes it down where what is to be ended has not run: the source may take it back then, and need not ask
    /// an operator. Of what may have run, it only has an older state.
    fn note_unstarted(&mut self) {
        let record = &self.journal.record;
        criu::end_restore(&record.work);
        // As long as it is there it may let them out.
        let kept = criu::is_gone(&record.work)
            && record.init.is_some_and(|init| {
                init.is_alive() && barrier::is_kept(init.pid, &self.work.images())
            });
        if kept && let Err(e) = self.journal.write(State::Unstarted) {
            tracing::error!("{e:#}");
        }
    }

    /// What has begun to wait anew is to wait for no longer than it should. Beside all else: a task may
    /// have to be brought memory for it.
    fn have_them_wait(&self) -> Option<JoinHandle<()>> {
        let init = self.journal.record.init?.pid;
        let work = move || {
            let pids = Cgroup::of_process(init).and_then(|cgroup| cgroup.processes());
            if let Some(problem) = pids.ok().and_then(|pids| waits::go_on(&pids, PATIENCE)) {
                tracing::warn!("{problem}");
            }
        };
        std::thread::Builder::new().name("waits".into()).spawn(work).ok()
    }

    /// Tells when the container's init has ended.
    fn watch_tasks(&self, tell: &Sender<DestinationInput>) {
        let Some(init) = self.journal.record.init else { return };
        let Ok(pidfd) = process::pidfd_open(init.pid) else {
            return drop(tell.send(DestinationInput::TasksEnded));
        };
        let tell = tell.clone();
        let watch = move || {
            if process::wait_readable(&[pidfd.as_fd()], None).is_ok() {
                let _ = tell.send(DestinationInput::TasksEnded);
            }
        };
        // Without it, only the operator's word ends what is missing memory.
        let _ = std::thread::Builder::new().name("tasks".into()).spawn(watch);
    }

    /// Brings to the disk, while the container starts, that it may have run here: what this host says of
    /// it when it has gone down must be what it has said before.
    fn bring_to_disk(&self, tell: &Sender<DestinationInput>) {
        let (sync, tell) = (self.journal.syncing(), tell.clone());
        let work = move || {
            let _ = fault::point("destination.noted");
            if let Err(e) = sync() {
                // It runs all the same.
                tracing::error!("{e:#}");
            }
            let _ = tell.send(DestinationInput::Noted);
        };
        run_beside("note", work);
    }

    /// Tells the source that it runs; whether it could be told.
    fn say_running(&mut self, peer: &PeerWriter) -> bool {
        let arrival = protocol::Arrival {
            pid: self.journal.record.init.map_or(0, |init| init.pid),
            marks: self.marks.clone(),
            packets: self.network.replayed,
            changed: std::mem::take(&mut self.changed),
        };
        peer.send(&Message::Running(Box::new(arrival))).is_ok()
    }

    /// Brings the copies to the disk, while the container runs.
    fn sync(&self, tell: &Sender<DestinationInput>) {
        let (placing, tell) = (self.journal.record.placing.clone(), tell.clone());
        let work = move || {
            if let Err(e) = placing.sync() {
                // The container runs on them all the same; the journal's own disk may be another.
                tracing::error!("what was copied may not be on the disk: {e:#}");
            }
            let _ = tell.send(DestinationInput::Synced);
        };
        run_beside("sync", work);
    }

    /// Tells the source that what is frozen there is needed no more; whether it could be told. The
    /// journal knows it first: who asks later must not be told otherwise.
    fn say_whole(&mut self, peer: &PeerWriter, served: Served) -> bool {
        self.mark("whole");
        // The source may remove its files: what is here must outlast a loss of power by then.
        let noted = if self.incoming.is_empty() {
            self.journal.note(State::Whole)
        } else {
            self.journal.write(State::Whole)
        };
        if let Err(e) = noted {
            tracing::error!("{e:#}");
        }
        peer.send(&Message::MemoryComplete(served)).is_ok()
    }
}

/// On a thread of its own; without one, it takes this one's time.
fn run_beside(name: &str, work: impl Fn() + Clone + Send + 'static) {
    let threaded = std::thread::Builder::new().name(name.into()).spawn(work.clone());
    if threaded.is_err() {
        work();
    }
}
