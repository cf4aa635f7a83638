//! What the container watches (inotify, fanotify) on an overlay. CRIU opens what is watched by its file
//! handle, which an overlay does not allow, and looks then for its inode below paths that it is given: the
//! ones that are found here, while everything runs.
//!
//! On a tmpfs it finds what is watched by its handle; but not what was deleted.
//!
//! CRIU goes through them in order, each with all that is in it, until it has the inode (criu/irmap.c):
//! the deepest come first, and what is below them is counted.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files::OpenFile;
use super::{Scene, directory_in, who};
use crate::files::walk;
use crate::problem::Problem;
use crate::sys::process;

/// Most files below what is watched: CRIU looks at each while the container stands still, some
/// microseconds.
const MOST: u64 = 50_000;

/// A watch, as its fdinfo has it. proc_pid_fdinfo(5)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watch {
    /// Major and minor number.
    device: (u32, u32),
    inode: u64,
}

/// A mount of the container's.
#[derive(Debug, PartialEq, Eq)]
struct WatchedMount {
    device: (u32, u32),
    place: PathBuf,
    kind: String,
    /// CRIU can open a handle there.
    handles: bool,
}

/// What was found out about all watches.
#[derive(Debug, Default)]
struct FoundWatches {
    /// Paths in the container that CRIU is to be given.
    paths: Vec<String>,
    /// Whose watches lead to nothing that has a name.
    lost: Vec<(i32, Watch)>,
    /// A directory below which CRIU cannot be sent.
    wide: Option<String>,
}

/// Paths in the container below which CRIU is to look for what is watched.
pub fn paths(scene: Scene<'_>, open: &[OpenFile]) -> Vec<String> {
    look(scene, open).paths
}

/// Returns what stands in the way.
pub fn problem(scene: Scene<'_>, open: &[OpenFile]) -> Option<Problem> {
    let found = look(scene, open);
    if let Some(wide) = found.wide {
        let why =
            format!("{wide}: CRIU has to look through all of it while the container stands still");
        return Some(
            Problem::new("the container watches directories with very much in them (inotify)", why)
                .hint("have the program watch less, or start it anew over there"),
        );
    }

    // What was deleted or made while we looked is not meant.
    let again = if found.lost.is_empty() { return None } else { look(scene, open).lost };
    let (pid, _) = found.lost.into_iter().find(|lost| again.contains(lost))?;

    Some(
        Problem::new(
            "the container watches what CRIU cannot find by a name (inotify)",
            format!(
                "{} does: a file that was deleted, one in /proc, or on an overlay whose layers are on \
                 several disks",
                who(pid)
            ),
        )
        .hint("have the program end the watch, or start it anew over there"),
    )
}

fn look(scene: Scene<'_>, open: &[OpenFile]) -> FoundWatches {
    let watches: Vec<(i32, Watch)> = open
        .iter()
        .filter(|open| is_watcher(&open.target))
        .filter_map(|open| {
            let text = process::proc_text(open.pid, &format!("fdinfo/{}", open.number)).ok()?;
            Some(
                text.lines()
                    .filter_map(watch_in)
                    .map(|watch| (open.pid, watch))
                    .collect::<Vec<_>>(),
            )
        })
        .flatten()
        .collect();
    let mut found = FoundWatches::default();

    if watches.is_empty() {
        return found;
    }

    let text = process::proc_text(scene.init, "mountinfo").unwrap_or_default();
    let mut seen = HashSet::new();
    let mounts = text.lines().filter_map(mount_in);
    for mount in mounts.filter(|mount| !mount.handles || mount.kind == "tmpfs") {
        // The same file system at several places is looked through once.
        let here = watches.iter().copied().filter(|(_, watch)| watch.device == mount.device);
        let here: Vec<(i32, Watch)> = here.collect();
        if here.is_empty() || !seen.insert(mount.device) {
            continue;
        }

        if mount.kind == "proc" {
            found.lost.extend(here);
            continue;
        }
        let wanted: HashSet<u64> = here.iter().map(|(_, watch)| watch.inode).collect();
        let names = names(scene.init, &mount, &wanted);
        if mount.handles {
            // CRIU finds it by its handle, if it has a name at all.
            let names =
                names.unwrap_or_else(|_| wanted.iter().map(|i| (*i, String::new())).collect());
            let lost = |(_, watch): &(i32, Watch)| !names.contains_key(&watch.inode);
            found.lost.extend(here.into_iter().filter(lost));
            continue;
        }

        match names {
            Ok(names) => {
                let lost = |(_, watch): &(i32, Watch)| !names.contains_key(&watch.inode);
                found.lost.extend(here.into_iter().filter(lost));
                // CRIU knows the topmost directory by itself.
                let paths = names.into_values().filter(|path| path != "/");
                found.paths.extend(paths);
            }
            Err(e) => found.wide = Some(format!("{e:#}")),
        }
    }

    found.paths.sort_by_key(|path| (std::cmp::Reverse(path.matches('/').count()), path.clone()));
    found.paths.dedup();
    found
}

