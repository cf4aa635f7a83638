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
use crate::migration::protocol::forwarding::Word;
use crate::migration::protocol::talk::{self, Heard, Speaker};
use crate::network::Frame;
use crate::transport::connect::{Closer, Destination};

/// How often each tells the other that it lives.
pub const PULSE: Duration = Duration::from_secs(1);
/// A link without a sign of life for so long is dead.
pub const DEAD: Duration = Duration::from_secs(10);
/// How long it may take until the other side has the link.
const ANSWER: Duration = Duration::from_secs(30);
/// Most links, and longest of their names: as in a network image.
const MAX_LINKS: usize = crate::network::image::MAX_LINKS;

/// A link that carries.
pub struct Carrier {
    /// To send frames.
    pub speaker: Speaker,
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
    carry: Option<Word>,
    mut tell: impl FnMut(Heard) -> bool + Send + 'static,
) -> Result<Carrier> {
    let (speaker, reader, mut closer) = talk::split(destination.connect()?);
    let (first, heard) = channel();
    let mut greeting = true;
    talk::listen(reader, move |h| {
        if !greeting {
            return tell(h);
        }
        let last = matches!(&h, Heard::Message(Message::Forward(_)));
        greeting = !last;
        first.send(h).is_ok()
    })?;
    let answered = (|| {
        speaker.say(&talk::hello())?;
        let until = Instant::now() + ANSWER;
        loop {
            match heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Heard::Message(Message::Hello(theirs))) => {
                    talk::check_hello(&theirs)?;
                    match &carry {
                        None => return Ok(()),
                        Some(word) => speaker.say(&Message::Forward(Box::new(word.clone())))?,
                    }
                }
                Ok(Heard::Message(Message::Forward(word))) if matches!(*word, Word::Carried) => {
                    return Ok(());
                }
                Ok(Heard::Message(Message::Failed { why, .. })) => bail!(Refused(why)),
                Ok(Heard::Gone(why)) => bail!("{}", why.unwrap_or_else(|| GONE.into())),
                Ok(_) => {}
                Err(_) => bail!("{destination} does not answer"),
            }
        }
    })();
    match answered {
        Ok(()) => Ok(Carrier { speaker, closer }),
        Err(e) if e.to_string() == GONE => {
            drop(speaker);
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
pub fn send(speaker: &Speaker, frames: &[Frame]) -> Result<u64> {
    let mut bytes = 0;
    for frame in frames {
        speaker.packet_later(&crate::network::frames::encode(frame))?;
        bytes += frame.bytes.len() as u64;
    }
    speaker.flush()?;
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
