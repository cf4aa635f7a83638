//! `ferry migrations`: what this host has seen.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::args::MigrationsArgs;
use super::common::{say, say_json, state_dir};
use crate::migration::forwarding as forward;
use crate::migration::journal::{Journal, Record, Role, State};
use crate::problem::advice;
use crate::report::exit::Failed;
use crate::report::log::rfc3339;

/// A container, for people: as its engine calls it, and not in 64 digits.
fn shown_name(record: &Record) -> String {
    let made = record.engine.as_ref().filter(|made| !made.name.is_empty());
    made.map_or_else(
        || record.container.to_string(),
        |made| format!("{}:{} ({:.12})", made.engine, made.name, record.container),
    )
}

/// `ferry migrations`.
pub fn migrations(args: &MigrationsArgs) -> Result<(), Failed> {
    let state_dir = state_dir()?;
    let mut any = false;
    let (all, unreadable) = Journal::all(&state_dir)?;
    for journal in all {
        let record = &journal.record;
        if args.id.as_ref().is_some_and(|word| !record.is_meant_by(word)) {
            continue;
        }
        any = true;
        let under_way = record.worker_lives() && !journal.state().is_over();
        let in_words = standing_here(&journal, under_way);
        let ended = journal.states().last().filter(|s| s.0.is_over()).map(|s| s.1);
        if args.json {
            say_json(&json!({
                "migration": record.migration,
                "container": record.container,
                "engine": record.engine.as_ref().map(|made| json!({
                    "engine": made.engine,
                    "name": made.name,
                    "id": made.id_here().unwrap_or_else(|| record.container.clone()),
                })),
                "role": record.role,
                "peer": record.peer,
                "state": journal.state(),
                "under_way": under_way,
                "begun": record.begun,
                "ended": ended,
                "states": journal.states(),
                "forward": forward::describe(record).map(|d| d.1),
            }));
        } else {
            let way = match record.role {
                Role::Source => "to",
                Role::Destination => "from",
            };
            say(&format!(
                "{}  {} - {:<20}  {}  {way} {}  {in_words}",
                record.migration,
                moment(record.begun),
                ended.map_or_else(String::new, moment),
                shown_name(record),
                record.peer
            ));

            if let Some((words, _)) = forward::describe(record) {
                say(&format!("    {words}"));
            }
        }
    }

    let mut unreadable = unreadable.into_iter();
    if let Some(journal) = unreadable.find(|j| args.id.as_ref().is_none_or(|id| j.may_be_about(id)))
    {
        return Err(Failed::from(journal.error()));
    }

    match &args.id {
        Some(id) if !any => Err(Failed::from(advice(
            format!(
                "this host knows of no migration of a container {id}, and of none with that ID"
            ),
            format!("`ferry migrations` lists all that it has seen, in {}", state_dir.display()),
        ))),
        _ => Ok(()),
    }
}

fn moment(unix: u64) -> String {
    rfc3339(UNIX_EPOCH + Duration::from_secs(unix))
}

fn standing_here(journal: &Journal, under_way: bool) -> &'static str {
    match (journal.record.role, journal.state(), under_way) {
        (_, State::Aborted, _) => "given up: it stayed where it was",
        (Role::Destination, State::Ready, true) => "held here: waits for the verdict",
        (Role::Source, State::Finished, _) => "done: it runs there",
        (Role::Destination, State::Finished, _) => "done: it runs here",
        (_, _, true) => "under way",
        (Role::Source, State::Committed, _) => "in doubt: handed over, no answer (ferry resolve)",
        (Role::Destination, State::Whole, _) => "done: it runs here",
        (Role::Destination, State::Ready | State::Committed, _) => "in doubt (ferry resolve)",
        _ => "broken off (ferry resolve)",
    }
}
