//! The destination's reading end: memory goes straight where it belongs, echoes straight back, and
//! everything else to the hand-over.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::memory::serve::{Intake, PageArrival};
use crate::memory::shared::is_segment;
use crate::memory::shared_files::SharedFiles;
use crate::memory::staging::Staging;
use crate::migration::protocol::Message;
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::transport::frame::PageRun;
use crate::transport::frame::{Frame, RunKind};

/// Time that the page daemon may take to say what it lacks.
const ANSWER: Duration = Duration::from_secs(20);

/// Where memory goes: the hand-over's queue must not hold it.
#[derive(Clone, Debug, Default)]
pub struct Stage {
    place: Arc<Mutex<MemoryPlace>>,
    shared: Arc<(Mutex<SharedPlace>, Condvar)>,
    /// See [`Stage::heard`].
    heard: Arc<Mutex<Option<Instant>>>,
}

#[derive(Debug, Default)]
enum MemoryPlace {
    /// Nobody has asked for any yet.
    #[default]
    Nowhere,
    /// It is kept.
    Staging(Staging),
    /// The tasks are being filled.
    Serving(Arc<Intake>),
}

/// Where shared memory goes.
#[derive(Debug, Default)]
enum SharedPlace {
    /// There is no place for it yet.
    #[default]
    Awaited,
    Open(SharedFiles),
    /// The tasks have it.
    Closed,
}

impl Stage {
    fn with<T>(&self, f: impl FnOnce(&mut MemoryPlace) -> T) -> T {
        f(&mut self.place.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// When something last came that does not go through the hand-over's queue: a source that copies
    /// memory for an hour says nothing else in it.
    pub fn heard(&self) -> Option<Instant> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_heard(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// From here on pages are kept.
    pub fn keep(&self, staging: Staging) {
        self.with(|place| *place = MemoryPlace::Staging(staging));
    }

    /// From here on there is a place for shared memory; whoever brought some before has waited.
    pub fn keep_shared(&self, files: SharedFiles) {
        self.tell_shared(SharedPlace::Open(files));
    }

    /// There is no place for it any more: whoever writes through another process lets go of that.
    pub fn close_shared(&self) {
        self.tell_shared(SharedPlace::Closed);
    }

    fn tell_shared(&self, place: SharedPlace) {
        let before = {
            let mut now = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *now, place)
        };
        self.shared.1.notify_all();
        // Not with the lock held: it takes a moment.
        drop(before);
    }

    /// Does something with the files of shared memory.
    ///
    /// # Errors
    /// When there are none (any more), or that fails.
    pub fn with_shared<T>(&self, f: impl FnOnce(&mut SharedFiles) -> Result<T>) -> Result<T> {
        let place = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let awaited = |place: &mut SharedPlace| matches!(place, SharedPlace::Awaited);
        let place = self.shared.1.wait_timeout_while(place, ANSWER, awaited);
        match &mut *place.unwrap_or_else(PoisonError::into_inner).0 {
            SharedPlace::Open(files) => f(files),
            _ => Err(anyhow!("shared memory comes when there is no place for it")),
        }
    }

    /// From here on pages go to a daemon.
    pub fn serve_by(&self, intake: Intake) {
        self.with(|place| *place = MemoryPlace::Serving(Arc::new(intake)));
    }

    /// Hands what has been kept to whoever makes a page daemon of it.
    ///
    /// # Errors
    /// When there is none (any more), or that fails.
    pub fn serve(&self, start: impl FnOnce(Staging) -> Result<Intake>) -> Result<()> {
        self.close_shared();
        self.with(|place| match std::mem::take(place) {
            MemoryPlace::Staging(staging) => {
                *place = MemoryPlace::Serving(Arc::new(start(staging)?));
                Ok(())
            }
            _ => Err(anyhow!("memory has been taken already")),
        })
    }

    /// The pages that the daemon lacks: task, address, how many.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn missing(&self) -> Result<Vec<PageRun>> {
        let Some(intake) = self.daemon() else { return Ok(Vec::new()) };
        let (reply, answer) = channel();
        intake.hand_in(PageArrival::Missing(reply))?;
        match answer.recv_timeout(ANSWER) {
            Ok(list) => Ok(list),
            // It has ended: it lacks nothing.
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Ok(Vec::new()),
            Err(e) => Err(e.into()),
        }
    }

    fn daemon(&self) -> Option<Arc<Intake>> {
        self.with(|place| match place {
            MemoryPlace::Serving(intake) => Some(intake.clone()),
            _ => None,
        })
    }

    /// Takes memory in; gives back what is none.
    fn take(&self, frame: Frame) -> Result<Option<Frame>> {
        let is_memory = matches!(
            frame,
            Frame::Pages(..) | Frame::Run(RunKind::Zero | RunKind::Remote, ..) | Frame::Same(_)
        );
        if !is_memory {
            return Ok(Some(frame));
        }

        self.note_heard();
        match &frame {
            Frame::Pages(number, at, bytes) if is_segment(*number) => {
                self.with_shared(|files| files.put(*number, *at, bytes))?;
                return Ok(None);
            }
            Frame::Run(RunKind::Zero, run) if is_segment(run.vpid) => {
                self.with_shared(|files| files.put_zeros(run.vpid, run.start, run.pages))?;
                return Ok(None);
            }
            _ => {}
        }

        // Not with the lock held: the daemon may have enough to do.
        if let Some(intake) = self.daemon() {
            match frame {
                Frame::Pages(vpid, at, bytes) => {
                    intake.hand_in(PageArrival::Pages(vpid, at, bytes))?
                }
                Frame::Run(RunKind::Zero, run) => {
                    intake.hand_in(PageArrival::Zeros(run))?;
                }
                _ => return Err(anyhow!("memory that comes too late for that")),
            }
            return Ok(None);
        }

        self.with(|place| {
            let MemoryPlace::Staging(staging) = place else {
                return Err(anyhow!("memory comes before it was asked for"));
            };
            match frame {
                Frame::Pages(vpid, at, bytes) => staging.put(vpid, at, &bytes),
                Frame::Run(RunKind::Zero, run) => staging.put_zeros(run.vpid, run.start, run.pages),
                Frame::Run(_, run) => staging.put_remote(run.vpid, run.start, run.pages),
                Frame::Same(same) => staging.put_same(same.to, same.from, same.pages),
                _ => Ok(()),
            }
        })?;

        Ok(None)
    }
}

/// Asks the source for pages that a task waits for.
///
/// # Errors
/// When the link is gone.
pub fn want(peer: &PeerWriter, run: PageRun) -> Result<()> {
    peer.run(RunKind::Want, run)?;
    peer.flush()
}

/// Tells a source that is back what is missing here.
///
/// # Errors
/// When the link is gone, or nobody knows it.
pub fn send_missing(peer: &PeerWriter, stage: &Stage) -> Result<()> {
    let missing = stage.missing()?;
    let mut pages = 0;
    for run in missing {
        peer.run(RunKind::Want, run)?;
        pages += run.pages as u64;
    }
    peer.send(&Message::Missing { pages })
}

/// Listens to a further link, which carries memory and asks for echoes; tells why it ended.
///
/// # Errors
/// When there can be no thread.
pub fn listen_channel(
    reader: Box<dyn std::io::Read + Send>,
    peer: PeerWriter,
    stage: &Stage,
    ended: impl Fn(String) + Send + 'static,
) -> Result<()> {
    let stage = stage.clone();
    session::listen(reader, move |heard| {
        let why = match heard {
            FromPeer::Message(Message::Echo { number }) => {
                return peer.send(&Message::Echo { number }).is_ok();
            }
            FromPeer::Frame(frame) => match stage.take(frame) {
                Ok(None) => return true,
                Ok(Some(_)) => "something else than memory comes".to_owned(),
                Err(e) => format!("{e:#}"),
            },
            FromPeer::Message(_) => "something else than memory comes".to_owned(),
            FromPeer::Gone(why) => why.unwrap_or_else(|| "it was closed".into()),
        };

        ended(why);
        false
    })?;

    Ok(())
}

/// Bytes of files that have come and were not written yet: a source that is quicker than this host's
/// disk has to wait.
#[derive(Clone, Debug, Default)]
pub struct Backlog(Arc<(Mutex<usize>, Condvar)>);

/// Most bytes in the backlog.
const MAX_BACKLOG: usize = 32 << 20;

impl Backlog {
    fn add(&self, bytes: usize) {
        let (sum, less) = &*self.0;
        let guard = sum.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |sum: &mut usize| *sum > MAX_BACKLOG;
        let mut sum = less.wait_while(guard, full).unwrap_or_else(PoisonError::into_inner);
        *sum += bytes;
    }

