//! What the container's tasks have open of the world outside of it, and would stay behind: other ends of pipes and
//! of unix connections, files that lie in none of the container's mounts.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::files::OpenFile;
use super::{Scene, who};
use crate::network::unix;
use crate::problem::Problem;
use crate::sys::{process, tmpfs};

/// Everything of that kind. The first process's standard streams are looked at elsewhere.
pub fn problems(scene: Scene<'_>, open: &[OpenFile]) -> Vec<Problem> {
    let standard = open.iter().filter(|one| one.pid == scene.init && one.number <= 2);
    let standard: HashSet<&Path> = standard.map(|one| one.target.as_path()).collect();
    let others: Vec<&OpenFile> =
        open.iter().filter(|one| !standard.contains(&*one.target)).collect();
    let mut found = Vec::new();
    found.extend(file(scene, &others));

    let mut ends = half_pipes(&others);
    ends.extend(foreign_peers(scene, open, &others));
    found.extend(other_end(scene, &ends));
    found
}

/// A file in none of the container's mounts, which it was given from outside.
fn file(scene: Scene<'_>, open: &[&OpenFile]) -> Option<Problem> {
    let numbers = |pid: i32| -> HashSet<String> {
        let info = process::proc_text(pid, "mountinfo").unwrap_or_default();
        info.lines().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
    };
    let (first, mut all) = (numbers(scene.init), None);
    let one = open.iter().find(|one| {
        // The kernel's own mounts are nobody's: memory, which has no name, and message queues.
        let nameless = one.target.to_str().is_none_or(|name| name.ends_with(" (deleted)"));
        if !one.target.is_absolute() || nameless {
            return false;
        }

        let Some(mount) = one.info("mnt_id").filter(|mount| !first.contains(mount)) else {
            return false;
        };
        let is_file = fs::metadata(one.path()).is_ok_and(|meta| meta.is_file() || meta.is_dir());

        // Some have mounts of their own.
        let all = all.get_or_insert_with(|| {
            scene.tasks.iter().flat_map(|pid| numbers(*pid)).collect::<HashSet<String>>()
        });
        let queue = || tmpfs::is_message_queue(&one.path()).unwrap_or(false);
        is_file && !all.is_empty() && !all.contains(&mount) && !queue()
    })?;

    Some(
        Problem::new(
            format!(
                "the container has a file open that lies outside of it: {}",
                one.target.display()
            ),
            format!(
                "{} was given it when it was started, as descriptor {}; CRIU cannot find it",
                who(one.pid),
                one.number
            ),
        )
        .hint("have the program close it, or mount the file into the container"),
    )
}

/// What is open of something that has two ends, and the name of the other one's descriptor.
type OpenEnd<'a> = (&'a OpenFile, PathBuf);

/// Pipes of which the container has one end only.
fn half_pipes<'a>(open: &[&'a OpenFile]) -> Vec<OpenEnd<'a>> {
    let mut pipes: HashMap<&Path, (bool, bool, &OpenFile)> = HashMap::new();
    for one in open.iter().filter(|one| one.is_pipe()) {
        let flags = one.info("flags").and_then(|flags| i32::from_str_radix(&flags, 8).ok());
        let Some(flags) = flags else { continue };
        let (reads, writes, _) = pipes.entry(&one.target).or_insert((false, false, one));
        *reads |= flags & libc::O_ACCMODE != libc::O_WRONLY;
        *writes |= flags & libc::O_ACCMODE != libc::O_RDONLY;
    }
    let half = pipes.into_iter().filter(|(_, (reads, writes, _))| !reads || !writes);
    half.map(|(name, (_, _, one))| (one, name.to_owned())).collect()
}

/// Unix connections whose other end none of the tasks has.
fn foreign_peers<'a>(
    scene: Scene<'_>,
    all: &[OpenFile],
    open: &[&'a OpenFile],
) -> Vec<OpenEnd<'a>> {
    let own: HashSet<u64> = all.iter().filter_map(OpenFile::socket).collect();
    if own.is_empty() {
        return Vec::new();
    }
    let peers = unix::peers(scene.init).unwrap_or_default();
    let peers: HashMap<u64, u32> =
        peers.into_iter().map(|(socket, peer)| (socket.into(), peer)).collect();
    let foreign = open.iter().filter_map(|one| {
        let peer = *peers.get(&one.socket()?)?;
        let foreign = peer != 0 && !own.contains(&u64::from(peer));
        foreign.then(|| (*one, format!("socket:[{peer}]").into()))
    });
    foreign.collect()
}

/// The first of these whose other end somebody outside of the container has. What was opened or closed while
/// we looked, nobody has.
fn other_end(scene: Scene<'_>, ends: &[OpenEnd<'_>]) -> Option<Problem> {
    if ends.is_empty() {
        return None;
    }
    let names: HashMap<&Path, &OpenFile> = ends.iter().map(|(one, name)| (&**name, *one)).collect();
    let group = |pid: i32| process::proc_text(pid, "cgroup").ok();
    let own = group(scene.init);
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(number);
    let others = all.filter(|pid| !scene.tasks.contains(pid) && group(*pid) != own);

    let (one, holder) = others.into_iter().find_map(|pid| {
        let list = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let target = list.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut known = target.filter_map(|target| names.get(&*target).copied());
        known.next().map(|one| (one, pid))
    })?;

    let what = if one.is_pipe() { "pipe" } else { "unix connection" };
    Some(
        Problem::new(
            format!("the container has a {what} to somebody outside of it"),
            format!(
                "descriptor {} of {}; {} of this host has the other end, and would stay behind",
                one.number,
                who(one.pid),
                who(holder)
            ),
        )
        .hint("end the connection (a client of docker's or systemd's socket, syslog …), or have both in the container"),
    )
}
