//! Which host the frames go to: a port for the host where the container is, and one for each where it may
//! be soon. Pure: what has happened goes in, what is to be done comes out.
//!
//! ```text
//!            add                    a frame of the container's comes from it, or somebody says so
//!     (none) ──▶ a newer port ─────────────────────────────────────────────────▶ the active port
//!                  │ refused, left, not to come                                    │ a newer one is active
//!                  ▼                                                               ▼
//!                (none)                                                          (none)
//! ```

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::Home;
use super::carrier::{DEAD, ORPHANED};
use super::way::{through, way};
use crate::migration::protocol::forwarding::Status;
use crate::transport::connect::Destination;

/// See the module. `L` is a link to a host.
pub(super) struct Switch<L> {
    /// What outlasts this process.
    pub(super) home: Home,
    /// It is not what was last written down.
    changed: bool,
    ports: Vec<SwitchPort<L>>,
    /// The last number given.
    number: u64,
    /// The port that frames go to.
    active: Option<u64>,
    /// It is ended.
    pub(super) over: bool,
}

struct SwitchPort<L> {
    number: u64,
    /// The migration that made it; empty after a new start.
    migration: String,
    destination: Destination,
    link: Option<L>,
    /// Last sign of life.
    heard: Instant,
    /// Open connections of the container's, where they are known, and since when there is none.
    connections: Option<u32>,
    idle_since: Option<Instant>,
    /// Why there is no link.
    why: String,
}

/// What becomes of a port whose link was lost.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AfterLoss {
    /// The host is to be reached again.
    Again,
    /// Nobody needs it.
    Ended,
    /// The container has gone on from there, unseen: to this port.
    EndedFor(u64),
}

/// Where the container is that was on its way home, and did not come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Abroad {
    /// There is a port for that host.
    Port(u64),
    /// It is to be reached.
    At(Destination),
    /// It never left.
    Home,
}

impl<L> Switch<L> {
    pub(super) fn new(home: Home) -> Switch<L> {
        Switch { home, changed: false, ports: Vec::new(), number: 0, active: None, over: false }
    }

    fn port(&self, number: u64) -> Option<&SwitchPort<L>> {
        self.ports.iter().find(|port| port.number == number)
    }

    fn port_mut(&mut self, number: u64) -> Option<&mut SwitchPort<L>> {
        self.ports.iter_mut().find(|port| port.number == number)
    }

    fn active_port(&self) -> Option<&SwitchPort<L>> {
        self.port(self.active?)
    }

    /// Tells whether what is to outlast this process has changed since this was asked last.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Returns the link to where the container is, if there is one.
    pub(super) fn active_link(&self) -> Option<&L> {
        self.active_port()?.link.as_ref()
    }

    /// Returns the link of a port.
    pub(super) fn link(&self, number: u64) -> Option<&L> {
        self.port(number)?.link.as_ref()
    }

    /// Returns all links.
    pub(super) fn links(&self) -> impl Iterator<Item = &L> {
        self.ports.iter().filter_map(|port| port.link.as_ref())
    }

    /// Returns the links of which nothing was heard for too long.
    pub(super) fn dead_links(&self, now: Instant) -> impl Iterator<Item = &L> {
        let dead = move |port: &&SwitchPort<L>| now.duration_since(port.heard) > DEAD;
        self.ports.iter().filter(dead).filter_map(|port| port.link.as_ref())
    }

    /// Checks that who asks has a say: this host, or the one where the container is. One that it has left
    /// has none.
    ///
    /// # Errors
    /// When he has not.
    pub(super) fn has_say(&self, asked_by: Option<u64>) -> Result<()> {
        if asked_by.is_some() && asked_by != self.active {
            bail!("the container is elsewhere");
        }
        Ok(())
    }

    /// Returns the ways to a host: its own, and through the one where the container is.
    pub(super) fn ways(&self, destination: &Destination) -> Vec<Destination> {
        let through = self.active_port().and_then(|port| through(&port.destination, destination));
        std::iter::once(destination.clone()).chain(through).collect()
    }

