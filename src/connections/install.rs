//! On the destination: sockets that are prepared while the container still runs elsewhere, become
//! connections in the freeze, and come into the restored tasks.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::look::{raise_limit, room};
use super::{ComingConnection, ConnectionPiece, MOST, SocketKind, Watched, share};
use crate::problem::Problem;
use crate::sys::connection::{self, Connection};
use crate::sys::fd_inject::{self, FdPlace};
use crate::sys::fd_table::{FIRST, Mirror};
use crate::sys::listener;
use crate::sys::netns::NetNs;
use crate::sys::socket::{enter_repair, is_mptcp};
use crate::tasks::freezer::of_first_space;

/// Most numbers of an epoll's entries that may come in all.
const MOST_WATCHED: usize = 4 * MOST;

enum InstallOrder {
    Coming(Vec<ComingConnection>),
    Piece(Vec<u8>),
}

/// Whoever makes connections out of what comes.
#[derive(Debug)]
pub struct Installation {
    orders: Sender<InstallOrder>,
    thread: thread::JoinHandle<Result<Installed>>,
}

impl Installation {
    /// Begins in this namespace, if it is not ours; `early`: its addresses may come only later.
    /// `prepared` hears, for each announcement, which of those that it names cannot be taken.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        namespace: Option<NetNs>,
        early: bool,
        prepared: impl Fn(Vec<u32>) + Send + 'static,
    ) -> Result<Installation> {
        let limit = raise_limit()?;
        let (orders, ordered) = channel();
        let work = move || take_in(&ordered, limit, early, &prepared);
        let thread =
            thread::Builder::new().name("landing".into()).spawn(move || match namespace {
                Some(namespace) => namespace.run(work)?,
                None => work(),
            })?;
        Ok(Installation { orders, thread })
    }

    /// They will come.
    ///
    /// # Errors
    /// When one of them is none.
    pub fn announce(&self, coming: Vec<ComingConnection>) -> Result<()> {
        coming.iter().try_for_each(ComingConnection::validate)?;
        self.order(InstallOrder::Coming(coming))
    }

    /// Takes in a piece of what comes.
    ///
    /// # Errors
    /// When an earlier one could not be taken in; [`Installation::finish`] says why.
    pub fn feed(&self, piece: Vec<u8>) -> Result<()> {
        self.order(InstallOrder::Piece(piece))
    }

    fn order(&self, order: InstallOrder) -> Result<()> {
        // What has become of it, the end tells.
        let _ = self.orders.send(order);
        Ok(())
    }

    /// All have come: waits until they stand.
    ///
    /// # Errors
    /// When one could not be made.
    pub fn finish(self) -> Result<Installed> {
        drop(self.orders);
        let installed = self.thread.join().map_err(|_| anyhow!("the thread has died"))?;
        installed.context("connections")
    }
}

struct ConnectionSlot {
    coming: ComingConnection,
    socket: Option<OwnedFd>,
}

fn take_in(
    orders: &Receiver<InstallOrder>,
    limit: RawFd,
    early: bool,
    prepared: &dyn Fn(Vec<u32>),
) -> Result<Installed> {
    let mut slots = Vec::new();
    let mut installed = Installed::default();
    let (mut watched, mut spent) = (0, std::time::Duration::ZERO);
    for order in orders {
        let began = Instant::now();
        match order {
            InstallOrder::Coming(list) => {
                if slots.len() + list.len() > MOST {
                    bail!("more than {MOST} connections");
                }
                let mut lacking = Vec::new();
                for coming in list {
                    // A mirror must have its number, too, and some above.
                    let fits = slots.len() < room(limit) && (coming.number as usize) < room(limit);
                    let socket = fits.then(|| prepare(&coming, early));
                    let failed = socket.as_ref().and_then(|socket| socket.as_ref().err());
                    if let Some(e) = failed {
                        tracing::debug!("no socket for {coming:?}: {e}");
                    }

                    let socket = socket.and_then(Result::ok);
                    if socket.is_none() {
                        lacking.push(slots.len() as u32);
                    }
                    slots.push(ConnectionSlot { coming, socket });
                }

                prepared(lacking);
                continue;
            }
            InstallOrder::Piece(bytes) => match postcard::from_bytes(&bytes)? {
                ConnectionPiece::Connections(list) => {
                    for (index, cloexec, was) in list {
                        let slot = slots.get_mut(index as usize);
                        let slot = slot.ok_or_else(|| anyhow!("one that was not announced"))?;
                        installed.repair_restore(slot, cloexec, &was)?;
                    }
                }
                ConnectionPiece::Listeners(list) => {
                    for (index, cloexec) in list {
                        let slot = slots.get_mut(index as usize);
                        let slot = slot.ok_or_else(|| anyhow!("one that was not announced"))?;
                        installed.take_listener(slot, cloexec)?;
                    }
                }
                ConnectionPiece::Watched { vpid, epoll, list } => {
                    watched += list.len();
                    if watched > MOST_WATCHED {
                        bail!("more is watched than there can be");
                    }
                    installed.watched.push((vpid, epoll, list));
                }
            },
        }
        spent += began.elapsed();
    }

    tracing::debug!("{} connections were built up in {spent:?}", installed.list.len());
    // What did not come along is closed here: CRIU makes it.
    Ok(installed)
}

fn prepare(coming: &ComingConnection, early: bool) -> std::io::Result<OwnedFd> {
    match &coming.kind {
        SocketKind::Connection(_) => connection::prepare(coming.local, coming.owner, early),
        SocketKind::Listener(was) => listener::make(coming.local, coming.owner, was, early),
    }
}

#[derive(Debug)]
struct Built {
    vpid: i32,
    number: RawFd,
    cloexec: bool,
    /// Of a connection, which is in repair mode: `SO_REUSEADDR`.
    wake: Option<bool>,
    socket: OwnedFd,
}

