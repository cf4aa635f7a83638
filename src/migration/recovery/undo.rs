//! Undoing and finishing a migration by its journal alone: what the guard does when Ferry was
//! killed, what `ferry resolve` does after a crash, and what the hand-over itself does at its end.
//! Every step may have been done before.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::decide::Tasks;
use super::{engines, socket_names};
use crate::connections::{self, GuardCommand, GuardCommands, Vault};
use crate::engine::property;
use crate::migration::forwarding::steps as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::criu;
use crate::migration::journal::workdir::{self, WorkPath};
use crate::migration::journal::{Journal, Record, State};
use crate::migration::network::floating_address::Noted as Addresses;
use crate::migration::network::hooks;
use crate::migration::preflight::layers;
use crate::network::hook::HookPhase;
use crate::network::{self, HostSide, fence};
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::Runtime;
use crate::report::failures::Failures;
use crate::sys::netns::{self, NetNs};
use crate::sys::process::{self, ProcessId};
use crate::tasks::criu_rescue::{self, TaskSnapshot, TracerWatch};
use crate::tasks::waits;

/// Time that a task may take to come to a call that it begins anew.
const WAIT_TIMEOUT: Duration = Duration::from_millis(300);
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// The runtime of a record.
pub fn runtime(record: &Record) -> Runtime {
    Runtime::new(record.runtime.clone(), record.root.clone(), record.systemd_cgroup)
}

/// Whether the other host may still let its copy run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// Nobody has said otherwise.
    Possible,
    /// It has said that it never will, or an operator has.
    Excluded,
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

/// The source, before the commit: the container runs on as if nothing had happened.
///
/// # Errors
/// Says which steps failed; the others were done. None was where it is [`StaysFrozen`].
pub fn roll_back_source(journal: &mut Journal, hands: &Hands, rival: Rival) -> Result<()> {
    let mut failures = Failures::default();
    let record = journal.record.clone();
    let committed = journal.was_committed();
    if journal.state() != State::Returning || committed {
        // Before it can run on: what the destination holds is older from then on, and must not be let
        // run if this host goes down in the middle. As long as nothing else says that it may, a disk
        // that does not take it is no reason to leave the container frozen.
        let noted = journal.write(State::Returning);
        if let Err(e) = noted {
            if committed && rival == Rival::Possible {
                return Err(e.context(StaysFrozen));
            }
            tracing::error!("{e:#}");
        }
    }

    forward::source_stays(&record, committed);
    criu::wait_for(&record.work);

    // After a reboot somebody else may be in a group of that name.
    let cgroup = record.cgroup.as_ref().filter(|_| record.init_lives());
    if let Some(cgroup) = cgroup
        && record.work.criu().pid().exists()
    {
        // A CRIU that was killed leaves the tasks running, with their sockets in repair mode. Mending
        // wants them to stand still; if they cannot, they run on as they are.
        if cgroup.freeze(Duration::from_secs(2)).is_ok() {
            mend_tasks(&record, cgroup, &mut failures);
            put_back(&record, cgroup, hands, &mut failures);
            criu_rescue::sockets(cgroup);
        } else if connections::are_out(&record.work) {
            let failed = anyhow::anyhow!("its tasks do not stand still");
            failures.note("putting connections back", Err::<(), _>(failed));
        }
    }

    failures.note("giving sockets their names back", socket_names::give_back(&record));
    lift_fence(&record, &mut failures);
    if let Some(addresses) = Addresses::of(&record) {
        // The destination may have told everybody that they are there.
        addresses.stays(committed, &mut failures);
    }

    let side = host_side(&record);
    if let Some((side, host)) = &side {
        failures.note("letting this host answer again", side.restore(host));
    }
    if committed {
        // The destination may have told everybody that the address is there.
        take_address_back(&record);
        let _ = side.map(|(side, host)| side.announce(&host));
    }

    if let Some(cgroup) = cgroup {
        failures.note("thawing the container", cgroup.thaw());
        if record.work.criu().pid().exists() {
            criu_rescue::mappings(cgroup);
            wait_on(cgroup);
        }
    }

    failures.note("lifting the away-mark", lift_mark(journal));
    // Clients have been waiting: what may take its time comes last.
    hooks::end(&record, HookPhase::Rollback);
    let undone = failures.into_result();

    // What could not be undone stays open, for `ferry resolve` to try again.
    undone?;
    workdir::remove(&record.work);

    journal.write(State::Aborted)
}

