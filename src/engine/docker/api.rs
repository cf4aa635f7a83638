//! docker's API over its socket.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::engine::command::LIMIT;
use crate::engine::common::text;
use crate::engine::image::IMAGE_LIMIT;
use crate::engine::socket::{self, DaemonAnswer};

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
    let at = full(path)?;
    let answer = socket::request(Path::new(SOCKET), method, &at, body, limit).with_context(what)?;
    tracing::debug!("docker: {method} {path}: {}", answer.status);

    match answer.status {
        200..=299 | 304 => Ok(Some(serde_json::from_slice(&answer.body).unwrap_or_default())),
        // Of a request that names others the answer says which of them is missing.
        404 if body.is_none() => Ok(None),
        _ => Err(refusal(&answer)),
    }
}

/// Returns what docker answers to a request, or why it does not do it. Whoever makes that difference knows that
/// nothing was done.
///
/// # Errors
/// When it says nothing in time.
pub(super) fn answer(method: &str, path: &str, body: &Value) -> Result<Result<Value>> {
    let what = || format!("docker, asked for {method} {path}");
    let at = full(path)?;
    let answer = socket::request(Path::new(SOCKET), method, &at, Some(body), LIMIT);
    let answer = answer.with_context(what)?;
    Ok(match answer.status {
        200..=299 => Ok(serde_json::from_slice(&answer.body).unwrap_or_default()),
        _ => Err(refusal(&answer)),
    })
}

/// What docker answers in bytes, as they come.
///
/// # Errors
/// When it does not begin, in its own words.
pub(super) fn take(path: &str) -> Result<Box<dyn Read + Send>> {
    let (answer, rest) = socket::stream(Path::new(SOCKET), &full(path)?, IMAGE_LIMIT)
        .with_context(|| format!("docker, asked for {path}"))?;
    match answer.status {
        200 => Ok(Box::new(rest)),
        _ => Err(refusal(&answer)),
    }
}

/// Sends docker a file; what it answers.
///
/// # Errors
/// See [`ask`].
pub(super) fn give(path: &str, file: File) -> Result<Vec<u8>> {
    let answer = socket::send(Path::new(SOCKET), &full(path)?, file, IMAGE_LIMIT)
        .with_context(|| format!("docker, asked for {path}"))?;
    match answer.status {
        200..=299 => Ok(answer.body),
        _ => Err(refusal(&answer)),
    }
}

fn full(path: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_.:@?=&-".contains(c);
    if !path.chars().all(plain) {
        bail!("{path:?} is nothing that docker is asked for");
    }
    Ok(format!("{VERSION}{path}"))
}

/// Why it does not do it, in its own words.
fn refusal(answer: &DaemonAnswer) -> anyhow::Error {
    let said: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let why = text(&said["message"]);
    let why: String = why.chars().filter(|c| !c.is_control()).take(2000).collect();
    anyhow!("{}", if why.is_empty() { format!("status {}", answer.status) } else { why })
}
