//! Directories that have got another name: the copy's get it, too, and what is in them does not go
//! again.
//!
//! A directory is known by its inode number, which another one may have by now. So nothing is
//! believed of what is in it: all that is below its new name is looked at and compared as ever. What
//! stands under a name in the copy and is not what has it here goes out of the way first, as it may
//! be met under another name later, when two have changed places; if nobody has met it when the
//! round is over, it is taken away.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs};

use super::{FollowedTree, Look, parent};
use crate::files::ops::{self, FileStep};
use crate::files::walk::SeenFile;

/// Each new name costs a look at every file that is known. What there would be beyond so many is
/// sent again instead: before the freeze, and in it.
const MOST_LOOKS: usize = 10_000_000;
const MOST_LOOKS_FROZEN: usize = 1_000_000;

/// What a round knows of it.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Where the copy has directories, by their inode numbers here; made when it is asked for.
    directories: Option<HashMap<u64, Vec<u8>>>,
    /// Names of what is out of the way.
    aside: BTreeSet<Vec<u8>>,
    looks: usize,
}

impl<W: Write> Look<'_, W> {
    /// Something is at this path that the copy does not have there: makes room for it, and if it is
    /// a directory that the copy has under another name, this becomes its name.
    pub(super) fn meet(
        &mut self,
        tree: &mut FollowedTree,
        path: &[u8],
        seen: &SeenFile,
    ) -> Result<()> {
        let stands = tree.known.get(path).is_some_and(|known| known.kind == libc::S_IFDIR);
        if self.round == 1 || path.is_empty() || !(stands || seen.is_dir()) || !tree.numbered {
            return Ok(());
        }
        if stands {
            let Some(aside) = self.free_name(tree) else { return Ok(()) };
            self.rename(tree, path, &aside)?;
            self.moves.aside.insert(aside);
        }
        let Some(before) = self.name_before(tree, path, seen) else { return Ok(()) };
        self.rename(tree, &before, path)?;
        self.moves.aside.remove(&before);
        // What is below and is not seen there any more is gone.
        self.emptied.insert(path.to_vec());
        Ok(())
    }

    /// Under which name the copy has this directory, if it can be renamed.
    fn name_before(
        &mut self,
        tree: &FollowedTree,
        path: &[u8],
        seen: &SeenFile,
    ) -> Option<Vec<u8>> {
        if !seen.is_dir() || !tree.has_directory(parent(path)) {
            return None;
        }
        if self.moves.directories.is_none() {
            self.afford(tree)?;
            let known = tree.known.iter().filter(|(_, known)| known.kind == libc::S_IFDIR);
            self.moves.directories = Some(known.map(|(p, known)| (known.ino, p.clone())).collect());
        }
        let before = self.moves.directories.as_ref()?.get(&seen.ino)?.clone();
        let known = tree.known.get(&before)?;
        let same = known.kind == libc::S_IFDIR && known.ino == seen.ino;
        let fits = !before.is_empty() && before != path && !is_in(path, &before);
        if !(same && fits && tree.has_directory(&before)) {
            return None;
        }
        self.afford(tree)?;
        Some(before)
    }

    /// A name at the top of the tree that nothing has; none if that would cost too much.
    fn free_name(&mut self, tree: &FollowedTree) -> Option<Vec<u8>> {
        self.afford(tree)?;
        let name = |n| format!(".ferry-aside-{}-{n}", self.round).into_bytes();
        (self.moves.aside.len()..).map(name).find(|name| !tree.known.contains_key(name))
    }

    /// One more look at all that is known, if that is not too much.
    fn afford(&mut self, tree: &FollowedTree) -> Option<()> {
        let most = if self.last { MOST_LOOKS_FROZEN } else { MOST_LOOKS };
        // From then on nothing is renamed any more: no half of two that belong together.
        self.moves.looks = self.moves.looks.saturating_add(tree.known.len());
        (self.moves.looks <= most).then_some(())
    }

    /// Gives a directory of the copy another name, and to all that is known of it and below.
    fn rename(&mut self, tree: &mut FollowedTree, from: &[u8], to: &[u8]) -> Result<()> {
        ops::write(self.out, &FileStep::Rename(from.to_vec(), to.to_vec()))?;
        let moves = |path: &[u8]| path == from || is_in(path, from);
        let moved = |path: &[u8]| [to, &path[from.len()..]].concat();
        tree.several.remove(to);
        let paths: Vec<_> = tree.known.keys().filter(|path| moves(path)).cloned().collect();
        for path in paths {
            let Some(known) = tree.known.remove(&path) else { continue };
            if known.kind == libc::S_IFDIR
                && let Some(directories) = &mut self.moves.directories
            {
                directories.insert(known.ino, moved(&path));
            }

            if tree.several.remove(&path) {
                tree.several.insert(moved(&path));
            }
            tree.known.insert(moved(&path), known);
        }

        for (name, _) in self.names.values_mut().filter(|(name, _)| moves(name)) {
            *name = moved(name);
        }
        let emptied: Vec<_> = self.emptied.extract_if(|path| moves(path)).collect();
        self.emptied.extend(emptied.iter().map(|path| moved(path)));

        // Times were to be set under the old names.
        let touched: Vec<_> = self.touched.iter().filter(|path| moves(path)).cloned().collect();
        let described: Vec<_> = self.described.extract_if(|path| moves(path)).collect();
        for path in touched.iter().chain(&described) {
            self.touched.remove(path);
            self.touched.insert(moved(path));
        }

        // They were not where they were looked for, and are looked at again.
        self.gone.retain(|path| !moves(path) && path != to);
        self.touch(from);
        self.touch(to);

        Ok(())
    }

    /// The round is over: what is still out of the way is nowhere.
    pub(super) fn nowhere(&mut self, tree: &FollowedTree) {
        let aside = std::mem::take(&mut self.moves.aside);
        if aside.is_empty() {
            return;
        }
        let top = |path: &[u8]| path.split(|b| *b == b'/').next().unwrap_or_default().to_vec();
        let lost = tree.known.keys().filter(|path| aside.contains(&top(path)));
        self.gone.extend(lost.cloned());
    }
}

/// Tells whether a directory keeps its number on this file system. On others (FUSE, an overlay of several
/// disks) it may have another one at the next look, and would be taken for another directory.
pub(super) fn numbered(root: &Path) -> bool {
    let known = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];
    statfs(root).is_ok_and(|s| known.contains(&s.filesystem_type()))
}

/// Tells whether a path is below another one.
fn is_in(path: &[u8], directory: &[u8]) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.first() == Some(&b'/'))
}
