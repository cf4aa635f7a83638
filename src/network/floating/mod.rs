//! Addresses that move from host to host: for containers that use the host's network.
//!
//! Such a container has no links of its own. What goes along is one or several of the host's
//! addresses, which the user names, and the sockets that are bound to them. All else on both hosts
//! stays as it is: the fence ([`fence`]) stops what goes to and from these addresses, on every
//! interface and between programs of the host, and nothing else. In the order of a migration:
//!
//! 1. [`capture()`] finds the addresses on the source, and looks at all sockets: what the container
//!    has on other addresses, or others have on these, is refused. [`preflight`] looks at the
//!    destination: whether the addresses and ports are free there.
//! 2. When the freeze begins, and not before, as its own programs may have connections to the
//!    container, the destination closes its fence and takes the addresses ([`Stay::take`]), so that
//!    sockets can be bound to them. Nobody hears of it: the kernel announces nothing by itself, and
//!    what is asked is not answered. They lead to no network yet and are no source for anybody's new
//!    connections.
//! 3. On the source the fence closes for the freeze, too; frames that come for the addresses are kept and
//!    sent along as of other containers, see [`Capture::of_addresses`](crate::network::Capture::of_addresses)
//!    and [`Replay::on_host`](crate::network::Replay::on_host).
//! 4. After the commit the destination gives the addresses their networks ([`Stay::entitle`]), opens
//!    its fence and announces them. The source lets go of them ([`Stay::let_go`]) when the frozen
//!    tasks are gone, and takes its fence away last.
//!
//! [`Stay`] is written down before anything is changed: it is enough to undo or finish it.

mod claims;
mod fence;
mod preflight;
mod stay;

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::image::{Address, ifname};
use super::read::address;
use super::rtnl::{self, AF_INET, AF_INET6, LinkInfo, Rtnl, index_at, ip_of};
use super::sockets;
use super::udp_queues::UdpEndpoints;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::Mac;
use crate::sys::netns::NetNs;

pub use preflight::preflight;
pub use stay::{Stay, StaySide};

/// Most addresses of one container.
pub const MAX_MOVED: usize = 16;
/// Most sockets that are told to the destination; where there are more, a port that is taken shows
/// when they are restored.
const MAX_CLAIMS: usize = 4096;
/// `RTPROT_KERNEL`
const KERNEL: u8 = 2;

/// `--move-address`: an address of this host, and the interface that it goes to on the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoveAddress {
    /// The address.
    pub address: IpAddr,
    /// Length of its network's prefix.
    pub prefix: u8,
    /// On the destination.
    pub interface: String,
}

impl FromStr for MoveAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "as in 10.0.0.5/24@eth0, or fd00::5/64@eth0".to_owned();
        let (network, interface) = text.split_once('@').ok_or_else(form)?;
        let (address, prefix) = network.split_once('/').ok_or_else(form)?;
        let address: IpAddr = address.parse().map_err(|_| form())?;
        let prefix = prefix.parse().map_err(|_| form())?;
        crate::network::image::prefix(address, prefix)?;
        ifname(interface)?;
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} is no address that could move"));
        }
        Ok(Self { address, prefix, interface: interface.into() })
    }
}

impl fmt::Display for MoveAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.address, self.prefix, self.interface)
    }
}

/// One address that moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// As the source has it.
    pub address: Address,
    /// The source's interface.
    pub from: String,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// The destination's interface.
    pub to: String,
}

/// A socket that will be bound on the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Claim {
    /// UDP rather than TCP.
    pub udp: bool,
    /// It takes connections.
    pub listens: bool,
    /// What it is bound to.
    pub local: SocketAddr,
}

/// All that goes along of the host's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floating {
    /// The addresses, as the user has named them.
    pub moved: Vec<Moved>,
    /// What the container's sockets are bound to.
    pub claims: Vec<Claim>,
}

