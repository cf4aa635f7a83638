//! What is done on the source.

use super::super::*;
use super::steps::{Kind, Steps};
use super::world::*;
use crate::migration::journal::State;
use crate::migration::protocol::{Standing, Verdict};

/// Whoever settles things there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Migrate,
    Guard,
    Resolve,
}

impl Steps<'_> {
    pub(super) fn migrate(&mut self) {
        let (now, rules) = (self.now, self.rules);
        let said = now.to_a.next();
        let lost = now.to_a.ended || said == Some(Said::Undone);
        match now.a.migrate {
            Migrate::Copying | Migrate::Sent if lost => self.goes("a: gives up", |w| {
                w.a.heard |= said == Some(Said::Undone);
                w.a.migrate = Migrate::GivesUp;
            }),
            Migrate::Copying => self.goes("a: freezes, sends the rest", |w| {
                w.a.container = Container::Frozen;
                w.sent = true;
                w.a.migrate = Migrate::Sent;
            }),
            Migrate::Sent if said == Some(Said::Ready) => self.goes("a: writes committed", |w| {
                w.to_a.drop_next();
                w.a.lines.note(State::Committed);
                w.a.migrate = Migrate::Noted;
            }),
            Migrate::Noted => {
                self.goes("a: committed is on the disk", |w| {
                    w.a.lines.sync();
                    w.a.migrate = Migrate::Committed;
                });
            }
            Migrate::Committed => self.goes("a: says Commit", |w| {
                w.tell_b(Said::Commit);
                w.a.migrate = Migrate::HandedOn;
            }),
            Migrate::HandedOn => {
                let serves = now.b.lacking && !now.b.all_in && !now.broken;
                if serves && now.b.copy == Copy::Running && now.b.receive != Receive::Gone {
                    self.goes("a: the rest of its pages goes", World::pages_in);
                }
                let there = if now.b.lacking { There::Is(Standing::Partial) } else { NEW.there };
                let looks = Migrate::Looks(Doing::Round(Round { there, ask: Ask::Not }));
                match said {
                    Some(Said::Whole) => self.goes("a: hears Whole, ends what is frozen", |w| {
                        w.end_frozen();
                        w.a.migrate = Migrate::Looks(Doing::Ended);
                    }),
                    _ if lost => self.goes("a: looks for b", |w| w.a.migrate = looks),
                    _ => self.may("a: has waited for long, looks for b", |w| w.a.migrate = looks),
                }
            }
            Migrate::GivesUp => self.goes("a: says Abort", |w| {
                if w.a.lines.last() == State::Committed {
                    w.a.lines.write(State::Returning);
                }
                w.tell_b(Said::Abort);
                w.past.stayed |= w.a.container != Container::None;
                w.a.migrate = Migrate::Undoes(Back::Note);
            }),
            Migrate::Undoes(step) => {
                self.goes("a: undoes", |w| {
                    w.a.migrate = w.undo(step).map_or(Migrate::Undone, Migrate::Undoes);
                });
            }
            Migrate::Undone => {
                if let Some(said) = said {
                    self.goes("a: hears that b has undone it", |w| {
                        w.to_a.drop_next();
                        w.a.heard |= said == Said::Undone;
                    });
                }

                let knows = now.a.heard || rules.end_tells && now.to_a.ended;
                let kind = if said.is_none() { Kind::Goes } else { Kind::May };
                self.add(kind, "a: ends", |w| {
                    w.a.guard = match w.a.guard {
                        Guard::Gone => Guard::Gone,
                        _ if knows => Guard::Gone,
                        _ => Guard::Told,
                    };
                    w.migrate_ends();
                });
            }
            Migrate::Sent | Migrate::Looks(_) | Migrate::Gone => {}
        }

        let hears = !matches!(now.a.migrate, Migrate::Gone | Migrate::Noted);
        if now.broken && !now.to_a.ended && hears {
            let kind = if said.is_some() { Kind::May } else { Kind::Goes };
            self.add(kind, "a: hears the link's end", |w| w.to_a.end());
        }
    }

    pub(super) fn guard(&mut self) {
        let (now, rules) = (self.now, self.rules);
        let told = now.a.guard == Guard::Told;
        if !(told || now.a.guard == Guard::Watches && now.a.migrate == Migrate::Gone) {
            return;
        }
        let decided = (rules.guard)(now.a.lines.last(), told);
        if decided != Guarding::Tell && !now.is_free(Who::Guard) {
            return;
        }
        let (what, doing) = match decided {
            Guarding::RunOn => ("a's guard undoes", Some(Doing::Back(Back::Note))),
            Guarding::CarryThrough => ("a's guard carries it through", Some(Doing::Round(NEW))),
            Guarding::Tell => ("a's guard tells", Some(Doing::Tell(Ask::Not))),
            Guarding::Nothing => ("a's guard ends", None),
        };
        self.goes(what, |w| w.a.guard = doing.map_or(Guard::Gone, Guard::Does));
    }

    /// One step of whoever settles it.
    pub(super) fn settle(&mut self, who: Who) {
        let (now, rules) = (self.now, self.rules);
        let Some(doing) = now.doing(who) else { return };
        match doing {
            Doing::Round(Round { there, ask: Ask::Not }) => {
                if there == There::Unasked && !now.is_free(who) {
                    return;
                }
                let state = now.a.lines.last();
                if who == Who::Guard && state != State::Committed {
                    return self.goes("a's guard: somebody has taken it back", |w| {
                        w.a.guard =
                            if rules.guard_looks_again { Guard::Watches } else { Guard::Gone };
                    });
                }

                if state.is_over() {
                    return self.goes("a: somebody was quicker", |w| w.ends(who));
                }
                let word = now.a.resolve.filter(|_| who == Who::Resolve).and_then(|r| r.word);
                let round = |there, ask| Doing::Round(Round { there, ask });
                match (rules.resolve)(state, now.tasks(), there, word) {
                    NextDeed::Ask(_) if !now.reach => self.goes("a: cannot ask", |w| {
                        w.set(who, round(There::Silent, Ask::Not));
                    }),
                    NextDeed::Ask(verdict) => self.goes("a: asks", |w| {
                        w.set(who, round(there, Ask::Sent(verdict)));
                    }),
                    next @ (NextDeed::RunsOn | NextDeed::Abandon) => {
                        self.goes("a: decides that it is a's", |w| {
                            if next == NextDeed::RunsOn && w.a.container == Container::None {
                                w.wrong = Some("said to run where nothing does");
                            }
                            match who {
                                Who::Migrate => w.a.migrate = Migrate::GivesUp,
                                _ => w.set(who, Doing::Back(Back::Note)),
                            }
                        });
                    }
                    NextDeed::HandOver => self.goes("a: hands it over after all", |w| {
                        w.a.lines.write(State::Committed);
                        w.set(who, Doing::Round(NEW));
                    }),
                    NextDeed::LetGo => self.goes("a: ends what is frozen", |w| {
                        w.end_frozen();
                        w.set(who, Doing::Ended);
                    }),
                    NextDeed::BringRest => self.goes("a: brings the rest", |w| {
                        let alive = w.b.receive != Receive::Gone || w.b.pager == Pager::Fills;
                        if w.reach && alive && w.b.lacking && w.b.copy == Copy::Running {
                            w.pages_in();
                        }
                        w.set(who, Doing::Round(NEW));
                    }),
                    NextDeed::Doubt(doubt) if doubt.passes() => {
                        let by_hand = who == Who::Resolve && !now.a.resolve.is_some_and(|r| r.unit);
                        if by_hand || who == Who::Migrate {
                            let kind = if by_hand { Kind::Goes } else { Kind::May };
                            self.add(kind, "a: asks no more, in doubt", |w| w.ends(who));
                        }
                        if !by_hand {
                            self.goes("a: will ask again", |w| w.set(who, Doing::Round(NEW)));
                        }
                    }
                    NextDeed::Doubt(_) => self.goes("a: is in doubt", |w| w.ends(who)),
                }
            }
            Doing::Round(Round { there, ask }) => {
                self.asked(
                    who,
                    ask,
                    move |ask| Doing::Round(Round { there, ask }),
                    |standing| {
                        Some(Doing::Round(Round {
                            there: standing.map_or(There::Silent, There::Is),
                            ask: Ask::Not,
                        }))
                    },
                );
            }
            Doing::Back(step) => self.goes("a: undoes", |w| {
                let next = w.undo(step).map_or(Doing::Tell(Ask::Not), Doing::Back);
                w.set(who, next);
            }),
            Doing::Ended => self.goes("a: writes finished", |w| {
                w.a.lines.write(State::Finished);
                w.tell_b(Said::Finished);
                if who == Who::Migrate {
                    w.a.guard = Guard::Gone;
                }
                w.ends(who);
            }),
            Doing::Tell(Ask::Not) if now.reach => self.goes("a: tells Abort", |w| {
                w.set(who, Doing::Tell(Ask::Sent(Some(Verdict::Abort))));
            }),
            Doing::Tell(Ask::Not) => {}
            Doing::Tell(ask) => self.asked(who, ask, Doing::Tell, |standing| {
                let heard = standing.is_some_and(rules.has_heard);
                (!heard).then_some(Doing::Tell(Ask::Not))
            }),
        }
    }

    /// Somebody's question is under way, or answered.
    pub(super) fn asked(
        &mut self,
        who: Who,
        ask: Ask,
        at: impl Fn(Ask) -> Doing,
        then: impl FnOnce(Option<Standing>) -> Option<Doing>,
    ) {
        match ask {
            Ask::Sent(_) => {
                let kind = if self.now.reach { Kind::May } else { Kind::Goes };
                self.add(kind, "a: no answer comes", |w| {
                    w.stray(ask);
                    w.set(who, at(Ask::Back(None)));
                });
            }
            Ask::Back(standing) => self.goes("a: is answered", |w| match then(standing) {
                Some(doing) => w.set(who, doing),
                None => {
                    w.a.heard = true;
                    w.ends(who);
                }
            }),
            Ask::Not => {}
        }
    }

    /// `ferry resolve --all` asks again and again: from a boot on, and where nobody else is left.
    pub(super) fn unit(&mut self) {
        let a = self.now.a;
        let left = a.migrate == Migrate::Gone && (a.rebooted || self.now.past.unguarded);
        if !left || a.resolve.is_some() {
            return;
        }
        let start = |doing| Some(Resolve { word: None, unit: true, doing });
        match a.lines.last() {
            State::Finished => {}
            State::Aborted if a.heard => {}
            State::Aborted => {
                self.goes("a: the unit tells", |w| w.a.resolve = start(Doing::Tell(Ask::Not)));
            }
            _ => self.goes("a: the unit resolves", |w| w.a.resolve = start(Doing::Round(NEW))),
        }
    }
}

