//! The container's standard streams on the destination.
//!
//! A regular file outside the container (a log) is the same on both hosts, or comes along: written
//! beside its place while the container still runs on the source, moved there when it is complete,
//! with what was there before kept as `.before` and put back if the migration is given up. What
//! went to a pipe, whose other end stays behind, goes on to a file in `/var/log/ferry`.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::statvfs::fstatvfs;

use super::restore::StreamPlan;
use crate::files::logs::{Logs, MAX_NAME};
use crate::files::{directory, probe};
use crate::migration::preflight::standard::MAX_GROWN;
use crate::migration::protocol::{Plan, Stream};
use crate::problem::Problem;

/// Where the output of containers that wrote to a pipe goes.
const LOGS: &str = "/var/log/ferry";

/// Where a file obeys or is run because it is there. The source's word is taken for it that the
/// container has a log in that place; should it be wrong, or have been deceived, what is written there
/// must be a log and nothing else. No boundary against a source that means harm: that names the bundle, too.
const NO_PLACE: [&str; 12] =
    ["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "sys", "usr"];

/// Bits of a mode that a log may have: nobody runs it, nor with the rights of its owner.
const MODE: u32 = 0o666;

/// Standard output and error on the destination: files that are the same, come along, or take what went to a pipe.
#[derive(Debug, Default)]
pub struct Streams {
    /// Places of logs, by the number of the stream. The second of two streams of one file has none.
    places: Vec<Option<LogPlace>>,
    logs: Logs,
    files: Vec<(File, Option<String>)>,
}

/// The place of a log.
#[derive(Debug)]
struct LogPlace {
    directory: OwnedFd,
    /// Both hosts see this file.
    shared: Option<File>,
    /// What comes is written to it.
    coming: Option<File>,
}

impl Streams {
    /// Looks for the places of the plan's logs, and which of them are the same file on both hosts. To
    /// be asked while the source's probes are there. Nothing is made.
    pub fn find(plan: &Plan, problems: &mut Vec<Problem>) -> Streams {
        let mut streams = Streams::default();
        for (i, stream) in plan.streams.iter().enumerate() {
            // `>log 2>&1`: one file.
            let twice = plan.streams[..i].iter().any(|s| s.external == stream.external);
            let wanted = stream.external.is_some() && !twice;
            let place = wanted.then(|| find(stream)).transpose();
            streams.places.push(place.unwrap_or_else(|problem| {
                problems.push(problem);
                None
            }));
        }
        let coming = streams.places.iter().enumerate();
        let coming = coming.filter(|(_, p)| p.as_ref().is_some_and(|p| p.shared.is_none()));
        let coming = coming.map(|(i, _)| (i, plan.streams[i].target.clone().into()));
        streams.logs = Logs::plan(&plan.migration, coming);
        streams
    }

    /// The streams, by number, that are the same file on both hosts.
    pub fn shared(&self) -> Vec<usize> {
        let shared = |i: &usize| self.places[*i].as_ref().is_some_and(|p| p.shared.is_some());
        (0..self.places.len()).filter(shared).collect()
    }

    /// Returns what comes along, for the journal.
    pub fn logs(&self) -> Logs {
        self.logs.clone()
    }

    /// Opens what the container will have. The journal must know of the logs.
    ///
    /// # Errors
    /// When a log cannot be made.
    pub fn open(&mut self, plan: &Plan) -> Result<()> {
        for (i, stream) in plan.streams.iter().enumerate() {
            let file = self.open_one(plan, i, stream)?;
            self.files.push((file, stream.external.clone()));
        }
        Ok(())
    }

    fn open_one(&mut self, plan: &Plan, i: usize, stream: &Stream) -> Result<File> {
        if let Some(key) = &stream.external {
            if let Some((file, _)) = self.files.iter().find(|(_, k)| k.as_ref() == Some(key)) {
                return Ok(file.try_clone()?);
            }
            return self.open_log(i, stream);
        }
        if stream.target.starts_with("pipe:") && i > 0 {
            fs::create_dir_all(LOGS)?;
            let path = Path::new(LOGS).join(format!("{}.log", plan.container));
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o640)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path);
            return file.with_context(|| format!("cannot open {}", path.display()));
        }
        Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?)
    }

    fn open_log(&mut self, i: usize, stream: &Stream) -> Result<File> {
        let place = self.places.get_mut(i).and_then(Option::as_mut);
        let place = place.ok_or_else(|| anyhow!("a log without a place"))?;
        if let Some(file) = &place.shared {
            return Ok(file.try_clone()?);
        }
        let what = || format!("cannot make the log {}", stream.target);
        let file = self.logs.stage(i, &place.directory)?;
        let (uid, gid) = stream.owner;
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).with_context(what)?;
        file.set_permissions(Permissions::from_mode(stream.mode & MODE)).with_context(what)?;
        // Appending: what the container writes goes to the end, whatever became of the position
        // that it had on the source. Pieces on the link are written by position, so through a
        // descriptor of their own.
        let appending = directory::reopen(&file, OpenOptions::new().read(true).append(true));
        place.coming = Some(file);
        appending.with_context(what)
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
        let place = number.parse().ok().and_then(|n: usize| self.places.get(n)?.as_ref());
        let file = place.and_then(|p| p.coming.as_ref());
        let file = file.ok_or_else(|| anyhow!("a log for no stream"))?;
        if at.saturating_add(bytes.len() as u64) > MAX_GROWN {
            bail!("a log longer than was announced");
        }
        file.write_all_at(bytes, at).with_context(|| format!("writing the log of stream {number}"))
    }

    /// The logs are complete: to their places.
    ///
    /// # Errors
    /// When one cannot be moved.
    pub fn settle(&mut self) -> Result<()> {
        self.coming().try_for_each(|(i, place)| self.logs.settle(i, &place.directory))
    }

    /// Given up: everything as it was, in the very directories that were opened. What is not undone
    /// so, the journal knows of.
    pub fn undo(&mut self) {
        self.files.clear();
        // In the opposite order: one may stand where another did.
        for (i, place) in self.coming().collect::<Vec<_>>().into_iter().rev() {
            let _ = self.logs.undo_in(i, &place.directory);
        }
        self.places.clear();
    }

    fn coming(&self) -> impl Iterator<Item = (usize, &LogPlace)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(i, p)| Some((i, p.as_ref().filter(|p| p.coming.is_some())?)))
    }
}

