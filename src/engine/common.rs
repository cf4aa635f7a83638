//! What engines have in common: how they say things, and what is to be said of them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;

use super::Engine;
use super::papers::{EngineImage, EngineWants, NeighbourContainer, PublishedPort, Volume};
use crate::problem::Problem;

/// A text; an empty one if it is none.
pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Texts by their names, as labels and options are said; none at all may be `null`.
///
/// # Errors
/// When it is something else.
pub(super) fn by_name(value: &Value) -> Result<BTreeMap<String, String>> {
    Ok(serde_json::from_value::<Option<_>>(value.clone())?.unwrap_or_default())
}

/// An ID as engines show it.
pub(super) fn short(id: &str) -> &str {
    match id.get(..12) {
        Some(short) if id.len() == 64 => short,
        _ => id,
    }
}

/// Tells whether something was asked for.
pub(super) fn is_set(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false))
        && value.as_array().is_none_or(|list| !list.is_empty())
        && value.as_object().is_none_or(|map| !map.is_empty())
        && value.as_str() != Some("")
}

/// The published ports of what `inspect` says.
pub(super) fn ports(found: &Value) -> Vec<PublishedPort> {
    let mut ports = Vec::new();
    for (inside, list) in found["NetworkSettings"]["Ports"].as_object().into_iter().flatten() {
        let (inside, protocol) = inside.split_once('/').unwrap_or((inside, "tcp"));
        let Ok(inside) = inside.parse() else { continue };
        for one in list.as_array().into_iter().flatten() {
            if let Ok(port) = text(&one["HostPort"]).parse() {
                let address = match text(&one["HostIp"]) {
                    "0.0.0.0" | "::" => String::new(),
                    address => address.to_owned(),
                };
                let port = PublishedPort { address, port, inside, protocol: protocol.to_owned() };
                // Once for each family.
                if !ports.contains(&port) {
                    ports.push(port);
                }
            }
        }
    }
    ports
}

/// The volumes of what `inspect` says that can be made anew by their names; `ask` says what the engine knows
/// of one.
pub(super) fn volumes(
    engine: Engine,
    found: &Value,
    ask: impl Fn(&str) -> Result<Option<Value>>,
    problems: &mut Vec<Problem>,
) -> Vec<Volume> {
    let labels = |name: &str| -> Result<BTreeMap<String, String>> {
        let found = ask(name)?.ok_or_else(|| anyhow!("{engine} has no volume {name}"))?;
        let driver = text(&found["Driver"]);
        if driver != "local" || is_set(&found["Options"]) {
            bail!("its driver is {}, with options of its own", driver.escape_debug());
        }
        Ok(serde_json::from_value(found["Labels"].clone()).unwrap_or_default())
    };

    let mut volumes = Vec::new();
    for mount in found["Mounts"].as_array().into_iter().flatten() {
        let (kind, place) = (text(&mount["Type"]), text(&mount["Destination"]));
        let name = text(&mount["Name"]);
        let labels = match kind {
            "bind" | "tmpfs" => continue,
            "volume" if text(&mount["SubPath"]).is_empty() => labels(name),
            _ => Err(anyhow!("it is of the kind {}", kind.escape_debug())),
        };

        match labels {
            Ok(labels) => {
                volumes.push(Volume { name: name.to_owned(), place: place.into(), labels });
            }
            Err(e) => problems.push(
                Problem::new(
                    format!("the volume at {} does not go along", place.escape_debug()),
                    format!("{e:#}"),
                )
                .hint(format!("Ferry carries {engine}'s local volumes without options")),
            ),
        }
    }

    volumes
}

/// A neighbour by an address with its prefix, as engines write it; nothing for one of IPv6.
pub(super) fn neighbour(name: &str, network: &str, address: &str) -> Option<NeighbourContainer> {
    let address: Ipv4Addr = address.split('/').next()?.parse().ok()?;
    Some(NeighbourContainer { name: name.to_owned(), network: network.to_owned(), address })
}

/// Containers here that cannot be told apart from those which stay on the other host: these go on to be
/// the container's neighbours.
pub(super) fn doubles(
    wanted: &EngineWants,
    found: &[NeighbourContainer],
    here: &str,
) -> Vec<Problem> {
    let same = |a: &NeighbourContainer, b: &NeighbourContainer| {
        a.network == b.network && a.address == b.address
    };
    let pairs = wanted.neighbours.iter().flat_map(|there| {
        found.iter().filter(move |one| same(there, one)).map(move |one| (there, one))
    });
    let problem = |(there, one): (&NeighbourContainer, &NeighbourContainer)| {
        let (engine, stays) = (wanted.engine, &there.name);
        Problem::new(
            format!(
                "{engine}'s container {} on {here} has the address of {stays}: {} in {}",
                one.name, one.address, one.network
            ),
            format!("{stays} stays, and goes on to reach the container; both would be one to it"),
        )
        .hint(format!(
            "give one of them another address; or --forward never, and {stays} reaches it no more"
        ))
    };

    pairs.map(problem).collect()
}

/// An engine binds a port that it publishes.
pub(super) fn port_free(port: &PublishedPort, here: &str) -> Option<Problem> {
    let address = if port.address.is_empty() { "0.0.0.0" } else { &port.address };
    let bound = match port.protocol.as_str() {
        "tcp" => TcpListener::bind((address, port.port)).map(drop),
        "udp" => UdpSocket::bind((address, port.port)).map(drop),
        _ => Ok(()),
    };
    let e = bound.err()?;
    let what = format!("the port {}/{} cannot be published on {here}", port.port, port.protocol);
    Some(Problem::new(what, e).hint(format!("see who has it: `ss -lnp sport = :{}`", port.port)))
}

/// A name that is taken here.
pub(super) fn taken(engine: Engine, kind: &str, name: &str, here: &str) -> Problem {
    let short = short(name);
    let what = format!("{engine} on {here} has a {kind} {short} already");
    let remove = match kind {
        "container" => format!("{engine} rm"),
        kind => format!("{engine} {kind} rm"),
    };
    Problem::new(what, "two of one name cannot be")
        .hint(format!("if it is of no use any more: `{remove} {short}` on {here}"))
}

/// An image that is not here.
pub(super) fn no_image(engine: Engine, wanted: &EngineImage, here: &str) -> Problem {
    let name = &wanted.name;
    let what = format!("{engine} on {here} has no image {name}");
    Problem::new(what, "the container was made of it").hint(format!(
        "`{engine} pull {name}` on {here}, or `{engine} save {name} | ssh {here} {engine} load`; or let Ferry \
         copy it: --image auto"
    ))
}

/// An image whose name another one has here.
pub(super) fn other_image(
    engine: Engine,
    wanted: &EngineImage,
    other: &str,
    here: &str,
) -> Problem {
    let name = &wanted.name;
    let (own, other) = (short(bare(&wanted.id)), short(bare(other)));
    Problem::new(
        format!("{engine} on {here} has another image by the name {name}"),
        format!("the container was made of {own}, and that is {other}"),
    )
    .hint(format!(
        "nobody's name is taken away: on {here} `{engine} tag {name} OTHER` and `{engine} rmi {name}`; then \
         Ferry copies the container's"
    ))
}

/// Returns the digits of an image's ID.
fn bare(id: &str) -> &str {
    id.trim_start_matches("sha256:")
}
