//! The journal: what a migration is about, and how far it has come, on disk before it is told.
//!
//! One file a migration below `STATE/migrations`, of a fixed size and written in full when it is
//! made: a JSON line, then one line for each state reached. Later states overwrite blank space in
//! place and are made durable with fdatasync(2), which then writes one block and no metadata: the
//! commit stands in the middle of the client's pause. Each has a slot of its own in a sector that
//! the record does not reach into, so that a disk that loses power has it in full or not at all.
//!
//! **The decision is the line `committed` in the source's journal.** As long as it is not there
//! the source owns the container; once it is there the destination does.

pub mod away;
pub(crate) mod criu;
pub(crate) mod holder;
pub(crate) mod lock;
pub(crate) mod part;
pub(crate) mod shelf;
pub(crate) mod workdir;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use self::away::canonical;
pub use self::lock::{Held, Lock};
use self::part::Note;
use crate::files::logs::Logs;
use crate::files::place::Placing;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::DEFAULT_ROOT;
use crate::problem::advice;
use crate::sys::process::{boot_id, is_alive};
use crate::transport::connect::Destination;

/// Bytes of a journal file.
const SIZE: usize = 32 << 10;
/// Bytes kept for state lines.
const STATES: usize = 4 << 10;
/// Bytes of a state line, with what fills it up.
const SLOT: usize = 64;
/// What a disk writes in full or not at all.
const SECTOR: u64 = 512;
/// Version of [`Record`] and [`State`]: raised with whatever an older Ferry would misunderstand.
const VERSION: u32 = 1;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Something may have been made or frozen.
    Begun,
    /// Source: it is being undone, and the container may have run on since.
    Returning,
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
            State::Returning => "returning",
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
    /// See [`VERSION`]; 0 is from before there was one.
    #[serde(default)]
    pub version: u32,
    /// Of this host, when it began: see [`boot_id`]. Empty where that is not known.
    #[serde(default)]
    pub boot: String,
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

impl Record {
    /// Whether this host has not been started again since: process numbers, inodes of namespaces and
    /// names of control groups mean what they meant then.
    pub fn same_boot(&self) -> bool {
        let now = boot_id();
        self.boot.is_empty() || now.is_empty() || self.boot == now
    }

    /// Whether the process that works on it is there; on a destination, or one that goes on in its place.
    pub fn worker_lives(&self) -> bool {
        let guarded = || self.role == Role::Destination && self.guards().into_iter().any(is_alive);
        self.same_boot() && (is_alive(self.worker) || guarded())
    }

    /// Who goes on if that is killed, and when they started; in that order.
    pub fn guards(&self) -> Vec<(i32, u64)> {
        let text = fs::read_to_string(self.work.join(workdir::GUARD)).unwrap_or_default();
        let one = |line: &str| {
            let (pid, started) = line.split_once(' ')?;
            Some((pid.parse().ok()?, started.parse().ok()?))
        };
        text.lines().filter_map(one).collect()
    }

    /// Whether the container's init process is there, as far as the record knows it.
    pub fn init_lives(&self) -> bool {
        self.same_boot() && self.init.is_some_and(is_alive)
    }

    /// Whether it is about this container.
    pub fn concerns(&self, root: &Path, container: &str) -> bool {
        let its_root = self.root.as_deref().unwrap_or(Path::new(DEFAULT_ROOT));
        self.container == container && canonical(its_root) == canonical(root)
    }
}

/// A journal file, open.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// What the migration is about.
    pub record: Record,
    states: Vec<(State, u64)>,
    /// See [`Journal::note_told`].
    told: bool,
    at: u64,
    /// Of whoever has made it, for his whole life: see [`Journal::hold`].
    _held: Option<Held>,
}

/// The line of [`Journal::note_told`].
const TOLD: &str = "told";

/// A journal's lines.
#[derive(Debug, Default)]
struct Lines {
    states: Vec<(State, u64)>,
    told: bool,
    /// Where the next one goes.
    at: u64,
}

