//! Containers with the host's network, whose addresses move from host to host (`--move-address`):
//! under clients of theirs, and under clients of others on the same hosts and interfaces.

use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::{Output, Running, until, write_script};
use crate::common::suite::{self, in_lab};
use crate::common::wire::Wire;
use crate::common::{Outcome, ensure};
use crate::connections::carried;

const LIMIT: Duration = Duration::from_secs(60);
const CONNECTIONS: usize = 6;
/// Of others' servers on the hosts.
const PORT: u16 = 7001;

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("floating::to_and_fro", LIMIT, to_and_fro),
        in_lab("floating::many", LIMIT, many),
        in_lab("floating::on_two_interfaces", LIMIT, on_two_interfaces),
        in_lab("floating::one_of_two_taken", LIMIT, one_of_two_taken),
        in_lab("floating::first_of_its_network", LIMIT, first_of_its_network),
        in_lab("floating::silent_until_the_commit", LIMIT, silent_until_the_commit),
        in_lab("floating::after_failures", 2 * LIMIT, after_failures),
        in_lab("floating::refused", LIMIT, refused),
    ]
}

/// The addresses that move, with their prefixes.
pub fn floating(lab: &Lab) -> [String; 2] {
    let net = lab.address(0);
    let number = net.split('.').nth(2).unwrap_or_default();
    [format!("{}/24", lab.address(ADDRESS)), format!("fd77:{number}::{ADDRESS}/64")]
}

fn bare(address: &str) -> &str {
    address.split('/').next().unwrap_or_default()
}

fn own_address(host: &Host) -> Outcome<String> {
    Ok(host.sh("ip -o -4 address show eth0 | awk '{ print $4; exit }'")?.trim().to_owned())
}

/// A counter with little memory.
fn container() -> Container {
    let options = ["--host-network", "--arg", "--listen", "--arg", "[::]:7000"];
    Container::plain("connections").with(&options)
}

/// The container on `a`, and the addresses there.
pub fn start(lab: &Lab) -> Outcome<Container> {
    let a = lab.host("a");
    for address in floating(lab) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        a.sh(&format!("ip address add {address} dev eth0 {nodad}"))?;
    }
    let container = container();
    container.start(lab, &a)?;
    Ok(container)
}

fn migrate_with(from: &Host, to: &Host, addresses: &[String], more: &[&str]) -> Outcome<Output> {
    let options: Vec<String> =
        addresses.iter().map(|a| format!("--move-address={a}@eth0")).collect();
    let mut arguments = vec!["migrate"];
    arguments.extend(options.iter().map(String::as_str));
    arguments.extend(more);
    arguments.extend(["box", to.name]);
    from.ferry(&arguments)
}

/// Starts a server of the host itself; it is not called as the container's is.
fn serve(host: &Host, at: &str) -> Outcome<Running> {
    let program = "/srv/shared/bin/neighbour";
    host.sh(&format!("[ -e {program} ] || cp /srv/shared/box/rootfs/counter-server {program}"))?;
    let server = host.start(&[program, "--listen", at, "--memory", "1M"])?;
    let look = format!("ss -Hltn 'src = {at}' | grep -q .");
    until("the server listens", SHORT, || {
        Ok((host.exec(&["sh", "-c", &look])?.code == 0).then_some(()))
    })?;
    Ok(server)
}

/// Ends it, and waits until the kernel has forgotten it: what `contrib/lab exec` runs dies with that.
fn end(host: &Host, server: Running, port: u16) -> Outcome {
    drop(server);
    until("the server is gone", SHORT, || {
        let left = host.sh(&format!(
            "ss -Htnl 'sport = :{port}'; ss -Htn state established 'sport = :{port}'"
        ))?;
        Ok(left.trim().is_empty().then_some(()))
    })
}

/// A server of the host itself, at its own address, with a client that has been there for long.
struct Neighbour {
    _server: Running,
    probe: Probe,
    at: String,
    host: Host,
    client: Host,
}

impl Neighbour {
    fn on(lab: &Lab, host: &Host) -> Outcome<Neighbour> {
        Neighbour::at(lab, host, &format!("{}:{PORT}", bare(&own_address(host)?)))
    }

    fn at(lab: &Lab, host: &Host, at: &str) -> Outcome<Neighbour> {
        let at = at.to_owned();
        let server = serve(host, &at)?;
        let probe = Probe::to(lab, &at, CONNECTIONS)?;
        Ok(Neighbour { _server: server, probe, at, host: host.clone(), client: lab.host("client") })
    }

