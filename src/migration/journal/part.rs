//! What a migration does about forwarding on this host.

use serde::{Deserialize, Serialize};

use crate::migration::protocol::Plan;
use crate::migration::protocol::forwarding::Course;
use crate::network::translated::Translated;

/// What a migration does about forwarding on this host: for whoever has to undo or finish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
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
}

/// See [`Part`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The forwarding's ID: that of the migration that it began with.
    pub id: String,
    /// This host's part.
    pub part: Part,
}

impl Note {
    /// The source's part in what the destination has decided.
    pub fn of_source(plan: &Plan, course: Course) -> Option<Note> {
        let (id, part) = match (&plan.forward.from, course) {
            (None, Course::Moves | Course::Home) => return None,
            (None, Course::Stays) => (&plan.migration, Part::Leaves),
            (Some((id, _)), Course::Stays) => (id, Part::MovesOn),
            (Some((id, _)), Course::Home) => (id, Part::GoesHome),
            (Some((id, _)), Course::Moves) => (id, Part::Ends),
        };
        Some(Note { id: id.clone(), part })
    }

    /// For people: what will become of the address.
    pub fn words(&self, plan: &Plan) -> &'static str {
        let Translated { flows, published } = &plan.forward.translated;
        match self.part {
            Part::Leaves if !flows.is_empty() => {
                "its address stays here, as connections live by this host's address translation; packets are forwarded"
            }
            Part::Leaves if *published => {
                "its address stays here, as this host publishes a port of it; packets are forwarded"
            }
            Part::Leaves => "its address stays here, packets are forwarded",
            Part::MovesOn => "its address stays at home, packets are forwarded from there",
            Part::GoesHome | Part::ComesHome => "it comes home to its address",
            Part::Ends => "its address moves, and is not forwarded any more",
            Part::Arrives => "its address stays where it is, packets are forwarded",
        }
    }

    /// The destination's part in what it has decided itself.
    pub fn of_destination(plan: &Plan, course: Course) -> Option<Note> {
        let part = match course {
            Course::Moves => return None,
            Course::Stays => Part::Arrives,
            Course::Home => Part::ComesHome,
        };
        let id = plan.forward.from.as_ref().map_or(&plan.migration, |f| &f.0);
        Some(Note { id: id.clone(), part })
    }
}
