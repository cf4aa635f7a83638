//! A thread that keeps changing files in every way, and checks what it finds in them against what
//! it remembers: a file that came along older or newer than memory shows.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::common::pages::SplitMix;

const BLOCK: usize = 4096;
/// Blocks of the file that is mapped.
const MAPPED: usize = 64;
/// Which bytes of it the process has locked.
const WRITE_LOCKED: i64 = 124;
const READ_LOCKED: i64 = 1 << 30;
/// Blocks checked at a time.
const LOOK: usize = 256;
/// Where a file without a name ends.
const NAMELESS: u64 = 3 << 20;
/// Small files that exist at a time.
const SMALL: u64 = 20;
const REST: Duration = Duration::from_millis(5);

/// What the thread tells.
#[derive(Default)]
pub struct Files {
    /// How often it came round.
    pub beats: AtomicU64,
    /// What it found wrong.
    pub bad: AtomicU64,
    /// In which line of this file the first of it was found; 0 if that was an error.
    pub line: AtomicU64,
    /// The number of the first error.
    pub errno: AtomicU64,
}

impl Files {
    /// Starts it in a directory, with a file of so many bytes of which so many blocks are written
    /// each second.
    pub fn start(directory: &Path, (bytes, rate): (u64, u64), seed: u64) -> io::Result<Arc<Files>> {
        let files = Arc::new(Files::default());
        let mut work = Work::new(directory, (bytes as usize / BLOCK).max(1), rate, seed)?;
        let told = files.clone();
        thread::spawn(move || {
            loop {
                thread::sleep(REST);
                match work.step() {
                    Ok(found) => told.note(found),
                    Err(e) => {
                        eprintln!("counter-server: files: {e}");
                        let number = e.raw_os_error().unwrap_or(-1) as u64;
                        let _ = told.errno.compare_exchange(0, number, Relaxed, Relaxed);
                        told.note(Tally { bad: 1, line: 0 });
                    }
                }
                told.beats.fetch_add(1, Relaxed);
            }
        });
        Ok(files)
    }
}

impl Files {
    fn note(&self, found: Tally) {
        if found.bad > 0 && self.bad.fetch_add(found.bad, Relaxed) == 0 {
            self.line.store(found.line.into(), Relaxed);
        }
    }
}

/// What a look has found.
#[derive(Default)]
struct Tally {
    bad: u64,
    /// Where the first was found.
    line: u32,
}

impl Tally {
    #[track_caller]
    fn wrong_if(&mut self, is: bool) {
        if is && self.bad == 0 {
            self.line = std::panic::Location::caller().line();
        }
        self.bad += u64::from(is);
    }
}

struct Work {
    directory: PathBuf,
    walk: SplitMix,
    seed: u64,
    /// Each block's generation.
    data: Vec<u64>,
    /// Blocks written each second, and up to when that was done.
    rate: u64,
    written: Instant,
    data_file: File,
    mapped: Vec<u64>,
    /// Where the file is mapped.
    map: &'static mut [u8],
    /// It has locks of the process's own; and a description of it that asks for them. Neither may be
    /// closed: the locks would be gone.
    mapped_file: File,
    asking: File,
    log: File,
    lines: u64,
    /// Open, and without a name; too long for what CRIU takes by itself.
    nameless: File,
    /// Open under a name that is gone, while another one is there.
    renamed: File,
    /// Held under a lock, by this very descriptor.
    locked: Flock<File>,
    /// The directory itself.
    open: File,
    /// Always holds the latest line.
    fifo: File,
    /// Small files come and go under numbers.
    small: u64,
    next_look: usize,
}

fn block(seed: u64, index: usize, generation: u64) -> [u8; BLOCK] {
    let mut numbers = SplitMix(seed ^ (index as u64) << 32 ^ generation);
    let mut block = [0; BLOCK];
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&numbers.next().to_le_bytes());
    }
    block
}

/// A byte of a file, as fcntl_locking(2) wants it.
fn part(kind: i32, start: i64) -> libc::flock {
    let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
    libc::flock { l_type, l_whence, l_start: start, l_len: 1, l_pid: 0 }
}

fn line(number: u64) -> String {
    format!("{number:015}\n")
}

