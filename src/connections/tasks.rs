//! On the source: a process with connections, and the thread that has its descriptors, too.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Result, anyhow};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::look::{Extraction, Listeners, SeenConnection};
use super::{PlaceTaken, TakenOut, Watched, share};
use crate::memory::pages;
use crate::sys::connection::{self, Connection, OptionDefaults, Plain};
use crate::sys::fd_table::{self, Mirror};
use crate::sys::{listener, process, scm};
use crate::tasks::{epoll, mptcp};

/// Most connections that go in one piece.
const SOME: usize = 256;

pub(super) type MirrorHandle = fd_table::JoinHandle<std::io::Result<()>>;

/// What the thread with a process's descriptors is told.
pub(super) enum RepairStep {
    /// Keep those, by their place among the known ones, and have them watched no more.
    Take(Vec<usize>, Vec<(RawFd, Vec<Watched>)>),
    /// They are out of the tasks: take them down.
    Go,
}

/// Some that were taken down, by their place among the known ones.
pub(super) type ConnectionBatch = (i32, Vec<(usize, Connection)>);

/// What can be taken out.
#[derive(Clone, Copy, Debug)]
pub(super) enum SeenSocket {
    Connection(Plain),
    Listener,
}

/// A process with connections.
pub(super) struct ConnectedTask {
    pub(super) pid: i32,
    pub(super) vpid: i32,
    pub(super) known: Vec<SeenConnection>,
    /// Of each whether execve(2) closes it.
    pub(super) cloexec: Vec<Option<bool>>,
    /// Of each whether it can be taken out.
    pub(super) seen: Vec<Option<SeenSocket>>,
    /// See [`Others`].
    pub(super) like: Option<RawFd>,
    pub(super) chosen: Vec<usize>,
    pub(super) epolls: Vec<(RawFd, Vec<Watched>)>,
    pub(super) orders: Option<Sender<RepairStep>>,
    pub(super) heard: Receiver<Vec<Option<SeenSocket>>>,
    pub(super) done: Receiver<std::io::Result<()>>,
    pub(super) mirror: Option<MirrorHandle>,
}

impl Drop for ConnectedTask {
    fn drop(&mut self) {
        // Given up: nothing more is done when this returns.
        self.orders = None;
        let _ = self.mirror.take().map(fd_table::JoinHandle::join);
    }
}

impl ConnectedTask {
    pub(super) fn start(
        pid: i32,
        known: Vec<SeenConnection>,
        extraction: &Extraction,
        give: Sender<ConnectionBatch>,
    ) -> Result<Option<ConnectedTask>> {
        let task = pages::tasks(&[pid])?.first().copied();
        let (Some(task), Some(last)) = (task, known.last()) else { return Ok(None) };
        let entrance = extraction.vault.entrance.as_ref();
        let entrance = entrance.ok_or_else(|| anyhow!("nothing can be kept"))?;
        let (orders, ordered) = channel();
        let (tell, heard) = channel();
        let (tell_done, done) = channel();
        let (list, fresh, stop) =
            (known.clone(), extraction.fresh.clone(), extraction.stop.clone());
        let listeners = extraction.listeners.clone();

        // Nothing in here may have to do with a descriptor of ours: see there.
        let work = move |mirror: &Mirror| {
            let seen: Vec<_> = list.iter().map(|known| grab(mirror, *known, &listeners)).collect();
            let _ = tell.send(seen.clone());
            let Ok(RepairStep::Take(chosen, epolls)) = ordered.recv() else { return Ok(()) };
            let numbers: Vec<RawFd> = chosen.iter().map(|at| list[*at].number).collect();
            let kept = keep(mirror, &numbers, &epolls);
            let _ = tell_done.send(kept);
            let Ok(RepairStep::Go) = ordered.recv() else { return Ok(()) };
            let connection = |at: &usize| match seen[*at]? {
                SeenSocket::Connection(plain) => Some((*at, list[*at], plain)),
                SeenSocket::Listener => None,
            };

            let chosen: Vec<(usize, SeenConnection, Plain)> =
                chosen.iter().filter_map(connection).collect();
            repair_dump_all(mirror, &chosen, &fresh, |some| {
                give.send((pid, some)).is_ok() && !stop.load(Ordering::SeqCst)
            })
        };

        let mirror = Mirror::spawn(pid, last.number + 1, entrance.as_fd(), work)?;
        let (cloexec, seen, chosen, epolls) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (pid, vpid) = (task.pid, task.vpid);
        let (orders, mirror) = (Some(orders), Some(mirror));
        let all = ConnectedTask {
            pid,
            vpid,
            known,
            cloexec,
            seen,
            like: None,
            chosen,
            epolls,
            orders,
            heard,
            done,
            mirror,
        };

        Ok(Some(all))
    }

