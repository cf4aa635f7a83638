//! docker's networks, over its API's socket.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde_json::{Map, Value, json};

use super::api::{self, DELETE, GET, POST, ask};
use crate::engine::common::{by_name, is_set, text};
use crate::engine::networks::definition::{AddressRange, GivenPart, NetworkDefinition};
use crate::engine::networks::{FoundNetwork, NetworkAnswer, NetworkStore};
use crate::engine::papers::EngineNetwork;

/// Options that name a link of the host.
const PARENT: &str = "parent";
const BRIDGE: &str = "com.docker.network.bridge.name";

/// docker goes on with a request when whoever has asked is gone: by then it is done.
const OUTCOME_LIMIT: Duration = Duration::from_secs(3);
/// Between one look and the next.
const PAUSE: Duration = Duration::from_millis(50);

/// What docker has.
pub(super) struct DockerNetworks;

/// Returns the network of a name.
pub(super) fn network(name: &str) -> Result<Option<EngineNetwork>> {
    Ok(ask(GET, &format!("/networks/{name}"), None)?.map(|found| described(&found)))
}

/// A network as `inspect` says it.
fn described(found: &Value) -> EngineNetwork {
    let subnets = found["IPAM"]["Config"].as_array().into_iter().flatten();
    EngineNetwork {
        name: text(&found["Name"]).to_owned(),
        driver: text(&found["Driver"]).to_owned(),
        subnets: subnets.map(|subnet| text(&subnet["Subnet"]).to_owned()).collect(),
        definition: definition(found).map_err(|e| format!("{e:#}")),
    }
}

/// Returns how it is asked for; an error is why not.
fn definition(found: &Value) -> Result<NetworkDefinition> {
    let odd = |why: &str| Err(anyhow!("Ferry makes none {why}"));
    if text(&found["Scope"]) != "local" {
        return odd("that a swarm has");
    }
    if is_set(&found["ConfigFrom"]["Network"]) || is_set(&found["ConfigOnly"]) {
        return odd("that is described by another one (--config-from)");
    }
    if text(&found["IPAM"]["Driver"]) != "default" || is_set(&found["IPAM"]["Options"]) {
        return odd("whose addresses are given by another driver (--ipam-driver)");
    }
    if found["EnableIPv4"] == false {
        return odd("without IPv4");
    }

    let ranges = found["IPAM"]["Config"].as_array().into_iter().flatten();
    let ranges: Result<Vec<AddressRange>> = ranges.map(range).collect();
    let mut options = by_name(&found["Options"])?;
    let link = if text(&found["Driver"]) == "macvlan" { PARENT } else { BRIDGE };
    Ok(NetworkDefinition {
        ranges: ranges?,
        ipv6: found["EnableIPv6"] == true,
        internal: found["Internal"] == true,
        attachable: found["Attachable"] == true,
        interface: options.remove(link).unwrap_or_default(),
        options,
        labels: by_name(&found["Labels"])?,
        ..NetworkDefinition::default()
    })
}

fn range(said: &Value) -> Result<AddressRange> {
    let given = Some(text(&said["IPRange"])).filter(|given| !given.is_empty());
    let gateway = Some(text(&said["Gateway"])).filter(|gateway| !gateway.is_empty());
    let reserved = said["AuxiliaryAddresses"].as_object().into_iter().flatten();
    let reserved = reserved.map(|(name, address)| Ok((name.clone(), text(address).parse()?)));
    Ok(AddressRange {
        subnet: text(&said["Subnet"]).parse()?,
        gateway: gateway.map(str::parse).transpose()?,
        given: given.map(|given| anyhow::Ok(GivenPart::Within(given.parse()?))).transpose()?,
        reserved: reserved.collect::<Result<_>>()?,
    })
}

/// Returns how docker is asked for it.
fn request(network: &EngineNetwork, definition: &NetworkDefinition) -> Value {
    let config = definition.ranges.iter().map(|range| {
        let mut config = Map::new();
        config.insert("Subnet".into(), json!(range.subnet));
        if let Some(GivenPart::Within(given)) = &range.given {
            config.insert("IPRange".into(), json!(given));
        }
        if let Some(gateway) = range.gateway {
            config.insert("Gateway".into(), json!(gateway));
        }
        if !range.reserved.is_empty() {
            config.insert("AuxiliaryAddresses".into(), json!(range.reserved));
        }
        Value::Object(config)
    });

    let mut options = definition.options.clone();
    if !definition.interface.is_empty() {
        let link = if network.driver == "macvlan" { PARENT } else { BRIDGE };
        options.insert(link.into(), definition.interface.clone());
    }
    json!({
        "Name": network.name,
        "Driver": network.driver,
        "IPAM": { "Driver": "default", "Options": {}, "Config": config.collect::<Vec<_>>() },
        "EnableIPv6": definition.ipv6,
        "Internal": definition.internal,
        "Attachable": definition.attachable,
        "Options": options,
        "Labels": definition.labels,
    })
}

