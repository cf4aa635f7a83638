//! Where a container goes, and where a receiver listens, as written on the command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

const NO_TLS: &str = "tls:// is not available yet: use [user@]host, which goes over ssh";

/// The other host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationArg {
    /// Over ssh, or what `--rsh` names.
    Ssh {
        /// Who to log in as; ssh knows if we do not.
        user: Option<String>,
        /// Name or address, without the brackets of IPv6; never begins with a dash.
        host: String,
        /// ssh knows if we do not.
        port: Option<u16>,
    },
    /// A receiver that listens on this host.
    Unix(PathBuf),
}

impl FromStr for DestinationArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("tls://") {
            return Err(NO_TLS.into());
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return socket_path(path).map(DestinationArg::Unix);
        }

        let (login, as_url) = match text.strip_prefix("ssh://") {
            Some(rest) => (rest.strip_suffix('/').unwrap_or(rest), true),
            None if text.contains("://") => {
                return Err("use [user@]host, ssh://[user@]host[:port] or unix:/path".into());
            }
            None => (text, false),
        };

        let (user, place) = match login.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, login),
        };
        let (host, port) = host_and_port(place, as_url)?;
        for (what, word) in [("user", user), ("host", Some(host))] {
            let Some(word) = word else { continue };
            if word.is_empty() {
                return Err(format!("the {what} is missing"));
            }

            // ssh would take it for an option.
            if word.starts_with('-') {
                return Err(format!("a {what} cannot begin with a dash"));
            }
            if word.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
                return Err(format!("{word:?} is no {what}"));
            }
        }

        Ok(DestinationArg::Ssh { user: user.map(Into::into), host: host.into(), port })
    }
}

fn host_and_port(place: &str, as_url: bool) -> Result<(&str, Option<u16>), String> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("a bracket is not closed")?;
            match after.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if after.is_empty() => (host, None),
                None => return Err(format!("{after:?} after the address makes no sense")),
            }
        }
        None => match place.split_once(':') {
            // More than one colon: an IPv6 address, which in a URL needs brackets.
            Some((_, rest)) if rest.contains(':') && !as_url => (place, None),
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    let Some(port) = port else { return Ok((host, None)) };
    if !as_url {
        return Err(format!("a port needs the long form: ssh://{place}"));
    }
    let port = port.parse().ok().filter(|port| *port != 0);
    port.map(|port| (host, Some(port))).ok_or("the port must be a number up to 65535".into())
}

impl fmt::Display for DestinationArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DestinationArg::Unix(path) => write!(f, "unix:{}", path.display()),
            DestinationArg::Ssh { user, host, port } => {
                if port.is_some() {
                    f.write_str("ssh://")?;
                }
                if let Some(user) = user {
                    write!(f, "{user}@")?;
                }
                match port {
                    None => f.write_str(host),
                    Some(port) if host.contains(':') => write!(f, "[{host}]:{port}"),
                    Some(port) => write!(f, "{host}:{port}"),
                }
            }
        }
    }
}

/// `ferry receive --listen`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A socket on this host.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) => socket_path(path).map(Listen::Unix),
            None if text.starts_with("tls://") => Err("tls:// is not available yet".into()),
            None => Err("use unix:/path".into()),
        }
    }
}

fn socket_path(path: &str) -> Result<PathBuf, String> {
    // `unix:///path` is the same in the form of a URL.
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.starts_with('/') { Ok(path.into()) } else { Err("unix: needs an absolute path".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh(user: Option<&str>, host: &str, port: Option<u16>) -> DestinationArg {
        DestinationArg::Ssh { user: user.map(Into::into), host: host.into(), port }
    }

    #[test]
    fn good_ones() {
        let cases = [
            ("host2", ssh(None, "host2", None)),
            ("root@host2", ssh(Some("root"), "host2", None)),
            ("root@fd00::2", ssh(Some("root"), "fd00::2", None)),
            ("ssh://host2", ssh(None, "host2", None)),
            ("ssh://a@host2:2222/", ssh(Some("a"), "host2", Some(2222))),
            ("ssh://[fd00::2]:22", ssh(None, "fd00::2", Some(22))),
            ("unix:/run/f.sock", DestinationArg::Unix("/run/f.sock".into())),
            ("unix:///run/f.sock", DestinationArg::Unix("/run/f.sock".into())),
        ];
        for (text, expected) in cases {
            let parsed: DestinationArg = text.parse().unwrap();
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(parsed.to_string().parse::<DestinationArg>().unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn bad_ones_say_why() {
        let cases = [
            ("tls://host2:1", "not available yet"),
            ("http://host2", "use [user@]host"),
            ("host2:22", "ssh://host2:22"),
            ("", "host is missing"),
            ("@host2", "user is missing"),
            ("root@", "host is missing"),
            ("-oProxyCommand=x", "dash"),
            ("ssh://-x@host2", "dash"),
            ("ssh://host2:0", "port"),
            ("ssh://host2:70000", "port"),
            ("ssh://host2/path", "no host"),
            ("ssh://[::1", "bracket"),
            ("unix:rel", "absolute"),
            ("a b", "no host"),
        ];
        for (text, why) in cases {
            let error = text.parse::<DestinationArg>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
