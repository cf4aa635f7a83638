//! IPv4 packets of TCP and UDP: who sends to whom, and how they come to say something else.
//!
//! Checksums follow what is changed, by RFC 1624; where the old one was wrong, the new one is.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::Ends;

/// `IPPROTO_TCP`
pub const TCP: u8 = 6;
/// `IPPROTO_UDP`
pub const UDP: u8 = 17;
const ETHERNET: usize = 14;
const ETHER_TYPE: usize = 12;
const IPV4: [u8; 2] = [0x08, 0x00];
/// IEEE 802.1Q: four bytes before the type.
const VLAN: [u8; 2] = [0x81, 0x00];
/// The least header of IPv4, and the ports behind it.
const LEAST: usize = 20;

/// Returns where the network header of a frame begins, if that is one of IPv4. A device without hardware
/// addresses (WireGuard, TUN) has nothing before it.
pub fn network(frame: &[u8]) -> Option<usize> {
    let kind = |at: usize| frame.get(at..at + 2);
    let at = if kind(ETHER_TYPE)? == VLAN { ETHERNET + 4 } else { ETHERNET };
    let length = usize::from(u16::from_be_bytes(*frame.get(2..)?.first_chunk()?));
    let bare = frame[0] >> 4 == 4 && length == frame.len();
    if kind(at - 2)? == IPV4 { Some(at) } else { bare.then_some(0) }
}

/// A packet that is whole, has ports, and is no later fragment.
#[derive(Debug)]
pub struct Packet<'a> {
    bytes: &'a mut [u8],
    header: usize,
}

impl<'a> Packet<'a> {
    /// Reads a packet; what stands behind it is cut off.
    pub fn parse(bytes: &'a mut [u8]) -> Option<Packet<'a>> {
        let first = *bytes.first()?;
        let header = usize::from(first & 0xf) * 4;
        let length = usize::from(u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?));
        if first >> 4 != 4 || header < LEAST {
            return None;
        }
        let bytes = bytes.get_mut(..length)?;
        let later = u16::from_be_bytes([*bytes.get(6)?, *bytes.get(7)?]) & 0x1fff != 0;
        let least = match *bytes.get(9)? {
            TCP => 20,
            UDP => 8,
            _ => return None,
        };
        (!later && bytes.len() >= header + least).then_some(Packet { bytes, header })
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// From whom, and to whom.
    pub fn ends(&self) -> Ends {
        let end = |address: usize, port: usize| {
            let octets: [u8; 4] = std::array::from_fn(|i| self.bytes[address + i]);
            let port = [self.bytes[self.header + port], self.bytes[self.header + port + 1]];
            SocketAddrV4::new(Ipv4Addr::from(octets), u16::from_be_bytes(port))
        };
        Ends { protocol: self.bytes[9], from: end(12, 0), to: end(16, 2) }
    }

    /// Returns what of TCP's flags ends a connection: one side's word, both sides'.
    pub fn closes(&self) -> (bool, bool) {
        const FIN: u8 = 0x01;
        const RST: u8 = 0x04;
        let flags = match self.bytes[9] {
            TCP => self.bytes[self.header + 13],
            _ => 0,
        };
        (flags & FIN != 0, flags & RST != 0)
    }

    /// Has it come from and go to somebody else.
    pub fn rewrite(&mut self, from: SocketAddrV4, to: SocketAddrV4) {
        for (address, port, end) in [(12, 0, from), (16, 2, to)] {
            let octets = end.ip().octets();
            self.change(address, [octets[0], octets[1]], true);
            self.change(address + 2, [octets[2], octets[3]], true);
            self.change(self.header + port, end.port().to_be_bytes(), false);
        }
    }

    /// Two bytes of the packet, at an even place. `both`: the header's checksum covers them, too.
    fn change(&mut self, at: usize, new: [u8; 2], both: bool) {
        let old = [self.bytes[at], self.bytes[at + 1]];
        self.bytes[at..at + 2].copy_from_slice(&new);
        let (old, new) = (u16::from_be_bytes(old), u16::from_be_bytes(new));
        let above = match self.bytes[9] {
            TCP => self.header + 16,
            _ => self.header + 6,
        };
        let places = [Some(above), both.then_some(10)];
        for at in places.into_iter().flatten() {
            let sum = u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]);
            let none = at == above && self.bytes[9] == UDP && sum == 0;
            if !none {
                let sum = adjusted(sum, old, new);
                // UDP has no other way to say zero.
                let sum = if sum == 0 && at == above && self.bytes[9] == UDP { !0 } else { sum };
                self.bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            }
        }
    }
}

/// RFC 1624, equation 3.
fn adjusted(sum: u16, old: u16, new: u16) -> u16 {
    let mut all = u32::from(!sum) + u32::from(!old) + u32::from(new);
    while all > 0xffff {
        all = (all & 0xffff) + (all >> 16);
    }
    !(all as u16)
}

#[cfg(test)]
pub(super) mod tests {
    use anyhow::{Context, ensure};

    use super::*;
    use crate::fuzz::Target;

