//! Memory and files that CRIU puts among its images, in the freeze: what tasks share and what has no
//! name. The images are in memory, so there must be room for it a second time, on both hosts.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sys::maps;
use crate::sys::process::proc_text;

/// How many bytes these are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImagedBytes {
    /// All of them.
    pub all: u64,
    /// Of these, shared memory that nobody has a name or a descriptor for: [`crate::memory::shared`] carries it, where
    /// CRIU need not see it.
    pub ahead: u64,
}

/// Returns how many bytes these are: shared memory without a name in any file system (mmap(2), shmget(2),
/// memfd_create(2)) and open files that have lost theirs, each once however many tasks have it.
pub fn bytes(pids: &[i32]) -> ImagedBytes {
    let mut found = HashMap::new();
    let mut add = |path: &Path, ahead: bool| {
        if let Some(meta) = fs::metadata(path).ok().filter(is_nameless) {
            let one = found.entry((meta.dev(), meta.ino())).or_insert((0, true));
            *one = (meta.blocks() * 512, one.1 && ahead);
        }
    };
    for pid in pids {
        // Whoever has ended meanwhile has none.
        let text = proc_text(*pid, "maps").unwrap_or_default();
        for line in text.lines() {
            let mapping = maps::Mapping::parse(line).filter(|m| m.is_shared() && m.inode != 0);
            if let (Some(mapping), Some((range, _))) = (mapping, line.split_once(' ')) {
                let path = Path::new("/proc").join(pid.to_string()).join("map_files").join(range);
                add(&path, mapping.is_nameless());
            }
        }
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.for_each(|entry| add(&entry.path(), false));
    }
    found.values().fold(ImagedBytes::default(), |sum, &(bytes, ahead)| ImagedBytes {
        all: sum.all.saturating_add(bytes),
        ahead: sum.ahead.saturating_add(if ahead { bytes } else { 0 }),
    })
}

fn is_nameless(meta: &Metadata) -> bool {
    meta.is_file() && meta.nlink() == 0
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_has_no_name_counts_once() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 64 << 20]).unwrap();
        file.sync_all().unwrap();
        let other = file.try_clone().unwrap();

        // Not in this process: other tests come and go in it, with such files of theirs.
        let mut command = Command::new("sleep");
        let command = command.arg("600").stdin(file).stdout(other).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let pid = child.id() as i32;
        let found = bytes(&[pid, pid]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, ImagedBytes { all: 64 << 20, ahead: 0 });
    }
}
