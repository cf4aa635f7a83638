//! Everything that can die or break, at every step: afterwards there is exactly one copy, its
//! clients have lost nothing, nothing is left over, and a second try succeeds.
//!
//! Before the commit the container must run on the source, by itself and in seconds. After it, it
//! must run on the destination. Where the destination's half died with the only copy that could run
//! there, the source takes it back by itself as long as that copy has not been let run; later the
//! operator is told so, and `ferry resolve --keep` brings the source's back.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, exactly_one_copy_within, facts, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::{Output, Running, until, write_script};
use crate::common::suite::{full, in_lab};
use crate::common::{Outcome, ensure};

/// How long a cable stays out after the commit.
const OUT: Duration = Duration::from_secs(4);
const LIMIT: Duration = Duration::from_secs(150);

/// Where a point is, and whose the container is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// On the source, which owns the container.
    Source,
    /// On the destination, while the source owns the container.
    Destination,
    /// On the source, after the commit.
    SourceAfter,
    /// On the destination, after the commit.
    DestinationAfter,
}

use At::{Destination, DestinationAfter, Source, SourceAfter};

/// All points, in the order in which a migration comes by.
pub const POINTS: &[(&str, At)] = &[
    ("source.prepare", Source),
    ("destination.prepare", Destination),
    ("destination.network", Destination),
    ("destination.prepared", Destination),
    ("source.freeze", Source),
    ("dump.frozen", Source),
    ("dump.fenced", Source),
    ("source.dump", Source),
    ("dump.dumped", Source),
    ("source.transfer", Source),
    ("destination.restore", Destination),
    ("restore.request", Destination),
    ("source.sent", Source),
    ("restore.restored", Destination),
    ("destination.restored", Destination),
    ("destination.ready", Destination),
    ("destination.said-ready", Destination),
    ("source.commit", Source),
    ("source.committed", SourceAfter),
    ("destination.commit", DestinationAfter),
    ("destination.committed", DestinationAfter),
    ("restore.answered", DestinationAfter),
    ("destination.open", DestinationAfter),
    ("restore.resume", DestinationAfter),
    ("destination.running", DestinationAfter),
    ("source.let-go", SourceAfter),
    ("source.finish", SourceAfter),
    ("destination.finish", DestinationAfter),
];

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// The Ferry that is there is killed.
    Kill,
    /// The other one is.
    KillOther,
    /// The step fails.
    Error,
    /// Its thread panics, which is not Ferry's first.
    Panic,
    /// The ssh that carries the link is killed.
    KillSsh,
    /// The destination's cable is pulled, and put back after the end.
    Cut,
    /// SIGINT to `ferry migrate`.
    Interrupt,
    /// SIGTERM to `ferry migrate`.
    Terminate,
    /// Every criu on the point's host is killed.
    KillCriu,
    /// Every runc there.
    KillRunc,
}

const DEEDS: &[(Deed, &str)] = &[
    (Deed::Kill, "kill"),
    (Deed::KillOther, "kill-other"),
    (Deed::Error, "error"),
    (Deed::Panic, "panic"),
    (Deed::KillSsh, "kill-ssh"),
    (Deed::Cut, "cut"),
    (Deed::Interrupt, "int"),
    (Deed::Terminate, "term"),
    (Deed::KillCriu, "kill-criu"),
    (Deed::KillRunc, "kill-runc"),
];

