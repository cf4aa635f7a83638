//! Ports that a host publishes for a container, as engines and CNI plugins do: connections that
//! live by the host's address translation.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{ADDRESS, Container};
use crate::common::facts::exactly_one_copy;
use crate::common::lab::{Host, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::until;
use crate::common::suite::{full, in_lab_of};
use crate::common::{Outcome, ensure};
use crate::forward::{abroad, told};

const LIMIT: Duration = Duration::from_secs(90);
/// On every bridge; not in the lab's own networks.
const IP: &str = "10.88.0.5";
const IP6: &str = "fd88::5";
const CONNECTIONS: usize = 5;

/// The suite.
pub fn trials() -> Vec<Trial> {
    let hosts = &["a", "b@1", "c@2", "client"];
    let mut trials = vec![in_lab_of(hosts, "published::from_home", LIMIT, from_home)];
    let hosts = &["a", "c", "client"];
    trials.push(in_lab_of(hosts, "published::by_iptables_legacy", LIMIT, by_iptables_legacy));
    if full() {
        trials.push(in_lab_of(hosts, "published::on_a_segment", LIMIT, on_a_segment));
    }
    trials
}

/// Port 8080 of the host leads to an address.
fn publish(host: &Host, address: &str, masquerade: &str) -> Outcome {
    host.sh(&format!(
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
         nft -f - <<END
table ip engine {{
    chain published {{
        type nat hook prerouting priority dstnat
        tcp dport 8080 dnat to {address}:7000
    }}
    chain leaving {{
        type nat hook postrouting priority srcnat
        {masquerade} masquerade
    }}
}}
END"
    ))
    .map(drop)
}

/// A counter on `a`, its veth on a bridge there.
fn start(a: &Host, addresses: &str) -> Outcome<Container> {
    let container =
        Container::networked("counter").with(&["--arg", "--listen", "--arg", "[::]:7000"]);
    container.make(a)?;
    a.sh(&format!(
        "ip netns add box
         ip link add vbox address fe:00:00:00:00:01 type veth peer name eth0 netns box
         ip link set vbox master br0 up
         ip -n box link set lo up
         ip -n box link set eth0 up
         {addresses}"
    ))?;
    container.run_on(a)?;
    Ok(container)
}

fn address_of(host: &Host) -> Outcome<String> {
    Ok(host.sh("getent hosts $(hostname) | cut -d ' ' -f 1")?.trim().to_owned())
}

/// On a bridge that only its own host has: with the container in another network, connections
/// through the published port and to its address of IPv6 go on, and new ones are made.
fn from_home(lab: &Lab) -> Outcome {
    let [a, b, c, client] = ["a", "b", "c", "client"].map(|name| lab.host(name));
    a.sh("ip link add br0 type bridge mcast_snooping 0
          ip addr add 10.88.0.1/24 dev br0
          ip addr add fd88::1/64 dev br0 nodad
          ip link set br0 up")?;
    publish(&a, IP, "ip saddr 10.88.0.0/24 oifname != br0")?;

    let container = start(
        &a,
        &format!(
            "ip -n box addr add {IP}/24 dev eth0
             ip -n box addr add {IP6}/64 dev eth0 nodad
             ip -n box route add default via 10.88.0.1
             ip -n box route add default via fd88::1"
        ),
    )?;

    a.sh("tc -n box qdisc add dev eth0 root handle 1: tbf rate 800mbit burst 100kb latency 70ms")?;
    client.sh("ip -6 route add fd88::/64 via $(getent hosts a6 | cut -d ' ' -f 1)")?;
    let (port, v6) = (format!("{}:8080", address_of(&a)?), format!("[{IP6}]:7000"));
    let mut probes = vec![Probe::to(lab, &port, CONNECTIONS)?, Probe::to(lab, &v6, CONNECTIONS)?];

    let said = a.ferry(&["check", "--forward", "never", "box", "b"])?;
    let (count, hint) = (format!("{CONNECTIONS} of the container's"), format!("--reply-src {IP}"));
    ensure!(said.code == 3 && said.to_string().contains(&count), "{said}");
    ensure!(said.to_string().contains(&hint), "{said}");
    for (from, to, other) in [(&a, &b, &c), (&b, &c, &b), (&c, &a, &b)] {
        let step = |e: String| format!("{} to {}: {e}", from.name, to.name);
        from.ferry(&["migrate", "box", to.name])?.exits(0).map_err(step)?;
        for to in [&port, &v6] {
            probes.push(Probe::to(lab, to, CONNECTIONS).map_err(step)?);
        }

        probes.iter_mut().try_for_each(Probe::is_content).map_err(step)?;
        if to.name == "a" {
            exactly_one_copy(&container, &a, from).map_err(step)?;
        } else {
            abroad(&container, &a, to, other).map_err(step)?;
        }

        let queue = to.sh("tc -n box qdisc show dev eth0")?;
        ensure!(queue.contains("tbf 1: root"), "on {}: {queue}", to.name);

        // Out of the container, under the home's name: there and back.
        let ping = format!("ip netns exec box ping -c 1 -W 5 {}", address_of(&client)?);
        to.sh(&ping).map_err(step)?;
    }

    Ok(())
}

/// A bridge on each host, which has a port on their common segment.
fn bridges(hosts: &[&Host]) -> Outcome {
    hosts.iter().try_for_each(|host| {
        host.sh("ip link add br0 type bridge mcast_snooping 0
                 addr=$(ip -o -4 addr show eth0 | awk '{print $4}')
                 ip addr flush dev eth0
                 ip link set eth0 master br0
                 ip addr add $addr dev br0
                 ip link set br0 up")
            .map(drop)
    })
}

/// Where a port is published by iptables-legacy, nftables shows nothing; before anybody is connected,
/// connection tracking does not either. The address could move, and stays.
fn by_iptables_legacy(lab: &Lab) -> Outcome {
    let [a, c] = ["a", "c"].map(|name| lab.host(name));
    bridges(&[&a, &c])?;
    let ip = lab.address(ADDRESS);
    let addresses = format!(
        "ip -n box addr add {ip}/24 dev eth0
         ip -n box addr add {IP6}/64 dev eth0 nodad
         ip -n box route add default via {}",
        bare(&a.sh("ip -o -4 addr show br0 | awk '{print $4}'")?)
    );

    let container = start(&a, &addresses)?;
    let stays = || -> Outcome<bool> {
        let said = a.ferry(&["migrate", "--dry-run", "box", "c"])?.exits(0)?.to_string();
        Ok(said.contains("as this host publishes a port of it"))
    };

    ensure!(!stays()?, "nothing is published");
    let tables = || a.sh("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names");
    ensure!(tables()?.is_empty(), "a look has made tables: {}", tables()?);

    // Another's port, and what leads packets away from here.
    a.sh(&format!(
        "sysctl -qw net.ipv4.ip_forward=1
         iptables-legacy -t nat -A PREROUTING -p tcp --dport 8081 -j DNAT --to-destination 10.88.0.6:7000
         iptables-legacy -t nat -A POSTROUTING -s 10.88.0.7 -j SNAT --to-source {ip}"
    ))?;

    ensure!(!stays()?, "what is published is another's");
    let rule = format!("PREROUTING -p tcp --dport 8080 -j DNAT --to-destination [{IP6}]:7000");
    a.sh(&format!("ip6tables-legacy -t nat -A {rule}"))?;
    ensure!(stays()?, "the port that is published by IPv6 was not seen");
    a.sh(&format!("ip6tables-legacy -t nat -D {rule}"))?;
    ensure!(!stays()?, "the rule was taken away");
    a.sh(&format!(
        "iptables-legacy -t nat -N ENGINE
         iptables-legacy -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j ENGINE
         iptables-legacy -t nat -A ENGINE -p tcp --dport 8080 -j DNAT --to-destination {ip}:7000
         iptables-legacy -t nat -A POSTROUTING -m conntrack --ctstate DNAT -d {ip} -j MASQUERADE"
    ))?;

    ensure!(stays()?, "the port that is published by IPv4 was not seen");

    a.ferry(&["migrate", "box", "c"])?.exits(0)?;
    ensure!(told(&a)?.iter().any(|f| f["to"] == "c"), "it is not forwarded: {:?}", told(&a)?);
    let host = a.sh("ip -o -4 addr show br0 | awk '{print $4}'")?;
    let mut published = Probe::to(lab, &format!("{}:8080", bare(&host)), CONNECTIONS)?;
    let said = c.ferry(&["migrate", "box", "a"])?.exits(0)?;
    published.is_content().map_err(|e| format!("at home: {said}\n{e}"))?;
    exactly_one_copy(&container, &a, &c)?;

    let said = a.ferry(&["migrate", "--forward", "never", "box", "c"])?.exits(3)?;
    let count = format!("{CONNECTIONS} of the container's");
    ensure!(said.to_string().contains(&count), "{said}");

    published.is_content()
}

fn bare(address: &str) -> &str {
    address.trim().split('/').next().unwrap_or_default()
}

/// On a bridge that both hosts have a port of: the address could move, and those that live by the
/// first host's translation could not.
fn on_a_segment(lab: &Lab) -> Outcome {
    let [a, c] = ["a", "c"].map(|name| lab.host(name));
    bridges(&[&a, &c])?;
    let ip = lab.address(ADDRESS);
    let container = start(&a, &format!("ip -n box addr add {ip}/24 dev eth0"))?;
    let direct = format!("{ip}:7000");
    let mut straight = Probe::to(lab, &direct, CONNECTIONS)?;

    // Nothing is translated: it moves.
    for (from, to) in [(&a, &c), (&c, &a)] {
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        straight.is_content().map_err(|e| format!("{} to {}: {e}", from.name, to.name))?;
        exactly_one_copy(&container, to, from)?;
    }

    // Frames that are bridged may pass these rules, too: only what was led here is translated.
    publish(&a, &ip, &format!("ip daddr {ip} ct status dnat"))?;
    let port = format!("{}:8080", address_of(&a)?);
    let mut published = Probe::to(lab, &port, CONNECTIONS)?;
    let said = a.ferry(&["migrate", "--forward", "never", "box", "c"])?.exits(3)?;
    let count = format!("{CONNECTIONS} of the container's");
    ensure!(said.to_string().contains(&count), "{said}");
    a.ferry(&["migrate", "box", "c"])?.exits(0)?;
    straight.is_content().map_err(|e| format!("straight, abroad: {e}"))?;

    published.is_content().map_err(|e| format!("published, abroad: {e}"))?;
    ensure!(told(&a)?.iter().any(|f| f["to"] == "c"), "it is not forwarded: {:?}", told(&a)?);
    let said = c.ferry(&["migrate", "--forward", "never", "box", "a"])?.exits(0)?;
    straight.is_content().map_err(|e| format!("{said}\n{e}"))?;
    published.is_content().map_err(|e| format!("published, at home: {e}"))?;
    exactly_one_copy(&container, &a, &c)?;

    // With the last of those connections gone the address moves, where that is wanted.
    drop(published);
    until("the server has closed them", SHORT, || {
        let said = a.ferry(&["check", "--forward", "never", "box", "c"])?;
        Ok((said.code == 0).then_some(()))
    })?;

    let said = a.ferry(&["migrate", "--forward", "never", "box", "c"])?.exits(0)?;
    straight.is_content().map_err(|e| format!("{said}\n{e}"))?;
    exactly_one_copy(&container, &c, &a)
}
