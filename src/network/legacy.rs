//! Rules of iptables-legacy: nftables knows nothing of them.

use std::fs;
use std::net::IpAddr;

use super::rtnl::octets;
use crate::problem::{Problem, Trying};
use crate::sys::netns::NetNs;
use crate::sys::xtables;

const NAT: &str = "nat";
/// Where in `struct ipt_entry` and `struct ip6t_entry` the offsets of its target and of the next entry
/// are: after the addresses, interfaces and `nfcache`.
const OFFSETS_AT: [usize; 2] = [84 + 4, 136 + 4];
/// In `struct xt_entry_target`: size, name, revision; what follows is the target's own.
const TARGET: usize = 32;

/// Tells whether a rule of the host makes one of these addresses the destination of packets that are for
/// another. A host where nobody has used iptables-legacy is asked nothing.
///
/// # Errors
/// When there are rules, and they cannot be read.
pub(super) fn leads_to(host: &NetNs, addresses: &[IpAddr]) -> Result<bool, Problem> {
    let look = || {
        let mut found = false;
        for v6 in [false, true] {
            let wanted: Vec<_> = addresses.iter().filter(|a| a.is_ipv6() == v6).collect();
            if !wanted.is_empty() && has_nat(v6) {
                let rules = xtables::entries(v6, NAT)?;
                found |= wanted.iter().any(|a| names(&rules, v6, &octets(**a)));
            }
        }
        Ok::<_, std::io::Error>(found)
    };
    let what = || "cannot read the rules of iptables-legacy".to_owned();
    host.run(look).and_then(|found| found).trying(what).map_err(|problem| {
        problem.hint("if one of them publishes a port of the container: --forward always")
    })
}

/// Tells whether the calling thread's namespace has such a table. To ask for one that is not there would
/// make it, and have all packets go through it.
fn has_nat(v6: bool) -> bool {
    let file = if v6 { "ip6_tables_names" } else { "ip_tables_names" };
    let names = fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    names.is_ok_and(|names| names.lines().any(|name| name == NAT))
}

/// Tells whether the target of an entry is `DNAT`, to this address.
pub(super) fn names(mut entries: &[u8], v6: bool, address: &[u8]) -> bool {
    let short = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_ne_bytes)
    };
    let at = OFFSETS_AT[usize::from(v6)];
    loop {
        let (target, next) = (short(entries, at).into(), short(entries, at + 2).into());
        let Some((entry, rest)) = entries.split_at_checked(next).filter(|_| next > 0) else {
            return false;
        };
        let target = entry.get(target..).unwrap_or_default();
        // Ranges of any revision have addresses on multiples of four bytes.
        let info = target.get(TARGET..).unwrap_or_default();
        if target.get(2..).is_some_and(|name| name.starts_with(b"DNAT\0"))
            && (0..info.len()).step_by(4).any(|at| info[at..].starts_with(address))
        {
            return true;
        }
        entries = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(v6: bool, target: &[u8], info: &[u8]) -> Vec<u8> {
        let head = if v6 { 168 } else { 112 };
        let mut bytes = vec![0; head];
        let at = OFFSETS_AT[usize::from(v6)];
        bytes[at..at + 2].copy_from_slice(&(head as u16).to_ne_bytes());
        bytes.extend(((TARGET + info.len()) as u16).to_ne_bytes());
        bytes.extend(target);
        bytes.resize(head + TARGET, 0);
        bytes.extend(info);
        let size = bytes.len() as u16;
        bytes[at + 2..at + 4].copy_from_slice(&size.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_port_that_is_published_is_found_among_others() {
        let v4 = [10, 88, 0, 5];
        let range = [&[1, 0, 0, 0, 3, 0, 0, 0][..], &v4, &v4, &[0x58, 0x1b, 0x58, 0x1b]].concat();
        let other = entry(false, b"SNAT", &range);
        let wanted = entry(false, b"DNAT", &range);
        assert!(!names(&other, false, &v4));
        assert!(names(&[&other[..], &wanted, &other].concat(), false, &v4));
        assert!(!names(&wanted, false, &[10, 88, 0, 6]));
        assert!(!names(&[], false, &v4) && !names(&wanted[..100], false, &v4));
        let v6 = [0xfd; 16];
        let range = [&[3, 0, 0, 0][..], &v6, &v6, &[0x58, 0x1b, 0x58, 0x1b, 0, 0, 0, 0]].concat();
        assert!(names(&[other_v6(), entry(true, b"DNAT", &range)].concat(), true, &v6));
        assert!(!names(&other_v6(), true, &v6));
    }

    fn other_v6() -> Vec<u8> {
        entry(true, b"MASQUERADE", &[0; 40])
    }
}
