//! A veth whose other end is on no bridge: the host routes the container's addresses to it, and may
//! answer for them by proxy ARP, as many CNI plugins have it.
//!
//! The host's end goes along with its address, parameters and hardware address: the container's
//! gateway stays what it was. The routes to it are another matter: only one host may have them.
//! They are read with the rest, and made on the destination at the moment of the hand-over, by
//! [`HostRoutes`]; until then what that host sends to the container still finds the source.

use std::fs;
use std::net::IpAddr;

use nix::errno::Errno;

use super::announce::{advertisement, arp_both};
use super::image::{HostEnd, LinkImage, NetworkImage, Proxy, Route};
use super::read::address;
use super::restore::{Restoring, route_request};
use super::rtnl::{self, AF_INET, AF_INET6, IFF_CARRIED, LinkInfo, Rtnl, index_at, ip_of, octets};
use super::sysctl;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{CREATE, REPLACE, Request};
use crate::sys::netns::NetNs;
use crate::sys::packet::PacketSocket;

/// `RTPROT_KERNEL`: routes that come with an address.
const RTPROT_KERNEL: u8 = 2;
/// `NTF_PROXY`
const NTF_PROXY: u8 = 0x08;

/// Reads the host's end; `None` if no route leads over it.
pub(super) fn capture_end(host: &NetNs, end: &LinkInfo) -> Result<Option<HostEnd>, Problem> {
    let trying = || format!("cannot read how the host reaches {}", end.name);
    let mut socket = Rtnl::open(host).trying(trying)?;
    let name_of = |index: i32| (index == end.index).then(|| end.name.clone());
    let mut routes = Vec::new();
    for family in [AF_INET, AF_INET6] {
        for message in socket.routes(family).trying(trying)? {
            if message.attributes(12).u32(4) == Some(end.index as u32) {
                routes.extend(crate::network::read::route(&message, &name_of)?);
            }
        }
    }

    routes.retain(|r| r.protocol != RTPROT_KERNEL);
    if routes.is_empty() {
        return Ok(None);
    }
    let links = socket.links().trying(trying)?;
    let mut proxies = Vec::new();
    for family in [AF_INET, AF_INET6] {
        for message in socket.proxies(family).trying(trying)? {
            let index = index_at(&message, 4);
            let link = links.iter().find(|l| Some(l.index) == index && l.index != end.index);
            if let (Some(address), Some(link)) = (ip_of(&message.attributes(12), 1), link)
                && routes.iter().any(|r| leads_to(r, address))
            {
                proxies.push(Proxy { address, link: link.name.clone() });
            }
        }
    }

    let addresses = socket.addresses().trying(trying)?;
    let addresses = addresses.iter().filter(|m| index_at(m, 4) == Some(end.index));
    Ok(Some(HostEnd {
        name: end.name.clone(),
        mac: end.mac.unwrap_or_default(),
        txqlen: end.txqlen,
        flags: end.flags & IFF_CARRIED,
        addr_gen_mode: end.addr_gen_mode,
        addresses: addresses.filter_map(address).collect(),
        sysctls: host.run(|| sysctl::of_link(&end.name)).trying(trying)?,
        routes,
        proxies,
    }))
}

/// Tells whether a route of a whole address leads to this one.
fn leads_to(route: &Route, address: IpAddr) -> bool {
    let whole = if route.v6 { 128 } else { 32 };
    route.prefix == whole && route.destination == Some(address)
}

/// Returns what stands in the way of a routed link here.
pub(super) fn problems(link: &LinkImage, end: &HostEnd, host: &NetNs) -> Vec<Problem> {
    let what = || format!("interface {} cannot be routed to here", link.name);
    let mut found = Vec::new();
    for (family, v6) in [("ipv4", false), ("ipv6", true)] {
        let wanted = end.routes.iter().any(|r| r.v6 == v6);
        let forwards = host.run(|| forwards(family)).unwrap_or(false);
        if wanted && !forwards {
            let family = if v6 { "IPv6" } else { "IPv4" };
            let key = if v6 { "net.ipv6.conf.all.forwarding" } else { "net.ipv4.ip_forward" };
            found.push(
                Problem::new(what(), format!("this host does not forward {family}"))
                    .hint(format!("sysctl -w {key}=1")),
            );
        }
    }

    let looked = Rtnl::open(host).and_then(|mut s| {
        let mut routes = s.routes(AF_INET)?;
        routes.extend(s.routes(AF_INET6)?);
        Ok((s.links()?, routes))
    });

    let (links, present) = match looked.trying(|| "cannot read this host's routes".into()) {
        Ok(looked) => looked,
        Err(problem) => return vec![problem],
    };
    for route in &end.routes {
        let taken = present.iter().any(|m| {
            let a = m.attributes(12);
            m.payload.get(1) == Some(&route.prefix)
                && ip_of(&a, 1) == route.destination
                && route.destination.is_some()
                && a.u32(15) == Some(route.table)
                && a.u32(6).unwrap_or_default() == route.priority
        });

        if taken {
            let to = route.destination.map_or("default".into(), |d| d.to_string());
            found.push(
                Problem::new(
                    what(),
                    format!("this host has a route to {to}/{} already", route.prefix),
                )
                .hint("remove it, or whatever it leads to: it would compete with the container's"),
            );
        }
    }

    for proxy in &end.proxies {
        if !links.iter().any(|l| l.name == proxy.link) {
            found.push(
                Problem::new(
                    what(),
                    format!(
                        "it is to answer for {} on {}, which is not here",
                        proxy.address, proxy.link
                    ),
                )
                .hint("interfaces with proxy entries have the same name on both hosts"),
            );
        }
    }

    found
}

