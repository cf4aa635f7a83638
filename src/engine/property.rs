//! What lies on the host and is an engine's, whoever uses it: network namespaces and stores.
//!
//! A container that a user has started himself may have been given one of them. What an engine has made
//! it also takes down, by its own records: without its namespace's name its rules and cables stay for ever,
//! and a layer or volume that it has not made itself it calls damaged, or takes for its own.

use std::path::{Component, Path, PathBuf};

use super::Engine;
use crate::problem::Problem;

/// The engine that a network namespace's name belongs to.
///
/// podman: /run/netns/netns-UUID (containers/common, libnetwork/netns); CNI plugins, for nerdctl and
/// containerd: cni-UUID (containerd, pkg/netns); docker: /run/docker/netns/KEY (libnetwork).
pub(crate) fn of_namespace(path: &Path) -> Option<Engine> {
    let path =
        path.strip_prefix("/var").map_or(path.to_owned(), |below| Path::new("/").join(below));
    if path.starts_with("/run/docker/netns") {
        return Some(Engine::Docker);
    }
    let name = path.strip_prefix("/run/netns").ok()?.to_str()?;
    let kinds = [("netns-", Engine::Podman), ("cni-", Engine::Containerd)];
    kinds.iter().find(|(kind, _)| name.strip_prefix(kind).is_some_and(is_uuid)).map(|k| k.1)
}

fn is_uuid(text: &str) -> bool {
    let groups: Vec<_> = text.split('-').map(str::len).collect();
    groups == [8, 4, 4, 4, 12] && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

/// The engine whose store a place is in.
pub(crate) fn of_place(path: &Path) -> Option<Engine> {
    // The same place by another way.
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    let stores = [
        ("/var/lib/containers/storage", Engine::Podman),
        ("/run/containers/storage", Engine::Podman),
        ("/var/lib/docker", Engine::Docker),
        ("/var/lib/containerd", Engine::Containerd),
        ("/run/containerd", Engine::Containerd),
        ("/var/lib/nerdctl", Engine::Nerdctl),
    ];
    stores.iter().find(|(store, _)| plain.starts_with(store)).map(|(_, engine)| *engine)
}

/// A container that was put into an engine's network namespace.
pub(crate) fn namespace_problem(path: &Path) -> Option<Problem> {
    let engine = of_namespace(path)?;
    let what = format!("the network namespace {} is {engine}'s", path.display());
    let why = format!("{engine} would not know that it is gone: its rules and cables would stay");
    Some(Problem::new(what, why).hint("give the container a namespace of its own: `ip netns add`"))
}

/// Something that would be copied out of an engine's store, and into that of the other host.
pub(crate) fn store_problem(what: &str, path: &Path, option: &str) -> Option<Problem> {
    let engine = of_place(path)?;
    let what = format!("the {what} is in {engine}'s store, at {}", path.display());
    let why = format!("a copy there would be nothing that {engine} on the other host knows of");
    let hint = format!("keep it elsewhere; if both hosts see the very same, say so by {option}");
    Some(Problem::new(what, why).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_tell_by_their_names() {
        let of = |path: &str| of_namespace(Path::new(path));
        let id = "08d2f3a1-5c1e-4b7a-9d61-0a1b2c3d4e5f";
        assert_eq!(of(&format!("/run/netns/netns-{id}")), Some(Engine::Podman));
        assert_eq!(of(&format!("/var/run/netns/cni-{id}")), Some(Engine::Containerd));
        assert_eq!(of("/var/run/docker/netns/8f3c9a1b2d4e"), Some(Engine::Docker));
        for own in ["/run/netns/web", "/run/netns/netns-web", "/run/netns/cni-1", "/srv/netns/web"]
        {
            assert_eq!(of(own), None, "{own}");
        }
        assert!(namespace_problem(Path::new("/run/netns/web")).is_none());
    }

    #[test]
    fn stores_tell_by_their_places() {
        let of = |path: &str| of_place(Path::new(path));
        assert_eq!(of("/var/lib/docker/volumes/v/_data"), Some(Engine::Docker));
        assert_eq!(of("/srv/../var/lib/containers/storage/overlay/x/merged"), Some(Engine::Podman));
        assert_eq!(of("/run/containerd/io.containerd.runtime.v2.task/x"), Some(Engine::Containerd));
        for own in ["/srv/web", "/var/lib/dockers/x", "/var/lib/ferry/layers"] {
            assert_eq!(of(own), None, "{own}");
        }
    }
}
