//! Calls of the runtime that are expected: how an engine comes to own a container that it did not start.
//!
//! The destination's engine is asked to make a container, and calls its runtime, which is Ferry: to
//! restore it. That call must become part of a migration that another process takes in, and it must
//! stay the process below which the container is: the engine's monitor wants to reap it. So:
//!
//! ```text
//! ferry receive                              engine, monitor, ferry restore ID
//!   expects ID          ── a file ─────────▶ takes the file away: single use
//!                       ◀──────── Called ──  bundle, pid file
//!   what it needs of runc ── Run ──────────▶ starts that below itself, on its own standard streams
//!                       ◀─────── Started ──
//!   restored and held   ── Restored ───────▶ writes the pid file
//!   it runs, or not     ── End ────────────▶ ends as runc would have
//! ```
//!
//! Engines that make and start in two calls (docker) get the first process as made when it is there, do what they
//! do between the two (its network) while the rest is restored, and the second call is the one that waits:
//!
//! ```text
//!                                            ferry create ID
//!   expects `start`, says Restored ────────▶ writes the pid file, ends; what it runs goes on
//!                                            ferry start ID
//!                       ◀──────── Called ──
//!   it runs, or not     ── End ────────────▶ ends as runc would have
//! ```
//!
//! Nothing of it is in the engine's records: a later start of the container is one as any other. If
//! `ferry receive` is killed after `Restored`, its guards let CRIU go on or end it: whether the
//! container lives when CRIU has ended is then the answer.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{getsockopt, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::sys::process::{self, ProcessId};

/// In memory, and gone with a reboot.
const PLACE: &str = "/run/ferry-expected";
/// In a migration's work directory: where whoever is called calls back.
const SOCKET: &str = "engine.sock";
/// Until an engine has started what it has created.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The longest line of one to the other.
const MAX_LINE: u64 = 1 << 20;

/// What an engine is expected to ask of its runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineVerb {
    /// To restore the container, on the destination.
    Restore,
    /// To create it, on the destination: it is restored, and held until it is started.
    Create,
    /// To start what was created so.
    Start,
    /// To checkpoint it, on the source: the engine only wants to write down what it knows, and nothing
    /// is done.
    Describe,
    /// To checkpoint it, on the source: the container has gone, and the engine is to know.
    LetGo,
}

impl EngineVerb {
    /// Returns what the command line says.
    fn word(self) -> &'static str {
        match self {
            EngineVerb::Restore => "restore",
            EngineVerb::Create => "create",
            EngineVerb::Start => "start",
            EngineVerb::Describe | EngineVerb::LetGo => "checkpoint",
        }
    }
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Expectation {
    /// The runtime's.
    root: PathBuf,
    verb: EngineVerb,
    /// Unix time.
    until: u64,
    socket: PathBuf,
    /// Of what is to be started: its first process and CRIU, each with the time when it began.
    #[serde(default)]
    held: Option<[ProcessId; 2]>,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// From the one that is called.
#[derive(Debug, Serialize, Deserialize)]
enum CallReport {
    Called(Called),
    Started(i32),
    Failed(String),
}

/// What the engine has said.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Called {
    /// The bundle as the engine has made it.
    pub bundle: PathBuf,
}

/// To the one that is called.
#[derive(Debug, Serialize, Deserialize)]
enum CallOrder {
    Run { program: String, arguments: Vec<String>, environment: Vec<(String, Option<String>)> },
    Restored { init: i32, criu: i32 },
    End { why: Option<String> },
}

fn say<T: Serialize>(stream: &mut UnixStream, what: &T) -> Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// The next line, `None` when the other one has gone.
fn hear<T: DeserializeOwned>(reader: &mut BufReader<UnixStream>) -> Result<Option<T>> {
    let mut line = Vec::new();
    reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

/// What is expected: which call, about which container of which root, and where whoever is called
/// finds us.
#[derive(Clone, Debug)]
struct Expecting {
    place: PathBuf,
    verb: EngineVerb,
    id: String,
    root: PathBuf,
    work: PathBuf,
    held: Option<[ProcessId; 2]>,
}

/// Somebody who waits for a call. Nobody does when it is dropped.
#[derive(Debug)]
pub struct ExpectedCall {
    what: Expecting,
    file: PathBuf,
    socket: PathBuf,
    listener: UnixListener,
}

impl Drop for ExpectedCall {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_file(&self.socket);
    }
}

