//! The queue in which everything that happens to the source's migration stands in line, with its deadlines
//! and the signs of life of its link.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::watchdog::Watchdog;
use crate::migration::checkpoint::dump::DumpEvent;
use crate::migration::protocol::Message;
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::migration::recovery::decide::has_heard;
use crate::migration::transfer::file_sender::FileEvent;
use crate::migration::transfer::image_sender::ImageEvent;
use crate::migration::transfer::memory_sender::MemoryEvent;
use crate::problem::{Advice, advice};
use crate::sys::fault;

/// Until the other Ferry has answered at all; ssh may ask for a key's passphrase.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// How often a link is asked for a sign of life while clients wait.
const PULSE: Duration = Duration::from_millis(500);
/// A link without any for so long is dead: a cable is out, a host has stopped. ssh does not say so.
const DEAD: Duration = Duration::from_secs(6);
/// Bytes that may stand between us and the other host: pipes, ssh, TCP.
const BUFFERS: f64 = (8 << 20) as f64;

/// Something that happened.
#[derive(Debug)]
pub(super) enum SourceInput {
    FromPeer(FromPeer),
    Dump(DumpEvent),
    Memory(MemoryEvent),
    Files(FileEvent),
    Image(ImageEvent),
    /// An echo on a further link, by its number, or its end.
    Channel(usize, Option<u64>),
    Signal(i32),
    /// Home has a link to the destination, or why it has none.
    Joined(Result<()>),
}

/// Who a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The other host.
    Destination,
    /// CRIU, here, with the container frozen.
    Dump,
}

impl Awaited {
    /// Says who has not kept a limit.
    fn not_within(self, limit: Duration) -> anyhow::Error {
        let seconds = limit.as_secs();
        match self {
            Awaited::Destination => {
                anyhow!("nothing was heard of the destination for {seconds} s")
            }
            Awaited::Dump => advice(
                format!("CRIU has not dumped the container within {seconds} s"),
                "large address space that is reserved and not used makes a dump long, as do \
                 thousands of processes; `--timeout` ends it sooner",
            ),
        }
    }
}

/// The link, and everything that happens, in one queue.
pub(super) struct SourceInputs {
    pub(super) queue: Receiver<SourceInput>,
    pub(super) tell: Sender<SourceInput>,
    /// The user's own limit, which no other outlasts.
    pub(super) user: Option<Instant>,
    /// The deadline is the user's.
    by_user: bool,
    /// Who has to do something before the deadline.
    pub(super) awaited: Awaited,
    /// For what goes on now, and when that is over.
    limit: Duration,
    pub(super) deadline: Instant,
    pub(super) interrupted: bool,
    /// The link has ended.
    pub(super) gone: bool,
    /// The destination has said that nothing of it will run there.
    pub(super) undone_there: bool,
    /// The destination owns the container: what the further links were for is over.
    pub(super) committed: bool,
    /// While clients wait: the link is asked for signs of life.
    pulse: Option<PeerWriter>,
    /// Since when it has not answered.
    asked: Option<Instant>,
    /// How long that may be.
    patience: Duration,
    /// Something has come over the link.
    pub(super) heard: bool,
    pub(super) watch: Watchdog,
}

impl SourceInputs {
    /// Begins with the wait for the destination's first answer. `user` is when the user's own limit is over.
    pub(super) fn new(
        (tell, queue): (Sender<SourceInput>, Receiver<SourceInput>),
        user: Option<Instant>,
        watch: Watchdog,
    ) -> SourceInputs {
        let mut inputs = SourceInputs {
            queue,
            tell,
            user,
            by_user: false,
            awaited: Awaited::Destination,
            limit: ANSWER_LIMIT,
            deadline: Instant::now(),
            interrupted: false,
            pulse: None,
            asked: None,
            patience: DEAD,
            gone: false,
            undone_there: false,
            committed: false,
            heard: false,
            watch,
        };
        inputs.until(ANSWER_LIMIT);
        inputs
    }

