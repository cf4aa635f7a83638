//! File locks of another process: as the kernel lists them for a descriptor, and set by the process
//! itself, from outside. fcntl_locking(2), flock(2)

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::process::{lines, proc_lines};
use super::stopped::{Stopped, instruction};

/// Whose a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockKind {
    /// The process's, which loses it when it closes any descriptor of the file.
    Posix,
    /// The open file's.
    Flock,
    /// The open file's, of a part of it.
    Ofd,
}

/// A lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileLock {
    /// Whose it is.
    pub kind: LockKind,
    /// Whether it is exclusive.
    pub write: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; the file's end, wherever that is, if there is none.
    pub end: Option<u64>,
}

/// Where things lie in the page that is mapped for the while.
const LENGTH: u64 = 4096;
const _: () = assert!(size_of::<libc::flock>() == 32 || size_of::<usize>() != 8);

impl FileLock {
    /// Reads `1: POSIX  ADVISORY  WRITE 7 08:01:9 0 EOF`; `None` for a lease. proc_locks(5)
    fn parse(line: &str) -> Option<FileLock> {
        let mut words = line.split_ascii_whitespace().skip(1);
        let kind = match words.next()? {
            "POSIX" => LockKind::Posix,
            "FLOCK" => LockKind::Flock,
            "OFDLCK" => LockKind::Ofd,
            _ => return None,
        };
        let write = match words.nth(1)? {
            "READ" => false,
            "WRITE" | "RW" => true,
            _ => return None,
        };
        let start = words.nth(2)?.parse().ok()?;
        let end = match words.next()? {
            "EOF" => None,
            end => Some(end.parse().ok()?),
        };
        Some(FileLock { kind, write, start, end })
    }

    /// `struct flock`, of machines of 64 bits.
    fn as_bytes(&self) -> [u8; 32] {
        let kind = if self.write { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
        // Nothing of no length is locked; 0 means up to the end.
        let length = self.end.map_or(0, |end| end.saturating_sub(self.start).saturating_add(1));
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&kind.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.start.to_ne_bytes());
        bytes[16..24].copy_from_slice(&length.to_ne_bytes());
        bytes
    }
}

impl std::fmt::Display for FileLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            LockKind::Posix => "POSIX",
            LockKind::Flock => "flock",
            LockKind::Ofd => "OFD",
        };
        let way = if self.write { "exclusive" } else { "shared" };
        match (self.start, self.end) {
            (0, None) => write!(f, "{kind}, {way}"),
            (start, None) => write!(f, "{kind}, {way}, from byte {start} on"),
            (start, Some(end)) => write!(f, "{kind}, {way}, bytes {start} to {end}"),
        }
    }
}

/// Tells the locks that a process holds by one of its descriptors, one by one: no limit is set to how many
/// those are. proc_pid_fdinfo(5)
///
/// # Errors
/// When it has no such descriptor; what `tell` ends it with.
pub fn held(
    pid: i32,
    number: RawFd,
    mut tell: impl FnMut(FileLock) -> io::Result<()>,
) -> io::Result<()> {
    let tell = |line: &str| lock_in(line).map_or(Ok(()), &mut tell);
    proc_lines(pid, &format!("fdinfo/{number}"), tell)
}

/// See [`held`].
fn lock_in(line: &str) -> Option<FileLock> {
    FileLock::parse(line.strip_prefix("lock:")?)
}

/// The locks that the text of an `fdinfo` tells of, up to `most`.
///
/// # Errors
/// `FileTooLarge` when there are more.
pub fn in_info(text: impl io::Read, most: usize) -> io::Result<Vec<FileLock>> {
    let mut found = Vec::new();
    lines(text, |line| {
        found.extend(lock_in(line));
        if found.len() > most { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
    })?;
    Ok(found)
}

/// Sets locks in a process's name.
#[derive(Debug)]
pub struct Setter<'a> {
    thread: &'a mut Stopped,
    at: u64,
    page: u64,
    memory: File,
}

