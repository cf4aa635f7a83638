//! The destination, when the container runs: the rest of the work of whoever took it in.

use anyhow::Result;

use super::{await_calls, host_side, own_network, remove_fence, restored_init, runtime, state_dir};
use crate::migration::forwarding::steps as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::{Journal, Record, State, workdir};
use crate::migration::network::floating_address::Noted as Addresses;
use crate::migration::network::hooks;
use crate::migration::recovery::engines;
use crate::network::hook::HookPhase;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::Runtime;
use crate::report::failures::{Failures, NamedStep};
use crate::tasks::criu_rescue;

/// What opens a container's network, in this order: packets come here before anything is answered.
const OPEN: [NamedStep<Record>; 3] = [
    ("leading the address here", |record, _| lead_here(record)),
    ("removing the fence", |record, _| remove_fence(record)),
    ("keeping the addresses", |record, _| Addresses::of(record).map_or(Ok(()), |it| it.keep())),
];

/// The destination, when the container runs: it can be reached. Whatever is missing may still come.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn open_destination(record: &Record) -> Result<()> {
    let mut failures = Failures::default();
    failures.try_all(&OPEN, &mut record.clone());
    failures.into_result()
}

fn lead_here(record: &Record) -> Result<()> {
    if let (Some((side, host)), Some((namespace, _))) = (host_side(record), own_network(record)) {
        side.lead_here(&namespace, &host)?;
    }
    Ok(())
}

/// A container that has arrived.
struct Finish<'a> {
    record: Record,
    runtime: Runtime,
    cgroup: Option<Cgroup>,
    journal: &'a mut Journal,
    /// Whether it was here before.
    came_back: bool,
}

/// All steps, in their order: clients first, then what nobody waits for.
fn steps<'a>() -> [NamedStep<Finish<'a>>; 11] {
    [
        ("opening its network", |it, _| open_destination(&it.record)),
        ("waking sockets", |it, _| it.wake_sockets()),
        ("ending the forwarding", |it, _| it.end_forwarding()),
        ("calling the hook", |it, _| it.call_hook()),
        ("removing the work directory", |it, _| it.remove_work()),
        ("lifting the name's away-mark", |it, _| it.lift_names_mark()),
        ("lifting the away-mark", |it, _| it.lift_mark()),
        ("keeping what was copied", |it, _| settle_files(&it.record, it.came_back)),
        ("waiting for calls", |it, _| it.await_calls()),
        ("clearing what the engine noted", |it, _| it.keep_engines()),
        ("writing the journal", |it, before| it.close_journal(before)),
    ]
}

/// Finishes a migration whose container runs here, when whoever took it in has died.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn finish_destination(journal: &mut Journal) -> Result<()> {
    let record = journal.record.clone();
    let mut it = Finish {
        runtime: runtime(&record),
        cgroup: restored_init(&record).and_then(|init| Cgroup::of_process(init.pid).ok()),
        journal,
        came_back: false,
        record,
    };
    let mut failures = Failures::default();
    failures.try_all(&steps(), &mut it);
    failures.into_result()
}

impl Finish<'_> {
    /// He may not have come to waking the connections that he had made.
    fn wake_sockets(&self) -> Result<()> {
        self.cgroup.iter().for_each(criu_rescue::sockets);
        Ok(())
    }

    fn end_forwarding(&self) -> Result<()> {
        if let Some(note) = &self.record.forward {
            forward::finish_destination(note);
        }
        Ok(())
    }

    fn call_hook(&self) -> Result<()> {
        hooks::end(&self.record, HookPhase::Switch);
        Ok(())
    }

    fn remove_work(&self) -> Result<()> {
        workdir::remove(&self.record.work);
        self.runtime.clear_restore(&self.record.id_here());
        Ok(())
    }

    fn lift_names_mark(&self) -> Result<()> {
        let Some(made) = &self.record.engine else { return Ok(()) };
        AwayMark::remove_named(state_dir(self.journal), made.engine, &made.name).map(|_| ())
    }

    fn lift_mark(&mut self) -> Result<()> {
        let (root, id) = (self.runtime.root(), self.record.container.as_ref());
        self.came_back = AwayMark::remove(state_dir(self.journal), root, id)?;
        Ok(())
    }

    fn await_calls(&self) -> Result<()> {
        self.cgroup.iter().for_each(await_calls);
        Ok(())
    }

    fn keep_engines(&self) -> Result<()> {
        engines::keep(&self.record);
        Ok(())
    }

    /// What could not be done stays open, for `ferry resolve` to try again.
    fn close_journal(&mut self, before: &Failures) -> Result<()> {
        if before.is_empty() { self.journal.write(State::Finished) } else { Ok(()) }
    }
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
    use super::super::tests::in_order;
    use super::*;

    /// Clients are answered first, and what decides whether files stay is known before they do.
    #[test]
    fn clients_come_first() {
        in_order(&OPEN, &["leading the address here", "removing the fence"]);
        in_order(&steps(), &["opening its network", "waking sockets", "calling the hook"]);
        in_order(&steps(), &["opening its network", "removing the work directory"]);
        in_order(&steps(), &["lifting the away-mark", "keeping what was copied"]);
        assert_eq!(steps().last().map(|step| step.0), Some("writing the journal"));
    }
}
