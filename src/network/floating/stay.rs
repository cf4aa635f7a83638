//! The addresses on a host: taking them, letting go of them, and the fence round them.

use std::net::IpAddr;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{Floating, Moved, fence};
use crate::network::announce::Announcer;
use crate::network::fence::ArmedFence;
use crate::network::image::Address;
use crate::network::restore::address_request;
use crate::network::routed::{HostRoutes, same_network};
use crate::network::rtnl::{self, LinkInfo, Rtnl, index_at};
use crate::network::sockets::SockDiag;
use crate::network::sysctl;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{CREATE, EXCL, NetlinkMessage, REPLACE, Request};
use crate::sys::netns::NetNs;

/// `IFA_F_SECONDARY` of IPv4.
const SECONDARY: u32 = 0x01;
const NODAD: u32 = 0x02;
const OPTIMISTIC: u32 = 0x04;
const NOPREFIXROUTE: u32 = 0x200;
const FOREVER: u32 = u32::MAX;

/// Whose side it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StaySide {
    /// Where the addresses are.
    Source,
    /// Where they go.
    Destination,
}

/// Floating addresses on one host, with the fence round them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stay {
    /// Name of the fence's tables.
    table: String,
    side: StaySide,
    floating: Floating,
    /// On the destination: the addresses may be here, by us.
    pub taken: bool,
}

impl Stay {
    /// Of one migration, on one side.
    pub fn new(floating: &Floating, side: StaySide, migration: &str) -> Self {
        let table = format!("ferry-{migration}");
        Self { table, side, floating: floating.clone(), taken: false }
    }

    /// Puts up the open fence.
    pub fn arm(&self, host: &NetNs) -> Result<ArmedFence, Problem> {
        fence::put_up(&self.floating, &self.table, host, false)
    }

    /// Closes the open fence.
    pub fn close(&self, host: &NetNs) -> Result<(), Problem> {
        fence::close(&self.floating, &self.table, host)
    }

    /// Puts up the closed fence.
    pub fn raise(&self, host: &NetNs) -> Result<ArmedFence, Problem> {
        fence::put_up(&self.floating, &self.table, host, true)
    }

    /// Ends all connections on the addresses, of which there are none but the container's; the fence must
    /// be closed.
    pub fn cut(&self, host: &NetNs) -> Result<(), Problem> {
        let addresses = self.floating.addresses();
        SockDiag::new(host)?.cut(|known| addresses.contains(&known.flow.local.ip()))
    }

    /// Takes the fence away, whatever it was; it is no error if there is none.
    pub fn lift(&self, host: &NetNs) -> Result<(), Problem> {
        fence::remove(&self.table, host)
    }

    /// Adds the addresses, behind the closed fence: so that sockets can be bound to them, and so that
    /// nothing else of the host takes notice. IPv4's have no network of their own unless the host is
    /// in it anyway; IPv6's are deprecated, not to be chosen for new connections, and not probed, as
    /// the source would answer.
    ///
    /// # Errors
    /// When one of them cannot be added; those before it are taken away again.
    pub fn take(&self, host: &NetNs) -> Result<(), Problem> {
        let mut socket = Rtnl::open(host).trying(reading)?;
        let links = socket.links().trying(reading)?;
        let present = socket.addresses().trying(reading)?;
        for (i, moved) in self.floating.moved.iter().enumerate() {
            let added = self.link_of(moved, &links).and_then(|on| {
                let address = quiet(moved, on.index, &present);
                let request = address_request(rtnl::NEWADDR, CREATE | EXCL, on.index, &address);
                socket
                    .change(&request)
                    .trying(|| format!("cannot add {} to {}", address.local, on.name))
            });
            if let Err(problem) = added {
                for before in &self.floating.moved[..i] {
                    let _ = remove(&mut socket, host, &self.link_of(before, &links)?, before);
                }
                return Err(problem);
            }
        }
        Ok(())
    }

    /// Returns what makes the addresses what they were on the source, ready to be done when the container is
    /// released.
    pub fn entitle(&self, host: &NetNs) -> Result<HostRoutes, Problem> {
        let mut socket = Rtnl::open(host).trying(reading)?;
        let links = socket.links().trying(reading)?;
        let present = socket.addresses().trying(reading)?;
        let mut requests = Vec::new();
        for moved in &self.floating.moved {
            let on = self.link_of(moved, &links)?;
            let (address, now) = (full(moved), quiet(moved, on.index, &present));
            let what = format!("{}/{} as it was", address.local, address.prefix);
            let request = |kind, flags, a| address_request(kind, flags, on.index, a);
            requests.push((request(rtnl::NEWADDR, CREATE | REPLACE, &address), what.clone()));
            let narrow = |m: &NetlinkMessage| {
                index_at(m, 4) == Some(on.index)
                    && crate::network::read::address(m)
                        .is_some_and(|a| (a.local, a.prefix) == (now.local, now.prefix))
            };

            // Not yet taken, it will be there by then.
            let there = !self.taken || present.iter().any(narrow);
            if now.prefix != address.prefix && there {
                // The address itself stays all the while, and with it what is bound to it.
                requests.push((request(rtnl::DELADDR, 0, &now), what));
            }
        }

        Ok(HostRoutes::of(socket, requests))
    }

