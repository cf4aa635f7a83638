//! Filling a fenced namespace with what the image says: parameters, addresses, routes, rules,
//! neighbours.
//!
//! The kernel makes some of them by itself as links come up. So each list is compared with what
//! is there: what is too much goes, what is missing comes.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::image::{Address, LinkImage, LinkSysctl, Neighbour, NetworkImage, Route, Rule};
use super::rtnl::{
    self, AF_INET, AF_INET6, IFF_CARRIED, IFF_UP, LinkInfo, RTAX_CC_ALGO, RTNH_F_ONLINK, Rtnl, ifa,
    ifinfo, octets, rta,
};
use super::{qdisc, sysctl};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{CREATE, EXCL, REPLACE, Request};
use crate::sys::netns::NetNs;

/// `NLM_F_APPEND`: IPv4 may have several routes that differ in their next hop only.
const APPEND: u16 = 0x800;
/// `IN6_ADDR_GEN_MODE_NONE`
const NO_ADDRESSES: u8 = 1;
const IFA_TENTATIVE: u32 = 0x40;
const ADDRESS_WAIT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(1);
const NUD_STALE: u16 = 0x04;
const NUD_PERMANENT: u16 = 0x80;

/// A namespace under construction.
pub(super) struct Restoring<'a> {
    pub namespace: &'a NetNs,
    pub socket: &'a mut Rtnl,
    /// Those that are made.
    pub links: Vec<&'a LinkImage>,
}

