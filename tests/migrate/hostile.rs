//! Containers that want to get out of themselves by being migrated: each ends in a refusal or in a
//! migration that is right, and never with a changed byte outside of it.

use std::collections::HashSet;
use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, Lab, SHORT};
use crate::common::process::{Output, until};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(120);
/// On each host's own disk.
const BUNDLE: &str = "/srv/local/box";

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("hostile::files", LIMIT, files),
        in_lab("hostile::volumes", LIMIT, volumes),
        in_lab("hostile::names", LIMIT, names),
        in_lab("hostile::logs", LIMIT, logs),
        in_lab("hostile::memory", LIMIT, memory),
    ]
}

/// What no container has anything to do with, on both hosts: every file with the time of its last
/// change, which nobody can set.
fn outside(lab: &Lab) -> Outcome<[String; 2]> {
    let (a, b) = pair(lab);
    let look = |host: &Host| {
        let places = "/etc /usr /root /home /opt /srv -maxdepth 12";
        let left_out = "-path /srv/shared -o -path /srv/local";
        host.sh(&format!(
            "find {places} \\( {left_out} \\) -prune -o -printf '%p %y %m %U %s %C@ %l\\n'"
        ))
    };
    Ok([look(&a)?, look(&b)?])
}

/// Nothing of it has changed.
fn unharmed(lab: &Lab, before: &[String; 2]) -> Outcome {
    for (before, after) in before.iter().zip(outside(lab)?) {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<HashSet<_>>();
        let (before, after) = (lines(before), lines(&after));
        let changed: Vec<_> = before.symmetric_difference(&after).take(10).collect();
        ensure!(before.len() > 500 && changed.is_empty(), "{changed:?}");
    }
    Ok(())
}

/// A container that plays these tricks, with the right to make devices, as engines give it.
fn playing(host: &Host, container: Container, tricks: &[&str]) -> Outcome<Container> {
    let arguments: Vec<&str> = tricks.iter().flat_map(|trick| ["--arg", *trick]).collect();
    let container = container.with(&arguments);
    let bundle = &container.bundle;
    container.make(host)?;
    let able = r#"s/"CAP_KILL"/"CAP_KILL", "CAP_MKNOD", "CAP_SYS_CHROOT"/g"#;
    host.exec(&["sed", "-i", able, &format!("{bundle}/config.json")])?.exits(0)?;
    container.run_on(host)?;
    until("its tricks are under way", SHORT, || {
        let root = format!("{bundle}/rootfs");
        ensure!(host.exec(&["test", "-e", &format!("{root}/failed")])?.code != 0, "it cannot play");
        Ok((host.exec(&["test", "-e", &format!("{root}/ready")])?.code == 0).then_some(()))
    })
    .map_err(|e| format!("{e}: {:?}", host.sh(&format!("cat {bundle}/rootfs/failed"))))?;
    Ok(container)
}

