//! A directory tree as one stream, and back: for the contents of a container's tmpfs mounts.
//!
//! Everything that a file system holds goes along: owners, modes, times to the nanosecond, extended
//! attributes (and with them ACLs and capabilities), hard links, symbolic links, holes, devices,
//! FIFOs. Sockets do not: CRIU binds them again. Mount points inside are made as empty directories
//! or files.
//!
//! Format: for each entry a u32 LE length and a JSON [`FileEntry`]; behind that of a regular file, for each
//! extent with data its offset and length as u64 LE and its bytes, and an extent of length 0.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, Whence, fchownat, linkat, lseek, symlinkat};
use serde::{Deserialize, Serialize};

use super::directory;
use super::walk::{SeenFile, place, reach, shown, walk_one_mount};
use crate::sys::process;

/// Longest description of one entry: names, link targets and attributes are far below.
const MAX_ENTRY: usize = 1 << 20;
/// Most entries of one tree.
const MAX_ENTRIES: usize = 10_000_000;
/// Most bytes of all their paths: some of them are remembered.
const MAX_NAMES: usize = 512 << 20;
/// Most bytes of one file's attributes, and of where a link leads. In JSON each takes up to four.
const MAX_SAID: usize = MAX_ENTRY / 5;
const PIECE: usize = 256 << 10;

/// A file of any kind: all that there is to say about it but its contents.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FileEntry {
    /// Relative to the root; empty for the root itself.
    pub(super) path: Vec<u8>,
    pub(super) kind: FileKind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds.
    pub(super) mtime: (i64, i64),
    /// Name and value.
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FileKind {
    Directory,
    /// Its size.
    File(u64),
    Symlink(Vec<u8>),
    Character(u64),
    Block(u64),
    Fifo,
    /// Another name of an entry that came before.
    Link(Vec<u8>),
    /// A name that a socket was bound to.
    Socket,
}

impl FileKind {
    /// The part of its mode that says what it is. inode(7)
    fn format(&self) -> u32 {
        match self {
            FileKind::Directory => libc::S_IFDIR,
            FileKind::File(..) | FileKind::Link(_) => libc::S_IFREG,
            FileKind::Symlink(_) => libc::S_IFLNK,
            FileKind::Character(_) => libc::S_IFCHR,
            FileKind::Block(_) => libc::S_IFBLK,
            FileKind::Fifo => libc::S_IFIFO,
            FileKind::Socket => libc::S_IFSOCK,
        }
    }
}

impl FileEntry {
    /// Returns what there is to say of a file with these metadata, at `full`; `mounted` if something else
    /// is mounted there: what lies beneath cannot be seen by anybody.
    pub(super) fn of(
        path: Vec<u8>,
        kind: FileKind,
        meta: &Metadata,
        full: &Path,
        mounted: bool,
    ) -> Result<FileEntry> {
        let (mode, uid, gid) = match (mounted, meta.is_dir()) {
            (false, _) => (meta.mode() & 0o7777, meta.uid(), meta.gid()),
            (true, true) => (0o755, 0, 0),
            (true, false) => (0o644, 0, 0),
        };
        let attributes = if mounted { Vec::new() } else { attributes(full)? };
        let mtime = (meta.mtime(), meta.mtime_nsec());
        Ok(FileEntry { path, kind, mode, uid, gid, mtime, attributes })
    }
}

impl FileEntry {
    /// Bytes that it takes beside the contents of a file.
    pub(super) fn said(&self) -> u64 {
        let target = if let FileKind::Symlink(target) = &self.kind { target.len() } else { 0 };
        let attributes = self.attributes.iter().map(|(name, value)| name.len() + value.len());
        (target + attributes.sum::<usize>()) as u64
    }
}

/// How many entries there are, and how long their paths are, counted as they come.
#[derive(Debug, Default)]
pub(super) struct NameCount {
    entries: usize,
    bytes: usize,
}

impl NameCount {
    /// One more.
    ///
    /// # Errors
    /// When that is one too many.
    pub(super) fn add(&mut self, path: &[u8]) -> Result<()> {
        self.entries += 1;
        self.bytes += path.len();
        if self.entries > MAX_ENTRIES {
            bail!("there are more than {MAX_ENTRIES} files in it");
        }
        if self.bytes > MAX_NAMES {
            bail!("the names of all files in it have more than {} MiB", MAX_NAMES >> 20);
        }
        Ok(())
    }
}

