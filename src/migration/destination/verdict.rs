//! What becomes of the copy that is held, and how it is let run.

use std::os::fd::AsFd;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail};

use super::outstanding::{Outstanding, ToTell};
use super::phase::{Phase, Ready};
use super::{DestinationInput, DestinationInputs, IncomingMigration, RESTORE_LIMIT, SILENCE};
use crate::connections::Installed;
use crate::criu::barrier;
use crate::memory::serve::{Ended, Served};
use crate::migration::checkpoint::restore::{RestoreEvent, RestoreOrder};
use crate::migration::checkpoint::streams::Streams;
use crate::migration::journal::{State, criu};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::migration::protocol::{self, Message, Standing, Verdict};
use crate::migration::recovery::decide::{Act, CopyEvent, hear};
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

impl IncomingMigration {
    /// Restored and held: the source decides, however long it takes. What is to come if it is ours.
    pub(super) fn await_verdict(
        &mut self,
        mut ready: Ready,
        peer: &PeerWriter,
        inputs: &mut DestinationInputs,
    ) -> Option<Outstanding> {
        let phase = ready.phase();
        loop {
            let mut failed = None;
            let input = match inputs.queue.recv_timeout(fault::limit(SILENCE)) {
                Ok(input) => input,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return None,
            };

            let event = match input {
                DestinationInput::FromPeer(FromPeer::Message(Message::Commit)) => {
                    CopyEvent::Verdict(Verdict::Commit)
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Abort { .. })) => {
                    CopyEvent::Verdict(Verdict::Abort)
                }
                DestinationInput::FromPeer(FromPeer::Frame(Frame::Packet(bytes))) => {
                    // A damaged one is the sender's timer's business.
                    let _ = self.network.keep(&bytes);
                    continue;
                }
                DestinationInput::Call(ControlCall::Verdict(verdict, reply)) => {
                    let event = verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict);
                    if let (_, Some(standing)) = hear(phase, event) {
                        // Whoever asked may have gone.
                        let _ = reply.send(standing);
                    }
                    event
                }
                DestinationInput::Call(ControlCall::Discard(reply)) => {
                    let event = CopyEvent::Verdict(Verdict::Abort);
                    if let (_, Some(standing)) = hear(phase, event) {
                        let _ = reply.send(standing);
                    }
                    event
                }
                DestinationInput::Pages(Ended { result: Ok(served), held }) => {
                    self.pages = Some(Ended { result: Ok(served), held });
                    continue;
                }
                // Its memory cannot be put into it; there is nothing that could run.
                DestinationInput::Pages(Ended { result: Err(e), .. }) => {
                    failed = Some(format!("{e:#}"));
                    CopyEvent::Broken
                }
                // The copy has died while it was held; there is nothing to run any more.
                DestinationInput::Restore(RestoreEvent::Ended(_) | RestoreEvent::Died) => {
                    failed = Some("the restored copy was killed while it waited".to_owned());
                    CopyEvent::Broken
                }
                DestinationInput::Want(run) => {
                    drop(want(peer, run));
                    continue;
                }
                DestinationInput::FromPeer(FromPeer::Gone(_)) => {
                    ready.link = false;
                    CopyEvent::Unlinked
                }
                DestinationInput::FromPeer(FromPeer::Message(message)) => {
                    tracing::warn!("{:#}", Phase::Ready(ready).refuse_message(&message));
                    continue;
                }
                // A signal is no verdict either.
                DestinationInput::FromPeer(FromPeer::Frame(_))
                | DestinationInput::Restore(_)
                | DestinationInput::Signal(_)
                | DestinationInput::ChannelEnded(_)
                | DestinationInput::Files(_)
                | DestinationInput::Synced
                | DestinationInput::Led
                | DestinationInput::Noted
                | DestinationInput::Guarded
                | DestinationInput::Engaged(_)
                | DestinationInput::TasksEnded
                | DestinationInput::Awaited(_)
                | DestinationInput::Call(ControlCall::Link(..) | ControlCall::Channel(..)) => {
                    continue;
                }
            };

