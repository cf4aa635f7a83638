//! The container's address stays at home while the container goes elsewhere: frames are forwarded.
//!
//! ```text
//!  home, where the address is                        away, where the container runs
//!  ┌ its namespace, fence closed ┐                   ┌ its namespace ────────────────┐
//!  │ eth0, the same MAC          │◀── forwarder ═════╪═ holder ──▶ eth0, a TAP device │
//!  └─────────────────────────────┘      frames over the remote shell, both ways      ┘
//! ```
//!
//! The [`home`] process connects to the host where the container is, as `ferry migrate` does, and
//! again whenever that link breaks. `ferry receive` there hands the link to the [`away`] process,
//! which holds the TAP devices. Both outlive the migration. When the container moves on, the source
//! asks for it through the link there is: home connects to the next host, too, and sends frames there
//! as soon as one has come from there: until then the fence there lets none out. So no chain grows.
//! When the container comes home, it gets its old namespace back and both processes end.
//!
//! What they know is in `/run/ferry-forward/ID`, and goes with a reboot like the namespaces.

pub(crate) mod away;
pub(crate) mod carrier;
pub(crate) mod control;
pub(crate) mod home;
pub(crate) mod process;
pub(crate) mod published;
pub(crate) mod steps;
mod switch;
mod way;
mod wire;

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::journal::Record;
use super::protocol::Plan;
use super::protocol::forwarding::{Ask, Status};
use crate::migration::journal::forward_role::ForwardRole;
use crate::migration::protocol::forwarding::{AddressDecision, ForwardOption};
use crate::network::image::LinkKind;
use crate::network::published::home::HomeFacts;
use crate::network::published::near::{self, Stays};
use crate::network::sockets::SockDiag;
use crate::network::translated::{self, Translated};
use crate::network::{self, NetworkImage, Placement, Problem, forward};
use crate::oci::container_id::ContainerId;
use crate::problem::Advise;
use crate::sys::netns::NetNs;
use crate::transport::connect::Destination;

/// Where all of it is.
const BASE: &str = "/run/ferry-forward";
/// In a forwarding's directory: the namespace that was kept.
const NETWORK: &str = "network";

/// What the host that has the address knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Home {
    /// The forwarding's ID.
    pub id: String,
    /// The container's.
    pub container: ContainerId,
    /// The container's addresses, for people.
    pub addresses: Vec<String>,
    /// Names of the links, in the order by which frames tell them.
    pub links: Vec<String>,
    /// Where the container is; none as long as it is at home.
    pub active: Option<Destination>,
    /// Where it may be by now, and the migration that takes it there.
    #[serde(default)]
    pub pending: Option<(Destination, String)>,
    /// Since when, unix time.
    pub since: u64,
    /// It ends when the container had no connection for so long, seconds.
    #[serde(default)]
    pub until_idle: Option<u64>,
    /// The remote shell with which the operator here reaches other hosts, and Ferry's path there.
    pub shell: Option<(Vec<String>, String)>,
    /// As its engine calls it.
    #[serde(default)]
    pub name: Option<String>,
    /// Where the address has moved, and connections by this host's translation are forwarded.
    #[serde(default)]
    pub published: Option<HomeFacts>,
}

/// What the host that has the container knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Away {
    /// The forwarding's ID.
    pub id: String,
    /// The container's.
    pub container: ContainerId,
    /// What its home calls itself.
    pub home: String,
    /// The container's namespace.
    pub path: PathBuf,
    /// Its device and inode.
    pub identity: (u64, u64),
    /// The links, and what they are at home.
    pub links: Vec<(String, LinkKind)>,
    /// As its engine calls it.
    #[serde(default)]
    pub name: Option<String>,
    /// The address is here; forwarded are connections by home's translation. Path and identity are those of
    /// the restored container's, when it is.
    #[serde(default)]
    pub published: bool,
    /// Addresses that it has for such connections alone.
    #[serde(default)]
    pub old: Vec<IpAddr>,
    /// Those who stay at home and are near it.
    #[serde(default)]
    pub stay: Vec<Stays>,
}

