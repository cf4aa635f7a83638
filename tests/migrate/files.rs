//! Containers whose files only one host has.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::{Output, until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(120);
/// On each host's own disk.
const BUNDLE: &str = "/srv/local/box";

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("files::to_and_fro_while_they_change", LIMIT, to_and_fro_while_they_change),
        in_lab("files::everything_that_a_file_has", LIMIT, everything_that_a_file_has),
        in_lab("files::volumes", LIMIT, volumes),
        in_lab("files::single_files", LIMIT, single_files),
        in_lab("files::given_up", LIMIT, given_up),
        in_lab("files::what_was_there_is_kept", LIMIT, what_was_there_is_kept),
        in_lab("files::no_room", LIMIT, no_room),
        in_lab("files::locked_over_there", LIMIT, locked_over_there),
    ]
}

/// A server that changes files all the time, and checks them against its memory.
fn writer() -> Container {
    let options = ["--arg", "--files", "--arg", "/data", "--arg", "--files-size", "--arg", "16M"];
    Container::networked("counter").with(&options).at(BUNDLE)
}

/// All but what the server writes to.
fn listing(host: &Host, root: &str) -> Outcome<String> {
    host.exec(&["python3", "-c", include_str!("listing.py"), root, "data"])?.ok()
}

/// Names that begin like ours, and what was put out of the way.
fn leftovers(host: &Host) -> Outcome<String> {
    host.sh("find /srv/local \\( -name '.ferry*' -o -name '*.before' \\) -not -path '*/rootfs/*'")
}

/// What is told when the freeze has one round more.
const NAMES_GIVEN: &str = "names that CRIU gave";

/// Of everything that can be read in the container, but for names that CRIU gives for the restore.
fn contents(host: &Host) -> Outcome<String> {
    host.sh(&format!(
        "cd {BUNDLE}/rootfs && find . -type f ! -name 'link_remap*' ! -name '*.ghost' -print0 | sort -z |
             xargs -0 sha256sum"
    ))
}

/// Stops a command at a point of the source, does something, and lets it go on.
fn at(host: &Host, point: &str, line: &[&str], act: impl FnOnce() -> Outcome) -> Outcome<Output> {
    let fault = format!("FERRY_FAULT={point}:hold");
    let command: Vec<&str> = ["env", &fault, "ferry"].iter().chain(line).copied().collect();
    let running = host.start(&command)?;
    let file = host.path(&format!("/run/ferry-fault/{point}"))?;
    let held = until(point, LONG, || Ok(file.exists().then_some(())));
    let done = held.and_then(|()| act());
    let _ = std::fs::remove_file(&file);
    let ended = running.end(LONG)?;
    done.map_err(|e| format!("{e}\n{ended}"))?;
    Ok(ended)
}

/// It has gone over all of its files since.
fn has_checked(probe: &mut Probe) -> Outcome {
    let began = Instant::now();
    until("it has come round its files", SHORT, || {
        Ok((began.elapsed() > Duration::from_millis(500)).then_some(()))
    })?;
    probe.is_content()
}

fn to_and_fro_while_they_change(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = writer();
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    for (i, (from, to)) in [(&a, &b), (&b, &a), (&a, &b), (&b, &a)].into_iter().enumerate() {
        let last = i == 3;
        let files = if last { "remove" } else { "keep" };
        let line = ["migrate", "--source-files", files, "box", to.name];
        if i == 0 {
            // Restored over there, and frozen here: byte for byte the same.
            let said = at(from, "source.commit", &line, || {
                let (there, here) = (contents(to)?, contents(from)?);
                ensure!(here.lines().count() > 20, "little to compare: {here}");
                ensure!(here == there, "it is\n{here}\nand over there\n{there}");
                Ok(())
            })?;
            ensure!(said.exits(0)?.err.contains(NAMES_GIVEN), "files have lost no name");
        } else {
            from.ferry(&line)?.exits(0)?;
        }

        exactly_one_copy(&container, to, from)?;
        has_checked(&mut probe)?;
        for host in [from, to] {
            let left = leftovers(host)?;
            ensure!(left.is_empty(), "left on {}: {left}", host.name);
        }

        let kept = from.exec(&["test", "-e", "/srv/local/box/rootfs"])?.code == 0;
        ensure!(kept != last, "the source's files: kept {kept}");
        if kept {
            let root = format!("{BUNDLE}/rootfs");
            let (before, after) = (listing(from, &root)?, listing(to, &root)?);
            ensure!(before == after, "it was\n{before}\nand is\n{after}");
        }
    }

    Ok(())
}

