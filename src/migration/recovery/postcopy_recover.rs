//! After the commit, on the source: the link broke, or Ferry was killed, while pages were still here.
//! The destination runs and waits for them; what is frozen here has them. So: a new link, the list of
//! what is missing, and on with it, as often as it takes.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::verdicts;
use crate::memory::serve::Served;
use crate::migration::journal::Record;
use crate::migration::protocol::session::{FromPeer, Session};
use crate::migration::protocol::{Message, Standing, Verdict};
use crate::migration::transfer::memory_sender::{
    MemoryEvent, MemoryOptions, MemoryOrder, MemoryTransfer,
};
use crate::problem::Advice;
use crate::transport::backoff::Backoff;
use crate::transport::frame::{Frame, RunKind};

/// Time that a link may be silent before another is tried.
const SILENCE: Duration = Duration::from_secs(30);
/// How often is looked whether somebody wants it to end.
const TICK: Duration = Duration::from_millis(500);
/// Between two tries to reach the other host, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How it ended.
#[derive(Debug)]
pub enum Brought {
    /// All of it is there.
    Whole(Option<Served>),
    /// The destination has no copy: it says this.
    Gone(Standing),
    /// Somebody wanted it to end.
    Stopped,
}

impl Brought {
    /// Returns how it stands on the destination then.
    pub fn standing(&self) -> Standing {
        match self {
            Brought::Whole(_) => Standing::Running,
            Brought::Gone(standing) => *standing,
            Brought::Stopped => Standing::Partial,
        }
    }
}

/// Brings the rest over, over as many links as it takes; where there is a `patience`, until nothing has
/// been heard of the destination for that long. `told` is called with what goes wrong, once
/// for each reason, and says whether to go on.
pub fn resume(
    record: &Record,
    wishes: MemoryOptions,
    patience: Option<Duration>,
    told: &mut dyn FnMut(Option<&str>) -> bool,
) -> Brought {
    let mut heard = Instant::now();
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut last = String::new();

    loop {
        let began = Instant::now();
        match attempt(record, &wishes, patience, &mut heard, told) {
            Ok(Some(end)) => return end,
            Ok(None) => {}
            Err(e) => {
                let why = format!("{e:#}");
                if why != last && !told(Some(&why)) {
                    return Brought::Stopped;
                }
                last = why;
            }
        }

        if began.elapsed() > SILENCE {
            backoff.reset();
        }
        if !told(None) || patience.is_some_and(|patience| heard.elapsed() >= patience) {
            return Brought::Stopped;
        }

        backoff.park();
    }
}

enum ResumeEvent {
    FromPeer(FromPeer),
    Memory(MemoryEvent),
}

/// One link. Nothing came of it where the destination is only about to run.
fn attempt(
    record: &Record,
    wishes: &MemoryOptions,
    patience: Option<Duration>,
    latest: &mut Instant,
    told: &mut dyn FnMut(Option<&str>) -> bool,
) -> Result<Option<Brought>> {
    let destination =
        record.destination.as_ref().ok_or_else(|| anyhow!("only the source can bring it"))?;
    let cgroup = record.cgroup.as_ref().ok_or_else(|| anyhow!("no control group is known"))?;

    // The link may have broken before the commit got there.
    let left = patience.map_or(SILENCE, |patience| patience.saturating_sub(latest.elapsed()));
    let silence = left.min(SILENCE);
    let standing = verdicts::ask(record, Some(Verdict::Commit), silence)?;
    *latest = Instant::now();
    match standing {
        Standing::Waiting | Standing::Ready | Standing::Lacking | Standing::Arriving => {
            return Ok(None);
        }
        gone @ (Standing::Gone | Standing::NeverRan) => return Ok(Some(Brought::Gone(gone))),
        Standing::Running => return Ok(Some(Brought::Whole(None))),
        Standing::Partial => {}
    }

    let (tell, events) = channel();
    let heard = tell.clone();
    let resume = Message::Resume { migration: record.migration.clone() };
    let hear = move |h| heard.send(ResumeEvent::FromPeer(h)).is_ok();
    let Session { peer, mut closer } = Session::open(destination, Some(&resume), silence, hear)?;
    *latest = Instant::now();

    let result = (|| {
        let mut missing = Vec::new();
        let mut memory: Option<MemoryTransfer> = None;
        loop {
            let event = match events.recv_timeout(TICK) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) if !told(None) => {
                    return Ok(Some(Brought::Stopped));
                }
                Err(RecvTimeoutError::Timeout) if latest.elapsed() < silence => continue,
                Err(_) => bail!("{destination} is silent"),
            };

            *latest = Instant::now();
            let order = |memory: &Option<MemoryTransfer>, order| {
                if let Some(memory) = memory {
                    // It has sent everything.
                    let _ = memory.orders.send(order);
                }
            };

            match event {
                ResumeEvent::FromPeer(FromPeer::Frame(Frame::Run(RunKind::Want, run))) => {
                    match memory {
                        None => missing.push(run),
                        Some(_) => order(&memory, MemoryOrder::Want(run)),
                    }
                }
                ResumeEvent::FromPeer(FromPeer::Message(Message::Missing { .. })) => {
                    let tell = tell.clone();
                    let list = std::mem::take(&mut missing);
                    memory = Some(MemoryTransfer::resume(
                        cgroup,
                        &peer,
                        wishes.clone(),
                        list,
                        move |event| {
                            let _ = tell.send(ResumeEvent::Memory(event));
                        },
                    )?);
                }
                ResumeEvent::FromPeer(FromPeer::Message(Message::Echo { number })) => {
                    order(&memory, MemoryOrder::Echoed(0, number));
                }
                ResumeEvent::FromPeer(FromPeer::Message(Message::MemoryComplete(served))) => {
                    return Ok(Some(Brought::Whole(Some(served))));
                }
                ResumeEvent::FromPeer(FromPeer::Message(Message::Resolved { standing })) => {
                    return Ok(match standing {
                        Standing::Running => Some(Brought::Whole(None)),
                        Standing::Gone | Standing::NeverRan => Some(Brought::Gone(standing)),
                        _ => None,
                    });
                }
                ResumeEvent::FromPeer(FromPeer::Message(Message::Failed { phase, why, hints })) => {
                    let what = format!("the destination failed while {phase}: {why}");
                    return Err(Advice::with(what, hints));
                }
                ResumeEvent::FromPeer(FromPeer::Gone(why)) => {
                    bail!("the link broke: {}", why.unwrap_or_else(|| "it was closed".into()))
                }
                ResumeEvent::Memory(MemoryEvent::Failed(why)) => bail!("sending memory: {why}"),
                ResumeEvent::FromPeer(_) | ResumeEvent::Memory(_) => {}
            }
        }
    })();

    closer.close();
    result.with_context(|| format!("bringing what is left to {destination}"))
}
