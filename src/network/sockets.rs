//! What is between a namespace's connections and its tasks: nobody's sockets, and what nobody has read.
//!
//! A checkpoint carries sockets that some task has a descriptor of. The kernel has others: requests
//! whose handshake is not over, connections that nobody has accepted yet, and those that were closed
//! while there was something left to send. They are found here, through
//! [sock_diag(7)](https://man7.org/linux/man-pages/man7/sock_diag.7.html), for whoever waits for
//! them to come to their end.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkMessage, NetlinkSocket, Protocol, Request};
use crate::sys::netns::NetNs;

/// `SOCK_DIAG_BY_FAMILY`, `SOCK_DESTROY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
/// `struct inet_diag_req_v2` of linux/inet_diag.h.
const REQUEST: usize = 56;
/// `struct inet_diag_msg`.
const ANSWER: usize = 72;
/// `struct inet_diag_sockid`, which is in both, and where.
const ID: std::ops::Range<usize> = 4..52;
const ID_ASKED: std::ops::Range<usize> = 8..56;
/// A peer that has not answered so many times is gone: what it was sent comes to nobody.
const UNANSWERED: u8 = 3;
/// `INET_DIAG_SKMEMINFO`: what waits in a socket, and how much may, are the first two numbers.
const MEMORY: u16 = 7;

// Numbers of states, net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const SYN_RECV: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const LISTEN: u8 = 10;
const CLOSING: u8 = 11;

/// The two ends of a connection, or of what is to be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Flow {
    /// Here.
    pub local: SocketAddr,
    /// There.
    pub remote: SocketAddr,
}

/// What a checkpoint would leave behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unowned {
    /// Listening sockets with connections that nobody has accepted: where, and how many.
    pub backlog: Vec<(SocketAddr, u32)>,
    /// Handshakes that are not over.
    pub beginning: Vec<Flow>,
    /// Closed by the container, and something is left to be sent or to be confirmed.
    pub ending: Vec<Flow>,
    /// Of these, such as have more to say than that they end, to a peer that answers: it would get
    /// half of what it was sent, as if that were all.
    pub draining: Vec<Flow>,
}

impl Unowned {
    /// Nothing would be left behind.
    pub fn is_empty(&self) -> bool {
        self.backlog.is_empty() && self.beginning.is_empty() && self.ending.is_empty()
    }
}

/// A socket of the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketInfo {
    /// UDP rather than TCP.
    pub udp: bool,
    /// It takes connections.
    pub listens: bool,
    /// Its ends; the remote one is unspecified where there is none.
    pub flow: Flow,
    /// What `/proc/PID/fd` calls it; 0 when there is no descriptor of it.
    pub inode: u32,
}

/// A connection that some task has a descriptor of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Established {
    /// Its ends as the socket has them: IPv4 may stand in addresses of IPv6.
    pub ends: Flow,
    /// What `/proc/PID/fd` calls it.
    pub inode: u32,
    /// `SO_COOKIE`, socket(7).
    pub cookie: u64,
    /// User ID: packet filters and policy rules go by it.
    pub owner: u32,
}

/// Which sockets count, where others than the container have theirs in the same namespace.
#[derive(Debug, Clone, Default)]
pub struct SocketFilter {
    /// Connections on these addresses.
    pub addresses: Vec<IpAddr>,
    /// Listening sockets with these numbers.
    pub inodes: HashSet<u32>,
}

/// Looks for what is nobody's, again and again.
#[derive(Debug)]
pub struct SockDiag {
    socket: NetlinkSocket,
    only: Option<SocketFilter>,
}

impl SockDiag {
    /// Makes ready to look into a namespace.
    pub fn new(namespace: &NetNs) -> Result<Self, Problem> {
        let socket = NetlinkSocket::open_in(namespace, Protocol::SockDiag);
        let socket = socket.trying(|| "cannot list the container's sockets".into())?;
        Ok(Self { socket, only: None })
    }

    /// The same where not all sockets are the container's.
    pub fn among(namespace: &NetNs, only: SocketFilter) -> Result<Self, Problem> {
        Ok(Self { only: Some(only), ..Self::new(namespace)? })
    }

    /// Returns what there is of it right now.
    pub fn look(&mut self) -> Result<Unowned, Problem> {
        let mut found = Unowned::default();
        let states = [LISTEN, SYN_RECV, FIN_WAIT1, LAST_ACK, CLOSING];
        let only = self.only.clone();
        let counts = |one: &DiagMessage| match &only {
            None => true,
            Some(only) if one.state == LISTEN => only.inodes.contains(&one.inode),
            Some(only) => only.addresses.contains(&one.flow.local.ip()),
        };
        self.list(libc::IPPROTO_TCP, &states, |one| match one.state {
            _ if !counts(&one) => {}
            LISTEN if one.received > 0 => found.backlog.push((one.flow.local, one.received)),
            SYN_RECV => found.beginning.push(one.flow),
            FIN_WAIT1 | LAST_ACK | CLOSING if one.inode == 0 => {
                found.ending.push(one.flow);
                found.draining.extend(one.drains().then_some(one.flow));
            }
            _ => {}
        })?;
        Ok(found)
    }

