//! The source's `runc checkpoint`, step by step under our control, on a thread of its own.
//!
//! CRIU is asked for a lazy dump that leaves the container running, of a control group that we have
//! frozen ourselves. So nothing that becomes of runc or CRIU can decide who owns the container: when
//! they end, in whatever way, its tasks stand frozen behind our fence, and the hand-over says
//! whether they are thawed or killed.
//!
//! ```text
//! pre-dump      held until the destination is ready  → quiesce, freeze the control group,
//!               close the fence, hide plain memory
//! post-dump     freeze the group again, add to the images what was hidden; held until the verdict
//! status-ready  send CRIU's page server, which nobody needs, home
//! ```

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use protobuf::MessageField;
use rust_criu::rust_criu_protobuf::rpc::{
    Criu_network_lock_method, Criu_page_server_info, Criu_req, Ext_mount_map,
};

use super::follow::{CriuSteps, follow};
use super::hiding::{Added, Hiding};
use crate::connections::{Extracted, Extraction, GuardCommands};
use crate::criu::failure;
use crate::criu::interposer::{CriuSession, Interposer, Notify};
use crate::files::sockets::{self, Renamed};
use crate::memory::shared::SharedMemory;
use crate::migration::journal::workdir::CriuPath;
use crate::migration::network::quiesce::{await_last, await_quiet};
use crate::migration::network::udp_queues::Came;
use crate::migration::protocol::session::PeerWriter;
use crate::network::fence::{ArmedFence, FenceSide};
use crate::network::frames::Capture;
use crate::network::sockets::SockDiag;
use crate::network::udp_queues::UdpEndpoints;
use crate::oci::cgroup::Cgroup;
use crate::oci::container_id::ContainerId;
use crate::oci::runtime::Runtime;
use crate::problem::Advise;
use crate::sys::netns::NetNs;
use crate::sys::panics::caught;
use crate::sys::{fault, process};
use crate::tasks::criu_rescue::{TaskSnapshot, TracerWatch};
use crate::tasks::unsupported::MAX_NAMELESS;
use crate::tasks::{epoll, waits};

/// Time that a container may take to stop before it is left alone.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often freezing is tried when a task is caught in a vfork.
const FREEZE_TRIES: u32 = 20;
/// Time that CRIU may take for anything that does not wait for us.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Time that CRIU may take to take back what it has done to the tasks, when the dump is given up.
const ROLLBACK_LIMIT: Duration = Duration::from_secs(2);

/// What the dump tells the hand-over.
#[derive(Debug)]
pub enum DumpEvent {
    /// Everything is ready for the freeze: say [`DumpOrder`].
    AtFreeze,
    /// The tasks stand still and the fence is closed.
    Frozen {
        /// When the freeze began.
        since: Instant,
        /// Sees what the fence stops, and opens it again.
        network: Option<Box<(ArmedFence, Capture)>>,
        /// What had come before, and which of it is in the container's sockets.
        came: Came,
    },
    /// Connections were taken out of the tasks, and are on their way: [`DumpPlan::lifted`].
    Extracted,
    /// All images are written: say the verdict.
    Dumped {
        /// Pages of mappings that CRIU's dump was not shown; none where it was shown all.
        hidden: Option<u64>,
        /// Whether it is right is known only when [`DumpEvent::Checked`] comes: nothing is to be handed over
        /// before.
        unchecked: bool,
    },
    /// Whether the images are those of the tasks.
    Checked(Result<()>),
    /// It is over. An error before `Dumped` means that there is nothing to restore from.
    Ended(Result<()>),
}

/// What the hand-over tells the dump. A dropped sender means the same as `Verdict(false)`.
#[derive(Debug)]
pub enum DumpOrder {
    /// Freeze, and have it so that CRIU can dump all.
    Freeze(Freeze),
    /// The container belongs to the destination, or (`false`) stays.
    Verdict(bool),
}

