//! Reaching the other side.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};

use super::ciphers;
use crate::problem::advice;
use crate::sys::process;

/// Where the other Ferry is, and how to get there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Destination {
    /// Through a remote shell, as rsync does.
    Shell {
        /// `[user@]host`, as the shell takes it.
        host: String,
        /// Port, where it is not the shell's own default.
        port: Option<u16>,
        /// The remote shell and its first arguments, for example `["ssh"]`.
        rsh: Vec<String>,
        /// Ferry's path over there.
        remote_ferry: String,
    },
    /// A `ferry receive --listen unix:PATH`.
    Unix(PathBuf),
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Destination::Shell { host, port: None, .. } => f.write_str(host),
            Destination::Shell { host, port: Some(port), .. } => write!(f, "ssh://{host}:{port}"),
            Destination::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// One stream each way, and the remote shell that carries them, if any.
pub struct Link {
    /// What the other side says.
    pub reader: Box<dyn Read + Send>,
    /// What we say.
    pub writer: Box<dyn Write + Send>,
    /// Ends the link in both directions, whatever reader and writer are doing.
    pub closer: Closer,
}

/// See [`Link::closer`].
#[derive(Debug)]
pub enum Closer {
    /// A remote shell.
    Shell(Box<Child>),
    /// A socket.
    Socket(UnixStream),
    /// Our own standard streams: they end with us. Once more, to hand them on.
    Stdio(OwnedFd, OwnedFd),
}

/// Cuts a link from another thread, whatever its reader and writer wait for.
#[derive(Debug)]
pub enum Cutter {
    /// The remote shell.
    Shell(OwnedFd),
    /// The socket.
    Socket(UnixStream),
    /// What a remote shell's server has given us as standard streams: sockets, as sshd does. Of pipes
    /// only that server can close the other end.
    Stdio(OwnedFd, OwnedFd),
    /// Nothing to cut.
    Nothing,
}

impl Cutter {
    /// Does it.
    pub fn cut(&self) {
        match self {
            Cutter::Shell(pidfd) => {
                let _ = process::pidfd_kill(pidfd, libc::SIGKILL);
            }
            Cutter::Socket(socket) => {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
            Cutter::Stdio(input, output) => {
                for fd in [input, output] {
                    let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
                }
            }
            Cutter::Nothing => {}
        }
    }
}

impl Closer {
    /// See [`Cutter`].
    ///
    /// # Errors
    /// When the shell has ended already, or there are no descriptors left.
    pub fn cutter(&self) -> io::Result<Cutter> {
        Ok(match self {
            Closer::Shell(child) => Cutter::Shell(process::pidfd_open(child.id() as i32)?),
            Closer::Socket(socket) => Cutter::Socket(socket.try_clone()?),
            Closer::Stdio(input, output) => Cutter::Stdio(input.try_clone()?, output.try_clone()?),
        })
    }

    /// Cuts the link; for a shell: ends it and takes its exit status in.
    pub fn close(&mut self) {
        match self {
            Closer::Shell(child) => {
                if matches!(child.try_wait(), Ok(None)) {
                    // The child is ours and not reaped, so the number is still its own.
                    let _ = child.kill();
                }
                let _ = child.wait();
            }
            Closer::Socket(socket) => {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
            Closer::Stdio(..) => {}
        }
    }

    /// Waits for the shell to end by itself, after the writer has been dropped; cuts it off when
    /// that takes longer than `limit`.
    pub fn wait(&mut self, limit: Duration) {
        if let Closer::Shell(child) = self {
            let ended = process::pidfd_open(child.id() as i32)
                .and_then(|fd| process::wait_readable(&[fd.as_fd()], Some(Instant::now() + limit)));
            if ended.is_ok() {
                let _ = child.wait();
                return;
            }
            self.close();
        }
    }
}

impl Destination {
    /// Connects. For a shell, success means only that it was started: what goes wrong on the way
    /// shows as an end of the stream, and in [`explain`].
    ///
    /// # Errors
    /// When the shell cannot be run, or nothing listens on the socket.
    pub fn connect(&self) -> Result<Link> {
        match self {
            Destination::Unix(path) => {
                let socket = UnixStream::connect(path)
                    .with_context(|| format!("nothing listens on unix:{}", path.display()))?;
                Ok(Link {
                    reader: Box::new(socket.try_clone()?),
                    writer: Box::new(socket.try_clone()?),
                    closer: Closer::Socket(socket),
                })
            }
            Destination::Shell { host, port, rsh, remote_ferry } => {
                let (program, first) =
                    rsh.split_first().ok_or_else(|| anyhow!("--rsh names no command"))?;
                let mut command = Command::new(program);
                command.args(ciphers::arguments(program, first, host, *port)).args(first);
                if let Some(port) = port {
                    command.arg("-p").arg(port.to_string());
                }

                command.arg(host).arg(remote_ferry).arg("receive").arg("--stdio");
                if tracing::enabled!(tracing::Level::DEBUG) {
                    command.arg("--debug");
                }
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());

                // Ctrl-C on our terminal must not cut the link under the hand-over.
                process::in_new_session(&mut command);
                let mut child = command
                    .spawn()
                    .with_context(|| format!("cannot run the remote shell {program}"))?;
                tracing::debug!("started {command:?} as process {}", child.id());
                let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
                    bail!("the remote shell has no standard streams");
                };

                // 1 MiB instead of 64 KiB: fewer changes between us and ssh. Where the system's
                // limit forbids it, the default does.
                for pipe in [stdin.as_fd(), stdout.as_fd()] {
                    let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(1 << 20));
                }

