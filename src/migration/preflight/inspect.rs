//! What the source can know of a container before anything is touched: the plan, and every
//! obstacle that shows here.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::checks::{room_for_images, room_for_notes};
use super::host;
use super::layers::{self, Layered};
use super::standard::{self, Standard};
use crate::engine::lookup::Found;
use crate::engine::owner::{Facts, owner};
use crate::engine::property;
use crate::files::place::{self, Parent};
use crate::files::root::Root;
use crate::files::walk::Size;
use crate::files::{probe, tmpfs};
use crate::memory::pages;
use crate::migration::forwarding as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::holder;
use crate::migration::network::floating;
use crate::migration::options::Wishes;
use crate::migration::protocol::forwarding::Plans;
use crate::migration::protocol::{How, MAX_PARENTS, Place, Plan, Probe};
use crate::migration::transfer::haul::Load;
use crate::network::image::Kind;
use crate::network::{self, NetworkImage, Placement};
use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::{Runtime, State};
use crate::problem::Problem;
use crate::sys::mntns;
use crate::sys::netns::NetNs;
use crate::sys::process::{self, proc_text};
use crate::tasks::losses::Scene;
use crate::tasks::{descriptors, imaged, locks, losses as preflight, settings};

/// A container that could go, looked at from all sides.
pub struct Subject {
    /// What the runtime says.
    pub state: State,
    /// Its bundle.
    pub bundle: Bundle,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Its network, where it has one of its own.
    pub network: Option<(NetNs, PathBuf, NetworkImage)>,
    /// For the destination.
    pub plan: Plan,
    /// Keeps the probe files until the destination has looked.
    pub probes: Vec<probe::Probe>,
    /// What the plan's probes are of, until it is known what is copied: what is held so cannot be
    /// unmounted.
    pub found: Option<Roots>,
    /// Its logs outside of it, by the number of their stream.
    pub logs: Vec<Option<File>>,
    /// Its root file system, where that is an overlay.
    pub layered: Layered,
    /// What has to be copied, once the destination has said so.
    pub load: Option<Load>,
    /// Which of the plan's probes are copied, once the destination has said so.
    pub copies: Vec<usize>,
    /// What they hold.
    pub sizes: Vec<(usize, Size)>,
    /// What becomes of the address, once the destination has said so.
    pub forward: Option<crate::migration::journal::part::Note>,
    /// What will not be over there as it is here.
    pub warnings: Vec<Problem>,
}

/// What the container has of this host's files.
pub struct Roots {
    /// By the number of its probe.
    pub list: Vec<Root>,
    /// The root of the container's mounts.
    pub inside: OwnedFd,
}

