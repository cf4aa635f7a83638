//! As much of the nf_tables protocol as Ferry needs: tables, base chains, rules, sets; and what others'
//! rules have to do with an address.
//!
//! All changes go in one batch, which the kernel does wholly or not at all. The numbers are those
//! of linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h; nftables' own page on the
//! hooks is [nft(8)](https://www.netfilter.org/projects/nftables/manpage.html).

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::rtnl::octets;
use crate::sys::netlink::{
    ACK, Attributes, CREATE, DUMP, NetlinkMessage, NetlinkSocket, Prepared, Request, Result,
};

/// `NFPROTO_INET`
pub(super) const INET: u8 = 1;
/// `NFPROTO_IPV4`
pub(super) const IPV4: u8 = 2;
/// `NFPROTO_ARP`
pub(super) const ARP: u8 = 3;
/// `NFPROTO_IPV6`
pub(super) const IPV6: u8 = 10;
/// `NFPROTO_NETDEV`
pub(super) const NETDEV: u8 = 5;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;
/// Most keys of a set.
const SET_SIZE: u32 = 1 << 16;
const FIXED: usize = 4;
/// `NLM_F_APPEND`
const APPEND: u16 = 0x800;
/// Before everything that others may have put there (netdev's filter priority is 0).
const PRIORITY: i32 = -500;

/// What a base chain does with what no rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    Drop = 0,
    Accept = 1,
}

/// A base chain as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub family: u8,
    pub table: String,
    pub name: String,
    pub policy: Option<u32>,
}

fn fixed(family: u8, resource: u16) -> [u8; FIXED] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn message(kind: u16, flags: u16, family: u8) -> Request {
    Request::new(SUBSYSTEM << 8 | kind, flags, &fixed(family, 0))
}

/// Changes that are done together.
#[derive(Debug)]
pub(super) struct NftBatch(Vec<Request>);

impl NftBatch {
    pub fn new() -> Self {
        Self(vec![Request::new(BATCH_BEGIN, 0, &fixed(0, SUBSYSTEM))])
    }

    pub fn add_table(&mut self, family: u8, name: &str) {
        let mut request = message(NEWTABLE, ACK | CREATE, family);
        request.string(1, name).be32(2, 0);
        self.0.push(request);
    }

    pub fn delete_table(&mut self, family: u8, name: &str) {
        let mut request = message(DELTABLE, ACK, family);
        request.string(1, name);
        self.0.push(request);
    }

    /// A base chain; `devices` only for the netdev family.
    pub fn add_chain(&mut self, chain: &NewChain<'_>) {
        let mut request = message(NEWCHAIN, ACK | CREATE, chain.family);
        request
            .string(1, chain.table)
            .string(3, chain.name)
            .nest(4, |hook| {
                hook.be32(1, chain.hook).be32(2, PRIORITY as u32);
                if chain.family == NETDEV {
                    hook.nest(4, |list| {
                        for device in chain.devices {
                            list.string(1, device);
                        }
                    });
                }
            })
            .be32(5, chain.policy as u32)
            .string(7, "filter");
        self.0.push(request);
    }

    pub fn set_policy(&mut self, family: u8, table: &str, chain: &str, policy: Policy) {
        let mut request = message(NEWCHAIN, ACK, family);
        request.string(1, table).string(3, chain).be32(5, policy as u32);
        self.0.push(request);
    }

    /// `oif == 1 accept`: index 1 is loopback in every namespace.
    pub fn accept_loopback(&mut self, family: u8, table: &str, chain: &str) {
        const OIF: u32 = 5;
        self.accept(family, table, chain, OIF, 1);
    }

    /// `iif == 1 accept`
    pub fn accept_from_loopback(&mut self, family: u8, table: &str, chain: &str) {
        const IIF: u32 = 4;
        self.accept(family, table, chain, IIF, 1);
    }

    /// `meta mark == … accept`: what a packet socket of ours sends.
    pub fn accept_mark(&mut self, family: u8, table: &str, chain: &str, mark: u32) {
        const MARK: u32 = 3;
        self.accept(family, table, chain, MARK, mark);
    }

    /// `meta mark == … notrack`: connection tracking does not see what a socket of ours sends.
    pub fn untrack_mark(&mut self, family: u8, table: &str, chain: &str, mark: u32) {
        const MARK: u32 = 3;
        let equal = Expression::Equal(mark.to_ne_bytes().into());
        let rule = [Expression::Meta(MARK), equal, Expression::Untracked];
        self.add_rule(family, table, chain, &rule);
    }

