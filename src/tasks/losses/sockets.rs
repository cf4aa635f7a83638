//! Sockets that a checkpoint leaves behind, or makes anew as something else. The tables are those of
//! the container's network namespace, below `/proc/PID/net`.

use std::collections::HashSet;

use super::files::OpenFile;
use super::{Scene, named, who};
use crate::oci::migratable::CURE;
use crate::problem::Problem;
use crate::sys::process;
use crate::tasks::unix_names::{self, OtherName};
use crate::tasks::{mptcp, sockets};

/// Number of the first interface of a new namespace, its loopback.
const LOOPBACK: u32 = 1;

/// Everything about sockets.
pub fn problems(scene: Scene<'_>, open: &[OpenFile]) -> Vec<Problem> {
    let own: HashSet<u64> = open.iter().filter_map(OpenFile::socket).collect();
    let table = |name: &str| process::proc_text(scene.init, &format!("net/{name}"));
    let table = |name: &str| table(name).unwrap_or_default();
    let mut found = Vec::new();
    if !own.is_empty() {
        found.extend(link_local(&table("tcp6"), &own));
        found.extend(multipath(scene));
        found.extend(linked(scene, &own));
    }
    if scene.own_network() {
        found.extend(memberships(scene));
        let interfaces = table("dev").lines().filter(|line| line.contains(':')).count();
        found.extend(packet(&table("packet"), &own, interfaces));
    }
    found
}

/// Multicast groups with members that are no sockets of the container's: those go along
/// ([`sockets`](crate::tasks::sockets)).
fn memberships(scene: Scene<'_>) -> Option<Problem> {
    let mut joined = sockets::joined(scene.init);
    joined.retain(|one| !one.by_itself());
    if joined.is_empty() {
        return None;
    }
    let strange = match sockets::strange_members(scene.tasks, &joined) {
        Ok(strange) => strange,
        Err(e) => {
            let what = "the container is a member of multicast groups, and nobody can say how";
            return Some(Problem::new(what, format!("{e:#}")));
        }
    };
    let mut groups: Vec<String> = strange.iter().map(|one| one.group.to_string()).collect();
    groups.sort();
    groups.dedup();
    (!groups.is_empty()).then(|| {
        Problem::new(
            format!("others are members of multicast groups in the container's network: {}", named(&groups)),
            "not all of their members are sockets of the container's: nothing would arrive for them any more",
        )
        .hint("end the program that has joined them in its network namespace")
    })
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

/// Sockets of Multipath TCP that cannot go along.
fn multipath(scene: Scene<'_>) -> Option<Problem> {
    let found = mptcp::sockets(scene.tasks);
    let (pid, why) = if scene.own_network() {
        mptcp::obstacle(scene.init, &found)?
    } else {
        (found.first()?.pid, "and the container has the host's network: CRIU cannot carry it")
    };
    Some(
        Problem::new(
            "the container uses Multipath TCP",
            format!("{} has such a socket: {why}", who(pid)),
        )
        .hint(format!(
            "start it with plain TCP: Go programs with GODEBUG=multipathtcp=0, others with the \
             sysctl net.mptcp.enabled=0 in its network namespace; {CURE}"
        )),
    )
}

/// Sockets with several names: those that were only renamed go along ([`unix_names`]).
fn linked(scene: Scene<'_>, own: &HashSet<u64>) -> Vec<Problem> {
    let found = unix_names::find(scene.init, own).into_iter().filter(|one| one.taken);
    let problem = |one: OtherName| {
        let what = format!(
            "the socket {} has another name, {}",
            one.bound.display(),
            one.current.display()
        );
        Problem::new(what, "CRIU makes it anew under the first one: clients would not find it")
            .hint("have the program bind the name itself, or rename instead of link it")
    };
    found.map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Target;

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
    fn fuzz_tables_of_sockets() {
        let read = |name: &str| std::fs::read(format!("/proc/self/net/{name}")).unwrap_or_default();
        let mut target = Target::new("tables-of-sockets");
        for name in ["packet", "tcp6"] {
            let mut table = read(name);
            table.truncate(2000);
            target = target.sample(table);
        }
        let line =
            "   0: 000080FE000000000000000001000000:1F90 000080FE00:C350 01 0:0 0:0 0 0 0 5 1\n";
        target = target.sample(format!("head\n{line}")).sample("head\np 3 3 0003 9 1 0 0 5\n");
        let own = HashSet::from([5]);
        target.words(&[b"\t\t\t\t"]).run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let found = packet(&text, &own, 1).or(link_local(&text, &own));
            found.map_or(Ok(()), |found| anyhow::bail!("{}", found.why))
        });
    }
}
