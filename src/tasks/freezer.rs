//! The tasks of a frozen container, each thread of them held by itself, so that one can be made to do
//! something while none runs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::memory::pages;
use crate::oci::cgroup::Cgroup;
use crate::sys::inject;
use crate::sys::stopped::Stopped;

/// Time that a thread of a frozen task may take to be seen standing.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that those that stand already may take to be frozen.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// Threads by their process.
pub type StoppedTasks = BTreeMap<i32, Vec<Stopped>>;

/// Does something with the tasks of a frozen control group, which is frozen again afterwards.
///
/// If the thread that holds them dies in the middle of it, they run: `begin` is told its number before
/// it holds any.
///
/// # Errors
/// When `begin` fails, a thread cannot be stopped, the group not be frozen again, or `deed` fails.
pub fn with_tasks_stopped<T: Send>(
    cgroup: &Cgroup,
    begin: impl FnOnce(i32) -> Result<()> + Send,
    deed: impl FnOnce(&mut StoppedTasks) -> Result<T> + Send,
) -> Result<T> {
    // Only the thread that has stopped them can do anything with them; and see `Stopped::within`.
    std::thread::scope(|scope| {
        let work = || {
            begin(nix::unistd::gettid().as_raw())?;
            let mut held = hold(&cgroup.processes()?)?;
            let again = Freezing(cgroup);
            // Frozen, they could make no call for us.
            cgroup.thaw()?;
            let done = deed(&mut held);
            // Before they are let go: none of them runs in between.
            let frozen = cgroup.freeze_for_good(FREEZE_TIMEOUT);
            drop(again);
            drop(held);
            frozen.and(done)
        };
        let thread = std::thread::Builder::new().name("hold".into()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(anyhow!("the thread that holds the tasks has died")))
    })
}

/// Whatever becomes of the deed, those who are let go stop before they run.
struct Freezing<'a>(&'a Cgroup);

impl Drop for Freezing<'_> {
    fn drop(&mut self) {
        let _ = self.0.tell_freeze();
    }
}

fn hold(pids: &[i32]) -> Result<StoppedTasks> {
    let until = Instant::now() + STOP_TIMEOUT;
    let mut held = StoppedTasks::new();
    for &pid in pids {
        let mut threads = Vec::new();
        for tid in inject::threads(pid)? {
            let stopped = Stopped::standing(tid, until);
            threads.push(stopped.with_context(|| format!("thread {tid} cannot be held"))?);
        }
        held.insert(pid, threads);
    }
    Ok(held)
}

/// Tells whether a process is of the same kind as we, so that it can make calls for us.
pub fn native(pid: i32) -> bool {
    // EI_CLASS of its program, and of ours. elf(5)
    let class = |program: String| {
        let mut head = [0; 5];
        File::open(program)?.read_exact(&mut head)?;
        std::io::Result::Ok(head[4])
    };
    class(format!("/proc/{pid}/exe"))
        .is_ok_and(|its| class("/proc/self/exe".into()).is_ok_and(|own| own == its))
}

/// The tasks in the process ID namespace of the container's first one: what the others number, it is not
/// that by which CRIU knows them.
pub fn of_first_space(pids: &[i32]) -> Result<Vec<pages::Task>> {
    let tasks = pages::tasks(pids)?;
    let space = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let first = tasks.iter().find(|task| task.vpid == 1).or(tasks.first());
    let Some(first) = first.and_then(|task| space(task.pid)) else { return Ok(Vec::new()) };
    Ok(tasks.into_iter().filter(|task| space(task.pid).as_ref() == Some(&first)).collect())
}
