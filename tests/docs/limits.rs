//! What docs/limits.md says is refused is held against the trials: each row is shown somewhere, with its
//! words, or stands here as one that nobody has shown yet.

use std::collections::BTreeMap;

use super::{none, read};

/// Where a row is shown.
enum Shown {
    /// By trials that move, or do not move, a container.
    Lab(&'static [&'static str]),
    /// By a suite of another program: its file, and a function in it.
    Test(&'static str, &'static str),
    /// What is looked at cannot be had in a lab, or takes too long there.
    Nobody(&'static str),
}

use Shown::{Lab, Nobody, Test};

/// Each row by what its first column begins with.
const ROWS: &[(&str, Shown)] = &[
    ("with the host's network, and", Lab(&["refusals::host_network"])),
    ("with interfaces other than", Test("tests/network/carry.rs", "capture_refuses")),
    ("with packet filter rules", Lab(&["refusals::packet_filter"])),
    ("with queueing disciplines", Test("tests/network/carry.rs", "capture_refuses")),
    ("with open connections under address translation", Lab(&["published::on_a_segment"])),
    ("of podman or docker, behind a bridge", Test("tests/engines/published.rs", "connect")),
    ("with multipath, encapsulated", Test("tests/network/carry.rs", "capture_refuses")),
    ("in whose network others are members", Lab(&["refusals::multicast"])),
    (
        "with connections of Multipath TCP; or sockets that listen for it, where it has the host's network, or two processes share one",
        Lab(&["migratable::mptcp"]),
    ),
    ("with TCP over fe80::", Lab(&["limits::of_programs"])),
    ("to a host that only TLS", Lab(&["refusals::arguments"])),
    ("with a bind mount that the other host", Lab(&["refusals::bind_mount", "files::volumes"])),
    ("with a single file bound to it that was replaced", Lab(&["limits::of_files"])),
    ("with a bind mount whose place on the host", Lab(&["hostile::volumes"])),
    ("with more than 256 directories", Lab(&["limits::of_files"])),
    ("with a tmpfs of more than ten million files", Lab(&["hostile::names"])),
    ("with a file in a tmpfs that has more", Nobody("xattrs of that size, where tmpfs has any")),
    (
        "with more than 20,000 file locks",
        Test("src/tasks/locks.rs", "more_than_can_go_along_are_counted_and_refused"),
    ),
    ("with a device, FIFO or socket bound to it", Lab(&["files::single_files"])),
    ("with a pipe or a unix connection to a process", Lab(&["limits::of_what_is_outside"])),
    ("with a FIFO that a process outside", Lab(&["limits::of_files"])),
    ("that reads a FIFO which nobody", Lab(&["refusals::fifo_without_writer"])),
    ("with an open or mapped, deleted file", Lab(&["limits::of_programs"])),
    ("with an exclusive lock", Lab(&["refusals::lock_on_shared_storage"])),
    ("with a POSIX lock of a program of 32 bits", Nobody("there are no programs of 32 bits here")),
    ("with a bind mount that is shared both ways", Lab(&["limits::of_files"])),
    ("whose output is a deleted file", Lab(&["limits::of_files"])),
    ("with message queues, or", Lab(&["limits::of_programs"])),
    ("with a pipe that keeps packets apart", Lab(&["limits::of_programs"])),
    ("that watches (inotify, fanotify) a deleted file", Lab(&["overlay::what_is_watched"])),
    (
        "that watches directories of an overlay",
        Test("src/files/walk.rs", "names_are_found_by_their_inodes"),
    ),
    ("with a unix socket that was linked", Lab(&["limits::of_programs"])),
    ("with a terminal", Lab(&["streams::terminal"])),
    ("paused, created or stopped", Lab(&["refusals::state_of_the_container"])),
    ("without a control group of its own", Nobody("the runtime always makes one")),
    ("with processes in control groups beside", Lab(&["limits::of_control_groups"])),
    (
        "with a control group that systemd has made",
        Test("src/tasks/losses/limits.rs", "a_scope_is_systemds"),
    ),
    ("with a user namespace, or another", Lab(&["limits::of_programs"])),
    ("with processes that `exec` put into it", Lab(&["refusals::guests"])),
    ("with io_uring", Lab(&["refusals::io_uring", "migratable::io_uring"])),
    ("with an open device other than", Lab(&["refusals::open_device"])),
    ("that has made requests by Linux AIO", Lab(&["refusals::linux_aio"])),
    ("with a parent in vfork(2)", Lab(&["limits::of_programs"])),
    ("with a task that is being traced", Lab(&["refusals::guests"])),
    ("with a seccomp supervisor, or an epoll", Lab(&["limits::of_programs"])),
    ("with shared executable memory", Lab(&["limits::of_programs"])),
    ("whose threads have set more than", Nobody("10,000 threads, each with its own settings")),
    ("that has reserved more than 64 GiB", Lab(&["limits::of_programs"])),
    ("whose memory limit in", Lab(&["limits::of_shared_memory"])),
    (
        "with an AppArmor profile",
        Test("src/tasks/losses/tasks.rs", "profiles_are_compared_by_name"),
    ),
];

/// The first column of the tables of what is refused.
fn rows() -> Vec<String> {
    let text = read("docs/limits.md");
    let (_, text) = text.split_once("\n## What cannot be migrated\n").expect("what is refused");
    let text = text.split("\n## ").next().unwrap_or_default();
    let cell = |line: &str| Some(line.strip_prefix("| ")?.split(" |").next()?.to_owned());
    text.lines().filter_map(cell).filter(|cell| cell != "container").collect()
}

/// The trials' names, as the suites have them.
fn trials() -> String {
    let files = std::fs::read_dir(super::top().join("tests/migrate")).expect("the suites");
    let paths = files.map(|entry| entry.expect("an entry").path());
    let sources = paths.filter(|path| path.extension().is_some_and(|kind| kind == "rs"));
    sources.map(read).collect()
}

#[test]
fn what_is_refused_is_shown() {
    let mut found = Vec::new();
    let trials = trials();
    let mut met: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows() {
        match ROWS.iter().filter(|(begin, _)| row.starts_with(begin)).collect::<Vec<_>>()[..] {
            [(begin, _)] => *met.entry(begin).or_default() += 1,
            _ => found.push(format!("docs/limits.md: nobody, or several, are to show {row:?}")),
        }
    }

    for (begin, shown) in ROWS {
        if met.get(begin) != Some(&1) {
            found.push(format!("docs/limits.md has no row, or several, {begin:?}"));
        }
        match shown {
            Lab(names) => found.extend(
                names
                    .iter()
                    .filter(|name| !trials.contains(&format!("\"{name}\"")))
                    .map(|name| format!("{begin:?}: there is no trial {name}")),
            ),
            Test(file, function) if !read(file).contains(&format!("fn {function}(")) => {
                found.push(format!("{begin:?}: {file} has no {function}"));
            }
            Test(..) => {}
            Nobody(why) => println!("not shown: {begin:?}: {why}"),
        }
    }
    none(found);
}
