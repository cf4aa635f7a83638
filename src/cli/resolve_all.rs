//! `ferry resolve --all`: brings every open migration of this host to its end, one after another, and
//! asks again until the other hosts have answered.
//!
//! What is under way has somebody who goes on, and is left alone; so is what only an operator's word
//! can settle. Everything else is tried again, ever less often; hosts that do not answer are asked once
//! in each round, however many migrations wait for them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::ResolveArgs;
use super::bounds::Bounds;
use super::common::{say, say_json, state_dir};
use super::resolve::{Stuck, settle_one, tell_stayed};
use crate::migration::journal::{Journal, Role, State, shelf};
use crate::migration::protocol::Standing;
use crate::migration::recovery::verdicts::{self, ControlRequest};
use crate::migration::recovery::{undo, word};
use crate::problem::{Advice, advice};
use crate::report::exit::Failed;
use crate::sys::notify::Readiness;

/// Time that another host may take for one answer.
const ANSWER: Duration = Duration::from_secs(15);
/// The same for a process of this host.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Time that engines are kept from starting, at most, where hosts do not answer at boot.
const BOOT: Duration = Duration::from_secs(20);
/// Before something is tried a second time, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is to be done about a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// It is brought to its end.
    Settle,
    /// The other host is told that the container stayed.
    Tell,
    /// Somebody is at it.
    Leave,
}

/// Nothing where it is over, and the other host knows.
fn deed(role: Role, state: State, untold: bool, under_way: bool) -> Option<Deed> {
    match (role, state) {
        // Of a destination it is the source that asks.
        (Role::Source, state) if state.is_over() => untold.then_some(Deed::Tell),
        (Role::Destination, state) if state.is_over() => None,
        // It waits for a source that may have lost everybody who would tell it, and nobody is in doubt
        // but the source's operator.
        _ if under_way => Some(Deed::Leave),
        _ => Some(Deed::Settle),
    }
}

/// Returns what somebody who is at it here may wait for in vain: of whether the other host has lost it for good
/// he knows nothing.
fn waits(journal: &Journal) -> String {
    let record = &journal.record;
    if record.role != Role::Destination {
        return String::new();
    }
    let asked = ControlRequest::Verdict(None);
    match verdicts::answer_here(undo::state_dir(journal), &record.migration, &asked, AT_ONCE) {
        Ok(Standing::Partial) => format!(
            "; it runs here and waits for memory that is on {}: if that is gone for good, `ferry \
             resolve {} --discard` ends it here",
            record.peer, record.container
        ),
        _ => String::new(),
    }
}

