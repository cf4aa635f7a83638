//! Sockets that a checkpoint leaves behind, or makes anew as something else. The tables are those of
//! the container's network namespace, below `/proc/PID/net`.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirEntryExt, FileTypeExt};
use std::path::{Path, PathBuf};

use super::files::Open;
use super::{Scene, directory_in, named, who};
use crate::network::unix;
use crate::problem::Problem;
use crate::sys::{process, socket};

/// Number of the first interface of a new namespace, its loopback.
const LOOPBACK: u32 = 1;
/// Names of a directory that are looked at.
const MOST_NAMES: usize = 100_000;

/// Everything about sockets.
pub fn problems(scene: Scene<'_>, open: &[Open]) -> Vec<Problem> {
    let own: HashSet<u64> = open.iter().filter_map(Open::socket).collect();
    let table = |name: &str| process::proc_text(scene.init, &format!("net/{name}"));
    let table = |name: &str| table(name).unwrap_or_default();
    let mut found = Vec::new();
    if !own.is_empty() {
        found.extend(link_local(&table("tcp6"), &own));
        found.extend(mptcp(&table("protocols"), open));
        found.extend(renamed(scene, &own));
    }
    if scene.own_network() {
        found.extend(memberships(&table("igmp"), &table("igmp6")));
        let interfaces = table("dev").lines().filter(|line| line.contains(':')).count();
        found.extend(packet(&table("packet"), &own, interfaces));
    }
    found
}

/// Multicast groups that are not there by themselves.
fn memberships(igmp: &str, igmp6: &str) -> Option<Problem> {
    let of_ipv4 = igmp.lines().filter(|line| line.starts_with('\t')).filter_map(|line| {
        let group = u32::from_str_radix(line.split_ascii_whitespace().next()?, 16).ok()?;
        let group = Ipv4Addr::from(group.to_ne_bytes());
        // All hosts; all snoopers, where multicasts are routed.
        (![Ipv4Addr::new(224, 0, 0, 1), Ipv4Addr::new(224, 0, 0, 106)].contains(&group))
            .then(|| group.to_string())
    });
    let of_ipv6 = igmp6.lines().filter_map(|line| {
        let group = u128::from_str_radix(line.split_ascii_whitespace().nth(2)?, 16).ok()?;
        let group = Ipv6Addr::from(group);
        (!by_itself(group)).then(|| group.to_string())
    });
    let mut groups: Vec<String> = of_ipv4.chain(of_ipv6).collect();
    groups.sort();
    groups.dedup();
    (!groups.is_empty()).then(|| {
        Problem::new(
            format!("the container is a member of the multicast groups {}", named(&groups)),
            "CRIU does not carry memberships: nothing would arrive for them any more",
        )
        .hint("start it over there, or have it do without (mDNS, SSDP, cluster discovery …)")
    })
}

/// Groups that the kernel joins: of all nodes, of all routers, of the container's own addresses.
fn by_itself(group: Ipv6Addr) -> bool {
    match group.segments() {
        [0xff01 | 0xff02, 0, 0, 0, 0, 0, 0, 1 | 2] => true,
        [0xff05, 0, 0, 0, 0, 0, 0, 2] | [0xff02, 0, 0, 0, 0, 0, 0, 0x6a] => true,
        [0xff02, 0, 0, 0, 0, 1, last, _] => last >> 8 == 0xff,
        _ => false,
    }
}

/// Packet sockets that are bound to an interface whose number will be another. packet(7)
fn packet(table: &str, own: &HashSet<u64>, interfaces: usize) -> Option<Problem> {
    let bound = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let interface: u32 = fields.nth(4)?.parse().ok()?;
        let inode: u64 = fields.last()?.parse().ok()?;
        own.contains(&inode).then_some(interface)
    });
    // A namespace that is made anew counts from the loopback on.
    let most = u32::try_from(interfaces).unwrap_or(u32::MAX).max(LOOPBACK);
    let number = bound.into_iter().find(|interface| *interface > most)?;
    Some(
        Problem::new(
            "the container listens to an interface by its number (AF_PACKET)",
            format!(
                "number {number} will be another one over there, and CRIU binds it by its number"
            ),
        )
        .hint(
            "end the program (tcpdump, a DHCP client …); or make the interface within the \
             namespace, where numbers begin anew: `ip link add NAME link eth0 netns …`",
        ),
    )
}

