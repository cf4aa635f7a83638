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
pub(crate) mod forward_role;
pub(crate) mod holder;
pub(crate) mod lock;
pub(crate) mod shelf;
pub(crate) mod workdir;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use self::away::canonical;
use self::forward_role::ForwardRecord;
pub use self::lock::{HeldJournal, Lock};
use self::workdir::WorkPath;
use crate::engine::papers::Made;
use crate::files::logs::Logs;
use crate::files::place::Placing;
use crate::oci::cgroup::Cgroup;
use crate::oci::container_id::ContainerId;
use crate::oci::runtime::DEFAULT_ROOT;
use crate::problem::advice;
use crate::sys::fault;
use crate::sys::process::{ProcessId, boot_id};
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
    /// Destination: it was to run, and CRIU ended before anything of it did. Nothing of it will.
    Unstarted,
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
            State::Unstarted => "unstarted",
            State::Whole => "whole",
            State::Finished => "finished",
            State::Aborted => "aborted",
        }
    }

    /// Tells whether nothing is left to be done.
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
    pub container: ContainerId,
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
    /// The container's init process.
    pub init: Option<ProcessId>,
    /// The network namespace's path.
    pub network_path: Option<PathBuf>,
    /// Device and inode of that namespace, where it was there when the migration began.
    pub network_identity: Option<(u64, u64)>,
    /// What of an engine's there is to undo, if the container is an engine's.
    #[serde(default)]
    pub engine: Option<Made>,
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
    pub forward: Option<ForwardRecord>,
    /// What has been copied from here and is to be removed when it runs there (source only).
    #[serde(default)]
    pub remove: Vec<PathBuf>,
    /// The overlay that is mounted of it (source only).
    #[serde(default)]
    pub unmount: Option<PathBuf>,
    /// The private directory with sockets and images.
    pub work: WorkPath,
    /// Process that works on it.
    pub worker: ProcessId,
    /// Unix time.
    pub begun: u64,
}

impl Record {
    /// Tells whether this host has not been started again since: process numbers, inodes of namespaces and
    /// names of control groups mean what they meant then.
    pub fn same_boot(&self) -> bool {
        let now = boot_id();
        self.boot.is_empty() || now.is_empty() || self.boot == now
    }

    /// Tells whether an operator means it: by an ID, or as the container's engine calls that.
    pub fn is_meant_by(&self, word: &str) -> bool {
        self.container == *word
            || self.migration == word
            || self.engine.as_ref().is_some_and(|engine| engine.is_meant_by(word))
    }

    /// Tells whether the process that works on it is there; on a destination, or one that goes on in its place.
    pub fn worker_lives(&self) -> bool {
        let guarded =
            || self.role == Role::Destination && self.guards().into_iter().any(ProcessId::is_alive);
        self.same_boot() && (self.worker.is_alive() || guarded())
    }

    /// Returns who goes on if that is killed, in that order.
    pub fn guards(&self) -> Vec<ProcessId> {
        let text = fs::read_to_string(self.work.guards()).unwrap_or_default();
        text.lines().filter_map(ProcessId::read).collect()
    }

    /// Tells whether the container's init process is there, as far as the record knows it.
    pub fn init_lives(&self) -> bool {
        self.same_boot() && self.init.is_some_and(ProcessId::is_alive)
    }

    /// By which ID the runtime here knows the container: the destination's engine may have given it
    /// another one than that by which the migration goes.
    pub fn id_here(&self) -> ContainerId {
        let other = self.engine.as_ref().filter(|_| self.role == Role::Destination);
        other.and_then(Made::id_here).unwrap_or_else(|| self.container.clone())
    }

    /// Tells whether it is about this container.
    pub fn concerns(&self, root: &Path, container: &str) -> bool {
        let its_root = self.root.as_deref().unwrap_or(Path::new(DEFAULT_ROOT));
        self.container == *container && canonical(its_root) == canonical(root)
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
    /// Where the last state's line is.
    last: u64,
    /// Of whoever has made it, for his whole life: see [`Journal::hold`].
    _held: Option<HeldJournal>,
}

/// The line of [`Journal::note_told`].
const TOLD: &str = "told";

/// A journal's lines.
#[derive(Debug, Default)]
struct JournalLines {
    states: Vec<(State, u64)>,
    told: bool,
    /// Where the next one goes.
    at: u64,
    /// Where that of the last state is.
    last: u64,
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
fn read_lines(bytes: &[u8], record_end: u64) -> Result<JournalLines> {
    let mut found =
        JournalLines { at: record_end.next_multiple_of(SECTOR), ..JournalLines::default() };
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
            Some(state) => {
                found.states.push((state, time));
                found.last = place - line.len() as u64;
            }
            None => found.told = true,
        }

        found.at = place.next_multiple_of(SLOT as u64);
        end = place;
    }

    // The next state would be lost behind what is no blank; and what is torn is no longer than a slot: that
    // state would bring to light what stands behind it.
    let (before, behind) = (end as usize..found.at as usize, found.at as usize + SLOT..bytes.len());
    if [before, behind].into_iter().any(|part| bytes.get(part).is_some_and(|part| !blank(part))) {
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
        let journal = Journal::fill(file, &path, &bytes, (record, at));

        if journal.is_err() {
            // Nothing has begun, and nobody is to take what is there for the beginning of something.
            let _ = fs::remove_file(&path);
        }

        journal
    }

