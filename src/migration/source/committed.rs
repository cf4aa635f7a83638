//! After the commit.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::inputs::SourceInput;
use super::{FREEZE_LIMIT, GOODBYE_LIMIT, SETTLE_LIMIT, SourceMigration, WHOLE_LIMIT};
use crate::migration::checkpoint::dump::DumpOrder;
use crate::migration::journal::State;
use crate::migration::network::hooks::Hooks;
use crate::migration::protocol::session::FromPeer;
use crate::migration::protocol::{Message, Standing};
use crate::migration::recovery::decide::{NextDeed, There, resolve};
use crate::migration::recovery::postcopy_recover::{self, Brought};
use crate::migration::recovery::{undo, verdicts};
use crate::migration::transfer::channels::Channel;
use crate::migration::transfer::memory_sender::MemoryOrder;
use crate::network::host_side::ProxyArpBlock;
use crate::problem::advice;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::fault;
use crate::transport::backoff::Backoff;

/// Time that a signal lets what is under way go on.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time that a destination that is looked for may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two tries to reach the other host, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// After the commit: the destination owns the container. There is no way back from here.
pub(super) struct Committed(pub(super) SourceMigration);

/// What has come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommittedEnd {
    /// It runs there, with all of its memory.
    RunsThere,
    /// It never ran there, and never will.
    NeverRan,
    /// That is not known.
    InDoubt(Standing),
}

impl Committed {
    /// Tells the destination, learns that it runs, and clears away what is frozen here.
    pub(super) fn finish(self, reporter: &mut Reporter) -> Result<(), Failed> {
        let mut source = self.0;
        reporter.mark("committed");
        let _ = fault::point("source.committed");
        source.inputs.until(FREEZE_LIMIT);
        let running = Committed::hand_on(&mut source, reporter);
        if let Some(job) = source.dump.take() {
            // CRIU leaves the tasks as they are: frozen.
            let _ = job.go.send(DumpOrder::Verdict(true));
            job.join();
        }

        let end = if running {
            CommittedEnd::RunsThere
        } else if source.stopping {
            CommittedEnd::InDoubt(Standing::Waiting)
        } else {
            Committed::look_for(&mut source, reporter)
        };

        if end == CommittedEnd::NeverRan {
            // Whoever it is told beside everything else that it has moved is told before that it has not.
            if let Some(e) = source.hooks.take().and_then(Hooks::switched) {
                reporter.warning(&format!("{e}"));
            }
            let why = anyhow!(
                "the container was handed over, but its copy on {} ended before it ran",
                source.journal.record.peer
            );
            source.inputs.undone_there = true;
            return Err(source.runs_on(why, reporter));
        }

        // Where the link broke in between, an answer over another one has said so, and later.
        if end == CommittedEnd::RunsThere && reporter.report.frozen_ms.is_none() {
            Committed::runs_there(&source, reporter);
        }
        if let CommittedEnd::InDoubt(standing) = end {
            // The guard stays, if it has something without which what is frozen here is not whole.
            source.closer.close();
            let left = source.stopping.then(|| left_to_guard(&source, reporter));
            source.work.keep();
            if let Some(left) = left {
                return Err(Failed::in_doubt(left));
            }

            let id = &source.journal.record.container;
            let peer = &source.journal.record.peer;
            return Err(Failed::in_doubt(in_doubt_words(id, peer, standing)));
        }

        if !running {
            // What the packet buffer still writes to this link, nobody reads.
            source.closer.close();
        }
        let _ = fault::point("source.let-go");

        // In repair mode they end without a word, and nobody else has them.
        if let Err(e) = source.vault.empty() {
            reporter.warning(&format!("connections stay open here for a moment: {e:#}"));
        }
        let (packet_buffer, hooks) = (source.packet_buffer.take(), source.hooks.take());
        let ((mut packets, mut lost), mut failures) = ((0, 0), None);
        let peer = &source.peer;
        let done = undo::release_source(&mut source.journal, || {
            // Until packets are led elsewhere they come here, and are sent along.
            failures = hooks.and_then(Hooks::switched);
            if let Some(packet_buffer) = packet_buffer {
                (packets, lost) = packet_buffer.stop();
            }
            // Nothing more comes from here: the destination's end and ours need not wait for each
            // other. Without the word it would find out by itself.
            let _ = peer.send(&Message::Finished);
        });

        reporter.report.packets = packets;
        reporter.report.packets_lost = lost;
        if lost > 0 {
            reporter.warning(&format!(
                "{lost} packets came in the freeze faster than they could be kept: TCP sends them \
                 again, datagrams are lost"
            ));
        }

        if let Some(e) = failures {
            reporter.warning(&format!("{e}"));
        }
        let _ = fault::point("source.finish");
        source.guard.dismiss();
        let channels: u64 = source.channels.iter().map(Channel::bytes).sum();
        reporter.report.wire_bytes = source.peer.bytes() + channels;
        drop(source.peer);
        source.closer.wait(GOODBYE_LIMIT);

        source.work.keep();
        reporter.mark("cleared away here");
        if let Err(e) = done {
            reporter
                .warning(&format!("it runs there, but not everything here is cleared away: {e:#}"));
        }

        Ok(())
    }

