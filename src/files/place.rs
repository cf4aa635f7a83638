//! Where copied trees are staged, how they come to their places, and how all of that is undone.
//!
//! A tree is made beside its place, under a name that begins with a dot, and renamed when it is
//! whole; what stood there is renamed out of its way. A single file is made in a directory of its own,
//! and gets its place as a second name. All of that can be undone by the names alone, by another process
//! and after a reboot.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::mounting::Mounting;
use super::ops::SINGLE;
use super::walk::{ignore_missing, remove};

/// Added to a name whose owner made room for what came.
const BEFORE: &str = "before";

/// A directory of the source that has something below it that is copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its place on the destination.
    pub path: PathBuf,
    /// Its mode.
    pub mode: u32,
    /// Its owner and group.
    pub owner: (u32, u32),
}

/// The directories above a place; `moved` says where one is on the destination.
pub fn parents(place: &Path, moved: impl Fn(&Path) -> PathBuf) -> Vec<Parent> {
    let above = place.ancestors().skip(1).filter(|path| path.parent().is_some());
    let one = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        let owner = (meta.uid(), meta.gid());
        Some(Parent { path: moved(path), mode: meta.mode() & 0o7777, owner })
    };
    above.filter_map(one).collect()
}

/// Where a copy is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTarget {
    /// The place.
    pub path: PathBuf,
    /// Nobody but the container uses what is there.
    pub own: bool,
    /// It is a single file.
    pub single: bool,
}

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
    trees: Vec<PlacedTree>,
    /// Where layers are staged that stay when they are whole.
    #[serde(default)]
    layers: Vec<PathBuf>,
    /// What is mounted of the trees.
    #[serde(default)]
    mounting: Option<Mounting>,
}

/// One tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PlacedTree {
    target: PathBuf,
    staged: PathBuf,
    /// Where what stood in its place is meanwhile, if there was something.
    before: Option<PathBuf>,
    /// A file that is there as soon as what is at the place may be ours.
    mark: PathBuf,
    /// Nobody but the container uses what is at the place.
    own: bool,
    /// The directory in which a single file is staged: changes of it come in there to the end, so
    /// the place gets another name of the same file.
    #[serde(default)]
    nest: Option<PathBuf>,
}

