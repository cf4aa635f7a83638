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
//!   ── ImagePart ─────────────────────────▶  each part of an image (only where the engine lacks it)
//!   ══ its bytes ═════════════════════════▶
//!   ── ImageSent ─────────────────────────▶  the engine takes it in
//!   ◀──────────────────────── ImageTaken ──
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
mod plan;
pub mod session;
#[cfg(test)]
mod tests;

use std::io::Write;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use self::forwarding::{AddressDecision, ForwardMessage};
pub use self::plan::{How, MAX_PARENTS, MAX_PROBES, Place, Plan, Probe, Stream};
use crate::connections::ComingConnection;
use crate::engine::papers::{EngineCourse, Papers};
use crate::files::layers::Layer;
use crate::files::sockets::Renamed;
use crate::files::walk::Size;
use crate::memory::digest::Mask;
use crate::memory::serve::Served;
use crate::problem::Problem;
use crate::report::log;
use crate::tasks::locks::HeldLock;
use crate::tasks::settings::Setting;
use crate::tasks::sockets::SocketSettings;
use crate::transport::frame;

/// Version of this protocol: both sides must speak the same one.
pub const PROTOCOL: u32 = 11;

/// Most image files of one checkpoint.
pub const MAX_FILES: usize = 100_000;
/// Most bytes of them: they hold no memory but what CRIU insists on.
pub const MAX_IMAGES: u64 = 64 << 30;
/// Most tasks of one container.
pub const MAX_TASKS: usize = 100_000;
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
        /// What becomes of the image that an engine's container was made of, and of its networks.
        #[serde(default)]
        engine: EngineCourse,
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
    /// To the destination, after `Prepare`: a part of the image that the engine there lacks comes, piece by
    /// piece. The source owns the container.
    ImagePart {
        /// Hexadecimal digits of its SHA-256.
        digest: String,
        /// Its length.
        bytes: u64,
    },
    /// To the destination: that was all of it. The source owns the container.
    ImageSent,
    /// To the source: the engine there has it. The source owns the container.
    ImageTaken,
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
        list: Vec<ComingConnection>,
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
        /// Number of connections that have come beside the images.
        connections: usize,
        /// The file locks that the tasks hold.
        locks: Vec<HeldLock>,
        /// What they have set for themselves with the kernel.
        settings: Vec<Setting>,
        /// Sockets whose files are to be renamed as they were.
        renamed: Vec<Renamed>,
    },
    /// Both ways, at any time: sent back as it came. Says nothing about who owns the container.
    Echo {
        /// Number of the echo.
        number: u64,
    },
    /// To the destination, before a check ends: counts for nothing; the source sees how fast it gets
    /// away. The source owns the container.
    BandwidthProbe {
        /// Padding, of no meaning.
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
    /// To the source: all pages that are missing were named (`RunKind::Want`). The destination owns the
    /// container, running.
    Missing {
        /// Number of them.
        pages: u64,
    },
    /// To the destination: what was frozen is gone, no packet will come any more.
    Finished,
    /// To the destination: give up, the container runs on here. The source owns the container.
    Abort {
        /// Reason, in words.
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
    /// Returns what has failed here, in full.
    pub fn failed(phase: &str, error: &anyhow::Error) -> Message {
        let (why, hints) = log::taken_apart(error);
        Message::Failed { phase: phase.to_owned(), why, hints }
    }
}

/// The name of an enum's variant.
pub fn variant(one: &impl std::fmt::Debug) -> String {
    /// Takes a name, and ends what would follow it.
    struct VariantName(String);

    impl std::fmt::Write for VariantName {
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

    let mut name = VariantName(String::new());
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
