//! Networks that a container is in: where the destination's engine lacks one, it is made there.
//!
//! ```text
//! source                                    destination
//!   how the engine has made it  ───────▶    look      there; lacking, and can be made
//!                                           make      noted, asked for, noted by its ID
//!                                           (or, at any error, discard)
//! ```
//!
//! It gets the name, and with it what belongs to that: subnets, gateways, options, labels. Who asks for
//! such a network at the engine would get the same. What was made is taken away again by its ID, if nobody
//! has come to use it; one that was there before, or that somebody else has made meanwhile, never.

pub(crate) mod definition;
pub(crate) mod subnet;

use std::net::IpAddr;

use anyhow::{Result, anyhow, bail};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use serde::{Deserialize, Serialize};

use self::definition::{AddressRange, NetworkDefinition, judged};
use self::subnet::Subnet;
use super::Engine;
use super::papers::{EngineNetwork, EngineWants, Made};
use crate::problem::Problem;
use crate::sys::{fault, host};

/// Before a network's name among what has been noted.
const NETWORK: &str = "network";
/// Instead of its ID: it was not made.
const REFUSED: &str = "refused";

/// A network of an engine's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FoundNetwork {
    /// Hexadecimal digits.
    pub id: String,
    /// What it is.
    pub network: EngineNetwork,
}

/// What an engine says when it is asked to make one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NetworkAnswer {
    /// It is made, and has this ID.
    Made(String),
    /// It is not, in the engine's own words.
    Refused(String),
}

/// An engine's networks.
pub(crate) trait NetworkStore: Sync {
    /// Returns all that there are.
    ///
    /// # Errors
    /// When the engine does not say.
    fn all(&self) -> Result<Vec<FoundNetwork>>;

    /// Asks for one.
    ///
    /// # Errors
    /// When there is no answer: it may be made.
    fn create(
        &self,
        network: &EngineNetwork,
        definition: &NetworkDefinition,
    ) -> Result<NetworkAnswer>;

    /// What has become of one that was asked for, when whoever asked has not heard the answer.
    ///
    /// # Errors
    /// When the engine does not say.
    fn outcome(&self, name: &str) -> Result<Option<FoundNetwork>>;

    /// Returns the containers that are in it, or are to be when they are started.
    ///
    /// # Errors
    /// When the engine does not say.
    fn users(&self, found: &FoundNetwork) -> Result<Vec<String>>;

    /// Takes one away.
    ///
    /// # Errors
    /// When the engine does not: also if it is used.
    fn remove(&self, id: &str) -> Result<()>;
}

/// What a migration makes of a network on the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeNetwork {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub driver: String,
    /// What it has addresses of.
    pub subnets: Vec<String>,
}

impl MadeNetwork {
    fn is(&self, other: &EngineNetwork) -> bool {
        self.name == other.name && self.driver == other.driver && self.subnets == other.subnets
    }
}

/// Links of this host, and what they have addresses of.
#[derive(Clone, Debug, Default)]
pub(super) struct HostLinks {
    names: Vec<String>,
    subnets: Vec<(String, Subnet)>,
}

impl HostLinks {
    fn look() -> Result<HostLinks> {
        let address = |said: Option<&SockaddrStorage>| -> Option<IpAddr> {
            let v4 = said?.as_sockaddr_in().map(|address| address.ip().into());
            v4.or_else(|| Some(said?.as_sockaddr_in6()?.ip().into()))
        };

        let mut links = HostLinks::default();
        // Each link has at least its hardware address among these.
        for one in getifaddrs()? {
            if let (Some(own), Some(mask)) =
                (address(one.address.as_ref()), address(one.netmask.as_ref()))
            {
                let subnet = Subnet::masked(own, mask);
                links.subnets.push((one.interface_name.clone(), subnet));
            }
            if !links.names.contains(&one.interface_name) {
                links.names.push(one.interface_name);
            }
        }
        Ok(links)
    }
}

