//! Two are killed at once, at each point at which [`crate::faults`] kills one.

use std::time::Duration;

use libtest_mimic::Trial;

use super::ends::{By, LOSES, clears_away, settle_and_tell};
use super::kinds::{Kind, PATIENT, World};
use crate::common::lab::{Host, Lab};
use crate::common::process::Output;
use crate::common::suite::{full, in_lab_of};
use crate::common::{Outcome, ensure};
use crate::faults::{At, LIFTING, POINTS};

const LIMIT: Duration = Duration::from_secs(900);

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whom {
    /// The source's Ferry and its guard.
    Source,
    /// The destination's Ferry and its guards.
    Destination,
    /// Both Ferries.
    Ferries,
    /// The source's Ferry and the destination's guards.
    SourceAndGuards,
    /// The destination's Ferry and the source's guard.
    DestinationAndGuard,
}

const ALL: &[(Whom, &str)] = &[
    (Whom::Source, "source"),
    (Whom::Destination, "destination"),
    (Whom::Ferries, "ferries"),
    (Whom::SourceAndGuards, "source-and-guards"),
    (Whom::DestinationAndGuard, "destination-and-guard"),
];

/// Where many connections are out of the tasks, and nobody has them but the source's Ferry and its guard
/// (docs/limits.md).
const OUT: &[&str] = &[
    "extract.kept",
    "extract.taken",
    "dump.fenced",
    "source.dump",
    "dump.dumped",
    "source.transfer",
    "destination.restore",
    "restore.request",
    "source.sent",
    "restore.restored",
    "destination.restored",
    "destination.ready",
    "source.commit",
];
/// What is said then.
const LOST: &str = "connections that had been taken out of the container are lost";

/// What is tried by default.
const SOME: &[(Kind, &str, &str)] = &[
    (Kind::Plain, "destination", "destination.running"),
    (Kind::Plain, "ferries", "source.committed"),
    (Kind::Files, "source", "source.transfer"),
    (Kind::Overlay, "ferries", "destination.open"),
    (Kind::PostCopy, "source-and-guards", "source.let-go"),
    (Kind::PostCopy, "ferries", "destination.running"),
    (Kind::PostCopy, "source-and-guards", "restore.request"),
    (Kind::Floating, "source", "source.committed"),
    (Kind::Floating, "destination", "restore.resume"),
    (Kind::Forward, "ferries", "destination.commit"),
    (Kind::Carried, "destination-and-guard", "extract.taken"),
];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(kind, kind_name) in Kind::ALL {
        let extraction: &[_] = if kind == Kind::Carried { LIFTING } else { &[] };
        for &(whom, name) in ALL {
            for &(point, at) in POINTS.iter().chain(extraction) {
                if full() || SOME.contains(&(kind, name, point)) {
                    let trial = format!("matrix::pairs::{kind_name}::{name}::{point}");
                    let body = move |lab: &Lab| killed(lab, kind, (whom, name), (point, at));
                    trials.push(in_lab_of(kind.hosts(), trial, LIMIT, body));
                }
            }
        }
    }
    trials
}

/// The processes of a host that are called so; that there are none may be.
fn pids(host: &Host, pattern: &str) -> Outcome<Vec<String>> {
    let said = host.exec(&["pgrep", "-f", pattern])?;
    Ok(said.out.lines().map(str::to_owned).collect())
}

/// Those to be killed, by host.
fn victims(world: &World, whom: Whom) -> Outcome<[Vec<String>; 2]> {
    let source = || pids(&world.a, "^ferry migrate");
    let guard = || pids(&world.a, "^/proc/self/exe __guard /");
    let destination = || pids(&world.b, "^ferry receive");
    let guards = || pids(&world.b, "^(/proc/self/exe )?__guard pages");
    Ok(match whom {
        Whom::Source => [[source()?, guard()?].concat(), Vec::new()],
        Whom::Destination => [Vec::new(), [destination()?, guards()?].concat()],
        Whom::Ferries => [source()?, destination()?],
        Whom::SourceAndGuards => [source()?, guards()?],
        Whom::DestinationAndGuard => [guard()?, destination()?],
    })
}

/// None of them does anything between the first one's end and the last one's.
fn kill(world: &World, whom: Whom, point: &str) -> Outcome {
    let all = victims(world, whom)?;
    // The destination has heard by then that nothing more comes, and may have ended.
    let ended = point == "source.finish" && matches!(whom, Whom::Destination);
    ensure!(ended || all.iter().any(|list| !list.is_empty()), "there is nobody to be killed");
    for signal in ["STOP", "KILL"] {
        for (host, list) in [&world.a, &world.b].into_iter().zip(&all) {
            if !list.is_empty() {
                // Who has ended meanwhile has ended.
                host.sh(&format!("kill -{signal} {} || true", list.join(" ")))?;
            }
        }
    }
    Ok(())
}

/// A migration that comes by the point, and is killed there.
fn killed_at(world: &World, whom: Whom, point: (&str, At)) -> Outcome<Output> {
    let (running, file) = world.held_at(point, "A=")?;
    let done = kill(world, whom, point.0);
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    done?;
    running.end(PATIENT)
}

fn killed(
    lab: &Lab,
    kind: Kind,
    (whom, name): (Whom, &'static str),
    (point, at): (&'static str, At),
) -> Outcome {
    let mut world = World::start(lab, kind)?;
    let ended = killed_at(&world, whom, (point, at))?;
    let loses = LOSES.iter().find(|l| (l.0, l.1) == (name, point)).map(|l| l.2);
    let by = if whom == Whom::Source { By::Asking } else { By::Itself };
    let all = (|| {
        let (here, said) = settle_and_tell(&mut world, by, loses, &ended)?;
        clears_away(&mut world, &here)?;
        if kind == Kind::Carried && whom == Whom::Source && OUT.contains(&point) {
            ensure!(here.name == "b" || said.contains(LOST), "nobody says what is lost: {said}");
            world.watch()?;
        }
        world.is_content()?;
        world.goes_on(&here)
    })();
    all.map_err(|e| format!("{e}\nmigrate: {ended}"))
}
