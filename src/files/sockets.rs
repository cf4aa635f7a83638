//! Unix sockets with a name in a file system that both hosts see.
//!
//! A restore binds such a name anew: the old file is removed and another takes its place. When the
//! migration is given up after that, the source's socket lives on, but its name leads to one that
//! died on the destination. So every such file is renamed to a spare name when CRIU has dumped; in
//! the end it is renamed back or removed. (A hard link would not do: the kernel and CRIU take a
//! socket for deleted whose own directory entry is gone, whatever other names its file has.) What
//! is on a tmpfs is on one host only and needs nothing.
//!
//! Some programs bind a name and rename the file to the one that clients know (haproxy), or link it there and
//! remove the first name (supervisord). The socket keeps the first name, and a checkpoint looks there. So
//! the file gets its first name back before CRIU looks, in the freeze, and the second one on the host
//! where the container runs on. That CRIU takes a linked one for deleted all the same,
//! [`crate::criu::unix_names`] mends in its image.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::sys::stat::{SFlag, fstatat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};

use crate::sys::process;

/// The names that were given a spare one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spares {
    /// Begins every spare name; the migration's ID is part of it.
    prefix: String,
    /// As seen in the container, byte for byte.
    names: Vec<Vec<u8>>,
}

/// A socket whose file was renamed since it was bound, within its directory. Names as seen in the container,
/// byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renamed {
    /// What it was bound to, and is called by the kernel.
    pub bound: Vec<u8>,
    /// Where its file is.
    pub current: Vec<u8>,
}

/// Most of them.
pub const MOST_RENAMED: usize = 1000;
/// `sun_path`, unix(7).
const LONGEST_NAME: usize = 108;

/// Tells whether a peer's can be some.
///
/// # Errors
/// Says what they are instead.
pub fn validate(renamed: &[Renamed]) -> Result<()> {
    let file = |name: &[u8]| PathBuf::from(OsString::from_vec(name.to_vec()));
    let is_name = |name: &[u8]| {
        name.starts_with(b"/") && name.len() <= LONGEST_NAME + 255 && !name.contains(&0)
    };
    for one in renamed {
        let (bound, current) = (file(&one.bound), file(&one.current));
        let named = is_name(&one.bound) && is_name(&one.current);
        let both = bound.file_name().zip(current.file_name());
        if !named || both.is_none_or(|(a, b)| a == b) || bound.parent() != current.parent() {
            bail!("no socket is renamed like {one:?}");
        }
    }
    if renamed.len() > MOST_RENAMED {
        bail!("{} renamed sockets", renamed.len());
    }
    Ok(())
}

/// Gives sockets the names back that they were bound to, below the container's root.
///
/// # Errors
/// Says which one cannot have it; it is tried with all.
pub fn to_bound_names(root: &Path, renamed: &[Renamed]) -> Result<()> {
    each_renamed(renamed, |one| rename_socket(root, &one.current, &one.bound))
}

/// On the host to which the container has gone, where they were bound anew: renames them as they were
/// renamed here.
///
/// # Errors
/// Says which one is not there, or cannot be renamed; it is tried with all.
pub fn to_current_names(root: &Path, renamed: &[Renamed]) -> Result<()> {
    each_renamed(renamed, |one| rename_socket(root, &one.bound, &one.current))
}

