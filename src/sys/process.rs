//! Processes seen from outside: pidfd_open(2), pidfd_getfd(2), process_vm_readv(2), prctl(2).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A descriptor that stands for a process and becomes readable when it ends. pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a non-negative result is a new descriptor that is ours alone.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A duplicate of another process's descriptor. pidfd_getfd(2).
pub fn pidfd_getfd(pidfd: impl AsFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a non-negative result is a new descriptor that is ours alone.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), fd, 0) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(got as RawFd) })
}

/// Sends a signal to the process behind a pidfd: never to a stranger who got its number since.
/// pidfd_send_signal(2).
pub fn pidfd_kill(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the siginfo pointer may be null.
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the command's process leader of a new session, so that a signal for our terminal's
/// foreground group does not reach it: the hand-over decides what becomes of runc, not Ctrl-C.
/// setsid(2).
pub fn in_new_session(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
}

/// Has a command begin with a session keyring of its own, and an empty one: what it runs is not to possess
/// the keys of whoever is logged in. keyctl(2), `KEYCTL_JOIN_SESSION_KEYRING`
pub fn with_own_keyring(command: &mut Command) {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a system call without a pointer, as the name is null.
    unsafe {
        command.pre_exec(|| {
            // Kernels without keys have none to be possessed.
            libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0, 0, 0, 0);
            Ok(())
        });
    }
}

/// Makes `target` the same open file as `fd`, kept over exec. dup2(2).
pub fn dup_onto(fd: impl AsFd, target: RawFd) -> io::Result<()> {
    // SAFETY: plain numbers; the shim that calls this owns the target number.
    let r = unsafe { libc::dup2(fd.as_fd().as_raw_fd(), target) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A path that leads to what one of our descriptors stands for. proc_pid_fd(5)
pub fn path_of(fd: &impl AsRawFd) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Has the kernel send this process SIGTERM when its parent ends: the thread of it that has begun us.
/// Children do not inherit that. prctl(2), `PR_SET_PDEATHSIG`.
///
/// # Errors
/// Where the kernel does not know it; when the parent has ended already.
pub fn die_with_parent() -> io::Result<()> {
    let parent = std::os::unix::process::parent_id();
    // SAFETY: prctl with PR_SET_PDEATHSIG touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // It may have ended just before, without a signal.
    if std::os::unix::process::parent_id() == parent {
        Ok(())
    } else {
        Err(io::Error::other("whoever has called this has ended"))
    }
}

/// Takes ownership of a descriptor that a parent process left for us under a known number.
///
/// # Errors
/// `EBADF` when there is none.
pub fn adopt_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with F_GETFD touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open and, by the caller's contract, nobody else in this process
    // owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Leaves a descriptor open for the program that this process becomes. fcntl(2), `FD_CLOEXEC`
///
/// # Errors
/// None that is known.
pub fn keep_over_exec(fd: OwnedFd) -> io::Result<()> {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    let _ = std::os::fd::IntoRawFd::into_raw_fd(fd);
    Ok(())
}

/// Waits until at least one of the descriptors is readable or closed; their indices. poll(2).
///
/// # Errors
/// `TimedOut` when the time is over.
pub fn wait_readable(fds: &[BorrowedFd], deadline: Option<Instant>) -> io::Result<Vec<usize>> {
    loop {
        let mut set: Vec<PollFd> = fds.iter().map(|f| PollFd::new(*f, PollFlags::POLLIN)).collect();
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::from(io::ErrorKind::TimedOut));
                }
                PollTimeout::try_from(left.min(Duration::from_secs(3600)).as_millis() as i32 + 1)
                    .unwrap_or(PollTimeout::MAX)
            }
        };

        match poll(&mut set, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {
                return Ok(set
                    .iter()
                    .enumerate()
                    .filter(|(_, p)| p.revents().is_some_and(|r| !r.is_empty()))
                    .map(|(i, _)| i)
                    .collect());
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Tells whether the process behind a pidfd has ended, with all of its threads; its parent may not have waited
/// for it yet. poll(2)
pub fn has_ended(pidfd: impl AsFd) -> bool {
    let mut set = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut set, PollTimeout::ZERO), Ok(1..))
}

/// Tells whether what a process has under the number `target` is what its epoll watches under that number.
/// The kernel looks through all that the epoll watches, one by one. kcmp(2), `KCMP_EPOLL_TFD`.
///
/// # Errors
/// `ENOENT` when it watches nothing of that number; when the process is gone.
pub fn watches(pid: i32, epoll: RawFd, target: RawFd) -> io::Result<bool> {
    const EPOLL_TARGET: libc::c_int = 7;
    // struct kcmp_epoll_slot: the epoll, the number, which of several of this number.
    let slot = [epoll as u32, target as u32, 0];
    // SAFETY: the pointer is to three numbers that live as long as the call takes.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, EPOLL_TARGET, target, &raw const slot) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}

/// Tells whether two descriptors, each a process's and its number there, are of the same open file.
/// kcmp(2), `KCMP_FILE`.
///
/// # Errors
/// When a process or a descriptor is gone.
pub fn same_file(one: (i32, RawFd), other: (i32, RawFd)) -> io::Result<bool> {
    const FILE: libc::c_int = 0;
    // SAFETY: no pointers.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one.0, other.0, FILE, one.1, other.1) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}

/// From which number on a process gets no descriptors. proc_pid_limits(5): prlimit(2) tells it of
/// another user's process only with `CAP_SYS_RESOURCE`.
///
/// # Errors
/// When it is gone.
pub fn file_limit(pid: i32) -> io::Result<u64> {
    let text = proc_text(pid, "limits")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_ascii_whitespace().next()).unwrap_or_default();
    Ok(if soft == "unlimited" { u64::MAX } else { soft.parse().map_err(io::Error::other)? })
}

/// Most memory that this process has had, in KiB. proc_pid_status(5), `VmHWM`.
pub fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
}

