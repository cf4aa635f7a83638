//! The source's thread that carries memory: in rounds while the container runs, what is left in the
//! freeze, and what stayed here after the resume.
//!
//! ```text
//! rounds ──▶ Settled ──Frozen──▶ what is left ──Dumped──▶ what CRIU wrote to ──▶ MemoryDone ──Verify──▶ digests
//!   ▲  │                                                                            │ post-copy
//!   └──┘ converge::next                                        Serve ──▶ the rest, wanted pages first
//! ```
//!
//! Every round ends with an echo from the destination: its time is then the link's and not that of
//! the buffers before it, and in the freeze nothing stands in them.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::channels::{Channel, ChannelSender, PagePacker};
use crate::memory::converge::{self, Goal, NextRound, SeenRound};
use crate::memory::digest::{self, Digester, Mask, random_seed};
use crate::memory::direct;
use crate::memory::pages::{self, Task};
use crate::memory::remainder::{ECHO_EVERY, Rest, Window};
use crate::memory::rounds::{self, FoundPages, MemoryRoundStats, Rounds, Sink, Tracking};
use crate::memory::shared::{Segments, SharedMemory};
use crate::migration::protocol::Message;
use crate::migration::protocol::session::PeerWriter;
use crate::oci::cgroup::Cgroup;
use crate::report::progress::Round;
use crate::sys::inject;
use crate::sys::memory::PAGE;
use crate::sys::panics::caught;
use crate::sys::stopped::await_outside;
use crate::tasks::sleepers;
use crate::transport::codec::CompressOption;
use crate::transport::frame::PageRun;
use crate::transport::frame::{RunKind, Same};
use crate::transport::pace::Pace;

/// How memory is to go.
#[derive(Clone, Debug)]
pub struct MemoryOptions {
    /// When to stop copying and freeze.
    pub goal: Goal,
    /// How it is found out what changed.
    pub tracking: Tracking,
    /// Compression.
    pub compress: CompressOption,
    /// How fast all that goes over the links may go together.
    pub pace: Pace,
    /// Links to use.
    pub streams: usize,
}

impl Default for MemoryOptions {
    fn default() -> MemoryOptions {
        MemoryOptions {
            goal: Goal::default(),
            tracking: Tracking::WriteProtect,
            compress: CompressOption::Auto,
            pace: Pace::default(),
            streams: 1,
        }
    }
}

/// What the hand-over tells the memory thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryOrder {
    /// The destination has read everything up to the echo of that number on that link; 0 is the
    /// first.
    Echoed(usize, u64),
    /// It took a while until the tasks can be frozen: one more round.
    Again,
    /// The tasks stand still.
    Frozen,
    /// CRIU has dumped them.
    Dumped,
    /// Everything is over there: tell digests of it, with this seed, and without those places.
    Verify(u64, Vec<Mask>),
    /// The destination owns the container: what stayed here may follow.
    Serve,
    /// A task over there waits for these pages: task, address, how many.
    Want(PageRun),
}

/// What it tells the hand-over.
#[derive(Debug)]
pub enum MemoryEvent {
    /// Bytes of memory handed on so far, and on the link.
    Progress(u64, u64),
    /// A round is over.
    Round(Round),
    /// Freeze now; why.
    Converged(NextRound),
    /// Everything is over there but so many pages.
    Done(u64),
    /// Those have followed.
    AllSent,
    /// The link broke, or memory cannot be read.
    Failed(String),
}

/// The thread.
pub struct MemoryTransfer {
    /// To say [`MemoryOrder`]s.
    pub orders: Sender<MemoryOrder>,
    _thread: JoinHandle<()>,
}