    /// All TCP and UDP sockets that are more than a memory of one.
    pub fn all(&mut self) -> Result<Vec<SocketInfo>, Problem> {
        let states: Vec<u8> = (1..=CLOSING).filter(|s| *s != TIME_WAIT).collect();
        let mut found = Vec::new();
        for (protocol, udp) in [(libc::IPPROTO_TCP, false), (libc::IPPROTO_UDP, true)] {
            self.list(protocol, &states, |one| {
                let listens = !udp && one.state == LISTEN;
                found.push(SocketInfo { udp, listens, flow: one.flow, inode: one.inode });
            })?;
        }
        Ok(found)
    }

    /// UDP sockets in which something waits to be read: inode and port.
    pub fn unread(&mut self) -> Result<Vec<(u32, u16)>, Problem> {
        let mut found = Vec::new();
        self.list(libc::IPPROTO_UDP, &[ESTABLISHED, CLOSE], |one| {
            if one.received > 0 && one.inode != 0 {
                found.push((one.inode, one.flow.local.port()));
            }
        })?;
        Ok(found)
    }

    /// UDP sockets at these ports in which `more` bytes would not find room, by inode.
    pub fn tight(&mut self, ports: &HashSet<u16>, more: usize) -> Result<HashSet<u32>, Problem> {
        let mut found = HashSet::new();
        self.ask(libc::IPPROTO_UDP, &[ESTABLISHED, CLOSE], Some(MEMORY), |message| {
            let Some(one) = one(message).filter(|one| one.inode != 0) else { return };
            let attributes = message.attributes(ANSWER);
            let memory = attributes.get(MEMORY).unwrap_or_default();
            let number = |at: usize| {
                let bytes = memory.get(4 * at..)?.first_chunk();
                bytes.map(|bytes| u32::from_ne_bytes(*bytes) as usize)
            };
            let has_room =
                number(0).zip(number(1)).is_some_and(|(waits, most)| waits + more <= most);
            if ports.contains(&one.flow.local.port()) && !has_room {
                found.insert(one.inode);
            }
        })?;
        Ok(found)
    }

    /// Connections of the container over these addresses of its own, to anywhere else.
    pub fn connections(&mut self, over: &[IpAddr]) -> Result<Vec<Flow>, Problem> {
        let mut found = Vec::new();
        let states = [ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT];
        self.list(libc::IPPROTO_TCP, &states, |one| {
            let Flow { local, remote } = one.flow;
            if one.inode != 0 && over.contains(&local.ip()) && !over.contains(&remote.ip()) {
                found.push(one.flow);
            }
        })?;
        Ok(found)
    }

    /// Established connections that are bound to no device.
    pub fn established(&mut self) -> Result<Vec<Established>, Problem> {
        let only = self.only.clone();
        let counts = |one: &DiagMessage| match (&only, one.ends.local) {
            // Its address means something only together with a device.
            (_, SocketAddr::V6(address)) if address.ip().is_unicast_link_local() => false,
            (Some(only), _) => only.addresses.contains(&one.flow.local.ip()),
            (None, _) => true,
        };
        let mut found = Vec::new();
        self.list(libc::IPPROTO_TCP, &[ESTABLISHED], |one| {
            if one.inode != 0 && one.device == 0 && counts(&one) {
                let DiagMessage { ends, inode, cookie, owner, .. } = one;
                found.push(Established { ends, inode, cookie, owner });
            }
        })?;
        Ok(found)
    }

