//! Files on their way: images, packed tmpfs mounts, logs.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::migration::protocol::session::PeerWriter;
use crate::migration::protocol::{MAX_FILES, MAX_IMAGES};
use crate::transport::frame;
use crate::transport::pace::Pace;

/// The name under which copied trees come, as one stream.
pub const STREAM: &str = "trees";

/// The name of an engine's log of the container.
pub const LOG: &str = "engine-log";
/// The name of a part of an engine's image.
pub const IMAGE: &str = "engine-image";
/// The name of what is in `/dev/shm`, packed, where that is a mount that the engine makes.
pub const SHM: &str = "engine-shm";
/// Where the container has that.
pub const SHM_PLACE: &str = "/dev/shm";

/// A file on the other side, written from its beginning.
pub struct PeerFile<'a> {
    /// The link.
    pub peer: &'a PeerWriter,
    /// The file's name over there.
    pub name: String,
    /// Bytes written so far.
    pub at: u64,
    /// How fast.
    pub pace: &'a Pace,
}

impl Write for PeerFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let most = &bytes[..bytes.len().min(frame::MAX_FILE_PIECE)];
        self.peer.file(&self.name, self.at, most).map_err(std::io::Error::other)?;
        self.at += most.len() as u64;
        self.pace.pay(most.len());
        Ok(most.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends a file from an offset to its end; returns the end.
///
/// # Errors
/// When it cannot be read, or the link is gone.
pub fn send_file(
    peer: &PeerWriter,
    name: &str,
    path: &std::path::Path,
    from: u64,
    buffer: &mut [u8],
) -> Result<u64> {
    use std::io::Seek;
    let what = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(what)?;
    let mut at = file.seek(std::io::SeekFrom::Start(from)).with_context(what)?;
    loop {
        let n = file.read(buffer).with_context(what)?;
        // An empty file is sent too: CRIU looks for it.
        if n > 0 || at == 0 {
            peer.file(name, at, &buffer[..n])?;
        }
        at += n as u64;
        // A regular file gives all that fits.
        if n < buffer.len() {
            return Ok(at);
        }
    }
}

/// Image files open at a time.
const MAX_OPEN: usize = 128;

/// Image files on the destination, as they come.
#[derive(Debug)]
pub struct ImageFiles {
    directory: PathBuf,
    open: HashMap<String, File>,
    names: HashSet<String>,
    bytes: u64,
}

impl ImageFiles {
    /// None yet; they go into this directory.
    pub fn new(directory: PathBuf) -> ImageFiles {
        ImageFiles { directory, open: HashMap::new(), names: HashSet::new(), bytes: 0 }
    }

    /// Takes a piece in.
    ///
    /// # Errors
    /// When the name is none of an image file, there are more or longer ones than any checkpoint
    /// has, or it cannot be written.
    pub fn write(&mut self, name: &str, at: u64, bytes: &[u8]) -> Result<()> {
        let plain = name.len() < 128
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !plain {
            bail!("{name:?} is no image file's name");
        }

        self.bytes += bytes.len() as u64;
        if self.names.len() >= MAX_FILES || self.bytes > MAX_IMAGES {
            bail!("more image files than any checkpoint has");
        }
        if !self.open.contains_key(name) {
            if self.open.len() >= MAX_OPEN {
                self.open.clear();
            }
            let open = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(self.names.insert(name.to_owned()))
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(self.directory.join(name));
            self.open.insert(name.to_owned(), open.with_context(|| format!("image {name}"))?);
        }

        Ok(self.open[name].write_all_at(bytes, at)?)
    }

    /// All have come.
    pub fn close(&mut self) {
        self.open.clear();
    }
}
