//! What the user is told: progress, timeline, JSON.
