//! Memory of other processes: `PAGEMAP_SCAN` (ioctl, Documentation/admin-guide/mm/pagemap.rst),
//! process_vm_readv(2), userfaultfd(2); and shared arenas of our own: memfd_create(2), mmap(2).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// Bytes of a page. Ferry refuses hosts whose pages have another size.
pub const PAGE: usize = 4096;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Categories that the pages have.
    pub categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<PmScanArg>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

/// `PAGE_IS_*` of linux/fs.h.
pub mod category {
    /// Written to since it was write-protected by an asynchronous userfaultfd.
    pub const WRITTEN: u64 = 1 << 1;
    /// The page is mapped from a file or shmem.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared zero page.
    pub const PFNZERO: u64 = 1 << 5;
    /// A lightweight guard (`MADV_GUARD_INSTALL`): looks swapped, cannot be read.
    pub const GUARD: u64 = 1 << 8;
}

/// What a scan looks for: a page matches when `(categories ^ inverted) & mask == mask` and
/// `categories & any_of != 0`.
#[derive(Clone, Copy, Debug)]
pub struct ScanFilter {
    /// See above.
    pub inverted: u64,
    /// See above.
    pub mask: u64,
    /// See above.
    pub any_of: u64,
    /// Write-protect what matches in the same step, so that a later write shows as `WRITTEN`; and
    /// fail with `EPERM` where no asynchronous userfaultfd watches.
    pub protect: bool,
}

/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`
const SCAN_PROTECT: u64 = 1 | 2;

/// Appends the regions of `[start, end)` whose pages match to `found`. `pagemap` is an open
/// `/proc/PID/pagemap`. Linux 6.7.
///
/// # Errors
/// `EINVAL` where the kernel does not know a category, `ENOTTY` where it has no such ioctl.
pub fn pagemap_scan(
    pagemap: &File,
    start: u64,
    end: u64,
    wanted: ScanFilter,
    found: &mut Vec<PageRegion>,
) -> io::Result<()> {
    let mut vec = [PageRegion::default(); 512];
    let mut at = start;
    while at < end {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: if wanted.protect { SCAN_PROTECT } else { 0 },
            start: at,
            end,
            walk_end: 0,
            vec: vec.as_mut_ptr() as u64,
            vec_len: vec.len() as u64,
            max_pages: 0,
            category_inverted: wanted.inverted,
            category_mask: wanted.mask,
            category_anyof_mask: wanted.any_of,
            // Nothing that differs between neighbours is asked for, so that they come as one.
            return_mask: category::PRESENT & wanted.any_of,
        };

        // SAFETY: `arg` has the size that it states and `vec` room for `vec_len` regions; both
        // outlive the call.
        let n = unsafe { ioctl::pagemap_scan(pagemap.as_raw_fd(), &mut arg) }?;
        for region in &vec[..n as usize] {
            match found.last_mut() {
                Some(last) if last.end == region.start => last.end = region.end,
                _ => found.push(*region),
            }
        }

        if arg.walk_end <= at {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        at = arg.walk_end;
    }

    Ok(())
}

/// Reads another process's memory at several places into one buffer, in order, and says how many
/// bytes came. process_vm_readv(2): a fault ends the transfer early.
pub fn read_process(pid: i32, places: &[(u64, usize)], into: &mut [u8]) -> io::Result<usize> {
    debug_assert!(places.len() <= libc::UIO_MAXIOV as usize);
    let total: usize = places.iter().map(|p| p.1).sum();
    assert!(total <= into.len(), "buffer smaller than what is read");
    let remote: Vec<libc::iovec> = places
        .iter()
        .map(|&(at, len)| libc::iovec { iov_base: at as *mut libc::c_void, iov_len: len })
        .collect();
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: total };
    // SAFETY: the local vector covers memory that we hold exclusively, checked above; remote
    // addresses are the other process's and only read.
    let n = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

/// The device number of the tmpfs that nobody has mounted, in which the kernel keeps shared memory: that
/// of `MAP_SHARED | MAP_ANONYMOUS`, of System V, and of memfd_create(2).
///
/// # Errors
/// When there is no descriptor left.
pub fn shared_device() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    static DEVICE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(*device);
    }
    let device = memory_file(c"ferry-device")?.metadata()?.dev();
    Ok(*DEVICE.get_or_init(|| device))
}

/// A file in memory, which has no name that leads to it. memfd_create(2).
pub fn memory_file(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a C string; a non-negative result is ours alone.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see above.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Memory that grows as pages come in, without ever moving: an anonymous file of a fixed largest
/// size, mapped once; what has been handed over is given back to the system with
/// [`Arena::release`]. memfd_create(2), fallocate(2).
#[derive(Debug)]
pub struct Arena {
    file: File,
    base: NonNull<u8>,
    capacity: usize,
}

// SAFETY: the mapping belongs to the arena, and every access goes through &self/&mut self.
unsafe impl Send for Arena {}
// SAFETY: see above; shared access only reads.
unsafe impl Sync for Arena {}

impl Arena {
    /// An arena of at most `capacity` bytes; takes up memory only where it is written.
    pub fn new(capacity: usize) -> io::Result<Arena> {
        let capacity = capacity.max(PAGE).next_multiple_of(PAGE);
        let file = memory_file(c"ferry-staging")?;
        file.set_len(capacity as u64)?;
        Arena::map(file, capacity)
    }

    /// One that another process has made, with all that is in it.
    pub fn adopt(file: File) -> io::Result<Arena> {
        let capacity = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        Arena::map(file, capacity)
    }

    fn map(file: File, capacity: usize) -> io::Result<Arena> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                capacity,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Arena { file, base, capacity })
    }

    /// The file, for whoever is to [adopt](Arena::adopt) it.
    pub fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The file, for another mapping of it.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// A number in it that is read and written as a whole, by several processes too.
    ///
    /// # Panics
    /// When it does not lie in the arena, at a multiple of eight.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.capacity);
        // SAFETY: it lies in the mapping, which lives as long as self, and is aligned as that is.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// Bytes that the arena can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The bytes at an offset.
    ///
    /// # Panics
    /// When the range does not lie in the arena.
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.capacity));
        // SAFETY: the range lies in the mapping, which lives as long as self; writers need &mut.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset), len) }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.capacity));
        // SAFETY: the range lies in the mapping and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(offset), len) }
    }

    /// Copies within the arena; the ranges may not overlap.
    ///
    /// # Panics
    /// When a range does not lie in the arena, or they overlap.
    pub fn copy_within(&mut self, from: usize, to: usize, len: usize) {
        assert!(from.abs_diff(to) >= len);
        assert!(from.max(to).checked_add(len).is_some_and(|end| end <= self.capacity));
        // SAFETY: both ranges lie in the mapping and do not overlap, and self is borrowed exclusively.
        unsafe {
            let base = self.base.as_ptr();
            std::ptr::copy_nonoverlapping(base.add(from), base.add(to), len);
        }
    }

    /// Gives the memory behind a range back to the system; it reads as zeros afterwards.
    pub fn release(&self, offset: usize, len: usize) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no pointers.
        let r = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.capacity) };
    }
}

/// One message of a userfaultfd. userfaultfd(2), `struct uffd_msg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdEvent {
    /// A task waits for the page at this address.
    Fault(u64),
    /// The task forked; the child's memory is behind the new descriptor.
    Fork(RawFd),
    /// Memory moved: from, to, length.
    Remap(u64, u64, u64),
    /// Contents dropped (madvise): start, end.
    Remove(u64, u64),
    /// Unmapped: start, end.
    Unmap(u64, u64),
}

