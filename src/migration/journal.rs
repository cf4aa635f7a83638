//! The journal: what a migration is about, and how far it has come, on disk before it is told.
//!
//! One file a migration below `STATE/migrations`, of a fixed size and written in full when it is
//! made: a JSON line, then one line for each state reached. Later states overwrite blank space in
//! place and are made durable with fdatasync(2), which then writes one block and no metadata: the
//! commit stands in the middle of the client's pause.
//!
//! **The decision is the line `committed` in the source's journal.** As long as it is not there
//! the source owns the container; once it is there the destination does.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::away::canonical;
use super::forward::Note;
use crate::files::logs::Logs;
use crate::files::place::Placing;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::DEFAULT_ROOT;
use crate::sys::process::start_time;
use crate::transport::connect::Destination;

/// Bytes of a journal file.
const SIZE: usize = 32 << 10;
/// Bytes kept for state lines.
const STATES: usize = 4 << 10;

/// Which end of the migration this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The container leaves this host.
    Source,
    /// The container comes to this host.
    Destination,
}

/// How far it has come on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Something may have been made or frozen.
    Begun,
    /// Destination: restored and held; the source decides.
    Ready,
    /// The destination owns the container.
    Committed,
    /// Destination: it runs, with all of its memory.
    Whole,
    /// Over: the container runs on the destination, nothing is left here.
    Finished,
    /// Over: the source owns the container, everything is undone here.
    Aborted,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Begun => "begun",
            State::Ready => "ready",
            State::Committed => "committed",
            State::Whole => "whole",
            State::Finished => "finished",
            State::Aborted => "aborted",
        }
    }

    /// Whether nothing is left to be done.
    pub fn is_over(self) -> bool {
        matches!(self, State::Finished | State::Aborted)
    }
}

/// What a migration is about: enough for another process to undo or finish it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The migration's ID.
    pub migration: String,
    /// The container's.
    pub container: String,
    /// This host's end.
    pub role: Role,
    /// The other host, as the user wrote it; on the destination: what is known of it.
    pub peer: String,
    /// How the other host is reached (source only).
    pub destination: Option<Destination>,
    /// The runtime's path.
    pub runtime: PathBuf,
    /// Its `--root`, where it was given.
    pub root: Option<PathBuf>,
    /// Its `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// The container's control group (source only).
    pub cgroup: Option<Cgroup>,
    /// The container's init process, and when it started (field 22 of proc_pid_stat(5)).
    pub init: Option<(i32, u64)>,
    /// The network namespace's path.
    pub network_path: Option<PathBuf>,
    /// Device and inode of that namespace, where it was there when the migration began.
    pub network_identity: Option<(u64, u64)>,
    /// Whether that namespace is Ferry's to take down.
    pub network_ours: bool,
    /// Whether the ID must not be started here afterwards (source only).
    pub leave_mark: bool,
    /// What is copied here (destination only).
    #[serde(default)]
    pub placing: Placing,
    /// Logs that come along (destination only).
    #[serde(default)]
    pub logs: Logs,
    /// What is done about forwarding its address.
    #[serde(default)]
    pub forward: Option<Note>,
    /// What has been copied from here and is to be removed when it runs there (source only).
    #[serde(default)]
    pub remove: Vec<PathBuf>,
    /// The overlay that is mounted of it (source only).
    #[serde(default)]
    pub unmount: Option<PathBuf>,
    /// The private directory with sockets and images.
    pub work: PathBuf,
    /// Process that works on it, and when that started.
    pub worker: (i32, u64),
    /// Unix time.
    pub begun: u64,
}

