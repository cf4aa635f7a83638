//! Threads that do nothing but rewrite and check memory of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use crate::common::pages::{Content, Memory, SplitMix};

const PAGES: usize = 64;
const REST: Duration = Duration::from_millis(10);

/// What all of them share.
#[derive(Default)]
struct Shared {
    beats: AtomicU64,
    bad_pages: AtomicU64,
}

/// The running threads; they end with the process.
pub struct Threads {
    /// How many there are.
    pub count: u64,
    shared: Arc<Shared>,
}

impl Threads {
    /// Starts `count` threads.
    pub fn start(count: u64, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        for number in 0..count {
            let shared = Arc::clone(&shared);
            thread::spawn(move || work(seed ^ (number + 1) << 32, &shared));
        }
        Self { count, shared }
    }

    /// How often they came round, in all.
    pub fn beats(&self) -> u64 {
        self.shared.beats.load(Relaxed)
    }

    /// How many wrong pages they ever found.
    pub fn bad_pages(&self) -> u64 {
        self.shared.bad_pages.load(Relaxed)
    }
}

fn work(seed: u64, shared: &Shared) {
    let mut memory = Memory::new(Content::Random, seed, PAGES);
    let mut order = SplitMix(seed);
    loop {
        thread::sleep(REST);
        memory.rewrite(order.below(PAGES));
        let look_at = order.below(PAGES);
        shared.bad_pages.fetch_add(memory.bad_pages(look_at..look_at + 1), Relaxed);
        shared.beats.fetch_add(1, Relaxed);
    }
}
