//! Layers of overlays: which one is which, by all that is in it, and a store for those that came
//! along with a container.
//!
//! Nobody changes a layer while an overlay uses it. So what was found out about one by reading it
//! all is remembered, together with what a walk over its inodes shows: their change times (inode(7))
//! tell whether it is still so. A store's names are digests, but are not believed either.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::directory;
use super::follow::WINDOW;
use super::overlay::MAX_LAYERS;
use super::tree::{FileEntry, FileKind};
use super::walk::walk;

/// Part of every digest: another way to compute it has another name.
const FORM: &[u8] = b"ferry layer 2\n";
/// Most layers that are remembered.
const MAX_KNOWN: usize = 4096;
/// Most bytes of the file in which they are.
const MAX_FILE: u64 = 8 << 20;
const PIECE: usize = 256 << 10;

/// Which layer it is: two that have the same are the same in every byte that a container can see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// BLAKE3 of it, in hexadecimal digits.
    pub digest: String,
    /// Files of every kind.
    pub entries: u64,
    /// Bytes of all regular files, under every name.
    pub bytes: u64,
}

impl Layer {
    /// Refuses what no honest peer sends: it becomes a file's name.
    ///
    /// # Errors
    /// When it is none.
    pub fn validate(&self) -> Result<()> {
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if self.digest.len() != 64 || !self.digest.bytes().all(hex) {
            bail!("{:?} is no layer's digest", self.digest);
        }
        Ok(())
    }
}

/// What a walk over the inodes of a layer shows.
#[derive(Debug, PartialEq, Eq)]
struct Print {
    sum: String,
    entries: u64,
    bytes: u64,
    /// The latest change of any of them.
    changed: (i64, i64),
}

fn print(path: &Path) -> Result<Print> {
    let mut hash = blake3::Hasher::new();
    // What was remembered with another form is none of this one.
    hash.update(FORM);
    let (mut entries, mut bytes, mut changed) = (0, 0, (0, 0));
    walk(path, &mut |name, _, seen| {
        entries += 1;
        bytes += if seen.is_file() { seen.size } else { 0 };
        changed = changed.max(seen.changed);
        hash.update(&(name.len() as u64).to_le_bytes()).update(name);
        let (time, part) = (seen.changed.0 as u64, seen.changed.1 as u64);
        for number in [seen.device, seen.ino, seen.mode.into(), seen.size, time, part] {
            hash.update(&number.to_le_bytes());
        }
        Ok(true)
    })?;
    Ok(Print { sum: hash.finalize().to_hex().to_string(), entries, bytes, changed })
}

/// Reads all of a layer.
fn digest(path: &Path) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    hash.update(FORM);
    let mut links: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut buffer = vec![0; PIECE];
    walk(path, &mut |name, full, _| {
        // The root may be reached through a symbolic link.
        let meta = fs::symlink_metadata(full)?;
        let kind = meta.file_type();
        let first = links.get(&meta.ino()).filter(|_| !kind.is_dir()).cloned();
        let described = if let Some(first) = first {
            FileKind::Link(first)
        } else if kind.is_dir() {
            FileKind::Directory
        } else if kind.is_file() {
            FileKind::File(meta.size())
        } else if kind.is_symlink() {
            FileKind::Symlink(fs::read_link(full)?.as_os_str().as_bytes().to_vec())
        } else if kind.is_char_device() {
            FileKind::Character(meta.rdev())
        } else if kind.is_block_device() {
            FileKind::Block(meta.rdev())
        } else if kind.is_fifo() {
            FileKind::Fifo
        } else {
            FileKind::Socket
        };

        if meta.nlink() > 1 && !kind.is_dir() {
            links.entry(meta.ino()).or_insert_with(|| name.to_vec());
        }
        let contents = matches!(described, FileKind::File(..));
        let mut entry = FileEntry::of(name.to_vec(), described, &meta, full, false)?;
        entry.attributes.sort();
        if name.is_empty() {
            // The root's own is the upper layer's, and that of whoever unpacked it here.
            entry.mtime = (0, 0);
        }

        let said = postcard::to_stdvec(&entry)?;
        hash.update(&(said.len() as u64).to_le_bytes()).update(&said);
        if contents {
            let mut file = directory::open_regular(full)?;
            let mut left = meta.size();
            while left > 0 {
                let n = file.read(&mut buffer)?;
                if n == 0 || n as u64 > left {
                    bail!("it changes while it is read");
                }
                hash.update(&buffer[..n]);
                left -= n as u64;
            }
        }
        Ok(true)
    })?;

    Ok(hash.finalize().to_hex().to_string())
}