/// What every version's record has.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    version: u32,
}

/// The lines in a journal's bytes, which begin behind its record.
///
/// # Errors
/// When something else is among them.
fn read_lines(bytes: &[u8], record_end: u64) -> Result<Lines> {
    let mut found = Lines { at: record_end.next_multiple_of(SECTOR), ..Lines::default() };
    let (mut place, mut end, mut torn) = (record_end, record_end, false);
    let blank = |bytes: &[u8]| bytes.iter().all(|b| b.is_ascii_whitespace() || *b == 0);
    // A line that was cut by a crash has no end, or no beginning, and does not count: it was never
    // told. The next one takes its place.
    let lines = bytes[record_end as usize..].split_inclusive(|b| *b == b'\n');
    for line in lines.filter(|line| line.ends_with(b"\n")) {
        place += line.len() as u64;
        if blank(line) {
            continue;
        }
        let Some((name, time)) = read_line(line) else {
            torn = true;
            continue;
        };
        if torn {
            bail!("it is damaged");
        }
        match name {
            Some(state) => found.states.push((state, time)),
            None => found.told = true,
        }
        found.at = place.next_multiple_of(SLOT as u64);
        end = place;
    }
    // The next state would be lost behind what is no blank.
    if bytes.iter().take(found.at as usize).skip(end as usize).any(|b| !blank(&[*b])) {
        bail!("it is damaged");
    }
    Ok(found)
}

