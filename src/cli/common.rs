//! What several of our verbs need.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::anyhow;

use super::args::{Globals, RemoteArgs};
use super::destination::DestinationArg;
use super::runtime::{Config, FoundRuntime as Found};
use crate::engine::Engine;
use crate::engine::lookup::FoundName as InEngines;
use crate::oci::container_id::{ContainerId, valid_id};
use crate::oci::runtime::Runtime;
use crate::report::exit::Failed;
use crate::report::shown::{self, shown};
use crate::transport::connect::{Destination as Reach, split_command};

/// The runtime behind us.
pub(super) fn runtime(globals: &Globals) -> Result<Runtime, Failed> {
    let found =
        Found::find(globals.ferry_runtime.as_deref()).map_err(|u| Failed::refused(u.error))?;
    tracing::debug!("the runtime is {}", found.path.display());
    Ok(Runtime::new(found.path, globals.root.clone(), globals.systemd_cgroup))
}

/// Returns where journals are.
pub(super) fn state_dir() -> Result<PathBuf, Failed> {
    Ok(Config::load().map_err(Failed::refused)?.state_dir())
}

/// Returns how the other host is reached.
pub(super) fn reach(destination: &DestinationArg, remote: &RemoteArgs) -> Result<Reach, Failed> {
    Ok(match destination {
        DestinationArg::Unix(path) => Reach::Unix(path.clone()),
        DestinationArg::Ssh { user, host, port } => Reach::Shell {
            host: user.as_ref().map_or_else(|| host.clone(), |u| format!("{u}@{host}")),
            port: *port,
            rsh: split_command(remote.rsh.as_deref().unwrap_or("ssh")).map_err(Failed::usage)?,
            remote_ferry: match &remote.remote_ferry {
                None => "ferry".into(),
                Some(path) => path
                    .to_str()
                    .ok_or_else(|| Failed::usage(anyhow!("--remote-ferry must be UTF-8")))?
                    .to_owned(),
            },
        },
    })
}

/// The bundle's place over there must not depend on where we stand.
pub(super) fn absolute(path: Option<&Path>) -> Result<Option<PathBuf>, Failed> {
    path.map(std::path::absolute).transpose().map_err(|e| Failed::usage(e.into()))
}

/// The runtime's ID of a container that is called as its engine calls it: `podman:web`, or `web` where
/// only one engine knows that; and the runtime, to which that engine may give another `--root`. What is not
/// found is looked for later, and told then.
pub(super) fn resolved(
    globals: &mut Globals,
    asked: &str,
) -> Result<(ContainerId, Runtime), Failed> {
    let own = runtime(globals)?;
    let id = |text: &str| text.parse::<ContainerId>().map_err(Failed::usage);
    let (engine, name) = match asked.split_once(':') {
        Some((engine, name)) => (Engine::of_word(engine), name),
        None => (None, asked),
    };
    if engine.is_none() && own.state(asked).is_ok_and(|state| state.is_some()) {
        return Ok((id(asked)?, own));
    }
    let found = match engine {
        Some(engine) => InEngines::of(name).only(engine),
        None if valid_id(name.as_ref()) => InEngines::of(name),
        None => return Ok((id(asked)?, own)),
    };
    let Some((found, root)) = found.one() else { return Ok((id(name)?, own)) };
    if globals.root.is_none() {
        globals.root = root;
    }
    Ok((id(found)?, runtime(globals)?))
}

/// A line on standard output; a reader that went away is no error.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{}", shown(line));
}

/// An event on standard output.
pub(super) fn say_json(value: &serde_json::Value) {
    let _ = writeln!(std::io::stdout(), "{}", shown::json(value));
}
