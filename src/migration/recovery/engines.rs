//! A container's engine, at the end of a migration: on the source it learns that the container has left,
//! on a destination that gives up it takes away what it made.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::engine::calls::{self, EngineCall, EngineVerb};
use crate::engine::command::Running;
use crate::engine::handover;
use crate::migration::journal::Record;
use crate::network::curtain;
use crate::oci::runtime::Runtime;
use crate::sys::netns::NetNs;

/// Until it has called its runtime; then the container ends without its knowing before.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Until it has cleared away what it had.
const END_LIMIT: Duration = Duration::from_secs(60);

/// An engine that is being told that its container has left, or that will see it end.
pub(super) struct Leaving {
    call: Option<EngineCall>,
    running: Running,
}

/// Has the engine on the source checkpoint what is frozen, where it knows how: one that only sees it end
/// starts it again, by its restart policy, and is refused. `None` where that must do.
pub(super) fn leave(record: &Record, runtime: &Runtime) -> Option<Leaving> {
    let made = record.engine.as_ref().filter(|_| record.init_lives())?;
    let engine = handover::of(made.engine)?;
    let begun = (|| {
        let (root, work) = (runtime.root(), &*record.work);
        if !engine.is_told() {
            let running = engine.let_go(&made.container, work)?;
            return anyhow::Ok(Leaving { call: None, running });
        }
        let expected = calls::expect(EngineVerb::LetGo, &made.container, root, work, CALL_LIMIT)?;
        let running = engine.let_go(&made.container, work)?;
        let call = expected.call(running.pidfd()?, Instant::now() + CALL_LIMIT)?;
        Ok(Leaving { call: Some(call), running })
    })();
    begun
        .inspect_err(|e| tracing::warn!("{} sees the container end by itself: {e:#}", made.engine))
        .ok()
}

impl Leaving {
    /// It has ended.
    ///
    /// # Errors
    /// When the engine does not take it so.
    pub(super) fn end(self) -> Result<()> {
        if let Some(call) = self.call {
            call.end(None);
        }
        self.running.finish(END_LIMIT).context("the engine, of the container that has left")
    }
}

/// Has the engine on the destination take away what it made.
///
/// # Errors
/// What stays.
pub(super) fn discard(record: &Record) -> Result<()> {
    let Some(made) = &record.engine else { return Ok(()) };
    let done = handover::of(made.engine).map_or(Ok(()), |engine| engine.discard(made));
    // Until nobody has the container's hardware address here any more.
    if let Ok(host) = NetNs::current() {
        curtain::lift(&record.migration, &host)?;
    }
    done
}

/// The engine on the destination has it: where things were until then is of no use any more.
pub(in crate::migration) fn keep(record: &Record) {
    if let Some(made) = &record.engine {
        // They are empty, or never were.
        let _ = std::fs::remove_dir(&made.upper);
        let _ = (std::fs::remove_file(&made.log), std::fs::remove_file(&made.noted));
        let _ = std::fs::remove_file(made.archive());
    }
}
