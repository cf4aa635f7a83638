//! The container's network on the destination: made behind a closed fence, opened when the container
//! is released, and the packets that came for it meanwhile.

use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow};

use super::floating::Arrived;
use super::hooks::Hooks;
use super::room::Room;
use crate::migration::forwarding::steps;
use crate::migration::journal::part::{Note, Part};
use crate::migration::protocol::Plan;
use crate::network::hook::{About, Hook};
use crate::network::{
    self, Announcer, Frame, Gate, HostSide, Lead, Neighbours, Placement, Recreated, Replay,
    Uplinks, fence,
};
use crate::oci::cgroup::Cgroup;
use crate::sys::netns::NetNs;

/// Bytes of packets kept until the container can take them. Beyond it the senders' timers have to
/// do.
const MAX_PACKETS: usize = 32 << 20;

/// See the module. A container without a network of its own has one that does nothing.
#[derive(Debug, Default)]
pub struct Arrival {
    net: Option<Net>,
    /// Where it uses the host's.
    floating: Option<Arrived>,
    hooks: Option<Hooks>,
    packets: Vec<Frame>,
    bytes: usize,
    /// Packets given to the container so far.
    pub replayed: u64,
    /// What is done about forwarding its address.
    note: Option<Note>,
    /// What its sockets were given beyond their own.
    room: Option<Room>,
}

#[derive(Debug)]
struct Net {
    made: Recreated,
    replay: Replay,
    announcer: Announcer,
    /// Where the host routes to the container: the routes, until the gate has them, and the
    /// segments that have to hear of it.
    lead: Option<Lead>,
    uplinks: Option<Uplinks>,
    /// Whom it knows, until the gate has them.
    neighbours: Option<Neighbours>,
}

impl Arrival {
    /// Makes the namespace, and notes in the work directory which it is. It is taken down again on
    /// drop.
    ///
    /// # Errors
    /// When it cannot be made as it was.
    pub fn make(&mut self, plan: &Plan, work: &Path, note: Option<&Note>) -> Result<()> {
        if let Some(floating) = &plan.floating {
            self.floating = Some(Arrived::prepare(floating, &plan.migration, work)?);
        }
        let (Some(image), Some(path)) =
            (&plan.network, crate::migration::journal::workdir::network_place(plan))
        else {
            return Ok(());
        };
        let host = NetNs::current()?;
        let placement: Placement = plan.placement.parse().map_err(|e| anyhow!("{e}"))?;
        if let Placement::Hook(program) = &placement {
            let about = About {
                role: "destination",
                migration: &plan.migration,
                container: &plan.container,
                peer: &plan.source,
                netns: &path,
            };
            let hook = Hook::new(program, about, image);
            self.hooks = Some(Hooks::prepare(hook, work)?);
        }
        let mut made = match note {
            None => network::recreate(image, &placement, &path, &host)?,
            Some(Note { part: Part::ComesHome, id }) => steps::come_home(id, &path, image)?,
            Some(_) => network::recreate(image, &Placement::Forward, &path, &host)?,
        };
        let (device, inode) = made.namespace().identity()?;
        fs::write(
            work.join(crate::migration::journal::workdir::NETWORK),
            format!("{device} {inode}"),
        )?;
        if let Some(note) = note.filter(|n| n.part == Part::Arrives) {
            steps::arrive(note, plan, &mut made, image)?;
        }
        self.note = note.cloned();
        let replay = Replay::prepare(made.namespace(), image)?;
        let announcer = Announcer::prepare(made.namespace(), image)?;
        if let Some(side) = HostSide::new(image, &plan.migration) {
            crate::migration::journal::workdir::note_host_side(work, &side)?;
        }
        let lead = Lead::prepare(made.namespace(), image, &host)?;
        let uplinks = Uplinks::prepare(image, &host)?;
        let neighbours = Some(Neighbours::prepare(made.namespace(), image)?);
        self.net = Some(Net { made, replay, announcer, lead, uplinks, neighbours });
        Ok(())
    }