fn everything_that_a_file_has(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = writer();
    container.make(&a)?;
    a.sh(
        "cd /srv/local/box/rootfs && mkdir -p odd/empty odd/deep/er && cd odd
         printf hello > plain && ln plain deep/second && ln plain third && chmod 4755 plain
         ln -s ../nowhere deep/link && mkfifo fifo && mknod null c 1 3 && mknod disk b 7 200
         truncate -s 20M sparse && printf end >> sparse && printf middle | dd of=sparse bs=1 seek=9000000 conv=notrunc 2>/dev/null
         head -c 3000000 /dev/urandom > big && chown 12:34 big && chmod 640 big
         printf x > \"$(printf 'n\\377\\n')\" && chmod 1777 deep/er
         touch -d '2001-02-03 04:05:06.123456789' third deep/link deep
         touch -h -d '2002-02-03 04:05:06.987654321' deep/link
         python3 - <<'END'
import os
os.setxattr('plain', 'user.note', b'n\\x00te')
os.setxattr('deep/link', 'trusted.note', b'of a link', follow_symlinks=False)
os.setxattr('big', 'system.posix_acl_access', bytes.fromhex('02000000 01000600ffffffff 02000400 0c000000 04000400ffffffff 10000400ffffffff 20000000ffffffff'.replace(' ', '')))
import socket
socket.socket(socket.AF_UNIX).bind('socket')
os.setxattr('big', 'security.capability', bytes.fromhex('0100000200040000000000000000000000000000'))
os.setxattr('deep', 'system.posix_acl_default', bytes.fromhex('02000000 01000700ffffffff 02000700 0c000000 04000500ffffffff 10000700ffffffff 20000500ffffffff'.replace(' ', '')))
END
         touch -d '2003-02-03 04:05:06.111111111' .",
    )?;

    container.make_network(lab, &a)?;
    container.run_on(&a)?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    let root = format!("{BUNDLE}/rootfs");
    let (before, after) = (listing(&a, &root)?, listing(&b, &root)?);
    ensure!(before.lines().count() > 20, "little to compare:\n{before}");
    ensure!(before == after, "it was\n{before}\nand is\n{after}");

    Ok(())
}

fn volumes(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let options = ["--arg", "--files", "--arg", "/vol/data", "--bind", "/srv/local/vol:/vol"];
    let container = Container::networked("counter").with(&options).at(BUNDLE);
    a.sh("mkdir -p /srv/local/vol")?;
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("--volume /vol=copy"), "no hint: {said}");

    let said = a.ferry(&["migrate", "--volume", "/nowhere=copy", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("its bind mounts are /vol"), "no hint: {said}");
    a.ferry(&["check", "--volume", "/vol=copy", "box", "b"])?.exits(0)?;
    ensure!(b.sh("ls -A /srv/local")?.is_empty(), "a check has made something");
    let said = a.ferry(&["migrate", "--dry-run", "--volume", "/vol=copy", "box", "b"])?.exits(0)?;
    ensure!(said.out.contains("bind mount /vol: copied, 5 MiB"), "no forecast: {said}");
    ensure!(b.sh("ls -A /srv/local")?.is_empty(), "a dry run has made something");

    // No faster than is allowed, but for what may go at once and the last piece, 20 ms of it each.
    let line = ["migrate", "--json", "--bandwidth", "20M", "--volume", "/vol=copy", "box", "b"];
    let said = a.ferry(&line)?.exits(0)?;
    let report = said.out.lines().last().unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(report).map_err(|e| e.to_string())?;
    let first = &report["files"][0];
    let ms = first["bytes"].as_f64().unwrap_or(0.0) / 20e6 * 1000.0;
    ensure!(ms > 200.0 && first["ms"].as_f64().unwrap_or(0.0) > ms - 40.0, "{report}");
    exactly_one_copy(&container, &b, &a)?;

    has_checked(&mut probe)
}