/// What is tried by default: nearly every point once, every deed on both sides of the commit.
const SOME: &[(&str, &[&str])] = &[
    ("source.prepare", &["kill", "error"]),
    ("destination.prepare", &["kill"]),
    ("destination.network", &["error", "term"]),
    ("destination.prepared", &["kill-ssh"]),
    ("source.freeze", &["kill-criu"]),
    ("dump.frozen", &["kill", "error"]),
    ("dump.fenced", &["kill-criu", "kill-runc"]),
    ("source.dump", &["error", "kill-criu"]),
    ("dump.dumped", &["kill", "kill-criu", "panic"]),
    ("source.transfer", &["kill", "kill-other", "int"]),
    ("destination.restore", &["kill"]),
    ("restore.request", &["error", "kill-criu"]),
    ("source.sent", &["kill"]),
    ("restore.restored", &["kill", "kill-runc"]),
    ("destination.restored", &["error"]),
    ("destination.ready", &["kill", "kill-other"]),
    ("destination.said-ready", &["kill-criu"]),
    ("source.commit", &["kill", "error", "kill-ssh", "term", "kill-other"]),
    ("source.committed", &["kill", "kill-ssh", "int", "kill-other"]),
    ("destination.commit", &["kill", "kill-other"]),
    ("destination.committed", &["kill-ssh", "kill-criu"]),
    ("restore.answered", &["kill", "kill-criu"]),
    ("destination.open", &["kill", "kill-other", "kill-criu"]),
    ("restore.resume", &["kill", "kill-criu"]),
    ("destination.running", &["kill", "kill-other", "kill-ssh"]),
    ("source.let-go", &["kill", "int"]),
    ("source.finish", &["kill"]),
    ("destination.finish", &["kill"]),
];

/// So many connections Ferry carries by itself, and has them out of the tasks for a while.
pub const CARRIED: usize = 200;

/// Where it takes them out, all before the commit.
pub const LIFTING: &[(&str, At)] =
    &[("extract.noted", Source), ("extract.kept", Source), ("extract.taken", Source)];

/// What is tried by default with so many.
const SOME_CARRIED: &[(&str, &[&str])] = &[
    ("extract.noted", &["kill"]),
    ("extract.kept", &["kill", "error"]),
    ("extract.taken", &["kill", "error", "kill-criu", "kill-ssh"]),
    ("source.dump", &["kill-criu"]),
    ("dump.dumped", &["kill"]),
    ("restore.restored", &["kill"]),
    ("destination.restored", &["error"]),
    ("source.commit", &["error"]),
    ("source.committed", &["kill", "kill-other"]),
    ("destination.commit", &["kill-other"]),
    ("restore.answered", &["kill-criu"]),
];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let full = full();
    let mut trials = Vec::new();
    let carried = POINTS.iter().chain(LIFTING).map(|at| (at, SOME_CARRIED, "carried::", CARRIED));
    let all = POINTS.iter().map(|at| (at, SOME, "", 5)).chain(carried);
    for (&(point, at), list, group, connections) in all {
        for &(deed, name) in DEEDS {
            // After the commit no step returns an error that anybody could act upon.
            let nothing = deed == Deed::Error && matches!(at, SourceAfter | DestinationAfter);

            // All others lie on Ferry's first thread, with which it ends.
            let nothing = nothing || deed == Deed::Panic && !point.starts_with("dump.");
            let some = list.iter().any(|(p, list)| *p == point && list.contains(&name));
            if !nothing && (full || some) {
                let trial = format!("faults::{group}{point}::{name}");
                let body = move |lab: &Lab| fault(lab, point, at, deed, connections);
                trials.push(in_lab(trial, LIMIT, body));
            }
        }
    }

    trials.push(in_lab("faults::unix_socket", LIMIT, unix_socket));
    let times = if full { 60 } else { 10 };
    trials.push(in_lab("faults::criu_killed_in_the_tasks", LIMIT, move |lab| {
        criu_killed_in_the_tasks(lab, times)
    }));

    trials.push(in_lab("faults::criu_hangs_in_the_dump", LIMIT, criu_hangs_in_the_dump));
    trials.push(in_lab("faults::guard_in_the_tasks", LIMIT, guard_in_the_tasks));
    trials.push(in_lab("faults::guard_lets_it_run", LIMIT, guard_lets_it_run));
    trials.push(in_lab(
        "faults::guards_wait_before_the_freeze",
        LIMIT,
        guards_wait_before_the_freeze,
    ));

    trials.push(in_lab("faults::guard_cannot_be_reached", LIMIT, guard_cannot_be_reached));
    trials.push(in_lab("faults::runtime_does_not_delete", LIMIT, runtime_does_not_delete));
    trials.push(in_lab("faults::disk_fails_at_the_commit", LIMIT, disk_fails_at_the_commit));
    trials.push(in_lab("faults::known_before_it_is_told", LIMIT, known_before_it_is_told));

    trials
}

