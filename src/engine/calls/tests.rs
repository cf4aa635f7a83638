use std::thread::JoinHandle;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn words(text: &str) -> Vec<OsString> {
    text.split(' ').map(OsString::from).collect()
}

#[test]
fn a_call_is_expected_once_and_for_a_while() {
    let top = tempfile::tempdir().unwrap();
    let (place, root) = (top.path().join("expected"), Path::new("/run/runc"));
    let expect = |limit| expect_in(&place, (EngineVerb::Restore, "ab12", root), top.path(), limit);
    let taken = |verb, ids: &str, root: &str| {
        taken_in(&place, verb, &words(ids), Path::new(root)).is_some()
    };

    assert!(!taken("restore", "ab12", "/run/runc"));
    let expected = expect(LIMIT).unwrap();
    assert!(!taken("create", "ab12", "/run/runc"));
    assert!(!taken("restore", "ab12", "/run/other"));
    assert!(!taken("restore", "ab13 ../ab12 /x", "/run/runc"));
    assert!(taken("restore", "x ab12", "/run/runc"));
    assert!(!taken("restore", "ab12", "/run/runc"), "twice");
    drop(expected);

    // Nobody waits any more; nobody has waited so long.
    drop(expect(LIMIT).unwrap());
    assert!(!taken("restore", "ab12", "/run/runc"));
    let _late = expect(Duration::ZERO).unwrap();
    let until = now() + 1;
    while now() <= until {
        std::thread::yield_now();
    }
    assert!(!taken("restore", "ab12", "/run/runc"));
}

/// Whoever is called, on a thread, and the call.
fn called(top: &Path) -> (JoinHandle<Result<()>>, EngineCall) {
    let (place, root) = (top.join("expected"), Path::new("/run/runc"));
    let expected = expect_in(&place, (EngineVerb::Restore, "ab12", root), top, LIMIT).unwrap();
    let pid_file = top.join("pid");
    let line = format!(
        "--log-format=json restore --bundle /b --pid-file {} --detach ab12",
        pid_file.display()
    );
    let taken = taken_in(&place, "restore", &words("ab12"), root).unwrap();
    let thread = std::thread::spawn(move || answer(&taken, &words(&line)));
    let never = process::pidfd_open(std::process::id() as i32).unwrap();
    let call = expected.call(never, Instant::now() + LIMIT).unwrap();
    assert_eq!(call.called.bundle, Path::new("/b"));
    (thread, call)
}

#[test]
fn the_runtime_is_started_below_the_one_who_was_called() {
    let top = tempfile::tempdir().unwrap();
    let (thread, mut call) = called(top.path());
    let mut command = Command::new("sh");
    let done = top.path().join("done");
    command.args(["-c", "echo $WHAT >$0"]).arg(&done).env("WHAT", "it ran");
    let pid = call.run(&command).unwrap();
    let ended = process::pidfd_open(pid).unwrap();
    process::wait_readable(&[ended.as_fd()], Some(Instant::now() + LIMIT)).unwrap();
    assert_eq!(fs::read_to_string(&done).unwrap(), "it ran\n");
    assert!(call.run(&Command::new("/no/such/runtime")).is_err());
    let own = std::process::id() as i32;
    call.restored(own, own).unwrap();
    call.end(None);
    thread.join().unwrap().unwrap();
    assert_eq!(fs::read_to_string(top.path().join("pid")).unwrap(), own.to_string());
}

#[test]
fn the_engine_hears_why_it_has_no_container() {
    let top = tempfile::tempdir().unwrap();
    let (thread, call) = called(top.path());
    call.end(Some("the link broke".into()));
    let why = thread.join().unwrap().unwrap_err();
    assert!(format!("{why:#}").contains("the link broke"), "{why:#}");
}

