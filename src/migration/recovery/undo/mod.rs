//! Undoing and finishing a migration by its journal alone: what the guard does when Ferry was
//! killed, what `ferry resolve` does after a crash, and what the hand-over itself does at its end.
//! Each is a table of steps in their order; every step is tried, and may have been done before.
//!
//! ```text
//!              before the commit            after it
//! source       roll_back: it runs on        release: it is gone from here
//! destination  discard: nothing is left     finish: it runs here
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

pub use self::discard::discard_destination;
pub use self::finish::{finish_destination, open_destination, settle_files};
pub use self::release::release_source;
pub use self::roll_back::{Hands, Rival, roll_back_source};
use super::decide::Tasks;
use crate::engine::property;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::workdir::WorkPath;
use crate::migration::journal::{Journal, Record};
use crate::network::{self, HostSide, fence};
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::Runtime;
use crate::report::failures::Failures;
use crate::sys::netns::NetNs;
use crate::sys::process::ProcessId;
use crate::tasks::waits;

mod discard;
mod finish;
mod release;
mod roll_back;

/// Time that a task may take to come to a call that it begins anew.
const WAIT_TIMEOUT: Duration = Duration::from_millis(300);

/// The runtime of a record.
pub fn runtime(record: &Record) -> Runtime {
    Runtime::new(record.runtime.clone(), record.root.clone(), record.systemd_cgroup)
}

/// Why a container was not taken back: the last that the disk is known to have is that the other host
/// owns it. If this host went down, that would be what counts.
#[derive(Debug)]
pub struct StaysFrozen;

impl std::fmt::Display for StaysFrozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the disk has that it was handed over, and does not take that it was not")
    }
}

/// What has begun to wait anew is to wait for no longer than it should.
fn await_calls(cgroup: &Cgroup) {
    let pids = cgroup.processes();
    if let Some(problem) = pids.ok().and_then(|pids| waits::go_on(&pids, WAIT_TIMEOUT)) {
        tracing::warn!("{problem}");
    }
}

/// Returns where the migration's away-mark lies, and its journal below.
pub fn state_dir(journal: &Journal) -> &Path {
    journal.path().parent().and_then(Path::parent).unwrap_or(Path::new("/"))
}

/// Marks the container as gone. Done before the freeze: an engine that starts it again when it sees
/// it end, or after a reboot in the middle, must find the mark whatever becomes of us.
///
/// # Errors
/// When the mark cannot be written.
pub fn leave_mark(journal: &Journal) -> Result<()> {
    let record = &journal.record;
    let mark = AwayMark {
        id: record.container.clone(),
        runtime_root: runtime(record).root().to_owned(),
        destination: record.peer.clone(),
        migrated_at: crate::report::log::rfc3339(std::time::SystemTime::now()),
        migration_id: record.migration.clone(),
        named: record.engine.as_ref().map(|made| (made.engine, made.name.clone())),
    };
    mark.write(state_dir(journal))
}

/// Tells whether the container may be started here again: an engine that was not told that it has left has its
/// restart policy still, and would have a second copy at once, or when it is started itself.
fn mark_may_go(is_engines: bool, told: bool) -> bool {
    told || !is_engines
}

/// Takes this migration's mark away, and no other's.
fn lift_mark(journal: &Journal) -> Result<()> {
    let record = &journal.record;
    let (root, id) = (runtime(record).root().to_owned(), record.container.as_ref());
    let mark = AwayMark::find(state_dir(journal), &root, id)?;
    if mark.is_some_and(|m| m.migration_id == record.migration) {
        AwayMark::remove(state_dir(journal), &root, id)?;
    }
    Ok(())
}

fn remove_network(namespace: &NetNs, path: &Path, record: &Record) -> Result<()> {
    if record.engine.is_some() {
        // It takes it down with the container.
        return Ok(());
    }
    if let Some(engine) = property::of_namespace(path) {
        // Refused beforehand, but a journal may say so. Its fence keeps it silent.
        tracing::warn!("the network namespace {} is {engine}'s, and stays", path.display());
        return Ok(());
    }

    let mut failures = Failures::default();
    for problem in network::dismantle(namespace, Some(path), None).err().unwrap_or_default() {
        failures.note(&path.display().to_string(), Err::<(), _>(problem));
    }
    failures.into_result()
}

/// The namespace of this migration, if what bears its name is still that.
fn own_network(record: &Record) -> Option<(NetNs, PathBuf)> {
    // After a reboot another one may have its numbers.
    if !record.same_boot() {
        return None;
    }
    let noted = || fs::read_to_string(record.work.network_place()).ok().map(PathBuf::from);
    let path = record.network_path.clone().or_else(noted)?;
    let namespace = NetNs::open(&path).ok()?;
    let noted = fs::read_to_string(record.work.network()).ok();
    let wanted = record.network_identity.or_else(|| {
        let (device, inode) = noted.as_deref()?.trim().split_once(' ')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    })?;
    (namespace.identity().ok()? == wanted).then_some((namespace, path))
}

