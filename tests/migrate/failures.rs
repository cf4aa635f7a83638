//! What only shows when CRIU, or the runtime, works: the migration fails, with their own words, whose fault
//! it was, and a hint where one is known; and the container runs on.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{Container, READY};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::Lab;
use crate::common::process::{Output, write_script};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("failures::of_the_dump", LIMIT, of_the_dump),
        in_lab("failures::of_the_moment", LIMIT, of_the_moment),
        in_lab("failures::of_the_restore", LIMIT, of_the_restore),
        in_lab("failures::of_a_hook", LIMIT, of_a_hook),
    ]
}

/// A migration that fails, and says each of these once.
fn fails(lab: &Lab, container: &Container, arguments: &[&str], words: &[&str]) -> Outcome<Output> {
    let (a, b) = pair(lab);
    let pid = facts(&a)?.containers[container.id].pid;
    let said = a.ferry(&[&["migrate"], arguments, &["box", "b"]].concat())?.exits(1)?;
    for words in ["ferry: error: ", "the container runs on here"].iter().chain(words) {
        ensure!(said.err.matches(words).count() == 1, "not once {words:?}: {said}");
    }
    // What CRIU calls an error and goes on from; and what is only a consequence.
    for words in ["RLIMIT", "lazy-pages", "log file"] {
        ensure!(!said.err.contains(words), "{words:?}: {said}");
    }
    exactly_one_copy(container, &a, &b)?;
    ensure!(facts(&a)?.containers[container.id].pid == pid, "it is another process now");
    Ok(said)
}

/// An answer of the kernel that is not read.
fn of_the_dump(lab: &Lab) -> Outcome {
    // AF_NETLINK, SOCK_RAW, NETLINK_ROUTE; RTM_GETLINK with NLM_F_REQUEST and NLM_F_DUMP
    let question = "use Socket; socket(my $kernel, 16, 3, 0) or die; \
                    syswrite($kernel, pack('LSSLLCx15', 32, 18, 0x301, 1, 0, 0)) or die;";
    let container = Container::script(&format!("{question} {READY} sleep 1 while 1;"));
    container.start(lab, &lab.host("a"))?;
    let pid = facts(&lab.host("a"))?.containers["box"].pid;
    let process = format!("cannot dump the container (process {pid}, perl): ");
    fails(lab, &container, &[], &[&process, "hint: a netlink socket has unread messages"])?;
    // All that CRIU has written, where it is wanted.
    let said = lab.host("a").ferry(&["--debug", "migrate", "box", "b"])?.exits(1)?;
    ensure!(said.err.contains("ms  dump.log: "), "{said}");
    Ok(())
}

/// Unread messages with credentials, and clients that wait with a request: found before the freeze, and carried
/// when they have been read.
fn of_the_moment(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    // SO_PASSCRED
    let message = "socketpair(my $one, my $other, AF_UNIX, SOCK_DGRAM, 0); \
                   setsockopt($other, SOL_SOCKET, 16, 1) or die; syswrite($one, 'x'); \
                   $SIG{USR1} = sub { sysread($other, my $x, 1) };";
    let guest = "my $name = sockaddr_un('/run/door'); socket(my $door, AF_UNIX, SOCK_STREAM, 0); \
                 bind($door, $name); listen($door, 1); socket(my $guest, AF_UNIX, SOCK_STREAM, 0); \
                 connect($guest, $name) or die; syswrite($guest, 'x'); my $host; \
                 $SIG{USR1} = sub { accept($host, $door) };";
    for (program, words) in [
        (message, "a message with credentials or a time stamp waits in a unix socket"),
        (guest, "1 clients of a unix socket wait to be accepted"),
    ] {
        let container =
            Container::script(&format!("use Socket; {program} {READY} sleep 1 while 1;"));
        container.start(lab, &a)?;
        let said = a.ferry(&["migrate", "box", "b"])?.exits(1)?;
        ensure!(said.err.contains(words) && said.err.contains("try again"), "{said}");
        exactly_one_copy(&container, &a, &b)?;
        a.sh("runc kill box USR1")?;
        a.ferry(&["migrate", "box", "b"])?.exits(0)?;
        exactly_one_copy(&container, &b, &a)?;
        b.ferry(&["migrate", "box", "a"])?.exits(0)?;
        a.sh("ferry delete -f box; rm -r /srv/shared/box")?;
    }

    Ok(())
}

/// A file that the other host has not, although it was said to see the same.
fn of_the_restore(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    for host in [&a, &b] {
        host.sh("mkdir -p /srv/local/data")?;
    }
    a.sh("echo here >/srv/local/data/file")?;
    let program = format!("open(my $in, '<', '/mnt/file') or die; {READY} sleep 1 while 1;");
    let container = Container::script(&program).with(&["--bind", "/srv/local/data:/mnt"]);
    container.start(lab, &a)?;
    let words = [
        "the destination failed while ",
        "CRIU cannot restore (its process 1, perl): ",
        "mnt/file on restore",
        "hint: a file that it has open is not there on the destination",
    ];
    fails(lab, &container, &["--volume", "/mnt=shared"], &words).map(drop)
}

/// A hook that fails on the other host.
fn of_a_hook(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let hook = "/srv/local/hook";
    write_script(&a.path(hook)?, "#!/bin/sh\nexit 0\n")?;
    write_script(&b.path(hook)?, "#!/bin/sh\necho no such luck >&2; exit 7\n")?;
    let container = Container::plain("stdio");
    container.make(&a)?;
    let config = a.path(&container.bundle)?.join("config.json");
    let text = std::fs::read(&config).map_err(|e| e.to_string())?;
    let mut json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    json["hooks"] = serde_json::json!({"createRuntime": [{"path": hook}]});
    std::fs::write(&config, json.to_string()).map_err(|e| e.to_string())?;
    container.run_on(&a)?;
    let words =
        ["the runtime's restore: ", "createRuntime hook", "no such luck", "hint: the hooks"];
    fails(lab, &container, &[], &words).map(drop)
}
