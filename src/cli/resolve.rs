//! `ferry resolve`: settles what a crash has left.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use serde_json::json;

use super::args::{Globals, RemoteArgs, ResolveArgs};
use super::bounds::Bounds;
use super::common::{self, runtime, say, say_json};
use super::resolve_all::resolve_all;
use crate::migration::forwarding as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::{Journal, Role, State, holder, shelf};
use crate::migration::protocol::{Standing, Verdict};
use crate::migration::recovery::decide::{
    self, Doubt, NextDeed, OperatorWord, Tasks, There, has_heard,
};
use crate::migration::recovery::undo::{Rival, StaysFrozen};
use crate::migration::recovery::verdicts::{self, ControlRequest};
use crate::migration::recovery::{guards, postcopy_recover, undo, word};
use crate::migration::transfer::memory_sender;
use crate::problem::{Advice, Advise, advice};
use crate::report::exit::Failed;
use crate::report::log;
use crate::transport::connect::{Destination as Reach, split_command};

/// What has come of it, and whether the other host is still to be told.
struct Settled {
    said: String,
    tell: Option<Verdict>,
}

impl Settled {
    fn new(said: impl Into<String>) -> Settled {
        Settled { said: said.into(), tell: None }
    }

    fn telling(self, verdict: Verdict) -> Settled {
        Settled { tell: Some(verdict), ..self }
    }
}

/// What stands in the way of one that is open still.
pub(super) struct Stuck {
    /// It may have gone when it is tried again; else only an operator's word settles it.
    pub again: bool,
    /// What is said of it.
    pub failed: Failed,
}

impl From<Failed> for Stuck {
    fn from(failed: Failed) -> Stuck {
        Stuck { again: true, failed }
    }
}

impl From<anyhow::Error> for Stuck {
    fn from(error: anyhow::Error) -> Stuck {
        Failed::from(error).into()
    }
}

/// Time that other hosts and processes may take where nothing else was said.
const LIMIT: Duration = Duration::from_secs(60);

/// `ferry resolve`.
pub fn resolve(globals: &Globals, args: &ResolveArgs) -> Result<(), Failed> {
    let limit = args.timeout.unwrap_or(LIMIT);
    let bounds = Bounds::new((!args.boot).then_some(limit))?;
    let Some(word) = &args.id else { return resolve_all(args, &bounds) };
    let state_dir = common::state_dir()?;
    if args.no_forward && forward::is_known(word) {
        // Others may have been called so before.
        say(forward::end(word, args.when_idle).map_err(Failed::refused)?);
        return Ok(());
    }

    let id = &shelf::id_of(&state_dir, word).map_err(Failed::refused)?;
    if args.no_forward {
        say(forward::end(id, args.when_idle).map_err(Failed::refused)?);
        return Ok(());
    }

    if let Some(said) = forward::revive(id)? {
        say(said);
        return Ok(());
    }
    let all = shelf::about(&state_dir, id).map_err(Failed::refused)?;
    let (mut open, mut over): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|j| !j.state().is_over());
    if open.len() > 1 {
        let list: Vec<_> = open.iter().map(|j| j.record.migration.as_str()).collect();
        return Err(Failed::refused(advice(
            format!("{} migrations of {id} are open", open.len()),
            format!("name one of them: {}", list.join(", ")),
        )));
    }

    let Some(mut journal) = open.pop() else {
        return resolve_mark(globals, id, args.keep, &state_dir, over.pop(), &bounds);
    };
    let word = match (args.keep, args.discard) {
        (true, _) => Some(OperatorWord::Keep),
        (_, true) => Some(OperatorWord::Discard),
        _ => None,
    };

    let said = settle_one(&mut journal, word, &args.remote, &bounds).map_err(|s| s.failed)?;
    if journal.record.role == Role::Source
        && journal.is_untold()
        && let Err(e) = word::send_later(&journal)
    {
        log::warn(&format!("nobody goes on trying: {e:#}"), []);
    }

    if args.json {
        let said = json!({"migration": journal.record.migration, "outcome": said});
        say_json(&said);
    } else {
        say(&said);
    }

    Ok(())
}