/// Before the try after so many that have failed.
fn pause(tries: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

/// One that is open.
struct OpenMigration {
    journal: PathBuf,
    deed: Deed,
    migration: String,
    container: String,
    peer: String,
    tries: u32,
    due: Instant,
    /// What was said of it last.
    said: String,
}

/// What has been done, for the end.
#[derive(Default)]
struct Tally {
    settled: usize,
    under_way: usize,
    /// Need an operator's word.
    stuck: usize,
    /// Could not be ended in time.
    waiting: usize,
}

/// Runs it.
///
/// # Errors
/// In doubt, where something is open still.
pub fn resolve_all(args: &ResolveArgs, bounds: &Bounds) -> Result<(), Failed> {
    let state_dir = state_dir()?;
    // Only where it is the unit of systemd that waits for us.
    let manager = std::env::var_os("NOTIFY_SOCKET").filter(|_| args.boot);
    let ready = Readiness::within(BOOT, manager);
    shelf::tidy(&state_dir).map_err(Failed::refused)?;
    let (current, unreadable) = Journal::current(&state_dir)?;
    let mut sums = Tally::default();
    for journal in &unreadable {
        sums.stuck += 1;
        event(args, "stuck", &[("why", &format!("{:#}", journal.error()))]);
    }

    let mut list = Vec::new();
    for journal in &current {
        let record = &journal.record;
        let under_way = record.worker_lives();
        match deed(record.role, journal.state(), journal.is_untold(), under_way) {
            None => {}
            Some(Deed::Leave) => {
                sums.under_way += 1;
                let why = format!("under way, by process {}", record.worker.pid) + &waits(journal);
                let (migration, container) = (&record.migration, &record.container);
                let fields = [("migration", &**migration), ("container", container), ("why", &why)];
                event(args, "under_way", &fields);
            }
            Some(deed) => list.push(OpenMigration {
                journal: journal.path().to_owned(),
                deed,
                migration: record.migration.clone(),
                container: record.container.to_string(),
                peer: record.peer.clone(),
                tries: 0,
                due: Instant::now(),
                said: String::new(),
            }),
        }
    }

    drop(current);
    while !list.is_empty() && bounds.left() > Duration::ZERO {
        round(args, bounds, &mut list, &mut sums)?;
        ready.now();
        let next = list.iter().map(|open| open.due).min();
        let until =
            next.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
        // For a host that did not answer there is nothing to wait on but time.
        std::thread::sleep(until.min(bounds.left()));
    }

    ready.now();
    for open in list.iter().filter(|open| open.deed == Deed::Tell) {
        // Nobody waits for that here.
        let later = Journal::open(&open.journal).and_then(|journal| word::send_later(&journal));
        let _ = later.inspect_err(|e| tracing::error!("{e:#}"));
    }

    sums.waiting = list.len();
    let pruned = shelf::tidy(&state_dir).map_err(Failed::refused)?;
    conclude(args, &sums, pruned)
}

/// Tries each that is due once.
fn round(
    args: &ResolveArgs,
    bounds: &Bounds,
    list: &mut Vec<OpenMigration>,
    sums: &mut Tally,
) -> Result<(), Failed> {
    // Who did not answer, and when he is asked again.
    let mut silent = HashMap::new();
    let mut left = Vec::new();
    for mut open in std::mem::take(list) {
        if let (Some(due), true) = (silent.get(&open.peer), open.due <= Instant::now()) {
            open.due = *due;
        }
        if open.due > Instant::now() {
            left.push(open);
            continue;
        }

        let fields = [("migration", &*open.migration), ("container", &*open.container)];
        match attempt(&open, args, &bounds.for_one(ANSWER)) {
            Ok(outcome) => {
                sums.settled += 1;
                event(args, "settled", &[&fields[..], &[("outcome", &outcome)]].concat());

                // It is settled here; the other host may hold a copy until it has heard.
                if is_untold(&open.journal) {
                    open.deed = Deed::Tell;
                    open.tries += 1;
                    open.due = Instant::now() + pause(open.tries);
                    silent.insert(open.peer.clone(), open.due);
                    left.push(open);
                }
            }
            Err(Stuck { again, failed }) => {
                let advice = failed.error.downcast_ref::<Advice>();
                let hints = advice.map_or_else(Vec::new, |advice| advice.hints().to_vec());
                let why = [vec![format!("{:#}", failed.error)], hints].concat().join("; ");
                let name = if again { "waiting" } else { "stuck" };
                if open.said != why || args.json {
                    event(args, name, &[&fields[..], &[("why", &why)]].concat());
                }

                if again {
                    open.tries += 1;
                    open.due = Instant::now() + pause(open.tries);
                    open.said = why;
                    silent.insert(open.peer.clone(), open.due);
                    left.push(open);
                } else {
                    sums.stuck += 1;
                }
            }
        }
    }

    *list = left;
    Ok(())
}

fn is_untold(journal: &Path) -> bool {
    Journal::open(journal).is_ok_and(|journal| {
        deed(journal.record.role, journal.state(), journal.is_untold(), false) == Some(Deed::Tell)
    })
}

fn attempt(open: &OpenMigration, args: &ResolveArgs, bounds: &Bounds) -> Result<String, Stuck> {
    let mut journal = Journal::open(&open.journal)?;
    match open.deed {
        Deed::Tell => tell_stayed(&mut journal, bounds),
        _ => settle_one(&mut journal, None, &args.remote, bounds),
    }
}

fn event(args: &ResolveArgs, name: &str, fields: &[(&str, &str)]) {
    if args.json {
        let mut all = json!({"event": name});
        fields.iter().for_each(|(key, value)| all[key] = json!(value));
        say_json(&all);
        return;
    }
    let of = |key| fields.iter().find(|f| f.0 == key).map_or("", |f| f.1);
    let (who, what) = (of("container"), [of("outcome"), of("why")].concat());
    match (name, who) {
        (_, "") => say(&what),
        ("waiting", _) => say(&format!("{who}: not yet: {what}")),
        _ => say(&format!("{who}: {what}")),
    }
}

fn conclude(args: &ResolveArgs, sums: &Tally, pruned: usize) -> Result<(), Failed> {
    let Tally { settled, under_way, stuck, waiting } = sums;
    if args.json {
        let report = json!({"event": "report", "settled": settled, "under_way": under_way,
            "stuck": stuck, "waiting": waiting, "journals_removed": pruned});
        say_json(&report);
    } else {
        say(&format!("settled {settled}, under way {under_way}, open {}", stuck + waiting));
    }
    match stuck + waiting {
        0 => Ok(()),
        _ if *waiting > 0 => Err(Failed::in_doubt(advice(
            format!(
                "{waiting} could not be brought to an end in time, {stuck} need an operator's word"
            ),
            "`ferry migrations` lists them; `ferry resolve --all --timeout DURATION` waits longer",
        ))),
        _ => Err(Failed::in_doubt(advice(
            format!("{stuck} need an operator's word"),
            "`ferry migrations` lists them; `ferry resolve ID` says of each what can be done",
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_asked_ever_less_often() {
        assert_eq!(pause(1), FIRST_PAUSE);
        assert_eq!(pause(2), FIRST_PAUSE * 2);
        let all: Vec<_> = (1..100).map(pause).collect();
        assert!(all.is_sorted() && all.iter().all(|p| *p <= LONGEST_PAUSE));
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }

    /// Whatever nobody is at has somebody now, and nobody is disturbed.
    #[test]
    fn what_is_open_is_settled_and_what_is_untold_told() {
        use State::{Aborted, Begun, Committed, Finished, Ready, Returning, Whole};
        for role in [Role::Source, Role::Destination] {
            for state in [Begun, Returning, Ready, Committed, Whole] {
                assert_eq!(deed(role, state, false, false), Some(Deed::Settle));
                assert_eq!(deed(role, state, false, true), Some(Deed::Leave));
            }
            for state in [Finished, Aborted] {
                assert_eq!(deed(role, state, false, false), None);
            }
        }
        assert_eq!(deed(Role::Source, Aborted, true, false), Some(Deed::Tell));
        assert_eq!(deed(Role::Destination, Finished, true, false), None);
    }
}