/// The names in the container that lead to these inodes of a mount.
fn names(
    init: i32,
    mount: &WatchedMount,
    wanted: &HashSet<u64>,
) -> anyhow::Result<HashMap<u64, String>> {
    let root = process::root_of(init);
    let Some(directory) = directory_in(&root, &mount.place) else { return Ok(HashMap::new()) };
    let top = process::path_of(&directory);
    let mut found = HashMap::new();
    let mut keep = |inode: u64, path: PathBuf| {
        // The paths are texts in CRIU's protocol.
        if let Ok(path) = path.into_os_string().into_string() {
            found.insert(inode, path);
        }
    };
    let own = fs::metadata(&top)?.ino();
    if wanted.contains(&own) {
        keep(own, mount.place.clone());
    }
    for (inode, name) in walk::names_of(&top, wanted, MOST)? {
        keep(inode, mount.place.join(name));
    }
    Ok(found)
}

fn is_watcher(target: &Path) -> bool {
    [Path::new("anon_inode:inotify"), Path::new("anon_inode:[fanotify]")].contains(&target)
}

/// `inotify wd:1 ino:5f8 sdev:fd00001 mask:…`, all of it hexadecimal; a device as the kernel has it.
fn watch_in(line: &str) -> Option<Watch> {
    if !line.starts_with("inotify ") && !line.starts_with("fanotify ino:") {
        return None;
    }
    let field = |name: &str| {
        let value = line.split(' ').find_map(|field| field.strip_prefix(name))?;
        u64::from_str_radix(value, 16).ok()
    };
    let device = u32::try_from(field("sdev:")?).ok()?;
    Some(Watch { device: (device >> 20, device & 0xf_ffff), inode: field("ino:")? })
}

/// A line of proc_pid_mountinfo(5).
fn mount_in(line: &str) -> Option<WatchedMount> {
    let (left, right) = line.split_once(" - ")?;
    let mut fields = left.split(' ');
    let (major, minor) = fields.nth(2)?.split_once(':')?;
    let place = PathBuf::from(super::mounts::unescape(fields.nth(1)?));
    let mut fields = right.split(' ');
    let kind = fields.next()?.to_owned();
    let options = fields.nth(1).unwrap_or_default();
    let exported = options.split(',').any(|option| option == "nfs_export=on");
    let handles = !(kind == "proc" || kind == "overlay" && !exported);
    Some(WatchedMount { device: (major.parse().ok()?, minor.parse().ok()?), place, kind, handles })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    const WATCH: &str = "inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 \
                         fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d";
    const MOUNT: &str = "31 30 0:41 / /a\\040b rw,nosuid - overlay o rw,lowerdir=/l,nfs_export=on";

    #[test]
    fn watches_and_mounts_are_read() {
        assert_eq!(watch_in(WATCH), Some(Watch { device: (8, 0x13), inode: 0x9e7e }));
        let fanotify = "fanotify ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:40000000";
        assert_eq!(watch_in(fanotify).map(|watch| watch.inode), Some(0x4f969));
        for other in ["pos:\t0", "fanotify flags:10 event-flags:0", "fanotify mnt_id:12 mask:3b"] {
            assert_eq!(watch_in(other), None, "{other}");
        }
        let mount = mount_in(MOUNT).unwrap();
        assert_eq!((mount.device, mount.place.to_str()), ((0, 41), Some("/a b")));
        assert!(mount.handles);
        assert!(!mount_in(&MOUNT.replace(",nfs_export=on", "")).unwrap().handles);
        assert!(mount_in("1 0 8:1 / / rw - ext4 /dev/vda rw").unwrap().handles);
    }

    #[test]
    fn fuzz_watches() {
        Target::new("watches").sample(WATCH).sample(MOUNT).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let watches = text.lines().filter_map(watch_in).count();
            found(&[watches.min(9), text.lines().filter_map(mount_in).count().min(9)])
        });
    }
}
