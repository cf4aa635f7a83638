//! The source's or destination's end of the link: a writer that several threads share, and a
//! thread that reads.

use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Result;

use super::{Hello, Message, PROTOCOL};
use crate::migration::protocol;
use crate::problem::advice;
use crate::transport::codec::Codec;
use crate::transport::connect::{Closer, Link};
use crate::transport::frame::{self, Frame, Run, Same};

/// Bytes gathered before they are written.
const BUFFER: usize = 256 << 10;

/// Writes frames; cloned for every thread that has something to say.
#[derive(Clone)]
pub struct PeerWriter {
    out: Arc<Mutex<BufWriter<Box<dyn Write + Send>>>>,
    bytes: Arc<AtomicU64>,
}

impl PeerWriter {
    /// Takes the link's writing end.
    pub fn new(writer: Box<dyn Write + Send>) -> PeerWriter {
        let bytes = Arc::new(AtomicU64::new(0));
        let counted = Counted { inner: writer, bytes: bytes.clone() };
        let out = BufWriter::with_capacity(BUFFER, Box::new(counted) as Box<dyn Write + Send>);
        PeerWriter { out: Arc::new(Mutex::new(out)), bytes }
    }

    fn lock(&self) -> MutexGuard<'_, BufWriter<Box<dyn Write + Send>>> {
        // A thread that panicked in a write has at worst cut a frame, which the peer finds out.
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a control message at once.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn send(&self, message: &Message) -> Result<()> {
        protocol::send(&mut *self.lock(), message)
    }

    /// A piece of a file.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn file(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(frame::write_file(&mut *self.lock(), name, offset, bytes)?)
    }

    /// A network frame, at once.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn packet(&self, bytes: &[u8]) -> Result<()> {
        self.packet_later(bytes)?;
        self.flush()
    }

    /// A network frame, with the next that is written.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn packet_later(&self, bytes: &[u8]) -> Result<()> {
        Ok(frame::write_packet(&mut *self.lock(), bytes)?)
    }

    /// Pages of a task, packed if a codec was used.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn pages(
        &self,
        vpid: i32,
        vaddr: u64,
        bytes: &[u8],
        packed: Option<(Codec, &[u8])>,
    ) -> Result<()> {
        Ok(frame::write_pages(&mut *self.lock(), vpid, vaddr, bytes, packed)?)
    }

    /// Pages without contents.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn run(&self, what: Run, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        Ok(frame::write_run(&mut *self.lock(), what, vpid, vaddr, pages)?)
    }

    /// Pages that are like others.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn same(&self, same: Same) -> Result<()> {
        Ok(frame::write_same(&mut *self.lock(), same)?)
    }

    /// Writes what is still buffered.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn flush(&self) -> Result<()> {
        Ok(self.lock().flush()?)
    }

    /// Bytes that went out.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

struct Counted {
    inner: Box<dyn Write + Send>,
    bytes: Arc<AtomicU64>,
}

impl Write for Counted {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.bytes.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// What a listening thread passes on.
#[derive(Debug)]
pub enum FromPeer {
    /// A control message.
    Message(Message),
    /// Any other frame.
    Frame(Frame),
    /// The link has ended: in words, unless it ended between two frames.
    Gone(Option<String>),
}

/// Starts to listen; `tell` says whether to go on.
///
/// # Errors
/// When there can be no thread.
pub fn listen(
    mut reader: Box<dyn std::io::Read + Send>,
    mut tell: impl FnMut(FromPeer) -> bool + Send + 'static,
) -> Result<JoinHandle<()>> {
    Ok(std::thread::Builder::new().name("listen".into()).spawn(move || {
        loop {
            let heard = match frame::read(&mut reader) {
                Ok(None) => FromPeer::Gone(None),
                Ok(Some(Frame::Control(json))) => match protocol::parse(&json) {
                    Ok(message) => FromPeer::Message(message),
                    Err(e) => FromPeer::Gone(Some(format!("{e:#}"))),
                },
                Ok(Some(other)) => FromPeer::Frame(other),
                Err(e) => FromPeer::Gone(Some(format!("{e:#}"))),
            };
            let last = matches!(heard, FromPeer::Gone(_));
            if !tell(heard) || last {
                return;
            }
        }
    })?)
}

/// SIGINT, SIGTERM and SIGHUP become inputs: what they mean depends on the phase.
///
/// # Errors
/// When they cannot be caught.
pub fn catch_signals(tell: impl Fn(i32) -> bool + Send + 'static) -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in &mut signals {
            if !tell(signal) {
                return;
            }
        }
    })?;
    Ok(())
}

/// For people.
pub fn signal_name(signal: i32) -> &'static str {
    nix::sys::signal::Signal::try_from(signal).map_or("a signal", |s| s.as_str())
}

/// What we say first.
pub fn hello() -> Message {
    Message::Hello(Hello {
        protocol: PROTOCOL,
        ferry: env!("CARGO_PKG_VERSION").into(),
        host: crate::sys::host::identity(),
    })
}

/// Whether the other side speaks our language.
///
/// # Errors
/// Says which version it speaks.
pub fn check_hello(theirs: &Hello) -> Result<()> {
    if theirs.protocol != PROTOCOL {
        return Err(advice(
            format!(
                "the other host's Ferry {} speaks protocol {}, this one ({}) {PROTOCOL}",
                theirs.ferry,
                theirs.protocol,
                env!("CARGO_PKG_VERSION"),
            ),
            "install the same version on both hosts",
        ));
    }
    Ok(())
}

/// Splits a link into what is spoken with and what is listened to.
pub fn split(link: Link) -> (PeerWriter, Box<dyn std::io::Read + Send>, Closer) {
    (PeerWriter::new(link.writer), link.reader, link.closer)
}
