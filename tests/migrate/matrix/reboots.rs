//! A host goes down in the middle of a migration, and comes up: nothing of it runs, `/run` is empty, the
//! disk is as it was. Then `ferry resolve --all --boot`, as the unit does it.

use std::time::Duration;

use libtest_mimic::Trial;

use super::kinds::{Kind, PATIENT, World};
use crate::common::facts::{Facts, facts};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::process::{Output, until};
use crate::common::suite::{full, in_lab_of};
use crate::common::{Outcome, ensure};
use crate::faults::At;

const LIMIT: Duration = Duration::from_secs(900);

/// What has become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outlook {
    /// It runs on the source.
    Source,
    /// It runs on the destination.
    Destination,
    /// It was on the host that went down, as any container there.
    Gone,
    /// Only a copy is left that may be older than what has run: an operator says whether it is to.
    Operator,
}

use Outlook::{Destination, Gone, Operator, Source};

/// Where a host goes down: the point, where that is, what comes of it when the source goes down, and when
/// the destination does.
const POINTS: &[(&str, At, Outlook, Outlook)] = &[
    ("source.prepare", At::Source, Gone, Source),
    ("destination.prepared", At::Destination, Gone, Source),
    ("source.transfer", At::Source, Gone, Source),
    ("destination.restored", At::Destination, Gone, Source),
    ("source.commit", At::Source, Destination, Source),
    // Nobody knows whether the word came, as what the destination wrote then need not be on its disk.
    ("source.committed", At::SourceAfter, Destination, Operator),
    ("destination.commit", At::DestinationAfter, Destination, Operator),
    ("destination.running", At::DestinationAfter, Destination, Operator),
    ("source.let-go", At::SourceAfter, Destination, Gone),
    ("source.finish", At::SourceAfter, Destination, Gone),
];

/// What is tried by default: whether it is the source that goes down.
const SOME: &[(Kind, &str, bool)] = &[
    (Kind::Plain, "source.commit", true),
    (Kind::Plain, "destination.running", false),
    (Kind::Floating, "source.committed", true),
    (Kind::Overlay, "source.commit", false),
    (Kind::Files, "source.committed", false),
    (Kind::PostCopy, "source.committed", true),
    (Kind::PostCopy, "destination.running", true),
];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(kind, name) in Kind::ALL {
        for &(point, at, source, destination) in POINTS {
            for (is_source, side, outlook) in
                [(true, "source", source), (false, "destination", destination)]
            {
                if full() || SOME.contains(&(kind, point, is_source)) {
                    let trial = format!("matrix::reboots::{name}::{side}::{point}");
                    let outlook = outlook_of(kind, point, is_source, outlook);
                    let body =
                        move |lab: &Lab| rebooted(lab, kind, (point, at), is_source, outlook);
                    trials.push(in_lab_of(kind.hosts(), trial, LIMIT, body));
                }
            }
        }
    }
    trials
}

/// While memory is to follow, what runs over there needs the source.
fn outlook_of(kind: Kind, point: &str, is_source: bool, usual: Outlook) -> Outlook {
    let whole = matches!(point, "source.let-go" | "source.finish");
    if kind == Kind::PostCopy && is_source && usual == Destination && !whole { Gone } else { usual }
}

/// What the unit at boot does, on a host that is up again.
fn at_boot(host: &Host) -> Outcome<Output> {
    let boot = host.start(&["ferry", "resolve", "--all", "--boot"])?.end(PATIENT)?;
    ensure!(matches!(boot.code, 0 | 4), "on {}: {boot}", host.name);
    Ok(boot)
}

/// Never two, whatever becomes of it.
fn both(world: &World) -> Outcome<[Facts; 2]> {
    let all = [facts(&world.a)?, facts(&world.b)?];
    let runs = |f: &Facts| {
        f.process_of(&world.container)
            && f.groups.is_empty()
            && !f.open().iter().any(|m| m.state == "ready")
    };
    ensure!(!all.iter().all(runs), "TWO COPIES: {all:#?}");
    Ok(all)
}

