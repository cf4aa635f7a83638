//! Whether what the other host says of a container is what podman here would have written down.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::engine::common::text;
use crate::engine::papers::{EngineWants, Papers};

/// What came is what podman here would have written down for a container of that ID: what it decides by
/// itself is its own, wherever the other host says that it is.
pub(super) fn judge(wanted: &EngineWants, id: &str, papers: &Papers) -> Result<()> {
    papers.validate()?;
    let Papers { config, spec, .. } = papers;
    let store = &wanted.store;
    let container = format!("{}-containers", store.driver);
    let lasting = store.root.join(&container).join(id).join("userdata");
    let passing = store.run.join(&container).join(id).join("userdata");
    for (name, place) in [
        ("staticDir", lasting.clone()),
        ("ShmDir", lasting.join("shm")),
        ("secretsPath", lasting.join("secrets")),
        ("logPath", lasting.join("ctr.log")),
        ("conmonPidFile", passing.join("conmon.pid")),
        ("pid_file", passing.join("pidfile")),
    ] {
        let said = text(&config[name]);
        if !said.is_empty() && Path::new(said) != place {
            bail!("the container's {name} is {said:?}, and not {}", place.display());
        }
    }

    for (name, value) in [
        ("id", id),
        ("name", &wanted.name),
        ("runtime", &wanted.runtime),
        ("rootfsImageName", &wanted.image.name),
        ("rootfsImageID", wanted.image.id.trim_start_matches("sha256:")),
        ("pod", ""),
        ("rootfs", ""),
    ] {
        if text(&config[name]) != value {
            bail!("the container's {name} is {:?}, and not {value:?}", text(&config[name]));
        }
    }

    // Programs that the other host names, run on this one.
    for (whose, value) in [("config.dump", &config["spec"]), ("spec.dump", spec)] {
        if value["hooks"].as_object().is_some_and(|hooks| !hooks.is_empty()) {
            bail!("{whose} has hooks");
        }
    }

    // What this host has for others, under names that were not looked at.
    for name in FOREIGN {
        let nothing = match &config[name] {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };

        if !nothing {
            bail!("the container has {name}");
        }
    }

    let volumes = config["namedVolumes"].as_array().into_iter().flatten();
    let mut volumes: Vec<&str> = volumes.map(|volume| text(&volume["volumeName"])).collect();
    let mut known: Vec<&str> = wanted.volumes.iter().map(|volume| volume.name.as_str()).collect();
    volumes.sort_unstable();
    known.sort_unstable();
    if volumes != known {
        bail!("the container's volumes are {volumes:?}, and not {known:?}");
    }

    let networks = config["newNetworks"].as_object().into_iter().flat_map(|all| all.keys());
    if let Some(other) =
        networks.into_iter().find(|n| wanted.networks.iter().all(|w| w.name != **n))
    {
        bail!("the container is in the network {other:?}, which was not looked for");
    }

    Ok(())
}

/// Parts of podman's description that name what else is on its host: other containers, secrets, images;
/// and programs.
const FOREIGN: [&str; 14] = [
    "Dependencies",
    "mountNsCtr",
    "ipcNsCtr",
    "netNsCtr",
    "pidNsCtr",
    "userNsCtr",
    "utsNsCtr",
    "cgroupNsCtr",
    "overlayVolumes",
    "ctrImageVolumes",
    "artifactVolumes",
    "secrets",
    "secret_env",
    "exitCommand",
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::papers::EngineImage;

    const ID: &str = "b39f270b1e1caf22caa0909b5b1bd0e57e918c8d22a3699a0633f9f399ff0ebe";

    fn wanted() -> EngineWants {
        serde_json::from_value(json!({
            "engine": "podman", "version": "5.8.6", "name": "web", "runtime": "ferry",
            "store": {
                "root": "/var/lib/containers/storage", "run": "/run/containers/storage",
                "volumes": "/var/lib/containers/storage/volumes", "driver": "overlay",
            },
            "image": { "id": ID, "name": "localhost/app:1" },
            "volumes": [], "networks": [], "ports": [], "own": [], "log": null,
        }))
        .unwrap()
    }

    /// As podman 5.8 writes it, but for what does not matter here.
    fn papers() -> Papers {
        let place = format!("/var/lib/containers/storage/overlay-containers/{ID}/userdata");
        let config = json!({
            "id": ID, "name": "web", "runtime": "ferry", "rootfsImageID": ID,
            "rootfsImageName": "localhost/app:1", "staticDir": place,
            "logPath": format!("{place}/ctr.log"), "spec": {}, "namedVolumes": null,
        });
        Papers { config, spec: json!({}), network: json!({}) }
    }

    #[test]
    fn only_what_podman_here_would_have_written_is_taken() {
        assert!(wanted().validate().is_ok());
        judge(&wanted(), ID, &papers()).unwrap();
        for (name, value) in [
            ("logPath", json!("/etc/cron.d/x")),
            ("staticDir", json!("/etc")),
            ("pid_file", json!("/etc/passwd")),
            ("id", json!("another")),
            ("runtime", json!("/tmp/evil")),
            ("rootfs", json!("/")),
            ("rootfsImageID", json!("0")),
            ("pod", json!("p")),
            ("spec", json!({ "hooks": { "prestart": [{ "path": "/tmp/evil" }] } })),
            ("namedVolumes", json!([{ "volumeName": "other", "dest": "/x" }])),
            ("newNetworks", json!({ "other": {} })),
            ("netNsCtr", json!("0123")),
            ("secrets", json!([{ "name": "key" }])),
            ("exitCommand", json!(["/tmp/evil"])),
        ] {
            let mut papers = papers();
            papers.config[name] = value;
            assert!(judge(&wanted(), ID, &papers).is_err(), "{name}");
        }

        let mut papers = papers();
        papers.spec["hooks"] = json!({ "poststop": [{ "path": "/tmp/evil" }] });
        assert!(judge(&wanted(), ID, &papers).is_err());
    }

    #[test]
    fn names_that_could_be_options_are_refused() {
        for name in ["-a", "--volume=/:/x", "", "a b", "../x"] {
            assert!(EngineWants { name: name.into(), ..wanted() }.validate().is_err(), "{name:?}");
        }
        let mut odd = wanted();
        odd.store.root = "/var/../etc".into();
        assert!(odd.validate().is_err());
        let image = EngineImage { id: ID.into(), name: "--help".into(), ..EngineImage::default() };
        assert!(EngineWants { image, ..wanted() }.validate().is_err());
    }
}
