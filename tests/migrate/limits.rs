//! What docs/limits.md says is refused, by programs that do it: one after the other, each in a container
//! of its own. `tests/docs/limits.rs` says which row is shown where.

use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::common::container::{Container, READY};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, Lab};
use crate::common::process::until;
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};
use crate::refusals::running_with;

const LIMIT: Duration = Duration::from_secs(120);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("limits::of_programs", LIMIT, of_programs),
        in_lab("limits::of_files", LIMIT, of_files),
        in_lab("limits::of_control_groups", LIMIT, of_control_groups),
        in_lab("limits::of_what_is_outside", LIMIT, of_what_is_outside),
        in_lab("limits::of_shared_memory", LIMIT, of_shared_memory),
    ]
}

/// What a program does, and what is said of it. Numbers are those of system calls on x86-64.
const PROGRAMS: &[(&str, &str)] = &[
    (
        "open(my $file, '+>', '/big'); unlink('/big'); truncate($file, 65 << 20);",
        "a large file without a name open: /big",
    ),
    (
        // mmap, PROT_READ, MAP_PRIVATE | MAP_POPULATE
        "open(my $file, '+>', '/big'); print $file 'x' x (65 << 20); $file->flush; \
         syscall(9, 0, 65 << 20, 1, 0x8002, fileno($file), 0); unlink('/big'); close($file);",
        "a large file without a name mapped: /big",
    ),
    // pipe2, O_DIRECT
    ("my $both = pack('ii', 0, 0); syscall(293, $both, 040000);", "keeps packets apart (O_DIRECT)"),
    // mq_open, O_RDWR | O_CREAT
    ("my $name = 'queue'; syscall(240, $name, 66, 0600, 0);", "message queue"),
    (
        "use Socket; socket(my $socket, AF_UNIX, SOCK_STREAM, 0); \
         bind($socket, sockaddr_un('/run/first')); listen($socket, 1); link('/run/first', '/run/second');",
        "the socket /run/first has another name, /run/second",
    ),
    (
        // unshare, CLONE_NEWUSER
        "unless (fork) { syscall(272, 0x10000000); mkdir('/made'); sleep 1 while 1 } \
         select(undef, undef, undef, 0.01) until -e '/made';",
        "there is another user namespace within the container",
    ),
    (
        // epoll_create1, and epoll_ctl with EPOLL_CTL_ADD and EPOLLIN
        "my $epoll = syscall(291, 0); unless (fork) { pipe(my $out, my $in); my $event = pack('LQ', 1, 0); \
         syscall(233, $epoll, 1, fileno($out), $event); mkdir('/made'); sleep 1 while 1 } \
         select(undef, undef, undef, 0.01) until -e '/made';",
        "an epoll of the container watches what its process has not open",
    ),
    (
        // mmap, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED
        "open(my $file, '+>', '/code'); truncate($file, 4096); \
         syscall(9, 0x10000000, 4096, 5, 0x11, fileno($file), 0);",
        "the container shares executable memory: /code",
    ),
    // mmap, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    ("syscall(9, 0, 65 << 30, 0, 0x4022, -1, 0);", "has reserved a great deal of address space"),
    (
        "use Socket; use Socket qw(AF_INET6 sockaddr_in6 inet_pton); \
         socket(my $door, AF_INET6, SOCK_STREAM, 6); my $address = inet_pton(AF_INET6, 'fe80::7'); \
         bind($door, sockaddr_in6(7000, $address, 1)) or die $!; listen($door, 1); \
         socket(my $client, AF_INET6, SOCK_STREAM, 6); \
         connect($client, sockaddr_in6(7000, $address, 1)) or die $!; accept(my $peer, $door);",
        "a TCP connection over a link-local address",
    ),
    (
        // inotify_init1, inotify_add_watch with IN_MODIFY; what is still there goes along
        "my ($eye, @files) = syscall(294, 0); for my $name ('/tmp/kept', '/tmp/gone') { open(my $file, '>', $name); push @files, $file; \
         my $copy = $name; syscall(254, $eye, $copy, 2) >= 0 or die; } unlink('/tmp/gone');",
        "watches what CRIU cannot find by a name (inotify)",
    ),
    (
        // The child's answer to vfork is 0, and its parent waits.
        "if (syscall(58) == 0) { READY sleep 1 while 1 }",
        "has called vfork, and its child neither starts a program nor ends",
    ),
];

