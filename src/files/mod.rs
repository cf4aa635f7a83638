//! Root file system and volumes: what both hosts see, and what is copied.
//!
//! A tree's [`root`] is opened once. [`probe`] proves that a path on the destination is the same file system as on the source, never
//! judging by the path. What is not shared is copied while it is in use: [`follow`] finds what has
//! changed since the last round, by what the kernel tells ([`changes`], [`writes`]) or by looking
//! ([`walk`]), and of large files which parts ([`contents`]); [`ops`] is how it is said, [`apply`]
//! does the same over there, and [`place`] brings it to its place or takes it away again. Of an
//! [`overlay`] only the upper layer is copied, and those of its [`layers`] that the other host does
//! not have; [`mounting`] is how it comes to its place. [`tmpfs`] carries the mounts that live
//! in memory, as a [`tree`]; [`sockets`] keeps the names of unix sockets until it is known who owns
//! them. [`logs`] come to their places in a [`directory`] that somebody else has named.

pub(crate) mod apply;
mod changes;
mod contents;
pub(crate) mod directory;
pub(crate) mod follow;
pub(crate) mod inodes;
pub(crate) mod layers;
pub(crate) mod logs;
pub(crate) mod mounting;
mod ops;
pub(crate) mod overlay;
pub(crate) mod place;
pub(crate) mod probe;
pub(crate) mod root;
pub mod sockets;
pub(crate) mod tmpfs;
pub(crate) mod tree;
pub mod walk;
mod writes;
