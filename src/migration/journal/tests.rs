use super::*;
use crate::fuzz::Target;
use crate::sys::process::{self, ProcessId, start_time};

pub(crate) fn record(migration: &str) -> Record {
    let (version, boot) = stamp();
    Record {
        version,
        boot,
        placing: Placing::default(),
        logs: Logs::default(),
        forward: None,
        remove: Vec::new(),
        unmount: None,
        migration: migration.into(),
        container: "web".parse().unwrap(),
        role: Role::Source,
        peer: "host2".into(),
        destination: Some(Destination::Unix("/run/x".into())),
        runtime: "/usr/sbin/runc".into(),
        root: None,
        systemd_cgroup: false,
        cgroup: None,
        init: None,
        network_path: None,
        network_identity: None,
        engine: None,
        network_ours: false,
        leave_mark: true,
        work: WorkPath::of("x"),
        worker: ProcessId::this(),
        begun: 1,
    }
}

#[test]
fn states_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    assert_eq!(journal.state(), State::Begun);
    journal.write(State::Committed).unwrap();
    let again = Journal::find(dir.path(), "00112233aabbccdd").unwrap().unwrap();
    assert_eq!(again.state(), State::Committed);
    assert_eq!(&*again.record.container, "web");
    assert_eq!(fs::metadata(again.path()).unwrap().len(), SIZE as u64);
    assert!(Journal::find(dir.path(), "ffffffffffffffff").unwrap().is_none());
    let (all, unreadable) = Journal::all(dir.path()).unwrap();
    assert_eq!((all.len(), unreadable.len()), (1, 0));
    assert!(Journal::create(dir.path(), record("00112233aabbccdd")).is_err());
    // Cut short before anything had begun.
    fs::write(dir.path().join("migrations/0011223344556677.journal"), "{").unwrap();
    assert!(Journal::find(dir.path(), "0011223344556677").unwrap().is_none());
}

/// Whoever has to write the same once more, as the disk has not taken it, needs no more room for it.
#[test]
fn the_last_state_is_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    journal.write(State::Committed).unwrap();
    for _ in 0..2 * STATES / SLOT {
        journal.write(State::Returning).unwrap();
    }
    journal.note_told().unwrap();
    let mut again = Journal::open(journal.path()).unwrap();
    again.write(State::Returning).unwrap();
    again.write(State::Aborted).unwrap();
    let again = Journal::open(journal.path()).unwrap();
    let states: Vec<_> = again.states().iter().map(|(state, _)| *state).collect();
    assert_eq!(states, [State::Begun, State::Committed, State::Returning, State::Aborted]);
    assert!(again.is_told());
}

/// Cut at every byte of the line, as a crash in the middle of the write would: it is there in
/// full, or not at all.
#[test]
fn a_commit_cut_by_a_crash_is_no_commit() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    let before = journal.at;
    journal.write(State::Committed).unwrap();
    let whole = fs::read(journal.path()).unwrap();
    let line = (journal.at - before) as usize;
    for cut in 0..=line {
        let mut bytes = whole.clone();
        bytes[before as usize + cut..].fill(b' ');
        fs::write(journal.path(), &bytes).unwrap();
        let state = Journal::open(journal.path()).unwrap().state();
        assert_eq!(state == State::Committed, cut == line, "cut at {cut}");
    }
}

/// What a disk leaves of a line when the power goes is no line; the next one takes its place.
#[test]
fn a_torn_line_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    let at = journal.at as usize;
    assert_eq!(at % SLOT, 0);
    journal.write(State::Committed).unwrap();
    assert_eq!(at / SECTOR as usize, (journal.at as usize - 1) / SECTOR as usize);

    let whole = fs::read(journal.path()).unwrap();
    // Only its end has come to the disk, or something else.
    for from in 1..SLOT {
        for filling in [b' ', 0, 0xff] {
            let mut bytes = whole.clone();
            bytes[at..at + from].fill(filling);
            fs::write(journal.path(), &bytes).unwrap();
            let mut torn = Journal::open(journal.path()).unwrap();
            assert_eq!(torn.state(), State::Begun, "from {from}");
            torn.write(State::Aborted).unwrap();
            assert_eq!(Journal::open(journal.path()).unwrap().state(), State::Aborted);
        }
    }

    // Before a line that is whole there can be no torn one.
    journal.write(State::Finished).unwrap();
    let mut bytes = fs::read(journal.path()).unwrap();
    bytes[at] = b'x';
    fs::write(journal.path(), &bytes).unwrap();
    assert!(Journal::open(journal.path()).is_err());
}

