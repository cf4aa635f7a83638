//! What changes on whole file systems, by directory and name or by file: fanotify(7),
//! name_to_handle_at(2), open_by_handle_at(2).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

/// What stays the same of a file while it is renamed, and is never that of another one:
/// the handle's type and bytes. name_to_handle_at(2)
pub type Handle = Box<[u8]>;

/// Longest handle: `MAX_HANDLE_SZ`.
const MAX_HANDLE: usize = 128;
/// struct file_handle before its bytes: their number, and the type.
const HANDLE_HEADER: usize = 8;
/// `FAN_EVENT_INFO_TYPE_DFID_NAME`: a directory, and a name in it.
const DIRECTORY_AND_NAME: u8 = 2;
/// `FAN_EVENT_INFO_TYPE_FID`: a file.
const FILE: u8 = 1;
/// struct fanotify_event_info_header, and the file system's ID behind it.
const INFO_HEADER: usize = 4 + 8;

/// The handle of what a path names; of a symbolic link its own.
///
/// # Errors
/// As name_to_handle_at(2); EOPNOTSUPP on file systems that have none.
pub fn handle_of(path: &Path) -> io::Result<Handle> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // In words, for its alignment.
    let mut room = [0u64; (HANDLE_HEADER + MAX_HANDLE) / 8];
    room[0] = MAX_HANDLE as u64;
    let mut mount = 0i32;
    // SAFETY: the path ends in NUL, and the kernel writes no more than the header allows for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            room.as_mut_ptr(),
            &raw mut mount,
            0,
        )
    };
    Errno::result(result)?;
    let bytes: Vec<u8> = room.iter().flat_map(|word| word.to_ne_bytes()).collect();
    take_handle(&bytes).map(|(handle, _)| handle).ok_or_else(|| io::Error::from(Errno::EIO))
}

/// The inode of a file by its handle; none if there is no such file any more. `mount` is open on its
/// file system. open_by_handle_at(2)
///
/// # Errors
/// EPERM without CAP_DAC_READ_SEARCH.
pub fn inode_of(mount: &File, handle: &Handle) -> io::Result<Option<u64>> {
    let mut room = [0u64; (HANDLE_HEADER + MAX_HANDLE) / 8];
    let length = handle.len().saturating_sub(4).min(MAX_HANDLE);
    let bytes = [&(length as u32).to_ne_bytes()[..], &handle[..4 + length]].concat();
    for (word, bytes) in room.iter_mut().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle is as long as it says, and only read; a result that is not negative is a new
    // descriptor that is ours alone.
    let file = unsafe {
        let mount = mount.as_raw_fd();
        let fd = libc::syscall(libc::SYS_open_by_handle_at, mount, room.as_ptr(), flags);
        match Errno::result(fd) {
            Err(Errno::ESTALE) => return Ok(None),
            fd => File::from_raw_fd(fd? as RawFd),
        }
    };
    Ok(Some(file.metadata()?.ino()))
}

/// A struct file_handle, and what comes behind it.
fn take_handle(bytes: &[u8]) -> Option<(Handle, &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let end = HANDLE_HEADER.checked_add(length)?;
    Some((bytes.get(4..end)?.into(), bytes.get(end..)?))
}

/// Hears of changes on file systems.
#[derive(Debug)]
pub struct Changes(Fanotify);

/// A change.
#[derive(Debug, PartialEq, Eq)]
pub enum FileChange {
    /// Something about what bears this name in this directory; `.` is the directory itself.
    Name(Handle, Vec<u8>),
    /// Something about this file itself, under whatever name: it got one more, or lost one.
    File(Handle),
    /// There was more than the kernel could keep.
    Lost,
}

impl Changes {
    /// Hears nothing yet.
    ///
    /// # Errors
    /// As fanotify_init(2): EPERM without CAP_SYS_ADMIN, EINVAL before Linux 5.9.
    pub fn new() -> io::Result<Changes> {
        let flags = InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::from_bits_retain(libc::FAN_REPORT_DFID_NAME | libc::FAN_REPORT_FID);
        Ok(Changes(Fanotify::init(flags, EventFFlags::O_RDONLY)?))
    }

