//! An engine's container whose address moves, into the network of that name there, while connections
//! by the first host's address translation stay: see [`crate::network::published`].
//!
//! The devices and the process that holds them are there before the freeze, as is the link from home. When
//! the container is restored, its cable is joined with them. When it is committed, and before its engine here
//! sees it end, home leads to itself what comes for it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{AWAY, Away, away, directory, make_directory, write};
use crate::engine::papers::EngineWants;
use crate::migration::journal::forward_role::{ForwardRecord, ForwardRole};
use crate::migration::protocol::Plan;
use crate::network::image::{LinkImage, LinkKind};
use crate::network::published::away::{links, make_devices, steer as join_cables};
use crate::network::published::home::HomeFacts;
use crate::network::published::near::stay;
use crate::network::published::packet::{TCP, UDP};
use crate::network::published::{HomePort, given, surroundings};
use crate::network::sockets::{self, Flow, SockDiag};
use crate::network::{NetworkImage, forward, translated};
use crate::problem::Problem;
use crate::sys::netns::NetNs;

/// By default it ends when no connection was open for so long, seconds.
pub const IDLE: u64 = 300;
/// So many who stay are told by name.
const NAMED: usize = 5;

/// Tells whether there is something that could be forwarded.
pub fn could_be(plan: &Plan) -> bool {
    let (Some(wanted), Some(image)) = (&plan.engine, &plan.network) else { return false };
    let translated = &plan.forward.translated;
    let ties = translated.published
        || !translated.flows.is_empty()
        || !wanted.ports.is_empty()
        || !wanted.neighbours.is_empty();
    ties && links(image).next().is_some()
}

/// Returns what home has to know.
pub fn known(wanted: &EngineWants, image: &NetworkImage) -> HomeFacts {
    let all: Vec<&LinkImage> = links(image).collect();
    let own = |link: &&LinkImage| -> Vec<Ipv4Addr> {
        let ips = link.addresses.iter().filter_map(|a| match a.local {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        });
        ips.collect()
    };

    // Where it is in several networks, engines lead ports to the one that it reaches the world by.
    let default = image.routes.iter().find(|r| !r.v6 && r.prefix == 0 && r.destination.is_none());
    let outward =
        default.and_then(|route| all.iter().find(|link| Some(&link.name) == route.link.as_ref()));
    let to = outward.or(all.first()).and_then(|link| own(link).first().copied());
    let ports = wanted.ports.iter().filter_map(|port| {
        let address = match port.address.as_str() {
            "" => None,
            address => Some(address.parse().ok()?),
        };
        let protocol = match port.protocol.as_str() {
            "tcp" => TCP,
            "udp" => UDP,
            _ => return None,
        };

        Some(HomePort {
            protocol,
            address,
            port: port.port,
            to: SocketAddrV4::new(to?, port.inside),
        })
    });

    HomeFacts {
        ports: ports.collect(),
        links: all.iter().map(|link| (link.mac.unwrap_or_default(), own(link))).collect(),
        bridges: all.iter().map(|link| bridge(link)).collect(),
        neighbours: wanted.neighbours.iter().map(|one| one.address).collect(),
    }
}

fn bridge(link: &LinkImage) -> String {
    match &link.kind {
        LinkKind::Veth { bridge, .. } => bridge.clone(),
        _ => String::new(),
    }
}

