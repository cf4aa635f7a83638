//! Threads that wait in a system call go on waiting, for what is left of their time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, Lab, SHORT};
use crate::common::process::until;
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(180);
/// How long they wait.
const WAIT: Duration = Duration::from_secs(30);
/// What beginning anew would add is more.
const LATE: Duration = Duration::from_secs(3);

/// What each call returns when its time is over.
const CALLS: &[(&str, i32)] = &[
    ("nanosleep", 0),
    ("nanosleep-rest", 0),
    ("nanosleep-same", 0),
    ("clock_nanosleep", 0),
    ("poll", 0),
    ("poll-event", 1),
    ("ppoll", 0),
    ("select", 0),
    ("futex", libc::ETIMEDOUT),
    ("futex-until", libc::ETIMEDOUT),
    ("epoll_wait", 0),
    ("epoll_pwait", 0),
    ("epoll-event", 1),
    ("sigtimedwait", libc::EAGAIN),
    ("semtimedop", libc::EAGAIN),
    ("recv", libc::EAGAIN),
];
/// Those for which the time does not count in which nobody runs, or is on the way.
const RELATIVE: &[&str] = &["ppoll", "select", "epoll_wait", "epoll_pwait"];
/// Those whose time begins anew: docs/limits.md.
const ANEW: &[&str] = &["sigtimedwait", "semtimedop", "recv"];

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("sleepers::go_on_over_there_and_back", LIMIT, go_on_over_there_and_back),
        in_lab("sleepers::go_on_here", LIMIT, go_on_here),
        in_lab("sleepers::a_single_one_does_not_end", LIMIT, a_single_one_does_not_end),
    ]
}

fn sleepers(more: &[&str]) -> Container {
    let limit = format!("--limit={}s", WAIT.as_secs());
    let all = std::iter::once(limit.as_str()).chain(more.iter().copied());
    Container::plain("sleepers").with(&all.flat_map(|one| ["--arg", one]).collect::<Vec<_>>())
}

/// When all of them wait.
fn await_ready(host: &Host) -> Outcome<Instant> {
    let file = host.path("/srv/shared/box/rootfs/ready")?;
    until("all wait", SHORT, || Ok(file.exists().then_some(())))?;
    Ok(Instant::now())
}

/// Each has returned what it does when its time is over, after that time. `on_the_way` is how long migrations
/// have taken.
fn as_if_nothing_had_been(host: &Host, on_the_way: Duration) -> Outcome {
    let file = host.path("/srv/shared/box/rootfs/said")?;
    let said = until("all have returned", 3 * WAIT, || {
        let said = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
        Ok((said.lines().count() == CALLS.len()).then_some(said))
    })?;
    let number = |word: &str| word.parse::<i64>().map_err(|e| format!("{word}: {e}"));
    let mut found = HashMap::new();
    for line in said.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let &[name, result, took, own] = &words[..] else { return Err(format!("said: {line}")) };
        found.insert(name, (number(result)?, number(took)?, number(own)?));
    }

    let wait = WAIT.as_millis() as i64;
    for (name, result) in CALLS {
        let Some((returned, took, own)) = found.get(name) else {
            return Err(format!("{name} is missing:\n{said}"));
        };

        // What the container's own clock shows: it stands still for a part of that time.
        let late = match name {
            name if ANEW.contains(name) => Duration::MAX,
            name if RELATIVE.contains(name) => LATE + on_the_way,
            _ => LATE,
        };

        let late = u128::from(own.unsigned_abs()) > (WAIT.saturating_add(late)).as_millis();
        ensure!(
            *returned == i64::from(*result) && *took >= wait && *own >= wait - 1 && !late,
            "{name}, which should return {result} after {wait} ms, is wrong:\n{said}"
        );
    }

    Ok(())
}

fn go_on_over_there_and_back(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = sleepers(&[]);
    container.start(lab, &a)?;
    await_ready(&a)?;
    let mut on_the_way = Duration::ZERO;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let began = Instant::now();
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        on_the_way += began.elapsed();
        exactly_one_copy(&container, to, from)?;
    }
    as_if_nothing_had_been(&a, on_the_way)
}

/// Before CRIU has seen them, when it has dumped, and once more.
fn go_on_here(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = sleepers(&[]);
    container.start(lab, &a)?;
    await_ready(&a)?;
    let mut on_the_way = Duration::ZERO;
    for fault in ["dump.fenced:error", "dump.dumped:error", "dump.dumped:error"] {
        let began = Instant::now();
        let fault = format!("FERRY_FAULT={fault}");
        a.exec(&["env", &fault, "ferry", "migrate", "box", "b"])?.exits(1)?;
        on_the_way += began.elapsed();
        exactly_one_copy(&container, &a, &b)?;
    }
    as_if_nothing_had_been(&a, on_the_way)
}

/// busybox' `sleep` is such a program.
fn a_single_one_does_not_end(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = sleepers(&["--once"]);
    container.start(lab, &a)?;
    let began = Instant::now();
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    let on_the_way = began.elapsed();
    exactly_one_copy(&container, &b, &a)?;
    until("it ends", 2 * WAIT, || {
        Ok(b.ferry(&["state", "box"])?.out.contains("\"stopped\"").then_some(()))
    })?;
    let took = began.elapsed();
    let wrong = took + LATE < WAIT || took > WAIT + LATE + on_the_way;
    ensure!(!wrong, "it has slept for {took:?}, {on_the_way:?} of it on the way");
    Ok(())
}
