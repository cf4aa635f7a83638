//! The destination's checks: everything that can be known to stop a migration while the container
//! still runs on the source.

use std::path::{Path, PathBuf};

use super::{host, layers};
use crate::engine::handover;
use crate::engine::papers::EngineCourse;
use crate::files::overlay::Overlay;
use crate::files::probe;
use crate::files::walk::Size;
use crate::migration::forwarding as forward;
use crate::migration::journal::away::AwayMark;
use crate::migration::journal::{holder, workdir};
use crate::migration::network::floating_address;
use crate::migration::protocol::forwarding::AddressDecision;
use crate::migration::protocol::{How, MAX_IMAGES, Place, Plan, Probe};
use crate::network::{self, Placement};
use crate::oci::bundle::Bundle;
use crate::oci::migratable;
use crate::oci::runtime::Runtime;
use crate::problem::Problem;
use crate::sys::netns::NetNs;
use crate::sys::{sched, tmpfs};
use crate::tasks::losses::{limits, tasks};
use crate::tasks::settings;

/// Memory that must be left when the container has arrived.
const RESERVE: u64 = 64 << 20;
/// For what CRIU and the runtime say, and for the journal.
const NOTES: u64 = 16 << 20;
/// Images of this size fit wherever Ferry can work at all.
const LITTLE: u64 = 16 << 20;

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Everything that stands in the way on this host, and warnings.
    pub problems: Vec<Problem>,
    /// The probes, by number, of what has to be copied.
    pub copies: Vec<usize>,
    /// What becomes of the address.
    pub course: AddressDecision,
    /// What becomes of an engine's image and networks.
    pub engine: EngineCourse,
}

/// Looks at this host.
pub fn look(plan: &Plan, runtime: &Runtime, state_dir: &Path) -> Findings {
    let mut found = Findings::default();
    // What it has made here is not in the way of anybody else, and not to be deleted by hand.
    if let Some(problem) = holder::in_the_way(state_dir, runtime.root(), &plan.container) {
        found.problems.push(problem);
        return found;
    }
    let host = (runtime, state_dir);
    let courses = (&mut found.course, &mut found.engine);
    found.problems = problems(plan, host, &mut found.copies, courses);
    found
}

fn problems(
    plan: &Plan,
    (runtime, state_dir): (&Runtime, &Path),
    copies: &mut Vec<usize>,
    (course, of_engine): (&mut AddressDecision, &mut EngineCourse),
) -> Vec<Problem> {
    let networked =
        plan.floating.is_some() || plan.network.is_some() && plan.placement != Placement::None;
    // Beside the rest, as both take their time in the kernel.
    let mut found = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| host::receiving_problems(networked));
        let mut found = host::problems();
        found.extend(receiving.join().unwrap_or_default());
        found
    });

    if found.iter().any(|p| p.fatal) {
        return found;
    }
    machine(plan, &mut found);
    found.extend(tasks::missing_profiles(&plan.apparmor));
    found.extend(settings::lacking(&plan.bound_cpus, &sched::online_cpus()));
    found.extend(limits::missing_systemd(plan.systemd_cgroup));
    match runtime.state(&plan.container) {
        Ok(None) => {}
        Ok(Some(state)) => found.push(
            Problem::new(
                format!("the ID {} is taken on the destination", plan.container),
                format!("a container of that ID is {} there", state.status),
            )
            .hint(format!("delete it there: `runc delete {}`", plan.container)),
        ),
        Err(e) => found.push(
            Problem::new("the runtime on the destination does not work", format!("{e:#}"))
                .hint("install runc there, or name another with --ferry-runtime or in its config"),
        ),
    }

    if let Some(wanted) = &plan.engine {
        match handover::of(wanted.engine) {
            Some(engine) => found.extend(engine.problems(&plan.container, wanted, of_engine)),
            None => found.push(Problem::new(
                format!("{} is not known as an engine here", wanted.engine),
                "Ferry on the source knows it",
            )),
        }
    }

    *copies = bundle(plan, &mut found);
    tracing::debug!("{} MiB of memory will be taken in at most", staging_bytes(plan) >> 20);
    room(plan, state_dir, &mut found);
    if let (Some(network_image), Some(path)) = (&plan.network, workdir::network_place(plan)) {
        match NetNs::current() {
            Ok(host) => {
                *course = forward::decide(plan, &host);
                let wanted = plan.forward.wish
                    == crate::migration::protocol::forwarding::ForwardOption::Always;
                if wanted && *course == AddressDecision::Moves {
                    found.push(
                        Problem::new(
                            "the address cannot be forwarded",
                            "that takes a namespace with a name, a macvlan or a veth on a bridge",
                        )
                        .hint("leave --forward away"),
                    );
                }

                found.extend(forward::ties(plan, *course));
                let placement = match course {
                    AddressDecision::Moves | AddressDecision::Published => &plan.placement,
                    AddressDecision::Stays | AddressDecision::Home => &Placement::Forward,
                };

                // An engine makes it when it makes the container.
                if plan.engine.is_none() {
                    found.extend(network::preflight(network_image, placement, &path, &host));
                }
            }
            Err(e) => found.push(Problem::new("cannot look at this host's network", e)),
        }
    }

    if let Ok((bundle, _)) = bundle_here(plan) {
        found.extend(floating_address::problems(plan, &bundle));
    }
    if let Some(socket) = &plan.console_socket
        && !socket.exists()
    {
        found.push(
            Problem::new("nobody waits for the terminal", format!("no {}", socket.display()))
                .hint("start what takes it (recvtty, conmon …) on the destination first"),
        );
    }

    found
}

