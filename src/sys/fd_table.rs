//! Descriptors of another process under the numbers that they have there: for epoll(7), which knows
//! what it watches by the file *and* by the number that it had when it was added.
//!
//! They stand in a descriptor table of a thread's own (unshare(2), `CLONE_FILES`). **What the thread
//! has of the process's table under other numbers is not there any more, or means something else**:
//! whatever runs on it must not use a descriptor, a file or a log that was made elsewhere. Only
//! standard input, output and error stay what they are.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::channel;
use std::{io, thread};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::process;

/// Below it stand the usual three.
pub const FIRST: RawFd = 3;

/// A table of descriptors; see the module. Its threads cannot leave it.
#[derive(Debug)]
pub struct Mirror {
    /// From here on are those that are not the process's.
    above: RawFd,
    pidfd: RawFd,
    kept: RawFd,
    _thread: PhantomData<*const ()>,
}

/// The thread of a mirror.
#[derive(Debug)]
pub struct JoinHandle<T>(thread::JoinHandle<Option<T>>);

impl<T> JoinHandle<T> {
    /// Waits for its end. A panic goes on in the caller.
    pub fn join(self) -> T {
        let joined = self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        joined.expect("a mirror that stands")
    }
}

/// An epoll of the process.
#[derive(Clone, Copy, Debug)]
pub struct Epoll(RawFd);

impl Mirror {
    /// Runs something on a thread with a table of its own, for descriptors of `pid` with numbers from
    /// [`FIRST`] up to below `above`. It keeps nothing but `keep`, for [`Mirror::kept`], and must own
    /// no descriptor that was made elsewhere. Returns when the table stands.
    ///
    /// # Errors
    /// When there can be no thread or no table of that size, or the process is gone.
    pub fn spawn<T: Send + 'static>(
        pid: i32,
        above: RawFd,
        keep: BorrowedFd,
        f: impl FnOnce(&Mirror) -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let (keep, (stands, wait)) = (keep.as_raw_fd(), channel());
        let thread = thread::Builder::new().name("mirror".into()).spawn(move || {
            let mirror = Mirror::new(pid, above, keep);
            let (mirror, failed) = match mirror {
                Ok(mirror) => (Some(mirror), None),
                Err(e) => (None, Some(e)),
            };
            let _ = stands.send(failed);
            mirror.map(|mirror| f(&mirror))
        })?;
        match wait.recv().map_err(io::Error::other)? {
            None => Ok(JoinHandle(thread)),
            Some(e) => Err(e),
        }
    }

    fn new(pid: i32, above: RawFd, keep: RawFd) -> io::Result<Mirror> {
        unshare(CloneFlags::CLONE_FILES)?;
        let kept = up(keep, above)?;
        close_range(FIRST, kept - 1)?;
        close_range(kept + 1, RawFd::MAX)?;
        let low = process::pidfd_open(pid)?;
        let pidfd = up(low.as_raw_fd(), above)?;
        Ok(Mirror { above, pidfd, kept, _thread: PhantomData })
    }

    /// Duplicates one of the process's descriptors under its own number; they come in rising order. A
    /// lower number that was free has it, too, so that the next one costs a call less.
    ///
    /// # Errors
    /// `EBADF` when the process has none of this number.
    pub fn take(&self, number: RawFd) -> io::Result<()> {
        let got = take(self.pidfd, number)?;
        if got == number {
            return Ok(());
        }
        // SAFETY: plain numbers, of this thread's own table.
        let r = unsafe { libc::dup3(got, number, libc::O_CLOEXEC) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Returns what was [taken](Mirror::take) under this number.
    pub fn get(&self, number: RawFd) -> BorrowedFd<'_> {
        assert!((FIRST..self.above).contains(&number));
        // SAFETY: it is of this thread's own table, in which nothing is owned by anybody else; as long
        // as the mirror is borrowed, it is not closed.
        unsafe { BorrowedFd::borrow_raw(number) }
    }

    /// Returns what was kept.
    pub fn kept(&self) -> BorrowedFd<'_> {
        // SAFETY: as above; nobody closes it.
        unsafe { BorrowedFd::borrow_raw(self.kept) }
    }

    /// One of the process's epolls.
    ///
    /// # Errors
    /// `EBADF` when the process has none of this number.
    pub fn epoll(&self, number: RawFd) -> io::Result<Epoll> {
        let got = take(self.pidfd, number)?;
        let place = up(got, self.above);
        close_range(got, got)?;
        place.map(Epoll)
    }

    /// Has an epoll watch what was taken under this number: `events` and `data` of `struct epoll_event`.
    /// Nothing changes where it does already.
    ///
    /// # Errors
    /// epoll_ctl(2)
    pub fn watch(&self, epoll: Epoll, number: RawFd, events: u32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: data };
        match control(epoll, libc::EPOLL_CTL_ADD, number, &mut event) {
            Err(e) if e.raw_os_error() == Some(Errno::EEXIST as i32) => Ok(()),
            done => done,
        }
    }

    /// Ends that. Nothing changes where it does not watch it.
    ///
    /// # Errors
    /// epoll_ctl(2)
    pub fn unwatch(&self, epoll: Epoll, number: RawFd) -> io::Result<()> {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        match control(epoll, libc::EPOLL_CTL_DEL, number, &mut event) {
            Err(e) if e.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
            done => done,
        }
    }
}