impl World {
    pub(super) fn tell_b(&mut self, said: Said) {
        if !self.broken && !self.to_b.ended {
            self.to_b.push(said);
        }
    }

    /// One step of the way back.
    pub(super) fn undo(&mut self, step: Back) -> Option<Back> {
        match step {
            Back::Note => {
                if self.a.lines.last() != State::Returning {
                    self.a.lines.write(State::Returning);
                }
                self.past.stayed |= self.a.container != Container::None;
                Some(Back::Thaw)
            }
            Back::Thaw => {
                self.thaw();
                Some(Back::Over)
            }
            Back::Over => {
                self.a.lines.write(State::Aborted);
                None
            }
        }
    }

    pub(super) fn migrate_ends(&mut self) {
        if let Some(&ask) = self.ask(Who::Migrate) {
            self.stray(ask);
        }
        self.a.migrate = Migrate::Gone;
        self.broken = true;
        self.to_a.end();
    }

    pub(super) fn ends(&mut self, who: Who) {
        if let Some(&ask) = self.ask(who) {
            self.stray(ask);
        }
        match who {
            Who::Migrate => self.migrate_ends(),
            Who::Guard => self.a.guard = Guard::Gone,
            Who::Resolve => self.a.resolve = None,
        }
    }

    pub(super) fn doing(&self, who: Who) -> Option<Doing> {
        match (who, self.a.migrate, self.a.guard) {
            (Who::Migrate, Migrate::Looks(doing), _) => Some(doing),
            (Who::Guard, _, Guard::Does(doing)) => Some(doing),
            (Who::Resolve, ..) => self.a.resolve.map(|r| r.doing),
            _ => None,
        }
    }

