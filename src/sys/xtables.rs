//! Rules of iptables-legacy as the kernel holds them: getsockopt(2) on a raw socket, as iptables does.
//! The numbers and forms are those of linux/netfilter_ipv4/ip_tables.h and
//! linux/netfilter_ipv6/ip6_tables.h, which are the same but for the size of an entry.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `IPT_SO_GET_INFO`, `IP6T_SO_GET_INFO`
const GET_INFO: libc::c_int = 64;
/// `IPT_SO_GET_ENTRIES`, `IP6T_SO_GET_ENTRIES`
const GET_ENTRIES: libc::c_int = 65;
/// Length of a table's name.
const NAME: usize = 32;
/// `struct ipt_getinfo`: name, valid hooks, five hook entries, five underflows, number, size.
const INFO: usize = NAME + 4 + 20 + 20 + 4 + 4;
/// `struct ipt_get_entries` without its entries: name, size, and what aligns 64 bits.
const ENTRIES: usize = NAME + 8;
/// More than any table that could be looked through; the kernel's own limit is near it.
const MOST: usize = 512 << 20;
/// A table that is changed so often between two system calls is not waited for.
const TRIES: usize = 20;

/// The entries of a table in the calling thread's network namespace, one after another. A table that
/// is not there may be made by asking for it: `/proc/net/ip_tables_names` tells.
///
/// # Errors
/// When the kernel has no such tables, or does not show them.
pub fn entries(v6: bool, table: &str) -> io::Result<Vec<u8>> {
    let (family, level) =
        if !v6 { (libc::AF_INET, libc::IPPROTO_IP) } else { (libc::AF_INET6, libc::IPPROTO_IPV6) };
    // SAFETY: no pointers; a non-negative result is a new descriptor that is ours alone.
    let fd =
        unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }

    // SAFETY: see above.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
    for _ in 0..TRIES {
        let mut info = named(table, INFO).ok_or_else(too_long)?;
        get(&socket, level, GET_INFO, &mut info)?;
        let size = info.last_chunk().map_or(0, |size| u32::from_ne_bytes(*size) as usize);
        if size > MOST {
            return Err(io::Error::from(io::ErrorKind::OutOfMemory));
        }

        let mut all = named(table, ENTRIES + size).ok_or_else(too_long)?;
        all[NAME..NAME + 4].copy_from_slice(&(size as u32).to_ne_bytes());
        match get(&socket, level, GET_ENTRIES, &mut all) {
            Ok(()) => return Ok(all.split_off(ENTRIES)),
            // It has another size by now.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(e) => return Err(e),
        }
    }

    Err(io::Error::from(io::ErrorKind::WouldBlock))
}

/// Room for an answer, which begins with the table's name.
fn named(table: &str, size: usize) -> Option<Vec<u8>> {
    let mut room = vec![0; size];
    // With a zero after it.
    room.get_mut(..NAME - 1)?.get_mut(..table.len())?.copy_from_slice(table.as_bytes());
    Some(room)
}

fn get(socket: &OwnedFd, level: libc::c_int, what: libc::c_int, room: &mut [u8]) -> io::Result<()> {
    let mut length = room.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the room's size; both pointers are to
    // live memory that nobody else uses.
    let r = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, what, room.as_mut_ptr().cast(), &raw mut length)
    };
    match r {
        0 if length as usize == room.len() => Ok(()),
        0 => Err(io::Error::from(io::ErrorKind::InvalidData)),
        _ => Err(io::Error::last_os_error()),
    }
}
