//! Published ports: connections that live by the first host's address translation go on when an engine's
//! container moves, and new ones are made on both hosts.

use serde_json::Value;

use crate::common::lab::{Host, Lab, SHORT};
use crate::common::probe::{Probe, Talk};
use crate::common::process::until;
use crate::common::{Outcome, ensure};

const CONNECTIONS: usize = 5;
const PORT: u16 = 8080;

/// What comes by published ports.
pub struct Clients {
    probes: Vec<Probe>,
}

fn port_of(host: &Host) -> Outcome<String> {
    let address = host.sh("getent hosts $(hostname) | cut -d ' ' -f 1")?;
    Ok(format!("{}:{PORT}", address.trim()))
}

/// Clients of the port of `a`. One on `a` itself would not go along, and that is said.
pub fn connect(lab: &Lab) -> Outcome<Clients> {
    let a = lab.host("a");
    let mut held = Probe::to(lab, &port_of(&a)?, CONNECTIONS)?;
    refused(&a, &["--forward", "never", "web", "b"], "connections depend on its host")?;
    let to = format!("127.0.0.1:{PORT}");
    let here = ["/srv/shared/bin/ferry-probe", "--to", &to, "--connections", "1"];
    let mut here = Talk::start(&a, &here)?;
    here.expect("ready")?;
    refused(&a, &["web", "b"], "a itself is at its other end")?;
    drop(here);
    until("that one has ended", SHORT, || {
        Ok((a.ferry(&["check", "web", "b"])?.code == 0).then_some(()))
    })?;
    held.is_content()?;
    Ok(Clients { probes: vec![held] })
}

fn refused(host: &Host, arguments: &[&str], words: &str) -> Outcome {
    let said = host.ferry(&[&["check"], arguments].concat())?;
    ensure!(said.code == 3 && said.to_string().contains(words), "wanted {words:?}: {said}");
    Ok(())
}

fn told(host: &Host) -> Outcome<Vec<Value>> {
    let text = host.ferry(&["migrations", "--json"])?.ok()?;
    let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).map_err(|e| e.to_string()));
    let all = lines.collect::<Outcome<Vec<_>>>()?;
    Ok(all.iter().map(|m| m["forward"].clone()).filter(|f| !f.is_null()).collect())
}

impl Clients {
    /// All that have connected have been answered, and lost nothing.
    pub fn are_content(&mut self) -> Outcome {
        self.probes.iter_mut().try_for_each(Probe::is_content)
    }

    /// The container is on `b`: they go on, and others come on both hosts. The processes that forward may die.
    /// `pid` asks the engine there for its first process.
    pub fn go_on(&mut self, lab: &Lab, pid: impl Fn(&Host) -> Outcome<String>) -> Outcome {
        let (a, b) = (lab.host("a"), lab.host("b"));
        self.are_content()?;

        // What it begins itself goes by the other host's bridge, whatever comes and goes meanwhile.
        let client = lab.host("client").sh("getent hosts $(hostname) | cut -d ' ' -f 1")?;
        let inside = format!("nsenter --net=/proc/{}/ns/net", pid(&b)?.trim());
        b.sh(&format!("{inside} ping -c 1 -W 5 {}", client.trim()))?;
        for host in [&a, &b] {
            self.probes.push(Probe::to(lab, &port_of(host)?, CONNECTIONS)?);
        }

        self.are_content()?;
        // Those of `b` are not forwarded.
        until("it is told how many there are", SHORT, || {
            let right = |f: &Value| f["to"] == "b" && f["connections"] == 2 * CONNECTIONS;
            Ok(told(&a)?.iter().any(right).then_some(()))
        })
        .map_err(|e| format!("{e}: {:?}", told(&a)))?;

        refused(&b, &["web", "a"], "its connections are forwarded from a")?;
        // Whoever lists them must not stumble over what is Ferry's.
        for host in [&a, &b] {
            ensure!(host.sh("nft list ruleset")?.contains("ferry-published-"), "{}", host.name);
        }

        for (host, process) in [(&a, "work"), (&b, "away")] {
            host.sh(&format!("kill -9 $(pgrep -f '[_]_guard forward {process}')"))?;
            self.are_content().map_err(|e| format!("{process} was killed: {e}"))?;
        }

        Ok(())
    }

    /// It ends, at once or when they are idle: nothing is left on either host, and the container has no
    /// connection of `a` any more; those of `b` go on.
    pub fn end(
        mut self,
        lab: &Lab,
        by: &'static str,
        arguments: &[&str],
        pid: impl Fn(&Host) -> Outcome<String>,
    ) -> Outcome {
        let (a, b) = (lab.host("a"), lab.host("b"));
        lab.host(by).ferry(&[&["resolve", "--no-forward"], arguments].concat())?.exits(0)?;
        let mut there = self.probes.pop().ok_or("nobody has connected there")?;
        if arguments.iter().any(|argument| argument.starts_with("--when-idle")) {
            self.probes.clear();
        }
        [&a, &b].into_iter().try_for_each(gone)?;
        let inside = format!("nsenter --net=/proc/{}/ns/net", pid(&b)?.trim());
        let left = b.sh(&format!("{inside} ss -Htn state established sport = :7000"))?;
        ensure!(left.lines().count() == CONNECTIONS, "it has others than those of b: {left}");
        there.is_content()
    }
}

/// Nothing of a forwarding is left on a host.
pub fn gone(host: &Host) -> Outcome {
    let left = || {
        host.sh("ls -A /run/ferry-forward 2>/dev/null || true
                 nft list tables | grep ferry || true
                 ip -br link | grep -E '^(fy|ferry)' || true
                 pgrep -f '[_]_guard forward' || true")
    };
    until("nothing of it is left", SHORT, || Ok(left()?.trim().is_empty().then_some(())))
        .map_err(|e| format!("on {}: {e}: {}", host.name, left().unwrap_or_default()))
}

/// Given up at its last moment: it stays, and its clients notice nothing.
pub fn stays(lab: &Lab, clients: &mut Clients) -> Outcome {
    let a = lab.host("a");
    let said =
        a.exec(&["env", "FERRY_FAULT=source.commit:error", "ferry", "migrate", "web", "b"])?;
    ensure!(said.code == 1, "{said}");
    clients.are_content()?;
    [a, lab.host("b")].iter().try_for_each(gone)
}
