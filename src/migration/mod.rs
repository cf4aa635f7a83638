//! The hand-over from host to host.

pub mod arrival;
pub mod ask;
pub mod away;
pub mod carry;
pub mod checks;
pub mod descriptors;
pub mod destination;
pub mod dump;
pub mod guards;
pub mod host;
pub mod inspect;
pub mod intake;
pub mod journal;
pub mod keeper;
pub mod lanes;
pub mod parcels;
pub mod protocol;
pub mod recover;
pub mod rest;
pub mod restore;
pub mod settle;
pub mod source;
pub mod streams;
pub mod talk;
pub mod watch;
pub mod workdir;
