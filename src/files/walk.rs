//! Looks at the files of a tree in which anything may change at any time.
//!
//! The container may put a symbolic link in the place of any directory: each is reached by a
//! descriptor of the one that it is in, and never by its path.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use serde::{Deserialize, Serialize};

use super::directory;

/// What a tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Files of every kind.
    pub entries: u64,
}

/// Most directories in each other. A container may make any number of them; each costs a descriptor
/// while what is in it is looked at.
const MAX_DEPTH: usize = 256;
/// Longest path below a root, in bytes. No system call takes more than 4096 at once: longer ones are
/// gone in several steps.
const MAX_PATH: usize = 32 << 10;
/// Most bytes of all paths in a tree: a copy that is followed remembers them.
const MAX_PATHS: u64 = 2 << 30;
/// Most names in one directory, which are put in order before one is looked at; and most bytes of these.
const MAX_IN_ONE: (usize, usize) = (10_000_000, 512 << 20);

/// Counts what a tree holds, which may be a single file.
///
/// # Errors
/// When it cannot be read, or is more than can be copied.
pub fn measure(root: &Path) -> Result<Size> {
    let mut size = Size::default();
    let mut paths = 0;
    let mut add = |bytes: u64, blocks: u64| {
        size.entries += 1;
        let on_disk = blocks * 512;
        // Compressed, it takes less room here than it may take there; far less, it is sparse.
        size.bytes += if bytes / 8 <= on_disk { bytes.max(on_disk) } else { on_disk };
    };
    let what = || root.display().to_string();
    match fs::metadata(root).with_context(what)? {
        meta if meta.is_dir() => walk(root, &mut |path, _, seen| {
            add(seen.size, seen.blocks);
            paths += path.len() as u64;
            if paths > MAX_PATHS {
                bail!("{}: the names of all files in it are too long to be remembered", what());
            }
            Ok(true)
        })?,
        meta => add(meta.size(), meta.blocks()),
    }
    Ok(size)
}

/// Returns where inodes bear a name below a directory, by their paths from there: of each the first that is
/// found. Nothing that is mounted below is entered.
///
/// # Errors
/// When something cannot be read; when there are more than `most` files, or anything is mounted, in those
/// of them that are directories.
pub fn names_of(root: &Path, inodes: &HashSet<u64>, most: u64) -> Result<HashMap<u64, PathBuf>> {
    let device = fs::metadata(root).with_context(|| root.display().to_string())?.dev();
    let mut found = HashMap::new();

    // The directory of them that is being looked through, and how many files were in such.
    let (mut within, mut count) = (None::<Vec<u8>>, 0);
    walk_one_mount(root, &mut |path, _, seen| {
        let below =
            |top: &Vec<u8>| path.strip_prefix(&top[..]).is_some_and(|p| p.starts_with(b"/"));
        within = within.take().filter(below);
        if within.is_some() {
            count += 1;
            if count > most {
                bail!("there are more than {most} files in it");
            }
            if seen.is_dir() && seen.device != device {
                bail!("something is mounted in it, at {}", shown(path));
            }
        }

        if seen.device == device && inodes.contains(&seen.ino) {
            let path = || PathBuf::from(OsStr::from_bytes(path));
            found.entry(seen.ino).or_insert_with(path);
            if seen.is_dir() && within.is_none() {
                within = Some(path().into_os_string().into_encoded_bytes());
            }
        }

        // The rest is of no interest.
        Ok(found.len() < inodes.len() || within.is_some())
    })?;

    Ok(found)
}

/// What a look at a file tells, and no more of it than a round needs of files that have not changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct SeenFile {
    pub(super) device: u64,
    pub(super) ino: u64,
    pub(super) mode: u32,
    pub(super) names: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) changed: (i64, i64),
}

