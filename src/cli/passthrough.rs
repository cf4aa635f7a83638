//! Everybody else's verbs: exec'ed to the underlying runtime.
//!
//! The runtime must not be able to tell that we were there: argv, environment, descriptors,
//! signals and working directory are what the caller gave us, and the process is the same,
//! so that its parent sees its exit code and can signal it. Nothing is set up before the
//! exec: no threads, no logging.
//!
//! Three things are not a plain exec. The general help and the version get some lines of ours
//! at the end. A verb that would start a container that was migrated away is refused. And where that is
//! asked for, the configuration of a new container is made one of a migratable one.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};

use anyhow::{Context, Result, anyhow};
use clap::CommandFactory;

use super::args::Cli;
use super::runtime::{Config, FoundRuntime, Unusable};
use super::scan::{Command, Scan};
use crate::engine::calls;
use crate::engine::owner;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::holder;
use crate::oci::migratable;
use crate::problem::advice;

/// Does what the runtime would do. Returns an exit code, and only if there is nothing to exec.
pub fn run(scan: Scan) -> u8 {
    if scan.command == Command::NoRuntimeGiven {
        return fail(&scan, 2, &anyhow!("--ferry-runtime needs a value: the runtime to start"));
    }
    let runtime = match FoundRuntime::find(scan.ferry_runtime.as_deref()) {
        Ok(runtime) => runtime,
        Err(Unusable { exit: NONE, error }) => match own(&scan.command) {
            // Whoever asks who we are may be about to install a runtime.
            Some(text) => {
                fail(&scan, NONE, &error);
                let _ = std::io::stdout().write_all(text.trim_start().as_bytes());
                return 0;
            }
            None => return fail(&scan, NONE, &error),
        },
        Err(Unusable { exit, error }) => return fail(&scan, exit, &error),
    };

    let done = match &scan.command {
        Command::Guarded(ids) | Command::Checkpoint(ids)
            if let Some(expected) = expected(&scan, &runtime, ids) =>
        {
            crate::sys::entry::become_rust_program();
            return match calls::answer(&expected, &scan.argv) {
                Ok(()) => 0,
                Err(error) => fail(&scan, 1, &error),
            };
        }
        Command::Guarded(ids) => {
            let ready = refuse_if_away(&scan, &runtime, ids).and_then(|()| make_migratable(&scan));
            if let Err(error) = ready {
                return fail(&scan, 1, &error);
            }
            exec(&runtime, &scan.argv).map(|never| match never {})
        }
        Command::Version => spawn_and_add(&runtime, &scan.argv, &version()),
        Command::Help => spawn_and_add(&runtime, &scan.argv, &help()),
        _ => exec(&runtime, &scan.argv).map(|never| match never {}),
    };

    done.unwrap_or_else(|error| fail(&scan, 126, &error))
}

/// A shell's exit code for a command that is not there.
const NONE: u8 = 127;

/// Returns what we say ourselves, whatever the runtime says.
fn own(command: &Command) -> Option<String> {
    match command {
        Command::Version => Some(version()),
        Command::Help => Some(help()),
        _ => None,
    }
}

fn fail(scan: &Scan, exit: u8, error: &anyhow::Error) -> u8 {
    scan.log.error_as_runc(error);
    exit
}

fn exec(runtime: &FoundRuntime, argv: &[OsString]) -> Result<Infallible> {
    // An argument came in as a C string, so it cannot hold a NUL.
    let c_string = |text: &OsString| CString::new(text.as_bytes());
    let path = CString::new(runtime.path.as_os_str().as_bytes())?;
    let words: Vec<CString> =
        std::iter::once(&runtime.name).chain(argv).map(c_string).collect::<Result<_, _>>()?;
    nix::unistd::execv(&path, &words)
        .with_context(|| format!("cannot start the container runtime {}", runtime.path.display()))
}

/// The runtime's own words, and when it was content, ours behind them.
fn spawn_and_add(runtime: &FoundRuntime, argv: &[OsString], text: &str) -> Result<u8> {
    let status = std::process::Command::new(&runtime.path)
        .arg0(&runtime.name)
        .args(argv)
        .status()
        .with_context(|| {
            format!("cannot start the container runtime {}", runtime.path.display())
        })?;
    if status.success() {
        // A reader that has seen enough is no error.
        let _ = std::io::stdout().write_all(text.as_bytes());
    }
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// Callers read `runc version`, `commit:` and `spec:` in lines of their own. Docker takes the
/// last line that has the word "version" in it, so ours has not.
fn version() -> String {
    format!("ferry: {}\n", env!("CARGO_PKG_VERSION"))
}

fn help() -> String {
    let mut text = String::from("\nFERRY COMMANDS (added by ferry, see `ferry COMMAND --help`):\n");
    for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
        text.push_str(&format!("   {:<12}{about}\n", verb.get_name()));
    }
    text.push_str(
        "\nFERRY GLOBAL OPTIONS:\n   --ferry-runtime value  the runtime to start instead of runc\n",
    );
    text
}

/// Tells whether a migration expects this call of an engine's: it is part of that, then.
fn expected(scan: &Scan, runtime: &FoundRuntime, ids: &[OsString]) -> Option<calls::Expectation> {
    let verb = scan.verb.as_ref()?.to_str()?;
    let root = scan.root.clone().unwrap_or_else(|| runtime.default_root());
    calls::taken(verb, ids, &root)
}

/// What is made of this bundle may have to be denied what cannot be migrated.
fn make_migratable(scan: &Scan) -> Result<()> {
    let Some(file) = &scan.creates else { return Ok(()) };
    migratable::make(file, Config::load()?.migratable)
}

/// An engine's restart policy must not make a second copy of what runs elsewhere.
fn refuse_if_away(scan: &Scan, runtime: &FoundRuntime, ids: &[OsString]) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let state = Config::load()?.state_dir();
    let root = scan.root.clone().unwrap_or_else(|| runtime.default_root());
    for id in ids {
        if let Some(mark) = AwayMark::find(&state, &root, id)? {
            let options = match &scan.root {
                Some(root) => format!(" --root {}", root.display()),
                None => String::new(),
            };
            let (why, hint) = holder::marked(&state, &mark, &format!("ferry{options}"));
            let what =
                format!("container {} {why}; starting it here would make a second copy", mark.id);
            return Err(advice(what, hint));
        }

        let file = scan.creates.as_ref().filter(|_| AwayMark::any_named(&state));
        if let (Some(file), Some(id)) = (file, id.to_str())
            && let Some((engine, name)) = owner::of_call(id, &root, file)
            && let Some(mark) = AwayMark::find_named(&state, engine, &name)?
        {
            let options = format!("ferry --root {}", mark.runtime_root.display());
            let (why, hint) = holder::marked(&state, &mark, &options);
            let what = format!("{engine}'s {name} {why}; another {name} would be a second copy");
            return Err(advice(what, hint));
        }
    }

    Ok(())
}
