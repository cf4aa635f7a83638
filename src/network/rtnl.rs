//! Reading links, addresses, routes, rules and neighbours by rtnetlink.
//!
//! The numbers are those of linux/rtnetlink.h, if_link.h, if_addr.h, fib_rules.h and neighbour.h;
//! see [rtnetlink(7)](https://man7.org/linux/man-pages/man7/rtnetlink.7.html).

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use crate::sys::netlink::{
    Attributes, Mac, NetlinkMessage, NetlinkSocket, Protocol, Request, Result,
};
use crate::sys::netns::NetNs;

pub(super) const NEWLINK: u16 = 16;
pub(super) const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
pub(super) const NEWADDR: u16 = 20;
pub(super) const DELADDR: u16 = 21;
const GETADDR: u16 = 22;
pub(super) const NEWROUTE: u16 = 24;
pub(super) const DELROUTE: u16 = 25;
const GETROUTE: u16 = 26;
pub(super) const NEWNEIGH: u16 = 28;
pub(super) const DELNEIGH: u16 = 29;
const GETNEIGH: u16 = 30;
pub(super) const NEWRULE: u16 = 32;
pub(super) const DELRULE: u16 = 33;
const GETRULE: u16 = 34;
pub(super) const NEWQDISC: u16 = 36;
pub(super) const DELQDISC: u16 = 37;
const GETQDISC: u16 = 38;
const GETTFILTER: u16 = 46;
const GETNSID: u16 = 90;

pub(super) const TCA_KIND: u16 = 1;
pub(super) const TCA_OPTIONS: u16 = 2;

pub(super) const IFF_UP: u32 = 0x1;
pub(super) const IFF_LOOPBACK: u32 = 0x8;
pub(super) const IFF_LOWER_UP: u32 = 0x1_0000;
/// Set by the owner of the link rather than found by the kernel: NOARP, ALLMULTI, MULTICAST,
/// DYNAMIC.
pub(super) const IFF_CARRIED: u32 = 0x80 | 0x200 | 0x1000 | 0x8000;

pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFLA_MTU: u16 = 4;
pub(super) const IFLA_LINK: u16 = 5;
pub(super) const IFLA_MASTER: u16 = 10;
pub(super) const IFLA_TXQLEN: u16 = 13;
pub(super) const IFLA_LINKINFO: u16 = 18;
pub(super) const IFLA_AF_SPEC: u16 = 26;
pub(super) const IFLA_NET_NS_FD: u16 = 28;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINK_NETNSID: u16 = 37;
pub(super) const INET6_ADDR_GEN_MODE: u16 = 8;

/// `RT_TABLE_LOCAL`
pub(super) const TABLE_LOCAL: u32 = 255;
const RTM_F_CLONED: u32 = 0x200;

pub(super) const AF_INET: u8 = libc::AF_INET as u8;
pub(super) const AF_INET6: u8 = libc::AF_INET6 as u8;

/// A link as the kernel lists it.
#[derive(Debug, Clone)]
pub(super) struct LinkInfo {
    pub index: i32,
    pub flags: u32,
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub txqlen: u32,
    pub master: Option<i32>,
    /// Index of the lower device or of the other end, and the id of its namespace as seen from
    /// here (`None`: the same namespace).
    pub lower: Option<i32>,
    pub lower_nsid: Option<i32>,
    pub operstate: u8,
    pub kind: String,
    pub macvlan_mode: Option<u32>,
    pub addr_gen_mode: Option<u8>,
    /// Of a bridge's port, `BR_STATE_*`.
    pub port_state: Option<u8>,
}

impl LinkInfo {
    pub fn is_loopback(&self) -> bool {
        self.flags & IFF_LOOPBACK != 0
    }

    pub fn is_up(&self) -> bool {
        self.flags & IFF_UP != 0
    }

    /// Frames sent now will get out: `IF_OPER_UP`, or a driver that does not say.
    pub fn is_running(&self) -> bool {
        self.flags & IFF_LOWER_UP != 0 && matches!(self.operstate, 0 | 6)
    }

