//! Who has the container, and what is left over: the assertion that every suite ends with.

use std::time::Duration;

use serde::Deserialize;

use super::container::Container;
use super::lab::{Host, Lab};
use super::process::until;
use super::{Outcome, ensure};

/// What there is on a host.
#[derive(Debug, Deserialize)]
pub struct Facts {
    /// By ID.
    pub containers: std::collections::BTreeMap<String, Status>,
    /// All processes.
    pub processes: Vec<Process>,
    /// Control groups that are told to freeze.
    pub groups: Vec<String>,
    /// What is in `/run/ferry`.
    pub work: Vec<String>,
    /// What is mounted there.
    pub mounts: Vec<String>,
    /// Named network namespaces.
    pub netns: Vec<String>,
    /// Packet filter tables of ours, in any namespace.
    pub tables: Vec<String>,
    /// `ferry migrations --json`.
    pub migrations: Vec<Migration>,
    /// Files of the shared-storage proof.
    pub probes: Vec<String>,
}

/// A container as the runtime sees it.
#[derive(Debug, Deserialize)]
pub struct Status {
    /// `running`, …
    pub status: String,
    /// Its init process.
    pub pid: i32,
    /// `cgroup.freeze` of its group.
    pub frozen: String,
}

/// A process.
#[derive(Debug, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// One letter; `Z` is a zombie.
    pub state: String,
    /// Its command line.
    pub line: String,
}

/// A line of `ferry migrations --json`.
#[derive(Debug, Deserialize)]
pub struct Migration {
    /// Its ID.
    pub migration: String,
    /// The container's.
    pub container: String,
    /// `source` or `destination`.
    pub role: String,
    /// `begun` … `finished`.
    pub state: String,
    /// Whether somebody works on it.
    pub under_way: bool,
}

/// Asks a host.
pub fn facts(host: &Host) -> Outcome<Facts> {
    let answer = host.exec(&["python3", "-c", include_str!("facts.py")])?.ok()?;
    serde_json::from_str(&answer).map_err(|e| format!("{e}: {answer}"))
}

impl Facts {
    /// Anything that a migration must not leave behind; `None` when all is clean.
    fn leftovers(&self) -> Option<String> {
        let working: Vec<&str> = self
            .processes
            .iter()
            .filter(|p| {
                matches!(p.name.as_str(), "ferry" | "criu" | "runc") || p.name.starts_with("runc:")
            })
            .filter(|p| !p.line.contains("receive --listen"))
            .map(|p| if p.line.is_empty() { p.name.as_str() } else { p.line.as_str() })
            .collect();
        let open = self.open();

        let mut found = Vec::new();
        let mut note = |what: &str, empty: bool, list: &dyn std::fmt::Debug| {
            if !empty {
                found.push(format!("{what}: {list:?}"));
            }
        };

        note("processes", working.is_empty(), &working);
        note("/run/ferry", self.work.is_empty(), &self.work);
        note("mounts", self.mounts.is_empty(), &self.mounts);
        note("packet filter", self.tables.is_empty(), &self.tables);
        note("frozen groups", self.groups.is_empty(), &self.groups);
        note("open migrations", open.is_empty(), &open);
        note("probe files", self.probes.is_empty(), &self.probes);

        (!found.is_empty()).then(|| found.join("; "))
    }

    /// Migrations that are not over: the copy of one that is ready is held and does not run.
    pub fn open(&self) -> Vec<&Migration> {
        let over = |m: &&Migration| matches!(m.state.as_str(), "finished" | "aborted");
        self.migrations.iter().filter(|m| !over(m)).collect()
    }

    /// Whether a process of its workload is there.
    pub fn process_of(&self, container: &Container) -> bool {
        let program = match container.workload {
            "stdio" => "stdio-ticker",
            "hostile" => "hostile-tricks",
            "mappings" => "odd-mappings",
            "sleepers" => "sleepers",
            "echo" => "echo-server",
            "script" => "perl",
            "web" => "nginx",
            "crowd" => "crowd-server",
            _ => "counter-server",
        };
        self.processes.iter().any(|p| p.line.contains(&format!("/{program}")) && p.state != "Z")
    }
}

/// The container runs on `here` and nowhere else, and nothing is left of its journey on either
/// side. What is still being cleared away gets ten seconds for it; two copies get none.
pub fn exactly_one_copy(container: &Container, here: &Host, there: &Host) -> Outcome {
    exactly_one_copy_within(Duration::from_secs(10), container, here, there)
}

/// The same in another time.
pub fn exactly_one_copy_within(
    limit: Duration,
    container: &Container,
    here: &Host,
    there: &Host,
) -> Outcome {
    let mut last = String::new();
    let settled = until("exactly one copy", limit, || {
        let (with, without) = (facts(here)?, facts(there)?);
        ensure!(
            !(with.process_of(container)
                && without.process_of(container)
                && [&with, &without].iter().all(|f| f.groups.is_empty() && f.open().is_empty())),
            "TWO COPIES: {with:#?}\n{without:#?}"
        );
        last = complaint(container, here, &with, there, &without).unwrap_or_default();
        Ok(last.is_empty().then_some(()))
    });
    settled.map_err(|e| format!("{e}\n{last}"))
}

fn complaint(
    container: &Container,
    here: &Host,
    with: &Facts,
    there: &Host,
    without: &Facts,
) -> Option<String> {
    let mut found = Vec::new();
    match with.containers.get(container.id) {
        Some(status) if status.status == "running" => {
            if status.frozen != "0" {
                found.push(format!("on {} it is frozen ({:?})", here.name, status.frozen));
            }
        }
        other => found.push(format!("on {} it should run, and is {other:?}", here.name)),
    }

    if !with.process_of(container) {
        found.push(format!("on {} it has no process", here.name));
    }
    if let Some(status) = without.containers.get(container.id) {
        found.push(format!("on {} there is still a container {status:?}", there.name));
    }

    if without.process_of(container) {
        found.push(format!("on {} there is still a process", there.name));
    }
    if container.networked && !with.netns.iter().any(|n| n == "box") {
        found.push(format!("on {} its namespace is gone", here.name));
    }

    if without.netns.iter().any(|n| n == "box") {
        found.push(format!("on {} its namespace is still there", there.name));
    }
    for (host, facts) in [(here, with), (there, without)] {
        if let Some(text) = facts.leftovers() {
            found.push(format!("left on {}: {text}", host.name));
        }
    }

    (!found.is_empty()).then(|| found.join("\n"))
}

/// The two hosts between which containers go.
pub fn pair(lab: &Lab) -> (Host, Host) {
    (lab.host("a"), lab.host("b"))
}
