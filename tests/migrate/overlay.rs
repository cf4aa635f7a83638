//! Containers whose root file system is an overlay that only one host has.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::{Container, READY};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, LONG, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::{until, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(150);
const BUNDLE: &str = "/srv/local/box";
const ROOT: &str = "/srv/local/box/rootfs";
/// Ferry's state, and with it the store: on a disk that layers can be on.
const STATE: &str = "/srv/local/state";

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("overlay::layers_are_copied_once", LIMIT, layers_are_copied_once),
        in_lab("overlay::layers_that_are_there", LIMIT, layers_that_are_there),
        in_lab("overlay::there_and_back", LIMIT, there_and_back),
        in_lab("overlay::what_layers_mean", LIMIT, what_layers_mean),
        in_lab("overlay::given_up", LIMIT, given_up),
        in_lab("overlay::given_up_on_the_way_back", LIMIT, given_up_on_the_way_back),
        in_lab("overlay::what_stands_in_the_way", LIMIT, what_stands_in_the_way),
        in_lab("overlay::nobody_writes", LIMIT, nobody_writes),
        in_lab("overlay::what_is_watched", LIMIT, what_is_watched),
    ]
}

/// A server that changes files all the time, and checks them against its memory.
pub fn writer() -> Container {
    let options = ["--arg", "--files", "--arg", "/data", "--arg", "--files-size", "--arg", "8M"];
    Container::networked("counter").with(&options).at(BUNDLE)
}

/// Its root file system in three layers. What the server opens and maps is in one of them: it is
/// copied up, and has the inode of the lower file for whoever asks from above.
const LAYERS: &str = "
    mkdir -p low/two/data/small low/two/odd/gone low/two/odd/kept low/two/odd/moved/in low/three
    mv rootfs low/one && mkdir upper work rootfs
    head -c 300000 /dev/urandom > low/two/data/data
    head -c 20000 /dev/urandom > \"$(printf 'low/two/data/mapp\\351d')\"
    echo old > low/two/data/log; echo one > low/two/odd/gone/file; echo one > low/two/odd/kept/file
    echo in > low/two/odd/moved/in/file; ln low/two/odd/kept/file low/two/odd/link; ln -s kept low/two/odd/sym
    head -c 3000000 /dev/urandom > low/two/odd/big; truncate -s 9M low/two/odd/sparse; mkfifo low/two/odd/fifo
    echo three > low/three/three; echo hidden > low/three/hidden; mknod low/two/hidden c 0 0
    chown 12:34 low/two/odd/big; chmod 1777 low/two/odd/kept; touch -d '2001-02-03 04:05:06.7' low/two/odd/kept";

fn mount(options: &str) -> String {
    let at = BUNDLE;
    format!(
        "mount -t overlay overlay -o \
         lowerdir={at}/low/one:{at}/low/two:{at}/low/three,{options} {ROOT}"
    )
}

pub fn upper() -> String {
    format!("upperdir={BUNDLE}/upper,workdir={BUNDLE}/work")
}

fn states(hosts: [&Host; 2]) -> Outcome {
    for host in hosts {
        host.sh(&format!(
            "mkdir -p /etc/ferry; echo 'state = \"{STATE}\"' > /etc/ferry/config.toml"
        ))?;
    }
    Ok(())
}

/// Starts it on host a, on an overlay.
pub fn start(lab: &Lab, container: &Container, options: &str) -> Outcome<(Host, Host)> {
    let (a, b) = pair(lab);
    states([&a, &b])?;
    container.make(&a)?;
    a.sh(&format!("cd {BUNDLE}\n{LAYERS}\n{}", mount(options)))?;
    container.make_network(lab, &a)?;
    container.run_on(&a)?;
    Ok((a, b))
}

/// All but what the server writes to.
fn listing(host: &Host, root: &str) -> Outcome<String> {
    host.exec(&["python3", "-c", include_str!("listing.py"), root, "data"])?.ok()
}

