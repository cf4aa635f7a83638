//! A directory tree copied while it is in use: a first round takes everything, each later one what
//! has changed since.
//!
//! A file has changed when its change time has (inode(7)), which nobody can set. Its contents are
//! then sent again, of large files only the blocks that differ from what was sent. A change time
//! that is hardly older than the look at it says nothing, as a second change may bear the same one,
//! and the first may not be over: such a file is looked at again. What is written through a shared
//! mapping changes no time for as long as the page stays dirty: such files are named by the caller
//! and compared anyway, as are those that are open for writing when all stands still.
//!
//! Everything must be on one file system: what is mounted below is refused, not left out.
//!
//! A tree may be a single file, as one that is bound to a place in the container by itself. The
//! container has that very file, whatever its name leads to by now: one that was replaced is refused.

mod moves;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3Builder;

use self::moves::Moves;
use super::changes::{ChangeListener, ChangedNames};
use super::contents::{self, GrainSums, Touched};
use super::directory;
use super::inodes::Inodes;
use super::ops::{self, FileStep, SINGLE};
use super::root::Root;
use super::tree::{FileEntry, FileKind};
use super::walk::{SeenFile, look_at, reach, shown, visit_one, walk};
use crate::sys::fanotify::{self, Handle};

/// Some file systems know seconds only, others the time of the last tick; and a write bears the time
/// at which it began.
pub(super) const WINDOW: Duration = Duration::from_millis(2100);

/// What a round found and sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FileRoundStats {
    /// Files looked at.
    pub entries: u64,
    /// Those that were new or had changed.
    pub changed: u64,
    /// Those that were gone.
    pub removed: u64,
    /// Bytes of contents read.
    pub read: u64,
    /// Bytes of contents sent.
    pub bytes: u64,
    /// Whether the kernel had told what to look at, so that not everything had to be.
    pub told: bool,
}

/// Follows some trees; see the module.
#[derive(Debug)]
pub struct Follower {
    trees: Vec<FollowedTree>,
    rounds: u32,
    /// So many of the first trees never change.
    fixed: usize,
    /// See [`WINDOW`].
    window: Duration,
    listener: Option<ChangeListener>,
}

#[derive(Debug)]
struct FollowedTree {
    root: Root,
    known: HashMap<Vec<u8>, KnownFile, Xxh3Builder>,
    /// Of large files, by inode: which inode of the copy, and what it holds.
    sums: HashMap<u64, (u64, GrainSums)>,
    /// Numbers given to inodes of the copy.
    groups: u64,
    /// Where the directories are whose handles the kernel tells.
    directories: HashMap<Handle, Vec<u8>, Xxh3Builder>,
    /// Files with several names. They may change under one that is not below the root, of which
    /// nothing is told: they are always looked at.
    several: BTreeSet<Vec<u8>>,
    /// Something of it the kernel cannot tell about.
    blind: bool,
    /// See [`moves::numbered`].
    numbered: bool,
}

impl FollowedTree {
    fn new(root: Root) -> FollowedTree {
        FollowedTree {
            numbered: moves::numbered(&root.path()),
            root,
            known: HashMap::default(),
            sums: HashMap::new(),
            groups: 0,
            directories: HashMap::default(),
            several: BTreeSet::new(),
            blind: false,
        }
    }

    /// Tells whether this is another directory than the one that was known there; from now on it is.
    fn is_new_directory(&mut self, path: &[u8], full: &Path) -> bool {
        match fanotify::handle_of(full) {
            Ok(handle) => {
                let before = self.directories.get(&handle).is_some_and(|before| before == path);
                if !before {
                    self.directories.insert(handle, path.to_vec());
                }
                !before
            }
            Err(e) => {
                self.blind |= e.kind() != io::ErrorKind::NotFound;
                true
            }
        }
    }

    /// Tells whether the copy has a directory there, and on the whole way to it.
    fn has_directory(&self, path: &[u8]) -> bool {
        let is_one = |p: &[u8]| self.known.get(p).is_some_and(|known| known.kind == libc::S_IFDIR);
        is_one(path) && (path.is_empty() || self.has_directory(parent(path)))
    }

    /// Under which names this was known.
    fn names_of(&self, seen: &SeenFile) -> Vec<Vec<u8>> {
        let same = |known: &KnownFile| known.ino == seen.ino && known.kind == seen.kind();
        let names = self.known.iter().filter(|(_, known)| same(known));
        names.map(|(path, _)| path.clone()).collect()
    }
}

