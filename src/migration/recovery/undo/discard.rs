//! The destination, when there is no copy to keep: nothing is left here.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{copy_lives, delete, host_side, own_network, remove_network, restored_init, runtime};
use crate::migration::forwarding::steps as forward;
use crate::migration::journal::{Journal, Record, State, criu, workdir};
use crate::migration::network::floating_address::Noted as Addresses;
use crate::migration::network::hooks;
use crate::migration::recovery::engines;
use crate::network::fence;
use crate::network::hook::HookPhase;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::Runtime;
use crate::report::failures::{Failures, NamedStep};
use crate::sys::netns::{self, NetNs};
use crate::sys::process::{self, ProcessId};
use crate::tasks::criu_rescue;

/// Time that the first task may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// A copy that is not to be.
struct Discard<'a> {
    record: Record,
    runtime: Runtime,
    journal: &'a mut Journal,
    /// The init that was restored.
    init: Option<ProcessId>,
    /// Its network, as long as its tasks are there.
    network: Option<(NetNs, PathBuf)>,
    addresses: Option<Addresses>,
}

/// What comes first: it may have run, with an open fence, and ends unheard.
fn silence<'a>() -> [NamedStep<Discard<'a>>; 4] {
    [
        ("ending CRIU", |it, _| it.end_criu()),
        ("closing the fence", |it, _| it.close_fence()),
        ("closing the fence round the address", |it, _| it.close_addresses()),
        ("silencing sockets", |it, _| it.silence_sockets()),
    ]
}

/// What follows when it has ended.
fn clear<'a>() -> [NamedStep<Discard<'a>>; 10] {
    [
        ("letting go of the floating addresses", |it, _| it.discard_addresses()),
        ("removing the container's network", |it, _| it.remove_network()),
        ("letting go of the address", |it, _| it.let_host_go()),
        ("calling the hook", |it, _| it.call_hook()),
        // Nobody uses it any more.
        ("clearing the runtime's directory", |it, _| it.clear_runtime()),
        ("having the engine remove it", |it, _| engines::discard(&it.record)),
        ("removing what was copied", |it, _| it.record.placing.undo()),
        ("putting logs back", |it, _| it.put_logs_back()),
        ("removing the work directory", |it, _| it.remove_work()),
        ("writing the journal", |it, _| it.journal.write(State::Aborted)),
    ]
}

/// Ends the copy, and takes away all that was made for it.
///
/// # Errors
/// Says which steps failed; the others were done. But where [the copy lives](copy_lives) nothing is taken
/// away from it, and the migration stays open.
pub fn discard_destination(journal: &mut Journal) -> Result<()> {
    let record = journal.record.clone();
    let mut it = Discard {
        runtime: runtime(&record),
        journal,
        init: None,
        network: None,
        addresses: Addresses::of(&record),
        record,
    };
    let mut failures = Failures::default();
    failures.try_all(&silence(), &mut it);

    let deleted = it.delete();
    if let (Err(e), true) = (&deleted, copy_lives(&it.record)) {
        bail!("the container does not end: {e:#}");
    }
    failures.note("deleting the container", deleted);

    failures.try_all(&clear(), &mut it);
    failures.into_result()
}

impl Discard<'_> {
    fn end_criu(&mut self) -> Result<()> {
        criu::end_restore(&self.record.work);
        self.init = restored_init(&self.record);
        self.network = own_network(&self.record);
        Ok(())
    }

    fn close_fence(&self) -> Result<()> {
        if let Some((namespace, _)) = &self.network {
            fence::raise(namespace)?;
        }
        Ok(())
    }

    fn close_addresses(&self) -> Result<()> {
        self.addresses.as_ref().map_or(Ok(()), Addresses::close)
    }

    /// What is left of them would outlive the fence, and speak for a copy that is not to be.
    fn silence_sockets(&self) -> Result<()> {
        let init = self.init.filter(|_| copy_lives(&self.record));
        if let Some(cgroup) = init.and_then(|init| Cgroup::of_process(init.pid).ok()) {
            criu_rescue::silence_sockets(&cgroup);
        }
        Ok(())
    }

    fn delete(&self) -> Result<()> {
        let delete = || delete(&self.runtime, &self.record, self.init);
        delete().or_else(|e| {
            // The runtime may be what fails; its init ends the others with it.
            end_init(&self.record);
            delete().map_err(|_| e)
        })
    }

    fn discard_addresses(&self) -> Result<()> {
        self.addresses.as_ref().map_or(Ok(()), Addresses::discard)
    }

    fn remove_network(&mut self) -> Result<()> {
        let record = &self.record;
        let was_here = record.forward.as_ref().is_some_and(forward::discard_destination);
        match self.network.take() {
            // It goes on without that name.
            Some((_, path)) if was_here => Ok(netns::remove_named(&path)?),
            Some((namespace, path)) if record.network_ours => {
                remove_network(&namespace, &path, record)
            }
            // It goes with the namespace, which the engine takes down: the address lives elsewhere.
            Some(_) if record.engine.is_some() => Ok(()),
            Some((namespace, _)) => Ok(fence::remove(&namespace)?),
            None => Ok(()),
        }
    }

    fn let_host_go(&self) -> Result<()> {
        host_side(&self.record).map_or(Ok(()), |(side, host)| Ok(side.clear(&host)?))
    }

    fn call_hook(&self) -> Result<()> {
        hooks::end(&self.record, HookPhase::Rollback);
        Ok(())
    }

    fn clear_runtime(&self) -> Result<()> {
        self.runtime.clear_restore(&self.record.id_here());
        Ok(())
    }

    /// Once it may have run, they tell why it did not go on.
    fn put_logs_back(&self) -> Result<()> {
        let logs = &self.record.logs;
        if self.journal.was_committed() { logs.keep() } else { logs.undo() }
    }

    fn remove_work(&self) -> Result<()> {
        workdir::remove(&self.record.work);
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::super::tests::in_order;
    use super::*;

    /// A copy that may have run is not heard when it ends, and what it was made of goes last.
    #[test]
    fn a_copy_ends_unheard() {
        let first = [
            "ending CRIU",
            "closing the fence",
            "closing the fence round the address",
            "silencing sockets",
        ];
        in_order(&silence(), &first);
        let names: Vec<_> = clear().iter().map(|(name, _)| *name).collect();
        assert!(!names.iter().any(|name| first.contains(name)));
        let rest = ["removing the container's network", "having the engine remove it"];
        in_order(&clear(), &rest);
        in_order(&clear(), &["having the engine remove it", "removing what was copied"]);
        in_order(&clear(), &["putting logs back", "writing the journal"]);
        // What it says is read until then.
        in_order(&clear(), &["letting go of the address", "removing the work directory"]);
        assert_eq!(names.last(), Some(&"writing the journal"));
    }
}
