//! On the source: how connections come out of the frozen tasks, and to the destination.

use std::collections::{HashMap, HashSet};
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;
use std::{fs, thread};

use anyhow::{Context, Result, anyhow, bail};

use super::guard_commands::{GuardCommand, GuardCommands};
use super::look::Extraction;
use super::tasks::{
    ConnectedTask, ConnectionBatch, MirrorHandle, Others, RepairStep, choose, closed_by_exec,
};
use super::{ConnectionPiece, Taken, Vault};
use crate::criu::images;
use crate::oci::cgroup::Cgroup;
use crate::sys::{fault, fd_inject};
use crate::tasks::criu_rescue::TracerWatch;

/// In the migration's directory: what was taken out of the tasks.
pub const FILE: &str = "connections.taken";
/// Most watched descriptors that go in one piece.
const SOME_WATCHED: usize = 16 << 10;

impl Extraction {
    /// Takes out of the tasks, which are frozen and behind a closed fence, what can be; it goes to the
    /// destination from now on.
    ///
    /// # Errors
    /// When it fails half-way: it is to be [put back](crate::connections::put_back()) then.
    pub fn extract(
        mut self,
        cgroup: &Cgroup,
        write: impl Fn(u64, &[u8]) -> Result<()> + Send + 'static,
        (orders, watch): (&GuardCommands, &TracerWatch),
    ) -> Result<Extracted> {
        let began = Instant::now();
        let (give, batches) = channel();
        let mut tasks = Vec::new();
        for (pid, mut known) in std::mem::take(&mut self.known) {
            known.sort_unstable_by_key(|known| known.number);
            // Whoever has ended has no connections.
            tasks.extend(ConnectedTask::start(pid, known, &self, give.clone())?);
        }

        drop(give);
        // Beside the mirrors' work.
        let mut others = Others::default();
        for pid in cgroup.processes()? {
            let task = tasks.iter().find(|task| task.pid == pid);
            let known = task.iter().flat_map(|task| task.known.iter().map(|known| known.number));
            let known: HashSet<RawFd> = known.collect();
            for number in fd_inject::numbers(pid)?.into_iter().filter(|n| !known.contains(n)) {
                others.look(pid, number)?;
            }
        }

        for task in &mut tasks {
            task.cloexec = closed_by_exec(task.pid, &task.known);
        }
        for task in &mut tasks {
            task.seen = task.heard.recv().map_err(|_| anyhow!("the thread has died"))?;
            // It may be another one by now.
            for (known, _) in task.known.iter().zip(&task.seen).filter(|(_, seen)| seen.is_none()) {
                others.look(task.pid, known.number)?;
            }
        }

        let looked = began.elapsed();
        choose(&mut tasks, others);
        listeners_are_chosen(&tasks)?;
        tasks.retain(|task| !task.chosen.is_empty());
        let taken = Taken(tasks.iter().map(ConnectedTask::taken).collect());
        let fresh = self.work.join("connections.new");
        fs::write(&fresh, postcard::to_stdvec(&taken)?)?;
        fs::rename(fresh, self.work.join(FILE))?;
        fault::point("extract.noted")?;

        for task in &tasks {
            task.order(RepairStep::Take(task.chosen.clone(), task.epolls.clone()));
        }
        for task in &tasks {
            let done = task.done.recv().map_err(|_| anyhow!("the thread has died"))?;
            done.with_context(|| format!("taking connections out of process {}", task.pid))?;
        }

        fault::point("extract.kept")?;
        let chosen = began.elapsed();
        let done = orders.ask(GuardCommand::TakeOut, Some(watch));
        done.ok_or_else(|| anyhow!("the guard process was killed"))??;
        fault::point("extract.taken")?;
        let count = tasks.iter().map(|task| task.chosen.len()).sum();
        let listeners = tasks.iter().map(|task| task.listeners().count()).sum();
        tracing::debug!(
            "{count} connections of {} taken out: seen after {looked:?}, kept {chosen:?}, all {:?}",
            self.announced,
            began.elapsed(),
        );

        let reserved = tasks.iter().filter_map(|task| {
            let numbers = task.chosen.iter().map(|at| task.known[*at].number);
            Some((task.vpid, task.like?, numbers.collect()))
        });
        let reserved = reserved.collect();
        tasks.iter().for_each(|task| task.order(RepairStep::Go));

        let mirrors = tasks.iter_mut().filter_map(|task| Some((task.pid, task.mirror.take()?)));
        let mirrors = mirrors.collect();
        let (stop, _vault) = (self.stop, self.vault);
        let mut extracted = Extracted { mirrors, sender: None, listeners, reserved, stop, _vault };
        let send = move || send(&write, &tasks, &batches, count);
        extracted.sender = Some(thread::Builder::new().name("connections".into()).spawn(send)?);

        Ok(extracted)
    }
}

