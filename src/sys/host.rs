//! This host, as others know it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::sys::process::boot_id;

/// The same for two processes exactly when they are on the same host: boot, and the namespaces
/// that a runtime's containers would collide in.
pub fn identity() -> String {
    let boot = boot_id();
    let inode = |name: &str| fs::metadata(format!("/proc/self/ns/{name}")).map_or(0, |m| m.ino());
    format!("{}:{}:{}", boot, inode("pid"), inode("net"))
}

/// Returns what this host calls itself, for the people who have several.
pub fn name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    if name.is_empty() { "this host".into() } else { name }
}
