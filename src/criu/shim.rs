//! What runc finds under the name `criu`: hands its socket over and becomes the real criu.
//!
//! Runs as the process that runc has forked, with runc's environment and descriptors. Forking here
//! and staying as the parent would break runc in three ways (cgroup of the child, exit status,
//! `CLONE_PARENT` of the restored init), so nothing is left of the shim when criu runs.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;

use crate::sys::{fault, process, scm, seccomp};

/// Path of the interposer's socket.
pub const ENV_SOCKET: &str = "FERRY_CRIU_SOCKET";
/// Path of the real criu.
pub const ENV_REAL: &str = "FERRY_CRIU_REAL";
/// With the descriptors: go on.
pub const GO: &[u8] = b"c";
/// The same, and kcmp(2) need not look for what an epoll watches.
pub const VOUCHED: &[u8] = b"v";
/// Then: there is a network namespace among the descriptors; there is none.
pub const NAMESPACE: u8 = b'n';
/// See [`NAMESPACE`].
pub const NO_NAMESPACE: u8 = b'-';
/// What is answered where something was to [lie over](cover) tasks' files, and does.
pub const COVERED: &[u8] = b"y";
/// What is answered where there were further descriptors, which criu will have.
pub const KEPT: &[u8] = b"k";
/// Longest word to the shim, or answer of its.
pub const LONGEST: usize = 8192;

/// Entry point when Ferry was started under the name `criu`. Returns only when it fails.
pub fn main() -> u8 {
    let error = match run() {
        Ok(never) => match never {},
        Err(e) => e,
    };
    let _ = writeln!(std::io::stderr(), "ferry (standing in for criu): {error:#}");
    1
}

/// Has this process, and nobody else, find other files where tasks' mappings are told: each file of the
/// directory, whose name is a task's number, lies over that task's `smaps`. mount_namespaces(7)
fn cover(directory: &Path) -> Result<()> {
    let none = None::<&str>;
    // This process has one thread, and is criu from here on: nothing is left of it when that ends.
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    // Other mounts keep their groups, which CRIU compares with the container's.
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, "/proc", none, private, none).context("/proc")?;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let place = Path::new("/proc").join(entry.file_name()).join("smaps");
        match mount(Some(&entry.path()), &place, none, MsFlags::MS_BIND, none) {
            // A task that has ended since needs none.
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(e) => return Err(anyhow!(e).context(place.display().to_string())),
        }
    }
    fault::point("shim.covered")
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
        let (word, fds) = scm::receive_stream(&hub, LONGEST)?
            .ok_or_else(|| anyhow!("ferry closed the connection"))?;
        let mut fds = fds.into_iter();
        let ours = fds.next().ok_or_else(|| anyhow!("ferry sent no socket"))?;
        let (word, rest) = word.split_at_checked(1).unwrap_or_default();
        let (namespaced, directory) = rest.split_at_checked(1).unwrap_or_default();
        if namespaced == [NAMESPACE] {
            let namespace = fds.next().ok_or_else(|| anyhow!("ferry sent no namespace"))?;
            // This process has one thread, and is criu from here on.
            nix::sched::setns(&namespace, CloneFlags::CLONE_NEWNET)
                .context("cannot enter the container's network namespace")?;
        }

        if !directory.is_empty() {
            // Ferry knows what to do without.
            let answer = match cover(Path::new(OsStr::from_bytes(directory))) {
                Ok(()) => COVERED.to_vec(),
                Err(e) => format!("{e:#}").into_bytes(),
            };
            scm::send(&hub, &answer[..answer.len().min(LONGEST)], &[])?;
        }

        if word == VOUCHED {
            // Only ever a help.
            let _ = seccomp::epoll_targets_are_right();
        }
        process::dup_onto(&ours, fd)?;
        // What criu is lent it finds under whatever numbers these are: the interposer looks, when it hears of it.
        if fds.len() > 0 {
            fds.try_for_each(process::keep_over_exec)?;
            scm::send(&hub, KEPT, &[])?;
        }

        // The number now belongs to criu, over exec.
        std::mem::forget(theirs);
    }

    let error =
        Command::new(&real).args(arguments).env_remove(ENV_SOCKET).env_remove(ENV_REAL).exec();
    Err(anyhow!(error).context(format!("cannot run {}", real.to_string_lossy())))
}
