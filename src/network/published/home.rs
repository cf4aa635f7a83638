//! Home's end: what comes for the container is led here, and what it answers is sent from here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendmsg,
    setsockopt, socket, sockopt,
};
use serde::{Deserialize, Serialize};

use super::packet::{self, Packet, TCP};
use super::{
    ADDRESS_CELLS, Ends, FLOW, FLOW_CELLS, HomePort, Near, PORT, PORT_CELLS, Translation,
    Translations, device, near, table,
};
use crate::network::fence;
use crate::network::frames::EthernetFrame;
use crate::network::nft::{self, Expression, NewChain, NewSet, NftBatch, Policy};
use crate::network::read::address;
use crate::network::rtnl::{self, IFF_UP, Rtnl, ifinfo};
use crate::network::translated;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{Mac, NetlinkSocket, Protocol, Request};
use crate::sys::netns::NetNs;
use crate::sys::packet::VNET_HDR;
use crate::sys::tun::Tap;

/// Sets of the table.
const PORTS: &str = "ports";
const FLOWS: &str = "flows";
const OWN: &str = "own";
/// Hardware address of whoever sends to the container, for it: nobody has it.
pub(super) const SENDER: Mac = [0x02, 0xfe, 0x44, 0x7e, 0x01, 0x01];
const ETHERNET: usize = 14;
/// `NF_INET_LOCAL_OUT`, `NF_NETDEV_INGRESS`
const LOCAL_OUT: u32 = 3;
const INGRESS: u32 = 0;
/// `NFT_NETDEVICE_MAX`: of one chain.
const MOST_DEVICES: usize = 256;

/// What home knows of the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeFacts {
    /// Ports that lead to it.
    pub ports: Vec<HomePort>,
    /// Its links that connections of home's go through, by their place in the list of links: hardware
    /// address, and the addresses there.
    pub links: Vec<(Mac, Vec<Ipv4Addr>)>,
    /// For each of these, the bridge here that it was on.
    #[serde(default)]
    pub bridges: Vec<String>,
    /// Addresses of those who stay on these bridges.
    #[serde(default)]
    pub neighbours: Vec<Ipv4Addr>,
}

impl HomeFacts {
    fn near(&self) -> Near {
        let own = self.links.iter().flat_map(|(_, ips)| ips).copied().collect();
        Near { own, others: self.neighbours.iter().copied().collect() }
    }
}

/// Home's side of published ports.
#[derive(Debug)]
pub struct PublishedHome {
    id: String,
    known: HomeFacts,
    tap: Tap,
    out: OwnedFd,
    state: Mutex<HomeState>,
}

#[derive(Debug, Default)]
struct HomeState {
    translations: Translations,
    /// Devices that are listened to, and, of these, those of neighbours, when that was set up.
    devices: Option<[Vec<String>; 2]>,
    /// Ports of this host that nobody else may have meanwhile.
    held: Vec<(HomePort, Holding)>,
}

/// A socket that is bound, and does nothing.
#[derive(Debug)]
#[allow(dead_code, reason = "what counts is that it is open")]
enum Holding {
    Tcp(OwnedFd),
    Udp(UdpSocket),
}

impl PublishedHome {
    /// Makes what it works with; nothing is led here yet.
    ///
    /// # Errors
    /// When the kernel does not have it.
    pub fn open(id: &str, known: HomeFacts) -> Result<PublishedHome, Problem> {
        let trying = || "cannot make ready to forward connections".to_owned();
        let name = device(id, None);
        let tap = super::quiet_device(&name).trying(trying)?;
        tap.do_not_wait().trying(trying)?;
        let host = NetNs::current().trying(trying)?;
        let mut links = Rtnl::open(&host).trying(trying)?;
        let made = links.link(&name).trying(trying)?;
        let index = made.ok_or_else(|| Problem::new(trying(), "its device is gone"))?.index;
        links
            .change(&Request::new(rtnl::NEWLINK, 0, &ifinfo(index, IFF_UP, IFF_UP)))
            .trying(trying)?;
        let out = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::Raw,
        );
        let out = out.trying(trying)?;
        setsockopt(&out, sockopt::Mark, &fence::PASS).trying(trying)?;
        Ok(PublishedHome { id: id.to_owned(), known, tap, out, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HomeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is open now, by this host's connection tracking.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn look(&self) -> Result<Vec<Translation>, Problem> {
        let addresses = self.known.links.iter().flat_map(|(_, a)| a).map(|ip| IpAddr::V4(*ip));
        let addresses: Vec<IpAddr> = addresses.collect();
        let host = NetNs::current().trying(|| "cannot open this host's network".into())?;
        let all = translated::entries(&host, &addresses)?;
        Ok(all.iter().filter_map(|entry| entry.translation()).collect())
    }

    /// From now on what comes for the container comes here, and goes nowhere else, also when this process
    /// has died.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn lead_here(&self, open: &[Translation]) -> Result<(), Problem> {
        let mut state = self.lock();
        let (ports, near) = (self.known.ports.clone(), self.known.near());
        state.translations = Translations::new(ports, near, open, Instant::now());
        self.steer(&mut state, open)
    }

