//! The container stands still: what it is and what is left of it goes to the destination.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};

use super::ask::{Awaited, Input};
use super::{Begun, EMPTY_IMAGE, FREEZE_LIMIT, REMAPS, VERIFY_LIMIT};
use crate::connections::Lifted;
use crate::files::{tmpfs, tree};
use crate::memory::pages;
use crate::migration::checkpoint::dump::{DumpEvent, Go};
use crate::migration::network::keeper::Keeper;
use crate::migration::network::lull;
use crate::migration::preflight::contested;
use crate::migration::protocol::Message;
use crate::migration::protocol::talk::Heard;
use crate::migration::recovery::recover;
use crate::migration::transfer::carry::Order;
use crate::migration::transfer::early::Early;
use crate::migration::transfer::haul::{self, HaulEvent};
use crate::migration::transfer::parcels::{SpeakerFile, send_file};
use crate::problem::Problem;
use crate::report::progress::Reporter;
use crate::sys::{fault, process};
use crate::tasks::losses::{Scene, strangers};
use crate::tasks::{aio, descriptors, locks, settings};
use crate::transport::frame;
use crate::transport::pace::Pace;

impl Begun {
    pub(super) fn freeze(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.freeze")?;
        recover::leave_mark(&self.journal)?;
        self.await_drained(reporter)?;
        self.inputs.until(FREEZE_LIMIT);
        let rounds = &reporter.report.rounds;
        // Rounds of less tell nothing of the link.
        let telling = rounds.iter().rev().find(|r| r.wire_bytes > 1 << 20);
        let rate = telling.map(|r| r.wire_bytes as f64 * 1000.0 / r.ms.max(1.0));
        self.inputs.feel_pulse(&self.speaker, rate);
        self.look_for_connections()?;
        while self.unanswered > 0 {
            if let Input::Heard(Heard::Message(Message::Awaited { lacking })) =
                self.next(reporter)?
            {
                self.await_answer(&lacking);
            }
        }
        let processes = self.subject.cgroup.processes()?;
        // Since it was looked at.
        aio::problem(&aio::rings(&processes)).map_or(Ok(()), Err)?;
        // As late as they can be asked.
        self.settings = settings::ask(&processes)?;
        self.speaker.say(&Message::Freezing)?;
        descriptors::warm(&processes);
        self.early = Some(Early::start(self.work.images(), self.speaker.clone())?);
        let lifting = self.lifting.take().map(|(lifting, _)| lifting);
        self.go(Go::Freeze(lifting))?;
        loop {
            if let Input::Dump(DumpEvent::Frozen { since, network, came }) = self.next(reporter)? {
                self.frozen_since = Some(since);
                reporter.mark_at("freeze", since);
                reporter.mark("frozen, fence closed");
                if let Some(network) = network {
                    let (_, capture) = *network;
                    self.keeper = Some(Keeper::start(capture, came, self.speaker.clone())?);
                }
                break;
            }
        }
        self.tell_haul(haul::Order::Frozen);
        self.tell_memory(Order::Frozen)
    }

    /// Answers on connections that the container has closed get away while it runs.
    fn await_drained(&mut self, reporter: &mut Reporter) -> Result<()> {
        let Some(mut lookout) = self.lookout()? else { return Ok(()) };
        lull::await_drained(&mut lookout, || {
            while let Some(input) = self.inputs.pending()? {
                self.take_note(input, reporter);
            }
            Ok(())
        })
    }

    pub(super) fn tell_memory(&self, order: Order) -> Result<()> {
        let memory = self.memory.as_ref().ok_or_else(|| anyhow!("memory is not being sent"))?;
        memory.orders.send(order).map_err(|_| anyhow!("memory is not being sent any more"))
    }

    /// Whoever was put into the container in the last moment, such as a health check, ends with it.
    fn tell_strangers(&self, reporter: &mut Reporter) -> Result<()> {
        let tasks = self.subject.cgroup.processes()?;
        let found = strangers::find(Scene { init: self.subject.state.pid, tasks: &tasks });
        if !found.is_empty() {
            let what = "what was put into the container from outside does not go along";
            reporter.problem(Problem::new(what, strangers::names(&found)).warning());
        }
        Ok(())
    }

