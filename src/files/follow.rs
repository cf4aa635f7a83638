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

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3Builder, xxh3_128};

use super::ops::{self, BLOCK, Step};
use super::tree::{self, Entry, Kind, extents};
use crate::sys::process::proc_text;

/// Files above this size are sent by the blocks that differ.
const LARGE: u64 = 1 << 20;
/// Some file systems know seconds only, others the time of the last tick; and a write bears the time
/// at which it began.
const WINDOW: Duration = Duration::from_millis(2100);

/// Files by device and inode.
pub type Inodes = HashSet<(u64, u64)>;

/// What a tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Files of every kind.
    pub entries: u64,
}

/// What a round found and sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RoundStats {
    /// Files looked at.
    pub entries: u64,
    /// Those that were new or had changed.
    pub changed: u64,
    /// Those that were gone.
    pub removed: u64,
    /// Bytes of contents sent.
    pub bytes: u64,
}

/// Follows some trees; see the module.
#[derive(Debug)]
pub struct Follower {
    trees: Vec<Tree>,
    rounds: u32,
    /// See [`WINDOW`].
    window: Duration,
}

#[derive(Debug)]
struct Tree {
    root: PathBuf,
    known: HashMap<Vec<u8>, Known, Xxh3Builder>,
    /// Of large files, by inode: which inode of the copy, and a sum of each block as it is there.
    blocks: HashMap<u64, (u64, Vec<u128>)>,
    /// Numbers given to inodes of the copy.
    groups: u64,
}

/// What the other side has at a path.
#[derive(Clone, Copy, Debug)]
struct Known {
    kind: u32,
    ino: u64,
    /// Change time and size when it was sent; none if that is not certain.
    stamp: Option<(i64, i64, u64)>,
    /// Which inode of the copy it names.
    group: u64,
    /// Last round in which it was there.
    round: u32,
}

/// Counts what a tree holds.
///
/// # Errors
/// When it cannot be read.
pub fn measure(root: &Path) -> Result<Size> {
    let mut size = Size::default();
    walk(root, &mut |_, _, seen| {
        size.entries += 1;
        let on_disk = seen.blocks * 512;
        // Compressed, it takes less room here than it may take there; far less, it is sparse.
        let all = if seen.size / 8 <= on_disk { seen.size.max(on_disk) } else { on_disk };
        size.bytes += all;
        Ok(true)
    })?;
    Ok(size)
}

/// What a look at a file tells, and no more of it than a round needs of files that have not changed.
#[derive(Clone, Copy, Debug)]
struct Seen {
    device: u64,
    ino: u64,
    mode: u32,
    names: u64,
    size: u64,
    blocks: u64,
    changed: (i64, i64),
}

impl Known {
    /// Whether it is the same file, as far as can be seen.
    fn is(&self, seen: &Seen) -> bool {
        self.kind == seen.kind() && (self.ino == seen.ino || seen.is_dir())
    }
}

