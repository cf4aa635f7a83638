//! An overlay as a root file system: layers that nobody changes, and an upper one with the changes.
//!
//! What it is made of is read from proc_pid_mountinfo(5); what its options mean is in the kernel's
//! Documentation/filesystems/overlayfs.rst. Redirects and whiteouts name paths of the overlay and not
//! of the host, so layers may be anywhere, as long as they are the same and in the same order.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::walk::walk;

/// Most layers of one overlay: the kernel's own limit.
pub const MAX_LAYERS: usize = 500;
/// mount(2) takes one page of options, and a zero at its end.
const MAX_OPTIONS: usize = 4095;

/// An overlay, or the plan of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The layers, the topmost first.
    pub lower: Vec<Lower>,
    /// Where changes go; without it nobody can write.
    pub upper: Option<Upper>,
    /// Options that change what it shows.
    pub options: Vec<String>,
    /// Of the mount: `nodev`, `ro`, …
    pub flags: Vec<String>,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lower {
    /// Its directory.
    pub path: PathBuf,
    /// It only holds the contents of files that are named in others.
    pub data: bool,
}

/// What can be written to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upper {
    /// The upper layer.
    pub path: PathBuf,
    /// A directory beside it for the kernel's own use.
    pub work: PathBuf,
}

/// What is mounted at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountedAt {
    /// Nothing.
    Nothing,
    /// An overlay whose layers can be carried one by one.
    Overlay(Overlay),
    /// An overlay of which only the merged tree can be copied: why.
    Merged(String),
    /// Something else, of this type.
    Other(String),
}

/// The mounts of this process's namespace.
///
/// # Errors
/// When `/proc` is not there.
pub fn mounts() -> Result<Vec<MountInfo>> {
    let text = fs::read("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    Ok(text.split(|b| *b == b'\n').filter_map(MountInfo::parse).collect())
}

/// A line of mountinfo.
#[derive(Clone, Debug)]
pub struct MountInfo {
    root: PathBuf,
    /// Where it is.
    pub place: PathBuf,
    flags: String,
    kind: String,
    options: Vec<Vec<u8>>,
}

impl MountInfo {
    fn parse(line: &[u8]) -> Option<MountInfo> {
        let middle = line.windows(3).position(|w| w == b" - ")?;
        let mut left = line[..middle].split(|b| *b == b' ').skip(3);
        let mut right = line[middle + 3..].split(|b| *b == b' ');
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(plain(bytes)));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some(MountInfo {
            root: path(left.next()?),
            place: path(left.next()?),
            flags: text(left.next()?),
            kind: text(right.next()?),
            options: right.nth(1)?.split(|b| *b == b',').map(plain).collect(),
        })
    }

    fn overlay(&self) -> Result<Overlay, String> {
        if self.root != Path::new("/") {
            return Err("only a part of it is mounted there".into());
        }
        let mut overlay =
            Overlay { lower: Vec::new(), upper: None, options: Vec::new(), flags: Vec::new() };
        let (mut upper, mut work) = (None, None);
        let mut shown: HashMap<String, String> = HashMap::new();
        for option in &self.options {
            let at = option.iter().position(|b| *b == b'=').unwrap_or(option.len());
            let name = String::from_utf8_lossy(&option[..at]).into_owned();
            let value = option.get(at + 1..).unwrap_or_default();
            let one = || PathBuf::from(OsString::from_vec(unescape(value)));
            let lower = |data| Lower { path: OsStr::from_bytes(value).into(), data };
            match name.as_str() {
                "lowerdir" => overlay.lower = split(value),
                "lowerdir+" => overlay.lower.push(lower(false)),
                "datadir+" => overlay.lower.push(lower(true)),
                "upperdir" => upper = Some(one()),
                "workdir" => work = Some(one()),
                "ro" => overlay.flags.push(name),
                "rw" | "seclabel" => {}
                _ => {
                    shown.insert(name, String::from_utf8_lossy(value).into_owned());
                }
            }
        }

        overlay.upper = match (upper, work) {
            (Some(path), Some(work)) => Some(Upper { path, work }),
            (None, _) => None,
            _ => return Err("it has no work directory".into()),
        };

        // Some are shown only where they differ from what the module was loaded with.
        let set = |name: &str| shown.get(name).cloned().unwrap_or_else(|| default_of(name));
        for name in ["index", "nfs_export"] {
            // They tie the upper layer to the very inodes of the lower ones.
            if overlay.upper.is_some() && set(name) == "on" {
                return Err(format!("its option {name}=on ties it to this host's disks"));
            }
        }

        for name in ["redirect_dir", "metacopy"] {
            overlay.options.push(format!("{name}={}", set(name)));
        }
        for (name, value) in shown {
            let option = if value.is_empty() { name.clone() } else { format!("{name}={value}") };
            match name.as_str() {
                "index" | "nfs_export" | "redirect_dir" | "metacopy" => {}
                "verity" if value == "off" => {}
                _ if known(&option) => overlay.options.push(option),
                _ => return Err(format!("nothing is known of its option {option}")),
            }
        }

        overlay.options.sort();
        let flags = self.flags.split(',').filter(|f| flag(f).is_some());
        overlay.flags.extend(flags.map(str::to_owned));
        overlay.flags.sort();
        overlay.flags.dedup();
        if overlay.paths().any(|p| !p.is_absolute()) {
            return Err("its layers are named by relative paths".into());
        }

        Ok(overlay)
    }
}

