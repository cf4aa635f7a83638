//! The container's standard streams on the destination.
//!
//! A regular file outside the container (a log) is the same on both hosts, or comes along: written
//! beside its place while the container still runs on the source, moved there when it is complete,
//! with what was there before kept as `.before` and put back if the migration is given up. What
//! went to a pipe, whose other end stays behind, goes on to a file in `/var/log/ferry`.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::inspect::MAX_STREAM;
use super::protocol::{Plan, Stream};
use super::restore::StreamPlan;
use crate::files::probe;

/// Where the output of containers that wrote to a pipe goes.
const LOGS: &str = "/var/log/ferry";

/// See the module.
#[derive(Debug, Default)]
pub struct Streams {
    files: Vec<(File, Option<String>)>,
    logs: Vec<Log>,
}

/// A log that comes along.
#[derive(Debug)]
struct Log {
    /// Number of its stream on the link.
    number: usize,
    file: File,
    place: PathBuf,
    /// Where it is until it is complete.
    temporary: PathBuf,
    /// Where what stood in its place is.
    before: Option<PathBuf>,
    settled: bool,
}

impl Streams {
    /// Which streams are the same file on both hosts. To be asked while the source's probes are
    /// there.
    pub fn shared(streams: &[Stream]) -> Vec<usize> {
        let same = |stream: &Stream| {
            let place = Path::new(&stream.target);
            let directory = place.parent().filter(|_| place.is_file());
            let proof = stream.proof.as_ref().filter(|_| stream.external.is_some());
            directory.zip(proof).is_some_and(|(d, proof)| probe::verify(d, proof).is_ok())
        };
        (0..streams.len()).filter(|&i| same(&streams[i])).collect()
    }

    /// Opens what the container will have.
    ///
    /// # Errors
    /// When a log cannot be made.
    pub fn open(plan: &Plan, shared: &[usize]) -> Result<Streams> {
        let mut streams = Streams::default();
        for (i, stream) in plan.streams.iter().enumerate() {
            let file = streams.open_one(plan, i, stream, shared.contains(&i))?;
            streams.files.push((file, stream.external.clone()));
        }
        Ok(streams)
    }

