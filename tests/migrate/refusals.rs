//! What cannot be is refused before anything is touched: exit code 3, words that tell how to mend
//! it, a container that has noticed nothing, and nothing left behind on either side.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, Lab};
use crate::common::probe::Probe;
use crate::common::process::{Output, until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("refusals::arguments", LIMIT, arguments),
        in_lab("refusals::engines", LIMIT, engines),
        in_lab("refusals::guests", LIMIT, guests),
        in_lab("refusals::multicast", LIMIT, multicast),
        in_lab("refusals::fifo_without_writer", LIMIT, fifo_without_writer),
        in_lab("refusals::answers_on_their_way", LIMIT, answers_on_their_way),
        in_lab("refusals::state_of_the_container", LIMIT, state_of_the_container),
        in_lab("refusals::unreachable", LIMIT, unreachable),
        in_lab("refusals::other_version", LIMIT, other_version),
        in_lab("refusals::same_host", LIMIT, same_host),
        in_lab("refusals::taken_there", LIMIT, taken_there),
        in_lab("refusals::bundle", LIMIT, bundle),
        in_lab("refusals::bind_mount", LIMIT, bind_mount),
        in_lab("refusals::no_room", LIMIT, no_room),
        in_lab("refusals::no_permission", LIMIT, no_permission),
        in_lab("refusals::host_network", LIMIT, host_network),
        in_lab("refusals::io_uring", LIMIT, io_uring),
        in_lab("refusals::linux_aio", LIMIT, linux_aio),
        in_lab("refusals::open_device", LIMIT, open_device),
        in_lab("refusals::lock_on_shared_storage", LIMIT, lock_on_shared_storage),
        in_lab("refusals::without_tun", LIMIT, without_tun),
        in_lab("refusals::packet_filter", LIMIT, packet_filter),
        in_lab("refusals::gone_away", LIMIT, gone_away),
        in_lab("refusals::conclusions", LIMIT, conclusions),
        in_lab("refusals::clients_notice_nothing", LIMIT, clients_notice_nothing),
    ]
}

/// A migration that must be refused, in these words.
fn refused(host: &Host, arguments: &[&str], words: &[&str]) -> Outcome {
    let mut all = vec!["migrate"];
    all.extend(arguments);
    let said = host.ferry(&all)?.exits(3).map_err(|e| format!("{arguments:?}: {e}"))?;
    says(&said, words)
}

fn says(said: &Output, words: &[&str]) -> Outcome {
    for word in words {
        ensure!(said.err.contains(word), "it does not say {word:?}: {said}");
    }
    Ok(())
}

/// A running container on `a`, with its process's number.
fn running(lab: &Lab, container: &Container) -> Outcome<i32> {
    let a = lab.host("a");
    container.start(lab, &a)?;
    Ok(facts(&a)?.containers[container.id].pid)
}

/// The very same process runs on `a`, and no trace of a migration is anywhere.
fn untouched(lab: &Lab, container: &Container, pid: i32) -> Outcome {
    let (a, b) = pair(lab);
    exactly_one_copy(container, &a, &b)?;
    let (here, there) = (facts(&a)?, facts(&b)?);
    ensure!(here.containers[container.id].pid == pid, "it is another process now");
    let begun: Vec<_> = here.migrations.iter().chain(&there.migrations).collect();
    ensure!(begun.is_empty(), "something had begun: {begun:?}");
    Ok(())
}

fn arguments(lab: &Lab) -> Outcome {
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    let a = lab.host("a");
    let wrong: &[&[&str]] = &[
        &["--no-such-flag", "box", "b"],
        &["box"],
        &["box", "b:22"],
        &["box", "tls://b:1"],
        &["--timeout", "soon", "box", "b"],
        &["../box", "b"],
        &["box", "-oProxyCommand=x"],
        &["--rsh", "'", "box", "b"],
    ];
    for arguments in wrong {
        let mut all = vec!["migrate"];
        all.extend(*arguments);
        a.ferry(&all)?.exits(2).map_err(|e| format!("{arguments:?}: {e}"))?;
    }
    untouched(lab, &container, pid)
}

