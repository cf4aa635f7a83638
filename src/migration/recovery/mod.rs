//! Undoing and finishing, by whoever is left.

pub(crate) mod decide;
pub(crate) mod engines;
pub(crate) mod guards;
pub(crate) mod postcopy_recover;
pub(crate) mod socket_names;
pub(crate) mod successors;
pub(crate) mod undo;
pub(crate) mod verdicts;
pub(crate) mod word;
