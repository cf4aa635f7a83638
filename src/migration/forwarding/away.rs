//! The host that has the container: the process that holds its TAP devices, and `ferry receive`,
//! which brings it the link from home.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::carrier::{self, DEAD, ORPHANED, PULSE};
use super::control::{self, Handed};
use super::{Away, away_at, directory, remove_directory};
use crate::migration::journal::Journal;
use crate::migration::protocol::Message;
use crate::migration::protocol::forwarding::{Ask, ForwardAnswer, ForwardMessage, Status, is_id};
use crate::migration::protocol::session::{self, FromPeer, PeerWriter};
use crate::network::forward::{self, Meter};
use crate::network::published::away::{Keeper, take_devices};
use crate::sys::netns::NetNs;
use crate::sys::process::wait_readable;
use crate::sys::scm;
use crate::sys::tun::Tap;
use crate::transport::connect::{self, Cutter};
use crate::transport::frame::Frame;

/// Time that home waits for this host to have made the devices: it connects while the rest is made.
const MAKING: Duration = Duration::from_secs(25);
/// The same where no migration is known that would make them.
const SOON: Duration = Duration::from_secs(2);
/// Time that an answer from home may take.
const ANSWER: Duration = Duration::from_secs(50);
/// How often it is looked whether anybody still uses the namespace, and for how long nobody must.
const LOOK: Duration = Duration::from_secs(3);
const DESERTED: u32 = 4;
/// A packet on the socket by which a new holder gets its devices, when there are no more.
const NO_MORE: &[u8] = b"";

/// `ferry receive` has a link from a container's home: it goes to the process that holds the devices,
/// which is started again if it has died. Returns when the link is used no more.
///
/// # Errors
/// When there is no such container here.
pub fn take_link(
    state_dir: &Path,
    id: &str,
    links: Vec<String>,
    input: &OwnedFd,
    output: &OwnedFd,
) -> Result<()> {
    if !is_id(id) {
        bail!("{id:?} is no forwarding's ID");
    }
    carrier::check_links(&links)?;
    let directory = directory(id);
    let began = Instant::now();
    while !directory.join(crate::migration::forwarding::AWAY).exists() {
        let comes = |j: &Journal| {
            let note = j.record.forward.as_ref();
            note.is_some_and(|n| n.id == id) && !j.state().is_over()
        };
        let limit = if Journal::all(state_dir)?.0.iter().any(comes) { MAKING } else { SOON };
        if began.elapsed() > limit {
            bail!("no container here has its address forwarded under {id}");
        }

        // It is being made, by another process.
        std::thread::park_timeout(Duration::from_millis(20));
    }

    if control::status(&directory).is_none() {
        spawn(&directory, Vec::new())?;
    }

    control::hand_link(&directory, links, input.as_fd(), output.as_fd())
}

/// Starts the process that holds the devices, and gives them to it.
///
/// # Errors
/// When it does not come up.
pub fn spawn(directory: &Path, taps: Vec<(String, Tap)>) -> Result<()> {
    let (socket, theirs) = scm::seqpacket_pair()?;
    crate::migration::forwarding::process::start(directory, "away", theirs.into())?;
    for (name, tap) in &taps {
        use std::os::fd::AsRawFd;
        scm::send(&socket, name.as_bytes(), &[tap.as_fd().as_raw_fd()])?;
    }
    drop(socket);
    crate::migration::forwarding::process::await_start(directory)
}

/// What the holder's threads share.
struct Holder {
    directory: PathBuf,
    /// Ends it.
    over: Sender<()>,
    taps: Vec<(String, Tap)>,
    link: Mutex<NumberedLink>,
    changed: Condvar,
    out_bytes: AtomicU64,
    in_bytes: AtomicU64,
    number: AtomicU64,
    /// Open connections, when it was last looked.
    connections: Mutex<Option<u32>>,
    away: Away,
    since: u64,
}

