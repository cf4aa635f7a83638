//! TAP devices: Ethernet interfaces whose wire is a file descriptor.
//!
//! See the kernel's [tuntap](https://docs.kernel.org/networking/tuntap.html) page.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::uio::writev;

const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
/// `TUNSETIFF` of linux/if_tun.h: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// `TUNSETPERSIST`: `_IOW('T', 203, int)`.
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;

const _: () = assert!(size_of::<libc::ifreq>() == 40);

/// A TAP device, gone as soon as this value (or the process) is, unless it [persists](Tap::persist).
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Makes the device in the namespace of the calling thread, or takes one that persists and that
    /// nobody holds. Frames written and read carry a `virtio_net_hdr` in front.
    pub fn create(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0) {
            return Err(Errno::EINVAL.into());
        }
        let fd = OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/net/tun")?);
        // SAFETY: ifreq is plain data for which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which is ours; the name ends in zero.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        Ok(Self { fd })
    }

    /// The device outlives whoever holds it: without one it has no carrier, and keeps its addresses.
    pub fn persist(&self) -> io::Result<()> {
        let on: libc::c_ulong = 1;
        // SAFETY: TUNSETPERSIST takes its argument by value.
        Errno::result(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETPERSIST, on) })?;
        Ok(())
    }

    /// Takes over a descriptor of a device that another process has made.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// From here on [`Tap::read`] does not wait.
    pub fn do_not_wait(&self) -> io::Result<()> {
        fcntl(&self.fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// One frame that the namespace has sent: its offload header, then the Ethernet frame. `None` if
    /// nothing waits.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.fd, buffer) {
            Ok(n) => Ok(Some(n)),
            Err(Errno::EAGAIN) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Lets a frame come in as if from the wire: the offload header, then the Ethernet frame.
    pub fn write(&self, header: &[u8], frame: &[u8]) -> io::Result<()> {
        writev(&self.fd, &[io::IoSlice::new(header), io::IoSlice::new(frame)])?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
