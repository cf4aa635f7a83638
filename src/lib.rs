//! Ferry: an OCI runtime that is runc in every respect and can carry a running
//! container, with its memory, address and open TCP connections, to another host.
//!
//! The house, from the door inwards; each floor knows only of those below it:
//!
//! - [`cli`]: the verbs' arguments, pass-through to the underlying runtime.
//! - [`migration`]: the hand-over: protocol, phases, source, destination, journal, preflight.
//! - [`memory`], [`files`], [`network`], [`criu`], [`oci`]: one matter each.
//! - [`transport`], [`report`]: the wire between the hosts; what the user is told.
//! - [`sys`]: system calls as types, and every `unsafe` line.

pub mod cli;
pub mod criu;
pub mod files;
pub mod memory;
pub mod migration;
pub mod network;
pub mod oci;
pub mod report;
pub mod sys;
pub mod transport;
