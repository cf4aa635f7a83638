//! The container's tmpfs mounts, carried by Ferry instead of CRIU.
//!
//! CRIU runs `tar` for each of them, on both sides, inside the freeze: 5 ms and 5 ms for an empty
//! one, and a plain runc container has five (/dev, /dev/shm, /run, a mask, …). So they are declared
//! external: on the source CRIU only notes them, Ferry reads their contents; on the destination
//! Ferry mounts fresh ones ahead of time, fills them, and CRIU binds them into place. One that the container
//! has at several places (runc masks directories so) is one over there, too.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

use super::tree::{NameCount, fits};
use super::walk::walk_one_mount;
use crate::sys::process;

/// Most of them in one container.
pub const MAX: usize = 256;

/// A tmpfs of the container's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Where the container has it.
    pub place: String,
    /// Further places of it.
    #[serde(default)]
    pub also: Vec<String>,
    /// Its own options (size, mode …), tmpfs(5).
    pub options: Vec<String>,
    /// Bytes in it when it was looked at: they go along, and the destination must have room.
    #[serde(default)]
    pub used: u64,
}

impl Tmpfs {
    /// Everywhere that the container has it.
    pub fn places(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.place).chain(&self.also)
    }
}

/// Finds, in the mountinfo of a task of the container (proc_pid_mountinfo(5)), the tmpfs mounts
/// that can be carried so: whole, and not tied to other mounts by propagation. The others
/// are left to CRIU. `bound` are the bind mounts of the configuration, which come from the host, as do the
/// `masked` files that the runtime binds `/dev/null` over: files of a tmpfs that are bound elsewhere are no
/// reason to leave it to CRIU where the runtime declares them external.
pub fn find(mountinfo: &str, bound: &[PathBuf], masked: &[String]) -> Vec<Tmpfs> {
    struct TmpfsLine<'a> {
        device: &'a str,
        root: &'a str,
        place: &'a str,
        tied: bool,
        kind: &'a str,
        options: &'a str,
    }

    let lines: Vec<TmpfsLine> = mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(2);
            let (device, root, place) = (left.next()?, left.next()?, left.next()?);
            let tied = left.skip(1).any(|o| o.starts_with("shared:") || o.starts_with("master:"));
            let mut right = right.split(' ');
            let (kind, options) = (right.next()?, right.nth(1)?);
            Some(TmpfsLine { device, root, place, tied, kind, options })
        })
        .collect();
    let (mut devices, mut places) = (HashMap::<&str, Vec<&TmpfsLine>>::new(), HashMap::new());

    for line in &lines {
        devices.entry(line.device).or_default().push(line);
        *places.entry(line.place).or_insert(0) += 1;
    }
    let bound: HashSet<&Path> = bound.iter().map(PathBuf::as_path).collect();
    let masked: HashSet<&str> = masked.iter().map(String::as_str).collect();
    let is_bound = |place: &str| bound.contains(Path::new(place));

    // A second mount over the first hides it; CRIU knows how to tell them apart. Blanks and the like are
    // escaped: rare enough for CRIU's way.
    let is_plain = |l: &TmpfsLine| {
        let alone = places[l.place] == 1;
        l.place != "/" && !l.tied && alone && !is_bound(l.place) && !l.place.contains('\\')
    };

    let mut found = Vec::new();
    for line in lines.iter().filter(|l| l.kind == "tmpfs" && l.root == "/") {
        // All of it is told at its first place.
        let Some(all) = devices.remove(line.device) else { continue };
        let carried = all.iter().all(|other| match other.root {
            "/" => is_plain(other),
            _ => is_bound(other.place) || masked.contains(other.place),
        });
        let mut whole = all.iter().filter(|l| l.root == "/").map(|l| l.place.to_owned());
        if let (true, Some(place)) = (carried, whole.next()) {
            let options = line.options.split(',').filter(|o| known(o)).map(str::to_owned).collect();
            found.push(Tmpfs { place, also: whole.collect(), options, used: 0 });
        }
    }

    found.into_iter().filter(|one| one.also.len() < MAX).take(MAX).collect()
}

/// Options that a tmpfs may be mounted with.
fn known(option: &str) -> bool {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let plain = value.len() <= 24 && value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'%');
    matches!(
        name,
        "size"
            | "nr_inodes"
            | "nr_blocks"
            | "mode"
            | "uid"
            | "gid"
            | "huge"
            | "inode32"
            | "inode64"
            | "noswap"
    ) && plain
}

/// Opens a tmpfs of the container from outside, never following a link out of its root: openat2(2).
///
/// # Errors
/// When there is none of that name.
pub fn open_in(root: &Path, place: &str) -> Result<OwnedFd> {
    let root = fs::File::open(root)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_IN_ROOT
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let found = openat2(&root, place, OpenHow::new().flags(flags).resolve(resolve))?;
    if fstatfs(&found)?.filesystem_type() != TMPFS_MAGIC {
        bail!("it is no tmpfs any more");
    }
    Ok(found)
}

/// Takes down how much is in each; what cannot be looked at counts for nothing.
///
/// # Errors
/// When there is more in one than can be carried, or in all of them together.
pub fn measure(root: &Path, list: &mut [Tmpfs]) -> Result<()> {
    let mut names = NameCount::default();
    for tmpfs in list {
        let Ok(found) = open_in(root, &tmpfs.place) else { continue };
        tmpfs.used =
            fstatfs(&found).map_or(0, |s| (s.blocks() - s.blocks_free()) * s.block_size() as u64);
        let device = fstat(&found).map_or(0, |stat| stat.st_dev);
        let look = walk_one_mount(&process::path_of(&found), &mut |path, full, seen| {
            names.add(path)?;
            // What is mounted in it goes its own way, and may answer to nobody.
            if seen.device == device {
                fits(path, full)?;
            }
            Ok(true)
        });
        look.with_context(|| format!("the tmpfs {} cannot be carried", tmpfs.place))?;
    }
    Ok(())
}

