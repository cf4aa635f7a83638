//! Pages that stayed on the source: which are left, and how much of them may be on its way at a time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::pages::{Reader, Task};
use crate::sys::memory::PAGE;
use crate::transport::frame::PageRun;

/// Bytes between two echoes.
pub const ECHO_EVERY: u64 = 128 << 10;
/// How much longer than the quickest an echo may take while nobody waits for pages.
const QUEUE: Duration = Duration::from_millis(10);
/// The same while somebody does: he waits behind what stands in buffers, fault by fault.
const QUEUE_WANTED: Duration = Duration::from_millis(1);
/// For so long after a page was wanted, others are thought to be.
const WANTED_FOR: Duration = Duration::from_millis(100);
/// The least that may be on its way.
const LEAST: u64 = ECHO_EVERY;
/// Pages that go in one piece, and while somebody waits for others.
const PIECE: u64 = 64;
const PIECE_WANTED: u64 = 16;

/// How much may be on its way at a time: enough to keep the link busy, and so little that a wanted
/// page finds no queue before it.
#[derive(Debug)]
pub struct Window {
    most: u64,
    out: u64,
    /// Echoes that are out: bytes since the one before, and when it was asked for.
    asked: VecDeque<(u64, Instant)>,
    quickest: Duration,
    wanted: Option<Instant>,
}

impl Default for Window {
    fn default() -> Window {
        let asked = VecDeque::new();
        Window { most: LEAST, out: 0, asked, quickest: Duration::MAX, wanted: None }
    }
}

impl Window {
    /// Nothing more may go before something has arrived.
    pub fn is_full(&self) -> bool {
        self.out >= self.most
    }

    /// Somebody waits for a page.
    pub fn wanted(&mut self, now: Instant) {
        self.wanted = Some(now);
    }

    fn is_wanted(&self, now: Instant) -> bool {
        self.wanted.is_some_and(|at| now.saturating_duration_since(at) < WANTED_FOR)
    }

    /// Returns how many pages to send at once that nobody waits for.
    pub fn piece(&self, now: Instant) -> u64 {
        if self.is_wanted(now) { PIECE_WANTED } else { PIECE }
    }

    /// So many bytes went out, and an echo was asked for.
    pub fn sent(&mut self, bytes: u64, now: Instant) {
        self.out += bytes;
        self.asked.push_back((bytes, now));
    }

    /// The next echo has come.
    pub fn echoed(&mut self, now: Instant) {
        let Some((bytes, asked)) = self.asked.pop_front() else { return };
        self.out -= bytes;
        let took = now.saturating_duration_since(asked);
        self.quickest = self.quickest.min(took);
        let queue = if self.is_wanted(now) { QUEUE_WANTED } else { QUEUE };
        if took <= self.quickest + queue {
            // Doubles in a round trip, as long as there is no queue.
            self.most = (self.most + bytes).min(256 << 20);
        } else {
            // Halves in a round trip.
            self.most = self.most.saturating_sub(bytes / 2).max(LEAST);
        }
    }
}

/// What stayed here, by task and page number.
#[derive(Debug, Default)]
pub struct Rest {
    runs: BTreeMap<(i32, u64), u64>,
    /// Number of pages in all.
    pub pages: u64,
    /// To read the frozen tasks.
    pub tasks: HashMap<i32, Reader>,
}

impl Rest {
    /// Regions may overlap.
    ///
    /// # Errors
    /// When a task has ended.
    pub fn new(tasks: &[Task], regions: impl Iterator<Item = PageRun>) -> Result<Rest> {
        let mut rest = Rest::default();
        for PageRun { vpid, start, pages } in regions {
            let (first, pages) = (start / PAGE as u64, pages as u64);
            // What is in there already is taken out: no page counts twice.
            rest.take(vpid, first, pages);
            rest.runs.insert((vpid, first), pages);
            rest.pages += pages;
        }
        for task in tasks {
            rest.tasks.insert(task.vpid, Reader::open(task.pid).context("a frozen task")?);
        }
        Ok(rest)
    }