impl Seen {
    fn new(stat: &FileStat) -> Seen {
        Seen {
            device: stat.st_dev,
            ino: stat.st_ino,
            mode: stat.st_mode,
            names: stat.st_nlink,
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }
}

type Visit<'a> = dyn FnMut(&[u8], &Path, &Seen) -> Result<bool> + 'a;

/// Calls `visit` with each file's path below the root, a path by which it can be reached, and what it
/// is; directories before what is in them, if it says so; names in order. What is gone when it is
/// looked at was never there.
///
/// The container may put a symbolic link in the place of any directory at any time: each is reached
/// by a descriptor of the one that it is in, and never by its path.
fn walk(root: &Path, visit: &mut Visit) -> Result<()> {
    /// The path grows and shrinks in place: there may be very many files.
    struct Walk<'a, 'b> {
        path: Vec<u8>,
        device: u64,
        visit: &'a mut Visit<'b>,
    }
    impl Walk<'_, '_> {
        fn level(&mut self, mut dir: Dir) -> Result<()> {
            let found = look_into(&mut dir).with_context(|| shown(&self.path))?;
            for (name, seen) in found {
                let length = self.path.len();
                if length > 0 {
                    self.path.push(b'/');
                }
                self.path.extend(name.as_bytes());
                if seen.device != self.device {
                    bail!(
                        "{} is on another file system and cannot be copied with the rest: bind it \
                         by itself, or take it away",
                        shown(&self.path)
                    );
                }
                let reach = reach(&dir, OsStr::from_bytes(name.as_bytes()));
                if (self.visit)(&self.path, &reach, &seen)? && seen.is_dir() {
                    match Dir::openat(&dir, name.as_c_str(), DIRECTORY, Mode::empty()) {
                        Ok(inside) => self.level(inside)?,
                        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                        Err(e) => return Err(e).with_context(|| shown(&self.path)),
                    }
                }
                self.path.truncate(length);
            }
            Ok(())
        }
    }
    let what = || root.display().to_string();
    // Its own name may be a symbolic link; what is below is not followed.
    let dir = Dir::open(root, DIRECTORY - OFlag::O_NOFOLLOW, Mode::empty()).with_context(what)?;
    let seen = Seen::new(&fstat(&dir).with_context(what)?);
    visit(b"", &reach(&dir, OsStr::new(".")), &seen)?;
    Walk { path: Vec::new(), device: seen.device, visit }.level(dir)
}

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// What is in a directory.
fn look_into(dir: &mut Dir) -> Result<Vec<(CString, Seen)>> {
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        match fstatat(&*dir, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => found.push((name, Seen::new(&stat))),
            Err(Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

/// A path that leads to a name in this very directory, wherever it is by now. proc_pid_fd(5)
fn reach(dir: &impl AsRawFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name)
}

fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

impl Follower {
    /// Nothing is known of these trees.
    pub fn new(roots: Vec<PathBuf>) -> Follower {
        Follower::with_window(roots, WINDOW)
    }

    /// With another [`WINDOW`].
    pub(super) fn with_window(roots: Vec<PathBuf>, window: Duration) -> Follower {
        let tree =
            |root| Tree { root, known: HashMap::default(), blocks: HashMap::new(), groups: 0 };
        Follower { trees: roots.into_iter().map(tree).collect(), rounds: 0, window }
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
    ) -> Result<RoundStats> {
        self.rounds += 1;
        let mut stats = RoundStats::default();
        for (number, tree) in self.trees.iter_mut().enumerate() {
            ops::write(out, &Step::Tree(number as u32))?;
            let mut look = Look {
                round: self.rounds,
                mapped,
                out,
                went,
                stats: &mut stats,
                names: HashMap::new(),
                window: self.window,
                touched: BTreeSet::new(),
                described: HashSet::new(),
            };
            look.all(tree)?;
        }
        ops::write(out, &Step::Round(self.rounds, last))?;
        out.flush()?;
        Ok(stats)
    }
}

/// One round over one tree.
struct Look<'a, W> {
    round: u32,
    mapped: &'a Inodes,
    out: &'a mut W,
    went: &'a mut dyn FnMut(u64),
    stats: &'a mut RoundStats,
    /// Files with several names: the first one seen, and its number in the copy.
    names: HashMap<u64, (Vec<u8>, u64)>,
    window: Duration,
    /// Directories in which the copy was changed, and those whose times were sent afterwards.
    touched: BTreeSet<Vec<u8>>,
    described: HashSet<Vec<u8>>,
}

impl<W: Write> Look<'_, W> {
    fn all(&mut self, tree: &mut Tree) -> Result<()> {
        let root = tree.root.clone();
        walk(&root, &mut |path, full, seen| self.one(tree, path, full, seen))?;
        let round = self.round;
        let gone = tree.known.iter().filter(|(_, k)| k.round != round).map(|(p, _)| p.clone());
        let mut gone: Vec<Vec<u8>> = gone.collect();
        gone.sort_unstable();
        let mut last: Option<&[u8]> = None;
        for path in &gone {
            tree.known.remove(path);
            self.stats.removed += 1;
            // With its directory.
            let inside =
                last.is_some_and(|l| path.starts_with(l) && path.get(l.len()) == Some(&b'/'));
            if !inside {
                ops::write(self.out, &Step::Remove(path.clone()))?;
                self.touch(path);
                last = Some(path);
            }
        }
        if self.stats.removed > 0 && !tree.blocks.is_empty() {
            let used: HashSet<u64> = tree.known.values().map(|k| k.ino).collect();
            tree.blocks.retain(|ino, _| used.contains(ino));
        }
        // A step in a directory changes its time over there, whether or not it has changed here.
        let top = File::open(&root)?;
        for path in std::mem::take(&mut self.touched) {
            if self.described.contains(&path) {
                continue;
            }
            match describe_directory(&top, path) {
                Ok(Some(entry)) => ops::write(self.out, &Step::Change(entry, false))?,
                Ok(None) => {}
                Err(e) if vanished(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn touch(&mut self, path: &[u8]) {
        let parent = path.iter().rposition(|b| *b == b'/').map_or(&b""[..], |i| &path[..i]);
        self.touched.insert(parent.to_vec());
    }

    /// Whether it is there, and what is in it may be looked at.
    fn one(&mut self, tree: &mut Tree, path: &[u8], full: &Path, seen: &Seen) -> Result<bool> {
        self.stats.entries += 1;
        let several = !seen.is_dir() && seen.names > 1;
        let compared = !self.mapped.is_empty() && self.mapped.contains(&(seen.device, seen.ino));
        // Most of all files, most of the time.
        if let Some(known) = tree.known.get_mut(path)
            && known.is(seen)
            && known.stamp == Some((seen.changed.0, seen.changed.1, seen.size))
            && !compared
            && !several
        {
            known.round = self.round;
            return Ok(true);
        }
        match self.one_that_may_have_changed(tree, path, full, seen, (several, compared)) {
            // Gone, or something else, since it was looked at: the next round will see.
            Err(e) if vanished(&e) => Ok(false),
            Err(e) => Err(e.context(format!("cannot read {}", shown(path)))),
            Ok(()) => Ok(true),
        }
    }

    fn one_that_may_have_changed(
        &mut self,
        tree: &mut Tree,
        path: &[u8],
        full: &Path,
        seen: &Seen,
        (several, compared): (bool, bool),
    ) -> Result<()> {
        let stamp = stamp(seen, self.window);
        let known = tree.known.get(path).copied().filter(|k| k.is(seen));
        // What cannot be changed but only made anew may have the number of the one before.
        let changeable = matches!(seen.kind(), libc::S_IFREG | libc::S_IFDIR);
        let known = known.filter(|k| changeable || k.stamp.is_some() && k.stamp == stamp);
        let group = known.map_or_else(
            || {
                tree.groups += 1;
                tree.groups
            },
            |k| k.group,
        );
        let mut now = Known { kind: seen.kind(), ino: seen.ino, stamp, group, round: self.round };
        let first = self.names.get(&seen.ino).filter(|_| several).cloned();
        if let Some((name, group)) = first {
            // Another name of what has been looked at: nothing to say if it is one over there, too.
            if known.is_none_or(|k| k.group != group) {
                let meta = look(full, seen)?;
                self.make(Entry::of(path.to_vec(), Kind::Link(name), &meta, full, false)?)?;
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

    fn make(&mut self, entry: Entry) -> Result<()> {
        self.touch(&entry.path);
        ops::write(self.out, &Step::Make(entry))
    }

    /// Says all there is to say about a file; whether what was read is certainly what it was when
    /// it was looked at, or later.
    fn send(
        &mut self,
        tree: &mut Tree,
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
            Kind::Directory
        } else if kind.is_symlink() {
            Kind::Symlink(fs::read_link(full)?.as_os_str().as_bytes().to_vec())
        } else if kind.is_char_device() {
            Kind::Character(meta.rdev())
        } else if kind.is_block_device() {
            Kind::Block(meta.rdev())
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        let entry = Entry::of(path.to_vec(), described, meta, full, false)?;
        // The root is there from the beginning.
        if there || path.is_empty() {
            ops::write(self.out, &Step::Change(entry, false))?;
        } else {
            self.make(entry)?;
        }
        Ok(true)
    }

    fn send_file(
        &mut self,
        tree: &mut Tree,
        path: &[u8],
        full: &Path,
        meta: &Metadata,
        there: bool,
        group: u64,
    ) -> Result<bool> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(full)?;
        let now = file.metadata()?;
        if !now.is_file() || now.ino() != meta.ino() {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        }
        let size = now.size();
        let entry = Entry::of(path.to_vec(), Kind::File(size, Vec::new()), &now, full, false)?;
        // Those of another inode of the copy say nothing of this one.
        let sums = tree.blocks.remove(&meta.ino()).filter(|(of, _)| there && *of == group);
        let (whole, sums) = (sums.is_none(), sums.map(|s| s.1));
        if there {
            ops::write(self.out, &Step::Change(entry, whole))?;
        } else {
            self.make(entry)?;
        }
        let mut sent = Sending { file: &file, sums: Vec::new(), certain: true };
        self.contents(&mut sent, sums.unwrap_or_default(), whole, size)?;
        if size > LARGE {
            tree.blocks.insert(meta.ino(), (group, sent.sums));
        }
        Ok(sent.certain)
    }

    /// The contents, block by block: all, or those that differ from `before`.
    fn contents(
        &mut self,
        sent: &mut Sending,
        before: Vec<u128>,
        whole: bool,
        size: u64,
    ) -> Result<()> {
        let data = extents(sent.file, size)?;
        let mut data = data.into_iter().peekable();
        let mut buffer = vec![0; BLOCK];
        let mut at = 0;
        while at < size {
            let end = (at + BLOCK as u64).min(size);
            while data.peek().is_some_and(|(start, length)| start + length <= at) {
                data.next();
            }
            let empty = data.peek().is_none_or(|(start, _)| *start >= end);
            let number = (at / BLOCK as u64) as usize;
            if empty {
                // A sum that no block with contents has but by chance, which only costs a hole.
                if !whole && before.get(number).is_some_and(|s| *s != 0) {
                    ops::write(self.out, &Step::Hole(at, end - at))?;
                }
                sent.sums.push(0);
                at = end;
                continue;
            }
            let block = &mut buffer[..(end - at) as usize];
            let n = read_block(sent.file, block, at)?;
            if n < block.len() {
                // It has become shorter: the next round will say so.
                block[n..].fill(0);
                sent.certain = false;
            }
            let sum = xxh3_128(block).max(1);
            if whole || before.get(number) != Some(&sum) {
                if !whole {
                    ops::write(self.out, &Step::Hole(at, end - at))?;
                }
                self.pieces(&mut data, block, at, end)?;
            }
            sent.sums.push(sum);
            at = end;
        }
        Ok(())
    }

    /// Those parts of a block that are no holes.
    fn pieces(
        &mut self,
        data: &mut std::iter::Peekable<std::vec::IntoIter<(u64, u64)>>,
        block: &[u8],
        at: u64,
        end: u64,
    ) -> Result<()> {
        while let Some(&(start, length)) = data.peek() {
            let (from, to) = (start.max(at), (start + length).min(end));
            if from >= to {
                break;
            }
            ops::write(self.out, &Step::Data(from, (to - from) as u32))?;
            self.out.write_all(&block[(from - at) as usize..(to - at) as usize])?;
            self.stats.bytes += to - from;
            (self.went)(to - from);
            if start + length > end {
                break;
            }
            data.next();
        }
        Ok(())
    }
}

struct Sending<'a> {
    file: &'a File,
    sums: Vec<u128>,
    certain: bool,
}

fn read_block(file: &File, block: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < block.len() {
        match file.read_at(&mut block[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// What there is to say of a directory below `top`, if it is one.
fn describe_directory(top: &File, path: Vec<u8>) -> Result<Option<Entry>> {
    let held;
    let full = if path.is_empty() {
        reach(top, OsStr::new("."))
    } else {
        let (parent, name) = tree::place(top, &path)?;
        held = parent;
        reach(&held, name.as_os_str())
    };
    let meta = fs::symlink_metadata(&full)?;
    if !meta.is_dir() {
        return Ok(None);
    }
    Ok(Some(Entry::of(path, Kind::Directory, &meta, &full, false)?))
}

/// A closer look at what was seen.
fn look(full: &Path, seen: &Seen) -> Result<Metadata> {
    let meta = fs::symlink_metadata(full)?;
    // A directory is what its name leads to; what is in it is looked at by name.
    let same =
        meta.mode() & libc::S_IFMT == seen.kind() && (meta.ino() == seen.ino || seen.is_dir());
    if same { Ok(meta) } else { Err(io::Error::from(io::ErrorKind::NotFound).into()) }
}

/// Change time and size, if a later change would certainly show in them.
fn stamp(seen: &Seen, window: Duration) -> Option<(i64, i64, u64)> {
    let changed = Duration::new(seen.changed.0.try_into().ok()?, seen.changed.1 as u32);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    (changed + window < now).then_some((seen.changed.0, seen.changed.1, seen.size))
}

fn vanished(e: &anyhow::Error) -> bool {
    let number = e.downcast_ref::<io::Error>().map(|e| match e.kind() {
        io::ErrorKind::NotFound => libc::ENOENT,
        _ => e.raw_os_error().unwrap_or(0),
    });
    let number = number.or(e.downcast_ref::<Errno>().map(|e| *e as i32));
    number.is_some_and(|n| matches!(n, libc::ENOENT | libc::ELOOP | libc::ENOTDIR))
}

/// Files that these processes may write to without a trace: mapped shared, and for writing.
/// Processes that have just ended are left out.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn mapped(pids: &[i32]) -> Result<Inodes> {
    let mut found = Inodes::new();
    for pid in pids {
        let Ok(maps) = proc_text(*pid, "maps") else { continue };
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(range), Some(may)) = (words.next(), words.next()) else { continue };
            if !may.contains('w') || !may.ends_with('s') {
                continue;
            }
            // The device in the text is not always the one that stat(2) tells (btrfs, overlay).
            let link = format!("/proc/{pid}/map_files/{range}");
            found.extend(fs::metadata(&link).ok().filter(Metadata::is_file).map(inode));
        }
    }
    Ok(found)
}

/// Files that these processes, which stand still, have open for writing: what they wrote last may
/// bear an older time.
///
/// # Errors
/// When one of them is gone.
pub fn open_for_writing(pids: &[i32]) -> Result<Inodes> {
    let mut found = Inodes::new();
    for pid in pids {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            let Some(meta) = fs::metadata(&path).ok().filter(Metadata::is_file) else { continue };
            let number = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let info = proc_text(*pid, &format!("fdinfo/{number}"))?;
            let flags = info.lines().find_map(|l| l.strip_prefix("flags:"));
            let flags = flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok()).unwrap_or(0);
            if flags & libc::O_ACCMODE != libc::O_RDONLY {
                found.insert(inode(meta));
            }
        }
    }
    Ok(found)
}

fn inode(meta: Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}
