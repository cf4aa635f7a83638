//! The protocol in memory, without root and without hosts: every message there and back, and a
//! receiver whose link is cut, damaged or made to say nonsense at every place.
//!
//! What a receiver may do is limited by whom it runs as: without root it refuses every plan, with
//! root it goes on to look for the bundle. Either way these trials end before anything is made.

use std::io::{Cursor, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry::connections::{ComingConnection, SocketKind};
use ferry::files::sockets::Renamed;
use ferry::files::walk::Size;
use ferry::memory::serve::Served;
use ferry::migration::protocol::forwarding::{AddressDecision, ForwardMessage};
use ferry::migration::protocol::{Hello, Message, PROTOCOL, Plan, Standing, Verdict, session};
use ferry::migration::{destination, protocol};
use ferry::oci::runtime::Runtime;
use ferry::problem::Advice;
use ferry::problem::Problem;
use ferry::sys::locks::{FileLock, LockKind};
use ferry::tasks::locks::HeldLock;
use ferry::tasks::settings::{Setting, SettingValue};
use ferry::tasks::sockets::{Group, SocketSettings};
use ferry::transport::connect::{Closer, Link};
use ferry::transport::frame;
use ferry::transport::frame::{Frame, PageRun, RunKind};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
const ID: &str = "00112233aabbccdd";

fn plan() -> Plan {
    serde_json::from_value(json!({
        "migration": ID, "check_only": true, "container": "box", "bundle": "/no/such/bundle",
        "config": {"ociVersion": "1.2.0"}, "root": null, "systemd_cgroup": false,
        "streams": [{
            "target": "/dev/null", "external": null, "size": 0, "mode": 0, "owner": [0, 0],
            "proof": null,
        }],
        "console_socket": null, "memory_bytes": 1 << 20, "resident_bytes": 1 << 20, "cpu": ["fpu"],
        "machine": std::env::consts::ARCH, "kernel": "5.11.0", "criu": 40_200, "probes": [],
        "tmpfs": [], "network": null, "loopback": null, "network_path": null, "placement": "auto",
    }))
    .expect("a plan of this version")
}

fn all_messages() -> Vec<Message> {
    let lock = FileLock { kind: LockKind::Posix, write: true, start: 124, end: None };
    let lock = HeldLock { vpid: 7, number: 3, lock };
    let problem = Problem::new("it is full", "no byte is free").hint("make room");
    let mut list = vec![
        Message::Hello(Hello { protocol: PROTOCOL, ferry: "1.0".into(), host: "elsewhere".into() }),
        Message::Plan(Box::new(plan())),
        Message::Accept {
            warnings: vec![problem.clone().warning()],
            shared: vec![0, 2],
            copies: vec![1],
            course: AddressDecision::Stays,
            engine: serde_json::from_value(
                json!({"image": {"copied": {"there": 2}}, "networks": ["lan"]}),
            )
            .expect("a course"),
        },
        Message::ImagePart { digest: "ab".repeat(32), bytes: 1 << 30 },
        Message::ImageSent,
        Message::ImageTaken,
        Message::Forward(Box::new(ForwardMessage::Carry {
            id: ID.into(),
            links: vec!["eth0".into()],
        })),
        Message::Forward(Box::new(ForwardMessage::Carried)),
        Message::Trees { sizes: vec![Size { bytes: 1 << 40, entries: 7 }] },
        Message::SpaceOk,
        Message::Applied { round: 3 },
        Message::Copied,
        Message::Refuse { problems: vec![problem] },
        Message::Prepare,
        Message::Papers(
            serde_json::from_value(json!({"config": {"id": "a"}, "spec": {}, "network": null}))
                .expect("an engine's words"),
        ),
        Message::Engage,
        Message::Prepared,
        Message::Connections {
            list: vec![ComingConnection {
                vpid: 1,
                number: 9,
                owner: 1000,
                local: "10.0.0.9:7000".parse().expect("an address"),
                kind: SocketKind::Connection(
                    "[::ffff:10.0.0.1]:40000".parse().expect("an address"),
                ),
            }],
        },
        Message::Awaited { lacking: vec![0, 9] },
        Message::Freezing,
        Message::Sockets {
            list: vec![SocketSettings {
                vpid: 1,
                number: 9,
                options: vec![(0, vec![1, 0, 0, 0])],
                interfaces: vec![(57, "eth0".into())],
                groups: vec![Group {
                    interface: "eth0".into(),
                    group: "239.1.2.3".parse().expect("an address"),
                    exclude: false,
                    sources: vec!["10.0.0.1".parse().expect("an address")],
                }],
            }],
        },
        Message::Dumped {
            tasks: vec![1, 7],
            connections: 3,
            locks: vec![lock],
            settings: vec![Setting { vpid: 1, vtid: 7, value: SettingValue::Cpus("0-3".into()) }],
            renamed: vec![Renamed { bound: b"/run/a".into(), current: b"/run/b".into() }],
        },
        Message::Echo { number: 3 },
        Message::MemoryDone { left: 7 },
        Message::Ready,
        Message::Commit,
        Message::Running(Box::default()),
        Message::MemoryComplete(Served::default()),
        Message::Resume { migration: ID.into() },
        Message::Missing { pages: 9 },
        Message::AcceptChannels,
        Message::Join { migration: ID.into() },
        Message::Joined,
        Message::Finished,
        Message::Abort { why: "it is \"broken\"\n".into() },
        Message::Failed { phase: "restoring".into(), why: "ä".into(), hints: vec!["ö".into()] },
    ];

    for verdict in [None, Some(Verdict::Commit), Some(Verdict::Abort)] {
        list.push(Message::Resolve { migration: ID.into(), verdict });
    }
    use Standing::{Gone, NeverRan, Partial, Running, Waiting};
    for standing in [Running, Waiting, Partial, Gone, NeverRan] {
        list.push(Message::Resolved { standing });
    }

    list
}

fn bytes(messages: &[Message]) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        protocol::send(&mut out, message).expect("a message that fits");
    }
    out
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null").into()
}

