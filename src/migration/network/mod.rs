//! The network during a migration.

pub(crate) mod arrival;
pub(crate) mod container;
pub(crate) mod floating_address;
pub(crate) mod held_packets;
pub(crate) mod hooks;
pub(crate) mod quiesce;
pub(crate) mod udp_buffers;
pub(crate) mod udp_queues;
