//! Where the kernel itself writes into the memory of tasks that do not run: the areas for restartable
//! sequences, one for each thread. rseq(2)

use anyhow::{Context, Result};

use super::freezer::of_first_space;
use crate::memory::digest::{MOST_MASKS, Mask};
use crate::sys::inject;
use crate::sys::stopped::Stopped;

/// Returns those of all threads of restored tasks, each of which is stopped for a moment.
///
/// # Errors
/// When a thread cannot be stopped.
pub fn areas(pids: &[i32]) -> Result<Vec<Mask>> {
    let mut found = Vec::new();
    for task in of_first_space(pids)? {
        for tid in inject::threads(task.pid)? {
            let stopped = Stopped::new(tid).with_context(|| format!("stopping thread {tid}"))?;
            let area = stopped.sequences();
            found.extend(area.map(|(at, length)| Mask { vpid: task.vpid, at, length }));
        }
    }
    found.truncate(MOST_MASKS);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn every_program_of_glibc_has_one() {
        let mut child = Command::new("sh")
            .args(["-c", "echo; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = child.id() as i32;
        // Of both, or of neither.
        let own = Stopped::new(pid).unwrap().sequences().is_some();
        let found = areas(&[pid]).unwrap();
        assert_eq!(found.len(), usize::from(own));
        assert!(found.iter().all(|mask| mask.length >= 20 && mask.at % 4 == 0), "{found:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