impl Work {
    fn new(directory: &Path, blocks: usize, rate: u64, seed: u64) -> io::Result<Work> {
        fs::create_dir_all(directory)?;
        let create = |name: &OsStr| {
            let mut how = OpenOptions::new();
            how.read(true).write(true).create(true).truncate(true).open(directory.join(name))
        };
        let data_file = create("data".as_ref())?;
        for i in 0..blocks {
            data_file.write_all_at(&block(seed, i, 0), (i * BLOCK) as u64)?;
        }

        let mapped_file = create(OsStr::from_bytes(b"mapp\xe9d"))?;
        mapped_file.set_len((MAPPED * BLOCK) as u64)?;
        let length = NonZeroUsize::new(MAPPED * BLOCK).expect("some");
        let may = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;

        // SAFETY: a new mapping of a file that nobody else changes, for as long as the process runs.
        let map = unsafe {
            let at = mmap(None, length, may, MapFlags::MAP_SHARED, &mapped_file, 0)?;
            std::slice::from_raw_parts_mut(at.as_ptr().cast::<u8>(), MAPPED * BLOCK)
        };

        for (i, piece) in map.chunks_exact_mut(BLOCK).enumerate() {
            piece.copy_from_slice(&block(!seed, i, 0));
        }
        let asking = File::options()
            .read(true)
            .write(true)
            .open(directory.join(OsStr::from_bytes(b"mapp\xe9d")))?;
        fcntl(&mapped_file, FcntlArg::F_SETLK(&part(libc::F_WRLCK, WRITE_LOCKED)))?;

        fcntl(&mapped_file, FcntlArg::F_SETLK(&part(libc::F_RDLCK, READ_LOCKED)))?;
        let log = OpenOptions::new().append(true).create(true).open(directory.join("log"))?;
        log.set_len(0)?;
        let nameless = create("nameless".as_ref())?;
        nameless.write_all_at(&block(seed, 0, 0), NAMELESS)?;
        fs::remove_file(directory.join("nameless"))?;

        let renamed = create("before".as_ref())?;
        let _ = fs::remove_file(directory.join("after"));
        fs::hard_link(directory.join("before"), directory.join("after"))?;
        fs::remove_file(directory.join("before"))?;
        let locked = Flock::lock(create("locked".as_ref())?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)?;
        let fifo = directory.join("fifo");
        let _ = fs::remove_file(&fifo);
        mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;

        let mut fifo = File::options().read(true).write(true).open(fifo)?;
        fifo.write_all(line(0).as_bytes())?;
        Ok(Work {
            directory: directory.to_owned(),
            walk: SplitMix(seed),
            seed,
            data: vec![0; blocks],
            rate,
            written: Instant::now(),
            data_file,
            mapped: vec![0; MAPPED],
            map,
            mapped_file,
            asking,
            log,
            lines: 0,
            nameless,
            renamed,
            locked,
            open: File::open(directory)?,
            fifo,
            small: 0,
            next_look: 0,
        })
    }

    fn small(&self, number: u64) -> PathBuf {
        self.directory.join(format!("small/{}/{number}", number % 3))
    }

    /// One change of each kind, and a check: what was wrong.
    fn step(&mut self) -> io::Result<Tally> {
        let mut found = Tally::default();
        let due = (self.written.elapsed().as_secs_f64() * self.rate as f64) as u64;
        // Not all that was missed while it stood still.
        for _ in 0..due.min(self.rate / 10) {
            let index = self.walk.below(self.data.len());
            self.data[index] += 1;
            let fresh = block(self.seed, index, self.data[index]);
            self.data_file.write_all_at(&fresh, (index * BLOCK) as u64)?;
        }

        if due > 0 {
            self.written = Instant::now();
        }

        let index = self.walk.below(MAPPED);
        self.mapped[index] += 1;
        let fresh = block(!self.seed, index, self.mapped[index]);
        self.map[index * BLOCK..][..BLOCK].copy_from_slice(&fresh);

        self.log.write_all(line(self.lines).as_bytes())?;
        self.lines += 1;
        self.nameless.write_all_at(&block(self.seed, usize::MAX, self.lines), 0)?;
        self.renamed.write_all_at(line(self.lines).as_bytes(), 0)?;
        self.fifo.write_all(line(self.lines).as_bytes())?;
        let mut before = vec![0; line(0).len()];
        self.fifo.read_exact(&mut before)?;
        found.wrong_if(before != line(self.lines - 1).as_bytes());
        if found.bad > 0 {
            return Ok(found);
        }

        // Written beside, renamed into place; the oldest goes, and its directory with the last.
        let (new, number) = (self.small(self.small), self.small);
        let parent = new.parent().expect("a directory");
        fs::create_dir_all(parent)?;
        let beside = parent.join("new");
        fs::write(&beside, line(number))?;
        fs::rename(&beside, &new)?;
        if number >= SMALL {
            let old = self.small(number - SMALL);
            fs::remove_file(&old)?;
            // Only the last one out can.
            let _ = fs::remove_dir(old.parent().expect("a directory"));
        }

        self.small += 1;
        self.check()
    }

