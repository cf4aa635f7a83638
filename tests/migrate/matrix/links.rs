//! The link is out for longer than every limit, and comes back: somebody goes on by himself.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use super::ends::{By, settle};
use super::kinds::{Kind, PATIENT, World};
use crate::common::lab::{LONG, Lab, SHORT};
use crate::common::process::until;
use crate::common::suite::{full, in_lab_of};
use crate::common::{Outcome, ensure};
use crate::faults::At;

const LIMIT: Duration = Duration::from_secs(900);
/// In seconds: how long the longest limit is here. On a busy machine, what it limits takes its time, too.
const LONGEST: u64 = 15;
/// How long a cable is out: after one limit another one may begin, such as that of a goodbye.
const OUT: Duration = Duration::from_secs(3 * LONGEST);

/// Where it is cut.
const POINTS: &[(&str, At)] = &[
    ("source.prepare", At::Source),
    ("destination.prepared", At::Destination),
    ("source.transfer", At::Source),
    ("destination.restored", At::Destination),
    ("destination.ready", At::Destination),
    ("source.commit", At::Source),
    ("source.committed", At::SourceAfter),
    ("destination.commit", At::DestinationAfter),
    ("destination.running", At::DestinationAfter),
    ("source.let-go", At::SourceAfter),
];

/// What is tried by default.
const SOME: &[(Kind, &str)] = &[(Kind::Plain, "destination.ready")];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(kind, name) in Kind::ALL {
        for &(point, at) in POINTS {
            if full() || SOME.contains(&(kind, point)) {
                let trial = format!("matrix::links::{name}::{point}");
                let body = move |lab: &Lab| cut(lab, kind, point, at);
                trials.push(in_lab_of(kind.hosts(), trial, LIMIT, body));
            }
        }
    }
    trials
}

fn cut(lab: &Lab, kind: Kind, point: &str, at: At) -> Outcome {
    let mut world = World::start(lab, kind)?;
    let limit = format!("FERRY_FAULT_LIMIT={LONGEST}");
    let (running, file) = world.held_at((point, at), &limit)?;
    lab.link(&["b", "--cut"])?;
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let began = Instant::now();
    until("the cable has been out for longer than every limit", LONG, || {
        Ok((began.elapsed() > OUT).then_some(()))
    })?;

    lab.link(&["b", "--mend"])?;
    let ended = running.end(PATIENT)?;
    let all = (|| {
        // At the commit the source looks no further: whether the link is there it learns after it.
        let after =
            matches!(at, At::SourceAfter | At::DestinationAfter) || point == "source.commit";
        ensure!(matches!((after, ended.code), (false, 1) | (true, 0 | 4)), "an unexpected end");
        let here = settle(&mut world, By::Itself, None, &ended)?;
        ensure!((here.name == "b") == after, "it runs on {}", here.name);

        // Both who wait for a link, and TCP's own timers, have become slow meanwhile.
        world.rests_on(&here, LONG)?;
        until("its clients are answered", LONG, || Ok(world.answers().is_ok().then_some(())))?;
        world.is_content()?;
        world.goes_on(&here)?;
        world.rests_on(&world.other(&here), SHORT)
    })();

    all.map_err(|e| format!("{e}\nmigrate: {ended}"))
}
