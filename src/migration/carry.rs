//! The source's thread that carries memory: in rounds while the container runs, what is left in the
//! freeze, and what stayed here after the resume.
//!
//! ```text
//! rounds ──▶ Settled ──Frozen──▶ what is left ──Dumped──▶ what CRIU wrote to ──▶ MemoryDone
//!   ▲  │                                                                            │ post-copy
//!   └──┘ converge::next                                        Serve ──▶ the rest, wanted pages first
//! ```
//!
//! Every round ends with an echo from the destination: its time is then the link's and not that of
//! the buffers before it, and in the freeze nothing stands in them.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::protocol::Message;
use super::talk::Speaker;
use crate::memory::converge::{self, Goal, Next, Seen};
use crate::memory::pages::{self, Task};
use crate::memory::remainder::{ECHO_EVERY, Rest, Window};
use crate::memory::rounds::{RoundStats, Rounds, Sink, Tracking};
use crate::oci::cgroup::Cgroup;
use crate::report::progress::Round;
use crate::sys::memory::PAGE;
use crate::transport::codec::{Chooser, Codec, Wish};
use crate::transport::frame::{Run, Same};

/// How memory is to go.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// When to stop copying and freeze.
    pub goal: Goal,
    /// How it is found out what changed.
    pub tracking: Tracking,
    /// Compression.
    pub compress: Wish,
    /// Bytes a second on the link, at most.
    pub bandwidth: Option<u64>,
}

impl Default for Wishes {
    fn default() -> Wishes {
        Wishes {
            goal: Goal::default(),
            tracking: Tracking::WriteProtect,
            compress: Wish::Auto,
            bandwidth: None,
        }
    }
}

/// What the hand-over tells the memory thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The destination has read everything up to the echo of that number.
    Echoed(u64),
    /// The tasks stand still.
    Frozen,
    /// CRIU has dumped them.
    Dumped,
    /// The destination owns the container: what stayed here may follow.
    Serve,
    /// A task over there waits for these pages: task, address, how many.
    Want(i32, u64, usize),
}

/// What it tells the hand-over.
#[derive(Debug)]
pub enum MemoryEvent {
    /// Bytes of memory handed on so far, and on the link.
    Progress(u64, u64),
    /// A round is over.
    Round(Round),
    /// Freeze now; why.
    Settled(Next),
    /// Everything is over there but so many pages.
    Done(u64),
    /// Those have followed.
    AllSent,
    /// The link broke, or memory cannot be read.
    Failed(String),
}

/// The thread.
pub struct Memory {
    /// To say [`Order`]s.
    pub orders: Sender<Order>,
    _thread: JoinHandle<()>,
}

impl Memory {
    /// Starts with the first round.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        cgroup: &Cgroup,
        speaker: &Speaker,
        wishes: Wishes,
        tell: impl Fn(MemoryEvent) + Send + 'static,
    ) -> Result<Memory> {
        let cgroup = cgroup.clone();
        Memory::spawn(speaker, wishes, tell, move |carrier| carrier.carry(&cgroup))
    }

    /// Goes on with what a destination that runs says it lacks, over a new link. The tasks here are
    /// frozen.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn resume(
        cgroup: &Cgroup,
        speaker: &Speaker,
        wishes: Wishes,
        missing: Vec<(i32, u64, usize)>,
        tell: impl Fn(MemoryEvent) + Send + 'static,
    ) -> Result<Memory> {
        let tasks = pages::tasks(&cgroup.processes()?)?;
        let rest = Rest::new(&tasks, missing.into_iter())?;
        Memory::spawn(speaker, wishes, tell, move |carrier| carrier.serve(rest))
    }

    fn spawn(
        speaker: &Speaker,
        wishes: Wishes,
        tell: impl Fn(MemoryEvent) + Send + 'static,
        work: impl FnOnce(&mut Carrier) -> Result<()> + Send + 'static,
    ) -> Result<Memory> {
        let (orders, receive) = channel();
        let speaker = speaker.clone();
        let thread = std::thread::Builder::new().name("memory".into()).spawn(move || {
            let sender = PageSender::new(speaker, wishes, &tell);
            let mut carrier =
                Carrier { wishes, sender, orders: receive, echoes: 0, echoed: 0, tell: &tell };
            if let Err(e) = work(&mut carrier) {
                tell(MemoryEvent::Failed(format!("{e:#}")));
            }
        })?;
        Ok(Memory { orders, _thread: thread })
    }
}

struct Carrier<'a> {
    wishes: Wishes,
    sender: PageSender<'a>,
    orders: Receiver<Order>,
    /// Echoes asked for, and come back.
    echoes: u64,
    echoed: u64,
    tell: &'a dyn Fn(MemoryEvent),
}

/// The hand-over has ended: nobody waits for memory any more.
fn over() -> anyhow::Error {
    anyhow!("the hand-over has ended")
}

