//! Undoing and finishing, by whoever is left.

pub(crate) mod decide;
pub(crate) mod guards;
pub(crate) mod recover;
pub(crate) mod rest;
pub(crate) mod settle;
pub(crate) mod successors;
pub(crate) mod word;
