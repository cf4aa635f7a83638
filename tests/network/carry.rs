//! Capture, preflight, re-create, announce, dismantle.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;

use ferry::network;
use ferry::network::image::LinkKind;
use ferry::network::{
    NetworkImage, Placement, Problem, announce, capture, capture_at, fence, recreate,
};
use ferry::sys::netns::NetNs;
use serde_json::{Value, json};

use crate::lab::{Attachment, IP4, IP6, Lab, MAC, PATIENCE, wait_until};

/// As it arrives on the other side.
fn over_the_wire(image: &NetworkImage) -> NetworkImage {
    let text = serde_json::to_string(image).expect("an image can be written");
    let image: NetworkImage = serde_json::from_str(&text).expect("and read");
    image.validate().expect("and is valid");
    image
}

/// What differs between two equal networks.
fn normal(mut value: Value) -> Value {
    const OF_THE_PLACE: [&str; 10] = [
        "ifindex",
        "link",
        "link_index",
        "link_netnsid",
        "operstate",
        "used",
        "confirmed",
        "updated",
        "probes",
        "tentative",
    ];
    match &mut value {
        Value::Array(list) => list.iter_mut().for_each(|v| *v = normal(v.take())),
        Value::Object(map) => {
            map.retain(|key, _| !OF_THE_PLACE.contains(&key.as_str()));
            map.values_mut().for_each(|v| *v = normal(v.take()));
        }
        _ => {}
    }
    value
}

fn sysctl(ns: &NetNs, path: &str) -> String {
    let path = format!("/proc/sys/net/{path}");
    ns.run(|| std::fs::read_to_string(&path)).expect("the namespace").expect("a parameter")
}

fn set_sysctl(ns: &NetNs, path: &str, value: &str) {
    let path = format!("/proc/sys/net/{path}");
    ns.run(|| std::fs::write(&path, value)).expect("the namespace").expect("a parameter");
}

