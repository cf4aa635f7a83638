//! On the source: which connections there are, and how they come out of the frozen tasks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{OFlag, openat};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;

use super::{
    Coming, MOST, MOST_HOLES, Piece, SPARE, STREAM, Taken, TakenOut, Vault, Watched, share,
};
use crate::criu::images;
use crate::memory::pages;
use crate::migration::held::while_held;
use crate::migration::talk::Speaker;
use crate::migration::watched;
use crate::network::sockets::{Established, Lookout};
use crate::oci::cgroup::Cgroup;
use crate::sys::connection::{self, Connection, Options, Plain};
use crate::sys::mirror::{self, FIRST, Mirror};
use crate::sys::netns::NetNs;
use crate::sys::{door, fault, process, scm};

/// In the migration's directory: what was taken out of the tasks.
pub const FILE: &str = "connections.taken";
/// Fewer that have come since the first look are left to CRIU.
const FEW: usize = 32;
/// Descriptors that a process of Ferry needs for all else.
const OWN: RawFd = 512;
/// Most connections that go in one piece.
const SOME: usize = 256;
/// Most watched descriptors that go in one piece.
const SOME_WATCHED: usize = 16 << 10;

/// Lets this process have as many descriptors as it may; from which number on it gets none.
///
/// # Errors
/// When the kernel does not say how many that is.
pub fn raise_limit() -> Result<RawFd> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = 2 * MOST as u64;
    // More than the limit of the limit is for CAP_SYS_RESOURCE. setrlimit(2)
    if most >= wanted || setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        return Ok(RawFd::try_from(most).unwrap_or(RawFd::MAX));
    }
    Ok(wanted as RawFd)
}

/// How many connections a process can hold that gets no descriptors from `limit` on.
pub fn room(limit: RawFd) -> usize {
    usize::try_from(limit - OWN).unwrap_or(0).min(MOST)
}

/// A connection that was seen while the container ran.
#[derive(Clone, Copy, Debug)]
struct Known {
    number: RawFd,
    cookie: u64,
    inode: u32,
    /// Of IPv6, also where its peer is not.
    v6: bool,
    /// Its number among those that were announced.
    index: u32,
}

/// Those that are to be taken out when the container is frozen.
#[derive(Debug)]
pub struct Lifting {
    /// By process; their numbers rising.
    known: BTreeMap<i32, Vec<Known>>,
    cookies: HashSet<u64>,
    announced: usize,
    vault: Arc<Vault>,
    work: PathBuf,
    /// Of a fresh socket of IPv4, and of IPv6, as far as there are.
    fresh: [Option<Options>; 2],
    /// See [`raise_limit`].
    limit: RawFd,
    stop: Arc<AtomicBool>,
}

