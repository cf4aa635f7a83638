//! What the container's standard streams are, on the source.
//!
//! A regular file is either the container's own, which CRIU carries, or a log of this host, whose
//! place is named to the destination. The container can give a file of its own any name, rename it
//! while we look, or hide it from us; so a file is never a log of this host because it was not found in
//! the container. It is one only if it was opened through a mount of this host, which no container
//! has, and bears in that place the name that it seems to. All is taken from one descriptor of ours.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::files::{directory, probe};
use crate::migration::protocol::Stream;
use crate::problem::{Problem, advice};
use crate::sys::process::{self, proc_text};

/// Longest log that travels along with a container that writes to a regular file.
pub const MAX_STREAM: u64 = 1 << 30;
/// How long it may be when the container is frozen: much may be written to it while memory goes.
pub const MAX_GROWN: u64 = 2 * MAX_STREAM;

/// Tells whether a log can still go along, as long as it is by now.
///
/// # Errors
/// Says which, and what to do about it.
pub fn check_length(target: &str, length: u64) -> Result<()> {
    if length <= MAX_GROWN {
        return Ok(());
    }
    Err(advice(
        format!("the log {target} has grown to {length} bytes; at most {MAX_GROWN} go along"),
        "rotate it by copy and truncate, and try again",
    ))
}

/// The streams of a container.
#[derive(Debug, Default)]
pub struct Standard {
    /// For the destination.
    pub streams: Vec<Stream>,
    /// In the directories of logs outside of the container.
    pub probes: Vec<probe::ProbeFile>,
    /// Those logs, by the number of their stream, to be read again.
    pub logs: Vec<Option<File>>,
}

/// Where a regular file lies.
#[derive(Debug)]
enum Lies {
    /// In the container, or in no file system at all.
    Within,
    /// On this host: the directory that has it, and its place.
    Here(OwnedFd, String),
}

/// Looks at the streams of a container's init, and whether they can go along. Logs outside the
/// container get a probe in their directory. `tasks` are all of the container.
///
/// # Errors
/// What stands in the way.
pub fn look(init: i32, tasks: &[i32]) -> Result<Standard> {
    let mut found = Standard::default();
    let mut mounts = None;
    for number in 0..3 {
        let (mut stream, mut log) = (Stream::default(), None);
        // A closed stream stays closed.
        if let Some(file) = open(Path::new(&format!("/proc/{init}/fd/{number}")))? {
            let target = fs::read_link(process::path_of(&file))?;
            stream.target = target.to_string_lossy().into_owned();
            if file.metadata()?.is_file() {
                let mounts = mounts.get_or_insert_with(|| MountNumbers::look(init, tasks));
                if let Lies::Here(directory, place) = lies(&file, mounts)? {
                    let probe = describe(&mut stream, &file, directory, place)?;
                    found.probes.push(probe);
                    log = Some(file);
                }
            }
        }
        found.streams.push(stream);
        found.logs.push(log);
    }
    Ok(found)
}

/// Returns what a descriptor of another process leads to, only to be looked at: None if it is closed.
fn open(path: &Path) -> Result<Option<File>> {
    let how = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    match how {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        other => Ok(Some(other.with_context(|| format!("cannot look at {}", path.display()))?)),
    }
}

/// Mounts, by the numbers that the kernel gives them: each is one mount's for as long as a file is
/// open in it. proc_pid_mountinfo(5)
#[derive(Debug, Default)]
struct MountNumbers {
    /// In any namespace of the container.
    within: HashSet<u64>,
    /// In Ferry's own, or in that of the host's first process: Ferry may have been given another.
    here: HashSet<u64>,
}

