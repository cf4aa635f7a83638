//! Packet sockets: seeing and sending whole Ethernet frames.
//!
//! See [packet(7)](https://man7.org/linux/man-pages/man7/packet.7.html) and, for the header in
//! front of each frame, linux/virtio_net.h.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Length of `struct virtio_net_hdr`, which `PACKET_VNET_HDR` puts before each frame.
pub const VNET_HDR: usize = 10;

const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// One instruction of a classic socket filter, [`struct sock_filter`]; see
/// [socket(7)](https://man7.org/linux/man-pages/man7/socket.7.html), `SO_ATTACH_FILTER`.
///
/// [`struct sock_filter`]: https://docs.kernel.org/networking/filter.html
#[derive(Debug, Clone, Copy)]
pub struct Instruction(pub u16, pub u8, pub u8, pub u32);

/// A packet socket of the namespace in which it was opened.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Opens a socket that receives nothing until [`PacketSocket::listen`].
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed; the result is checked before it is owned.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Puts the offload header before each frame, so that merged segments and unfinished
    /// checksums can be told.
    pub fn with_vnet_header(&self) -> io::Result<()> {
        self.set(libc::SOL_PACKET, PACKET_VNET_HDR, &1_i32)
    }

    /// Leaves out what the namespace itself sends.
    pub fn ignore_outgoing(&self) -> io::Result<()> {
        self.set(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1_i32)
    }

    /// What is sent bears this mark, for packet filters to know it by. socket(7), `SO_MARK`.
    pub fn mark(&self, mark: u32) -> io::Result<()> {
        self.set(libc::SOL_SOCKET, libc::SO_MARK, &mark)
    }

    /// Has the device with this index take in all multicasts, as long as this socket is open.
    pub fn all_multicasts(&self, ifindex: i32) -> io::Result<()> {
        let wish = libc::packet_mreq {
            mr_ifindex: ifindex,
            mr_type: libc::PACKET_MR_ALLMULTI as libc::c_ushort,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        self.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &wish)
    }

    /// Room for frames that are waiting to be read, in bytes of kernel memory; as the superuser
    /// beyond the limit of `net.core.rmem_max`.
    pub fn receive_room(&self, bytes: i32) -> io::Result<()> {
        self.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)
            .or_else(|_| self.set(libc::SOL_SOCKET, libc::SO_RCVBUF, &bytes))
    }

    /// Lets only frames through for which the filter returns other than zero.
    pub fn filter(&self, program: &[Instruction]) -> io::Result<()> {
        let mut code: Vec<libc::sock_filter> = program
            .iter()
            .map(|i| libc::sock_filter { code: i.0, jt: i.1, jf: i.2, k: i.3 })
            .collect();
        let len = u16::try_from(code.len()).map_err(|_| Errno::EINVAL)?;
        let program = libc::sock_fprog { len, filter: code.as_mut_ptr() };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
    }

    /// Begins to receive: frames of `protocol` (an EtherType, `ETH_P_ALL` for all) on the device
    /// with this index, or on all devices for 0.
    pub fn listen(&self, protocol: u16, ifindex: i32) -> io::Result<()> {
        let address = link_address(protocol, ifindex);
        // SAFETY: `address` is a whole sockaddr_ll and the length given is its own.
        let result = unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        Ok(Errno::result(result).map(drop)?)
    }

    /// Sends a whole frame through the device with this index.
    pub fn send(&self, ifindex: i32, frame: &[u8]) -> io::Result<()> {
        let address = link_address(0, ifindex);
        // SAFETY: both pointers are to live memory with the lengths given; sendto only reads.
        let result = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        Ok(Errno::result(result).map(drop)?)
    }

    /// Receives one frame into `buffer`; `None` if nothing waits. The first number is the whole
    /// length, which is greater than the buffer if the frame was cut; the second the device.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, i32)>> {
        let mut address = link_address(0, 0);
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: both buffers are ours, live through the call and have the lengths given.
        let result = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT | libc::MSG_TRUNC,
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        match Errno::result(result) {
            Ok(n) => Ok(Some((n.unsigned_abs(), address.sll_ifindex))),
            Err(Errno::EAGAIN) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Returns how many frames were lost for want of room since the last call.
    pub fn dropped(&self) -> io::Result<u32> {
        let mut stats = [0_u32; 2];
        let mut length = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: tpacket_stats is two u32; buffer and length are ours and agree.
        let result = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        Errno::result(result)?;
        Ok(stats[1])
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: `value` lives through the call, its own length is given, and each caller in
        // this module passes the type that the option wants.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                (&raw const *value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        };
        Ok(Errno::result(result).map(drop)?)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn link_address(protocol: u16, ifindex: i32) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}
