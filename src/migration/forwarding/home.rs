//! The host that has the address: the process that forwards.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::carrier::{self, DEAD, ORPHANED, PULSE, Refused};
use super::process::dismantle;
use super::way::{reached_by, through, way};
use super::wire::{IncomingFrames, Wire};
use super::{HOME, Home, control, home_at, remove_directory, write};
use crate::migration::protocol::Message;
use crate::migration::protocol::forwarding::{Ask, ForwardAnswer, ForwardMessage, Status};
use crate::migration::protocol::session::{FromPeer, PeerWriter, Session};
use crate::network::forward;
use crate::network::translated::{self, Translated};
use crate::sys::netns::NetNs;
use crate::sys::process::wait_readable;
use crate::transport::backoff::Backoff;
use crate::transport::connect::{Cutter, Destination};
use crate::transport::frame::Frame;

/// Between two tries to reach the other host, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Time that the other host may take to hear that it is over.
const FAREWELL: Duration = Duration::from_secs(3);

/// What the threads share.
struct Forwarder {
    directory: PathBuf,
    wire: Wire,
    state: Mutex<SwitchState>,
    changed: Condvar,
    out_bytes: AtomicU64,
    in_bytes: AtomicU64,
}

struct SwitchState {
    home: Home,
    /// Links to hosts: the one where the container is, and one where it may go.
    ports: Vec<SwitchPort>,
    /// The last number given.
    number: u64,
    /// The port that frames go to.
    active: Option<u64>,
    /// Hears what comes, while frames go anywhere.
    ear: Option<Arc<IncomingFrames>>,
    over: bool,
}

struct SwitchPort {
    number: u64,
    /// The migration that made it; none after a new start.
    migration: String,
    destination: Destination,
    peer: Option<PeerWriter>,
    cutter: Option<Cutter>,
    /// Last sign of life.
    heard: Instant,
    /// Open connections of the container's, where they are known, and since when there is none.
    connections: Option<u32>,
    idle_since: Option<Instant>,
    why: String,
}

/// `ferry __guard forward work DIRECTORY`: the process that forwards.
///
/// # Errors
/// When the kept network is not there.
pub fn work(directory: &Path) -> Result<()> {
    let home = home_at(directory)?;
    let wire = Wire::open(directory, &home)?;
    let state =
        SwitchState { home, ports: Vec::new(), number: 0, active: None, ear: None, over: false };
    let forwarder = Arc::new(Forwarder {
        directory: directory.to_owned(),
        wire,
        state: Mutex::new(state),
        changed: Condvar::new(),
        out_bytes: AtomicU64::new(0),
        in_bytes: AtomicU64::new(0),
    });

    // After a new start: on with it.
    let Home { active, pending, .. } = forwarder.lock().home.clone();
    if let Some(destination) = active {
        let number = forwarder.add(destination, "", None)?;
        forwarder.activate(number)?;
    }

    if let Some((destination, migration)) = pending {
        forwarder.add(destination, &migration, None)?;
    }
    let (end, ended) = channel();
    let answering = forwarder.clone();
    control::serve(directory, move |asked, _| {
        let end = end.clone();
        answering.answer(asked, None, &move |dismantle| _ = end.send(dismantle))
    })?;

    let (sending, watching) = (forwarder.clone(), forwarder.clone());
    std::thread::Builder::new().name("send".into()).spawn(move || sending.send_frames())?;
    std::thread::Builder::new().name("watch".into()).spawn(move || watching.watch())?;
    let dismantled = loop {
        match ended.recv_timeout(PULSE) {
            Ok(dismantled) => break dismantled,
            // Said over a link.
            Err(_) if forwarder.lock().over || forwarder.is_deserted() => break true,
            Err(_) => {}
        }
    };

    forwarder.lock().over = true;
    // The answer to whoever said so is on its way.
    std::thread::park_timeout(Duration::from_millis(50));
    forwarder.say_over();
    if dismantled {
        dismantle(directory)
    } else {
        remove_directory(directory)
    }

    for port in &forwarder.lock().ports {
        port.cutter.iter().for_each(Cutter::cut);
    }
    std::process::exit(0);
}

impl Forwarder {
    /// Tells the host that has the container, where it would not see it by itself; and waits a little until
    /// it has heard.
    fn say_over(&self) {
        let state = self.lock();
        if state.home.published.is_none() {
            return;
        }
        for peer in state.ports.iter().filter_map(|port| port.peer.as_ref()) {
            let _ = peer.send(&Message::Forward(Box::new(ForwardMessage::Over)));
        }
        let linked = |state: &mut SwitchState| state.ports.iter().any(|port| port.peer.is_some());
        let _ = self.changed.wait_timeout_while(state, FAREWELL, linked);
    }

