//! A small blocking netlink socket with the encoding that rtnetlink and nf_tables share.
//!
//! One encoder serves both families: crates for rtnetlink know nothing of nf_tables batches, and
//! their typed attributes turn what a newer kernel adds into parse errors. Here unknown
//! attributes are skipped.
//!
//! See [netlink(7)](https://man7.org/linux/man-pages/man7/netlink.7.html) and
//! [rtnetlink(7)](https://man7.org/linux/man-pages/man7/rtnetlink.7.html).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::netns::NetNs;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Larger than any datagram the kernel makes for a dump (32 KiB) or an acknowledgement.
const RECEIVE_BUFFER: usize = 128 * 1024;
/// A dump that changes under our hands is begun again, but not for ever.
const DUMP_TRIES: usize = 8;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST`
pub const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`
pub const ACK: u16 = 0x4;
const DUMP_INTR: u16 = 0x10;
const CAPPED: u16 = 0x100;
const ACK_TLVS: u16 = 0x200;
/// `NLM_F_DUMP`
pub const DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`
pub const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`
pub const CREATE: u16 = 0x400;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;

/// What the kernel answered: its error number and, where it gave one, its own explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetlinkError {
    /// The error number.
    pub errno: Errno,
    /// The kernel's words (`NLMSGERR_ATTR_MSG`); empty if it gave none.
    pub message: String,
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.message.as_str() {
            "" => write!(f, "{}", self.errno.desc()),
            message => write!(f, "{} ({message})", self.errno.desc()),
        }
    }
}

impl std::error::Error for NetlinkError {}

impl From<Errno> for NetlinkError {
    fn from(errno: Errno) -> Self {
        Self { errno, message: String::new() }
    }
}

impl From<NetlinkError> for io::Error {
    fn from(e: NetlinkError) -> Self {
        Self::from_raw_os_error(e.errno as i32)
    }
}

/// Shorthand for results of netlink requests.
pub type Result<T> = std::result::Result<T, NetlinkError>;

/// Which part of the kernel a socket speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, rules, neighbours, traffic control.
    Route,
    /// nf_tables.
    Netfilter,
    /// Lists of sockets: [sock_diag(7)](https://man7.org/linux/man-pages/man7/sock_diag.7.html).
    SockDiag,
}

/// One request under construction: header, fixed part, attributes.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A message of type `kind` with the fixed header that the type asks for.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        let mut request = Self { bytes };
        request.pad();
        request
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    pub fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).expect("attributes here are short");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds a string with its terminating zero.
    pub fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds a number in host order (rtnetlink).
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds a number in network order (nf_tables).
    pub fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Adds a nest of attributes; `fill` may also begin with raw bytes.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let at = self.bytes.len();
        self.attr(kind | NLA_F_NESTED, &[]);
        fill(self);
        let length = u16::try_from(self.bytes.len() - at).expect("nests here are short");
        self.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Adds bytes as they are: the fixed header that some nests begin with.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// What follows the netlink header.
    #[cfg(test)]
    pub(crate) fn payload(&self) -> Vec<u8> {
        self.bytes[HEADER..].to_vec()
    }

    fn finish(&self, sequence: u32, into: &mut Vec<u8>) {
        let at = into.len();
        into.extend_from_slice(&self.bytes);
        let length = u32::try_from(self.bytes.len()).expect("requests here are short");
        into[at..at + 4].copy_from_slice(&length.to_ne_bytes());
        into[at + 8..at + 12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// Requests encoded ahead of time, so that sending them costs one system call and no allocation.
#[derive(Debug, Clone)]
pub struct Prepared {
    bytes: Vec<u8>,
    answers: usize,
}

impl Prepared {
    /// Encodes `requests` into one datagram; those with [`ACK`] are waited for.
    pub fn new(requests: &[Request]) -> Self {
        let mut bytes = Vec::new();
        let mut answers = 0;
        for (sequence, request) in (1..).zip(requests) {
            request.finish(sequence, &mut bytes);
            let flags = u16::from_ne_bytes([request.bytes[6], request.bytes[7]]);
            answers += usize::from(flags & ACK != 0);
        }
        Self { bytes, answers }
    }
}

/// One message of the kernel's answer.
#[derive(Debug, Clone)]
pub struct NetlinkMessage {
    /// What follows the netlink header.
    pub payload: Vec<u8>,
}

impl NetlinkMessage {
    /// The attributes behind a fixed header of `fixed` bytes.
    pub fn attributes(&self, fixed: usize) -> Attributes<'_> {
        Attributes::parse(self.payload.get(fixed..).unwrap_or_default())
    }
}

/// Attributes of a message or of a nest. Malformed rests are cut off.
#[derive(Debug, Clone, Default)]
pub struct Attributes<'a>(Vec<(u16, &'a [u8])>);