/// Looks at a container.
///
/// # Errors
/// Every obstacle found; nothing was touched.
pub fn inspect(runtime: &Runtime, wishes: &Wishes) -> Result<Subject, Vec<Problem>> {
    let one = |problem: Problem| vec![problem];
    let mut problems: Vec<Problem> = host::problems().into_iter().filter(|p| p.fatal).collect();
    if !problems.is_empty() {
        return Err(problems);
    }
    let id = &wishes.container;
    let state = runtime.state(id).map_err(|e| {
        one(Problem::new(format!("cannot ask for the state of {id}"), format!("{e:#}")))
    })?;
    if let Some(problem) = held(runtime, wishes, state.as_ref()) {
        return Err(one(problem));
    }
    let Some(state) = state else {
        if let Some(problem) = migrated_away(runtime, wishes) {
            return Err(one(problem));
        }
        return Err(one(unknown(runtime, id)));
    };
    if let Some(owned) = owner(&Facts::of(&state, runtime.root())) {
        return Err(one(owned.refusal(id)));
    }
    match state.status.as_str() {
        "running" => {}
        "paused" => problems.push(
            Problem::new(format!("{id} is paused"), "CRIU cannot seize paused tasks")
                .hint(format!("`runc resume {id}` first")),
        ),
        other => problems.push(
            Problem::new(format!("{id} is {other}"), "only a running container can be carried")
                .hint("start it, or create it on the other host: there is no state to keep"),
        ),
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // A task without a group of its own is told of below.
    let tasks = Cgroup::of_process(state.pid).and_then(|cgroup| cgroup.processes());
    let tasks = tasks.unwrap_or_default();
    problems.extend(room_for_notes(&crate::sys::host::name()));
    problems.extend(descriptors::problems(&tasks));
    problems.extend(locks::problems(&tasks));
    let (scene, bundle) = (Scene { init: state.pid, tasks: &tasks }, Bundle::load(&state.bundle));
    let found = preflight::problems(scene, bundle.ok().as_ref());
    let (found, mut warnings): (Vec<_>, Vec<_>) = found.into_iter().partition(|p| p.fatal);
    warnings.extend(preflight::tasks::session_keys(&wishes.container));
    problems.extend(found);
    match look(runtime, wishes, state) {
        Ok(subject) if problems.is_empty() => return Ok(Subject { warnings, ..subject }),
        Ok(_) => {}
        Err(e) => problems.push(match e.downcast::<Problem>() {
            Ok(problem) => problem,
            Err(e) => Problem::new(format!("cannot look at {id}"), format!("{e:#}")),
        }),
    }
    Err(problems)
}

/// A migration that holds it already. One that runs may have come by a migration which has its last
/// words still to say.
fn held(runtime: &Runtime, wishes: &Wishes, state: Option<&State>) -> Option<Problem> {
    let (state_dir, id) = (wishes.state_dir.as_deref()?, &wishes.container);
    match state.map(|state| state.status.as_str()) {
        Some("running") => holder::leaves(state_dir, runtime.root(), id),
        _ => holder::in_the_way(state_dir, runtime.root(), id),
    }
}

/// A container that the runtime does not know: an engine may, by that name.
fn unknown(runtime: &Runtime, id: &str) -> Problem {
    let found = Found::of(id);
    if let Some(problem) = found.refusal(id) {
        return problem;
    }
    let mut why =
        format!("{} knows none in {}", runtime.program().display(), runtime.root().display());
    why.extend(found.silent().map(|silent| format!("; {silent}")));
    Problem::new(format!("there is no container {id} here"), why)
        .hint("see `runc list`; what was started with another --root is found with that")
}

/// Whoever asks for a container that has left wants to know where it is.
fn migrated_away(runtime: &Runtime, wishes: &Wishes) -> Option<Problem> {
    let state_dir = wishes.state_dir.as_deref()?;
    let mark = AwayMark::find(state_dir, runtime.root(), wishes.container.as_ref()).ok()??;
    Some(
        Problem::new(
            format!("{} is not here any more", mark.id),
            format!(
                "it was migrated to {} at {} (migration {})",
                mark.destination, mark.migrated_at, mark.migration_id
            ),
        )
        .hint(format!("move it on from there: `ferry migrate` on {}", mark.destination)),
    )
}

fn look(runtime: &Runtime, wishes: &Wishes, state: State) -> Result<Subject> {
    let bundle = Bundle::load(&state.bundle).map_err(|e| {
        Problem::new("the container's bundle is missing", format!("{e:#}"))
            .hint("restore needs config.json where it was when the container was created")
    })?;
    let cgroup = Cgroup::of_process(state.pid).map_err(|e| {
        Problem::new("the container cannot be frozen", format!("{e:#}"))
            .hint("give it a control group of its own (cgroupsPath in config.json)")
    })?;
    terminal(&bundle, wishes)?;
    let Standard { streams, mut probes, logs } =
        standard::look(state.pid, &cgroup.processes().unwrap_or_default())?;
    let floating = floating::look(&bundle, state.pid, &cgroup, wishes)?;
    let (network, loopback) = match floating {
        Some(_) => (None, None),
        None => network(&bundle, state.pid)?,
    };
    let away = network.as_ref().and_then(|n| forward::away_of(&n.0));
    let ties = |n: &(NetNs, PathBuf, NetworkImage)| forward::translated(&n.0, &n.2, away.as_ref());
    let translated = network.as_ref().map(ties).unwrap_or_default();
    let from = away.map(|a| (a.id, a.home));
    let forward = Plans { wish: wishes.forward, from, translated };
    if let Ok(Placement::Hook(program)) = wishes.placement.parse() {
        network::hook::usable(&program)?;
    }
    let destination = wishes.bundle.clone().unwrap_or_else(|| state.bundle.clone());
    let (mut listed, mut roots) = (Vec::new(), Vec::new());
    let inside = mntns::root_of(state.pid).context("cannot look at the container's mounts")?;
    let mut add = |what: String, place: Place, path: &Path, wish: How, read_only: bool| {
        let opened = Root::open(path);
        let opened = opened.with_context(|| format!("cannot look at {}", path.display()))?;
        // A single file that was replaced matters only if it is to be copied.
        if let Some(problem) = replaced(&inside, &what, &place, &opened)
            && opened.is_dir()
        {
            return Err(problem.into());
        }
        let probe = probe::make_at(&opened, read_only)?;
        let (proof, directory, file) = (probe.proof.clone(), opened.is_dir(), opened.is_file());
        probes.push(probe);
        roots.push(opened);
        let probe = Probe { what, place, proof: proof.clone(), wish, directory, file, read_only };
        listed.push(probe);
        anyhow::Ok(proof)
    };
    let (root, fixed) = (bundle.rootfs()?, bundle.rootfs_read_only());
    if wishes.rootfs != How::Shared {
        let problem = property::store_problem("root file system", &root, "--rootfs shared");
        problem.map_or(Ok(()), Err)?;
    }
    let proof = add("root file system".into(), Place::Rootfs, &root, wishes.rootfs, fixed)?;
    let layered = layers::look(&root, &proof)?;
    let mounts = bundle.bind_mounts();
    if let Some((place, _)) =
        wishes.volumes.iter().find(|(place, _)| mounts.iter().all(|m| m.destination != *place))
    {
        let known: Vec<_> = mounts.iter().map(|m| m.destination.display().to_string()).collect();
        return Err(Problem::new(
            format!("nothing is bound to {} in the container", place.display()),
            match known.is_empty() {
                true => "config.json has no bind mounts".to_owned(),
                false => format!("its bind mounts are {}", known.join(", ")),
            },
        )
        .hint("--volume wants the place in the container, as in config.json's mounts")
        .into());
    }
    for mount in mounts {
        let what = format!("bind mount {}", mount.destination.display());
        let wish = wishes.volumes.iter().find(|(place, _)| *place == mount.destination);
        let wish = wish.map_or(How::Auto, |w| w.1);
        if wish == How::Copy {
            let option = format!("--volume {}=shared", mount.destination.display());
            property::store_problem(&what, &mount.source, &option).map_or(Ok(()), Err)?;
        }
        let place = Place::Mount(mount.destination);
        add(what, place, &mount.source, wish, mount.read_only)?;
    }
    let mountinfo = proc_text(state.pid, "mountinfo")?;
    let bound: Vec<PathBuf> = bundle.bind_mounts().into_iter().map(|m| m.destination).collect();
    let mut tmpfs = tmpfs::find(&mountinfo, &bound);
    tmpfs::measure(Path::new(&format!("/proc/{}/root", state.pid)), &mut tmpfs)?;
    let resident = resident_bytes(&cgroup)?;
    let imaged_bytes = imaged::bytes(&cgroup.processes()?);
    tracing::debug!(
        ?cgroup,
        mib = resident >> 20,
        tmpfs = tmpfs.len(),
        probes = listed.len(),
        network = ?network.as_ref().map(|n| &n.1),
        "process {} of {} can go along",
        state.pid,
        wishes.container,
    );
    let plan = Plan {
        migration: probe::random_name()?,
        check_only: wishes.check_only,
        container: wishes.container.clone(),
        source: crate::sys::host::name(),
        bundle: destination,
        config: bundle.config.clone(),
        root: wishes.root.clone(),
        systemd_cgroup: wishes.systemd_cgroup || preflight::limits::by_systemd(&cgroup, &bundle),
        bound_cpus: settings::bound_cpus(&settings::look(state.pid, &cgroup.processes()?)?),
        apparmor: preflight::tasks::apparmor_profiles(&cgroup.processes()?),
        streams,
        console_socket: wishes.console_socket.clone(),
        // What the tasks may still come to use while they are being copied.
        memory_bytes: resident * 2 + (256 << 20),
        imaged_bytes,
        resident_bytes: resident,
        cpu: host::cpu_flags(),
        machine: host::machine(),
        kernel: host::kernel(),
        criu: host::criu().map_or(0, |c| c.1),
        probes: listed,
        parents: parents(&bundle, &root, &layered, wishes),
        overlay: layered.over_there(&bundle.path, wishes.bundle.as_deref()),
        tmpfs,
        network: network.as_ref().map(|n| n.2.clone()),
        floating,
        loopback,
        network_path: network.as_ref().and_then(|_| bundle.namespace("network").flatten()),
        placement: wishes.placement.clone(),
        verify: wishes.verify,
        forward,
    };
    if let Some(problem) = room_for_images(&plan, host::memory_available().unwrap_or(u64::MAX)) {
        return Err(problem.into());
    }
    let _ = runtime;
    Ok(Subject {
        state,
        bundle,
        cgroup,
        network,
        plan,
        probes,
        found: Some(Roots { list: roots, inside }),
        logs,
        layered,
        load: None,
        copies: Vec::new(),
        sizes: Vec::new(),
        forward: None,
        warnings: Vec::new(),
    })
}

/// Whether the container has something else at a place than what its configuration leads to: it may
/// have put a symbolic link there that leads out of it. `inside` is the root of its mounts.
pub fn replaced(inside: &OwnedFd, what: &str, place: &Place, found: &Root) -> Option<Problem> {
    let place = match place {
        Place::Rootfs => Path::new("/"),
        Place::Mount(place) => place,
    };
    let has = probe::inode_in(&process::path_of(inside), place);
    (has != Some(found.inode())).then(|| {
        Problem::new(
            format!("the {what} is not what is at {}", found.place().display()),
            "that was replaced since the container was started: it still has what was there before",
        )
        .hint("start the container anew; and do not replace what is bound into a container")
    })
}

/// The directories above everything that may be copied, at their places on the destination.
fn parents(bundle: &Bundle, root: &Path, layered: &Layered, wishes: &Wishes) -> Vec<Parent> {
    let there = wishes.bundle.as_deref().unwrap_or(&bundle.path);
    let moved = |path: &Path| match path.strip_prefix(&bundle.path) {
        Ok(below) => there.join(below),
        Err(_) => path.to_owned(),
    };
    let mut places = vec![bundle.path.clone(), root.to_owned()];
    places.extend(bundle.bind_mounts().into_iter().map(|mount| mount.source));
    if let Some(upper) = layered.overlay().and_then(|overlay| overlay.upper.as_ref()) {
        places.extend([upper.path.clone(), upper.work.clone()]);
    }
    let mut list: Vec<Parent> = Vec::new();
    for parent in places.iter().flat_map(|path| place::parents(path, moved)) {
        if list.len() < MAX_PARENTS && list.iter().all(|known| known.path != parent.path) {
            list.push(parent);
        }
    }
    list
}

/// Private anonymous memory of all tasks, in bytes.
fn resident_bytes(cgroup: &Cgroup) -> Result<u64> {
    let tasks = pages::tasks(&cgroup.processes()?)?;
    let mut total = 0;
    for task in tasks {
        total += pages::populated(task.pid)
            .map(|list| list.iter().map(|r| r.end - r.start).sum())
            .unwrap_or(0);
    }
    Ok(total)
}

/// A terminal has to be taken by somebody.
fn terminal(bundle: &Bundle, wishes: &Wishes) -> Result<()> {
    if bundle.terminal() && wishes.console_socket.is_none() {
        return Err(Problem::new(
            "the container has a terminal, and nobody takes it on the other host",
            "process.terminal is set in config.json",
        )
        .hint("name a socket over there with --console-socket PATH, as for `runc run`")
        .into());
    }
    Ok(())
}

type Network = Option<(NetNs, PathBuf, NetworkImage)>;

/// The container's network, where it has one of its own that Ferry can carry; or what the runtime
/// has given it, where that is nothing but a loopback device.
fn network(bundle: &Bundle, pid: i32) -> Result<(Network, Option<NetworkImage>)> {
    match bundle.namespace("network") {
        Some(Some(path)) => {
            property::namespace_problem(&path).map_or(Ok(()), Err)?;
            let namespace = NetNs::open(&path).map_err(|e| {
                Problem::new(format!("cannot open the network namespace {}", path.display()), e)
            })?;
            let real = NetNs::of_pid(pid as u32)?;
            if real.identity()? != namespace.identity()? {
                return Err(Problem::new(
                    format!("{} is not the container's network namespace", path.display()),
                    "it was replaced since the container was started",
                )
                .into());
            }
            let links = forward::away_of(&namespace).map(|a| a.links).unwrap_or_default();
            let image =
                network::capture_forwarded(&namespace, &NetNs::current()?, Some(&path), &links)?;
            Ok((Some((namespace, path, image)), None))
        }
        Some(None) => {
            let own = NetNs::of_pid(pid as u32)?;
            let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
            let image = network::capture_at(&own, &NetNs::current()?, Some(&path))?;
            if image.outward().next().is_none() {
                return Ok((None, Some(image)));
            }
            // CRIU makes such a namespace anew, and empty, unless it is in one that is full.
            if !image.links.iter().any(|l| l.kind == Kind::Loopback && l.up) {
                return Err(Problem::new(
                    "the container's network namespace has no name, and its loopback is down",
                    "CRIU cannot be started in it, and would make an empty one",
                )
                .hint(format!("`nsenter --net={} ip link set lo up`", path.display()))
                .into());
            }
            Ok((Some((own, path, image)), None))
        }
        // The host's.
        None => Ok((None, None)),
    }
}
