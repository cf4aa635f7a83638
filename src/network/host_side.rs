//! What a host itself says and does for a container that it routes to, and its end.
//!
//! A host that answers for the container by proxy ARP or a proxy entry must stop it the moment the
//! other one begins, or neighbours learn the wrong one of two. The route stays until the container is
//! gone here: packets of those who have not heard of the move still come in, are kept, and are sent
//! along. So on the source, from the commit on, a [`ProxyArpBlock`] lets no answer out; the route goes with
//! the link.
//!
//! [`HostSide`] is written down before anything is changed: it is enough to undo or finish it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::image::NetworkImage;
use super::nft::{self, Expression, NewChain, NftBatch, Policy};
use super::routed::{self, HostRoutes, Uplinks};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkSocket, Prepared, Protocol};
use crate::sys::netns::NetNs;

const OUT: &str = "out";
const NF_ARP_OUT: u32 = 1;
const NF_INET_LOCAL_OUT: u32 = 3;
const FAMILIES: [(u8, u32); 2] = [(nft::ARP, NF_ARP_OUT), (nft::IPV6, NF_INET_LOCAL_OUT)];

/// A host's end of a routed container: what it answers, its route and its proxy entries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostSide {
    /// Name of the table on the host.
    table: String,
    image: NetworkImage,
}

/// Ready to keep the host from answering for the container.
#[derive(Debug)]
pub struct ProxyArpBlock {
    socket: NetlinkSocket,
    rules: Prepared,
}

impl ProxyArpBlock {
    /// No answer leaves the host any more. Some 50 µs.
    pub fn begin(&mut self) -> Result<(), Problem> {
        self.socket
            .transact(&self.rules)
            .map(drop)
            .trying(|| "cannot keep this host from answering for the container".into())
    }
}

impl HostSide {
    /// `None` for a container that the host does not route to.
    pub fn new(image: &NetworkImage, migration: &str) -> Option<Self> {
        image.routed().next()?;
        Some(Self { table: format!("ferry-{migration}"), image: image.clone() })
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.image.routed().flat_map(|(_, end)| end.routes.iter().filter_map(|r| r.destination))
    }

    /// On the source, ahead of time: chains that let everything through.
    pub fn arm(&self, host: &NetNs) -> Result<ProxyArpBlock, Problem> {
        let trying = || "cannot prepare this host's packet filter".to_owned();
        let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
        let (mut chains, mut rules) = (NftBatch::new(), NftBatch::new());
        for (family, hook) in FAMILIES {
            chains.add_table(family, &self.table);
            chains.add_chain(&NewChain {
                family,
                table: &self.table,
                name: OUT,
                hook,
                devices: &[],
                policy: Policy::Accept,
            });
        }

        for address in self.addresses() {
            match address {
                IpAddr::V4(ip) => {
                    // The sender of an ARP packet, arp_hdr(3).
                    let sender = Expression::network(14, 4);
                    let rule = [sender, Expression::Equal(ip.octets().into()), Expression::DROP];
                    rules.add_rule(nft::ARP, &self.table, OUT, &rule);
                }
                IpAddr::V6(ip) => {
                    // The target of a neighbour advertisement, RFC 4861 4.4.
                    const ICMPV6: u8 = 58;
                    const ADVERTISEMENT: u8 = 136;
                    let rule = [
                        Expression::L4_PROTOCOL,
                        Expression::Equal(vec![ICMPV6]),
                        Expression::transport(0, 1),
                        Expression::Equal(vec![ADVERTISEMENT]),
                        Expression::transport(8, 16),
                        Expression::Equal(ip.octets().into()),
                        Expression::DROP,
                    ];
                    rules.add_rule(nft::IPV6, &self.table, OUT, &rule);
                }
            }
        }

        socket.transact(&chains.prepare()).trying(trying)?;
        Ok(ProxyArpBlock { socket, rules: rules.prepare() })
    }

    /// Takes the host's own part away, for good: the container is not here.
    pub fn clear(&self, host: &NetNs) -> Result<(), Problem> {
        self.proxies(host, false).and(self.speak(host))
    }

    /// The container is here, or stays: the host answers for it as before, and says so.
    pub fn restore(&self, host: &NetNs) -> Result<(), Problem> {
        self.speak(host)?;
        self.proxies(host, true)
    }

    /// On the destination of whom nobody knows how far he came: everything leads here.
    pub fn lead_here(&self, container: &NetNs, host: &NetNs) -> Result<(), Problem> {
        if let Some(mut lead) = HostRoutes::prepare(container, &self.image, host)? {
            lead.lead_here()?;
        }
        self.announce(host)
    }

    /// Tells the neighbours that this host answers for the container.
    pub fn announce(&self, host: &NetNs) -> Result<(), Problem> {
        Uplinks::prepare(&self.image, host)?.map_or(Ok(()), |uplinks| uplinks.announce())
    }

    fn proxies(&self, host: &NetNs, present: bool) -> Result<(), Problem> {
        self.image
            .routed()
            .try_for_each(|(_, end)| routed::set_proxies(host, &end.proxies, present))
    }

    /// The table goes, if it is there.
    fn speak(&self, host: &NetNs) -> Result<(), Problem> {
        let trying = || "cannot remove what kept this host silent".to_owned();
        let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
        nft::delete_tables(&mut socket, |_, name| name == self.table).trying(trying)
    }
}