/// The destination decides what becomes of the address.
pub fn decide(plan: &Plan, host: &NetNs) -> AddressDecision {
    let Some(image) = &plan.network else { return AddressDecision::Moves };
    if let Some((id, _)) = &plan.forward.from
        && home_at(&directory(id)).is_ok()
    {
        return AddressDecision::Home;
    }

    if plan.engine.is_some() {
        let wanted = plan.forward.wish != ForwardOption::Never && published::could_be(plan);
        return if wanted { AddressDecision::Published } else { AddressDecision::Moves };
    }
    if !can_stay(plan) {
        return AddressDecision::Moves;
    }

    let stays = match plan.forward.wish {
        ForwardOption::Never => false,
        ForwardOption::Always => true,
        // Where it cannot be said it is as it was: who has gone abroad stays abroad.
        ForwardOption::Auto => {
            let Translated { flows, published } = &plan.forward.translated;
            *published
                || !flows.is_empty()
                || forward::is_elsewhere(image, &plan.placement, host)
                    .unwrap_or_else(|| plan.forward.from.is_some())
        }
    };

    if stays { AddressDecision::Stays } else { AddressDecision::Moves }
}

/// Returns why the container cannot go where its address would move: connections would end.
pub fn ties(plan: &Plan, course: AddressDecision) -> Option<Problem> {
    let (Some(image), AddressDecision::Moves) = (&plan.network, course) else { return None };
    let flows = &plan.forward.translated.flows;
    let first = flows.first().filter(|_| plan.placement != Placement::None)?;
    let home = plan.forward.from.as_ref().map_or(&plan.source, |f| &f.1);
    let named = plan.network_path.is_some();
    let plain = image.routed().next().is_none() && named;
    let how = if published::could_be(plan) {
        "have them forwarded (--forward auto), "
    } else if plain {
        "have packets forwarded (--forward auto, --network auto), "
    } else {
        ""
    };

    let others = match flows.len() - 1 {
        0 => String::new(),
        n => format!(", and {n} more"),
    };

    Some(
        Problem::new(
            "the address cannot move: connections depend on its host",
            format!(
                "{home} translates addresses for {} of the container's connections ({} with {}{others})",
                flows.len(),
                first.local,
                first.remote,
            ),
        )
        .hint(format!(
            "{}wait until they end, or end them on {home}: `conntrack -D --reply-src {ip}; \
             conntrack -D --orig-src {ip}`",
            how,
            ip = first.local.ip(),
        )),
    )
}

/// Returns what ties a container to the host that has its address.
pub fn translated(namespace: &NetNs, image: &NetworkImage, away: Option<&Away>) -> Translated {
    let addresses: Vec<_> = image.outward().flat_map(|(_, l)| &l.addresses).collect();
    let addresses: Vec<_> =
        addresses.iter().map(|a| a.local).filter(|ip| !forward::is_link_local(*ip)).collect();
    let looked = (|| {
        let mut found = match away {
            None => translated::look(&NetNs::current()?, &addresses)?,
            Some(away) => control::translated(&directory(&away.id))?,
        };
        // What the host remembers of a container before this one, or of a broken connection, is none.
        let open = SockDiag::new(namespace)?.connections(&addresses)?;
        found.flows.retain(|flow| open.contains(flow));
        anyhow::Ok(found)
    })();
    looked.unwrap_or_else(|e| {
        // A kernel without connection tracking; or a home that nobody reaches, and so none of them
        // is alive.
        tracing::debug!("address translation: {e:#}");
        Translated::default()
    })
}

/// Tells whether the first host could keep the address and forward its frames: not what is led to it by
/// routes, and not a namespace that would have no name to be kept under.
pub fn can_stay(plan: &Plan) -> bool {
    let Some(image) = &plan.network else { return false };
    let routed = image.links.iter().any(|link| matches!(link.kind, LinkKind::Routed { .. }));
    let elsewhere =
        matches!(plan.placement, Placement::Keep | Placement::None | Placement::Hook(_));
    !routed && !elsewhere && plan.network_path.is_some() && image.outward().next().is_some()
}

/// A forwarding's directory.
fn directory(id: &str) -> PathBuf {
    Path::new(BASE).join(id)
}

