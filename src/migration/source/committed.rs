//! After the commit.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::ask::Input;
use super::{Begun, FREEZE_LIMIT, GOODBYE_LIMIT, SETTLE_LIMIT, WHOLE_LIMIT};
use crate::migration::checkpoint::dump::Go;
use crate::migration::journal::State;
use crate::migration::network::hooks::Hooks;
use crate::migration::protocol::talk::Heard;
use crate::migration::protocol::{Message, Standing};
use crate::migration::recovery::decide::{Next, There, resolve};
use crate::migration::recovery::rest::{self, Brought};
use crate::migration::recovery::{recover, settle};
use crate::migration::transfer::carry::Order;
use crate::migration::transfer::lanes::Lane;
use crate::network::host_side::Silence;
use crate::problem::advice;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::fault;

/// How long a signal lets what is under way go on.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a destination that is looked for may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// After the commit: the destination owns the container. There is no way back from here.
pub(super) struct Committed(pub(super) Begun);

/// What has come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
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
        let mut begun = self.0;
        reporter.mark("committed");
        let _ = fault::point("source.committed");
        begun.inputs.until(FREEZE_LIMIT);
        let running = Committed::hand_on(&mut begun, reporter);
        if let Some(job) = begun.dump.take() {
            // CRIU leaves the tasks as they are: frozen.
            let _ = job.go.send(Go::Verdict(true));
            job.join();
        }
        let end = match running {
            true => End::RunsThere,
            false if begun.stopping => End::InDoubt(Standing::Waiting),
            false => Committed::look_for(&mut begun, reporter),
        };
        if end == End::NeverRan {
            let why = anyhow!(
                "the container was handed over, but its copy on {} ended before it ran",
                begun.journal.record.peer
            );
            begun.inputs.undone_there = true;
            return Err(begun.runs_on(why, reporter));
        }
        // Where the link broke in between, an answer over another one has said so, and later.
        if end == End::RunsThere && reporter.report.frozen_ms.is_none() {
            Committed::runs_there(&begun, reporter);
        }
        if let End::InDoubt(standing) = end {
            // The guard stays, if it has something without which what is frozen here is not whole.
            begun.closer.close();
            let left = begun.stopping.then(|| left_to_guard(&begun, reporter));
            begun.work.keep();
            if let Some(left) = left {
                return Err(Failed::in_doubt(left));
            }
            let id = &begun.journal.record.container;
            let peer = &begun.journal.record.peer;
            return Err(Failed::in_doubt(advice(
                format!(
                    "the container was handed over to {peer}, and {peer} does not answer that it \
                     runs: its copy {}. What is here stays frozen and unreachable, and a process of \
                     Ferry's goes on asking.",
                    standing.describe(),
                ),
                format!(
                    "`ferry resolve {id}` asks at once; if {peer} is gone for good, `ferry resolve \
                     {id} --keep` lets it run on here"
                ),
            )));
        }
        if !running {
            // What the keeper still writes to this link, nobody reads.
            begun.closer.close();
        }
        let _ = fault::point("source.let-go");
        // In repair mode they end without a word, and nobody else has them.
        if let Err(e) = begun.vault.empty() {
            reporter.warning(&format!("connections stay open here for a moment: {e:#}"));
        }
        let (keeper, hooks) = (begun.keeper.take(), begun.hooks.take());
        let ((mut packets, mut lost), mut trouble) = ((0, 0), None);
        let speaker = &begun.speaker;
        let done = recover::source_lets_go(&mut begun.journal, || {
            // Until packets are led elsewhere they come here, and are sent along.
            trouble = hooks.and_then(Hooks::switched);
            if let Some(keeper) = keeper {
                (packets, lost) = keeper.stop();
            }
            // Nothing more comes from here: the destination's end and ours need not wait for each
            // other. Without the word it would find out by itself.
            let _ = speaker.say(&Message::Finished);
        });
        reporter.report.packets = packets;
        reporter.report.packets_lost = lost;
        if lost > 0 {
            reporter.warning(&format!(
                "{lost} packets came in the freeze faster than they could be kept: TCP sends them \
                 again, datagrams are lost"
            ));
        }
        if let Some(e) = trouble {
            reporter.warning(&format!("{e}"));
        }
        let _ = fault::point("source.finish");
        begun.guard.dismiss();
        let lanes: u64 = begun.lanes.iter().map(Lane::bytes).sum();
        reporter.report.wire_bytes = begun.speaker.bytes() + lanes;
        drop(begun.speaker);
        begun.closer.wait(GOODBYE_LIMIT);
        begun.work.keep();
        reporter.mark("cleared away here");
        if let Err(e) = done {
            reporter
                .warning(&format!("it runs there, but not everything here is cleared away: {e:#}"));
        }
        Ok(())
    }

    /// The destination has said so just now.
    fn runs_there(begun: &Begun, reporter: &mut Reporter) {
        reporter.mark("runs there");
        reporter.report.frozen_ms = begun.frozen_since.map(|s| s.elapsed().as_secs_f64() * 1000.0);
    }

    /// Whether the destination has said that it runs.
    fn hand_on(begun: &mut Begun, reporter: &mut Reporter) -> bool {
        if let Some(Err(e)) = begun.silence.as_mut().map(Silence::begin) {
            reporter.warning(&format!("{e}"));
        }
        if begun.speaker.say(&Message::Commit).is_err() {
            return false;
        }
        if let Some(hooks) = &mut begun.hooks {
            hooks.switch();
        }
        // Whoever has nothing left does not care.
        let _ = begun.tell_memory(Order::Serve);
        loop {
            match begun.next(reporter) {
                Ok(Input::Heard(Heard::Message(Message::Running(arrival)))) => {
                    Committed::runs_there(begun, reporter);
                    reporter.report.arrival = arrival.marks;
                    arrival.changed.into_iter().for_each(|problem| reporter.problem(problem));
                    // What is frozen here stays until the last page is in over there.
                    begun.inputs.until(WHOLE_LIMIT);
                }
                Ok(Input::Heard(Heard::Message(Message::Whole(served)))) => {
                    reporter.mark("all of it is there");
                    reporter.report.served = Some(served);
                    return true;
                }
                Ok(_) => {}
                // Too late to give up. What takes longer than a moment needs nobody to stand by: the
                // guard goes on with it.
                Err(_) if std::mem::take(&mut begun.inputs.interrupted) => {
                    reporter.warning("the container has been handed over: finishing");
                    begun.stopping = true;
                    begun.inputs.user.get_or_insert(Instant::now() + PATIENCE);
                    begun.inputs.again();
                }
                Err(_) if begun.stopping => return false,
                Err(e) => {
                    reporter.warning(&format!("{e:#}; looking for the destination"));
                    return false;
                }
            }
        }
    }

    /// The link broke at the worst moment: asks over new ones, and brings what is still here over them.
    fn look_for(begun: &mut Begun, reporter: &mut Reporter) -> End {
        let until = Instant::now() + SETTLE_LIMIT;
        let mut pause = Duration::from_millis(100);
        // Where pages are here, that is tried first, for as long as it takes.
        let lacking = There::Is(Standing::Partial);
        let mut there = if begun.left > 0 { lacking } else { There::Unasked };
        let mut standing = Standing::Waiting;
        loop {
            if let There::Is(said) = there {
                standing = said;
            }
            let tasks = match recover::tasks(&begun.journal.record) {
                Ok(tasks) => tasks,
                Err(e) => {
                    reporter.warning(&format!("{e:#}"));
                    return End::InDoubt(standing);
                }
            };
            match resolve(State::Committed, tasks, there, None) {
                Next::LetGo => return End::RunsThere,
                Next::RunsOn | Next::Abandon => return End::NeverRan,
                Next::Ask(verdict) => {
                    let answer = settle::ask(&begun.journal.record, verdict, ANSWER);
                    if let Err(e) = &answer
                        && Instant::now() > until
                    {
                        reporter.warning(&format!("{e:#}"));
                    }
                    there = answer.map_or(There::Silent, There::Is);
                    continue;
                }
                Next::BringRest => match Committed::bring_rest(begun, reporter) {
                    Brought::Stopped => return End::InDoubt(Standing::Partial),
                    brought => {
                        there = There::Is(brought.standing());
                        continue;
                    }
                },
                Next::Doubt(doubt) if doubt.passes() && Instant::now() < until => {}
                Next::Doubt(_) | Next::HandOver => return End::InDoubt(standing),
            }
            there = There::Unasked;
            // Between two tries to reach a host there is nothing to wait on but time, and a signal.
            let next = Instant::now() + pause;
            while let Ok(input) =
                begun.inputs.queue.recv_timeout(next.saturating_duration_since(Instant::now()))
            {
                begun.stopping |= matches!(input, Input::Signal(_));
            }
            if begun.stopping {
                return End::InDoubt(standing);
            }
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// The link broke while the destination runs and pages are here: brings them over new ones.
    fn bring_rest(begun: &mut Begun, reporter: &mut Reporter) -> Brought {
        begun.closer.close();
        let (record, wishes) = (begun.journal.record.clone(), begun.memory_wishes.clone());
        let (queue, stopping) = (&begun.inputs.queue, &mut begun.stopping);
        let end = rest::bring(&record, wishes, None, &mut |why| {
            if let Some(why) = why {
                reporter.warning(&format!("{why}; trying again"));
            }
            // Too late to give up, but nobody has to stand by: the guard goes on with it.
            *stopping |= queue.try_iter().any(|input| matches!(input, Input::Signal(_)));
            !*stopping
        });
        if let Brought::Whole(served) = &end {
            reporter.mark("all of it is there");
            reporter.report.served = *served;
        }
        end
    }
}

/// What there is still to do, and who does it.
fn left_to_guard(begun: &Begun, reporter: &Reporter) -> anyhow::Error {
    let record = &begun.journal.record;
    let (id, peer) = (&record.container, &record.peer);
    let now = match reporter.report.frozen_ms {
        Some(_) => "it runs there, and waits for memory that is still here",
        None => "it has not been heard yet that it runs there",
    };
    advice(
        format!(
            "interrupted when {id} had been handed over to {peer}: {now}. A process of Ferry's goes on \
             with it, until {peer} has all of it"
        ),
        format!(
            "`ferry migrations {id}` tells how it stands, and `ferry resolve {id}` waits for the end"
        ),
    )
}
