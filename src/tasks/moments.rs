//! What CRIU cannot carry, and what is over in a moment, as a rule: waited for before the freeze, while the
//! container runs.
//!
//! Of unix sockets: who waits to be accepted, and has sent something already; and unread messages with
//! credentials or a time stamp ("Control messages in queue").

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::losses::files::{self, OpenFile};
use super::losses::who;
use crate::network::unix;
use crate::problem::Problem;
use crate::sys::{process, socket};

/// Time to wait.
const LIMIT: Duration = Duration::from_millis(500);
/// Nobody tells when something has been read.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until nothing of that kind is there.
///
/// # Errors
/// What still is when the time is over.
pub fn await_read(init: i32, pids: &[i32]) -> Result<(), Problem> {
    let began = Instant::now();
    while let Some(problem) = waits(init, pids) {
        if began.elapsed() > LIMIT {
            return Err(problem);
        }
        std::thread::park_timeout(PAUSE);
    }
    Ok(())
}

fn waits(init: i32, pids: &[i32]) -> Option<Problem> {
    // What cannot be listed CRIU meets.
    let queues = unix::queues(init).unwrap_or_default();
    if queues.iter().all(|queue| queue.received == 0) {
        return None;
    }

    let open = files::all(pids);
    let own: HashMap<u64, &OpenFile> =
        open.iter().filter_map(|one| Some((one.socket()?, one))).collect();
    // Nobody has a descriptor of the other end before it is accepted.
    let peers: HashMap<u32, u32> = unix::peers(init).unwrap_or_default().into_iter().collect();
    let eager = queues.iter().any(|queue| {
        let own = own.contains_key(&u64::from(queue.inode));
        own && queue.sent > 0 && peers.get(&queue.inode) == Some(&0)
    });

    queues.iter().filter(|queue| queue.received > 0).find_map(|queue| {
        let one = own.get(&u64::from(queue.inode))?;
        let pidfd = process::pidfd_open(one.pid).ok()?;
        let file = process::pidfd_getfd(&pidfd, one.number).ok()?;
        let what = if socket::listens(file.as_fd()) {
            let count = queue.received;
            eager.then(|| format!("{count} clients of a unix socket wait to be accepted"))?
        } else if socket::has_control_messages(file.as_fd()) {
            "a message with credentials or a time stamp waits in a unix socket".to_owned()
        } else {
            return None;
        };

        let why = format!("descriptor {} of {}: CRIU cannot carry it", one.number, who(one.pid));
        Some(Problem::new(what, why).hint("try again when the program has read it"))
    })
}