/// Of whom it is known that it is about another container, it is not in the way.
#[test]
fn a_journal_that_cannot_be_read_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let root = Path::new(DEFAULT_ROOT);
    let path = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap().path;
    let text = fs::read_to_string(&path).unwrap();
    let refused = |container: &str| {
        let lock =
            Lock::take(dir.path(), root, container, "to b").map(drop).map_err(|e| e.to_string());
        assert_eq!(lock.is_err(), Journal::of(dir.path(), root, container).is_err());
        lock.err()
    };

    let later = text.replacen("\"version\":1", "\"version\":2", 1);
    let renamed = text.replacen("\"worker\"", "\"workers\"", 1);
    for changed in [later, renamed] {
        assert_ne!(changed, text);
        fs::write(&path, &changed).unwrap();
        let why = refused("web").unwrap();
        assert!(why.contains("cannot be read"), "{why}");
        assert!(why.contains("00112233aabbccdd"), "{why}");
        assert_eq!(refused("web2"), None);
    }

    fs::write(&path, "{\n").unwrap();
    assert!(refused("web2").unwrap().contains("cannot be read"));

    // A crash in the middle of making it: nothing had begun.
    for none in ["", "{\"version\":1,\"boot\":"] {
        fs::write(&path, none).unwrap();
        assert_eq!(refused("web"), None);
    }

    // The same from before there was a version.
    let before = text.replacen("\"version\":1,", "", 1);
    fs::write(&path, before).unwrap();
    assert_eq!(Journal::open(&path).unwrap().record.version, 0);
}

#[test]
fn processes_are_told_apart() {
    let me = ProcessId::this();
    assert!(me.is_alive());
    assert!(!ProcessId { started: me.started + 1, ..me }.is_alive());
    assert_eq!(ProcessId::read(&format!("{me}\n")), Some(me));
    // As journals of earlier versions have it.
    assert_eq!(serde_json::to_string(&ProcessId { pid: 5, started: 7 }).unwrap(), "[5,7]");
    // Nobody has waited for it yet.
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id() as i32;
    let it = ProcessId::of(pid).unwrap();
    let pidfd = process::pidfd_open(pid).unwrap();
    process::wait_readable(&[std::os::fd::AsFd::as_fd(&pidfd)], None).unwrap();
    assert_eq!(start_time(pid), Some(it.started));
    assert!(!it.is_alive());
    child.wait().unwrap();
}

#[test]
fn nobody_outlives_a_reboot() {
    let mut record = record("00112233aabbccdd");
    record.init = Some(record.worker);
    assert!(record.same_boot() && record.worker_lives() && record.init_lives());
    record.boot = "00000000-0000-0000-0000-000000000000".into();
    assert!(!record.same_boot() && !record.worker_lives() && !record.init_lives());
}

/// Or the next state would be written behind it and never be found.
#[test]
fn what_is_no_blank_between_record_and_states_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    let mut bytes = fs::read(journal.path()).unwrap();
    let end = bytes.iter().position(|b| *b == b'\n').unwrap();
    bytes[end + 1] = b'x';
    fs::write(journal.path(), &bytes).unwrap();
    assert!(Journal::open(journal.path()).is_err());
}

/// Or a state that was hidden by it would count for the last, after the next one.
#[test]
fn what_is_torn_is_no_longer_than_a_slot() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    journal.note(State::Ready).unwrap();
    let end = journal.at as usize - 1;
    journal.note(State::Committed).unwrap();
    let mut bytes = fs::read(journal.path()).unwrap();
    assert_eq!(bytes[end], b'\n');
    bytes[end] = 0xff;
    fs::write(journal.path(), &bytes).unwrap();
    assert!(Journal::open(journal.path()).is_err());
}

/// What a bad disk makes of a journal is told, and never a state that was not reached.
#[test]
fn fuzz_journals() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
    journal.note(State::Ready).unwrap();
    journal.note(State::Committed).unwrap();
    let (path, at) = (journal.path().to_owned(), journal.at as usize);
    let mut sample = fs::read(&path).unwrap();
    sample.truncate(at + SLOT);

    let target = Target::new("journals").sample(sample);
    let words = [&b"committed 1\n"[..], b"aborted 1\n", b"whole", b"finished", b"\"version\":"];
    target.words(&words).cost(8).room(2 * SIZE).run(|bytes| {
        fs::write(&path, bytes)?;
        let opened = Journal::open(&path);
        if let Err(e) = &opened {
            let _ = Unreadable::of(path.clone(), e).map(|u| u.error());
        }

        let mut journal = opened?;
        let before = journal.states().to_vec();
        journal.note(State::Aborted)?;
        let again = Journal::open(&path)?;
        assert_eq!(again.states()[..before.len()], before);
        assert_eq!(again.state(), State::Aborted);
        Ok(())
    });
}
