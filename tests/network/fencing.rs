//! The fence, and the frames that are kept behind it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use ferry::network::fence::{FenceSide, FenceState};
use ferry::network::{Capture, EthernetFrame, Placement, Replay, capture, fence, recreate};
use ferry::sys::netns::NetNs;
use ferry::sys::packet::PacketSocket;

use crate::lab::{Attachment, IP4, IP6, Lab, MAC, PATIENCE, connect, wait_until};

/// Names a namespace to fence; then this is not a test but the process that dies.
pub const RAISE_AND_EXIT: &str = "FERRY_TEST_RAISE_AND_EXIT";
/// Long enough for a kernel to answer, were it to.
const SILENCE: Duration = Duration::from_millis(300);
const ETH_P_ALL: u16 = 3;

pub fn raise_and_exit(path: &str) {
    let ns = NetNs::open(path.as_ref()).expect("a namespace");
    let _fence = fence::raise(&ns).expect("a fence");
    std::process::exit(0);
}

/// Frames from the container that reach the switch, by EtherType.
struct Witness(PacketSocket);

impl Witness {
    fn new(lab: &Lab) -> Self {
        let socket = lab.ns("sw").run(PacketSocket::open).expect("switch").expect("a socket");
        socket.listen(ETH_P_ALL, 0).expect("listening");
        Self(socket)
    }

    fn saw(&self) -> Vec<u16> {
        let mac: Vec<u8> =
            MAC.split(':').map(|b| u8::from_str_radix(b, 16).expect("hex")).collect();
        let (mut seen, mut buffer) = (Vec::new(), [0; 2048]);
        while let Some((length, _)) = self.0.receive(&mut buffer).expect("receive") {
            if length >= 14 && buffer[6..12] == mac {
                seen.push(u16::from_be_bytes([buffer[12], buffer[13]]));
            }
        }
        seen
    }
}

fn address(ip: &str) -> IpAddr {
    ip.parse().expect("an address")
}

/// Knocks at the container's door in all the ways that make a kernel answer, and from inside.
fn knock(lab: &Lab, inside: &NetNs) {
    let client = lab.ns("c");
    // Without an entry: ARP and neighbour solicitation. With one: a SYN, an echo request.
    for known in [false, true] {
        for ip in [IP4, IP6] {
            let state = if known { "permanent" } else { "failed" };
            let mac = if known { format!("lladdr {MAC}") } else { String::new() };
            lab.at("c", &format!("neigh replace {ip} {mac} dev eth0 nud {state}"));
            let to = SocketAddr::new(address(ip), 9);
            let wait = Duration::from_millis(100);
            let _ = client.run(|| TcpStream::connect_timeout(&to, wait)).expect("client");
        }
    }
    let out = inside.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.send_to(b"x", "10.77.0.103:9")
    });
    // EPERM is as good as silence.
    let _ = out.expect("container");
    thread::sleep(SILENCE);
}

pub fn silent(name: &'static str, attachment: Attachment) {
    let lab = Lab::new(name, attachment);
    let source = lab.container("web");
    let image = capture(&source, &lab.ns("a")).expect("a captured network");
    // The source must not answer in the copy's place.
    lab.at("web", "link del eth0");
    let witness = Witness::new(&lab);
    let path = lab.path("copy");
    let mut made = recreate(&image, &Placement::Auto, &path, &lab.ns("b")).expect("made");
    knock(&lab, made.namespace());
    assert_eq!(witness.saw(), Vec::<u16>::new(), "nothing leaves from the first moment on");

    made.fence().expect("a fence").open().expect("open");
    knock(&lab, made.namespace());
    let seen = witness.saw();
    for kind in [0x0806, 0x0800, 0x86dd] {
        assert!(seen.contains(&kind), "with the fence open {kind:#06x} is seen");
    }
    made.fence().expect("a fence").close(FenceSide::Both).expect("close");
    witness.saw();
    knock(&lab, made.namespace());
    assert_eq!(witness.saw(), Vec::<u16>::new(), "closed again");
}