fn rebooted(
    lab: &Lab,
    kind: Kind,
    (point, at): (&str, At),
    is_source: bool,
    outlook: Outlook,
) -> Outcome {
    let mut world = World::start(lab, kind)?;
    let on_source = matches!(at, At::Source | At::SourceAfter);
    let (running, file) = world.held_at((point, at), "A=")?;
    let down = if is_source { world.a.clone() } else { world.b.clone() };
    lab.reboot(down.name)?;
    world.disarm()?;
    if on_source != is_source {
        std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    }

    let said = at_boot(&down)?;
    let ended = running.end(PATIENT)?;
    both(&world)?;
    let all = match outlook {
        Source | Destination => runs_on(&mut world, outlook, is_source),
        Gone => is_gone(&mut world, &said),
        Operator => operator_says(&mut world),
    };

    all.map_err(|e| format!("{e}\nat boot: {said}\nmigrate: {ended}"))
}

/// One copy has outlived it, and runs without anybody's asking.
fn runs_on(world: &mut World, outlook: Outlook, source_down: bool) -> Outcome {
    let here = if outlook == Source { world.a.clone() } else { world.b.clone() };
    // Home is what leads packets to it: it comes back as to any host in its address's network.
    let cut_off = world.kind == Kind::Forward && source_down && outlook == Destination;
    if cut_off {
        world.unwatched();
        let home = world.a.clone();
        until("it runs abroad", LONG, || {
            let status = facts(&here)?.containers.get("box").map(|s| s.status.clone());
            Ok((status.as_deref() == Some("running")).then_some(()))
        })?;
        let said = world.migrate(&home)?;
        ensure!(said.code == 0, "{said}");
        world.rests_on(&home, SHORT)?;
        world.watch()?;
        return world.is_content();
    }
    world.rests_on(&here, LONG)?;
    world.is_content()?;
    if !matches!(world.kind, Kind::Overlay) {
        world.goes_on(&here)?;
    }
    Ok(())
}

/// That is said, nothing is left, and it can be started anew.
fn is_gone(world: &mut World, said: &Output) -> Outcome {
    world.unwatched();
    let mut words = said.out.clone() + &said.err;
    let mut last = String::new();
    let clean = until("nothing is left of it", SHORT, || {
        for host in [&world.a, &world.b] {
            let one = host.ferry(&["resolve", "--all", "--timeout", "20s"])?;
            words += &(one.out.clone() + &one.err);
            if one.out.contains("`ferry resolve box --discard` ends it here") {
                // Its memory was on the host that went down.
                host.ferry(&["resolve", "box", "--discard"])?;
            }
            if one.out.contains("none here any more: it is lost") {
                host.ferry(&["resolve", "box", "--keep"])?;
            }
        }

        let all = both(world)?;
        let left = all
            .iter()
            .any(|f| f.process_of(&world.container) || !f.open().is_empty() || !f.work.is_empty());
        last = format!("{:?} {:?}", all[0].migrations, all[1].migrations);
        Ok((!left).then_some(()))
    });

    clean.map_err(|e| format!("{e}\n{words}\n{last}"))?;
    Ok(())
}

/// Ferry ends no copy and lets none run without his word, and says so.
fn operator_says(world: &mut World) -> Outcome {
    let said = world.a.ferry(&["resolve", "box"])?;
    if said.code == 0 {
        // It is sure that the copy has not run.
        return runs_on(world, Source, false);
    }
    ensure!(said.code == 4 && said.err.contains("ferry resolve box --keep"), "{said}");
    let all = both(world)?;
    ensure!(!all[1].process_of(&world.container), "something of it runs: {all:#?}");
    world.a.ferry(&["resolve", "box", "--keep"])?.exits(0)?;
    // What its clients have been told since, it does not know.
    world.watch()?;
    world.rests_on(&world.a.clone(), LONG)?;
    world.is_content()
}