/// What is done before CRIU looks.
#[derive(Debug)]
pub struct Freeze {
    /// Connections that are taken out of the tasks.
    pub extraction: Option<Box<Extraction>>,
    /// The container's root directory.
    pub root: PathBuf,
    /// Sockets that get the names back that they were bound to.
    pub renamed: Vec<Renamed>,
}

/// What a dump needs.
pub struct DumpPlan {
    /// The runtime.
    pub runtime: Runtime,
    /// Container ID.
    pub container: ContainerId,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Where the images go.
    pub images: PathBuf,
    /// Where CRIU's log goes.
    pub work: CriuPath,
    /// The tmpfs mounts that CRIU is to leave to us: their places.
    pub tmpfs: Vec<String>,
    /// Paths in the container below which CRIU is to look for what is watched there.
    pub watched: Vec<String>,
    /// Standard streams that are regular files outside the container: CRIU's keys.
    pub external: Vec<String>,
    /// The fence, ready to close, and the capture, ready to start.
    pub network: Option<Box<(ArmedFence, Capture)>>,
    /// Looks for sockets that are nobody's, where there is a network.
    pub sock_diag: Option<SockDiag>,
    /// What brings its datagrams.
    pub homes: UdpEndpoints,
    /// The network namespace that CRIU runs in, if not ours.
    pub namespace: Option<NetNs>,
    /// The interposer.
    pub interposer: Interposer,
    /// Whether CRIU is told that all epolls are well: it has to be true.
    pub vouched: bool,
    /// Whether plain memory may be hidden from CRIU.
    pub hide: bool,
    /// Shared memory that the rounds read.
    pub shared: SharedMemory,
    /// Tells the destination of connections.
    pub peer: PeerWriter,
    /// Has the guard take them out of the tasks.
    pub orders: GuardCommands,
    /// Watches over whoever works in the tasks.
    pub watch: TracerWatch,
    /// Where they are noted that were taken out: by the end of the dump it is known whether there are any.
    pub extracted: ExtractedPlace,
}

/// Shared by the dump and the hand-over.
pub type ExtractedPlace = Arc<Mutex<Option<Extracted>>>;

/// A dump under way.
#[derive(Debug)]
pub struct DumpJob {
    /// To say [`DumpOrder`].
    pub go: Sender<DumpOrder>,
    thread: JoinHandle<()>,
    /// Closed when the thread ends.
    ended: Receiver<()>,
    criu: CriuPlace,
    watch: TracerWatch,
    shared: SharedMemory,
}

type TellDump = Arc<dyn Fn(DumpEvent) + Send + Sync>;

/// The CRIU that dumps, as soon as there is one.
type CriuPlace = Arc<Mutex<Option<OwnedFd>>>;

impl DumpJob {
    /// Starts it; events go to `tell`.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        plan: DumpPlan,
        tell: impl Fn(DumpEvent) + Send + Sync + 'static,
    ) -> Result<DumpJob> {
        let (go, orders) = std::sync::mpsc::channel();
        let (ends, ended) = std::sync::mpsc::channel();
        let (criu, watch, shared) = (CriuPlace::default(), plan.watch.clone(), plan.shared.clone());

        let (place, tell) = (criu.clone(), Arc::new(tell) as TellDump);
        let thread = std::thread::Builder::new().name("dump".into()).spawn(move || {
            let _ends = ends;
            let result = caught(|| run(plan, &place, &tell, &orders));
            tell(DumpEvent::Ended(result));
        })?;

        Ok(DumpJob { go, thread, ended, criu, watch, shared })
    }

    /// Ends a dump that nobody wants any more. A CRIU that does not come to its end, because there is
    /// too much to dump or because it hangs, is killed: the container must not stand still for as long
    /// as CRIU likes. Whoever undoes the migration mends what that leaves in the tasks.
    pub fn give_up(self) {
        self.shared.give_up();
        let _ = self.go.send(DumpOrder::Verdict(false));
        if self.ended.recv_timeout(ROLLBACK_LIMIT) == Err(RecvTimeoutError::Timeout) {
            self.kill_criu();
        }
        self.join();
    }

    fn kill_criu(&self) {
        let criu = self.criu.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(criu) = &*criu else { return };

        // Without the notes its death could end the container.
        if !self.watch.can_mend() {
            tracing::warn!("CRIU does not end its dump, and cannot be ended without harm here");
            return;
        }
        if let Err(e) = process::pidfd_kill(criu, libc::SIGKILL) {
            tracing::warn!("CRIU cannot be ended: {e}");
        }
    }

    /// Waits for the end of the thread, after `Ended` has come or will come.
    pub fn join(self) {
        drop(self.go);
        let _ = self.thread.join();
    }
}