impl MemoryTransfer {
    /// Starts with the first round. Of anonymous shared memory, too, if somebody (`shared`) keeps it from CRIU.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        cgroup: &Cgroup,
        peer: &PeerWriter,
        channels: &[Channel],
        wishes: MemoryOptions,
        shared: Option<SharedMemory>,
        tell: impl Fn(MemoryEvent) + Send + Sync + 'static,
    ) -> Result<MemoryTransfer> {
        let cgroup = cgroup.clone();
        let sender = PageSender::new(peer.clone(), &wishes, channels, Arc::new(tell))?;
        let segments = shared.map(|shared| Segments::new(shared, random_seed()));
        MemoryTransfer::spawn(sender, wishes, move |carrier| carrier.carry(&cgroup, segments))
    }

    /// Goes on with what a destination that runs says it lacks, over a new link. The tasks here are
    /// frozen.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn resume(
        cgroup: &Cgroup,
        peer: &PeerWriter,
        wishes: MemoryOptions,
        missing: Vec<PageRun>,
        tell: impl Fn(MemoryEvent) + Send + Sync + 'static,
    ) -> Result<MemoryTransfer> {
        let tasks = pages::tasks(&cgroup.processes()?)?;
        let rest = Rest::new(&tasks, missing.into_iter())?;
        let sender = PageSender::new(peer.clone(), &wishes, &[], Arc::new(tell))?;
        MemoryTransfer::spawn(sender, wishes, move |carrier| carrier.serve(rest))
    }

    fn spawn(
        sender: PageSender,
        wishes: MemoryOptions,
        work: impl FnOnce(&mut MemorySender) -> Result<()> + Send + 'static,
    ) -> Result<MemoryTransfer> {
        let (tell_orders, orders) = channel();
        let thread = std::thread::Builder::new().name("memory".into()).spawn(move || {
            let tell = sender.tell.clone();
            let (early, echoed) = (VecDeque::new(), vec![0; sender.channels.len() + 1]);
            let mut carrier = MemorySender { wishes, sender, orders, early, echoes: 0, echoed };
            if let Err(e) = caught(|| work(&mut carrier)) {
                tell(MemoryEvent::Failed(format!("{e:#}")));
            }
        })?;
        Ok(MemoryTransfer { orders: tell_orders, _thread: thread })
    }
}

type TellMemory = Arc<dyn Fn(MemoryEvent) + Send + Sync>;

struct MemorySender {
    wishes: MemoryOptions,
    sender: PageSender,
    orders: Receiver<MemoryOrder>,
    /// GuardCommands that came while an echo was waited for.
    early: VecDeque<MemoryOrder>,
    /// Echoes asked for, and come back, link by link.
    echoes: u64,
    echoed: Vec<u64>,
}

/// Returns which pages of the running container must be looked at.
fn find(rounds: &mut Rounds, cgroup: &Cgroup) -> Result<Vec<(Task, FoundPages)>> {
    struct Still<'a>(&'a Cgroup);
    impl Drop for Still<'_> {
        fn drop(&mut self) {
            // Whoever undoes the migration thaws it, too.
            let _ = self.0.thaw();
        }
    }

    let stop = || -> Result<Still> {
        let still = Still(cgroup);
        cgroup.freeze(STILL)?;
        Ok(still)
    };

    let still = rounds.wants_them_still().then(stop).transpose()?;
    let processes = cgroup.processes()?;
    let mut found = Vec::new();
    for task in pages::tasks(&processes)? {
        found.push((task, rounds.find(task, false)?));
    }

    if still.is_none() && rounds.is_watching() && direct::may_be_read_into(&processes) {
        // Reads that the look has seen begin end before their pages are read. Where somebody traces
        // a task, that is for the freezer.
        match leave_kernel(&processes) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => drop(stop()?),
            other => other.context("a read past the page cache does not end")?,
        }
    }

    Ok(found)
}

/// Waits until no thread is in the system call any more that it is in now. Each waits for itself:
/// those that compute are not held up by one that waits for a disk, as the freezer would have them.
fn leave_kernel(processes: &[i32]) -> io::Result<()> {
    let list = processes.iter().flat_map(|pid| inject::threads(*pid).unwrap_or_default());
    let threads: Vec<i32> = list.filter(|tid| !sleepers::waits_for_child(*tid)).collect();
    let until = Instant::now() + STILL;
    // On a thread that ends: see there.
    std::thread::scope(|scope| {
        let work = scope.spawn(|| await_outside(&threads, until));
        work.join().unwrap_or_else(|_| Err(io::Error::other("the thread has died")))
    })
}

/// The hand-over has ended: nobody waits for memory any more.
fn over() -> anyhow::Error {
    anyhow!("the hand-over has ended")
}