/// Checks that what there is to say of a file is not more than goes along; a file that has gone is none.
///
/// # Errors
/// When it is, or cannot be looked at.
pub(super) fn fits(path: &[u8], full: &Path) -> Result<()> {
    match attributes(full) {
        Err(e)
            if e.downcast_ref::<io::Error>()
                .is_some_and(|e| e.kind() == io::ErrorKind::NotFound) =>
        {
            Ok(())
        }
        other => other.map(drop).with_context(|| shown(path)),
    }
}

/// Writes a tree.
///
/// # Errors
/// When it cannot be read, or `out` fails.
pub fn pack(root: &Path, out: &mut impl Write) -> Result<()> {
    let mut packer =
        TreePacker { device: None, links: HashMap::new(), buffer: vec![0; PIECE], out };
    let mut names = NameCount::default();
    walk_one_mount(root, &mut |path, full, seen| {
        names.add(path)?;
        packer.entry(path, full, seen).with_context(|| format!("cannot read {}", shown(path)))?;
        Ok(true)
    })
}

struct TreePacker<'a, W> {
    /// The root's.
    device: Option<u64>,
    links: HashMap<u64, Vec<u8>>,
    buffer: Vec<u8>,
    out: &'a mut W,
}

impl<W: Write> TreePacker<'_, W> {
    fn entry(&mut self, path: &[u8], full: &Path, seen: &SeenFile) -> Result<()> {
        let meta = fs::symlink_metadata(full)?;
        let kind = meta.file_type();

        // Something else is mounted there; what lies beneath cannot be seen by anybody.
        let mounted = *self.device.get_or_insert(seen.device) != seen.device;
        let mut file = None;
        let described = if kind.is_dir() {
            FileKind::Directory
        } else if mounted {
            FileKind::File(0)
        } else if let Some(first) =
            self.links.get(&meta.ino()).filter(|_| meta.nlink() > 1).cloned()
        {
            FileKind::Link(first)
        } else if kind.is_file() {
            file = Some(directory::open_regular(full)?);
            FileKind::File(meta.size())
        } else if kind.is_symlink() {
            FileKind::Symlink(fs::read_link(full)?.as_os_str().as_bytes().to_vec())
        } else if kind.is_char_device() {
            FileKind::Character(meta.rdev())
        } else if kind.is_block_device() {
            FileKind::Block(meta.rdev())
        } else if kind.is_fifo() {
            FileKind::Fifo
        } else {
            return Ok(());
        };

        if meta.nlink() > 1 && !kind.is_dir() {
            self.links.entry(meta.ino()).or_insert_with(|| path.to_vec());
        }

        let entry = FileEntry::of(path.to_vec(), described, &meta, full, mounted)?;
        let json = serde_json::to_vec(&entry)?;
        if json.len() > MAX_ENTRY {
            bail!("too much to say about it");
        }

        self.out.write_all(&(json.len() as u32).to_le_bytes())?;
        self.out.write_all(&json)?;
        if let FileKind::File(size) = entry.kind {
            if let Some(file) = file {
                self.contents(&file, size)?;
            }
            self.extent(0, 0)?;
        }

        Ok(())
    }

    fn contents(&mut self, file: &File, size: u64) -> Result<()> {
        for extent in Extents::of(file, size) {
            let (mut offset, length) = extent?;
            self.extent(offset, length)?;
            let end = offset + length;
            while offset < end {
                let most = PIECE.min((end - offset) as usize);
                let n = file.read_at(&mut self.buffer[..most], offset)?;
                if n == 0 {
                    bail!("it became shorter while it was read");
                }
                self.out.write_all(&self.buffer[..n])?;
                offset += n as u64;
            }
        }
        Ok(())
    }

    fn extent(&mut self, offset: u64, length: u64) -> Result<()> {
        self.out.write_all(&offset.to_le_bytes())?;
        Ok(self.out.write_all(&length.to_le_bytes())?)
    }
}

/// Where a file has data, in order: offset and length. There may be very many, so they are found one
/// by one. lseek(2), `SEEK_DATA`
pub(super) struct Extents<'a> {
    file: &'a File,
    at: u64,
    size: u64,
}

