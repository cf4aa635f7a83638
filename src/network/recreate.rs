//! Making a captured network again, behind a closed fence, and taking it apart.
//!
//! The order is the point: links are made down, the fence is put on them, then they come up. So
//! from the first moment nothing leaves the namespace and nothing is answered. Whatever fails on
//! the way, everything made so far is taken back; so is all of it if [`Recreated`] is dropped
//! without [`Recreated::keep`].

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::fence::{self, ArmedFence};
use super::image::{LinkImage, LinkKind, NetworkImage};
use super::placement::{Attachment, Placement, fits, kept};
use super::restore::Restoring;
use super::rtnl::{self, IFF_UP, LinkInfo, Rtnl, ifinfo};
use super::{forward, routed};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{self, CREATE, EXCL, Request};
use crate::sys::netns::{self, NetNs};
use crate::sys::tun::Tap;

/// A link that has just come up needs this long at most until frames pass.
const CARRIER_WAIT: Duration = Duration::from_secs(3);
/// Twice the longest forward delay of IEEE 802.1D.
const PORT_WAIT: Duration = Duration::from_secs(61);
const CARRIER_POLL: Duration = Duration::from_millis(2);
const VETH_INFO_PEER: u16 = 1;

/// The container's network on its new host; taken back on drop unless kept.
#[derive(Debug)]
pub struct Recreated {
    namespace: NetNs,
    path: PathBuf,
    /// Names of links made, in the namespace.
    links: Vec<String>,
    /// The namespace was made here.
    made: bool,
    fence: Option<ArmedFence>,
    /// Devices whose frames go to another host, with their links' names.
    taps: Vec<(String, Tap)>,
    kept: bool,
}

impl Recreated {
    /// The devices whose frames go to another host, with their links' names.
    pub fn take_taps(&mut self) -> Vec<(String, Tap)> {
        std::mem::take(&mut self.taps)
    }

    /// The namespace.
    pub fn namespace(&self) -> &NetNs {
        &self.namespace
    }

    /// The fence, closed until somebody opens it.
    pub fn fence(&mut self) -> Option<&mut ArmedFence> {
        self.fence.as_mut()
    }

    /// Takes the fence out, to open it elsewhere.
    pub fn take_fence(&mut self) -> Option<ArmedFence> {
        self.fence.take()
    }

    /// The container stays: nothing is taken back any more. The fence stays as it is.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Takes everything back; goes on over errors and tells all of them.
    pub fn undo(mut self) -> Result<(), Vec<Problem>> {
        self.take_back()
    }

