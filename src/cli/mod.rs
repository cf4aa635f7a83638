//! Our verbs' arguments, and the pass-through of everybody else's.
//!
//! [`scan`] reads just enough of the command line to know whose verb it is. The runtime's
//! go through [`passthrough`]; ours are parsed by [`args`] and go on from [`run`].

pub mod args;
mod bounds;
mod check;
mod common;
pub(crate) mod destination;
mod guard;
mod manual;
mod migrate;
mod migrations;
pub mod passthrough;
mod receive;
mod resolve;
mod resolve_all;
pub(crate) mod runtime;
pub mod scan;
pub(crate) mod units;

use std::ffi::OsString;

use anyhow::anyhow;
use clap::Parser;

use self::args::{Cli, Globals, Verb};
use crate::report::exit::{Exit, Failed, ToldError};
use crate::report::log::ErrorLog;
use crate::report::trace;

/// Runs a verb of ours: `line` as [`scan`] prepared it, and what it took out of it.
/// Returns the exit code.
pub fn run(line: Vec<OsString>, ferry_runtime: Option<OsString>, log: &ErrorLog) -> u8 {
    let Cli { mut globals, verb } = match Cli::try_parse_from(line) {
        Ok(cli) => cli,
        Err(told) => return not_parsed(&told, log),
    };
    globals.ferry_runtime = globals.ferry_runtime.or(ferry_runtime);
    let who = match &verb {
        Verb::Receive(_) => format!("ferry on {}", crate::sys::host::name()),
        _ => "ferry".into(),
    };

    trace::start(globals.debug, globals.error_log(), who);
    match dispatch(&globals, verb) {
        Ok(()) => Exit::Done.into(),
        Err(Failed { exit, error }) => {
            let log = globals.error_log();
            // Our stderr is the source's too, through ssh: its user would read it twice.
            if error.is::<ToldError>() {
                log.log_only(&error)
            } else {
                log.error(&error)
            }
            exit.into()
        }
    }
}

/// Returns where each verb goes.
fn dispatch(globals: &Globals, verb: Verb) -> Result<(), Failed> {
    match verb {
        Verb::Migrate(args) => migrate::migrate(globals, &args),
        Verb::Receive(args) => receive::receive(globals, &args),
        Verb::Check(args) => check::check(globals, &args),
        Verb::Migrations(args) => migrations::migrations(&args),
        Verb::Resolve(args) => resolve::resolve(globals, &args),
        Verb::Completions { shell } => manual::completions(shell),
        Verb::Man { directory } => manual::pages(&directory),
        Verb::Guard { args } => guard::guard(&args),
    }
}

/// Help that was asked for, or a command line that is wrong; clap has the text of both.
fn not_parsed(told: &clap::Error, log: &ErrorLog) -> u8 {
    let _ = told.print();
    if !told.use_stderr() {
        return Exit::Done.into();
    }
    let text = told.to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    log.log_only(&anyhow!("{}", message.trim_start_matches("error: ").to_owned()));
    Exit::Usage.into()
}