impl MemorySender {
    fn carry(&mut self, cgroup: &Cgroup, mut segments: Option<Segments>) -> Result<()> {
        let mut rounds = Rounds::new(rounds::best(self.wishes.tracking), random_seed());
        let mut seen = Vec::new();
        let decided = loop {
            match converge::next(&self.wishes.goal, &seen) {
                NextRound::Round => seen.push(self.round(&mut rounds, &mut segments, cgroup)?),
                decided => break decided,
            }
        };

        loop {
            (self.sender.tell)(MemoryEvent::Converged(decided));
            match self.next_order() {
                Some(MemoryOrder::Again) => drop(self.round(&mut rounds, &mut segments, cgroup)?),
                Some(MemoryOrder::Frozen) => break,
                _ => return Ok(()),
            }
        }

        let tasks = pages::tasks(&cgroup.processes()?)?;
        let mut rest = Vec::new();
        self.last_round(&mut rounds, segments.as_mut(), &tasks, decided, &mut rest)?;
        if self.next_order() != Some(MemoryOrder::Dumped) {
            return Ok(());
        }

        // CRIU itself writes to a few pages, of which none is shared.
        self.last_round(&mut rounds, None, &tasks, decided, &mut rest)?;

        // Whoever was killed in the freeze is in CRIU's images, but his last pages were not read.
        if pages::tasks(&cgroup.processes()?)? != tasks {
            bail!("a task of the container was killed while it was frozen");
        }
        let mut rest = Rest::new(&tasks, rest.into_iter())?;
        let left = rest.pages;
        self.sender.main.peer.send(&Message::MemoryDone { left })?;
        (self.sender.tell)(MemoryEvent::Done(left));

        // To stop watching takes 24 ms a GiB: when the hand-over is over, not in it.
        while let Some(order) = self.next_order() {
            match order {
                MemoryOrder::Serve if left > 0 => return self.serve(rest),
                // The restore itself looks at some.
                MemoryOrder::Want(run) => {
                    self.send_wanted(&mut rest, run)?;
                }
                MemoryOrder::Verify(seed, masks) => self.tell_digests(&tasks, seed, &masks)?,
                _ => {}
            }
        }

        Ok(())
    }

    /// Tells the destination what all pages are, for it to compare.
    fn tell_digests(&mut self, tasks: &[Task], seed: u64, masks: &[Mask]) -> Result<()> {
        let digester = Digester::new(seed, masks)?;
        let (peer, mut piece) = (self.sender.main.peer.clone(), 0);
        let wire = self.sender.wire();
        digest::tell(tasks, &digester, &mut |records| {
            let bytes = postcard::to_allocvec(records)?;
            peer.file(digest::STREAM, piece, &bytes)?;
            piece += 1;
            // As long as it goes on, nobody gives it up.
            (self.sender.tell)(MemoryEvent::Progress(self.sender.raw, wire));
            Ok(())
        })?;
        peer.flush()
    }

    /// The next order but echoes; none when the hand-over has ended.
    fn next_order(&mut self) -> Option<MemoryOrder> {
        if let Some(order) = self.early.pop_front() {
            return Some(order);
        }
        loop {
            match self.orders.recv().ok()? {
                MemoryOrder::Echoed(link, n) => self.note_echo(link, n),
                order => return Some(order),
            }
        }
    }

    fn note_echo(&mut self, link: usize, number: u64) {
        if let Some(echoed) = self.echoed.get_mut(link) {
            *echoed = number.max(*echoed);
        }
    }

    /// Waits until everything that was sent on the further links has arrived; on the first one, too,
    /// if that is wanted.
    fn arrive(&mut self, main: bool) -> Result<()> {
        self.echoes += 1;
        let mut asked = Vec::new();
        if main {
            self.sender.main.peer.send(&Message::Echo { number: self.echoes })?;
            asked.push(0);
        }
        for (i, channel) in self.sender.channels.iter_mut().enumerate().filter(|(_, l)| l.used) {
            channel.echo(self.echoes)?;
            asked.push(i + 1);
        }
        while asked.iter().any(|link| self.echoed[*link] < self.echoes) {
            match self.orders.recv() {
                Ok(MemoryOrder::Echoed(link, n)) => self.note_echo(link, n),
                Ok(order) => self.early.push_back(order),
                Err(_) => return Err(over()),
            }
        }
        Ok(())
    }

