//! Which pages a task has written to, by the kernel's soft-dirty bits
//! (Documentation/admin-guide/mm/soft-dirty.rst; needs `CONFIG_MEM_SOFT_DIRTY`, which x86-64 kernels of
//! distributions have and many cloud kernels and arm64 have not).
//!
//! The bits are read, then cleared; what is written in between would be lost. So the task has to
//! stand still for both: some milliseconds a GiB, a round. That is still far less than reading all
//! of the memory, above all in the freeze.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::Result;

use super::pages::Task;
use crate::sys::memory::{PAGE, PageRegion};

/// Bits of an entry in `/proc/PID/pagemap`: Documentation/admin-guide/mm/pagemap.rst.
const SOFT_DIRTY: u64 = 1 << 55;
const FILE: u64 = 1 << 61;
const THERE: u64 = 0b11 << 62;
/// To `/proc/PID/clear_refs`: proc_pid_clear_refs(5).
const CLEAR_SOFT_DIRTY: &[u8] = b"4";

/// Tells whether this kernel has them: tried on a page of our own.
pub fn supported() -> bool {
    fn tried() -> io::Result<bool> {
        let mut page = vec![0u8; 2 * PAGE];
        let at = (page.as_ptr() as usize).next_multiple_of(PAGE);
        let offset = at - page.as_ptr() as usize;
        let pagemap = File::open("/proc/self/pagemap")?;
        let is_dirty = || {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (at / PAGE * 8) as u64)?;
            Ok::<_, io::Error>(u64::from_ne_bytes(entry) & SOFT_DIRTY != 0)
        };
        let mut touch = |value| {
            // Not to be optimised away.
            std::hint::black_box(&mut page)[offset] = value;
        };
        touch(1);
        let before = is_dirty()?;
        fs::write("/proc/self/clear_refs", CLEAR_SOFT_DIRTY)?;
        let cleared = !is_dirty()?;
        touch(2);
        Ok(before && cleared && is_dirty()?)
    }
    tried().unwrap_or(false)
}

/// The pages written to since the bits were cleared last, of these mappings, in ascending order.
///
/// # Errors
/// `NotFound`/`ESRCH` where the task has ended.
pub fn written(task: Task, mappings: &[(u64, u64)]) -> Result<Vec<PageRegion>> {
    let pagemap = File::open(format!("/proc/{}/pagemap", task.pid))?;
    let mut found: Vec<PageRegion> = Vec::new();
    let mut buffer = vec![0u8; 8 * 8192];
    for &(start, end) in mappings {
        let mut at = start;
        while at < end {
            let pages = (((end - at) / PAGE as u64) as usize).min(8192);
            pagemap.read_exact_at(&mut buffer[..pages * 8], at / PAGE as u64 * 8)?;
            for (i, raw) in buffer[..pages * 8].chunks_exact(8).enumerate() {
                let entry = u64::from_ne_bytes(raw.try_into().expect("chunks of eight"));
                if entry & SOFT_DIRTY == 0 || entry & THERE == 0 || entry & FILE != 0 {
                    continue;
                }
                let page = at + (i * PAGE) as u64;
                match found.last_mut() {
                    Some(last) if last.end == page => last.end += PAGE as u64,
                    _ => found.push(PageRegion {
                        start: page,
                        end: page + PAGE as u64,
                        categories: 0,
                    }),
                }
            }
            at += (pages * PAGE) as u64;
        }
    }

    Ok(found)
}

/// Starts to watch anew. The task must stand still since before its bits were read.
///
/// # Errors
/// Where the task has ended.
pub fn clear(task: Task) -> io::Result<()> {
    fs::write(format!("/proc/{}/clear_refs", task.pid), CLEAR_SOFT_DIRTY)
}