            match hear(phase, event).0 {
                Act::Wait => {}
                Act::Run => return Some(ready.commit(!self.incoming.is_empty())),
                Act::Undo => {
                    if let Some(why) = failed {
                        let (phase, hints) = (self.doing.to_owned(), Vec::new());
                        let _ = peer.send(&Message::Failed { phase, why, hints });
                    }
                    return None;
                }
            }
        }
    }

    /// It is ours: opens the fence, lets it run, tells everybody. No way back.
    pub(super) fn run(
        mut self,
        mut todo: Outstanding,
        mut peer: PeerWriter,
        inputs: &mut DestinationInputs,
        tell: &Sender<DestinationInput>,
        stage: &Stage,
        current: &Current,
    ) -> Result<()> {
        self.mark("commit");
        let _ = fault::point("destination.commit");

        // From here on it is the guard who goes on if this process is killed.
        if let (Some(guard), Some(criu)) = (&mut self.guard, self.release.take()) {
            guard.take_criu(criu);
        }
        if let Err(e) = self.journal.note(State::Committed) {
            // Nothing runs of which that is not known: the source takes it back.
            let undone = self.undo(Vec::new());
            let _ = peer.send(&Message::failed("starting", &e));
            return undone.and(Err(ToldError(e).into()));
        }

        // From here on what was made is the container's: no error may take it away again but one
        // that says that there is no container.
        self.streams = Streams::default();
        let _ = fault::point("destination.committed");

        // Before anything can run that would find them asleep.
        self.installed.iter().for_each(Installed::wake);

        // If it has ended, that stands in the queue.
        let _ = self.tell_restore(RestoreOrder::Verdict(true));
        // Beside what CRIU has to do yet.
        if let Some(init) = self.journal.record.init {
            self.network.make_room(init.pid);
        }
        todo.served = self.pages.take().and_then(|ended| ended.result.ok());

        // As long as the latest link is ours to use, whoever brought it waits.
        let mut brought = None;
        self.bring_to_disk(tell);
        let mut waits = None;
        while !todo.is_over() {
            match inputs.queue.recv_timeout(fault::limit(RESTORE_LIMIT)) {
                Ok(DestinationInput::Restore(RestoreEvent::Released(opened))) => {
                    let heard = tell.clone();
                    let led = move || drop(heard.send(DestinationInput::Led));
                    todo.led = !self.network.open(opened, led);
                    self.mark("fence open");
                    let _ = fault::point("destination.open");
                }
                Ok(DestinationInput::Restore(RestoreEvent::AtResume)) => {
                    self.mark("sockets alive");
                    self.network.replay();
                    let _ = self.tell_restore(RestoreOrder::Resume);
                }
                Ok(DestinationInput::Restore(RestoreEvent::Running)) => {
                    todo.running = true;
                    self.mark("running");
                    waits = self.have_them_wait();
                    self.watch_tasks(tell);
                    if todo.served.is_some() {
                        undo::note_all_in(&self.work);
                    }

                    // What the container closes is to be closed, from now on.
                    self.installed.take().into_iter().for_each(Installed::settle);
                    let _ = fault::point("destination.running");
                    self.network.replay();
                    self.network.announce();
                    if !todo.synced {
                        self.sync(tell);
                    }
                }
                Ok(DestinationInput::Noted) => todo.noted = true,
                Ok(DestinationInput::Synced) => todo.synced = true,
                Ok(DestinationInput::Led) => todo.led = true,
                Ok(DestinationInput::Pages(Ended { result: Ok(all), .. })) => {
                    todo.served = Some(all);
                    if todo.running {
                        undo::note_all_in(&self.work);
                    }
                }
                Ok(DestinationInput::Want(run)) => {
                    todo.link &= want(&peer, run).is_ok();
                }
                Ok(DestinationInput::Call(ControlCall::Link(input, output, held))) => {
                    tracing::info!("the source is back over a new link");
                    let heard = tell.clone();
                    let hear = move |h| heard.send(DestinationInput::FromPeer(h)).is_ok();
                    let backlog = &self.backlog;
                    let taken = connect::adopt(input, output).and_then(|new| {
                        let (other, reader, _) = session::split(new);
                        receiver::listen(reader, &other, stage, current, backlog, hear)?;
                        Ok(other)
                    });

                    match taken {
                        Ok(other) => peer = other,
                        Err(e) => {
                            // It hears nothing, and comes again.
                            tracing::error!("the new link to the source: {e:#}");
                            continue;
                        }
                    }

                    drop(brought.replace(held));
                    todo.link = match todo.served {
                        Some(served) if todo.told_whole => self.say_whole(&peer, served),
                        _ => send_missing(&peer, stage).is_ok(),
                    };
                }
                Ok(DestinationInput::Pages(Ended { result: Err(e), held })) => {
                    let failed = e.context("not all of its memory can be put into the container");
                    // Ended while whoever misses a page still waits for it.
                    let undone = self.undo(held);
                    let _ = peer.send(&Message::failed("starting", &failed));
                    undone?;
                    return Err(failed);
                }
                Ok(DestinationInput::Restore(RestoreEvent::Ended(result))) => {
                    todo.restored = true;
                    if let Err(e) = result
                        && !todo.running
                    {
                        let failed = e.context("the copy died after the commit");
                        self.note_unstarted();
                        // First of all so that nobody takes what is left of it for a container
                        // that runs. The source still has it, frozen.
                        let undone = self.undo(Vec::new());
                        let _ = peer.send(&Message::failed("starting", &failed));
                        undone?;
                        return Err(failed);
                    }
                }
                Ok(DestinationInput::FromPeer(FromPeer::Frame(Frame::Packet(bytes)))) => {
                    let _ = self.network.keep(&bytes);
                    if todo.running {
                        self.network.replay();
                    }
                }
                Ok(DestinationInput::FromPeer(FromPeer::Message(message))) => {
                    todo.hear(&message).unwrap_or_else(|e| tracing::warn!("{e:#}"));
                }
                Ok(DestinationInput::FromPeer(FromPeer::Gone(_))) => todo.link = false,
                Ok(DestinationInput::TasksEnded) => todo.alive = false,
                Ok(DestinationInput::Call(ControlCall::Discard(reply))) => {
                    if todo.lacks() {
                        // The operator knows that nobody will bring the rest.
                        self.undo(Vec::new())?;
                        let _ = reply.send(Standing::Gone);
                        bail!(
                            "it was ended before it had all of its memory, by the operator's word"
                        );
                    }
                    let _ = reply.send(todo.stays());
                }
                Ok(DestinationInput::Call(ControlCall::Verdict(verdict, reply))) => {
                    let event = verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict);
                    if let (_, Some(standing)) = hear(todo.phase(), event) {
                        let _ = reply.send(standing);
                    }
                }
                Ok(_) => {}
                Err(_) => todo = todo.after_silence(),
            }

            while let Some(what) = todo.untold() {
                todo.link &= match what {
                    ToTell::Running => self.say_running(&peer),
                    ToTell::Whole(served) => self.say_whole(&peer, served),
                };
                todo.told(what);
            }

            if todo.is_lost() {
                // Nobody waits for it any more, and nobody brings it.
                self.undo(Vec::new())?;
                bail!("its tasks have ended before all of its memory was there");
            }
        }

        drop(brought);
        // It works in the tasks: not to be ended in the middle of that.
        let _ = waits.map(JoinHandle::join);

        self.settle_in(todo.finished)
    }

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
