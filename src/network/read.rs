//! Addresses, routes and rules, as the kernel tells them.

use super::image::{Address, RULE_ATTRIBUTES, Route, Rule};
use super::rtnl::{self, AF_INET, AF_INET6, RTAX_CC_ALGO, RTNH_F_ONLINK, Rtnl, ifa, ip_of, rta};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::NetlinkMessage;

/// `IFA_F_*` that the owner of an address sets; the others tell what the kernel found.
/// NODAD, OPTIMISTIC (0x04), HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN,
/// STABLE_PRIVACY.
const IFA_CARRIED: u32 = 0x02 | 0x04 | 0x10 | 0x100 | 0x200 | 0x400 | 0x800;

const IFA_TEMPORARY: u32 = 0x01;

const FOREVER: u32 = u32::MAX;

/// `RTN_*` that forwarding of multicast and the kernel itself make.
const RTN_LOCAL: u8 = 2;

const RTN_UNREACHABLE: u8 = 7;

/// `FIB_RULE_INVERT`, `FIB_RULE_FIND_SADDR`
const RULE_FLAGS: u32 = 0x2 | 0x1_0000;

/// `USER_HZ`, in which the kernel tells how long a route has left.
const CLOCK: i32 = 100;

/// From `struct ifaddrmsg`.
pub(super) fn address(m: &NetlinkMessage) -> Option<Address> {
    let &[family, prefix, flags, scope, ..] = m.payload.as_slice() else { return None };
    let a = m.attributes(8);
    let address = ip_of(&a, ifa::ADDRESS)?;
    let local = ip_of(&a, ifa::LOCAL).unwrap_or(address);
    let flags = a.u32(ifa::FLAGS).unwrap_or(u32::from(flags));

    // Made anew, in their own time, by the kernel from the stable one.
    if family == AF_INET6 && flags & IFA_TEMPORARY != 0 {
        return None;
    }
    let times = a.get(ifa::CACHEINFO).filter(|v| v.len() >= 8);
    let lifetime = times.map(|v| {
        let at = |i: usize| u32::from_ne_bytes([v[i], v[i + 1], v[i + 2], v[i + 3]]);
        (at(0), at(4))
    });

    Some(Address {
        local,
        peer: Some(address).filter(|p| *p != local),
        prefix,
        broadcast: a.get(ifa::BROADCAST).and_then(|v| <[u8; 4]>::try_from(v).ok()).map(Into::into),
        label: a.string(ifa::LABEL),
        scope,
        flags: flags & IFA_CARRIED,
        protocol: a.get(ifa::PROTO).and_then(|v| v.first().copied()).unwrap_or_default(),
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
    m: &NetlinkMessage,
    name_of: &dyn Fn(i32) -> Option<String>,
) -> Result<Option<Route>, Problem> {
    let &[family, prefix, src_len, tos, table, protocol, scope, kind, ..] = m.payload.as_slice()
    else {
        return Ok(None);
    };
    let a = m.attributes(12);
    let table = a.u32(rta::TABLE).unwrap_or(u32::from(table));
    let v6 = match family {
        AF_INET => false,
        AF_INET6 => true,
        _ => return Ok(None),
    };

    let index = a.u32(rta::OIF).map(|i| i as i32);
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
    let destination = ip_of(&a, rta::DST);
    for (attribute, what) in [
        (rta::MULTIPATH, "several next hops"),
        (rta::ENCAP, "an encapsulation"),
        (rta::NH_ID, "a next-hop object"),
        (rta::NEWDST, "a new destination"),
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
    let via = a.get(rta::VIA).and_then(|v| v.get(2..)).and_then(rtnl::ip);
    let metrics = a.nest(rta::METRICS);
    let flags = m.payload.get(8..12).map_or(0, |f| u32::from_ne_bytes([f[0], f[1], f[2], f[3]]));

    let expires = a
        .get(rta::CACHEINFO)
        .and_then(|v| v.get(8..12))
        .map(|v| i32::from_ne_bytes([v[0], v[1], v[2], v[3]]));
    Ok(Some(Route {
        v6,
        destination,
        prefix,
        source: ip_of(&a, rta::SRC).filter(|_| src_len > 0).map(|s| (s, src_len)),
        // IPv6 tells `lo` for routes that lead nowhere, and takes them back without it.
        link: link.filter(|l| !(v6 && l == "lo" && kind >= 6)),
        gateway: ip_of(&a, rta::GATEWAY).or(via),
        prefsrc: ip_of(&a, rta::PREFSRC),
        table,
        priority: a.u32(rta::PRIORITY).unwrap_or_default(),
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
        preference: a.get(rta::PREF).and_then(|v| v.first().copied()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};
    use crate::network::restore::{address_request, route_request};
    use crate::sys::netlink::Attributes;

    /// What the kernel tells of links, addresses, routes, disciplines, connections and rules, much of
    /// which a container has chosen.
    #[test]
    fn fuzz_kernel_answers() {
        let image = crate::network::image::tests::sample();
        let one = |list: &str| image["links"][1][list][0].clone();
        let one_address = serde_json::from_value(one("addresses")).unwrap();
        let qdisc: crate::network::qdisc::Qdisc = serde_json::from_value(one("qdiscs")).unwrap();
        let one_route = serde_json::from_value(image["routes"][0].clone()).unwrap();
        let mut link = crate::sys::netlink::Request::new(16, 0, &[0; 16]);
        link.string(3, "eth0").u32(4, 1500).attr(1, &[2; 6]).nest(18, |info| {
            info.string(1, "macvlan").nest(2, |data| {
                data.u32(1, 4);
            });
        });

        let mut target = Target::new("kernel-answers");
        let samples = [
            link,
            address_request(20, 0, 1, &one_address),
            route_request(24, 0, Some(1), &one_route),
            qdisc.request(36, 0, 1),
            crate::network::nft::tests::published(),
            crate::network::translated::tests::entry(),
        ];

        for sample in samples {
            target = target.sample(sample.payload());
        }
        let name = |_| Some("eth0".to_owned());
        let ours = "10.88.0.5".parse().unwrap();
        target.words(&[b"DNAT\0", b"nat\0", b"target\0"]).run(|bytes| {
            let message = NetlinkMessage { payload: bytes.to_vec() };
            let read = [
                rtnl::LinkInfo::read(&message).is_some(),
                address(&message).is_some(),
                crate::network::qdisc::Qdisc::read(&message).is_some(),
                crate::network::nft::publishes(&message, &[ours]),
                crate::network::translated::entry(&message, ours).is_some(),
                crate::network::sockets::one(&message).is_some(),
                crate::network::unix::named(&message).is_some()
                    || crate::network::unix::peer(&message).is_some()
                    || crate::network::unix::queue(&message).is_some(),
                crate::network::legacy::names(bytes, false, &[10, 88, 0, 5]),
                crate::network::legacy::names(bytes, true, &[0xfd; 16]),
            ];

            route(&message, &name)?;
            let read: usize = read.iter().rev().fold(0, |all, one| all << 1 | usize::from(*one));
            found(&[Attributes::parse(bytes).iter().count(), read & 15, read >> 4 & 15, read >> 8])
        });
    }
}