    /// Hears of all that happens from now on to the file system on which `path` is.
    ///
    /// # Errors
    /// As fanotify_mark(2): ENODEV, EOPNOTSUPP, EXDEV where it cannot be told.
    pub fn watch(&self, path: &Path) -> io::Result<()> {
        let mask = MaskFlags::FAN_MODIFY
            | MaskFlags::FAN_ATTRIB
            | MaskFlags::FAN_CLOSE_WRITE
            | MaskFlags::FAN_CREATE
            | MaskFlags::FAN_DELETE
            | MaskFlags::FAN_MOVED_FROM
            | MaskFlags::FAN_MOVED_TO
            | MaskFlags::FAN_ONDIR;
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
        Ok(self.0.mark(flags, mask, AT_FDCWD, Some(path))?)
    }

    /// Returns what has happened and has not been heard yet, some of it; none if that was all.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, room: &mut [u8], hear: &mut dyn FnMut(FileChange)) -> io::Result<bool> {
        match nix::unistd::read(&self.0, room) {
            Ok(length) => {
                parse(&room[..length], hear);
                Ok(length > 0)
            }
            Err(Errno::EAGAIN) => Ok(false),
            Err(Errno::EINTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Events as read(2) gives them: struct fanotify_event_metadata, and behind each what it is about.
fn parse(mut bytes: &[u8], hear: &mut dyn FnMut(FileChange)) {
    let word =
        |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    while let Some(length) = word(bytes, 0) {
        let length = length as usize;
        let (Some(event), Some(rest)) = (bytes.get(..length), bytes.get(length..)) else { break };
        if length == 0 {
            break;
        }

        bytes = rest;
        let header = event.get(6..8).map_or(0, |l| u16::from_ne_bytes([l[0], l[1]])) as usize;
        let mask =
            event.get(8..16).map_or(0, |m| u64::from_ne_bytes(m.try_into().unwrap_or([0; 8])));
        // Where there is a name, it says more.
        let infos = || event.get(header..);
        let name = || infos().and_then(|infos| info_of(infos, DIRECTORY_AND_NAME));
        let file = || infos().and_then(|infos| info_of(infos, FILE));
        let change = match mask & libc::FAN_Q_OVERFLOW {
            0 => name()
                .map(|(handle, rest)| {
                    let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
                    FileChange::Name(handle, rest[..end].to_vec())
                })
                .or_else(|| file().map(|(handle, _)| FileChange::File(handle))),
            _ => Some(FileChange::Lost),
        };
        change.map(&mut *hear);
    }
}

/// Returns what an event tells of this kind: a handle, and what is behind it.
fn info_of(mut infos: &[u8], kind: u8) -> Option<(Handle, &[u8])> {
    loop {
        let length = u16::from_ne_bytes(infos.get(2..4)?.try_into().ok()?) as usize;
        let info = infos.get(..length)?;
        if info.first() == Some(&kind) {
            return take_handle(info.get(INFO_HEADER..)?);
        }
        infos = infos.get(length.max(1)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    /// One event: header, directory, name.
    fn event(handle: &[u8], name: &[u8]) -> Vec<u8> {
        let length = INFO_HEADER + HANDLE_HEADER + handle.len() + name.len() + 1;
        let mut info = vec![DIRECTORY_AND_NAME, 0];
        info.extend((length as u16).to_ne_bytes());
        info.extend([0; 8]);
        info.extend((handle.len() as u32).to_ne_bytes());
        info.extend([1, 0, 0, 0]);
        info.extend([handle, name, b"\0"].concat());
        let mut whole = ((24 + info.len()) as u32).to_ne_bytes().to_vec();
        whole.extend([3, 0, 24, 0]);
        whole.extend([0; 16]);
        whole.extend(info);
        whole
    }

    #[test]
    fn events_are_taken_apart() {
        let bytes = [event(&[7; 8], b"a"), event(&[8; 8], b".")].concat();
        let mut heard = Vec::new();
        parse(&bytes, &mut |change| heard.push(change));
        let handle = |byte| [&[1, 0, 0, 0][..], &[byte; 8]].concat().into();
        // One without a name.
        let mut alone = event(&[9; 8], b"");
        alone[24] = FILE;
        parse(&alone, &mut |change| assert_eq!(change, FileChange::File(handle(9))));
        let names =
            [(7, b"a"), (8, b".")].map(|(b, name)| FileChange::Name(handle(b), name.to_vec()));
        assert_eq!(heard, names);
    }

    #[test]
    fn fuzz_events() {
        let sample = [event(&[7; 8], b"a"), event(&[8; 8], b".")].concat();
        Target::new("events").sample(sample).run(|bytes| {
            let (mut names, mut lost) = (0, 0);
            parse(bytes, &mut |change| match change {
                FileChange::Name(..) | FileChange::File(_) => names += 1,
                FileChange::Lost => lost += 1,
            });
            found(&[names, lost])
        });
    }
}
