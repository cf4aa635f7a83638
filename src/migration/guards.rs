//! The processes that outlive a killed Ferry; what they do then is in [`super::recover`].

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::connections::Vault;
use super::journal::Journal;
use crate::memory::serve::GUARD_QUIT;
use crate::sys::{process, scm};

/// The process that brings the container back if this one is killed.
pub struct SourceGuard {
    child: Child,
}

impl SourceGuard {
    /// Starts it. Its standard output is where the vault's contents come out.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn spawn(journal: &Journal, vault: &Vault) -> Result<SourceGuard> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("__guard").arg(journal.path());
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        command.stdout(vault.exit().try_clone_to_owned()?);
        process::in_new_session(&mut command);
        Ok(SourceGuard { child: command.spawn().context("cannot start the guard process")? })
    }

    /// The container runs on, and the destination may not know it: the guard goes on telling it.
    pub fn send_word(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            let _ = pipe.write_all(b"t");
        }
    }

    /// There is nothing to guard any more.
    pub fn dismiss(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            let _ = pipe.write_all(b"d");
        }
        let _ = self.child.wait();
    }
}

/// The process that holds the restored tasks' memory together if this one is killed: see
/// [`recover::guard_pages`].
pub struct PageGuard {
    child: Child,
    /// To tell it what to hold.
    pub socket: OwnedFd,
}

impl PageGuard {
    /// Starts it.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn spawn(journal: &Journal) -> Result<PageGuard> {
        let (socket, theirs) = scm::seqpacket_pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("__guard").arg("pages").arg(journal.path());
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        process::in_new_session(&mut command);
        Ok(PageGuard { child: command.spawn().context("cannot start the guard process")?, socket })
    }

    /// Everything is done, or undone.
    pub fn dismiss(mut self) {
        let _ = scm::send(&self.socket, GUARD_QUIT, &[]);
        let _ = self.child.wait();
    }
}
