//! What the user asked for.

use std::path::PathBuf;

use crate::migration::protocol::How;
use crate::migration::protocol::forwarding::ForwardOption;
use crate::network::Placement;
use crate::network::floating::MoveAddress;
use crate::oci::container_id::ContainerId;

/// What the user asked for, as far as the plan depends on it.
#[derive(Clone, Debug)]
pub struct MigrateOptions {
    /// Container ID.
    pub container: ContainerId,
    /// The bundle's place on the destination.
    pub bundle: Option<PathBuf>,
    /// `--network`.
    pub placement: Placement,
    /// `--move-address`.
    pub move_address: Vec<MoveAddress>,
    /// `--console-socket`.
    pub console_socket: Option<PathBuf>,
    /// The runtime's global flags, as the user gave them.
    pub root: Option<PathBuf>,
    /// See `root`.
    pub systemd_cgroup: bool,
    /// `--forward`.
    pub forward: ForwardOption,
    /// `--verify`.
    pub verify: bool,
    /// Only checks.
    pub check_only: bool,
    /// `--rootfs`.
    pub rootfs: How,
    /// `--image never`: an engine's image must be there.
    pub no_image: bool,
    /// `--network-create never`: an engine's networks must be there.
    pub no_networks: bool,
    /// `--volume`: a mount's place in the container, and how.
    pub volumes: Vec<(PathBuf, How)>,
    /// Where the away-marks are; without it nobody looks for one.
    pub state_dir: Option<PathBuf>,
}
