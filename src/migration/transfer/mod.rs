//! What goes over the link: memory, files, images.

pub(crate) mod channels;
pub(crate) mod early_images;
pub(crate) mod file_sender;
pub(crate) mod image_files;
pub(crate) mod image_sender;
pub(crate) mod memory_sender;
pub(crate) mod receiver;
