//! Every message and the picture of them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::*;
use crate::fuzz::Target;

/// One that is to be made.
fn engine_network() -> Value {
    serde_json::json!({
        "name": "lan", "driver": "macvlan", "subnets": ["10.0.0.0/24"],
        "definition": { "Ok": {
            "ranges": [{
                "subnet": "10.0.0.0/24", "gateway": "10.0.0.1",
                "given": { "between": ["10.0.0.7", "10.0.0.9"] }, "reserved": {},
            }],
            "ipv6": false, "internal": false, "interface": "eth0", "options": { "mtu": "1400" },
            "labels": { "a": "b" }, "servers": ["10.0.0.2"],
            "routes": [{ "to": "10.1.0.0/16", "gateway": "10.0.0.1", "metric": 7 }],
        } },
    })
}

/// One with some of everything.
fn plan() -> Value {
    let network = crate::network::image::tests::sample();
    let proof = serde_json::json!({ "file": ["n", "c"], "inode": [1, 2, 3, 4], "contents": null });
    let port = serde_json::json!({ "address": "", "port": 8080, "inside": 80, "protocol": "tcp" });

    serde_json::json!({
        "type": "plan", "migration": "00112233aabbccdd", "check_only": false, "container": "web",
        "source": "a", "bundle": "/b", "config": { "process": { "args": ["x"] }, "mounts": [] },
        "root": "/run/runc", "systemd_cgroup": false, "apparmor": ["docker-default"],
        "streams": [{
            "target": "/var/log/web.log", "external": "file[1:2]", "size": 5, "mode": 420,
            "owner": [0, 0], "proof": proof,
        }],
        "console_socket": null, "memory_bytes": 1, "resident_bytes": 1, "cpu": ["sse2"],
        "machine": "x86_64", "kernel": "6.12", "criu": 40201,
        "probes": [{
            "what": "root file system", "place": "rootfs", "proof": proof, "wish": "auto",
            "directory": true, "file": false, "read_only": false,
        }],
        "parents": [],
        "overlay": {
            "lower": [{ "path": "/l1", "data": false }],
            "upper": { "path": "/upper", "work": "/work" }, "options": [], "flags": [],
        },
        "tmpfs": [{ "place": "/dev/shm", "options": ["size=64k"], "used": 5 }],
        "network": network, "loopback": null, "network_path": "/run/netns/web",
        "placement": "auto",
        "engine": {
            "engine": "podman", "version": "5.8.6", "name": "web", "runtime": "ferry",
            "store": { "root": "/s", "run": "/r", "volumes": "/v", "driver": "overlay" },
            "image": { "id": "26f222b68e17a3d9ab22a8e5dc1d3f6b11f40ff5e6c1f25b235220e7963095f7",
                "name": "localhost/app:1" },
            "volumes": [{ "name": "data", "place": "/data", "labels": { "a": "b" } }],
            "networks": [engine_network()],
            "ports": [port],
            "own": ["/etc/hosts"], "log": 5,
        },
        "forward": {
            "wish": "auto", "from": ["00112233aabbccdd", "home"],
            "translated": { "flows": [], "published": true },
        },
    })
}

#[test]
fn fuzz_messages() {
    let mut target = Target::new("messages").sample(serde_json::to_vec(&plan()).unwrap());
    let others = [
        r#"{"type":"hello","protocol":6,"ferry":"0.1.0","host":"a"}"#,
        r#"{"type":"connections","list":[{"vpid":1,"number":5,"owner":0,"local":"10.0.0.1:80","kind":{"Connection":"10.0.0.2:7"}}]}"#,
        r#"{"type":"dumped","tasks":[1,2],"connections":1,"locks":[{"vpid":1,"number":5,"lock":{"kind":"posix","write":true,"start":0,"end":null}}],"settings":[],"renamed":[{"bound":[47,97],"current":[47,98]}]}"#,
        r#"{"type":"sockets","list":[{"vpid":1,"number":5,"options":[[1,[1,0,0,0]]],"interfaces":[[57,"eth0"]],"groups":[{"interface":"eth0","group":"239.1.2.3","exclude":true,"sources":["10.0.0.1"]}]}]}"#,
        r#"{"type":"layers","layers":[]}"#,
        r#"{"type":"trees","sizes":[{"bytes":1,"entries":1}]}"#,
        r#"{"type":"settle","migration":"00112233aabbccdd","verdict":"commit"}"#,
        r#"{"type":"forward","carry":{"id":"00112233aabbccdd","links":["eth0"]}}"#,
        r#"{"type":"running","pid":7,"marks":[["held",1.5]],"packets":1}"#,
        r#"{"type":"refuse","problems":[{"what":"a","why":"b","hint":"c","fatal":true}]}"#,
    ];

    for other in others {
        target = target.sample(other);
    }
    let words =
        [&b"\"type\":"[..], b"[[[[[[[[", b"{\"a\":", b"0,0,0,0,", b"null", b"/../", b"\\u0000"];
    target.words(&words).cost(4).run(|bytes| {
        let message = parse(bytes)?;
        if let Message::Plan(plan) = &message {
            plan.validate()?;
            assert!(plan.bundle.is_absolute() && plan.streams.len() <= 3);
            let _ = plan.criu_inside();
        }
        // What was understood can be said.
        serde_json::to_vec(&message)?;
        Ok(())
    });
}

/// The picture in the head has all that is said over a migration's own link.
#[test]
fn the_picture_has_every_message() {
    let text = include_str!("mod.rs");
    let (head, code) = text.split_once("pub mod forwarding;").unwrap();
    let (_, variants) = code.split_once("pub enum Message {").unwrap();
    let (variants, _) = variants.split_once("\n}").unwrap();
    let is_name = |word: &&str| word.starts_with(|c: char| c.is_ascii_uppercase());
    let known: BTreeSet<_> = variants
        .lines()
        .filter_map(|line| line.strip_prefix("    ").filter(is_name))
        .map(|line| line.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default())
        .collect();
    let mut drawn = BTreeSet::new();

    for line in head.lines().filter(|line| line.contains('▶') || line.contains('◀')) {
        let arrow = line.split(['▶', '◀']).find(|part| part.contains("──"));
        let words = arrow.unwrap_or_default().split([' ', '|', '─']).filter(is_name);
        drawn.extend(words);
    }

    assert!(drawn.is_subset(&known), "no messages: {:?}", drawn.difference(&known));
    let elsewhere = [
        // At any time.
        "Echo",
        "Abort",
        "Failed",
        "BandwidthProbe",
        // Over other links, or for them.
        "AcceptChannels",
        "Join",
        "Joined",
        "Resume",
        "Missing",
        "Resolve",
        "Resolved",
        "Forward",
    ];

    let absent: Vec<_> = known.difference(&drawn).filter(|m| !elsewhere.contains(m)).collect();
    assert!(absent.is_empty(), "not in the picture: {absent:?}");
}

#[test]
fn a_message_is_called_by_its_name() {
    assert_eq!(variant(&Message::Freezing), "Freezing");
    assert_eq!(variant(&Message::MemoryDone { left: 0 }), "MemoryDone");
    assert_eq!(
        variant(&Message::Failed { phase: "a".into(), why: "b".into(), hints: vec![] }),
        "Failed"
    );
}

#[test]
fn the_sample_is_valid() {
    let Message::Plan(plan) = parse(&serde_json::to_vec(&plan()).unwrap()).unwrap() else {
        panic!("no plan");
    };
    plan.validate().unwrap();
}
