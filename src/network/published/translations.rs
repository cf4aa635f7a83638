//! The address translation that home makes instead of its kernel: two faces of each connection, one on
//! the wire and one for the container. Ports stay as they are, but for published ones.

use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Ends;
use super::packet::TCP;

/// Most connections; more do not begin.
const MOST: usize = 1 << 16;
/// For how long one is remembered that nobody uses: one of TCP that both sides have spoken on, as
/// connection tracking has it (`nf_conntrack_tcp_timeout_established`); another one, or one that has ended.
const OPEN: Duration = Duration::from_secs(5 * 24 * 3600);
const OTHER: Duration = Duration::from_secs(180);

/// A port of home's that leads to the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HomePort {
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub protocol: u8,
    /// On which of the host's addresses; `None` for all.
    pub address: Option<Ipv4Addr>,
    /// On the host.
    pub port: u16,
    /// The container's.
    pub to: SocketAddrV4,
}

/// A connection's faces, as packets from outside have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translation {
    /// To this host.
    pub wire: Ends,
    /// To the container.
    pub inside: Ends,
}

/// Who is on the container's segment at home, and speaks with it without any translation.
#[derive(Debug, Clone, Default)]
pub struct Near {
    /// The container's own addresses.
    pub own: HashSet<Ipv4Addr>,
    /// The others'.
    pub others: HashSet<Ipv4Addr>,
}

impl Near {
    /// As packets to the container have them.
    fn has(&self, ends: &Ends) -> bool {
        self.own.contains(ends.to.ip()) && self.others.contains(ends.from.ip())
    }
}

#[derive(Debug)]
struct Way {
    inside: Ends,
    used: Instant,
    /// The container has said something on it.
    answered: bool,
    /// Who has said that it has no more to say: outside, and the container.
    ended: (bool, bool),
}

impl Way {
    fn is_over(&self, now: Instant) -> bool {
        let open = self.inside.protocol == TCP && self.answered && self.ended != (true, true);
        now.duration_since(self.used) > if open { OPEN } else { OTHER }
    }
}

/// The table of translated connections.
#[derive(Debug, Default)]
pub struct Translations {
    ports: Vec<HomePort>,
    near: Near,
    ways: HashMap<Ends, Way>,
    /// From the face inside to that on the wire.
    back: HashMap<Ends, Ends>,
    changed: bool,
}

impl Translations {
    /// Begins with what is open.
    pub fn new(
        ports: Vec<HomePort>,
        near: Near,
        open: &[Translation],
        now: Instant,
    ) -> Translations {
        let mut all = Translations { ports, near, ..Translations::default() };
        for one in open {
            let way = Way { inside: one.inside, used: now, answered: true, ended: (false, false) };
            all.add(one.wire, way);
        }
        all.changed = false;
        all
    }

    fn add(&mut self, wire: Ends, way: Way) -> bool {
        let free = self.ways.len() < MOST && !self.back.contains_key(&way.inside);
        if free {
            self.back.insert(way.inside, wire);
            self.ways.insert(wire, way);
            self.changed = true;
        }
        free
    }

    /// Returns what a packet from outside is to the container. `closes`: see
    /// [`Packet`](super::packet::Packet::closes).
    pub fn inward(&mut self, wire: Ends, closes: (bool, bool), now: Instant) -> Option<Ends> {
        if !self.ways.contains_key(&wire) {
            let leads = |p: &&HomePort| {
                p.protocol == wire.protocol
                    && p.port == wire.to.port()
                    && p.address.is_none_or(|ip| ip == *wire.to.ip())
            };

            let inside = if self.near.has(&wire) {
                wire
            } else {
                Ends { to: self.ports.iter().find(leads)?.to, ..wire }
            };

            let way = Way { inside, used: now, answered: false, ended: (false, false) };
            if !self.add(wire, way) {
                return None;
            }
        }

        let way = self.ways.get_mut(&wire)?;
        way.used = now;
        way.ended.0 |= closes.0;
        if closes.1 {
            way.ended = (true, true);
        }

        Some(way.inside)
    }

    /// Returns what a packet of the container's is on the wire; nothing on a connection that is not known, but
    /// to those who are near.
    pub fn outward(&mut self, inside: Ends, closes: (bool, bool), now: Instant) -> Option<Ends> {
        let to_it = inside.answer();
        if !self.back.contains_key(&to_it) && self.near.has(&to_it) {
            let way = Way { inside: to_it, used: now, answered: false, ended: (false, false) };
            self.add(to_it, way);
        }
        let wire = *self.back.get(&to_it)?;
        let way = self.ways.get_mut(&wire)?;
        (way.used, way.answered) = (now, true);
        way.ended.1 |= closes.0;
        if closes.1 {
            way.ended = (true, true);
        }
        Some(wire.answer())
    }

    /// Forgets what is over.
    pub fn forget(&mut self, now: Instant) {
        let before = self.ways.len();
        self.ways.retain(|_, way| {
            let over = way.is_over(now);
            if over {
                self.back.remove(&way.inside);
            }
            !over
        });
        self.changed |= self.ways.len() != before;
    }

    /// All connections.
    pub fn all(&self) -> Vec<Translation> {
        self.ways.iter().map(|(wire, w)| Translation { wire: *wire, inside: w.inside }).collect()
    }