/// Tells whether any link of the calling thread's namespace forwards.
fn forwards(family: &str) -> bool {
    let all = fs::read_dir(format!("/proc/sys/net/{family}/conf"));
    all.into_iter().flatten().flatten().any(|entry| {
        !matches!(entry.file_name().to_str(), Some("lo" | "default"))
            && fs::read_to_string(entry.path().join("forwarding")).is_ok_and(|v| v.trim() == "1")
    })
}

/// Fills the host's end, which is there and down, and sets it up. The container's end is fenced.
pub(super) fn furnish(
    end: &HostEnd,
    name: &str,
    mtu: u32,
    outside: &mut Rtnl,
    host: &NetNs,
    image: &NetworkImage,
) -> Result<(), Problem> {
    let link = end.as_link(name, mtu);
    // What it says of the namespace is the container's, not the host's.
    let of_link = NetworkImage { sysctls: Vec::new(), ..image.clone() };
    let mut restoring = Restoring { namespace: host, socket: outside, links: vec![&link] };
    restoring.parameters(&of_link)?;
    restoring.up()?;
    restoring.addresses()?;
    restoring.settle(&of_link)
}

/// What leads the container's packets to this host, ready to be put in place.
#[derive(Debug)]
pub struct HostRoutes {
    socket: Rtnl,
    requests: Vec<(Request, String)>,
}

impl HostRoutes {
    /// Of requests that are ready, with what they add.
    pub(super) fn of(socket: Rtnl, requests: Vec<(Request, String)>) -> Self {
        Self { socket, requests }
    }

    /// Prepares the routes and proxy entries for the routed links of `container`, which is made;
    /// `None` where there are none.
    pub fn prepare(
        container: &NetNs,
        image: &NetworkImage,
        host: &NetNs,
    ) -> Result<Option<Self>, Problem> {
        let trying = || "cannot prepare the routes to the container".to_owned();
        let mut requests = Vec::new();
        let mut socket = Rtnl::open(host).trying(trying)?;
        let outside = socket.links().trying(trying)?;
        let inside = Rtnl::open(container).and_then(|mut s| s.links()).trying(trying)?;
        for (link, end) in image.routed() {
            let far = inside.iter().find(|l| l.name == link.name).and_then(|l| l.lower);
            // Attached in another way here.
            let Some(far) = outside.iter().find(|l| Some(l.index) == far) else { continue };
            for route in &end.routes {
                let request =
                    route_request(rtnl::NEWROUTE, CREATE | REPLACE, Some(far.index), route);
                let to = route.destination.map_or("default".into(), |d| d.to_string());
                requests.push((request, format!("the route to {to}/{}", route.prefix)));
            }

            for proxy in &end.proxies {
                let on = outside.iter().find(|l| l.name == proxy.link).map(|l| l.index);
                let on = on.ok_or_else(|| {
                    Problem::new(trying(), format!("there is no interface {}", proxy.link))
                })?;
                requests.push((
                    proxy_request(rtnl::NEWNEIGH, CREATE | REPLACE, on, proxy.address),
                    format!("the proxy entry for {}", proxy.address),
                ));
            }
        }

        Ok((!requests.is_empty()).then_some(Self { socket, requests }))
    }

    /// Puts them in place; all are tried, the first error is told. Some 10 µs each.
    pub fn lead_here(&mut self) -> Result<(), Problem> {
        let mut result = Ok(());
        for (request, what) in &self.requests {
            let done = self.socket.change(request).trying(|| format!("cannot add {what}"));
            result = result.and(done);
        }
        result
    }
}

