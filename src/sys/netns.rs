//! Network namespaces: open, enter for the length of a function, make and remove by name.
//!
//! No thread of the caller is ever moved: what must be done inside a namespace is done on a
//! thread of its own, which ends with the work. A socket opened there stays in that namespace
//! and can be used from anywhere, so the critical path needs no such thread.
//!
//! See [setns(2)](https://man7.org/linux/man-pages/man2/setns.2.html),
//! [network_namespaces(7)](https://man7.org/linux/man-pages/man7/network_namespaces.7.html) and
//! [ip-netns(8)](https://man7.org/linux/man-pages/man8/ip-netns.8.html).

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::{io, thread};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::fstatfs;

/// `NSFS_MAGIC` of linux/magic.h: what a bind-mounted namespace says it is.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// An open network namespace; it lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
}

impl NetNs {
    /// Opens the namespace at `path` (`/run/netns/web`, `/proc/1/ns/net`); refuses a file that is
    /// no namespace, as the left-over of a removed one is.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = OwnedFd::from(File::open(path)?);
        if !is_nsfs(&fd)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a network namespace", path.display()),
            ));
        }
        Ok(Self { fd })
    }

    /// The namespace that process `pid` is in.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// A fresh namespace without a name; it goes when the last descriptor of it is closed.
    pub fn fresh() -> io::Result<Self> {
        on_new_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::current()
        })
    }

    /// Runs `f` inside the namespace, on a thread made for it. A panic of `f` goes on in the caller.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_new_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        })
    }

    /// Device and inode: two descriptors name the same namespace if and only if these are equal.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let meta = File::from(self.fd.try_clone()?).metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// A second descriptor of the same namespace.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_new_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| match thread::Builder::new().spawn_scoped(scope, f)?.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn is_nsfs(fd: impl AsFd) -> io::Result<bool> {
    Ok(fstatfs(fd)?.filesystem_type().0 == NSFS_MAGIC)
}

/// Makes a namespace and binds it to `path`, as `ip netns add` does. The path must be free.
pub fn create_named(path: &Path) -> io::Result<NetNs> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
        // iproute2 shares its directory so that a name made in one mount namespace is seen, and
        // can be let go, in all of them. A directory of somebody else is not ours to change.
        if dir == Path::new("/run/netns") || dir == Path::new("/var/run/netns") {
            share_mount(dir)?;
        }
    }

    OpenOptions::new().read(true).write(true).create_new(true).mode(0o444).open(path)?;
    let made = on_new_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        mount(
            Some("/proc/thread-self/ns/net"),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        NetNs::current()
    });

    if made.is_err() {
        // The file is ours (create_new) and nothing is mounted on it.
        let _ = fs::remove_file(path);
    }

    made
}

/// Binds a namespace that is there already to one more path, which must be free.
pub fn bind_named(namespace: &NetNs, path: &Path) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
        if dir == Path::new("/run/netns") || dir == Path::new("/var/run/netns") {
            share_mount(dir)?;
        }
    }
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o444).open(path)?;
    let bound = mount(
        Some(&crate::sys::process::path_of(&namespace.fd)),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    );
    if bound.is_err() {
        // The file is ours (create_new) and nothing is mounted on it.
        let _ = fs::remove_file(path);
    }
    Ok(bound?)
}

fn share_mount(dir: &Path) -> nix::Result<()> {
    let share = || {
        mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
    };
    match share() {
        // Not a mount point yet: only those can be shared.
        Err(Errno::EINVAL) => {
            let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(dir), dir, None::<&str>, bind, None::<&str>)?;
            share()
        }
        result => result,
    }
}

/// Takes the name away; the namespace itself goes when nothing is in it any more. A path that is
/// not there is success, one that is no namespace is refused.
pub fn remove_named(path: &Path) -> io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if is_nsfs(&file)? {
        drop(file);
        umount2(path, MntFlags::MNT_DETACH)?;
    } else if !(file.metadata()?.is_file() && file.metadata()?.len() == 0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is not a network namespace", path.display()),
        ));
    }
    fs::remove_file(path)
}
