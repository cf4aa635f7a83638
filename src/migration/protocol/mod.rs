//! What the two hosts say to each other, in order, and who owns the container meanwhile.
//!
//! ```text
//! source                                     destination                 who owns it
//!   ── Hello ─────────────────────────────▶
//!   ◀───────────────────────────── Hello ──
//!   ── Plan ──────────────────────────────▶  checks
//!   ◀─────────────────── Accept | Refuse ──                              source, running
//!   ── Layers ────────────────────────────▶  looks for them (only of an overlay that is copied)
//!   ◀────────────────────────── Lacking ──
//!   ── Trees ─────────────────────────────▶  checks (only where files are copied)
//!   ◀────────────────── SpaceOk | Refuse ──
//!   ── Prepare ───────────────────────────▶  namespace behind a fence, runtime held at RESTORE
//!   ── Papers ────────────────────────────▶  (only of an engine's container)
//!   ══ files, round by round ═════════════▶  staged
//!   ◀─────────────────────────── Applied ──                              (each round)
//!   ── Copied ────────────────────────────▶  put in their places
//!   ══ pages, round by round ═════════════▶  staged
//!   ── Engage ────────────────────────────▶  (the engine makes the container, its runtime is held)
//!   ◀────────────────────────── Prepared ──                              source, running
//!   ── Connections ───────────────────────▶  sockets for them (only where there are many)
//!   ◀─────────────────────────── Awaited ──                              source, running
//!   ── Freezing ──────────────────────────▶                              source, frozen
//!   ══ pages, packets ════════════════════▶
//!   ══ image files, connections ══════════▶
//!   ── Sockets ───────────────────────────▶  (only what CRIU does not carry)
//!   ── Dumped ────────────────────────────▶  restore begins
//!   ── MemoryDone ────────────────────────▶  pages are installed
//!   ◀──────────────────────────── Verify ──  all memory is in (only with --verify)
//!   ══ digests ═══════════════════════════▶  compared
//!   ◀────────────────────────── Verified ──
//!   ◀───────────────────────────── Ready ──  restored, no instruction run; source, frozen
//!   [journal: committed]                                                 destination
//!   ── Commit ────────────────────────────▶  opens the fence, announces, runs
//!   ◀─────────────────────────── Running ──                              destination, running
//!   ══ pages that stayed here ════════════▶  (post-copy; ◀ wanted ones are asked for)
//!   ══ packets that still came here ══════▶
//!   ◀───────────────────── MemoryComplete ──                              (all pages are in)
//!   ── Finished ──────────────────────────▶
//! ```
//!
//! Before `Commit` either side may say `Abort`/`Failed`, or just vanish: the source then runs on.
//! A destination that has said `Ready` discards nothing by itself: only the source's word, brought
//! over this link or a later one (`Resolve`), or the operator's, decides. Where it has lost its copy
//! before that was let run, it says so when it is asked, and the source takes the container back.

pub mod forwarding;
pub mod session;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::forwarding::{AddressDecision, ForwardMessage, ForwardRequest};
use crate::connections::Coming;
use crate::engine::papers::{Papers, Wanted};
use crate::files::layers::Layer;
use crate::files::overlay::Overlay;
use crate::files::place::Parent;
use crate::files::probe::Proof;
use crate::files::sockets::Renamed;
use crate::files::tmpfs::{self, Tmpfs};
use crate::files::walk::Size;
use crate::memory::digest::Mask;
use crate::memory::serve::Served;
use crate::network::image::{Kind, NetworkImage};
use crate::network::{Floating, Placement};
use crate::oci::bundle::Bundle;
use crate::problem::Problem;
use crate::report::log;
use crate::tasks::locks::Held;
use crate::tasks::settings::{self, Setting};
use crate::tasks::sockets::SocketSettings;
use crate::transport::frame;

/// Version of this protocol: both sides must speak the same one.
pub const PROTOCOL: u32 = 10;

