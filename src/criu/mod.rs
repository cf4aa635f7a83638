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
//! CRIU learns of a task's mappings from one file, in whose place it may find another: what it then does not
//! see, [`hidden`] decides, and [`mm`] puts it into the images. What it must see, [`vdso`] tells.
//!
//! [`failure`] tells why a run has failed, with hints for [`causes`] that are known.
//!
//! [`images`] reads and writes the image files that the hand-over needs to understand, and [`unix_names`] that of
//! all files.

pub(crate) mod barrier;
mod causes;
pub(crate) mod failure;
pub(crate) mod hidden;
pub(crate) mod images;
pub(crate) mod interposer;
pub(crate) mod lent;
pub(crate) mod mm;
pub mod shim;
pub(crate) mod unix_names;
pub(crate) mod vdso;
