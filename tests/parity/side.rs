//! One side of a comparison: a runtime with a place of its own, and a record of what it did.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

/// No call of a runtime takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Nothing of this suite's own environment reaches the runtime.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One side: runc, or ferry in its place.
pub struct Side {
    program: PathBuf,
    dir: tempfile::TempDir,
    /// The container's ID. The same on both sides, which run one after the other; different
    /// from test to test, because it names a cgroup.
    pub id: String,
    /// What was done and what came of it: the two sides' records must be equal.
    pub record: Vec<String>,
    bundled: bool,
}

/// What a call did.
pub struct Done {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Side {
    pub fn new(program: &Path, id: &str) -> Side {
        let dir = tempfile::Builder::new().prefix("parity").tempdir().unwrap();
        Side { program: program.into(), dir, id: id.into(), record: Vec::new(), bundled: false }
    }

    /// A place of this side.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Makes a bundle whose root is this host's, read-only, and that runs `args`.
    pub fn bundle(&mut self, args: &[&str]) -> PathBuf {
        let args = json!(args);
        self.bundle_with(|config| config["process"]["args"] = args)
    }

    /// Makes a bundle and lets the test change its configuration.
    pub fn bundle_with(&mut self, change: impl FnOnce(&mut Value)) -> PathBuf {
        let bundle = self.path("bundle");
        let rootfs = bundle.join("rootfs");
        if !self.bundled {
            fs::create_dir_all(&rootfs).unwrap();
            let bind = MsFlags::MS_BIND;
            mount(Some("/"), &rootfs, None::<&str>, bind, None::<&str>).unwrap();
            self.bundled = true;
        }
        let _ = fs::remove_file(bundle.join("config.json"));
        let spec = Command::new("runc").arg("spec").current_dir(&bundle).output().unwrap();
        assert!(spec.status.success(), "{}", String::from_utf8_lossy(&spec.stderr));
        let path = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["process"]["terminal"] = json!(false);
        config["root"] = json!({"path": "rootfs", "readonly": true});
        // Test hosts may have a cgroup without controllers.
        config["linux"].as_object_mut().unwrap().remove("resources");
        change(&mut config);
        fs::write(&path, config.to_string()).unwrap();
        bundle
    }

    /// A call with `--root` of this side in front.
    pub fn call<A: AsRef<OsStr>>(&mut self, arguments: impl IntoIterator<Item = A>) -> Call<'_> {
        let mut call = self.raw(["--root"]);
        call.arguments.push(call.side.path("root").into());
        call.arguments.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        call
    }

    /// A call with just these arguments.
    pub fn raw<A: AsRef<OsStr>>(&mut self, arguments: impl IntoIterator<Item = A>) -> Call<'_> {
        Call {
            arguments: arguments.into_iter().map(|a| a.as_ref().to_owned()).collect(),
            stdin: Vec::new(),
            shell: None,
            cwd: self.dir.path().into(),
            empty_environment: false,
            varies: false,
            side: self,
        }
    }

    /// `verb` on this side's container.
    pub fn verb(&mut self, verb: &str) -> Call<'_> {
        let id = self.id.clone();
        self.call([verb, &id])
    }

    /// Creates and starts a container that runs until it is killed.
    pub fn running(&mut self) {
        self.bundle(&["sleep", "1000"]);
        self.run_detached();
    }

    pub fn run_detached(&mut self) {
        let (bundle, id) = (self.text("bundle"), self.id.clone());
        self.call(["run", "--detach", "--bundle", &bundle, &id]).ok();
    }

    /// Waits until the container has this status.
    pub fn await_status(&mut self, wanted: &str) {
        let start = Instant::now();
        while self.status().as_deref() != Some(wanted) {
            assert!(start.elapsed() < LIMIT, "the container never got {wanted}");
            std::thread::yield_now();
        }
    }

    /// The container's status as runc itself sees it, which is not recorded.
    pub fn status(&self) -> Option<String> {
        let state = Command::new("runc")
            .arg("--root")
            .arg(self.path("root"))
            .args(["state", &self.id])
            .stderr(Stdio::null())
            .output()
            .unwrap();
        let state: Value = serde_json::from_slice(&state.stdout).ok()?;
        state["status"].as_str().map(str::to_owned)
    }

    /// Puts the content of a file into the record.
    pub fn record_file(&mut self, name: &str) -> String {
        let content = fs::read_to_string(self.path(name)).unwrap_or_else(|why| why.to_string());
        let clean = self.clean(&content);
        self.record.push(format!("{name}: {clean}"));
        content
    }

    /// A text without what differs between any two runs of the same program.
    fn clean(&self, text: &str) -> String {
        without_times(&text.replace(&self.dir.path().display().to_string(), "DIR"))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let root = self.path("root");
        if root.exists() {
            let _ = Command::new("runc")
                .arg("--root")
                .arg(&root)
                .args(["delete", "--force", &self.id])
                .stderr(Stdio::null())
                .status();
        }
        if self.bundled {
            let _ = umount2(&self.path("bundle/rootfs"), MntFlags::MNT_DETACH);
        }
    }
}

/// A call of the runtime in the making.
pub struct Call<'a> {
    side: &'a mut Side,
    arguments: Vec<OsString>,
    stdin: Vec<u8>,
    shell: Option<&'static str>,
    cwd: PathBuf,
    empty_environment: bool,
    varies: bool,
}

