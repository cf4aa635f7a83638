//! A root file system that is an overlay: what the source finds, and where the destination puts it.
//!
//! Lower layers are found on the destination by what is in them, wherever they are; those that it
//! lacks are copied once into its store. The upper layer is copied like any other tree, and the
//! overlay mounted of them at the bundle's root file system.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};

use crate::files::apply::Applied;
use crate::files::layers::{Layer, LayerStore};
use crate::files::mounting::Mounting;
use crate::files::overlay::{self, MountedAt, Overlay, Upper};
use crate::files::probe::{self, Proof};
use crate::migration::protocol::{Place, Plan};
use crate::problem::Problem;

/// What the source has as its root file system.
#[derive(Debug)]
pub struct Layered(MountedAt);

/// Looks at a root file system; `proof` is that of its probe.
///
/// # Errors
/// When the mounts cannot be read.
pub fn look(root: &Path, proof: &Proof) -> Result<Layered> {
    let root = fs::canonicalize(root).with_context(|| root.display().to_string())?;
    let mounts = overlay::mounts()?;
    let mut found = overlay::at(&mounts, &root);
    if let MountedAt::Overlay(overlay) = &mut found {
        let below = mounts.iter().find(|m| m.place.starts_with(&root) && m.place != root);
        let odd = match below {
            Some(below) => Some(format!("something is mounted at {}", below.place.display())),
            None => out_of_reach(overlay, proof),
        };
        if let Some(odd) = odd {
            found = MountedAt::Merged(odd);
        }
    }
    Ok(Layered(found))
}

/// Looks at a root file system that an engine has mounted, and whose layers are the engine's.
///
/// # Errors
/// When the mounts cannot be read.
pub fn look_at_engines(root: &Path) -> Result<Layered> {
    let root = fs::canonicalize(root).with_context(|| root.display().to_string())?;
    Ok(Layered(overlay::at(&overlay::mounts()?, &root)))
}

/// Returns why what mountinfo names is not what is mounted: another mount namespace has other paths.
fn out_of_reach(overlay: &mut Overlay, proof: &Proof) -> Option<String> {
    for lower in &mut overlay.lower {
        match fs::canonicalize(&lower.path) {
            Ok(path) => lower.path = path,
            Err(e) => return Some(format!("its layer {}: {e}", lower.path.display())),
        }
    }
    let Upper { path, .. } = overlay.upper.as_ref()?;
    match proof.file.as_ref().map(|_| probe::verify(path, proof)) {
        Some(Ok(())) => None,
        _ => Some(format!("its upper layer is not what is at {}", path.display())),
    }
}

impl Layered {
    /// The overlay, if it can go layer by layer.
    pub fn overlay(&self) -> Option<&Overlay> {
        match &self.0 {
            MountedAt::Overlay(overlay) => Some(overlay),
            _ => None,
        }
    }

    /// Returns why only the merged tree of an overlay can be copied.
    pub fn only_merged(&self) -> Option<&str> {
        match &self.0 {
            MountedAt::Merged(why) => Some(why),
            _ => None,
        }
    }

    /// The overlay as it is to be on the destination: what is in the bundle here is in the bundle
    /// there, everything else at the same path.
    pub fn over_there(&self, bundle: &Path, there: Option<&Path>) -> Option<Overlay> {
        let mut overlay = self.overlay()?.clone();
        // The copy is given an identity of its own.
        overlay.options.retain(|o| !o.starts_with("uuid="));
        let moved = |path: &mut PathBuf| {
            if let (Some(there), Ok(below)) = (there, path.strip_prefix(bundle)) {
                *path = there.join(below);
            }
        };
        overlay.lower.iter_mut().for_each(|l| moved(&mut l.path));
        if let Some(upper) = &mut overlay.upper {
            moved(&mut upper.path);
            moved(&mut upper.work);
        }
        Some(overlay)
    }
}