/// Most image files of one checkpoint.
pub const MAX_FILES: usize = 100_000;
/// Most bytes of them: they hold no memory but what CRIU insists on.
pub const MAX_IMAGES: u64 = 64 << 30;
/// Most tasks of one container.
pub const MAX_TASKS: usize = 100_000;
/// Most probes and bind mounts of one plan.
pub const MAX_PROBES: usize = 4096;
/// Most directories above them.
pub const MAX_PARENTS: usize = 4096;

/// A control message. Each says who owns the container once it has arrived.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Message {
    /// Both ways, first of all. The source owns the container.
    Hello(Hello),
    /// To the destination: everything that the checks need. The source owns the container.
    Plan(Box<Plan>),
    /// To the source: nothing stands in the way; warnings. The source owns the container.
    Accept {
        /// Worth telling, no obstacle.
        warnings: Vec<Problem>,
        /// The streams, by number, that are the same file on both hosts.
        shared: Vec<usize>,
        /// The probes, by number, of what is to be copied.
        copies: Vec<usize>,
        /// What becomes of the address.
        course: AddressDecision,
    },
    /// To the destination: the layers of the overlay that is to be copied, in the plan's order. The
    /// source owns the container.
    Layers {
        /// Each of them.
        layers: Vec<Layer>,
    },
    /// To the source: those that are not there, by number. The source owns the container.
    Lacking {
        /// Rising.
        layers: Vec<usize>,
    },
    /// To the destination: what the trees that are to be copied hold, first those of lacking layers,
    /// in that order. The source owns the container.
    Trees {
        /// Each of them.
        sizes: Vec<Size>,
    },
    /// To the source: there is room for them. The source owns the container.
    SpaceOk,
    /// To the source: it cannot be; nothing was touched. The source owns the container.
    Refuse {
        /// All that stands in the way.
        problems: Vec<Problem>,
    },
    /// To the destination: make everything ready. The source owns the container.
    Prepare,
    /// To the source: it is. The source owns the container.
    Prepared,
    /// To the destination, after `Prepare`, of an engine's container: what that engine knows of it. The
    /// source owns the container.
    Papers(Box<Papers>),
    /// To the destination: most of the memory has come. The engine there shall make the container now:
    /// it does not wait long for its runtime. The source owns the container.
    Engage,
    /// To the source: a round of the trees is in place and on the disk. The source owns the
    /// container.
    Applied {
        /// Which one, from 1.
        round: u32,
    },
    /// To the destination: what will change in the trees before the freeze is little: bring them to
    /// their places. The source owns the container.
    Copied,
    /// To the destination: connections that will come beside the images. The source owns the
    /// container.
    Connections {
        /// At most [`BATCH`](crate::connections::BATCH).
        list: Vec<Coming>,
    },
    /// To the source: they are expected. The source owns the container.
    Awaited {
        /// By their places among all that were announced: those that cannot be taken.
        lacking: Vec<u32>,
    },
    /// To the destination: the freeze begins; images come in some tens of milliseconds. The source
    /// owns the container.
    Freezing,
    /// To the destination, before [`Message::Dumped`]: what sockets have that CRIU does not carry. The source
    /// owns the container, frozen.
    Sockets {
        /// At most [`BATCH`](crate::tasks::sockets::BATCH).
        list: Vec<SocketSettings>,
    },
    /// To the destination: all image files are over; restore. The source owns the container,
    /// frozen.
    Dumped {
        /// The container's tasks, as it numbers them.
        tasks: Vec<i32>,
        /// How many connections have come beside the images.
        connections: usize,
        /// The file locks that the tasks hold.
        locks: Vec<Held>,
        /// What they have set for themselves with the kernel.
        settings: Vec<Setting>,
        /// Sockets whose files are to be renamed as they were.
        renamed: Vec<Renamed>,
    },
    /// Both ways, at any time: sent back as it came. Says nothing about who owns the container.
    Echo {
        /// Which one.
        number: u64,
    },
    /// To the destination, before a check ends: counts for nothing; the source sees how fast it gets
    /// away. The source owns the container.
    BandwidthProbe {
        /// Whatever.
        text: String,
    },
    /// To the destination: no page will come before the commit. The source owns the container,
    /// frozen.
    MemoryDone {
        /// Pages that stay on the source until then: post-copy.
        left: u64,
    },
    /// To the source: restored, with all of its memory; the digests of the source's are wanted. The source
    /// owns the container, frozen.
    Verify {
        /// What the digests depend on.
        seed: u64,
        /// What is not compared, as the kernel writes there.
        masks: Vec<Mask>,
    },
    /// To the source: all memory is the same. The source owns the container, frozen.
    Verified {
        /// Pages that were compared.
        pages: u64,
    },
    /// To the source: restored, and held before its first instruction. The source owns the
    /// container, frozen; the destination keeps its copy until it is told.
    Ready,
    /// To the destination: it is yours. The destination owns the container.
    Commit,
    /// To the source: it runs. The destination owns the container.
    Running(Box<Arrival>),
    /// To the source: its last page is in; what is frozen is needed no more. The destination owns
    /// the container, running.
    MemoryComplete(Served),
    /// To the source: further links may join. The source owns the container.
    AcceptChannels,
    /// To the destination, over a further link, instead of a plan: it carries memory of a migration
    /// that is under way. The source owns the container.
    Join {
        /// The migration's ID.
        migration: String,
    },
    /// To the source, over that link: memory may come.
    Joined,
    /// To the destination, over a later link, instead of a plan: the source goes on with a
    /// migration whose link broke after the commit, with pages left. The destination owns the
    /// container, running.
    Resume {
        /// The migration's ID.
        migration: String,
    },
    /// To the source: all pages that are missing were named (`Run::Want`). The destination owns the
    /// container, running.
    Missing {
        /// How many.
        pages: u64,
    },
    /// To the destination: what was frozen is gone, no packet will come any more.
    Finished,
    /// To the destination: give up, the container runs on here. The source owns the container.
    Abort {
        /// Why.
        why: String,
    },
    /// To the source: it cannot be done here; everything is undone. The source owns the container.
    Failed {
        /// In which phase.
        phase: String,
        /// Why, in full.
        why: String,
        /// What to do about it.
        #[serde(default)]
        hints: Vec<String>,
    },
    /// To the destination, over a later link, instead of a plan: the source's word about an
    /// earlier migration, or only a question.
    Resolve {
        /// The migration's ID.
        migration: String,
        /// The verdict; without one the state is only asked for.
        verdict: Option<Verdict>,
    },
    /// Over a link of its own: the container's frames, when its address stays elsewhere. Says nothing
    /// about who owns the container.
    Forward(Box<ForwardMessage>),
    /// To the source: how that migration stands now. Over the migration's own link: it has heard that the
    /// source gave up.
    Resolved {
        /// See [`Standing`].
        standing: Standing,
    },
}