impl SeenFile {
    fn new(stat: &FileStat) -> SeenFile {
        SeenFile {
            device: stat.st_dev,
            ino: stat.st_ino,
            mode: stat.st_mode,
            names: stat.st_nlink,
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    pub(super) fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind() == libc::S_IFREG
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }
}

/// Hears of a file: its path below the root, a path by which it can be reached, and what it is. Of a
/// directory it says whether what is in it is to be looked at, too.
pub(super) type Visit<'a> = dyn FnMut(&[u8], &Path, &SeenFile) -> Result<bool> + 'a;

/// Visits a whole tree, directories before what is in them, names in order. What is gone when it is
/// looked at was never there.
///
/// # Errors
/// When something cannot be read, or is on another file system.
pub(super) fn walk(root: &Path, visit: &mut Visit) -> Result<()> {
    walk_all(root, MountPolicy::Refused, visit)
}

/// The same, but what is mounted below is visited, too, and nothing that is in it.
///
/// # Errors
/// When something cannot be read.
pub(super) fn walk_one_mount(root: &Path, visit: &mut Visit) -> Result<()> {
    walk_all(root, MountPolicy::Visited, visit)
}

fn walk_all(root: &Path, mounts: MountPolicy, visit: &mut Visit) -> Result<()> {
    let what = || root.display().to_string();
    // Its own name may be a symbolic link; what is below is not followed.
    let dir = Dir::open(root, DIRECTORY - OFlag::O_NOFOLLOW, Mode::empty()).with_context(what)?;
    let seen = SeenFile::new(&fstat(&dir).with_context(what)?);
    if visit(b"", &reach(&dir, OsStr::new(".")), &seen)? {
        Walk { path: Vec::new(), depth: 0, device: seen.device, mounts, visit }.level(dir)?;
    }
    Ok(())
}

/// Visits what has this path below `top`, and, as the visitor says, what is in it; whether there is
/// something.
///
/// # Errors
/// As [`walk`].
pub(super) fn visit_one(top: &File, path: &[u8], visit: &mut Visit) -> Result<bool> {
    let device = fstat(top)?.st_dev;
    let held;
    let (dir, name) = if path.is_empty() {
        (top.as_fd(), c".".to_owned())
    } else {
        let (parent, name) = match place(top, path) {
            Ok(found) => found,
            Err(e) if e.downcast_ref::<Errno>().is_some_and(|e| GONE.contains(e)) => {
                return Ok(false);
            }
            Err(e) => return Err(e).with_context(|| shown(path)),
        };
        held = parent;
        (held.as_fd(), CString::new(name.as_os_str().as_bytes())?)
    };
    let depth = path.split(|b| *b == b'/').count();
    let mut walk = Walk { path: path.to_vec(), depth, device, mounts: MountPolicy::Refused, visit };
    let Some(seen) = look_at(dir, &name).with_context(|| shown(path))? else { return Ok(false) };
    walk.one(dir, &name, &seen)?;
    Ok(true)
}

/// What says that a path leads nowhere, or not on.
const GONE: [Errno; 3] = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP];

/// What becomes of what is mounted below a root.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MountPolicy {
    Refused,
    Visited,
}

/// The path grows and shrinks in place: there may be very many files.
struct Walk<'a, 'b> {
    path: Vec<u8>,
    /// Directories on the way.
    depth: usize,
    device: u64,
    mounts: MountPolicy,
    visit: &'a mut Visit<'b>,
}

impl Walk<'_, '_> {
    fn level(&mut self, mut dir: Dir) -> Result<()> {
        if self.depth > MAX_DEPTH || self.path.len() > MAX_PATH {
            bail!(
                "there are more than {MAX_DEPTH} directories in each other, or a path of more than \
                 {MAX_PATH} bytes, below {}",
                shown(self.path.split(|b| *b == b'/').next().unwrap_or_default())
            );
        }
        let found = look_into(&mut dir, MAX_IN_ONE).with_context(|| shown(&self.path))?;
        self.depth += 1;
        for (name, seen) in found {
            let length = self.path.len();
            if length > 0 {
                self.path.push(b'/');
            }
            self.path.extend(name.as_bytes());
            self.one(dir.as_fd(), &name, &seen)?;
            self.path.truncate(length);
        }
        self.depth -= 1;
        Ok(())
    }