/// Expects a call about a container, for so long.
///
/// # Errors
/// When nobody could be told.
pub fn expect(
    verb: EngineVerb,
    id: &str,
    root: &Path,
    work: &Path,
    limit: Duration,
) -> Result<ExpectedCall> {
    expect_in(Path::new(PLACE), (verb, id, root), work, limit)
}

fn expect_in(
    place: &Path,
    (verb, id, root): (EngineVerb, &str, &Path),
    work: &Path,
    limit: Duration,
) -> Result<ExpectedCall> {
    let (place, id, root) = (place.to_owned(), id.to_owned(), root.to_owned());
    Expecting { place, verb, id, root, work: work.to_owned(), held: None }.expect(limit)
}

impl Expecting {
    fn expect(self, limit: Duration) -> Result<ExpectedCall> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.place)?;
        let socket = self.work.join(SOCKET);
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let (file, until) = (self.place.join(&self.id), now() + limit.as_secs());
        let Expecting { verb, held, .. } = self;
        let text =
            Expectation { root: self.root.clone(), verb, until, socket: socket.clone(), held };
        let fresh = file.with_file_name(format!(".{}", self.id));
        let expected = ExpectedCall { what: self, file: file.clone(), socket, listener };
        fs::write(&fresh, serde_json::to_vec(&text)?)?;
        fs::rename(&fresh, &file).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(expected)
    }
}

impl ExpectedCall {
    /// Waits for the call; `ended` becomes readable when the engine has nothing more to do.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn call(self, ended: OwnedFd, deadline: Instant) -> Result<EngineCall> {
        let (stream, reader, called) = self.accept(&[ended.as_fd()], deadline)?;
        let next = (self.what.verb == EngineVerb::Create).then(|| NextCall {
            what: Expecting { verb: EngineVerb::Start, ..self.what.clone() },
            ended,
        });
        Ok(EngineCall { stream, reader, called, next, apart: false })
    }

    fn accept(&self, ends: &[BorrowedFd], deadline: Instant) -> Result<HeardCall> {
        let mut fds = vec![self.listener.as_fd()];
        fds.extend(ends);
        let ready = process::wait_readable(&fds, Some(deadline));
        if !ready.is_ok_and(|ready| ready.contains(&0)) {
            bail!("the engine has not called its runtime");
        }
        let (stream, _) = self.listener.accept()?;
        let mut reader = BufReader::new(stream.try_clone()?);
        match hear(&mut reader)? {
            Some(CallReport::Called(called)) => Ok((stream, reader, called)),
            _ => bail!("whom the engine has called says nothing"),
        }
    }
}

type HeardCall = (UnixStream, BufReader<UnixStream>, Called);

/// The call that comes after this one.
#[derive(Debug)]
struct NextCall {
    what: Expecting,
    /// As in [`ExpectedCall::call`].
    ended: OwnedFd,
}

/// A call that waits for us.
#[derive(Debug)]
pub struct EngineCall {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// What the engine has said.
    pub called: Called,
    next: Option<NextCall>,
    apart: bool,
}