    /// It has lost nothing, and was never stopped: a fence that holds its packets back, too, would
    /// have each of its connections send something again.
    fn is_untouched(&mut self) -> Outcome {
        self.probe.is_content()?;
        let sent_again = |host: &Host, what: &str| -> Outcome<Vec<String>> {
            let list = host.sh(&format!("ss -HtniO state established '{what} = {}'", self.at))?;
            let lines = list.lines().filter(|l| l.contains(" bytes_retrans:"));
            // A client's port is what both ends know.
            let port = if what == "src" { 3 } else { 2 };
            let port = |l: &str| {
                l.split_whitespace().nth(port).and_then(|a| a.rsplit(':').next().map(str::to_owned))
            };
            Ok(lines.filter_map(port).collect())
        };
        let mut ports = sent_again(&self.client, "dst")?;
        ports.extend(sent_again(&self.host, "src")?);
        ports.sort();
        ports.dedup();
        ensure!(ports.len() < CONNECTIONS, "all of {} have sent again: {ports:?}", self.at);
        Ok(())
    }
}

/// What there is of addresses on a host's `eth0`: the addresses, and all that could be told of them.
fn addresses(host: &Host) -> Outcome<Vec<(String, String)>> {
    let text = host.sh("ip -j address show dev eth0")?;
    let all: Value = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
    let list = all[0]["addr_info"].as_array().cloned().unwrap_or_default();
    Ok(list
        .iter()
        .map(|a| (format!("{}/{}", a["local"].as_str().unwrap_or_default(), a["prefixlen"]), a))
        .map(|(name, a)| (name, a.to_string()))
        .collect())
}

/// The addresses are on `here` only, as they ever were, and nothing else has changed on either host.
pub fn moved(lab: &Lab, here: &Host, there: &Host) -> Outcome {
    let (with, without) = (addresses(here)?, addresses(there)?);
    for address in floating(lab) {
        let found: Vec<_> = with.iter().filter(|a| a.0 == address).collect();
        ensure!(found.len() == 1, "{address} on {}: {with:?}", here.name);
        for word in ["deprecated", "noprefixroute", "tentative"] {
            ensure!(!found[0].1.contains(&format!("{word}\":true")), "{word}: {}", found[0].1);
        }
        let ip = bare(&address);
        ensure!(!without.iter().any(|a| bare(&a.0) == ip), "{address} is on {}", there.name);
    }
    ensure!(with.len() == without.len() + 2, "{with:?}\n{without:?}");
    for host in [here, there] {
        let links = host.sh("ip link")?;
        ensure!(!links.contains("ferry"), "left on {}: {links}", host.name);
    }
    Ok(())
}

/// So many that Ferry carries them by itself: of IPv6, and of IPv4 at sockets of IPv6.
fn many(lab: &Lab) -> Outcome {
    const EACH: usize = 100;
    let (a, b) = pair(lab);
    let container = start(lab)?;
    let [ip, ip6] = floating(lab);
    let wire = Wire::watch(lab)?;
    // Seldom: what has a question in its queue is CRIU's, and on a busy machine many would have.
    let mut old = Probe::to_every(lab, &format!("{}:7000", bare(&ip)), EACH, "1s")?;
    let mut new = Probe::to_every(lab, &format!("[{}]:7000", bare(&ip6)), EACH, "1s")?;
    let mut neighbours = [Neighbour::on(lab, &a)?, Neighbour::on(lab, &b)?];
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        let said = migrate_with(from, to, &floating(lab), &["--json"])?.exits(0)?;
        let carried = carried(&said)? as usize;
        ensure!(carried > EACH, "only {carried} were carried by Ferry itself");
        exactly_one_copy(&container, to, from)?;
        old.is_content()?;
        new.is_content()?;
        neighbours.iter_mut().try_for_each(Neighbour::is_untouched)?;
        moved(lab, to, from)?;
    }
    wire.is_calm(2 * EACH)
}

