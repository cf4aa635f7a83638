//! Datagrams that wait in a socket, looked at without being taken, and how many may: udp(7), ip(7),
//! ipv6(7), and `SO_PEEK_OFF` and `SO_RCVBUF` of socket(7).

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};

/// More than UDP can bring at once, also where the kernel has put several into one.
const LONGEST: usize = 1 << 17;
/// Room for whatever the socket's owner has asked for beside: times, marks, errors.
const CONTROL: usize = 1024;

/// One datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// The address that it was sent to.
    pub to: IpAddr,
    /// What it says.
    pub payload: Vec<u8>,
}

/// Returns those that wait in a UDP socket, oldest first, and no more than `most` bytes of them and `many` of
/// what the kernel keeps. For each the kernel looks at all before it: this takes as long as the square
/// of how many there are.
///
/// They stay where they are. Options of the socket are changed for it and put back; nobody else may
/// read from it meanwhile. The kernel shows an empty one to the first who looks only.
///
/// # Errors
/// When the socket cannot be looked into. An error that it held for its owner is one, too, and is
/// taken by that.
pub fn waiting(socket: impl AsFd, most: usize, many: usize) -> io::Result<Vec<Datagram>> {
    let socket = socket.as_fd();
    let (level, name) = match get(socket, libc::SOL_SOCKET, libc::SO_DOMAIN)? {
        libc::AF_INET => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        libc::AF_INET6 => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        _ => return Err(Errno::EAFNOSUPPORT.into()),
    };

    let _destination = ChangedOption::to(socket, level, name, 1)?;
    let _offset = ChangedOption::to(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    let (mut buffer, mut control) = (vec![0; LONGEST], vec![0; CONTROL]);
    for _ in 0..many {
        if bytes >= most {
            break;
        }
        let (from, to, piece, length) = {
            let mut room = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let got = recvmsg::<SockaddrStorage>(
                socket.as_raw_fd(),
                &mut room,
                Some(&mut control),
                flags,
            );

            let got = match got {
                Ok(got) => got,
                Err(Errno::EAGAIN) => break,
                Err(e) => return Err(e.into()),
            };

            let (mut to, mut piece) = (None, usize::MAX);
            for message in got.cmsgs()? {
                match message {
                    ControlMessageOwned::Ipv4PacketInfo(info) => {
                        to = Some(IpAddr::from(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())));
                    }
                    ControlMessageOwned::Ipv6PacketInfo(info) => {
                        to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
                    }
                    ControlMessageOwned::UdpGroSegments(size) => {
                        piece = usize::try_from(size).unwrap_or(usize::MAX).max(1);
                    }
                    _ => {}
                }
            }
            (got.address.as_ref().and_then(address), to, piece, got.bytes)
        };

        bytes += length.max(1);
        let (Some(from), Some(to)) = (from, to) else { continue };
        let mut add = |payload: &[u8]| {
            found.push(Datagram { from, to, payload: payload.to_vec() });
        };

        match length {
            0 => add(&[]),
            _ => buffer[..length].chunks(piece).for_each(add),
        }
    }

    Ok(found)
}

/// How much may wait in a socket to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferLimit {
    /// Bytes, with what the kernel needs beside.
    bytes: libc::c_int,
    /// Which limits the owner has set himself; none where the kernel (before 5.14) does not tell.
    locked: Option<libc::c_int>,
}

impl BufferLimit {
    /// That of a socket.
    ///
    /// # Errors
    /// When it does not tell.
    pub fn of(socket: impl AsFd) -> io::Result<BufferLimit> {
        let socket = socket.as_fd();
        Ok(BufferLimit {
            bytes: get(socket, libc::SOL_SOCKET, libc::SO_RCVBUF)?,
            locked: get(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK).ok(),
        })
    }

    /// Allows so many bytes beyond that, and returns what the limit is then. Needs `CAP_NET_ADMIN`.
    ///
    /// # Errors
    /// When it cannot be set.
    pub fn raise(self, socket: impl AsFd, more: usize) -> io::Result<BufferLimit> {
        let more = libc::c_int::try_from(more).unwrap_or(libc::c_int::MAX);
        set_room(socket.as_fd(), self.bytes.saturating_add(more))?;
        BufferLimit::of(socket)
    }

    /// Sets it as it was. What waits stays, however much it is. A limit that is odd, which only a host's
    /// default can be, becomes one less.
    ///
    /// # Errors
    /// When it cannot be set.
    pub fn put_back(self, socket: impl AsFd) -> io::Result<()> {
        let socket = socket.as_fd();
        set_room(socket, self.bytes)?;
        self.locked
            .map_or(Ok(()), |locked| set(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, locked))
    }
}