    /// Lets through what has this value of a `NFT_META_*` key.
    fn accept(&mut self, family: u8, table: &str, chain: &str, key: u32, value: u32) {
        let equal = Expression::Equal(value.to_ne_bytes().into());
        let rule = [Expression::Meta(key), equal, Expression::Verdict(Policy::Accept)];
        self.add_rule(family, table, chain, &rule);
    }

    /// A rule at the end of a chain.
    pub fn add_rule(&mut self, family: u8, table: &str, chain: &str, rule: &[Expression]) {
        let mut request = message(NEWRULE, ACK | CREATE | APPEND, family);
        request.string(1, table).string(2, chain).nest(4, |list| {
            for expression in rule {
                list.nest(1, |e| {
                    e.string(1, expression.name()).nest(2, |e| expression.fill(e));
                });
            }
        });
        self.0.push(request);
    }

    /// A set.
    pub fn add_set(&mut self, family: u8, table: &str, set: &NewSet) {
        /// `NFT_SET_TIMEOUT`, `NFT_SET_EVAL`
        const RENEWED: u32 = 0x10 | 0x20;
        let id = self.0.len() as u32;
        let mut request = message(NEWSET, ACK | CREATE, family);
        let (kind, bytes) = (Cell::of_key(set.key), 4 * set.key.len() as u32);
        request.string(1, table).string(2, set.name).be32(4, kind).be32(5, bytes);
        request.be32(10, id).nest(9, |description| {
            description.be32(1, SET_SIZE);
        });
        if let Some(timeout) = set.timeout {
            request.be32(3, RENEWED).attr(11, &(timeout.as_millis() as u64).to_be_bytes());
        }
        self.0.push(request);
    }

    /// Puts keys into a set; some may be there.
    pub fn add_keys<K: AsRef<[u8]>>(&mut self, family: u8, table: &str, set: &str, keys: &[K]) {
        self.change_keys(message(NEWSETELEM, ACK | CREATE, family), table, set, keys);
    }

    /// Takes keys out of a set; all must be there.
    pub fn delete_keys<K: AsRef<[u8]>>(&mut self, family: u8, table: &str, set: &str, keys: &[K]) {
        self.change_keys(message(DELSETELEM, ACK, family), table, set, keys);
    }

    fn change_keys<K: AsRef<[u8]>>(&mut self, begun: Request, table: &str, set: &str, keys: &[K]) {
        // A nest has no more than 64 KiB.
        for some in keys.chunks(500) {
            let mut request = begun.clone();
            request.string(1, table).string(2, set).nest(3, |list| {
                for key in some {
                    list.nest(1, |element| {
                        element.nest(1, |data| {
                            data.attr(1, key.as_ref());
                        });
                    });
                }
            });
            self.0.push(request);
        }
    }

    /// Who has not begun yet may not begin.
    pub fn drop_new_connections(&mut self, family: u8, table: &str, chain: &str) {
        let mut rule = Expression::new_connection();
        rule.push(Expression::DROP);
        self.add_rule(family, table, chain, &rule);
    }

    /// Takes all rules out of a chain.
    pub fn flush_chain(&mut self, family: u8, table: &str, chain: &str) {
        let mut request = message(DELRULE, ACK, family);
        request.string(1, table).string(2, chain);
        self.0.push(request);
    }

    /// Ready to be sent; the kernel does it within the one system call that sends it.
    pub fn prepare(mut self) -> Prepared {
        self.0.push(Request::new(BATCH_END, 0, &fixed(0, SUBSYSTEM)));
        Prepared::new(&self.0)
    }
}