    fn lock(&self) -> MutexGuard<'_, SwitchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a question, of this host or over a port.
    fn answer(
        self: &Arc<Self>,
        asked: Ask,
        port: Option<u64>,
        end: &dyn Fn(bool),
    ) -> ForwardAnswer {
        match asked {
            Ask::Status => {
                ForwardAnswer { status: Some(self.status()), ..ForwardAnswer::default() }
            }
            Ask::Translated => match self.translated() {
                Ok(found) => ForwardAnswer { translated: Some(found), ..ForwardAnswer::default() },
                Err(e) => Err(e).into(),
            },
            Ask::EndWhenIdle(seconds) => self.end_when_idle(seconds, port).into(),
            Ask::Probe(destination) => {
                self.ours(destination, port).and_then(|to| self.probe(&to)).into()
            }
            Ask::Join { destination, migration } => {
                self.ours(destination, port).and_then(|to| self.join(&to, &migration)).into()
            }
            Ask::Switch { migration } => self.switch(&migration).into(),
            Ask::Leave { migration, claim } => self.leave(&migration, port, claim).into(),
            Ask::Local => {
                let mut state = self.lock();
                state.active = None;
                state.ear = None;
                ForwardAnswer::default()
            }
            Ask::Abroad => self.abroad().into(),
            Ask::End { dismantle } => {
                // A host that the container has left has no say.
                if port.is_some() && port != self.lock().active {
                    return Err(anyhow!("the container is elsewhere")).into();
                }
                end(dismantle);
                ForwardAnswer::default()
            }
            Ask::Quit | Ask::Link(_) => Err(anyhow!("this is the container's home")).into(),
        }
    }

    /// Returns what of this host's tables the container's connections live by.
    fn translated(&self) -> Result<Translated> {
        let addresses = self.lock().home.addresses.clone();
        let addresses: Vec<_> = addresses.iter().filter_map(|a| a.parse().ok()).collect();
        Ok(translated::look(&NetNs::current()?, &addresses)?)
    }

    fn end_when_idle(&self, seconds: u64, port: Option<u64>) -> Result<()> {
        let mut state = self.lock();
        if port.is_some() && port != state.active {
            bail!("the container is elsewhere");
        }
        state.home.until_idle = Some(seconds);
        // It starts from now, whatever was before.
        state.ports.iter_mut().for_each(|p| p.idle_since = None);
        write(&self.directory, HOME, &state.home)
    }

    /// Tells whether it is to end when there is no connection, and there was none for long enough.
    fn is_deserted(&self) -> bool {
        let state = self.lock();
        let port = state.ports.iter().find(|p| Some(p.number) == state.active);
        // Connections whose other end has gone for so long are over, and their ports are of use again.
        let lost = |p: &SwitchPort| p.peer.is_none() && p.heard.elapsed() > ORPHANED;
        if state.home.published.is_some() && port.is_some_and(lost) {
            return true;
        }
        let idle = port.filter(|p| p.peer.is_some()).and_then(|p| p.idle_since);
        let limit = state.home.until_idle.map(Duration::from_secs);
        idle.zip(limit).is_some_and(|(since, limit)| since.elapsed() >= limit)
    }

    fn status(&self) -> Status {
        let state = self.lock();
        let port = state.ports.iter().find(|p| Some(p.number) == state.active);
        Status {
            to: port.map(|p| way(&p.destination)).unwrap_or_default(),
            since: state.home.since,
            out_bytes: self.out_bytes.load(Ordering::Relaxed),
            in_bytes: self.in_bytes.load(Ordering::Relaxed),
            connections: port.and_then(|p| p.connections),
            until_idle: state.home.until_idle,
            connected: port.is_some_and(|p| p.peer.is_some()),
            why: port.map_or_else(|| "the container is at home".into(), |p| p.why.clone()),
        }
    }

    /// Returns how we reach a host that is named here, or by the one where the container is.
    fn ours(&self, destination: Destination, port: Option<u64>) -> Result<Destination> {
        let mut state = self.lock();
        if port.is_none() {
            if let Destination::Shell { rsh, remote_ferry, .. } = &destination {
                state.home.shell = Some((rsh.clone(), remote_ferry.clone()));
                write(&self.directory, HOME, &state.home)?;
            }
            return Ok(destination);
        }
        if port != state.active {
            bail!("the container is elsewhere");
        }
        reached_by(state.home.shell.as_ref(), destination)
    }

