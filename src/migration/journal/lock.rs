//! Who may write a journal, and who may migrate a container: one at a time. flock(2).

use std::fs::{self, File, Metadata, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::away::canonical;
use super::{Journal, directory, holder, shelf};
use crate::problem::advice;

/// How often whoever waits for no longer than so long looks again: there is no flock(2) with a limit.
const LOOK: Duration = Duration::from_millis(10);
/// Time that whoever has taken a container in, which runs already, may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// See [`Journal::hold`].
#[derive(Debug)]
pub struct HeldJournal {
    _file: Flock<File>,
}

impl HeldJournal {
    /// Waits for as long as it takes.
    pub(super) fn wait(path: &Path) -> Result<HeldJournal> {
        HeldJournal::take(path, FlockArg::LockExclusive)
            .map_err(std::io::Error::from)
            .with_context(|| format!("cannot lock the journal {}", path.display()))
    }

    /// Only if nobody has it.
    pub(super) fn if_free(path: &Path) -> std::result::Result<HeldJournal, Errno> {
        HeldJournal::take(path, FlockArg::LockExclusiveNonblock)
    }

    fn take(path: &Path, how: FlockArg) -> std::result::Result<HeldJournal, Errno> {
        let opened = File::open(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)));
        let file = Flock::lock(opened?, how).map_err(|(_, e)| e)?;
        Ok(HeldJournal { _file: file })
    }
}

impl Journal {
    /// For whoever settles what a Ferry that died has left: the guard, `ferry resolve`, a question
    /// from the other host. Waits until nobody else does, and reads what he has written. The Ferry that
    /// has made the journal holds it until the kernel has ended the last of its threads: one that hangs
    /// in a write cannot write over what is decided without it.
    ///
    /// # Errors
    /// When the journal cannot be read any more.
    pub fn hold(&mut self) -> Result<HeldJournal> {
        loop {
            // Nobody holds what has been put by: it is found where it is now.
            let held = if self.path.exists() { Some(HeldJournal::wait(&self.path)?) } else { None };
            if self.read_again()?
                && let Some(held) = held
            {
                return Ok(held);
            }
        }
    }

    /// The same for no longer than so long; `None` where somebody else has it still.
    ///
    /// # Errors
    /// As [`Journal::hold`].
    pub fn hold_within(&mut self, limit: Duration) -> Result<Option<HeldJournal>> {
        let until = Instant::now() + limit;
        loop {
            match HeldJournal::if_free(&self.path) {
                Ok(held) if self.read_again()? => return Ok(Some(held)),
                Ok(_) => {}
                Err(Errno::EWOULDBLOCK) if Instant::now() >= until => return Ok(None),
                Err(Errno::EWOULDBLOCK) => std::thread::park_timeout(LOOK),
                // It has been put by.
                Err(Errno::ENOENT) => drop(self.read_again()?),
                Err(e) => {
                    let what = format!("cannot lock the journal {}", self.path.display());
                    return Err(std::io::Error::from(e)).context(what);
                }
            }
        }
    }

    /// Reads what others have written; whether it still is where it was.
    fn read_again(&mut self) -> Result<bool> {
        let before = std::mem::take(&mut self.path);
        *self = Journal::open(&before)?;
        Ok(self.path == before)
    }
}

/// Held while a container is being migrated: a second migration of it is refused.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: Flock<File>,
}

