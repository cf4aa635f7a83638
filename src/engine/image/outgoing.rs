//! What an image is made of, out of the archive in which an engine saves it.

use std::collections::BTreeSet;
use std::io::Read;

use anyhow::{Context, Result, bail};

use super::bare;
use crate::engine::papers::EngineImage;
use crate::transport::frame::MAX_FILE_PIECE;

/// A step of an image on its way.
pub(crate) enum OutgoingPart<'a> {
    /// A part begins: hexadecimal digits of its digest, and its length.
    Begins(&'a str, u64),
    /// The next bytes of it.
    Bytes(&'a [u8]),
}

/// Reads a saved image, and hands on its configuration and all layers but so many of the first; returns how
/// many bytes these have.
///
/// # Errors
/// When it cannot be read, or lacks one; whatever `tell` says.
pub(crate) fn send(
    saved: impl Read,
    image: &EngineImage,
    there: usize,
    tell: &mut dyn FnMut(OutgoingPart) -> Result<()>,
) -> Result<u64> {
    let lacking = image.layers.iter().skip(there);
    let mut wanted: BTreeSet<&str> = lacking.map(|layer| bare(layer)).collect();
    wanted.insert(bare(&image.id));

    let mut sum = 0;
    let mut buffer = vec![0; MAX_FILE_PIECE];
    let mut archive = tar::Archive::new(saved);
    for entry in archive.entries()? {
        let mut entry = entry.context("reading the saved image")?;
        let path = entry.path()?.into_owned();
        let digest = digest(path.file_name().and_then(|name| name.to_str()).unwrap_or_default());
        if !entry.header().entry_type().is_file() || !wanted.remove(digest) {
            continue;
        }

        let bytes = entry.size();
        tell(OutgoingPart::Begins(digest, bytes))?;
        loop {
            match entry.read(&mut buffer).context("reading the saved image")? {
                0 => break,
                n => tell(OutgoingPart::Bytes(&buffer[..n]))?,
            }
        }
        sum += bytes;
    }

    if let Some(lacking) = wanted.first() {
        bail!("the engine has saved the image without {lacking}");
    }

    Ok(sum)
}

/// The digest in a file's name: docker has `blobs/sha256/DIGEST`, podman `DIGEST.json` and `DIGEST.tar`.
fn digest(name: &str) -> &str {
    name.strip_suffix(".tar").or(name.strip_suffix(".json")).unwrap_or(name)
}