/// What a receiver answers, and how it ends. Fails when it does not.
fn receive(said: Vec<u8>, state_dir: &Path) -> (Vec<Message>, Result<(), String>) {
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);
    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic in a write").write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    let answer = Kept::default();
    let (writer, state) = (answer.clone(), state_dir.to_owned());
    let (tell, ended) = channel();
    std::thread::spawn(move || {
        let link = Link {
            reader: Box::new(Cursor::new(said)),
            writer: Box::new(writer),
            closer: Closer::Stdio(null(), null()),
        };
        let runtime = Runtime::new("/no/such/runtime".into(), None, false);
        let result = destination::receive(link, &runtime, &state);
        let _ = tell.send(result.map_err(|e| in_words(&e)));
    });

    let result = ended.recv_timeout(LIMIT).expect("a receiver ends when its link has ended");
    let bytes = answer.0.lock().expect("no panic in a write").clone();
    let mut rest = bytes.as_slice();
    let mut messages = Vec::new();
    while let Some(Frame::Control(json)) = frame::read(&mut rest).expect("whole frames") {
        messages.push(protocol::parse(&json).expect("messages of this version"));
    }

    (messages, result)
}

fn hello() -> Message {
    let (ferry, host) = (env!("CARGO_PKG_VERSION").into(), "another".into());
    Message::Hello(Hello { protocol: PROTOCOL, ferry, host })
}

fn nothing_made(state_dir: &Path) {
    let made: Vec<_> = std::fs::read_dir(state_dir).expect("a directory").collect();
    assert!(made.is_empty(), "{made:?}");
}

#[test]
fn every_message_is_read_as_it_was_written() {
    for message in all_messages() {
        let written = bytes(std::slice::from_ref(&message));
        let Some(Frame::Control(json)) = frame::read(&mut written.as_slice()).expect("a frame")
        else {
            panic!("no control frame: {message:?}")
        };
        let again = protocol::parse(&json).expect("a message");
        assert_eq!(format!("{again:?}"), format!("{message:?}"));
        assert_eq!(bytes(&[again]), written);
    }
}

