//! `--network hook=CMD`: a program on each host that does what Ferry cannot know of, such as moving
//! a route by BGP or an address by a cloud's API.
//!
//! Ferry makes the container's network as it does by itself (`auto`), and calls CMD, an absolute path
//! that is the same on both hosts, without arguments, in an environment of PATH alone, with one JSON
//! object on its standard input:
//!
//! ```text
//! {"version": 1, "phase": "switch", "role": "destination", "migration": "80e341447dd190d2",
//!  "container": "web", "peer": "host1", "netns": "/run/netns/web",
//!  "links": [{"name": "eth0", "kind": "routed", "host_interface": "cali0",
//!             "mac": "02:00:00:00:00:05", "mtu": 1500, "addresses": ["10.1.0.5/32", "fd00::5/128"]}]}
//! ```
//!
//! | phase | on | when | if it fails |
//! |---|---|---|---|
//! | `prepare` | both | while the container runs on the source | the migration is given up |
//! | `switch` | both | after the commit, while the container starts: lead its packets to the destination | is told; nothing can be taken back |
//! | `rollback` | both | given up after `prepare`: as before | is told |
//! | `release` | source | the container is gone here | is told |
//!
//! It fails by another exit status than 0, or by taking longer than [`LIMIT`]: then it is killed with
//! all of its session. What it says on its standard error is told. None runs while the container is
//! frozen. After a crash a phase may come twice, `rollback` without `prepare`, and `release` without
//! `switch`. Until `switch` has ended on the source, packets that still come there are sent along.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::image::{LinkImage, LinkKind, NetworkImage};
use crate::problem::{Problem, Trying};
use crate::sys::process;

/// What one call may take.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of standard error that are told.
const TOLD: usize = 1000;
/// PATH_MAX of linux/limits.h.
const LONGEST: usize = 4096;

/// When the program is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPhase {
    /// Make ready.
    Prepare,
    /// The container is on the destination now.
    Switch,
    /// It stays on the source.
    Rollback,
    /// It is gone from the source.
    Release,
}

impl HookPhase {
    fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Switch => "switch",
            Self::Rollback => "rollback",
            Self::Release => "release",
        }
    }
}

/// A hook with what it is told each time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hook {
    command: PathBuf,
    input: Value,
}

/// Which end of which migration.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// `source` or `destination`.
    pub role: &'a str,
    /// The migration's ID.
    pub migration: &'a str,
    /// The container's.
    pub container: &'a str,
    /// The other host.
    pub peer: &'a str,
    /// The namespace.
    pub netns: &'a Path,
}

/// Returns what `hook=` may name.
pub(super) fn command(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain && text.len() < LONGEST && !text.contains('\0') {
        Ok(path.to_owned())
    } else {
        Err(format!("{text:?} is no absolute path of a program"))
    }
}

/// Tells whether the program can be run here, and whether only root can have written it.
pub fn usable(command: &Path) -> Result<(), Problem> {
    let what = || format!("the network hook {} cannot be used", command.display());
    let hint = "it is a program of root's, on both hosts, and nobody else may write to it";
    let refuse = |why: &str| Err(Problem::new(what(), why).hint(hint));
    let meta = fs::metadata(command).trying(what).map_err(|p| p.hint(hint))?;
    match meta.mode() {
        _ if !meta.is_file() => refuse("it is no file"),
        mode if mode & 0o111 == 0 => refuse("it is not executable"),
        mode if mode & 0o022 != 0 || meta.uid() != 0 => refuse("others than root may write to it"),
        _ => Ok(()),
    }
}

impl Hook {
    /// One that is not called yet.
    pub fn new(command: &Path, about: About<'_>, image: &NetworkImage) -> Self {
        let links: Vec<Value> = image.outward().map(|(_, link)| described(link)).collect();
        let input = json!({
            "version": 1, "role": about.role, "migration": about.migration,
            "container": about.container, "peer": about.peer, "netns": about.netns, "links": links,
        });
        Self { command: command.to_owned(), input }
    }

    /// Calls it. Up to [`LIMIT`]. `work` is a private directory.
    pub fn call(&self, phase: HookPhase, work: &Path) -> Result<(), Problem> {
        let what = || format!("the network hook {} ({})", self.command.display(), phase.name());
        let said = work.join(format!("hook-{}", phase.name()));
        let mut input = self.input.clone();
        input["phase"] = phase.name().into();
        let mut command = Command::new(&self.command);
        command.env_clear().env("PATH", crate::oci::DEFAULT_PATH).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        command.stderr(File::create(&said).trying(what)?);
        process::in_new_session(&mut command);

        let began = Instant::now();
        let mut child = command.spawn().trying(what)?;
        let pid = child.id().cast_signed();
        if let Some(mut stdin) = child.stdin.take() {
            // Less than a pipe holds; who does not read it may not care for it.
            let _ = stdin.write_all(format!("{input}\n").as_bytes());
        }

        let ended = process::pidfd_open(pid)
            .and_then(|pidfd| process::wait_readable(&[pidfd.as_fd()], Some(began + LIMIT)));
        if ended.is_err() {
            // It is its session's first, and not waited for: the number is its own.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }

        let status = child.wait().trying(what)?;
        tracing::debug!("{} took {:.1?}", what(), began.elapsed());
        let words = fs::read(&said).unwrap_or_default();
        let _ = fs::remove_file(&said);
        let words = String::from_utf8_lossy(&words[..words.len().min(TOLD)]).trim().to_owned();

        match (ended, status.success()) {
            (Err(_), _) => Err(Problem::new(what(), format!("not over after {LIMIT:?}; {words}"))),
            (Ok(_), true) => Ok(()),
            (Ok(_), false) => Err(Problem::new(what(), format!("{status}; {words}"))),
        }
    }
}

fn described(link: &LinkImage) -> Value {
    let (kind, host) = match &link.kind {
        LinkKind::Loopback => ("loopback", None),
        LinkKind::Macvlan { parent, .. } => ("macvlan", Some(parent)),
        LinkKind::Veth { host_ifname, .. } => ("veth", Some(host_ifname)),
        LinkKind::Routed { end } => ("routed", Some(&end.name)),
    };
    let addresses: Vec<String> =
        link.addresses.iter().map(|a| format!("{}/{}", a.local, a.prefix)).collect();
    let mac = link.mac.map(|mac| mac.map(|b| format!("{b:02x}")).join(":"));
    json!({
        "name": link.name, "kind": kind, "host_interface": host, "mac": mac, "mtu": link.mtu,
        "addresses": addresses,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        assert_eq!(command("/usr/lib/hook"), Ok("/usr/lib/hook".into()));
        for text in ["", "hook", "/a/../b", "./x"] {
            assert!(command(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_hook_reads_its_input_and_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("hook");
        let script =
            "#!/bin/sh\ngrep -q '\"phase\":\"prepare\"' || { echo unwilling >&2; exit 7; }\n";
        fs::write(&program, script).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, executable).unwrap();
        let hook = Hook { command: program, input: json!({}) };
        assert_eq!(hook.call(HookPhase::Prepare, dir.path()), Ok(()));
        let said = hook.call(HookPhase::Release, dir.path()).unwrap_err().to_string();
        assert!(said.contains("(release)") && said.contains("unwilling"), "{said}");
    }
}
