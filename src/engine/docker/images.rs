//! docker's images, over its API's socket.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;

use super::api::{self, DELETE, GET, POST, ask};
use crate::engine::common::text;
use crate::engine::image::{FoundImage, ImageStore};
use crate::engine::papers::EngineWants;

/// Most images that are looked at for layers.
const MOST_LOOKED_AT: usize = 2000;

/// What docker has.
pub(super) struct DockerImages;

impl ImageStore for DockerImages {
    fn find(&self, word: &str) -> Result<Option<FoundImage>> {
        let found = ask(GET, &format!("/images/{word}/json"), None)?;
        Ok(found.as_ref().map(FoundImage::of))
    }

    fn all(&self) -> Result<Vec<FoundImage>> {
        let list = ask(GET, "/images/json?all=1", None)?.unwrap_or_default();
        let list = list.as_array().into_iter().flatten().take(MOST_LOOKED_AT);
        let found = list.map(|one| self.find(text(&one["Id"])));
        Ok(found.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn scratch(&self, wanted: &EngineWants) -> PathBuf {
        wanted.store.root.clone()
    }

    fn save(&self, id: &str) -> Result<Box<dyn Read + Send>> {
        api::take(&format!("/images/{id}/get"))
    }

    fn load(&self, archive: &Path) -> Result<()> {
        let said = api::give("/images/load?quiet=1", File::open(archive)?)?;
        // It says so at the end of an answer that has begun well.
        let lines = said.split(|byte| *byte == b'\n');
        let lines = lines.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        match lines.filter_map(|line| line["error"].as_str().map(str::to_owned)).next() {
            Some(why) => bail!("docker does not take the image in: {}", why.escape_debug()),
            None => Ok(()),
        }
    }

    fn end_load(&self, _archive: &Path) {
        // The daemon gives up when nobody waits for its answer.
    }

    fn name(&self, id: &str, name: &str) -> Result<()> {
        let (repository, tag) = match name.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => (repository, tag),
            _ => (name, "latest"),
        };
        let at = format!("/images/{id}/tag?repo={repository}&tag={tag}");
        ask(POST, &at, None)?.map(drop).ok_or_else(|| anyhow!("docker does not have it any more"))
    }

    fn remove(&self, word: &str) -> Result<()> {
        // What it was built upon is somebody else's.
        ask(DELETE, &format!("/images/{word}?noprune=1"), None).map(drop)
    }
}