fn run(
    mut plan: DumpPlan,
    criu: &CriuPlace,
    tell: &TellDump,
    orders: &Receiver<DumpOrder>,
) -> Result<()> {
    let log = plan.work.runtime_log();
    let mut command = plan.runtime.command();
    command.arg("--log").arg(&log).arg("checkpoint");
    command.arg("--image-path").arg(&plan.images).arg("--work-path").arg(&*plan.work);
    command.args(["--leave-running", "--tcp-established", "--file-locks", "--ext-unix-sk"]);
    command.arg(&*plan.container);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::create(plan.work.runtime_stderr())?);
    plan.interposer.configure(&mut command);

    process::in_new_session(&mut command);
    if plan.vouched {
        plan.interposer.vouch_for_epolls();
    }
    let hide = plan.hide && fault::point("dump.hide").is_ok();

    // CRIU is shown everything where there is no room for less.
    let hiding =
        hide.then(|| Hiding::prepare(&plan.work, &plan.cgroup, plan.shared.clone())).transpose();
    let mut hiding = hiding
        .inspect_err(|e| tracing::warn!("memory is not hidden from CRIU: {e:#}"))
        .unwrap_or(None);
    if let Some(hiding) = &hiding {
        plan.interposer.cover(hiding.directory());
    }

    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", plan.runtime.program().display()))?;
    let pidfd = process::pidfd_open(child.id() as i32)?;
    let deadline = Instant::now() + STEP_TIMEOUT;
    let outcome = plan
        .interposer
        .next_job(pidfd.as_fd(), deadline)
        .map_err(|e| e.context(runtime_log(&plan)))
        .and_then(|(session, request)| {
            let pidfd = process::pidfd_open(session.criu_pid)?;
            *criu.lock().unwrap_or_else(PoisonError::into_inner) = Some(pidfd);
            job(&mut plan, &session, request, hiding.as_mut(), tell, orders)
        });
    // The runtime ends by itself: the session is closed, and it has its answer or an end of file.
    if process::wait_readable(&[pidfd.as_fd()], Some(Instant::now() + STEP_TIMEOUT)).is_ok() {
        let _ = child.wait();
    }

    outcome
}

fn runtime_log(plan: &DumpPlan) -> String {
    let text = ["runc.log", "runc.stderr"]
        .map(|n| fs::read_to_string(plan.work.join(n)).unwrap_or_default())
        .concat();
    format!("the runtime's checkpoint: {}", crate::oci::runtime::first_error(&text))
}

fn job(
    plan: &mut DumpPlan,
    session: &CriuSession,
    mut request: Criu_req,
    hiding: Option<&mut Hiding>,
    tell: &TellDump,
    orders: &Receiver<DumpOrder>,
) -> Result<()> {
    // Open as long as CRIU may look them up in our descriptor table.
    let images = File::open(&plan.images)?;
    let work = File::open(&*plan.work)?;
    let port = edit(&mut request, plan, images.as_raw_fd(), work.as_raw_fd())?;
    fs::write(plan.work.pid(), session.criu_pid.to_string())?;

    // A task in which CRIU works when it is killed is in danger: let the kernel find another victim
    // when memory runs out. Needs CAP_SYS_RESOURCE; proc_pid_oom_score_adj(5).
    let _ = fs::write(format!("/proc/{}/oom_score_adj", session.criu_pid), "-1000");
    plan.watch.over(session.criu_pid);
    session.send_request(&request)?;

    let mut steps = DumpSteps { plan, hiding, tell, orders, port, vouching: None, wrong: None };
    let done = follow(session, &mut steps);
    steps.wrong.map_or(done, Err)
}

