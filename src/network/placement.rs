//! Where on the destination the container's links are to hang, and what stands in the way.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::announce::{ArpForm, arp_frame};
use super::image::{LinkImage, LinkKind, NetworkImage, ifname};
use super::read::address;
use super::rtnl::{LinkInfo, Rtnl};
use super::{hook, routed};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::Mac;
use crate::sys::netns::NetNs;
use crate::sys::packet::PacketSocket;

/// Time that the network may take to answer a question for an address.
const ARP_WAIT: Duration = Duration::from_millis(250);
const ETH_P_ARP: u16 = 0x0806;

/// What `--network` says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Placement {
    /// On an interface or bridge of the same name as on the source.
    #[default]
    Auto,
    /// Somebody else has made the namespace, with links and addresses; only fence it.
    Keep,
    /// A namespace with loopback only.
    None,
    /// A veth on this bridge.
    Bridge(String),
    /// A macvlan over this interface.
    Macvlan(String),
    /// On TAP devices: frames go to and from the host that keeps the address. Nobody asks for this by
    /// name; see [`crate::network::forward`].
    Forward,
    /// As [`Placement::Auto`], and this program is called: see [`hook`].
    Hook(PathBuf),
}

impl FromStr for Placement {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let named = |name: &str| ifname(name).map(|()| name.to_owned());
        match (s, s.split_once('=')) {
            ("auto", _) => Ok(Self::Auto),
            ("keep", _) => Ok(Self::Keep),
            ("none", _) => Ok(Self::None),
            (_, Some(("bridge", name))) => named(name).map(Self::Bridge),
            (_, Some(("macvlan", name))) => named(name).map(Self::Macvlan),
            (_, Some(("hook", program))) => hook::command(program).map(Self::Hook),
            _ => Err(format!(
                "{s:?} is none of auto, keep, none, bridge=BR, macvlan=IF, hook=/PROGRAM"
            )),
        }
    }
}

impl TryFrom<String> for Placement {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Placement> for String {
    fn from(placement: Placement) -> String {
        placement.to_string()
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Keep => f.write_str("keep"),
            Self::None => f.write_str("none"),
            Self::Bridge(name) => write!(f, "bridge={name}"),
            Self::Macvlan(name) => write!(f, "macvlan={name}"),
            Self::Forward => f.write_str("forward"),
            Self::Hook(program) => write!(f, "hook={}", program.display()),
        }
    }
}

/// What one link hangs on, on the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Attachment {
    Bridge(String),
    Macvlan {
        parent: String,
        mode: u32,
    },
    /// On nothing here.
    Tap,
    /// The host itself.
    Routed,
}

impl Attachment {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Bridge(name) | Self::Macvlan { parent: name, .. } => name,
            Self::Tap | Self::Routed => "",
        }
    }
}

impl Placement {
    /// `None` for links that are not made.
    pub(super) fn hook(&self, link: &LinkImage) -> Option<Attachment> {
        const MODE_BRIDGE: u32 = 4;
        match (self, &link.kind) {
            (_, LinkKind::Loopback) | (Self::None | Self::Keep, _) => None,
            (Self::Forward, _) => Some(Attachment::Tap),
            (Self::Bridge(name), _) => Some(Attachment::Bridge(name.clone())),
            (Self::Auto | Self::Hook(_), LinkKind::Veth { bridge, .. }) => {
                Some(Attachment::Bridge(bridge.clone()))
            }
            (Self::Macvlan(parent), LinkKind::Macvlan { mode, .. }) => {
                Some(Attachment::Macvlan { parent: parent.clone(), mode: *mode })
            }
            (Self::Auto | Self::Hook(_), LinkKind::Routed { .. }) => Some(Attachment::Routed),
            (Self::Macvlan(parent), LinkKind::Veth { .. } | LinkKind::Routed { .. }) => {
                Some(Attachment::Macvlan { parent: parent.clone(), mode: MODE_BRIDGE })
            }
            (Self::Auto | Self::Hook(_), LinkKind::Macvlan { parent, mode }) => {
                Some(Attachment::Macvlan { parent: parent.clone(), mode: *mode })
            }
        }
    }
}

