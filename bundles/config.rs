//! bundle-config: makes a bundle's config.json of the templates in this directory.
//!
//! `base.json` is what all bundles share; `NAME/bundle.json` is laid over it.
//! Objects are merged, arrays and values replace, except that the bundle's
//! `mounts` and `env` are added to those of the base. Used by
//! `bundles/make`; a program and not a shell script, because arguments may hold
//! any character and JSON is not to be edited by sed.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

/// Print a config.json, or write the pages of the web bundle.
#[derive(Parser)]
struct Options {
    /// The templates, in order: base first
    #[arg(required_unless_present = "www")]
    templates: Vec<PathBuf>,
    /// Join this network namespace; without it the container gets a new one
    #[arg(long, value_name = "PATH")]
    netns: Option<String>,
    /// Let it use the host's network
    #[arg(long, conflicts_with = "netns")]
    host_network: bool,
    /// Add an argument to the program's
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    arg: Vec<String>,
    /// Add a variable to the environment
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Mount the root read-only
    #[arg(long)]
    readonly: bool,
    /// Give the program a terminal
    #[arg(long)]
    terminal: bool,
    /// Where the root file system is, if not in the bundle
    #[arg(long, value_name = "PATH")]
    rootfs: Option<String>,
    /// Bind-mount a directory into the container
    #[arg(long, value_name = "SOURCE:DESTINATION[:ro]")]
    bind: Vec<String>,
    /// Write the pages of the web bundle into this directory instead
    #[arg(long, value_name = "DIR")]
    www: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bundle-config: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<()> {
    if let Some(directory) = &options.www {
        return write_pages(directory);
    }
    let mut config = Value::Null;
    for path in &options.templates {
        let text = fs::read_to_string(path).map_err(|error| with_path(path, &error))?;
        let layer = serde_json::from_str(&text).map_err(|error| with_path(path, &error.into()))?;
        lay_over(&mut config, layer, "");
    }
    adjust(&mut config, options)?;
    println!("{}", serde_json::to_string_pretty(&config)?);
    Ok(())
}

fn with_path(path: &Path, error: &io::Error) -> io::Error {
    let mut text = OsString::from(path);
    text.push(format!(": {error}"));
    io::Error::new(error.kind(), text.to_string_lossy().into_owned())
}

/// Lays a template over what there is; `name` is the key under which it stands.
fn lay_over(below: &mut Value, above: Value, name: &str) {
    match (below, above) {
        (Value::Object(below), Value::Object(above)) => {
            for (key, value) in above {
                lay_over(below.entry(key.as_str()).or_insert(Value::Null), value, &key);
            }
        }
        (Value::Array(below), Value::Array(above)) if matches!(name, "mounts" | "env") => {
            below.extend(above);
        }
        (below, above) => *below = above,
    }
}

fn adjust(config: &mut Value, options: &Options) -> io::Result<()> {
    let mut network = json!({ "type": "network" });
    if let Some(path) = &options.netns {
        network["path"] = json!(path);
    }
    if !options.host_network {
        array(config, "/linux/namespaces")?.push(network);
    }

    array(config, "/process/args")?.extend(options.arg.iter().map(|arg| json!(arg)));
    array(config, "/process/env")?.extend(options.env.iter().map(|env| json!(env)));
    for bind in &options.bind {
        let mut parts = bind.split(':');
        let (Some(source), Some(destination), mode) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(io::Error::other(format!("--bind {bind}: no destination")));
        };
        let options = ["rbind", if mode == Some("ro") { "ro" } else { "rw" }];
        array(config, "/mounts")?.push(json!({
            "destination": destination, "type": "bind", "source": source, "options": options,
        }));
    }

    if options.readonly {
        config["root"]["readonly"] = json!(true);
    }
    if options.terminal {
        config["process"]["terminal"] = json!(true);
    }

    if let Some(path) = &options.rootfs {
        config["root"]["path"] = json!(path);
    }

    Ok(())
}

fn array<'a>(config: &'a mut Value, pointer: &str) -> io::Result<&'a mut Vec<Value>> {
    let found = config.pointer_mut(pointer).and_then(Value::as_array_mut);
    found.ok_or_else(|| io::Error::other(format!("the templates have no list {pointer}")))
}

/// Files of a fixed pseudo-random content, so that a client knows what it must get.
fn write_pages(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut state: u64 = 0x2545_f491_4f6c_dd1d;
    for (name, size) in [("1k", 1 << 10), ("100k", 100 << 10), ("5m", 5 << 20)] {
        let mut file = BufWriter::new(fs::File::create(directory.join(name))?);
        for _ in 0..size / 8 {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
        }
        file.flush()?;
    }
    fs::write(directory.join("index.html"), "<!doctype html><title>web</title><p>It works.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_merge_objects_add_mounts_and_replace_the_rest() {
        let mut config = json!({"mounts": [1], "process": {"args": ["a"], "cwd": "/"}});
        lay_over(&mut config, json!({"mounts": [2], "process": {"args": ["b"]}}), "");
        assert_eq!(config, json!({"mounts": [1, 2], "process": {"args": ["b"], "cwd": "/"}}));
    }
}