    pub fn read(m: &NetlinkMessage) -> Option<Self> {
        let a = m.attributes(16);
        let info = a.nest(IFLA_LINKINFO);
        let kind = info.string(1).unwrap_or_default();
        let inet6 = a.nest(IFLA_AF_SPEC).nest(u16::from(AF_INET6));
        Some(Self {
            index: i32::from_ne_bytes(m.payload.get(4..8)?.try_into().ok()?),
            flags: u32::from_ne_bytes(m.payload.get(8..12)?.try_into().ok()?),
            name: a.string(IFLA_IFNAME)?,
            mac: a.get(IFLA_ADDRESS).and_then(|v| v.try_into().ok()),
            mtu: a.u32(IFLA_MTU)?,
            txqlen: a.u32(IFLA_TXQLEN).unwrap_or_default(),
            master: a.u32(IFLA_MASTER).map(|v| v as i32),
            lower: a.u32(IFLA_LINK).map(|v| v as i32),
            lower_nsid: a.u32(IFLA_LINK_NETNSID).map(|v| v as i32),
            operstate: a.get(IFLA_OPERSTATE).and_then(|v| v.first().copied()).unwrap_or_default(),
            macvlan_mode: (kind == "macvlan").then(|| info.nest(2).u32(1)).flatten(),
            kind,
            port_state: info.nest(5).get(1).and_then(|v| v.first().copied()),
            addr_gen_mode: inet6.get(INET6_ADDR_GEN_MODE).and_then(|v| v.first().copied()),
        })
    }
}

/// An rtnetlink socket of one namespace.
#[derive(Debug)]
pub(super) struct Rtnl(NetlinkSocket);

impl Rtnl {
    pub fn open(namespace: &NetNs) -> Result<Self> {
        NetlinkSocket::open_in(namespace, Protocol::Route).map(Self)
    }

    pub fn change(&mut self, request: &Request) -> Result<()> {
        self.0.change(request)
    }

    pub fn links(&mut self) -> Result<Vec<LinkInfo>> {
        let list = self.0.dump(GETLINK, &[0; 16])?;
        Ok(list.iter().filter_map(LinkInfo::read).collect())
    }

    pub fn link(&mut self, name: &str) -> Result<Option<LinkInfo>> {
        Ok(self.links()?.into_iter().find(|l| l.name == name))
    }

    /// `struct ifaddrmsg` with its attributes, both families.
    pub fn addresses(&mut self) -> Result<Vec<NetlinkMessage>> {
        self.0.dump(GETADDR, &[0; 8])
    }

    /// `struct rtmsg` with its attributes; clones of the IPv6 cache are left out.
    pub fn routes(&mut self, family: u8) -> Result<Vec<NetlinkMessage>> {
        let mut fixed = [0; 12];
        fixed[0] = family;
        let mut list = self.0.dump(GETROUTE, &fixed)?;
        list.retain(|m| {
            m.payload
                .get(8..12)
                .is_some_and(|f| u32::from_ne_bytes([f[0], f[1], f[2], f[3]]) & RTM_F_CLONED == 0)
        });
        Ok(list)
    }

    /// `struct fib_rule_hdr` with its attributes.
    pub fn rules(&mut self, family: u8) -> Result<Vec<NetlinkMessage>> {
        let mut fixed = [0; 12];
        fixed[0] = family;
        self.0.dump(GETRULE, &fixed)
    }

    /// `struct tcmsg` with its attributes: queueing disciplines of all links.
    pub fn qdiscs(&mut self) -> Result<Vec<NetlinkMessage>> {
        self.0.dump(GETQDISC, &tcmsg(0, 0, 0, 0))
    }

    /// The same: filters of one link, below a discipline or one of its classes.
    pub fn filters(&mut self, index: i32, parent: u32) -> Result<Vec<NetlinkMessage>> {
        self.0.dump(GETTFILTER, &tcmsg(index, 0, parent, 0))
    }

    /// `struct ndmsg` with its attributes.
    pub fn neighbours(&mut self, family: u8) -> Result<Vec<NetlinkMessage>> {
        let mut fixed = [0; 12];
        fixed[0] = family;
        self.0.dump(GETNEIGH, &fixed)
    }