/// Everything that would keep [`recreate`](crate::network::recreate::recreate) from succeeding, and what
/// makes it doubtful that clients will reach the container here. Changes nothing; asks the network
/// who has the container's addresses, which takes up to a quarter of a second a link.
pub fn preflight(
    image: &NetworkImage,
    placement: &Placement,
    netns_path: &Path,
    host: &NetNs,
) -> Vec<Problem> {
    if let Err(problem) = image.validate() {
        return vec![problem];
    }
    let mut problems = Vec::new();
    match placement {
        Placement::Keep => problems.extend(kept(image, netns_path).err()),
        _ => problems.extend(path_is_free(netns_path).err()),
    }

    if let Placement::Hook(program) = placement {
        problems.extend(hook::usable(program).err());
    }
    let looked = Rtnl::open(host)
        .and_then(|mut s| Ok((s.links()?, s.addresses()?)))
        .trying(|| "cannot read this host's network".into());
    let (links, addresses) = match looked {
        Ok(found) => found,
        Err(problem) => {
            problems.push(problem);
            return problems;
        }
    };

    let here: Vec<IpAddr> = addresses.iter().filter_map(address).map(|a| a.local).collect();
    for (_, link) in image.outward() {
        for ip in link.addresses.iter().map(|a| a.local).filter(|ip| here.contains(ip)) {
            if matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
                continue;
            }
            problems.push(
                Problem::new(format!("{ip} cannot move here"), "this host has it itself")
                    .hint("remove it from the host"),
            );
        }

        let Some(hook) = placement.hook(link).filter(|h| *h != Attachment::Tap) else { continue };
        if let (Attachment::Routed, LinkKind::Routed { end }) = (&hook, &link.kind) {
            problems.extend(routed::problems(link, end, host));
            continue;
        }

        match fits(link, &hook, &links) {
            Ok(on) => problems.extend(asked(link, on, host)),
            Err(problem) => problems.push(problem),
        }
    }

    problems
}

fn path_is_free(path: &Path) -> Result<(), Problem> {
    match path.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Problem::new(format!("cannot look at {}", path.display()), e)),
        Ok(_) => Err(Problem::new(
            format!("cannot make the network namespace {}", path.display()),
            "there is one of this name",
        )
        .hint("delete it (`ip netns delete`), or use it as it is with --network keep")),
    }
}

/// With `keep` the namespace must have the links and addresses of the image already.
pub(super) fn kept(image: &NetworkImage, path: &Path) -> Result<NetNs, Problem> {
    let trying = || format!("cannot use the network namespace {}", path.display());
    let namespace = NetNs::open(path)
        .trying(trying)
        .map_err(|p| p.hint("make it before, or leave --network keep out"))?;
    let (links, addresses) =
        Rtnl::open(&namespace).and_then(|mut s| Ok((s.links()?, s.addresses()?))).trying(trying)?;
    let has: Vec<IpAddr> = addresses.iter().filter_map(address).map(|a| a.local).collect();
    for (_, link) in image.outward() {
        if !links.iter().any(|l| l.name == link.name) {
            return Err(Problem::new(trying(), format!("it has no interface {}", link.name)));
        }
        // A link-local address follows from the hardware address, which may be another one here.
        let missing = link.addresses.iter().map(|a| a.local).find(|ip| {
            !has.contains(ip) && !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
        });
        if let Some(ip) = missing {
            return Err(Problem::new(trying(), format!("it does not have the address {ip}"))
                .hint("open connections are bound to the address: give it the same one"));
        }
    }
    Ok(namespace)
}

/// Tells whether the link can be made where it is to hang.
pub(super) fn fits<'a>(
    link: &LinkImage,
    hook: &Attachment,
    host: &'a [LinkInfo],
) -> Result<&'a LinkInfo, Problem> {
    let what = format!("interface {} cannot be made here", link.name);
    let Some(on) = host.iter().find(|l| l.name == hook.name()) else {
        let (kind, option) = match hook {
            Attachment::Bridge(_) => ("bridge", "bridge=BR"),
            Attachment::Macvlan { .. } | Attachment::Tap | Attachment::Routed => {
                ("interface", "macvlan=IF")
            }
        };
        return Err(Problem::new(what, format!("this host has no {kind} {}", hook.name()))
            .hint(format!("say where to attach the container with --network {option}")));
    };

    if !on.is_up() {
        return Err(Problem::new(what, format!("{} is down", on.name))
            .hint(format!("ip link set {} up", on.name)));
    }
    match hook {
        Attachment::Bridge(_) if on.kind != "bridge" => {
            return Err(Problem::new(what, format!("{} is not a bridge", on.name))
                .hint(format!("--network macvlan={} attaches the container to it", on.name)));
        }
        Attachment::Bridge(_) | Attachment::Routed => {}
        Attachment::Macvlan { .. } if on.master.is_some() => {
            return Err(Problem::new(what, format!("{} is a port of a bridge or bond", on.name))
                .hint("attach the container to the bridge with --network bridge=BR"));
        }
        Attachment::Macvlan { .. } if link.mtu > on.mtu => {
            return Err(Problem::new(
                what,
                format!("its MTU is {}, that of {} only {}", link.mtu, on.name, on.mtu),
            )
            .hint(format!("ip link set {} mtu {}", on.name, link.mtu)));
        }
        Attachment::Macvlan { .. } | Attachment::Tap => {}
    }

    if let Some(other) = host.iter().find(|l| l.mac.is_some() && l.mac == link.mac) {
        return Err(Problem::new(
            what,
            format!("{} of this host has the same hardware address", other.name),
        )
        .hint("hardware addresses must be unique in a network"));
    }

    Ok(on)
}

