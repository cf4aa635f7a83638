//! Calls as engines make them, and the questions by which they find out what a runtime can do.

use std::fs;

use serde_json::Value;

use crate::Case;
use crate::side::Side;

pub const CASES: &[Case] = &[
    ("go_runc_reads_the_version", go_runc_reads_the_version),
    ("docker_reads_the_version", docker_reads_the_version),
    ("features_are_read", features_are_read),
    ("checkpoint_support_is_asked", checkpoint_support_is_asked),
    ("the_shim_of_containerd", the_shim_of_containerd),
    ("conmon_and_podman", conmon_and_podman),
    ("cri_o", cri_o),
];

fn version(side: &mut Side) -> String {
    let kept = side.record.len();
    let done = side.raw(["--version"]).ok();
    side.record.truncate(kept);
    done.stdout
}

/// go-runc, for containerd: the first line, and lines that begin with `commit: ` and `spec: `.
fn go_runc_reads_the_version(side: &mut Side) {
    let text = version(side);
    let mut lines = text.trim().split('\n');
    let first = lines.next().unwrap().strip_prefix("runc version ").expect("go-runc wants this");
    let named = |name: &str| {
        text.lines().filter_map(|line| line.strip_prefix(name)).map(str::to_owned).next_back()
    };
    side.record.push(format!("{first} {:?} {:?}", named("commit: "), named("spec: ")));
}

/// docker: whatever is behind the word "version", then `commit:`; the last such line counts.
fn docker_reads_the_version(side: &mut Side) {
    let text = version(side);
    let (mut name, mut version, mut commit) = ("", "", "");
    for line in text.trim().split('\n') {
        if line.contains("version") {
            name = line.split("version").next().unwrap().trim();
            version = line.split("version").last().unwrap().trim();
        } else if let Some(rest) = line.strip_prefix("commit:") {
            commit = rest.trim();
        }
    }
    assert_eq!(name, "runc");
    assert!(!version.is_empty());
    side.record.push(format!("{name} {version} {commit}"));
}

/// containerd, moby and CRI-O parse all of it as JSON.
fn features_are_read(side: &mut Side) {
    let features: Value = serde_json::from_str(&side.raw(["features"]).ok().stdout).unwrap();
    assert!(features["ociVersionMax"].is_string());
    assert!(features["linux"]["namespaces"].is_array());
}

/// podman and CRI-O: is there `checkpoint`, and does `restore` know this flag?
fn checkpoint_support_is_asked(side: &mut Side) {
    side.raw(["checkpoint", "--help"]).ok();
    let done = side.raw(["restore", "--lsm-mount-context"]).fails();
    let said = done.stdout + &done.stderr;
    assert!(
        said.contains("flag needs an argument") || said.contains("requires an argument"),
        "{said}"
    );
}

fn the_shim_of_containerd(side: &mut Side) {
    let bundle = side.bundle(&["sleep", "1000"]).display().to_string();
    let (root, log) = (side.text("ns"), side.text("log.json"));
    let (id, pid) = (side.id.clone(), side.text("init.pid"));
    let images = side.text("no-images");
    let globals = ["--root", &root, "--log", &log, "--log-format", "json"];
    fn with<'a>(globals: &[&'a str], rest: &[&'a str]) -> Vec<&'a str> {
        [globals, rest].concat()
    }

    let create = ["create", "--bundle", &bundle, "--pid-file", &pid, "--no-new-keyring", &id];
    side.raw(with(&globals, &create)).ok();
    side.raw(with(&globals, &["start", &id])).ok();
    side.raw(with(&globals, &["state", &id])).varies().ok();
    side.raw(with(&globals, &["ps", "--format", "json", &id])).varies().ok();
    side.raw(with(&globals, &["pause", &id])).ok();
    side.raw(with(&globals, &["resume", &id])).ok();
    side.raw(with(&globals, &["update", "--resources=-", &id])).stdin("{}").any();
    side.raw(with(&globals, &["events", "--stats", &id])).varies().any();

    // What fails is told by the last error in the log.
    side.raw(with(&globals, &["start", &id])).fails();
    let restore = ["restore", "--image-path", &images, "--detach", "--pid-file", &pid];
    let more = ["-no-subreaper", "--bundle", &bundle, &id];
    side.raw(with(&with(&globals, &restore), &more)).fails();
    side.raw(with(&globals, &["kill", "--all", &id, "9"])).ok();

    let start = std::time::Instant::now();
    while fs::read_to_string(side.path("ns").join(&id).join("state.json")).is_ok() {
        assert!(start.elapsed().as_secs() < 20, "it cannot be deleted");
        let kept = side.record.len();
        let gone = side.raw(with(&globals, &["delete", &id])).any().status.success();
        if !gone {
            side.record.truncate(kept);
            continue;
        }
    }

    side.raw(with(&globals, &["delete", "--force", &id])).ok();
    side.raw(with(&globals, &["state", &id])).fails();
    let log = fs::read_to_string(&log).unwrap();
    let errors: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).expect("every line of the log is JSON"))
        .filter(|line: &Value| line["level"] == "error")
        .collect();
    let last = errors.last().expect("there were errors")["msg"].to_string();
    side.record.push(last);
}

fn conmon_and_podman(side: &mut Side) {
    let bundle = side.bundle(&["sleep", "1000"]).display().to_string();
    let (id, pid) = (side.id.clone(), side.text("pidfile"));
    let log = side.text("oci-log");
    let globals = [format!("--log={log}"), "--log-format=json".into()];
    let create = ["create", "--bundle", &bundle, "--pid-file", &pid, "--no-new-keyring", &id];
    side.call(create).ok();
    side.verb("start").ok();
    side.call(globals.iter().map(String::as_str).chain(["start", &id])).fails();
    side.record_file("oci-log");

    // Without systemd this fails, in the same words.
    side.call(["--systemd-cgroup", "create", "--bundle", &bundle, "parity-other"]).any();
    side.call(["--systemd-cgroup", "delete", "--force", "parity-other"]).any();
    side.verb("pause").empty_environment().ok();
    side.verb("resume").empty_environment().ok();
    side.call(["kill", "--all", &id, "9"]).empty_environment().ok();
    side.await_status("stopped");
    side.call(["delete", "--force", &id]).empty_environment().ok();

    let images = side.text("images");
    side.call(["checkpoint", "--image-path", &images, "--work-path", &images])
        .arg("--leave-running")
        .arg("--tcp-established")
        .arg("--file-locks")
        .arg(&id)
        .fails();
}

fn cri_o(side: &mut Side) {
    side.running();
    let id = side.id.clone();
    let process = side.text("process.json");
    let text = r#"{"args":["echo","x"],"cwd":"/","env":["PATH=/bin"],"user":{"uid":0,"gid":0}}"#;
    fs::write(&process, text).unwrap();
    side.call(["exec", "--process", &process, &id]).ok();
    side.call(["update", "--resources", "-", &id]).stdin("{}").any();
    side.call(["kill", &id, "KILL"]).ok();
    side.await_status("stopped");
}