    /// `struct ndmsg` with its attributes, of the addresses that are answered for by proxy.
    pub fn proxies(&mut self, family: u8) -> Result<Vec<NetlinkMessage>> {
        const NTF_PROXY: u8 = 0x08;
        let mut fixed = [0; 12];
        fixed[0] = family;
        fixed[10] = NTF_PROXY;
        self.0.dump(GETNEIGH, &fixed)
    }

    /// The number by which this socket's namespace knows the other one, if it does.
    pub fn id_of(&mut self, other: &NetNs) -> Result<Option<i32>> {
        let mut request = Request::new(GETNSID, 0, &[0; 4]);
        request.u32(3, other.as_fd().as_raw_fd() as u32);
        let told = self.0.query(&request)?;
        let id = told.first().and_then(|m| m.attributes(4).u32(1)).map(|v| v as i32);
        Ok(id.filter(|id| *id >= 0))
    }
}

/// An address of either family, from the bytes of an attribute.
pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Attributes of an address: `IFA_*` of linux/if_addr.h.
pub(super) mod ifa {
    pub const ADDRESS: u16 = 1;
    pub const LOCAL: u16 = 2;
    pub const LABEL: u16 = 3;
    pub const BROADCAST: u16 = 4;
    pub const CACHEINFO: u16 = 6;
    pub const FLAGS: u16 = 8;
    pub const PROTO: u16 = 11;
}

/// Attributes of a route: `RTA_*` of linux/rtnetlink.h.
pub(super) mod rta {
    pub const DST: u16 = 1;
    pub const SRC: u16 = 2;
    pub const OIF: u16 = 4;
    pub const GATEWAY: u16 = 5;
    pub const PRIORITY: u16 = 6;
    pub const PREFSRC: u16 = 7;
    pub const METRICS: u16 = 8;
    pub const MULTIPATH: u16 = 9;
    pub const CACHEINFO: u16 = 12;
    pub const TABLE: u16 = 15;
    pub const VIA: u16 = 18;
    pub const NEWDST: u16 = 19;
    pub const PREF: u16 = 20;
    pub const ENCAP: u16 = 22;
    pub const EXPIRES: u16 = 23;
    pub const NH_ID: u16 = 30;
}

/// A route's congestion control among its metrics: the others are numbers.
pub(super) const RTAX_CC_ALGO: u16 = 16;

/// The gateway is on the link, whatever the routes say.
pub(super) const RTNH_F_ONLINK: u32 = 4;

/// An address attribute.
pub(super) fn ip_of(attributes: &Attributes<'_>, kind: u16) -> Option<IpAddr> {
    attributes.get(kind).and_then(ip)
}

/// The bytes of an address in network order.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// `struct ifinfomsg`
pub(super) fn ifinfo(index: i32, flags: u32, change: u32) -> [u8; 16] {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&change.to_ne_bytes());
    fixed
}

/// `struct tcmsg` of linux/rtnetlink.h.
pub(super) fn tcmsg(ifindex: i32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut fixed = [0; 20];
    fixed[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    fixed[8..12].copy_from_slice(&handle.to_ne_bytes());
    fixed[12..16].copy_from_slice(&parent.to_ne_bytes());
    fixed[16..20].copy_from_slice(&info.to_ne_bytes());
    fixed
}

/// The interface index in a fixed header.
pub(super) fn index_at(m: &NetlinkMessage, at: usize) -> Option<i32> {
    m.payload.get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes)
}

/// Returns how a command is run in the namespace at a path.
pub(super) fn enter(path: Option<&Path>) -> String {
    let named =
        path.and_then(|p| p.strip_prefix("/run/netns").or(p.strip_prefix("/var/run/netns")).ok());
    match (named, path) {
        (Some(name), _) => format!("ip netns exec {}", name.display()),
        (None, Some(path)) => format!("nsenter --net={}", path.display()),
        (None, None) => "nsenter --net=NAMESPACE".into(),
    }
}
