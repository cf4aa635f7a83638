//! The network that a container has on the source, whichever kind it is of: what a migration does with it.

use anyhow::{Result, bail};

use super::floating_address;
use crate::migration::journal::workdir::WorkPath;
use crate::network::fence::{self, ArmedFence};
use crate::network::sockets::SockDiag;
use crate::network::udp_queues::UdpEndpoints;
use crate::network::{Capture, Floating, NetworkImage, Replay};
use crate::oci::cgroup::Cgroup;
use crate::sys::netns::NetNs;

/// What there is of it.
#[derive(Clone, Copy)]
pub enum ContainerNetwork<'a> {
    /// One of its own.
    Own {
        /// Where it is.
        namespace: &'a NetNs,
        /// As it was captured.
        image: &'a NetworkImage,
    },
    /// The host's, of which these addresses go along.
    Hosts(&'a Floating),
    /// None that anything goes along of.
    Nothing,
}

impl ContainerNetwork<'_> {
    /// Tells whether anybody can be connected to it.
    pub fn is_there(self) -> bool {
        !matches!(self, ContainerNetwork::Nothing)
    }

    /// The namespace, where it has one of its own.
    pub fn namespace(&self) -> Option<&NetNs> {
        match self {
            ContainerNetwork::Own { namespace, .. } => Some(namespace),
            ContainerNetwork::Hosts(_) | ContainerNetwork::Nothing => None,
        }
    }

    /// Makes ready for the freeze: the fence, and what sees what it stops. Of the host's network a note
    /// is made in `work` first.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn arm(self, migration: &str, work: &WorkPath) -> Result<Option<(ArmedFence, Capture)>> {
        Ok(match self {
            ContainerNetwork::Own { namespace, image } => {
                Some((fence::arm(namespace)?, Capture::prepare(namespace, image)?))
            }
            ContainerNetwork::Hosts(all) => Some(floating_address::arm(all, migration, work)?),
            ContainerNetwork::Nothing => None,
        })
    }

    /// Looks for the container's sockets.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn sock_diag(self, cgroup: &Cgroup) -> Result<Option<SockDiag>> {
        Ok(match self {
            ContainerNetwork::Own { namespace, .. } => Some(SockDiag::new(namespace)?),
            ContainerNetwork::Hosts(all) => Some(floating_address::sock_diag(all, cgroup)?),
            ContainerNetwork::Nothing => None,
        })
    }

    /// Returns where datagrams come in that wait to be read.
    pub fn homes(self) -> UdpEndpoints {
        match self {
            ContainerNetwork::Own { image, .. } => UdpEndpoints::of(image),
            ContainerNetwork::Hosts(all) => all.homes(),
            ContainerNetwork::Nothing => UdpEndpoints::default(),
        }
    }

    /// Through which frames that were kept come in again, when the container stays.
    ///
    /// # Errors
    /// When it cannot be made, or there is no network.
    pub fn replay(self, migration: &str) -> Result<Replay> {
        match self {
            ContainerNetwork::Own { namespace, image } => Ok(Replay::prepare(namespace, image)?),
            ContainerNetwork::Hosts(all) => floating_address::replay_here(all, migration),
            ContainerNetwork::Nothing => bail!("there is no network"),
        }
    }
}
