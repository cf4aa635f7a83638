//! The source, when the destination runs: what is frozen here goes away, and the ID may not be
//! started here.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use super::{delete, host_side, lift_mark, mark_may_go, own_network, remove_network, runtime};
use crate::files::walk;
use crate::migration::forwarding::steps as forward;
use crate::migration::journal::{Journal, Record, State, criu, workdir};
use crate::migration::network::floating_address::Noted as Addresses;
use crate::migration::network::hooks;
use crate::migration::preflight::layers;
use crate::migration::recovery::engines::{self, Leaving};
use crate::migration::recovery::socket_names;
use crate::network::hook::HookPhase;
use crate::oci::runtime::Runtime;
use crate::report::failures::{Failures, NamedStep};
use crate::sys::netns::NetNs;
use crate::tasks::criu_rescue;

/// Time that the frozen tasks may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// A container that has left.
struct Release<'a> {
    record: Record,
    runtime: Runtime,
    journal: &'a mut Journal,
    /// What is done when nobody here can be heard any more, before the network goes.
    before_network: Option<Box<dyn FnOnce() + 'a>>,
    /// Its network. One without a name can only be found as long as its tasks are there.
    network: Option<(NetNs, PathBuf)>,
    addresses: Option<Addresses>,
    /// Its engine, which is being told.
    leaving: Option<Leaving>,
    /// Whether its engine knows that it has left.
    told: bool,
    /// Whether its tasks are gone.
    ended: bool,
}

/// All steps, in their order: nobody can be heard any more before what keeps them silent goes, and what others
/// may use goes last, if all else went well.
fn steps<'a>() -> [NamedStep<Release<'a>>; 17] {
    [
        ("waiting for CRIU", |it, _| it.await_criu()),
        ("removing spare names of sockets", |it, _| socket_names::remove(&it.record)),
        ("leading packets on", |it, _| it.lead()),
        ("having the engine let go", |it, _| it.begin_telling()),
        ("ending the frozen tasks", |it, _| it.end_tasks()),
        ("switching the forwarding", |it, _| it.switch_forwarding()),
        ("sending packets along", |it, _| it.call_before_network()),
        ("telling the engine", |it, _| it.end_telling()),
        ("removing the container's network", |it, _| it.remove_network()),
        ("letting go of the floating addresses", |it, _| it.let_addresses_go()),
        ("letting go of the address", |it, _| it.let_host_go()),
        ("calling the hook", |it, _| it.call_hook()),
        ("deleting the container", |it, _| delete(&it.runtime, &it.record, it.record.init)),
        ("unmounting its root file system", |it, before| it.unmount(before)),
        ("removing what was copied", |it, before| it.remove_files(before)),
        ("lifting the away-mark", |it, _| it.lift_mark()),
        ("writing the journal", |it, _| it.close_journal()),
    ]
}

/// Clears away what is left of a container that has moved; calls `before_network` when its tasks are gone.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn release_source(journal: &mut Journal, before_network: impl FnOnce()) -> Result<()> {
    let record = journal.record.clone();
    let mut it = Release {
        runtime: runtime(&record),
        journal,
        before_network: Some(Box::new(before_network)),
        network: None,
        addresses: Addresses::of(&record),
        leaving: None,
        told: false,
        ended: true,
        record,
    };
    let mut failures = Failures::default();
    failures.try_all(&steps(), &mut it);
    failures.into_result()
}