fn control(
    epoll: Epoll,
    what: libc::c_int,
    number: RawFd,
    event: &mut libc::epoll_event,
) -> io::Result<()> {
    // SAFETY: the pointer is to a live event; the numbers are of this thread's own table.
    let r = unsafe { libc::epoll_ctl(epoll.0, what, number, event) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn take(pidfd: RawFd, number: RawFd) -> io::Result<RawFd> {
    // SAFETY: no pointers; what comes stays a number of this thread's own table.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, number, 0) };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got as RawFd) }
}

/// A duplicate with a number that is not below `above`.
fn up(fd: RawFd, above: RawFd) -> io::Result<RawFd> {
    // SAFETY: plain numbers.
    let got = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got) }
}

/// Both ends inclusive. close_range(2)
fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: only ever called on a thread whose table is its own: nobody's descriptors are closed.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first as u32, last as u32, 0) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use nix::sys::epoll::{EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

    use super::*;

    #[test]
    fn what_an_epoll_watches_can_be_taken_away_and_put_back_from_outside() {
        let me = std::process::id() as i32;
        let epoll = nix::sys::epoll::Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let (one, mut other) = UnixStream::pair().unwrap();
        let one = OwnedFd::from(one);
        epoll.add(&one, EpollEvent::new(EpollFlags::EPOLLIN, 5)).unwrap();
        other.write_all(b"x").unwrap();

        let ready = || {
            let mut events = [EpollEvent::empty(); 2];
            let n = epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
            events[..n].iter().map(|event| event.data()).collect::<Vec<u64>>()
        };

        assert_eq!(ready(), [5]);
        let (number, watcher) = (one.as_raw_fd(), epoll.0.as_raw_fd());
        let with = |f: fn(&Mirror, Epoll, RawFd)| {
            let thread = Mirror::spawn(me, 900, other.as_fd(), move |mirror| {
                mirror.take(number).unwrap();
                let epoll = mirror.epoll(watcher).unwrap();
                f(mirror, epoll, number);
                assert!(mirror.kept().as_raw_fd() >= 900);
            });
            thread.unwrap().join();
        };

        with(|mirror, epoll, number| {
            mirror.unwatch(epoll, number).unwrap();
            mirror.unwatch(epoll, number).unwrap();
        });
        assert_eq!(ready(), [0; 0]);
        with(|mirror, epoll, number| {
            let events = EpollFlags::EPOLLIN.bits() as u32;
            mirror.watch(epoll, number, events, 6).unwrap();
            mirror.watch(epoll, number, events, 7).unwrap();
        });

        assert_eq!(ready(), [6]);
        // By its own number, as if it had never been another's.
        epoll.delete(&one).unwrap();
        assert_eq!(ready(), [0; 0]);
    }
}
