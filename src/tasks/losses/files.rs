//! Open files that a checkpoint stumbles over, or that are something else after it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{Scene, directory_in, mounts, who};
use crate::problem::Problem;
use crate::sys::{process, tmpfs};
use crate::tasks::epoll;

/// How `/proc/PID/fd` shows the descriptor of a seccomp supervisor. seccomp_unotify(2)
const SUPERVISOR: &str = "anon_inode:seccomp notify";

/// An open file of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// Process that has it open.
    pub pid: i32,
    /// Its number there.
    pub number: i32,
    /// What `/proc/PID/fd` says.
    pub target: PathBuf,
}

impl OpenFile {
    /// Its inode, where it is a socket.
    pub fn socket(&self) -> Option<u64> {
        process::socket_inode(&self.target)
    }

    /// Tells whether it is a pipe without a name.
    pub(super) fn is_pipe(&self) -> bool {
        self.inode("pipe:[").is_some()
    }

    fn inode(&self, kind: &str) -> Option<u64> {
        self.target.to_str()?.strip_prefix(kind)?.strip_suffix(']')?.parse().ok()
    }

    fn at(&self) -> (i32, i32) {
        (self.pid, self.number)
    }

    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", self.pid, self.number).into()
    }

    /// A line of its fdinfo. proc_pid_fdinfo(5)
    pub(super) fn info(&self, name: &str) -> Option<String> {
        let text = process::proc_head(self.pid, &format!("fdinfo/{}", self.number)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }
}

/// All open files of these processes. Whoever has ended meanwhile has none.
pub fn all(pids: &[i32]) -> Vec<OpenFile> {
    let mut found = Vec::new();
    for &pid in pids {
        let list = process::open_files(pid).into_iter().flatten();
        found.extend(list.map(|(number, target)| OpenFile { pid, number, target }));
    }
    found
}

/// Everything about open files.
pub fn problems(scene: Scene<'_>, open: &[OpenFile]) -> Vec<Problem> {
    let mut found = Vec::new();
    found.extend(supervisor(open));
    found.extend(of_a_thread(open));
    found.extend(queue(scene, open));
    found.extend(fifos_without_writer(open));
    found.extend(packets(open));
    found.extend(escaped_targets(open));
    found
}

/// A sandbox whose questions somebody in the container answers.
fn supervisor(open: &[OpenFile]) -> Option<Problem> {
    let one = open.iter().find(|open| open.target == Path::new(SUPERVISOR))?;
    Some(
        Problem::new(
            "a process of the container supervises system calls of others (seccomp notification)",
            format!(
                "{} does; CRIU cannot carry it, and what it supervises would hang",
                who(one.pid)
            ),
        )
        .hint("stop it, or have it filter by rules alone"),
    )
}

/// Files of a thread below `/proc`: CRIU opens them before it has made the thread.
fn of_a_thread(open: &[OpenFile]) -> Option<Problem> {
    let one = open.iter().find(|open| is_of_a_thread(&open.target))?;
    Some(
        Problem::new(
            format!("the container has a file of a thread open: {}", one.target.display()),
            format!("{} does; when CRIU opens it, there is no such thread yet", who(one.pid)),
        )
        .hint("have the program close it when it has read it, or read /proc/PID/ of a process"),
    )
}

fn is_of_a_thread(target: &Path) -> bool {
    let Some(rest) = target.to_str().and_then(|target| target.strip_prefix("/proc/")) else {
        return false;
    };
    let mut parts = rest.split('/');
    let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok());
    match (number(parts.next()), parts.next(), number(parts.next())) {
        (Some(process), Some("task"), Some(thread)) => process != thread,
        _ => false,
    }
}

/// Message queues, open or left. mq_overview(7)
fn queue(scene: Scene<'_>, open: &[OpenFile]) -> Option<Problem> {
    let info = process::proc_text(scene.init, "mountinfo").unwrap_or_default();
    let numbers: HashSet<&str> = info.lines().filter_map(|line| line.split(' ').next()).collect();
    let outside = |open: &&OpenFile| open.info("mnt_id").is_some_and(|id| !numbers.contains(&*id));
    let named = open.iter().filter(|open| open.target.is_absolute()).filter(outside);
    let mut queues = named.filter(|open| tmpfs::is_message_queue(&open.path()).unwrap_or(false));
    let hint =
        "have the program close it and remove it (mq_unlink), or use a socket or shared memory";
    if let Some(one) = queues.next() {
        return Some(
            Problem::new(
                format!("the container has the message queue {} open", one.target.display()),
                format!("{} does; CRIU cannot carry it", who(one.pid)),
            )
            .hint(hint),
        );
    }

    let root = PathBuf::from(format!("/proc/{}/root", scene.init));
    let left = mounts::points(&info, "mqueue").into_iter().find_map(|place| {
        let directory = directory_in(&root, Path::new(&place))?;
        let entry = fs::read_dir(process::path_of(&directory)).ok()?.flatten().next()?;
        Some(Path::new(&place).join(entry.file_name()))
    })?;

    Some(
        Problem::new(
            format!("there is a message queue in the container: {}", left.display()),
            "CRIU cannot carry it, nor what waits in it",
        )
        .hint(hint),
    )
}

