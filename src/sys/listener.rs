//! A listening socket of Multipath TCP, looked at and made again: CRIU has no code for them, and a Go
//! server has nothing else (since Go 1.24).
//!
//! There is no state in it but its options and its place. Whoever has come to it by plain TCP has a
//! connection of plain TCP: the kernel's net/mptcp/protocol.c, `mptcp_stream_accept`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{Backlog, SockaddrStorage, bind, getsockname, listen};
use nix::unistd::{Uid, fchown};
use serde::{Deserialize, Serialize};

use super::connection::{
    Buffers, OptionChanges, OptionDefaults, buffers, fresh, get, is_ordinary, set, set_buffers,
    set_nonblocking, set_options, value,
};
use super::socket::MPTCP;

/// `TCP_LISTEN` of net/tcp_states.h.
const LISTEN: u8 = 10;
/// In words of `struct tcp_info`, of a listening socket: how many wait to be accepted
/// (`tcpi_unacked`), and how many may (`tcpi_sacked`).
const WAITING: usize = 6;
const BACKLOG: usize = 7;

/// All that there is to know of it but its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerOptions {
    /// `IPV6_V6ONLY`
    v6only: bool,
    /// How many may wait to be accepted: listen(2).
    backlog: u32,
    /// `SO_REUSEADDR`
    reuse: bool,
    /// `O_NONBLOCK`
    nonblocking: bool,
    buffers: Buffers,
    options: OptionChanges,
}

/// Returns what the options of a fresh one are, here.
///
/// # Errors
/// When there can be none: MPTCP may be switched off.
pub fn fresh_options(v6: bool) -> io::Result<OptionDefaults> {
    Ok(OptionDefaults::of(fresh(v6, MPTCP)?.as_fd()))
}

/// Tells whether a socket of Multipath TCP is one that listens, and about which nothing is out of the ordinary:
/// no filter, no device that it is bound to, nobody who wants a signal.
///
/// # Errors
/// When it is no TCP socket.
pub fn is_plain(socket: impl AsFd) -> io::Result<bool> {
    let fd = socket.as_fd();
    let bound = value(fd, (libc::SOL_SOCKET, libc::SO_BINDTODEVICE)).0 != 0;
    let somewhere = address(fd).is_some_and(|address| match address {
        SocketAddr::V6(address) => !address.ip().is_unicast_link_local(),
        SocketAddr::V4(_) => true,
    });
    Ok(info(fd)?[0].to_ne_bytes()[0] == LISTEN && somewhere && !bound && is_ordinary(fd).is_some())
}

/// Returns how many wait to be accepted.
///
/// # Errors
/// When it is no TCP socket.
pub fn waiting(socket: impl AsFd) -> io::Result<u32> {
    Ok(info(socket.as_fd())?[WAITING])
}

/// Returns where it listens, and all else; none if it is not [plain](is_plain).
///
/// # Errors
/// When it is no TCP socket.
pub fn look(
    socket: impl AsFd,
    fresh: &OptionDefaults,
) -> io::Result<Option<(SocketAddr, ListenerOptions)>> {
    let fd = socket.as_fd();
    let (Some(address), Some(flags), true) = (address(fd), is_ordinary(fd), is_plain(fd)?) else {
        return Ok(None);
    };
    let is_set = |level, name| get::<libc::c_int>(fd, level, name).map(|value| value != 0);
    let v6only = address.is_ipv6() && is_set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?;
    let listener = ListenerOptions {
        v6only,
        backlog: info(fd)?[BACKLOG],
        reuse: is_set(libc::SOL_SOCKET, libc::SO_REUSEADDR)?,
        nonblocking: flags.nonblocking,
        buffers: buffers(fd)?,
        options: fresh.changed(fd),
    };
    Ok(Some((address, listener)))
}

