//! System calls as types, and every `unsafe` line of the crate.
//!
//! Functions take `AsFd`, return `OwnedFd`, and name their manual page. Nothing here knows what a
//! migration is.

#[cfg(test)]
pub(crate) mod allocated;
pub(crate) mod arch;
pub(crate) mod connection;
pub(crate) mod datagrams;
pub mod entry;
pub(crate) mod fanotify;
pub(crate) mod fault;
pub(crate) mod fd_inject;
pub(crate) mod fd_table;
pub(crate) mod host;
pub(crate) mod inject;
pub mod listener;
pub mod locks;
pub(crate) mod maps;
pub(crate) mod memory;
pub(crate) mod mntns;
pub(crate) mod netlink;
pub mod netns;
pub(crate) mod notify;
pub mod packet;
pub(crate) mod panics;
pub(crate) mod perf;
pub(crate) mod process;
pub(crate) mod protection;
pub(crate) mod sched;
pub(crate) mod scm;
pub(crate) mod seccomp;
pub(crate) mod shared_memory;
pub(crate) mod smaps;
pub(crate) mod socket;
pub mod socket_options;
pub(crate) mod stopped;
pub(crate) mod successor;
pub(crate) mod tmpfs;
pub(crate) mod tracepoint;
pub(crate) mod tun;
pub(crate) mod waits;
pub(crate) mod xtables;
