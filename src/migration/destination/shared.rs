//! Shared memory on its way into its place: [`crate::memory::shared_files`].

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::Sender;

use anyhow::Result;

use super::DestinationInput;
use crate::criu::lent;
use crate::memory::holder::MemoryHolder;
use crate::memory::shared_files::SharedFiles;
use crate::migration::transfer::receiver::Stage;

/// Device and inode.
pub(super) fn identity(file: &OwnedFd) -> Result<(u64, u64)> {
    let stat = nix::sys::stat::fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// There is a control group, in which CRIU is: shared memory that has come is moved there, and what comes goes there
/// at once. Beside the hand-over, as it may be much.
pub(super) fn settle(criu: i32, stage: &Stage, tell: &Sender<DestinationInput>) -> Result<()> {
    // Here, as it ends with the thread that starts it. Whoever cannot be charged, is not.
    let holder = MemoryHolder::start(criu)
        .inspect_err(|e| tracing::debug!("shared memory is charged to Ferry: {e:#}"))
        .ok();
    stage.with_shared(|files| {
        files.hold(holder);
        Ok(())
    })?;
    let (stage, tell) = (stage.clone(), tell.clone());
    let settle = move || {
        let settled = loop {
            match stage.with_shared(SharedFiles::settle) {
                Ok(true) => break Ok(()),
                Ok(false) => {}
                Err(e) => break Err(e),
            }
        };
        // The hand-over may have ended already.
        let _ = tell.send(DestinationInput::Settled(settled));
    };
    std::thread::Builder::new().name("shared".into()).spawn(settle)?;
    Ok(())
}

/// The images are there, and CRIU is about to begin: what they say of shared memory becomes true.
pub(super) fn finish(images: &Path, stage: &Stage) -> Result<()> {
    let lent = lent::read_list(images)?;
    stage.with_shared(|files| files.finish(&lent))
}
