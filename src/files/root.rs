//! The root of a tree: opened once, and from then on known by its descriptor alone.
//!
//! Where volumes nest, a container can put a symbolic link in the place of one that it has by another
//! mount, and its path on the host then leads wherever the container likes. So the path is gone once;
//! whether the container really has what was found is for the caller to compare.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::directory;
use crate::sys::process;

/// A directory, or something else that is a tree by itself.
#[derive(Clone, Debug)]
pub struct Root(Arc<HeldRoot>);

#[derive(Debug)]
struct HeldRoot {
    /// `O_PATH`: whatever it is, nothing happens to it.
    at: OwnedFd,
    /// Of a regular file the directory that it is in, and its name there.
    single: Option<(OwnedFd, OsString)>,
    /// Its place on this host when it was opened.
    place: PathBuf,
    directory: bool,
    file: bool,
    inode: (u64, u64),
}

impl Root {
    /// Returns what a path leads to now, through symbolic links.
    ///
    /// # Errors
    /// When it leads nowhere.
    pub fn open(path: &Path) -> io::Result<Root> {
        let at = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        let meta = at.metadata()?;
        let inode = (meta.dev(), meta.ino());
        let place = fs::read_link(process::path_of(&at))?;
        let single = meta.is_file().then(|| single(&place, inode)).flatten();
        let (directory, file) = (meta.is_dir(), meta.is_file());
        Ok(Root(Arc::new(HeldRoot { at: at.into(), single, place, directory, file, inode })))
    }

    /// A path that leads to it, whatever bears its name by now. proc_pid_fd(5)
    pub fn path(&self) -> PathBuf {
        process::path_of(&self.0.at)
    }

    /// Its place on this host when it was opened, without symbolic links.
    pub fn place(&self) -> &Path {
        &self.0.place
    }

    /// Its device and inode.
    pub fn inode(&self) -> (u64, u64) {
        self.0.inode
    }

    /// Tells whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.0.directory
    }

    /// Tells whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.0.file
    }

    /// The directory to look in: itself, or the one that a single file is in.
    ///
    /// # Errors
    /// When there are too many descriptors, or a single file had no name.
    pub(super) fn top(&self) -> io::Result<File> {
        match (&self.0.single, self.0.directory) {
            (Some((parent, _)), _) => Ok(parent.try_clone()?.into()),
            (None, true) => Ok(self.0.at.try_clone()?.into()),
            (None, false) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The name of a single file in [`Root::top`].
    pub(super) fn name(&self) -> Option<&OsStr> {
        self.0.single.as_ref().map(|(_, name)| name.as_os_str())
    }
}

/// The directory that a file is in, and its name, if that still leads to it.
fn single(place: &Path, inode: (u64, u64)) -> Option<(OwnedFd, OsString)> {
    let (parent, name) = (directory::open(place.parent()?).ok()?, place.file_name()?);
    let found = directory::find(&parent, name).ok()??.metadata().ok()?;
    ((found.dev(), found.ino()) == inode).then(|| (parent, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_was_opened_stays_it_whatever_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("own")).unwrap();
        fs::create_dir(at("other")).unwrap();
        fs::write(at("own/mine"), b"x").unwrap();
        let root = Root::open(&at("own")).unwrap();
        assert!(root.is_dir() && root.place() == fs::canonicalize(at("own")).unwrap());
        fs::rename(at("own"), at("away")).unwrap();
        symlink("other", at("own")).unwrap();
        assert_eq!(fs::read(root.path().join("mine")).unwrap(), b"x");
        assert_ne!(Root::open(&at("own")).unwrap().inode(), root.inode());

        fs::write(at("file"), b"y").unwrap();
        let file = Root::open(&at("file")).unwrap();
        assert!(!file.is_dir() && file.name() == Some(OsStr::new("file")));
        fs::remove_file(at("file")).unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), b"y");
        assert!(directory::find(&file.top().unwrap().into(), "file".as_ref()).unwrap().is_none());
    }
}
