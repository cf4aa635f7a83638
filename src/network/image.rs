//! What a container's network namespace holds, as it goes over the wire.
//!
//! The destination takes nothing of it on trust: [`NetworkImage::validate`] bounds every list,
//! and keeps names from becoming paths.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::qdisc::{self, Qdisc};
use super::sysctl;
use crate::problem::Problem;
use crate::sys::netlink::Mac;

/// Version of this format.
pub const VERSION: u32 = 1;
/// Links of one namespace; CRIU's own users have a handful.
pub const MAX_LINKS: usize = 64;
/// Addresses of one link.
pub const MAX_ADDRESSES: usize = 1024;
/// Routes of the namespace.
pub const MAX_ROUTES: usize = 4096;
/// Policy rules of the namespace.
pub const MAX_RULES: usize = 1024;
/// Neighbours of the namespace.
pub const MAX_NEIGHBOURS: usize = 4096;
/// Kernel parameters of the namespace, and again of each link.
pub const MAX_SYSCTLS: usize = 1024;
/// Length of a kernel parameter's value: `ip_local_reserved_ports` is the longest.
pub const MAX_SYSCTL_VALUE: usize = 4096;
/// Metrics of a route, attributes of a rule.
pub const MAX_ATTRIBUTES: usize = 32;
/// Length of a rule's attribute.
pub const MAX_ATTRIBUTE: usize = 64;
/// Bytes in an interface's name, without the zero that ends it in the kernel.
pub const MAX_IFNAME: usize = 15;
/// MTU of an interface, bytes: what IPv4 needs at least, and what a header can tell at most.
pub const MTU: std::ops::RangeInclusive<u32> = 68..=65_536;
/// Devices of one namespace may queue this many frames, `txqueuelen`.
pub const MAX_TXQLEN: u32 = 1_000_000;

/// Everything that is made again on the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkImage {
    /// [`VERSION`]
    pub version: u32,
    /// All links, loopback first.
    pub links: Vec<LinkImage>,
    /// Routes of all tables but `local`, which the kernel fills by itself.
    pub routes: Vec<Route>,
    /// All policy rules, the kernel's own too: they can be deleted.
    pub rules: Vec<Rule>,
    /// Neighbours: permanent ones, and what was known of the others.
    pub neighbours: Vec<Neighbour>,
    /// Parameters below `/proc/sys/net` that are not of one link.
    pub sysctls: Vec<Sysctl>,
}

/// One network interface of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkImage {
    /// As the container sees it.
    pub name: String,
    /// `None` for loopback.
    pub mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    /// Frames.
    pub txqlen: u32,
    /// What it is, and what it hangs on.
    pub kind: LinkKind,
    /// `IFF_UP`
    pub up: bool,
    /// `IFF_NOARP`, `IFF_ALLMULTI`, `IFF_MULTICAST`, `IFF_DYNAMIC` as in netdevice(7).
    pub flags: u32,
    /// `IN6_ADDR_GEN_MODE_*`; `None` without IPv6.
    pub addr_gen_mode: Option<u8>,
    /// In the kernel's order: the first of a network is the primary one.
    pub addresses: Vec<Address>,
    /// Parameters of this link.
    pub sysctls: Vec<LinkSysctl>,
    /// What somebody has put in the way of what goes out, tc(8); parents first.
    pub qdiscs: Vec<Qdisc>,
}

/// Kinds of links that can be carried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// The namespace's `lo`.
    Loopback,
    /// An address of its own on the host's interface.
    Macvlan {
        /// `MACVLAN_MODE_*` of linux/if_link.h: private 1, VEPA 2, bridge 4.
        mode: u32,
        /// The host's interface.
        parent: String,
    },
    /// A cable to a bridge on the host.
    Veth {
        /// The other end's name on the host.
        host_ifname: String,
        /// The other end's hardware address.
        host_mac: Mac,
        /// The bridge that the other end is a port of.
        bridge: String,
    },
    /// A cable to the host itself, which routes what comes for the container.
    Routed {
        /// The host's end.
        end: Box<HostEnd>,
    },
}

/// An address of a link, as in `struct ifaddrmsg`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address itself.
    pub local: IpAddr,
    /// The other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// Length of the network's prefix, bits.
    pub prefix: u8,
    /// IPv4 only.
    pub broadcast: Option<std::net::Ipv4Addr>,
    /// IPv4 only: `eth0:1`.
    pub label: Option<String>,
    /// `RT_SCOPE_*`
    pub scope: u8,
    /// `IFA_F_*` as the owner set them (not those that the kernel computes).
    pub flags: u32,
    /// `IFAPROT_*`: who made it.
    pub protocol: u8,
    /// Seconds it is preferred and valid; `None` for ever.
    pub lifetime: Option<(u32, u32)>,
}