    pub(super) fn order(&self, order: RepairStep) {
        // Whoever has died does not answer, either.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }

    /// Returns those of the chosen that listen, by their place among the known ones.
    pub(super) fn listeners(&self) -> impl Iterator<Item = usize> {
        self.chosen.iter().copied().filter(|at| self.known[*at].listens)
    }

    pub(super) fn taken(&self) -> TakenOut {
        let place = |at: &usize| PlaceTaken {
            number: self.known[*at].number,
            cloexec: self.cloexec[*at] == Some(true),
            wake: match self.seen[*at] {
                Some(SeenSocket::Connection(plain)) => Some(plain.reuse),
                Some(SeenSocket::Listener) | None => None,
            },
        };
        TakenOut {
            pid: self.pid,
            started: process::start_time(self.pid),
            places: self.chosen.iter().map(place).collect(),
            epolls: self.epolls.clone(),
        }
    }
}

/// Duplicates a descriptor; what it is, if it is the same as ever and can be taken out.
fn grab(mirror: &Mirror, known: SeenConnection, listeners: &Listeners) -> Option<SeenSocket> {
    mirror.take(known.number).ok()?;
    let socket = mirror.get(known.number);
    if connection::cookie(socket).ok()? != known.cookie {
        return None;
    }
    if !known.listens {
        return connection::plain(socket).ok()?.map(SeenSocket::Connection);
    }
    let fresh = listeners.fresh[usize::from(known.v6)].as_ref()?;
    let (_, now) = listener::look(socket, fresh).ok()??;
    let same = listeners.known.get(&known.index) == Some(&now);
    (same && listener::waiting(socket).ok()? == 0).then_some(SeenSocket::Listener)
}

/// Puts descriptors into the vault, and ends that they are watched.
fn keep(
    mirror: &Mirror,
    numbers: &[RawFd],
    epolls: &[(RawFd, Vec<Watched>)],
) -> std::io::Result<()> {
    for some in numbers.chunks(scm::MOST_FDS) {
        let some: Vec<RawFd> = some.iter().map(|number| mirror.get(*number).as_raw_fd()).collect();
        scm::send_now(mirror.kept(), &[0], &some)?;
    }
    for (epoll, list) in epolls {
        let epoll = mirror.epoll(*epoll)?;
        for watched in list {
            mirror.unwatch(epoll, watched.number)?;
        }
    }
    Ok(())
}

/// On several threads: they share the table.
fn repair_dump_all(
    mirror: &Mirror,
    chosen: &[(usize, SeenConnection, Plain)],
    fresh: &[Option<OptionDefaults>; 2],
    give: impl Fn(Vec<(usize, Connection)>) -> bool + Clone + Send,
) -> std::io::Result<()> {
    let one = |(at, known, plain): &(usize, SeenConnection, Plain)| {
        (*at, mirror.get(known.number), fresh[usize::from(known.v6)].as_ref(), *plain)
    };
    let sockets: Vec<_> = chosen.iter().map(one).collect();
    let each = share(sockets.len());

    thread::scope(|scope| {
        let mut all = Vec::new();
        for part in sockets.chunks(each) {
            let give = give.clone();
            all.push(scope.spawn(move || -> std::io::Result<()> {
                for some in part.chunks(SOME) {
                    let mut batch = Vec::with_capacity(some.len());
                    for &(at, socket, fresh, plain) in some {
                        let fresh = fresh.ok_or(std::io::ErrorKind::Unsupported)?;
                        batch.push((at, connection::repair_dump(socket, plain, fresh)?));
                    }
                    if !give(batch) {
                        break;
                    }
                }
                Ok(())
            }));
        }
        all.into_iter().try_for_each(|part| part.join().unwrap_or_else(|_| Err(panicked())))
    })
}

fn panicked() -> std::io::Error {
    std::io::Error::other("the thread has died")
}

/// Descriptors of the container's processes that stay where they are.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// Process and number; what it watches.
    epolls: Vec<(i32, RawFd, Vec<epoll::EpollTarget>)>,
    /// Inodes.
    sockets: HashSet<u64>,
    /// By process: one that CRIU restores, of which another one can stand anywhere for a while: of no
    /// file, whose locks would end with it. An epoll, where there is one.
    like: HashMap<i32, RawFd>,
    /// The same, of those that have none but a device.
    devices: HashMap<i32, RawFd>,
}