/// On kernels without the egress hook.
pub fn without_egress() {
    let lab = Lab::new("weg", Attachment::Bridge);
    let ns = lab.container("web");
    let witness = Witness::new(&lab);
    let mut armed = fence::raise_without_egress(&ns).expect("a fence");
    assert_eq!(fence::is_raised(&ns), Ok(true));
    witness.saw();
    knock(&lab, &ns);
    assert_eq!(witness.saw(), Vec::<u16>::new());
    drop(connect(&ns, &ns, address("127.0.0.1")));
    armed.open().expect("open");
    knock(&lab, &ns);
    assert!(witness.saw().contains(&0x0806));
    fence::remove(&ns).expect("removed by name");
    assert_eq!(fence::state(&ns), Ok(FenceState::Absent));
}

pub fn outlives() {
    let lab = Lab::new("outl", Attachment::Macvlan);
    let ns = lab.container("web");
    assert_eq!(fence::state(&ns), Ok(FenceState::Absent));
    let status = Command::new(std::env::current_exe().expect("this program"))
        .env(RAISE_AND_EXIT, lab.path("web"))
        .status();
    assert!(status.expect("a process").success());
    assert_eq!(fence::state(&ns), Ok(FenceState::Closed));
    drop(fence::raise(&ns).expect("raised twice"));
    drop(fence::raise(&ns).expect("raised twice"));
    assert_eq!(fence::is_raised(&ns), Ok(true));
    fence::remove(&ns).expect("removed by name");
    fence::remove(&ns).expect("removed twice");
    assert_eq!(fence::state(&ns), Ok(FenceState::Absent));
    // Flipping a fence that somebody has removed must not succeed in silence.
    let mut armed = fence::arm(&ns).expect("armed");
    fence::remove(&ns).expect("removed");
    armed.close(FenceSide::Both).expect_err("it is gone");
    armed.disarm().expect("it is gone");
}

pub fn new_only() {
    let lab = Lab::new("side", Attachment::Bridge);
    let ns = lab.container("web");
    let client = lab.ns("c");
    let (mut server, mut near) = connect(&ns, &client, address(IP4));
    let door = ns.run(|| TcpListener::bind((address(IP4), 0))).expect("namespace").expect("bind");
    let to = door.local_addr().expect("an address");
    let knock =
        |patience| client.run(|| TcpStream::connect_timeout(&to, patience)).expect("client");
    knock(PATIENCE).expect("nothing is in the way of a new one");

    let mut armed = fence::arm(&ns).expect("armed");
    armed.close(FenceSide::New).expect("closed for new ones");
    let kept_out = knock(SILENCE).expect_err("a new one gets no answer");
    assert_eq!(kept_out.kind(), ErrorKind::TimedOut, "{kept_out}");
    server.write_all(b"on its way").expect("write");
    let mut got = [0; 10];
    near.read_exact(&mut got).expect("what leaves arrives");
    assert_eq!(&got, b"on its way");
    near.write_all(b"and back").expect("write");

    let mut got = [0; 8];
    server.read_exact(&mut got).expect("what is established goes on, both ways");
    assert_eq!(&got, b"and back");
    armed.open().expect("open");
    knock(PATIENCE).expect("a new one comes in again");
    armed.disarm().expect("disarmed");
    assert_eq!(fence::state(&ns), Ok(FenceState::Absent));
}

/// Reads until `enough` says so; waits for frames.
fn keep(capture: &mut Capture, enough: impl Fn(&[EthernetFrame]) -> bool) -> Vec<EthernetFrame> {
    let mut frames = Vec::new();
    wait_until("frames to be kept", || {
        capture.read(&mut frames).expect("read");
        enough(&frames)
    });
    frames
}

