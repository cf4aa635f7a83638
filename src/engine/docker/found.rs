//! What docker on the source says of a container: what of it cannot go, what has to be there, and how it is
//! asked for.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use serde_json::{Map, Value, json};

use super::OWN;
use super::api::{GET, ask};
use super::networks::network;
use crate::engine::Engine;
use crate::engine::common::{self, is_set, text};
use crate::engine::papers::{EngineNetwork, EngineStore, NeighbourContainer, Volume};
use crate::problem::Problem;

/// The network of those who ask for none.
pub(super) const DEFAULT: &str = "bridge";

/// Returns what of a container cannot go.
pub(super) fn refusals(found: &Value) -> Vec<Problem> {
    let (host, config) = (&found["HostConfig"], &found["Config"]);
    let mut problems = Vec::new();
    let mut refuse = |what: &str, why: &str, hint: &str| {
        problems.push(Problem::new(what, why).hint(hint));
    };

    if is_set(&host["AutoRemove"]) {
        refuse(
            "docker removes it when it ends (--rm)",
            "docker here would remove it as soon as it has left",
            "run it without --rm",
        );
    }

    if is_set(&config["Tty"]) {
        refuse(
            "it has a terminal",
            "docker there would have to take it over",
            "run it without --tty",
        );
    }

    if is_set(&config["Labels"]["com.docker.swarm.service.id"]) {
        refuse(
            "it is one of a swarm's service",
            "the swarm would start another one when it has left",
            "let the swarm start it there",
        );
    }

    for (what, list) in [
        ("links to other containers", &host["Links"]),
        ("other containers' volumes", &host["VolumesFrom"]),
    ] {
        if is_set(list) {
            refuse(
                &format!("it has {what}"),
                "these would stay here",
                "use a network, and volumes by name",
            );
        }
    }

    let parts = host["Mounts"].as_array().into_iter().flatten();
    if parts.into_iter().any(|mount| is_set(&mount["VolumeOptions"]["Subpath"])) {
        refuse(
            "it has a part of a volume (volume-subpath)",
            "Ferry carries whole volumes",
            "mount the whole volume, or make one of what it needs",
        );
    }

    if is_set(&host["DeviceRequests"]) {
        refuse(
            "it has devices of a driver (--gpus)",
            "what is in them cannot be carried",
            "run it without",
        );
    }

    for (what, mode) in [
        ("network", &host["NetworkMode"]),
        ("pid", &host["PidMode"]),
        ("ipc", &host["IpcMode"]),
        ("uts", &host["UTSMode"]),
        ("cgroup", &host["CgroupnsMode"]),
    ] {
        if text(mode).contains(':') {
            refuse(
                &format!("its {what} namespace is {}", text(mode).escape_debug()),
                "what it shares would be torn apart",
                "give it one of its own",
            );
        }
    }

    if is_set(&host["UsernsMode"]) && text(&host["UsernsMode"]) != "host" {
        refuse(
            "it has a user namespace",
            "Ferry does not carry that together with docker yet",
            "run it with --userns host",
        );
    }

    match text(&host["LogConfig"]["Type"]) {
        "json-file" | "none" => {}
        other => refuse(
            &format!("its log goes to {}", other.escape_debug()),
            "Ferry carries logs of json-file only",
            "run it with --log-driver json-file",
        ),
    }

    problems
}

/// Mounts of the container that docker makes itself.
pub(super) fn own(
    id: &str,
    store: &EngineStore,
    config: &Value,
    problems: &mut Vec<Problem>,
) -> Vec<PathBuf> {
    let below = store.root.join("containers").join(id);
    let mut own = Vec::new();
    for mount in config["mounts"].as_array().into_iter().flatten() {
        let (source, place) = (Path::new(text(&mount["source"])), text(&mount["destination"]));
        if source.starts_with(&below) && !OWN.contains(&place) {
            problems.push(
                Problem::new(
                    format!("docker makes {} in the container", place.escape_debug()),
                    "Ferry does not carry that together with docker yet (secrets, configs …)",
                )
                .hint("run it without that"),
            );
        }

        let init = place == "/sbin/docker-init" && text(&mount["type"]) == "bind";
        if source.starts_with(&below) || init {
            own.push(place.into());
        }
    }

    own
}