fn state_of_the_container(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    refused(&a, &["box", "b"], &["there is no container box", "hint:", "runc list"])?;
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    a.sh("runc pause box")?;
    refused(&a, &["box", "b"], &["box is paused", "hint:", "runc resume box"])?;
    a.sh("runc resume box")?;
    untouched(lab, &container, pid)?;
    a.sh("runc kill box KILL; while [ -e /proc/$0 ]; do :; done"
        .replace("$0", &pid.to_string())
        .as_str())?;
    refused(&a, &["box", "b"], &["box is stopped", "hint:"])?;
    a.sh("runc delete box")?;
    ensure!(facts(&b)?.migrations.is_empty(), "b knows of it");
    Ok(())
}

fn unreachable(lab: &Lab) -> Outcome {
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    let a = lab.host("a");
    refused(&a, &["box", "nowhere"], &["nowhere", "hint:"])?;
    refused(
        &a,
        &["--remote-ferry", "/nowhere", "box", "b"],
        &["no /nowhere on b", "\n  hint: install ferry there", "--remote-ferry"],
    )?;
    refused(&a, &["--rsh", "/nowhere", "box", "b"], &["/nowhere"])?;
    refused(&a, &["--remote-ferry", "true", "box", "b"], &["b"])?;
    refused(&a, &["--remote-ferry", "echo", "box", "b"], &["not Ferry's protocol"])?;
    refused(&a, &["box", "unix:/nowhere.sock"], &["nothing listens on unix:/nowhere.sock"])?;
    untouched(lab, &container, pid)
}

fn other_version(lab: &Lab) -> Outcome {
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    let a = lab.host("a");
    // A receiver that says Hello in a later version, in a frame that is right.
    let hello = br#"{"type":"hello","protocol":99,"ferry":"9.9.9","host":"elsewhere"}"#;
    let mut frame = vec![1, 0, 0, 0];
    frame.extend((hello.len() as u32).to_le_bytes());
    frame.extend(xxhash_rust::xxh3::xxh3_64_with_seed(hello, 1).to_le_bytes());
    frame.extend(hello);
    std::fs::write(a.path("/srv/shared/hello")?, frame).map_err(|e| e.to_string())?;
    write_script(
        &a.path("/srv/shared/bin/later")?,
        "#!/bin/sh\ncat /srv/shared/hello; cat >/dev/null\n",
    )?;
    refused(
        &a,
        &["--remote-ferry", "/srv/shared/bin/later", "box", "b"],
        &["9.9.9", "protocol 99", "hint:", "same version"],
    )?;
    untouched(lab, &container, pid)
}

fn same_host(lab: &Lab) -> Outcome {
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    refused(&lab.host("a"), &["box", "a"], &["source and destination are the same host\n"])?;
    untouched(lab, &container, pid)
}

fn taken_there(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    let other = Container::plain("stdio").at("/srv/local/other");
    other.start(lab, &b)?;
    refused(&a, &["box", "b"], &["the ID box is taken", "hint:", "delete box"])?;
    ensure!(facts(&b)?.containers["box"].status == "running", "the other one suffered");
    b.sh("runc delete -f box")?;
    untouched(lab, &container, pid)
}

fn bundle(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter").at("/srv/local/box");
    let pid = running(lab, &container)?;
    let shared = ["--rootfs", "shared", "box", "b"];
    refused(&a, &shared, &["the bundle is missing", "hint:", "--bundle"])?;
    untouched(lab, &container, pid)?;
    container.make(&b)?;
    b.sh("rm -r /srv/local/box/rootfs")?;
    refused(&a, &shared, &["root file system is not shared"])?;
    container.clone().with(&["--env", "MORE=1"]).make(&b)?;
    refused(&a, &["box", "b"], &["config.json is not the same", "process", "hint:"])?;
    untouched(lab, &container, pid)
}

fn bind_mount(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    a.sh("mkdir -p /srv/local/data")?;
    b.sh("mkdir -p /srv/local/data")?;
    let container = Container::plain("counter").with(&["--bind", "/srv/local/data:/mnt"]);
    let pid = running(lab, &container)?;
    refused(&a, &["box", "b"], &["bind mount /mnt is not shared", "hint:"])?;
    b.sh("rmdir /srv/local/data")?;
    refused(&a, &["box", "b"], &["bind mount /mnt", "hint:"])?;
    untouched(lab, &container, pid)
}

