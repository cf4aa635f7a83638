//! Names that lead to unix sockets, and are not those that they were bound to: haproxy binds one, and renames
//! the file; supervisord links it to another, and removes the first.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{DirEntryExt, FileTypeExt};
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;

use super::losses::directory_in;
use crate::network::unix;
use crate::sys::process;

/// Names that are looked at, in all directories together.
const MOST_NAMES: usize = 1_000_000;

/// A socket that others find by another name than the one that it was bound to, in the same directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherName {
    /// The one that it was bound to.
    pub bound: PathBuf,
    /// The other.
    pub current: PathBuf,
    /// The first name leads somewhere, too: to it, by a link, or to something else.
    pub taken: bool,
}

/// Returns those of the sockets with these inodes, in the namespaces of a process.
pub fn find(init: i32, own: &HashSet<u64>) -> Vec<OtherName> {
    let Ok(named) = unix::named_sockets(init) else { return Vec::new() };
    let mut by_directory: BTreeMap<PathBuf, Vec<(PathBuf, u32)>> = BTreeMap::new();
    for one in named.into_iter().filter(|one| own.contains(&u64::from(one.inode))) {
        let Some(above) = one.name.parent() else { continue };
        by_directory.entry(above.to_owned()).or_default().push((one.name, one.file));
    }
    let (root, mut left) = (process::root_of(init), MOST_NAMES);
    by_directory
        .into_iter()
        .flat_map(|(above, sockets)| other_names(&root, &above, &sockets, &mut left))
        .collect()
}

/// Of sockets that were bound in a directory, by the inodes of their files: the names there that lead to such a
/// file, where that is not the one it was bound to, or not the only one. `left`: names that may still be
/// looked at.
fn other_names(
    root: &Path,
    above: &Path,
    sockets: &[(PathBuf, u32)],
    left: &mut usize,
) -> Vec<OtherName> {
    let listed = directory_in(root, above)
        .and_then(|directory| Some((fs::read_dir(process::path_of(&directory)).ok()?, directory)));
    let Some((list, directory)) = listed else { return Vec::new() };
    let files: HashMap<u32, &PathBuf> = sockets.iter().map(|(name, file)| (*file, name)).collect();
    let mut found = Vec::new();
    for entry in list.flatten().take(*left) {
        *left -= 1;
        let Some(bound) = files.get(&(entry.ino() as u32)) else { continue };
        let Some(last) = bound.file_name().filter(|last| *last != entry.file_name()) else {
            continue;
        };

        if !entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            continue;
        }
        let taken = fstatat(&directory, last, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok();
        let current = above.join(entry.file_name());
        found.push(OtherName { bound: (*bound).clone(), current, taken });
    }

    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_renamed_socket_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let bound = dir.path().join("bound");
        let _socket = UnixListener::bind(&bound).unwrap();
        let file = fs::metadata(&bound).unwrap().ino() as u32;
        let sockets = [(bound.clone(), file)];
        let look =
            || other_names(Path::new("/"), dir.path(), &sockets, &mut MOST_NAMES.clone()).pop();
        assert_eq!(look(), None);
        let current = dir.path().join("other");
        fs::rename(&bound, &current).unwrap();
        let found = |taken| OtherName { bound: bound.clone(), current: current.clone(), taken };
        assert_eq!(look(), Some(found(false)));
        fs::hard_link(&current, &bound).unwrap();
        assert_eq!(look(), Some(found(true)));
        fs::remove_file(&bound).unwrap();
        fs::remove_file(&current).unwrap();
        assert_eq!(look(), None, "it is simply gone");
    }
}
