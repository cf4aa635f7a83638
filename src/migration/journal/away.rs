//! The away-mark: a container of this ID left this host, so nobody may start it here.
//!
//! An engine's restart policy starts a container again as soon as it sees it gone; after a
//! migration that would make a second copy. The mark makes our `create`, `start`, `run` and
//! `restore` refuse. It outlives a reboot and is written before the source's tasks die, so
//! it is on disk (file and directories synced) when [`AwayMark::write`] returns.
//!
//! A mark is a file `away/<runtime root, escaped>/<ID>` under ferry's state directory. On a
//! host that never migrated anything, looking for one costs a single failed `open`.
//!
//! An engine that replaces a container (`podman run --replace`, `docker compose up --force-recreate`, a unit of
//! systemd's) makes one with another ID and the same name. So the mark of an engine's container has a second
//! file, `away/engine-<engine>/<name>`, which makes our `create` and `run` refuse as well.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::engine::Engine;
use crate::oci::container_id::{ContainerId, valid_id};
use crate::problem::Advise;

/// The longest file name that every file system of interest takes.
const NAME_MAX: usize = 255;

/// A record that a container was migrated away from this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwayMark {
    /// The container's ID.
    pub id: ContainerId,
    /// The runtime's `--root` that the ID belongs to.
    pub runtime_root: PathBuf,
    /// Where it went, as the user wrote it.
    pub destination: String,
    /// When the hand-over was committed, RFC 3339.
    pub migrated_at: String,
    /// Which migration it was, as `ferry migrations` lists it.
    pub migration_id: String,
    /// Whose it is, and as they call it.
    #[serde(default)]
    pub named: Option<(Engine, String)>,
}

impl AwayMark {
    /// Writes the mark; when this returns it is on disk. An older mark of the same
    /// container is replaced.
    pub fn write(&self, state_dir: &Path) -> Result<()> {
        self.write_in(&root_dir(state_dir, &self.runtime_root), &self.id)?;
        match &self.named {
            Some((engine, name)) if valid_id(OsStr::new(name)) => {
                self.write_in(&engine_dir(state_dir, *engine), name)
            }
            _ => Ok(()),
        }
    }

    fn write_in(&self, dir: &Path, name: &str) -> Result<()> {
        let what = || format!("cannot write the away-mark of {name:?} in {}", dir.display());
        create_dir_synced(dir).with_context(what)?;
        // `~` is in no ID, so an unfinished mark can never be taken for a finished one.
        let mut file = tempfile::Builder::new().prefix("~").tempfile_in(dir).with_context(what)?;
        file.write_all(&serde_json::to_vec_pretty(self)?).with_context(what)?;
        file.as_file().sync_all().with_context(what)?;
        file.persist(dir.join(name)).with_context(what)?;
        sync_dir(dir).with_context(what)
    }

    /// The mark of a container, if it has one.
    ///
    /// A mark that cannot be read is an error and not an absence: better a container that
    /// does not start than two of them.
    pub fn find(state_dir: &Path, runtime_root: &Path, id: &OsStr) -> Result<Option<AwayMark>> {
        if !valid_id(id) {
            return Ok(None);
        }
        // On most hosts and in most calls this is all that happens.
        match File::open(state_dir.join("away")) {
            Ok(_) => {}
            Err(why) if means_no_mark(&why) => return Ok(None),
            Err(why) => {
                let (what, hint) = unreadable(&state_dir.join("away"), id);
                return Err(why).advise(what, hint);
            }
        }
        let dir = root_dir(state_dir, runtime_root);
        read(&dir.join(id)).or_else(|why| {
            let (what, hint) = unreadable(&dir, id);
            Err(why).advise(what, hint)
        })
    }

    /// Tells whether an engine's containers have marks at all: whose a new one is need not be looked at where
    /// they have none.
    pub fn any_named(state_dir: &Path) -> bool {
        let engines = [Engine::Podman, Engine::Docker];
        engines.iter().any(|engine| engine_dir(state_dir, *engine).exists())
    }

    /// The mark of an engine's container of this name, if it has one. One that cannot be read: as above.
    pub fn find_named(state_dir: &Path, engine: Engine, name: &str) -> Result<Option<AwayMark>> {
        if !valid_id(OsStr::new(name)) {
            return Ok(None);
        }
        let dir = engine_dir(state_dir, engine);
        read(&dir.join(name)).or_else(|why| {
            let (what, hint) = unreadable(&dir, OsStr::new(name));
            Err(why).advise(what, hint)
        })
    }

