//! Reading a container's network namespace into a [`NetworkImage`].
//!
//! What cannot be carried is refused here, with a word on what to do: a network that comes back
//! almost the same is worse than a container that stays where it is.

use std::fs;
use std::path::Path;

use super::fence;
use super::image::{
    Address, Kind, Link, LinkSysctl, Mac, Neighbour, NetworkImage, RULE_ATTRIBUTES, Route, Rule,
    Sysctl, VERSION,
};
use super::nft;
use super::problem::{Problem, Trying};
use super::qdisc;
use super::routed;
use super::rtnl::{self, AF_INET, AF_INET6, IFF_CARRIED, LinkInfo, Rtnl, ip_of};
use super::sysctl;
use crate::sys::netlink::{Message, Protocol, Socket};
use crate::sys::netns::NetNs;

/// `IFA_F_*` that the owner of an address sets; the others tell what the kernel found.
/// NODAD, OPTIMISTIC (0x04), HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN,
/// STABLE_PRIVACY.
const IFA_CARRIED: u32 = 0x02 | 0x04 | 0x10 | 0x100 | 0x200 | 0x400 | 0x800;
const IFA_TEMPORARY: u32 = 0x01;
const FOREVER: u32 = u32::MAX;

const NUD_PERMANENT: u16 = 0x80;
/// REACHABLE, STALE, DELAY, PROBE: an answer was heard.
const NUD_KNOWN: u16 = 0x02 | 0x04 | 0x08 | 0x10;

/// `RTN_*` that forwarding of multicast and the kernel itself make.
const RTN_LOCAL: u8 = 2;
const RTN_UNREACHABLE: u8 = 7;
const RTNH_F_ONLINK: u32 = 4;
const RTAX_CC_ALGO: u16 = 16;
/// `FIB_RULE_INVERT`, `FIB_RULE_FIND_SADDR`
const RULE_FLAGS: u32 = 0x2 | 0x1_0000;
/// `USER_HZ`, in which the kernel tells how long a route has left.
const CLOCK: i32 = 100;

/// Kinds of devices that loading a module puts into every namespace, unasked and down.
const UNASKED: [&str; 10] =
    ["ipip", "gre", "gretap", "erspan", "sit", "ip6tnl", "ip6gre", "vti", "vti6", "ip6erspan"];

/// Reads the namespace of a container that hangs on `host`.
pub fn capture(container: &NetNs, host: &NetNs) -> Result<NetworkImage, Problem> {
    capture_at(container, host, None)
}

/// The same; hints tell how to get into the namespace at `path`.
pub fn capture_at(
    container: &NetNs,
    host: &NetNs,
    path: Option<&Path>,
) -> Result<NetworkImage, Problem> {
    capture_forwarded(container, host, path, &[])
}

/// The same of a namespace whose address another host keeps: what the named links are there.
pub fn capture_forwarded(
    container: &NetNs,
    host: &NetNs,
    path: Option<&Path>,
    forwarded: &[(String, Kind)],
) -> Result<NetworkImage, Problem> {
    let trying = || "cannot read the container's network".to_owned();
    if container.identity().trying(trying)? == host.identity().trying(trying)? {
        return Err(Problem::new(
            "the container uses the host's network",
            "an address of the host does not go with one container",
        )
        .hint("give the container a network namespace of its own"));
    }
    refuse_filters(container, path)?;

    let mut inside = Rtnl::open(container).trying(trying)?;
    let mut infos = inside.links().trying(trying)?;
    infos.retain(|l| l.is_up() || !UNASKED.contains(&l.kind.as_str()));
    // The kernel gives loopback the first index; the image says so too.
    infos.sort_by_key(|l| (!l.is_loopback(), l.index));
    let names: Vec<String> = infos.iter().map(|l| l.name.clone()).collect();
    let (sysctls, of_links) = read_sysctls(container, &names)?;

    let surroundings = Surroundings::look(&mut inside, host)?;
    let addresses = inside.addresses().trying(trying)?;
    let qdiscs = inside.qdiscs().trying(trying)?;
    let mut links = Vec::new();
    for (info, sysctls) in infos.iter().zip(of_links) {
        links.push(Link {
            name: info.name.clone(),
            mac: info.mac.filter(|_| !info.is_loopback()),
            mtu: info.mtu,
            txqlen: info.txqlen,
            kind: match forwarded.iter().find(|(n, _)| *n == info.name && info.kind == "tun") {
                Some((_, kind)) => kind.clone(),
                None => surroundings.kind_of(info)?,
            },
            up: info.is_up(),
            flags: info.flags & IFF_CARRIED,
            addr_gen_mode: info.addr_gen_mode,
            addresses: addresses
                .iter()
                .filter(|m| index_at(m, 4) == Some(info.index))
                .filter_map(address)
                .collect(),
            sysctls,
            qdiscs: qdisc::capture(&mut inside, &qdiscs, info, path)?,
        });
    }

    let name_of = |index: i32| infos.iter().find(|l| l.index == index).map(|l| l.name.clone());
    let image = NetworkImage {
        version: VERSION,
        links,
        routes: routes(&mut inside, &name_of)?,
        rules: rules(&mut inside)?,
        neighbours: neighbours(&mut inside, &name_of)?,
        sysctls,
    };
    image
        .validate()
        .map_err(|p| Problem::new("the container's network cannot be carried", p.why))?;
    Ok(image)
}

