//! The private directory of a migration: sockets, image files, logs. In memory, mode 0700, gone
//! afterwards.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::migration::protocol::{MAX_IMAGES, Plan};
use crate::network::HostSide;
#[cfg(doc)]
use crate::sys::process::ProcessId;
use crate::sys::tmpfs;

/// Where they all are.
pub const BASE: &str = "/run/ferry";

/// Path of a migration's directory. What a file in it is called is said here only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkPath(PathBuf);

/// Path of CRIU's own directory in a [`WorkPath`]: its log, its sockets, and what the runtime says of it.
#[derive(Clone, Debug)]
pub struct CriuPath(PathBuf);

impl WorkPath {
    /// `BASE/MIGRATION`
    pub fn of(migration: &str) -> WorkPath {
        WorkPath(Path::new(BASE).join(migration))
    }

    /// CRIU's images, and what else goes along as a file.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// CRIU's directory.
    pub fn criu(&self) -> CriuPath {
        CriuPath(self.0.join("work"))
    }

    /// Returns where the container's tmpfs mounts stand until they are bound into place: beside the work
    /// directory, never in it, as that is removed with all its files.
    pub fn tmpfs(&self) -> PathBuf {
        self.0.with_extension("tmpfs")
    }

    /// On a destination: the restored init's [`ProcessId`]. Gone with a reboot, like what it names.
    pub fn restored_init(&self) -> PathBuf {
        self.0.join("init")
    }

    /// On a destination: device and inode of the network namespace that was made.
    pub fn network(&self) -> PathBuf {
        self.0.join("network")
    }

    /// On a destination: the path of the network namespace, where an engine has made it.
    pub fn network_place(&self) -> PathBuf {
        self.0.join("network-place")
    }

    /// The name of a network namespace that has no other.
    pub fn unnamed_network(&self) -> PathBuf {
        self.0.join("netns")
    }

    /// On a destination: there is such a file when the container runs with all of its memory.
    pub fn all_in(&self) -> PathBuf {
        self.0.join("all-in")
    }

    /// On a destination that waits: the socket on which it takes the verdict.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// On a source: [`Spares`](crate::files::sockets::Spares), as JSON.
    pub fn spare_sockets(&self) -> PathBuf {
        self.0.join("sockets")
    }

    /// On a source: [`Renamed`](crate::files::sockets::Renamed), as JSON.
    pub fn renamed_sockets(&self) -> PathBuf {
        self.0.join("sockets.renamed")
    }

    /// [`HostSide`], as JSON.
    pub fn host_side(&self) -> PathBuf {
        self.0.join("host-side")
    }

    /// [`Stay`](crate::network::floating::Stay), as JSON.
    pub fn floating(&self) -> PathBuf {
        self.0.join("floating")
    }

    /// The network hook and what it is told, as JSON. From then on it may have been called.
    pub fn hook(&self) -> PathBuf {
        self.0.join("hook")
    }

    /// A [`ProcessId`] a line: those who go on if a Ferry is killed.
    pub fn guards(&self) -> PathBuf {
        self.0.join("guard")
    }

    /// Log of the guard.
    pub fn guard_log(&self) -> PathBuf {
        self.0.join("guard.log")
    }

    /// Notes what the host itself does for the container, before that is changed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note_host_side(&self, side: &HostSide) -> Result<()> {
        Ok(fs::write(self.host_side(), serde_json::to_vec(side)?)?)
    }
}

impl CriuPath {
    /// The migration's directory.
    pub fn work(&self) -> WorkPath {
        WorkPath(self.0.parent().unwrap_or(&self.0).to_owned())
    }

    /// CRIU's process number, as text: there from when it runs.
    pub fn pid(&self) -> PathBuf {
        self.0.join("criu.pid")
    }

    /// CRIU's log of a `dump` or a `restore`.
    pub fn log(&self, job: &str) -> PathBuf {
        self.0.join(format!("{job}.log"))
    }

