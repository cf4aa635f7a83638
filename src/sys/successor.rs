//! A process that goes on when another one is killed, with every descriptor that he had.
//!
//! The two have one table of descriptors (clone(2), `CLONE_FILES`): whatever either of them opens is the
//! other's, too, in that moment, and nothing is closed by the death of one. Memory they do not share. The
//! successor only waits, in what may be a copy of a process of many threads: it makes system calls
//! and nothing else (signal-safety(7)) until it becomes another program, which finds the
//! descriptors under the numbers that they had.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::process;

/// What a successor becomes.
#[derive(Debug)]
pub struct Successor {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// What it is called in lists of processes as long as it waits.
    title: Vec<u8>,
}

impl Successor {
    /// A program and its arguments, of which the first is its name.
    ///
    /// # Errors
    /// When one of them has a zero in it.
    pub fn new(program: &CStr, arguments: Vec<Vec<u8>>) -> io::Result<Successor> {
        let title = arguments.get(1..).unwrap_or_default().join(&b' ');
        let arguments: Result<_, _> = arguments.into_iter().map(CString::new).collect();
        let environment = std::env::vars_os().map(|(name, value)| {
            let both = [name.into_vec(), value.into_vec()].join(&b'=');
            CString::new(both)
        });
        let (arguments, environment) = (arguments?, environment.collect::<Result<_, _>>()?);
        Ok(Successor { program: program.to_owned(), arguments, environment, title })
    }

    /// Starts it: it waits until all those have ended that `before` stands for (pidfds, which stay open
    /// as long as it lives), and then becomes its program, with standard streams that lead nowhere. Its
    /// number, and what stands for it: clone(2), `CLONE_PIDFD`.
    ///
    /// # Errors
    /// When there can be no process, or nothing that stands for it: then there is none.
    pub fn start(&self, before: &[BorrowedFd]) -> io::Result<(i32, OwnedFd)> {
        let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
            list.iter().map(|one| one.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let before: Vec<RawFd> = before.iter().map(AsRawFd::as_raw_fd).collect();
        let place = own_arguments();
        let flags = (libc::CLONE_FILES | libc::CLONE_PIDFD | libc::SIGCHLD) as libc::c_ulong;
        let mut pidfd: RawFd = -1;

        // SAFETY: as fork(2), which differs in what is shared of the descriptors. The copy has only
        // this thread, makes nothing but system calls, and never returns. The kernel writes one
        // descriptor, to a live variable.
        let pid = unsafe {
            libc::syscall(libc::SYS_clone, flags, 0usize, &raw mut pidfd, 0usize, 0usize)
        };

        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid > 0 {
            return Ok((pid as i32, process::adopt_fd(pidfd)?));
        }

        // SAFETY: this is that copy; the vectors are its own, and end with a null.
        unsafe {
            rename(place, &self.title);
            wait(&before);
            keep_all();
            libc::execve(self.program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            libc::_exit(127)
        }
    }
}

/// Returns where this process's arguments lie in its memory. proc_pid_stat(5), fields 48 and 49.
fn own_arguments() -> std::ops::Range<usize> {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut numbers = fields.split_ascii_whitespace().skip(45).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(start)), Some(Ok(end))) if start < end => start..end,
        _ => 0..0,
    }
}

/// Writes another name over the arguments.
///
/// # Safety
/// They lie there, and nobody reads them any more.
unsafe fn rename(place: std::ops::Range<usize>, title: &[u8]) {
    // Where the last byte is none, the kernel shows the environment as well. proc_pid_cmdline(5)
    let last = place.len().saturating_sub(1);
    for (i, at) in place.enumerate() {
        let byte = title.get(i).copied().filter(|_| i < last).unwrap_or(0);
        // SAFETY: see above.
        unsafe { (at as *mut u8).write_volatile(byte) };
    }
}

/// Waits for the end of all of these processes.
///
/// # Safety
/// In the copy only: it may end it.
unsafe fn wait(before: &[RawFd]) {
    // SAFETY: system calls without pointers, or with one to a live variable.
    unsafe {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGCHLD] {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::setsid();
        for fd in before {
            let mut set = libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 };
            while libc::poll(&raw mut set, 1, -1) != 1 {}
            if set.revents & libc::POLLIN == 0 {
                // Whoever has closed it wants no successor.
                libc::_exit(0);
            }
        }
        // From here on a table of its own: whoever waits still keeps all in the old one.
        libc::unshare(libc::CLONE_FILES);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for stream in 0..3 {
            libc::dup2(null, stream);
        }
    }
}

