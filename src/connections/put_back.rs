//! What whoever holds the tasks does with them: their connections are taken out, and get their places
//! again.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use super::{Taken, TakenOut, Vault, extract, look};
use crate::oci::cgroup::Cgroup;
use crate::report::failures::Failures;
use crate::sys::fd_inject::{self, FdPlace};
use crate::sys::fd_table::Mirror;
use crate::sys::process::ProcessId;
use crate::sys::stopped::Stopped;
use crate::sys::{connection, fault};
use crate::tasks::freezer::with_tasks_stopped;

/// Tells whether connections were taken out of the tasks, or were about to be, and not put back. `work` is the
/// migration's directory.
pub fn are_out(work: &Path) -> bool {
    work.join(extract::FILE).exists()
}

fn taken(work: &Path) -> Result<Taken> {
    let bytes = fs::read(work.join(extract::FILE)).context("what was taken out of the tasks")?;
    postcard::from_bytes(&bytes).context("what was taken out of the tasks")
}

/// Takes connections out of the tasks of a frozen control group: those that are written down in the
/// migration's directory, and kept elsewhere. `begin`: see [`with_tasks_stopped`].
///
/// # Errors
/// When it fails half-way.
pub fn take_out(
    cgroup: &Cgroup,
    work: &Path,
    begin: impl FnOnce(i32) -> Result<()> + Send,
) -> Result<()> {
    let taken = taken(work)?;
    with_tasks_stopped(cgroup, begin, |held| {
        for one in &taken.0 {
            let thread = held.get_mut(&one.pid).and_then(|threads| threads.first_mut());
            let thread = thread.ok_or_else(|| anyhow!("process {} is gone", one.pid))?;
            let numbers: Vec<_> = one.places.iter().map(|place| place.number).collect();
            fd_inject::close(thread, one.pid, &numbers)?;
            fault::point("guard.taken")?;
        }
        Ok(())
    })
    .context("taking connections out of the tasks")
}

/// Puts connections back into the tasks of a frozen control group from which they were taken, and lets
/// them live. What is there already stays as it is. `begin`: see [`with_tasks_stopped`].
///
/// # Errors
/// Says what could not be put back; the rest was, and it can be tried again.
pub fn put_back(
    vault: &Vault,
    cgroup: &Cgroup,
    work: &Path,
    begin: impl FnOnce(i32) -> Result<()> + Send,
) -> Result<()> {
    let taken = taken(work)?;
    look::raise_limit()?;
    let files = vault.contents()?;

    // Where some are missing, none had been taken out yet.
    let all: usize = taken.0.iter().map(|one| one.places.len()).sum();
    let mut files = if files.len() == all { files } else { Vec::new() }.into_iter();
    let mut lots: Vec<(&TakenOut, Vec<OwnedFd>)> = Vec::new();
    for one in &taken.0 {
        let own = files.by_ref().take(one.places.len()).collect();
        // One that was killed meanwhile has no use for them.
        if one.started.is_some_and(|started| ProcessId { pid: one.pid, started }.is_alive())
            && !is_dead(one.pid)
        {
            lots.push((one, own));
        }
    }

    let mut failures = Failures::default();
    if lots.iter().any(|(_, files)| !files.is_empty()) {
        let done = with_tasks_stopped(cgroup, begin, |held| {
            let mut failures = Failures::default();
            for (one, files) in &lots {
                let thread = held.get_mut(&one.pid).and_then(|all| all.first_mut());
                failures.note(&format!("process {}", one.pid), install(thread, one, files));
                fault::point("guard.put")?;
            }
            failures.into_result()
        });
        failures.note("descriptors", done);
    }

    let alive: HashSet<i32> = lots.iter().map(|(one, _)| one.pid).collect();
    drop(lots);
    for one in taken.0.into_iter().filter(|one| alive.contains(&one.pid)) {
        let step = format!("process {}", one.pid);
        failures.note(&step, watch_again(one, vault));
    }

    failures.into_result()?;
    fs::remove_file(work.join(extract::FILE))?;

    // What a task closes is to be closed.
    vault.empty()
}

/// Tells whether nothing of a process is left but its number.
fn is_dead(pid: i32) -> bool {
    fd_inject::numbers(pid).map_or(true, |numbers| numbers.is_empty())
}

fn install(thread: Option<&mut Stopped>, one: &TakenOut, files: &[OwnedFd]) -> Result<()> {
    let thread = thread.ok_or_else(|| anyhow!("it is gone"))?;
    let there: HashSet<_> = fd_inject::numbers(one.pid)?.into_iter().collect();
    let places = one.places.iter().zip(files).filter(|(place, _)| !there.contains(&place.number));
    let places = places.map(|(place, file)| FdPlace {
        number: place.number,
        cloexec: place.cloexec,
        file: file.as_fd(),
    });
    let places: Vec<FdPlace> = places.collect();
    Ok(fd_inject::put(thread, one.pid, &places)?)
}

/// Has them watched again, and lets them live.
fn watch_again(one: TakenOut, vault: &Vault) -> Result<()> {
    let (pid, above) = (one.pid, one.above());
    let watch = move |mirror: &Mirror| -> std::io::Result<()> {
        for place in &one.places {
            mirror.take(place.number)?;
            if let Some(reuse) = place.wake {
                connection::wake(mirror.get(place.number), reuse)?;
            }
        }
        for (epoll, list) in &one.epolls {
            let epoll = mirror.epoll(*epoll)?;
            for watched in list {
                mirror.watch(epoll, watched.number, watched.events, watched.data)?;
            }
        }
        Ok(())
    };
    Ok(Mirror::spawn(pid, above, vault.exit(), watch)?.join()?)
}
