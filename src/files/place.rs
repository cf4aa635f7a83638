//! Where copied trees are staged, how they come to their places, and how all of that is undone.
//!
//! A tree is made beside its place, under a name that begins with a dot, and renamed when it is
//! whole; what stood there is renamed out of its way. Both can be undone by the names alone, by
//! another process and after a reboot.

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::mounting::Mounting;
use super::walk;

/// Added to a name whose owner made room for what came.
const BEFORE: &str = "before";

/// Everything that a migration makes in the file system of the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placing {
    /// The migration's ID.
    migration: String,
    /// Directories that were not there, in the order in which they are made.
    made: Vec<PathBuf>,
    /// Files that were not there, and beside each another name of it for as long as it may have to
    /// be taken away.
    files: Vec<(PathBuf, PathBuf)>,
    trees: Vec<Placed>,
    /// Where layers are staged that stay when they are whole.
    #[serde(default)]
    layers: Vec<PathBuf>,
    /// What is mounted of the trees.
    #[serde(default)]
    mounting: Option<Mounting>,
}

/// One tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Placed {
    target: PathBuf,
    staged: PathBuf,
    /// Where what stood in its place is meanwhile, if there was something.
    before: Option<PathBuf>,
    /// A file that is there as soon as what is at the place may be ours.
    mark: PathBuf,
    /// Nobody but the container uses what is at the place.
    own: bool,
}

impl Placing {
    /// Plans for trees at these places, of each whether only the container uses it, and for files
    /// that are not there yet. Nothing is made.
    ///
    /// # Errors
    /// When a place has no directory.
    pub fn plan(
        migration: &str,
        targets: &[(PathBuf, bool)],
        files: &[PathBuf],
    ) -> Result<Placing> {
        let mut placing = Placing { migration: migration.to_owned(), ..Placing::default() };
        for (i, file) in files.iter().enumerate() {
            let beside = file.with_file_name(format!(".ferry-{migration}-file-{i}"));
            placing.files.push((file.clone(), beside));
        }
        for (i, (target, own)) in targets.iter().enumerate() {
            let name = target.file_name().and_then(|n| n.to_str());
            let (Some(parent), Some(_)) = (target.parent(), name) else {
                return Err(anyhow!("{} cannot be the place of a copy", target.display()));
            };
            let beside = |what: &str| parent.join(format!(".ferry-{migration}-{i}{what}"));
            placing.trees.push(Placed {
                target: target.clone(),
                staged: beside(""),
                before: fs::symlink_metadata(target).is_ok().then(|| beside("-before")),
                mark: beside("-mark"),
                own: *own,
            });
        }
        for path in targets.iter().map(|t| &t.0).chain(files) {
            let missing = path.ancestors().skip(1).take_while(|p| !p.exists());
            let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
            missing.reverse();
            for dir in missing {
                if !placing.made.contains(&dir) {
                    placing.made.push(dir);
                }
            }
        }
        Ok(placing)
    }

    /// With an overlay that is mounted of some of the trees, and layers for it.
    pub fn with_overlay(mut self, mounting: Mounting, layers: Vec<PathBuf>) -> Placing {
        let missing = mounting.place().ancestors().take_while(|p| !p.exists());
        let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        missing.retain(|dir| !self.made.contains(dir));
        missing.reverse();
        self.made.extend(missing);
        self.layers = layers;
        self.mounting = Some(mounting);
        self
    }

    /// The overlay, where there is one.
    pub fn mounting(&self) -> Option<&Mounting> {
        self.mounting.as_ref()
    }