/// Connections over addresses that mean something only together with an interface.
fn link_local(tcp6: &str, own: &HashSet<u64>) -> Option<Problem> {
    let found = tcp6.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let local = fields.nth(1)?;
        let state = fields.nth(1)?;
        let inode: u64 = fields.nth(5)?.parse().ok()?;
        let first = u32::from_str_radix(local.get(..8)?, 16).ok()?.to_ne_bytes();
        let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        let listens = state == "0A";
        let local = first[0] == 0xfe && first[1] & 0xc0 == 0x80;
        (local && !listens && own.contains(&inode)).then_some(port)
    });
    found.map(|port| {
        Problem::new(
            "the container has a TCP connection over a link-local address (fe80::)",
            format!(
                "at port {port}: such an address belongs to an interface, and CRIU cannot bind it"
            ),
        )
        .hint("end the connection, or have its client use another address of the container")
    })
}

/// MPTCP sockets, which look like TCP's from all other sides.
fn mptcp(protocols: &str, open: &[Open]) -> Option<Problem> {
    // Whoever has none need not look at each.
    let some = protocols
        .lines()
        .filter(|line| line.starts_with("MPTCP"))
        .any(|line| line.split_ascii_whitespace().nth(2).is_some_and(|sockets| sockets != "0"));
    let found = some.then(|| {
        open.iter().filter(|open| open.socket().is_some()).find(|open| {
            let pidfd = process::pidfd_open(open.pid);
            let duplicate = pidfd.and_then(|pidfd| process::pidfd_getfd(&pidfd, open.number));
            duplicate.is_ok_and(|fd| socket::is_mptcp(fd.as_fd()))
        })
    })??;
    Some(
        Problem::new(
            "the container uses Multipath TCP",
            format!("{} has such a socket, and CRIU cannot carry it", who(found.pid)),
        )
        .hint(
            "start it with plain TCP: Go programs with GODEBUG=multipathtcp=0, others with the \
             sysctl net.mptcp.enabled=0 in its network namespace",
        ),
    )
}

/// Sockets that listen under a name which is not the one that they were bound to.
fn renamed(scene: Scene<'_>, own: &HashSet<u64>) -> Vec<Problem> {
    let Ok(named) = unix::named_sockets(scene.init) else {
        return Vec::new();
    };
    let root = format!("/proc/{}/root", scene.init);
    let mine = named.into_iter().filter(|one| own.contains(&u64::from(one.inode)));
    mine.filter_map(|one| {
        let other = other_name(root.as_ref(), &one.name, one.file)?;
        Some(
            Problem::new(
                format!(
                    "the socket {} was renamed to {}, or linked",
                    one.name.display(),
                    other.display()
                ),
                "CRIU makes it anew under the name that it was bound to: clients would not find it",
            )
            .hint("have the program bind the name itself; such as supervisord, haproxy do not"),
        )
    })
    .collect()
}

