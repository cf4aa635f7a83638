//! What is opened when the container is released on the destination: the fence, and before it the
//! routes that lead to it and what it knows of its neighbours, so that its first words find their way
//! and are answered.

use super::fence::ArmedFence;
use super::neighbours::Neighbours;
use super::routed::HostRoutes;
use crate::problem::Problem;

/// The closed fence, and what goes before its opening.
#[derive(Debug)]
pub struct ReleaseSet {
    /// The closed fence.
    pub fence: ArmedFence,
    /// Where the host has to route.
    pub lead: Option<HostRoutes>,
    /// Where the neighbours are the container's own.
    pub neighbours: Option<Neighbours>,
}

impl ReleaseSet {
    /// Opens it. Tens of microseconds; the fence opens whatever becomes of the rest.
    pub fn open(&mut self) -> Result<(), Problem> {
        if let Some(Err(e)) = self.neighbours.as_mut().map(Neighbours::remember) {
            // Only a help: the kernel asks for them.
            tracing::warn!("{e}");
        }
        let led = self.lead.as_mut().map_or(Ok(()), HostRoutes::lead_here);
        self.fence.open().and(led)
    }
}
