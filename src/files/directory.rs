//! A directory of this host that somebody else has named: opened once, without following a symbolic
//! link, and from then on known by its descriptor alone.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::sys::process;

/// Opens a directory, to work in. openat2(2): no symbolic link on the way.
///
/// # Errors
/// `ENOENT`; `ELOOP` where there is a symbolic link; `ENOTDIR`.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(AT_FDCWD, path, how)?)
}

/// Returns what bears a name there, if anything does: only to be looked at, whatever it is. open(2), `O_PATH`.
///
/// # Errors
/// When it cannot be looked at.
pub fn find(directory: &OwnedFd, name: &OsStr) -> io::Result<Option<File>> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(directory, name, flags, Mode::empty()) {
        Ok(found) => Ok(Some(found.into())),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Makes a file that nobody else can open, empty, under a name that is free.
///
/// # Errors
/// `EEXIST` where it is not.
pub fn make(directory: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    Ok(openat(directory, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
}

/// Opens once more what [`find`] or [`make`] has found: the very same, whatever its name leads to by
/// now. proc_pid_fd(5)
///
/// # Errors
/// When it cannot be opened so.
pub fn reopen(file: &File, options: &OpenOptions) -> io::Result<File> {
    options.open(process::path_of(file))
}

/// Opens a regular file to read it, and nothing else: opening a device may do something, and what was a
/// file a moment ago may be one by now. open(2), `O_PATH`
///
/// # Errors
/// `ENOENT` where there is something else by now.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let found = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !found.metadata()?.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    reopen(&found, OpenOptions::new().read(true))
}

/// Renames within the directory.
///
/// # Errors
/// When it cannot be.
pub fn rename(directory: &OwnedFd, from: &OsStr, to: &OsStr) -> io::Result<()> {
    Ok(renameat(directory, from, directory, to)?)
}

/// Takes a file away, if it is there.
///
/// # Errors
/// When it cannot be.
pub fn remove(directory: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_is_opened_to_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "x").unwrap();
        assert!(open_regular(&at("file")).is_ok());
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        // If this one were opened, it would wait for a writer.
        nix::unistd::mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        for name in ["link", "fifo", "none"] {
            let found = open_regular(&at(name));
            assert_eq!(found.unwrap_err().kind(), io::ErrorKind::NotFound, "{name}");
        }
    }
}
