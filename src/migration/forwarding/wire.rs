//! What frames go in and out by at home: the kept network, or, where only connections stay, what this host's
//! address translation was for them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Home, NETWORK, write};
use crate::network::published::Translation;
use crate::network::{EthernetFrame, forward, published};
use crate::sys::netns::NetNs;

/// In a forwarding's directory: the connections that are open.
const OPEN: &str = "open.json";

/// The container's links at home, or its published ports.
pub(super) enum Wire {
    Kept(forward::HomeLinks),
    Published(Arc<published::home::PublishedHome>, PathBuf),
}

/// Hears what comes in.
pub(super) enum IncomingFrames {
    Kept(forward::FrameReceiver),
    Published(Arc<published::home::PublishedHome>),
}

impl Wire {
    /// Opens it; nothing is heard yet.
    pub(super) fn open(directory: &Path, home: &Home) -> Result<Wire> {
        if let Some(known) = &home.published {
            let opened = published::home::PublishedHome::open(&home.id, known.clone())?;
            return Ok(Wire::Published(Arc::new(opened), directory.to_owned()));
        }
        let namespace = NetNs::open(&directory.join(NETWORK)).context("the kept network")?;
        Ok(Wire::Kept(forward::HomeLinks::open(namespace, &home.links)?))
    }

    /// Begins to hear what comes in.
    pub(super) fn listen(&self) -> Result<IncomingFrames> {
        let (home, directory) = match self {
            Wire::Kept(wire) => return Ok(IncomingFrames::Kept(wire.listen()?)),
            Wire::Published(home, directory) => (home, directory),
        };
        // After a new start; by then the engine has taken down what this host knew.
        let noted = std::fs::read(directory.join(OPEN)).ok();
        let noted = noted.and_then(|text| serde_json::from_slice::<Vec<Translation>>(&text).ok());
        let open = match noted {
            Some(noted) => noted,
            None => {
                let open = home.look()?;
                write(directory, OPEN, &open)?;
                open
            }
        };
        home.lead_here(&open)?;
        Ok(IncomingFrames::Published(home.clone()))
    }

    /// Tells whether a frame can be nobody's but the container's.
    pub(super) fn is_containers(&self, frame: &EthernetFrame) -> bool {
        match self {
            Wire::Kept(_) => true,
            Wire::Published(home, _) => home.is_containers(frame),
        }
    }

    /// Sends a frame of the container's.
    pub(super) fn send(&self, frame: &EthernetFrame) -> io::Result<()> {
        match self {
            Wire::Kept(wire) => wire.send(frame),
            Wire::Published(home, _) => home.send(frame),
        }
    }

    /// What has to be done now and then.
    pub(super) fn tend(&self) {
        if let Wire::Published(home, directory) = self
            && let Some(open) = home.tend()
            && let Err(e) = write(directory, OPEN, &open)
        {
            tracing::warn!("{e:#}");
        }
    }
}

impl IncomingFrames {
    pub(super) fn read(
        &self,
        buffer: &mut [u8],
        frames: &mut Vec<EthernetFrame>,
    ) -> io::Result<()> {
        match self {
            IncomingFrames::Kept(ear) => ear.read(buffer, frames),
            IncomingFrames::Published(home) => home.read(buffer, frames),
        }
    }
}

impl AsFd for IncomingFrames {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            IncomingFrames::Kept(ear) => ear.as_fd(),
            IncomingFrames::Published(home) => home.as_fd(),
        }
    }
}
