//! What a CRIU that was killed leaves behind in the tasks that it dumped, taken away again.
//!
//! CRIU works inside the tasks: it has their threads run code of its own, on registers of its own,
//! and keeps theirs in its memory. Killed there, it would take the container with it. So
//!
//! 1. the source [notes](TaskSnapshot::take) what every thread needs to go on, before CRIU may begin;
//! 2. CRIU's death [waits](TracerWatch) until the control group is frozen and this is
//!    [written](TaskSnapshot::write) down: the tasks stand where CRIU left them;
//! 3. whoever undoes the migration [puts it back](TaskSnapshot::put_back).
//!
//! One window stays: a process that is not the container's first and in whose thread a breakpoint
//! of CRIU's has been reached, but not yet been seen by CRIU, gets the breakpoint's signal from the
//! kernel when its tracer is gone. That is some microseconds for each step that CRIU makes in it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{UnixAddr, getpeername};
use serde::{Deserialize, Serialize};

use crate::oci::cgroup::Cgroup;
use crate::report::failures::Failures;
use crate::sys::stopped::{Stopped, ThreadState, Wait, before_death, instruction};
use crate::sys::waits::{Clock, SeenWait};
use crate::sys::{inject, maps, process, socket};

/// In CRIU's work directory: what was noted, once CRIU has been killed.
const FILE: &str = "noted";
/// What CRIU maps into a task.
const PARASITE: &str = "/memfd:CRIUMFD";
/// The abstract address that the code in the task is connected to, and its first byte.
const PARASITE_PEER: &[u8] = b"/crtools-pr-";
/// CRIU borrows the first bytes of the first executable mapping to make system calls.
const BORROWED: usize = 64;
/// Time that tasks that are held may take to be frozen.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time that a thread of a frozen task may take to be seen standing.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// What the tasks of a container need to go on as if nothing had been done to them.
#[derive(Debug, Serialize, Deserialize)]
pub struct TaskSnapshot(Vec<ProcessSnapshot>);

#[derive(Debug, Serialize, Deserialize)]
struct ProcessSnapshot {
    pid: i32,
    /// With the number, a name that is not used twice.
    started: Option<u64>,
    /// proc_pid_maps(5)
    maps: String,
    code_at: u64,
    code: Vec<u8>,
    threads: Vec<ThreadState>,
}

/// A mapping: from, to, and what may be done there (`rwxp`).
type MappedRange<'a> = (u64, u64, &'a str);

impl TaskSnapshot {
    /// Notes the tasks of a frozen control group. Calls in which they wait go on wherever the tasks do:
    /// `seen` is what was seen of them just before the freeze.
    ///
    /// # Errors
    /// `TimedOut` when a thread sleeps uninterruptibly: CRIU could not stop it either. Else as
    /// [`Stopped::standing`].
    pub fn take(cgroup: &Cgroup, seen: &HashMap<i32, SeenWait>) -> Result<TaskSnapshot> {
        // On a thread that ends: see `Stopped::standing`.
        let noted = std::thread::scope(|scope| {
            let all = || cgroup.processes()?.into_iter().map(|pid| note(pid, seen)).collect();
            scope.spawn(all).join().unwrap_or_else(|_| anyhow::bail!("cannot note the tasks"))
        })?;
        Ok(TaskSnapshot(noted))
    }

    /// Returns where the threads of a process have their stacks; none where that is not known.
    pub fn stacks(&self, pid: i32) -> Option<Vec<u64>> {
        let process = self.0.iter().find(|process| process.pid == pid)?;
        process.threads.iter().map(ThreadState::stack).collect()
    }

    /// Writes it where [`TaskSnapshot::read`] finds it: from then on it counts.
    ///
    /// # Errors
    /// When there is no room.
    pub fn write(&self, work: &Path) -> Result<()> {
        let fresh = work.join("noted.new");
        fs::write(&fresh, serde_json::to_vec(self)?)?;
        Ok(fs::rename(fresh, work.join(FILE))?)
    }

    /// Returns what was written when CRIU was killed, if it was.
    pub fn read(work: &Path) -> Option<TaskSnapshot> {
        serde_json::from_slice(&fs::read(work.join(FILE)).ok()?).ok()
    }

