//! Kernel parameters below `/proc/sys/net`: which were changed, and setting them elsewhere.
//!
//! Which namespace's parameters a path leads to depends on the thread that opens it, so
//! everything here is to be called inside [`NetNs::run`](crate::sys::netns::NetNs::run).

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use super::image::{LinkSysctl, ParameterTree, Sysctl};

const ROOT: &str = "/proc/sys/net";
/// What a namespace has, apart from tables of per-link parameters.
pub(super) const OF_NAMESPACE: [&str; 5] = ["ipv4", "ipv6", "core", "unix", "mptcp"];
/// Not parameters but results, secrets tied to a host, or set by other means.
const LEFT_OUT: [&str; 6] =
    ["mtu", "mc_forwarding", "stable_secret", "flush", "addr_gen_mode", "netdev_rss_key"];

/// Everything readable of the calling thread's namespace: path below [`ROOT`] and value.
pub(super) fn read_all() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for top in OF_NAMESPACE {
        walk(&Path::new(ROOT).join(top), top, &mut found);
    }
    found
}

fn walk(directory: &Path, prefix: &str, found: &mut BTreeMap<String, String>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if LEFT_OUT.contains(&name.as_str()) {
            continue;
        }
        let path = format!("{prefix}/{name}");
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), &path, found),
            // Write-only parameters and those without a value yet cannot be read: nothing to
            // carry.
            _ => {
                if let Ok(value) = fs::read_to_string(entry.path()) {
                    found.insert(path, value.trim_end().to_owned());
                }
            }
        }
    }
}

/// A namespace's parameters, sorted out: `of_link` for each of `links`, the rest.
///
/// Of the per-link tables all values are told, for their defaults come from the host; of the
/// rest only what differs from a fresh namespace.
pub(super) fn sort_out(
    all: &BTreeMap<String, String>,
    fresh: &BTreeMap<String, String>,
    links: &[String],
) -> (Vec<Sysctl>, Vec<Vec<LinkSysctl>>) {
    let mut rest = Vec::new();
    let mut of_links = vec![Vec::new(); links.len()];
    for (path, value) in all {
        let in_tree = ParameterTree::ALL.into_iter().find_map(|tree| {
            let (link, name) =
                path.strip_prefix(tree.path())?.strip_prefix('/')?.split_once('/')?;
            Some((tree, link, name))
        });

        match in_tree {
            Some((tree, link, name)) if link != "all" && link != "default" => {
                let Some(i) = links.iter().position(|l| l == link) else { continue };
                let normal = fresh
                    .get(&format!("{}/{link}/{name}", tree.path()))
                    .or_else(|| fresh.get(&format!("{}/default/{name}", tree.path())));
                let changed = normal != Some(value);
                let (name, value) = (name.to_owned(), value.clone());
                of_links[i].push(LinkSysctl { tree, name, value, changed });
            }
            _ => {
                let changed = fresh.get(path) != Some(value);
                if changed || in_tree.is_some() {
                    rest.push(Sysctl { path: path.clone(), value: value.clone(), changed });
                }
            }
        }
    }

    // Setting `all` reaches into `default` and the links, so it must come first.
    rest.sort_by_key(|s| !s.path.contains("/all/"));
    (rest, of_links)
}

/// The parameters of one link of the calling thread's namespace. Changed are those that a new link
/// would not have.
pub(super) fn of_link(link: &str) -> Vec<LinkSysctl> {
    let mut list = Vec::new();
    for tree in ParameterTree::ALL {
        let mut found = BTreeMap::new();
        walk(&Path::new(ROOT).join(tree.path()).join(link), "", &mut found);
        for (path, value) in found {
            let name = path.trim_start_matches('/').to_owned();
            let normal = fs::read_to_string(Path::new(ROOT).join(path_of(tree, "default", &name)));
            let changed = normal.is_ok_and(|v| v.trim_end() != value);
            list.push(LinkSysctl { tree, name, value, changed });
        }
    }
    list
}

/// The value of a parameter.
pub(super) fn get(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(Path::new(ROOT).join(path))?.trim_end().to_owned())
}

/// Sets a parameter unless it has the value already. `Ok` also if it cannot be set and `needed`
/// is false.
pub(super) fn set(path: &str, value: &str, needed: bool) -> io::Result<()> {
    let file = Path::new(ROOT).join(path);
    let result = match fs::read_to_string(&file) {
        Ok(now) if now.trim_end() == value => Ok(()),
        Ok(_) => fs::write(&file, value),
        Err(e) => Err(e),
    };
    match result {
        // A kernel that has no MPTCP has it switched off.
        Err(e)
            if e.kind() == io::ErrorKind::NotFound && (path, value) == ("mptcp/enabled", "0") =>
        {
            Ok(())
        }
        Err(e) if needed => Err(io::Error::new(e.kind(), format!("net/{path} = {value:?}: {e}"))),
        _ => Ok(()),
    }
}

/// Returns where a link's parameter is.
pub(super) fn path_of(tree: ParameterTree, link: &str, name: &str) -> String {
    format!("{}/{link}/{name}", tree.path())
}
