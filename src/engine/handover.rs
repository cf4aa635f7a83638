//! What Ferry asks of an engine, so that a container that is one's here is one's there.
//!
//! ```text
//! source                                   destination
//!   wanted     what has to be there ─────▶   problems   what is not
//!   image      what is missing of it ────▶   take_image
//!   papers     in the engine's words ────▶   make       networks, volumes
//!                                            create     the engine's part of what is to be restored
//!                                            start      the engine calls its runtime: see calls
//!   let_go     it has left                   (or, at any error, discard)
//! ```

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::calls::EngineVerb;
use super::command::Running;
use super::image::ImageStore;
use super::papers::{EngineCourse, EngineWants, Made, Papers};
use super::{Engine, docker, podman};
use crate::problem::Problem;

/// An engine that can be asked. What is taken from the other host says what is wanted, never what is
/// allowed: that is the engine's business here.
pub(crate) trait Handover: Sync {
    /// The `--root` of a container's runtime, where that is not the runtime's own.
    fn root(&self, id: &str) -> Option<PathBuf>;

    /// Returns what a container needs of its engine on another host. `config` is its config.json. Nothing is
    /// touched.
    ///
    /// # Errors
    /// What of it cannot go.
    fn wanted(&self, id: &str, config: &Value) -> Result<EngineWants, Vec<Problem>>;

    /// The container in the engine's words; it runs on. `root` is the runtime's, `work` a directory.
    ///
    /// # Errors
    /// When the engine does not say.
    fn papers(&self, id: &str, root: &Path, work: &Path) -> Result<Papers>;

    /// Returns its images.
    fn images(&self) -> &dyn ImageStore;

    /// Returns what is in the way here, and what is missing; in `course` what becomes of the image and of
    /// networks.
    fn problems(&self, id: &str, wanted: &EngineWants, course: &mut EngineCourse) -> Vec<Problem>;

    /// Makes networks and volumes. All that is made is in `made`.
    ///
    /// # Errors
    /// When the engine does not make them.
    fn make(&self, wanted: &EngineWants, made: &Made) -> Result<()>;

    /// Prepares the container; the ID by which the engine will call its runtime about it.
    ///
    /// # Errors
    /// When what came is not what this engine would have been asked for, or it does not take it.
    fn create(
        &self,
        wanted: &EngineWants,
        made: &Made,
        papers: &Papers,
        work: &Path,
    ) -> Result<String>;

    /// Returns how it will call its runtime.
    fn verb(&self) -> EngineVerb;

    /// Returns where it has the container's log before it calls its runtime. `None`: in the bundle, as
    /// `ctr.log`, and it writes to the end of whatever is there.
    fn log(&self, wanted: &EngineWants, id: &str) -> Option<PathBuf>;

    /// Has the engine make the container, which calls its runtime.
    ///
    /// # Errors
    /// When the engine does not start.
    fn start(&self, id: &str, work: &Path) -> Result<Running>;

    /// Takes away all that was made. May have been done before.
    ///
    /// # Errors
    /// What stays.
    fn discard(&self, made: &Made) -> Result<()>;

    /// Tells whether it learns that the container has left by a call of its runtime. Else it sees it end.
    fn is_told(&self) -> bool;

    /// Tells the engine that the container leaves, or has it say when it has seen that.
    ///
    /// # Errors
    /// When the engine does not start.
    fn let_go(&self, id: &str, work: &Path) -> Result<Running>;
}

/// The one that can be asked, where there is one.
pub(crate) fn of(engine: Engine) -> Option<&'static dyn Handover> {
    match engine {
        Engine::Podman => Some(&podman::Podman),
        Engine::Docker => Some(&docker::Docker),
        _ => None,
    }
}
