//! What the source's guard does when its Ferry has gone.

use crate::migration::journal::State;
use crate::migration::protocol::Standing;

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarding {
    /// The container runs on here; the destination is told so afterwards.
    RunOn,
    /// The destination owns it, and is told so until it has heard.
    CarryThrough,
    /// It runs on here already, and the destination may not know it.
    Tell,
    /// It is over.
    Nothing,
}

/// `told`: Ferry's last word was that the container runs on here; else it was killed.
pub fn guard(state: State, told: bool) -> Guarding {
    match state {
        State::Finished => Guarding::Nothing,
        // Whatever could not be written down, or undone: it is never handed over any more.
        _ if told => Guarding::Tell,
        State::Aborted => Guarding::Tell,
        State::Committed | State::Whole => Guarding::CarryThrough,
        State::Begun | State::Returning | State::Ready | State::Unstarted => Guarding::RunOn,
    }
}

/// Tells whether a destination that has been told that the container stayed, and answers so, need not be
/// told again.
pub fn has_heard(standing: Standing) -> bool {
    match standing {
        Standing::Gone | Standing::NeverRan => true,
        // By an operator's word; more words change nothing.
        Standing::Running | Standing::Partial => true,
        Standing::Waiting | Standing::Ready | Standing::Lacking | Standing::Arriving => false,
    }
}
