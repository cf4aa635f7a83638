//! Undoing and finishing a migration by its journal alone: what the guard does when Ferry was
//! killed, what `ferry resolve` does after a crash, and what the hand-over itself does at its end.
//! Every step may have been done before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::decide::Tasks;
use crate::connections::{self, Order, Orders, Vault};
use crate::engine::property;
use crate::files::sockets::Spares;
use crate::migration::forwarding::steps as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::criu;
use crate::migration::journal::workdir::{self, CRIU_PID, HOST_SIDE, INIT, NETWORK, SOCKETS};
use crate::migration::journal::{Journal, Record, State};
use crate::migration::network::floating::Noted as Addresses;
use crate::migration::network::hooks;
use crate::migration::preflight::layers;
use crate::network::hook::Phase;
use crate::network::{self, HostSide, fence};
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::Runtime;
use crate::report::failures::Trouble;
use crate::sys::netns::{self, NetNs};
use crate::sys::process::{self, is_alive};
use crate::tasks::mend::{self, Noted, Watch};

const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// The runtime of a record.
pub fn runtime(record: &Record) -> Runtime {
    Runtime::new(record.runtime.clone(), record.root.clone(), record.systemd_cgroup)
}

/// The source, before the commit: the container runs on as if nothing had happened.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn source_runs_on(journal: &mut Journal, hands: &Hands) -> Result<()> {
    let mut trouble = Trouble::default();
    let record = journal.record.clone();
    let committed = journal.was_committed();
    if journal.state() != State::Returning {
        // Before it can run on: what the destination holds is older from then on, and must not be let
        // run if this host goes down in the middle. A disk that does not take it is no reason to leave
        // the container frozen.
        let noted = journal.write(State::Returning);
        let _ = noted.inspect_err(|e| tracing::error!("{e:#}"));
    }
    forward::source_stays(&record, committed);
    criu::wait_for(&record.work);
    // After a reboot somebody else may be in a group of that name.
    let cgroup = record.cgroup.as_ref().filter(|_| record.init_lives());
    if let Some(cgroup) = cgroup
        && record.work.join("work").join(CRIU_PID).exists()
    {
        // A CRIU that was killed leaves the tasks running, with their sockets in repair mode. Mending
        // wants them to stand still; if they cannot, they run on as they are.
        if cgroup.freeze(Duration::from_secs(2)).is_ok() {
            mend_tasks(&record, cgroup, &mut trouble);
            put_back(&record, cgroup, hands, &mut trouble);
            mend::sockets(cgroup);
        } else if connections::are_out(&record.work) {
            let failed = anyhow::anyhow!("its tasks do not stand still");
            trouble.note("putting connections back", Err::<(), _>(failed));
        }
    }
    if let Some((spares, root)) = spares(&record) {
        trouble.note("giving sockets their names back", spares.give_back(&root));
    }
    lift_fence(&record, &mut trouble);
    if let Some(addresses) = Addresses::of(&record) {
        // The destination may have told everybody that they are there.
        addresses.stays(committed, &mut trouble);
    }
    let side = host_side(&record);
    if let Some((side, host)) = &side {
        trouble.note("letting this host answer again", side.restore(host));
    }
    if committed {
        // The destination may have told everybody that the address is there.
        take_address_back(&record);
        let _ = side.map(|(side, host)| side.announce(&host));
    }
    if let Some(cgroup) = cgroup {
        trouble.note("thawing the container", cgroup.thaw());
        if record.work.join("work").join(CRIU_PID).exists() {
            mend::mappings(cgroup);
        }
    }
    trouble.note("lifting the away-mark", lift_mark(journal));
    // Clients have been waiting: what may take its time comes last.
    hooks::end(&record, Phase::Rollback);
    let undone = trouble.into_result();
    // What could not be undone stays open, for `ferry resolve` to try again.
    undone?;
    workdir::remove(&record.work);
    journal.write(State::Aborted)
}

/// Who undoes a migration on its source.
#[derive(Debug)]
pub enum Hands<'a> {
    /// The Ferry that began it. The guard works in the tasks for it.
    Own {
        /// To tell it.
        orders: &'a Orders,
        /// Watches over it.
        watch: &'a Watch,
        /// If it is gone.
        vault: &'a Vault,
    },
    /// The guard, when that Ferry has died, or somebody later: with what the guard has, if it is there.
    Later(Option<&'a Vault>),
}

