//! What there is: two hosts, what is on their disks, who lives, and what is on its way between them.

use super::super::*;
use crate::migration::journal::State;
use crate::migration::protocol::{Standing, Verdict};

/// The states in a journal, and how many of them are on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lines {
    all: [State; 8],
    count: u8,
    durable: u8,
}

impl Lines {
    pub fn new() -> Lines {
        Lines { all: [State::Begun; 8], count: 1, durable: 1 }
    }

    pub fn note(&mut self, state: State) {
        self.all[usize::from(self.count)] = state;
        self.count += 1;
    }

    pub fn sync(&mut self) {
        self.durable = self.count;
    }

    pub fn write(&mut self, state: State) {
        self.note(state);
        self.sync();
    }

    pub fn last(&self) -> State {
        self.all[usize::from(self.count) - 1]
    }

    pub fn have(&self, state: State) -> bool {
        self.all[..usize::from(self.count)].contains(&state)
    }

    /// As [`crate::migration::journal::Journal::may_have_run`].
    pub fn may_have_run(&self) -> bool {
        let last = |state| self.all[..usize::from(self.count)].iter().rposition(|s| *s == state);
        last(State::Committed) > last(State::Unstarted)
    }

    /// Returns what a crash of the host may leave.
    pub fn crashed(&self) -> impl Iterator<Item = Lines> + use<> {
        let all = *self;
        (all.durable..=all.count).map(move |n| {
            let mut all = all;
            all.all[usize::from(n)..].fill(State::Begun);
            (all.count, all.durable) = (n, n);
            all
        })
    }
}

/// A question over a link of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    Not,
    Sent(Option<Verdict>),
    /// The answer; `None` where none has come.
    Back(Option<Standing>),
}

/// Undoing on the source, step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Back {
    Note,
    Thaw,
    Over,
}

/// Whoever decides after the commit, or settles what was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    pub there: There,
    pub ask: Ask,
}

pub const NEW: Round = Round { there: There::Unasked, ask: Ask::Not };

/// What one of them is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Doing {
    Round(Round),
    Back(Back),
    /// The frozen tasks have ended; the journal does not say so yet.
    Ended,
    Tell(Ask),
}

/// `ferry migrate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Migrate {
    /// The container runs.
    Copying,
    /// It is frozen, and all of it that goes before the commit has gone.
    Sent,
    /// The line is written, and not on the disk for certain.
    Noted,
    Committed,
    /// `Commit` was said.
    HandedOn,
    Looks(Doing),
    /// Giving up, `Abort` not said yet.
    GivesUp,
    Undoes(Back),
    /// Everything is undone: waits for the destination to say so, too.
    Undone,
    Gone,
}

/// The source's guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guard {
    Watches,
    /// Ferry has said that the container runs on.
    Told,
    Does(Doing),
    Gone,
}

/// `ferry resolve`, by hand or by the unit that asks again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Resolve {
    pub word: Option<OperatorWord>,
    pub unit: bool,
    pub doing: Doing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Container {
    Running,
    Frozen,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    pub lines: Lines,
    pub container: Container,
    pub rebooted: bool,
    pub migrate: Migrate,
    pub guard: Guard,
    pub resolve: Option<Resolve>,
    /// The destination has said that it has nothing.
    pub heard: bool,
}

/// `ferry receive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Receive {
    Arriving,
    Held,
    /// The line is written.
    Starting,
    /// The copy has been let run.
    Released,
    /// What its guard needs not know any more is noted.
    Running,
    /// The journal says that it is whole.
    Whole,
    /// The copy is gone.
    Undoing,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pager {
    Watches,
    /// The copy is gone.
    Discards,
    /// In the place of Ferry: about to let the copy run.
    GoesOn,
    /// It has.
    Fills,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Copy {
    None,
    Held,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    pub lines: Lines,
    pub copy: Copy,
    /// Pages stay on the source until after the commit.
    pub lacking: bool,
    /// All of its memory is in.
    pub all_in: bool,
    /// That is noted, until the next boot.
    pub noted: bool,
    pub rebooted: bool,
    pub receive: Receive,
    pub pager: Pager,
}

/// What goes over the migration's own link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Said {
    Ready,
    Whole,
    Undone,
    Commit,
    Abort,
    Finished,
}

/// One direction: in order, and each end hears the link's end in its own time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Way {
    queue: [Option<Said>; 3],
    /// The end that reads has heard that the link has ended.
    pub ended: bool,
}

impl Way {
    pub fn new() -> Way {
        Way { queue: [None; 3], ended: false }
    }

    pub fn push(&mut self, word: Said) {
        if let Some(place) = self.queue.iter_mut().find(|w| w.is_none()) {
            *place = Some(word);
        }
    }

    pub fn next(&self) -> Option<Said> {
        self.queue[0].filter(|_| !self.ended)
    }

    pub fn drop_next(&mut self) {
        self.queue.rotate_left(1);
        self.queue[2] = None;
    }

    pub fn end(&mut self) {
        *self = Way { queue: [None; 3], ended: true };
    }
}

