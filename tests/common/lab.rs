//! Hosts by `contrib/lab`, taken down when the last of their users is gone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Outcome;
use super::process::{Output, Running, run};

/// For a command of which nobody expects that it takes long.
pub const SHORT: Duration = Duration::from_secs(30);
/// For a command that migrates.
pub const LONG: Duration = Duration::from_secs(90);

/// The labs that are up, for whoever has to end before their users do.
static STANDING: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Takes down all labs that are up.
pub fn take_all_down() {
    let names = std::mem::take(&mut *STANDING.lock().unwrap_or_else(PoisonError::into_inner));
    for name in names {
        take_down(&name);
    }
}

fn take_down(name: &str) {
    if let Err(e) = run(lab(name).arg("down"), LONG).and_then(Output::ok) {
        eprintln!("the lab {name} does not go down: {e}");
    }
}

/// A set of hosts.
#[derive(Clone)]
pub struct Lab(Arc<Inner>);

struct Inner {
    name: String,
    net: String,
    down: AtomicBool,
}

fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A path in the source tree.
pub fn in_tree(path: &str) -> PathBuf {
    top().join(path)
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| top().join("target"), PathBuf::from)
}

/// The ferry under test: `FERRY_BIN`, or the release build.
pub fn ferry() -> PathBuf {
    std::env::var_os("FERRY_BIN").map_or_else(|| target().join("release/ferry"), PathBuf::from)
}

/// Where `bundles/build` has put workloads and tools.
pub fn tools() -> PathBuf {
    std::env::var_os("FERRY_BUNDLES_BIN")
        .map_or_else(|| in_tree("target/bundles/bin"), PathBuf::from)
}

fn lab(name: &str) -> Command {
    let mut command = Command::new(in_tree("contrib/lab"));
    command.arg("--state").arg(name);
    command
}

impl Lab {
    /// Whether this machine can have one.
    pub fn possible() -> Outcome {
        if !nix::unistd::geteuid().is_root() {
            return Err("a lab needs root".into());
        }
        for (program, hint) in [
            (ferry(), "cargo build --release --features faults"),
            (tools().join("ferry-probe"), "bundles/build"),
        ] {
            if !program.exists() {
                return Err(format!("no {}: run `{hint}` first", program.display()));
            }
        }
        Ok(())
    }