    /// The ways to a host: its own, and through the one where the container is.
    fn ways(&self, destination: &Destination) -> Vec<Destination> {
        let state = self.lock();
        let port = state.ports.iter().find(|p| Some(p.number) == state.active);
        let through = port.and_then(|p| through(&p.destination, destination));
        std::iter::once(destination.clone()).chain(through).collect()
    }

    fn probe(&self, destination: &Destination) -> Result<()> {
        self.first_way(destination, |way| {
            let mut carrier = carrier::connect(way, None, |_| true)?;
            carrier.closer.close();
            Ok(())
        })
    }

    /// Tries all ways; the error is that of the straight one.
    fn first_way<T>(
        &self,
        destination: &Destination,
        mut attempt: impl FnMut(&Destination) -> Result<T>,
    ) -> Result<T> {
        let mut first = None;
        for way in self.ways(destination) {
            match attempt(&way) {
                Ok(done) => return Ok(done),
                Err(e) => first = first.or(Some(e)),
            }
        }
        let e = first.unwrap_or_else(|| anyhow!("there is no way to it"));
        Err(e.context(format!("{} cannot reach {destination}", crate::sys::host::name())))
    }

    fn join(self: &Arc<Self>, destination: &Destination, migration: &str) -> Result<()> {
        self.first_way(destination, |way| {
            let (tell, told) = channel();
            let number = self.add(way.clone(), migration, Some(tell))?;
            let connected = told.recv().unwrap_or_else(|_| Err(anyhow!("it was given up")));
            let mut state = self.lock();
            if let Err(e) = connected {
                state.ports.retain(|p| p.number != number);
                return Err(e);
            }
            // Whoever takes this process's place must look there, too.
            state.home.pending = Some((way.clone(), migration.to_owned()));
            write(&self.directory, HOME, &state.home)
        })
    }

    /// One more port. Once there was a link it is made again whenever it breaks, also before anybody
    /// knows whether the container has come to it: until that host says that it has not, somebody says
    /// that it does not, or it has gone on from there.
    ///
    /// `tell` hears how the first try went, if it is to be the last that fails.
    fn add(
        self: &Arc<Self>,
        destination: Destination,
        migration: &str,
        mut tell: Option<Sender<Result<()>>>,
    ) -> Result<u64> {
        let number = {
            let mut state = self.lock();
            state.number += 1;
            let number = state.number;
            state.ports.push(SwitchPort {
                number,
                migration: migration.to_owned(),
                destination: destination.clone(),
                peer: None,
                cutter: None,
                heard: Instant::now(),
                connections: None,
                idle_since: None,
                why: "connecting".into(),
            });
            number
        };

        let forwarder = self.clone();
        std::thread::Builder::new()
            .name("port".into())
            .spawn(move || forwarder.keep_connected(number, &destination, &mut tell))?;
        Ok(number)
    }

