//! What the destination does at each message, and what whoever is left there does.

use crate::migration::journal::State;
use crate::migration::protocol::{Standing, Verdict};

/// How far the destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyPhase {
    /// It takes the container in: there is no copy yet.
    Arriving,
    /// Restored, and held before its first instruction.
    Held {
        /// Pages are still on the source.
        lacking: bool,
    },
    /// The journal says that it may run.
    Started {
        /// Whether it runs.
        running: bool,
        /// All of its memory is in, and its files are on the disk.
        whole: bool,
        /// See [`CopyPhase::Held`].
        lacking: bool,
    },
}

/// What it hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyEvent {
    /// A verdict, over whichever link, or an operator's.
    Verdict(Verdict),
    /// A question.
    Asked,
    /// The link to the source has ended.
    Unlinked,
    /// The copy has died, or cannot be had.
    Broken,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It waits on.
    Wait,
    /// It undoes everything.
    Undo,
    /// It writes down that the copy may run, then lets it; if it cannot be written, it undoes.
    Run,
}

/// Returns what follows, and what is answered to whoever has asked: `None` where he is to ask again, when it
/// has come true.
///
/// An answer may come before it is true where it can only come true or, with whoever gives it, be
/// undone: the source lets go of nothing before it has heard that it runs, and takes nothing back
/// before it has heard that it never will.
pub fn hear(phase: CopyPhase, event: CopyEvent) -> (Act, Option<Standing>) {
    let now = phase.standing();
    match (phase, event) {
        (_, CopyEvent::Asked) => (Act::Wait, Some(now)),
        (CopyPhase::Arriving, CopyEvent::Verdict(Verdict::Commit)) => (Act::Wait, Some(now)),
        (CopyPhase::Arriving, _) => (Act::Undo, None),
        (CopyPhase::Held { .. }, CopyEvent::Verdict(Verdict::Commit)) => {
            (Act::Run, Some(Standing::Waiting))
        }
        (CopyPhase::Held { .. }, CopyEvent::Verdict(Verdict::Abort)) => {
            (Act::Undo, Some(Standing::NeverRan))
        }
        // A later link, or an operator, brings the verdict.
        (CopyPhase::Held { .. }, CopyEvent::Unlinked) => (Act::Wait, Some(now)),
        (CopyPhase::Held { .. }, CopyEvent::Broken) => (Act::Undo, None),
        (CopyPhase::Started { .. }, CopyEvent::Broken) => (Act::Undo, None),
        (CopyPhase::Started { .. }, CopyEvent::Verdict(_) | CopyEvent::Unlinked) => {
            (Act::Wait, Some(now))
        }
    }
}

impl CopyPhase {
    /// Returns what is said of it.
    pub fn standing(self) -> Standing {
        match self {
            CopyPhase::Arriving => Standing::Arriving,
            CopyPhase::Held { lacking: false } => Standing::Ready,
            CopyPhase::Held { lacking: true } => Standing::Lacking,
            CopyPhase::Started { running: true, whole: true, .. } => Standing::Running,
            CopyPhase::Started { running: true, whole: false, lacking: true } => Standing::Partial,
            CopyPhase::Started { .. } => Standing::Waiting,
        }
    }
}

/// What a destination's guard does when its Ferry has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// It is over.
    Nothing,
    /// It goes on filling the copy's memory, and lets it run where that has not been done yet.
    GoOn,
    /// It ends the copy, of which no task has run.
    Discard,
}

/// By the last line of its journal.
pub fn pages(state: State) -> Pages {
    match state {
        State::Finished | State::Aborted => Pages::Nothing,
        State::Committed | State::Whole => Pages::GoOn,
        State::Begun | State::Ready | State::Returning | State::Unstarted => Pages::Discard,
    }
}

/// What it does when CRIU has let the copy run, or has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// It does the rest of Ferry's work.
    Keep,
    /// It ends what is left.
    Discard,
}

/// `alive`: the copy's init process is there.
pub fn released(alive: bool) -> Released {
    if alive { Released::Keep } else { Released::Discard }
}

/// What is left on a destination whose processes have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftCopy {
    /// The last in its journal.
    pub state: State,
    /// The copy may have run: [`State::Committed`] is in it, and no [`State::Unstarted`] after that.
    pub started: bool,
    /// This host has not been started again since. What was not on the disk then is not in the
    /// journal now.
    pub same_boot: bool,
    /// A copy runs that is known to have all of its memory.
    pub whole: bool,
}

/// What whoever has asked does then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing; this is the answer.
    Is(Standing),
    /// The rest of Ferry's work.
    Keep,
    /// What is left goes.
    Discard {
        /// First it is written down that the copy may have run: nobody would know it afterwards.
        doubtful: bool,
    },
}

/// Decides what is answered, or done. After each but [`Answer::Is`] it is asked anew.
pub fn answer(left: LeftCopy) -> Answer {
    match left.state {
        State::Finished => Answer::Is(Standing::Running),
        State::Aborted if left.started => Answer::Is(Standing::Gone),
        // The line that would let it run was never written, and never will be.
        State::Aborted => Answer::Is(Standing::NeverRan),
        State::Whole => Answer::Keep,
        // Nothing that was lost with the host came before this line.
        State::Unstarted => Answer::Discard { doubtful: false },
        // It was about to write that down.
        State::Committed if left.whole => Answer::Keep,
        // Whoever held it has died, and the copy with it: held, or without all of its memory.
        _ => Answer::Discard { doubtful: !left.started && !left.same_boot },
    }
}

/// Tells whether a migration to this host is settled before another one of that container begins: what has
/// become of it can be seen.
pub fn is_swept(state: State, worker_lives: bool) -> bool {
    !state.is_over() && !worker_lives
}
