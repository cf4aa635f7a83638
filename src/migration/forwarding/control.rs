//! The socket by which the processes that forward are asked and told, on their own host.
//!
//! Each connection is one question and its answer, a line of JSON each. A link from the other host is
//! handed over in the same way, its two descriptors beside the question; nothing is answered then,
//! and the connection stays open as long as the link is used.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::migration::protocol::forwarding::{Ask, ForwardAnswer, Status};
use crate::network::translated::Translated;
use crate::sys::scm;

const SOCKET: &str = "control.sock";
/// Time that an answer may take: a new link may have to be made, to a host that is far.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest question, and longest answer, in JSON.
const LONGEST: usize = 64 << 10;

/// Asks whoever works in a directory.
///
/// # Errors
/// When nobody answers, or what was asked for cannot be done.
pub fn ask(directory: &Path, what: &Ask) -> Result<()> {
    question(directory, what)?.into_result()
}

/// Returns how it goes; `None` when nobody works there.
pub fn status(directory: &Path) -> Option<Status> {
    question(directory, &Ask::Status).ok()?.status
}

/// Returns what ties the container to its home.
///
/// # Errors
/// When home does not say.
pub fn translated(directory: &Path) -> Result<Translated> {
    let answer = question(directory, &Ask::Translated)?;
    let translated = answer.translated.clone();
    answer.into_result()?;
    translated.context("home does not say")
}

fn connect(directory: &Path) -> Result<UnixStream> {
    UnixStream::connect(directory.join(SOCKET)).context("the process that forwards is not there")
}

fn question(directory: &Path, what: &Ask) -> Result<ForwardAnswer> {
    let socket = connect(directory)?;
    socket.set_read_timeout(Some(LIMIT))?;
    scm::send(&socket, &serde_json::to_vec(what)?, &[])?;
    let mut answer = String::new();
    BufReader::new(socket.take(LONGEST as u64)).read_line(&mut answer)?;
    serde_json::from_str(&answer).context("the process that forwards went away")
}

/// Hands a link over; returns when it is used no more.
///
/// # Errors
/// When nobody is there to take it.
pub fn hand_link(
    directory: &Path,
    names: Vec<String>,
    input: BorrowedFd,
    output: BorrowedFd,
) -> Result<()> {
    let mut socket = connect(directory)?;
    let asked = serde_json::to_vec(&Ask::Link(names))?;
    scm::send(&socket, &asked, &[input.as_raw_fd(), output.as_raw_fd()])?;
    // Nothing comes but the end.
    let _ = socket.read(&mut [0]);
    Ok(())
}

/// A link that was handed over: reading end, writing end, and what is to be kept as long as it is
/// used.
pub type Handed = (OwnedFd, OwnedFd, UnixStream);

/// Takes questions, each on a thread of its own, until the process ends.
///
/// # Errors
/// When there can be no socket.
pub fn serve(
    directory: &Path,
    answer: impl Fn(Ask, Option<Handed>) -> ForwardAnswer + Clone + Send + 'static,
) -> Result<()> {
    let path = directory.join(SOCKET);
    if UnixStream::connect(&path).is_ok() {
        bail!("another process forwards already");
    }

    // Left over from one that has died.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for socket in listener.incoming().flatten() {
            let answer = answer.clone();
            let one = move || {
                let _ = socket.set_read_timeout(Some(LIMIT));
                let Ok(Some((bytes, fds))) = scm::receive_stream(&socket, LONGEST) else { return };
                let Ok(asked) = serde_json::from_slice(&bytes) else { return };
                let mut fds = fds.into_iter();
                if let (Ask::Link(_), Some(input), Some(output)) = (&asked, fds.next(), fds.next())
                {
                    answer(asked, Some((input, output, socket)));
                    return;
                }

                let said = answer(asked, None);
                let mut line = serde_json::to_vec(&said).unwrap_or_default();
                line.push(b'\n');

                // Whoever asked may have gone.
                let _ = (&socket).write_all(&line);
            };
            let _ = std::thread::Builder::new().name("answer".into()).spawn(one);
        }
    })?;

    Ok(())
}
