//! The container's network on the destination: made behind a closed fence, opened when the container
//! is released, and the packets that came for it meanwhile.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Result;

use super::floating_address::ArrivedAddresses;
use super::hooks::Hooks;
use super::udp_buffers::Room;
use crate::migration::forwarding::steps;
use crate::migration::journal::forward_role::{ForwardRecord, ForwardRole};
use crate::migration::journal::workdir::WorkPath;
use crate::migration::protocol::Plan;
use crate::network::hook::{About, Hook};
use crate::network::image::LinkImage;
use crate::network::published::{self, given};
use crate::network::{
    self, Announcer, EthernetFrame, HostRoutes, HostSide, Neighbours, NetworkImage, Placement,
    Recreated, ReleaseSet, Replay, Understudy, Uplinks, fence,
};
use crate::oci::cgroup::Cgroup;
use crate::sys::netns::NetNs;

/// Bytes of packets kept until the container can take them. Beyond it the senders' timers have to
/// do.
const MAX_PACKETS: usize = 32 << 20;

/// A container without a network of its own has one that does nothing.
#[derive(Debug, Default)]
pub struct NetworkArrival {
    net: Option<Net>,
    /// Until an engine has made it.
    understudy: Option<Understudy>,
    /// Where it uses the host's.
    floating: Option<ArrivedAddresses>,
    hooks: Option<Hooks>,
    packets: Vec<EthernetFrame>,
    bytes: usize,
    /// Packets given to the container so far.
    pub replayed: u64,
    /// What is done about forwarding its address.
    note: Option<ForwardRecord>,
    /// What its sockets were given beyond their own.
    room: Option<Room>,
}

#[derive(Debug)]
struct Net {
    made: Recreated,
    replay: Replay,
    announcer: Announcer,
    /// Where the host routes to the container: the routes, until the release set has them, and the
    /// segments that have to hear of it.
    lead: Option<HostRoutes>,
    uplinks: Option<Uplinks>,
    /// Whom it knows, until the release set has them.
    neighbours: Option<Neighbours>,
}

impl NetworkArrival {
    /// Makes the namespace at its place, and notes in the work directory which it is. It is taken down
    /// again on drop.
    ///
    /// # Errors
    /// When it cannot be made as it was.
    pub fn make(
        &mut self,
        plan: &Plan,
        work: &WorkPath,
        place: Option<PathBuf>,
        note: Option<&ForwardRecord>,
    ) -> Result<()> {
        if let Some(floating) = &plan.floating {
            self.floating = Some(ArrivedAddresses::prepare(floating, &plan.migration, work)?);
        }
        match (&plan.network, place) {
            (Some(image), Some(path)) => self.make_as(plan, image, work, path, note),
            _ => Ok(()),
        }
    }

    /// The same of a network that may have got other addresses than the plan has.
    fn make_as(
        &mut self,
        plan: &Plan,
        image: &NetworkImage,
        work: &WorkPath,
        path: PathBuf,
        note: Option<&ForwardRecord>,
    ) -> Result<()> {
        let host = NetNs::current()?;
        if let Placement::Hook(program) = &plan.placement {
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
            None | Some(ForwardRecord { part: ForwardRole::ArrivesWithoutConnections, .. }) => {
                network::recreate(image, &plan.placement, &path, &host)?
            }
            Some(ForwardRecord { part: ForwardRole::ComesHome, id }) => {
                steps::come_home(id, &path, image)?
            }
            Some(_) => network::recreate(image, &Placement::Forward, &path, &host)?,
        };

        let (device, inode) = made.namespace().identity()?;
        fs::write(work.network(), format!("{device} {inode}"))?;
        if let Some(note) = note.filter(|n| n.part == ForwardRole::Arrives) {
            steps::arrive(note, plan, &mut made, image)?;
        }

        self.note = note.cloned();
        let replay = Replay::prepare(made.namespace(), image)?;
        let announcer = Announcer::prepare(made.namespace(), image)?;
        if let Some(side) = HostSide::new(image, &plan.migration) {
            work.note_host_side(&side)?;
        }

        let lead = HostRoutes::prepare(made.namespace(), image, &host)?;
        // Its bridges are the engine's business, and may have other names here.
        let uplinks = match plan.engine {
            None => Uplinks::prepare(image, &host)?,
            Some(_) => None,
        };

        let mut known = image.clone();
        if note.is_some_and(|n| n.part == ForwardRole::ArrivesWithoutConnections) {
            // Another bridge is its gateway now, and connections by the old one would confirm its hardware
            // address for ever.
            let behind: Vec<&LinkImage> = published::away::links(image).collect();
            known.neighbours.retain(|n| behind.iter().all(|link| link.name != n.link));
        }

        let neighbours = Some(Neighbours::prepare(made.namespace(), &known)?);
        self.net = Some(Net { made, replay, announcer, lead, uplinks, neighbours });
        Ok(())
    }

