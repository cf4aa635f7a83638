//! `ferry receive`: one migration over standard input and output, or each that comes to a socket.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::args::{Globals, ReceiveArgs};
use super::common::{runtime, state_dir};
use super::destination::Listen;
use crate::migration::destination;
use crate::report::exit::{Failed, ToldError};
use crate::transport::connect;

/// `ferry receive`.
pub fn receive(globals: &Globals, args: &ReceiveArgs) -> Result<(), Failed> {
    match &args.listen {
        None => {
            let runtime = runtime(globals)?;
            let link = connect::stdio().map_err(Failed::refused)?;
            destination::receive(link, &runtime, &state_dir()?).map_err(|e| {
                Failed::from(match e.downcast::<ToldError>() {
                    Ok(told) if args.own_stderr => told.0,
                    Ok(told) => told.into(),
                    Err(e) => e,
                })
            })
        }
        Some(Listen::Unix(path)) => listen(globals, path).map_err(Failed::from),
    }
}

/// Every connection gets a process of its own, as inetd does it: one that dies takes no other
/// migration along.
fn listen(globals: &Globals, path: &Path) -> Result<()> {
    let what = || format!("cannot listen on unix:{}", path.display());
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        // A socket that nobody listens on is left over from a process that has died.
        match std::fs::symlink_metadata(path) {
            Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
                std::fs::remove_file(path).with_context(what)?;
            }
            _ => {}
        }
    }

    let listener = UnixListener::bind(path).with_context(what)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    tracing::info!("listening on unix:{}", path.display());
    for socket in listener.incoming() {
        let socket = socket?;
        let (input, output) = (OwnedFd::from(socket.try_clone()?), OwnedFd::from(socket));
        let mut command = Command::new("/proc/self/exe");
        if let Some(runtime) = &globals.ferry_runtime {
            command.arg("--ferry-runtime").arg(runtime);
        }

        if let Some(log) = &globals.log {
            command.arg("--log").arg(log).args(["--log-format", globals.log_format.name()]);
        }
        if globals.debug {
            command.arg("--debug");
        }

        command.args(["receive", "--stdio", "--own-stderr"]).stdin(input).stdout(output);
        let mut child = command.spawn().context("cannot start a receiver")?;
        tracing::info!("process {} takes a connection", child.id());
        std::thread::spawn(move || child.wait());
    }

    Ok(())
}
