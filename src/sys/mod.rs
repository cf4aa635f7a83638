//! System calls as types; every unsafe line of the crate.

pub mod netlink;
pub mod netns;
pub mod packet;
pub mod tun;
