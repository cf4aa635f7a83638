//! Keeping the frames that arrive while the fence is closed.
//!
//! A dropped frame costs its sender a retransmission timeout, 200 ms and more: longer than all
//! the rest of the pause. A packet socket sees a frame before the fence's ingress hook drops it,
//! so what comes in can be kept, carried along, and given to the container on its new host by
//! [`Replay`](crate::network::replay::Replay).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use super::image::{MAX_LINKS, NetworkImage};
use super::rtnl::{self, Rtnl};
use crate::problem::{Problem, Trying};
use crate::sys::netns::NetNs;
use crate::sys::packet::{Instruction, PacketSocket, VNET_HDR};

/// Longest Ethernet frame that is kept: what segment offload puts together is at most 64 KiB of
/// IP, and the Ethernet header.
pub const MAX_FRAME: usize = 65_535 + ETHERNET;
/// Shortest: Ethernet and the first byte of a packet.
const MIN_FRAME: usize = ETHERNET + 1;
const ETHERNET: usize = 14;
/// Room in the kernel for frames not read yet, bytes.
pub const ROOM: i32 = 32 << 20;
/// Frames handed out by one [`Capture::read`], so that the reader can do something else between.
const BATCH: usize = 256;
const ETH_P_ALL: u16 = 3;

/// One frame that came in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EthernetFrame {
    /// Place of its link in [`NetworkImage::links`].
    pub link: u16,
    /// `struct virtio_net_hdr`: which checksum is unfinished, how segments were merged.
    pub vnet_hdr: [u8; VNET_HDR],
    /// The frame, with its Ethernet header.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for EthernetFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frame {{ link: {}, {} bytes }}", self.link, self.bytes.len())
    }
}

impl EthernetFrame {
    /// Refuses what no honest peer sends. The kernel itself checks `vnet_hdr` on injection.
    pub fn validate(&self) -> Result<(), Problem> {
        if (MIN_FRAME..=MAX_FRAME).contains(&self.bytes.len()) && usize::from(self.link) < MAX_LINKS
        {
            Ok(())
        } else {
            Err(Problem::new("a kept frame is not valid", format!("{self:?}")))
        }
    }

    /// Returns where its packet is going.
    fn destination(&self) -> Option<IpAddr> {
        match self.bytes.get(12..14)? {
            [0x08, 0x00] => rtnl::ip(self.bytes.get(30..34)?),
            [0x86, 0xdd] => rtnl::ip(self.bytes.get(38..54)?),
            _ => None,
        }
    }

    /// Neighbour discovery answers for the place where a container is, not for the container.
    fn is_neighbour_discovery(&self) -> bool {
        const ICMPV6: u8 = 58;
        let b = &self.bytes;
        b.len() > 54 && b[12..14] == [0x86, 0xdd] && b[20] == ICMPV6 && (133..=137).contains(&b[54])
    }
}

/// Sees the IPv4 and IPv6 packets that come in for the container on all its links.
#[derive(Debug)]
pub struct Capture {
    socket: PacketSocket,
    /// Interface index and place in the image.
    links: Vec<(i32, u16)>,
    /// What is for these, where not all that comes is the container's.
    addresses: Vec<IpAddr>,
    buffer: Vec<u8>,
    listens: bool,
}

impl Capture {
    /// Makes everything ready, ahead of time; nothing is kept yet.
    pub fn prepare(container: &NetNs, image: &NetworkImage) -> Result<Self, Problem> {
        let trying = || "cannot listen on the container's network".to_owned();
        let infos = Rtnl::open(container).and_then(|mut s| s.links()).trying(trying)?;
        let links = image
            .outward()
            .filter_map(|(i, link)| {
                let info = infos.iter().find(|info| info.name == link.name)?;
                Some((info.index, u16::try_from(i).ok()?))
            })
            .collect();
        Self::on(container, links, Vec::new())
    }

    /// The same for some addresses of a host: what comes for them through these interfaces, whose
    /// place in the list is the frames' link.
    pub fn of_addresses(
        host: &NetNs,
        interfaces: &[&str],
        addresses: Vec<IpAddr>,
    ) -> Result<Self, Problem> {
        let trying = || "cannot listen on the host's network".to_owned();
        let infos = Rtnl::open(host).and_then(|mut s| s.links()).trying(trying)?;
        let links = (0..).zip(interfaces).filter_map(|(i, name)| {
            let info = infos.iter().find(|info| info.name == **name)?;
            Some((info.index, i))
        });
        Self::on(host, links.collect(), addresses)
    }