    /// Puts the tasks of a frozen control group back to where they stood; it stays frozen. `work` is
    /// CRIU's work directory.
    ///
    /// # Errors
    /// What could not be put back; the rest was.
    pub fn put_back(&self, cgroup: &Cgroup, work: &Path) -> Result<()> {
        let mut failures = Failures::default();
        let mut held = Vec::new();
        for process in &self.0 {
            // It may have been killed since.
            if process.started.is_some() && process::start_time(process.pid) == process.started {
                let step = format!("process {}", process.pid);
                let threads = failures.note(&step, process.hold());
                held.extend(threads.map(|threads| (process, threads)));
            }
        }
        // Nobody runs yet: each thread is held by itself. Frozen, they could make no call for us.
        cgroup.thaw()?;
        for (process, threads) in &mut held {
            let step = format!("process {}", process.pid);
            if let Some(thread) = threads.first_mut() {
                failures.note(&step, process.clear(thread, work));
            }
        }
        failures.note("freezing the container again", cgroup.freeze_for_good(FREEZE_TIMEOUT));
        drop(held);
        failures.into_result()
    }
}

/// Sees to it that the tasks stand still if whoever works in them, by ptrace(2), is killed, and that
/// what was noted of them is written down then.
#[derive(Clone, Debug)]
pub struct TracerWatch {
    noted: Arc<Mutex<Option<TaskSnapshot>>>,
    cgroup: Cgroup,
    work: PathBuf,
}

impl TracerWatch {
    /// Nothing is noted yet. `work` is CRIU's work directory.
    pub fn new(cgroup: &Cgroup, work: &Path) -> TracerWatch {
        TracerWatch { noted: Arc::default(), cgroup: cgroup.clone(), work: work.to_owned() }
    }

    /// What counts from now on.
    pub fn note(&self, noted: Option<TaskSnapshot>) {
        *self.noted.lock().unwrap_or_else(PoisonError::into_inner) = noted;
    }

    /// As [`TaskSnapshot::stacks`].
    pub fn stacks(&self, pid: i32) -> Option<Vec<u64>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.stacks(pid)
    }

    /// Tells whether the tasks can be put right if whoever works in them is killed now.
    pub fn can_mend(&self) -> bool {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Watches over a thread, until it ends.
    pub fn over(&self, thread: i32) {
        let watch = self.clone();
        if let Err(e) = before_death(thread, move || watch.hold_still()) {
            tracing::debug!("the end of thread {thread} cannot be watched: {e}");
        }
    }

    fn hold_still(&self) {
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(noted) = &*noted
            // Whatever comes of it, nobody is thawed from here.
            && self.cgroup.freeze_for_good(FREEZE_TIMEOUT).is_ok()
            && let Err(e) = noted.write(&self.work)
        {
            tracing::warn!("what was done to the tasks cannot be mended: {e:#}");
        }
    }
}

fn note(pid: i32, seen: &HashMap<i32, SeenWait>) -> Result<ProcessSnapshot> {
    let maps = process::proc_text(pid, "maps")?;
    let code_at = mappings_of(&maps).find(|(_, _, may)| may.contains('x')).map_or(0, |m| m.0);
    let mut code = vec![0; BORROWED];
    let length = memory(pid)?.read_at(&mut code, code_at).unwrap_or(0);
    code.truncate(length);
    let until = Instant::now() + STOP_TIMEOUT;
    let mut threads = Vec::new();
    let clock = Clock::of(pid);
    for tid in inject::threads(pid)? {
        let stopped = Stopped::standing(tid, until);
        let state = stopped.and_then(|mut thread| {
            if thread.wait_elsewhere(&clock, seen.get(&tid)) == Wait::Ends {
                tracing::info!("thread {tid} waits, and nobody can tell for what: its call ends");
            }
            thread.state()
        });
        threads.push(state.with_context(|| format!("thread {tid}"))?);
    }
    Ok(ProcessSnapshot { pid, started: process::start_time(pid), maps, code_at, code, threads })
}

impl ProcessSnapshot {
    /// Stops all threads, each to go on from where it was.
    fn hold(&self) -> Result<Vec<Stopped>> {
        let mut held = Vec::new();
        for tid in inject::threads(self.pid)? {
            let mut stopped = Stopped::standing(tid, Instant::now() + STOP_TIMEOUT)
                .with_context(|| format!("thread {tid}"))?;
            if let Some(state) = self.threads.iter().find(|s| s.tid == tid) {
                stopped.assume(state)?;
            }
            held.push(stopped);
        }
        let mut now = vec![0; self.code.len()];
        let memory = memory(self.pid)?;
        memory.read_exact_at(&mut now, self.code_at)?;
        if now != self.code {
            memory.write_all_at(&self.code, self.code_at)?;
        }
        Ok(held)
    }