impl MountNumbers {
    fn look(init: i32, tasks: &[i32]) -> MountNumbers {
        let mut mounts = MountNumbers::default();
        let mut seen = HashSet::new();
        for pid in std::iter::once(&init).chain(tasks) {
            // Whoever has ended meanwhile has none.
            let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt"));
            if namespace.is_ok_and(|namespace| seen.insert(namespace)) {
                mounts.within.extend(numbers(&proc_text(*pid, "mountinfo").unwrap_or_default()));
            }
        }
        for pid in [std::process::id() as i32, 1] {
            mounts.here.extend(numbers(&proc_text(pid, "mountinfo").unwrap_or_default()));
        }
        mounts
    }
}

fn numbers(mountinfo: &str) -> impl Iterator<Item = u64> {
    mountinfo.lines().filter_map(|line| line.split(' ').next()?.parse().ok())
}

/// The mount that a file was opened through. proc_pid_fdinfo(5)
fn mount_of(file: &File) -> Result<u64> {
    let name = process::path_of(file);
    let info = fs::read_to_string(
        Path::new("/proc/self/fdinfo").join(name.file_name().unwrap_or_default()),
    )?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    number.and_then(|n| n.trim().parse().ok()).context("no mnt_id in fdinfo")
}

fn lies(file: &File, mounts: &MountNumbers) -> Result<Lies> {
    let mount = mount_of(file)?;
    // CRIU finds it, whatever it is called.
    if mounts.within.contains(&mount) || is_memory(file) {
        return Ok(Lies::Within);
    }
    let target = fs::read_link(process::path_of(file))?;
    if !mounts.here.contains(&mount) {
        return Err(Problem::new(
            "a standard stream is a file that is neither in the container nor on this host",
            format!(
                "{target:?} belongs to no mount that either of them sees: the container may have \
                 changed its root or unmounted something"
            ),
        )
        .hint("start the container with its output on a pipe, or on a file that stays")
        .into());
    }
    let (directory, place) = place(file, target)?;
    Ok(Lies::Here(directory, place))
}

/// Tells whether it is a memfd: such files have no place. memfd_create(2)
fn is_memory(file: &File) -> bool {
    let device = |file: &File| file.metadata().map(|meta| meta.dev()).ok();
    let ours = memfd_create(c"ferry", MFdFlags::MFD_CLOEXEC).map(File::from);
    ours.is_ok_and(|ours| device(&ours).is_some() && device(&ours) == device(file))
}

/// The directory and the place of a file of this host, if it is what stands there.
fn place(file: &File, target: PathBuf) -> Result<(OwnedFd, String)> {
    let refuse = |what: &str, why: String| {
        Problem::new(format!("a standard stream is a file {what}"), why)
            .hint("start the container with its output on a pipe, or on a file that stays")
    };
    let meta = file.metadata()?;
    if meta.nlink() == 0 {
        let why = format!("{target:?} has no name any more, so it cannot be found over there");
        return Err(refuse("that has been deleted", why).into());
    }

    let Ok(place) = OsString::from(&target).into_string() else {
        let why = format!("{target:?} is not in UTF-8, as a plan is");
        return Err(refuse("whose name cannot be told to another host", why).into());
    };
    let inode = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
    let stands = || {
        let directory = directory::open(target.parent()?).ok()?;
        let found = directory::find(&directory, target.file_name()?).ok()??;
        (inode(&found).is_some() && inode(&found) == inode(file)).then_some(directory)
    };

    let Some(directory) = stands() else {
        let why = format!("it seems to be {target:?}, but what is there now is something else");
        return Err(refuse("that has lost its name", why).into());
    };

    Ok((directory, place))
}