    pub(super) fn dump(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.dump")?;
        // While CRIU works.
        let pids = self.subject.cgroup.processes()?;
        recover::note_sockets(&self.journal.record, &pids)?;
        self.tell_strangers(reporter)?;
        let locks = locks::look(&pids)?;
        if let Some(problem) = contested::problem(&self.subject, &locks) {
            return Err(problem.into());
        }
        self.locks = locks.into_iter().map(|found| found.held).collect();
        self.settings.extend(settings::look(self.subject.state.pid, &pids)?);
        let (mut dumped, mut hauled) = (false, self.haul.is_none());
        self.inputs.awaited = Awaited::Dump;
        while !(dumped && hauled) {
            match self.next(reporter)? {
                Input::Dump(DumpEvent::Lifted) => reporter.mark("connections are taken out"),
                Input::Dump(DumpEvent::Dumped) => {
                    self.inputs.awaited = Awaited::Destination;
                    reporter.mark("dumped");
                    dumped = true;
                }
                Input::Files(HaulEvent::Done) => {
                    reporter.mark("last file is sent");
                    hauled = true;
                }
                _ => {}
            }
        }
        // An open file that has lost the name it was opened by, and has another one, gets one more
        // of CRIU's for the restore. That has happened while the last files went.
        let remaps = std::fs::metadata(self.work.images().join(REMAPS));
        if remaps.is_ok_and(|m| m.len() > EMPTY_IMAGE) && self.tell_haul(haul::Order::Named) {
            while !matches!(self.next(reporter)?, Input::Files(HaulEvent::Done)) {}
            reporter.mark("names that CRIU gave are sent");
        }
        Ok(())
    }

    pub(super) fn transfer(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.transfer")?;
        self.tell_memory(Order::Dumped)?;
        self.send_streams(true)?;
        self.send_tmpfs()?;
        let tasks = pages::tasks(&self.subject.cgroup.processes()?)?;
        let mut lifted = self.take_lifted();
        lifted.as_ref().map_or(Ok(()), |lifted| lifted.reserve(&self.work.images()))?;
        let sent = self.early.as_mut().map(Early::end).transpose()?.unwrap_or_default();
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        for entry in std::fs::read_dir(self.work.images())? {
            let entry = entry?;
            let name = entry.file_name();
            if sent.contains(&name) {
                continue;
            }
            let name = name.to_str().ok_or_else(|| anyhow!("an image file with a strange name"))?;
            send_file(&self.speaker, name, &entry.path(), 0, &mut buffer)?;
        }
        recover::keep_sockets(&self.journal.record)?;
        let lifted = lifted.as_mut().map(Lifted::sent).transpose()?;
        reporter.report.connections = lifted;
        let tasks = tasks.iter().map(|t| t.vpid).collect();
        let (locks, settings) =
            (std::mem::take(&mut self.locks), std::mem::take(&mut self.settings));
        let connections = lifted.unwrap_or(0);
        self.speaker.say(&Message::Dumped { tasks, connections, locks, settings })?;
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
            // The container stands still meanwhile.
            let (speaker, pace) = (&self.speaker, &Pace::default());
            let file = SpeakerFile { speaker, name: format!("tmpfs-{i}"), at: 0, pace };
            let mut out = BufWriter::with_capacity(frame::MAX_FILE_PIECE, file);
            tree::pack(&process::path_of(&place), &mut out)
                .with_context(|| format!("reading the tmpfs {}", one.place))?;
            out.flush()?;
        }
        Ok(())
    }

    /// Logs outside the container: all of it before the freeze, in the freeze what came since. Read is
    /// what was looked at, whatever the container has under that number by now.
    pub(super) fn send_streams(&mut self, rest: bool) -> Result<()> {
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        let logs = self.subject.logs.iter();
        for (i, (stream, log)) in self.subject.plan.streams.iter_mut().zip(logs).enumerate() {
            let Some(log) = log.as_ref().filter(|_| stream.sent) else { continue };
            let from = if rest { stream.size } else { 0 };
            let (name, path) = (format!("stream-{i}"), process::path_of(log));
            stream.size = send_file(&self.speaker, &name, &path, from, &mut buffer)?;
        }
        Ok(())
    }

    pub(super) fn await_ready(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.sent")?;
        let rings = aio::rings(&self.subject.cgroup.processes()?);
        loop {
            match self.next(reporter)? {
                Input::Heard(Heard::Message(Message::Ready)) => break,
                Input::Heard(Heard::Message(Message::Verify { seed, masks })) => {
                    reporter.mark("destination has restored, and compares memory");
                    self.inputs.until(VERIFY_LIMIT);
                    self.tell_memory(Order::Verify(seed, masks))?;
                }
                Input::Heard(Heard::Message(Message::Verified { pages })) => {
                    reporter.report.verified_pages = Some(pages);
                }
                _ => {}
            }
        }
        reporter.mark("destination has restored");
        if self.subject.plan.verify && reporter.report.verified_pages.is_none() {
            bail!("the destination has not compared the memory");
        }
        fault::point("source.commit")?;
        // Bad news that came meanwhile is the last that can stop it.
        while let Some(input) = self.inputs.pending()? {
            self.take_note(input, reporter);
        }
        Ok(aio::problem(&rings).map_or(Ok(()), Err)?)
    }
}