    /// Removes the mark of a container, and that of its name; `false` when it had none.
    pub fn remove(state_dir: &Path, runtime_root: &Path, id: &OsStr) -> Result<bool> {
        if !valid_id(id) {
            return Ok(false);
        }
        let place = root_dir(state_dir, runtime_root).join(id);
        // Another one of that name may have left since.
        if let Ok(Some(AwayMark { named: Some((engine, name)), migration_id, .. })) = read(&place)
            && let Ok(Some(same)) = AwayMark::find_named(state_dir, engine, &name)
            && same.migration_id == migration_id
        {
            AwayMark::remove_named(state_dir, engine, &name)?;
        }
        unlink(&place)
    }

    /// Removes the mark of an engine's name: a container of that name has come.
    pub fn remove_named(state_dir: &Path, engine: Engine, name: &str) -> Result<bool> {
        if !valid_id(OsStr::new(name)) {
            return Ok(false);
        }
        unlink(&engine_dir(state_dir, engine).join(name))
    }
}

fn unlink(place: &Path) -> Result<bool> {
    let what = || format!("cannot remove the away-mark {}", place.display());
    match fs::remove_file(place) {
        Ok(()) => {
            let dir = place.parent().unwrap_or(Path::new("/"));
            sync_dir(dir).with_context(what).map(|()| true)
        }
        Err(why) if why.kind() == ErrorKind::NotFound => Ok(false),
        Err(why) => Err(why).with_context(what),
    }
}

/// Words for an error, and what to do about it.
fn unreadable(place: &Path, id: &OsStr) -> (String, &'static str) {
    let what = format!(
        "cannot tell whether container {id:?} was migrated away: a mark under {} cannot be read",
        place.display()
    );
    let hint = "starting it could make a second copy; mend that directory, or see `ferry migrations` \
                for what happened";
    (what, hint)
}

fn read(path: &Path) -> Result<Option<AwayMark>> {
    match fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).context("it is damaged")?)),
        Err(why) if why.kind() == ErrorKind::NotFound => Ok(None),
        // An ID too long for a file name was never written as one.
        Err(why) if why.kind() == ErrorKind::InvalidFilename => Ok(None),
        Err(why) => Err(why.into()),
    }
}

/// Tells whether failing to open the marks' directory means that no mark concerns this caller.
fn means_no_mark(why: &std::io::Error) -> bool {
    match why.kind() {
        ErrorKind::NotFound => true,
        // Marks are root's. Somebody else's containers (rootless, also as root of a user
        // namespace) were never migrated by us.
        ErrorKind::PermissionDenied => !is_real_root(),
        _ => false,
    }
}

fn is_real_root() -> bool {
    let whole = |map: String| map.split_whitespace().eq(["0", "0", "4294967295"]);
    nix::unistd::geteuid().is_root()
        && fs::read_to_string("/proc/self/uid_map").map(whole).unwrap_or(true)
}

fn root_dir(state_dir: &Path, runtime_root: &Path) -> PathBuf {
    state_dir.join("away").join(escape(&canonical(runtime_root)))
}

/// No root is called so: each begins with an escaped `/`.
fn engine_dir(state_dir: &Path, engine: Engine) -> PathBuf {
    state_dir.join("away").join(format!("engine-{engine}"))
}

/// The root as one name: engines write `/var/run/…` where operators write `/run/…`, and the
/// root itself may not exist (after a reboot), so what exists of it is resolved.
pub fn canonical(root: &Path) -> PathBuf {
    let absolute = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let mut clean = PathBuf::new();
    for part in absolute.components() {
        // runc cleans `..` by the letter, before it looks at any symbolic link.
        match part {
            Component::ParentDir => drop(clean.pop()),
            part => clean.push(part),
        }
    }
    let mut missing = Vec::new();
    let mut existing = clean.as_path();
    loop {
        if let Ok(real) = existing.canonicalize() {
            return missing.iter().rev().fold(real, |path, name| path.join(name));
        }
        let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
            return clean;
        };
        missing.push(name);
        existing = parent;
    }
}

/// A path as a file name: `%` and `/` as in URLs; what is too long ends in a hash.
fn escape(path: &Path) -> OsString {
    let mut name = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' => name.extend(b"%2F"),
            b'%' => name.extend(b"%25"),
            byte => name.push(byte),
        }
    }
    if name.len() > NAME_MAX {
        let hash = format!("%{:032x}", xxhash_rust::xxh3::xxh3_128(path.as_os_str().as_bytes()));
        name.truncate(NAME_MAX - hash.len());
        name.extend(hash.into_bytes());
    }
    OsString::from_vec(name)
}

