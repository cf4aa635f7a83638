//! What stands in the way, before anything is touched.

pub mod checks;
pub mod contested;
pub mod host;
pub mod inspect;
pub mod layers;
pub mod standard;