/// What the source still has is what the destination has.
fn same_trees(from: &Host, to: &Host) -> Outcome {
    let (before, after) = (listing(from, ROOT)?, listing(to, ROOT)?);
    let differ = before.lines().zip(after.lines()).find(|(b, a)| b != a);
    ensure!(before == after, "first: {differ:?}\nit was\n{before}\nand is\n{after}");
    Ok(())
}

/// Migrates, and returns how many layers were there, how many copied, and bytes of files.
fn migrate(from: &Host, to: &Host, options: &[&str]) -> Outcome<(u64, u64, u64)> {
    let mut line = vec!["migrate", "--report", "/tmp/report", "box", to.name];
    line.splice(1..1, options.iter().copied());
    from.ferry(&line)?.exits(0)?;
    let text = from.sh("cat /tmp/report")?;
    let report: Value = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
    let number = |v: &Value| v.as_u64().ok_or_else(|| format!("no layers: {report}"));
    let rounds = report["files"].as_array().cloned().unwrap_or_default();
    let bytes = rounds.iter().filter_map(|r| r["bytes"].as_u64()).sum();
    Ok((number(&report["layers"]["there"])?, number(&report["layers"]["copied"])?, bytes))
}

/// It has gone over all of its files since.
fn has_checked(probe: &mut Probe) -> Outcome {
    let began = Instant::now();
    until("it has come round its files", SHORT, || {
        Ok((began.elapsed() > Duration::from_millis(500)).then_some(()))
    })?;
    probe.is_content()
}

/// The overlays of a host below `/srv/local`.
fn overlays(host: &Host) -> Outcome<String> {
    host.sh("grep ' - overlay \\| - tmpfs ' /proc/self/mountinfo | grep -o ' /srv/local[^ ]* .*' | sort || true")
}

/// Everything in `/srv/local` but Ferry's state.
fn files(host: &Host) -> Outcome<String> {
    host.sh(&format!("cd /srv/local && find . -path .{} -prune -o -print | sort", &STATE[10..]))
}

fn layers_are_copied_once(lab: &Lab) -> Outcome {
    let container = writer();
    let (a, b) = start(lab, &container, &upper())?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let (there, copied, _) = migrate(&a, &b, &[])?;
    ensure!((there, copied) == (0, 3), "{there} there, {copied} copied");
    exactly_one_copy(&container, &b, &a)?;
    has_checked(&mut probe)?;
    same_trees(&a, &b)?;
    for (low, number) in [("one", 0), ("two", 1), ("three", 2)] {
        let mounted =
            b.sh(&format!("grep -o 'lowerdir=[^,]*' /proc/self/mountinfo | grep {STATE}"))?;
        let path = mounted.trim().trim_start_matches("lowerdir=").split(':').nth(number);
        let path = path.ok_or("a layer is missing")?.to_owned();
        let touch = |host: &Host, path: &str| {
            // The time of the root itself is not the layer's.
            host.sh(&format!("touch -d @0 {path}"))
        };
        let from = format!("{BUNDLE}/low/{low}");
        touch(&a, &from)?;
        touch(&b, &path)?;
        ensure!(listing(&a, &from)? == listing(&b, &path)?, "the layer {low} differs");
    }

    // And again, under another name, for a container that has never been here.
    a.sh(&format!("umount {ROOT}"))?;
    migrate(&b, &a, &[])?;
    a.sh("ferry delete --force box; ip netns del box 2>/dev/null; true")?;
    b.sh(&format!("umount {ROOT} && rm -r {BUNDLE} && rm {STATE}/layers.json"))?;
    drop(probe);
    a.sh(&format!(
        "cd {BUNDLE} && umount {ROOT}; rm -rf upper work && mkdir upper work\n{}",
        mount(&upper())
    ))?;

    container.make_network(lab, &a)?;
    container.run_on(&a)?;
    let (there, copied, _) = migrate(&a, &b, &[])?;
    ensure!((there, copied) == (3, 0), "{there} there, {copied} copied");

    exactly_one_copy(&container, &b, &a)
}