impl Placing {
    /// Plans for copies at these places, and for files that are not there yet. Nothing is made.
    ///
    /// # Errors
    /// When a place has no directory.
    pub fn plan(migration: &str, targets: &[CopyTarget], files: &[PathBuf]) -> Result<Placing> {
        let mut placing = Placing { migration: migration.to_owned(), ..Placing::default() };
        for (i, file) in files.iter().enumerate() {
            let beside = file.with_file_name(format!(".ferry-{migration}-file-{i}"));
            placing.files.push((file.clone(), beside));
        }

        for (i, CopyTarget { path: target, own, single }) in targets.iter().enumerate() {
            let name = target.file_name().and_then(|n| n.to_str());
            let (Some(parent), Some(_)) = (target.parent(), name) else {
                return Err(anyhow!("{} cannot be the place of a copy", target.display()));
            };
            let beside = |what: &str| parent.join(format!(".ferry-{migration}-{i}{what}"));
            placing.trees.push(PlacedTree {
                target: target.clone(),
                staged: if *single {
                    beside("").join(OsStr::from_bytes(SINGLE))
                } else {
                    beside("")
                },
                nest: single.then(|| beside("")),
                before: fs::symlink_metadata(target).is_ok().then(|| beside("-before")),
                mark: beside("-mark"),
                own: *own,
            });
        }

        for path in targets.iter().map(|t| &t.path).chain(files) {
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
    /// of the plan. What is missing above them lets in nobody whom the source's `parents` do not: below
    /// are files that whoever reaches them may run with the rights of their owner.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn stage(&self, parents: &[Parent]) -> Result<Vec<PathBuf>> {
        for dir in &self.made {
            let what = || format!("cannot make {}", dir.display());
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                made => {
                    let parent = parents.iter().find(|parent| parent.path == *dir);
                    made.and_then(|()| parent.map_or(Ok(()), |p| p.describe(dir)))
                        .with_context(what)?;
                }
            }
        }
        for tree in &self.trees {
            let dir = tree.nest.as_ref().unwrap_or(&tree.staged);
            let what = || format!("cannot make {}", dir.display());
            DirBuilder::new().mode(0o700).create(dir).with_context(what)?;
        }
        let dirs = self.trees.iter().map(|t| t.nest.as_ref().unwrap_or(&t.staged));
        Ok(dirs.cloned().collect())
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
            match &tree.nest {
                Some(_) => fs::hard_link(&tree.staged, &tree.target).with_context(what)?,
                None => fs::rename(&tree.staged, &tree.target).with_context(what)?,
            }
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
            if are_one(beside, file) {
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

impl Parent {
    /// Gives a directory that was just made the owner and the mode of this one.
    fn describe(&self, made: &Path) -> std::io::Result<()> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let made = File::options().read(true).custom_flags(flags).open(made)?;
        let (uid, gid) = self.owner;
        std::os::unix::fs::fchown(&made, Some(uid), Some(gid))?;
        made.set_permissions(Permissions::from_mode(self.mode & 0o1777))
    }
}

impl PlacedTree {
    fn keep(&self, migration: &str, left: bool) -> Result<()> {
        remove(&self.mark)?;
        if let Some(nest) = &self.nest {
            remove(nest)?;
        }
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
        if self.nest.is_some() {
            if there(&self.mark) && are_one(&self.staged, &self.target) {
                remove(&self.target)?;
            }
        } else if ours {
            ignore_missing(fs::rename(&self.target, &self.staged)).with_context(what)?;
        }

        if let Some(before) = self.before.as_ref().filter(|b| there(b)) {
            fs::rename(before, &self.target).with_context(what)?;
        }

        // Without it nothing counts as ours any more.
        remove(&self.mark)?;
        remove(self.nest.as_ref().unwrap_or(&self.staged))
    }
}

/// Tells whether two names, which are there, are names of one file.
fn are_one(a: &Path, b: &Path) -> bool {
    let inode = |path| fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).ok();
    inode(a).is_some() && inode(a) == inode(b)
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

    fn target(path: &Path, own: bool, single: bool) -> CopyTarget {
        CopyTarget { path: path.to_owned(), own, single }
    }

    /// A tree and a file that stand in the way, and a tree and a file that do not.
    #[test]
    fn undone_at_every_step_it_leaves_all_as_it_was() {
        for steps in 0..=10 {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            fs::create_dir(at("old")).unwrap();
            fs::write(at("old/mine"), b"x").unwrap();
            fs::write(at("hosts"), b"mine").unwrap();
            let config = at("deep/config.json");
            let targets = [
                target(&at("old"), true, false),
                target(&at("deep/er/new"), false, false),
                target(&at("hosts"), false, true),
                target(&at("deep/resolv"), false, true),
            ];

            let placing = Placing::plan("0123", &targets, std::slice::from_ref(&config)).unwrap();
            // As another process reads it from a journal.
            let text = serde_json::to_vec(&placing).unwrap();
            let other: Placing = serde_json::from_slice(&text).unwrap();
            if steps > 0 {
                for staged in placing.stage(&[]).unwrap() {
                    // As `SINGLE` is called, the trees may have it too.
                    fs::write(staged.join("file"), b"theirs").unwrap();
                }
            }

            if steps > 1 {
                placing.write(&config, b"{}").unwrap();
            }
            let (tree, hosts) = (&placing.trees[0], &placing.trees[2]);
            match steps {
                3..=5 => {
                    fs::write(&tree.mark, b"").unwrap();
                    if steps > 3 {
                        fs::rename(at("old"), tree.before.as_ref().unwrap()).unwrap();
                    }
                    if steps > 4 {
                        fs::rename(&tree.staged, at("old")).unwrap();
                    }
                }
                6..=8 => {
                    fs::write(&hosts.mark, b"").unwrap();
                    if steps > 6 {
                        fs::rename(at("hosts"), hosts.before.as_ref().unwrap()).unwrap();
                    }
                    if steps > 7 {
                        fs::hard_link(&hosts.staged, at("hosts")).unwrap();
                    }
                }
                9 => placing.put().unwrap(),
                10 => {
                    placing.put().unwrap();
                    // What is staged is what is in its place.
                    fs::write(&hosts.staged, b"changed").unwrap();
                    assert_eq!(fs::read(at("hosts")).unwrap(), b"changed");
                    assert_eq!(fs::read(at("deep/resolv")).unwrap(), b"theirs");
                }
                _ => {}
            }

            for _ in 0..2 {
                other.undo().unwrap();
                assert_eq!(names(dir.path()), ["hosts", "old"], "after {steps} steps");
                assert_eq!(names(&at("old")), ["mine"]);
                assert_eq!(fs::read(at("hosts")).unwrap(), b"mine");
            }
        }
    }

    /// What was private above a copy is so on the other host.
    #[test]
    fn what_is_made_above_a_copy_lets_in_nobody_else() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let own = from.path().join("own");
        fs::create_dir_all(own.join("open/bundle")).unwrap();
        for (dir, mode) in [(own.clone(), 0o710), (own.join("open"), 0o755)] {
            fs::set_permissions(dir, Permissions::from_mode(mode)).unwrap();
        }
        let moved = |path: &Path| match path.strip_prefix(from.path()) {
            Ok(below) => to.path().join(below),
            Err(_) => path.to_owned(),
        };
        let parents = parents(&own.join("open/bundle/rootfs"), moved);
        let at = |name: &str| to.path().join(name);
        let places =
            [target(&at("own/open/tree"), true, false), target(&at("new/tree"), true, false)];
        let placing = Placing::plan("0123", &places, &[]).unwrap();
        placing.stage(&parents).unwrap();
        let mode = |name: &str| fs::metadata(at(name)).unwrap().mode() & 0o7777;
        assert_eq!([mode("own"), mode("own/open")], [0o710, 0o755]);
        assert_eq!(mode("new"), 0o700, "the source has none");
        placing.undo().unwrap();
        assert!(names(to.path()).is_empty());
    }

