//! What stands in the way on the destination.

use std::net::IpAddr;

use super::{Claim, Floating, addresses, fence};
use crate::network::image::Address;
use crate::network::placement::asked_for;
use crate::network::routed::same_network;
use crate::network::rtnl::{AF_INET, AF_INET6, LinkInfo, Rtnl};
use crate::network::sockets::{SockDiag, SocketInfo};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::NetlinkMessage;
use crate::sys::netns::NetNs;

/// Everything that would keep the addresses from coming to this host, or sockets from being bound
/// here, and what makes it doubtful that clients will find them. Changes nothing; asks the network who
/// has the addresses, which takes up to a quarter of a second an interface.
pub fn preflight(floating: &Floating, host: &NetNs) -> Vec<Problem> {
    let mut problems = Vec::new();
    problems.extend(fence::usable().err());
    match look(floating, host) {
        Ok(found) => problems.extend(found),
        Err(problem) => problems.push(problem),
    }
    problems
}

fn look(floating: &Floating, host: &NetNs) -> Result<Vec<Problem>, Problem> {
    let trying = || "cannot read this host's network".to_owned();
    let mut socket = Rtnl::open(host).trying(trying)?;
    let links = socket.links().trying(trying)?;
    let here = addresses(&mut socket, &links)?;
    let mut problems = Vec::new();
    for moved in &floating.moved {
        let ip = moved.address.local;
        let taken = here.iter().find(|(_, a)| a.local == ip);
        let place = links.iter().find(|l| l.name == moved.to);
        match (taken, place.map(|on| fits(ip, on)), place) {
            (Some((link, _)), ..) => problems.push(
                Problem::new(
                    format!("{ip} cannot move here"),
                    format!("this host has it itself, on {}", link.name),
                )
                .hint("remove it from the host; keepalived and the like must leave it alone"),
            ),
            (None, None, _) => problems.push(
                Problem::new(
                    format!("{ip} cannot move here"),
                    format!("this host has no interface {}", moved.to),
                )
                .hint("name the interface of this host in --move-address ADDRESS/PREFIX@INTERFACE"),
            ),
            (None, Some(Some(problem)), _) => problems.push(problem),
            (None, Some(None), Some(on)) => {
                problems.extend(unreachable(&moved.address, on, &here, &mut socket)?);
                problems.extend(asked_for(&[ip], moved.mac, on, host));
            }
            (None, Some(None), None) => {}
        }
    }

    let known = SockDiag::new(host)?.all()?;
    problems.extend(floating.claims.iter().filter_map(|claim| taken(claim, &known)));
    Ok(problems)
}

fn fits(ip: IpAddr, on: &LinkInfo) -> Option<Problem> {
    let what = || format!("{ip} cannot move here");
    if !on.is_up() {
        return Some(
            Problem::new(what(), format!("{} is down", on.name))
                .hint(format!("ip link set {} up", on.name)),
        );
    }
    let silent = on.is_loopback() || on.mac.is_none() || on.master.is_some();
    silent.then(|| {
        Problem::new(
            what(),
            format!("{} is no interface on which neighbours would find it", on.name),
        )
        .hint("name another in --move-address; of a bridge or bond itself, not of its ports")
    })
}

/// Until the commit the address has no network of its own here. Sockets are connected before that, and
/// the kernel wants to know a way to their other ends.
fn unreachable(
    address: &Address,
    on: &LinkInfo,
    here: &[(&LinkInfo, Address)],
    socket: &mut Rtnl,
) -> Result<Option<Problem>, Problem> {
    let (ip, prefix) = (address.local, address.prefix);
    let inside = here.iter().any(|(link, a)| {
        link.index == on.index && a.prefix == prefix && same_network(a.local, ip, prefix)
    });
    let family = if ip.is_ipv6() { AF_INET6 } else { AF_INET };
    let routes = socket.routes(family).trying(|| "cannot read this host's routes".into())?;
    let leads = |m: &NetlinkMessage| m.payload.get(1) == Some(&0);
    Ok((!inside && !routes.iter().any(leads)).then(|| {
        Problem::new(
            format!("{ip} cannot move here"),
            format!(
                "{} of this host is not in the network of {ip}/{prefix}, and there is no default route",
                on.name
            ),
        )
        .hint("give this host an address of its own in that network")
    }))
}

/// Returns who has a port of the container's here.
fn taken(claim: &Claim, known: &[SocketInfo]) -> Option<Problem> {
    let (ip, port) = (claim.local.ip(), claim.local.port());
    let in_the_way = known.iter().find(|k| {
        let other = k.flow.local;
        let overlaps = ip.is_unspecified() || other.ip().is_unspecified() || other.ip() == ip;
        (k.listens || k.udp) && k.udp == claim.udp && other.port() == port && overlaps
    })?;
    let (protocol, option) = if claim.udp { ("UDP", "u") } else { ("TCP", "t") };
    Some(
        Problem::new(
            format!("{protocol} port {port} is taken on the destination"),
            format!(
                "a program there has {}, and the container {}",
                in_the_way.flow.local, claim.local
            ),
        )
        .hint(format!("`ss -ln{option}p sport = :{port}` there shows which; let it have another")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::sockets::Flow;

    #[test]
    fn ports_are_taken_by_whoever_overlaps() {
        let known = |udp, listens, local: &str| {
            let (local, remote) = (local.parse().unwrap(), "0.0.0.0:0".parse().unwrap());
            SocketInfo { udp, listens, flow: Flow { local, remote }, inode: 1 }
        };
        let claim = |udp, local: &str| Claim { udp, listens: !udp, local: local.parse().unwrap() };
        let meets = |claim, other| taken(&claim, &[other]).is_some();
        let any = "0.0.0.0:7000";
        assert!(meets(claim(false, any), known(false, true, "10.0.0.2:7000")));
        assert!(meets(claim(false, any), known(false, true, "[::]:7000")));
        assert!(meets(claim(false, "10.0.0.5:7000"), known(false, true, any)));
        assert!(meets(claim(true, any), known(true, false, any)));
        assert!(!meets(claim(false, "10.0.0.5:7000"), known(false, true, "10.0.0.2:7000")));
        assert!(!meets(claim(false, any), known(false, false, "10.0.0.2:7000")));
        assert!(!meets(claim(false, any), known(true, false, any)));
        assert!(!meets(claim(false, any), known(false, true, "0.0.0.0:7001")));
    }
}
