//! podman's networks, by its own program.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail};
use serde_json::Value;

use super::PODMAN;
use crate::engine::command::{self, LIMIT, ask, run};
use crate::engine::common::{by_name, is_set, text};
use crate::engine::networks::definition::{
    AddressRange, GivenPart, NetworkDefinition, NetworkRoute,
};
use crate::engine::networks::{FoundNetwork, NetworkAnswer, NetworkStore};
use crate::engine::papers::EngineNetwork;

/// What podman calls bridges of its own accord, with a number behind.
const BRIDGE: &str = "podman";
/// What it is asked for first.
const CREATE: [&str; 2] = ["network", "create"];

/// What podman has.
pub(super) struct PodmanNetworks;

/// A network as `inspect` says it.
pub(super) fn described(found: &Value) -> EngineNetwork {
    let subnets = found["subnets"].as_array().into_iter().flatten();
    EngineNetwork {
        name: text(&found["name"]).to_owned(),
        driver: text(&found["driver"]).to_owned(),
        subnets: subnets.map(|subnet| text(&subnet["subnet"]).to_owned()).collect(),
        definition: definition(found).map_err(|e| format!("{e:#}")),
    }
}

/// Returns how it is asked for; an error is why not.
fn definition(found: &Value) -> Result<NetworkDefinition> {
    let ipam = &found["ipam_options"];
    let of_local = ipam
        .as_object()
        .into_iter()
        .flatten()
        .all(|(key, value)| key == "driver" && text(value) == "host-local");
    if !of_local {
        bail!("Ferry makes none whose addresses are given by another driver (--ipam-driver)");
    }

    let ranges = found["subnets"].as_array().into_iter().flatten();
    let ranges = in_order(ranges.map(range).collect::<Result<Vec<_>>>()?)?;
    let servers = found["network_dns_servers"].as_array().into_iter().flatten();
    let routes = found["routes"].as_array().into_iter().flatten();
    let own = |link: &str| {
        link.strip_prefix(BRIDGE).is_some_and(|n| n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let link = text(&found["network_interface"]);
    Ok(NetworkDefinition {
        ranges,
        ipv6: found["ipv6_enabled"] == true,
        internal: found["internal"] == true,
        names: found["dns_enabled"] == true,
        servers: servers.map(|one| Ok(text(one).parse()?)).collect::<Result<_>>()?,
        routes: routes.map(route).collect::<Result<_>>()?,
        interface: if own(link) { String::new() } else { link.to_owned() },
        options: by_name(&found["options"])?,
        labels: by_name(&found["labels"])?,
        ..NetworkDefinition::default()
    })
}

fn range(said: &Value) -> Result<AddressRange> {
    let given = &said["lease_range"];
    let ends = || {
        let (first, last) = (text(&given["start_ip"]), text(&given["end_ip"]));
        anyhow::Ok(GivenPart::Between(first.parse()?, last.parse()?))
    };
    let given = is_set(given).then(ends).transpose()?;
    let gateway = Some(text(&said["gateway"])).filter(|gateway| !gateway.is_empty());
    Ok(AddressRange {
        subnet: text(&said["subnet"]).parse()?,
        gateway: gateway.map(str::parse).transpose()?,
        given,
        reserved: BTreeMap::new(),
    })
}

/// The first `--gateway` and `--ip-range` belong to the first `--subnet`, and so on: none may be left out
/// before another one.
fn in_order(ranges: Vec<AddressRange>) -> Result<Vec<AddressRange>> {
    let gap = |has: &dyn Fn(&AddressRange) -> bool| {
        ranges.windows(2).any(|two| !has(&two[0]) && has(&two[1]))
    };
    if gap(&|range| range.gateway.is_some()) || gap(&|range| range.given.is_some()) {
        bail!("Ferry makes none of which only a later subnet has a gateway or a range of its own");
    }
    Ok(ranges)
}

fn route(said: &Value) -> Result<NetworkRoute> {
    let metric = said["metric"].as_u64().map(u32::try_from).transpose()?;
    Ok(NetworkRoute {
        to: text(&said["destination"]).parse()?,
        gateway: text(&said["gateway"]).parse()?,
        metric,
    })
}

/// Returns what podman is asked for.
fn arguments(network: &EngineNetwork, definition: &NetworkDefinition) -> Vec<String> {
    let mut words: Vec<String> = CREATE.map(str::to_owned).into();
    let mut say = |key: &str, value: &dyn std::fmt::Display| words.push(format!("--{key}={value}"));
    say("driver", &network.driver);
    for range in &definition.ranges {
        say("subnet", &range.subnet);
    }
    for gateway in definition.ranges.iter().filter_map(|range| range.gateway) {
        say("gateway", &gateway);
    }
    for given in definition.ranges.iter().filter_map(|range| range.given.as_ref()) {
        match given {
            GivenPart::Within(part) => say("ip-range", part),
            GivenPart::Between(first, last) => say("ip-range", &format!("{first}-{last}")),
        }
    }

    for route in &definition.routes {
        let metric = route.metric.map(|metric| format!(",{metric}")).unwrap_or_default();
        say("route", &format!("{},{}{metric}", route.to, route.gateway));
    }
    for server in &definition.servers {
        say("dns", server);
    }
    let bridge = network.driver == "bridge";
    for (key, set) in [
        ("ipv6", definition.ipv6),
        ("internal", definition.internal),
        ("disable-dns", bridge && !definition.names),
    ] {
        if set {
            say(key, &true);
        }
    }

    match definition.interface.as_str() {
        "" => {}
        link if bridge => say("interface-name", &link),
        link => say("opt", &format!("parent={link}")),
    }
    for (key, value) in &definition.options {
        say("opt", &format!("{key}={value}"));
    }
    for (key, value) in &definition.labels {
        say("label", &format!("{key}={value}"));
    }
    words.push(network.name.clone());
    words
}

impl NetworkStore for PodmanNetworks {
    fn all(&self) -> Result<Vec<FoundNetwork>> {
        let said = run(PODMAN, &["network", "ls", "--format", "json"], LIMIT)?;
        let found: Vec<Value> = serde_json::from_slice(&said.out)
            .map_err(|_| anyhow!("podman network ls: {}", said.why()))?;
        let found = found
            .iter()
            .map(|found| FoundNetwork { id: text(&found["id"]).into(), network: described(found) });
        Ok(found.collect())
    }

    fn create(
        &self,
        network: &EngineNetwork,
        definition: &NetworkDefinition,
    ) -> Result<NetworkAnswer> {
        let arguments = arguments(network, definition);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = run(PODMAN, &arguments, LIMIT)?;
        if !said.success {
            return Ok(NetworkAnswer::Refused(said.why()));
        }
        let found = ask(PODMAN, &["network", "inspect", &network.name])?;
        let found = found.ok_or_else(|| anyhow!("podman has made it, and does not have it"))?;
        Ok(NetworkAnswer::Made(text(&found["id"]).to_owned()))
    }

    fn outcome(&self, name: &str) -> Result<Option<FoundNetwork>> {
        command::await_end(PODMAN, &[&CREATE[..], &[name]].concat());
        Ok(self.all()?.into_iter().find(|found| found.network.name == name))
    }

    fn users(&self, found: &FoundNetwork) -> Result<Vec<String>> {
        let filter = format!("network={}", found.network.name);
        let arguments = ["ps", "--all", "--filter", &filter, "--format", "{{.Names}}"];
        let said = run(PODMAN, &arguments, LIMIT)?;
        if !said.success {
            bail!("podman does not tell who is in the network: {}", said.why());
        }
        let names = String::from_utf8_lossy(&said.out).into_owned();
        Ok(names.lines().map(str::to_owned).collect())
    }

    fn remove(&self, id: &str) -> Result<()> {
        let said = run(PODMAN, &["network", "rm", id], LIMIT)?;
        if !said.success {
            bail!("{}", said.why());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As podman 5.8 says it.
    fn found() -> Value {
        json!({
            "name": "appnet", "id": "3fd4", "driver": "bridge", "network_interface": "br-x",
            "subnets": [
                {
                    "subnet": "10.91.7.0/24", "gateway": "10.91.7.1",
                    "lease_range": { "start_ip": "10.91.7.129", "end_ip": "10.91.7.255" },
                },
                { "subnet": "fd00:92::/64", "gateway": "fd00:92::1" },
            ],
            "routes": [{ "destination": "10.99.0.0/16", "gateway": "10.91.7.1", "metric": 5 }],
            "ipv6_enabled": true, "internal": true, "dns_enabled": false,
            "network_dns_servers": ["1.1.1.1"], "labels": { "a": "b" }, "options": { "mtu": "1400" },
            "ipam_options": { "driver": "host-local" }, "containers": {},
        })
    }

    fn asked(found: &Value) -> String {
        let network = described(found);
        let definition = network.definition.clone().unwrap();
        definition.validate().unwrap();
        arguments(&network, &definition).join(" ")
    }

    #[test]
    fn it_is_asked_for_as_it_is() {
        assert_eq!(
            asked(&found()),
            "network create --driver=bridge --subnet=10.91.7.0/24 --subnet=fd00:92::/64 \
             --gateway=10.91.7.1 --gateway=fd00:92::1 --ip-range=10.91.7.129-10.91.7.255 \
             --route=10.99.0.0/16,10.91.7.1,5 --dns=1.1.1.1 --ipv6=true --internal=true \
             --disable-dns=true --interface-name=br-x --opt=mtu=1400 --label=a=b appnet"
        );
        // The name of its own that podman there gives.
        let mut plain = found();
        plain["network_interface"] = json!("podman12");
        assert!(!asked(&plain).contains("interface-name"));
        let lan = json!({
            "name": "lan", "driver": "macvlan", "network_interface": "eth0",
            "subnets": [{ "subnet": "10.1.0.0/24", "gateway": "10.1.0.1" }],
            "ipam_options": { "driver": "host-local" },
        });
        assert_eq!(
            asked(&lan),
            "network create --driver=macvlan --subnet=10.1.0.0/24 --gateway=10.1.0.1 --opt=parent=eth0 lan"
        );
    }

    #[test]
    fn what_could_not_be_asked_for_is_not_made() {
        for (pointer, value) in [
            ("/ipam_options", json!({ "driver": "dhcp" })),
            ("/subnets/0/gateway", json!("")),
            ("/subnets/0/lease_range", json!({ "start_ip": "10.91.7.129" })),
            ("/subnets/0/subnet", json!("0.0.0.0/0")),
            ("/routes/0/destination", json!("x")),
        ] {
            let mut odd = found();
            *odd.pointer_mut(pointer).unwrap() = value;
            assert!(described(&odd).definition.is_err(), "{pointer}");
        }
    }
}