    #[test]
    fn a_single_file_is_kept_with_one_name() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, b"mine").unwrap();
        let placing = Placing::plan("0123", &[target(&hosts, false, true)], &[]).unwrap();
        for staged in placing.stage(&[]).unwrap() {
            fs::write(staged.join("file"), b"theirs").unwrap();
        }
        placing.put().unwrap();
        placing.sync().unwrap();
        placing.keep(true).unwrap();
        assert_eq!(names(dir.path()), ["hosts", "hosts.before"]);
        assert_eq!(fs::read(&hosts).unwrap(), b"theirs");
        assert_eq!(fs::metadata(&hosts).unwrap().nlink(), 1);
        assert_eq!(fs::read(dir.path().join("hosts.before")).unwrap(), b"mine");
    }

    #[test]
    fn what_stood_in_the_way_is_kept_or_not() {
        for (left, own) in [(false, true), (true, false), (true, true)] {
            let dir = tempfile::tempdir().unwrap();
            let place = dir.path().join("t");
            for round in 0..2 {
                fs::create_dir_all(&place).unwrap();
                fs::write(place.join(format!("old{round}")), b"x").unwrap();
                let placing = Placing::plan("0123", &[target(&place, own, false)], &[]).unwrap();
                placing.stage(&[]).unwrap();
                placing.put().unwrap();
                placing.keep(left).unwrap();
                assert!(names(&place).is_empty());
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
