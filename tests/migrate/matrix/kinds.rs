//! The kinds of container that are moved, each under a client of its own.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::exactly_one_copy_within;
use crate::common::lab::{Host, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::{Output, Running, until, write_script};
use crate::common::{Outcome, ensure};
use crate::faults::At;
use crate::{faults, floating, forward, overlay};

/// What a container has that makes its migration another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address of its own, files that both hosts see.
    Plain,
    /// A root file system that only the source has, and that changes all the time.
    Files,
    /// The same on an overlay.
    Overlay,
    /// All of its memory follows, slowly.
    PostCopy,
    /// The host's network, and addresses that move.
    Floating,
    /// An address that stays at home: the destination is in another network.
    Forward,
    /// So many connections that Ferry carries them by itself.
    Carried,
}

impl Kind {
    /// All, with their names.
    pub const ALL: &[(Kind, &str)] = &[
        (Kind::Plain, "plain"),
        (Kind::Files, "files"),
        (Kind::Overlay, "overlay"),
        (Kind::PostCopy, "postcopy"),
        (Kind::Floating, "floating"),
        (Kind::Forward, "forward"),
        (Kind::Carried, "carried"),
    ];

    /// The hosts that it needs, as `contrib/lab up` takes them.
    pub fn hosts(self) -> &'static [&'static str] {
        match self {
            Kind::Forward => &["a", "b@1", "client"],
            _ => &["a", "b", "client"],
        }
    }

    /// Options of `ferry migrate`.
    fn options(self, lab: &Lab) -> Vec<String> {
        match self {
            // 64 MiB in more than a second.
            Kind::PostCopy => vec!["--precopy=off".into(), "--bandwidth=40M".into()],
            Kind::Floating => {
                floating::floating(lab).map(|a| format!("--move-address={a}@eth0")).into()
            }
            _ => Vec::new(),
        }
    }
}

/// How long a migration may take on a machine that has other things to do.
pub const PATIENT: Duration = Duration::from_secs(300);

/// A container that runs on one of two hosts, and its client.
pub struct World<'a> {
    /// Where all of it is.
    pub lab: &'a Lab,
    /// Which kind it is.
    pub kind: Kind,
    /// It.
    pub container: Container,
    /// Its first host.
    pub a: Host,
    /// The other one.
    pub b: Host,
    probe: Option<Probe>,
}

