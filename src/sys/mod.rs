//! System calls as types; every unsafe line of the crate.

pub mod entry;
