//! How a case ends: by itself, by `ferry resolve --all` as the unit at boot does it, or with a clear
//! word that only an operator can decide.

use std::time::{Duration, Instant};

use super::kinds::World;
use crate::common::facts::{Facts, facts};
use crate::common::lab::{Host, LONG, SHORT};
use crate::common::process::Output;
use crate::common::{Outcome, ensure};

/// Cases after which connections are lost, or time goes back, and why. Each time Ferry says so, and an
/// operator decides.
pub const LOSES: &[(&str, &str, &str)] = &[
    ("destination", "destination.committed", BOTH),
    ("destination", "destination.open", BOTH),
    ("destination", "restore.resume", BOTH),
    ("destination", "destination.running", BOTH),
    ("destination", "source.let-go", BOTH),
];

/// Those who put memory into the tasks are gone with what is left of it, and the tasks may have run.
const BOTH: &str = "its memory was lost with all who had it";

/// Who may see to it that it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Somebody of Ferry's is left who does it by himself.
    Itself,
    /// Nobody is left on one of the hosts: whoever asks next.
    Asking,
}

/// What an operator is told, where he has to decide.
const WORDS: &[&str] = &["ferry resolve box --keep", "ferry resolve box --discard"];

/// Where it runs: let run, and nowhere else.
fn running(world: &World, all: &[Facts; 2]) -> Option<Host> {
    let runs = |facts: &Facts| {
        let status = facts.containers.get("box");
        let held = |m: &&crate::common::facts::Migration| {
            m.role == "destination" && matches!(m.state.as_str(), "begun" | "ready")
        };
        status.is_some_and(|s| s.status == "running" && s.frozen == "0")
            && facts.process_of(&world.container)
            && !facts.open().iter().any(held)
    };
    let stands = |facts: &Facts| facts.containers.get("box").is_some_and(|s| s.frozen == "1");
    match (runs(&all[0]), runs(&all[1])) {
        (true, false) => Some(world.a.clone()),
        // What stands on the source may still have memory that is wanted.
        (false, true) if !stands(&all[0]) => Some(world.b.clone()),
        _ => None,
    }
}

fn look(world: &World) -> Outcome<[Facts; 2]> {
    Ok([facts(&world.a)?, facts(&world.b)?])
}

/// Says what is known, for the reader of a failure.
fn state_of(world: &World) -> String {
    let one = |host: &Host| match facts(host) {
        Ok(f) => format!(
            "{}: containers {:?}, migrations {:?}, frozen {:?}, ferries {:?}",
            host.name,
            f.containers,
            f.migrations,
            f.groups,
            f.processes.iter().filter(|p| p.name == "ferry").map(|p| &p.line).collect::<Vec<_>>()
        ),
        Err(e) => e,
    };
    format!("{}\n{}", one(&world.a), one(&world.b))
}

/// Waits until it runs on one host only, and says on which: by itself, or after it has been asked for; an
/// operator's word only where `loses` says why it may be needed.
pub fn settle(world: &mut World, by: By, loses: Option<&str>, ended: &Output) -> Outcome<Host> {
    settle_and_tell(world, by, loses, ended).map(|(here, _)| here)
}

/// The same, and what was said by those who were asked.
pub fn settle_and_tell(
    world: &mut World,
    by: By,
    loses: Option<&str>,
    ended: &Output,
) -> Outcome<(Host, String)> {
    // What is asked from here on is asked of a Ferry that has no faults.
    world.disarm()?;
    let verdict = ended.code == 4 && WORDS.iter().any(|w| ended.err.contains(w));
    let patience = match by {
        By::Itself if !verdict => LONG,
        _ => Duration::from_secs(3),
    };
    let until = Instant::now() + patience;
    while Instant::now() < until {
        if let Some(here) = running(world, &look(world)?) {
            return Ok((here, String::new()));
        }
    }

    if by == By::Itself && !verdict && loses.is_none() {
        return Err(format!("nobody goes on by himself\n{}", state_of(world)));
    }

    // As the unit does it at boot, on either host.
    let mut said = String::new();
    for _ in 0..3 {
        for host in [&world.a, &world.b] {
            let one = host.ferry(&["resolve", "--all", "--timeout", "20s"])?;
            said += &format!("\non {}: {one}", host.name);
            ensure!(matches!(one.code, 0 | 4), "{said}");
        }
        if let Some(here) = running(world, &look(world)?) {
            return Ok((here, said));
        }
    }

    let Some(why) = loses else {
        return Err(format!("it runs nowhere{said}\n{}", state_of(world)));
    };
    ensure!(WORDS.iter().any(|w| said.contains(w)), "{why}: nobody says what can be done{said}");
    world.a.ferry(&["resolve", "box", "--keep"])?.exits(0)?;

    // What its clients have been told since, it does not know.
    world.watch()?;
    Ok((world.a.clone(), said))
}

/// Nothing else is anywhere; what nobody has been left to clear away goes when somebody asks.
pub fn clears_away(world: &mut World, here: &Host) -> Outcome {
    let first = world.rests_on(here, Duration::from_secs(15));
    if first.is_err() {
        for host in [world.a.clone(), world.b.clone()] {
            host.ferry(&["resolve", "--all", "--timeout", "20s"])?.exits(0)?;
        }
        world.rests_on(here, SHORT)?;
    }
    Ok(())
}
