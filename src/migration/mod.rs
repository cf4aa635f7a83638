//! The hand-over from host to host.

pub mod away;
pub mod journal;
pub mod protocol;
pub mod workdir;
pub mod dump;
pub mod restore;
pub mod checks;
pub mod destination;
pub mod host;
pub mod inspect;
pub mod keeper;
pub mod recover;
pub mod settle;
pub mod source;
pub mod talk;
