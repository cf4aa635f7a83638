//! Trials with a time limit, each in a lab of its own, and their summary.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Outcome;
use super::lab::{Lab, take_all_down};
use super::process::patience;

/// A trial in a lab of its own with the hosts `a`, `b` and `client`.
pub fn in_lab(
    name: impl Into<String>,
    limit: Duration,
    body: impl FnOnce(&Lab) -> Outcome + Send + 'static,
) -> Trial {
    in_lab_of(&["a", "b", "client"], name, limit, body)
}

/// The same for what depends on how much of the machine it has: nothing else runs beside it.
pub fn alone_in_lab(
    hosts: &'static [&'static str],
    name: impl Into<String>,
    limit: Duration,
    body: impl FnOnce(&Lab) -> Outcome + Send + 'static,
) -> Trial {
    trial(hosts, name.into(), limit, body, || {
        Turn::Alone(TURN.write().unwrap_or_else(PoisonError::into_inner))
    })
}

/// Whether the trials that take long are to run, too.
pub fn full() -> bool {
    std::env::var_os("FERRY_FULL").is_some_and(|v| v == "1")
}

/// The same with other hosts, as `contrib/lab up` takes them.
pub fn in_lab_of(
    hosts: &'static [&'static str],
    name: impl Into<String>,
    limit: Duration,
    body: impl FnOnce(&Lab) -> Outcome + Send + 'static,
) -> Trial {
    trial(hosts, name.into(), limit, body, || {
        Turn::Beside(TURN.read().unwrap_or_else(PoisonError::into_inner))
    })
}

/// Who is running: many beside each other, or one alone.
static TURN: RwLock<()> = RwLock::new(());

/// Held while a trial runs.
enum Turn {
    Beside(#[expect(dead_code)] RwLockReadGuard<'static, ()>),
    Alone(#[expect(dead_code)] RwLockWriteGuard<'static, ()>),
}

fn trial(
    hosts: &'static [&'static str],
    name: String,
    limit: Duration,
    body: impl FnOnce(&Lab) -> Outcome + Send + 'static,
    turn: impl FnOnce() -> Turn + Send + 'static,
) -> Trial {
    let known = name.clone();
    Trial::test(name, move || {
        let _turn = turn();
        let began = Instant::now();
        let lab = Lab::up(hosts)?;
        let keeper = lab.clone();
        let (tell, heard) = channel();
        let thread = std::thread::spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| body(&lab)));
            let _ = tell.send(result.unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or(panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                Err(format!("panicked: {}", text.unwrap_or_default()))
            }));
        });

        let limit = patience(limit);
        let left = limit.saturating_sub(began.elapsed());
        let result = match heard.recv_timeout(left) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(format!(
                "not over within {limit:?}; processes of the hosts:\n{}",
                keeper.processes()
            )),
            Err(RecvTimeoutError::Disconnected) => Err("the trial's thread has died".to_owned()),
        };

        // Everything in the lab ends, and with it whatever the thread still waits for.
        keeper.down();
        if thread.is_finished() {
            let _ = thread.join();
        }
        eprintln!("{:8.1} s  {known}", began.elapsed().as_secs_f64());
        result.map_err(Failed::from)
    })
}

/// Runs the trials that the arguments name: two at a time, as each waits for most of its time, and for its own
/// lab only; as many as `--test-threads` says.
pub fn run(trials: Vec<Trial>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(2));
    let runs = !arguments.list;
    if runs && let Err(why) = Lab::possible() {
        eprintln!("these suites cannot run here: {why}");
        // A laptop without root is told; a CI that tests nothing must not look as if it had.
        return if std::env::var_os("CI").is_some_and(|v| v == "true") {
            ExitCode::FAILURE
        } else {
            eprintln!("SKIPPED: all trials that need a lab (CI=true would make this a failure)");
            ExitCode::SUCCESS
        };
    }
    if runs && let Err(e) = clear_when_cut() {
        eprintln!("a suite that is cut will leave its lab up: {e}");
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A suite that is ended from outside takes its labs down.
fn clear_when_cut() -> std::io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let clear = move || {
        if let Some(signal) = signals.forever().next() {
            take_all_down();
            std::process::exit(128 + signal);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(clear).map(drop)
}