/// Looks for the place of a log.
fn find(stream: &Stream) -> Result<LogPlace, Problem> {
    let path = Path::new(&stream.target);
    let refuse = |why: String| {
        Problem::new(
            format!("the log {} cannot be at its place on the destination", path.display()),
            why,
        )
    };

    let (parent, name) = plain(path).ok_or_else(|| refuse("that is no file's place".into()))?;
    if parent == Path::new(LOGS) {
        // Our own: what went to a pipe on its first host goes on from its second.
        fs::create_dir_all(parent).map_err(|e| refuse(e.to_string()))?;
    }

    let directory = directory::open(parent).map_err(|e| {
        refuse(format!("{}: {e}", parent.display()))
            .hint("make that directory there, with no symbolic link on the way to it")
    })?;
    let there = directory::find(&directory, name).map_err(|e| refuse(e.to_string()))?;
    let regular = |file: &File| file.metadata().is_ok_and(|meta| meta.is_file());
    let there = there.map(|there| if regular(&there) { Ok(there) } else { Err(()) }).transpose();
    let there = there.map_err(|()| {
        refuse("what stands there is no regular file".into())
            .hint("move it away on the destination")
    })?;

    let proved = stream.proof.as_ref().is_some_and(|proof| {
        probe::verify(&crate::sys::process::path_of(&directory), proof).is_ok()
    });
    if proved {
        // A log of that name beside it would be put in the place of the one that is being written.
        let there = there.ok_or_else(|| {
            refuse("both hosts see the directory, and only the source the file".into())
                .hint("try again when the destination sees it, too")
        })?;
        let shared = directory::reopen(&there, OpenOptions::new().read(true).append(true));
        let shared = shared.map_err(|e| refuse(format!("both hosts see it, but here: {e}")))?;
        return Ok(LogPlace { directory, shared: Some(shared), coming: None });
    }

    comes(stream, &directory, there.as_ref()).map_err(|(why, hint)| refuse(why).hint(hint))?;
    Ok(LogPlace { directory, shared: None, coming: None })
}

/// The directory and the name of a place that is said so in only one way.
fn plain(path: &Path) -> Option<(&Path, &OsStr)> {
    let mut components = path.components();
    let whole = components.next() == Some(Component::RootDir)
        && components.all(|c| matches!(c, Component::Normal(_)))
        && path.as_os_str().len() < libc::PATH_MAX as usize;
    path.parent().zip(path.file_name()).filter(|_| whole)
}

