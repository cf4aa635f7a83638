//! An established TCP connection taken down from one socket and built up in another: repair mode,
//! tcp(7), linux/tcp.h. The kernel's part of it is told in net/ipv4/tcp.c (`do_tcp_setsockopt`).
//!
//! Only connections with nothing in their queues, and with nothing about them that is not named here:
//! see [`plain`]. What differs from that is for CRIU.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrStorage, bind, connect};
use nix::unistd::{Uid, fchown};
use serde::{Deserialize, Serialize};

use super::socket::{TCP_REPAIR_OFF_NO_WP, enter_repair};

/// `TCP_ESTABLISHED` of net/tcp_states.h.
const ESTABLISHED: u8 = 1;
// linux/tcp.h; libc has them for some targets only.
const TCP_REPAIR_QUEUE: libc::c_int = 20;
const TCP_QUEUE_SEQ: libc::c_int = 21;
const TCP_REPAIR_OPTIONS: libc::c_int = 22;
const TCP_TIMESTAMP: libc::c_int = 24;
const TCP_REPAIR_WINDOW: libc::c_int = 29;
const TCP_ULP: libc::c_int = 31;
const RECEIVED: libc::c_int = 1;
const SENT: libc::c_int = 2;
// `tcpi_options`
const WITH_TIMESTAMPS: u8 = 1;
const WITH_SACK: u8 = 2;
const WITH_SCALES: u8 = 4;
// Options of a SYN, net/tcp.h.
const OPTION_MSS: u32 = 2;
const OPTION_SCALES: u32 = 3;
const OPTION_SACK: u32 = 4;
const OPTION_TIMESTAMPS: u32 = 8;
/// `SIOCOUTQ` of linux/sockios.h: bytes that are not confirmed. `SIOCINQ` is `FIONREAD`.
const OUTQ: libc::c_ulong = libc::TIOCOUTQ;
const SO_BUF_LOCK: libc::c_int = 72;
/// Room for the longest of [`OPTIONS`]: a `struct timeval`, the name of a congestion control.
const LONGEST: usize = 16;

/// Level and name of an option.
type OptionName = (libc::c_int, libc::c_int);

/// What goes along where it is not as in a fresh socket. Its place in this list is its number on the
/// wire: a change is one of the protocol.
const OPTIONS: &[OptionName] = &[
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    CONGESTION,
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    // After IP_TOS, which has one of its own.
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
];
/// The other host may lack it: then the connection goes on with what it has.
const CONGESTION: OptionName = (libc::IPPROTO_TCP, libc::TCP_CONGESTION);

/// The values that options have by themselves, and which these are: a socket has those of one protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionDefaults(Vec<(u8, OptionName, DefaultValue)>);

/// As long as the first number says; none where the socket has no such option.
type DefaultValue = (u8, [u8; LONGEST]);

/// A connection, taken down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Sequence number of the next byte to be sent, and of the next to come.
    sequence: (u32, u32),
    /// What was agreed upon in the beginning: `tcpi_options`, both scales, the longest segment.
    agreed: (u8, u8, u32),
    /// The clock that the peer knows, where it knows one.
    timestamp: u32,
    /// `struct tcp_repair_window`
    window: [u32; 5],
    buffers: Buffers,
    /// `TCP_WINDOW_CLAMP`: the window that it may ever offer.
    clamp: u32,
    /// `SO_REUSEADDR`. Repair mode has its own.
    pub reuse: bool,
    /// `O_NONBLOCK`
    nonblocking: bool,
    options: OptionChanges,
}

/// What [`plain`] has seen.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// `SO_REUSEADDR`. Repair mode has its own.
    pub reuse: bool,
    options: u8,
    scales: u8,
    nonblocking: bool,
}

/// A socket's number that no other has had since the host started. socket(7), `SO_COOKIE`.
///
/// # Errors
/// When it is no socket.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_COOKIE)
}

