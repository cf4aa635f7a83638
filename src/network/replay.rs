//! Giving the container the frames that were kept for it.
//!
//! For each link there is a TAP device in the container's namespace, and a traffic-control rule
//! that hands what comes in on the TAP over to the real link's ingress. So a frame written to the
//! TAP is received as if the wire of `eth0` had brought it: by veth and macvlan alike, with
//! `rp_filter` as it is, with multicast, link-local addresses and sockets bound to the device all
//! in order. A TUN device alone would have to have reverse-path filtering put aside, and would
//! lose all the rest of this list.
//!
//! The TAP has no address, has IPv6 off, and goes with this value or with the process.

use super::frames::EthernetFrame;
use super::image::NetworkImage;
use super::rtnl::{self, IFF_UP, NEWQDISC, Rtnl, TCA_KIND, TCA_OPTIONS, ifinfo, tcmsg};
use super::sockets::SockDiag;
use super::sysctl;
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{CREATE, EXCL, Mac, Request};
use crate::sys::netns::NetNs;
use crate::sys::tun::Tap;

/// First letters of the TAP devices' names.
pub const DEVICE_PREFIX: &str = "ferry-in";

/// So many letters of a tag are in the name of a host's device.
const TAG: usize = 7;

const NEWTFILTER: u16 = 44;
/// `TC_H_CLSACT`, also the handle of the qdisc.
const CLSACT: u32 = 0xffff_0000;
const INGRESS_PARENT: u32 = 0xffff_fff1;
/// `TC_H_MIN_INGRESS` below `TC_H_CLSACT`.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const ETH_P_ALL: u16 = 3;

/// Devices in the destination's namespace through which kept frames come in.
#[derive(Debug)]
pub struct Replay {
    /// By the place of the link in the image.
    taps: Vec<Option<Tap>>,
    /// Hardware addresses of the links, where they are others than on the source.
    macs: Vec<Mac>,
    sock_diag: SockDiag,
}

impl Replay {
    /// Makes the devices, ahead of time. The links of `image` must be in the namespace.
    pub fn prepare(container: &NetNs, image: &NetworkImage) -> Result<Self, Problem> {
        let mut socket =
            Rtnl::open(container).trying(|| "cannot open the container's network".into())?;
        let mut taps: Vec<Option<Tap>> = image.links.iter().map(|_| None).collect();
        for (i, link) in image.outward() {
            let name = format!("{DEVICE_PREFIX}{i}");
            let mac = link.mac.unwrap_or_default();
            taps[i] = Some(device(container, &mut socket, &name, &link.name, mac)?);
        }
        Ok(Self { taps, macs: Vec::new(), sock_diag: SockDiag::new(container)? })
    }

    /// The same for interfaces of a host, which have hardware addresses of their own: frames are for
    /// the place in this list. `tag` makes the devices' names this migration's.
    pub fn on_host(host: &NetNs, interfaces: &[&str], tag: &str) -> Result<Self, Problem> {
        let trying = || "cannot open the host's network".to_owned();
        let mut socket = Rtnl::open(host).trying(trying)?;
        let links = socket.links().trying(trying)?;
        let (mut taps, mut macs) = (Vec::new(), Vec::new());
        for (i, interface) in interfaces.iter().enumerate() {
            let mac = links.iter().find(|l| l.name == **interface).and_then(|l| l.mac);
            macs.push(mac.unwrap_or_default());
            let name = format!("ferry-{}{i}", tag.get(..TAG).unwrap_or_default());
            taps.push(Some(device(host, &mut socket, &name, interface, macs[i])?));
        }
        Ok(Self { taps, macs, sock_diag: SockDiag::new(host)? })
    }

    /// Looks for sockets where the frames come in.
    pub fn sock_diag(&mut self) -> &mut SockDiag {
        &mut self.sock_diag
    }

    /// Lets one frame come in, at once: when this returns, the namespace's stack has had it. The
    /// fence must be open, for the frame passes the real link's ingress like any other.
    pub fn inject(&self, frame: &EthernetFrame) -> Result<(), Problem> {
        frame.validate()?;
        let trying = || format!("cannot replay {frame:?}");
        match self.taps.get(usize::from(frame.link)) {
            Some(Some(tap)) => match self.macs.get(usize::from(frame.link)) {
                None => tap.write(&frame.vnet_hdr, &frame.bytes).trying(trying),
                Some(mac) => {
                    let mut bytes = frame.bytes.clone();
                    bytes[..mac.len()].copy_from_slice(mac);
                    tap.write(&frame.vnet_hdr, &bytes).trying(trying)
                }
            },
            _ => Err(Problem::new(trying(), "there is no such link")),
        }
    }
}