    fn on(
        namespace: &NetNs,
        links: Vec<(i32, u16)>,
        addresses: Vec<IpAddr>,
    ) -> Result<Self, Problem> {
        let trying = || "cannot listen on the container's network".to_owned();
        let socket = namespace.run(PacketSocket::open).and_then(|s| s).trying(trying)?;
        socket.with_vnet_header().trying(trying)?;
        socket.ignore_outgoing().trying(trying)?;
        socket.receive_room(ROOM).trying(trying)?;
        let buffer = vec![0; VNET_HDR + MAX_FRAME];
        Ok(Self { socket, links, addresses, buffer, listens: false })
    }

    /// Begins to keep frames. Right before the fence closes is best: what came earlier has
    /// reached the container, and doing it after would lose what comes between.
    pub fn start(&mut self) -> io::Result<()> {
        if self.addresses.is_empty() {
            self.socket.filter(&FILTER)?
        } else {
            self.socket.filter(&filter_of(&self.addresses))?
        }
        self.listen()
    }

    /// Begins to keep the frames that [`FenceSide::New`](crate::network::fence::FenceSide::New) stops, and no others.
    pub fn start_new(&mut self) -> io::Result<()> {
        self.socket.filter(&NEW)?;
        self.listen()
    }

    fn listen(&mut self) -> io::Result<()> {
        // All protocols: handlers of one protocol come after the hook that the fence is on.
        if !std::mem::replace(&mut self.listens, true) {
            self.socket.listen(ETH_P_ALL, 0)?;
        }
        Ok(())
    }

    /// Moves what has come in to `frames`; returns how many. 0: nothing waits, poll again.
    pub fn read(&mut self, frames: &mut Vec<EthernetFrame>) -> io::Result<usize> {
        let before = frames.len();
        while frames.len() - before < BATCH {
            let Some((length, ifindex)) = self.socket.receive(&mut self.buffer)? else { break };
            let Some(bytes) = self.buffer.get(VNET_HDR..length) else { continue };
            let Some((_, link)) = self.links.iter().find(|(index, _)| *index == ifindex) else {
                continue;
            };
            let mut vnet_hdr = [0; VNET_HDR];
            vnet_hdr.copy_from_slice(&self.buffer[..VNET_HDR]);
            let frame = EthernetFrame { link: *link, vnet_hdr, bytes: bytes.to_vec() };
            // While only new connections are kept, the socket's filter knows no addresses.
            let wanted = self.addresses.is_empty()
                || frame.destination().is_some_and(|to| self.addresses.contains(&to));
            if wanted && frame.validate().is_ok() && !frame.is_neighbour_discovery() {
                frames.push(frame);
            }
        }
        Ok(frames.len() - before)
    }

