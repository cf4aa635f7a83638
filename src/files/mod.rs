//! Root file system and volumes: what both hosts see.
//!
//! [`probe`] proves that a path on the destination is the same file system as on the source, never
//! judging by the path; [`tmpfs`] carries the mounts that live in memory, as a [`tree`]; [`sockets`]
//! keeps the names of unix sockets until it is known who owns them. Copying what is not shared is
//! not built yet.

pub mod probe;
pub mod sockets;
pub mod tmpfs;
pub mod tree;
