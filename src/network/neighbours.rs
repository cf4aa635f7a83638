//! Whom the container knew on its segments, known again when the fence opens.
//!
//! Behind the closed fence nobody answers, but the kernel's timers go on. A connection that is held
//! for more than a second sends again; the kernel asks for the hardware address, and would know it no
//! more in a few seconds, or at once where the cable was pulled meanwhile. If the fence opens then,
//! all that the container says waits for the last question, which was asked behind the fence, and is
//! thrown away with it. What is lost so is sent again when TCP thinks fit: it has just measured a round
//! trip of as long as the container was held, and waits for three times that.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::image::NetworkImage;
use super::restore::neighbour_request;
use super::rtnl::{self, AF_INET, AF_INET6, Rtnl, ip_of};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::Request;
use crate::sys::netns::NetNs;

/// `NUD_REACHABLE`, `NUD_STALE`, `NUD_DELAY`, `NUD_NOARP`, `NUD_PERMANENT`: nothing is asked for.
const CALM: u16 = 0x02 | 0x04 | 0x08 | 0x40 | 0x80;
/// `NUD_PROBE`: it is asked whether the hardware address is still right, which is used meanwhile.
const PROBE: u16 = 0x10;
/// `struct ndmsg`
const HEAD: usize = 12;

/// The container's neighbours with their hardware addresses, and the socket to write them down again.
#[derive(Debug)]
pub struct Neighbours {
    socket: Rtnl,
    /// By link and address, what makes them known; those set by hand do not get lost.
    known: HashMap<(i32, IpAddr), Request>,
}

impl Neighbours {
    /// Makes ready to remember those of `image`, whose links must be in the namespace.
    pub fn prepare(container: &NetNs, image: &NetworkImage) -> Result<Self, Problem> {
        let trying = || "cannot read the container's network".to_owned();
        let mut socket = Rtnl::open(container).trying(trying)?;
        let links = socket.links().trying(trying)?;
        let known = image.neighbours.iter().filter(|n| !n.permanent).filter_map(|n| {
            let index = links.iter().find(|l| l.name == n.link)?.index;
            Some(((index, n.address), neighbour_request(index, n)))
        });
        Ok(Self { known: known.collect(), socket })
    }

    /// What has been forgotten is known as before, and what is being asked for is asked for anew.
    ///
    /// # Errors
    /// When the kernel does not tell, or does not take it; the rest is done.
    pub fn remember(&mut self) -> Result<(), Problem> {
        let trying = || "cannot restore what the container knew of its neighbours".to_owned();
        let (mut calm, mut changes) = (HashSet::new(), Vec::new());
        for family in [AF_INET, AF_INET6] {
            for message in self.socket.neighbours(family).trying(trying)? {
                let Some(head) = message.payload.first_chunk::<HEAD>() else { continue };
                let Some(address) = ip_of(&message.attributes(HEAD), 1) else { continue };
                let state = u16::from_ne_bytes([head[8], head[9]]);
                let name = (i32::from_ne_bytes([head[4], head[5], head[6], head[7]]), address);
                if state & CALM != 0 {
                    calm.insert(name);
                } else if state & PROBE == 0 && !self.known.contains_key(&name) {
                    let mut request = Request::new(rtnl::DELNEIGH, 0, head);
                    request.attr(1, &rtnl::octets(address));
                    changes.push(request);
                }
            }
        }
        let lost = self.known.iter().filter(|(name, _)| !calm.contains(name));
        changes.extend(lost.map(|(_, request)| request.clone()));
        // One after the other: the kernel may have forgotten one by itself.
        let done: Vec<_> = changes.iter().map(|change| self.socket.change(change)).collect();
        done.into_iter().collect::<Result<(), _>>().trying(trying)
    }
}
