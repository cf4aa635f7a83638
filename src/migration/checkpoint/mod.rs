//! CRIU's dump and restore through the runtime.

mod caller;
pub(crate) mod dump;
mod follow;
mod hiding;
pub(crate) mod restore;
pub(crate) mod streams;
