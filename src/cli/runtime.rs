//! Which runtime stands behind us, and where things are on this host.
//!
//! `--ferry-runtime`, then `FERRY_RUNTIME`, then `runtime = "…"` in the configuration file
//! (`/etc/ferry/config.toml`, or `FERRY_CONFIG`), then `runc` in PATH.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Result, bail};
use nix::unistd::{AccessFlags, access, geteuid};
use serde::Deserialize;

use crate::problem::{Advise, advice};

/// Where a runtime is looked for when the environment has no PATH: podman calls some verbs
/// with an empty environment.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_CONFIG: &str = "/etc/ferry/config.toml";
const DEFAULT_STATE: &str = "/var/lib/ferry";
const DEFAULT_RUNTIME: &str = "runc";

/// The configuration file. Keys that we do not know are left alone: an engine must not lose
/// all its containers to a file written for a newer ferry.
#[derive(Debug, Default, Deserialize)]
pub struct Config {
    /// The runtime to start: a path, or a name to look up in PATH.
    pub runtime: Option<PathBuf>,
    /// Ferry's state directory.
    pub state: Option<PathBuf>,
    /// Whether new containers are denied what cannot be migrated:
    /// [`make`](crate::oci::migratable::make).
    #[serde(default)]
    pub migratable: bool,
}

impl Config {
    /// Reads the file. The default one need not exist; one named by `FERRY_CONFIG` must.
    pub fn load() -> Result<Config> {
        let named = set("FERRY_CONFIG");
        let path = named.as_deref().unwrap_or(DEFAULT_CONFIG.as_ref());
        let path = Path::new(path);
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|why| {
                let line = why.span().map_or(1, |at| text[..at.start].matches('\n').count() + 1);
                let (path, why) = (path.display(), why.message());
                advice(
                    format!("the configuration {path} is wrong in line {line}: {why}"),
                    "it is TOML, as in `runtime = \"/usr/bin/crun\"`",
                )
            }),
            Err(why) if why.kind() == ErrorKind::NotFound && named.is_none() => {
                Ok(Config::default())
            }
            Err(why) => Err(why).advise(
                format!("cannot read the configuration {}", path.display()),
                format!("it is named by FERRY_CONFIG or is the default {DEFAULT_CONFIG}"),
            ),
        }
    }

    /// Returns where ferry keeps what must outlive a reboot: away-marks, the journal.
    pub fn state_dir(&self) -> PathBuf {
        set("FERRY_STATE")
            .map(PathBuf::from)
            .or_else(|| self.state.clone())
            .unwrap_or_else(|| DEFAULT_STATE.into())
    }
}

/// The runtime behind us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundRuntime {
    /// The file to execute.
    pub path: PathBuf,
    /// Its argv[0], by which it calls itself in messages: what the user called it.
    pub name: OsString,
}

/// Why there is no runtime to start; exit codes as a shell has them.
#[derive(Debug)]
pub struct Unusable {
    /// 127 when there is none, 126 when there is one that cannot be started.
    pub exit: u8,
    /// What the user is told.
    pub error: anyhow::Error,
}

impl FoundRuntime {
    /// Finds the runtime; `flag` is `--ferry-runtime`.
    ///
    /// The configuration is read only if it is needed.
    pub fn find(flag: Option<&OsStr>) -> Result<FoundRuntime, Unusable> {
        let chosen = match flag.map(OsStr::to_owned).or_else(|| set("FERRY_RUNTIME")) {
            Some(chosen) => Some(chosen),
            None => {
                let config = Config::load().map_err(|error| Unusable { exit: 126, error })?;
                config.runtime.map(PathBuf::into_os_string)
            }
        };

        let name = chosen.clone().unwrap_or_else(|| DEFAULT_RUNTIME.into());
        if name.as_encoded_bytes().contains(&b'/') {
            return FoundRuntime::at(name);
        }
        let path = set("PATH").unwrap_or_else(|| DEFAULT_PATH.into());

        match look_up(&name, &path) {
            Some(path) => Ok(FoundRuntime { path, name }),
            None => Err(Unusable {
                exit: 127,
                error: advice(
                    format!(
                        "no container runtime: {} is not in {}",
                        name.display(),
                        path.display()
                    ),
                    format!(
                        "{}, or name a runtime by --ferry-runtime, FERRY_RUNTIME or `runtime = \
                         \"…\"` in {DEFAULT_CONFIG}",
                        if chosen.is_none() { "install runc" } else { "install it" },
                    ),
                ),
            }),
        }
    }