impl<'a> Extents<'a> {
    /// Returns those of a file of this size; it may grow and shrink meanwhile.
    pub(super) fn of(file: &'a File, size: u64) -> Extents<'a> {
        Extents { file, at: 0, size }
    }

    fn seek(&self, at: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek(self.file, i64::try_from(at)?, whence) {
            Ok(found) => Ok(Some((found as u64).min(self.size))),
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn find(&mut self) -> Result<Option<(u64, u64)>> {
        if self.at >= self.size {
            return Ok(None);
        }
        let Some(start) = self.seek(self.at, Whence::SeekData)? else { return Ok(None) };
        let end = self.seek(start, Whence::SeekHole)?.unwrap_or(start);
        self.at = end;
        Ok((start < end).then_some((start, end - start)))
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find().transpose();
        if !matches!(found, Some(Ok(_))) {
            self.at = self.size;
        }
        found
    }
}

fn attributes(path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let mut found = Vec::new();
    let mut said = 0;
    for name in names.filter(|n| !is_of_this_host(n)) {
        if let Some(value) = xattr::get(path, &name)? {
            said += name.len() + value.len();
            if said > MAX_SAID {
                bail!("its extended attributes have more than {} KiB", MAX_SAID >> 10);
            }
            found.push((name.as_bytes().to_vec(), value));
        }
    }
    Ok(found)
}

/// Notes of an overlay about inodes and disks of this very host, which mean nothing elsewhere, or
/// something else. Documentation/filesystems/overlayfs.rst
fn is_of_this_host(attribute: &OsStr) -> bool {
    let name = attribute.as_bytes();
    let own = name.strip_prefix(b"trusted.overlay.").or(name.strip_prefix(b"user.overlay."));
    own.is_some_and(|n| matches!(n, b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid"))
}

/// Makes the tree below `root`, a directory that is empty. Nothing outside it is touched, whatever
/// the stream says.
///
/// # Errors
/// When the stream is not one, is cut, or an entry cannot be made.
pub fn unpack(root: &Path, input: &mut impl Read) -> Result<()> {
    let root = File::open(root).with_context(|| root.display().to_string())?;
    let mut directories: Vec<(Vec<u8>, (i64, i64))> = Vec::new();
    let mut names = NameCount::default();

    loop {
        let mut length = [0; 4];
        match input.read_exact(&mut length) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                // From the inside outwards: making an entry changes its directory's time.
                for (path, time) in directories.iter().rev() {
                    times(&root, path, *time)?;
                }
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        }

        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_ENTRY {
            bail!("an entry of {length} bytes");
        }
        let mut json = vec![0; length];
        input.read_exact(&mut json).context("the stream was cut")?;

        let entry: FileEntry = serde_json::from_slice(&json)?;
        names.add(&entry.path)?;
        let shown = String::from_utf8_lossy(&entry.path).into_owned();
        make(&root, &entry, input).with_context(|| format!("cannot make {shown:?}"))?;
        if matches!(entry.kind, FileKind::Directory) {
            directories.push((entry.path, entry.mtime));
        }
    }
}

fn make(root: &File, entry: &FileEntry, input: &mut impl Read) -> Result<()> {
    if entry.path.is_empty() {
        if !matches!(entry.kind, FileKind::Directory) {
            bail!("a root that is no directory");
        }
        return describe(root.as_fd(), Path::new("."), entry);
    }
    let (parent, name) = place(root, &entry.path)?;
    match &entry.kind {
        FileKind::File(size) => {
            let file = create(parent.as_fd(), &name)?;
            file.set_len(*size)?;
            fill(&file, *size, input)?;
        }
        FileKind::Link(first) => return link(root, first, parent.as_fd(), &name),
        _ => make_node(parent.as_fd(), &name, entry)?,
    }
    describe(parent.as_fd(), &name, entry)
}

/// Writes the extents of a file of this size, which come in order.
fn fill(file: &File, size: u64, input: &mut impl Read) -> Result<()> {
    let mut at = 0;
    let mut buffer = Vec::new();
    loop {
        let (offset, length) = (number(input)?, number(input)?);
        if length == 0 {
            return Ok(());
        }
        if offset < at || offset.checked_add(length).is_none_or(|end| end > size) {
            bail!("data beyond the end of the file, or out of order");
        }
        buffer.resize(PIECE, 0);
        at = offset;
        while at < offset + length {
            let most = PIECE.min((offset + length - at) as usize);
            input.read_exact(&mut buffer[..most]).context("the stream was cut")?;
            file.write_all_at(&buffer[..most], at)?;
            at += most as u64;
        }
    }
}

fn number(input: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes).context("the stream was cut")?;
    Ok(u64::from_le_bytes(bytes))
}

/// A new, empty file for nobody but us.
pub(super) fn create(parent: BorrowedFd, name: &Path) -> Result<File> {
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(File::from(openat(parent, name, flags, Mode::from_bits_truncate(0o700))?))
}

/// Another name for what `first` names below the root.
pub(super) fn link(root: &File, first: &[u8], parent: BorrowedFd, name: &Path) -> Result<()> {
    let (directory, old) = place(root, first)?;
    Ok(linkat(&directory, &old, parent, name, LinkatFlags::empty())?)
}

/// Makes what is neither a regular file nor another name of something.
pub(super) fn make_node(parent: BorrowedFd, name: &Path, entry: &FileEntry) -> Result<()> {
    let private = Mode::from_bits_truncate(0o700);
    match &entry.kind {
        FileKind::Directory => mkdirat(parent, name, private)?,
        FileKind::Symlink(target) => symlinkat(OsStr::from_bytes(target), parent, name)?,
        FileKind::Character(device) => mknodat(parent, name, SFlag::S_IFCHR, private, *device)?,
        FileKind::Block(device) => mknodat(parent, name, SFlag::S_IFBLK, private, *device)?,
        FileKind::Fifo => mknodat(parent, name, SFlag::S_IFIFO, private, 0)?,
        FileKind::Socket => mknodat(parent, name, SFlag::S_IFSOCK, private, 0)?,
        FileKind::File(..) | FileKind::Link(_) => bail!("a file where none is meant"),
    }
    Ok(())
}

/// Owner, attributes, mode, time. In this order: a change of owner clears setuid bits and
/// capabilities, and an ACL that is taken away may have stood in for the mode.
///
/// By a descriptor of the thing itself: where others may write to the directory, its name may lead
/// elsewhere by now.
pub(super) fn describe(parent: BorrowedFd, name: &Path, entry: &FileEntry) -> Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let thing = openat(parent, name, flags, Mode::empty())?;
    let meta = fs::metadata(process::path_of(&thing));
    let is_link = matches!(entry.kind, FileKind::Symlink(_));

    // Of a symbolic link the path of the descriptor leads on, perhaps to nowhere.
    let found = if is_link { File::from(thing.try_clone()?).metadata()? } else { meta? };
    if found.mode() & libc::S_IFMT != entry.kind.format() {
        bail!("somebody has put something else in its place");
    }

    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    fchownat(&thing, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    if is_link {
        // The path of a descriptor would lead on.
        for (attribute, value) in &entry.attributes {
            xattr::set(reach(&parent, name.as_os_str()), OsStr::from_bytes(attribute), value)?;
        }
        return set_time(parent, name, entry.mtime);
    }

    let path = process::path_of(&thing);
    // From before, or inherited from a directory with a default ACL: acl(5).
    for there in xattr::list_deref(&path).map(Iterator::collect::<Vec<_>>).unwrap_or_default() {
        if !entry.attributes.iter().any(|(n, _)| OsStr::from_bytes(n) == there) {
            xattr::remove_deref(&path, &there)?;
        }
    }

    for (attribute, value) in &entry.attributes {
        xattr::set_deref(&path, OsStr::from_bytes(attribute), value)?;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode & 0o7777))?;
    let time = TimeSpec::new(entry.mtime.0, entry.mtime.1);

    Ok(utimensat(AT_FDCWD, &path, &time, &time, UtimensatFlags::FollowSymlink)?)
}

fn times(root: &File, path: &[u8], time: (i64, i64)) -> Result<()> {
    if path.is_empty() {
        return set_time(root.as_fd(), Path::new("."), time);
    }
    let (parent, name) = place(root, path)?;
    set_time(parent.as_fd(), &name, time)
}

pub(super) fn set_time(parent: BorrowedFd, name: &Path, time: (i64, i64)) -> Result<()> {
    let time = TimeSpec::new(time.0, time.1);
    Ok(utimensat(parent, name, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

#[cfg(test)]
mod tests;
