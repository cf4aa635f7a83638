//! Ferry between the runtime and CRIU: [`Interposer`] waits for the shim, a [`CriuSession`] is one run
//! of criu, and whoever holds the session decides about each message.
//!
//! The messages of one job (Documentation: criu.org/RPC, images/rpc.proto):
//!
//! ```text
//!   runc                 ferry                    criu
//!    │ ── Criu_req(DUMP) ─▶ edits ── send_request ─▶ │
//!    │                      ◀── Criu_resp(NOTIFY) ── │   next() = Notify
//!    │ ◀─── consult ───     │                        │
//!    │ ── Criu_req(NOTIFY)▶ │ ──── answer ─────────▶ │   held for as long as the hand-over needs
//!    │ ◀─── relay_reply ─── ◀── Criu_resp(DUMP) ──── │   next() = Reply
//! ```
//!
//! CRIU opens `images_dir_fd` and `work_dir_fd` as `/proc/<peer>/fd/N`, the peer being the creator
//! of the socket pair, which is now this process: callers must put numbers of ours there.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use protobuf::Message;
use rust_criu::rust_criu_protobuf::rpc::{Criu_notify, Criu_req, Criu_req_type, Criu_resp};

use super::shim;
use crate::sys::netns::NetNs;
use crate::sys::process::wait_readable;
use crate::sys::scm;

/// Where the shim calls.
#[derive(Debug)]
pub struct Interposer {
    bin: PathBuf,
    socket: PathBuf,
    real: PathBuf,
    listener: UnixListener,
    /// The network namespace that criu is to run in, if not ours.
    namespace: Option<NetNs>,
    vouched: bool,
    /// Files that are to lie over tasks' `smaps` for criu.
    cover: Option<PathBuf>,
    /// Descriptors that criu gets.
    lent: Vec<OwnedFd>,
}

impl Interposer {
    /// Makes the directory that will stand first in the runtime's PATH, and the socket, below
    /// `directory`, which must be absolute, private to us, and exist.
    ///
    /// With a network namespace, criu is started in it. To CRIU the container then has no network
    /// namespace of its own, which spares it a walk through the whole connection tracking table,
    /// twice, in the middle of the freeze (24 ms with 24 GiB of memory, whose size that table's
    /// is); and the page server of its lazy dump listens where nobody can reach it.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(directory: &Path, real: &Path, namespace: Option<NetNs>) -> Result<Interposer> {
        let bin = directory.join("bin");
        std::fs::create_dir(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
        let own = std::fs::read_link("/proc/self/exe")?;
        std::os::unix::fs::symlink(&own, bin.join("criu"))?;
        let socket = directory.join("criu.sock");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let real = real.to_owned();
        let (vouched, cover, lent) = (false, None, Vec::new());
        Ok(Interposer { bin, socket, real, listener, namespace, vouched, cover, lent })
    }

    /// Has criu believe that what its tasks watch with epoll is what its number says. Whoever asks
    /// for this must see to it. Only for a dump: tasks that are restored would inherit it.
    pub fn vouch_for_epolls(&mut self) {
        self.vouched = true;
    }

    /// Has criu, and nobody else, find each file of a directory in place of the `smaps` of the task whose
    /// number is its name. Whether that could be done, [`CriuSession::covered`] says.
    pub fn cover(&mut self, directory: &Path) {
        self.cover = Some(directory.to_owned());
    }

    /// Has criu be started with these descriptors, too: under which numbers, [`CriuSession::numbers`] says.
    pub fn lend(&mut self, files: Vec<OwnedFd>) {
        self.lent = files;
    }

    /// Makes the runtime that `command` starts find the shim.
    pub fn configure(&self, command: &mut Command) {
        let mut path = self.bin.clone().into_os_string();
        path.push(":");
        path.push(
            std::env::var_os("PATH")
                .filter(|p| !p.is_empty())
                .unwrap_or_else(|| crate::oci::DEFAULT_PATH.into()),
        );
        command.env("PATH", path);
        command.env(shim::ENV_SOCKET, &self.socket);
        command.env(shim::ENV_REAL, &self.real);
    }