/// FIFOs with a name that somebody reads and nobody writes to just now: they would be at their end at
/// once and for ever. fifo(7)
fn fifos_without_writer(open: &[OpenFile]) -> Vec<Problem> {
    let mut read = BTreeMap::new();
    let mut written = HashSet::new();
    for one in open.iter().filter(|open| open.target.is_absolute()) {
        let Ok(meta) = fs::metadata(one.path()) else { continue };
        if !meta.file_type().is_fifo() {
            continue;
        }
        let flags = one.info("flags").and_then(|flags| i32::from_str_radix(&flags, 8).ok());
        match flags.map(|flags| flags & libc::O_ACCMODE) {
            Some(libc::O_RDONLY) if flags.is_some_and(|flags| flags & libc::O_PATH == 0) => {
                read.entry((meta.dev(), meta.ino())).or_insert(one);
            }
            Some(libc::O_WRONLY | libc::O_RDWR) => drop(written.insert((meta.dev(), meta.ino()))),
            _ => {}
        }
    }

    let alone = read.into_iter().filter(|(fifo, _)| !written.contains(fifo));
    let problem = |(_, one): (_, &OpenFile)| {
        Problem::new(
            format!("nobody writes to the FIFO {} that the container reads", one.target.display()),
            format!(
                "{} has it open; after CRIU's restore it is at its end, at once and for ever, and a \
                 program that waits for it spins",
                who(one.pid)
            ),
        )
        .hint("have the program open it for reading and writing, as most do who wait for writers")
    };

    alone.map(problem).collect()
}

/// Pipes that keep packets apart: CRIU knows of none, with or without anything in them. pipe(2), O_DIRECT
fn packets(open: &[OpenFile]) -> Option<Problem> {
    let one = open.iter().find(|open| {
        let flags = open.inode("pipe:[").and_then(|_| open.info("flags"));
        let flags = flags.and_then(|flags| i32::from_str_radix(&flags, 8).ok());
        flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
    })?;
    Some(
        Problem::new(
            "the container has a pipe that keeps packets apart (O_DIRECT)",
            format!("{} does; CRIU cannot carry it", who(one.pid)),
        )
        .hint("have the program close it, or use a socket of the kind SOCK_SEQPACKET"),
    )
}

/// Epolls that watch what the first process that has them has no descriptor of: shared over a fork.
fn escaped_targets(open: &[OpenFile]) -> Option<Problem> {
    let find = |open: &[OpenFile]| -> HashMap<(i32, i32), u64> {
        let mut has: HashMap<i32, HashSet<u64>> = HashMap::new();
        for one in open {
            has.entry(one.pid).or_default().extend(one.socket().or(one.inode("pipe:[")));
        }

        // Sockets and pipes alone can be told by their inodes.
        let all: HashSet<u64> = has.values().flatten().copied().collect();
        let epolls = open.iter().filter(|open| epoll::is_epoll(&open.target));
        let escaped = epolls.filter_map(|one| {
            let targets = epoll::targets(one.pid, one.number).ok()?;
            let own = has.get(&one.pid)?;
            let gone = |t: &&epoll::EpollTarget| all.contains(&t.inode) && !own.contains(&t.inode);
            let gone = targets.iter().find(gone)?;

            // CRIU takes it where it meets it first, with the parent: after a fork for a copy of
            // memory (redis) the child is none that matters.
            let older = open.iter().filter(|other| other.pid < one.pid);
            let mut older = older.filter(|other| epoll::is_epoll(&other.target));
            let same = older.any(|other| process::same_file(other.at(), one.at()).unwrap_or(false));
            (!same).then_some(((one.pid, one.number), gone.inode))
        });
        escaped.collect()
    };

    let first = find(open);
    if first.is_empty() {
        return None;
    }

    // What was opened or closed while we looked is not meant.
    let pids: Vec<i32> =
        open.iter().map(|open| open.pid).collect::<HashSet<_>>().into_iter().collect();
    let again = find(&all(&pids));
    let ((pid, number), _) = first.into_iter().find(|(at, inode)| again.get(at) == Some(inode))?;

    Some(
        Problem::new(
            "an epoll of the container watches what its process has not open",
            format!(
                "that of {}, descriptor {number}: two processes share it since a fork; CRIU cannot \
                 carry it",
                who(pid)
            ),
        )
        .hint("have each process make an epoll of its own after the fork"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_threads_are_told_from_those_of_processes() {
        assert!(is_of_a_thread(Path::new("/proc/1/task/6/stat")));
        for other in ["/proc/1/stat", "/proc/6/task/6/stat", "/data/proc/1/task/6", "/proc/1/task"]
        {
            assert!(!is_of_a_thread(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn a_fifo_needs_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open =
            |write: bool| fs::OpenOptions::new().read(true).write(write).open(&path).unwrap();
        let keeper = open(true);
        let reader = open(false);
        let about = || {
            let mine: Vec<OpenFile> = all(&[std::process::id() as i32]);
            fifos_without_writer(&mine)
                .into_iter()
                .find(|p| p.what.contains(path.to_str().unwrap()))
        };
        assert_eq!(about(), None);
        drop(keeper);
        assert!(about().is_some_and(|p| p.fatal));
        drop(reader);
        assert_eq!(about(), None);
    }

    #[test]
    fn a_supervisor_is_found_by_its_descriptor() {
        let open = |target: &str| OpenFile { pid: 1, number: 3, target: target.into() };
        assert!(supervisor(&[open("socket:[7]"), open(SUPERVISOR)]).is_some());
        assert_eq!(supervisor(&[open("anon_inode:[eventpoll]")]), None);
        assert_eq!((open("socket:[7]").socket(), open("socket:[x]").socket()), (Some(7), None));
    }
}
