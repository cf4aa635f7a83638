//! Whatever a task does to its memory between rounds, and while one is made: after the last one, in which
//! it stands still, the other side has every page that CRIU would leave to us, byte by byte.
//!
//! The task is a perl that makes system calls as it is told, so that memory is mapped, moved, given back
//! and read into at known addresses. It forks, too: each child is told for itself.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::pages::{self, Task};
use super::pending::Pending;
use super::rounds::{Rounds, Sink, Tracking, best};
use super::staging::{PageSlot, Staging};
use crate::criu::images::{PE_LAZY, PagemapEntry};
use crate::fuzz::Random;
use crate::sys::memory::PAGE;
use crate::sys::{inject, stopped};

/// Pages in which things happen: two huge ones, and some.
const ARENA: usize = 1200;
/// Pages that all tasks of a sequence may have.
const MOST: usize = 1 << 17;

const PROGRAM: &str = r#"
    use Fcntl;
    $| = 1; $SIG{CHLD} = "IGNORE";
    my @open;
    print "ready\n";
    while (<STDIN>) {
        my ($what, @a) = split;
        if ($what eq "call") {
            my $n = shift @a;
            my $r = syscall($n + 0, map { $_ + 0 } @a);
            print $r == -1 ? "failed\n" : "$r\n";
        } elsif ($what eq "open") {
            my $ok = sysopen(my $f, $a[0], $a[1] + 0);
            push @open, $f;
            print $ok ? fileno($f) . "\n" : "failed\n";
        } elsif ($what eq "fork") {
            my $pid = fork();
            if ($pid == 0) {
                open(STDIN, "<", $a[0]); open(STDOUT, ">", $a[1]); $| = 1;
                print "ready\n";
            } else { print "$pid\n"; }
        }
    }
"#;

/// A task that does as it is told.
struct Puppet {
    pid: i32,
    child: Option<Child>,
    input: Option<Box<dyn std::io::Write>>,
    output: BufReader<Box<dyn std::io::Read>>,
    /// Where its arena begins; descriptors of random bytes, of the same past the page cache, of zeros, of
    /// a file to write to.
    arena: u64,
    files: [Option<i64>; 4],
    waits: bool,
}