/// Tells whether this is a connection that can be taken down: established, with nothing in its queues, no
/// filter, no other protocol upon it, and nobody who wants a signal.
///
/// # Errors
/// When it is no TCP socket.
pub fn plain(socket: impl AsFd) -> io::Result<Option<Plain>> {
    let fd = socket.as_fd();
    // `struct tcp_info` up to the scales.
    let info: [u8; 8] = get(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    if info[0] != ESTABLISHED || waiting(fd, libc::FIONREAD)? != 0 || waiting(fd, OUTQ)? != 0 {
        return Ok(None);
    }

    let Some(flags) = is_ordinary(fd) else { return Ok(None) };
    let upon = value(fd, (libc::IPPROTO_TCP, TCP_ULP)).0 != 0;

    // It counts what it has sent for its program.
    let zerocopy = get::<libc::c_int>(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY)? != 0;
    if upon || zerocopy {
        return Ok(None);
    }

    // Half shut, with an urgent byte, with an error that nobody has been told.
    let said = PollFlags::POLLPRI | PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut poll_for = [PollFd::new(fd, said)];
    if poll(&mut poll_for, PollTimeout::ZERO)? != 0 {
        return Ok(None);
    }

    Ok(Some(Plain {
        reuse: get::<libc::c_int>(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)? != 0,
        options: info[5],
        scales: info[6],
        nonblocking: flags.nonblocking,
    }))
}

/// Returns what the options of a fresh socket are, here.
///
/// # Errors
/// When there can be none.
pub fn fresh_options(v6: bool) -> io::Result<OptionDefaults> {
    Ok(OptionDefaults::of(fresh(v6, libc::IPPROTO_TCP)?.as_fd()))
}

impl OptionDefaults {
    pub(super) fn of(fd: BorrowedFd) -> OptionDefaults {
        let all = OPTIONS.iter().zip(0..).map(|(name, number)| (number, *name));
        let all = all.map(|(number, name)| (number, name, value(fd, name)));
        OptionDefaults(all.filter(|(_, _, (length, _))| *length > 0).collect())
    }

    /// Returns those of a socket that are not as in this fresh one.
    pub(super) fn changed(&self, fd: BorrowedFd) -> OptionChanges {
        let options = self.0.iter().filter_map(|(number, name, fresh)| {
            let (length, bytes) = value(fd, *name);
            let own = (length, bytes) != *fresh && length > 0;
            own.then(|| (*number, bytes[..usize::from(length)].to_vec()))
        });
        options.collect()
    }
}

/// Options by their numbers, and their values.
pub(super) type OptionChanges = Vec<(u8, Vec<u8>)>;

pub(super) fn set_options(fd: BorrowedFd, changed: &OptionChanges) -> io::Result<()> {
    for (number, value) in changed {
        let option = OPTIONS.get(usize::from(*number)).copied();
        let (level, name) = option.ok_or(io::ErrorKind::InvalidData)?;
        let done = set_slice(fd, level, name, value);
        if (level, name) != CONGESTION {
            done?;
        }
    }
    Ok(())
}

/// `SO_SNDBUF`, `SO_RCVBUF`, and which of them the program has set.
pub(super) type Buffers = (u32, u32, u32);

pub(super) fn buffers(fd: BorrowedFd) -> io::Result<Buffers> {
    let size = |name| get::<u32>(fd, libc::SOL_SOCKET, name);
    Ok((size(libc::SO_SNDBUF)?, size(libc::SO_RCVBUF)?, size(SO_BUF_LOCK).unwrap_or(0)))
}

pub(super) fn set_buffers(fd: BorrowedFd, (send, receive, locked): Buffers) -> io::Result<()> {
    let mut changed = false;
    for (name, force, wanted) in [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, send),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, receive),
    ] {
        if get::<u32>(fd, libc::SOL_SOCKET, name)? < wanted || locked != 0 {
            // What is asked for is doubled. socket(7)
            set(fd, libc::SOL_SOCKET, force, &(wanted / 2))?;
            changed = true;
        }
    }
    if changed {
        // Unknown before Linux 5.14: they are not adapted any more then.
        let _ = set(fd, libc::SOL_SOCKET, SO_BUF_LOCK, &locked);
    }
    Ok(())
}