    /// The destination has said so just now.
    fn runs_there(source: &SourceMigration, reporter: &mut Reporter) {
        reporter.mark("runs there");
        reporter.report.frozen_ms = source.frozen_since.map(|s| s.elapsed().as_secs_f64() * 1000.0);
    }

    /// Tells whether the destination has said that it runs.
    fn hand_on(source: &mut SourceMigration, reporter: &mut Reporter) -> bool {
        if let Some(Err(e)) = source.silence.as_mut().map(ProxyArpBlock::begin) {
            reporter.warning(&format!("{e}"));
        }
        if source.peer.send(&Message::Commit).is_err() {
            return false;
        }

        if let Some(hooks) = &mut source.hooks {
            hooks.switch(|| ());
        }

        // Whoever has nothing left does not care.
        let _ = source.tell_memory(MemoryOrder::Serve);
        loop {
            match source.next(reporter) {
                Ok(SourceInput::FromPeer(FromPeer::Message(Message::Running(arrival)))) => {
                    Committed::runs_there(source, reporter);
                    reporter.report.arrival = arrival.marks;
                    arrival.changed.into_iter().for_each(|problem| reporter.problem(problem));
                    // What is frozen here stays until the last page is in over there.
                    source.inputs.until(WHOLE_LIMIT);
                }
                Ok(SourceInput::FromPeer(FromPeer::Message(Message::MemoryComplete(served)))) => {
                    reporter.mark("all of it is there");
                    reporter.report.served = Some(served);
                    return true;
                }
                Ok(_) => {}
                // Too late to give up. What takes longer than a moment needs nobody to stand by: the
                // guard goes on with it.
                Err(_) if std::mem::take(&mut source.inputs.interrupted) => {
                    reporter.warning("the container has been handed over: finishing");
                    source.stopping = true;
                    source.inputs.user.get_or_insert(Instant::now() + PATIENCE);
                    source.inputs.again();
                }
                Err(_) if source.stopping => return false,
                Err(e) => {
                    reporter.warning(&format!("{e:#}; looking for the destination"));
                    return false;
                }
            }
        }
    }

    /// The link broke at the worst moment: asks over new ones, and brings what is still here over them.
    fn look_for(source: &mut SourceMigration, reporter: &mut Reporter) -> CommittedEnd {
        let until = Instant::now() + fault::limit(SETTLE_LIMIT);
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);

        // Where pages are here, that is tried first, for as long as it takes.
        let lacking = There::Is(Standing::Partial);
        let mut there = if source.left > 0 { lacking } else { There::Unasked };
        let mut standing = Standing::Waiting;

