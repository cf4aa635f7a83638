//! Established connections that Ferry carries by itself, where there are many: CRIU takes 76 µs for
//! each, one after the other, in the freeze.
//!
//! ```text
//! source                                           destination
//!   look for them            ── Connections ─────▶ a socket for each, bound, in repair mode
//!                            ◀──────── Awaited ──
//!   freeze
//!   lift: those that are still there, and have
//!     nothing in their queues, are taken out of
//!     the tasks: CRIU sees none of them
//!   CRIU dumps; repair_dump    ══ connections ═════▶ repair_restore, beside CRIU's restore
//!                                                  land: into the tasks, when CRIU has restored them
//!   commit                                         wake: out of repair mode; then the fence opens
//!   silent end, or put_back
//! ```
//!
//! In CRIU's images something else stands in their places until they land.
//!
//! **Taken out** means: what watches them by epoll(7) watches them no more, and their descriptors are
//! closed in the tasks ([`crate::sys::fd_inject`]). Other descriptors of them are on their way in a socket,
//! the [`Vault`], whose other end both this process and the guard hold; what was taken is written down
//! before anything is. Whoever undoes the migration, or brings back what was handed over in vain,
//! [puts them back](put_back()) from there.
//!
//! What makes calls in the tasks is [the guard](GuardCommands): if Ferry is killed meanwhile it goes on, and if
//! the guard is, Ferry sees to it that none of the tasks runs before it is whole.
//!
//! All else that is open, and every connection of which anything is out of the ordinary, is CRIU's.
//!
//! Listening sockets of Multipath TCP, which CRIU does not know, go the same way, however few there are:
//! their likes listen on the destination from the announcement on, behind the closed fence.

mod extract;
mod guard_commands;
mod install;
mod look;
mod put_back;
mod tasks;

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SndBufForce;
use serde::{Deserialize, Serialize};

pub use extract::Extracted;
pub use guard_commands::{GuardCommand, GuardCommands, GuardSocket};
pub use install::{Installation, Installed};
pub use look::{Extraction, raise_limit};
pub use put_back::{are_out, put_back, take_out};

use crate::sys::connection::Connection;
use crate::sys::fd_table::FIRST;
use crate::sys::listener::ListenerOptions;
use crate::sys::scm;

/// Fewer are left to CRIU: 5 ms.
pub const MANY: usize = 64;
/// Most of them; the others are left to CRIU.
pub const MOST: usize = 1 << 16;
/// Most in one message.
pub const BATCH: usize = 8192;
/// Under which name they come.
pub const STREAM: &str = "connections";
/// Most free numbers between those of a process: each costs as much as a connection.
const MOST_HOLES: usize = 4096;
/// Numbers that a process has left for the socket through which they come back, and for CRIU.
const SPARE: usize = 16;

/// A connection that will come. Its place among all that were announced is its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComingConnection {
    /// The process that has it, as the container numbers it.
    pub vpid: i32,
    /// The descriptor.
    pub number: RawFd,
    /// The user ID of the socket's owner.
    pub owner: u32,
    /// The socket's own end.
    pub local: SocketAddr,
    /// What it is.
    pub kind: SocketKind,
}

/// What a socket is that will come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketKind {
    /// A connection, and its peer's end.
    Connection(SocketAddr),
    /// A listening socket of Multipath TCP.
    Listener(ListenerOptions),
}

impl ComingConnection {
    /// Tells whether it is one that waits for connections.
    pub fn listens(&self) -> bool {
        matches!(self.kind, SocketKind::Listener(_))
    }

    /// Tells whether it can be one.
    ///
    /// # Errors
    /// Says what it is instead.
    fn validate(&self) -> Result<()> {
        let same = match &self.kind {
            SocketKind::Connection(remote) => self.local.is_ipv4() == remote.is_ipv4(),
            SocketKind::Listener(_) => true,
        };
        if self.vpid <= 0 || self.number < FIRST || self.number > 1 << 24 || !same {
            bail!("no connection is like {self:?}");
        }
        Ok(())
    }
}

/// Returns how many of so many a thread is to do, where each takes some microseconds: there are up to four
/// threads.
fn share(all: usize) -> usize {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    all.div_ceil(threads).max(256)
}

/// What comes in the freeze, in pieces of at most [`crate::transport::frame::MAX_FILE_PIECE`] bytes.
#[derive(Debug, Serialize, Deserialize)]
enum ConnectionPiece {
    /// Connections by their numbers; whether execve(2) closes them.
    Connections(Vec<(u32, bool, Connection)>),
    /// Listening sockets, in the same way: they are as they were announced.
    Listeners(Vec<(u32, bool)>),
    /// What the epoll under this number in that process watches.
    Watched { vpid: i32, epoll: RawFd, list: Vec<Watched> },
}

/// A descriptor that an epoll watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Watched {
    number: RawFd,
    events: u32,
    data: u64,
}

/// What was taken out of the tasks: whoever puts it back reads it. The descriptors in the vault come in
/// this order.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Taken(Vec<TakenOut>);