fn no_room(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    b.sh("mkdir -p /var/lib/ferry && mount -t tmpfs -o size=64k tmpfs /var/lib")?;
    refused(&a, &["box", "b"], &["/var/lib is full", "hint:"])?;
    b.sh("umount /var/lib && mkdir -p /run/ferry && mount -t tmpfs -o size=64k tmpfs /run/ferry")?;
    // Only where images really go is it seen, and after that nothing may be left.
    let said = a.ferry(&["migrate", "box", "b"])?;
    ensure!(matches!(said.code, 1 | 3), "{said}");
    b.sh("umount /run/ferry")?;
    let there = b.exec(&["true"]).and_then(|_| facts(&b))?;
    ensure!(there.open().is_empty(), "left open: {there:?}");
    exactly_one_copy(&container, &a, &b)?;
    ensure!(facts(&a)?.containers["box"].pid == pid, "it is another process now");
    a.ferry(&["migrate", "box", "b"])?.exits(0).map(drop)
}

fn no_permission(lab: &Lab) -> Outcome {
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    let a = lab.host("a");
    let said = a
        .exec(&["setpriv", "--reuid", "65534", "--clear-groups", "ferry", "migrate", "box", "b"])?
        .exits(3)?;
    says(&said, &["Ferry needs root", "hint:"])?;
    untouched(lab, &container, pid)
}

fn host_network(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let container = Container::plain("counter").with(&["--host-network"]);
    container.start(lab, &a)?;
    let pid = facts(&a)?.containers["box"].pid;
    let words = ["host's network", "hint:", "--move-address ADDRESS", "ip netns add"];
    refused(&a, &["box", "b"], &words)?;
    untouched(lab, &container, pid)
}