/// The source's overlay is of no use any more: takes it down, if it is the one whose upper layer is
/// among what goes.
///
/// # Errors
/// When somebody uses it.
pub fn unmount(place: &Path, removed: &[PathBuf]) -> Result<()> {
    let Ok(place) = fs::canonicalize(place) else { return Ok(()) };
    match overlay::at(&overlay::mounts()?, &place) {
        MountedAt::Overlay(Overlay { upper: Some(upper), .. })
            if fs::canonicalize(&upper.path).is_ok_and(|path| removed.contains(&path)) =>
        {
            overlay::unmount(&place)
        }
        _ => Ok(()),
    }
}

/// The overlay that has to come here: the plan's, if its root file system is to be copied.
pub fn wanted<'a>(plan: &'a Plan, copies: &[usize]) -> Option<&'a Overlay> {
    let root = plan.probes.iter().position(|p| p.place == Place::Rootfs)?;
    plan.overlay.as_ref().filter(|_| copies.contains(&root))
}

/// Returns what is mounted on this host where the overlay is to be, if it may go: what the same container has
/// left.
fn before(place: &Path, overlay: &Overlay) -> Result<Option<Overlay>, Box<Problem>> {
    let odd = |what: String, why: String, hint: &str| Box::new(Problem::new(what, why).hint(hint));
    let mounts = overlay::mounts()
        .map_err(|e| odd("cannot look at the mounts".into(), format!("{e:#}"), ""))?;
    let real = fs::canonicalize(place).unwrap_or_else(|_| place.to_owned());
    let upper = |o: &Overlay| o.upper.as_ref().map(|u| (u.path.clone(), u.work.clone()));
    let found = match overlay::at(&mounts, &real) {
        MountedAt::Nothing => None,
        MountedAt::Overlay(found) if upper(&found) == upper(overlay) => Some(found),
        _ => {
            return Err(odd(
                "the root file system's place is taken on the destination".into(),
                format!("something else is mounted at {}", place.display()),
                "unmount it there, or name another place with --bundle",
            ));
        }
    };

    if let Some(Upper { path, .. }) = &overlay.upper
        && let Some(user) = overlay::users_of(&mounts, path).filter(|user| *user != real)
    {
        return Err(odd(
            "the upper layer's place is taken on the destination".into(),
            format!(
                "{} is the upper layer of what is mounted at {}",
                path.display(),
                user.display()
            ),
            "unmount that, if nobody needs it",
        ));
    }

    Ok(found)
}

/// Tells whether the overlay can be mounted at `place` on this host, as far as that shows; `proof` is that
/// of the source's root file system.
///
/// # Errors
/// What stands in the way.
pub fn check(place: &Path, overlay: &Overlay, proof: &Proof) -> Result<(), Box<Problem>> {
    before(place, overlay)?;
    let Some(Upper { path, work }) = &overlay.upper else { return Ok(()) };
    let odd = |why: String, hint: &str| {
        Box::new(Problem::new("the upper layer cannot be on the destination", why).hint(hint))
    };

    if probe::verify(path, proof).is_ok() {
        return Err(odd(
            format!("both hosts see {}", path.display()),
            "two hosts must not mount one upper layer: put it on the source's own disk",
        ));
    }

    let there = |path: &Path| {
        let dir =
            path.ancestors().skip(1).find(|p| p.exists()).unwrap_or(Path::new("/")).to_owned();
        Some((fs::metadata(&dir).ok()?.dev(), statfs(&dir).ok()?.filesystem_type()))
    };

    match (there(path), there(work)) {
        (Some((upper, kind)), Some((work, _))) if upper == work => match kind {
            OVERLAYFS_SUPER_MAGIC => Err(odd(
                format!("{} would be on an overlay itself", path.display()),
                "mount a disk there; or, if it is in the bundle, name another place with --bundle",
            )),
            _ => Ok(()),
        },
        _ => Err(odd(
            format!("{} and {} would be on two file systems", path.display(), work.display()),
            "mount what they are in there as it is on the source",
        )),
    }
}

/// An overlay on its way in.
#[derive(Debug)]
pub struct ComingOverlay {
    /// How it is mounted in the end.
    pub mounting: Mounting,
    /// Its upper layer's places.
    pub upper: Option<Upper>,
    store: LayerStore,
    lacking: Vec<Lacking>,
}