/// Makes a forwarding's directory, mode 0700.
fn make_directory(id: &str) -> Result<PathBuf> {
    let path = directory(id);
    let what = || format!("cannot make {}", path.display());
    fs::DirBuilder::new().recursive(true).mode(0o700).create(BASE).with_context(what)?;
    fs::DirBuilder::new().mode(0o700).create(&path).with_context(what)?;
    Ok(path)
}

/// Removes a forwarding's directory; the namespace loses the name that it has there.
fn remove_directory(directory: &Path) {
    if directory.parent() != Some(Path::new(BASE)) {
        return;
    }
    if let Ok(away) = away_at(directory)
        && let Ok(namespace) = NetNs::open(&away.path)
        && namespace.identity().is_ok_and(|identity| identity == away.identity)
        && away.published
    {
        let cut = network::published::away::cut(&away.id, &namespace, &away.old);
        let forgotten = network::published::given::forget(&away.old, &namespace);
        let told = near::tell(&namespace, &away.stay, false);
        for problem in [cut.err(), forgotten.err(), told.err()].into_iter().flatten() {
            tracing::warn!("{problem}");
        }
    }

    let known = home_at(directory).is_ok_and(|home| home.published.is_some())
        || away_at(directory).is_ok_and(|away| away.published);
    let id = directory.file_name().and_then(|id| id.to_str()).filter(|_| known);
    if let Some(problem) = id.and_then(|id| network::published::clear(id).err()) {
        tracing::warn!("{problem}");
    }
    let _ = crate::sys::netns::remove_named(&directory.join(NETWORK));
    let _ = fs::remove_dir_all(directory);
}

fn write<T: Serialize>(directory: &Path, name: &str, what: &T) -> Result<()> {
    let fresh = directory.join(format!("{name}.new"));
    fs::write(&fresh, serde_json::to_vec(what)?)?;
    Ok(fs::rename(fresh, directory.join(name))?)
}

const HOME: &str = "home.json";
const AWAY: &str = "away.json";

fn home_at(directory: &Path) -> Result<Home> {
    Ok(serde_json::from_slice(&fs::read(directory.join(HOME))?)?)
}

fn away_at(directory: &Path) -> Result<Away> {
    Ok(serde_json::from_slice(&fs::read(directory.join(AWAY))?)?)
}

