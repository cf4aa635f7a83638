//! odd-mappings: memory of every kind that a program can have, and each page of it known by heart.
//!
//! Addresses are the same whenever it is started, so that what a migration has made of them can be compared
//! line by line. At SIGUSR1 it looks at all of its memory, and its child at that which both have had since
//! the fork; what they found is then in the file `/verdict`. With `--share` that is 32 MiB of shared memory, and such as both
//! write to. With `--flip` one thing more goes on: advice is
//! given and taken back, and what the kernel says of it is looked at in between.

mod shared;

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const PAGE: usize = 4096;
const READ: i32 = libc::PROT_READ;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// `MADV_GUARD_INSTALL`, `PR_SET_VMA`, `PR_SET_VMA_ANON_NAME`.
const GUARD: i32 = 102;
const SET_VMA: i32 = 0x5356_4d41;
/// Mappings so small that they are many.
const MANY: usize = 2000;
/// What the flipping thread has found wrong.
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Pages of one mapping, some of which were written to.
struct Area {
    name: &'static str,
    at: usize,
    pages: usize,
    /// One of so many is left alone.
    gap: usize,
    /// What is in them.
    seed: u64,
    /// Pages that a guard stands before.
    guarded: std::ops::Range<usize>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = fs::write("/verdict", format!("cannot begin: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

/// The result of a system call.
fn done(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn run() -> io::Result<()> {
    // SAFETY: numbers go in and come out.
    let personality = unsafe { libc::personality(0xffff_ffff) };
    if personality & libc::ADDR_NO_RANDOMIZE == 0 {
        // SAFETY: as above.
        done(unsafe { libc::personality((personality | libc::ADDR_NO_RANDOMIZE) as _) })?;
        let mut command = Command::new("/proc/self/exe");
        return Err(command.arg0("/odd-mappings").args(std::env::args().skip(1)).exec());
    }

    let flips = std::env::args().any(|argument| argument == "--flip");
    let wanted = block_signals();
    let shares = std::env::args().any(|argument| argument == "--share");
    let mut areas = match (flips, shares) {
        (true, _) => vec![area("plain", 512, BOTH, ANONYMOUS, 3, 1)?],
        (_, true) => {
            vec![area("shared", 8192, BOTH, libc::MAP_SHARED | libc::MAP_ANONYMOUS, 5, 7)?]
        }
        _ => all()?,
    };

    let mut shared = if shares { Some(shared::Shared::new()?) } else { None };
    let (hear, mut tell) = io::pipe()?;
    let mut hear = BufReader::new(hear);

    // SAFETY: there is one thread.
    let forked = unsafe { libc::fork() };
    done(forked)?;
    if forked == 0 {
        // A tenth of what both have is its own from here on.
        areas.retain(|area| !matches!(area.name, "dontfork" | "wipeonfork"));
        if let Some(shared) = areas.iter().find(|area| area.name == "forked") {
            for page in (0..shared.pages).step_by(10) {
                shared.write(page, 77);
            }
        }

        shared.iter_mut().for_each(|shared| shared.write(true));
        loop {
            wait(&wanted)?;
            let found = look(&areas, |area, page| area.name == "forked" && page % 10 == 0);
            let found = found.and_then(|found| also(found, shared.as_ref(), false));
            writeln!(tell, "{}", found.unwrap_or_else(|e| e))?;
        }
    }

    for number in 0..3 {
        // One after the other, so that each finds its place where it was the last time.
        let (begun, began) = std::sync::mpsc::channel();
        std::thread::spawn(move || stay(number, begun));
        let _ = began.recv();
    }

    shared.iter_mut().for_each(|shared| shared.write(false));
    if flips {
        let at = map(1024 * PAGE, BOTH, ANONYMOUS)?;
        std::thread::spawn(move || flip(at, 1024 * PAGE));
    }
    fs::write("/ready", "")?;

    loop {
        wait(&wanted)?;
        let own = look(&areas, |_, _| false);
        let own = own.and_then(|own| also(own, shared.as_ref(), true)).unwrap_or_else(|e| e);
        // SAFETY: it is a child that has not been waited for.
        done(unsafe { libc::kill(forked, libc::SIGUSR1) })?;
        let mut child = String::new();
        hear.read_line(&mut child)?;
        let wrong = WRONG.load(Ordering::SeqCst);
        fs::write("/verdict.new", format!("parent: {own}\nchild: {child}flips: {wrong} wrong\n"))?;
        fs::rename("/verdict.new", "/verdict")?;
    }
}

/// What was found, if what is shared is right, too.
fn also(found: String, shared: Option<&shared::Shared>, first: bool) -> Result<String, String> {
    shared.map_or(Ok(()), |shared| shared.look(first)).map(|()| found)
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: an empty set is made before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut());
        set
    }
}

fn wait(set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set lives, and nothing else is wanted.
    while unsafe { libc::sigwaitinfo(set, null_mut()) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

fn map(length: usize, access: i32, flags: i32) -> io::Result<usize> {
    // SAFETY: a new mapping, wherever the kernel finds room.
    let at = unsafe { libc::mmap(null_mut(), length, access, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at as usize) }
}

fn advise(area: &Area, pages: std::ops::Range<usize>, advice: i32) -> io::Result<()> {
    let (at, length) = (area.at + pages.start * PAGE, pages.len() * PAGE);
    // SAFETY: within a mapping that nothing but this program's own numbers are in.
    match done(unsafe { libc::madvise(at as *mut _, length, advice) }) {
        // The kernel is without it.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

fn area(
    name: &'static str,
    pages: usize,
    access: i32,
    flags: i32,
    gap: usize,
    seed: u64,
) -> io::Result<Area> {
    // One page of nothing before it, so that no two become one.
    let at = map((pages + 1) * PAGE, BOTH, flags)?;
    // SAFETY: the first page of what is new.
    done(unsafe { libc::munmap(at as *mut _, PAGE) })?;
    let area = Area { name, at: at + PAGE, pages, gap, seed, guarded: 0..0 };
    area.fill();
    if access != BOTH {
        // SAFETY: this mapping.
        done(unsafe { libc::mprotect(area.at as *mut _, pages * PAGE, access) })?;
    }
    Ok(area)
}

fn all() -> io::Result<Vec<Area>> {
    let mut areas = vec![
        area("plain", 2048, BOTH, ANONYMOUS, 3, 1)?,
        area("forked", 1024, BOTH, ANONYMOUS, 7, 2)?,
        area("none", 64, libc::PROT_NONE, ANONYMOUS, 5, 3)?,
        area("read-only", 64, READ, ANONYMOUS, 5, 4)?,
        area("executable", 64, BOTH | libc::PROT_EXEC, ANONYMOUS, 5, 5)?,
        area("unreserved", 64 << 10, BOTH, ANONYMOUS | libc::MAP_NORESERVE, 499, 6)?,
        area("shared", 64, BOTH, libc::MAP_SHARED | libc::MAP_ANONYMOUS, 5, 7)?,
        area("grows-down", 16, BOTH, ANONYMOUS | libc::MAP_GROWSDOWN, 5, 8)?,
    ];

    for (name, advice) in [
        ("huge", libc::MADV_HUGEPAGE),
        ("never-huge", libc::MADV_NOHUGEPAGE),
        ("dontfork", libc::MADV_DONTFORK),
        ("wipeonfork", libc::MADV_WIPEONFORK),
        ("dontdump", libc::MADV_DONTDUMP),
        ("sequential", libc::MADV_SEQUENTIAL),
        ("random", libc::MADV_RANDOM),
        ("mergeable", libc::MADV_MERGEABLE),
    ] {
        let one = area(name, 1024, BOTH, ANONYMOUS, 3, 20 + advice as u64)?;
        advise(&one, 0..one.pages, advice)?;
        areas.push(one);
    }

    let mut guards = area("guards", 128, BOTH, ANONYMOUS, 5, 40)?;
    advise(&guards, 50..60, GUARD)?;
    guards.guarded = 50..60;
    areas.push(guards);

    let locked = area("locked", 8, BOTH, ANONYMOUS, 9, 41)?;
    // SAFETY: this mapping. The limit may not allow it, which is no matter here.
    let _ = unsafe { libc::mlock(locked.at as *const _, locked.pages * PAGE) };
    areas.push(locked);

    let named = area("named", 64, BOTH, ANONYMOUS, 5, 42)?;
    let length = named.pages * PAGE;

    // SAFETY: this mapping, and a string that ends. Not every kernel has names.
    let _ = unsafe { libc::prctl(SET_VMA, 0, named.at, length, c"of our own".as_ptr()) };
    areas.push(named);

    // The heap, whose end no allocator of this program moves.
    // SAFETY: the break is where it was, and further on.
    let brk = unsafe { libc::sbrk(600 * PAGE as isize) } as usize;
    let at = brk.next_multiple_of(PAGE);
    areas.push(Area { name: "heap", at, pages: 590, gap: 4, seed: 43, guarded: 0..0 });
    areas.last().unwrap().fill();

    // A file's, half of it this program's own.
    let file = fs::File::open("/proc/self/exe")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);

    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(null_mut(), 32 * PAGE, BOTH, libc::MAP_PRIVATE, fd, 0) } as usize;
    areas.push(Area { name: "of a file", at, pages: 32, gap: 2, seed: 44, guarded: 0..0 });
    areas.last().unwrap().fill();

    // Every second with other access, so that they stay apart.
    let many = area("many", MANY, BOTH, ANONYMOUS, 3, 45)?;
    for page in (0..MANY).step_by(2) {
        // SAFETY: a page of this mapping.
        done(unsafe { libc::mprotect((many.at + page * PAGE) as *mut _, PAGE, READ) })?;
    }
    areas.push(many);

    Ok(areas)
}

impl Area {
    fn is_written(&self, page: usize) -> bool {
        let written = match self.name {
            "unreserved" => page.is_multiple_of(self.gap),
            _ => page % self.gap != self.gap - 1,
        };
        written && !self.guarded.contains(&page)
    }

    fn value(&self, page: usize, salt: u64) -> u64 {
        (self.seed << 32 | page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt
    }

    fn write(&self, page: usize, salt: u64) {
        let value = self.value(page, salt);
        for word in [0, PAGE / 2, PAGE - 8] {
            // SAFETY: within the mapping, which can be written to now.
            unsafe { ((self.at + page * PAGE + word) as *mut u64).write_volatile(value) };
        }
    }

    fn fill(&self) {
        for page in (0..self.pages).filter(|page| self.is_written(*page)) {
            self.write(page, 0);
        }
    }
}

/// Whether every page is as it was; `own` says which of them are this process's since the fork.
fn look(areas: &[Area], own: impl Fn(&Area, usize) -> bool) -> Result<String, String> {
    let memory = fs::File::open("/proc/self/mem").map_err(|e| e.to_string())?;
    let mut seen = 0;
    for area in areas {
        // A file's own pages are known by nobody.
        let known = |page: &usize| area.is_written(*page) || area.name != "of a file";
        for page in (0..area.pages).filter(known).filter(|page| !area.guarded.contains(page)) {
            let expected = match area.is_written(page) || own(area, page) {
                true => area.value(page, if own(area, page) { 77 } else { 0 }),
                false => 0,
            };
            for word in [0, PAGE / 2, PAGE - 8] {
                let at = area.at + page * PAGE + word;
                let found = match area.name {
                    // What nobody may read by itself, is read all the same.
                    "none" => {
                        let mut bytes = [0; 8];
                        memory.read_exact_at(&mut bytes, at as u64).map_err(|e| e.to_string())?;
                        u64::from_ne_bytes(bytes)
                    }
                    // SAFETY: within the mapping, which can be read.
                    _ => unsafe { (at as *const u64).read_volatile() },
                };

                if found != expected {
                    return Err(format!("page {page} of {} is {found:#x}", area.name));
                }
            }
            seen += 1;
        }
    }

    Ok(format!("{seen} pages are right"))
}

/// A thread with a stack of its own, whose contents change.
fn stay(number: u64, begun: std::sync::mpsc::Sender<()>) {
    let _ = begun.send(());
    drop(begun);
    let mut own = [number; 1000];
    loop {
        let first = own[0];
        if own.iter().any(|value| *value != first) {
            WRONG.fetch_add(1, Ordering::SeqCst);
        }
        std::hint::black_box(&mut own).iter_mut().for_each(|value| *value += 1);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Gives advice and takes it back, and looks whether the kernel still knows.
fn flip(at: usize, length: usize) {
    for turn in 0_u64.. {
        let (advice, given) =
            [(libc::MADV_DONTFORK, true), (libc::MADV_DOFORK, false)][turn as usize % 2];
        // SAFETY: this mapping.
        let result = unsafe { libc::madvise(at as *mut _, length, advice) };
        // Whatever comes in between has to keep it.
        std::thread::sleep(Duration::from_millis(2));
        // What comes in the middle of a reading has it go on at as many bytes of another text: only what two in
        // a row say is what the kernel knows. A flag that is lost is so in both.
        let mut said = is_not_forked(at);
        loop {
            let again = is_not_forked(at);
            if std::mem::replace(&mut said, again) == again {
                break;
            }
        }
        if result != 0 || said != given {
            WRONG.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Whether the kernel says `dc` of the mapping that begins there.
fn is_not_forked(at: usize) -> bool {
    let text = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mine = text.split_once(&format!("{at:x}-")).map_or("", |(_, rest)| rest);
    let flags = mine.lines().find(|line| line.starts_with("VmFlags:")).unwrap_or("");
    flags.contains(" dc")
}
