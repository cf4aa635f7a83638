//! Files whose changes may leave no trace: what processes map and hold open for writing.

use std::collections::HashSet;
use std::fs::{self, Metadata};

use anyhow::Result;

use super::overlay::Merged;
use crate::sys::process::{proc_head, proc_text};

/// Files by device and inode.
pub type Inodes = HashSet<(u64, u64)>;

/// Files that these processes may write to without a trace: mapped shared, and for writing. Those of
/// an overlay are told as they are in its upper layer.
/// Processes that have just ended are left out.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn mapped(pids: &[i32], merged: &mut Merged) -> Result<Inodes> {
    let mut found = Inodes::new();
    for pid in pids {
        let Ok(maps) = proc_text(*pid, "maps") else { continue };
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(range), Some(may)) = (words.next(), words.next()) else { continue };
            if !may.contains('w') || !may.ends_with('s') {
                continue;
            }
            // The device in the text is not always the one that stat(2) tells (btrfs, overlay).
            let link = format!("/proc/{pid}/map_files/{range}");
            let meta = fs::metadata(&link).ok().filter(Metadata::is_file);
            found.extend(meta.map(|m| merged.inode(link.as_ref(), &m)));
        }
    }
    Ok(found)
}

/// Files that these processes, which stand still, have open for writing: what they wrote last may
/// bear an older time.
///
/// # Errors
/// When one of them is gone.
pub fn open_for_writing(pids: &[i32], merged: &mut Merged) -> Result<Inodes> {
    let mut found = Inodes::new();
    for pid in pids {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            let Some(meta) = fs::metadata(&path).ok().filter(Metadata::is_file) else { continue };
            let number = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let info = proc_head(*pid, &format!("fdinfo/{number}"))?;
            let flags = info.lines().find_map(|l| l.strip_prefix("flags:"));
            let flags = flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok()).unwrap_or(0);
            if flags & libc::O_ACCMODE != libc::O_RDONLY {
                found.insert(merged.inode(&path, &meta));
            }
        }
    }
    Ok(found)
}