/// At the same path, under another one, and damaged.
fn layers_that_are_there(lab: &Lab) -> Outcome {
    let container = writer();
    let (a, b) = start(lab, &container, &upper())?;
    // A copy of one layer at its place, of another with one byte that differs.
    a.sh(&format!("cp -a {BUNDLE}/low /srv/shared/low"))?;
    b.sh(&format!(
        "mkdir -p {BUNDLE} && cp -a /srv/shared/low {BUNDLE}/low && cd {BUNDLE}/low
         touch -r three/three stamp && sed -i s/three/threE/ three/three && touch -r stamp three/three"
    ))?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let (there, copied, _) = migrate(&a, &b, &[])?;
    ensure!((there, copied) == (2, 1), "{there} there, {copied} copied");
    exactly_one_copy(&container, &b, &a)?;
    has_checked(&mut probe)?;
    same_trees(&a, &b)?;
    ensure!(b.sh(&format!("cat {BUNDLE}/low/three/three"))?.trim() == "threE", "it was changed");
    Ok(())
}

fn there_and_back(lab: &Lab) -> Outcome {
    let container = writer();
    let (a, b) = start(lab, &container, &upper())?;
    let mut probe = Probe::start(lab, &container, 5)?;
    for (i, (from, to)) in [(&a, &b), (&b, &a), (&a, &b), (&b, &a)].into_iter().enumerate() {
        let last = i == 3;
        let options = if last { &["--source-files", "remove"][..] } else { &[] };
        let (there, copied, _) = migrate(from, to, options)?;
        let wanted = if i == 0 { (0, 3) } else { (3, 0) };
        ensure!((there, copied) == wanted, "move {i}: {there} there, {copied} copied");
        exactly_one_copy(&container, to, from)?;
        has_checked(&mut probe)?;
        if last {
            let left = files(from)?;
            ensure!(!left.contains("upper") && !left.contains("work"), "left: {left}");
            ensure!(overlays(from)?.is_empty(), "still mounted: {}", overlays(from)?);
        } else {
            same_trees(from, to)?;
        }

        for host in [from, to] {
            let odd = host.sh("find /srv/local \\( -name '.ferry*' -o -name '*.before' \\)")?;
            ensure!(odd.is_empty(), "left on {}: {odd}", host.name);
            let mounted = overlays(host)?.lines().count();
            ensure!(mounted == usize::from(!(last && host.name == from.name)), "{mounted} mounts");
        }
    }

    Ok(())
}