/// Makes a directory and its parents; each new name is on disk when this returns.
fn create_dir_synced(dir: &Path) -> std::io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(why) if why.kind() == ErrorKind::AlreadyExists => return Ok(()),
        Err(why) if why.kind() == ErrorKind::NotFound => {
            create_dir_synced(dir.parent().ok_or(why)?)?;
            return create_dir_synced(dir);
        }
        made => made?,
    }
    dir.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::fuzz::Target;

    fn mark(root: &Path) -> AwayMark {
        AwayMark {
            id: "web".parse().unwrap(),
            runtime_root: root.into(),
            destination: "host2".into(),
            migrated_at: "2026-03-01T12:00:00Z".into(),
            migration_id: "m1".into(),
            named: None,
        }
    }

    #[test]
    fn an_engines_name_is_marked_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let (state, root) = (dir.path(), Path::new("/run/runc"));
        assert!(!AwayMark::any_named(state));
        let named = Some((Engine::Podman, "web".to_owned()));
        let first = AwayMark { id: "id1".parse().unwrap(), named: named.clone(), ..mark(root) };
        first.write(state).unwrap();
        assert!(AwayMark::any_named(state));

        let by_name = |engine| AwayMark::find_named(state, engine, "web").unwrap();
        assert_eq!(by_name(Engine::Podman), Some(first.clone()));
        assert_eq!(by_name(Engine::Docker), None);

        // It came back under another ID, as docker's do, and left again: that mark is the name's.
        let again =
            AwayMark { id: "id2".parse().unwrap(), migration_id: "m2".into(), ..first.clone() };
        again.write(state).unwrap();
        assert!(AwayMark::remove(state, root, OsStr::new("id1")).unwrap());
        assert_eq!(by_name(Engine::Podman), Some(again));
        assert!(AwayMark::remove(state, root, OsStr::new("id2")).unwrap());
        assert_eq!(by_name(Engine::Podman), None);
        first.write(state).unwrap();

        assert!(AwayMark::remove_named(state, Engine::Podman, "web").unwrap());
        assert!(!AwayMark::remove_named(state, Engine::Podman, "../web").unwrap());
        assert!(AwayMark::find(state, root, OsStr::new("id1")).unwrap().is_some());
        let odd = AwayMark { named: Some((Engine::Docker, "../x".into())), ..mark(root) };
        odd.write(state).unwrap();
        assert!(!state.join("away/x").exists());
    }

    #[test]
    fn written_found_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (state, root) = (dir.path().join("a/b"), dir.path().join("run/runc"));
        let web = OsStr::new("web");
        assert_eq!(AwayMark::find(&state, &root, web).unwrap(), None);
        mark(&root).write(&state).unwrap();
        mark(&root).write(&state).unwrap();
        assert_eq!(AwayMark::find(&state, &root, web).unwrap(), Some(mark(&root)));
        assert_eq!(AwayMark::find(&state, Path::new("/other"), web).unwrap(), None);
        assert_eq!(AwayMark::find(&state, &root, OsStr::new("web2")).unwrap(), None);
        let file = root_dir(&state, &root).join("web");
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(AwayMark::remove(&state, &root, web).unwrap());
        assert!(!AwayMark::remove(&state, &root, web).unwrap());
        assert_eq!(AwayMark::find(&state, &root, web).unwrap(), None);
    }

    #[test]
    fn a_root_by_another_name_is_the_same_root() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        std::os::unix::fs::symlink(&run, dir.path().join("var-run")).unwrap();
        mark(&run.join("runc/moby")).write(dir.path()).unwrap();
        for alias in ["var-run/runc/moby", "run/runc/./x/../moby/"] {
            let found = AwayMark::find(dir.path(), &dir.path().join(alias), OsStr::new("web"));
            assert!(found.unwrap().is_some(), "{alias}");
        }
    }

    #[test]
    fn path_like_ids_are_no_ids() {
        let dir = tempfile::tempdir().unwrap();
        for id in ["", ".", "..", "../x", "a/b", "~x", "a b", "é"] {
            assert!(AwayMark::find(dir.path(), Path::new("/r"), OsStr::new(id)).unwrap().is_none());
        }
    }

    #[test]
    fn a_damaged_mark_still_refuses() {
        let dir = tempfile::tempdir().unwrap();
        mark(Path::new("/r")).write(dir.path()).unwrap();
        fs::write(root_dir(dir.path(), Path::new("/r")).join("web"), "{").unwrap();
        let why = AwayMark::find(dir.path(), Path::new("/r"), OsStr::new("web")).unwrap_err();
        assert!(why.is::<crate::problem::Advice>(), "{why}");
    }

    #[test]
    fn long_roots_get_distinct_names() {
        let long = |end: &str| escape(Path::new(&format!("/{}{end}", "x/".repeat(300))));
        assert!(long("a").len() <= NAME_MAX);
        assert_ne!(long("a"), long("b"));
        assert_ne!(escape(Path::new("/a%2Fb")), escape(Path::new("/a/b")));
    }

    #[test]
    fn fuzz_away_marks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web");
        let sample = serde_json::to_vec(&mark(Path::new("/run/runc"))).unwrap();
        Target::new("away-marks").sample(sample).cost(4).run(|bytes| {
            fs::write(&path, bytes)?;
            read(&path)?.context("none")?;
            Ok(())
        });
    }
}
