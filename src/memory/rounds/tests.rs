//! Rounds over memory of this process.

use super::*;

/// Pages over there, how many came with their contents, and how many as like others.
#[derive(Default)]
struct Copy(HashMap<u64, Vec<u8>>, usize, usize);

impl Sink for Copy {
    fn pages(&mut self, _: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        for (i, page) in bytes.chunks_exact(PAGE).enumerate() {
            self.0.insert(vaddr + (i * PAGE) as u64, page.to_vec());
            self.1 += 1;
        }
        Ok(())
    }
    fn zeros(&mut self, _: i32, vaddr: u64, pages: usize) -> Result<()> {
        for i in 0..pages {
            self.0.insert(vaddr + (i * PAGE) as u64, vec![0; PAGE]);
        }
        Ok(())
    }
    fn same(&mut self, _: i32, vaddr: u64, from: (i32, u64), pages: usize) -> Result<()> {
        for i in 0..pages {
            let page = self.0[&(from.1 + (i * PAGE) as u64)].clone();
            self.0.insert(vaddr + (i * PAGE) as u64, page);
            self.2 += 1;
        }
        Ok(())
    }
    fn remote(&mut self, _: i32, vaddr: u64, pages: usize) -> Result<()> {
        for i in 0..pages {
            self.0.remove(&(vaddr + (i * PAGE) as u64));
        }
        Ok(())
    }
}

/// A child that does nothing: its memory stands still while we look at it.
#[test]
fn a_second_round_over_a_still_task_sends_nothing() {
    let mut child = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let task = Task { pid: child.id() as i32, vpid: 1 };
    // It is settled when it waits for its standard input.
    let wchan = format!("/proc/{}/syscall", task.pid);
    while !std::fs::read_to_string(&wchan).unwrap_or_default().starts_with("0 0x0 ") {
        std::thread::yield_now();
    }
    let (mut rounds, mut copy) = (Rounds::new(Tracking::Hash, 7), Copy::default());
    let first = rounds.round(task, false, &mut copy).unwrap();
    assert!(first.sent > 10, "{first:?}");
    let second = rounds.round(task, false, &mut copy).unwrap();
    assert_eq!((second.sent, second.zero, second.same), (0, 0, 0));
    assert_eq!(second.scanned, first.scanned);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert_eq!(rounds.round(task, false, &mut copy).unwrap(), MemoryRoundStats::default());
}

#[test]
fn runs_are_cut_where_the_kind_changes() {
    let mut buffer = vec![0u8; 6 * PAGE];
    buffer[PAGE] = 1;
    buffer[2 * PAGE + 5] = 2;
    buffer[5 * PAGE + 4095] = 3;
    let (mut sent, mut copy) = (SentPages::new(7), Copy::default());
    let mut stats = MemoryRoundStats::default();
    let runs = [(0x1000, 4), (0x9000, 2)];
    judge_and_send(7, &runs, &buffer, &[3], &mut sent, &mut copy, &mut stats).unwrap();
    assert_eq!((stats.scanned, stats.sent, stats.zero), (5, 3, 2));
    assert_eq!(copy.0[&0x2000][0], 1);
    assert_eq!(copy.0[&0x3000][5], 2);
    assert_eq!(copy.0[&0xa000][4095], 3);
    assert!(!copy.0.contains_key(&0x4000), "a page that could not be read is not sent");
    assert_eq!(copy.1, 3);
}
#[test]
fn equal_pages_go_once_and_never_as_what_is_not_there_any_more() {
    let page = |n: u8| vec![n; PAGE];
    let (mut sent, mut copy) = (SentPages::new(7), Copy::default());
    let mut hand = |at: u64, pages: &[u8]| {
        let bytes: Vec<u8> = pages.iter().flat_map(|n| page(*n)).collect();
        let mut stats = MemoryRoundStats::default();
        let runs = [(at, pages.len())];
        judge_and_send(7, &runs, &bytes, &[], &mut sent, &mut copy, &mut stats).unwrap();
        for (i, n) in pages.iter().enumerate() {
            assert_eq!(copy.0[&(at + (i * PAGE) as u64)], page(*n));
        }
        stats
    };

    assert_eq!(hand(0x1000, &[1, 2, 3]).sent, 3);
    assert_eq!(hand(0x9000, &[1, 2, 3]).same, 3);
    assert_eq!(hand(0x9000, &[1, 2, 3]).unchanged, 3);

    // What 0x1000 had is there no more, but 0x9000 still has it.
    assert_eq!(hand(0x1000, &[4]).sent, 1);
    let again = hand(0x20000, &[1, 4]);
    assert_eq!((again.sent, again.same), (1, 1));

    // From then on under its new place.
    assert_eq!(hand(0x30000, &[1]).same, 1);
    assert_eq!(hand(0x30000, &[0]).zero, 1);
    assert_eq!(hand(0x30000, &[1]).same, 1);
}
/// What a kernel of ours can is what it says it can: a task that writes to one page between two
/// looks is found to have done so, by every way of looking that is there.
#[test]
fn every_way_of_looking_finds_what_was_written() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use std::io::{BufRead, BufReader, Write};
    let mut ways = vec![Tracking::Hash];
    ways.extend([best(Tracking::WriteProtect), best(Tracking::SoftDirty)]);

    for way in ways {
        println!("by {way:?}");
        let program = "$| = 1; my $m = 'x' x (4 << 20); print \"ready\\n\";
            while (<STDIN>) { substr($m, $_, 1) = 'y'; print \"done\\n\"; }";
        let mut child = std::process::Command::new("perl")
            .args(["-e", program])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();

        said.next().unwrap().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let task = Task { pid: child.id() as i32, vpid: 1 };
        let (mut rounds, mut copy) = (Rounds::new(way, 7), Copy::default());
        let mut round = |copy: &mut Copy| {
            let still = rounds.wants_them_still();
            if still {
                kill(pid, Signal::SIGSTOP).unwrap();
                let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
                while !state().contains(") T") {
                    std::thread::yield_now();
                }
            }

            let found = rounds.find(task, false).unwrap();
            if still {
                kill(pid, Signal::SIGCONT).unwrap();
            }
            rounds.hand_on(task, found, false, copy).unwrap()
        };

        let first = round(&mut copy);
        assert!(first.sent + first.same >= 1024, "{way:?}: {first:?}");
        writeln!(child.stdin.as_mut().unwrap(), "{}", 1 << 20).unwrap();
        said.next().unwrap().unwrap();
        let second = round(&mut copy);
        assert!((1..200).contains(&(second.sent + second.same)), "{way:?}: {second:?}");
        if way != Tracking::Hash {
            // A write to a huge page counts for its 512 small ones.
            assert!(second.scanned < 600, "{way:?} looks at all of it: {second:?}");
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
