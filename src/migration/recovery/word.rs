//! The source's word that the container stayed: a destination that has not heard it holds its copy for
//! ever. Told by whoever is left, and told again before the same container is migrated anew.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::decide::has_heard;
use super::settle;
use crate::migration::journal::{Journal, Role};
use crate::sys::process;
use crate::transport::connect::Destination;

/// How long a destination that cannot be reached is told that the container stayed.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Between two tries to reach it, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long a destination may take to hear of earlier migrations before it hears of the next one.
const BEFORE: Duration = Duration::from_secs(20);

/// Tells the destination that the source has kept the container, until it has heard.
pub fn send(journal: &mut Journal) {
    let until = Instant::now() + TIMEOUT;
    let mut pause = Duration::from_millis(100);
    while Instant::now() < until {
        if settle::tell_stayed(journal, settle::LIMIT).is_ok_and(has_heard) {
            return;
        }
        // Between two tries to reach a host there is nothing to wait on but time.
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Starts a process that does so.
///
/// # Errors
/// When there can be no process.
pub fn send_later(journal: &Journal) -> Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("__guard").arg("word").arg(journal.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    process::in_new_session(&mut command);
    command.spawn().context("cannot start the guard process").map(drop)
}

/// That process.
///
/// # Errors
/// When the journal cannot be read.
pub fn sender(journal: &Path) -> Result<()> {
    send(&mut Journal::open(journal)?);
    Ok(())
}

/// Before a container is migrated: whoever may still hold a copy of it from an earlier migration that
/// was given up is told so; the host that it is to go to now before anything else, the others meanwhile.
///
/// # Errors
/// When the journals cannot be read.
pub fn tell_again(
    state_dir: &Path,
    root: &Path,
    container: &str,
    destination: &Destination,
) -> Result<()> {
    for mut journal in Journal::of(state_dir, root, container)? {
        if journal.record.role != Role::Source || !journal.is_untold() {
            continue;
        }
        let told = if journal.record.destination.as_ref() == Some(destination) {
            settle::tell_stayed(&mut journal, BEFORE).map(drop)
        } else {
            send_later(&journal)
        };
        // If it cannot be reached, that will be said when it is asked; if it has a copy, by its checks.
        let _ = told.inspect_err(|e| {
            let migration = &journal.record.migration;
            tracing::warn!("telling again that migration {migration} was given up: {e:#}");
        });
    }
    Ok(())
}
