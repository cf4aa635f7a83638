//! What waits unread in the container's UDP sockets is there afterwards, once, wherever it runs then.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{ADDRESS, Container, READY};
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
        in_lab("datagrams::multicast_and_options", LIMIT, multicast_and_options),
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

/// Is a member of two groups, of one by IPv6, and has set what it can of a socket for datagrams, a listening one
/// and both ends of a connection. Each datagram is answered with where it went to and all of that.
const MEMBER: &str = r#"
use Socket qw(:all);
my $self = inet_aton($ENV{SELF});
my @set;
sub set {
    my ($socket, $level, $name, $value) = @_;
    setsockopt($socket, $level, $name, $value) or die "$level $name: $!";
    push @set, [$socket, $level, $name];
}
sub said { join " ", map { unpack("H*", getsockopt($_->[0], $_->[1], $_->[2]) // "none") } @set }
my $on = pack("i", 1);

socket(my $udp, AF_INET6, SOCK_DGRAM, 17) or die;
bind($udp, pack_sockaddr_in6(7000, inet_pton(AF_INET6, "::"))) or die;
setsockopt($udp, 0, 35, inet_aton("239.1.2.3") . $self) or die "join: $!";
setsockopt($udp, 0, 39, inet_aton("232.1.2.3") . $self . inet_aton($ENV{PEER})) or die "source: $!";
my $index = do { open(my $f, "<", "/sys/class/net/box0/ifindex") or die; int(<$f>) };
setsockopt($udp, 41, 20, inet_pton(AF_INET6, "ff15::7") . pack("i", $index)) or die "join6: $!";
set($udp, 41, 17, pack("i", $index));
set($udp, 41, 18, pack("i", 9));
set($udp, 0, $_, $on) for 8, 11, 12, 13, 49;
set($udp, 1, $_, $on) for 29, 40;
set($udp, 17, 104, $on);
set($udp, 0, 10, pack("i", 0));

socket(my $door, AF_INET, SOCK_STREAM, 6) or die;
setsockopt($door, SOL_SOCKET, SO_REUSEADDR, $on);
bind($door, pack_sockaddr_in(7001, $self)) or die;
listen($door, 8) or die;
set($door, 6, 18, pack("i", 12345));
set($door, 6, 13, "reno");
set($door, 6, 23, pack("i", 5));
socket(my $one, AF_INET, SOCK_STREAM, 6) or die;
connect($one, pack_sockaddr_in(7001, $self)) or die;
accept(my $other, $door) or die;
# It would be waited for.
set($door, 6, 9, pack("i", 7));
for my $socket ($one, $other) {
    set($socket, 6, 13, "reno");
    set($socket, 6, 7, pack("i", 3));
    set($socket, 6, 18, pack("i", 54321));
    set($socket, 6, 25, pack("i", 4096));
    set($socket, 1, 47, pack("i", 100000000));
    set($socket, 0, 11, $on);
}
"#;

const ANSWER_ALL: &str = r#"
while (1) {
    my $from = recv($udp, my $text, 1000, 0) // next;
    syswrite($one, "x");
    sysread($other, my $one_byte, 1) == 1 or die;
    send($udp, "$text: " . said(), 0, $from);
}
"#;

/// One datagram to each group, until it is answered; the answers.
const CALL: &str = r#"
import socket, sys
own, v6 = sys.argv[1:]
index = socket.if_nametoindex("eth0")
for group in ("239.1.2.3", "232.1.2.3", "ff15::7"):
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    s = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET:
        s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
    else:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        s.bind((v6, 0))
    s.settimeout(0.5)
    for _ in range(20):
        s.sendto(group.encode(), (group, 7000))
        try:
            print(s.recv(4000).decode())
            break
        except TimeoutError:
            pass
    else:
        sys.exit("nobody answers for " + group)
"#;

/// Sockets are members of the same groups over there, and have the same options.
fn multicast_and_options(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let client = lab.host("client");
    let own = client.sh("getent ahostsv4 client | head -n 1 | cut -d ' ' -f 1")?.trim().to_owned();
    let (itself, peer) = (format!("SELF={}", lab.address(ADDRESS)), format!("PEER={own}"));
    let program = format!("{MEMBER} {READY} {ANSWER_ALL}");
    let options = ["--arg", &program, "--env", &itself, "--env", &peer];
    let container = Container::networked("script").with(&options);
    container.make(&a)?;
    container.make_network(lab, &a)?;

    let v6_address = v6(lab, ADDRESS);
    a.sh(&format!("ip -n box addr add {v6_address}/64 dev box0 nodad"))?;
    container.run_on(&a)?;
    let v6_of_client =
        client.sh("getent ahostsv6 client6 | head -n 1 | cut -d ' ' -f 1")?.trim().to_owned();
    let ask = || -> Outcome<String> {
        let call = ["python3", "-c", CALL, &own, &v6_of_client];
        Ok(client.start(&call)?.end(LONG)?.exits(0)?.out)
    };

    let before = ask()?;
    ensure!(!before.contains("none"), "{before}");

    a.start(&["env", "FERRY_FAULT=source.commit:error", "ferry", "migrate", "box", "b"])?
        .end(LONG)?
        .exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    ensure!(ask()? == before, "after the rollback: {}, before: {before}", ask()?);
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.ferry(&["check", "box", to.name])?.exits(0)?;
        let said = from.ferry(&["migrate", "--json", "box", to.name])?.exits(0)?;
        ensure!(!said.out.contains("option of a socket"), "{said}");
        exactly_one_copy(&container, to, from)?;
        let after = ask()?;
        ensure!(after == before, "on {}: {after}, before: {before}", to.name);
    }

    Ok(())
}