    /// One more port, the newest; it has no link yet.
    pub(super) fn add(&mut self, destination: Destination, migration: &str, now: Instant) -> u64 {
        self.number += 1;
        self.ports.push(SwitchPort {
            number: self.number,
            migration: migration.to_owned(),
            destination,
            link: None,
            heard: now,
            connections: None,
            idle_since: None,
            why: "connecting".into(),
        });
        self.number
    }

    /// It could not be reached at all.
    pub(super) fn remove(&mut self, number: u64) {
        self.ports.retain(|port| port.number != number);
    }

    /// Whoever takes this process's place must look there, too.
    pub(super) fn expect(&mut self, destination: Destination, migration: &str) {
        self.home.pending = Some((destination, migration.to_owned()));
        self.changed = true;
    }

    /// What became of this migration is known.
    fn decided(&mut self, migration: &str) {
        self.changed |= self.home.pending.take_if(|pending| pending.1 == migration).is_some();
    }

    /// How the operator's remote shell reaches other hosts.
    pub(super) fn remember_shell(&mut self, shell: (Vec<String>, String)) {
        self.home.shell = Some(shell);
        self.changed = true;
    }

    /// The host of this port is reached.
    ///
    /// # Errors
    /// When the port was given up.
    pub(super) fn linked(&mut self, number: u64, link: L, now: Instant) -> Result<()> {
        let port = self.port_mut(number).ok_or_else(|| anyhow!("it was given up"))?;
        (port.link, port.heard, port.why) = (Some(link), now, String::new());
        Ok(())
    }

    /// The link of a port was lost, or did not come about; `refused`: the host does not have the container.
    ///
    /// Once there was a link it is made again whenever it breaks, also before anybody knows whether the
    /// container has come to it: until that host says that it has not, somebody says that it does not, or
    /// it has gone on from there.
    pub(super) fn lost(&mut self, number: u64, refused: bool, why: String) -> AfterLoss {
        let (active, over) = (self.active, self.over);
        let Some(port) = self.port_mut(number) else { return AfterLoss::Ended };
        (port.link, port.connections, port.idle_since) = (None, None, None);
        port.why = why;

        // After a new start it becomes active right after its thread has begun.
        let migration = port.migration.clone();
        let here = active.map_or(migration.is_empty(), |active| active == number);
        let left = active.is_some_and(|active| active > number);
        let linked = self.ports.iter().filter(|port| port.link.is_some());
        let next = linked.map(|port| port.number).max().filter(|_| here && refused);
        if !(over || left || refused && !here || next.is_some()) {
            return AfterLoss::Again;
        }

        self.remove(number);
        self.decided(&migration);
        // Nobody could tell that it has gone on, and it may never say a word.
        next.map_or(AfterLoss::Ended, AfterLoss::EndedFor)
    }

    /// The host of a port has said something.
    pub(super) fn heard(&mut self, number: u64, now: Instant) {
        if let Some(port) = self.port_mut(number) {
            port.heard = now;
        }
    }

    /// So many connections are open there, where that is known.
    pub(super) fn count(&mut self, number: u64, connections: Option<u32>, now: Instant) {
        if let Some(port) = self.port_mut(number) {
            port.connections = connections;
            port.idle_since = match connections {
                Some(0) => port.idle_since.or(Some(now)),
                _ => None,
            };
        }
    }

    /// Tells whether a frame of the container's from this port says that it is there now: before that its
    /// fence lets none out.
    pub(super) fn is_newer(&self, number: u64) -> bool {
        // At home again: only what was on its way is still to come.
        let home = self.active.is_none() && self.home.active.is_some();
        !home && self.active.is_none_or(|active| number > active)
    }

    /// Returns the port to which a migration takes it, if it is not known to be there, or at home.
    pub(super) fn port_of(&self, migration: &str) -> Option<u64> {
        let port = self.ports.iter().find(|port| port.migration == migration)?;
        Some(port.number).filter(|number| self.active.is_none_or(|active| *number > active))
    }