/// Connections that would end, by name: the other end would have to come along.
pub fn stuck(
    wanted: &EngineWants,
    forwards: bool,
    namespace: &NetNs,
    image: &NetworkImage,
) -> Result<Vec<Problem>, Problem> {
    let engine = wanted.engine;
    let here = crate::sys::host::name();
    let host = NetNs::current().map_err(|e| Problem::new("cannot look at this host", e))?;
    let around = surroundings(&host)?;
    let near: HashMap<IpAddr, &str> =
        wanted.neighbours.iter().map(|one| (one.address.into(), &*one.name)).collect();
    let mut found: Vec<(&str, String, Vec<Flow>)> = Vec::new();

    for link in links(image) {
        let LinkKind::Veth { bridge, .. } = &link.kind else { continue };
        let addresses: Vec<IpAddr> = link.addresses.iter().map(|a| a.local).collect();
        let addresses: Vec<IpAddr> =
            addresses.into_iter().filter(|ip| !forward::is_link_local(*ip)).collect();
        let translated = translated::entries(&host, &addresses).unwrap_or_default();
        let outward = around.leads_out(bridge);
        for flow in SockDiag::new(namespace)?.connections(&addresses)? {
            let entry = translated.iter().find(|e| e.protocol == TCP && e.inside == flow);
            let other = entry.map_or(flow.remote, |entry| entry.wire.remote).ip();
            let why = match entry {
                _ if around.addresses.contains(&other) => {
                    ("itself", format!("{here} itself is at its other end"))
                }
                Some(entry) if entry.translation().is_none() => {
                    ("IPv6", "Ferry forwards connections of IPv4".into())
                }
                None if near.contains_key(&other) => match near[&other] {
                    _ if forwards => continue,
                    name => (
                        name,
                        format!("its other end is {engine}'s container {name}, which stays here"),
                    ),
                },
                None if !outward => (
                    "bridge",
                    format!(
                        "its other end is on {here}'s bridge {bridge}, or comes by it as it is"
                    ),
                ),
                _ => continue,
            };

            match found.iter_mut().find(|(kind, ..)| *kind == why.0) {
                Some((_, _, list)) => list.push(flow),
                None => found.push((why.0, why.1, vec![flow])),
            }
        }
    }

    let problem = |(_, why, flows): (&str, String, Vec<Flow>)| {
        let others = match flows.len() - 1 {
            0 => String::new(),
            n => format!(", and {n} more"),
        };
        let first = flows[0];
        Problem::new(
            format!(
                "a connection of the container's cannot go along: {} with {}{others}",
                first.local, first.remote
            ),
            why,
        )
        .hint(format!(
            "end it; or connect to a port that {engine} publishes on {here}, from another host{}",
            if forwards { "" } else { "; or leave --forward away" }
        ))
    };

    let mut problems: Vec<Problem> = found.into_iter().map(problem).collect();
    let bound = |one: &sockets::SocketInfo| {
        let waits = one.listens || one.udp && one.flow.remote.ip().is_unspecified();
        waits && wanted.given.contains(&one.flow.local.ip())
    };

    if let Some(one) = SockDiag::new(namespace)?.all()?.into_iter().find(bound) {
        problems.push(
            Problem::new(
                format!("the container listens at {} alone", one.flow.local),
                format!("in its default network {engine} may give it another address there"),
            )
            .hint("have it listen at all addresses (0.0.0.0), or put it into a network with a subnet of its own"),
        );
    }

    Ok(problems)
}

/// Returns what becomes of an address that cannot be asked for.
pub fn moves(wanted: &EngineWants) -> Option<Problem> {
    let ip = wanted.given.first()?;
    let engine = wanted.engine;
    let what = format!("{ip}, in {engine}'s default network, may be another address there");
    let why = "forwarded connections keep it; what else has learnt it finds nobody";
    Some(Problem::new(what, why).hint("a network made with --subnet keeps addresses").warning())
}

/// Returns who stays, and what becomes of what they have to do with each other. `forwards`: their packets go
/// to and fro.
pub fn left_behind(wanted: &EngineWants, forwards: bool) -> Option<Problem> {
    let mut names: Vec<String> =
        wanted.neighbours.iter().map(|one| one.name.escape_debug().to_string()).collect();
    names.sort_unstable();
    names.dedup();
    let (engine, others) = (wanted.engine, names.len().saturating_sub(NAMED));
    let first = names.first()?;
    let mut list = names[..names.len().min(NAMED)].join(", ");
    if others > 0 {
        list.push_str(&format!(", and {others} more"));
    }

    let (stay, them) = if names.len() == 1 { ("stays", "it") } else { ("stay", "them") };
    let what = format!("{list} {stay} here, in {engine}'s networks that it is in");
    let problem = if forwards {
        let hint = format!(
            "give a container that asks for names the others' addresses: `--add-host`, compose's \
             extra_hosts; or move {first}, too"
        );
        Problem::new(
            what,
            format!(
                "they reach each other by their addresses as long as connections are forwarded; \
                 {engine} tells {them} its name no more"
            ),
        )
        .hint(hint)
    } else {
        Problem::new(what, "with --forward never they do not reach each other any more")
            .hint("leave --forward away")
    };

    Some(problem.warning())
}

/// It is forwarded so already, from elsewhere.
pub fn twice(away: &Away) -> Problem {
    let (home, id) = (&away.home, away.name.as_deref().unwrap_or(&away.container));
    Problem::new(
        format!("its connections are forwarded from {home}"),
        "an engine's container goes on from here, or back, when they have ended",
    )
    .hint(format!(
        "`ferry resolve --no-forward --when-idle {id}` ends it when none is open any more, without \
         --when-idle at once"
    ))
}

