//! What the source can know of a container's network, and of what becomes of its address.

use std::path::PathBuf;

use anyhow::Result;

use crate::engine::papers::EngineWants;
use crate::engine::property;
use crate::migration::forwarding as forward;
use crate::migration::network::floating_address;
use crate::migration::options::MigrateOptions;
use crate::migration::protocol::forwarding::{ForwardOption, ForwardRequest};
use crate::network::image::LinkKind;
use crate::network::{self, Floating, NetworkImage};
use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::problem::{Problem, Problems};
use crate::sys::netns::NetNs;

/// A namespace of its own, its path, and what is in it.
pub type OwnNetwork = Option<(NetNs, PathBuf, NetworkImage)>;

/// A container's network, as it was found.
pub(super) struct NetworkToCarry {
    /// Where it has one of its own.
    pub(super) own: OwnNetwork,
    /// What the runtime has given it, where that is nothing but a loopback device.
    pub(super) loopback: Option<NetworkImage>,
    /// Where it has the host's.
    pub(super) floating: Option<Floating>,
    /// What is asked of the destination.
    pub(super) forward: ForwardRequest,
    /// What will not be over there as it is here.
    pub(super) warnings: Vec<Problem>,
}

/// Looks at it. What needs forwarding of an engine's container is not asked for where that is not wanted.
///
/// # Errors
/// What cannot be carried.
pub(super) fn look(
    bundle: &Bundle,
    init: i32,
    cgroup: &Cgroup,
    wishes: &MigrateOptions,
    engine: Option<&mut EngineWants>,
) -> Result<NetworkToCarry> {
    let floating = floating_address::look(bundle, init, cgroup, wishes)?;
    let (own, loopback) = match floating {
        Some(_) => (None, None),
        None => network(bundle, init, engine.is_some())?,
    };
    let away = own.as_ref().and_then(|own| forward::away_of(&own.0));

    let ties =
        |own: &(NetNs, PathBuf, NetworkImage)| forward::translated(&own.0, &own.2, away.as_ref());
    let translated = own.as_ref().map(ties).unwrap_or_default();
    let mut warnings = Vec::new();
    let forwards = wishes.forward != ForwardOption::Never;
    if let Some(wanted) = engine {
        if let Some((namespace, _, image)) = &own {
            warnings.extend(forward::published::moves(wanted));
            warnings.extend(forward::published::left_behind(wanted, forwards));
            let mut problems = forward::published::stuck(wanted, forwards, namespace, image)?;
            problems.extend(away.iter().map(forward::published::twice));
            if !problems.is_empty() {
                return Err(Problems(problems).into());
            }
        }

        if !forwards {
            wanted.neighbours.clear();
        }
    }

    let from = away.map(|away| (away.id, away.home));
    let forward = ForwardRequest { wish: wishes.forward, from, translated };
    Ok(NetworkToCarry { own, loopback, floating, forward, warnings })
}

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
