//! The container's address: capture, fence, re-create, announce, replay.
//!
//! Done here: containers in a network namespace of their own, attached by macvlan or by a veth
//! whose host end is on a bridge. In the order of a migration:
//!
//! 1. [`capture()`] reads the source's namespace into a [`NetworkImage`]; [`preflight`] compares it
//!    with the destination before anything is touched.
//! 2. [`recreate()`] makes the namespace on the destination, behind a closed [`fence`].
//! 3. On the source [`fence::arm`] is done ahead; [`frames::Capture`] begins and the fence closes
//!    right before the freeze. Frames that come meanwhile are kept, sent along, and given to
//!    [`replay::Replay`] on the destination, so that no client waits for a retransmission timer.
//! 4. After the commit the destination opens its fence and lets the [`Announcer`] speak; the
//!    source calls [`dismantle`] so that no kernel answers for a container that is not there.
//!
//! Nothing here knows of CRIU, of runc or of the protocol between the hosts.

pub mod announce;
pub mod capture;
pub mod fence;
pub mod frames;
pub mod image;
mod nft;
pub mod placement;
pub mod problem;
pub mod recreate;
pub mod replay;
mod restore;
mod rtnl;
pub mod sockets;
mod sysctl;
pub mod usable;

pub use announce::{Announcer, announce};
pub use capture::{capture, capture_at};
pub use frames::{Capture, Frame};
pub use image::NetworkImage;
pub use placement::{Placement, preflight};
pub use problem::Problem;
pub use recreate::{Recreated, dismantle, fill_loopback, recreate};
pub use replay::Replay;