impl Message {
    /// What has failed here, in full.
    pub fn failed(phase: &str, error: &anyhow::Error) -> Message {
        let (why, hints) = log::taken_apart(error);
        Message::Failed { phase: phase.to_owned(), why, hints }
    }
}

/// The name of an enum's variant.
pub fn variant(one: &impl std::fmt::Debug) -> String {
    /// Takes a name, and ends what would follow it.
    struct Name(String);

    impl std::fmt::Write for Name {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            for letter in text.chars() {
                if !letter.is_alphanumeric() {
                    return Err(std::fmt::Error);
                }
                self.0.push(letter);
            }
            Ok(())
        }
    }

    let mut name = Name(String::new());
    // It fails where the name is over.
    let _ = std::fmt::write(&mut name, format_args!("{one:?}"));
    name.0
}

/// The source's decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The destination owns the container.
    Commit,
    /// The source owns the container.
    Abort,
}

/// How a migration stands on the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The container runs here.
    Running,
    /// It is just being started.
    Waiting,
    /// Restored and held, with all of its memory: waits for the verdict.
    Ready,
    /// The same, but for pages that are still on the source.
    Lacking,
    /// It is still being taken in: there is no copy yet.
    Arriving,
    /// The container runs here, and needs pages that are still on the source.
    Partial,
    /// There is no copy here, and there will be none of this migration. There may have been one that
    /// ran.
    Gone,
    /// The same, and none has run: the source has it as it was frozen, and nobody has seen anything
    /// later.
    NeverRan,
}

