//! What goes from one host to the other about an engine's container, beside the container itself.
//!
//! [`EngineWants`] is in the plan: what has to be there, so that all that is missing is told before anything
//! is touched. [`Papers`] follow when the migration has begun: the container in the engine's own words.
//! [`Made`] is in the journal: what there is to undo.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Engine;
use super::image::{ImageCourse, MadeImage};
use super::networks::MadeNetwork;
use super::networks::definition::NetworkDefinition;
use crate::oci::container_id::{ContainerId, valid_id};

/// Most volumes, networks and ports of one container.
const MOST: usize = 256;
/// Most others in its networks: a bridge of Linux's has no more ports.
const MOST_NEIGHBOURS: usize = 1024;
/// The longest name of any of them.
const MAX_NAME: usize = 255;
/// The longest name of an image: a registry, a path, a tag, a digest.
const MAX_IMAGE_NAME: usize = 4096;
/// Most layers of one: overlayfs takes no more.
const MOST_LAYERS: usize = 500;
/// Most bytes of a container in the engine's words.
const MAX_PAPERS: usize = 1 << 20;
/// The longest reason why a network is not made.
const MAX_WHY: usize = 4096;

/// What a container needs of its engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineWants {
    /// Engine that has it.
    pub engine: Engine,
    /// Its version.
    pub version: String,
    /// As it calls the container.
    pub name: String,
    /// As it calls the runtime.
    pub runtime: String,
    /// Where it keeps things.
    pub store: EngineStore,
    /// What the container was made of.
    pub image: EngineImage,
    /// Volumes that are the engine's.
    pub volumes: Vec<Volume>,
    /// Networks that it is in.
    pub networks: Vec<EngineNetwork>,
    /// Addresses that it has and that cannot be asked for.
    #[serde(default)]
    pub given: Vec<IpAddr>,
    /// Ports of the host that lead to it.
    pub ports: Vec<PublishedPort>,
    /// The engine's other containers in its bridge networks: they stay. None where they are not to reach it
    /// afterwards.
    #[serde(default)]
    pub neighbours: Vec<NeighbourContainer>,
    /// Mounts of the container that the engine makes itself.
    pub own: Vec<PathBuf>,
    /// Bytes of its log.
    pub log: Option<u64>,
    /// Where that is on the source.
    #[serde(skip)]
    pub log_path: Option<PathBuf>,
}

/// Where an engine keeps things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStore {
    /// Images and containers.
    pub root: PathBuf,
    /// What is gone with a reboot.
    pub run: PathBuf,
    /// Volumes.
    pub volumes: PathBuf,
    /// How layers are put together.
    pub driver: String,
}

/// An image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineImage {
    /// By what is in it.
    pub id: String,
    /// By its name.
    pub name: String,
    /// Digests of its layers' archives, from the first.
    #[serde(default)]
    pub layers: Vec<String>,
    /// Bytes of what is in it.
    #[serde(default)]
    pub bytes: u64,
    /// `--image never`: it must be there.
    #[serde(default)]
    pub never: bool,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Where the container has it.
    pub place: PathBuf,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineNetwork {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub driver: String,
    /// What it has addresses of.
    pub subnets: Vec<String>,
    /// How it is made; or why Ferry does not make it.
    #[serde(default = "unknown")]
    pub definition: Result<NetworkDefinition, String>,
}

fn unknown() -> Result<NetworkDefinition, String> {
    Err("the other host does not say how it is made".into())
}

/// What becomes on the destination of what a container needs of its engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineCourse {
    /// The image that it was made of.
    pub image: ImageCourse,
    /// Networks that will be made, by their names.
    #[serde(default)]
    pub networks: Vec<String>,
}

/// Another container in a network of the container's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighbourContainer {
    /// As the engine calls it.
    pub name: String,
    /// The network.
    pub network: String,
    /// Its address there.
    pub address: Ipv4Addr,
}

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// On which of the host's addresses; empty for all.
    pub address: String,
    /// On the host.
    pub port: u16,
    /// In the container.
    pub inside: u16,
    /// `tcp`, `udp`, `sctp`.
    pub protocol: String,
}

