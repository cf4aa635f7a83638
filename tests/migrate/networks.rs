//! Every kind of network that a container can have, there and back under clients.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::{exactly_one_copy, facts, pair};
use crate::common::lab::{Host, Lab};
use crate::common::probe::{Probe, verify_inside};
use crate::common::process::write_script;
use crate::common::suite::in_lab;
use crate::common::wire::Wire;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(60);
const CONNECTIONS: usize = 6;

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("networks::loopback_only", LIMIT, loopback_only),
        in_lab("networks::unnamed_macvlan", LIMIT, unnamed_macvlan),
        in_lab("networks::unnamed_bridge_two_links", LIMIT, unnamed_bridge),
        in_lab("networks::routed", LIMIT, routed),
        in_lab("networks::routed_is_refused", LIMIT, routed_is_refused),
        in_lab("networks::routed_after_failures", 2 * LIMIT, |lab| {
            survives_failures(lab, &start_routed(lab)?)
        }),
        in_lab("networks::unnamed_after_failures", 2 * LIMIT, |lab| {
            survives_failures(lab, &start_unnamed_macvlan(lab)?)
        }),
        in_lab("networks::hook_moves_a_route", LIMIT, hook_moves_a_route),
        in_lab("networks::hook_refuses", LIMIT, hook_refuses),
    ]
}

/// The container's second address, of IPv6, is the first's in the lab's other network.
pub fn v6(lab: &Lab, last: u8) -> String {
    let net = lab.address(0);
    let number = net.split('.').nth(2).unwrap_or_default();
    format!("fd77:{number}::{last}")
}

/// Both families under load while the container goes there and back.
fn to_and_fro(lab: &Lab, container: &Container) -> Outcome {
    to_and_fro_as(lab, container, [&lab.address(ADDRESS), &v6(lab, ADDRESS)], "auto")
}

fn to_and_fro_as(lab: &Lab, container: &Container, [ip, ip6]: [&str; 2], network: &str) -> Outcome {
    let (a, b) = pair(lab);
    let wire = Wire::watch(lab)?;
    let mut probe = Probe::to(lab, &format!("{ip}:7000"), CONNECTIONS)?;
    let mut other = Probe::to(lab, &format!("[{ip6}]:7000"), CONNECTIONS)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        from.ferry(&["migrate", "--network", network, "box", to.name])?.exits(0)?;
        probe.is_content()?;
        other.is_content()?;
        exactly_one_copy(container, to, from)?;
    }
    wire.is_calm(2 * CONNECTIONS)
}

/// A namespace that the runtime has made, with nothing but `lo` in it: also what `none` stands for.
fn loopback_only(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::plain("counter");
    container.start(lab, &a)?;
    let inside = |host: &Host| -> Outcome<String> {
        let pid = facts(host)?.containers["box"].pid;
        host.sh(&format!("nsenter -t {pid} -n ip -o address | cut -d' ' -f2-7"))
    };
    let pid = facts(&a)?.containers["box"].pid;
    a.sh(&format!("nsenter -t {pid} -n ip address add 192.0.2.7/32 dev lo"))?;
    let before = inside(&a)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        verify_inside(to, &container)?;
        let after = inside(to)?;
        ensure!(after == before, "{before}\nhas become\n{after}");
    }
    Ok(())
}

/// Starts a counter on `a` in a namespace of the runtime's own, and then puts links into it.
fn unnamed(lab: &Lab, script: &str) -> Outcome<Container> {
    let a = lab.host("a");
    let container = Container::plain("counter").with(&["--arg", "--listen", "--arg", "[::]:7000"]);
    container.make(&a)?;
    container.run_on(&a)?;
    let pid = facts(&a)?.containers["box"].pid;
    a.sh(&script.replace("PID", &pid.to_string()))?;
    Ok(container)
}

