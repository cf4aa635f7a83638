//! CRIU's work, step by step: what a dump and a restore have in common.

use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};

use crate::criu::interposer::{CriuEvent, CriuSession, Notify};

/// What is done at CRIU's steps. It waits at each of them, for an answer.
pub(super) trait CriuSteps {
    /// What CRIU does, for messages.
    const WHAT: &'static str;
    /// Time that CRIU may take for anything that does not wait for us.
    const LIMIT: Duration;

    /// CRIU has come to a step, and is to be answered; see action-scripts in criu(8).
    ///
    /// # Errors
    /// Ends it.
    fn at(&mut self, session: &CriuSession, notify: &Notify) -> Result<()>;

    /// CRIU has ended without having said how.
    ///
    /// # Errors
    /// Where that is not as it should be.
    fn hung_up(&mut self) -> Result<()>;

    /// Says what CRIU has failed with.
    fn explain(&self, error: Error) -> Error;
}

/// Follows CRIU to its end.
///
/// # Errors
/// Of a step, or [explained](CriuSteps::explain) where CRIU has failed.
pub(super) fn follow<S: CriuSteps>(session: &CriuSession, steps: &mut S) -> Result<()> {
    loop {
        match session.next(Some(Instant::now() + S::LIMIT)).context(S::WHAT)? {
            CriuEvent::Notify(notify) => steps.at(session, &notify)?,
            // The runtime may be gone already; its opinion is of no use.
            CriuEvent::Reply(response) => {
                return session.relay_reply(&response).map_err(|e| steps.explain(e));
            }
            CriuEvent::Hangup => return steps.hung_up().map_err(|e| steps.explain(e)),
        }
    }
}
