//! What the source tells of the container before anything is made, and what of it is believed.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::forwarding::ForwardRequest;
use crate::engine::papers::EngineWants;
use crate::files::overlay::Overlay;
use crate::files::place::Parent;
use crate::files::probe::Proof;
use crate::files::tmpfs::{self, Tmpfs};
use crate::network::image::{LinkKind, NetworkImage};
use crate::network::{Floating, Placement};
use crate::oci::bundle::Bundle;
use crate::oci::container_id::ContainerId;
use crate::tasks::settings;

/// Most probes and bind mounts of one plan.
pub const MAX_PROBES: usize = 4096;
/// Most directories above them.
pub const MAX_PARENTS: usize = 4096;

/// What the container is and needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// ID of this migration: 16 hexadecimal digits.
    pub migration: String,
    /// Only the checks are wanted.
    pub check_only: bool,
    /// The container's ID.
    pub container: ContainerId,
    /// What the source calls itself.
    #[serde(default)]
    pub source: String,
    /// The bundle's directory on the destination.
    pub bundle: PathBuf,
    /// The source's config.json.
    pub config: Value,
    /// The runtime's `--root`, where the user gave one.
    pub root: Option<PathBuf>,
    /// The runtime's `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// CPUs that threads are bound to.
    #[serde(default)]
    pub bound_cpus: Vec<String>,
    /// AppArmor profiles of its tasks.
    #[serde(default)]
    pub apparmor: Vec<String>,
    /// What the standard streams are: the targets of `/proc/PID/fd/{0,1,2}`.
    pub streams: Vec<Stream>,
    /// A socket on the destination that takes the terminal.
    pub console_socket: Option<PathBuf>,
    /// Bytes of memory that will come at most.
    pub memory_bytes: u64,
    /// Of these and of files without a name, what comes among the images.
    #[serde(default)]
    pub imaged_bytes: u64,
    /// Of these, shared memory that is in place over there before the images come.
    #[serde(default)]
    pub shared_bytes: u64,
    /// Bytes that the container has in memory now.
    pub resident_bytes: u64,
    /// The source's CPU, to compare.
    pub cpu: Vec<String>,
    /// The source's machine (`uname -m`) and kernel release.
    pub machine: String,
    /// Kernel release of the source.
    pub kernel: String,
    /// CRIU's version on the source, as 40201 for 4.2.1.
    pub criu: u32,
    /// What must be the same on both hosts, and how that is proved.
    pub probes: Vec<Probe>,
    /// The directories above it on the source, each once: what is missing there is made as they are.
    #[serde(default)]
    pub parents: Vec<Parent>,
    /// The root file system, where it is an overlay that can go layer by layer: paths of the
    /// destination.
    #[serde(default)]
    pub overlay: Option<Overlay>,
    /// The tmpfs mounts that Ferry carries, numbered in this order.
    pub tmpfs: Vec<Tmpfs>,
    /// The network as captured; none where the container has none of its own.
    pub network: Option<NetworkImage>,
    /// What goes along of the host's network, where the container uses that.
    #[serde(default)]
    pub floating: Option<Floating>,
    /// The loopback device of a namespace without a name: runc has CRIU leave it out.
    pub loopback: Option<NetworkImage>,
    /// The namespace's path, where it has one.
    pub network_path: Option<PathBuf>,
    /// `--network`.
    pub placement: Placement,
    /// `--verify`.
    #[serde(default)]
    pub verify: bool,
    /// What is to become of the address.
    #[serde(default)]
    pub forward: ForwardRequest,
    /// What it needs of its engine, if it is an engine's.
    #[serde(default)]
    pub engine: Option<EngineWants>,
}