#[derive(Default)]
struct NumberedLink {
    /// Which one; a later one takes the place of an earlier one.
    number: u64,
    peer: Option<PeerWriter>,
    /// Ends it, whatever is waited for.
    cutter: Option<Cutter>,
    /// Home's last sign of life.
    heard: Option<Instant>,
    /// Home's order of links.
    names: Vec<String>,
    /// Whoever brought it waits until this is closed.
    held: Option<std::os::unix::net::UnixStream>,
    /// Questions that home has not answered.
    asked: HashMap<u64, Sender<ForwardAnswer>>,
}

/// The process itself: `ferry __guard forward away DIRECTORY`.
///
/// # Errors
/// When the devices are not there.
pub fn hold(directory: &Path) -> Result<()> {
    let away = away_at(directory)?;
    let mut taps = Vec::new();

    // From a process that made them; or nothing, and they are there without anybody.
    while let Ok(Some((name, fds))) = scm::receive(std::io::stdin()) {
        if name == NO_MORE {
            break;
        }
        let name = String::from_utf8(name).context("a link's name")?;
        taps.extend(fds.into_iter().map(|fd| (name.clone(), Tap::adopt(fd))));
    }

    if taps.is_empty() {
        let names: Vec<String> = away.links.iter().map(|l| l.0.clone()).collect();
        taps = if away.published {
            take_devices(&away.id, &names)?
        } else {
            forward::take_taps(&NetNs::open(&away.path)?, &names)?
        };
    }

    for (_, tap) in &taps {
        tap.do_not_wait()?;
    }
    let (quit, told) = channel();
    let holder = Arc::new(Holder {
        directory: directory.to_owned(),
        over: quit.clone(),
        taps,
        link: Mutex::default(),
        changed: Condvar::new(),
        out_bytes: AtomicU64::new(0),
        in_bytes: AtomicU64::new(0),
        number: AtomicU64::new(0),
        connections: Mutex::default(),
        away,
        since: crate::migration::journal::unix_time(),
    });

    for tap in 0..holder.taps.len() {
        let holder = holder.clone();
        std::thread::Builder::new().name("tap".into()).spawn(move || holder.send_frames(tap))?;
    }
    let pulse = holder.clone();
    std::thread::Builder::new().name("pulse".into()).spawn(move || pulse.live())?;

    // Not on that one: what it says may never be taken, when home is gone.
    let guard = holder.clone();
    std::thread::Builder::new().name("guard".into()).spawn(move || guard.cut_when_dead())?;
    let answering = holder.clone();
    control::serve(directory, move |asked, handed| {
        answering.answer(asked, handed, &|| _ = quit.send(()))
    })?;

    holder.watch(&told);
    remove_directory(directory);

    // The answer to whoever said so is on its way.
    std::thread::park_timeout(Duration::from_millis(50));
    std::process::exit(0);
}

impl NumberedLink {
    /// Nobody speaks over it any more, nobody waits for it, and whoever brought it ends.
    fn cut(&mut self) {
        self.cutter.iter().for_each(Cutter::cut);
        (self.peer, self.cutter, self.heard, self.held) = (None, None, None, None);
        self.asked.clear();
    }
}

impl Holder {
    fn lock(&self) -> MutexGuard<'_, NumberedLink> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) -> MutexGuard<'_, Option<u32>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(
        self: &Arc<Self>,
        asked: Ask,
        handed: Option<Handed>,
        quit: &dyn Fn(),
    ) -> ForwardAnswer {
        match (asked, handed) {
            (Ask::Link(names), Some(handed)) => self.take(names, handed).into(),
            (Ask::Status, _) => {
                let (connected, connections) = (self.lock().peer.is_some(), *self.count());
                let status = Status {
                    to: self.away.home.clone(),
                    since: self.since,
                    out_bytes: self.out_bytes.load(Ordering::Relaxed),
                    in_bytes: self.in_bytes.load(Ordering::Relaxed),
                    connections,
                    until_idle: None,
                    connected,
                    why: if connected { String::new() } else { "no link from there".into() },
                };
                ForwardAnswer { status: Some(status), ..ForwardAnswer::default() }
            }
            (Ask::Quit, _) => {
                quit();
                ForwardAnswer::default()
            }
            (asked, _) => self.ask_home(asked).unwrap_or_else(|e| Err(e).into()),
        }
    }

