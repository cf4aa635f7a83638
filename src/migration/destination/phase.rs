//! How far a migration is here: what may come next, and what comes of it. Nothing is done here.
//!
//! A message that does not belong in a phase is refused. Until `Ready` that is an error like any other,
//! and all is undone. From then on it is told and counts for nothing: what does not follow the protocol is
//! no verdict, and may not end a copy that may be the only one.

use anyhow::{Result, anyhow, bail};

use super::outstanding::Outstanding;
use crate::files::sockets::{self, Renamed};
use crate::migration::protocol::{MAX_TASKS, Message, variant};
use crate::migration::recovery::decide;
use crate::tasks::locks::{self, HeldLock};
use crate::tasks::settings::{self, Setting};
use crate::tasks::sockets::{self as task_sockets, SocketSettings};

/// A phase, with what is known in it.
#[derive(Debug)]
pub(super) enum Phase {
    /// The source has its answer, and may change its mind: nothing is made.
    Asked {
        /// Files are to be copied.
        copies: bool,
        /// The container is an engine's.
        engine: bool,
        /// The engine lacks its image, which is to come.
        image: bool,
    },
    /// The container runs on the source: files and memory come, the runtime is on its way.
    Preparing(Preparing),
    /// It is frozen there: its image files come, and the last pages.
    Frozen {
        /// What was said of its sockets so far.
        sockets: Vec<SocketSettings>,
        /// Pages that stay there until after the commit, when all others have come.
        left: Option<u64>,
    },
    /// CRIU restores it.
    Restoring {
        /// What it is like.
        dumped: Box<Dumped>,
        /// See [`Phase::Frozen`].
        left: Option<u64>,
        /// Its tasks are there, and held.
        restored: bool,
    },
    /// Its memory is compared with the source's.
    Comparing {
        /// See [`Phase::Frozen`].
        left: u64,
    },
    /// Restored, and held before its first instruction.
    Ready(Ready),
    /// It is ours, and may run: see [`Outstanding`].
    Running,
}

/// A copy that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ready {
    /// See [`Phase::Frozen`].
    left: u64,
    /// The link to the source works, as far as is known.
    pub(super) link: bool,
}

/// How far everything is before the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Preparing {
    files: Files,
    engine: Making,
    /// The runtime is held where it would read image files.
    held: bool,
}

/// Files that are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Files {
    /// There are none.
    Nothing,
    Coming,
    /// They are in their places.
    Put,
}

/// The engine that makes the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Making {
    /// There is none.
    Nobody,
    /// It lacks the image.
    Lacks,
    /// What it has to know has not come.
    Waits,
    Knows,
    /// It was asked to.
    Makes,
    /// It has called its runtime.
    Called,
}

/// What the source tells of the container that it has dumped.
#[derive(Debug)]
pub(super) struct Dumped {
    /// Its tasks, as it numbers them.
    pub(super) tasks: Vec<i32>,
    /// Number of connections that have come beside the images.
    pub(super) connections: usize,
    pub(super) locks: Vec<HeldLock>,
    pub(super) settings: Vec<Setting>,
    pub(super) renamed: Vec<Renamed>,
    pub(super) sockets: Vec<SocketSettings>,
}

/// What happens, as far as it has its place.
#[derive(Debug)]
pub(super) enum Event {
    /// The source has: decided that it shall be; told the engine's part; said that the engine is to begin;
    /// sent all files once.
    Prepare,
    /// A part of the engine's image comes; that was all of it.
    ImagePart,
    ImageSent,
    Papers,
    Engage,
    Copied,
    /// The engine has called its runtime; a runtime is held.
    Called,
    Held,
    /// Connections are announced.
    Connections,
    /// A piece of a file comes.
    File,
    /// The freeze begins.
    Freezing,
    Sockets(Vec<SocketSettings>),
    /// All image files have come.
    Dumped(Box<Dumped>),
    /// No page comes before the commit, and so many are left.
    MemoryDone(u64),
    /// CRIU has restored the tasks.
    Restored,
    /// Everything is in: it is to be compared; so are digests that have come; it is to be held.
    Compare,
    Digests,
    Hold,
}