    /// Makes the directories in which the trees are staged, private and empty; they, in the order
    /// of the plan.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn stage(&self) -> Result<Vec<PathBuf>> {
        for dir in &self.made {
            let what = || format!("cannot make {}", dir.display());
            match fs::create_dir(dir) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e).with_context(what),
                _ => {}
            }
        }
        for tree in &self.trees {
            let what = || format!("cannot make {}", tree.staged.display());
            DirBuilder::new().mode(0o700).create(&tree.staged).with_context(what)?;
        }
        Ok(self.trees.iter().map(|t| t.staged.clone()).collect())
    }

    /// Writes one of the files.
    ///
    /// # Errors
    /// When it cannot be written, or is there by now.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let what = || format!("cannot write {}", path.display());
        let beside = self.files.iter().find(|(file, _)| file == path).map(|(_, beside)| beside);
        let beside = beside.ok_or_else(|| anyhow!("it was not planned")).with_context(what)?;
        let open = File::options().write(true).create_new(true).mode(0o600).open(beside);
        open.and_then(|mut f| f.write_all(bytes)).with_context(what)?;
        fs::hard_link(beside, path).with_context(what)
    }

    /// Renames the staged trees to their places.
    ///
    /// # Errors
    /// When one cannot be renamed, or what is to be mounted cannot be.
    pub fn put(&self) -> Result<()> {
        if let Some(mounting) = &self.mounting {
            mounting.clear()?;
        }
        for tree in &self.trees {
            let what = || format!("cannot put the copy at {}", tree.target.display());
            File::create_new(&tree.mark).with_context(what)?;
            if let Some(before) = &tree.before {
                fs::rename(&tree.target, before).with_context(what)?;
            }
            fs::rename(&tree.staged, &tree.target).with_context(what)?;
        }
        self.mounting.as_ref().map_or(Ok(()), Mounting::stand_in)
    }

    /// Brings what was copied to the disk.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn sync(&self) -> Result<()> {
        for tree in &self.trees {
            nix::unistd::syncfs(File::open(&tree.target)?)?;
        }
        Ok(())
    }

    /// Takes everything away again; what stood in the way is back in its place. May have been done
    /// before, or never been needed.
    ///
    /// # Errors
    /// Says what could not be undone; the rest was.
    pub fn undo(&self) -> Result<()> {
        // Nothing that is mounted is renamed.
        self.mounting.as_ref().map_or(Ok(()), Mounting::undo)?;
        let mut first = None;
        let mut note = |result: Result<()>| {
            if let Err(e) = result {
                first.get_or_insert(e);
            }
        };
        for tree in &self.trees {
            note(tree.undo());
        }
        for staged in &self.layers {
            note(remove(staged));
        }
        for (file, beside) in &self.files {
            let inode = |path| fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).ok();
            if inode(beside).is_some() && inode(file) == inode(beside) {
                note(remove(file));
            }
            note(remove(beside));
        }
        if let (Some(mounting), None) = (&self.mounting, &first) {
            first = mounting.put_back().err();
        }
        for dir in self.made.iter().rev() {
            // Somebody may have put something there meanwhile, and keeps it.
            let _ = fs::remove_dir(dir);
        }
        first.map_or(Ok(()), Err)
    }

    /// They stay. What stood in their way is kept under `NAME.before`, where that is free, or else
    /// with the migration's ID behind it; or, if the container itself had `left` it there, it is
    /// taken away.
    ///
    /// # Errors
    /// Says what could not be done; the rest was.
    pub fn keep(&self, left: bool) -> Result<()> {
        let mut first = self.mounting.as_ref().and_then(|m| m.keep().err());
        for (_, beside) in &self.files {
            first = first.or(remove(beside).err());
        }
        for tree in &self.trees {
            first = first.or(tree.keep(&self.migration, left).err());
        }
        first.map_or(Ok(()), Err)
    }
}

impl Placed {
    fn keep(&self, migration: &str, left: bool) -> Result<()> {
        remove(&self.mark)?;
        let Some(before) = self.before.as_ref().filter(|b| fs::symlink_metadata(b).is_ok()) else {
            return Ok(());
        };
        if left && self.own {
            return remove(before);
        }
        let mut name = self.target.clone().into_os_string();
        name.push(".");
        name.push(BEFORE);
        if fs::symlink_metadata(&name).is_ok() {
            name.push(format!("-{migration}"));
        }
        fs::rename(before, &name)
            .with_context(|| format!("cannot keep what was at {}", self.target.display()))
    }

