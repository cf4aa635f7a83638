//! What the source can know of a container before anything is touched: the plan, and every
//! obstacle that shows here.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::destination_checks::{room_for_images, room_for_notes};
use super::host;
use super::layers::Layered;
use super::source_files::{self, Roots};
use super::source_network::{self, OwnNetwork};
use super::standard::{self, Standard};
use crate::criu::hidden;
use crate::engine::handover::Handover;
use crate::engine::lookup::FoundName;
use crate::engine::owner::{Facts, owner};
use crate::engine::papers::{EngineCourse, EngineWants};
use crate::files::probe;
use crate::files::tmpfs::{self, Tmpfs};
use crate::files::walk::Size;
use crate::memory::pages;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::holder;
use crate::migration::network::container::ContainerNetwork;
use crate::migration::options::MigrateOptions;
use crate::migration::protocol::{How, Plan};
use crate::migration::transfer::file_sender::FilesToCopy;
use crate::network::{self, Placement};
use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::{Runtime, RuntimeState};
use crate::problem::{Problem, Problems};
use crate::sys::mntns;
use crate::sys::process::proc_text;
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
    pub network: OwnNetwork,
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
    /// What becomes of its engine's image and networks, once the destination has said so.
    pub engine: EngineCourse,
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
            for network in wanted.networks.iter_mut().filter(|_| wishes.no_networks) {
                network.definition = Err("none is made: --network-create never".into());
            }
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
    let found = source_network::look(&bundle, state.pid, &cgroup, wishes, engine.as_mut())?;
    if let Placement::Hook(program) = &wishes.placement {
        network::hook::usable(program)?;
    }

    let files = source_files::look(state.pid, &bundle, wishes, engine.as_ref())?;
    probes.extend(files.probes);

    let tmpfs = tmpfs_of(runtime, state.pid, &bundle)?;
    let resident = resident_bytes(&cgroup)?;
    let imaged = imaged::bytes(&cgroup.processes()?);
    let hides = host::criu().is_ok_and(|(_, version)| hidden::was_tried(version))
        && mntns::has_own(state.pid);
    tracing::debug!(
        ?cgroup,
        mib = resident >> 20,
        tmpfs = tmpfs.len(),
        probes = files.listed.len(),
        network = ?found.own.as_ref().map(|own| &own.1),
        "process {} of {} can go along",
        state.pid,
        wishes.container,
    );

    let plan = Plan {
        migration: probe::random_name()?,
        check_only: wishes.check_only,
        container: wishes.container.clone(),
        source: crate::sys::host::name(),
        bundle: wishes.bundle.clone().unwrap_or_else(|| state.bundle.clone()),
        config: bundle.config.clone(),
        root: wishes.root.clone(),
        systemd_cgroup: wishes.systemd_cgroup || preflight::limits::by_systemd(&cgroup, &bundle),
        bound_cpus: settings::bound_cpus(&settings::look(state.pid, &cgroup.processes()?)?),
        apparmor: preflight::tasks::apparmor_profiles(&cgroup.processes()?),
        streams,
        console_socket: wishes.console_socket.clone(),
        // What the tasks may still come to use while they are being copied.
        memory_bytes: resident * 2 + (256 << 20),
        imaged_bytes: imaged.all,
        shared_bytes: if hides { imaged.ahead } else { 0 },
        resident_bytes: resident,
        cpu: host::cpu_flags(),
        machine: host::machine(),
        kernel: host::kernel(),
        criu: host::criu().map_or(0, |c| c.1),
        probes: files.listed,
        parents: source_files::parents(&bundle, &files.layered, wishes)?,
        overlay: match engine {
            None => files.layered.over_there(&bundle.path, wishes.bundle.as_deref()),
            Some(_) => None,
        },
        tmpfs,
        network: found.own.as_ref().map(|own| own.2.clone()),
        floating: found.floating,
        loopback: found.loopback,
        network_path: found.own.as_ref().and_then(|_| bundle.namespace("network").flatten()),
        placement: match engine {
            None => wishes.placement.clone(),
            // It makes the network.
            Some(_) => Placement::Keep,
        },
        verify: wishes.verify,
        forward: found.forward,
        engine,
    };

    if let Some(problem) = room_for_images(&plan, host::memory_available().unwrap_or(u64::MAX)) {
        return Err(problem.into());
    }

    Ok(SourceContainer {
        state,
        bundle,
        cgroup,
        network: found.own,
        plan,
        probes,
        found: Some(files.roots),
        logs,
        layered: files.layered,
        load: None,
        copies: Vec::new(),
        engine: EngineCourse::default(),
        sizes: Vec::new(),
        forward: None,
        warnings: found.warnings,
    })
}

/// Its tmpfs, and what is in them.
fn tmpfs_of(runtime: &Runtime, init: i32, bundle: &Bundle) -> Result<Vec<Tmpfs>> {
    let bound: Vec<PathBuf> = bundle.bind_mounts().into_iter().map(|m| m.destination).collect();

    // Others may not tell CRIU of these binds.
    let runc = runtime.program().file_name().is_some_and(|name| name == "runc");
    let masked = if runc { bundle.masked_paths() } else { Vec::new() };
    let mut found = tmpfs::find(&proc_text(init, "mountinfo")?, &bound, &masked);
    tmpfs::measure(Path::new(&format!("/proc/{init}/root")), &mut found)?;
    Ok(found)
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
