//! The private directory of a migration: sockets, image files, logs. In memory, mode 0700, gone
//! afterwards.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::migration::protocol::{MAX_IMAGES, Plan};
use crate::network::HostSide;
use crate::sys::tmpfs;

/// Where they all are.
pub const BASE: &str = "/run/ferry";

/// See the module. Removed on drop unless [`WorkDir::keep`] was called.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    kept: bool,
}

impl WorkDir {
    /// Makes `BASE/NAME`, on a tmpfs of its own where `/run` is not one.
    ///
    /// # Errors
    /// When it is there already or cannot be made.
    pub fn create(name: &str) -> Result<WorkDir> {
        let path = Path::new(BASE).join(name);
        let what = || format!("cannot make {}", path.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(BASE).with_context(what)?;
        fs::DirBuilder::new().mode(0o700).create(&path).with_context(what)?;
        let dir = WorkDir { path: path.clone(), kept: false };
        if !tmpfs::is_tmpfs(&path)? {
            tmpfs::mount_tmpfs(&path, 16 << 30).with_context(what)?;
        }
        // mkdir's mode is cut by the umask, never widened; a strange umask must not lock us out.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        for sub in ["images", "work"] {
            fs::create_dir(dir.path.join(sub)).with_context(what)?;
        }
        // What is shared among tasks is among the images: it is memory that counts, and not how large
        // `/run` is, which others need meanwhile.
        tmpfs::mount_tmpfs(&dir.images(), MAX_IMAGES).with_context(what)?;
        Ok(dir)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For CRIU's images.
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    /// For CRIU's log and sockets.
    pub fn work(&self) -> PathBuf {
        self.path.join("work")
    }

    /// Leaves it to somebody else to remove.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if !self.kept {
            remove(&self.path);
        }
    }
}

/// Where the container's tmpfs mounts stand until they are bound into place: beside the work
/// directory, never in it, as that is removed with all its files.
pub fn tmpfs_base(work: &Path) -> PathBuf {
    work.with_extension("tmpfs")
}

/// Removes a migration's directory, mounted or not; nothing is there when it has gone already.
pub fn remove(path: &Path) {
    // Only a directory of ours, whatever a journal says.
    if path.parent() != Some(Path::new(BASE)) {
        return;
    }
    crate::files::tmpfs::unmount_all(&tmpfs_base(path));
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
    let _ = fs::remove_dir_all(path);
}

/// What is mounted below a directory, in the order of mounting. proc_pid_mountinfo(5)
fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let text =
        String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap_or_default()).into_owned();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|place| place.starts_with(path) && place != path)
        .collect()
}

/// In the work directory of a destination: the restored init's number and start time, and the
/// device and inode of the namespace that was made. Gone with a reboot, like what they name.
pub const INIT: &str = "init";

/// In the work directory of a source: see [`Spares`].
pub const SOCKETS: &str = "sockets";

/// In the work directory of a source: see [`Renamed`](crate::files::sockets::Renamed).
pub const RENAMED: &str = "sockets.renamed";

/// See [`HostSide`].
pub const HOST_SIDE: &str = "host-side";

/// See [`INIT`].
pub const NETWORK: &str = "network";

/// In the work directory: numbers and start times of those who go on if a Ferry is killed, a line each.
pub const GUARD: &str = "guard";

/// In the work directory of a destination: the path of the namespace, where an engine has made it.
pub const NETWORK_PLACE: &str = "network-place";

/// CRIU's number, in its own work directory.
pub const CRIU_PID: &str = "criu.pid";

/// Notes what the host itself does for the container, before that is changed.
///
/// # Errors
/// When it cannot be written.
pub fn note_host_side(work: &Path, side: &HostSide) -> Result<()> {
    Ok(fs::write(work.join(HOST_SIDE), serde_json::to_vec(side)?)?)
}

/// Where the destination makes the namespace: at the path that the container's configuration
/// names; one without a name gets one for as long as the migration takes.
pub fn network_place(plan: &Plan) -> Option<PathBuf> {
    plan.network.as_ref()?;
    let unnamed = || unnamed_network(&Path::new(BASE).join(&plan.migration));
    Some(plan.network_path.clone().unwrap_or_else(unnamed))
}

/// Where in a work directory a namespace has its name that has none.
pub fn unnamed_network(work: &Path) -> PathBuf {
    work.join("netns")
}
