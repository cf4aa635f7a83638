//! Standard streams: what was written is there, once, and what comes after the move goes on.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, Lab};
use crate::common::process::{Running, until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("streams::pipe", LIMIT, pipe),
        in_lab("streams::shared_log", LIMIT, |lab| log(lab, "/srv/shared/box.log")),
        in_lab("streams::own_log", LIMIT, |lab| log(lab, "/srv/local/box.log")),
        in_lab("streams::own_log_to_and_fro", LIMIT, own_log_to_and_fro),
        in_lab("streams::log_with_its_mode", LIMIT, log_with_its_mode),
        in_lab("streams::no_log_of_the_host", LIMIT, no_log_of_the_host),
        in_lab("streams::places_that_get_no_log", LIMIT, places_that_get_no_log),
        in_lab("streams::log_of_a_killed_receiver", LIMIT, log_of_a_killed_receiver),
        in_lab("streams::terminal", LIMIT, terminal),
        in_lab("streams::reader_that_went_away", LIMIT, reader_that_went_away),
    ]
}

/// The numbers of the `tick N` lines of a file.
fn ticks(host: &Host, path: &str) -> Outcome<Vec<u64>> {
    let text = host.exec(&["cat", path])?.out;
    // The last line may be in the middle of being written.
    let whole = text.rsplit_once('\n').map_or("", |t| t.0);
    whole
        .lines()
        .map(|l| {
            l.trim()
                .strip_prefix("tick ")
                .and_then(|n| n.parse().ok())
                .ok_or(format!("a strange line {l:?}"))
        })
        .collect()
}

/// Waits until a file has a line of at least this number; returns all numbers.
fn reaches(host: &Host, path: &str, number: u64) -> Outcome<Vec<u64>> {
    until(&format!("{path} on {} has tick {number}", host.name), SOON, || {
        let list = ticks(host, path)?;
        Ok(list.last().is_some_and(|n| *n >= number).then_some(list))
    })
}

fn without_gap(list: &[u64]) -> Outcome {
    for pair in list.windows(2) {
        ensure!(pair[1] == pair[0] + 1, "after line {} comes line {}", pair[0], pair[1]);
    }
    Ok(())
}

/// Output on a pipe goes on in a log of the destination; not a line is lost between the two.
fn pipe(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("stdio");
    container.make(&a)?;
    let _reader = a.start(&[
        "sh",
        "-c",
        "(ferry run -d --bundle /srv/shared/box box </dev/null 2>/dev/null) | cat >/tmp/out",
    ])?;
    reaches(&a, "/tmp/out", 20)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    let here = ticks(&a, "/tmp/out")?;
    let last = *here.last().ok_or("no line")?;
    let there = reaches(&b, "/var/log/ferry/box.log", last + 50)?;
    without_gap(&here)?;
    without_gap(&there)?;
    ensure!(there[0] == last + 1, "on a the last line is {last}, on b the first is {}", there[0]);
    exactly_one_copy(&container, &b, &a)
}

fn start_with_log(lab: &Lab, host: &Host, path: &str) -> Outcome<Container> {
    let container = Container::plain("stdio");
    container.make(host)?;
    container.make_network(lab, host)?;
    host.sh(&format!("ferry run -d --bundle /srv/shared/box box </dev/null >>{path} 2>&1"))?;
    reaches(host, path, 20)?;
    Ok(container)
}

/// A log outside the container is on the other host from its first line.
fn log(lab: &Lab, path: &str) -> Outcome {
    let (a, b) = pair(lab);
    let container = start_with_log(lab, &a, path)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    let before = *ticks(&b, path)?.last().ok_or("the log is empty")?;
    let list = reaches(&b, path, before + 50)?;
    ensure!(list[0] == 1, "the log begins with line {}", list[0]);
    without_gap(&list)?;
    exactly_one_copy(&container, &b, &a)
}

fn own_log_to_and_fro(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let path = "/srv/local/box.log";
    let container = start_with_log(lab, &a, path)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        let before = *ticks(to, path)?.last().ok_or("the log is empty")?;
        let list = reaches(to, path, before + 20)?;
        ensure!(list[0] == 1, "the log begins with line {}", list[0]);
        without_gap(&list)?;
    }
    exactly_one_copy(&container, &b, &a)
}

/// CRIU insists on the file's mode; and whoever could read the log before can do so afterwards.
fn log_with_its_mode(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let path = "/srv/local/box.log";
    for mode in ["600", "644", "664"] {
        a.sh(&format!("rm -f {path}; : >{path}; chmod {mode} {path}"))?;
        let container = start_with_log(lab, &a, path)?;
        a.ferry(&["migrate", "box", "b"])?.exits(0)?;
        let found = b.sh(&format!("stat -c %a {path}"))?;
        ensure!(found.trim() == mode, "the mode was {mode} and is {found}");
        exactly_one_copy(&container, &b, &a)?;
        b.sh(&format!("runc delete -f box; rm -f {path}*"))?;
        a.sh("ferry resolve --keep box")?;
    }
    Ok(())
}