fn machine(plan: &Plan, found: &mut Vec<Problem>) {
    if plan.machine != host::machine() {
        found.push(Problem::new(
            "the hosts are of different kinds",
            format!(
                "{} is {}, {} is {}",
                plan.source,
                plan.machine,
                crate::sys::host::name(),
                host::machine()
            ),
        ));
        return;
    }

    let missing = host::missing_cpu_flags(&plan.cpu);
    if !missing.is_empty() {
        found.push(
            Problem::new(
                "the destination's CPU cannot do all that the source's can",
                format!("it lacks {}", missing.join(" ")),
            )
            .hint("mask these features on the source (hypervisor, or glibc.cpu tunables) before the container starts"),
        );
    }

    let (there, here) = (host::kernel_version(&plan.kernel), host::kernel());
    if there > host::kernel_version(&here) {
        found.push(
            Problem::new(
                "the destination's kernel is older",
                format!(
                    "Linux {} on {}, {here} on {}",
                    plan.kernel,
                    plan.source,
                    crate::sys::host::name()
                ),
            )
            .hint("most programs do not mind")
            .warning(),
        );
    }

    if let Ok((_, version)) = host::criu()
        && version < plan.criu
    {
        found.push(
            Problem::new(
                "the destination's CRIU is older",
                format!(
                    "{} on {}, {} on {}",
                    host::criu_words(plan.criu),
                    plan.source,
                    host::criu_words(version),
                    crate::sys::host::name()
                ),
            )
            .hint("install the same version on both hosts: images are not read backwards"),
        );
    }
}

/// The bundle as it is here, or as it will be.
///
/// # Errors
/// When something that is no bundle is in its place.
pub fn bundle_here(plan: &Plan) -> anyhow::Result<(Bundle, bool)> {
    // An engine makes it, and nothing is there before.
    let there = plan.engine.is_none() && plan.bundle.join("config.json").exists();
    Ok(if there {
        (Bundle::load(&plan.bundle)?, true)
    } else {
        (Bundle { path: plan.bundle.clone(), config: plan.config.clone() }, false)
    })
}

