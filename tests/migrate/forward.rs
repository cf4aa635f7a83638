//! Three hosts in three networks: the address stays where it is, and packets follow the container
//! wherever it goes, and home again.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, facts};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::until;
use crate::common::suite::{alone_in_lab, full, in_lab_of};
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(150);
/// `client` is a neighbour of the container's first host; `far` is behind a router.
const HOSTS: &[&str] = &["a", "b@1", "c@2", "client", "far@3"];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        in_lab_of(HOSTS, "forward::round_the_world", LIMIT, round_the_world),
        in_lab_of(HOSTS, "forward::killed_and_back", LIMIT, killed_and_back),
        alone_in_lab(HOSTS, "forward::given_up", LIMIT, given_up),
        in_lab_of(HOSTS, "forward::through_the_last_host", LIMIT, through_the_last_host),
        in_lab_of(HOSTS, "forward::ended", LIMIT, ended),
        alone_in_lab(HOSTS, "forward::until_idle", LIMIT, until_idle),
        in_lab_of(HOSTS, "forward::narrow_path", LIMIT, narrow_path),
        in_lab_of(HOSTS, "forward::killed_at_the_commit", LIMIT, killed_at_the_commit),
    ];
    let hosts = &["a", "b@1", "c@2", "d", "client"];
    trials
        .push(in_lab_of(hosts, "forward::home_killed", LIMIT, |lab| home_dies(lab, Death::Killed)));
    trials.push(in_lab_of(hosts, "forward::home_rebooted", LIMIT, home_rebooted));
    if full() {
        let dies = |lab: &Lab| home_dies(lab, Death::Cable);
        trials.push(in_lab_of(hosts, "forward::home_unreachable", LIMIT, dies));
        trials.push(in_lab_of(HOSTS, "forward::cut_at_the_commit", LIMIT, cut_at_the_commit));
        let hosts = &["a", "b@1", "d", "client"];
        trials.push(in_lab_of(hosts, "forward::as_wished", LIMIT, as_wished));
    }
    trials
}

/// A counter on `a` that is reached through a router, too, and its three hosts.
fn start(lab: &Lab) -> Outcome<(Container, [Host; 3])> {
    let hosts = ["a", "b", "c"].map(|name| lab.host(name));
    let container = Container::networked("counter");
    container.start(lab, &hosts[0])?;
    hosts[0].sh(&format!("ip -n box route add default via {}", lab.address(1)))?;
    Ok((container, hosts))
}

/// One probe next door, one from afar.
fn probes(lab: &Lab, container: &Container) -> Outcome<[Probe; 2]> {
    Ok([
        Probe::start_on(&lab.host("client"), lab, container, 5, "2ms")?,
        Probe::start_on(&lab.host("far"), lab, container, 5, "2ms")?,
    ])
}

fn all_content(probes: &mut [Probe]) -> Outcome {
    probes.iter_mut().try_for_each(Probe::is_content)
}

/// The same without a look at the server's memory, which takes a connection of its own.
fn all_answered(probes: &mut [Probe]) -> Outcome {
    for probe in probes {
        probe.answers_again()?;
        let report = probe.report("start")?;
        ensure!(report["connections_lost"] == 0, "connections were lost: {}", report["lost"]);
        ensure!(report["wrong_answers"] == 0, "answers were wrong: {}", report["wrong"]);
    }
    Ok(())
}

/// The processes that forward, on a host.
fn forwarders(host: &Host, what: &str) -> Outcome<Vec<i32>> {
    let wanted = format!("__guard forward {what}");
    let all = facts(host)?.processes;
    Ok(all.iter().filter(|p| p.state != "Z" && p.line.contains(&wanted)).map(|p| p.pid).collect())
}

/// What `ferry migrations` says of it.
pub fn told(host: &Host) -> Outcome<Vec<Value>> {
    let text = host.ferry(&["migrations", "--json"])?.ok()?;
    let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).map_err(|e| e.to_string()));
    let all = lines.collect::<Outcome<Vec<_>>>()?;
    Ok(all.iter().map(|m| m["forward"].clone()).filter(|f| !f.is_null()).collect())
}