/// What is remembered of a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct KnownLayer {
    print: String,
    layer: Layer,
    /// Unix time.
    used: u64,
}

/// The layers that were read on this host, and those that came here.
#[derive(Debug)]
pub struct LayerStore {
    dir: PathBuf,
    file: PathBuf,
    known: BTreeMap<PathBuf, KnownLayer>,
}

impl LayerStore {
    /// The one in Ferry's state directory.
    pub fn open(state_dir: &Path) -> LayerStore {
        let dir = state_dir.join("layers");
        let file = state_dir.join("layers.json");
        // Whatever cannot be read is found out again.
        let text = File::open(&file).ok().and_then(|f| {
            let mut text = Vec::new();
            f.take(MAX_FILE).read_to_end(&mut text).ok()?;
            Some(text)
        });
        let known = text.and_then(|t| serde_json::from_slice(&t).ok()).unwrap_or_default();
        LayerStore { dir, file, known }
    }

    /// Returns where its layers are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns which layer is there.
    ///
    /// # Errors
    /// When it cannot be read, or changes.
    pub fn look(&mut self, path: &Path) -> Result<Layer> {
        let what = || format!("cannot read the layer {}", path.display());
        let print = print(path).with_context(what)?;
        if let Some(known) = self.known.get_mut(path).filter(|k| k.print == print.sum) {
            known.used = now();
            return Ok(known.layer.clone());
        }
        let layer = Layer {
            digest: digest(path).with_context(what)?,
            entries: print.entries,
            bytes: print.bytes,
        };
        if self::print(path).with_context(what)? != print {
            bail!("the layer {} changes while it is read", path.display());
        }
        // A later change might bear the same time.
        let (seconds, part) = print.changed;
        let changed = std::time::Duration::new(seconds.max(0) as u64, part as u32);
        let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
        if changed + WINDOW < since {
            self.remember(path, print.sum, &layer);
        }
        Ok(layer)
    }

    /// Tells whether this very layer is there.
    fn is_at(&mut self, path: &Path, wanted: &Layer) -> bool {
        let alike = |p: Print| (p.entries, p.bytes) == (wanted.entries, wanted.bytes);
        path.is_dir()
            && print(path).is_ok_and(alike)
            && self.look(path).is_ok_and(|found| found == *wanted)
    }

    /// Returns where on this host a layer is: at one of these places, at any where it has been seen, or in
    /// the store. `in_use` are directories that somebody writes to.
    pub fn find(
        &mut self,
        wanted: &Layer,
        places: &[PathBuf],
        in_use: &[PathBuf],
    ) -> Option<PathBuf> {
        let mut candidates = places.to_vec();
        let seen = self.known.iter().filter(|(_, k)| k.layer == *wanted);
        candidates.extend(seen.map(|(path, _)| path.clone()));
        let stored = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let named = |name: &std::ffi::OsStr| name.as_bytes().starts_with(wanted.digest.as_bytes());
        candidates.extend(stored.filter(|e| named(&e.file_name())).map(|e| e.path()));
        candidates.retain(|c| !in_use.contains(c));
        candidates.into_iter().find(|c| self.is_at(c, wanted))
    }

