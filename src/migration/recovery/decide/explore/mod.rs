//! All of the hand-over's states that can come to be, and what holds in them.
//!
//! There are two hosts. On the source: `ferry migrate`, its guard, and `ferry resolve`, by hand and by the
//! unit that goes on at boot. On the destination: `ferry receive` and those who go on when it is killed.
//! The last lines of a journal may be lost with its host. The link breaks with messages on it, and each
//! end hears of it in its own time. Questions go over links of their own, and may come late, twice, or
//! long after whoever asked. Every order of all this is tried, with pre-copy and with pages that come
//! after the commit, and with any of these faults at any place, up to a number of them in one run:
//! somebody is killed (a host's Ferry, its guards, `ferry resolve`, CRIU), a host goes down, the cable
//! is cut, the link breaks, the user interrupts it, the disk does not take the commit; and an operator
//! says something. What they all decide by are the functions of this module's parent: not a copy.
//!
//! What is not in it: a journal's other writes always succeed; a step between two lines of a journal
//! is done in full or not at all; memory counts as in when that is noted. Where Ferry and all guards of
//! a destination are killed while pages are missing, its tasks read zeros until somebody asks.

mod destination;
mod source;
mod steps;
mod world;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use self::steps::{Kind, RULES, Rules, Step, Steps};
use self::world::*;
use super::*;
use crate::migration::journal::State;
use crate::migration::protocol::Standing;

/// Faults in one run, and words of operators.
const BOUNDS: [(u8, u8); 2] = [(3, 0), (1, 1)];
/// The same where `FERRY_FULL` is set: minutes, without an optimizer.
const FULL: [(u8, u8); 2] = [(4, 0), (2, 2)];

struct Explored {
    worlds: Vec<World>,
    /// From which each was come to.
    from: Vec<u32>,
    /// What is next, when nothing else happens.
    next: Vec<u32>,
    steps: usize,
}

/// Quicker than the standard one without an optimizer; nobody chooses what it is given.
#[derive(Default)]
struct Quick(u64);

