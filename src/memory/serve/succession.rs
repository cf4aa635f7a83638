//! Whoever goes on in the place of a daemon that was killed.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::Result;

use super::{Daemon, Ended, Intake, ServedTask};
use crate::memory::pending::Pending;
use crate::memory::staging::{PageSlot, Staging};
use crate::memory::will::{self, Missing, Will, WillWord};
use crate::sys::memory::uffd_wake_all;
use crate::transport::frame::PageRun;

/// What somebody who was killed while he served had open.
#[derive(Debug)]
pub struct LeftServer {
    /// What is missing.
    pub snapshot: File,
    /// The staged pages.
    pub staging: File,
    /// Where CRIU's last word comes.
    pub lazy: UnixStream,
    /// The tasks'.
    pub uffds: Vec<OwnedFd>,
}

/// Why nobody goes on in the place of somebody who was killed.
#[derive(Debug)]
pub struct Stranded {
    /// What went wrong.
    pub why: anyhow::Error,
    /// As in [`Ended`].
    pub held: Vec<OwnedFd>,
}

/// Goes on in the place of somebody who was killed, as [`Server::start`]; says whether something is
/// still on the source. The restore must be over but for its end.
///
/// # Errors
/// When his will cannot be read; nothing that a task waits on has been closed then.
pub fn succeed(
    will: Arc<Will>,
    left: LeftServer,
    want: impl Fn(PageRun) + Send + 'static,
    tell: impl FnOnce(Ended) + Send + 'static,
) -> Result<(Intake, bool), Stranded> {
    let LeftServer { mut snapshot, staging, lazy, uffds } = left;
    let begun = will::read(&will, &mut snapshot).and_then(|all| {
        let staging = Staging::adopt(staging, all.staging)?;
        Ok((Daemon::new(staging, will, want)?, all.tasks))
    });
    let (mut daemon, tasks) = match begun {
        Ok(both) => both,
        Err(why) => return Err(Stranded { why, held: uffds }),
    };

    daemon.take_over(uffds, tasks);
    // Faults that were read, and not served.
    let woken = daemon.targets.iter().try_for_each(|target| uffd_wake_all(&target.uffd));
    if let Err(why) = woken.map_err(Into::into).and_then(|()| daemon.make_will()) {
        return Err(Stranded { why, held: daemon.give_up() });
    }

    let lacks = daemon.targets.iter().any(|target| !target.remote.0.is_empty());
    Ok((daemon.spawn(tell, move |daemon| daemon.run(lazy))?, lacks))
}

impl Daemon {
    /// Has what somebody had who was killed. Whoever is not in his will came in its last moment, with
    /// nothing missing.
    pub(super) fn take_over(&mut self, uffds: Vec<OwnedFd>, tasks: Vec<Missing>) {
        self.finished = self.will.read(WillWord::Finished) != 0;
        // Forks that nobody has read yet are told by the tasks' descriptors.
        self.shared = is_shared(&tasks);
        let mut tasks: HashMap<_, _> = tasks.into_iter().map(|t| (t.uffd, t)).collect();
        for uffd in uffds {
            let mut target = ServedTask::new(uffd, 0, Pending::default());
            if let Some(task) = tasks.remove(&target.uffd.as_raw_fd()) {
                target.vpid = task.vpid;
                target.moved = task.moved;
                target.pending.put_back(task.runs);
                target.remote = target.pending.take_remote();
            }
            target.early = false;
            self.targets.push(target);
        }
    }
}

/// Tells whether two tasks may want the same slot.
pub(super) fn is_shared(tasks: &[Missing]) -> bool {
    let runs = tasks.iter().flat_map(|task| &task.runs);
    let staged = runs.filter_map(|(_, run)| match run.slot {
        PageSlot::At(slot) => Some((u64::from(slot), u64::from(slot) + u64::from(run.pages))),
        PageSlot::Zero | PageSlot::Remote(_) => None,
    });
    let mut all: Vec<_> = staged.collect();
    all.sort_unstable();
    all.windows(2).any(|pair| pair[1].0 < pair[0].1)
}