const SYSCTLS: [(&str, &str); 9] = [
    ("ipv4/ip_unprivileged_port_start", "80"),
    ("ipv4/ip_local_port_range", "20000\t30000"),
    ("ipv4/tcp_keepalive_time", "77"),
    ("ipv4/ping_group_range", "0\t5"),
    ("core/somaxconn", "321"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/eth0/arp_notify", "1"),
    ("ipv6/conf/eth0/accept_ra", "0"),
    ("ipv4/neigh/eth0/gc_stale_time", "99"),
];

fn furnish(lab: &Lab, ns: &NetNs) {
    for command in [
        "link set eth0 mtu 1400",
        "link set eth0 txqueuelen 555",
        "address add 10.77.0.6/24 dev eth0",
        "address add 192.0.2.7/32 dev lo",
        "address add 10.78.0.5/16 broadcast 10.78.255.255 label eth0:x dev eth0",
        "address add 10.79.0.1 peer 10.79.0.2/32 dev eth0",
        "address add fd78::5/64 dev eth0 nodad noprefixroute",
        "route add default via 10.77.0.1 metric 50",
        "route add 198.51.100.0/24 via 10.77.0.2 src 10.77.0.6 mtu 1300 advmss 1200",
        "route add 203.0.113.0/24 dev eth0 scope link table 100",
        "route add blackhole 198.18.0.0/15",
        "route add 192.0.2.128/25 via inet6 fd77::1 dev eth0",
        "-6 route add default via fd77::1 metric 77",
        "-6 route add 2001:db8::/32 via fd77::2 table 100",
        "-6 route add prohibit 2001:db8:1::/48",
        "-6 route del fd77::/64 dev eth0",
        "-6 route add fd77::/64 dev eth0 metric 300",
        "rule add from 10.77.0.6 table 100 priority 1000",
        "rule add fwmark 0x7 iif eth0 table 100 priority 1001",
        "-6 rule add to 2001:db8::/32 table 100 priority 1000",
        "rule del priority 32767",
        "neigh add 10.77.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
        "neigh add fd77::1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
    ] {
        lab.at("web", command);
    }

    for (path, value) in SYSCTLS {
        set_sysctl(ns, path, value);
    }
    tc(lab, "web", "qdisc add dev eth0 root handle 1: tbf rate 800mbit burst 100kb latency 70ms");
    tc(lab, "web", "qdisc add dev eth0 parent 1:1 handle 20: pfifo limit 77");
    tc(lab, "web", "qdisc add dev lo root bfifo limit 5000");

    // Without filters it does nothing, and stays behind.
    tc(lab, "web", "qdisc add dev eth0 clsact");
}

fn tc(lab: &Lab, who: &str, arguments: &str) -> String {
    let mut command = std::process::Command::new("tc");
    crate::lab::run(command.args(["-n", &lab.named(who)]).args(arguments.split_whitespace()))
}

/// Queueing disciplines that somebody has chosen.
fn queues(lab: &Lab, who: &str) -> Vec<String> {
    let all = tc(lab, who, "qdisc show");
    let chosen = all.lines().filter(|l| !l.contains("clsact") && !l.contains(" 0: "));
    let mut list: Vec<_> = chosen.map(|l| l.trim().to_owned()).collect();
    list.sort();
    list
}

fn described(lab: &Lab, who: &str) -> Vec<(&'static str, Value)> {
    [
        "link show",
        "address show",
        "route show table all",
        "-6 route show table all",
        "rule show",
        "-6 rule show",
        "neigh show nud permanent",
    ]
    .map(|command| {
        let mut value = normal(lab.json(who, command));
        // The order of routes in a dump is that of their making.
        if let (true, Value::Array(list)) = (command.contains("route"), &mut value) {
            list.sort_by_key(|v| v.to_string());
        }
        (command, value)
    })
    .into()
}

/// Lifetimes run on, and neighbours come and go.
fn timeless(mut image: NetworkImage) -> NetworkImage {
    image.neighbours.retain(|n| n.permanent);
    image.routes.iter_mut().for_each(|r| r.expires = None);
    image.routes.sort_by_key(|r| format!("{r:?}"));
    image
}

pub fn round_trip(name: &'static str, attachment: Attachment) {
    let lab = Lab::new(name, attachment);
    let source = lab.container("web");
    furnish(&lab, &source);

    // Only then are its routes all there.
    wait_until("the source's addresses to be settled", || {
        !lab.json("web", "address show").to_string().contains("tentative")
    });
    let image = over_the_wire(&capture(&source, &lab.ns("a")).expect("a captured network"));

    let path = lab.path("copy");
    let mut made =
        recreate(&image, &Placement::Auto, &path, &lab.ns("b")).expect("a network made again");
    made.keep();
    let copy = NetNs::open(&path).expect("the copy has a name");
    for ((what, before), (_, after)) in described(&lab, "web").iter().zip(described(&lab, "copy")) {
        let lines = |v: &Value| v.as_array().cloned().unwrap_or_default();
        let (before, after) = (lines(before), lines(&after));
        let lost: Vec<_> = before.iter().filter(|l| !after.contains(l)).collect();
        let new: Vec<_> = after.iter().filter(|l| !before.contains(l)).collect();
        assert_eq!(lost, new, "ip {what}");
        assert_eq!(before, after, "the order of ip {what}");
    }

    let queued = queues(&lab, "web");
    assert!(queued.len() == 3 && queued.iter().any(|q| q.contains("rate 800Mbit")), "{queued:?}");
    assert_eq!(queues(&lab, "copy"), queued, "queueing disciplines");
    let addresses = lab.json("copy", "address show").to_string();
    assert!(!addresses.contains("tentative"), "no address waits for an answer that cannot come");
    for (path, _) in SYSCTLS {
        assert_eq!(sysctl(&copy, path), sysctl(&source, path), "{path}");
    }

    let again = capture(&copy, &lab.ns("b")).expect("the copy can be captured");
    // The other end of a cable has an address of its own on every host.
    let (again, image) = (anonymous(timeless(again)), anonymous(timeless(image)));
    assert_eq!(again.routes, image.routes);
    assert_eq!(again.sysctls, image.sysctls);
    assert_eq!(again, image, "a second migration carries the same");
    assert_eq!(fence::is_raised(&copy), Ok(true));
}

pub fn other_placement() {
    let lab = Lab::new("opl", Attachment::Bridge);
    let source = lab.container("web");
    let image = over_the_wire(&capture(&source, &lab.ns("a")).expect("a captured network"));
    // A host without a bridge: the client's namespace will do.
    let (path, host) = (lab.path("copy"), lab.ns("c"));
    let placement = Placement::Macvlan("eth0".into());
    let _made = recreate(&image, &placement, &path, &host).expect("a macvlan of a veth");
    let link = &lab.json("copy", "link show dev eth0")[0];
    assert_eq!(link["linkinfo"]["info_kind"], "macvlan");
    assert_eq!(link["address"], MAC);
    let path = lab.path("lonely");
    let _made = recreate(&image, &Placement::None, &path, &host).expect("no network");
    assert_eq!(lab.json("lonely", "link show").as_array().map(Vec::len), Some(1));
}

/// From one host to the other, with the eyes of a client and of the switch.
pub fn hand_over(name: &'static str, attachment: Attachment) {
    let lab = Lab::new(name, attachment);
    let (a, b, client) = (lab.ns("a"), lab.ns("b"), lab.ns("c"));
    let source = lab.container("web");
    lab.at("c", &format!("neigh replace {IP4} lladdr 02:00:00:00:00:99 dev eth0 nud stale"));
    lab.at("c", &format!("neigh replace {IP6} lladdr 02:00:00:00:00:99 dev eth0 nud stale"));
    let image = over_the_wire(&capture(&source, &a).expect("a captured network"));

    announce(&source, &image).expect("an announcement");
    wait_until("the switch to learn the source's port", || lab.learned_at(MAC) == ["port-a"]);
    let path = lab.path("copy");
    let mut made = recreate(&image, &Placement::Auto, &path, &b).expect("a network made again");
    let announcer = network::Announcer::prepare(made.namespace(), &image).expect("an announcer");
    let replay = network::Replay::prepare(made.namespace(), &image).expect("a replay");
    let mut kept = network::Capture::prepare(&source, &image).expect("a capture");
    let mut source_fence = fence::arm(&source).expect("a fence");
    kept.start().expect("started");

    source_fence.close(fence::FenceSide::Both).expect("a closed fence");
    assert_eq!(lab.learned_at(MAC), ["port-a"], "nothing has come out of the copy so far");
    let server = made.namespace().run(|| TcpListener::bind((IP4, 80))).expect("namespace");
    let server = server.expect("a server on the copy");
    let datagrams = made.namespace().run(|| UdpSocket::bind((IP4, 81))).expect("namespace");
    let datagrams = datagrams.expect("a server on the copy");
    datagrams.set_read_timeout(Some(PATIENCE)).expect("timeout");
    lab.at("c", &format!("neigh replace {IP4} lladdr {MAC} dev eth0 nud stale"));

    let send = || UdpSocket::bind("0.0.0.0:0")?.send_to(b"to the source", (IP4, 81));
    client.run(send).expect("client").expect("send");
    let mut frames = Vec::new();
    wait_until("the datagram", || kept.read(&mut frames).expect("read") > 0);
    lab.at("c", &format!("neigh replace {IP4} lladdr 02:00:00:00:00:99 dev eth0 nud stale"));

    made.fence().expect("a fence").open().expect("an open fence");
    announcer.announce().expect("an announcement");
    made.keep();
    frames.iter().for_each(|f| replay.inject(f).expect("inject"));
    let mut got = [0; 64];
    assert_eq!(datagrams.recv(&mut got).expect("what the source kept"), 13);

    let known = |ip: &str| lab.json("c", &format!("neigh show {ip}"))[0]["lladdr"] == MAC;
    wait_until("the client to learn IPv4", || known(IP4));
    wait_until("the client to learn IPv6", || known(IP6));
    assert_eq!(lab.learned_at(MAC), ["port-b"]);

    network::dismantle(&source, Some(&lab.path("web")), Some(&image)).expect("dismantled");
    assert!(!lab.path("web").exists());
    let left = lab.json("a", "link show type veth");
    assert_eq!(left.as_array().map(Vec::len), Some(1), "only the host's own link is left");
    let to = (IP4.parse::<IpAddr>().expect("an address"), 80).into();
    let stream = client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("client");
    let mut stream = stream.expect("the copy answers");
    stream.write_all(b"hello").expect("write");

    let mut got = [0; 5];
    server.accept().expect("accept").0.read_exact(&mut got).expect("read");
    assert_eq!(&got, b"hello");
}

/// The copy is held for so long that its kernel has forgotten the neighbours and asks for them in vain:
/// when the fence opens, its first words arrive.
pub fn hold(name: &'static str, attachment: Attachment) {
    const NOBODY: &str = "10.77.0.77";
    let lab = Lab::new(name, attachment);
    let source = lab.container("web");
    let mac = lab.json("c", "link show dev eth0")[0]["address"].clone();
    let clients = ["10.77.0.103", "fd77::103"];
    for client in clients {
        let mac = mac.as_str().expect("an address");
        lab.at("web", &format!("neigh replace {client} lladdr {mac} dev eth0 nud stale"));
    }

    let image = over_the_wire(&capture(&source, &lab.ns("a")).expect("a captured network"));
    let path = lab.path("copy");
    let mut made =
        recreate(&image, &Placement::Auto, &path, &lab.ns("b")).expect("a network made again");
    let neighbours = network::Neighbours::prepare(made.namespace(), &image).expect("neighbours");
    let fence = made.take_fence().expect("a fence");
    let mut gate = network::ReleaseSet { fence, lead: None, neighbours: Some(neighbours) };

    let state = |ip: &str| lab.json("copy", &format!("neigh show {ip}"))[0]["state"][0].clone();
    let say = |ip: &str| {
        let ip: IpAddr = ip.parse().expect("an address");
        let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let send = || UdpSocket::bind(any)?.send_to(b"hello", (ip, 81));
        made.namespace().run(send).expect("namespace").expect("send");
    };

    for ip in clients.into_iter().chain([NOBODY]) {
        // As the kernel does it when the cable is pulled.
        lab.at("copy", &format!("neigh replace {ip} dev eth0 nud failed"));
        lab.at("copy", &format!("neigh del {ip} dev eth0"));
        say(ip);
        assert_eq!(state(ip), "INCOMPLETE", "{ip}");
    }

    let servers = clients.map(|ip| {
        let ip: IpAddr = ip.parse().expect("an address");
        let server = lab.ns("c").run(|| UdpSocket::bind((ip, 81))).expect("client");
        server.expect("a server on the client")
    });

    gate.open().expect("an open gate");
    for (ip, server) in clients.into_iter().zip(servers) {
        say(ip);
        server.set_nonblocking(true).expect("not blocking");
        // What is sent to a neighbour that is known is there when the call returns.
        assert_eq!(server.recv(&mut [0; 8]).ok(), Some(5), "{ip} is {}", state(ip));
    }
    assert_eq!(lab.json("copy", &format!("neigh show {NOBODY}")), json!([]));
}

/// With the spanning tree protocol a new port is deaf and dumb at first.
pub fn spanning_tree() {
    let lab = Lab::new("stp", Attachment::Bridge);
    let source = lab.container("web");
    let image = capture(&source, &lab.ns("a")).expect("a captured network");
    lab.at("b", "link set br0 type bridge stp_state 1 forward_delay 200");
    let path = lab.path("copy");
    let _made = recreate(&image, &Placement::Auto, &path, &lab.ns("b")).expect("made");
    let port = &lab.json("b", "link show dev v-web")[0];
    assert_eq!(port["linkinfo"]["info_slave_data"]["state"], "forwarding");
}

pub fn keep() {
    let lab = Lab::new("kp", Attachment::Bridge);
    let source = lab.container("web");
    let image = capture(&source, &lab.ns("a")).expect("a captured network");
    let (path, host) = (lab.path("web"), lab.ns("a"));
    assert!(network::preflight(&image, &Placement::Keep, &path, &host).is_empty());
    let made = recreate(&image, &Placement::Keep, &path, &host).expect("kept");
    assert_eq!(fence::is_raised(&source), Ok(true));
    made.undo().expect("undone");
    assert_eq!(fence::state(&source), Ok(fence::FenceState::Absent));
    assert!(path.exists(), "what was there stays");

    lab.at("web", &format!("address del {IP4}/24 dev eth0"));
    let problem = recreate(&image, &Placement::Keep, &path, &host).expect_err("not the same");
    assert!(problem.why.contains(IP4), "{problem}");
}

pub fn rollback() {
    for attachment in [Attachment::Macvlan, Attachment::Bridge] {
        let name = if attachment == Attachment::Macvlan { "rbm" } else { "rbb" };
        let lab = Lab::new(name, attachment);
        let source = lab.container("web");
        let image = capture(&source, &lab.ns("a")).expect("a captured network");
        let (path, host) = (lab.path("copy"), lab.ns("b"));
        let before = lab.json("b", "link show");
        let clean = |what: &str| {
            assert!(!path.exists(), "{what}: the namespace has a name");
            let names = |v: &Value| {
                let list = v.as_array().cloned().unwrap_or_default();
                list.iter().map(|l| l["ifname"].clone()).collect::<Vec<_>>()
            };
            assert_eq!(names(&lab.json("b", "link show")), names(&before), "{what}");
        };

        drop(recreate(&image, &Placement::Auto, &path, &host).expect("made"));
        clean("dropped");

        let mut bad = serde_json::to_value(&image).expect("JSON");
        bad["sysctls"] = json!([{"path": "ipv4/no_such", "value": "1", "changed": true}]);
        let bad: NetworkImage = serde_json::from_value(bad).expect("an image");
        recreate(&bad, &Placement::Auto, &path, &host).expect_err("no such parameter");
        clean("no such parameter");

        let mut bad = image.clone();
        bad.routes.iter_mut().for_each(|r| r.gateway = "192.0.2.99".parse().ok());
        bad.routes.retain(|r| !r.v6);
        recreate(&bad, &Placement::Auto, &path, &host).expect_err("no such gateway");
        clean("no such gateway");

        let nowhere = Placement::Bridge("nowhere".into());
        let problem = recreate(&image, &nowhere, &path, &host).expect_err("no such bridge");
        assert!(problem.hint.contains("--network bridge"), "{problem}");
        clean("no such bridge");

        // And the second try succeeds.
        drop(recreate(&image, &Placement::Auto, &path, &host).expect("made"));
    }
}

pub fn capture_refuses() {
    let lab = Lab::new("crf", Attachment::Bridge);
    let source = lab.container("web");
    let host = lab.ns("a");
    let refused = |what: &str| {
        let problem = capture(&source, &host).expect_err(what);
        assert!(!problem.hint.is_empty(), "{problem}");
        assert!(problem.to_string().contains(what), "{what}: {problem}");
    };

    lab.at("a", "link set v-web nomaster");
    refused("is on no bridge");
    lab.at("a", "link set v-web master br0");
    capture(&source, &host).expect("mended");

    lab.at("web", "link add tunnel type vxlan id 7 dstport 4789 remote 10.77.0.1 dev eth0");
    refused("vxlan");
    lab.at("web", "link del tunnel");
    lab.at("web", "route add 192.0.2.0/24 nexthop via 10.77.0.1 nexthop via 10.77.0.2");
    refused("several next hops");
    lab.at("web", "route del 192.0.2.0/24");

    let web = lab.named("web");
    let nft = |rule: &str| {
        crate::lab::run(std::process::Command::new("ip").args(["netns", "exec", &web, "nft", rule]))
    };

    // What iptables leaves behind when its rules have gone filters nothing.
    nft("add table inet mine");
    nft("add chain inet mine in { type filter hook input priority 0; policy accept; }");
    nft("add chain inet mine user");
    capture(&source, &host).expect("empty tables are no rules");
    nft("add rule inet mine user counter");
    refused("packet filter");

    let problem = capture_at(&source, &host, Some(&lab.path("web"))).expect_err("a rule");
    assert!(problem.hint.contains(&format!("ip netns exec {web} nft")), "{problem}");
    nft("flush chain inet mine user");
    nft("add chain inet mine in { policy drop; }");
    refused("packet filter");
    nft("delete table inet mine");
    for (add, delete, what) in [
        (
            "qdisc add dev eth0 root handle 1: htb",
            "qdisc del dev eth0 root",
            "discipline htb of eth0",
        ),
        ("qdisc add dev eth0 ingress", "qdisc del dev eth0 ingress", "discipline ingress of eth0"),
    ] {
        tc(&lab, "web", add);
        if what.contains("ingress") {
            capture(&source, &host).expect("nothing is filtered");
            let all = "match u32 0 0 flowid :1";
            tc(&lab, "web", &format!("filter add dev eth0 ingress protocol ip u32 {all}"));
        }
        refused(what);
        let problem = capture_at(&source, &host, Some(&lab.path("web"))).expect_err(what);
        assert!(problem.hint.contains(&format!("ip netns exec {web} tc {delete}")), "{problem}");
        tc(&lab, "web", delete);
    }

    let problem = capture(&host, &host).expect_err("the host itself");
    assert!(problem.what.contains("host's network"));

    // A parent in a third place: seen from here the container hangs on nothing.
    let problem = capture(&source, &lab.ns("b")).expect_err("another host");
    assert!(problem.why.contains("not on this host"), "{problem}");
    capture(&source, &host).expect("all mended");
}

/// The kernel that the suites run on has all of it, and asking is cheap.
pub fn usable() {
    let began = std::time::Instant::now();
    assert_eq!(network::usable::missing(), []);
    println!("asked in {:?}", began.elapsed());
    // What is missing is named, with a word on how to come by it.
    let without = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("own mounts");
        let (none, flags) = (None::<&str>, nix::mount::MsFlags::empty());
        nix::mount::mount(Some("empty"), "/dev/net", Some("tmpfs"), flags, none).expect("no tun");
        network::usable::missing()
    });
    let found = without.join().expect("no panic");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].what.contains("/dev/net/tun") && !found[0].hint.is_empty(), "{found:?}");
}