impl<'a> Attributes<'a> {
    /// Splits `bytes` into attributes.
    pub fn parse(mut bytes: &'a [u8]) -> Self {
        let mut list = Vec::new();
        while let [l0, l1, k0, k1, ..] = *bytes {
            let length = usize::from(u16::from_ne_bytes([l0, l1]));
            if length < 4 || length > bytes.len() {
                break;
            }
            list.push((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, &bytes[4..length]));
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Self(list)
    }

    /// All of them in order.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &'a [u8])> + '_ {
        self.0.iter().copied()
    }

    /// The first of this kind.
    pub fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.0.iter().find(|(k, _)| *k == kind).map(|(_, v)| *v)
    }

    /// A number in host order.
    pub fn u32(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.get(..4)?.try_into().ok().map(u32::from_ne_bytes)
    }

    /// A number in network order.
    pub fn be32(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.get(..4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A string up to its terminating zero.
    pub fn string(&self, kind: u16) -> Option<String> {
        let bytes = self.get(kind)?;
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// The attributes of a nest; none if it is missing.
    pub fn nest(&self, kind: u16) -> Attributes<'a> {
        self.get(kind).map(Attributes::parse).unwrap_or_default()
    }
}

/// A netlink socket; it belongs to the namespace in which it was opened, wherever it is used.
#[derive(Debug)]
pub struct NetlinkSocket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl NetlinkSocket {
    /// Opens a socket in the namespace of the calling thread.
    pub fn open(protocol: Protocol) -> Result<Self> {
        let protocol = match protocol {
            Protocol::Route => SockProtocol::NetlinkRoute,
            Protocol::Netfilter => SockProtocol::NetlinkNetFilter,
            Protocol::SockDiag => SockProtocol::NetlinkSockDiag,
        };
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        // Old kernels lack these; then errors only lose their explanation.
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK] {
            let _ = set_flag(&fd, option);
        }
        Ok(Self { fd, buffer: vec![0; RECEIVE_BUFFER] })
    }

    /// Opens a socket in `namespace`.
    pub fn open_in(namespace: &NetNs, protocol: Protocol) -> Result<Self> {
        namespace.run(|| Self::open(protocol)).map_err(|e| {
            NetlinkError::from(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        })?
    }

    /// Sends one request and waits until it is acknowledged.
    pub fn change(&mut self, request: &Request) -> Result<()> {
        self.query(request).map(drop)
    }

    /// Sends one request and returns what the kernel says before the acknowledgement.
    pub fn query(&mut self, request: &Request) -> Result<Vec<NetlinkMessage>> {
        let mut request = request.clone();
        request.bytes[6] |= ACK as u8;
        self.transact(&Prepared::new(&[request]))
    }

    /// Sends everything in one datagram and waits for the acknowledgements that were asked for.
    /// The first refusal is the result.
    pub fn transact(&mut self, prepared: &Prepared) -> Result<Vec<NetlinkMessage>> {
        send(self.fd.as_raw_fd(), &prepared.bytes, MsgFlags::empty())?;
        let (mut answers, mut messages) = (0, Vec::new());
        while answers < prepared.answers {
            let received = self.receive(MsgFlags::empty())?;
            let result = split(&self.buffer[..received], |header, payload| match header.kind {
                NLMSG_ERROR => {
                    answers += 1;
                    outcome(header.flags, payload)
                }
                NLMSG_DONE => Ok(()),
                _ => {
                    messages.push(NetlinkMessage { payload: payload.to_vec() });
                    Ok(())
                }
            });
            if let Err(e) = result {
                // The rest of the answers must not be taken for those of the next request.
                while self.receive(MsgFlags::MSG_DONTWAIT).is_ok() {}
                return Err(e);
            }
        }
        Ok(messages)
    }

    /// Sends a dump request and returns the whole list.
    pub fn dump(&mut self, kind: u16, fixed: &[u8]) -> Result<Vec<NetlinkMessage>> {
        self.list(&Request::new(kind, DUMP, fixed))
    }

    /// The same with attributes; the request has [`DUMP`] in its flags.
    pub fn list(&mut self, request: &Request) -> Result<Vec<NetlinkMessage>> {
        for _ in 0..DUMP_TRIES {
            if let Some(messages) = self.dump_once(request)? {
                return Ok(messages);
            }
        }
        Err(Errno::EAGAIN.into())
    }

    fn dump_once(&mut self, request: &Request) -> Result<Option<Vec<NetlinkMessage>>> {
        let prepared = Prepared::new(std::slice::from_ref(request));
        send(self.fd.as_raw_fd(), &prepared.bytes, MsgFlags::empty())?;
        let (mut done, mut torn, mut messages) = (false, false, Vec::new());
        while !done {
            let received = self.receive(MsgFlags::empty())?;
            split(&self.buffer[..received], |header, payload| {
                torn |= header.flags & DUMP_INTR != 0;
                match header.kind {
                    NLMSG_ERROR => outcome(header.flags, payload),
                    NLMSG_DONE => {
                        done = true;
                        outcome(0, payload)
                    }
                    _ => {
                        messages.push(NetlinkMessage { payload: payload.to_vec() });
                        Ok(())
                    }
                }
            })?;
        }
        Ok((!torn).then_some(messages))
    }

    fn receive(&mut self, flags: MsgFlags) -> Result<usize> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, flags | MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => continue,
                Ok(length) if length > self.buffer.len() => return Err(Errno::EMSGSIZE.into()),
                result => return Ok(result?),
            }
        }
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

