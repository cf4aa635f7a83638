//! Whether the container's sockets can go along with the addresses, and everybody else's stay.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::{Claim, MAX_CLAIMS};
use crate::network::sockets::{Flow, SocketInfo};
use crate::problem::Problem;

/// Returns what the container's sockets are bound to, `own` being their numbers and `moved` the addresses
/// that go along.
///
/// # Errors
/// When one of them is bound to another address of the host, or to somebody outside by loopback; or
/// when others have connections on one of these.
pub(super) fn of(
    known: &[SocketInfo],
    own: &HashSet<u32>,
    moved: &[IpAddr],
) -> Result<Vec<Claim>, Problem> {
    let by_flow: HashMap<Flow, u32> =
        known.iter().filter(|k| !k.udp && !k.listens).map(|k| (k.flow, k.inode)).collect();
    let (mut ours, mut theirs, mut outside) = (Vec::new(), Vec::new(), Vec::new());
    let mut claims = HashSet::new();
    for one in known.iter().filter(|k| k.inode != 0) {
        let (local, remote) = (one.flow.local, one.flow.remote);
        if !own.contains(&one.inode) {
            if !one.udp && !one.listens && moved.contains(&local.ip()) {
                theirs.push(one);
            }
            continue;
        }

        let anybody = one.udp || one.listens;
        let fits = moved.contains(&local.ip())
            || local.ip().is_loopback()
            || anybody && (local.ip().is_unspecified() || local.ip().is_multicast());
        if !fits {
            ours.push(one);
        }

        // The other end must be in the container, too. One that is nobody's any more is.
        let other = by_flow.get(&Flow { local: remote, remote: local });
        if !anybody
            && local.ip().is_loopback()
            && other.is_some_and(|i| *i != 0 && !own.contains(i))
        {
            outside.push(one);
        }
        claims.insert(Claim { udp: one.udp, listens: one.listens, local });
    }

    let list = moved.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if let Some((first, more)) = first(&ours) {
        return Err(Problem::new(
            format!("{} cannot go along", describe(first)),
            format!("{} stays on this host: only {list} is to move{more}", first.flow.local.ip()),
        )
        .hint(
            "let the container use the address that moves only, or name this one, too, with a \
             further --move-address if nobody else needs it here",
        ));
    }

    if let Some((first, more)) = first(&outside) {
        return Err(Problem::new(
            format!("{} cannot go along", describe(first)),
            format!("its other end is a program of this host outside of the container{more}"),
        )
        .hint("end that connection; over there nobody would be at its other end"));
    }

    if let Some((first, more)) = first(&theirs) {
        return Err(Problem::new(
            format!("{} cannot move", first.flow.local.ip()),
            format!("{} is not the container's, and would be cut{more}", describe(first)),
        )
        .hint(format!(
            "`ss -tnp src {}` shows whose it is; an address that moves must be the container's alone",
            first.flow.local.ip()
        )));
    }

    // First what takes connections: that is where ports can be taken.
    let mut claims: Vec<Claim> = claims.into_iter().collect();
    claims.sort_by_key(|c| (!c.listens && !c.udp, c.local, c.udp));
    claims.truncate(MAX_CLAIMS);

    Ok(claims)
}

/// The first, and how many more there are.
fn first<'a>(list: &[&'a SocketInfo]) -> Option<(&'a SocketInfo, String)> {
    let more = match list.len() {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    };
    list.first().map(|one| (*one, more))
}

fn describe(one: &SocketInfo) -> String {
    let Flow { local, remote } = one.flow;
    match (one.udp, one.listens) {
        (true, _) => format!("the UDP socket at {local}"),
        (false, true) => format!("the socket that listens at {local}"),
        (false, false) => format!("the connection {local} - {remote}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(inode: u32, listens: bool, local: &str, remote: &str) -> SocketInfo {
        let flow = Flow { local: local.parse().unwrap(), remote: remote.parse().unwrap() };
        SocketInfo { udp: false, listens, flow, inode }
    }

    #[test]
    fn sockets_are_the_containers_or_are_left_alone() {
        let own = HashSet::from([1, 2, 3, 4]);
        let moved = ["10.0.0.5".parse().unwrap()];
        let nobody = "0.0.0.0:0";
        let mut all = vec![
            known(1, true, "0.0.0.0:7000", nobody),
            known(2, false, "10.0.0.5:7000", "10.0.0.9:4000"),
            known(3, false, "127.0.0.1:7000", "127.0.0.1:5000"),
            known(4, false, "127.0.0.1:5000", "127.0.0.1:7000"),
            known(9, false, "10.0.0.1:22", "10.0.0.9:4001"),
            known(0, false, "10.0.0.5:7000", "10.0.0.9:4002"),
        ];

        let fine = of(&all, &own, &moved).unwrap();
        let claim = |c: &Claim| (c.listens, c.local.to_string());
        assert_eq!(claim(&fine[0]), (true, "0.0.0.0:7000".into()));
        assert_eq!(fine.len(), 4);

        let mut refused = |bad: SocketInfo, word: &str| {
            all.push(bad);
            let problem = of(&all, &own, &moved).unwrap_err().to_string();
            all.pop();
            assert!(problem.contains(word), "no {word:?} in {problem}");
        };

        refused(
            known(2, false, "10.0.0.1:7000", "10.0.0.9:1"),
            "connection 10.0.0.1:7000 - 10.0.0.9:1",
        );
        refused(known(1, true, "10.0.0.1:7001", nobody), "listens at 10.0.0.1:7001");
        refused(known(9, false, "10.0.0.5:22", "10.0.0.9:1"), "is not the container's");

        let udp = SocketInfo { udp: true, ..known(1, false, "10.0.0.1:53", nobody) };
        refused(udp, "UDP socket at 10.0.0.1:53");
        all[3].inode = 9;
        let problem = of(&all, &own, &moved).unwrap_err().to_string();
        assert!(problem.contains("outside of the container"), "{problem}");
    }
}