/// All directories, of whichever kind.
fn directories() -> Vec<PathBuf> {
    let list = fs::read_dir(BASE).into_iter().flatten().flatten();
    list.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

/// Returns how the container of this namespace is reached, if its address is elsewhere.
pub fn away_of(namespace: &NetNs) -> Option<Away> {
    let identity = namespace.identity().ok()?;
    directories().iter().filter_map(|d| away_at(d).ok()).find(|a| a.identity == identity)
}

/// For `ferry migrations`: what goes on for a migration of this host's, in words and in JSON.
pub fn describe(record: &Record) -> Option<(String, serde_json::Value)> {
    let note = record.forward.as_ref()?;
    let directory = directory(&note.id);
    let here = match note.part {
        ForwardRole::Leaves | ForwardRole::LeavesConnections => {
            home_at(&directory).ok()?.addresses.join(", ")
        }
        ForwardRole::Arrives | ForwardRole::ArrivesWithoutConnections => {
            away_at(&directory).ok()?.home
        }
        _ => return None,
    };

    let at_home = matches!(note.part, ForwardRole::Leaves | ForwardRole::LeavesConnections);
    let translated = matches!(
        note.part,
        ForwardRole::LeavesConnections | ForwardRole::ArrivesWithoutConnections
    );
    let Some(status) = control::status(&directory) else {
        let id = &record.container;
        let words = if at_home {
            format!("{here} is NOT forwarded: the process that did has died (ferry resolve {id})")
        } else if translated {
            format!(
                "connections by {here} do not reach it: no process holds their devices; {here} will \
                 start it again"
            )
        } else {
            format!(
                "its address at {here} does not reach it: no process holds its interface; {here} will start it again"
            )
        };
        return Some((words, json!({"id": note.id, "home": at_home, "dead": true})));
    };

    let Status { to, since, out_bytes, in_bytes, connected, why, .. } = &status;
    let Status { connections, until_idle, .. } = &status;
    let moment = crate::report::log::rfc3339(std::time::UNIX_EPOCH + Duration::from_secs(*since));
    let mut words = if at_home {
        format!(
            "{here} is forwarded to {to} since {moment}: {out_bytes} bytes there, {in_bytes} back"
        )
    } else if translated {
        format!(
            "connections by {here} are forwarded from there: {in_bytes} bytes from there, \
             {out_bytes} back"
        )
    } else {
        format!(
            "its address is at {here}, from where it is forwarded: {in_bytes} bytes from there, {out_bytes} back"
        )
    };

    if let Some(n) = connections {
        words += &format!(", connections: {n}");
    }
    if let Some(seconds) = until_idle {
        words += &format!("; ends when there was none for {seconds} s");
    }

    if !connected {
        words += &format!("; BROKEN, trying again: {why}");
    }
    let mut value = json!(status);
    value["home"] = json!(at_home);
    value["id"] = json!(note.id);
    value["dead"] = json!(false);

    Some((words, value))
}

/// Tells whether something of a container of that ID, or that an engine calls so, is forwarded from here or to
/// here.
pub fn is_known(id: &str) -> bool {
    !of_container(id).is_empty()
}

/// The directories of a container's forwardings here, or of the one of that ID.
fn of_container(id: &str) -> Vec<PathBuf> {
    // docker:web
    let called = id.split_once(':').map_or(id, |(_, name)| name);
    let is = |d: &PathBuf| {
        let names = home_at(d)
            .map(|h| (h.container, h.name))
            .or_else(|_| away_at(d).map(|a| (a.container, a.name)));
        names.is_ok_and(|(c, name)| c == *id || name.is_some_and(|name| name == called))
            || d.ends_with(id)
    };
    directories().into_iter().filter(is).collect()
}

/// `ferry resolve --no-forward`: the operator has moved the address, or does not need it any more; now,
/// or when the container had no connection for a while.
///
/// # Errors
/// When nothing of that ID is forwarded, or home cannot be told.
pub fn end(id: &str, idle: Option<Duration>) -> Result<&'static str> {
    let mut said = None;
    for directory in of_container(id) {
        if let Some(idle) = idle {
            control::ask(&directory, &Ask::EndWhenIdle(idle.as_secs().max(1)))
                .advise("its home cannot be told", "`ferry migrations` tells how it stands")?;
            said = Some("its address is forwarded until its connections have ended");
        } else if home_at(&directory).is_ok() {
            if control::ask(&directory, &Ask::End { dismantle: true }).is_err() {
                // Nobody is there to do it.
                process::dismantle(&directory);
            }
            said =
                Some("its address is not forwarded any more, and this host does not answer for it");
        } else {
            control::ask(&directory, &Ask::End { dismantle: true }).advise(
                "its home cannot be told",
                "`ferry resolve --no-forward` there; if that host is gone for good, `ferry migrate \
                 --forward never` takes the container to where its address belongs",
            )?;
            said = Some("its home does not forward its address any more");
        }
    }

    said.with_context(|| {
        format!("no address of a container {id} is forwarded from here or to here")
    })
}

/// Starts again what has died; `None` when there is nothing like that.
///
/// # Errors
/// When it cannot be started.
pub fn revive(id: &str) -> Result<Option<&'static str>> {
    let mut said = None;
    for directory in of_container(id) {
        if home_at(&directory).is_ok() && control::status(&directory).is_none() {
            process::spawn(&directory)?;
            said = Some("its address is forwarded again");
        }
    }
    Ok(said)
}

/// `ferry __guard forward home|work|away DIRECTORY`: the processes that forward.
///
/// # Errors
/// When they cannot begin.
pub fn process(what: &str, directory: &Path) -> Result<()> {
    if directory.parent() != Some(Path::new(BASE)) {
        bail!("{} is no forwarding's directory", directory.display());
    }
    match what {
        "home" => process::supervise(directory),
        "work" => home::work(directory),
        "away" => away::hold(directory),
        _ => bail!("the guard is for ferry itself"),
    }
}
