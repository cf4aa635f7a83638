//! Looks at the files of a tree in which anything may change at any time.
//!
//! The container may put a symbolic link in the place of any directory: each is reached by a
//! descriptor of the one that it is in, and never by its path.

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

/// What a tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Files of every kind.
    pub entries: u64,
}

/// Counts what a tree holds, which may be a single file.
///
/// # Errors
/// When it cannot be read.
pub fn measure(root: &Path) -> Result<Size> {
    let mut size = Size::default();
    let mut add = |bytes: u64, blocks: u64| {
        size.entries += 1;
        let on_disk = blocks * 512;
        // Compressed, it takes less room here than it may take there; far less, it is sparse.
        size.bytes += if bytes / 8 <= on_disk { bytes.max(on_disk) } else { on_disk };
    };
    match fs::metadata(root).with_context(|| root.display().to_string())? {
        meta if meta.is_dir() => walk(root, &mut |_, _, seen| {
            add(seen.size, seen.blocks);
            Ok(true)
        })?,
        meta => add(meta.size(), meta.blocks()),
    }
    Ok(size)
}

/// What a look at a file tells, and no more of it than a round needs of files that have not changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) device: u64,
    pub(super) ino: u64,
    pub(super) mode: u32,
    pub(super) names: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) changed: (i64, i64),
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
pub(super) type Visit<'a> = dyn FnMut(&[u8], &Path, &Seen) -> Result<bool> + 'a;

/// Visits a whole tree, directories before what is in them, names in order. What is gone when it is
/// looked at was never there.
///
/// # Errors
/// When something cannot be read, or is on another file system.
pub(super) fn walk(root: &Path, visit: &mut Visit) -> Result<()> {
    let what = || root.display().to_string();
    // Its own name may be a symbolic link; what is below is not followed.
    let dir = Dir::open(root, DIRECTORY - OFlag::O_NOFOLLOW, Mode::empty()).with_context(what)?;
    let seen = Seen::new(&fstat(&dir).with_context(what)?);
    if visit(b"", &reach(&dir, OsStr::new(".")), &seen)? {
        Walk { path: Vec::new(), device: seen.device, visit }.level(dir)?;
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
    let mut walk = Walk { path: path.to_vec(), device, visit };
    let Some(seen) = look_at(dir, &name).with_context(|| shown(path))? else { return Ok(false) };
    walk.one(dir, &name, &seen)?;
    Ok(true)
}

/// What says that a path leads nowhere, or not on.
const GONE: [Errno; 3] = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP];

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
            self.one(dir.as_fd(), &name, &seen)?;
            self.path.truncate(length);
        }
        Ok(())
    }

    /// What bears this name in a directory.
    fn one(&mut self, dir: BorrowedFd, name: &CStr, seen: &Seen) -> Result<()> {
        if seen.device != self.device {
            bail!(
                "{} is on another file system and cannot be copied with the rest: bind it by \
                 itself, or take it away",
                shown(&self.path)
            );
        }
        let reach = reach(&dir, OsStr::from_bytes(name.to_bytes()));
        if (self.visit)(&self.path, &reach, seen)? && seen.is_dir() {
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
        if let Some(seen) = look_at(dir.as_fd(), &name)? {
            found.push((name, seen));
        }
    }
    Ok(found)
}

/// What bears a name in a directory.
pub(super) fn look_at(dir: BorrowedFd, name: &CStr) -> Result<Option<Seen>> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(Seen::new(&stat))),
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

pub(super) fn ignore_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The directory that an entry lies in, and its name there. Only plain names below the root, and
/// no symbolic link on the way: openat2(2).
pub(super) fn place(root: &File, path: &[u8]) -> Result<(OwnedFd, PathBuf)> {
    let path = Path::new(OsStr::from_bytes(path));
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    let (Some(name), true) = (path.file_name(), plain) else { bail!("not a plain path") };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let how =
        OpenHow::new().flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC).resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    Ok((openat2(root, parent, how)?, name.into()))
}