/// A container in the words of its engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Papers {
    /// How it was asked for.
    pub config: Value,
    /// How the runtime was asked for it.
    pub spec: Value,
    /// Its addresses.
    pub network: Value,
}

/// What a migration makes on the destination that is the engine's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Engine that has it.
    pub engine: Engine,
    /// The container.
    pub container: String,
    /// As the engine calls it; empty where that was not noted.
    #[serde(default)]
    pub name: String,
    /// Volumes that are to be made.
    pub volumes: Vec<String>,
    /// Networks that are to be.
    #[serde(default)]
    pub networks: Vec<MadeNetwork>,
    /// The image that is to be, or its name.
    #[serde(default)]
    pub image: Option<MadeImage>,
    /// A file with the names of those that have been: somebody else may have made one of that name. And
    /// with the container's ID here, where the engine has given it another one.
    pub noted: PathBuf,
    /// Where what the container has changed of its image is, until the engine has made a place for it.
    pub upper: PathBuf,
    /// The same for its log.
    pub log: PathBuf,
}

/// Of an ID: what has fewer is no beginning of one.
const FEWEST_DIGITS: usize = 4;
/// Before the container's ID, among the names of volumes: none has a blank.
const CONTAINER: &str = "container ";

impl Made {
    /// Notes that a volume has been made.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn note_volume(&self, name: &str) -> Result<()> {
        self.note(name)
    }

    /// Notes the container's ID here.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn note_container(&self, id: &str) -> Result<()> {
        self.note(&format!("{CONTAINER}{id}"))
    }

    /// Returns where the image's archive is as long as it comes.
    pub fn archive(&self) -> PathBuf {
        self.upper.with_extension("image")
    }

    /// Tells whether a line has been noted.
    pub(super) fn has_noted(&self, line: &str) -> bool {
        let noted = fs::read_to_string(&self.noted).unwrap_or_default();
        noted.lines().any(|one| one == line)
    }

    /// Returns the word that has been noted behind others.
    pub(super) fn noted_behind(&self, words: &str) -> Option<String> {
        let noted = fs::read_to_string(&self.noted).ok()?;
        let mut lines = noted.lines().filter_map(|line| line.strip_prefix(words));
        lines.find_map(|rest| rest.strip_prefix(' ')).map(str::to_owned)
    }

    /// Notes something, in a line of its own.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn note(&self, line: &str) -> Result<()> {
        let what = || format!("cannot write {}", self.noted.display());
        let mut noted = File::options();
        let noted = noted.create(true).append(true).mode(0o600).open(&self.noted);
        noted.and_then(|mut file| writeln!(file, "{line}")).with_context(what)
    }

    /// The volumes that have been made.
    pub(super) fn made_volumes(&self) -> Vec<&str> {
        let noted = fs::read_to_string(&self.noted).unwrap_or_default();
        let made = |name: &&str| noted.lines().any(|line| line == *name);
        self.volumes.iter().map(String::as_str).filter(made).collect()
    }

    /// The container's ID at the runtime here, where it is not the one by which the migration goes.
    pub fn id_here(&self) -> Option<ContainerId> {
        let noted = fs::read_to_string(&self.noted).ok()?;
        let id = noted.lines().find_map(|line| line.strip_prefix(CONTAINER))?;
        id.parse().ok()
    }

    /// Tells whether an operator means this one: by its name, with or without its engine's (`docker:web`), or
    /// by an ID that it has here or the beginning of one.
    pub fn is_meant_by(&self, word: &str) -> bool {
        let (engine, word) = match word.split_once(':') {
            Some((engine, word)) => (Engine::of_word(engine), word),
            None => (None, word),
        };
        let begins = |id: &str| word.len() >= FEWEST_DIGITS && id.starts_with(word);
        engine.is_none_or(|engine| engine == self.engine)
            && (self.name == word && !word.is_empty()
                || begins(&self.container)
                || self.id_here().is_some_and(|id| begins(&id)))
    }

    /// On the source: whose it is.
    pub fn nothing(wanted: &EngineWants, container: &str) -> Made {
        Made {
            engine: wanted.engine,
            container: container.to_owned(),
            name: wanted.name.clone(),
            volumes: Vec::new(),
            networks: Vec::new(),
            image: None,
            noted: PathBuf::new(),
            upper: PathBuf::new(),
            log: PathBuf::new(),
        }
    }
}

