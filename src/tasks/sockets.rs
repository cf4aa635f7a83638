//! Options and multicast memberships of the container's sockets, which CRIU carries in small part only: looked
//! at on the source, in the freeze beside CRIU's work, and given to the restored tasks' sockets before
//! any of them runs. Both from outside, through other descriptors of the sockets.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::freezer::of_first_space;
use crate::problem::Problem;
use crate::sys::netns::NetNs;
use crate::sys::process::{self, proc_text};
use crate::sys::socket_options::{
    KNOWN, LONGEST, MOST_SOURCES, Meaning, Membership, OptionValue, SocketType, changed, defaults,
    give, join, membership,
};

/// Most options and memberships of one container.
pub const MOST: usize = 40_000;
/// Most sockets in one message.
pub const BATCH: usize = 1000;
/// Most options and groups of one socket.
const MOST_OF_ONE: usize = 1000;
/// Most pairs of a socket and a group that are looked at.
const MOST_LOOKS: usize = 200_000;
/// Longest name of an interface: `IFNAMSIZ`.
const LONGEST_NAME: usize = 15;

/// What a socket has other than a fresh one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketSettings {
    /// A process that has it, as the container numbers it.
    pub vpid: i32,
    /// Its descriptor there.
    pub number: RawFd,
    /// Where they stand in [`KNOWN`], and their values.
    pub options: Vec<OptionValue>,
    /// The same, of those that are an interface: its name, for over there it may have another number.
    pub interfaces: Vec<(u8, String)>,
    /// The multicast groups that it is a member of.
    pub groups: Vec<Group>,
}

/// A membership in a multicast group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// On which interface.
    pub interface: String,
    /// The group.
    pub group: IpAddr,
    /// Whether it takes what comes from any but these sources, or (`false`) from these only.
    pub exclude: bool,
    /// See `exclude`.
    pub sources: Vec<IpAddr>,
}

/// A group that an interface listens to, and how many sockets are its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Joined {
    /// The interface's number.
    pub interface: u32,
    /// The group.
    pub group: IpAddr,
    /// As the kernel counts them; of some it is one itself.
    pub users: u32,
}

impl Joined {
    /// Groups that the kernel joins: of all nodes, of all routers, of the container's own addresses.
    pub fn by_itself(self) -> bool {
        let group = match self.group {
            // All hosts; all snoopers, where multicasts are routed.
            IpAddr::V4(group) => {
                let known = [Ipv4Addr::new(224, 0, 0, 1), Ipv4Addr::new(224, 0, 0, 106)];
                return known.contains(&group);
            }
            IpAddr::V6(group) => group,
        };
        match group.segments() {
            [0xff01 | 0xff02, 0, 0, 0, 0, 0, 0, 1 | 2] => true,
            [0xff05, 0, 0, 0, 0, 0, 0, 2] | [0xff02, 0, 0, 0, 0, 0, 0, 0x6a] => true,
            [0xff02, 0, 0, 0, 0, 1, last, _] => last >> 8 == 0xff,
            _ => false,
        }
    }
}

/// All groups of a process's network namespace.
pub fn joined(pid: i32) -> Vec<Joined> {
    let table = |name: &str| proc_text(pid, &format!("net/{name}")).unwrap_or_default();
    groups(&table("igmp"), &table("igmp6"))
}

/// `/proc/PID/net/igmp` and `igmp6`.
pub fn groups(igmp: &str, igmp6: &str) -> Vec<Joined> {
    let mut found = Vec::new();
    let mut interface = None;
    for line in igmp.lines().skip(1) {
        let mut fields = line.split_ascii_whitespace();
        if !line.starts_with('\t') {
            interface = fields.next().and_then(|number| number.parse().ok());
            continue;
        }

        let group = fields.next().and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let users = fields.next().and_then(|users| users.parse().ok());
        if let (Some(interface), Some(group), Some(users)) = (interface, group, users) {
            let group = Ipv4Addr::from(group.to_ne_bytes()).into();
            found.push(Joined { interface, group, users });
        }
    }

    found.extend(igmp6.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let interface = fields.next()?.parse().ok()?;
        let group = u128::from_str_radix(fields.nth(1)?, 16).ok()?;
        let users = fields.next()?.parse().ok()?;
        Some(Joined { interface, group: Ipv6Addr::from(group).into(), users })
    }));

    found
}

