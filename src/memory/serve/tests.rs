use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;
use std::sync::mpsc::channel;

use super::succession::is_shared;
use super::*;
use crate::memory::pending::PendingRun;

fn run(pages: u32, slot: PageSlot) -> PendingRun {
    PendingRun { pages, slot }
}

/// As CRIU introduces a task; what stands for its userfaultfd never has anything to say.
fn introduce(criu: &UnixStream, vpid: i32) {
    let uffd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
    (&*criu).write_all(&vpid.to_le_bytes()).unwrap();
    scm::send(criu, &[0], &[uffd.as_raw_fd()]).unwrap();
}

/// Whoever is told that somebody could go on is told once, however many tasks come after that.
#[test]
fn the_will_is_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::listen(dir.path()).unwrap();
    let will = Arc::new(Will::new().unwrap());
    let (made, times) = channel();
    let (tell, ended) = channel();
    let (ready, tell) = (move || made.send(()).unwrap(), move |e| tell.send(e).unwrap());
    let staging = Staging::new(1).unwrap();
    let pages = HashMap::new();
    let intake = server.start(staging, &pages, will.clone(), |_| (), ready, tell).unwrap();
    let criu = UnixStream::connect(dir.path().join(SOCKET)).unwrap();
    (1..=3).for_each(|vpid| introduce(&criu, vpid));
    (&criu).write_all(&FINISHED.to_le_bytes()).unwrap();
    let ended: Ended = ended.recv().unwrap();
    ended.result.unwrap();
    assert_eq!(times.iter().count(), 1);
    assert_eq!(will.read(WillWord::Done), 1);
    drop(intake);
}

/// A panic of the daemon's closes nothing that a task waits on, and is told where nobody can go on.
#[test]
fn a_daemon_that_panics_closes_nothing() {
    let (tell, ended) = channel();
    let will = Arc::new(Will::new().unwrap());
    let mut daemon = Daemon::new(Staging::new(1).unwrap(), will, |_| ()).unwrap();
    let uffd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
    daemon.targets.push(ServedTask::new(uffd.into(), 1, Pending::default()));
    let tell = move |e| tell.send(e).unwrap();
    let _intake = daemon.spawn(tell, |_| panic!("as it is to")).unwrap();
    let ended: Ended = ended.recv().unwrap();
    assert!(ended.result.unwrap_err().to_string().contains("as it is to"));
    assert_eq!(ended.held.len(), 1);
}

/// Whatever fails while somebody takes over, no descriptor is closed that a task waits on.
#[test]
fn who_cannot_go_on_closes_nothing() {
    let again = |number: RawFd| {
        let mut open = File::options();
        open.read(true).write(true).open(format!("/proc/self/fd/{number}")).unwrap()
    };
    let left = |snapshot: File| {
        let staging = Staging::new(1).unwrap();
        let (waited_on, end) = std::io::pipe().unwrap();
        let left = LeftServer {
            snapshot,
            staging: again(staging.number()),
            lazy: UnixStream::pair().unwrap().0,
            uffds: vec![end.into()],
        };
        (waited_on, left, staging.kept())
    };

    let is_open = |waited_on: std::io::PipeReader| {
        let mut set = [PollFd::new(waited_on.as_fd(), PollFlags::POLLIN)];
        poll(&mut set, PollTimeout::ZERO) == Ok(0)
    };
    let dir = tempfile::tempdir().unwrap();
    let will = Arc::new(Will::new().unwrap());

    // A will that cannot be read; then one that can, of tasks that cannot be woken.
    let spoilt = File::create_new(dir.path().join("spoilt")).unwrap();
    let (waited_on, one, kept) = left(spoilt);
    let stranded = succeed(will.clone(), one, |_| (), |_| ()).unwrap_err();
    assert!(is_open(waited_on), "{stranded:?}");
    let all = Snapshot { staging: kept, tasks: Vec::new() };
    let path = dir.path().join("whole");
    std::fs::write(&path, postcard::to_stdvec(&all).unwrap()).unwrap();

    let (waited_on, one, _) = left(File::open(path).unwrap());
    let stranded = succeed(will, one, |_| (), |_| ()).unwrap_err();
    assert!(is_open(waited_on), "{stranded:?}");
}

/// Staged pages go as they are installed, unless two tasks want them.
#[test]
fn only_a_fork_makes_two_want_the_same() {
    let task = |uffd: RawFd, runs: &[(u64, PendingRun)]| Missing {
        uffd,
        vpid: 1,
        moved: false,
        runs: runs.to_vec(),
    };
    let own = task(5, &[(0x1000, run(4, PageSlot::At(0))), (0x9000, run(2, PageSlot::Zero))]);
    let other = task(6, &[(0x1000, run(4, PageSlot::At(4))), (0x9000, run(2, PageSlot::Zero))]);
    let child = task(7, &[(0x3000, run(1, PageSlot::At(2)))]);
    assert!(!is_shared(&[]));
    assert!(!is_shared(&[own, other]));
    let own = task(5, &[(0x1000, run(4, PageSlot::At(0)))]);
    assert!(is_shared(&[own, child]));
}
