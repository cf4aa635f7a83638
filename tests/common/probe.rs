//! ferry-probe: the client that watches, under the control of a trial.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::container::Container;
use super::lab::{Host, Lab};
use super::process::patience;
use super::{Outcome, ensure};

/// A client that says JSON, a line each, and listens to words on its standard input.
pub struct Talk {
    child: Child,
    input: ChildStdin,
    said: Receiver<Value>,
}

const LIMIT: Duration = Duration::from_secs(60);

impl Talk {
    /// Starts it on a host.
    pub fn start(host: &Host, arguments: &[&str]) -> Outcome<Talk> {
        let mut command = host.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|e| e.to_string())?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("the client has no streams".into());
        };
        let (tell, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line)
                    && tell.send(value).is_err()
                {
                    return;
                }
            }
        });
        Ok(Talk { child, input, said })
    }

    /// Says a word.
    pub fn say(&mut self, line: &str) -> Outcome {
        writeln!(self.input, "{line}").map_err(|e| format!("the client does not listen: {e}"))
    }

    /// The next that it says with this key.
    pub fn expect(&mut self, key: &str) -> Outcome<Value> {
        let until = Instant::now() + patience(LIMIT);
        loop {
            match self.said.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(value) if value.get(key).is_some() => return Ok(value),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("the client does not say {key}"));
                }
                Err(RecvTimeoutError::Disconnected) => return Err("the client has ended".into()),
            }
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A probe that holds connections.
pub struct Probe(Talk);

impl Probe {
    /// Connects from the host `client` to a container with an address.
    pub fn start(lab: &Lab, container: &Container, connections: usize) -> Outcome<Probe> {
        Probe::every(lab, container, connections, "2ms")
    }

    /// The same; how often it asks on each connection is told.
    pub fn every(lab: &Lab, container: &Container, count: usize, every: &str) -> Outcome<Probe> {
        Probe::start_on(&lab.host("client"), lab, container, count, every)
    }

    /// Connects from the host `client` to an address and port.
    pub fn to(lab: &Lab, to: &str, connections: usize) -> Outcome<Probe> {
        Probe::to_on(&lab.host("client"), to, connections, "2ms")
    }

    /// The same; how often it asks on each connection is told.
    pub fn to_every(lab: &Lab, to: &str, connections: usize, every: &str) -> Outcome<Probe> {
        Probe::to_on(&lab.host("client"), to, connections, every)
    }

    /// From another host.
    pub fn start_on(
        host: &Host,
        lab: &Lab,
        container: &Container,
        connections: usize,
        every: &str,
    ) -> Outcome<Probe> {
        Probe::to_on(host, &container.server(lab), connections, every)
    }

    /// From the network of a process there.
    pub fn within(host: &Host, pid: &str, to: &str, connections: usize) -> Outcome<Probe> {
        Probe::by(host, &["nsenter", &format!("--net=/proc/{pid}/ns/net")], to, connections, "2ms")
    }

    fn to_on(host: &Host, to: &str, connections: usize, every: &str) -> Outcome<Probe> {
        Probe::by(host, &[], to, connections, every)
    }

    fn by(host: &Host, by: &[&str], to: &str, count: usize, every: &str) -> Outcome<Probe> {
        let (program, count) = ("/srv/shared/bin/ferry-probe", count.to_string());
        let arguments = [program, "--to", to, "--connections", &count, "--every", every];
        let arguments = [by, &arguments].concat();
        let mut probe = Probe(Talk::start(host, &arguments)?);
        probe.0.expect("ready")?;
        // So that every connection has been used before anything happens to it.
        probe.answers_again()?;
        Ok(probe)
    }

    /// Begins a window.
    pub fn mark(&mut self, name: &str) -> Outcome {
        self.0.say(&format!("mark {name}"))?;
        self.0.expect("mark").map(drop)
    }

    /// The window since a mark, or everything (`start`).
    pub fn report(&mut self, since: &str) -> Outcome<Value> {
        self.0.say(&if since == "start" {
            "report".into()
        } else {
            format!("report since {since}")
        })?;
        self.0.expect("worst_pause_ms")
    }

    /// Waits until every connection has had an answer from now on.
    pub fn answers_again(&mut self) -> Outcome {
        self.mark("again")?;
        let until = Instant::now() + patience(Duration::from_secs(20));
        loop {
            let report = self.report("again")?;
            let window = report["window_ms"].as_f64().unwrap_or(0.0);
            let worst = report["per_connection_worst_ms"].as_array().cloned().unwrap_or_default();
            // A connection whose worst gap is shorter than the window has had an answer in it.
            let all = worst.iter().all(|w| w.as_f64().unwrap_or(f64::MAX) < window);
            if window > 20.0 && all && report["answers"].as_u64().unwrap_or(0) >= worst.len() as u64
            {
                return Ok(());
            }
            ensure!(report["connections_lost"] == 0, "connections were lost: {report}");
            ensure!(Instant::now() < until, "the connections have no answer: {report}");
        }
    }

    /// No connection was lost, no answer was wrong, and all of the server's memory is right.
    pub fn is_content(&mut self) -> Outcome {
        self.answers_again()?;
        let report = self.report("start")?;
        ensure!(report["connections_lost"] == 0, "connections were lost: {}", report["lost"]);
        ensure!(report["wrong_answers"] == 0, "answers were wrong: {}", report["wrong"]);
        self.0.say("verify")?;
        let verdict = self.0.expect("verify")?;
        ensure!(verdict["verify"]["bad_pages"] == 0, "the server's memory is damaged: {verdict}");
        ensure!(
            verdict["verify"]["bad_in_threads"] == 0 && verdict["verify"]["bad_table"] == 0,
            "the server's threads are damaged: {verdict}"
        );
        Ok(())
    }

    /// The longest pause since a mark, in milliseconds.
    pub fn worst_pause(&mut self, since: &str) -> Outcome<f64> {
        let report = self.report(since)?;
        report["worst_pause_ms"].as_f64().ok_or_else(|| format!("no pause in {report}"))
    }
}

/// Asks a counter without an address from within its own network namespace: all of its memory
/// must be right. Returns what the probe said of it.
pub fn verify_inside(host: &Host, container: &Container) -> Outcome<Value> {
    let script = format!(
        "pid=$(runc state {} | python3 -c 'import json,sys; print(json.load(sys.stdin)[\"pid\"])')
         nsenter -t $pid -n /srv/shared/bin/ferry-probe --to 127.0.0.1:7000 --connections 3 --for 50ms --verify",
        container.id
    );
    let said = host.sh(&script)?;
    let verdict = said
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .find(|v| v.get("verify").is_some())
        .ok_or_else(|| format!("no verdict: {said}"))?;
    ensure!(verdict["verify"]["bad_pages"] == 0, "memory is damaged: {verdict}");
    Ok(verdict)
}