/// A state, or [`TOLD`], and when; `None` where it is no line.
fn read_line(line: &[u8]) -> Option<(Option<State>, u64)> {
    let line = std::str::from_utf8(line).ok()?;
    // Where a file was shorter than it is now there are zeros.
    let line = line.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    let (name, time) = line.split_once(' ')?;
    let state = match name {
        TOLD => None,
        name => Some(serde_json::from_value(name.into()).ok()?),
    };
    Some((state, time.trim().parse().ok()?))
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("migrations")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Journal {
    /// Makes the journal of a new migration, in state `Begun`; when this returns it is on disk, and
    /// [held](Journal::hold) by this process until it ends.
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
        let at = (text.len() as u64).next_multiple_of(SECTOR);
        if at as usize + STATES > SIZE {
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
        // Before anybody can read it.
        let held = Held::wait(&path)?;
        file.write_all_at(&bytes, 0).with_context(what)?;
        file.sync_all().with_context(what)?;
        File::open(&dir)?.sync_all().with_context(what)?;
        let (states, told, _held) = (Vec::new(), false, Some(held));
        let mut journal = Journal { file, path, record, states, told, at, _held };
        journal.note(State::Begun)?;
        Ok(journal)
    }

    /// Reads a journal.
    ///
    /// # Errors
    /// When it is not one.
    pub fn open(path: &Path) -> Result<Journal> {
        let what = || format!("cannot read the journal {}", path.display());
        let mut open = OpenOptions::new();
        let (file, path) = match open.read(true).write(true).open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let put_by = shelf::place_of(path).with_context(what)?;
                (open.open(&put_by).with_context(what)?, put_by)
            }
            file => (file.with_context(what)?, path.to_owned()),
        };
        let mut bytes = Vec::new();
        (&file).take(SIZE as u64).read_to_end(&mut bytes).with_context(what)?;
        let end = bytes.iter().position(|b| *b == b'\n');
        let end = end.ok_or_else(|| anyhow!("no record")).with_context(what)?;
        let head: Head = serde_json::from_slice(&bytes[..end]).with_context(what)?;
        if head.version > VERSION {
            return Err(anyhow!("another version of Ferry has written it")).with_context(what);
        }
        let record = serde_json::from_slice(&bytes[..end]).with_context(what)?;
        let Lines { states, told, at } = read_lines(&bytes, end as u64 + 1).with_context(what)?;
        Ok(Journal { file, path, record, states, told, at, _held: None })
    }

    /// The state reached.
    pub fn state(&self) -> State {
        self.states.last().map_or(State::Begun, |s| s.0)
    }

    /// Whether the line has ever been written that hands the container over; whatever came after it.
    pub fn was_committed(&self) -> bool {
        self.states.iter().any(|s| s.0 == State::Committed)
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
        self.put_line(state.name(), time)?;
        self.states.push((state, time));
        Ok(())
    }

    fn put_line(&mut self, name: &str, time: u64) -> Result<()> {
        let line = format!("{:<1$}\n", format!("{name} {time}"), SLOT - 1);
        if self.at as usize + line.len() > SIZE {
            bail!("the journal {} is full", self.path.display());
        }
        self.file
            .write_all_at(line.as_bytes(), self.at)
            .with_context(|| format!("cannot write the journal {}", self.path.display()))?;
        self.at += line.len() as u64;
        Ok(())
    }

    /// Writes down, beside the states, that the other host knows how it has ended: nobody has to tell
    /// it again. Lost in a crash of the host, it is told once more.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note_told(&mut self) -> Result<()> {
        if !self.told {
            self.put_line(TOLD, now())?;
            self.told = true;
        }
        Ok(())
    }

    /// Whether the other host may still have to learn how it has ended: of a container that stayed, a
    /// copy may be held there; of one that came, the source may ask.
    pub fn is_untold(&self) -> bool {
        let matters = matches!(
            (self.record.role, self.state()),
            (Role::Source, State::Aborted) | (Role::Destination, State::Finished)
        );
        matters && !self.told
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

    /// All journals of this host, oldest first, and those that cannot be read.
    ///
    /// # Errors
    /// When a directory cannot be listed.
    pub fn all(state_dir: &Path) -> Result<(Vec<Journal>, Vec<Unreadable>)> {
        let (mut all, mut unreadable) = list(&directory(state_dir))?;
        let (by, bad) = list(&shelf::directory(state_dir))?;
        all.extend(by);
        unreadable.extend(bad);
        all.sort_by_key(|j| j.record.begun);
        Ok((all, unreadable))
    }

    /// The same without those that are [put by](shelf): there are few, however many migrations there
    /// have been.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn current(state_dir: &Path) -> Result<(Vec<Journal>, Vec<Unreadable>)> {
        let (mut all, unreadable) = list(&directory(state_dir))?;
        all.sort_by_key(|j| j.record.begun);
        Ok((all, unreadable))
    }

    /// The [current](Journal::current) ones that are about a container.
    ///
    /// # Errors
    /// When they cannot be listed, or one that is about it cannot be read: what is in it decides
    /// whose the container is.
    pub fn of(state_dir: &Path, root: &Path, container: &str) -> Result<Vec<Journal>> {
        let (all, unreadable) = Journal::current(state_dir)?;
        if let Some(journal) = unreadable.into_iter().find(|j| j.may_be_about(container)) {
            return Err(journal.error());
        }
        Ok(all.into_iter().filter(|j| j.record.concerns(root, container)).collect())
    }

    /// The journal of a migration on this host.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn find(state_dir: &Path, migration: &str) -> Result<Option<Journal>> {
        let path = directory(state_dir).join(format!("{migration}.journal"));
        let is_there = path.exists() || shelf::place_of(&path).is_ok_and(|place| place.exists());
        is_there.then(|| Journal::open(&path)).transpose()
    }
}

/// The journals in a directory, and those that cannot be read.
fn list(dir: &Path) -> Result<(Vec<Journal>, Vec<Unreadable>)> {
    let what = || format!("cannot list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
        Err(e) => return Err(e).with_context(what),
    };
    let (mut all, mut unreadable) = (Vec::new(), Vec::new());
    for entry in entries {
        let path = entry.with_context(what)?.path();
        if path.extension().is_none_or(|e| e != "journal") {
            continue;
        }
        match Journal::open(&path) {
            Ok(journal) => all.push(journal),
            Err(e) => unreadable.extend(Unreadable::of(path, &e)),
        }
    }
    Ok((all, unreadable))
}