    /// So many bytes were written.
    pub fn done(&self, bytes: usize) {
        let (sum, less) = &*self.0;
        *sum.lock().unwrap_or_else(PoisonError::into_inner) -= bytes;
        less.notify_all();
    }
}

/// Which of several links, one after the other, counts.
#[derive(Clone, Debug, Default)]
pub struct Current(Arc<AtomicU64>);

/// Listens to a link, which counts from now on instead of any before it; `tell` says whether to go on.
///
/// # Errors
/// When there can be no thread.
pub fn listen(
    reader: Box<dyn std::io::Read + Send>,
    peer: &PeerWriter,
    stage: &Stage,
    current: &Current,
    backlog: &Backlog,
    tell: impl Fn(FromPeer) -> bool + Send + 'static,
) -> Result<()> {
    let (peer, stage) = (peer.clone(), stage.clone());
    let (current, backlog) = (current.clone(), backlog.clone());
    let mine = current.0.fetch_add(1, Ordering::SeqCst) + 1;
    session::listen(reader, move |heard| {
        if current.0.load(Ordering::SeqCst) != mine {
            return false;
        }
        let heard = match heard {
            FromPeer::Message(Message::Echo { number }) => {
                stage.note_heard();
                // If it does not get there, the reading end hears of it, too.
                let _ = peer.send(&Message::Echo { number });
                return true;
            }
            FromPeer::Frame(frame) => match stage.take(frame) {
                Ok(None) => return true,
                Ok(Some(other)) => {
                    if let Frame::File(_, _, bytes) = &other {
                        backlog.add(bytes.len());
                    }
                    FromPeer::Frame(other)
                }
                Err(e) => FromPeer::Gone(Some(format!("{e:#}"))),
            },
            other => other,
        };

        // The rest of a link that is handed on belongs to whoever gets it.
        let last = matches!(
            heard,
            FromPeer::Gone(_)
                | FromPeer::Message(
                    Message::Resume { .. } | Message::Join { .. } | Message::Forward(_)
                )
        );
        tell(heard) && !last
    })?;

    Ok(())
}