/// What the other side has at a path.
#[derive(Clone, Copy, Debug)]
struct KnownFile {
    kind: u32,
    ino: u64,
    /// Change time and size when it was sent; none if that is not certain.
    stamp: Option<(i64, i64, u64)>,
    /// Which inode of the copy it names.
    group: u64,
    /// Last round in which it was there.
    round: u32,
}

impl KnownFile {
    /// Tells whether it is the same file, as far as can be seen.
    fn is(&self, seen: &SeenFile) -> bool {
        self.kind == seen.kind() && (self.ino == seen.ino || seen.is_dir())
    }
}

impl Follower {
    /// Nothing is known of these trees. With `listen` the kernel is asked to tell what changes, if
    /// it can; without, every round looks at everything.
    pub fn new(roots: Vec<Root>, listen: bool) -> Follower {
        Follower::with_window(roots, listen, WINDOW)
    }

    /// The first so many trees are copied in the first round, and not looked at again.
    pub fn with_fixed(mut self, fixed: usize) -> Follower {
        self.fixed = fixed;
        self
    }

    /// With another [`WINDOW`].
    pub(super) fn with_window(roots: Vec<Root>, listen: bool, window: Duration) -> Follower {
        let paths: Vec<PathBuf> = roots.iter().map(Root::path).collect();
        let listener = listen.then(|| ChangeListener::start(&paths)).and_then(|started| {
            started.inspect_err(|e| tracing::debug!("changes of files are looked for: {e:#}")).ok()
        });
        let trees = roots.into_iter().map(FollowedTree::new).collect();
        Follower { trees, rounds: 0, fixed: 0, window, listener }
    }

    #[cfg(test)]
    pub(super) fn known_for_test(
        &mut self,
        tree: usize,
        path: &[u8],
    ) -> &mut Option<(i64, i64, u64)> {
        &mut self.trees[tree].known.get_mut(path).expect("it is known").stamp
    }

    /// Sends what has changed since the last round, and of the files in `mapped` what differs.
    /// `last`: nothing will change any more. `went` hears now and then how many bytes have gone.
    ///
    /// # Errors
    /// When something cannot be read, or `out` fails.
    pub fn round(
        &mut self,
        mapped: &Inodes,
        last: bool,
        out: &mut impl Write,
        went: &mut dyn FnMut(u64),
    ) -> Result<FileRoundStats> {
        self.rounds += 1;
        // What was heard before the first look at all is among what is seen then.
        let told =
            self.listener.as_ref().and_then(ChangeListener::take).filter(|_| self.rounds > 1);
        let mut stats = FileRoundStats { told: told.is_some(), ..FileRoundStats::default() };
        let skipped = if self.rounds > 1 { self.fixed } else { 0 };
        for (number, tree) in self.trees.iter_mut().enumerate().skip(skipped) {
            ops::write(out, &FileStep::Tree(number as u32))?;
            let mut look = Look {
                round: self.rounds,
                top: Rc::new(tree.root.top().with_context(|| replaced(&tree.root))?),
                mapped,
                out,
                went,
                stats: &mut stats,
                names: HashMap::new(),
                window: self.window,
                listener: self.listener.as_ref(),
                last,
                partial: told.is_some() && !tree.blind,
                touched: BTreeSet::new(),
                described: HashSet::new(),
                gone: Vec::new(),
                emptied: HashSet::new(),
                asked: HashSet::new(),
                summed: HashSet::new(),
                moves: Moves::default(),
            };

            if let Some(name) = tree.root.name().map(OsStr::to_owned) {
                look.single(tree, &name)?;
                continue;
            }
            match told.as_ref().filter(|_| look.partial) {
                Some(told) => look.some(tree, told)?,
                None => {
                    look.stats.told = false;
                    look.all(tree)?;
                }
            }
        }

        ops::write(out, &FileStep::Round(self.rounds, last))?;
        out.flush()?;
        Ok(stats)
    }
}