/// The container runs on `place` and nowhere else, its home forwards to that very host, and nothing
/// is left anywhere else.
pub fn abroad(container: &Container, home: &Host, place: &Host, other: &Host) -> Outcome {
    abroad_within(Duration::from_secs(15), container, home, place, other)
}

/// The same in another time.
pub fn abroad_within(
    limit: Duration,
    container: &Container,
    home: &Host,
    place: &Host,
    other: &Host,
) -> Outcome {
    let mut last = String::new();
    let settled = until("it is abroad", limit, || {
        last = complaint(container, home, place, other)?.unwrap_or_default();
        Ok(last.is_empty().then_some(()))
    });
    settled.map_err(|e| format!("{e}\n{last}"))
}

fn complaint(
    container: &Container,
    home: &Host,
    place: &Host,
    other: &Host,
) -> Outcome<Option<String>> {
    let count = |host: &Host, line: &str| -> Outcome<usize> {
        let all = facts(host)?.processes;
        let is = |line_of: &str| line_of.contains(line) && !line_of.starts_with("ssh ");
        Ok(all.iter().filter(|p| p.state != "Z" && is(&p.line)).count())
    };

    for host in [home, place, other] {
        let facts = facts(host)?;
        let here = host.name == place.name;
        let running = facts.containers.get(container.id).map(|c| c.status.as_str());
        if running != here.then_some("running") {
            return Ok(Some(format!("on {} the container is {running:?}", host.name)));
        }

        if facts.netns.iter().any(|n| n == "box") != here {
            return Ok(Some(format!("namespaces on {}: {:?}", host.name, facts.netns)));
        }
        let left = (&facts.work, &facts.mounts, &facts.groups, facts.open());
        if !(left.0.is_empty() && left.1.is_empty() && left.2.is_empty() && left.3.is_empty()) {
            return Ok(Some(format!("left on {}: {left:?}", host.name)));
        }

        let kept = host.sh("ls /run/ferry-forward 2>/dev/null || true")?.lines().count();
        if kept != usize::from(host.name != other.name) {
            return Ok(Some(format!("{kept} forwardings on {}", host.name)));
        }
        for (line, on) in [
            ("forward home", home),
            ("forward work", home),
            ("forward away", place),
            ("ferry receive", place),
        ] {
            let (n, wanted) = (count(host, line)?, usize::from(host.name == on.name));
            if n != wanted {
                return Ok(Some(format!("{n} of {line} on {}", host.name)));
            }
        }
    }

    let said = told(home)?;
    let to = said.first().map(|s| (s["to"].clone(), s["connected"].clone()));
    if said.len() != 1 || to != Some((place.name.into(), true.into())) {
        return Ok(Some(format!("ferry migrations on {} says {said:?}", home.name)));
    }

    Ok(None)
}

/// Notes everything that ends a connection, or says that the container cannot be reached.
struct Wire<'a> {
    host: &'a Host,
}

impl Wire<'_> {
    fn tap<'a>(lab: &Lab, host: &'a Host) -> Outcome<Wire<'a>> {
        let address = lab.address(ADDRESS);
        host.sh(&format!(
            "tcpdump -i eth0 -n -U -Z root -w /tmp/wire '(host {address} and \
             tcp[tcpflags] & (tcp-rst|tcp-fin) != 0) or icmp[icmptype] == icmp-unreach' \
             >/dev/null 2>/tmp/wire.said </dev/null & echo $! >/tmp/wire.pid"
        ))?;
        until("tcpdump listens", SHORT, || {
            let said = host.exec(&["grep", "-q", "listening on", "/tmp/wire.said"])?;
            Ok((said.code == 0).then_some(()))
        })?;
        Ok(Wire { host })
    }

    fn ends_clean(self) -> Outcome {
        self.host.sh("pid=$(cat /tmp/wire.pid); kill -INT $pid
             while kill -0 $pid 2>/dev/null; do sleep 0.01; done
             grep -q '^0 packets dropped by kernel' /tmp/wire.said")?;
        let list = self.host.sh("tcpdump -n -r /tmp/wire 2>/dev/null")?;
        ensure!(list.is_empty(), "on the wire of {}:\n{list}", self.host.name);
        Ok(())
    }
}