pub fn replay(name: &'static str, attachment: Attachment) {
    let lab = Lab::new(name, attachment);
    let (ns, client) = (lab.container("web"), lab.ns("c"));
    let image = capture(&ns, &lab.ns("a")).expect("a captured network");

    // Strict reverse-path filtering, on which a frame from another device would founder.
    let strict = |f: &str| std::fs::write(format!("/proc/sys/net/ipv4/conf/{f}/rp_filter"), "1");
    ns.run(|| strict("all").and(strict("eth0"))).expect("namespace").expect("rp_filter");
    let links = lab.json("web", "link show");

    // Otherwise a slow machine could resend by itself.
    lab.at("c", &format!("route add {IP4}/32 dev eth0 rto_min 8s"));
    lab.at("c", &format!("-6 route add {IP6}/128 dev eth0 rto_min 8s"));
    let replay = Replay::prepare(&ns, &image).expect("a replay");
    for ip in [IP4, IP6].map(address) {
        let (mut server, mut near) = connect(&ns, &client, ip);
        let listener = ns.run(|| UdpSocket::bind((ip, 7000))).expect("namespace").expect("bind");
        listener.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut armed = fence::arm(&ns).expect("armed");
        let mut kept = Capture::prepare(&ns, &image).expect("a capture");
        let before = lab.counter("c", "Tcp", "RetransSegs");

        kept.start().expect("started");
        armed.close(FenceSide::Both).expect("closed");
        near.write_all(b"in the dark").expect("write");
        let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sent = client.run(|| UdpSocket::bind(any)?.send_to(b"datagram", (ip, 7000)));
        sent.expect("client").expect("send");

        let frames = keep(&mut kept, |f| f.len() >= 2);
        server.set_nonblocking(true).expect("nonblocking");
        assert!(server.read(&mut [0; 64]).is_err(), "the fence holds");
        server.set_nonblocking(false).expect("blocking");
        assert_eq!(kept.lost().expect("a count"), 0);
        armed.open().expect("open");
        for frame in &frames {
            let wire = serde_json::to_string(frame).expect("JSON");
            replay.inject(&serde_json::from_str(&wire).expect("a frame")).expect("inject");
        }

        let mut got = [0; 11];
        server.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"in the dark");
        let mut got = [0; 64];
        assert_eq!(listener.recv(&mut got).expect("recv"), 8);
        server.write_all(b"answer").expect("write");

        let mut got = [0; 6];
        near.read_exact(&mut got).expect("the answer leaves by the real link");
        let after = lab.counter("c", "Tcp", "RetransSegs");
        assert_eq!(after, before, "nobody had to send anything twice");
        armed.disarm().expect("disarmed");
    }

    drop(replay);
    wait_until("the replay's device to be gone", || lab.json("web", "link show") == links);
}

/// How many bytes of a TCP stream the frames hold in one piece, counting what was sent twice once.
fn stretch(frames: &[EthernetFrame]) -> usize {
    let ends = |f: &EthernetFrame| {
        let header = if f.bytes[12..14] == [0x86, 0xdd] { 40 } else { 20 };
        let tcp = &f.bytes[14 + header..];
        let first = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let length = tcp.len() - usize::from(tcp[12] >> 4) * 4;
        (first, first.wrapping_add(length as u32))
    };

    let is_tcp = |f: &&EthernetFrame| match f.bytes[12..14] {
        [0x08, 0x00] => f.bytes[14 + 9] == libc::IPPROTO_TCP as u8,
        _ => f.bytes[14 + 6] == libc::IPPROTO_TCP as u8,
    };
    let Some((start, _)) = frames.iter().find(is_tcp).map(ends) else { return 0 };

    // Counted from the first byte, as sequence numbers come round.
    let from_start = |f: &EthernetFrame| {
        let (first, last) = ends(f);
        (first.wrapping_sub(start), last.wrapping_sub(start))
    };

    let mut pieces: Vec<(u32, u32)> = frames.iter().filter(is_tcp).map(from_start).collect();
    pieces.sort_unstable();

    let whole =
        |end: u32, &(first, last): &(u32, u32)| if first <= end { end.max(last) } else { end };
    pieces.iter().fold(0, whole) as usize
}

/// Waits until everything that was written has been acknowledged: none of it is sent again later.
fn await_acknowledged(stream: &TcpStream) {
    nix::ioctl_read_bad!(unacknowledged, libc::TIOCOUTQ, libc::c_int);
    wait_until("everything to be acknowledged", || {
        let mut left = 0;
        // SAFETY: tcp(7): SIOCOUTQ, the same number, writes one int.
        unsafe { unacknowledged(stream.as_raw_fd(), &mut left) }.expect("SIOCOUTQ");
        left == 0
    });
}