    /// The first run, at most `most` pages of it.
    pub fn first(&mut self, most: u64) -> Option<(i32, u64, u64)> {
        let (&(vpid, page), &pages) = self.runs.first_key_value()?;
        let some = pages.min(most);
        self.take(vpid, page, some);
        Some((vpid, page, some))
    }

    /// Takes out what is left of a range: runs of page number and length.
    pub fn take(&mut self, vpid: i32, first: u64, pages: u64) -> Vec<(u64, u64)> {
        let end = first + pages;
        let before = self.runs.range(..(vpid, first)).next_back();
        let from = match before {
            Some((&(v, page), &n)) if v == vpid && page + n > first => page,
            _ => first,
        };
        let hit: Vec<(u64, u64)> =
            self.runs.range((vpid, from)..(vpid, end)).map(|(k, n)| (k.1, *n)).collect();
        let mut taken = Vec::new();
        for (page, n) in hit {
            self.runs.remove(&(vpid, page));
            if page < first {
                self.runs.insert((vpid, page), first - page);
            }
            if page + n > end {
                self.runs.insert((vpid, end), page + n - end);
            }
            let (from, to) = (page.max(first), (page + n).min(end));
            self.pages -= to - from;
            taken.push((from, to - from));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_page_of_the_rest_goes_twice() {
        let regions = [(1, 0x1000, 10), (1, 0x3000, 10), (2, 0x1000, 4)];
        let mut rest = Rest::new(
            &[],
            regions.into_iter().map(|(vpid, start, pages)| PageRun { vpid, start, pages }),
        )
        .unwrap();
        assert_eq!(rest.pages, 12 + 4);
        assert_eq!(rest.take(1, 4, 2), [(4, 2)]);
        assert_eq!(rest.take(1, 3, 4), [(3, 1), (6, 1)]);
        assert_eq!(rest.take(3, 0, 100), []);
        let mut all = Vec::new();
        while let Some((vpid, page, pages)) = rest.first(3) {
            assert!(pages <= 3);
            all.extend((page..page + pages).map(|p| (vpid, p)));
        }
        assert_eq!(rest.pages, 0);
        let expected: Vec<(i32, u64)> = [1, 2, 7, 8, 9, 10, 11, 12]
            .map(|p| (1, p))
            .into_iter()
            .chain((1..5).map(|p| (2, p)))
            .collect();
        assert_eq!(all, expected);
    }

    /// Much that went out before anybody asked for an echo, on a link that is slow then.
    #[test]
    fn the_window_is_never_less_than_the_least() {
        let mut window = Window::default();
        let now = Instant::now();
        for (bytes, took) in [(1, 1), (4 * LEAST, 1000)] {
            window.sent(bytes, now);
            window.echoed(now + Duration::from_millis(took));
        }
        assert_eq!(window.most, LEAST);
    }

    #[test]
    fn the_window_grows_to_the_link_and_not_into_its_queue() {
        let mut window = Window::default();
        let mut now = Instant::now();
        // 100 ms there and back, and no queue.
        for _ in 0..200 {
            window.sent(ECHO_EVERY, now);
            now += Duration::from_millis(100);
            window.echoed(now);
        }
        assert!(window.most > 16 << 20, "{}", window.most);
        for _ in 0..1000 {
            window.sent(ECHO_EVERY, now);
            now += Duration::from_millis(300);
            window.echoed(now);
        }
        assert_eq!(window.most, LEAST);
    }

    #[test]
    fn whoever_waits_finds_a_shorter_queue() {
        let at_5_ms = |wanted: bool| {
            let (mut window, mut now) = (Window::default(), Instant::now());
            window.quickest = Duration::from_millis(1);
            for _ in 0..50 {
                if wanted {
                    window.wanted(now);
                }
                window.sent(ECHO_EVERY, now);
                now += Duration::from_millis(5);
                window.echoed(now);
            }
            window.most
        };
        assert_eq!(at_5_ms(true), LEAST);
        assert!(at_5_ms(false) > 4 << 20);
    }
}