impl Lock {
    /// Takes it, if no migration of the container is under way or was broken off. Puts by what is over.
    /// `way` is where to or where from, for whoever comes second.
    ///
    /// # Errors
    /// Says which migration stands in the way, and what to do.
    pub fn take(state_dir: &Path, root: &Path, container: &str, way: &str) -> Result<Lock> {
        let dir = directory(state_dir);
        let name = format!("{}%{container}.lock", canonical(root).display()).replace('/', "%");
        let what = || format!("cannot write to {}", dir.display());
        fs::create_dir_all(&dir).with_context(what)?;
        let path = dir.join(name);
        let began = Instant::now();
        let lock = loop {
            let mut open = OpenOptions::new();
            open.read(true).write(true).create(true).truncate(false).mode(0o600);
            match Flock::lock(open.open(&path).with_context(what)?, FlockArg::LockExclusiveNonblock)
            {
                // Whoever had it may have taken the file away.
                Ok(file) if same_file(&file, &path) => break Lock { path, file },
                Ok(_) => {}
                Err((file, Errno::EWOULDBLOCK)) => {
                    let who = holder_of(&file);
                    if began.elapsed() > ENDING || !who.contains(" from ") {
                        return Err(is_held(&who, container));
                    }
                    std::thread::park_timeout(LOOK);
                }
                Err((_, e)) => return Err(std::io::Error::from(e)).with_context(what),
            }
        };

        // For people only.
        let _ = lock.file.set_len(0);
        let _ = lock.file.write_all_at(format!("{} {way}\n", std::process::id()).as_bytes(), 0);
        for journal in Journal::of(state_dir, root, container)? {
            if !journal.state().is_over() && !journal.record.worker_lives() {
                let problem = holder::problem(&journal.record, journal.state(), false);
                return Err(advice(format!("{}: {}", problem.what, problem.why), problem.hint));
            }
        }

        // Another time, if not now.
        let _ = shelf::tidy(state_dir).inspect_err(|e| tracing::warn!("{e:#}"));
        Ok(lock)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before it is let go of: whoever waits finds that it is another file.
        let _ = fs::remove_file(&self.path);
    }
}

fn same_file(file: &File, path: &Path) -> bool {
    let identity = |meta: std::io::Result<Metadata>| meta.map(|m| (m.dev(), m.ino()));
    match (identity(file.metadata()), identity(fs::metadata(path))) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// Whoever has it, and where it goes or comes from, as he has written it.
fn holder_of(file: &File) -> String {
    let mut bytes = [0; 256];
    let length = file.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).trim().to_owned()
}

fn is_held(who: &str, container: &str) -> anyhow::Error {
    let who = who.split_once(' ').map_or_else(String::new, |(process, way)| {
        format!(" {}, by process {}", way.escape_debug(), process.escape_debug())
    });
    advice(
        format!("a migration of {container} is under way on this host{who}"),
        format!("wait for it, or end that process; see `ferry migrations {container}`"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::migration::journal::State;
    use crate::oci::runtime::DEFAULT_ROOT;

    /// Whoever has made it holds it until it ends.
    #[test]
    fn nobody_settles_what_its_own_ferry_may_still_write() {
        let dir = tempfile::tempdir().unwrap();
        let own = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        let mut other = Journal::open(own.path()).unwrap();
        assert!(other.hold_within(Duration::from_millis(30)).unwrap().is_none());
        let waiting = std::thread::spawn(move || other.hold().map(|held| (held, other.state())));
        let mut own = own;
        own.write(State::Committed).unwrap();
        drop(own);
        let (_held, state) = waiting.join().unwrap().unwrap();
        assert_eq!(state, State::Committed);
    }

    /// Named, so that the operator knows what to wait for, from the first question to the other host on.
    #[test]
    fn a_second_migration_is_told_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let root = Path::new(DEFAULT_ROOT);
        let lock = Lock::take(dir.path(), root, "web", "to host2").unwrap();
        let why = Lock::take(dir.path(), root, "web", "to host3").unwrap_err().to_string();
        assert!(why.contains("to host2, by process"), "{why}");
        drop(Lock::take(dir.path(), root, "web2", "to host3").unwrap());
        // Nothing stays of it, whoever waits for it meanwhile.
        let path = lock.path.clone();
        let late = File::open(&path).unwrap();
        drop(lock);
        assert!(!path.exists());
        let _again = Lock::take(dir.path(), root, "web", "to host3").unwrap();
        assert!(!same_file(&late, &path));
    }
}