    /// Returns what bears this name in a directory.
    fn one(&mut self, dir: BorrowedFd, name: &CStr, seen: &SeenFile) -> Result<()> {
        let mounted = seen.device != self.device;
        if mounted && self.mounts == MountPolicy::Refused {
            bail!(
                "{} is on another file system and cannot be copied with the rest: bind it by \
                 itself, or take it away",
                shown(&self.path)
            );
        }
        let reach = reach(&dir, OsStr::from_bytes(name.to_bytes()));
        if (self.visit)(&self.path, &reach, seen)? && seen.is_dir() && !mounted {
            match Dir::openat(dir, name, DIRECTORY, Mode::empty()) {
                Ok(inside) => self.level(inside)?,
                Err(e) if GONE.contains(&e) => {}
                Err(e) => return Err(e).with_context(|| shown(&self.path)),
            }
        }
        Ok(())
    }
}

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Returns what is in a directory, if that is not more names than that, nor more bytes of them.
fn look_into(dir: &mut Dir, most: (usize, usize)) -> Result<Vec<(CString, SeenFile)>> {
    let mut names = Vec::new();
    let mut bytes = 0;
    for entry in dir.iter() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            bytes += entry.file_name().count_bytes();
            names.push(entry.file_name().to_owned());
        }
        if names.len() > most.0 || bytes > most.1 {
            bail!("it has more than {} names, or more than {} MiB of them", most.0, most.1 >> 20);
        }
    }
    names.sort_unstable();
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        if let Some(seen) = look_at(dir.as_fd(), &name)? {
            found.push((name, seen));
        }
    }
    Ok(found)
}

/// Returns what bears a name in a directory.
pub(super) fn look_at(dir: BorrowedFd, name: &CStr) -> Result<Option<SeenFile>> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(SeenFile::new(&stat))),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A path that leads to a name in this very directory, wherever it is by now. proc_pid_fd(5)
pub(super) fn reach(dir: &impl AsRawFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name)
}

/// A path below a root, for people.
pub(super) fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

/// Takes a tree or a file away, if it is there.
///
/// # Errors
/// When it cannot be, or something is mounted below: nothing is taken away then.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {
            measure(path)?;
            fs::remove_dir_all(path)
        }
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    ignore_missing(result).with_context(|| format!("cannot remove {}", path.display()))
}

/// The same for a path on which there is no symbolic link. Where there is one by now, a container has
/// put it there, and nothing is taken away.
///
/// # Errors
/// As [`remove`]; `ELOOP`.
pub fn remove_real(path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("{} cannot be removed", path.display())
    };
    let parent = match directory::open(parent) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("cannot remove {}", path.display()))?,
    };
    remove(&reach(&parent, name)).with_context(|| format!("cannot remove {}", path.display()))
}

pub(super) fn ignore_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The directory that an entry lies in, and its name there. Only plain names below the root, and
/// no symbolic link on the way: openat2(2). A long way is gone in steps.
///
/// # Errors
/// `ENOENT`, `ENOTDIR`, `ELOOP` where it leads nowhere; when it is no path below a root.
pub(super) fn place(root: &File, path: &[u8]) -> Result<(OwnedFd, PathBuf)> {
    let plain = |c: Component| matches!(c, Component::Normal(_));
    let whole = Path::new(OsStr::from_bytes(path));
    let (Some(name), true) = (whole.file_name(), whole.components().all(plain)) else {
        bail!("not a plain path")
    };
    if path.len() > MAX_PATH + NAME_MAX || whole.components().count() > MAX_DEPTH + 2 {
        bail!("a path longer than any that is copied");
    }
    let parent = whole.parent().map_or(&b""[..], |p| p.as_os_str().as_bytes());
    let mut parts = steps(parent).into_iter();
    let mut at = step(root, parts.next().unwrap_or(b"."))?;
    for part in parts {
        at = step(&at, part)?;
    }
    Ok((at, name.into()))
}

/// limits.h
const NAME_MAX: usize = 255;

/// Cuts a path at slashes into parts that a system call takes.
fn steps(path: &[u8]) -> Vec<&[u8]> {
    const MOST: usize = libc::PATH_MAX as usize / 2;
    let (mut parts, mut rest) = (Vec::new(), path);
    while rest.len() > MOST {
        let Some(slash) = rest[..MOST].iter().rposition(|b| *b == b'/') else { break };
        parts.push(&rest[..slash]);
        rest = &rest[slash + 1..];
    }
    parts.extend((!rest.is_empty()).then_some(rest));
    parts
}

/// A directory below another one.
fn step(from: &impl AsFd, path: &[u8]) -> Result<OwnedFd> {
    let how =
        OpenHow::new().flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC).resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    Ok(openat2(from.as_fd(), OsStr::from_bytes(path), how)?)
}