    fn steer(&self, state: &mut HomeState, open: &[Translation]) -> Result<(), Problem> {
        let trying = || "cannot lead connections to where the container is".to_owned();
        let (host, name, table) =
            (NetNs::current().trying(trying)?, device(&self.id, None), table(&self.id));
        let (links, addresses) =
            Rtnl::open(&host).and_then(|mut s| Ok((s.links()?, s.addresses()?))).trying(trying)?;
        let own = links.iter().find(|link| link.name == name);

        let own = own.ok_or_else(|| Problem::new(trying(), "its device is gone"))?.index as u32;
        let devices = devices(&links, &name, &self.known);

        let here = addresses.iter().filter_map(address).filter_map(|a| match a.local {
            IpAddr::V4(ip) if !ip.is_loopback() => Some(ip),
            _ => None,
        });
        let here: Vec<Ipv4Addr> = here.collect();
        let mut ports = Vec::new();
        for port in &self.known.ports {
            let some = port.address.into_iter();
            let all = here.iter().copied().filter(|_| port.address.is_none());
            ports.extend(some.chain(all).map(|ip| port_key(ip, port.port, port.protocol)));
        }

        ports.sort_unstable();
        ports.dedup();
        let flows: Vec<[u8; FLOW]> = open.iter().map(|one| one.wire.key()).collect();

        let mut batch = NftBatch::new();
        for family in [nft::NETDEV, nft::IPV4] {
            // Adding before deleting makes the deletion right whether or not it was there.
            batch.add_table(family, &table);
            batch.delete_table(family, &table);
            batch.add_table(family, &table);
        }

        let sets: [(_, &[_]); 3] =
            [(PORTS, &PORT_CELLS), (FLOWS, &FLOW_CELLS), (OWN, &ADDRESS_CELLS)];
        for (name, key) in sets {
            batch.add_set(nft::NETDEV, &table, &NewSet { name, key, timeout: None });
        }

        batch.add_keys(nft::NETDEV, &table, PORTS, &ports);
        batch.add_keys(nft::NETDEV, &table, FLOWS, &flows);
        let known = self.known.near().own.into_iter().map(|ip| ip.octets());
        batch.add_keys(nft::NETDEV, &table, OWN, &known.collect::<Vec<_>>());
        let rules = [
            ("in", vec![(PORTS, to_port()), (FLOWS, flow(false))]),
            ("near", vec![(OWN, near::to_address()), (OWN, near::asks_for())]),
        ];

        for (devices, (kind, rules)) in devices.iter().zip(&rules) {
            for (number, some) in devices.chunks(MOST_DEVICES).enumerate() {
                let name = format!("{kind}-{number}");
                batch.add_chain(&NewChain {
                    family: nft::NETDEV,
                    table: &table,
                    name: &name,
                    hook: INGRESS,
                    devices: some,
                    policy: Policy::Accept,
                });

                for (set, rule) in rules {
                    let mut rule = rule.clone();
                    rule.extend([
                        Expression::Lookup(set),
                        Expression::Device(own),
                        Expression::Forward,
                    ]);
                    batch.add_rule(nft::NETDEV, &table, &name, &rule);
                }
            }
        }

        batch.add_chain(&NewChain {
            family: nft::IPV4,
            table: &table,
            name: "out",
            hook: LOCAL_OUT,
            devices: &[],
            policy: Policy::Accept,
        });

        // Else it would find that the connection is known, the other way round, and give it another port.
        batch.untrack_mark(nft::IPV4, &table, "out", fence::PASS);
        let mut socket = NetlinkSocket::open_in(&host, Protocol::Netfilter).trying(trying)?;
        socket.transact(&batch.prepare()).trying(trying)?;
        state.devices = Some(devices);

        Ok(())
    }

