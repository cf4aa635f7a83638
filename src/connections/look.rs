//! On the source: which connections there are that can be taken out of the tasks. The container runs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{ComingConnection, MOST, MOST_HOLES, SPARE, SocketKind, Vault};
use crate::network::sockets::{Established, SockDiag};
use crate::sys::connection::{self, OptionDefaults};
use crate::sys::fd_table::FIRST;
use crate::sys::listener::{self, ListenerOptions};
use crate::sys::netns::NetNs;
use crate::sys::{fd_inject, process, socket};
use crate::tasks::freezer::{native, of_first_space};
use crate::tasks::mptcp::{self, MptcpSocket};

/// Fewer that have come since the first look are left to CRIU.
const FEW: usize = 32;
/// Descriptors that a process of Ferry needs for all else.
const OWN: RawFd = 512;

/// Lets this process have as many descriptors as it may; from which number on it gets none.
///
/// # Errors
/// When the kernel does not say how many that is.
pub fn raise_limit() -> Result<RawFd> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = 2 * MOST as u64;
    // More than the limit of the limit is for CAP_SYS_RESOURCE. setrlimit(2)
    if most >= wanted || setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        return Ok(RawFd::try_from(most).unwrap_or(RawFd::MAX));
    }
    Ok(wanted as RawFd)
}

/// Returns how many connections a process can hold that gets no descriptors from `limit` on.
pub fn room(limit: RawFd) -> usize {
    usize::try_from(limit - OWN).unwrap_or(0).min(MOST)
}

/// A connection that was seen while the container ran.
#[derive(Clone, Copy, Debug)]
pub(super) struct SeenConnection {
    pub(super) number: RawFd,
    pub(super) cookie: u64,
    pub(super) inode: u32,
    /// Of IPv6, also where its peer is not.
    pub(super) v6: bool,
    /// Its number among those that were announced.
    pub(super) index: u32,
    /// Not a connection, but a listening socket of Multipath TCP.
    pub(super) listens: bool,
}

/// Listening sockets of Multipath TCP, as they were announced.
#[derive(Clone, Debug)]
pub(super) struct Listeners {
    /// Of a fresh one of IPv4, and of IPv6, as far as there are.
    pub(super) fresh: [Option<OptionDefaults>; 2],
    /// By their numbers among all that were announced.
    pub(super) known: HashMap<u32, ListenerOptions>,
}

/// Those that are to be taken out when the container is frozen.
#[derive(Debug)]
pub struct Extraction {
    /// By process; their numbers rising.
    pub(super) known: BTreeMap<i32, Vec<SeenConnection>>,
    cookies: HashSet<u64>,
    pub(super) announced: usize,
    pub(super) vault: Arc<Vault>,
    pub(super) work: PathBuf,
    /// Of a fresh socket of IPv4, and of IPv6, as far as there are.
    pub(super) fresh: [Option<OptionDefaults>; 2],
    pub(super) listeners: Listeners,
    /// See [`raise_limit`].
    limit: RawFd,
    pub(super) stop: Arc<AtomicBool>,
}