    /// The container is being frozen. Addresses of the host that move can be here only from now on.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn take(&mut self, work: &Path) -> Result<()> {
        self.floating.as_mut().map_or(Ok(()), |floating| floating.take(work))
    }

    /// Where it is.
    pub fn namespace(&self) -> Option<&NetNs> {
        self.net.as_ref().map(|net| net.made.namespace())
    }

    /// A packet that the source's fence has held back.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn keep(&mut self, packet: &[u8]) -> Result<()> {
        let packet = network::frames::decode(packet)?;
        if self.bytes + packet.bytes.len() <= MAX_PACKETS {
            self.bytes += packet.bytes.len();
            self.packets.push(packet);
        }
        Ok(())
    }

    /// Makes room in the sockets of the container, whose first process this is, for the packets that
    /// have come. It does not run yet.
    fn make_room(&mut self, init: i32) {
        let floating = self.floating.as_mut().map(|f| &mut f.replay);
        let Some(replay) = self.net.as_mut().map(|n| &mut n.replay).or(floating) else { return };
        // Without one it could not have been frozen where it came from.
        let Ok(cgroup) = Cgroup::of_process(init) else { return };
        self.room = Room::make(&cgroup, replay, &self.packets);
    }

    /// Gives the container the packets that have come.
    pub fn replay(&mut self) {
        self.replay_those(|_| true);
    }

    /// Gives it the datagrams among them. UDP's sockets take them at once, whereas TCP's are asleep
    /// until CRIU wakes them: before anybody can send here what was sent after them.
    fn replay_datagrams(&mut self) {
        self.replay_those(network::room::is_datagram);
    }

    fn replay_those(&mut self, wanted: impl Fn(&Frame) -> bool) {
        let floating = self.floating.as_ref().map(|f| &f.replay);
        let Some(replay) = self.net.as_ref().map(|n| &n.replay).or(floating) else { return };
        for packet in self.packets.extract_if(.., |packet| wanted(packet)) {
            self.bytes = self.bytes.saturating_sub(packet.bytes.len());
            // Only a help: the sender's timer brings again what does not get through.
            if replay.inject(&packet).is_ok() {
                self.replayed += 1;
            }
        }
    }

    /// The closed gate, for whoever opens it.
    pub fn gate(&mut self) -> Option<Gate> {
        if let Some(floating) = &mut self.floating {
            return floating.gate();
        }
        let net = self.net.as_mut()?;
        let fence = net.made.take_fence()?;
        Some(Gate { fence, lead: net.lead.take(), neighbours: net.neighbours.take() })
    }

    /// The fence should be open: tells everybody that the container is here, whose first process this
    /// is.
    pub fn open(&mut self, opened: bool, init: i32) {
        if !opened {
            // Too late to give up: a container that cannot be reached can still be mended.
            tracing::error!("the fence does not open: it is taken down");
            if let Some(net) = &self.net {
                let _ = fence::remove(net.made.namespace());
            }
            self.floating.iter().for_each(Arrived::lift);
        }
        if let Some(note) = &self.note {
            steps::destination_opens(note);
        }
        self.make_room(init);
        self.replay_datagrams();
        self.announce();
        if let Some(hooks) = &mut self.hooks {
            hooks.switch();
        }
    }

    /// Tells the neighbours where the container is now.
    pub fn announce(&self) {
        if let Some(net) = &self.net {
            let _ = net.announcer.announce();
            let _ = net.uplinks.as_ref().map(Uplinks::announce);
        }
        self.floating.iter().for_each(Arrived::announce);
    }

    /// It belongs to the container from now on.
    pub fn settle(mut self) {
        if let Some(e) = self.hooks.take().and_then(Hooks::switched) {
            tracing::error!("{e}");
        }
        // Not before: what came while the container read all that finds room, too.
        self.room.take().into_iter().for_each(Room::put_back);
        if let Some(floating) = self.floating.take() {
            floating.settle();
        }
        let Some(mut net) = self.net else { return };
        drop(net.replay);
        // It has been open since the commit; taking it down takes milliseconds, so only now.
        if let Err(e) = fence::remove(net.made.namespace()) {
            tracing::warn!("the open fence stays: {e}");
        }
        net.made.keep();
        if let Some(note) = &self.note {
            steps::destination_keeps(note);
        }
    }
}