    /// The same, if there are others than when this was asked last.
    pub fn changed(&mut self) -> Option<Vec<Translation>> {
        std::mem::take(&mut self.changed).then(|| self.all())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::published::packet::UDP;

    const NO: (bool, bool) = (false, false);

    fn ends(from: &str, to: &str) -> Ends {
        Ends { protocol: TCP, from: from.parse().unwrap(), to: to.parse().unwrap() }
    }

    fn published() -> Vec<HomePort> {
        let to = "10.89.7.20:7000".parse().unwrap();
        vec![HomePort { protocol: TCP, address: None, port: 8080, to }]
    }

    #[test]
    fn a_published_port_leads_there_and_back() {
        let now = Instant::now();
        let mut all = Translations::new(published(), Near::default(), &[], now);
        let wire = ends("192.0.2.9:4000", "10.77.1.11:8080");
        let inside = ends("192.0.2.9:4000", "10.89.7.20:7000");
        assert_eq!(all.outward(inside.answer(), NO, now), None, "nobody has connected");
        assert_eq!(all.inward(wire, NO, now), Some(inside));
        assert_eq!(all.outward(inside.answer(), NO, now), Some(wire.answer()));
        assert_eq!(all.changed().map(|c| c.len()), Some(1));
        assert_eq!(all.changed(), None);
        // By another address of the host, from the same port: they could not be told apart.
        assert_eq!(all.inward(ends("192.0.2.9:4000", "10.77.1.12:8080"), NO, now), None);
        assert_eq!(all.inward(ends("192.0.2.9:4001", "10.77.1.11:8081"), NO, now), None);
        let udp = Ends { protocol: UDP, ..wire };
        assert_eq!(all.inward(udp, NO, now), None, "that port is not published");
    }

    #[test]
    fn one_address_is_not_all() {
        let now = Instant::now();
        let mut ports = published();
        ports[0].address = Some(Ipv4Addr::new(10, 77, 1, 11));
        let mut all = Translations::new(ports, Near::default(), &[], now);
        assert!(all.inward(ends("192.0.2.9:1", "10.77.1.11:8080"), NO, now).is_some());
        assert!(all.inward(ends("192.0.2.9:2", "10.77.1.12:8080"), NO, now).is_none());
    }

    #[test]
    fn what_the_container_has_begun_goes_on() {
        let now = Instant::now();
        let wire = ends("198.51.100.1:443", "10.77.1.11:50123");
        let inside = ends("198.51.100.1:443", "10.89.7.20:40000");
        let open = [Translation { wire, inside }];
        let mut all = Translations::new(Vec::new(), Near::default(), &open, now);
        assert_eq!(all.outward(inside.answer(), NO, now), Some(wire.answer()));
        assert_eq!(all.inward(wire, NO, now), Some(inside));
        assert_eq!(all.changed(), None, "it was known");
    }

    #[test]
    fn neighbours_are_not_translated() {
        let now = Instant::now();
        let ip = |text: &str| -> HashSet<Ipv4Addr> { [text.parse().unwrap()].into() };
        let near = Near { own: ip("10.89.7.20"), others: ip("10.89.7.2") };
        let mut all = Translations::new(published(), near, &[], now);
        let asks = ends("10.89.7.2:4000", "10.89.7.20:5432");
        assert_eq!(all.inward(asks, NO, now), Some(asks));
        assert_eq!(all.outward(asks.answer(), NO, now), Some(asks.answer()));
        // What the container begins, or goes on with before the other one does.
        let answers = ends("10.89.7.2:7000", "10.89.7.20:4001");
        assert_eq!(all.outward(answers.answer(), NO, now), Some(answers.answer()));
        assert_eq!(all.inward(answers, NO, now), Some(answers));
        // A stranger, who is none; and what would be somebody else's.
        assert_eq!(all.inward(ends("10.89.7.3:1", "10.89.7.20:5432"), NO, now), None);
        let stranger = ends("10.89.7.20:7000", "10.89.7.3:1");
        assert_eq!(all.outward(stranger, NO, now), None);
        let published = ends("10.89.7.2:4002", "10.77.1.11:8080");
        assert!(all.inward(published, NO, now).is_some());
        assert_eq!(all.inward(ends("10.89.7.2:4002", "10.89.7.20:7000"), NO, now), None);
    }

    #[test]
    fn what_is_over_is_forgotten() {
        let begun = Instant::now();
        let later = begun + 2 * OTHER;
        let inside = |port: u16| ends(&format!("192.0.2.9:{port}"), "10.89.7.20:7000");
        let mut all = Translations::new(published(), Near::default(), &[], begun);
        for port in 1..=4 {
            all.inward(ends(&format!("192.0.2.9:{port}"), "10.77.1.11:8080"), NO, begun);
        }
        // 1 has never been answered; 2 is open; 3 was reset; 4 has one end that says no more.
        for port in 2..=4 {
            all.outward(inside(port).answer(), (port == 4, port == 3), begun);
        }
        all.forget(later);
        let known = |all: &mut Translations, port| all.back.contains_key(&inside(port));
        let left: Vec<u16> = (1..=4).filter(|port| known(&mut all, *port)).collect();
        assert_eq!(left, [2, 4]);
        assert_eq!(all.ways.len(), 2);
        all.forget(later + OPEN);
        assert!(all.ways.is_empty() && all.back.is_empty());
    }
}