impl Others {
    pub(super) fn look(&mut self, pid: i32, number: RawFd) -> Result<()> {
        let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
        self.sockets.extend(process::socket_inode(&target));
        if epoll::is_epoll(&target) {
            self.epolls.push((pid, number, epoll::targets(pid, number)?));
            self.like.insert(pid, number);
        } else if !target.is_absolute() {
            self.like.entry(pid).or_insert(number);
        } else if !self.like.contains_key(&pid)
            && !self.devices.contains_key(&pid)
            && mptcp::stands_in(pid, number, &target)
        {
            self.devices.insert(pid, number);
        }
        Ok(())
    }
}

/// Which of those that can be taken out are: all but those that somebody has under another number, or
/// another process has, or an epoll watches so.
pub(super) fn choose(tasks: &mut [ConnectedTask], others: Others) {
    let mut by_inode = HashMap::new();
    for (at, task) in tasks.iter_mut().enumerate() {
        task.like = others.like.get(&task.pid).or(others.devices.get(&task.pid)).copied();
        for (n, known) in task.known.iter().enumerate() {
            let inode = u64::from(known.inode);
            let only = !others.sockets.contains(&inode) && task.like.is_some();
            if only && task.seen[n].is_some() && task.cloexec[n].is_some() {
                by_inode.insert(inode, (at, n));
            }
        }
    }

    for (pid, _, list) in &others.epolls {
        for target in list {
            if let Some(&(at, n)) = by_inode.get(&target.inode)
                && (tasks[at].pid != *pid || tasks[at].known[n].number != target.number)
            {
                by_inode.remove(&target.inode);
            }
        }
    }

    for (pid, epoll, list) in others.epolls {
        let list: Vec<Watched> = list
            .into_iter()
            .filter(|target| by_inode.contains_key(&target.inode))
            .map(|t| Watched { number: t.number, events: t.events, data: t.data })
            .collect();
        if let Some(task) = tasks.iter_mut().find(|task| task.pid == pid && !list.is_empty()) {
            task.epolls.push((epoll, list));
        }
    }

    for (at, n) in by_inode.into_values() {
        tasks[at].chosen.push(n);
    }
    tasks.iter_mut().for_each(|task| task.chosen.sort_unstable());
}

/// Of each whether execve(2) closes it, as far as there is one. proc_pid_fdinfo(5)
pub(super) fn closed_by_exec(pid: i32, known: &[SeenConnection]) -> Vec<Option<bool>> {
    // Thousands of them, in the freeze: with as few calls and as short paths as can be.
    let Ok(directory) = File::open(format!("/proc/{pid}/fdinfo")) else {
        return vec![None; known.len()];
    };
    let mut bytes = [0; 256];
    let mut flags = |known: &SeenConnection| {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let name = known.number.to_string();
        let file = openat(&directory, name.as_str(), flags, Mode::empty()).ok()?;
        let length = File::from(file).read(&mut bytes).ok()?;
        let text = std::str::from_utf8(&bytes[..length]).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = libc::c_int::from_str_radix(line.trim(), 8).ok()?;
        Some(flags & libc::O_CLOEXEC != 0)
    };
    known.iter().map(&mut flags).collect()
}
