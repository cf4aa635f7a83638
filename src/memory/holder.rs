//! A process in the container's control group that has its shared memory mapped, before the container's own have.
//!
//! The kernel charges a page of shared memory to the control group of the process whose memory it is written
//! through for the first time: mem_cgroup_charge(), mm/shmem.c. So what comes in before the restore is
//! written through this one's, from outside (process_vm_writev(2)). It does nothing but wait, and is gone before
//! CRIU begins.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::oci::cgroup;
use crate::sys::shared_memory::{self, FileWindow};
use crate::sys::{process, scm};

/// What it maps of a file is a multiple of that: files grow while they are filled.
const STEP: u64 = 1 << 30;

/// The process, and who speaks with it.
#[derive(Debug)]
pub struct MemoryHolder {
    child: Child,
    socket: OwnedFd,
    /// By number of the file: where it has it, and how many bytes of it.
    mapped: HashMap<u32, (u64, u64)>,
}

impl MemoryHolder {
    /// Starts it in the control group that another process is in. The calling thread has to live as long.
    ///
    /// # Errors
    /// When there can be no process, or it cannot be put there.
    pub fn start(like: i32) -> Result<MemoryHolder> {
        let (socket, theirs) = scm::seqpacket_pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["__guard", "memory", &std::process::id().to_string()]);
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        process::in_new_session(&mut command);
        let child = command.spawn().context("cannot start who holds shared memory")?;
        let holder = MemoryHolder { child, socket, mapped: HashMap::new() };
        cgroup::charge_like(holder.pid(), like)?;
        Ok(holder)
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Writes to the file of that number, whose end is not before that of the bytes.
    ///
    /// # Errors
    /// When there is no more memory in the control group.
    pub fn write(&mut self, number: u32, file: &File, at: u64, bytes: &[u8]) -> Result<()> {
        let end = at + bytes.len() as u64;
        let mut place = self.mapped.get(&number).copied().unwrap_or_default();
        if place.1 < end {
            let length = end.next_multiple_of(STEP);
            place = (self.map(number, file, length)?, length);
            self.mapped.insert(number, place);
        }

        let mut done = 0;
        while done < bytes.len() {
            let to = place.0 + at + done as u64;
            match shared_memory::write_process(self.pid(), to, &bytes[done..]) {
                Ok(0) => bail!("nothing can be written through it"),
                Ok(n) => done += n,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => {
                    return Err(e).context("the container's control group takes no more memory");
                }
            }
        }
        Ok(())
    }

    fn map(&mut self, number: u32, file: &File, length: u64) -> Result<u64> {
        let order = [u64::from(number).to_le_bytes(), length.to_le_bytes()].concat();
        scm::send(&self.socket, &order, &[file.as_raw_fd()])?;
        let (said, _) = scm::receive(&self.socket)?
            .ok_or_else(|| anyhow!("who holds shared memory has ended"))?;
        match said.try_into().map(u64::from_le_bytes) {
            Ok(at) if at > 0 => Ok(at),
            _ => bail!("there is no room for {length} bytes of shared memory"),
        }
    }
}

impl Drop for MemoryHolder {
    fn drop(&mut self) {
        // What has it mapped takes a while to end; nobody is to find it among the container's tasks meanwhile.
        let left = cgroup::move_to_root(self.pid());
        let _ = self.child.kill();
        if left.is_err() {
            let _ = self.child.wait();
            return;
        }
        let pid = nix::unistd::Pid::from_raw(self.pid());
        let reap = move || {
            let _ = nix::sys::wait::waitpid(pid, None);
        };
        let _ = std::thread::Builder::new().name("reap".into()).spawn(reap);
    }
}

/// The process itself: maps what it is told to, and lives no longer than the one who has started it.
///
/// # Errors
/// When it is told nonsense.
pub fn hold(parent: u32) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    if std::os::unix::process::parent_id() != parent {
        bail!("whoever has called this has ended");
    }
    let socket = std::io::stdin();
    let mut mapped: HashMap<u64, FileWindow> = HashMap::new();
    while let Some((order, files)) = scm::receive(&socket)? {
        let (number, length) = order.split_at_checked(8).context("half an order")?;
        let [number, length] = [number, length].map(|n| n.try_into().map(u64::from_le_bytes));
        let (number, length, file) = (number?, length?, files.first().context("no file")?);
        mapped.remove(&number);
        let window = FileWindow::map(file, usize::try_from(length)?).ok();
        let at = window.as_ref().map_or(0, FileWindow::address);
        mapped.extend(window.map(|window| (number, window)));
        scm::send(&socket, &at.to_le_bytes(), &[])?;
    }
    Ok(())
}