impl Extraction {
    /// None are known yet. `namespace` is the container's, if not ours; `work` the migration's
    /// directory.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(namespace: Option<&NetNs>, vault: Arc<Vault>, work: &Path) -> Result<Extraction> {
        let look = || {
            let connections = [false, true].map(|v6| connection::fresh_options(v6).ok());
            (connections, [false, true].map(|v6| listener::fresh_options(v6).ok()))
        };
        let (fresh, of_listeners) = match namespace {
            Some(namespace) => namespace.run(look)?,
            None => look(),
        };
        let limit = raise_limit()?;
        let (known, cookies, work) = (BTreeMap::new(), HashSet::new(), work.to_owned());
        let stop = Arc::new(AtomicBool::new(false));
        let listeners = Listeners { fresh: of_listeners, known: HashMap::new() };
        Ok(Extraction { known, cookies, announced: 0, vault, work, fresh, listeners, limit, stop })
    }

    /// Returns those that were not known yet, in the order in which they are to be announced.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn look(&mut self, lookout: &mut SockDiag, pids: &[i32]) -> Result<Vec<ComingConnection>> {
        // First of all: nothing may stand at their ports when they are bound.
        let mut coming = self.listeners(pids)?;
        self.announced += coming.len();
        let mut established = lookout.established()?;
        established.retain(|one| !self.cookies.contains(&one.cookie));
        if self.announced > coming.len() && established.len() < FEW {
            // The search for their descriptors takes longer than CRIU for so many.
            return Ok(coming);
        }

        let all: HashMap<u32, &Established> = established.iter().map(|e| (e.inode, e)).collect();
        let mut places: HashMap<u32, Option<(i32, RawFd)>> = HashMap::new();
        let mut open = BTreeMap::new();
        for &pid in pids {
            // Whoever has ended meanwhile has nothing open.
            let Ok(numbers) = fd_inject::numbers(pid) else { continue };
            for &number in &numbers {
                if let Some(inode) = inode_of(pid, number).filter(|inode| all.contains_key(inode)) {
                    // One that has several is CRIU's.
                    places.entry(inode).and_modify(|p| *p = None).or_insert(Some((pid, number)));
                }
            }
            open.insert(pid, numbers);
        }

        let mut own: BTreeMap<i32, Vec<(RawFd, u32)>> = BTreeMap::new();
        for (inode, place) in &places {
            if let Some((pid, number)) = place {
                own.entry(*pid).or_default().push((*number, *inode));
            }
        }

        let most = room(self.limit);
        let before = coming.len();
        for task in of_first_space(pids)? {
            let Some(mut list) = own.remove(&task.pid).filter(|_| native(task.pid)) else {
                continue;
            };
            list.sort_unstable();

            // A mirror must have its numbers, too.
            let limit = process::file_limit(task.pid)?.min(self.limit as u64);
            let numbers = open.get(&task.pid).map_or(&[][..], Vec::as_slice);
            let until = reach(numbers, &list, limit);

            // What had one of these numbers has been closed.
            let fresh: HashSet<RawFd> = list.iter().map(|(number, _)| *number).collect();
            let earlier = self.known.entry(task.pid).or_default();
            earlier.retain(|known| known.listens || !fresh.contains(&known.number));
            for (number, inode) in list.into_iter().take_while(|(number, _)| *number < until) {
                let Established { ends, cookie, owner, .. } = *all[&inode];
                let index = self.announced + coming.len() - before;
                let full = index >= most;
                if full || number < FIRST || !self.cookies.insert(cookie) {
                    continue;
                }

                let index = index as u32;
                let v6 = ends.local.is_ipv6();
                self.known.entry(task.pid).or_default().push(SeenConnection {
                    number,
                    cookie,
                    inode,
                    v6,
                    index,
                    listens: false,
                });

                let (local, kind) = (ends.local, SocketKind::Connection(ends.remote));
                coming.push(ComingConnection { vpid: task.vpid, number, owner, local, kind });
            }
        }

        self.announced += coming.len() - before;
        Ok(coming)
    }

    /// Listening sockets of Multipath TCP that were not known yet.
    fn listeners(&mut self, pids: &[i32]) -> Result<Vec<ComingConnection>> {
        let found = mptcp::sockets(pids);
        let Some(init) = pids.first().filter(|_| !found.is_empty()) else { return Ok(Vec::new()) };

        // It has been looked for before: this one has come since.
        if let Some((pid, why)) = mptcp::obstacle(*init, &found) {
            bail!("process {pid} has a socket of Multipath TCP: {why}");
        }
        let numbers: HashMap<i32, i32> =
            of_first_space(pids)?.into_iter().map(|task| (task.pid, task.vpid)).collect();
        let mut coming = Vec::new();

        for one in found {
            let cookie = connection::cookie(&one.file)?;
            let Some(&vpid) = numbers.get(&one.pid).filter(|_| !self.cookies.contains(&cookie))
            else {
                continue;
            };
            let v6 = socket::is_v6(&one.file)?;
            let fresh = self.listeners.fresh[usize::from(v6)].as_ref();
            let fresh = fresh.context("there is no Multipath TCP any more")?;

            // Closed since.
            let Some((local, listener)) = listener::look(&one.file, fresh)? else { continue };
            let limit = process::file_limit(one.pid)?.min(self.limit as u64);
            if one.number as u64 + SPARE as u64 > limit {
                bail!("process {} has no room for another descriptor", one.pid);
            }

            self.cookies.insert(cookie);
            let index = (self.announced + coming.len()) as u32;
            let inode = u32::try_from(one.inode)?;
            let known = self.known.entry(one.pid).or_default();
            known.retain(|known| known.number != one.number);
            let MptcpSocket { number, .. } = one;
            known.push(SeenConnection { number, cookie, inode, v6, index, listens: true });
            self.listeners.known.insert(index, listener.clone());

            let owner = nix::sys::stat::fstat(&one.file)?.st_uid;
            coming.push(ComingConnection {
                vpid,
                number,
                owner,
                local,
                kind: SocketKind::Listener(listener),
            });
        }

        Ok(coming)
    }

    /// Leaves to CRIU what the destination cannot take.
    ///
    /// # Errors
    /// When CRIU cannot take it, either.
    pub fn leave(&mut self, lacking: &[u32]) -> Result<()> {
        let lacking: HashSet<u32> = lacking.iter().copied().collect();
        if lacking.iter().any(|index| self.listeners.known.contains_key(index)) {
            bail!("the other host cannot listen for Multipath TCP where the container does");
        }
        self.known.values_mut().for_each(|list| list.retain(|k| !lacking.contains(&k.index)));
        Ok(())
    }
}