/// A standard stream of the container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// As `/proc/PID/fd/N` shows it: `pipe:[123]`, `/dev/null`, `/dev/pts/0`, `/var/log/web.log`.
    pub target: String,
    /// CRIU's key for a regular file that lies outside the container: `file[MNT:INO]`.
    pub external: Option<String>,
    /// Bytes of that file when it was looked at.
    pub size: u64,
    /// Its mode, owner and group: CRIU wants to find them so.
    pub mode: u32,
    /// See `mode`.
    pub owner: (u32, u32),
    /// Whether its contents go over the link (the source's own note).
    #[serde(skip)]
    pub sent: bool,
    /// Of its directory, for the destination to find out whether the file is shared.
    pub proof: Option<Proof>,
}

/// One path, and the proof that both hosts see the same behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What it is: `root file system`, `bind mount /srv/www`.
    pub what: String,
    /// Its place in the configuration, for the destination to find its own path.
    pub place: Place,
    /// The proof.
    pub proof: Proof,
    /// What the user says of it.
    pub wish: How,
    /// Whether it is a directory.
    pub directory: bool,
    /// Whether it is a regular file.
    #[serde(default)]
    pub file: bool,
    /// Whether the container cannot write there.
    pub read_only: bool,
}

/// How a path of the container's gets to the other host: `--rootfs`, `--volume`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// As it turns out: the root file system is copied where it is not shared, no volume is.
    #[default]
    Auto,
    /// It is there, and nobody has to prove it.
    Shared,
    /// A copy is made, unless it is shared.
    Copy,
}

impl Place {
    /// Its path on this host.
    pub fn path(&self, bundle: &Bundle) -> Option<PathBuf> {
        match self {
            Place::Rootfs => bundle.rootfs().ok(),
            Place::Mount(destination) => {
                let mounts = bundle.bind_mounts();
                mounts.into_iter().find(|m| m.destination == *destination).map(|m| m.source)
            }
        }
    }
}

/// Where a path stands in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// `root.path`.
    Rootfs,
    /// The bind mount with this destination.
    Mount(PathBuf),
}

impl Plan {
    /// Refuses what no honest source sends, before anything is done with it.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn validate(&self) -> Result<()> {
        let hex = |s: &str| s.len() == 16 && s.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex(&self.migration) {
            bail!("{:?} is no migration's ID", self.migration);
        }

        // HOST_NAME_MAX; it is shown to people.
        if self.source.len() > 64 || self.source.contains(|c: char| c.is_control()) {
            bail!("{:?} is no host's name", self.source);
        }
        if !self.bundle.is_absolute() {
            bail!("the bundle's path must be absolute");
        }

        if self.streams.len() > 3
            || self.bound_cpus.len() > settings::MOST_LISTS
            || self.probes.len() > MAX_PROBES
            || self.parents.len() > MAX_PARENTS
        {
            bail!("a plan with too many entries");
        }

        for path in self.network_path.iter().chain(&self.console_socket).chain(&self.root) {
            let plain = path.components().all(|c| !matches!(c, std::path::Component::ParentDir));
            if !path.is_absolute() || !plain {
                bail!("{} is no absolute path without ..", path.display());
            }
        }

        self.forward.validate()?;
        self.overlay.iter().try_for_each(Overlay::validate)?;
        tmpfs::validate(&self.tmpfs)?;
        for network in self.network.iter().chain(&self.loopback) {
            network.validate()?;
        }

        if self.floating.is_some() && self.network.is_some() {
            bail!("a container with the host's network and one of its own");
        }
        self.floating.iter().try_for_each(Floating::validate)?;
        self.engine.iter().try_for_each(EngineWants::validate)?;

        Ok(())
    }

    /// Tells whether CRIU runs in the container's network namespace, on both sides: what it writes on
    /// the one must be read in the same place on the other. It can where it can talk to itself.
    pub fn criu_inside(&self) -> bool {
        let up =
            |image: &NetworkImage| image.links.iter().any(|l| l.kind == LinkKind::Loopback && l.up);
        self.network.as_ref().is_some_and(up)
    }
}