/// Refuses what no honest source sends.
///
/// # Errors
/// Says what is wrong.
pub fn validate(list: &[Tmpfs]) -> Result<()> {
    if list.len() > MAX {
        bail!("{} tmpfs mounts, more than {MAX}", list.len());
    }
    for tmpfs in list {
        if tmpfs.also.len() >= MAX {
            bail!("a tmpfs at {} places, more than {MAX}", tmpfs.also.len() + 1);
        }
        if let Some(odd) = tmpfs.places().find(|p| !p.starts_with('/') || p.len() > 4096) {
            bail!("{odd:?} is no mount point");
        }
        if let Some(odd) = tmpfs.options.iter().find(|o| !known(o)) {
            bail!("{odd:?} is no option of a tmpfs");
        }
    }
    Ok(())
}

/// Fresh ones on the destination, waiting to be bound into the container. Taken down on drop: what
/// the container has by then stays with it.
#[derive(Debug)]
pub struct MountedTmpfs {
    base: PathBuf,
}

impl MountedTmpfs {
    /// Mounts them below `base`, which is made.
    ///
    /// # Errors
    /// When one cannot be mounted; those before it are gone then.
    pub fn new(base: &Path, list: &[Tmpfs]) -> Result<MountedTmpfs> {
        let what = || format!("cannot mount a tmpfs below {}", base.display());
        fs::create_dir(base).with_context(what)?;
        let mounted = MountedTmpfs { base: base.to_owned() };
        for (i, tmpfs) in list.iter().enumerate() {
            let place = mounted.place(i);
            fs::create_dir(&place).with_context(what)?;
            let options = tmpfs.options.join(",");
            mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::MS_NOSUID, Some(options.as_str()))
                .with_context(what)?;
            // The container's must not be tied to this one, nor this one to the host's others.
            let private = MsFlags::MS_PRIVATE;
            mount(None::<&str>, &place, None::<&str>, private, None::<&str>).with_context(what)?;
        }
        Ok(mounted)
    }

    /// Returns where the n-th is.
    pub fn place(&self, n: usize) -> PathBuf {
        self.base.join(n.to_string())
    }
}

impl Drop for MountedTmpfs {
    fn drop(&mut self) {
        unmount_all(&self.base);
    }
}

/// Takes down whatever is mounted below `base`. Never removes a file: what is mounted there may be
/// a running container's.
pub fn unmount_all(base: &Path) {
    let Ok(list) = fs::read_dir(base) else { return };
    for entry in list.flatten() {
        // EINVAL where nothing is mounted.
        let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(base);
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "\
30 1 0:40 / / rw - overlay overlay rw
31 30 0:41 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64
32 31 0:42 / /dev/pts rw - devpts devpts rw
33 31 0:43 / /dev/shm rw - tmpfs shm rw,size=65536k
34 30 0:44 / /run rw master:5 - tmpfs tmpfs rw
35 30 0:45 /sub /sub rw - tmpfs tmpfs rw
36 30 0:46 / /secrets rw - tmpfs tmpfs rw
37 30 0:47 / /twice rw - tmpfs tmpfs rw
38 30 0:47 / /again rw - tmpfs tmpfs rw
39 30 0:48 / /with\\040blank rw - tmpfs tmpfs rw";

    #[test]
    fn only_whole_and_untied_ones_are_taken() {
        let found = find(INFO, &["/secrets".into()], &[]);
        let places: Vec<Vec<&String>> = found.iter().map(|t| t.places().collect()).collect();
        assert_eq!(places, [vec!["/dev"], vec!["/dev/shm"], vec!["/twice", "/again"]]);
        assert_eq!(found[0].options, ["size=65536k", "mode=755", "inode64"]);
        validate(&found).unwrap();
        let bound = find(INFO, &["/secrets".into(), "/again".into()], &[]);
        assert_eq!(
            bound.len(),
            2,
            "of the host's own nothing is carried, wherever it is mounted, too"
        );
    }

    #[test]
    fn files_that_are_masked_by_its_null_keep_dev_from_nothing() {
        let info = format!(
            "{INFO}\n40 30 0:41 /null /proc/keys rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64\n"
        );
        let places = |masked: &[String]| -> Vec<String> {
            find(&info, &["/secrets".into()], masked).into_iter().map(|t| t.place).collect()
        };
        assert_eq!(
            places(&["/proc/kcore".into(), "/proc/keys".into()]),
            ["/dev", "/dev/shm", "/twice"]
        );
        assert_eq!(places(&[]), ["/dev/shm", "/twice"]);
    }

    #[test]
    fn strange_options_are_refused() {
        let odd = |o: &str| {
            validate(&[Tmpfs {
                place: "/x".into(),
                also: vec![],
                options: vec![o.into()],
                used: 0,
            }])
        };
        assert!(odd("size=1m").is_ok());
        assert!(odd("context=x").is_err());
        assert!(odd("size=1,uid=0").is_err());
        let at = |also: Vec<String>| {
            validate(&[Tmpfs { place: "/x".into(), also, options: vec![], used: 0 }])
        };
        assert!(at(vec!["/y".into()]).is_ok());
        assert!(at(vec!["y".into()]).is_err() && at(vec!["/y".into(); MAX]).is_err());
    }
}