impl Floating {
    /// The addresses alone.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.moved.iter().map(|m| m.address.local).collect()
    }

    /// Returns what brings datagrams to them that wait unread on the source.
    pub fn homes(&self) -> UdpEndpoints {
        let interfaces = self.interfaces(StaySide::Source);
        UdpEndpoints::lent(self.moved.iter().filter_map(|moved| {
            let at = interfaces.iter().position(|name| *name == moved.from)?;
            Some((moved.address.local, u16::try_from(at).ok()?, moved.mac?))
        }))
    }

    /// Names of the interfaces on one side, each once; frames are for a place in this list, which has
    /// the same order on both sides.
    pub fn interfaces(&self, side: StaySide) -> Vec<&str> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for pair in self.moved.iter().map(|m| (m.from.as_str(), m.to.as_str())) {
            if !pairs.iter().any(|p| p.0 == pair.0) {
                pairs.push(pair);
            }
        }
        pairs
            .into_iter()
            .map(|(from, to)| if side == StaySide::Source { from } else { to })
            .collect()
    }

    /// Ports on which the container takes connections to any address of its host.
    fn doors(&self) -> Vec<u16> {
        let open = self.claims.iter().filter(|c| c.listens && c.local.ip().is_unspecified());
        let mut ports: Vec<u16> = open.map(|c| c.local.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Refuses what no honest peer sends. To be called on everything that came over the wire.
    pub fn validate(&self) -> Result<(), Problem> {
        self.check().map_err(|why| {
            Problem::new("the list of addresses is not valid", why)
                .hint("the other side is broken or of another version of Ferry")
        })
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_MOVED).contains(&self.moved.len()) || self.claims.len() > MAX_CLAIMS {
            return Err(format!("{} addresses, {} sockets", self.moved.len(), self.claims.len()));
        }
        for (i, one) in self.moved.iter().enumerate() {
            one.address.check()?;
            ifname(&one.from)?;
            ifname(&one.to)?;
            let ip = one.address.local;
            if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
                return Err(format!("{ip} is no address that could move"));
            }
            if self.moved[..i].iter().any(|m| m.address.local == ip) {
                return Err(format!("{ip} is named twice"));
            }
        }
        Ok(())
    }

    /// In words, a line each.
    pub fn lines(&self) -> Vec<String> {
        let line = |m: &Moved| {
            let (ip, prefix) = (m.address.local, m.address.prefix);
            format!("address {ip}/{prefix}: moves from {} here to {} there", m.from, m.to)
        };
        self.moved.iter().map(line).collect()
    }
}

/// Finds the addresses on `host`, and looks whether they can go with the container, whose sockets
/// are `own`. Changes nothing.
pub fn capture(
    wishes: &[MoveAddress],
    own: &HashSet<u32>,
    host: &NetNs,
) -> Result<Floating, Problem> {
    let trying = || "cannot read this host's network".to_owned();
    let mut socket = Rtnl::open(host).trying(trying)?;
    let links = socket.links().trying(trying)?;
    let all = addresses(&mut socket, &links)?;
    let mut moved: Vec<Moved> = Vec::new();
    for wish in wishes {
        if moved.iter().any(|m| m.address.local == wish.address) {
            return Err(Problem::new(
                format!("{} cannot move twice", wish.address),
                "--move-address names it more than once",
            ));
        }
        moved.push(find(wish, &all)?);
    }

    let addresses: Vec<IpAddr> = moved.iter().map(|m| m.address.local).collect();
    sources_of_routes(&mut socket, &addresses)?;
    let known = sockets::SockDiag::new(host)?.all()?;
    let claims = claims::of(&known, own, &addresses)?;
    fence::usable()?;
    let floating = Floating { moved, claims };
    floating.validate()?;

    Ok(floating)
}

/// The options that would move the addresses on which the container has sockets.
pub fn proposals(own: &HashSet<u32>, host: &NetNs) -> Vec<String> {
    let look = || -> Result<Vec<String>, Problem> {
        let trying = || "cannot read this host's network".to_owned();
        let mut socket = Rtnl::open(host).trying(trying)?;
        let links = socket.links().trying(trying)?;
        let known = sockets::SockDiag::new(host)?.all()?;
        let used: HashSet<IpAddr> = known
            .iter()
            .filter(|k| own.contains(&k.inode))
            .map(|k| k.flow.local.ip())
            .filter(|ip| !ip.is_loopback())
            .collect();
        let all = addresses(&mut socket, &links)?;
        let all = all.into_iter().filter(|(_, a)| used.contains(&a.local));
        Ok(all
            .map(|(link, a)| format!("--move-address {}/{}@{}", a.local, a.prefix, link.name))
            .collect())
    };
    look().unwrap_or_default()
}