/// Both families under load, others' connections on both hosts all the while.
fn to_and_fro(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab)?;
    let [ip, ip6] = floating(lab);
    let wire = Wire::watch(lab)?;
    let mut probe = Probe::to(lab, &format!("{}:7000", bare(&ip)), CONNECTIONS)?;
    let mut other = Probe::to(lab, &format!("[{}]:7000", bare(&ip6)), CONNECTIONS)?;

    // On the host that it goes to and comes from: a client like any other.
    let mut local = Probe::start_on(&b, lab, &container, 2, "2ms")?;
    let mut neighbours = [Neighbour::on(lab, &a)?, Neighbour::on(lab, &b)?];
    let said = migrate_with(&a, &b, &floating(lab), &["--dry-run"])?.exits(0)?;
    for address in floating(lab) {
        let line = format!("address {address}: moves from eth0 here to eth0 there");
        ensure!(said.out.contains(&line), "no {line:?} in {said}");
    }

    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        migrate_with(from, to, &floating(lab), &[])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        probe.is_content()?;
        other.is_content()?;
        local.is_content()?;
        neighbours.iter_mut().try_for_each(Neighbour::is_untouched)?;
        moved(lab, to, from)?;
    }

    // The host that it has left reaches it like anybody else.
    let program = "/srv/shared/bin/ferry-probe";
    for to in [format!("{}:7000", bare(&ip)), format!("[{}]:7000", bare(&ip6))] {
        a.sh(&format!("{program} --to {to} --connections 1 --for 50ms"))?;
    }

    wire.is_calm(4 * CONNECTIONS)
}

