//! The two ends of a container's network whose address stays where it is while the container does
//! not: frames go in and out here, and between the hosts over whatever the caller has.
//!
//! At home, the host that has the address, the container's namespace stays as it was, with its links,
//! and with its fence closed: no kernel answers for it. [`HomeLinks`] take in what comes before the
//! fence drops it, and send past the fence. So the neighbours see the same hardware address at the
//! same place, and nothing has to be announced.
//!
//! Away, each link is a TAP device with the name, hardware address and MTU of the one at home. Frames
//! travel whole, in a stream: the MTU needs no allowance for a tunnel's headers.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use super::fence;
use super::frames::{EthernetFrame, MAX_FRAME};
use super::image::{LinkImage, NetworkImage};
use super::placement::{Attachment, Placement};
use super::read::address;
use super::rtnl::{self, Rtnl, ifinfo};
use super::sockets::SockDiag;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::Request;
use crate::sys::netns::NetNs;
use crate::sys::packet::{Instruction, PacketSocket, VNET_HDR};
use crate::sys::tun::Tap;

/// Room in the kernel for frames that wait for the way to the other host, bytes: what does not fit is
/// lost, as on any link that is too slow.
const ROOM: i32 = 4 << 20;
/// Frames handed out by one read, so that they go out together.
const BATCH: usize = 256;
const ETH_P_ALL: u16 = 3;

/// Makes the device of a link, in the container's namespace, down.
pub(super) fn tap(namespace: &NetNs, link: &LinkImage) -> Result<Tap, Problem> {
    let trying = || format!("cannot make {} as a TAP device", link.name);
    let tap = namespace
        .run(|| {
            let tap = Tap::create(&link.name)?;
            tap.persist()?;
            Ok::<_, io::Error>(tap)
        })
        .and_then(|tap| tap)
        .trying(trying)
        .map_err(|p| p.hint("the kernel needs CONFIG_TUN, and /dev/net/tun must be there"))?;
    let mut socket = Rtnl::open(namespace).trying(trying)?;
    let made = socket.link(&link.name).trying(trying)?;
    let index = made.ok_or_else(|| Problem::new(trying(), "it is gone"))?.index;
    let mut request = Request::new(rtnl::NEWLINK, 0, &ifinfo(index, 0, 0));
    request.attr(rtnl::IFLA_ADDRESS, &link.mac.unwrap_or_default());
    socket.change(&request).trying(trying)?;
    Ok(tap)
}

/// Takes the devices of a namespace that are there and that nobody holds any more.
pub fn take_taps(namespace: &NetNs, names: &[String]) -> Result<Vec<(String, Tap)>, Problem> {
    let trying = || "cannot take the forwarded interfaces over".to_owned();
    let infos = Rtnl::open(namespace).and_then(|mut s| s.links()).trying(trying)?;
    let mut taps = Vec::new();
    for name in names {
        // One that the container has deleted is not made again.
        if infos.iter().any(|l| l.name == *name && l.kind == "tun") {
            let tap = namespace.run(|| Tap::create(name)).and_then(|t| t).trying(trying)?;
            taps.push((name.clone(), tap));
        }
    }
    Ok(taps)
}

/// The container's links at home, for whoever forwards.
#[derive(Debug)]
pub struct HomeLinks {
    namespace: NetNs,
    /// Interface index, and place in the list of links that both ends count by.
    links: Vec<(i32, u16)>,
    out: PacketSocket,
}