/// What was deleted, replaced, renamed and changed above the layers, before and meanwhile.
fn what_layers_mean(lab: &Lab) -> Outcome {
    let container = writer();
    let options = format!("{},redirect_dir=on,metacopy=on", upper());
    let (a, b) = start(lab, &container, &options)?;
    let mut probe = Probe::start(lab, &container, 5)?;
    a.sh(&format!(
        "cd {ROOT} && ls hidden 2>/dev/null && exit 1
         rm -r odd/gone && mkdir odd/gone && echo new > odd/gone/new
         mv odd/moved odd/elsewhere && echo more >> odd/elsewhere/in/file
         chmod 600 odd/big; chown 3:4 three; rm odd/sparse; rm odd/link; mv odd/sym odd/sym2
         echo longer >> odd/kept/file; mkdir -p new/dir; mknod new/dev c 1 7; ln odd/kept/file new/hard"
    ))?;

    // In the upper layer that is a whiteout, a note in an attribute, a file without contents.
    a.sh(&format!(
        "cd {BUNDLE}/upper && test -c odd/sparse && python3 -c '
import os
assert os.getxattr(\"odd/gone\", \"trusted.overlay.opaque\") == b\"y\"
assert os.getxattr(\"odd/elsewhere\", \"trusted.overlay.redirect\")
os.getxattr(\"odd/big\", \"trusted.overlay.metacopy\")'"
    ))?;

    migrate(&a, &b, &[])?;
    exactly_one_copy(&container, &b, &a)?;
    has_checked(&mut probe)?;
    same_trees(&a, &b)?;
    b.sh(&format!(
        "cd {ROOT} && test ! -e hidden -a ! -e odd/gone/file -a ! -e odd/sparse
         cat odd/elsewhere/in/file && test $(stat -c %s odd/big) = 3000000
         cd {BUNDLE}/upper && test -c odd/sparse && python3 -c '
import os
assert os.getxattr(\"odd/gone\", \"trusted.overlay.opaque\") == b\"y\"
os.getxattr(\"odd/big\", \"trusted.overlay.metacopy\")'"
    ))?;

    Ok(())
}

/// Whatever happens before the commit, it runs on at the source, and nothing is left over there but
/// layers that were whole.
fn given_up(lab: &Lab) -> Outcome {
    let container = writer();
    let (a, b) = start(lab, &container, &upper())?;
    let mut probe = Probe::start(lab, &container, 5)?;
    let faulty = "/srv/shared/bin/faulty";
    for (i, (there, fault)) in [
        (false, "source.copied:kill"),
        (true, "destination.copied:kill"),
        (true, "destination.restore:error"),
        (true, "restore.restored:kill"),
        (false, "source.commit:error"),
        (false, "source.commit:kill"),
    ]
    .into_iter()
    .enumerate()
    {
        let fault = format!("FERRY_FAULT={fault}");
        let (here, over_there) = if there { ("A=", &*fault) } else { (&*fault, "A=") };
        let script = format!("#!/bin/sh\nexport {over_there}; exec ferry \"$@\"\n");
        write_script(&a.path(faulty)?, &script)?;
        let line = ["env", here, "ferry", "migrate", "--remote-ferry", faulty, "box", "b"];
        let said = a.start(&line)?.end(LONG)?;
        let all = (|| {
            ensure!(matches!(said.code, 1 | 137), "{said}");
            ensure!((i == 0) == said.err.contains("layers: 0 there, 3 to be copied"), "{said}");
            exactly_one_copy(&container, &a, &b)?;
            until("nothing is left over there", SHORT, || {
                Ok((files(&b)?.trim() == "." && overlays(&b)?.is_empty()).then_some(()))
            })?;
            let kept = b.sh(&format!("ls -A {STATE}/layers | wc -l"))?;
            ensure!(kept.trim() == "3", "{kept} layers are in the store");
            has_checked(&mut probe)
        })();
        all.map_err(|e| format!("{fault}: {e}\n{said}\n{}", files(&b).unwrap_or_default()))?;
    }

    migrate(&a, &b, &[])?;
    exactly_one_copy(&container, &b, &a)?;
    has_checked(&mut probe)
}

/// The host that it comes back to still has its old overlay, and has it again.
fn given_up_on_the_way_back(lab: &Lab) -> Outcome {
    let container = writer();
    let (a, b) = start(lab, &container, &upper())?;
    let mut probe = Probe::start(lab, &container, 5)?;
    migrate(&a, &b, &[])?;
    let old = (files(&a)?, overlays(&a)?, listing(&a, &format!("{BUNDLE}/upper"))?);
    let faulty = "/srv/shared/bin/faulty";
    for fault in ["destination.copied:kill", "restore.restored:kill", "destination.ready:error"] {
        let script = format!("#!/bin/sh\nexport FERRY_FAULT={fault}; exec ferry \"$@\"\n");
        write_script(&a.path(faulty)?, &script)?;
        b.ferry(&["migrate", "--remote-ferry", faulty, "box", "a"])?.exits(1)?;
        exactly_one_copy(&container, &b, &a).map_err(|e| format!("{fault}: {e}"))?;
        until("all is as it was", SHORT, || {
            let now = (files(&a)?, overlays(&a)?);
            Ok((now == (old.0.clone(), old.1.clone())).then_some(()))
        })
        .map_err(|e| format!("{fault}: {e}: {:?}, not {:?}", overlays(&a), old.1))?;

        let upper = listing(&a, &format!("{BUNDLE}/upper"))?;
        ensure!(upper == old.2, "{fault}: it was\n{}\nand is\n{upper}", old.2);
        has_checked(&mut probe)?;
    }

    migrate(&b, &a, &[])?;
    exactly_one_copy(&container, &a, &b)?;
    has_checked(&mut probe)
}

fn what_stands_in_the_way(lab: &Lab) -> Outcome {
    let container = writer();
    let (a, b) = start(lab, &container, &upper())?;
    let refused = |why: &str| {
        let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
        ensure!(said.err.contains(why) && said.err.contains("hint: "), "{said}");
        exactly_one_copy(&container, &a, &b)
    };
    b.sh(&format!("mkdir -p {ROOT} && mount -t tmpfs tmpfs {ROOT}"))?;
    refused("something else is mounted at")?;
    b.sh(&format!(
        "umount {ROOT} && cd {BUNDLE} && mkdir x upper work m
         mount -t overlay overlay -o lowerdir={BUNDLE}/x,{} m",
        upper()
    ))?;
    refused("is the upper layer of what is mounted at")?;
    // On the hosts' own root, which is an overlay.
    b.sh(&format!(
        "umount {BUNDLE}/m && rm -r /srv/local/box; rm /etc/ferry/config.toml; rm -rf /var/lib/ferry"
    ))?;
    refused("would be on an overlay itself")?;
    ensure!(overlays(&b)?.is_empty() && files(&b)?.trim() == ".", "something was made");
    Ok(())
}

/// Layers only.
fn nobody_writes(lab: &Lab) -> Outcome {
    let container = Container::networked("counter").with(&["--readonly"]).at(BUNDLE);
    let (a, b) = start(lab, &container, "ro")?;
    let mut probe = Probe::start(lab, &container, 5)?;
    for (i, (from, to)) in [(&a, &b), (&b, &a)].into_iter().enumerate() {
        let (there, copied, _) = migrate(from, to, &[])?;
        let wanted = if i == 0 { (0, 3) } else { (3, 0) };
        ensure!((there, copied) == wanted, "move {i}: {there} there, {copied} copied");
        exactly_one_copy(&container, to, from)?;
        probe.is_content()?;
        same_trees(from, to)?;
    }
    Ok(())
}

/// Watches directories and files of several layers, and says what it hears of. Numbers are those of system
/// calls on x86-64: inotify_init1 and inotify_add_watch, for IN_CREATE and IN_MODIFY.
const WATCH: &str = r#"
my $watcher = syscall(294, 2048);
open(my $events, "<&=", $watcher) or die;
my @places = ("/odd/kept", "/odd/big", "/data/small", "/three");
for my $place (@places) {
    syscall(254, $watcher, $place, 0x102) > 0 or die "$place: $!";
}
if (-e "/lose") {
    open(my $kept, "<", "/three");
    unlink("/three");
    READY
    sleep 1 while 1;
}
READY
while (1) {
    my $heard = sysread($events, my $text, 4096) or select(undef, undef, undef, 0.02);
    while ($heard && length($text)) {
        my ($watch, $what, $with, $length) = unpack("iLLL", $text);
        $text = substr($text, 16 + $length);
        open(my $to, ">>", "/heard");
        print $to "$watch\n";
        close($to);
    }
}
"#;

/// CRIU cannot open what is watched on an overlay by its handle, and finds it by its path.
fn what_is_watched(lab: &Lab) -> Outcome {
    let program = WATCH.replace("READY", READY);
    let container = Container::script(&program).at(BUNDLE);
    let (a, b) = start(lab, &container, &upper())?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        migrate(from, to, &[])?;
        let root = format!("/proc/{}/root", facts(to)?.containers["box"].pid);
        to.sh(&format!(
            "cd {root}; echo more >>odd/kept/file; echo more >>odd/big; echo more >>three
             echo >data/small/from-{}",
            from.name
        ))?;

        until("all watches are heard", SHORT, || {
            let heard = to.exec(&["sh", "-c", &format!("sort -u {root}/heard")])?.out;
            Ok((heard == "1\n2\n3\n4\n").then_some(()))
        })?;
        to.sh(&format!("rm {root}/heard"))?;
        exactly_one_copy(&container, to, from)?;
    }

    a.sh(&format!("ferry delete -f box; rm {ROOT}/ready; touch {ROOT}/lose"))?;
    container.run_on(&a)?;
    for verb in [&["check", "box"][..], &["migrate", "box", "b"]] {
        let said = a.ferry(verb)?.exits(3)?;
        ensure!(said.err.contains("watches what CRIU cannot find by a name"), "{said}");
    }

    Ok(())
}
