//! With `--verify`: what CRIU and we have restored is compared with what stands frozen on the source.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::phase::{Event, Phase};
use super::{DestinationInput, DestinationInputs, IncomingMigration, RESTORE_LIMIT};
use crate::criu::images::{self, PagemapEntry};
use crate::memory::compare::{Comparison, await_pages};
use crate::memory::digest::{DigestRecord, Digester, STREAM, random_seed};
use crate::migration::protocol::Message;
use crate::migration::protocol::session::{FromPeer, PeerWriter};
use crate::oci::cgroup::Cgroup;
use crate::sys::fault;
use crate::tasks::freezer::of_first_space;
use crate::tasks::sequences;
use crate::transport::frame::Frame;

/// What CRIU has left to us, by the container's number of the task.
pub(super) type Pagemaps = HashMap<i32, Vec<PagemapEntry>>;

impl IncomingMigration {
    /// Reads the images that say which pages are ours to bring.
    pub(super) fn pagemaps(&self, tasks: &[i32]) -> Result<Pagemaps> {
        let mut pagemaps = HashMap::new();
        for &vpid in tasks {
            let path = self.work.images().join(format!("pagemap-{vpid}.img"));
            match fs::read(&path) {
                Ok(bytes) => {
                    let (_, entries) = images::parse_pagemap(&bytes)
                        .with_context(|| format!("pagemap of task {vpid}"))?;
                    pagemaps.insert(vpid, entries);
                }
                // A task that ended in the freeze's last moment: CRIU knows it as a zombie.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(pagemaps)
    }

    /// Compares all memory of the restored tasks with the source's, and says so to the source.
    ///
    /// # Errors
    /// Pages that differ.
    pub(super) fn verify(
        &mut self,
        tasks: &[i32],
        mut phase: Phase,
        peer: &PeerWriter,
        inputs: &mut DestinationInputs,
    ) -> Result<Phase> {
        self.doing = "verifying memory";
        let init = self.journal.record.init.ok_or_else(|| anyhow!("nothing is restored"))?;
        let pids = Cgroup::of_process(init.pid)?.processes()?;
        let own = of_first_space(&pids)?;
        let until = Instant::now() + RESTORE_LIMIT;
        for (vpid, entries) in self.pagemaps(tasks)? {
            let task = own.iter().find(|task| task.vpid == vpid);
            let task = task.ok_or_else(|| anyhow!("process {vpid} is not there"))?;
            await_pages(*task, &entries, until)?;
        }

        self.mark("all memory is in");

        let (masks, seed) = (sequences::areas(&pids)?, random_seed());
        let digester = Digester::new(seed, &masks)?;
        let mut comparison = Comparison::new(&own, digester)?;
        fault::point("destination.verify")?;
        #[cfg(feature = "faults")]
        if let (true, Some(first)) = (fault::spoils("destination.verify"), own.first()) {
            crate::memory::compare::spoil(*first)?;
        }

        peer.send(&Message::Verify { seed, masks })?;
        loop {
            match inputs.next(RESTORE_LIMIT)? {
                DestinationInput::FromPeer(FromPeer::Frame(Frame::File(name, _, bytes)))
                    if name == STREAM =>
                {
                    phase = phase.step(Event::Digests)?;
                    self.backlog.done(bytes.len());
                    let records: Vec<DigestRecord> = postcard::from_bytes(&bytes)?;
                    if comparison.take(records)? {
                        break;
                    }
                }
                other => self.keep_pace(&phase, other, peer)?,
            }
        }

        let pages = comparison.verdict()?;
        self.mark("memory is verified");
        peer.send(&Message::Verified { pages })?;

        Ok(phase)
    }
}
