//! More links than one for memory (`--streams`): one ssh carries no more than one core can encipher.
//!
//! The first link says everything; the others, opened with `Join` when the destination has said
//! `AcceptChannels`, carry large pieces of memory and echoes. Between two rounds every link has echoed, so that
//! no older version of a page comes after a newer one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::migration::protocol::session::{FromPeer, PeerWriter, Session};
use crate::migration::protocol::{Message, variant};
use crate::sys::panics::caught;
use crate::transport::codec::{Chooser, Codec, CompressOption};
use crate::transport::connect::{Closer, Destination};
use crate::transport::pace::Pace;

/// Time that the other side may take to take a further link.
const LIMIT: Duration = Duration::from_secs(60);

/// Packs pages and puts them on one link, no faster than is wanted.
pub struct PagePacker {
    /// The link.
    pub peer: PeerWriter,
    chooser: Chooser,
    pace: Pace,
    packed: Vec<u8>,
    /// What the latest piece was packed with.
    pub latest: Codec,
}

impl PagePacker {
    /// For a link.
    pub fn new(peer: PeerWriter, compress: CompressOption, pace: Pace) -> PagePacker {
        PagePacker {
            peer,
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
        self.peer.pages(vpid, vaddr, bytes, packed)?;
        let wire = packed.map_or(bytes.len(), |p| p.1.len());
        self.chooser.written(wire, began.elapsed());
        self.pace.pay(wire);
        Ok(wire as u64)
    }
}

/// A further link, opened.
pub struct Channel {
    peer: PeerWriter,
    closer: Closer,
}

impl Channel {
    /// Opens one for a migration that is under way. What is heard on it afterwards is told: the
    /// number of an echo, or that it has ended.
    ///
    /// # Errors
    /// When the destination cannot be reached, or does not take it.
    pub fn open(
        destination: &Destination,
        migration: &str,
        tell: impl Fn(Option<u64>) -> bool + Send + 'static,
    ) -> Result<Channel> {
        let what = || format!("a further link to {destination}");
        let (joined, answer) = std::sync::mpsc::channel();
        let mut waiting = true;
        let hear = move |heard| {
            if waiting {
                waiting = !matches!(heard, FromPeer::Message(Message::Joined));
                return joined.send(heard).is_ok();
            }
            match heard {
                FromPeer::Message(Message::Echo { number }) => tell(Some(number)),
                FromPeer::Gone(_) => tell(None),
                _ => true,
            }
        };

        let join = Message::Join { migration: migration.to_owned() };
        let session = Session::open(destination, Some(&join), LIMIT, hear).with_context(what)?;
        let mut channel = Channel { peer: session.peer, closer: session.closer };

        let why = match answer.recv_timeout(LIMIT) {
            Ok(FromPeer::Message(Message::Joined)) => return Ok(channel),
            Ok(FromPeer::Gone(why)) => anyhow!(why.unwrap_or_else(|| "it was closed".into())),
            Ok(other) => anyhow!("the destination answers {}", variant(&other)),
            Err(e) => e.into(),
        };

        channel.closer.close();
        Err(why).with_context(what)
    }

    /// Bytes that went out.
    pub fn bytes(&self) -> u64 {
        self.peer.bytes()
    }

    /// Starts a thread that packs and sends what it is given.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn carry(
        &self,
        compress: CompressOption,
        pace: Pace,
        failed: impl Fn(anyhow::Error) + Send + 'static,
    ) -> Result<ChannelSender> {
        let (queue, pieces) = sync_channel::<ChannelPiece>(2);
        let wire = Arc::new(AtomicU64::new(0));
        let sum = wire.clone();
        let mut packer = PagePacker::new(self.peer.clone(), compress, pace);
        std::thread::Builder::new().name("channel".into()).spawn(move || {
            let work = || {
                for piece in pieces {
                    let bytes = match piece {
                        ChannelPiece::Pages(vpid, vaddr, bytes) => {
                            packer.pages(vpid, vaddr, &bytes)?
                        }
                        ChannelPiece::Echo(number) => {
                            packer.peer.send(&Message::Echo { number })?;
                            0
                        }
                    };
                    sum.fetch_add(bytes, Ordering::Relaxed);
                }
                Ok(())
            };

            if let Err(e) = caught(work) {
                failed(e);
            }
        })?;

        Ok(ChannelSender { queue, wire, used: false })
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.closer.close();
    }
}

enum ChannelPiece {
    Pages(i32, u64, Vec<u8>),
    Echo(u64),
}

/// The way to a channel's thread.
pub struct ChannelSender {
    queue: SyncSender<ChannelPiece>,
    wire: Arc<AtomicU64>,
    /// Something went that way since the last echo.
    pub used: bool,
}

impl ChannelSender {
    /// Hands pages over; waits while the channel has enough to do.
    ///
    /// # Errors
    /// When it has failed.
    pub fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        self.used = true;
        let piece = ChannelPiece::Pages(vpid, vaddr, bytes.to_vec());
        self.queue.send(piece).map_err(|_| anyhow!("a further link broke"))
    }

    /// Asks for an echo.
    ///
    /// # Errors
    /// When it has failed.
    pub fn echo(&mut self, number: u64) -> Result<()> {
        self.used = false;
        self.queue.send(ChannelPiece::Echo(number)).map_err(|_| anyhow!("a further link broke"))
    }

    /// Bytes of memory that went on this link.
    pub fn wire(&self) -> u64 {
        self.wire.load(Ordering::Relaxed)
    }
}
