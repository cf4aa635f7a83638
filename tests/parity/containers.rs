//! Containers from creation to deletion.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::Case;
use crate::side::{Side, wait};

pub const CASES: &[Case] = &[
    ("life_of_a_container", life_of_a_container),
    ("wrong_state", wrong_state),
    ("exit_codes", exit_codes),
    ("standard_input", standard_input),
    ("exec_in_a_container", exec_in_a_container),
    ("pause_and_resume", pause_and_resume),
    ("lists_and_processes", lists_and_processes),
    ("update_and_events", update_and_events),
    ("signals_to_a_foreground_run", signals_to_a_foreground_run),
    ("killed_in_the_foreground", killed_in_the_foreground),
    ("descriptors_are_passed_on", descriptors_are_passed_on),
    ("working_directory", working_directory),
    ("consoles", consoles),
    ("checkpoint_and_restore", checkpoint_and_restore),
    ("flags_behind_the_id", flags_behind_the_id),
    ("calls_without_a_path", calls_without_a_path),
];

fn life_of_a_container(side: &mut Side) {
    let bundle = side.bundle(&["sleep", "1000"]).display().to_string();
    let (pid_file, id) = (side.text("pid"), side.id.clone());
    side.call(["create", "--bundle", &bundle, "--pid-file", &pid_file, &id]).ok();
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    assert!(kill(Pid::from_raw(pid), None).is_ok(), "the pid file names a living process");
    let state = side.verb("state").varies().ok();
    let state: serde_json::Value = serde_json::from_str(&state.stdout).unwrap();
    assert_eq!(state["status"], "created");
    assert_eq!(state["pid"], pid);
    side.verb("start").ok();
    let state = side.verb("state").varies().ok();
    assert!(state.stdout.contains("\"running\""), "{}", state.stdout);
    side.call(["kill", &id, "KILL"]).ok();
    side.await_status("stopped");
    side.verb("state").varies().ok();
    side.verb("delete").ok();
    side.verb("state").fails();
}

/// It must fail, and leave things as if it had never been tried.
fn wrong_state(side: &mut Side) {
    let bundle = side.bundle(&["sleep", "1000"]).display().to_string();
    let id = side.id.clone();
    side.call(["create", "--bundle", &bundle, &id]).ok();
    side.call(["create", "--bundle", &bundle, &id]).fails();
    side.call(["exec", &id, "true"]).any();
    side.verb("resume").fails();
    side.verb("start").ok();
    side.verb("start").fails();
    side.verb("delete").fails();
    side.call(["run", "--bundle", &bundle, &id]).fails();
    assert_eq!(side.status().as_deref(), Some("running"));
    side.call(["kill", &id, "NONSENSE"]).fails();
    side.call(["kill", &id, "9"]).ok();
    side.await_status("stopped");
    side.verb("start").fails();
    side.call(["kill", &id, "TERM"]).any();
    side.call(["exec", &id, "true"]).fails();
    side.verb("pause").fails();
    side.verb("ps").any();
    side.call(["delete", "-f", &id]).ok();
}

fn exit_codes(side: &mut Side) {
    let id = side.id.clone();
    for code in [0, 1, 42, 255] {
        let bundle = side.bundle(&["sh", "-c", &format!("echo out; echo err >&2; exit {code}")]);
        side.call(["run", "--bundle"]).arg(bundle).arg(&id).code(code);
    }
    let bundle = side.bundle(&["sh", "-c", "kill -KILL $$"]);
    side.call(["run", "--bundle"]).arg(bundle).arg(&id).any();
    let bundle = side.bundle(&["/nonexistent"]);
    side.call(["run", "-b"]).arg(bundle).arg(&id).fails();
    let bundle = side.bundle_with(|config| config["root"]["path"] = json!("/nonexistent"));
    side.call(["create", "-b"]).arg(&bundle).arg(&id).fails();
    std::fs::write(bundle.join("config.json"), "{").unwrap();
    side.call(["create", "-b"]).arg(bundle).arg(&id).fails();
}

fn standard_input(side: &mut Side) {
    let id = side.id.clone();
    let all: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    let bundle = side.bundle(&["sha256sum"]);
    side.call(["run", "--bundle"]).arg(bundle).arg(&id).stdin(&all).ok();
    side.running();
    side.call(["exec", &id, "cat"]).stdin("to exec\n").ok();
    side.call(["exec", &id, "sha256sum"]).stdin(&all).ok();
    side.call(["exec", &id, "cat"]).stdin("").ok();
    // Not `head -c 3` of more than a pipe holds: runc then passes its own SIGPIPE on to the
    // container, which ends in 0 or 141 as it happens.
}