    /// Now and then: devices that have come are listened to, ports that have become free are held, and what
    /// is over is forgotten. What is open, if that has changed.
    pub fn tend(&self) -> Option<Vec<Translation>> {
        let mut state = self.lock();
        state.devices.as_ref()?;
        state.translations.forget(Instant::now());
        self.hold_ports(&mut state);
        let links = NetNs::current().ok().and_then(|host| Rtnl::open(&host).ok()?.links().ok());
        if let Some(links) = links
            && state.devices != Some(devices(&links, &device(&self.id, None), &self.known))
        {
            let open = state.translations.all();
            if let Err(problem) = self.steer(&mut state, &open) {
                tracing::warn!("{problem}");
            }
        }
        state.translations.changed()
    }

    /// An engine here would give it to another container.
    fn hold_ports(&self, state: &mut HomeState) {
        for port in &self.known.ports {
            if state.held.iter().any(|(held, _)| held == port) {
                continue;
            }
            let at = (port.address.unwrap_or(Ipv4Addr::UNSPECIFIED), port.port);
            let holding = match port.protocol {
                TCP => bound(at).map(Holding::Tcp),
                _ => UdpSocket::bind(at).map(Holding::Udp),
            };
            // The engine has it for a moment still.
            state.held.extend(holding.ok().map(|holding| (*port, holding)));
        }
    }

    /// Moves what has come in for the container to `frames`, as it is there.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn read(&self, buffer: &mut [u8], frames: &mut Vec<EthernetFrame>) -> io::Result<()> {
        while frames.len() < 256 {
            let Some(length) = self.tap.read(buffer)? else { break };
            let Some(frame) = buffer.get_mut(VNET_HDR..length) else { continue };
            match near::ArpRequest::parse(frame) {
                Some(asked) => self.answer(&asked),
                None => frames.extend(self.inward(frame)),
            }
        }
        Ok(())
    }

    /// A neighbour hears where the container's address is: where it was, as far as that is to know.
    fn answer(&self, asked: &near::ArpRequest) {
        let place = self.known.links.iter().position(|(_, ips)| ips.contains(&asked.address));
        let there = place.and_then(|n| Some((&self.known.links[n].0, self.known.bridges.get(n)?)));
        let Some((mac, bridge)) = there else { return };
        if let Err(e) = near::say(bridge, &asked.answer(*mac)) {
            tracing::debug!("ARP on {bridge}: {e}");
        }
    }

    fn inward(&self, frame: &mut [u8]) -> Option<EthernetFrame> {
        let at = packet::network(frame)?;
        let mut packet = Packet::parse(frame.get_mut(at..)?)?;
        let (ends, closes) = (packet.ends(), packet.closes());
        let to = self.lock().translations.inward(ends, closes, Instant::now())?;
        let place = self.known.links.iter().position(|(_, ips)| ips.contains(to.to.ip()))?;
        packet.rewrite(to.from, to.to);

        let mut bytes = Vec::with_capacity(ETHERNET + packet.bytes().len());
        bytes.extend(self.known.links[place].0);
        bytes.extend(SENDER);
        bytes.extend([0x08, 0x00]);
        bytes.extend(packet.bytes());
        Some(EthernetFrame { link: place as u16, vnet_hdr: [0; VNET_HDR], bytes })
    }

    /// Tells whether it comes from an address of the container's: what is on the other host may have sent
    /// others.
    pub fn is_containers(&self, frame: &EthernetFrame) -> bool {
        let mut bytes = frame.bytes.clone();
        let packet = packet::network(&bytes).and_then(|at| Packet::parse(bytes.get_mut(at..)?));
        let from = packet.map(|packet| packet.ends().from);
        from.is_some_and(|from| self.known.links.iter().any(|(_, ips)| ips.contains(from.ip())))
    }

    /// Sends a frame of the container's as this host's own, if it belongs to a connection that is known here.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn send(&self, frame: &EthernetFrame) -> io::Result<()> {
        let mut bytes = frame.bytes.clone();
        let packet = packet::network(&bytes).and_then(|at| Packet::parse(bytes.get_mut(at..)?));
        let Some(mut packet) = packet.filter(|_| frame.vnet_hdr[..2] == [0, 0]) else {
            return Ok(());
        };
        let (ends, closes) = (packet.ends(), packet.closes());
        let known = self.lock().translations.outward(ends, closes, Instant::now());
        let Some(Ends { from, to, .. }) = known else { return Ok(()) };
        packet.rewrite(from, to);

        let by = libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr { s_addr: u32::from(*from.ip()).to_be() },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };

        sendmsg(
            self.out.as_raw_fd(),
            &[io::IoSlice::new(packet.bytes())],
            &[ControlMessage::Ipv4PacketInfo(&by)],
            MsgFlags::MSG_DONTWAIT,
            Some(&SockaddrIn::from(to)),
        )?;

        Ok(())
    }
}