/// A TAP device whose frames come in on the link called `target`.
fn device(
    namespace: &NetNs,
    socket: &mut Rtnl,
    name: &str,
    target: &str,
    mac: Mac,
) -> Result<Tap, Problem> {
    let trying = || format!("cannot prepare {target} for the frames kept on the way");
    let tap = namespace
        .run(|| {
            let tap = Tap::create(name)?;
            // Coming up must not send anything of its own.
            sysctl::set(&format!("ipv6/conf/{name}/disable_ipv6"), "1", false)?;
            Ok::<_, std::io::Error>(tap)
        })
        .and_then(|tap| tap)
        .trying(trying)
        .map_err(|p| p.hint("the kernel needs CONFIG_TUN, and /dev/net/tun must be there"))?;
    let links = socket.links().trying(trying)?;

    let find = |name: &str| links.iter().find(|l| l.name == name);
    let (Some(device), Some(target)) = (find(name), find(target)) else {
        return Err(Problem::new(trying(), "the link is not in the namespace"));
    };

    // With the same address the kernel finds that the frames are for this host.
    let mut up = Request::new(rtnl::NEWLINK, 0, &ifinfo(device.index, 0, 0));
    up.attr(rtnl::IFLA_ADDRESS, &mac);
    socket.change(&up).trying(trying)?;
    redirect(socket, device.index, target.index)
        .trying(trying)
        .map_err(|p| p.hint("the kernel needs the modules sch_ingress, cls_bpf and act_mirred"))?;
    let up = Request::new(rtnl::NEWLINK, 0, &ifinfo(device.index, IFF_UP, IFF_UP));
    socket.change(&up).trying(trying)?;

    Ok(tap)
}

/// `tc qdisc add dev … clsact; tc filter add dev … ingress bpf bytecode '1,6 0 0 -1' action
/// mirred ingress redirect dev …`, see tc-bpf(8) and tc-mirred(8).
pub(super) fn redirect(socket: &mut Rtnl, from: i32, to: i32) -> crate::sys::netlink::Result<()> {
    let mut qdisc = Request::new(NEWQDISC, CREATE | EXCL, &tcmsg(from, CLSACT, INGRESS_PARENT, 0));
    qdisc.string(TCA_KIND, "clsact");
    socket.change(&qdisc)?;

    let info = u32::from(ETH_P_ALL.to_be()) | 1 << 16; // priority 1
    let mut filter = Request::new(NEWTFILTER, CREATE | EXCL, &tcmsg(from, 0, CLSACT_INGRESS, info));
    filter.string(TCA_KIND, "bpf").nest(TCA_OPTIONS, |options| {
        // One instruction that takes everything: `ret -1`.
        let everything = [0x06, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        options.nest(1, |actions| {
            actions.nest(1, |action| {
                action.string(1, "mirred").nest(2, |options| {
                    options.attr(2, &mirred(to));
                });
            });
        });
        options.attr(4, &1_u16.to_ne_bytes()).attr(5, &sock_filter(everything));
    });
    socket.change(&filter)
}

/// `struct tc_mirred` of linux/tc_act/tc_mirred.h: the frame is stolen and comes in at `to`.
fn mirred(to: i32) -> [u8; 28] {
    const TC_ACT_STOLEN: i32 = 4;
    const TCA_INGRESS_REDIR: i32 = 3;
    let mut value = [0; 28];
    value[8..12].copy_from_slice(&TC_ACT_STOLEN.to_ne_bytes());
    value[20..24].copy_from_slice(&TCA_INGRESS_REDIR.to_ne_bytes());
    value[24..28].copy_from_slice(&to.to_ne_bytes());
    value
}

/// `struct sock_filter`: the code in host order.
fn sock_filter(bytes: [u8; 8]) -> [u8; 8] {
    let mut value = bytes;
    value[..2].copy_from_slice(&u16::from(bytes[0]).to_ne_bytes());
    value
}