/// Tells whether a log may be put in a place, over what stands there.
fn comes(
    stream: &Stream,
    directory: &OwnedFd,
    there: Option<&File>,
) -> Result<(), (String, &'static str)> {
    let path = Path::new(&stream.target);
    let elsewhere = "have the log in another place, or in a directory that both hosts see";
    let mut names = path.components().skip(1).map(|c| c.as_os_str());
    let hidden = path.components().any(|c| c.as_os_str().as_encoded_bytes().starts_with(b"."));
    let system = names.next().is_some_and(|top| NO_PLACE.iter().any(|no| top == *no));
    if system || hidden {
        return Err((
            "logs do not come along to places of the system, or to hidden ones".into(),
            elsewhere,
        ));
    }

    if path.file_name().is_some_and(|name| name.len() > MAX_NAME) {
        return Err((format!("its name is longer than {MAX_NAME} bytes"), elsewhere));
    }
    if stream.mode & !MODE != 0 {
        let why = format!("its mode is {:04o}, and a log is nothing to be run", stream.mode);
        return Err((why, "take the other bits away from it on the source: chmod 0644"));
    }

    let old = there.and_then(|there| there.metadata().ok()).map_or(0, |meta| meta.mode());
    if old & 0o7777 & !MODE != 0 {
        let why = format!("what stands there has the mode {:04o}, and is no log", old & 0o7777);
        return Err((why, "move it away on the destination"));
    }

    let room = fstatvfs(directory).map_or(u64::MAX, |s| s.blocks_available() * s.fragment_size());
    if room < stream.size {
        let why = format!("it has {} MiB, and {} MiB are left", stream.size >> 20, room >> 20);
        return Err((why, "make room there, or rotate it by copy and truncate"));
    }

    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(target: &Path) -> Stream {
        let external = Some("file[1:2]".to_owned());
        Stream { target: target.display().to_string(), external, mode: 0o644, ..Stream::default() }
    }

    /// Without a dot in its name.
    fn directory() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("logs").tempdir().unwrap()
    }

    fn refused(stream: &Stream) -> bool {
        find(stream).is_err_and(|problem| problem.fatal)
    }

    #[test]
    fn a_log_comes_to_a_directory_that_is_there_and_over_nothing_but_a_log() {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        assert!(find(&stream(&at("log"))).is_ok_and(|place| place.shared.is_none()));
        fs::write(at("log"), "older").unwrap();
        assert!(find(&stream(&at("log"))).is_ok());
        assert!(refused(&stream(&at("none/log"))), "no directory");
        fs::create_dir(at("taken")).unwrap();
        assert!(refused(&stream(&at("taken"))), "a directory");
        for (name, to) in [("file", "log"), ("elsewhere", "/")] {
            std::os::unix::fs::symlink(to, at(name)).unwrap();
        }
        assert!(refused(&stream(&at("file"))), "a link");
        assert!(refused(&stream(&at("elsewhere/srv/log"))), "behind a link");
        fs::set_permissions(at("log"), Permissions::from_mode(0o755)).unwrap();
        assert!(refused(&stream(&at("log"))), "a program");
        assert!(refused(&Stream { size: u64::MAX, ..stream(&at("new")) }), "no room");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "nothing was made");
    }

    #[test]
    fn nothing_that_is_obeyed_or_run_comes_as_a_log() {
        for place in ["/etc/log", "/usr/lib/log", "/dev/log", "log", "/srv/../etc/log", "/", ""] {
            assert!(refused(&stream(Path::new(place))), "{place}");
        }
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at(".ssh")).unwrap();
        assert!(refused(&stream(&at(".ssh/authorized_keys"))));
        assert!(refused(&stream(&at(".profile"))));
        assert!(refused(&stream(&at(&"n".repeat(MAX_NAME + 1)))));
        for mode in [0o4644, 0o2644, 0o1644, 0o744] {
            assert!(refused(&Stream { mode, ..stream(&at("log")) }), "{mode:o}");
        }
    }

    #[test]
    fn what_both_hosts_see_is_opened_and_nothing_put_beside_it() {
        let dir = directory();
        let log = dir.path().join("log");
        let probe = probe::make_in(directory::open(dir.path()).unwrap()).unwrap();
        // Whatever its mode.
        let shared = Stream { proof: Some(probe.proof.clone()), mode: 0o777, ..stream(&log) };
        assert!(refused(&shared), "it is not there yet");
        fs::write(&log, "x").unwrap();
        assert!(find(&shared).is_ok_and(|place| place.shared.is_some()));
        drop(probe);
        assert!(refused(&shared), "it is another directory");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the probe is gone");
    }
}