/// A socket that nobody wants a signal of, and that filters nothing.
pub(super) fn is_ordinary(fd: BorrowedFd) -> Option<Flags> {
    // SAFETY: these take and return numbers.
    let (flags, owner) = unsafe {
        let raw = fd.as_raw_fd();
        (libc::fcntl(raw, libc::F_GETFL), libc::fcntl(raw, libc::F_GETOWN))
    };
    // Of neither there is anything.
    let filter = length(fd, libc::SOL_SOCKET, libc::SO_GET_FILTER) != Some(0);
    let ordinary = flags >= 0 && flags & libc::O_ASYNC == 0 && owner == 0 && !filter;
    ordinary.then_some(Flags { nonblocking: flags & libc::O_NONBLOCK != 0 })
}

pub(super) struct Flags {
    pub(super) nonblocking: bool,
}

pub(super) fn set_nonblocking(fd: BorrowedFd) -> io::Result<()> {
    // SAFETY: it takes numbers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a connection down whose socket nobody uses. It stays as it is, in repair mode: silent, also
/// when it is closed.
///
/// # Errors
/// When it is not what [`plain`] has seen.
pub fn repair_dump(
    socket: impl AsFd,
    seen: Plain,
    fresh: &OptionDefaults,
) -> io::Result<Connection> {
    let fd = socket.as_fd();
    let (options, buffers) = (fresh.changed(fd), buffers(fd)?);
    enter_repair(fd)?;
    let tcp = |name| get::<u32>(fd, libc::IPPROTO_TCP, name);
    let next = |queue: libc::c_int| {
        set(fd, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue)?;
        tcp(TCP_QUEUE_SEQ)
    };

    Ok(Connection {
        sequence: (next(SENT)?, next(RECEIVED)?),
        agreed: (seen.options, seen.scales, tcp(libc::TCP_MAXSEG)?),
        timestamp: if seen.options & WITH_TIMESTAMPS != 0 { tcp(TCP_TIMESTAMP)? } else { 0 },
        window: get(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW)?,
        buffers,
        clamp: tcp(libc::TCP_WINDOW_CLAMP)?,
        reuse: seen.reuse,
        nonblocking: seen.nonblocking,
        options,
    })
}

/// A socket of this user, in repair mode, that will be a connection of this local address, in the
/// calling thread's network namespace. `early`: the address may come only later.
///
/// # Errors
/// When there can be none, or the address is not there.
pub fn prepare(local: SocketAddr, owner: u32, early: bool) -> io::Result<OwnedFd> {
    let socket = fresh(local.is_ipv6(), libc::IPPROTO_TCP)?;
    // Packet filters see it, too.
    fchown(&socket, Some(Uid::from_raw(owner)), None)?;
    enter_repair(&socket)?;
    if early {
        set(socket.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, &1)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(local))?;
    if early {
        set(socket.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, &0)?;
    }
    Ok(socket)
}

/// Makes a [prepared](prepare) socket the connection that was taken down. It stays in repair mode.
///
/// # Errors
/// When the kernel has such a connection already, has no way to `remote`, or does not know an option.
pub fn repair_restore(socket: impl AsFd, remote: SocketAddr, was: &Connection) -> io::Result<()> {
    let fd = socket.as_fd();
    let tcp = |name, value: u32| set(fd, libc::IPPROTO_TCP, name, &value);
    for (queue, next) in [(RECEIVED, was.sequence.1), (SENT, was.sequence.0)] {
        tcp(TCP_REPAIR_QUEUE, queue as u32)?;
        tcp(TCP_QUEUE_SEQ, next)?;
    }

    connect(fd.as_raw_fd(), &SockaddrStorage::from(remote))?;
    let (agreed, scales, mss) = was.agreed;

    // How they stand in `tcpi_snd_wscale` and `tcpi_rcv_wscale`.
    let scales = u32::from(scales & 15) | u32::from(scales >> 4) << 16;

    // `struct tcp_repair_opt`
    let mut options = vec![[OPTION_MSS, mss]];
    options.extend((agreed & WITH_SACK != 0).then_some([OPTION_SACK, 0]));
    options.extend((agreed & WITH_SCALES != 0).then_some([OPTION_SCALES, scales]));
    options.extend((agreed & WITH_TIMESTAMPS != 0).then_some([OPTION_TIMESTAMPS, 0]));
    set_slice(fd, libc::IPPROTO_TCP, TCP_REPAIR_OPTIONS, &options)?;
    if agreed & WITH_TIMESTAMPS != 0 {
        tcp(TCP_TIMESTAMP, was.timestamp)?;
    }

    set(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &was.window)?;
    set_options(fd, &was.options)?;
    set_buffers(fd, was.buffers)?;

    // Connecting has set it to what the buffers were then.
    tcp(libc::TCP_WINDOW_CLAMP, was.clamp)?;
    if was.nonblocking { set_nonblocking(fd) } else { Ok(()) }
}

/// Lets a connection live, without a word to its peer.
///
/// # Errors
/// When it is no TCP socket.
pub fn wake(socket: impl AsFd, reuse: bool) -> io::Result<()> {
    let fd = socket.as_fd();
    set(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, &TCP_REPAIR_OFF_NO_WP)?;
    // It has been reset by that.
    if reuse { set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &1) } else { Ok(()) }
}