/// Brings one that is open to its end; what has come of it. If the journal is
/// [untold](Journal::is_untold) then, the other host has not heard that the container stayed.
///
/// # Errors
/// Says what stands in the way.
pub(super) fn settle_one(
    journal: &mut Journal,
    word: Option<OperatorWord>,
    remote: &RemoteArgs,
    bounds: &Bounds,
) -> Result<String, Stuck> {
    let settled = match journal.record.role {
        Role::Source => resolve_source(journal, word, remote, bounds)?,
        Role::Destination => resolve_destination(journal, word, bounds)?,
    };
    if let Some(verdict) = settled.tell {
        tell(journal, verdict, bounds);
    }
    Ok(settled.said)
}

/// The other host may hold a copy that waits for nothing else. Nobody here does.
fn tell(journal: &mut Journal, verdict: Verdict, bounds: &Bounds) {
    let told = match verdict {
        // It has heard, from whoever else was at it.
        Verdict::Abort if journal.is_told() => return,
        Verdict::Abort => verdicts::tell_stayed(journal, bounds.answer()),
        Verdict::Commit => verdicts::ask(&journal.record, Some(verdict), bounds.answer()),
    };
    let peer = &journal.record.peer;
    let e = match told {
        Ok(Standing::Running | Standing::Partial) if verdict == Verdict::Abort => {
            let words = "warning: it runs on both hosts now: end it on one of them by hand";
            let _ = writeln!(std::io::stderr(), "{words} ({peer} is the other one)");
            return;
        }
        Ok(standing) if verdict == Verdict::Abort && !has_heard(standing) => {
            anyhow!("it says of its copy that it {}", standing.describe())
        }
        Ok(_) => return,
        Err(e) => e,
    };
    log::warn(&format!("{peer} cannot be told: {e:#}"), []);
}

fn resolve_source(
    journal: &mut Journal,
    word: Option<OperatorWord>,
    remote: &RemoteArgs,
    bounds: &Bounds,
) -> Result<Settled, Stuck> {
    if journal.record.worker_lives() {
        return Err(Stuck::from(Failed::refused(advice(
            format!("migration {} is under way", journal.record.migration),
            format!("wait for it, or end process {}", journal.record.worker.pid),
        ))));
    }

    let Some(_held) = journal.hold_within(bounds.left())? else {
        return Err(Failed::in_doubt(is_busy(journal)).into());
    };
    reach_by(journal, remote)?;
    let mut there = There::Unasked;
    let mut silent = None;

    loop {
        match journal.state() {
            // Somebody else has been quicker.
            State::Aborted => return Ok(Settled::new(stayed(undo::tasks(&journal.record)?))),
            State::Finished => return Ok(Settled::new("it runs on the other host")),
            _ => {}
        }

        match decide::resolve(journal.state(), undo::tasks(&journal.record)?, there, word) {
            NextDeed::Ask(verdict) => {
                let answer = match verdict {
                    Some(verdict) => verdicts::insist(&journal.record, verdict, bounds.answer()),
                    None => verdicts::ask(&journal.record, None, bounds.answer()),
                };
                there = match answer {
                    Ok(standing) => There::Is(standing),
                    Err(e) => {
                        silent = Some(e);
                        There::Silent
                    }
                };
            }
            NextDeed::RunsOn => {
                let handed_over = journal.state() == State::Committed;
                // First of all: clients wait.
                let never_ran = there == There::Is(Standing::NeverRan);
                let rival = if never_ran || word == Some(OperatorWord::Keep) {
                    Rival::Excluded
                } else {
                    Rival::Possible
                };

                let done = bounds.during(|| guards::roll_back_source_later(journal, rival));
                done.map_err(|e| left_frozen(journal, e))?;
                return Ok(if never_ran {
                    note_heard(journal);
                    Settled::new("it never ran on the other host, and runs on here")
                } else if handed_over {
                    Settled::new(
                        "it runs on here, by your word that the other host does not run it",
                    )
                    .telling(Verdict::Abort)
                } else {
                    Settled::new("it runs on here").telling(Verdict::Abort)
                });
            }
            NextDeed::Abandon => {
                let tasks = undo::tasks(&journal.record)?;
                // There is nothing here that could run.
                bounds.during(|| guards::roll_back_source_later(journal, Rival::Excluded))?;
                let settled = Settled::new(stayed(tasks));
                return Ok(match there {
                    There::Is(Standing::Gone | Standing::NeverRan) => {
                        note_heard(journal);
                        settled
                    }
                    _ => settled.telling(Verdict::Abort),
                });
            }
            // On the disk before anybody is told, as in a migration; then it goes on from there.
            NextDeed::HandOver => {
                bounds.during(|| journal.write(State::Committed))?;
                there = There::Unasked;
            }
            NextDeed::LetGo => {
                let by_word = word == Some(OperatorWord::Discard);
                bounds.during(|| guards::release_source_later(journal))?;
                return Ok(if by_word {
                    let said = "what was left of it here is gone, by your word that the other host runs it";
                    Settled::new(said).telling(Verdict::Commit)
                } else {
                    Settled::new("it runs on the other host; what was left here is gone")
                });
            }
            NextDeed::BringRest => there = bring_rest(journal, bounds)?,
            NextDeed::Doubt(doubt) => {
                let failed = in_doubt(journal, doubt, silent);
                return Err(Stuck { again: doubt.passes(), failed });
            }
        }
    }
}