    fn take_back(&mut self) -> Result<(), Vec<Problem>> {
        self.kept = true;
        let mut problems = Vec::new();
        // Links first: a namespace lives on as long as anybody is in it.
        problems.extend(delete_links(&self.namespace, &self.links));
        match (self.made, self.fence.take()) {
            (true, _) => problems.extend(
                netns::remove_named(&self.path)
                    .trying(|| format!("cannot remove {}", self.path.display()))
                    .err(),
            ),
            (false, Some(fence)) => problems.extend(fence.disarm().err()),
            (false, None) => {}
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

impl Drop for Recreated {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for problem in self.take_back().err().unwrap_or_default() {
            tracing::warn!("taking the container's network back: {problem}");
        }
    }
}

/// Makes the namespace at `netns_path` with all that the image holds, hanging on `host`.
pub fn recreate(
    image: &NetworkImage,
    placement: &Placement,
    netns_path: &Path,
    host: &NetNs,
) -> Result<Recreated, Problem> {
    image.validate()?;
    if *placement == Placement::Keep {
        let namespace = kept(image, netns_path)?;
        let mut made = Recreated::new(namespace, netns_path, false);
        made.fence = Some(fence::raise(&made.namespace)?);
        return Ok(made);
    }

    let namespace = netns::create_named(netns_path)
        .trying(|| format!("cannot make the network namespace {}", netns_path.display()))?;
    let mut made = Recreated::new(namespace, netns_path, true);

    match furnish(&mut made, image, placement, host) {
        Ok(()) => Ok(made),
        Err(problem) => {
            // The first error is the one to tell.
            for other in made.undo().err().unwrap_or_default() {
                tracing::warn!("taking the container's network back: {other}");
            }
            Err(problem)
        }
    }
}

/// Makes the loopback device of a namespace that somebody else has made what the image says.
pub fn fill_loopback(namespace: &NetNs, image: &NetworkImage) -> Result<(), Problem> {
    let mut socket = Rtnl::open(namespace).trying(|| "cannot open the new namespace".into())?;
    let links = image.links.iter().filter(|l| l.kind == LinkKind::Loopback).collect();
    let mut restoring = Restoring { namespace, socket: &mut socket, links };
    restoring.parameters(image)?;
    restoring.up()?;
    restoring.fill(image)?;
    restoring.settle(image)
}

impl Recreated {
    fn new(namespace: NetNs, path: &Path, made: bool) -> Self {
        let path = path.to_owned();
        let (links, taps) = (Vec::new(), Vec::new());
        Self { namespace, path, links, made, fence: None, taps, kept: false }
    }

    /// Sends, in the host's namespace, what makes a link in the container's; there it gets its name.
    ///
    /// Until Linux 6.15 the kernel looks for the name of a new link where the request is sent, and
    /// answers "File exists" for an `eth0` if that host has one too. So the request has no name: the
    /// kernel chooses one that is free in the container's namespace.
    fn add(
        &mut self,
        link: &LinkImage,
        request: &Request,
        outside: &mut Rtnl,
        inside: &mut Rtnl,
    ) -> netlink::Result<()> {
        let before: Vec<i32> = inside.links()?.iter().map(|l| l.index).collect();
        outside.change(request)?;
        let made = inside.links()?.into_iter().find(|l| !before.contains(&l.index));
        let made = made.ok_or(Errno::ENODEV)?;

        // Noted by whichever name it has, so that it can be taken back.
        self.links.push(made.name);
        let mut rename = Request::new(rtnl::NEWLINK, 0, &ifinfo(made.index, 0, 0));
        rename.string(rtnl::IFLA_IFNAME, &link.name);
        inside.change(&rename)?;
        self.links.pop();
        self.links.push(link.name.clone());
        Ok(())
    }
}

/// The container comes back to the namespace that was kept for it here: it gets its name back and
/// is filled anew, behind its fence, which is closed all the time. What is taken back on drop is the
/// name alone: the namespace goes on as it was.
pub fn come_home(
    image: &NetworkImage,
    netns_path: &Path,
    home: &NetNs,
) -> Result<Recreated, Problem> {
    image.validate()?;
    let namespace = home.try_clone().trying(|| "cannot keep the namespace open".into())?;
    netns::bind_named(&namespace, netns_path)
        .trying(|| format!("cannot make the network namespace {}", netns_path.display()))?;
    let mut made = Recreated::new(namespace, netns_path, true);
    match refurnish(&mut made, image) {
        Ok(()) => Ok(made),
        Err(problem) => {
            // The first error is the one to tell.
            for other in made.undo().err().unwrap_or_default() {
                tracing::warn!("taking the container's network back: {other}");
            }
            Err(problem)
        }
    }
}

fn refurnish(made: &mut Recreated, image: &NetworkImage) -> Result<(), Problem> {
    made.fence = Some(fence::raise(&made.namespace)?);
    let mut inside =
        Rtnl::open(&made.namespace).trying(|| "cannot open the kept namespace".into())?;
    let links: Vec<&LinkImage> = image.links.iter().collect();
    let names: Vec<String> = image.outward().map(|(_, l)| l.name.clone()).collect();
    let mut restoring = Restoring { namespace: &made.namespace, socket: &mut inside, links };
    restoring.clear(image)?;
    restoring.parameters(image)?;
    restoring.up()?;
    wait_for_carriers(restoring.socket, &names)?;
    restoring.fill(image)?;
    restoring.settle(image)
}

fn furnish(
    made: &mut Recreated,
    image: &NetworkImage,
    placement: &Placement,
    host: &NetNs,
) -> Result<(), Problem> {
    let mut outside = Rtnl::open(host).trying(|| "cannot open this host's network".into())?;
    let mut inside =
        Rtnl::open(&made.namespace).trying(|| "cannot open the new namespace".into())?;
    let mut links: Vec<&LinkImage> = Vec::new();
    let (mut ports, mut routed) = (Vec::new(), Vec::new());
    for link in &image.links {
        let Some(hook) = placement.hook(link) else {
            links.extend((link.kind == LinkKind::Loopback).then_some(link));
            continue;
        };
        if hook == Attachment::Tap {
            made.taps.push((link.name.clone(), forward::tap(&made.namespace, link)?));
            made.links.push(link.name.clone());
            links.push(link);
            continue;
        }

        let host_links = outside.links().trying(|| "cannot read this host's links".into())?;
        if let (Attachment::Routed, LinkKind::Routed { end }) = (&hook, &link.kind) {
            let request = veth(link, &host_links, &made.namespace);
            made.add(link, &request, &mut outside, &mut inside)
                .trying(|| format!("cannot make {}", link.name))?;
            links.push(link);
            routed.push((link, end));
            continue;
        }

        let on = fits(link, &hook, &host_links)?;
        let request = match &hook {
            Attachment::Macvlan { mode, .. } => macvlan(link, on, *mode, &made.namespace),
            Attachment::Bridge(_) | Attachment::Tap | Attachment::Routed => {
                veth(link, &host_links, &made.namespace)
            }
        };

        made.add(link, &request, &mut outside, &mut inside)
            .trying(|| format!("cannot make {} on {}", link.name, on.name))?;
        links.push(link);
        if let Attachment::Bridge(_) = hook {
            ports.push((link.name.clone(), on.index));
        }
    }

    made.fence = Some(fence::raise(&made.namespace)?);

    let mut indices = Vec::new();
    // The other ends of cables may come up now: the container's are down and fenced.
    for (name, bridge) in &ports {
        let trying = || format!("cannot set the host's end of {name} up");
        let near = inside.link(name).trying(trying)?.and_then(|l| l.lower);
        let far = near.ok_or_else(|| Problem::new(trying(), "it has no other end"))?;
        let mut up = Request::new(rtnl::NEWLINK, 0, &ifinfo(far, IFF_UP, IFF_UP));
        up.u32(rtnl::IFLA_MASTER, *bridge as u32);
        indices.push(far);
        outside.change(&up).trying(trying)?;
    }

    let mut ends = Vec::new();
    for (link, end) in routed {
        let trying = || format!("cannot find the host's end of {}", link.name);
        let far = inside.link(&link.name).trying(trying)?.and_then(|l| l.lower);
        let host_links = outside.links().trying(trying)?;
        let far = host_links.into_iter().find(|l| Some(l.index) == far);
        let far = far.ok_or_else(|| Problem::new(trying(), "it has no other end"))?;
        ends.push((end, far.name, link.mtu));
    }

    let mut restoring = Restoring { namespace: &made.namespace, socket: &mut inside, links };
    restoring.parameters(image)?;
    restoring.up()?;
    for (end, name, mtu) in ends {
        routed::furnish(end, &name, mtu, &mut outside, host, image)?;
    }

    wait_for_carriers(restoring.socket, &made.links)?;
    wait_for_ports(&mut outside, &indices)?;
    restoring.fill(image)?;

    restoring.settle(image)
}

/// All but the name: see [`Recreated::add`].
fn describe(request: &mut Request, link: &LinkImage, namespace: &NetNs) {
    request
        .attr(rtnl::IFLA_ADDRESS, &link.mac.unwrap_or_default())
        .u32(rtnl::IFLA_MTU, link.mtu)
        .u32(rtnl::IFLA_TXQLEN, link.txqlen)
        .u32(rtnl::IFLA_NET_NS_FD, namespace.as_fd().as_raw_fd() as u32);
}

/// Sent in the host's namespace, makes the link in the container's at once: it never bears a
/// name on the host that could be taken.
fn macvlan(link: &LinkImage, parent: &LinkInfo, mode: u32, namespace: &NetNs) -> Request {
    let mut request = Request::new(rtnl::NEWLINK, CREATE | EXCL, &ifinfo(0, 0, 0));
    describe(&mut request, link, namespace);
    request.u32(rtnl::IFLA_LINK, parent.index as u32).nest(rtnl::IFLA_LINKINFO, |info| {
        info.string(1, "macvlan").nest(2, |data| {
            data.u32(1, mode);
        });
    });
    request
}

fn veth(link: &LinkImage, host: &[LinkInfo], namespace: &NetNs) -> Request {
    // The name on the host matters to nobody but its owner; taken, the kernel finds another. The
    // hardware address is not the source's: a bridge takes the lowest of its ports' for its own, and
    // two hosts with one address cut each other off. One that begins with fe is never the lowest.
    let free = |name: &&str| !host.iter().any(|l| l.name == **name);
    let wished = match &link.kind {
        LinkKind::Veth { host_ifname, .. } => Some(host_ifname.as_str()),
        LinkKind::Routed { end } => Some(end.name.as_str()),
        _ => None,
    };

    let name = wished.filter(free).unwrap_or("veth%d");
    let mac = match &link.kind {
        // On no bridge; and the container knows its gateway by it.
        LinkKind::Routed { end } => Some(end.mac),
        _ => link.mac.map(|m| [0xfe, m[1], m[2], m[3], m[4], m[5]]),
    };

    let mut request = Request::new(rtnl::NEWLINK, CREATE | EXCL, &ifinfo(0, 0, 0));
    describe(&mut request, link, namespace);
    request.nest(rtnl::IFLA_LINKINFO, |info| {
        info.string(1, "veth").nest(2, |data| {
            data.nest(VETH_INFO_PEER, |peer| {
                peer.raw(&ifinfo(0, 0, 0))
                    .string(rtnl::IFLA_IFNAME, name)
                    .u32(rtnl::IFLA_MTU, link.mtu);
                if let Some(mac) = mac {
                    peer.attr(rtnl::IFLA_ADDRESS, &mac);
                }
            });
        });
    });

    request
}

fn wait_for_carriers(inside: &mut Rtnl, names: &[String]) -> Result<(), Problem> {
    let end = Instant::now() + CARRIER_WAIT;
    loop {
        let links = inside.links().trying(|| "cannot read the new links".into())?;
        let waiting =
            links.iter().find(|l| names.contains(&l.name) && l.is_up() && !l.is_running());
        match waiting {
            None => return Ok(()),
            Some(link) if Instant::now() > end => {
                return Err(Problem::new(
                    format!("{} does not come up", link.name),
                    "it has no carrier",
                )
                .hint("check the interface or bridge that it hangs on"));
            }
            Some(_) => thread::sleep(CARRIER_POLL),
        }
    }
}

/// A bridge that speaks the spanning tree protocol lets frames of a new port pass only after twice
/// its forward delay: better waited for now than after the commit.
fn wait_for_ports(outside: &mut Rtnl, indices: &[i32]) -> Result<(), Problem> {
    const BR_STATE_FORWARDING: u8 = 3;
    let end = Instant::now() + PORT_WAIT;
    loop {
        let links = outside.links().trying(|| "cannot read this host's links".into())?;
        let waiting = links.iter().find(|l| {
            indices.contains(&l.index) && l.port_state.is_some_and(|s| s != BR_STATE_FORWARDING)
        });
        match waiting {
            None => return Ok(()),
            Some(port) if Instant::now() > end => {
                return Err(Problem::new(
                    format!("the bridge does not let frames of {} pass", port.name),
                    "its spanning tree protocol keeps the port blocked",
                )
                .hint("look for a loop: `bridge link show`"));
            }
            Some(_) => thread::sleep(CARRIER_POLL),
        }
    }
}

fn delete_links(namespace: &NetNs, names: &[String]) -> Vec<Problem> {
    if names.is_empty() {
        return Vec::new();
    }
    let trying = || "cannot open the container's network".to_owned();
    let looked = Rtnl::open(namespace).and_then(|mut s| Ok((s.links()?, s))).trying(trying);
    let (links, mut socket) = match looked {
        Ok(found) => found,
        Err(problem) => return vec![problem],
    };

    let mut problems = Vec::new();
    for link in links.iter().filter(|l| names.contains(&l.name)) {
        let request = Request::new(rtnl::DELLINK, 0, &ifinfo(link.index, 0, 0));
        match socket.change(&request) {
            // Both ends of a cable can be on the list; the first takes the second along.
            Err(e) if e.errno != Errno::ENODEV => {
                problems.extend(
                    Err::<(), _>(e).trying(|| format!("cannot delete {}", link.name)).err(),
                );
            }
            _ => {}
        }
    }

    problems
}

/// On the source, after the commit: with the fence closed, deletes the container's links, so that
/// no kernel will ever answer for it here, and takes the namespace's name away if one is given.
/// Without an image: all links that the namespace has. Goes on over errors and tells all of them.
pub fn dismantle(
    container: &NetNs,
    netns_path: Option<&Path>,
    image: Option<&NetworkImage>,
) -> Result<(), Vec<Problem>> {
    let mut problems = Vec::new();
    if !matches!(fence::is_raised(container), Ok(true)) {
        problems.extend(fence::raise(container).err());
    }
    let names: Vec<String> = match image {
        Some(image) => image.outward().map(|(_, l)| l.name.clone()).collect(),
        None => Rtnl::open(container)
            .and_then(|mut s| s.links())
            .map(|list| list.into_iter().filter(|l| !l.is_loopback()).map(|l| l.name).collect())
            .unwrap_or_default(),
    };

    problems.extend(delete_links(container, &names));
    if let Some(path) = netns_path {
        // The name may belong to another namespace by now.
        let same = NetNs::open(path).and_then(|ns| Ok(ns.identity()? == container.identity()?));
        if let Ok(true) = same {
            let removed = netns::remove_named(path);
            problems.extend(removed.trying(|| format!("cannot remove {}", path.display())).err());
        }
    }

    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::image::tests::sample;
    use crate::sys::netlink::Attributes;

    #[test]
    fn a_new_link_is_asked_for_without_its_name() {
        let image: NetworkImage = serde_json::from_value(sample()).expect("an image");
        let namespace = NetNs::current().expect("a namespace");
        let host = LinkInfo {
            index: 7,
            flags: 0,
            name: "eth0".into(),
            mac: None,
            mtu: 1500,
            txqlen: 0,
            master: None,
            lower: None,
            lower_nsid: None,
            operstate: 0,
            kind: String::new(),
            macvlan_mode: None,
            addr_gen_mode: None,
            port_state: None,
        };

        let mut looked_at = 0;
        for (_, link) in image.outward() {
            for request in [
                macvlan(link, &host, 4, &namespace),
                veth(link, std::slice::from_ref(&host), &namespace),
            ] {
                let payload = request.payload();
                let attributes = Attributes::parse(&payload[16..]);
                assert_eq!(attributes.u32(rtnl::IFLA_MTU), Some(link.mtu));
                // A kernel before 6.15 would find the host's own `eth0` by it.
                assert_eq!(attributes.string(rtnl::IFLA_IFNAME), None, "{}", link.name);
                looked_at += 1;
            }
        }
        assert!(looked_at >= 4, "{looked_at} requests");
    }
}
