//! Pauses between tries to reach a host: each twice as long as the one before, up to a longest.

use std::time::Duration;

/// The pauses of one thing that is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    /// Begins with `first`, and ends with `longest`.
    pub const fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff { next: first, first, longest }
    }

    /// Returns the pause that is due, and makes the one after it longer.
    pub fn pause(&mut self) -> Duration {
        let due = self.next;
        self.next = due.saturating_mul(2).min(self.longest);
        due
    }

    /// Waits for it. Between two tries to reach a host there is nothing to wait on but time; whoever knows of
    /// more unparks the thread.
    pub fn park(&mut self) {
        std::thread::park_timeout(self.pause());
    }

    /// Begins anew, when a try has come somewhere.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_begin_anew() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(60));
        let mut backoff = Backoff::new(first, longest);
        let pauses: Vec<_> = (0..20).map(|_| backoff.pause()).collect();
        assert_eq!(pauses[..3], [first, first * 2, first * 4]);
        assert!(pauses.is_sorted() && pauses.last() == Some(&longest));
        backoff.reset();
        assert_eq!(backoff.pause(), first);
    }
}
