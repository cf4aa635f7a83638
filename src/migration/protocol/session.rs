//! The source's or destination's end of the link: a writer that several threads share, and a
//! thread that reads. Every link begins here, each with a greeting.

use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail};

use super::{Hello, Message, PROTOCOL, variant};
use crate::migration::protocol;
use crate::problem::{Advice, advice};
use crate::transport::codec::Codec;
use crate::transport::connect::{Closer, Destination, Link};
use crate::transport::frame::PageRun;
use crate::transport::frame::{self, Frame, RunKind, Same};

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
    pub fn run(&self, what: RunKind, run: PageRun) -> Result<()> {
        Ok(frame::write_run(&mut *self.lock(), what, run)?)
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

/// A link to another host, whose Ferry has greeted, or is about to.
pub struct Session {
    /// Speaks.
    pub peer: PeerWriter,
    /// Ends it.
    pub closer: Closer,
}

impl Session {
    /// Begins a link: greets, and says what it is for. Its greeting demanded, `tell` hears everything that
    /// comes then, and says whether to go on.
    ///
    /// # Errors
    /// When the host cannot be reached, does not greet within `limit`, or has another version.
    pub fn open(
        to: &Destination,
        purpose: Option<&Message>,
        limit: Duration,
        mut tell: impl FnMut(FromPeer) -> bool + Send + 'static,
    ) -> Result<Session> {
        let (first, greeted) = channel();
        let mut first = Some(first);
        let mut session = Session::begin(to, move |heard| match first.take() {
            Some(first) => first.send(heard).is_ok(),
            None => tell(heard),
        })?;

        let opened = (|| {
            // Where that cannot be said, what comes tells why.
            let said = purpose.map_or(Ok(()), |purpose| session.peer.send(purpose));
            match greeted.recv_timeout(limit) {
                Ok(heard) => greeting(heard)?,
                Err(_) => bail!("{to} has not answered within {} s", limit.as_secs()),
            };
            said
        })();

        match opened {
            Ok(()) => Ok(session),
            Err(e) if e.is::<Closed>() => Err(session.explained(to)),
            Err(e) => {
                session.closer.close();
                Err(e)
            }
        }
    }

    /// The same, for whoever waits for the [`greeting`] beside other things: `tell` hears that, too.
    ///
    /// # Errors
    /// When the host cannot be reached.
    pub fn begin(
        to: &Destination,
        tell: impl FnMut(FromPeer) -> bool + Send + 'static,
    ) -> Result<Session> {
        let (peer, reader, closer) = split(to.connect()?);
        listen(reader, tell)?;
        let session = Session { peer, closer };
        match session.peer.send(&hello()) {
            Ok(()) => Ok(session),
            Err(e) => Err(Advice::over(session.explained(to), e)),
        }
    }

    /// Returns why it ended without a word.
    fn explained(self, to: &Destination) -> anyhow::Error {
        let Session { peer, mut closer } = self;
        drop(peer);
        to.explain(&mut closer)
    }
}

/// A link that ended before anything had come.
#[derive(Debug)]
struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it was closed")
    }
}

impl std::error::Error for Closed {}

/// Takes the first that comes over a link, which has to be a greeting.
///
/// # Errors
/// Anything else, or another version.
pub fn greeting(first: FromPeer) -> Result<Hello> {
    match first {
        FromPeer::Message(Message::Hello(theirs)) => {
            check_hello(&theirs)?;
            Ok(theirs)
        }
        FromPeer::Gone(Some(why)) => bail!(why),
        FromPeer::Gone(None) => bail!(Closed),
        FromPeer::Message(other) => bail!("the other host begins with {}", variant(&other)),
        FromPeer::Frame(_) => bail!("the other host does not greet"),
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

/// Returns what we say first.
pub(in crate::migration) fn hello() -> Message {
    Message::Hello(Hello {
        protocol: PROTOCOL,
        ferry: env!("CARGO_PKG_VERSION").into(),
        host: crate::sys::host::identity(),
    })
}

/// Tells whether the other side speaks our language.
fn check_hello(theirs: &Hello) -> Result<()> {
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