impl<'a> World<'a> {
    /// Makes all of it, with the container on `a`.
    pub fn start(lab: &'a Lab, kind: Kind) -> Outcome<World<'a>> {
        let (a, b) = (lab.host("a"), lab.host("b"));
        let files = ["--arg", "--files", "--arg", "/data", "--arg", "--files-size", "--arg", "4M"];
        let container = match kind {
            Kind::Files => {
                let container = Container::networked("counter").with(&files).at("/srv/local/box");
                container.start(lab, &a)?;
                container
            }
            Kind::Overlay => {
                let container = overlay::writer();
                overlay::start(lab, &container, &overlay::upper())?;
                container
            }
            Kind::Floating => floating::start(lab)?,
            Kind::Plain | Kind::PostCopy | Kind::Forward | Kind::Carried => {
                let container = Container::networked("counter");
                container.start(lab, &a)?;
                container
            }
        };

        if kind == Kind::Forward {
            a.sh(&format!("ip -n box route add default via {}", lab.address(1)))?;
        }
        let mut world = World { lab, kind, container, a, b, probe: None };
        world.watch()?;

        Ok(world)
    }

    /// Has a new client, for whom nothing has been lost yet.
    pub fn watch(&mut self) -> Outcome {
        self.probe = None;
        let server = format!("{}:7000", self.lab.address(ADDRESS));
        let (count, every) = match self.kind {
            Kind::Carried => (faults::CARRIED, "50ms"),
            _ => (5, "2ms"),
        };
        self.probe = Some(Probe::to_every(self.lab, &server, count, every)?);
        Ok(())
    }

    /// Nobody watches it any more.
    pub fn unwatched(&mut self) {
        self.probe = None;
    }

    /// The other one of the two hosts.
    pub fn other(&self, host: &Host) -> Host {
        if host.name == "a" { self.b.clone() } else { self.a.clone() }
    }

    /// `ferry migrate` to the host that it is not on; faults as `FERRY_FAULT` has them, here and there.
    pub fn line(&self, to: &Host, here: &str, there: &str, more: &[&str]) -> Outcome<Vec<String>> {
        self.arm(there)?;
        let mut line = vec!["env".to_owned()];
        line.extend(here.split_whitespace().map(str::to_owned));
        line.extend(
            ["ferry", "migrate", "--remote-ferry", "/srv/shared/bin/faulty"].map(str::to_owned),
        );
        line.extend(self.kind.options(self.lab));
        line.extend(more.iter().map(|o| (*o).to_owned()));
        line.extend(["box".to_owned(), to.name.to_owned()]);
        Ok(line)
    }

    /// ssh carries no environment: over there a script stands before Ferry.
    fn arm(&self, faults: &str) -> Outcome {
        let script = format!("#!/bin/sh\nexport {faults} A=; exec ferry \"$@\"\n");
        write_script(&self.a.path("/srv/shared/bin/faulty")?, &script)
    }

    /// Whatever asks the other host later is to find a Ferry without faults there.
    pub fn disarm(&self) -> Outcome {
        self.arm("A=")
    }

    /// Starts it.
    pub fn begin(&self, to: &Host, here: &str, there: &str) -> Outcome<Running> {
        let line = self.line(to, here, there, &[])?;
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        self.other(to).start(&line)
    }

    /// A migration from `a` to `b` that is held where it comes by a point; the file that holds it. `both`
    /// goes into the environment of either Ferry.
    pub fn held_at(&self, (point, at): (&str, At), both: &str) -> Outcome<(Running, PathBuf)> {
        let fault = format!("{both} FERRY_FAULT={point}:hold");
        let on_source = matches!(at, At::Source | At::SourceAfter);
        let (here, there) = if on_source { (&*fault, both) } else { (both, &*fault) };
        let mut running = self.begin(&self.b, here, there)?;
        let host = if on_source { &self.a } else { &self.b };
        let file = host.path(&format!("/run/ferry-fault/{point}"))?;
        until(&format!("it comes by {point}"), PATIENT, || {
            Ok((file.exists() || running.has_ended()).then_some(()))
        })?;
        if !file.exists() {
            let ended = running.end(PATIENT)?;
            return Err(format!("it was over before it came by {point}: {ended}"));
        }
        Ok((running, file))
    }

    /// A migration in which nothing happens.
    pub fn migrate(&self, to: &Host) -> Outcome<Output> {
        self.begin(to, "A=", "A=")?.end(PATIENT)
    }

    /// It runs on `here`, whole, and nothing else is anywhere.
    pub fn rests_on(&mut self, here: &Host, limit: Duration) -> Outcome {
        let there = self.other(here);
        if self.kind == Kind::Forward && here.name == "b" {
            // The client stands for a third host that has nothing to do with it.
            let client = self.lab.host("client");
            return forward::abroad_within(limit, &self.container, &there, here, &client);
        }
        exactly_one_copy_within(limit, &self.container, here, &there)?;
        if self.kind == Kind::Floating {
            floating::moved(self.lab, here, &there)?;
        }
        Ok(())
    }

    /// Each of its clients has had an answer from now on.
    pub fn answers(&mut self) -> Outcome {
        self.probe.as_mut().ok_or("nobody watches")?.answers_again()
    }

    /// Nothing is lost, and every page is right.
    pub fn is_content(&mut self) -> Outcome {
        let probe = self.probe.as_mut().ok_or("nobody watches")?;
        if matches!(self.kind, Kind::Files | Kind::Overlay) {
            // It has gone over all of its files since.
            let began = Instant::now();
            until("it has come round its files", SHORT, || {
                Ok((began.elapsed() > Duration::from_millis(300)).then_some(()))
            })?;
        }
        probe.is_content()
    }

    /// It can still be migrated: from where it is to where it is not, in front of its client.
    pub fn goes_on(&mut self, here: &Host) -> Outcome {
        let there = self.other(here);
        let said = self.migrate(&there)?;
        ensure!(said.code == 0, "a second try: {said}");
        let after = |e: String| format!("after a second try: {e}\n{said}");
        self.rests_on(&there, SHORT).map_err(after)?;
        self.is_content().map_err(after)
    }
}
