//! Containers go to the other host, by every way there is, and come back.

use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::{Probe, verify_inside};
use crate::common::process::{until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("moves::plain_to_and_fro", LIMIT, plain_to_and_fro),
        in_lab("moves::over_a_unix_socket", LIMIT, over_a_unix_socket),
        in_lab("moves::json_and_report", LIMIT, json_and_report),
        in_lab("moves::dry_run_touches_nothing", LIMIT, dry_run_touches_nothing),
        in_lab("moves::networked_to_and_fro", LIMIT, networked_to_and_fro),
        in_lab("moves::threads_and_changing_memory", LIMIT, threads_and_changing_memory),
        in_lab("moves::several_processes", LIMIT, several_processes),
        in_lab("moves::settings_of_threads", LIMIT, settings_of_threads),
        in_lab("moves::read_only_root", LIMIT, read_only_root),
        in_lab("moves::files", LIMIT, files),
        in_lab("moves::away_mark", LIMIT, away_mark),
        in_lab("moves::asked_while_it_ends", LIMIT, asked_while_it_ends),
    ]
}

/// A source that asks just when the destination's process is done, and ends, gets an answer all the
/// same.
fn asked_while_it_ends(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    let held = "/srv/shared/bin/held";
    let script = "#!/bin/sh\nexport FERRY_FAULT=destination.finish:hold; exec ferry \"$@\"\n";
    write_script(&a.path(held)?, script)?;
    let migrate = ["ferry", "migrate", "--remote-ferry", held, "box", "b"];
    let kill = ["env", "FERRY_FAULT=source.committed:kill"];
    a.exec(&[&kill[..], &migrate].concat())?.exits(137)?;
    let resolve = a.start(&["ferry", "resolve", "box"])?;
    let file = b.path("/run/ferry-fault/destination.finish")?;
    until("it runs there", SHORT, || Ok(file.exists().then_some(())))?;
    until("it is asked", SHORT, || {
        let sockets = b.sh("ss -Hxa")?;
        let asked = |l: &str| l.contains("ESTAB") && l.contains("/control.sock");
        Ok(sockets.lines().any(asked).then_some(()))
    })?;
    std::fs::remove_file(&file).map_err(|e| e.to_string())?;
    resolve.end(LONG)?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    verify_inside(&b, &container).map(drop)
}

fn plain_to_and_fro(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    verify_inside(&a, &container)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        verify_inside(to, &container)?;
    }
    Ok(())
}

fn over_a_unix_socket(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    let socket = "/srv/shared/b.sock";
    let listening = b.start(&["ferry", "receive", "--listen", &format!("unix:{socket}")])?;
    until("the socket is there", Duration::from_secs(10), || {
        Ok(b.exec(&["test", "-S", socket])?.code.eq(&0).then_some(()))
    })?;
    a.ferry(&["migrate", "box", &format!("unix:{socket}")])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    verify_inside(&b, &container)?;
    // One that is left over from a process that has died is no obstacle for the next.
    drop(listening);
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    let _again = b.start(&["ferry", "receive", "--listen", &format!("unix:{socket}")])?;
    until("the second one listens", Duration::from_secs(10), || {
        let said = a.ferry(&["check", "box", &format!("unix:{socket}")])?;
        Ok((said.code == 0).then_some(()))
    })?;
    a.ferry(&["migrate", "box", &format!("unix:{socket}")])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)
}

fn json_and_report(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    let said = a.ferry(&["migrate", "--json", "--report", "/tmp/report", "box", "b"])?.exits(0)?;
    let events = said
        .out
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).map_err(|e| format!("{l}: {e}")))
        .collect::<Outcome<Vec<_>>>()?;
    ensure!(
        events.iter().all(|e| e["event"].is_string()),
        "an event without a name:\n{}",
        said.out
    );

    let last = events.last().ok_or("no event")?;
    ensure!(last["event"] == "report" && last["result"] == "migrated", "the last is {last}");
    ensure!(last["frozen_ms"].as_f64().is_some_and(|ms| ms > 0.0), "no time frozen: {last}");
    ensure!(last["wire_bytes"].as_u64().is_some_and(|n| n > 32 << 20), "no memory sent: {last}");
    let phases: Vec<&Value> =
        events.iter().filter(|e| e["event"] == "phase").map(|e| &e["name"]).collect();
    ensure!(phases.len() >= 3, "phases: {phases:?}");
    let file: Value = serde_json::from_str(&a.sh("cat /tmp/report")?).map_err(|e| e.to_string())?;
    for key in ["migration", "result", "frozen_ms", "total_ms", "rounds"] {
        ensure!(
            file[key] == last[key] && !file[key].is_null(),
            "{key}: {} and {}",
            file[key],
            last[key]
        );
    }

    exactly_one_copy(&container, &b, &a)?;
    // A refusal is reported in the same form.
    let said = a.ferry(&["migrate", "--json", "box", "b"])?.exits(3)?;
    let last: Value = serde_json::from_str(said.out.lines().last().unwrap_or_default())
        .map_err(|e| format!("{e}: {said}"))?;
    ensure!(last["result"] == "refused" && last["error"].is_string(), "{last}");

    Ok(())
}