    fn at(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    fn sum(bytes: &[u8]) -> u32 {
        let pair = |two: &[u8]| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0));
        bytes.chunks(2).map(pair).sum()
    }

    fn folded(mut sum: u32) -> u16 {
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// Returns what both checksums come to: 0xffff where they are right.
    fn checks(packet: &[u8]) -> (u16, u16) {
        let header = usize::from(packet[0] & 0xf) * 4;
        let above = &packet[header..];
        let pseudo = sum(&packet[12..20]) + u32::from(packet[9]) + above.len() as u32;
        (folded(sum(&packet[..header])), folded(pseudo + sum(above)))
    }

    /// A packet with right checksums.
    pub(in crate::network::published) fn packet(
        protocol: u8,
        from: &str,
        to: &str,
        flags: u8,
    ) -> Vec<u8> {
        let (from, to) = (at(from), at(to));
        let above = if protocol == TCP { 20 } else { 8 };
        let length = LEAST + above + 5;
        let mut bytes = vec![0; length];
        bytes[0] = 0x45;
        bytes[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        (bytes[8], bytes[9]) = (64, protocol);
        bytes[12..16].copy_from_slice(&from.ip().octets());
        bytes[16..20].copy_from_slice(&to.ip().octets());

        bytes[20..22].copy_from_slice(&from.port().to_be_bytes());
        bytes[22..24].copy_from_slice(&to.port().to_be_bytes());
        let place = match protocol {
            TCP => {
                (bytes[32], bytes[33]) = (0x50, flags);
                36
            }
            _ => {
                bytes[24..26].copy_from_slice(&((above + 5) as u16).to_be_bytes());
                26
            }
        };

        bytes[length - 5..].copy_from_slice(b"hello");
        let (header, above) = checks(&bytes);
        bytes[10..12].copy_from_slice(&(!header).to_be_bytes());
        bytes[place..place + 2].copy_from_slice(&(!above).to_be_bytes());
        assert_eq!(checks(&bytes), (0xffff, 0xffff));

        bytes
    }

    #[test]
    fn checksums_follow() {
        for protocol in [TCP, UDP] {
            let mut bytes = packet(protocol, "192.0.2.9:43210", "10.77.1.11:8080", 0x18);
            // Behind it is what fills the frame up.
            bytes.extend([0xaa; 7]);
            let mut one = Packet::parse(&mut bytes).unwrap();
            assert_eq!(one.ends().to, at("10.77.1.11:8080"));
            one.rewrite(at("192.0.2.9:43210"), at("10.89.7.20:7000"));
            let ends = Ends { protocol, from: at("192.0.2.9:43210"), to: at("10.89.7.20:7000") };
            assert_eq!(one.ends(), ends);
            assert_eq!(checks(one.bytes()), (0xffff, 0xffff), "{protocol}");
        }
    }

    #[test]
    fn a_datagram_without_a_checksum_stays_so() {
        let mut bytes = packet(UDP, "192.0.2.9:53", "10.77.1.11:53", 0);
        bytes[26..28].copy_from_slice(&[0, 0]);
        let mut one = Packet::parse(&mut bytes).unwrap();
        one.rewrite(at("192.0.2.9:53"), at("10.89.7.20:5353"));
        assert_eq!(one.bytes()[26..28], [0, 0]);
        assert_eq!(checks(one.bytes()).0, 0xffff);
    }

    #[test]
    fn what_has_no_ports_is_left_alone() {
        let good = packet(TCP, "192.0.2.9:1", "10.77.1.11:2", 0x05);
        assert_eq!(Packet::parse(&mut good.clone()).unwrap().closes(), (true, true));
        for (at, byte) in [(0, 0x65), (0, 0x44), (9, 1), (7, 1), (3, 39), (2, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(Packet::parse(&mut bad).is_none(), "byte {at}");
        }
        let frame = |kind: &[u8]| [&[0; 12], kind, &good].concat();
        assert_eq!(network(&frame(&[8, 0])), Some(14));
        assert_eq!(network(&frame(&[0x81, 0, 0, 5, 8, 0])), Some(18));
        assert_eq!(network(&frame(&[0x86, 0xdd])), None);
        assert_eq!(network(&good), Some(0));
    }

    #[test]
    fn fuzz_packets() {
        let good = packet(TCP, "192.0.2.9:1", "10.77.1.11:2", 0x18);
        Target::new("packets")
            .sample([&[0; 12], &IPV4[..], &good].concat())
            .sample([&[0; 12], &VLAN[..], &[0, 5], &IPV4[..], &good].concat())
            .run(|bytes| {
                let mut bytes = bytes.to_vec();
                let at = network(&bytes).context("no IPv4")?;
                let mut one = Packet::parse(&mut bytes[at..]).context("no ports")?;
                let (ends, (fin, reset)) = (one.ends(), one.closes());
                one.rewrite(ends.to, ends.from);
                assert_eq!(one.ends().to, ends.from);
                ensure!(!fin, "an end");
                ensure!(!reset, "a reset");
                Ok(())
            });
    }
}
