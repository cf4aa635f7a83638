//! Descriptors put into another process, and taken out of it, from outside.
//!
//! One of its threads, which is [stopped](Stopped), is made to take them by itself, out of a socket
//! that is made in it for this: recvmsg(2) gives what comes by `SCM_RIGHTS` (unix(7)) the lowest
//! numbers that are free, in the order in which it was sent. So they are sent in the order of the
//! numbers that they are to have, and for each free number in between something that is closed again.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use super::scm::{self, MOST_FDS};
use super::stopped::{Stopped, instruction};
use super::{inject, process};

/// A descriptor that a process is to have.
#[derive(Clone, Copy, Debug)]
pub struct FdPlace<'a> {
    /// Its number there.
    pub number: RawFd,
    /// Whether execve(2) closes it.
    pub cloexec: bool,
    /// What it stands for.
    pub file: BorrowedFd<'a>,
}

/// Where things lie in the page that is mapped for the while: `struct msghdr`, `struct iovec`, a
/// byte, and room for the control message.
const MESSAGE: u64 = 0;
const PIECE: u64 = 64;
const BYTE: u64 = 80;
const CONTROL: u64 = 96;
const LENGTH: u64 = 4096;
/// `struct cmsghdr` on machines of 64 bits.
const CONTROL_HEAD: usize = 16;

/// Gives a process descriptors, by their numbers rising. No other thread of it may run, and none of the
/// numbers may be taken.
///
/// # Errors
/// `AlreadyExists` for a number that is taken; the system's error when the process was killed or has no
/// room. It may have some of them then.
pub fn put(thread: &mut Stopped, pid: i32, places: &[FdPlace]) -> io::Result<()> {
    let Some(last) = places.last() else { return Ok(()) };
    let at = instruction(pid)?;
    let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let kind = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let page = thread.call(at, libc::SYS_mmap, [0, LENGTH, access, kind, u64::MAX, 0])? as u64;
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
    let done = memory.and_then(|memory| {
        let mut door = Door::open(thread, at, pid, page, memory, last.number + 1)?;
        let done = door.hand_in(pid, places);
        door.close().and(done)
    });
    thread.call(at, libc::SYS_munmap, [page, LENGTH])?;
    done
}

/// Has a process close descriptors, by their numbers rising. No other thread of it may run.
///
/// # Errors
/// When it was killed, or the kernel is older than Linux 5.9.
pub fn close(thread: &mut Stopped, pid: i32, numbers: &[RawFd]) -> io::Result<()> {
    close_runs(thread, instruction(pid)?, numbers)
}

fn close_runs(thread: &mut Stopped, at: u64, numbers: &[RawFd]) -> io::Result<()> {
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        let (first, last) = (run[0] as u64, run[run.len() - 1] as u64);
        thread.call(at, libc::SYS_close_range, [first, last, 0])?;
    }
    Ok(())
}

/// The descriptors that a process has.
///
/// # Errors
/// When it is gone.
pub fn numbers(pid: i32) -> io::Result<Vec<RawFd>> {
    let list = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let mut all: Vec<RawFd> =
        list.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    all.sort_unstable();
    Ok(all)
}

/// A socket whose one end is in the process.
struct Door<'a> {
    thread: &'a mut Stopped,
    at: u64,
    page: u64,
    memory: File,
    inside: i64,
    outside: OwnedFd,
}

