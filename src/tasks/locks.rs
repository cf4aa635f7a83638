//! File locks of the container's tasks.
//!
//! CRIU sets them again when it restores. A POSIX lock it may lose on the way: such a lock is gone when
//! its process closes any descriptor of the file, and CRIU closes those by which it maps files after it
//! has set the locks. Whoever keeps locks on a file that it has mapped, as sqlite does, would not notice,
//! and somebody else could change what it relies on. So the locks are looked at while the source stands
//! still, compared with what the restored tasks have before anybody may run, and set where they are
//! missing.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::freezer::{native, of_first_space};
use crate::memory::pages::Task;
use crate::problem::Problem;
use crate::sys::locks::{FileLock, LockKind, Setter, held};
use crate::sys::{arch, fd_inject, process};

/// Most of one container.
pub const MOST: usize = 20_000;

/// A lock, and by which descriptor it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldLock {
    /// The process, as the container numbers it.
    pub vpid: i32,
    /// Its descriptor.
    pub number: RawFd,
    /// The lock.
    pub lock: FileLock,
}

/// A lock on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundLock {
    /// The process, as this host numbers it.
    pub pid: i32,
    /// The lock.
    pub held: HeldLock,
}

/// The locks of a container: all of them, where its tasks stand still.
///
/// # Errors
/// When they are more than can go along.
pub fn look(pids: &[i32]) -> Result<Vec<FoundLock>> {
    up_to(pids, MOST)
}

fn up_to(pids: &[i32], most: usize) -> Result<Vec<FoundLock>> {
    let mut found = Vec::new();
    for Task { pid, vpid } in of_first_space(pids)? {
        each(pid, |number, lock| {
            found.push(FoundLock { pid, held: HeldLock { vpid, number, lock } });
            found.len() <= most
        });
        if found.len() > most {
            return Err(too_many(most).into());
        }
    }
    Ok(found)
}

fn too_many(most: usize) -> Problem {
    let why = "each of them is a message's part, and is set again in the freeze";
    Problem::new(format!("the container holds more than {most} file locks"), why)
        .hint("have the program lock ranges that lie side by side as one")
}

/// Calls something for each lock of a process that has a descriptor of its own, as long as it wants more.
fn each(pid: i32, mut tell: impl FnMut(RawFd, FileLock) -> bool) {
    let enough = || Err(io::ErrorKind::FileTooLarge.into());
    // Whoever has ended meanwhile holds none.
    for number in fd_inject::numbers(pid).unwrap_or_default() {
        let target = fs::read_link(format!("/proc/{pid}/fd/{number}"));
        // Servers have thousands of sockets, which nobody locks.
        if target.is_ok_and(|target| target.is_absolute()) {
            let tell = |lock| if tell(number, lock) { Ok(()) } else { enough() };
            let told = held(pid, number, tell);
            if told.is_err_and(|e| e.kind() == io::ErrorKind::FileTooLarge) {
                break;
            }
        }
    }
}

/// Has the restored tasks, which CRIU holds and none of which has run, hold all these locks.
///
/// # Errors
/// Names the first process that cannot, and its file.
pub fn hold(pids: &[i32], locks: &[HeldLock]) -> Result<()> {
    if locks.is_empty() {
        return Ok(());
    }
    let tasks = of_first_space(pids)?;
    let mut by_task: BTreeMap<i32, Vec<HeldLock>> = BTreeMap::new();
    for held in locks {
        by_task.entry(held.vpid).or_default().push(*held);
    }
    for (vpid, list) in by_task {
        let task = tasks.iter().find(|task| task.vpid == vpid);
        let task =
            task.ok_or_else(|| anyhow!("process {vpid}, which holds locks, is not there"))?;
        hold_in(task.pid, &list)?;
    }
    Ok(())
}

fn hold_in(pid: i32, list: &[HeldLock]) -> Result<()> {
    let lacking = missing(pid, list)?;
    let Some(first) = lacking.first() else { return Ok(()) };
    tracing::debug!("{} file locks of process {} are set again", lacking.len(), first.vpid);
    let mut thread = fd_inject::first_thread(pid).with_context(|| words(pid, first))?;
    let mut setter = Setter::open(&mut thread, pid).with_context(|| words(pid, first))?;
    for held in &lacking {
        setter.set(held.number, &held.lock).with_context(|| words(pid, held))?;
    }
    setter.close().with_context(|| words(pid, first))?;
    drop(thread);
    match missing(pid, list)?.first() {
        Some(held) => bail!("{}: the kernel does not list it", words(pid, held)),
        None => Ok(()),
    }
}

