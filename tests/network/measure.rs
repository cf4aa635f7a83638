//! How long the steps on the critical path take; prints and asserts nothing of time.

use std::time::{Duration, Instant};

use ferry::network::fence::FenceSide;
use ferry::network::{Announcer, Capture, Placement, Replay, capture, fence, recreate};

use crate::lab::{Attachment, Lab};

const TIMES: usize = 41;

fn told(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_micros();
    println!("{what:34} median {:6} µs   90 % {:6} µs   most {:6} µs", at(50), at(90), at(100));
}

fn timed<T>(times: &mut Vec<Duration>, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = f();
    times.push(start.elapsed());
    result
}

pub fn measure(name: &'static str, attachment: Attachment) {
    let lab = Lab::new(name, attachment);
    let (ns, host, other) = (lab.container("web"), lab.ns("a"), lab.ns("b"));
    let image = capture(&ns, &host).expect("a captured network");
    let mut t: [Vec<Duration>; 16] = std::array::from_fn(|_| Vec::new());
    for _ in 0..TIMES {
        let mut armed = timed(&mut t[0], || fence::arm(&ns)).expect("arm");
        timed(&mut t[1], || armed.close(FenceSide::New)).expect("close");
        timed(&mut t[2], || armed.close(FenceSide::Both)).expect("close");
        timed(&mut t[3], || armed.open()).expect("open");
        timed(&mut t[4], || fence::state(&ns)).expect("state");
        timed(&mut t[5], || armed.disarm()).expect("disarm");
        drop(timed(&mut t[6], || fence::raise(&ns)).expect("raise"));
        timed(&mut t[7], || fence::remove(&ns)).expect("remove");
        timed(&mut t[8], || capture(&ns, &host)).expect("capture");

        let mut kept = timed(&mut t[9], || Capture::prepare(&ns, &image)).expect("prepare");
        timed(&mut t[10], || kept.start()).expect("start");
        timed(&mut t[11], || drop(kept));
    }

    let path = lab.path("copy");
    for _ in 0..5 {
        let make = || recreate(&image, &Placement::Auto, &path, &other);
        let made = timed(&mut t[12], make).expect("recreate");
        timed(&mut t[13], || made.undo()).expect("undo");
    }

    let announcer = Announcer::prepare(&ns, &image).expect("announcer");
    for _ in 0..TIMES {
        timed(&mut t[14], || announcer.announce()).expect("announce");
    }
    let replay = Replay::prepare(&ns, &image).expect("replay");
    let mut kept = Capture::prepare(&ns, &image).expect("capture");
    kept.start().expect("start");

    let client = lab.ns("c");
    let send = || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.send_to(&[7; 1000], (crate::lab::IP4, 7))
    };

    client.run(send).expect("client").expect("send");
    let mut frames = Vec::new();
    crate::lab::wait_until("a frame", || kept.read(&mut frames).expect("read") > 0);
    for _ in 0..TIMES * 5 {
        timed(&mut t[15], || replay.inject(&frames[0])).expect("inject");
    }

    println!("\n{attachment:?}");
    let names = [
        "arm",
        "close what comes in",
        "close both",
        "open",
        "state",
        "disarm",
        "raise (create)",
        "remove by name",
        "capture the network",
        "frames: prepare",
        "frames: start",
        "frames: drop",
        "recreate",
        "undo",
        "announce (4 addresses' frames)",
        "inject 1 kB UDP",
    ];

    for (name, times) in names.into_iter().zip(t) {
        told(name, times);
    }
}