#[test]
fn a_listener_tells_of_every_cut() {
    let messages = all_messages();
    let whole = bytes(&messages);
    let mut ends = vec![0];
    for i in 1..=messages.len() {
        ends.push(bytes(&messages[..i]).len());
    }

    // Around every end of a message, and inside each.
    let cuts = ends.iter().flat_map(|e| [e.saturating_sub(1), *e, e + 1, e + frame::HEADER]);
    for cut in cuts.filter(|c| *c <= whole.len()) {
        let (tell, heard) = channel();
        let reader: Box<dyn Read + Send> = Box::new(Cursor::new(whole[..cut].to_vec()));
        session::listen(reader, move |h| tell.send(h).is_ok()).expect("a thread");
        let mut count = 0;
        let why = loop {
            match heard.recv_timeout(LIMIT).expect("a listener says how it ends") {
                session::FromPeer::Message(_) => count += 1,
                session::FromPeer::Frame(f) => panic!("a frame nobody sent: {f:?}"),
                session::FromPeer::Gone(why) => break why,
            }
        };

        let before = ends.iter().filter(|e| **e != 0 && **e <= cut).count();
        assert_eq!(count, before, "cut at {cut}");
        assert_eq!(why.is_none(), ends.contains(&cut), "cut at {cut}: {why:?}");
    }
}

#[test]
fn a_receiver_whose_link_is_cut_anywhere_makes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut wanted = plan();
    wanted.check_only = false;
    let start = [hello(), Message::Plan(Box::new(wanted))];
    let whole = bytes(&start);
    let first = bytes(&start[..1]).len();
    let cuts = (0..whole.len()).step_by(37).chain([first - 1, first, first + 1, whole.len() - 1]);
    for cut in cuts {
        let (said, result) = receive(whole[..cut].to_vec(), dir.path());
        assert!(matches!(said[..], [Message::Hello(_)]), "cut at {cut}: {said:?}");
        assert!(result.is_err_and(|e| e.contains("the link")), "cut at {cut}");
        nothing_made(dir.path());
    }
}

#[test]
fn a_plan_for_what_is_not_here_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (said, result) = receive(bytes(&[hello(), Message::Plan(Box::new(plan()))]), dir.path());
    let [Message::Hello(_), Message::Refuse { problems }] = &said[..] else { panic!("{said:?}") };
    assert!(problems.iter().all(|p| !p.fatal || !p.hint.is_empty()), "{problems:?}");
    assert_eq!(result, Ok(()));
    nothing_made(dir.path());
}

#[test]
fn what_no_honest_source_sends_is_refused() {
    // As text: not all of it can be made of Ferry's own types.
    let stream = serde_json::to_value(&plan().streams[0]).expect("JSON");
    let changes = [
        ("a migration's ID", "migration", json!("../../etc")),
        ("a container's ID", "container", json!("../box")),
        ("a relative bundle", "bundle", json!("etc")),
        ("a path upwards", "network_path", json!("/run/netns/../../etc")),
        ("a relative root", "root", json!("run")),
        ("too many streams", "streams", json!([stream, stream, stream, stream])),
    ];

    let dir = tempfile::tempdir().expect("a directory");

    for (what, field, value) in changes {
        let mut message =
            serde_json::to_value(Message::Plan(Box::new(plan()))).expect("a message is JSON");
        *message.get_mut(field).expect("a field of the plan") = value;
        let mut sent = bytes(&[hello()]);
        frame::write_control(&mut sent, message.to_string().as_bytes()).expect("in memory");

        let (said, result) = receive(sent, dir.path());
        assert!(result.is_err(), "{what} was taken");
        let accepted = said.iter().any(|m| matches!(m, Message::Accept { .. }));
        assert!(!accepted, "{what}: {said:?}");
        nothing_made(dir.path());
    }
}