    /// The life of a port. `tell` hears how the first try went, if it is to be the last that fails.
    fn keep_connected(
        self: &Arc<Self>,
        number: u64,
        destination: &Destination,
        tell: &mut Option<Sender<Result<()>>>,
    ) {
        let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            let connected = self.connect(number, destination);
            let failed = connected.as_ref().err().map(|e| format!("{e:#}"));
            let refused = connected.as_ref().is_err_and(|e| e.is::<Refused>());
            let link = match connected {
                Ok(link) => {
                    backoff.reset();
                    if let Some(tell) = tell.take() {
                        let _ = tell.send(Ok(()));
                    }
                    Some(link)
                }
                Err(e) => {
                    if let Some(tell) = tell.take() {
                        let _ = tell.send(Err(e));
                        return;
                    }
                    None
                }
            };

            let why = link.and_then(|(Session { peer, mut closer }, gone)| {
                let why = live(&peer, &gone);
                closer.close();
                why
            });
            {
                let mut state = self.lock();
                let (active, over) = (state.active, state.over);
                let Some(port) = state.ports.iter_mut().find(|p| p.number == number) else {
                    return;
                };

                port.peer = None;
                port.cutter = None;
                self.changed.notify_all();
                (port.connections, port.idle_since) = (None, None);
                port.why = why.or(failed).unwrap_or_else(|| "the link broke".into());

                // After a new start it becomes active right after this thread has begun.
                let migration = port.migration.clone();
                let here = active.map_or(migration.is_empty(), |active| active == number);
                let left = active.is_some_and(|active| active > number);
                let others = state.ports.iter().filter(|p| p.peer.is_some());
                let next = others.map(|p| p.number).max().filter(|_| here && refused);
                if over || left || refused && !here || next.is_some() {
                    state.ports.retain(|p| p.number != number);
                    self.not_pending(&mut state, &migration);
                    drop(state);
                    // Nobody could tell that it has gone on, and it may never say a word.
                    if let Some(Err(e)) = next.map(|next| self.activate(next)) {
                        tracing::error!("{e:#}");
                    }
                    return;
                }
            }

            backoff.park();
        }
    }

    fn connect(
        self: &Arc<Self>,
        number: u64,
        destination: &Destination,
    ) -> Result<(Session, Receiver<String>)> {
        let (end, ended) = channel();
        let forwarder = self.clone();
        let home = self.lock().home.clone();
        let carry = ForwardMessage::Carry { id: home.id, links: home.links };
        let hear = move |heard| forwarder.hear(number, heard, &end);
        let carrier = carrier::connect(destination, Some(carry), hear)?;
        let mut state = self.lock();
        let port = state.ports.iter_mut().find(|p| p.number == number);
        let port = port.ok_or_else(|| anyhow!("it was given up"))?;
        port.peer = Some(carrier.peer.clone());
        port.cutter = carrier.closer.cutter().ok();
        port.heard = Instant::now();
        port.why = String::new();
        drop(state);
        self.changed.notify_all();
        Ok((carrier, ended))
    }

    fn hear(self: &Arc<Self>, number: u64, heard: FromPeer, end: &Sender<String>) -> bool {
        {
            let mut state = self.lock();
            if let Some(port) = state.ports.iter_mut().find(|p| p.number == number) {
                port.heard = Instant::now();
            }
        }
        match heard {
            FromPeer::Frame(Frame::Packet(bytes)) => self.take_in(number, &bytes),
            FromPeer::Message(Message::Forward(word)) => match *word {
                ForwardMessage::Ask { number: question, ask } => {
                    let forwarder = self.clone();
                    let answer = move || forwarder.answer_over(number, question, ask);
                    let _ = std::thread::Builder::new().name("answer".into()).spawn(answer);
                }
                ForwardMessage::Alive { connections } => self.count(number, connections),
                _ => {}
            },
            FromPeer::Gone(why) => {
                let _ = end.send(why.unwrap_or_else(|| "the link was closed".into()));
                return false;
            }
            _ => {}
        }

        true
    }

    fn count(&self, number: u64, connections: Option<u32>) {
        let mut state = self.lock();
        if let Some(port) = state.ports.iter_mut().find(|p| p.number == number) {
            port.connections = connections;
            port.idle_since = match connections {
                Some(0) => port.idle_since.or_else(|| Some(Instant::now())),
                _ => None,
            };
        }
    }

    fn answer_over(self: &Arc<Self>, port: u64, number: u64, ask: Ask) {
        let over = std::cell::Cell::new(false);
        let answer = self.answer(ask, Some(port), &|_| over.set(true));
        let peer = {
            let state = self.lock();
            state.ports.iter().find(|p| p.number == port).and_then(|p| p.peer.clone())
        };
        if let Some(peer) = peer {
            let _ =
                peer.send(&Message::Forward(Box::new(ForwardMessage::Answer { number, answer })));
        }
        if over.get() {
            self.lock().over = true;
        }
    }

    /// A frame of the container's goes out here. The first that comes from a newer port than the
    /// active one says that the container is there now: before that its fence lets none out.
    fn take_in(&self, number: u64, bytes: &[u8]) {
        self.in_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let Ok(frame) = crate::network::frames::decode(bytes) else { return };
        let newer = self.wire.is_containers(&frame) && {
            let state = self.lock();
            // At home again: only what was on its way is still to come.
            let home = state.active.is_none() && state.home.active.is_some();
            !home && state.active.is_none_or(|active| number > active)
        };
        if newer && let Err(e) = self.activate(number) {
            tracing::error!("{e:#}");
        }
        // A link that is down or full loses it, as any link does.
        let _ = self.wire.send(&frame);
    }

    /// From now on frames go to this port.
    fn activate(&self, number: u64) -> Result<()> {
        let mut state = self.lock();
        if state.ear.is_none() {
            state.ear = Some(Arc::new(self.wire.listen()?));
        }
        let port = state.ports.iter().find(|p| p.number == number);
        let port = port.ok_or_else(|| anyhow!("that link is gone"))?;
        let (destination, migration) = (port.destination.clone(), port.migration.clone());
        state.active = Some(number);
        if state.home.active.as_ref() != Some(&destination) {
            state.home.active = Some(destination);
            state.home.since = crate::migration::journal::unix_time();
            // For a new start; without it this one goes on all the same.
            let _ = write(&self.directory, HOME, &state.home);
        }
        self.not_pending(&mut state, &migration);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn switch(&self, migration: &str) -> Result<()> {
        let (port, active) = {
            let state = self.lock();
            let port = state.ports.iter().find(|p| p.migration == migration).map(|p| p.number);
            (port, state.active)
        };
        match port {
            Some(port) if active.is_none_or(|active| port > active) => self.activate(port),
            // It has been seen to be there; or it is at home.
            _ => Ok(()),
        }
    }

    /// What became of this migration is known.
    fn not_pending(&self, state: &mut SwitchState, migration: &str) {
        if state.home.pending.take_if(|p| p.1 == migration).is_some() {
            // As above.
            let _ = write(&self.directory, HOME, &state.home);
        }
    }

    fn leave(&self, migration: &str, asked_by: Option<u64>, claim: bool) -> Result<()> {
        {
            let mut state = self.lock();
            let active = state.active;
            state.ports.retain(|p| {
                let drop = p.migration == migration && (claim || Some(p.number) != active);
                if drop {
                    p.cutter.iter().for_each(Cutter::cut);
                }
                !drop
            });
            self.not_pending(&mut state, migration);
        }
        match asked_by {
            Some(port) if claim => self.activate(port),
            _ => Ok(()),
        }
    }

    /// The container was on its way home, and stayed where it was.
    fn abroad(self: &Arc<Self>) -> Result<()> {
        // Not any other, which may not have been told yet that the container does not come.
        let (last, destination) = {
            let state = self.lock();
            let active = state.home.active.clone();
            let there = state.ports.iter().filter(|p| Some(&p.destination) == active.as_ref());
            (there.map(|p| p.number).max(), active)
        };
        match (last, destination) {
            (Some(port), _) => self.activate(port),
            (None, Some(destination)) => self.activate(self.add(destination, "", None)?),
            (None, None) => Ok(()),
        }
    }

    /// What comes for the container goes to where it is. While there is no link it waits in the
    /// kernel, and what does not fit is lost.
    fn send_frames(&self) {
        let mut buffer = forward::buffer();
        let mut frames = Vec::new();
        loop {
            let ear = {
                let mut state = self.lock();
                loop {
                    let port = state.ports.iter().find(|p| Some(p.number) == state.active);
                    let linked = port.is_some_and(|p| p.peer.is_some());
                    if let Some(ear) = state.ear.clone().filter(|_| linked) {
                        break ear;
                    }
                    let waited = self.changed.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
            };

            // Not for ever: the port may be another one by then.
            if wait_readable(&[ear.as_fd()], Some(Instant::now() + PULSE)).is_err() {
                continue;
            }
            frames.clear();
            let _ = ear.read(&mut buffer, &mut frames);
            let peer = {
                let state = self.lock();
                let port = state.ports.iter().find(|p| Some(p.number) == state.active);
                port.and_then(|p| p.peer.clone())
            };

            // At home again, or without a link.
            let Some(peer) = peer else { continue };

            // A link that breaks is made again by whoever listens to it.
            if let Ok(bytes) = carrier::send(&peer, &frames) {
                self.out_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }

    /// Cuts links that are dead, which a remote shell does not say.
    fn watch(&self) {
        loop {
            std::thread::park_timeout(PULSE);
            self.wire.tend();
            for port in &self.lock().ports {
                if port.peer.is_some() && port.heard.elapsed() > DEAD {
                    port.cutter.iter().for_each(Cutter::cut);
                }
            }
        }
    }
}

/// Tells the other host that this one lives, until the link is gone; why it is.
fn live(peer: &PeerWriter, gone: &Receiver<String>) -> Option<String> {
    loop {
        // One that takes nothing more is cut by whoever watches, and this ends with an error then.
        let _ = peer.send(&Message::Forward(Box::new(ForwardMessage::Alive { connections: None })));
        match gone.recv_timeout(PULSE) {
            Ok(why) => return Some(why),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}
