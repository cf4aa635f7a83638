//! The CRIU of a migration, known by what is on disk: awaited, or ended.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::workdir::WorkPath;
use crate::sys::process;

/// CRIU's rollback ends with the control group frozen again, so nobody may thaw it before; only
/// large shared memory makes it take long.
const CRIU_TIMEOUT: Duration = Duration::from_secs(600);
/// Time that a CRIU that restores may take to give up by itself.
const ROLLBACK_GRACE: Duration = Duration::from_secs(5);
/// Time that a process that was killed may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// Waits until a CRIU that lost its Ferry has finished: it rolls back by itself.
pub(in crate::migration) fn wait_for(work: &WorkPath) {
    if let Some((_, pidfd)) = criu_of(work) {
        ends(&pidfd, CRIU_TIMEOUT);
    }
}

/// Ends a CRIU that restores what nobody wants any more. Given a moment it rolls back by itself, unless
/// it waits for what does not come: a lock that somebody has, a server that does not answer.
pub(in crate::migration) fn end_restore(work: &WorkPath) {
    let Some((pid, criu)) = criu_of(work) else { return };
    if ends(&criu, ROLLBACK_GRACE) {
        return;
    }
    tracing::warn!("CRIU does not give up what it restores: it is ended");
    // When one of its tasks dies it fails, and clears away.
    let tasks = process::descendants(pid);
    kill(&tasks);
    if !ends(&criu, ROLLBACK_GRACE) {
        kill(&process::descendants(pid));
        let _ = process::pidfd_kill(&criu, libc::SIGKILL);
        ends(&criu, KILL_TIMEOUT);
    }
    // Whoever has begun one meanwhile is among these, or its init was.
    for task in &tasks {
        ends(task, KILL_TIMEOUT);
    }
}

/// Tells whether the CRIU of a migration is known, and gone: what only it could do, nobody does any more.
pub(in crate::migration) fn is_gone(work: &WorkPath) -> bool {
    let text = fs::read_to_string(work.criu().pid()).unwrap_or_default();
    let Ok(pid) = text.trim().parse() else { return false };
    match process::proc_text(pid, "comm") {
        // Its number may be somebody else's by now.
        Ok(name) => name.trim() != "criu" || !process::lives(pid),
        Err(e) => matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    }
}

/// Returns the CRIU of a migration, if it is still there.
fn criu_of(work: &WorkPath) -> Option<(i32, OwnedFd)> {
    let text = fs::read_to_string(work.criu().pid()).ok()?;
    let pid = text.trim().parse().ok()?;
    let pidfd = process::pidfd_open(pid).ok()?;
    // The number may belong to somebody else by now.
    let name = process::proc_text(pid, "comm").unwrap_or_default();
    (name.trim() == "criu").then_some((pid, pidfd))
}

/// Tells whether a process ends within that time.
fn ends(pidfd: &OwnedFd, limit: Duration) -> bool {
    process::wait_readable(&[pidfd.as_fd()], Some(Instant::now() + limit)).is_ok()
}

fn kill(processes: &[OwnedFd]) {
    for process in processes {
        // One that is gone already is what we want.
        let _ = process::pidfd_kill(process, libc::SIGKILL);
    }
}
