//! The destination's `runc restore`, step by step under our control, on a thread of its own.
//!
//! It is started while the container still runs on the source, and held at the RESTORE request:
//! runc's part and CRIU's start are over when the images come. Then:
//!
//! ```text
//! RESTORE       held until the images are there
//! post-setup…   the namespaces are there: an engine that makes the network in one of them begins
//! post-restore  runc is asked first, and ended; held until the commit: the tasks exist, none has run
//!               CRIU goes on to its point of no return; sockets wake up, behind the closed fence
//! pre-resume    all tasks have left CRIU's code, none has run: the fence opens, packets that it held back are
//!               replayed
//! ```
//!
//! Before `post-restore` is answered CRIU can still give up and kills what it made, silently, as
//! all sockets are in repair mode, and behind a closed fence. After it nothing stops CRIU any more,
//! not even our own death; should CRIU itself be killed before all tasks have left its code, none of them has
//! run, and nobody has heard of their sockets ([`crate::criu::barrier`]). The loss of CRIU's connection would
//! stop runc: it ends the container. By then it has written its state and set up everything, so it is
//! ended as soon as it has agreed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use rust_criu::rust_criu_protobuf::rpc::{Criu_network_lock_method, Criu_req, Inherit_fd};

use super::caller::Caller;
use super::dump::external_mount;
use super::follow::{CriuSteps, follow};
use crate::criu::interposer::{CriuSession, Interposer, Notify};
use crate::criu::{failure, images, lent};
use crate::engine::calls::EngineCall;
use crate::migration::journal::criu;
use crate::migration::journal::workdir::{CriuPath, WorkPath};
use crate::network::{self, NetworkImage, ReleaseSet};
use crate::oci::container_id::ContainerId;
use crate::oci::runtime::Runtime;
use crate::problem::Advise;
use crate::sys::fault;
use crate::sys::netns::NetNs;
use crate::sys::process::{self, ProcessId};

const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest image of a task that is read for its name.
const MOST_OF_A_TASK: u64 = 1 << 20;
/// Until a process that was killed has ended.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What the restore tells the hand-over.
#[derive(Debug)]
pub enum RestoreEvent {
    /// Held at the RESTORE request, in the container's control group: CRIU's process.
    AtRequest(i32),
    /// Restored, held before the first instruction. The init process, and what CRIU is
    /// [released](crate::criu::interposer::carry_on) by.
    Restored(i32, OwnedFd),
    /// CRIU has let go of the sockets, and the fence is open (or, `false`, did not open).
    Released(bool),
    /// The tasks are about to run.
    AtResume,
    /// CRIU was killed while it held what it had restored: that will never run.
    Died,
    /// The tasks run.
    Running,
    /// It is over; an error before `Restored` was answered means that nothing is left.
    Ended(Result<()>),
}

/// What the hand-over tells the restore. A dropped sender means the same as `Verdict(false)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreOrder {
    /// The images are there.
    Restore,
    /// Run, or (`false`) give up.
    Verdict(bool),
    /// What was to be done at `AtResume` is done.
    Resume,
}

/// A standard stream of the restored container.
#[derive(Debug)]
pub struct StreamPlan {
    /// What the runtime gets as its own stream of that number.
    pub file: File,
    /// CRIU's key, where the stream is a regular file outside the container.
    pub external: Option<String>,
}

/// What a restore needs.
pub struct RestorePlan {
    /// The runtime.
    pub runtime: Runtime,
    /// Container ID.
    pub container: ContainerId,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Where the root file system is mounted by the time of the restore, if not before.
    pub root: Option<PathBuf>,
    /// Where the images are.
    pub images: PathBuf,
    /// Where CRIU's log and sockets are.
    pub work: CriuPath,
    /// Standard input, output, error.
    pub streams: Vec<StreamPlan>,
    /// What the loopback device of a namespace made by CRIU must be like.
    pub loopback: Option<NetworkImage>,
    /// Filled tmpfs mounts: their places in the container, and where they are now.
    pub tmpfs: Vec<(String, PathBuf)>,
    /// Takes the terminal.
    pub console_socket: Option<PathBuf>,
    /// Whom the container's engine has called to restore it: the runtime has to be started there.
    pub call: Option<EngineCall>,
    /// What is released with the container, when CRIU lets go of it; it may come until the verdict.
    pub release: Arc<Mutex<Option<ReleaseSet>>>,
    /// Device and inode of each file that CRIU is lent, in the order of their numbers.
    pub lent: Vec<(u64, u64)>,
    /// The interposer.
    pub interposer: Interposer,
}

