//! The network during a migration.

pub mod arrival;
pub mod floating;
pub mod hooks;
pub mod keeper;
pub mod lull;
pub mod room;
pub mod unread;
