//! CRIU as a peer: RPC frames, the interposer, image files.

pub mod shim;