impl Phase {
    /// Returns what comes of an event, which is not done yet.
    ///
    /// # Errors
    /// One that does not belong here, or more than any container has.
    pub(super) fn step(self, event: Event) -> Result<Phase> {
        Ok(match (self, event) {
            (Phase::Asked { copies, engine, image }, Event::Prepare) => {
                Phase::Preparing(Preparing {
                    files: if copies { Files::Coming } else { Files::Nothing },
                    engine: match (engine, image) {
                        (false, _) => Making::Nobody,
                        (true, true) => Making::Lacks,
                        (true, false) => Making::Waits,
                    },
                    held: false,
                })
            }
            (Phase::Preparing(now), event) => now.step(event)?,

            (Phase::Frozen { mut sockets, left }, Event::Sockets(list)) => {
                sockets.extend(list);
                task_sockets::validate(&sockets)?;
                Phase::Frozen { sockets, left }
            }
            (Phase::Frozen { sockets, left: None }, Event::MemoryDone(left)) => {
                Phase::Frozen { sockets, left: Some(left) }
            }
            (Phase::Frozen { sockets, left }, Event::Dumped(mut dumped)) => {
                dumped.validate()?;
                dumped.sockets = sockets;
                Phase::Restoring { dumped, left, restored: false }
            }
            (now @ Phase::Frozen { .. }, Event::File) => now,

            (Phase::Restoring { dumped, left: None, restored }, Event::MemoryDone(left)) => {
                Phase::Restoring { dumped, left: Some(left), restored }
            }
            (Phase::Restoring { dumped, left, restored: false }, Event::Restored) => {
                Phase::Restoring { dumped, left, restored: true }
            }
            (Phase::Restoring { left: Some(left), restored: true, .. }, Event::Compare) => {
                Phase::Comparing { left }
            }
            (Phase::Restoring { left: Some(left), restored: true, .. }, Event::Hold) => {
                Phase::Ready(Ready { left, link: true })
            }

            (now @ Phase::Comparing { .. }, Event::Digests) => now,
            (Phase::Comparing { left }, Event::Hold) => Phase::Ready(Ready { left, link: true }),

            (now, event) => return Err(now.refuse(&variant(&event))),
        })
    }

    /// Tells whether packets for the container are kept: some come from the freeze on.
    pub(super) fn takes_packets(&self) -> bool {
        !matches!(self, Phase::Asked { .. } | Phase::Preparing(_))
    }

    /// Returns what is told of something that does not belong here.
    pub(super) fn refuse(&self, what: &str) -> anyhow::Error {
        anyhow!("the source does not follow the protocol: {what} does not belong {}", self.place())
    }

    /// The same of a message.
    pub(super) fn refuse_message(&self, message: &Message) -> anyhow::Error {
        self.refuse(&variant(message))
    }

    /// What the diagram calls it.
    #[cfg(test)]
    fn name(&self) -> &'static str {
        match self {
            Phase::Asked { .. } => "Asked",
            Phase::Preparing(_) => "Preparing",
            Phase::Frozen { .. } => "Frozen",
            Phase::Restoring { .. } => "Restoring",
            Phase::Comparing { .. } => "Comparing",
            Phase::Ready(_) => "Ready",
            Phase::Running => "Running",
        }
    }

    /// For people.
    fn place(&self) -> &'static str {
        match self {
            Phase::Asked { .. } => "before everything is made ready",
            Phase::Preparing(_) => "where files and memory come, or comes too early, or again",
            Phase::Frozen { .. } => "where image files come",
            Phase::Restoring { .. } => "where the container is restored",
            Phase::Comparing { .. } => "where memory is compared",
            Phase::Ready(_) => "where the verdict is awaited",
            Phase::Running => "where the container runs",
        }
    }
}

