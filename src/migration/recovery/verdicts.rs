//! Learning over a new link how an earlier migration stands, and bringing the source's word.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::decide::{Answer, LeftCopy, answer as decide, has_heard, is_swept};
use super::undo;
use crate::migration::journal::workdir::WorkPath;
use crate::migration::journal::{Journal, Record, Role, State};
use crate::migration::protocol::session::{FromPeer, Session};
use crate::migration::protocol::{Message, Standing, Verdict};
use crate::problem::Advice;
use crate::sys::scm;

/// Time that the other host may take to answer.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Time that whoever holds a container may take to end when it does not answer any more.
const ENDING: Duration = Duration::from_secs(10);

/// Asks the destination of a migration how it stands there, telling it the source's verdict if
/// there is one. A host that is not there answers nothing, and ssh waits for minutes: `limit` is for
/// everything.
///
/// # Errors
/// When it cannot be reached or does not answer.
pub fn ask(record: &Record, verdict: Option<Verdict>, limit: Duration) -> Result<Standing> {
    let until = Instant::now() + limit;
    let destination =
        record.destination.as_ref().ok_or_else(|| anyhow!("only the source can ask"))?;
    let (tell, heard) = channel();
    let resolve = Message::Resolve { migration: record.migration.clone(), verdict };
    let mut session =
        Session::open(destination, Some(&resolve), limit, move |h| tell.send(h).is_ok())?;
    let answer = loop {
        match heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(FromPeer::Message(Message::Resolved { standing })) => break Ok(standing),
            Ok(FromPeer::Message(Message::Failed { why, hints, .. })) => {
                break Err(Advice::with(why, hints));
            }
            Ok(FromPeer::Gone(why)) => break Err(anyhow!(why.unwrap_or("no answer".into()))),
            Ok(_) => {}
            Err(_) => {
                break Err(anyhow!("{destination} has not answered within {} s", limit.as_secs()));
            }
        }
    };
    session.closer.close();
    answer
}

/// Tells the verdict, and asks again until it has come true or ten seconds are over; each answer may
/// take so long.
///
/// # Errors
/// As [`ask`].
pub fn insist(record: &Record, verdict: Verdict, limit: Duration) -> Result<Standing> {
    let began = Instant::now();
    loop {
        let standing = ask(record, Some(verdict), limit)?;
        if standing != Standing::Waiting || began.elapsed() > ENDING.min(limit) {
            return Ok(standing);
        }
    }
}

/// Tells the destination that the container stayed, and notes in the journal when it has heard.
///
/// # Errors
/// As [`ask`].
pub fn tell_stayed(journal: &mut Journal, limit: Duration) -> Result<Standing> {
    let standing = ask(&journal.record, Some(Verdict::Abort), limit)?;
    if has_heard(standing)
        && let Ok(Some(_held)) = journal.hold_within(ENDING)
    {
        // It is told once more, at worst.
        let _ = journal.note_told().inspect_err(|e| tracing::error!("{e:#}"));
    }
    Ok(standing)
}

/// It becomes a file's name.
fn check_id(migration: &str) -> Result<()> {
    if migration.len() != 16 || !migration.bytes().all(|b| b.is_ascii_hexdigit()) {
        bail!("{migration:?} is no migration's ID");
    }
    Ok(())
}

/// On the destination: how a migration stands, after the verdict has been passed on to whoever
/// waits for it.
///
/// # Errors
/// When what is waiting does not answer.
pub fn answer(state_dir: &Path, migration: &str, verdict: Option<Verdict>) -> Result<Standing> {
    answer_here(state_dir, migration, &ControlRequest::Verdict(verdict), LIMIT)
}

/// The same for whoever asks on this host, and may be its operator; `limit` is how long whoever is at it
/// may take.
///
/// # Errors
/// As [`answer`].
pub fn answer_here(
    state_dir: &Path,
    migration: &str,
    asked: &ControlRequest,
    limit: Duration,
) -> Result<Standing> {
    check_id(migration)?;
    let began = Instant::now();
    let mut journal = loop {
        let Some(journal) = Journal::find(state_dir, migration)? else {
            return Ok(Standing::Gone);
        };
        if journal.record.role != Role::Destination {
            bail!("this host is the source of migration {migration}");
        }

        if !journal.record.worker_lives() || journal.state().is_over() {
            break journal;
        }

        // Whoever goes on in its place has to see first what there is, and may have to undo it.
        let patience = if journal.record.worker.is_alive() { ENDING } else { limit };
        match pass_on(&journal.record.work, asked, limit) {
            Err(e) if began.elapsed() > patience => return Err(e),
            // It may be ending, with its work done: what came of it is in the journal then, which
            // tells nobody of that.
            Err(_) => std::thread::park_timeout(Duration::from_millis(5)),
            standing => return standing,
        }
    };

    // What is over is written no more.
    let _held = if journal.state().is_over() {
        None
    } else {
        Some(
            journal
                .hold_within(limit)?
                .ok_or_else(|| anyhow!("another process is settling migration {migration}"))?,
        )
    };

    loop {
        let left = LeftCopy {
            state: journal.state(),
            started: journal.may_have_run(),
            same_boot: journal.record.same_boot(),
            whole: undo::runs_whole(&journal.record),
        };

        match decide(left) {
            Answer::Is(standing) => return Ok(standing),
            Answer::Keep => undo::finish_destination(&mut journal)?,
            Answer::Discard { doubtful } => {
                if doubtful {
                    journal.write(State::Committed)?;
                }
                undo::discard_destination(&mut journal)?;
            }
        }
    }
}

