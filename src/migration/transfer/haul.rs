//! The source's thread that carries files: in rounds while the container runs, what has changed
//! since in the freeze.
//!
//! ```text
//! rounds ──▶ Settled ──Again──▶ a round ──▶ Settled ──Frozen──▶ the last round ──▶ Done
//!                                                                                    │ Named
//!                                                            what CRIU made ──▶ Done ◀┘
//! ```

use std::io::BufWriter;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::parcels::{STREAM, SpeakerFile};
use crate::files::follow::Follower;
use crate::files::inodes::{self, Inodes};
use crate::files::overlay::Merged;
use crate::files::root::Root;
use crate::migration::protocol::talk::Speaker;
use crate::oci::cgroup::Cgroup;
use crate::report::progress::FilesRound;
use crate::transport::frame;
use crate::transport::pace::Pace;

/// Files are gone over at most so often before memory is.
const MAX_ROUNDS: usize = 8;
/// What is sent in a moment is no reason for another round.
const LITTLE: u64 = 1 << 20;
/// Bytes between two words about progress.
const TELL_EVERY: u64 = 8 << 20;
/// The longest time between two, while anything goes.
const TELL_AFTER: Duration = Duration::from_secs(5);

/// What the hand-over tells the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The destination has put a round in place.
    Applied(u32),
    /// One more round, while memory is still.
    Again,
    /// The tasks stand still.
    Frozen,
    /// CRIU has given names to files that have lost theirs.
    Named,
}

/// What it tells the hand-over.
#[derive(Debug)]
pub enum HaulEvent {
    /// Bytes of files sent so far.
    Progress(u64),
    /// A round is over.
    Round(FilesRound),
    /// What there was to send is over there.
    Settled,
    /// Everything is sent.
    Done,
    /// Files cannot be read, or the link broke.
    Failed(String),
}

/// What there is to carry.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// The trees, in the order that was agreed on.
    pub roots: Vec<Root>,
    /// So many of the first are layers, which nobody changes.
    pub layers: usize,
    /// Where an upper layer is among them: the merged tree, and it.
    pub merged: Option<(PathBuf, PathBuf)>,
}

/// The thread.
pub struct Haul {
    /// To say [`Order`]s.
    pub orders: Sender<Order>,
}

impl Haul {
    /// Starts with the first round over these trees; with `listen` the kernel may tell what changes
    /// in them.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        load: &Load,
        listen: bool,
        cgroup: &Cgroup,
        (speaker, pace): (&Speaker, &Pace),
        tell: impl Fn(HaulEvent) + Send + 'static,
    ) -> Result<Haul> {
        let (orders, heard) = channel();
        let carrier = Carrier {
            follower: Follower::new(load.roots.clone(), listen).with_fixed(load.layers),
            merged: load.merged.as_ref().map(|(m, u)| Merged::new(m, u)).unwrap_or_default(),
            cgroup: cgroup.clone(),
            mapped: Inodes::new(),
            speaker: speaker.clone(),
            pace: pace.clone(),
            orders: heard,
            rounds: 0,
            sent: 0,
            at: 0,
        };
        std::thread::Builder::new().name("haul".into()).spawn(move || {
            if let Err(e) = run(carrier, &tell) {
                tell(HaulEvent::Failed(format!("{e:#}")));
            }
        })?;
        Ok(Haul { orders })
    }
}

struct Carrier {
    follower: Follower,
    merged: Merged,
    cgroup: Cgroup,
    /// Whatever has ever been mapped for writing: a mapping that is gone may have left changes.
    mapped: Inodes,
    speaker: Speaker,
    pace: Pace,
    orders: Receiver<Order>,
    rounds: u32,
    /// Bytes of contents, and of the stream, that have gone.
    sent: u64,
    at: u64,
}

fn run(mut carrier: Carrier, tell: &dyn Fn(HaulEvent)) -> Result<()> {
    carrier.settle(tell)?;
    loop {
        tell(HaulEvent::Settled);
        match carrier.orders.recv() {
            Ok(Order::Again) => carrier.settle(tell)?,
            Ok(Order::Frozen) => break,
            Ok(Order::Applied(_) | Order::Named) => {}
            // The hand-over has ended.
            Err(_) => return Ok(()),
        }
    }
    carrier.round(true, tell)?;
    tell(HaulEvent::Done);
    while let Ok(order) = carrier.orders.recv() {
        if order == Order::Named {
            carrier.round(true, tell)?;
            tell(HaulEvent::Done);
        }
    }
    Ok(())
}

impl Carrier {
    /// Rounds, until one leaves little for the next.
    fn settle(&mut self, tell: &dyn Fn(HaulEvent)) -> Result<()> {
        let mut before = u64::MAX;
        for _ in 0..MAX_ROUNDS {
            let bytes = self.round(false, tell)?;
            // More of the same would not make it less.
            if bytes <= LITTLE || bytes >= before / 4 * 3 {
                break;
            }
            before = bytes;
        }
        Ok(())
    }

    /// A round, and its way to the other side's disk; bytes of contents sent.
    fn round(&mut self, last: bool, tell: &dyn Fn(HaulEvent)) -> Result<u64> {
        let began = Instant::now();
        self.mapped.extend(inodes::mapped(&self.cgroup.processes()?, &mut self.merged)?);
        let mut compared = self.mapped.clone();
        if last {
            let processes = self.cgroup.processes()?;
            compared.extend(inodes::open_for_writing(&processes, &mut self.merged)?);
        }
        let (speaker, unlimited) = (&self.speaker, Pace::default());
        // The container stands still as long as the last of it takes.
        let pace = if last { &unlimited } else { &self.pace };
        let file = SpeakerFile { speaker, name: STREAM.into(), at: self.at, pace };
        let mut out = BufWriter::with_capacity(frame::MAX_FILE_PIECE, file);
        let (mut sent, mut told, mut told_at) = (self.sent, self.sent, began);
        let mut went = |bytes| {
            sent += bytes;
            if sent - told >= TELL_EVERY || told_at.elapsed() >= TELL_AFTER {
                (told, told_at) = (sent, Instant::now());
                tell(HaulEvent::Progress(sent));
            }
        };
        let stats = self.follower.round(&compared, last, &mut out, &mut went)?;
        self.sent = sent;
        self.at = out.into_inner().map_err(|e| e.into_error())?.at;
        self.speaker.flush()?;
        self.rounds += 1;
        if !last {
            // What was mapped meanwhile, too.
            self.mapped.extend(inodes::mapped(&self.cgroup.processes()?, &mut self.merged)?);
            while self.orders.recv().map_err(|_| anyhow!("the hand-over has ended"))?
                != Order::Applied(self.rounds)
            {}
        }
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        tell(HaulEvent::Round(FilesRound { frozen: last, files: stats, ms }));
        Ok(stats.bytes)
    }
}