pub fn bad_peer() {
    let lab = Lab::new("bdp", Attachment::Bridge);
    let source = lab.container("web");
    let image = capture(&source, &lab.ns("a")).expect("a captured network");
    let good = serde_json::to_value(&image).expect("JSON");
    let eth0 = image.links.iter().position(|l| l.name == "eth0").expect("eth0");
    let refused = |pointer: &str, value: Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = value.clone();
        // What the types do not even take is refused as well.
        let Ok(bad) = serde_json::from_value::<NetworkImage>(bad) else { return };
        let problem: Problem = bad.validate().expect_err(&format!("{pointer} = {value}"));
        assert!(!problem.hint.is_empty());
        let path = lab.path("copy");
        recreate(&bad, &Placement::Auto, &path, &lab.ns("b")).expect_err("not valid");
        assert!(!Path::new(&path).exists());
    };

    let link = format!("/links/{eth0}");
    for name in ["", "a/b", "..", ".", "sixteen-bytes-xx", "a b", "eth%d", "eth0:1", "lo"] {
        refused(&format!("{link}/name"), json!(name));
    }
    refused(&format!("{link}/kind/veth/bridge"), json!("../br0"));
    refused(&format!("{link}/kind/veth/host_ifname"), json!("x/y"));
    refused(&format!("{link}/kind"), json!({"macvlan": {"mode": 16, "parent": "eth0"}}));
    for mtu in [0, 67, 65_537, u32::MAX] {
        refused(&format!("{link}/mtu"), json!(mtu));
    }

    for mac in [json!([1, 0, 0, 0, 0, 1]), json!([0, 0, 0, 0, 0, 0]), json!(null), json!([2])] {
        refused(&format!("{link}/mac"), mac);
    }
    refused(&format!("{link}/txqlen"), json!(u32::MAX));
    refused(&format!("{link}/addresses/0/prefix"), json!(129));
    refused(&format!("{link}/addresses/0/label"), json!("a/b"));
    for name in ["../../../kernel/core_pattern", "", "a/b", "..", "x.y"] {
        refused(&format!("{link}/sysctls/0/name"), json!(name));
    }

    refused(&format!("{link}/sysctls/0/value"), json!("1\n2"));
    refused(&format!("{link}/sysctls/0/value"), json!("1".repeat(5000)));
    for path in ["ipv4/../../kernel/core_pattern", "kernel/core_pattern", "/ipv4/x", "ipv4//x"] {
        refused("/sysctls/0/path", json!(path));
    }

    refused("/routes/0/link", json!("eth7"));
    refused("/routes/0/table", json!(255));
    refused("/routes/0/destination", json!("not an address"));
    refused("/rules/0/attributes", json!([[5, [1, 2, 3, 4]]]));
    refused("/rules/0/attributes", json!([[15, vec![0; 100]]]));
    refused("/version", json!(99));

    let many = |value: &Value, n: usize| Value::Array(vec![value.clone(); n]);
    refused("/links", many(&good["links"][eth0], 65));
    refused("/links", many(&good["links"][eth0], 2));
    refused("/routes", many(&good["routes"][0], 5000));
    refused("/rules", many(&good["rules"][0], 2000));
    refused("/sysctls", many(&good["sysctls"][0], 2000));
    refused(&format!("{link}/addresses"), many(&good["links"][eth0]["addresses"][0], 2000));
}

