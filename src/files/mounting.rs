//! An overlay that comes to its place on the destination, in the place of one that the same container
//! may have left there; and how all of that is undone.
//!
//! Nobody may write to an upper layer beneath a mounted overlay, so it is mounted when the last of
//! the upper layer has come, in the freeze. Until then a tmpfs stands in for it: the runtime looks
//! whether there is a root file system when it is started, and CRIU comes to the real one.
//!
//! ```text
//! clear    what stood there is unmounted, the mark is made
//!          (the upper layer and the work directory are renamed to their places)
//! stand_in the overlay is tried out, a tmpfs takes its place
//! mount    the overlay
//! ```

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use super::overlay::{self, MountedAt, Overlay};

/// Bytes of what stands in: there are some empty directories in it.
const STAND_IN: &str = "mode=0755,size=1m";

/// A mount to be, and what it takes the place of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounting {
    place: PathBuf,
    overlay: Overlay,
    /// What is mounted there, and has to be again if this is undone.
    before: Option<Overlay>,
    /// A file that is there as long as what is mounted at the place may be ours.
    mark: PathBuf,
}

impl Mounting {
    /// Plans one. Nothing is done.
    pub fn plan(
        migration: &str,
        place: &Path,
        overlay: Overlay,
        before: Option<Overlay>,
    ) -> Mounting {
        let mark = place.with_file_name(format!(".ferry-{migration}-mount"));
        Mounting { place: place.to_owned(), overlay, before, mark }
    }

    /// The mount point.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Makes room for it.
    ///
    /// # Errors
    /// When somebody uses what is mounted there.
    pub fn clear(&self) -> Result<()> {
        if self.before.is_some() {
            overlay::unmount(&self.place)?;
        }
        File::create_new(&self.mark)
            .with_context(|| format!("cannot write {}", self.mark.display()))?;
        Ok(())
    }

    /// Makes sure that it can be mounted, and puts something in its place that is as good until then.
    ///
    /// # Errors
    /// When it cannot.
    pub fn stand_in(&self) -> Result<()> {
        self.overlay.try_mount(&self.place)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("ferry"), &self.place, Some("tmpfs"), flags, Some(STAND_IN))
            .with_context(|| format!("cannot mount a tmpfs at {}", self.place.display()))
    }

    /// Mounts it.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn mount(&self) -> Result<()> {
        // The runtime holds on to it elsewhere.
        umount2(&self.place, MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", self.place.display()))?;
        self.overlay.mount(&self.place)
    }

    /// Takes down what may be ours. Nobody uses it any more, but the kernel may not have noticed.
    ///
    /// # Errors
    /// When it stays.
    pub fn undo(&self) -> Result<()> {
        if fs::symlink_metadata(&self.mark).is_err() {
            return Ok(());
        }
        while self.mounted()? != MountedAt::Nothing {
            umount2(&self.place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .with_context(|| format!("cannot unmount {}", self.place.display()))?;
        }
        Ok(())
    }

    /// When the layers are back where they were: mounts what was there.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn put_back(&self) -> Result<()> {
        if let Some(before) = &self.before
            && self.mounted()? == MountedAt::Nothing
        {
            before.mount(&self.place)?;
        }
        self.keep()
    }

    /// It stays.
    ///
    /// # Errors
    /// When the mark does.
    pub fn keep(&self) -> Result<()> {
        super::walk::remove(&self.mark)
    }

    fn mounted(&self) -> Result<MountedAt> {
        match fs::canonicalize(&self.place) {
            Ok(place) => Ok(overlay::at(&overlay::mounts()?, &place)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(MountedAt::Nothing),
            Err(e) => Err(e).with_context(|| self.place.display().to_string()),
        }
    }
}

/// Puts a tree in the place of the upper layer of an overlay that somebody else has mounted, and that
/// nobody uses yet. It is mounted anew for that: what the kernel knows of an upper layer may not be
/// changed beneath it. `from` is in the same file system, and empty afterwards.
///
/// # Errors
/// When something else is mounted there, or somebody uses it.
pub fn refill(place: &Path, from: &Path) -> Result<()> {
    let real = fs::canonicalize(place).with_context(|| place.display().to_string())?;
    let MountedAt::Overlay(mut overlay) = overlay::at(&overlay::mounts()?, &real) else {
        bail!("{} is no overlay", real.display());
    };
    let upper = overlay.upper.as_ref().map(|upper| upper.path.clone());
    let upper = upper.with_context(|| format!("nobody can write to {}", real.display()))?;

    // It has one.
    overlay.options.retain(|option| !option.starts_with("uuid="));

    // The runtime holds on to it elsewhere.
    umount2(&real, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        .with_context(|| format!("cannot unmount {}", real.display()))?;
    let what = || format!("cannot fill {}", upper.display());
    for entry in fs::read_dir(&upper).with_context(what)? {
        super::walk::remove(&entry?.path())?;
    }

    for entry in fs::read_dir(from).with_context(what)? {
        let entry = entry?;
        fs::rename(entry.path(), upper.join(entry.file_name())).with_context(what)?;
    }
    let meta = fs::metadata(from).with_context(what)?;
    std::os::unix::fs::chown(&upper, Some(meta.uid()), Some(meta.gid())).with_context(what)?;
    fs::set_permissions(&upper, meta.permissions()).with_context(what)?;

    overlay.mount(&real)
}
