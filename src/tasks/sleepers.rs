//! Tasks that cannot be stopped: found while the container runs, rather than in the freeze.
//!
//! A thread that sleeps uninterruptibly stops for nobody, neither for Ferry nor for CRIU, until it
//! has what it waits for. With a disk that is a matter of milliseconds; with a disk that does not
//! answer, or a parent that has called vfork(2), of however long it takes.

use std::time::{Duration, Instant};

use crate::problem::Problem;
use crate::sys::inject;
use crate::sys::process::proc_text;

/// Time that a thread may sleep so.
const LIMIT: Duration = Duration::from_secs(1);
/// Nobody tells when it wakes.
const PAUSE: Duration = Duration::from_millis(10);

/// A thread that sleeps uninterruptibly.
#[derive(Debug)]
struct Sleeper {
    pid: i32,
    tid: i32,
    /// How often it has gone to sleep: a thread that does so again and again wakes in between.
    naps: String,
}

/// Returns what stands in the way: a thread that sleeps on through a second.
pub fn problem(pids: &[i32]) -> Option<Problem> {
    let mut asleep: Vec<Sleeper> = pids.iter().flat_map(|pid| of_process(*pid)).collect();
    let until = Instant::now() + LIMIT;
    while !asleep.is_empty() && Instant::now() < until {
        std::thread::park_timeout(PAUSE);
        asleep.retain(|s| naps(s.pid, s.tid).is_some_and(|naps| naps == s.naps));
    }
    asleep.first().map(told)
}

fn of_process(pid: i32) -> Vec<Sleeper> {
    // Whoever has ended meanwhile does not sleep.
    let threads = inject::threads(pid).unwrap_or_default().into_iter();
    threads.filter_map(|tid| naps(pid, tid).map(|naps| Sleeper { pid, tid, naps })).collect()
}

/// Returns how often a thread has gone to sleep, if it sleeps uninterruptibly. proc_pid_status(5)
fn naps(pid: i32, tid: i32) -> Option<String> {
    let status = proc_text(pid, &format!("task/{tid}/status")).ok()?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    value("State:")?.trim().starts_with('D').then_some(())?;
    Some(value("voluntary_ctxt_switches:")?.trim().to_owned())
}

fn told(sleeper: &Sleeper) -> Problem {
    let Sleeper { pid, tid, .. } = sleeper;
    let name = proc_text(*pid, "comm").unwrap_or_default();
    let who = format!("thread {tid} of process {pid} ({})", name.trim());
    let what = "a task of the container cannot be stopped";
    if waits_for_child(*tid) {
        Problem::new(
            what,
            format!("{who} has called vfork, and its child neither starts a program nor ends"),
        )
        .hint("end the child, or have the program use fork")
    } else {
        Problem::new(what, format!("{who} has slept uninterruptibly for a second"))
            .hint("try again when the disk or server that it waits for has answered")
    }
}

/// Tells whether a thread is in a system call that makes processes: nothing in those takes long but the
/// wait for a child.
pub fn waits_for_child(tid: i32) -> bool {
    let text = proc_text(tid, "syscall").unwrap_or_default();
    let number = text.split(' ').next().and_then(|n| n.parse::<i64>().ok());
    number.is_some_and(|n| FORKS.contains(&n))
}

#[cfg(target_arch = "x86_64")]
const FORKS: &[i64] = &[libc::SYS_clone, libc::SYS_clone3, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FORKS: &[i64] = &[libc::SYS_clone, libc::SYS_clone3];

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_parent_in_vfork_is_told_and_nobody_else() {
        assert_eq!(problem(&[std::process::id() as i32]), None);
        // Only the child's exec or end lets it go on: CLONE_VFORK, clone(2).
        let program = r#"
            $| = 1;
            my $child = syscall($ARGV[0] + 0, 0x4000 | 17, 0, 0, 0, 0);
            if ($child == 0) { print "ready\n"; <STDIN>; }
        "#;
        let mut child = Command::new("perl")
            .args(["-e", program, &libc::SYS_clone.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());

        output.read_line(&mut String::new()).unwrap();
        let pid = child.id() as i32;
        while naps(pid, pid).is_none() {
            std::thread::yield_now();
        }

        let found = problem(&[pid]);
        drop(child.stdin.take());
        child.wait().unwrap();
        let words = format!("process {pid} (perl) has called vfork");
        assert!(found.is_some_and(|p| p.fatal && p.why.contains(&words) && !p.hint.is_empty()));
        assert_eq!(problem(&[pid]), None, "it has ended");
    }
}