    /// Writes a new one's record, which ends before `at`, and that it has begun.
    fn fill(file: File, path: &Path, bytes: &[u8], (record, at): (Record, u64)) -> Result<Journal> {
        let what = || format!("cannot write the journal {}", path.display());
        // Before anybody can read it.
        let held = HeldJournal::wait(path)?;
        fault::point("journal.record").with_context(what)?;
        file.write_all_at(bytes, 0).with_context(what)?;
        fault::point("journal.record-sync").with_context(what)?;
        file.sync_all().with_context(what)?;
        fault::point("journal.directory-sync").with_context(what)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        File::open(dir).and_then(|dir| dir.sync_all()).with_context(what)?;
        let (path, states, told, _held) = (path.to_owned(), Vec::new(), false, Some(held));
        let mut journal = Journal { file, path, record, states, told, at, last: at, _held };
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
        let lines = read_lines(&bytes, end as u64 + 1).with_context(what)?;
        let JournalLines { states, told, at, last } = lines;
        Ok(Journal { file, path, record, states, told, at, last, _held: None })
    }

    /// The state reached.
    pub fn state(&self) -> State {
        self.states.last().map_or(State::Begun, |s| s.0)
    }

    /// Tells whether the line has ever been written that hands the container over; whatever came after it.
    pub fn was_committed(&self) -> bool {
        self.states.iter().any(|s| s.0 == State::Committed)
    }

    /// Whether it may have run here: it was handed over, and is not known to have been kept from running.
    pub fn may_have_run(&self) -> bool {
        let last = |state| self.states.iter().rposition(|s| s.0 == state);
        last(State::Committed) > last(State::Unstarted)
    }

    /// The states in order, with unix times.
    pub fn states(&self) -> &[(State, u64)] {
        &self.states
    }

    /// Returns where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a state down without waiting for the disk: a crash of this process does not lose it,
    /// a crash of the host may.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note(&mut self, state: State) -> Result<()> {
        let (time, at) = (now(), self.at);
        self.put_line(state.name(), time)?;
        self.states.push((state, time));
        self.last = at;
        Ok(())
    }

    fn put_line(&mut self, name: &str, time: u64) -> Result<()> {
        let at = self.at;
        let line = format!("{:<1$}\n", format!("{name} {time}"), SLOT - 1);
        self.put(&line, at)?;
        self.at += line.len() as u64;
        Ok(())
    }

    fn put(&self, line: &str, at: u64) -> Result<()> {
        if at as usize + line.len() > SIZE {
            bail!("the journal {} is full", self.path.display());
        }
        let what = || format!("cannot write the journal {}", self.path.display());
        let name = line.split(' ').next().unwrap_or_default();
        fault::point(&format!("journal.{name}")).with_context(what)?;
        self.file.write_all_at(line.as_bytes(), at).with_context(what)
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

    /// Tells whether the other host is known to know how it has ended.
    pub fn is_told(&self) -> bool {
        self.told
    }

    /// Tells whether the other host may still have to learn how it has ended: of a container that stayed, a
    /// copy may be held there; of one that came, the source may ask.
    pub fn is_untold(&self) -> bool {
        let matters = matches!(
            (self.record.role, self.state()),
            (Role::Source, State::Aborted) | (Role::Destination, State::Finished)
        );
        matters && !self.told
    }

    /// The same as [`Journal::sync`], for another thread.
    pub fn syncing(&self) -> impl Fn() -> Result<()> + Clone + Send + 'static {
        let (file, path) =
            (self.file.try_clone().map(Arc::new).map_err(Arc::new), self.path.clone());
        let point = format!("journal.{}-sync", self.state().name());
        move || {
            let what = || format!("cannot write the journal {}", path.display());
            let file = file.as_ref().map_err(|e| anyhow!("{e}"))?;
            fault::point(&point).with_context(what)?;
            file.sync_data().with_context(what)
        }
    }

    /// Makes what was noted durable.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> Result<()> {
        let what = || format!("cannot write the journal {}", self.path.display());
        fault::point(&format!("journal.{}-sync", self.state().name())).with_context(what)?;
        self.file.sync_data().with_context(what)
    }

    /// Writes a state down; when this returns it survives a crash of the host. That which was written last
    /// is written over: a disk that has failed to take it once does not tell a second time (fsync(2)).
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&mut self, state: State) -> Result<()> {
        if let Some((last, time)) = self.states.last().filter(|(last, _)| *last == state) {
            let line = format!("{:<1$}\n", format!("{} {time}", last.name()), SLOT - 1);
            self.put(&line, self.last)?;
        } else {
            self.note(state)?;
        }
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
        match is_there.then(|| Journal::open(&path)) {
            // One that was cut short before anything had begun is none.
            Some(Err(e)) if path.exists() && Unreadable::of(path, &e).is_none() => Ok(None),
            found => found.transpose(),
        }
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

    /// Tells whether it may be about a container, or bears the name of its migration.
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
pub(crate) mod tests;
