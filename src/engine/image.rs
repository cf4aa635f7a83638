//! The image that a container was made of: where the destination lacks it, it goes along.
//!
//! ```text
//! source                                    destination
//!   its ID, name and layers  ──────────▶    look      there; there without its name; lacking
//!   outgoing   what is lacking, out of ─▶   intake    each part by its digest, into an archive
//!              what the engine saves        take      noted, loaded, named
//!                                           (or, at any error, discard)
//! ```
//!
//! An image's ID is the digest of its configuration, and that names the digest of each layer's archive. So the
//! destination's engine gets nothing but what the ID in the plan vouches for, in an archive that is written
//! here. Of layers that it has, an empty file in their places will do: docker looks for the chain of layers
//! first, podman for the layer. (docker 28.5: image/tarexport; podman 5.8: containers/image, docker/archive.)
//!
//! No name is ever taken from another image: both engines do that silently when they are asked to load or
//! to tag.

pub(crate) mod intake;
pub(crate) mod outgoing;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::Engine;
use super::common::{self, short, text};
use super::papers::{EngineImage, EngineWants, Made};
use crate::problem::Problem;
use crate::sys::{fault, host, tmpfs};

/// Until an engine has taken an image in, or has begun to give one.
pub(super) const IMAGE_LIMIT: Duration = Duration::from_secs(900);
/// Room that must be left on a disk.
const RESERVE: u64 = 256 << 20;
/// As often an image is on the disk in the worst moment: as we keep it, as the engine does, and unpacked.
const COPIES: u64 = 3;

/// Notes of what has been made.
const LOADED: &str = "image loaded";
const NAMED: &str = "image named";

/// What an engine says of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FoundImage {
    /// Hexadecimal digits.
    pub id: String,
    /// Tags; not digests.
    pub names: Vec<String>,
    /// Digests of the layers' archives, from the first: `sha256:…`.
    pub layers: Vec<String>,
    /// Bytes of what is in it.
    pub bytes: u64,
}

impl FoundImage {
    /// As both engines' `inspect` says it.
    pub(super) fn of(found: &serde_json::Value) -> FoundImage {
        let texts = |value: &serde_json::Value| -> Vec<String> {
            value.as_array().into_iter().flatten().map(|one| text(one).to_owned()).collect()
        };
        FoundImage {
            id: bare(text(&found["Id"])).to_owned(),
            names: texts(&found["RepoTags"]),
            layers: texts(&found["RootFS"]["Layers"]),
            bytes: found["Size"].as_u64().unwrap_or(0),
        }
    }
}

/// An engine's images.
pub(crate) trait ImageStore: Sync {
    /// Returns the one by a name or an ID; `None` if there is none.
    ///
    /// # Errors
    /// When the engine does not say.
    fn find(&self, word: &str) -> Result<Option<FoundImage>>;

    /// Returns all that there are.
    ///
    /// # Errors
    /// When the engine does not say.
    fn all(&self) -> Result<Vec<FoundImage>>;

    /// Returns where the engine needs room to give one.
    fn scratch(&self, wanted: &EngineWants) -> PathBuf;

    /// An archive of the one with an ID, as it comes.
    ///
    /// # Errors
    /// When the engine does not begin.
    fn save(&self, id: &str) -> Result<Box<dyn Read + Send>>;

    /// Takes in what is in an archive.
    ///
    /// # Errors
    /// When the engine does not.
    fn load(&self, archive: &Path) -> Result<()>;

    /// Nobody loads this archive any more.
    fn end_load(&self, archive: &Path);

    /// Gives a name that no image has.
    ///
    /// # Errors
    /// When the engine does not.
    fn name(&self, id: &str, name: &str) -> Result<()>;

    /// Takes a name away, and the image if that was its last one; or one that has no name, by its ID.
    ///
    /// # Errors
    /// When the engine does not: also if a container uses it.
    fn remove(&self, word: &str) -> Result<()>;
}

/// What becomes of the image on the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageCourse {
    /// Nothing is to be done.
    #[default]
    There,
    /// It is there, and is given its name, which nothing has.
    Named,
    /// It is copied.
    Copied {
        /// So many of its layers, from the first, are there.
        there: usize,
    },
}

