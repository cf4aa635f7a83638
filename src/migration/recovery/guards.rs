//! The processes that outlive a killed Ferry, and go on in its place: by the steps of
//! [`crate::migration::recovery::undo`].

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::decide::{Doubt, Guarding, NextDeed, There, guard as decide, resolve};
use super::undo::Rival;
use super::{postcopy_recover, undo, verdicts, word};
use crate::connections::{self, GuardCommand, GuardCommands, GuardSocket, Vault};
use crate::migration::journal::criu;
use crate::migration::journal::{Journal, Record, State};
use crate::migration::protocol::Standing;
use crate::migration::transfer::memory_sender::MemoryOptions;
use crate::sys::fault;
use crate::sys::process::{self, ProcessId};
use crate::transport::backoff::Backoff;

/// Time that the other host may take for one answer: so long an operator has to wait for the journal.
const ANSWER: Duration = Duration::from_secs(15);
/// Between two tries to reach the other host, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Where the vault's contents come out of it.
const STDOUT: i32 = 1;

/// The process that brings the container back if this one is killed.
pub struct SourceGuard {
    child: Child,
    /// What it is told.
    pub orders: GuardCommands,
}

impl SourceGuard {
    /// Starts it. Its standard output is where the vault's contents come out.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn spawn(journal: &Journal, vault: &Vault) -> Result<SourceGuard> {
        let (orders, theirs) = GuardCommands::pair()?;
        let work = &journal.record.work;
        let mut command = Command::new("/proc/self/exe");
        command.arg("__guard").arg(journal.path());
        command.stdin(theirs).stderr(File::create(work.guard_log())?);
        command.stdout(vault.exit().try_clone_to_owned()?);
        process::in_new_session(&mut command);
        let child = command.spawn().context("cannot start the guard process")?;
        let mut guard = SourceGuard { child, orders };
        let pid = guard.child.id() as i32;
        // Whoever runs out of memory is to find another victim. Needs CAP_SYS_RESOURCE;
        // proc_pid_oom_score_adj(5).
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000");
        let it = ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 });
        let noted = fs::write(work.guards(), it.to_string());
        if let Err(e) = noted.map_err(Into::into).and_then(|()| guard.orders.are_for(pid)) {
            guard.dismiss();
            return Err(e);
        }
        Ok(guard)
    }

    /// The container runs on, and the destination may not know it: the guard goes on telling it.
    pub fn send_word(&self) {
        self.orders.send(GuardCommand::Told);
    }

    /// There is nothing to guard any more.
    pub fn dismiss(&mut self) {
        self.orders.send(GuardCommand::Done);
        let _ = self.child.wait();
    }
}

/// A guard whose Ferry has ended, and which has something that nobody else has.
pub struct LeftGuard {
    pidfd: OwnedFd,
    /// Connections that were taken out of the tasks.
    pub vault: Vault,
}

impl LeftGuard {
    /// That of a migration, if it is still there.
    pub fn find(record: &Record) -> Option<LeftGuard> {
        let text = fs::read_to_string(record.work.guards()).ok()?;
        let it = ProcessId::read(&text)?;
        let pidfd = process::pidfd_open(it.pid).ok()?;
        // Whoever the descriptor stands for: it was he after it had been opened.
        let same = it.is_alive().then_some(&pidfd)?;
        let vault = process::pidfd_getfd(same, STDOUT).ok()?;
        Some(LeftGuard { vault: Vault::from_exit(vault), pidfd })
    }

    /// Ends it: nobody needs what it has.
    pub fn end(self) {
        // It has ended by itself.
        let _ = process::pidfd_kill(&self.pidfd, libc::SIGKILL);
    }
}

/// Returns what neither a Ferry nor its guard has done, [undone](undo::roll_back_source) later.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn roll_back_source_later(journal: &mut Journal, rival: Rival) -> Result<()> {
    let guard = LeftGuard::find(&journal.record);
    let vault = guard.as_ref().map(|guard| &guard.vault);
    undo::roll_back_source(journal, &undo::Hands::Later(vault), rival)?;
    guard.into_iter().for_each(LeftGuard::end);
    Ok(())
}

/// The same, [finished](undo::release_source).
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn release_source_later(journal: &mut Journal) -> Result<()> {
    let guard = LeftGuard::find(&journal.record);
    undo::release_source(journal, || ())?;
    // In repair mode its connections end without a word.
    guard.into_iter().for_each(LeftGuard::end);
    Ok(())
}