pub(super) fn networks(found: &Value, problems: &mut Vec<Problem>) -> Vec<EngineNetwork> {
    if matches!(text(&found["HostConfig"]["NetworkMode"]), "none" | "host") {
        return Vec::new();
    }
    let mut networks = Vec::new();
    for (name, own) in found["NetworkSettings"]["Networks"].as_object().into_iter().flatten() {
        let shown = name.escape_debug();
        if is_set(&own["GlobalIPv6Address"]) {
            problems.push(
                Problem::new(
                    format!("it has an IPv6 address in docker's network {shown}"),
                    "Ferry does not carry that together with docker yet",
                )
                .hint("make the network without --ipv6"),
            );
        }

        match network(name) {
            Ok(Some(found)) if matches!(&*found.driver, "bridge" | "macvlan") => {
                networks.push(found);
            }
            Ok(Some(found)) => problems.push(
                Problem::new(
                    format!("docker's network {shown} is of {}", found.driver.escape_debug()),
                    "Ferry knows bridge, macvlan, host and none",
                )
                .hint("use one of these"),
            ),
            Ok(None) => problems.push(Problem::new(
                format!("docker has no network {shown} any more"),
                "it was removed",
            )),
            Err(e) => {
                problems.push(Problem::new("docker does not tell of a network", format!("{e:#}")))
            }
        }
    }

    networks
}

/// Addresses in the default network, which docker gives as it likes.
pub(super) fn given(found: &Value) -> Vec<IpAddr> {
    let own = &found["NetworkSettings"]["Networks"][DEFAULT];
    text(&own["IPAddress"]).parse().into_iter().collect()
}

/// Other containers in bridge networks, but for the default one: nobody has a name there, and each host gives the
/// same addresses.
pub(super) fn neighbours(id: &str, networks: &[EngineNetwork]) -> Result<Vec<NeighbourContainer>> {
    let mut neighbours = Vec::new();
    for network in networks.iter().filter(|n| n.driver == "bridge" && n.name != DEFAULT) {
        let name = &network.name;
        let found = ask(GET, &format!("/networks/{name}"), None)?.unwrap_or_default();
        let others = found["Containers"].as_object().into_iter().flatten();
        neighbours.extend(others.filter(|(other, _)| *other != id).filter_map(|(_, one)| {
            common::neighbour(text(&one["Name"]), name, text(&one["IPv4Address"]))
        }));
    }
    Ok(neighbours)
}

pub(super) fn volumes(found: &Value, problems: &mut Vec<Problem>) -> Vec<Volume> {
    common::volumes(
        Engine::Docker,
        found,
        |name| ask(GET, &format!("/volumes/{name}"), None),
        problems,
    )
}

/// Returns how docker is asked for a container like this one: in the same networks with the same addresses,
/// with the same ports, and with these very volumes.
pub(super) fn request(found: &Value) -> Result<Value> {
    let mut body = found["Config"].as_object().cloned();
    let body = body.as_mut().ok_or_else(|| anyhow!("docker does not say how it was made"))?;

    // Superseded by that of each network.
    body.remove("MacAddress");
    let mut host = found["HostConfig"].clone();
    host["ContainerIDFile"] = json!("");
    ports_as_they_are(found, &mut host);
    volumes_by_name(found, &mut host);

    let mut networks = Map::new();
    for (name, own) in found["NetworkSettings"]["Networks"].as_object().into_iter().flatten() {
        let mut own = endpoint(found, own);
        if let Some(own) = own.as_object_mut().filter(|_| name == DEFAULT) {
            own.remove("Aliases");
            own.remove("IPAMConfig");
        }
        networks.insert(name.clone(), own);
    }

    if host["NetworkMode"] == "default" {
        host["NetworkMode"] = json!(DEFAULT);
    }
    body.insert("HostConfig".into(), host);
    body.insert("NetworkingConfig".into(), json!({ "EndpointsConfig": networks }));

    Ok(Value::Object(body.clone()))
}