impl Call<'_> {
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    pub fn stdin(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.stdin = bytes.as_ref().to_owned();
        self
    }

    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = dir.into();
        self
    }

    /// Without PATH or anything else, as podman calls some verbs.
    pub fn empty_environment(mut self) -> Self {
        self.empty_environment = true;
        self
    }

    /// Started by a line of shell, which ends in `exec "$@"`.
    pub fn shell(mut self, line: &'static str) -> Self {
        self.shell = Some(line);
        self
    }

    /// The output has process IDs and the like: numbers do not count.
    pub fn varies(mut self) -> Self {
        self.varies = true;
        self
    }

    /// It must succeed on both sides.
    pub fn ok(self) -> Done {
        self.code(0)
    }

    /// It must exit with this code on both sides.
    pub fn code(self, code: i32) -> Done {
        self.ends(|status| status.code() == Some(code), &format!("exit code {code}"))
    }

    /// It must fail on both sides.
    pub fn fails(self) -> Done {
        self.ends(|status| status.code().is_some_and(|code| code != 0), "failure")
    }

    /// However it ends, it must end so on both sides.
    pub fn any(self) -> Done {
        self.ends(|_| true, "anything")
    }

    fn ends(self, expected: impl Fn(ExitStatus) -> bool, words: &str) -> Done {
        let (what, varies) = (format!("{:?}", self.arguments), self.varies);
        let (out, err) = (self.output_file("out"), self.output_file("err"));
        let mut child = self.start(Stdio::from(create(&out)), Stdio::from(create(&err))).unwrap();
        let side = self.side;
        let status = wait(&mut child, &what);
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
        let done = Done { status, stdout: read(&out), stderr: read(&err) };
        assert!(
            expected(status),
            "{} {what}: expected {words}, got {status}\n{}{}",
            side.program.display(),
            done.stdout,
            done.stderr
        );

        let clean = |text: &str| {
            let text = side.clean(text);
            if varies { without_numbers(&text) } else { text }
        };
        let entry = format!(
            "{}\n{status}, signal {:?}\nstdout: {}\nstderr: {}",
            side.clean(&what),
            status.signal(),
            clean(&done.stdout),
            clean(&done.stderr)
        );

        side.record.push(entry);
        done
    }

    /// Started and left to the test, with pipes; nothing is recorded.
    pub fn spawn(self) -> Child {
        self.start(Stdio::piped(), Stdio::piped()).unwrap()
    }

    /// A file and not a pipe: a detached container keeps it open after the runtime's end.
    fn output_file(&self, kind: &str) -> PathBuf {
        self.side.path(&format!("{}.{kind}", self.side.record.len()))
    }

    fn start(&self, stdout: Stdio, stderr: Stdio) -> std::io::Result<Child> {
        let program = &self.side.program;
        let mut command = match self.shell {
            Some(line) => {
                let mut shell = Command::new("/bin/sh");
                shell.args(["-c", line, "sh"]).arg(program);
                shell
            }
            None => {
                let mut command = Command::new(program);
                // It is in messages; under ferry, runc is called by its name.
                command.arg0("runc");
                command
            }
        };
        command.args(&self.arguments).env_clear().current_dir(&self.cwd);
        if !self.empty_environment {
            command.env("PATH", PATH).env("FERRY_STATE", self.side.path("state"));
        }
        let mut stdin = tempfile::tempfile()?;
        stdin.write_all(&self.stdin)?;
        std::io::Seek::rewind(&mut stdin)?;
        command.stdin(stdin).stdout(stdout).stderr(stderr).spawn()
    }
}

fn create(path: &Path) -> File {
    File::create(path).unwrap()
}

/// Waits for a child, but not for ever.
pub fn wait(child: &mut Child, what: &str) -> ExitStatus {
    let (ended, end) = mpsc::channel::<()>();
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let watchdog = std::thread::spawn(move || {
        let late = end.recv_timeout(LIMIT).is_err();
        if late {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL);
        }
        late
    });
    let status = child.wait().unwrap();
    let _ = ended.send(());
    assert!(!watchdog.join().unwrap(), "{what} did not end within {LIMIT:?}");
    status
}

/// Every RFC 3339 time becomes TIME.
fn without_times(text: &str) -> String {
    let bytes = text.as_bytes();
    let is_time = |at: usize| {
        b"dddd-dd-ddTdd:dd:dd".iter().enumerate().all(|(i, &shape)| {
            bytes.get(at + i).is_some_and(|&byte| match shape {
                b'd' => byte.is_ascii_digit(),
                shape => byte == shape,
            })
        })
    };

    let mut clean = String::new();
    let mut rest = 0;
    let mut at = 0;
    while at < bytes.len() {
        if !is_time(at) {
            at += 1;
            continue;
        }
        clean.push_str(&text[rest..at]);
        clean.push_str("TIME");
        at += 19;
        while bytes.get(at).is_some_and(|b| b.is_ascii_digit() || b".Z+:".contains(b)) {
            at += 1;
        }
        rest = at;
    }

    clean.push_str(&text[rest..]);
    clean
}

/// Every number becomes N, and tables lose the padding that went with it.
fn without_numbers(text: &str) -> String {
    let mut clean = String::new();
    for c in text.chars() {
        match c {
            c if c.is_ascii_digit() && clean.ends_with('N') => {}
            c if c.is_ascii_digit() => clean.push('N'),
            ' ' if clean.ends_with(' ') => {}
            c => clean.push(c),
        }
    }
    clean
}
