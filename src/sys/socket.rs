//! Socket options that std has no name for: tcp(7).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::connection::get;

/// `TCP_REPAIR_OFF_NO_WP`: leave repair mode without sending a window probe. linux/tcp.h.
pub(super) const TCP_REPAIR_OFF_NO_WP: libc::c_int = -1;
/// `IPPROTO_MPTCP` of linux/in.h.
pub(super) const MPTCP: libc::c_int = 262;
const TCP_REPAIR: libc::c_int = 19;

/// Tells whether a socket is of Multipath TCP: socket(7), `SO_PROTOCOL`.
pub fn is_mptcp(socket: impl AsFd) -> bool {
    let protocol = get::<libc::c_int>(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL);
    protocol.is_ok_and(|protocol| protocol == MPTCP)
}

/// Tells whether a socket takes connections: socket(7), `SO_ACCEPTCONN`.
pub fn listens(socket: impl AsFd) -> bool {
    is_set(socket, libc::SO_ACCEPTCONN)
}

/// Tells whether what comes to a unix socket has something beside it: unix(7), `SO_PASSCRED`, `SO_PASSSEC`;
/// socket(7), `SO_TIMESTAMP`.
pub fn has_control_messages(socket: impl AsFd) -> bool {
    let kinds = [libc::SO_PASSCRED, libc::SO_PASSSEC, libc::SO_TIMESTAMP, libc::SO_TIMESTAMPNS];
    kinds.into_iter().any(|kind| is_set(socket.as_fd(), kind))
}

fn is_set(socket: impl AsFd, name: libc::c_int) -> bool {
    get::<libc::c_int>(socket.as_fd(), libc::SOL_SOCKET, name).is_ok_and(|value| value != 0)
}

/// Tells whether a socket is of IPv6: socket(7), `SO_DOMAIN`.
///
/// # Errors
/// When it is no socket.
pub fn is_v6(socket: impl AsFd) -> io::Result<bool> {
    let domain: libc::c_int = get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    Ok(domain == libc::AF_INET6)
}

/// Takes a TCP socket out of repair mode where it was left there; says whether it was.
///
/// A CRIU that is killed in the middle of a dump leaves its victims' sockets so: they neither send
/// nor receive.
pub fn leave_repair(socket: impl AsFd) -> io::Result<bool> {
    let fd = socket.as_fd().as_raw_fd();
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;

    // SAFETY: both pointers are to live variables of the stated size.
    let r = unsafe {
        libc::getsockopt(
            fd,
            libc::IPPROTO_TCP,
            TCP_REPAIR,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };

    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    if value == 0 {
        return Ok(false);
    }

    let off = TCP_REPAIR_OFF_NO_WP;
    // SAFETY: the pointer is to a live variable of the stated size.
    let r = unsafe {
        libc::setsockopt(
            fd,
            libc::IPPROTO_TCP,
            TCP_REPAIR,
            (&raw const off).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };

    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(true) }
}

/// Puts a TCP socket into repair mode: closed in it, it is gone at once and says nothing to anybody.
///
/// # Errors
/// When it is no TCP socket, or one that is neither closed nor established.
pub fn enter_repair(socket: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to a live variable of the stated size.
    let r = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_REPAIR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