impl NetworkStore for DockerNetworks {
    fn all(&self) -> Result<Vec<FoundNetwork>> {
        let list = ask(GET, "/networks", None)?.unwrap_or_default();
        let list = list.as_array().into_iter().flatten();
        let found = list
            .map(|found| FoundNetwork { id: text(&found["Id"]).into(), network: described(found) });
        Ok(found.collect())
    }

    fn create(
        &self,
        network: &EngineNetwork,
        definition: &NetworkDefinition,
    ) -> Result<NetworkAnswer> {
        Ok(match api::answer(POST, "/networks/create", &request(network, definition))? {
            Ok(said) => NetworkAnswer::Made(text(&said["Id"]).to_owned()),
            Err(why) => NetworkAnswer::Refused(format!("{why:#}")),
        })
    }

    fn outcome(&self, name: &str) -> Result<Option<FoundNetwork>> {
        let until = Instant::now() + OUTCOME_LIMIT;
        loop {
            let found = self.all()?.into_iter().find(|found| found.network.name == name);
            if found.is_some() || Instant::now() > until {
                return Ok(found);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn users(&self, found: &FoundNetwork) -> Result<Vec<String>> {
        // docker itself minds only those that run.
        let list = ask(GET, "/containers/json?all=1", None)?.unwrap_or_default();
        let list = list.as_array().into_iter().flatten();
        let uses = |one: &&Value| {
            let networks = one["NetworkSettings"]["Networks"].as_object();
            networks.into_iter().flatten().any(|(name, own)| {
                *name == found.network.name || text(&own["NetworkID"]) == found.id
            })
        };
        let name = |one: &Value| text(&one["Names"][0]).trim_start_matches('/').to_owned();
        Ok(list.filter(uses).map(name).collect())
    }

    fn remove(&self, id: &str) -> Result<()> {
        ask(DELETE, &format!("/networks/{id}"), None).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As docker 28.5 says it, of a network that compose has made.
    fn found() -> Value {
        json!({
            "Name": "appnet", "Id": "c3f1", "Scope": "local", "Driver": "bridge",
            "EnableIPv4": true, "EnableIPv6": false,
            "IPAM": { "Driver": "default", "Options": {}, "Config": [{
                "Subnet": "10.89.7.0/24", "IPRange": "10.89.7.128/25", "Gateway": "10.89.7.1",
                "AuxiliaryAddresses": { "host": "10.89.7.5" },
            }] },
            "Internal": false, "Attachable": false, "Ingress": false,
            "ConfigFrom": { "Network": "" }, "ConfigOnly": false, "Containers": {},
            "Options": { BRIDGE: "br-app", "com.docker.network.driver.mtu": "1400" },
            "Labels": { "com.docker.compose.project": "shop" },
        })
    }

    #[test]
    fn it_is_asked_for_as_it_is() {
        let network = described(&found());
        let definition = network.definition.clone().unwrap();
        definition.validate().unwrap();
        let body = request(&network, &definition);
        for field in ["Name", "Driver", "EnableIPv6", "Internal", "Options", "Labels"] {
            assert_eq!(body[field], found()[field], "{field}");
        }
        assert_eq!(body["IPAM"]["Config"], found()["IPAM"]["Config"]);
        assert_eq!(definition.interface, "br-app");

        let mut lan = found();
        lan["Driver"] = json!("macvlan");
        lan["Options"] = json!({ "parent": "eth0" });
        lan["IPAM"]["Config"] = json!([{ "Subnet": "10.1.0.0/24" }]);
        let network = described(&lan);
        let body = request(&network, network.definition.as_ref().unwrap());
        assert_eq!(body["Options"], lan["Options"]);
        assert_eq!(body["IPAM"]["Config"], lan["IPAM"]["Config"]);
    }

    #[test]
    fn what_is_described_elsewhere_is_not_made() {
        for (pointer, value) in [
            ("/Scope", json!("swarm")),
            ("/ConfigFrom/Network", json!("other")),
            ("/IPAM/Driver", json!("dhcp")),
            ("/IPAM/Options", json!({ "a": "b" })),
            ("/EnableIPv4", json!(false)),
            ("/IPAM/Config/0/Subnet", json!("x")),
        ] {
            let mut odd = found();
            *odd.pointer_mut(pointer).unwrap() = value;
            assert!(described(&odd).definition.is_err(), "{pointer}");
        }
    }
}
