//! Hosts in namespaces: a switch, two hosts and a client on it, containers on the hosts.
//!
//! The test process first leaves the machine's own network and mounts, so that nothing here can
//! be seen or disturbed from outside; everything is gone with the process.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ferry::sys::netns::NetNs;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

/// How long anything may take before a test fails, on a slow and busy machine, too.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Leaves the machine's namespaces. To be called before there is a second thread.
pub fn leave_the_machine() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces and must run as root"
    );
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("unshare");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("private mounts");
    mount(Some("ferry-test"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("own /run");
}

/// How a container is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    Macvlan,
    Bridge,
}

/// A switch with hosts `a` and `b` and a client.
pub struct Lab {
    name: &'static str,
    pub attachment: Attachment,
}

pub const IP4: &str = "10.77.0.5";
pub const IP6: &str = "fd77::5";
pub const MAC: &str = "02:00:00:77:00:05";

impl Lab {
    pub fn new(name: &'static str, attachment: Attachment) -> Self {
        let lab = Self { name, attachment };
        for who in ["sw", "a", "b", "c"] {
            lab.ip(&format!("netns add {}", lab.named(who)));
            lab.ip(&format!("-n {} link set lo up", lab.named(who)));
        }

        lab.at("sw", "link add br0 type bridge mcast_snooping 0");
        lab.at("sw", "link set br0 up");
        for (number, who) in [(1, "a"), (2, "b"), (3, "c")] {
            let peer = lab.named(who);
            lab.at("sw", &format!("link add port-{who} type veth peer name eth0 netns {peer}"));
            lab.at("sw", &format!("link set port-{who} master br0 up"));
            lab.at(who, "link set eth0 up");
            if attachment == Attachment::Bridge && who != "c" {
                lab.at(who, "link add br0 type bridge mcast_snooping 0");
                lab.at(who, "link set br0 up");
                lab.at(who, "link set eth0 master br0");
            } else {
                lab.at(who, &format!("address add 10.77.0.10{number}/24 dev eth0"));
                lab.at(who, &format!("address add fd77::10{number}/64 dev eth0 nodad"));
            }
        }

        // Until the kernel has seen to a carrier, which a busy machine puts off, frames are dropped.
        wait_until("the lab's links to be up", || {
            ["sw", "a", "b", "c"].iter().all(|w| lab.is_up(w))
        });

        lab
    }

    fn is_up(&self, who: &str) -> bool {
        let links = self.json(who, "link show up");
        let links = links.as_array().into_iter().flatten();
        links.filter(|l| l["ifname"] != "lo").all(|l| l["operstate"] == "UP")
    }

    /// The name of a namespace of this lab.
    pub fn named(&self, who: &str) -> String {
        format!("{}-{who}", self.name)
    }

    pub fn path(&self, who: &str) -> PathBuf {
        Path::new("/run/netns").join(self.named(who))
    }

    pub fn ns(&self, who: &str) -> NetNs {
        NetNs::open(&self.path(who)).expect("a namespace of the lab")
    }

    fn ip(&self, arguments: &str) {
        run(Command::new("ip").args(arguments.split_whitespace()));
    }

    /// `ip` inside a namespace.
    pub fn at(&self, who: &str, arguments: &str) {
        self.ip(&format!("-n {} {arguments}", self.named(who)));
    }

    /// `ip -j` inside a namespace.
    pub fn json(&self, who: &str, arguments: &str) -> Value {
        let ns = self.named(who);
        let arguments = arguments.split_whitespace();
        let out = run(Command::new("ip").args(["-j", "-d", "-n", &ns]).args(arguments));
        match out.trim() {
            "" => Value::Array(Vec::new()),
            text => serde_json::from_str(text).expect("JSON of ip"),
        }
    }

    /// The ports of the switch on which a hardware address was learned.
    pub fn learned_at(&self, mac: &str) -> Vec<String> {
        let ns = self.named("sw");
        let out = run(Command::new("bridge").args(["-j", "-n", &ns, "fdb", "show", "br", "br0"]));
        let list: Value = serde_json::from_str(&out).expect("JSON of bridge");
        let entries = list.as_array().cloned().unwrap_or_default();
        let of = entries.iter().filter(|e| e["mac"] == mac);
        of.filter_map(|e| e["ifname"].as_str().map(str::to_owned)).collect()
    }

    /// A plain container on host `a`, as [`IP4`] and [`IP6`].
    pub fn container(&self, who: &str) -> NetNs {
        let name = self.named(who);
        self.ip(&format!("netns add {name}"));
        match self.attachment {
            // Kernels before 6.15 do not make it as `eth0` where host `a` has one.
            Attachment::Macvlan => {
                self.at(
                    "a",
                    &format!(
                        "link add link eth0 name new0 address {MAC} netns {name} \
                         type macvlan mode bridge"
                    ),
                );
                self.at(who, "link set new0 name eth0");
            }
            Attachment::Bridge => {
                self.at(
                    "a",
                    &format!(
                        "link add v-{who} type veth peer name eth0 address {MAC} netns {name}"
                    ),
                );
                self.at("a", &format!("link set v-{who} master br0 up"));
            }
        }

        self.at(who, "link set lo up");
        self.at(who, "link set eth0 up");
        self.at(who, &format!("address add {IP4}/24 dev eth0"));
        self.at(who, &format!("address add {IP6}/64 dev eth0 nodad"));
        wait_until("the container's link to be up", || {
            self.json(who, "link show dev eth0")[0]["operstate"] == "UP"
        });

        self.ns(who)
    }

    /// A counter of `/proc/net/snmp` in a namespace: `Tcp`, `RetransSegs`.
    pub fn counter(&self, who: &str, group: &str, name: &str) -> u64 {
        let text = self
            .ns(who)
            .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
            .expect("the namespace")
            .expect("snmp");
        let mut lines = text.lines().filter_map(|l| l.strip_prefix(group)?.strip_prefix(": "));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let at = names.split(' ').position(|n| n == name).expect("a counter of this name");
        values.split(' ').nth(at).and_then(|v| v.parse().ok()).expect("a number")
    }
}

/// A connection between two namespaces, the server's end first.
pub fn connect(server: &NetNs, client: &NetNs, ip: IpAddr) -> (TcpStream, TcpStream) {
    let listener = server.run(|| TcpListener::bind((ip, 0))).expect("server").expect("bind");
    let to: SocketAddr = listener.local_addr().expect("an address");
    let near = client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("client");
    let near = near.expect("a connection");
    let far = listener.accept().expect("a connection").0;
    for stream in [&near, &far] {
        stream.set_nodelay(true).expect("nodelay");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    }
    (far, near)
}

pub fn run(command: &mut Command) -> String {
    let out = command.output().expect("the command is installed");
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// Waits for a condition, not for a time.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
