//! When to stop copying memory of a running container: a pure function of what was seen.

use std::time::Duration;

/// What is left is so little that nothing is gained by another round: 256 KiB.
pub const LITTLE: u64 = 64;
/// Rounds in a row that did not bring what is left down, before it is believed that none will.
const PATIENCE: usize = 2;

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goal {
    /// What is left at the freeze should take no longer than this on the link.
    pub max_downtime: Duration,
    /// Rounds over the running container, at most; 0 copies nothing before the freeze.
    pub max_rounds: usize,
    /// What does not converge may be brought after the resume.
    pub postcopy: bool,
}

impl Default for Goal {
    fn default() -> Goal {
        Goal { max_downtime: Duration::from_millis(100), max_rounds: 10, postcopy: true }
    }
}

/// One round, when it was over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeenRound {
    /// Bytes that it put on the link, and the seconds until they had arrived.
    pub wire: u64,
    /// See `wire`.
    pub seconds: f64,
    /// Pages that it handed on.
    pub pages: u64,
    /// Pages that were written to meanwhile.
    pub left: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NextRound {
    /// Another round.
    Round,
    /// Freeze: what is left is little enough.
    Freeze,
    /// Freeze, and bring what is left after the resume.
    PostCopy,
    /// Freeze though it will take longer than wanted: the rounds are used up.
    FreezeAnyway,
}

/// Seconds that the pages left will take, by the latest round that had enough on the link to tell;
/// none where no round had.
pub fn seconds_left(rounds: &[SeenRound]) -> Option<f64> {
    const TELLING: u64 = 1 << 20;
    let left = rounds.last()?.left;
    let telling = rounds.iter().rev().find(|r| r.wire >= TELLING && r.pages > 0)?;
    // Pages that take less on the wire than they are long will do so again.
    let page = telling.wire as f64 / telling.pages as f64;
    Some(left as f64 * page * telling.seconds / telling.wire as f64)
}

/// Returns what comes after the rounds seen so far.
pub fn next(goal: &Goal, rounds: &[SeenRound]) -> NextRound {
    let give_up = if goal.postcopy { NextRound::PostCopy } else { NextRound::FreezeAnyway };
    let Some(last) = rounds.last() else {
        return if goal.max_rounds == 0 { give_up } else { NextRound::Round };
    };
    if last.left <= LITTLE {
        return NextRound::Freeze;
    }
    let fits = seconds_left(rounds).is_none_or(|s| s <= goal.max_downtime.as_secs_f64());
    // From the end: rounds that did not make it a quarter less.
    let stalled =
        rounds.windows(2).rev().take_while(|pair| pair[1].left > pair[0].left / 4 * 3).count();
    let out_of_rounds = rounds.len() >= goal.max_rounds;
    match (fits, stalled) {
        (true, _) if out_of_rounds => NextRound::Freeze,
        (false, _) if out_of_rounds => give_up,
        (true, 1..) => NextRound::Freeze,
        (false, PATIENCE..) if goal.postcopy => NextRound::PostCopy,
        _ => NextRound::Round,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Goal =
        Goal { max_downtime: Duration::from_millis(100), max_rounds: 8, postcopy: true };

    /// Rounds over a container of `pages` pages that writes to `rate` pages a second, on a link of
    /// `link` pages a second, until the end; the end, and what was left.
    fn run(goal: &Goal, pages: u64, rate: f64, link: f64) -> (NextRound, Vec<SeenRound>) {
        let mut rounds = Vec::new();
        let mut todo = pages;
        loop {
            match next(goal, &rounds) {
                NextRound::Round => {
                    let seconds = todo as f64 / link + 0.002;
                    let left = ((rate * seconds) as u64).min(pages);
                    rounds.push(SeenRound { wire: todo * 4096, seconds, pages: todo, left });
                    todo = left;
                }
                end => return (end, rounds),
            }
            assert!(rounds.len() <= goal.max_rounds);
        }
    }

    #[test]
    fn a_still_container_is_frozen_after_one_round() {
        let (end, rounds) = run(&GOAL, 262_144, 10.0, 100_000.0);
        assert_eq!((end, rounds.len()), (NextRound::Freeze, 1));
    }

    #[test]
    fn it_goes_on_while_a_round_shrinks_what_is_left() {
        let (end, rounds) = run(&GOAL, 262_144, 20_000.0, 100_000.0);
        assert_eq!(end, NextRound::Freeze);
        assert!(rounds.len() > 3, "{rounds:?}");
        assert!(rounds.last().unwrap().left < 1000, "{rounds:?}");
    }

    #[test]
    fn what_writes_faster_than_the_link_is_brought_after_the_resume_or_frozen_anyway() {
        let (end, rounds) = run(&GOAL, 262_144, 50_000.0, 25_000.0);
        assert_eq!(end, NextRound::PostCopy);
        assert!(rounds.len() < GOAL.max_rounds, "no round that cannot help: {}", rounds.len());
        let never = Goal { postcopy: false, ..GOAL };
        let (end, rounds) = run(&never, 262_144, 50_000.0, 25_000.0);
        assert_eq!((end, rounds.len()), (NextRound::FreezeAnyway, GOAL.max_rounds));
    }

    #[test]
    fn a_standing_rest_that_fits_the_downtime_is_frozen() {
        // 500 pages, always the same, are 20 ms of this link.
        let seen = SeenRound { wire: 1 << 30, seconds: 10.0, pages: 262_144, left: 500 };
        let again = SeenRound { wire: 500 * 4096, seconds: 0.02, pages: 500, left: 500 };
        assert_eq!(next(&GOAL, &[seen, again]), NextRound::Freeze);
        let strict = Goal { max_downtime: Duration::from_millis(5), ..GOAL };
        assert_eq!(next(&strict, &[seen, again]), NextRound::Round);
        assert_eq!(next(&strict, &[seen, again, again]), NextRound::PostCopy);
    }

    #[test]
    fn without_rounds_nothing_is_copied_before() {
        let goal = Goal { max_rounds: 0, ..GOAL };
        assert_eq!(next(&goal, &[]), NextRound::PostCopy);
        assert_eq!(next(&Goal { postcopy: false, ..goal }, &[]), NextRound::FreezeAnyway);
    }

    #[test]
    fn every_case_ends() {
        for rate in [0.0, 1e3, 1e5, 1e7] {
            for link in [3e3, 3e4, 3e6] {
                for postcopy in [false, true] {
                    let (end, _) = run(&Goal { postcopy, ..GOAL }, 1 << 20, rate, link);
                    assert_ne!(end, NextRound::Round);
                    assert!(postcopy || end != NextRound::PostCopy);
                }
            }
        }
    }
}
