//! An engine's own program, with a limit for its time; and what an engine does beside us.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::oci::DEFAULT_PATH;
use crate::sys::process;

/// Time that a question may take: an engine that is asked about a container waits for whoever works with it.
pub(super) const LIMIT: Duration = Duration::from_secs(30);
/// Most of what is read of what it says.
const MAX_SAID: u64 = 4 << 20;

/// What it has said.
#[derive(Debug)]
pub(super) struct CommandOutput {
    pub success: bool,
    pub out: Vec<u8>,
    pub err: String,
}

impl CommandOutput {
    /// Its last word about what went wrong.
    pub fn why(&self) -> String {
        let last = self.err.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("it does not say why").trim_start_matches("Error: ").to_owned()
    }
}

/// A command of an engine's that does not mind what we were called with.
fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    // It is this host's engine that is meant.
    command.env_remove("CONTAINER_HOST").env_remove("CONTAINER_CONNECTION");
    if std::env::var_os("PATH").is_none_or(|path| path.is_empty()) {
        command.env("PATH", DEFAULT_PATH);
    }
    // Ctrl-C is for the hand-over to decide.
    process::in_new_session(&mut command);
    command
}

/// Runs it to its end.
///
/// # Errors
/// When there is no such program, or it takes too long.
pub(super) fn run(program: &str, arguments: &[&str], limit: Duration) -> Result<CommandOutput> {
    let what = || format!("cannot run {program} {}", arguments.join(" "));
    let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut command = command(program, arguments);
    command.stdout(out.try_clone()?).stderr(err.try_clone()?);
    let mut child = command.spawn().with_context(what)?;
    drop(command);
    let pidfd = process::pidfd_open(child.id() as i32)?;
    if process::wait_readable(&[pidfd.as_fd()], Some(Instant::now() + limit)).is_err() {
        let _ = child.kill();
        let _ = child.wait();
        bail!("{program} {} takes longer than {} s", arguments.join(" "), limit.as_secs());
    }
    let success = child.wait()?.success();
    tracing::debug!("{program} {}: {success}", arguments.join(" "));
    Ok(CommandOutput {
        success,
        out: read(&mut out)?,
        err: String::from_utf8_lossy(&read(&mut err)?).into_owned(),
    })
}

