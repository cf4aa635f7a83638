//! Connections that live by a host's address translation, when the container goes elsewhere and its
//! address means another thing there: an engine's, behind a bridge, with published ports.
//!
//! ```text
//!  home                                          away
//!   client ──▶ its device ─┐ ingress              ┌ the container's namespace ┐
//!                          ▼                      │ eth0                      │
//!                  TAP, translation ◀═ frames ═▶ TAP ─▶ its cable's end ──────┘
//!   client ◀── raw socket ─┘                       ◀── ingress, flows of home
//! ```
//!
//! Neither host's engine has a part in it, nor do their packet filters, their connection tracking, and their
//! bridges. At [`home`] a table of nf_tables' netdev family leads what comes for a published port, or for
//! an open connection, to a TAP device: before connection tracking, so that this host answers nothing while
//! the engine takes down what it had, and none of it is needed afterwards. [`Translations`] are made here, and what
//! comes back is sent as this host's own. [`away`], another such table puts the frames on the container's
//! cable, and takes off it what belongs to connections from there; all else goes the way that the engine has
//! made.
//!
//! Who was on the container's bridge at home, and stays, is [near]: what they say to its address, and it to
//! theirs, goes the same way without translation.

pub(crate) mod away;
pub(crate) mod given;
pub(crate) mod home;
pub(crate) mod near;
pub(crate) mod packet;
mod translations;

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddrV4};

use serde::{Deserialize, Serialize};

pub(crate) use translations::{HomePort, Near, Translation, Translations};

use super::nft::Cell;
use super::read::address;
use super::rtnl::Rtnl;
use super::{nft, rtnl, sysctl};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkSocket, Protocol};
use crate::sys::netns::NetNs;
use crate::sys::tun::Tap;

/// Who sends to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ends {
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub protocol: u8,
    /// Sender.
    pub from: SocketAddrV4,
    /// Receiver.
    pub to: SocketAddrV4,
}

impl Ends {
    /// The other way round.
    pub fn answer(self) -> Ends {
        Ends { protocol: self.protocol, from: self.to, to: self.from }
    }

    /// As a key of nf_tables' sets: each in cells of four bytes.
    fn key(self) -> [u8; FLOW] {
        let mut key = [0; FLOW];
        for (cell, end) in [(0, self.from), (8, self.to)] {
            key[cell..cell + 4].copy_from_slice(&end.ip().octets());
            key[cell + 4..cell + 6].copy_from_slice(&end.port().to_be_bytes());
        }
        key[16] = self.protocol;
        key
    }

    fn of_key(key: &[u8]) -> Option<Ends> {
        let end = |at: usize| {
            let octets: [u8; 4] = *key.get(at..)?.first_chunk()?;
            let port = u16::from_be_bytes(*key.get(at + 4..)?.first_chunk()?);
            Some(SocketAddrV4::new(octets.into(), port))
        };
        Some(Ends { from: end(0)?, to: end(8)?, protocol: *key.get(16)? })
    }
}

/// Bytes of the key of a connection, and of a port.
const FLOW: usize = 4 * FLOW_CELLS.len();
const PORT: usize = 4 * PORT_CELLS.len();
const ADDRESS_CELLS: [Cell; 1] = [Cell::Address];
const FLOW_CELLS: [Cell; 5] =
    [Cell::Address, Cell::Port, Cell::Address, Cell::Port, Cell::Protocol];
const PORT_CELLS: [Cell; 3] = [Cell::Address, Cell::Port, Cell::Protocol];

/// The tables of one forwarding, on either host.
fn table(id: &str) -> String {
    format!("ferry-published-{id}")
}

/// The name of a TAP device of one: that of the link with this number, or home's.
fn device(id: &str, number: Option<usize>) -> String {
    let id = id.get(..8).unwrap_or(id);
    number.map_or_else(|| format!("ferry{id}"), |number| format!("fy{id}-{number}"))
}

/// A TAP device on which the kernel says nothing of its own.
fn quiet_device(name: &str) -> io::Result<Tap> {
    let tap = Tap::create(name)?;
    // A kernel may have no IPv6.
    sysctl::set(&format!("ipv6/conf/{name}/disable_ipv6"), "1", false)?;
    Ok(tap)
}

/// What a container's connections may depend on that stays on its host.
#[derive(Debug)]
pub struct Surroundings {
    /// The host's own addresses.
    pub addresses: HashSet<IpAddr>,
    links: Vec<rtnl::LinkInfo>,
}

impl Surroundings {
    /// Tells whether a bridge has a port that is no container's cable: others than this host's are behind it.
    pub fn leads_out(&self, bridge: &str) -> bool {
        let index = self.links.iter().find(|link| link.name == bridge).map(|link| link.index);
        let port = |link: &&rtnl::LinkInfo| link.master.is_some() && link.master == index;
        self.links.iter().filter(port).any(|link| !matches!(link.kind.as_str(), "veth" | "tun"))
    }
}

/// Looks at a host.
///
/// # Errors
/// When it cannot be read.
pub fn surroundings(host: &NetNs) -> Result<Surroundings, Problem> {
    let looked = Rtnl::open(host).and_then(|mut s| Ok((s.links()?, s.addresses()?)));
    let (links, addresses) = looked.trying(|| "cannot read this host's network".into())?;
    let addresses = addresses.iter().filter_map(address).map(|a| a.local).collect();
    Ok(Surroundings { addresses, links })
}

/// Takes away what there is of one on this host: no error if there is nothing.
///
/// # Errors
/// When something stays.
pub fn clear(id: &str) -> Result<(), Problem> {
    let trying = || "cannot take away what forwards connections".to_owned();
    let host = NetNs::current().trying(trying)?;
    let (mut socket, table) =
        (NetlinkSocket::open_in(&host, Protocol::Netfilter).trying(trying)?, table(id));
    nft::delete_tables(&mut socket, |_, name| name == table).trying(trying)?;
    away::delete_devices(id, &host).trying(trying)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        let ends = Ends {
            protocol: packet::TCP,
            from: "192.0.2.9:43210".parse().unwrap(),
            to: "10.89.7.20:7000".parse().unwrap(),
        };
        assert_eq!(Ends::of_key(&ends.key()), Some(ends));
        assert_eq!(Ends::of_key(&ends.key()[..16]), None);
        assert!(device("0011223344556677", Some(31)).len() < 16);
        assert!(device("0011223344556677", None).len() < 16);
    }
}