/// The destination, before anything is restored: devices, and whoever holds them.
///
/// # Errors
/// When they cannot be made; what was is undone by the journal's note.
pub fn arrive(note: &ForwardRecord, plan: &Plan) -> Result<()> {
    let image = plan.network.as_ref().context("a container without a network")?;
    let directory = make_directory(&note.id)?;
    let links: Vec<(String, LinkKind)> =
        links(image).map(|link| (link.name.clone(), link.kind.clone())).collect();
    let names: Vec<String> = links.iter().map(|link| link.0.clone()).collect();
    let wanted = plan.engine.iter().flat_map(|wanted| &wanted.neighbours);
    let neighbours: Vec<Ipv4Addr> = wanted.map(|one| one.address).collect();
    let away = Away {
        id: note.id.clone(),
        container: plan.container.clone(),
        name: plan.engine.as_ref().map(|wanted| wanted.name.clone()),
        home: plan.source.clone(),
        path: PathBuf::new(),
        identity: (0, 0),
        links,
        published: true,
        old: Vec::new(),
        stay: stay(image, &neighbours),
    };
    write(&directory, AWAY, &away)?;
    away::spawn(&directory, make_devices(&note.id, &names)?)
}

/// The destination, when the container is restored, and held: its cables are joined with the devices.
/// `init` is its first process.
///
/// # Errors
/// When they cannot be.
pub fn join(
    note: Option<&ForwardRecord>,
    plan: &Plan,
    namespace: Option<&NetNs>,
    init: i32,
) -> Result<()> {
    let note = note.filter(|n| n.part == ForwardRole::ArrivesWithoutConnections);
    let (Some(note), Some(namespace)) = (note, namespace) else { return Ok(()) };
    let directory = directory(&note.id);
    let mut away = super::away_at(&directory)?;
    let names: Vec<String> = away.links.iter().map(|link| link.0.clone()).collect();
    join_cables(&note.id, namespace, &names, &away.stay)?;
    away.path = format!("/proc/{init}/ns/net").into();
    away.identity = namespace.identity()?;
    let given = plan.engine.as_ref().map(|wanted| wanted.given.as_slice()).unwrap_or_default();
    away.old = given::kept(given, namespace)?;
    write(&directory, AWAY, &away)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::network::image::tests::sample;

    /// In two networks of an engine's, and one where its address moves with its connections.
    fn image() -> NetworkImage {
        let mut image = sample();
        let veth = json!({
            "veth": { "host_ifname": "v1", "host_mac": [2, 0, 0, 0, 0, 2], "bridge": "br0" },
        });
        let mut links = vec![image["links"][0].clone(), image["links"][1].clone()];
        for (name, address) in [("eth1", "10.1.0.5"), ("eth2", "10.2.0.5")] {
            let mut link = image["links"][1].clone();
            (link["name"], link["kind"]) = (name.into(), veth.clone());
            link["addresses"][0]["local"] = address.into();
            links.push(link);
        }
        image["links"] = links.into();
        let mut route = image["routes"][0].clone();
        (route["destination"], route["prefix"], route["link"]) =
            (json!(null), 0.into(), "eth2".into());
        image["routes"] = json!([route]);
        serde_json::from_value(image).unwrap()
    }

    fn wanted() -> EngineWants {
        serde_json::from_value(json!({
            "engine": "docker", "version": "28.5.2", "name": "web", "runtime": "ferry",
            "store": { "root": "/r", "run": "/s", "volumes": "/v", "driver": "overlay2" },
            "image": { "id": "", "name": "app:1" }, "volumes": [], "networks": [], "own": [], "log": null,
            "ports": [
                { "address": "", "port": 8080, "inside": 7000, "protocol": "tcp" },
                { "address": "10.77.1.11", "port": 53, "inside": 5353, "protocol": "udp" },
                { "address": "::1", "port": 8081, "inside": 7000, "protocol": "tcp" },
                { "address": "", "port": 8082, "inside": 7000, "protocol": "sctp" },
            ],
        }))
        .unwrap()
    }

    #[test]
    fn ports_lead_to_where_the_world_is() {
        let known = known(&wanted(), &image());
        let port = |protocol, address: Option<&str>, port, to: &str| HomePort {
            protocol,
            address: address.map(|address| address.parse().unwrap()),
            port,
            to: to.parse().unwrap(),
        };
        let ports = [
            port(TCP, None, 8080, "10.2.0.5:7000"),
            port(UDP, Some("10.77.1.11"), 53, "10.2.0.5:5353"),
        ];
        assert_eq!(known.ports, ports);
        let addresses: Vec<_> = known.links.iter().map(|(_, ips)| ips[0].to_string()).collect();
        assert_eq!(addresses, ["10.1.0.5", "10.2.0.5"], "what moves is not among them");
    }
}
