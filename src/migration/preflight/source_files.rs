//! What the source can know of the files that a container has of this host: its root file system and what
//! is bound into it, each with a probe by which the destination sees whether it has the same.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::layers::{self, Layered};
use crate::engine::papers::EngineWants;
use crate::engine::property;
use crate::files::place::{self, Parent};
use crate::files::probe::{self, ProbeFile, Proof};
use crate::files::root::Root;
use crate::migration::options::MigrateOptions;
use crate::migration::protocol::{How, MAX_PARENTS, Place, Probe};
use crate::oci::bundle::Bundle;
use crate::problem::Problem;
use crate::sys::{mntns, process};

/// What the container has of this host's files.
pub struct Roots {
    /// By the number of its probe.
    pub list: Vec<Root>,
    /// The root of the container's mounts.
    pub inside: OwnedFd,
}

/// The same, as it was found.
pub(super) struct FoundFiles {
    /// For the destination.
    pub(super) listed: Vec<Probe>,
    /// Probe files that were made.
    pub(super) probes: Vec<ProbeFile>,
    /// What the probes are of.
    pub(super) roots: Roots,
    /// The root file system, where that is an overlay.
    pub(super) layered: Layered,
}

/// Looks at all of them.
///
/// # Errors
/// What is not to be copied, was replaced, or cannot be looked at.
pub(super) fn look(
    init: i32,
    bundle: &Bundle,
    wishes: &MigrateOptions,
    engine: Option<&EngineWants>,
) -> Result<FoundFiles> {
    known_places(bundle, wishes)?;
    let inside = mntns::root_of(init).context("cannot look at the container's mounts")?;
    let mut files = Listing { inside, listed: Vec::new(), probes: Vec::new(), roots: Vec::new() };

    let (root, fixed) = (bundle.rootfs()?, bundle.rootfs_read_only());
    if wishes.rootfs != How::Shared && engine.is_none() {
        let problem = property::store_problem("root file system", &root, "--rootfs shared");
        problem.map_or(Ok(()), Err)?;
    }

    let layered = match engine {
        None => {
            let what = "root file system".to_owned();
            layers::look(&root, &files.add(what, Place::Rootfs, &root, wishes.rootfs, fixed)?)?
        }
        Some(_) => engines_layers(&root)?,
    };

    for mount in bundle.bind_mounts() {
        if engine.iter().any(|e| e.own.contains(&mount.destination)) {
            continue;
        }
        let what = format!("bind mount {}", mount.destination.display());
        let wish = wishes.volumes.iter().find(|(place, _)| *place == mount.destination);

        // Nobody else has a volume there that the engine is asked to make.
        let volume = engine.iter().any(|e| e.volumes.iter().any(|v| v.place == mount.destination));
        let usual = if volume { How::Copy } else { How::Auto };
        let wish = wish.map_or(usual, |w| w.1);
        if wish == How::Copy && !volume {
            let option = format!("--volume {}=shared", mount.destination.display());
            property::store_problem(&what, &mount.source, &option).map_or(Ok(()), Err)?;
        }
        let place = Place::Mount(mount.destination);
        files.add(what, place, &mount.source, wish, mount.read_only)?;
    }

    let Listing { inside, listed, probes, roots } = files;
    Ok(FoundFiles { listed, probes, roots: Roots { list: roots, inside }, layered })
}

/// Who wishes something for a place where nothing is bound has mistaken its name.
fn known_places(bundle: &Bundle, wishes: &MigrateOptions) -> Result<(), Problem> {
    let mounts = bundle.bind_mounts();
    if let Some((place, _)) =
        wishes.volumes.iter().find(|(place, _)| mounts.iter().all(|m| m.destination != *place))
    {
        let known: Vec<_> = mounts.iter().map(|m| m.destination.display().to_string()).collect();
        let problem = Problem::new(
            format!("nothing is bound to {} in the container", place.display()),
            if known.is_empty() {
                "config.json has no bind mounts".to_owned()
            } else {
                format!("its bind mounts are {}", known.join(", "))
            },
        )
        .hint("--volume wants the place in the container, as in config.json's mounts");
        return Err(problem);
    }
    Ok(())
}

struct Listing {
    /// The root of the container's mounts.
    inside: OwnedFd,
    listed: Vec<Probe>,
    probes: Vec<ProbeFile>,
    roots: Vec<Root>,
}

impl Listing {
    /// Adds a tree; what its probe proves it by.
    fn add(
        &mut self,
        what: String,
        place: Place,
        path: &Path,
        wish: How,
        read_only: bool,
    ) -> Result<Proof> {
        let opened = Root::open(path);
        let opened = opened.with_context(|| format!("cannot look at {}", path.display()))?;

        // A single file that was replaced matters only if it is to be copied.
        if let Some(problem) = replaced(&self.inside, &what, &place, &opened)
            && opened.is_dir()
        {
            return Err(problem.into());
        }

        let probe = probe::make_at(&opened, read_only)?;
        let (proof, directory, file) = (probe.proof.clone(), opened.is_dir(), opened.is_file());
        self.probes.push(probe);
        self.roots.push(opened);
        let probe = Probe { what, place, proof: proof.clone(), wish, directory, file, read_only };
        self.listed.push(probe);
        Ok(proof)
    }
}

/// Tells whether the container has something else at a place than what its configuration leads to: it may
/// have put a symbolic link there that leads out of it. `inside` is the root of its mounts.
pub fn replaced(inside: &OwnedFd, what: &str, place: &Place, found: &Root) -> Option<Problem> {
    let place = match place {
        Place::Rootfs => Path::new("/"),
        Place::Mount(place) => place,
    };
    let has = probe::inode_in(&process::path_of(inside), place);
    (has != Some(found.inode())).then(|| {
        Problem::new(
            format!("the {what} is not what is at {}", found.place().display()),
            "that was replaced since the container was started: it still has what was there before",
        )
        .hint("start the container anew; and do not replace what is bound into a container")
    })
}

/// The directories above everything that may be copied, at their places on the destination.
pub(super) fn parents(
    bundle: &Bundle,
    layered: &Layered,
    wishes: &MigrateOptions,
) -> Result<Vec<Parent>> {
    let there = wishes.bundle.as_deref().unwrap_or(&bundle.path);
    let moved = |path: &Path| match path.strip_prefix(&bundle.path) {
        Ok(below) => there.join(below),
        Err(_) => path.to_owned(),
    };
    let mut places = vec![bundle.path.clone(), bundle.rootfs()?];
    places.extend(bundle.bind_mounts().into_iter().map(|mount| mount.source));
    if let Some(upper) = layered.overlay().and_then(|overlay| overlay.upper.as_ref()) {
        places.extend([upper.path.clone(), upper.work.clone()]);
    }
    let mut list: Vec<Parent> = Vec::new();
    for parent in places.iter().flat_map(|path| place::parents(path, moved)) {
        if list.len() < MAX_PARENTS && list.iter().all(|known| known.path != parent.path) {
            list.push(parent);
        }
    }

    Ok(list)
}

/// The root file system of an engine's container: what it has changed of its image goes along.
fn engines_layers(root: &Path) -> Result<Layered> {
    let layered = layers::look_at_engines(root)?;
    if layered.overlay().is_some_and(|overlay| overlay.upper.is_some()) {
        Ok(layered)
    } else {
        let why = layered.only_merged().unwrap_or("it is no overlay with an upper layer");
        let what = "what the container has changed of its image cannot be told";
        let problem = Problem::new(what, why.to_owned());
        Err(problem
            .hint("the engine's storage driver must be overlay, mounted by the kernel")
            .into())
    }
}
