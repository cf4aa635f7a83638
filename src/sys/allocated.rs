//! An allocator that counts, and a thread's clock: how much memory and time a piece of code has wanted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

/// The system's, with a count for each thread.
struct Counting;

thread_local! {
    /// Bytes that this thread has got and not given back since [`peak_of`] began, and the most of it.
    static COUNT: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn add(bytes: isize) {
    // A thread that ends has no count any more.
    let _ = COUNT.try_with(|count| {
        let (now, most) = count.get();
        let now = now.saturating_add(bytes);
        count.set((now, most.max(now)));
    });
}

// SAFETY: each call is the system's, with the same arguments; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size() as isize);
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size() as isize);
        // SAFETY: as the caller vouches.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        add(-(layout.size() as isize));
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size as isize - layout.size() as isize);
        // SAFETY: as the caller vouches.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs something, and tells how many bytes it had from the allocator at a time, on this thread.
pub(crate) fn peak_of<T>(run: impl FnOnce() -> T) -> (T, usize) {
    COUNT.set((0, 0));
    let result = run();
    (result, COUNT.get().1 as usize)
}

/// CPU time of this thread. clock_gettime(2)
pub(crate) fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes this one structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_at_a_time_is_told() {
        let (_, most) = peak_of(|| {
            for _ in 0..10 {
                std::hint::black_box(vec![1u8; 10_000]);
            }
            let mut grows = std::hint::black_box(Vec::<u8>::with_capacity(10));
            grows.reserve_exact(50_000);
        });
        assert!((50_000..60_000).contains(&most), "{most}");
    }
}
