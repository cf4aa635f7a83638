//! Threads that read a file past the page cache, straight into memory that they check again and
//! again: a device writes there, not the processor. And a ring of Linux AIO, used or not.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use crate::common::pages::{PAGE, SplitMix};

const THREADS: u64 = 16;
/// Pages that each of them reads into.
const POOL: usize = 64;
/// Pages of the file.
const BLOCKS: usize = 4096;

/// As the device wants it aligned.
#[repr(align(4096))]
#[derive(Clone)]
struct Page([u8; PAGE]);

/// What all of them share.
#[derive(Default)]
pub struct Direct {
    /// How many reads there were.
    pub beats: AtomicU64,
    /// How many wrong pages they ever found.
    pub bad: AtomicU64,
}

impl Direct {
    /// Writes the file, and starts to read it.
    pub fn start(path: &Path, seed: u64) -> io::Result<Arc<Direct>> {
        let mut file = File::create(path)?;
        for block in 0..BLOCKS {
            file.write_all(&contents(block))?;
        }
        file.sync_all()?;
        let shared = Arc::new(Direct::default());
        for number in 0..THREADS {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
            let (shared, seed) = (Arc::clone(&shared), seed ^ (number + 1) << 32);
            thread::spawn(move || {
                if let Err(error) = shared.work(&file, seed) {
                    eprintln!("counter-server: a direct read: {error}");
                    shared.bad.fetch_add(1, Relaxed);
                }
            });
        }
        Ok(shared)
    }

    fn work(&self, file: &File, seed: u64) -> io::Result<()> {
        let mut order = SplitMix(seed);
        let mut pool = vec![Page([0; PAGE]); POOL];
        let mut wanted: Vec<Option<usize>> = vec![None; POOL];
        loop {
            let (slot, block) = (order.below(POOL), order.below(BLOCKS));
            file.read_exact_at(&mut pool[slot].0, (block * PAGE) as u64)?;
            wanted[slot] = Some(block);
            for (page, wanted) in std::hint::black_box(&pool).iter().zip(&mut wanted) {
                // Each is told once.
                if wanted.is_some_and(|block| page.0 != contents(block)) {
                    self.bad.fetch_add(1, Relaxed);
                    *wanted = None;
                }
            }
            self.beats.fetch_add(1, Relaxed);
        }
    }
}

/// What stands in a page of the file.
fn contents(block: usize) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (i, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&((block << 16 | i) as u64 + 1).to_ne_bytes());
    }
    page
}

/// How a ring is used.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Aio {
    /// Made, as many servers do at their start, and no more.
    Idle,
    /// One request was made, and answered.
    Used,
}

/// `struct iocb` of linux/aio_abi.h, little-endian.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `IOCB_CMD_PREAD`
const READ: u16 = 0;

/// Makes a ring that stays for good. io_setup(2)
pub fn ring(how: Aio) -> io::Result<()> {
    let mut context = 0u64;
    // SAFETY: the kernel writes one word into a live variable.
    check(unsafe { libc::syscall(libc::SYS_io_setup, 32, &raw mut context) })?;
    if how == Aio::Idle {
        return Ok(());
    }

    let file = File::open("/proc/self/exe")?;
    let mut byte = 0u8;
    let mut request = Request {
        opcode: READ,
        fd: file.as_raw_fd() as u32,
        buffer: (&raw mut byte) as u64,
        length: 1,
        ..Request::default()
    };

    let mut list = [&raw mut request];
    let mut event = [0u64; 4];
    let none = std::ptr::null_mut::<libc::timespec>();

    // SAFETY: request, list and event outlive the request, whose end is waited for.
    unsafe {
        check(libc::syscall(libc::SYS_io_submit, context, 1, list.as_mut_ptr()))?;
        check(libc::syscall(libc::SYS_io_getevents, context, 1, 1, event.as_mut_ptr(), none))?;
    }

    Ok(())
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