/// Returns those that a process does not hold. Which of several descriptors of a file the kernel shows a lock
/// at does not matter.
fn missing(pid: i32, list: &[HeldLock]) -> Result<Vec<HeldLock>> {
    let mut files = BTreeMap::new();
    let mut there = HashSet::new();
    for number in list.iter().map(|held| held.number) {
        if files.contains_key(&number) {
            continue;
        }
        let what = || format!("descriptor {number}, which holds a lock, is not there");
        let meta = fs::metadata(format!("/proc/{pid}/fd/{number}")).with_context(what)?;
        let file = (meta.dev(), meta.ino());
        held(pid, number, |lock| {
            there.insert((file, lock));
            if there.len() > MOST { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
        })
        .with_context(what)?;
        files.insert(number, file);
    }
    let lacks = |held: &&HeldLock| !there.contains(&(files[&held.number], held.lock));
    Ok(list.iter().filter(lacks).copied().collect())
}

/// More locks than can go along; and locks that CRIU would lose, and that no call of ours can set again, as
/// their process is of another kind than we.
pub fn problems(pids: &[i32]) -> Vec<Problem> {
    // Whatever else there is about them is found by whoever carries them.
    if let Some(problem) = look(pids).err().and_then(|e| e.downcast().ok()) {
        return vec![problem];
    }
    let strange = pids.iter().filter(|pid| !arch::SUPPORTED || !native(**pid));
    let problem = |pid: &i32| {
        let file = locked_and_mapped(*pid)?;
        let comm = process::proc_text(*pid, "comm").unwrap_or_default();
        let what = format!("the container has {} both locked and mapped", file.display());
        let why = format!("process {pid} ({}) would lose the lock", comm.trim());
        Some(Problem::new(what, why).hint(
            "such a lock is carried for programs of 64 bits on x86-64 only: have the program let go of it",
        ))
    };
    strange.filter_map(problem).take(1).collect()
}

/// A file that a process has mapped, and has a lock of its own on.
fn locked_and_mapped(pid: i32) -> Option<PathBuf> {
    let mut locked = Vec::new();
    each(pid, |number, lock| {
        let new = lock.kind == LockKind::Posix && locked.last() != Some(&number);
        locked.extend(new.then_some(number));
        true
    });
    if locked.is_empty() {
        return None;
    }
    let link = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
    let mapped = fs::read_dir(format!("/proc/{pid}/map_files")).ok()?;
    let mapped: HashSet<PathBuf> = mapped.flatten().filter_map(link).collect();
    let files = locked.iter().filter_map(|n| fs::read_link(format!("/proc/{pid}/fd/{n}")).ok());
    files.into_iter().find(|file| mapped.contains(file))
}

/// Returns what could not be done.
fn words(pid: i32, held: &HeldLock) -> String {
    let file = fs::read_link(format!("/proc/{pid}/fd/{}", held.number)).unwrap_or_default();
    format!("process {} does not get its lock on {} ({})", held.vpid, file.display(), held.lock)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    /// In a shell that has its own program open as 9: that is mapped.
    /// One byte in two, so that the kernel makes no single lock of them.
    #[test]
    fn more_than_can_go_along_are_counted_and_refused() {
        let program = r#"
            $| = 1;
            open(my $file, "+<", $ARGV[0]) or die;
            for my $at (0 .. 99) {
                fcntl($file, 6, pack("s s x4 q q i x4", 1, 0, 2 * $at, 1, 0)) or die;
            }
            print "\n";
            <STDIN>;
        "#;
        let file = tempfile::NamedTempFile::new().unwrap();

        let mut child = Command::new("perl")
            .args(["-e", program])
            .arg(file.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());

        assert_eq!(out.read_line(&mut String::new()).unwrap(), 1);
        let pid = child.id() as i32;

        // Whoever runs the tests may have left it a descriptor with one more.
        let all = look(&[pid]).unwrap().len();
        assert!(all >= 100);
        assert_eq!(up_to(&[pid], all).unwrap().len(), all);
        let problem = up_to(&[pid], all - 1).unwrap_err().downcast::<Problem>().unwrap();
        assert!(problem.what.starts_with("the container holds more than "), "{problem}");

        // Nobody collects what lies beyond that.
        let mut told = 0;
        each(pid, |_, _| {
            told += 1;
            told <= 7
        });

        assert_eq!(told, 8);
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn a_file_that_is_locked_and_mapped_is_found() {
        let mut child = Command::new("sh")
            .args(["-c", "exec 9</proc/self/exe 8</etc/passwd; echo; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());

        out.read_line(&mut String::new()).unwrap();
        let pid = child.id() as i32;
        let lock = |kind| FileLock { kind, write: false, start: 0, end: None };
        let set = |number, lock| {
            let mut thread = fd_inject::first_thread(pid).unwrap();
            let mut setter = Setter::open(&mut thread, pid).unwrap();
            setter.set(number, &lock).unwrap();
            setter.close().unwrap();
        };

        set(8, lock(LockKind::Posix));
        set(9, lock(LockKind::Flock));
        assert_eq!(locked_and_mapped(pid), None);
        set(9, lock(LockKind::Posix));
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(locked_and_mapped(pid), Some(program));

        // We can set it again.
        assert_eq!(problems(&[pid]), []);
        let held = look(&[pid]).unwrap().into_iter().map(|found| found.held).collect::<Vec<_>>();
        assert_eq!(held.len(), 3);
        assert_eq!(missing(pid, &held).unwrap(), []);
        let more = HeldLock { lock: FileLock { end: Some(7), ..held[0].lock }, ..held[0] };
        assert_eq!(missing(pid, &[more]).unwrap(), [more]);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