/// The guard has threads of the container make calls for it, and none of the container may run
/// meanwhile: whoever of it and Ferry is killed, everything is as it was.
fn guard_in_the_tasks(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(&["--arg", "--threads", "--arg", "4"]);
    container.start(lab, &a)?;

    // Seldom, as a connection with something in its queue is not taken out.
    let mut probe = Probe::every(lab, &container, CARRIED, "500ms")?;

    // Who is killed when the guard comes by the point.
    for (fault, point, killed) in [
        ("guard.taken:error", None, ""),
        ("guard.taken:hold", Some("guard.taken"), "guard"),
        ("guard.taken:hold", Some("guard.taken"), "ferry"),
        ("extract.taken:error,guard.put:hold", Some("guard.put"), "guard"),
        ("extract.taken:error,guard.put:hold", Some("guard.put"), "ferry"),
        ("extract.taken:error,guard.put:error", None, ""),
    ] {
        let fault = format!("FERRY_FAULT={fault}");
        let mut running = a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?;
        if let Some(point) = point {
            let file = a.path(&format!("/run/ferry-fault/{point}"))?;
            until(&format!("the guard comes by {point}"), SHORT, || {
                Ok((running.has_ended() || file.exists()).then_some(()))
            })?;
            if !file.exists() {
                let ended = running.end(LONG)?;
                return Err(format!("{fault}: it did not come by {point}\nmigrate: {ended}"));
            }

            let guard = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
            match killed {
                "guard" => a.exec(&["kill", "-KILL", guard.trim()])?.exits(0)?,
                _ => a.exec(&["pkill", "-KILL", "-f", "^ferry migrate"])?.exits(0)?,
            };

            // Whoever does its work then comes by, too.
            until("it is over", LONG, || {
                let _ = std::fs::remove_file(&file);
                Ok(running.has_ended().then_some(()))
            })?;
        }
        let ended = running.end(LONG)?;
        let all = (|| {
            ensure!(ended.code == if killed == "ferry" { 137 } else { 1 }, "an unexpected end");
            // What could not be put back is put back by whoever tries it again.
            if fault.ends_with("guard.put:error") {
                a.ferry(&["resolve", "box"])?.exits(0)?;
            }
            exactly_one_copy(&container, &a, &b)?;
            probe.is_content()
        })();
        all.map_err(|e| format!("{fault}, killed: {killed}: {e}\nmigrate: {ended}"))?;
    }

    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    probe.is_content()
}

/// The destination is killed when it is about to let the container run, or has just done so, and all of
/// its memory is in: its guard lets it run, and no client loses anything.
fn guard_lets_it_run(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let (mut here, mut there) = (&a, &b);

    // The last is between the last page, or CRIU's last word, and the end of whoever has put it in.
    for (point, deed) in [
        ("destination.committed", "kill"),
        ("destination.open", "kill"),
        ("destination.running", "kill"),
        ("memory.served", "panic"),
        ("memory.done", "kill"),
    ] {
        let held = ["memory.all-in", "destination.ready"];
        let holds: Vec<String> = held.iter().map(|point| format!("{point}:hold")).collect();
        let script = format!(
            "#!/bin/sh\nFERRY_FAULT={},{point}:{deed} exec ferry \"$@\"\n",
            holds.join(",")
        );
        write_script(&a.path("/srv/shared/bin/faulty")?, &script)?;
        let remote = ["--remote-ferry", "/srv/shared/bin/faulty"];
        let migrate = [&["ferry", "migrate", "box", there.name][..], &remote].concat();
        let running = here.start(&migrate)?;
        for point in held {
            let file = there.path(&format!("/run/ferry-fault/{point}"))?;
            until(point, SHORT, || Ok(file.exists().then_some(())))?;
            std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        }
        let ended = running.end(LONG)?;
        let all = (|| {
            // It has asked, and been told that it runs.
            ensure!(ended.code == 0, "it does not run there");
            exactly_one_copy(&container, there, here)?;
            probe.is_content()
        })();
        all.map_err(|e| format!("{deed} at {point}: {e}\nmigrate: {ended}"))?;
        (here, there) = (there, here);
    }

    here.ferry(&["migrate", "box", there.name])?.exits(0)?;
    exactly_one_copy(&container, there, here)?;
    probe.is_content()
}