    fn open_one(&mut self, plan: &Plan, i: usize, stream: &Stream, shared: bool) -> Result<File> {
        if let Some(key) = &stream.external {
            // `>log 2>&1`: one file.
            if let Some((file, _)) = self.files.iter().find(|(_, k)| k.as_ref() == Some(key)) {
                return Ok(file.try_clone()?);
            }
            return self.open_log(plan, i, stream, shared);
        }
        if stream.target.starts_with("pipe:") && i > 0 {
            fs::create_dir_all(LOGS)?;
            let path = Path::new(LOGS).join(format!("{}.log", plan.container));
            let file = OpenOptions::new().create(true).append(true).mode(0o640).open(&path);
            return file.with_context(|| format!("cannot open {}", path.display()));
        }
        Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?)
    }

    fn open_log(&mut self, plan: &Plan, i: usize, stream: &Stream, shared: bool) -> Result<File> {
        let place = PathBuf::from(&stream.target);
        let plain = place.components().all(|c| !matches!(c, std::path::Component::ParentDir));
        let (Some(name), true, true) = (place.file_name(), place.is_absolute(), plain) else {
            bail!("{:?} is no log's place", stream.target);
        };
        let what = || format!("cannot make the log {}", place.display());
        if shared {
            return OpenOptions::new().read(true).append(true).open(&place).with_context(what);
        }
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".ferry-{}", plan.migration));
        let temporary = place.with_file_name(hidden);
        // Appending: what the container writes goes to the end, whatever became of the position
        // that it had on the source. Pieces on the link are written by position, so through a
        // descriptor of their own.
        let make = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary);
        let file = make.with_context(what)?;
        let (uid, gid) = stream.owner;
        self.logs.push(Log {
            number: i,
            file,
            place: place.clone(),
            temporary: temporary.clone(),
            before: None,
            settled: false,
        });
        let log = &self.logs[self.logs.len() - 1];
        std::os::unix::fs::fchown(&log.file, Some(uid), Some(gid)).with_context(what)?;
        let mode = Permissions::from_mode(stream.mode & 0o7777);
        log.file.set_permissions(mode).with_context(what)?;
        OpenOptions::new().read(true).append(true).open(&temporary).with_context(what)
    }

    /// For the restore.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn plan(&self) -> Result<Vec<StreamPlan>> {
        let one = |(file, external): &(File, Option<String>)| {
            Ok(StreamPlan { file: file.try_clone()?, external: external.clone() })
        };
        self.files.iter().map(one).collect()
    }

    /// A piece of a log.
    ///
    /// # Errors
    /// When nobody waits for it, or the disk is full.
    pub fn write(&mut self, number: &str, at: u64, bytes: &[u8]) -> Result<()> {
        let log = number.parse().ok().and_then(|n: usize| self.logs.iter().find(|l| l.number == n));
        let log = log.ok_or_else(|| anyhow!("a log for no stream"))?;
        if at.saturating_add(bytes.len() as u64) > MAX_STREAM * 2 {
            bail!("a log longer than was announced");
        }
        log.file
            .write_all_at(bytes, at)
            .with_context(|| format!("writing the log {}", log.place.display()))
    }

    /// The logs are complete: to their places.
    ///
    /// # Errors
    /// When one cannot be moved.
    pub fn settle(&mut self) -> Result<()> {
        for log in &mut self.logs {
            if log.place.symlink_metadata().is_ok() {
                let mut before = log.place.clone().into_os_string();
                before.push(".before");
                fs::rename(&log.place, &before)?;
                log.before = Some(before.into());
            }
            fs::rename(&log.temporary, &log.place)?;
            log.settled = true;
        }
        Ok(())
    }

    /// The container runs with them. What stood in their places goes if it was only the beginning
    /// of what came.
    pub fn keep(&mut self) {
        for log in self.logs.drain(..) {
            if let Some(before) = &log.before
                && begins_with(&log.place, before).unwrap_or(false)
            {
                let _ = fs::remove_file(before);
            }
        }
    }

    /// Given up: everything as it was.
    pub fn undo(&mut self) {
        self.files.clear();
        for log in self.logs.drain(..) {
            let _ = fs::remove_file(if log.settled { &log.place } else { &log.temporary });
            if let Some(before) = &log.before {
                let _ = fs::rename(before, &log.place);
            }
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.undo();
    }
}

/// Whether a file begins with all of another.
fn begins_with(whole: &Path, start: &Path) -> Result<bool> {
    let (mut whole, mut start) =
        (BufReader::new(File::open(whole)?), BufReader::new(File::open(start)?));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(dir: &Path) -> Streams {
        let place = dir.join("log");
        let temporary = dir.join(".log.x");
        let file = File::create(&temporary).unwrap();
        let log = Log { number: 1, file, place, temporary, before: None, settled: false };
        Streams { files: Vec::new(), logs: vec![log] }
    }

    #[test]
    fn what_was_there_comes_back_when_the_migration_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "older").unwrap();
        let mut s = streams(dir.path());
        s.write("1", 0, b"new").unwrap();
        assert!(s.write("2", 0, b"new").is_err());
        s.settle().unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"new");
        drop(s);
        assert_eq!(fs::read(&log).unwrap(), b"older");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_there_is_kept_unless_it_came_along() {
        for (older, kept) in [("ol", false), ("other", true)] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("log"), older).unwrap();
            let mut s = streams(dir.path());
            s.write("1", 0, b"older and newer").unwrap();
            s.settle().unwrap();
            s.keep();
            drop(s);
            assert_eq!(fs::read(dir.path().join("log")).unwrap(), b"older and newer");
            assert_eq!(dir.path().join("log.before").exists(), kept);
        }
    }
}
