//! Command lines, good and bad, that start no container.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::Case;
use crate::side::Side;

pub const CASES: &[Case] = &[
    ("help_of_every_verb", help_of_every_verb),
    ("general_help_and_version", general_help_and_version),
    ("features", features),
    ("unknown_things", unknown_things),
    ("wrong_number_of_arguments", wrong_number_of_arguments),
    ("missing_container", missing_container),
    ("spellings_of_globals", spellings_of_globals),
    ("broken_globals", broken_globals),
    ("bytes_that_are_not_text", bytes_that_are_not_text),
    ("empty_environment", empty_environment),
    ("errors_in_the_log", errors_in_the_log),
    ("closed_standard_streams", closed_standard_streams),
    ("spec_writes_where_it_is", spec_writes_where_it_is),
];

const VERBS: [&str; 17] = [
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "kill",
    "list",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
];

fn help_of_every_verb(side: &mut Side) {
    for verb in VERBS {
        side.raw([verb, "--help"]).ok();
        side.raw([verb, "-h"]).ok();
        side.raw(["help", verb]).ok();
    }
    side.raw(["help", "nonsense"]).any();
}

/// The only output that is not runc's to the last byte: ours comes after it.
fn general_help_and_version(side: &mut Side) {
    let runc = |words: &[&str]| {
        let output = std::process::Command::new("runc").args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for (words, ours) in [
        (&["--version"][..], "ferry: "),
        (&["-v"], "ferry: "),
        (&["--root", "/x", "--version", "state"], "ferry: "),
        (&["--help"], "\nFERRY COMMANDS"),
        (&["help"], "\nFERRY COMMANDS"),
        (&[], "\nFERRY COMMANDS"),
    ] {
        let kept = side.record.len();
        let done = side.raw(words).ok();
        let rest = done.stdout.strip_prefix(&runc(words)).expect("runc's own text comes first");
        assert!(rest.is_empty() || rest.starts_with(ours), "{rest}");
        side.record.truncate(kept);
        side.record.push(format!("{words:?} {}", done.stderr));
    }
}

fn features(side: &mut Side) {
    side.raw(["features"]).ok();
    side.call(["features"]).ok();
    side.raw(["features", "extra"]).any();
}

fn unknown_things(side: &mut Side) {
    side.raw(["nonsense"]).fails();
    side.raw(["Create"]).fails();
    side.raw(["--nonsense", "list"]).fails();
    side.raw(["-nonsense=1", "list"]).fails();
    side.raw(["--nonsense", "migrate", "web", "host2"]).fails();
    side.raw([""]).any();
    side.raw(["-"]).any();
    for verb in VERBS {
        side.call([verb, "--nonsense"]).fails();
        side.call([verb, "-nonsense=1", "x"]).fails();
    }
}

fn wrong_number_of_arguments(side: &mut Side) {
    for verb in VERBS {
        // `list`, `spec` and `features` want none; spec would write a file.
        if verb != "spec" {
            side.call([verb]).any();
            side.call([verb, "a", "b", "c"]).any();
        }
    }
}

fn missing_container(side: &mut Side) {
    for verb in ["delete", "events", "kill", "pause", "ps", "resume", "start", "state", "update"] {
        side.verb(verb).fails();
    }
    let id = side.id.clone();
    side.call(["exec", &id, "true"]).fails();
    side.call(["kill", &id, "KILL"]).fails();
    side.call(["delete", "--force", &id]).any();
    side.call(["checkpoint", "--image-path", "images", &id]).fails();
    side.call(["update", "--resources=-", &id]).stdin("{}").fails();

    for verb in ["create", "run", "restore"] {
        side.call([verb, "--bundle", "/nonexistent", &id]).fails();
        side.call([verb, &id]).fails();
    }
    for bad in ["../escape", "a/b", "", ".", "a b"] {
        side.call(["state", bad]).fails();
        side.call(["start", bad]).fails();
    }

    // With no root there is nothing to list, and that is an error; with an empty one it is not.
    side.call(["list"]).fails();
    std::fs::create_dir(side.path("root")).unwrap();
    side.call(["list"]).ok();
    side.call(["list", "--format", "json"]).ok();
    side.call(["list", "-f=nonsense"]).fails();
    side.call(["list", "-q"]).ok();
}

fn spellings_of_globals(side: &mut Side) {
    let root = side.text("root");
    for globals in [
        &["--root", &root][..],
        &["-root", &root],
        &[&format!("--root={root}")],
        &[&format!("-root={root}")],
        &["--root", &root, "--log-format", "json"],
        &["--root", &root, "-log-format=json"],
        &["--root", &root, "--log-format="],
        &["--root", &root, "--debug=false"],
        &["--root", &root, "--systemd-cgroup=0"],
        &["--root", &root, "--rootless", "false"],
        &["--root", &root, "-rootless=false", "-criu", "/x"],
        &["--root", &root, "--"],
    ] {
        side.raw(globals).arg("state").arg("web").fails();
        side.raw(globals).arg("start").arg("web").fails();
    }

    side.raw(["--root", "relative", "state", "web"]).fails();
    side.raw(["--debug", "--root", &root, "state", "web"]).fails();

    // What looks like a verb or a flag is a value.
    side.raw(["--root", &root, "--log", "migrate", "state", "web"]).fails();
    side.record_file("migrate");
    side.raw(["--root", &root, "--log", "--version", "state", "web"]).fails();
    side.record_file("--version");
}

fn broken_globals(side: &mut Side) {
    for words in [
        &["--root"][..],
        &["--log"],
        &["--root", "", "list"],
        &["--root", "/", "list"],
        &["--root=", "list"],
        &["--debug=maybe", "list"],
        &["--rootless=maybe", "list"],
        &["---root", "x", "list"],
        &["--=x", "list"],
        &["-=x", "start", "web"],
        &["--log-format", "xml", "list"],
        &["--log", "/nonexistent/log", "list"],
    ] {
        side.raw(words).any();
    }
}

fn bytes_that_are_not_text(side: &mut Side) {
    let bad = || OsString::from_vec(b"\xff\xfe\x80x".to_vec());
    let flag = |name: &[u8]| OsString::from_vec([name, b"\xff"].concat());
    side.call(["state"]).arg(bad()).fails();
    side.call(["start"]).arg(bad()).fails();
    side.call(["create", "--bundle"]).arg(bad()).arg("web").fails();
    side.call(["run"]).arg(flag(b"--bundle=/")).arg("web").fails();
    side.raw([bad()]).fails();
    side.raw([flag(b"--")]).arg("list").fails();
    side.raw([flag(b"-root=/run/parity-")]).arg("state").arg("web").fails();
}

fn empty_environment(side: &mut Side) {
    for verb in ["kill", "delete", "pause", "resume", "state", "start"] {
        side.verb(verb).empty_environment().fails();
    }
    side.call(["list"]).empty_environment().fails();
    side.raw(["features"]).empty_environment().ok();
    side.raw(["kill", "--help"]).empty_environment().ok();
}

fn errors_in_the_log(side: &mut Side) {
    for format in ["text", "json"] {
        for verb in ["state", "start", "delete", "nonsense"] {
            let name = format!("{verb}.{format}");
            let log = side.text(&name);
            let line = ["--log", log.as_str(), "--log-format", format, verb, "web"];
            side.call(line).fails();
            // It is appended to.
            side.call(line).fails();
            side.record_file(&name);
        }
    }
    let log = side.text("debug");
    side.call(["--debug", "--log", &log, "start", "web"]).fails();
    side.record_file("debug");
}

fn closed_standard_streams(side: &mut Side) {
    side.call(["state", "web"]).shell("exec \"$@\" <&-").fails();
    side.call(["list"]).shell("exec \"$@\" >&-").any();
    side.call(["state", "web"]).shell("exec \"$@\" 2>&-").fails();
    side.call(["list"]).shell("exec \"$@\" >/dev/full").any();
    // Nobody reads what it writes: the pipe breaks.
    side.raw(["update", "--help"]).shell("\"$@\" | true").any();
}

fn spec_writes_where_it_is(side: &mut Side) {
    let here = side.path("here");
    std::fs::create_dir(&here).unwrap();
    side.raw(["spec"]).cwd(&here).ok();
    side.record_file("here/config.json");
    // Not a second time.
    side.raw(["spec"]).cwd(&here).fails();
    side.raw(["spec", "--rootless", "--bundle", "."]).ok();
    side.record_file("config.json");
    side.raw(["spec", "-b", "/nonexistent"]).fails();
}
