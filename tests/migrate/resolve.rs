//! Whoever goes on when nobody is left: old verdicts are told again, and every open migration is
//! brought to its end.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, exactly_one_copy_within, facts, pair};
use crate::common::lab::{LONG, Lab, SHORT};
use crate::common::process::{until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};
use crate::crashes::{killed_at, reboot};
use crate::memory::{following, following_at};

const LIMIT: Duration = Duration::from_secs(120);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("resolve::missed_word", LIMIT, missed_word),
        in_lab("resolve::told_when_it_can_be", LIMIT, told_when_it_can_be),
        in_lab("resolve::second_migration", LIMIT, second_migration),
        in_lab("resolve::at_boot", LIMIT, at_boot),
        in_lab("resolve::discard_in_post_copy", LIMIT, discard_in_post_copy),
        in_lab("resolve::interrupted_in_post_copy", LIMIT, interrupted_in_post_copy),
        in_lab("resolve::parent_ends", LIMIT, parent_ends),
    ]
}

/// A destination was not there when it was to hear that the container stayed, and nobody goes on telling
/// it: the next migration does before anything else.
fn missed_word(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    killed_at(&a, &b, "source.commit")?;
    lab.link(&["b", "--cut"])?;
    let said = a.ferry(&["resolve", "--timeout", "10s", "box"])?.exits(0)?;
    ensure!(said.out.contains("it runs on here") && said.err.contains("cannot be told"), "{said}");
    a.sh("kill -KILL $(pgrep -f '^/proc/self/exe __guard word')")?;
    lab.link(&["b", "--mend"])?;
    ensure!(facts(&b)?.open().len() == 1, "it is not held");
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    // What is over on both hosts is put by.
    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    let current = a.sh("ls /var/lib/ferry/migrations/*.journal | wc -l")?;
    ensure!(current.trim() == "1", "{current} journals would be read before the next one");
    exactly_one_copy(&container, &a, &b)
}

/// What is settled here, and not known there yet, `--all` stays at.
fn told_when_it_can_be(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    killed_at(&a, &b, "source.commit")?;
    lab.link(&["b", "--cut"])?;
    let mut all = a.start(&["sh", "-c", "exec ferry resolve --all 2>/run/said"])?;
    until("it is settled here, and b has not been told", LONG, || {
        ensure!(!all.has_ended(), "it has left the other host without a word");
        Ok((a.exec(&["grep", "-q", "b cannot be told", "/run/said"])?.code == 0).then_some(()))
    })?;
    ensure!(facts(&a)?.open().is_empty(), "it is not settled here");
    lab.link(&["b", "--mend"])?;
    let said = all.end(LONG)?.exits(0)?;
    ensure!(said.out.contains("b holds nothing of it"), "{said}");
    exactly_one_copy(&container, &a, &b)
}

/// Whoever comes second learns who is at it, however far that one has come.
fn second_migration(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    // It waits for the other host's first word.
    write_script(
        &a.path("/srv/shared/bin/silent")?,
        "#!/bin/sh\ntouch /run/silent\nwhile read -r _; do :; done\n",
    )?;
    let first = a.start(&["ferry", "migrate", "--rsh", "/srv/shared/bin/silent", "box", "b"])?;
    until("the first one waits", SHORT, || {
        Ok((a.exec(&["test", "-e", "/run/silent"])?.code == 0).then_some(()))
    })?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("under way on this host to b, by process"), "{said}");
    a.sh("kill -TERM $(pgrep -f '^ferry migrate')")?;
    first.end(LONG)?.exits(3)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)
}

/// The source goes down while its copy is held, and comes up when the other host cannot be reached: it is
/// asked until it answers, and nothing is decided without it.
fn at_boot(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    killed_at(&a, &b, "source.commit")?;
    reboot(&a)?;
    lab.link(&["b", "--cut"])?;
    let said = a.ferry(&["resolve", "--all", "--timeout", "2s"])?.exits(4)?;
    ensure!(said.out.contains("b, which may hold a copy, cannot be asked"), "{said}");
    let mut boot = a.start(&["ferry", "resolve", "--all", "--boot", "--json"])?;
    until("it asks", SHORT, || {
        ensure!(!boot.has_ended(), "it does not wait");
        Ok((a.exec(&["pgrep", "-x", "ssh"])?.code == 0).then_some(()))
    })?;
    lab.link(&["b", "--mend"])?;
    let said = boot.end(LONG)?.exits(0)?;
    ensure!(said.out.contains("it runs on the other host"), "{said}");
    ensure!(said.out.contains("\"settled\":1"), "{said}");
    exactly_one_copy(&container, &b, &a)?;
    // And where nothing is open.
    a.ferry(&["resolve", "--all"])?.exits(0).map(drop)
}

/// The source is gone for good while memory is still there: the operator's word ends what cannot go on,
/// with everything that was made for it.
fn discard_in_post_copy(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let running = following(lab, &container)?;
    a.sh("kill -KILL $(pgrep -f '^/proc/self/exe __guard') $(pgrep -f '^ferry migrate')")?;
    running.end(LONG)?.exits(137)?;
    let said = b.ferry(&["resolve", "box"])?.exits(4)?;
    ensure!(said.err.contains("--discard"), "no hint: {said}");
    let said = b.ferry(&["resolve", "box", "--discard"])?.exits(0)?;
    ensure!(said.out.contains("there is no copy of it here"), "{said}");
    let left = facts(&b)?;
    ensure!(left.open().is_empty() && !left.netns.iter().any(|n| n == "box"), "left: {left:#?}");
    let said = a.ferry(&["resolve", "box"])?.exits(4)?;
    ensure!(said.err.contains("--keep"), "no hint: {said}");
    a.ferry(&["resolve", "box", "--keep"])?.exits(0)?;
    exactly_one_copy(&container, &a, &b)
}

/// Nobody has to stand by while memory follows.
fn interrupted_in_post_copy(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let running = following_at("4M", lab, &container)?;
    a.sh("kill -TERM $(pgrep -f '^ferry migrate')")?;
    let ended = running.end(LONG)?.exits(4)?;
    ensure!(ended.err.contains("goes on with it"), "{ended}");
    exactly_one_copy_within(LONG, &container, &b, &a)
}

/// Whoever has called it ends without a word: what is not handed over yet is given up.
fn parent_ends(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("counter");
    container.start(lab, &a)?;
    let script = "ferry migrate --die-with-parent --bandwidth 1M --postcopy never box b; true";
    let running = a.start(&["sh", "-c", script])?;
    until("it is under way", SHORT, || {
        Ok(facts(&b)?.open().iter().any(|m| m.under_way).then_some(()))
    })?;
    a.sh("kill -KILL $(pgrep -f '^sh -c ferry migrate')")?;
    running.end(LONG)?.exits(137)?;
    exactly_one_copy_within(LONG, &container, &a, &b)
}