fn put_back(record: &Record, cgroup: &Cgroup, hands: &Hands, trouble: &mut Trouble) {
    if !connections::are_out(&record.work) {
        return;
    }
    let alone = |vault: &Vault| connections::put_back(vault, cgroup, &record.work, |_| Ok(()));
    let done = match hands {
        Hands::Own { orders, watch, vault } => match orders.ask(Order::PutBack, Some(watch)) {
            Some(done) => done,
            // It was killed, perhaps in the middle of it.
            None => {
                mend_tasks(record, cgroup, trouble);
                alone(vault)
            }
        },
        Hands::Later(Some(vault)) => alone(vault),
        // Whoever held them was killed together with Ferry.
        Hands::Later(None) => {
            tracing::error!("connections that had been taken out of the container are lost");
            Ok(())
        }
    };
    trouble.note("putting connections back", done);
}

fn mend_tasks(record: &Record, cgroup: &Cgroup, trouble: &mut Trouble) {
    let work = record.work.join("work");
    if let Some(noted) = Noted::read(&work) {
        trouble.note("mending what was worked in", noted.put_back(cgroup, &work));
    }
}

/// Notes the unix sockets whose names the destination will bind anew: before anything is done with
/// them, so that whoever undoes it knows of it.
///
/// # Errors
/// When they cannot be found out.
pub fn note_sockets(record: &Record, pids: &[i32]) -> Result<()> {
    let Some((init, _)) = record.init else { return Ok(()) };
    let spares = Spares::find(init, pids, &record.migration)?;
    if spares.is_empty() {
        return Ok(());
    }
    Ok(fs::write(record.work.join(SOCKETS), serde_json::to_vec(&spares)?)?)
}

/// Keeps the files of the sockets that were noted. CRIU must have dumped.
///
/// # Errors
/// When one of them cannot be kept.
pub fn keep_sockets(record: &Record) -> Result<()> {
    spares(record).map_or(Ok(()), |(spares, root)| spares.make(&root))
}

/// What [`note_sockets`] has noted, and the root of the container that it is about.
fn spares(record: &Record) -> Option<(Spares, PathBuf)> {
    let (init, _) = record.init.filter(|_| record.init_lives())?;
    let text = fs::read(record.work.join(SOCKETS)).ok()?;
    Some((serde_json::from_slice(&text).ok()?, root_of(init)))
}

fn root_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
}

/// Where the migration's away-mark lies, and its journal below.
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
    };
    mark.write(state_dir(journal))
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

fn remove_network(namespace: &NetNs, path: &Path, trouble: &mut Trouble) {
    if let Some(engine) = property::of_namespace(path) {
        // Refused beforehand, but a journal may say so. Its fence keeps it silent.
        tracing::warn!("the network namespace {} is {engine}'s, and stays", path.display());
        return;
    }
    for problem in network::dismantle(namespace, Some(path), None).err().unwrap_or_default() {
        trouble.note("removing the container's network", Err::<(), _>(problem));
    }
}

/// The namespace of this migration, if what bears its name is still that.
fn own_network(record: &Record) -> Option<(NetNs, &Path)> {
    // After a reboot another one may have its numbers.
    if !record.same_boot() {
        return None;
    }
    let path = record.network_path.as_deref()?;
    let namespace = NetNs::open(path).ok()?;
    let noted = fs::read_to_string(record.work.join(NETWORK)).ok();
    let wanted = record.network_identity.or_else(|| {
        let (device, inode) = noted.as_deref()?.trim().split_once(' ')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    })?;
    (namespace.identity().ok()? == wanted).then_some((namespace, path))
}

/// Tells the neighbours that the container's address is here: without it their frames go on to
/// where it was announced last, until the container happens to say something.
fn take_address_back(record: &Record) {
    let Some(namespace) = record.network_path.as_ref().and_then(|p| NetNs::open(p).ok()) else {
        return;
    };
    // Only a help: sooner or later the container says something by itself.
    let _ = NetNs::current()
        .map_err(anyhow::Error::from)
        .and_then(|host| Ok(network::capture(&namespace, &host)?))
        .and_then(|image| Ok(network::announce(&namespace, &image)?));
}

/// What [`note_host_side`] has noted, and this host.
fn host_side(record: &Record) -> Option<(HostSide, NetNs)> {
    let text = fs::read(record.work.join(HOST_SIDE)).ok()?;
    Some((serde_json::from_slice(&text).ok()?, NetNs::current().ok()?))
}

/// The destination owns the container, or is about to be told so: this host answers for it no more.
pub(in crate::migration) fn hush(record: &Record) -> Result<()> {
    match host_side(record) {
        Some((side, host)) => Ok(side.arm(&host)?.begin()?),
        None => Ok(()),
    }
}