/// A dump, between CRIU's steps.
struct DumpSteps<'a> {
    plan: &'a mut DumpPlan,
    hiding: Option<&'a mut Hiding>,
    tell: &'a TellDump,
    orders: &'a Receiver<DumpOrder>,
    /// Of CRIU's page server.
    port: u16,
    /// Looks whether it is true what CRIU was told of epolls.
    vouching: Option<JoinHandle<Result<()>>>,
    /// Why CRIU was told that we failed.
    wrong: Option<anyhow::Error>,
}

impl CriuSteps for DumpSteps<'_> {
    const WHAT: &'static str = "CRIU's dump";
    const LIMIT: Duration = STEP_TIMEOUT;

    fn at(&mut self, session: &CriuSession, notify: &Notify) -> Result<()> {
        match notify.script.as_str() {
            "pre-dump" => self.freeze(session),
            "post-dump" => self.dumped(session),
            "status-ready" => {
                // A lazy dump ends by serving pages to one client; an end of file is enough
                // for it, and with leave_running its result decides nothing.
                let address = (Ipv4Addr::LOCALHOST, self.port);
                self.plan.in_namespace(|| drop(TcpStream::connect(address)))?;
                session.answer(true)
            }
            _ => session.answer(true),
        }
    }

    fn hung_up(&mut self) -> Result<()> {
        bail!("CRIU ended in the middle of the dump")
    }

    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let log = self.plan.work.log("dump");
        failure::explained("CRIU cannot dump the container", &log, error, name)
    }
}

impl DumpSteps<'_> {
    /// CRIU is about to look at the tasks: stops them, when the destination is ready.
    fn freeze(&mut self, session: &CriuSession) -> Result<()> {
        (self.tell)(DumpEvent::AtFreeze);
        let Ok(DumpOrder::Freeze(Freeze { extraction, root, renamed })) = self.orders.recv() else {
            return session.answer(false);
        };

        if let Some(hiding) = self.hiding.as_deref_mut() {
            hiding.look_again();
        }
        let done = stop(self.plan).and_then(|stopped| {
            sockets::to_bound_names(&root, &renamed)?;
            // What has many connections begins with them, and CRIU waits.
            if extraction.is_none() {
                hide(self.plan, session, self.hiding.as_deref_mut())?;
            }
            Ok(stopped)
        });

        if extraction.is_none() || done.is_err() {
            session.answer(done.is_ok())?;
        }
        let (since, network, came) = done?;
        fault::point("dump.frozen")?;
        (self.tell)(DumpEvent::Frozen { since, network, came });
        if let Some(extraction) = extraction {
            self.extract(session, *extraction)?;
        }

        self.vouching = self.plan.vouched.then(|| vouch(&self.plan.cgroup)).transpose()?;
        fault::point("dump.fenced")
    }

    /// Takes the connections out of the tasks, and lets CRIU go on.
    fn extract(&mut self, session: &CriuSession, extraction: Extraction) -> Result<()> {
        let plan = &*self.plan;
        let peer = plan.peer.clone();
        let write = move |at, bytes: &[u8]| {
            peer.file(crate::connections::STREAM, at, bytes)?;
            peer.flush()
        };
        let extracted = extraction.extract(&plan.cgroup, write, (&plan.orders, &plan.watch));
        let hidden = match &extracted {
            Ok(_) => hide(plan, session, self.hiding.as_deref_mut()),
            Err(_) => Ok(()),
        };

        let answered = session.answer(extracted.is_ok() && hidden.is_ok());
        *plan.extracted.lock().unwrap_or_else(PoisonError::into_inner) = Some(extracted?);
        hidden.and(answered)?;
        (self.tell)(DumpEvent::Extracted);
        Ok(())
    }

    /// The images are written: completes them, and waits for the verdict.
    fn dumped(&mut self, session: &CriuSession) -> Result<()> {
        // CRIU has thawed the group once every task was seized. From here on they stand
        // still even if CRIU is killed.
        self.plan.cgroup.tell_freeze()?;
        let seen = self.vouching.take().map_or(Ok(()), |vouching| {
            vouching.join().unwrap_or_else(|_| Err(anyhow!("the thread has died")))
        });

        let (hidden, images) = (self.hiding.as_deref_mut(), &self.plan.images);
        let add = |()| hidden.map(|hidden| hidden.add(images)).transpose();
        let added = match seen.and_then(add) {
            Ok(added) => added,
            Err(e) => {
                self.wrong = Some(e);
                return session.answer(false);
            }
        };

        fault::point("dump.dumped")?;
        tell_dumped(added, self.tell);
        let agreed = matches!(self.orders.recv(), Ok(DumpOrder::Verdict(true)));
        session.answer(agreed)
    }
}

