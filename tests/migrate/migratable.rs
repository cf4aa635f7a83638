//! Containers that are made migratable: what would be refused is denied to them from the beginning, and
//! they go.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{ADDRESS, Container, READY};
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, LONG, Lab};
use crate::common::process::{Running, until};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![in_lab("migratable::io_uring", LIMIT, io_uring), in_lab("migratable::mptcp", LIMIT, mptcp)]
}

const CONFIGURE: &str = "mkdir -p /etc/ferry && echo 'migratable = true' >/etc/ferry/config.toml";

/// What the container's program has found.
fn found(host: &Host, container: &Container) -> Outcome<String> {
    host.sh(&format!("cat {}/rootfs/ready", container.bundle))
}

fn discard(host: &Host) -> Outcome {
    host.sh("ferry delete -f box").map(drop)
}

/// Refused, and what is named as the cure.
fn refused(host: &Host, words: &[&str]) -> Outcome {
    let said = host.ferry(&["migrate", "box", "b"])?.exits(3)?;
    for word in words.iter().chain(&["hint:", "`migratable = true`", "org.ferry.migratable"]) {
        ensure!(said.err.contains(word), "it does not say {word:?}: {said}");
    }
    Ok(())
}

/// There and back.
fn goes(lab: &Lab, container: &Container) -> Outcome {
    let (a, b) = pair(lab);
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    exactly_one_copy(container, &a, &b)
}

/// Makes a ring, and does without where there is none.
fn io_uring(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let program = format!(
        "my $p = chr(0) x 120; my $ring = syscall(425, 4, $p); my $said = $ring < 0 ? $! + 0 : 'ring'; \
         {READY} sleep 1 while 1;"
    );
    let container = Container::script(&program);
    container.start(lab, &a)?;
    ensure!(found(&a, &container)? == "ring", "there is no io_uring on this machine");
    refused(&a, &["uses io_uring"])?;

    discard(&a)?;

    // Of everything on this host, by the settings.
    a.sh(&format!("{CONFIGURE}; rm {}/rootfs/ready", container.bundle))?;
    container.run_on(&a)?;
    ensure!(found(&a, &container)? == "38", "it is not denied: {}", found(&a, &container)?);
    goes(lab, &container)?;
    discard(&a)?;

    // The same bundle needs no second change; and the other host's, made later, none at all.
    let inode = "stat -c %i:%Y /srv/shared/box/config.json";
    let before = a.sh(inode)?;
    a.sh("rm /srv/shared/box/rootfs/ready")?;
    container.run_on(&a)?;
    ensure!(a.sh(inode)? == before, "it was changed again");

    discard(&a)
}

/// As Go's servers do: Multipath TCP where the kernel has it, else TCP, watched by an epoll, at its
/// edges. It answers with what it gets.
const SERVE: &str = r#"
use Socket;
my ($said, $door) = ("mptcp");
socket($door, AF_INET, SOCK_STREAM, 262) or do {
    $said = $! + 0;
    socket($door, AF_INET, SOCK_STREAM, 6) or die;
};
setsockopt($door, SOL_SOCKET, SO_REUSEADDR, 1);
bind($door, sockaddr_in(7000, INADDR_ANY)) or die;
listen($door, 8) or die;
$door->blocking(0);
my $epoll = syscall(291, 0);
my $event = pack("L<Q<", 1 | 1 << 31, 7);
syscall(233, $epoll, 1, fileno($door), $event) == 0 or die;
my %peers;
"#;

const ANSWER: &str = r"
while (1) {
    my $events = chr(0) x 120;
    my $n = syscall(232, $epoll, $events, 10, -1);
    for my $at (0 .. $n - 1) {
        my ($what, $who) = unpack('L<Q<', substr($events, 12 * $at, 12));
        if ($who == 7) {
            while (accept(my $peer, $door)) {
                my $number = fileno($peer);
                $peers{$number} = $peer;
                my $event = pack('L<Q<', 1, 1000 + $number);
                syscall(233, $epoll, 1, $number, $event);
            }
        } else {
            my $peer = $peers{$who - 1000};
            if (sysread($peer, my $text, 100)) { syswrite($peer, $text); }
            else { delete $peers{$who - 1000}; }
        }
    }
}
";

/// A client on one connection, until it is told to end; then it says how many answers it has had.
const ASK: &str = r#"
import os, socket, sys, time
peer = socket.create_connection((sys.argv[1], 7000), 20)
count = 0
mine = "/srv/shared/guest" + sys.argv[2]
while not os.path.exists(mine + ".enough"):
    word = b"%d" % count
    peer.sendall(word)
    if peer.recv(100) != word:
        sys.exit("wrong")
    count += 1
    open(mine + ".new", "w").write(str(count))
    os.rename(mine + ".new", mine)
    time.sleep(0.01)