/// Whether CRIU lets it run is seen when CRIU has ended.
#[test]
fn without_ferry_the_container_itself_is_the_answer() {
    let child = || Command::new("sleep").arg("1000").spawn().unwrap();
    let end = |child: &mut Child| {
        let _ = (child.kill(), child.wait());
    };
    for lives in [true, false] {
        let top = tempfile::tempdir().unwrap();
        let (thread, mut call) = called(top.path());
        let (mut init, mut criu) = (child(), child());
        call.restored(init.id() as i32, criu.id() as i32).unwrap();

        // It writes this down when it has heard of them.
        while !top.path().join("pid").exists() {
            std::thread::yield_now();
        }
        drop(call);
        if !lives {
            end(&mut init);
        }

        end(&mut criu);
        assert_eq!(thread.join().unwrap().is_ok(), lives);
        end(&mut init);
    }

    let top = tempfile::tempdir().unwrap();
    let (thread, call) = called(top.path());
    drop(call);
    assert!(thread.join().unwrap().is_err());
}

/// The first call ends as soon as there is something to start; the second waits.
#[test]
fn what_is_created_is_held_until_it_is_started() {
    for word in [None, Some("the link broke")] {
        let top = tempfile::tempdir().unwrap();
        let (place, root) = (top.path().join("expected"), Path::new("/run/moby"));
        let expected =
            expect_in(&place, (EngineVerb::Create, "ab12", root), top.path(), LIMIT).unwrap();
        let pid_file = top.path().join("pid");
        let line = format!("create --bundle /b --pid-file {} ab12", pid_file.display());
        let taken = taken_in(&place, "create", &words("ab12"), root).unwrap();
        let engine = std::thread::spawn({
            let place = place.clone();
            move || {
                answer(&taken, &words(&line)).unwrap();
                assert!(pid_file.exists());
                let taken = taken_in(&place, "start", &words("ab12"), Path::new("/run/moby"));
                answer(&taken.unwrap(), &words("start ab12"))
            }
        });

        let own = std::process::id() as i32;
        let never = || process::pidfd_open(own).unwrap();
        let mut call = expected.call(never(), Instant::now() + LIMIT).unwrap();
        call.restored(own, own).unwrap();
        call.end(word.map(str::to_owned));
        let started = engine.join().unwrap();
        assert_eq!(started.err().map(|e| format!("{:#}", e.root_cause())), word.map(str::to_owned));
    }
}

#[test]
fn who_is_to_start_it_decides_by_what_lives_when_nobody_waits() {
    let (mut init, mut criu) = (
        Command::new("sleep").arg("1000").spawn().unwrap(),
        Command::new("sleep").arg("1000").spawn().unwrap(),
    );
    let mark = |child: &Child| ProcessId::of(child.id() as i32).unwrap();
    let expectation = |held| Expectation {
        root: "/run/moby".into(),
        verb: EngineVerb::Start,
        until: now() + 20,
        socket: "/no/such/socket".into(),
        held: Some(held),
    };

    let both = [mark(&init), mark(&criu)];
    let end = |child: &mut Child| {
        let _ = (child.kill(), child.wait());
    };
    end(&mut criu);
    answer(&expectation(both), &words("start ab12")).unwrap();

    // Another one with its number is not it.
    let [init_id, criu_id] = both;
    let another = ProcessId { started: init_id.started + 1, ..init_id };
    assert!(answer(&expectation([another, criu_id]), &words("start ab12")).is_err());
    end(&mut init);
    assert!(answer(&expectation(both), &words("start ab12")).is_err());
}

#[test]
fn a_description_is_no_checkpoint() {
    let top = tempfile::tempdir().unwrap();
    let (place, root) = (top.path().join("expected"), Path::new("/run/runc"));
    let _expected = expect_in(&place, (EngineVerb::Describe, "ab12", root), top.path(), LIMIT);
    let taken = taken_in(&place, "checkpoint", &words("ab12"), root).unwrap();
    let images = top.path().join("images");
    let line = format!("checkpoint --image-path={} ab12", images.display());
    answer(&taken, &words(&line)).unwrap();
    assert_eq!(fs::read(images.join("inventory.img")).unwrap(), b"");
}
