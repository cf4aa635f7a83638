//! runc and ferry side by side: every verb, with good and bad arguments, must come out the
//! same in exit code, standard output, standard error and what is done with standard input.
//!
//! Needs root, runc and hosts on which runc can run containers, such as those of
//! `contrib/lab`. Where something is missing the suite says so and passes, except in CI
//! (`CI` in the environment), where it fails. ferry is that of this build, or `FERRY_BIN`.

mod arguments;
mod containers;
mod engines;
mod side;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};
use side::Side;

/// A test: does the same on each side, which records what it sees.
type Case = (&'static str, fn(&mut Side));

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if let Some(missing) = missing() {
        eprintln!("parity: SKIPPED, nothing was compared: {missing}");
        return if std::env::var_os("CI").is_some() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
    }
    let cases = [arguments::CASES, containers::CASES, engines::CASES].concat();
    let trials = cases
        .into_iter()
        .map(|(name, case)| Trial::test(name, move || compare(name, case)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What this suite cannot do without. Mounts that the tests make are to vanish with them, so
/// this also leaves the mount namespace; no thread has been started yet.
fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".into());
    }
    if let Err(why) = Command::new("runc").arg("--version").output() {
        return Some(format!("runc: {why}"));
    }
    use nix::mount::{MsFlags, mount};
    let private = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).and_then(|()| {
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
    });
    private.err().map(|why| format!("no mount namespace: {why}"))
}

fn ferry() -> PathBuf {
    let built = || OsString::from(env!("CARGO_BIN_EXE_ferry"));
    std::env::var_os("FERRY_BIN").unwrap_or_else(built).into()
}

fn runc() -> PathBuf {
    std::env::split_paths(side::PATH)
        .map(|dir| dir.join("runc"))
        .find(|path| path.is_file())
        .expect("runc is in one of the usual places")
}

fn compare(name: &str, case: fn(&mut Side)) -> Result<(), Failed> {
    let id = format!("parity-{}-{name}", std::process::id());
    let one = |program: &Path| {
        let mut side = Side::new(program, &id);
        case(&mut side);
        std::mem::take(&mut side.record)
    };
    let (expected, got) = (one(&runc()), one(&ferry()));
    assert!(!expected.is_empty(), "the test recorded nothing");
    assert_eq!(expected.len(), got.len(), "the test did not do the same on both sides");
    for (expected, got) in expected.iter().zip(&got) {
        if expected != got {
            return Err(format!("--- runc\n{expected}\n--- ferry\n{got}").into());
        }
    }
    Ok(())
}
