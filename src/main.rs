//! Dispatch only: pass through, our verbs, or the CRIU shim.
//!
//! This is C's `main` and not Rust's, so that a runtime that we exec gets what our caller
//! gave us; [`entry`] has the reasons.

#![no_main]

use std::env;
use std::ffi::OsString;
use std::path::Path;

use ferry::cli;
use ferry::cli::passthrough;
use ferry::cli::scan::{Command, Scan};
use ferry::criu::shim;
use ferry::sys::entry;

ferry::c_main!(dispatch);

fn dispatch(arguments: Vec<OsString>) -> u8 {
    let mut arguments = arguments.into_iter();
    let name = arguments.next().unwrap_or_default();
    // The variable is there so that a ferry that somebody named criu by mistake says so.
    if Path::new(&name).file_name().is_some_and(|name| name == "criu")
        && env::var_os("FERRY_CRIU_SOCKET").is_some()
    {
        entry::become_rust_program();
        return shim::main();
    }
    let mut scan = Scan::of(arguments.collect());
    match &mut scan.command {
        Command::Ours(line) => {
            entry::become_rust_program();
            cli::run(std::mem::take(line), scan.ferry_runtime, &scan.log)
        }
        _ => passthrough::run(scan),
    }
}
