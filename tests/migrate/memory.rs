//! Memory on its way: what follows after the resume, over broken links too; limits and compression
//! that are kept; and every page right afterwards.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::{Output, Running, until, write_script};
use crate::common::suite::{alone_in_lab, in_lab};
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(90);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("memory::all_of_it_follows", LIMIT, all_of_it_follows),
        in_lab("memory::what_does_not_converge_follows", LIMIT, what_does_not_converge_follows),
        in_lab("memory::or_goes_in_the_freeze", LIMIT, or_goes_in_the_freeze),
        in_lab("memory::links_break_while_it_follows", LIMIT, links_break_while_it_follows),
        in_lab("memory::a_lost_commit_is_brought", LIMIT, a_lost_commit_is_brought),
        in_lab("memory::a_killed_source_is_resolved", LIMIT, a_killed_source_is_resolved),
        in_lab("memory::a_killed_destination_is_followed", LIMIT, a_killed_destination_is_followed),
        in_lab("memory::its_group_is_ended", LIMIT, its_group_is_ended),
        in_lab("memory::by_comparing", LIMIT, by_comparing),
        in_lab("memory::direct_reads", LIMIT, direct_reads),
        in_lab("memory::compared", LIMIT, compared),
        alone_in_lab(&["a", "b", "client"], "memory::compression", LIMIT, compression),
        in_lab("memory::bandwidth", LIMIT, bandwidth),
        in_lab("memory::longer_than_any_limit", LIMIT, longer_than_any_limit),
        in_lab("memory::several_streams", LIMIT, several_streams),
    ]
}

/// The report of `ferry migrate --json`.
fn report(said: &Output) -> Outcome<Value> {
    let last = said.out.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|e| format!("{e}: {said}"))
}

fn migrate(from: &Host, options: &[&str], to: &Host) -> Outcome<Value> {
    let mut all = vec!["migrate", "--json"];
    all.extend(options);
    all.extend(["box", to.name]);
    report(&from.ferry(&all)?.exits(0)?)
}

fn number(report: &Value, path: &str) -> u64 {
    report.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

fn all_of_it_follows(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    // Processes that fork while their memory is not there, and threads that use it.
    let options = ["--arg", "--dirty", "--arg", "2000", "--arg", "--threads", "--arg", "2"];
    let container = Container::networked("counter").with(&options);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let report = migrate(from, &["--precopy", "off"], to)?;
        ensure!(report["settled"] == "post_copy", "{report}");
        let (left, fetched) =
            (number(&report, "/postcopy_pages"), number(&report, "/served/fetched"));
        // What the tasks have given up meanwhile needs no fetching.
        ensure!(left > 16_000 && fetched > 16_000 && fetched <= left + 64, "{report}");
        ensure!(number(&report, "/served/faults") > 0, "nobody waited: {report}");
        probe.is_content()?;
        exactly_one_copy(&container, to, from)?;
    }
    Ok(())
}

const BUSY: &[&str] = &["--arg", "--dirty", "--arg", "50000"];