/// Takes the fence away, where there is a namespace to have one.
fn lift_fence(record: &Record, trouble: &mut Trouble) {
    if let Some((namespace, _)) = own_network(record) {
        trouble.note("lifting the fence", fence::remove(&namespace));
    }
}

/// The source, when the destination runs: what is frozen here goes away, and the ID may not be
/// started here.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn source_lets_go(journal: &mut Journal, before_network: impl FnOnce()) -> Result<()> {
    let mut trouble = Trouble::default();
    let record = journal.record.clone();
    let runtime = runtime(&record);
    criu::wait_for(&record.work);
    if let Some((spares, root)) = spares(&record) {
        trouble.note("removing spare names of sockets", spares.remove(&root));
    }
    // One without a name can only be found as long as they are there.
    let network = own_network(&record);
    let (addresses, mut ended) = (Addresses::of(&record), true);
    if let Some(cgroup) = record.cgroup.as_ref().filter(|_| record.init_lives()) {
        if record.forward.is_some() || addresses.is_some() {
            mend::silence_sockets(cgroup);
        }
        ended = trouble.note("ending the frozen tasks", cgroup.kill(KILL_TIMEOUT)).is_some();
    }
    forward::source_goes(&record);
    before_network();
    let kept = trouble.note("keeping the container's network", forward::source_gone(&record));
    if kept == Some(true) {
        // Behind its closed fence it goes on, for whoever forwards.
    } else if let Some((namespace, path)) = network {
        // The fence is closed and goes with the namespace: no kernel answers for the container.
        remove_network(&namespace, path, &mut trouble);
    }
    // Whoever is there still must not be heard.
    if let Some(addresses) = addresses.filter(|_| ended) {
        addresses.goes(&mut trouble);
    }
    if let Some((side, host)) = host_side(&record) {
        trouble.note("letting go of the address", side.clear(&host));
    }
    hooks::end(&record, Phase::Release);
    trouble.note("deleting the container", delete(&runtime, &record, record.init));
    if let Some(place) = record.unmount.as_deref().filter(|_| trouble.is_empty()) {
        trouble.note("unmounting its root file system", layers::unmount(place, &record.remove));
    }
    // Whoever could not be ended, or has come in its place, may use it.
    for path in record.remove.iter().filter(|_| trouble.is_empty()).collect::<Vec<_>>() {
        trouble.note("removing what was copied", crate::files::walk::remove_real(path));
    }
    if !record.leave_mark {
        trouble.note("lifting the away-mark", lift_mark(journal));
    }
    workdir::remove(&record.work);
    trouble.note("writing the journal", journal.write(State::Finished));
    trouble.into_result()
}

/// The destination, when there is no copy to keep: nothing is left here.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn destination_discards(journal: &mut Journal) -> Result<()> {
    let mut trouble = Trouble::default();
    let record = journal.record.clone();
    let runtime = runtime(&record);
    criu::end_restore(&record.work);
    let init = restored_init(&record);
    let network = own_network(&record);
    if let Some((namespace, _)) = &network {
        // It may have run, with an open fence: its sockets must end unheard.
        trouble.note("closing the fence", fence::raise(namespace));
    }
    let addresses = Addresses::of(&record);
    if let Some(addresses) = &addresses {
        addresses.close(&mut trouble);
    }
    trouble.note("deleting the container", delete(&runtime, &record, init));
    if let Some(addresses) = addresses {
        addresses.discard(&mut trouble);
    }
    let was_here = record.forward.as_ref().is_some_and(forward::destination_discards);
    match network {
        Some((_, path)) if was_here => {
            trouble.note("taking the network's name away", netns::remove_named(path));
        }
        Some((namespace, path)) if record.network_ours => {
            remove_network(&namespace, path, &mut trouble);
        }
        Some((namespace, _)) => {
            trouble.note("lifting the fence", fence::remove(&namespace));
        }
        None => {}
    }
    if let Some((side, host)) = host_side(&record) {
        trouble.note("letting go of the address", side.clear(&host));
    }
    hooks::end(&record, Phase::Rollback);
    // Nobody uses it any more.
    runtime.clear_restore(&record.container);
    trouble.note("removing what was copied", record.placing.undo());
    // Once it may have run, they tell why it did not go on.
    let logs = if journal.was_committed() { record.logs.keep() } else { record.logs.undo() };
    trouble.note("putting logs back", logs);
    workdir::remove(&record.work);
    trouble.note("writing the journal", journal.write(State::Aborted));
    trouble.into_result()
}

/// The init that was restored here, and when it started.
pub(in crate::migration) fn restored_init(record: &Record) -> Option<(i32, u64)> {
    let text = fs::read_to_string(record.work.join(INIT)).ok()?;
    let (pid, started) = text.trim().split_once(' ')?;
    Some((pid.parse().ok()?, started.parse().ok()?))
}

