//! The source's thread that carries the image that an engine's container was made of.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::image_files::{IMAGE, PeerFile};
use crate::engine::Engine;
use crate::engine::handover;
use crate::engine::image::outgoing::{self, OutgoingPart};
use crate::engine::papers::EngineImage;
use crate::migration::protocol::Message;
use crate::migration::protocol::session::PeerWriter;
use crate::sys::panics::caught;
use crate::transport::pace::Pace;

/// The longest time between two words about progress, while anything goes.
const TELL_AFTER: Duration = Duration::from_millis(250);

/// What it tells the hand-over.
#[derive(Debug)]
pub enum ImageEvent {
    /// Bytes sent so far.
    Progress(u64),
    /// Bytes of all that has gone.
    Done(u64),
    /// The engine does not give it, or the link broke.
    Failed(String),
}

/// Sends an image of an engine's, of which so many layers are there.
///
/// # Errors
/// When there can be no thread.
pub fn start(
    engine: Engine,
    image: &EngineImage,
    there: usize,
    (peer, pace): (&PeerWriter, &Pace),
    tell: impl Fn(ImageEvent) + Send + 'static,
) -> Result<()> {
    let (image, peer, pace) = (image.clone(), peer.clone(), pace.clone());
    std::thread::Builder::new().name("image".into()).spawn(move || {
        match caught(|| run(engine, &image, there, (&peer, &pace), &tell)) {
            Ok(bytes) => tell(ImageEvent::Done(bytes)),
            Err(e) => tell(ImageEvent::Failed(format!("{e:#}"))),
        }
    })?;
    Ok(())
}

fn run(
    engine: Engine,
    image: &EngineImage,
    there: usize,
    (peer, pace): (&PeerWriter, &Pace),
    tell: &dyn Fn(ImageEvent),
) -> Result<u64> {
    let engine = handover::of(engine).ok_or_else(|| anyhow!("an unknown engine"))?;
    let saved = engine.images().save(&image.id)?;
    let mut file = PeerFile { peer, name: IMAGE.into(), at: 0, pace };
    let (mut sent, mut told) = (0, Instant::now());

    let bytes = outgoing::send(saved, image, there, &mut |part| {
        match part {
            OutgoingPart::Begins(digest, bytes) => {
                file.at = 0;
                peer.send(&Message::ImagePart { digest: digest.to_owned(), bytes })?;
            }
            OutgoingPart::Bytes(bytes) => {
                std::io::Write::write_all(&mut file, bytes)?;
                sent += bytes.len() as u64;
            }
        }
        if told.elapsed() > TELL_AFTER {
            told = Instant::now();
            tell(ImageEvent::Progress(sent));
        }
        Ok(())
    })?;

    peer.send(&Message::ImageSent)?;
    Ok(bytes)
}