/// One that could not be taken back may be the other host's still.
fn left_frozen(journal: &Journal, e: anyhow::Error) -> Failed {
    if e.downcast_ref::<StaysFrozen>().is_none() {
        return e.into();
    }
    let (id, peer) = (&journal.record.container, &journal.record.peer);
    Failed::in_doubt(Advice::over(
        advice(
            "the container stays frozen here",
            format!(
                "see to the disk of {}, and try again; if {peer} is gone for good: `ferry resolve \
                 {id} --keep`",
                journal.path().display()
            ),
        ),
        e,
    ))
}

/// The other host has said that it has nothing: nobody has to tell it anything any more.
fn note_heard(journal: &mut Journal) {
    // It is told once more, at worst.
    let _ = journal.note_told().inspect_err(|e| tracing::error!("{e:#}"));
}

/// Somebody else holds the journal.
fn is_busy(journal: &Journal) -> anyhow::Error {
    let (migration, peer) = (&journal.record.migration, &journal.record.peer);
    advice(
        format!(
            "another process of Ferry's is settling migration {migration}: it may be waiting for \
             {peer}, or bringing memory there"
        ),
        "ask again",
    )
}

fn reach_by(journal: &mut Journal, remote: &RemoteArgs) -> Result<(), Failed> {
    if let Some(Reach::Shell { rsh, remote_ferry, .. }) = &mut journal.record.destination {
        if let Some(command) = &remote.rsh {
            *rsh = split_command(command).map_err(Failed::usage)?;
        }
        if let Some(path) = remote.remote_ferry.as_ref().and_then(|p| p.to_str()) {
            *remote_ferry = path.to_owned();
        }
    }
    Ok(())
}

/// Returns what is said of a migration that was given up.
fn stayed(tasks: Tasks) -> &'static str {
    match tasks {
        Tasks::Here => "it runs on here",
        Tasks::Anew => "the migration is given up; another container of that ID is here",
        Tasks::Ended => "nothing of it runs any more, here or there: it can be started anew",
        Tasks::Rebooted => {
            "it ended with this host, which has been started again since, and there is no copy on the \
             other one: it can be started anew"
        }
    }
}