impl Ready {
    /// Returns what is to come when the source says that it is ours.
    pub(super) fn commit(self, copied: bool) -> Outstanding {
        Outstanding::new(self.link, !copied, self.left)
    }

    /// Returns what is decided by, when somebody asks.
    pub(super) fn phase(self) -> decide::CopyPhase {
        decide::CopyPhase::Held { lacking: self.left > 0 }
    }
}

impl Preparing {
    /// Tells whether the engine's image is to come.
    pub(super) fn lacks_image(self) -> bool {
        self.engine == Making::Lacks
    }

    fn step(mut self, event: Event) -> Result<Phase> {
        match (event, self.files, self.engine, self.held) {
            (Event::ImagePart, _, Making::Lacks, false) => {}
            (Event::ImageSent, _, Making::Lacks, false) => self.engine = Making::Waits,
            (Event::Papers, _, Making::Waits, false) => self.engine = Making::Knows,
            (Event::Copied, Files::Coming, _, false) => self.files = Files::Put,
            (Event::Engage, Files::Put, Making::Knows, false) => self.engine = Making::Makes,
            (Event::Called, _, Making::Makes, false) => self.engine = Making::Called,
            (Event::Held, Files::Nothing | Files::Put, Making::Nobody | Making::Called, false) => {
                self.held = true
            }
            (Event::File | Event::Connections, ..) => {}
            (Event::Freezing, _, _, true) => {
                return Ok(Phase::Frozen { sockets: Vec::new(), left: None });
            }
            (event, ..) => return Err(Phase::Preparing(self).refuse(&variant(&event))),
        }
        Ok(Phase::Preparing(self))
    }
}