/// Who is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// See [`PROTOCOL`].
    pub protocol: u32,
    /// Version of Ferry.
    pub ferry: String,
    /// The same for two processes exactly when they are on the same host.
    pub host: String,
}

/// What the container is and needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// ID of this migration: 16 hexadecimal digits.
    pub migration: String,
    /// Only the checks are wanted.
    pub check_only: bool,
    /// The container's ID.
    pub container: String,
    /// What the source calls itself.
    #[serde(default)]
    pub source: String,
    /// The bundle's directory on the destination.
    pub bundle: PathBuf,
    /// The source's config.json.
    pub config: Value,
    /// The runtime's `--root`, where the user gave one.
    pub root: Option<PathBuf>,
    /// The runtime's `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// CPUs that threads are bound to.
    #[serde(default)]
    pub bound_cpus: Vec<String>,
    /// AppArmor profiles of its tasks.
    #[serde(default)]
    pub apparmor: Vec<String>,
    /// What the standard streams are: the targets of `/proc/PID/fd/{0,1,2}`.
    pub streams: Vec<Stream>,
    /// A socket on the destination that takes the terminal.
    pub console_socket: Option<PathBuf>,
    /// Bytes of memory that will come at most.
    pub memory_bytes: u64,
    /// Of these and of files without a name, what comes among the images.
    #[serde(default)]
    pub imaged_bytes: u64,
    /// Bytes that the container has in memory now.
    pub resident_bytes: u64,
    /// The source's CPU, to compare.
    pub cpu: Vec<String>,
    /// The source's machine (`uname -m`) and kernel release.
    pub machine: String,
    /// Kernel release of the source.
    pub kernel: String,
    /// CRIU's version on the source, as 40201 for 4.2.1.
    pub criu: u32,
    /// What must be the same on both hosts, and how that is proved.
    pub probes: Vec<Probe>,
    /// The directories above it on the source, each once: what is missing there is made as they are.
    #[serde(default)]
    pub parents: Vec<Parent>,
    /// The root file system, where it is an overlay that can go layer by layer: paths of the
    /// destination.
    #[serde(default)]
    pub overlay: Option<Overlay>,
    /// The tmpfs mounts that Ferry carries, numbered in this order.
    pub tmpfs: Vec<Tmpfs>,
    /// The network as captured; none where the container has none of its own.
    pub network: Option<NetworkImage>,
    /// What goes along of the host's network, where the container uses that.
    #[serde(default)]
    pub floating: Option<Floating>,
    /// The loopback device of a namespace without a name: runc has CRIU leave it out.
    pub loopback: Option<NetworkImage>,
    /// The namespace's path, where it has one.
    pub network_path: Option<PathBuf>,
    /// `--network`.
    pub placement: Placement,
    /// `--verify`.
    #[serde(default)]
    pub verify: bool,
    /// What is to become of the address.
    #[serde(default)]
    pub forward: ForwardRequest,
    /// What it needs of its engine, if it is an engine's.
    #[serde(default)]
    pub engine: Option<Wanted>,
}

/// A standard stream of the container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// As `/proc/PID/fd/N` shows it: `pipe:[123]`, `/dev/null`, `/dev/pts/0`, `/var/log/web.log`.
    pub target: String,
    /// CRIU's key for a regular file that lies outside the container: `file[MNT:INO]`.
    pub external: Option<String>,
    /// Bytes of that file when it was looked at.
    pub size: u64,
    /// Its mode, owner and group: CRIU wants to find them so.
    pub mode: u32,
    /// See `mode`.
    pub owner: (u32, u32),
    /// Whether its contents go over the link (the source's own note).
    #[serde(skip)]
    pub sent: bool,
    /// Of its directory, for the destination to find out whether the file is shared.
    pub proof: Option<Proof>,
}

