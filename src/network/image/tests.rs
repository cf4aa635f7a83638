//! An image with some of everything, and what is refused.

use super::*;
use crate::fuzz::Target;

/// One with some of everything.
pub(crate) fn sample() -> serde_json::Value {
    let address = serde_json::json!({
        "local": "10.77.1.50", "peer": null, "prefix": 24, "broadcast": "10.77.1.255",
        "label": "eth0:1", "scope": 0, "flags": 128, "protocol": 3, "lifetime": [100, 200],
    });
    let mut route = serde_json::json!({
        "v6": false, "destination": "10.0.0.0", "prefix": 8, "source": null, "link": "eth0",
        "gateway": "10.77.1.1", "prefsrc": null, "table": 254, "priority": 0, "protocol": 3,
        "scope": 0, "kind": 1, "tos": 0, "onlink": true, "metrics": [[2, 1400]],
        "congestion": "cubic", "preference": null, "expires": 5,
    });

    let sysctl = serde_json::json!({
        "tree": "ipv4-conf", "name": "rp_filter", "value": "1", "changed": true,
    });
    let lo = serde_json::json!({
        "name": "lo", "mac": null, "mtu": 65536, "txqlen": 1000, "kind": "loopback", "up": true,
        "flags": 0, "addr_gen_mode": 0, "addresses": [], "sysctls": [], "qdiscs": [],
    });
    let link = |name: &str, kind: serde_json::Value| {
        serde_json::json!({
            "name": name, "mac": [2, 0, 0, 0, 0, 1], "mtu": 1500, "txqlen": 1000, "kind": kind,
            "up": true, "flags": 0, "addr_gen_mode": 1, "addresses": [address],
            "sysctls": [sysctl], "qdiscs": [{
                "kind": "fq_codel", "handle": 0x8001_0000u32, "parent": u32::MAX, "options": [8, 0],
            }],
        })
    };

    let eth0 = link("eth0", serde_json::json!({ "macvlan": { "mode": 4, "parent": "eth0" } }));
    let veth = serde_json::json!({
        "veth": { "host_ifname": "v1", "host_mac": [2, 0, 0, 0, 0, 2], "bridge": "br0" },
    });
    let mut to_host = route.clone();
    to_host["link"] = "cali1".into();

    let routed = serde_json::json!({ "routed": { "end": {
        "name": "cali1", "mac": [0xee, 0xee, 0xee, 0xee, 0xee, 0xee], "txqlen": 0, "flags": 0,
        "addr_gen_mode": null, "addresses": [address], "sysctls": [sysctl],
        "routes": [to_host], "proxies": [{ "address": "10.77.1.1", "link": "ens3" }],
    } } });

    route["prefsrc"] = "10.77.1.50".into();
    serde_json::json!({
        "version": VERSION, "links": [lo, eth0, link("eth1", veth), link("eth2", routed)],
        "routes": [route],
        "rules": [{ "header": [2, 0, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0], "attributes": [[6, [1, 0, 0, 0]]] }],
        "neighbours": [{
            "link": "eth0", "address": "10.77.1.1", "mac": [2, 0, 0, 0, 0, 3], "permanent": true,
        }],
        "sysctls": [{ "path": "ipv4/ip_forward", "value": "1", "changed": false }],
    })
}

/// What is found valid can be said to the kernel.
#[test]
fn fuzz_network_images() {
    let image: NetworkImage = serde_json::from_value(sample()).unwrap();
    image.validate().unwrap();
    let words = [&b"\"routed\""[..], b"\"lo\"", b"null", b"::1", b"0.0.0.0", b"../", b"\\u0000"];
    let target = Target::new("network-images").sample(serde_json::to_vec(&image).unwrap());
    target.words(&words).cost(4).run(|bytes| {
        let image: NetworkImage = serde_json::from_slice(bytes)?;
        image.validate()?;
        for link in &image.links {
            assert!(!link.name.contains('/') && link.addresses.len() <= MAX_ADDRESSES);
            for address in &link.addresses {
                let _ = crate::network::restore::address_request(1, 0, 1, address);
            }
            for qdisc in &link.qdiscs {
                let _ = qdisc.request(36, 0, 1);
            }
        }

        for route in &image.routes {
            let _ = crate::network::restore::route_request(1, 0, None, route);
        }
        for neighbour in &image.neighbours {
            let _ = crate::network::restore::neighbour_request(1, neighbour);
        }

        for sysctl in &image.sysctls {
            assert!(!sysctl.path.contains(".."));
        }
        Ok(())
    });
}