/// Killed before anything is frozen, too, the destination leaves nothing there.
fn guards_wait_before_the_freeze(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let fault = "FERRY_FAULT=source.freeze:hold";
    let mut running = a.start(&["env", fault, "ferry", "migrate", "box", "b"])?;
    let file = a.path("/run/ferry-fault/source.freeze")?;
    until("it is about to freeze", SHORT, || {
        ensure!(!running.has_ended(), "it was over before it came there");
        Ok(file.exists().then_some(()))
    })?;
    let waiting = b.exec(&["pgrep", "-c", "-f", "^__guard pages"])?;
    ensure!(waiting.out.trim() == "2", "{waiting}");
    b.sh("kill -KILL $(pgrep -f '^ferry receive')")?;
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    running.end(LONG)?.exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    probe.is_content()
}

/// A migration whose memory follows, of a destination that runs with these settings.
fn following_with(lab: &Lab, container: &Container, settings: &str) -> Outcome<Running> {
    let (a, b) = pair(lab);
    let script = format!("#!/bin/sh\n{settings} exec ferry \"$@\"\n");
    write_script(&a.path("/srv/shared/bin/faulty")?, &script)?;
    let remote = ["--remote-ferry", "/srv/shared/bin/faulty"];
    let slow = ["--precopy", "off", "--bandwidth", "4M"];
    let migrate = [&["ferry", "migrate"][..], &remote, &slow, &["box", "b"]].concat();
    let running = a.start(&migrate)?;
    until("it runs on b", SHORT, || {
        let there = facts(&b)?;
        let status = there.containers.get(container.id);
        let runs = status.is_some_and(|s| s.status == "running" && s.frozen == "0");
        let here = facts(&a)?;
        Ok((runs && here.migrations.iter().any(|m| m.state == "committed")).then_some(()))
    })?;
    Ok(running)
}

/// Whoever goes on cannot be reached, and memory is missing: the copy is ended, and runs on without it at
/// no time.
fn guard_cannot_be_reached(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let running = following_with(lab, &container, "FERRY_FAULT=successor.calls:error")?;
    b.sh("kill -KILL $(pgrep -f '^ferry receive')")?;
    until("nothing of it is left on b", SHORT, || {
        let there = facts(&b)?;
        let over = there.open().is_empty() && there.containers.is_empty();
        Ok((over && !there.processes.iter().any(|p| p.name == "ferry")).then_some(()))
    })?;
    let ended = running.end(LONG)?.exits(4)?;
    ensure!(ended.err.contains("ferry resolve box --keep"), "no hint: {ended}");
    a.ferry(&["resolve", "box", "--keep"])?.exits(0)?;
    exactly_one_copy(&container, &a, &b)
}

/// The runtime does not delete a copy that lacks memory: it is ended without it, before anybody closes what
/// its tasks wait on.
fn runtime_does_not_delete(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let broken = "#!/bin/sh\ncase \" $* \" in *\" delete \"*) echo it is broken >&2; exit 1;; esac\nexec runc \"$@\"\n";
    write_script(&a.path("/srv/shared/bin/broken")?, broken)?;
    let running = following_with(lab, &container, "FERRY_RUNTIME=/srv/shared/bin/broken")?;
    a.sh("kill -KILL $(pgrep -f '^/proc/self/exe __guard') $(pgrep -f '^ferry migrate')")?;
    running.end(LONG)?.exits(137)?;
    b.ferry(&["resolve", "box", "--discard"])?;
    until("no task of it is left on b", SHORT, || {
        let there = facts(&b)?;
        let ferry = there.processes.iter().any(|p| p.name == "ferry");
        let task = there.processes.iter().any(|p| p.line.contains("counter-server"));
        ensure!(ferry || !task, "nobody holds what its tasks wait on, and they live");
        Ok((!ferry && !task).then_some(()))
    })?;
    b.sh("runc delete --force box")?;
    a.ferry(&["resolve", "box", "--keep"])?.exits(0)?;
    exactly_one_copy(&container, &a, &b)
}

