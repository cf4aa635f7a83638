//! The source's word that the container stayed: a destination that has not heard it holds its copy for
//! ever. Told by whoever is left until it is heard, or an operator has said that nobody is to be told;
//! and told again before the same container is migrated anew.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use super::decide::has_heard;
use super::verdicts;
use crate::migration::journal::{Journal, Role, State};
use crate::migration::protocol::Standing;
use crate::sys::process;
use crate::transport::backoff::Backoff;
use crate::transport::connect::Destination;

/// Between two tries to reach a destination, at first and at most: somebody may try for days.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Time that a destination may take to hear of earlier migrations before it hears of the next one.
const BEFORE: Duration = Duration::from_secs(20);

/// Tells the destination that the source has kept the container, until it has heard, or there is no
/// reason to any more: an operator has said so, or somebody else tells it. What it has answered.
pub fn send(journal: &mut Journal) -> Option<Standing> {
    // As long as this lives, nobody else does the same.
    let _only = SoleTeller::of(journal.path())
        .inspect_err(|e| tracing::info!("somebody else tells it: {e}"))
        .ok()?;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);

    while is_to_be_told(journal) {
        if let Ok(standing) = verdicts::tell_stayed(journal, verdicts::LIMIT)
            && has_heard(standing)
        {
            return Some(standing);
        }

        backoff.park();
        match Journal::open(journal.path()) {
            Ok(fresh) => *journal = fresh,
            // Whoever has taken it away wants nobody told.
            Err(e) if !journal.path().exists() => {
                tracing::info!("{e:#}");
                return None;
            }
            Err(e) => tracing::error!("{e:#}"),
        }
    }

    None
}

/// Held by the only one who tells it, in a file beside the journal.
struct SoleTeller {
    path: PathBuf,
    _file: Flock<File>,
}

impl SoleTeller {
    fn of(journal: &Path) -> std::io::Result<SoleTeller> {
        let path = journal.with_extension("word");
        let mut open = OpenOptions::new();
        let file = open.write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
        Ok(SoleTeller { path, _file: file })
    }
}

impl Drop for SoleTeller {
    fn drop(&mut self) {
        // Whoever has opened it meanwhile tells it a second time, at worst.
        let _ = fs::remove_file(&self.path);
    }
}

/// Tells whether the destination is still to hear it, as far as the journal knows.
fn is_to_be_told(journal: &Journal) -> bool {
    let stayed = matches!(journal.state(), State::Begun | State::Returning | State::Aborted);
    stayed && !journal.is_told()
}

/// Starts a process that does so.
///
/// # Errors
/// When there can be no process.
pub fn send_later(journal: &Journal) -> Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("__guard").arg("word").arg(journal.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    process::in_new_session(&mut command);
    command.spawn().context("cannot start the guard process").map(drop)
}

/// That process.
///
/// # Errors
/// When the journal cannot be read.
pub fn sender(journal: &Path) -> Result<()> {
    let _ = send(&mut Journal::open(journal)?);
    Ok(())
}

/// Before a container is migrated: whoever may still hold a copy of it from an earlier migration that
/// was given up is told so; the host that it is to go to now before anything else, the others meanwhile.
///
/// # Errors
/// When the journals cannot be read.
pub fn tell_again(
    state_dir: &Path,
    root: &Path,
    container: &str,
    destination: &Destination,
) -> Result<()> {
    let mut silent = false;
    for mut journal in Journal::of(state_dir, root, container)? {
        if journal.record.role != Role::Source || !journal.is_untold() {
            continue;
        }
        let mut told = Ok(());
        if !silent && journal.record.destination.as_ref() == Some(destination) {
            told = verdicts::tell_stayed(&mut journal, BEFORE).map(drop);
            // It is not waited for a second time.
            silent = told.is_err();
        }

        let later = if journal.is_told() { Ok(()) } else { send_later(&journal) };
        // If it cannot be reached, that will be said when it is asked; if it has a copy, by its checks.
        for e in [told, later].into_iter().filter_map(Result::err) {
            let migration = &journal.record.migration;
            tracing::warn!("telling again that migration {migration} was given up: {e:#}");
        }
    }

    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::journal::tests::record;

    #[test]
    fn one_at_a_time_tells_it() {
        let dir = tempfile::tempdir().unwrap();
        let journal = dir.path().join("00112233aabbccdd.journal");
        let only = SoleTeller::of(&journal).unwrap();
        assert!(SoleTeller::of(&journal).is_err());
        drop(only);
        drop(SoleTeller::of(&journal).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing stays of it");
    }

    #[test]
    fn nobody_is_told_what_he_knows_or_what_is_not_true() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        // Whatever could not be undone: it is not handed over any more.
        assert!(is_to_be_told(&journal));
        journal.write(State::Returning).unwrap();
        journal.write(State::Aborted).unwrap();
        assert!(is_to_be_told(&journal));
        // It has heard; or an operator has said that nobody is to be told.
        journal.note_told().unwrap();
        assert!(!is_to_be_told(&journal));
        let mut journal = Journal::create(dir.path(), record("00112233aabbccee")).unwrap();
        journal.write(State::Committed).unwrap();
        assert!(!is_to_be_told(&journal));
    }
}