/// On the destination, when the source is about to hear how its migration ended here: it will not ask
/// much longer.
pub fn note_answer(state_dir: &Path, migration: &str) {
    if let Ok(Some(mut journal)) = Journal::find(state_dir, migration)
        && journal.is_untold()
        && let Ok(Some(_held)) = journal.hold_within(Duration::ZERO)
    {
        let _ = journal.note_told().inspect_err(|e| tracing::error!("{e:#}"));
    }
}

/// Before a migration of a container begins: settles earlier ones that brought it here and whose
/// Ferry was killed. What became of them can be seen.
///
/// # Errors
/// When it cannot be cleared away.
pub fn sweep(state_dir: &Path, root: &Path, container: &str) -> Result<()> {
    for journal in Journal::of(state_dir, root, container)? {
        let record = &journal.record;
        let came_here = record.role == Role::Destination;
        if came_here && is_swept(journal.state(), record.worker_lives()) {
            answer(state_dir, &record.migration, None)
                .context("clearing away an earlier migration")?;
        }
    }
    Ok(())
}

/// What is said to whoever holds the container, over its control socket.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    /// A verdict, or only a question.
    Verdict(Option<Verdict>),
    /// The operator's word that it is not to go on here: the source is gone, or runs it. One that runs
    /// with all of its memory stays.
    Discard,
    /// Two descriptors come along: a new link to the source, in the place of the old one.
    Link,
    /// The same: a further one, for memory.
    Channel,
}

/// More than any of it is long, in JSON.
const ASKED: usize = 256;

fn connect(work: &WorkPath) -> Result<UnixStream> {
    UnixStream::connect(work.control_socket())
        .context("the process that holds the container here does not answer")
}

fn pass_on(work: &WorkPath, asked: &ControlRequest, limit: Duration) -> Result<Standing> {
    let socket = connect(work)?;
    // Zero would be no limit.
    socket.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
    scm::send(&socket, &serde_json::to_vec(asked)?, &[])?;
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer)?;
    serde_json::from_str(&answer).context("the process that holds the container here went away")
}

/// On the destination: a new link of a migration that is under way, a `further` one or one for that
/// which broke. It goes to the process that holds the container; returns when that needs it no more.
/// Where there is no such process any more: how the migration stands.
///
/// # Errors
/// When it does not take it.
pub fn hand_link(
    state_dir: &Path,
    migration: &str,
    further: bool,
    input: BorrowedFd,
    output: BorrowedFd,
) -> Result<Option<Standing>> {
    check_id(migration)?;
    let holder = Journal::find(state_dir, migration)?
        .filter(|j| j.record.role == Role::Destination)
        .filter(|j| j.record.worker_lives() && !j.state().is_over());
    let Some(journal) = holder else { return answer(state_dir, migration, None).map(Some) };
    let mut socket = connect(&journal.record.work)?;
    let asked =
        serde_json::to_vec(if further { &ControlRequest::Channel } else { &ControlRequest::Link })?;
    scm::send(&socket, &asked, &[input.as_raw_fd(), output.as_raw_fd()])?;
    // Nothing comes but the end.
    let _ = socket.read(&mut [0]);
    Ok(None)
}

/// What came by the control socket.
#[derive(Debug)]
pub enum ControlCall {
    /// A verdict or a question, and where the answer goes.
    Verdict(Option<Verdict>, Sender<Standing>),
    /// See [`ControlRequest::Discard`].
    Discard(Sender<Standing>),
    /// A new link to the source: reading end, writing end, and what is to be kept as long as it is
    /// used.
    Link(OwnedFd, OwnedFd, UnixStream),
    /// The same, for a further link.
    Channel(OwnedFd, OwnedFd, UnixStream),
}

/// On the destination, by the process that holds the container: takes verdicts and links.
///
/// # Errors
/// When the socket cannot be made.
pub fn take_calls(
    work: &WorkPath,
    tell: impl Fn(ControlCall) -> bool + Send + 'static,
) -> Result<()> {
    let place = work.control_socket();
    // That of a process that has been killed.
    let _ = std::fs::remove_file(&place);
    let listener = UnixListener::bind(place)?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for socket in listener.incoming().flatten() {
            if socket.set_read_timeout(Some(Duration::from_secs(5))).is_err() {
                continue;
            }
            let Ok(Some((bytes, fds))) = scm::receive_stream(&socket, ASKED) else { continue };
            let mut fds = fds.into_iter();
            match (serde_json::from_slice(&bytes), fds.next(), fds.next()) {
                (
                    Ok(asked @ (ControlRequest::Link | ControlRequest::Channel)),
                    Some(input),
                    Some(output),
                ) => {
                    let call = if matches!(asked, ControlRequest::Link) {
                        ControlCall::Link
                    } else {
                        ControlCall::Channel
                    };
                    let taken = tell(call(input, output, socket));
                    if !taken {
                        return;
                    }
                }
                (Ok(asked @ (ControlRequest::Verdict(_) | ControlRequest::Discard)), ..) => {
                    let (reply, answer) = channel();
                    let call = match asked {
                        ControlRequest::Verdict(verdict) => ControlCall::Verdict(verdict, reply),
                        _ => ControlCall::Discard(reply),
                    };

                    if !tell(call) {
                        return;
                    }
                    if let Ok(standing) = answer.recv_timeout(LIMIT)
                        && let Ok(mut text) = serde_json::to_vec(&standing)
                    {
                        text.push(b'\n');
                        let _ = (&socket).write_all(&text);
                    }
                }
                _ => {}
            }
        }
    })?;

    Ok(())
}