/// Returns what [`note_host_side`] has noted, and this host.
fn host_side(record: &Record) -> Option<(HostSide, NetNs)> {
    let text = fs::read(record.work.host_side()).ok()?;
    Some((serde_json::from_slice(&text).ok()?, NetNs::current().ok()?))
}

/// The destination owns the container, or is about to be told so: this host answers for it no more.
pub(in crate::migration) fn silence_host(record: &Record) -> Result<()> {
    match host_side(record) {
        Some((side, host)) => Ok(side.arm(&host)?.begin()?),
        None => Ok(()),
    }
}

/// Takes the fence away, where there is a namespace to have one.
fn remove_fence(record: &Record) -> Result<()> {
    own_network(record).map_or(Ok(()), |(namespace, _)| Ok(fence::remove(&namespace)?))
}

/// The init that was restored here.
pub(in crate::migration) fn restored_init(record: &Record) -> Option<ProcessId> {
    let text = fs::read_to_string(record.work.restored_init()).ok()?;
    ProcessId::read(&text)
}

/// Tells whether the copy that was restored here has tasks still: they may wait for memory.
pub fn copy_lives(record: &Record) -> bool {
    record.same_boot() && restored_init(record).is_some_and(ProcessId::is_alive)
}

/// Notes on a destination that the container runs with all of its memory: from here on it needs nobody
/// to go on, whatever else there is to do.
pub fn note_all_in(work: &WorkPath) {
    // Without it, it is only asked for longer.
    let _ = fs::write(work.all_in(), "").inspect_err(|e| tracing::error!("{e}"));
}

/// Returns what there is of the container on its source.
///
/// # Errors
/// When the runtime cannot be asked.
pub fn tasks(record: &Record) -> Result<Tasks> {
    if record.init_lives() {
        return Ok(Tasks::Here);
    }
    let state = runtime(record).state(&record.container)?;
    Ok(match state {
        Some(state) if state.pid != 0 && state.status != "stopped" => Tasks::Anew,
        _ if record.same_boot() => Tasks::Ended,
        _ => Tasks::Rebooted,
    })
}

/// Tells whether whoever took a container in has died when it ran, with all of its memory; so far as that is
/// noted, and it has not ended since.
pub fn runs_whole(record: &Record) -> bool {
    record.work.all_in().exists() && restored_init(record).is_some_and(ProcessId::is_alive)
}

/// Deletes the container of that ID if it is ours: has stopped, or is the one whose init we know.
fn delete(runtime: &Runtime, record: &Record, init: Option<ProcessId>) -> Result<()> {
    let id = record.id_here();
    match runtime.state(&id)? {
        // A runtime that was killed early leaves a directory without a state: it takes that, too.
        None if runtime.root().join(&*id).exists() => runtime.delete_force(&id),
        None => Ok(()),
        Some(state) if state.pid == 0 || state.status == "stopped" => runtime.delete_force(&id),
        Some(state)
            if init.is_some_and(|init| {
                let same = ProcessId::of(init.pid).is_none_or(|now| now == init);
                state.pid == init.pid && same && record.same_boot()
            }) =>
        {
            runtime.delete_force(&id)
        }
        Some(_) => bail!("another container called {id} is there now, and stays"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::journal::tests::record;
    use crate::report::failures::NamedStep;

    /// Asserts that steps of these names are there, each once, in this order.
    pub(super) fn in_order<S>(steps: &[NamedStep<S>], names: &[&str]) {
        let places = names.iter().map(|name| {
            let found: Vec<_> = steps.iter().enumerate().filter(|(_, s)| s.0 == *name).collect();
            assert_eq!(found.len(), 1, "{name}");
            found[0].0
        });
        let places: Vec<usize> = places.collect();
        assert!(places.is_sorted(), "not in this order: {names:?}");
    }

    /// What runs with all of its memory needs no Ferry; anything less is no copy without one.
    #[test]
    fn a_copy_that_has_all_of_its_memory_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = record("00112233aabbccdd");
        record.work = dir.path().to_owned().into();
        let me = ProcessId::this();
        let init = |it: ProcessId| fs::write(record.work.restored_init(), it.to_string());
        init(me).unwrap();
        assert!(!runs_whole(&record));
        note_all_in(&record.work);
        assert!(runs_whole(&record));
        // It has ended since.
        init(ProcessId { started: me.started + 1, ..me }).unwrap();
        assert!(!runs_whole(&record));
    }
}
