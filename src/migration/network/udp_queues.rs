//! What came for the container right before its fence was closed, and what it had not read yet.
//!
//! CRIU does not dump what waits in UDP sockets, so it is read out, left where it is (a rollback needs
//! it there), and sent along ahead of what comes in the freeze.

use std::collections::HashMap;
use std::time::Instant;

use crate::network::Capture;
use crate::network::frames::{EthernetFrame, ROOM};
use crate::network::sockets::SockDiag;
use crate::network::udp_queues::{UdpEndpoints, once};
use crate::oci::cgroup::Cgroup;
use crate::problem::{Problem, Trying};
use crate::sys::datagrams;
use crate::tasks::criu_rescue::each_socket;

/// Most bytes of datagrams that go along; UDP may lose what is beyond. A socket takes 208 KiB, unless
/// somebody has asked for more.
const MOST: usize = 4 << 20;
/// Most in a socket: looking at so many takes some 40 ms, at four times as many two seconds.
const MANY: usize = 4000;

/// Packets that came before the freeze was complete.
#[derive(Debug, Default)]
pub struct Came {
    /// Datagrams in the container's sockets, as frames.
    pub unread: Vec<EthernetFrame>,
    /// Frames that the fence has stopped, so far.
    pub caught: Vec<EthernetFrame>,
}

impl Came {
    /// To be called when the tasks stand still and nothing comes in any more.
    ///
    /// # Errors
    /// When `capture` cannot be read.
    pub fn until_now(
        capture: &mut Capture,
        sock_diag: &mut SockDiag,
        homes: &UdpEndpoints,
        cgroup: &Cgroup,
    ) -> Result<Came, Problem> {
        let began = Instant::now();
        // UDP may lose: no reason to stay.
        let unread = match sock_diag.unread() {
            Ok(ports) if ports.is_empty() => Vec::new(),
            Ok(ports) => read(&ports.into_iter().collect(), homes, cgroup),
            Err(e) => {
                tracing::warn!("datagrams that wait for the container are lost: {e}");
                Vec::new()
            }
        };

        // Some of it may have been caught as well, before the fence was closed. However much comes
        // now, that is among what the kernel had room for.
        let mut caught = Vec::new();
        if !unread.is_empty() {
            let (mut room, mut seen) = (ROOM as usize, 0);
            while room > 0
                && capture.read(&mut caught).trying(|| "cannot read what comes in".into())? > 0
            {
                let fresh: usize = caught[seen..].iter().map(|frame| frame.bytes.len()).sum();
                (room, seen) = (room.saturating_sub(fresh), caught.len());
            }
            once(&mut caught, &unread);
        }

        tracing::debug!(
            "{} datagrams wait in sockets, {} frames were caught: {} us",
            unread.len(),
            caught.len(),
            began.elapsed().as_micros()
        );

        Ok(Came { unread, caught })
    }
}

/// Returns what waits in sockets, by their inodes.
fn read(ports: &HashMap<u32, u16>, homes: &UdpEndpoints, cgroup: &Cgroup) -> Vec<EthernetFrame> {
    let (mut unread, mut room) = (HashMap::new(), MOST);
    let wanted = |inode| ports.contains_key(&inode);
    each_socket(cgroup, wanted, |inode, socket| {
        if room == 0 || unread.contains_key(&inode) {
            return;
        }
        let waiting = datagrams::waiting(&socket, room, MANY).unwrap_or_else(|e| {
            tracing::warn!("datagrams that wait at port {} are lost: {e}", ports[&inode]);
            Vec::new()
        });
        let frames = waiting.iter().filter_map(|d| homes.frame(ports[&inode], d));
        let frames: Vec<EthernetFrame> = frames.collect();
        room = room.saturating_sub(frames.iter().map(|f| f.bytes.len()).sum());
        unread.insert(inode, frames);
    });
    unread.into_values().flatten().collect()
}
