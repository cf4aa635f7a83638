//! Telling the network that the container's address has moved.
//!
//! For each IPv4 address a gratuitous ARP in both forms (some hosts heed only requests, some only
//! replies), for each IPv6 address an unsolicited neighbour advertisement with the override flag
//! ([RFC 5227](https://www.rfc-editor.org/rfc/rfc5227),
//! [RFC 4861](https://www.rfc-editor.org/rfc/rfc4861) 7.2.6). Whatever the hosts make of them, the
//! switches learn the new port from the sender's hardware address. The fence must be open.
//!
//! Switches that lead multicasts only to where they are wanted hear of each group as well, in a report of
//! IGMPv3 ([RFC 3376](https://www.rfc-editor.org/rfc/rfc3376) 4.2) or MLDv2
//! ([RFC 3810](https://www.rfc-editor.org/rfc/rfc3810) 5.2): the kernel sent its own against the
//! closed fence. IPv6's neighbour discovery goes by such groups, too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::image::NetworkImage;
use super::rtnl::Rtnl;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::Mac;
use crate::sys::netns::NetNs;
use crate::sys::packet::PacketSocket;

const BROADCAST: Mac = [0xff; 6];
/// Hardware address of `ff02::1`, all nodes.
const ALL_NODES: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// `224.0.0.22` and `ff02::16`, all routers that understand reports, and their hardware addresses.
const IGMP_ROUTERS: (Ipv4Addr, Mac) = (Ipv4Addr::new(224, 0, 0, 22), [1, 0, 0x5e, 0, 0, 22]);
const MLD_ROUTERS: (Ipv6Addr, Mac) =
    (Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16), [0x33, 0x33, 0, 0, 0, 0x16]);
/// `CHANGE_TO_EXCLUDE_MODE`, without a source: from all.
const FROM_ALL: u8 = 4;
/// As many records as are sent in one report.
const MOST_RECORDS: usize = 50;

/// Prepared frames, and a socket to send them through; sending costs microseconds and may be
/// repeated.
#[derive(Debug)]
pub struct Announcer {
    socket: PacketSocket,
    frames: Vec<(i32, Vec<u8>)>,
    senders: Vec<Sender>,
}

/// Who a link's reports are from.
#[derive(Debug)]
struct Sender {
    link: i32,
    mac: Mac,
    v4: Ipv4Addr,
    /// One of its own link, or none.
    v6: Ipv6Addr,
}

impl Announcer {
    /// Makes the frames for all addresses of all links that lead outward.
    pub fn prepare(container: &NetNs, image: &NetworkImage) -> Result<Self, Problem> {
        let trying = || "cannot prepare the announcement of the address".to_owned();
        let infos = Rtnl::open(container).and_then(|mut s| s.links()).trying(trying)?;
        let socket = container.run(PacketSocket::open).and_then(|s| s).trying(trying)?;
        let (mut frames, mut senders) = (Vec::new(), Vec::new());
        for (_, link) in image.outward().filter(|(_, l)| l.up) {
            let (Some(info), Some(mac)) = (infos.iter().find(|i| i.name == link.name), link.mac)
            else {
                return Err(Problem::new(trying(), format!("there is no {}", link.name)));
            };
            let (v4, v6) = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
            let mut sender = Sender { link: info.index, mac, v4, v6 };
            for address in &link.addresses {
                match address.local {
                    IpAddr::V4(ip) => {
                        sender.v4 = if sender.v4.is_unspecified() { ip } else { sender.v4 };
                        frames.extend(arp_both(mac, ip).map(|frame| (info.index, frame)));
                    }
                    IpAddr::V6(ip) => {
                        sender.v6 = if ip.is_unicast_link_local() { ip } else { sender.v6 };
                        frames.push((info.index, advertisement(mac, ip)));
                    }
                }
            }
            senders.push(sender);
        }

        Ok(Self { socket, frames, senders })
    }

