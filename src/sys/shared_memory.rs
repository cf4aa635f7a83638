//! Memory that processes share and that has no name in any file system, as the kernel makes it for
//! `MAP_SHARED | MAP_ANONYMOUS`: mmap(2), proc_pid_map_files(5), process_vm_writev(2).

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::memory::{self, PAGE};

const BOTH: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// A new one, a page long; in lists of mappings it is called `/dev/zero (deleted)`, as any that a program
/// has made. Where nobody may open what is mapped, which takes `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`, it is
/// one of memfd_create(2) without a name.
///
/// # Errors
/// When there is no descriptor left, or no memory.
pub fn nameless_file() -> io::Result<File> {
    let page = NonZeroUsize::new(PAGE).unwrap_or(NonZeroUsize::MIN);
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping, wherever the kernel finds room, which nobody else knows.
    let at = unsafe { mmap_anonymous(None, page, BOTH, flags) }?;
    let start = at.addr().get();
    let place = format!("/proc/self/map_files/{start:x}-{:x}", start + PAGE);
    let opened = OpenOptions::new().read(true).write(true).open(place);
    // SAFETY: nothing refers to it.
    unsafe { munmap(at, PAGE) }?;

    match opened {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOENT)) => {
            let file = memory::memory_file(c"")?;
            file.set_len(PAGE as u64)?;
            Ok(file)
        }
        opened => opened,
    }
}

/// The beginning of a file, mapped for other processes to write through: this one knows where it is, and
/// nothing else of it.
#[derive(Debug)]
pub struct FileWindow {
    at: NonNull<c_void>,
    bytes: usize,
}

impl FileWindow {
    /// Maps it.
    ///
    /// # Errors
    /// When there is no room.
    pub fn map(file: impl AsFd, bytes: usize) -> io::Result<FileWindow> {
        let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping, wherever the kernel finds room; nothing in this process refers to it.
        let at = unsafe { mmap(None, length, BOTH, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(FileWindow { at, bytes })
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.at.addr().get() as u64
    }
}

impl Drop for FileWindow {
    fn drop(&mut self) {
        // SAFETY: nothing in this process refers to it.
        let _ = unsafe { munmap(self.at, self.bytes) };
    }
}

/// Writes to the memory of a process of ours, which does nothing with it by itself; how many bytes.
///
/// # Errors
/// `EFAULT` where nothing is mapped, behind the end of a file, or when its control group has no more memory.
pub fn write_process(pid: i32, at: u64, bytes: &[u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: at as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the local bytes live and are only read; what is written to is not this process's.
    let n = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::sys::maps;

    #[test]
    fn it_is_like_what_programs_make_and_may_grow() {
        let file = nameless_file().unwrap();
        assert_eq!(file.metadata().unwrap().dev(), memory::shared_device().unwrap());
        assert_eq!(file.metadata().unwrap().blocks(), 0, "nobody has touched it");
        file.set_len(5 * PAGE as u64).unwrap();
        let window = FileWindow::map(&file, 8 * PAGE).unwrap();
        let at = window.address();
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let inode = file.metadata().unwrap().ino();
        let found = maps::parse(&text).find(|mapping| mapping.inode == inode).unwrap();
        assert!(found.start == at && found.is_nameless(), "{found:?}");

        // To this process as to any other.
        let own = std::process::id() as i32;
        assert_eq!(write_process(own, at + 4096, &[7; 3 * PAGE]).unwrap(), 3 * PAGE);
        let mut there = [0; PAGE];
        file.read_exact_at(&mut there, 3 * PAGE as u64).unwrap();
        assert_eq!(there, [7; PAGE]);
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE as u64);
        let behind = write_process(own, at + 5 * PAGE as u64, &[7; PAGE]).unwrap_err();
        assert_eq!(behind.raw_os_error(), Some(libc::EFAULT));
    }
}
