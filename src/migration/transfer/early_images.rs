//! Images of connections, sent while CRIU still dumps.
//!
//! CRIU writes a file for each connection, and does not touch it again. What 10,000 of them take to
//! be read, sent and written need not be added to the freeze.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::image_files::send_file;
use crate::migration::protocol::session::PeerWriter;
use crate::transport::frame;

/// What the image of a connection is called.
const CONNECTION: &str = "tcp-stream-";
/// CRIU is not to be slowed down by waking somebody for each file.
const PAUSE: Duration = Duration::from_millis(3);

/// Files that were sent.
type SentFiles = HashSet<OsString>;

/// Whoever sends them.
#[derive(Debug)]
pub struct EarlyImages {
    work: Option<(Sender<()>, JoinHandle<Result<SentFiles>>)>,
    /// Closing it takes the kernel 10 ms and more: not in the freeze.
    _watch: Arc<Inotify>,
}

impl EarlyImages {
    /// Sends from now on what is complete in the directory of images.
    ///
    /// # Errors
    /// When there can be no thread, or the directory cannot be watched.
    pub fn start(images: PathBuf, peer: PeerWriter) -> Result<EarlyImages> {
        let watch = Arc::new(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
        let watched = watch.clone();
        watch.add_watch(&images, AddWatchFlags::IN_CLOSE_WRITE)?;
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("early".into()).spawn(move || {
            let mut sent = SentFiles::new();
            let mut buffer = vec![0; frame::MAX_FILE_PIECE];
            loop {
                // What was closed before that is among the events.
                let last = stopped.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout);
                while let Some(events) = pending(&watched)? {
                    for name in events.into_iter().filter_map(|event| event.name) {
                        let Some(text) = name.to_str().filter(|n| n.starts_with(CONNECTION)) else {
                            continue;
                        };
                        send_file(&peer, text, &images.join(text), 0, &mut buffer)?;
                        sent.insert(name);
                    }
                }

                if last {
                    return Ok(sent);
                }
            }
        })?;

        Ok(EarlyImages { work: Some((stop, thread)), _watch: watch })
    }

    /// CRIU has dumped: what has been sent. The kernel may have lost count of some.
    ///
    /// # Errors
    /// When a file could not be read, or the link is gone.
    pub fn end(&mut self) -> Result<SentFiles> {
        let Some((stop, thread)) = self.work.take() else { return Ok(SentFiles::new()) };
        drop(stop);
        thread.join().unwrap_or_else(|_| Err(anyhow!("the thread has died")))
    }
}

fn pending(watch: &Inotify) -> Result<Option<Vec<nix::sys::inotify::InotifyEvent>>> {
    match watch.read_events() {
        Ok(events) => Ok(Some(events)),
        Err(Errno::EAGAIN) => Ok(None),
        Err(Errno::EINTR) => Ok(Some(Vec::new())),
        Err(e) => Err(e.into()),
    }
}
