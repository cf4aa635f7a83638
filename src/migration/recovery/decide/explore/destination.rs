//! What is done on the destination.

use super::super::*;
use super::source::Who;
use super::steps::{Kind, Rules, Steps};
use super::world::*;
use crate::migration::journal::State;
use crate::migration::protocol::{Standing, Verdict};

impl Steps<'_> {
    pub(super) fn receive(&mut self) {
        let (now, rules) = (self.now, self.rules);
        let b = now.b;
        if b.copy != Copy::None && !b.lacking && !b.all_in && b.receive != Receive::Gone {
            self.goes("b: the last page is in", World::pages_in);
        }

        let phase = phase(&b);
        match b.receive {
            Receive::Arriving if now.sent && now.to_b.next().is_none() && !now.to_b.ended => {
                self.goes("b: restored and held; says Ready", |w| {
                    w.b.copy = Copy::Held;
                    w.b.pager = Pager::Watches;
                    w.b.lines.note(State::Ready);
                    w.b.receive = Receive::Held;
                    w.tell_a(Said::Ready);
                });
            }
            Receive::Starting if b.copy == Copy::None => {
                if !now.past.ran_there {
                    self.goes("b: the copy has died, and is seen not to have run", |w| {
                        w.b.lines.write(State::Unstarted);
                        w.b.receive = Receive::Undoing;
                    });
                }
                self.goes("b: the copy has died", |w| w.b.receive = Receive::Undoing);
            }
            Receive::Starting => self.goes("b: lets the copy run", |w| {
                w.let_run();
                w.b.receive = Receive::Released;
            }),
            Receive::Released => {
                self.goes("b: hears that it runs", |w| w.b.receive = Receive::Running);
            }
            Receive::Running if b.all_in => self.goes("b: writes whole, says Whole", |w| {
                w.b.lines.note(State::Whole);
                w.b.receive = Receive::Whole;
                w.tell_a(Said::Whole);
            }),
            Receive::Whole if now.to_b.ended => {
                self.goes("b: writes finished", World::receive_finishes);
            }
            Receive::Undoing => self.goes("b: writes aborted, says so", |w| {
                w.b.lines.write(State::Aborted);
                w.tell_a(Said::Undone);
                w.receive_ends();
            }),
            _ => {}
        }

        if b.receive == Receive::Held && b.copy == Copy::None {
            self.goes("b: sees that the copy has died", |w| {
                w.hear(rules, phase, CopyEvent::Broken)
            });
        }

        if b.receive == Receive::Gone || b.receive == Receive::Undoing {
            return;
        }
        if let Some(said) = now.to_b.next() {
            let (what, event) = match said {
                Said::Commit => ("b: hears Commit", Some(CopyEvent::Verdict(Verdict::Commit))),
                Said::Abort => ("b: hears Abort", Some(CopyEvent::Verdict(Verdict::Abort))),
                _ => ("b: hears Finished", None),
            };

            self.goes(what, |w| {
                w.to_b.drop_next();
                match event {
                    Some(event) => w.hear(rules, phase, event),
                    None if w.b.receive == Receive::Whole => w.receive_finishes(),
                    None => {}
                }
            });
        }

        if now.broken && !now.to_b.ended {
            let kind = if now.to_b.next().is_some() { Kind::May } else { Kind::Goes };
            self.add(kind, "b: hears the link's end", |w| {
                w.to_b.end();
                w.hear(rules, phase, CopyEvent::Unlinked);
            });
        }
    }

    pub(super) fn pager(&mut self) {
        let (now, rules) = (self.now, self.rules);
        if now.b.receive != Receive::Gone {
            return;
        }

        match now.b.pager {
            Pager::Watches => match (rules.pages)(now.b.lines.last()) {
                Pages::Nothing => self.goes("b's guard ends", |w| w.b.pager = Pager::Gone),
                Pages::GoOn => self.goes("b's guard goes on", |w| w.b.pager = Pager::GoesOn),
                Pages::Discard => self.goes("b's guard ends the copy", |w| {
                    w.discard();
                    w.b.pager = Pager::Discards;
                }),
            },
            Pager::GoesOn => {
                if now.b.copy != Copy::None && !now.b.lacking && !now.b.all_in {
                    self.goes("b's guard: the last page is in", World::pages_in);
                }
                self.goes("b's guard lets the copy run", |w| {
                    w.let_run();
                    w.b.pager = match (rules.released)(w.b.copy == Copy::Running) {
                        Released::Keep => Pager::Fills,
                        Released::Discard => {
                            w.discard();
                            Pager::Discards
                        }
                    };
                });
            }
            Pager::Fills if now.b.all_in => self.goes("b's guard writes finished", |w| {
                w.b.lines.write(State::Finished);
                w.b.pager = Pager::Gone;
            }),
            Pager::Fills if !now.b.lacking => {
                self.goes("b's guard: the last page is in", World::pages_in);
            }
            Pager::Fills => {}
            Pager::Discards => self.goes("b's guard writes aborted", |w| {
                w.b.lines.write(State::Aborted);
                w.b.pager = Pager::Gone;
            }),
            Pager::Gone => {}
        }
    }

    /// Questions that arrive.
    pub(super) fn questions(&mut self) {
        let (now, rules) = (self.now, self.rules);
        for who in [Who::Migrate, Who::Guard, Who::Resolve] {
            let Some(&Ask::Sent(verdict)) = now.ask(who) else { continue };
            let mut then = now;
            let answer = then.question(rules, verdict);
            if let (Some(standing), Some(ask)) = (answer, then.ask_mut(who)) {
                *ask = Ask::Back(Some(standing));
            }
            self.goes("b: answers a question", |w| *w = then);
        }
        let strays = [
            (true, None, "b: somebody asks"),
            (now.stray_commit, Some(Verdict::Commit), "b: an old Commit comes"),
            (now.stray_abort, Some(Verdict::Abort), "b: an old Abort comes"),
        ];
        for (there, verdict, what) in strays {
            if there {
                self.may(what, |w| {
                    let _ = w.question(rules, verdict);
                });
            }
        }
    }
}

