//! What is left when Ferry and its guards are gone, or a whole host was: `ferry resolve` settles it,
//! and nothing that Ferry says leads to a second copy or ends the only one.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::until;
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(120);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("crashes::source", LIMIT, source),
        in_lab("crashes::carried_through", LIMIT, carried_through),
        in_lab("crashes::taken_back", LIMIT, taken_back),
        in_lab("crashes::word_lost", LIMIT, word_lost),
    ]
}

/// A migration comes by the point, and everything of Ferry's on its source is killed there.
pub fn killed_at(host: &Host, there: &Host, point: &str) -> Outcome {
    let fault = format!("FERRY_FAULT={point}:hold");
    let mut running = host.start(&["env", &fault, "ferry", "migrate", "box", there.name])?;
    let file = host.path(&format!("/run/ferry-fault/{point}"))?;
    until(point, SHORT, || {
        ensure!(!running.has_ended(), "it was over before it came by {point}");
        Ok(file.exists().then_some(()))
    })?;
    // Both at once: whichever is left would go on with it.
    host.sh("kill -KILL $(pgrep -f '^/proc/self/exe __guard') $(pgrep -f '^ferry migrate')")?;
    running.end(LONG)?.exits(137)?;
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))
}

/// The same, as a loss of power leaves the host: nothing runs, what is in memory is gone, and the
/// kernel is another one.
pub fn reboot(host: &Host) -> Outcome {
    host.sh("echo 1 >/sys/fs/cgroup/box/cgroup.kill
             until rmdir /sys/fs/cgroup/box 2>/dev/null; do test -e /sys/fs/cgroup/box || break; done
             ip netns delete box
             grep -o ' /run/ferry/[^ ]*' /proc/self/mountinfo | sort -r | xargs -r umount
             rm -rf /run/ferry /run/runc
             cat /proc/sys/kernel/random/uuid >/tmp/boot
             mount --bind /tmp/boot /proc/sys/kernel/random/boot_id")
        .map(drop)
}

/// Restored and held over there, frozen here, and nobody left who knows: nothing is to be done by hand.
fn source(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    killed_at(&a, &b, "source.commit")?;
    for arguments in [&["migrate", "box", "b"][..], &["check", "box", "b"]] {
        let said = a.ferry(arguments)?.exits(3)?;
        let words = said.err.contains("broken off") && said.err.contains("ferry resolve box");
        ensure!(words && !said.err.contains("runc"), "{arguments:?}: {said}");
    }

    let said = b.ferry(&["resolve", "box"])?.exits(4)?;
    ensure!(said.err.contains("held here"), "{said}");
    let said = a.ferry(&["resolve", "box"])?.exits(0)?;
    ensure!(said.out.contains("it runs on here"), "{said}");
    exactly_one_copy(&container, &a, &b)?;

    // Who asks again tells the other host again.
    let said = a.ferry(&["resolve", "box"])?.exits(0)?;
    ensure!(said.out.contains("b holds nothing of it"), "{said}");

    // The same, and the host goes down: the only copy is the one that is held.
    killed_at(&a, &b, "source.commit")?;
    reboot(&a)?;
    let said = a.ferry(&["run", "-d", "--bundle", &container.bundle, "box"])?;
    ensure!(said.code != 0 && said.err.contains("ferry resolve box"), "{said}");
    ensure!(!said.err.contains("was migrated"), "it was not: {said}");
    ensure!(facts(&b)?.open().len() == 1, "it is not held any more");

    let said = a.ferry(&["resolve", "box"])?.exits(0)?;
    ensure!(said.out.contains("it runs on the other host"), "{said}");
    exactly_one_copy(&container, &b, &a)?;

    // And where the other host has none, that is said.
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    killed_at(&a, &b, "source.commit")?;
    b.ferry(&["resolve", "box", "--discard"])?;
    reboot(&a)?;
    let said = a.ferry(&["resolve", "box"])?.exits(0)?;
    ensure!(said.out.contains("there is no copy"), "{said}");
    ensure!(!said.out.contains("runs"), "nothing does: {said}");
    container.make_network(lab, &a)?;
    container.run_on(&a)?;

    exactly_one_copy(&container, &a, &b)
}

/// Ferry is killed when the container has been handed over: its guard tells the destination, without
/// anybody's asking, whatever fails here.
fn carried_through(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let fault = "FERRY_FAULT=source.committed:kill,guard.silence:error,guard.tasks:error-once";
    a.exec(&["env", fault, "ferry", "migrate", "box", "b"])?.exits(137)?;
    exactly_one_copy(&container, &b, &a)
}

/// Handed over, and the copy is lost before it has run: the source's guard takes the container back
/// without anybody's asking; where that is gone as well, whoever asks next does.
fn taken_back(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let point = "source.committed";
    let file = a.path(&format!("/run/ferry-fault/{point}"))?;
    for guarded in [true, false] {
        let fault = format!("FERRY_FAULT={point}:hold");
        let mut running = a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?;
        until(point, SHORT, || {
            ensure!(!running.has_ended(), "it was over before it came by {point}");
            Ok(file.exists().then_some(()))
        })?;

        let guard = if guarded { "" } else { "$(pgrep -f '^/proc/self/exe __guard')" };
        b.sh("kill -KILL $(pgrep -f '^ferry receive')")?;
        a.sh(&format!("kill -KILL {guard} $(pgrep -f '^ferry migrate')"))?;
        running.end(LONG)?.exits(137)?;
        std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        if !guarded {
            let said = a.ferry(&["resolve", "box"])?.exits(0)?;
            ensure!(said.out.contains("never ran on the other host"), "{said}");
        }
        exactly_one_copy(&container, &a, &b)?;
        probe.is_content()?;
    }

    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    probe.is_content()
}

/// The link ends with the source's word on it that it has given up: nobody takes that for an answer, and
/// the destination does not hold its copy for ever.
fn word_lost(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let point = "source.commit";
    let file = a.path(&format!("/run/ferry-fault/{point}"))?;
    let fault = format!("FERRY_FAULT={point}:hold");
    let mut running = a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?;
    until(point, SHORT, || {
        ensure!(!running.has_ended(), "it was over before it came by {point}");
        Ok(file.exists().then_some(()))
    })?;

    // What is written to it from now on is lost with it.
    a.sh("kill -STOP $(pgrep -f '^ssh ')")?;
    a.sh("kill -INT $(pgrep -f '^ferry migrate')")?;
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    until("it has given up", SHORT, || {
        Ok(facts(&a)?.migrations.iter().any(|m| m.state == "aborted").then_some(()))
    })?;

    a.sh("kill -KILL $(pgrep -f '^ssh ')")?;
    running.end(LONG)?.exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;

    exactly_one_copy(&container, &b, &a)
}
