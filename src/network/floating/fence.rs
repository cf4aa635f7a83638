//! The fence round some addresses of a host: of tables of nf_tables' ip, ip6 and arp families, whose
//! rules know the addresses. So it is the same on all interfaces, those that come later too, and
//! between programs of the host.
//!
//! What comes for an address is dropped before connections are tracked and before anybody could
//! answer; so are questions for it, by ARP and by neighbour discovery. What the host would say in its
//! name is dropped, too. There is one thing more: where the container takes connections to *all*
//! addresses of the host, none may begin while it is frozen, to whichever address. They would be
//! nobody's, see [`sockets`](crate::network::sockets).
//!
//! The chains are registered ahead of time, without rules; closing adds the rules and opening takes
//! them away, each in one batch.

use std::net::IpAddr;

use super::Floating;
use crate::network::fence::ArmedFence;
use crate::network::nft::{self, Expression, NewChain, NftBatch, Policy};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkSocket, Protocol};
use crate::sys::netns::NetNs;

const IN: &str = "in";
const OUT: &str = "out";
const DOORS: &str = "doors";
const FAMILIES: [u8; 3] = [nft::IPV4, nft::IPV6, nft::ARP];
const CHAINS: [(u8, &str, u32); 8] = {
    const PRE_ROUTING: u32 = 0;
    const LOCAL_IN: u32 = 1;
    const LOCAL_OUT: u32 = 3;
    [
        (nft::IPV4, IN, PRE_ROUTING),
        (nft::IPV4, DOORS, LOCAL_IN),
        (nft::IPV4, OUT, LOCAL_OUT),
        (nft::IPV6, IN, PRE_ROUTING),
        (nft::IPV6, DOORS, LOCAL_IN),
        (nft::IPV6, OUT, LOCAL_OUT),
        // NF_ARP_IN, NF_ARP_OUT
        (nft::ARP, IN, 0),
        (nft::ARP, OUT, 1),
    ]
};

/// What of [`IN`] stops new connections only.
const NEW: &str = "new";

type FenceRule = Vec<Expression>;