impl Lifting {
    /// None are known yet. `namespace` is the container's, if not ours; `work` the migration's
    /// directory.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(namespace: Option<&NetNs>, vault: Arc<Vault>, work: &Path) -> Result<Lifting> {
        let look = || [false, true].map(|v6| connection::fresh_options(v6).ok());
        let fresh = match namespace {
            Some(namespace) => namespace.run(look)?,
            None => look(),
        };
        let limit = raise_limit()?;
        let (known, cookies, work) = (BTreeMap::new(), HashSet::new(), work.to_owned());
        let stop = Arc::new(AtomicBool::new(false));
        Ok(Lifting { known, cookies, announced: 0, vault, work, fresh, limit, stop })
    }

    /// Those that were not known yet, in the order in which they are to be announced.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn look(&mut self, lookout: &mut Lookout, pids: &[i32]) -> Result<Vec<Coming>> {
        let mut established = lookout.established()?;
        established.retain(|one| !self.cookies.contains(&one.cookie));
        if self.announced > 0 && established.len() < FEW {
            // The search for their descriptors takes longer than CRIU for so many.
            return Ok(Vec::new());
        }
        let all: HashMap<u32, &Established> = established.iter().map(|e| (e.inode, e)).collect();
        let mut places: HashMap<u32, Option<(i32, RawFd)>> = HashMap::new();
        let mut open = BTreeMap::new();
        for &pid in pids {
            // Whoever has ended meanwhile has nothing open.
            let Ok(numbers) = door::numbers(pid) else { continue };
            for &number in &numbers {
                if let Some(inode) = socket(pid, number).filter(|inode| all.contains_key(inode)) {
                    // One that has several is CRIU's.
                    places.entry(inode).and_modify(|p| *p = None).or_insert(Some((pid, number)));
                }
            }
            open.insert(pid, numbers);
        }
        let mut own: BTreeMap<i32, Vec<(RawFd, u32)>> = BTreeMap::new();
        for (inode, place) in &places {
            if let Some((pid, number)) = place {
                own.entry(*pid).or_default().push((*number, *inode));
            }
        }
        let mut coming = Vec::new();
        let most = room(self.limit);
        for task in of_first_space(pids)? {
            let Some(mut list) = own.remove(&task.pid).filter(|_| native(task.pid)) else {
                continue;
            };
            list.sort_unstable();
            // A mirror must have its numbers, too.
            let limit = process::file_limit(task.pid)?.min(self.limit as u64);
            let numbers = open.get(&task.pid).map_or(&[][..], Vec::as_slice);
            let until = reach(numbers, &list, limit);
            // What had one of these numbers has been closed.
            let fresh: HashSet<RawFd> = list.iter().map(|(number, _)| *number).collect();
            let earlier = self.known.entry(task.pid).or_default();
            earlier.retain(|known| !fresh.contains(&known.number));
            for (number, inode) in list.into_iter().take_while(|(number, _)| *number < until) {
                let Established { ends, cookie, owner, .. } = *all[&inode];
                let full = self.announced + coming.len() >= most;
                if full || number < FIRST || !self.cookies.insert(cookie) {
                    continue;
                }
                let index = (self.announced + coming.len()) as u32;
                let v6 = ends.local.is_ipv6();
                self.known.entry(task.pid).or_default().push(Known {
                    number,
                    cookie,
                    inode,
                    v6,
                    index,
                });
                let (local, remote) = (ends.local, ends.remote);
                coming.push(Coming { vpid: task.vpid, number, owner, local, remote });
            }
        }
        self.announced += coming.len();
        Ok(coming)
    }

    /// Leaves to CRIU what the destination cannot take.
    pub fn leave(&mut self, lacking: &[u32]) {
        let lacking: HashSet<u32> = lacking.iter().copied().collect();
        self.known.values_mut().for_each(|list| list.retain(|k| !lacking.contains(&k.index)));
    }

    /// Takes out of the tasks, which are frozen and behind a closed fence, what can be; it goes to the
    /// destination from now on.
    ///
    /// # Errors
    /// When it fails half-way: it is to be [put back](super::put_back()) then.
    pub fn lift(mut self, cgroup: &Cgroup, speaker: &Speaker) -> Result<Lifted> {
        let began = Instant::now();
        let (give, batches) = channel();
        let mut tasks = Vec::new();
        for (pid, mut known) in std::mem::take(&mut self.known) {
            known.sort_unstable_by_key(|known| known.number);
            // Whoever has ended has no connections.
            tasks.extend(Task::start(pid, known, &self, give.clone())?);
        }
        drop(give);
        // Beside the mirrors' work.
        let mut others = Others::default();
        for pid in cgroup.processes()? {
            let task = tasks.iter().find(|task| task.pid == pid);
            let known = task.iter().flat_map(|task| task.known.iter().map(|known| known.number));
            let known: HashSet<RawFd> = known.collect();
            for number in door::numbers(pid)?.into_iter().filter(|n| !known.contains(n)) {
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
        tasks.retain(|task| !task.chosen.is_empty());
        let taken = Taken(tasks.iter().map(Task::taken).collect());
        let fresh = self.work.join("connections.new");
        fs::write(&fresh, postcard::to_stdvec(&taken)?)?;
        fs::rename(fresh, self.work.join(FILE))?;
        fault::point("lift.noted")?;
        for task in &tasks {
            task.order(Order::Take(task.chosen.clone(), task.epolls.clone()));
        }
        for task in &tasks {
            let done = task.done.recv().map_err(|_| anyhow!("the thread has died"))?;
            done.with_context(|| format!("taking connections out of process {}", task.pid))?;
        }
        fault::point("lift.kept")?;
        let chosen = began.elapsed();
        let numbers = |task: &Task| task.chosen.iter().map(|at| task.known[*at].number).collect();
        let out: Vec<(i32, Vec<RawFd>)> =
            tasks.iter().map(|task| (task.pid, numbers(task))).collect();
        while_held(cgroup, |held| {
            for (pid, numbers) in &out {
                let threads = held.get_mut(pid).and_then(|threads| threads.first_mut());
                let thread = threads.ok_or_else(|| anyhow!("process {pid} is gone"))?;
                door::close(thread, *pid, numbers)?;
            }
            Ok(())
        })
        .context("taking connections out of the tasks")?;
        fault::point("lift.taken")?;
        let count = tasks.iter().map(|task| task.chosen.len()).sum();
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
        tasks.iter().for_each(|task| task.order(Order::Go));
        let mirrors = tasks.iter_mut().filter_map(|task| Some((task.pid, task.mirror.take()?)));
        let mirrors = mirrors.collect();
        let (stop, _vault) = (self.stop, self.vault);
        let mut lifted = Lifted { mirrors, sender: None, reserved, stop, _vault };
        let speaker = speaker.clone();
        let send = move || send(&speaker, &tasks, &batches, count);
        lifted.sender = Some(thread::Builder::new().name("connections".into()).spawn(send)?);
        Ok(lifted)
    }
}

/// Connections that are out of the tasks, and on their way to the destination. Dropped, whoever still takes them down comes to an end.
#[derive(Debug)]
pub struct Lifted {
    mirrors: Vec<(i32, MirrorHandle)>,
    sender: Option<thread::JoinHandle<Result<usize>>>,
    /// Processes, as the container numbers them: a descriptor of each, and those that were taken out.
    reserved: Vec<(i32, RawFd, Vec<RawFd>)>,
    stop: Arc<AtomicBool>,
    _vault: Arc<Vault>,
}

type MirrorHandle = mirror::JoinHandle<std::io::Result<()>>;

impl Lifted {
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

    /// How many they are, when the last has been sent.
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

impl Drop for Lifted {
    fn drop(&mut self) {
        // Nobody may be at them who thinks that they are taken out. Whoever sends may wait for a link
        // that is dead; he has nothing but copies.
        self.stop.store(true, Ordering::SeqCst);
        for (_, mirror) in self.mirrors.drain(..) {
            let _ = mirror.join();
        }
    }
}

/// What the thread with a process's descriptors is told.
enum Order {
    /// Keep those, by their place among the known ones, and have them watched no more.
    Take(Vec<usize>, Vec<(RawFd, Vec<Watched>)>),
    /// They are out of the tasks: take them down.
    Go,
}

/// Some that were taken down, by their place among the known ones.
type Batch = (i32, Vec<(usize, Connection)>);

/// A process with connections.
struct Task {
    pid: i32,
    vpid: i32,
    known: Vec<Known>,
    /// Of each whether execve(2) closes it.
    cloexec: Vec<Option<bool>>,
    /// Of each whether it can be taken out.
    seen: Vec<Option<Plain>>,
    /// See [`Others`].
    like: Option<RawFd>,
    chosen: Vec<usize>,
    epolls: Vec<(RawFd, Vec<Watched>)>,
    orders: Option<Sender<Order>>,
    heard: Receiver<Vec<Option<Plain>>>,
    done: Receiver<std::io::Result<()>>,
    mirror: Option<MirrorHandle>,
}

impl Drop for Task {
    fn drop(&mut self) {
        // Given up: nothing more is done when this returns.
        self.orders = None;
        let _ = self.mirror.take().map(mirror::JoinHandle::join);
    }
}

impl Task {
    fn start(
        pid: i32,
        known: Vec<Known>,
        lifting: &Lifting,
        give: Sender<Batch>,
    ) -> Result<Option<Task>> {
        let task = pages::tasks(&[pid])?.first().copied();
        let (Some(task), Some(last)) = (task, known.last()) else { return Ok(None) };
        let entrance = lifting.vault.entrance.as_ref();
        let entrance = entrance.ok_or_else(|| anyhow!("nothing can be kept"))?;
        let (orders, ordered) = channel();
        let (tell, heard) = channel();
        let (tell_done, done) = channel();
        let (list, fresh, stop) = (known.clone(), lifting.fresh.clone(), lifting.stop.clone());
        // Nothing in here may have to do with a descriptor of ours: see there.
        let work = move |mirror: &Mirror| {
            let seen: Vec<_> = list.iter().map(|known| grab(mirror, *known)).collect();
            let _ = tell.send(seen.clone());
            let Ok(Order::Take(chosen, epolls)) = ordered.recv() else { return Ok(()) };
            let numbers: Vec<RawFd> = chosen.iter().map(|at| list[*at].number).collect();
            let kept = keep(mirror, &numbers, &epolls);
            let _ = tell_done.send(kept);
            let Ok(Order::Go) = ordered.recv() else { return Ok(()) };
            let chosen: Vec<(usize, Known, Plain)> =
                chosen.iter().filter_map(|at| Some((*at, list[*at], seen[*at]?))).collect();
            take_down_all(mirror, &chosen, &fresh, |some| {
                give.send((pid, some)).is_ok() && !stop.load(Ordering::SeqCst)
            })
        };
        let mirror = Mirror::spawn(pid, last.number + 1, entrance.as_fd(), work)?;
        let (cloexec, seen, chosen, epolls) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (pid, vpid) = (task.pid, task.vpid);
        let (orders, mirror) = (Some(orders), Some(mirror));
        let all = Task {
            pid,
            vpid,
            known,
            cloexec,
            seen,
            like: None,
            chosen,
            epolls,
            orders,
            heard,
            done,
            mirror,
        };
        Ok(Some(all))
    }

    fn order(&self, order: Order) {
        // Whoever has died does not answer, either.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }

    fn taken(&self) -> TakenOut {
        let place = |at: &usize| {
            let reuse = self.seen[*at].is_some_and(|plain| plain.reuse);
            (self.known[*at].number, self.cloexec[*at] == Some(true), reuse)
        };
        TakenOut {
            pid: self.pid,
            started: process::start_time(self.pid),
            places: self.chosen.iter().map(place).collect(),
            epolls: self.epolls.clone(),
        }
    }
}

/// Duplicates a descriptor; what it is, if it is the same as ever and can be taken out.
fn grab(mirror: &Mirror, known: Known) -> Option<Plain> {
    mirror.take(known.number).ok()?;
    let socket = mirror.get(known.number);
    let same = connection::cookie(socket).is_ok_and(|cookie| cookie == known.cookie);
    if same { connection::plain(socket).ok()? } else { None }
}

/// Puts descriptors into the vault, and ends that they are watched.
fn keep(
    mirror: &Mirror,
    numbers: &[RawFd],
    epolls: &[(RawFd, Vec<Watched>)],
) -> std::io::Result<()> {
    for some in numbers.chunks(scm::MOST_FDS) {
        let some: Vec<RawFd> = some.iter().map(|number| mirror.get(*number).as_raw_fd()).collect();
        scm::send_now(mirror.kept(), &[0], &some)?;
    }
    for (epoll, list) in epolls {
        let epoll = mirror.epoll(*epoll)?;
        for watched in list {
            mirror.unwatch(epoll, watched.number)?;
        }
    }
    Ok(())
}

/// On several threads: they share the table.
fn take_down_all(
    mirror: &Mirror,
    chosen: &[(usize, Known, Plain)],
    fresh: &[Option<Options>; 2],
    give: impl Fn(Vec<(usize, Connection)>) -> bool + Clone + Send,
) -> std::io::Result<()> {
    let one = |(at, known, plain): &(usize, Known, Plain)| {
        (*at, mirror.get(known.number), fresh[usize::from(known.v6)].as_ref(), *plain)
    };
    let sockets: Vec<_> = chosen.iter().map(one).collect();
    let each = share(sockets.len());
    thread::scope(|scope| {
        let mut all = Vec::new();
        for part in sockets.chunks(each) {
            let give = give.clone();
            all.push(scope.spawn(move || -> std::io::Result<()> {
                for some in part.chunks(SOME) {
                    let mut batch = Vec::with_capacity(some.len());
                    for &(at, socket, fresh, plain) in some {
                        let fresh = fresh.ok_or(std::io::ErrorKind::Unsupported)?;
                        batch.push((at, connection::take_down(socket, plain, fresh)?));
                    }
                    if !give(batch) {
                        break;
                    }
                }
                Ok(())
            }));
        }
        all.into_iter().try_for_each(|part| part.join().unwrap_or_else(|_| Err(panicked())))
    })
}

fn panicked() -> std::io::Error {
    std::io::Error::other("the thread has died")
}

/// Sends all that were chosen; returns how many.
fn send(
    speaker: &Speaker,
    tasks: &[Task],
    batches: &Receiver<Batch>,
    count: usize,
) -> Result<usize> {
    let mut at = 0;
    let mut say = |piece: &Piece| -> Result<()> {
        let bytes = postcard::to_stdvec(piece)?;
        speaker.file(STREAM, at, &bytes)?;
        at += bytes.len() as u64;
        speaker.flush()
    };
    for task in tasks {
        for (epoll, list) in &task.epolls {
            for some in list.chunks(SOME_WATCHED) {
                say(&Piece::Watched { vpid: task.vpid, epoll: *epoll, list: some.to_vec() })?;
            }
        }
    }
    let of: HashMap<i32, &Task> = tasks.iter().map(|task| (task.pid, task)).collect();
    let mut sent = 0;
    for (pid, batch) in batches {
        let task = of[&pid];
        sent += batch.len();
        let index = |at: usize| (task.known[at].index, task.cloexec[at] == Some(true));
        let list = batch.into_iter().map(|(at, was)| (index(at).0, index(at).1, was));
        say(&Piece::Connections(list.collect()))?;
    }
    if sent != count {
        bail!("{sent} of {count} were taken down");
    }
    Ok(sent)
}

/// Descriptors of the container's processes that stay where they are.
#[derive(Debug, Default)]
struct Others {
    /// Process and number; what it watches.
    epolls: Vec<(i32, RawFd, Vec<watched::Target>)>,
    /// Inodes.
    sockets: HashSet<u64>,
    /// By process: one that CRIU restores, of which another one can stand anywhere for a while: of no
    /// file, whose locks would end with it. An epoll, where there is one.
    like: HashMap<i32, RawFd>,
}

impl Others {
    fn look(&mut self, pid: i32, number: RawFd) -> Result<()> {
        let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
        self.sockets.extend(watched::socket(&target));
        if watched::is_epoll(&target) {
            self.epolls.push((pid, number, watched::targets(pid, number)?));
            self.like.insert(pid, number);
        } else if !target.is_absolute() {
            self.like.entry(pid).or_insert(number);
        }
        Ok(())
    }
}

/// Which of those that can be taken out are: all but those that somebody has under another number, or
/// another process has, or an epoll watches so.
fn choose(tasks: &mut [Task], others: Others) {
    let mut by_inode = HashMap::new();
    for (at, task) in tasks.iter_mut().enumerate() {
        task.like = others.like.get(&task.pid).copied();
        for (n, known) in task.known.iter().enumerate() {
            let inode = u64::from(known.inode);
            let only = !others.sockets.contains(&inode) && task.like.is_some();
            if only && task.seen[n].is_some() && task.cloexec[n].is_some() {
                by_inode.insert(inode, (at, n));
            }
        }
    }
    for (pid, _, list) in &others.epolls {
        for target in list {
            if let Some(&(at, n)) = by_inode.get(&target.inode)
                && (tasks[at].pid != *pid || tasks[at].known[n].number != target.number)
            {
                by_inode.remove(&target.inode);
            }
        }
    }
    for (pid, epoll, list) in others.epolls {
        let list: Vec<Watched> = list
            .into_iter()
            .filter(|target| by_inode.contains_key(&target.inode))
            .map(|t| Watched { number: t.number, events: t.events, data: t.data })
            .collect();
        if let Some(task) = tasks.iter_mut().find(|task| task.pid == pid && !list.is_empty()) {
            task.epolls.push((epoll, list));
        }
    }
    for (at, n) in by_inode.into_values() {
        tasks[at].chosen.push(n);
    }
    tasks.iter_mut().for_each(|task| task.chosen.sort_unstable());
}

/// Of each whether execve(2) closes it, as far as there is one. proc_pid_fdinfo(5)
fn closed_by_exec(pid: i32, known: &[Known]) -> Vec<Option<bool>> {
    // Thousands of them, in the freeze: with as few calls and as short paths as can be.
    let Ok(directory) = File::open(format!("/proc/{pid}/fdinfo")) else {
        return vec![None; known.len()];
    };
    let mut bytes = [0; 256];
    let mut flags = |known: &Known| {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let name = known.number.to_string();
        let file = openat(&directory, name.as_str(), flags, Mode::empty()).ok()?;
        let length = File::from(file).read(&mut bytes).ok()?;
        let text = std::str::from_utf8(&bytes[..length]).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = libc::c_int::from_str_radix(line.trim(), 8).ok()?;
        Some(flags & libc::O_CLOEXEC != 0)
    };
    known.iter().map(&mut flags).collect()
}

/// Whether a process is of the same kind as we, so that it can make calls for us.
fn native(pid: i32) -> bool {
    // EI_CLASS of its program, and of ours. elf(5)
    let class = |program: String| {
        let mut head = [0; 5];
        File::open(program)?.read_exact(&mut head)?;
        std::io::Result::Ok(head[4])
    };
    class(format!("/proc/{pid}/exe"))
        .is_ok_and(|its| class("/proc/self/exe".into()).is_ok_and(|own| own == its))
}

/// The inode of a socket.
fn socket(pid: i32, number: RawFd) -> Option<u32> {
    let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
    watched::socket(&target)?.try_into().ok()
}

/// The tasks in the process ID namespace of the container's first one: what the others number, it is not
/// that by which CRIU knows them.
pub(super) fn of_first_space(pids: &[i32]) -> Result<Vec<pages::Task>> {
    let tasks = pages::tasks(pids)?;
    let space = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let first = tasks.iter().find(|task| task.vpid == 1).or(tasks.first());
    let Some(first) = first.and_then(|task| space(task.pid)) else { return Ok(Vec::new()) };
    Ok(tasks.into_iter().filter(|task| space(task.pid).as_ref() == Some(&first)).collect())
}

/// Up to below which number descriptors of a process can be taken out: not where many numbers below are
/// free, or few above.
fn reach(open: &[RawFd], list: &[(RawFd, u32)], limit: u64) -> RawFd {
    let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
    if open.len() + SPARE > limit as usize {
        return 0;
    }
    let mut until = limit.saturating_sub(SPARE as RawFd);
    // Somewhere above the last of them there must be a free one.
    let above = open.iter().filter(|number| **number >= until).count();
    if above as i64 + SPARE as i64 > i64::from(limit) - i64::from(until) {
        return 0;
    }
    for (taken, (number, _)) in list.iter().enumerate() {
        let below = open.partition_point(|n| n < number);
        let holes = *number as usize - below;
        if holes > MOST_HOLES + taken {
            until = until.min(*number);
            break;
        }
    }
    until
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_are_reached_that_can_come_back() {
        let list = |numbers: &[RawFd]| numbers.iter().map(|n| (*n, 0)).collect::<Vec<_>>();
        let open: Vec<RawFd> = (0..100).collect();
        let all = list(&open[5..]);
        assert_eq!(reach(&open, &all, 1024), 1024 - 16);
        // There is no room to come back.
        assert_eq!(reach(&open, &all, 100), 0);
        // What is far up stays.
        let open: Vec<RawFd> = (0..10).chain([50_000, 50_001]).collect();
        assert_eq!(reach(&open, &list(&[8, 9, 50_000]), 1 << 20), 50_000);
        // With the limit lowered since they were opened.
        let open: Vec<RawFd> = (0..10).chain(500..600).collect();
        assert_eq!(reach(&open, &list(&open), 520), 0);
    }
}