/// One path, and the proof that both hosts see the same behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What it is: `root file system`, `bind mount /srv/www`.
    pub what: String,
    /// Its place in the configuration, for the destination to find its own path.
    pub place: Place,
    /// The proof.
    pub proof: Proof,
    /// What the user says of it.
    pub wish: How,
    /// Whether it is a directory.
    pub directory: bool,
    /// Whether it is a regular file.
    #[serde(default)]
    pub file: bool,
    /// Whether the container cannot write there.
    pub read_only: bool,
}

/// How a path of the container's gets to the other host: `--rootfs`, `--volume`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// As it turns out: the root file system is copied where it is not shared, no volume is.
    #[default]
    Auto,
    /// It is there, and nobody has to prove it.
    Shared,
    /// A copy is made, unless it is shared.
    Copy,
}

impl Place {
    /// Its path on this host.
    pub fn path(&self, bundle: &Bundle) -> Option<PathBuf> {
        match self {
            Place::Rootfs => bundle.rootfs().ok(),
            Place::Mount(destination) => {
                let mounts = bundle.bind_mounts();
                mounts.into_iter().find(|m| m.destination == *destination).map(|m| m.source)
            }
        }
    }
}

/// Where a path stands in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// `root.path`.
    Rootfs,
    /// The bind mount with this destination.
    Mount(PathBuf),
}

/// What the destination tells when the container runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Arrival {
    /// Host's number of the init process.
    pub pid: i32,
    /// Milliseconds since its own `Dumped`: when the restore was held, the commit came, the
    /// container ran.
    pub marks: Vec<(String, f64)>,
    /// Packets replayed so far.
    pub packets: u64,
    /// What is not as it was.
    #[serde(default)]
    pub changed: Vec<Problem>,
}

/// Sends a control message and whatever was buffered before it.
///
/// # Errors
/// When the link is gone.
pub fn send(out: &mut (impl Write + ?Sized), message: &Message) -> Result<()> {
    let json = serde_json::to_vec(message)?;
    if json.len() > frame::MAX_CONTROL {
        bail!("a message of {} bytes is more than the protocol allows", json.len());
    }
    let mut out = out;
    frame::write_control(&mut out, &json).context("sending to the other host")?;
    out.flush().context("sending to the other host")?;
    Ok(())
}

/// Reads a control message out of its frame.
///
/// # Errors
/// When it is none that this version knows.
pub fn parse(json: &[u8]) -> Result<Message> {
    serde_json::from_slice(json).context("a message that this version of Ferry does not know")
}

impl Plan {
    /// Refuses what no honest source sends, before anything is done with it.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn validate(&self) -> Result<()> {
        let hex = |s: &str| s.len() == 16 && s.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex(&self.migration) {
            bail!("{:?} is no migration's ID", self.migration);
        }
        if !crate::oci::runtime::valid_id(self.container.as_ref()) {
            bail!("{:?} is no container's ID", self.container);
        }
        // HOST_NAME_MAX; it is shown to people.
        if self.source.len() > 64 || self.source.contains(|c: char| c.is_control()) {
            bail!("{:?} is no host's name", self.source);
        }
        if !self.bundle.is_absolute() {
            bail!("the bundle's path must be absolute");
        }
        if self.streams.len() > 3
            || self.bound_cpus.len() > settings::MOST_LISTS
            || self.probes.len() > MAX_PROBES
            || self.parents.len() > MAX_PARENTS
        {
            bail!("a plan with too many entries");
        }
        for path in self.network_path.iter().chain(&self.console_socket).chain(&self.root) {
            let plain = path.components().all(|c| !matches!(c, std::path::Component::ParentDir));
            if !path.is_absolute() || !plain {
                bail!("{} is no absolute path without ..", path.display());
            }
        }
        self.forward.validate()?;
        self.overlay.iter().try_for_each(Overlay::validate)?;
        tmpfs::validate(&self.tmpfs)?;
        for network in self.network.iter().chain(&self.loopback) {
            network.validate()?;
        }
        if self.floating.is_some() && self.network.is_some() {
            bail!("a container with the host's network and one of its own");
        }
        self.floating.iter().try_for_each(Floating::validate)?;
        self.engine.iter().try_for_each(Wanted::validate)?;
        Ok(())
    }

    /// Whether CRIU runs in the container's network namespace, on both sides: what it writes on
    /// the one must be read in the same place on the other. It can where it can talk to itself.
    pub fn criu_inside(&self) -> bool {
        let up =
            |image: &NetworkImage| image.links.iter().any(|l| l.kind == Kind::Loopback && l.up);
        self.network.as_ref().is_some_and(up)
    }
}

