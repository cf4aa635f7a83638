//! Memory of every kind: each mapping, its flags and its bytes are after a migration what they were after
//! one in which CRIU has seen all of it.

use std::collections::BTreeSet;
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, Lab, SHORT};
use crate::common::process::{until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(180);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("mappings::hidden_or_not_they_are_the_same", LIMIT, hidden_or_not),
        in_lab("mappings::shared_before_the_freeze", LIMIT, shared_before_the_freeze),
        in_lab("mappings::shared_that_goes_back", LIMIT, shared_that_goes_back),
        in_lab("mappings::shared_in_its_group", LIMIT, shared_in_its_group),
        in_lab("mappings::advice_that_changes_all_the_time", LIMIT, advice_that_changes),
    ]
}

/// How CRIU is made to see all of it: nothing is hidden, or the shim fails when it has put files in the place
/// of smaps.
const SHOWN: [&str; 2] = ["FERRY_FAULT=dump.hide:error", "FERRY_FAULT=shim.covered:error"];

fn start(lab: &Lab, host: &Host, options: &[&str]) -> Outcome<Container> {
    let container = Container::plain("mappings").with(options);
    container.start(lab, host)?;
    until("it has all its memory", SHORT, || {
        let path = host.path(&format!("{}/rootfs/ready", container.bundle))?;
        Ok(path.exists().then_some(()))
    })?;
    Ok(container)
}

