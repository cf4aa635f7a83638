//! Commands with a time limit, and waiting for a condition.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::Outcome;

/// How long to wait for what a quiet machine does within this limit: one that is slow, or busy with other
/// work, takes some times as long. Only a condition that never comes is waited for in vain.
pub fn patience(limit: Duration) -> Duration {
    3 * limit
}

/// What a command said and how it ended.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Exit code; 128 and the signal when it was killed.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Output {
    /// The output, if it ended well.
    pub fn ok(self) -> Outcome<String> {
        self.exits(0).map(|o| o.out)
    }

    /// Itself, if it ended with this exit code.
    pub fn exits(self, code: i32) -> Outcome<Output> {
        if self.code == code {
            Ok(self)
        } else {
            Err(format!("exit code {} instead of {code}\n{self}", self.code))
        }
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "exit code {}\nstdout: {}\nstderr: {}",
            self.code,
            self.out.trim_end(),
            self.err.trim_end()
        )
    }
}

/// A command under way.
pub struct Running {
    child: Child,
    out: Receiver<String>,
    err: Receiver<String>,
    what: String,
}

fn collect(mut stream: impl Read + Send + 'static) -> Receiver<String> {
    let (tell, heard) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let _ = tell.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    heard
}

impl Running {
    /// Starts it, with nothing on its standard input.
    pub fn start(command: &mut Command) -> Outcome<Running> {
        let what = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("{what}: {e}"))?;
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(format!("{what}: no streams"));
        };
        Ok(Running { child, out: collect(out), err: collect(err), what })
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Its end; an error, and the command killed, when it does not come in time.
    pub fn end(mut self, limit: Duration) -> Outcome<Output> {
        let until = Instant::now() + patience(limit);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < until => pause(),
                Ok(None) => {
                    let said = self.kill();
                    let limit = patience(limit);
                    return Err(format!("not over after {limit:?}: {}\n{said}", self.what));
                }
                Err(e) => return Err(format!("{}: {e}", self.what)),
            }
        };
        use std::os::unix::process::ExitStatusExt;
        let code = status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(-1);
        // Somebody whom it has left behind may hold the streams open.
        let text =
            |r: &Receiver<String>| r.recv_timeout(Duration::from_secs(2)).unwrap_or_default();
        Ok(Output { code, out: text(&self.out), err: text(&self.err) })
    }

    /// Ends it; what it had said.
    fn kill(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let text =
            |r: &Receiver<String>| r.recv_timeout(Duration::from_secs(2)).unwrap_or_default();
        format!("stdout: {}\nstderr: {}", text(&self.out), text(&self.err))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command, limit: Duration) -> Outcome<Output> {
    Running::start(command)?.end(limit)
}

/// Between two looks at a condition that tells of no change by itself.
fn pause() {
    std::thread::park_timeout(Duration::from_millis(3));
}

/// Asks until there is an answer.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Outcome<Option<T>>,
) -> Outcome<T> {
    let limit = patience(limit);
    let end = Instant::now() + limit;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > end {
            return Err(format!("after {limit:?} still not so: {what}"));
        }
        pause();
    }
}

/// Writes a file that can be executed.
pub fn write_script(path: &std::path::Path, text: &str) -> Outcome {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o755).open(path);
    file.and_then(|mut f| f.write_all(text.as_bytes()))
        .map_err(|e| format!("{}: {e}", path.display()))
}
