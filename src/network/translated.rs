//! What a host's address translation has to do with a container: connections that live by it, and
//! ports of the host that lead to the container.
//!
//! Such a connection is known to its other end by an address of the host's. The host's connection
//! tracking holds both of its faces, and goes nowhere: the connection lasts as long as its packets
//! pass that host.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::published::packet::{TCP, UDP};
use super::published::{Ends, Translation};
use super::rtnl::{AF_INET, AF_INET6, ip_of, octets};
use super::sockets::Flow;
use super::{legacy, nft};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{Attributes, DUMP, NetlinkMessage, NetlinkSocket, Protocol, Request};
use crate::sys::netns::NetNs;

/// Most connections that are told; the rest would say nothing new.
pub const MOST: usize = 256;

// linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h.
const CT_GET: u16 = 1 << 8 | 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_FILTER: u16 = 25;
/// `IPS_SRC_NAT`, `IPS_DST_NAT`
const TRANSLATED: u32 = 1 << 4 | 1 << 5;
/// `TCP_CONNTRACK_ESTABLISHED`, and half closed: `FIN_WAIT`, `CLOSE_WAIT`.
const OPEN: std::ops::RangeInclusive<u8> = 3..=5;
/// `struct nfgenmsg`
const FIXED: usize = 4;

/// A host's translation for some addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translated {
    /// Open TCP connections, as the container sees them; not more than [`MOST`].
    pub flows: Vec<Flow>,
    /// Rules of nftables or iptables-legacy lead packets for the host to one of the addresses: a
    /// published port.
    pub published: bool,
}

/// A connection under translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConntrackEntry {
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub protocol: u8,
    /// As the container sees it.
    pub inside: Flow,
    /// As the other end does: the host's address, and its own.
    pub wire: Flow,
}

impl ConntrackEntry {
    /// Returns what packets to the container have on the wire, and inside; nothing for IPv6.
    pub fn translation(&self) -> Option<Translation> {
        let ends = |flow: Flow| match (flow.remote, flow.local) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                Some(Ends { protocol: self.protocol, from, to })
            }
            _ => None,
        };
        Some(Translation { wire: ends(self.wire)?, inside: ends(self.inside)? })
    }
}

/// All that are open at these addresses, or in use.
///
/// # Errors
/// When they cannot be read.
pub fn entries(host: &NetNs, addresses: &[IpAddr]) -> Result<Vec<ConntrackEntry>, Problem> {
    let trying = || "cannot read this host's address translation".to_owned();
    let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
    let mut entries = Vec::new();
    for address in addresses {
        for (tuple, flags) in [(CTA_TUPLE_ORIG, 1), (CTA_TUPLE_REPLY, 2)] {
            let list = socket.list(&request(*address, tuple, flags)).trying(trying)?;
            entries.extend(list.iter().filter_map(|m| entry(m, *address)));
        }
    }
    entries.sort_unstable();
    entries.dedup();
    Ok(entries)
}

/// Looks at the host's tables.
///
/// # Errors
/// When they cannot be read.
pub fn look(host: &NetNs, addresses: &[IpAddr]) -> Result<Translated, Problem> {
    let trying = || "cannot read this host's address translation".to_owned();
    let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
    let tcp = |entry: &ConntrackEntry| (entry.protocol == TCP).then_some(entry.inside);
    let mut flows: Vec<Flow> = entries(host, addresses)?.iter().filter_map(tcp).collect();
    flows.sort_unstable();
    flows.dedup();
    flows.truncate(MOST);
    let by_nft = nft::leads_to(&mut socket, addresses).trying(trying)?;
    let published = by_nft
        || legacy::leads_to(host, addresses).unwrap_or_else(|problem| {
            // The connections that are open have been found.
            tracing::warn!("{problem}");
            false
        });
    Ok(Translated { flows, published })
}

