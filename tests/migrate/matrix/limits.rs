//! Few descriptors, and little room in `/run`, on either side: refused before anything is touched, or
//! carried; never found in the freeze.

use std::time::Duration;

use libtest_mimic::Trial;

use super::kinds::{Kind, PATIENT, World};
use crate::common::lab::{LONG, Lab};
use crate::common::process::write_script;
use crate::common::suite::{full, in_lab_of};
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(900);

/// How many descriptors Ferry may have.
const DESCRIPTORS: &[u32] = &[16, 24, 32, 48, 64, 96, 128, 256, 512, 1023, 1024];
/// Of these some by default.
const SOME_DESCRIPTORS: &[u32] = &[24, 256, 1024];
/// What a process may have without further ado. getrlimit(2), RLIMIT_NOFILE
const USUAL: u32 = 1024;
/// How large `/run` is, in KiB.
const RUN: &[u32] = &[256, 512, 1024, 2048, 4096];
const SOME_RUN: &[u32] = &[512, 1024];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for &(kind, name) in Kind::ALL {
        if full() || kind == Kind::Carried {
            let trial = format!("matrix::limits::{name}::descriptors");
            trials.push(in_lab_of(kind.hosts(), trial, LIMIT, move |lab| descriptors(lab, kind)));
        }
        if full() || kind == Kind::Files {
            let trial = format!("matrix::limits::{name}::run");
            trials.push(in_lab_of(kind.hosts(), trial, LIMIT, move |lab| small_run(lab, kind)));
        }
    }
    trials
}

/// It was refused with words, or has gone through; where it is now.
fn refused_or_carried(world: &mut World, case: &str, line: &[String]) -> Outcome<Option<String>> {
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    let ended = world.a.start(&words)?.end(PATIENT)?;
    let step = |e: String| format!("{case}: {e}\nmigrate: {ended}");
    let goes = ended.code == 0;
    let here = if goes { world.b.clone() } else { world.a.clone() };
    let late = if matches!(ended.code, 0 | 3) { None } else { Some(step("found late".to_owned())) };
    world.rests_on(&here, LONG).map_err(step)?;
    world.is_content().map_err(step)?;
    if ended.code == 3 {
        ensure!(ended.err.contains("hint: "), "{}", step("no hint".to_owned()));
    }
    if goes {
        let said = world.migrate(&world.a)?;
        ensure!(said.code == 0, "back after {case}: {said}");
        world.rests_on(&world.a.clone(), LONG)?;
    }
    Ok(late)
}

fn descriptors(lab: &Lab, kind: Kind) -> Outcome {
    let mut world = World::start(lab, kind)?;
    let mut late = Vec::new();
    for &count in if full() { DESCRIPTORS } else { SOME_DESCRIPTORS } {
        for side in ["source", "destination"] {
            let case = format!("{count} descriptors on the {side}");
            let mut line = world.line(&world.b, "A=", "A=", &[])?;
            // The other side has what most hosts give, and not whatever this machine does.
            let (here, there) = if side == "source" { (count, USUAL) } else { (USUAL, count) };
            for (script, count) in [("few", here), ("faulty", there)] {
                let few = format!("#!/bin/sh\nulimit -n {count}\nexec ferry \"$@\"\n");
                write_script(&world.a.path(&format!("/srv/shared/bin/{script}"))?, &few)?;
            }
            let ferry = line.iter().position(|w| w == "ferry").ok_or("no ferry")?;
            line[ferry] = "/srv/shared/bin/few".to_owned();
            late.extend(refused_or_carried(&mut world, &case, &line)?);
        }
    }
    ensure!(late.is_empty(), "{}", late.join("\n\n"));
    Ok(())
}

fn small_run(lab: &Lab, kind: Kind) -> Outcome {
    let mut world = World::start(lab, kind)?;
    let mut late = Vec::new();
    for &size in if full() { RUN } else { SOME_RUN } {
        for host in [world.a.clone(), world.b.clone()] {
            let case = format!("{size} KiB in /run of {}", host.name);
            host.sh(&format!("mount -o remount,size={size}k /run"))?;
            let line = world.line(&world.b, "A=", "A=", &[])?;
            late.extend(refused_or_carried(&mut world, &case, &line)?);
            host.sh("mount -o remount,size=1g /run")?;
        }
    }
    ensure!(late.is_empty(), "{}", late.join("\n\n"));
    Ok(())
}
