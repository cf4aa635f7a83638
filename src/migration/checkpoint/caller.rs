//! Whom the container's engine has called to restore it, and what the engine does meanwhile.
//!
//! An engine that makes the network in the first process's namespace wants to see that process there, and
//! no more of it. So it is told as soon as that is so, and makes the network while CRIU restores all else:
//! both take their time in the freeze.

use std::fs;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use crate::engine::calls::EngineCall;
use crate::migration::journal::workdir::WorkPath;
use crate::sys::netns::NetNs;
use crate::sys::process;

/// Until CRIU has brought the first process into its namespace.
const LIMIT: Duration = Duration::from_secs(60);
/// Between one look and the next.
const PAUSE: Duration = Duration::from_millis(1);

/// The call of an engine; there is none where no engine has called.
#[derive(Debug, Default)]
pub(super) struct Caller {
    call: Option<EngineCall>,
    /// What the engine was told early, and whether it went on.
    early: Option<JoinHandle<(EngineCall, Result<()>)>>,
}

impl Caller {
    pub fn new(call: Option<EngineCall>) -> Caller {
        Caller { call, early: None }
    }

    /// Has the one who was called run this; nothing if nobody was.
    ///
    /// # Errors
    /// When it cannot.
    pub fn run(&mut self, command: &Command) -> Result<Option<i32>> {
        self.call.as_mut().map(|call| call.run(command)).transpose()
    }

    /// The container's namespaces are there, and `init` is being restored by `criu`. `work` notes which the
    /// network namespace is, where an engine makes the network in it.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn begin(&mut self, work: &WorkPath, init: i32, criu: i32) -> Result<()> {
        let Ok(noted) = fs::read_to_string(work.network()) else { return Ok(()) };
        let wanted = namespace(&noted)?;
        let Some(mut call) = self.call.take_if(|call| call.starts_apart()) else { return Ok(()) };
        let is_there = move || {
            let namespace = NetNs::of_pid(init as u32).and_then(|namespace| namespace.identity());
            namespace.is_ok_and(|identity| identity == wanted)
        };
        let tell = move || {
            let until = Instant::now() + LIMIT;
            // CRIU tells nobody when it enters it.
            while !is_there() {
                if Instant::now() > until || !process::lives(criu) {
                    return (call, Err(anyhow!("the container does not come into its network")));
                }
                std::thread::park_timeout(PAUSE);
            }
            let told = call.restored(init, criu);
            (call, told)
        };
        self.early = Some(std::thread::Builder::new().name("engine".into()).spawn(tell)?);
        Ok(())
    }

    /// The container is restored and held, and the engine has done all that it does before it starts.
    ///
    /// # Errors
    /// When it has given up.
    pub fn restored(&mut self, init: i32, criu: i32) -> Result<()> {
        match (self.early.take(), &mut self.call) {
            (Some(early), _) => self.join(early),
            (None, Some(call)) => call.restored(init, criu),
            (None, None) => Ok(()),
        }
    }

    fn join(&mut self, early: JoinHandle<(EngineCall, Result<()>)>) -> Result<()> {
        let (call, told) = early.join().map_err(|_| anyhow!("a thread has died"))?;
        self.call = Some(call);
        told
    }

    /// Tells whether the engine knows what is restored, and waits for its end if it does not run.
    pub fn is_apart(&self) -> bool {
        self.call.as_ref().is_some_and(EngineCall::is_apart)
    }

    /// It runs, or why it does not; CRIU has gone.
    pub fn end(mut self, why: Option<String>) {
        if let Some(early) = self.early.take()
            && let Err(e) = self.join(early)
        {
            tracing::debug!("the engine: {e:#}");
        }
        if let Some(call) = self.call {
            call.end(why);
        }
    }
}

/// Device and inode, as they are noted.
fn namespace(noted: &str) -> Result<(u64, u64)> {
    let numbers: Result<Vec<u64>, _> = noted.split_whitespace().map(str::parse).collect();
    match numbers?.as_slice() {
        [device, inode] => Ok((*device, *inode)),
        _ => bail!("a namespace that is none"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_noted_by_two_numbers() {
        assert_eq!(namespace("4 4026532008").unwrap(), (4, 4026532008));
        for odd in ["", "4", "4 x", "4 5 6", "-1 5"] {
            assert!(namespace(odd).is_err(), "{odd}");
        }
    }
}
