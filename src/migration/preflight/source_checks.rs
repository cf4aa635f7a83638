//! What the source can know of a container before anything is touched: the plan, and every
//! obstacle that shows here.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::destination_checks::{room_for_images, room_for_notes};
use super::host;
use super::layers::{self, Layered};
use super::standard::{self, Standard};
use crate::engine::handover::Handover;
use crate::engine::image::ImageCourse;
use crate::engine::lookup::FoundName;
use crate::engine::owner::{Facts, owner};
use crate::engine::papers::EngineWants;
use crate::engine::property;
use crate::files::place::{self, Parent};
use crate::files::root::Root;
use crate::files::walk::Size;
use crate::files::{probe, tmpfs};
use crate::memory::pages;
use crate::migration::forwarding as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::holder;
use crate::migration::network::container::ContainerNetwork;
use crate::migration::network::floating_address;
use crate::migration::options::MigrateOptions;
use crate::migration::protocol::forwarding::{ForwardOption, ForwardRequest};
use crate::migration::protocol::{How, MAX_PARENTS, Place, Plan, Probe};
use crate::migration::transfer::file_sender::FilesToCopy;
use crate::network::image::LinkKind;
use crate::network::{self, NetworkImage, Placement};
use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::{Runtime, RuntimeState};
use crate::problem::{Problem, Problems};
use crate::sys::mntns;
use crate::sys::netns::NetNs;
use crate::sys::process::{self, proc_text};
use crate::tasks::losses::Scene;
use crate::tasks::{imaged, locks, losses as preflight, settings, unsupported};

/// A container that could go, looked at from all sides.
pub struct SourceContainer {
    /// What the runtime says.
    pub state: RuntimeState,
    /// Its bundle.
    pub bundle: Bundle,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Its network, where it has one of its own.
    pub network: Option<(NetNs, PathBuf, NetworkImage)>,
    /// For the destination.
    pub plan: Plan,
    /// Keeps the probe files until the destination has looked.
    pub probes: Vec<probe::ProbeFile>,
    /// What the plan's probes are of, until it is known what is copied: what is held so cannot be
    /// unmounted.
    pub found: Option<Roots>,
    /// Its logs outside of it, by the number of their stream.
    pub logs: Vec<Option<File>>,
    /// Its root file system, where that is an overlay.
    pub layered: Layered,
    /// What has to be copied, once the destination has said so.
    pub load: Option<FilesToCopy>,
    /// Which of the plan's probes are copied, once the destination has said so.
    pub copies: Vec<usize>,
    /// What they hold.
    pub sizes: Vec<(usize, Size)>,
    /// What becomes of its engine's image, once the destination has said so.
    pub image: ImageCourse,
    /// What becomes of the address, once the destination has said so.
    pub forward: Option<crate::migration::journal::forward_role::ForwardRecord>,
    /// What will not be over there as it is here.
    pub warnings: Vec<Problem>,
}

impl SourceContainer {
    /// Its network, whichever kind it is of.
    pub fn container_network(&self) -> ContainerNetwork<'_> {
        match (&self.network, &self.plan.floating) {
            (Some((namespace, _, image)), _) => ContainerNetwork::Own { namespace, image },
            (None, Some(all)) => ContainerNetwork::Hosts(all),
            (None, None) => ContainerNetwork::Nothing,
        }
    }
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
pub fn inspect(
    runtime: &Runtime,
    wishes: &MigrateOptions,
) -> Result<SourceContainer, Vec<Problem>> {
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

    let owned = owner(&Facts::of(&state, runtime.root()));
    let engine = match &owned {
        None => None,
        Some(owned) => match owned.handover() {
            Some(engine) => Some(engine),
            None => return Err(one(owned.refusal(id))),
        },
    };

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
    let state_dir = wishes.state_dir.as_deref().unwrap_or(Path::new("/var/lib"));
    problems.extend(room_for_notes(&crate::sys::host::name(), state_dir));
    problems.extend(unsupported::problems(&tasks));
    problems.extend(locks::problems(&tasks));

    let (scene, bundle) = (Scene { init: state.pid, tasks: &tasks }, Bundle::load(&state.bundle));
    let found = preflight::problems(scene, bundle.as_ref().ok());
    let (found, mut warnings): (Vec<_>, Vec<_>) = found.into_iter().partition(|p| p.fatal);
    warnings.extend(preflight::tasks::session_keys(&wishes.container));
    problems.extend(found);
    let wanted = match (engine, bundle) {
        (Some(engine), Ok(bundle)) => match wanted(engine, wishes, &bundle) {
            Ok(wanted) => Some(wanted),
            Err(found) => {
                problems.extend(found);
                return Err(problems);
            }
        },
        _ => None,
    };

    match look(runtime, wishes, state, wanted) {
        Ok(mut subject) if problems.is_empty() => {
            subject.warnings.extend(warnings);
            return Ok(subject);
        }
        Ok(_) => {}
        Err(e) => match e.downcast::<Problems>() {
            Ok(Problems(found)) => problems.extend(found),
            Err(e) => problems.push(match e.downcast::<Problem>() {
                Ok(problem) => problem,
                Err(e) => Problem::new(format!("cannot look at {id}"), format!("{e:#}")),
            }),
        },
    }

    Err(problems)
}

