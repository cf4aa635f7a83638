//! What Ferry has the guard do: whoever holds the tasks by ptrace(2) may not die in the middle of it,
//! and of the two the guard is the one that nobody has a reason to end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::sys::{process, scm};
use crate::tasks::criu_rescue::TracerWatch;

/// Nothing of it takes nearly as long.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest words about what went wrong.
const MOST_WORDS: usize = 4096;

/// What the guard is told. An end without `Done` or `Told` means that Ferry has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardCommand {
    /// There is nothing to guard any more.
    Done,
    /// The container runs on, and the destination may not know it.
    Told,
    /// Take out of the tasks what is [noted](crate::connections::are_out).
    TakeOut,
    /// Put it back.
    PutBack,
    /// Go on: whoever asked watches over you.
    Watched,
}

const ALL: [(u8, GuardCommand); 5] = [
    (b'd', GuardCommand::Done),
    (b't', GuardCommand::Told),
    (b'o', GuardCommand::TakeOut),
    (b'b', GuardCommand::PutBack),
    (b'w', GuardCommand::Watched),
];

/// What the guard answers.
const THREAD: u8 = b't';
const DONE: u8 = b'd';
const FAILED: u8 = b'f';

/// Ferry's end.
#[derive(Clone, Debug)]
pub struct GuardCommands(Arc<Mutex<GuardProcess>>);

#[derive(Debug)]
struct GuardProcess {
    socket: OwnedFd,
    /// Its process, pidfd_open(2).
    process: Option<OwnedFd>,
}

impl GuardCommands {
    /// It, and the guard's.
    ///
    /// # Errors
    /// When there can be no sockets.
    pub fn pair() -> Result<(GuardCommands, OwnedFd)> {
        let (own, theirs) = scm::seqpacket_pair()?;
        let guard = GuardProcess { socket: own, process: None };
        Ok((GuardCommands(Arc::new(Mutex::new(guard))), theirs))
    }

    /// Returns who has the other end: it has gone only when this process has.
    ///
    /// # Errors
    /// When it has already.
    pub fn are_for(&self, pid: i32) -> Result<()> {
        self.guard().process = Some(process::pidfd_open(pid)?);
        Ok(())
    }

    fn guard(&self) -> MutexGuard<'_, GuardProcess> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says it; nobody waits.
    pub fn send(&self, order: GuardCommand) {
        // One that has been killed does not need it any more.
        let _ = send(&self.guard().socket, order);
    }

    /// Has it done; what becomes of the tasks if the guard is killed in the middle of it is left to
    /// `watch`. `None`: there is no guard any more, and nobody who holds tasks.
    pub fn ask(&self, order: GuardCommand, watch: Option<&TracerWatch>) -> Option<Result<()>> {
        let guard = self.guard();
        let answer = heard(&guard.socket, order, watch);
        if let (None, Some(process)) = (&answer, &guard.process) {
            // Of one that says nothing nobody knows what it does next. And whoever has ended closes the
            // socket before it lets go of the tasks.
            let _ = process::pidfd_kill(process, libc::SIGKILL);
            let _ = process::wait_readable(&[process.as_fd()], Some(Instant::now() + LIMIT));
        }
        answer
    }
}

/// Returns what the guard answers to an order, if it does.
fn heard(socket: &OwnedFd, order: GuardCommand, watch: Option<&TracerWatch>) -> Option<Result<()>> {
    send(socket, order).ok()?;
    let until = Instant::now() + LIMIT;
    loop {
        process::wait_readable(&[socket.as_fd()], Some(until)).ok()?;
        let (words, _) = scm::receive(socket).ok().flatten()?;
        match words.split_first()? {
            (&THREAD, number) => {
                let number = <[u8; 4]>::try_from(number).map(i32::from_ne_bytes).ok()?;
                if let Some(watch) = watch {
                    watch.over(number);
                }
                send(socket, GuardCommand::Watched).ok()?;
            }
            (&DONE, _) => return Some(Ok(())),
            (_, why) => return Some(Err(anyhow!("{}", String::from_utf8_lossy(why)))),
        }
    }
}

fn send(socket: impl AsFd, order: GuardCommand) -> Result<()> {
    let byte = ALL.iter().find(|(_, one)| *one == order).map_or(0, |(byte, _)| *byte);
    Ok(scm::send(socket, &[byte], &[])?)
}

/// The guard's end.
#[derive(Debug)]
pub struct GuardSocket<'a, S: AsFd>(pub &'a S);

impl<S: AsFd> GuardSocket<'_, S> {
    /// The next order; `None` when Ferry has died.
    pub fn next(&self) -> Option<GuardCommand> {
        let (words, _) = scm::receive(self.0).ok().flatten()?;
        ALL.iter().find(|(byte, _)| words[..] == [*byte]).map(|(_, order)| *order)
    }

    /// Says who is about to hold tasks, and waits until somebody watches over him.
    ///
    /// # Errors
    /// When Ferry has died.
    pub fn introduce(&self, thread: i32) -> Result<()> {
        let mut words = vec![THREAD];
        words.extend(thread.to_ne_bytes());
        scm::send(self.0, &words, &[])?;
        match self.next() {
            Some(GuardCommand::Watched) => Ok(()),
            _ => bail!("Ferry has died"),
        }
    }

    /// Returns what has become of an order.
    ///
    /// # Errors
    /// When Ferry has died.
    pub fn answer(&self, done: &Result<()>) -> Result<()> {
        let mut words = vec![if done.is_ok() { DONE } else { FAILED }];
        if let Err(e) = done {
            let why = format!("{e:#}");
            words.extend(why.bytes().take(MOST_WORDS));
        }
        scm::send(self.0, &words, &[]).context("answering")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_answered() {
        let (orders, theirs) = GuardCommands::pair().unwrap();
        let guard = std::thread::spawn(move || {
            let ears = GuardSocket(&theirs);
            assert_eq!(ears.next(), Some(GuardCommand::TakeOut));
            ears.introduce(7).unwrap();
            ears.answer(&Ok(())).unwrap();
            assert_eq!(ears.next(), Some(GuardCommand::PutBack));
            ears.answer(&Err(anyhow!("it is gone"))).unwrap();
            assert_eq!(ears.next(), None);
        });
        orders.ask(GuardCommand::TakeOut, None).unwrap().unwrap();
        let failed = orders.ask(GuardCommand::PutBack, None).unwrap().unwrap_err();
        assert_eq!(failed.to_string(), "it is gone");
        drop(orders);
        guard.join().unwrap();
    }

    #[test]
    fn a_dead_guard_is_known() {
        let (orders, theirs) = GuardCommands::pair().unwrap();
        drop(theirs);
        assert!(orders.ask(GuardCommand::TakeOut, None).is_none());
    }
}