    /// Waits for the run of criu that does the job, serving on the way those that only ask for
    /// its version or features. `runtime` becomes readable when the runtime has ended (a pidfd).
    ///
    /// # Errors
    /// When the runtime ends without having started a job, or the time is over.
    pub fn next_job(
        &self,
        runtime: BorrowedFd,
        deadline: Instant,
    ) -> Result<(CriuSession, Criu_req)> {
        loop {
            if !wait_readable(&[self.listener.as_fd(), runtime], Some(deadline))?.contains(&0) {
                bail!("the runtime ended before it called CRIU");
            }
            let (hub, _) = self.listener.accept()?;
            let (_, mut fds) =
                scm::receive(&hub)?.ok_or_else(|| anyhow!("the criu shim went away"))?;
            // The shim becomes criu: exec(2) keeps the number. unix(7), SO_PEERCRED.
            let criu_pid = getsockopt(&hub, PeerCredentials)?.pid();
            let theirs = fds.pop().ok_or_else(|| anyhow!("the criu shim sent no socket"))?;

            let (ours, for_criu) = scm::seqpacket_pair()?;
            let mut fds = vec![for_criu.as_raw_fd()];
            fds.extend(self.namespace.as_ref().map(|n| n.as_fd().as_raw_fd()));
            fds.extend(self.lent.iter().map(AsRawFd::as_raw_fd));
            let mut word = if self.vouched { shim::VOUCHED } else { shim::GO }.to_vec();
            word.push(self.namespace.as_ref().map_or(shim::NO_NAMESPACE, |_| shim::NAMESPACE));
            word.extend(self.cover.iter().flat_map(|path| path.as_os_str().as_bytes()));
            scm::send(&hub, &word, &fds)?;
            drop(for_criu);

            let covered = self.cover.is_some() && covered(&hub, deadline)?;
            if !self.lent.is_empty() {
                wait_readable(&[hub.as_fd()], Some(deadline))?;
                let said = scm::receive_stream(&hub, shim::LONGEST)?;
                said.ok_or_else(|| anyhow!("the criu shim went away"))?;
            }
            let session = CriuSession { runtime: theirs, criu: ours, criu_pid, covered };
            let Some((bytes, _)) = session.receive_from_runtime(Some(deadline))? else { continue };
            let request = Criu_req::parse_from_bytes(&bytes).context("the runtime's request")?;
            match request.type_() {
                Criu_req_type::DUMP | Criu_req_type::RESTORE | Criu_req_type::PRE_DUMP => {
                    return Ok((session, request));
                }
                _ => session.pass_on(&bytes, deadline)?,
            }
        }
    }
}

/// Tells whether the shim could do what was asked of it.
fn covered(hub: &UnixStream, deadline: Instant) -> Result<bool> {
    wait_readable(&[hub.as_fd()], Some(deadline))?;
    let (said, _) = scm::receive_stream(hub, shim::LONGEST)?
        .ok_or_else(|| anyhow!("the criu shim went away"))?;
    if said != shim::COVERED {
        let why = String::from_utf8_lossy(&said);
        tracing::debug!("nothing can be hidden from CRIU: {why}");
    }
    Ok(said == shim::COVERED)
}

fn answer(criu: &OwnedFd, agreed: bool) -> Result<()> {
    let mut request = Criu_req::new();
    request.set_type(Criu_req_type::NOTIFY);
    request.set_notify_success(agreed);
    Ok(scm::send(criu, &request.write_to_bytes()?, &[])?)
}

/// Lets a CRIU that restores go on to its end, when whoever held its [`CriuSession`] has died; it is the socket
/// of that. He may have answered the last question or not: an answer too many is that to the next one.
///
/// # Errors
/// When CRIU fails, or does nothing any more.
pub fn carry_on(criu: &OwnedFd, step: Duration) -> Result<()> {
    answer(criu, true)?;
    loop {
        wait_readable(&[criu.as_fd()], Some(Instant::now() + step))?;
        let (bytes, _) = scm::receive(criu)?.ok_or_else(|| anyhow!("CRIU has ended"))?;
        let response = Criu_resp::parse_from_bytes(&bytes).context("CRIU's message")?;
        match response.type_() {
            Criu_req_type::NOTIFY => answer(criu, true)?,
            _ if response.success() => return Ok(()),
            _ => bail!("{}", response.cr_errmsg()),
        }
    }
}

/// A question of CRIU's that waits for an answer.
#[derive(Debug)]
pub struct Notify {
    /// `pre-dump`, `network-lock`, `post-dump`, `post-restore` …
    pub script: String,
    /// The restored init, where the notification names it.
    pub pid: Option<i32>,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// What comes next from CRIU.
#[derive(Debug)]
pub enum CriuEvent {
    /// CRIU asks and waits.
    Notify(Notify),
    /// The job's result.
    Reply(Box<Criu_resp>),
    /// CRIU has closed: it died, or is done.
    Hangup,
}

/// One run of criu, held between the runtime and it.
#[derive(Debug)]
pub struct CriuSession {
    runtime: OwnedFd,
    criu: OwnedFd,
    /// The process that is criu.
    pub criu_pid: i32,
    /// It finds what it is to find of the tasks' mappings: [`Interposer::cover`].
    pub covered: bool,
}

impl CriuSession {
    /// Another descriptor of the socket to CRIU: as long as it is open CRIU waits for an answer.
    ///
    /// # Errors
    /// When there can be no more descriptors.
    pub fn duplicate(&self) -> std::io::Result<OwnedFd> {
        self.criu.try_clone()
    }

