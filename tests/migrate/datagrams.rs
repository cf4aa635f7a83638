//! What waits unread in the container's UDP sockets is there afterwards, once, wherever it runs then.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Talk;
use crate::common::process::until;
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};
use crate::networks::v6;

const LIMIT: Duration = Duration::from_secs(60);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("datagrams::unread", LIMIT, unread),
        in_lab("datagrams::more_than_there_is_room_for", LIMIT, more_than_there_is_room_for),
    ]
}

const PORT: u16 = 7007;
/// Few enough for a socket's 208 KiB, of which each takes 768 bytes, with those that come meanwhile.
const BURST: u64 = 100;
/// The first question of each client has been answered before the server is stopped.
const ASKED: u64 = 1 + BURST;

/// Some times what a socket takes that nobody has asked for more of it.
const FLOOD: u64 = 2000;

/// A client of the server's, which asks nothing but a first question unless it is told to.
fn ask(lab: &Lab, address: &str) -> Outcome<Talk> {
    let to = format!("{address}:{PORT}");
    let program = "/srv/shared/bin/ferry-datagrams";
    let mut client =
        Talk::start(&lab.host("client"), &[program, "ask", "--to", &to, "--every", "1h"])?;
    client.expect("ready")?;
    Ok(client)
}

/// How many bytes wait in the server's socket, by the kernel's count.
fn waits(host: &Host) -> Outcome<u64> {
    let list = host.sh("ip netns exec box ss -Huan 'sport = :7007'")?;
    let bytes = list.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok());
    bytes.ok_or_else(|| format!("no socket in {list:?}"))
}

/// A server that does not read, as it is stopped: given up, and taken to the other host and back, by
/// both families through one socket. When it goes on, each question is answered, and once.
fn unread(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let listen = format!("--listen=[::]:{PORT}");
    let container = Container::networked("echo").with(&["--arg", &listen]);
    container.make(&a)?;
    container.make_network(lab, &a)?;
    let v6 = v6(lab, ADDRESS);
    a.sh(&format!("ip -n box addr add {v6}/64 dev box0 nodad"))?;
    container.run_on(&a)?;

    let mut clients = [ask(lab, &lab.address(ADDRESS))?, ask(lab, &format!("[{v6}]"))?];
    a.sh("runc kill box STOP")?;
    for client in &mut clients {
        client.say(&format!("burst {BURST}"))?;
        client.expect("burst")?;
    }
    let before = waits(&a)?;
    ensure!(before > 0, "nothing waits");

    let failed =
        a.start(&["env", "FERRY_FAULT=source.commit:error", "ferry", "migrate", "box", "b"]);
    failed?.end(LONG)?.exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    ensure!(waits(&a)? == before, "{before} bytes waited, after a rollback {}", waits(&a)?);
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        // As long as nobody reads, nobody is told that it would be of no use.
        for client in &mut clients {
            client.say("report")?;
            let report = client.expect("sent")?;
            ensure!(report["unanswered"] == BURST && report["refused"] == 0, "{report}");
        }
    }
    a.sh("runc kill box CONT")?;
    for client in &mut clients {
        client.say("finish")?;
        let report = client.expect("sent")?;
        ensure!(
            report["sent"].as_u64() >= Some(ASKED)
                && ["unanswered", "twice", "wrong", "refused"].iter().all(|key| report[*key] == 0),
            "{report}"
        );
        println!("    {report}");
    }
    Ok(())
}

/// The limit of what waits in the server's socket, and how many datagrams were dropped for it.
fn limit(host: &Host) -> Outcome<(u64, u64)> {
    let list = host.sh("ip netns exec box ss -Huanm 'sport = :7007'")?;
    let memory = list.split_once("skmem:(").and_then(|(_, rest)| rest.split_once(')'));
    let number = |name: &str| -> Option<u64> {
        let mut words = memory?.0.split(',');
        words.find_map(|word| word.strip_prefix(name)?.parse().ok())
    };
    number("rb").zip(number("d")).ok_or_else(|| format!("no socket in {list:?}"))
}

/// In one freeze there comes more than the server's socket has room for, and the server does not read
/// it, as it is stopped: given up, and gone over with as much again. Then it goes on, and goes home with
/// as much while it reads. Each question is answered, and once; and the socket has the room that it had.
fn more_than_there_is_room_for(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("echo");
    container.start(lab, &a)?;
    let mut client = ask(lab, &lab.address(ADDRESS))?;
    let before = limit(&a)?;
    let mut sent = 1;
    let mut go = |from: &Host, to: &Host, more: &str, code: i32| -> Outcome {
        let fault = format!("FERRY_FAULT=dump.fenced:hold{more}");
        let migrating = from.start(&["env", &fault, "ferry", "migrate", "box", to.name])?;
        let held = from.path("/run/ferry-fault/dump.fenced")?;
        until("it is frozen", SHORT, || Ok(held.exists().then_some(())))?;
        client.say(&format!("burst {FLOOD}"))?;
        client.expect("burst")?;
        sent += FLOOD;
        std::fs::remove_file(&held).map_err(|e| format!("{}: {e}", held.display()))?;
        let ended = migrating.end(LONG)?.exits(code)?;
        let (here, there) = if code == 0 { (to, from) } else { (from, to) };
        exactly_one_copy(&container, here, there)?;
        let after = limit(here)?;
        ensure!(after == before, "limit and drops: {before:?}, then {after:?}\n{ended}");
        Ok(())
    };
    a.sh("runc kill box STOP")?;
    go(&a, &b, ",source.commit:error", 1)?;
    go(&a, &b, "", 0)?;
    b.sh("runc kill box CONT")?;
    go(&b, &a, "", 0)?;
    client.say("finish")?;
    let report = client.expect("sent")?;
    ensure!(
        report["sent"].as_u64() >= Some(sent)
            && ["unanswered", "twice", "wrong", "refused"].iter().all(|key| report[*key] == 0),
        "{report}"
    );
    println!("    {report}");
    Ok(())
}
