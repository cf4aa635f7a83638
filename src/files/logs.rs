//! Logs that come along with a container: how they come to their places, and how that is undone.
//!
//! A log is written beside its place and renamed when it is complete; what stood there is renamed out
//! of its way. Whoever goes on when Ferry was killed knows from the journal where, so all of it can be
//! undone by the names alone, by another process and after a reboot, as that of [`place`](crate::files::place).

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::directory;

/// Longest name of a log: a few letters are added to it (NAME_MAX).
pub const MAX_NAME: usize = 200;

/// All logs that come along with one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logs {
    /// The migration's ID.
    migration: String,
    list: Vec<Log>,
}

/// A log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Log {
    /// Number of its stream on the link.
    number: usize,
    place: PathBuf,
}

impl Logs {
    /// Plans for logs at these places, each with the number of its stream. Nothing is made.
    pub fn plan(migration: &str, places: impl IntoIterator<Item = (usize, PathBuf)>) -> Logs {
        let list = places.into_iter().map(|(number, place)| Log { number, place }).collect();
        Logs { migration: migration.to_owned(), list }
    }

    /// Makes the file that the log of a stream is written to, private and empty.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn stage(&self, number: usize, directory: &OwnedFd) -> Result<File> {
        let log = self.get(number)?;
        directory::make(directory, &self.beside(log, ""))
            .with_context(|| format!("cannot make the log {}", log.place.display()))
    }

    /// Brings the log of a stream to its place.
    ///
    /// # Errors
    /// When it cannot be, or something else than a file is in its place.
    pub fn settle(&self, number: usize, directory: &OwnedFd) -> Result<()> {
        let log = self.get(number)?;
        let what = || format!("cannot put the log at {}", log.place.display());
        directory::make(directory, &self.beside(log, "-mark")).with_context(what)?;
        if let Some(old) = directory::find(directory, log.name()).with_context(what)? {
            if !old.metadata().with_context(what)?.is_file() {
                return Err(anyhow!("that is no file")).with_context(what);
            }
            let before = self.beside(log, "-before");
            directory::rename(directory, log.name(), before.as_ref()).with_context(what)?;
        }
        directory::rename(directory, self.beside(log, "").as_ref(), log.name()).with_context(what)
    }

    /// They stay. What stood in their places is kept under `NAME.before`, where that is free, or else
    /// with the migration's ID behind it; or goes if it was only the beginning of what came. May have
    /// been done before.
    ///
    /// # Errors
    /// Says what could not be done; the rest was.
    pub fn keep(&self) -> Result<()> {
        self.each(|log, directory| self.keep_one(log, directory))
    }

    /// Takes everything away again; what stood in the way is back in its place. May have been done
    /// before, or never been needed.
    ///
    /// # Errors
    /// Says what could not be undone; the rest was.
    pub fn undo(&self) -> Result<()> {
        self.each(|log, directory| self.undo_one(log, directory))
    }

    /// As [`undo`](Self::undo), of one log in a directory that is open.
    ///
    /// # Errors
    /// When it cannot be undone.
    pub fn undo_in(&self, number: usize, directory: &OwnedFd) -> Result<()> {
        self.undo_one(self.get(number)?, directory)
    }

    /// In the opposite order: one may stand where another did.
    fn each(&self, deed: impl Fn(&Log, &OwnedFd) -> Result<()>) -> Result<()> {
        let mut first = None;
        for log in self.list.iter().rev() {
            let parent = log.place.parent().unwrap_or(Path::new("/"));
            let done = match directory::open(parent) {
                // Nothing was made there, or it has gone with all that was.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(e) => Err(e.into()),
                Ok(directory) => deed(log, &directory),
            };
            let what = || format!("the log {}", log.place.display());
            first = first.or(done.with_context(what).err());
        }
        first.map_or(Ok(()), Err)
    }

    fn keep_one(&self, log: &Log, directory: &OwnedFd) -> Result<()> {
        let before: OsString = self.beside(log, "-before").into();
        if let Some(old) = directory::find(directory, &before)? {
            if log.begins_with(directory, &old).unwrap_or(false) {
                directory::remove(directory, &before)?;
            } else {
                let mut name = log.name().to_owned();
                name.push(".before");
                if directory::find(directory, &name)?.is_some() {
                    name.push(format!("-{}", self.migration));
                }
                directory::rename(directory, &before, &name)?;
            }
        }
        Ok(directory::remove(directory, self.beside(log, "-mark").as_ref())?)
    }

    fn undo_one(&self, log: &Log, directory: &OwnedFd) -> Result<()> {
        let beside = |what: &str| OsString::from(self.beside(log, what));
        let there = |name: &OsStr| anyhow::Ok(directory::find(directory, name)?.is_some());
        let (staged, mark, before) = (beside(""), beside("-mark"), beside("-before"));
        // Renaming goes: what was there, then what is staged. So what is at the place is ours if
        // nothing is staged any more; and it is staged again before what was there comes back.
        if there(&mark)? && !there(&staged)? && there(log.name())? {
            directory::rename(directory, log.name(), &staged)?;
        }
        if there(&before)? {
            directory::rename(directory, &before, log.name())?;
        }
        // Without it nothing counts as ours any more.
        directory::remove(directory, &mark)?;
        Ok(directory::remove(directory, &staged)?)
    }

    fn get(&self, number: usize) -> Result<&Log> {
        let log = self.list.iter().find(|log| log.number == number);
        log.ok_or_else(|| anyhow!("a log for no stream"))
    }

    /// A name for something of a log in its directory: as long whatever its own is.
    fn beside(&self, log: &Log, what: &str) -> String {
        format!(".ferry-{}-log-{}{what}", self.migration, log.number)
    }
}

