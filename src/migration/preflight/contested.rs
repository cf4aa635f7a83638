//! Locks that the destination cannot take as long as the source has them: exclusive ones, of files that
//! both hosts see. CRIU would wait for such a lock in the middle of the restore, and the source for the
//! destination.
//!
//! Which files those are is known when the destination has said what is to be copied. Programs lock for
//! moments, too: beforehand only a lock counts that was seen twice, in the freeze any.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::source_checks::SourceContainer;
use crate::files::overlay::plain;
use crate::migration::protocol::Place;
use crate::problem::Problem;
use crate::sys::process::{proc_head, proc_text};
use crate::tasks::locks::FoundLock;

/// File systems that no two hosts share.
const OWN: [&str; 7] = ["tmpfs", "ramfs", "devtmpfs", "mqueue", "hugetlbfs", "proc", "sysfs"];

/// Returns what stands in the way of these locks, all in one.
pub fn problem(subject: &SourceContainer, locks: &[FoundLock]) -> Option<Problem> {
    let places = Places::of(subject);
    let mut mounts = HashMap::new();
    let mut files: Vec<(PathBuf, &FoundLock)> = Vec::new();
    for found in locks.iter().filter(|found| found.held.lock.write) {
        let mounts = mounts.entry(found.pid).or_insert_with(|| mounts_of(found.pid));
        let file = places.shared(found, mounts);
        files
            .extend(file.filter(|f| files.iter().all(|(known, _)| known != f)).map(|f| (f, found)));
    }

    let (file, found) = files.first()?;
    let comm = proc_text(found.pid, "comm").unwrap_or_default();
    let more = match files.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more files"),
    };
    let problem = Problem::new(
        format!("the container holds a lock on {}{more}, which both hosts see", file.display()),
        format!(
            "process {} ({}) has it ({}), and the other host cannot get it before it is gone here",
            found.pid,
            comm.trim(),
            found.held.lock
        ),
    );

    Some(problem.hint(
        "have the file on storage of this host's own, which is copied; or have the program let go of \
         the lock for the time",
    ))
}

/// A mount of a task: its type, and where it is.
struct TaskMount {
    kind: String,
    place: PathBuf,
}

/// By their numbers. proc_pid_mountinfo(5)
fn mounts_of(pid: i32) -> HashMap<u64, TaskMount> {
    // Whoever has ended meanwhile has none.
    let text = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    text.split(|b| *b == b'\n').filter_map(parse).collect()
}

fn parse(line: &[u8]) -> Option<(u64, TaskMount)> {
    use std::os::unix::ffi::OsStringExt;
    let middle = line.windows(3).position(|w| w == b" - ")?;
    let mut left = line[..middle].split(|b| *b == b' ');
    let number = std::str::from_utf8(left.next()?).ok()?.parse().ok()?;
    let place = std::ffi::OsString::from_vec(plain(left.nth(3)?)).into();
    let kind = line[middle + 3..].split(|b| *b == b' ').next()?;
    Some((number, TaskMount { kind: String::from_utf8_lossy(kind).into_owned(), place }))
}

/// What is where in the container, and whether both hosts see it.
struct Places {
    list: Vec<(PathBuf, bool)>,
    /// CRIU's keys of logs outside the container that both hosts see.
    logs: Vec<String>,
}

impl Places {
    fn of(subject: &SourceContainer) -> Places {
        let mounts = subject.bundle.config["mounts"].as_array().into_iter().flatten();
        // The container's own, unless a probe says more below.
        let own = mounts.filter_map(|m| Some((m["destination"].as_str()?.into(), false)));
        let mut list: Vec<(PathBuf, bool)> = own.collect();
        let probes = &subject.plan.probes;
        let here = |number: usize| probes.get(number)?.place.path(&subject.bundle);
        let copies: Vec<PathBuf> = subject.copies.iter().filter_map(|n| here(*n)).collect();
        for (number, probe) in probes.iter().enumerate() {
            // One inside of another goes along with that.
            let path = here(number).unwrap_or_default();
            let copied = copies.iter().any(|copy| path.starts_with(copy));
            let place = match &probe.place {
                Place::Rootfs => Path::new("/"),
                Place::Mount(place) => place,
            };
            list.retain(|(known, _)| known != place);
            list.push((place.to_owned(), !copied));
        }
        let streams = subject.plan.streams.iter().filter(|stream| !stream.sent);
        Places { list, logs: streams.filter_map(|stream| stream.external.clone()).collect() }
    }

    /// The file of a lock, if both hosts see it.
    fn shared(&self, found: &FoundLock, mounts: &HashMap<u64, TaskMount>) -> Option<PathBuf> {
        let FoundLock { pid, held } = found;
        let link = format!("/proc/{pid}/fd/{}", held.number);
        let meta = fs::metadata(&link).ok()?;
        // Over there it is another file.
        if meta.nlink() == 0 {
            return None;
        }
        let info = proc_head(*pid, &format!("fdinfo/{}", held.number)).ok()?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
        let mount: u64 = mount.parse().ok()?;
        let shared = match mounts.get(&mount) {
            Some(mount) => self.sees(mount),
            None => self.logs.contains(&format!("file[{mount:x}:{:x}]", meta.ino())),
        };
        if shared { fs::read_link(link).ok() } else { None }
    }

    /// Tells whether both hosts see what is mounted there.
    fn sees(&self, mount: &TaskMount) -> bool {
        let over = self.list.iter().filter(|(place, _)| mount.place.starts_with(place));
        let Some((place, shared)) = over.max_by_key(|(place, _)| place.components().count()) else {
            return false;
        };
        // What has come below it since, or with it, is not what was looked at.
        *shared && (mount.place == *place || !OWN.contains(&mount.kind.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    #[test]
    fn what_both_hosts_see_is_told_from_the_rest() {
        let place = |place: &str, shared| (PathBuf::from(place), shared);
        let places = |root| Places {
            list: vec![place("/", root), place("/data", true), place("/dev", false)],
            logs: Vec::new(),
        };
        let mount = |line: &str| parse(line.as_bytes()).unwrap().1;
        let at = |place: &str, kind: &str| mount(&format!("7 1 0:9 / {place} rw - {kind} x rw"));
        let copied = places(false);
        assert!(!copied.sees(&at("/", "overlay")) && copied.sees(&at("/data", "nfs4")));
        assert!(copied.sees(&at("/data", "tmpfs")), "where it was proved, the kind says nothing");
        assert!(copied.sees(&at("/data/more", "ext4")) && !copied.sees(&at("/data/more", "tmpfs")));
        assert!(!copied.sees(&at("/database", "ext4")));
        let shared = places(true);
        assert!(shared.sees(&at("/", "overlay")) && !shared.sees(&at("/dev/shm", "tmpfs")));
        assert_eq!(mount("7 1 0:9 / /a\\040b rw - xfs x rw").place, Path::new("/a b"));
    }

    #[test]
    fn fuzz_mounts_of_locks() {
        let line = b"33 30 8:1 /data /sl\\040ave rw master:5 - ext4 /dev/vda rw";
        Target::new("mounts-of-locks").sample(*line).words(&[b" - ", b"\\134"]).run(|bytes| {
            let mount = parse(bytes);
            found(&[mount.map_or(0, |(_, mount)| 1 + mount.kind.len())])
        });
    }
}