/// Merged segments and unfinished checksums must come out byte for byte.
pub fn large_segments(name: &'static str, attachment: Attachment) {
    const CHUNK: usize = 64 << 10;
    const WARM: usize = 64;
    const DARK: usize = 8;
    let lab = Lab::new(name, attachment);
    let (ns, client) = (lab.container("web"), lab.ns("c"));

    // Otherwise a client that a slow machine made wait would begin the dark with ten segments.
    let idle = "/proc/sys/net/ipv4/tcp_slow_start_after_idle";
    client
        .run(|| std::fs::write(idle, "0"))
        .expect("namespace")
        .expect("tcp_slow_start_after_idle");
    let image = capture(&ns, &lab.ns("a")).expect("a captured network");

    let replay = Replay::prepare(&ns, &image).expect("a replay");
    let mut armed = fence::arm(&ns).expect("armed");
    let mut dark_client = fence::arm(&client).expect("armed");
    let data: Vec<u8> = (0..CHUNK * (WARM + DARK)).map(|i| ((i / 7) ^ (i >> 11)) as u8).collect();

    for ip in [IP4, IP6].map(address) {
        let (mut server, mut near) = connect(&ns, &client, ip);
        let mut got = vec![0; data.len()];
        let (light, dark) = data.split_at(CHUNK * WARM);

        // Opens the congestion window, so that the client sends much at once in the dark.
        thread::scope(|scope| {
            scope.spawn(|| near.write_all(light).expect("write"));
            server.read_exact(&mut got[..light.len()]).expect("read");
        });

        // Its last bytes, sent again in the dark, would be counted for new ones.
        await_acknowledged(&near);
        let mut kept = Capture::prepare(&ns, &image).expect("a capture");
        kept.start().expect("started");
        armed.close(FenceSide::Both).expect("closed");
        thread::scope(|scope| {
            // What the link carries besides: a listener report of a host's, for one.
            let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let sent = client.run(|| UdpSocket::bind(any)?.send_to(b"in between", (ip, 7000)));
            sent.expect("client").expect("send");
            scope.spawn(|| near.write_all(dark).expect("write"));

            // How much fits into the congestion window depends on what was lost before.
            let merged = |f: &EthernetFrame| f.bytes.len() > 4000;
            let mut frames = keep(&mut kept, |f| f.iter().any(merged));

            // From now on the client can neither send nor hear: what arrives has been replayed.
            dark_client.close(FenceSide::Both).expect("closed");
            kept.read(&mut frames).expect("read");
            armed.open().expect("open");
            for frame in &frames {
                replay.inject(frame).expect("inject");
            }

            let (_, rest) = got.split_at_mut(light.len());
            // On a busy machine some of them are there twice: sent again by the client's timer.
            let replayed = stretch(&frames).min(rest.len());
            let (replayed, rest) = rest.split_at_mut(replayed);
            server.read_exact(replayed).expect("read what was replayed");
            dark_client.open().expect("open");
            server.read_exact(rest).expect("read the rest");
        });
        assert!(got == data, "every byte is right");
    }
}

pub fn bad_frames() {
    let lab = Lab::new("bdf", Attachment::Macvlan);
    let ns = lab.container("web");
    let image = capture(&ns, &lab.ns("a")).expect("a captured network");
    let replay = Replay::prepare(&ns, &image).expect("a replay");
    let frame = |link, length| EthernetFrame { link, vnet_hdr: [0; 10], bytes: vec![0; length] };
    for bad in [frame(1, 0), frame(1, 14), frame(1, 70_000), frame(9, 60), frame(0, 60)] {
        replay.inject(&bad).expect_err(&format!("{bad:?}"));
    }
    // Offsets beyond the frame: the kernel refuses, and lives.
    let mut bad = frame(1, 60);
    bad.vnet_hdr = [1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    replay.inject(&bad).expect_err("offsets beyond the frame");
}