fn read(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(MAX_SAID).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns what it says in JSON; `None` if it does not know what it is asked for.
///
/// # Errors
/// See [`run`]; when it says something else.
pub(super) fn ask(program: &str, arguments: &[&str]) -> Result<Option<Value>> {
    let said = run(program, arguments, LIMIT)?;
    if !said.success {
        let none = ["no such", "not found", "not known", "does not exist"];
        if none.iter().any(|words| said.err.to_lowercase().contains(words)) {
            return Ok(None);
        }
        bail!("{program} {}: {}", arguments.join(" "), said.why());
    }
    let answer: Value = serde_json::from_slice(&said.out)
        .map_err(|e| anyhow!("{program} {} does not say JSON: {e}", arguments.join(" ")))?;
    // `inspect` has a list of all that were asked for.
    Ok(match answer {
        Value::Array(list) => list.into_iter().next(),
        other => Some(other),
    })
}

/// What a command says on its standard output, as it comes; a command that fails ends it with an error.
pub(super) struct Output {
    child: Child,
    program: &'static str,
    out: ChildStdout,
    err: File,
}

impl Output {
    /// Starts it.
    ///
    /// # Errors
    /// When there is no such program.
    pub(super) fn start(program: &'static str, arguments: &[&str]) -> Result<Output> {
        let what = || format!("cannot run {program} {}", arguments.join(" "));
        let err = tempfile::tempfile()?;
        let mut command = command(program, arguments);
        command.stdout(Stdio::piped()).stderr(err.try_clone()?);
        let mut child = command.spawn().with_context(what)?;
        let out = child.stdout.take().ok_or_else(|| anyhow!("{program} says nothing"))?;
        Ok(Output { child, program, out, err })
    }
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.out.read(buffer)?;
        if n > 0 || buffer.is_empty() || self.child.wait()?.success() {
            return Ok(n);
        }
        let err = read(&mut self.err).unwrap_or_default();
        let err = String::from_utf8_lossy(&err).into_owned();
        let why = CommandOutput { success: false, out: Vec::new(), err }.why();
        Err(std::io::Error::other(format!("{}: {why}", self.program)))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

/// Processes of a program that were started with these words, among others.
fn started_with(program: &str, words: &[&str]) -> Vec<OwnedFd> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let minds = |pid: &i32| {
        let line = process::proc_text(*pid, "cmdline").unwrap_or_default();
        let said: Vec<&str> = line.split('\0').collect();
        said.first().is_some_and(|first| first.ends_with(program))
            && words.iter().all(|word| said.contains(word))
    };
    pids.filter(minds).filter_map(|pid| process::pidfd_open(pid).ok()).collect()
}

/// Ends whoever runs a program on a file that only we name.
pub(super) fn end(program: &str, file: &Path) {
    for pidfd in started_with(program, &[&file.to_string_lossy()]) {
        let _ = process::pidfd_kill(&pidfd, libc::SIGKILL);
        let _ = process::wait_readable(&[pidfd.as_fd()], Some(Instant::now() + LIMIT));
    }
}

/// Waits until nobody runs a program with these words any more.
pub(super) fn await_end(program: &str, words: &[&str]) {
    let until = Instant::now() + LIMIT;
    for pidfd in started_with(program, words) {
        let _ = process::wait_readable(&[pidfd.as_fd()], Some(until));
    }
}

/// Something that an engine does while we do something else.
#[derive(Debug)]
pub(crate) struct Running {
    work: EngineWork,
    /// Becomes readable when it has ended.
    end: OwnedFd,
}

#[derive(Debug)]
enum EngineWork {
    /// A command, and what it says.
    Command(Child, PathBuf),
    /// A request to its daemon.
    Request(Receiver<Result<()>>),
}

impl Running {
    /// Starts a command; what it says goes to `log`.
    pub(super) fn start(program: &str, arguments: &[&str], log: &Path) -> Result<Running> {
        let file = File::create(log)?;
        let mut command = command(program, arguments);
        command.stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot run {program}"))?;
        let end = process::pidfd_open(child.id() as i32)?;
        Ok(Running { work: EngineWork::Command(child, log.to_owned()), end })
    }

    /// Makes a request on a thread of its own. What the daemon does goes on if we are killed.
    pub(super) fn request(
        request: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Running> {
        let (end, held) = UnixStream::pair()?;
        let (tell, answer) = sync_channel(1);
        let work = move || {
            // Whoever has asked may not wait for it any more.
            let _ = tell.send(request());
            drop(held);
        };
        std::thread::Builder::new().name("request".into()).spawn(work)?;
        Ok(Running { work: EngineWork::Request(answer), end: end.into() })
    }

    /// A descriptor that becomes readable when it has ended.
    pub fn pidfd(&self) -> Result<OwnedFd> {
        Ok(self.end.try_clone()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it fails, in its own words; when it takes too long: then it goes on.
    pub fn finish(self, limit: Duration) -> Result<()> {
        process::wait_readable(&[self.end.as_fd()], Some(Instant::now() + limit))
            .map_err(|_| anyhow!("it takes longer than {} s", limit.as_secs()))?;
        match self.work {
            EngineWork::Command(mut child, log) => {
                if child.wait()?.success() {
                    return Ok(());
                }
                let err = std::fs::read_to_string(log).unwrap_or_default();
                bail!("{}", CommandOutput { success: false, out: Vec::new(), err }.why())
            }
            EngineWork::Request(answer) => {
                answer.recv().unwrap_or_else(|_| bail!("nobody has waited for the answer"))
            }
        }
    }
}