/// Bytes of a message.
pub const UFFD_MESSAGE: usize = 32;

impl UffdEvent {
    /// Returns what a message says; none before one was read into that place.
    ///
    /// # Errors
    /// When it says something else.
    pub fn parse(message: &[u8; UFFD_MESSAGE]) -> io::Result<Option<UffdEvent>> {
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| message[at + i]));
        let [a, b, c] = [word(8), word(16), word(24)];
        Ok(Some(match message[0] {
            0 => return Ok(None),
            0x12 => UffdEvent::Fault(b),
            0x13 => UffdEvent::Fork(a as u32 as RawFd),
            0x14 => UffdEvent::Remap(a, b, c),
            0x15 => UffdEvent::Remove(a, b),
            0x16 => UffdEvent::Unmap(a, b),
            other => return Err(io::Error::other(format!("userfaultfd event {other:#x}"))),
        }))
    }
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[allow(missing_docs)]
mod ioctl {
    use super::{
        PmScanArg, UffdioApi, UffdioCopy, UffdioRange, UffdioRegister, UffdioWriteprotect,
        UffdioZeropage,
    };
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);
    nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, UffdioCopy);
    nix::ioctl_readwrite!(uffdio_zeropage, 0xAA, 0x04, UffdioZeropage);
    nix::ioctl_readwrite!(uffdio_writeprotect, 0xAA, 0x06, UffdioWriteprotect);
    nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, UffdioApi);
    nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, UffdioRegister);
    nix::ioctl_read!(uffdio_wake, 0xAA, 0x02, UffdioRange);
}

