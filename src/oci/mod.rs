//! The underlying runtime and the bundle, as types.

pub(crate) mod bundle;
pub(crate) mod cgroup;
pub(crate) mod cgroup_warmer;
pub(crate) mod container_id;
pub(crate) mod migratable;
pub mod runtime;

/// Where programs are looked for when the environment names no PATH (podman calls so).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds a program as a shell would.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = std::env::var_os("PATH").filter(|p| !p.is_empty());
    let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
    std::env::split_paths(&path)
        .filter(|d| d.is_absolute())
        .map(|d| d.join(name))
        .find(|p| p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}
