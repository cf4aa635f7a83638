//! CRIU as a peer: RPC frames, the interposer, image files.