impl Address {
    /// One for ever, with nothing more to it.
    pub fn plain(local: IpAddr, prefix: u8) -> Address {
        Address {
            local,
            peer: None,
            prefix,
            broadcast: None,
            label: None,
            scope: 0,
            flags: 0,
            protocol: 0,
            lifetime: None,
        }
    }
}

/// A route, as in `struct rtmsg`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// Destination; `None` is the default route.
    pub destination: Option<IpAddr>,
    /// Its prefix, bits.
    pub prefix: u8,
    /// IPv6 source routing: network and prefix.
    pub source: Option<(IpAddr, u8)>,
    /// Name of the link; `None` for `unreachable` and the like.
    pub link: Option<String>,
    /// Next hop; may be IPv6 for an IPv4 route.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub prefsrc: Option<IpAddr>,
    /// Table; never `local`.
    pub table: u32,
    /// `metric` of ip-route(8).
    pub priority: u32,
    /// `RTPROT_*`
    pub protocol: u8,
    /// `RT_SCOPE_*`
    pub scope: u8,
    /// `RTN_*`
    pub kind: u8,
    /// Type of service.
    pub tos: u8,
    /// `RTNH_F_ONLINK` only.
    pub onlink: bool,
    /// `RTAX_*` with its value.
    pub metrics: Vec<(u16, u32)>,
    /// Congestion control of this route.
    pub congestion: Option<String>,
    /// Router preference of IPv6, `ICMPV6_ROUTER_PREF_*`.
    pub preference: Option<u8>,
    /// Seconds until it goes.
    pub expires: Option<u32>,
}

/// A policy rule in the kernel's own words; only attributes of [`RULE_ATTRIBUTES`] are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// `struct fib_rule_hdr`
    pub header: [u8; 12],
    /// `FRA_*` with its value, in ascending order.
    pub attributes: Vec<(u16, Vec<u8>)>,
}

/// `FRA_*` of linux/fib_rules.h that can be told to another kernel; the rest (`FRA_PAD`,
/// `FRA_UNUSED*`, `FRA_TUN_ID` of tunnels that are not carried) are not.
pub const RULE_ATTRIBUTES: [u16; 18] =
    [1, 2, 3, 4, 6, 10, 11, 13, 14, 15, 16, 17, 19, 20, 21, 22, 23, 24];

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Name of the link.
    pub link: String,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
    /// Set by hand. Others are made again as stale: the first answer need not wait for ARP, and
    /// the kernel asks whether they are still right.
    pub permanent: bool,
}

/// A parameter below `/proc/sys/net`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// `ipv4/ip_local_port_range`
    pub path: String,
    /// Without the newline.
    pub value: String,
    /// It was changed by somebody, so it must be set; the others may be unknown to the other kernel.
    pub changed: bool,
}

/// Directories of parameters that each link has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ParameterTree {
    /// `ipv4/conf`
    Ipv4Conf,
    /// `ipv6/conf`
    Ipv6Conf,
    /// `ipv4/neigh`
    Ipv4Neigh,
    /// `ipv6/neigh`
    Ipv6Neigh,
}

impl ParameterTree {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ipv4Conf, Self::Ipv6Conf, Self::Ipv4Neigh, Self::Ipv6Neigh];

    /// Below `/proc/sys/net`.
    pub fn path(self) -> &'static str {
        match self {
            Self::Ipv4Conf => "ipv4/conf",
            Self::Ipv6Conf => "ipv6/conf",
            Self::Ipv4Neigh => "ipv4/neigh",
            Self::Ipv6Neigh => "ipv6/neigh",
        }
    }
}

/// A parameter of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkSysctl {
    /// Directory of parameters.
    pub tree: ParameterTree,
    /// `rp_filter`
    pub name: String,
    /// Without the newline.
    pub value: String,
    /// As in [`Sysctl`].
    pub changed: bool,
}

impl NetworkImage {
    /// Links that can lead out of the container: all but loopback, with their place in
    /// [`NetworkImage::links`].
    pub fn outward(&self) -> impl Iterator<Item = (usize, &LinkImage)> {
        self.links.iter().enumerate().filter(|(_, l)| l.kind != LinkKind::Loopback)
    }

    /// Links that the host routes to, each with its other end.
    pub fn routed(&self) -> impl Iterator<Item = (&LinkImage, &HostEnd)> {
        self.links.iter().filter_map(|link| match &link.kind {
            LinkKind::Routed { end } => Some((link, &**end)),
            _ => None,
        })
    }

