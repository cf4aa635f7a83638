//! Unix sockets of a network namespace: unix_diag of sock_diag(7).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::problem::{Problem, Trying};
use crate::sys::netlink::{Message, Protocol, Socket};
use crate::sys::netns::NetNs;

/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `struct unix_diag_req` of linux/unix_diag.h.
const REQUEST: usize = 24;
/// `struct unix_diag_msg`.
const ANSWER: usize = 16;
/// `UDIAG_SHOW_NAME | UDIAG_SHOW_VFS`
const SHOW: u32 = 1 | 2;
const NAME: u16 = 0;
const FILE: u16 = 1;
// Of net/tcp_states.h; a datagram socket that is bound is in the state of a closed one.
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

/// Those of the namespace of a process that were bound to absolute names.
///
/// # Errors
/// When the kernel does not list them.
pub fn named_sockets(pid: i32) -> Result<Vec<Named>, Problem> {
    let what = || "cannot list the container's unix sockets".into();
    let namespace = NetNs::of_pid(pid as u32).trying(what)?;
    let mut socket = Socket::open_in(&namespace, Protocol::SockDiag).trying(what)?;
    let mut request = [0; REQUEST];
    request[0] = libc::AF_UNIX as u8;
    request[4..8].copy_from_slice(&(1u32 << CLOSE | 1 << LISTEN).to_ne_bytes());
    request[12..16].copy_from_slice(&SHOW.to_ne_bytes());
    let list = socket.dump(BY_FAMILY, &request).trying(what)?;
    Ok(list.iter().filter_map(named).collect())
}

pub(super) fn named(message: &Message) -> Option<Named> {
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