fn exec_in_a_container(side: &mut Side) {
    side.running();
    let id = side.id.clone();
    side.call(["exec", &id, "sh", "-c", "echo out; echo err >&2; exit 9"]).code(9);
    side.call(["exec", "--cwd", "/usr", "--env", "A=b", &id, "sh", "-c", "pwd; echo $A"]).ok();
    side.call(["exec", "-e", "A=b=c", "--user=0:0", &id, "env"]).ok();
    side.call(["exec", &id, "sh", "-c", "kill -TERM $$"]).any();
    side.call(["exec", &id, "/nonexistent"]).fails();
    side.call(["exec", "--cwd", "/nonexistent", &id, "true"]).any();
    side.call(["exec", &id]).fails();
    // Behind the ID, everything is the container's.
    side.call(["exec", &id, "echo", "--ferry-runtime", "x", "--version", "migrate"]).ok();
    side.call(["exec", &id, "--", "echo", "x"]).any();
    let process = side.path("process.json");
    let json = json!({"args": ["sh", "-c", "echo from process; exit 3"], "cwd": "/",
                      "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}});
    std::fs::write(&process, json.to_string()).unwrap();
    side.call(["exec", "--process"]).arg(&process).arg(&id).code(3);
    side.call(["exec", "--process", "/nonexistent", &id]).fails();
    let pid = side.text("exec.pid");
    side.call(["exec", "--detach", "--pid-file", &pid, &id, "sleep", "1000"]).ok();
    assert!(std::fs::read_to_string(pid).unwrap().parse::<i32>().is_ok());
}

fn pause_and_resume(side: &mut Side) {
    side.running();
    side.verb("resume").fails();
    side.verb("pause").ok();
    side.verb("state").varies().ok();
    assert_eq!(side.status().as_deref(), Some("paused"));
    side.verb("pause").fails();
    let id = side.id.clone();
    side.call(["exec", &id, "true"]).fails();
    side.verb("delete").fails();
    side.verb("resume").ok();
    assert_eq!(side.status().as_deref(), Some("running"));
}

fn lists_and_processes(side: &mut Side) {
    side.running();
    let id = side.id.clone();
    side.call(["list"]).varies().ok();
    side.call(["list", "-q"]).ok();
    side.call(["list", "--format", "json"]).varies().ok();
    side.verb("ps").varies().ok();
    side.call(["ps", "--format", "json", &id]).varies().ok();
    side.call(["ps", &id, "-o", "comm"]).any();
    side.call(["ps", "--format=nonsense", &id]).fails();
}

fn update_and_events(side: &mut Side) {
    side.running();
    let id = side.id.clone();
    side.call(["update", "--resources=-", &id]).stdin("{}").any();
    side.call(["update", "--resources", "-", &id]).stdin("{\"pids\": {\"limit\": 100}}").any();
    side.call(["update", "-r", "-", &id]).stdin("{").fails();
    side.call(["update", "--memory", "nonsense", &id]).fails();
    side.call(["update", "--pids-limit", "100", &id]).any();
    side.call(["update", "--resources", "/nonexistent", &id]).fails();
    side.call(["events", "--stats", &id]).varies().any();
    side.call(["events", "--interval", "0s", &id]).fails();
}

fn foreground(side: &mut Side) -> (std::process::Child, BufReader<std::process::ChildStdout>) {
    // `wait` lets the trap run at once.
    let script = "trap 'echo told; exit 7' TERM HUP; echo ready; sleep 1000 & wait";
    let bundle = side.bundle(&["sh", "-c", script]);
    let id = side.id.clone();
    let mut child = side.call(["run", "--bundle"]).arg(bundle).arg(&id).spawn();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, out)
}

/// Whoever started us knows our process ID and signals it.
fn signals_to_a_foreground_run(side: &mut Side) {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let (mut child, mut out) = foreground(side);
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let status = wait(&mut child, "run");
        // First this: were the container still running, its output would never end.
        assert_eq!(status.code(), Some(7), "{signal} must reach the container");
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "told\n", "{signal}");
        side.record.push(format!("{signal}: {status} {rest}"));
    }
}

fn killed_in_the_foreground(side: &mut Side) {
    let (mut child, _out) = foreground(side);
    child.kill().unwrap();
    let status = wait(&mut child, "run");
    side.record.push(format!("{status}; the container is {:?}", side.status()));
}

