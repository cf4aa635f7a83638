//! Connections of every kind go along, many of them, and none is lost.

use std::collections::BTreeMap;
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, LONG, Lab, in_tree};
use crate::common::probe::{Probe, Talk};
use crate::common::process::Output;
use crate::common::suite::{self, in_lab};
use crate::common::wire::Wire;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);
/// What Ferry itself may have in memory.
const MOST_KIB: u64 = 64 << 10;

/// The suite.
pub fn trials() -> Vec<Trial> {
    let full = suite::full();
    let (each, all) = if full { (200, 10_000) } else { (10, 2_000) };
    vec![
        in_lab("connections::every_kind", LIMIT, move |lab| every_kind(lab, each)),
        in_lab("connections::many", 2 * LIMIT, move |lab| many(lab, all)),
        in_lab("connections::of_several_processes", LIMIT, of_several_processes),
        in_lab("connections::closed_right_after", LIMIT, closed_right_after),
    ]
}

/// How many connections Ferry has carried by itself.
pub fn carried(said: &Output) -> Outcome<u64> {
    let mut lines = said.out.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let report = lines.next_back().ok_or("no report")?;
    Ok(report["connections"].as_u64().unwrap_or(0))
}

/// nginx, as it is on the hosts.
fn web(host: &Host) -> Outcome<Container> {
    let base = host.path("/")?;
    Ok(Container::networked("web").with(&["--base", &base.to_string_lossy()]))
}

/// Visitors of nginx who stay: its workers have their connections, each with an epoll of its own.
fn of_several_processes(lab: &Lab) -> Outcome {
    const VISITORS: usize = 300;
    let (a, b) = pair(lab);
    let container = web(&a)?;
    container.start(lab, &a)?;
    let wire = Wire::watch(lab)?;
    std::fs::copy(in_tree("tests/migrate/visitors.py"), a.path("/srv/shared/visitors.py")?)
        .map_err(|e| e.to_string())?;
    let (address, count) = (lab.address(ADDRESS), VISITORS.to_string());

    let arguments = ["python3", "/srv/shared/visitors.py", &address, &count];
    let mut visitors = Talk::start(&lab.host("client"), &arguments)?;
    ensure!(visitors.expect("ready")?["ready"] == true, "not all are served");
    let mut are_served = || -> Outcome {
        visitors.say("ask")?;
        let said = visitors.expect("wrong")?;
        ensure!(said["wrong"] == 0, "{said}");
        Ok(())
    };

    for at in ["extract.taken:error", "source.commit:error"] {
        let fault = format!("FERRY_FAULT={at}");
        a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?.end(LONG)?.exits(1)?;
        exactly_one_copy(&container, &a, &b)?;
        are_served().map_err(|e| format!("after {at}: {e}"))?;
    }

    for (from, to) in [(&a, &b), (&b, &a)] {
        let said = from.ferry(&["migrate", "--json", "box", to.name])?.exits(0)?;
        let carried = carried(&said)?;
        ensure!(carried as usize >= VISITORS * 9 / 10, "only {carried} were carried");
        exactly_one_copy(&container, to, from)?;
        are_served()?;
    }

    wire.is_calm(VISITORS)
}