/// A socket of the internet.
struct InternetSocket {
    /// Its process, as the container numbers it.
    vpid: i32,
    /// Its descriptor there.
    number: RawFd,
    kind: SocketType,
    /// A duplicate of that.
    file: OwnedFd,
}

/// Returns those that these processes have, each once.
fn sockets(pids: &[i32]) -> Result<Vec<InternetSocket>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for task in of_first_space(pids)? {
        // Whoever has ended meanwhile has none.
        let Ok(list) = process::open_files(task.pid) else { continue };
        let Ok(pidfd) = process::pidfd_open(task.pid) else { continue };
        for (number, target) in list {
            let Some(inode) = process::socket_inode(&target) else { continue };
            if seen.contains(&inode) {
                continue;
            }
            let Ok(file) = process::pidfd_getfd(&pidfd, number) else { continue };
            seen.insert(inode);
            if let Some(kind) = SocketType::of(&file) {
                found.push(InternetSocket { vpid: task.vpid, number, kind, file });
            }
        }
    }
    Ok(found)
}

/// Looks at the sockets of tasks in this network namespace; what is more than can go along, to be told.
///
/// # Errors
/// When they cannot be looked at.
pub fn look(
    namespace: &NetNs,
    init: i32,
    pids: &[i32],
) -> Result<(Vec<SocketSettings>, Option<Problem>)> {
    let sockets = sockets(pids)?;
    if sockets.is_empty() {
        return Ok((Vec::new(), None));
    }
    let mut joined = joined(init);
    joined.retain(|one| !one.by_itself());
    within_reason(&sockets, &joined)?;

    // Whatever a fresh socket has is the namespace's, and goes along with it.
    let (fresh, names) = namespace.run(|| {
        let mut fresh: HashMap<SocketType, Vec<OptionValue>> = HashMap::new();
        for socket in &sockets {
            let values = || defaults(socket.kind).unwrap_or_default();
            fresh.entry(socket.kind).or_insert_with(values);
        }
        (fresh, interface_names())
    })?;

    let names = names?;

    let (mut found, mut count, mut left) = (Vec::new(), 0, 0);
    for InternetSocket { vpid, number, kind, file } in sockets {
        let values = fresh.get(&kind).map(Vec::as_slice).unwrap_or_default();
        let mut settings = SocketSettings {
            vpid,
            number,
            options: Vec::new(),
            interfaces: Vec::new(),
            groups: Vec::new(),
        };

        for (option, value) in changed(&file, values) {
            match KNOWN.get(usize::from(option)).map(|known| known.meaning) {
                Some(Meaning::Interface { network_order }) => {
                    let name = interface_of(&value, network_order).and_then(|n| names.get(&n));
                    settings.interfaces.extend(name.map(|name| (option, name.clone())));
                }
                _ => settings.options.push((option, value)),
            }
        }

        for one in &joined {
            if !kind.joins() || one.group.is_ipv6() && !kind.is_v6() {
                continue;
            }
            let Some(membership) = membership(&file, one.interface, one.group)? else { continue };
            let Some(interface) = names.get(&one.interface) else { continue };
            let Membership { group, exclude, sources, .. } = membership;
            let interface = interface.clone();
            settings.groups.push(Group { interface, group, exclude, sources });
        }

        let own = settings.options.len() + settings.interfaces.len() + settings.groups.len();
        if own > 0 && (count + own > MOST || own > MOST_OF_ONE) {
            left += 1;
        } else if own > 0 {
            count += own;
            found.push(settings);
        }
    }

    let told = (left > 0).then(|| {
        let why = format!("{left} sockets have more than {MOST} of them in all");
        Problem::new("options of sockets are defaults again", why).warning()
    });

    Ok((found, told))
}

