//! Ferry: an OCI runtime that is runc in every respect and can carry a running
//! container, with its memory, address and open TCP connections, to another host.
//!
//! The rooms of the house and their floors, from the roof down. A room imports rooms of lower floors
//! only; `tests/floors.rs` holds the table against the code.
//!
//! ```text
//! 10  cli            the verbs' arguments, pass-through to the underlying runtime
//!  9  migration      the hand-over: protocol, phases, source, destination, journal, preflight
//!  8  connections    TCP connections out of the tasks and into others
//!  7  tasks          a container's tasks, looked at and handled from outside
//!  6  report         what the user is told
//!  5  memory         which pages, dirty tracking, staging, lazy serving
//!  4  network        capture, fence, re-create, replay, forward
//!  3  criu files     CRIU's protocol and images; copying what is not shared
//!  3  engine         whose a container is: podman's, docker's, containerd's, CRI-O's
//!  2  oci transport  the underlying runtime; the wire between the hosts
//!  1  problem fuzz   what stands in the way, in words; decoders under bad inputs (tests only)
//!  0  sys            system calls as types, and every `unsafe` line
//! ```

// Public is what the program and the tests under `tests/` take; in each room the rest is `pub(crate)`,
// so that the compiler tells what is dead.
pub mod cli;
pub mod connections;
pub mod criu;
mod engine;
pub mod files;
#[cfg(test)]
mod fuzz;
pub mod memory;
pub mod migration;
pub mod network;
pub mod oci;
pub mod problem;
pub mod report;
pub mod sys;
pub mod tasks;
pub mod transport;
