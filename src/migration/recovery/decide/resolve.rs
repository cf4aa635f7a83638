//! What `ferry resolve` does on a source, and after the commit `ferry migrate` and its guard, too:
//! without the words of an operator it never ends the last copy, never makes a second one, and never
//! says that something runs where nothing does.
//!
//! A copy that is held on the destination is of the moment of the freeze. It may be let run as long
//! as the container has not run on here since: as its journal says neither that it was handed back
//! ([`State::Returning`] is on the disk before a task is thawed) nor that it is over, and this host
//! has been started again since, it cannot have. Where its tasks have ended while the host stayed
//! up, whoever ended them may have let them run before.

use crate::migration::journal::State;
use crate::migration::protocol::{Standing, Verdict};

/// The container's tasks on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tasks {
    /// They are there: frozen, or running.
    Here,
    /// They have ended.
    Ended,
    /// They have ended with this host, which has been started again since.
    Rebooted,
    /// The same, and another container of that ID has been made here.
    Anew,
}

/// What the destination says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum There {
    /// Nobody has asked.
    Unasked,
    /// It cannot be asked.
    Silent,
    /// This.
    Is(Standing),
}

/// The operator's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperatorWord {
    /// This host owns the container.
    Keep,
    /// The other one does.
    Discard,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextDeed {
    /// The destination is asked, or told this.
    Ask(Option<Verdict>),
    /// It runs on here; the destination is told so afterwards.
    RunsOn,
    /// Nothing of it is here that could run, and nothing there that may: what is left of the
    /// migration is undone.
    Abandon,
    /// The destination owns it from now on: written down, then told.
    HandOver,
    /// It runs there: what is here goes.
    LetGo,
    /// It runs there, and needs the pages that are here.
    BringRest,
    /// Only the operator can say.
    Doubt(Doubt),
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// The only copy is here, and the operator wants it away.
    OnlyHere,
    /// The destination cannot be asked.
    Silent,
    /// It has not said yet what becomes of it.
    Starting,
    /// It is still taking the container in, though nothing more can come.
    Arriving,
    /// The tasks here have ended, and a whole copy is held there.
    Ended,
    /// Another container of that ID is here, and a copy there.
    Anew,
    /// It runs there, and waits for pages that were lost here.
    PagesLost,
    /// There is none on the destination any more; here it is frozen, and whole.
    LostThere,
    /// There is none anywhere.
    LostBoth,
}

impl Doubt {
    /// Tells whether the destination may answer otherwise when it is asked again.
    pub fn passes(self) -> bool {
        match self {
            Doubt::Silent | Doubt::Starting | Doubt::Arriving => true,
            Doubt::OnlyHere
            | Doubt::Ended
            | Doubt::Anew
            | Doubt::PagesLost
            | Doubt::LostThere
            | Doubt::LostBoth => false,
        }
    }
}

/// Decides what follows. `state` is none that is over.
pub fn resolve(state: State, tasks: Tasks, there: There, word: Option<OperatorWord>) -> NextDeed {
    match state {
        State::Committed | State::Whole => handed_over(tasks, there, word),
        _ => not_handed_over(state, tasks, there, word),
    }
}

