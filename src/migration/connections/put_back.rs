//! The way back: what was taken out of the tasks gets its places again.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

use super::{Taken, TakenOut, Vault, lift};
use crate::migration::held::while_held;
use crate::migration::journal::is_alive;
use crate::oci::cgroup::Cgroup;
use crate::sys::connection;
use crate::sys::door::{self, Place};
use crate::sys::mirror::Mirror;

/// Puts connections back into the tasks of a frozen control group from which they were taken; `wake`
/// lets them live, else they stay silent. `work` is the migration's directory. What is there already
/// stays as it is.
///
/// # Errors
/// Says what could not be put back.
pub fn put_back(vault: &Vault, cgroup: &Cgroup, work: &Path, wake: bool) -> Result<()> {
    let Some(taken) = fs::read(work.join(lift::FILE)).ok() else { return Ok(()) };
    let taken: Taken = postcard::from_bytes(&taken).context("what was taken out of the tasks")?;
    lift::raise_limit()?;
    let files = vault.empty()?;
    // Where some are missing, none had been taken out yet.
    let all: usize = taken.0.iter().map(|one| one.places.len()).sum();
    let mut files = if files.len() == all { files } else { Vec::new() }.into_iter();
    let mut lots: Vec<(&TakenOut, Vec<OwnedFd>)> = Vec::new();
    for one in &taken.0 {
        let own = files.by_ref().take(one.places.len()).collect();
        if one.started.is_some_and(|started| is_alive((one.pid, started))) {
            lots.push((one, own));
        }
    }
    if lots.iter().any(|(_, files)| !files.is_empty()) {
        while_held(cgroup, |held| {
            for (one, files) in &lots {
                if let Some(thread) = held.get_mut(&one.pid).and_then(|all| all.first_mut()) {
                    let there: HashSet<_> = door::numbers(one.pid)?.into_iter().collect();
                    let places = one.places.iter().zip(files);
                    let places = places.filter(|(place, _)| !there.contains(&place.0));
                    let places = places
                        .map(|(&(number, cloexec, _), file)| Place {
                            number,
                            cloexec,
                            file: file.as_fd(),
                        })
                        .collect::<Vec<_>>();
                    door::put(thread, one.pid, &places)
                        .with_context(|| format!("connections of process {}", one.pid))?;
                }
            }
            Ok(())
        })?;
    }
    drop(lots);
    for one in taken.0 {
        let (pid, above) = (one.pid, one.above());
        if !one.started.is_some_and(|started| is_alive((pid, started))) {
            continue;
        }
        let watch = move |mirror: &Mirror| -> std::io::Result<()> {
            for &(number, _, reuse) in &one.places {
                mirror.take(number)?;
                if wake {
                    connection::wake(mirror.get(number), reuse)?;
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
        let done = Mirror::spawn(pid, above, vault.exit(), watch)?.join();
        done.with_context(|| format!("connections of process {pid}"))?;
    }
    Ok(())
}
