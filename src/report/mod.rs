//! What the user is told: progress, timeline, JSON.

pub(crate) mod exit;
pub(crate) mod failures;
pub(crate) mod forecast;
pub(crate) mod log;
pub(crate) mod progress;
pub(crate) mod shown;
pub(crate) mod trace;