    fn ask_home(&self, ask: Ask) -> Result<ForwardAnswer> {
        let (tell, told) = channel();
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let peer = {
            let mut link = self.lock();
            let peer = link.peer.clone();
            let peer =
                peer.ok_or_else(|| anyhow!("there is no link from {} now", self.away.home))?;
            link.asked.insert(number, tell);
            peer
        };
        let silent = || anyhow!("{} does not answer: it keeps the address", self.away.home);
        peer.send(&Message::Forward(Box::new(ForwardMessage::Ask { number, ask })))
            .map_err(|_| silent())?;
        told.recv_timeout(ANSWER).map_err(|_| silent())
    }

    /// A new link from home, instead of any before it.
    fn take(self: &Arc<Self>, names: Vec<String>, (input, output, held): Handed) -> Result<()> {
        let (peer, reader, closer) = session::split(connect::adopt(input, output)?);
        let cutter = closer.cutter().ok();
        peer.send(&Message::Forward(Box::new(ForwardMessage::Carried)))?;
        let number = {
            let mut link = self.lock();
            // Threads may still wait for the one before to take something.
            link.cut();
            let number = link.number + 1;
            *link = NumberedLink {
                number,
                peer: Some(peer),
                cutter,
                heard: Some(Instant::now()),
                names,
                held: Some(held),
                asked: HashMap::new(),
            };
            number
        };

        self.changed.notify_all();
        let holder = self.clone();
        session::listen(reader, move |heard| holder.hear(number, heard))?;

        Ok(())
    }

    fn hear(&self, number: u64, heard: FromPeer) -> bool {
        if !matches!(heard, FromPeer::Gone(_)) {
            let mut link = self.lock();
            if link.number == number {
                link.heard = Some(Instant::now());
            }
        }

        match heard {
            FromPeer::Frame(Frame::Packet(bytes)) => {
                self.in_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if let Ok(frame) = crate::network::frames::decode(&bytes)
                    && let Some(tap) = self.tap_of(frame.link)
                {
                    // Down, or full: lost, as on any link.
                    let _ = tap.write(&frame.vnet_hdr, &frame.bytes);
                }
            }
            FromPeer::Message(Message::Forward(word)) => match *word {
                ForwardMessage::Answer { number, answer } => {
                    if let Some(tell) = self.lock().asked.remove(&number) {
                        let _ = tell.send(answer);
                    }
                }
                // Else the operator may have moved the address, and the container lives by its interface.
                ForwardMessage::Over if self.away.published => {
                    let _ = self.over.send(());
                }
                _ => {}
            },
            FromPeer::Gone(_) => {
                let mut link = self.lock();
                if link.number == number {
                    link.cut();
                }
                return false;
            }
            _ => {}
        }

        true
    }

    fn tap_of(&self, link: u16) -> Option<&Tap> {
        let link_names = self.lock();
        let name = link_names.names.get(usize::from(link))?;
        self.taps.iter().find(|(n, _)| n == name).map(|(_, tap)| tap)
    }