/// Has all descriptors stay open over execve(2). proc_pid_fd(5), getdents64(2)
///
/// # Safety
/// In the copy only: whatever it executes gets them.
unsafe fn keep_all() {
    #[repr(C, align(8))]
    struct Entries([u8; 4096]);

    /// Of `struct linux_dirent64`: where the record's length is, and the name.
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    let mut buffer = Entries([0; 4096]);

    // SAFETY: the kernel writes no more into the buffer than it is told that there is room.
    unsafe {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let list = libc::open(c"/proc/self/fd".as_ptr(), flags);
        loop {
            let (place, room) = ((&raw mut buffer.0).cast::<u8>(), buffer.0.len());
            let n = libc::syscall(libc::SYS_getdents64, list, place, room);
            let Ok(n @ 1..) = usize::try_from(n) else { break };
            let mut at = 0;
            while at + NAME < n {
                let digits = buffer.0[at + NAME..].iter().map_while(|b| (*b as char).to_digit(10));
                let number = digits.fold(0, |number, digit| number * 10 + digit as RawFd);
                // Those of the directory itself have no digits: standard input may have it.
                if number != list {
                    libc::fcntl(number, libc::F_SETFD, 0);
                }
                let length = [buffer.0[at + LENGTH], buffer.0[at + LENGTH + 1]];
                at += usize::from(u16::from_ne_bytes(length)).max(1);
            }
        }
    }
}

/// What a successor finds.
#[derive(Debug)]
pub struct Descriptor {
    /// The descriptor, under the number that it had.
    pub fd: OwnedFd,
    /// As `/proc/self/fd` shows it: `anon_inode:[userfaultfd]`.
    pub what: String,
}

/// All that this process has but its standard streams, by their numbers rising: to be called once, first
/// of all, by a program that has been started with them. From here on no program that it executes gets any.
///
/// # Errors
/// When they cannot be listed.
pub fn inherited() -> io::Result<Vec<Descriptor>> {
    let entries = fs::read_dir("/proc/self/fd")?;
    let list: Vec<RawFd> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let mut all = Vec::new();
    for number in list.into_iter().filter(|number| *number > 2) {
        // That of the list itself has been closed.
        let Ok(what) = fs::read_link(Path::new("/proc/self/fd").join(number.to_string())) else {
            continue;
        };
        let fd = process::adopt_fd(number)?;
        let on = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        nix::fcntl::fcntl(fd.as_fd(), on)?;
        all.push(Descriptor { fd, what: what.to_string_lossy().into_owned() });
    }
    all.sort_by_key(|one| one.fd.as_raw_fd());
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// One that nothing else in this process gets.
    const NUMBER: RawFd = 777;

    /// Long enough for the slowest machine.
    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn it_goes_on_with_what_was_opened_since() {
        let mut before = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pidfd = process::pidfd_open(before.id() as i32).unwrap();
        let script = "exec >/proc/self/fd/777; readlink /proc/self/fd/0; echo $0; exec sleep 60";
        let arguments = ["sh", "-c", script, "instead"].map(|a| a.as_bytes().to_vec());
        let successor = Successor::new(c"/bin/sh", arguments.to_vec()).unwrap();
        let (pid, child) = successor.start(&[pidfd.as_fd()]).unwrap();

        // Opened after it has begun.
        let (told, tell) = io::pipe().unwrap();
        process::dup_onto(&tell, NUMBER).unwrap();
        let opened = process::adopt_fd(NUMBER).unwrap();

        // It may not have had the processor yet: until then it is called as this program is.
        let called = || fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let begun = Instant::now();
        while !called().starts_with(b"-c exec") {
            assert!(begun.elapsed() < LIMIT, "{}", String::from_utf8_lossy(&called()));
            std::thread::yield_now();
        }

        before.kill().unwrap();
        before.wait().unwrap();
        let said: Vec<_> = BufReader::new(told).lines().take(2).map(Result::unwrap).collect();
        assert_eq!(said, ["/dev/null", "instead"]);
        drop(opened);
        process::pidfd_kill(&child, libc::SIGKILL).unwrap();
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
    }
}