/// Nobody else keeps open what the container closes: its peers hear of it at once, where it was and
/// where it is.
fn closed_right_after(lab: &Lab) -> Outcome {
    const VISITORS: usize = 100;
    let (a, b) = pair(lab);
    let container = web(&a)?;
    container.start(lab, &a)?;
    let client = lab.host("client");
    let established = "ss -Htn state established 'dport = :80' | wc -l";
    let script = format!(
        "import socket, sys
all = [socket.create_connection(('{}', 80), timeout=20) for _ in range({VISITORS})]
print('{{\"ready\": true}}', flush=True)
ends = [s.recv(1) for s in all]
print('{{\"ended\": %d}}' % ends.count(b''), flush=True)",
        lab.address(ADDRESS)
    );

    let here =
        [("extract.kept:error", 1, &a), ("source.commit:error", 1, &a), ("none:none", 0, &b)];
    for (fault, code, host) in here {
        let mut all = Talk::start(&client, &["python3", "-c", &script])?;
        all.expect("ready")?;
        let fault = format!("FERRY_FAULT={fault}");
        a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?.end(LONG)?.exits(code)?;
        ensure!(client.sh(established)?.trim() == VISITORS.to_string(), "some have ended before");

        // Its workers end, with all that they have; the master makes others.
        host.sh("pid=$(runc state box | grep -o '\"pid\": [0-9]*' | grep -o '[0-9]*')
                 kill -KILL $(cat /proc/$pid/task/$pid/children)")?;
        let said = all.expect("ended").map_err(|e| format!("after {fault}: {e}"))?;
        ensure!(said["ended"] == VISITORS, "after {fault}: {said}");
    }

    Ok(())
}

/// Most of them idle, given up and carried there and back: each has its right answers afterwards, and
/// nothing on the wire says that one is over.
fn many(lab: &Lab, all: usize) -> Outcome {
    const BUSY: usize = 200;
    let (a, b) = pair(lab);
    let container = Container::networked("connections");
    container.start(lab, &a)?;
    let wire = Wire::watch(lab)?;
    let mut idle = Probe::every(lab, &container, all - BUSY, "3s")?;
    let mut busy = Probe::every(lab, &container, BUSY, "20ms")?;
    let mut are_content = || idle.answers_again().and_then(|()| busy.is_content());
    let error = ["env", "FERRY_FAULT=source.commit:error", "ferry", "migrate", "box", "b"];

    a.start(&error)?.end(LONG)?.exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    are_content().map_err(|e| format!("after the rollback: {e}"))?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let said = from.ferry(&["migrate", "--json", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        are_content()?;
        let mut lines = said.out.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        let report = lines.next_back().ok_or("no report")?;
        let peak = report["peak_kib"].as_u64().unwrap_or(u64::MAX);
        ensure!(peak <= MOST_KIB, "Ferry had {peak} KiB on the source");

        let carried = carried(&said)? as usize;
        ensure!(carried >= (all - BUSY) * 9 / 10, "only {carried} were carried by Ferry itself");
        println!("    frozen {} ms, CRIU {}", report["frozen_ms"], report["criu_ms"]);
    }

    idle.is_content()?;
    wire.is_calm(all)
}

/// How many sockets of the container are in each state, and how many of them have something in
/// their queues.
fn states(host: &Host) -> Outcome<BTreeMap<String, (usize, usize)>> {
    let mut found = BTreeMap::<_, (usize, usize)>::new();
    for line in host.sh("ip netns exec box ss -Htan 'sport = :7100'")?.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if let [state, received, unsent, ..] = words[..] {
            let counts = found.entry(state.to_owned()).or_default();
            counts.0 += 1;
            counts.1 += usize::from(received != "0" || unsent != "0");
        }
    }
    Ok(found)
}

/// Idle, busy, half-closed, with data in either queue or both, closing; and visitors who come and
/// go all the time, so that there are handshakes, a backlog, and farewells at any moment.
fn every_kind(lab: &Lab, each: usize) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("crowd");
    container.start(lab, &a)?;
    let (address, count) = (lab.address(ADDRESS), each.to_string());
    let arguments = ["/srv/shared/bin/ferry-crowd", "--to", &address, "--each", &count];
    let mut crowd = Talk::start(&lab.host("client"), &arguments)?;
    crowd.expect("ready")?;

    let before = states(&a)?;
    for state in ["ESTAB", "CLOSE-WAIT", "FIN-WAIT-1", "FIN-WAIT-2", "LAST-ACK", "CLOSING"] {
        let n = before.get(state).map_or(0, |counts| counts.0);
        ensure!(n >= each, "{n} connections in {state}: {before:?}");
    }

    ensure!(before["ESTAB"].1 >= 3 * each, "too few with full queues: {before:?}");
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        let visits = |crowd: &mut Talk| -> Outcome<u64> {
            crowd.say("visits")?;
            crowd.expect("visits")?["visits"].as_u64().ok_or_else(|| "no number".to_owned())
        };
        let came = visits(&mut crowd)?;
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        ensure!(visits(&mut crowd)? > came, "nobody came meanwhile");
    }

    let after = states(&b)?;
    // A FIN that came while they were away counts as one in the queue.
    let same = before.iter().all(|(state, n)| after.get(state).is_some_and(|m| m.0 == n.0));
    ensure!(same && before.len() == after.len(), "before {before:?}, after {after:?}");
    crowd.say("finish")?;
    let report = crowd.expect("problems")?;
    ensure!(report["problems"] == Value::Array(Vec::new()), "{report:#}");

    let whole = report["whole"].as_object().ok_or("no kinds")?;
    ensure!(whole.len() == 11 && whole.values().all(|n| *n == each), "{report:#}");
    ensure!(report["echoes"].as_u64() > Some(0), "{report:#}");
    println!("    {report}");

    Ok(())
}