/// What becomes of a network on the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NetworkCourse {
    /// It is there.
    There,
    /// It is made.
    Made,
}

/// Finds out which networks will be made here, and what is in the way.
///
/// # Errors
/// When the engine does not say what there is.
pub(super) fn look(
    store: &dyn NetworkStore,
    wanted: &EngineWants,
) -> Result<(Vec<String>, Vec<Problem>)> {
    let (there, links, here) = (store.all()?, HostLinks::look()?, host::name());
    let (mut made, mut problems) = (Vec::new(), Vec::new());
    for network in &wanted.networks {
        match decide(wanted.engine, network, &there, &links, &here) {
            Ok(NetworkCourse::There) => {}
            Ok(NetworkCourse::Made) => made.push(network.name.clone()),
            Err(problem) => problems.push(*problem),
        }
    }
    Ok((made, problems))
}

/// What becomes of a network, by what there is.
fn decide(
    engine: Engine,
    wanted: &EngineNetwork,
    there: &[FoundNetwork],
    links: &HostLinks,
    here: &str,
) -> Result<NetworkCourse, Box<Problem>> {
    if let Some(found) = there.iter().find(|found| found.network.name == wanted.name) {
        let found = &found.network;
        // No address is asked for in docker's default one.
        let any = engine == Engine::Docker && wanted.name == "bridge";
        let same = found.driver == wanted.driver && (any || found.subnets == wanted.subnets);
        if !same {
            return Err(Box::new(another(engine, wanted, found, here)));
        }
        return Ok(NetworkCourse::There);
    }

    match judged(engine, wanted, links) {
        Ok(definition) => match collision(engine, wanted, definition, there, links) {
            None => Ok(NetworkCourse::Made),
            Some(why) => Err(Box::new(
                Problem::new(
                    format!("{engine} on {here} cannot make the network {}", wanted.name),
                    why,
                )
                .hint(
                    "remove there what is of no use any more; or make the container's network with another \
                     subnet",
                ),
            )),
        },
        Err(why) => Err(Box::new(lacking(engine, wanted, why, here))),
    }
}

/// Why the engine would refuse to make it, in its own words: it says so only when it is asked to. And a bridge in
/// a subnet that a link of the host is in would cut off whom the host reaches by that.
fn collision(
    engine: Engine,
    wanted: &EngineNetwork,
    definition: &NetworkDefinition,
    there: &[FoundNetwork],
    links: &HostLinks,
) -> Option<String> {
    let bridge = wanted.driver == "bridge";
    // podman lets any number of macvlans have the same.
    if engine == Engine::Podman && !bridge {
        return None;
    }
    let words = |subnet: &Subnet| match engine {
        Engine::Podman => {
            format!("subnet {subnet} is already used on the host or by another config")
        }
        _ => "Pool overlaps with other one on this address space".to_owned(),
    };

    for AddressRange { subnet, .. } in &definition.ranges {
        for found in there {
            let subnets = found.network.subnets.iter().filter_map(|s| s.parse::<Subnet>().ok());
            if let Some(other) = subnets.into_iter().find(|other| other.overlaps(subnet)) {
                let name = &found.network.name;
                return Some(format!("its network {name} has {other}: {}", words(subnet)));
            }
        }
        let mut taken = links.subnets.iter().filter(|(_, other)| other.overlaps(subnet));
        if let Some((link, other)) = taken.next().filter(|_| bridge) {
            return Some(format!("{link} has {other}, which overlaps {subnet}"));
        }
    }

    None
}

/// A network of that name that is another one.
fn another(engine: Engine, wanted: &EngineNetwork, found: &EngineNetwork, here: &str) -> Problem {
    Problem::new(
        format!("{engine}'s network {} on {here} is another one", wanted.name),
        format!(
            "{} {}, and not {} {}",
            found.driver,
            found.subnets.join(" "),
            wanted.driver,
            wanted.subnets.join(" ")
        ),
    )
    .hint(
        "the container keeps its addresses: make the network there with the same driver and subnets, or \
         remove it there, and Ferry makes it",
    )
}

