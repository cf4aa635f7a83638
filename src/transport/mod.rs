//! The wire between two hosts: how to reach the other side, and [`frame`]s on it.
//!
//! A link is one stream each way: the standard streams of `ssh HOST ferry receive --stdio`, as
//! rsync does it, or a unix socket.

pub mod connect;
pub mod frame;
