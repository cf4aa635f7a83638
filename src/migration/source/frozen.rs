//! The container stands still: what it is and what is left of it goes to the destination.

use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::inputs::{Awaited, SourceInput};
use super::{EMPTY_IMAGE, FREEZE_LIMIT, REMAPS, SourceMigration, VERIFY_LIMIT};
use crate::connections::Extracted;
use crate::criu::unix_names;
use crate::files::{tmpfs, tree};
use crate::memory::pages;
use crate::migration::checkpoint::dump::{DumpEvent, DumpOrder, Freeze};
use crate::migration::network::held_packets::PacketBuffer;
use crate::migration::network::quiesce;
use crate::migration::preflight::{contested, standard};
use crate::migration::protocol::Message;
use crate::migration::protocol::session::FromPeer;
use crate::migration::recovery::{socket_names, undo};
use crate::migration::transfer::early_images::EarlyImages;
use crate::migration::transfer::file_sender::{self, FileEvent};
use crate::migration::transfer::image_files::{LOG, PeerFile, SHM, SHM_PLACE, send_file};
use crate::migration::transfer::memory_sender::MemoryOrder;
use crate::problem::Problem;
use crate::report::progress::Reporter;
use crate::sys::netns::NetNs;
use crate::sys::{fault, process};
use crate::tasks::losses::{Scene, strangers};
use crate::tasks::{aio, locks, moments, settings, sockets, unsupported};
use crate::transport::frame;
use crate::transport::pace::Pace;

/// CRIU's image of what is open.
const FILES: &str = "files.img";

/// How far the comparison of the memory is, for which the container stands still: once, and only where
/// the user wants it, whatever the destination asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparing {
    Unwanted,
    Wanted,
    UnderWay,
    Over,
}

impl Comparing {
    fn new(wanted: bool) -> Comparing {
        if wanted { Comparing::Wanted } else { Comparing::Unwanted }
    }

    fn begin(&mut self) -> Result<()> {
        match self {
            Comparing::Wanted => *self = Comparing::UnderWay,
            Comparing::Unwanted => bail!("the destination wants to compare memory, and is not to"),
            _ => bail!("the destination wants to compare the memory a second time"),
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        match self {
            Comparing::UnderWay => *self = Comparing::Over,
            _ => bail!("the destination has compared memory that nobody has told it of"),
        }
        Ok(())
    }

    /// Tells whether nothing of it is missing.
    fn is_over(self) -> Result<()> {
        match self {
            Comparing::Unwanted | Comparing::Over => Ok(()),
            _ => bail!("the destination has not compared the memory"),
        }
    }
}

impl SourceMigration {
    pub(super) fn freeze(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.freeze")?;
        // What cannot go is to be found now, and what has come meanwhile to be gone by then.
        self.check_streams()?;
        self.send_streams(true)?;
        undo::leave_mark(&self.journal)?;
        self.await_drained(reporter)?;
        self.inputs.until(FREEZE_LIMIT);

        let rounds = &reporter.report.rounds;
        // Rounds of less tell nothing of the link.
        let telling = rounds.iter().rev().find(|r| r.wire_bytes > 1 << 20);
        let rate = telling.map(|r| r.wire_bytes as f64 * 1000.0 / r.ms.max(1.0));
        self.inputs.start_heartbeat(&self.peer, rate);
        self.look_for_connections()?;
        while self.unanswered > 0 {
            if let SourceInput::FromPeer(FromPeer::Message(Message::Awaited { lacking })) =
                self.next(reporter)?
            {
                self.await_answer(&lacking)?;
            }
        }

        let processes = self.subject.cgroup.processes()?;
        // Since it was looked at.
        aio::problem(&aio::rings(&processes)).map_or(Ok(()), Err)?;
        moments::await_read(self.subject.state.pid, &processes)?;

        // As late as they can be asked.
        self.settings = settings::ask(&processes)?;
        self.peer.send(&Message::Freezing)?;
        unsupported::prime_fdinfo(&processes);
        self.early = Some(EarlyImages::start(self.work.images(), self.peer.clone())?);
        self.renamed = socket_names::note_renamed(&self.journal.record, &processes)?;

        let extraction = self.extraction.take().map(|(extraction, _)| extraction);
        let root = process::root_of(self.subject.state.pid);
        self.go(DumpOrder::Freeze(Freeze { extraction, root, renamed: self.renamed.clone() }))?;
        loop {
            if let SourceInput::Dump(DumpEvent::Frozen { since, network, came }) =
                self.next(reporter)?
            {
                self.frozen_since = Some(since);
                reporter.mark_at("freeze", since);
                reporter.mark("frozen, fence closed");
                if let Some(network) = network {
                    let (_, capture) = *network;
                    self.packet_buffer =
                        Some(PacketBuffer::start(capture, came, self.peer.clone())?);
                }
                break;
            }
        }

        self.tell_files(file_sender::FileOrder::Frozen);
        self.tell_memory(MemoryOrder::Frozen)
    }

