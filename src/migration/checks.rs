//! The destination's checks: everything that can be known to stop a migration while the container
//! still runs on the source.

use std::path::PathBuf;

use super::away::AwayMark;
use super::host;
use super::protocol::{Place, Plan};
use crate::files::probe;
use crate::network::problem::Problem;
use crate::network::{self, Placement};
use crate::oci::bundle::Bundle;
use crate::oci::runtime::Runtime;
use crate::sys::netns::NetNs;
use crate::sys::tmpfs;

/// Memory that must be left when the container has arrived.
const RESERVE: u64 = 64 << 20;

/// Everything that stands in the way on this host, and warnings.
pub fn problems(plan: &Plan, runtime: &Runtime) -> Vec<Problem> {
    let networked = plan.network.is_some() && plan.placement != "none";
    // Beside the rest, as both take their time in the kernel.
    let receiving = std::thread::spawn(move || host::receiving_problems(networked));
    let mut found = host::problems();
    found.extend(receiving.join().unwrap_or_default());
    if found.iter().any(|p| p.fatal) {
        return found;
    }
    machine(plan, &mut found);
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
    bundle(plan, &mut found);
    room(plan, &mut found);
    if let (Some(image), Some(path)) = (&plan.network, &plan.network_path) {
        match plan.placement.parse::<Placement>() {
            Ok(placement) => match NetNs::current() {
                Ok(host) => found.extend(network::preflight(image, &placement, path, &host)),
                Err(e) => found.push(Problem::new("cannot look at this host's network", e)),
            },
            Err(e) => found.push(Problem::new("the wish for the network is not understood", e)),
        }
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
            format!("{} there, {} here", plan.machine, host::machine()),
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
                format!("Linux {} there, {here} here", plan.kernel),
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
                    "{} here, {} there",
                    host::criu_words(version),
                    host::criu_words(plan.criu)
                ),
            )
            .hint("install the same version on both hosts: images are not read backwards"),
        );
    }
}

fn bundle(plan: &Plan, found: &mut Vec<Problem>) {
    let here = match Bundle::load(&plan.bundle) {
        Ok(bundle) => bundle,
        Err(e) => {
            found.push(
                Problem::new("the bundle is missing on the destination", format!("{e:#}"))
                    .hint("put it on storage that both hosts see, or name its place with --bundle"),
            );
            return;
        }
    };
    if here.config != plan.config {
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
        return;
    }
    for probe in &plan.probes {
        let path: Option<PathBuf> = match &probe.place {
            Place::Rootfs => here.rootfs().ok(),
            Place::Mount(destination) => here
                .bind_mounts()
                .into_iter()
                .find(|m| m.destination == *destination)
                .map(|m| m.source),
        };
        let result = match &path {
            Some(path) => probe::verify(path, &probe.proof),
            None => Err(anyhow::anyhow!("config.json here does not have it")),
        };
        tracing::debug!(?path, shared = result.is_ok(), "looked for the {}", probe.what);
        if let Err(e) = result {
            found.push(
                Problem::new(format!("the {} is not shared", probe.what), format!("{e:#}"))
                    .hint("put it on storage that both hosts see; copying it is not built yet"),
            );
        }
    }
}

fn room(plan: &Plan, found: &mut Vec<Problem>) {
    let mib = |bytes: u64| bytes >> 20;
    // Staged pages are given back as they are installed, so little is there twice at a time.
    if let Ok(free) = host::memory_available()
        && free < plan.resident_bytes + plan.resident_bytes / 8 + RESERVE
    {
        found.push(
            Problem::new(
                "the destination has not enough memory",
                format!(
                    "{} MiB are free, the container has {} MiB",
                    mib(free),
                    mib(plan.resident_bytes)
                ),
            )
            .hint("free some, or choose another host"),
        );
    }
    for place in ["/run", "/var/lib"] {
        if tmpfs::free_bytes(place.as_ref()).is_ok_and(|free| free < 16 << 20) {
            found.push(
                Problem::new(
                    format!("{place} is full on the destination"),
                    "less than 16 MiB are free, for image files and the journal",
                )
                .hint("free some room there"),
            );
        }
    }
}

/// The mark that says that this container was migrated away from here earlier: it comes back.
pub fn clear_mark(
    plan: &Plan,
    runtime: &Runtime,
    state_dir: &std::path::Path,
) -> anyhow::Result<bool> {
    AwayMark::remove(state_dir, runtime.root(), plan.container.as_ref())
}
