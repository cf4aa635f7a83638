//! The calls of a network hook in the course of a migration; what it is for is told in
//! [`crate::network::hook`].

use std::fs;
use std::thread::JoinHandle;

use anyhow::Result;

use crate::migration::journal::Record;
use crate::migration::journal::workdir::WorkPath;
use crate::network::hook::{Hook, HookPhase};
use crate::problem::Problem;

/// A hook that is prepared.
#[derive(Debug)]
pub struct Hooks {
    hook: Hook,
    work: WorkPath,
    switching: Option<JoinHandle<Result<(), Problem>>>,
}

impl Hooks {
    /// Notes it in the work directory, for whoever undoes the migration, and calls it.
    ///
    /// # Errors
    /// When it refuses.
    pub fn prepare(hook: Hook, work: &WorkPath) -> Result<Hooks> {
        fs::write(work.hook(), serde_json::to_vec(&hook)?)?;
        hook.call(HookPhase::Prepare, work)?;
        Ok(Hooks { hook, work: work.clone(), switching: None })
    }

    /// The container has a new host: the hook is told beside everything else, and `done` called when it has
    /// ended, however it did. False where it cannot be called.
    pub fn switch(&mut self, done: impl FnOnce() + Send + 'static) -> bool {
        let (hook, work) = (self.hook.clone(), self.work.clone());
        let call = move || {
            let result = hook.call(HookPhase::Switch, &work);
            done();
            result
        };
        match std::thread::Builder::new().name("hook".into()).spawn(call) {
            Ok(thread) => self.switching = Some(thread),
            Err(e) => tracing::error!("the network hook cannot be called: {e}"),
        }
        self.switching.is_some()
    }

    /// Waits for the end of that; what went wrong.
    pub fn switched(self) -> Option<Problem> {
        self.switching?.join().ok()?.err()
    }
}

/// Calls the hook of a migration that ends, where one was noted.
pub(in crate::migration) fn end(record: &Record, phase: HookPhase) {
    let hook = fs::read(record.work.hook()).ok();
    let hook: Option<Hook> = hook.and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(hook) = hook
        && let Err(e) = hook.call(phase, &record.work)
    {
        // Called again it would say the same: no reason to keep the migration open.
        tracing::error!("{e}");
    }
}
