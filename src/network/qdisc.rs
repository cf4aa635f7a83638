//! Queueing disciplines of the container's links, tc(8): read, and made again.
//!
//! Their settings travel as the kernel tells them, and are given to the other kernel as they are. That
//! is right for those of [`CARRIED`], which take back what they tell. Classes and filters are not
//! carried: what needs them is refused while it can be named.

use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::rtnl::{
    DELQDISC, LinkInfo, NEWQDISC, Rtnl, TCA_KIND, TCA_OPTIONS, enter, index_at, tcmsg,
};
use crate::problem::{Problem, Trying};
use crate::sys::netlink::{CREATE, EXCL, NetlinkMessage, Request};

/// Those that take back what they tell. All others have classes, or tables that they do not tell.
const CARRIED: [&str; 11] =
    ["bfifo", "cake", "codel", "fq", "fq_codel", "fq_pie", "netem", "pfifo", "pie", "sfq", "tbf"];
/// On one link, one below the other.
pub const MAX_QDISCS: usize = 16;
/// Settings of one, bytes; the largest that are of use are tables of netem's.
pub const MAX_OPTIONS: usize = 32 << 10;

/// Length of `struct tcmsg`.
const FIXED: usize = 20;
/// A size table: told without its data.
const TCA_STAB: u16 = 8;
/// `TC_H_ROOT`
const ROOT: u32 = u32::MAX;
/// The parents of filters of `ingress` and of `clsact`: `TC_H_MIN_INGRESS`, `TC_H_MIN_EGRESS`.
const HOOKS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];
/// Upper half of a handle, which names the discipline; the lower names a class of it.
const MAJOR: u32 = 0xffff_0000;

/// A queueing discipline that somebody has put on a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qdisc {
    /// `fq_codel`
    pub kind: String,
    /// Its name on the link.
    pub handle: u32,
    /// The class that it is in, or the link itself, `TC_H_ROOT`.
    pub parent: u32,
    /// Its settings in the kernel's own words.
    pub options: Option<Vec<u8>>,
}

impl Qdisc {
    pub(super) fn read(m: &NetlinkMessage) -> Option<Self> {
        let word = |at| index_at(m, at).map(|w| w as u32);
        let a = m.attributes(FIXED);
        Some(Self {
            kind: a.string(TCA_KIND)?,
            handle: word(8)?,
            parent: word(12)?,
            options: a.get(TCA_OPTIONS).map(<[u8]>::to_vec),
        })
    }

    fn is_carried(&self) -> bool {
        CARRIED.contains(&self.kind.as_str())
    }

    pub(super) fn request(&self, kind: u16, flags: u16, index: i32) -> Request {
        let mut request = Request::new(kind, flags, &tcmsg(index, self.handle, self.parent, 0));
        request.string(TCA_KIND, &self.kind);
        if let Some(options) = &self.options {
            request.attr(TCA_OPTIONS, options);
        }
        request
    }
}

/// Refuses what no honest peer sends.
pub(super) fn check(list: &[Qdisc]) -> Result<(), String> {
    if list.len() > MAX_QDISCS {
        return Err(format!("{} queueing disciplines of a link", list.len()));
    }
    for (i, one) in list.iter().enumerate() {
        let (kind, handle, parent) = (&one.kind, one.handle, one.parent);
        if !one.is_carried() {
            return Err(format!("a queueing discipline {kind:?}"));
        }
        if handle & MAJOR == 0 || handle & !MAJOR != 0 {
            return Err(format!("a queueing discipline of the handle {handle:x}"));
        }
        if !is_root(one) && !list[..i].iter().any(|p| p.handle == parent & MAJOR) {
            return Err(format!("a queueing discipline below {parent:x}, which is none"));
        }
        if one.options.as_ref().is_some_and(|o| o.len() > MAX_OPTIONS) {
            return Err(format!("more than {MAX_OPTIONS} bytes of settings of {kind}"));
        }
    }
    Ok(())
}

fn is_root(one: &Qdisc) -> bool {
    one.parent == ROOT
}

/// Returns what somebody has put on a link: the kernel's own choice has no handle, and is the other kernel's
/// own choice there.
fn on_link(messages: &[NetlinkMessage], index: i32) -> Vec<(Qdisc, &NetlinkMessage)> {
    let ours = messages.iter().filter(|m| index_at(m, 4) == Some(index));
    ours.filter_map(|m| Some((Qdisc::read(m)?, m))).filter(|(q, _)| q.handle != 0).collect()
}