/// Most bytes of a file below `/proc` that are read at once. What maps as much as a task may
/// (`vm.max_map_count`) tells that in 8 MiB, unless its files lie very deep.
const MOST_TEXT: u64 = 64 << 20;
/// Longest line of one: a path has up to 4096 bytes, each of which may be told as four.
const MOST_LINE: u64 = 64 << 10;
/// What an open file's `fdinfo` begins with, that which every file has, is far shorter.
const HEAD: u64 = 4096;

/// A file of a process's below `/proc`, as text: names of files and programs in it may be anything
/// but UTF-8. proc(5).
///
/// # Errors
/// When the process is gone; `FileTooLarge` beyond 64 MiB: a container may have as many of some things as
/// it likes.
pub fn proc_text(pid: i32, file: &str) -> io::Result<String> {
    let bytes = up_to(File::open(format!("/proc/{pid}/{file}"))?, MOST_TEXT)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first lines of such a file, in its first 4096 bytes.
///
/// # Errors
/// When the process is gone.
pub fn proc_head(pid: i32, file: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{file}"))?.take(HEAD).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Tells the lines of such a file one by one, for those that may be without end.
///
/// # Errors
/// When the process is gone; `FileTooLarge` for a line of more than 64 KiB; what `tell` ends it with.
pub fn proc_lines(
    pid: i32,
    file: &str,
    tell: impl FnMut(&str) -> io::Result<()>,
) -> io::Result<()> {
    lines(File::open(format!("/proc/{pid}/{file}"))?, tell)
}

/// Tells the lines of a text one by one, as [`proc_lines`] does those of a file.
///
/// # Errors
/// `FileTooLarge` for a line of more than 64 KiB; what `tell` ends it with.
pub fn lines(text: impl Read, mut tell: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
    let mut text = BufReader::new(text);
    let mut line = Vec::new();
    while text.by_ref().take(MOST_LINE).read_until(b'\n', &mut line)? > 0 {
        if line.pop_if(|last| *last == b'\n').is_none() && line.len() as u64 >= MOST_LINE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        tell(&String::from_utf8_lossy(&line))?;
        line.clear();
    }
    Ok(())
}

/// All of it, if it is not more than that.
fn up_to(text: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if text.take(most + 1).read_to_end(&mut bytes)? as u64 > most {
        Err(io::ErrorKind::FileTooLarge.into())
    } else {
        Ok(bytes)
    }
}

/// Returns where the threads of a process that stands still have their stacks. proc_pid_syscall(5): the last
/// but one of the fields.
///
/// # Errors
/// `WouldBlock` when a thread runs.
pub fn stack_pointers(pid: i32) -> io::Result<Vec<u64>> {
    let pointer = |thread: io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(thread?.path().join("syscall"))?;
        let field = text.split_ascii_whitespace().rev().nth(1).and_then(|f| f.strip_prefix("0x"));
        let pointer = field.and_then(|field| u64::from_str_radix(field, 16).ok());
        pointer.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    };
    std::fs::read_dir(format!("/proc/{pid}/task"))?.map(pointer).collect()
}

/// Tells whether a process is there, and has not been killed. proc_pid_status(5): its state, and the signals
/// that wait, among which SIGKILL stays until the end.
pub fn lives(pid: i32) -> bool {
    let Ok(status) = proc_text(pid, "status") else { return false };
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default()
    };
    let killed = |name: &str| {
        let signals = u64::from_str_radix(value(name), 16);
        signals.is_ok_and(|signals| signals & 1 << (libc::SIGKILL - 1) != 0)
    };
    // Its parent may not have waited for it yet.
    let ended = value("State:").starts_with(['Z', 'X']);
    !ended && !killed("SigPnd:") && !killed("ShdPnd:")
}

/// Everybody whom a process has begun, directly or not, and who is still there.
/// proc_pid_task(5), `children`.
pub fn descendants(pid: i32) -> Vec<OwnedFd> {
    let (mut found, mut next) = (Vec::new(), vec![pid]);
    while let Some(parent) = next.pop() {
        // Whoever has ended meanwhile has none.
        let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else { continue };
        for thread in threads.flatten() {
            let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            for child in list.split_ascii_whitespace().filter_map(|child| child.parse().ok()) {
                found.extend(pidfd_open(child));
                next.push(child);
            }
        }
    }
    found
}