    /// The numbers of all files that criu has open, by device and inode.
    ///
    /// # Errors
    /// When it has ended.
    pub fn numbers(&self) -> Result<HashMap<(u64, u64), i32>> {
        let mut found = HashMap::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.criu_pid))? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let (Some(number), Ok(meta)) = (number, std::fs::metadata(entry.path())) {
                found.insert((meta.dev(), meta.ino()), number);
            }
        }
        Ok(found)
    }

    /// Sends the (edited) job to CRIU.
    ///
    /// # Errors
    /// When CRIU is gone.
    pub fn send_request(&self, request: &Criu_req) -> Result<()> {
        Ok(scm::send(&self.criu, &request.write_to_bytes()?, &[])?)
    }

    /// Waits for the next message of CRIU.
    ///
    /// # Errors
    /// When the time is over, or the message cannot be read.
    pub fn next(&self, deadline: Option<Instant>) -> Result<CriuEvent> {
        wait_readable(&[self.criu.as_fd()], deadline)?;
        let Some((bytes, fds)) = scm::receive(&self.criu)? else { return Ok(CriuEvent::Hangup) };
        let response = Criu_resp::parse_from_bytes(&bytes).context("CRIU's message")?;
        if response.type_() != Criu_req_type::NOTIFY {
            return Ok(CriuEvent::Reply(Box::new(response)));
        }
        let notify: &Criu_notify =
            response.notify.as_ref().ok_or_else(|| anyhow!("a notification without a name"))?;
        let (script, pid) = (notify.script().to_owned(), notify.pid);
        Ok(CriuEvent::Notify(Notify { script, pid, bytes, fds }))
    }

    /// Asks the runtime; says whether it agrees. CRIU goes on waiting.
    ///
    /// # Errors
    /// When the runtime is gone.
    pub fn consult(&self, notify: &Notify, deadline: Option<Instant>) -> Result<bool> {
        let raw: Vec<_> = notify.fds.iter().map(|f| f.as_raw_fd()).collect();
        scm::send(&self.runtime, &notify.bytes, &raw)?;
        let (bytes, _) = self
            .receive_from_runtime(deadline)?
            .ok_or_else(|| anyhow!("the runtime went away at {}", notify.script))?;
        Ok(Criu_req::parse_from_bytes(&bytes)?.notify_success())
    }

    /// Answers CRIU, which goes on or gives up.
    ///
    /// # Errors
    /// When CRIU is gone.
    pub fn answer(&self, agreed: bool) -> Result<()> {
        answer(&self.criu, agreed)
    }

    /// Asks the runtime and passes its answer on.
    ///
    /// # Errors
    /// When either is gone.
    pub fn forward(&self, notify: &Notify, deadline: Option<Instant>) -> Result<()> {
        let agreed = self.consult(notify, deadline)?;
        self.answer(agreed)
    }

    /// Hands the job's result to the runtime; it may be gone, and what it thinks of it is of no use.
    ///
    /// # Errors
    /// Says why the job has failed, in CRIU's words.
    pub fn relay_reply(&self, response: &Criu_resp) -> Result<()> {
        let _ = response.write_to_bytes().map(|bytes| scm::send(&self.runtime, &bytes, &[]));
        if !response.success() {
            bail!("{}", response.cr_errmsg());
        }
        Ok(())
    }

    fn receive_from_runtime(
        &self,
        deadline: Option<Instant>,
    ) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        wait_readable(&[self.runtime.as_fd()], deadline)?;
        Ok(scm::receive(&self.runtime)?)
    }

    /// Carries everything both ways until criu is done: for version and feature questions.
    fn pass_on(&self, first: &[u8], deadline: Instant) -> Result<()> {
        scm::send(&self.criu, first, &[])?;
        loop {
            let both = [self.criu.as_fd(), self.runtime.as_fd()];
            let ready = wait_readable(&both, Some(deadline))?;
            if ready.contains(&0) {
                match scm::receive(&self.criu)? {
                    None => return Ok(()),
                    Some((bytes, _)) => scm::send(&self.runtime, &bytes, &[])?,
                }
            } else if ready.contains(&1) {
                match scm::receive(&self.runtime)? {
                    // criu ends when its socket closes, which happens when we return.
                    None => return Ok(()),
                    Some((bytes, _)) => scm::send(&self.criu, &bytes, &[])?,
                }
            }
        }
    }
}