        loop {
            if let There::Is(said) = there {
                standing = said;
            }
            let tasks = match undo::tasks(&source.journal.record) {
                Ok(tasks) => tasks,
                Err(e) => {
                    reporter.warning(&format!("{e:#}"));
                    return CommittedEnd::InDoubt(standing);
                }
            };

            match resolve(State::Committed, tasks, there, None) {
                NextDeed::LetGo => return CommittedEnd::RunsThere,
                NextDeed::RunsOn | NextDeed::Abandon => return CommittedEnd::NeverRan,
                NextDeed::Ask(verdict) => {
                    let answer = verdicts::ask(&source.journal.record, verdict, ANSWER);
                    if let Err(e) = &answer
                        && Instant::now() > until
                    {
                        reporter.warning(&format!("{e:#}"));
                    }
                    there = answer.map_or(There::Silent, There::Is);
                    continue;
                }
                NextDeed::BringRest => match Committed::bring_rest(source, reporter) {
                    Brought::Stopped => return CommittedEnd::InDoubt(Standing::Partial),
                    brought => {
                        there = There::Is(brought.standing());
                        continue;
                    }
                },
                NextDeed::Doubt(doubt) if doubt.passes() && Instant::now() < until => {}
                NextDeed::Doubt(_) | NextDeed::HandOver => return CommittedEnd::InDoubt(standing),
            }

            there = There::Unasked;
            // Between two tries to reach a host there is nothing to wait on but time, and a signal.
            let next = Instant::now() + backoff.pause();
            while let Ok(input) =
                source.inputs.queue.recv_timeout(next.saturating_duration_since(Instant::now()))
            {
                source.stopping |= matches!(input, SourceInput::Signal(_));
            }

            if source.stopping {
                return CommittedEnd::InDoubt(standing);
            }
        }
    }

    /// The link broke while the destination runs and pages are here: brings them over new ones.
    fn bring_rest(source: &mut SourceMigration, reporter: &mut Reporter) -> Brought {
        source.closer.close();
        let (record, wishes) = (source.journal.record.clone(), source.memory_options.clone());
        let (queue, stopping) = (&source.inputs.queue, &mut source.stopping);
        let end = postcopy_recover::resume(&record, wishes, None, &mut |why| {
            if let Some(why) = why {
                reporter.warning(&format!("{why}; trying again"));
            }
            // Too late to give up, but nobody has to stand by: the guard goes on with it.
            *stopping |= queue.try_iter().any(|input| matches!(input, SourceInput::Signal(_)));
            !*stopping
        });
        if let Brought::Whole(served) = &end {
            reporter.mark("all of it is there");
            reporter.report.served = *served;
        }
        end
    }
}

/// Returns why it is not known what has become of it, and who goes on: nobody does where nothing is to be
/// learned.
fn in_doubt_words(id: &str, peer: &str, standing: Standing) -> anyhow::Error {
    if standing == Standing::Gone {
        return advice(
            format!(
                "the container was handed over to {peer}, and its copy there is lost: whether it had \
                 run before, nobody can say. What is here is whole, and stays frozen and unreachable."
            ),
            format!(
                "`ferry resolve {id} --keep` lets it run on here; if it had run on {peer}, what it did \
                 there is lost"
            ),
        );
    }

    advice(
        format!(
            "the container was handed over to {peer}, and {peer} does not answer that it runs: its copy \
             {}. What is here stays frozen and unreachable, and a process of Ferry's goes on asking.",
            standing.describe(),
        ),
        format!(
            "`ferry resolve {id}` asks at once; if {peer} is gone for good, `ferry resolve {id} --keep` \
             lets it run on here"
        ),
    )
}

/// Returns what there is still to do, and who does it.
fn left_to_guard(source: &SourceMigration, reporter: &Reporter) -> anyhow::Error {
    let record = &source.journal.record;
    left_words(&record.container, &record.peer, reporter.report.frozen_ms.is_some())
}

fn left_words(id: &str, peer: &str, runs: bool) -> anyhow::Error {
    let (now, gone) = if runs {
        (
            "it runs there, and waits for memory that is still here",
            format!("if {peer} is gone for good, so is what it has done since"),
        )
    } else {
        ("it has not been heard yet that it runs there", format!("if {peer} is gone for good"))
    };
    advice(
        format!(
            "interrupted when {id} had been handed over to {peer}: {now}. A process of Ferry's goes on \
             with it; leave this host up until it is done"
        ),
        format!(
            "`ferry resolve {id}` waits for the end, and `ferry migrations {id}` tells how it stands; \
             {gone}: `ferry resolve {id} --keep` lets what is frozen here run on"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever interrupts it has to know what he must not do now.
    #[test]
    fn who_interrupts_it_is_told_what_to_do() {
        for runs in [true, false] {
            let words = left_words("web", "b", runs);
            let hints = format!("{words:#} {:?}", words.downcast_ref::<crate::problem::Advice>());
            assert!(hints.contains("leave this host up"), "{hints}");
            assert!(hints.contains("`ferry resolve web` waits"), "{hints}");
            assert!(hints.contains("`ferry resolve web --keep`"), "{hints}");
        }
    }
}
