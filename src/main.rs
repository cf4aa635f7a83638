//! Dispatch only: pass through, our verbs, or the CRIU shim.

use std::env;
use std::path::Path;
use std::process::ExitCode;

use ferry::cli::{self, passthrough, scan::Command, scan::Scan};
use ferry::criu::shim;

fn main() -> ExitCode {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    // The variable is there so that a ferry that somebody named criu by mistake says so.
    if Path::new(&name).file_name().is_some_and(|name| name == "criu")
        && env::var_os("FERRY_CRIU_SOCKET").is_some()
    {
        return shim::main();
    }
    let mut scan = Scan::of(arguments.collect());
    match &mut scan.command {
        Command::Ours(line) => cli::run(std::mem::take(line), scan.ferry_runtime, &scan.log),
        _ => passthrough::run(scan),
    }
}
