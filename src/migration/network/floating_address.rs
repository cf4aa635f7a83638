//! Containers that use the host's network, and the addresses that go along with them: what
//! [`crate::network::floating`] does, at its place in a migration.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::migration::journal::Record;
use crate::migration::journal::workdir::WorkPath;
use crate::migration::options::MigrateOptions;
use crate::migration::protocol::Plan;
use crate::migration::protocol::forwarding::ForwardOption as Forward;
use crate::network::fence::ArmedFence;
use crate::network::floating::{self, Floating, Stay, StaySide};
use crate::network::sockets::{SockDiag, SocketFilter};
use crate::network::{Announcer, Capture, Placement, ReleaseSet, Replay};
use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::problem::Problem;
use crate::report::failures::Failures;
use crate::sys::netns::NetNs;
use crate::sys::process;

/// Tells whether the configuration gives the container the network namespace `host`.
fn uses_host(bundle: &Bundle, host: &NetNs) -> Result<bool> {
    Ok(match bundle.namespace("network") {
        None => true,
        Some(None) => false,
        // One that cannot be opened is told of elsewhere.
        Some(Some(path)) => {
            let named = NetNs::open(&path).and_then(|n| n.identity());
            named.ok() == Some(host.identity()?)
        }
    })
}

/// On the source, before anything is touched: what goes along of the host's network, if the container
/// uses that.
///
/// # Errors
/// When it cannot go, or nobody has said which addresses are its own.
pub fn look(
    bundle: &Bundle,
    init: i32,
    cgroup: &Cgroup,
    wishes: &MigrateOptions,
) -> Result<Option<Floating>> {
    let host = NetNs::current()?;
    if !uses_host(bundle, &host)? {
        if let Some(wish) = wishes.move_address.first() {
            return Err(Problem::new(
                format!("{} cannot be moved by --move-address", wish.address),
                "the container has a network namespace of its own",
            )
            .hint("leave the option out: all addresses in its namespace go along")
            .into());
        }
        return Ok(None);
    }

    // Without a namespace in its configuration it has that of whoever has started it.
    let real = NetNs::open(Path::new(&format!("/proc/{init}/ns/net")))?;
    if real.identity()? != host.identity()? {
        return Err(Problem::new(
            "the container is in a network namespace that is neither its own nor this host's",
            "config.json names none, so it has that in which it was started",
        )
        .hint("name it in config.json's linux.namespaces: its path is in /run/netns")
        .into());
    }

    let own = sockets_of(cgroup)?;
    if wishes.move_address.is_empty() {
        let proposals = floating::proposals(&own, &host);
        let option = if proposals.is_empty() {
            "--move-address ADDRESS/PREFIX@INTERFACE".to_owned()
        } else {
            proposals.join(" ")
        };

        return Err(Problem::new(
            "the container uses the host's network",
            "nobody has said which of the host's addresses are its own and go along",
        )
        .hint(format!(
            "{option} moves an address that nobody else uses, as keepalived would; or give the \
             container a named namespace: `ip netns add NAME`, and its path /run/netns/NAME in \
             config.json's linux.namespaces"
        ))
        .into());
    }

    if wishes.placement != Placement::Auto || wishes.forward == Forward::Always {
        return Err(Problem::new(
            "a container that uses the host's network has none that could be made in another way",
            "--network and --forward always are for containers with a namespace of their own",
        )
        .hint("leave them out")
        .into());
    }

    Ok(Some(floating::capture(&wishes.move_address, &own, &host)?))
}

/// The numbers of the sockets that the container's tasks have descriptors of.
fn sockets_of(cgroup: &Cgroup) -> Result<HashSet<u32>> {
    let mut found = HashSet::new();
    for pid in cgroup.processes()? {
        // It may have ended.
        let list = process::open_files(pid).into_iter().flatten();
        let inodes = list.filter_map(|(_, target)| process::socket_inode(&target));
        found.extend(inodes.filter_map(|inode| u32::try_from(inode).ok()));
    }
    Ok(found)
}

/// On the destination: what stands in the way.
pub fn problems(plan: &Plan, bundle: &Bundle) -> Vec<Problem> {
    let Some(floating) = &plan.floating else { return Vec::new() };
    let look = || -> Result<Vec<Problem>> {
        let host = NetNs::current()?;
        let mut found = floating::preflight(floating, &host);
        if !uses_host(bundle, &host)? {
            found.push(
                Problem::new(
                    "the container would not use the host's network on the destination",
                    "the path of its network namespace leads to another one there",
                )
                .hint("let config.json have no network namespace, or one at /proc/1/ns/net"),
            );
        }
        Ok(found)
    };
    look().unwrap_or_else(|e| {
        vec![Problem::new("cannot look at the destination's network", format!("{e:#}"))]
    })
}

/// Returns what the source needs for the freeze: the fence, and what sees what it stops.
///
/// # Errors
/// When it cannot be made ready.
pub fn arm(floating: &Floating, migration: &str, work: &WorkPath) -> Result<(ArmedFence, Capture)> {
    let host = NetNs::current()?;
    let stay = Stay::new(floating, StaySide::Source, migration);
    note(work, &stay)?;
    let interfaces = floating.interfaces(StaySide::Source);
    let capture = Capture::of_addresses(&host, &interfaces, floating.addresses())?;
    Ok((stay.arm(&host)?, capture))
}

