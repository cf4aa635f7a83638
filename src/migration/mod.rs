//! The hand-over from host to host.

pub mod away;
