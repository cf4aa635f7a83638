//! `ferry resolve`: settles what a crash has left.

use std::io::Write;

use anyhow::anyhow;
use serde_json::json;

use super::args::{Globals, RemoteArgs, ResolveArgs};
use super::verbs::{runtime, say, say_json, state_dir};
use crate::migration::forwarding as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::{Journal, Role, State, holder};
use crate::migration::protocol::{Standing, Verdict};
use crate::migration::recovery::decide::{self, Doubt, Next, Tasks, There, Word};
use crate::migration::recovery::{guards, recover, rest, settle};
use crate::migration::transfer::carry;
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

/// `ferry resolve`.
pub fn resolve(globals: &Globals, args: &ResolveArgs) -> Result<(), Failed> {
    if args.no_forward {
        say(forward::end(&args.id, args.when_idle).map_err(Failed::refused)?);
        return Ok(());
    }
    if let Some(said) = forward::revive(&args.id)? {
        say(said);
        return Ok(());
    }
    let state_dir = state_dir()?;
    let (all, unreadable) = Journal::all(&state_dir)?;
    if let Some(journal) = unreadable.into_iter().find(|j| j.may_be_about(&args.id)) {
        return Err(Failed::refused(journal.error()));
    }
    let of_it = |j: &Journal| j.record.container == args.id || j.record.migration == args.id;
    let (mut open, over): (Vec<_>, Vec<_>) =
        all.into_iter().filter(of_it).partition(|j| !j.state().is_over());
    if open.len() > 1 {
        let list: Vec<_> = open.iter().map(|j| j.record.migration.as_str()).collect();
        return Err(Failed::refused(advice(
            format!("{} migrations of {} are open", open.len(), args.id),
            format!("name one of them: {}", list.join(", ")),
        )));
    }
    let Some(mut journal) = open.pop() else {
        return resolve_mark(globals, args, &state_dir, over.last());
    };
    let word = match (args.keep, args.discard) {
        (true, _) => Some(Word::Keep),
        (_, true) => Some(Word::Discard),
        _ => None,
    };
    let settled = match journal.record.role {
        Role::Source => resolve_source(&mut journal, word, &args.remote)?,
        Role::Destination => resolve_destination(&state_dir, &journal, word)?,
    };
    if args.json {
        let said = json!({"migration": journal.record.migration, "outcome": settled.said});
        say_json(&said);
    } else {
        say(&settled.said);
    }
    if let Some(verdict) = settled.tell {
        tell(&journal, verdict);
    }
    Ok(())
}

/// The other host may hold a copy that waits for nothing else. Nobody here does.
fn tell(journal: &Journal, verdict: Verdict) {
    let peer = &journal.record.peer;
    let e = match settle::ask(&journal.record, Some(verdict)) {
        Ok(Standing::Running | Standing::Partial) if verdict == Verdict::Abort => {
            let words = "warning: it runs on both hosts now: end it on one of them by hand";
            let _ = writeln!(std::io::stderr(), "{words} ({peer} is the other one)");
            return;
        }
        Ok(_) => return,
        Err(e) => e,
    };
    log::warn(&format!("{peer} cannot be told: {e:#}"), []);
    if let (Verdict::Abort, Err(e)) = (verdict, guards::tell_later(journal)) {
        log::warn(&format!("nobody goes on trying: {e:#}"), []);
    }
}

