//! A container's tasks, from outside.

pub(crate) mod aio;
pub(crate) mod criu_rescue;
pub(crate) mod epoll;
pub(crate) mod freezer;
pub(crate) mod imaged;
pub mod locks;
pub(crate) mod losses;
pub(crate) mod moments;
pub(crate) mod mptcp;
pub(crate) mod sequences;
pub mod settings;
pub(crate) mod sleepers;
pub mod sockets;
pub(crate) mod unix_names;
pub(crate) mod unsupported;
pub(crate) mod waits;