/// A journal that this Ferry cannot read: damaged, or another version's.
#[derive(Debug)]
pub struct Unreadable {
    /// The file.
    pub path: PathBuf,
    /// Whose it is, where that can be told.
    pub container: Option<String>,
    /// What is wrong with it.
    pub why: String,
}

impl Unreadable {
    /// `None` where there is no journal: its file was cut short by a crash before anything had begun,
    /// or has been removed.
    fn of(path: PathBuf, error: &anyhow::Error) -> Option<Unreadable> {
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Err(_) => b"\n".to_vec(),
        };
        let end = bytes.iter().position(|b| *b == b'\n')?;
        let record: Option<serde_json::Value> = serde_json::from_slice(&bytes[..end]).ok();
        let container = record.as_ref().and_then(|r| r.get("container")?.as_str());
        let container = container.map(str::to_owned);
        Some(Unreadable { path, container, why: error.root_cause().to_string() })
    }

    /// Whether it may be about a container, or bears the name of its migration.
    pub fn may_be_about(&self, id: &str) -> bool {
        self.container.as_ref().is_none_or(|container| container == id)
            || self.path.file_stem().is_some_and(|name| name == id)
    }

    /// For whoever needs what is in it.
    pub fn error(&self) -> anyhow::Error {
        let of = self.container.as_ref().map(|c| format!(" of {c}")).unwrap_or_default();
        advice(
            format!(
                "the journal {} of a migration{of} cannot be read: {}",
                self.path.display(),
                self.why
            ),
            "it says who owns the container: use the version of Ferry that has written it. If you \
             know that the container runs on one host only, and where, move the file away",
        )
    }
}

/// For a record: the version, and this run of the host.
pub fn stamp() -> (u32, String) {
    (VERSION, boot_id())
}

