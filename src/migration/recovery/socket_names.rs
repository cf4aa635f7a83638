//! Names of unix sockets in file systems, which a freeze changes: noted before, so that whoever undoes the
//! migration knows of them. See [`crate::files::sockets`].

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::files::sockets::{self, Renamed, Spares};
use crate::migration::journal::Record;
use crate::sys::process;
use crate::tasks::losses::files::{self, OpenFile};
use crate::tasks::unix_names;

/// Notes the sockets whose names the destination will bind anew: before anything is done with them.
///
/// # Errors
/// When they cannot be found out.
pub fn note(record: &Record, pids: &[i32]) -> Result<()> {
    let Some(init) = record.init else { return Ok(()) };
    let spares = Spares::find(init.pid, pids, &record.migration)?;
    if spares.is_empty() {
        return Ok(());
    }
    Ok(fs::write(record.work.spare_sockets(), serde_json::to_vec(&spares)?)?)
}

/// Notes those whose files are not where they were bound to: before they get their first names back,
/// for the freeze.
///
/// # Errors
/// When they cannot be noted.
pub fn note_renamed(record: &Record, pids: &[i32]) -> Result<Vec<Renamed>> {
    let Some(init) = record.init else { return Ok(Vec::new()) };
    let own = files::all(pids).iter().filter_map(OpenFile::socket).collect();
    let found = unix_names::find(init.pid, &own).into_iter().filter(|one| !one.taken);
    let bytes = |name: PathBuf| name.into_os_string().into_vec();
    let found = found.map(|one| Renamed { bound: bytes(one.bound), current: bytes(one.current) });
    let found: Vec<Renamed> = found.collect();
    if !found.is_empty() {
        sockets::validate(&found)?;
        fs::write(record.work.renamed_sockets(), serde_json::to_vec(&found)?)?;
    }
    Ok(found)
}

/// Keeps the files of the sockets that were [noted](note). CRIU must have dumped.
///
/// # Errors
/// When one of them cannot be kept.
pub fn keep(record: &Record) -> Result<()> {
    noted::<Spares>(record, &record.work.spare_sockets())
        .map_or(Ok(()), |(spares, root)| spares.make(&root))
}

/// The container stays: all names lead to its sockets again.
///
/// # Errors
/// Says which does not; the others do.
pub(super) fn give_back(record: &Record) -> Result<()> {
    let spares = noted::<Spares>(record, &record.work.spare_sockets());
    let done = spares.map_or(Ok(()), |(spares, root)| spares.give_back(&root));
    let renamed = noted::<Vec<Renamed>>(record, &record.work.renamed_sockets());
    let renamed = renamed.map_or(Ok(()), |(all, root)| sockets::back_to_current_names(&root, &all));
    done.and(renamed)
}

/// The container has gone.
///
/// # Errors
/// Says which spare name stays.
pub(super) fn remove(record: &Record) -> Result<()> {
    noted::<Spares>(record, &record.work.spare_sockets())
        .map_or(Ok(()), |(spares, root)| spares.remove(&root))
}

/// Returns what was noted, and the root of the container that it is about.
fn noted<T: serde::de::DeserializeOwned>(record: &Record, file: &Path) -> Option<(T, PathBuf)> {
    let init = record.init.filter(|_| record.init_lives())?;
    let text = fs::read(file).ok()?;
    Some((serde_json::from_slice(&text).ok()?, process::root_of(init.pid)))
}
