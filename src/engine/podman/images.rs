//! podman's images, by its own program.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;

use super::PODMAN;
use crate::engine::command::{self, LIMIT, ask, run};
use crate::engine::image::{FoundImage, IMAGE_LIMIT, ImageStore};
use crate::engine::papers::EngineWants;

/// Where it keeps what it copies, for a while: `image_copy_tmp_dir` of containers.conf(5).
const SCRATCH: &str = "/var/tmp";

/// What podman has.
pub(super) struct PodmanImages;

impl ImageStore for PodmanImages {
    fn find(&self, word: &str) -> Result<Option<FoundImage>> {
        let found = ask(PODMAN, &["image", "inspect", word])?;
        Ok(found.as_ref().map(FoundImage::of))
    }

    fn all(&self) -> Result<Vec<FoundImage>> {
        let said = run(PODMAN, &["images", "--all", "--quiet", "--no-trunc"], LIMIT)?;
        let ids = String::from_utf8_lossy(&said.out).into_owned();
        let ids: Vec<&str> = ids.lines().map(str::trim).filter(|id| !id.is_empty()).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let said = run(PODMAN, &[&["image", "inspect"], &ids[..]].concat(), LIMIT)?;
        let found: Vec<Value> = serde_json::from_slice(&said.out)
            .map_err(|_| anyhow!("podman image inspect: {}", said.why()))?;
        Ok(found.iter().map(FoundImage::of).collect())
    }

    fn scratch(&self, _wanted: &EngineWants) -> PathBuf {
        SCRATCH.into()
    }

    fn save(&self, id: &str) -> Result<Box<dyn Read + Send>> {
        let arguments = ["save", "--quiet", "--format", "docker-archive", id];
        Ok(Box::new(command::Output::start(PODMAN, &arguments)?))
    }

    fn load(&self, archive: &Path) -> Result<()> {
        let path = archive.to_str().ok_or_else(|| anyhow!("a directory that is not UTF-8"))?;
        let said = run(PODMAN, &["load", "--quiet", "--input", path], IMAGE_LIMIT)?;
        if !said.success {
            bail!("podman does not take the image in: {}", said.why());
        }
        Ok(())
    }

    fn end_load(&self, archive: &Path) {
        command::end(PODMAN, archive);
    }

    fn name(&self, id: &str, name: &str) -> Result<()> {
        let said = run(PODMAN, &["tag", id, name], LIMIT)?;
        if !said.success {
            bail!("podman does not name the image: {}", said.why());
        }
        Ok(())
    }

    fn remove(&self, word: &str) -> Result<()> {
        // What it was built upon is somebody else's.
        let said = run(PODMAN, &["rmi", "--no-prune", word], LIMIT)?;
        if !said.success {
            bail!("{}", said.why());
        }
        Ok(())
    }
}