/// Returns what an engine's container needs of the engine on the other host.
fn wanted(
    engine: &dyn Handover,
    wishes: &MigrateOptions,
    bundle: &Bundle,
) -> Result<EngineWants, Vec<Problem>> {
    let mut problems = Vec::new();
    for (given, option) in [
        (wishes.bundle.is_some(), "--bundle"),
        (wishes.placement != Placement::Auto, "--network"),
        (wishes.rootfs != How::Auto, "--rootfs"),
        (wishes.console_socket.is_some(), "--console-socket"),
        (wishes.root.is_some() && engine.root(&wishes.container).is_none(), "--root"),
    ] {
        if given {
            let why = "the engine on the other host sees to that";
            let problem = Problem::new(format!("{option} is not for an engine's container"), why);
            problems.push(problem.hint("leave it out"));
        }
    }

    match engine.wanted(&wishes.container, &bundle.config) {
        Ok(mut wanted) if problems.is_empty() => {
            wanted.image.never |= wishes.no_image;
            return Ok(wanted);
        }
        Ok(_) => {}
        Err(found) => problems.extend(found),
    }

    Err(problems)
}

/// A migration that holds it already. One that runs may have come by a migration which has its last
/// words still to say.
fn held(
    runtime: &Runtime,
    wishes: &MigrateOptions,
    state: Option<&RuntimeState>,
) -> Option<Problem> {
    let (state_dir, id) = (wishes.state_dir.as_deref()?, &wishes.container);
    match state.map(|state| state.status.as_str()) {
        Some("running") => holder::leaves(state_dir, runtime.root(), id),
        _ => holder::in_the_way(state_dir, runtime.root(), id),
    }
}

