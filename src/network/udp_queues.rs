//! Datagrams that the container had not read yet when it was frozen, as frames.
//!
//! A checkpoint leaves what waits in UDP sockets behind. Made into the frames that they came in, they
//! can take the same way as those that came during the freeze: [`Replay`](crate::network::replay::Replay)
//! gives them to the sockets on the other host.

use std::cell::Cell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::announce::{checksum, ethernet};
use super::frames::EthernetFrame;
use super::image::{LinkKind, NetworkImage};
use crate::sys::datagrams::Datagram;
use crate::sys::netlink::Mac;
use crate::sys::packet::VNET_HDR;

const UDP: u8 = 17;
const ETHERNET: usize = 14;
const HEAD4: usize = 20;
const HEAD6: usize = 40;
const HEAD_UDP: usize = 8;

/// Which link brings what is sent to an address of the container.
#[derive(Debug, Default)]
pub struct UdpEndpoints {
    /// Address, place of the link in the image, and the link's hardware address.
    links: Vec<(IpAddr, u16, Mac)>,
}

impl UdpEndpoints {
    /// Returns those of a container.
    pub fn of(image: &NetworkImage) -> Self {
        let first = image.outward().next();
        let mut links = Vec::new();
        for (at, link) in image.links.iter().enumerate() {
            // What is sent to an address of loopback from outside comes in by another link.
            let by = if link.kind == LinkKind::Loopback { first } else { Some((at, link)) };
            let Some((number, Some(mac))) = by.map(|(number, link)| (number, link.mac)) else {
                continue;
            };
            let Ok(number) = u16::try_from(number) else { continue };
            links.extend(link.addresses.iter().map(|a| (a.local.to_canonical(), number, mac)));
        }
        Self { links }
    }

    /// Returns those of addresses that a host lends: address, place of the interface, its hardware address.
    pub fn lent(links: impl IntoIterator<Item = (IpAddr, u16, Mac)>) -> Self {
        let links = links.into_iter().map(|(address, at, mac)| (address.to_canonical(), at, mac));
        Self { links: links.collect() }
    }

    /// The frame that brings a datagram to the container's port; `None` where it was sent by the
    /// container itself, or to more than one.
    ///
    /// A multicast or a broadcast waits in every socket that takes it, and would come to all of them
    /// as often.
    pub fn frame(&self, port: u16, datagram: &Datagram) -> Option<EthernetFrame> {
        let Datagram { from, to, payload } = datagram;
        let (_, link, mac) = self.links.iter().find(|(address, ..)| address == to)?;
        if from.ip().is_loopback() || self.links.iter().any(|(own, ..)| *own == from.ip()) {
            return None;
        }

        let length = u16::try_from(HEAD_UDP + payload.len()).ok()?;
        let mut udp = Vec::with_capacity(HEAD_UDP + payload.len());
        for half in [from.port(), port, length, 0] {
            udp.extend(half.to_be_bytes());
        }

        udp.extend(payload);
        let mut bytes;
        let pseudo = match (from.ip(), to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let whole = u16::try_from(HEAD4).ok()?.checked_add(length)?.to_be_bytes();
                // Not in pieces, and far enough from its end.
                let mut head = vec![0x45, 0, whole[0], whole[1], 0, 0, 0x40, 0, 64, UDP, 0, 0];
                head.extend(from.octets());
                head.extend(to.octets());
                let sum = checksum(&head).to_be_bytes();
                head[10..12].copy_from_slice(&sum);
                bytes = ethernet(*mac, Mac::default(), 0x0800);
                bytes.extend(head);
                [&from.octets()[..], &to.octets(), &[0, UDP], &length.to_be_bytes()].concat()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let half = length.to_be_bytes();
                bytes = ethernet(*mac, Mac::default(), 0x86dd);
                bytes.extend([0x60, 0, 0, 0, half[0], half[1], UDP, 64]);
                bytes.extend(from.octets());
                bytes.extend(to.octets());
                [&from.octets()[..], &to.octets(), &[0, UDP], &half].concat()
            }
            _ => return None,
        };

        // 0 says that there is none.
        let sum = match checksum(&[&pseudo[..], &udp].concat()) {
            0 => 0xffff,
            sum => sum,
        };

        udp[6..8].copy_from_slice(&u16::to_be_bytes(sum));
        bytes.extend(udp);
        let frame = EthernetFrame { link: *link, vnet_hdr: [0; VNET_HDR], bytes };

        frame.validate().is_ok().then_some(frame)
    }
}

