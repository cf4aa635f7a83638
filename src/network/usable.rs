//! Whether this host's kernel has what carrying an address takes: tried out in a network namespace
//! that nobody else sees. What is missing would otherwise show when the namespace is made on the
//! destination, or in the freeze.

use std::thread;

use super::rtnl::Rtnl;
use super::{fence, replay};
use crate::problem::{Problem, Trying};
use crate::sys::netns::NetNs;
use crate::sys::tun::Tap;

/// The device that is made to try things with.
const DEVICE: &str = "ferry-try";

/// Returns what containers with an address cannot do without and this host does not have; nothing if all
/// of it is here. Takes about 15 ms, most of it for the packet filter's transaction.
pub fn missing() -> Vec<Problem> {
    let trying = || "cannot try out this host's network".to_owned();
    let namespace = match NetNs::fresh().trying(trying) {
        Ok(namespace) => namespace,
        Err(problem) => return vec![problem.hint("the kernel needs CONFIG_NET_NS")],
    };
    let mut found = Vec::new();

    // The fence is put on the device, so it comes after it.
    let tap = match namespace.run(|| Tap::create(DEVICE)).and_then(|tap| tap) {
        Ok(tap) => Some(tap),
        Err(e) => {
            found.push(
                Problem::new("/dev/net/tun cannot be used", e)
                    .hint("load the module tun (CONFIG_TUN); where /dev is private: mknod /dev/net/tun c 10 200"),
            );
            None
        }
    };

    if tap.is_some()
        && let Err(e) = redirect(&namespace)
    {
        found.push(
            Problem::new("traffic control cannot hand packets over", e)
                .hint("load the modules sch_ingress, cls_bpf and act_mirred"),
        );
    }

    match fence::raise(&namespace) {
        // It goes with the namespace.
        Ok(_) => {}
        Err(problem) => found.push(problem),
    }

    // Taking the device away takes longer than all of it, and nobody needs to wait for it.
    let _ = thread::Builder::new().spawn(move || drop((tap, namespace)));
    found
}

/// As the replay does it, from a TAP device to another one.
fn redirect(namespace: &NetNs) -> crate::sys::netlink::Result<()> {
    let mut socket = Rtnl::open(namespace)?;
    let links = socket.links()?;
    let device = links.iter().find(|l| l.name == DEVICE).map_or(0, |l| l.index);
    let loopback = links.iter().find(|l| l.is_loopback()).map_or(0, |l| l.index);
    replay::redirect(&mut socket, device, loopback)
}