/// Refused in these words, by `check` as by `migrate`, with a hint.
fn refused(host: &Host, options: &[&str], words: &str) -> Outcome {
    for verb in ["check", "migrate"] {
        let said = host.ferry(&[&[verb], options, &["box", "b"]].concat())?.exits(3)?;
        for words in [words, "hint:"] {
            ensure!(said.err.contains(words), "{verb} does not say {words:?}: {said}");
        }
    }
    Ok(())
}

fn of_programs(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    for (program, words) in PROGRAMS {
        let mut whole = program.replace("READY", READY);
        if whole == *program {
            whole = format!("{whole} {READY} sleep 1 while 1;");
        }
        let container = Container::script(&whole);
        container.make(&a)?;
        if words.contains("link-local") {
            with_link_local(&a, &container)?;
        }
        container.run_on(&a).map_err(|e| format!("{program}: {e}"))?;
        refused(&a, &[], words).map_err(|e| format!("{program}: {e}"))?;
        // Nobody has touched it.
        ensure!(facts(&a)?.containers["box"].status == "running", "{program}: it has ended");
        a.sh(
            "ferry delete -f box; rm -r /srv/shared/box/rootfs; ip netns del box 2>/dev/null || :",
        )?;
    }
    Ok(())
}

/// Gives the container a loopback with an address of that kind.
fn with_link_local(host: &Host, container: &Container) -> Outcome {
    host.sh(
        "ip netns add box; ip -n box link set lo up; ip -n box addr add fe80::7/64 dev lo nodad",
    )?;
    edit(host, container, |config| {
        let list = config["linux"]["namespaces"].as_array_mut();
        list.into_iter().flatten().filter(|entry| entry["type"] == "network").for_each(|entry| {
            entry["path"] = json!("/run/netns/box");
        });
    })
}

fn edit(host: &Host, container: &Container, change: impl FnOnce(&mut Value)) -> Outcome {
    let file = host.path(&container.bundle)?.join("config.json");
    let text = std::fs::read(&file).map_err(|e| e.to_string())?;
    let mut config = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    change(&mut config);
    std::fs::write(&file, config.to_string()).map_err(|e| e.to_string())
}

/// What the host has done with files that the container has.
fn of_files(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let container = Container::plain("stdio");
    container.make(&a)?;
    a.sh("mkdir -p /srv/shared/tied && mount --bind /srv/shared/tied /srv/shared/tied
          mount --make-shared /srv/shared/tied")?;
    edit(&a, &container, |config| {
        let bind = json!({
            "destination": "/mnt", "type": "bind", "source": "/srv/shared/tied",
            "options": ["bind", "rshared"]
        });
        config["mounts"].as_array_mut().into_iter().for_each(|list| list.push(bind.clone()));
    })?;

    container.run_on(&a)?;
    refused(&a, &[], "the mount /mnt is shared with the host, both ways")?;
    a.sh("ferry delete -f box; umount /srv/shared/tied")?;

    let log = "/srv/shared/box/log";
    container.make(&a)?;
    a.sh(&format!("ferry run -d --bundle /srv/shared/box box </dev/null >{log} 2>&1; rm {log}"))?;
    refused(&a, &[], "deleted")?;
    a.sh("ferry delete -f box")?;

    let single = container.clone().with(&["--bind", "/srv/local/hosts:/etc/hosts"]);
    single.make(&a)?;
    a.sh("echo old >/srv/local/hosts")?;
    single.run_on(&a)?;
    a.sh("echo new >/srv/local/hosts.new; mv /srv/local/hosts.new /srv/local/hosts")?;
    refused(&a, &["--volume", "/etc/hosts=copy"], "was replaced since the container was started")?;
    a.sh("ferry delete -f box")?;

    let reader = "open(my $fifo, '+<', '/fifo') or die;";
    let reader = Container::script(&format!("{reader} {READY} sleep 1 while 1;"));
    reader.make(&a)?;
    a.sh("mkfifo /srv/shared/box/rootfs/fifo")?;
    reader.run_on(&a)?;
    let outside = a.start(&["sh", "-c", "exec sleep 1000 3>/srv/shared/box/rootfs/fifo"])?;
    refused(&a, &[], "the FIFO /fifo has another end outside of the container")?;
    drop(outside);
    a.sh("ferry delete -f box; rm -r /srv/shared/box")?;

    let deep = Container::plain("stdio").at("/srv/local/box");
    deep.make(&a)?;
    a.sh("cd /srv/local/box/rootfs && mkdir -p $(seq -s / 300)")?;
    deep.run_on(&a)?;

    // There is nothing to advise.
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains("more than 256 directories in each other"), "{said}");

    Ok(())
}

