//! Sockets of Multipath TCP, of which CRIU knows none. Those that listen Ferry carries itself
//! ([`crate::connections`]), where it can.
//!
//! They look like TCP's from all sides but their own: socket(7), `SO_PROTOCOL`.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::freezer::{native, of_first_space};
use crate::oci::cgroup::Cgroup;
use crate::sys::fd_table::FIRST;
use crate::sys::{arch, listener, process, socket};

/// A socket of Multipath TCP in a process.
#[derive(Debug)]
pub struct MptcpSocket {
    /// Process that has it.
    pub pid: i32,
    /// Its number there.
    pub number: RawFd,
    /// As `/proc/PID/fd` calls it.
    pub inode: u64,
    /// A duplicate of its descriptor.
    pub file: OwnedFd,
}

/// All that these processes have, of one network namespace.
pub fn sockets(pids: &[i32]) -> Vec<MptcpSocket> {
    // Whoever has none need not look at each.
    let table = pids.first().and_then(|pid| process::proc_text(*pid, "net/protocols").ok());
    if !table.is_some_and(|table| are_some(&table)) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for &pid in pids {
        // Whoever has ended meanwhile has none.
        let Ok(pidfd) = process::pidfd_open(pid) else { continue };
        for (number, target) in descriptors(pid) {
            let Some(inode) = process::socket_inode(&target) else { continue };
            let Ok(file) = process::pidfd_getfd(&pidfd, number) else { continue };
            if socket::is_mptcp(file.as_fd()) {
                found.push(MptcpSocket { pid, number, inode, file });
            }
        }
    }
    found
}

/// The first of them that cannot go along, and why.
pub fn obstacle(init: i32, all: &[MptcpSocket]) -> Option<(i32, &'static str)> {
    if all.is_empty() {
        return None;
    }
    let able = arch::SUPPORTED && matches!(Cgroup::of_process(init), Ok(Cgroup::V2(_)));
    let mut holders: HashMap<u64, usize> = HashMap::new();
    all.iter().for_each(|one| *holders.entry(one.inode).or_default() += 1);

    let pids: Vec<i32> = all.iter().map(|one| one.pid).collect();
    let own = of_first_space(&pids).unwrap_or_default();

    all.iter().find_map(|one| {
        let why = if !listener::is_plain(&one.file).unwrap_or(false) {
            "it is no listening socket without anything special: CRIU cannot carry it"
        } else if !able {
            "on cgroup v1, or this kind of machine, CRIU would have to carry it, and cannot"
        } else if holders[&one.inode] > 1 || one.number < FIRST {
            "it has several descriptors, or is a standard stream: CRIU cannot carry it"
        } else if !own.iter().any(|task| task.pid == one.pid) || !native(one.pid) {
            "nobody can put it into a program of 32 bits, or into a pid namespace of its own"
        } else if !has_another(one.pid) {
            "its process has no other descriptor that could stand in its place"
        } else {
            return None;
        };
        Some((one.pid, why))
    })
}

/// Tells whether a process has a descriptor that CRIU restores, and of which another one can stand anywhere for
/// a while: of no file, whose locks would end with it. Of sockets some are taken out.
fn has_another(pid: i32) -> bool {
    let all = descriptors(pid);
    all.iter().any(|(number, target)| {
        process::socket_inode(target).is_none() && stands_in(pid, *number, target)
    })
}

/// Tells whether another descriptor of this one can stand anywhere for a while.
pub fn stands_in(pid: i32, number: RawFd, target: &Path) -> bool {
    let device = || {
        let file = fs::metadata(format!("/proc/{pid}/fd/{number}"));
        file.is_ok_and(|file| file.file_type().is_char_device())
    };
    !target.is_absolute() || device()
}

fn descriptors(pid: i32) -> Vec<(RawFd, PathBuf)> {
    process::open_files(pid).into_iter().flatten().collect()
}

/// Tells whether there are any, as `/proc/PID/net/protocols` says.
fn are_some(protocols: &str) -> bool {
    let mut lines = protocols.lines().filter(|line| line.starts_with("MPTCP"));
    lines.any(|line| line.split_ascii_whitespace().nth(2).is_some_and(|sockets| sockets != "0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_counted() {
        let head = "protocol  size sockets  memory press maxhdr  slab module     cl co\n";
        assert!(are_some(&format!("{head}MPTCPv6 1 0\nMPTCP 1 1\n")));
        assert!(!are_some(&format!("{head}MPTCP 1 0\nTCP 1 7\n")));
        assert!(!are_some(""));
    }
}