fn start_unnamed_macvlan(lab: &Lab) -> Outcome<Container> {
    let (ip, ip6) = (lab.address(ADDRESS), v6(lab, ADDRESS));
    unnamed(
        lab,
        &format!(
            "ip link add link eth0 name box0 netns PID type macvlan mode bridge
             nsenter -t PID -n sh -euc '
                 ip link set box0 name eth0
                 ip addr add {ip}/24 dev eth0
                 ip addr add {ip6}/64 dev eth0 nodad
                 ip link set eth0 up'"
        ),
    )
}

fn unnamed_macvlan(lab: &Lab) -> Outcome {
    let container = start_unnamed_macvlan(lab)?;
    to_and_fro(lab, &container)?;
    // It has no more of a name than it had.
    let names = lab.host("b").sh("ls /run/netns 2>/dev/null || true")?;
    ensure!(names.trim().is_empty(), "a name is left: {names}");
    Ok(())
}

/// Two veths, as an engine or CNI puts them in, on bridges of the hosts.
fn unnamed_bridge(lab: &Lab) -> Outcome {
    let (ip, ip6) = (lab.address(ADDRESS), v6(lab, ADDRESS));
    for host in ["a", "b"] {
        lab.host(host).sh("
            ip link add br0 type bridge mcast_snooping 0
            ip link add br1 type bridge mcast_snooping 0
            addr=$(ip -o -4 addr show eth0 | awk '{print $4}')
            addr6=$(ip -o -6 addr show eth0 scope global | awk '{print $4}')
            ip addr flush dev eth0
            ip link set eth0 master br0
            ip addr add $addr dev br0
            ip addr add $addr6 dev br0 nodad
            ip link set br0 up
            ip link set br1 up")?;
    }

    let container = unnamed(
        lab,
        &format!(
            "for n in 0 1; do
                 # A bridge takes the lowest of its ports' addresses: one that goes must not have been it.
                 ip link add vbox$n address fe:00:00:00:00:0$n type veth peer name eth$n netns PID
                 ip link set vbox$n master br$n up
                 nsenter -t PID -n ip link set eth$n mtu 1400 up
             done
             nsenter -t PID -n sh -euc '
                 ip addr add {ip}/24 dev eth0
                 ip addr add {ip6}/64 dev eth0 nodad
                 ip addr add 192.0.2.9/24 dev eth1
                 ip route add 198.51.100.0/24 via 192.0.2.1'"
        ),
    )?;

    to_and_fro(lab, &container)?;
    let b = lab.host("b");
    let pid = facts(&b)?.containers["box"].pid;
    let inside = b.sh(&format!("nsenter -t {pid} -n sh -c 'ip addr; ip route'"))?;
    for word in ["192.0.2.9/24", "198.51.100.0/24 via 192.0.2.1 dev eth1", "mtu 1400"] {
        ensure!(inside.contains(word), "no {word} in {inside}");
    }

    Ok(())
}

/// What a host needs to route for its containers, and to answer for them on its uplink.
const ROUTER: &str = "
    sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    sysctl -qw net.ipv4.conf.eth0.proxy_arp=1 net.ipv6.conf.eth0.proxy_ndp=1
    sysctl -qw net.ipv4.neigh.eth0.proxy_delay=0 net.ipv6.neigh.eth0.proxy_delay=0";

/// As Calico does it: addresses of whole length, a gateway that the container knows by one hardware
/// address on every host, host routes, proxy ARP.
fn make_routed(ip: &str, ip6: &str) -> String {
    format!(
        "ip netns add box
         ip link add cali0 address ee:ee:ee:ee:ee:ee type veth peer name eth0 netns box
         ip addr add 169.254.1.1/32 dev cali0 scope link
         sysctl -qw net.ipv4.conf.cali0.proxy_arp=1 net.ipv4.neigh.cali0.proxy_delay=0
         ip link set cali0 up
         ip -n box link set lo up
         ip -n box link set eth0 up
         ip -n box addr add {ip}/32 dev eth0
         ip -n box addr add {ip6}/128 dev eth0 nodad
         ip -n box route add 169.254.1.1 dev eth0 scope link
         ip -n box route add default via 169.254.1.1 dev eth0
         ip -n box -6 route add default via fe80::ecee:eeff:feee:eeee dev eth0
         ip route add {ip}/32 dev cali0 scope link
         ip -6 route add {ip6}/128 dev cali0
         ip -6 neigh add proxy {ip6} dev eth0"
    )
}

fn routed_container() -> Container {
    Container::networked("counter").with(&["--arg", "--listen", "--arg", "[::]:7000"])
}

fn start_routed(lab: &Lab) -> Outcome<Container> {
    let (a, b) = pair(lab);
    a.sh(ROUTER)?;
    b.sh(ROUTER)?;
    a.sh(&make_routed(&lab.address(ADDRESS), &v6(lab, ADDRESS)))?;
    let container = routed_container();
    container.make(&a)?;
    container.run_on(&a)?;
    Ok(container)
}

/// Given up in the last moment, killed in the freeze, killed after the commit.
fn survives_failures(lab: &Lab, container: &Container) -> Outcome {
    let (a, b) = pair(lab);
    let wire = Wire::watch(lab)?;
    let mut probe = Probe::start(lab, container, CONNECTIONS)?;
    let mut other = Probe::to(lab, &format!("[{}]:7000", v6(lab, ADDRESS)), CONNECTIONS)?;
    for (fault, code) in
        [("source.commit:error", 1), ("dump.dumped:kill", 137), ("source.committed:kill", 137)]
    {
        let said =
            a.exec(&["env", &format!("FERRY_FAULT={fault}"), "ferry", "migrate", "box", "b"]);
        said?.exits(code)?;
        let (here, there) = match fault {
            "source.committed:kill" => {
                a.ferry(&["resolve", "box"])?.exits(0)?;
                (&b, &a)
            }
            _ => (&a, &b),
        };

        let fine = exactly_one_copy(container, here, there)
            .and_then(|()| probe.is_content())
            .and_then(|()| other.is_content());
        fine.map_err(|e| format!("after {fault}: {e}"))?;
    }

    b.ferry(&["migrate", "box", "a"])?.exits(0)?;
    probe.is_content()?;
    other.is_content()?;
    exactly_one_copy(container, &a, &b)?;

    wire.is_calm(2 * CONNECTIONS)
}

fn routed(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let (ip, ip6) = (lab.address(ADDRESS), v6(lab, ADDRESS));
    let container = start_routed(lab)?;
    let outside = |host: &Host| {
        host.sh("ip route show dev cali0; ip -6 route show dev cali0; ip neigh show proxy
             ip -o addr show dev cali0 | cut -d' ' -f2-7; ip -6 neigh show proxy
             cat /proc/sys/net/ipv4/conf/cali0/proxy_arp; cat /sys/class/net/cali0/address")
    };
    let before = outside(&a)?;
    to_and_fro(lab, &container)?;
    let after = outside(&b)?;
    ensure!(after == before, "{before}\nhas become\n{after}");
    let left = a.sh("ip route; ip -6 route; ip -6 neigh show proxy; ip link; nft list tables")?;
    for word in [format!("{ip} "), format!("{ip6} "), "cali0".into(), "ferry".into()] {
        ensure!(!left.contains(&word), "left on a: {left}");
    }
    Ok(())
}

fn routed_is_refused(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let (ip, ip6) = (lab.address(ADDRESS), v6(lab, ADDRESS));
    a.sh(ROUTER)?;
    a.sh(&make_routed(&ip, &ip6))?;
    let container = routed_container();
    container.make(&a)?;
    container.run_on(&a)?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    for word in
        ["does not forward IPv4", "does not forward IPv6", "hint: sysctl -w net.ipv4.ip_forward=1"]
    {
        ensure!(said.err.contains(word), "no {word:?}: {said}");
    }
    b.sh(ROUTER)?;
    b.sh(&format!("ip route add {ip}/32 dev eth0"))?;
    let said = a.ferry(&["migrate", "box", "b"])?.exits(3)?;
    ensure!(said.err.contains(&format!("has a route to {ip}/32 already")), "{said}");
    exactly_one_copy(&container, &a, &b)
}

const FAR: [&str; 2] = ["10.99.0.5", "fd99::5"];
const HOOK: &str = "/srv/local/hook";

/// As BGP would: tells the client, by way of ssh, which host is the way to the container. It takes its time, in
/// which the one that it was on could long have cleared away.
const SPEAKER: &str = r#"#!/bin/sh
input=$(cat)
echo "$input" >>/srv/local/hook.log
case $input in
    *'"phase":"switch"'*'"role":"destination"'*)
        via=$(ip -o -4 addr show eth0 | awk '{ print $4; exit }')
        via6=$(ip -o -6 addr show eth0 scope global | awk '{ print $4; exit }')
        sleep 1
        ssh client "ip route replace 10.99.0.5 via ${via%/*}; ip -6 route replace fd99::5 via ${via6%/*}"
        ;;
esac
"#;

/// The phases in which the hook of a host was called, in order.
fn phases(host: &Host) -> Outcome<Vec<String>> {
    let text = host.sh("cat /srv/local/hook.log; rm /srv/local/hook.log")?;
    let calls = text.lines().map(|line| {
        let call: serde_json::Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let link = &call["links"][0];
        let told = call["version"] == 1
            && call["container"] == "box"
            && call["netns"] == "/run/netns/box"
            && link["kind"] == "routed"
            && link["addresses"].as_array().is_some_and(|a| a.len() >= 2);
        ensure!(told, "it was told {call}");
        Ok(format!("{} {}", call["role"], call["phase"]).replace('"', ""))
    });
    calls.collect()
}

/// A container behind routers, with a hook on both hosts.
fn far_away(lab: &Lab) -> Outcome<Container> {
    let (a, b) = pair(lab);
    for host in [&a, &b] {
        host.sh(ROUTER)?;
        write_script(&host.path(HOOK)?, SPEAKER)?;
    }
    a.sh(&make_routed(FAR[0], FAR[1]))?;
    let container = routed_container();
    container.make(&a)?;
    container.run_on(&a)?;
    a.sh(&format!(
        "echo '\"phase\":\"switch\" \"role\":\"destination\"' | {HOOK}; rm /srv/local/hook.log"
    ))?;
    Ok(container)
}

fn hook_moves_a_route(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = far_away(lab)?;
    to_and_fro_as(lab, &container, FAR, &format!("hook={HOOK}"))?;
    let source = ["source prepare", "source switch", "source release"];
    let destination = ["destination prepare", "destination switch"];
    let (here, there) = (phases(&a)?, phases(&b)?);
    ensure!(here == [&source[..], &destination, &source].concat(), "on a: {here:?}");
    ensure!(there == [&destination[..], &source, &destination].concat(), "on b: {there:?}");
    Ok(())
}

fn hook_refuses(lab: &Lab) -> Outcome {
    let (a, b) = pair(lab);
    let container = far_away(lab)?;
    let wire = Wire::watch(lab)?;
    let mut probe = Probe::to(lab, &format!("{}:7000", FAR[0]), CONNECTIONS)?;
    let network = format!("hook={HOOK}");
    let migrate = || a.ferry(&["migrate", "--network", &network, "box", "b"]);
    b.sh(&format!("chmod o+w {HOOK}"))?;
    let said = migrate()?.exits(3)?;
    ensure!(said.err.contains("others than root may write to it"), "{said}");
    b.sh(&format!("chmod o-w {HOOK}; echo 'echo no such network >&2; exit 3' >>{HOOK}"))?;
    let said = migrate()?.exits(1)?;
    ensure!(said.err.contains("no such network") && said.err.contains("(prepare)"), "{said}");
    exactly_one_copy(&container, &a, &b)?;
    probe.is_content()?;
    let there = phases(&b)?;
    ensure!(there == ["destination prepare", "destination rollback"], "on b: {there:?}");
    wire.is_calm(CONNECTIONS)
}