impl Carrier<'_> {
    fn carry(&mut self, cgroup: &Cgroup) -> Result<()> {
        let mut rounds = Rounds::new(self.wishes.tracking, random_seed());
        let mut seen = Vec::new();
        let decided = loop {
            match converge::next(&self.wishes.goal, &seen) {
                Next::Round => seen.push(self.round(&mut rounds, cgroup)?),
                decided => break decided,
            }
        };
        (self.tell)(MemoryEvent::Settled(decided));
        if self.next_order() != Some(Order::Frozen) {
            return Ok(());
        }
        let tasks = pages::tasks(&cgroup.processes()?)?;
        let mut rest = Vec::new();
        self.last_round(&mut rounds, &tasks, decided, &mut rest)?;
        if self.next_order() != Some(Order::Dumped) {
            return Ok(());
        }
        // CRIU itself writes to a few pages.
        self.last_round(&mut rounds, &tasks, decided, &mut rest)?;
        // Whoever was killed in the freeze is in CRIU's images, but his last pages were not read.
        if pages::tasks(&cgroup.processes()?)? != tasks {
            bail!("a task of the container was killed while it was frozen");
        }
        let mut rest = Rest::new(&tasks, rest.into_iter())?;
        let left = rest.pages;
        self.sender.speaker.say(&Message::MemoryDone { left })?;
        (self.tell)(MemoryEvent::Done(left));
        // To stop watching takes 24 ms a GiB: when the hand-over is over, not in it.
        while let Some(order) = self.next_order() {
            match order {
                Order::Serve if left > 0 => return self.serve(rest),
                // The restore itself looks at some.
                Order::Want(vpid, at, pages) => {
                    self.send_wanted(&mut rest, vpid, at, pages)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The next order but echoes; none when the hand-over has ended.
    fn next_order(&mut self) -> Option<Order> {
        loop {
            match self.orders.recv().ok()? {
                Order::Echoed(n) => self.echoed = self.echoed.max(n),
                order => return Some(order),
            }
        }
    }

    /// A round over the running container.
    fn round(&mut self, rounds: &mut Rounds, cgroup: &Cgroup) -> Result<Seen> {
        let began = Instant::now();
        let before = self.sender.wire;
        let mut sum = RoundStats::default();
        for task in pages::tasks(&cgroup.processes()?)? {
            sum.add(rounds.round(task, false, &mut self.sender)?);
        }
        self.ask_echo()?;
        while self.echoed < self.echoes {
            match self.orders.recv() {
                Ok(Order::Echoed(n)) => self.echoed = self.echoed.max(n),
                _ => return Err(over()),
            }
        }
        let (seconds, wire) = (began.elapsed().as_secs_f64(), self.sender.wire - before);
        let handed = sum.sent + sum.zero + sum.same;
        let mut left = Some(0);
        for task in pages::tasks(&cgroup.processes()?)? {
            left = left.zip(rounds.left(task)?).map(|(a, b)| a + b);
        }
        // Where the kernel cannot tell, what was left will be left again.
        let left = left.unwrap_or(handed);
        self.report(rounds, false, sum, (began, wire), Some(left));
        Ok(Seen { wire, seconds, pages: handed, left })
    }

    /// In the freeze: sends what is left, or notes that it will follow.
    fn last_round(
        &mut self,
        rounds: &mut Rounds,
        tasks: &[Task],
        decided: Next,
        rest: &mut Vec<(i32, u64, usize)>,
    ) -> Result<()> {
        let began = Instant::now();
        let before = self.sender.wire;
        let mut sum = RoundStats::default();
        for &task in tasks {
            if decided == Next::PostCopy {
                for (start, end) in rounds.leave(task, &mut self.sender)? {
                    rest.push((task.vpid, start, ((end - start) / PAGE as u64) as usize));
                }
            } else {
                sum.add(rounds.round(task, true, &mut self.sender)?);
            }
        }
        self.sender.speaker.flush()?;
        let wire = self.sender.wire - before;
        self.report(rounds, true, sum, (began, wire), None);
        Ok(())
    }

    fn report(
        &self,
        rounds: &Rounds,
        frozen: bool,
        pages: RoundStats,
        (began, wire): (Instant, u64),
        left: Option<u64>,
    ) {
        let tracking = rounds.tracking();
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        let bytes = pages.sent * PAGE as u64;
        let compression = self.sender.latest;
        (self.tell)(MemoryEvent::Round(Round {
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

    fn ask_echo(&mut self) -> Result<()> {
        self.echoes += 1;
        self.sender.speaker.say(&Message::Echo { number: self.echoes })
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
                Some(Order::Echoed(_)) => window.echoed(Instant::now()),
                Some(Order::Want(vpid, at, pages)) => {
                    since_echo += self.send_wanted(&mut rest, vpid, at, pages)?;
                }
                Some(_) => {}
                None => {
                    if let Some((vpid, page, pages)) = rest.first(PIECE) {
                        since_echo += self.send(&rest, vpid, page, pages)?;
                    }
                }
            }
            if since_echo >= ECHO_EVERY {
                window.sent(std::mem::take(&mut since_echo), Instant::now());
                self.ask_echo()?;
            }
        }
        self.sender.speaker.flush()?;
        (self.tell)(MemoryEvent::AllSent);
        // Its end closes the reader's descriptors; nobody waits for it.
        Ok(())
    }

    /// Sends pages that somebody waits for, at once; bytes on the link.
    fn send_wanted(&mut self, rest: &mut Rest, vpid: i32, at: u64, pages: usize) -> Result<u64> {
        let mut bytes = 0;
        for (page, pages) in rest.take(vpid, at / PAGE as u64, pages as u64) {
            bytes += self.send(rest, vpid, page, pages)?;
        }
        self.sender.speaker.flush()?;
        Ok(bytes)
    }

    /// Reads pages and sends them; bytes on the link.
    fn send(&mut self, rest: &Rest, vpid: i32, page: u64, pages: u64) -> Result<u64> {
        let before = self.sender.wire;
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
        Ok(self.sender.wire - before)
    }
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's own source of randomness, one key a process.
    std::hash::RandomState::new().build_hasher().finish()
}

/// Pages sent at a time in the background: what a wanted page may have to wait for.
const PIECE: u64 = 64;
/// Packs pages and puts them on the link, no faster than is wanted.
struct PageSender<'a> {
    speaker: Speaker,
    chooser: Chooser,
    bandwidth: Option<u64>,
    /// With a limit: when the bytes sent so far are paid for.
    paid: Instant,
    packed: Vec<u8>,
    /// Bytes of memory, and on the link.
    raw: u64,
    wire: u64,
    /// What the latest piece was packed with.
    latest: Codec,
    told: Instant,
    tell: &'a dyn Fn(MemoryEvent),
}

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// What a limit allows at once.
const BURST: Duration = Duration::from_millis(20);

impl<'a> PageSender<'a> {
    fn new(speaker: Speaker, wishes: Wishes, tell: &'a dyn Fn(MemoryEvent)) -> PageSender<'a> {
        let now = Instant::now();
        PageSender {
            speaker,
            chooser: Chooser::new(wishes.compress),
            bandwidth: wishes.bandwidth,
            paid: now,
            packed: Vec::new(),
            raw: 0,
            wire: 0,
            latest: Codec::None,
            told: now,
            tell,
        }
    }

    fn sent(&mut self, raw: usize, wire: usize) {
        self.raw += raw as u64;
        self.wire += wire as u64;
        let now = Instant::now();
        if now.duration_since(self.told) > TELL_EVERY {
            self.told = now;
            (self.tell)(MemoryEvent::Progress(self.raw, self.wire));
        }
        if let Some(rate) = self.bandwidth {
            self.paid = self.paid.max(now.checked_sub(BURST).unwrap_or(now));
            self.paid += Duration::from_secs_f64(wire as f64 / rate as f64);
            // A rate is kept by waiting.
            std::thread::sleep(self.paid.saturating_duration_since(now));
        }
    }
}

impl Sink for PageSender<'_> {
    fn pages(&mut self, vpid: i32, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let mut codec = self.chooser.choose();
        if codec != Codec::None {
            let began = Instant::now();
            codec.pack(bytes, &mut self.packed)?;
            self.chooser.packed(codec, bytes.len(), self.packed.len(), began.elapsed());
            if self.packed.len() >= bytes.len() {
                codec = Codec::None;
            }
        }
        self.latest = codec;
        let packed = (codec != Codec::None).then_some((codec, self.packed.as_slice()));
        let began = Instant::now();
        self.speaker.pages(vpid, vaddr, bytes, packed)?;
        let wire = packed.map_or(bytes.len(), |p| p.1.len());
        self.chooser.written(wire, began.elapsed());
        self.sent(bytes.len(), wire);
        Ok(())
    }

    fn zeros(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        self.speaker.run(Run::Zero, vpid, vaddr, pages)?;
        self.sent(pages * PAGE, RUN_BYTES);
        Ok(())
    }

    fn same(&mut self, vpid: i32, vaddr: u64, from: (i32, u64), pages: usize) -> Result<()> {
        self.speaker.same(Same { to: (vpid, vaddr), from, pages })?;
        self.sent(pages * PAGE, RUN_BYTES);
        Ok(())
    }

    fn remote(&mut self, vpid: i32, vaddr: u64, pages: usize) -> Result<()> {
        self.speaker.run(Run::Remote, vpid, vaddr, pages)?;
        self.sent(0, RUN_BYTES);
        Ok(())
    }
}

/// About what a frame without contents takes on the link.
const RUN_BYTES: usize = 40;