/// Returns what is mounted at a place, on top.
pub fn at(mounts: &[MountInfo], place: &Path) -> MountedAt {
    match mounts.iter().rev().find(|m| m.place == place) {
        None => MountedAt::Nothing,
        Some(mount) if mount.kind == "overlay" => match mount.overlay() {
            Ok(overlay) => MountedAt::Overlay(overlay),
            Err(why) => MountedAt::Merged(why),
        },
        Some(mount) => MountedAt::Other(mount.kind.clone()),
    }
}

/// Where this directory is an overlay's upper one.
pub fn users_of<'a>(mounts: &'a [MountInfo], upper: &Path) -> Option<&'a Path> {
    let uses = |m: &&MountInfo| {
        let value = m.options.iter().find_map(|o| o.strip_prefix(b"upperdir="));
        m.kind == "overlay" && value.is_some_and(|v| unescape(v) == upper.as_os_str().as_bytes())
    };
    mounts.iter().find(uses).map(|m| m.place.as_path())
}

/// The upper layers of all overlays that are mounted.
pub fn uppers(mounts: &[MountInfo]) -> Vec<PathBuf> {
    let overlays = mounts.iter().filter(|m| m.kind == "overlay").flat_map(|m| &m.options);
    let values = overlays.filter_map(|o| o.strip_prefix(b"upperdir="));
    values.map(|v| PathBuf::from(OsString::from_vec(unescape(v)))).collect()
}

/// Returns what the module was told where a mount says nothing.
fn default_of(name: &str) -> String {
    let is = |name: &str| {
        fs::read(format!("/sys/module/overlay/parameters/{name}"))
            .is_ok_and(|text| text.starts_with(b"Y"))
    };
    let value = match name {
        "redirect_dir" if is("redirect_dir") => "on",
        "redirect_dir" if is("redirect_always_follow") => "follow",
        "redirect_dir" => "nofollow",
        _ if is(name) => "on",
        _ => "off",
    };
    value.into()
}

/// Options that are carried: what they say is about the overlay's own tree.
fn known(option: &str) -> bool {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    match name {
        "userxattr" | "volatile" | "default_permissions" => value.is_empty(),
        "redirect_dir" => matches!(value, "on" | "off" | "follow" | "nofollow"),
        "metacopy" => matches!(value, "on" | "off"),
        "xino" => matches!(value, "on" | "off" | "auto"),
        "uuid" => matches!(value, "on" | "off" | "null" | "auto"),
        "fsync" => matches!(value, "volatile" | "auto" | "strict"),
        _ => false,
    }
}

