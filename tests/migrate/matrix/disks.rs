//! The disk of a journal is full, or broken, at each write to it.

use std::time::Duration;

use libtest_mimic::Trial;

use super::ends::{By, clears_away, settle};
use super::kinds::{Kind, PATIENT, World};
use crate::common::facts::exactly_one_copy;
use crate::common::lab::Lab;
use crate::common::suite::{full, in_lab_of};
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(1500);

/// Writes of a source: what fails, whether the migration has to be given up for it to come to that, and
/// whether the container runs there afterwards.
const SOURCE: &[(&str, bool, bool)] = &[
    ("record", false, false),
    ("record-sync", false, false),
    ("directory-sync", false, false),
    ("begun", false, false),
    ("committed", false, false),
    ("committed-sync", false, false),
    ("finished", false, true),
    ("finished-sync", false, true),
    ("returning", true, false),
    ("returning-sync", true, false),
    ("aborted", true, false),
    ("aborted-sync", true, false),
    ("told", true, false),
];

/// Of a destination.
const DESTINATION: &[(&str, bool, bool)] = &[
    ("record", false, false),
    ("record-sync", false, false),
    ("directory-sync", false, false),
    ("begun", false, false),
    ("ready", false, false),
    // The copy has not run, and the source is told so.
    ("committed", false, false),
    ("committed-sync", false, true),
    ("whole", false, true),
    ("whole-sync", false, true),
    ("finished", false, true),
    ("finished-sync", false, true),
    ("told", false, true),
    ("aborted", true, false),
    ("aborted-sync", true, false),
];

/// What is tried by default, of each kind of error on the other kind of container.
const SOME: &[(bool, &str)] = &[
    (true, "record"),
    (true, "committed"),
    (true, "committed-sync"),
    (true, "finished"),
    (true, "aborted"),
    (false, "record"),
    (false, "ready"),
    (false, "committed"),
    (false, "whole"),
    (false, "aborted"),
];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(kind, name) in Kind::ALL {
        for error in ["enospc", "eio"] {
            let sample = matches!((kind, error), (Kind::Plain, "eio") | (Kind::Floating, "enospc"));
            if full() || sample {
                let trial = format!("matrix::disks::{name}::{error}");
                let body = move |lab: &Lab| each_write(lab, kind, error);
                trials.push(in_lab_of(kind.hosts(), trial, LIMIT, body));
            }
        }
        // Ferry's state is on the disk that layers are on.
        if kind != Kind::Overlay && (full() || kind == Kind::Plain) {
            let trial = format!("matrix::disks::{name}::full");
            let body = move |lab: &Lab| really_full(lab, kind);
            trials.push(in_lab_of(kind.hosts(), trial, LIMIT, body));
        }
    }
    trials
}

fn each_write(lab: &Lab, kind: Kind, error: &str) -> Outcome {
    let mut world = World::start(lab, kind)?;
    let mut here = world.a.clone();
    let mut failed = Vec::new();
    for (on_source, list) in [(true, SOURCE), (false, DESTINATION)] {
        for &(step, given_up, goes) in list {
            if !full() && !SOME.contains(&(on_source, step)) {
                continue;
            }

            // Forwarded is what is not at home: that it stays is tried from home.
            let case = format!(
                "{error} at {step} on the {}",
                if on_source { "source" } else { "destination" }
            );

            let fault = format!("journal.{step}:{error}");
            let (own, other) = match (on_source, given_up) {
                (_, false) => (format!("FERRY_FAULT={fault}"), "A=".to_owned()),
                (true, true) => {
                    (format!("FERRY_FAULT={fault},source.commit:error"), "A=".to_owned())
                }
                (false, true) => {
                    (format!("FERRY_FAULT={fault}"), "FERRY_FAULT=source.commit:error".to_owned())
                }
            };

            let (ours, theirs) = if on_source { (&own, &other) } else { (&other, &own) };
            let there = world.other(&here);
            let ended = world.begin(&there, ours, theirs)?.end(PATIENT)?;
            let now = settle(&mut world, By::Itself, None, &ended);
            let all = now.and_then(|now| {
                here = now.clone();
                ensure!(goes || now.name != there.name, "it has gone");
                ensure!(!goes || now.name == there.name, "it has not gone");
                ensure!(matches!((goes, ended.code), (true, 0 | 4) | (false, 1 | 3)), "an odd end");
                clears_away(&mut world, &now)?;
                world.is_content()
            });

            if let Err(e) = all {
                failed.push(format!("{case}: {e}\nmigrate: {ended}"));
                // Whether those after it are right can be told only where this one has not lost it.
                if world.is_content().is_err() {
                    break;
                }
            }
        }
    }

    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    world.goes_on(&here)
}

/// Not one byte more fits.
fn really_full(lab: &Lab, kind: Kind) -> Outcome {
    let mut world = World::start(lab, kind)?;
    for full in [world.a.clone(), world.b.clone()] {
        full.sh("mkdir -p /var/lib/ferry
             mount -t tmpfs -o size=20m tmpfs /var/lib/ferry
             dd if=/dev/zero of=/var/lib/ferry/full bs=64k 2>/dev/null || :")?;
        let said = world.migrate(&world.b)?;
        ensure!(said.code == 3, "on {}: {said}", full.name);
        ensure!(said.err.contains("/var/lib/ferry is full on"), "on {}: {said}", full.name);
        exactly_one_copy(&world.container, &world.a, &world.b)
            .map_err(|e| format!("{}: {e}\n{said}", full.name))?;
        world.is_content()?;
        full.sh("rm /var/lib/ferry/full")?;
    }
    world.goes_on(&world.a.clone())
}
