//! Packets and the file descriptors that ride on them: unix(7), `SCM_RIGHTS`.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv,
    recvmsg, sendmsg, socketpair,
};

/// Most descriptors that one packet may carry; CRIU and runc never send more than one.
const MAX_FDS: usize = 8;

/// Most descriptors that the kernel carries with one packet: `SCM_MAX_FD`, unix(7).
pub const MOST_FDS: usize = 253;

/// The longest packet accepted: runc's requests stay below 40 KiB even with hundreds of mounts.
pub const MAX_PACKET: usize = 1 << 20;

/// A connected pair of SEQPACKET sockets, close-on-exec. socketpair(2).
pub fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one packet with descriptors. sendmsg(2).
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    send_with(socket, bytes, fds, MsgFlags::empty())
}

/// The same, only if there is room for it now.
///
/// # Errors
/// `WouldBlock` when there is none.
pub fn send_now(socket: impl AsFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    send_with(socket, bytes, fds, MsgFlags::MSG_DONTWAIT)
}

fn send_with(socket: impl AsFd, bytes: &[u8], fds: &[RawFd], flags: MsgFlags) -> io::Result<()> {
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    let iov = [IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &iov, control, flags, None) {
            Ok(n) if n == bytes.len() => return Ok(()),
            Ok(_) => return Err(io::Error::other("packet sent in part")),
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
    }
}

/// Receives one packet and its descriptors; `None` when the peer has closed. recvmsg(2).
///
/// # Errors
/// `InvalidData` for a packet longer than [`MAX_PACKET`]; the system's error otherwise.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let raw = socket.as_fd().as_raw_fd();
    // MSG_TRUNC makes a peek tell the packet's real length, so that no packet is ever cut.
    let length = loop {
        match recv(raw, &mut [0u8; 1], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC) {
            Ok(n) => break n,
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    };
    if length > MAX_PACKET {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet too long"));
    }
    receive_up_to(raw, length.max(1), &mut cmsg_space!([RawFd; MAX_FDS]))
}

/// The same for a stream socket: what has come with the next write, at most `length` bytes of it.
///
/// # Errors
/// The system's error.
pub fn receive_stream(
    socket: impl AsFd,
    length: usize,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let raw = socket.as_fd().as_raw_fd();
    receive_up_to(raw, length, &mut cmsg_space!([RawFd; MOST_FDS]))
}

/// A packet that brings as many descriptors as one may; `None` when no more has come.
///
/// # Errors
/// The system's error.
pub fn receive_many(socket: impl AsFd) -> io::Result<Option<Vec<OwnedFd>>> {
    let (raw, mut control) = (socket.as_fd().as_raw_fd(), cmsg_space!([RawFd; MOST_FDS]));
    match receive_into(raw, &mut [0], &mut control, MsgFlags::MSG_DONTWAIT) {
        Ok((0, fds)) if fds.is_empty() => Ok(None),
        Ok((_, fds)) => Ok(Some(fds)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// The descriptors of all packets that have come, each of which brings as many as one may; the packets
/// stay. unix(7), `SO_PEEK_OFF`.
///
/// # Errors
/// The system's error.
pub fn look_at_many(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let raw = socket.as_fd().as_raw_fd();
    let offset = |at: libc::c_int| {
        let (value, length) = ((&raw const at).cast(), size_of_val(&at) as libc::socklen_t);
        // SAFETY: the kernel reads as many bytes as it is told from a live variable.
        let r =
            unsafe { libc::setsockopt(raw, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, length) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // From the first one on, each time the next.
    offset(0)?;
    let (mut all, mut control) = (Vec::new(), cmsg_space!([RawFd; MOST_FDS]));
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
    let done = loop {
        match receive_into(raw, &mut [0], &mut control, flags) {
            Ok((0, fds)) if fds.is_empty() => break Ok(()),
            Ok((_, fds)) => all.extend(fds),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            Err(e) => break Err(e),
        }
    };
    offset(-1)?;
    done.map(|()| all)
}

fn receive_up_to(
    raw: RawFd,
    length: usize,
    control: &mut [u8],
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut buffer = vec![0u8; length];
    let (n, fds) = receive_into(raw, &mut buffer, control, MsgFlags::empty())?;
    if n == 0 && fds.is_empty() {
        return Ok(None);
    }
    buffer.truncate(n);
    Ok(Some((buffer, fds)))
}

fn receive_into(
    raw: RawFd,
    buffer: &mut [u8],
    control: &mut [u8],
    flags: MsgFlags,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iov = [IoSliceMut::new(buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(raw, &mut iov, Some(control), flags) {
            Ok(m) => break m,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
    };

    let cut = message.flags.contains(MsgFlags::MSG_CTRUNC);
    let mut fds = Vec::new();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(list) = item {
            // SAFETY: the kernel has just installed these descriptors for us and nobody else
            // knows their numbers.
            fds.extend(list.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }

    if cut {
        // What did not fit, or has no place in our table, has been closed.
        return Err(io::Error::other("there is no room for all descriptors that have come"));
    }

    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_arrives_whole_with_its_descriptor() {
        let (a, b) = seqpacket_pair().unwrap();
        let big = vec![7u8; 100_000];
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&a, &big, &[null.as_raw_fd()]).unwrap();
        let (bytes, fds) = receive(&b).unwrap().unwrap();
        assert_eq!(bytes, big);
        assert_eq!(fds.len(), 1);
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }
}