impl<'a> Setter<'a> {
    /// Makes ready in the process of a thread.
    ///
    /// # Errors
    /// When it was killed.
    pub fn open(thread: &'a mut Stopped, pid: i32) -> io::Result<Setter<'a>> {
        let memory = File::options().write(true).open(format!("/proc/{pid}/mem"))?;
        let at = instruction(pid)?;
        let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let kind = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let page = thread.call(at, libc::SYS_mmap, [0, LENGTH, access, kind, u64::MAX, 0])? as u64;
        Ok(Setter { thread, at, page, memory })
    }

    /// Sets one, without waiting for whoever has it. One that is there already stays as it is.
    ///
    /// # Errors
    /// `EAGAIN` when somebody else has it; `EBADF` when there is no such descriptor.
    pub fn set(&mut self, number: RawFd, lock: &FileLock) -> io::Result<()> {
        let number = number as u64;
        let command = match lock.kind {
            LockKind::Posix => libc::F_SETLK,
            LockKind::Ofd => libc::F_OFD_SETLK,
            LockKind::Flock => {
                let way = if lock.write { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
                return self.thread.call(self.at, libc::SYS_flock, [number, way as u64]).map(drop);
            }
        };
        self.memory.write_all_at(&lock.as_bytes(), self.page)?;
        let arguments = [number, command as u64, self.page];
        self.thread.call(self.at, libc::SYS_fcntl, arguments).map(drop)
    }

    /// Leaves nothing behind.
    ///
    /// # Errors
    /// When the process was killed.
    pub fn close(self) -> io::Result<()> {
        self.thread.call(self.at, libc::SYS_munmap, [self.page, LENGTH]).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use nix::fcntl::{FcntlArg, fcntl};

    use super::*;
    use crate::fuzz::{Target, found};
    use crate::sys::fd_inject;

    #[test]
    fn lines_are_read() {
        let text = "pos:\t0\nflags:\t0100002\n\
            lock:\t1: POSIX  ADVISORY  WRITE 7 08:01:9 0 EOF\n\
            lock:\t2: FLOCK  ADVISORY  READ 7 08:01:9 0 EOF\n\
            lock:\t3: OFDLCK ADVISORY  READ -1 08:01:9 5 9223372036854775806\n\
            lock:\t4: LEASE  ACTIVE    READ 7 08:01:9 0 EOF\n\
            lock:\t5: POSIX  ADVISORY\n";
        let lock = |kind, write, start, end| FileLock { kind, write, start, end };
        let wanted = [
            lock(LockKind::Posix, true, 0, None),
            lock(LockKind::Flock, false, 0, None),
            lock(LockKind::Ofd, false, 5, Some(i64::MAX as u64 - 1)),
        ];
        assert_eq!(in_info(text.as_bytes(), 3).unwrap(), wanted);
        assert_eq!(in_info(text.as_bytes(), 2).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    /// In a process that has the file open as 9, and stands still while it is worked in.
    #[test]
    fn a_process_gets_locks_of_every_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let own = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "exec 9<>\"$0\"; echo; read line"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());

        out.read_line(&mut String::new()).unwrap();
        let pid = child.id() as i32;
        let lock = |kind, write, start, end| FileLock { kind, write, start, end };
        let mut wanted = vec![
            lock(LockKind::Posix, true, 3, Some(3)),
            lock(LockKind::Posix, false, 10, None),
            lock(LockKind::Ofd, true, 5, Some(6)),
            lock(LockKind::Flock, true, 0, None),
        ];

        let mut thread = fd_inject::first_thread(pid).unwrap();
        let mut setter = Setter::open(&mut thread, pid).unwrap();
        for lock in wanted.iter().chain(&wanted[..1]) {
            setter.set(9, lock).unwrap();
        }

        let taken = lock(LockKind::Posix, true, 20, Some(20));
        let ours = libc::flock {
            l_type: libc::F_RDLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 30,
            l_len: 1,
            l_pid: 0,
        };

        fcntl(&own, FcntlArg::F_SETLK(&ours)).unwrap();
        let refused = setter.set(9, &lock(LockKind::Posix, true, 30, Some(30))).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
        assert_eq!(setter.set(99, &taken).unwrap_err().raw_os_error(), Some(libc::EBADF));
        setter.close().unwrap();
        drop(thread);

        let mut found = Vec::new();
        held(pid, 9, |lock| {
            found.push(lock);
            Ok(())
        })
        .unwrap();

        let key = |lock: &FileLock| lock.start;
        found.sort_by_key(key);
        wanted.sort_by_key(key);

        // Nobody is in the way of a lock of its own.
        assert_eq!(found, wanted);
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn fuzz_locks() {
        let sample = "pos:\t0\nlock:\t1: POSIX  ADVISORY  WRITE 7 08:01:9 0 EOF\n\
                      lock:\t2: OFDLCK ADVISORY  READ -1 08:01:9 5 9223372036854775807\n";
        Target::new("locks").sample(sample).words(&[b"lock:", b"FLOCK", b"RW"]).run(|bytes| {
            let list = in_info(bytes, 1000)?;
            for lock in &list {
                let _ = (lock.as_bytes(), lock.to_string());
            }
            found(&[list.len(), list.iter().filter(|lock| lock.write).count()])
        });
    }
}