/// Rules of a packet filter are state that nobody carries yet, and without them the container
/// would be open to what they kept out.
fn refuse_filters(container: &NetNs, path: Option<&Path>) -> Result<(), Problem> {
    let mut found = Vec::new();
    if let Ok(mut socket) = Socket::open_in(container, Protocol::Netfilter) {
        found.extend(filtering(&mut socket).unwrap_or_default());
    }
    let legacy = container.run(|| {
        ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"]
            .map(|f| fs::read_to_string(f).unwrap_or_default())
            .concat()
    });
    found.extend(legacy.unwrap_or_default().lines().map(str::to_owned));
    found.dedup();
    match found.is_empty() {
        true => Ok(()),
        false => Err(Problem::new(
            "the container's namespace has packet filter rules",
            format!("they are not carried (tables {})", found.join(", ")),
        )
        .hint(format!(
            "look at them with `{enter} nft list ruleset`, delete them with `{enter} nft flush \
             ruleset`, or let the host filter",
            enter = enter(path)
        ))),
    }
}

/// How a command is run in the namespace at a path.
pub(super) fn enter(path: Option<&Path>) -> String {
    let named =
        path.and_then(|p| p.strip_prefix("/run/netns").or(p.strip_prefix("/var/run/netns")).ok());
    match (named, path) {
        (Some(name), _) => format!("ip netns exec {}", name.display()),
        (None, Some(path)) => format!("nsenter --net={}", path.display()),
        (None, None) => "nsenter --net=NAMESPACE".into(),
    }
}

/// The tables that do something. iptables leaves empty ones behind, with chains that let
/// everything through: to come without them is to come the same.
fn filtering(socket: &mut Socket) -> crate::sys::netlink::Result<Vec<String>> {
    let tables = nft::tables(socket)?;
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let rules = nft::tables_with_rules(socket)?;
    let chains = nft::chains(socket)?;
    let drops = |(family, name): &(u8, String)| {
        let accepts = |c: &nft::Chain| c.policy.is_none_or(|p| p == nft::Policy::Accept as u32);
        chains.iter().any(|c| c.family == *family && c.table == *name && !accepts(c))
    };
    Ok(tables
        .into_iter()
        .filter(|t| t.1 != fence::TABLE && (rules.contains(t) || drops(t)))
        .map(|t| t.1)
        .collect())
}

fn read_sysctls(
    container: &NetNs,
    links: &[String],
) -> Result<(Vec<Sysctl>, Vec<Vec<LinkSysctl>>), Problem> {
    let trying = || "cannot read the namespace's kernel parameters".to_owned();
    let fresh = NetNs::fresh().and_then(|ns| ns.run(sysctl::read_all)).trying(trying)?;
    let all = container.run(sysctl::read_all).trying(trying)?;
    Ok(sysctl::sort_out(&all, &fresh, links))
}

/// The host's side of the container's links.
struct Surroundings<'a> {
    namespace: &'a NetNs,
    host: Vec<LinkInfo>,
    /// How the container's namespace calls the host's.
    id: Option<i32>,
}

impl<'a> Surroundings<'a> {
    fn look(inside: &mut Rtnl, host: &'a NetNs) -> Result<Self, Problem> {
        let trying = || "cannot read the host's links".to_owned();
        let links = Rtnl::open(host).and_then(|mut s| s.links()).trying(trying)?;
        Ok(Self { namespace: host, host: links, id: inside.id_of(host).trying(trying)? })
    }

    fn by_index(&self, index: i32) -> Option<&LinkInfo> {
        self.host.iter().find(|l| l.index == index)
    }