/// A container with addresses on two interfaces, each in networks of its own.
struct OnTwo {
    /// The addresses, and their interfaces on either host: the second one has two names.
    moved: [(String, [&'static str; 2]); 3],
    hosts: [Host; 2],
}

impl OnTwo {
    /// The container on `a` with all of them.
    fn start(lab: &Lab) -> Outcome<(Container, OnTwo)> {
        let (a, b) = pair(lab);
        let client = lab.host("client");
        lab.segment("s2", &[("a", "eth1"), ("b", "lan1"), ("client", "eth1")])?;
        for (host, interface, last) in [(&a, "eth1", 1), (&b, "lan1", 2), (&client, "eth1", 9)] {
            host.sh(&format!(
                "ip address add 10.98.0.{last}/24 dev {interface}
                 ip address add fd98::{last}/64 dev {interface} nodad"
            ))?;
        }
        let moved = [
            (floating(lab)[0].clone(), ["eth0", "eth0"]),
            ("fd98::50/64".to_owned(), ["eth1", "lan1"]),
            ("10.98.0.50/24".to_owned(), ["eth1", "lan1"]),
        ];
        for (address, [interface, _]) in &moved {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            a.sh(&format!("ip address add {address} dev {interface} {nodad}"))?;
        }
        let container = container();
        container.start(lab, &a)?;
        Ok((container, OnTwo { moved, hosts: [a, b] }))
    }

    /// A client of each.
    fn probes(&self, lab: &Lab) -> Outcome<Vec<Probe>> {
        let to = self.moved.iter().map(|(address, _)| match bare(address) {
            ip if ip.contains(':') => format!("[{ip}]:7000"),
            ip => format!("{ip}:7000"),
        });
        to.map(|to| Probe::to(lab, &to, CONNECTIONS)).collect()
    }

    fn migrate(&self, from: usize, to: usize, more: &[&str]) -> Outcome<Output> {
        let options = self.moved.iter().map(|(a, on)| format!("--move-address={a}@{}", on[to]));
        let options: Vec<String> = options.collect();
        let mut arguments = vec!["migrate"];
        arguments.extend(options.iter().map(String::as_str));
        arguments.extend(more);
        arguments.extend(["box", self.hosts[to].name]);
        self.hosts[from].ferry(&arguments)
    }

    /// All addresses of a host, with their interfaces.
    fn all(&self, place: usize) -> Outcome<Vec<String>> {
        let list = self.hosts[place]
            .sh("ip -o address show scope global | awk '{ print $4, $2 }' | sort")?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    /// What moves, as it is on a host that has it, among what the host has anyway.
    fn among(&self, place: usize, own: &[String]) -> Vec<String> {
        let moved = self.moved.iter().map(|(address, on)| format!("{address} {}", on[place]));
        let mut all: Vec<String> = moved.chain(own.iter().cloned()).collect();
        all.sort();
        all
    }
}

/// Addresses on two interfaces, in both families, under load; others' connections on both interfaces
/// of both hosts all the while.
fn on_two_interfaces(lab: &Lab) -> Outcome {
    let (container, two) = OnTwo::start(lab)?;
    let wires = [Wire::watch(lab)?, Wire::watch_on(lab, "eth1")?];
    let mut probes = two.probes(lab)?;
    let mut neighbours = Vec::new();
    for (host, last) in two.hosts.iter().zip([1, 2]) {
        neighbours.push(Neighbour::on(lab, host)?);
        for at in [format!("10.98.0.{last}"), format!("[fd98::{last}]")] {
            neighbours.push(Neighbour::at(lab, host, &format!("{at}:{PORT}"))?);
        }
    }

    let names: Vec<_> = two.moved.iter().map(|(address, _)| bare(address)).collect();
    let mut own = [two.all(0)?, two.all(1)?];
    own[0].retain(|a| !names.contains(&bare(a)));
    for (from, to) in [(0, 1), (1, 0), (0, 1)] {
        let step = |e: String| format!("{} to {}: {e}", two.hosts[from].name, two.hosts[to].name);
        two.migrate(from, to, &[])?.exits(0).map_err(step)?;
        exactly_one_copy(&container, &two.hosts[to], &two.hosts[from]).map_err(step)?;
        probes.iter_mut().try_for_each(Probe::is_content).map_err(step)?;
        neighbours.iter_mut().try_for_each(Neighbour::is_untouched).map_err(step)?;
        let (with, without) = (two.all(to)?, two.all(from)?);
        ensure!(with == two.among(to, &own[to]), "there after a step to {to}: {with:?}");
        ensure!(without == own[from], "here after a step to {to}: {without:?}");
    }

    // Each client of a server has some.
    let [one, other] = wires;
    one.is_calm(3 * CONNECTIONS).and_then(|()| other.is_calm(6 * CONNECTIONS))
}

/// Somebody takes the last of them on the destination after all was found to be free: the others are
/// given back, and nothing is lost.
fn one_of_two_taken(lab: &Lab) -> Outcome {
    let (container, two) = OnTwo::start(lab)?;
    let [a, b] = &two.hosts;
    let mut probes = two.probes(lab)?;
    let before = [two.all(0)?, two.all(1)?];
    let held = "/srv/shared/bin/held";
    let script = "#!/bin/sh\nexport FERRY_FAULT=destination.prepared:hold; exec ferry \"$@\"\n";
    write_script(&a.path(held)?, script)?;
    std::thread::scope(|scope| -> Outcome {
        let migration = scope.spawn(|| two.migrate(0, 1, &["--remote-ferry", held]));
        let file = b.path("/run/ferry-fault/destination.prepared")?;
        until("the destination is prepared", SHORT, || Ok(file.exists().then_some(())))?;
        b.sh("ip address add 10.98.0.50/24 dev lan1")?;
        std::fs::remove_file(&file).map_err(|e| e.to_string())?;
        let said = migration.join().map_err(|_| "the trial's thread has died")??.exits(1)?;
        ensure!(said.err.contains("cannot add 10.98.0.50 to lan1"), "{said}");
        Ok(())
    })?;

    // Theirs is left to them.
    b.sh("ip address del 10.98.0.50/24 dev lan1")?;
    exactly_one_copy(&container, a, b)?;
    let after = [two.all(0)?, two.all(1)?];
    ensure!(before == after, "{before:?}\nhas become {after:?}");
    probes.iter_mut().try_for_each(Probe::is_content)?;

    // A Ferry that dies after the commit leaves them to whoever comes after it.
    let options =
        two.moved.iter().map(|(address, on)| format!("--move-address {address}@{}", on[1]));
    let options = options.collect::<Vec<_>>().join(" ");
    let line = format!("FERRY_FAULT=source.committed:kill exec ferry migrate {options} box b");
    a.exec(&["sh", "-c", &line])?.exits(137)?;
    a.ferry(&["resolve", "box"])?.exits(0)?;
    exactly_one_copy(&container, b, a)?;
    probes.iter_mut().try_for_each(Probe::is_content)?;

    let names: Vec<_> = two.moved.iter().map(|(address, _)| bare(address)).collect();
    let own: Vec<String> =
        before[0].iter().filter(|a| !names.contains(&bare(a))).cloned().collect();
    ensure!(two.all(0)? == own, "left on a: {:?}", two.all(0)?);
    ensure!(two.all(1)? == two.among(1, &before[1]), "on b: {:?}", two.all(1)?);

    Ok(())
}

/// The address is the first of its network on one host, whose own hangs on it, and alone in its
/// network on the other.
fn first_of_its_network(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let (address, far) = ("10.99.0.5/24".to_owned(), "10.99.0.1");
    a.sh(&format!(
        "sysctl -qw net.ipv4.conf.all.promote_secondaries=0 net.ipv4.conf.eth0.promote_secondaries=0
         ip address add {address} dev eth0
         ip address add {far}/24 dev eth0"
    ))?;

    lab.host("client").sh("ip address add 10.99.0.9/24 dev eth0")?;
    let container = container();
    container.start(lab, &a)?;
    let at = format!("{far}:{PORT}");
    let _server = serve(&a, &at)?;

    // Not even a way there.
    let said = migrate_with(&a, &b, std::slice::from_ref(&address), &[])?.exits(3)?;
    ensure!(said.err.contains("is not in the network of 10.99.0.5/24"), "{said}");
    let client = own_address(&lab.host("client"))?;
    b.sh(&format!("ip route add default via {}", bare(&client)))?;
    let wire = Wire::watch(lab)?;
    let mut neighbour = Probe::to(lab, &at, CONNECTIONS)?;
    let mut probe = Probe::to(lab, "10.99.0.5:7000", CONNECTIONS)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        migrate_with(from, to, std::slice::from_ref(&address), &[])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        probe.is_content()?;
        neighbour.is_content()?;
        let (with, without) = (addresses(to)?, addresses(from)?);
        let named =
            |list: &[(String, String)]| list.iter().filter(|a| bare(&a.0) == "10.99.0.5").count();
        ensure!((named(&with), named(&without)) == (1, 0), "{with:?}\n{without:?}");

        ensure!(with.iter().any(|a| a.0 == address), "{with:?}");
        let routes = to.sh("ip route show 10.99.0.0/24")?;
        ensure!(routes.contains("dev eth0"), "on {}: {routes}", to.name);
        let promote = a.sh("cat /proc/sys/net/ipv4/conf/eth0/promote_secondaries")?;
        ensure!(promote.trim() == "0", "promote_secondaries is {promote}");
    }

    let left = b.sh("ip route; ip address")?;
    ensure!(!left.contains("10.99.0"), "left on b: {left}");
    wire.is_calm(2 * CONNECTIONS)
}

/// While both hosts have the addresses, neither answers for them, whoever asks; the new one begins
/// when the container is its own, with what was asked meanwhile.
fn silent_until_the_commit(lab: &Lab) -> Outcome {
    let (a, b, client) = (lab.host("a"), lab.host("b"), lab.host("client"));
    let container = start(lab)?;
    let all = floating(lab);
    let wire = Wire::watch(lab)?;
    let mut probe = Probe::to(lab, &format!("{}:7000", bare(&all[0])), CONNECTIONS)?;
    let mut other = Probe::to(lab, &format!("[{}]:7000", bare(&all[1])), CONNECTIONS)?;
    let mac = b.sh("cat /sys/class/net/eth0/address")?;
    let (file, filter) = ("/srv/shared/b.pcap", format!("ether src {}", mac.trim()));
    let heard =
        ["tcpdump", "-i", "eth0", "-U", "--immediate-mode", "-Z", "root", "-w", file, &filter];
    let _capture = client.start(&heard)?;

    let path = client.path(file)?;
    until("the capture is on", SHORT, || {
        Ok(path.metadata().is_ok_and(|m| m.len() >= 24).then_some(()))
    })?;
    let said_by_b = || -> Outcome<Vec<String>> {
        let said = client.exec(&["tcpdump", "-n", "-r", file])?;
        // The probe of the checks, RFC 5227, says nothing of who has it.
        let lines = said.out.lines().filter(|l| !l.contains("tell 0.0.0.0"));
        let named = |l: &&str| all.iter().any(|address| l.contains(bare(address)));
        Ok(lines.filter(named).map(str::to_owned).collect())
    };

    let options = all.each_ref().map(|a| format!("--move-address {a}@eth0")).join(" ");
    let line = format!("FERRY_FAULT=source.commit:hold exec ferry migrate {options} box b");
    let mut running = a.start(&["sh", "-c", &line])?;
    let held = a.path("/run/ferry-fault/source.commit")?;
    until("it is restored, and not committed", SHORT, || {
        ensure!(!running.has_ended(), "it was over before");
        Ok(held.exists().then_some(()))
    })?;

    for host in [&a, &b] {
        let list = addresses(host)?;
        for address in &all {
            let ip = bare(address);
            ensure!(list.iter().any(|a| bare(&a.0) == ip), "{ip} is not on {}", host.name);
        }
    }

    // To the one that they know.
    for address in &all {
        let said = client.exec(&["ping", "-c", "1", "-W", "0.3", bare(address)])?;
        ensure!(said.code != 0, "somebody is {address}: {said}");
    }

    // Asked by ARP and by neighbour discovery, of all.
    client.sh("ip neigh flush dev eth0")?;
    for address in &all {
        let said = client.exec(&["ping", "-c", "2", "-i", "0.2", "-W", "0.3", bare(address)])?;
        ensure!(said.code != 0, "somebody has {address}: {said}");
    }

    let said = said_by_b()?;
    ensure!(said.is_empty(), "b has said\n{}", said.join("\n"));
    std::fs::remove_file(&held).map_err(|e| e.to_string())?;
    running.end(SHORT)?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    probe.is_content()?;
    other.is_content()?;
    moved(lab, &b, &a)?;

    // What had come to the other host for it was kept, sent along, and is answered.
    let answers = ["is-at", "neighbor advertisement", "ICMP echo reply", "ICMP6, echo reply"];
    until("b has told all that it has them, and answered", SHORT, || {
        let said = said_by_b()?;
        Ok(answers.iter().all(|a| said.iter().any(|l| l.contains(a))).then_some(()))
    })
    .map_err(|e| format!("{e}: {:?}", said_by_b()))?;

    wire.is_calm(2 * CONNECTIONS)
}

/// Killed on either side, before the commit and after it; with `FERRY_FULL=1` given up at more points.
fn after_failures(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab)?;
    let [ip, ip6] = floating(lab);
    let wire = Wire::watch(lab)?;
    let mut probe = Probe::to(lab, &format!("{}:7000", bare(&ip)), CONNECTIONS)?;
    let mut other = Probe::to(lab, &format!("[{}]:7000", bare(&ip6)), CONNECTIONS)?;
    let mut neighbours = [Neighbour::on(lab, &a)?, Neighbour::on(lab, &b)?];
    let faulty = "/srv/shared/bin/faulty";
    let before = addresses(&a)?;

    let always = [("destination.ready:kill", 1), ("source.committed:kill", 137)];
    let full =
        [("destination.network:error", 1), ("source.commit:error", 1), ("dump.dumped:kill", 137)];
    for (fault, code) in full.into_iter().filter(|_| suite::full()).chain(always) {
        let script = format!("#!/bin/sh\nexport FERRY_FAULT={fault}; exec ferry \"$@\"\n");
        write_script(&a.path(faulty)?, &script)?;
        let (here, there) = if fault.starts_with("destination") {
            migrate_with(&a, &b, &floating(lab), &["--remote-ferry", faulty])?.exits(code)?;
            (&a, &b)
        } else {
            let options = floating(lab).map(|a| format!("--move-address {a}@eth0")).join(" ");
            let line = format!("FERRY_FAULT={fault} exec ferry migrate {options} box b");
            a.exec(&["sh", "-c", &line])?.exits(code)?;
            if fault.starts_with("source.committed") {
                a.ferry(&["resolve", "box"])?.exits(0)?;
                (&b, &a)
            } else {
                (&a, &b)
            }
        };

        let fine = exactly_one_copy(&container, here, there)
            .and_then(|()| moved(lab, here, there))
            .and_then(|()| probe.is_content())
            .and_then(|()| other.is_content())
            .and_then(|()| neighbours.iter_mut().try_for_each(Neighbour::is_untouched));
        fine.map_err(|e| format!("after {fault}: {e}"))?;

        if *here.name == *a.name {
            let now = addresses(&a)?;
            ensure!(now == before, "after {fault}: {before:?}\nhas become {now:?}");
        }
    }

    migrate_with(&b, &a, &floating(lab), &[])?.exits(0)?;
    exactly_one_copy(&container, &a, &b)?;
    probe.is_content()?;
    other.is_content()?;
    moved(lab, &a, &b)?;

    wire.is_calm(4 * CONNECTIONS)
}

/// What cannot go along, here and there, is told before anything is touched.
fn refused(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab)?;
    let [ip, ip6] = floating(lab);
    let pid = facts(&a)?.containers["box"].pid;
    let all = floating(lab);
    let untouched = |words: &[&str], addresses: &[String], more: &[&str]| -> Outcome {
        let said = migrate_with(&a, &b, addresses, more)?.exits(3)?;
        for word in words {
            ensure!(said.err.contains(word), "no {word:?}: {said}");
        }
        exactly_one_copy(&container, &a, &b)?;
        let (here, there) = (facts(&a)?, facts(&b)?);
        ensure!(here.containers["box"].pid == pid, "it is another process now");

        let begun: Vec<_> = here.migrations.iter().chain(&there.migrations).collect();
        ensure!(begun.is_empty(), "something had begun: {begun:?}");
        moved(lab, &a, &b)
    };

    // Somebody's network, but neither its own nor the host's. `ip netns exec` would hide the cgroups.
    a.sh("ip netns add lost
          nsenter --net=/run/netns/lost ferry run -d -b /srv/shared/box lost </dev/null >/dev/null 2>&1")?;
    let said =
        a.ferry(&["migrate", &format!("--move-address={ip}@eth0"), "lost", "b"])?.exits(3)?;
    ensure!(said.err.contains("neither its own nor this host's"), "{said}");

    a.sh("ferry delete --force lost && ip netns del lost")?;
    // The error teaches the option, of addresses that are in use.
    let mut probe = Probe::to(lab, &format!("{}:7000", bare(&ip)), CONNECTIONS)?;
    let option = format!("--move-address {ip}@eth0");
    untouched(&["the container uses the host's network", &option, "ip netns add"], &[], &[])?;
    untouched(&["this host has it as", &option], &[ip.replace("/24", "/32")], &[])?;
    untouched(&["this host does not have it"], &["10.99.0.5/24".into()], &[])?;
    untouched(&["leave them out"], &all, &["--network", "none"])?;

    // Its own connection, at another address of the host; of IPv6, too, if only one of them moves.
    let own = own_address(&a)?;
    let connection = Probe::to(lab, &format!("{}:7000", bare(&own)), 1)?;
    let words = [&format!("the connection {}:7000 - ", bare(&own)), "stays on this host", "hint:"];
    untouched(&words.map(|w| w as &str), &all, &[])?;
    drop(connection);

    let nobody_there = |what: &str, host: &Host, filter: &str| {
        until(what, SHORT, || {
            let left =
                host.exec(&["sh", "-c", &format!("ss -Htn state established '{filter}'")])?;
            Ok(left.out.trim().is_empty().then_some(()))
        })
    };

    nobody_there("it has hung up", &a, &format!("src {}", bare(&own)))?;
    let connection = Probe::to(lab, &format!("[{}]:7000", bare(&ip6)), 1)?;
    untouched(&[&format!("the connection [{}]:7000 - ", bare(&ip6))], &all[..1], &[])?;
    drop(connection);
    nobody_there("it has hung up", &a, &format!("src {}", bare(&ip6)))?;

    // Somebody else's, at the address that is to move.
    let server = serve(&a, &format!("0.0.0.0:{PORT}"))?;
    let connection = Probe::to(lab, &format!("{}:{PORT}", bare(&ip)), 1)?;
    untouched(&["is not the container's, and would be cut"], &all, &[])?;
    drop(connection);
    end(&a, server, PORT)?;

    // Its port is taken there; the address is; the interface is none.
    let server = serve(&b, "0.0.0.0:7000")?;
    untouched(&["TCP port 7000 is taken on the destination", "sport = :7000"], &all, &[])?;
    end(&b, server, 7000)?;
    let elsewhere = ["--move-address", &format!("{ip}@eth7"), "box", "b"];
    let said = a.ferry(&[&["migrate"], &elsewhere[..]].concat())?.exits(3)?;
    ensure!(said.err.contains("this host has no interface eth7"), "{said}");

    // Taken by the other host under everybody's eyes: only there, so nobody on the wire notices.
    b.sh(&format!("ip address add {}/32 dev lo", bare(&ip)))?;
    let said = migrate_with(&a, &b, &all, &[])?.exits(3)?;
    ensure!(said.err.contains("this host has it itself, on lo"), "{said}");
    b.sh(&format!("ip address del {}/32 dev lo", bare(&ip)))?;
    probe.is_content()?;

    migrate_with(&a, &b, &all, &[])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    probe.is_content()
}
