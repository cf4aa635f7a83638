//! The container's network, tried in namespaces of its own: needs root, and fails without.
//!
//! `cargo test --test network`; `-- --ignored` measures what is on the critical path.

#[path = "network/carry.rs"]
mod carry;
#[path = "network/fencing.rs"]
mod fencing;
#[path = "network/lab.rs"]
mod lab;
#[path = "network/measure.rs"]
mod measure;

use lab::Attachment::{Bridge, Macvlan};
use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments = Arguments::from_args();
    if let Ok(path) = std::env::var(fencing::RAISE_AND_EXIT) {
        return fencing::raise_and_exit(&path);
    }
    lab::leave_the_machine();
    let trial = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };

    let trials = vec![
        trial("round_trip_macvlan", || carry::round_trip("rtm", Macvlan)),
        trial("round_trip_bridge", || carry::round_trip("rtb", Bridge)),
        trial("placement_bridge_to_macvlan", carry::other_placement),
        trial("hand_over_macvlan", || carry::hand_over("hom", Macvlan)),
        trial("hand_over_bridge", || carry::hand_over("hob", Bridge)),
        trial("neighbours_after_a_hold_macvlan", || carry::hold("nhm", Macvlan)),
        trial("neighbours_after_a_hold_bridge", || carry::hold("nhb", Bridge)),
        trial("bridge_with_spanning_tree", carry::spanning_tree),
        trial("keep_a_prepared_namespace", carry::keep),
        trial("rollback_leaves_nothing", carry::rollback),
        trial("capture_refuses_what_it_cannot_carry", carry::capture_refuses),
        trial("usable_kernel_is_told_from_another", carry::usable),
        trial("image_of_a_bad_peer_is_refused", carry::bad_peer),
        trial("preflight_macvlan", || carry::preflight_finds("pfm", Macvlan)),
        trial("preflight_bridge", || carry::preflight_finds("pfb", Bridge)),
        trial("fence_is_silent_macvlan", || fencing::silent("fsm", Macvlan)),
        trial("fence_is_silent_bridge", || fencing::silent("fsb", Bridge)),
        trial("fence_outlives_its_process", fencing::outlives),
        trial("fence_without_egress", fencing::without_egress),
        trial("fence_new_only", fencing::new_only),
        trial("replay_macvlan", || fencing::replay("rpm", Macvlan)),
        trial("replay_bridge", || fencing::replay("rpb", Bridge)),
        trial("replay_large_segments_macvlan", || fencing::large_segments("lsm", Macvlan)),
        trial("replay_large_segments_bridge", || fencing::large_segments("lsb", Bridge)),
        trial("replay_refuses_bad_frames", fencing::bad_frames),
        trial("measure_macvlan", || measure::measure("mm", Macvlan)).with_ignored_flag(true),
        trial("measure_bridge", || measure::measure("mb", Bridge)).with_ignored_flag(true),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}