/// Groups of which a checkpoint would lose members: not all that the kernel counts are sockets of these
/// processes.
pub fn strange_members(pids: &[i32], joined: &[Joined]) -> Result<Vec<Joined>> {
    let sockets = sockets(pids)?;
    let mut strange = Vec::new();
    within_reason(&sockets, joined)?;
    for one in joined {
        let mut members = 0;
        for socket in sockets.iter().filter(|socket| socket.kind.joins()) {
            members += u32::from(membership(&socket.file, one.interface, one.group)?.is_some());
        }
        if members < one.users {
            strange.push(*one);
        }
    }
    Ok(strange)
}

/// Of each socket the kernel is asked for each group: half a microsecond.
fn within_reason(sockets: &[InternetSocket], groups: &[Joined]) -> Result<()> {
    let (sockets, groups) = (sockets.iter().filter(|one| one.kind.joins()).count(), groups.len());
    if sockets.saturating_mul(groups) > MOST_LOOKS {
        bail!("{sockets} sockets and {groups} groups: each could be a member of each");
    }
    Ok(())
}

/// Refuses what no honest source sends.
///
/// # Errors
/// Says what is wrong.
pub fn validate(list: &[SocketSettings]) -> Result<()> {
    let mut count = 0;
    for one in list {
        count += one.options.len() + one.interfaces.len() + one.groups.len();
        let plain = one.options.iter().all(|(option, value)| {
            let known = KNOWN.get(usize::from(*option));
            known.is_some_and(|known| known.meaning == Meaning::Plain) && value.len() <= LONGEST
        });
        let named = one.interfaces.iter().all(|(option, name)| {
            let known = KNOWN.get(usize::from(*option));
            known.is_some_and(|known| known.meaning != Meaning::Plain) && name.len() <= LONGEST_NAME
        });

        let joined = one.groups.iter().all(|group| {
            let same = |source: &IpAddr| source.is_ipv4() == group.group.is_ipv4();
            group.group.is_multicast()
                && group.interface.len() <= LONGEST_NAME
                && group.sources.len() <= MOST_SOURCES
                && group.sources.iter().all(same)
        });

        if !(plain && named && joined) || one.number < 0 {
            bail!("no socket has such options: {one:?}");
        }
    }

    if count > MOST {
        bail!("{count} options of sockets, more than {MOST}");
    }

    Ok(())
}

/// Has the sockets of restored tasks, which CRIU holds and none of which has run, what they had. What this
/// host cannot, to be told.
///
/// # Errors
/// When a socket is not there.
pub fn set(namespace: &NetNs, pids: &[i32], list: &[SocketSettings]) -> Result<Vec<Problem>> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let names = namespace.run(interface_names)??;
    let numbers: HashMap<&str, u32> =
        names.iter().map(|(number, name)| (name.as_str(), *number)).collect();
    let mut pidfds = HashMap::new();

    for task in of_first_space(pids)? {
        pidfds.insert(task.vpid, process::pidfd_open(task.pid)?);
    }
    let mut told = Vec::new();
    for one in list {
        // Whoever was put into the container from outside did not come along.
        let Some(pidfd) = pidfds.get(&one.vpid) else { continue };
        let what = || format!("descriptor {} of process {}", one.number, one.vpid);
        let file = process::pidfd_getfd(pidfd, one.number).with_context(what)?;
        let failed = give_all(&file, one, &numbers);
        told.extend(failed.into_iter().map(|(called, e)| {
            let why = format!("{called} of {}: {e}", what());
            Problem::new("an option of a socket is not what it was", why).warning()
        }));
    }

    Ok(told)
}

fn give_all(
    file: &OwnedFd,
    one: &SocketSettings,
    numbers: &HashMap<&str, u32>,
) -> Vec<(String, io::Error)> {
    let absent = || io::Error::from(nix::errno::Errno::ENODEV);
    let mut failed = Vec::new();
    for (option, value) in &one.options {
        let Some(known) = KNOWN.get(usize::from(*option)) else { continue };
        if let Err(e) = give(file.as_fd(), known, value) {
            failed.push((known.called.to_owned(), e));
        }
    }

    for (option, name) in &one.interfaces {
        let Some(known) = KNOWN.get(usize::from(*option)) else { continue };
        let Meaning::Interface { network_order } = known.meaning else { continue };
        let number = numbers.get(name.as_str()).copied().ok_or_else(absent);
        let done = number.and_then(|number| {
            let bytes = if network_order { number.to_be_bytes() } else { number.to_ne_bytes() };
            give(file.as_fd(), known, &bytes)
        });

        if let Err(e) = done {
            failed.push((format!("{} ({})", known.called, name.escape_debug()), e));
        }
    }

    for Group { interface, group, exclude, sources } in &one.groups {
        let number = numbers.get(interface.as_str()).copied().ok_or_else(absent);
        let done = number.and_then(|number| {
            let (group, exclude, sources) = (*group, *exclude, sources.clone());
            join(file.as_fd(), &Membership { interface: number, group, exclude, sources })
        });
        if let Err(e) = done {
            failed.push((format!("the multicast group {group}"), e));
        }
    }

    failed
}