/// The disk has taken the line that hands the container over, as far as anybody knows, and does not take
/// that which takes it back: nothing runs here before the other host has said that nothing does there.
fn disk_fails_at_the_commit(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let point = "destination.said-ready";
    let script = format!("#!/bin/sh\nFERRY_FAULT={point}:hold exec ferry \"$@\"\n");
    write_script(&a.path("/srv/shared/bin/faulty")?, &script)?;
    let fault = "FERRY_FAULT=journal.committed-sync:error,journal.returning-sync:error";
    let remote = ["--remote-ferry", "/srv/shared/bin/faulty"];
    let migrate = [&["env", fault, "ferry", "migrate"][..], &remote, &["box", "b"]].concat();
    let ended = a.start(&migrate)?.end(LONG)?.exits(4)?;
    let words = ended.err.contains("stays frozen here") && ended.err.contains("--keep");
    ensure!(words, "{ended}");
    let frozen = facts(&a)?.containers.get("box").map(|c| c.frozen.clone());
    ensure!(frozen.as_deref() == Some("1"), "it runs: {frozen:?}\n{ended}");
    // It hears that it has been given up, and says that it never ran.
    let file = b.path(&format!("/run/ferry-fault/{point}"))?;
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    exactly_one_copy_within(Duration::from_secs(30), &container, &a, &b)?;
    probe.is_content()
}

/// The source hears that it runs over there when that stands on the disk there; the container does not
/// wait for it.
fn known_before_it_is_told(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let script = "#!/bin/sh\nFERRY_FAULT=destination.noted:hold exec ferry \"$@\"\n";
    write_script(&a.path("/srv/shared/bin/faulty")?, script)?;

    let remote = ["--remote-ferry", "/srv/shared/bin/faulty"];
    let mut running = a.start(&[&["ferry", "migrate"][..], &remote, &["box", "b"]].concat())?;
    let file = b.path("/run/ferry-fault/destination.noted")?;
    until("it is brought to the disk", SHORT, || {
        ensure!(!running.has_ended(), "it was over before it came there");
        Ok(file.exists().then_some(()))
    })?;

    until("it runs there", SHORT, || {
        let status = facts(&b)?.containers.remove("box");
        Ok(status.is_some_and(|s| s.status == "running" && s.frozen == "0").then_some(()))
    })?;
    probe.is_content()?;
    let state =
        |host: &Host| Ok::<_, String>(facts(host)?.migrations.last().map(|m| m.state.clone()));
    ensure!(
        state(&a)?.as_deref() == Some("committed"),
        "it has let go of its own: {:?}",
        state(&a)?
    );

    ensure!(!running.has_ended(), "it has heard that it runs there");
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    running.end(LONG)?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;

    probe.is_content()
}

/// The restore binds a unix socket's name anew, on storage that both hosts see: given up after
/// that, the name leads to the source's socket again.
fn unix_socket(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("echo").with(&["--arg", "--unix", "--arg", "/echo.sock"]);
    container.start(lab, &a)?;
    let reach = |host: &Host| {
        let connect = "import socket; socket.socket(socket.AF_UNIX).connect('/srv/shared/box/rootfs/echo.sock')";
        host.exec(&["python3", "-c", connect])
    };
    let left = || a.sh("ls -A /srv/shared/box/rootfs | grep '^\\.ferry' || true");
    until("the server has bound it", SHORT, || Ok((reach(&a)?.code == 0).then_some(())))?;
    let given_up =
        a.start(&["env", "FERRY_FAULT=source.commit:error", "ferry", "migrate", "box", "b"])?;
    given_up.end(LONG)?.exits(1)?;
    reach(&a)?.exits(0).map_err(|e| format!("after the rollback: {e}"))?;
    ensure!(left()?.trim().is_empty(), "left: {}", left()?);
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    reach(&b)?.exits(0)?;
    ensure!(left()?.trim().is_empty(), "left: {}", left()?);
    exactly_one_copy(&container, &b, &a)
}