impl Hasher for Quick {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u8(&mut self, i: u8) {
        self.write_u64(u64::from(i));
    }
    fn write_isize(&mut self, i: isize) {
        self.write_u64(i as u64);
    }
    fn write_u64(&mut self, i: u64) {
        self.0 = (self.0.rotate_left(5) ^ i).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

const NONE: u32 = u32::MAX;

impl Explored {
    fn explore(rules: &Rules, faults: u8, words: u8) -> Result<Explored, String> {
        Explored::from(rules, [false, true].map(|lacking| World::new(lacking, faults, words)))
    }

    /// Breadth first, so that whatever is found is found by its shortest way.
    fn from(rules: &Rules, begin: impl IntoIterator<Item = World>) -> Result<Explored, String> {
        let mut all = Explored { worlds: Vec::new(), from: Vec::new(), next: Vec::new(), steps: 0 };
        let mut known: HashMap<World, u32, BuildHasherDefault<Quick>> = HashMap::default();
        for first in begin {
            known.insert(first, all.worlds.len() as u32);
            all.worlds.push(first);
            all.from.push(NONE);
        }

        let mut at = 0;
        while at < all.worlds.len() {
            let now = all.worlds[at];
            if let Some(wrong) = now.wrong {
                return Err(all.told(rules, &[at as u32], wrong));
            }
            let mut next = NONE;
            for Step { kind, then, .. } in Steps::of(now, rules) {
                let number = *known.entry(then).or_insert_with(|| {
                    all.worlds.push(then);
                    all.from.push(at as u32);
                    all.worlds.len() as u32 - 1
                });
                if kind == Kind::Goes && next == NONE {
                    next = number;
                }
                all.steps += 1;
            }

            all.next.push(next);
            at += 1;
        }

        all.check_ends(rules)?;
        Ok(all)
    }

    /// From each state, with no fault more, it comes to an end that is one.
    fn check_ends(&self, rules: &Rules) -> Result<(), String> {
        // 0: not looked at, 1: on the way, 2: comes to an end.
        let mut seen = vec![0u8; self.worlds.len()];
        for start in 0..self.worlds.len() as u32 {
            let (mut way, mut at) = (Vec::new(), start);
            loop {
                let (index, world) = (at as usize, &self.worlds[at as usize]);
                if seen[index] == 2 || is_end(world) {
                    way.push(at);
                    break;
                }
                if seen[index] == 1 || self.next[index] == NONE {
                    way.push(at);
                    let told = self.told(rules, &way, "nobody goes on:");
                    return Err(format!("{told}\nin {world:?}"));
                }
                seen[index] = 1;
                way.push(at);
                at = self.next[index];
            }
            way.iter().for_each(|w| seen[*w as usize] = 2);
        }
        Ok(())
    }

    /// The way to a state over another one, for people.
    fn told(&self, rules: &Rules, way: &[u32], wrong: &str) -> String {
        let mut words = vec![wrong.to_owned()];
        let mut all = Vec::new();
        let mut at = way[0];
        while at != NONE {
            all.push(at);
            at = self.from[at as usize];
        }
        all.reverse();
        let post_copy = self.worlds[all[0] as usize].b.lacking;
        words.push(if post_copy { "(post-copy)" } else { "(pre-copy)" }.to_owned());
        let named = |from: u32, to: u32| {
            let (from, to) = (self.worlds[from as usize], self.worlds[to as usize]);
            let step = Steps::of(from, rules).into_iter().find(|step| step.then == to);
            step.map_or("?", |step| step.what).to_owned()
        };
        words.extend(all.windows(2).map(|pair| named(pair[0], pair[1])));
        if way.len() > 1 {
            words.push("and then, without another fault:".to_owned());
        }
        words.extend(way.windows(2).map(|pair| named(pair[0], pair[1])));
        words.join("\n  ")
    }
}

/// It runs in one place, and nobody waits; or only an operator can say what is to be, or nothing is left.
fn is_end(w: &World) -> bool {
    let there = w.b.copy == Copy::Running;
    let runs = w.a.container == Container::Running || there && w.b.all_in;
    let settled = w.a.container != Container::Frozen && w.b.copy != Copy::Held;
    if runs && settled {
        return true;
    }
    // Whether a copy that is lost has run, the destination does not know: time might go back.
    let may_have_run = w.past.ran_there || w.past.lost && w.b.lines.may_have_run();
    let may_have_run = may_have_run && w.b.copy == Copy::None;
    let doubt = w.a.lines.last() == State::Committed && may_have_run;
    let lost = w.a.container == Container::None && (w.b.copy == Copy::None || !w.b.all_in);
    doubt || lost || w.past.unsafe_word || w.past.given_up
}

#[test]
fn every_state_is_explored() {
    let bounds = if std::env::var_os("FERRY_FULL").is_some() { FULL } else { BOUNDS };
    for (faults, words) in bounds {
        let all = Explored::explore(&RULES, faults, words).unwrap_or_else(|e| panic!("{e}"));
        let (states, steps) = (all.worlds.len(), all.steps);
        println!("{faults} faults, {words} words of operators: {states} states, {steps} steps");
        assert!(states > 100_000, "what is to be explored is not there: {states} states");
    }
}

/// Rules that were once in force, or might have been, and what is wrong with each: the explorer can find
/// something.
#[test]
fn other_rules_do_not_hold() {
    let right = RULES;
    let mutants: [(&str, Rules, u8, &str); 11] = [
        (
            "after the commit the guard does nothing",
            Rules {
                guard: |state, told| match state {
                    State::Committed => Guarding::Nothing,
                    _ => guard(state, told),
                },
                ..right
            },
            1,
            "nobody goes on",
        ),
        (
            "a guard whose Ferry was killed when all was undone is done",
            Rules {
                guard: |state, told| match (state, told) {
                    (State::Aborted, false) => Guarding::Nothing,
                    _ => guard(state, told),
                },
                ..right
            },
            2,
            "nobody goes on",
        ),
        (
            "a link that ends has brought the last word",
            Rules { end_tells: true, ..right },
            2,
            "nobody goes on",
        ),
        (
            "what was not handed over runs on here, after a reboot too",
            Rules {
                resolve: |state, tasks, there, word| match state {
                    State::Begun => NextDeed::RunsOn,
                    _ => resolve(state, tasks, there, word),
                },
                ..right
            },
            1,
            "said to run where nothing does",
        ),
        (
            "after a reboot nothing of it is left that matters",
            Rules {
                resolve: |state, tasks, there, word| match (state, tasks) {
                    (State::Begun, Tasks::Rebooted) => NextDeed::Abandon,
                    _ => resolve(state, tasks, there, word),
                },
                ..right
            },
            1,
            "the last copy is discarded",
        ),
        (
            "a copy without a Ferry is none",
            Rules { answer: |left| answer(LeftCopy { whole: false, ..left }), ..right },
            2,
            "a copy is discarded that runs with all of its memory",
        ),
        (
            "whoever asks need not wait for the guard",
            Rules { guard_answers: false, ..right },
            1,
            "what is frozen is ended, and has never run there as a whole",
        ),
        (
            "a copy that is gone may have run",
            Rules {
                answer: |left| match answer(left) {
                    Answer::Is(Standing::NeverRan) => Answer::Is(Standing::Gone),
                    other => other,
                },
                ..right
            },
            1,
            "nobody goes on",
        ),
        (
            "a copy that is gone has not run",
            Rules {
                answer: |left| match answer(left) {
                    Answer::Is(Standing::Gone) => Answer::Is(Standing::NeverRan),
                    other => other,
                },
                ..right
            },
            2,
            "it is taken back, and has run there",
        ),
        (
            "what a reboot has lost was not there",
            Rules {
                answer: |left| match answer(left) {
                    Answer::Discard { .. } => Answer::Discard { doubtful: false },
                    other => other,
                },
                ..right
            },
            1,
            "it is taken back, and has run there",
        ),
        (
            "a held copy goes when the link does",
            Rules {
                hear: |phase, event| match (phase, event) {
                    (CopyPhase::Held { .. }, CopyEvent::Unlinked) => (Act::Run, None),
                    _ => hear(phase, event),
                },
                ..right
            },
            1,
            "two copies run",
        ),
    ];

    for (what, rules, faults, wrong) in mutants {
        match Explored::explore(&rules, faults, 0) {
            Ok(all) => panic!("{what}: nothing is wrong with it in {} states", all.worlds.len()),
            Err(why) => assert!(why.starts_with(wrong), "{what}: {why}"),
        }
    }
}

/// Whoever has begun to take the container back is killed, and the guard is there: from that moment on, as
/// it takes many steps to come to it.
#[test]
fn the_guard_goes_on_with_what_others_have_begun() {
    let mut begin = World::new(false, 1, 1);
    begin.a.lines.write(State::Committed);
    begin.a.container = Container::Frozen;
    begin.a.migrate = Migrate::Gone;
    begin.a.guard = Guard::Does(Doing::Round(NEW));
    begin.to_a.end();
    (begin.sent, begin.broken) = (true, true);
    begin.b.lines.note(State::Ready);
    begin.b.lines.write(State::Aborted);
    begin.b.receive = Receive::Gone;
    let explored = |rules| Explored::from(rules, [begin]).map(|all| all.worlds.len());
    explored(&RULES).unwrap_or_else(|e| panic!("{e}"));
    let ends = Rules { guard_looks_again: false, ..RULES };
    assert!(explored(&ends).unwrap_err().starts_with("nobody goes on"));
}
