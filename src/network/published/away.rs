//! The end of the host that has the container: frames go to its cable, and from there what belongs to
//! connections of home.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::errno::Errno;

use super::home::flow;
use super::near::{self, Stays};
use super::packet::{TCP, UDP};
use super::{ADDRESS_CELLS, Ends, FLOW_CELLS, device, quiet_device, table};
use crate::network::image::{LinkImage, LinkKind, MAX_LINKS, NetworkImage};
use crate::network::nft::{self, Expression, NewChain, NewSet, NftBatch, Policy};
use crate::network::rtnl::{self, IFF_UP, Rtnl, ifinfo};
use crate::network::sockets::{SockDiag, SocketInfo};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkSocket, Protocol, Request};
use crate::sys::netns::NetNs;
use crate::sys::tun::Tap;

/// Connections that are open; and what packets from home belong to, as long as some come.
const OPEN: &str = "open";
const RECENT: &str = "recent";
/// Addresses of those who are at home, and near.
const NEAR: &str = "near";
const RENEWED: Duration = Duration::from_secs(300);
const INGRESS: u32 = 0;

/// The links that connections of home's may go through: an engine's, on a bridge.
pub fn links(image: &NetworkImage) -> impl Iterator<Item = &LinkImage> {
    let behind = |link: &&LinkImage| {
        matches!(link.kind, LinkKind::Veth { .. })
            && link.addresses.iter().any(|a| a.local.is_ipv4())
    };
    image.links.iter().filter(behind)
}

/// Makes a TAP device for each of these links, in this host's namespace.
///
/// # Errors
/// When the kernel does not.
pub fn make_devices(id: &str, names: &[String]) -> Result<Vec<(String, Tap)>, Problem> {
    let trying = || "cannot make a TAP device".to_owned();
    let mut made = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let tap = quiet_device(&device(id, Some(number))).trying(trying)?;
        tap.persist().trying(trying)?;
        made.push((name.clone(), tap));
    }
    let mut links = Rtnl::open(&NetNs::current().trying(trying)?).trying(trying)?;
    for number in 0..names.len() {
        let made = links.link(&device(id, Some(number))).trying(trying)?;
        let index = made.ok_or_else(|| Problem::new(trying(), "it is gone"))?.index;
        let up = Request::new(rtnl::NEWLINK, 0, &ifinfo(index, IFF_UP, IFF_UP));
        links.change(&up).trying(trying)?;
    }
    Ok(made)
}

/// Takes the devices of these links that are there and that nobody holds any more.
///
/// # Errors
/// When they are not there.
pub fn take_devices(id: &str, names: &[String]) -> Result<Vec<(String, Tap)>, Problem> {
    let take = |(number, name): (usize, &String)| {
        let tap = Tap::create(&device(id, Some(number)));
        let tap = tap.trying(|| "cannot take a TAP device over".into())?;
        Ok((name.clone(), tap))
    };
    names.iter().enumerate().map(take).collect()
}