fn round_the_world(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let (client, far) = (lab.host("client"), lab.host("far"));
    let mut probes = probes(lab, &container)?;
    let wires = [Wire::tap(lab, &client)?, Wire::tap(lab, &far)?];
    let address = lab.address(ADDRESS);

    // Whole frames get through, and out of the container, too.
    let whole = |host: &Host| -> Outcome {
        for from in [&client, &far] {
            let ping = ["ping", "-c", "1", "-W", "5", "-M", "do", "-s", "1472", &address];
            from.exec(&ping)?.ok().map_err(|e| format!("on {}: {e}", host.name))?;
        }
        let out = "ip netns exec box ping -c 1 -W 5 -M do -s 1472";
        host.sh(&format!("{out} $(getent hosts client | cut -d ' ' -f 1)")).map(drop)?;
        host.sh(&format!("{out} $(getent hosts far | cut -d ' ' -f 1)")).map(drop)
    };

    for round in 1..=2 {
        let step = |e: String| format!("round {round}: {e}");
        a.ferry(&["migrate", "box", "b"])?.exits(0)?;
        all_answered(&mut probes).map_err(step)?;
        abroad(&container, &a, &b, &c).map_err(step)?;
        whole(&b).map_err(step)?;
        if round == 1 {
            b.ferry(&["migrate", "box", "c"])?.exits(0)?;
            all_answered(&mut probes).map_err(step)?;
            abroad(&container, &a, &c, &b).map_err(step)?;
            whole(&c).map_err(step)?;
            c.ferry(&["migrate", "box", "a"])?.exits(0)?;
        } else {
            b.ferry(&["migrate", "box", "a"])?.exits(0)?;
        }

        all_answered(&mut probes).map_err(step)?;
        exactly_one_copy(&container, &a, &b).map_err(step)?;
        exactly_one_copy(&container, &a, &c).map_err(step)?;
        whole(&a).map_err(step)?;
    }

    wires.into_iter().try_for_each(Wire::ends_clean)?;
    all_content(&mut probes)
}

/// Whoever forwards may die: it comes back, or it is said that it does not.
fn killed_and_back(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    abroad(&container, &a, &b, &c)?;
    let kill = |host: &Host, whats: &[&str]| -> Outcome {
        for what in whats {
            for pid in forwarders(host, what)? {
                host.sh(&format!("kill -KILL {pid}"))?;
            }
        }
        Ok(())
    };

    for (host, what) in [(&a, "work"), (&b, "away")] {
        kill(host, &[what])?;
        all_content(&mut probes).map_err(|e| format!("{what} was killed: {e}"))?;
        abroad(&container, &a, &b, &c).map_err(|e| format!("{what} was killed: {e}"))?;
    }

    a.sh("kill -KILL $(pgrep -x ssh)")?;
    all_content(&mut probes).map_err(|e| format!("ssh was killed: {e}"))?;
    lab.link(&["b", "--cut"])?;
    until("the broken link is reported", Duration::from_secs(40), || {
        let broken = told(&a)?.iter().any(|f| f["connected"] == false);
        Ok(broken.then_some(()))
    })?;

    lab.link(&["b", "--mend"])?;
    all_content(&mut probes).map_err(|e| format!("a cable was pulled: {e}"))?;
    kill(&a, &["home", "work"])?;
    let text = a.ferry(&["migrations"])?.ok()?;
    ensure!(text.contains("is NOT forwarded") && text.contains("ferry resolve box"), "{text}");
    ensure!(told(&a)?.iter().any(|f| f["dead"] == true), "{:?}", told(&a)?);
    a.ferry(&["resolve", "box"])?.exits(0)?;
    all_content(&mut probes).map_err(|e| format!("after ferry resolve: {e}"))?;
    abroad(&container, &a, &b, &c)?;
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    all_content(&mut probes)?;

    exactly_one_copy(&container, &a, &b)
}

