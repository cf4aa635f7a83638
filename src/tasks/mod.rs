//! A container's tasks, from outside.

pub(crate) mod aio;
pub(crate) mod descriptors;
pub(crate) mod held;
pub(crate) mod imaged;
pub mod locks;
pub(crate) mod losses;
pub(crate) mod mend;
pub(crate) mod sequences;
pub mod settings;
pub(crate) mod sleepers;
pub(crate) mod watched;