    /// Takes away CRIU's mappings and descriptors, and gives mappings their protection back: CRIU
    /// makes all of them readable for a while.
    fn clear(&self, thread: &mut Stopped, work: &Path) -> Result<()> {
        let at = instruction(self.pid)?;
        let now = process::proc_text(self.pid, "maps")?;
        let before: Vec<_> = mappings_of(&self.maps).collect();
        for (start, end, may) in mappings_of(&now) {
            let mut from = start;
            for &(old_start, old_end, could) in &before {
                let (low, high) = (old_start.max(from), old_end.min(end));
                if low >= high {
                    continue;
                }
                if from < low {
                    thread.call(at, libc::SYS_munmap, [from, low - from])?;
                }

                if could != may {
                    let arguments = [low, high - low, protection(could)];
                    thread.call(at, libc::SYS_mprotect, arguments)?;
                }
                from = high;
            }

            if from < end {
                thread.call(at, libc::SYS_munmap, [from, end - from])?;
            }
        }

        for number in descriptors_of_criu(self.pid, work)? {
            thread.call(at, libc::SYS_close, [number as u64])?;
        }

        Ok(())
    }
}

fn memory(pid: i32) -> io::Result<File> {
    File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))
}

/// The mappings in a `maps` file, in the order of addresses.
fn mappings_of(maps: &str) -> impl Iterator<Item = MappedRange<'_>> {
    maps::parse(maps).map(|m| (m.start, m.end, m.perms))
}

/// For mprotect(2).
fn protection(may: &str) -> u64 {
    let bits = [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)];
    bits.iter().filter(|(c, _)| may.contains(*c)).map(|(_, bit)| *bit as u64).sum()
}

/// Descriptors that CRIU's code has in a task: its memory, its log, its connection.
fn descriptors_of_criu(pid: i32, work: &Path) -> Result<Vec<i32>> {
    let pidfd = process::pidfd_open(pid)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let is_log = target.starts_with(work);
        let target = target.to_string_lossy();
        let is_connection = || {
            let fd = process::pidfd_getfd(&pidfd, number).ok()?;
            let peer = getpeername::<UnixAddr>(fd.as_raw_fd()).ok()?;
            Some(peer.as_abstract()?.starts_with(PARASITE_PEER))
        };
        if is_log
            || target.starts_with(PARASITE)
            || target.starts_with("socket:") && is_connection() == Some(true)
        {
            found.push(number);
        }
    }
    Ok(found)
}

/// Takes sockets out of repair mode that a killed CRIU has left there. The tasks must be frozen.
pub fn sockets(cgroup: &Cgroup) {
    each_socket(
        cgroup,
        |_| true,
        |_, fd| {
            // Not a TCP socket: it cannot be in repair mode.
            let _ = socket::leave_repair(fd);
        },
    );
}

/// Has the TCP sockets of frozen tasks that are about to be killed end without a word, and at once:
/// what is left of one would stand in the way of the same connection if it came back to this
/// namespace.
pub fn silence_sockets(cgroup: &Cgroup) {
    each_socket(
        cgroup,
        |_| true,
        |_, fd| {
            let _ = socket::enter_repair(fd);
        },
    );
}

/// Does something with a duplicate of each socket that is wanted, by its inode, as often as there are
/// descriptors of it.
pub fn each_socket(
    cgroup: &Cgroup,
    wanted: impl Fn(u32) -> bool,
    mut deed: impl FnMut(u32, OwnedFd),
) {
    for pid in cgroup.processes().unwrap_or_default() {
        let Ok(pidfd) = process::pidfd_open(pid) else { continue };
        for (number, target) in process::open_files(pid).into_iter().flatten() {
            let inode = process::socket_inode(&target).and_then(|inode| u32::try_from(inode).ok());
            if let Some(inode) = inode.filter(|inode| wanted(*inode))
                && let Ok(fd) = process::pidfd_getfd(&pidfd, number)
            {
                deed(inode, fd);
            }
        }
    }
}

/// Takes away what a killed CRIU has left mapped in the tasks where nothing was noted: a later CRIU
/// would take it for the task's own code. They must run, and they come out of it by themselves: the
/// parasite ends when its connection does.
pub fn mappings(cgroup: &Cgroup) {
    let until = Instant::now() + Duration::from_secs(1);
    for pid in cgroup.processes().unwrap_or_default() {
        let left = || {
            let text = process::proc_text(pid, "maps").unwrap_or_default();
            maps::parse(&text).find(|m| m.name.starts_with(PARASITE)).map(|m| (m.start, m.end))
        };
        while let Some((start, end)) = left().filter(|_| Instant::now() < until) {
            if inject::unmap_in(pid, start, end).is_err() {
                break;
            }
            // Nobody tells when a thread has left a mapping.
            std::thread::yield_now();
        }
    }
}