/// The mappings of its processes, a line each, as smaps has them, without what only tells of the moment.
fn mappings(host: &Host) -> Outcome<BTreeSet<String>> {
    // By their order: which number a child gets, depends on when threads begin.
    let text =
        host.sh("n=0; for pid in $(runc ps -f json box | tr '[],' '\\n\\n\\n' | sort -n); do
             n=$((n + 1)); echo \"process $n\"
             cat /proc/$pid/smaps
         done")?;
    let (mut found, mut process, mut line) = (BTreeSet::new(), "", String::new());

    for one in text.lines() {
        if one.starts_with("process ") {
            process = one;
        } else if let Some(flags) = one.strip_prefix("VmFlags:") {
            let of_the_moment = ["sd", "uw", "ac", "gu"];
            let flags: Vec<&str> = flags
                .split_ascii_whitespace()
                .filter(|flag| !of_the_moment.contains(flag))
                .collect();
            found.insert(format!("{process} {line} {}", flags.join(" ")));
        } else if one
            .split_once('-')
            .is_some_and(|(start, _)| u64::from_str_radix(start, 16).is_ok())
        {
            // Files are other ones each time, and so are their numbers: range, access, offset, and a name.
            let mut parts = one.split_ascii_whitespace();
            let head: Vec<&str> = parts.by_ref().take(3).collect();
            let name = parts.skip(2).collect::<Vec<_>>().join(" ");
            // CRIU makes memfds of shared memory that it sees, and calls them in two ways.
            let name = name.replace("/memfd:/dev/zero ", "/memfd: ");
            let name = name.replace("/memfd: ", "/dev/zero ");
            line = format!("{} {name}", head.join(" "));
        }
    }

    ensure!(found.len() > 50, "{text}");
    Ok(found)
}

/// What it says of its memory.
fn is_right(host: &Host, container: &Container) -> Outcome {
    let path = host.path(&format!("{}/rootfs/verdict", container.bundle))?;
    let _ = std::fs::remove_file(&path);
    host.exec(&["runc", "kill", "box", "USR1"])?.exits(0)?;
    let said =
        until("it has looked at its memory", SHORT, || Ok(std::fs::read_to_string(&path).ok()))?;
    let right = said.matches("pages are right").count() == 2 && said.ends_with("flips: 0 wrong\n");
    ensure!(right, "{said}");
    Ok(())
}

/// Moves a fresh one; what its mappings were before and are after.
fn moved(lab: &Lab, environment: &str) -> Outcome<([BTreeSet<String>; 2], Value)> {
    let (a, b) = pair(lab);
    let container = start(lab, &a, &[])?;
    let before = mappings(&a)?;
    let options = ["--json", "--verify", "--compress", "none", "box", "b"];
    let said = a.exec(&[&["env", environment, "ferry", "migrate"], &options[..]].concat())?;
    let said = said.exits(0)?;
    let last = said.out.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(last).map_err(|e| format!("{e}: {said}"))?;
    let after = mappings(&b)?;
    is_right(&b, &container)?;
    exactly_one_copy(&container, &b, &a)?;
    // Addresses are the same for the next one, and nothing else is left.
    b.sh("runc delete -f box")?;
    a.sh("rm -rf /srv/shared/box && ferry resolve --keep box >/dev/null 2>&1 || :")?;
    Ok(([before, after], report))
}

fn hidden_or_not(lab: &Lab) -> Outcome {
    let (hidden, report) = moved(lab, "FERRY_FAULT=none")?;
    let pages = report["hidden_pages"].as_u64().unwrap_or(0);
    ensure!(pages > 10_000, "{report}");
    ensure!(report["verified_pages"].as_u64().unwrap_or(0) > pages, "{report}");
    for way in SHOWN {
        let (shown, report) = moved(lab, way)?;
        ensure!(report["hidden_pages"].is_null(), "it was hidden: {report}");
        for (i, when) in ["before", "after"].iter().enumerate() {
            let differ: Vec<_> = shown[i].symmetric_difference(&hidden[i]).take(20).collect();
            ensure!(differ.is_empty(), "{way}, {when}: {differ:#?}");
        }
    }
    Ok(())
}

/// There and back and there, while two processes write to it, with and without waiting for the last page of what
/// is private: it is what a program makes, wherever it is mapped, and no copy of CRIU's.
fn shared_before_the_freeze(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab, &a, &["--arg", "--share"])?;
    let before = mappings(&a)?;
    for (from, to, way) in [
        (&a, &b, "--max-rounds=3"),
        (&b, &a, "--postcopy=auto"),
        (&a, &b, "--streams=3"),
        (&b, &a, "--precopy=off"),
        (&a, &b, "--precopy=auto"),
    ] {
        let options = ["migrate", "--json", "--verify", "--compress", "none", way, "box", to.name];
        let said = from.ferry(&options)?.exits(0)?;
        let last = said.out.lines().last().unwrap_or_default();
        let report: Value = serde_json::from_str(last).map_err(|e| format!("{e}: {said}"))?;
        // Four of five pages are populated.
        let pages = report["hidden_pages"].as_u64().unwrap_or(0);
        // Where there are no rounds, CRIU takes it along.
        let rounds = way != "--precopy=off";
        ensure!((pages > 6000) == rounds, "{way}: {report}");
        let after = mappings(to)?;
        let differ: Vec<_> = after.symmetric_difference(&before).take(20).collect();
        ensure!(differ.is_empty(), "{way}: {differ:#?}");
        is_right(to, &container)?;
        exactly_one_copy(&container, to, from)?;
    }

    // Of CRIU's there is nothing: names are what they were.
    let names = b.sh(&format!("cat /proc/{}/maps", init(&b)?))?;
    ensure!(names.contains("/dev/zero (deleted)") && !names.contains("memfd"), "{names}");
    Ok(())
}

/// The container's first process, as the host numbers it.
fn init(host: &Host) -> Outcome<u64> {
    let said = host.exec(&["runc", "state", "box"])?.exits(0)?;
    let state: Value = serde_json::from_str(&said.out).map_err(|e| format!("{e}: {said}"))?;
    Ok(state["pid"].as_u64().unwrap_or(0))
}

