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
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use crate::migration::protocol::forwarding::ForwardMessage;
use crate::migration::protocol::session::{FromPeer, PeerWriter, Session};
use crate::migration::protocol::{Message, variant};
use crate::network::EthernetFrame;
use crate::transport::connect::Destination;

/// How often each tells the other that it lives.
pub const PULSE: Duration = Duration::from_secs(1);
/// A link without a sign of life for so long is dead.
pub const DEAD: Duration = Duration::from_secs(10);
/// Where the address has moved, nothing is forwarded any more when there was no link for so long: TCP does not
/// send again for longer what is not confirmed. tcp(7), `tcp_retries2`
pub const ORPHANED: Duration = Duration::from_secs(1000);
/// Time that it may take until the other side has the link.
const ANSWER: Duration = Duration::from_secs(30);
/// Most links, and longest of their names: as in a network image.
const MAX_LINKS: usize = crate::network::image::MAX_LINKS;

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
) -> Result<Session> {
    let (first, heard) = channel();
    let mut first = carry.is_some().then_some(first);
    let hear = move |h| match &first {
        Some(answer) => {
            let told = answer.send(h).is_ok();
            first = None;
            told
        }
        None => tell(h),
    };

    let purpose = carry.map(|word| Message::Forward(Box::new(word)));
    let mut session = Session::open(destination, purpose.as_ref(), ANSWER, hear)?;
    if purpose.is_none() {
        return Ok(session);
    }

    let why = match heard.recv_timeout(ANSWER) {
        Ok(FromPeer::Message(Message::Forward(word)))
            if matches!(*word, ForwardMessage::Carried) =>
        {
            return Ok(session);
        }
        Ok(FromPeer::Message(Message::Failed { why, .. })) => anyhow!(Refused(why)),
        Ok(FromPeer::Gone(Some(why))) => anyhow!(why),
        Ok(FromPeer::Gone(None)) => anyhow!("it was closed"),
        Ok(FromPeer::Message(other)) => anyhow!("{destination} answers {}", variant(&other)),
        Ok(FromPeer::Frame(_)) => anyhow!("{destination} sends before it has the link"),
        Err(_) => anyhow!("{destination} does not answer"),
    };

    session.closer.close();
    Err(why)
}

/// Sends frames, together; how many bytes they had.
///
/// # Errors
/// When the link is gone.
pub fn send(peer: &PeerWriter, frames: &[EthernetFrame]) -> Result<u64> {
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