impl Puppet {
    fn start(dir: &Path) -> Puppet {
        let mut child = Command::new("perl")
            .args(["-e", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());

        let mut puppet = Puppet {
            pid: child.id() as i32,
            child: Some(child),
            input: Some(Box::new(input)),
            output: BufReader::new(Box::new(output)),
            arena: 0,
            files: [None; 4],
            waits: false,
        };

        assert_eq!(puppet.line(), "ready");
        let bytes = dir.join("bytes");
        for (i, (path, flags)) in [
            (bytes.as_path(), libc::O_RDONLY),
            (&bytes, libc::O_RDONLY | libc::O_DIRECT),
            (Path::new("/dev/zero"), libc::O_RDONLY),
            (&dir.join("sink"), libc::O_RDWR | libc::O_CREAT),
        ]
        .into_iter()
        .enumerate()
        {
            // Not every file system reads past the page cache.
            puppet.files[i] = puppet.tell(&format!("open {} {flags}", path.display()));
        }

        let length = ARENA * PAGE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let made = puppet.call(libc::SYS_mmap, &[0, length as i64, 0, kind.into(), -1, 0]);
        puppet.arena = made.unwrap() as u64;

        puppet
    }

    /// A child that has all that this one has.
    fn fork(&mut self, dir: &Path, number: usize) -> Puppet {
        let at = |what: &str| dir.join(format!("{what}{number}"));
        let (input, output) = (at("in"), at("out"));
        for path in [&input, &output] {
            mkfifo(path, Mode::S_IRWXU).unwrap();
        }
        let words = format!("fork {} {}", input.display(), output.display());
        let pid = self.tell(&words).unwrap() as i32;
        // In this order it opens them.
        let input: Box<dyn std::io::Write> =
            Box::new(File::options().write(true).open(input).unwrap());
        let output: Box<dyn std::io::Read> = Box::new(File::open(output).unwrap());
        let (arena, files) = (self.arena, self.files);
        let output = BufReader::new(output);
        let mut child =
            Puppet { pid, child: None, input: Some(input), output, arena, files, waits: false };
        assert_eq!(child.line(), "ready");
        child
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the task has died");
        line.trim().to_owned()
    }

    /// Tells it to do something, and does not wait for that.
    fn begin(&mut self, words: &str) {
        self.end();
        writeln!(self.input.as_mut().unwrap(), "{words}").unwrap();
        self.waits = true;
    }

    /// Returns what came of it; none if it failed.
    fn end(&mut self) -> Option<i64> {
        let waits = std::mem::take(&mut self.waits);
        waits.then(|| self.line())?.parse().ok()
    }

    fn tell(&mut self, words: &str) -> Option<i64> {
        self.begin(words);
        self.end()
    }

    fn call(&mut self, number: i64, arguments: &[i64]) -> Option<i64> {
        self.tell(&words_of(number, arguments))
    }

    /// Does something to its memory, if that can be done. Says what.
    fn step(&mut self, random: &mut Random) -> String {
        let (first, pages) = range(random);
        let (at, length) = ((self.arena + (first * PAGE) as u64) as i64, (pages * PAGE) as i64);
        let access = i64::from(*random.of(&[
            libc::PROT_READ | libc::PROT_WRITE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::PROT_READ,
            libc::PROT_NONE,
        ]));

        let private = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        let read_write = i64::from(libc::PROT_READ | libc::PROT_WRITE);
        let what = random.below(22);
        let offset = (random.below(200) * PAGE) as i64;
        let (number, arguments) = match what {
            0..=2 => (libc::SYS_mmap, vec![at, length, read_write, private, -1, 0]),
            3 => (libc::SYS_munmap, vec![at, length]),
            4 | 5 => {
                let (to, other) = range(random);
                let new = *random.of(&[length, (other * PAGE) as i64]);
                let moves = i64::from(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
                let room = ARENA.saturating_sub(new as usize / PAGE);
                let to = self.arena + (to.min(room) * PAGE) as u64;
                (libc::SYS_mremap, vec![at, length, new, moves, to as i64])
            }
            6 | 7 => {
                let advice = *random.of(&[
                    libc::MADV_DONTNEED,
                    libc::MADV_DONTNEED,
                    libc::MADV_FREE,
                    libc::MADV_HUGEPAGE,
                    libc::MADV_NOHUGEPAGE,
                    libc::MADV_COLD,
                    libc::MADV_PAGEOUT,
                    libc::MADV_POPULATE_READ,
                    libc::MADV_POPULATE_WRITE,
                    libc::MADV_MERGEABLE,
                    // MADV_COLLAPSE, MADV_GUARD_INSTALL and _REMOVE
                    25,
                    102,
                    103,
                ]);
                (libc::SYS_madvise, vec![at, length, advice.into()])
            }
            8 => (libc::SYS_mprotect, vec![at, length, access]),
            // Memory of the kernel's, which goes to a file: read faults.
            9 | 10 => (libc::SYS_pwrite64, vec![self.files[3].unwrap_or(-1), at, length, 0]),
            11 => (libc::SYS_pread64, vec![self.files[2].unwrap_or(-1), at, length, 0]),
            12..=14 => (libc::SYS_pread64, vec![self.files[1].unwrap_or(-1), at, length, offset]),
            // A few bytes somewhere.
            15..=17 => {
                let within = at + random.below(PAGE) as i64;
                (libc::SYS_pread64, vec![self.files[0].unwrap_or(-1), within, 50, offset])
            }
            _ => (libc::SYS_pread64, vec![self.files[0].unwrap_or(-1), at, length, offset]),
        };

        let words = words_of(number, &arguments);
        // Reads may be under way while a round is made.
        if what >= 12 && random.below(2) == 0 {
            self.begin(&words);
        } else {
            self.tell(&words);
        }

        format!("{}: {words}\n", self.pid)
    }

    fn stop(&mut self) {
        self.end();
        kill(Pid::from_raw(self.pid), Signal::SIGSTOP).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap().contains(") T") {
            assert!(Instant::now() < until, "it does not stop");
            std::thread::yield_now();
        }
    }

    fn go_on(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGCONT).unwrap();
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGCONT);
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

fn words_of(number: i64, arguments: &[i64]) -> String {
    let arguments: Vec<String> = arguments.iter().map(i64::to_string).collect();
    format!("call {number} {}", arguments.join(" "))
}

/// Pages of the arena.
fn range(random: &mut Random) -> (usize, usize) {
    let first = random.below(ARENA);
    let most = *random.of(&[4, 40, 600]);
    (first, 1 + random.below(most.min(ARENA - first)))
}

/// The other side.
struct Over(Staging);

impl Sink for Over {
    fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        self.0.put(vpid, vaddr, bytes)
    }
    fn zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        self.0.put_zeros(vpid, vaddr, pages)
    }
    fn same(&mut self, vpid: i32, vaddr: u64, from: (i32, u64), pages: usize) -> Result<()> {
        self.0.put_same((vpid, vaddr), from, pages)
    }
    fn remote(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        self.0.put_remote(vpid, vaddr, pages)
    }
}

/// A round over running tasks, as the hand-over makes it: pages are read when the direct reads that the
/// look has seen begin are over.
fn round(rounds: &mut Rounds, puppets: &mut [Puppet], over: &mut Over) {
    let still = rounds.wants_them_still();
    if still {
        puppets.iter_mut().for_each(Puppet::stop);
    }
    rounds.arrived(true);
    let pids: Vec<i32> = puppets.iter().map(|puppet| puppet.pid).collect();
    let mut found = Vec::new();
    for task in pages::tasks(&pids).unwrap() {
        found.push((task, rounds.find(task, false).unwrap()));
    }

    if still {
        puppets.iter().for_each(Puppet::go_on);
    } else if rounds.is_watching() {
        let threads: Vec<i32> =
            pids.iter().flat_map(|pid| inject::threads(*pid).unwrap()).collect();
        let until = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            scope.spawn(|| stopped::await_outside(&threads, until).unwrap()).join().unwrap();
        });
    }

    for (task, found) in found {
        rounds.hand_on(task, found, false, over).unwrap();
    }
}