pub(super) fn fresh(v6: bool, protocol: libc::c_int) -> io::Result<OwnedFd> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: no pointers; a non-negative result is a new descriptor that is ours alone.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn waiting(fd: BorrowedFd, what: libc::c_ulong) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write an int to where the pointer leads.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), what, &raw mut bytes) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Returns how long an option is whose contents are not of interest.
fn length(fd: BorrowedFd, level: libc::c_int, name: libc::c_int) -> Option<u32> {
    let mut nothing = 0u8;
    let mut length: libc::socklen_t = 0;
    let place = (&raw mut nothing).cast();
    // SAFETY: the kernel writes at most the length that is passed, which is none.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, place, &raw mut length) };
    (r >= 0).then_some(length)
}

pub(super) fn value(fd: BorrowedFd, (level, name): OptionName) -> DefaultValue {
    let mut bytes = [0; LONGEST];
    let mut length = LONGEST as libc::socklen_t;
    let place = bytes.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most as many bytes as the length says, which the array has.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, place, &raw mut length) };
    if r < 0 { (0, [0; LONGEST]) } else { (length.min(LONGEST as u32) as u8, bytes) }
}

/// Numbers that any bytes make, without padding.
pub(super) trait Plainly: Copy {
    const ZERO: Self;
}
impl Plainly for u8 {
    const ZERO: Self = 0;
}
impl Plainly for u32 {
    const ZERO: Self = 0;
}
impl Plainly for libc::c_int {
    const ZERO: Self = 0;
}
impl Plainly for u64 {
    const ZERO: Self = 0;
}
impl<const N: usize> Plainly for [u32; N] {
    const ZERO: Self = [0; N];
}
impl<const N: usize> Plainly for [u8; N] {
    const ZERO: Self = [0; N];
}