pub fn preflight_finds(name: &'static str, attachment: Attachment) {
    let lab = Lab::new(name, attachment);
    let source = lab.container("web");
    let image = capture(&source, &lab.ns("a")).expect("a captured network");
    let (path, host) = (lab.path("copy"), lab.ns("b"));
    let look = |placement: &Placement| network::preflight(&image, placement, &path, &host);
    let auto = Placement::Auto;
    assert_eq!(look(&auto), [], "the container itself answers, which is right");

    let found = look(&Placement::Bridge("nowhere".into()));
    assert!(found.iter().any(|p| p.why.contains("no bridge nowhere")), "{found:?}");
    let found = network::preflight(&image, &auto, &lab.path("web"), &host);
    assert!(found.iter().any(|p| p.fatal && p.hint.contains("--network keep")), "{found:?}");

    let device = if attachment == Attachment::Macvlan { "eth0" } else { "br0" };
    if attachment == Attachment::Macvlan {
        lab.at("b", "link set eth0 mtu 1300");
        assert!(look(&auto).iter().any(|p| p.fatal && p.why.contains("MTU")));
        lab.at("b", "link set eth0 mtu 1500");
    }

    lab.at("b", &format!("link set {device} down"));
    assert!(look(&auto).iter().any(|p| p.fatal && p.why.contains("is down")));
    lab.at("b", &format!("link set {device} up"));
    lab.at("b", &format!("address add {IP4}/32 dev lo"));
    assert!(look(&auto).iter().any(|p| p.fatal && p.why.contains("has it itself")));
    lab.at("b", &format!("address del {IP4}/32 dev lo"));

    lab.at("c", &format!("address add {IP4}/24 dev eth0"));
    wait_until("the stranger to be found", || {
        look(&auto).iter().any(|p| p.fatal && p.why.contains("stranger"))
    });
    lab.at("c", &format!("address del {IP4}/24 dev eth0"));
    lab.at("web", &format!("address del {IP4}/24 dev eth0"));

    let found = look(&auto);
    assert!(found.iter().any(|p| !p.fatal && p.what.contains("may not be reachable")), "{found:?}");
    assert!(found.iter().all(|p| !p.fatal), "{found:?}");
}

fn anonymous(mut image: NetworkImage) -> NetworkImage {
    for link in &mut image.links {
        if let LinkKind::Veth { host_mac, .. } = &mut link.kind {
            *host_mac = [0; 6];
        }
    }
    image
}
