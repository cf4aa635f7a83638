//! The container's address: capture, fence, re-create, announce, replay.
//!
//! Done here: containers in a network namespace of their own, attached by macvlan, by a veth whose
//! host end is on a bridge, or by one that the host routes to ([`routed`], [`host_side`]). In the
//! order of a migration:
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
//! Where the address cannot move, the first host keeps it: [`forward`] has what its frames go in and
//! out by, on both hosts. Where it is an engine's, and only connections cannot, see [`published`].
//!
//! Containers that use the host's network have addresses of the host move with them: [`floating`].
//!
//! Nothing here knows of CRIU, of runc or of the protocol between the hosts.

pub(crate) mod announce;
pub(crate) mod capture;
pub(crate) mod curtain;
pub mod fence;
pub(crate) mod floating;
pub(crate) mod forward;
pub(crate) mod frames;
pub(crate) mod hook;
pub(crate) mod host_side;
pub mod image;
mod legacy;
mod neighbours;
mod nft;
pub(crate) mod placement;
pub(crate) mod published;
pub(crate) mod qdisc;
pub(crate) mod read;
mod recreate;
pub(crate) mod release;
pub(crate) mod replay;
mod restore;
pub(crate) mod routed;
mod rtnl;
pub(crate) mod sockets;
mod sysctl;
pub(crate) mod translated;
pub(crate) mod udp_buffers;
pub(crate) mod udp_queues;
mod understudy;
pub(crate) mod unix;
pub mod usable;

pub use crate::problem::Problem;
pub use announce::{Announcer, announce};
pub use capture::{capture, capture_at, capture_engines, capture_forwarded};
pub use floating::Floating;
pub use frames::{Capture, EthernetFrame};
pub use hook::Hook;
pub use host_side::HostSide;
pub use image::NetworkImage;
pub use neighbours::Neighbours;
pub use placement::{Placement, preflight};
pub use recreate::{Recreated, come_home, dismantle, fill_loopback, recreate};
pub use release::ReleaseSet;
pub use replay::Replay;
pub use routed::{HostRoutes, Uplinks};
pub use understudy::Understudy;
