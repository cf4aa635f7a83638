//! Suites in which a container belongs to an engine on both hosts.
//!
//! ```text
//! cargo build --release --features faults && bundles/build && contrib/lab prepare --engines
//! cargo test --release --test engines -- [FILTER]
//! ```

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod common;
#[path = "engines/docker.rs"]
mod docker;
#[path = "engines/images.rs"]
mod images;
#[path = "engines/neighbours.rs"]
mod neighbours;
#[path = "engines/networks.rs"]
mod networks;
#[path = "engines/podman.rs"]
mod podman;
#[path = "engines/published.rs"]
mod published;

#[path = "engines/second.rs"]
mod second;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut trials = podman::trials();
    trials.extend(docker::trials());
    common::suite::run(trials)
}