/// A journal file, open.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// What the migration is about.
    pub record: Record,
    states: Vec<(State, u64)>,
    at: u64,
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("migrations")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Journal {
    /// Makes the journal of a new migration, in state `Begun`; when this returns it is on disk.
    ///
    /// # Errors
    /// When the disk does not take it; nothing has begun then.
    pub fn create(state_dir: &Path, record: Record) -> Result<Journal> {
        let dir = directory(state_dir);
        let path = dir.join(format!("{}.journal", record.migration));
        let what = || format!("cannot write the journal {}", path.display());
        fs::create_dir_all(&dir).with_context(what)?;
        let mut text = serde_json::to_string(&record)?;
        text.push('\n');
        let at = text.len() as u64;
        if text.len() + STATES > SIZE {
            bail!("the record of this migration is too long for its journal");
        }
        let mut bytes = text.into_bytes();
        bytes.resize(SIZE, b' ');
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .with_context(what)?;
        file.write_all_at(&bytes, 0).with_context(what)?;
        file.sync_all().with_context(what)?;
        File::open(&dir)?.sync_all().with_context(what)?;
        let mut journal = Journal { file, path, record, states: Vec::new(), at };
        journal.note(State::Begun)?;
        Ok(journal)
    }

    /// Reads a journal.
    ///
    /// # Errors
    /// When it is not one.
    pub fn open(path: &Path) -> Result<Journal> {
        let what = || format!("cannot read the journal {}", path.display());
        let mut file = OpenOptions::new().read(true).write(true).open(path).with_context(what)?;
        let mut text = String::new();
        file.seek(SeekFrom::Start(0))?;
        (&file).take(SIZE as u64).read_to_string(&mut text).with_context(what)?;
        let (head, rest) =
            text.split_once('\n').ok_or_else(|| anyhow!("no record")).with_context(what)?;
        let record = serde_json::from_str(head).with_context(what)?;
        let mut at = head.len() as u64 + 1;
        let mut states = Vec::new();
        // A line that was cut by a crash has no end and does not count: it was never told.
        for line in rest.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
            let mut words = line.split_ascii_whitespace();
            let (Some(name), Some(time)) = (words.next(), words.next()) else { continue };
            let state = serde_json::from_value(name.into()).with_context(what)?;
            states.push((state, time.parse().unwrap_or(0)));
            at += line.len() as u64;
        }
        Ok(Journal { file, path: path.to_owned(), record, states, at })
    }

    /// For whoever settles what a Ferry that died has left: the guard, `ferry resolve`, a question
    /// from the other host. Waits until nobody else does, and reads what he has written.
    ///
    /// # Errors
    /// When the journal cannot be read any more.
    pub fn hold(&mut self) -> Result<Held> {
        let what = || format!("cannot lock the journal {}", self.path.display());
        let file = File::open(&self.path).with_context(what)?;
        let held = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| std::io::Error::from(e))
            .with_context(what)?;
        *self = Journal::open(&self.path)?;
        Ok(Held { _file: held })
    }

    /// The state reached.
    pub fn state(&self) -> State {
        self.states.last().map_or(State::Begun, |s| s.0)
    }

    /// The states in order, with unix times.
    pub fn states(&self) -> &[(State, u64)] {
        &self.states
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a state down without waiting for the disk: a crash of this process does not lose it,
    /// a crash of the host may.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note(&mut self, state: State) -> Result<()> {
        let time = now();
        let line = format!("{} {time}\n", state.name());
        if self.at as usize + line.len() > SIZE {
            bail!("the journal {} is full", self.path.display());
        }
        self.file
            .write_all_at(line.as_bytes(), self.at)
            .with_context(|| format!("cannot write the journal {}", self.path.display()))?;
        self.at += line.len() as u64;
        self.states.push((state, time));
        Ok(())
    }

    /// Makes what was noted durable.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .with_context(|| format!("cannot write the journal {}", self.path.display()))
    }

    /// Writes a state down; when this returns it survives a crash of the host.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&mut self, state: State) -> Result<()> {
        self.note(state)?;
        self.sync()
    }

    /// All journals of this host, oldest first; those that cannot be read are left out.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn all(state_dir: &Path) -> Result<Vec<Journal>> {
        let dir = directory(state_dir);
        let list = match fs::read_dir(&dir) {
            Ok(list) => list,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", dir.display())),
        };
        let mut all: Vec<Journal> = list
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "journal"))
            .filter_map(|p| Journal::open(&p).ok())
            .collect();
        all.sort_by_key(|j| j.record.begun);
        Ok(all)
    }

    /// The journal of a migration on this host.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn find(state_dir: &Path, migration: &str) -> Result<Option<Journal>> {
        let path = directory(state_dir).join(format!("{migration}.journal"));
        if !path.exists() { Ok(None) } else { Journal::open(&path).map(Some) }
    }
}