/// Returns what is wrong over there about a task that stands still.
fn differences(task: Task, over: &Over) -> Vec<String> {
    let regions = pages::populated(task.pid).unwrap();
    let anonymous = pages::anonymous_mappings(task.pid).unwrap();

    // Huge pages, zero pages, guards, merged and swapped ones: no file's are among them.
    assert_eq!(regions, pages::populated_in(task.pid, &anonymous).unwrap());
    let entry = |from: u64, to: u64| PagemapEntry {
        vaddr: from,
        pages: (to - from) / PAGE as u64,
        flags: PE_LAZY,
    };

    let entries: Vec<_> = regions.iter().map(|region| entry(region.start, region.end)).collect();
    let pending = match Pending::new(task.vpid, &entries, &over.0) {
        Ok(pending) => pending,
        Err(e) => return vec![e.to_string()],
    };
    let memory = File::open(format!("/proc/{}/mem", task.pid)).unwrap();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    let mut page = vec![0; PAGE];
    for (start, run) in &pending.0 {
        for i in 0..run.pages {
            let at = start + u64::from(i) * PAGE as u64;
            memory.read_exact_at(&mut page, at).unwrap();
            let same = match run.from(i).slot {
                PageSlot::Zero => page.iter().all(|byte| *byte == 0),
                PageSlot::At(slot) => page == over.0.bytes(slot, 1),
                PageSlot::Remote(_) => false,
            };

            seen += 1;
            if !same {
                wrong.push(format!("page {at:#x} of {task:?} is another one"));
            }
        }
    }

    assert_eq!(seen, entries.iter().map(|entry| entry.pages).sum::<u64>());
    wrong
}

fn sequence(seed: u64, way: Tracking, dir: &Path) {
    let mut random = Random(seed);
    let mut over = Over(Staging::new(MOST).unwrap());
    let mut rounds = Rounds::new(way, seed);
    let mut puppets = vec![Puppet::start(dir)];
    let mut done = String::new();
    for number in 0..3 + random.below(4) {
        for _ in 0..random.below(50) {
            let which = random.below(puppets.len());
            done += &puppets[which].step(&mut random);
        }
        if puppets.len() < 3 && random.below(3) == 0 {
            let which = random.below(puppets.len());
            let name = puppets.len() * 1000 + number;
            let child = puppets[which].fork(dir, name);
            done += &format!("{} forks {}\n", puppets[which].pid, child.pid);
            puppets.push(child);
        }

        round(&mut rounds, &mut puppets, &mut over);
        done += "round\n";
    }

    for _ in 0..random.below(30) {
        let which = random.below(puppets.len());
        done += &puppets[which].step(&mut random);
    }

    // They stand still, and it is looked twice, as in the freeze.
    puppets.iter_mut().for_each(Puppet::stop);
    let pids: Vec<i32> = puppets.iter().map(|puppet| puppet.pid).collect();
    let tasks = pages::tasks(&pids).unwrap();
    assert_eq!(tasks.len(), puppets.len());
    for _ in 0..2 {
        rounds.arrived(true);
        for task in &tasks {
            rounds.round(*task, true, &mut over).unwrap();
        }
    }

    let wrong: Vec<String> = tasks.iter().flat_map(|task| differences(*task, &over)).collect();
    let some = &wrong[..wrong.len().min(5)];
    assert!(wrong.is_empty(), "seed {seed}, {way:?}: {} pages: {some:#?}\n{done}", wrong.len());
}

#[test]
fn any_sequence_of_changes_of_memory_arrives() {
    let most = if std::env::var_os("FERRY_FULL").is_some() { 400 } else { 8 };
    let mut ways = vec![Tracking::Hash, best(Tracking::WriteProtect), best(Tracking::SoftDirty)];
    ways.dedup();

    // On a disk, where direct reads take their time.
    let program = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let mut bytes = vec![0; 1000 * PAGE];
    let mut random = Random(1);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_ne_bytes());
    }

    // Equal pages and empty ones are among them.
    bytes[..20 * PAGE].fill(0);
    bytes.copy_within(300 * PAGE..400 * PAGE, 100 * PAGE);
    fs::write(dir.path().join("bytes"), &bytes).unwrap();

    for seed in 0..most {
        for &way in &ways {
            let fifos: PathBuf = dir.path().join(format!("{way:?}-{seed}"));
            fs::create_dir(&fifos).unwrap();
            fs::hard_link(dir.path().join("bytes"), fifos.join("bytes")).unwrap();
            sequence(seed, way, &fifos);
            fs::remove_dir_all(&fifos).unwrap();
        }
    }
}
