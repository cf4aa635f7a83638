//! More links than one for memory (`--streams`): one ssh carries no more than one core can encipher.
//!
//! The first link says everything; the others, opened with `Join` when the destination has said
//! `Open`, carry large pieces of memory and echoes. Between two rounds every link has echoed, so that
//! no older version of a page comes after a newer one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::migration::protocol::Message;
use crate::migration::protocol::talk::{self, Heard, Speaker};
use crate::transport::codec::{Chooser, Codec, Wish};
use crate::transport::connect::{Closer, Destination};
use crate::transport::pace::Pace;

/// How long the other side may take to take a further link.
const LIMIT: Duration = Duration::from_secs(60);

/// Packs pages and puts them on one link, no faster than is wanted.
pub struct Packer {
    /// The link.
    pub speaker: Speaker,
    chooser: Chooser,
    pace: Pace,
    packed: Vec<u8>,
    /// What the latest piece was packed with.
    pub latest: Codec,
}

impl Packer {
    /// For a link.
    pub fn new(speaker: Speaker, compress: Wish, pace: Pace) -> Packer {
        Packer {
            speaker,
            chooser: Chooser::new(compress),
            pace,
            packed: Vec::new(),
            latest: Codec::None,
        }
    }

    /// Sends pages; bytes on the link.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<u64> {
        let mut codec = self.chooser.choose();
        if codec != Codec::None {
            let began = Instant::now();
            codec.pack(bytes, &mut self.packed)?;
            self.chooser.packed(codec, bytes.len(), self.packed.len(), began.elapsed());
            if self.packed.len() >= bytes.len() {
                codec = Codec::None;
            }
        }
        self.latest = codec;
        let packed = (codec != Codec::None).then_some((codec, self.packed.as_slice()));
        let began = Instant::now();
        self.speaker.pages(vpid, vaddr, bytes, packed)?;
        let wire = packed.map_or(bytes.len(), |p| p.1.len());
        self.chooser.written(wire, began.elapsed());
        self.pace.pay(wire);
        Ok(wire as u64)
    }
}

/// A further link, opened.
pub struct Lane {
    speaker: Speaker,
    closer: Closer,
}

impl Lane {
    /// Opens one for a migration that is under way. What is heard on it afterwards is told: the
    /// number of an echo, or that it has ended.
    ///
    /// # Errors
    /// When the destination cannot be reached, or does not take it.
    pub fn open(
        destination: &Destination,
        migration: &str,
        tell: impl Fn(Option<u64>) -> bool + Send + 'static,
    ) -> Result<Lane> {
        let (speaker, reader, closer) = talk::split(destination.connect()?);
        let mut lane = Lane { speaker, closer };
        let (joined, answer) = std::sync::mpsc::channel();
        let mut waiting = true;
        talk::listen(reader, move |heard| {
            if waiting {
                waiting = !matches!(heard, Heard::Message(Message::Joined));
                return joined.send(heard).is_ok();
            }
            match heard {
                Heard::Message(Message::Echo { number }) => tell(Some(number)),
                Heard::Gone(_) => tell(None),
                _ => true,
            }
        })?;
        let opened = (|| {
            lane.speaker.say(&talk::hello())?;
            lane.speaker.say(&Message::Join { migration: migration.to_owned() })?;
            loop {
                match answer.recv_timeout(LIMIT)? {
                    Heard::Message(Message::Hello(theirs)) => talk::check_hello(&theirs)?,
                    Heard::Message(Message::Joined) => return Ok(()),
                    Heard::Gone(why) => bail!("{}", why.unwrap_or_else(|| "it was closed".into())),
                    other => bail!("the destination answers {other:?}"),
                }
            }
        })();
        match opened {
            Ok(()) => Ok(lane),
            Err(e) => {
                lane.closer.close();
                Err(e).with_context(|| format!("a further link to {destination}"))
            }
        }
    }

    /// Bytes that went out.
    pub fn bytes(&self) -> u64 {
        self.speaker.bytes()
    }

    /// Starts a thread that packs and sends what it is given.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn carry(
        &self,
        compress: Wish,
        pace: Pace,
        failed: impl Fn(anyhow::Error) + Send + 'static,
    ) -> Result<LaneSender> {
        let (queue, pieces) = sync_channel::<Piece>(2);
        let wire = Arc::new(AtomicU64::new(0));
        let sum = wire.clone();
        let mut packer = Packer::new(self.speaker.clone(), compress, pace);
        std::thread::Builder::new().name("lane".into()).spawn(move || {
            for piece in pieces {
                let sent = match piece {
                    Piece::Pages(vpid, vaddr, bytes) => packer.pages(vpid, vaddr, &bytes),
                    Piece::Echo(number) => {
                        packer.speaker.say(&Message::Echo { number }).map(|()| 0)
                    }
                };
                match sent {
                    Ok(bytes) => sum.fetch_add(bytes, Ordering::Relaxed),
                    Err(e) => return failed(e),
                };
            }
        })?;
        Ok(LaneSender { queue, wire, used: false })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.closer.close();
    }
}

enum Piece {
    Pages(i32, u64, Vec<u8>),
    Echo(u64),
}

/// The way to a lane's thread.
pub struct LaneSender {
    queue: SyncSender<Piece>,
    wire: Arc<AtomicU64>,
    /// Something went that way since the last echo.
    pub used: bool,
}

impl LaneSender {
    /// Hands pages over; waits while the lane has enough to do.
    ///
    /// # Errors
    /// When it has failed.
    pub fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        self.used = true;
        let piece = Piece::Pages(vpid, vaddr, bytes.to_vec());
        self.queue.send(piece).map_err(|_| anyhow!("a further link broke"))
    }

    /// Asks for an echo.
    ///
    /// # Errors
    /// When it has failed.
    pub fn echo(&mut self, number: u64) -> Result<()> {
        self.used = false;
        self.queue.send(Piece::Echo(number)).map_err(|_| anyhow!("a further link broke"))
    }

    /// Bytes of memory that went on this link.
    pub fn wire(&self) -> u64 {
        self.wire.load(Ordering::Relaxed)
    }
}