/// Sends and receives so many random bytes at once, and says what they were.
const TRANSFER: &str = r#"
import hashlib, os, socket, sys, threading
SIZE = 6 << 20
kind, address, port = sys.argv[1:]
if kind == "serve":
    listener = socket.create_server((address, int(port)))
    print("ready", flush=True)
    s = listener.accept()[0]
else:
    s = socket.create_connection((address, int(port)), 20)
s.settimeout(60)
out = os.urandom(SIZE)
sender = threading.Thread(target=lambda: (s.sendall(out), s.shutdown(socket.SHUT_WR)))
sender.start()
came, size = hashlib.sha256(), 0
while block := s.recv(1 << 16):
    came.update(block)
    size += len(block)
sender.join()
segment = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
print(hashlib.sha256(out).hexdigest(), came.hexdigest(), size == SIZE, segment, flush=True)
"#;

/// Between the hosts there is a path on which whole frames have no room: they are none of its packets,
/// so what is forwarded keeps its size.
fn narrow_path(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    let address = lab.address(ADDRESS);

    // Half way; the hosts have to find it out.
    lab.in_switch("ip link set br1 mtu 1400")?;
    let fits = |size: &str| -> Outcome<bool> {
        Ok(a.exec(&["ping", "-c", "1", "-W", "2", "-M", "do", "-s", size, "b"])?.code == 0)
    };

    ensure!(fits("1372")? && !fits("1373")?, "the path is not as narrow as it was to be");
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    all_content(&mut probes)?;
    abroad(&container, &a, &b, &c)?;
    for (port, from) in [("7010", "client"), ("7011", "far")] {
        let from = lab.host(from);
        let step = |e: String| format!("from {}: {e}", from.name);
        let ping = ["ping", "-c", "1", "-W", "5", "-M", "do", "-s", "1472", &address];
        from.exec(&ping)?.ok().map_err(step)?;

        // In the container's network, as the container would.
        let enter = ["ip", "netns", "exec", "box", "python3", "-c", TRANSFER, "serve", &address];
        let server = b.start(&[&enter[..], &[port]].concat())?;
        let listens = format!("ip netns exec box ss -Hltn 'sport = :{port}' | grep -q .");
        until("the server listens", SHORT, || {
            Ok((b.exec(&["sh", "-c", &listens])?.code == 0).then_some(()))
        })?;

        let client = from.start(&["python3", "-c", TRANSFER, "fetch", &address, port])?;
        let (client, server) = (client.end(LONG)?.ok().map_err(step)?, server.end(LONG)?.ok()?);
        let words = |text: &str| -> Vec<String> {
            let last = text.lines().last().unwrap_or_default();
            last.split(' ').map(str::to_owned).collect()
        };
        let (ours, theirs) = (words(&client), words(&server));
        ensure!(ours.len() == 4 && theirs.len() == 4, "{client}{server}");
        ensure!(ours[0] == theirs[1] && ours[1] == theirs[0], "damaged: {client}{server}");
        ensure!(ours[2] == "True" && theirs[2] == "True", "not complete: {client}{server}");

        // Of 1500 bytes, without both headers and TCP's timestamps. Linux sets DF on all of them.
        ensure!(ours[3] == "1448" && theirs[3] == "1448", "segments: {client}{server}");
    }

    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    all_content(&mut probes)?;
    exactly_one_copy(&container, &a, &b)
}

/// How a home ends.
#[derive(Clone, Copy, PartialEq)]
enum Death {
    /// All of Ferry's processes there, at once.
    Killed,
    /// Its cable is pulled while the container sends as fast as it can: nobody hears that it is gone.
    Cable,
}