    /// A round over the running container.
    fn round(
        &mut self,
        rounds: &mut Rounds,
        segments: &mut Option<Segments>,
        cgroup: &Cgroup,
    ) -> Result<SeenRound> {
        let began = Instant::now();
        let before = self.sender.wire();
        let mut sum = MemoryRoundStats::default();
        rounds.arrived(self.sender.channels.is_empty());
        for (task, found) in find(rounds, cgroup)? {
            sum.add(rounds.hand_on(task, found, false, &mut self.sender)?);
        }

        // Of shared memory the kernel cannot tell: what was left will be left again.
        let shared = match segments {
            Some(segments) => segments.round(&cgroup.processes()?, &mut self.sender)?,
            None => MemoryRoundStats::default(),
        };

        sum.add(shared);
        self.arrive(true)?;
        let (seconds, wire) = (began.elapsed().as_secs_f64(), self.sender.wire() - before);
        let handed = sum.sent + sum.zero + sum.same;
        let mut left = Some(shared.sent + shared.zero);
        for task in pages::tasks(&cgroup.processes()?)? {
            left = left.zip(rounds.left(task)?).map(|(a, b)| a + b);
        }

        // Where the kernel cannot tell, what was left will be left again.
        let left = left.unwrap_or(handed);
        self.report(rounds, false, sum, (began, wire), Some(left));

        Ok(SeenRound { wire, seconds, pages: handed, left })
    }

    /// In the freeze: sends what is left, or notes that it will follow.
    fn last_round(
        &mut self,
        rounds: &mut Rounds,
        segments: Option<&mut Segments>,
        tasks: &[Task],
        decided: NextRound,
        rest: &mut Vec<PageRun>,
    ) -> Result<()> {
        let began = Instant::now();
        let before = self.sender.wire();
        let mut sum = MemoryRoundStats::default();
        rounds.arrived(self.sender.channels.is_empty());
        if let Some(segments) = segments {
            let pids: Vec<i32> = tasks.iter().map(|task| task.pid).collect();
            sum.add(segments.last_round(&pids, &mut self.sender)?);
        }

        for &task in tasks {
            if decided == NextRound::PostCopy {
                for (start, end) in rounds.leave(task, &mut self.sender)? {
                    let pages = ((end - start) / PAGE as u64) as usize;
                    rest.push(PageRun { vpid: task.vpid, start, pages });
                }
            } else {
                sum.add(rounds.round(task, true, &mut self.sender)?);
            }
        }

        self.sender.main.peer.flush()?;
        self.arrive(false)?;
        let wire = self.sender.wire() - before;
        self.report(rounds, true, sum, (began, wire), None);

        Ok(())
    }

    fn report(
        &self,
        rounds: &Rounds,
        frozen: bool,
        pages: MemoryRoundStats,
        (began, wire): (Instant, u64),
        left: Option<u64>,
    ) {
        let tracking = rounds.tracking();
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        let bytes = pages.sent * PAGE as u64;
        let compression = self.sender.main.latest;
        (self.sender.tell)(MemoryEvent::Round(Round {
            frozen,
            tracking,
            pages,
            bytes,
            wire_bytes: wire,
            left,
            compression,
            ms,
        }));
    }

    /// Post-copy: all that is left, and first of all what a task over there waits for.
    fn serve(&mut self, mut rest: Rest) -> Result<()> {
        let mut window = Window::default();
        let mut since_echo = 0;
        while rest.pages > 0 {
            // Whoever waits comes first; where the link is full, nothing else is to be done.
            let order = if window.is_full() {
                Some(self.orders.recv().map_err(|_| over())?)
            } else {
                match self.orders.try_recv() {
                    Ok(order) => Some(order),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Err(over()),
                }
            };

            match order {
                // Number 0 is a sign of life that somebody else asked for.
                Some(MemoryOrder::Echoed(_, number)) if number > 0 => window.echoed(Instant::now()),
                Some(MemoryOrder::Want(run)) => {
                    window.wanted(Instant::now());
                    since_echo += self.send_wanted(&mut rest, run)?;
                }
                Some(_) => {}
                None => {
                    if let Some((vpid, page, pages)) = rest.first(window.piece(Instant::now())) {
                        since_echo += self.send(&rest, vpid, page, pages)?;
                    }
                }
            }

            if since_echo >= ECHO_EVERY {
                window.sent(std::mem::take(&mut since_echo), Instant::now());
                self.echoes += 1;
                self.sender.main.peer.send(&Message::Echo { number: self.echoes })?;
            }
        }

        self.sender.main.peer.flush()?;
        (self.sender.tell)(MemoryEvent::AllSent);

        // Its end closes the reader's descriptors; nobody waits for it.
        Ok(())
    }

    /// Sends pages that somebody waits for, at once; bytes on the link.
    fn send_wanted(&mut self, rest: &mut Rest, run: PageRun) -> Result<u64> {
        let mut bytes = 0;
        for (page, pages) in rest.take(run.vpid, run.start / PAGE as u64, run.pages as u64) {
            bytes += self.send(rest, run.vpid, page, pages)?;
        }
        self.sender.main.peer.flush()?;
        Ok(bytes)
    }