/// As systemd does: the first process goes down into a group, the others into those beside.
fn of_control_groups(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let program = format!("unless (fork) {{ sleep 1 while 1 }} {READY} sleep 1 while 1;");
    let container = Container::script(&program);
    container.start(lab, &a)?;
    let pid = facts(&a)?.containers["box"].pid;
    a.sh(&format!(
        "group=$(findmnt -n -o TARGET -t cgroup2 | tail -n 1)$(grep ^0:: /proc/{pid}/cgroup | cut -d: -f3)
         mkdir $group/init $group/service
         for child in $(cat /proc/{pid}/task/{pid}/children); do
             echo $child >$group/service/cgroup.procs
         done
         echo {pid} >$group/init/cgroup.procs"
    ))?;
    refused(&a, &[], "in several control groups side by side")
}

/// Other ends, and files, that only the host has.
fn of_what_is_outside(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let plain = Container::plain("stdio");
    let file = "sysopen(OUTSIDE, \"/etc/hostname\", 0); my $fd = fileno(OUTSIDE);";
    running_with(lab, &plain, file)?;
    refused(&a, &[], "a file open that lies outside of it: /etc/hostname")?;
    a.sh("ferry delete -f box; rm -r /srv/shared/box")?;

    let pipe = "pipe(OUT, IN);
        unless (fork) { open($_, \"+<\", \"/dev/null\") for (STDIN, STDOUT, STDERR); close(OUT); sleep 1000 }
        my $fd = fileno(OUT);";
    running_with(lab, &plain, pipe)?;
    refused(&a, &[], "the container has a pipe to somebody outside of it")?;
    a.sh("ferry delete -f box; rm -r /srv/shared/box")?;

    let serve = "import os, socket, time
door = socket.socket(socket.AF_UNIX)
os.makedirs('/srv/shared/doors', exist_ok=True)
door.bind('/srv/shared/doors/new')
door.listen()
os.rename('/srv/shared/doors/new', '/srv/shared/doors/door')
guest, _ = door.accept()
guest.recv(1)";
    let server = a.start(&["python3", "-c", serve])?;

    until("it listens", LIMIT, || {
        Ok((a.exec(&["test", "-e", "/srv/shared/doors/door"])?.code == 0).then_some(()))
    })?;
    let connect = "use Socket; socket(my $s, AF_UNIX, SOCK_STREAM, 0); \
                   connect($s, sockaddr_un('/doors/door')) or die; syswrite($s, 'x') if -e '/end';";
    let program = format!("{connect} {READY} sleep 1 while 1;");
    let client = Container::script(&program).with(&["--bind", "/srv/shared/doors:/doors"]);
    client.start(lab, &a)?;

    let volume = ["--volume", "/doors=shared"];
    // From when on somebody has accepted it.
    let told = until("it is seen", LIMIT, || {
        let said = a.ferry(&["check", "box"])?;
        Ok((said.code == 3).then_some(said))
    })?;

    ensure!(told.err.contains("(python3) of this host has the other end"), "{told}");
    refused(&a, &volume, "the container has a unix connection to somebody outside of it")?;
    drop(server);
    let (_, b) = pair(lab);
    a.ferry(&["migrate", "--volume", "/doors=shared", "box", "b"])?.exits(0)?;

    exactly_one_copy(&client, &b, &a)
}

/// Memory that several have since a fork is each one's own over there, and that is told.
fn of_shared_memory(lab: &Lab) -> Outcome {
    let a = lab.host("a");
    let program = format!(
        "my $text = 'x' x (80 << 20); for (1, 2) {{ unless (fork) {{ sleep 1 while 1 }} }}
         {READY} sleep 1 while 1;"
    );
    let container = Container::script(&program);
    container.start(lab, &a)?;
    let words = "share memory since a fork, and will not over there";
    let told = until("the kernel counts it", LIMIT, || {
        let said = a.ferry(&["check", "box", "b"])?.exits(0)?;
        Ok(said.err.contains(words).then_some(said))
    })?;
    ensure!(told.err.contains("hint: see that the destination"), "{told}");

    // A limit that has room for what they share, and not for three of them; written down only now, as this host's
    // kernel may have no control of memory.
    edit(&a, &container, |config| {
        config["linux"]["resources"]["memory"] = json!({"limit": 150 << 20, "swap": 150 << 20});
    })?;
    let words = "the container's memory limit over there is less than it will have";
    refused(&a, &[], words)
}