    /// From now on, unix time, frames go to this port.
    ///
    /// # Errors
    /// When there is no such port any more.
    pub(super) fn activate(&mut self, number: u64, since: u64) -> Result<()> {
        let port = self.port(number).ok_or_else(|| anyhow!("that link is gone"))?;
        let (destination, migration) = (port.destination.clone(), port.migration.clone());
        self.active = Some(number);
        if self.home.active.as_ref() != Some(&destination) {
            (self.home.active, self.home.since) = (Some(destination), since);
            self.changed = true;
        }
        self.decided(&migration);
        Ok(())
    }

    /// The container is at home: frames go nowhere.
    pub(super) fn come_home(&mut self) {
        self.active = None;
    }

    /// The container was on its way home, and stayed where it was.
    pub(super) fn abroad(&self) -> Abroad {
        // Not any other, which may not have been told yet that the container does not come.
        let Some(at) = &self.home.active else { return Abroad::Home };
        let there = self.ports.iter().filter(|port| port.destination == *at);
        let last = there.map(|port| port.number).max();
        last.map_or_else(|| Abroad::At(at.clone()), Abroad::Port)
    }

    /// A migration does not take it there; or, `claim`, it has gone on from there, whatever was seen.
    /// Returns the links that are of no use any more.
    pub(super) fn leave(&mut self, migration: &str, claim: bool) -> Vec<L> {
        let active = self.active;
        let goes = |port: &mut SwitchPort<L>| {
            port.migration == migration && (claim || Some(port.number) != active)
        };
        let gone: Vec<_> = self.ports.extract_if(.., goes).collect();
        self.decided(migration);
        gone.into_iter().filter_map(|port| port.link).collect()
    }

    /// It ends when there was no connection for so many seconds, from now on, whatever was before.
    pub(super) fn end_when_idle(&mut self, seconds: u64) {
        self.home.until_idle = Some(seconds);
        self.ports.iter_mut().for_each(|port| port.idle_since = None);
        self.changed = true;
    }

    /// Tells whether it is to end when there is no connection, and there was none for long enough.
    pub(super) fn is_deserted(&self, now: Instant) -> bool {
        let Some(port) = self.active_port() else { return false };
        if port.link.is_none() {
            // Connections whose other end has gone for so long are over, and their ports are of use again.
            return self.home.published.is_some() && now.duration_since(port.heard) > ORPHANED;
        }
        let limit = self.home.until_idle.map(Duration::from_secs);
        let idle = port.idle_since.zip(limit);
        idle.is_some_and(|(since, limit)| now.duration_since(since) >= limit)
    }