fn descriptors_are_passed_on(side: &mut Side) {
    let id = side.id.clone();
    std::fs::write(side.path("three"), "this was descriptor 3\n").unwrap();
    let bundle = side.bundle(&["sh", "-c", "cat <&3; echo $LISTEN_FDS $LISTEN_PID"]);
    side.call(["run", "--preserve-fds", "1", "--bundle"])
        .arg(&bundle)
        .arg(&id)
        .shell("exec 3<three; exec \"$@\"")
        .ok();
    // systemd's protocol: the variable names the process, so it must still be the same one.
    let done = side
        .call(["run", "--bundle"])
        .arg(&bundle)
        .arg(&id)
        .shell("exec 3<three; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"")
        .ok();
    assert!(done.stdout.contains("descriptor 3"), "{}{}", done.stdout, done.stderr);
    side.call(["run", "--preserve-fds=9", "--bundle"]).arg(&bundle).arg(&id).any();
}

fn working_directory(side: &mut Side) {
    let id = side.id.clone();
    let bundle = side.bundle(&["pwd"]);
    side.call(["run", &id]).cwd(&bundle).ok();
    side.call(["run", "--bundle", "bundle", &id]).ok();
    side.raw(["--root", "root2", "run", "--pid-file", "p", "-b", "bundle", &id]).ok();
    assert!(side.path("p").exists(), "paths are taken from where the caller is");
}

fn consoles(side: &mut Side) {
    let id = side.id.clone();
    let bundle = side.bundle_with(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["args"] = json!(["sleep", "1000"]);
    });
    side.call(["create", "-b"]).arg(&bundle).arg(&id).fails();
    side.call(["run", "-d", "-b"]).arg(&bundle).arg(&id).fails();
    side.call(["create", "--console-socket", "/nonexistent", "-b"]).arg(&bundle).arg(&id).fails();
    let socket = UnixListener::bind(side.path("console")).unwrap();
    let path = side.text("console");
    side.call(["create", "--console-socket", &path, "-b"]).arg(&bundle).arg(&id).ok();
    let (mut sender, _) = socket.accept().unwrap();
    let mut name = Vec::new();
    sender.read_to_end(&mut name).unwrap();
    assert!(!name.is_empty(), "the terminal was sent");
    side.record.push(format!("console {}", String::from_utf8_lossy(&name)));
    let bundle = side.bundle(&["true"]);
    side.call(["create", "--console-socket", &path, "-b"]).arg(&bundle).arg(&id).fails();
}

fn checkpoint_and_restore(side: &mut Side) {
    // CRIU cannot take along a standard stream that is a file outside of the container.
    let bundle = side.bundle(&["sh", "-c", "exec sleep 1000 </dev/null >/dev/null 2>&1"]);
    side.run_detached();
    await_command(side, "sleep");
    let (id, images, work) = (side.id.clone(), side.text("images"), side.text("work"));
    let dump = ["checkpoint", "--image-path", &images, "--work-path", &work];
    let restore = ["restore", "-d", "-image-path", &images, "--work-path", &work, "-no-subreaper"];
    side.call(dump).arg("--parent-path").arg("/absolute").arg(&id).fails();
    side.call(dump).arg("--manage-cgroups-mode=nonsense").arg(&id).fails();

    side.call(dump).arg("--leave-running").arg(&id).ok();
    assert_eq!(side.status().as_deref(), Some("running"));
    std::fs::remove_dir_all(&images).unwrap();
    side.call(dump).arg(&id).ok();
    assert_eq!(side.status(), None);
    side.call(restore).arg("--bundle").arg(&bundle).arg(&id).ok();
    assert_eq!(side.status().as_deref(), Some("running"));
    side.verb("ps").varies().ok();
    side.call(restore).arg("--bundle").arg(&bundle).arg(&id).fails();

    side.call(["kill", &id, "KILL"]).ok();
    side.await_status("stopped");
    side.call(dump).arg(&id).fails();
    side.verb("delete").ok();

    // Not one that is nowhere: runc would make it.
    let empty = side.text("empty");
    side.call(["restore", "-d", "--image-path", &empty, "-b"]).arg(&bundle).arg(&id).fails();
}

/// Waits until the container's first process is this program.
fn await_command(side: &Side, name: &str) {
    let start = std::time::Instant::now();
    loop {
        let output = std::process::Command::new("runc")
            .arg("--root")
            .arg(side.path("root"))
            .args(["exec", &side.id, "cat", "/proc/1/comm"])
            .output()
            .unwrap();
        if output.stdout.trim_ascii() == name.as_bytes() {
            return;
        }
        assert!(start.elapsed().as_secs() < 20, "the container never became {name}");
    }
}

fn flags_behind_the_id(side: &mut Side) {
    let bundle = side.bundle(&["sleep", "1000"]).display().to_string();
    let (id, pid) = (side.id.clone(), side.text("pid"));
    side.call(["create", &id, "--bundle", &bundle, "-pid-file", &pid]).any();
    side.call(["kill", &id, "KILL", "--all"]).any();
    side.call(["delete", &id, "--force"]).any();
}

/// podman calls these with an empty environment.
fn calls_without_a_path(side: &mut Side) {
    side.running();
    let id = side.id.clone();
    side.verb("state").empty_environment().varies().ok();
    side.verb("pause").empty_environment().ok();
    side.verb("resume").empty_environment().ok();
    side.call(["kill", &id, "9"]).empty_environment().ok();
    side.await_status("stopped");
    side.verb("delete").empty_environment().ok();
}
