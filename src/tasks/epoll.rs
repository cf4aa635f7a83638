//! What the container's tasks watch with epoll(7), checked by us instead of by CRIU.
//!
//! An epoll knows what it watches by number and file. The number may mean another file by now, or
//! none, if the program has duplicated and closed descriptors; so CRIU asks the kernel of each
//! whether the two still go together (kcmp(2)), and the kernel looks through all that the epoll
//! watches to find it. For a server with 10,000 connections that is a second in the freeze.
//!
//! A socket can be told without that: its inode is its own, and the kernel lists the inode of all
//! that an epoll watches (proc_pid_fdinfo(5)). Where many are watched, and all of them are what they
//! should be, CRIU's question is [answered for it](crate::sys::seccomp) without a search. Since its
//! answer must be given before anybody knows it, the same look is taken in the freeze once more,
//! beside CRIU's work; should it find something else, the migration is given up.
//!
//! Not for tasks with a seccomp filter: CRIU could not read theirs if it had one of its own.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::sys::{inject, process};

/// Fewer CRIU may ask about: two milliseconds.
const MANY: usize = 500;
/// How `/proc/PID/fd` shows an epoll.
const EPOLL: &str = "anon_inode:[eventpoll]";

/// Tells whether CRIU's questions are worth an answer of ours, and can have it.
pub fn worth_vouching(pids: &[i32]) -> bool {
    let most = pids.iter().filter_map(|pid| look(*pid).ok()).flat_map(|task| task.epolls);
    let most = most.map(|(_, watched)| watched.len()).max().unwrap_or(0);
    most >= MANY && !pids.iter().any(|pid| filtered(*pid)) && vouch(pids).is_ok()
}

/// Checks that all which is watched is what its number says.
///
/// # Errors
/// When something is not, or a process is gone.
pub fn vouch(pids: &[i32]) -> Result<()> {
    for &pid in pids {
        let task = look(pid)?;
        for (epoll, watched) in &task.epolls {
            check(pid, *epoll, watched, &task.open)?;
        }
    }
    Ok(())
}

/// What an epoll watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollTarget {
    /// The number that it had when it was added.
    pub number: i32,
    /// Its file's inode.
    pub inode: u64,
    /// As in `struct epoll_event`.
    pub events: u32,
    /// See `events`.
    pub data: u64,
}

#[derive(Debug, Default)]
struct EpollTask {
    open: HashMap<i32, PathBuf>,
    epolls: Vec<(i32, Vec<EpollTarget>)>,
}

fn look(pid: i32) -> Result<EpollTask> {
    let mut task = EpollTask::default();
    for (number, target) in process::open_files(pid)? {
        if is_epoll(&target) {
            task.epolls.push((number, targets(pid, number)?));
        }
        task.open.insert(number, target);
    }
    Ok(task)
}

/// Tells whether a link in `/proc/PID/fd` shows an epoll.
pub fn is_epoll(target: &Path) -> bool {
    target.as_os_str() == EPOLL
}

/// Returns what a process's epoll watches; nothing if it has been closed.
///
/// # Errors
/// When the kernel says it in other words than those that are known, or it is more than can be read.
pub fn targets(pid: i32, epoll: i32) -> Result<Vec<EpollTarget>> {
    match process::proc_text(pid, &format!("fdinfo/{epoll}")) {
        Err(e) if e.kind() == ErrorKind::FileTooLarge => {
            Err(e).with_context(|| format!("epoll {epoll} of process {pid}"))
        }
        text => parse(&text.unwrap_or_default()),
    }
}

