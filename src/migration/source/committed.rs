//! After the commit.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::ask::Input;
use super::{Begun, FREEZE_LIMIT, GOODBYE_LIMIT, SETTLE_LIMIT, WHOLE_LIMIT};
use crate::migration::checkpoint::dump::Go;
use crate::migration::network::hooks::Hooks;
use crate::migration::protocol::talk::Heard;
use crate::migration::protocol::{Message, Standing, Verdict};
use crate::migration::recovery::rest::{self, Brought};
use crate::migration::recovery::{recover, settle};
use crate::migration::transfer::carry::Order;
use crate::migration::transfer::lanes::Lane;
use crate::network::host_side::Silence;
use crate::report::exit::Failed;
use crate::report::progress::Reporter;
use crate::sys::fault;

/// After the commit: the destination owns the container. There is no way back from here.
pub(super) struct Committed(pub(super) Begun);

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
        let standing = match running {
            true => Standing::Running,
            false if begun.left > 0 => Committed::bring_rest(&mut begun, reporter),
            false => Committed::look_for(&begun, reporter),
        };
        if standing != Standing::Running {
            // The guard stays, if it has something without which what is frozen here is not whole.
            begun.closer.close();
            begun.work.keep();
            let id = &begun.journal.record.container;
            return Err(Failed::in_doubt(anyhow!(
                "the container was handed over to {peer}, and {peer} does not answer that it runs: \
                 its copy {what}.\nWhat is here stays frozen and unreachable, and a process of Ferry's goes on \
                 asking.\nhint: `ferry resolve {id}` asks at once; if {peer} is gone for good, `ferry \
                 resolve {id} --keep` lets it run on here",
                peer = begun.journal.record.peer,
                what = standing.describe(),
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
                    reporter.mark("runs there");
                    reporter.report.frozen_ms =
                        begun.frozen_since.map(|s| s.elapsed().as_secs_f64() * 1000.0);
                    reporter.report.arrival = arrival.marks;
                    // What is frozen here stays until the last page is in over there.
                    begun.inputs.until(WHOLE_LIMIT);
                }
                Ok(Input::Heard(Heard::Message(Message::Whole(served)))) => {
                    reporter.mark("all of it is there");
                    reporter.report.served = Some(served);
                    return true;
                }
                Ok(_) => {}
                // Too late for Ctrl-C: what is decided is carried through.
                Err(_) if std::mem::take(&mut begun.inputs.interrupted) => {
                    reporter.warning("the container has been handed over: finishing");
                }
                Err(e) => {
                    reporter.warning(&format!("{e:#}; looking for the destination"));
                    return false;
                }
            }
        }
    }

    /// The link broke while the destination runs and pages are here: brings them over new ones.
    fn bring_rest(begun: &mut Begun, reporter: &mut Reporter) -> Standing {
        begun.closer.close();
        let (record, wishes) = (begun.journal.record.clone(), begun.memory_wishes.clone());
        let queue = &begun.inputs.queue;
        let end = rest::bring(&record, wishes, &mut |why| {
            if let Some(why) = why {
                reporter.warning(&format!("{why}; trying again"));
            }
            // Too late to give up, but nobody has to stand by: `ferry resolve` goes on with it.
            !queue.try_iter().any(|input| matches!(input, Input::Signal(_)))
        });
        match end {
            Brought::Whole(served) => {
                reporter.mark("all of it is there");
                reporter.report.served = served;
                Standing::Running
            }
            Brought::Gone => Standing::Gone,
            Brought::Stopped => Standing::Partial,
        }
    }

    /// The link broke at the worst moment: asks over new ones.
    fn look_for(begun: &Begun, reporter: &mut Reporter) -> Standing {
        let until = Instant::now() + SETTLE_LIMIT;
        let mut pause = Duration::from_millis(100);
        loop {
            match settle::ask(&begun.journal.record, Some(Verdict::Commit)) {
                Ok(Standing::Waiting) => {}
                Ok(standing) => return standing,
                Err(e) if Instant::now() > until => {
                    reporter.warning(&format!("{e:#}"));
                    return Standing::Waiting;
                }
                Err(_) => {}
            }
            if Instant::now() > until {
                return Standing::Waiting;
            }
            // Between two tries to reach a host there is nothing to wait on but time.
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }
}