    /// Removes the addresses from this host; what is gone already is no error. Others of their
    /// networks stay: of those that hang on one of these the kernel makes one the first.
    ///
    /// # Errors
    /// The first; all are tried.
    pub fn let_go(&self, host: &NetNs) -> Result<(), Problem> {
        let mut socket = Rtnl::open(host).trying(reading)?;
        let links = socket.links().trying(reading)?;
        let mut result = Ok(());
        for moved in &self.floating.moved {
            // With its interface the address is gone, too.
            let Ok(on) = self.link_of(moved, &links) else { continue };
            result = result.and(remove(&mut socket, host, &on, moved));
        }
        result
    }

    /// Ready to tell the neighbours that the addresses are here.
    pub fn announcer(&self, host: &NetNs) -> Result<Announcer, Problem> {
        let list: Vec<(&str, IpAddr)> =
            self.floating.moved.iter().map(|m| (self.interface(m), m.address.local)).collect();
        Announcer::on_host(host, &list)
    }

    fn interface<'a>(&self, moved: &'a Moved) -> &'a str {
        match self.side {
            StaySide::Source => &moved.from,
            StaySide::Destination => &moved.to,
        }
    }

    fn link_of(&self, moved: &Moved, links: &[LinkInfo]) -> Result<LinkInfo, Problem> {
        let name = self.interface(moved);
        let found = links.iter().find(|l| l.name == name).cloned();
        found.ok_or_else(|| {
            let what = format!("no place for {}", moved.address.local);
            Problem::new(what, format!("there is no interface {name}"))
        })
    }
}

fn reading() -> String {
    "cannot read this host's network".into()
}

/// As it was on the source.
fn full(moved: &Moved) -> Address {
    let mut address = moved.address.clone();
    // It begins with the interface's name.
    address.label = address.label.filter(|_| moved.from == moved.to);
    address
}

/// As it is before the commit: see [`Stay::take`].
fn quiet(moved: &Moved, index: i32, present: &[NetlinkMessage]) -> Address {
    let mut address = full(moved);
    match address.local {
        IpAddr::V4(_) => {
            let network = (address.local, address.prefix);
            let hosts_own = present.iter().filter(|m| index_at(m, 4) == Some(index));
            let hosts_own = hosts_own.filter_map(crate::network::read::address).any(|a| {
                a.local != network.0
                    && a.prefix == network.1
                    && same_network(a.local, network.0, network.1)
            });
            if !hosts_own {
                address.prefix = 32;
                address.broadcast = None;
                address.peer = None;
            }
        }
        IpAddr::V6(_) => {
            address.flags = address.flags & !OPTIMISTIC | NODAD | NOPREFIXROUTE;
            address.lifetime = Some((0, FOREVER));
        }
    }
    address
}

/// Removes an address from a link, with whatever prefix it has there.
fn remove(socket: &mut Rtnl, host: &NetNs, on: &LinkInfo, moved: &Moved) -> Result<(), Problem> {
    let ip = moved.address.local;
    let trying = || format!("cannot remove {ip} from {}", on.name);
    let present = socket.addresses().trying(trying)?;
    let on_link: Vec<(u32, Address)> = present
        .iter()
        .filter(|m| index_at(m, 4) == Some(on.index))
        .filter_map(|m| {
            let flags = m.attributes(8).u32(8).unwrap_or_default();
            Some((flags, crate::network::read::address(m)?))
        })
        .collect();
    for (flags, address) in on_link.iter().filter(|(_, a)| a.local == ip) {
        let hangs_on_it = |(flags, other): &(u32, Address)| {
            flags & SECONDARY != 0
                && other.local != ip
                && other.prefix == address.prefix
                && same_network(other.local, ip, address.prefix)
        };

        let heirs = ip.is_ipv4() && flags & SECONDARY == 0 && on_link.iter().any(hangs_on_it);
        let request: Request = address_request(rtnl::DELADDR, 0, on.index, address);
        let mut delete = || match socket.change(&request) {
            Err(e) if e.errno == Errno::EADDRNOTAVAIL => Ok(()),
            result => result.trying(trying),
        };
        if heirs { promoting(host, &on.name, delete)? } else { delete()? }
    }

    Ok(())
}

/// Does it while the kernel makes a secondary address the first in the place of one that goes: by
/// itself it would delete them all.
fn promoting(
    host: &NetNs,
    link: &str,
    deed: impl FnOnce() -> Result<(), Problem>,
) -> Result<(), Problem> {
    let trying = || format!("cannot have {link} keep its other addresses");
    let path = format!("ipv4/conf/{link}/promote_secondaries");
    let before = host
        .run(|| {
            let before = sysctl::get(&path)?;
            sysctl::set(&path, "1", true).map(|()| before)
        })
        .and_then(|r| r)
        .trying(trying)?;
    let done = deed();
    let back = host.run(|| sysctl::set(&path, &before, true)).and_then(|r| r).trying(trying);
    done.and(back)
}
