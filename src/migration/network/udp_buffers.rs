//! Room in the container's UDP sockets for what came in the freeze.
//!
//! All of it comes at once, and mostly before the container runs. So the sockets that it would not
//! fit into are allowed to take more for a while, and as much as before when it is over: what waits by
//! then stays. A Ferry that is killed meanwhile leaves them so.

use std::collections::HashMap;

use crate::network::{EthernetFrame, Replay, udp_buffers};
use crate::oci::cgroup::Cgroup;
use crate::sys::datagrams::BufferLimit;
use crate::tasks::criu_rescue::each_socket;

/// Most that is allowed beyond a socket's own limit; UDP may lose what is beyond.
const MOST: usize = 32 << 20;

/// UDP sockets whose limit (`SO_RCVBUF`) was raised, and what it was.
#[derive(Debug)]
pub struct Room {
    cgroup: Cgroup,
    /// By inode: the limit that was, and the one that is.
    raised: HashMap<u32, (BufferLimit, BufferLimit)>,
}

impl Room {
    /// Makes room for `frames`, which `replay` will bring; `None` where there is enough.
    pub fn make(cgroup: &Cgroup, replay: &mut Replay, frames: &[EthernetFrame]) -> Option<Room> {
        let (ports, bytes) = udp_buffers::taken(frames);
        let more = bytes.min(MOST);
        if ports.is_empty() {
            return None;
        }

        // UDP may lose: no reason to stop anywhere here.
        let tight = replay.sock_diag().tight(&ports, more);
        let tight = tight.inspect_err(|e| tracing::warn!("datagrams may be lost: {e}")).ok()?;
        if tight.is_empty() {
            return None;
        }

        let mut raised = HashMap::new();
        let wanted = |inode| tight.contains(&inode);
        each_socket(cgroup, wanted, |inode, socket| {
            if raised.contains_key(&inode) {
                return;
            }
            let was = BufferLimit::of(&socket);
            match was.and_then(|was| Ok((was, was.raise(&socket, more)?))) {
                Ok(limits) => drop(raised.insert(inode, limits)),
                Err(e) => tracing::warn!("datagrams may be lost: {e}"),
            }
        });

        tracing::debug!("room for {more} bytes more in {} UDP sockets", raised.len());
        (!raised.is_empty()).then(|| Room { cgroup: cgroup.clone(), raised })
    }

    /// Takes it away. Who has set another limit meanwhile keeps that.
    pub fn put_back(self) {
        let wanted = |inode| self.raised.contains_key(&inode);
        each_socket(&self.cgroup, wanted, |inode, socket| {
            let (was, raised) = self.raised[&inode];
            // More than once for a socket of more than one descriptor: then it is as it was by then.
            if BufferLimit::of(&socket).is_ok_and(|now| now == raised)
                && let Err(e) = was.put_back(&socket)
            {
                tracing::warn!("a UDP socket keeps more room than it had: {e}");
            }
        });
    }
}