/// All addresses of the host, each with its link.
fn addresses<'a>(
    socket: &mut Rtnl,
    links: &'a [LinkInfo],
) -> Result<Vec<(&'a LinkInfo, Address)>, Problem> {
    let list = socket.addresses().trying(|| "cannot read this host's addresses".into())?;
    let found = list.iter().filter_map(|m| {
        let index = index_at(m, 4)?;
        Some((links.iter().find(|l| l.index == index)?, address(m)?))
    });
    Ok(found.collect())
}

fn find(wish: &MoveAddress, all: &[(&LinkInfo, Address)]) -> Result<Moved, Problem> {
    let what = || format!("{} cannot move", wish.address);
    let Some((link, address)) = all.iter().find(|(_, a)| a.local == wish.address) else {
        return Err(Problem::new(what(), "this host does not have it")
            .hint("`ip address` shows what it has"));
    };

    if address.prefix != wish.prefix {
        return Err(Problem::new(
            what(),
            format!("this host has it as {}/{}", address.local, address.prefix),
        )
        .hint(format!("--move-address {}/{}@{}", address.local, address.prefix, wish.interface)));
    }

    if link.is_loopback() || link.mac.is_none() {
        return Err(Problem::new(
            what(),
            format!("it is on {}, where no neighbour could hear that it has moved", link.name),
        )
        .hint("put it on an interface with a hardware address"));
    }

    Ok(Moved {
        address: address.clone(),
        from: link.name.clone(),
        mac: link.mac,
        to: wish.interface.clone(),
    })
}

/// The kernel deletes routes whose preferred source goes away, and with them the way of others.
fn sources_of_routes(socket: &mut Rtnl, moved: &[IpAddr]) -> Result<(), Problem> {
    for family in [AF_INET, AF_INET6] {
        let routes = socket.routes(family).trying(|| "cannot read this host's routes".into())?;
        for message in routes {
            let a = message.attributes(12);
            let Some(&[_, prefix, _, _, table, protocol, ..]) = message.payload.get(..6) else {
                continue;
            };
            let table = a.u32(15).unwrap_or(u32::from(table));
            let Some(source) = ip_of(&a, 7).filter(|ip| moved.contains(ip)) else { continue };
            if protocol != KERNEL && table != rtnl::TABLE_LOCAL {
                let to = ip_of(&a, 1).map_or("default".into(), |d| format!("{d}/{prefix}"));
                return Err(Problem::new(
                    format!("{source} cannot move"),
                    format!("it is the source of the route {to}, which would go with it"),
                )
                .hint("give that route another `src`"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_are_read_and_written() {
        for text in ["10.0.0.5/24@eth0", "fd00::5/64@br0", "10.0.0.5/32@eth0.7"] {
            assert_eq!(text.parse::<MoveAddress>().map(|w| w.to_string()), Ok(text.to_owned()));
        }
        for text in
            ["", "10.0.0.5", "10.0.0.5/24", "10.0.0.5@eth0", "10.0.0.5/33@eth0", "127.0.0.1/8@lo"]
        {
            assert!(text.parse::<MoveAddress>().is_err(), "{text}");
        }
        for text in ["10.0.0.5/24@", "10.0.0.5/24@a/b", "ff02::1/64@eth0", "0.0.0.0/0@eth0"] {
            assert!(text.parse::<MoveAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_comes_over_the_wire_is_checked() {
        let moved = |ip: &str, from: &str| Moved {
            address: Address::plain(ip.parse().unwrap(), 24),
            from: from.into(),
            mac: None,
            to: "eth1".into(),
        };
        let good = |moved| Floating { moved, claims: Vec::new() }.validate().is_ok();
        assert!(good(vec![moved("10.0.0.5", "eth0"), moved("fd00::5", "eth0")]));
        assert!(!good(Vec::new()));
        assert!(!good(vec![moved("127.0.0.1", "eth0")]));
        assert!(!good(vec![moved("10.0.0.5", "../../x")]));
        assert!(!good(vec![moved("10.0.0.5", "eth0"), moved("10.0.0.5", "eth0")]));
        assert!(!good(vec![moved("10.0.0.5", "eth0"); MAX_MOVED + 1]));
    }
}