fn dry_run_touches_nothing(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    let before = facts(&a)?.containers["box"].pid;
    a.ferry(&["migrate", "--dry-run", "box", "b"])?.exits(0)?;
    a.ferry(&["check", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &a, &b)?;
    let (here, there) = (facts(&a)?, facts(&b)?);
    ensure!(here.containers["box"].pid == before, "it is another process now");
    ensure!(
        here.migrations.is_empty() && there.migrations.is_empty(),
        "there is a journal: {here:?}"
    );
    Ok(())
}

fn away_mark(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    for verb in ["create", "run"] {
        let said = a.ferry(&[verb, "--bundle", &container.bundle, "box"])?;
        ensure!(said.code != 0, "{verb} was let through: {said}");
        for word in ["migrated to b", "hint:", "ferry resolve box --keep"] {
            ensure!(said.err.contains(word), "{verb} does not say {word:?}: {said}");
        }
    }

    let said = a.ferry(&["start", "box"])?;
    ensure!(said.code != 0 && said.err.contains("migrated to b"), "start: {said}");
    exactly_one_copy(&container, &b, &a)?;
    for (host, role) in [(&a, "source"), (&b, "destination")] {
        let list = facts(host)?.migrations;
        ensure!(
            list.len() == 1
                && list[0].role == role
                && list[0].state == "finished"
                && list[0].container == "box",
            "on {}: {list:?}",
            host.name
        );

        let text = host.ferry(&["migrations"])?.ok()?;
        ensure!(text.contains(&list[0].migration) && text.contains("box"), "{text}");
    }

    // Coming back clears it.
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    exactly_one_copy(&container, &a, &b)?;
    a.sh("ferry delete -f box")?;
    container.run_on(&a)?;
    a.ferry(&["migrate", "--no-mark", "box", "b"])?.exits(0)?;
    b.sh("ferry delete -f box")?;

    // Without a mark the ID is free.
    container.run_on(&a)?;

    // And b's own, which the way there left: lifted by the operator's word.
    let said = b.ferry(&["run", "-d", "--bundle", &container.bundle, "box"])?;
    ensure!(said.code == 0 || said.err.contains("migrated"), "{said}");

    Ok(())
}

fn networked_to_and_fro(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 10)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        probe.is_content()?;
        exactly_one_copy(&container, to, from)?;
    }
    Ok(())
}

/// There and back with clients, who lose nothing; all memory is right each time.
fn carries(lab: &Lab, container: &Container) -> Outcome {
    let (a, b) = pair(lab);
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, container, 10)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        probe.is_content()?;
        exactly_one_copy(container, to, from)?;
    }
    Ok(())
}

fn threads_and_changing_memory(lab: &Lab) -> Outcome {
    carries(lab, &Container::networked("dirtier"))
}

fn read_only_root(lab: &Lab) -> Outcome {
    carries(lab, &Container::networked("counter").with(&["--readonly"]))
}

