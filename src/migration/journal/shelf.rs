//! Journals that are over are put by, and the oldest of them removed: a host that has seen thousands of
//! migrations reads no more before the next one than a host that has seen none.
//!
//! ```text
//! STATE/migrations/ID.journal         current: open, or the other host may still have to be told
//! STATE/migrations/over/ID.journal    over on both hosts: for `ferry migrations`, and late questions
//! ```

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};

use super::lock::HeldJournal;
use super::{Journal, Unreadable};
use crate::problem::advice;

/// Name of the directory.
const OVER: &str = "over";
/// How many are kept.
const KEEP: usize = 1000;
/// For how long.
const AGE: Duration = Duration::from_secs(180 * 24 * 3600);

/// Returns where they are.
pub(super) fn directory(state_dir: &Path) -> PathBuf {
    super::directory(state_dir).join(OVER)
}

/// Returns where a journal is when it has been put by.
///
/// # Errors
/// When it is no path of a current one.
pub(super) fn place_of(path: &Path) -> Result<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(anyhow!("{} is no journal's path", path.display()));
    };
    Ok(dir.join(OVER).join(name))
}

/// Puts by what is over, and removes the oldest of what is there; how many were removed.
///
/// # Errors
/// When a directory cannot be listed or made.
pub fn tidy(state_dir: &Path) -> Result<usize> {
    let (all, _) = Journal::current(state_dir)?;
    let done: Vec<_> = all.iter().filter(|journal| is_done(journal, super::now())).collect();
    if !done.is_empty() {
        let dir = directory(state_dir);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    for journal in done {
        // Whoever has it may have something to add.
        let Ok(_held) = HeldJournal::if_free(&journal.path) else { continue };
        // Somebody else has been quicker, or it stays where it is.
        let _ = fs::rename(&journal.path, place_of(&journal.path)?);
    }
    prune(&directory(state_dir))
}

/// Tells whether nobody needs it to go on: over, and told, or so old that nobody will ask.
fn is_done(journal: &Journal, now: u64) -> bool {
    let old = journal.record.begun.saturating_add(AGE.as_secs()) < now;
    journal.state().is_over() && (old || !journal.is_untold())
}

fn prune(dir: &Path) -> Result<usize> {
    let what = || format!("cannot list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e).with_context(what),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(what)?;
        // Gone meanwhile, or a clock that was wrong once.
        let written = entry.metadata().and_then(|meta| meta.modified());
        found.extend(written.ok().map(|written| (written, entry.file_name())));
    }
    let mut removed = 0;
    for name in superfluous(found, SystemTime::now()) {
        let path = dir.join(name);
        // What cannot be read is the operator's to look at.
        let readable = Journal::open(&path).is_ok_and(|journal| journal.state().is_over());
        removed += usize::from(readable && fs::remove_file(&path).is_ok());
    }
    Ok(removed)
}

/// Returns those that are too many or too old.
fn superfluous(mut found: Vec<(SystemTime, OsString)>, now: SystemTime) -> Vec<OsString> {
    found.sort_by(|one, other| other.cmp(one));
    let old = |written: SystemTime| now.duration_since(written).is_ok_and(|age| age > AGE);
    let listed = found.into_iter().enumerate();
    let too_much = listed.filter(|(place, (written, _))| *place >= KEEP || old(*written));
    too_much.map(|(_, (_, name))| name).collect()
}

/// Returns what of a host's journals concerns a container or a migration, with those that are put by.
///
/// # Errors
/// When they cannot be listed, or one that may be about it cannot be read.
pub fn about(state_dir: &Path, id: &str) -> Result<Vec<Journal>> {
    let (all, unreadable) = Journal::all(state_dir)?;
    let in_the_way = unreadable.iter().find(|journal| journal.may_be_about(id));
    in_the_way.map_or(Ok(()), |journal| Err(Unreadable::error(journal)))?;
    let of_it = |j: &Journal| j.record.container == *id || j.record.migration == id;
    Ok(all.into_iter().filter(of_it).collect())
}

/// The ID of the container that an operator means, or that of a migration: an engine's container he may call as
/// the engine does. One that docker has given several IDs, as it came and went, is the last; of those that are
/// open still, only he can say which. What nobody knows stays as it is.
///
/// # Errors
/// When the journals cannot be listed, or several containers that are called so are open.
pub fn id_of(state_dir: &Path, word: &str) -> Result<String> {
    let (all, _) = Journal::all(state_dir)?;
    let is_it = |j: &&Journal| j.record.container == *word || j.record.migration == word;
    if all.iter().any(|journal| is_it(&journal)) {
        return Ok(word.to_owned());
    }
    let mut meant: Vec<&Journal> = all.iter().filter(|j| j.record.is_meant_by(word)).collect();
    if meant.iter().any(|journal| !journal.state().is_over()) {
        meant.retain(|journal| !journal.state().is_over());
        let mut ids: Vec<&str> = meant.iter().map(|j| &*j.record.container).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() > 1 {
            return Err(advice(
                format!("migrations of several containers that are called {word} are open"),
                format!("name one by its ID: {}", ids.join(", ")),
            ));
        }
    }
    let last = meant.into_iter().max_by_key(|journal| journal.record.begun);
    Ok(last.map_or_else(|| word.to_owned(), |journal| journal.record.container.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::migration::journal::{Role, State};

    fn ended(dir: &Path, number: u64, role: Role, state: State, told: bool) {
        let mut record = record(&format!("{number:016x}"));
        (record.role, record.begun) = (role, super::super::now());
        let mut journal = Journal::create(dir, record).unwrap();
        journal.write(state).unwrap();
        if told {
            journal.note_told().unwrap();
        }
    }

    #[test]
    fn a_name_is_that_of_the_last_or_of_the_open_one() {
        let dir = tempfile::tempdir().unwrap();
        let add = |number: u64, container: &str, state: Option<State>| {
            let mut record = record(&format!("{number:016x}"));
            record.container = container.parse().unwrap();
            record.begun = number;
            record.engine = Some(
                serde_json::from_value(serde_json::json!({
                    "engine": "docker", "container": container, "name": "web", "volumes": [],
                    "noted": "", "upper": "", "log": "",
                }))
                .unwrap(),
            );

            let mut journal = Journal::create(dir.path(), record).unwrap();
            state.map_or(Ok(()), |state| journal.write(state)).unwrap();
        };

        let id = || id_of(dir.path(), "docker:web").map_err(|e| e.to_string());
        assert_eq!(id().unwrap(), "docker:web", "nobody knows it");
        add(1, "aaaa", Some(State::Finished));
        add(2, "bbbb", Some(State::Finished));
        assert_eq!(id().unwrap(), "bbbb");
        assert_eq!(id_of(dir.path(), "aaaa").unwrap(), "aaaa");
        add(3, "cccc", None);
        add(4, "dddd", Some(State::Finished));
        assert_eq!(id().unwrap(), "cccc", "it is open");
        add(5, "eeee", None);
        assert!(id().unwrap_err().contains("several containers"));
    }

    fn current(dir: &Path) -> usize {
        Journal::current(dir).unwrap().0.len()
    }

    /// What is open stays, and so does what the other host may still have to be told.
    #[test]
    fn what_is_over_is_read_no_more() {
        let dir = tempfile::tempdir().unwrap();
        ended(dir.path(), 1, Role::Source, State::Committed, false);
        ended(dir.path(), 2, Role::Source, State::Finished, false);
        ended(dir.path(), 3, Role::Source, State::Aborted, false);
        ended(dir.path(), 4, Role::Source, State::Aborted, true);
        ended(dir.path(), 5, Role::Destination, State::Aborted, false);
        ended(dir.path(), 6, Role::Destination, State::Finished, false);
        ended(dir.path(), 7, Role::Destination, State::Finished, true);
        assert_eq!(tidy(dir.path()).unwrap(), 0);
        let current: Vec<_> = Journal::current(dir.path()).unwrap().0;
        let mut left: Vec<_> = current.iter().map(|j| j.record.migration.as_str()).collect();
        left.sort_unstable();
        let wanted: Vec<_> = [1, 3, 6].iter().map(|n| format!("{n:016x}")).collect();
        assert_eq!(left, wanted);
        // Nothing is forgotten.
        assert_eq!(Journal::all(dir.path()).unwrap().0.len(), 7);
        let found = Journal::find(dir.path(), &format!("{:016x}", 7)).unwrap().unwrap();
        assert_eq!(found.state(), State::Finished);
        assert_eq!(about(dir.path(), "web").unwrap().len(), 7);
    }

    /// Whoever knew it under its old name, and is late, finds it.
    #[test]
    fn what_was_put_by_is_found_under_its_old_path() {
        let dir = tempfile::tempdir().unwrap();
        ended(dir.path(), 1, Role::Source, State::Finished, false);
        let mut known = Journal::current(dir.path()).unwrap().0.remove(0);
        tidy(dir.path()).unwrap();
        assert_eq!(current(dir.path()), 0);
        assert_eq!(Journal::open(known.path()).unwrap().state(), State::Finished);
        drop(known.hold().unwrap());
        assert!(known.path().parent().unwrap().ends_with(OVER));
        // And not while somebody has it.
        ended(dir.path(), 2, Role::Source, State::Finished, false);
        let mut held = Journal::current(dir.path()).unwrap().0.remove(0);
        let _held = held.hold_within(Duration::ZERO).unwrap().unwrap();
        tidy(dir.path()).unwrap();
        assert_eq!(current(dir.path()), 1);
    }

    #[test]
    fn the_newest_are_kept_and_none_for_ever() {
        let now = SystemTime::now();
        let name = |n: usize| OsString::from(format!("{n}.journal"));
        let many = (0..KEEP + 20).map(|n| (now - Duration::from_secs(n as u64), name(n)));
        let goes = superfluous(many.collect(), now);
        assert_eq!(goes, (KEEP..KEEP + 20).map(name).collect::<Vec<_>>());
        let old = vec![(now - AGE - Duration::from_secs(1), name(0)), (now - AGE, name(1))];
        assert_eq!(superfluous(old, now), [name(0)]);
        // A clock that went back removes nothing.
        assert!(superfluous(vec![(now + AGE, name(0))], now).is_empty());
    }
}