/// The kernel takes twice what it is told.
fn set_room(socket: BorrowedFd, bytes: libc::c_int) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes / 2)
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = from.as_sockaddr_in() {
        return Some(SocketAddr::from((v4.ip(), v4.port())));
    }
    let v6 = from.as_sockaddr_in6()?;
    Some(SocketAddr::from((v6.ip().to_canonical(), v6.port())))
}

/// An option that has another value as long as this lives.
struct ChangedOption<'a> {
    socket: BorrowedFd<'a>,
    level: libc::c_int,
    name: libc::c_int,
    was: libc::c_int,
}

impl<'a> ChangedOption<'a> {
    fn to(
        socket: BorrowedFd<'a>,
        level: libc::c_int,
        name: libc::c_int,
        value: libc::c_int,
    ) -> io::Result<Self> {
        let was = get(socket, level, name)?;
        set(socket, level, name, value)?;
        Ok(Self { socket, level, name, was })
    }
}

impl Drop for ChangedOption<'_> {
    fn drop(&mut self) {
        // It took another value a moment ago.
        let _ = set(self.socket, self.level, self.name, self.was);
    }
}

fn get(socket: BorrowedFd, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both pointers are to live variables of the stated size.
    let r = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), level, name, value, &raw mut length)
    };
    Errno::result(r)?;
    Ok(value)
}

fn set(
    socket: BorrowedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer is to a live variable of the stated size.
    let r = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    Ok(Errno::result(r).map(drop)?)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn all(socket: impl AsFd) -> Vec<Datagram> {
        waiting(socket, usize::MAX, usize::MAX).unwrap()
    }

    fn looks(server: &UdpSocket, to: SocketAddr) {
        let from = match to {
            SocketAddr::V4(_) => "127.0.0.1:0",
            SocketAddr::V6(_) => "[::1]:0",
        };
        let client = UdpSocket::bind(from).unwrap();
        let from = client.local_addr().unwrap();
        let said: [&[u8]; 5] = [b"one", b"", &[7; 9000], b"", b"last"];
        for payload in said {
            client.send_to(payload, to).unwrap();
        }

        // Twice, as nothing is taken; and it waits for its owner as if nobody had looked.
        let said_by = |p: &[u8]| Datagram { from, to: to.ip(), payload: p.to_vec() };
        assert_eq!(all(server), said.map(said_by));
        let full = said.into_iter().filter(|p| !p.is_empty());
        assert_eq!(all(server), full.map(said_by).collect::<Vec<_>>());

        // The one that goes beyond is the last.
        assert_eq!(waiting(server, 5, usize::MAX).unwrap().len(), 2);
        assert_eq!(waiting(server, usize::MAX, 2).unwrap().len(), 2);
        server.set_nonblocking(true).unwrap();
        let mut buffer = [0; 10_000];
        assert_eq!(server.peek(&mut buffer).unwrap(), 3);
        assert_eq!(server.peek(&mut buffer).unwrap(), 3);
        for payload in said {
            let length = server.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], payload);
        }
        assert_eq!(all(server), []);
        assert_eq!(get(server.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), -1);
    }

    #[test]
    fn what_waits_is_seen_and_stays() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        looks(&server, server.local_addr().unwrap());
        let server = UdpSocket::bind("0.0.0.0:0").unwrap();
        looks(&server, (Ipv4Addr::LOCALHOST, server.local_addr().unwrap().port()).into());
    }

    #[test]
    fn a_limit_is_raised_and_put_back_and_what_waits_stays() {
        const COUNT: usize = 2000;
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let send = || (0..COUNT).for_each(|_| assert!(client.send(b"small").is_ok()));
        let was = BufferLimit::of(&server).unwrap();

        // What this needs is asked for before: without it there is nothing to be seen.
        if let Err(e) = was.raise(&server, 0) {
            assert_eq!(e.raw_os_error(), Some(libc::EPERM));
            return;
        }

        was.put_back(&server).unwrap();
        assert_eq!(BufferLimit::of(&server).unwrap(), was);
        send();
        let few = all(&server).len();
        assert!(0 < few && few < COUNT, "{few}");

        let raised = was.raise(&server, 8 << 20).unwrap();
        assert_ne!(raised, was);
        send();
        was.put_back(&server).unwrap();
        assert_eq!(BufferLimit::of(&server).unwrap(), was);
        assert_eq!(all(&server).len(), few + COUNT);

        // No more comes in than before.
        send();
        assert_eq!(all(&server).len(), few + COUNT);
    }

    #[test]
    fn both_families_in_one_socket() {
        // Not every machine has IPv6.
        let Ok(server) = UdpSocket::bind("[::]:0") else { return };
        let port = server.local_addr().unwrap().port();
        looks(&server, (Ipv6Addr::LOCALHOST, port).into());
        looks(&server, (Ipv4Addr::LOCALHOST, port).into());
    }
}