/// What is in the chains of a closed fence: chain, family, rule.
struct FenceRules(Vec<(&'static str, u8, FenceRule)>);

impl FenceRules {
    fn new(addresses: &[IpAddr], doors: &[u16]) -> Self {
        let mut all = Vec::new();
        for ip in addresses {
            all.extend(inward(*ip).map(|(family, rule)| (IN, family, rule)));
            all.extend(outward(*ip).map(|(family, rule)| (OUT, family, rule)));
            let (family, rule) = beginning(*ip);
            all.push((NEW, family, rule));
        }
        for port in doors {
            all.extend(door(*port).map(|(family, rule)| (DOORS, family, rule)));
        }
        Self(all)
    }

    fn add(&self, batch: &mut NftBatch, table: &str, which: &[&str]) {
        for (of, family, rule) in self.0.iter().filter(|r| which.contains(&r.0)) {
            let chain = if *of == NEW { IN } else { of };
            batch.add_rule(*family, table, chain, rule);
        }
    }
}

/// Puts it up, open or closed, in the place of one that is there.
pub(super) fn put_up(
    floating: &Floating,
    table: &str,
    host: &NetNs,
    closed: bool,
) -> Result<ArmedFence, Problem> {
    let (addresses, doors) = (floating.addresses(), floating.doors());
    install(&addresses, &doors, table, host, closed)
}

fn install(
    addresses: &[IpAddr],
    doors: &[u16],
    table: &str,
    host: &NetNs,
    closed: bool,
) -> Result<ArmedFence, Problem> {
    let trying = || "cannot put up the fence round the address".to_owned();
    let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
    let mut tables = NftBatch::new();
    for family in FAMILIES {
        // Adding before deleting makes the deletion right whether or not it was there.
        tables.add_table(family, table);
        tables.delete_table(family, table);
        tables.add_table(family, table);
    }

    for (family, name, hook) in CHAINS {
        let policy = Policy::Accept;
        tables.add_chain(&NewChain { family, table, name, hook, devices: &[], policy });
    }
    let rules = FenceRules::new(addresses, doors);
    let mut close_new = NftBatch::new();
    rules.add(&mut close_new, table, &[NEW, DOORS]);

    let mut close = NftBatch::new();
    rules.add(&mut close, table, &[IN, DOORS, OUT]);
    if closed {
        rules.add(&mut tables, table, &[IN, DOORS, OUT]);
    }

    socket.transact(&tables.prepare()).trying(trying).map_err(|p| {
        p.hint("the kernel needs nf_tables with CONFIG_NF_TABLES_ARP, _IPV4, _IPV6")
    })?;
    let flush = |chains: &[&str]| {
        let mut batch = NftBatch::new();
        for (family, name, _) in CHAINS.iter().filter(|c| chains.contains(&c.1)) {
            batch.flush_chain(*family, table, name);
        }
        batch.prepare()
    };

    let mut remove = NftBatch::new();
    FAMILIES.iter().for_each(|family| remove.delete_table(*family, table));
    Ok(ArmedFence {
        socket,
        open: flush(&[IN, DOORS, OUT]),
        close_new: close_new.prepare(),
        open_new: flush(&[IN, DOORS]),
        holds_new: false,
        close: close.prepare(),
        remove: remove.prepare(),
    })
}

/// Closes one that is there, and open.
pub(super) fn close(floating: &Floating, table: &str, host: &NetNs) -> Result<(), Problem> {
    let trying = || "cannot close the fence round the address".to_owned();
    let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
    let mut batch = NftBatch::new();
    let rules = FenceRules::new(&floating.addresses(), &floating.doors());
    rules.add(&mut batch, table, &[IN, DOORS, OUT]);
    socket.transact(&batch.prepare()).map(drop).trying(trying)
}

/// Takes it away by its name; it is no error if there is none.
pub(super) fn remove(table: &str, host: &NetNs) -> Result<(), Problem> {
    let trying = || "cannot remove the fence round the address".to_owned();
    let mut socket = NetlinkSocket::open_in(host, Protocol::Netfilter).trying(trying)?;
    nft::delete_tables(&mut socket, |_, name| name == table).trying(trying)
}

/// Tries it out in a namespace that nobody else sees.
pub(super) fn usable() -> Result<(), Problem> {
    let fresh = NetNs::fresh().trying(|| "cannot try the packet filter out".into())?;
    let addresses = [[192, 0, 2, 1].into(), [0xfd00_u16, 0, 0, 0, 0, 0, 0, 1].into()];
    install(&addresses, &[1], "ferry-try", &fresh, true).map(drop)
}

const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

fn equal(mut rule: FenceRule, value: &[u8]) -> FenceRule {
    rule.push(Expression::Equal(value.into()));
    rule
}

fn drops(mut rule: FenceRule) -> FenceRule {
    rule.push(Expression::DROP);
    rule
}

/// The target of a message of neighbour discovery, RFC 4861 4.3 and 4.4.
fn discovery(kind: u8, target: &[u8]) -> FenceRule {
    let mut rule = equal(vec![Expression::L4_PROTOCOL], &[ICMPV6]);
    rule.push(Expression::transport(0, 1));
    rule = equal(rule, &[kind]);
    rule.push(Expression::transport(8, 16));
    equal(rule, target)
}

/// `ip daddr …`
fn is_for(ip: IpAddr) -> (u8, FenceRule) {
    match ip {
        IpAddr::V4(ip) => (nft::IPV4, equal(vec![Expression::network(16, 4)], &ip.octets())),
        IpAddr::V6(ip) => (nft::IPV6, equal(vec![Expression::network(24, 16)], &ip.octets())),
    }
}

/// Returns what asks for an address, or is for it.
fn inward(ip: IpAddr) -> [(u8, FenceRule); 2] {
    let (family, packets) = is_for(ip);
    let questions = match ip {
        // The target of an ARP packet, arp_hdr(3).
        IpAddr::V4(ip) => (nft::ARP, equal(vec![Expression::network(24, 4)], &ip.octets())),
        IpAddr::V6(ip) => (nft::IPV6, discovery(SOLICITATION, &ip.octets())),
    };
    [(family, drops(packets)), (questions.0, drops(questions.1))]
}

/// Returns what is said in the name of an address.
fn outward(ip: IpAddr) -> [(u8, FenceRule); 2] {
    let (packets, answers) = match ip {
        IpAddr::V4(ip) => (
            (nft::IPV4, equal(vec![Expression::network(12, 4)], &ip.octets())),
            // The sender of an ARP packet.
            (nft::ARP, equal(vec![Expression::network(14, 4)], &ip.octets())),
        ),
        IpAddr::V6(ip) => (
            (nft::IPV6, equal(vec![Expression::network(8, 16)], &ip.octets())),
            (nft::IPV6, discovery(ADVERTISEMENT, &ip.octets())),
        ),
    };
    [(packets.0, drops(packets.1)), (answers.0, drops(answers.1))]
}

/// The first segment of a connection to an address.
fn beginning(ip: IpAddr) -> (u8, FenceRule) {
    let (family, mut rule) = is_for(ip);
    rule.extend(Expression::new_connection());
    (family, drops(rule))
}

/// The first segment of a connection to a port of any address.
fn door(port: u16) -> [(u8, FenceRule); 2] {
    [nft::IPV4, nft::IPV6].map(|family| {
        let mut rule = Expression::new_connection();
        rule.push(Expression::transport(2, 2));
        (family, drops(equal(rule, &port.to_be_bytes())))
    })
}