/// CRIU has threads of the container run its own code, on registers of its own: killed at any
/// moment of that, it takes nothing with it.
fn criu_killed_in_the_tasks(lab: &Lab, times: u32) -> Outcome {
    // From the freeze to the end of the dump and a little beyond.
    const LONGEST_MS: u32 = 40;
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(&["--arg", "--threads", "--arg", "4"]);
    const LEFT: &str = "pid=$(ferry state box | sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p')
        test -e /proc/$pid/fd/0 || exit 1
        { ls -l /proc/$pid/fd; cat /proc/$pid/maps; } | grep -iE 'criu|/run/ferry' || true";
    container.start(lab, &a)?;

    let mut probe = Probe::start(lab, &container, 5)?;
    let script = "
import glob, os, signal, sys, time
point = '/run/ferry-fault/dump.fenced'
while not os.path.exists(point):
    pass
time.sleep(float(sys.argv[1]) / 1000)
for file in glob.glob('/run/ferry/*/work/criu.pid'):
    os.kill(int(open(file).read()), signal.SIGKILL)
os.unlink(point)
";
    for i in 0..times {
        let after = f64::from(LONGEST_MS) * f64::from(i) / f64::from(times);
        let killer = a.start(&["python3", "-c", script, &after.to_string()])?;
        let hold = "FERRY_FAULT=dump.fenced:hold";
        let ended = a.start(&["env", hold, "ferry", "migrate", "box", "b"])?.end(LONG)?;
        let all = (|| {
            killer.end(SHORT)?.exits(0)?;
            ensure!(ended.code == 1, "CRIU was killed");
            exactly_one_copy(&container, &a, &b)?;
            let left = a.sh(LEFT)?;
            ensure!(left.trim().is_empty(), "CRIU has left in the task:\n{left}");
            probe.is_content()
        })();
        all.map_err(|e| format!("killed after {after} ms: {e}\nmigrate: {ended}"))?;
    }

    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    probe.is_content()
}

/// A dump that does not come to its end is ended, with CRIU in the middle of the tasks, when the
/// migration is given up: the freeze lasts no longer than it may.
fn criu_hangs_in_the_dump(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter").with(&["--arg", "--threads", "--arg", "4"]);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;

    // Before it may begin: it is done in some milliseconds, and what it leaves in tasks has a trial of its
    // own.
    let script = "
import glob, os, signal

def passes(point):
    while not os.path.exists(point):
        pass

passes('/run/ferry-fault/source.freeze')
for file in glob.glob('/run/ferry/*/work/criu.pid'):
    os.kill(int(open(file).read()), signal.SIGSTOP)
os.unlink('/run/ferry-fault/source.freeze')
passes('/run/ferry-fault/dump.fenced')
for file in glob.glob('/run/ferry/*/work/criu.pid'):
    state = open('/proc/' + open(file).read() + '/stat').read().rsplit(')')[1].split()[0]
    assert state in 'tT', state
os.unlink('/run/ferry-fault/dump.fenced')
";
    let stopper = a.start(&["python3", "-c", script])?;

    let fault = "FERRY_FAULT=source.freeze:hold,dump.fenced:hold";
    let running = a.start(&["env", fault, "ferry", "migrate", "box", "b"])?;
    stopper.end(SHORT)?.exits(0)?;
    a.exec(&["pkill", "-INT", "-f", "^ferry migrate"])?.exits(0)?;
    let began = Instant::now();
    let ended = running.end(LONG)?;
    let all = (|| {
        ensure!(ended.code == 1, "CRIU was stopped in the dump");
        ensure!(began.elapsed() < SHORT, "it took {:?} to give up", began.elapsed());
        exactly_one_copy(&container, &a, &b)?;
        probe.is_content()
    })();

    all.map_err(|e| format!("{e}\nmigrate: {ended}"))?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;

    probe.is_content()
}

/// What happens there may come before the commit or after it.
fn at_commit(point: &str) -> bool {
    matches!(point, "source.commit" | "destination.said-ready")
}

/// Whether the destination's copy may have been let run by the end of it: only one that is ended while it
/// is held has not. One that is held and lives will run: it is not taken back.
fn may_have_run(point: &str, at: At, deed: Deed) -> bool {
    let held = at_commit(point) || matches!(point, "source.committed" | "destination.commit");
    // CRIU's end is seen when the line is written that it may run.
    let ended = match at {
        Source | SourceAfter => deed == Deed::KillOther,
        Destination | DestinationAfter => deed == Deed::Kill,
    };
    !(held && ended || kept_from_running(point, deed))
}

/// Whether CRIU is killed while all that it has restored waits for it: the source takes it back by itself.
fn kept_from_running(point: &str, deed: Deed) -> bool {
    matches!(point, "destination.commit" | "destination.committed") && deed == Deed::KillCriu
}