/// A restore under way.
#[derive(Debug)]
pub struct RestoreJob {
    /// To say [`RestoreOrder`].
    pub go: Sender<RestoreOrder>,
    thread: JoinHandle<()>,
}

impl RestoreJob {
    /// Starts it; events go to `tell`.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        plan: RestorePlan,
        tell: impl Fn(RestoreEvent) + Send + Sync + 'static,
    ) -> Result<RestoreJob> {
        let (go, orders) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("restore".into()).spawn(move || {
            let result = run(plan, &tell, &orders);
            tell(RestoreEvent::Ended(result));
        })?;
        Ok(RestoreJob { go, thread })
    }

    /// Gives up where that is still possible, and waits for the end.
    pub fn join(self) {
        drop(self.go);
        let _ = self.thread.join();
    }

    /// Gives up, and does not wait for what does not come.
    pub fn abandon(self, work: &WorkPath) {
        drop(self.go);
        criu::end_restore(work);
        let _ = self.thread.join();
    }
}

fn run(
    mut plan: RestorePlan,
    tell: &(dyn Fn(RestoreEvent) + Sync),
    orders: &Receiver<RestoreOrder>,
) -> Result<()> {
    let log = plan.work.runtime_log();
    let mut command = plan.runtime.command();
    command.arg("--log").arg(&log).arg("restore").arg("--detach");
    command.arg("--bundle").arg(&plan.bundle);
    command.arg("--image-path").arg(&plan.images).arg("--work-path").arg(&*plan.work);
    command.arg("--pid-file").arg(plan.work.runtime_pid_file());
    command.args(["--tcp-established", "--file-locks", "--ext-unix-sk"]);
    if let Some(socket) = &plan.console_socket {
        command.arg("--console-socket").arg(socket);
    }

    command.arg(&*plan.container);
    let mut external: Vec<(String, i32)> = Vec::new();
    for (i, stream) in std::mem::take(&mut plan.streams).into_iter().enumerate() {
        // Two streams of one file have one key.
        let key = stream.external.filter(|k| !external.iter().any(|(known, _)| known == k));
        external.extend(key.map(|key| (key, i as i32)));
        match i {
            0 => command.stdin(stream.file),
            1 => command.stdout(stream.file),
            _ => command.stderr(stream.file),
        };
    }

    plan.interposer.configure(&mut command);
    process::in_new_session(&mut command);
    process::with_own_keyring(&mut command);
    let mut caller = Caller::new(plan.call.take());
    let (mut child, pid) = match caller.run(&command)? {
        None => {
            let child = command
                .spawn()
                .with_context(|| format!("cannot run {}", plan.runtime.program().display()))?;
            let pid = child.id() as i32;
            (Some(child), pid)
        }
        Some(pid) => (None, pid),
    };

    // The command holds the container's streams open; they must be the container's alone.
    drop(command);
    let pidfd = process::pidfd_open(pid)?;
    let deadline = Instant::now() + STEP_TIMEOUT;
    let outcome =
        plan.interposer.next_job(pidfd.as_fd(), deadline).and_then(|(session, request)| {
            let told = (tell, orders);
            job(&plan, pidfd.as_fd(), &session, request, &external, &mut caller, told)
        });
    // It has ended, or does when its connection to CRIU is closed; its own opinion of the restore
    // counts for nothing.
    match &mut child {
        Some(child) => drop(child.wait()?),
        None => drop(process::wait_readable(&[pidfd.as_fd()], None)?),
    }

    plan.runtime.clear_restore(&plan.container);
    let outcome = outcome.map_err(|e| blame(&plan, e));
    caller.end(outcome.as_ref().err().map(|e| format!("{e:#}")));

    outcome
}