    /// Refuses what no honest peer sends. To be called on everything that came over the wire.
    pub fn validate(&self) -> Result<(), Problem> {
        self.check().map_err(|why| {
            Problem::new("the network image is not valid", why)
                .hint("the other side is broken or of another version of Ferry")
        })
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("its version is {}, this Ferry knows {VERSION}", self.version));
        }
        bounded("links", self.links.len(), MAX_LINKS)?;
        bounded("routes", self.routes.len(), MAX_ROUTES)?;
        bounded("rules", self.rules.len(), MAX_RULES)?;
        bounded("neighbours", self.neighbours.len(), MAX_NEIGHBOURS)?;
        bounded("sysctls", self.sysctls.len(), MAX_SYSCTLS)?;
        for (i, link) in self.links.iter().enumerate() {
            link.check()?;
            if self.links[..i].iter().any(|l| l.name == link.name) {
                return Err(format!("two links are called {}", link.name));
            }
        }

        let known = |name: &str| {
            if self.links.iter().any(|l| l.name == name) {
                Ok(())
            } else {
                Err(format!("no link is called {name:?}"))
            }
        };

        for route in &self.routes {
            route.link.as_deref().map_or(Ok(()), known)?;
            route.check()?;
        }
        for rule in &self.rules {
            bounded("attributes of a rule", rule.attributes.len(), MAX_ATTRIBUTES)?;
            for (kind, value) in &rule.attributes {
                bounded("bytes in a rule's attribute", value.len(), MAX_ATTRIBUTE)?;
                if !RULE_ATTRIBUTES.contains(kind) {
                    return Err(format!("attribute {kind} of a rule is not known"));
                }
            }
        }

        self.neighbours.iter().try_for_each(|n| known(&n.link))?;
        for sysctl in &self.sysctls {
            let mut parts = sysctl.path.split('/');
            if !parts.next().is_some_and(|top| sysctl::OF_NAMESPACE.contains(&top)) {
                return Err(format!("{:?} is no parameter of a namespace", sysctl.path));
            }
            parts.try_for_each(sysctl_name)?;
            sysctl_value(&sysctl.value)?;
        }

        Ok(())
    }
}

impl LinkImage {
    fn check(&self) -> Result<(), String> {
        ifname(&self.name)?;
        match &self.kind {
            LinkKind::Loopback if self.name == "lo" => {}
            LinkKind::Loopback => return Err(format!("loopback is called {:?}", self.name)),
            LinkKind::Macvlan { mode, parent } => {
                ifname(parent)?;
                if ![1, 2, 4].contains(mode) {
                    return Err(format!("macvlan mode {mode} cannot be carried"));
                }
            }
            LinkKind::Veth { host_ifname, bridge, .. } => {
                ifname(host_ifname)?;
                ifname(bridge)?;
            }
            LinkKind::Routed { end } => {
                end.check()?;
                let other = end.as_link(&end.name, self.mtu);
                other.check_values()?;
            }
        }
        self.check_values()
    }

    /// Returns what it has, of whatever kind it is.
    fn check_values(&self) -> Result<(), String> {
        if self.name != "lo" {
            match self.mac {
                Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => {}
                mac => return Err(format!("{mac:?} is no hardware address of {}", self.name)),
            }
        }
        if !MTU.contains(&self.mtu) {
            return Err(format!("an MTU of {} on {}", self.mtu, self.name));
        }
        bounded("frames in a queue", self.txqlen as usize, MAX_TXQLEN as usize)?;
        bounded("addresses of a link", self.addresses.len(), MAX_ADDRESSES)?;
        bounded("sysctls of a link", self.sysctls.len(), MAX_SYSCTLS)?;
        for address in &self.addresses {
            address.check()?;
        }
        for sysctl in &self.sysctls {
            sysctl_name(&sysctl.name)?;
            sysctl_value(&sysctl.value)?;
        }
        qdisc::check(&self.qdiscs).map_err(|why| format!("{why} on {}", self.name))
    }
}

impl Address {
    pub(super) fn check(&self) -> Result<(), String> {
        prefix(self.local, self.prefix)?;
        if self.peer.is_some_and(|p| p.is_ipv4() != self.local.is_ipv4()) {
            return Err(format!("the peer of {} is of another family", self.local));
        }
        match self.label.as_deref().map(|l| l.split_once(':').unwrap_or((l, "0"))) {
            Some((name, alias)) => ifname(name).and_then(|()| ifname(alias)),
            None => Ok(()),
        }
    }
}