impl AsFd for PublishedHome {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }
}

/// Returns what packets from outside may come in by; and those of neighbours.
fn devices(links: &[rtnl::LinkInfo], own: &str, known: &HomeFacts) -> [Vec<String>; 2] {
    let foreign = |link: &&rtnl::LinkInfo| !link.is_loopback() && link.name != own;
    let bridge = |link: &&rtnl::LinkInfo| known.bridges.contains(&link.name);
    let bridges: Vec<i32> = links.iter().filter(bridge).map(|link| link.index).collect();
    let near = |link: &&rtnl::LinkInfo| link.master.is_some_and(|at| bridges.contains(&at));
    let names = |list: &mut dyn Iterator<Item = &rtnl::LinkInfo>| {
        let mut names: Vec<String> = list.map(|link| link.name.clone()).collect();
        names.sort_unstable();
        names
    };
    [names(&mut links.iter().filter(foreign)), names(&mut links.iter().filter(near))]
}

/// Bound, and neither listening nor shared: whoever wants the port hears that it is taken.
fn bound((address, port): (Ipv4Addr, u16)) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let at = SockaddrIn::from(std::net::SocketAddrV4::new(address, port));
    nix::sys::socket::bind(fd.as_raw_fd(), &at)?;
    Ok(fd)
}

fn port_key(address: Ipv4Addr, port: u16, protocol: u8) -> [u8; PORT] {
    let mut key = [0; PORT];
    key[..4].copy_from_slice(&address.octets());
    key[4..6].copy_from_slice(&port.to_be_bytes());
    key[8] = protocol;
    key
}

/// `meta protocol ip`, and what it is for: address, port, protocol.
fn to_port() -> Vec<Expression> {
    let mut rule = ipv4();
    rule.extend([
        Expression::PayloadTo(0, 1, 16, 4),
        Expression::PayloadTo(1, 2, 2, 2),
        Expression::MetaTo(2, L4_PROTOCOL),
    ]);
    rule
}

/// `NFT_META_PROTOCOL`, `NFT_META_L4PROTO`
pub(super) const PROTOCOL: u32 = 1;
const L4_PROTOCOL: u32 = 16;

pub(super) fn ipv4() -> Vec<Expression> {
    vec![Expression::Meta(PROTOCOL), Expression::Equal(vec![0x08, 0x00])]
}

/// `meta protocol ip`, and who sends to whom; `answer`: the other way round.
pub(super) fn flow(answer: bool) -> Vec<Expression> {
    // Base, offset and length: network header, then what follows it.
    let mut ends = [[(1, 12, 4), (2, 0, 2)], [(1, 16, 4), (2, 2, 2)]];
    if answer {
        ends.reverse();
    }
    let mut rule = ipv4();
    let load = |(cell, (base, offset, length))| Expression::PayloadTo(cell, base, offset, length);
    rule.extend((0..).zip(ends.into_iter().flatten()).map(load));
    rule.push(Expression::MetaTo(4, L4_PROTOCOL));
    rule
}