    /// What the container sends, as long as there is somebody to take it. Else it waits in the
    /// device's queue, or is lost.
    fn send_frames(&self, number: usize) {
        let (name, tap) = &self.taps[number];
        let mut buffer = forward::buffer();
        let mut frames = Vec::new();

        loop {
            let place = {
                let without = |link: &mut NumberedLink| link.peer.is_none();
                let link = self.changed.wait_while(self.lock(), without);
                let link = link.unwrap_or_else(PoisonError::into_inner);
                let place = link.names.iter().position(|n| n == name);
                place.zip(link.peer.clone())
            };

            let ready = wait_readable(&[tap.as_fd()], Some(Instant::now() + PULSE));
            if ready.is_err() {
                continue;
            }
            frames.clear();
            let place_number = place.as_ref().map_or(0, |p| p.0 as u16);
            loop {
                match tap.read(&mut buffer) {
                    Ok(Some(n)) => frames.extend(forward::frame(place_number, &buffer[..n])),
                    Ok(None) => break,
                    // The device is gone, and with it what this thread is for.
                    Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return,
                    Err(_) => break,
                }

                if frames.len() >= 256 {
                    break;
                }
            }

            if let Some((_, peer)) = place
                && let Ok(bytes) = carrier::send(&peer, &frames)
            {
                self.out_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }

    /// Tells home that this process lives, and how many connections the container has.
    fn live(&self) {
        let mut counter = None;
        loop {
            if counter.is_none() {
                counter = self.counter().ok();
            }
            let connections = counter.as_mut().and_then(|count| count());
            *self.count() = connections;
            let peer = self.lock().peer.clone();
            if let Some(peer) = peer {
                let _ =
                    peer.send(&Message::Forward(Box::new(ForwardMessage::Alive { connections })));
            }
            std::thread::park_timeout(PULSE);
        }
    }

    /// Returns what counts the container's open connections, where it is there.
    fn counter(&self) -> Result<Box<dyn FnMut() -> Option<u32>>> {
        let away = away_at(&self.directory)?;
        let namespace = NetNs::open(&away.path)?;
        if away.published {
            let mut keeper = Keeper::new(&away.id, &namespace)?;
            return Ok(Box::new(move || {
                keeper.look().inspect_err(|problem| tracing::debug!("{problem}")).ok()
            }));
        }
        let names = self.taps.iter().map(|t| t.0.clone()).collect();
        let mut meter = Meter::new(&namespace, names)?;
        Ok(Box::new(move || meter.connections().ok()))
    }

    /// Cuts a link that home has said nothing on for too long: the kernel takes what is sent, and tells
    /// nobody for a quarter of an hour that none of it arrives.
    fn cut_when_dead(&self) {
        loop {
            std::thread::park_timeout(PULSE);
            let mut link = self.lock();
            if link.peer.is_some() && link.heard.is_some_and(|heard| heard.elapsed() > DEAD) {
                tracing::warn!("{} gives no sign of life", self.away.home);
                link.cut();
            }
        }
    }

    /// Until somebody says so, or nobody uses the namespace any more: the container has ended.
    fn watch(&self, told: &std::sync::mpsc::Receiver<()>) {
        if self.away.published {
            return self.watch_container(told);
        }
        let (mut used, mut empty) = (false, 0);
        while told.recv_timeout(LOOK).is_err() {
            let named = NetNs::open(&self.away.path)
                .and_then(|ns| ns.identity())
                .is_ok_and(|identity| identity == self.away.identity);
            let here = inhabited(self.away.identity);
            // What it sends says that it is there, too: its fence lets nothing out before.
            used |= here || self.out_bytes.load(Ordering::Relaxed) > 0;
            empty = if named && (here || !used) { 0 } else { empty + 1 };
            if empty >= DESERTED {
                tracing::info!("the container has ended");
                let _ = self.ask_home(Ask::End { dismantle: true });
                return;
            }
        }
    }
}

impl Holder {
    /// The same where the network is an engine's, and where the container is stands in the notes when it is
    /// restored. Nobody is told of its end but by its process; and a home that is gone does not come back.
    fn watch_container(&self, told: &std::sync::mpsc::Receiver<()>) {
        let mut linked = Instant::now();
        while told.recv_timeout(LOOK).is_err() {
            if self.lock().peer.is_some() {
                linked = Instant::now();
            }
            if linked.elapsed() > ORPHANED {
                return tracing::info!("nothing was heard of {} for too long", self.away.home);
            }
            let Ok(away) = away_at(&self.directory) else { return };
            let ended = |path: &Path| {
                let identity = NetNs::open(path).and_then(|namespace| namespace.identity());
                identity.ok() != Some(away.identity)
            };
            if away.path != Path::new("") && ended(&away.path) {
                tracing::info!("the container has ended");
                let _ = self.ask_home(Ask::End { dismantle: true });
                return;
            }
        }
    }
}

/// Tells whether a process is in a network namespace.
fn inhabited((_, inode): (u64, u64)) -> bool {
    let name = format!("net:[{inode}]");
    let list = fs::read_dir("/proc").into_iter().flatten().flatten();
    list.filter(|e| e.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit)).any(
        |e| fs::read_link(e.path().join("ns/net")).is_ok_and(|t| t.as_os_str() == name.as_str()),
    )
}