/// Returns those of a link, from `all` that there are, parents first. `path` is the namespace's, for hints.
pub(super) fn capture(
    socket: &mut Rtnl,
    all: &[NetlinkMessage],
    link: &LinkInfo,
    path: Option<&Path>,
) -> Result<Vec<Qdisc>, Problem> {
    let refuse = |kind: &str, why: &str, place: &str| {
        Err(Problem::new(format!("the queueing discipline {kind} of {} cannot be carried", link.name), why)
            .hint(format!(
                "take it away (`{} tc qdisc del dev {} {place}`), or use one without classes and filters: {}",
                enter(path),
                link.name,
                CARRIED.join(", ")
            )))
    };

    let trying = || format!("cannot read the traffic control of {}", link.name);
    let mut waiting = Vec::new();
    for (one, message) in on_link(all, link.index) {
        let hook = matches!(one.kind.as_str(), "ingress" | "clsact");
        let parents = if hook { HOOKS.to_vec() } else { vec![one.handle] };
        let place = if hook { &one.kind } else { "root" };
        for parent in parents {
            if !socket.filters(link.index, parent).trying(trying)?.is_empty() {
                return refuse(&one.kind, "it has filters", place);
            }
        }

        if hook {
            // Without filters it does nothing.
            continue;
        }
        if !one.is_carried() {
            return refuse(&one.kind, "it has classes, or what it knows cannot be read", place);
        }

        if message.attributes(FIXED).get(TCA_STAB).is_some() {
            return refuse(&one.kind, "it has a size table, which cannot be read", place);
        }
        waiting.push(one);
    }

    let mut list: Vec<Qdisc> = Vec::new();
    while let Some(at) =
        waiting.iter().position(|w| is_root(w) || list.iter().any(|p| p.handle == w.parent & MAJOR))
    {
        list.push(waiting.swap_remove(at));
    }

    match waiting.first() {
        Some(lost) => refuse(&lost.kind, "it is in a class of one that is not carried", "root"),
        None => Ok(list),
    }
}

/// Puts on a link what is wanted, in the place of whatever was put there before.
pub(super) fn restore(
    socket: &mut Rtnl,
    all: &[NetlinkMessage],
    link: &LinkInfo,
    wanted: &[Qdisc],
) -> Result<(), Problem> {
    for (old, _) in on_link(all, link.index).iter().filter(|(q, _)| is_root(q)) {
        socket
            .change(&Request::new(DELQDISC, 0, &tcmsg(link.index, old.handle, old.parent, 0)))
            .trying(|| format!("cannot take the queueing discipline of {} away", link.name))?;
    }

    for one in wanted {
        socket.change(&one.request(NEWQDISC, CREATE | EXCL, link.index)).map_err(|e| {
            let missing = e.errno == Errno::ENOENT;
            let what = format!("cannot make the queueing discipline {} of {}", one.kind, link.name);
            let problem = Problem::new(what, e);
            if missing {
                problem.hint(format!("this kernel lacks the module sch_{}", one.kind))
            } else {
                problem
            }
        })?;
    }

    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qdisc(kind: &str, handle: u32, parent: u32) -> Qdisc {
        Qdisc { kind: kind.into(), handle, parent, options: None }
    }

    #[test]
    fn a_peer_sends_no_other_tree() {
        let root = qdisc("tbf", 0x1_0000, ROOT);
        assert_eq!(check(&[root.clone(), qdisc("fq_codel", 0x2_0000, 0x1_0001)]), Ok(()));
        for bad in [
            qdisc("htb", 0x2_0000, 0x1_0001),
            qdisc("pfifo", 0x2_0001, 0x1_0001),
            qdisc("pfifo", 0, 0x1_0001),
            qdisc("pfifo", 0x2_0000, 0x3_0001),
            Qdisc { options: Some(vec![0; MAX_OPTIONS + 1]), ..qdisc("pfifo", 0x2_0000, ROOT) },
        ] {
            assert!(check(&[root.clone(), bad.clone()]).is_err(), "{bad:?}");
        }
        assert!(check(&vec![root; MAX_QDISCS + 1]).is_err());
    }
}