/// Asks twice over one connection, the second time when it is told to.
const ASK_TWICE: &str = r#"
import os, socket, sys, time
connection = socket.create_connection((sys.argv[1], 80), timeout=30)
def ask():
    connection.sendall(b"GET /100k HTTP/1.1\r\nHost: box\r\n\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer.split(b"\r\n\r\n", 1)[1]) < 100 << 10:
        piece = connection.recv(1 << 16)
        assert piece, "closed after %d bytes" % len(answer)
        answer += piece
    return answer.split(b"\r\n\r\n", 1)[1]
first = ask()
open("/srv/shared/asked", "w").close()
end = time.monotonic() + 50
while not os.path.exists("/srv/shared/again") and time.monotonic() < end:
    time.sleep(0.01)
assert ask() == first
"#;

/// nginx: a master and its workers, a connection that is kept alive, a read-only bind mount.
fn several_processes(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let base = a.path("/")?;
    let base = base.to_str().ok_or("a strange path")?;
    let container = Container::networked("web").with(&["--base", base]);
    container.start(lab, &a)?;
    let count = |host: &Host| -> Outcome<usize> {
        Ok(facts(host)?.processes.iter().filter(|p| p.name == "nginx").count())
    };
    let before = until("nginx has its workers", Duration::from_secs(20), || {
        Ok(Some(count(&a)?).filter(|n| *n >= 3))
    })?;
    let address = lab.address(ADDRESS);
    let client = lab.host("client").start(&["python3", "-c", ASK_TWICE, &address])?;
    let (asked, again) = (a.path("/srv/shared/asked")?, a.path("/srv/shared/again")?);
    until("the first answer came", Duration::from_secs(20), || Ok(asked.exists().then_some(())))?;
    // Its workers share memory with the first of them, and what the fork has left them.
    a.ferry(&["migrate", "--verify", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    ensure!(count(&b)? == before, "{before} processes went, {} came", count(&b)?);
    std::fs::write(again, "").map_err(|e| e.to_string())?;
    client.end(Duration::from_secs(40))?.ok().map(drop)
}

/// A thread is given a CPU, an I/O priority and a timer slack of its own, from outside.
fn settings_of_threads(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter").with(&["--arg", "--threads", "--arg", "2"]);
    container.start(lab, &a)?;
    let look = |host: &Host, deed: &str| {
        host.sh(&format!(
            "pid=$(runc state box | grep -o '\"pid\": [0-9]*' | grep -o '[0-9]*')
             for thread in /proc/$pid/task/*; do thread=${{thread##*/}}; {deed}; done
             for thread in /proc/$pid/task/*; do
                 grep Cpus_allowed_list $thread/status
                 ionice -p ${{thread##*/}}
                 cat /proc/${{thread##*/}}/timerslack_ns
             done"
        ))
    };

    // All but the first.
    let deed = "[ $thread = $pid ] || {
        taskset -pc 0 $thread; ionice -c 2 -n 7 -p $thread; echo 123456 >/proc/$thread/timerslack_ns
    } >/dev/null";
    let before = look(&a, deed)?;

    ensure!(before.matches("123456").count() == 2, "{before}");
    let said = a.ferry(&["migrate", "--json", "--verify", "box", "b"])?.exits(0)?;
    ensure!(!said.out.contains("bound to"), "{said}");
    exactly_one_copy(&container, &b, &a)?;
    let after = look(&b, ":")?;

    // Over there their numbers may be in another order.
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };

    ensure!(sorted(&after) == sorted(&before), "before:\n{before}\nafter:\n{after}");
    Ok(())
}

/// What is written goes on where it was: in the root, in a tmpfs, in a bind mount.
fn files(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    a.sh("mkdir /srv/shared/data")?;
    for (place, seen_at) in [
        ("/lines", "/srv/shared/box/rootfs/lines"),
        ("/mnt/lines", "/srv/shared/data/lines"),
        ("/tmp/lines", ""),
    ] {
        let argument = format!("--file={place}");
        let container = Container::plain("stdio").with(&[
            "--bind",
            "/srv/shared/data:/mnt",
            "--arg",
            &argument,
        ]);
        container.start(lab, &a)?;
        let lines = |host: &Host| -> Outcome<Vec<String>> {
            let inside = format!("/proc/$(pidof stdio-ticker)/root{place}");
            let text = host.sh(&format!("cat {inside}"))?;
            if !seen_at.is_empty() {
                ensure!(host.exec(&["test", "-s", seen_at])?.code == 0, "no {seen_at}");
            }
            let whole = text.rsplit_once('\n').map_or("", |t| t.0);
            Ok(whole.lines().map(str::to_owned).collect())
        };
        let longer = |host: &Host, than: usize| {
            until(&format!("{place} on {} has {than} lines", host.name), LIMIT / 3, || {
                let list = lines(host)?;
                Ok((list.len() > than).then_some(list))
            })
        };
        let before = longer(&a, 20)?.len();
        a.ferry(&["migrate", "box", "b"])?.exits(0)?;
        for (i, line) in longer(&b, before + 20)?.iter().enumerate() {
            ensure!(*line == format!("tick {}", i + 1), "line {} of {place} is {line:?}", i + 1);
        }
        exactly_one_copy(&container, &b, &a)?;
        b.sh("ferry delete -f box")?;
        a.sh("ferry resolve --keep box")?;
    }

    Ok(())
}