struct Header {
    kind: u16,
    flags: u16,
}

fn split(mut bytes: &[u8], mut each: impl FnMut(&Header, &[u8]) -> Result<()>) -> Result<()> {
    while bytes.len() >= HEADER {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if length < HEADER || length > bytes.len() {
            return Err(Errno::EBADMSG.into());
        }
        let header = Header {
            kind: u16::from_ne_bytes([bytes[4], bytes[5]]),
            flags: u16::from_ne_bytes([bytes[6], bytes[7]]),
        };
        each(&header, &bytes[HEADER..length])?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(())
}

/// Reads `struct nlmsgerr` (or the number behind `NLMSG_DONE`) and the explanation behind it.
fn outcome(flags: u16, payload: &[u8]) -> Result<()> {
    let Some(code) = payload.get(..4) else { return Ok(()) };
    let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
    if code >= 0 {
        return Ok(());
    }
    let mut message = String::new();
    if flags & ACK_TLVS != 0 && flags & CAPPED != 0 {
        let told = Attributes::parse(payload.get(4 + HEADER..).unwrap_or_default());
        message = told.string(1).unwrap_or_default();
    }
    Err(NetlinkError { errno: Errno::from_raw(code.wrapping_neg()), message })
}

fn set_flag(fd: &impl AsFd, option: libc::c_int) -> nix::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` lives through the call and the length given is its own.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// A hardware address.
pub type Mac = [u8; 6];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    #[test]
    fn attributes_come_back_as_they_were_written() {
        let mut request = Request::new(7, 0, &[1, 2, 3]);
        request.string(1, "eth0").nest(2, |n| {
            n.be32(3, 9).attr(4, &[5]);
        });
        let parsed = Attributes::parse(&request.bytes[HEADER + 4..]);
        assert_eq!(parsed.string(1).as_deref(), Some("eth0"));
        assert_eq!(parsed.nest(2).be32(3), Some(9));
        assert_eq!(parsed.nest(2).get(4), Some(&[5][..]));
    }

    #[test]
    fn malformed_attributes_are_cut_off() {
        assert!(Attributes::parse(&[3, 0, 1, 0, 9]).get(1).is_none());
        assert!(Attributes::parse(&[200, 0, 1, 0, 9, 9]).get(1).is_none());
    }

    #[test]
    fn fuzz_netlink() {
        let mut request = Request::new(7, 0, &[1, 2, 3, 4]);
        request.string(1, "eth0").nest(2, |n| {
            n.be32(3, 9).nest(2, |n| {
                n.u32(1, 7).attr(4, &[5]);
            });
        });

        let mut sample = Prepared::new(&[request.clone(), request]).bytes;
        let mut error = vec![0; 52];
        error[..8].copy_from_slice(&[52, 0, 0, 0, 2, 0, 0, 3]);
        error[16..20].copy_from_slice(&(-1_i32).to_ne_bytes());
        error[36..44].copy_from_slice(&[12, 0, 1, 0, b'w', b'h', b'y', 0]);
        sample.extend(error);
        Target::new("netlink").sample(sample).run(|bytes| {
            let (mut result, mut seen) = (Ok(()), 0);
            split(bytes, |header, payload| {
                let message = NetlinkMessage { payload: payload.to_vec() };
                let a = message.attributes(4);
                let nest = a.nest(2);
                let _ = (nest.be32(3), nest.nest(2).u32(1), a.string(1));
                seen += 1 + a.iter().count();
                if header.kind == NLMSG_ERROR {
                    result = outcome(header.flags, payload);
                }
                Ok(())
            })?;

            result?;
            found(&[seen])
        });
    }
}
