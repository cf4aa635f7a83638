//! A limit for what goes over the links (`--bandwidth`): one for memory and files on all of them
//! together, kept by waiting.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the limit allows at once.
const BURST: Duration = Duration::from_millis(20);

/// The limit, if there is one. A clone counts together with what it was made of.
#[derive(Clone, Debug, Default)]
pub struct Pace(Option<Arc<RateLimit>>);

#[derive(Debug)]
struct RateLimit {
    /// Bytes a second.
    rate: u64,
    /// When the bytes sent so far are paid for.
    paid: Mutex<Instant>,
}

impl Pace {
    /// So many bytes a second, at most.
    pub fn new(rate: Option<u64>) -> Pace {
        let limit = |rate: u64| RateLimit { rate: rate.max(1), paid: Mutex::new(Instant::now()) };
        Pace(rate.map(|rate| Arc::new(limit(rate))))
    }

    /// The limit in bytes a second.
    pub fn rate(&self) -> Option<u64> {
        self.0.as_ref().map(|limit| limit.rate)
    }

    /// So many bytes have gone: waits until more may go.
    pub fn pay(&self, bytes: usize) {
        let Some(limit) = &self.0 else { return };
        let now = Instant::now();
        let until = {
            let mut paid = limit.paid.lock().unwrap_or_else(PoisonError::into_inner);
            *paid = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
            *paid += Duration::from_secs_f64(bytes as f64 / limit.rate as f64);
            *paid
        };
        std::thread::sleep(until.saturating_duration_since(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_who_send_are_held_to_it_together() {
        let pace = Pace::new(Some(1_000_000));
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let pace = pace.clone();
                scope.spawn(move || (0..10).for_each(|_| pace.pay(10_000)));
            }
        });
        // 300 KB, of which 20 KB may go at once.
        assert!(began.elapsed() >= Duration::from_millis(275), "{:?}", began.elapsed());
        let began = Instant::now();
        Pace::default().pay(usize::MAX);
        assert!(began.elapsed() < Duration::from_millis(200));
    }
}