/// Returns how far the destination says that it is.
fn phase(b: &Destination) -> CopyPhase {
    let (running, whole) = (true, b.receive == Receive::Whole);
    match b.receive {
        Receive::Arriving | Receive::Undoing | Receive::Gone => CopyPhase::Arriving,
        Receive::Held => CopyPhase::Held { lacking: b.lacking },
        Receive::Starting | Receive::Released => {
            CopyPhase::Started { running: false, whole, lacking: b.lacking }
        }
        Receive::Running | Receive::Whole => {
            CopyPhase::Started { running, whole, lacking: b.lacking }
        }
    }
}

impl World {
    pub(super) fn tell_a(&mut self, said: Said) {
        if !self.broken && !self.to_a.ended {
            self.to_a.push(said);
        }
    }

    pub(super) fn receive_ends(&mut self) {
        (self.b.receive, self.b.pager) = (Receive::Gone, Pager::Gone);
        self.broken = true;
    }

    pub(super) fn receive_finishes(&mut self) {
        self.b.lines.write(State::Finished);
        self.receive_ends();
    }

    /// `ferry receive` hears something.
    pub(super) fn hear(&mut self, rules: &Rules, phase: CopyPhase, event: CopyEvent) {
        match (rules.hear)(phase, event).0 {
            Act::Wait => {}
            Act::Undo => {
                self.discard();
                self.b.receive = Receive::Undoing;
            }
            Act::Run => {
                self.b.lines.note(State::Committed);
                self.b.receive = Receive::Starting;
            }
        }
    }

    pub(super) fn left(&self) -> LeftCopy {
        LeftCopy {
            state: self.b.lines.last(),
            started: self.b.lines.may_have_run(),
            same_boot: !self.b.rebooted,
            whole: self.b.noted && self.b.copy == Copy::Running,
        }
    }

    /// A question comes to the destination: its answer, once there is one.
    pub(super) fn question(&mut self, rules: &Rules, verdict: Option<Verdict>) -> Option<Standing> {
        if self.b.receive != Receive::Gone && !self.b.lines.last().is_over() {
            if self.b.receive == Receive::Undoing {
                return None;
            }
            let (phase, event) =
                (phase(&self.b), verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict));
            self.hear(rules, phase, event);
            return (rules.hear)(phase, event).1;
        }

        if rules.guard_answers && self.b.pager != Pager::Gone && !self.b.lines.last().is_over() {
            let running = match self.b.pager {
                Pager::GoesOn => false,
                Pager::Fills => true,
                // Nobody listens yet, or any more.
                _ => return None,
            };
            let phase = CopyPhase::Started { running, whole: false, lacking: self.b.lacking };
            return (rules.hear)(phase, verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict)).1;
        }

        loop {
            match (rules.answer)(self.left()) {
                Answer::Is(standing) => return Some(standing),
                Answer::Keep => self.b.lines.write(State::Finished),
                Answer::Discard { doubtful } => {
                    if doubtful {
                        self.b.lines.write(State::Committed);
                    }
                    self.discard();
                    self.b.lines.write(State::Aborted);
                }
            }
        }
    }
}