/// A step of a rule, nft(8); what is looked at goes through one register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expression {
    /// `NFT_META_*`
    Meta(u32),
    /// Base (`NFT_PAYLOAD_*`), offset and length in bytes.
    Payload(u32, u32, u32),
    /// Only these bits of it count.
    Masked(Vec<u8>),
    /// The rule goes on only if this was found.
    Equal(Vec<u8>),
    /// An index of a device.
    Device(u32),
    /// To the device of that index: as far as the sender can tell it is out.
    Forward,
    /// `NFT_META_*`, into one of the cells of 4 bytes that make a set's key.
    MetaTo(u32, u32),
    /// Base, offset and length, into a cell.
    PayloadTo(u32, u32, u32, u32),
    /// The rule goes on only if a set has the key.
    Lookup(&'static str),
    /// Puts the key into a set, or renews it there.
    Update(&'static str),
    /// Connection tracking leaves the packet alone.
    Untracked,
    /// The end.
    Verdict(Policy),
}

impl Expression {
    pub const DROP: Self = Self::Verdict(Policy::Drop);
    /// `NFT_META_L4PROTO`
    pub const L4_PROTOCOL: Self = Self::Meta(16);

    /// Of the frame's own header.
    pub fn link(offset: u32, length: u32) -> Self {
        Self::Payload(0, offset, length)
    }

    /// Of the network header, or of an ARP packet.
    pub fn network(offset: u32, length: u32) -> Self {
        Self::Payload(1, offset, length)
    }

    /// Of what follows the network header.
    pub fn transport(offset: u32, length: u32) -> Self {
        Self::Payload(2, offset, length)
    }

    /// `meta l4proto tcp tcp flags & (syn | ack) == syn`: the first segment of a connection.
    pub fn new_connection() -> Vec<Self> {
        const TCP: u8 = 6;
        const FLAGS_AT: u32 = 13;
        const SYN: u8 = 0x02;
        const SYN_ACK: u8 = 0x12;
        vec![
            Self::L4_PROTOCOL,
            Self::Equal(vec![TCP]),
            Self::transport(FLAGS_AT, 1),
            Self::Masked(vec![SYN_ACK]),
            Self::Equal(vec![SYN]),
        ]
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Meta(_) | Self::MetaTo(..) => "meta",
            Self::Payload(..) | Self::PayloadTo(..) => "payload",
            Self::Lookup(_) => "lookup",
            Self::Update(_) => "dynset",
            Self::Untracked => "notrack",
            Self::Masked(_) => "bitwise",
            Self::Equal(_) => "cmp",
            Self::Device(_) | Self::Verdict(_) => "immediate",
            Self::Forward => "fwd",
        }
    }

    fn fill(&self, e: &mut Request) {
        const REGISTER: u32 = 1;
        const VERDICT: u32 = 0;

        /// `NFT_REG32_00`, which is where the first register is, too.
        const CELLS: u32 = 8;
        const UPDATE: u32 = 1;
        match self {
            Self::MetaTo(cell, key) => e.be32(1, CELLS + cell).be32(2, *key),
            Self::PayloadTo(cell, base, offset, length) => {
                e.be32(1, CELLS + cell).be32(2, *base).be32(3, *offset).be32(4, *length)
            }
            Self::Lookup(set) => e.string(1, set).be32(2, CELLS),
            Self::Update(set) => e.string(1, set).be32(3, UPDATE).be32(4, CELLS),
            Self::Untracked => e,
            Self::Meta(key) => e.be32(1, REGISTER).be32(2, *key),
            Self::Payload(base, offset, length) => {
                e.be32(1, REGISTER).be32(2, *base).be32(3, *offset).be32(4, *length)
            }
            Self::Masked(mask) => {
                e.be32(1, REGISTER).be32(2, REGISTER).be32(3, mask.len() as u32);
                e.nest(4, |data| {
                    data.attr(1, mask);
                })
                .nest(5, |xor| {
                    xor.attr(1, &vec![0; mask.len()]);
                })
            }
            Self::Equal(value) => e.be32(1, REGISTER).be32(2, 0).nest(3, |data| {
                data.attr(1, value);
            }),
            Self::Device(index) => e.be32(1, REGISTER).nest(2, |data| {
                data.attr(1, &index.to_ne_bytes());
            }),
            Self::Forward => e.be32(1, REGISTER),
            Self::Verdict(policy) => e.be32(1, VERDICT).nest(2, |data| {
                data.nest(2, |verdict| {
                    verdict.be32(1, *policy as u32);
                });
            }),
        };
    }
}

/// A base chain to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewChain<'a> {
    pub family: u8,
    pub table: &'a str,
    pub name: &'a str,
    pub hook: u32,
    pub devices: &'a [String],
    pub policy: Policy,
}

/// Part of a key, by the number that nft(8) knows it by: without, it could not list the set.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cell {
    Address = 7,
    Protocol = 12,
    Port = 13,
}

impl Cell {
    /// The type of a key that is made of these.
    fn of_key(cells: &[Cell]) -> u32 {
        cells.iter().fold(0, |kind, cell| kind << 6 | *cell as u32)
    }
}

/// A set to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewSet {
    pub name: &'static str,
    /// What a key is made of, each in a cell of four bytes.
    pub key: &'static [Cell],
    /// Rules put keys into it, which are forgotten when nothing has renewed them for so long.
    pub timeout: Option<Duration>,
}

