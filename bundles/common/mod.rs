//! What the workloads and the client that checks them must agree about: the
//! content of memory ([`pages`]), the bytes on the wire ([`wire`]), and how
//! sizes and durations are written ([`units`]).
//!
//! Each program takes this module by `#[path]`, and none uses all of it.
#![allow(dead_code)]

pub mod crowd;
pub mod pages;
pub mod units;
pub mod wire;
