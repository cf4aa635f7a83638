//! The underlying runtime (runc): asking it for a container's state, having it checkpoint, restore
//! and delete.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MntFlags, umount2};
use serde::Deserialize;

/// Where runc keeps its state when it is not told otherwise (for root).
pub const DEFAULT_ROOT: &str = "/run/runc";

/// The runtime's own answer to `state`. Read leniently: oci-spec's type refuses `"paused"`.
#[derive(Clone, Debug, Deserialize)]
pub struct RuntimeState {
    /// Container ID.
    pub id: String,
    /// `created`, `running`, `paused`, `stopped`.
    pub status: String,
    /// Host's number of the init process; 0 when stopped.
    #[serde(default)]
    pub pid: i32,
    /// The bundle's directory.
    pub bundle: PathBuf,
}

/// The runtime with the global flags that every call gets.
#[derive(Clone, Debug)]
pub struct Runtime {
    program: PathBuf,
    root: Option<PathBuf>,
    systemd_cgroup: bool,
}

impl Runtime {
    /// `program` is an absolute path; `root` as runc's `--root`.
    pub fn new(program: PathBuf, root: Option<PathBuf>, systemd_cgroup: bool) -> Runtime {
        Runtime { program, root, systemd_cgroup }
    }

    /// The program's path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Returns where the runtime keeps its state.
    pub fn root(&self) -> &Path {
        self.root.as_deref().unwrap_or(Path::new(DEFAULT_ROOT))
    }

    /// Takes away the mount that a `runc restore` leaves behind when it is killed: with it the
    /// container could never be deleted.
    pub fn clear_restore(&self, id: &str) {
        let mount = self.root().join(id).join(RESTORE_MOUNT);
        // Usually there is none.
        if umount2(&mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {
            let _ = std::fs::remove_dir(&mount);
        }
    }

    /// A command with the global flags in place.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if std::env::var_os("PATH").is_none_or(|p| p.is_empty()) {
            command.env("PATH", crate::oci::DEFAULT_PATH);
        }
        if let Some(root) = &self.root {
            command.arg("--root").arg(root);
        }
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command
    }

    fn run(&self, arguments: &[OsString]) -> Result<Output> {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null());
        let output =
            command.output().with_context(|| format!("cannot run {}", self.program.display()))?;
        tracing::debug!("{command:?} ended with {}", output.status);
        Ok(output)
    }

    /// The state of a container, `None` when there is no such container.
    ///
    /// # Errors
    /// When the runtime cannot be run or answers something else than a state.
    pub fn state(&self, id: &str) -> Result<Option<RuntimeState>> {
        let output = self.run(&["state".into(), id.into()])?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            if text.contains("does not exist") {
                return Ok(None);
            }
            bail!("{} state {id}: {}", self.program.display(), first_error(&text));
        }
        Ok(Some(serde_json::from_slice(&output.stdout).context("the runtime's state answer")?))
    }

    /// The first lines of `--version`.
    ///
    /// # Errors
    /// When the runtime cannot be run.
    pub fn version(&self) -> Result<String> {
        let output = self.run(&["--version".into()])?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().next().map(str::to_owned).ok_or_else(|| anyhow!("no answer to --version"))
    }

    /// Removes the container and what is left of it.
    ///
    /// # Errors
    /// When the runtime fails.
    pub fn delete_force(&self, id: &str) -> Result<()> {
        self.clear_restore(id);
        // One that has ended needs no force, with which runc waits for 100 ms in any case.
        if self.run(&["delete".into(), id.into()])?.status.success() {
            return Ok(());
        }
        let output = self.run(&["delete".into(), "--force".into(), id.into()])?;
        if output.status.success() {
            return Ok(());
        }
        bail!("{}", first_error(&String::from_utf8_lossy(&output.stderr)))
    }
}

/// What runc mounts in a container's state directory while it restores.
const RESTORE_MOUNT: &str = "criu-root";

/// The message of runc's last error, out of its log format.
pub fn first_error(stderr: &str) -> String {
    let errors: Vec<&str> = stderr.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    errors
        .iter()
        .rev()
        .find(|l| l.contains("level=error") || l.starts_with("runc") || l.contains("\"error\""))
        .or(errors.last())
        .map_or_else(|| "no message".to_owned(), |l| (*l).to_owned())
}

/// The message of the last error in a log of runc's, if there is any: `time=… level=error msg="…"`.
pub fn last_error(log: &str) -> Option<String> {
    let line = log.lines().rev().find(|line| line.contains("level=error"))?;
    let (_, message) = line.split_once(" msg=")?;
    let bare = message.strip_prefix('"').and_then(|message| message.strip_suffix('"'));
    Some(bare.unwrap_or(message).replace("\\\"", "\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_its_message() {
        let log = "time=\"2026-03-01T12:00:00Z\" level=warning msg=\"odd\"\n\
                   time=\"2026-03-01T12:00:00Z\" level=error msg=\"a \\\"b\\\" c\"\n\
                   time=\"2026-03-01T12:00:00Z\" level=info msg=over\n";
        assert_eq!(last_error(log).as_deref(), Some("a \"b\" c"));
        assert_eq!(last_error("level=error msg=plain").as_deref(), Some("plain"));
        assert_eq!((last_error(""), last_error("level=error")), (None, None));
    }
}
