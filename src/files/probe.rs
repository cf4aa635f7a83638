//! The proof that two hosts see the same directory.
//!
//! The source writes a file with a random name and random contents into it; the destination finds
//! it there or does not. What cannot be written to is proved by its inode: a copy may have the same
//! contents, but never the same change time to the nanosecond. A single read-only file that is not
//! shared (an engine's `resolv.conf`) may be there with the same contents.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::root::Root;
use crate::sys::process;

/// How the names of probe files begin.
pub const PREFIX: &str = ".ferry-probe-";
/// Files up to this size are compared by their contents.
const MAX_CONTENTS: u64 = 1 << 20;

/// What the source knows of a path, for the destination to compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// A file made a moment ago in the directory: name and contents.
    pub file: Option<(String, String)>,
    /// Inode number, size, change time (seconds, nanoseconds).
    pub inode: (u64, u64, i64, i64),
    /// xxh3-128 of a read-only regular file.
    pub contents: Option<String>,
}

/// A proof together with the file that has to be taken away again: on drop.
#[derive(Debug)]
pub struct ProbeFile {
    /// For the other host.
    pub proof: Proof,
    made: Option<PathBuf>,
    /// Where `made` leads through one of our descriptors.
    kept: Option<KeptPlace>,
}

#[derive(Debug)]
enum KeptPlace {
    Directory(#[allow(dead_code)] OwnedFd),
    Root(#[allow(dead_code)] Root),
}

impl Drop for ProbeFile {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = fs::remove_file(path);
        }
    }
}

/// 16 random hexadecimal digits. random(4).
///
/// # Errors
/// When the system has no randomness.
pub fn random_name() -> Result<String> {
    let mut bytes = [0u8; 8];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:016x}", u64::from_le_bytes(bytes)))
}

/// Makes the proof for a path. `read_only`: the container cannot change what is there.
///
/// # Errors
/// When the path cannot be read.
pub fn make(path: &Path, read_only: bool) -> Result<ProbeFile> {
    let what = || format!("cannot look at {}", path.display());
    let meta = fs::metadata(path).with_context(what)?;
    let (mut file, mut made) = (None, None);
    if meta.is_dir() {
        let name = format!("{PREFIX}{}", random_name()?);
        let contents = random_name()?;
        let place = path.join(&name);
        let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&place);
        match open {
            Ok(mut f) => {
                made = Some(place);
                f.write_all(contents.as_bytes()).and_then(|()| f.sync_all()).with_context(what)?;
                file = Some((name, contents));
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied
                ) => {}
            Err(e) => return Err(e).with_context(what),
        }
    }

    let contents = (read_only && meta.is_file() && meta.len() <= MAX_CONTENTS)
        .then(|| fs::read(path).map(|b| format!("{:032x}", xxh3_128(&b))))
        .transpose()
        .with_context(what)?;
    // After the probe file was made: it has changed the directory.
    let meta = fs::metadata(path).with_context(what)?;

    let inode = (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
    Ok(ProbeFile { proof: Proof { file, inode, contents }, made, kept: None })
}

/// As [`make`], for a directory that is open: whatever its name leads to by now.
///
/// # Errors
/// When it cannot be looked at.
pub fn make_in(directory: OwnedFd) -> Result<ProbeFile> {
    let mut probe = make(&process::path_of(&directory), false)?;
    probe.kept = Some(KeptPlace::Directory(directory));
    Ok(probe)
}

/// As [`make`], for what was opened.
///
/// # Errors
/// When it cannot be looked at.
pub fn make_at(root: &Root, read_only: bool) -> Result<ProbeFile> {
    let made = make(&root.path(), read_only);
    let mut probe = made.with_context(|| format!("cannot look at {}", root.place().display()))?;
    probe.kept = Some(KeptPlace::Root(root.clone()));
    Ok(probe)
}

/// Device and inode of what a container has at a place, found without leaving its root: openat2(2).
/// None if there is nothing.
pub fn inode_in(root: &Path, place: &Path) -> Option<(u64, u64)> {
    let root = fs::File::open(root).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let meta = fs::File::from(openat2(&root, place, how).ok()?).metadata().ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Tells whether a path on this host is what the proof was made of.
///
/// # Errors
/// Says why it is not.
pub fn verify(path: &Path, proof: &Proof) -> Result<()> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => bail!("there is no {} here", path.display()),
        Err(e) => return Err(e).with_context(|| format!("cannot look at {}", path.display())),
    };

    if let Some((name, contents)) = &proof.file {
        if name.contains('/') || !name.starts_with(PREFIX) {
            bail!("{name:?} is no probe's name");
        }
        let mut found = String::new();
        let open = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path.join(name));
        if let Ok(file) = open {
            file.take(64).read_to_string(&mut found)?;
        }

        if &found == contents {
            return Ok(());
        }
        bail!("{} here is not the directory that the source has there", path.display());
    }

    if (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec()) == proof.inode {
        return Ok(());
    }
    if let Some(hash) = &proof.contents
        && meta.is_file()
        && meta.len() <= MAX_CONTENTS
        && format!("{:032x}", xxh3_128(&fs::read(path)?)) == *hash
    {
        return Ok(());
    }

    bail!("{} here is not what the source has there", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_directory_is_proved_under_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        let real = dir.path().join("real");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let probe = make(&real, false).unwrap();
        verify(&link, &probe.proof).unwrap();
        drop(probe);
        assert_eq!(fs::read_dir(&real).unwrap().count(), 0, "the probe is taken away");
    }

    #[test]
    fn a_copy_of_a_directory_is_not_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let probe = make(&a, false).unwrap();
        assert!(verify(&b, &probe.proof).is_err());
        assert!(verify(&dir.path().join("none"), &probe.proof).is_err());
    }

    #[test]
    fn a_read_only_file_may_be_a_copy_and_a_writable_one_may_not() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "nameserver").unwrap();
        fs::write(&b, "nameserver").unwrap();
        verify(&b, &make(&a, true).unwrap().proof).unwrap();
        assert!(verify(&b, &make(&a, false).unwrap().proof).is_err());
        verify(&a, &make(&a, false).unwrap().proof).unwrap();
        fs::write(&b, "nameserveR").unwrap();
        assert!(verify(&b, &make(&a, true).unwrap().proof).is_err());
    }

    #[test]
    fn a_probe_cannot_lead_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let mut probe = make(dir.path(), false).unwrap();
        probe.proof.file = Some((format!("{PREFIX}/../../etc/passwd"), String::new()));
        assert!(verify(dir.path(), &probe.proof).is_err());
    }
}