    /// Returns how many frames were lost because they were not read in time, since the last call.
    pub fn lost(&self) -> io::Result<u32> {
        self.socket.dropped()
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ
const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT
const RETURN: u16 = 0x06;
const AD: u32 = (-0x1000_i32) as u32; // SKF_AD_OFF

/// [`FILTER`], and of it only what is for these addresses.
fn filter_of(addresses: &[IpAddr]) -> Vec<Instruction> {
    const NO: Instruction = Instruction(RETURN, 0, 0, 0);
    const YES: Instruction = Instruction(RETURN, 0, 0, u32::MAX);
    let word = |bytes: &[u8]| bytes.iter().fold(0, |word, b| word << 8 | u32::from(*b));
    let (mut v4, mut v6) = (vec![Instruction(LOAD, 0, 0, 30)], Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(ip) => {
                v4.extend([Instruction(EQUAL, 0, 1, word(&ip.octets())), YES]);
            }
            IpAddr::V6(ip) => {
                // Four words, and beyond the end of this address when one of them differs.
                for (i, bytes) in (0_u8..).zip(ip.octets().chunks(4)) {
                    v6.push(Instruction(LOAD, 0, 0, 38 + 4 * u32::from(i)));
                    v6.push(Instruction(EQUAL, 0, 7 - 2 * i, word(bytes)));
                }
                v6.push(YES);
            }
        }
    }

    v4.push(NO);
    v6.push(NO);
    let mut all = vec![
        Instruction(LOAD, 0, 0, AD + 28), // hardware type
        Instruction(EQUAL, 0, 1, 772),    // ARPHRD_LOOPBACK
        NO,
        Instruction(LOAD, 0, 0, AD + 48), // VLAN tag present
        Instruction(EQUAL, 1, 0, 0),
        NO,
        Instruction(LOAD, 0, 0, AD + 4), // packet type
        Instruction(GREATER, 0, 1, 2),   // beyond HOST, BROADCAST, MULTICAST
        NO,
        Instruction(LOAD, 0, 0, AD), // protocol
        Instruction(EQUAL, 0, v4.len() as u8, 0x0800),
    ];

    all.append(&mut v4);
    all.extend([Instruction(EQUAL, 1, 0, 0x86dd), NO]);
    all.append(&mut v6);

    all
}

/// Lets IPv4 and IPv6 pass that is for this host or for all, not on loopback, not in a VLAN.
const FILTER: [Instruction; 11] = {
    [
        Instruction(LOAD, 0, 0, AD + 28), // hardware type
        Instruction(EQUAL, 8, 0, 772),    // ARPHRD_LOOPBACK
        Instruction(LOAD, 0, 0, AD + 48), // VLAN tag present
        Instruction(EQUAL, 0, 6, 0),
        Instruction(LOAD, 0, 0, AD + 4), // packet type
        Instruction(GREATER, 4, 0, 2),   // beyond HOST, BROADCAST, MULTICAST
        Instruction(LOAD, 0, 0, AD),     // protocol
        Instruction(EQUAL, 1, 0, 0x0800),
        Instruction(EQUAL, 0, 1, 0x86dd),
        Instruction(RETURN, 0, 0, u32::MAX),
        Instruction(RETURN, 0, 0, 0),
    ]
};

/// The same, but of TCP's first segments only, as nft.rs's `drop_new_connections` knows them.
const NEW: [Instruction; 24] = {
    const HALF: u16 = 0x28; // BPF_LD | BPF_H | BPF_ABS
    const BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    const BYTE_BEHIND: u16 = 0x50; // BPF_LD | BPF_B | BPF_IND
    const HEADER_LENGTH: u16 = 0xb1; // BPF_LDX | BPF_B | BPF_MSH
    const AND: u16 = 0x54; // BPF_ALU | BPF_AND
    const ANY_OF: u16 = 0x45; // BPF_JMP | BPF_JSET
    const TCP: u32 = 6;
    const SYN: u32 = 0x02;
    const SYN_ACK: u32 = 0x12;
    [
        Instruction(LOAD, 0, 0, AD + 28), // hardware type
        Instruction(EQUAL, 21, 0, 772),   // ARPHRD_LOOPBACK
        Instruction(LOAD, 0, 0, AD + 48), // VLAN tag present
        Instruction(EQUAL, 0, 19, 0),
        Instruction(LOAD, 0, 0, AD + 4), // packet type
        Instruction(GREATER, 17, 0, 2),  // beyond HOST, BROADCAST, MULTICAST
        Instruction(LOAD, 0, 0, AD),     // protocol
        Instruction(EQUAL, 1, 0, 0x0800),
        Instruction(EQUAL, 8, 14, 0x86dd),
        Instruction(BYTE, 0, 0, 23), // IPv4's protocol
        Instruction(EQUAL, 0, 12, TCP),
        Instruction(HALF, 0, 0, 20),
        Instruction(ANY_OF, 10, 0, 0x1fff), // not the first fragment
        Instruction(HEADER_LENGTH, 0, 0, 14),
        Instruction(BYTE_BEHIND, 0, 0, 14 + 13),
        Instruction(AND, 0, 0, SYN_ACK),
        Instruction(EQUAL, 5, 6, SYN),
        Instruction(BYTE, 0, 0, 20), // IPv6's next header
        Instruction(EQUAL, 0, 4, TCP),
        Instruction(BYTE, 0, 0, 14 + 40 + 13),
        Instruction(AND, 0, 0, SYN_ACK),
        Instruction(EQUAL, 0, 1, SYN),
        Instruction(RETURN, 0, 0, u32::MAX),
        Instruction(RETURN, 0, 0, 0),
    ]
};

pub(crate) const HEAD: usize = 2 + 10;

/// A frame as it goes over the link: link number, virtio header, contents.
pub fn encode(frame: &EthernetFrame) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + frame.bytes.len());
    bytes.extend(frame.link.to_le_bytes());
    bytes.extend(frame.vnet_hdr);
    bytes.extend(&frame.bytes);
    bytes
}

