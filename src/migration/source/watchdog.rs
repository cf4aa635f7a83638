//! The clock that a blocked write cannot stop.
//!
//! The hand-over's own limits are looked at where it waits for something to happen. A write into a
//! link that has died without saying so (a pulled cable, a stopped peer) waits in the kernel, for
//! minutes, with the container frozen. So a thread of its own cuts the link when the time is over;
//! every write then fails, and the hand-over goes the way of any broken link.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::transport::connect::Cutter;

/// Who waits properly for his own limit is to see it first.
const GRACE: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct WatchdogState {
    deadline: Option<Instant>,
}

/// The deadline of a link, and the thread that cuts it then.
#[derive(Clone, Debug)]
pub struct Watchdog(Arc<(Mutex<WatchdogState>, Condvar)>);

impl Watchdog {
    /// Starts to watch, without a deadline.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(cutter: Cutter) -> Result<Watchdog> {
        let watch = Watchdog(Arc::default());
        let shared = watch.0.clone();
        std::thread::Builder::new().name("watch".into()).spawn(move || {
            let (state, changed) = &*shared;
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let left = state.deadline.map(|d| d.saturating_duration_since(Instant::now()));
                state = match left {
                    Some(Duration::ZERO) => return cutter.cut(),
                    Some(left) => {
                        changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                    }
                    None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                };
            }
        })?;
        Ok(watch)
    }

    fn change(&self, f: impl FnOnce(&mut WatchdogState)) {
        let (state, changed) = &*self.0;
        f(&mut state.lock().unwrap_or_else(PoisonError::into_inner));
        changed.notify_one();
    }

    /// The link is cut shortly after `deadline`.
    pub fn until(&self, deadline: Instant) {
        self.change(|s| s.deadline = Some(deadline + GRACE));
    }

    /// The container has been handed over: whatever was to be over before that cuts nothing any more. What
    /// is awaited after it has a limit of its own.
    pub fn decided(&self) {
        self.change(|s| s.deadline = None);
    }

    /// Somebody wants it to end: it has `patience` left.
    pub fn hurry(&self, patience: Duration) {
        let at = Instant::now() + patience;
        self.change(|s| s.deadline = Some(s.deadline.map_or(at, |d| d.min(at))));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_write_that_nobody_reads_ends_when_the_time_is_over() {
        let (mut here, _there) = UnixStream::pair().unwrap();
        let watch = Watchdog::start(Cutter::Socket(here.try_clone().unwrap())).unwrap();
        watch.until(Instant::now());
        let bytes = vec![0; 64 << 20];
        assert!(here.write_all(&bytes).is_err());
    }

    /// Neither the limit of the freeze nor a signal cuts a link over which the commit is to go.
    #[test]
    fn what_was_before_the_decision_cuts_nothing_after_it() {
        let pair = || UnixStream::pair().unwrap();
        let ((mut here, _there), (mut other, _end)) = (pair(), pair());
        let watch =
            |link: &UnixStream| Watchdog::start(Cutter::Socket(link.try_clone().unwrap())).unwrap();
        let (decided, later) = (watch(&here), watch(&other));
        decided.until(Instant::now());
        decided.hurry(Duration::from_millis(100));
        decided.decided();
        later.hurry(Duration::from_millis(200));
        // When the one has been cut, the other would have been long before.
        let bytes = vec![0; 64 << 20];
        assert!(other.write_all(&bytes).is_err());
        here.write_all(b"commit").unwrap();
    }

    #[test]
    fn who_is_hurried_has_no_more_time_than_that() {
        let (mut here, _there) = UnixStream::pair().unwrap();
        let watch = Watchdog::start(Cutter::Socket(here.try_clone().unwrap())).unwrap();
        watch.until(Instant::now() + Duration::from_secs(3600));
        watch.hurry(Duration::ZERO);
        let bytes = vec![0; 64 << 20];
        assert!(here.write_all(&bytes).is_err());
    }
}