impl Standing {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Standing::Running => "runs there",
            Standing::Waiting => "is about to run there",
            Standing::Ready | Standing::Lacking => "is restored there and waits for the verdict",
            Standing::Arriving => "is still being taken in there",
            Standing::Partial => "runs there without all of its memory",
            Standing::Gone => "is not there",
            Standing::NeverRan => "never ran there, and is gone",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::fuzz::Target;

    /// One with some of everything.
    fn plan() -> Value {
        let network = crate::network::image::tests::sample();
        let proof =
            serde_json::json!({ "file": ["n", "c"], "inode": [1, 2, 3, 4], "contents": null });
        let port =
            serde_json::json!({ "address": "", "port": 8080, "inside": 80, "protocol": "tcp" });
        serde_json::json!({
            "type": "plan", "migration": "00112233aabbccdd", "check_only": false, "container": "web",
            "source": "a", "bundle": "/b", "config": { "process": { "args": ["x"] }, "mounts": [] },
            "root": "/run/runc", "systemd_cgroup": false, "apparmor": ["docker-default"],
            "streams": [{
                "target": "/var/log/web.log", "external": "file[1:2]", "size": 5, "mode": 420,
                "owner": [0, 0], "proof": proof,
            }],
            "console_socket": null, "memory_bytes": 1, "resident_bytes": 1, "cpu": ["sse2"],
            "machine": "x86_64", "kernel": "6.12", "criu": 40201,
            "probes": [{
                "what": "root file system", "place": "rootfs", "proof": proof, "wish": "auto",
                "directory": true, "file": false, "read_only": false,
            }],
            "parents": [],
            "overlay": {
                "lower": [{ "path": "/l1", "data": false }],
                "upper": { "path": "/upper", "work": "/work" }, "options": [], "flags": [],
            },
            "tmpfs": [{ "place": "/dev/shm", "options": ["size=64k"], "used": 5 }],
            "network": network, "loopback": null, "network_path": "/run/netns/web",
            "placement": "auto",
            "engine": {
                "engine": "podman", "version": "5.8.6", "name": "web", "runtime": "ferry",
                "store": { "root": "/s", "run": "/r", "volumes": "/v", "driver": "overlay" },
                "image": { "id": "26f222b68e17a3d9ab22a8e5dc1d3f6b11f40ff5e6c1f25b235220e7963095f7",
                    "name": "localhost/app:1" },
                "volumes": [{ "name": "data", "place": "/data", "labels": { "a": "b" } }],
                "networks": [{ "name": "lan", "driver": "macvlan", "subnets": ["10.0.0.0/24"] }],
                "ports": [port],
                "own": ["/etc/hosts"], "log": 5,
            },
            "forward": {
                "wish": "auto", "from": ["00112233aabbccdd", "home"],
                "translated": { "flows": [], "published": true },
            },
        })
    }