    /// Makes a namespace in which an engine makes the network when the container is restored, and notes in
    /// the work directory which it is.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn stand_in(&mut self, plan: &Plan, work: &WorkPath) -> Result<()> {
        let Some(image) = &plan.network else { return Ok(()) };
        let place = work.unnamed_network();
        let understudy = Understudy::make(image, &place, &NetNs::current()?)?;
        let (device, inode) = understudy.namespace().identity()?;
        fs::write(work.network(), format!("{device} {inode}"))?;
        fs::write(work.network_place(), place.as_os_str().as_encoded_bytes())?;
        self.understudy = Some(understudy);
        Ok(())
    }

    /// The engine has made the network: it is looked at, and fenced.
    ///
    /// # Errors
    /// When it is not as it was.
    pub fn enter(
        &mut self,
        plan: &Plan,
        work: &WorkPath,
        note: Option<&ForwardRecord>,
    ) -> Result<()> {
        let (Some(image), Some(understudy)) = (&plan.network, self.understudy.take()) else {
            return Ok(());
        };
        let given = plan.engine.as_ref().map(|wanted| wanted.given.as_slice()).unwrap_or_default();
        let there = given::as_made(image, given, understudy.namespace())?;
        let made = self.make_as(plan, &there, work, work.unnamed_network(), note);
        let understudy = self.understudy.insert(understudy);
        made?;
        let mut kept = given::lost(image, &there);
        if note.is_none_or(|n| n.part != ForwardRole::ArrivesWithoutConnections) {
            // No connection has them.
            kept.clear();
        } else if !kept.is_empty() {
            given::silence(&there, understudy.namespace())?;
        }
        Ok(understudy.leave(&kept)?)
    }

    /// The container is being frozen. Addresses of the host that move can be here only from now on.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn take(&mut self, work: &WorkPath) -> Result<()> {
        self.floating.as_mut().map_or(Ok(()), |floating| floating.take(work))
    }

    /// It is given up, and an engine takes down what it has made: behind the fence, which stays closed,
    /// as the container still has its addresses on the other host.
    pub fn leave_to_engine(mut self) {
        if let Some(net) = &mut self.net {
            net.made.keep();
        }
    }

    /// Returns where it is.
    pub fn namespace(&self) -> Option<&NetNs> {
        let understudy = self.understudy.as_ref().map(Understudy::namespace);
        self.net.as_ref().map(|net| net.made.namespace()).or(understudy)
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
    pub fn make_room(&mut self, init: i32) {
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
        self.replay_those(network::udp_buffers::is_datagram);
    }

    fn replay_those(&mut self, wanted: impl Fn(&EthernetFrame) -> bool) {
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

    /// Returns what is released with the container, for whoever does it.
    pub fn release(&mut self) -> Option<ReleaseSet> {
        if let Some(floating) = &mut self.floating {
            return floating.release();
        }
        let net = self.net.as_mut()?;
        let fence = net.made.take_fence()?;
        Some(ReleaseSet { fence, lead: net.lead.take(), neighbours: net.neighbours.take() })
    }

    /// The fence should be open: tells everybody that the container is here. True where a hook still leads its packets here, which calls `led` when it has.
    pub fn open(&mut self, opened: bool, led: impl FnOnce() + Send + 'static) -> bool {
        if !opened {
            // Too late to give up: a container that cannot be reached can still be mended.
            tracing::error!("the fence does not open: it is taken down");
            if let Some(net) = &self.net {
                let _ = fence::remove(net.made.namespace());
            }
            self.floating.iter().for_each(ArrivedAddresses::lift);
        }
        if let Some(note) = &self.note {
            steps::open_destination(note);
        }
        self.replay_datagrams();
        self.announce();
        self.hooks.as_mut().is_some_and(|hooks| hooks.switch(led))
    }

    /// The container's sockets are members of these multicast groups, on the links with these numbers: its
    /// neighbours will hear of that, too.
    pub fn add_groups(&mut self, groups: &[(u32, IpAddr)]) {
        self.net.iter_mut().for_each(|net| net.announcer.add_groups(groups));
    }

    /// Tells the neighbours where the container is now.
    pub fn announce(&self) {
        if let Some(net) = &self.net {
            let _ = net.announcer.announce();
            let _ = net.uplinks.as_ref().map(Uplinks::announce);
        }
        self.floating.iter().for_each(ArrivedAddresses::announce);
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
            steps::finish_destination(note);
        }
    }
}