/// One round over one tree.
struct Look<'a, W> {
    round: u32,
    top: Rc<File>,
    mapped: &'a Inodes,
    out: &'a mut W,
    went: &'a mut dyn FnMut(u64),
    stats: &'a mut FileRoundStats,
    /// Files with several names: the first one seen, and its number in the copy.
    names: HashMap<u64, (Vec<u8>, u64)>,
    window: Duration,
    listener: Option<&'a ChangeListener>,
    last: bool,
    /// Whether only what may have changed is looked at.
    partial: bool,
    /// Directories in which the copy was changed, and those whose times were sent afterwards.
    touched: BTreeSet<Vec<u8>>,
    described: HashSet<Vec<u8>>,
    /// What was known and is not there any more.
    gone: Vec<Vec<u8>>,
    /// What was a directory, and is another one now, or none: what was known below is gone, unless
    /// it was seen in this round.
    emptied: HashSet<Vec<u8>>,
    /// Names that were looked at by themselves.
    asked: HashSet<Vec<u8>>,
    /// Large files that were sent.
    summed: HashSet<u64>,
    /// Directories that have got other names.
    moves: Moves,
}

/// What a look has found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FoundFile {
    Gone,
    /// What was there before, if something was.
    There,
    /// A directory of which nobody knows what is in it.
    NewDirectory,
}

