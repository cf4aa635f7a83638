//! CRIU as a peer.
//!
//! runc starts `criu swrk FD` and speaks protobuf with it over that descriptor. Ferry stands
//! between the two: [`shim`] is what runc finds in PATH under the name `criu`; it hands runc's end
//! to the [`interposer`], takes a new one, and becomes the real criu *in the same process*, on
//! whose number runc relies (cgroup, wait, inherited descriptors). Every request and notification
//! then passes through our hands, with no change to runc or CRIU:
//!
//! ```text
//!   runc ── SEQPACKET ── ferry ── SEQPACKET ── criu
//! ```
//!
//! [`images`] reads and writes the image files that the hand-over needs to understand.

pub(crate) mod images;
pub(crate) mod interposer;
pub mod shim;