/// `tfd: 5 events: 19 data: 5 pos:0 ino:1e240 sdev:8`, a line for each.
fn parse(list: &str) -> Result<Vec<EpollTarget>> {
    let lines = list.lines().filter_map(|line| line.strip_prefix("tfd:"));
    let one = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let number = words.next()?.parse().ok()?;
        let (_, events, _, data) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let inode = words.find_map(|word| word.strip_prefix("ino:"))?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let events = u32::from_str_radix(events, 16).ok()?;
        Some(EpollTarget { number, inode: hex(inode)?, events, data: hex(data)? })
    };
    lines.map(|line| one(line).ok_or_else(|| anyhow!("an epoll with a line {line:?}"))).collect()
}

fn check(
    pid: i32,
    epoll: i32,
    watched: &[EpollTarget],
    open: &HashMap<i32, PathBuf>,
) -> Result<()> {
    for EpollTarget { number, inode, .. } in watched {
        let right = open.get(number).is_some_and(|target| match process::socket_inode(target) {
            Some(own) => own == *inode,
            // Several files may have one inode; there are few of these.
            None => process::watches(pid, epoll, *number).unwrap_or(false),
        });
        if !right {
            bail!("process {pid} watches a file as number {number} that is another one by now");
        }
    }
    Ok(())
}

/// Tells whether any thread of a process has a seccomp filter. proc_pid_status(5)
fn filtered(pid: i32) -> bool {
    inject::threads(pid).unwrap_or_default().into_iter().any(|tid| {
        let status = process::proc_text(tid, "status").unwrap_or_default();
        let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
        mode.is_some_and(|mode| mode.trim() != "0")
    })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::{AsRawFd, OwnedFd};

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

    use super::*;
    use crate::fuzz::Target as Decoder;

    fn found(epoll: &Epoll) -> (EpollTask, Vec<EpollTarget>) {
        let task = look(std::process::id() as i32).unwrap();
        let number = epoll.0.as_raw_fd();
        let watched = task.epolls.iter().find(|(n, _)| *n == number).unwrap().1.clone();
        (task, watched)
    }

    #[test]
    fn a_number_with_another_meaning_is_noticed() {
        let me = std::process::id() as i32;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let number = epoll.0.as_raw_fd();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (pipe, other) = nix::unistd::pipe().unwrap();
        let watch = |fd: &dyn std::os::fd::AsFd| {
            epoll.add(fd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 7)).unwrap();
        };

        watch(&socket);
        watch(&pipe);
        let (mut task, watched) = found(&epoll);
        assert_eq!(watched.len(), 2);
        check(me, number, &watched, &task.open).unwrap();

        // A socket in another's place.
        let place = socket.as_raw_fd();
        task.open.insert(place, "socket:[1]".into());
        assert!(check(me, number, &watched, &task.open).is_err());
        task.open.remove(&place);
        assert!(check(me, number, &watched, &task.open).is_err());

        // The pipe's other end, of the same inode, under the number of the one that is watched.
        let kept: OwnedFd = pipe.try_clone().unwrap();
        let mut place = pipe;
        nix::unistd::dup2(&other, &mut place).unwrap();
        let (task, watched) = found(&epoll);
        assert!(check(me, number, &watched, &task.open).is_err());
        drop(kept);
    }

    #[test]
    fn lines_that_are_none_are_an_error() {
        let text =
            "pos:\t0\ntfd:       63 events:       19 data:               3f  pos:0 ino:1a sdev:8\n";
        let target = EpollTarget { number: 63, inode: 26, events: 0x19, data: 0x3f };
        assert_eq!(parse(text).unwrap(), [target]);
        assert!(parse("tfd: x ino:1\n").is_err());
        assert!(parse("tfd: 1 pos:0\n").is_err());
    }

    #[test]
    fn fuzz_epolls() {
        let line = "tfd:       63 events:       19 data:               3f  pos:0 ino:1a sdev:8\n";
        let target = Decoder::new("epolls").sample(format!("pos:\t0\n{line}{line}"));
        target.sample("socket:[7]").words(&[b"tfd:", b"ino:"]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let _ = (process::socket_inode(Path::new(&*text)), is_epoll(Path::new(&*text)));
            parse(&text).map(drop)
        });
    }
}