/// Entries with this address as the source of one direction: the kernel picks them, as a busy host
/// has a million others.
fn request(address: IpAddr, tuple: u16, flags: u16) -> Request {
    let (family, source) = match address {
        IpAddr::V4(_) => (AF_INET, 1),
        IpAddr::V6(_) => (AF_INET6, 3),
    };
    const BY_SOURCE: u32 = 1;
    let mut request = Request::new(CT_GET, DUMP, &[family, 0, 0, 0]);
    request
        .nest(CTA_FILTER, |filter| {
            filter.u32(flags, BY_SOURCE);
        })
        .nest(tuple, |tuple| {
            tuple.nest(1, |ip| {
                ip.attr(source, &octets(address));
            });
        });
    request
}

/// A connection under translation: an open one of TCP, or one of UDP.
pub(super) fn entry(message: &NetlinkMessage, address: IpAddr) -> Option<ConntrackEntry> {
    let a = message.attributes(FIXED);
    let protocol = *a.nest(CTA_TUPLE_ORIG).nest(2).get(1)?.first()?;
    let open = || OPEN.contains(a.nest(CTA_PROTOINFO).nest(1).get(1)?.first()?).then_some(());
    match protocol {
        TCP => open()?,
        UDP => {}
        _ => return None,
    }
    if a.be32(CTA_STATUS)? & TRANSLATED == 0 {
        return None;
    }
    let faces = [face(&a.nest(CTA_TUPLE_ORIG))?, face(&a.nest(CTA_TUPLE_REPLY))?];
    let own = faces.iter().position(|flow| flow.local.ip() == address)?;
    // The other direction is told as its sender sees it, who is the other end.
    let Flow { local: remote, remote: local } = faces[1 - own];
    Some(ConntrackEntry { protocol, inside: faces[own], wire: Flow { local, remote } })
}

/// One direction: who sends, and to whom.
fn face(tuple: &Attributes<'_>) -> Option<Flow> {
    let (ip, ports) = (tuple.nest(1), tuple.nest(2));
    let end = |v4, v6, port| {
        let port = ports.get(port).and_then(|p| p.try_into().ok()).map(u16::from_be_bytes)?;
        Some(SocketAddr::new(ip_of(&ip, v4).or(ip_of(&ip, v6))?, port))
    };
    Some(Flow { local: end(1, 3, 2)?, remote: end(2, 4, 3)? })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A connection of 10.88.0.5's that is translated, as the kernel lists it.
    pub(in crate::network) fn entry() -> Request {
        let mut entry = Request::new(CT_GET, 0, &[AF_INET, 0, 0, 0]);
        let port = |of: [u8; 4]| match of {
            [1, 2, 3, 4] => [0, 80],
            [9, ..] => [0xea, 0x60],
            _ => [0xc3, 0x50],
        };

        for (tuple, from, to) in [
            (CTA_TUPLE_ORIG, [10, 88, 0, 5], [1, 2, 3, 4]),
            (CTA_TUPLE_REPLY, [1, 2, 3, 4], [9; 4]),
        ] {
            entry.nest(tuple, |tuple| {
                tuple.nest(1, |ip| {
                    ip.attr(1, &from).attr(2, &to);
                });
                tuple.nest(2, |ports| {
                    ports.attr(1, &[TCP]).attr(2, &port(from)).attr(3, &port(to));
                });
            });
        }

        entry.be32(CTA_STATUS, TRANSLATED).nest(CTA_PROTOINFO, |info| {
            info.nest(1, |tcp| {
                tcp.attr(1, &[3]);
            });
        });

        entry
    }

    #[test]
    fn a_translated_connection_is_read() {
        let message = NetlinkMessage { payload: entry().payload() };
        let found = super::entry(&message, "10.88.0.5".parse().unwrap()).unwrap();
        let flow = |local: &str, remote: &str| Flow {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        };
        assert_eq!(found.inside, flow("10.88.0.5:50000", "1.2.3.4:80"));
        assert_eq!(found.wire, flow("9.9.9.9:60000", "1.2.3.4:80"));
        let translation = found.translation().unwrap();
        assert_eq!(translation.wire.to, "9.9.9.9:60000".parse().unwrap());
        assert_eq!(translation.inside.to, "10.88.0.5:50000".parse().unwrap());
        assert_eq!(super::entry(&message, "10.88.0.6".parse().unwrap()), None);
    }
}