    /// Returns where a layer that comes is to be staged, and where it will be.
    /// `taken` are the places of others.
    pub fn place(
        &self,
        wanted: &Layer,
        migration: &str,
        number: usize,
        taken: &[PathBuf],
    ) -> (PathBuf, PathBuf) {
        let mut place = self.dir.join(&wanted.digest);
        if taken.contains(&place) || fs::symlink_metadata(&place).is_ok() {
            // An overlay takes no layer twice; or what is there is something else, or damaged.
            place = self.dir.join(format!("{}-{migration}-{number}", wanted.digest));
        }
        (self.dir.join(format!(".ferry-{migration}-layer-{number}")), place)
    }

    /// Makes the store's directory, and those that layers are staged in: private and empty.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn stage(&self, staged: &[PathBuf]) -> Result<()> {
        if staged.is_empty() {
            return Ok(());
        }
        let what = || format!("cannot make a layer's place in {}", self.dir.display());
        DirBuilder::new().mode(0o700).recursive(true).create(&self.dir).with_context(what)?;
        for dir in staged {
            DirBuilder::new().mode(0o700).create(dir).with_context(what)?;
        }
        Ok(())
    }

    /// Takes in a layer that has come, whole and on the disk, if it is what was announced.
    ///
    /// # Errors
    /// When it is not, or cannot be renamed.
    pub fn take(&mut self, staged: &Path, place: &Path, wanted: &Layer) -> Result<()> {
        if digest(staged)? != wanted.digest {
            bail!("the layer {} did not arrive as it was announced", wanted.digest);
        }
        match fs::rename(staged, place) {
            // Another migration was quicker.
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty && self.is_at(place, wanted) => {
                return super::walk::remove(staged);
            }
            other => other.with_context(|| format!("cannot keep the layer {}", place.display()))?,
        }
        File::open(&self.dir)?.sync_all()?;
        // Nobody else has written to it.
        let print = print(place)?;
        self.remember(place, print.sum, wanted);
        Ok(())
    }

    fn remember(&mut self, path: &Path, print: String, layer: &Layer) {
        // JSON has no other names.
        if path.to_str().is_some() {
            let known = KnownLayer { print, layer: layer.clone(), used: now() };
            self.known.insert(path.to_owned(), known);
        }
    }

    /// Writes down what it remembers, for the next time. Without it, layers are read again.
    pub fn save(&mut self) {
        while self.known.len() > MAX_KNOWN {
            let oldest = self.known.iter().min_by_key(|(_, k)| k.used).map(|(p, _)| p.clone());
            let Some(oldest) = oldest else { break };
            self.known.remove(&oldest);
        }
        let beside = self.file.with_extension(format!("json.{}", std::process::id()));
        let written = serde_json::to_vec(&self.known)
            .map_err(std::io::Error::from)
            .and_then(|text| fs::write(&beside, text))
            .and_then(|()| fs::rename(&beside, &self.file));
        if let Err(e) = written {
            tracing::info!("what was found out about layers is not remembered: {e}");
            let _ = fs::remove_file(&beside);
        }
    }
}

