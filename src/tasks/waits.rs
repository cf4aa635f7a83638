//! Calls in which tasks wait, over the freeze: looked at while they run, made to begin anew when they stand
//! still, and made to wait for no longer than they should where they run again.
//!
//! Whatever fails here, no such call ends with `EINTR`; it may take longer than it should.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::problem::Problem;
use crate::sys::inject;
use crate::sys::process::proc_text;
use crate::sys::stopped::wait_no_longer;
use crate::sys::waits::{Clock, Processors, SeenWait, is_continued};

/// Nobody tells when it has.
const GLANCE: Duration = Duration::from_millis(1);

/// Returns what threads wait for that are to be frozen in the next moment, by their numbers.
pub fn look(pids: &[i32]) -> HashMap<i32, SeenWait> {
    let (mut seen, mut processors) = (HashMap::new(), Processors::default());
    for &pid in pids {
        let clock = Clock::of(pid);
        for tid in inject::threads(pid).unwrap_or_default() {
            seen.extend(SeenWait::of(tid, &clock, &mut processors).map(|one| (tid, one)));
        }
    }
    seen
}

/// Has all tasks that have been frozen, and run again, wait for no longer than they should. Each may take
/// `patience` to come to the call that it begins anew. What could not be done, to be told.
pub fn go_on(pids: &[i32], patience: Duration) -> Option<Problem> {
    // On a thread that ends: see `Stopped::standing`.
    let pids = pids.to_vec();
    let work = move || {
        let until = Instant::now() + patience;
        let threads = |pid: i32| {
            let clock = Clock::of(pid);
            inject::threads(pid).unwrap_or_default().into_iter().map(move |tid| (tid, clock))
        };
        let mut left: Vec<(i32, Clock)> = pids.into_iter().flat_map(threads).collect();
        let mut failed = None;
        while !left.is_empty() {
            left.retain(|(tid, clock)| {
                if is_on_its_way(*tid) {
                    return true;
                }
                if is_continued(*tid)
                    && let Err(e) = wait_no_longer(*tid, clock, until)
                {
                    // Who has ended waits for nothing.
                    failed = failed
                        .take()
                        .or((e.raw_os_error() != Some(libc::ESRCH)).then_some((*tid, e)));
                }
                false
            });

            if Instant::now() > until {
                break;
            }
            std::thread::park_timeout(GLANCE);
        }
        failed
    };

    let (tid, e) = std::thread::spawn(work).join().ok()??;
    let why = format!("thread {tid}: {e}");
    Some(Problem::new("a call that waits may take longer than it should", why).warning())
}

/// Tells whether a thread runs: it may be about to make a call.
fn is_on_its_way(tid: i32) -> bool {
    proc_text(tid, "syscall").is_ok_and(|text| text.starts_with("running"))
}
