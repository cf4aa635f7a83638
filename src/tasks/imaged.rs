//! Memory and files that CRIU puts among its images, in the freeze: what tasks share and what has no
//! name. The images are in memory, so there must be room for it a second time, on both hosts.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sys::maps;
use crate::sys::process::proc_text;

/// Returns how many bytes these are: shared memory without a name in any file system (mmap(2), shmget(2),
/// memfd_create(2)) and open files that have lost theirs, each once however many tasks have it.
pub fn bytes(pids: &[i32]) -> u64 {
    let mut found = HashMap::new();
    let mut add = |path: &Path| {
        if let Some(meta) = fs::metadata(path).ok().filter(is_nameless) {
            found.insert((meta.dev(), meta.ino()), meta.blocks() * 512);
        }
    };
    for pid in pids {
        // Whoever has ended meanwhile has none.
        let text = proc_text(*pid, "maps").unwrap_or_default();
        for line in text.lines() {
            let shared = maps::Mapping::parse(line).is_some_and(|m| m.is_shared() && m.inode != 0);
            if let (true, Some((range, _))) = (shared, line.split_once(' ')) {
                add(&Path::new("/proc").join(pid.to_string()).join("map_files").join(range));
            }
        }
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.for_each(|entry| add(&entry.path()));
    }
    found.values().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes))
}

fn is_nameless(meta: &Metadata) -> bool {
    meta.is_file() && meta.nlink() == 0
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_has_no_name_counts_once() {
        let own = [std::process::id() as i32];
        let before = bytes(&own);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 64 << 20]).unwrap();
        file.sync_all().unwrap();
        let other = file.try_clone().unwrap();
        let after = bytes(&[own[0], own[0]]);
        drop(other);
        // Other tests come and go meanwhile, with less.
        assert!((64 << 20..112 << 20).contains(&(after - before.min(after))), "{before} {after}");
    }
}