    /// A runtime named by its path.
    fn at(name: OsString) -> Result<FoundRuntime, Unusable> {
        let path = PathBuf::from(&name);
        let refuse = |exit, why: &str| {
            let shown = path.display();
            Err(Unusable {
                exit,
                error: advice(
                    format!("cannot use {shown} as the container runtime: {why}"),
                    format!(
                        "it was named by --ferry-runtime, FERRY_RUNTIME or `runtime = \"…\"` in \
                         {DEFAULT_CONFIG}"
                    ),
                ),
            })
        };

        match fs::metadata(&path) {
            Err(why) => refuse(127, &why.to_string()),
            Ok(file) if is_ourselves(&path, &file) => {
                refuse(126, "it is ferry itself, which would start itself for ever")
            }
            Ok(file) if !file.is_file() || !may_execute(&path) => {
                refuse(126, "it cannot be executed")
            }
            Ok(_) => Ok(FoundRuntime { path, name }),
        }
    }

    /// The `--root` that the runtime takes when none is given.
    pub fn default_root(&self) -> PathBuf {
        let name = match self.path.file_name() {
            Some(name) if name == "crun" || name == "youki" => name,
            _ => DEFAULT_RUNTIME.as_ref(),
        };
        let user = set("XDG_RUNTIME_DIR").filter(|_| has_user_root());
        user.map_or("/run".into(), PathBuf::from).join(name)
    }
}

/// runc's rule for whether XDG_RUNTIME_DIR counts: not for the real root.
fn has_user_root() -> bool {
    if !geteuid().is_root() {
        return true;
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let in_user_namespace = !map.is_empty() && !map.split_whitespace().eq(["0", "0", "4294967295"]);
    in_user_namespace && env::var_os("USER").is_none_or(|user| user != "root")
}

/// A variable that is set to something.
fn set(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// The first such executable in PATH that is not ferry: engines want a runtime named runc,
/// so we may be installed under that name, in front of the real one.
fn look_up(name: &OsStr, path: &OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        // Engines have the bundle as their working directory: what lies there is not ours
        // to execute.
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|candidate| {
            fs::metadata(candidate).is_ok_and(|file| {
                file.is_file() && may_execute(candidate) && !is_ourselves(candidate, &file)
            })
        })
}

fn may_execute(path: &Path) -> bool {
    access(path, AccessFlags::X_OK).is_ok()
}

/// Tells whether a file is this program, or a copy of it.
fn is_ourselves(path: &Path, file: &fs::Metadata) -> bool {
    let Ok(us) = fs::metadata("/proc/self/exe") else { return false };
    if (us.dev(), us.ino()) == (file.dev(), file.ino()) {
        return true;
    }
    us.len() == file.len() && same_content(path, Path::new("/proc/self/exe")).unwrap_or(false)
}

fn same_content(a: &Path, b: &Path) -> Result<bool> {
    let (mut a, mut b) = (fs::File::open(a)?, fs::File::open(b)?);
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let count = a.read(&mut left)?;
        if count == 0 {
            return Ok(b.read(&mut right)? == 0);
        }
        if let Err(why) = b.read_exact(&mut right[..count]) {
            if why.kind() == ErrorKind::UnexpectedEof {
                return Ok(false);
            }
            bail!(why);
        }
        if left[..count] != right[..count] {
            return Ok(false);
        }
    }
}