impl Built {
    fn place(&self) -> FdPlace<'_> {
        FdPlace { number: self.number, cloexec: self.cloexec, file: self.socket.as_fd() }
    }
}

/// Connections that stand, in repair mode: they say nothing, and die without a word if this is dropped
/// before it has [settled](Landed::settle).
#[derive(Debug, Default)]
pub struct Installed {
    list: Vec<Built>,
    watched: Vec<(i32, RawFd, Vec<Watched>)>,
    settled: bool,
}

impl Installed {
    fn repair_restore(
        &mut self,
        slot: &mut ConnectionSlot,
        cloexec: bool,
        was: &Connection,
    ) -> Result<()> {
        let &ComingConnection { vpid, number, local, ref kind, .. } = &slot.coming;
        let SocketKind::Connection(remote) = *kind else {
            bail!("a listening socket comes as a connection");
        };
        let socket = slot.socket.take();
        let socket = socket.ok_or_else(|| anyhow!("that of {local} to {remote} comes twice"))?;
        connection::repair_restore(&socket, remote, was)
            .with_context(|| format!("that of {local} to {remote}"))?;
        self.list.push(Built { vpid, number, cloexec, wake: Some(was.reuse), socket });
        Ok(())
    }

    fn take_listener(&mut self, slot: &mut ConnectionSlot, cloexec: bool) -> Result<()> {
        let ComingConnection { vpid, number, local, .. } = slot.coming;
        if !slot.coming.listens() {
            bail!("a connection comes as a listening socket");
        }
        let socket = slot.socket.take();
        let socket = socket.ok_or_else(|| anyhow!("nothing listens at {local}"))?;
        self.list.push(Built { vpid, number, cloexec, wake: None, socket });
        Ok(())
    }

    /// Returns how many they are.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// Returns what is not as it was: Multipath TCP that this kernel does not have.
    pub fn changed(&self) -> Option<Problem> {
        let lacking = |built: &&Built| built.wake.is_none() && !is_mptcp(&built.socket);
        let built = self.list.iter().find(lacking)?;
        let why = format!("descriptor {} of process {}", built.number, built.vpid);
        Some(
            Problem::new("a socket that listened for Multipath TCP listens for plain TCP", why)
                .hint("the destination's kernel has no Multipath TCP")
                .warning(),
        )
    }

    /// Puts them into the tasks that CRIU has restored and holds, out of these processes.
    ///
    /// # Errors
    /// When one of the tasks is not there, or has no room.
    pub fn install(&self, pids: &[i32]) -> Result<()> {
        let mut by_task: BTreeMap<i32, Vec<&Built>> = BTreeMap::new();
        for built in &self.list {
            by_task.entry(built.vpid).or_default().push(built);
        }
        let Some(any) = self.list.first() else { return Ok(()) };
        let tasks: HashMap<i32, i32> =
            of_first_space(pids)?.into_iter().map(|task| (task.vpid, task.pid)).collect();
        for (vpid, mut list) in by_task {
            let what = || format!("process {vpid} of the container");
            let pid = *tasks.get(&vpid).ok_or_else(|| anyhow!("{} is not there", what()))?;
            list.sort_unstable_by_key(|built| built.number);
            let places: Vec<FdPlace> = list.iter().map(|built| built.place()).collect();

            // Its other threads wait for CRIU.
            let mut thread = fd_inject::first_thread(pid).with_context(what)?;

            // What the source has put into their places.
            let numbers: Vec<RawFd> = list.iter().map(|built| built.number).collect();
            fd_inject::close(&mut thread, pid, &numbers).with_context(what)?;
            fd_inject::put(&mut thread, pid, &places).with_context(what)?;
            drop(thread);
            let epolls = self.watched.iter().filter(|(of, ..)| *of == vpid);
            let epolls: Vec<_> = epolls.map(|(_, epoll, list)| (*epoll, list.clone())).collect();
            if epolls.is_empty() {
                continue;
            }

            let above = list.last().map_or(FIRST, |built| built.number + 1);
            let watch = move |mirror: &Mirror| watch_all(mirror, above, &epolls);
            let mirror = Mirror::spawn(pid, above, any.socket.as_fd(), watch).with_context(what)?;
            mirror.join().with_context(what)?;
        }

        Ok(())
    }

    /// They live, and say nothing yet.
    pub fn wake(&self) {
        let wake = |built: &Built| {
            let Some(reuse) = built.wake else { return };
            // It is a TCP socket: it can leave that mode.
            if let Err(e) = connection::wake(&built.socket, reuse) {
                tracing::error!("descriptor {} of process {}: {e}", built.number, built.vpid);
            }
        };
        thread::scope(|scope| {
            for some in self.list.chunks(share(self.list.len())) {
                scope.spawn(move || some.iter().for_each(wake));
            }
        });
    }

    /// They are the container's now.
    pub fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        for built in self.list.iter().filter(|built| !self.settled && built.wake.is_some()) {
            let _ = enter_repair(&built.socket);
        }
    }
}

fn watch_all(
    mirror: &Mirror,
    above: RawFd,
    epolls: &[(RawFd, Vec<Watched>)],
) -> std::io::Result<()> {
    let numbers = epolls.iter().flat_map(|(_, list)| list.iter().map(|watched| watched.number));
    let mut numbers: Vec<RawFd> = numbers.collect();
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        if !(FIRST..above).contains(&number) {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        mirror.take(number)?;
    }
    for (epoll, list) in epolls {
        let epoll = mirror.epoll(*epoll)?;
        for watched in list {
            mirror.watch(epoll, watched.number, watched.events, watched.data)?;
        }
    }
    Ok(())
}