#[derive(Debug, Serialize, Deserialize)]
struct TakenOut {
    pid: i32,
    /// With the number, a name that is not used twice.
    started: Option<u64>,
    /// By their numbers rising.
    places: Vec<PlaceTaken>,
    epolls: Vec<(RawFd, Vec<Watched>)>,
}

/// Where something was that was taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PlaceTaken {
    number: RawFd,
    /// execve(2) closes it.
    cloexec: bool,
    /// Of a connection, which is in repair mode: `SO_REUSEADDR`.
    wake: Option<bool>,
}

impl TakenOut {
    /// Above all of them.
    fn above(&self) -> RawFd {
        self.places.last().map_or(FIRST, |place| place.number.saturating_add(1))
    }
}

/// Where descriptors are that were taken out of the tasks: on their way from one end of a pair of
/// sockets to the other. As long as anybody has an end, they are open.
#[derive(Debug)]
pub struct Vault {
    entrance: Option<OwnedFd>,
    exit: OwnedFd,
}

impl Vault {
    /// An empty one.
    ///
    /// # Errors
    /// When there can be no sockets.
    pub fn new() -> Result<Vault> {
        let (entrance, exit) = scm::seqpacket_pair()?;
        // Nobody reads it: all must find room, by a KiB for each packet.
        let _ = setsockopt(&entrance, SndBufForce, &(2 * MOST / scm::MOST_FDS * 1024));
        Ok(Vault { entrance: Some(entrance), exit })
    }

    /// Somebody else's.
    pub fn from_exit(exit: OwnedFd) -> Vault {
        Vault { entrance: None, exit }
    }

    /// Returns where they come out again, for whoever is to have it as well.
    pub fn exit(&self) -> BorrowedFd<'_> {
        self.exit.as_fd()
    }

    /// Other descriptors of all that are in it. One at a time.
    ///
    /// # Errors
    /// When this process has no room for them.
    pub fn contents(&self) -> Result<Vec<OwnedFd>> {
        scm::look_at_many(&self.exit).context("looking into the vault")
    }

    /// Takes out all that are in it.
    ///
    /// # Errors
    /// When this process has no room for them.
    pub fn empty(&self) -> Result<()> {
        while scm::receive_many(&self.exit)?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::errno::Errno;

    use super::*;
    use crate::fuzz::Target;

    #[test]
    fn the_vault_has_room_for_all() {
        let vault = Vault::new().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let some = [null.as_raw_fd(); scm::MOST_FDS];
        let entrance = vault.entrance.as_ref().unwrap();
        for _ in 0..MOST.div_ceil(scm::MOST_FDS) {
            match scm::send_now(entrance, &[0], &some) {
                Err(e) if e.raw_os_error() == Some(Errno::ETOOMANYREFS as i32) => {
                    eprintln!("skipped: this needs CAP_SYS_ADMIN");
                    return;
                }
                sent => sent.unwrap(),
            }
        }
        let first = scm::receive_many(vault.exit()).unwrap().unwrap();
        assert_eq!(first.len(), scm::MOST_FDS);
    }

    #[test]
    fn the_vault_is_looked_into_as_often_as_one_likes() {
        let vault = Vault::new().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for some in [scm::MOST_FDS, 3] {
            let some = vec![null.as_raw_fd(); some];
            scm::send_now(vault.entrance.as_ref().unwrap(), &[0], &some).unwrap();
        }
        for _ in 0..2 {
            assert_eq!(vault.contents().unwrap().len(), scm::MOST_FDS + 3);
        }
        vault.empty().unwrap();
        assert_eq!(vault.contents().unwrap().len(), 0);
    }

    #[test]
    fn fuzz_connections() {
        let watched = Watched { number: 5, events: 1, data: 7 };
        let epoll = ConnectionPiece::Watched { vpid: 1, epoll: 3, list: vec![watched; 3] };
        let connection = crate::sys::connection::tests::sample();
        let pieces = ConnectionPiece::Connections(vec![
            (0, true, connection.clone()),
            (1, false, connection),
        ]);
        let taken = Taken(vec![TakenOut {
            pid: 1,
            started: Some(7),
            places: vec![PlaceTaken { number: 5, cloexec: true, wake: Some(false) }],
            epolls: vec![(3, vec![watched])],
        }]);

        let listeners = ConnectionPiece::Listeners(vec![(0, true), (1, false)]);
        let target = Target::new("connections").sample(postcard::to_stdvec(&epoll).unwrap());
        let target = target.sample(postcard::to_stdvec(&listeners).unwrap());
        let target = target.sample(postcard::to_stdvec(&pieces).unwrap());

        // A list takes room for a MiB at most before there is anything in it: serde's.
        target.sample(postcard::to_stdvec(&taken).unwrap()).room(3 << 20).run(|bytes| {
            let piece = postcard::from_bytes::<ConnectionPiece>(bytes).map(drop);
            let taken = postcard::from_bytes::<Taken>(bytes).map(|taken| {
                for one in &taken.0 {
                    std::hint::black_box(one.above());
                }
            });
            Ok(piece.or(taken)?)
        });
    }
}