/// Unix time, for a record.
pub fn unix_time() -> u64 {
    now()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fuzz::Target;
    use crate::sys::process::{self, start_time, this_process};

    pub(crate) fn record(migration: &str) -> Record {
        let (version, boot) = stamp();
        Record {
            version,
            boot,
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
        let (all, unreadable) = Journal::all(dir.path()).unwrap();
        assert_eq!((all.len(), unreadable.len()), (1, 0));
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

    /// What a disk leaves of a line when the power goes is no line; the next one takes its place.
    #[test]
    fn a_torn_line_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        let at = journal.at as usize;
        assert_eq!(at % SLOT, 0);
        journal.write(State::Committed).unwrap();
        assert_eq!(at / SECTOR as usize, (journal.at as usize - 1) / SECTOR as usize);
        let whole = fs::read(journal.path()).unwrap();
        // Only its end has come to the disk, or something else.
        for from in 1..SLOT {
            for filling in [b' ', 0, 0xff] {
                let mut bytes = whole.clone();
                bytes[at..at + from].fill(filling);
                fs::write(journal.path(), &bytes).unwrap();
                let mut torn = Journal::open(journal.path()).unwrap();
                assert_eq!(torn.state(), State::Begun, "from {from}");
                torn.write(State::Aborted).unwrap();
                assert_eq!(Journal::open(journal.path()).unwrap().state(), State::Aborted);
            }
        }
        // Before a line that is whole there can be no torn one.
        journal.write(State::Finished).unwrap();
        let mut bytes = fs::read(journal.path()).unwrap();
        bytes[at] = b'x';
        fs::write(journal.path(), &bytes).unwrap();
        assert!(Journal::open(journal.path()).is_err());
    }

    /// Of whom it is known that it is about another container, it is not in the way.
    #[test]
    fn a_journal_that_cannot_be_read_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let root = Path::new(DEFAULT_ROOT);
        let path = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap().path;
        let text = fs::read_to_string(&path).unwrap();
        let refused = |container: &str| {
            let lock = Lock::take(dir.path(), root, container, "to b")
                .map(drop)
                .map_err(|e| e.to_string());
            assert_eq!(lock.is_err(), Journal::of(dir.path(), root, container).is_err());
            lock.err()
        };
        let later = text.replacen("\"version\":1", "\"version\":2", 1);
        let renamed = text.replacen("\"worker\"", "\"workers\"", 1);
        for changed in [later, renamed] {
            assert_ne!(changed, text);
            fs::write(&path, &changed).unwrap();
            let why = refused("web").unwrap();
            assert!(why.contains("cannot be read"), "{why}");
            assert!(why.contains("00112233aabbccdd"), "{why}");
            assert_eq!(refused("web2"), None);
        }
        fs::write(&path, "{\n").unwrap();
        assert!(refused("web2").unwrap().contains("cannot be read"));
        // A crash in the middle of making it: nothing had begun.
        for none in ["", "{\"version\":1,\"boot\":"] {
            fs::write(&path, none).unwrap();
            assert_eq!(refused("web"), None);
        }
        // The same from before there was a version.
        let before = text.replacen("\"version\":1,", "", 1);
        fs::write(&path, before).unwrap();
        assert_eq!(Journal::open(&path).unwrap().record.version, 0);
    }

    #[test]
    fn processes_are_told_apart() {
        let me = this_process();
        assert!(is_alive(me));
        assert!(!is_alive((me.0, me.1 + 1)));
        // Nobody has waited for it yet.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let started = start_time(pid).unwrap();
        let pidfd = process::pidfd_open(pid).unwrap();
        process::wait_readable(&[std::os::fd::AsFd::as_fd(&pidfd)], None).unwrap();
        assert_eq!(start_time(pid), Some(started));
        assert!(!is_alive((pid, started)));
        child.wait().unwrap();
    }

    #[test]
    fn nobody_outlives_a_reboot() {
        let mut record = record("00112233aabbccdd");
        record.init = Some(record.worker);
        assert!(record.same_boot() && record.worker_lives() && record.init_lives());
        record.boot = "00000000-0000-0000-0000-000000000000".into();
        assert!(!record.same_boot() && !record.worker_lives() && !record.init_lives());
    }

    /// Or the next state would be written behind it and never be found.
    #[test]
    fn what_is_no_blank_between_record_and_states_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        let mut bytes = fs::read(journal.path()).unwrap();
        let end = bytes.iter().position(|b| *b == b'\n').unwrap();
        bytes[end + 1] = b'x';
        fs::write(journal.path(), &bytes).unwrap();
        assert!(Journal::open(journal.path()).is_err());
    }

    /// What a bad disk makes of a journal is told, and never a state that was not reached.
    #[test]
    fn fuzz_journals() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        journal.note(State::Ready).unwrap();
        journal.note(State::Committed).unwrap();
        let (path, at) = (journal.path().to_owned(), journal.at as usize);
        let mut sample = fs::read(&path).unwrap();
        sample.truncate(at + SLOT);
        let target = Target::new("journals").sample(sample);
        let words = [&b"committed 1\n"[..], b"aborted 1\n", b"whole", b"finished", b"\"version\":"];
        target.words(&words).cost(8).room(2 * SIZE).run(|bytes| {
            fs::write(&path, bytes)?;
            let opened = Journal::open(&path);
            if let Err(e) = &opened {
                let _ = Unreadable::of(path.clone(), e).map(|u| u.error());
            }
            let mut journal = opened?;
            let before = journal.states().to_vec();
            journal.note(State::Aborted)?;
            let again = Journal::open(&path)?;
            assert_eq!(again.states()[..before.len()], before);
            assert_eq!(again.state(), State::Aborted);
            Ok(())
        });
    }
}