fn in_doubt(journal: &Journal, doubt: Doubt, silent: Option<anyhow::Error>) -> Failed {
    let (id, peer) = (&journal.record.container, &journal.record.peer);
    let handed_over = journal.state() == State::Committed;
    let (what, hint) = match doubt {
        Doubt::OnlyHere => {
            let migration = &journal.record.migration;
            let what = format!(
                "migration {migration} was broken off before it was handed over: the only copy is here"
            );
            return Failed::refused(advice(what, format!("`ferry resolve {id}` lets it run on")));
        }
        Doubt::Silent => {
            let (what, hint) = if handed_over {
                (
                    format!("{peer} cannot be asked"),
                    format!(
                        "try again when it can be reached; if it is gone for good: `ferry resolve \
                         {id} --keep`"
                    ),
                )
            } else {
                (
                    format!(
                        "nothing of it runs here any more, and {peer}, which may hold a copy, cannot \
                         be asked"
                    ),
                    format!(
                        "try again when it can be reached; if it is gone for good, `ferry resolve \
                         {id} --keep` lets it be started anew here"
                    ),
                )
            };

            let e = silent.unwrap_or_else(|| anyhow!("no answer"));
            return Failed::in_doubt(Advice::over(advice(what, hint), e));
        }
        Doubt::Starting => (format!("{peer} is about to run it"), "ask again".to_owned()),
        Doubt::Arriving => (
            format!("nothing of it runs here any more, and {peer} is still taking it in"),
            format!(
                "ask again in some minutes: it gives up what does not come any more. `ferry resolve \
                 {id} --keep` tells it to at once"
            ),
        ),
        Doubt::Ended => (
            format!(
                "its tasks have ended here, and {peer} holds a copy of it, as it was when it was frozen"
            ),
            format!("`ferry resolve {id} --discard` lets that run, `--keep` ends it"),
        ),
        Doubt::Anew => (
            format!(
                "another container called {id} is here now, and {peer} has a copy of the one that \
                 was migrated"
            ),
            format!(
                "`ferry resolve {id} --keep` ends a copy that is held there; one that runs is ended \
                 there by hand"
            ),
        ),
        Doubt::PagesLost => (
            format!("it waits on {peer} for memory that was here, and has been lost"),
            format!(
                "it cannot go on: `ferry resolve {id} --discard` on {peer} ends it there, and then \
                 `ferry resolve {id} --keep` here lets it be started anew"
            ),
        ),
        Doubt::LostThere => (
            format!("it was handed over, but there is no copy on {peer}: it was lost there"),
            format!("the frozen copy here is whole: `ferry resolve {id} --keep` lets it run on"),
        ),
        Doubt::LostBoth => (
            format!(
                "it was handed over, but there is no copy on {peer}, and none here any more: it is \
                 lost"
            ),
            format!("`ferry resolve {id} --keep` lets it be started anew here"),
        ),
    };

    Failed::in_doubt(advice(what, hint))
}

/// Post-copy that was broken off: how it stands on the destination when no more can be brought.
fn bring_rest(journal: &Journal, bounds: &Bounds) -> Result<There, Stuck> {
    let complain = &mut |why: Option<&str>| {
        if let Some(why) = why {
            log::warn(&format!("{why}; trying again"), []);
        }
        true
    };

    let wishes = memory_sender::MemoryOptions::default();
    let patience = bounds.left();
    let (peer, id) = (&journal.record.peer, &journal.record.container);

    match postcopy_recover::resume(&journal.record, wishes, Some(patience), complain) {
        postcopy_recover::Brought::Stopped => Err(Failed::in_doubt(advice(
            format!(
                "nothing was heard of {peer} for {} s, where it waits for memory that is here",
                patience.as_secs()
            ),
            format!(
                "try again when {peer} can be reached; if it is gone for good: `ferry resolve {id} \
                 --keep`"
            ),
        ))
        .into()),
        brought => Ok(There::Is(brought.standing())),
    }
}

fn resolve_destination(
    journal: &Journal,
    word: Option<OperatorWord>,
    bounds: &Bounds,
) -> Result<Settled, Stuck> {
    let id = &journal.record.container;
    let asked = match word {
        Some(OperatorWord::Keep) => ControlRequest::Verdict(Some(Verdict::Commit)),
        Some(OperatorWord::Discard) => ControlRequest::Discard,
        None => ControlRequest::Verdict(None),
    };

    let migration = &journal.record.migration;
    let answer = || verdicts::answer_here(state_dir(journal), migration, &asked, bounds.answer());

    // Whoever lives does it himself.
    let standing = if journal.record.worker_lives() { answer()? } else { bounds.during(answer)? };
    let failed = match standing {
        Standing::Running if word == Some(OperatorWord::Discard) => Failed::refused(advice(
            "it runs here, with all of its memory",
            format!("if it is to end here all the same: `ferry kill {id}`, `ferry delete {id}`"),
        )),
        Standing::Running => return Ok(Settled::new(runs_here(journal))),
        Standing::Gone => return Ok(Settled::new("there is no copy of it here")),
        Standing::NeverRan => {
            return Ok(Settled::new("there is no copy of it here, and none has run"));
        }
        Standing::Partial => Failed::in_doubt(advice(
            "it runs here, and waits for memory that is still on the source",
            format!(
                "`ferry resolve {id}` on the source brings it; if that host is gone for good, it \
                 cannot go on: `ferry resolve {id} --discard` ends it here"
            ),
        )),
        Standing::Waiting if word == Some(OperatorWord::Keep) => {
            return Ok(Settled::new("it starts to run here"));
        }
        Standing::Arriving => Failed::in_doubt(advice(
            "it is still being taken in here",
            format!(
                "the source runs it until it is handed over; `ferry resolve {id} --discard` ends it \
                 here"
            ),
        )),
        Standing::Waiting | Standing::Ready | Standing::Lacking => Failed::in_doubt(advice(
            "it is held here and waits for the source's word",
            format!(
                "`ferry resolve {id}` on the source; if that host is gone for good: `ferry resolve \
                 {id} --keep` here"
            ),
        )),
    };

    Err(failed.into())
}