/// The inode of a socket.
fn inode_of(pid: i32, number: RawFd) -> Option<u32> {
    let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
    process::socket_inode(&target)?.try_into().ok()
}

/// Up to below which number descriptors of a process can be taken out: not where many numbers below are
/// free, or few above.
fn reach(open: &[RawFd], list: &[(RawFd, u32)], limit: u64) -> RawFd {
    let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
    if open.len() + SPARE > limit as usize {
        return 0;
    }
    let mut until = limit.saturating_sub(SPARE as RawFd);
    // Somewhere above the last of them there must be a free one.
    let above = open.iter().filter(|number| **number >= until).count();
    if above as i64 + SPARE as i64 > i64::from(limit) - i64::from(until) {
        return 0;
    }
    for (taken, (number, _)) in list.iter().enumerate() {
        let below = open.partition_point(|n| n < number);
        let holes = *number as usize - below;
        if holes > MOST_HOLES + taken {
            until = until.min(*number);
            break;
        }
    }
    until
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_are_reached_that_can_come_back() {
        let list = |numbers: &[RawFd]| numbers.iter().map(|n| (*n, 0)).collect::<Vec<_>>();
        let open: Vec<RawFd> = (0..100).collect();
        let all = list(&open[5..]);
        assert_eq!(reach(&open, &all, 1024), 1024 - 16);
        // There is no room to come back.
        assert_eq!(reach(&open, &all, 100), 0);
        // What is far up stays.
        let open: Vec<RawFd> = (0..10).chain([50_000, 50_001]).collect();
        assert_eq!(reach(&open, &list(&[8, 9, 50_000]), 1 << 20), 50_000);
        // With the limit lowered since they were opened.
        let open: Vec<RawFd> = (0..10).chain(500..600).collect();
        assert_eq!(reach(&open, &list(&open), 520), 0);
    }
}
