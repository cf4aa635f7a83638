//! What podman on the source says of a container: what of it cannot go, and what has to be there.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::{OWN, PODMAN};
use crate::engine::Engine;
use crate::engine::command::ask;
use crate::engine::common::{self, is_set, text};
use crate::engine::papers::{EngineNetwork, EngineStore, NeighbourContainer, Volume};
use crate::problem::Problem;

/// The network of those who ask for none.
const DEFAULT: &str = "podman";

/// Returns what of a container cannot go.
pub(super) fn refusals(found: &Value) -> Vec<Problem> {
    let host = &found["HostConfig"];
    let mut problems = Vec::new();
    let mut refuse = |what: &str, why: &str, hint: &str| {
        problems.push(Problem::new(what, why).hint(hint));
    };

    if is_set(&found["Pod"]) || is_set(&found["IsInfra"]) {
        refuse(
            "it is one of a pod",
            "what it shares with the others would be torn apart",
            "stop the pod, and start it there",
        );
    }

    if is_set(&host["AutoRemove"]) {
        refuse(
            "podman removes it when it ends (--rm)",
            "podman here would remove it as soon as it has left",
            "run it without --rm",
        );
    }

    if is_set(&found["Config"]["Tty"]) {
        refuse(
            "it has a terminal",
            "podman there would have to take it over",
            "run it without --tty",
        );
    }

    if is_set(&found["Rootfs"]) {
        refuse(
            "it has no image",
            "its root file system is a directory of this host",
            "make an image of it",
        );
    }

    if is_set(&found["Dependencies"]) {
        refuse(
            "it depends on other containers",
            "these would stay here",
            "start it without --requires and container: namespaces",
        );
    }

    for (what, mode) in [
        ("network", &host["NetworkMode"]),
        ("pid", &host["PidMode"]),
        ("ipc", &host["IpcMode"]),
        ("uts", &host["UTSMode"]),
        ("cgroup", &host["CgroupMode"]),
    ] {
        if text(mode).contains(':') {
            refuse(
                &format!("its {what} namespace is {}", text(mode)),
                "what it shares would be torn apart",
                "give it one of its own",
            );
        }
    }

    if !matches!(text(&host["NetworkMode"]), "bridge" | "host" | "none") {
        refuse(
            &format!("its network is {}", text(&host["NetworkMode"])),
            "Ferry knows bridge, macvlan, host and none",
            "use one of these",
        );
    }

    if is_set(&host["UsernsMode"]) || is_set(&host["IDMappings"]) {
        refuse(
            "it has a user namespace",
            "Ferry does not carry that together with podman yet",
            "run it without --userns",
        );
    }

    if let Some(unit) = unit(found) {
        refuse(
            &format!("the unit {} owns it", unit.escape_debug()),
            "systemd ends the container with its unit, and starts the unit again when it has left",
            "have podman alone run it: `systemctl disable --now` for the unit (of a quadlet: move its file \
             out of /etc/containers/systemd, and `systemctl daemon-reload`), then `podman run` without it",
        );
    }

    match text(&host["LogConfig"]["Type"]) {
        "k8s-file" | "json-file" | "none" => {}
        other => refuse(
            &format!("its log goes to {}", other.escape_debug()),
            "Ferry carries logs in files only",
            "run it with --log-driver k8s-file",
        ),
    }

    problems
}

/// The unit of systemd's that runs it: what quadlet and `podman generate systemd` write down; or, of any other unit,
/// the control group, where podman was told to stay in the caller's (`--cgroups split`).
fn unit(found: &Value) -> Option<&str> {
    let label = found["Config"]["Labels"]["PODMAN_SYSTEMD_UNIT"].as_str();
    label.filter(|unit| !unit.is_empty()).or_else(|| {
        let mut above = text(&found["State"]["CgroupPath"]).rsplit('/');
        above.find(|part| part.starts_with("libpod-payload-"))?;
        above.find(|part| part.ends_with(".service"))
    })
}

/// Mounts of the container that podman makes itself.
pub(super) fn own(
    id: &str,
    store: &EngineStore,
    config: &Value,
    problems: &mut Vec<Problem>,
) -> Vec<PathBuf> {
    let container = format!("{}-containers", store.driver);
    let below = [&store.root, &store.run].map(|base| base.join(&container).join(id));
    let mut own = Vec::new();
    for mount in config["mounts"].as_array().into_iter().flatten() {
        let (source, place) = (Path::new(text(&mount["source"])), text(&mount["destination"]));
        if below.iter().any(|base| source.starts_with(base)) {
            if !OWN.contains(&place) {
                problems.push(
                    Problem::new(
                        format!("podman makes {} in the container", place.escape_debug()),
                        "Ferry does not carry that together with podman yet (secrets, a passwd file …)",
                    )
                    .hint("run it without that"),
                );
            }
            own.push(place.into());
        }
    }

    own
}

