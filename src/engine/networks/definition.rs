//! How a network is made, as its engine on the source says; and whether it may be made here like that.
//!
//! What comes from the other host is a wish. Of options only those in the lists below are ever asked for, with
//! values of their kinds; and none of them names a device of this host but a macvlan's parent, which must be
//! there. A bridge may have the name that it had, where nothing has that here: an engine would take what has
//! it for its own. (moby: libnetwork/drivers/bridge, …/macvlan; podman-network-create(1).)

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::HostLinks;
use super::subnet::Subnet;
use crate::engine::Engine;
use crate::engine::papers::EngineNetwork;
use crate::oci::container_id::valid_id;

/// Most of anything that a network has several of.
const MOST: usize = 64;
/// Most bytes of its labels.
const MAX_LABELS: usize = 256 << 10;
/// The longest name of a link: `IFNAMSIZ` of if.h, without the zero.
const MAX_LINK: usize = 15;

/// How a network is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDefinition {
    /// What it has addresses of.
    pub ranges: Vec<AddressRange>,
    /// It has addresses of IPv6.
    pub ipv6: bool,
    /// Nobody outside is reached.
    pub internal: bool,
    /// docker's: who is no service of a swarm may be in it, too.
    #[serde(default)]
    pub attachable: bool,
    /// podman's: containers find each other by name.
    #[serde(default)]
    pub names: bool,
    /// podman's: who is asked for other names.
    #[serde(default)]
    pub servers: Vec<IpAddr>,
    /// podman's.
    #[serde(default)]
    pub routes: Vec<NetworkRoute>,
    /// A bridge's own name, where it was asked for; a macvlan's parent.
    pub interface: String,
    /// What the driver was asked for beside that.
    pub options: BTreeMap<String, String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// A subnet of a network's, and who has what of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRange {
    /// All of it.
    pub subnet: Subnet,
    /// Whose address is the way out.
    pub gateway: Option<IpAddr>,
    /// Where addresses are given from.
    pub given: Option<GivenPart>,
    /// Addresses that are given to nobody, each with a name.
    #[serde(default)]
    pub reserved: BTreeMap<String, IpAddr>,
}

/// The part of a subnet that addresses are given from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GivenPart {
    /// docker's.
    Within(Subnet),
    /// podman's.
    Between(IpAddr, IpAddr),
}

/// A route that containers in a network get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRoute {
    /// Where it leads.
    pub to: Subnet,
    /// By whom.
    pub gateway: IpAddr,
    /// Its metric.
    pub metric: Option<u32>,
}

/// What an option may be.
enum Kind {
    Flag,
    Number,
    OneOf(&'static [&'static str]),
}

impl Kind {
    fn takes(&self, value: &str) -> bool {
        match self {
            Kind::Flag => matches!(value, "true" | "false" | "1" | "0"),
            Kind::Number => {
                (1..=9).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_digit())
            }
            Kind::OneOf(words) => words.contains(&value),
        }
    }
}

/// Not `passthru`: that takes all that the parent has.
const MODES: Kind = Kind::OneOf(&["bridge", "private", "vepa"]);
const GATEWAY_MODES: Kind = Kind::OneOf(&["nat", "nat-unprotected", "routed", "isolated"]);

const DOCKER_BRIDGE: &[(&str, Kind)] = &[
    ("com.docker.network.bridge.enable_icc", Kind::Flag),
    ("com.docker.network.bridge.enable_ip_masquerade", Kind::Flag),
    ("com.docker.network.bridge.inhibit_ipv4", Kind::Flag),
    ("com.docker.network.bridge.gateway_mode_ipv4", GATEWAY_MODES),
    ("com.docker.network.bridge.gateway_mode_ipv6", GATEWAY_MODES),
    ("com.docker.network.driver.mtu", Kind::Number),
];
const DOCKER_MACVLAN: &[(&str, Kind)] =
    &[("macvlan_mode", MODES), ("com.docker.network.driver.mtu", Kind::Number)];