"#;

/// One of those.
struct Guest<'a> {
    number: usize,
    host: &'a Host,
    client: Running,
}

impl<'a> Guest<'a> {
    /// `host`: any that sees what all share.
    fn start(host: &'a Host, client: &Host, lab: &Lab, number: usize) -> Outcome<Guest<'a>> {
        let (address, own) = (lab.address(ADDRESS), number.to_string());
        let client = client.start(&["python3", "-c", ASK, &address, &own])?;
        Ok(Guest { number, host, client })
    }

    fn count(&self) -> Outcome<u64> {
        let text = self.host.exec(&["cat", &format!("/srv/shared/guest{}", self.number)])?.out;
        Ok(text.trim().parse().unwrap_or(0))
    }

    fn is_served(&self) -> Outcome {
        let before = self.count()?;
        until("it is answered", LIMIT, || Ok((self.count()? > before + 5).then_some(())))
    }

    fn ends(self) -> Outcome {
        self.is_served()?;
        let file = format!("/srv/shared/guest{}", self.number);
        self.host.sh(&format!("touch {file}.enough"))?;
        self.client.end(LIMIT)?.exits(0)?;
        self.host.sh(&format!("rm {file} {file}.enough")).map(drop)
    }
}

/// A server that listens for Multipath TCP goes along, and listens for it there; its guests of plain TCP do
/// not notice, and new ones are served. Given up, it is as it was. A connection of Multipath TCP is refused,
/// and those that are made migratable do without.
fn mptcp(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let program = format!("{SERVE} {READY} {ANSWER}");
    let container = Container::networked("script").with(&["--arg", &program]);
    container.start(lab, &a)?;
    ensure!(found(&a, &container)? == "mptcp", "there is no MPTCP on this machine");
    let client = lab.host("client");
    let guest = Guest::start(&a, &client, lab, 0)?;
    guest.is_served()?;

    let listens = |host: &Host| -> Outcome {
        let said = host.sh("ip netns exec box ss -HlnM")?;
        ensure!(said.contains(":7000"), "on {} nothing listens for MPTCP: {said}", host.name);
        guest.is_served()?;
        Guest::start(&a, &client, lab, 1)?.ends()
    };

    for at in ["extract.taken:error", "source.commit:error"] {
        let fault = format!("FERRY_FAULT={at}");
        a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?.end(LONG)?.exits(1)?;
        exactly_one_copy(&container, &a, &b)?;
        listens(&a).map_err(|e| format!("after {at}: {e}"))?;
    }

    for (from, to) in [(&a, &b), (&b, &a)] {
        from.ferry(&["check", "box", to.name])?.exits(0)?;
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        listens(to)?;
    }

    guest.ends()?;

    let other = "import socket, sys, time
peer = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
peer.connect((sys.argv[1], 7000))
peer.sendall(b'x')
peer.recv(1)
open('/srv/shared/ready', 'w').close()
time.sleep(1000)";
    let other = client.start(&["python3", "-c", other, &lab.address(ADDRESS)])?;

    until("it is connected", LIMIT, || {
        Ok(a.exec(&["test", "-e", "/srv/shared/ready"])?.exits(0).ok())
    })?;
    refused(&a, &["uses Multipath TCP"])?;
    drop(other);
    discard(&a)?;

    // Of this container alone, by its annotation.
    let config = a.path(&container.bundle)?.join("config.json");
    let text = std::fs::read(&config).map_err(|e| e.to_string())?;
    let mut json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    json["annotations"] = serde_json::json!({"org.ferry.migratable": "true"});
    std::fs::write(&config, json.to_string()).map_err(|e| e.to_string())?;
    a.sh(&format!("rm {}/rootfs/ready", container.bundle))?;
    container.run_on(&a)?;

    // ENOPROTOOPT
    ensure!(found(&a, &container)? == "92", "it is not switched off: {}", found(&a, &container)?);
    let guest = Guest::start(&a, &client, lab, 2)?;
    guest.is_served()?;
    goes(lab, &container)?;
    guest.is_served()?;
    guest.ends()?;

    // Nor may it begin to, wherever it is.
    let enabled = a.sh("ip netns exec box cat /proc/sys/net/mptcp/enabled")?;
    ensure!(enabled.trim() == "0", "it is {enabled} after two moves");

    Ok(())
}
