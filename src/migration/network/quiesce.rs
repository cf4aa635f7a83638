//! Before the freeze: what is nobody's comes to its end.
//!
//! CRIU carries the sockets that a task has a descriptor of. Handshakes that are not over,
//! connections that were not accepted yet, and such as were closed with something left to send are
//! not among them. So new connections are held at the fence for a moment, and kept for the other host; all
//! others go on, the container runs, and what has begun ends: in a round trip or two, as a rule.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::network::fence::{ArmedFence, FenceSide};
use crate::network::frames::Capture;
use crate::network::sockets::{Flow, SockDiag, Unowned};
use crate::problem::{Problem, Trying};

/// Time that new connections are held at most before the freeze.
const QUIESCE_LIMIT: Duration = Duration::from_millis(500);
/// Time that answers on closed connections may take to get away, while everything goes on.
const DRAIN: Duration = Duration::from_secs(10);
/// Younger ones there is time to wait for.
const YOUNG: Duration = Duration::from_millis(250);
/// How often is looked for them meanwhile.
const LOOK: Duration = Duration::from_millis(20);
/// The same of what was closed in the very moment of the freeze: clients wait meanwhile.
const LAST: Duration = Duration::from_millis(200);
/// Nobody tells when a handshake is over, or a connection is accepted.
const PAUSE: Duration = Duration::from_millis(1);

/// Holds new connections, and waits until nothing is nobody's; what still is when the time is over.
///
/// # Errors
/// When connections wait that the container does not accept: CRIU would lose them.
pub fn await_quiet(
    fence: &mut ArmedFence,
    capture: &mut Capture,
    sock_diag: &mut SockDiag,
) -> Result<Unowned, Problem> {
    capture.start_new().trying(|| "cannot keep what comes for the container".into())?;
    fence.close(FenceSide::New)?;
    let began = Instant::now();
    let left = loop {
        let left = sock_diag.look()?;
        if left.is_empty() || began.elapsed() > QUIESCE_LIMIT {
            break left;
        }
        std::thread::park_timeout(PAUSE);
    };

    tracing::debug!(?left, "quiesced: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
    match left.backlog.first() {
        None if left.draining.is_empty() => Ok(left),
        None => Err(unsent(&left.draining)),
        Some((address, count)) => Err(Problem::new(
            format!(
                "{count} connections wait at {address}, and the container does not accept them"
            ),
            "they are nobody's yet, so CRIU cannot carry them",
        )
        .hint("try again when the server is less busy")),
    }
}

/// Waits until no answer has been on its way for long whose connection the container has closed. New
/// ones are not held for that, and `each` looks after the rest from time to time.
///
/// # Errors
/// When some still are after ten seconds; what `each` says.
pub fn await_drained(
    sock_diag: &mut SockDiag,
    mut each: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut since = HashMap::new();
    loop {
        let now = Instant::now();
        let old = age(&mut since, sock_diag.look()?.draining, now);
        if old.is_empty() {
            return Ok(());
        }
        if now.duration_since(began) > DRAIN {
            return Err(unsent(&old).into());
        }
        each()?;
        std::thread::park_timeout(LOOK);
    }
}

/// Notes since when each has been seen; those that have been for a while, or from the beginning on.
fn age(since: &mut HashMap<Flow, Instant>, now: Vec<Flow>, at: Instant) -> Vec<Flow> {
    let first = since.is_empty();
    since.retain(|flow, _| now.contains(flow));
    for flow in &now {
        // Nobody knows how old the first are.
        let long = at.checked_sub(YOUNG).filter(|_| first);
        since.entry(*flow).or_insert(long.unwrap_or(at));
    }
    now.into_iter().filter(|flow| at.duration_since(since[flow]) >= YOUNG).collect()
}

/// Where the container stands still already: what it closed in the last moment is given one.
///
/// # Errors
/// When something is still not sent.
pub fn await_last(sock_diag: &mut SockDiag) -> Result<(), Problem> {
    let began = Instant::now();
    loop {
        let left = sock_diag.look()?;
        if left.draining.is_empty() {
            return Ok(());
        }
        if began.elapsed() > LAST {
            return Err(unsent(&left.draining));
        }
        std::thread::park_timeout(PAUSE);
    }
}

fn unsent(flows: &[Flow]) -> Problem {
    let client = flows.first().map(|flow| flow.remote.to_string()).unwrap_or_default();
    Problem::new(
        format!("answers are still on their way, on {} closed connections", flows.len()),
        format!(
            "the container has closed them (one is to {client}); they are nobody's, so CRIU cannot \
             carry them, and clients would lose what has not come yet"
        ),
    )
    .hint("try again when these clients have their answers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_ones_are_waited_for() {
        let flow = |port: u16| {
            let end = |port| ([10, 0, 0, 1], port).into();
            Flow { local: end(80), remote: end(port) }
        };
        let (mut since, start) = (HashMap::new(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(age(&mut since, vec![flow(1)], at(1000)), [flow(1)], "there from the beginning");
        assert_eq!(age(&mut since, vec![flow(1), flow(2)], at(1020)), [flow(1)]);
        assert!(age(&mut since, vec![flow(2)], at(1040)).is_empty());
        assert_eq!(age(&mut since, vec![flow(2), flow(3)], at(1280)), [flow(2)]);
        assert_eq!(unsent(&[flow(2)]).to_string().matches("10.0.0.1:2").count(), 1);
    }
}