/// Asks the network who has the link's addresses.
fn asked(link: &LinkImage, on: &LinkInfo, host: &NetNs) -> Vec<Problem> {
    let addresses: Vec<IpAddr> = link.addresses.iter().map(|a| a.local).collect();
    asked_for(&addresses, link.mac, on, host)
}

/// Asks the network who has these addresses. The container on the source answers, as it must: so
/// what counts is whether somebody with another hardware address than `mac` answers.
pub(super) fn asked_for(
    addresses: &[IpAddr],
    mac: Option<Mac>,
    on: &LinkInfo,
    host: &NetNs,
) -> Vec<Problem> {
    let addresses: Vec<Ipv4Addr> = addresses
        .iter()
        .filter_map(|a| match a {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        })
        .collect();
    let (Some(own), Some(mac)) = (on.mac, mac) else { return Vec::new() };

    if addresses.is_empty() {
        return Vec::new();
    }
    let answers = match host.run(|| ask(on.index, own, &addresses)).and_then(|a| a) {
        Ok(answers) => answers,
        Err(e) => {
            let what = format!("cannot ask the network of {} for the addresses", on.name);
            return vec![Problem::new(what, e).warning()];
        }
    };

    let mut problems = Vec::new();
    for ip in addresses {
        let mut who = answers.iter().filter(|(a, _)| *a == ip).map(|(_, mac)| *mac).peekable();
        if who.peek().is_none() {
            problems.push(
                Problem::new(
                    format!("{ip} may not be reachable from here"),
                    format!("the container does not answer for it on the network of {}", on.name),
                )
                .hint("check that both hosts are on the same network segment")
                .warning(),
            );
        }

        if let Some(other) = who.find(|m| *m != mac) {
            let other = other.map(|b| format!("{b:02x}")).join(":");
            problems.push(
                Problem::new(
                    format!("{ip} cannot move here"),
                    format!("a stranger ({other}) answers for it on the network of {}", on.name),
                )
                .hint("the address is used twice, or this is another network"),
            );
        }
    }

    problems
}

/// ARP probes with no sender address, as RFC 5227 wants them: no neighbour table changes.
fn ask(ifindex: i32, own: Mac, addresses: &[Ipv4Addr]) -> std::io::Result<Vec<(Ipv4Addr, Mac)>> {
    let socket = PacketSocket::open()?;
    socket.listen(ETH_P_ARP, ifindex)?;
    for ip in addresses {
        let probe = arp_frame(own, ArpForm::Request, Ipv4Addr::UNSPECIFIED, [0; 6], *ip);
        socket.send(ifindex, &probe)?;
    }

    let end = Instant::now() + ARP_WAIT;
    let (mut answers, mut buffer) = (Vec::new(), [0; 64]);
    loop {
        // All have answered: a second answer, of a stranger, comes at about the same time.
        let all = addresses.iter().all(|ip| answers.iter().any(|(a, _)| a == ip));
        let left = end.saturating_duration_since(Instant::now());
        let left = if all { left.min(ARP_WAIT / 10) } else { left };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if left.is_zero() || poll(&mut fds, timeout)? == 0 {
            return Ok(answers);
        }

        while let Some((length, _)) = socket.receive(&mut buffer)? {
            if length < 42 || buffer[20..22] != [0, 2] {
                continue;
            }
            let mut mac = [0; 6];
            mac.copy_from_slice(&buffer[22..28]);
            let ip = Ipv4Addr::new(buffer[28], buffer[29], buffer[30], buffer[31]);
            if addresses.contains(&ip) {
                answers.push((ip, mac));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placements_are_read_and_written() {
        for text in ["auto", "keep", "none", "bridge=br0", "macvlan=eth0", "hook=/h"] {
            assert_eq!(text.parse::<Placement>().map(|p| p.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "bridge", "bridge=", "bridge=a/b", "macvlan=..", "hook=h", "host"] {
            assert!(text.parse::<Placement>().is_err(), "{text}");
        }
    }
}
