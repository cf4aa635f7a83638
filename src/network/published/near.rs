//! Containers that were on the container's bridge at home, and stay there: they find it by its address as
//! before, and it finds them.
//!
//! At home what they send to its address is led to the TAP device before their bridge sees it, and when
//! they ask by ARP where that address is, Ferry answers with the hardware address that it had. On the other host
//! they are nowhere: the container is told a hardware address for each, and what it sends to them is led
//! home, as what belongs to connections from there is.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use serde::{Deserialize, Serialize};

use super::home::{PROTOCOL, SENDER, ipv4};
use crate::network::fence;
use crate::network::image::{Neighbour, NetworkImage};
use crate::network::nft::Expression;
use crate::network::restore::neighbour_request;
use crate::network::rtnl::{self, Rtnl};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{Mac, Request};
use crate::sys::netns::NetNs;
use crate::sys::packet::PacketSocket;

const ARP: [u8; 2] = [0x08, 0x06];
/// What is asked and answered by: of Ethernet and IPv4, RFC 826.
const FORM: [u8; 6] = [0, 1, 0x08, 0, 6, 4];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
/// Offsets in an ARP packet: what is done, and whom it is about.
const DOES: u32 = 6;
const TARGET: u32 = 24;

/// One that stays at home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stays {
    /// Its address.
    pub address: Ipv4Addr,
    /// The container's link to it.
    pub link: String,
}

/// Returns which of the container's links leads to each of these addresses; those that none leads to are left
/// out.
pub fn stay(image: &NetworkImage, addresses: &[Ipv4Addr]) -> Vec<Stays> {
    let find = |address: &Ipv4Addr| {
        let leads = |local: IpAddr, prefix: u8| match local {
            IpAddr::V4(own) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
                own != *address && (u32::from(own) ^ u32::from(*address)) & mask == 0
            }
            IpAddr::V6(_) => false,
        };
        let link = super::away::links(image)
            .find(|link| link.addresses.iter().any(|a| leads(a.local, a.prefix)))?;
        Some(Stays { address: *address, link: link.name.clone() })
    };
    addresses.iter().filter_map(find).collect()
}

/// The container knows where they are; or, `known` being false, no more.
///
/// # Errors
/// When the kernel does not take it.
pub fn tell(container: &NetNs, stay: &[Stays], known: bool) -> Result<(), Problem> {
    let trying = || "cannot tell the container where its neighbours are".to_owned();
    let mut socket = Rtnl::open(container).trying(trying)?;
    let links = socket.links().trying(trying)?;
    for one in stay {
        let Some(link) = links.iter().find(|link| link.name == one.link) else { continue };
        let (link, index) = (one.link.clone(), link.index);
        let neighbour =
            Neighbour { link, address: one.address.into(), mac: SENDER, permanent: true };
        let mut request = neighbour_request(index, &neighbour);
        if !known {
            let mut head = [0; 12];
            head[0] = rtnl::AF_INET;
            head[4..8].copy_from_slice(&index.to_ne_bytes());
            request = Request::new(rtnl::DELNEIGH, 0, &head);
            request.attr(1, &one.address.octets());
        }
        match socket.change(&request) {
            Err(e) if !known && e.errno == Errno::ENOENT => {}
            done => done.trying(trying)?,
        }
    }
    Ok(())
}

/// `ip daddr`
pub(super) fn to_address() -> Vec<Expression> {
    let mut rule = ipv4();
    rule.push(Expression::PayloadTo(0, 1, 16, 4));
    rule
}

/// `arp operation request arp daddr ip`
pub(super) fn asks_for() -> Vec<Expression> {
    vec![
        Expression::Meta(PROTOCOL),
        Expression::Equal(ARP.to_vec()),
        Expression::network(DOES, 2),
        Expression::Equal(vec![0, REQUEST]),
        Expression::PayloadTo(0, 1, TARGET, 4),
    ]
}

/// Somebody asks where an address is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ArpRequest {
    pub address: Ipv4Addr,
    by: (Mac, Ipv4Addr),
}

impl ArpRequest {
    pub fn parse(frame: &[u8]) -> Option<ArpRequest> {
        let arp = frame.get(12..)?.strip_prefix(&ARP)?.strip_prefix(&FORM)?;
        let arp = arp.strip_prefix(&[0, REQUEST])?;
        let ip = |at: usize| Some(Ipv4Addr::from(*arp.get(at..)?.first_chunk::<4>()?));
        Some(ArpRequest { by: (*arp.first_chunk()?, ip(6)?), address: ip(16)? })
    }

    /// Returns what whoever has this hardware address says.
    pub fn answer(&self, mac: Mac) -> Vec<u8> {
        let (to, ip) = self.by;
        [&to[..], &mac, &ARP, &FORM, &[0, REPLY], &mac, &self.address.octets(), &to, &ip.octets()]
            .concat()
    }
}

/// Sends a frame out of a bridge.
pub(super) fn say(bridge: &str, frame: &[u8]) -> io::Result<()> {
    let socket = PacketSocket::open()?;
    socket.mark(fence::PASS)?;
    socket.send(if_nametoindex(bridge)? as i32, frame)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;
    use crate::fuzz::Target;
    use crate::network::image::tests::sample;

    fn question() -> Vec<u8> {
        let (by, ip) = ([2, 0, 0, 0, 0, 9], [10, 89, 7, 2]);
        let ends = [&[0xff; 6][..], &by, &ARP, &FORM, &[0, REQUEST], &by, &ip];
        [&ends.concat()[..], &[0; 6], &[10, 89, 7, 20]].concat()
    }

    #[test]
    fn a_question_is_answered() {
        let asked = ArpRequest::parse(&question()).unwrap();
        assert_eq!(asked.address, Ipv4Addr::new(10, 89, 7, 20));
        let mac = [2, 0, 0, 0, 0, 1];
        let said = asked.answer(mac);
        assert_eq!((said.len(), &said[..6], &said[6..12]), (42, &[2, 0, 0, 0, 0, 9][..], &mac[..]));
        assert_eq!(&said[22..32], [&mac[..], &[10, 89, 7, 20]].concat());
        assert_eq!(ArpRequest::parse(&said), None, "that is none");
    }

    #[test]
    fn whoever_is_on_a_link_is_found() {
        let mut image = sample();
        let veth = serde_json::json!({
            "veth": { "host_ifname": "v1", "host_mac": [2, 0, 0, 0, 0, 2], "bridge": "br0" },
        });
        image["links"][1]["kind"] = veth;
        image["links"][1]["addresses"][0]["local"] = "10.89.7.20".into();
        image["links"][1]["addresses"][0]["prefix"] = 24.into();
        let image: NetworkImage = serde_json::from_value(image).unwrap();
        let ips = ["10.89.7.2", "10.89.8.2", "10.89.7.20"].map(|ip| ip.parse().unwrap());
        let link = image.links[1].name.clone();
        assert_eq!(stay(&image, &ips), [Stays { address: ips[0], link }]);
    }

    #[test]
    fn fuzz_questions() {
        Target::new("questions").sample(question()).run(|bytes| {
            let asked = ArpRequest::parse(bytes).context("no question")?;
            assert_eq!(asked.answer([0; 6]).len(), 42);
            Ok(())
        });
    }
}