fn interface_of(value: &[u8], network_order: bool) -> Option<u32> {
    let bytes = *value.first_chunk()?;
    let number = if network_order { u32::from_be_bytes(bytes) } else { u32::from_ne_bytes(bytes) };
    (number != 0).then_some(number)
}

/// Of the calling thread's network namespace.
fn interface_names() -> io::Result<HashMap<u32, String>> {
    let list = nix::net::if_::if_nameindex()?;
    let names = list.iter().map(|one| (one.index(), one.name().to_string_lossy().into_owned()));
    Ok(names.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    #[test]
    fn groups_are_read() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    7\teth0      :     2      V3\n\t\t\t\t030201EF     3 0:00000000\t\t0\n";
        let igmp6 = "7    eth0            ff150000000000000000000000000007     2 00000004 0\n";
        let one = |interface, group: &str, users| {
            let group = if group.contains(':') {
                group.parse().unwrap()
            } else {
                // As this machine's bytes lie.
                IpAddr::V4(group.parse().unwrap())
            };
            Joined { interface, group, users }
        };
        let wanted = [one(1, "224.0.0.1", 1), one(7, "239.1.2.3", 3), one(7, "ff15::7", 2)];
        assert_eq!(groups(igmp, igmp6), wanted);
    }

    #[test]
    fn what_the_kernel_joins_is_no_membership() {
        let by_itself = |group: &str| {
            let group = group.parse().unwrap();
            Joined { interface: 1, group, users: 1 }.by_itself()
        };
        for own in ["224.0.0.1", "ff02::1", "ff01::1", "ff02::1:ff00:c", "ff05::2"] {
            assert!(by_itself(own), "{own}");
        }
        for other in ["239.9.9.9", "224.0.0.251", "ff15::9", "ff02::fb"] {
            assert!(!by_itself(other), "{other}");
        }
    }

    #[test]
    fn only_what_can_be_is_taken() {
        let good = SocketSettings {
            vpid: 1,
            number: 5,
            options: vec![(0, vec![1, 0, 0, 0])],
            interfaces: Vec::new(),
            groups: vec![Group {
                interface: "eth0".into(),
                group: "239.1.2.3".parse().unwrap(),
                exclude: true,
                sources: vec!["10.0.0.1".parse().unwrap()],
            }],
        };

        validate(std::slice::from_ref(&good)).unwrap();
        let bad = |change: fn(&mut SocketSettings)| {
            let mut one = good.clone();
            change(&mut one);
            validate(&[one]).unwrap_err();
        };

        bad(|one| one.options[0].0 = 255);
        bad(|one| one.options[0].1 = vec![0; LONGEST + 1]);
        bad(|one| one.interfaces.push((0, "eth0".into())));
        bad(|one| one.groups[0].group = "10.0.0.1".parse().unwrap());
        bad(|one| one.groups[0].sources = vec!["::1".parse().unwrap()]);
        bad(|one| one.groups[0].interface = "a name that is too long".into());
        validate(&vec![good; MOST / 2 + 1]).unwrap_err();
    }

    #[test]
    fn fuzz_groups() {
        let table = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                     1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let target = Target::new("groups").sample(table);
        let target =
            target.sample("7    eth0            ff150000000000000000000000000007     2 4 0\n");
        target.words(&[b"\t\t\t\t", b"\n"]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            found(&[groups(&text, &text).len()])
        });
    }
}
