//! The fault matrix: what [`crate::faults`] does to one process of one kind of container, here happens to
//! two at once, to whole hosts, to links, disks and limits, with each kind of container that there is.
//!
//! After each case exactly one copy runs, or Ferry says that only an operator can decide, and how; no
//! client has had a wrong answer and no page is wrong; no connection is lost, but where the case's own
//! nature says so ([`ends::LOSES`]); and it can be migrated again.
//!
//! By default a sample. `FERRY_FULL=1` runs everything, which takes hours.

pub mod disks;
pub mod ends;
pub mod kinds;
pub mod limits;
pub mod links;
pub mod pairs;
pub mod reboots;
pub mod soak;

use libtest_mimic::Trial;

/// The suite.
pub fn trials() -> Vec<Trial> {
    let mut trials = pairs::trials();
    trials.extend(reboots::trials());
    trials.extend(links::trials());
    trials.extend(disks::trials());
    trials.extend(limits::trials());
    trials.extend(soak::trials());
    trials
}