fn flag(name: &str) -> Option<MsFlags> {
    Some(match name {
        "ro" => MsFlags::MS_RDONLY,
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        "noatime" => MsFlags::MS_NOATIME,
        _ => return None,
    })
}

/// Without mountinfo's escapes: `\040` for a blank.
pub(crate) fn plain(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\');
        let octal = octal.and_then(|o| std::str::from_utf8(o).ok());
        match octal.and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(meant) => {
                out.push(meant);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

/// Without the overlay's own escapes: `\:`, `\,`, `\\`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = text.iter();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        out.push(if *byte == b'\\' { *bytes.next().unwrap_or(byte) } else { *byte });
    }
    out
}

fn escape(path: &Path, out: &mut Vec<u8>) {
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b':' | b',') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
}

/// The layers of `lowerdir=`. After a double colon they hold data only.
fn split(value: &[u8]) -> Vec<Lower> {
    let mut found = Vec::new();
    let (mut piece, mut data) = (Vec::new(), false);
    let mut take = |piece: &mut Vec<u8>, data| {
        let path = PathBuf::from(OsString::from_vec(std::mem::take(piece)));
        found.push(Lower { path, data });
    };
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => piece.extend(bytes.next()),
            b':' if piece.is_empty() => data = true,
            b':' => take(&mut piece, data),
            _ => piece.push(*byte),
        }
    }
    if !piece.is_empty() {
        take(&mut piece, data);
    }
    found
}

impl Overlay {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let upper = self.upper.iter().flat_map(|u| [&u.path, &u.work]);
        self.lower.iter().map(|l| &l.path).chain(upper).map(PathBuf::as_path)
    }

    /// Refuses what no honest peer sends.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn validate(&self) -> Result<()> {
        if self.lower.is_empty() || self.lower.len() > MAX_LAYERS {
            bail!("an overlay of {} layers", self.lower.len());
        }
        for path in self.paths() {
            let plain = |c| matches!(c, Component::Normal(_) | Component::RootDir);
            let named = path.file_name().is_some_and(|n| !n.as_bytes().contains(&0));
            if !path.is_absolute() || !named || !path.components().all(plain) {
                bail!("{} is no place for a layer", path.display());
            }
        }
        if let Some(odd) = self.options.iter().find(|o| !known(o)) {
            bail!("{odd:?} is no option of an overlay that can be carried");
        }
        if let Some(odd) = self.flags.iter().find(|f| flag(f).is_none()) {
            bail!("{odd:?} is no flag of a mount that can be carried");
        }
        if let Some(upper) = &self.upper
            && (upper.path.starts_with(&upper.work) || upper.work.starts_with(&upper.path))
        {
            bail!("an upper layer and a work directory one inside the other");
        }
        Ok(())
    }

    /// Returns what mount(2) is told.
    ///
    /// # Errors
    /// When it is more than mount(2) takes.
    pub fn data(&self) -> Result<OsString> {
        let mut data = b"lowerdir=".to_vec();
        for (i, lower) in self.lower.iter().enumerate() {
            if i > 0 {
                data.extend(if lower.data { &b"::"[..] } else { b":" });
            }
            escape(&lower.path, &mut data);
        }

        if let Some(upper) = &self.upper {
            data.extend(b",upperdir=");
            escape(&upper.path, &mut data);
            data.extend(b",workdir=");
            escape(&upper.work, &mut data);
            data.extend(b",index=off,nfs_export=off");
        }

        for option in &self.options {
            data.push(b',');
            data.extend(option.bytes());
        }
        if data.len() > MAX_OPTIONS {
            bail!(
                "the names of its {} layers take {} bytes, and mount(2) takes {MAX_OPTIONS}",
                self.lower.len(),
                data.len()
            );
        }

        Ok(OsString::from_vec(data))
    }

    /// Mounts it.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn mount(&self, place: &Path) -> Result<()> {
        let flags = self.flags.iter().filter_map(|f| flag(f)).collect();
        let data = self.data()?;
        mount(Some("overlay"), place, Some("overlay"), flags, Some(data.as_os_str()))
            .with_context(|| format!("cannot mount the overlay at {}", place.display()))
    }

    /// Finds out whether it can be mounted there, and leaves nothing of that.
    ///
    /// # Errors
    /// When it cannot.
    pub fn try_mount(&self, place: &Path) -> Result<()> {
        let mut trial = self.clone();
        // It would leave a note that keeps the work directory from being used again.
        trial.options.retain(|o| o != "volatile" && !o.starts_with("fsync="));
        trial.mount(place)?;
        unmount(place)?;
        if let Some(upper) = &self.upper {
            for left in fs::read_dir(&upper.work)? {
                fs::remove_dir_all(left?.path())?;
            }
        }
        Ok(())
    }
}

