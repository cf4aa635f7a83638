//! How much room frames take in the UDP sockets that they are for.
//!
//! What comes in a freeze comes to the container at once, before it runs: it would find no more room
//! than a socket has while its owner reads, some 270 small datagrams by default.

use std::collections::HashSet;

use super::frames::EthernetFrame;

const ETHERNET: usize = 14;
const HEAD4: usize = 20;
const HEAD6: usize = 40;
const UDP: u8 = 17;
/// IPv6's header of a piece.
const PIECE: u8 = 44;
/// Where in the offload header the size of the pieces is that the kernel takes a frame apart into.
const PIECES_AT: usize = 4;
/// What a datagram takes beside its own bytes, at most.
const BESIDE: usize = 1024;

/// The ports that datagrams are for, and the bytes that they take in sockets, at most.
pub fn taken(frames: &[EthernetFrame]) -> (HashSet<u16>, usize) {
    let (mut ports, mut bytes) = (HashSet::new(), 0);
    for frame in frames {
        let Some(port) = port(frame) else { continue };
        ports.extend(port);
        let header = &frame.vnet_hdr;
        let size = u16::from_ne_bytes([header[PIECES_AT], header[PIECES_AT + 1]]);
        let pieces = match usize::from(size) {
            0 => 1,
            size => frame.bytes.len().div_ceil(size),
        };
        // The kernel takes memory in powers of two.
        bytes += 2 * frame.bytes.len() + pieces * BESIDE;
    }
    (ports, bytes)
}

/// Tells whether it is a datagram, or a piece of one.
pub fn is_datagram(frame: &EthernetFrame) -> bool {
    port(frame).is_some()
}

/// `None` for what is no UDP; no port in what is a piece of a datagram and not its first.
fn port(frame: &EthernetFrame) -> Option<Option<u16>> {
    let packet = frame.bytes.get(ETHERNET..)?;
    let half = |at: usize| packet.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b));
    let (udp, at, first) = match frame.bytes[ETHERNET - 2..ETHERNET] {
        [0x08, 0x00] => {
            let head = packet.first_chunk::<HEAD4>()?;
            (head[9], usize::from(head[0] & 15) * 4, half(6)? & 0x1fff == 0)
        }
        [0x86, 0xdd] => match *packet.get(6)? {
            PIECE => (*packet.get(HEAD6)?, HEAD6 + 8, half(HEAD6 + 2)? & 0xfff8 == 0),
            next => (next, HEAD6, true),
        },
        _ => return None,
    };
    match (udp, first) {
        (UDP, true) => half(at + 2).map(Some),
        (UDP, false) => Some(None),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u16, packet: &[u8]) -> EthernetFrame {
        let mut bytes = vec![0; ETHERNET - 2];
        bytes.extend(kind.to_be_bytes());
        bytes.extend(packet);
        EthernetFrame { link: 0, vnet_hdr: [0; 10], bytes }
    }

    fn v4(protocol: u8, piece: u16, options: usize, to: u16) -> EthernetFrame {
        let mut packet = vec![0; HEAD4 + options];
        packet[0] = 0x45 + (options / 4) as u8;
        packet[6..8].copy_from_slice(&piece.to_be_bytes());
        packet[9] = protocol;
        packet.extend([[0, 9], to.to_be_bytes(), [0, 8], [0, 0]].concat());
        frame(0x0800, &packet)
    }

    fn v6(piece: Option<u16>, to: u16) -> EthernetFrame {
        let mut packet = vec![0; HEAD6];
        packet[6] = if piece.is_some() { PIECE } else { UDP };
        if let Some(piece) = piece {
            packet.extend([[UDP, 0], piece.to_be_bytes(), [0, 0], [0, 0]].concat());
        }
        packet.extend([[0, 9], to.to_be_bytes(), [0, 8], [0, 0]].concat());
        frame(0x86dd, &packet)
    }

    #[test]
    fn ports_of_datagrams_and_of_first_pieces() {
        for (frame, expected) in [
            (v4(UDP, 0x4000, 0, 53), Some(Some(53))),
            (v4(UDP, 0, 8, 53), Some(Some(53))),
            (v4(UDP, 0x2000, 0, 53), Some(Some(53))),
            (v4(UDP, 0x2001, 0, 53), Some(None)),
            (v4(6, 0, 0, 53), None),
            (v6(None, 53), Some(Some(53))),
            (v6(Some(1), 53), Some(Some(53))),
            (v6(Some(8), 53), Some(None)),
            (frame(0x0806, &[0; 46]), None),
        ] {
            assert_eq!(port(&frame), expected, "{:02x?}", frame.bytes);
            for cut in 0..frame.bytes.len() {
                let bytes = frame.bytes[..cut].to_vec();
                let _ = (cut >= ETHERNET).then(|| port(&EthernetFrame { bytes, ..frame.clone() }));
            }
        }
    }

    #[test]
    fn room_for_all_of_them() {
        let mut many = v4(UDP, 0, 0, 7);
        many.bytes.resize(ETHERNET + HEAD4 + 8 + 1000, 0);
        many.vnet_hdr[PIECES_AT..PIECES_AT + 2].copy_from_slice(&10_u16.to_ne_bytes());
        let (ports, one) = taken(&[v4(6, 0, 0, 1), v4(UDP, 0, 0, 53)]);
        assert!(ports == HashSet::from([53]) && one >= 768, "{ports:?} {one}");
        let (ports, all) = taken(&[many, v6(None, 53)]);
        assert!(ports == HashSet::from([7, 53]) && all >= 101 * 768, "{ports:?} {all}");
    }
}