impl<W: Write> Look<'_, W> {
    /// Looks at a tree that is one file.
    fn single(&mut self, tree: &mut FollowedTree, name: &OsStr) -> Result<()> {
        let (root, top) = (tree.root.clone(), self.top.clone());
        let seen = look_at(top.as_fd(), &CString::new(name.as_bytes())?)?;
        let seen = seen.filter(|seen| seen.is_file() && (seen.device, seen.ino) == root.inode());
        let found = seen.map(|seen| self.one(tree, SINGLE, &reach(&*top, name), &seen));
        match found.transpose().with_context(|| root.place().display().to_string())? {
            Some(FoundFile::There | FoundFile::NewDirectory) => Ok(()),
            Some(FoundFile::Gone) | None => bail!(replaced(&root)),
        }
    }

    /// Looks at everything.
    fn all(&mut self, tree: &mut FollowedTree) -> Result<()> {
        let root = tree.root.path();
        tree.directories.clear();
        walk(&root, &mut |path, full, seen| {
            Ok(self.one(tree, path, full, seen)? != FoundFile::Gone)
        })?;
        let round = self.round;
        let gone = tree.known.iter().filter(|(_, k)| k.round != round).map(|(p, _)| p.clone());
        self.gone = gone.collect();
        self.end(tree)
    }

    /// Looks at what the kernel has told of, and at what it does not tell of.
    fn some(&mut self, tree: &mut FollowedTree, told: &ChangedNames) -> Result<()> {
        let mut paths = tree.several.clone();
        // One that had a second name for a while may have changed under that, of which nothing is told
        // any more when it is gone.
        let files = told.iter().filter(|(_, name)| name.is_empty());
        let mount = File::open(reach(&*self.top, OsStr::new(".")))?;
        let inodes = files.map(|(file, _)| fanotify::inode_of(&mount, file));
        let Ok(inodes) = inodes.collect::<io::Result<Vec<_>>>() else {
            (self.partial, self.stats.told) = (false, false);
            return self.all(tree);
        };

        for (directory, name) in told.iter().filter(|(_, name)| !name.is_empty()) {
            let Some(at) = tree.directories.get(directory) else { continue };
            if name != b"." {
                let slash = if at.is_empty() { &b""[..] } else { b"/" };
                paths.insert([at, slash, name].concat());
            }
            paths.insert(at.clone());
        }

        let device = self.top.metadata()?.dev();
        let mut mapped: Vec<u64> =
            self.mapped.iter().filter(|(d, _)| *d == device).map(|(_, ino)| *ino).collect();
        mapped.extend(inodes.into_iter().flatten());
        mapped.sort_unstable();
        if !mapped.is_empty() {
            let known = tree.known.iter().filter(|(_, k)| mapped.binary_search(&k.ino).is_ok());
            paths.extend(known.map(|(path, _)| path.clone()));
        }

        for path in &paths {
            self.again(tree, path)?;
        }
        if !self.emptied.is_empty() {
            let (round, emptied) = (self.round, std::mem::take(&mut self.emptied));
            let below = |path: &[u8]| {
                let slashes = path.iter().enumerate().filter(|(_, b)| **b == b'/');
                slashes.into_iter().any(|(i, _)| emptied.contains(&path[..i]))
            };
            let gone = tree.known.iter().filter(|(path, k)| k.round != round && below(path));
            self.gone.extend(gone.map(|(path, _)| path.clone()));
        }

        self.end(tree)
    }

    /// Looks at what may have changed under this name; if that is a directory that was not known, at
    /// all that is in it.
    fn again(&mut self, tree: &mut FollowedTree, path: &[u8]) -> Result<()> {
        let seen = tree.known.get(path).is_some_and(|known| known.round == self.round);
        // Where the copy has no directory, nothing can be put; if there is one here by now, that was
        // told, and the next round will see.
        if seen || !tree.has_directory(parent(path)) || !self.asked.insert(path.to_vec()) {
            return Ok(());
        }

        let before = tree.known.get(path).map(|known| known.kind);
        let top = self.top.clone();
        let mut found = FoundFile::Gone;
        visit_one(&top, path, &mut |at, full, seen| {
            let what = self.one(tree, at, full, seen)?;
            if at == path {
                found = what;
                return Ok(what == FoundFile::NewDirectory);
            }
            Ok(what != FoundFile::Gone)
        })?;

        let directory = before == Some(libc::S_IFDIR);
        let still = tree.known.get(path).is_some_and(|known| known.kind == libc::S_IFDIR);
        if directory && (found != FoundFile::There || !still) {
            self.emptied.insert(path.to_vec());
        }

        if before.is_some() && found == FoundFile::Gone {
            self.gone.push(path.to_vec());
        }

        Ok(())
    }

    /// Takes away what is gone, and says last what is to be said of directories.
    fn end(&mut self, tree: &mut FollowedTree) -> Result<()> {
        self.nowhere(tree);
        let mut gone = std::mem::take(&mut self.gone);
        gone.sort_unstable();
        gone.dedup();
        let mut last: Option<&[u8]> = None;
        let mut directories = false;
        for path in &gone {
            tree.several.remove(path);
            if let Some(known) = tree.known.remove(path) {
                directories |= known.kind == libc::S_IFDIR;
                let sums = tree.sums.get(&known.ino);
                // It may have got another name.
                if sums.is_some_and(|(group, _)| *group == known.group)
                    && !self.summed.contains(&known.ino)
                {
                    tree.sums.remove(&known.ino);
                }
            }

            self.stats.removed += 1;
            // With its directory.
            let inside =
                last.is_some_and(|l| path.starts_with(l) && path.get(l.len()) == Some(&b'/'));
            if !inside {
                ops::write(self.out, &FileStep::Remove(path.clone()))?;
                self.touch(path);
                last = Some(path);
            }
        }

        if directories {
            let known = &tree.known;
            tree.directories.retain(|_, path| known.contains_key(path));
        }

        // A step in a directory changes its time over there, whether or not it has changed here.
        for path in std::mem::take(&mut self.touched) {
            // It may have become one since it was looked at.
            if self.described.contains(&path) || !tree.has_directory(&path) {
                continue;
            }
            match describe_directory(&self.top, path) {
                Ok(Some(entry)) => ops::write(self.out, &FileStep::Change(entry, false))?,
                Ok(None) => {}
                Err(e) if vanished(&e) => {}
                Err(e) => return Err(e),
            }
        }

        Ok(())
    }

    fn touch(&mut self, path: &[u8]) {
        self.touched.insert(parent(path).to_vec());
    }

    /// Returns what there is to say of what was seen there.
    fn one(
        &mut self,
        tree: &mut FollowedTree,
        path: &[u8],
        full: &Path,
        seen: &SeenFile,
    ) -> Result<FoundFile> {
        self.stats.entries += 1;
        let several = !seen.is_dir() && seen.names > 1;
        let compared = !self.mapped.is_empty() && self.mapped.contains(&(seen.device, seen.ino));
        let known = tree.known.get(path);
        let another = known.is_none_or(|k| k.kind != seen.kind() || k.ino != seen.ino);
        if another {
            self.meet(tree, path, seen)?;
        }

        let heard = self.listener.is_some() && seen.is_dir();
        let found = if heard && (tree.is_new_directory(path, full) || another) {
            FoundFile::NewDirectory
        } else {
            FoundFile::There
        };

        // Most of all files, most of the time.
        if let Some(known) = tree.known.get_mut(path)
            && known.is(seen)
            && known.stamp == Some((seen.changed.0, seen.changed.1, seen.size))
            && !compared
            && !several
        {
            known.round = self.round;
            return Ok(found);
        }

        match self.one_that_may_have_changed(tree, path, full, seen, (several, compared)) {
            // Gone, or something else, since it was looked at: the next round will see.
            Err(e) if vanished(&e) => Ok(FoundFile::Gone),
            Err(e) => Err(e.context(format!("cannot read {}", shown(path)))),
            Ok(()) => Ok(found),
        }
    }

    fn one_that_may_have_changed(
        &mut self,
        tree: &mut FollowedTree,
        path: &[u8],
        full: &Path,
        seen: &SeenFile,
        (several, compared): (bool, bool),
    ) -> Result<()> {
        let stamp = stamp(seen, self.window);
        let known = tree.known.get(path).copied().filter(|k| k.is(seen));

        // What cannot be changed but only made anew may have the number of the one before.
        let changeable = matches!(seen.kind(), libc::S_IFREG | libc::S_IFDIR);
        let mut known = known.filter(|k| changeable || k.stamp.is_some() && k.stamp == stamp);
        if known.is_none() && several && self.partial {
            // Those that had one name until now were not looked at.
            for other in tree.names_of(seen) {
                self.again(tree, &other)?;
            }
        }

        if known.is_none() && !several && seen.kind() == libc::S_IFREG {
            known = self.moved(tree, path, full, seen)?;
        }
        let group = known.map_or_else(
            || {
                tree.groups += 1;
                tree.groups
            },
            |k| k.group,
        );

        let mut now =
            KnownFile { kind: seen.kind(), ino: seen.ino, stamp, group, round: self.round };
        if several {
            tree.several.insert(path.to_vec());
        } else {
            tree.several.remove(path);
        }

        let first = self.names.get(&seen.ino).filter(|_| several).cloned();
        if let Some((name, group)) = first {
            // Another name of what has been looked at: nothing to say if it is one over there, too.
            if known.is_none_or(|k| k.group != group) {
                self.link(path, name, full, seen)?;
                now.group = group;
            }
            tree.known.insert(path.to_vec(), now);
            return Ok(());
        }

        let same = known.is_some_and(|k| k.stamp.is_some() && k.stamp == stamp);
        if !same || compared {
            let meta = look(full, seen)?;
            if !self.send(tree, path, full, &meta, known.is_some(), group)? {
                now.stamp = None;
            }
            self.stats.changed += 1;
        }

        if several {
            self.names.insert(seen.ino, (path.to_vec(), group));
        }
        tree.known.insert(path.to_vec(), now);

        Ok(())
    }

    /// A large file that was known under a name that it does not have any more: over there it gets
    /// the new one, and loses the other at the end of the round.
    fn moved(
        &mut self,
        tree: &FollowedTree,
        path: &[u8],
        full: &Path,
        seen: &SeenFile,
    ) -> Result<Option<KnownFile>> {
        let Some((group, _)) = tree.sums.get(&seen.ino) else { return Ok(None) };
        let before = tree.names_of(seen).into_iter().find(|other| {
            other != path
                && tree.has_directory(parent(other))
                && tree.known.get(other).is_some_and(|k| k.group == *group)
        });
        let Some(before) = before else { return Ok(None) };
        let known = tree.known.get(&before).copied();
        self.link(path, before, full, seen)?;
        Ok(known)
    }

    fn link(&mut self, path: &[u8], to: Vec<u8>, full: &Path, seen: &SeenFile) -> Result<()> {
        let meta = look(full, seen)?;
        self.make(FileEntry::of(path.to_vec(), FileKind::Link(to), &meta, full, false)?)
    }

    fn make(&mut self, entry: FileEntry) -> Result<()> {
        self.touch(&entry.path);
        ops::write(self.out, &FileStep::Make(entry))
    }

    /// Says all there is to say about a file; whether what was read is certainly what it was when
    /// it was looked at, or later.
    fn send(
        &mut self,
        tree: &mut FollowedTree,
        path: &[u8],
        full: &Path,
        meta: &Metadata,
        there: bool,
        group: u64,
    ) -> Result<bool> {
        let kind = meta.file_type();
        if kind.is_file() {
            return self.send_file(tree, path, full, meta, there, group);
        }
        let described = if kind.is_dir() {
            self.described.insert(path.to_vec());
            FileKind::Directory
        } else if kind.is_symlink() {
            FileKind::Symlink(target(full)?.into_os_string().into_vec())
        } else if kind.is_char_device() {
            FileKind::Character(meta.rdev())
        } else if kind.is_block_device() {
            FileKind::Block(meta.rdev())
        } else if kind.is_fifo() {
            FileKind::Fifo
        } else {
            FileKind::Socket
        };

        let entry = FileEntry::of(path.to_vec(), described, meta, full, false)?;
        // The root is there from the beginning.
        if there || path.is_empty() {
            ops::write(self.out, &FileStep::Change(entry, false))?;
        } else {
            self.make(entry)?;
        }

        Ok(true)
    }

    fn send_file(
        &mut self,
        tree: &mut FollowedTree,
        path: &[u8],
        full: &Path,
        meta: &Metadata,
        there: bool,
        group: u64,
    ) -> Result<bool> {
        let file = directory::open_regular(full)?;
        let now = file.metadata()?;
        if now.ino() != meta.ino() {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        }

        let size = now.size();
        let entry = FileEntry::of(path.to_vec(), FileKind::File(size), &now, full, false)?;

        // Those of another inode of the copy say nothing of this one.
        let sums = tree.sums.remove(&meta.ino()).filter(|(of, _)| there && *of == group);
        let sums = sums.map(|(_, sums)| sums);
        if there {
            ops::write(self.out, &FileStep::Change(entry, sums.is_none()))?;
        } else {
            self.make(entry)?;
        }

        let (bytes, went) = (&mut self.stats.bytes, &mut *self.went);
        let mut went = |sent| {
            *bytes += sent;
            went(sent);
        };
        let written = match self.listener {
            Some(listener) => listener.written(&file, self.last)?,
            None => None,
        };

        let written = written.as_ref().map(|w| w as &dyn Touched);
        let sent = contents::send(&file, size, sums, written, self.out, &mut went)?;
        self.stats.read += sent.read;
        if let Some(sums) = sent.sums {
            tree.sums.insert(meta.ino(), (group, sums));
            self.summed.insert(meta.ino());
        }

        Ok(sent.certain)
    }
}