/// Compares the bundle and what belongs to it; what has to be copied.
fn bundle(plan: &Plan, found: &mut Vec<Problem>) -> Vec<usize> {
    let root = plan.probes.iter().find(|p| p.place == Place::Rootfs);
    let (here, there) = match bundle_here(plan) {
        Ok(bundle) => bundle,
        Err(e) => {
            found.push(Problem::new("the bundle on the destination is none", format!("{e:#}")));
            return Vec::new();
        }
    };

    if !there && root.is_some_and(|r| r.wish == How::Shared) {
        found.push(
            Problem::new(
                "the bundle is missing on the destination",
                format!("no {} there", plan.bundle.join("config.json").display()),
            )
            .hint("put it on storage that both hosts see, or name its place with --bundle"),
        );
        return Vec::new();
    }

    if !migratable::same(&here.config, &plan.config) {
        let empty = serde_json::Map::new();
        let (a, b) =
            (here.config.as_object().unwrap_or(&empty), plan.config.as_object().unwrap_or(&empty));
        let mut names: Vec<&str> = a
            .keys()
            .chain(b.keys())
            .filter(|k| a.get(*k) != b.get(*k))
            .map(String::as_str)
            .collect();
        names.sort_unstable();

        names.dedup();
        found.push(
            Problem::new(
                "config.json is not the same on both hosts",
                format!("they differ in: {}", names.join(", ")),
            )
            .hint("copy the source's config.json over"),
        );
        return Vec::new();
    }

    let mut copies: Vec<(usize, PathBuf)> = Vec::new();
    for (number, probe) in plan.probes.iter().enumerate() {
        let overlay = plan.overlay.as_ref().filter(|_| probe.place == Place::Rootfs);
        match relation(probe, probe.place.path(&here).as_deref(), overlay) {
            Ok(None) => {}
            // Two mounts of the same directory are one copy, and so is one inside of another.
            Ok(Some(path)) if copies.iter().any(|(_, c)| path.starts_with(c)) => {}
            Ok(Some(path)) => {
                copies.retain(|(_, c)| !c.starts_with(&path));
                copies.push((number, path));
            }
            Err(problem) => found.push(*problem),
        }
    }

    copies.sort();
    copies.into_iter().map(|(number, _)| number).collect()
}

/// The option that says what is to become of it.
fn volume(place: &Place) -> String {
    match place {
        Place::Rootfs => "--rootfs".to_owned(),
        Place::Mount(place) => format!("--volume {}", place.display()),
    }
}

/// Returns where a copy has to be made; none if there is nothing to copy.
fn relation(
    probe: &Probe,
    path: Option<&Path>,
    overlay: Option<&Overlay>,
) -> Result<Option<PathBuf>, Box<Problem>> {
    let result = match path {
        Some(path) => probe::verify(path, &probe.proof),
        None => Err(anyhow::anyhow!("config.json here does not have it")),
    };
    tracing::debug!(?path, shared = result.is_ok(), "looked for the {}", probe.what);
    let Err(e) = result else { return Ok(None) };
    let not_shared = || Problem::new(format!("the {} is not shared", probe.what), format!("{e:#}"));
    let Some(path) = path else { return Err(Box::new(not_shared())) };
    if let (Ok(here), Some(Ok(above))) = (path.metadata(), path.parent().map(Path::metadata))
        && probe.wish != How::Shared
        && overlay.is_none()
        && std::os::unix::fs::MetadataExt::dev(&here) != std::os::unix::fs::MetadataExt::dev(&above)
    {
        return Err(Box::new(not_shared().hint(format!(
            "something is mounted at {} there: a copy cannot take its place",
            path.display()
        ))));
    }

    match probe.wish {
        How::Shared if path.exists() => Ok(None),
        How::Shared => Err(Box::new(not_shared())),
        How::Auto | How::Copy if !probe.directory && !probe.file => {
            Err(Box::new(not_shared().hint(format!(
                "it is a device, a FIFO or a socket, and another one there: {}=shared says that \
                 the one there will do",
                volume(&probe.place)
            ))))
        }
        How::Auto | How::Copy if overlay.is_some() => {
            overlay.map_or(Ok(()), |overlay| layers::check(path, overlay, &probe.proof))?;
            Ok(Some(path.to_owned()))
        }
        How::Auto | How::Copy => match (&probe.place, probe.wish) {
            (Place::Mount(_), How::Auto) => Err(Box::new(not_shared().hint(format!(
                "others than the container may use it: {}=copy takes a copy along{}",
                volume(&probe.place),
                if probe.file && probe.read_only {
                    "; or put the same contents in its place there"
                } else {
                    ""
                }
            )))),
            _ => Ok(Some(path.to_owned())),
        },
    }
}