/// A network that is not here, and is not made.
fn lacking(engine: Engine, wanted: &EngineNetwork, why: String, here: &str) -> Problem {
    let name = &wanted.name;
    let subnets: String = wanted.subnets.iter().map(|s| format!(" --subnet {s}")).collect();
    Problem::new(format!("{engine} on {here} has no network {name}"), why).hint(format!(
        "`{engine} network create --driver {}{subnets} {name}` on {here}",
        wanted.driver
    ))
}

/// Returns what there will be to undo.
pub(crate) fn made(wanted: &EngineWants, names: &[String]) -> Vec<MadeNetwork> {
    let new = wanted.networks.iter().filter(|network| names.contains(&network.name));
    let made = new.map(|network| MadeNetwork {
        name: network.name.clone(),
        driver: network.driver.clone(),
        subnets: network.subnets.clone(),
    });
    made.collect()
}

/// Makes those that are to be; each is noted before.
///
/// # Errors
/// When the engine does not, in its own words; when somebody else has made one meanwhile.
pub(super) fn make(store: &dyn NetworkStore, wanted: &EngineWants, made: &Made) -> Result<()> {
    let engine = made.engine;
    for MadeNetwork { name, .. } in &made.networks {
        let network = wanted.networks.iter().find(|network| network.name == *name);
        let network = network.ok_or_else(|| anyhow!("a network that is not wanted"))?;
        // A parent may be gone meanwhile, or there a bridge.
        let definition = judged(engine, network, &HostLinks::look()?)
            .map_err(|why| anyhow!("the network {name} is not made: {why}"))?;
        if store.all()?.iter().any(|found| found.network.name == *name) {
            bail!("{engine} has a network {name} meanwhile, which somebody else has made");
        }

        made.note(&format!("{NETWORK} {name}"))?;
        fault::point("destination.network-asked")?;
        match store.create(network, definition)? {
            NetworkAnswer::Made(id) => {
                fault::point("destination.network-made")?;
                made.note(&format!("{NETWORK} {name} {id}"))?;
            }
            NetworkAnswer::Refused(why) => {
                made.note(&format!("{NETWORK} {name} {REFUSED}"))?;
                bail!("{engine} does not make the network {name}: {why}");
            }
        }
    }
    Ok(())
}

/// Takes away what has been made, if nobody else has come to use it. What stays though it should not.
///
/// # Errors
/// When the engine does not say what there is.
pub(super) fn discard(store: &dyn NetworkStore, made: &Made) -> Result<Vec<String>> {
    let mut stays = Vec::new();
    for network in &made.networks {
        let (engine, name) = (made.engine, &network.name);
        let Some(found) = noted(store, made, network)? else { continue };
        let users = store.users(&found)?;
        if !users.is_empty() {
            let users = users.join(", ");
            tracing::warn!(
                "{engine}'s network {name}, made for what was to come, stays: {users} needs it"
            );
            continue;
        }
        if let Err(e) = store.remove(&found.id) {
            stays.push(format!("the network {name}: {e:#}"));
        }
    }
    Ok(stays)
}

/// The one that has been made, if it has and is there.
fn noted(
    store: &dyn NetworkStore,
    made: &Made,
    network: &MadeNetwork,
) -> Result<Option<FoundNetwork>> {
    let asked = format!("{NETWORK} {}", network.name);
    if !made.has_noted(&asked) {
        return Ok(None);
    }
    match made.noted_behind(&asked).as_deref() {
        Some(REFUSED) => Ok(None),
        Some(id) => Ok(store.all()?.into_iter().find(|found| found.id == id)),
        // There was none of that name when it was asked for.
        None => Ok(store.outcome(&network.name)?.filter(|found| network.is(&found.network))),
    }
}

#[cfg(test)]
mod tests;
