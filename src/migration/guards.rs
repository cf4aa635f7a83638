//! The processes that outlive a killed Ferry; what they do then is in [`super::recover`].

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::connections::{Order, Orders, Vault};
use super::journal::{Journal, Record, is_alive};
use crate::memory::serve::{GUARD_CRIU, GUARD_LEAVE_CRIU, GUARD_QUIT};
use crate::sys::{process, scm};

/// In the migration's directory: the guard's number and when it started, and what it has to say.
const FILE: &str = "guard";
const LOG: &str = "guard.log";
/// Where the vault's contents come out of it.
const STDOUT: i32 = 1;

/// The process that brings the container back if this one is killed.
pub struct SourceGuard {
    child: Child,
    /// What it is told.
    pub orders: Orders,
}

impl SourceGuard {
    /// Starts it. Its standard output is where the vault's contents come out.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn spawn(journal: &Journal, vault: &Vault) -> Result<SourceGuard> {
        let (orders, theirs) = Orders::pair()?;
        let work = &journal.record.work;
        let mut command = Command::new("/proc/self/exe");
        command.arg("__guard").arg(journal.path());
        command.stdin(theirs).stderr(File::create(work.join(LOG))?);
        command.stdout(vault.exit().try_clone_to_owned()?);
        process::in_new_session(&mut command);
        let child = command.spawn().context("cannot start the guard process")?;
        let mut guard = SourceGuard { child, orders };
        let pid = guard.child.id() as i32;
        // Whoever runs out of memory is to find another victim. Needs CAP_SYS_RESOURCE;
        // proc_pid_oom_score_adj(5).
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000");
        let started = process::start_time(pid).unwrap_or(0);
        let noted = fs::write(work.join(FILE), format!("{pid} {started}"));
        if let Err(e) = noted.map_err(Into::into).and_then(|()| guard.orders.are_for(pid)) {
            guard.dismiss();
            return Err(e);
        }
        Ok(guard)
    }

    /// The container runs on, and the destination may not know it: the guard goes on telling it.
    pub fn send_word(&self) {
        self.orders.say(Order::Told);
    }

    /// There is nothing to guard any more.
    pub fn dismiss(&mut self) {
        self.orders.say(Order::Done);
        let _ = self.child.wait();
    }
}

/// A guard whose Ferry has ended, and which has something that nobody else has.
pub struct LeftGuard {
    pidfd: OwnedFd,
    /// It.
    pub vault: Vault,
}

impl LeftGuard {
    /// That of a migration, if it is still there.
    pub fn find(record: &Record) -> Option<LeftGuard> {
        let text = fs::read_to_string(record.work.join(FILE)).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let (pid, started) = (pid.parse().ok()?, started.parse().ok()?);
        let pidfd = process::pidfd_open(pid).ok()?;
        // Whoever the descriptor stands for: it was he after it had been opened.
        let it = is_alive((pid, started)).then_some(&pidfd)?;
        let vault = process::pidfd_getfd(it, STDOUT).ok()?;
        Some(LeftGuard { vault: Vault::from_exit(vault), pidfd })
    }

    /// Ends it: nobody needs what it has.
    pub fn end(self) {
        // It has ended by itself.
        let _ = process::pidfd_kill(&self.pidfd, libc::SIGKILL);
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

    /// CRIU is to be released, whatever becomes of this process.
    pub fn take_criu(&self, criu: &OwnedFd) {
        // One that was killed cannot take it.
        let _ = scm::send(&self.socket, GUARD_CRIU, &[criu.as_raw_fd()]);
    }

    /// It is not.
    pub fn leave_criu(&self) {
        let _ = scm::send(&self.socket, GUARD_LEAVE_CRIU, &[]);
    }

    /// Everything is done, or undone.
    pub fn dismiss(mut self) {
        let _ = scm::send(&self.socket, GUARD_QUIT, &[]);
        let _ = self.child.wait();
    }
}