    /// The next thing that happens and that is no reason to give up.
    pub(super) fn next(&mut self) -> Result<SourceInput> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let input = match &self.pulse {
            None => self.queue.recv_timeout(left),
            Some(peer) => loop {
                match self.queue.recv_timeout(left.min(PULSE)) {
                    Err(RecvTimeoutError::Timeout) if Instant::now() < self.deadline => {
                        // Counted from the first question: nobody listened while images went out.
                        let asked = *self.asked.get_or_insert_with(Instant::now);
                        if asked.elapsed() > self.patience {
                            // Nothing will come over it any more.
                            self.gone = true;
                            bail!(
                                "the link to the destination is dead: not a sign of life for {} s",
                                self.patience.as_secs()
                            );
                        }

                        // Its answer counts, nothing else of it.
                        peer.send(&Message::Echo { number: 0 })?;
                    }
                    other => break other,
                }
            },
        };

        let input = input.map_err(|e| match e {
            RecvTimeoutError::Timeout if self.by_user => anyhow!("the time of --timeout is over"),
            RecvTimeoutError::Timeout => self.awaited.not_within(self.limit),
            RecvTimeoutError::Disconnected => anyhow!("nobody is left to do it"),
        })?;

        self.judge(input)
    }

    /// Returns what has happened already, without waiting.
    pub(super) fn pending(&mut self) -> Result<Option<SourceInput>> {
        self.queue.try_recv().ok().map(|input| self.judge(input)).transpose()
    }

    fn judge(&mut self, input: SourceInput) -> Result<SourceInput> {
        // What the link still takes is a sign, too: on a slow one an echo stands behind it.
        if matches!(
            &input,
            SourceInput::FromPeer(_) | SourceInput::Memory(MemoryEvent::Progress(..))
        ) {
            self.asked = None;
        }

        self.heard |= matches!(&input, SourceInput::FromPeer(heard) if !matches!(heard, FromPeer::Gone(None)));
        match input {
            SourceInput::Signal(signal) => {
                self.interrupted = true;
                bail!("interrupted by {}", session::signal_name(signal))
            }
            SourceInput::FromPeer(FromPeer::Gone(why)) => {
                self.gone = true;
                bail!(
                    "the link to the destination broke: {}",
                    why.unwrap_or("it was closed".into())
                )
            }
            SourceInput::FromPeer(FromPeer::Message(Message::Resolved { standing })) => {
                self.undone_there |= has_heard(standing);
                Ok(input)
            }
            SourceInput::FromPeer(FromPeer::Message(Message::Failed { phase, why, hints })) => {
                Err(Advice::with(format!("the destination failed while {phase}: {why}"), hints))
            }
            SourceInput::Channel(_, None) if !self.committed => bail!("a further link broke"),
            SourceInput::Dump(DumpEvent::Ended(Err(e)) | DumpEvent::Checked(Err(e))) => Err(e),
            SourceInput::Memory(MemoryEvent::Failed(e)) => bail!("sending memory: {e}"),
            SourceInput::Files(FileEvent::Failed(e)) => bail!("sending files: {e}"),
            SourceInput::Image(ImageEvent::Failed(e)) => bail!("sending the image: {e}"),
            SourceInput::Joined(Err(e)) => Err(e),
            input => Ok(input),
        }
    }

    pub(super) fn until(&mut self, limit: Duration) {
        let limit = fault::limit(limit);
        self.limit = limit;
        let own = Instant::now() + limit;
        self.by_user = self.user.is_some_and(|user| user < own);
        self.deadline = self.user.map_or(own, |user| user.min(own));
        self.watch.until(self.deadline);
    }

    /// Waits for so long that the destination says that it has undone everything. Whatever else comes is
    /// of no interest any more.
    pub(super) fn await_undone(&mut self, limit: Duration) {
        self.until(limit);
        while !(self.gone || self.undone_there) && Instant::now() < self.deadline {
            let _ = self.next();
        }
    }

    /// Clients wait from here on: a dead link must be known as dead soon. `rate` is what the link
    /// has carried, in bytes a second, if that is known.
    pub(super) fn start_heartbeat(&mut self, peer: &PeerWriter, rate: Option<f64>) {
        // On a slow link a question stands behind all that is in its buffers.
        let drained = rate.map_or(Duration::ZERO, |rate| {
            Duration::try_from_secs_f64(BUFFERS / rate).unwrap_or(Duration::MAX)
        });
        self.patience = DEAD.saturating_add(drained);
        self.asked = None;
        self.pulse = Some(peer.clone());
    }

    /// It has been decided without the link.
    pub(super) fn stop_heartbeat(&mut self) {
        self.pulse = None;
    }

    /// The time counts anew.
    pub(super) fn again(&mut self) {
        self.until(self.limit);
    }
}
