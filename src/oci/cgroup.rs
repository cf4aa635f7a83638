//! The container's control group: its processes, freezing and thawing them, ending them.
//! Source: Documentation/admin-guide/cgroup-v2.rst (`cgroup.freeze`, `cgroup.events`,
//! `cgroup.kill`) and cgroup-v1/freezer-subsystem.rst.

use std::fs;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::sys::process::wait_readable;

/// Moves a process into the control group that it is in already (unified hierarchy, or the
/// freezer's of version 1).
///
/// # Errors
/// When it is in the root group, or the group cannot be written to.
pub fn move_to_where_it_is(pid: i32) -> Result<()> {
    let group = Cgroup::of_process(pid)?;
    Ok(fs::write(group.path().join("cgroup.procs"), pid.to_string())?)
}

/// Has a process of ours be in no control group but the topmost one that can be seen: whoever ends a group
/// ends it no more. cgroups(7), version 2.
///
/// # Errors
/// Where there is none, or it cannot be written to.
pub fn move_to_root(pid: i32) -> Result<()> {
    let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo")?).into_owned();
    let unified = |line: &&str| line.contains(" - cgroup2 ");
    let place = mounts.lines().find(unified).and_then(|line| line.split(' ').nth(4));
    let place = Path::new(place.context("no control groups of version 2")?).join("cgroup.procs");
    fs::write(&place, pid.to_string())
        .with_context(|| format!("cannot write to {}", place.display()))
}

/// Has the memory of a process of ours be charged to the control group of another one: cgroups(7).
///
/// # Errors
/// Where that is in none of its own, or it cannot be written to.
pub fn charge_like(pid: i32, like: i32) -> Result<()> {
    let group = match Cgroup::of_controller(like, "memory") {
        Some(group) => group,
        None => match Cgroup::of_process(like)? {
            Cgroup::V2(group) => group,
            Cgroup::V1(_) => bail!("process {like} is in no group of the memory controller"),
        },
    };
    let place = group.join("cgroup.procs");
    fs::write(&place, pid.to_string())
        .with_context(|| format!("cannot write to {}", place.display()))
}

/// A control group that can be frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "version", content = "path")]
pub enum Cgroup {
    /// In the unified hierarchy.
    V2(PathBuf),
    /// In a freezer hierarchy of version 1.
    V1(PathBuf),
}

/// Tells whether what is mounted, by its type and options, is the hierarchy of this controller.
fn has(controller: &str) -> impl Fn(&str, &str) -> bool {
    move |kind, options| kind == "cgroup" && options.split(',').any(|one| one == controller)
}

/// The directory of a group, `path` in its hierarchy, below where that is mounted; none for the topmost one.
/// `mounts` as proc_pid_mountinfo(5) has it.
fn directory(mounts: &str, path: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    let (root, point) = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        wanted(kind, options).then_some((root, point))
    })?;
    let inside = Path::new(path).strip_prefix(root).ok()?;
    (!inside.as_os_str().is_empty()).then(|| Path::new(point).join(inside))
}