/// Ports that docker has chosen by itself stay where they are.
fn ports_as_they_are(found: &Value, host: &mut Value) {
    let asked = host["PortBindings"].as_object().cloned().unwrap_or_default();
    let chosen = |list: &Value| {
        let list = list.as_array().into_iter().flatten();
        list.into_iter().any(|one| matches!(text(&one["HostPort"]), "" | "0"))
    };
    let mut ports = asked.clone();
    for (inside, list) in found["NetworkSettings"]["Ports"].as_object().into_iter().flatten() {
        if is_set(list) && asked.get(inside).is_none_or(chosen) {
            ports.insert(inside.clone(), list.clone());
        }
    }
    host["PortBindings"] = ports.into();
}

/// Volumes by their names, also those that have one of docker's: it would make others. What is in them
/// comes along, so nothing is to be copied out of the image.
fn volumes_by_name(found: &Value, host: &mut Value) {
    let mounts = found["Mounts"].as_array().into_iter().flatten();
    let volumes: Vec<&Value> = mounts.filter(|mount| mount["Type"] == "volume").collect();
    let placed = |place: &str| volumes.iter().any(|volume| text(&volume["Destination"]) == place);
    let binds = host["Binds"].as_array().cloned().unwrap_or_default();
    let place_of = |bind: &Value| text(bind).split(':').nth(1).unwrap_or_default().to_owned();
    let mut binds: Vec<Value> = binds.into_iter().filter(|bind| !placed(&place_of(bind))).collect();
    for volume in &volumes {
        let (name, place) = (text(&volume["Name"]), text(&volume["Destination"]));
        let mode = if volume["RW"] == false { "ro,nocopy" } else { "nocopy" };
        binds.push(json!(format!("{name}:{place}:{mode}")));
    }
    let mounts = host["Mounts"].as_array().cloned().unwrap_or_default();
    let mounts: Vec<Value> =
        mounts.into_iter().filter(|mount| !placed(text(&mount["Target"]))).collect();
    host["Binds"] = binds.into();
    host["Mounts"] = mounts.into();
}

