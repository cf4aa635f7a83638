//! A lock of the kernel's that is slow to wake up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;

/// Keeps the kernel's control group lock awake.
///
/// The first move of a task into a control group for a while waits for an RCU grace period, 10 ms
/// and more, before it takes that lock for writing (Documentation/RCU, kernel/rcu/sync.c); the next
/// ones do not. CRIU moves the restored init in the middle of the restore. So from the beginning of
/// the freeze somebody moves himself, to where he is.
#[derive(Debug)]
pub struct CgroupWarmer {
    stop: Arc<AtomicBool>,
}

impl CgroupWarmer {
    /// From now until it is dropped.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start() -> Result<CgroupWarmer> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::Builder::new().name("warm".into()).spawn(move || {
            let me = std::process::id() as i32;
            while !stopped.load(Ordering::Relaxed) {
                // Only ever a help.
                if crate::oci::cgroup::move_to_where_it_is(me).is_err() {
                    return;
                }
                std::thread::park_timeout(Duration::from_millis(2));
            }
        })?;
        Ok(CgroupWarmer { stop })
    }
}

impl Drop for CgroupWarmer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