/// Ends it where it is, and leaves nothing of it.
fn clear(lab: &Lab, container: &Container) -> Outcome {
    let (a, b) = pair(lab);
    for host in [&a, &b] {
        host.sh(&format!(
            "runc delete -f box 2>/dev/null || :
             ferry resolve --keep box >/dev/null 2>&1 || :
             rm -rf {} /srv/local/*",
            container.bundle
        ))?;
    }
    Ok(())
}

/// Says of a migration whether it went, if it ended in one of the ways in which it may.
fn went(lab: &Lab, container: &Container, said: &Output) -> Outcome<bool> {
    let (a, b) = pair(lab);
    ensure!(matches!(said.code, 0 | 1 | 3), "{said}");
    let (here, there) = if said.code == 0 { (&b, &a) } else { (&a, &b) };
    exactly_one_copy(container, here, there).map_err(|e| format!("{e}\n{said}"))?;
    Ok(said.code == 0)
}

/// Sparse, deep and oddly named files, and such as are something else a moment later.
fn files(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let before = outside(lab)?;
    let container = Container::plain("hostile").at(BUNDLE);
    let tricks = ["sparse", "deep", "extents", "names", "swaps", "devices"];
    let container = playing(&a, container, &tricks)?;
    let said = a.ferry(&["migrate", "--json", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)?;
    unharmed(lab, &before)?;

    // What holds still is the same there.
    let listing = |host: &Host| {
        host.sh(&format!(
            "cd {BUNDLE}/rootfs && find names sparse ddd* -printf '%P %y %m %s %n %l\\n' | sort
             dd if=sparse bs=4096 skip=1073741824 count=1 status=none | head -c 6
             [ $(stat -c %b sparse) -lt 100 ]"
        ))
    };

    let (here, there) = (listing(&a)?, listing(&b)?);
    ensure!(here.contains("middle") && here.lines().count() > 30, "little to compare:\n{here}");
    ensure!(here == there, "it was\n{here}\nand is\n{there}");
    let inside = "cd /proc/$(pidof hostile-tricks)/root";
    let memory = b.sh(&format!(
        "{inside} && find dev/shm -name file | wc -l && stat -c '%s %b' tmp/extents"
    ))?;

    ensure!(memory == "1\n24567816 24000\n", "{memory}");

    // No byte of a host, and no memory for holes.
    let host = b.exec(&["grep", "-rqs", "root:", &format!("{BUNDLE}/rootfs/swaps")])?;
    ensure!(host.code == 1, "it has files of a host: {host}");
    let report = said.out.lines().last().unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(report).map_err(|e| e.to_string())?;
    let peak = report["peak_kib"].as_u64().unwrap_or(u64::MAX);
    ensure!(peak < 64 << 10, "Ferry took {peak} KiB");

    Ok(())
}

/// A volume that is below another one, with a link to the host's files in its place.
fn volumes(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let before = outside(lab)?;
    let line = ["migrate", "--volume", "/v=shared", "--volume", "/sub=copy", "box", "b"];
    for trick in ["volume", "volume-race"] {
        a.sh("mkdir -p /srv/local/v/sub && echo own > /srv/local/v/sub/mine")?;
        b.sh("mkdir -p /srv/local/v")?;
        let binds = ["--bind", "/srv/local/v:/v", "--bind", "/srv/local/v/sub:/sub"];
        let container = playing(&a, Container::plain("hostile").with(&binds), &[trick])?;

        // Whatever is there at the moment when it is looked at.
        for _ in 0..10 {
            let said = a.ferry(&line)?;
            let went = went(lab, &container, &said)?;
            let stolen = b.sh("find /srv/local /srv/shared -name passwd")?;
            ensure!(stolen.is_empty(), "it has the host's files: {stolen}");
            if went {
                ensure!(trick == "volume-race", "{said}");
                let has = b.sh("cat /proc/$(pidof hostile-tricks)/root/sub/mine")?;
                ensure!(has == "own\n", "it has {has:?}");
                break;
            }

            ensure!(said.code != 3 || said.err.contains("is not what is at"), "{said}");
            if trick == "volume" {
                ensure!(said.code == 3, "{said}");
                break;
            }
        }
        clear(lab, &container)?;
    }

    unharmed(lab, &before)
}

/// Names that would be obeyed by a terminal, look like Ferry's own words or like the kernel's.
fn names(lab: &Lab) -> Outcome {
    let (a, _) = pair(lab);
    let before = outside(lab)?;

    let container = playing(&a, Container::plain("hostile"), &["nameless"])?;
    let log = ["--log", "/tmp/said.log", "migrate", "box", "b"];
    for line in [&log[..], &["check", "box"], &["check", "--json", "box"]] {
        let said = a.ferry(line)?.exits(3)?;
        let text = format!("{}{}{}", said.err, said.out, a.sh("cat /tmp/said.log")?);
        let obeyed = |c: char| c.is_control() && c != '\n';
        ensure!(text.contains("]0;OWNED"), "its name is not told: {said}");
        ensure!(!text.contains(obeyed), "a terminal would obey {text:?}");
        let forged = |line: &str| {
            let line = line.trim_start();
            line.starts_with("hint: run rm") || line.starts_with("ferry: fine")
        };
        ensure!(!text.lines().any(forged), "it has a line of its own: {said}");
    }

    clear(lab, &container)?;

    let container = playing(&a, Container::plain("hostile"), &["bottomless"])?;
    let said = a.ferry(&["check", "box"])?.exits(3)?;
    ensure!(said.err.contains("/dev/shm cannot be carried"), "{said}");
    clear(lab, &container)?;

    let container = playing(&a, Container::plain("hostile"), &["maps"])?;
    let said = a.ferry(&["migrate", "box", "b"])?;
    went(lab, &container, &said)?;
    clear(lab, &container)?;

    unharmed(lab, &before)
}

/// A container that writes to a file of its own which it makes look like one of the host.
fn logs(lab: &Lab) -> Outcome {
    let (a, _) = pair(lab);
    let before = outside(lab)?;
    let container = playing(&a, Container::plain("hostile"), &["log"])?;
    for _ in 0..5 {
        let said = a.ferry(&["migrate", "box", "b"])?;
        if went(lab, &container, &said)? {
            break;
        }
    }
    clear(lab, &container)?;
    unharmed(lab, &before)
}

/// More shared memory than there is room in `/run`: it is memory that counts.
fn memory(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    for host in [&a, &b] {
        host.sh("mount -o remount,size=40m /run")?;
    }
    let container = playing(&a, Container::plain("hostile"), &["shared"])?;
    a.ferry(&["migrate", "box", "b"])?.exits(0)?;
    exactly_one_copy(&container, &b, &a)
}
