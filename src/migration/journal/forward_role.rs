//! What a migration does about forwarding on this host.

use serde::{Deserialize, Serialize};

use crate::migration::protocol::Plan;
use crate::migration::protocol::forwarding::AddressDecision;
use crate::network::translated::Translated;

/// What a migration does about forwarding on this host: for whoever has to undo or finish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForwardRole {
    /// The container leaves home.
    Leaves,
    /// It moves on from here to another host that is not its home.
    MovesOn,
    /// It goes home from here.
    GoesHome,
    /// It goes from here to where its address moves, too: forwarding ends.
    Ends,
    /// It comes here from elsewhere.
    Arrives,
    /// It comes home.
    ComesHome,
    /// It leaves, and its address; connections by this host's address translation are forwarded.
    LeavesConnections,
    /// It comes here from where such connections are.
    ArrivesWithoutConnections,
}

/// See [`ForwardRole`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRecord {
    /// The forwarding's ID: that of the migration that it began with.
    pub id: String,
    /// This host's part.
    pub part: ForwardRole,
}

impl ForwardRecord {
    /// The source's part in what the destination has decided.
    pub fn of_source(plan: &Plan, course: AddressDecision) -> Option<ForwardRecord> {
        let (id, part) = match (&plan.forward.from, course) {
            (None, AddressDecision::Moves | AddressDecision::Home) => return None,
            (None, AddressDecision::Stays) => (&plan.migration, ForwardRole::Leaves),
            // One that is forwarded so already is refused beforehand.
            (_, AddressDecision::Published) => (&plan.migration, ForwardRole::LeavesConnections),
            (Some((id, _)), AddressDecision::Stays) => (id, ForwardRole::MovesOn),
            (Some((id, _)), AddressDecision::Home) => (id, ForwardRole::GoesHome),
            (Some((id, _)), AddressDecision::Moves) => (id, ForwardRole::Ends),
        };
        Some(ForwardRecord { id: id.clone(), part })
    }

    /// For people: what will become of the address.
    pub fn words(&self, plan: &Plan) -> &'static str {
        let Translated { flows, published } = &plan.forward.translated;
        match self.part {
            ForwardRole::Leaves if !flows.is_empty() => {
                "its address stays here, as connections live by this host's address translation; packets are forwarded"
            }
            ForwardRole::Leaves if *published => {
                "its address stays here, as this host publishes a port of it; packets are forwarded"
            }
            ForwardRole::Leaves => "its address stays here, packets are forwarded",
            ForwardRole::LeavesConnections if !flows.is_empty() => {
                "connections that live by this host's address translation are forwarded, as are its published ports here"
            }
            ForwardRole::LeavesConnections
                if plan.engine.as_ref().is_some_and(|wanted| wanted.ports.is_empty()) =>
            {
                "what its neighbours here and it say to each other is forwarded"
            }
            ForwardRole::LeavesConnections => "its published ports here are forwarded",
            ForwardRole::ArrivesWithoutConnections => {
                "connections by its host before are forwarded"
            }
            ForwardRole::MovesOn => "its address stays at home, packets are forwarded from there",
            ForwardRole::GoesHome | ForwardRole::ComesHome => "it comes home to its address",
            ForwardRole::Ends => "its address moves, and is not forwarded any more",
            ForwardRole::Arrives => "its address stays where it is, packets are forwarded",
        }
    }

    /// The destination's part in what it has decided itself.
    pub fn of_destination(plan: &Plan, course: AddressDecision) -> Option<ForwardRecord> {
        let part = match course {
            AddressDecision::Moves => return None,
            AddressDecision::Stays => ForwardRole::Arrives,
            AddressDecision::Home => ForwardRole::ComesHome,
            AddressDecision::Published => ForwardRole::ArrivesWithoutConnections,
        };
        let id = plan.forward.from.as_ref().map_or(&plan.migration, |f| &f.0);
        Some(ForwardRecord { id: id.clone(), part })
    }
}