/// What a migration makes of an image on the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeImage {
    /// Hexadecimal digits of its ID.
    pub id: String,
    /// The name that it gets; empty if none.
    pub name: String,
}

/// Returns the hexadecimal digits of an ID or a digest.
fn bare(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

/// What a container calls its image by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ImageReference<'a> {
    /// A tag, which can be given.
    Tag(&'a str),
    /// A registry's digest, which comes by a pull alone.
    Digest,
    /// Its ID, or the beginning.
    Id,
}

fn called(image: &EngineImage) -> ImageReference<'_> {
    let name = image.name.as_str();
    if !bare(name).is_empty() && bare(&image.id).starts_with(bare(name)) {
        ImageReference::Id
    } else if name.contains('@') {
        ImageReference::Digest
    } else {
        ImageReference::Tag(name)
    }
}

/// An image with what the source's engine says of it: so it can be copied.
pub(super) fn described(
    store: &dyn ImageStore,
    image: EngineImage,
    problems: &mut Vec<Problem>,
) -> EngineImage {
    match store.find(&image.id) {
        Ok(Some(found)) => EngineImage { layers: found.layers, bytes: found.bytes, ..image },
        // It runs without: but there it must be.
        Ok(None) => EngineImage { never: true, ..image },
        Err(e) => {
            problems.push(Problem::new("the engine does not tell of the image", format!("{e:#}")));
            image
        }
    }
}

/// Returns what there will be to undo.
pub(crate) fn made(image: &EngineImage, course: ImageCourse) -> Option<MadeImage> {
    let name = match called(image) {
        ImageReference::Tag(name) => name.to_owned(),
        _ => String::new(),
    };
    (course != ImageCourse::There).then(|| MadeImage { id: bare(&image.id).to_owned(), name })
}

/// Finds out what becomes of the image here, and what is to be told of that.
pub(super) fn look(
    store: &dyn ImageStore,
    wanted: &EngineWants,
) -> Result<(ImageCourse, Vec<Problem>)> {
    let (engine, image) = (wanted.engine, &wanted.image);
    let by_name = store.find(&image.name)?;
    let (by_id, all) = match &by_name {
        Some(_) => (None, Vec::new()),
        None => match store.find(&image.id)? {
            Some(found) => (Some(found), Vec::new()),
            None => (None, store.all()?),
        },
    };

    let here = host::name();
    let found = (by_name.as_ref(), by_id.as_ref());
    let course = match decide(engine, image, found, &all, &here) {
        Ok(course) => course,
        Err(problem) => return Ok((ImageCourse::There, vec![*problem])),
    };

    let mut problems = Vec::new();
    if by_name.is_none() && called(image) == ImageReference::Digest {
        problems.push(
            Problem::new(
                format!("{engine} on {here} will know the image by its ID"),
                format!(
                    "{} is a registry's name for it, which comes with a pull alone",
                    image.name
                ),
            )
            .hint(format!("`{engine} pull {}` on {here} beforehand keeps it", image.name))
            .warning(),
        );
    }
    if let ImageCourse::Copied { .. } = course {
        problems.extend(room(&wanted.store.root, image.bytes.saturating_mul(COPIES), &here)?);
    }

    Ok((course, problems))
}

/// What becomes of the image, by what there is: of its name, of its ID, and all.
fn decide(
    engine: Engine,
    wanted: &EngineImage,
    (by_name, by_id): (Option<&FoundImage>, Option<&FoundImage>),
    all: &[FoundImage],
    here: &str,
) -> Result<ImageCourse, Box<Problem>> {
    let name = &wanted.name;
    match (by_name, by_id) {
        (Some(found), _) if found.id == bare(&wanted.id) => Ok(ImageCourse::There),
        (Some(other), _) => Err(Box::new(common::other_image(engine, wanted, &other.id, here))),
        _ if wanted.never => Err(Box::new(common::no_image(engine, wanted, here))),
        (None, Some(found)) => match called(wanted) {
            // It could not be taken off again without the image.
            ImageReference::Tag(_) if found.names.is_empty() => {
                let (what, why) = (
                    format!(
                        "{engine} on {here} has the image of {name} without any \
                     name"
                    ),
                    "the container needs it by that one",
                );
                let hint = format!("`{engine} tag {} {name}` on {here}", short(&found.id));
                Err(Box::new(Problem::new(what, why).hint(hint)))
            }
            ImageReference::Tag(_) => Ok(ImageCourse::Named),
            ImageReference::Digest | ImageReference::Id => Ok(ImageCourse::There),
        },
        (None, None) => {
            let same = |have: &FoundImage| {
                have.layers.iter().zip(&wanted.layers).take_while(|(a, b)| a == b).count()
            };
            Ok(ImageCourse::Copied { there: all.iter().map(same).max().unwrap_or(0) })
        }
    }
}