/// Takes down what is mounted there, unless somebody uses it.
///
/// # Errors
/// When somebody does.
pub fn unmount(place: &Path) -> Result<()> {
    let flags = MntFlags::UMOUNT_NOFOLLOW;
    umount2(place, flags).with_context(|| format!("cannot unmount {}", place.display()))
}

/// Files of an overlay as its tasks see them, and as they are in its upper layer: stat(2) tells the
/// inode of the lower file for one that was copied up.
#[derive(Debug, Default)]
pub struct Merged {
    /// The merged tree and the upper layer.
    places: Option<(PathBuf, PathBuf)>,
    known: HashMap<(u64, u64), (u64, u64)>,
}

impl Merged {
    /// Of the overlay that is mounted at `merged`.
    pub fn new(merged: &Path, upper: &Path) -> Merged {
        let places = Some((merged.to_owned(), upper.to_owned()));
        Merged { places, known: HashMap::new() }
    }

    /// The inode that is copied, of a file that a task has open; `link` is its entry in `/proc`.
    pub fn inode(&mut self, link: &Path, meta: &Metadata) -> (u64, u64) {
        let seen = (meta.dev(), meta.ino());
        let Some((merged, upper)) = &self.places else { return seen };
        if let Some(known) = self.known.get(&seen) {
            return *known;
        }

        // Without a name it is in no layer.
        if meta.nlink() == 0
            || statfs(link).is_ok_and(|s| s.filesystem_type() != OVERLAYFS_SUPER_MAGIC)
        {
            return seen;
        }

        // By its name in the container, where that is one of the root file system's.
        let name = fs::read_link(link).unwrap_or_default();
        let name = name.strip_prefix("/").unwrap_or(&name);
        if let Some(real) = real(merged, upper, name).filter(|r| r.0 == seen) {
            self.known.insert(seen, real.1);
            return real.1;
        }

        // By whatever name: it has another one, or is reached over another mount.
        let (merged, upper) = (merged.clone(), upper.clone());
        let _ = walk(&upper, &mut |path, _, found| {
            if found.is_file()
                && let Some(real) = real(&merged, &upper, Path::new(OsStr::from_bytes(path)))
            {
                self.known.insert(real.0, real.1);
            }
            Ok(true)
        });

        *self.known.entry(seen).or_insert(seen)
    }
}