fn fault(lab: &Lab, point: &'static str, at: At, deed: Deed, connections: usize) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let every = if connections < CARRIED { "2ms" } else { "50ms" };
    let mut probe = Probe::every(lab, &container, connections, every)?;

    let ended = migrate_with(lab, point, at, deed)?;
    if kept_from_running(point, deed) {
        ensure!(ended.code == 1, "the source has not taken it back by itself: {ended}");
    }
    // What breaks in the very moment of the commit may be noticed before or after it.
    let committed = || facts(&a).is_ok_and(|f| f.migrations.iter().any(|m| m.state == "committed"));
    let race =
        at_commit(point) && (matches!(ended.code, 0 | 4) || ended.code == 137 && committed());
    let after = race || matches!(at, SourceAfter | DestinationAfter);

    // CRIU and the runtime decide nothing: a migration may get by without them.
    let spared = matches!(deed, Deed::KillCriu | Deed::KillRunc) && ended.code == 0;
    let settled = settle(&a, &b, &ended, after || spared, may_have_run(point, at, deed));
    let (here, there) = settled.map_err(|e| format!("{e}\nmigrate: {ended}"))?;
    let all = (|| {
        // Nobody has watched over the destination's last steps: whoever asks next does them.
        if at == DestinationAfter && deed == Deed::Kill {
            b.ferry(&["resolve", "box"])?;
        }

        // A host whose cable was pulled learns of it when the other one reaches it again.
        let limit = Duration::from_secs(if deed == Deed::Cut { 25 } else { 10 });
        exactly_one_copy_within(limit, &container, here, there)?;
        probe.is_content()?;

        // The second try, from where it is to where it is not.
        here.ferry(&["migrate", "box", there.name])?.exits(0)?;
        exactly_one_copy(&container, there, here)?;
        probe.is_content()
    })();

    all.map_err(|e| format!("{e}\nmigrate: {ended}"))
}

/// Starts the migration and does the deed when it comes by the point.
fn migrate_with(lab: &Lab, point: &str, at: At, deed: Deed) -> Outcome<Output> {
    let (a, b) = pair(lab);
    let action = match deed {
        Deed::Kill => "kill",
        Deed::Error => "error",
        Deed::Panic => "panic",
        _ => "hold",
    };

    let fault = format!("FERRY_FAULT={point}:{action}");
    // What happens when the images are sent happens before the destination is ready: that is seen to, as
    // it may be quick.
    let later = (point == "source.sent" && action == "hold").then_some("destination.ready");

    // ssh carries no environment: over there a script stands before Ferry.
    let there = later.map_or(fault.clone(), |later| format!("FERRY_FAULT={later}:hold"));
    let script = format!("#!/bin/sh\n{there} exec ferry \"$@\"\n");
    write_script(&a.path("/srv/shared/bin/faulty")?, &script)?;
    let mut running = a.start(&[
        "env",
        &fault,
        "ferry",
        "migrate",
        "--remote-ferry",
        "/srv/shared/bin/faulty",
        "box",
        "b",
    ])?;

    if action == "hold" {
        let host = if matches!(at, Source | SourceAfter) { &a } else { &b };
        let file = host.path(&format!("/run/ferry-fault/{point}"))?;
        until(&format!("it comes by {point}"), SHORT, || {
            ensure!(!running.has_ended(), "it was over before it came by {point}");
            Ok(file.exists().then_some(()))
        })?;

        perform(lab, at, deed)?;
        if at == Destination && matches!(deed, Deed::Interrupt | Deed::Terminate) {
            await_given_up(&a, &mut running, point)?;
        }
        std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    }

    if let Some(later) = later {
        let file = b.path(&format!("/run/ferry-fault/{later}"))?;
        until("the destination is ready, or gone", SHORT, || {
            let gone = b.exec(&["pgrep", "-f", "^ferry receive"])?.code != 0;
            Ok((gone || std::fs::remove_file(&file).is_ok()).then_some(()))
        })?;
    }

    // Before the commit the source must come to its senses by itself. After it there is nobody whom
    // a client could reach while the cable is out: then it is out for some seconds only.
    if deed == Deed::Cut && (matches!(at, SourceAfter | DestinationAfter) || at_commit(point)) {
        let began = Instant::now();
        until("the cable has been out for a while", SHORT, || {
            Ok((began.elapsed() > OUT).then_some(()))
        })?;
        lab.link(&["b", "--mend"])?;
    }

    let ended = running.end(LONG);
    if deed == Deed::Cut {
        lab.link(&["b", "--mend"])?;
    }

    ended
}