/// Refuses what no honest peer sends.
///
/// # Errors
/// Says what is wrong.
pub fn validate(layers: &[Layer]) -> Result<()> {
    if layers.len() > MAX_LAYERS {
        bail!("{} layers", layers.len());
    }
    layers.iter().try_for_each(Layer::validate)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn layer(at: &Path) {
        fs::create_dir_all(at.join("d")).unwrap();
        fs::write(at.join("d/one"), b"one").unwrap();
        fs::hard_link(at.join("d/one"), at.join("two")).unwrap();
        fs::write(at.join("d/plain"), b"plain").unwrap();
        let old = UNIX_EPOCH + std::time::Duration::from_nanos(1_000_000_007);
        for name in ["d/one", "d/plain", "d"] {
            File::open(at.join(name)).unwrap().set_modified(old).unwrap();
        }
    }

    #[test]
    fn everything_that_can_be_seen_makes_a_difference() {
        let top = tempfile::tempdir().unwrap();
        let (a, b) = (top.path().join("a"), top.path().join("b"));
        layer(&a);
        let digest_of_a = digest(&a).unwrap();
        type Change = fn(&Path);
        let changes: [Change; 8] = [
            |p| fs::write(p.join("d/one"), b"onf").unwrap(),
            |p| fs::set_permissions(p.join("two"), Permissions::from_mode(0o600)).unwrap(),
            |p| File::open(p.join("d")).unwrap().set_modified(UNIX_EPOCH).unwrap(),
            |p| {
                fs::remove_file(p.join("two")).unwrap();
                fs::copy(p.join("d/one"), p.join("two")).unwrap();
            },
            |p| xattr::set(p.join("d"), "user.note", b"x").unwrap(),
            |p| fs::rename(p.join("two"), p.join("three")).unwrap(),
            |p| fs::write(p.join("empty"), b"").unwrap(),
            |p| fs::remove_file(p.join("d/plain")).unwrap(),
        ];

        for (i, change) in changes.into_iter().enumerate() {
            layer(&b);
            assert_eq!(digest(&b).unwrap(), digest_of_a);
            change(&b);
            assert_ne!(digest(&b).unwrap(), digest_of_a, "change {i}");
            fs::remove_dir_all(&b).unwrap();
        }
    }

    #[test]
    fn what_is_remembered_is_believed_as_long_as_nothing_changes() {
        let top = tempfile::tempdir().unwrap();
        let (state, a) = (top.path().join("state"), top.path().join("a"));
        fs::create_dir(&state).unwrap();
        layer(&a);
        let mut store = LayerStore::open(&state);
        let found = store.look(&a).unwrap();
        assert!(store.known.is_empty(), "it has changed a moment ago");
        let wrong = Layer { digest: "f".repeat(64), ..found.clone() };
        store.remember(&a, print(&a).unwrap().sum, &wrong);
        store.save();
        let mut again = LayerStore::open(&state);
        assert_eq!(again.look(&a).unwrap(), wrong);
        assert_eq!(again.find(&wrong, &[], &[]), Some(a.clone()));
        assert_eq!(again.find(&wrong, &[], std::slice::from_ref(&a)), None);
        fs::set_permissions(a.join("two"), Permissions::from_mode(0o640)).unwrap();
        assert_ne!(again.look(&a).unwrap().digest, wrong.digest);
        assert_eq!(again.find(&wrong, std::slice::from_ref(&a), &[]), None);
    }

    #[test]
    fn a_layer_that_has_come_is_found_and_a_damaged_one_is_not() {
        let top = tempfile::tempdir().unwrap();
        let a = top.path().join("a");
        layer(&a);
        let mut store = LayerStore::open(top.path());
        let wanted = store.look(&a).unwrap();
        let (staged, place) = store.place(&wanted, "0123", 0, &[]);
        store.stage(std::slice::from_ref(&staged)).unwrap();
        assert!(store.take(&staged, &place, &wanted).is_err(), "nothing has come");
        assert_eq!(store.find(&wanted, &[], std::slice::from_ref(&a)), None);
        layer(&staged);
        fs::set_permissions(&staged, a.metadata().unwrap().permissions()).unwrap();
        store.take(&staged, &place, &wanted).unwrap();
        assert_eq!(store.find(&wanted, &[], std::slice::from_ref(&a)), Some(place.clone()));
        let (_, second) = store.place(&wanted, "0123", 1, std::slice::from_ref(&place));
        assert_ne!(second, place, "no overlay takes a layer twice");
        fs::write(place.join("d/plain"), b"plaiN").unwrap();
        assert_eq!(store.find(&wanted, &[], std::slice::from_ref(&a)), None);
        assert_ne!(store.place(&wanted, "0123", 0, &[]).1, place);
    }

    #[test]
    fn a_digest_is_no_path() {
        for bad in ["", "../x", "ABCDEF", &"g".repeat(64), &"/".repeat(64)] {
            let layer = Layer { digest: bad.into(), entries: 0, bytes: 0 };
            assert!(layer.validate().is_err(), "{bad:?}");
        }
    }
}