/// Adds the proxy entries of the image, or takes them away.
pub(super) fn set_proxies(host: &NetNs, proxies: &[Proxy], present: bool) -> Result<(), Problem> {
    let trying = || "cannot change the proxy entries".to_owned();
    let mut socket = Rtnl::open(host).trying(trying)?;
    let links = socket.links().trying(trying)?;
    for proxy in proxies {
        let Some(on) = links.iter().find(|l| l.name == proxy.link) else { continue };
        let request = if present {
            proxy_request(rtnl::NEWNEIGH, CREATE | REPLACE, on.index, proxy.address)
        } else {
            proxy_request(rtnl::DELNEIGH, 0, on.index, proxy.address)
        };
        match socket.change(&request) {
            Err(e) if e.errno != Errno::ENOENT => return Err(e).trying(trying),
            _ => {}
        }
    }
    Ok(())
}

fn proxy_request(kind: u16, flags: u16, index: i32, address: IpAddr) -> Request {
    let mut fixed = [0; 12];
    fixed[0] = if address.is_ipv6() { AF_INET6 } else { AF_INET };
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[10] = NTF_PROXY;
    let mut request = Request::new(kind, flags, &fixed);
    request.attr(1, &octets(address));
    request
}

/// Tells the segments on which this host answers for the container that it does: with its own
/// hardware address.
#[derive(Debug)]
pub struct Uplinks {
    socket: PacketSocket,
    frames: Vec<(i32, Vec<u8>)>,
}

impl Uplinks {
    /// Finds the segments: those with a proxy entry, and those with proxy ARP to whose network the
    /// address belongs.
    pub fn prepare(image: &NetworkImage, host: &NetNs) -> Result<Option<Self>, Problem> {
        let trying = || "cannot prepare the announcement of the address".to_owned();
        let routes: Vec<_> = image.routed().flat_map(|(_, end)| &end.routes).collect();
        let proxies: Vec<_> = image.routed().flat_map(|(_, end)| &end.proxies).collect();
        if routes.is_empty() {
            return Ok(None);
        }

        let (links, addresses) =
            Rtnl::open(host).and_then(|mut s| Ok((s.links()?, s.addresses()?))).trying(trying)?;
        let proxying = host.run(|| {
            let on = |name: &str| {
                fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/proxy_arp"))
                    .is_ok_and(|v| v.trim() == "1")
            };
            let all = on("all");
            links.iter().filter(|l| all || on(&l.name)).map(|l| l.index).collect::<Vec<_>>()
        });

        let proxying = proxying.trying(trying)?;
        let mut frames = Vec::new();
        for link in links.iter().filter(|l| l.is_up() && !l.is_loopback()) {
            let Some(mac) = link.mac else { continue };
            let on_link = |ip: IpAddr| {
                let mut own = addresses.iter().filter(|m| index_at(m, 4) == Some(link.index));
                own.any(|m| address(m).is_some_and(|a| same_network(a.local, ip, a.prefix)))
            };
            let told = routes.iter().filter(|r| r.destination.is_some_and(|d| leads_to(r, d)));
            for ip in told.filter_map(|r| r.destination) {
                let named = proxies.iter().any(|p| p.address == ip && p.link == link.name);
                match ip {
                    IpAddr::V4(v4) if named || proxying.contains(&link.index) && on_link(ip) => {
                        frames.extend(arp_both(mac, v4).map(|frame| (link.index, frame)));
                    }
                    IpAddr::V6(v6) if named => frames.push((link.index, advertisement(mac, v6))),
                    _ => {}
                }
            }
        }

        let socket = host.run(PacketSocket::open).and_then(|s| s).trying(trying)?;
        Ok(Some(Self { socket, frames }))
    }

    /// Sends everything once.
    pub fn announce(&self) -> Result<(), Problem> {
        let mut result = Ok(());
        for (index, frame) in &self.frames {
            result = result.and(self.socket.send(*index, frame));
        }
        result.trying(|| "cannot announce the address".into())
    }
}

pub(super) fn same_network(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    let (a, b) = (octets(a), octets(b));
    let (whole, rest) = (usize::from(prefix / 8), prefix % 8);
    let bits = |o: &[u8]| match rest {
        0 => 0,
        rest => o.get(whole).map_or(0, |byte| byte >> (8 - rest)),
    };
    a.len() == b.len() && a[..whole] == b[..whole] && bits(&a) == bits(&b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_compared_by_bits() {
        let same =
            |a: &str, b: &str, prefix| same_network(a.parse().unwrap(), b.parse().unwrap(), prefix);
        assert!(same("10.1.2.3", "10.1.2.200", 24) && same("10.1.2.3", "10.1.3.3", 23));
        assert!(!same("10.1.2.3", "10.1.3.3", 24) && !same("10.1.2.3", "fd00::1", 0));
        assert!(same("10.1.2.3", "10.1.2.3", 32) && !same("10.1.2.3", "10.1.2.2", 32));
        assert!(same("fd00::1", "fd00::ffff", 64) && !same("fd00::1", "fd01::1", 64));
    }
}
