//! Options of sockets of the internet that a program may have set, read and set from outside: socket(7),
//! tcp(7), udp(7), ip(7), ipv6(7), raw(7), and the kernel's include/uapi. Memberships in multicast groups
//! are options, too: RFC 3678.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::connection::{get, set_slice};

/// Longest value: a `struct icmp6_filter`.
pub const LONGEST: usize = 32;

/// What a value means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The same everywhere.
    Plain,
    /// The number of an interface, in this order of bytes.
    Interface {
        /// In the network's.
        network_order: bool,
    },
}

/// An option that can be carried.
#[derive(Clone, Copy, Debug)]
pub struct KnownOption {
    level: libc::c_int,
    name: libc::c_int,
    /// For people.
    pub called: &'static str,
    /// What its value means.
    pub meaning: Meaning,
}

const fn plain(level: libc::c_int, name: libc::c_int, called: &'static str) -> KnownOption {
    KnownOption { level, name, called, meaning: Meaning::Plain }
}

const fn interface(
    level: libc::c_int,
    name: libc::c_int,
    called: &'static str,
    network_order: bool,
) -> KnownOption {
    KnownOption { level, name, called, meaning: Meaning::Interface { network_order } }
}

const SOCKET: libc::c_int = libc::SOL_SOCKET;
const TCP: libc::c_int = libc::IPPROTO_TCP;
const UDP: libc::c_int = libc::IPPROTO_UDP;
const IP: libc::c_int = libc::IPPROTO_IP;
const V6: libc::c_int = libc::IPPROTO_IPV6;
const RAW: libc::c_int = 255;