/// And back.
///
/// # Errors
/// When it is none.
pub fn decode(bytes: &[u8]) -> anyhow::Result<EthernetFrame> {
    let (Some(link), Some(header), Some(rest)) =
        (bytes.first_chunk::<2>(), bytes.get(2..HEAD), bytes.get(HEAD..))
    else {
        anyhow::bail!("a kept frame cut short");
    };
    let mut vnet_hdr = [0; 10];
    vnet_hdr.copy_from_slice(header);
    let frame = EthernetFrame { link: u16::from_le_bytes(*link), vnet_hdr, bytes: rest.to_vec() };
    frame.validate()?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Target;

    /// Returns what the kernel makes of a program for a frame that is for this host, not in a VLAN.
    fn passes(program: &[Instruction], frame: &[u8]) -> bool {
        let (mut at, mut value) = (0, 0_u32);
        loop {
            let Instruction(code, yes, no, k) = program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { yes } else { no });
            match code {
                LOAD if k >= AD => {
                    let protocol = u32::from(frame[12]) << 8 | u32::from(frame[13]);
                    value = [(0, protocol), (4, 0), (28, 1), (48, 0)]
                        .into_iter()
                        .find(|(what, _)| AD + what == k)
                        .map(|(_, value)| value)
                        .expect("something that is known of a frame");
                }
                LOAD => {
                    let Some(bytes) = frame.get(k as usize..k as usize + 4) else { return false };
                    value = u32::from_be_bytes(bytes.try_into().expect("four"));
                }
                EQUAL => at += jump(value == k),
                GREATER => at += jump(value > k),
                RETURN => return k != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn only_what_is_for_the_addresses_is_kept() {
        let packet = |kind: [u8; 2], offset: usize, to: &str| {
            let mut frame = vec![0; 80];
            frame[12..14].copy_from_slice(&kind);
            let to = rtnl::octets(to.parse().expect("an address"));
            frame[offset..offset + to.len()].copy_from_slice(&to);
            frame
        };

        let v4 = |to| packet([0x08, 0], 30, to);
        let v6 = |to| packet([0x86, 0xdd], 38, to);
        let moved = ["10.0.0.5", "fd00::5", "10.0.0.6", "fd00::1:5"];
        let moved: Vec<IpAddr> = moved.iter().map(|a| a.parse().expect("an address")).collect();
        let program = filter_of(&moved);
        for frame in [v4("10.0.0.5"), v4("10.0.0.6"), v6("fd00::5"), v6("fd00::1:5")] {
            assert!(passes(&program, &frame), "{frame:?}");
            let frame = EthernetFrame { link: 0, vnet_hdr: [0; VNET_HDR], bytes: frame };
            assert!(frame.destination().is_some_and(|to| moved.contains(&to)));
        }

        for frame in [v4("10.0.0.1"), v4("5.0.0.10"), v6("fd00::6"), v6("fd00::1:6")] {
            assert!(!passes(&program, &frame), "{frame:?}");
            assert!(passes(&FILTER, &frame), "{frame:?}");
        }
        assert!(!passes(&program, &packet([0x08, 0x06], 38, "10.0.0.5")));
        assert!(!passes(&filter_of(&moved[..1]), &v6("fd00::5")));
    }

    #[test]
    fn fuzz_kept_frames() {
        let frame = |bytes: Vec<u8>| EthernetFrame { link: 0, vnet_hdr: [0; VNET_HDR], bytes };
        let v4 = [vec![0; 12], vec![8, 0], vec![0x45; 40]].concat();
        let v6 = [vec![0; 12], vec![0x86, 0xdd], vec![58; 60]].concat();
        let target =
            Target::new("kept-frames").sample(encode(&frame(v4))).sample(encode(&frame(v6)));
        target.run(|bytes| {
            let frame = decode(bytes)?;
            assert_eq!(encode(&frame), bytes);
            let _ = (frame.destination(), frame.is_neighbour_discovery());
            Ok(())
        });
    }
}
