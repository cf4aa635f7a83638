//! The host that has the address: the process that forwards.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::carrier::{self, PULSE, Refused};
use super::process::dismantle;
use super::switch::{Abroad, AfterLoss, Switch};
use super::way::reached_by;
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
    state: Mutex<ForwarderState>,
    changed: Condvar,
    out_bytes: AtomicU64,
    in_bytes: AtomicU64,
}

struct ForwarderState {
    switch: Switch<PortLink>,
    /// Hears what comes, while frames go anywhere.
    ear: Option<Arc<IncomingFrames>>,
}

/// A link to a host.
struct PortLink {
    peer: PeerWriter,
    cutter: Option<Cutter>,
}

impl PortLink {
    fn cut(&self) {
        self.cutter.iter().for_each(Cutter::cut);
    }
}

/// `ferry __guard forward work DIRECTORY`: the process that forwards.
///
/// # Errors
/// When the kept network is not there.
pub fn work(directory: &Path) -> Result<()> {
    let home = home_at(directory)?;
    let wire = Wire::open(directory, &home)?;
    let Home { active, pending, .. } = home.clone();
    let state = ForwarderState { switch: Switch::new(home), ear: None };
    let forwarder = Arc::new(Forwarder {
        directory: directory.to_owned(),
        wire,
        state: Mutex::new(state),
        changed: Condvar::new(),
        out_bytes: AtomicU64::new(0),
        in_bytes: AtomicU64::new(0),
    });

    // After a new start: on with it.
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
            Err(_) => {
                let switch = &forwarder.lock().switch;
                if switch.over || switch.is_deserted(Instant::now()) {
                    break true;
                }
            }
        }
    };

    forwarder.lock().switch.over = true;
    // The answer to whoever said so is on its way.
    std::thread::park_timeout(Duration::from_millis(50));
    forwarder.say_over();
    if dismantled {
        dismantle(directory)
    } else {
        remove_directory(directory)
    }

    forwarder.lock().switch.links().for_each(PortLink::cut);
    std::process::exit(0);
}

impl Forwarder {
    /// Tells the host that has the container, where it would not see it by itself; and waits a little until
    /// it has heard.
    fn say_over(&self) {
        let state = self.lock();
        if state.switch.home.published.is_none() {
            return;
        }
        for link in state.switch.links() {
            let _ = link.peer.send(&Message::Forward(Box::new(ForwardMessage::Over)));
        }
        let linked = |state: &mut ForwarderState| state.switch.links().next().is_some();
        let _ = self.changed.wait_timeout_while(state, FAREWELL, linked);
    }