    /// Returns what there is to say of it, but for what has gone through.
    pub(super) fn status(&self) -> Status {
        let port = self.active_port();
        Status {
            to: port.map(|port| way(&port.destination)).unwrap_or_default(),
            since: self.home.since,
            out_bytes: 0,
            in_bytes: 0,
            connections: port.and_then(|port| port.connections),
            until_idle: self.home.until_idle,
            connected: self.active_link().is_some(),
            why: port.map_or_else(|| "the container is at home".into(), |port| port.why.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> Destination {
        Destination::Unix(name.into())
    }

    fn switch() -> Switch<&'static str> {
        Switch::new(Home {
            id: "id".into(),
            container: "box".parse().unwrap(),
            addresses: Vec::new(),
            links: Vec::new(),
            active: None,
            pending: None,
            since: 0,
            until_idle: None,
            shell: None,
            name: None,
            published: None,
        })
    }

    /// Two hosts, linked; frames go to the first.
    fn two() -> (Switch<&'static str>, Instant) {
        let (mut switch, now) = (switch(), Instant::now());
        for name in ["one", "two"] {
            let number = switch.add(host(name), name, now);
            switch.linked(number, name, now).unwrap();
        }
        switch.activate(1, 7).unwrap();
        (switch, now)
    }

    #[test]
    fn frames_go_where_a_newer_port_has_it() {
        let (mut switch, _) = two();
        assert_eq!(switch.active_link(), Some(&"one"));
        assert!(switch.is_newer(2) && !switch.is_newer(1));
        switch.activate(2, 8).unwrap();
        assert_eq!((switch.active_link(), switch.home.since), (Some(&"two"), 8));
        assert!(!switch.is_newer(1), "what was on its way says nothing");
        assert!(switch.has_say(Some(1)).is_err() && switch.has_say(Some(2)).is_ok());
        assert!(switch.has_say(None).is_ok());
        assert!(switch.activate(3, 9).is_err());

        // At home nothing that comes leads away; where it was is known until it is forgotten.
        switch.come_home();
        assert_eq!(switch.active_link(), None);
        assert!(!switch.is_newer(2));
        assert_eq!(switch.abroad(), Abroad::Port(2));
        switch.remove(2);
        assert_eq!(switch.abroad(), Abroad::At(host("two")));
    }

    #[test]
    fn only_what_changes_is_written_down() {
        let (mut switch, _) = two();
        assert!(switch.take_changed() && !switch.take_changed());
        switch.activate(1, 9).unwrap();
        assert!(!switch.take_changed(), "it was there");
        switch.expect(host("two"), "two");
        assert!(switch.take_changed());
        switch.leave("another", false);
        assert!(!switch.take_changed());
        switch.activate(2, 9).unwrap();
        assert!(switch.take_changed() && switch.home.pending.is_none());
    }

    #[test]
    fn a_lost_link_is_made_again_as_long_as_it_may_be_needed() {
        let why = || "the link broke".to_owned();
        let (mut switch, now) = two();
        assert_eq!(switch.lost(1, false, why()), AfterLoss::Again);
        assert_eq!(switch.lost(2, false, why()), AfterLoss::Again);
        assert_eq!(switch.lost(2, true, why()), AfterLoss::Ended, "it does not come there");
        assert_eq!(switch.lost(1, true, why()), AfterLoss::Again, "nobody else has it");
        assert_eq!(switch.lost(2, false, why()), AfterLoss::Ended, "it is not there any more");

        // The host where it was does not have it, and there is one where it may be.
        let next = switch.add(host("three"), "three", now);
        switch.linked(next, "three", now).unwrap();
        assert_eq!(switch.lost(1, true, why()), AfterLoss::EndedFor(next));

        // It has gone on: older ports are of no use.
        let (mut switch, _) = two();
        switch.activate(2, 8).unwrap();
        assert_eq!(switch.lost(1, false, why()), AfterLoss::Ended);
        switch.over = true;
        assert_eq!(switch.lost(2, false, why()), AfterLoss::Ended);
    }

    #[test]
    fn it_leaves_where_it_is_only_when_that_is_claimed() {
        let (mut switch, _) = two();
        assert!(switch.leave("one", false).is_empty());
        assert_eq!(switch.leave("two", false), ["two"]);
        assert_eq!(switch.leave("one", true), ["one"]);
        assert_eq!(switch.port_of("one"), None);
    }

    #[test]
    fn it_ends_when_idle_for_long_enough() {
        let (mut switch, now) = two();
        let at = |seconds| now + Duration::from_secs(seconds);
        switch.count(1, Some(0), at(0));
        assert!(!switch.is_deserted(at(1000)), "nobody asked for that");
        switch.end_when_idle(10);
        assert!(!switch.is_deserted(at(1000)), "it counts from now");
        switch.count(1, Some(0), at(5));
        switch.count(1, Some(0), at(9));
        assert!(!switch.is_deserted(at(14)) && switch.is_deserted(at(15)));
        switch.count(1, Some(1), at(15));
        assert!(!switch.is_deserted(at(100)));
        switch.count(1, Some(0), at(16));
        switch.lost(1, false, String::new());
        assert!(!switch.is_deserted(at(100)), "nobody knows");
    }

    #[test]
    fn what_was_not_heard_of_is_cut() {
        let (mut switch, now) = two();
        let later = now + DEAD + Duration::from_secs(1);
        switch.heard(2, later);
        assert_eq!(switch.dead_links(later).collect::<Vec<_>>(), [&"one"]);
    }
}