impl Dumped {
    fn validate(&self) -> Result<()> {
        if self.tasks.len() > MAX_TASKS || self.locks.len() > locks::MOST {
            bail!("a container of {} tasks, {} locks", self.tasks.len(), self.locks.len());
        }
        settings::validate(&self.settings)?;
        sockets::validate(&self.renamed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The module's head, which docs/internals.md has, too.
    const HEAD: &str = include_str!("mod.rs");

    fn dumped() -> Box<Dumped> {
        Box::new(Dumped {
            tasks: vec![1],
            connections: 0,
            locks: Vec::new(),
            settings: Vec::new(),
            renamed: Vec::new(),
            sockets: Vec::new(),
        })
    }

    /// One of each.
    fn events() -> Vec<Event> {
        vec![
            Event::Prepare,
            Event::ImagePart,
            Event::ImageSent,
            Event::Papers,
            Event::Engage,
            Event::Copied,
            Event::Called,
            Event::Held,
            Event::Connections,
            Event::File,
            Event::Freezing,
            Event::Sockets(Vec::new()),
            Event::Dumped(dumped()),
            Event::MemoryDone(3),
            Event::Restored,
            Event::Compare,
            Event::Digests,
            Event::Hold,
        ]
    }

    /// Returns what leads to each phase, with and without all that is optional before it.
    fn ways() -> Vec<(bool, Vec<Event>)> {
        let engine = || {
            let image = [Event::Prepare, Event::ImagePart, Event::ImageSent];
            let first = [Event::Papers, Event::File, Event::Copied, Event::Engage];
            image.into_iter().chain(first).chain([Event::Called, Event::Held, Event::Connections])
        };
        let frozen = || {
            let first = [Event::Prepare, Event::Held, Event::Freezing];
            first.into_iter().chain([Event::Sockets(Vec::new()), Event::File])
        };
        let done = || [Event::Dumped(dumped()), Event::Restored, Event::MemoryDone(3)];
        vec![
            (false, vec![]),
            (true, engine().collect()),
            (false, frozen().collect()),
            (true, engine().chain([Event::Freezing]).chain(done()).collect()),
            (false, frozen().chain([Event::MemoryDone(0)]).collect()),
            (false, frozen().chain(done()).collect()),
            (false, frozen().chain(done()).chain([Event::Hold]).collect()),
            (false, frozen().chain(done()).chain([Event::Compare, Event::Digests]).collect()),
            (false, frozen().chain(done()).chain([Event::Compare, Event::Hold]).collect()),
        ]
    }

    fn go(engine: bool, way: Vec<Event>) -> Result<Phase> {
        way.into_iter()
            .try_fold(Phase::Asked { copies: engine, engine, image: engine }, Phase::step)
    }

    /// Every phase that any beginning of a way leads to.
    fn phases() -> Vec<Phase> {
        let mut all = Vec::new();
        for (number, (_, way)) in ways().iter().enumerate() {
            for end in 0..=way.len() {
                let (engine, mut way) = ways().swap_remove(number);
                way.truncate(end);
                all.push(go(engine, way).unwrap());
            }
        }
        all
    }

    /// The picture holds every way from one phase to another, and no other.
    #[test]
    fn the_picture_is_what_happens() {
        let mut drawn = BTreeSet::new();
        for line in HEAD.lines().filter_map(|line| line.strip_prefix("//!")) {
            let words: Vec<_> = line.split_whitespace().collect();
            for five in words.windows(5) {
                if let [from, "──", event, "─▶", to] = five {
                    drawn.insert((*from, (*event).to_owned(), *to));
                }
            }
        }

        let mut done = BTreeSet::new();
        for number in 0..phases().len() {
            for event in events() {
                let phase = phases().swap_remove(number);
                let (from, by) = (phase.name(), variant(&event));
                if let Phase::Ready(ready) = &phase {
                    let _: Outstanding = ready.commit(false);
                    done.insert((from, "Commit".to_owned(), Phase::Running.name()));
                }

                if let Ok(next) = phase.step(event)
                    && next.name() != from
                {
                    done.insert((from, by, next.name()));
                }
            }
        }
        assert_eq!(drawn, done);
    }

    #[test]
    fn what_comes_twice_or_too_early_is_refused() {
        let prepared = || vec![Event::Prepare, Event::Held, Event::Freezing];
        let with = |more: Vec<Event>| go(false, prepared().into_iter().chain(more).collect());
        for (what, wrong) in [
            ("two dumps", with(vec![Event::Dumped(dumped()), Event::Dumped(dumped())])),
            ("no more memory, twice", with(vec![Event::MemoryDone(0), Event::MemoryDone(1)])),
            ("files of what is being restored", with(vec![Event::Dumped(dumped()), Event::File])),
            ("a copy that is not restored", with(vec![Event::Dumped(dumped()), Event::Hold])),
            ("a freeze before all is ready", go(false, vec![Event::Prepare, Event::Freezing])),
            ("files that were not announced", go(false, vec![Event::Prepare, Event::Copied])),
            ("an engine that there is not", go(false, vec![Event::Prepare, Event::Papers])),
            ("an engine without its image", go(true, vec![Event::Prepare, Event::Papers])),
            ("an engine that knows nothing", go(true, vec![Event::Prepare, Event::Engage])),
            ("memory before all is ready", go(false, vec![Event::Prepare, Event::MemoryDone(0)])),
        ] {
            let told = wrong.expect_err(what).to_string();
            assert!(told.contains("does not follow the protocol"), "{what}: {told}");
        }
        let mut large = dumped();
        large.tasks = vec![1; MAX_TASKS + 1];
        assert!(with(vec![Event::Dumped(large)]).is_err());
    }

    #[test]
    fn packets_come_from_the_freeze_on() {
        for phase in phases() {
            let early = ["Asked", "Preparing"].contains(&phase.name());
            assert_eq!(phase.takes_packets(), !early, "{phase:?}");
        }
    }
}