fn handed_over(tasks: Tasks, there: There, word: Option<OperatorWord>) -> NextDeed {
    let here = tasks == Tasks::Here;
    match (word, there) {
        (Some(OperatorWord::Keep), _) if here => NextDeed::RunsOn,
        (Some(OperatorWord::Keep), _) => NextDeed::Abandon,
        (Some(OperatorWord::Discard), _) => NextDeed::LetGo,
        // What lacks pages that were here with the tasks is not let run without them.
        (None, There::Unasked) => NextDeed::Ask(here.then_some(Verdict::Commit)),
        (None, There::Silent) => NextDeed::Doubt(Doubt::Silent),
        (None, There::Is(standing)) => match standing {
            Standing::Ready if !here => NextDeed::Ask(Some(Verdict::Commit)),
            Standing::Lacking if !here => NextDeed::Ask(Some(Verdict::Abort)),
            Standing::Running => NextDeed::LetGo,
            Standing::Partial if here => NextDeed::BringRest,
            Standing::Partial => NextDeed::Doubt(Doubt::PagesLost),
            // It has run nowhere since it was frozen.
            Standing::NeverRan if here => NextDeed::RunsOn,
            Standing::NeverRan => NextDeed::Abandon,
            // It may have run there: what is here is older then.
            Standing::Gone if here => NextDeed::Doubt(Doubt::LostThere),
            Standing::Gone => NextDeed::Doubt(Doubt::LostBoth),
            _ => NextDeed::Doubt(Doubt::Starting),
        },
    }
}