    /// Ends TCP connections at once, with nothing left that would be sent later, or stand in the way of
    /// the same connection when it comes here again. The fence must be closed: the kernel tells the other
    /// end of it. What it does not end is left as it is: it needs `CONFIG_INET_DIAG_DESTROY`.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn cut(&mut self, wanted: impl Fn(&SocketInfo) -> bool) -> Result<(), Problem> {
        let states: Vec<u8> = (1..=CLOSING).filter(|s| ![CLOSE, LISTEN].contains(s)).collect();
        let mut requests = Vec::new();
        self.ask(libc::IPPROTO_TCP, &states, None, |message| {
            let Some(one) = one(message) else { return };
            let known = SocketInfo { udp: false, listens: false, flow: one.flow, inode: one.inode };
            if wanted(&known) && one.can_be_cut(kernel()) {
                let mut request = [0; REQUEST];
                (request[0], request[1]) = (message.payload[0], libc::IPPROTO_TCP as u8);
                request[ID_ASKED].copy_from_slice(&message.payload[ID]);
                requests.push(Request::new(DESTROY, 0, &request));
            }
        })?;
        for request in requests {
            // Ended by itself meanwhile, or a kernel that does not do it.
            let _ = self.socket.change(&request);
        }
        Ok(())
    }

    fn list(
        &mut self,
        protocol: libc::c_int,
        states: &[u8],
        mut each: impl FnMut(DiagMessage),
    ) -> Result<(), Problem> {
        self.ask(protocol, states, None, |message| one(message).into_iter().for_each(&mut each))
    }

    /// The same, with what else is to be told of each.
    fn ask(
        &mut self,
        protocol: libc::c_int,
        states: &[u8],
        what: Option<u16>,
        mut each: impl FnMut(&NetlinkMessage),
    ) -> Result<(), Problem> {
        let states: u32 = states.iter().map(|s| 1 << s).sum();
        for family in FAMILIES {
            let mut request = [0; REQUEST];
            request[0] = family;
            request[1] = protocol as u8;
            request[2] = what.map_or(0, |what| 1 << (what - 1));
            request[4..8].copy_from_slice(&states.to_ne_bytes());
            let list = self.socket.dump(BY_FAMILY, &request);
            let list = list.trying(|| "cannot list the container's sockets".into())?;
            list.iter().for_each(&mut each);
        }
        Ok(())
    }
}

/// What is wanted of `struct inet_diag_msg`.
pub(super) struct DiagMessage {
    state: u8,
    /// As IPv4 where it is that.
    flow: Flow,
    /// As the socket has it.
    ends: Flow,
    device: u32,
    cookie: u64,
    owner: u32,
    /// Bytes, or of a listening socket connections, that wait to be taken.
    received: u32,
    /// Bytes that are not confirmed; the end of what is sent counts for one.
    sent: u32,
    /// How often the last question has been asked again: a retransmission, or a probe of a window
    /// that is closed.
    retries: u8,
    /// 0 when there is no descriptor of it.
    inode: u32,
}

impl DiagMessage {
    /// Tells whether the kernel ends it in full. Before Linux 6.11 it throws away what a closed one has yet to
    /// send, and with it the timer that would end it.
    fn can_be_cut(&self, kernel: (u32, u32)) -> bool {
        self.inode != 0 || self.state == TIME_WAIT || kernel >= (6, 11)
    }

    /// Of a closed one: whether somebody still takes what is left.
    fn drains(&self) -> bool {
        self.sent > 1 && self.retries < UNANSWERED
    }
}

/// The kernel's version: its first two numbers.
fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

pub(super) fn one(message: &NetlinkMessage) -> Option<DiagMessage> {
    let bytes = message.payload.first_chunk::<ANSWER>()?;
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let address = |at: usize| -> IpAddr {
        if bytes[0] == libc::AF_INET as u8 {
            Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(|i| bytes[at + i])).into()
        } else {
            Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(|i| bytes[at + i])).into()
        }
    };

    let ends = Flow {
        local: SocketAddr::new(address(8), port(4)),
        remote: SocketAddr::new(address(24), port(6)),
    };
    let plainly = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());

    Some(DiagMessage {
        state: bytes[1],
        flow: Flow { local: plainly(ends.local), remote: plainly(ends.remote) },
        ends,
        device: word(40),
        owner: word(64),
        cookie: u64::from(word(44)) | u64::from(word(48)) << 32,
        received: word(56),
        sent: word(60),
        retries: bytes[3],
        inode: word(68),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_somebody_takes_drains() {
        let one = |sent: u32, retries: u8| {
            let mut bytes = [0; ANSWER];
            (bytes[0], bytes[1], bytes[3]) = (libc::AF_INET as u8, FIN_WAIT1, retries);
            bytes[60..64].copy_from_slice(&sent.to_ne_bytes());
            let message = NetlinkMessage { payload: bytes.to_vec() };
            one(&message).is_some_and(|one| one.drains())
        };
        assert!(one(2, 0) && one(1 << 20, UNANSWERED - 1));
        assert!(!one(1, 0), "only the end is left");
        assert!(!one(1 << 20, UNANSWERED), "the peer is gone");
    }

    #[test]
    fn an_old_kernel_does_not_end_what_nobody_has() {
        let one = |state: u8, inode: u32, kernel| {
            let mut bytes = [0; ANSWER];
            (bytes[0], bytes[1]) = (libc::AF_INET as u8, state);
            bytes[68..].copy_from_slice(&inode.to_ne_bytes());
            one(&NetlinkMessage { payload: bytes.to_vec() })
                .is_some_and(|one| one.can_be_cut(kernel))
        };
        assert!(one(ESTABLISHED, 7, (5, 10)) && one(TIME_WAIT, 0, (5, 10)));
        assert!(!one(FIN_WAIT1, 0, (6, 8)) && !one(FIN_WAIT1, 0, (5, 19)));
        assert!(one(FIN_WAIT1, 0, (6, 11)) && one(FIN_WAIT1, 0, (7, 0)));
        assert!(kernel() > (3, 0));
    }
}