/// Takes away the devices of one.
pub(super) fn delete_devices(id: &str, host: &NetNs) -> crate::sys::netlink::Result<()> {
    let mut links = Rtnl::open(host)?;
    let own: Vec<String> =
        (0..MAX_LINKS).map(|number| device(id, Some(number))).chain([device(id, None)]).collect();
    for link in links.links()?.iter().filter(|l| l.kind == "tun" && own.contains(&l.name)) {
        match links.change(&Request::new(rtnl::DELLINK, 0, &ifinfo(link.index, 0, 0))) {
            Err(e) if e.errno != Errno::ENODEV => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Joins the devices of these links with the container's cables, which the engine has made. All
/// connections that the container has are from home, and those who `stay` are there.
///
/// # Errors
/// When the cables are not there, or the kernel does not take it.
pub fn steer(id: &str, container: &NetNs, names: &[String], stay: &[Stays]) -> Result<(), Problem> {
    let trying = || "cannot lead forwarded connections to the container".to_owned();
    let host = NetNs::current().trying(trying)?;
    let outside = Rtnl::open(&host).and_then(|mut s| s.links()).trying(trying)?;
    let inside = Rtnl::open(container).and_then(|mut s| s.links()).trying(trying)?;
    let table = table(id);
    let mut batch = NftBatch::new();

    // Adding before deleting makes the deletion right whether or not it was there.
    batch.add_table(nft::NETDEV, &table);
    batch.delete_table(nft::NETDEV, &table);
    batch.add_table(nft::NETDEV, &table);
    for (name, timeout) in [(OPEN, None), (RECENT, Some(RENEWED))] {
        batch.add_set(nft::NETDEV, &table, &NewSet { name, key: &FLOW_CELLS, timeout });
    }

    batch.add_set(nft::NETDEV, &table, &NewSet { name: NEAR, key: &ADDRESS_CELLS, timeout: None });
    let open = open(container)?;
    batch.add_keys(nft::NETDEV, &table, OPEN, &open.iter().map(|e| e.key()).collect::<Vec<_>>());

    for (number, name) in names.iter().enumerate() {
        let own = device(id, Some(number));
        let lower = inside.iter().find(|link| link.name == *name).and_then(|link| link.lower);
        let cable = outside.iter().find(|link| Some(link.index) == lower && link.kind == "veth");
        let cable = cable
            .ok_or_else(|| Problem::new(trying(), format!("{name} is no cable to this host")))?;
        let tap = outside.iter().find(|link| link.name == own);
        let tap = tap.ok_or_else(|| Problem::new(trying(), format!("no device {own}")))?;
        let to =
            |link: &rtnl::LinkInfo| [Expression::Device(link.index as u32), Expression::Forward];
        let mut chain = |what: &str, device: &str, rules: Vec<Vec<Expression>>| {
            let chain = format!("{what}-{number}");
            batch.add_chain(&NewChain {
                family: nft::NETDEV,
                table: &table,
                name: &chain,
                hook: INGRESS,
                devices: &[device.to_owned()],
                policy: Policy::Accept,
            });

            for rule in rules {
                batch.add_rule(nft::NETDEV, &table, &chain, &rule);
            }
        };

        let mut note = flow(false);
        note.push(Expression::Update(RECENT));
        chain("to", &own, vec![note, to(cable).into()]);
        let known = |set| {
            let mut rule = flow(true);
            rule.push(Expression::Lookup(set));
            rule.extend(to(tap));
            rule
        };

        let mut to_near = near::to_address();
        to_near.push(Expression::Lookup(NEAR));
        to_near.extend(to(tap));
        chain("from", &cable.name, vec![known(OPEN), known(RECENT), to_near]);
    }

    let ips: Vec<[u8; 4]> = stay.iter().map(|one| one.address.octets()).collect();
    batch.add_keys(nft::NETDEV, &table, NEAR, &ips);
    let mut socket = NetlinkSocket::open_in(&host, Protocol::Netfilter).trying(trying)?;
    socket.transact(&batch.prepare()).map(drop).trying(trying)?;

    near::tell(container, stay, true)
}

/// The container's connections, as packets to it have them.
fn open(container: &NetNs) -> Result<Vec<Ends>, Problem> {
    let all = SockDiag::new(container)?.all()?;
    let mut ends: Vec<Ends> = all.iter().filter_map(ends).collect();
    ends.sort_unstable_by_key(|e| e.key());
    ends.dedup();
    Ok(ends)
}

fn ends(one: &SocketInfo) -> Option<Ends> {
    let (SocketAddr::V4(to), SocketAddr::V4(from)) = (one.flow.local, one.flow.remote) else {
        return None;
    };
    let protocol = if one.udp { UDP } else { TCP };
    let outward = !from.ip().is_unspecified() && !from.ip().is_loopback();
    (outward && !one.listens).then_some(Ends { protocol, from, to })
}

/// Ends the container's connections that came by home, or have one of these addresses: nothing comes on them
/// any more, and what it says nobody would understand.
///
/// # Errors
/// When they cannot be looked at.
pub fn cut(id: &str, container: &NetNs, old: &[IpAddr]) -> Result<(), Problem> {
    let trying = || "cannot end what was forwarded".to_owned();
    let host = NetNs::current().trying(trying)?;
    let (mut socket, table) =
        (NetlinkSocket::open_in(&host, Protocol::Netfilter).trying(trying)?, table(id));
    let mut from_home = HashSet::new();
    for set in [OPEN, RECENT] {
        // Where it never came so far there are none.
        let keys = nft::keys(&mut socket, nft::NETDEV, &table, set).unwrap_or_default();
        from_home.extend(keys.iter().filter_map(|key| Ends::of_key(key)));
    }
    SockDiag::new(container)?.cut(|one| {
        old.contains(&one.flow.local.ip()) || ends(one).is_some_and(|one| from_home.contains(&one))
    })
}

/// Looks after the connections of home's.
#[derive(Debug)]
pub struct Keeper {
    table: String,
    socket: NetlinkSocket,
    sock_diag: SockDiag,
}

impl Keeper {
    /// Makes ready to look into the container's namespace.
    ///
    /// # Errors
    /// When it cannot be looked into.
    pub fn new(id: &str, container: &NetNs) -> Result<Keeper, Problem> {
        let trying = || "cannot look at forwarded connections".to_owned();
        let host = NetNs::current().trying(trying)?;
        Ok(Keeper {
            table: table(id),
            socket: NetlinkSocket::open_in(&host, Protocol::Netfilter).trying(trying)?,
            sock_diag: SockDiag::new(container)?,
        })
    }

    /// Notes those that have come since, for as long as they are open, and forgets those that are not any
    /// more. How many there are; of UDP, such as packets came for lately.
    ///
    /// # Errors
    /// When they cannot be looked at.
    pub fn look(&mut self) -> Result<u32, Problem> {
        let trying = || "cannot look at forwarded connections".to_owned();
        let mut read = |set| {
            let keys = nft::keys(&mut self.socket, nft::NETDEV, &self.table, set).trying(trying)?;
            Ok::<HashSet<Ends>, Problem>(keys.iter().filter_map(|k| Ends::of_key(k)).collect())
        };
        let (noted, recent) = (read(OPEN)?, read(RECENT)?);
        let all: HashSet<Ends> = self.sock_diag.all()?.iter().filter_map(ends).collect();
        let (come, gone) = difference(&noted, &recent, &all);

        let keys = |list: &[Ends]| list.iter().map(|e| e.key()).collect::<Vec<_>>();
        let mut batch = NftBatch::new();
        batch.add_keys(nft::NETDEV, &self.table, OPEN, &keys(&come));
        batch.delete_keys(nft::NETDEV, &self.table, OPEN, &keys(&gone));
        if !(come.is_empty() && gone.is_empty()) {
            self.socket.transact(&batch.prepare()).trying(trying)?;
        }
        let tcp = |e: &&Ends| e.protocol == TCP && (noted.contains(e) || recent.contains(e));
        let udp = recent.iter().filter(|e| e.protocol == UDP).count();
        Ok((all.iter().filter(tcp).count() + udp) as u32)
    }
}

/// Returns which are to be noted, and which of those that are to be forgotten.
fn difference(
    noted: &HashSet<Ends>,
    recent: &HashSet<Ends>,
    all: &HashSet<Ends>,
) -> (Vec<Ends>, Vec<Ends>) {
    let come = recent.intersection(all).filter(|e| !noted.contains(e)).copied().collect();
    (come, noted.difference(all).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_noted_as_long_as_they_are_open() {
        let ends = |port: u16| Ends {
            protocol: TCP,
            from: format!("192.0.2.9:{port}").parse().unwrap(),
            to: "10.89.7.20:7000".parse().unwrap(),
        };
        let set = |ports: &[u16]| ports.iter().map(|p| ends(*p)).collect::<HashSet<_>>();
        // 3 has come from home, 4 only knocks; 2 has ended; 5 is not from home.
        let (come, gone) = difference(&set(&[1, 2]), &set(&[1, 3, 4]), &set(&[1, 3, 5]));
        assert_eq!((come, gone), (vec![ends(3)], vec![ends(2)]));
    }
}
