//! Whether docker here may be asked for what the other host says.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::engine::common::{is_set, text};
use crate::engine::papers::{EngineWants, Papers};

/// Parts of a request that name what else is on this host, or programs that it would run.
const FOREIGN: [&str; 6] =
    ["AutoRemove", "ContainerIDFile", "DeviceRequests", "Links", "VolumeDriver", "VolumesFrom"];
/// Namespaces that may be another container's.
const NAMESPACES: [&str; 5] = ["NetworkMode", "PidMode", "IpcMode", "UTSMode", "CgroupnsMode"];

/// It names nothing here but what was looked for. Whoever may ask for a migration may ask docker for any
/// container: what docker gives it to is docker's business.
pub(super) fn judge(wanted: &EngineWants, papers: &Papers) -> Result<()> {
    papers.validate()?;
    let (config, host) = (&papers.config, &papers.config["HostConfig"]);
    for (what, said, value) in [
        ("image", &config["Image"], &wanted.image.name),
        ("runtime", &host["Runtime"], &wanted.runtime),
    ] {
        if text(said) != value {
            bail!("the container's {what} is {:?}, and not {value:?}", text(said));
        }
    }
    if let Some(name) = FOREIGN.into_iter().find(|name| is_set(&host[*name])) {
        bail!("the container has {name}");
    }
    if let Some(name) = NAMESPACES.into_iter().find(|name| text(&host[*name]).contains(':')) {
        bail!("the container's {name} is {:?}", text(&host[name]));
    }
    if !matches!(text(&host["LogConfig"]["Type"]), "json-file" | "none") {
        bail!("the container's log goes to {:?}", text(&host["LogConfig"]["Type"]));
    }
    volumes(wanted, config)?;
    networks(wanted, config)
}

fn volumes(wanted: &EngineWants, config: &Value) -> Result<()> {
    let host = &config["HostConfig"];
    let known = |name: &str| wanted.volumes.iter().any(|volume| volume.name == name);
    for bind in host["Binds"].as_array().into_iter().flatten() {
        let source = text(bind).split(':').next().unwrap_or_default();
        if !source.starts_with('/') && !known(source) {
            bail!("the container has the volume {source:?}, which was not looked for");
        }
    }

    for mount in host["Mounts"].as_array().into_iter().flatten() {
        if !matches!(text(&mount["Type"]), "bind" | "tmpfs") {
            bail!("the container has a mount of the kind {:?}", text(&mount["Type"]));
        }
    }

    // docker makes one for each of these where there is nothing else.
    let places = config["Volumes"].as_object().into_iter().flat_map(|all| all.keys());
    let covered = |place: &str| {
        let there = |bind: &Value| text(bind).split(':').nth(1) == Some(place);
        let bound = host["Binds"].as_array().is_some_and(|all| all.iter().any(there));
        let target = |mount: &Value| text(&mount["Target"]) == place;
        bound || host["Mounts"].as_array().is_some_and(|all| all.iter().any(target))
    };

    if let Some(place) = places.into_iter().find(|place| !covered(place)) {
        bail!("the container has a volume at {place:?}, which was not looked for");
    }

    Ok(())
}

fn networks(wanted: &EngineWants, config: &Value) -> Result<()> {
    let known = |name: &str| wanted.networks.iter().any(|network| network.name == name);
    let mode = text(&config["HostConfig"]["NetworkMode"]);
    let own = wanted.networks.is_empty() && matches!(mode, "none" | "host");
    if !own && !known(mode) {
        bail!("the container's network is {mode:?}, which was not looked for");
    }
    let named = config["NetworkingConfig"]["EndpointsConfig"].as_object();
    let mut names = named.into_iter().flat_map(|all| all.keys());
    let allowed = |name: &str| known(name) || own && name == mode;
    match names.find(|name| !allowed(name)) {
        Some(other) => bail!("the container is in the network {other:?}, which was not looked for"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::found::{request, tests::found};
    use super::*;

    const ID: &str = "b39f270b1e1caf22caa0909b5b1bd0e57e918c8d22a3699a0633f9f399ff0ebe";

    fn wanted() -> EngineWants {
        serde_json::from_value(json!({
            "engine": "docker", "version": "28.5.2", "name": "web", "runtime": "ferry",
            "store": {
                "root": "/var/lib/docker", "run": "/var/run/docker",
                "volumes": "/var/lib/docker/volumes", "driver": "overlay2",
            },
            "image": { "id": format!("sha256:{ID}"), "name": "app:1" },
            "volumes": [
                { "name": "data", "place": "/data", "labels": {} },
                { "name": "99aa", "place": "/cache", "labels": {} },
            ],
            "networks": [{ "name": "appnet", "driver": "bridge", "subnets": ["10.1.0.0/24"] }],
            "ports": [], "own": [], "log": null,
        }))
        .unwrap()
    }

    #[test]
    fn only_what_was_looked_for_is_asked_for() {
        wanted().validate().unwrap();
        let papers = |config| Papers { config, spec: Value::Null, network: Value::Null };
        judge(&wanted(), &papers(request(&found()).unwrap())).unwrap();

        for (pointer, value) in [
            ("/Image", json!("evil:1")),
            ("/HostConfig/Runtime", json!("runc")),
            ("/HostConfig/AutoRemove", json!(true)),
            ("/HostConfig/ContainerIDFile", json!("/etc/x")),
            ("/HostConfig/VolumesFrom", json!(["db"])),
            ("/HostConfig/Links", json!(["db:db"])),
            ("/HostConfig/PidMode", json!("container:db")),
            ("/HostConfig/NetworkMode", json!("other")),
            ("/HostConfig/NetworkMode", json!("host")),
            ("/HostConfig/LogConfig/Type", json!("plugin")),
            ("/HostConfig/Binds", json!(["secret:/data", "99aa:/cache"])),
            ("/HostConfig/Binds", json!(["data:/data"])),
            (
                "/HostConfig/Mounts",
                json!([{ "Type": "volume", "Source": "secret", "Target": "/x" }]),
            ),
            ("/NetworkingConfig/EndpointsConfig", json!({ "other": {} })),
        ] {
            let mut config = request(&found()).unwrap();
            *config.pointer_mut(pointer).unwrap() = value.clone();
            assert!(judge(&wanted(), &papers(config)).is_err(), "{pointer}: {value}");
        }
    }
}