/// See [`Journal::hold`]. flock(2).
#[derive(Debug)]
pub struct Held {
    _file: Flock<File>,
}

/// Held while a container is being migrated: a second migration of it is refused. flock(2).
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes it, if no migration of the container is under way or was broken off.
    ///
    /// # Errors
    /// Says which migration stands in the way, and what to do.
    pub fn take(state_dir: &Path, root: &Path, container: &str) -> Result<Lock> {
        let dir = directory(state_dir);
        let root = canonical(root);
        let name = format!("{}%{container}.lock", root.display()).replace('/', "%");
        let path = dir.join(name);
        let what = || format!("cannot write to {}", dir.display());
        fs::create_dir_all(&dir).with_context(what)?;
        let mut open = OpenOptions::new();
        let file = open.write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = Flock::lock(file.with_context(what)?, FlockArg::LockExclusiveNonblock)
            .map_err(|_| anyhow!("a migration of {container} is under way on this host\nhint: see `ferry migrations {container}`"))?;
        for journal in Journal::all(state_dir)? {
            let record = &journal.record;
            let its_root = record.root.as_deref().unwrap_or(Path::new(DEFAULT_ROOT));
            let this = record.container == container && canonical(its_root) == root;
            if this && !journal.state().is_over() && !is_alive(record.worker) {
                bail!(
                    "an earlier migration of {container} ({}) was broken off\nhint: `ferry resolve {container}` first",
                    record.migration
                );
            }
        }
        Ok(Lock { _file: file })
    }
}

/// Whether that very process still runs.
pub fn is_alive((pid, started): (i32, u64)) -> bool {
    start_time(pid) == Some(started)
}

/// This process, as a record names it.
pub fn this_process() -> (i32, u64) {
    let pid = std::process::id() as i32;
    (pid, start_time(pid).unwrap_or(0))
}

/// Unix time, for a record.
pub fn unix_time() -> u64 {
    now()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(migration: &str) -> Record {
        Record {
            placing: Placing::default(),
            logs: Logs::default(),
            forward: None,
            remove: Vec::new(),
            unmount: None,
            migration: migration.into(),
            container: "web".into(),
            role: Role::Source,
            peer: "host2".into(),
            destination: Some(Destination::Unix("/run/x".into())),
            runtime: "/usr/sbin/runc".into(),
            root: None,
            systemd_cgroup: false,
            cgroup: None,
            init: None,
            network_path: None,
            network_identity: None,
            network_ours: false,
            leave_mark: true,
            work: "/run/ferry/x".into(),
            worker: this_process(),
            begun: 1,
        }
    }

    #[test]
    fn states_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        assert_eq!(journal.state(), State::Begun);
        journal.write(State::Committed).unwrap();
        let again = Journal::find(dir.path(), "00112233aabbccdd").unwrap().unwrap();
        assert_eq!(again.state(), State::Committed);
        assert_eq!(again.record.container, "web");
        assert_eq!(fs::metadata(again.path()).unwrap().len(), SIZE as u64);
        assert!(Journal::find(dir.path(), "ffffffffffffffff").unwrap().is_none());
        assert_eq!(Journal::all(dir.path()).unwrap().len(), 1);
        assert!(Journal::create(dir.path(), record("00112233aabbccdd")).is_err());
    }

    /// Cut at every byte of the line, as a crash in the middle of the write would: it is there in
    /// full, or not at all.
    #[test]
    fn a_commit_cut_by_a_crash_is_no_commit() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        let before = journal.at;
        journal.write(State::Committed).unwrap();
        let whole = fs::read(journal.path()).unwrap();
        let line = (journal.at - before) as usize;
        for cut in 0..=line {
            let mut bytes = whole.clone();
            bytes[before as usize + cut..].fill(b' ');
            fs::write(journal.path(), &bytes).unwrap();
            let state = Journal::open(journal.path()).unwrap().state();
            assert_eq!(state == State::Committed, cut == line, "cut at {cut}");
        }
    }

    #[test]
    fn processes_are_told_apart() {
        let me = this_process();
        assert!(is_alive(me));
        assert!(!is_alive((me.0, me.1 + 1)));
    }
}