    fn undo(&self) -> Result<()> {
        let what = || format!("cannot undo the copy at {}", self.target.display());
        let there = |path: &Path| fs::symlink_metadata(path).is_ok();
        // Renaming goes: what was there, then what is staged. So what is at the place is ours if
        // nothing is staged any more.
        let ours = there(&self.mark)
            && !there(&self.staged)
            && match &self.before {
                Some(before) => there(before),
                None => there(&self.target),
            };
        if ours {
            ignore_missing(fs::rename(&self.target, &self.staged)).with_context(what)?;
        }
        if let Some(before) = self.before.as_ref().filter(|b| there(b)) {
            fs::rename(before, &self.target).with_context(what)?;
        }
        // Without it nothing counts as ours any more.
        remove(&self.mark)?;
        remove(&self.staged)
    }
}

/// Takes a tree or a file away, if it is there.
///
/// # Errors
/// When it cannot be, or something is mounted below: nothing is taken away then.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {
            walk::measure(path)?;
            fs::remove_dir_all(path)
        }
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    ignore_missing(result).with_context(|| format!("cannot remove {}", path.display()))
}

fn ignore_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(at: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(at)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn undone_at_every_step_it_leaves_all_as_it_was() {
        for steps in 0..=5 {
            let dir = tempfile::tempdir().unwrap();
            let old = dir.path().join("old");
            fs::create_dir(&old).unwrap();
            fs::write(old.join("mine"), b"x").unwrap();
            let new = dir.path().join("deep/er/new");
            let config = dir.path().join("deep/config.json");
            let targets = [(old.clone(), true), (new.clone(), false)];
            let placing = Placing::plan("0123", &targets, std::slice::from_ref(&config)).unwrap();
            // As another process reads it from a journal.
            let text = serde_json::to_vec(&placing).unwrap();
            let other: Placing = serde_json::from_slice(&text).unwrap();
            if steps > 0 {
                for staged in placing.stage().unwrap() {
                    fs::write(staged.join("theirs"), b"y").unwrap();
                }
            }
            if steps > 1 {
                placing.write(&config, b"{}").unwrap();
            }
            let tree = &placing.trees[0];
            match steps {
                3 => {
                    fs::write(&tree.mark, b"").unwrap();
                    fs::rename(&old, tree.before.as_ref().unwrap()).unwrap();
                }
                4 => {
                    fs::write(&tree.mark, b"").unwrap();
                    fs::rename(&old, tree.before.as_ref().unwrap()).unwrap();
                    fs::rename(&tree.staged, &old).unwrap();
                }
                5 => placing.put().unwrap(),
                _ => {}
            }
            for _ in 0..2 {
                other.undo().unwrap();
                assert_eq!(names(dir.path()), ["old"], "after {steps} steps");
                assert_eq!(names(&old), ["mine"]);
            }
        }
    }

    #[test]
    fn what_stood_in_the_way_is_kept_or_not() {
        for (left, own) in [(false, true), (true, false), (true, true)] {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("t");
            for round in 0..2 {
                fs::create_dir_all(&target).unwrap();
                fs::write(target.join(format!("old{round}")), b"x").unwrap();
                let placing = Placing::plan("0123", &[(target.clone(), own)], &[]).unwrap();
                placing.stage().unwrap();
                placing.put().unwrap();
                placing.keep(left).unwrap();
                assert!(names(&target).is_empty());
                if !left || !own {
                    let all = ["t", "t.before", "t.before-0123"];
                    assert_eq!(names(dir.path()), all[..round + 2]);
                    let kept = dir.path().join(all[round + 1]);
                    assert_eq!(names(&kept), [format!("old{round}")]);
                } else {
                    assert_eq!(names(dir.path()), ["t"]);
                }
            }
        }
    }
}