/// Reads one message into a place that was blank, in one step: with this process killed it either
/// stands there or waits for another reader. `None` when there is none now. The descriptor must be
/// non-blocking.
pub fn uffd_read(
    uffd: impl AsFd,
    message: &mut [u8; UFFD_MESSAGE],
) -> io::Result<Option<UffdEvent>> {
    // SAFETY: the kernel writes no more than the buffer has room for.
    let n =
        unsafe { libc::read(uffd.as_fd().as_raw_fd(), message.as_mut_ptr().cast(), UFFD_MESSAGE) };
    if n < 0 {
        let e = io::Error::last_os_error();
        return match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(e),
        };
    }
    if n as usize != UFFD_MESSAGE {
        return Err(io::Error::other("short userfaultfd message"));
    }
    UffdEvent::parse(message)
}

/// Installs pages at `to` from our memory and wakes who waits for them; says how many bytes went
/// in before the error, if one came. `UFFDIO_COPY`.
pub fn uffd_copy(uffd: impl AsFd, to: u64, from: &[u8]) -> (usize, io::Result<()>) {
    let mut arg =
        UffdioCopy { dst: to, src: from.as_ptr() as u64, len: from.len() as u64, mode: 0, copy: 0 };
    // SAFETY: the kernel reads `len` bytes at `src`, a live slice, and writes into the memory of
    // the process that the descriptor stands for.
    let r = unsafe { ioctl::uffdio_copy(uffd.as_fd().as_raw_fd(), &mut arg) };
    let done = if arg.copy > 0 { arg.copy as usize } else { 0 };
    (done, r.map(|_| ()).map_err(Into::into))
}

/// Installs zero pages. `UFFDIO_ZEROPAGE`.
pub fn uffd_zero(uffd: impl AsFd, start: u64, len: usize) -> (usize, io::Result<()>) {
    let mut arg = UffdioZeropage { start, len: len as u64, mode: 0, zeropage: 0 };
    // SAFETY: the struct is live; the kernel writes only into the other process's memory.
    let r = unsafe { ioctl::uffdio_zeropage(uffd.as_fd().as_raw_fd(), &mut arg) };
    let done = if arg.zeropage > 0 { arg.zeropage as usize } else { 0 };
    (done, r.map(|_| ()).map_err(Into::into))
}

/// Wakes tasks that wait for pages of a range which somebody else installed. `UFFDIO_WAKE`.
pub fn uffd_wake(uffd: impl AsFd, start: u64, len: u64) -> io::Result<()> {
    let mut arg = UffdioRange { start, len };
    // SAFETY: the struct is live.
    unsafe { ioctl::uffdio_wake(uffd.as_fd().as_raw_fd(), &mut arg) }?;
    Ok(())
}

/// Wakes all tasks that wait, so that those whose page is not there ask for it again. `UFFDIO_WAKE`.
pub fn uffd_wake_all(uffd: impl AsFd) -> io::Result<()> {
    // Whatever a machine's addresses do not reach fails.
    let ends = [57, 56, 52, 48, 47, 42, 39].map(|bits| (1u64 << bits) - PAGE as u64);
    let least = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr").unwrap_or_default();
    let mut last = Ok(());
    for (start, end) in lowest(&least).into_iter().flat_map(|start| ends.map(|end| (start, end))) {
        last = uffd_wake(&uffd, start, end - start);
        if last.is_ok() {
            break;
        }
    }
    last
}

/// Below which address nobody has memory, by the text of `vm.mmap_min_addr`, and if the kernel does
/// not take that: a security module may keep more from everybody than it says
/// (`CONFIG_LSM_MMAP_MIN_ADDR`, 64 KiB at most).
fn lowest(text: &str) -> [u64; 2] {
    const MODULES: u64 = 1 << 16;
    let told = text.trim().parse().ok().filter(|least| *least < 1 << 32).unwrap_or(MODULES);
    let least = u64::next_multiple_of(told, PAGE as u64);
    [least, least.max(MODULES)]
}

/// `UFFD_USER_MODE_ONLY`: allowed to everybody whatever `vm.unprivileged_userfaultfd` says.
pub const UFFD_USER_MODE_ONLY: i32 = 1;

/// A userfaultfd of our own memory. userfaultfd(2).
///
/// # Errors
/// `ENOSYS` where the kernel has none, `EPERM` where it is not permitted.
pub fn uffd_new(flags: i32) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
    // SAFETY: no pointers; a non-negative result is a new descriptor that is ours alone.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A userfaultfd as CRIU wants it for a restore that is filled from outside: it tells of forks,