impl Cgroup {
    /// The control group of a process, by which its container can be frozen.
    ///
    /// # Errors
    /// When there is no freezer, or the group is the root, which holds more than the container.
    pub fn of_process(pid: i32) -> Result<Cgroup> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))
            .with_context(|| format!("process {pid} is gone"))?;
        let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo")?).into_owned();
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (Some(id), Some(controllers), Some(path)) =
                (parts.next(), parts.next(), parts.next())
            else {
                continue;
            };
            if id == "0" && controllers.is_empty() {
                let found = directory(&mounts, path, |kind, _| kind == "cgroup2");
                if let Some(dir) = found.filter(|d| d.join("cgroup.freeze").exists()) {
                    return Ok(Cgroup::V2(dir));
                }
            } else if controllers.split(',').any(|c| c == "freezer")
                && let Some(dir) = directory(&mounts, path, has("freezer"))
            {
                return Ok(Cgroup::V1(dir));
            }
        }
        bail!("process {pid} has no control group of its own that could be frozen")
    }

    /// Returns where a controller of version 1 has a process, if it is one of these here: cgroups(7).
    pub fn of_controller(pid: i32, controller: &str) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").ok()?).into_owned();
        let path = text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|one| one == controller).then_some(path)
        })?;
        directory(&mounts, path, has(controller))
    }

    fn path(&self) -> &Path {
        match self {
            Cgroup::V2(p) | Cgroup::V1(p) => p,
        }
    }

    /// The processes in it and below it, as this host numbers them.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        let mut left = vec![self.path().to_owned()];
        while let Some(dir) = left.pop() {
            let list = fs::read_to_string(dir.join("cgroup.procs"))
                .with_context(|| format!("cannot list {}", dir.display()))?;
            found.extend(list.lines().filter_map(|l| l.parse::<i32>().ok()));
            for entry in fs::read_dir(&dir)?.flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    left.push(entry.path());
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Stops every task and waits until all have stopped.
    ///
    /// # Errors
    /// When they have not within `timeout` (a task in an uninterruptible sleep); it is thawed
    /// again then.
    pub fn freeze(&self, timeout: Duration) -> Result<()> {
        self.tell_freeze()?;
        let done = self.wait_frozen(Instant::now() + timeout);
        if done.is_err() {
            self.thaw()?;
        }
        done
    }

    /// Stops every task, as one who was not to run in the meantime: it stays told to stop, also when it
    /// takes longer.
    ///
    /// # Errors
    /// When they have not stopped within `timeout`.
    pub fn freeze_for_good(&self, timeout: Duration) -> Result<()> {
        self.tell_freeze()?;
        self.wait_frozen(Instant::now() + timeout)
    }

    /// Tells the kernel to stop every task, without waiting.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn tell_freeze(&self) -> Result<()> {
        match self {
            Cgroup::V2(p) => fs::write(p.join("cgroup.freeze"), "1"),
            Cgroup::V1(p) => fs::write(p.join("freezer.state"), "FROZEN"),
        }
        .with_context(|| format!("cannot freeze {}", self.path().display()))
    }

    fn wait_frozen(&self, deadline: Instant) -> Result<()> {
        match self {
            Cgroup::V2(p) => {
                // The kernel wakes a poll on cgroup.events when the value changes.
                let mut events = fs::File::open(p.join("cgroup.events"))?;
                loop {
                    let mut text = String::new();
                    events.rewind()?;
                    events.read_to_string(&mut text)?;
                    if text.lines().any(|l| l == "frozen 1") {
                        return Ok(());
                    }

                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        bail!("{} does not freeze: a task cannot be stopped", p.display());
                    }
                    let timeout = PollTimeout::try_from(left.as_millis() as i32 + 1)?;
                    let mut set = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
                    poll(&mut set, timeout)?;
                }
            }
            Cgroup::V1(p) => {
                // Version 1 has no notification; writing again moves stragglers on.
                while fs::read_to_string(p.join("freezer.state"))?.trim() != "FROZEN" {
                    if Instant::now() > deadline {
                        bail!("{} does not freeze: a task cannot be stopped", p.display());
                    }
                    self.tell_freeze()?;
                    std::thread::yield_now();
                }
                Ok(())
            }
        }
    }

    /// Lets the tasks run.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn thaw(&self) -> Result<()> {
        match self {
            Cgroup::V2(p) => fs::write(p.join("cgroup.freeze"), "0"),
            Cgroup::V1(p) => fs::write(p.join("freezer.state"), "THAWED"),
        }
        .with_context(|| format!("cannot thaw {}", self.path().display()))
    }

    /// Ends every task, frozen ones too, and waits until all are gone. Version 1 kills only
    /// thawed tasks, so they are thawed with the signal already pending: none of them returns to
    /// user mode.
    ///
    /// # Errors
    /// When they are not gone within `timeout`.
    pub fn kill(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let kill = self.path().join("cgroup.kill");
        if kill.exists() {
            fs::write(&kill, "1")?;
        } else {
            for pid in self.processes()? {
                // A process that is gone already is what we want.
                let _ = crate::sys::process::pidfd_open(pid)
                    .and_then(|fd| crate::sys::process::pidfd_kill(fd, libc::SIGKILL));
            }
            self.thaw()?;
        }
        let watched: Vec<_> = self
            .processes()?
            .into_iter()
            .filter_map(|pid| crate::sys::process::pidfd_open(pid).ok())
            .collect();
        for fd in &watched {
            wait_readable(&[fd.as_fd()], Some(deadline))
                .map_err(|_| anyhow!("a task of {} does not end", self.path().display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_below_where_its_hierarchy_is_mounted() {
        let mounts = "\
30 25 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
31 25 0:27 /docker /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
32 25 0:28 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
";
        let found = |path: &str, controller: &str| {
            let dir = directory(mounts, path, has(controller))?;
            Some(dir.to_string_lossy().into_owned())
        };
        assert_eq!(found("/box", "memory").as_deref(), Some("/sys/fs/cgroup/memory/box"));
        assert_eq!(found("/docker/box", "cpu").as_deref(), Some("/sys/fs/cgroup/cpu,cpuacct/box"));
        assert_eq!(found("/elsewhere", "cpu"), None);
        assert_eq!(found("/", "memory"), None, "the topmost holds others, too");
        assert_eq!(found("/box", "pids"), None);
        let unified = directory(mounts, "/box", |kind, _| kind == "cgroup2");
        assert_eq!(unified, Some("/sys/fs/cgroup/unified/box".into()));
    }
}