#[test]
fn a_message_out_of_its_order_ends_the_conversation() {
    let dir = tempfile::tempdir().expect("a directory");
    for message in all_messages() {
        // These begin a conversation; an echo is no part of one.
        if matches!(
            message,
            Message::Hello(_)
                | Message::Plan(_)
                | Message::Resolve { .. }
                | Message::Resume { .. }
                | Message::Join { .. }
                | Message::Echo { .. }
        ) || matches!(&message, Message::Forward(word) if matches!(**word, ForwardMessage::Carry { .. }))
        {
            continue;
        }
        let (said, result) = receive(bytes(&[hello(), message.clone()]), dir.path());
        assert!(matches!(said[..], [Message::Hello(_)]), "{message:?}: {said:?}");
        assert!(result.is_err(), "{message:?}");
        nothing_made(dir.path());
    }
}

/// Whoever does not say first which protocol he speaks is understood in none.
#[test]
fn a_source_that_does_not_greet_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    for message in all_messages() {
        if matches!(message, Message::Hello(_) | Message::Echo { .. }) {
            continue;
        }
        let (said, result) = receive(bytes(&[message.clone(), hello()]), dir.path());
        assert!(matches!(said[..], [Message::Hello(_)]), "{message:?}: {said:?}");
        assert!(result.is_err(), "{message:?}");
        nothing_made(dir.path());
    }
}

/// An error as its user is told it.
fn in_words(error: &anyhow::Error) -> String {
    let hints = error.downcast_ref().map_or(&[][..], |advice: &Advice| advice.hints());
    let hints = hints.iter().map(|hint| format!("; hint: {hint}"));
    format!("{error:#}{}", hints.collect::<String>())
}

#[test]
fn another_version_is_told_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let later = Hello { protocol: PROTOCOL + 1, ferry: "9.9.9".into(), host: String::new() };
    let (_, result) = receive(bytes(&[Message::Hello(later)]), dir.path());
    let why = result.expect_err("another version");
    assert!(why.contains("9.9.9") && why.contains("hint:"), "{why}");
    nothing_made(dir.path());
}

#[test]
fn what_is_no_protocol_ends_the_conversation() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut damaged = bytes(&[hello()]);
    *damaged.last_mut().expect("bytes") ^= 1;
    let mut unknown = Vec::new();
    frame::write_control(&mut unknown, br#"{"type":"teleport"}"#).expect("in memory");
    let mut pages = bytes(&[hello()]);
    frame::write_run(&mut pages, RunKind::Zero, PageRun { vpid: 1, start: 0x1000, pages: 1 })
        .expect("in memory");
    for (what, said) in [
        ("a greeting of a shell", b"Welcome to the machine!\n".to_vec()),
        ("a damaged frame", damaged),
        ("an unknown message", unknown),
        ("pages before a plan", pages),
    ] {
        let (_, result) = receive(said, dir.path());
        assert!(result.is_err(), "{what}");
        nothing_made(dir.path());
    }
}

#[test]
fn a_source_that_is_back_for_an_unknown_migration_is_told_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let migration = ID.to_owned();
    for back in [Message::Resume { migration: migration.clone() }, Message::Join { migration }] {
        let (said, result) = receive(bytes(&[hello(), back]), dir.path());
        let gone = matches!(said[..], [_, Message::Resolved { standing: Standing::Gone }]);
        assert!(gone && result.is_ok(), "{said:?}");
    }
    let nonsense = Message::Resume { migration: "../../etc/passwd".into() };
    assert!(receive(bytes(&[hello(), nonsense]), dir.path()).1.is_err());
    nothing_made(dir.path());
}

#[test]
fn a_question_about_an_unknown_migration_is_answered() {
    let dir = tempfile::tempdir().expect("a directory");
    for verdict in [None, Some(Verdict::Commit), Some(Verdict::Abort)] {
        let question = Message::Resolve { migration: ID.into(), verdict };
        let (said, result) = receive(bytes(&[hello(), question]), dir.path());
        let gone = matches!(said[..], [_, Message::Resolved { standing: Standing::Gone }]);
        assert!(gone, "{said:?}");
        assert_eq!(result, Ok(()));
    }
    for id in ["", "../x", "00112233AABBCCDDEE"] {
        let question = Message::Resolve { migration: id.into(), verdict: None };
        let (said, _) = receive(bytes(&[hello(), question]), dir.path());
        assert!(matches!(said[..], [_, Message::Failed { .. }]), "{id:?}: {said:?}");
    }
    nothing_made(dir.path());
}
