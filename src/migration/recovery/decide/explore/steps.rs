//! What can happen next: every step that somebody can take, by the rules, and every fault.

use super::super::*;
use super::source::Who;
use super::world::*;
use crate::migration::journal::State;
use crate::migration::protocol::{Standing, Verdict};

/// The decisions: those of the module, or others in their place.
#[derive(Clone, Copy)]
pub struct Rules {
    pub guard: fn(State, bool) -> Guarding,
    pub has_heard: fn(Standing) -> bool,
    pub resolve: fn(State, Tasks, There, Option<OperatorWord>) -> NextDeed,
    pub hear: fn(CopyPhase, CopyEvent) -> (Act, Option<Standing>),
    pub pages: fn(State) -> Pages,
    pub released: fn(bool) -> Released,
    pub answer: fn(LeftCopy) -> Answer,
    /// A link that ends after `Abort` has brought it.
    pub end_tells: bool,
    /// Whoever asks at a destination whose Ferry was killed asks its guard.
    pub guard_answers: bool,
    /// The source's guard decides anew where somebody else has begun to take the container back.
    pub guard_looks_again: bool,
}

pub const RULES: Rules = Rules {
    guard,
    has_heard,
    resolve,
    hear,
    pages,
    released,
    answer,
    end_tells: false,
    guard_answers: true,
    guard_looks_again: true,
};

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Somebody goes on: it happens sooner or later.
    Goes,
    /// It may happen.
    May,
}

/// A step, and what is then.
pub struct Step {
    pub what: &'static str,
    pub kind: Kind,
    pub then: World,
}

pub struct Steps<'a> {
    pub rules: &'a Rules,
    pub now: World,
    pub list: Vec<Step>,
}

impl<'a> Steps<'a> {
    /// All steps from here, those first that go before others when nothing else happens.
    pub fn of(now: World, rules: &'a Rules) -> Vec<Step> {
        let mut steps = Steps { rules, now, list: Vec::with_capacity(24) };
        if now.wrong.is_none() {
            steps.link();
            steps.receive();
            steps.pager();
            steps.questions();
            steps.migrate();
            steps.guard();
            steps.settle(Who::Migrate);
            steps.settle(Who::Guard);
            steps.settle(Who::Resolve);
            steps.unit();
            steps.faults();
            steps.words();
        }
        steps.list.retain(|step| step.then != now);
        steps.list
    }

    pub(super) fn add(&mut self, kind: Kind, what: &'static str, change: impl FnOnce(&mut World)) {
        let mut then = self.now;
        change(&mut then);
        self.list.push(Step { what, kind, then });
    }

    pub(super) fn goes(&mut self, what: &'static str, change: impl FnOnce(&mut World)) {
        self.add(Kind::Goes, what, change);
    }

    pub(super) fn may(&mut self, what: &'static str, change: impl FnOnce(&mut World)) {
        self.add(Kind::May, what, change);
    }

    fn link(&mut self) {
        if !self.now.reach {
            self.goes("the cable is put back", |w| w.reach = true);
        }
    }

    fn fault(&mut self, what: &'static str, change: impl FnOnce(&mut World)) {
        if self.now.faults > 0 {
            self.may(what, |w| {
                w.faults -= 1;
                change(w);
            });
        }
    }

    fn faults(&mut self) {
        let now = self.now;
        if now.reach {
            self.fault("FAULT: the cable is cut", |w| (w.reach, w.broken) = (false, true));
        }
        if !now.broken {
            self.fault("FAULT: the link breaks", |w| w.broken = true);
        }

        if now.a.migrate != Migrate::Gone {
            self.fault("FAULT: ferry migrate is killed", World::migrate_ends);
        }
        if now.a.guard != Guard::Gone {
            self.fault("FAULT: a's guard is killed", |w| {
                w.past.unguarded = true;
                w.ends(Who::Guard);
            });
        }

        if now.a.resolve.is_some() {
            self.fault("FAULT: ferry resolve is killed", |w| w.ends(Who::Resolve));
        }
        if matches!(now.a.migrate, Migrate::Copying | Migrate::Sent) {
            self.fault("FAULT: a is interrupted", |w| w.a.migrate = Migrate::GivesUp);
        }

        if now.a.migrate == Migrate::Noted {
            self.fault("FAULT: the disk does not take committed", |w| {
                w.a.migrate = Migrate::GivesUp;
            });
        }

        if now.b.receive != Receive::Gone {
            self.fault("FAULT: ferry receive is killed", |w| {
                w.b.receive = Receive::Gone;
                w.broken = true;
                w.bereave();
            });
        }

        if now.b.pager != Pager::Gone {
            self.fault("FAULT: b's guards are killed", |w| {
                w.b.pager = Pager::Gone;
                w.bereave();
            });
        }

        if now.b.copy == Copy::Held {
            self.fault("FAULT: CRIU is killed at b", World::lose);
        }
        if now.b.receive == Receive::Gone && now.b.pager == Pager::Gone {
            // Whoever answers a question there, before he has written what he did.
            self.fault("FAULT: b's copy ends, and who has ended it", |w| {
                if matches!((RULES.answer)(w.left()), Answer::Discard { .. }) {
                    w.discard();
                }
            });
        }

        for lines in now.a.lines.crashed() {
            self.fault("FAULT: a goes down", |w| {
                w.ends(Who::Guard);
                w.ends(Who::Resolve);
                w.migrate_ends();
                w.a.lines = lines;
                (w.a.container, w.a.rebooted) = (Container::None, true);
                w.past.ran_on |= now.a.container == Container::Running && now.sent;
            });
        }

        for lines in now.b.lines.crashed() {
            self.fault("FAULT: b goes down", |w| {
                w.lose();
                // Nor does anybody know any more what has become of it.
                w.past.lost = true;
                w.b = Destination {
                    lines,
                    noted: false,
                    rebooted: true,
                    receive: Receive::Gone,
                    pager: Pager::Gone,
                    ..w.b
                };
                w.broken = true;
            });
        }
    }

    fn words(&mut self) {
        let (now, rules) = (self.now, self.rules);
        if now.words == 0 {
            return;
        }
        let idle = now.a.migrate == Migrate::Gone && now.a.resolve.is_none();
        if idle && !now.a.lines.last().is_over() {
            let words = [
                (None, "WORD: resolve at a"),
                (Some(OperatorWord::Keep), "WORD: resolve --keep at a"),
                (Some(OperatorWord::Discard), "WORD: resolve --discard at a"),
            ];

            for (word, what) in words {
                self.may(what, |w| {
                    w.words -= 1;
                    w.past.given_up |= word.is_some();
                    let committed = w.a.lines.have(State::Committed);
                    w.past.unsafe_word |= match word {
                        Some(OperatorWord::Keep) => committed,
                        Some(OperatorWord::Discard) => true,
                        None => false,
                    };
                    w.a.resolve = Some(Resolve { word, unit: false, doing: Doing::Round(NEW) });
                });
            }
        }

        if !now.b.lines.last().is_over() {
            for (verdict, what) in [
                (Verdict::Commit, "WORD: resolve --keep at b"),
                (Verdict::Abort, "WORD: resolve --discard at b"),
            ] {
                self.may(what, |w| {
                    w.words -= 1;
                    w.past.given_up = true;
                    w.past.unsafe_word |= verdict == Verdict::Commit;
                    let _ = w.question(rules, Some(verdict));
                });
            }
        }
    }
}