    /// Of these multicast groups, by the numbers of their links, everybody is told, too.
    pub fn add_groups(&mut self, groups: &[(u32, IpAddr)]) {
        for Sender { link, mac, v4, v6 } in &self.senders {
            let own = groups.iter().filter(|(number, _)| i64::from(*number) == i64::from(*link));
            let (mut of_v4, mut of_v6) = (Vec::new(), Vec::new());
            for (_, group) in own {
                match group {
                    IpAddr::V4(group) if *group != Ipv4Addr::new(224, 0, 0, 1) => {
                        of_v4.push(*group)
                    }
                    // Not all nodes, nor what does not leave the host.
                    IpAddr::V6(group)
                        if group.segments()[0] & 0xf > 1
                            && *group != Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1) =>
                    {
                        of_v6.push(*group);
                    }
                    IpAddr::V4(_) | IpAddr::V6(_) => {}
                }
            }

            let reports = of_v4.chunks(MOST_RECORDS).map(|some| igmp_report(*mac, *v4, some));
            self.frames.extend(reports.map(|frame| (*link, frame)));
            let reports = of_v6.chunks(MOST_RECORDS).map(|some| mld_report(*mac, *v6, some));
            self.frames.extend(reports.map(|frame| (*link, frame)));
        }
    }

    /// The same for addresses that a host has on its own interfaces.
    pub fn on_host(host: &NetNs, addresses: &[(&str, IpAddr)]) -> Result<Self, Problem> {
        let trying = || "cannot prepare the announcement of the address".to_owned();
        let infos = Rtnl::open(host).and_then(|mut s| s.links()).trying(trying)?;
        let socket = host.run(PacketSocket::open).and_then(|s| s).trying(trying)?;
        let mut frames = Vec::new();
        for (interface, address) in addresses {
            let info = infos.iter().find(|i| i.name == *interface);
            let Some((index, mac)) = info.and_then(|i| Some((i.index, i.mac?))) else { continue };
            match address {
                IpAddr::V4(ip) => frames.extend(arp_both(mac, *ip).map(|frame| (index, frame))),
                IpAddr::V6(ip) => frames.push((index, advertisement(mac, *ip))),
            }
        }
        Ok(Self { socket, frames, senders: Vec::new() })
    }

    /// Sends everything once. All frames are tried; the first error is told.
    pub fn announce(&self) -> Result<(), Problem> {
        let mut result = Ok(());
        for (ifindex, frame) in &self.frames {
            let sent = self.socket.send(*ifindex, frame);
            result = result.and(sent);
        }
        result.trying(|| "cannot announce the address".into()).map_err(|p| {
            p.hint("hosts on the network find it when their neighbour entries run out")
        })
    }
}

/// Prepares and sends the announcement once.
pub fn announce(container: &NetNs, image: &NetworkImage) -> Result<(), Problem> {
    Announcer::prepare(container, image)?.announce()
}

/// The two forms of a gratuitous ARP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ArpForm {
    Request,
    Reply,
}

/// A gratuitous ARP in both forms.
pub(super) fn arp_both(mac: Mac, ip: Ipv4Addr) -> [Vec<u8>; 2] {
    [ArpForm::Request, ArpForm::Reply].map(|form| arp(mac, ip, form))
}

fn arp(mac: Mac, ip: Ipv4Addr, form: ArpForm) -> Vec<u8> {
    let target = match form {
        ArpForm::Request => [0; 6],
        ArpForm::Reply => BROADCAST,
    };
    arp_frame(mac, form, ip, target, ip)
}

/// A broadcast ARP frame.
pub(super) fn arp_frame(
    mac: Mac,
    form: ArpForm,
    sender: Ipv4Addr,
    target_mac: Mac,
    target: Ipv4Addr,
) -> Vec<u8> {
    let operation = match form {
        ArpForm::Request => 1,
        ArpForm::Reply => 2,
    };
    let mut frame = ethernet(BROADCAST, mac, 0x0806);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&sender.octets());
    frame.extend_from_slice(&target_mac);
    frame.extend_from_slice(&target.octets());
    frame
}