    /// Answers on connections that the container has closed get away while it runs.
    fn await_drained(&mut self, reporter: &mut Reporter) -> Result<()> {
        let Some(mut sock_diag) = self.sock_diag()? else { return Ok(()) };
        quiesce::await_drained(&mut sock_diag, || {
            while let Some(input) = self.inputs.pending()? {
                self.take_note(input, reporter);
            }
            Ok(())
        })
    }

    pub(super) fn tell_memory(&self, order: MemoryOrder) -> Result<()> {
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
        socket_names::note(&self.journal.record, &pids)?;
        self.tell_strangers(reporter)?;
        let locks = locks::look(&pids)?;
        if let Some(problem) = contested::problem(&self.subject, &locks) {
            return Err(problem.into());
        }

        self.locks = locks.into_iter().map(|found| found.held).collect();
        self.settings.extend(settings::look(self.subject.state.pid, &pids)?);
        let init = self.subject.state.pid;
        let namespace = NetNs::of_pid(init as u32)?;
        let (found, left) = sockets::look(&namespace, init, &pids)?;
        left.into_iter().for_each(|problem| reporter.problem(problem));
        self.sockets = found;

        let (mut dumped, mut copied) = (false, self.file_transfer.is_none());
        self.inputs.awaited = Awaited::Dump;
        while !(dumped && copied) {
            match self.next(reporter)? {
                SourceInput::Dump(DumpEvent::Extracted) => {
                    reporter.mark("connections are taken out")
                }
                SourceInput::Dump(DumpEvent::Dumped { hidden, unchecked }) => {
                    reporter.report.hidden_pages = hidden;
                    self.unchecked = unchecked;
                    self.inputs.awaited = Awaited::Destination;
                    reporter.mark("dumped");
                    dumped = true;
                }
                SourceInput::Files(FileEvent::Done) => {
                    reporter.mark("last file is sent");
                    copied = true;
                }
                _ => {}
            }
        }

        // An open file that has lost the name it was opened by, and has another one, gets one more
        // of CRIU's for the restore. That has happened while the last files went.
        let remaps = std::fs::metadata(self.work.images().join(REMAPS));
        if remaps.is_ok_and(|m| m.len() > EMPTY_IMAGE)
            && self.tell_files(file_sender::FileOrder::Named)
        {
            while !matches!(self.next(reporter)?, SourceInput::Files(FileEvent::Done)) {}
            reporter.mark("names that CRIU gave are sent");
        }

        Ok(())
    }

    pub(super) fn transfer(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.transfer")?;
        self.tell_memory(MemoryOrder::Dumped)?;
        self.send_streams(true)?;
        self.send_tmpfs()?;
        self.send_shm()?;
        let tasks = pages::tasks(&self.subject.cgroup.processes()?)?;
        let mut extracted = self.take_lifted();
        extracted.as_ref().map_or(Ok(()), |extracted| extracted.reserve(&self.work.images()))?;
        self.keep_renamed()?;

        let sent = self.early.as_mut().map(EarlyImages::end).transpose()?.unwrap_or_default();
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        for entry in std::fs::read_dir(self.work.images())? {
            let entry = entry?;
            let name = entry.file_name();
            if sent.contains(&name) {
                continue;
            }
            let name = name.to_str().ok_or_else(|| anyhow!("an image file with a strange name"))?;
            send_file(&self.peer, name, &entry.path(), 0, &mut buffer)?;
        }

        socket_names::keep(&self.journal.record)?;
        let listeners = extracted.as_ref().map_or(0, |extracted| extracted.listeners);
        let extracted = extracted.as_mut().map(Extracted::sent).transpose()?;
        reporter.report.connections = extracted.map(|all| all - listeners).filter(|n| *n > 0);
        let tasks = tasks.iter().map(|t| t.vpid).collect();
        let (locks, settings) =
            (std::mem::take(&mut self.locks), std::mem::take(&mut self.settings));
        let connections = extracted.unwrap_or(0);
        let renamed = std::mem::take(&mut self.renamed);

        for some in std::mem::take(&mut self.sockets).chunks(sockets::BATCH) {
            self.peer.send(&Message::Sockets { list: some.to_vec() })?;
        }
        self.peer.send(&Message::Dumped { tasks, connections, locks, settings, renamed })?;
        reporter.mark("images are sent");

        Ok(())
    }

    /// Of a socket that was linked to its second name, and its first one removed (supervisord), the entry is
    /// gone that it was bound to: none but CRIU's image can say that the name is there.
    fn keep_renamed(&self) -> Result<()> {
        if self.renamed.is_empty() {
            return Ok(());
        }
        let place = self.work.images().join(FILES);
        let what = || format!("the image {}", place.display());
        let mut image = std::fs::read(&place).with_context(what)?;
        let names: Vec<&[u8]> = self.renamed.iter().map(|one| &one.bound[..]).collect();
        if unix_names::keep(&mut image, &names).with_context(what)? > 0 {
            std::fs::write(&place, image).with_context(what)?;
        }
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
            let (peer, pace) = (&self.peer, &Pace::default());
            let file = PeerFile { peer, name: format!("tmpfs-{i}"), at: 0, pace };
            let mut out = BufWriter::with_capacity(frame::MAX_FILE_PIECE, file);
            tree::pack(&process::path_of(&place), &mut out)
                .with_context(|| format!("reading the tmpfs {}", one.place))?;
            out.flush()?;
        }
        Ok(())
    }

