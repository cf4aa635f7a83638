//! The other end of [`crate::files::follow`]: makes the copy, step by step, on a thread of its own.
//!
//! Nothing outside the trees' roots is touched, whatever the stream says, and no more is written
//! than was announced and a container may add meanwhile.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::ops::{self, BLOCK, FileStep};
use super::tree::{self, FileEntry, FileKind};
use super::walk::Size;

/// Pieces of the stream that wait to be written.
const QUEUE: usize = 16;
/// What a container may add to what was announced, beyond as much again.
const MORE: Size = Size { bytes: 1 << 30, entries: 100_000 };

/// Most rounds.
const MAX_ROUNDS: u32 = 64;

/// What the thread tells.
#[derive(Debug)]
pub enum Applied {
    /// A round is in place; what it wrote is on the disk if it was not the last.
    Round(u32),
    /// It cannot go on: why.
    Failed(String),
}

/// Trees on their way in.
#[derive(Debug)]
pub struct Applying {
    stream: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Applying {
    /// Takes trees in, below these directories, which are empty; of each this much was announced.
    ///
    /// # Errors
    /// When a directory cannot be opened, or there can be no thread.
    pub fn start(
        roots: &[(PathBuf, Size)],
        tell: impl Fn(Applied) + Send + 'static,
    ) -> Result<Applying> {
        let mut trees = Vec::new();
        for (root, announced) in roots {
            let open = File::open(root).with_context(|| root.display().to_string())?;
            let left = Size {
                bytes: announced.bytes.saturating_mul(2).saturating_add(MORE.bytes),
                entries: announced.entries.saturating_mul(2).saturating_add(MORE.entries),
            };
            trees.push(AppliedTree { root: open, left, budget: left });
        }

        let (stream, pieces) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new().name("files".into()).spawn(move || {
            let mut input = Pieces { pieces, now: Vec::new(), at: 0 };
            let mut work = ApplyWork { trees, current: 0, file: None, directories: HashMap::new() };
            let result = work.all(&mut input, &tell);
            if let Err(e) = &result {
                tell(Applied::Failed(format!("{e:#}")));
                // Whoever still has some for us must not wait.
                while input.pieces.recv().is_ok() {}
            }
            result
        })?;

        Ok(Applying { stream: Some(stream), thread: Some(thread) })
    }

    /// Takes a piece of the stream; waits while there is enough to do.
    ///
    /// # Errors
    /// When the thread has died.
    pub fn feed(&self, bytes: &[u8]) -> Result<()> {
        let stream = self.stream.as_ref().ok_or_else(|| anyhow!("no files are taken in"))?;
        stream.send(bytes.to_vec()).map_err(|_| anyhow!("files are not taken in any more"))
    }
}

impl Applying {
    /// Nothing comes any more: waits until everything is in its place.
    ///
    /// # Errors
    /// When something is not.
    pub fn finish(mut self) -> Result<()> {
        drop(self.stream.take());
        let thread = self.thread.take().ok_or_else(|| anyhow!("no files are taken in"))?;
        thread.join().map_err(|_| anyhow!("the thread that takes files in has died"))?
    }
}

impl Drop for Applying {
    fn drop(&mut self) {
        drop(self.stream.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The pieces as one stream.
struct Pieces {
    pieces: Receiver<Vec<u8>>,
    now: Vec<u8>,
    at: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.now.len() {
            match self.pieces.recv() {
                Ok(piece) => (self.now, self.at) = (piece, 0),
                Err(_) => return Ok(0),
            }
        }
        let n = buffer.len().min(self.now.len() - self.at);
        buffer[..n].copy_from_slice(&self.now[self.at..][..n]);
        self.at += n;
        Ok(n)
    }
}

struct AppliedTree {
    root: File,
    /// What may still come in this round.
    left: Size,
    /// What may come in each.
    budget: Size,
}

impl AppliedTree {
    /// So much more is written.
    fn take(&mut self, bytes: u64, entries: u64) -> Result<()> {
        let left = &mut self.left;
        left.bytes = left.bytes.checked_sub(bytes).ok_or_else(too_much)?;
        left.entries = left.entries.checked_sub(entries).ok_or_else(too_much)?;
        Ok(())
    }
}

/// A regular file whose data are coming.
struct IncomingFile {
    parent: OwnedFd,
    name: PathBuf,
    file: File,
    entry: FileEntry,
    size: u64,
}

struct ApplyWork {
    trees: Vec<AppliedTree>,
    current: usize,
    file: Option<IncomingFile>,
    /// Directories of this round, by tree and path: their times are set when all in them is done.
    directories: HashMap<(usize, Vec<u8>), FileEntry>,
}

impl ApplyWork {
    fn all(&mut self, input: &mut impl Read, tell: &impl Fn(Applied)) -> Result<()> {
        while let Some(step) = ops::read(input)? {
            match step {
                FileStep::Data(offset, length) => {
                    self.data(offset, length, input)?;
                    continue;
                }
                FileStep::Hole(offset, length) => {
                    self.hole(offset, length)?;
                    continue;
                }
                _ => self.close()?,
            }

            match step {
                FileStep::Tree(number) => {
                    self.current = number as usize;
                    if self.current >= self.trees.len() {
                        bail!(UNKNOWN);
                    }
                }
                FileStep::Remove(path) => self.remove(&path)?,
                FileStep::Rename(from, to) => {
                    let shown = String::from_utf8_lossy(&from).into_owned();
                    self.rename(&from, &to).with_context(|| format!("cannot rename {shown:?}"))?;
                }
                FileStep::Make(entry) => {
                    let shown = String::from_utf8_lossy(&entry.path).into_owned();
                    self.make(entry).with_context(|| format!("cannot make {shown:?}"))?;
                }
                FileStep::Change(entry, empty) => {
                    let shown = String::from_utf8_lossy(&entry.path).into_owned();
                    self.change(entry, empty)
                        .with_context(|| format!("cannot change {shown:?}"))?;
                }
                FileStep::Round(number, last) => {
                    if number > MAX_ROUNDS {
                        bail!("more rounds than any source makes");
                    }
                    for tree in &mut self.trees {
                        tree.left = tree.budget;
                    }

                    self.finish_directories()?;
                    if !last {
                        // While the container runs: what is not on the disk yet when it runs here
                        // is little then.
                        for tree in &self.trees {
                            nix::unistd::syncfs(&tree.root)?;
                        }
                    }
                    tell(Applied::Round(number));
                }
                FileStep::Data(..) | FileStep::Hole(..) => {}
            }
        }

        Ok(())
    }

    fn tree(&mut self) -> Result<&mut AppliedTree> {
        self.trees.get_mut(self.current).context(UNKNOWN)
    }

    fn data(&mut self, offset: u64, length: u32, input: &mut impl Read) -> Result<()> {
        let length = length as usize;
        let Some(open) = &self.file else { bail!("data of no file") };
        if length > BLOCK || offset.checked_add(length as u64).is_none_or(|end| end > open.size) {
            bail!("data beyond the end of a file");
        }
        let mut buffer = vec![0; length];
        input.read_exact(&mut buffer).context("the stream was cut")?;
        open.file.write_all_at(&buffer, offset)?;
        self.tree()?.take(length as u64, 0)
    }

    fn hole(&mut self, offset: u64, length: u64) -> Result<()> {
        let Some(open) = &self.file else { bail!("a hole in no file") };
        if length == 0 || offset.checked_add(length).is_none_or(|end| end > open.size) {
            bail!("a hole beyond the end of a file");
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&open.file, flags, offset as i64, length as i64) {
            // Where a file system has no holes, zeros are as good.
            Err(Errno::EOPNOTSUPP) => {
                let tree = self.trees.get_mut(self.current).context(UNKNOWN)?;
                tree.take(length, 0)?;
                let zeros = vec![0; BLOCK];
                let mut at = offset;
                while at < offset + length {
                    let n = (zeros.len() as u64).min(offset + length - at);
                    open.file.write_all_at(&zeros[..n as usize], at)?;
                    at += n;
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// The file whose data came is complete: now it gets its owner and its times.
    fn close(&mut self) -> Result<()> {
        let Some(open) = self.file.take() else { return Ok(()) };
        drop(open.file);
        tree::describe(open.parent.as_fd(), &open.name, &open.entry)
    }

    fn remove(&mut self, path: &[u8]) -> Result<()> {
        let root = &self.tree()?.root;
        match super::walk::place(root, path) {
            Ok((parent, name)) => clear(&parent, &name),
            // It went with a directory.
            Err(e) if is(&e, &NOT_THERE) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn rename(&mut self, from: &[u8], to: &[u8]) -> Result<()> {
        let current = self.current;
        let tree = self.tree()?;
        tree.take(0, 1)?;
        let (parent, name) = super::walk::place(&tree.root, from)?;
        let (other, new) = super::walk::place(&tree.root, to)?;
        clear(&other, &new)?;
        renameat(&parent, &name, &other, &new)?;
        // The source describes again what it has described under the old name.
        let is_there = |path: &[u8]| {
            path.strip_prefix(from).is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
        };
        self.directories.retain(|(tree, path), _| *tree != current || !is_there(path));
        Ok(())
    }

    fn make(&mut self, entry: FileEntry) -> Result<()> {
        let current = self.current;
        let tree = self.tree()?;
        tree.take(entry.said(), 1)?;
        let (parent, name) = super::walk::place(&tree.root, &entry.path)?;
        clear(&parent, &name)?;

        match &entry.kind {
            FileKind::File(size) => {
                let size = *size;
                let file = tree::create(parent.as_fd(), &name)?;
                file.set_len(size)?;
                self.file = Some(IncomingFile { parent, name, file, entry, size });
                Ok(())
            }
            FileKind::Link(first) => tree::link(&tree.root, first, parent.as_fd(), &name),
            kind => {
                tree::make_node(parent.as_fd(), &name, &entry)?;
                tree::describe(parent.as_fd(), &name, &entry)?;
                if matches!(kind, FileKind::Directory) {
                    self.directories.insert((current, entry.path.clone()), entry);
                }
                Ok(())
            }
        }
    }

    fn change(&mut self, entry: FileEntry, empty: bool) -> Result<()> {
        let current = self.current;
        let tree = self.tree()?;
        tree.take(entry.said(), 0)?;
        let (parent, name) = if entry.path.is_empty() {
            (tree.root.try_clone()?.into(), PathBuf::from("."))
        } else {
            super::walk::place(&tree.root, &entry.path)?
        };

        match &entry.kind {
            FileKind::File(size) => {
                let size = *size;
                let flags =
                    OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
                let file = File::from(openat(&parent, &name, flags, Mode::empty())?);
                if !file.metadata()?.is_file() {
                    bail!("it is no file here");
                }

                if empty {
                    file.set_len(0)?;
                }
                file.set_len(size)?;
                self.file = Some(IncomingFile { parent, name, file, entry, size });
                Ok(())
            }
            FileKind::Link(_) => bail!("another name that has changed"),
            kind => {
                tree::describe(parent.as_fd(), &name, &entry)?;
                if matches!(kind, FileKind::Directory) {
                    self.directories.insert((current, entry.path.clone()), entry);
                }
                Ok(())
            }
        }
    }

    fn finish_directories(&mut self) -> Result<()> {
        for ((number, path), entry) in self.directories.drain() {
            let root = &self.trees[number].root;
            if path.is_empty() {
                tree::set_time(root.as_fd(), Path::new("."), entry.mtime)?;
                continue;
            }
            match super::walk::place(root, &path) {
                Ok((parent, name)) => match tree::set_time(parent.as_fd(), &name, entry.mtime) {
                    Err(e) if !is(&e, &[Errno::ENOENT]) => return Err(e),
                    _ => {}
                },
                // Taken away later in the same round.
                Err(e) if is(&e, &NOT_THERE) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

const UNKNOWN: &str = "a tree that was not announced";

/// Something on the way is gone, or is a file or a symbolic link now.
const NOT_THERE: [Errno; 3] = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP];

fn too_much() -> anyhow::Error {
    anyhow!("more files come than were announced")
}

fn is(e: &anyhow::Error, these: &[Errno]) -> bool {
    e.downcast_ref::<Errno>().is_some_and(|e| these.contains(e))
}

/// Takes away whatever bears this name, with all that is below; nothing if there is nothing.
fn clear(parent: &OwnedFd, name: &Path) -> Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(e) => return Err(e.into()),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let inside = openat(parent, name, flags, Mode::empty())?;
    let mut names: Vec<CString> = Vec::new();
    for entry in Dir::openat(&inside, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    for inner in names {
        clear(&inside, Path::new(OsStr::from_bytes(inner.to_bytes())))?;
    }
    Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_at_random;
#[cfg(test)]
mod tests_of_extremes;