/// Of one that came here and has all of its memory.
fn runs_here(journal: &Journal) -> &'static str {
    if journal.record.same_boot() {
        "it runs here"
    } else {
        "it ran here until this host was started again, and is this host's: it can be started here"
    }
}

/// Returns where a journal's host keeps its state.
fn state_dir(journal: &Journal) -> &Path {
    undo::state_dir(journal)
}

/// Nothing is open: what can be settled is the mark that keeps the ID from being started here.
fn resolve_mark(
    globals: &Globals,
    id: &str,
    keep: bool,
    state_dir: &Path,
    last: Option<Journal>,
    bounds: &Bounds,
) -> Result<(), Failed> {
    let runtime = runtime(globals)?;
    let mark = AwayMark::find(state_dir, runtime.root(), id.as_ref())?;
    match (mark, keep) {
        (Some(_), true) => {
            AwayMark::remove(state_dir, runtime.root(), id.as_ref())?;
            say("the mark is lifted: it can be started here again");
            Ok(())
        }
        (Some(mark), false) => {
            say(&format!("it {}", holder::marked(state_dir, &mark, "ferry").0));
            Ok(())
        }
        (None, _) => match last.filter(is_given_up) {
            Some(mut last) if keep && last.is_untold() => {
                last.note_told()?;
                say("it stayed here; by your word, the other host is told no more");
                Ok(())
            }
            Some(mut last) => {
                say(&tell_stayed(&mut last, bounds).map_err(|s| s.failed)?);
                Ok(())
            }
            None => Err(Failed::refused(advice(
                format!("no migration of {id} is open here, and it is not marked as migrated away"),
                "see `ferry migrations`",
            ))),
        },
    }
}

/// Tells whether a copy of the container may be held elsewhere that waits to be told this.
fn is_given_up(journal: &Journal) -> bool {
    journal.record.role == Role::Source && journal.state() == State::Aborted
}

/// Tells again that a container stayed; what the other host says to that.
///
/// # Errors
/// Where it cannot be told, or has a copy that runs.
pub(super) fn tell_stayed(journal: &mut Journal, bounds: &Bounds) -> Result<String, Stuck> {
    let told = verdicts::tell_stayed(journal, bounds.answer());
    let (id, peer) = (&journal.record.container, &journal.record.peer);
    let stayed = format!("migration {} of {id} was given up", journal.record.migration);

    match told {
        Ok(Standing::Gone | Standing::NeverRan) => {
            Ok(format!("{stayed}, and {peer} holds nothing of it"))
        }
        Ok(standing) => Err(Stuck {
            again: !has_heard(standing),
            failed: Failed::in_doubt(advice(
                format!("{stayed}, and {peer} says of its copy that it {}", standing.describe()),
                format!(
                    "see `ferry migrations {id}` there; what runs on both hosts is ended on one by \
                     hand"
                ),
            )),
        }),
        Err(e) => Err(e)
            .advise(
                format!("{stayed}, and {peer}, which may hold a copy, cannot be told"),
                format!(
                    "try again when it can be reached; if it is gone for good: `ferry resolve {id} \
                     --keep`"
                ),
            )
            .map_err(|e| Failed::in_doubt(e).into()),
    }
}