/// Returns why a single file cannot be followed any more.
fn replaced(root: &Root) -> String {
    let place = root.place().display();
    format!("{place} was replaced: the container still has the file that was there before")
}

/// The directory that a path is in; the root is in itself.
fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|b| *b == b'/').map_or(&b""[..], |i| &path[..i])
}

/// Returns what there is to say of a directory below `top`, if it is one.
fn describe_directory(top: &File, path: Vec<u8>) -> Result<Option<FileEntry>> {
    let held;
    let full = if path.is_empty() {
        reach(top, OsStr::new("."))
    } else {
        let (parent, name) = super::walk::place(top, &path)?;
        held = parent;
        reach(&held, name.as_os_str())
    };
    let meta = fs::symlink_metadata(&full)?;
    if !meta.is_dir() {
        return Ok(None);
    }
    Ok(Some(FileEntry::of(path, FileKind::Directory, &meta, &full, false)?))
}

/// A closer look at what was seen.
fn look(full: &Path, seen: &SeenFile) -> Result<Metadata> {
    let meta = fs::symlink_metadata(full)?;
    // A directory is what its name leads to; what is in it is looked at by name.
    let same =
        meta.mode() & libc::S_IFMT == seen.kind() && (meta.ino() == seen.ino || seen.is_dir());
    if same { Ok(meta) } else { Err(io::Error::from(io::ErrorKind::NotFound).into()) }
}

/// Change time and size, if a later change would certainly show in them.
fn stamp(seen: &SeenFile, window: Duration) -> Option<(i64, i64, u64)> {
    let changed = Duration::new(seen.changed.0.try_into().ok()?, seen.changed.1 as u32);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    (changed + window < now).then_some((seen.changed.0, seen.changed.1, seen.size))
}

/// Returns where a symbolic link leads.
fn target(link: &Path) -> io::Result<PathBuf> {
    fs::read_link(link).map_err(|e| match e.raw_os_error() {
        // It is no link any more.
        Some(libc::EINVAL) => io::ErrorKind::NotFound.into(),
        _ => e,
    })
}

fn vanished(e: &anyhow::Error) -> bool {
    let number = e.downcast_ref::<io::Error>().map(|e| match e.kind() {
        io::ErrorKind::NotFound => libc::ENOENT,
        _ => e.raw_os_error().unwrap_or(0),
    });
    let number = number.or(e.downcast_ref::<Errno>().map(|e| *e as i32));
    number.is_some_and(|n| matches!(n, libc::ENOENT | libc::ELOOP | libc::ENOTDIR))
}