    /// Starts hosts; the ferry under test and the probe are in all of them.
    pub fn up(hosts: &[&'static str]) -> Outcome<Lab> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("migrate{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut command = lab(&name);
        command.arg("up").arg("--ferry").arg(ferry()).args(hosts);
        // From here on it is taken down, however far it came.
        STANDING.lock().unwrap_or_else(PoisonError::into_inner).push(name.clone());
        let mut inner = Inner { name, net: String::new(), down: AtomicBool::new(false) };
        run(&mut command, Duration::from_secs(120))?.ok()?;
        let address = run(lab(&inner.name).args(["addr", hosts[0]]), SHORT)?.ok()?;
        inner.net = address.trim().rsplit_once('.').map_or(String::new(), |a| a.0.to_owned());
        let lab = Lab(Arc::new(inner));
        let bin = lab.host(hosts[0]).path("/srv/shared/bin")?;
        std::fs::create_dir_all(&bin).map_err(|e| format!("{}: {e}", bin.display()))?;
        for tool in ["ferry-probe", "ferry-crowd", "ferry-datagrams"] {
            std::fs::copy(tools().join(tool), bin.join(tool))
                .map_err(|e| format!("{tool}: {e}"))?;
        }
        Ok(lab)
    }

    /// One of its hosts.
    pub fn host(&self, name: &'static str) -> Host {
        Host { lab: self.clone(), name }
    }

    /// An address in the hosts' network that no host has.
    pub fn address(&self, last: u8) -> String {
        format!("{}.{last}", self.0.net)
    }

    /// Runs a shell script in the namespace of the switch that all links lead to, which is the router
    /// between networks, too.
    pub fn in_switch(&self, script: &str) -> Outcome {
        let file = run(lab(&self.0.name).args(["netns", "switch"]), SHORT)?.ok()?;
        let enter = format!("--net={}", file.trim());
        run(Command::new("nsenter").args([&enter, "sh", "-euc", script]), SHORT)?.ok().map(drop)
    }

    /// One more segment, to which each of these hosts has an interface; called by two letters, as the
    /// switch knows it.
    pub fn segment(&self, name: &str, interfaces: &[(&'static str, &str)]) -> Outcome {
        self.in_switch(&format!(
            "ip link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0
             ip link set {name} up"
        ))?;
        for (host, interface) in interfaces {
            let pid = run(lab(&self.0.name).args(["pid", host]), SHORT)?.ok()?;
            self.in_switch(&format!(
                "ip link add {host}.{name} type veth peer name {interface} netns {}
                 ip link set {host}.{name} master {name} up",
                pid.trim()
            ))?;
            self.host(host).sh(&format!("ip link set {interface} up"))?;
        }
        Ok(())
    }

    /// `contrib/lab link …`.
    pub fn link(&self, arguments: &[&str]) -> Outcome {
        run(lab(&self.0.name).arg("link").args(arguments), SHORT)?.ok().map(drop)
    }

    /// `contrib/lab reboot`: a host goes down with all that is in its memory, and comes up again.
    pub fn reboot(&self, host: &str) -> Outcome {
        run(lab(&self.0.name).args(["reboot", host]), LONG)?.ok().map(drop)
    }

    /// What runs in the hosts, for the reader of a failure.
    pub fn processes(&self) -> String {
        let list = |host| {
            let mut command = lab(&self.0.name);
            command.args(["exec", host, "ps", "-eo", "pid,ppid,stat,wchan:20,args"]);
            run(&mut command, SHORT).map_or_else(|e| e, |o| o.out)
        };
        format!("a:\n{}b:\n{}", list("a"), list("b"))
    }

    /// Ends everything in it.
    pub fn down(&self) {
        self.0.down();
    }
}

impl Inner {
    fn down(&self) {
        if !self.down.swap(true, Ordering::SeqCst) {
            take_down(&self.name);
            let mut standing = STANDING.lock().unwrap_or_else(PoisonError::into_inner);
            standing.retain(|name| *name != self.name);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.down();
    }
}

/// A host.
#[derive(Clone)]
pub struct Host {
    lab: Lab,
    /// Its name.
    pub name: &'static str,
}

impl Host {
    /// A command that is run in this host.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = lab(&self.lab.0.name);
        command.args(["exec", self.name]).args(arguments);
        command
    }

    /// Runs a command to its end.
    pub fn exec(&self, arguments: &[&str]) -> Outcome<Output> {
        run(&mut self.command(arguments), LONG).map_err(|e| format!("on {}: {e}", self.name))
    }

    /// Starts a command.
    pub fn start(&self, arguments: &[&str]) -> Outcome<Running> {
        Running::start(&mut self.command(arguments))
    }

    /// Runs a shell script that has to succeed.
    pub fn sh(&self, script: &str) -> Outcome<String> {
        self.exec(&["sh", "-euc", script])?
            .ok()
            .map_err(|e| format!("on {}: {script}\n{e}", self.name))
    }

    /// `ferry …`.
    pub fn ferry(&self, arguments: &[&str]) -> Outcome<Output> {
        let mut all = vec!["ferry"];
        all.extend(arguments);
        self.exec(&all)
    }

    /// A path of the host as this process reaches it.
    pub fn path(&self, path: &str) -> Outcome<PathBuf> {
        let root = run(lab(&self.lab.0.name).args(["root", self.name]), SHORT)?.ok()?;
        Ok(Path::new(root.trim()).join(path.trim_start_matches('/')))
    }
}
