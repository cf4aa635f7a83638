//! What ends a verb that may wait for others: a limit, and a signal.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::migration::protocol::session;
use crate::migration::recovery::verdicts;
use crate::report::exit::Exit;

/// More than anybody waits.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// How long a verb may wait, and a signal's way to end it between two steps, never in the middle of one.
#[derive(Clone, Debug)]
pub struct Bounds {
    until: Option<Instant>,
    step: Arc<Mutex<()>>,
}

impl Bounds {
    /// From now on; SIGINT, SIGTERM and SIGHUP end the process as soon as it waits again.
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub fn new(limit: Option<Duration>) -> Result<Bounds> {
        let step = Arc::<Mutex<()>>::default();
        let busy = step.clone();
        session::catch_signals(move |signal| {
            let _busy = busy.lock().unwrap_or_else(PoisonError::into_inner);
            let name = session::signal_name(signal);
            let _ = writeln!(std::io::stderr(), "interrupted by {name}: what is open stays so");
            std::process::exit(u8::from(Exit::InDoubt).into())
        })?;
        Ok(Bounds { until: limit.map(|limit| Instant::now() + limit), step })
    }

    /// The time that is left.
    pub fn left(&self) -> Duration {
        self.until.map_or(FOR_EVER, |until| until.saturating_duration_since(Instant::now()))
    }

    /// The same for a part, which may take no longer than so long.
    pub fn for_one(&self, limit: Duration) -> Bounds {
        let until = Instant::now() + self.left().min(limit);
        Bounds { until: Some(until), step: self.step.clone() }
    }

    /// Returns how long another host or process may take for one answer.
    pub fn answer(&self) -> Duration {
        self.left().min(verdicts::LIMIT)
    }

    /// A step that is not to be broken off.
    pub fn during<T>(&self, step: impl FnOnce() -> T) -> T {
        let _busy = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        step()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_ends_no_later_than_the_whole() {
        let whole = |limit| Bounds {
            until: Some(Instant::now() + Duration::from_secs(limit)),
            step: Arc::default(),
        };
        assert!(whole(2).for_one(Duration::from_secs(60)).left() <= Duration::from_secs(2));
        let part = whole(60).for_one(Duration::from_secs(2));
        assert!(part.left() <= Duration::from_secs(2) && part.left() > Duration::from_secs(1));
        assert_eq!(whole(0).left(), Duration::ZERO);
        let endless = Bounds { until: None, step: Arc::default() };
        assert_eq!(endless.left(), FOR_EVER);
        assert!(endless.for_one(Duration::from_secs(1)).left() <= Duration::from_secs(1));
    }
}