impl EngineCall {
    /// The caller's standard output and error, where these are pipes: who reads them writes the log.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn pipes(&self) -> Result<[Option<File>; 2]> {
        let caller = getsockopt(&self.stream, sockopt::PeerCredentials)?.pid();
        let open = |number: i32| -> Result<Option<File>> {
            let path = format!("/proc/{caller}/fd/{number}");
            let pipe = fs::metadata(&path)?.file_type().is_fifo();
            Ok(pipe.then(|| File::options().write(true).open(&path)).transpose()?)
        };
        Ok([open(1)?, open(2)?])
    }

    /// Has the one who was called run this, with its own standard streams; its number.
    ///
    /// # Errors
    /// When it cannot.
    pub fn run(&mut self, command: &Command) -> Result<i32> {
        let text = |word: &OsStr| word.to_str().map(str::to_owned);
        let odd = || anyhow!("an argument that is not UTF-8");
        let arguments: Option<Vec<_>> = command.get_args().map(text).collect();
        let environment: Option<Vec<_>> = command
            .get_envs()
            .map(|(name, value)| {
                Some((text(name)?, value.map(text).map_or(Some(None), |v| v.map(Some))?))
            })
            .collect();
        let order = CallOrder::Run {
            program: text(command.get_program()).ok_or_else(odd)?,
            arguments: arguments.ok_or_else(odd)?,
            environment: environment.ok_or_else(odd)?,
        };
        say(&mut self.stream, &order)?;
        match hear(&mut self.reader)? {
            Some(CallReport::Started(pid)) => Ok(pid),
            Some(CallReport::Failed(why)) => bail!("{why}"),
            _ => bail!("whom the engine has called has gone"),
        }
    }

    /// Tells whether the engine does something between two calls, for which it needs the first process alone.
    pub fn starts_apart(&self) -> bool {
        self.next.is_some()
    }

    /// The container is restored and held; or, where the engine starts it by another call, its first process is
    /// there. Waits for that call.
    ///
    /// # Errors
    /// When the one who was called has gone, or nobody calls again: the engine has given up.
    pub fn restored(&mut self, init: i32, criu: i32) -> Result<()> {
        let given_up = "the engine has given up waiting for the container";
        let Some(next) = self.next.take() else {
            return say(&mut self.stream, &CallOrder::Restored { init, criu }).context(given_up);
        };
        let held = ProcessId::of(init).zip(ProcessId::of(criu)).map(|(init, criu)| [init, criu]);
        let held = held.ok_or_else(|| anyhow!("what was restored has ended"))?;
        // An engine that gives up ends the first process.
        let gone = [process::pidfd_open(criu)?, process::pidfd_open(init)?];
        // Before the first call ends: the second may come at once.
        let expected = Expecting { held: Some(held), ..next.what }.expect(START_LIMIT)?;
        say(&mut self.stream, &CallOrder::Restored { init, criu }).context(given_up)?;
        self.apart = true;
        let ends = [next.ended.as_fd(), gone[0].as_fd(), gone[1].as_fd()];
        let heard = expected.accept(&ends, Instant::now() + START_LIMIT);
        (self.stream, self.reader, _) = heard.context("the engine does not start the container")?;
        Ok(())
    }

    /// Tells whether the engine knows what is restored, and waits for its end if it does not run.
    pub fn is_apart(&self) -> bool {
        self.apart
    }

    /// It runs, or why it does not.
    pub fn end(mut self, why: Option<String>) {
        // Whoever has gone knows already.
        let _ = say(&mut self.stream, &CallOrder::End { why });
    }
}

/// Tells whether somebody expects this call, of one who may mean any of these containers. He is the only one
/// that does from then on.
pub fn taken(verb: &str, ids: &[OsString], root: &Path) -> Option<Expectation> {
    taken_in(Path::new(PLACE), verb, ids, root)
}

fn taken_in(place: &Path, verb: &str, ids: &[OsString], root: &Path) -> Option<Expectation> {
    let of = |id: &OsString| {
        if !crate::oci::container_id::valid_id(id) {
            return None;
        }
        let file = place.join(id);
        let text = fs::read(&file).ok()?;
        let found: Expectation = serde_json::from_slice(&text).ok()?;
        let meant = found.verb.word() == verb && found.root == root && now() <= found.until;
        // Of two the one who takes it away has it.
        (meant && fs::remove_file(&file).is_ok()).then_some(found)
    };
    ids.iter().find_map(of)
}

/// The value of a flag, in either of its forms.
fn value(arguments: &[OsString], name: &str) -> Option<PathBuf> {
    let flag = |dashes: &str| format!("{dashes}{name}");
    for (i, argument) in arguments.iter().enumerate() {
        let text = argument.to_str()?;
        if text == flag("--") || text == flag("-") {
            return arguments.get(i + 1).map(PathBuf::from);
        }
        let equals = text.strip_prefix(&flag("--")).or(text.strip_prefix(&flag("-")));
        if let Some(value) = equals.and_then(|rest| rest.strip_prefix('=')) {
            return Some(value.into());
        }
    }
    None
}

