//! An image that comes, part by part: each is what its digest says, and the archive for the engine holds
//! nothing else.
//!
//! The other host says which part comes, and how long it is. Nothing that it sends names a file here, and
//! of its archive nothing is read: only the configuration, which has the image's ID for its digest.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{COPIES, bare, room};
use crate::engine::archive;
use crate::engine::papers::EngineImage;
use crate::problem::Problems;
use crate::sys::host;

/// The longest configuration of an image.
const MAX_CONFIG: u64 = 4 << 20;
/// Bytes gathered before they are written.
const BUFFER: usize = 256 << 10;

/// An archive on its way.
#[derive(Debug)]
pub(crate) struct ImageIntake {
    id: String,
    layers: Vec<String>,
    /// Digests of the layers that are to come.
    lacking: BTreeSet<String>,
    /// Those that are in the archive.
    came: BTreeSet<String>,
    config: Option<Vec<u8>>,
    part: Option<ComingPart>,
    out: BufWriter<File>,
    path: PathBuf,
}

/// What is just coming.
#[derive(Debug)]
struct ComingPart {
    digest: String,
    /// Bytes that it has, and that have come.
    bytes: u64,
    came: u64,
    sum: Sha256,
    /// What has come of it, if it is the configuration.
    config: Option<Vec<u8>>,
}

impl ImageIntake {
    /// Begins an archive at `path`; so many of the image's layers, from the first, are here.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(crate) fn new(image: &EngineImage, there: usize, path: &Path) -> Result<ImageIntake> {
        let what = || format!("cannot write {}", path.display());
        let layers: Vec<String> = image.layers.iter().map(|l| bare(l).to_owned()).collect();
        Ok(ImageIntake {
            id: bare(&image.id).to_owned(),
            lacking: layers.iter().skip(there).cloned().collect(),
            layers,
            came: BTreeSet::new(),
            config: None,
            part: None,
            out: BufWriter::with_capacity(BUFFER, archive::create(path).with_context(what)?),
            path: path.to_owned(),
        })
    }

    /// A part begins.
    ///
    /// # Errors
    /// When it is none that is lacking, there is no room for it, or the last one is not over.
    pub(crate) fn begins(&mut self, digest: &str, bytes: u64) -> Result<()> {
        if self.part.is_some() {
            bail!("a part of an image before the last one is over");
        }
        let is_config = digest == self.id && self.config.is_none();
        if !(is_config || self.lacking.remove(digest)) {
            bail!("{digest:?} is no part of the image that is lacking");
        }
        if is_config && bytes > MAX_CONFIG {
            bail!("an image's configuration of {bytes} bytes");
        }

        if !is_config {
            let at = self.path.parent().unwrap_or(Path::new("/"));
            if let Some(problem) = room(at, bytes.saturating_mul(COPIES), &host::name())? {
                return Err(Problems(vec![problem]).into());
            }
            archive::begin(&mut self.out, &format!("{digest}.tar"), bytes)?;
            self.came.insert(digest.to_owned());
        }

        let config = is_config.then(Vec::new);
        let (digest, sum) = (digest.to_owned(), Sha256::new());
        self.part = Some(ComingPart { digest, bytes, came: 0, sum, config });
        self.ends_if_over()
    }

    /// The next bytes of it, which begin at `at`.
    ///
    /// # Errors
    /// When they are not, or the part is not what its digest says.
    pub(crate) fn feed(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let part = self.part.as_mut().ok_or_else(|| anyhow!("bytes of no part of an image"))?;
        if at != part.came || bytes.len() as u64 > part.bytes - part.came {
            bail!("a part of an image that is not as long as was announced");
        }

        part.came += bytes.len() as u64;
        part.sum.update(bytes);
        match &mut part.config {
            Some(config) => config.extend(bytes),
            None => self.out.write_all(bytes).context("writing an image's layer")?,
        }

        self.ends_if_over()
    }

    fn ends_if_over(&mut self) -> Result<()> {
        let Some(part) = self.part.take_if(|part| part.came == part.bytes) else { return Ok(()) };
        let sum: String = part.sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if sum != part.digest {
            bail!("a part of the image is not what its digest says: {}", part.digest);
        }
        match part.config {
            Some(config) => self.config = Some(config),
            None => archive::end(&mut self.out, part.bytes)?,
        }
        Ok(())
    }

    /// All has come: the archive is whole.
    ///
    /// # Errors
    /// When it is not, or the configuration names other layers.
    pub(crate) fn finish(mut self) -> Result<()> {
        let config = self.config.take().ok_or_else(|| anyhow!("an image without configuration"))?;
        if let Some(lacking) = self.lacking.first() {
            bail!("an image without its layer {lacking}");
        }
        if self.part.is_some() {
            bail!("an image whose last part is not over");
        }

        let said: Value = serde_json::from_slice(&config).context("an image's configuration")?;
        let listed = said["rootfs"]["diff_ids"].as_array().map(Vec::as_slice).unwrap_or_default();
        let layers = listed.iter().map(|layer| layer.as_str().map(bare));
        if !layers.eq(self.layers.iter().map(|layer| Some(layer.as_str()))) {
            bail!("an image whose layers are not those that were announced");
        }
        self.fill_in(&config)?;

        self.out.flush().context("writing an image")
    }

    /// The rest of the archive: empty files for the layers that are here, and what puts them all together.
    fn fill_in(&mut self, config: &[u8]) -> Result<()> {
        let file = |layer: &String| format!("{layer}.tar");
        let here: BTreeSet<&String> =
            self.layers.iter().filter(|layer| !self.came.contains(*layer)).collect();
        let mut files: Vec<(String, &[u8])> =
            here.into_iter().map(|layer| (file(layer), &[][..])).collect();
        let name = format!("{}.json", self.id);
        let layers: Vec<String> = self.layers.iter().map(file).collect();
        let manifest = json!([{ "Config": name, "RepoTags": null, "Layers": layers }]);
        let manifest = serde_json::to_vec(&manifest)?;
        files.push((name, config));
        files.push(("manifest.json".to_owned(), &manifest));
        let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (n.as_str(), *b)).collect();
        Ok(archive::write(&mut self.out, &files)?)
    }
}
