//! How a home reaches the container's new host: as its own operator does, and if need be through the
//! host before.

use anyhow::{Result, bail};

use crate::transport::connect::Destination;

/// Most hosts through which another one is reached.
const MAX_HOPS: usize = 2;

/// A host that another one has named, reached as the operator here does it: the other one chooses no
/// command that is run here or there.
pub(super) fn reached_by(
    shell: Option<&(Vec<String>, String)>,
    destination: Destination,
) -> Result<Destination> {
    let (Destination::Shell { host, port, .. }, Some((rsh, remote_ferry))) = (destination, shell)
    else {
        bail!("only a remote shell leads from the container's home to another host");
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@:%".contains(c);
    if host.is_empty() || host.len() > 255 || host.starts_with('-') || !host.chars().all(plain) {
        bail!("{host:?} is no host's name");
    }
    Ok(Destination::Shell { host, port, rsh: rsh.clone(), remote_ferry: remote_ferry.clone() })
}

/// Returns how a host is reached, for people.
pub(super) fn way(destination: &Destination) -> String {
    match destination {
        Destination::Shell { host, rsh, .. } => match hops(rsh).last() {
            Some(over) => format!("{host} (through {over})"),
            None => host.clone(),
        },
        other => other.to_string(),
    }
}

/// Stands between a host that is gone through and the shell that goes on from there; a shell takes it
/// for nothing.
const MARK: &str = "FERRY_THROUGH=1";

/// The hosts on the way, from what [`through`] has made.
fn hops(rsh: &[String]) -> Vec<&str> {
    let marked = rsh.windows(3).filter(|w| w[1] == "env" && w[2] == MARK);
    marked.map(|w| w[0].as_str()).collect()
}

/// The way to `to` through the host `over`: the remote shell there runs the one that goes on. None
/// where there is no shell, or the chain would be too long.
pub(super) fn through(over: &Destination, to: &Destination) -> Option<Destination> {
    let Destination::Shell { host: first, port, rsh, .. } = over else { return None };
    let Destination::Shell { host, port: to_port, rsh: next, remote_ferry } = to else {
        return None;
    };
    if hops(rsh).len() + 1 >= MAX_HOPS {
        return None;
    }
    let mut command = rsh.clone();
    if let Some(port) = port {
        command.extend(["-p".into(), port.to_string()]);
    }
    command.push(first.clone());
    // The first shell's other end takes words apart again.
    command.extend(["env".into(), MARK.into()]);
    command.extend(next.iter().map(|w| quoted(w)));
    Some(Destination::Shell {
        host: host.clone(),
        port: *to_port,
        rsh: command,
        remote_ferry: remote_ferry.clone(),
    })
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(host: &str, rsh: &[&str]) -> Destination {
        Destination::Shell {
            host: host.into(),
            port: None,
            rsh: rsh.iter().map(|w| (*w).to_owned()).collect(),
            remote_ferry: "ferry".into(),
        }
    }

    #[test]
    fn another_host_names_a_host_and_no_command() {
        let own = (vec!["ssh".to_owned()], "ferry".to_owned());
        let named = reached_by(Some(&own), shell("root@c", &["sh", "-c", "evil"])).unwrap();
        assert_eq!(named, shell("root@c", &["ssh"]));
        for bad in ["", "-oProxyCommand=evil", "c evil", "c;evil"] {
            assert!(reached_by(Some(&own), shell(bad, &["ssh"])).is_err(), "{bad}");
        }
        assert!(reached_by(Some(&own), Destination::Unix("/x".into())).is_err());
        assert!(reached_by(None, shell("c", &["ssh"])).is_err());
    }

    #[test]
    fn the_way_through_a_host_is_one_command_and_not_longer() {
        let b = shell("b", &["ssh"]);
        let c = through(&b, &shell("c", &["ssh", "-o", "A B"])).unwrap();
        let Destination::Shell { host, rsh, .. } = &c else { panic!("{c:?}") };
        assert_eq!(host, "c");
        assert_eq!(rsh.join(" "), "ssh b env FERRY_THROUGH=1 ssh -o 'A B'");
        assert_eq!(way(&c), "c (through b)");
        assert_eq!(way(&b), "b");
        assert_eq!(through(&c, &shell("d", &["ssh"])), None);
        assert_eq!(through(&Destination::Unix("/x".into()), &b), None);
    }
}