/// Looks for sockets that are the container's among this host's.
///
/// # Errors
/// When it cannot be made.
pub fn sock_diag(floating: &Floating, cgroup: &Cgroup) -> Result<SockDiag> {
    let only = SocketFilter { addresses: floating.addresses(), inodes: sockets_of(cgroup)? };
    Ok(SockDiag::among(&NetNs::current()?, only)?)
}

/// Through which the source's own frames come in again, when the container stays.
///
/// # Errors
/// When it cannot be made.
pub fn replay_here(floating: &Floating, migration: &str) -> Result<Replay> {
    let interfaces = floating.interfaces(StaySide::Source);
    Ok(Replay::on_host(&NetNs::current()?, &interfaces, migration)?)
}

/// The addresses on the destination, until they are the container's.
#[derive(Debug)]
pub struct ArrivedAddresses {
    stay: Stay,
    host: NetNs,
    release: Option<ReleaseSet>,
    /// For the frames that were kept for it.
    pub replay: Replay,
    announcer: Announcer,
}

impl ArrivedAddresses {
    /// Makes everything ready for the addresses; the fence is open, and programs of this host reach
    /// them where they still are.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn prepare(
        floating: &Floating,
        migration: &str,
        work: &WorkPath,
    ) -> Result<ArrivedAddresses> {
        let host = NetNs::current()?;
        let stay = Stay::new(floating, StaySide::Destination, migration);
        note(work, &stay)?;
        let (fence, lead) = (stay.arm(&host)?, Some(stay.entitle(&host)?));
        let release = Some(ReleaseSet { fence, lead, neighbours: None });
        let interfaces = floating.interfaces(StaySide::Destination);
        let replay = Replay::on_host(&host, &interfaces, migration)?;
        let announcer = stay.announcer(&host)?;
        Ok(ArrivedAddresses { stay, host, release, replay, announcer })
    }

    /// Takes the addresses, behind the fence, which is closed from here on: the container is being
    /// frozen. Whoever discards the migration takes both away.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn take(&mut self, work: &WorkPath) -> Result<()> {
        self.stay.close(&self.host)?;
        // What is left of a copy that died here would be in the way of the same connections.
        self.stay.cut(&self.host)?;
        self.stay.taken = true;
        note(work, &self.stay)?;
        if let Err(problem) = self.stay.take(&self.host) {
            // What is here of them is somebody else's.
            self.stay.taken = false;
            note(work, &self.stay)?;
            return Err(problem.into());
        }
        Ok(())
    }

    /// Returns what is released with the container, for whoever does it.
    pub fn release(&mut self) -> Option<ReleaseSet> {
        self.release.take()
    }

    /// Takes the fence down: when it does not open, and when it is needed no more.
    pub fn lift(&self) {
        if let Err(e) = self.stay.lift(&self.host) {
            tracing::error!("{e}");
        }
    }

    /// They belong to the container from now on.
    pub fn settle(self) {
        self.lift();
    }

    /// Tells the neighbours that the addresses are here.
    pub fn announce(&self) {
        let _ = self.announcer.announce();
    }
}

fn note(work: &WorkPath, stay: &Stay) -> Result<()> {
    Ok(fs::write(work.floating(), serde_json::to_vec(stay)?)?)
}

/// What was noted for a migration, and the host: for whoever undoes or finishes it.
pub struct Noted(Stay, NetNs);

impl Noted {
    /// Where there is something.
    pub fn of(record: &Record) -> Option<Noted> {
        let text = fs::read(record.work.floating()).ok()?;
        Some(Noted(serde_json::from_slice(&text).ok()?, NetNs::current().ok()?))
    }

    /// The source, when the container stays. With `announced`, neighbours may have been told that the
    /// addresses are elsewhere.
    ///
    /// # Errors
    /// When the fence round them stays.
    pub fn stays(&self, announced: bool) -> Result<()> {
        let lifted = self.0.lift(&self.1);
        if announced {
            self.announce();
        }
        Ok(lifted?)
    }

    /// The source, when the frozen tasks are gone: nobody answers any more before the fence goes.
    ///
    /// # Errors
    /// When the addresses, or the fence round them, stay.
    pub fn goes(&self) -> Result<()> {
        self.0.let_go(&self.1)?;
        Ok(self.0.lift(&self.1)?)
    }

    /// The destination, before a copy is ended that is not to be.
    ///
    /// # Errors
    /// When the fence round them cannot be closed.
    pub fn close(&self) -> Result<()> {
        self.0.raise(&self.1)?;
        Ok(())
    }

    /// The destination, when the copy is gone.
    ///
    /// # Errors
    /// Says what stays: the addresses, the fence round them, or both.
    pub fn discard(&self) -> Result<()> {
        let mut failures = Failures::default();
        if self.0.taken {
            failures.note("removing the address", self.0.let_go(&self.1));
        }
        failures.note("lifting the fence round the address", self.0.lift(&self.1));
        failures.into_result()
    }

    /// The destination, when the container runs and nobody knows how far its Ferry came.
    ///
    /// # Errors
    /// Says what failed; the rest was done.
    pub fn keep(&self) -> Result<()> {
        let mut failures = Failures::default();
        let led = self.0.entitle(&self.1).and_then(|mut lead| lead.lead_here());
        failures.note("taking the address", led);
        failures.note("lifting the fence round the address", self.0.lift(&self.1));
        self.announce();
        failures.into_result()
    }

    fn announce(&self) {
        // Only a help: sooner or later the container says something by itself.
        let _ = self.0.announcer(&self.1).and_then(|announcer| announcer.announce());
    }
}