/// Directories in each other, made one level at a time: no system call takes such a path.
#[cfg(test)]
pub(super) fn deep(root: &Path, names: usize, length: usize) -> File {
    let mut at = File::open(root).expect("it is there");
    for _ in 0..names {
        let name = "d".repeat(length);
        nix::sys::stat::mkdirat(&at, name.as_str(), Mode::S_IRWXU).expect("it can be made");
        at = step(&at, name.as_bytes()).expect("it can be opened").into();
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_their_inodes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        for name in ["a/b/1", "a/2", "c"] {
            fs::write(at(name), name).unwrap();
        }
        let inodes = |names: &[&str]| -> HashSet<u64> {
            names.iter().map(|name| fs::metadata(at(name)).unwrap().ino()).collect()
        };
        let find = |names: &[&str], most: u64| {
            let found = names_of(dir.path(), &inodes(names), most)?;
            let mut found: Vec<_> = found.into_values().collect();
            found.sort();
            anyhow::Ok(found)
        };
        assert_eq!(find(&["c", "a/b/1"], 0).unwrap(), [Path::new("a/b/1"), Path::new("c")]);
        // Three files are below `a`, of which `b` is one.
        assert_eq!(find(&["a", "a/b"], 3).unwrap(), [Path::new("a"), Path::new("a/b")]);
        assert!(find(&["a", "c"], 2).unwrap_err().to_string().contains("more than 2 files"));
        fs::remove_file(at("c")).unwrap();
        assert_eq!(names_of(dir.path(), &HashSet::from([1 << 60]), 0).unwrap().len(), 0);
    }

    #[test]
    fn a_long_way_is_gone_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let last = deep(dir.path(), 25, 200);
        fs::write(reach(&last, OsStr::new("file")), b"x").unwrap();
        let mut longest = Vec::new();
        walk(dir.path(), &mut |path, full, seen| {
            assert_eq!(fs::symlink_metadata(full)?.ino(), seen.ino);
            longest = path.to_vec();
            Ok(true)
        })
        .unwrap();

        assert_eq!(longest.len(), 25 * 201 + 4);
        let root = File::open(dir.path()).unwrap();
        let (parent, name) = place(&root, &longest).unwrap();
        assert_eq!(fs::read(reach(&parent, name.as_os_str())).unwrap(), b"x");
        let mut found = false;
        assert!(
            visit_one(&root, &longest, &mut |_, _, seen| Ok({
                found = seen.is_file();
                found
            }))
            .unwrap()
        );
        assert!(found);
    }

    #[test]
    fn nothing_behind_a_link_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(top.join("real/tree")).unwrap();
        std::os::unix::fs::symlink("real", top.join("link")).unwrap();
        remove_real(&top.join("link/tree")).unwrap_err();
        assert!(top.join("real/tree").is_dir());
        for _ in 0..2 {
            remove_real(&top.join("real/tree")).unwrap();
        }
        assert!(!top.join("real/tree").exists());
    }

    #[test]
    fn an_endless_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "bb", "ccc"] {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        let look = |most| {
            let mut dir = Dir::open(dir.path(), DIRECTORY, Mode::empty()).unwrap();
            look_into(&mut dir, most).map(|found| found.len())
        };
        assert_eq!(look((3, 6)).unwrap(), 3);
        assert!(look((2, 6)).is_err() && look((3, 5)).is_err());
    }

    #[test]
    fn a_bottomless_tree_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        deep(dir.path(), MAX_DEPTH + 10, 1);
        let why = measure(dir.path()).unwrap_err().to_string();
        assert!(why.contains("more than 256 directories in each other"), "{why}");
        let root = File::open(dir.path()).unwrap();
        assert!(place(&root, &b"d/".repeat(MAX_DEPTH + 10)).is_err());
    }

    #[test]
    fn steps_are_short_and_lose_nothing() {
        for path in ["", "a", "a/b", &format!("{}x", "name/".repeat(3000))] {
            let parts = steps(path.as_bytes());
            assert_eq!(parts.join(&b'/'), path.as_bytes());
            assert!(parts.iter().all(|p| !p.is_empty() && p.len() < 4096));
        }
    }
}