    fn lock(&self) -> MutexGuard<'_, ForwarderState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down what has to outlast this process, if that has changed.
    fn save(&self, switch: &mut Switch<PortLink>) -> Result<()> {
        if switch.take_changed() {
            write(&self.directory, HOME, &switch.home)?;
        }
        Ok(())
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
                state.switch.come_home();
                state.ear = None;
                ForwardAnswer::default()
            }
            Ask::Abroad => self.abroad().into(),
            Ask::End { dismantle } => {
                let may = self.lock().switch.has_say(port);
                may.map(|()| end(dismantle)).into()
            }
            Ask::Quit | Ask::Link(_) => Err(anyhow!("this is the container's home")).into(),
        }
    }

    /// Returns what of this host's tables the container's connections live by.
    fn translated(&self) -> Result<Translated> {
        let addresses = self.lock().switch.home.addresses.clone();
        let addresses: Vec<_> = addresses.iter().filter_map(|a| a.parse().ok()).collect();
        Ok(translated::look(&NetNs::current()?, &addresses)?)
    }

    fn end_when_idle(&self, seconds: u64, port: Option<u64>) -> Result<()> {
        let switch = &mut self.lock().switch;
        switch.has_say(port)?;
        switch.end_when_idle(seconds);
        self.save(switch)
    }

    fn status(&self) -> Status {
        Status {
            out_bytes: self.out_bytes.load(Ordering::Relaxed),
            in_bytes: self.in_bytes.load(Ordering::Relaxed),
            ..self.lock().switch.status()
        }
    }

    /// Returns how we reach a host that is named here, or by the one where the container is.
    fn ours(&self, destination: Destination, port: Option<u64>) -> Result<Destination> {
        let switch = &mut self.lock().switch;
        if port.is_none() {
            if let Destination::Shell { rsh, remote_ferry, .. } = &destination {
                switch.remember_shell((rsh.clone(), remote_ferry.clone()));
                self.save(switch)?;
            }
            return Ok(destination);
        }
        switch.has_say(port)?;
        reached_by(switch.home.shell.as_ref(), destination)
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
        let ways = self.lock().switch.ways(destination);
        for way in ways {
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
            let switch = &mut self.lock().switch;
            if let Err(e) = connected {
                switch.remove(number);
                return Err(e);
            }
            switch.expect(way.clone(), migration);
            self.save(switch)
        })
    }

    /// One more port, see [`Switch::lost`]. `tell` hears how the first try went, if it is to be the last
    /// that fails.
    fn add(
        self: &Arc<Self>,
        destination: Destination,
        migration: &str,
        mut tell: Option<Sender<Result<()>>>,
    ) -> Result<u64> {
        let number = self.lock().switch.add(destination.clone(), migration, Instant::now());
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

            let why = why.or(failed).unwrap_or_else(|| "the link broke".into());
            let after = {
                let switch = &mut self.lock().switch;
                let after = switch.lost(number, refused, why);
                // For a new start; without it this one goes on all the same.
                let _ = self.save(switch);
                after
            };
            self.changed.notify_all();
            match after {
                AfterLoss::Again => {}
                AfterLoss::Ended => return,
                AfterLoss::EndedFor(next) => {
                    if let Err(e) = self.activate(next) {
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
        let home = self.lock().switch.home.clone();
        let carry = ForwardMessage::Carry { id: home.id, links: home.links };
        let hear = move |heard| forwarder.hear(number, heard, &end);
        let carrier = carrier::connect(destination, Some(carry), hear)?;
        let (peer, cutter) = (carrier.peer.clone(), carrier.closer.cutter().ok());
        self.lock().switch.linked(number, PortLink { peer, cutter }, Instant::now())?;
        self.changed.notify_all();
        Ok((carrier, ended))
    }

    fn hear(self: &Arc<Self>, number: u64, heard: FromPeer, end: &Sender<String>) -> bool {
        self.lock().switch.heard(number, Instant::now());
        match heard {
            FromPeer::Frame(Frame::Packet(bytes)) => self.take_in(number, &bytes),
            FromPeer::Message(Message::Forward(word)) => match *word {
                ForwardMessage::Ask { number: question, ask } => {
                    let forwarder = self.clone();
                    let answer = move || forwarder.answer_over(number, question, ask);
                    let _ = std::thread::Builder::new().name("answer".into()).spawn(answer);
                }
                ForwardMessage::Alive { connections } => {
                    self.lock().switch.count(number, connections, Instant::now());
                }
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

    fn answer_over(self: &Arc<Self>, port: u64, number: u64, ask: Ask) {
        let over = std::cell::Cell::new(false);
        let answer = self.answer(ask, Some(port), &|_| over.set(true));
        let peer = self.lock().switch.link(port).map(|link| link.peer.clone());
        if let Some(peer) = peer {
            let _ =
                peer.send(&Message::Forward(Box::new(ForwardMessage::Answer { number, answer })));
        }
        if over.get() {
            self.lock().switch.over = true;
        }
    }

    /// A frame of the container's goes out here. The first that comes from a newer port than the
    /// active one says that the container is there now.
    fn take_in(&self, number: u64, bytes: &[u8]) {
        self.in_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let Ok(frame) = crate::network::frames::decode(bytes) else { return };
        let newer = self.wire.is_containers(&frame) && self.lock().switch.is_newer(number);
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
        state.switch.activate(number, crate::migration::journal::unix_time())?;
        // For a new start; without it this one goes on all the same.
        let _ = self.save(&mut state.switch);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn switch(&self, migration: &str) -> Result<()> {
        let port = self.lock().switch.port_of(migration);
        // Without one it has been seen to be there; or it is at home.
        port.map_or(Ok(()), |port| self.activate(port))
    }

    fn leave(&self, migration: &str, asked_by: Option<u64>, claim: bool) -> Result<()> {
        {
            let switch = &mut self.lock().switch;
            switch.leave(migration, claim).iter().for_each(PortLink::cut);
            let _ = self.save(switch);
        }
        match asked_by {
            Some(port) if claim => self.activate(port),
            _ => Ok(()),
        }
    }

    /// The container was on its way home, and stayed where it was.
    fn abroad(self: &Arc<Self>) -> Result<()> {
        let abroad = self.lock().switch.abroad();
        match abroad {
            Abroad::Port(port) => self.activate(port),
            Abroad::At(destination) => self.activate(self.add(destination, "", None)?),
            Abroad::Home => Ok(()),
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
                    let linked = state.switch.active_link().is_some();
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
            let peer = self.lock().switch.active_link().map(|link| link.peer.clone());

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
            self.lock().switch.dead_links(Instant::now()).for_each(PortLink::cut);
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