/// The guard: a process that outlives a killed Ferry and brings the source back.
///
/// Its standard input is where it hears [orders](GuardCommand), its standard output the exit of the
/// [`Vault`]. When Ferry has died the journal says whether the container is still the source's.
///
/// # Errors
/// When undoing failed.
pub fn guard(journal: &Path) -> Result<()> {
    let (input, vault) = (std::io::stdin(), std::io::stdout().as_fd().try_clone_to_owned()?);
    let (ears, vault) = (GuardSocket(&input), Vault::from_exit(vault));
    let mut journal = Journal::open(journal)?;
    let told = loop {
        match ears.next() {
            Some(GuardCommand::Done) => return Ok(()),
            Some(GuardCommand::Told) => break true,
            // If Ferry has died meanwhile, the next word tells.
            Some(order) => drop(ears.answer(&obey(order, &journal.record, &vault, &ears))),
            None => break false,
        }
    };

    // A Ferry that was killed does nothing more when this returns, none of its threads, and traces nobody.
    let mut held = journal.hold()?;
    let done = loop {
        match decide(journal.state(), told) {
            Guarding::RunOn => {
                let hands = undo::Hands::Later(Some(&vault));
                let undone = undo::roll_back_source(&mut journal, &hands, Rival::Possible);
                drop(held);
                let heard = word::send(&mut journal);
                if undone.is_ok() || !heard.is_some_and(excludes) {
                    break undone;
                }

                // Whatever has kept it from running on, nothing runs elsewhere any more.
                let _held = journal.hold()?;
                break undo::roll_back_source(&mut journal, &hands, Rival::Excluded);
            }
            Guarding::CarryThrough => {
                // Whoever asks for its address here is answered by nobody whom he could reach; that is no
                // reason to leave it frozen.
                let hushed = fault::point("guard.silence")
                    .and_then(|()| undo::silence_host(&journal.record));
                let _ = hushed.inspect_err(|e| tracing::error!("{e:#}"));

                criu::wait_for(&journal.record.work);
                drop(held);
                match carry_through(&mut journal, &vault) {
                    // Whoever has begun to take it back may have been killed in the middle.
                    Ok(Carried::Overtaken) => held = journal.hold()?,
                    Ok(Carried::Through) => break Ok(()),
                    Err(e) => break Err(e),
                }
            }
            Guarding::Tell => {
                drop(held);
                word::send(&mut journal);
                break Ok(());
            }
            Guarding::Nothing => break Ok(()),
        }
    };

    let done = done.context("the guard of a migration");
    if connections::are_out(&journal.record.work) {
        if let Err(e) = &done {
            tracing::error!("{e:#}");
        }
        // Without them what is frozen here is not whole: `ferry resolve` takes them, and ends this.
        loop {
            std::thread::park();
        }
    }

    done
}

/// Tells whether a destination that answers so will never let a copy run.
fn excludes(standing: Standing) -> bool {
    matches!(standing, Standing::NeverRan | Standing::Gone)
}

/// How carrying through has ended.
enum Carried {
    /// It is over, or only an operator can say.
    Through,
    /// Somebody else has decided otherwise.
    Overtaken,
}

/// Tells the destination that it owns the container until it has heard, however long that takes, and
/// clears away what it needs no more; or takes the container back, where the destination's copy never
/// ran. Each time under the lock, and only if the journal still says so: an operator who takes it back
/// must not be overtaken.
fn carry_through(journal: &mut Journal, vault: &Vault) -> Result<Carried> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut there = There::Unasked;
    loop {
        let held = journal.hold()?;
        if journal.state() != State::Committed {
            return Ok(Carried::Overtaken);
        }

        // Where nobody can say what is here, he may when it is asked again.
        let tasks = fault::point("guard.tasks").and_then(|()| undo::tasks(&journal.record));
        let next = match &tasks {
            Ok(tasks) => resolve(State::Committed, *tasks, there, None),
            Err(e) => {
                tracing::error!("{e:#}");
                NextDeed::Doubt(Doubt::Silent)
            }
        };

        match next {
            NextDeed::Ask(verdict) => {
                let answer = verdicts::ask(&journal.record, verdict, ANSWER);
                there = answer.map_or(There::Silent, There::Is);
                continue;
            }
            NextDeed::BringRest => {
                // Whatever breaks: the lock is let go before the next try.
                let unbroken = &mut |why: Option<&str>| why.is_none();
                let brought = postcopy_recover::resume(
                    &journal.record,
                    MemoryOptions::default(),
                    None,
                    unbroken,
                );

                there = There::Is(brought.standing());
                if !matches!(brought, postcopy_recover::Brought::Stopped) {
                    continue;
                }
            }
            NextDeed::LetGo => {
                undo::release_source(journal, || ())?;
                return Ok(Carried::Through);
            }
            NextDeed::RunsOn | NextDeed::Abandon => {
                // It has said so.
                let hands = undo::Hands::Later(Some(vault));
                undo::roll_back_source(journal, &hands, Rival::Excluded)?;
                return Ok(Carried::Through);
            }
            NextDeed::Doubt(doubt) if doubt.passes() => {}
            // Whether what is frozen here is to run again, the operator says.
            NextDeed::Doubt(_) | NextDeed::HandOver => return Ok(Carried::Through),
        }

        there = There::Unasked;
        drop(held);
        backoff.park();
    }
}

fn obey<S: AsFd + Sync>(
    order: GuardCommand,
    record: &Record,
    vault: &Vault,
    ears: &GuardSocket<S>,
) -> Result<()> {
    let cgroup = record.cgroup.as_ref().ok_or_else(|| anyhow!("it has no control group"))?;
    let begin = |thread| ears.introduce(thread);
    match order {
        GuardCommand::TakeOut => connections::take_out(cgroup, &record.work, begin),
        GuardCommand::PutBack => connections::put_back(vault, cgroup, &record.work, begin),
        GuardCommand::Done | GuardCommand::Told | GuardCommand::Watched => Ok(()),
    }
}