impl HomeLinks {
    /// Opens the namespace's links of these names; nothing is heard yet.
    pub fn open(namespace: NetNs, names: &[String]) -> Result<Self, Problem> {
        let trying = || "cannot open the kept network".to_owned();
        let infos = Rtnl::open(&namespace).and_then(|mut s| s.links()).trying(trying)?;
        let mut links = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let info = infos.iter().find(|l| l.name == *name);
            let info = info.ok_or_else(|| Problem::new(trying(), format!("no link {name}")))?;
            links.push((info.index, i as u16));
        }
        let out = namespace.run(PacketSocket::open).and_then(|s| s).trying(trying)?;
        out.with_vnet_header().and_then(|()| out.mark(fence::PASS)).trying(trying)?;
        Ok(Self { namespace, links, out })
    }

    /// Begins to hear what comes in, fence or not.
    pub fn listen(&self) -> Result<FrameReceiver, Problem> {
        let trying = || "cannot listen on the kept network".to_owned();
        let socket = self.namespace.run(PacketSocket::open).and_then(|s| s).trying(trying)?;
        socket
            .with_vnet_header()
            .and_then(|()| socket.ignore_outgoing())
            .and_then(|()| socket.receive_room(ROOM))
            .and_then(|()| socket.filter(&FILTER))
            .trying(trying)?;
        for (index, _) in &self.links {
            // Groups that the container has joined are known to the kernel where it is.
            socket.all_multicasts(*index).trying(trying)?;
        }
        socket.listen(ETH_P_ALL, 0).trying(trying)?;
        Ok(FrameReceiver { socket, links: self.links.clone() })
    }

    /// Sends a frame of the container's.
    ///
    /// # Errors
    /// When it is not valid, or the link does not take it.
    pub fn send(&self, frame: &EthernetFrame) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        frame.validate().map_err(|_| invalid())?;
        let link = self.links.iter().find(|(_, place)| *place == frame.link);
        let (index, _) = link.ok_or_else(invalid)?;
        let mut bytes = Vec::with_capacity(VNET_HDR + frame.bytes.len());
        bytes.extend_from_slice(&frame.vnet_hdr);
        bytes.extend_from_slice(&frame.bytes);
        self.out.send(*index, &bytes)
    }
}

/// Hears what comes in for the container at home.
#[derive(Debug)]
pub struct FrameReceiver {
    socket: PacketSocket,
    links: Vec<(i32, u16)>,
}

impl FrameReceiver {
    /// Moves what has come in to `frames`, a bounded number of them.
    pub fn read(&self, buffer: &mut [u8], frames: &mut Vec<EthernetFrame>) -> io::Result<()> {
        while frames.len() < BATCH {
            let Some((length, ifindex)) = self.socket.receive(buffer)? else { break };
            let link = self.links.iter().find(|(index, _)| *index == ifindex);
            if let (Some(bytes), Some((_, link))) = (buffer.get(..length), link) {
                frames.extend(frame(*link, bytes));
            }
        }
        Ok(())
    }
}

impl AsFd for FrameReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Room for one frame with its header.
pub fn buffer() -> Vec<u8> {
    vec![0; VNET_HDR + MAX_FRAME]
}

/// A frame as a device or socket gives it, its header first.
pub fn frame(link: u16, bytes: &[u8]) -> Option<EthernetFrame> {
    let vnet_hdr = *bytes.first_chunk::<VNET_HDR>()?;
    let frame = EthernetFrame { link, vnet_hdr, bytes: bytes[VNET_HDR..].to_vec() };
    frame.validate().is_ok().then_some(frame)
}

/// Counts the container's connections over its links of some names.
#[derive(Debug)]
pub struct Meter {
    sock_diag: SockDiag,
    links: Rtnl,
    names: Vec<String>,
}

impl Meter {
    /// Makes ready to look into a namespace.
    pub fn new(namespace: &NetNs, names: Vec<String>) -> Result<Self, Problem> {
        let links = Rtnl::open(namespace).trying(|| "cannot open the namespace".into())?;
        Ok(Self { sock_diag: SockDiag::new(namespace)?, links, names })
    }

