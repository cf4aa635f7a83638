//! Hardware addresses that this host's interfaces do not know for a while.
//!
//! An engine makes an interface, with the container's hardware and network address, before anybody can
//! put a fence into its namespace. On a macvlan that is in the same segment in which the container still
//! lives, on the other host: the first frame would lead its packets here, where they are reset. So
//! until that fence stands this host neither takes nor sends frames of these addresses: chains of
//! nf_tables' netdev family on all of its own interfaces. They are found again by their name.
//!
//! An engine that sends a frame itself, and gives up when it is told that this was dropped (docker), is
//! told nothing: the frame goes to the loopback device, where nobody takes it.

use super::image::{LinkKind, NetworkImage};
use super::nft::{self, Expression, NewChain, NftBatch, Policy};
use super::rtnl::Rtnl;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{Mac, NetlinkSocket, Protocol};
use crate::sys::netns::NetNs;

/// In an Ethernet header: where a frame goes, and where it comes from.
const TO: u32 = 0;
const FROM: u32 = 6;
/// The loopback device's index.
const LOOPBACK: u32 = 1;
const CHAINS: [(&str, u32, u32); 2] = [("in", 0, TO), ("out", 1, FROM)];

fn table(migration: &str) -> String {
    format!("ferry-curtain-{migration}")
}

/// Draws it before what the image has on the hosts' own segment; nothing where it has nothing there.
/// `softly`: whoever sends is not told that nothing gets out.
///
/// # Errors
/// When the kernel does not take it.
pub fn draw(
    image: &NetworkImage,
    migration: &str,
    host: &NetNs,
    softly: bool,
) -> Result<(), Problem> {
    let trying = || "cannot hide the container's hardware address".to_owned();
    let hidden: Vec<Mac> = image
        .outward()
        .filter(|(_, link)| matches!(link.kind, LinkKind::Macvlan { .. }))
        .filter_map(|(_, link)| link.mac)
        .collect();
    if hidden.is_empty() {
        return Ok(());
    }

    let links = Rtnl::open(host).and_then(|mut s| s.links()).trying(trying)?;
    let devices: Vec<String> =
        links.into_iter().map(|link| link.name).filter(|name| name != "lo").collect();
    let (mut batch, table) = (NftBatch::new(), table(migration));
    batch.add_table(nft::NETDEV, &table);
    for (name, hook, at) in CHAINS {
        batch.add_chain(&NewChain {
            family: nft::NETDEV,
            table: &table,
            name,
            hook,
            devices: &devices,
            policy: Policy::Accept,
        });

        for mac in &hidden {
            let mut rule =
                vec![Expression::link(at, mac.len() as u32), Expression::Equal(mac.to_vec())];
            if softly && at == FROM {
                rule.extend([Expression::Device(LOOPBACK), Expression::Forward])
            } else {
                rule.push(Expression::DROP)
            }
            batch.add_rule(nft::NETDEV, &table, name, &rule);
        }
    }

    let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
    let drawn = socket.transact(&batch.prepare()).map(drop).trying(trying);
    drawn
        .map_err(|p| p.hint("the kernel needs CONFIG_NF_TABLES_NETDEV and CONFIG_NETFILTER_EGRESS"))
}

/// Takes it away; it is no error if there is none.
///
/// # Errors
/// When it stays.
pub fn lift(migration: &str, host: &NetNs) -> Result<(), Problem> {
    let trying = || "cannot show the container's hardware address".to_owned();
    let (mut socket, table) =
        (NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?, table(migration));
    let ours = |family, name: &str| family == nft::NETDEV && name == table;
    nft::delete_tables(&mut socket, ours).trying(trying)
}