/// What comes before the restore is written through a process that is where CRIU is, in the container's control
/// group: whoever writes first is charged. When the container runs, there is none.
fn shared_in_its_group(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab, &a, &["--arg", "--share"])?;
    let script = "#!/bin/sh\nFERRY_FAULT=destination.prepared:hold exec ferry \"$@\"\n";
    write_script(&a.path("/srv/shared/bin/faulty")?, script)?;
    let remote = ["--remote-ferry", "/srv/shared/bin/faulty"];
    let command = [&["ferry", "migrate"][..], &remote, &["--verify", "box", "b"]].concat();
    let mut running = a.start(&command)?;
    let held = b.path("/run/ferry-fault/destination.prepared")?;
    until("it is prepared", SHORT, || {
        ensure!(!running.has_ended(), "it was over before it came there");
        Ok(held.exists().then_some(()))
    })?;

    let holder = "$(pgrep -f '[_]_guard memory')";
    let groups =
        b.sh(&format!("cat /proc/{holder}/cgroup; echo; cat /proc/$(pgrep -x criu)/cgroup"))?;
    let (its, of_criu) = groups.split_once("\n\n").unwrap_or_default();
    let unified = |text: &str| text.lines().find(|line| line.starts_with("0::")).map(str::to_owned);
    ensure!(unified(its).is_some_and(|group| group.len() > 4), "{groups}");
    ensure!(unified(its) == unified(of_criu), "{groups}");
    let bytes = "of what is called /dev/zero, all of the first segment";
    until(bytes, SHORT, || {
        let text = b.sh(&format!("sed -n '/dev.zero/,/^Rss/p' /proc/{holder}/smaps"))?;
        let rss = text.lines().filter_map(|line| line.strip_prefix("Rss:"));
        let rss = rss.filter_map(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok((rss.sum::<u64>() > 6000 << 2).then_some(()))
    })?;

    std::fs::remove_file(&held).map_err(|e| format!("{}: {e}", held.display()))?;
    running.end(LIMIT)?.exits(0)?;
    is_right(&b, &container)?;
    ensure!(b.sh(&format!("echo {holder}"))?.trim().is_empty(), "somebody holds it still");
    exactly_one_copy(&container, &b, &a)
}

/// What is given up leaves all of it as it was, here, and nothing over there.
fn shared_that_goes_back(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab, &a, &["--arg", "--share"])?;
    let before = mappings(&a)?;
    let faulty = "/srv/shared/bin/faulty";
    for fault in [
        "dump.dumped:error",
        "source.transfer:error",
        "source.commit:error",
        "destination.prepared:error",
        "destination.prepared:kill",
        "destination.restore:kill",
        "destination.ready:error",
    ] {
        // Wherever the point is.
        let script = format!("#!/bin/sh\nFERRY_FAULT={fault} exec ferry \"$@\"\n");
        write_script(&a.path(faulty)?, &script)?;
        let variable = format!("FERRY_FAULT={fault}");
        let command = ["env", &variable, "ferry", "migrate", "--remote-ferry", faulty, "box", "b"];
        let said = a.exec(&command)?;
        ensure!(said.code == 1, "{fault}: {said}");
        exactly_one_copy(&container, &a, &b)?;
        let after = mappings(&a)?;
        let differ: Vec<_> = after.symmetric_difference(&before).take(20).collect();
        ensure!(differ.is_empty(), "{fault}: {differ:#?}");
        is_right(&a, &container)?;
        until("nobody holds memory over there", SHORT, || {
            let holders = b.sh("ps -e -o args | grep '[_]_guard memory' || :")?;
            Ok(holders.is_empty().then_some(()))
        })?;
    }
    a.ferry(&["migrate", "--verify", "box", "b"])?.exits(0)?;
    is_right(&b, &container)
}

/// Whichever way it goes: what runs has the advice that was given.
fn advice_that_changes(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = start(lab, &a, &["--arg", "--flip"])?;
    let (mut from, mut to) = (&a, &b);
    for _ in 0..8 {
        let said = from.ferry(&["migrate", "--verify", "box", to.name])?;
        match said.code {
            0 => (from, to) = (to, from),
            1 => ensure!(
                said.err.contains("what the kernel knows of the container's memory"),
                "{said}"
            ),
            _ => return Err(format!("{said}")),
        }
        is_right(from, &container)?;
        exactly_one_copy(&container, from, to)?;
        ensure!(facts(from)?.containers.len() == 1, "there is another one");
    }
    Ok(())
}
