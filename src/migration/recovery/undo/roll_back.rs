//! The source, before the commit: the container runs on as if nothing had happened.

use std::time::Duration;

use anyhow::{Result, anyhow};

use super::{StaysFrozen, await_calls, host_side, lift_mark, remove_fence};
use crate::connections::{self, GuardCommand, GuardCommands, Vault};
use crate::migration::forwarding::steps as forward;
use crate::migration::journal::{Journal, Record, State, criu, workdir};
use crate::migration::network::floating_address::Noted as Addresses;
use crate::migration::network::hooks;
use crate::migration::recovery::socket_names;
use crate::network;
use crate::network::hook::HookPhase;
use crate::oci::cgroup::Cgroup;
use crate::report::failures::{Failures, NamedStep};
use crate::sys::netns::NetNs;
use crate::tasks::criu_rescue::{self, TaskSnapshot, TracerWatch};

/// Time in which tasks that CRIU has left come to stand still, to be mended.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether the other host may still let its copy run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// Nobody has said otherwise.
    Possible,
    /// It has said that it never will, or an operator has.
    Excluded,
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

/// A container that is taken back.
struct RollBack<'a> {
    record: Record,
    /// Its control group, if its tasks are there.
    cgroup: Option<Cgroup>,
    hands: &'a Hands<'a>,
    /// Whether it was handed over, and the destination may have told everybody where it is.
    committed: bool,
    /// Whether CRIU may have worked in its tasks, and they stand still now.
    stopped: bool,
    /// So that its mark can be found.
    journal: &'a Journal,
}

/// All steps, in their order: the tasks are whole before their network is, and that before they run.
fn steps<'a>() -> [NamedStep<RollBack<'a>>; 13] {
    [
        ("ending the forwarding", |it, _| it.end_forwarding()),
        ("waiting for CRIU", |it, _| it.await_criu()),
        ("stopping the tasks", |it, _| it.stop()),
        ("mending what was worked in", |it, _| it.mend()),
        ("putting connections back", |it, _| it.put_back()),
        ("waking sockets", |it, _| it.wake_sockets()),
        ("giving sockets their names back", |it, _| socket_names::give_back(&it.record)),
        ("removing the fence", |it, _| remove_fence(&it.record)),
        ("keeping the addresses", |it, _| it.keep_addresses()),
        ("letting this host answer again", |it, _| it.answer_here()),
        ("thawing the container", |it, _| it.thaw()),
        ("lifting the away-mark", |it, _| lift_mark(it.journal)),
        // Clients have been waiting: what may take its time comes last.
        ("calling the hook", |it, _| it.call_hook()),
    ]
}

/// Takes a container back that has not left.
///
/// # Errors
/// Says which steps failed; the others were done. None was where it is [`StaysFrozen`].
pub fn roll_back_source(journal: &mut Journal, hands: &Hands, rival: Rival) -> Result<()> {
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

    // After a reboot somebody else may be in a group of that name.
    let cgroup = record.cgroup.clone().filter(|_| record.init_lives());
    let mut it = RollBack { record, cgroup, hands, committed, stopped: false, journal };
    let mut failures = Failures::default();
    failures.try_all(&steps(), &mut it);

    // What could not be undone stays open, for `ferry resolve` to try again.
    failures.into_result()?;
    workdir::remove(&it.record.work);

    journal.write(State::Aborted)
}

impl RollBack<'_> {
    /// Returns its control group, if CRIU may have been at work in its tasks.
    fn worked_in(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref().filter(|_| self.record.work.criu().pid().exists())
    }

    fn end_forwarding(&self) -> Result<()> {
        forward::source_stays(&self.record, self.committed);
        Ok(())
    }

    fn await_criu(&self) -> Result<()> {
        criu::wait_for(&self.record.work);
        Ok(())
    }

    /// A CRIU that was killed leaves the tasks running, with their sockets in repair mode. Mending wants them to
    /// stand still; if they cannot, they run on as they are.
    fn stop(&mut self) -> Result<()> {
        let Some(cgroup) = self.worked_in() else { return Ok(()) };
        match cgroup.freeze(FREEZE_TIMEOUT) {
            Ok(()) => self.stopped = true,
            Err(_) if connections::are_out(&self.record.work) => {
                return Err(anyhow!(
                    "its tasks do not stand still, and connections stay out of them"
                ));
            }
            Err(_) => {}
        }
        Ok(())
    }

    fn mend(&self) -> Result<()> {
        let Some(cgroup) = self.worked_in().filter(|_| self.stopped) else { return Ok(()) };
        let work = self.record.work.criu();
        TaskSnapshot::read(&work).map_or(Ok(()), |noted| noted.put_back(cgroup, &work))
    }

    fn put_back(&self) -> Result<()> {
        let out = self.stopped && connections::are_out(&self.record.work);
        let Some(cgroup) = self.worked_in().filter(|_| out) else { return Ok(()) };

        let alone =
            |vault: &Vault| connections::put_back(vault, cgroup, &self.record.work, |_| Ok(()));
        match self.hands {
            Hands::Own { orders, watch, vault } => {
                orders.ask(GuardCommand::PutBack, Some(watch)).unwrap_or_else(|| {
                    // It was killed, perhaps in the middle of it.
                    let mended = self.mend();
                    alone(vault).and(mended)
                })
            }
            Hands::Later(Some(vault)) => alone(vault),
            // Whoever held them was killed together with Ferry.
            Hands::Later(None) => {
                tracing::error!("connections that had been taken out of the container are lost");
                Ok(())
            }
        }
    }

    fn wake_sockets(&self) -> Result<()> {
        if let Some(cgroup) = self.worked_in().filter(|_| self.stopped) {
            criu_rescue::sockets(cgroup);
        }
        Ok(())
    }

    /// The destination may have told everybody that they are there.
    fn keep_addresses(&self) -> Result<()> {
        Addresses::of(&self.record).map_or(Ok(()), |addresses| addresses.stays(self.committed))
    }

    fn answer_here(&self) -> Result<()> {
        let side = host_side(&self.record);
        let restored = side.as_ref().map_or(Ok(()), |(side, host)| side.restore(host));
        if self.committed {
            // The destination may have told everybody that the address is there.
            take_address_back(&self.record);
            let _ = side.map(|(side, host)| side.announce(&host));
        }
        Ok(restored?)
    }

    fn thaw(&self) -> Result<()> {
        let Some(cgroup) = &self.cgroup else { return Ok(()) };
        let thawed = cgroup.thaw();
        if self.worked_in().is_some() {
            criu_rescue::mappings(cgroup);
            await_calls(cgroup);
        }
        thawed
    }

    fn call_hook(&self) -> Result<()> {
        hooks::end(&self.record, HookPhase::Rollback);
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::super::tests::in_order;
    use super::*;

    /// The tasks have all that is theirs before anybody hears of them, and run last of all.
    #[test]
    fn a_container_is_whole_before_it_runs_on() {
        in_order(
            &steps(),
            &["waiting for CRIU", "stopping the tasks", "mending what was worked in"],
        );
        let whole = ["mending what was worked in", "putting connections back", "waking sockets"];
        in_order(&steps(), &whole);
        in_order(&steps(), &["waking sockets", "removing the fence", "thawing the container"]);
        in_order(&steps(), &["giving sockets their names back", "thawing the container"]);
        in_order(&steps(), &["keeping the addresses", "thawing the container"]);
        in_order(&steps(), &["letting this host answer again", "thawing the container"]);
        // An engine must not start a second one as long as this one stands still.
        in_order(&steps(), &["thawing the container", "lifting the away-mark", "calling the hook"]);
    }
}