#[derive(Debug)]
struct Lacking {
    staged: PathBuf,
    place: PathBuf,
    layer: Layer,
}

impl ComingOverlay {
    /// Looks for the layers on this host; which are not there. Nothing is made.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn plan(
        plan: &Plan,
        overlay: &Overlay,
        place: &Path,
        layers: &[Layer],
        state_dir: &Path,
    ) -> Result<(ComingOverlay, Vec<usize>), Box<Problem>> {
        let before = before(place, overlay)?;
        let mut store = LayerStore::open(state_dir);
        let mut overlay = overlay.clone();

        // What somebody writes to is no layer tomorrow, and no overlay takes a layer twice.
        let mut taken = overlay::mounts().map(|m| overlay::uppers(&m)).unwrap_or_default();
        let left: Vec<PathBuf> =
            before.iter().flat_map(|b| &b.lower).map(|l| l.path.clone()).collect();
        let (mut lacking, mut numbers) = (Vec::new(), Vec::new());

        for (i, (lower, layer)) in overlay.lower.iter_mut().zip(layers).enumerate() {
            let mut places = vec![lower.path.clone()];
            places.extend(left.get(i).cloned());
            lower.path = store.find(layer, &places, &taken).unwrap_or_else(|| {
                let (staged, place) = store.place(layer, &plan.migration, i, &taken);
                lacking.push(Lacking { staged, place: place.clone(), layer: layer.clone() });
                numbers.push(i);
                place
            });
            taken.push(lower.path.clone());
        }

        store.save();
        tracing::debug!(?overlay, lacking = numbers.len(), "looked for the layers");
        if let Err(e) = overlay.data() {
            return Err(Box::new(
                Problem::new("the overlay cannot be mounted on the destination", format!("{e:#}"))
                    .hint("let Ferry's state directory there have a shorter name (config.toml)"),
            ));
        }

        let at = store.dir().ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        let kind = statfs(at).map(|s| s.filesystem_type());
        if !lacking.is_empty() && kind.is_ok_and(|k| k == OVERLAYFS_SUPER_MAGIC) {
            return Err(Box::new(
                Problem::new(
                    "layers cannot be kept on the destination",
                    format!("{} would be on an overlay itself", store.dir().display()),
                )
                .hint("mount a disk there, or let Ferry's state directory be on one (config.toml)"),
            ));
        }

        let upper = overlay.upper.clone();
        let mounting = Mounting::plan(&plan.migration, place, overlay, before);
        Ok((ComingOverlay { mounting, upper, store, lacking }, numbers))
    }

    /// Returns where the lacking layers are staged.
    pub fn staged(&self) -> Vec<PathBuf> {
        self.lacking.iter().map(|l| l.staged.clone()).collect()
    }

    /// Returns where they will be.
    pub fn store(&self) -> &Path {
        self.store.dir()
    }

    /// Makes the places where they are staged.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn stage(&self) -> Result<()> {
        self.store.stage(&self.staged())
    }

    /// The layers are whole, and on the disk: from here on they stay, whatever becomes of the
    /// migration.
    fn arrived(&mut self) -> Result<()> {
        for one in self.lacking.drain(..) {
            self.store.take(&one.staged, &one.place, &one.layer)?;
        }
        self.store.save();
        Ok(())
    }

    /// Returns what is told of the copies, once the first round's layers are in their places.
    pub fn after_first_round(
        self,
        tell: impl Fn(Applied) + Send + 'static,
    ) -> impl Fn(Applied) + Send + 'static {
        let coming = Mutex::new(self);
        move |applied| {
            let taken = match (&applied, coming.lock()) {
                (Applied::Round(1), Ok(mut coming)) => coming.arrived(),
                (Applied::Round(_), Err(_)) => Err(anyhow!("taking layers in has failed")),
                _ => Ok(()),
            };
            tell(taken.map_or_else(|e| Applied::Failed(format!("{e:#}")), |()| applied));
        }
    }
}
