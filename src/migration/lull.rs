//! Before the freeze: what is nobody's comes to its end.
//!
//! CRIU carries the sockets that a task has a descriptor of. Handshakes that are not over,
//! connections that were not accepted yet, and such as were closed with something left to send are
//! not among them. So new connections are held at the fence for a moment, and kept for the other host; all
//! others go on, the container runs, and what has begun ends: in a round trip or two, as a rule.

use std::time::{Duration, Instant};

use crate::network::fence::{Armed, Side};
use crate::network::frames::Capture;
use crate::network::problem::{Problem, Trying};
use crate::network::sockets::{Lookout, Unowned};

/// How long new connections are held at most before the freeze.
const LULL: Duration = Duration::from_millis(500);
/// Nobody tells when a handshake is over, or a connection is accepted.
const PAUSE: Duration = Duration::from_millis(1);

/// Holds new connections, and waits until nothing is nobody's; what still is when the time is over.
///
/// # Errors
/// When connections wait that the container does not accept: CRIU would lose them.
pub fn await_lull(
    fence: &mut Armed,
    capture: &mut Capture,
    lookout: &mut Lookout,
) -> Result<Unowned, Problem> {
    capture.start_new().trying(|| "cannot keep what comes for the container".into())?;
    fence.close(Side::New)?;
    let began = Instant::now();
    let left = loop {
        let left = lookout.look()?;
        if left.is_empty() || began.elapsed() > LULL {
            break left;
        }
        std::thread::park_timeout(PAUSE);
    };
    tracing::debug!(?left, "waited for a lull: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
    match left.backlog.first() {
        None => Ok(left),
        Some((address, count)) => Err(Problem::new(
            format!(
                "{count} connections wait at {address}, and the container does not accept them"
            ),
            "they are nobody's yet, so CRIU cannot carry them",
        )
        .hint("try again when the server is less busy")),
    }
}