/// Takes down what the destination has to know of a log of this host.
fn describe(
    stream: &mut Stream,
    file: &File,
    directory: OwnedFd,
    place: String,
) -> Result<probe::ProbeFile> {
    let meta = file.metadata()?;
    if meta.size() > MAX_STREAM {
        return Err(Problem::new(
            format!("the log {place} is too long to go along"),
            format!("{} bytes; at most {MAX_STREAM} are carried", meta.size()),
        )
        .hint("rotate it by copy and truncate")
        .into());
    }
    let probe = probe::make_in(directory)?;
    stream.proof = Some(probe.proof.clone());
    stream.external = Some(format!("file[{:x}:{:x}]", mount_of(file)?, meta.ino()));
    stream.target = place;
    stream.size = meta.size();
    stream.mode = meta.mode() & 0o7777;
    stream.owner = (meta.uid(), meta.gid());
    Ok(probe)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    /// A file, as it is found in a process that has it open.
    fn found(file: &File) -> File {
        open(&process::path_of(file)).unwrap().unwrap()
    }

    fn mounts(within: &[u64], here: &[u64]) -> MountNumbers {
        let set = |list: &[u64]| list.iter().copied().collect();
        MountNumbers { within: set(within), here: set(here) }
    }

    /// Returns what is said of a file on a mount of this host.
    fn refused(file: &File) -> String {
        let file = found(file);
        let mounts = mounts(&[], &[mount_of(&file).unwrap()]);
        lies(&file, &mounts).unwrap_err().downcast::<Problem>().unwrap().what
    }

    #[test]
    fn the_mount_decides_and_not_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("log");
        let file = found(&File::create(&path).unwrap());
        let mount = mount_of(&file).unwrap();
        assert!(matches!(lies(&file, &mounts(&[mount], &[])).unwrap(), Lies::Within));
        // CRIU sees it, so nobody else has to.
        assert!(matches!(lies(&file, &mounts(&[mount], &[mount])).unwrap(), Lies::Within));
        let own = MountNumbers::look(std::process::id() as i32, &[]);
        assert!(own.within.contains(&mount) && own.here.contains(&mount));
        let Lies::Here(_, place) = lies(&file, &mounts(&[], &[mount])).unwrap() else {
            panic!("it is on this host");
        };
        assert_eq!(Path::new(&place), path);
        // Though the very file stands in that place here: as with a volume that the container
        // has under the same name.
        let said = lies(&file, &mounts(&[], &[mount + 1])).unwrap_err();
        assert!(said.downcast::<Problem>().unwrap().what.contains("neither in the container"));
    }

    #[test]
    fn what_does_not_bear_its_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &[u8]| dir.path().join(std::ffi::OsStr::from_bytes(name));
        let file = File::create(at(b"log\xff")).unwrap();
        assert!(refused(&file).contains("cannot be told"));
        // As after a rename between two looks: something else bears the name.
        fs::rename(at(b"log\xff"), at(b"log")).unwrap();
        let (file, target) = (found(&file), at(b"log").canonicalize().unwrap());
        assert!(place(&file, target.clone()).is_ok());
        fs::rename(&target, at(b"other")).unwrap();
        assert!(place(&file, target.clone()).is_err(), "nothing does");
        File::create(&target).unwrap();
        assert!(place(&file, target.clone()).is_err(), "another file does");
        fs::remove_file(&target).unwrap();
        std::os::unix::fs::symlink(at(b"other"), &target).unwrap();
        assert!(place(&file, target).is_err(), "a link does");
        let beside = at(b"beside");
        std::os::unix::fs::symlink(dir.path(), &beside).unwrap();
        assert!(place(&file, beside.join("other")).is_err(), "behind a link");
        fs::remove_file(at(b"other")).unwrap();
        assert!(refused(&file).contains("deleted"));
    }

    #[test]
    fn what_has_no_place_is_nobodys_log() {
        let mut memory = File::from(memfd_create(c"out", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.write_all(b"x").unwrap();
        assert!(matches!(lies(&found(&memory), &mounts(&[], &[])).unwrap(), Lies::Within));
    }

    #[test]
    fn numbers_are_those_of_mounts() {
        let text = "25 1 254:0 / / rw - ext4 /dev/vda rw\n\
            31 25 0:26 /a\\040b /x rw shared:1 - tmpfs t rw\n\nodd line\n";
        assert_eq!(numbers(text).collect::<Vec<_>>(), [25, 31]);
    }
}
