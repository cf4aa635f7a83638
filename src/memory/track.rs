//! Which pages a task has written to since we last looked: asynchronous write protection by
//! userfaultfd, from outside (Linux 6.7; no soft-dirty needed, so it fits arm64 and cloud kernels).
//!
//! The task is made to open a userfaultfd ([`inject`]); Ferry takes it and watches the task's
//! private anonymous mappings with it. A `PAGEMAP_SCAN` then hands out the pages written to and
//! protects them again in one step; the task itself pays a microsecond for the first write to a
//! page in a round and is never stopped. Mappings that came or moved since fail the scan with
//! `EPERM` and are watched from then on, all their pages counting as written.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::pages::Task;
use crate::sys::memory::{
    PAGE, PageRegion, ScanFilter, UFFD_USER_MODE_ONLY, category, pagemap_scan, uffd_new,
    uffd_track_writes, uffd_unprotect, uffd_watch_writes,
};
use crate::sys::{inject, process};

/// Time that a task may take to do a call for us; one that cannot is compared by hash.
const PATIENCE: Duration = Duration::from_millis(200);

/// A task being watched.
#[derive(Debug)]
pub struct Tracker {
    uffd: OwnedFd,
    /// `category::GUARD` where the kernel knows it.
    guard: u64,
}

/// What a look at a watched task gives.
#[derive(Debug, Default)]
pub struct Written {
    /// Pages written to since the last look (all, at the first).
    pub regions: Vec<PageRegion>,
    /// Mappings that cannot be watched (somebody else's userfaultfd is on them).
    pub unwatched: Vec<(u64, u64)>,
}

impl Tracker {
    /// Tells whether this kernel can.
    pub fn supported() -> bool {
        let own = || -> io::Result<()> {
            uffd_track_writes(&uffd_new(UFFD_USER_MODE_ONLY)?)?;
            let pagemap = File::open("/proc/self/pagemap")?;
            let wanted = ScanFilter { inverted: 0, mask: 0, any_of: 0, protect: false };
            pagemap_scan(&pagemap, 0, PAGE as u64, wanted, &mut Vec::new())
        };
        own().is_ok()
    }

    /// Starts to watch. The task runs on; one of its threads stands still for less than a
    /// millisecond.
    ///
    /// # Errors
    /// When the kernel cannot, or the task does not let us (it is being traced, or has no free
    /// descriptor).
    pub fn attach(task: Task) -> io::Result<Tracker> {
        // On a thread that ends: see `Stopped::within`.
        let uffd = std::thread::scope(|scope| {
            let work = scope.spawn(|| uffd_of(task));
            work.join().unwrap_or_else(|_| Err(io::Error::other("the thread has died")))
        })?;
        uffd_track_writes(&uffd)?;
        Ok(Tracker { uffd, guard: category::GUARD })
    }

    /// The pages written to since the last look, which starts a new one.
    ///
    /// # Errors
    /// `ESRCH`/`ENOMEM` when the task has ended or lives in other memory since an exec.
    pub fn look(&mut self, task: Task, mappings: &[(u64, u64)]) -> Result<Written> {
        let pagemap = File::open(format!("/proc/{}/pagemap", task.pid))?;
        let mut written = Written::default();
        for &(start, end) in mappings {
            match self.scan(&pagemap, start, end, &mut written.regions) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                    match uffd_watch_writes(&self.uffd, start, end - start) {
                        // The first try has protected what it found before it failed, and told
                        // nobody: all that is there counts as written.
                        Ok(()) => {
                            written.regions.extend(self.begin(&pagemap, start, end)?);
                        }
                        Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EINVAL)) => {
                            written.unwatched.push((start, end));
                        }
                        Err(e) => return Err(e.into()),
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(written)
    }

    /// Protects a mapping that is watched from now on; all that it has.
    ///
    /// Some of it may have been watched before: a mapping that another one was moved beside becomes one
    /// with that, and neither is watched then. But its pages keep the mark that says that nobody has written to
    /// them, also when somebody does: a look would take them for unwritten and protected for ever. So every
    /// mark goes first. To count what a look finds against what is there would not do: the task gives pages
    /// back between the two.
    fn begin(&mut self, pagemap: &File, start: u64, end: u64) -> io::Result<Vec<PageRegion>> {
        uffd_unprotect(&self.uffd, start, end - start)?;
        let mut all = Vec::new();
        self.scan(pagemap, start, end, &mut all)?;
        Ok(all)
    }