/// Returns what a frame brings, if it is a whole datagram: from where, to where, what.
fn datagram(frame: &EthernetFrame) -> Option<(SocketAddr, SocketAddr, &[u8])> {
    let (head, packet) = frame.bytes.split_at_checked(ETHERNET)?;
    let address = |at: usize, v6: bool| -> Option<IpAddr> {
        Some(if !v6 {
            IpAddr::from(*packet.get(at..)?.first_chunk::<4>()?)
        } else {
            IpAddr::from(*packet.get(at..)?.first_chunk::<16>()?)
        })
    };

    let (from, to, udp) = match head[12..14] {
        [0x08, 0x00] => {
            let head = packet.first_chunk::<HEAD4>()?;
            let whole = head[6] & 0x3f == 0 && head[7] == 0;
            if head[9] != UDP || !whole {
                return None;
            }
            let length = usize::from(head[0] & 15) * 4;
            (address(12, false)?, address(16, false)?, packet.get(length..)?)
        }
        [0x86, 0xdd] if packet.get(6) == Some(&UDP) => {
            (address(8, true)?, address(24, true)?, packet.get(HEAD6..)?)
        }
        _ => return None,
    };

    let half = |at: usize| Some(u16::from_be_bytes(*udp.get(at..)?.first_chunk()?));
    let payload = udp.get(HEAD_UDP..usize::from(half(4)?))?;
    Some((SocketAddr::new(from, half(0)?), SocketAddr::new(to, half(2)?), payload))
}

/// Takes out of `caught` what is in `unread` already: what came when frames were being caught and the
/// fence was not closed yet, and is in the container's sockets.
pub fn once(caught: &mut Vec<EthernetFrame>, unread: &[EthernetFrame]) {
    let mut twins: HashMap<_, Cell<usize>> = HashMap::new();
    for one in unread.iter().filter_map(datagram) {
        *twins.entry(one).or_default().get_mut() += 1;
    }
    let twins = &twins;
    caught.retain(|frame| {
        let left = datagram(frame).and_then(|one| twins.get(&one)).filter(|left| left.get() > 0);
        left.map(|left| left.set(left.get() - 1)).is_none()
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 9];

    fn homes() -> UdpEndpoints {
        let own = |text: &str| text.parse::<IpAddr>().unwrap();
        UdpEndpoints { links: vec![(own("10.0.0.9"), 1, MAC), (own("fd00::9"), 1, MAC)] }
    }

    fn sent(from: &str, to: &str, payload: &[u8]) -> Datagram {
        let payload = payload.to_vec();
        Datagram { from: from.parse().unwrap(), to: to.parse().unwrap(), payload }
    }

    #[test]
    fn a_frame_brings_what_it_was_made_of() {
        for (from, to, head) in
            [("10.0.0.1:5353", "10.0.0.9", 34), ("[fd00::1]:5353", "fd00::9", 54)]
        {
            for payload in [&b""[..], b"odd", b"even", &[0xa5; 9001]] {
                let frame = homes().frame(53, &sent(from, to, payload)).unwrap();
                let wanted = SocketAddr::new(to.parse().unwrap(), 53);
                let brings = datagram(&frame).unwrap();
                assert_eq!(brings, (from.parse().unwrap(), wanted, payload));
                assert_eq!((frame.link, &frame.bytes[..6]), (1, &MAC[..]));

                // A sum over all with the sum in it is none.
                let (addresses, length) =
                    (if head == 34 { 26..34 } else { 22..54 }, payload.len() + 8);
                let mut pseudo = frame.bytes[addresses].to_vec();
                pseudo.extend([0, UDP]);
                pseudo.extend(u16::try_from(length).unwrap().to_be_bytes());
                pseudo.extend(&frame.bytes[head..]);
                assert_eq!(checksum(&pseudo), 0);
                if head == 34 {
                    assert_eq!(checksum(&frame.bytes[14..34]), 0);
                }

                for cut in 0..frame.bytes.len().min(60) {
                    let bytes = frame.bytes[..cut].to_vec();
                    let short = EthernetFrame { bytes, ..frame.clone() };
                    assert!(payload.is_empty() || datagram(&short).is_none(), "cut at {cut}");
                }
            }
        }
    }

    #[test]
    fn no_frame_for_what_no_wire_brought_to_it_alone() {
        for (from, to) in [
            ("10.0.0.1:1", "224.0.0.251"),
            ("10.0.0.1:1", "10.0.0.255"),
            ("10.0.0.9:1", "10.0.0.9"),
            ("127.0.0.1:1", "127.0.0.1"),
            ("[fd00::1]:1", "ff02::fb"),
            ("[fd00::1]:1", "10.0.0.9"),
        ] {
            assert_eq!(homes().frame(53, &sent(from, to, b"x")), None, "{from} {to}");
        }
        let long = sent("10.0.0.1:1", "10.0.0.9", &[0; 65_530]);
        assert_eq!(homes().frame(53, &long), None);
    }

    #[test]
    fn nothing_comes_twice() {
        let frame =
            |payload: &[u8]| homes().frame(53, &sent("10.0.0.1:7", "10.0.0.9", payload)).unwrap();
        let mut other = frame(b"tcp");
        other.bytes[23] = 6;
        let mut caught = vec![frame(b"b"), other.clone(), frame(b"c"), frame(b"b")];
        once(&mut caught, &[frame(b"a"), frame(b"b"), other.clone()]);
        assert_eq!(caught, [other, frame(b"c"), frame(b"b")]);
    }
}
