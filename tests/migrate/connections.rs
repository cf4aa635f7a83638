//! Connections of every kind go along, many of them, and none is lost.

use std::collections::BTreeMap;
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, Lab};
use crate::common::probe::Talk;
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![in_lab("connections::every_kind", LIMIT, every_kind)]
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
fn every_kind(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("crowd");
    container.start(lab, &a)?;
    let each = 10;
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