impl Log {
    fn name(&self) -> &OsStr {
        self.place.file_name().unwrap_or_default()
    }

    /// Tells whether what is in its place begins with all of another file.
    fn begins_with(&self, directory: &OwnedFd, start: &File) -> Result<bool> {
        let open = |file: &File| {
            if !file.metadata()?.is_file() {
                bail!("that is no file");
            }
            Ok(BufReader::new(directory::reopen(file, OpenOptions::new().read(true))?))
        };
        let whole = directory::find(directory, self.name())?;
        let (mut whole, mut start) = (open(&whole.context("it has gone")?)?, open(start)?);
        let (mut a, mut b) = ([0; 8192], [0; 8192]);
        loop {
            let n = start.read(&mut b)?;
            if n == 0 {
                return Ok(true);
            }
            if whole.read_exact(&mut a[..n]).is_err() || a[..n] != b[..n] {
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    fn names(at: &Path) -> Vec<String> {
        let names = fs::read_dir(at).unwrap().map(|e| e.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn logs(at: &Path) -> (Logs, OwnedFd) {
        (Logs::plan("0123", [(1, at.join("log"))]), directory::open(at).unwrap())
    }

    /// What `settle` does, step by step; with something in the way, and without.
    #[test]
    fn undone_at_every_step_it_leaves_all_as_it_was() {
        for older in [true, false] {
            for steps in 0..=4 {
                let dir = tempfile::tempdir().unwrap();
                let at = |name: &str| dir.path().join(name);
                if older {
                    fs::write(at("log"), "older").unwrap();
                }

                let (logs, directory) = logs(dir.path());
                // As another process reads it from a journal.
                let text = serde_json::to_vec(&logs).unwrap();
                let other: Logs = serde_json::from_slice(&text).unwrap();
                if steps > 0 {
                    logs.stage(1, &directory).unwrap().write_all(b"new").unwrap();
                }

                match steps {
                    2 => fs::write(at(".ferry-0123-log-1-mark"), "").unwrap(),
                    3 if older => {
                        fs::write(at(".ferry-0123-log-1-mark"), "").unwrap();
                        fs::rename(at("log"), at(".ferry-0123-log-1-before")).unwrap();
                    }
                    4 => {
                        logs.settle(1, &directory).unwrap();
                        assert_eq!(fs::read(at("log")).unwrap(), b"new");
                    }
                    _ => {}
                }

                for _ in 0..2 {
                    other.undo().unwrap();
                    assert_eq!(names(dir.path()), ["log"][..usize::from(older)], "{steps} steps");
                    assert!(!older || fs::read(at("log")).unwrap() == b"older");
                }
            }
        }
    }

    /// An undoing that was killed is done once more.
    #[test]
    fn undone_twice_it_takes_nothing_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (logs, directory) = logs(dir.path());
        fs::write(at("log"), "older").unwrap();
        logs.stage(1, &directory).unwrap();
        logs.settle(1, &directory).unwrap();
        // Killed before the mark was taken away.
        fs::rename(at("log"), at(".ferry-0123-log-1")).unwrap();
        fs::rename(at(".ferry-0123-log-1-before"), at("log")).unwrap();
        logs.undo().unwrap();
        assert_eq!(names(dir.path()), ["log"]);
        assert_eq!(fs::read(at("log")).unwrap(), b"older");
    }

    #[test]
    fn what_was_there_is_kept_unless_it_came_along() {
        for (older, kept) in [("ol", false), ("other", true)] {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let (logs, directory) = logs(dir.path());
            fs::write(at("log"), older).unwrap();
            fs::write(at("log.before"), "earlier").unwrap();
            logs.stage(1, &directory).unwrap().write_all(b"older and newer").unwrap();
            logs.settle(1, &directory).unwrap();
            for _ in 0..2 {
                logs.keep().unwrap();
            }
            assert_eq!(fs::read(at("log")).unwrap(), b"older and newer");
            assert_eq!(fs::read(at("log.before")).unwrap(), b"earlier", "nobody's is replaced");
            let all = ["log", "log.before", "log.before-0123"];
            assert_eq!(names(dir.path()), all[..2 + usize::from(kept)]);
        }
    }

    #[test]
    fn nothing_but_a_file_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("elsewhere")).unwrap();
        for place in ["a directory", "a link"] {
            match place {
                "a link" => std::os::unix::fs::symlink("elsewhere", at("log")).unwrap(),
                _ => fs::create_dir(at("log")).unwrap(),
            }
            let (logs, directory) = logs(dir.path());
            logs.stage(1, &directory).unwrap();
            assert!(logs.settle(1, &directory).is_err(), "{place}");
            logs.undo_in(1, &directory).unwrap();
            assert_eq!(names(dir.path()), ["elsewhere", "log"], "{place}");
            let _ = fs::remove_dir(at("log"));
        }
    }

    #[test]
    fn a_directory_behind_a_link_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(directory::open(dir.path()).is_ok());
        assert_eq!(directory::open(&link).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(directory::open(&link.join("link")).is_err());
    }
}