/// Returns what a container is in a network.
fn endpoint(found: &Value, own: &Value) -> Value {
    let id = text(&found["Id"]);
    let own_name = |alias: &&Value| text(alias).is_empty() || !id.starts_with(text(alias));
    let aliases: Vec<&Value> =
        own["Aliases"].as_array().into_iter().flatten().filter(own_name).collect();
    let mut endpoint = json!({ "Aliases": aliases, "DriverOpts": own["DriverOpts"] });
    let address = text(&own["IPAddress"]);
    if !address.is_empty() {
        endpoint["IPAMConfig"] = json!({ "IPv4Address": address });
        endpoint["MacAddress"] = own["MacAddress"].clone();
    }
    endpoint
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// As docker 28.5 says it, but for what does not matter here.
    pub(in crate::engine::docker) fn found() -> Value {
        json!({
            "Id": "4f5e0c1d2b3a", "Name": "/web", "Image": "sha256:ab",
            "Config": {
                "Image": "app:1", "Tty": false, "Labels": { "tier": "front" }, "Env": ["A=b"],
                "Volumes": { "/cache": {} },
            },
            "HostConfig": {
                "NetworkMode": "appnet", "PidMode": "", "IpcMode": "private", "UTSMode": "",
                "CgroupnsMode": "private", "UsernsMode": "", "AutoRemove": false, "Links": null,
                "VolumesFrom": null, "LogConfig": { "Type": "json-file", "Config": {} },
                "Binds": ["data:/data", "/srv/x:/x:ro"], "Mounts": null, "Runtime": "ferry",
                "PortBindings": { "7000/tcp": [{ "HostIp": "", "HostPort": "" }] },
                "ContainerIDFile": "/tmp/id",
            },
            "Mounts": [
                { "Type": "volume", "Name": "data", "Destination": "/data", "RW": true },
                { "Type": "volume", "Name": "99aa", "Destination": "/cache", "RW": false },
                { "Type": "bind", "Source": "/srv/x", "Destination": "/x", "RW": false },
            ],
            "NetworkSettings": {
                "Ports": {
                    "7000/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "32768" }], "9000/tcp": null,
                },
                "Networks": { "appnet": {
                    "IPAddress": "10.1.0.7", "MacAddress": "02:42:0a:01:00:07",
                    "Aliases": ["web", "4f5e0c1d2b3a"], "DriverOpts": null,
                } },
            },
        })
    }

    #[test]
    fn what_cannot_go_is_refused() {
        assert!(refusals(&found()).is_empty(), "{:?}", refusals(&found()));
        for (pointer, value) in [
            ("/HostConfig/AutoRemove", json!(true)),
            ("/Config/Tty", json!(true)),
            ("/Config/Labels", json!({ "com.docker.swarm.service.id": "x" })),
            ("/HostConfig/PidMode", json!("container:abc")),
            ("/HostConfig/NetworkMode", json!("container:abc")),
            ("/HostConfig/Links", json!(["db:db"])),
            ("/HostConfig/VolumesFrom", json!(["db"])),
            ("/HostConfig/LogConfig/Type", json!("journald")),
        ] {
            let mut odd = found();
            *odd.pointer_mut(pointer).unwrap() = value;
            assert_eq!(refusals(&odd).len(), 1, "{pointer}");
        }
    }

    #[test]
    fn no_address_is_asked_for_in_the_default_network() {
        let mut default = found();
        default["HostConfig"]["NetworkMode"] = json!("default");
        let own = default["NetworkSettings"]["Networks"]["appnet"].take();
        default["NetworkSettings"]["Networks"] = json!({ "bridge": own });
        assert_eq!(given(&default), ["10.1.0.7".parse::<IpAddr>().unwrap()]);
        assert!(given(&found()).is_empty());
        let body = request(&default).unwrap();
        assert_eq!(body["HostConfig"]["NetworkMode"], "bridge");
        let own = &body["NetworkingConfig"]["EndpointsConfig"]["bridge"];
        assert_eq!(own["MacAddress"], "02:42:0a:01:00:07");
        assert!(own.get("IPAMConfig").is_none() && own.get("Aliases").is_none(), "{own}");
    }

    #[test]
    fn it_is_asked_for_as_it_is() {
        let body = request(&found()).unwrap();
        assert_eq!(body["Image"], "app:1");
        let host = &body["HostConfig"];
        let binds = json!(["/srv/x:/x:ro", "data:/data:nocopy", "99aa:/cache:ro,nocopy"]);
        assert_eq!(host["Binds"], binds);
        let chosen = json!([{ "HostIp": "0.0.0.0", "HostPort": "32768" }]);
        assert_eq!(host["PortBindings"], json!({ "7000/tcp": chosen }));
        assert_eq!(host["ContainerIDFile"], "");
        let own = &body["NetworkingConfig"]["EndpointsConfig"]["appnet"];
        assert_eq!(own["IPAMConfig"]["IPv4Address"], "10.1.0.7");
        assert_eq!(own["MacAddress"], "02:42:0a:01:00:07");
        assert_eq!(own["Aliases"], json!(["web"]));

        let mut asked = found();
        let port = json!([{ "HostIp": "", "HostPort": "8080" }]);
        asked["HostConfig"]["PortBindings"]["7000/tcp"] = port.clone();
        let body = request(&asked).unwrap();
        assert_eq!(body["HostConfig"]["PortBindings"]["7000/tcp"], port);
    }
}