/// Tells whether copies find room, each where it is to be.
///
/// # Errors
/// When that cannot be found out.
pub fn room_for<'a>(
    copies: impl Iterator<Item = (&'a Path, &'a Size)>,
) -> anyhow::Result<Vec<Problem>> {
    let mut found = Vec::new();
    let mut wanted: Vec<((u64, PathBuf), u64)> = Vec::new();
    for (path, size) in copies {
        let at = path.ancestors().skip(1).find(|p| p.exists()).unwrap_or(Path::new("/"));
        let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(at)?);
        match wanted.iter_mut().find(|w| w.0.0 == device) {
            Some(one) => one.1 = one.1.saturating_add(size.bytes),
            None => wanted.push(((device, at.to_owned()), size.bytes)),
        }
    }

    for ((_, at), bytes) in wanted {
        // It may grow, and whoever else writes there must not be left without room.
        let needed = bytes.saturating_add(bytes / 20).saturating_add(RESERVE);
        let free = tmpfs::free_bytes(&at)?;
        if free < needed {
            found.push(
                Problem::new(
                    format!("{} has no room for the copy on the destination", at.display()),
                    format!("{} MiB are free, {} MiB are needed", free >> 20, needed >> 20),
                )
                .hint("free some there, or name another place with --bundle"),
            );
        }
    }

    Ok(found)
}

fn room(plan: &Plan, state_dir: &Path, found: &mut Vec<Problem>) {
    if let Ok(free) = host::memory_available() {
        found.extend(memory(plan, free));
    }
    found.extend(room_for_notes("the destination", state_dir));
}

/// Tells whether a host has room for what a migration writes down: what CRIU says is in memory, the journal
/// on disk, wherever that is.
pub fn room_for_notes(host: &str, state_dir: &Path) -> Vec<Problem> {
    let notes = [workdir::BASE, "/run"].map(Path::new).into_iter().find(|p| p.exists());
    let notes = notes.filter(|p| tmpfs::is_tmpfs(p).unwrap_or(false));
    let full = |place: &Path| {
        let free = tmpfs::free_bytes(place).ok().filter(|free| *free < NOTES)?;
        let what = format!("{} is full on {host}", place.display());
        let why = format!(
            "{} MiB are free, for logs and the journal {} are needed",
            free >> 20,
            NOTES >> 20
        );
        Some(Problem::new(what, why).hint("free some room there, or make it larger"))
    };
    // What is not there yet is made in what is above it.
    let state = state_dir.ancestors().find(|place| place.exists());
    notes.into_iter().chain(state).filter_map(full).collect()
}

/// Tells whether the source has memory for the images of what cannot be read while they are made.
pub fn room_for_images(plan: &Plan, free: u64) -> Option<Problem> {
    let needed = plan.imaged_bytes.saturating_add(RESERVE);
    let why = if free < needed && plan.imaged_bytes > LITTLE {
        format!("{} MiB are free, {} MiB are needed", free >> 20, needed >> 20)
    } else if plan.imaged_bytes.saturating_add(in_tmpfs(plan)) > MAX_IMAGES {
        format!("no more than {} GiB go along so", MAX_IMAGES >> 30)
    } else {
        return None;
    };
    let what = format!(
        "the container's shared memory and its files without a name, {} MiB, have no room among \
         CRIU's images",
        plan.imaged_bytes >> 20
    );
    Some(
        Problem::new(what, why)
            .hint("free some memory on this host, or have the container use less"),
    )
}

/// Bytes that all tmpfs mounts hold together.
fn in_tmpfs(plan: &Plan) -> u64 {
    plan.tmpfs.iter().fold(0, |sum: u64, t| sum.saturating_add(t.used))
}

/// Tells whether the container finds room in `free` bytes of memory.
fn memory(plan: &Plan, free: u64) -> Option<Problem> {
    let mib = |bytes: u64| bytes >> 20;
    // What is in a tmpfs or shared is there packed and unpacked for a moment. Staged pages are given
    // back as they are installed, so little of them is there twice at a time.
    // Memory that is shared is there once where it comes before the images.
    let packed = plan.imaged_bytes.saturating_sub(plan.shared_bytes);
    let twice = in_tmpfs(plan).saturating_add(packed).saturating_mul(2);
    let twice = twice.saturating_add(plan.shared_bytes).saturating_add(RESERVE);
    let now = plan.resident_bytes.saturating_add(plan.resident_bytes / 8).saturating_add(twice);
    let most = plan.memory_bytes.saturating_add(twice);
    let why = |needed: u64| {
        format!(
            "{} MiB are free, {} MiB are needed: the container has {} MiB, and {} MiB in tmpfs mounts",
            mib(free),
            mib(needed),
            mib(plan.resident_bytes),
            mib(in_tmpfs(plan)),
        )
    };

    if free < now {
        return Some(
            Problem::new("the destination has not enough memory", why(now)).hint(
                "free some there, empty the container's tmpfs mounts, or choose another host",
            ),
        );
    }

    (free < most).then(|| {
        Problem::new("the destination's memory may become short", why(most))
            .hint(
                "it is enough unless the container grows while it is copied; if it does, it stays",
            )
            .warning()
    })
}

