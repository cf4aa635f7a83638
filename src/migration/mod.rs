//! The hand-over from host to host, in rooms. Each imports rooms of lower floors only;
//! `tests/floors.rs` holds the table against the code.
//!
//! ```text
//! 7  source destination        the two roles, which never name each other
//! 6  checkpoint recovery       CRIU through the runtime; undoing and finishing, by whoever is left
//! 5  preflight                 what stands in the way, before anything is touched
//! 4  network                   the container's network while it moves
//! 3  forwarding                an address that stays at home
//! 2  transfer journal options  what goes over the link; what is on disk; what the user wants
//! 1  protocol                  what the hosts say
//! ```

pub(crate) mod checkpoint;
pub mod destination;
pub(crate) mod forwarding;
pub mod journal;
pub(crate) mod network;
pub(crate) mod options;
pub(crate) mod preflight;
pub mod protocol;
pub(crate) mod recovery;
pub(crate) mod source;
pub(crate) mod transfer;
