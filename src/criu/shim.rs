//! Ferry under the name `criu`: what runc starts instead of CRIU during a migration.

use std::process::ExitCode;

/// The shim's whole life, from `execve` to exit.
pub fn main() -> ExitCode {
    eprintln!("ferry: error: the criu shim is not built yet");
    ExitCode::FAILURE
}