    /// Tells whether an open file is the one of this name. A copy has another inode number: between two
    /// looks the whole may have come to another host, so it is asked twice.
    fn is_named(&self, file: &File, name: &str) -> io::Result<bool> {
        let look = || {
            let named = fs::metadata(self.directory.join(name))?;
            Ok::<_, io::Error>(file.metadata()?.ino() == named.ino())
        };
        Ok(look()? || look()?)
    }

    fn check(&mut self) -> io::Result<Tally> {
        let mut tally = Tally::default();
        let mut found = [0; BLOCK];
        for _ in 0..LOOK.min(self.data.len()) {
            let i = self.next_look;
            self.next_look = (i + 1) % self.data.len();
            self.data_file.read_exact_at(&mut found, (i * BLOCK) as u64)?;
            tally.wrong_if(found != block(self.seed, i, self.data[i]));
        }

        for (i, piece) in self.map.chunks_exact(BLOCK).enumerate() {
            tally.wrong_if(piece != block(!self.seed, i, self.mapped[i]));
        }

        // An open file is in the way of its own process's locks.
        for (kind, at) in [(libc::F_WRLCK, WRITE_LOCKED), (libc::F_RDLCK, READ_LOCKED)] {
            let mut found = part(libc::F_WRLCK, at);
            fcntl(&self.asking, FcntlArg::F_OFD_GETLK(&mut found))?;
            tally.wrong_if(i32::from(found.l_type) != kind);
        }

        tally.wrong_if(self.mapped_file.metadata()?.len() != (MAPPED * BLOCK) as u64);
        let log = fs::read(self.directory.join("log"))?;
        let last = line(self.lines - 1);
        tally.wrong_if(log.len() != last.len() * self.lines as usize);
        tally.wrong_if(!log.ends_with(last.as_bytes()));
        self.nameless.read_exact_at(&mut found, 0)?;
        tally.wrong_if(found != block(self.seed, usize::MAX, self.lines));
        self.nameless.read_exact_at(&mut found, NAMELESS)?;
        tally.wrong_if(found != block(self.seed, 0, 0));

        // Under its other name it is the same file.
        tally.wrong_if(fs::read(self.directory.join("after"))? != line(self.lines).as_bytes());
        tally.wrong_if(!self.is_named(&self.renamed, "after")?);
        tally.wrong_if(!self.is_named(&self.open, "")?);
        tally.wrong_if(!self.is_named(&self.locked, "locked")?);

        // Whoever else wants the lock does not get it.
        let other = File::options().write(true).open(self.directory.join("locked"))?;
        tally.wrong_if(Flock::lock(other, FlockArg::LockExclusiveNonblock).is_ok());
        let mut names = Vec::new();
        for directory in fs::read_dir(self.directory.join("small"))? {
            for file in fs::read_dir(directory?.path())? {
                let file = file?;
                let number: u64 =
                    file.file_name().to_str().and_then(|n| n.parse().ok()).unwrap_or(u64::MAX);
                tally.wrong_if(fs::read(file.path())? != line(number).into_bytes());
                names.push(number);
            }
        }

        names.sort_unstable();
        tally.wrong_if(!names.into_iter().eq(self.small.saturating_sub(SMALL)..self.small));
        Ok(tally)
    }
}