/// Adds what the runtime says, where that is more than that CRIU has failed.
fn blame(plan: &RestorePlan, error: Error) -> Error {
    let text = fs::read_to_string(plan.work.runtime_log()).unwrap_or_default();
    let Some(said) = own_words(&text) else { return error };
    let told = format!("the runtime's restore: {said}");
    if said.contains("hook") {
        let hint = "the hooks prestart and createRuntime of config.json run on the destination, too: \
                    they must succeed there";
        return Err::<(), _>(error).advise(told, hint).unwrap_err();
    }
    error.context(told)
}

/// The runtime's last error, if it is about something that it has done itself.
fn own_words(log: &str) -> Option<String> {
    let said = crate::oci::runtime::last_error(log)?;
    // `criu failed: type NOTIFY errno 0 log file: …`: CRIU's own words are told.
    (!said.contains("criu failed")).then_some(said)
}

/// Asks CRIU for what we want of it, beyond what the runtime wants.
fn edit(
    request: &mut Criu_req,
    plan: &RestorePlan,
    external: &[(String, i32)],
    images: i32,
    work: i32,
) -> Result<()> {
    let opts = request.opts.as_mut().ok_or_else(|| anyhow!("a restore without options"))?;
    opts.set_images_dir_fd(images);
    opts.set_work_dir_fd(work);
    opts.clear_config_file();
    opts.set_notify_scripts(true);
    opts.set_lazy_pages(true);
    opts.set_tcp_established(true);
    opts.set_file_locks(true);
    opts.set_ext_unix_sk(true);

    // CRIU's own child rather than the runtime's, so that CRIU need not trace it before it lets it go:
    // until then we may.
    opts.set_rst_sibling(false);
    opts.set_log_level(failure::log_level());
    opts.network_lock = Some(Criu_network_lock_method::SKIP.into());
    if let Some(root) = &plan.root {
        // The runtime has bound elsewhere what stood in for it.
        let root = root.to_str().ok_or_else(|| anyhow!("a root file system that is not UTF-8"))?;
        opts.set_root(root.to_owned());
    }

    // CRIU would mount a symbolic link (docker's --init is one); who started it there followed that.
    for mount in &mut opts.ext_mnt {
        if let Ok(real) = fs::canonicalize(mount.val())
            && let Some(real) = real.to_str()
        {
            mount.set_val(real.to_owned());
        }
    }

    for (place, here) in &plan.tmpfs {
        let here = here.to_str().ok_or_else(|| anyhow!("a work directory that is not UTF-8"))?;
        opts.ext_mnt.push(external_mount(place, here));
    }
    for (key, fd) in external {
        let mut inherit = Inherit_fd::new();
        inherit.set_key(key.clone());
        inherit.set_fd(*fd);
        opts.inherit_fd.push(inherit);
    }

    Ok(())
}

/// Tells CRIU which of its descriptors stand for shared memory.
fn lend(
    request: &mut Criu_req,
    plan: &RestorePlan,
    numbers: &HashMap<(u64, u64), i32>,
) -> Result<()> {
    let opts = request.opts.as_mut().ok_or_else(|| anyhow!("a restore without options"))?;
    for file in lent::read_list(&plan.images)? {
        let one = plan.lent.get(file.number.wrapping_sub(1) as usize);
        let fd = one.and_then(|one| numbers.get(one));
        let fd = fd.ok_or_else(|| anyhow!("CRIU lacks shared memory {}", file.number))?;
        let mut inherit = Inherit_fd::new();
        inherit.set_key(file.key());
        inherit.set_fd(*fd);
        opts.inherit_fd.push(inherit);
    }
    Ok(())
}