/// Does what was expected.
///
/// # Errors
/// As the runtime would have: the engine is told that it did not work.
pub fn answer(expectation: &Expectation, arguments: &[OsString]) -> Result<()> {
    match expectation.verb {
        EngineVerb::Describe => {
            let images = value(arguments, "image-path");
            let images = images.ok_or_else(|| anyhow!("a checkpoint without --image-path"))?;
            DirBuilder::new().recursive(true).mode(0o700).create(&images)?;
            // Whoever looks for a checkpoint looks for this.
            Ok(fs::write(images.join("inventory.img"), "")?)
        }
        EngineVerb::LetGo => {
            let (_stream, mut reader) = call(expectation, arguments)?;
            match hear(&mut reader)? {
                Some(CallOrder::End { why: None }) | None => Ok(()),
                Some(CallOrder::End { why: Some(why) }) => bail!("{why}"),
                Some(_) => bail!("an order that is not meant here"),
            }
        }
        EngineVerb::Restore | EngineVerb::Create => restore(expectation, arguments),
        EngineVerb::Start => start(expectation, arguments),
    }
}

/// What is held is started by whoever holds it.
fn start(expectation: &Expectation, arguments: &[OsString]) -> Result<()> {
    let why = match call(expectation, arguments) {
        Ok((_stream, mut reader)) => match hear(&mut reader).unwrap_or_default() {
            Some(CallOrder::End { why }) => why,
            _ => alone(expectation.held),
        },
        Err(_) => alone(expectation.held),
    };
    why.map_or(Ok(()), |why| Err(refused(why)))
}

fn refused(why: String) -> anyhow::Error {
    anyhow!(why).context("the container was not taken in")
}

fn call(
    expectation: &Expectation,
    arguments: &[OsString],
) -> Result<(UnixStream, BufReader<UnixStream>)> {
    let what = "the migration that this belongs to has been given up";
    let mut stream = UnixStream::connect(&expectation.socket).context(what)?;
    let bundle = value(arguments, "bundle").or(value(arguments, "b")).unwrap_or_default();
    say(&mut stream, &CallReport::Called(Called { bundle })).context(what)?;
    let reader = BufReader::new(stream.try_clone()?);
    Ok((stream, reader))
}

fn restore(expectation: &Expectation, arguments: &[OsString]) -> Result<()> {
    let pid_file = value(arguments, "pid-file");
    let (mut stream, mut reader) = call(expectation, arguments)?;
    let mut runtime: Option<Child> = None;
    let mut held = None;
    let ended = loop {
        match hear(&mut reader).unwrap_or_default() {
            Some(CallOrder::Run { program, arguments, environment }) => {
                let word = match run(&program, &arguments, &environment) {
                    Ok(child) => CallReport::Started(runtime.insert(child).id() as i32),
                    Err(e) => CallReport::Failed(format!("{e:#}")),
                };
                // Whoever has gone meanwhile is not heard any more.
                let _ = say(&mut stream, &word);
            }
            Some(CallOrder::Restored { init, criu }) => {
                if let Some(file) = &pid_file {
                    fs::write(file, init.to_string())
                        .with_context(|| format!("cannot write {}", file.display()))?;
                }
                let now = |pid| ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 });
                held = Some([now(init), now(criu)]);
                if expectation.verb == EngineVerb::Create {
                    // What was started still restores it.
                    return Ok(());
                }
            }
            Some(CallOrder::End { why }) => break why,
            None => break alone(held.take()),
        }
    };

    if let Some(mut runtime) = runtime {
        // It has ended; or there is nobody for whom it could go on.
        let _ = runtime.kill();
        let _ = runtime.wait();
    }

    ended.map_or(Ok(()), |why| Err(refused(why)))
}

fn run(
    program: &str,
    arguments: &[String],
    environment: &[(String, Option<String>)],
) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments);
    for (name, value) in environment {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    process::in_new_session(&mut command);
    process::with_own_keyring(&mut command);
    command.spawn().with_context(|| format!("cannot run {program}"))
}

/// Whoever took the container in has died. If it was restored, others decide whether it runs.
fn alone(held: Option<[ProcessId; 2]>) -> Option<String> {
    let gone = || Some("the migration was given up".to_owned());
    let open = |one: ProcessId| {
        let pidfd = process::pidfd_open(one.pid).ok()?;
        one.is_alive().then_some(pidfd)
    };
    let Some([init, criu]) = held else { return gone() };
    let Some(init) = open(init) else { return gone() };
    if let Some(criu) = open(criu) {
        let _ = process::wait_readable(&[criu.as_fd()], None);
    }
    if process::has_ended(&init) { gone() } else { None }
}

#[cfg(test)]
mod tests;
