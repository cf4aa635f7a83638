//! Suites that move containers between the hosts of a lab.
//!
//! ```text
//! cargo build --release --features faults && bundles/build
//! cargo test --release --test migrate -- [FILTER]
//! ```
//!
//! `FERRY_BIN` names another ferry; `FERRY_FULL=1` runs the whole matrix of faults, trials that take
//! long, and holds 10,000 connections.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod common;
#[path = "migrate/connections.rs"]
mod connections;
#[path = "migrate/crashes.rs"]
mod crashes;
#[path = "migrate/datagrams.rs"]
mod datagrams;
#[path = "migrate/failures.rs"]
mod failures;
#[path = "migrate/faults.rs"]
mod faults;
#[path = "migrate/files.rs"]
mod files;
#[path = "migrate/floating.rs"]
mod floating;
#[path = "migrate/forward.rs"]
mod forward;
#[path = "migrate/hostile.rs"]
mod hostile;
#[path = "migrate/limits.rs"]
mod limits;
#[path = "migrate/mappings.rs"]
mod mappings;
#[path = "migrate/matrix/mod.rs"]
mod matrix;
#[path = "migrate/memory.rs"]
mod memory;
#[path = "migrate/migratable.rs"]
mod migratable;
#[path = "migrate/moves.rs"]
mod moves;
#[path = "migrate/names.rs"]
mod names;
#[path = "migrate/networks.rs"]
mod networks;
#[path = "migrate/overlay.rs"]
mod overlay;
#[path = "migrate/published.rs"]
mod published;
#[path = "migrate/refusals.rs"]
mod refusals;
#[path = "migrate/resolve.rs"]
mod resolve;
#[path = "migrate/sleepers.rs"]
mod sleepers;
#[path = "migrate/streams.rs"]
mod streams;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut trials = Vec::new();
    trials.extend(moves::trials());
    trials.extend(connections::trials());
    trials.extend(datagrams::trials());
    trials.extend(memory::trials());
    trials.extend(migratable::trials());
    trials.extend(failures::trials());
    trials.extend(limits::trials());
    trials.extend(mappings::trials());

    trials.extend(files::trials());
    trials.extend(names::trials());
    trials.extend(overlay::trials());
    trials.extend(hostile::trials());
    trials.extend(sleepers::trials());
    trials.extend(networks::trials());
    trials.extend(floating::trials());
    trials.extend(streams::trials());
    trials.extend(forward::trials());

    trials.extend(published::trials());
    trials.extend(refusals::trials());
    trials.extend(faults::trials());
    trials.extend(crashes::trials());
    trials.extend(matrix::trials());
    trials.extend(resolve::trials());

    common::suite::run(trials)
}
