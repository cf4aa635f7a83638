//! A private tmpfs: mount(2), statfs(2).

use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

/// `MQUEUE_MAGIC` of ipc/mqueue.c.
const MESSAGE_QUEUES: FsType = FsType(0x1980_0202);

/// Tells whether what is written at `path` stays in memory.
pub fn is_tmpfs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == TMPFS_MAGIC)
}

/// Tells whether there is a message queue at `path`: mq_overview(7).
pub fn is_message_queue(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == MESSAGE_QUEUES)
}

/// Free bytes for us at `path`. statfs(2).
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let s = statfs(path)?;
    Ok(s.blocks_available() * s.block_size() as u64)
}

/// Mounts a fresh tmpfs, mode 0700, on an existing directory.
pub fn mount_tmpfs(path: &Path, size: u64) -> io::Result<()> {
    let options = format!("mode=0700,size={size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(Some("ferry"), path, Some("tmpfs"), flags, Some(options.as_str()))?)
}

/// Takes it away again, also while something still holds a file of it.
pub fn unmount(path: &Path) -> io::Result<()> {
    Ok(umount2(path, MntFlags::MNT_DETACH)?)
}
