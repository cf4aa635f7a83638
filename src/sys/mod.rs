//! System calls as types, and every `unsafe` line of the crate.
//!
//! Functions take `AsFd`, return `OwnedFd`, and name their manual page. Nothing here knows what a
//! migration is.

pub mod arch;
pub mod connection;
pub mod datagrams;
pub mod door;
pub mod entry;
pub mod fanotify;
pub mod fault;
pub mod host;
pub mod inject;
pub mod locks;
pub mod maps;
pub mod memory;
pub mod mirror;
pub mod netlink;
pub mod netns;
pub mod packet;
pub mod process;
pub mod sched;
pub mod scm;
pub mod seccomp;
pub mod socket;
pub mod stopped;
pub mod tmpfs;
pub mod tracepoint;
pub mod tun;
pub mod xtables;
