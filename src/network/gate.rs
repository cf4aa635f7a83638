//! What is opened when the container is released on the destination: the fence, and before it the
//! routes that lead to it and what it knows of its neighbours, so that its first words find their way
//! and are answered.

use super::fence::Armed;
use super::neighbours::Neighbours;
use super::routed::Lead;
use crate::problem::Problem;

/// See the module.
#[derive(Debug)]
pub struct Gate {
    /// The closed fence.
    pub fence: Armed,
    /// Where the host has to route.
    pub lead: Option<Lead>,
    /// Where the neighbours are the container's own.
    pub neighbours: Option<Neighbours>,
}

impl Gate {
    /// Opens it. Tens of microseconds; the fence opens whatever becomes of the rest.
    pub fn open(&mut self) -> Result<(), Problem> {
        if let Some(Err(e)) = self.neighbours.as_mut().map(Neighbours::remember) {
            // Only a help: the kernel asks for them.
            tracing::warn!("{e}");
        }
        let led = self.lead.as_mut().map_or(Ok(()), Lead::lead_here);
        self.fence.open().and(led)
    }
}
