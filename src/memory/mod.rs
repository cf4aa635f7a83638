//! Memory of the container.
//!
//! CRIU is told to dump *lazily*: it lists the private anonymous pages and leaves their contents
//! to us. [`pages`] finds the populated pages of a running or frozen task from outside,
//! [`rounds`] reads them and hands on those that changed since they were last sent, [`converge`]
//! decides when that is enough, [`staging`] holds them on the destination, [`serve`] puts them into
//! the restored tasks through userfaultfd; those that stay on the source (post-copy), when they come.
//!
//! With `--verify` the source tells [digests](digest) of all memory in the freeze, which the destination
//! [compares](compare) with its own before the commit.
//!
//! Anonymous [shared] memory goes in rounds, too, and is [in its place](shared_files) before the restore begins. What
//! CRIU does not leave to us (file-private pages that were written to, System V's shared memory, memfds that
//! have a descriptor, locked and huge pages, the vDSO) travels in its image files.

pub(crate) mod compare;
pub(crate) mod converge;
pub(crate) mod digest;
pub(crate) mod direct;
pub(crate) mod holder;
pub(crate) mod pages;
pub(crate) mod pending;
#[cfg(test)]
mod properties;
pub(crate) mod readers;
pub(crate) mod remainder;
pub(crate) mod rounds;
pub mod serve;
pub(crate) mod shared;
pub(crate) mod shared_files;
pub(crate) mod soft_dirty;
pub(crate) mod staging;
pub(crate) mod table;
pub(crate) mod track;
pub(crate) mod will;