/// Networks, and other containers in those that are bridges.
pub(super) fn networks(
    id: &str,
    found: &Value,
    problems: &mut Vec<Problem>,
) -> (Vec<EngineNetwork>, Vec<NeighbourContainer>) {
    if text(&found["HostConfig"]["NetworkMode"]) != "bridge" {
        return Default::default();
    }
    let names = found["NetworkSettings"]["Networks"].as_object().into_iter().flat_map(|n| n.keys());
    let (mut networks, mut neighbours) = (Vec::new(), Vec::new());
    for name in names {
        match network(name) {
            Ok(Some((network, others))) => {
                neighbours.extend(others.into_iter().filter(|(other, _)| other != id).map(|o| o.1));
                networks.push(network);
            }
            Ok(None) => problems.push(Problem::new(
                format!("podman has no network {} any more", name.escape_debug()),
                "it was removed",
            )),
            Err(e) => {
                problems.push(Problem::new("podman does not tell of a network", format!("{e:#}")))
            }
        }
    }

    (networks, neighbours)
}

/// Neighbours with their containers' IDs.
type NeighbourContainers = Vec<(String, NeighbourContainer)>;

/// A network, and, if it is a bridge, who is in it.
pub(super) fn network(name: &str) -> Result<Option<(EngineNetwork, NeighbourContainers)>> {
    let Some(found) = ask(PODMAN, &["network", "inspect", name])? else { return Ok(None) };
    let network = super::networks::described(&found);
    // In the default one nobody has a name, and each host gives the same addresses.
    let has_some = network.driver == "bridge" && name != DEFAULT;
    let neighbours = if has_some { neighbours(name, &found) } else { Vec::new() };
    Ok(Some((network, neighbours)))
}

fn neighbours(network: &str, found: &Value) -> NeighbourContainers {
    let mut all = Vec::new();
    for (id, one) in found["containers"].as_object().into_iter().flatten() {
        let interfaces = one["interfaces"].as_object().into_iter().flat_map(|list| list.values());
        let subnets = interfaces.flat_map(|one| one["subnets"].as_array().into_iter().flatten());
        all.extend(subnets.filter_map(|subnet| {
            let address = text(&subnet["ipnet"]);
            Some((id.clone(), common::neighbour(text(&one["name"]), network, address)?))
        }));
    }
    all
}

pub(super) fn volumes(found: &Value, problems: &mut Vec<Problem>) -> Vec<Volume> {
    common::volumes(
        Engine::Podman,
        found,
        |name| ask(PODMAN, &["volume", "inspect", name]),
        problems,
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_is_in_a_network_is_told() {
        let one = |name: &str, addresses: &[&str]| {
            let subnets: Vec<_> = addresses.iter().map(|at| json!({ "ipnet": at })).collect();
            json!({ "name": name, "interfaces": { "eth0": { "subnets": subnets } } })
        };
        let found = json!({
            "containers": { "11": one("db", &["10.89.7.2/24", "fd00::2/64"]), "22": one("off", &[]) },
        });
        let told = neighbours("appnet", &found);
        assert_eq!(told, [("11".into(), common::neighbour("db", "appnet", "10.89.7.2").unwrap())]);
    }

    #[test]
    fn what_cannot_go_is_refused() {
        let plain = json!({
            "Config": { "Tty": false, "Labels": {} }, "Pod": "", "IsInfra": false, "Dependencies": [],
            "State": {},
            "HostConfig": {
                "NetworkMode": "bridge", "PidMode": "private", "IpcMode": "shareable", "UTSMode": "private",
                "CgroupMode": "private", "UsernsMode": "", "AutoRemove": false,
                "LogConfig": { "Type": "k8s-file" },
            },
        });

        assert!(refusals(&plain).is_empty(), "{:?}", refusals(&plain));
        for (pointer, value) in [
            ("/HostConfig/AutoRemove", json!(true)),
            ("/Config/Tty", json!(true)),
            ("/Pod", json!("p")),
            ("/HostConfig/PidMode", json!("container:abc")),
            ("/HostConfig/NetworkMode", json!("pasta")),
            ("/HostConfig/UsernsMode", json!("auto")),
            ("/HostConfig/LogConfig/Type", json!("journald")),
            ("/Dependencies", json!(["x"])),
            ("/Config/Labels", json!({ "PODMAN_SYSTEMD_UNIT": "web.service" })),
            ("/State", json!({ "CgroupPath": "/system.slice/web.service/libpod-payload-b39f" })),
        ] {
            let mut odd = plain.clone();
            *odd.pointer_mut(pointer).unwrap() = value;
            assert_eq!(refusals(&odd).len(), 1, "{pointer}");
        }
    }

    #[test]
    fn a_unit_is_known_by_its_label_or_its_control_group() {
        for (label, cgroup, wanted) in [
            ("web.service", "", Some("web.service")),
            ("", "/system.slice/web.service/libpod-payload-b39f", Some("web.service")),
            ("", "/user.slice/x.service/app.slice/y.service/libpod-payload-1", Some("y.service")),
            // podman's own scopes; one that was called in a unit, and left its group.
            ("", "/machine.slice/libpod-b39f.scope", None),
            ("", "/machine.slice/libpod-b39f.scope/container", None),
            ("", "/libpod_parent/libpod-b39f", None),
            ("", "/system.slice/web.service/libpod_parent/libpod-b39f", None),
            ("", "", None),
        ] {
            let found = json!({
                "Config": { "Labels": { "PODMAN_SYSTEMD_UNIT": label } },
                "State": { "CgroupPath": cgroup },
            });
            assert_eq!(unit(&found), wanted, "{label} {cgroup}");
        }
    }
}
