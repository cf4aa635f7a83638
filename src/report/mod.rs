//! What the user is told: progress, timeline, JSON.

pub mod exit;
pub mod failures;
pub mod forecast;
pub mod log;
pub mod progress;
pub mod trace;