fn not_handed_over(
    state: State,
    tasks: Tasks,
    there: There,
    word: Option<OperatorWord>,
) -> NextDeed {
    if tasks == Tasks::Here {
        return match word {
            Some(OperatorWord::Discard) => NextDeed::Doubt(Doubt::OnlyHere),
            _ => NextDeed::RunsOn,
        };
    }

    match (word, there) {
        (Some(OperatorWord::Keep), _) => NextDeed::Abandon,
        (_, There::Unasked) => NextDeed::Ask(None),
        (_, There::Silent) => NextDeed::Doubt(Doubt::Silent),
        (_, There::Is(Standing::Gone | Standing::NeverRan)) => NextDeed::Abandon,
        (_, There::Is(_)) if tasks == Tasks::Anew => NextDeed::Doubt(Doubt::Anew),
        (_, There::Is(standing)) => match standing {
            // By the word of an operator there.
            Standing::Running => NextDeed::HandOver,
            Standing::Partial => NextDeed::Doubt(Doubt::PagesLost),
            Standing::Waiting => NextDeed::Doubt(Doubt::Starting),
            Standing::Arriving => NextDeed::Doubt(Doubt::Arriving),
            // The rest of it has ended with the tasks here; or it has run on here since.
            Standing::Lacking => NextDeed::Abandon,
            _ if state == State::Returning => NextDeed::Abandon,
            _ if tasks == Tasks::Rebooted || word == Some(OperatorWord::Discard) => {
                NextDeed::HandOver
            }
            _ => NextDeed::Doubt(Doubt::Ended),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDINGS: [Standing; 8] = [
        Standing::Running,
        Standing::Waiting,
        Standing::Ready,
        Standing::Lacking,
        Standing::Arriving,
        Standing::Partial,
        Standing::Gone,
        Standing::NeverRan,
    ];

    fn everywhere(check: impl Fn(State, Tasks, There, Option<OperatorWord>, NextDeed)) {
        let there = STANDINGS.into_iter().map(There::Is);
        let there: Vec<_> = there.chain([There::Unasked, There::Silent]).collect();
        for state in [State::Begun, State::Returning, State::Committed] {
            for tasks in [Tasks::Here, Tasks::Ended, Tasks::Rebooted, Tasks::Anew] {
                for there in &there {
                    for word in [None, Some(OperatorWord::Keep), Some(OperatorWord::Discard)] {
                        let next = resolve(state, tasks, *there, word);
                        check(state, tasks, *there, word, next);
                    }
                }
            }
        }
    }

    /// In every state there can be, whatever the destination says.
    #[test]
    fn no_copy_is_made_or_ended_without_a_word() {
        everywhere(|state, tasks, there, word, next| {
            let case = format!("{state:?} {tasks:?} {there:?} {word:?} {next:?}");
            let committed = state == State::Committed;
            let never_ran = there == There::Is(Standing::NeverRan);
            let whole_there =
                matches!(there, There::Is(Standing::Ready | Standing::Waiting | Standing::Running));
            match next {
                // Says that it runs here: something must be here, and nobody else's.
                NextDeed::RunsOn => {
                    assert_eq!(tasks, Tasks::Here, "{case}");
                    assert!(!committed || never_ran || word == Some(OperatorWord::Keep), "{case}");
                }
                // Ends what is there: only what may not run, or what the operator wants gone.
                NextDeed::Abandon => {
                    assert_ne!(tasks, Tasks::Here, "{case}");
                    let stale = state == State::Returning && there == There::Is(Standing::Ready);
                    assert!(word == Some(OperatorWord::Keep) || !whole_there || stale, "{case}");
                    assert!(
                        word == Some(OperatorWord::Keep) || matches!(there, There::Is(_)),
                        "{case}"
                    );
                    assert!(word == Some(OperatorWord::Keep) || never_ran || !committed, "{case}");
                }
                // Lets it run there: nothing here may run, nor have run since.
                NextDeed::HandOver => {
                    assert!(!committed && whole_there, "{case}");
                    assert!(matches!(tasks, Tasks::Ended | Tasks::Rebooted), "{case}");
                    let running = there == There::Is(Standing::Running);
                    let sure = tasks == Tasks::Rebooted && state == State::Begun;
                    assert!(running || sure || word == Some(OperatorWord::Discard), "{case}");
                    assert!(running || state != State::Returning, "{case}");
                }
                // Ends what is here: it runs there.
                NextDeed::LetGo => {
                    assert!(committed, "{case}");
                    let runs = there == There::Is(Standing::Running);
                    assert!(runs || word == Some(OperatorWord::Discard), "{case}");
                }
                NextDeed::BringRest => {
                    assert!(committed && tasks == Tasks::Here, "{case}");
                    assert_eq!(there, There::Is(Standing::Partial), "{case}");
                }
                // One that has not committed only asks; nor does one tell that has nothing here, before it
                // knows that there is a whole copy, or never will be one.
                NextDeed::Ask(verdict) => {
                    let here = tasks == Tasks::Here;
                    match verdict {
                        None => assert!(there == There::Unasked && !(committed && here), "{case}"),
                        Some(Verdict::Commit) => {
                            assert!(committed, "{case}");
                            let whole = there == There::Is(Standing::Ready);
                            assert!(if here { there == There::Unasked } else { whole }, "{case}");
                        }
                        Some(Verdict::Abort) => {
                            assert!(committed && !here, "{case}");
                            assert_eq!(there, There::Is(Standing::Lacking), "{case}");
                        }
                    }
                }
                NextDeed::Doubt(_) => {}
            }
        });
    }

    /// The host that was the source has been started again: what it left is not ended.
    #[test]
    fn a_reboot_of_the_source_does_not_end_the_copy() {
        let after = |there| resolve(State::Begun, Tasks::Rebooted, there, None);
        assert_eq!(after(There::Unasked), NextDeed::Ask(None));
        assert_eq!(after(There::Is(Standing::Ready)), NextDeed::HandOver);
        assert_eq!(after(There::Is(Standing::Gone)), NextDeed::Abandon);
        assert_eq!(after(There::Silent), NextDeed::Doubt(Doubt::Silent));
        // It had been given up, and ran on until the host went down.
        let back = resolve(State::Returning, Tasks::Rebooted, There::Is(Standing::Ready), None);
        assert_eq!(back, NextDeed::Abandon);
    }

    /// The operator can always get out of it.
    #[test]
    fn a_word_settles_it() {
        everywhere(|state, tasks, there, word, next| {
            let asks = matches!(next, NextDeed::Ask(_));
            if word == Some(OperatorWord::Keep) {
                assert!(
                    matches!(next, NextDeed::RunsOn | NextDeed::Abandon),
                    "{state:?} {tasks:?} {there:?}"
                );
            }
            let held = matches!(there, There::Is(Standing::Ready | Standing::Lacking));
            assert!(!asks || there == There::Unasked || held && tasks != Tasks::Here);
        });
    }
}