/// Runs a container that inherits, as descriptor 3, what this Perl code opens as `$fd`.
pub fn running_with(lab: &Lab, container: &Container, open: &str) -> Outcome<i32> {
    let a = lab.host("a");
    container.make(&a)?;
    // 33 is dup2, which leaves nothing to be closed on exec.
    a.sh(&format!(
        "perl -e '
             {open}
             die \"$!\" if $fd < 0;
             sysopen(NULL, \"/dev/null\", 2);
             syscall(33, $fd + 0, 9);
             syscall(33, fileno(NULL), $_) for (0, 1, 2);
             syscall(33, 9, 3);
             exec qw(ferry run -d --preserve-fds 1 --bundle {} box)'",
        container.bundle
    ))?;
    let pid = facts(&a)?.containers[container.id].pid;
    let link = a.sh(&format!("readlink /proc/{pid}/fd/3"))?;
    ensure!(!link.is_empty(), "the descriptor has not come along");
    Ok(pid)
}

fn io_uring(lab: &Lab) -> Outcome {
    let container = Container::plain("stdio");
    let setup = "my $p = chr(0) x 120; my $fd = syscall(425, 4, $p);";
    let pid = running_with(lab, &container, setup)?;
    let process = format!("process {pid} (stdio-ticker)");
    let words = ["uses io_uring", "CRIU cannot carry", &process, "hint:", "`migratable = true`"];
    refused(&lab.host("a"), &["box", "b"], &words)?;
    let said = lab.host("a").ferry(&["check", "box"])?.exits(3)?;
    says(&said, &words)?;
    untouched(lab, &container, pid)
}

/// Requests cannot be carried; a ring through which nothing was asked for can.
fn linux_aio(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter").with(&["--arg", "--aio", "--arg", "used"]);
    let pid = running(lab, &container)?;
    let process = format!("process {pid} (counter-server)");
    let words = ["uses Linux AIO", "neither be seen nor carried", &process, "hint:"];
    refused(&a, &["box", "b"], &words)?;
    untouched(lab, &container, pid)?;
    let mut idle = Container::plain("counter").at("/srv/shared/idle");
    idle.id = "idle";
    idle.with(&["--arg", "--aio", "--arg", "idle"]).start(lab, &a)?;
    for (from, to) in [(&a, "b"), (&b, "a")] {
        from.ferry(&["migrate", "idle", to])?.exits(0)?;
    }
    Ok(())
}

fn open_device(lab: &Lab) -> Outcome {
    let container = Container::plain("stdio");
    let open = "sysopen(TUN, \"/dev/net/tun\", 2); my $fd = fileno(TUN);";
    let pid = running_with(lab, &container, open)?;
    let words = ["the device /dev/net/tun open", "(stdio-ticker)", "10:200", "hint:"];
    refused(&lab.host("a"), &["box", "b"], &words)?;
    untouched(lab, &container, pid)
}

/// The other host could not have it as long as it is held here.
fn lock_on_shared_storage(lab: &Lab) -> Outcome {
    let container = Container::plain("counter").with(&["--arg", "--files", "--arg", "/data"]);
    let pid = running(lab, &container)?;
    let process = format!("process {pid} (counter-server)");
    let words = ["holds a lock on /data/", "which both hosts see", &process, "hint:"];
    refused(&lab.host("a"), &["box", "b"], &words)?;
    let said = lab.host("a").ferry(&["check", "box", "b"])?.exits(3)?;
    says(&said, &words)?;
    untouched(lab, &container, pid)
}

/// Processes that are no descendants of the container's first one, and one that is looked at too closely.
fn guests(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let container = Container::plain("stdio");
    let pid = running(lab, &container)?;
    a.sh("ferry exec -d --pid-file /tmp/guest box /stdio-ticker </dev/null >/dev/null 2>&1")?;
    let guest = a.sh("cat /tmp/guest")?;
    let process = format!("process {} (stdio-ticker)", guest.trim());
    refused(&a, &["box", "b"], &["has not started itself", &process, "`exec`", "hint:"])?;
    a.sh(&format!("kill -KILL {guest}; while [ -e /proc/{guest} ]; do :; done"))?;
    let mut tracer = a.start(&["strace", "-o", "/dev/null", "-p", &pid.to_string()])?;
    until("it is traced", LIMIT, || {
        let status = a.sh(&format!("grep TracerPid /proc/{pid}/status"))?;
        Ok((status.split_whitespace().last() != Some("0")).then_some(()))
    })?;
    refused(&a, &["box", "b"], &["is being traced", "(strace)", "hint:"])?;
    ensure!(!tracer.has_ended(), "the tracer is gone");
    drop(tracer);
    until("nobody traces it", LIMIT, || {
        let status = a.sh(&format!("grep TracerPid /proc/{pid}/status"))?;
        Ok((status.split_whitespace().last() == Some("0")).then_some(()))
    })?;
    a.ferry(&["check", "box"])?.exits(0)?;
    untouched(lab, &container, pid)
}

const JOIN: &str = r#"
import signal, socket
member = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
request = socket.inet_aton("239.9.9.9") + socket.inet_aton("127.0.0.1")
member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
signal.pause()
"#;

fn multicast(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let container = Container::networked("counter");
    let pid = running(lab, &container)?;
    a.ferry(&["check", "box"])?.exits(0)?;
    let mut member = a.start(&["ip", "netns", "exec", "box", "python3", "-c", JOIN])?;
    let joined = "ip netns exec box grep -q 090909EF /proc/net/igmp";
    until(
        "it is a member",
        LIMIT,
        || Ok((a.exec(&["sh", "-c", joined])?.code == 0).then_some(())),
    )?;
    refused(&a, &["box", "b"], &["in the container's network: 239.9.9.9", "hint:"])?;
    ensure!(!member.has_ended(), "the member is gone");
    drop(member);
    untouched(lab, &container, pid)
}

fn fifo_without_writer(lab: &Lab) -> Outcome {
    let container = Container::plain("stdio");
    // O_RDONLY | O_NONBLOCK
    let open =
        "system(\"mkfifo /tmp/fifo\"); sysopen(FIFO, \"/tmp/fifo\", 2048); my $fd = fileno(FIFO);";
    let pid = running_with(lab, &container, open)?;
    let words = ["nobody writes to the FIFO /tmp/fifo", "(stdio-ticker)", "hint:"];
    refused(&lab.host("a"), &["box", "b"], &words)?;
    untouched(lab, &container, pid)
}

/// A server in the container's network that has closed a connection with most of an answer to send.
const SERVE: &str = r#"
import socket, sys
listener = socket.create_server((sys.argv[1], 7999))
print("listens", flush=True)
peer = listener.accept()[0]
peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
peer.sendall(bytes(1 << 20))
peer.close()
listener.close()
print("closed", flush=True)
"#;

/// Its client, which takes its time.
const TAKE_SLOWLY: &str = r#"
import os, socket, sys, time
peer = socket.socket()
peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
peer.connect((sys.argv[1], 7999))
while not os.path.exists("/srv/shared/take"):
    time.sleep(0.02)
total = 0
while some := peer.recv(1 << 16):
    total += len(some)
open("/srv/shared/took", "w").write(str(total))
"#;

/// What the container has closed is waited for: the client gets all of its answer.
fn answers_on_their_way(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    running(lab, &container)?;
    let address = lab.address(ADDRESS);
    let enter = ["ip", "netns", "exec", "box", "python3", "-c", SERVE, &address];
    let _server = a.start(&enter)?;
    let listens = "ip netns exec box grep -q ':1F3F 0*:0000 0A' /proc/net/tcp";
    until("it listens", LIMIT, || Ok((a.exec(&["sh", "-c", listens])?.code == 0).then_some(())))?;

    let _client = lab.host("client").start(&["python3", "-c", TAKE_SLOWLY, &address])?;
    // FIN_WAIT1, and nobody's.
    let closed = "ip netns exec box grep -q ':1F3F [0-9A-F:]* 04' /proc/net/tcp";
    until("it is closed", LIMIT, || Ok((a.exec(&["sh", "-c", closed])?.code == 0).then_some(())))?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(1)?;
    says(&said, &["answers are still on their way, on 1 closed connections", "hint:"])?;
    exactly_one_copy(&container, &a, &b)?;

    let moving = a.start(&["ferry", "migrate", "box", "b"])?;
    a.sh("touch /srv/shared/take")?;
    let took = until("the client has all", LIMIT, || {
        let took = a.exec(&["cat", "/srv/shared/took"])?.out;
        Ok((!took.is_empty()).then_some(took))
    })?;
    ensure!(took == (1 << 20).to_string(), "the client has {took} bytes");

    moving.end(LIMIT)?.exits(0).map(drop)
}

/// What the destination's kernel or `/dev` lacks is found before the freeze, and only where it
/// is needed.
fn without_tun(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    let pid = running(lab, &container)?;
    b.sh("mv /dev/net/tun /dev/net/other")?;
    refused(&a, &["box", "b"], &["b: /dev/net/tun cannot be used", "hint:", "tun"])?;
    untouched(lab, &container, pid)?;
    let said = b.ferry(&["check"])?.exits(0)?;
    says(&said, &["warning: b: no container with an address", "/dev/net/tun"])?;
    b.sh("mv /dev/net/other /dev/net/tun")?;
    a.ferry(&["migrate", "box", "b"])?.exits(0).map(drop)
}

fn packet_filter(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let container = Container::networked("counter");
    let pid = running(lab, &container)?;
    a.sh("ip netns exec box nft add table inet mine
         ip netns exec box nft add chain inet mine in")?;
    a.ferry(&["check", "box"])?.exits(0)?;
    a.sh("ip netns exec box nft add rule inet mine in counter")?;
    let words = ["packet filter rules", "tables mine", "hint:", "ip netns exec box nft"];
    refused(&a, &["box", "b"], &words)?;
    untouched(lab, &container, pid)
}

/// Whoever asks for a container that has left is told where it is.
fn gone_away(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    running(lab, &Container::plain("counter"))?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    let words = ["box is not here any more", "it was migrated to b at 20", "hint:"];
    refused(&a, &["box", "b"], &words)?;
    // Both hosts remember when, and each the other's name.
    for (host, way) in [(&a, " to b "), (&b, " from a ")] {
        let said = host.ferry(&["migrations", "box"])?.ok()?;
        ensure!(said.contains(way) && said.matches("Z ").count() == 2, "{said}");
        let said = host.ferry(&["migrations", "nobody"])?.exits(1)?;
        says(&said, &["no migration of a container nobody", "hint:"])?;
    }
    Ok(())
}

/// What is possible is said too, once, on standard output.
fn conclusions(lab: &Lab) -> Outcome {
    let container = Container::plain("counter");
    let pid = running(lab, &container)?;
    let a = lab.host("a");
    let concludes = |arguments: &[&str], line: &str| {
        let said = a.ferry(arguments)?.ok()?;
        ensure!(said.starts_with(line) && said.lines().count() == 1, "{arguments:?}: {said:?}");
        Ok(())
    };

    concludes(&["check"], "a can send and receive containers: Linux ")?;
    concludes(&["check", "box"], "box can go, ")?;
    concludes(&["check", "box", "b"], "box can go to b\n")?;
    let said = a.ferry(&["migrate", "--dry-run", "box", "b"])?.ok()?;
    let told = ["root file system: is there\n", "\nmemory: 6", "\nthe link carries "];
    ensure!(told.iter().all(|words| said.contains(words)), "{said}");
    ensure!(said.ends_with("\nbox can go to b\n"), "{said}");
    for arguments in
        [&["check", "--json", "box", "b"][..], &["migrate", "--dry-run", "--json", "box", "b"]]
    {
        let said = a.ferry(arguments)?.ok()?;
        let last = said.lines().last().unwrap_or_default();
        let event: serde_json::Value = serde_json::from_str(last).map_err(|e| e.to_string())?;
        ensure!(event["result"] == "checked", "{said}");
    }

    let said = a.ferry(&["--debug", "check", "box", "b"])?.exits(0)?;
    says(&said, &["ferry: debug: ", "CRIU 4.", "started \"ssh\"", "ferry on b: debug: "])?;
    let arguments = ["--debug", "--log", "/tmp/check.log", "--log-format", "json", "check", "box"];
    let said = a.ferry(&arguments)?.exits(0)?;
    ensure!(!said.err.contains("debug"), "{said}");
    let log = a.sh("cat /tmp/check.log")?;
    ensure!(log.contains("{\"level\":\"debug\",\"msg\":\"the runtime is"), "{log}");

    untouched(lab, &container, pid)
}

/// A refusal by the destination comes after most of the looking: not even that is to be felt.
fn clients_notice_nothing(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    let pid = running(lab, &container)?;
    let other = Container::plain("stdio").at("/srv/local/other");
    other.start(lab, &b)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    probe.mark("migrate")?;
    refused(&a, &["box", "b"], &["the ID box is taken"])?;
    let refusal = probe.worst_pause("migrate")?;
    probe.is_content()?;
    // Against the same stretch of time with a migration in it.
    b.sh("runc delete -f box")?;
    untouched(lab, &container, pid)?;
    probe.mark("moved")?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    probe.answers_again()?;
    let moved = probe.worst_pause("moved")?;
    let unnoticed = refusal < moved;
    ensure!(unnoticed, "a refusal pauses for {refusal} ms, a migration for {moved} ms");
    probe.is_content()
}

/// What an engine owns is named and left alone: by what podman 5.8, docker 28 and containerd 2.1 write
/// into a bundle or lay it at, and by names that the runtime does not know.
fn engines(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.make(&a)?;
    let config = a.path(&container.bundle)?.join("config.json");
    let text = std::fs::read(&config).map_err(|e| e.to_string())?;
    let mut json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    json["annotations"] = serde_json::json!({"io.container.manager": "libpod"});
    std::fs::write(&config, json.to_string()).map_err(|e| e.to_string())?;
    container.run_on(&a)?;

    let pid = facts(&a)?.containers[container.id].pid;
    let words = &["box is podman's container, and podman does not tell of it", "hint:"];
    refused(&a, &["box", "b"], words)?;
    refused(&a, &["--dry-run", "box", "b"], words)?;
    for arguments in [&["check", "box"][..], &["check", "box", "b"]] {
        says(&a.ferry(arguments)?.exits(3)?, words)?;
    }

    untouched(lab, &container, pid)?;

    // Not by the runtime's ID.
    let id = "465b65bd374bd919fb3d179886b21f24971792df130c9d7b71df53f73dbf104c";
    a.sh(&format!(
        "mkdir -p /var/lib/containers/storage/overlay-containers /run/containerd/runc/moby/{id}
         echo '[{{\"id\":\"{id}\",\"names\":[\"web\"]}}]' \
            >/var/lib/containers/storage/overlay-containers/containers.json"
    ))?;

    let words = &["465b65bd374b is podman's container web", "does not run", "hint:"];
    refused(&a, &["web", "b"], words)?;
    a.sh("rm /var/lib/containers/storage/overlay-containers/containers.json")?;
    let words = &["465b65bd374b is docker's container", "does not run", "hint:"];
    refused(&a, &["465b65", "b"], words)?;

    refused(&b, &["web", "a"], &["there is no container web", "hint:", "runc list"])
}