    pub(super) fn set(&mut self, who: Who, doing: Doing) {
        match who {
            Who::Migrate => self.a.migrate = Migrate::Looks(doing),
            Who::Guard => self.a.guard = Guard::Does(doing),
            Who::Resolve => {
                if let Some(resolve) = &mut self.a.resolve {
                    resolve.doing = doing;
                }
            }
        }
    }

    pub(super) fn ask(&self, who: Who) -> Option<&Ask> {
        let doing = match who {
            Who::Migrate => match &self.a.migrate {
                Migrate::Looks(doing) => doing,
                _ => return None,
            },
            Who::Guard => match &self.a.guard {
                Guard::Does(doing) => doing,
                _ => return None,
            },
            Who::Resolve => &self.a.resolve.as_ref()?.doing,
        };
        match doing {
            Doing::Round(Round { ask, .. }) | Doing::Tell(ask) => Some(ask),
            _ => None,
        }
    }

    pub(super) fn ask_mut(&mut self, who: Who) -> Option<&mut Ask> {
        let doing = match who {
            Who::Migrate => match &mut self.a.migrate {
                Migrate::Looks(doing) => doing,
                _ => return None,
            },
            Who::Guard => match &mut self.a.guard {
                Guard::Does(doing) => doing,
                _ => return None,
            },
            Who::Resolve => &mut self.a.resolve.as_mut()?.doing,
        };
        match doing {
            Doing::Round(Round { ask, .. }) | Doing::Tell(ask) => Some(ask),
            _ => None,
        }
    }

    /// Tells whether nobody else holds the source's journal.
    pub(super) fn is_free(&self, who: Who) -> bool {
        let holds = |other: Who| {
            other != who
                && match self.doing(other) {
                    Some(Doing::Round(round)) => other == Who::Migrate || round != NEW,
                    Some(Doing::Back(_) | Doing::Ended) => true,
                    Some(Doing::Tell(_)) | None => false,
                }
        };
        let migrating = who != Who::Migrate && self.a.migrate != Migrate::Gone;
        !migrating && ![Who::Guard, Who::Resolve].into_iter().any(holds)
    }
}