/// Undoes [`to_bound_names`], as far as it was done.
///
/// # Errors
/// Says which one cannot be renamed; it is tried with all.
pub fn back_to_current_names(root: &Path, renamed: &[Renamed]) -> Result<()> {
    each_renamed(renamed, |one| {
        let there = place(root, &one.bound).is_some_and(|(directory, file)| {
            fstatat(&directory, file.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
        });
        if there { rename_socket(root, &one.bound, &one.current) } else { Ok(()) }
    })
}

fn each_renamed(renamed: &[Renamed], act: impl Fn(&Renamed) -> Result<()>) -> Result<()> {
    let mut first = Ok(());
    for one in renamed {
        let shown =
            || format!("the socket {}", String::from_utf8_lossy(&one.current).escape_debug());
        let done = act(one).with_context(shown);
        if first.is_ok() {
            first = done;
        }
    }
    first
}

/// Within a directory. Never over anything but another socket.
fn rename_socket(root: &Path, from: &[u8], to: &[u8]) -> Result<()> {
    let there = place(root, from).zip(place(root, to));
    let ((directory, from), (_, to)) = there.context("its directory is gone")?;
    let is_socket = |name: &OsString| {
        let found = fstatat(&directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        found.map(|s| s.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits())
    };
    if !is_socket(&from)? {
        bail!("it is none any more");
    }
    match is_socket(&to) {
        Ok(true) | Err(Errno::ENOENT) => {}
        Ok(false) => bail!("something else has its name"),
        Err(e) => return Err(e.into()),
    }
    Ok(renameat(&directory, from.as_os_str(), &directory, to.as_os_str())?)
}

impl Spares {
    /// Finds what the container's processes have bound, in the network namespace of `init`.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn find(init: i32, pids: &[i32], migration: &str) -> Result<Spares> {
        let table = fs::read(format!("/proc/{init}/net/unix"))?;
        let mut bound = parse(&table);
        if !bound.is_empty() {
            let own = sockets_of(pids);
            bound.retain(|(inode, _)| own.contains(inode));
        }
        let mut names: Vec<Vec<u8>> = bound.into_iter().map(|(_, name)| name).collect();
        names.sort();
        // A connection that was accepted bears the listener's name.
        names.dedup();
        Ok(Spares { prefix: format!(".ferry-{migration}-"), names })
    }

    /// Tells whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Renames each file to its spare name; `root` is the container's root directory. Names that are no
    /// sockets' (any more) are passed over, as are those on a tmpfs.
    ///
    /// # Errors
    /// Says which file cannot be linked.
    pub fn make(&self, root: &Path) -> Result<()> {
        for (i, name) in self.names.iter().enumerate() {
            let Some((directory, file)) = place(root, name) else { continue };
            let is_socket = fstatat(&directory, file.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .is_ok_and(|s| s.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits());
            if !is_socket || fstatfs(&directory).is_ok_and(|f| f.filesystem_type() == TMPFS_MAGIC) {
                continue;
            }
            let moved = renameat(&directory, file.as_os_str(), &directory, self.spare(i).as_str());
            match moved {
                // On a read-only mount nothing can be bound anew either.
                Ok(()) | Err(Errno::EROFS) => {}
                Err(e) => {
                    return Err(e).with_context(|| {
                        format!("keeping the socket {}", String::from_utf8_lossy(name))
                    });
                }
            }
        }
        Ok(())
    }

    /// The container stays: every name leads to its socket again.
    ///
    /// # Errors
    /// Says which could not be given back; the others were.
    pub fn give_back(&self, root: &Path) -> Result<()> {
        self.each(root, |directory, spare, file| renameat(directory, spare, directory, file))
    }

    /// The container has gone: only its new names remain.
    ///
    /// # Errors
    /// Says which could not be removed; the others were.
    pub fn remove(&self, root: &Path) -> Result<()> {
        self.each(root, |directory, spare, _| {
            unlinkat(directory, spare, UnlinkatFlags::NoRemoveDir)
        })
    }

    fn each(
        &self,
        root: &Path,
        act: impl Fn(&OwnedFd, &str, &std::ffi::OsStr) -> nix::Result<()>,
    ) -> Result<()> {
        let mut first = Ok(());
        for (i, name) in self.names.iter().enumerate() {
            let Some((directory, file)) = place(root, name) else { continue };
            match act(&directory, &self.spare(i), &file) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(e) if first.is_ok() => {
                    first = Err(e)
                        .with_context(|| format!("the socket {}", String::from_utf8_lossy(name)));
                }
                Err(_) => {}
            }
        }
        first
    }

    fn spare(&self, i: usize) -> String {
        format!("{}{i}", self.prefix)
    }
}

/// The directory of a name, never outside of the root (openat2(2)), and the name in it.
fn place(root: &Path, name: &[u8]) -> Option<(OwnedFd, OsString)> {
    let path = PathBuf::from(OsString::from_vec(name.to_vec()));
    let file = path.file_name()?.to_owned();
    let root = File::open(root).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Some((openat2(&root, path.parent()?, how).ok()?, file))
}

/// Inode and name of the sockets in a `/proc/PID/net/unix` whose names are absolute paths.
/// `Num RefCount Protocol Flags Type St Inode Path`: proc_pid_net(5).
fn parse(table: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    for line in table.split(|b| *b == b'\n').skip(1) {
        let mut rest = line;
        let mut fields = Vec::with_capacity(7);
        while fields.len() < 7 {
            let start = rest.iter().position(|b| *b != b' ').unwrap_or(rest.len());
            rest = &rest[start..];
            let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
            fields.push(&rest[..end]);
            rest = &rest[end..];
        }
        let name = rest.strip_prefix(b" ").unwrap_or_default();
        let inode = std::str::from_utf8(fields[6]).ok().and_then(|t| t.parse().ok());
        if let (Some(inode), Some(b'/')) = (inode, name.first()) {
            found.push((inode, name.to_vec()));
        }
    }
    found
}

fn sockets_of(pids: &[i32]) -> HashSet<u64> {
    let mut found = HashSet::new();
    for pid in pids {
        // Whoever has just ended has no sockets.
        let list = process::open_files(*pid).into_iter().flatten();
        found.extend(list.filter_map(|(_, target)| process::socket_inode(&target)));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::fuzz::{Target, found};

    #[test]
    fn names_are_read_from_the_table() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/a b.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12346 @abstract\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 12347\n";
        assert_eq!(parse(table), [(12345, b"/run/a b.sock".to_vec())]);
    }

    #[test]
    fn a_name_that_was_bound_anew_leads_back() {
        // Not in /tmp, which may be a tmpfs.
        let root = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap();
        let path = root.path().join("x.sock");
        let _first = UnixListener::bind(&path).unwrap();
        let spares = Spares { prefix: ".ferry-0-".into(), names: vec![b"/x.sock".to_vec()] };
        let old = fs::metadata(&path).unwrap().ino();
        spares.make(root.path()).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        spares.give_back(root.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), old);
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        // Twice, and where nothing was bound anew.
        spares.give_back(root.path()).unwrap();
        spares.make(root.path()).unwrap();
        spares.give_back(root.path()).unwrap();
        UnixStream::connect(&path).unwrap();
        spares.make(root.path()).unwrap();
        spares.remove(root.path()).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_renamed_socket_has_its_first_name_meanwhile() {
        let root = tempfile::tempdir().unwrap();
        let (first, second) = (root.path().join("first"), root.path().join("second"));
        let _listener = UnixListener::bind(&first).unwrap();
        fs::rename(&first, &second).unwrap();
        let one = Renamed { bound: b"/first".to_vec(), current: b"/second".to_vec() };
        let all = [one.clone()];
        validate(&all).unwrap();
        to_bound_names(root.path(), &all).unwrap();
        UnixStream::connect(&first).unwrap();

        to_current_names(root.path(), &all).unwrap();
        UnixStream::connect(&second).unwrap();
        to_current_names(root.path(), &all).unwrap_err();

        // As long as nothing was done there is nothing to undo.
        back_to_current_names(root.path(), &all).unwrap();
        to_bound_names(root.path(), &all).unwrap();
        back_to_current_names(root.path(), &all).unwrap();
        UnixStream::connect(&second).unwrap();

        fs::write(&first, "").unwrap();
        to_bound_names(root.path(), &all).unwrap_err();
        assert_eq!(fs::metadata(&first).unwrap().len(), 0, "it was replaced");
        for (bound, current) in
            [("/a/b", "/c"), ("/a", "/a"), ("a", "b"), ("/..", "/b"), ("/", "/b")]
        {
            let wrong = Renamed { bound: bound.into(), current: current.into() };
            validate(&[wrong]).unwrap_err();
        }
        validate(&vec![one; MOST_RENAMED + 1]).unwrap_err();
    }

    #[test]
    fn own_sockets_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let pid = std::process::id() as i32;
        let spares = Spares::find(pid, &[pid], "0123").unwrap();
        assert!(spares.names.contains(&path.as_os_str().as_bytes().to_vec()), "{spares:?}");
        assert!(Spares::find(pid, &[], "0123").unwrap().is_empty());
    }

    #[test]
    fn fuzz_unix_sockets() {
        let sample = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                      0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/a socket\n\
                      0000000000000000: 00000003 00000000 00000000 0001 03 12346\n";
        Target::new("unix-sockets").sample(sample).words(&[b" /", b"\n"]).run(|bytes| {
            let list = parse(bytes);
            assert!(list.iter().all(|(_, name)| name.first() == Some(&b'/')));
            found(&[list.len()])
        });
    }
}