pub(super) fn get<T: Plainly>(
    fd: BorrowedFd,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<T> {
    let mut value = T::ZERO;
    let mut length = size_of::<T>() as libc::socklen_t;
    let place = (&raw mut value).cast();
    // SAFETY: the kernel writes at most as many bytes as the type has, and any are a value of it.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, place, &raw mut length) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

pub(super) fn set<T: Plainly>(
    fd: BorrowedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    set_slice(fd, level, name, std::slice::from_ref(value))
}

pub(super) fn set_slice<T: Plainly>(
    fd: BorrowedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &[T],
) -> io::Result<()> {
    let (place, length) = (value.as_ptr().cast(), size_of_val(value) as libc::socklen_t);
    // SAFETY: the kernel reads as many bytes as the length says, all of them initialised.
    let r = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, place, length) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use nix::sys::socket::MsgFlags;

    use super::super::netns::NetNs;
    use super::*;

    pub(crate) fn sample() -> Connection {
        Connection {
            sequence: (1, 2),
            agreed: (7, 7, 1460),
            timestamp: 5,
            window: [1, 2, 3, 4, 5],
            buffers: (1, 2, 0),
            clamp: 9,
            reuse: true,
            nonblocking: false,
            options: vec![(0, vec![1, 0, 0, 0]), (20, b"cubic".to_vec())],
        }
    }

    /// Moves one end of a connection into another socket, with its peer talking before and after.
    fn moved(at: &str, by: &str) {
        let listener = TcpListener::bind(at).unwrap();
        let mut client = TcpStream::connect(by).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        let local = server.local_addr().unwrap();
        let fresh = fresh_options(local.is_ipv6()).unwrap();
        server.set_nodelay(true).unwrap();
        set(server.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1).unwrap();
        set(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, &77).unwrap();

        set(server.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &50_000).unwrap();
        set(server.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &1).unwrap();
        client.write_all(b"early").unwrap();
        assert!(plain(&server).unwrap().is_none(), "something is in its queue");
        server.read_exact(&mut [0; 5]).unwrap();
        server.write_all(b"soon").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
        server.set_nonblocking(true).unwrap();

        let all = |socket: &TcpStream| -> Vec<DefaultValue> {
            OPTIONS.iter().map(|option| value(socket.as_fd(), *option)).collect()
        };

        // An urgent byte in the place of none.
        nix::sys::socket::send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        let mut urgent = [PollFd::new(server.as_fd(), PollFlags::POLLPRI)];
        poll(&mut urgent, PollTimeout::NONE).unwrap();
        assert!(plain(&server).unwrap().is_none(), "an urgent byte waits");
        nix::sys::socket::recv(server.as_raw_fd(), &mut [0], MsgFlags::MSG_OOB).unwrap();

        let clamp = |socket: &TcpStream| -> u32 {
            get(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP).unwrap()
        };
        let had = clamp(&server);
        let seen = plain(&server).unwrap().expect("it is plain");
        let (was, before) = (repair_dump(&server, seen, &fresh).unwrap(), all(&server));
        assert!(cookie(&server).unwrap() != cookie(&client).unwrap());

        // Silent, as it is in repair mode.
        drop(server);
        let again = prepare(local, 77, false).unwrap();
        repair_restore(&again, peer, &was).unwrap();
        wake(&again, was.reuse).unwrap();
        let mut server = TcpStream::from(again);
        assert_eq!(all(&server), before);
        assert_eq!(nix::sys::stat::fstat(&server).unwrap().st_uid, 77);
        assert_eq!(clamp(&server), had);

        let flag = |name| get::<u32>(server.as_fd(), libc::SOL_SOCKET, name).unwrap();
        assert_eq!((flag(libc::SO_RCVBUF), flag(libc::SO_REUSEADDR)), (100_000, 1));
        let would = server.read(&mut [0]).unwrap_err();
        assert_eq!(would.kind(), io::ErrorKind::WouldBlock);
        server.set_nonblocking(false).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();

        let mut big = vec![7; 300_000];
        std::thread::scope(|scope| {
            scope.spawn(|| client.write_all(&[7; 300_000]).unwrap());
            server.read_exact(&mut big).unwrap();
        });

        server.write_all(b"late").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
        assert!(big.iter().all(|b| *b == 7));
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);

        // Half of one.
        let half = TcpStream::connect(by).unwrap();
        half.shutdown(std::net::Shutdown::Read).unwrap();
        assert!(plain(&half).unwrap().is_none(), "it reads no more");
    }

    #[test]
    fn a_connection_goes_on_in_another_socket() {
        let Ok(space) = NetNs::fresh() else {
            eprintln!("skipped: this needs CAP_SYS_ADMIN");
            return;
        };
        space
            .run(|| {
                let up =
                    std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
                assert!(up.unwrap().success());
                moved("127.0.0.1:7000", "127.0.0.1:7000");
                moved("[::1]:7001", "[::1]:7001");
                // A peer of the old protocol at a socket of the new.
                moved("[::]:7002", "127.0.0.1:7002");
            })
            .unwrap();
    }
}