/// Returns what the merged tree shows under a name, and what is there in the upper layer. Only numbers are
/// looked at, wherever links may lead.
fn real(merged: &Path, upper: &Path, name: &Path) -> Option<((u64, u64), (u64, u64))> {
    let inode = |path: PathBuf| {
        let meta = fs::symlink_metadata(path).ok().filter(Metadata::is_file)?;
        Some((meta.dev(), meta.ino()))
    };
    Some((inode(merged.join(name))?, inode(upper.join(name))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Target;

    fn one(options: &str) -> MountedAt {
        let line =
            format!("47 27 0:39 / /m\\040x rw,nodev,relatime shared:5 - overlay overlay {options}");
        at(&[MountInfo::parse(line.as_bytes()).unwrap()], Path::new("/m x"))
    }

    fn overlay(options: &str) -> Overlay {
        match one(options) {
            MountedAt::Overlay(overlay) => overlay,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn layers_are_read_in_every_notation() {
        let found = overlay(
            "rw,lowerdir=/l1:/l\\134:2:/l\\134\\0543:/l\\0404,upperdir=/u\\134:1,workdir=/w,uuid=on,xino=on",
        );
        let paths: Vec<_> = found.lower.iter().map(|l| l.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/l1", "/l:2", "/l,3", "/l 4"]);
        assert_eq!(found.upper, Some(Upper { path: "/u:1".into(), work: "/w".into() }));
        assert!(found.options.contains(&"xino=on".into()) && found.flags == ["nodev"]);
        found.validate().unwrap();
        let data = found.data().unwrap();
        let data = data.to_str().unwrap();
        assert!(data.starts_with("lowerdir=/l1:/l\\:2:/l\\,3:/l 4,upperdir=/u\\:1,workdir=/w,"));

        let found =
            overlay("ro,lowerdir+=/l:1,lowerdir+=/l2,datadir+=/d,metacopy=on,redirect_dir=on");
        let data: Vec<_> = found.lower.iter().map(|l| l.data).collect();
        assert_eq!(data, [false, false, true]);
        assert_eq!(found.upper, None);
        let text = found.data().unwrap();
        assert!(text.to_str().unwrap().starts_with("lowerdir=/l\\:1:/l2::/d,"));
        let again = overlay("ro,lowerdir=/l\\134:1:/l2::/d,metacopy=on,redirect_dir=on");
        assert_eq!(again, found);
    }

    #[test]
    fn what_cannot_be_carried_by_layers_is_told() {
        for odd in [
            "rw,lowerdir=l/A:l/B,upperdir=/u,workdir=/w",
            "rw,lowerdir=/a,upperdir=/u,workdir=/w,index=on",
            "rw,lowerdir=/a,upperdir=/u,workdir=/w,verity=require",
            "rw,lowerdir=/a,upperdir=/u,workdir=/w,novel=1",
        ] {
            assert!(matches!(one(odd), MountedAt::Merged(_)), "{odd}");
        }
        let mut bad = overlay("rw,lowerdir=/a,upperdir=/u,workdir=/w");
        bad.validate().unwrap();
        bad.lower[0].path = "/a/../b".into();
        assert!(bad.validate().is_err());
        bad.lower[0].path = "/a".into();
        bad.options.push("lowerdir=/etc".into());
        assert!(bad.validate().is_err());
        bad.options.pop();
        bad.lower = vec![Lower { path: format!("/{}", "a".repeat(200)).into(), data: false }; 30];
        bad.validate().unwrap();
        assert!(bad.data().is_err());
    }

    #[test]
    fn fuzz_mounts() {
        let line = b"5 1 0:40 / /merged rw,nosuid shared:1 - overlay overlay \
            rw,lowerdir=/l\\1341:/l2::/data,upperdir=/up\\040per,workdir=/work,xino=off";
        let other = b"5 1 0:40 / /m rw - overlay o rw,lowerdir+=/a,datadir+=/b";
        let target = Target::new("mounts").sample(*line).sample(*other);
        let words =
            [&b" - "[..], b"\\054", b"\\134", b"lowerdir=", b"::", b"upperdir=", b"workdir="];
        target.words(&words).run(|bytes| {
            let mount = MountInfo::parse(bytes).context("no mount")?;
            mount.overlay().map_err(anyhow::Error::msg)?.validate()
        });
    }
}