/// Home is gone for good: the other host says so, the container runs on there, and reaches its
/// address again where that belongs.
fn home_dies(lab: &Lab, death: Death) -> Outcome {
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| lab.host(name));
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    a.sh(&format!("ip -n box route add default via {}", lab.address(1)))?;
    let mut probe = Probe::start(lab, &container, 5)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    probe.is_content()?;
    abroad(&container, &a, &b, &c)?;

    let mut flood = None;
    match death {
        Death::Killed => {
            let all = [forwarders(&a, "home")?, forwarders(&a, "work")?].concat();
            let list: Vec<String> = all.iter().map(i32::to_string).collect();
            a.sh(&format!("kill -KILL {}; kill -KILL $(pgrep -x ssh)", list.join(" ")))?;
        }
        Death::Cable => {
            let to = a.sh("getent hosts client | cut -d ' ' -f 1")?;
            let program = "import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True: s.sendto(bytes(1400), (sys.argv[1], 9))";
            flood = Some(b.start(&[
                "ip",
                "netns",
                "exec",
                "box",
                "python3",
                "-c",
                program,
                to.trim(),
            ])?);

            lab.link(&["a", "--cut"])?;
            // Nobody here knows it yet, and what is written is not taken any more.
            let said = b.start(&["ferry", "resolve", "--no-forward", "box"])?.end(SHORT)?;
            ensure!(said.exits(3)?.err.contains("a does not answer"), "not said so");
        }
    }

    until("b says that it is broken", Duration::from_secs(40), || {
        Ok(told(&b)?.iter().any(|f| f["connected"] == false).then_some(()))
    })?;
    drop(flood);
    let text = b.ferry(&["migrations"])?.ok()?;
    ensure!(text.contains("BROKEN"), "{text}");

    // It cannot be told, and says what can be done; nothing has changed.
    let said = b.start(&["ferry", "resolve", "--no-forward", "box"])?.end(SHORT)?.exits(3)?;
    for words in ["its home cannot be told", "a", "--forward never"] {
        ensure!(said.err.contains(words), "no {words:?} in {said}");
    }

    let said = b.start(&["ferry", "migrate", "box", "c"])?.end(SHORT)?.exits(3)?;
    for words in ["a keeps the container's address", "--forward never"] {
        ensure!(said.err.contains(words), "no {words:?} in {said}");
    }
    ensure!(told(&b)?.len() == 1, "{:?}", told(&b)?);
    let status = facts(&b)?.containers["box"].status.clone();
    ensure!(status == "running", "on b it is {status}");
    if death == Death::Killed {
        // Nor is home there to start this one again.
        for pid in forwarders(&b, "away")? {
            b.sh(&format!("kill -KILL {pid}"))?;
        }
        ensure!(told(&b)?.iter().any(|f| f["dead"] == true), "{:?}", told(&b)?);
    }

    let said = b.ferry(&["migrate", "--forward", "never", "box", "d"])?.exits(0)?;
    probe.is_content().map_err(|e| format!("{said}\n{e}"))?;
    exactly_one_copy(&container, &d, &b)?;
    over("it is where its address belongs", &[&b, &d])?;

    // It comes back, and is told there what is over.
    if death == Death::Cable {
        lab.link(&["a", "--mend"])?;
    }
    probe.is_content()?;
    a.ferry(&["resolve", "--no-forward", "box"])?.exits(0)?;
    over("home knows it", &[&a])?;
    probe.is_content()?;

    exactly_one_copy(&container, &d, &a)
}

