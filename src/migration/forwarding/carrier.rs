//! Frames on the link between the two hosts, and the few words between them.
//!
//! ```text
//! home                                   away
//!  ── Hello ───────────────────────────▶
//!  ◀─────────────────────────── Hello ──
//!  ── Carry ───────────────────────────▶  hands the link to the process that holds the devices
//!  ◀───────────────────────── Carried ──
//!  ◀═══════════ packets ═══════════════▶
//!  ◀──────────────────── Ask, Answer ───▶  (questions only from there)
//!  ◀─────────────────────────── Alive ──▶  every second: a sign of life
//! ```

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::migration::protocol::Message;
use crate::migration::protocol::forwarding::ForwardMessage;
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::network::Frame;
use crate::transport::connect::{Closer, Destination};

/// How often each tells the other that it lives.
pub const PULSE: Duration = Duration::from_secs(1);
/// A link without a sign of life for so long is dead.
pub const DEAD: Duration = Duration::from_secs(10);
/// Where the address has moved, nothing is forwarded any more when there was no link for so long: TCP does not
/// send again for longer what is not confirmed. tcp(7), `tcp_retries2`
pub const ORPHANED: Duration = Duration::from_secs(1000);
/// How long it may take until the other side has the link.
const ANSWER: Duration = Duration::from_secs(30);
/// Most links, and longest of their names: as in a network image.
const MAX_LINKS: usize = crate::network::image::MAX_LINKS;

/// A link that carries.
pub struct Carrier {
    /// To send frames.
    pub peer: PeerWriter,
    /// To cut it.
    pub closer: Closer,
}

/// The other host was reached, and has no such container.
#[derive(Debug)]
pub struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// Connects to the host where the container is, or will be. From then on `tell` hears everything.
///
/// # Errors
/// When it cannot be reached, or does not know of this forwarding.
pub fn connect(
    destination: &Destination,
    carry: Option<ForwardMessage>,
    mut tell: impl FnMut(FromPeer) -> bool + Send + 'static,
) -> Result<Carrier> {
    let (peer, reader, mut closer) = session::split(destination.connect()?);
    let (first, heard) = channel();
    let mut greeting = true;
    session::listen(reader, move |h| {
        if !greeting {
            return tell(h);
        }
        let last = matches!(&h, FromPeer::Message(Message::Forward(_)));
        greeting = !last;
        first.send(h).is_ok()
    })?;
    let answered = (|| {
        peer.send(&session::hello())?;
        let until = Instant::now() + ANSWER;
        loop {
            match heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(FromPeer::Message(Message::Hello(theirs))) => {
                    session::check_hello(&theirs)?;
                    match &carry {
                        None => return Ok(()),
                        Some(word) => peer.send(&Message::Forward(Box::new(word.clone())))?,
                    }
                }
                Ok(FromPeer::Message(Message::Forward(word)))
                    if matches!(*word, ForwardMessage::Carried) =>
                {
                    return Ok(());
                }
                Ok(FromPeer::Message(Message::Failed { why, .. })) => bail!(Refused(why)),
                Ok(FromPeer::Gone(why)) => bail!("{}", why.unwrap_or_else(|| GONE.into())),
                Ok(_) => {}
                Err(_) => bail!("{destination} does not answer"),
            }
        }
    })();
    match answered {
        Ok(()) => Ok(Carrier { peer, closer }),
        Err(e) if e.to_string() == GONE => {
            drop(peer);
            Err(destination.explain(&mut closer))
        }
        Err(e) => {
            closer.close();
            Err(e)
        }
    }
}

const GONE: &str = "it was closed";

/// Sends frames, together; how many bytes they had.
///
/// # Errors
/// When the link is gone.
pub fn send(peer: &PeerWriter, frames: &[Frame]) -> Result<u64> {
    let mut bytes = 0;
    for frame in frames {
        peer.packet_later(&crate::network::frames::encode(frame))?;
        bytes += frame.bytes.len() as u64;
    }
    peer.flush()?;
    Ok(bytes)
}

/// Refuses what no honest home sends.
///
/// # Errors
/// Says what is wrong.
pub fn check_links(links: &[String]) -> Result<()> {
    if links.is_empty() || links.len() > MAX_LINKS || links.iter().any(|l| l.len() > 15) {
        bail!("these are no names of links");
    }
    Ok(())
}