    fn kind_of(&self, link: &LinkInfo) -> Result<Kind, Problem> {
        let refuse = |why: String, hint: &str| {
            Err(Problem::new(format!("interface {} cannot be carried", link.name), why).hint(hint))
        };
        if link.is_loopback() {
            return Ok(Kind::Loopback);
        }
        if link.master.is_some() {
            return refuse(
                "it is a port of a bridge, bond or VRF inside the container".into(),
                "only plain macvlan and veth interfaces are carried",
            );
        }
        let outside = match (link.lower, link.lower_nsid) {
            (Some(index), Some(id)) if Some(id) == self.id => self.by_index(index),
            _ => None,
        };
        match (link.kind.as_str(), outside) {
            ("macvlan", Some(parent)) => Ok(Kind::Macvlan {
                mode: link.macvlan_mode.unwrap_or_default(),
                parent: parent.name.clone(),
            }),
            ("veth", Some(peer)) => {
                match peer.master.and_then(|m| self.by_index(m)).filter(|m| m.kind == "bridge") {
                    Some(bridge) => Ok(Kind::Veth {
                        host_ifname: peer.name.clone(),
                        host_mac: peer.mac.unwrap_or_default(),
                        bridge: bridge.name.clone(),
                    }),
                    None if peer.master.is_some() => refuse(
                        format!("its other end, {} on the host, is a port of no bridge", peer.name),
                        "put it on a bridge, or let the host route to it",
                    ),
                    None => match routed::capture_end(self.namespace, peer)? {
                        Some(end) => Ok(Kind::Routed { end: Box::new(end) }),
                        None => refuse(
                            format!(
                                "its other end, {} on the host, is on no bridge, and no route leads \
                                 to it",
                                peer.name
                            ),
                            "put it on a bridge (`ip link set … master …`), give the host a route \
                             to it, or attach the container by macvlan",
                        ),
                    },
                }
            }
            ("macvlan" | "veth", None) => refuse(
                format!("the other end of this {} is not on this host's network", link.kind),
                "attach the container directly to an interface or a bridge of the host",
            ),
            (kind, _) => refuse(
                match kind {
                    "" => "it is a physical or an unknown device".into(),
                    kind => format!("links of kind {kind} are not carried"),
                },
                "attach the container by macvlan, or by a veth on a bridge",
            ),
        }
    }
}

/// The interface index in a fixed header.
pub(super) fn index_at(m: &Message, at: usize) -> Option<i32> {
    m.payload.get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes)
}

/// From `struct ifaddrmsg`.
pub(super) fn address(m: &Message) -> Option<Address> {
    let &[family, prefix, flags, scope, ..] = m.payload.as_slice() else { return None };
    let a = m.attributes(8);
    let address = ip_of(&a, 1)?;
    let local = ip_of(&a, 2).unwrap_or(address);
    let flags = a.u32(8).unwrap_or(u32::from(flags));
    // Made anew, in their own time, by the kernel from the stable one.
    if family == AF_INET6 && flags & IFA_TEMPORARY != 0 {
        return None;
    }
    let times = a.get(6).filter(|v| v.len() >= 8);
    let lifetime = times.map(|v| {
        let at = |i: usize| u32::from_ne_bytes([v[i], v[i + 1], v[i + 2], v[i + 3]]);
        (at(0), at(4))
    });
    Some(Address {
        local,
        peer: Some(address).filter(|p| *p != local),
        prefix,
        broadcast: a.get(4).and_then(|v| <[u8; 4]>::try_from(v).ok()).map(Into::into),
        label: a.string(3),
        scope,
        flags: flags & IFA_CARRIED,
        protocol: a.get(11).and_then(|v| v.first().copied()).unwrap_or_default(),
        lifetime: lifetime.filter(|l| *l != (FOREVER, FOREVER)),
    })
}

/// All routes worth carrying; an error for those that cannot be.
pub(super) fn routes(
    socket: &mut Rtnl,
    name_of: &dyn Fn(i32) -> Option<String>,
) -> Result<Vec<Route>, Problem> {
    let mut routes = Vec::new();
    for family in [AF_INET, AF_INET6] {
        for message in socket.routes(family).trying(|| "cannot read the routes".into())? {
            routes.extend(route(&message, name_of)?);
        }
    }
    Ok(routes)
}

