//! The hand-over from host to host.