/// Makes one like it, of this user, in the calling thread's network namespace: it listens. Of plain TCP
/// where this kernel, or the namespace, has no other. `early`: the address may come only later.
///
/// # Errors
/// When there can be none, or the address is not there, or taken.
pub fn make(
    local: SocketAddr,
    owner: u32,
    was: &ListenerOptions,
    early: bool,
) -> io::Result<OwnedFd> {
    let v6 = local.is_ipv6();
    let lacks = |e: &io::Error| {
        let lacking = [Errno::ENOPROTOOPT, Errno::EPROTONOSUPPORT, Errno::EINVAL];
        lacking.iter().any(|errno| e.raw_os_error() == Some(*errno as i32))
    };
    let socket = match fresh(v6, MPTCP) {
        Err(e) if lacks(&e) => fresh(v6, libc::IPPROTO_TCP)?,
        socket => socket?,
    };

    let fd = socket.as_fd();
    // Packet filters see it, too, and whoever shares its port.
    fchown(&socket, Some(Uid::from_raw(owner)), None)?;
    set_options(fd, &was.options)?;
    set_buffers(fd, was.buffers)?;
    set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &libc::c_int::from(was.reuse))?;
    if v6 {
        set(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &libc::c_int::from(was.v6only))?;
    }

    if early {
        set(fd, libc::IPPROTO_IP, libc::IP_FREEBIND, &1)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(local))?;
    if early {
        set(fd, libc::IPPROTO_IP, libc::IP_FREEBIND, &0)?;
    }

    let most = i32::try_from(was.backlog).unwrap_or(i32::MAX);
    listen(&socket, Backlog::new(most).unwrap_or(Backlog::MAXCONN))?;
    if was.nonblocking {
        set_nonblocking(fd)?;
    }

    Ok(socket)
}

fn info(fd: BorrowedFd) -> io::Result<[u32; BACKLOG + 1]> {
    get(fd, libc::IPPROTO_TCP, libc::TCP_INFO)
}

fn address(fd: BorrowedFd) -> Option<SocketAddr> {
    let found = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?;
    let v4 = found.as_sockaddr_in().map(|a| SocketAddr::from((a.ip(), a.port())));
    v4.or_else(|| found.as_sockaddr_in6().map(|a| SocketAddr::from((a.ip(), a.port()))))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::super::netns::NetNs;
    use super::super::socket::is_mptcp;
    use super::*;

    pub(crate) fn sample() -> ListenerOptions {
        ListenerOptions {
            v6only: true,
            backlog: 128,
            reuse: true,
            nonblocking: true,
            buffers: (1, 2, 0),
            options: vec![(0, vec![1, 0, 0, 0])],
        }
    }

    fn again(at: SocketAddr, v6only: bool) {
        let fresh_one = fresh_options(at.is_ipv6()).unwrap();
        let first = fresh(at.is_ipv6(), MPTCP).unwrap();
        let was = ListenerOptions {
            v6only,
            backlog: 77,
            reuse: true,
            nonblocking: true,
            buffers: buffers(first.as_fd()).unwrap(),
            options: vec![(0, vec![1, 0, 0, 0])],
        };

        assert!(!is_plain(&first).unwrap(), "it does not listen yet");
        drop(first);
        let made = make(at, 7, &was, false).unwrap();
        assert!(is_mptcp(&made) && is_plain(&made).unwrap());
        let (place, seen) = look(&made, &fresh_one).unwrap().unwrap();
        assert_eq!((place.ip(), &seen), (at.ip(), &was));
        assert_eq!(nix::sys::stat::fstat(&made).unwrap().st_uid, 7);

        // A guest of plain TCP gets a connection of plain TCP.
        let guest = if v6only { "::1" } else { "127.0.0.1" };
        let mut client = TcpStream::connect((guest, place.port())).unwrap();
        assert_eq!(waiting(&made).unwrap(), 1);
        let listener = TcpListener::from(made);
        let (mut server, _) = listener.accept().unwrap();
        assert!(!is_mptcp(&server));
        client.write_all(b"x").unwrap();
        server.set_nonblocking(false).unwrap();
        server.read_exact(&mut [0]).unwrap();
        assert_eq!(waiting(&listener).unwrap(), 0);
    }

    #[test]
    fn one_like_it_is_made() {
        let Ok(space) = NetNs::fresh() else {
            eprintln!("skipped: this needs CAP_SYS_ADMIN");
            return;
        };
        space
            .run(|| {
                let up =
                    std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
                assert!(up.unwrap().success());
                again("127.0.0.1:0".parse().unwrap(), false);
                again("[::]:0".parse().unwrap(), false);
                again("[::]:0".parse().unwrap(), true);
                std::fs::write("/proc/sys/net/mptcp/enabled", "0").unwrap();
                let made = make("127.0.0.1:0".parse().unwrap(), 0, &sample(), false).unwrap();
                assert!(!is_mptcp(&made), "it is switched off");
            })
            .unwrap();
    }
}