fn job(
    plan: &RestorePlan,
    runtime: BorrowedFd,
    session: &CriuSession,
    mut request: Criu_req,
    external: &[(String, i32)],
    caller: &mut Caller,
    (tell, orders): (&(dyn Fn(RestoreEvent) + Sync), &Receiver<RestoreOrder>),
) -> Result<()> {
    // Open as long as CRIU may look them up in our descriptor table.
    let images = File::open(&plan.images)?;
    let work = File::open(&*plan.work)?;
    edit(&mut request, plan, external, images.as_raw_fd(), work.as_raw_fd())?;

    // Before the container stands still.
    let numbers = session.numbers()?;
    tell(RestoreEvent::AtRequest(session.criu_pid));
    if !matches!(orders.recv(), Ok(RestoreOrder::Restore)) {
        bail!("given up before the images came");
    }
    fault::point("restore.request")?;
    fs::write(plan.work.pid(), session.criu_pid.to_string())?;
    // Whoever gave up before could not know whom to end.
    if matches!(orders.try_recv(), Err(TryRecvError::Disconnected)) {
        bail!("given up before CRIU was asked");
    }
    lend(&mut request, plan, &numbers)?;
    session.send_request(&request)?;

    let (init, left, running) = (0, false, false);
    follow(session, &mut RestoreSteps { plan, runtime, caller, tell, orders, init, left, running })
}

/// A restore, between CRIU's steps.
struct RestoreSteps<'a> {
    plan: &'a RestorePlan,
    /// The runtime's process.
    runtime: BorrowedFd<'a>,
    caller: &'a mut Caller,
    tell: &'a (dyn Fn(RestoreEvent) + Sync),
    orders: &'a Receiver<RestoreOrder>,
    /// The container's first task, or 0.
    init: i32,
    /// Whether all tasks have left CRIU's code, each stopped at the end of the system call that does it: they
    /// run when CRIU lets go of them, or dies.
    left: bool,
    /// Whether they run.
    running: bool,
}

impl CriuSteps for RestoreSteps<'_> {
    const WHAT: &'static str = "CRIU's restore";
    const LIMIT: Duration = STEP_TIMEOUT;

    fn at(&mut self, session: &CriuSession, notify: &Notify) -> Result<()> {
        let limit = Some(Instant::now() + STEP_TIMEOUT);
        match notify.script.as_str() {
            "setup-namespaces" => {
                self.init = notify.pid.unwrap_or(self.init);
                // Before the sockets are made: some are bound to its addresses.
                if let (Some(image), Some(pid)) = (&self.plan.loopback, notify.pid) {
                    network::fill_loopback(&NetNs::of_pid(pid as u32)?, image)?;
                }
                session.forward(notify, limit)
            }
            "post-setup-namespaces" => {
                session.forward(notify, limit)?;
                self.caller.begin(&self.plan.work.work(), self.init, session.criu_pid)
            }
            "post-restore" => self.restored(session, notify),
            "pre-resume" => {
                self.resume(session);
                Ok(())
            }
            "post-resume" => {
                self.running = true;
                (self.tell)(RestoreEvent::Running);
                let _ = session.answer(true);
                Ok(())
            }
            "network-unlock" | "network-lock" => session.answer(true),
            _ => session.forward(notify, limit),
        }
    }

    fn hung_up(&mut self) -> Result<()> {
        if !self.left {
            bail!("CRIU ended in the middle of the restore");
        }
        if !self.running {
            (self.tell)(RestoreEvent::Running);
        }
        Ok(())
    }

    fn explain(&self, error: Error) -> Error {
        let log = self.plan.work.log("restore");
        let name = |pid| Some(name(&self.plan.images, pid));
        failure::explained("CRIU cannot restore", &log, error, name)
    }
}

