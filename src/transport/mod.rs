//! The wire between two hosts: how to reach the other side, [`frame`]s on it, and
//! the [`codec`] that packs memory.
//!
//! A link is one stream each way: the standard streams of `ssh HOST ferry receive --stdio`, as
//! rsync does it, or a unix socket.

pub(crate) mod backoff;
pub(crate) mod ciphers;
pub(crate) mod codec;
pub mod connect;
pub mod frame;
pub(crate) mod pace;
