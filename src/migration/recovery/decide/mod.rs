//! The decisions of the hand-over: which of the two hosts runs the container, told from the states
//! that its processes and journals can be in. Pure functions, one for each of those who decide; what
//! acts, calls exactly these, and `explore` tries them against each other, whatever dies or is lost.
//!
//! ```text
//! who                                   decides by              from
//! the source's guard, Ferry gone        guard                   its journal, Ferry's last word
//! `ferry migrate` and that guard after  resolve                 its journal, its tasks, the answer
//! the commit, `ferry resolve` there
//! who tells that it stayed              has_heard               the answer
//! `ferry receive`, at each message      hear                    how far it is
//! its guard, Ferry gone                 pages, released         its journal, what is in
//! a question there, nobody left         answer                  its journal, what runs
//! ```
//!
//! What holds of them together, whoever is killed, whichever host goes down, and whatever message is
//! lost or late, as long as no operator says otherwise:
//!
//! * never do two copies run;
//! * a copy that is let run is not older than one that has run;
//! * what is discarded has not run, or has not all of its memory;
//! * where the source takes it back, it has not run on the destination;
//! * as long as both hosts are up and reach each other, it runs, or somebody goes on until it does;
//!   but where a copy that may have run is lost: whether time may go back, an operator says.

mod destination;
#[cfg(test)]
mod explore;
mod resolve;
mod source;

pub use destination::{
    Act, Answer, CopyEvent, CopyPhase, LeftCopy, Pages, Released, answer, hear, is_swept, pages,
    released,
};
pub use resolve::{Doubt, NextDeed, OperatorWord, Tasks, There, resolve};
pub use source::{Guarding, guard, has_heard};