/// When a process started, in clock ticks since boot: with its number, a name that is not used
/// twice. proc_pid_stat(5), field 22.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = proc_text(pid, "stat").ok()?;
    // The command's name in field 2 may hold blanks and parentheses.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A process that no later one is taken for, though its number is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(i32, u64)", into = "(i32, u64)")]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// See [`start_time`].
    pub started: u64,
}

impl ProcessId {
    /// Whoever has that number now.
    pub fn of(pid: i32) -> Option<ProcessId> {
        start_time(pid).map(|started| ProcessId { pid, started })
    }

    /// This process.
    pub fn this() -> ProcessId {
        let pid = std::process::id() as i32;
        ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 })
    }

    /// Reads what was written with `Display`.
    pub fn read(line: &str) -> Option<ProcessId> {
        let (pid, started) = line.trim().split_once(' ')?;
        Some(ProcessId { pid: pid.parse().ok()?, started: started.parse().ok()? })
    }

    /// Tells whether that very process is there, with any of its threads: one that was killed, and hangs in a
    /// system call, may still do what it was about to do. One for which only its parent has not waited
    /// yet does nothing more.
    pub fn is_alive(self) -> bool {
        let same = || start_time(self.pid) == Some(self.started);
        match pidfd_open(self.pid) {
            // Whoever the descriptor stands for: it was he after it had been opened.
            Ok(pidfd) => same() && !has_ended(&pidfd),
            // Without a descriptor to spare he is rather taken for alive.
            Err(e) => e.raw_os_error() != Some(libc::ESRCH) && same(),
        }
    }
}

impl From<(i32, u64)> for ProcessId {
    fn from((pid, started): (i32, u64)) -> ProcessId {
        ProcessId { pid, started }
    }
}

impl From<ProcessId> for (i32, u64) {
    fn from(id: ProcessId) -> (i32, u64) {
        (id.pid, id.started)
    }
}

/// As it stands in files of the work directory.
impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.started)
    }
}

/// Returns what tells one run of this host from the next. proc_sys_kernel(5), `random/boot_id`
pub fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    text.map_or_else(|_| String::new(), |text| text.trim().to_owned())
}

/// The descriptors of a process: their numbers, and where their links in `/proc/PID/fd` lead. One that is
/// closed meanwhile is left out. proc_pid_fd(5)
///
/// # Errors
/// When the process has ended.
pub fn open_files(pid: i32) -> io::Result<impl Iterator<Item = (i32, std::path::PathBuf)>> {
    let one = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, std::fs::read_link(entry.path()).ok()?))
    };
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().filter_map(one))
}

/// The inode of a socket, by where its link leads: `socket:[7]`.
pub fn socket_inode(target: &std::path::Path) -> Option<u64> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The root directory of a process, as seen from here. proc_pid_root(5)
pub fn root_of(pid: i32) -> std::path::PathBuf {
    format!("/proc/{pid}/root").into()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_has_no_end_is_not_read_to_it() {
        use std::io::ErrorKind::FileTooLarge;
        assert_eq!(up_to(&b"four"[..], 4).unwrap(), b"four");
        assert_eq!(up_to(io::repeat(b'x'), 4).unwrap_err().kind(), FileTooLarge);
        let mut told = Vec::new();
        lines(&b"one\n\ntwo"[..], |line| {
            told.push(line.to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(told, ["one", "", "two"]);
        assert_eq!(lines(io::repeat(b'x'), |_| Ok(())).unwrap_err().kind(), FileTooLarge);
        // Whoever hears of them has the last word.
        let mut heard = 0;
        let enough = lines(io::repeat(b'\n'), |_| {
            heard += 1;
            if heard < 5 { Ok(()) } else { Err(FileTooLarge.into()) }
        });
        assert_eq!((enough.unwrap_err().kind(), heard), (FileTooLarge, 5));
        let own = std::process::id() as i32;
        assert!(proc_text(own, "status").unwrap().contains("VmHWM:"));
        assert!(proc_head(own, "fdinfo/0").unwrap().contains("mnt_id:"));
    }

    #[test]
    fn descendants_are_found() {
        use std::io::{BufRead, BufReader};
        let script = "sh -c 'sleep 60 & sleep 60 & echo; wait' & wait";
        let mut child =
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut String::new()).unwrap();
        let found = descendants(child.id() as i32);
        assert_eq!(found.len(), 3);
        for one in &found {
            pidfd_kill(one, libc::SIGKILL).unwrap();
        }
        child.wait().unwrap();
        assert!(found.iter().all(|one| wait_readable(&[one.as_fd()], None).is_ok()));
    }

    #[test]
    fn who_has_ended_lives_no_more() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        assert!(lives(pid) && lives(std::process::id() as i32));
        let pidfd = pidfd_open(pid).unwrap();
        pidfd_kill(&pidfd, libc::SIGKILL).unwrap();
        // From the moment on in which it was told, nobody having waited for it.
        assert!(!lives(pid));
        wait_readable(&[pidfd.as_fd()], None).unwrap();
        assert!(!lives(pid));
        child.wait().unwrap();
        assert!(!lives(pid));
    }
}
