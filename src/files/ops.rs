//! What is said about a tree that is copied while it changes: one stream of steps, each a u32 LE
//! length and a [`FileStep`] in postcard's format; the bytes of [`FileStep::Data`] follow it.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::tree::FileEntry;

/// Longest step: names, link targets and attributes are far below.
const MAX_STEP: usize = 1 << 20;
/// Bytes of a file that go in one piece, and that are compared as one.
pub const BLOCK: usize = 128 << 10;

/// What the file of a tree that is a single one is called in the copy, wherever it comes from.
pub(super) const SINGLE: &[u8] = b"file";

/// One step.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FileStep {
    /// What follows is about the tree of this number.
    Tree(u32),
    /// Takes away whatever is there, with all that is below.
    Remove(Vec<u8>),
    /// Makes it anew, in the place of whatever is there. Data of a regular file follow.
    Make(FileEntry),
    /// It is there and has changed. Data of a regular file follow; with `true` it has none before.
    Change(FileEntry, bool),
    /// So many bytes at an offset of the file just named.
    Data(u64, u32),
    /// A hole there: offset, length.
    Hole(u64, u64),
    /// A round is over; whether it was the last.
    Round(u32, bool),
    /// What has the first name gets the second, in the place of whatever is there.
    Rename(Vec<u8>, Vec<u8>),
}

/// Writes a step.
pub(super) fn write(out: &mut impl Write, step: &FileStep) -> Result<()> {
    let bytes = postcard::to_stdvec(step)?;
    if bytes.len() > MAX_STEP {
        bail!("too much to say about one file");
    }
    out.write_all(&(bytes.len() as u32).to_le_bytes())?;
    Ok(out.write_all(&bytes)?)
}

/// Reads a step; none at the end of the stream, which may come only between two.
pub(super) fn read(input: &mut impl Read) -> Result<Option<FileStep>> {
    let mut length = [0; 4];
    match input.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_STEP {
        bail!("a step of {length} bytes");
    }
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes).context("the stream was cut")?;
    Ok(Some(postcard::from_bytes(&bytes).context("a step that this version does not know")?))
}
