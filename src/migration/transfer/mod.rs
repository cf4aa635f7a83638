//! What goes over the link: memory, files, images.

pub mod carry;
pub mod early;
pub mod haul;
pub mod intake;
pub mod lanes;
pub mod parcels;
