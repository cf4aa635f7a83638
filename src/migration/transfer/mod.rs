//! What goes over the link: memory, files, images.

pub(crate) mod carry;
pub(crate) mod early;
pub(crate) mod haul;
pub(crate) mod intake;
pub(crate) mod lanes;
pub(crate) mod parcels;