/// Notes on a destination that the container runs with all of its memory: from here on it needs nobody
/// to go on, whatever else there is to do.
pub fn note_all_in(work: &Path) {
    // Without it, it is only asked for longer.
    let _ = fs::write(work.join(ALL_IN), "").inspect_err(|e| tracing::error!("{e}"));
}

/// What there is of the container on its source.
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

/// Whether whoever took a container in has died when it ran, with all of its memory; so far as that is
/// noted, and it has not ended since.
pub fn runs_whole(record: &Record) -> bool {
    record.work.join(ALL_IN).exists() && restored_init(record).is_some_and(is_alive)
}

/// In the work directory of a destination: see [`note_all_in`].
const ALL_IN: &str = "all-in";
/// Deletes the container of that ID if it is ours: has stopped, or is the one whose init we know.
fn delete(runtime: &Runtime, record: &Record, init: Option<(i32, u64)>) -> Result<()> {
    match runtime.state(&record.container)? {
        // A runtime that was killed early leaves a directory without a state: it takes that, too.
        None if runtime.root().join(&record.container).exists() => {
            runtime.delete_force(&record.container)
        }
        None => Ok(()),
        Some(state) if state.pid == 0 || state.status == "stopped" => {
            runtime.delete_force(&record.container)
        }
        Some(state)
            if init.is_some_and(|(pid, started)| {
                let same = process::start_time(pid).is_none_or(|s| s == started);
                state.pid == pid && same && record.same_boot()
            }) =>
        {
            runtime.delete_force(&record.container)
        }
        Some(_) => {
            anyhow::bail!("another container called {} is there now, and stays", record.container)
        }
    }
}

/// The destination, when the container runs: it can be reached. Whatever is missing may still come.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn destination_opens(record: &Record) -> Result<()> {
    let mut trouble = Trouble::default();
    open(record, &mut trouble);
    trouble.into_result()
}

fn open(record: &Record, trouble: &mut Trouble) {
    if let (Some((side, host)), Some((namespace, _))) = (host_side(record), own_network(record)) {
        trouble.note("leading the address here", side.lead_here(&namespace, &host));
    }
    lift_fence(record, trouble);
    if let Some(addresses) = Addresses::of(record) {
        addresses.keep(trouble);
    }
}

/// The destination, when the container runs and whoever took it in has died: the rest of his work.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn destination_keeps(journal: &mut Journal) -> Result<()> {
    let mut trouble = Trouble::default();
    let record = journal.record.clone();
    open(&record, &mut trouble);
    // He may not have come to waking the connections that he had made.
    if let Some(cgroup) = restored_init(&record).and_then(|(pid, _)| Cgroup::of_process(pid).ok()) {
        mend::sockets(&cgroup);
    }
    if let Some(note) = &record.forward {
        forward::destination_keeps(note);
    }
    hooks::end(&record, Phase::Switch);
    workdir::remove(&record.work);
    let runtime = runtime(&record);
    runtime.clear_restore(&record.container);
    let root = runtime.root().to_owned();
    let cleared = AwayMark::remove(state_dir(journal), &root, record.container.as_ref());
    let came_back = trouble.note("lifting the away-mark", cleared).unwrap_or(false);
    trouble.note("keeping what was copied", settle_files(&record, came_back));
    // What could not be done stays open, for `ferry resolve` to try again.
    if trouble.is_empty() {
        trouble.note("writing the journal", journal.write(State::Finished));
    }
    trouble.into_result()
}

/// What was copied stays, on the disk; and so do logs. What the container itself had left here earlier
/// is of no use any more.
///
/// # Errors
/// When the disk does not take it, or what stood in its place cannot be kept.
pub fn settle_files(record: &Record, came_back: bool) -> Result<()> {
    record.placing.sync()?;
    let logs = record.logs.keep();
    record.placing.keep(came_back).and(logs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::journal::tests::record;
    use crate::sys::process::this_process;

    /// What runs with all of its memory needs no Ferry; anything less is no copy without one.
    #[test]
    fn a_copy_that_has_all_of_its_memory_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = record("00112233aabbccdd");
        record.work = dir.path().to_owned();
        let (pid, started) = this_process();
        let init = |started: u64| fs::write(dir.path().join(INIT), format!("{pid} {started}"));
        init(started).unwrap();
        assert!(!runs_whole(&record));
        note_all_in(dir.path());
        assert!(runs_whole(&record));
        // It has ended since.
        init(started + 1).unwrap();
        assert!(!runs_whole(&record));
    }
}
