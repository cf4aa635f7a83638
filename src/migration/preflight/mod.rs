//! What stands in the way, before anything is touched.

pub(crate) mod contested;
pub(crate) mod destination_checks;
pub(crate) mod host;
pub(crate) mod layers;
pub(crate) mod source_checks;
pub(crate) mod source_files;
pub(crate) mod source_network;
pub(crate) mod standard;