/// Most bytes of memory that are taken in: what the plan announces, but never so much that this
/// host's other work goes under.
pub fn staging_bytes(plan: &Plan) -> u64 {
    let free = host::memory_available().unwrap_or(u64::MAX);
    plan.memory_bytes.min(free.saturating_sub(RESERVE))
}

/// The same of shared memory that comes before the images.
pub fn shared_bytes(plan: &Plan) -> u64 {
    let free = host::memory_available().unwrap_or(u64::MAX);
    let most = plan.shared_bytes.saturating_mul(2).saturating_add(256 << 20);
    most.min(free.saturating_sub(RESERVE))
}

/// The mark that says that this container was migrated away from here earlier: it comes back.
pub fn clear_mark(plan: &Plan, runtime: &Runtime, state_dir: &Path) -> anyhow::Result<bool> {
    if let Some(wanted) = &plan.engine {
        AwayMark::remove_named(state_dir, wanted.engine, &wanted.name)?;
    }
    AwayMark::remove(state_dir, runtime.root(), plan.container.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tmpfs::Tmpfs;

    fn plan(resident: u64, memory: u64, used: u64) -> Plan {
        let mut plan: Plan = serde_json::from_value(serde_json::json!({
            "migration": "00112233aabbccdd", "check_only": true, "container": "box",
            "bundle": "/b", "config": {}, "root": null, "systemd_cgroup": false, "streams": [],
            "console_socket": null, "memory_bytes": memory, "resident_bytes": resident, "cpu": [],
            "machine": "", "kernel": "", "criu": 0, "probes": [], "tmpfs": [], "network": null,
            "loopback": null, "network_path": null, "placement": "auto",
        }))
        .unwrap();
        plan.tmpfs = vec![Tmpfs { place: "/t".into(), also: vec![], options: vec![], used }];
        plan
    }

    #[test]
    fn memory_for_pages_and_tmpfs_is_asked_for_before() {
        const GIB: u64 = 1 << 30;
        let fatal = |p: Plan, free| memory(&p, free).map(|p| p.fatal);
        let shared = |bytes, free| {
            let plan = Plan { imaged_bytes: bytes, ..plan(0, 0, 0) };
            (room_for_images(&plan, free).is_some(), fatal(plan, free))
        };
        assert_eq!(shared(GIB, 3 * GIB), (false, None));
        assert_eq!(shared(GIB, 2 * GIB), (false, Some(true)));
        assert_eq!(shared(GIB, GIB), (true, Some(true)));
        assert!(shared(65 * GIB, 200 * GIB).0, "more than images may be");
        assert_eq!(fatal(plan(GIB, 3 * GIB, 0), 4 * GIB), None);
        assert_eq!(fatal(plan(GIB, 3 * GIB, 0), 2 * GIB), Some(false));
        assert_eq!(fatal(plan(2 * GIB, 3 * GIB, 0), 2 * GIB), Some(true));
        // A tmpfs counts twice.
        assert_eq!(fatal(plan(GIB, GIB, GIB), 3 * GIB), Some(true));
        assert_eq!(fatal(plan(GIB, GIB, GIB), 4 * GIB), None);
        // Whatever a peer claims.
        assert_eq!(fatal(plan(u64::MAX, u64::MAX, u64::MAX), GIB), Some(true));
        // Shared memory that comes before the images is there once.
        let ahead = Plan { shared_bytes: 2 * GIB, imaged_bytes: 2 * GIB, ..plan(GIB, GIB, 0) };
        assert_eq!(memory(&ahead, 4 * GIB).map(|problem| problem.fatal), None);
        let packed = Plan { shared_bytes: 0, ..ahead };
        assert_eq!(memory(&packed, 4 * GIB).map(|problem| problem.fatal), Some(true));
        assert!(staging_bytes(&plan(1, u64::MAX, 0)) < u64::MAX);
        assert_eq!(staging_bytes(&plan(1, 4096, 0)), 4096);
    }
}