fn resolve_source(
    journal: &mut Journal,
    word: Option<Word>,
    remote: &RemoteArgs,
) -> Result<Settled, Failed> {
    if journal.record.worker_lives() {
        return Err(Failed::refused(advice(
            format!("migration {} is under way", journal.record.migration),
            format!("wait for it, or end process {}", journal.record.worker.0),
        )));
    }
    let _held = journal.hold()?;
    reach_by(journal, remote)?;
    let mut there = There::Unasked;
    let mut silent = None;
    loop {
        match journal.state() {
            // Somebody else has been quicker.
            State::Aborted => return Ok(Settled::new(stayed(recover::tasks(&journal.record)?))),
            State::Finished => return Ok(Settled::new("it runs on the other host")),
            _ => {}
        }
        match decide::resolve(journal.state(), recover::tasks(&journal.record)?, there, word) {
            Next::Ask(verdict) => {
                let answer = match verdict {
                    Some(verdict) => settle::insist(&journal.record, verdict),
                    None => settle::ask(&journal.record, None),
                };
                there = match answer {
                    Ok(standing) => There::Is(standing),
                    Err(e) => {
                        silent = Some(e);
                        There::Silent
                    }
                };
            }
            Next::RunsOn => {
                let handed_over = journal.state() == State::Committed;
                // First of all: clients wait.
                guards::source_runs_on_later(journal)?;
                return Ok(if there == There::Is(Standing::NeverRan) {
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
            Next::Abandon => {
                let tasks = recover::tasks(&journal.record)?;
                guards::source_runs_on_later(journal)?;
                let settled = Settled::new(stayed(tasks));
                return Ok(match there {
                    There::Is(Standing::Gone | Standing::NeverRan) => settled,
                    _ => settled.telling(Verdict::Abort),
                });
            }
            // On the disk before anybody is told, as in a migration; then it goes on from there.
            Next::HandOver => {
                journal.write(State::Committed)?;
                there = There::Unasked;
            }
            Next::LetGo => {
                let by_word = word == Some(Word::Discard);
                guards::source_lets_go_later(journal)?;
                return Ok(if by_word {
                    let said = "what was left of it here is gone, by your word that the other host runs it";
                    Settled::new(said).telling(Verdict::Commit)
                } else {
                    Settled::new("it runs on the other host; what was left here is gone")
                });
            }
            Next::BringRest => there = There::Is(bring_rest(journal)),
            Next::Doubt(doubt) => return Err(in_doubt(journal, doubt, silent)),
        }
    }
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

/// What is said of a migration that was given up.
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
                "it cannot go on: delete it there, and then `ferry resolve {id} --keep` here lets it \
                 be started anew"
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
fn bring_rest(journal: &Journal) -> Standing {
    let unending = &mut |why: Option<&str>| {
        if let Some(why) = why {
            log::warn(&format!("{why}; trying again"), []);
        }
        true
    };
    rest::bring(&journal.record, carry::Wishes::default(), unending).standing()
}

fn resolve_destination(
    state_dir: &std::path::Path,
    journal: &Journal,
    word: Option<Word>,
) -> Result<Settled, Failed> {
    let verdict = word.map(|word| match word {
        Word::Keep => Verdict::Commit,
        Word::Discard => Verdict::Abort,
    });
    let id = &journal.record.container;
    match settle::answer(state_dir, &journal.record.migration, verdict)? {
        Standing::Running => Ok(Settled::new("it runs here")),
        Standing::Gone => Ok(Settled::new("there is no copy of it here")),
        Standing::NeverRan => Ok(Settled::new("there is no copy of it here, and none has run")),
        Standing::Partial => Err(Failed::in_doubt(advice(
            "it runs here, and waits for memory that is still on the source",
            format!("`ferry resolve {id}` on the source brings it"),
        ))),
        Standing::Waiting if word == Some(Word::Keep) => Ok(Settled::new("it starts to run here")),
        Standing::Arriving => Err(Failed::in_doubt(advice(
            "it is still being taken in here",
            format!(
                "the source runs it until it is handed over; `ferry resolve {id} --discard` ends it \
                 here"
            ),
        ))),
        Standing::Waiting | Standing::Ready | Standing::Lacking => Err(Failed::in_doubt(advice(
            "it is held here and waits for the source's word",
            format!(
                "`ferry resolve {id}` on the source; if that host is gone for good: `ferry resolve \
                 {id} --keep` here"
            ),
        ))),
    }
}

/// Nothing is open: what can be settled is the mark that keeps the ID from being started here.
fn resolve_mark(
    globals: &Globals,
    args: &ResolveArgs,
    state_dir: &std::path::Path,
    last: Option<&Journal>,
) -> Result<(), Failed> {
    let runtime = runtime(globals)?;
    let mark = AwayMark::find(state_dir, runtime.root(), args.id.as_ref())?;
    match (mark, args.keep) {
        (Some(_), true) => {
            AwayMark::remove(state_dir, runtime.root(), args.id.as_ref())?;
            say("the mark is lifted: it can be started here again");
            Ok(())
        }
        (Some(mark), false) => {
            say(&format!("it {}", holder::marked(state_dir, &mark, "ferry").0));
            Ok(())
        }
        (None, _) if last.is_some_and(is_given_up) => last.map_or(Ok(()), tell_again),
        (None, _) => Err(Failed::refused(advice(
            format!(
                "no migration of {} is open here, and it is not marked as migrated away",
                args.id
            ),
            "see `ferry migrations`",
        ))),
    }
}

/// Whether a copy of the container may be held elsewhere that waits to be told this.
fn is_given_up(journal: &Journal) -> bool {
    journal.record.role == Role::Source && journal.state() == State::Aborted
}

fn tell_again(journal: &Journal) -> Result<(), Failed> {
    let (id, peer) = (&journal.record.container, &journal.record.peer);
    let stayed = format!("migration {} of {id} was given up", journal.record.migration);
    match settle::insist(&journal.record, Verdict::Abort) {
        Ok(Standing::Gone | Standing::NeverRan) => {
            say(&format!("{stayed}, and {peer} holds nothing of it"));
            Ok(())
        }
        Ok(standing) => Err(Failed::in_doubt(advice(
            format!("{stayed}, and {peer} says of its copy that it {}", standing.describe()),
            format!(
                "see `ferry migrations {id}` there; what runs on both hosts is ended on one by hand"
            ),
        ))),
        Err(e) => Err(e)
            .advise(
                format!("{stayed}, and {peer}, which may hold a copy, cannot be told"),
                "try again when it can be reached",
            )
            .map_err(Failed::in_doubt),
    }
}
