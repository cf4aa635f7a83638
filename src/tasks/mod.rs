//! A container's tasks, from outside.

pub mod aio;
pub mod descriptors;
pub mod held;
pub mod locks;
pub mod losses;
pub mod mend;
pub mod sleepers;
pub mod watched;