/// The name in its directory that leads to the file of a socket, where that is not the one it was
/// bound to, or not the only one.
fn other_name(root: &Path, name: &Path, file: u32) -> Option<PathBuf> {
    let (above, last) = (name.parent()?, name.file_name()?);
    let directory = directory_in(root, above)?;
    let list = fs::read_dir(process::path_of(&directory)).ok()?;
    list.flatten()
        .take(MOST_NAMES)
        .filter(|entry| entry.file_name() != last && entry.ino() as u32 == file)
        .find(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .map(|entry| above.join(entry.file_name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Target;

    #[test]
    fn only_what_the_kernel_has_not_joined_is_a_membership() {
        let group = |ip: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(ip));
        let igmp = |ip| {
            format!(
                "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                 1\tlo        :     1      V3\n\t\t\t\t{}     1 0:00000000\t\t0\n\
                 2\teth0      :     1      V3\n\t\t\t\t{}     1 0:00000000\t\t0\n",
                group([224, 0, 0, 1]),
                group(ip)
            )
        };
        let mut plain = String::new();
        for own in [
            "ff020000000000000000000000000001",
            "ff010000000000000000000000000001",
            "ff0200000000000000000001ff00000c",
            "ff050000000000000000000000000002",
        ] {
            plain += &format!("2    eth0            {own}     1 00000004 0\n");
        }
        assert_eq!(memberships(&igmp([224, 0, 0, 1]), &plain), None);
        let found = memberships(&igmp([239, 9, 9, 9]), &plain).unwrap();
        assert!(found.fatal && found.what.ends_with("239.9.9.9"), "{found}");
        let own =
            plain + "2    eth0            ff150000000000000000000000000009     1 0000000C 0\n";
        assert!(memberships(&igmp([224, 0, 0, 1]), &own).unwrap().what.ends_with("ff15::9"));
        assert_eq!(memberships("\tzz\n\t\n", "\u{fffd} a\n"), None);
    }

    #[test]
    fn a_packet_socket_is_bound_to_a_number() {
        let table = |interface| {
            format!(
                "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n\
                 0000000000000000 3      3    0003   {interface}     1 0      0      4711\n"
            )
        };
        let own = HashSet::from([4711]);
        assert_eq!(packet(&table(0), &own, 2), None, "to all");
        assert_eq!(packet(&table(2), &own, 2), None, "as in a new namespace");
        assert!(packet(&table(10), &own, 2).unwrap().why.contains("number 10"));
        assert_eq!(packet(&table(10), &HashSet::new(), 2), None, "somebody else's");
    }

    #[test]
    fn a_connection_over_fe80_is_found() {
        let line = |first: [u8; 4], state: &str, inode: u32| {
            let first = u32::from_ne_bytes(first);
            format!(
                "  sl  local_address remote_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode\n\
                 \x20  0: {first:08X}000000000000000001000000:1B5F {first:08X}000000000000000002000000:9C40 \
                 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 20 4 30 10 -1\n"
            )
        };
        let own = HashSet::from([815]);
        let local = [0xfe, 0x80, 0, 0];
        assert!(link_local(&line(local, "01", 815), &own).unwrap().why.contains("7007"));
        assert_eq!(link_local(&line(local, "0A", 815), &own), None, "it listens");
        assert_eq!(link_local(&line(local, "01", 816), &own), None);
        assert_eq!(link_local(&line([0x20, 1, 13, 184], "01", 815), &own), None);
        assert_eq!(link_local("\n\u{fffd}\n a b c\n", &own), None);
    }

    #[test]
    fn a_renamed_socket_is_found() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let bound = dir.path().join("bound");
        let _socket = std::os::unix::net::UnixListener::bind(&bound).unwrap();
        let file = fs::metadata(&bound).unwrap().ino() as u32;
        assert_eq!(other_name(Path::new("/"), &bound, file), None);
        let other = dir.path().join("other");
        fs::rename(&bound, &other).unwrap();
        assert_eq!(other_name(Path::new("/"), &bound, file).as_ref(), Some(&other));
        fs::remove_file(&other).unwrap();
        assert_eq!(other_name(Path::new("/"), &bound, file), None, "it is simply gone");
    }

    #[test]
    fn fuzz_tables_of_sockets() {
        let read = |name: &str| fs::read(format!("/proc/self/net/{name}")).unwrap_or_default();
        let mut target = Target::new("tables-of-sockets").sample(
            "Idx\tDevice    : Count Querier\tGroup\n1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:0\t\t0\n",
        );
        for name in ["igmp", "igmp6", "packet", "tcp6", "protocols"] {
            let mut table = read(name);
            table.truncate(2000);
            target = target.sample(table);
        }
        let line =
            "   0: 000080FE000000000000000001000000:1F90 000080FE00:C350 01 0:0 0:0 0 0 0 5 1\n";
        target = target.sample(format!("head\n{line}")).sample("head\np 3 3 0003 9 1 0 0 5\n");
        let own = HashSet::from([5]);
        target.words(&[b"MPTCP 1 1", b"\t\t\t\t"]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let found = memberships(&text, &text);
            let found = found.or(packet(&text, &own, 1)).or(link_local(&text, &own));
            found.or(mptcp(&text, &[])).map_or(Ok(()), |found| anyhow::bail!("{}", found.why))
        });
    }
}