impl Restoring<'_> {
    /// Parameters, while the links are still down; for now IPv6 neither makes addresses by itself
    /// nor asks whether an address is free: behind the fence nobody could answer, and the answer
    /// would be the source's.
    pub fn parameters(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        let trying = || "cannot set the kernel parameters of the new namespace".to_owned();
        let links = &self.links;
        let set = || {
            for s in image.sysctls.iter().filter(|s| !s.path.ends_with("/accept_dad")) {
                sysctl::set(&s.path, &s.value, s.changed)?;
            }
            for link in links {
                for s in link.sysctls.iter().filter(|s| s.name != "accept_dad") {
                    set_of_link(link, s)?;
                }
                sysctl::set(&format!("ipv6/conf/{}/accept_dad", link.name), "0", false)?;
            }
            Ok::<_, std::io::Error>(())
        };

        self.namespace.run(set).and_then(|r| r).trying(trying).map_err(|p| {
            p.hint("this host's kernel may lack what the source's has: compare `sysctl -a`")
        })?;
        for link in self.links.clone() {
            if link.addr_gen_mode.is_some() {
                self.generate_addresses(link, NO_ADDRESSES)?;
            }
        }

        Ok(())
    }

    /// Sets the links up. The fence must be closed.
    pub fn up(&mut self) -> Result<(), Problem> {
        for link in self.links.clone() {
            let index = self.find(link)?.index;
            let flags = link.flags & IFF_CARRIED | if link.up { IFF_UP } else { 0 };
            let change = IFF_UP | IFF_CARRIED;
            let mut request = Request::new(rtnl::NEWLINK, 0, &ifinfo(index, flags, change));
            request.u32(rtnl::IFLA_MTU, link.mtu).u32(rtnl::IFLA_TXQLEN, link.txqlen);
            self.socket.change(&request).trying(|| format!("cannot set {} up", link.name))?;
        }
        Ok(())
    }

    /// In a namespace that has been the container's before: addresses that it has no more go.
    pub fn clear(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        let trying = || "cannot read the addresses of the kept namespace".to_owned();
        let infos = self.infos()?;
        for message in self.socket.addresses().trying(trying)? {
            let (Some(index), Some(has)) =
                (rtnl::index_at(&message, 4), crate::network::read::address(&message))
            else {
                continue;
            };
            let Some(info) = infos.iter().find(|l| l.index == index) else { continue };
            let wanted = image.links.iter().find(|l| l.name == info.name).is_some_and(|l| {
                l.addresses.iter().any(|a| a.local == has.local && a.prefix == has.prefix)
            });
            if !wanted {
                let request = address_request(rtnl::DELADDR, 0, index, &has);
                // With the last address of a network the kernel takes its further ones.
                self.try_change(&request, Errno::EADDRNOTAVAIL)
                    .trying(|| format!("cannot delete {}", has.local))?;
            }
        }
        Ok(())
    }

    /// Queueing disciplines, addresses, routes, rules and neighbours.
    pub fn fill(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        self.qdiscs()?;
        self.addresses()?;
        self.routes(image)?;
        self.rules(image)?;
        self.neighbours(image)
    }

    fn qdiscs(&mut self) -> Result<(), Problem> {
        let present = self.socket.qdiscs().trying(|| "cannot read the traffic control".into())?;
        for link in self.links.clone() {
            let info = self.find(link)?;
            qdisc::restore(self.socket, &present, &info, &link.qdiscs)?;
        }
        Ok(())
    }

    /// Addresses, until they are usable.
    pub fn addresses(&mut self) -> Result<(), Problem> {
        for link in self.links.clone() {
            let index = self.find(link)?.index;
            // Of IPv4 the kernel puts new addresses last, of IPv6 first; the order chooses the
            // source address among equals.
            let (v6, v4): (Vec<_>, Vec<_>) = link.addresses.iter().partition(|a| a.local.is_ipv6());
            for address in v4.into_iter().chain(v6.into_iter().rev()) {
                let request = address_request(rtnl::NEWADDR, CREATE | EXCL, index, address);
                // Loopback has its own as soon as it is up.
                self.try_change(&request, Errno::EEXIST)
                    .trying(|| format!("cannot add {} to {}", address.local, link.name))?;
            }
        }
        self.wait_for_addresses()
    }

    /// The kernel looks later whether an address has to be probed; until then it is tentative, and
    /// parameters must stay as they are.
    fn wait_for_addresses(&mut self) -> Result<(), Problem> {
        let trying = || "cannot read the new addresses".to_owned();
        let end = Instant::now() + ADDRESS_WAIT;
        let names: Vec<String> = self.links.iter().map(|l| l.name.clone()).collect();
        let ours = |link: &LinkInfo| names.contains(&link.name);

        loop {
            let up: Vec<i32> =
                self.infos()?.iter().filter(|l| l.is_up() && ours(l)).map(|l| l.index).collect();
            let list = self.socket.addresses().trying(trying)?;
            let waiting = list.iter().any(|m| {
                rtnl::index_at(m, 4).is_some_and(|i| up.contains(&i))
                    && m.attributes(8).u32(8).is_some_and(|flags| flags & IFA_TENTATIVE != 0)
            });

            if !waiting {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(Problem::new(
                    "an IPv6 address stays tentative",
                    "the kernel probes it",
                ));
            }
            thread::sleep(POLL);
        }
    }

    /// The last step, when frames can pass: IPv6 is told to do as it did on the source.
    pub fn settle(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        for link in self.links.clone() {
            if let Some(mode) = link.addr_gen_mode {
                self.generate_addresses(link, mode)?;
            }
        }
        let links = &self.links;
        let set = || {
            for s in image.sysctls.iter().filter(|s| s.path.ends_with("/accept_dad")) {
                sysctl::set(&s.path, &s.value, s.changed)?;
            }
            for link in links {
                for s in link.sysctls.iter().filter(|s| s.name == "accept_dad") {
                    set_of_link(link, s)?;
                }
            }
            Ok::<_, std::io::Error>(())
        };
        self.namespace
            .run(set)
            .and_then(|r| r)
            .trying(|| "cannot set the kernel parameters of the new namespace".into())
    }

    fn routes(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        let infos = self.infos()?;
        let name_of = |index: i32| infos.iter().find(|l| l.index == index).map(|l| l.name.clone());
        let index_of = |name: &str| infos.iter().find(|l| l.name == name).map(|l| l.index);
        let present = crate::network::read::routes(self.socket, &name_of)?;
        let mut wanted: Vec<&Route> = image.routes.iter().filter(|r| self.is_made(r)).collect();

        // A next hop must be reachable before it can be told.
        wanted.sort_by_key(|r| r.gateway.is_some());
        for route in present.iter().filter(|p| !wanted.iter().any(|w| same_route(w, p))) {
            let index = route.link.as_deref().and_then(index_of);
            let request = route_request(rtnl::DELROUTE, 0, index, route);
            self.try_change(&request, Errno::ESRCH)
                .trying(|| format!("cannot delete {route:?}"))?;
        }

        for route in wanted.iter().filter(|w| !present.iter().any(|p| same_route(w, p))) {
            let index = route.link.as_deref().and_then(index_of);
            let flags = CREATE | if route.v6 { EXCL } else { APPEND };
            let request = route_request(rtnl::NEWROUTE, flags, index, route);
            self.socket.change(&request).trying(|| {
                let to = route.destination.map_or("default".into(), |d| d.to_string());
                format!("cannot add the route {to}/{} in table {}", route.prefix, route.table)
            })?;
        }

        Ok(())
    }

    fn rules(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        let present = crate::network::read::rules(self.socket)?;
        let request = |kind, flags, rule: &Rule| {
            let mut request = Request::new(kind, flags, &rule.header);
            for (attribute, value) in &rule.attributes {
                request.attr(*attribute, value);
            }
            request
        };
        // New ones first: there is never a moment without any.
        for rule in image.rules.iter().filter(|r| !present.contains(r)) {
            self.socket
                .change(&request(rtnl::NEWRULE, CREATE | EXCL, rule))
                .trying(|| format!("cannot add the policy {rule:?}"))?;
        }
        for rule in present.iter().filter(|r| !image.rules.contains(r)) {
            self.socket
                .change(&request(rtnl::DELRULE, 0, rule))
                .trying(|| format!("cannot delete the policy {rule:?}"))?;
        }
        Ok(())
    }

    fn neighbours(&mut self, image: &NetworkImage) -> Result<(), Problem> {
        let infos = self.infos()?;
        for n in &image.neighbours {
            if !self.links.iter().any(|l| l.name == n.link) {
                continue;
            }
            let Some(info) = infos.iter().find(|l| l.name == n.link) else { continue };
            let result = self.socket.change(&neighbour_request(info.index, n));
            if n.permanent {
                result.trying(|| format!("cannot add the neighbour {}", n.address))?;
            }
        }
        Ok(())
    }

    fn is_made(&self, route: &Route) -> bool {
        match &route.link {
            Some(name) => self.links.iter().any(|l| l.name == *name),
            None => true,
        }
    }

    fn generate_addresses(&mut self, link: &LinkImage, mode: u8) -> Result<(), Problem> {
        let index = self.find(link)?.index;
        // Not by /proc/sys, for that makes addresses at once.
        let mut request = Request::new(rtnl::NEWLINK, 0, &ifinfo(index, 0, 0));
        request.nest(rtnl::IFLA_AF_SPEC, |spec| {
            spec.nest(u16::from(AF_INET6), |inet6| {
                inet6.attr(rtnl::INET6_ADDR_GEN_MODE, &[mode]);
            });
        });
        // A link whose MTU is too small for it, or a kernel started without it, has no IPv6.
        let has_ipv6 = self.find(link)?.addr_gen_mode.is_some();
        if has_ipv6 {
            self.socket
                .change(&request)
                .trying(|| format!("cannot set how {} gets its IPv6 addresses", link.name))
        } else {
            Ok(())
        }
    }

    fn infos(&mut self) -> Result<Vec<LinkInfo>, Problem> {
        self.socket.links().trying(|| "cannot read the new links".into())
    }

    fn find(&mut self, link: &LinkImage) -> Result<LinkInfo, Problem> {
        self.socket
            .link(&link.name)
            .trying(|| "cannot read the new links".into())?
            .ok_or_else(|| Problem::new(format!("{} is gone", link.name), "somebody deleted it"))
    }

    fn try_change(&mut self, request: &Request, fine: Errno) -> crate::sys::netlink::Result<()> {
        match self.socket.change(request) {
            Err(e) if e.errno == fine => Ok(()),
            result => result,
        }
    }
}