    /// TCP connections that are open over an address of these links, as these are now.
    pub fn connections(&mut self) -> Result<u32, Problem> {
        let trying = || "cannot read the forwarded addresses".to_owned();
        let infos = self.links.links().trying(trying)?;
        let ours = infos.iter().filter(|l| self.names.contains(&l.name)).map(|l| l.index);
        let ours: Vec<i32> = ours.collect();
        let all = self.links.addresses().trying(trying)?;
        let all = all.iter().filter(|m| rtnl::index_at(m, 4).is_some_and(|i| ours.contains(&i)));
        let addresses: Vec<IpAddr> = all.filter_map(address).map(|a| a.local).collect();
        Ok(self.sock_diag.connections(&addresses)?.len() as u32)
    }
}

/// Tells whether the container's addresses belong to none of the networks that its links would hang on
/// here. `None` where that cannot be said: there is no such interface, or it has no address.
pub fn is_elsewhere(image: &NetworkImage, placement: &Placement, host: &NetNs) -> Option<bool> {
    let (links, addresses) =
        Rtnl::open(host).and_then(|mut s| Ok((s.links()?, s.addresses()?))).ok()?;
    let mut elsewhere = None;

    for (_, link) in image.outward() {
        let theirs: Vec<IpAddr> =
            link.addresses.iter().map(|a| a.local).filter(|ip| !is_link_local(*ip)).collect();
        if theirs.is_empty() {
            continue;
        }

        let hook = placement.hook(link).filter(|h| *h != Attachment::Tap)?;
        let on = links.iter().find(|l| l.name == hook.name())?;
        let networks: Vec<(IpAddr, u8)> = addresses
            .iter()
            .filter(|m| rtnl::index_at(m, 4) == Some(on.index))
            .filter_map(address)
            .filter(|a| !is_link_local(a.local))
            .map(|a| (a.peer.unwrap_or(a.local), a.prefix))
            .collect();
        if networks.is_empty() {
            return None;
        }

        if theirs.iter().any(|ip| networks.iter().any(|n| contains(*n, *ip))) {
            return Some(false);
        }
        elsewhere = Some(true);
    }
    elsewhere
}

/// Tells whether an address means something on its own link only: such are everywhere.
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_loopback(),
    }
}

fn contains((network, prefix): (IpAddr, u8), ip: IpAddr) -> bool {
    let same = |a: u128, b: u128, bits: u32| {
        let rest = bits.saturating_sub(u32::from(prefix));
        a.checked_shr(rest).unwrap_or(0) == b.checked_shr(rest).unwrap_or(0)
    };
    match (network, ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        _ => false,
    }
}

/// Lets everything pass that is for this host or for all, not on loopback, not in a VLAN.
const FILTER: [Instruction; 8] = {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ
    const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT
    const RETURN: u16 = 0x06;
    const AD: u32 = (-0x1000_i32) as u32; // SKF_AD_OFF
    [
        Instruction(LOAD, 0, 0, AD + 28), // hardware type
        Instruction(EQUAL, 5, 0, 772),    // ARPHRD_LOOPBACK
        Instruction(LOAD, 0, 0, AD + 48), // VLAN tag present
        Instruction(EQUAL, 0, 3, 0),
        Instruction(LOAD, 0, 0, AD + 4), // packet type
        Instruction(GREATER, 1, 0, 2),   // beyond HOST, BROADCAST, MULTICAST
        Instruction(RETURN, 0, 0, u32::MAX),
        Instruction(RETURN, 0, 0, 0),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_their_addresses() {
        let ip = |s: &str| s.parse::<IpAddr>().expect("an address");
        for (network, prefix, address, inside) in [
            ("10.77.1.11", 24, "10.77.1.50", true),
            ("10.77.1.11", 24, "10.77.2.50", false),
            ("0.0.0.0", 0, "10.77.2.50", true),
            ("10.77.1.11", 32, "10.77.1.11", true),
            ("fd77:1::11", 64, "fd77:1::50", true),
            ("fd77:1::11", 64, "fd77:2::50", false),
            ("fd77:1::11", 0, "10.77.1.50", false),
        ] {
            assert_eq!(contains((ip(network), prefix), ip(address)), inside, "{address}");
        }
    }
}