/// What the hosts cannot know, and is held against them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Past {
    /// The container has run on the source since it was frozen.
    pub ran_on: bool,
    /// The copy has run.
    pub ran_there: bool,
    /// With all of its memory.
    pub whole_there: bool,
    /// An operator has said what makes two copies if it is wrong.
    pub unsafe_word: bool,
    /// An operator has given a copy up.
    pub given_up: bool,
    /// The migration was given up with the container there.
    pub stayed: bool,
    /// The copy has died of something that was done to it, or before its memory was all in.
    pub lost: bool,
    /// The source's guard was killed.
    pub unguarded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub a: Source,
    pub b: Destination,
    pub to_b: Way,
    pub to_a: Way,
    /// The link has ended.
    pub broken: bool,
    /// The hosts reach each other.
    pub reach: bool,
    /// All that goes before the commit is on its way.
    pub sent: bool,
    /// Verdicts of questions whose askers have gone: come late, twice, again and again.
    pub stray_commit: bool,
    pub stray_abort: bool,
    pub faults: u8,
    pub words: u8,
    pub past: Past,
    pub wrong: Option<&'static str>,
}

impl World {
    pub fn new(lacking: bool, faults: u8, words: u8) -> World {
        World {
            a: Source {
                lines: Lines::new(),
                container: Container::Running,
                rebooted: false,
                migrate: Migrate::Copying,
                guard: Guard::Watches,
                resolve: None,
                heard: false,
            },
            b: Destination {
                lines: Lines::new(),
                copy: Copy::None,
                lacking,
                all_in: false,
                noted: false,
                rebooted: false,
                receive: Receive::Arriving,
                pager: Pager::Gone,
            },
            to_b: Way::new(),
            to_a: Way::new(),
            broken: false,
            reach: true,
            sent: false,
            stray_commit: false,
            stray_abort: false,
            faults,
            words,
            past: Past::default(),
            wrong: None,
        }
    }

    /// The container's tasks on the source, as they are seen there.
    pub fn tasks(&self) -> Tasks {
        match self.a.container {
            Container::None if self.a.rebooted => Tasks::Rebooted,
            Container::None => Tasks::Ended,
            _ => Tasks::Here,
        }
    }

    /// It runs on on the source.
    pub fn thaw(&mut self) {
        if self.a.container != Container::Frozen {
            return;
        }
        self.a.container = Container::Running;
        self.past.ran_on = true;
        if !self.past.unsafe_word {
            if self.b.copy == Copy::Running {
                self.wrong = Some("two copies run");
            } else if self.past.ran_there {
                self.wrong = Some("it is taken back, and has run there");
            }
        }
    }

    /// What is frozen on the source ends.
    pub fn end_frozen(&mut self) {
        if self.a.container == Container::Frozen && !self.past.whole_there && !self.past.unsafe_word
        {
            self.wrong = Some("what is frozen is ended, and has never run there as a whole");
        }
        if self.a.container == Container::Running {
            self.wrong = Some("what runs is ended");
        }
        self.a.container = Container::None;
    }

    /// The copy is let run.
    pub fn let_run(&mut self) {
        if self.b.copy != Copy::Held {
            return;
        }
        self.b.copy = Copy::Running;
        self.past.ran_there = true;
        self.past.whole_there |= self.b.all_in;
        if !self.b.lines.have(State::Committed) {
            self.wrong = Some("it runs, and nothing says that it may");
        }
        if !self.past.unsafe_word {
            if self.a.container == Container::Running {
                self.wrong = Some("two copies run");
            } else if self.past.ran_on {
                self.wrong = Some("what is let run is older than what ran on the source");
            }
        }
    }

    /// Memory counts as in when that is noted.
    pub fn pages_in(&mut self) {
        (self.b.all_in, self.b.noted) = (true, true);
        self.past.whole_there |= self.b.copy == Copy::Running;
    }

    /// The copy is ended, by somebody who has decided so.
    pub fn discard(&mut self) {
        let excused = self.past.unsafe_word || self.past.given_up || self.past.stayed;
        match self.b.copy {
            Copy::Running if self.b.all_in && !self.past.unsafe_word => {
                self.wrong = Some("a copy is discarded that runs with all of its memory");
            }
            // Before its pages are in it cannot run without the source; when its Ferry has been killed,
            // nobody can let it run any more.
            Copy::Held
                if self.b.all_in
                    && self.b.receive != Receive::Gone
                    && self.a.container == Container::None
                    && !excused =>
            {
                self.wrong = Some("the last copy is discarded");
            }
            _ => {}
        }
        self.past.lost |= self.b.copy != Copy::None && !self.b.all_in;
        self.b.copy = Copy::None;
    }

    /// Somebody has died on the destination: what needs him goes with him.
    pub fn bereave(&mut self) {
        if self.b.receive != Receive::Gone || self.b.pager != Pager::Gone {
            return;
        }
        match self.b.copy {
            // CRIU gives up.
            Copy::Held => self.lose(),
            // It reads zeros where pages are missing.
            Copy::Running | Copy::None => {}
        }
    }

    /// The copy dies.
    pub fn lose(&mut self) {
        self.past.lost |= self.b.copy != Copy::None;
        self.b.copy = Copy::None;
    }

    pub fn stray(&mut self, ask: Ask) {
        match ask {
            Ask::Sent(Some(Verdict::Commit)) => self.stray_commit = true,
            Ask::Sent(Some(Verdict::Abort)) => self.stray_abort = true,
            _ => {}
        }
    }
}