    /// Reads pages and sends them; bytes on the link.
    fn send(&mut self, rest: &Rest, vpid: i32, page: u64, pages: u64) -> Result<u64> {
        let before = self.sender.wire();
        let reader =
            rest.tasks.get(&vpid).ok_or_else(|| anyhow!("no task {vpid} is frozen here"))?;
        let at = page * PAGE as u64;
        let mut buffer = vec![0; pages as usize * PAGE];
        let mut missing = None;
        reader.read(&[(at, pages as usize)], &mut buffer, |i| missing = Some(i))?;
        if let Some(i) = missing {
            bail!("page {:#x} of task {vpid} cannot be read", at + (i * PAGE) as u64);
        }

        let mut from = 0;
        let zero = |i: usize| buffer[i * PAGE..][..PAGE].iter().all(|b| *b == 0);
        while from < pages as usize {
            let kind = zero(from);
            let to = (from..pages as usize).find(|i| zero(*i) != kind).unwrap_or(pages as usize);
            let start = at + (from * PAGE) as u64;
            if kind {
                self.sender.zeros(vpid, start, to - from)?;
            } else {
                self.sender.pages(vpid, start, &buffer[from * PAGE..to * PAGE])?;
            }
            from = to;
        }

        Ok(self.sender.wire() - before)
    }
}

/// Time that a container may take to stand still for a moment.
const STILL: Duration = Duration::from_secs(2);
/// Puts pages on the links.
struct PageSender {
    main: PagePacker,
    channels: Vec<ChannelSender>,
    /// Whose turn it is; 0 is the first link.
    turn: usize,
    /// Bytes of memory, and on the first link.
    raw: u64,
    main_wire: u64,
    told: Instant,
    tell: TellMemory,
}

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Pieces below this all go on the first link: what is little need not be waited for on others.
const LARGE: usize = 512 << 10;

impl PageSender {
    fn new(
        peer: PeerWriter,
        wishes: &MemoryOptions,
        channels: &[Channel],
        tell: TellMemory,
    ) -> Result<PageSender> {
        let senders = channels.iter().map(|channel| {
            let tell = tell.clone();
            let failed = move |e| tell(MemoryEvent::Failed(format!("{e:#}")));
            channel.carry(wishes.compress, wishes.pace.clone(), failed)
        });
        Ok(PageSender {
            channels: senders.collect::<Result<_>>()?,
            main: PagePacker::new(peer, wishes.compress, wishes.pace.clone()),
            turn: 0,
            raw: 0,
            main_wire: 0,
            told: Instant::now(),
            tell,
        })
    }

    /// Bytes of memory that went on the links.
    fn wire(&self) -> u64 {
        self.main_wire + self.channels.iter().map(ChannelSender::wire).sum::<u64>()
    }

    fn sent(&mut self, raw: usize, wire: u64) {
        self.raw += raw as u64;
        self.main_wire += wire;
        if self.told.elapsed() > TELL_EVERY {
            self.told = Instant::now();
            (self.tell)(MemoryEvent::Progress(self.raw, self.wire()));
        }
    }
}

impl Sink for PageSender {
    fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() >= LARGE {
            self.turn = (self.turn + 1) % (self.channels.len() + 1);
            if let Some(channel) = self.turn.checked_sub(1).map(|i| &mut self.channels[i]) {
                channel.pages(vpid, vaddr, bytes)?;
                self.sent(bytes.len(), 0);
                return Ok(());
            }
        }
        let wire = self.main.pages(vpid, vaddr, bytes)?;
        self.sent(bytes.len(), wire);
        Ok(())
    }

    fn zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        self.main.peer.run(RunKind::Zero, PageRun { vpid, start: vaddr, pages })?;
        self.sent(pages * PAGE, RUN_BYTES);
        Ok(())
    }

    fn same(&mut self, vpid: i32, vaddr: u64, from: (i32, u64), pages: usize) -> Result<()> {
        self.main.peer.same(Same { to: (vpid, vaddr), from, pages })?;
        self.sent(pages * PAGE, RUN_BYTES);
        Ok(())
    }

    fn remote(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        self.main.peer.run(RunKind::Remote, PageRun { vpid, start: vaddr, pages })?;
        self.sent(0, RUN_BYTES);
        Ok(())
    }
}

/// About what a frame without contents takes on the link.
const RUN_BYTES: u64 = 40;