/// A container writes to a file of its own that cannot be found in it under the name that it shows:
/// that name is no place on a host.
fn no_log_of_the_host(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    // A directory that both hosts have, and the container has made in its root.
    let listing = |host: &Host| host.sh("ls -A /usr/local/bin");
    let before = (listing(&a)?, listing(&b)?);
    let ticker = Container::plain("stdio").with(&["--arg", "--onto=/usr/local/bin/owned"]);
    let tricks = [("--odd-name", 0), ("--chroot=/jail", 3)];
    for (trick, code) in tricks {
        let container = ticker.clone().with(&["--arg", trick]);
        container.make(&a)?;

        // As engines give it.
        let able = r#"s/"CAP_KILL"/"CAP_KILL", "CAP_SYS_CHROOT"/g"#;
        a.exec(&["sed", "-i", able, "/srv/shared/box/config.json"])?.exits(0)?;
        container.run_on(&a)?;
        let wrote = "grep -qs tick /srv/shared/box/rootfs/usr/local/bin/owned*";
        until("it writes", SOON, || Ok((a.exec(&["sh", "-c", wrote])?.code == 0).then_some(())))?;

        let said = a.ferry(&["migrate", "box", "b"])?.exits(code)?;
        let here = if code == 0 { &b } else { &a };
        let refused = said.err.contains("neither in the container") && said.err.contains("hint: ");
        ensure!(code == 0 || refused, "nobody is told what to do: {said}");
        exactly_one_copy(&container, here, if code == 0 { &a } else { &b })?;
        let after = (listing(&a)?, listing(&b)?);
        ensure!(after == before, "after {trick} the hosts have {after:?}, and had {before:?}");
        here.sh("runc delete -f box")?;
        a.sh("ferry resolve --keep box || true; rm -rf /srv/shared/box")?;
    }

    Ok(())
}

/// Where a file is obeyed, or something else than a log stands, a log is not put.
fn places_that_get_no_log(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    b.sh("mkdir -p /etc/cron.d /srv/local/taken.log")?;
    for place in ["/etc/cron.d/box", "/srv/local/taken.log", "/srv/local/none/box.log"] {
        a.sh(&format!("mkdir -p $(dirname {place})"))?;
        let container = start_with_log(lab, &a, place)?;
        let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
        ensure!(said.err.contains(place) && said.err.contains("hint: "), "{said}");
        exactly_one_copy(&container, &a, &b)?;
        a.sh("runc delete -f box")?;
    }
    let left = b.sh("find /etc/cron.d /srv/local -name '*box*' -o -name '.ferry*'")?;
    ensure!(left.is_empty(), "on b there is now {left}");
    Ok(())
}

/// A receiver that is killed when it has put the log in its place: its guard puts it back.
fn log_of_a_killed_receiver(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let path = "/srv/local/box.log";
    b.sh(&format!("echo old >{path}"))?;
    let container = start_with_log(lab, &a, path)?;
    let script = "#!/bin/sh\nFERRY_FAULT=destination.restored:kill exec ferry \"$@\"\n";
    write_script(&a.path("/srv/shared/bin/faulty")?, script)?;
    a.ferry(&["migrate", "--remote-ferry", "/srv/shared/bin/faulty", "box", "b"])?.exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    let log = b.sh(&format!("cat {path}; ls -A /srv/local"))?;
    ensure!(log == "old\nbox.log\n", "on b there is {log}");
    Ok(())
}

/// Takes the terminal and keeps what comes out of it; writes a line into it.
const TAKE: &str = r#"
import array, os, socket, sys
path, out = sys.argv[1:3]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(path)
listener.listen(1)
peer, _ = listener.accept()
_, ancillary, _, _ = peer.recvmsg(4096, socket.CMSG_SPACE(4))
fds = array.array("i")
fds.frombytes(ancillary[0][2][:4])
os.write(fds[0], b"hello\n")
with open(out, "wb", buffering=0) as file:
    while True:
        try:
            text = os.read(fds[0], 4096)
        except OSError:
            break
        if not text:
            break
        file.write(text)
"#;

fn take_terminal(host: &Host, out: &str) -> Outcome<Running> {
    host.sh("rm -f /run/console.sock")?;
    let taker = host.start(&["python3", "-c", TAKE, "/run/console.sock", out])?;
    until("somebody waits for the terminal", SOON, || {
        Ok((host.exec(&["test", "-S", "/run/console.sock"])?.code == 0).then_some(()))
    })?;
    Ok(taker)
}

fn last_tick(host: &Host, path: &str) -> Outcome<u64> {
    let text = host.exec(&["cat", path])?.out;
    Ok(text.lines().filter_map(|l| l.trim().strip_prefix("tick ")?.parse().ok()).max().unwrap_or(0))
}

fn terminal(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("stdio").with(&["--terminal"]);
    container.make(&a)?;
    let _here = take_terminal(&a, "/tmp/out")?;
    a.sh("ferry run -d --console-socket /run/console.sock --bundle /srv/shared/box box")?;
    until("it writes on a", SOON, || Ok((last_tick(&a, "/tmp/out")? > 20).then_some(())))?;

    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("--console-socket"), "no hint: {said}");
    let said =
        a.ferry(&["migrate", "--console-socket", "/run/console.sock", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("nobody waits for the terminal"), "{said}");
    exactly_one_copy(&container, &a, &b)?;

    let _there = take_terminal(&b, "/tmp/out")?;
    a.ferry(&["migrate", "--console-socket", "/run/console.sock", "box", "b"])?.exits(0)?;
    let before = last_tick(&a, "/tmp/out")?;
    until("it writes on b", SOON, || Ok((last_tick(&b, "/tmp/out")? > before + 20).then_some(())))?;
    until("it reads on b", SOON, || {
        Ok(b.exec(&["cat", "/tmp/out"])?.out.contains("echo hello").then_some(()))
    })?;
    exactly_one_copy(&container, &b, &a)
}

/// Nobody reads what Ferry says any more: that is no reason to give up.
fn reader_that_went_away(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("stdio");
    container.start(lab, &a)?;
    a.sh("ferry migrate box b 2>&1 | head -n 1")?;
    exactly_one_copy(&container, &b, &a)?;
    b.sh("ferry migrate --json box a | true")?;
    exactly_one_copy(&container, &a, &b)
}