impl RestoreSteps<'_> {
    /// All tasks are there, and none has run: asks the runtime, and waits for the verdict.
    fn restored(&mut self, session: &CriuSession, notify: &Notify) -> Result<()> {
        self.init = notify.pid.unwrap_or(self.init);
        // Before the runtime knows of a container: who discards it must know it as ours.
        if let Some(it) = ProcessId::of(self.init) {
            fs::write(self.plan.work.work().restored_init(), it.to_string())?;
        }

        // runc's own part costs 1-3 ms: before the commit, not after it.
        if !session.consult(notify, Some(Instant::now() + STEP_TIMEOUT))? {
            return session.answer(false);
        }

        let _ = process::pidfd_kill(self.runtime, libc::SIGKILL);
        fault::point("restore.restored")?;
        if !process::lives(session.criu_pid) {
            bail!("CRIU was killed when it had restored");
        }

        let waits = Instant::now();
        let begun = self.caller.restored(self.init, session.criu_pid);
        tracing::debug!("an engine has taken {:?} more", waits.elapsed());
        let apart = self.caller.is_apart();
        let agreed = begun.and_then(|()| {
            (self.tell)(RestoreEvent::Restored(self.init, session.duplicate()?));
            await_verdict(session, self.tell, self.orders)
        });

        if apart && !matches!(agreed, Ok(true)) {
            orphan(self.init, session.criu_pid);
            agreed?;
            bail!("the migration was given up");
        }

        session.answer(agreed?)?;
        let _ = fault::point("restore.answered");
        Ok(())
    }

    /// The tasks are about to run: opens the fence.
    fn resume(&mut self, session: &CriuSession) {
        self.left = true;
        // Not before: what a kernel has answered for a container is lost with it.
        let fence = {
            let mut release = self.plan.release.lock().unwrap_or_else(PoisonError::into_inner);
            release.as_mut().map(ReleaseSet::open)
        };
        (self.tell)(RestoreEvent::Released(fence.is_none_or(|opened| opened.is_ok())));
        let _ = fault::point("restore.resume");

        (self.tell)(RestoreEvent::AtResume);
        // Whoever went away meanwhile: the container runs all the same.
        let _ = self.orders.recv_timeout(Duration::from_secs(1));
        let _ = session.answer(true);
    }
}

/// A task, which may be gone again: its number in the container, and its name by the images.
fn name(directory: &Path, pid: i32) -> String {
    let mut bytes = Vec::new();
    let read = File::open(directory.join(format!("core-{pid}.img")))
        .and_then(|file| file.take(MOST_OF_A_TASK).read_to_end(&mut bytes));
    match read.ok().and_then(|_| images::parse_command(&bytes).ok()) {
        Some(name) => format!("its process {pid}, {}", name.escape_debug()),
        None => format!("its process {pid}"),
    }
}

/// Ends what is restored so that it is the engine's monitor that hears of it, which waits for that: CRIU
/// would end it and tell nobody.
fn orphan(init: i32, criu: i32) {
    let (init, criu) = (process::pidfd_open(init), process::pidfd_open(criu));
    for one in [criu, init].iter().flatten() {
        let _ = process::pidfd_kill(one, libc::SIGKILL);
        let _ = process::wait_readable(&[one.as_fd()], Some(Instant::now() + END_TIMEOUT));
    }
}

/// Waits for the verdict, and says so if CRIU dies meanwhile: the source must hear of it before it
/// decides.
fn await_verdict(
    session: &CriuSession,
    tell: &(dyn Fn(RestoreEvent) + Sync),
    orders: &Receiver<RestoreOrder>,
) -> Result<bool> {
    let criu = process::pidfd_open(session.criu_pid)?;
    let (stop, stopped) = UnixStream::pair()?;
    Ok(std::thread::scope(|scope| {
        scope.spawn(|| {
            let ready = process::wait_readable(&[criu.as_fd(), stopped.as_fd()], None);
            if ready.is_ok_and(|r| r.contains(&0)) {
                tell(RestoreEvent::Died);
            }
        });
        let verdict = orders.recv();
        // Ends the watch.
        drop(stop);
        matches!(verdict, Ok(RestoreOrder::Verdict(true)))
    }))
}