    /// Tells whether logs outside the container can go along still, however much has been written to them.
    fn check_streams(&self) -> Result<()> {
        for (stream, log) in self.subject.plan.streams.iter().zip(&self.subject.logs) {
            if let Some(log) = log.as_ref().filter(|_| stream.sent) {
                standard::check_length(&stream.target, log.metadata()?.len())?;
            }
        }
        Ok(())
    }

    /// Returns what is in /dev/shm, where that is a mount that the engine makes.
    fn send_shm(&self) -> Result<()> {
        let Some(wanted) = &self.subject.plan.engine else { return Ok(()) };
        if wanted.own.iter().all(|place| place != Path::new(SHM_PLACE)) {
            return Ok(());
        }
        let root = PathBuf::from(format!("/proc/{}/root", self.subject.state.pid));
        let place = tmpfs::open_in(&root, SHM_PLACE).context("opening /dev/shm")?;
        let (peer, pace) = (&self.peer, &Pace::default());
        let file = PeerFile { peer, name: SHM.into(), at: 0, pace };
        let mut out = BufWriter::with_capacity(frame::MAX_FILE_PIECE, file);
        tree::pack(&process::path_of(&place), &mut out).context("reading /dev/shm")?;
        Ok(out.flush()?)
    }

    /// Logs outside the container: all of it before the freeze, in the freeze what came since. Read is
    /// what was looked at, whatever the container has under that number by now.
    pub(super) fn send_streams(&mut self, rest: bool) -> Result<()> {
        let mut buffer = vec![0; frame::MAX_FILE_PIECE];
        if let Some(log) = self.subject.plan.engine.as_ref().and_then(|e| e.log_path.as_ref()) {
            let (from, inode) = if rest { self.log_sent } else { (0, None) };
            // An engine that puts a full log aside goes on in another file.
            let here = std::fs::metadata(log)?;
            if here.len() < from || inode.is_some_and(|inode| inode != here.ino()) {
                bail!("the container's log was put aside meanwhile (max-size): try again");
            }
            let sent = send_file(&self.peer, LOG, log, from, &mut buffer)?;
            self.log_sent = (sent, Some(here.ino()));
        }
        let logs = self.subject.logs.iter();
        for (i, (stream, log)) in self.subject.plan.streams.iter_mut().zip(logs).enumerate() {
            let Some(log) = log.as_ref().filter(|_| stream.sent) else { continue };
            let from = if rest { stream.size } else { 0 };
            let (name, path) = (format!("stream-{i}"), process::path_of(log));
            stream.size = send_file(&self.peer, &name, &path, from, &mut buffer)?;
        }
        Ok(())
    }

    pub(super) fn await_ready(&mut self, reporter: &mut Reporter) -> Result<()> {
        fault::point("source.sent")?;
        let rings = aio::rings(&self.subject.cgroup.processes()?);
        let mut comparing = Comparing::new(self.subject.plan.verify);
        loop {
            match self.next(reporter)? {
                SourceInput::FromPeer(FromPeer::Message(Message::Ready)) => break,
                SourceInput::FromPeer(FromPeer::Message(Message::Verify { seed, masks })) => {
                    comparing.begin()?;
                    reporter.mark("destination has restored, and compares memory");
                    self.inputs.until(VERIFY_LIMIT);
                    self.tell_memory(MemoryOrder::Verify(seed, masks))?;
                }
                SourceInput::FromPeer(FromPeer::Message(Message::Verified { pages })) => {
                    comparing.end()?;
                    // What is left of the freeze is short again.
                    self.inputs.until(FREEZE_LIMIT);
                    reporter.report.verified_pages = Some(pages);
                }
                _ => {}
            }
        }

        reporter.mark("destination has restored");
        while self.unchecked {
            self.next(reporter)?;
        }
        comparing.is_over()?;
        fault::point("source.commit")?;

        // Bad news that came meanwhile is the last that can stop it.
        while let Some(input) = self.inputs.pending()? {
            self.take_note(input, reporter);
        }

        Ok(aio::problem(&rings).map_or(Ok(()), Err)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A destination that asks for it again and again keeps nothing frozen.
    #[test]
    fn memory_is_compared_once_and_only_where_it_is_wanted() {
        let mut unwanted = Comparing::new(false);
        assert!(unwanted.begin().is_err());
        assert!(unwanted.end().is_err());
        unwanted.is_over().unwrap();
        let mut wanted = Comparing::new(true);
        assert!(wanted.end().is_err(), "it has not begun");
        assert!(wanted.is_over().is_err(), "it has not begun");
        wanted.begin().unwrap();
        assert!(wanted.begin().is_err(), "twice at a time");
        assert!(wanted.is_over().is_err(), "it is not over");
        wanted.end().unwrap();
        assert!(wanted.begin().is_err(), "a second time");
        wanted.is_over().unwrap();
    }
}