/// A task of the container, which stands still or runs on: its number here, and its name.
fn name(pid: i32) -> Option<String> {
    let name = process::proc_text(pid, "comm").ok()?;
    Some(format!("process {pid}, {}", name.trim_end_matches('\n').escape_debug()))
}

/// Writes what CRIU is to see of the tasks' memory, which stand still.
fn hide(plan: &DumpPlan, session: &CriuSession, hiding: Option<&mut Hiding>) -> Result<()> {
    let Some(hiding) = hiding else { return Ok(()) };
    let stacks = |pid| plan.watch.stacks(pid);
    hiding.draw(&plan.cgroup, session.covered, &stacks).context("hiding memory from CRIU")
}

/// The images are complete, and beside what follows it is seen whether they are right.
fn tell_dumped(added: Option<Added>, tell: &TellDump) {
    let hidden = added.as_ref().filter(|added| added.mappings > 0).map(|added| added.pages);
    let unchecked = added.map(|added| added.unchecked).filter(|unchecked| !unchecked.is_empty());
    tell(DumpEvent::Dumped { hidden, unchecked: unchecked.is_some() });
    if let Some(unchecked) = unchecked {
        let told = tell.clone();
        let look = move || told(DumpEvent::Checked(unchecked.verdict()));
        if let Err(e) = std::thread::Builder::new().name("checked".into()).spawn(look) {
            tell(DumpEvent::Checked(Err(e.into())));
        }
    }
}

/// Sees, beside CRIU's work, whether it is true what CRIU was told.
fn vouch(cgroup: &Cgroup) -> Result<JoinHandle<Result<()>>> {
    let pids = cgroup.processes()?;
    let look = move || {
        epoll::vouch(&pids).advise(
            "CRIU has been told that the container's epolls are as they were",
            "try again; it will look for itself then",
        )
    };
    Ok(std::thread::Builder::new().name("vouch".into()).spawn(look)?)
}

/// The beginning of the freeze; the network; and what came to it.
type StoppedContainer = (Instant, Option<Box<(ArmedFence, Capture)>>, Came);

/// Stops the container, then its network: what came in before the fence has closed is in the
/// sockets' queues. That of TCP is acknowledged, and goes along with them; that of UDP is read out.
fn stop(plan: &mut DumpPlan) -> Result<StoppedContainer> {
    if let (Some(network), Some(sock_diag)) = (plan.network.as_deref_mut(), &mut plan.sock_diag) {
        await_quiet(&mut network.0, &mut network.1, sock_diag)?;
    }
    let since = Instant::now();
    plan.watch.note(freeze(&plan.cgroup)?);
    let mut network = plan.network.take();
    let mut came = Came::default();
    if let Some((fence, capture)) = network.as_deref_mut() {
        plan.sock_diag.as_mut().map_or(Ok(()), await_last)?;
        capture.start()?;
        fence.close(FenceSide::Both)?;
        if let Some(sock_diag) = &mut plan.sock_diag {
            came = Came::until_now(capture, sock_diag, &plan.homes, &plan.cgroup)?;
        }
    }
    Ok((since, network, came))
}