/// An unsolicited neighbour advertisement.
pub(super) fn advertisement(mac: Mac, ip: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0]; // override
    message.extend_from_slice(&ip.octets());
    message.extend_from_slice(&[2, 1]); // target link-layer address, 8 bytes
    message.extend_from_slice(&mac);

    let mut pseudo = [ip.octets(), all_nodes.octets()].concat();
    pseudo.extend_from_slice(&[0, 0, 0, message.len() as u8, 0, 0, 0, 58]);
    pseudo.extend_from_slice(&message);
    let sum = checksum(&pseudo);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES, mac, 0x86dd);
    frame.extend_from_slice(&[0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&all_nodes.octets());
    frame.extend_from_slice(&message);
    frame
}

/// A report of IGMPv3, with the option that has routers look at it (RFC 2113).
fn igmp_report(mac: Mac, from: Ipv4Addr, groups: &[Ipv4Addr]) -> Vec<u8> {
    let (to, to_mac) = IGMP_ROUTERS;
    let mut message = vec![0x22, 0, 0, 0, 0, 0, 0, groups.len() as u8];
    for group in groups {
        message.extend_from_slice(&[FROM_ALL, 0, 0, 0]);
        message.extend_from_slice(&group.octets());
    }
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let length = (24 + message.len()) as u16;
    let mut header = vec![0x46, 0xc0, 0, 0, 0, 0, 0x40, 0, 1, 2, 0, 0];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    header.extend_from_slice(&[0x94, 4, 0, 0]);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [ethernet(to_mac, mac, 0x0800), header, message].concat()
}

/// A report of MLDv2, likewise (RFC 2711).
fn mld_report(mac: Mac, from: Ipv6Addr, groups: &[Ipv6Addr]) -> Vec<u8> {
    let (to, to_mac) = MLD_ROUTERS;
    let mut message = vec![143, 0, 0, 0, 0, 0, 0, groups.len() as u8];
    for group in groups {
        message.extend_from_slice(&[FROM_ALL, 0, 0, 0]);
        message.extend_from_slice(&group.octets());
    }
    let length = message.len() as u16;
    let mut pseudo = [from.octets(), to.octets()].concat();
    pseudo.extend_from_slice(&u32::from(length).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, 58]);
    pseudo.extend_from_slice(&message);
    let sum = checksum(&pseudo);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut header = vec![0x60, 0, 0, 0, 0, 0, 0, 1];
    header[4..6].copy_from_slice(&(length + 8).to_be_bytes());
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    header.extend_from_slice(&[58, 0, 5, 2, 0, 0, 1, 0]);
    [ethernet(to_mac, mac, 0x86dd), header, message].concat()
}

pub(super) fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(128);
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame
}

/// The Internet checksum.
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let half = |p: &[u8]| u32::from(p[0]) << 8 | u32::from(p.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(half).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_have_right_checksums() {
        let (mac, groups) = ([2, 0, 0, 0, 0, 7], ["239.1.2.3", "224.0.0.251"]);
        let groups = groups.map(|group| group.parse().expect("an address"));
        let frame = igmp_report(mac, "10.0.0.7".parse().expect("an address"), &groups);
        assert_eq!(frame.len(), 14 + 24 + 8 + 2 * 8);
        assert_eq!((checksum(&frame[14..38]), checksum(&frame[38..])), (0, 0));
        let groups = ["ff15::7".parse().expect("an address")];
        let frame = mld_report(mac, "fe80::7".parse().expect("an address"), &groups);
        assert_eq!(frame.len(), 14 + 40 + 8 + 8 + 20);
        let mut pseudo = frame[22..54].to_vec();
        pseudo.extend_from_slice(&[0, 0, 0, 28, 0, 0, 0, 58]);
        pseudo.extend_from_slice(&frame[62..]);
        assert_eq!(checksum(&pseudo), 0);
    }

    #[test]
    fn advertisement_has_a_right_checksum() {
        let ip: Ipv6Addr = "fd00::7".parse().expect("an address");
        let frame = advertisement([2, 0, 0, 0, 0, 7], ip);
        let mut pseudo = frame[22..54].to_vec();
        pseudo.extend_from_slice(&[0, 0, 0, 32, 0, 0, 0, 58]);
        pseudo.extend_from_slice(&frame[54..]);
        assert_eq!(frame.len(), 86);
        assert_eq!(checksum(&pseudo), 0);
    }
}
