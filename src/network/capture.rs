//! Reading a container's network namespace into a [`NetworkImage`].
//!
//! What cannot be carried is refused here, with a word on what to do: a network that comes back
//! almost the same is worse than a container that stays where it is.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use super::image::{LinkImage, LinkKind, LinkSysctl, Neighbour, NetworkImage, Sysctl, VERSION};
use super::read::{address, routes, rules};
use super::rtnl::{AF_INET, AF_INET6, IFF_CARRIED, LinkInfo, Rtnl, enter, index_at, ip_of};
use super::{fence, nft, qdisc, routed, sysctl};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{Mac, NetlinkSocket, Protocol};
use crate::sys::netns::NetNs;

const NUD_PERMANENT: u16 = 0x80;
/// REACHABLE, STALE, DELAY, PROBE: an answer was heard.
const NUD_KNOWN: u16 = 0x02 | 0x04 | 0x08 | 0x10;

/// Where containers find docker's resolver of names, which listens elsewhere in their namespace: rules
/// lead there. Nobody else has this address. moby, daemon/libnetwork/resolver_unix.go
const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

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
    forwarded: &[(String, LinkKind)],
) -> Result<NetworkImage, Problem> {
    capture_with(container, host, path, forwarded, false)
}

/// The same of a namespace that an engine has filled, and fills anew where the container goes: its own
/// packet filter rules are left out.
pub fn capture_engines(
    container: &NetNs,
    host: &NetNs,
    path: Option<&Path>,
) -> Result<NetworkImage, Problem> {
    capture_with(container, host, path, &[], true)
}

fn capture_with(
    container: &NetNs,
    host: &NetNs,
    path: Option<&Path>,
    forwarded: &[(String, LinkKind)],
    engines: bool,
) -> Result<NetworkImage, Problem> {
    let trying = || "cannot read the container's network".to_owned();
    if container.identity().trying(trying)? == host.identity().trying(trying)? {
        return Err(Problem::new(
            "the container uses the host's network",
            "an address of the host does not go with one container",
        )
        .hint("give the container a network namespace of its own"));
    }

    refuse_filters(container, path, engines)?;

    let mut inside = Rtnl::open(container).trying(trying)?;
    let mut infos = inside.links().trying(trying)?;
    infos.retain(|l| l.is_up() || !UNASKED.contains(&l.kind.as_str()));

    // The kernel gives loopback the first index; the image says so too.
    infos.sort_by_key(|l| (!l.is_loopback(), l.index));
    let names: Vec<String> = infos.iter().map(|l| l.name.clone()).collect();
    let (sysctls, of_links) = read_sysctls(container, &names)?;

    let surroundings = LinkSurroundings::look(&mut inside, host)?;
    let addresses = inside.addresses().trying(trying)?;
    let qdiscs = inside.qdiscs().trying(trying)?;
    let mut links = Vec::new();
    for (info, sysctls) in infos.iter().zip(of_links) {
        links.push(LinkImage {
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
fn refuse_filters(container: &NetNs, path: Option<&Path>, engines: bool) -> Result<(), Problem> {
    let mut found = Vec::new();
    if let Ok(mut socket) = NetlinkSocket::open_in(container, Protocol::Netfilter) {
        found.extend(filtering(&mut socket, engines).unwrap_or_default());
    }
    let legacy = container.run(|| {
        ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"]
            .map(|f| fs::read_to_string(f).unwrap_or_default())
            .concat()
    });

    found.extend(legacy.unwrap_or_default().lines().map(str::to_owned));
    found.dedup();
    if found.is_empty() {
        Ok(())
    } else {
        Err(Problem::new(
            "the container's namespace has packet filter rules",
            format!("they are not carried (tables {})", found.join(", ")),
        )
        .hint(format!(
            "look at them with `{enter} nft list ruleset`, delete them with `{enter} nft flush \
         ruleset`, or let the host filter",
            enter = enter(path)
        )))
    }
}

/// The tables that do something. iptables leaves empty ones behind, with chains that let
/// everything through: to come without them is to come the same.
fn filtering(
    socket: &mut NetlinkSocket,
    engines: bool,
) -> crate::sys::netlink::Result<Vec<String>> {
    let tables = nft::tables(socket)?;
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let rules = nft::tables_with_rules(socket, |rule| engines && nft::concerns(rule, RESOLVER))?;
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
struct LinkSurroundings<'a> {
    namespace: &'a NetNs,
    host: Vec<LinkInfo>,
    /// How the container's namespace calls the host's.
    id: Option<i32>,
}

impl<'a> LinkSurroundings<'a> {
    fn look(inside: &mut Rtnl, host: &'a NetNs) -> Result<Self, Problem> {
        let trying = || "cannot read the host's links".to_owned();
        let links = Rtnl::open(host).and_then(|mut s| s.links()).trying(trying)?;
        Ok(Self { namespace: host, host: links, id: inside.id_of(host).trying(trying)? })
    }

    fn by_index(&self, index: i32) -> Option<&LinkInfo> {
        self.host.iter().find(|l| l.index == index)
    }

    fn kind_of(&self, link: &LinkInfo) -> Result<LinkKind, Problem> {
        let refuse = |why: String, hint: &str| {
            Err(Problem::new(format!("interface {} cannot be carried", link.name), why).hint(hint))
        };
        if link.is_loopback() {
            return Ok(LinkKind::Loopback);
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
            ("macvlan", Some(parent)) => Ok(LinkKind::Macvlan {
                mode: link.macvlan_mode.unwrap_or_default(),
                parent: parent.name.clone(),
            }),
            ("veth", Some(peer)) => {
                match peer.master.and_then(|m| self.by_index(m)).filter(|m| m.kind == "bridge") {
                    Some(bridge) => Ok(LinkKind::Veth {
                        host_ifname: peer.name.clone(),
                        host_mac: peer.mac.unwrap_or_default(),
                        bridge: bridge.name.clone(),
                    }),
                    None if peer.master.is_some() => refuse(
                        format!("its other end, {} on the host, is a port of no bridge", peer.name),
                        "put it on a bridge, or let the host route to it",
                    ),
                    None => match routed::capture_end(self.namespace, peer)? {
                        Some(end) => Ok(LinkKind::Routed { end: Box::new(end) }),
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