                Ok(Link {
                    reader: Box::new(stdout),
                    writer: Box::new(stdin),
                    closer: Closer::Shell(Box::new(child)),
                })
            }
        }
    }

    /// Returns why the link ended before the other Ferry had said a word, and what to do about it.
    pub fn explain(&self, closer: &mut Closer) -> anyhow::Error {
        match (self, closer) {
            (Destination::Shell { host, rsh, remote_ferry, .. }, Closer::Shell(child)) => {
                let status = child.wait().ok().and_then(|s| s.code());
                let rsh = rsh.join(" ");
                match status {
                    Some(127 | 126) => advice(
                        format!("there is no {remote_ferry} on {host}"),
                        "install ferry there, or name its place with --remote-ferry PATH",
                    ),
                    Some(255) => advice(
                        format!("{rsh} cannot reach {host}"),
                        format!("`{rsh} {host} true` must work without asking for anything"),
                    ),
                    Some(2) => advice(
                        format!("{remote_ferry} on {host} does not know `receive --stdio`"),
                        "install the same version of ferry on both hosts",
                    ),
                    Some(n) => advice(
                        format!(
                            "{rsh} {host} ended with exit code {n} before ferry there said a word"
                        ),
                        format!("see what `{rsh} {host} {remote_ferry} receive --stdio` says"),
                    ),
                    None => anyhow!("{rsh} {host} was ended by a signal"),
                }
            }
            (other, _) => anyhow!("{other} closed the connection"),
        }
    }
}

/// Our own standard streams as a link, for `ferry receive --stdio`.
///
/// Standard output is given over to the link: file descriptor 1 then points to standard error, so
/// that a stray print cannot spoil the protocol.
///
/// # Errors
/// When they are closed.
pub fn stdio() -> Result<Link> {
    let input = io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    let output = io::stdout().as_fd().try_clone_to_owned().context("standard output")?;
    process::dup_onto(io::stderr(), 1)?;
    let null = std::fs::File::open("/dev/null")?;
    process::dup_onto(&null, 0)?;
    adopt(input, output)
}

/// A link that another process had as its standard streams.
///
/// # Errors
/// When there are no descriptors left.
pub fn adopt(input: OwnedFd, output: OwnedFd) -> Result<Link> {
    let closer = Closer::Stdio(input.try_clone()?, output.try_clone()?);
    Ok(Link {
        reader: Box::new(std::fs::File::from(input)),
        writer: Box::new(std::fs::File::from(output)),
        closer,
    })
}

/// Splits `--rsh` as rsync does: at blanks; quotes group.
///
/// # Errors
/// For an open quote, or nothing at all.
pub fn split_command(text: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote, mut any) = (Vec::new(), String::new(), None, false);
    for c in text.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                any = true;
            }
            (None, c) if c.is_whitespace() => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            (None, c) => word.push(c),
        }
    }

    if any || !word.is_empty() {
        words.push(word);
    }
    if quote.is_some() || words.is_empty() {
        bail!("cannot understand the command {text:?}");
    }

    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Advice;

    #[test]
    fn a_link_that_never_was_is_explained_with_a_hint() {
        for (code, words) in [
            (255, "sh cannot reach h"),
            (127, "there is no f on h"),
            (2, "does not know `receive --stdio`"),
            (1, "exit code 1"),
        ] {
            let child = Command::new("sh").args(["-c", &format!("exit {code}")]).spawn().unwrap();
            let destination = Destination::Shell {
                host: "h".into(),
                port: None,
                rsh: vec!["sh".into()],
                remote_ferry: "f".into(),
            };
            let said = destination.explain(&mut Closer::Shell(Box::new(child)));
            assert!(said.to_string().contains(words), "{said}");
            assert!(said.downcast_ref().is_some_and(|a: &Advice| !a.hints().is_empty()));
        }
    }

    #[test]
    fn commands_are_split_as_a_shell_would() {
        let split = |t| split_command(t).unwrap();
        assert_eq!(split("ssh"), ["ssh"]);
        assert_eq!(split("ssh -p 22  -o 'A B'"), ["ssh", "-p", "22", "-o", "A B"]);
        assert_eq!(split("env X=\"\" y"), ["env", "X=", "y"]);
        assert!(split_command("a 'b").is_err());
        assert!(split_command("  ").is_err());
    }
}