/// The source has heard its signal. From the destination's last points the commit is three milliseconds away,
/// which on a busy machine is sooner.
fn await_given_up(source: &Host, running: &mut Running, point: &str) -> Outcome {
    if at_commit(point) {
        return Ok(());
    }
    until("the source gives up", SHORT, || {
        let last = facts(source)?.migrations.last().map(|m| m.state.clone());
        Ok((running.has_ended() || last.as_deref() == Some("aborted")).then_some(()))
    })
}

fn perform(lab: &Lab, at: At, deed: Deed) -> Outcome {
    let (a, b) = pair(lab);
    let (own, other) = if matches!(at, Source | SourceAfter) { (&a, &b) } else { (&b, &a) };
    // Inside a host only its own processes are to be seen; the guard is one of a's.
    let kill = |host: &Host, signal: &str, pattern: &str| {
        let pattern = format!("^({pattern})");
        // Nobody left to kill is no failure: a runtime may have done its part.
        host.exec(&["pkill", signal, "-f", &pattern]).map(drop)
    };
    match deed {
        Deed::Kill | Deed::Error | Deed::Panic => Ok(()),
        Deed::KillOther if *other.name == *a.name => kill(&a, "-KILL", "ferry migrate"),
        Deed::KillOther => kill(other, "-KILL", "ferry receive"),
        Deed::KillSsh => kill(&a, "-KILL", "ssh "),
        Deed::Cut => lab.link(&["b", "--cut"]),
        Deed::Interrupt => kill(&a, "-INT", "ferry migrate"),
        Deed::Terminate => kill(&a, "-TERM", "ferry migrate"),
        Deed::KillCriu => kill(own, "-KILL", "[^ ]*criu[: ]"),
        Deed::KillRunc => kill(own, "-KILL", "[^ ]*runc "),
    }
}

/// Who has it now, after whatever is up to an operator has been done; `after` the commit. What has not
/// run on the destination goes on without one.
fn settle<'a>(
    a: &'a Host,
    b: &'a Host,
    ended: &Output,
    after: bool,
    may_have_run: bool,
) -> Outcome<(&'a Host, &'a Host)> {
    let expected: &[i32] = match (after, may_have_run) {
        (true, true) => &[0, 4, 137],
        (true, false) => &[0, 1, 4, 137],
        (false, _) => &[1, 3, 137],
    };

    ensure!(expected.contains(&ended.code), "an exit code that cannot be: {}", ended.code);
    if !after {
        return Ok((a, b));
    }
    match ended.code {
        0 => {
            // Whichever link has brought the word that it runs.
            let timeless = [&ended.out, &ended.err].iter().any(|t| t.contains("frozen for 0.0 ms"));
            ensure!(!timeless, "how long it was frozen is not told: {ended}");
            return Ok((b, a));
        }
        1 => return Ok((a, b)),
        _ => {}
    }

    let until = Instant::now() + SHORT;
    loop {
        // Nothing open here: it was over but for its last words.
        match facts(a)?.migrations.last().map(|m| m.state.clone()).as_deref() {
            Some("finished") => return Ok((b, a)),
            Some("aborted") if !may_have_run => return Ok((a, b)),
            _ => {}
        }

        let said = a.ferry(&["resolve", "box"])?;
        match said.code {
            0 if said.out.contains("it never ran on the other host") => {
                ensure!(!may_have_run, "it may have: {said}");
                return Ok((a, b));
            }
            0 => return Ok((b, a)),
            4 if may_have_run && said.err.contains("there is no copy on") => {
                ensure!(said.err.contains("ferry resolve box --keep"), "no hint: {said}");
                a.ferry(&["resolve", "box", "--keep"])?.exits(0)?;
                return Ok((a, b));
            }
            _ => ensure!(Instant::now() < until, "ferry resolve does not settle it: {said}"),
        }
    }
}
