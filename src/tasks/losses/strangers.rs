//! Processes of the container that are not its first one's descendants: such as `exec` puts into it.
//! A checkpoint goes from the first process downwards and has none of them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{Scene, field, named, who};
use crate::problem::Problem;
use crate::sys::process;

/// Time that the command of a health check may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nobody tells when somebody else's child ends.
const PAUSE: Duration = Duration::from_millis(20);

/// A stranger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    pid: i32,
    /// With the number, a name that is not used twice.
    started: Option<u64>,
}

/// Returns what stands in the way: those that stay for longer than a health check does.
pub fn problems(scene: Scene<'_>) -> Option<Problem> {
    let began = Instant::now();
    let mut left = find(scene);
    while !left.is_empty() && began.elapsed() < PATIENCE {
        std::thread::park_timeout(PAUSE);
        left.retain(Stranger::lives);
    }
    // It may have been adopted by the container's first process meanwhile.
    let now = find(scene);
    left.retain(|stranger| now.contains(stranger));
    (!left.is_empty()).then(|| {
        Problem::new(
            "processes run in the container that it has not started itself",
            format!(
                "{}: put into it from outside (`exec`), they are no descendants of its first \
                 process, so CRIU does not carry them, and they would be killed here",
                names(&left)
            ),
        )
        .hint("end them, or wait for their end; what is to stay, the container has to start itself")
    })
}

/// Returns those that are there right now.
pub fn find(scene: Scene<'_>) -> Vec<Stranger> {
    let parent = |pid: i32| {
        let status = process::proc_text(pid, "status").ok()?;
        // Whoever has ended and waits to be noticed loses nothing.
        let dead = field(&status, "State").is_some_and(|state| state.starts_with(['Z', 'X']));
        let parent = field(&status, "PPid")?.parse().ok()?;
        Some((pid, (parent, dead)))
    };
    let tasks: HashMap<i32, (i32, bool)> =
        scene.tasks.iter().filter_map(|pid| parent(*pid)).collect();
    let outside = not_below(scene.init, &tasks);
    let new = |pid| Stranger { pid, started: process::start_time(pid) };
    outside.into_iter().map(new).filter(Stranger::lives).collect()
}

/// Returns which of these processes, each with its parent and whether it has ended, are not below `init`.
fn not_below(init: i32, tasks: &HashMap<i32, (i32, bool)>) -> Vec<i32> {
    let below = |pid: i32| {
        let mut at = pid;
        // A circle cannot be, but for numbers that were used again while we looked.
        for _ in 0..=tasks.len() {
            if at == init {
                return true;
            }
            match tasks.get(&at) {
                Some((parent, _)) => at = *parent,
                None => return false,
            }
        }
        false
    };
    let alive = tasks.iter().filter(|(_, (_, dead))| !dead).map(|(pid, _)| *pid);
    let mut found: Vec<i32> = alive.filter(|pid| !below(*pid)).collect();
    found.sort_unstable();
    found
}

impl Stranger {
    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    fn lives(&self) -> bool {
        self.started.is_some()
            && process::start_time(self.pid) == self.started
            && process::lives(self.pid)
    }
}

/// For people: the first of them, with their commands.
pub fn names(list: &[Stranger]) -> String {
    let words: Vec<String> = list.iter().map(|stranger| who(stranger.pid)).collect();
    named(&words)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn only_descendants_of_the_first_belong() {
        let tasks = |list: &[(i32, i32)]| -> HashMap<i32, (i32, bool)> {
            list.iter().map(|(pid, parent)| (*pid, (*parent, false))).collect()
        };
        let family = tasks(&[(10, 1), (11, 10), (12, 11)]);
        assert!(not_below(10, &family).is_empty());
        // By exec, and its child; one that has been adopted.
        let mut guests = tasks(&[(10, 1), (11, 10), (20, 5), (21, 20), (30, 10)]);
        assert_eq!(not_below(10, &guests), [20, 21]);
        guests.insert(20, (5, true));
        assert_eq!(not_below(10, &guests), [21], "it has ended");
        // Numbers that were used again meanwhile.
        assert_eq!(not_below(10, &tasks(&[(10, 1), (40, 41), (41, 40)])), [40, 41]);
    }

    #[test]
    fn a_guest_is_found_and_forgotten() {
        let cat = || Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let (mut one, mut other) = (cat(), cat());
        let pids = [one.id() as i32, other.id() as i32];
        let scene = Scene { init: pids[0], tasks: &pids };
        let found = find(scene);
        assert_eq!(found.iter().map(|s| s.pid).collect::<Vec<_>>(), [pids[1]]);
        assert!(names(&found).ends_with("(cat)"), "{}", names(&found));
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!((find(scene), problems(scene)), (vec![], None));
        one.kill().unwrap();
        one.wait().unwrap();
    }
}
