//! The processes that outlive a killed Ferry, and go on in its place: by the steps of
//! [`crate::migration::recovery::recover`].

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::decide::{Guarding, Next, There, guard as decide, resolve};
use super::{recover, rest, settle, word};
use crate::connections::{self, Ears, Order, Orders, Vault};
use crate::migration::journal::criu;
use crate::migration::journal::workdir::GUARD;
use crate::migration::journal::{Journal, Record, State};
use crate::migration::transfer::carry::Wishes;
use crate::sys::process::{self, is_alive};

/// How long the other host may take for one answer: so long an operator has to wait for the journal.
const ANSWER: Duration = Duration::from_secs(15);
/// Between two tries to reach the other host, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// In the migration's directory: what the guard has to say.
const LOG: &str = "guard.log";
/// Where the vault's contents come out of it.
const STDOUT: i32 = 1;

/// The process that brings the container back if this one is killed.
pub struct SourceGuard {
    child: Child,
    /// What it is told.
    pub orders: Orders,
}

impl SourceGuard {
    /// Starts it. Its standard output is where the vault's contents come out.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn spawn(journal: &Journal, vault: &Vault) -> Result<SourceGuard> {
        let (orders, theirs) = Orders::pair()?;
        let work = &journal.record.work;
        let mut command = Command::new("/proc/self/exe");
        command.arg("__guard").arg(journal.path());
        command.stdin(theirs).stderr(File::create(work.join(LOG))?);
        command.stdout(vault.exit().try_clone_to_owned()?);
        process::in_new_session(&mut command);
        let child = command.spawn().context("cannot start the guard process")?;
        let mut guard = SourceGuard { child, orders };
        let pid = guard.child.id() as i32;
        // Whoever runs out of memory is to find another victim. Needs CAP_SYS_RESOURCE;
        // proc_pid_oom_score_adj(5).
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000");
        let started = process::start_time(pid).unwrap_or(0);
        let noted = fs::write(work.join(GUARD), format!("{pid} {started}"));
        if let Err(e) = noted.map_err(Into::into).and_then(|()| guard.orders.are_for(pid)) {
            guard.dismiss();
            return Err(e);
        }
        Ok(guard)
    }

    /// The container runs on, and the destination may not know it: the guard goes on telling it.
    pub fn send_word(&self) {
        self.orders.say(Order::Told);
    }

    /// There is nothing to guard any more.
    pub fn dismiss(&mut self) {
        self.orders.say(Order::Done);
        let _ = self.child.wait();
    }
}

/// A guard whose Ferry has ended, and which has something that nobody else has.
pub struct LeftGuard {
    pidfd: OwnedFd,
    /// It.
    pub vault: Vault,
}

impl LeftGuard {
    /// That of a migration, if it is still there.
    pub fn find(record: &Record) -> Option<LeftGuard> {
        let text = fs::read_to_string(record.work.join(GUARD)).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let (pid, started) = (pid.parse().ok()?, started.parse().ok()?);
        let pidfd = process::pidfd_open(pid).ok()?;
        // Whoever the descriptor stands for: it was he after it had been opened.
        let it = is_alive((pid, started)).then_some(&pidfd)?;
        let vault = process::pidfd_getfd(it, STDOUT).ok()?;
        Some(LeftGuard { vault: Vault::from_exit(vault), pidfd })
    }

    /// Ends it: nobody needs what it has.
    pub fn end(self) {
        // It has ended by itself.
        let _ = process::pidfd_kill(&self.pidfd, libc::SIGKILL);
    }
}

/// What neither a Ferry nor its guard has done, [undone](recover::source_runs_on) later.
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn source_runs_on_later(journal: &mut Journal) -> Result<()> {
    let guard = LeftGuard::find(&journal.record);
    let vault = guard.as_ref().map(|guard| &guard.vault);
    recover::source_runs_on(journal, &recover::Hands::Later(vault))?;
    guard.into_iter().for_each(LeftGuard::end);
    Ok(())
}

/// The same, [finished](recover::source_lets_go).
///
/// # Errors
/// Says which steps failed; the others were done.
pub fn source_lets_go_later(journal: &mut Journal) -> Result<()> {
    let guard = LeftGuard::find(&journal.record);
    recover::source_lets_go(journal, || ())?;
    // In repair mode its connections end without a word.
    guard.into_iter().for_each(LeftGuard::end);
    Ok(())
}

/// The guard: a process that outlives a killed Ferry and brings the source back.
///
/// Its standard input is where it hears [orders](Order), its standard output the exit of the
/// [`Vault`]. When Ferry has died the journal says whether the container is still the source's.
///
/// # Errors
/// When undoing failed.
pub fn guard(journal: &Path) -> Result<()> {
    let (input, vault) = (std::io::stdin(), std::io::stdout().as_fd().try_clone_to_owned()?);
    let (ears, vault) = (Ears(&input), Vault::from_exit(vault));
    let mut journal = Journal::open(journal)?;
    let told = loop {
        match ears.next() {
            Some(Order::Done) => return Ok(()),
            Some(Order::Told) => break true,
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
                let undone =
                    recover::source_runs_on(&mut journal, &recover::Hands::Later(Some(&vault)));
                drop(held);
                word::send(&mut journal);
                break undone;
            }
            Guarding::CarryThrough => {
                let hushed = recover::hush(&journal.record);
                criu::wait_for(&journal.record.work);
                drop(held);
                match hushed.and_then(|()| carry_through(&mut journal, &vault)) {
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
    let mut pause = Duration::from_millis(100);
    let mut there = There::Unasked;
    loop {
        let held = journal.hold()?;
        if journal.state() != State::Committed {
            return Ok(Carried::Overtaken);
        }
        match resolve(State::Committed, recover::tasks(&journal.record)?, there, None) {
            Next::Ask(verdict) => {
                let answer = settle::ask(&journal.record, verdict, ANSWER);
                there = answer.map_or(There::Silent, There::Is);
                continue;
            }
            Next::BringRest => {
                // Whatever breaks: the lock is let go before the next try.
                let unbroken = &mut |why: Option<&str>| why.is_none();
                let brought = rest::bring(&journal.record, Wishes::default(), None, unbroken);
                there = There::Is(brought.standing());
                if !matches!(brought, rest::Brought::Stopped) {
                    continue;
                }
            }
            Next::LetGo => {
                recover::source_lets_go(journal, || ())?;
                return Ok(Carried::Through);
            }
            Next::RunsOn | Next::Abandon => {
                recover::source_runs_on(journal, &recover::Hands::Later(Some(vault)))?;
                return Ok(Carried::Through);
            }
            Next::Doubt(doubt) if doubt.passes() => {}
            // Whether what is frozen here is to run again, the operator says.
            Next::Doubt(_) | Next::HandOver => return Ok(Carried::Through),
        }
        there = There::Unasked;
        drop(held);
        // Between two tries to reach a host there is nothing to wait on but time.
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn obey<S: AsFd + Sync>(
    order: Order,
    record: &Record,
    vault: &Vault,
    ears: &Ears<S>,
) -> Result<()> {
    let cgroup = record.cgroup.as_ref().ok_or_else(|| anyhow!("it has no control group"))?;
    let begin = |thread| ears.introduce(thread);
    match order {
        Order::TakeOut => connections::take_out(cgroup, &record.work, begin),
        Order::PutBack => connections::put_back(vault, cgroup, &record.work, begin),
        Order::Done | Order::Told | Order::Watched => Ok(()),
    }
}