fn set_of_link(link: &LinkImage, s: &LinkSysctl) -> std::io::Result<()> {
    sysctl::set(&sysctl::path_of(s.tree, &link.name, &s.name), &s.value, s.changed)
}

/// Returns how long they have left is no part of it: time goes on.
fn same_route(a: &Route, b: &Route) -> bool {
    let timeless = |r: &Route| Route { expires: None, ..r.clone() };
    timeless(a) == timeless(b)
}

fn family(v6: bool) -> u8 {
    if v6 { AF_INET6 } else { AF_INET }
}

/// Makes a neighbour known, whatever is known of it.
pub(super) fn neighbour_request(index: i32, n: &Neighbour) -> Request {
    let state = if n.permanent { NUD_PERMANENT } else { NUD_STALE };
    let mut fixed = [0; 12];
    fixed[0] = family(n.address.is_ipv6());
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&state.to_ne_bytes());
    let mut request = Request::new(rtnl::NEWNEIGH, CREATE | REPLACE, &fixed);
    request.attr(1, &octets(n.address)).attr(2, &n.mac);
    request
}

pub(super) fn address_request(kind: u16, flags: u16, index: i32, a: &Address) -> Request {
    let mut fixed = [family(a.local.is_ipv6()), a.prefix, 0, a.scope, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut request = Request::new(kind, flags, &fixed);
    request
        .attr(ifa::LOCAL, &octets(a.local))
        .attr(ifa::ADDRESS, &octets(a.peer.unwrap_or(a.local)));
    request.u32(ifa::FLAGS, a.flags);

    if let Some(broadcast) = a.broadcast {
        request.attr(ifa::BROADCAST, &broadcast.octets());
    }
    if let Some(label) = &a.label {
        request.string(ifa::LABEL, label);
    }

    if a.protocol != 0 {
        request.attr(ifa::PROTO, &[a.protocol]);
    }
    if let Some((preferred, valid)) = a.lifetime {
        let mut info = [0; 16];
        info[..4].copy_from_slice(&preferred.to_ne_bytes());
        info[4..8].copy_from_slice(&valid.to_ne_bytes());
        request.attr(ifa::CACHEINFO, &info);
    }

    request
}

pub(super) fn route_request(kind: u16, flags: u16, index: Option<i32>, r: &Route) -> Request {
    let src_len = r.source.map_or(0, |s| s.1);
    let table = u8::try_from(r.table).unwrap_or_default();
    let mut fixed =
        [family(r.v6), r.prefix, src_len, r.tos, table, r.protocol, r.scope, r.kind, 0, 0, 0, 0];
    fixed[8..12].copy_from_slice(&if r.onlink { RTNH_F_ONLINK } else { 0 }.to_ne_bytes());
    let mut request = Request::new(kind, flags, &fixed);
    request.u32(rta::TABLE, r.table);
    if let Some(destination) = r.destination {
        request.attr(rta::DST, &octets(destination));
    }

    if let Some((source, _)) = r.source {
        request.attr(rta::SRC, &octets(source));
    }
    if let Some(index) = index {
        request.u32(rta::OIF, index as u32);
    }

    match r.gateway {
        Some(IpAddr::V6(gateway)) if !r.v6 => {
            let mut via = (libc::AF_INET6 as u16).to_ne_bytes().to_vec();
            via.extend_from_slice(&gateway.octets());
            request.attr(rta::VIA, &via);
        }
        Some(gateway) => {
            request.attr(rta::GATEWAY, &octets(gateway));
        }
        None => {}
    }

    if let Some(prefsrc) = r.prefsrc {
        request.attr(rta::PREFSRC, &octets(prefsrc));
    }
    if r.priority != 0 {
        request.u32(rta::PRIORITY, r.priority);
    }

    if !r.metrics.is_empty() || r.congestion.is_some() {
        request.nest(rta::METRICS, |metrics| {
            for (kind, value) in &r.metrics {
                metrics.u32(*kind, *value);
            }
            if let Some(congestion) = &r.congestion {
                metrics.string(RTAX_CC_ALGO, congestion);
            }
        });
    }

    if let Some(preference) = r.preference {
        request.attr(rta::PREF, &[preference]);
    }
    if let Some(expires) = r.expires {
        request.u32(rta::EXPIRES, expires);
    }

    request
}