/// Connections that are out of the tasks, and on their way to the destination. Dropped, whoever still takes them down comes to an end.
#[derive(Debug)]
pub struct Extracted {
    mirrors: Vec<(i32, MirrorHandle)>,
    sender: Option<thread::JoinHandle<Result<usize>>>,
    /// How many of them are listening sockets.
    pub listeners: usize,
    /// Processes, as the container numbers them: a descriptor of each, and those that were taken out.
    reserved: Vec<(i32, RawFd, Vec<RawFd>)>,
    stop: Arc<AtomicBool>,
    _vault: Arc<Vault>,
}

impl Extracted {
    /// Reserves in CRIU's images, which are complete, the places of what was taken out: another
    /// descriptor of something else stands there. In a free one CRIU would put what it needs until the
    /// tasks run.
    ///
    /// # Errors
    /// When they are not what they should be.
    pub fn reserve(&self, images: &Path) -> Result<()> {
        for (vpid, like, numbers) in &self.reserved {
            let place = images.join(format!("ids-{vpid}.img"));
            let what = || format!("the image {}", place.display());
            let table = images::parse_table(&fs::read(&place).with_context(what)?)?;
            let place = images.join(format!("fdinfo-{table}.img"));
            let what = || format!("the image {}", place.display());
            let old = fs::read(&place).with_context(what)?;
            fs::write(&place, images::with_descriptors(&old, *like, numbers).with_context(what)?)?;
        }
        Ok(())
    }

    /// Returns how many they are, when the last has been sent.
    ///
    /// # Errors
    /// When one could not be taken down, or the link is gone.
    pub fn sent(&mut self) -> Result<usize> {
        let ends: Vec<_> =
            self.mirrors.drain(..).map(|(pid, mirror)| (pid, mirror.join())).collect();
        for (pid, end) in ends {
            end.with_context(|| format!("taking connections of process {pid} down"))?;
        }
        let sender = self.sender.take().ok_or_else(|| anyhow!("they have been sent already"))?;
        sender.join().map_err(|_| anyhow!("the thread has died"))?.context("sending connections")
    }
}

impl Drop for Extracted {
    fn drop(&mut self) {
        // Nobody may be at them who thinks that they are taken out. Whoever sends may wait for a link
        // that is dead; he has nothing but copies.
        self.stop.store(true, Ordering::SeqCst);
        for (_, mirror) in self.mirrors.drain(..) {
            let _ = mirror.join();
        }
    }
}

/// CRIU would fail with those that are not.
fn listeners_are_chosen(tasks: &[ConnectedTask]) -> Result<()> {
    for task in tasks {
        let listening = task.known.iter().enumerate().filter(|(_, known)| known.listens);
        for (at, known) in listening {
            if !task.chosen.contains(&at) {
                bail!(
                    "descriptor {} of process {}, which listens for Multipath TCP, has changed, or \
                     somebody waits there to be accepted: try again",
                    known.number,
                    task.vpid,
                );
            }
        }
    }
    Ok(())
}

/// Sends all that were chosen; returns how many.
fn send(
    write: &impl Fn(u64, &[u8]) -> Result<()>,
    tasks: &[ConnectedTask],
    batches: &Receiver<ConnectionBatch>,
    count: usize,
) -> Result<usize> {
    let mut at = 0;
    let mut say = |piece: &ConnectionPiece| -> Result<()> {
        let bytes = postcard::to_stdvec(piece)?;
        write(at, &bytes)?;
        at += bytes.len() as u64;
        Ok(())
    };

    for task in tasks {
        for (epoll, list) in &task.epolls {
            for some in list.chunks(SOME_WATCHED) {
                say(&ConnectionPiece::Watched {
                    vpid: task.vpid,
                    epoll: *epoll,
                    list: some.to_vec(),
                })?;
            }
        }
    }

    let mut sent = 0;
    for task in tasks {
        let list =
            task.listeners().map(|at| (task.known[at].index, task.cloexec[at] == Some(true)));
        let list: Vec<_> = list.collect();
        sent += list.len();
        if !list.is_empty() {
            say(&ConnectionPiece::Listeners(list))?;
        }
    }

    let of: HashMap<i32, &ConnectedTask> = tasks.iter().map(|task| (task.pid, task)).collect();
    for (pid, batch) in batches {
        let task = of[&pid];
        sent += batch.len();
        let index = |at: usize| (task.known[at].index, task.cloexec[at] == Some(true));
        let list = batch.into_iter().map(|(at, was)| (index(at).0, index(at).1, was));
        say(&ConnectionPiece::Connections(list.collect()))?;
    }

    if sent != count {
        bail!("{sent} of {count} were taken down");
    }

    Ok(sent)
}