impl<'a> Door<'a> {
    fn open(
        thread: &'a mut Stopped,
        at: u64,
        pid: i32,
        page: u64,
        memory: File,
        above: RawFd,
    ) -> io::Result<Door<'a>> {
        let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
        thread.call(at, libc::SYS_socketpair, [libc::AF_UNIX as u64, kind, 0, page])?;
        let mut pair = [0; 8];
        memory.read_exact_at(&mut pair, page)?;
        let end = |at: usize| RawFd::from_ne_bytes(std::array::from_fn(|i| pair[at + i]));
        let (low, other) = (end(0), end(4));
        let outside = process::pidfd_open(pid).and_then(|pidfd| process::pidfd_getfd(pidfd, other));
        // Not where one of those is to be that come in.
        let up = [low as u64, libc::F_DUPFD_CLOEXEC as u64, above as u64];
        let inside = thread.call(at, libc::SYS_fcntl, up);
        for number in [low, other] {
            thread.call(at, libc::SYS_close, [number as u64])?;
        }
        Ok(Door { thread, at, page, memory, inside: inside?, outside: outside? })
    }

    fn hand_in(&mut self, pid: i32, places: &[FdPlace]) -> io::Result<()> {
        let taken: HashSet<RawFd> = numbers(pid)?.into_iter().collect();
        let filler = File::open("/dev/null")?;
        let (mut all, mut fillers) = (Vec::with_capacity(places.len()), Vec::new());
        let mut next = 0;
        for place in places {
            if taken.contains(&place.number) || place.number < next {
                let what = fs::read_link(format!("/proc/{pid}/fd/{}", place.number));
                let what = what.unwrap_or_default();
                let words = format!("descriptor {} is {} already", place.number, what.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, words));
            }

            for number in (next..place.number).filter(|number| !taken.contains(number)) {
                // As what comes after it, so that both fit into one message.
                all.push(FdPlace { number, file: filler.as_fd(), ..*place });
                fillers.push(number);
            }

            all.push(*place);
            next = place.number + 1;
        }

        for same in all.chunk_by(|a, b| a.cloexec == b.cloexec) {
            for some in same.chunks(MOST_FDS) {
                self.pass(some)?;
            }
        }

        close_runs(self.thread, self.at, &fillers)
    }

    /// One message.
    fn pass(&mut self, places: &[FdPlace]) -> io::Result<()> {
        let files: Vec<RawFd> = places.iter().map(|place| place.file.as_raw_fd()).collect();
        scm::send(&self.outside, &[0], &files)?;
        let room = (CONTROL_HEAD + size_of_val(&files[..])).next_multiple_of(8);
        let mut bytes = [0u8; CONTROL as usize];
        let mut word = |at: u64, value: u64| {
            bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_ne_bytes());
        };

        word(MESSAGE + 16, self.page + PIECE);
        word(MESSAGE + 24, 1);
        word(MESSAGE + 32, self.page + CONTROL);
        word(MESSAGE + 40, room as u64);
        word(PIECE, self.page + BYTE);
        word(PIECE + 8, 1);
        self.memory.write_all_at(&bytes, self.page)?;

        let cloexec = if places[0].cloexec { libc::MSG_CMSG_CLOEXEC } else { 0 };
        let arguments = [self.inside as u64, self.page, (libc::MSG_DONTWAIT | cloexec) as u64];
        self.thread.call(self.at, libc::SYS_recvmsg, arguments)?;
        let mut control = vec![0; room];
        self.memory.read_exact_at(&mut control, self.page + CONTROL)?;
        let got = usize::from_ne_bytes(std::array::from_fn(|i| control[i]));
        let came = control[CONTROL_HEAD..].chunks_exact(4);
        let came = came.map(|bytes| RawFd::from_ne_bytes(std::array::from_fn(|i| bytes[i])));

        // With too little room in its table, the kernel gives it some of them.
        let whole = got == CONTROL_HEAD + size_of_val(&files[..]);
        if !whole || !came.zip(places).all(|(number, place)| number == place.number) {
            return Err(io::Error::other("descriptors did not get the numbers that they should"));
        }

        Ok(())
    }

    fn close(self) -> io::Result<()> {
        self.thread.call(self.at, libc::SYS_close, [self.inside as u64]).map(drop)
    }
}

/// Stops the first thread of a process, for those above.
///
/// # Errors
/// As [`Stopped::new`].
pub fn first_thread(pid: i32) -> io::Result<Stopped> {
    // One that has ended while others run cannot be stopped: any other will do.
    let rest = inject::threads(pid)?.into_iter().filter(|tid| *tid != pid);
    let mut failed = None;
    for tid in std::iter::once(pid).chain(rest) {
        match Stopped::new(tid) {
            Ok(stopped) => return Ok(stopped),
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    Err(failed.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn descriptors_come_under_their_numbers_and_go() {
        // A shell that waits, with holes below what it has open.
        let mut child = Command::new("sh")
            .args(["-c", "exec 9</dev/zero; echo; read line; exec ls -l /proc/self/fd"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());

        out.read_line(&mut String::new()).unwrap();
        let pid = child.id() as i32;
        let before = numbers(pid).unwrap();
        let (urandom, full) =
            (File::open("/dev/urandom").unwrap(), File::open("/dev/full").unwrap());
        let place = |number, cloexec, file| FdPlace { number, cloexec, file };
        let mut places = vec![place(44, false, urandom.as_fd()), place(47, true, urandom.as_fd())];

        // More than one message.
        let free = (100..600).filter(|number| !before.contains(number));
        let cloexec = |number| number % 200 < 150 && number < 590;
        places.extend(free.map(|number| place(number, cloexec(number), full.as_fd())));
        let mut thread = first_thread(pid).unwrap();
        put(&mut thread, pid, &places).unwrap();

        let mut wanted = before.clone();
        wanted.extend(places.iter().map(|place| place.number));
        wanted.sort_unstable();
        assert_eq!(numbers(pid).unwrap(), wanted);
        let link = |n: i32| fs::read_link(format!("/proc/{pid}/fd/{n}")).unwrap();
        assert_eq!((link(44), link(47)), ("/dev/urandom".into(), "/dev/urandom".into()));

        let again = put(&mut thread, pid, &places[..1]).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        let some: Vec<_> =
            places.iter().map(|p| p.number).filter(|n| (100..590).contains(n)).collect();
        close(&mut thread, pid, &some).unwrap();

        drop(thread);
        // It goes on, and what execve(2) is to close is closed.
        child.stdin.take().unwrap().write_all(b"x\n").unwrap();
        let list: Vec<String> = out.lines().map_while(Result::ok).collect();
        assert!(child.wait().unwrap().success());
        let has = |n: i32| list.iter().any(|line| line.contains(&format!(" {n} -> ")));
        assert!(has(9) && has(44) && !has(47) && !has(130), "{list:?}");

        // Neither closed by us nor by the other program.
        assert!(!places.last().unwrap().cloexec && has(599), "{list:?}");
    }
}
