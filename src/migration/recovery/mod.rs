//! Undoing and finishing, by whoever is left.

pub mod decide;
pub mod guards;
pub mod recover;
pub mod rest;
pub mod settle;
