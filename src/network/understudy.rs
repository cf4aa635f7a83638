//! What stands in for a network that somebody else makes later: an engine that wants to see the
//! container's first process before it makes the network in that one's namespace.
//!
//! That process is restored, with sockets that are bound to the network's addresses, or connected from
//! them. So the addresses are on the loopback device until then, where an engine finds nothing that
//! would be in its way: each for itself, and a route to everywhere in the table that is looked at last. No
//! packet passes meanwhile but on the loopback device, in or out: the fence can only be put on devices
//! that are there.

use std::net::IpAddr;
use std::path::Path;

use super::image::{Address, LinkKind, NetworkImage, Route};
use super::nft::{self, NewChain, NftBatch, Policy};
use super::placement::Placement;
use super::published::given::alone;
use super::recreate::{Recreated, recreate};
use super::restore::{address_request, route_request};
use super::rtnl::{self, Rtnl};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkSocket, Protocol};
use crate::sys::netns::NetNs;

const TABLE: &str = "ferry-understudy";
/// Base chains of nf_tables' inet family, and whether they see what comes in.
const CHAINS: [(&str, u32, bool); 2] = [("in", 0, true), ("out", 3, false)];
/// `RT_TABLE_DEFAULT`: the last one, unless somebody has made other rules.
const LAST_TABLE: u32 = 253;
/// `RTPROT_STATIC`, `RT_SCOPE_LINK`, `RTN_UNICAST`
const STATIC: u8 = 4;
const LINK: u8 = 253;
const UNICAST: u8 = 1;
/// Of the loopback device in every namespace.
const LOOPBACK: i32 = 1;

/// A namespace in the place of one that an engine makes. The namespace's name is taken away on drop.
#[derive(Debug)]
pub struct Understudy {
    made: Recreated,
    addresses: Vec<Address>,
    route: Route,
}

impl Understudy {
    /// Makes a namespace at a path with all that is not of a link to the outside.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(image: &NetworkImage, path: &Path, host: &NetNs) -> Result<Understudy, Problem> {
        let outward = image.outward().flat_map(|(_, link)| &link.addresses);
        let addresses: Vec<Address> =
            outward.map(|a| a.local).filter(IpAddr::is_ipv4).map(alone).collect();
        let mut loopback = image.clone();
        loopback.links.retain(|link| link.kind == LinkKind::Loopback);
        loopback.neighbours.clear();
        let name = loopback.links.first().map(|link| link.name.clone());
        let route = everywhere(name);
        for link in &mut loopback.links {
            link.up = true;
            link.addresses.extend(addresses.iter().cloned());
        }
        loopback.routes = vec![route.clone()];
        let made = recreate(&loopback, &Placement::None, path, host)?;
        close(made.namespace())?;
        Ok(Understudy { made, addresses, route })
    }

    /// Returns where it is.
    pub fn namespace(&self) -> &NetNs {
        self.made.namespace()
    }

    /// The network is there, behind its own fence: leaves the stage to it, but for what is to be `kept`.
    ///
    /// # Errors
    /// When something stays.
    pub fn leave(&self, kept: &[IpAddr]) -> Result<(), Problem> {
        let trying = || "cannot take away what stood in for the network".to_owned();
        let namespace = self.made.namespace();
        let mut links = Rtnl::open(namespace).trying(trying)?;
        let route = route_request(rtnl::DELROUTE, 0, Some(LOOPBACK), &self.route);
        links.change(&route).trying(trying)?;
        for address in self.addresses.iter().filter(|a| !kept.contains(&a.local)) {
            let request = address_request(rtnl::DELADDR, 0, LOOPBACK, address);
            links.change(&request).trying(trying)?;
        }
        let mut socket = NetlinkSocket::open_in(namespace, Protocol::Netfilter).trying(trying)?;
        nft::delete_tables(&mut socket, |family, name| family == nft::INET && name == TABLE)
            .trying(trying)
    }
}

fn everywhere(link: Option<String>) -> Route {
    Route {
        v6: false,
        destination: None,
        prefix: 0,
        source: None,
        link,
        gateway: None,
        prefsrc: None,
        table: LAST_TABLE,
        priority: 0,
        protocol: STATIC,
        scope: LINK,
        kind: UNICAST,
        tos: 0,
        onlink: false,
        metrics: Vec::new(),
        congestion: None,
        preference: None,
        expires: None,
    }
}

fn close(namespace: &NetNs) -> Result<(), Problem> {
    let trying = || "cannot close what stands in for the network".to_owned();
    let mut batch = NftBatch::new();
    batch.add_table(nft::INET, TABLE);
    for (name, hook, inward) in CHAINS {
        batch.add_chain(&NewChain {
            family: nft::INET,
            table: TABLE,
            name,
            hook,
            devices: &[],
            policy: Policy::Drop,
        });
        if inward {
            batch.accept_from_loopback(nft::INET, TABLE, name);
        } else {
            batch.accept_loopback(nft::INET, TABLE, name);
        }
    }
    let mut socket = NetlinkSocket::open_in(namespace, Protocol::Netfilter).trying(trying)?;
    socket.transact(&batch.prepare()).map(drop).trying(trying)
}