const PODMAN_BRIDGE: &[(&str, Kind)] = &[
    ("isolate", Kind::OneOf(&["true", "false", "strict"])),
    ("metric", Kind::Number),
    ("mode", Kind::OneOf(&["managed"])),
    ("mtu", Kind::Number),
    ("no_default_route", Kind::Flag),
    ("vlan", Kind::Number),
];
const PODMAN_MACVLAN: &[(&str, Kind)] = &[
    ("bclim", Kind::Number),
    ("metric", Kind::Number),
    ("mode", MODES),
    ("mtu", Kind::Number),
    ("no_default_route", Kind::Flag),
];

/// Networks that an engine makes by itself.
fn predefined(engine: Engine) -> &'static [&'static str] {
    match engine {
        Engine::Docker => &["bridge", "default", "host", "none"],
        _ => &["podman", "host", "none"],
    }
}

/// Returns how a network is made here; an error is why it is not.
pub(super) fn judged<'a>(
    engine: Engine,
    network: &'a EngineNetwork,
    links: &HostLinks,
) -> Result<&'a NetworkDefinition, String> {
    let definition = network.definition.as_ref().map_err(Clone::clone)?;
    if predefined(engine).contains(&network.name.as_str()) {
        return Err(format!("{engine} makes it by itself"));
    }
    let options = match (engine, network.driver.as_str()) {
        (Engine::Docker, "bridge") => DOCKER_BRIDGE,
        (Engine::Docker, "macvlan") => DOCKER_MACVLAN,
        (Engine::Podman, "bridge") => PODMAN_BRIDGE,
        (Engine::Podman, "macvlan") => PODMAN_MACVLAN,
        (_, driver) => return Err(format!("Ferry makes none of {driver}")),
    };

    // What was compared is what is made.
    let subnets: Vec<String> = definition.ranges.iter().map(|r| r.subnet.to_string()).collect();
    if subnets != network.subnets {
        return Err(format!("its subnets are not those of its description: {subnets:?}"));
    }
    let known = |(key, value): &(&String, &String)| {
        options.iter().any(|(name, kind)| name == key && kind.takes(value))
    };
    if let Some((key, value)) = definition.options.iter().find(|option| !known(option)) {
        return Err(format!("Ferry makes none with the option {key}={value}"));
    }

    let link = &definition.interface;
    let there = links.names.contains(link);
    match network.driver.as_str() {
        _ if link.is_empty() => Ok(definition),
        "bridge" if there => Err(format!("its bridge is to be {link}, which is there already")),
        "macvlan" if !there => Err(format!("its parent is {link}, and no link has that name")),
        _ => Ok(definition),
    }
}

impl NetworkDefinition {
    /// Refuses what no engine says of a network.
    ///
    /// # Errors
    /// Says what is wrong.
    pub(in crate::engine) fn validate(&self) -> Result<()> {
        let reserved = self.ranges.iter().map(|range| range.reserved.len()).max().unwrap_or(0);
        let lengths = [self.ranges.len(), self.servers.len(), self.routes.len(), reserved];
        if lengths.into_iter().chain([self.options.len()]).any(|n| n > MOST) {
            bail!("a network with too many parts");
        }

        let labels = self.labels.iter();
        let bytes: usize = labels.map(|(key, value)| key.len() + value.len() + 2).sum();
        if bytes > MAX_LABELS {
            bail!("a network with labels of {bytes} bytes");
        }
        // They stand on a command line.
        let odd = |(key, value): &(&String, &String)| {
            key.is_empty() || key.contains('=') || key.contains('\0') || value.contains('\0')
        };
        if let Some((key, _)) = self.labels.iter().chain(&self.options).find(odd) {
            bail!("{key:?} is no label's name, and no option's");
        }

        let link = &self.interface;
        if !link.is_empty()
            && (link.len() > MAX_LINK || link.starts_with('-') || !valid_id(link.as_ref()))
        {
            bail!("{link:?} is no link's name");
        }
        Ok(())
    }
}
