//! The processes of a forwarding: how they are started, and what is left when they end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{
    HOME, Home, NETWORK, control, home_at, make_directory, published, remove_directory, write,
};
use crate::engine::papers::EngineWants;
use crate::network::published::HomePort;
use crate::network::published::away;
use crate::network::published::packet::UDP;
use crate::network::{self, NetworkImage, forward};
use crate::oci::container_id::ContainerId;
use crate::sys::netns::{self, NetNs};
use crate::sys::process;

/// Time that a process may take to come up.
const START: Duration = Duration::from_secs(10);
/// A process that ends sooner than this after its start is not started again at once.
const HASTE: Duration = Duration::from_secs(1);

/// Keeps the container's network for what is to come, and starts the process that forwards.
///
/// # Errors
/// When it cannot be made; nothing is left then.
pub fn establish(
    id: &str,
    container: &ContainerId,
    namespace: &NetNs,
    image: &NetworkImage,
) -> Result<PathBuf> {
    let directory = make_directory(id)?;
    let done = (|| {
        netns::bind_named(namespace, &directory.join(NETWORK))
            .context("cannot keep the container's network")?;
        let links: Vec<String> = image.outward().map(|(_, l)| l.name.clone()).collect();
        let addresses = image.outward().flat_map(|(_, l)| &l.addresses);
        let told = |a: &&network::image::Address| !forward::is_link_local(a.local);
        let addresses = addresses.filter(told).map(|a| a.local.to_string()).collect();
        let home = Home {
            id: id.to_owned(),
            container: container.clone(),
            addresses,
            links,
            active: None,
            pending: None,
            since: crate::migration::journal::unix_time(),
            until_idle: None,
            shell: None,
            name: None,
            published: None,
        };

        write(&directory, HOME, &home)?;
        spawn(&directory)
    })();

    if done.is_err() {
        remove_directory(&directory);
    }

    done.map(|()| directory)
}

/// The same where the address moves, and this host's translation makes connections stay.
///
/// # Errors
/// When it cannot be made; nothing is left then.
pub fn establish_published(
    id: &str,
    container: &ContainerId,
    wanted: &EngineWants,
    image: &NetworkImage,
) -> Result<()> {
    let directory = make_directory(id)?;
    let known = published::known(wanted, image);
    let shown = |p: &HomePort| {
        let protocol = if p.protocol == UDP { "udp" } else { "tcp" };
        let address = p.address.map(|address| format!("{address}:")).unwrap_or_default();
        format!("{address}{}/{protocol}", p.port)
    };

    let home = Home {
        id: id.to_owned(),
        container: container.clone(),
        addresses: known.ports.iter().map(shown).collect(),
        links: away::links(image).map(|link| link.name.clone()).collect(),
        active: None,
        pending: None,
        since: crate::migration::journal::unix_time(),
        until_idle: Some(published::IDLE),
        shell: None,
        name: Some(wanted.name.clone()),
        published: Some(known),
    };

    let done = write(&directory, HOME, &home).and_then(|()| spawn(&directory));
    if done.is_err() {
        remove_directory(&directory);
    }

    done
}

/// Starts the process that forwards, and waits until it can be asked.
///
/// # Errors
/// When it does not come up.
pub fn spawn(directory: &Path) -> Result<()> {
    start(directory, "home", Stdio::null())?;
    await_start(directory)
}

/// Starts one of the processes of a forwarding, in a session of its own.
pub(super) fn start(directory: &Path, what: &str, input: Stdio) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["__guard", "forward", what]).arg(directory);
    command.stdin(input).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    process::in_new_session(&mut command);
    command.spawn().context("cannot start the process that forwards")
}

/// Waits until it answers.
pub(super) fn await_start(directory: &Path) -> Result<()> {
    let until = Instant::now() + START;
    while control::status(directory).is_none() {
        if Instant::now() > until {
            bail!("the process that forwards does not come up");
        }
        // It tells nobody when it has made its socket.
        std::thread::park_timeout(Duration::from_millis(5));
    }
    Ok(())
}

/// What was kept goes: no kernel answers for the container here any more.
pub(super) fn dismantle(directory: &Path) {
    if let Ok(namespace) = NetNs::open(&directory.join(NETWORK)) {
        for problem in network::dismantle(&namespace, None, None).err().unwrap_or_default() {
            tracing::warn!("removing the kept network: {problem}");
        }
    }
    remove_directory(directory);
}

/// `ferry __guard forward home DIRECTORY`: starts the process that works again when it dies.
///
/// # Errors
/// When it cannot be started.
pub fn supervise(directory: &Path) -> Result<()> {
    loop {
        let began = Instant::now();
        let status = start(directory, "work", Stdio::null())?.wait()?;
        if status.success() || home_at(directory).is_err() {
            return Ok(());
        }
        std::thread::park_timeout(HASTE.saturating_sub(began.elapsed()));
    }
}