/// What has begun to wait anew is to wait for no longer than it should.
fn wait_on(cgroup: &Cgroup) {
    let pids = cgroup.processes();
    if let Some(problem) = pids.ok().and_then(|pids| waits::go_on(&pids, WAIT_TIMEOUT)) {
        tracing::warn!("{problem}");
    }
}

/// Who undoes a migration on its source.
#[derive(Debug)]
pub enum Hands<'a> {
    /// The Ferry that began it. The guard works in the tasks for it.
    Own {
        /// To tell it.
        orders: &'a GuardCommands,
        /// Watches over it.
        watch: &'a TracerWatch,
        /// If it is gone.
        vault: &'a Vault,
    },
    /// The guard, when that Ferry has died, or somebody later: with what the guard has, if it is there.
    Later(Option<&'a Vault>),
}

fn put_back(record: &Record, cgroup: &Cgroup, hands: &Hands, failures: &mut Failures) {
    if !connections::are_out(&record.work) {
        return;
    }
    let alone = |vault: &Vault| connections::put_back(vault, cgroup, &record.work, |_| Ok(()));
    let done = match hands {
        Hands::Own { orders, watch, vault } => match orders.ask(GuardCommand::PutBack, Some(watch))
        {
            Some(done) => done,
            // It was killed, perhaps in the middle of it.
            None => {
                mend_tasks(record, cgroup, failures);
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
    failures.note("putting connections back", done);
}

fn mend_tasks(record: &Record, cgroup: &Cgroup, failures: &mut Failures) {
    let work = record.work.criu();
    if let Some(noted) = TaskSnapshot::read(&work) {
        failures.note("mending what was worked in", noted.put_back(cgroup, &work));
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

fn remove_network(namespace: &NetNs, path: &Path, record: &Record, failures: &mut Failures) {
    if record.engine.is_some() {
        // It takes it down with the container.
        return;
    }
    if let Some(engine) = property::of_namespace(path) {
        // Refused beforehand, but a journal may say so. Its fence keeps it silent.
        tracing::warn!("the network namespace {} is {engine}'s, and stays", path.display());
        return;
    }
    for problem in network::dismantle(namespace, Some(path), None).err().unwrap_or_default() {
        failures.note("removing the container's network", Err::<(), _>(problem));
    }
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

/// Tells the neighbours that the container's address is here: without it their frames go on to
/// where it was announced last, until the container happens to say something.
fn take_address_back(record: &Record) {
    let Some(namespace) = record.network_path.as_ref().and_then(|p| NetNs::open(p).ok()) else {
        return;
    };
    let engines = record.engine.is_some();
    let capture = if engines { network::capture_engines } else { network::capture_at };
    // Only a help: sooner or later the container says something by itself.
    let _ = NetNs::current()
        .map_err(anyhow::Error::from)
        .and_then(|host| Ok(capture(&namespace, &host, None)?))
        .and_then(|image| Ok(network::announce(&namespace, &image)?));
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
fn lift_fence(record: &Record, failures: &mut Failures) {
    if let Some((namespace, _)) = own_network(record) {
        failures.note("lifting the fence", fence::remove(&namespace));
    }
}

/// The source, when the destination runs: what is frozen here goes away, and the ID may not be
/// started here.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn release_source(journal: &mut Journal, before_network: impl FnOnce()) -> Result<()> {
    let mut failures = Failures::default();
    let record = journal.record.clone();
    let runtime = runtime(&record);
    criu::wait_for(&record.work);
    failures.note("removing spare names of sockets", socket_names::remove(&record));

    // One without a name can only be found as long as they are there.
    let network = own_network(&record);
    let (addresses, mut ended) = (Addresses::of(&record), true);
    forward::source_leads(&record);
    let leaving = engines::leave(&record, &runtime);
    if let Some(cgroup) = record.cgroup.as_ref().filter(|_| record.init_lives()) {
        if record.forward.is_some() || addresses.is_some() {
            criu_rescue::silence_sockets(cgroup);
        }
        ended = failures.note("ending the frozen tasks", cgroup.kill(KILL_TIMEOUT)).is_some();
        if ended && record.engine.is_some() {
            // To the runtime it is paused as long as its group is frozen, and then an engine that has seen
            // it end cannot take it away.
            let _ = cgroup.thaw();
        }
    }

    forward::source_goes(&record);
    before_network();
    let told = leaving.and_then(|leaving| failures.note("telling the engine", leaving.end()));
    let kept = failures.note("keeping the container's network", forward::source_gone(&record));
    if kept == Some(true) {
        // Behind its closed fence it goes on, for whoever forwards.
    } else if let Some((namespace, path)) = network {
        // The fence is closed and goes with the namespace: no kernel answers for the container.
        remove_network(&namespace, &path, &record, &mut failures);
    }

    // Whoever is there still must not be heard.
    if let Some(addresses) = addresses.filter(|_| ended) {
        addresses.goes(&mut failures);
    }
    if let Some((side, host)) = host_side(&record) {
        failures.note("letting go of the address", side.clear(&host));
    }

    hooks::end(&record, HookPhase::Release);
    failures.note("deleting the container", delete(&runtime, &record, record.init));
    if let Some(place) = record.unmount.as_deref().filter(|_| failures.is_empty()) {
        failures.note("unmounting its root file system", layers::unmount(place, &record.remove));
    }

    // Whoever could not be ended, or has come in its place, may use it.
    for path in record.remove.iter().filter(|_| failures.is_empty()).collect::<Vec<_>>() {
        failures.note("removing what was copied", crate::files::walk::remove_real(path));
    }
    if !record.leave_mark && mark_may_go(record.engine.is_some(), told.is_some()) {
        failures.note("lifting the away-mark", lift_mark(journal));
    } else if !record.leave_mark {
        tracing::warn!("the away-mark stays: the engine may start the container again");
    }

    workdir::remove(&record.work);
    failures.note("writing the journal", journal.write(State::Finished));
    failures.into_result()
}

/// The destination, when there is no copy to keep: nothing is left here.
///
/// # Errors
/// Says which steps failed; the others were done. But where [the copy lives](copy_lives) nothing is taken
/// away from it, and the migration stays open.
pub fn discard_destination(journal: &mut Journal) -> Result<()> {
    let mut failures = Failures::default();
    let record = journal.record.clone();
    let runtime = runtime(&record);
    criu::end_restore(&record.work);
    let init = restored_init(&record);
    let network = own_network(&record);
    if let Some((namespace, _)) = &network {
        // It may have run, with an open fence: its sockets must end unheard.
        failures.note("closing the fence", fence::raise(namespace));
    }

    let addresses = Addresses::of(&record);
    if let Some(addresses) = &addresses {
        addresses.close(&mut failures);
    }

    // What is left of them would outlive the fence, and speak for a copy that is not to be.
    if let Some(cgroup) =
        init.filter(|_| copy_lives(&record)).and_then(|init| Cgroup::of_process(init.pid).ok())
    {
        criu_rescue::silence_sockets(&cgroup);
    }

    let deleted = delete(&runtime, &record, init).or_else(|e| {
        // The runtime may be what fails; its init ends the others with it.
        end_init(&record);
        delete(&runtime, &record, init).map_err(|_| e)
    });

    if let (Err(e), true) = (&deleted, copy_lives(&record)) {
        bail!("the container does not end: {e:#}");
    }
    failures.note("deleting the container", deleted);
    if let Some(addresses) = addresses {
        addresses.discard(&mut failures);
    }

    let was_here = record.forward.as_ref().is_some_and(forward::discard_destination);
    match network {
        Some((_, path)) if was_here => {
            failures.note("taking the network's name away", netns::remove_named(&path));
        }
        Some((namespace, path)) if record.network_ours => {
            remove_network(&namespace, &path, &record, &mut failures);
        }
        // It goes with the namespace, which the engine takes down: the address lives elsewhere.
        Some(_) if record.engine.is_some() => {}
        Some((namespace, _)) => {
            failures.note("lifting the fence", fence::remove(&namespace));
        }
        None => {}
    }

    if let Some((side, host)) = host_side(&record) {
        failures.note("letting go of the address", side.clear(&host));
    }
    hooks::end(&record, HookPhase::Rollback);

    // Nobody uses it any more.
    runtime.clear_restore(&record.id_here());
    failures.note("having the engine remove it", engines::discard(&record));
    failures.note("removing what was copied", record.placing.undo());

    // Once it may have run, they tell why it did not go on.
    let logs = if journal.was_committed() { record.logs.keep() } else { record.logs.undo() };
    failures.note("putting logs back", logs);
    workdir::remove(&record.work);
    failures.note("writing the journal", journal.write(State::Aborted));

    failures.into_result()
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

/// Kills the init that was restored here.
fn end_init(record: &Record) {
    let Some(init) = restored_init(record).filter(|_| record.same_boot()) else { return };
    let Ok(pidfd) = process::pidfd_open(init.pid) else { return };
    // Whoever the descriptor stands for: it was he after it had been opened.
    if init.is_alive() {
        let _ = process::pidfd_kill(&pidfd, libc::SIGKILL);
        let _ = process::wait_readable(&[pidfd.as_fd()], Some(Instant::now() + KILL_TIMEOUT));
    }
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

/// The destination, when the container runs: it can be reached. Whatever is missing may still come.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn open_destination(record: &Record) -> Result<()> {
    let mut failures = Failures::default();
    open(record, &mut failures);
    failures.into_result()
}

fn open(record: &Record, failures: &mut Failures) {
    if let (Some((side, host)), Some((namespace, _))) = (host_side(record), own_network(record)) {
        failures.note("leading the address here", side.lead_here(&namespace, &host));
    }
    lift_fence(record, failures);
    if let Some(addresses) = Addresses::of(record) {
        addresses.keep(failures);
    }
}

/// The destination, when the container runs and whoever took it in has died: the rest of his work.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn finish_destination(journal: &mut Journal) -> Result<()> {
    let mut failures = Failures::default();
    let record = journal.record.clone();
    open(&record, &mut failures);

    // He may not have come to waking the connections that he had made.
    let cgroup = restored_init(&record).and_then(|init| Cgroup::of_process(init.pid).ok());
    cgroup.iter().for_each(criu_rescue::sockets);
    if let Some(note) = &record.forward {
        forward::finish_destination(note);
    }

    hooks::end(&record, HookPhase::Switch);
    workdir::remove(&record.work);
    let runtime = runtime(&record);
    runtime.clear_restore(&record.id_here());
    let root = runtime.root().to_owned();
    if let Some(made) = &record.engine {
        let cleared = AwayMark::remove_named(state_dir(journal), made.engine, &made.name);
        failures.note("lifting the name's away-mark", cleared);
    }

    let cleared = AwayMark::remove(state_dir(journal), &root, record.container.as_ref());
    let came_back = failures.note("lifting the away-mark", cleared).unwrap_or(false);
    failures.note("keeping what was copied", settle_files(&record, came_back));
    cgroup.iter().for_each(wait_on);
    engines::keep(&record);

    // What could not be done stays open, for `ferry resolve` to try again.
    if failures.is_empty() {
        failures.note("writing the journal", journal.write(State::Finished));
    }

    failures.into_result()
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