impl Route {
    pub(super) fn check(&self) -> Result<(), String> {
        let family = |a: IpAddr| {
            if a.is_ipv6() == self.v6 {
                Ok(())
            } else {
                Err(format!("{a} in a route of the other family"))
            }
        };

        if let Some(destination) = self.destination {
            family(destination)?;
            prefix(destination, self.prefix)?;
        } else if self.prefix != 0 {
            return Err("a route without destination has a prefix".into());
        }

        if let Some((source, bits)) = self.source {
            family(source)?;
            prefix(source, bits)?;
        }
        self.prefsrc.map_or(Ok(()), family)?;
        if self.v6 {
            self.gateway.map_or(Ok(()), family)?;
        }

        if self.table == 0 || self.table == crate::network::rtnl::TABLE_LOCAL {
            return Err(format!("a route in table {}", self.table));
        }
        bounded("metrics of a route", self.metrics.len(), MAX_ATTRIBUTES)?;

        self.congestion.as_deref().map_or(Ok(()), sysctl_name)
    }
}

fn bounded(what: &str, count: usize, most: usize) -> Result<(), String> {
    if count <= most { Ok(()) } else { Err(format!("{count} {what}, more than {most}")) }
}

pub(super) fn prefix(address: IpAddr, bits: u8) -> Result<(), String> {
    if bits <= if address.is_ipv4() { 32 } else { 128 } {
        Ok(())
    } else {
        Err(format!("{address} has a prefix of {bits} bits"))
    }
}

/// The kernel's own rule (`dev_valid_name`), and no `%`, which would ask it to choose a number.
pub(crate) fn ifname(name: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_graphic() && !b"/:%".contains(&b);
    let length = (1..=MAX_IFNAME).contains(&name.len());
    if length && name.bytes().all(good) && name != "." && name != ".." {
        Ok(())
    } else {
        Err(format!("{name:?} is no name of an interface"))
    }
}

fn sysctl_name(name: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if !name.is_empty() && name.len() <= 64 && name.bytes().all(good) {
        Ok(())
    } else {
        Err(format!("{name:?} is no name of a kernel parameter"))
    }
}

fn sysctl_value(value: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_graphic() || b == b' ' || b == b'\t';
    if value.len() <= MAX_SYSCTL_VALUE && value.bytes().all(good) {
        Ok(())
    } else {
        Err("the value of a kernel parameter is too long or not text".into())
    }
}

/// The host's end of a routed veth, and what leads to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEnd {
    /// Its name on the host.
    pub name: String,
    /// Its hardware address: the container knows its gateway by it.
    pub mac: Mac,
    /// Frames, `txqueuelen`.
    pub txqlen: u32,
    /// As in [`LinkImage::flags`].
    pub flags: u32,
    /// As in [`LinkImage::addr_gen_mode`].
    pub addr_gen_mode: Option<u8>,
    /// The gateway's, often none.
    pub addresses: Vec<Address>,
    /// Parameters of this link: `proxy_arp`, `forwarding` …
    pub sysctls: Vec<LinkSysctl>,
    /// The host's routes to the container.
    pub routes: Vec<Route>,
    /// Addresses that the host answers for on other links.
    pub proxies: Vec<Proxy>,
}

/// `ip neigh add proxy ADDRESS dev LINK`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxy {
    /// Address.
    pub address: IpAddr,
    /// On which of the host's links.
    pub link: String,
}

impl HostEnd {
    /// Refuses what no honest peer sends.
    pub(super) fn check(&self) -> Result<(), String> {
        ifname(&self.name)?;
        if self.routes.len() > MAX_ROUTES || self.proxies.len() > MAX_ROUTES {
            return Err(format!("too many routes to {}", self.name));
        }
        self.proxies.iter().try_for_each(|p| ifname(&p.link))?;
        self.routes.iter().try_for_each(|r| {
            if r.link.as_deref() == Some(&self.name) {
                r.check()
            } else {
                Err(format!("a route over {:?} as one to {}", r.link, self.name))
            }
        })
    }

    /// As a link to be filled; its kind plays no part in that.
    pub(super) fn as_link(&self, name: &str, mtu: u32) -> LinkImage {
        LinkImage {
            name: name.to_owned(),
            mac: Some(self.mac),
            mtu,
            txqlen: self.txqlen,
            kind: LinkKind::Loopback,
            up: true,
            flags: self.flags,
            addr_gen_mode: self.addr_gen_mode,
            addresses: self.addresses.clone(),
            sysctls: self.sysctls.clone(),
            // What limits it there is the host's.
            qdiscs: Vec::new(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