/// moves and unmappings (`UFFD_FEATURE_EVENT_*`), and faults in system calls wait too.
///
/// # Errors
/// `ENOSYS` where the kernel has none, `EPERM` where it is not permitted, `EINVAL` where it tells
/// less than CRIU needs.
pub fn uffd_for_restore() -> io::Result<OwnedFd> {
    let uffd = uffd_new(0)?;
    let mut arg = UffdioApi { api: 0xAA, features: 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, ioctls: 0 };
    // SAFETY: the struct is live.
    unsafe { ioctl::uffdio_api(uffd.as_raw_fd(), &mut arg) }?;
    Ok(uffd)
}

/// Makes a fresh userfaultfd one that only takes down who was written to, without stopping anybody.
/// `UFFDIO_API` with `UFFD_FEATURE_WP_ASYNC`, `UFFD_FEATURE_WP_UNPOPULATED` (Linux 6.7).
///
/// # Errors
/// `EINVAL` where the kernel cannot.
pub fn uffd_track_writes(uffd: impl AsFd) -> io::Result<()> {
    let mut arg = UffdioApi { api: 0xAA, features: 1 << 15 | 1 << 13 | 1, ioctls: 0 };
    // SAFETY: the struct is live.
    unsafe { ioctl::uffdio_api(uffd.as_fd().as_raw_fd(), &mut arg) }?;
    Ok(())
}

/// Watches a range for writes. `UFFDIO_REGISTER` with `UFFDIO_REGISTER_MODE_WP`.
pub fn uffd_watch_writes(uffd: impl AsFd, start: u64, len: u64) -> io::Result<()> {
    let mut arg = UffdioRegister { start, len, mode: 1 << 1, ioctls: 0 };
    // SAFETY: the struct is live; watching changes nothing in the memory of the process.
    unsafe { ioctl::uffdio_register(uffd.as_fd().as_raw_fd(), &mut arg) }?;
    Ok(())
}

/// Of a range that is watched for writes, no page is protected any more: all count as written.
/// `UFFDIO_WRITEPROTECT`.
///
/// # Errors
/// `ENOENT` where some of it is not watched.
pub fn uffd_unprotect(uffd: impl AsFd, start: u64, len: u64) -> io::Result<()> {
    let mut arg = UffdioWriteprotect { start, len, mode: 0 };
    // SAFETY: the struct is live; what is unprotected may be written to as before.
    unsafe { ioctl::uffdio_writeprotect(uffd.as_fd().as_raw_fd(), &mut arg) }?;
    Ok(())
}

/// Fills a page of a file through a shared mapping, so that its times stay.
///
/// # Errors
/// As mmap(2).
#[cfg(test)]
pub fn write_through_mapping(file: &File, at: u64, fill: u8) -> io::Result<()> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
    let length = PAGE.try_into().expect("a page has a size");
    let shared = MapFlags::MAP_SHARED;
    // SAFETY: a new mapping of this one page, that nobody else knows, and that is gone at the end.
    unsafe {
        let page = mmap(None, length, ProtFlags::PROT_WRITE, shared, file, at as i64)?;
        page.cast::<u8>().write_bytes(fill, PAGE);
        Ok(munmap(page, PAGE)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_keeps_and_gives_back() {
        let mut arena = Arena::new(1 << 20).unwrap();
        arena.bytes_mut(4096, 4).copy_from_slice(b"abcd");
        assert_eq!(arena.bytes(4096, 4), b"abcd");
        arena.release(4096, 4096).unwrap();
        assert_eq!(arena.bytes(4096, 4), [0; 4]);
    }

    /// Whatever the machine's settings are: an address below is refused by the kernel.
    #[test]
    fn who_waits_is_woken_from_the_lowest_address_on() {
        assert_eq!(lowest("65536\n"), [1 << 16, 1 << 16]);
        assert_eq!(lowest("131072\n"), [1 << 17, 1 << 17]);
        assert_eq!(lowest("4096\n"), [4096, 1 << 16]);
        assert_eq!(lowest("5000\n"), [8192, 1 << 16]);
        assert_eq!(lowest("0\n"), [0, 1 << 16]);
        assert_eq!(lowest(""), [1 << 16, 1 << 16]);
    }

    #[test]
    fn own_memory_reads_as_written() {
        let data: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        let mut got = vec![0; 9000];
        let at = data.as_ptr() as u64;
        let n = read_process(std::process::id() as i32, &[(at, 5000), (at + 5000, 4000)], &mut got);
        assert_eq!(n.unwrap(), 9000);
        assert_eq!(got, data);
    }
}