impl Release<'_> {
    fn await_criu(&self) -> Result<()> {
        criu::wait_for(&self.record.work);
        Ok(())
    }

    fn lead(&mut self) -> Result<()> {
        self.network = own_network(&self.record);
        forward::source_leads(&self.record);
        Ok(())
    }

    fn begin_telling(&mut self) -> Result<()> {
        self.leaving = engines::leave(&self.record, &self.runtime);
        Ok(())
    }

    fn end_tasks(&mut self) -> Result<()> {
        let cgroup = self.record.cgroup.as_ref().filter(|_| self.record.init_lives());
        let Some(cgroup) = cgroup else { return Ok(()) };
        if self.record.forward.is_some() || self.addresses.is_some() {
            criu_rescue::silence_sockets(cgroup);
        }

        let killed = cgroup.kill(KILL_TIMEOUT);
        self.ended = killed.is_ok();
        if self.ended && self.record.engine.is_some() {
            // To the runtime it is paused as long as its group is frozen, and then an engine that has seen
            // it end cannot take it away.
            let _ = cgroup.thaw();
        }
        killed
    }

    fn switch_forwarding(&self) -> Result<()> {
        forward::source_goes(&self.record);
        Ok(())
    }

    fn call_before_network(&mut self) -> Result<()> {
        if let Some(call) = self.before_network.take() {
            call();
        }
        Ok(())
    }

    fn end_telling(&mut self) -> Result<()> {
        let Some(leaving) = self.leaving.take() else { return Ok(()) };
        let done = leaving.end();
        self.told = done.is_ok();
        done
    }

    /// The fence is closed and goes with the namespace: no kernel answers for the container.
    fn remove_network(&mut self) -> Result<()> {
        let network = self.network.take();
        let kept = forward::source_gone(&self.record);
        // Behind its closed fence it goes on, for whoever forwards.
        let removed = match network {
            Some((namespace, path)) if !matches!(kept, Ok(true)) => {
                remove_network(&namespace, &path, &self.record)
            }
            _ => Ok(()),
        };
        kept.map(|_| ()).and(removed)
    }

    fn let_addresses_go(&self) -> Result<()> {
        // Whoever is there still must not be heard.
        let addresses = self.addresses.as_ref().filter(|_| self.ended);
        addresses.map_or(Ok(()), Addresses::goes)
    }

    fn let_host_go(&self) -> Result<()> {
        host_side(&self.record).map_or(Ok(()), |(side, host)| Ok(side.clear(&host)?))
    }

    fn call_hook(&self) -> Result<()> {
        hooks::end(&self.record, HookPhase::Release);
        Ok(())
    }

    fn unmount(&self, before: &Failures) -> Result<()> {
        let place = self.record.unmount.as_deref().filter(|_| before.is_empty());
        place.map_or(Ok(()), |place| layers::unmount(place, &self.record.remove))
    }

    fn remove_files(&self, before: &Failures) -> Result<()> {
        // Whoever could not be ended, or has come in its place, may use it.
        if !before.is_empty() {
            return Ok(());
        }
        let mut failures = Failures::default();
        for path in &self.record.remove {
            failures.note(&path.display().to_string(), walk::remove_real(path));
        }
        failures.into_result()
    }

    fn lift_mark(&self) -> Result<()> {
        if self.record.leave_mark {
            return Ok(());
        }
        if mark_may_go(self.record.engine.is_some(), self.told) {
            return lift_mark(self.journal);
        }
        tracing::warn!("the away-mark stays: the engine may start the container again");
        Ok(())
    }

    fn close_journal(&mut self) -> Result<()> {
        workdir::remove(&self.record.work);
        self.journal.write(State::Finished)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::in_order;
    use super::*;

    /// Nobody is heard twice, and nothing goes that somebody uses.
    #[test]
    fn what_has_left_ends_before_what_was_its_own() {
        let engine = ["having the engine let go", "ending the frozen tasks", "telling the engine"];
        in_order(&steps(), &engine);
        let network = [
            "waiting for CRIU",
            "leading packets on",
            "ending the frozen tasks",
            "sending packets along",
            "removing the container's network",
            "letting go of the floating addresses",
        ];
        in_order(&steps(), &network);
        let files = [
            "ending the frozen tasks",
            "deleting the container",
            "unmounting its root file system",
            "removing what was copied",
            "writing the journal",
        ];
        in_order(&steps(), &files);
        // An engine that was not told may start it again.
        in_order(&steps(), &["telling the engine", "lifting the away-mark", "writing the journal"]);
    }
}
