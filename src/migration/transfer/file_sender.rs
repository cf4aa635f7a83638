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

use super::image_files::{PeerFile, STREAM};
use crate::files::follow::Follower;
use crate::files::inodes::{self, Inodes};
use crate::files::overlay::Merged;
use crate::files::root::Root;
use crate::migration::protocol::session::PeerWriter;
use crate::oci::cgroup::Cgroup;
use crate::report::progress::FilesRound;
use crate::sys::panics::caught;
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
pub enum FileOrder {
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
pub enum FileEvent {
    /// Bytes of files sent so far.
    Progress(u64),
    /// A round is over.
    Round(FilesRound),
    /// What there was to send is over there.
    Converged,
    /// Everything is sent.
    Done,
    /// Files cannot be read, or the link broke.
    Failed(String),
}

/// What there is to carry.
#[derive(Clone, Debug, Default)]
pub struct FilesToCopy {
    /// The trees, in the order that was agreed on.
    pub roots: Vec<Root>,
    /// So many of the first are layers, which nobody changes.
    pub layers: usize,
    /// Where an upper layer is among them: the merged tree, and it.
    pub merged: Option<(PathBuf, PathBuf)>,
}

/// The thread.
pub struct FileTransfer {
    /// To say [`FileOrder`]s.
    pub orders: Sender<FileOrder>,
}

impl FileTransfer {
    /// Starts with the first round over these trees; with `listen` the kernel may tell what changes
    /// in them.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        load: &FilesToCopy,
        listen: bool,
        cgroup: &Cgroup,
        (peer, pace): (&PeerWriter, &Pace),
        tell: impl Fn(FileEvent) + Send + 'static,
    ) -> Result<FileTransfer> {
        let (orders, heard) = channel();
        let carrier = FileSender {
            follower: Follower::new(load.roots.clone(), listen).with_fixed(load.layers),
            merged: load.merged.as_ref().map(|(m, u)| Merged::new(m, u)).unwrap_or_default(),
            cgroup: cgroup.clone(),
            mapped: Inodes::new(),
            peer: peer.clone(),
            pace: pace.clone(),
            orders: heard,
            rounds: 0,
            sent: 0,
            at: 0,
        };

        std::thread::Builder::new().name("files".into()).spawn(move || {
            if let Err(e) = caught(|| run(carrier, &tell)) {
                tell(FileEvent::Failed(format!("{e:#}")));
            }
        })?;

        Ok(FileTransfer { orders })
    }
}

struct FileSender {
    follower: Follower,
    merged: Merged,
    cgroup: Cgroup,
    /// Whatever has ever been mapped for writing: a mapping that is gone may have left changes.
    mapped: Inodes,
    peer: PeerWriter,
    pace: Pace,
    orders: Receiver<FileOrder>,
    rounds: u32,
    /// Bytes of contents, and of the stream, that have gone.
    sent: u64,
    at: u64,
}

fn run(mut carrier: FileSender, tell: &dyn Fn(FileEvent)) -> Result<()> {
    carrier.settle(tell)?;
    loop {
        tell(FileEvent::Converged);
        match carrier.orders.recv() {
            Ok(FileOrder::Again) => carrier.settle(tell)?,
            Ok(FileOrder::Frozen) => break,
            Ok(FileOrder::Applied(_) | FileOrder::Named) => {}
            // The hand-over has ended.
            Err(_) => return Ok(()),
        }
    }
    carrier.round(true, tell)?;
    tell(FileEvent::Done);
    while let Ok(order) = carrier.orders.recv() {
        if order == FileOrder::Named {
            carrier.round(true, tell)?;
            tell(FileEvent::Done);
        }
    }
    Ok(())
}

impl FileSender {
    /// Rounds, until one leaves little for the next.
    fn settle(&mut self, tell: &dyn Fn(FileEvent)) -> Result<()> {
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
    fn round(&mut self, last: bool, tell: &dyn Fn(FileEvent)) -> Result<u64> {
        let began = Instant::now();
        self.mapped.extend(inodes::mapped(&self.cgroup.processes()?, &mut self.merged)?);
        let mut compared = self.mapped.clone();
        if last {
            let processes = self.cgroup.processes()?;
            compared.extend(inodes::open_for_writing(&processes, &mut self.merged)?);
        }

        let (peer, unlimited) = (&self.peer, Pace::default());
        // The container stands still as long as the last of it takes.
        let pace = if last { &unlimited } else { &self.pace };
        let file = PeerFile { peer, name: STREAM.into(), at: self.at, pace };
        let mut out = BufWriter::with_capacity(frame::MAX_FILE_PIECE, file);
        let (mut sent, mut told, mut told_at) = (self.sent, self.sent, began);
        let mut went = |bytes| {
            sent += bytes;
            if sent - told >= TELL_EVERY || told_at.elapsed() >= TELL_AFTER {
                (told, told_at) = (sent, Instant::now());
                tell(FileEvent::Progress(sent));
            }
        };

        let stats = self.follower.round(&compared, last, &mut out, &mut went)?;
        self.sent = sent;
        self.at = out.into_inner().map_err(|e| e.into_error())?.at;
        self.peer.flush()?;
        self.rounds += 1;
        if !last {
            // What was mapped meanwhile, too.
            self.mapped.extend(inodes::mapped(&self.cgroup.processes()?, &mut self.merged)?);
            while self.orders.recv().map_err(|_| anyhow!("the hand-over has ended"))?
                != FileOrder::Applied(self.rounds)
            {}
        }

        let ms = began.elapsed().as_secs_f64() * 1000.0;
        tell(FileEvent::Round(FilesRound { frozen: last, files: stats, ms }));
        Ok(stats.bytes)
    }
}
