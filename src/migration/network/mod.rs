//! The network during a migration.

pub(crate) mod arrival;
pub(crate) mod floating;
pub(crate) mod hooks;
pub(crate) mod keeper;
pub(crate) mod lull;
pub(crate) mod room;
pub(crate) mod unread;