/// Home comes up again and knows nothing any more: the container comes back to it as to any host in
/// its address's network. Or it ends where it is, and nothing is left there.
fn home_rebooted(lab: &Lab) -> Outcome {
    let [a, b] = ["a", "b"].map(|name| lab.host(name));
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    a.sh(&format!("ip -n box route add default via {}", lab.address(1)))?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let goes_and_home_forgets = || -> Outcome {
        a.ferry(&["migrate", "box", "b"])?.exits(0)?;
        Probe::start(lab, &container, 1)?.is_content()?;
        let all = [forwarders(&a, "home")?, forwarders(&a, "work")?].concat();
        let list: Vec<String> = all.iter().map(i32::to_string).collect();

        // What is in memory goes, and with it the last name of the kept namespace.
        a.sh(&format!(
            "kill -KILL {0}; kill -KILL $(pgrep -x ssh)
             for pid in {0}; do while kill -0 $pid 2>/dev/null; do sleep 0.01; done; done
             umount -l /run/ferry-forward/*/network; rm -r /run/ferry-forward",
            list.join(" ")
        ))?;

        until("b says that it is broken", Duration::from_secs(40), || {
            Ok(told(&b)?.iter().any(|f| f["connected"] == false).then_some(()))
        })?;
        ensure!(told(&a)?.is_empty(), "a tells of what it cannot know: {:?}", told(&a)?);
        Ok(())
    };

    goes_and_home_forgets()?;
    let said = b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    probe.is_content().map_err(|e| format!("{said}\n{e}"))?;
    exactly_one_copy(&container, &a, &b)?;
    over("it is at home", &[&a, &b])?;

    goes_and_home_forgets()?;
    drop(probe);
    b.sh("ferry kill box KILL")?;

    over("it has ended", &[&a, &b])
}

/// A link of a home's is cut between the commit and the moment at which it is told that frames are to
/// take it: it is made again all the same.
fn cut_at_the_commit(lab: &Lab) -> Outcome {
    // First the destination's cable; then home's, which the two others do without.
    broken_at_the_commit(lab, [Some("b"), Some("a")])
}

/// The same when the process that forwards is killed then, and started again.
fn killed_at_the_commit(lab: &Lab) -> Outcome {
    broken_at_the_commit(lab, [None, None])
}

/// From `a` to `b`, and from there to `c`; whose cable is cut, if anybody's.
fn broken_at_the_commit(lab: &Lab, cables: [Option<&str>; 2]) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    for (from, to, cable) in [(&a, &b, cables[0]), (&b, &c, cables[1])] {
        let step = |e: String| format!("{} to {}: {e}", from.name, to.name);
        let hold = "FERRY_FAULT=source.committed:hold";
        let migration = from.start(&["env", hold, "ferry", "migrate", "box", to.name])?;
        let held = from.path("/run/ferry-fault/source.committed")?;
        until("it is committed", SHORT, || Ok(held.exists().then_some(())))?;
        let links = || -> Outcome<Vec<String>> {
            let works = forwarders(&a, "work")?;
            let all =
                works.iter().map(|pid| a.exec(&["pgrep", "-x", "ssh", "-P", &pid.to_string()]));
            let all = all.collect::<Outcome<Vec<_>>>()?;
            Ok(all.iter().flat_map(|o| o.out.lines()).map(str::to_owned).collect())
        };

        let before = links()?;
        ensure!(!before.is_empty(), "home has no link");
        match cable {
            Some(cable) => lab.link(&[cable, "--cut"])?,
            None => {
                for pid in forwarders(&a, "work")? {
                    a.sh(&format!("kill -KILL {pid}"))?;
                }
                until("it is started again", SHORT, || {
                    let status = told(&a)?.first().cloned().unwrap_or_default();
                    Ok((status["dead"] == false).then_some(()))
                })?;
            }
        }

        until("home has given its links up", Duration::from_secs(40), || {
            Ok(links()?.iter().all(|link| !before.contains(link)).then_some(()))
        })
        .map_err(step)?;
        std::fs::remove_file(&held).map_err(|e| e.to_string())?;

        // The two of the migration need each other; home may be late.
        let (early, late) = (cable.filter(|c| *c == to.name), cable.filter(|c| *c != to.name));
        early.map_or(Ok(()), |cable| lab.link(&[cable, "--mend"]))?;
        migration.end(LONG)?.exits(0).map_err(step)?;
        late.map_or(Ok(()), |cable| lab.link(&[cable, "--mend"]))?;
        abroad(&container, &a, to, if to.name == "b" { &c } else { &b }).map_err(step)?;

        // The senders' timers have doubled meanwhile.
        let again = || Ok(probes.iter_mut().all(|p| p.answers_again().is_ok()).then_some(()));
        until("all are answered", Duration::from_secs(60), again).map_err(step)?;
        all_content(&mut probes).map_err(step)?;
    }

    c.ferry(&["migrate", "box", "a"])?.exits(0)?;
    all_content(&mut probes)?;
    exactly_one_copy(&container, &a, &c)
}

/// A migration that is given up leaves everything as it was, wherever the container is.
fn given_up(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    let fails = |from: &Host, to: &Host, point: &str, deed: &str| -> Outcome {
        let fault = format!("FERRY_FAULT={point}:{deed}");
        let said = from.start(&["env", &fault, "ferry", "migrate", "box", to.name])?.end(LONG)?;
        let wanted = if deed == "kill" { 137 } else { 1 };
        said.exits(wanted).map(drop).map_err(|e| format!("{point}:{deed}: {e}"))
    };

    for (point, deed) in [
        ("forward.established", "error"),
        ("forward.established", "kill"),
        ("forward.joined", "error"),
        ("dump.frozen", "kill"),
        ("source.commit", "error"),
        ("source.commit", "kill"),
    ] {
        fails(&a, &b, point, deed)?;
        until("nobody forwards", SHORT, || {
            let kept = a.sh("ls /run/ferry-forward 2>/dev/null || true")?;
            Ok((kept.is_empty() && forwarders(&a, "")?.is_empty()).then_some(()))
        })
        .map_err(|e| format!("{point}:{deed}: {e}"))?;
        exactly_one_copy(&container, &a, &b).map_err(|e| format!("{point}:{deed}: {e}"))?;
        all_content(&mut probes).map_err(|e| format!("{point}:{deed}: {e}"))?;
    }

    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    for (from, to, other) in [(&b, &c, &c), (&b, &a, &c)] {
        for (point, deed) in
            [("dump.frozen", "error"), ("source.commit", "error"), ("source.commit", "kill")]
        {
            let step = |e: String| format!("{} to {}, {point}:{deed}: {e}", from.name, to.name);
            fails(from, to, point, deed).map_err(step)?;
            all_content(&mut probes).map_err(step)?;
            abroad(&container, &a, &b, other).map_err(step)?;
        }
    }

    b.ferry(&["migrate", "box", "c"])?.exits(0)?;
    all_content(&mut probes)?;
    abroad(&container, &a, &c, &b)?;
    c.ferry(&["migrate", "box", "a"])?.exits(0)?;
    all_content(&mut probes)?;

    exactly_one_copy(&container, &a, &c)
}

/// Home does not know the next host: the one where the container was stays on the way, and only
/// until it goes on.
fn through_the_last_host(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    a.sh("sed -i '/ c$/d' /etc/hosts")?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    b.ferry(&["migrate", "box", "c"])?.exits(0)?;
    all_content(&mut probes)?;
    let said = told(&a)?;
    ensure!(said.len() == 1 && said[0]["to"] == "c (through b)", "{said:?}");
    c.ferry(&["migrate", "box", "b"])?.exits(0)?;
    all_content(&mut probes)?;
    abroad(&container, &a, &b, &c)?;
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    all_content(&mut probes)?;
    exactly_one_copy(&container, &a, &b)
}

/// Nobody forwards on these hosts any more.
fn over(what: &str, hosts: &[&Host]) -> Outcome {
    until(&format!("{what}: nobody forwards"), Duration::from_secs(40), || {
        for host in hosts {
            let kept = host.sh("ls /run/ferry-forward 2>/dev/null || true")?;
            if !(kept.is_empty() && forwarders(host, "")?.is_empty() && told(host)?.is_empty()) {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
}

/// It ends when the operator says so, on either host, and when the container ends. One that has lost
/// its address so can still go where the address is.
fn ended(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    for host in [&a, &b] {
        a.ferry(&["migrate", "box", "b"])?.exits(0)?;
        all_content(&mut probes)?;
        abroad(&container, &a, &b, &c)?;
        host.ferry(&["resolve", "--no-forward", "box"])?.exits(0)?;
        over(host.name, &[&a])?;
        let silent = a.exec(&["ping", "-c", "1", "-W", "1", &lab.address(ADDRESS)])?;
        ensure!(silent.code != 0, "somebody still answers for the address");
        let said = a.ferry(&["resolve", "--no-forward", "box"])?;
        ensure!(said.code == 3 && said.err.contains("no address of a container box"), "{said}");
        b.ferry(&["migrate", "box", "a"])?.exits(0)?;
        all_content(&mut probes)?;
        exactly_one_copy(&container, &a, &b)?;
    }
    drop(probes);
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    abroad(&container, &a, &b, &c)?;
    b.sh("ferry kill box KILL")?;
    over("the container has ended", &[&a, &b])
}

/// It ends when the last connection has ended, and not before; a further migration does not forget.
fn until_idle(lab: &Lab) -> Outcome {
    let (container, [a, b, c]) = start(lab)?;
    let mut probes = probes(lab, &container)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    b.ferry(&["resolve", "--no-forward", "--when-idle=2s", "box"])?.exits(0)?;
    b.ferry(&["migrate", "box", "c"])?.exits(0)?;
    abroad(&container, &a, &c, &b)?;

    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        all_answered(&mut probes)?;
    }
    let said = told(&a)?;
    ensure!(said.len() == 1 && said[0]["until_idle"] == 2, "{said:?}");
    ensure!(said[0]["connections"].as_u64() >= Some(10), "{said:?}");

    let text = a.ferry(&["migrations"])?.ok()?;
    ensure!(text.contains("ends when there was none for 2 s"), "{text}");
    drop(probes);
    over("it is idle", &[&a])?;
    let silent = a.exec(&["ping", "-c", "1", "-W", "1", &lab.address(ADDRESS)])?;
    ensure!(silent.code != 0, "somebody still answers for the address");

    // The container runs on, and goes where its address is.
    c.ferry(&["migrate", "box", "a"])?.exits(0)?;
    Probe::start(lab, &container, 2)?.is_content()?;

    exactly_one_copy(&container, &a, &c)
}

/// The operator's word: forwarded although it could move; then moved from abroad, and nothing is left
/// at home. Both families.
fn as_wished(lab: &Lab) -> Outcome {
    let [a, b, d] = ["a", "b", "d"].map(|name| lab.host(name));
    let container =
        Container::networked("counter").with(&["--arg", "--listen", "--arg", "[::]:7000"]);
    container.make(&a)?;
    container.make_network(lab, &a)?;
    let net = lab.address(0).split('.').nth(2).unwrap_or_default().to_owned();
    let v6 = format!("fd77:{net}::{ADDRESS}");
    a.sh(&format!("ip -n box addr add {v6}/64 dev box0 nodad"))?;
    container.run_on(&a)?;

    let mut probes =
        [Probe::start(lab, &container, 5)?, Probe::to(lab, &format!("[{v6}]:7000"), 5)?];
    a.ferry(&["migrate", "--forward", "always", "box", "d"])?.exits(0)?;
    all_content(&mut probes)?;
    abroad(&container, &a, &d, &b)?;
    d.ferry(&["migrate", "box", "a"])?.exits(0)?;
    all_content(&mut probes)?;
    exactly_one_copy(&container, &a, &d)?;

    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    all_content(&mut probes)?;
    abroad(&container, &a, &b, &d)?;
    b.ferry(&["migrate", "--forward", "never", "box", "d"])?.exits(0)?;
    all_content(&mut probes)?;
    exactly_one_copy(&container, &d, &b)?;
    over("it has moved", &[&a, &b, &d])?;

    exactly_one_copy(&container, &d, &a)
}
