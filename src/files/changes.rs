//! Which names may have changed since one last asked, told by the kernel as it happens, and which
//! parts of very large files: so that no round but the first has to look at all files, and read all
//! that is in them.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Result;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::writes::{Writes, WrittenBlocks as Written};
use crate::sys::fanotify::{Changes, FileChange, Handle};

/// More names than this are no help: then everything is looked at. Others may be busy on the same
/// file system.
const MOST: usize = 50_000;
/// Bytes that are read at once.
const ROOM: usize = 64 << 10;

/// Directories and names in them; files themselves, without a name.
pub(super) type ChangedNames = HashSet<(Handle, Vec<u8>)>;

/// Listens to the file systems of some trees until it is dropped.
#[derive(Debug)]
pub(super) struct ChangeListener {
    shared: Arc<SharedChanges>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct SharedChanges {
    changes: Changes,
    heard: Mutex<HeardChanges>,
    writes: Option<Mutex<Writes>>,
}

#[derive(Debug, Default)]
struct HeardChanges {
    names: ChangedNames,
    /// Not everything is among them.
    lost: bool,
}

impl ChangeListener {
    /// Everything that changes from now on is heard.
    ///
    /// # Errors
    /// When the kernel does not tell, or not of one of these file systems.
    pub(super) fn start(roots: &[PathBuf]) -> Result<ChangeListener> {
        let changes = Changes::new()?;
        for root in roots {
            changes.watch(root)?;
        }
        let writes = Writes::new();
        let writes = writes.inspect_err(|e| tracing::debug!("writes are not followed: {e:#}")).ok();
        let wakers = writes.iter().flat_map(Writes::wakers).map(|fd| fd.try_clone_to_owned());
        let wakers: Vec<OwnedFd> = wakers.collect::<Result<_, _>>()?;
        let writes = writes.map(Mutex::new);
        let shared = Arc::new(SharedChanges { changes, heard: Mutex::default(), writes });
        let stop = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?);
        let (listening, stopped) = (shared.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("listener".into()).spawn(move || {
            // The kernel's own queue is short.
            while listening.wait(&stopped, &wakers) {
                drop(listening.drain());
                if let Some(writes) = &listening.writes {
                    locked(writes).drain();
                }
            }
        })?;
        Ok(ChangeListener { shared, stop, thread: Some(thread) })
    }

    /// Returns what has changed since the last call, all of what has happened by now; none if that is not
    /// known.
    pub(super) fn take(&self) -> Option<ChangedNames> {
        let heard = std::mem::take(&mut *self.shared.drain());
        (!heard.lost).then_some(heard.names)
    }

    /// To be called before a file is read: what may have been written to it since the last time; none
    /// if that is not known. If it is not for the `last` time its dirty pages go to the disk, so that
    /// what comes next is known.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub(super) fn written(&self, file: &File, last: bool) -> Result<Option<Written>> {
        let Some(writes) = self.shared.writes.as_ref().filter(|_| Writes::suits(file)) else {
            return Ok(None);
        };
        let ino = file.metadata()?.ino();
        let mut heard = locked(writes).take(ino);
        if last || !locked(writes).follow(ino) {
            return Ok(heard);
        }
        nix::unistd::fdatasync(file)?;
        // What was written meanwhile may still be dirty, and then would not be told of again.
        let mut writes = locked(writes);
        match (&mut heard, writes.take(ino)) {
            (Some(heard), Some(meanwhile)) => {
                heard.add(&meanwhile);
                writes.remember(ino, &meanwhile);
            }
            (None, Some(meanwhile)) => writes.remember(ino, &meanwhile),
            (_, None) => heard = None,
        }
        Ok(heard)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ChangeListener {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl SharedChanges {
    /// Tells whether there may be something to hear, and not the end.
    fn wait(&self, stop: &EventFd, wakers: &[OwnedFd]) -> bool {
        let own = [stop.as_fd(), self.changes.as_fd()];
        let all = own.into_iter().chain(wakers.iter().map(AsFd::as_fd));
        let mut fds: Vec<PollFd> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => !fds[0].any().unwrap_or(true),
            Err(e) => e == Errno::EINTR,
        }
    }

    fn drain(&self) -> MutexGuard<'_, HeardChanges> {
        let mut heard = locked(&self.heard);
        let mut room = vec![0; ROOM];
        let mut lost = heard.lost;
        let names = &mut heard.names;
        loop {
            let more = self.changes.read(&mut room, &mut |change| match change {
                FileChange::Name(handle, name) if !lost && names.len() < MOST => {
                    names.insert((handle, name));
                }
                FileChange::File(handle) if !lost && names.len() < MOST => {
                    names.insert((handle, Vec::new()));
                }
                _ => {
                    lost = true;
                    *names = ChangedNames::default();
                }
            });

            match more {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    lost = true;
                    break;
                }
            }
        }

        heard.lost = lost;
        heard
    }
}