/// The place in this list is an option's number on the wire: a change is one of the protocol.
///
/// Not here: what CRIU needs for itself while it restores (addresses, ports, buffers, SO_REUSEADDR,
/// SO_REUSEPORT, IPV6_V6ONLY), what the kernel changes by itself, and what cannot be read (filters).
pub const KNOWN: &[KnownOption] = &[
    plain(SOCKET, libc::SO_BROADCAST, "SO_BROADCAST"),
    plain(SOCKET, libc::SO_KEEPALIVE, "SO_KEEPALIVE"),
    plain(SOCKET, libc::SO_LINGER, "SO_LINGER"),
    plain(SOCKET, libc::SO_OOBINLINE, "SO_OOBINLINE"),
    plain(SOCKET, libc::SO_MARK, "SO_MARK"),
    plain(SOCKET, libc::SO_RCVLOWAT, "SO_RCVLOWAT"),
    plain(SOCKET, libc::SO_RCVTIMEO, "SO_RCVTIMEO"),
    plain(SOCKET, libc::SO_SNDTIMEO, "SO_SNDTIMEO"),
    plain(SOCKET, libc::SO_DONTROUTE, "SO_DONTROUTE"),
    plain(SOCKET, libc::SO_NO_CHECK, "SO_NO_CHECK"),
    plain(SOCKET, libc::SO_BUSY_POLL, "SO_BUSY_POLL"),
    plain(SOCKET, libc::SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE"),
    plain(SOCKET, libc::SO_TIMESTAMP, "SO_TIMESTAMP"),
    plain(SOCKET, libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS"),
    plain(SOCKET, libc::SO_TIMESTAMPING, "SO_TIMESTAMPING"),
    plain(SOCKET, libc::SO_RXQ_OVFL, "SO_RXQ_OVFL"),
    plain(SOCKET, libc::SO_PEEK_OFF, "SO_PEEK_OFF"),
    plain(SOCKET, libc::SO_ZEROCOPY, "SO_ZEROCOPY"),
    plain(TCP, libc::TCP_NODELAY, "TCP_NODELAY"),
    plain(TCP, libc::TCP_CORK, "TCP_CORK"),
    plain(TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE"),
    plain(TCP, libc::TCP_KEEPINTVL, "TCP_KEEPINTVL"),
    plain(TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT"),
    plain(TCP, libc::TCP_SYNCNT, "TCP_SYNCNT"),
    plain(TCP, libc::TCP_LINGER2, "TCP_LINGER2"),
    plain(TCP, libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT"),
    plain(TCP, libc::TCP_CONGESTION, "TCP_CONGESTION"),
    plain(TCP, libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT"),
    plain(TCP, libc::TCP_FASTOPEN, "TCP_FASTOPEN"),
    plain(TCP, libc::TCP_NOTSENT_LOWAT, "TCP_NOTSENT_LOWAT"),
    plain(TCP, libc::TCP_SAVE_SYN, "TCP_SAVE_SYN"),
    plain(TCP, libc::TCP_INQ, "TCP_INQ"),
    plain(UDP, libc::UDP_SEGMENT, "UDP_SEGMENT"),
    plain(UDP, libc::UDP_GRO, "UDP_GRO"),
    plain(UDP, 101, "UDP_NO_CHECK6_TX"),
    plain(UDP, 102, "UDP_NO_CHECK6_RX"),
    plain(IP, libc::IP_TOS, "IP_TOS"),
    plain(IP, libc::IP_TTL, "IP_TTL"),
    plain(IP, libc::IP_PKTINFO, "IP_PKTINFO"),
    plain(IP, libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER"),
    plain(IP, libc::IP_RECVERR, "IP_RECVERR"),
    plain(IP, libc::IP_RECVTTL, "IP_RECVTTL"),
    plain(IP, libc::IP_RECVTOS, "IP_RECVTOS"),
    plain(IP, libc::IP_RECVOPTS, "IP_RECVOPTS"),
    plain(IP, libc::IP_RETOPTS, "IP_RETOPTS"),
    plain(IP, libc::IP_FREEBIND, "IP_FREEBIND"),
    plain(IP, libc::IP_TRANSPARENT, "IP_TRANSPARENT"),
    plain(IP, libc::IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"),
    plain(IP, libc::IP_MINTTL, "IP_MINTTL"),
    plain(IP, libc::IP_NODEFRAG, "IP_NODEFRAG"),
    plain(IP, libc::IP_CHECKSUM, "IP_CHECKSUM"),
    plain(IP, libc::IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT"),
    plain(IP, libc::IP_RECVFRAGSIZE, "IP_RECVFRAGSIZE"),
    plain(IP, libc::IP_MULTICAST_IF, "IP_MULTICAST_IF"),
    plain(IP, libc::IP_MULTICAST_TTL, "IP_MULTICAST_TTL"),
    plain(IP, libc::IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP"),
    plain(IP, libc::IP_MULTICAST_ALL, "IP_MULTICAST_ALL"),
    interface(IP, libc::IP_UNICAST_IF, "IP_UNICAST_IF", true),
    plain(V6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO"),
    plain(V6, libc::IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT"),
    plain(V6, libc::IPV6_RECVRTHDR, "IPV6_RECVRTHDR"),
    plain(V6, libc::IPV6_RECVHOPOPTS, "IPV6_RECVHOPOPTS"),
    plain(V6, libc::IPV6_RECVDSTOPTS, "IPV6_RECVDSTOPTS"),
    plain(V6, libc::IPV6_RECVTCLASS, "IPV6_RECVTCLASS"),
    plain(V6, libc::IPV6_RECVPATHMTU, "IPV6_RECVPATHMTU"),
    plain(V6, libc::IPV6_RECVERR, "IPV6_RECVERR"),
    plain(V6, libc::IPV6_RECVORIGDSTADDR, "IPV6_RECVORIGDSTADDR"),
    plain(V6, libc::IPV6_RECVFRAGSIZE, "IPV6_RECVFRAGSIZE"),
    plain(V6, libc::IPV6_TCLASS, "IPV6_TCLASS"),
    plain(V6, libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS"),
    plain(V6, libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER"),
    plain(V6, libc::IPV6_DONTFRAG, "IPV6_DONTFRAG"),
    plain(V6, libc::IPV6_AUTOFLOWLABEL, "IPV6_AUTOFLOWLABEL"),
    plain(V6, libc::IPV6_FREEBIND, "IPV6_FREEBIND"),
    plain(V6, libc::IPV6_TRANSPARENT, "IPV6_TRANSPARENT"),
    plain(V6, libc::IPV6_MINHOPCOUNT, "IPV6_MINHOPCOUNT"),
    plain(V6, libc::IPV6_ADDR_PREFERENCES, "IPV6_ADDR_PREFERENCES"),
    plain(V6, libc::IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS"),
    plain(V6, libc::IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP"),
    plain(V6, 29, "IPV6_MULTICAST_ALL"),
    interface(V6, libc::IPV6_MULTICAST_IF, "IPV6_MULTICAST_IF", false),
    interface(V6, 76, "IPV6_UNICAST_IF", true),
    plain(RAW, 1, "ICMP_FILTER"),
    plain(libc::IPPROTO_ICMPV6, 1, "ICMP6_FILTER"),
    plain(IP, libc::IP_HDRINCL, "IP_HDRINCL"),
    plain(V6, libc::IPV6_HDRINCL, "IPV6_HDRINCL"),
    // After IP_TOS, which has one of its own.
    plain(SOCKET, libc::SO_PRIORITY, "SO_PRIORITY"),
];

/// Where an option stands in [`KNOWN`], and its value.
pub type OptionValue = (u8, Vec<u8>);

/// Of which kind a socket is: socket(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketType {
    domain: libc::c_int,
    kind: libc::c_int,
    protocol: libc::c_int,
}

impl SocketType {
    /// A socket's, if it is one of the internet.
    pub fn of(socket: impl AsFd) -> Option<SocketType> {
        let fd = socket.as_fd();
        let number = |name| get::<libc::c_int>(fd, SOCKET, name).ok();
        let domain = number(libc::SO_DOMAIN)?;
        let internet = [libc::AF_INET, libc::AF_INET6].contains(&domain);
        internet.then_some(())?;
        Some(SocketType {
            domain,
            kind: number(libc::SO_TYPE)?,
            protocol: number(libc::SO_PROTOCOL)?,
        })
    }

    /// Tells whether it is of IPv6.
    pub fn is_v6(self) -> bool {
        self.domain == libc::AF_INET6
    }

    /// Tells whether it can be a member of a multicast group.
    pub fn joins(self) -> bool {
        self.kind != libc::SOCK_STREAM
    }

    /// A fresh one, in the calling thread's network namespace.
    ///
    /// # Errors
    /// socket(2)
    fn fresh(self) -> io::Result<OwnedFd> {
        // SAFETY: no pointers; a non-negative result is a new descriptor that is ours alone.
        let fd =
            unsafe { libc::socket(self.domain, self.kind | libc::SOCK_CLOEXEC, self.protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: see above.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The values of all options that a fresh socket of a kind has.
///
/// # Errors
/// When there can be none.
pub fn defaults(kind: SocketType) -> io::Result<Vec<OptionValue>> {
    let socket = kind.fresh()?;
    let one = |(known, number): (&KnownOption, u8)| {
        // The kernel has other things there, of a connection.
        let without = !kind.joins() && known.called.contains("MULTICAST");
        Some((number, value(socket.as_fd(), known).filter(|_| !without)?))
    };
    Ok(KNOWN.iter().zip(0..).filter_map(one).collect())
}

/// Returns those that are other than in a fresh socket of its kind.
pub fn changed(socket: impl AsFd, fresh: &[OptionValue]) -> Vec<OptionValue> {
    let fd = socket.as_fd();
    let own = |(number, was): &OptionValue| {
        let now = value(fd, KNOWN.get(usize::from(*number))?)?;
        (now != *was).then_some((*number, now))
    };
    fresh.iter().filter_map(own).collect()
}

fn value(fd: BorrowedFd, known: &KnownOption) -> Option<Vec<u8>> {
    let mut bytes = [0u8; LONGEST];
    let mut length = LONGEST as libc::socklen_t;
    let place = bytes.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most as many bytes as the length says, which the array has.
    let r = unsafe {
        libc::getsockopt(fd.as_raw_fd(), known.level, known.name, place, &raw mut length)
    };
    (r >= 0 && length as usize <= LONGEST).then(|| bytes[..length as usize].to_vec())
}

/// Sets one, if it is not so already.
///
/// # Errors
/// setsockopt(2)
pub fn give(socket: impl AsFd, known: &KnownOption, wanted: &[u8]) -> io::Result<()> {
    let fd = socket.as_fd();
    if value(fd, known).as_deref() == Some(wanted) {
        return Ok(());
    }
    set_slice(fd, known.level, known.name, wanted)
}

/// A membership of a socket in a multicast group, on an interface by its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The interface's number.
    pub interface: u32,
    /// The group.
    pub group: IpAddr,
    /// Whether it takes what comes from any but these sources, or (`false`) from these only.
    pub exclude: bool,
    /// See `exclude`.
    pub sources: Vec<IpAddr>,
}

/// Most sources of one membership: more cannot be, unless somebody has allowed it by the sysctl
/// `igmp_max_msf`.
pub const MOST_SOURCES: usize = 64;
const MCAST_JOIN_GROUP: libc::c_int = 42;
const MCAST_MSFILTER: libc::c_int = 48;
const EXCLUDE: u32 = 0;

/// `struct group_filter`, with room for sources.
#[repr(C)]
struct Filter {
    interface: u32,
    group: libc::sockaddr_storage,
    mode: u32,
    count: u32,
    sources: [libc::sockaddr_storage; MOST_SOURCES],
}

/// `struct group_req`
#[repr(C)]
struct Join {
    interface: u32,
    group: libc::sockaddr_storage,
}

/// A socket's membership in this group on this interface, if it has one.
///
/// # Errors
/// When it has more sources than there can be, or is no socket of the internet.
pub fn membership(
    socket: impl AsFd,
    interface: u32,
    group: IpAddr,
) -> io::Result<Option<Membership>> {
    let fd = socket.as_fd();
    let mut filter = Filter {
        interface,
        group: storage(group),
        mode: 0,
        count: MOST_SOURCES as u32,
        sources: [storage(group); MOST_SOURCES],
    };

    let mut length = size_of::<Filter>() as libc::socklen_t;
    // SAFETY: the kernel writes at most as many bytes as the length says, which the structure has.
    let r = unsafe {
        let place = (&raw mut filter).cast();
        libc::getsockopt(fd.as_raw_fd(), level(group), MCAST_MSFILTER, place, &raw mut length)
    };

    if r < 0 {
        let e = io::Error::last_os_error();
        // Of the other family, or of a kind that has none.
        let kinds = [Errno::ENOPROTOOPT, Errno::EOPNOTSUPP, Errno::EINVAL];
        let none = [Errno::EADDRNOTAVAIL, Errno::ENODEV, kinds[0], kinds[1], kinds[2]];
        let none = none.iter().any(|errno| e.raw_os_error() == Some(*errno as i32));
        return if none { Ok(None) } else { Err(e) };
    }

    let count = filter.count as usize;
    if count > MOST_SOURCES {
        return Err(io::Error::other(format!("{count} sources of {group}")));
    }
    let sources = filter.sources[..count].iter().filter_map(address).collect();

    Ok(Some(Membership { interface, group, exclude: filter.mode == EXCLUDE, sources }))
}

/// Has a socket join a group. Nothing changes where it has.
///
/// # Errors
/// setsockopt(2)
pub fn join(socket: impl AsFd, wanted: &Membership) -> io::Result<()> {
    let fd = socket.as_fd();
    let Membership { interface, group, exclude, ref sources } = *wanted;
    if sources.len() > MOST_SOURCES {
        return Err(io::ErrorKind::InvalidInput.into());
    }

    let request = Join { interface, group: storage(group) };
    let joined = set_bytes(fd, level(group), MCAST_JOIN_GROUP, &request, size_of::<Join>());
    match joined {
        Err(e) if e.raw_os_error() == Some(Errno::EADDRINUSE as i32) => {}
        done => done?,
    }

    if exclude && sources.is_empty() {
        return Ok(());
    }
    let mut filter = Filter {
        interface,
        group: storage(group),
        mode: u32::from(!exclude),
        count: sources.len() as u32,
        sources: [storage(group); MOST_SOURCES],
    };

    for (place, source) in filter.sources.iter_mut().zip(sources) {
        *place = storage(*source);
    }
    let unused = (MOST_SOURCES - sources.len()) * size_of::<libc::sockaddr_storage>();

    set_bytes(fd, level(group), MCAST_MSFILTER, &filter, size_of::<Filter>() - unused)
}

fn level(group: IpAddr) -> libc::c_int {
    if group.is_ipv4() { IP } else { V6 }
}

fn set_bytes<T>(
    fd: BorrowedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
    length: usize,
) -> io::Result<()> {
    assert!(length <= size_of::<T>());
    let (place, length) = ((&raw const *value).cast(), length as libc::socklen_t);
    // SAFETY: the kernel reads as many bytes as the length says, which the value has.
    let r = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, place, length) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn storage(address: IpAddr) -> libc::sockaddr_storage {
    // SAFETY: zeros are a value of it.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    match address {
        IpAddr::V4(ip) => {
            // SAFETY: there is room for it, and no stricter alignment.
            let place = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_in>() };
            place.sin_family = libc::AF_INET as libc::sa_family_t;
            place.sin_addr.s_addr = u32::from_ne_bytes(ip.octets());
        }
        IpAddr::V6(ip) => {
            // SAFETY: see above.
            let place = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_in6>() };
            place.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            place.sin6_addr.s6_addr = ip.octets();
        }
    }
    storage
}

fn address(storage: &libc::sockaddr_storage) -> Option<IpAddr> {
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: its family says that it is one; any bytes are.
            let place = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
            Some(Ipv4Addr::from(place.sin_addr.s_addr.to_ne_bytes()).into())
        }
        libc::AF_INET6 => {
            // SAFETY: see above.
            let place = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
            Some(Ipv6Addr::from(place.sin6_addr.s6_addr).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::super::connection::set;
    use super::*;

    #[test]
    fn no_option_stands_twice() {
        let mut seen = std::collections::HashSet::new();
        for known in KNOWN {
            assert!(seen.insert((known.level, known.name)), "{} stands twice", known.called);
        }
    }

    #[test]
    fn what_one_socket_has_set_another_gets() {
        let (one, other) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let kind = SocketType::of(&one).unwrap();
        let fresh = defaults(kind).unwrap();
        assert!(
            fresh.len() > 20 && changed(&one, &fresh).is_empty(),
            "{:?}",
            changed(&one, &fresh)
        );
        for (level, name) in
            [(IP, libc::IP_RECVTOS), (UDP, libc::UDP_GRO), (SOCKET, libc::SO_RXQ_OVFL)]
        {
            set(one.as_fd(), level, name, &1).unwrap();
        }
        one.set_multicast_ttl_v4(9).unwrap();
        let set = changed(&one, &fresh);
        let called: Vec<_> = set.iter().map(|(n, _)| KNOWN[usize::from(*n)].called).collect();
        assert_eq!(called, ["SO_RXQ_OVFL", "UDP_GRO", "IP_RECVTOS", "IP_MULTICAST_TTL"]);
        for (number, value) in &set {
            give(&other, &KNOWN[usize::from(*number)], value).unwrap();
        }
        assert_eq!(changed(&other, &fresh), set);
    }

    #[test]
    fn a_membership_is_seen_and_had_by_another() {
        let Ok(space) = super::super::netns::NetNs::fresh() else {
            eprintln!("skipped: this needs CAP_SYS_ADMIN");
            return;
        };
        space
            .run(|| {
                let up = "ip link set lo up && ip link set lo multicast on && \
                          ip addr add 10.9.9.9/24 dev lo && ip -6 addr add fd99::1/64 dev lo nodad";
                let done = std::process::Command::new("sh").args(["-c", up]).status();
                assert!(done.unwrap().success());
                let one = UdpSocket::bind("[::]:0").unwrap();
                let other = UdpSocket::bind("[::]:0").unwrap();
                let source = ["10.9.9.1".parse().unwrap(), "10.9.9.2".parse().unwrap()];
                for (group, exclude, sources) in [
                    ("239.1.2.3", true, &[][..]),
                    ("239.1.2.4", true, &source[..1]),
                    ("239.1.2.5", false, &source[..]),
                    ("ff15::7", true, &[]),
                ] {
                    let group = group.parse().unwrap();
                    assert_eq!(membership(&one, 1, group).unwrap(), None);
                    let sources = sources.to_vec();
                    let wanted = Membership { interface: 1, group, exclude, sources };
                    join(&one, &wanted).unwrap();
                    let seen = membership(&one, 1, group).unwrap().unwrap();
                    assert_eq!(seen, wanted);
                    join(&other, &seen).unwrap();
                    join(&other, &seen).unwrap();
                    assert_eq!(membership(&other, 1, group).unwrap(), Some(wanted));
                    assert_eq!(membership(&one, 2, group).unwrap(), None);
                }
            })
            .unwrap();
    }
}
