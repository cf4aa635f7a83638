//! docker's API over its socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::engine::command::LIMIT;
use crate::engine::common::text;
use crate::engine::socket;

const SOCKET: &str = "/run/docker.sock";
/// docker 25 has it, which is the first with a hardware address for each network.
const VERSION: &str = "/v1.44";

pub(super) const GET: &str = "GET";
pub(super) const POST: &str = "POST";
pub(super) const DELETE: &str = "DELETE";

/// Returns what docker answers; `None` if it does not have what was asked for. `path` must need no escapes.
///
/// # Errors
/// When it does not do it, in its own words; when it says nothing in time.
pub(super) fn ask(method: &str, path: &str, body: Option<&Value>) -> Result<Option<Value>> {
    ask_for(method, path, body, LIMIT)
}

/// The same of something that takes its time.
///
/// # Errors
/// See [`ask`].
pub(super) fn ask_for(
    method: &str,
    path: &str,
    body: Option<&Value>,
    limit: Duration,
) -> Result<Option<Value>> {
    let what = || format!("docker, asked for {method} {path}");
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_.:@?=&-".contains(c);
    if !path.chars().all(plain) {
        bail!("{path:?} is nothing that docker is asked for");
    }

    let at = format!("{VERSION}{path}");
    let answer = socket::request(Path::new(SOCKET), method, &at, body, limit).with_context(what)?;
    tracing::debug!("docker: {method} {path}: {}", answer.status);
    let said: Value = serde_json::from_slice(&answer.body).unwrap_or_default();

    match answer.status {
        200..=299 | 304 => Ok(Some(said)),
        // Of a request that names others the answer says which of them is missing.
        404 if body.is_none() => Ok(None),
        status => {
            let why = text(&said["message"]);
            let why: String = why.chars().filter(|c| !c.is_control()).take(2000).collect();
            bail!("{}", if why.is_empty() { format!("status {status}") } else { why })
        }
    }
}
