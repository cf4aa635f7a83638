//! What a checkpoint loses, changes or stumbles over, found while the container still runs.
//!
//! Each rule looks at what the kernel tells of the container's tasks in `/proc`, and says what it has
//! found as a [`Problem`]: one that stops the migration where data or safety would be lost, a warning
//! where something is only not as it was.

pub mod files;
pub mod limits;
pub mod memory;
pub mod mounts;
mod outside;
pub mod sockets;
pub mod strangers;
pub mod tasks;
pub mod watches;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::{aio, settings, sleepers};
use crate::oci::bundle::Bundle;
use crate::problem::Problem;
use crate::sys::process;

/// Most that are named of a kind.
const NAMED: usize = 3;

/// What the rules look at.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// The container's first process.
    pub init: i32,
    /// All processes of its control group.
    pub tasks: &'a [i32],
}

impl Scene<'_> {
    /// Tells whether it has a network namespace that is not this host's.
    fn own_network(self) -> bool {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        of(&self.init.to_string()).is_some_and(|theirs| Some(theirs) != of("self"))
    }
}

/// Everything that shows here: obstacles and warnings.
pub fn problems(scene: Scene<'_>, bundle: Option<&Bundle>) -> Vec<Problem> {
    let mut found = Vec::new();
    found.extend(strangers::problems(scene));
    found.extend(aio::problem(&aio::rings(scene.tasks)));
    found.extend(sleepers::problem(scene.tasks));

    // Those do not go, whatever they have; some are only being put there.
    let guests = strangers::find(scene);
    let mut own = scene.tasks.to_vec();
    own.retain(|pid| guests.iter().all(|guest| guest.pid() != *pid));
    let scene = Scene { tasks: &own, ..scene };
    found.extend(tasks::problems(scene, bundle));
    found.extend(bundle.and_then(|bundle| limits::changed(scene.init, bundle)));

    let open = files::all(scene.tasks);
    found.extend(files::problems(scene, &open));
    found.extend(outside::problems(scene, &open));
    found.extend(watches::problem(scene, &open));
    found.extend(sockets::problems(scene, &open));
    found.extend(memory::problems(scene, bundle));
    found.extend(settings::problem(scene.tasks));

    let mounts = process::proc_text(scene.init, "mountinfo").unwrap_or_default();
    let bound = bundle.map(Bundle::bind_mounts).unwrap_or_default();
    let bound: Vec<PathBuf> = bound.into_iter().map(|mount| mount.destination).collect();
    found.extend(mounts::shared(&mounts, &bound));

    found
}

/// A process, for people.
pub(super) fn who(pid: i32) -> String {
    let name = process::proc_text(pid, "comm").unwrap_or_default();
    format!("process {pid} ({})", name.trim_end_matches('\n').escape_debug())
}

/// The first of many, for people.
fn named(list: &[String]) -> String {
    match list.len() {
        0..=NAMED => list.join(", "),
        all => format!("{} and {} more", list[..NAMED].join(", "), all - NAMED),
    }
}

/// A directory of the container's, found without leaving its root.
pub(super) fn directory_in(root: &Path, place: &Path) -> Option<OwnedFd> {
    let root = File::open(root).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(&root, place, how).ok()
}

/// The value of a line of `/proc/PID/status`. proc_pid_status(5)
pub(crate) fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let status = "Name:\tPPid:\nNSpid:\t7\t1\nPid:\t7\nPPid:\t3\n";
        assert_eq!(field(status, "Pid"), Some("7"));
        assert_eq!(field(status, "PPid"), Some("3"));
        assert_eq!(field(status, "Uid"), None);
    }
}