/// The keys of a set.
pub(super) fn keys(
    socket: &mut NetlinkSocket,
    family: u8,
    table: &str,
    set: &str,
) -> Result<Vec<Vec<u8>>> {
    const ELEMENTS: u16 = 3;
    let mut request = message(GETSETELEM, DUMP, family);
    request.string(1, table).string(2, set);
    let list = socket.list(&request)?;
    let read = |m: &NetlinkMessage| -> Vec<Vec<u8>> {
        let elements = m.attributes(FIXED).nest(ELEMENTS);
        let key = |(_, e): (u16, &[u8])| Some(Attributes::parse(e).nest(1).get(1)?.to_vec());
        elements.iter().filter_map(key).collect()
    };
    Ok(list.iter().flat_map(read).collect())
}

/// All chains of the namespace.
pub(super) fn chains(socket: &mut NetlinkSocket) -> Result<Vec<Chain>> {
    let read = |m: NetlinkMessage| {
        let a = m.attributes(FIXED);
        Some(Chain {
            family: *m.payload.first()?,
            table: a.string(1)?,
            name: a.string(3)?,
            policy: a.be32(5),
        })
    };
    let list = socket.dump(SUBSYSTEM << 8 | GETCHAIN, &fixed(0, 0))?;
    Ok(list.into_iter().filter_map(read).collect())
}

/// Family and name of all tables of the namespace.
pub(super) fn tables(socket: &mut NetlinkSocket) -> Result<Vec<(u8, String)>> {
    let read = |m: NetlinkMessage| Some((*m.payload.first()?, m.attributes(FIXED).string(1)?));
    let list = socket.dump(SUBSYSTEM << 8 | GETTABLE, &fixed(0, 0))?;
    Ok(list.into_iter().filter_map(read).collect())
}

/// Takes away the tables that are `ours`, by family and name; it is no error if there is none.
pub(super) fn delete_tables(
    socket: &mut NetlinkSocket,
    ours: impl Fn(u8, &str) -> bool,
) -> Result<()> {
    let mut batch = NftBatch::new();
    let mut any = false;
    for (family, name) in tables(socket)? {
        if ours(family, &name) {
            batch.delete_table(family, &name);
            any = true;
        }
    }
    if any { socket.transact(&batch.prepare()).map(drop) } else { Ok(()) }
}

/// Family and name of the tables that have any other rule than these, one entry a rule.
pub(super) fn tables_with_rules(
    socket: &mut NetlinkSocket,
    but: impl Fn(&NetlinkMessage) -> bool,
) -> Result<Vec<(u8, String)>> {
    let read = |m: NetlinkMessage| Some((*m.payload.first()?, m.attributes(FIXED).string(1)?));
    let list = socket.dump(SUBSYSTEM << 8 | GETRULE, &fixed(0, 0))?;
    Ok(list.into_iter().filter(|rule| !but(rule)).filter_map(read).collect())
}

/// Tells whether a rule of IPv4 concerns packets from or to one address, and no others: it begins with that.
pub(super) fn concerns(rule: &NetlinkMessage, address: Ipv4Addr) -> bool {
    /// Of the network header, where the two addresses are in that, and equality.
    const NETWORK: u32 = 1;
    const ADDRESSES: [u32; 2] = [12, 16];
    const EQUAL: u32 = 0;
    let [loads, compares, ..] = &steps(rule)[..] else { return false };
    let (load, compare) = (loads.nest(2), compares.nest(2));
    rule.payload.first() == Some(&IPV4)
        && loads.string(1).as_deref() == Some("payload")
        && load.be32(2) == Some(NETWORK)
        && load.be32(3).is_some_and(|at| ADDRESSES.contains(&at))
        && load.be32(4) == Some(4)
        && compares.string(1).as_deref() == Some("cmp")
        && compare.be32(1) == load.be32(1)
        && compare.be32(2) == Some(EQUAL)
        && compare.nest(3).get(1) == Some(&address.octets())
}

/// Returns what a rule does, step by step.
fn steps(rule: &NetlinkMessage) -> Vec<Attributes<'_>> {
    const EXPRESSIONS: u16 = 4;
    let rule = rule.attributes(FIXED).nest(EXPRESSIONS);
    rule.iter().map(|(_, e)| Attributes::parse(e)).collect()
}