    /// Returns how many pages were written to since the last look, without starting a new one.
    ///
    /// # Errors
    /// As [`Tracker::look`].
    pub fn count(&self, task: Task, mappings: &[(u64, u64)]) -> Result<u64> {
        let pagemap = File::open(format!("/proc/{}/pagemap", task.pid))?;
        let mut found = Vec::new();
        let out = category::PFNZERO | self.guard;
        let wanted = ScanFilter {
            inverted: out,
            mask: out | category::WRITTEN,
            any_of: category::PRESENT | category::SWAPPED,
            protect: false,
        };
        for &(start, end) in mappings {
            pagemap_scan(&pagemap, start, end, wanted, &mut found)?;
        }
        Ok(found.iter().map(|r| (r.end - r.start) / PAGE as u64).sum())
    }

    fn scan(
        &mut self,
        pagemap: &File,
        start: u64,
        end: u64,
        found: &mut Vec<PageRegion>,
    ) -> io::Result<()> {
        loop {
            let out = category::PFNZERO | self.guard;
            let wanted = ScanFilter {
                inverted: out,
                mask: out | category::WRITTEN,
                any_of: category::PRESENT | category::SWAPPED,
                protect: true,
            };
            match pagemap_scan(pagemap, start, end, wanted, found) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && self.guard != 0 => {
                    self.guard = 0;
                }
                result => return result,
            }
        }
    }
}