impl DumpPlan {
    /// Does something where CRIU runs.
    fn in_namespace<T: Send>(&self, f: impl FnOnce() -> T + Send) -> std::io::Result<T> {
        match &self.namespace {
            Some(namespace) => namespace.run(f),
            None => Ok(f()),
        }
    }
}

/// Makes runc's request ours; returns the port of the page server that nobody needs.
fn edit(request: &mut Criu_req, plan: &DumpPlan, images: i32, work: i32) -> Result<u16> {
    // Free a moment ago is free enough: nothing depends on this server.
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr();
    let port = plan.in_namespace(bind)??.port();
    let opts = request.opts.as_mut().ok_or_else(|| anyhow!("a dump without options"))?;
    opts.set_images_dir_fd(images);
    opts.set_work_dir_fd(work);

    // A configuration file overrides what is set here: ours instead of any that the host has. It
    // keeps the page server, which no option of the request binds to an address, off the network.
    let configuration = plan.work.configuration();
    fs::write(&configuration, "address 127.0.0.1\n")?;
    let path = configuration.to_str().ok_or_else(|| anyhow!("a path that is not UTF-8"))?;
    opts.set_config_file(path.to_owned());
    opts.set_notify_scripts(true);
    opts.set_leave_running(true);
    opts.set_lazy_pages(true);

    opts.set_tcp_established(true);
    opts.set_file_locks(true);
    opts.set_ghost_limit(MAX_NAMELESS);
    opts.set_link_remap(true);
    opts.set_ext_unix_sk(true);
    opts.set_log_level(failure::log_level());
    opts.network_lock = Some(Criu_network_lock_method::SKIP.into());

    let (Cgroup::V2(path) | Cgroup::V1(path)) = &plan.cgroup;
    let path = path.to_str().ok_or_else(|| anyhow!("a control group that is not UTF-8"))?;
    opts.set_freeze_cgroup(path.to_owned());
    let mut server = Criu_page_server_info::new();
    server.set_port(i32::from(port));
    opts.ps = MessageField::some(server);
    opts.external.extend(plan.external.iter().cloned());
    opts.irmap_scan_paths.extend(plan.watched.iter().cloned());
    opts.ext_mnt.extend(plan.tmpfs.iter().map(|place| external_mount(place, place)));

    Ok(port)
}

/// `key` is a mount point on the source and what it is called on the destination.
pub fn external_mount(key: &str, value: &str) -> Ext_mount_map {
    let mut map = Ext_mount_map::new();
    map.set_key(key.to_owned());
    map.set_val(value.to_owned());
    map
}

/// Freezes the control group so that CRIU can seize every task, and notes what they need to go on.
///
/// A task whose child has not yet come out of a vfork(2) sleeps uninterruptibly, counts as frozen,
/// and cannot be seized: it is given a moment and tried again.
fn freeze(cgroup: &Cgroup) -> Result<Option<TaskSnapshot>> {
    let mut attempt = 1;
    let seen = loop {
        let seen = waits::look(&cgroup.processes()?);
        cgroup.freeze(FREEZE_TIMEOUT)?;
        let stuck = match cgroup {
            Cgroup::V2(_) => cgroup.processes()?.into_iter().find(|pid| sleeps_deeply(*pid)),
            // There nobody can be stopped who is frozen.
            Cgroup::V1(_) => return Ok(None),
        };
        let Some(pid) = stuck else { break seen };
        cgroup.thaw()?;
        if attempt == FREEZE_TRIES {
            bail!("process {pid} sleeps uninterruptibly and cannot be checkpointed");
        }
        attempt += 1;
        std::thread::yield_now();
    };
    let began = Instant::now();
    let noted = TaskSnapshot::take(cgroup, &seen);
    tracing::debug!("noting the tasks took {} us", began.elapsed().as_micros());
    // Without it a CRIU that is killed can end the container; that alone is no reason to stay.
    Ok(noted.map_err(|e| tracing::debug!("the tasks cannot be noted: {e:#}")).ok())
}

fn sleeps_deeply(pid: i32) -> bool {
    process::proc_text(pid, "stat").is_ok_and(|s| {
        s.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('D'))
    })
}