/// Room for so much, where `at` will be.
///
/// # Errors
/// When that cannot be found out.
pub(crate) fn room(at: &Path, bytes: u64, host: &str) -> Result<Option<Problem>> {
    let at = at.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let free = tmpfs::free_bytes(at)?;
    // Archives are a little larger than what is in them.
    let needed = bytes.saturating_add(bytes / 20).saturating_add(RESERVE);
    Ok((free < needed).then(|| {
        Problem::new(
            format!("{} on {host} has no room for the image", at.display()),
            format!("{} MiB are free, {} MiB are needed", free >> 20, needed >> 20),
        )
        .hint("free some there; or bring the image there yourself, and --image never")
    }))
}

/// Takes the image in out of its archive; it is noted before.
///
/// # Errors
/// When the engine does not take it, or has another one afterwards.
pub(crate) fn take(store: &dyn ImageStore, made: &Made) -> Result<()> {
    let Some(image) = &made.image else { bail!("an image that is not wanted") };
    let there = || store.find(&image.id);
    // Somebody else may have brought it meanwhile: then it is his.
    if there()?.is_none() {
        made.note(LOADED)?;
        fault::point("destination.image")?;
        store.load(&made.archive())?;
        let _ = fs::remove_file(made.archive());
        if there()?.is_none_or(|found| found.id != image.id) {
            bail!("{} has taken the image {} in, and does not have it", made.engine, image.id);
        }
    }

    name(store, made)
}

/// Gives an image that is here its name, which is noted before.
///
/// # Errors
/// When something has that meanwhile, or the engine does not.
pub(crate) fn name(store: &dyn ImageStore, made: &Made) -> Result<()> {
    let Some(image) = made.image.as_ref().filter(|image| !image.name.is_empty()) else {
        return Ok(());
    };
    match store.find(&image.name)? {
        Some(found) if found.id == image.id => return Ok(()),
        Some(found) => bail!(
            "{} has another image by the name {} meanwhile: {}",
            made.engine,
            image.name,
            short(&found.id)
        ),
        None => {}
    }
    made.note(NAMED)?;
    store.name(&image.id, &image.name)
}

/// Takes away what has been made: a name that was given, and an image that was loaded, if nobody else has
/// given it another name, and no container uses it.
///
/// # Errors
/// When the engine does not say what there is.
pub(super) fn discard(store: &dyn ImageStore, made: &Made) -> Result<()> {
    let Some(image) = &made.image else { return Ok(()) };
    let (loaded, named) = (made.has_noted(LOADED), made.has_noted(NAMED));
    if loaded {
        store.end_load(&made.archive());
    }
    let _ = fs::remove_file(made.archive());

    let remove = |word: &str| {
        // Whoever uses it needs it.
        let removed = store.remove(word);
        removed.unwrap_or_else(|e| tracing::warn!("the image {word} stays: {e:#}"));
    };

    if named
        && let Some(found) = store.find(&image.name)?
        && found.id == image.id
        && (loaded || found.names.len() > 1)
    {
        remove(&image.name);
    }
    if loaded && store.find(&image.id)?.is_some_and(|found| found.names.is_empty()) {
        remove(&image.id);
    }

    Ok(())
}

/// Returns by what the image is asked for here: its name; or its ID, where there is no such name.
///
/// # Errors
/// When the engine does not say what there is.
pub(super) fn word(store: &dyn ImageStore, image: &EngineImage) -> Result<String> {
    let by_digest = called(image) == ImageReference::Digest && store.find(&image.name)?.is_none();
    Ok(if by_digest { image.id.clone() } else { image.name.clone() })
}

#[cfg(test)]
mod tests;