/// From `struct rtmsg`.
pub(super) fn route(
    m: &Message,
    name_of: &dyn Fn(i32) -> Option<String>,
) -> Result<Option<Route>, Problem> {
    let &[family, prefix, src_len, tos, table, protocol, scope, kind, ..] = m.payload.as_slice()
    else {
        return Ok(None);
    };
    let a = m.attributes(12);
    let table = a.u32(15).unwrap_or(u32::from(table));
    let v6 = match family {
        AF_INET => false,
        AF_INET6 => true,
        _ => return Ok(None),
    };
    let index = a.u32(4).map(|i| i as i32);
    let link = index.and_then(name_of);
    // `local` is the kernel's; so are the hidden unreachable routes of IPv6, which have no table
    // or hang on loopback; devices that are left out take their routes along.
    let automatic = kind == RTN_UNREACHABLE && protocol == 2;
    if table == rtnl::TABLE_LOCAL || kind == RTN_LOCAL || table == 0 || automatic {
        return Ok(None);
    }
    if index.is_some() && link.is_none() {
        return Ok(None);
    }
    let destination = ip_of(&a, 1);
    for (attribute, what) in [
        (9, "several next hops"),
        (22, "an encapsulation"),
        (30, "a next-hop object"),
        (19, "a new destination"),
    ] {
        if a.get(attribute).is_some() {
            let to = destination.map_or("default".into(), |d| format!("{d}/{prefix}"));
            return Err(Problem::new(
                format!("the route {to} in table {table} cannot be carried"),
                format!("it has {what}"),
            )
            .hint("give the container plain routes, or remove this one before migrating"));
        }
    }
    // RTA_VIA: a family, then the address.
    let via = a.get(18).and_then(|v| v.get(2..)).and_then(rtnl::ip);
    let metrics = a.nest(8);
    let flags = m.payload.get(8..12).map_or(0, |f| u32::from_ne_bytes([f[0], f[1], f[2], f[3]]));
    let expires =
        a.get(12).and_then(|v| v.get(8..12)).map(|v| i32::from_ne_bytes([v[0], v[1], v[2], v[3]]));
    Ok(Some(Route {
        v6,
        destination,
        prefix,
        source: ip_of(&a, 2).filter(|_| src_len > 0).map(|s| (s, src_len)),
        // IPv6 tells `lo` for routes that lead nowhere, and takes them back without it.
        link: link.filter(|l| !(v6 && l == "lo" && kind >= 6)),
        gateway: ip_of(&a, 5).or(via),
        prefsrc: ip_of(&a, 7),
        table,
        priority: a.u32(6).unwrap_or_default(),
        protocol,
        scope,
        kind,
        tos,
        onlink: flags & RTNH_F_ONLINK != 0,
        metrics: metrics
            .iter()
            .filter(|(k, _)| *k != RTAX_CC_ALGO)
            .filter_map(|(k, v)| Some((k, u32::from_ne_bytes(v.try_into().ok()?))))
            .collect(),
        congestion: metrics.string(RTAX_CC_ALGO),
        preference: a.get(20).and_then(|v| v.first().copied()),
        expires: expires.filter(|t| v6 && *t > 0).map(|t| (t / CLOCK).max(1).unsigned_abs()),
    }))
}

/// All rules of both families.
pub(super) fn rules(socket: &mut Rtnl) -> Result<Vec<Rule>, Problem> {
    let mut rules = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let list = socket.rules(family).trying(|| "cannot read the policy rules".into())?;
        rules.extend(list.iter().filter_map(|m| {
            let mut attributes: Vec<(u16, Vec<u8>)> = m
                .attributes(12)
                .iter()
                .filter(|(k, _)| RULE_ATTRIBUTES.contains(k))
                .map(|(k, v)| (k, v.to_vec()))
                .collect();
            attributes.sort();
            let mut header: [u8; 12] = m.payload.get(..12)?.try_into().ok()?;
            // Whether the devices of a rule exist is found out anew.
            let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
            header[8..].copy_from_slice(&(flags & RULE_FLAGS).to_ne_bytes());
            Some(Rule { header, attributes })
        }));
    }
    Ok(rules)
}

fn neighbours(
    socket: &mut Rtnl,
    name_of: &dyn Fn(i32) -> Option<String>,
) -> Result<Vec<Neighbour>, Problem> {
    let mut neighbours = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let list = socket.neighbours(family).trying(|| "cannot read the neighbours".into())?;
        neighbours.extend(list.iter().filter_map(|m| {
            let state = m.payload.get(8..10).map(|s| u16::from_ne_bytes([s[0], s[1]]))?;
            if state & (NUD_PERMANENT | NUD_KNOWN) == 0 {
                return None;
            }
            let a = m.attributes(12);
            Some(Neighbour {
                link: name_of(index_at(m, 4)?)?,
                address: ip_of(&a, 1)?,
                mac: Mac::try_from(a.get(2)?).ok()?,
                permanent: state & NUD_PERMANENT != 0,
            })
        }));
    }
    Ok(neighbours)
}