    /// CRIU's configuration, beyond what the runtime asks of it.
    pub fn configuration(&self) -> PathBuf {
        self.0.join("criu.conf")
    }

    /// The runtime's log.
    pub fn runtime_log(&self) -> PathBuf {
        self.0.join("runc.log")
    }

    /// Standard error of the runtime.
    pub fn runtime_stderr(&self) -> PathBuf {
        self.0.join("runc.stderr")
    }

    /// Returns where the runtime writes the restored init's number.
    pub fn runtime_pid_file(&self) -> PathBuf {
        self.0.join("init.pid")
    }

    /// A file for each task whose mappings are hidden from CRIU.
    pub fn mappings(&self) -> PathBuf {
        self.0.join("mappings")
    }
}

impl From<PathBuf> for WorkPath {
    fn from(path: PathBuf) -> WorkPath {
        WorkPath(path)
    }
}

impl Deref for WorkPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Deref for CriuPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

/// A migration's directory, by the one who has made it. Removed on drop unless [`WorkDir::keep`] was called.
#[derive(Debug)]
pub struct WorkDir {
    path: WorkPath,
    kept: bool,
}

impl WorkDir {
    /// Makes `BASE/NAME`, on a tmpfs of its own where `/run` is not one.
    ///
    /// # Errors
    /// When it is there already or cannot be made.
    pub fn create(name: &str) -> Result<WorkDir> {
        let path = WorkPath::of(name);
        let what = || format!("cannot make {}", path.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(BASE).with_context(what)?;
        fs::DirBuilder::new().mode(0o700).create(&*path).with_context(what)?;

        let dir = WorkDir { path: path.clone(), kept: false };
        if !tmpfs::is_tmpfs(&path)? {
            tmpfs::mount_tmpfs(&path, 16 << 30).with_context(what)?;
        }
        // mkdir's mode is cut by the umask, never widened; a strange umask must not lock us out.
        fs::set_permissions(&*path, fs::Permissions::from_mode(0o700))?;

        for sub in [&*path.images(), &*path.criu()] {
            fs::create_dir(sub).with_context(what)?;
        }
        // What is shared among tasks is among the images: it is memory that counts, and not how large
        // `/run` is, which others need meanwhile.
        tmpfs::mount_tmpfs(&path.images(), MAX_IMAGES).with_context(what)?;
        Ok(dir)
    }

    /// Leaves it to somebody else to remove.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Deref for WorkDir {
    type Target = WorkPath;

    fn deref(&self) -> &WorkPath {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if !self.kept {
            remove(&self.path);
        }
    }
}

/// Removes a migration's directory, mounted or not; nothing is there when it has gone already.
pub fn remove(path: &WorkPath) {
    // Only a directory of ours, whatever a journal says.
    if path.parent() != Some(Path::new(BASE)) {
        return;
    }
    crate::files::tmpfs::unmount_all(&path.tmpfs());
    // A CRIU that was killed leaves control groups mounted in its work directory. What is mounted is
    // not ours to remove: first nothing may be mounted any more.
    for place in mounts_below(path).iter().rev() {
        let _ = tmpfs::unmount(place);
    }
    // EINVAL where it is no mount point of its own.
    let _ = tmpfs::unmount(path);
    if !mounts_below(path).is_empty() {
        return;
    }
    let _ = fs::remove_dir_all(&**path);
}

/// Returns what is mounted below a directory, in the order of mounting. proc_pid_mountinfo(5)
fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let text =
        String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap_or_default()).into_owned();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|place| place.starts_with(path) && place != path)
        .collect()
}

/// Returns where the destination makes the namespace: at the path that the container's configuration
/// names; one without a name gets one for as long as the migration takes.
pub fn network_place(plan: &Plan) -> Option<PathBuf> {
    plan.network.as_ref()?;
    let unnamed = || WorkPath::of(&plan.migration).unnamed_network();
    Some(plan.network_path.clone().unwrap_or_else(unnamed))
}