fn plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|c| !matches!(c, Component::ParentDir))
}

impl EngineWants {
    /// Refuses what no honest source sends.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn validate(&self) -> Result<()> {
        if self
            .volumes
            .len()
            .max(self.networks.len())
            .max(self.ports.len())
            .max(self.own.len())
            .max(self.given.len())
            > MOST
            || self.neighbours.len() > MOST_NEIGHBOURS
        {
            bail!("an engine's container with too many parts");
        }

        let names = [&self.name, &self.runtime, &self.store.driver]
            .into_iter()
            .chain(self.volumes.iter().map(|v| &v.name))
            .chain(self.networks.iter().map(|n| &n.name))
            .chain(self.neighbours.iter().flat_map(|n| [&n.name, &n.network]));
        for name in names {
            // No engine has others; and they stand on command lines.
            if name.starts_with('-') || name.len() > MAX_NAME || !valid_id(name.as_ref()) {
                bail!("{name:?} is no name");
            }
        }

        let store = [&self.store.root, &self.store.run, &self.store.volumes];
        let places = self.volumes.iter().map(|v| &v.place).chain(&self.own);
        if let Some(odd) = store.into_iter().chain(places).find(|path| !plain(path)) {
            bail!("{} is no absolute path without ..", odd.display());
        }

        self.image.validate()?;
        for network in &self.networks {
            match &network.definition {
                Ok(definition) => definition.validate()?,
                Err(why) if why.len() > MAX_WHY => bail!("a reason of {} bytes", why.len()),
                Err(_) => {}
            }
        }

        let odd = |port: &&PublishedPort| {
            !port.address.is_empty() && port.address.parse::<IpAddr>().is_err()
        };

        if let Some(port) = self.ports.iter().find(odd) {
            bail!("{:?} is no address", port.address);
        }
        Ok(())
    }
}

impl EngineImage {
    /// Refuses what no engine says of an image. What is left of a name stands on command lines, and in requests.
    fn validate(&self) -> Result<()> {
        let hex = |digest: &String| {
            let digits = digest.strip_prefix("sha256:").unwrap_or(digest);
            digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if let Some(odd) = [&self.id].into_iter().chain(&self.layers).find(|d| !hex(d)) {
            bail!("{odd:?} is no image's ID, and no layer's");
        }

        let plain = |c: char| c.is_ascii_alphanumeric() || "/_.:@-".contains(c);
        let name = &self.name;
        if name.is_empty()
            || name.starts_with(['-', '/'])
            || name.contains("..")
            || name.len() > MAX_IMAGE_NAME
            || !name.chars().all(plain)
        {
            bail!("{name:?} is no image's name");
        }
        if self.layers.len() > MOST_LAYERS {
            bail!("an image of {} layers", self.layers.len());
        }

        Ok(())
    }
}

impl Papers {
    /// Refuses what is longer than any.
    ///
    /// # Errors
    /// Says so.
    pub fn validate(&self) -> Result<()> {
        let bytes = [&self.config, &self.spec, &self.network]
            .map(|value| serde_json::to_vec(value).map_or(usize::MAX, |text| text.len()));
        if bytes.iter().any(|n| *n > MAX_PAPERS) {
            bail!("an engine's description of a container that has no end");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_meant_by_its_name_or_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let made = Made {
            engine: Engine::Docker,
            container: "0123456789abcdef".into(),
            name: "web".into(),
            volumes: Vec::new(),
            networks: Vec::new(),
            image: None,
            noted: dir.path().join("noted"),
            upper: PathBuf::new(),
            log: PathBuf::new(),
        };
        for word in ["web", "docker:web", "0123", "docker:0123456789abcdef"] {
            assert!(made.is_meant_by(word), "{word}");
        }
        for word in ["", "docker:", "podman:web", "we", "012", "1234", "fedc"] {
            assert!(!made.is_meant_by(word), "{word}");
        }
        // The one that docker has given it here.
        made.note_container("fedcba9876543210").unwrap();
        assert!(made.is_meant_by("fedc") && made.is_meant_by("0123"));
        let nameless = Made { name: String::new(), ..made };
        assert!(!nameless.is_meant_by("") && !nameless.is_meant_by("docker:"));
    }
}
