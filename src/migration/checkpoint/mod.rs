//! CRIU's dump and restore through the runtime.

pub mod dump;
pub mod restore;
pub mod streams;
