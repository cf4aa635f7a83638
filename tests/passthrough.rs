//! The pass-through against a made-up runtime: needs no root and no runc.
//!
//! The runtime is a shell script that writes down all that a process can know of how it was
//! started. It is started directly and through ferry, and must see the same.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ferry::migration::journal::away::AwayMark;

const FERRY: &str = env!("CARGO_BIN_EXE_ferry");

/// Prints argv, environment, descriptors, signal dispositions, working directory, umask and
/// standard input; exits 42.
const PROBE: &str = r#"#!/bin/sh
for word in "$0" "$@"; do printf '<%s>\n' "$word"; done
tr '\0' '\n' </proc/$$/environ | grep -av ^_=
for fd in /proc/$$/fd/*; do
    case $(readlink "$fd") in
    */bin/runc) ;;
    pipe:*) echo "${fd##*/} a pipe" ;;
    *) echo "${fd##*/} $(readlink "$fd")" ;;
    esac
done
# Not by another program: dash blocks signals while it starts one.
while read -r line; do case $line in SigIgn*|SigBlk*) echo "$line";; esac; done </proc/$$/status
pwd
umask
[ -e /proc/$$/fd/0 ] && cat
echo to-stderr >&2
exit 42
"#;

/// A directory with a runtime in it.
struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    fn new() -> Stage {
        let stage = Stage { dir: tempfile::tempdir().unwrap() };
        stage.script("bin/runc", PROBE);
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A command in an environment that this test alone has made.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let bin = self.path("bin");
        command
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
            .env("FERRY_STATE", self.path("state"))
            .current_dir(self.dir.path());
        command
    }

    fn ferry(&self) -> Command {
        self.command(FERRY)
    }

    fn mark(&self, root: &str) {
        let mark = AwayMark {
            id: "web".parse().expect("an ID"),
            runtime_root: root.into(),
            destination: "host2".into(),
            migrated_at: "2026-03-01T12:00:00Z".into(),
            migration_id: "m1".into(),
            named: None,
        };
        mark.write(&self.path("state")).unwrap();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn seen(output: &Output) -> (Option<i32>, String, String) {
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_runtime_sees_the_same_world() {
    let stage = Stage::new();
    let not_text = OsString::from_vec(b"\xff\xfe \n".to_vec());

    // Each line of shell sets up something that a caller may have set up.
    for setting in [
        "",
        "trap '' PIPE;",
        "trap '' HUP TERM;",
        "umask 027;",
        "exec 7</dev/null;",
        "exec <&-;",
        "exec <&- 9>/dev/null;",
        "echo hello |",
    ] {
        let start = |program: &Path| {
            let line = format!("{setting} exec \"$@\"");
            stage
                .command("/bin/sh")
                .args(["-c", &line, "sh"])
                .arg(program)
                .args(["--root", "/r", "-log=x", "state", "", "--", "-"])
                .arg(&not_text)
                .env("ODD", &not_text)
                .output()
                .unwrap()
        };
        let direct = start(&stage.path("bin/runc"));
        let through = start(Path::new(FERRY));
        assert_eq!(direct.status.code(), Some(42), "{setting} {}", text(&direct.stderr));
        assert_eq!(seen(&through), seen(&direct), "{setting}");
    }
}

#[test]
fn the_runtime_is_found_as_documented() {
    let stage = Stage::new();
    for name in ["by-flag", "by-variable", "by-file", "bin/in-path"] {
        stage.script(name, &format!("#!/bin/sh\necho {name} \"$*\"\n"));
    }
    let config = stage.path("config.toml");
    let by_file = stage.path("by-file").display().to_string();
    fs::write(&config, format!("later = 1\nruntime = \"{by_file}\"\n")).unwrap();
    let run = |variable: Option<&str>, flag: &[&str]| {
        let mut ferry = stage.ferry();
        ferry.env("FERRY_CONFIG", &config);
        if let Some(variable) = variable {
            ferry.env("FERRY_RUNTIME", variable);
        }
        text(&ferry.args(flag).args(["ps", "x"]).output().unwrap().stdout)
    };
    assert_eq!(run(None, &[]), "by-file ps x\n");
    assert_eq!(run(Some("./by-variable"), &[]), "by-variable ps x\n");
    assert_eq!(run(Some("in-path"), &[]), "bin/in-path ps x\n");
    assert_eq!(run(Some("in-path"), &["--ferry-runtime", "./by-flag"]), "by-flag ps x\n");
    assert_eq!(run(Some("in-path"), &["-ferry-runtime=./by-flag"]), "by-flag ps x\n");
}

#[test]
fn errors_about_the_runtime_help() {
    let stage = Stage::new();
    let fails = |command: &mut Command, exit: i32, words: &[&str]| {
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{said}");
        for word in words.iter().chain(&["hint: "]) {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    let bare = || {
        let mut ferry = stage.ferry();
        ferry.env("PATH", "/nonexistent:.:bin").arg("list");
        ferry
    };
    fails(&mut bare(), 127, &["runc is not in /nonexistent:.:bin", "install runc"]);
    fails(bare().env("FERRY_RUNTIME", "crun"), 127, &["crun is not in"]);
    fails(bare().env("FERRY_RUNTIME", "/nonexistent/crun"), 127, &["/nonexistent/crun"]);
    fails(bare().env("FERRY_RUNTIME", "/etc/passwd"), 126, &["cannot be executed"]);
    fails(bare().env("FERRY_RUNTIME", FERRY), 126, &["ferry itself"]);
    fails(bare().env("FERRY_CONFIG", "/nonexistent"), 126, &["FERRY_CONFIG"]);
    fs::write(stage.path("bad.toml"), "\nruntime = crun\n").unwrap();
    fails(bare().env("FERRY_CONFIG", stage.path("bad.toml")), 126, &["wrong in line 2"]);
}

/// Engines want a runtime that is named runc, and may find ferry under that name.
#[test]
fn ferry_under_the_name_of_runc_finds_the_real_one() {
    let stage = Stage::new();
    fs::create_dir(stage.path("front")).unwrap();
    fs::create_dir(stage.path("copy")).unwrap();
    symlink(FERRY, stage.path("front/runc")).unwrap();
    fs::copy(FERRY, stage.path("copy/runc")).unwrap();
    for first in ["front/runc", "copy/runc"] {
        let dirs = ["front", "copy", "bin"].map(|dir| stage.path(dir).display().to_string());
        let path = format!("{}:/usr/bin:/bin", dirs.join(":"));
        let output =
            stage.command(stage.path(first)).env("PATH", path).arg("list").output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{first}: {}", text(&output.stderr));
    }
}

#[test]
fn our_lines_come_after_the_runtimes() {
    let stage = Stage::new();
    stage.script("bin/runc", "#!/bin/sh\nprintf 'runc version 1.0\\ncommit: a\\nspec: 1.2\\n'\n");
    let version = text(&stage.ferry().arg("--version").output().unwrap().stdout);
    let own = concat!("ferry: ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(version, format!("runc version 1.0\ncommit: a\nspec: 1.2\n{own}"));
    let help = text(&stage.ferry().arg("--help").output().unwrap().stdout);
    assert!(help.starts_with("runc version"), "{help}");
    assert!(help.contains("FERRY COMMANDS") && help.contains("migrate"), "{help}");
    assert!(!help.contains("__guard"), "{help}");
    stage.script("bin/runc", "#!/bin/sh\necho no >&2; exit 9\n");
    let failed = stage.ferry().arg("--version").output().unwrap();
    assert_eq!((failed.status.code(), text(&failed.stdout)), (Some(9), String::new()));
}

#[test]
fn version_and_help_need_no_runtime() {
    let stage = Stage::new();
    for (flag, ours) in [("--version", "ferry: "), ("--help", "FERRY COMMANDS")] {
        let told = stage.ferry().env("PATH", "/nowhere").arg(flag).output().unwrap();
        assert_eq!(told.status.code(), Some(0), "{flag}");
        assert!(text(&told.stdout).starts_with(ours), "{}", text(&told.stdout));
        assert!(text(&told.stderr).contains("no container runtime"), "{}", text(&told.stderr));
    }
    let other = stage.ferry().env("PATH", "/nowhere").args(["list"]).output().unwrap();
    assert_eq!((other.status.code(), text(&other.stdout)), (Some(127), String::new()));
}

#[test]
fn a_container_that_left_is_not_started() {
    let stage = Stage::new();
    stage.mark("/r");
    for verb in ["create", "start", "run", "restore"] {
        let call = |root: &str, id: &str| {
            stage.ferry().args(["--root", root, verb, "-b", "web", id]).output().unwrap()
        };
        let refused = call("/r", "web");
        assert_eq!(refused.status.code(), Some(1), "{verb}");
        assert!(refused.stdout.is_empty());
        let said = text(&refused.stderr);
        assert!(said.starts_with("time=\"20") && said.contains(" level=error msg=\""), "{said}");
        assert!(said.contains("migrated to host2 on 2026-03-01T12:00:00Z"), "{said}");
        assert!(said.contains("`ferry --root /r resolve web --keep`"), "{said}");
        assert_eq!(call("/r", "web2").status.code(), Some(42));
        assert_eq!(call("/other", "web").status.code(), Some(42));
    }
    // All else concerns what is left of it here.
    for verb in ["delete", "kill", "state"] {
        let output = stage.ferry().args(["--root", "/r", verb, "web"]).output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{verb}");
    }
}

/// containerd and docker take the last error of log.json, podman the same.
#[test]
fn refusals_are_in_the_log_where_engines_look() {
    let stage = Stage::new();
    stage.mark("/r");
    let log = stage.path("log.json");
    fs::write(&log, "{\"level\":\"info\",\"msg\":\"before\"}\n").unwrap();
    let output = stage
        .ferry()
        .args(["--root", "/r", "--log"])
        .arg(&log)
        .args(["--log-format", "json", "start", "web"])
        .output()
        .unwrap();
    let lines = fs::read_to_string(&log).unwrap();
    let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(lines.lines().count(), 2);
    assert_eq!(last["level"], "error");
    let message = last["msg"].as_str().unwrap();
    assert!(message.starts_with("container web was migrated to host2"), "{message}");
    // As runc does, the bare message goes to stderr then.
    assert_eq!(text(&output.stderr), format!("{message}\n"));
}

#[test]
fn a_wrong_line_for_our_verbs_is_in_the_log_too() {
    let stage = Stage::new();
    let log = stage.path("log");
    let output = stage.ferry().arg("--log").arg(&log).args(["migrate", "web"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("Usage:"));
    let logged = fs::read_to_string(&log).unwrap();
    assert!(logged.contains("level=error") && logged.contains("DESTINATION"), "{logged}");
}