    #[test]
    fn fuzz_messages() {
        let mut target = Target::new("messages").sample(serde_json::to_vec(&plan()).unwrap());
        let others = [
            r#"{"type":"hello","protocol":6,"ferry":"0.1.0","host":"a"}"#,
            r#"{"type":"connections","list":[{"vpid":1,"number":5,"owner":0,"local":"10.0.0.1:80","kind":{"Connection":"10.0.0.2:7"}}]}"#,
            r#"{"type":"dumped","tasks":[1,2],"connections":1,"locks":[{"vpid":1,"number":5,"lock":{"kind":"posix","write":true,"start":0,"end":null}}],"settings":[],"renamed":[{"bound":[47,97],"current":[47,98]}]}"#,
            r#"{"type":"sockets","list":[{"vpid":1,"number":5,"options":[[1,[1,0,0,0]]],"interfaces":[[57,"eth0"]],"groups":[{"interface":"eth0","group":"239.1.2.3","exclude":true,"sources":["10.0.0.1"]}]}]}"#,
            r#"{"type":"layers","layers":[]}"#,
            r#"{"type":"trees","sizes":[{"bytes":1,"entries":1}]}"#,
            r#"{"type":"settle","migration":"00112233aabbccdd","verdict":"commit"}"#,
            r#"{"type":"forward","carry":{"id":"00112233aabbccdd","links":["eth0"]}}"#,
            r#"{"type":"running","pid":7,"marks":[["held",1.5]],"packets":1}"#,
            r#"{"type":"refuse","problems":[{"what":"a","why":"b","hint":"c","fatal":true}]}"#,
        ];
        for other in others {
            target = target.sample(other);
        }
        let words =
            [&b"\"type\":"[..], b"[[[[[[[[", b"{\"a\":", b"0,0,0,0,", b"null", b"/../", b"\\u0000"];
        target.words(&words).cost(4).run(|bytes| {
            let message = parse(bytes)?;
            if let Message::Plan(plan) = &message {
                plan.validate()?;
                assert!(plan.bundle.is_absolute() && plan.streams.len() <= 3);
                let _ = plan.criu_inside();
            }
            // What was understood can be said.
            serde_json::to_vec(&message)?;
            Ok(())
        });
    }

    /// The picture in the head has all that is said over a migration's own link.
    #[test]
    fn the_picture_has_every_message() {
        let text = include_str!("mod.rs");
        let (head, code) = text.split_once("pub mod forwarding;").unwrap();
        let (_, variants) = code.split_once("pub enum Message {").unwrap();
        let (variants, _) = variants.split_once("\n}").unwrap();
        let is_name = |word: &&str| word.starts_with(|c: char| c.is_ascii_uppercase());
        let known: BTreeSet<_> = variants
            .lines()
            .filter_map(|line| line.strip_prefix("    ").filter(is_name))
            .map(|line| line.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default())
            .collect();
        let mut drawn = BTreeSet::new();
        for line in head.lines().filter(|line| line.contains('▶') || line.contains('◀')) {
            let arrow = line.split(['▶', '◀']).find(|part| part.contains("──"));
            let words = arrow.unwrap_or_default().split([' ', '|', '─']).filter(is_name);
            drawn.extend(words);
        }
        assert!(drawn.is_subset(&known), "no messages: {:?}", drawn.difference(&known));
        let elsewhere = [
            // At any time.
            "Echo",
            "Abort",
            "Failed",
            "BandwidthProbe",
            // Over other links, or for them.
            "AcceptChannels",
            "Join",
            "Joined",
            "Resume",
            "Missing",
            "Resolve",
            "Resolved",
            "Forward",
        ];
        let absent: Vec<_> = known.difference(&drawn).filter(|m| !elsewhere.contains(m)).collect();
        assert!(absent.is_empty(), "not in the picture: {absent:?}");
    }

    #[test]
    fn a_message_is_called_by_its_name() {
        assert_eq!(variant(&Message::Freezing), "Freezing");
        assert_eq!(variant(&Message::MemoryDone { left: 0 }), "MemoryDone");
        assert_eq!(
            variant(&Message::Failed { phase: "a".into(), why: "b".into(), hints: vec![] }),
            "Failed"
        );
    }

    #[test]
    fn the_sample_is_valid() {
        let Message::Plan(plan) = parse(&serde_json::to_vec(&plan()).unwrap()).unwrap() else {
            panic!("no plan");
        };
        plan.validate().unwrap();
    }
}