/// Files that are bound by themselves, from a disk that only one host has.
fn single_files(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("stdio").with(&[
        "--bind",
        "/srv/local/etc/hosts:/etc/hosts",
        "--bind",
        "/srv/local/etc/lines:/lines",
        "--bind",
        "/srv/local/etc/names:/etc/names:ro",
        "--bind",
        "/srv/local/etc/null:/null",
        "--arg",
        "--file=/lines",
    ]);

    a.sh("mkdir -p /srv/local/etc && cd /srv/local/etc && echo first > hosts && chmod 4604 hosts
          touch lines && seq 200 > names && mkfifo null")?;
    container.start(lab, &a)?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    for hint in ["--volume /etc/hosts=copy", "or put the same contents", "--volume /null=shared"] {
        ensure!(said.err.contains(hint), "no {hint:?}: {said}");
    }

    // One of them is there already, another stands in the way.
    b.sh("mkdir -p /srv/local/etc && cd /srv/local/etc && echo mine > hosts && seq 200 > names
          mkfifo null")?;
    let volumes = ["/etc/hosts=copy", "/lines=copy", "/null=shared"].map(|v| ["--volume", v]);
    let line = |more: &[&'static str]| -> Vec<&'static str> {
        [&["migrate"], volumes.as_flattened(), more, &["box", "b"]].concat()
    };
    let said = a.ferry(&line(&["--dry-run"]))?.exits(0)?;
    ensure!(said.out.contains("bind mount /etc/hosts: copied, 1 MiB, 1 files"), "{said}");

    ensure!(said.out.contains("bind mount /etc/names: is there"), "{said}");
    let command = [&["env", "FERRY_FAULT=source.commit:error", "ferry"], &*line(&[])].concat();
    a.start(&command)?.end(LONG)?.exits(1)?;
    exactly_one_copy(&container, &a, &b)?;
    let there = b.sh("cd /srv/local/etc && ls -A && cat hosts")?;
    ensure!(there == "hosts\nnames\nnull\nmine\n", "it was not left as it was: {there}");

    // Changed while it goes, also by others than the container.
    let said = at(&a, "source.copied", &line(&["--source-files", "remove"]), || {
        a.sh("cd /srv/local/etc && echo second >> hosts && touch -d '2001-02-03 04:05:06.7' hosts")
            .map(drop)
    })?;

    ensure!(!said.exits(0)?.err.contains(NAMES_GIVEN), "a round for nothing");
    exactly_one_copy(&container, &b, &a)?;
    let inside = "/proc/$(pidof stdio-ticker)/root";
    for place in ["/srv/local/etc", &format!("{inside}/etc")] {
        let text = b.sh(&format!("cd {place} && cat hosts && stat -c '%a %h %.Y' hosts"))?;
        ensure!(text == "first\nsecond\n4604 1 981173106.700000000\n", "{place}: {text}");
    }

    let lines = b.sh(&format!("head -n -1 {inside}/lines"))?;
    let wrong = lines.lines().enumerate().find(|(i, l)| *l != format!("tick {}", i + 1));
    ensure!(wrong.is_none() && lines.lines().count() > 20, "{wrong:?} of {lines}");
    let there = b.sh("cd /srv/local/etc && ls -A && cat hosts.before")?;
    ensure!(there == "hosts\nhosts.before\nlines\nnames\nnull\nmine\n", "{there}");
    let here = a.sh("ls -A /srv/local/etc")?;
    ensure!(here == "names\nnull\n", "not removed: {here}");

    // What was replaced is not what the container has.
    b.sh("cd /srv/local/etc && cp hosts new && mv new hosts")?;
    let back = [&["migrate"], volumes.as_flattened(), &["box", "a"]].concat();
    let said = b.ferry(&back)?.exits(3)?;
    ensure!(said.err.contains("is not what is at /srv/local/etc/hosts"), "{said}");

    exactly_one_copy(&container, &b, &a)
}

/// Whatever happens before the commit, it runs on at the source, and nothing is left over there.
fn given_up(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = writer();
    container.start(lab, &a)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let faulty = "/srv/shared/bin/faulty";
    for (there, fault) in [
        (false, "source.copied:kill"),
        (true, "destination.copied:error"),
        (true, "destination.copied:kill"),
        (true, "restore.restored:kill"),
        (false, "source.commit:error"),
        (false, "source.commit:kill"),
    ] {
        let fault = format!("FERRY_FAULT={fault}");
        let (here, over_there) = if there { ("A=", &*fault) } else { (&*fault, "A=") };
        let script = format!("#!/bin/sh\nexport {over_there}; exec ferry \"$@\"\n");
        write_script(&a.path(faulty)?, &script)?;
        let line = ["env", here, "ferry", "migrate", "--remote-ferry", faulty, "box", "b"];
        let said = a.start(&line)?.end(LONG)?;
        let all = (|| {
            ensure!(matches!(said.code, 1 | 137), "{said}");
            exactly_one_copy(&container, &a, &b)?;
            until("nothing is left over there", SHORT, || {
                Ok(b.sh("ls -A /srv/local")?.is_empty().then_some(()))
            })?;
            let given = a.sh(&format!("find {BUNDLE} -name 'link_remap*'"))?;
            ensure!(given.is_empty(), "names that CRIU gave stay: {given}");
            has_checked(&mut probe)
        })();
        all.map_err(|e| format!("{fault}: {e}\n{said}"))?;
    }

    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    has_checked(&mut probe)
}

fn what_was_there_is_kept(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = writer();
    container.start(lab, &a)?;
    b.sh("mkdir -p /srv/local/box/rootfs && echo mine > /srv/local/box/rootfs/mine")?;
    // Given up, it is as it was.
    let line = ["env", "FERRY_FAULT=source.commit:error", "ferry", "migrate", "box", "b"];
    a.start(&line)?.end(LONG)?.exits(1)?;
    ensure!(b.sh("cd /srv/local && find . -type f")?.trim() == "./box/rootfs/mine", "changed");
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    ensure!(b.sh("cat /srv/local/box/rootfs.before/mine")?.trim() == "mine", "lost");
    Ok(())
}

fn no_room(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = writer();
    container.start(lab, &a)?;
    b.sh("mount -t tmpfs -o size=40M tmpfs /srv/local")?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("has no room for the copy"), "{said}");
    ensure!(b.sh("ls -A /srv/local")?.is_empty(), "something was made");
    exactly_one_copy(&container, &a, &b)?;
    // Later it is found by what cannot be written.
    b.sh("umount /srv/local && mount -t tmpfs -o size=200M tmpfs /srv/local")?;
    for point in ["source.copied", "source.freeze"] {
        let said = at(&a, point, &["migrate", "box", "b"], || {
            b.sh("dd if=/dev/zero of=/srv/local/full bs=16k 2>/dev/null || :").map(drop)
        })?;
        let said = said.exits(1)?;
        ensure!(said.err.contains("No space left"), "{point}: {said}");
        let there = b.sh("ls -A /srv/local && rm /srv/local/full")?;
        ensure!(there == "full\n", "{point}: left over there: {there}");
        exactly_one_copy(&container, &a, &b)?;
    }
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)
}

/// Locks a file, says so by making another, and keeps it.
const LOCK: &str = "import fcntl, signal, sys; file = open(sys.argv[1], 'r+')
fcntl.flock(file, fcntl.LOCK_EX); open('/tmp/locked', 'w'); signal.pause()";

/// A restore that waits for what does not come ends when the source has given up, and a second try
/// finds the place free.
fn locked_over_there(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = writer();
    container.start(lab, &a)?;
    let held = "/srv/shared/bin/held";
    let script = "#!/bin/sh\nexport FERRY_FAULT=destination.restore:hold; exec ferry \"$@\"\n";
    write_script(&a.path(held)?, script)?;

    let migrate = ["ferry", "migrate", "--remote-ferry", held, "box", "b"];
    let migrating = a.start(&migrate)?;
    let file = b.path("/run/ferry-fault/destination.restore")?;
    until("the restore is about to begin", LONG, || Ok(file.exists().then_some(())))?;
    let locked = format!("{BUNDLE}/rootfs/data/locked");
    let lock = b.start(&["python3", "-c", LOCK, &locked])?;
    let done = b.path("/tmp/locked")?;
    until("the file is locked", SHORT, || Ok(done.exists().then_some(())))?;
    std::fs::remove_file(&file).map_err(|e| e.to_string())?;

    until("the restore waits for the lock", SHORT, || {
        Ok(b.sh("ps -eo wchan:32")?.contains("locks_lock_inode_wait").then_some(()))
    })?;
    a.sh("pkill -INT -x ferry")?;
    let said = migrating.end(LONG)?.exits(1)?;
    ensure!(said.err.contains("the container runs on here"), "{said}");
    until("nothing of the restore is left", SHORT, || {
        let none = b.exec(&["pgrep", "-x", "criu|ferry|runc|counter-server"])?.code == 1;
        Ok(none.then_some(()))
    })?;

    exactly_one_copy(&container, &a, &b)?;
    drop(lock);
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;

    exactly_one_copy(&container, &b, &a)
}
