//! What stands in the way, before anything is touched.

pub(crate) mod checks;
pub(crate) mod contested;
pub(crate) mod host;
pub(crate) mod inspect;
pub(crate) mod layers;
pub(crate) mod standard;