/// A container that the runtime does not know: an engine may, by that name.
fn unknown(runtime: &Runtime, id: &str) -> Problem {
    let found = FoundName::of(id);
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
fn migrated_away(runtime: &Runtime, wishes: &MigrateOptions) -> Option<Problem> {
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

fn look(
    runtime: &Runtime,
    wishes: &MigrateOptions,
    state: RuntimeState,
    mut engine: Option<EngineWants>,
) -> Result<SourceContainer> {
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
    let floating = floating_address::look(&bundle, state.pid, &cgroup, wishes)?;
    let (network, loopback) = match floating {
        Some(_) => (None, None),
        None => network(&bundle, state.pid, engine.is_some())?,
    };
    let away = network.as_ref().and_then(|n| forward::away_of(&n.0));

    let ties = |n: &(NetNs, PathBuf, NetworkImage)| forward::translated(&n.0, &n.2, away.as_ref());
    let translated = network.as_ref().map(ties).unwrap_or_default();
    let mut warnings = Vec::new();
    let forwards = wishes.forward != ForwardOption::Never;
    if let (Some(wanted), Some((namespace, _, image))) = (&engine, &network) {
        warnings.extend(forward::published::moves(wanted));
        warnings.extend(forward::published::left_behind(wanted, forwards));
        let mut problems = forward::published::stuck(wanted, forwards, namespace, image)?;
        problems.extend(away.iter().map(forward::published::twice));
        if !problems.is_empty() {
            return Err(Problems(problems).into());
        }
    }

    if let Some(wanted) = engine.as_mut().filter(|_| !forwards) {
        wanted.neighbours.clear();
    }
    let from = away.map(|a| (a.id, a.home));
    let forward = ForwardRequest { wish: wishes.forward, from, translated };
    if let Placement::Hook(program) = &wishes.placement {
        network::hook::usable(program)?;
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
    if wishes.rootfs != How::Shared && engine.is_none() {
        let problem = property::store_problem("root file system", &root, "--rootfs shared");
        problem.map_or(Ok(()), Err)?;
    }

    let layered = match &engine {
        None => {
            let what = "root file system".to_owned();
            layers::look(&root, &add(what, Place::Rootfs, &root, wishes.rootfs, fixed)?)?
        }
        Some(_) => engines_layers(&root)?,
    };

    let mounts = bundle.bind_mounts();
    if let Some((place, _)) =
        wishes.volumes.iter().find(|(place, _)| mounts.iter().all(|m| m.destination != *place))
    {
        let known: Vec<_> = mounts.iter().map(|m| m.destination.display().to_string()).collect();
        return Err(Problem::new(
            format!("nothing is bound to {} in the container", place.display()),
            if known.is_empty() {
                "config.json has no bind mounts".to_owned()
            } else {
                format!("its bind mounts are {}", known.join(", "))
            },
        )
        .hint("--volume wants the place in the container, as in config.json's mounts")
        .into());
    }

    for mount in mounts {
        if engine.iter().any(|e| e.own.contains(&mount.destination)) {
            continue;
        }
        let what = format!("bind mount {}", mount.destination.display());
        let wish = wishes.volumes.iter().find(|(place, _)| *place == mount.destination);

        // Nobody else has a volume there that the engine is asked to make.
        let volume = engine.iter().any(|e| e.volumes.iter().any(|v| v.place == mount.destination));
        let usual = if volume { How::Copy } else { How::Auto };
        let wish = wish.map_or(usual, |w| w.1);
        if wish == How::Copy && !volume {
            let option = format!("--volume {}=shared", mount.destination.display());
            property::store_problem(&what, &mount.source, &option).map_or(Ok(()), Err)?;
        }
        let place = Place::Mount(mount.destination);
        add(what, place, &mount.source, wish, mount.read_only)?;
    }

    let mountinfo = proc_text(state.pid, "mountinfo")?;
    let bound: Vec<PathBuf> = bundle.bind_mounts().into_iter().map(|m| m.destination).collect();

    // Others may not tell CRIU of these binds.
    let runc = runtime.program().file_name().is_some_and(|name| name == "runc");
    let masked = if runc { bundle.masked_paths() } else { Vec::new() };
    let mut tmpfs = tmpfs::find(&mountinfo, &bound, &masked);
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
        overlay: match engine {
            None => layered.over_there(&bundle.path, wishes.bundle.as_deref()),
            Some(_) => None,
        },
        tmpfs,
        network: network.as_ref().map(|n| n.2.clone()),
        floating,
        loopback,
        network_path: network.as_ref().and_then(|_| bundle.namespace("network").flatten()),
        placement: match engine {
            None => wishes.placement.clone(),
            // It makes the network.
            Some(_) => Placement::Keep,
        },
        verify: wishes.verify,
        forward,
        engine,
    };

    if let Some(problem) = room_for_images(&plan, host::memory_available().unwrap_or(u64::MAX)) {
        return Err(problem.into());
    }
    let _ = runtime;

    Ok(SourceContainer {
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
        image: ImageCourse::There,
        sizes: Vec::new(),
        forward: None,
        warnings,
    })
}

/// Tells whether the container has something else at a place than what its configuration leads to: it may
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
fn parents(
    bundle: &Bundle,
    root: &Path,
    layered: &Layered,
    wishes: &MigrateOptions,
) -> Vec<Parent> {
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

/// The root file system of an engine's container: what it has changed of its image goes along.
fn engines_layers(root: &Path) -> Result<Layered> {
    let layered = layers::look_at_engines(root)?;
    if layered.overlay().is_some_and(|overlay| overlay.upper.is_some()) {
        Ok(layered)
    } else {
        let why = layered.only_merged().unwrap_or("it is no overlay with an upper layer");
        let what = "what the container has changed of its image cannot be told";
        let problem = Problem::new(what, why.to_owned());
        Err(problem
            .hint("the engine's storage driver must be overlay, mounted by the kernel")
            .into())
    }
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
fn terminal(bundle: &Bundle, wishes: &MigrateOptions) -> Result<()> {
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

type OwnNetwork = Option<(NetNs, PathBuf, NetworkImage)>;

/// The container's network, where it has one of its own that Ferry can carry; or what the runtime
/// has given it, where that is nothing but a loopback device.
fn network(bundle: &Bundle, pid: i32, engines: bool) -> Result<(OwnNetwork, Option<NetworkImage>)> {
    match bundle.namespace("network") {
        Some(Some(path)) => {
            let problem = property::namespace_problem(&path).filter(|_| !engines);
            problem.map_or(Ok(()), Err)?;
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
            let capture = if engines { network::capture_engines } else { network::capture_at };
            let image = capture(&own, &NetNs::current()?, Some(&path))?;
            if image.outward().next().is_none() {
                return Ok((None, Some(image)));
            }

            // CRIU makes such a namespace anew, and empty, unless it is in one that is full.
            if !image.links.iter().any(|l| l.kind == LinkKind::Loopback && l.up) {
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
