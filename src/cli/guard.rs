//! `ferry __guard`: the processes that go on when Ferry is killed.

use std::path::Path;

use anyhow::anyhow;

use crate::memory::holder;
use crate::migration::forwarding as forward;
use crate::migration::recovery::{guards, successors, word};
use crate::report::exit::Failed;

/// `ferry __guard JOURNAL`.
pub fn guard(args: &[std::ffi::OsString]) -> Result<(), Failed> {
    match args {
        [journal] => Ok(guards::guard(Path::new(journal))?),
        [forwarding, what, directory] if forwarding == "forward" => {
            let what = what.to_string_lossy();
            Ok(forward::process(&what, Path::new(directory))?)
        }
        [what, journal, will] if what == "pages" => {
            let will = will.to_str().and_then(|will| will.parse().ok());
            let will = will.ok_or_else(|| Failed::usage(anyhow!("no descriptor's number")))?;
            Ok(successors::go_on(Path::new(journal), will)?)
        }
        [what, parent] if what == "memory" => {
            let parent = parent.to_str().and_then(|pid| pid.parse().ok());
            Ok(holder::hold(parent.ok_or_else(|| Failed::usage(anyhow!("no process's number")))?)?)
        }
        [what, journal] if what == "word" => Ok(word::sender(Path::new(journal))?),
        _ => Err(Failed::usage(anyhow!("the guard is for ferry itself"))),
    }
}