fn what_does_not_converge_follows(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(BUSY);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let report = migrate(&a, &["--bandwidth", "40M", "--max-downtime", "20ms"], &b)?;
    ensure!(report["settled"] == "post_copy", "{report}");
    ensure!(number(&report, "/postcopy_pages") > 1000, "{report}");
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    ensure!(rounds >= 3, "no rounds before: {report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

fn or_goes_in_the_freeze(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(BUSY);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let options = [
        "--bandwidth",
        "40M",
        "--max-downtime",
        "20ms",
        "--postcopy",
        "never",
        "--max-rounds",
        "3",
    ];
    let report = migrate(&a, &options, &b)?;
    ensure!(report["settled"] == "freeze_anyway", "{report}");
    ensure!(number(&report, "/postcopy_pages") == 0, "{report}");
    let running =
        report["rounds"].as_array().into_iter().flatten().filter(|r| r["frozen"] == false);
    ensure!(running.count() == 3, "{report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

/// A migration whose memory follows for three seconds, when it has begun to.
pub fn following(lab: &Lab, container: &Container) -> Outcome<Running> {
    following_at("20M", lab, container)
}

/// The same at another rate: for what a slow machine must come to before the rest is over.
pub fn following_at(rate: &str, lab: &Lab, container: &Container) -> Outcome<Running> {
    let slow = ["--precopy", "off", "--bandwidth", rate, "--json"];
    let mut command = vec!["ferry", "migrate"];
    command.extend(slow);
    command.extend(["box", "b"]);
    under_way(lab, container, &command)
}

/// The same of another command.
fn under_way(lab: &Lab, container: &Container, command: &[&str]) -> Outcome<Running> {
    let (a, b) = pair(lab);
    let running = a.start(command)?;
    until("it runs on b", SHORT, || {
        let there = facts(&b)?;
        let status = there.containers.get(container.id);
        Ok(status.is_some_and(|s| s.status == "running" && s.frozen == "0").then_some(()))
    })?;
    // Committed, and not a third of the memory is there.
    until("the source has committed", SHORT, || {
        Ok(facts(&a)?.migrations.iter().any(|m| m.state == "committed").then_some(()))
    })?;
    Ok(running)
}

fn kill(host: &Host, pattern: &str) -> Outcome {
    host.exec(&["pkill", "-KILL", "-f", &format!("^({pattern})")])?.exits(0).map(drop)
}

fn links_break_while_it_follows(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let mut running = following(lab, &container)?;
    for _ in 0..2 {
        kill(&a, "ssh ")?;
        // The next one carries something before it breaks, too.
        let began = Instant::now();
        until("another link is there", SHORT, || {
            let ssh = a.exec(&["pgrep", "-f", "^ssh .*receive"])?.code == 0;
            Ok((ssh && began.elapsed() > Duration::from_millis(600)).then_some(()))
        })?;
        ensure!(!running.has_ended(), "it was over before its link was cut");
    }
    let report = report(&running.end(LONG)?.exits(0)?)?;
    ensure!(number(&report, "/served/fetched") > 16_000, "{report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

fn a_killed_source_is_resolved(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let running = following(lab, &container)?;
    // Both at once: the guard would bring the rest by itself.
    a.sh("kill -KILL $(pgrep -f '^/proc/self/exe __guard') $(pgrep -f '^ferry migrate')")?;
    running.end(LONG)?.exits(137)?;
    // It waits there for what is frozen here, however long that takes.
    let said = b.ferry(&["resolve", "box"])?.exits(4)?;
    ensure!(said.err.contains("waits for memory"), "{said}");
    a.ferry(&["resolve", "box"])?.exits(0)?;
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

/// Whoever fills its memory is killed, and together with him the first of those who wait for that; then
/// whoever has gone on: the tasks wait, and go on with every page right.
fn a_killed_destination_is_followed(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    // Processes that fork while their memory is not there.
    let options = ["--arg", "--dirty", "--arg", "2000", "--arg", "--threads", "--arg", "2"];
    let container = Container::networked("counter").with(&options);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let running = following(lab, &container)?;
    b.sh("kill -KILL $(pgrep -f '^ferry receive') $(pgrep -o -f '^__guard pages')")?;

    let gone_on = "pgrep -f '^/proc/self/exe __guard pages' && pgrep -f '^__guard pages'";
    until("somebody has gone on, and others wait", SHORT, || {
        Ok((b.exec(&["sh", "-c", gone_on])?.code == 0).then_some(()))
    })?;

    // One of those who wait is replaced.
    b.sh("kill -KILL $(pgrep -o -f '^__guard pages')")?;
    until("two wait again", SHORT, || {
        let waiting = b.exec(&["pgrep", "-c", "-f", "^__guard pages"])?;
        Ok((waiting.out.trim() == "2").then_some(()))
    })?;

    b.sh("kill -KILL $(pgrep -f '^/proc/self/exe __guard pages')")?;
    let report = report(&running.end(LONG)?.exits(0)?)?;
    ensure!(number(&report, "/served/fetched") > 0, "{report}");
    probe.is_content()?;

    exactly_one_copy(&container, &b, &a)
}

/// As at the end of a session or of a unit of systemd: all that is in the control group in which the
/// destination's Ferry was started is killed at once.
fn its_group_is_ended(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let group = "/sys/fs/cgroup/unit";
    let script =
        format!("#!/bin/sh\nmkdir -p {group}; echo $$ >{group}/cgroup.procs; exec ferry \"$@\"\n");
    write_script(&a.path("/srv/shared/bin/unit")?, &script)?;
    let slow = ["--precopy", "off", "--bandwidth", "20M", "--json"];
    let remote = ["--remote-ferry", "/srv/shared/bin/unit"];
    let command = [&["ferry", "migrate"][..], &slow, &remote, &["box", "b"]].concat();
    let running = under_way(lab, &container, &command)?;
    let ended = b.sh(&format!("echo 1 >{group}/cgroup.kill"));
    let report = running.end(LONG).and_then(|ended| report(&ended.exits(0)?));
    b.sh(&format!("until rmdir {group}; do :; done"))?;
    ended?;
    ensure!(number(&report?, "/served/fetched") > 0, "nothing was missing");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

fn by_comparing(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(&["--arg", "--dirty", "--arg", "500"]);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let report = migrate(&a, &["--tracking", "hash", "--verify"], &b)?;
    let tracked =
        report["rounds"].as_array().into_iter().flatten().all(|r| r["tracking"] == "hash");
    ensure!(tracked, "{report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

/// Sixteen threads, each waiting for a disk that is slow: at any time some page is about to change
/// without the processor having any part in it.
fn direct_reads(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container =
        Container::networked("counter").with(&["--arg", "--direct", "--arg", "/direct"]);
    container.start(lab, &a)?;
    // Through the hierarchy that has the controller. Where neither has, the disk is as fast as it is.
    a.sh(r#"
        pid=$(runc state box | grep -o '"pid": [0-9]*' | grep -o '[0-9]*')
        device=$(mountpoint -d /srv/shared || findmnt -no MAJ:MIN -T /srv/shared)
        [ ! -e /sys/dev/block/$device/partition ] || device=$(cat /sys/dev/block/$device/../dev)
        group=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$pid/cgroup)
        if [ -e $group/io.max ]; then
            echo "$device riops=400" >$group/io.max
        elif mkdir -p /run/blkio && mount -t cgroup -o blkio blkio /run/blkio; then
            mkdir -p /run/blkio/ferry-direct
            echo $pid >/run/blkio/ferry-direct/cgroup.procs
            echo "$device 400" >/run/blkio/ferry-direct/blkio.throttle.read_iops_device
        fi"#)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    migrate(&a, &["--verify"], &b)?;
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

fn compression(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(&["--arg", "--content", "--arg", "text"]);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let (mut from, mut to) = (&a, &b);
    let mut wire = Vec::new();
    // On a link of 100 Mbit/s even the slowest of them is faster than none.
    lab.link(&["b", "--rate", "100mbit"])?;
    for how in ["none", "lz4", "zstd", "auto"] {
        // So slow that no other work of the machine makes compression slower.
        if how == "auto" {
            lab.link(&["b", "--rate", "20mbit"])?;
        }
        let report = migrate(from, &["--compress", how], to)?;
        wire.push((how, number(&report, "/wire_bytes") >> 20));
        (from, to) = (to, from);
    }
    lab.link(&["b", "--rate", "off"])?;
    probe.is_content()?;
    ensure!(wire[0].1 >= 60, "less than all of it without compression: {wire:?}");
    ensure!(wire[1..].iter().all(|w| w.1 < 45), "not compressed: {wire:?}");
    Ok(())
}

fn bandwidth(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    let began = Instant::now();
    let report = migrate(&a, &["--bandwidth", "256Mbit"], &b)?;
    // 64 MiB at 32 MB/s.
    ensure!(began.elapsed() > Duration::from_millis(2000), "faster than allowed: {report}");
    ensure!(began.elapsed() < Duration::from_secs(10), "much slower than allowed: {report}");
    Ok(())
}

/// A source that copies memory says nothing else meanwhile, and is not taken for a dead one.
fn longer_than_any_limit(lab: &Lab) -> Outcome {
    const LONGEST: u64 = 3;
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let limited = "/srv/shared/bin/limited";
    let script = format!("#!/bin/sh\nexport FERRY_FAULT_LIMIT={LONGEST}; exec ferry \"$@\"\n");
    write_script(&a.path(limited)?, &script)?;
    // 64 MiB at 10 MiB/s.
    let slow = ["--remote-ferry", limited, "--bandwidth", "10M", "--postcopy", "never"];
    let report = migrate(&a, &slow, &b)?;
    let copying: f64 =
        report["rounds"].as_array().into_iter().flatten().filter_map(|r| r["ms"].as_f64()).sum();
    ensure!(copying > 1000.0 * LONGEST as f64, "it took no longer than that: {report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

/// All of it is compared before the commit, and one wrong byte is enough to stay.
fn compared(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let options = ["--arg", "--dirty", "--arg", "2000", "--arg", "--threads", "--arg", "2"];
    let container = Container::networked("counter").with(&options);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    // None of it before the freeze: it would follow.
    let report = migrate(&a, &["--verify", "--precopy", "off"], &b)?;
    ensure!(number(&report, "/verified_pages") > 16_384, "{report}");
    ensure!(number(&report, "/postcopy_pages") == 0, "{report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)?;

    let faulty = "/srv/shared/bin/faulty";
    let script = "#!/bin/sh\nexport FERRY_FAULT=destination.verify:spoil; exec ferry \"$@\"\n";
    write_script(&a.path(faulty)?, script)?;
    let options = ["--verify", "--precopy", "off", "--remote-ferry", faulty];
    let said = b.ferry(&[&["migrate"], &options[..], &["box", "a"]].concat())?.exits(1)?;
    let words =
        "1 pages of memory are not what they are on the source: process 1 (counter-server) at 0x";
    ensure!(said.err.contains(words), "{said}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}

fn several_streams(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(&["--arg", "--dirty", "--arg", "2000"]);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let report = migrate(from, &["--streams", "3", "--compress", "none"], to)?;
        ensure!(number(&report, "/wire_bytes") >> 20 >= 64, "{report}");
        probe.is_content()?;
        exactly_one_copy(&container, to, from)?;
    }
    // Each is needed: when one breaks, it is given up.
    let slow = ["ferry", "migrate", "--streams", "3", "--bandwidth", "10M", "box", "b"];
    let running = a.start(&slow)?;
    let links = || Ok::<_, String>(a.exec(&["pgrep", "-f", "^ssh .*receive"])?.out.lines().count());
    until("three links are there", SHORT, || Ok((links()? == 3).then_some(())))?;
    a.sh("kill -KILL $(pgrep -n -f '^ssh .*receive')")?;
    let ended = running.end(LONG)?.exits(1)?;
    ensure!(ended.err.contains("link"), "{ended}");
    probe.is_content()?;
    exactly_one_copy(&container, &a, &b)
}

/// The link breaks before the commit gets there, while pages are to follow.
fn a_lost_commit_is_brought(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let mut command =
        vec!["env", "FERRY_FAULT=source.committed:hold", "ferry", "migrate", "--json"];
    command.extend(["--precopy", "off", "box", "b"]);
    let running = a.start(&command)?;
    let file = a.path("/run/ferry-fault/source.committed")?;
    until("it has committed", SHORT, || Ok(file.exists().then_some(())))?;
    kill(&a, "ssh ")?;
    std::fs::remove_file(&file).map_err(|e| e.to_string())?;
    let report = report(&running.end(LONG)?.exits(0)?)?;
    ensure!(number(&report, "/served/fetched") > 16_000, "{report}");
    probe.is_content()?;
    exactly_one_copy(&container, &b, &a)
}
