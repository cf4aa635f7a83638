//! Unix sockets of a network namespace: unix_diag of sock_diag(7).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::problem::{Problem, Trying};
use crate::sys::netlink::{NetlinkMessage, NetlinkSocket, Protocol};
use crate::sys::netns::NetNs;

/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `struct unix_diag_req` of linux/unix_diag.h.
const REQUEST: usize = 24;
/// `struct unix_diag_msg`.
const ANSWER: usize = 16;
/// `UDIAG_SHOW_NAME | UDIAG_SHOW_VFS`
const SHOW: u32 = 1 | 2;
/// `UDIAG_SHOW_PEER`
const SHOW_PEER: u32 = 4;
/// `UDIAG_SHOW_RQLEN`
const SHOW_QUEUES: u32 = 0x10;
const NAME: u16 = 0;
const FILE: u16 = 1;
const PEER: u16 = 2;
const QUEUES: u16 = 4;
// Of net/tcp_states.h; a datagram socket that is bound is in the state of a closed one.
const ESTABLISHED: u32 = 1;
const CLOSE: u32 = 7;
const LISTEN: u32 = 10;

/// A socket to which others come by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// What `/proc/PID/fd` calls it.
    pub inode: u32,
    /// The inode of the file that it was bound to, its lower half.
    pub file: u32,
    /// The name that it was bound to, absolute.
    pub name: PathBuf,
}

/// Sockets of the namespace of a process that have another end, and that: as `/proc/PID/fd` calls them. It is
/// 0 where nobody has accepted the connection yet.
///
/// # Errors
/// When the kernel does not list them.
pub fn peers(pid: i32) -> Result<Vec<(u32, u32)>, Problem> {
    let list = list(pid, 1 << ESTABLISHED | 1 << CLOSE, SHOW_PEER)?;
    Ok(list.iter().filter_map(peer).collect())
}

pub(super) fn peer(message: &NetlinkMessage) -> Option<(u32, u32)> {
    let inode = u32::from_ne_bytes(*message.payload.get(4..)?.first_chunk()?);
    let peer = message.attributes(ANSWER).get(PEER)?.first_chunk().copied()?;
    Some((inode, u32::from_ne_bytes(peer)))
}

/// A socket's queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    /// What `/proc/PID/fd` calls it.
    pub inode: u32,
    /// What waits in it: of one that listens, connections; of others, bytes.
    pub received: u32,
    /// Of one that listens, how many connections may wait; of others, bytes that its peer has not read.
    pub sent: u32,
}

/// The queues of all sockets of the namespace of a process.
///
/// # Errors
/// When the kernel does not list them.
pub fn queues(pid: i32) -> Result<Vec<Queues>, Problem> {
    let list = list(pid, 1 << ESTABLISHED | 1 << CLOSE | 1 << LISTEN, SHOW_QUEUES)?;
    Ok(list.iter().filter_map(queue).collect())
}

pub(super) fn queue(message: &NetlinkMessage) -> Option<Queues> {
    let inode = u32::from_ne_bytes(*message.payload.get(4..)?.first_chunk()?);
    let lengths: [u8; 8] = *message.attributes(ANSWER).get(QUEUES)?.first_chunk()?;
    let [received, sent] =
        [0, 4].map(|at| u32::from_ne_bytes(std::array::from_fn(|i| lengths[at + i])));
    Some(Queues { inode, received, sent })
}

/// Returns those of the namespace of a process that were bound to absolute names.
///
/// # Errors
/// When the kernel does not list them.
pub fn named_sockets(pid: i32) -> Result<Vec<Named>, Problem> {
    let list = list(pid, 1 << CLOSE | 1 << LISTEN, SHOW)?;
    Ok(list.iter().filter_map(named).collect())
}

fn list(pid: i32, states: u32, show: u32) -> Result<Vec<NetlinkMessage>, Problem> {
    let what = || "cannot list the container's unix sockets".into();
    let namespace = NetNs::of_pid(pid as u32).trying(what)?;
    let mut socket = NetlinkSocket::open_in(&namespace, Protocol::SockDiag).trying(what)?;
    let mut request = [0; REQUEST];
    request[0] = libc::AF_UNIX as u8;
    request[4..8].copy_from_slice(&states.to_ne_bytes());
    request[12..16].copy_from_slice(&show.to_ne_bytes());
    socket.dump(BY_FAMILY, &request).trying(what)
}

pub(super) fn named(message: &NetlinkMessage) -> Option<Named> {
    let inode = u32::from_ne_bytes(*message.payload.get(4..)?.first_chunk()?);
    let attributes = message.attributes(ANSWER);
    let name = attributes.get(NAME)?;
    let name = name.split(|byte| *byte == 0).next().filter(|name| name.starts_with(b"/"))?;
    let file = u32::from_ne_bytes(*attributes.get(FILE)?.first_chunk()?);
    Some(Named { inode, file, name: OsString::from_vec(name.to_vec()).into() })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    #[test]
    fn what_waits_is_counted_and_ends_are_known() {
        use std::os::fd::AsRawFd;
        use std::os::unix::net::UnixStream;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let door = UnixListener::bind(&path).unwrap();
        let inode = |fd: i32| {
            let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
            let text = target.to_str().unwrap().trim_start_matches("socket:[").to_owned();
            text.trim_end_matches(']').parse::<u32>().unwrap()
        };

        let (me, door_inode) = (std::process::id() as i32, inode(door.as_raw_fd()));
        let all = |of: u32| queues(me).unwrap().into_iter().find(|one| one.inode == of).unwrap();
        assert_eq!(all(door_inode).received, 0);
        let mut guest = UnixStream::connect(&path).unwrap();
        assert_eq!(all(door_inode).received, 1);
        assert_eq!(all(inode(guest.as_raw_fd())).sent, 0);
        std::io::Write::write_all(&mut guest, b"x").unwrap();
        assert!(all(inode(guest.as_raw_fd())).sent > 0);

        let (host, _) = door.accept().unwrap();
        assert_eq!(all(door_inode).received, 0);
        assert_eq!(all(inode(host.as_raw_fd())).received, 1);
        let ends = (inode(guest.as_raw_fd()), inode(host.as_raw_fd()));
        assert!(peers(me).unwrap().contains(&ends));
    }

    #[test]
    fn bound_sockets_are_listed_with_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let (stream, datagram) = (dir.path().join("stream"), dir.path().join("datagram"));
        let _stream = UnixListener::bind(&stream).unwrap();
        let _datagram = UnixDatagram::bind(&datagram).unwrap();
        let list = named_sockets(std::process::id() as i32).unwrap();
        for path in [stream, datagram] {
            let file = std::fs::metadata(&path).unwrap().ino() as u32;
            assert!(list.iter().any(|one| one.name == path && one.file == file), "{path:?}");
        }
    }
}
