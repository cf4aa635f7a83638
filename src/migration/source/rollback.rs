//! The way back, before the commit: the container runs on here.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::inputs::SourceInputs;
use super::{SourceMigration, UNDONE_LIMIT};
use crate::migration::protocol::Message;
use crate::migration::recovery::undo;
use crate::migration::recovery::undo::{Rival, StaysFrozen};
use crate::problem::advice;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;

impl SourceMigration {
    /// The way back: the container runs on here, as if nothing had happened.
    pub(super) fn runs_on(mut self, error: anyhow::Error, reporter: &mut Reporter) -> Failed {
        let why = format!("{error:#}");
        // The destination learns it while we clean up; if the link breaks, from the guard.
        self.inputs.stop_heartbeat();

        // What is undone has limits of its own.
        self.inputs.user = None;
        let peer = self.peer.clone();
        let told = std::thread::spawn(move || peer.send(&Message::Abort { why }).is_ok());
        if let Some(job) = self.dump.take() {
            job.give_up();
        }

        // Nobody is at them any more when this returns.
        drop(self.take_lifted());
        let hands =
            undo::Hands::Own { orders: &self.guard.orders, watch: &self.watch, vault: &self.vault };
        // A commit that the disk did not take for certain is taken back before anything else: the
        // last line counts.
        let known = |inputs: &SourceInputs| {
            if inputs.undone_there { Rival::Excluded } else { Rival::Possible }
        };

        let mut undone = undo::roll_back_source(&mut self.journal, &hands, known(&self.inputs));
        if stays_frozen(&undone) {
            self.inputs.await_undone(UNDONE_LIMIT);
            if self.inputs.undone_there {
                undone = undo::roll_back_source(&mut self.journal, &hands, Rival::Excluded);
            }
        }

        if let (true, Err(e)) = (stays_frozen(&undone), &undone) {
            // The guard goes on asking, and trying.
            let left = self.is_left_frozen(&error, e);
            self.closer.close();
            self.work.keep();
            return left;
        }

        if let Some(packet_buffer) = self.packet_buffer.take() {
            // It may be writing into a link that is stuck.
            let patience = Instant::now() + Duration::from_millis(200);
            while !told.is_finished() && Instant::now() < patience {
                std::thread::park_timeout(Duration::from_millis(1));
            }

            if !told.is_finished() {
                self.closer.close();
            }
            let subject = &self.subject;
            let cgroup = self.journal.record.cgroup.as_ref();
            let replay = || subject.container_network().replay(&subject.plan.migration);
            packet_buffer.give_back(cgroup, replay);
        }

        if let Some(since) = self.frozen_since {
            reporter.mark("runs on here");
            reporter.report.frozen_ms = Some(since.elapsed().as_secs_f64() * 1000.0);
        }

        // The destination says when it has undone everything. The link may be stuck, and a writer in it;
        // that it ends says nothing: the word may not have got there.
        self.inputs.await_undone(UNDONE_LIMIT);

        // It stays as long as it has something that is to be put back.
        if self.inputs.undone_there && undone.is_ok() {
            // Else it is told once more.
            let _ = self.journal.note_told().inspect_err(|e| tracing::error!("{e:#}"));
            self.guard.dismiss();
        } else {
            self.guard.send_word();
        }

        self.closer.close();
        drop(self.memory.take());
        self.work.keep();
        let text = match undone {
            Ok(()) if self.journal.record.init_lives() => {
                error.context("the migration was given up; the container runs on here")
            }
            Ok(()) => error.context("the migration was given up; the container has ended here"),
            Err(e) => error.context(format!(
                "the migration was given up, and not everything could be undone: {e:#}"
            )),
        };

        Failed::from(text)
    }

    /// Returns what is said where it could neither be handed over nor taken back.
    pub(super) fn is_left_frozen(&self, error: &anyhow::Error, why: &anyhow::Error) -> Failed {
        let record = &self.journal.record;
        let (id, peer) = (&record.container, &record.peer);
        Failed::in_doubt(advice(
            format!(
                "the migration was given up ({error:#}), and the container stays frozen here: {why:#}. \
                 It runs on when the disk takes that, or {peer} has said that it does not run there"
            ),
            format!(
                "see to the disk of {}; `ferry resolve {id}` tries again; if {peer} is gone for good: \
                 `ferry resolve {id} --keep`",
                self.journal.path().display()
            ),
        ))
    }
}

fn stays_frozen(undone: &Result<()>) -> bool {
    undone.as_ref().is_err_and(|e| e.downcast_ref::<StaysFrozen>().is_some())
}
