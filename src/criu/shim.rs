//! What runc finds under the name `criu`: hands its socket over and becomes the real criu.
//!
//! Runs as the process that runc has forked, with runc's environment and descriptors. Forking here
//! and staying as the parent would break runc in three ways (cgroup of the child, exit status,
//! `CLONE_PARENT` of the restored init), so nothing is left of the shim when criu runs.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::sys::{process, scm, seccomp};

/// Path of the interposer's socket.
pub const ENV_SOCKET: &str = "FERRY_CRIU_SOCKET";
/// Path of the real criu.
pub const ENV_REAL: &str = "FERRY_CRIU_REAL";
/// With the descriptors: go on.
pub const GO: &[u8] = b"c";
/// The same, and kcmp(2) need not look for what an epoll watches.
pub const VOUCHED: &[u8] = b"v";

/// Entry point when Ferry was started under the name `criu`. Returns only when it fails.
pub fn main() -> u8 {
    let error = match run() {
        Ok(never) => match never {},
        Err(e) => e,
    };
    let _ = writeln!(std::io::stderr(), "ferry (standing in for criu): {error:#}");
    1
}

fn run() -> Result<std::convert::Infallible> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let real = std::env::var_os(ENV_REAL).ok_or_else(|| anyhow!("{ENV_REAL} is not set"))?;
    if arguments.first().is_some_and(|a| a == "swrk") {
        let fd: RawFd = arguments
            .get(1)
            .and_then(|a| a.to_str())
            .and_then(|a| a.parse().ok())
            .ok_or_else(|| anyhow!("swrk wants the number of a descriptor"))?;
        let path =
            std::env::var_os(ENV_SOCKET).ok_or_else(|| anyhow!("{ENV_SOCKET} is not set"))?;
        let hub = UnixStream::connect(&path)
            .with_context(|| format!("cannot reach ferry at {}", path.to_string_lossy()))?;
        let theirs = process::adopt_fd(fd).context("the descriptor named by the runtime")?;
        scm::send(&hub, b"s", &[theirs.as_raw_fd()])?;
        let (word, fds) =
            scm::receive(&hub)?.ok_or_else(|| anyhow!("ferry closed the connection"))?;
        let mut fds = fds.into_iter();
        let ours = fds.next().ok_or_else(|| anyhow!("ferry sent no socket"))?;
        if let Some(namespace) = fds.next() {
            // This process has one thread, and is criu from here on.
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                .context("cannot enter the container's network namespace")?;
        }
        if word == VOUCHED {
            // Only ever a help.
            let _ = seccomp::epoll_targets_are_right();
        }
        process::dup_onto(&ours, fd)?;
        // The number now belongs to criu, over exec.
        std::mem::forget(theirs);
    }
    let error =
        Command::new(&real).args(arguments).env_remove(ENV_SOCKET).env_remove(ENV_REAL).exec();
    Err(anyhow!(error).context(format!("cannot run {}", real.to_string_lossy())))
}
