//! What a checkpoint loses, changes or stumbles over, found while the container still runs.
//!
//! Each rule looks at what the kernel tells of the container's tasks in `/proc`, and says what it has
//! found as a [`Problem`]: one that stops the migration where data or safety would be lost, a warning
//! where something is only not as it was.

pub mod strangers;

use super::{aio, sleepers};
use crate::network::problem::Problem;

/// What the rules look at.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// The container's first process.
    pub init: i32,
    /// All processes of its control group.
    pub tasks: &'a [i32],
}

/// Everything that shows here: obstacles and warnings.
pub fn problems(scene: Scene<'_>) -> Vec<Problem> {
    let mut found = Vec::new();
    found.extend(strangers::problems(scene));
    found.extend(aio::problem(&aio::rings(scene.tasks)));
    found.extend(sleepers::problem(scene.tasks));
    found
}

/// The value of a line of `/proc/PID/status`. proc_pid_status(5)
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let status = "Name:\tPPid:\nNSpid:\t7\t1\nPid:\t7\nPPid:\t3\n";
        assert_eq!(field(status, "Pid"), Some("7"));
        assert_eq!(field(status, "PPid"), Some("3"));
        assert_eq!(field(status, "Uid"), None);
    }
}