/// Makes a task open a userfaultfd, and takes it.
fn uffd_of(task: Task) -> io::Result<OwnedFd> {
    let until = Instant::now() + PATIENCE;
    let pidfd = process::pidfd_open(task.pid)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    let mut last = io::Error::from_raw_os_error(libc::ESRCH);
    // Any thread will do; the first may be a zombie while others live, or wait for a child's exec.
    for tid in inject::threads(task.pid)? {
        let take = |fd| process::pidfd_getfd(&pidfd, fd);
        match inject::userfaultfd_of(tid, flags as u64, until, take) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH)) => last = e,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => last = e,
            other => return other,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use super::*;
    use crate::memory::pages;

    /// A task that holds 4 MiB and writes to one byte of it each time it is told an offset.
    struct Writer {
        child: Child,
        input: Option<ChildStdin>,
        output: BufReader<ChildStdout>,
    }

    impl Writer {
        fn start() -> Writer {
            let program = r#"
                $| = 1; my $m = "x" x (4 << 20); print "ready\n";
                while (<STDIN>) { substr($m, $_, 1) = chr(65 + $_ % 26); print "done\n"; }
            "#;
            let mut child = Command::new("perl")
                .args(["-e", program])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let input = child.stdin.take();
            let output = BufReader::new(child.stdout.take().unwrap());
            let mut writer = Writer { child, input, output };
            writer.line();
            writer
        }

        fn line(&mut self) {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "the task has died");
        }

        fn write_at(&mut self, offset: usize) {
            writeln!(self.input.as_mut().unwrap(), "{offset}").unwrap();
            self.line();
        }

        fn task(&self) -> Task {
            Task { pid: self.child.id() as i32, vpid: 1 }
        }
    }

    impl Drop for Writer {
        fn drop(&mut self) {
            drop(self.input.take());
            let _ = self.child.wait();
        }
    }

    fn bytes(written: &Written) -> u64 {
        written.regions.iter().map(|r| r.end - r.start).sum()
    }

    /// Only its child's exec or end lets a parent go on: CLONE_VFORK, clone(2).
    #[test]
    fn a_task_that_cannot_be_stopped_does_not_hold_us_up() {
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
        while !process::proc_text(pid, "status").unwrap().contains("State:\tD") {
            std::thread::yield_now();
        }

        let began = Instant::now();
        let failed = Tracker::attach(Task { pid, vpid: 1 }).unwrap_err();
        assert!(began.elapsed() < 10 * PATIENCE, "{:?}", began.elapsed());
        drop(child.stdin.take());

        // It is not stopped by us any more either.
        assert!(child.wait().unwrap().success());
        let can = [io::ErrorKind::TimedOut, io::ErrorKind::Unsupported].contains(&failed.kind());
        assert!(can, "{failed}");
    }

    /// A mapping between two others makes one with them, of which the kernel forgets that it was watched,
    /// but not which of its pages nobody has written to.
    #[test]
    fn mappings_that_grow_together_are_watched_anew() {
        // A byte of the first page is written to each time; when told, what lies elsewhere is put between.
        let program = r#"
            my ($mmap, $mremap, $read, $mprotect) = @ARGV; $| = 1;
            open(my $zero, "<", "/dev/zero"); my $n = 16 * 4096;
            my $at = syscall($mmap + 0, 0, 3 * $n, 3, 34, -1, 0);
            my $other = syscall($mmap + 0, 0, 3 * $n, 0, 34, -1, 0) + $n;
            syscall($mprotect + 0, $other, $n, 3);
            for (0, 2) { syscall($read + 0, fileno($zero), $at + $_ * $n, $n); }
            print "$at\n";
            while (<STDIN>) {
                if (/move/) { print syscall($mremap + 0, $other, $n, $n, 3, $at + $n), "\n"; }
                else { print syscall($read + 0, fileno($zero), $at, 1), "\n"; }
            }
        "#;
        let numbers = [libc::SYS_mmap, libc::SYS_mremap, libc::SYS_read, libc::SYS_mprotect];

        let numbers = numbers.map(|n| n.to_string());
        let mut child = Command::new("perl")
            .args(["-e", program])
            .args(&numbers)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();

        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line.trim().parse::<u64>().unwrap()
        };

        let at = line();
        let task = Task { pid: child.id() as i32, vpid: 1 };

        // A kernel without it: the hashes take over, and have their own test.
        let Ok(mut tracker) = Tracker::attach(task) else {
            drop(input);
            let _ = child.wait();
            return;
        };

        let mut look = || {
            let found = tracker.look(task, &pages::anonymous_mappings(task.pid).unwrap()).unwrap();
            found.regions.iter().any(|r| (r.start..r.end).contains(&at))
        };
        assert!(look(), "at first all of it");
        assert!(!look());
        writeln!(input, "move").unwrap();
        assert_eq!(line(), at + 16 * PAGE as u64);

        // The first time as nobody watches it.
        for round in 0..3 {
            writeln!(input, "write").unwrap();
            assert_eq!(line(), 1);
            assert!(look(), "in round {round}");
        }

        assert!(!look());
        drop(input);
        let _ = child.wait();
    }

    #[test]
    fn only_what_was_written_is_told_and_the_task_does_not_notice() {
        let mut writer = Writer::start();
        let task = writer.task();
        let mut tracker = match Tracker::attach(task) {
            Ok(tracker) => tracker,
            // A kernel without it: the hashes take over, and have their own test.
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EINVAL), "{e}");
                return;
            }
        };

        let look = |tracker: &mut Tracker| {
            tracker.look(task, &pages::anonymous_mappings(task.pid).unwrap()).unwrap()
        };
        let first = look(&mut tracker);
        assert!(bytes(&first) >= 4 << 20, "at first all of it: {}", bytes(&first));
        writer.write_at(0);
        look(&mut tracker);

        let still = look(&mut tracker);
        assert_eq!(bytes(&still), 0, "{still:?}");
        writer.write_at(1 << 20);
        writer.write_at(3 << 20);
        let some = look(&mut tracker);
        assert!((8192..512 << 10).contains(&bytes(&some)), "{some:?}");
        drop(tracker);

        // It is as it was: no descriptor left behind, and it goes on.
        writer.write_at(2 << 20);
        let left = fs::read_dir(format!("/proc/{}/fd", task.pid)).unwrap().flatten().any(|e| {
            fs::read_link(e.path()).is_ok_and(|t| t.to_string_lossy().contains("userfaultfd"))
        });
        assert!(!left);
    }
}