/// Tells whether a rule makes one of these addresses the destination of packets that are for another.
/// Addresses in maps are not seen.
pub(super) fn leads_to(socket: &mut NetlinkSocket, addresses: &[IpAddr]) -> Result<bool> {
    let list = socket.dump(SUBSYSTEM << 8 | GETRULE, &fixed(0, 0))?;
    Ok(list.iter().any(|rule| publishes(rule, addresses)))
}

/// The same of one rule.
pub(super) fn publishes(rule: &NetlinkMessage, addresses: &[IpAddr]) -> bool {
    let steps = steps(rule);
    is_destination_nat(&steps) && addresses.iter().any(|a| names(&steps, &octets(*a)))
}

/// nft's own expression, or iptables' target in nft's clothes.
fn is_destination_nat(steps: &[Attributes<'_>]) -> bool {
    const DESTINATION: u32 = 1;
    steps.iter().any(|step| match step.string(1).as_deref() {
        Some("nat") => step.nest(2).be32(1) == Some(DESTINATION),
        Some("target") => step.nest(2).string(1).as_deref() == Some("DNAT"),
        _ => false,
    })
}

/// Tells whether an address is loaded by one step, or among the words of iptables' target.
fn names(steps: &[Attributes<'_>], address: &[u8]) -> bool {
    steps.iter().any(|step| {
        let data = step.nest(2);
        match step.string(1).as_deref() {
            Some("immediate") => data.nest(2).get(1) == Some(address),
            Some("target") => data.get(3).is_some_and(|info| {
                (0..info.len()).step_by(4).any(|at| info[at..].starts_with(address))
            }),
            _ => false,
        }
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A rule that leads packets to 10.88.0.5.
    pub(in crate::network) fn published() -> Request {
        let mut rule = message(NEWRULE, 0, IPV4);
        rule.string(1, "nat").string(2, "prerouting").nest(4, |list| {
            list.nest(1, |e| {
                e.string(1, "immediate").nest(2, |e| {
                    e.be32(1, 1).nest(2, |data| {
                        data.attr(1, &[10, 88, 0, 5]);
                    });
                });
            });
            list.nest(1, |e| {
                e.string(1, "nat").nest(2, |e| {
                    e.be32(1, 1).be32(2, 2);
                });
            });
        });
        rule
    }

    #[test]
    fn a_rule_of_nfts_is_read() {
        let rule = NetlinkMessage { payload: published().payload() };
        let leads = |to: &str| publishes(&rule, &[to.parse().unwrap()]);
        assert!(leads("10.88.0.5") && !leads("10.88.0.6"));
    }

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A rule of iptables' as nf_tables tells it: `struct nf_nat_range2` holds the address.
    #[test]
    fn iptables_targets_are_read() {
        let address = [10, 88, 0, 5];
        let range = [&[3, 0, 0, 0], &address[..], &[0; 12], &address, &[0; 12], &[0; 8]].concat();
        for (name, info, found) in [
            (&b"DNAT\0"[..], &range[..], true),
            (b"SNAT\0", &range, false),
            (b"DNAT\0", &range[1..], false),
        ] {
            let data = [attr(1, name), attr(3, info)].concat();
            let step = [attr(1, b"target\0"), attr(2, &data)].concat();
            let steps = [Attributes::parse(&step)];
            let leads = is_destination_nat(&steps) && names(&steps, &address);
            assert_eq!(leads, found, "{name:?}");
        }
    }

    #[test]
    fn a_rule_tells_whom_it_concerns() {
        let ours = Ipv4Addr::new(127, 0, 0, 11);
        let rule = |offset: u32, address: [u8; 4], first: &str| {
            let mut rule = message(NEWRULE, 0, IPV4);
            let steps = [Expression::network(offset, 4), Expression::Equal(address.into())];
            rule.string(1, "nat").string(2, "OUTPUT").nest(4, |list| {
                for step in &steps {
                    list.nest(1, |e| {
                        let name = if step.name() == "payload" { first } else { step.name() };
                        e.string(1, name).nest(2, |e| step.fill(e));
                    });
                }
            });
            NetlinkMessage { payload: rule.payload() }
        };
        assert!(concerns(&rule(16, [127, 0, 0, 11], "payload"), ours));
        assert!(concerns(&rule(12, [127, 0, 0, 11], "payload"), ours));
        assert!(!concerns(&rule(16, [127, 0, 0, 12], "payload"), ours));
        assert!(!concerns(&rule(8, [127, 0, 0, 11], "payload"), ours));
        assert!(!concerns(&rule(16, [127, 0, 0, 11], "meta"), ours));
        assert!(!concerns(&NetlinkMessage { payload: published().payload() }, ours));
    }
}
