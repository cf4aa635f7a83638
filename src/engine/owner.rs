//! Whose a container is that the runtime knows.
//!
//! Each rule is a function of the [`Facts`], and any of them suffices: an engine may leave a sign out
//! (docker writes no annotations), keep its files elsewhere (k3s has its own containerd), or have been
//! ended while its containers run on. Signs that a container inherits from where Ferry itself runs,
//! such as the control group of a container that it is in, must name the container's ID.
//!
//! Sources: podman 5.8 (libpod/container_internal_common.go, pkg/specgen/generate), containerd 2.1
//! (core/runtime/v2/bundle.go, internal/cri/annotations), docker 28.5 (daemon/start_linux.go,
//! oci/namespaces.go), CRI-O 1.37 (pkg/annotations), nerdctl (pkg/labels); and what the first four
//! were seen to lay out.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::{Engine, EngineRole, Owned, lookup};
use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::oci::runtime::RuntimeState;
use crate::sys::process::proc_text;

/// What is looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// The runtime's ID.
    pub id: String,
    /// The runtime's `--root`.
    pub root: PathBuf,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// `annotations` of config.json.
    pub annotations: Value,
    /// The control group, below that of all processes; empty if it is not known.
    pub cgroup: PathBuf,
    /// The arguments of the first process's parent.
    pub parent: Vec<String>,
}

impl Facts {
    /// Looks at a container. What cannot be seen is left out.
    pub fn of(state: &RuntimeState, root: &Path) -> Facts {
        let config = Bundle::load(&state.bundle).ok().map(|bundle| bundle.config);
        let (Cgroup::V2(cgroup) | Cgroup::V1(cgroup)) =
            Cgroup::of_process(state.pid).unwrap_or_else(|_| Cgroup::V2(PathBuf::new()));
        Facts {
            id: state.id.clone(),
            root: root.to_owned(),
            bundle: state.bundle.clone(),
            annotations: config.map(|mut c| c["annotations"].take()).unwrap_or_default(),
            cgroup,
            parent: parent(state.pid).unwrap_or_default(),
        }
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations[name].as_str()
    }

    fn has_annotation(&self, prefix: &str) -> bool {
        let all = self.annotations.as_object();
        all.is_some_and(|all| all.keys().any(|key| key.starts_with(prefix)))
    }
}

/// The arguments of the parent of a process.
fn parent(pid: i32) -> Option<Vec<String>> {
    let status = proc_text(pid, "status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    let parent = line.trim().parse().ok().filter(|parent| *parent > 1)?;
    let text = proc_text(parent, "cmdline").ok()?;
    Some(text.split('\0').map(str::to_owned).collect())
}

/// Returns whose it is, if it is an engine's.
pub(crate) fn owner(facts: &Facts) -> Option<Owned> {
    let rules: [fn(&Facts) -> Option<Engine>; 6] =
        [by_manager, by_annotations, by_bundle, by_root, by_cgroup, by_parent];
    let engine = rules.iter().find_map(|rule| rule(facts))?;
    Some(Owned::new(engine, role(facts), &facts.id, name(facts)))
}

/// Returns whose a container is that our caller has us create, and its name there; `file` is its config.json.
pub(crate) fn of_call(id: &str, root: &Path, file: &Path) -> Option<(Engine, String)> {
    let bundle = Bundle::load(file.parent()?).ok()?;
    let facts = Facts {
        id: id.to_owned(),
        root: root.to_owned(),
        bundle: bundle.path.clone(),
        annotations: bundle.config["annotations"].clone(),
        cgroup: PathBuf::new(),
        // Whoever minds the container calls its runtime.
        parent: parent(std::process::id() as i32).unwrap_or_default(),
    };
    let owned = owner(&facts)?;
    let name = match owned.engine {
        Engine::Docker => docker_name(id, &bundle.config),
        _ => owned.name,
    };
    Some((owned.engine, name?))
}

/// docker mounts files of the directory in which it also has what it knows of the container.
fn docker_name(id: &str, config: &Value) -> Option<String> {
    let mounts = config["mounts"].as_array()?.iter();
    let sources = mounts.filter_map(|mount| Path::new(mount["source"].as_str()?).parent());
    let directory = sources.into_iter().find(|directory| directory.ends_with(id))?;
    let known = lookup::text(&directory.join("config.v2.json"))?;
    let known: Value = serde_json::from_str(&known).ok()?;
    let name = known["Name"].as_str()?.trim_start_matches('/').to_owned();
    Owned::new(Engine::Docker, EngineRole::Alone, id, Some(&name)).name
}

/// podman and CRI-O say so themselves.
fn by_manager(facts: &Facts) -> Option<Engine> {
    match facts.annotation("io.container.manager")? {
        "libpod" => Some(Engine::Podman),
        "cri-o" => Some(Engine::CriO),
        _ => None,
    }
}

/// Returns what they write for themselves. podman marks its pods' containers in CRI-O's words.
fn by_annotations(facts: &Facts) -> Option<Engine> {
    let families = [
        ("io.podman.", Engine::Podman),
        ("io.kubernetes.cri-o.", Engine::CriO),
        ("io.kubernetes.cri.", Engine::Cri),
        ("nerdctl/", Engine::Nerdctl),
    ];
    families.iter().find(|(prefix, _)| facts.has_annotation(prefix)).map(|(_, engine)| *engine)
}

/// Returns where the bundle lies.
fn by_bundle(facts: &Facts) -> Option<Engine> {
    // containers/storage: …/DRIVER-containers/ID/userdata, of podman and of CRI-O.
    if facts.bundle.ends_with(Path::new(&facts.id).join("userdata")) {
        let store = facts.bundle.parent()?.parent()?.file_name()?.to_str()?;
        return store.ends_with("-containers").then_some(Engine::Podman);
    }
    // containerd: STATE/io.containerd.runtime.v2.task/NAMESPACE/ID.
    let mut parts = facts.bundle.components();
    parts.find(|part| part.as_os_str() == "io.containerd.runtime.v2.task")?;
    parts.next().map(in_namespace)
}

/// Returns where the runtime was told to keep its state: nobody else does so there.
fn by_root(facts: &Facts) -> Option<Engine> {
    let root = facts.root.strip_prefix("/var").unwrap_or(&facts.root);
    // docker: /run/docker/runtime-NAME/moby; containerd: /run/containerd/RUNTIME/NAMESPACE.
    if root.starts_with("/run/docker") || root.starts_with("run/docker") {
        return Some(Engine::Docker);
    }
    let below = root.strip_prefix("/run/containerd").or(root.strip_prefix("run/containerd"));
    below.ok()?.components().nth(1).map(in_namespace)
}

fn in_namespace(namespace: Component) -> Engine {
    match namespace.as_os_str().to_str() {
        Some("moby") => Engine::Docker,
        Some("k8s.io") => Engine::Cri,
        _ => Engine::Containerd,
    }
}

/// Returns how its control group is called: KIND-ID.scope by systemd; by cgroupfs podman has libpod-ID, and
/// docker the ID below its own directory.
fn by_cgroup(facts: &Facts) -> Option<Engine> {
    let kinds = [
        ("libpod-", Engine::Podman),
        ("docker-", Engine::Docker),
        ("cri-containerd-", Engine::Cri),
        ("crio-", Engine::CriO),
        ("nerdctl-", Engine::Nerdctl),
    ];
    let parts: Vec<&str> =
        facts.cgroup.components().filter_map(|part| part.as_os_str().to_str()).collect();
    // Its own group may have been divided since.
    let own = |part: &str| {
        let name = part.strip_suffix(".scope").unwrap_or(part);
        kinds.iter().find(|(kind, _)| name.strip_prefix(kind) == Some(&facts.id)).map(|k| k.1)
    };
    let in_docker = parts.windows(2).any(|two| two[0] == "docker" && two[1] == facts.id);
    let named = parts.iter().find_map(|part| own(part));
    named.or_else(|| in_docker.then_some(Engine::Docker))
}

/// Returns who minds it: `conmon -c ID`, `containerd-shim-runc-v2 -namespace NS -id ID`.
fn by_parent(facts: &Facts) -> Option<Engine> {
    let program = Path::new(facts.parent.first()?).file_name()?.to_str()?;
    let value =
        |flag: &str| facts.parent.windows(2).find(|two| two[0] == flag).map(|two| two[1].as_str());
    if program == "conmon" {
        return (value("-c") == Some(&facts.id)).then_some(Engine::Podman);
    }
    // The shim of a pod bears the sandbox's ID.
    let ours = program.starts_with("containerd-shim-") && value("-id") == Some(&facts.id);
    let namespace = value("-namespace").filter(|_| ours)?;
    Path::new(namespace).components().next().map(in_namespace)
}

/// Returns what it is to its engine. podman uses CRI-O's annotations for the members of its pods.
fn role(facts: &Facts) -> EngineRole {
    let kinds = ["io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.container-type"];
    let in_pod = facts.annotation("io.kubernetes.cri-o.SandboxID").is_some();
    match kinds.iter().find_map(|kind| facts.annotation(kind)) {
        Some("sandbox") => EngineRole::Sandbox,
        Some(_) => EngineRole::Member,
        None if in_pod => EngineRole::Member,
        None => EngineRole::Alone,
    }
}

/// Returns how its engine calls it: podman says so to conmon.
fn name(facts: &Facts) -> Option<&str> {
    let names = [
        "nerdctl/name",
        "io.kubernetes.cri-o.Name",
        "io.kubernetes.cri.container-name",
        "io.kubernetes.cri.sandbox-name",
    ];
    let conmon = || facts.parent.windows(2).find(|two| two[0] == "-n").map(|two| two[1].as_str());
    names.iter().find_map(|name| facts.annotation(name)).or_else(conmon)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "4f5e0c1d2b3a49586776859403122130";

    fn plain() -> Facts {
        Facts {
            id: ID.into(),
            root: "/run/runc".into(),
            bundle: "/srv/web".into(),
            cgroup: PathBuf::from("/sys/fs/cgroup/user.slice").join(ID),
            parent: vec!["/usr/bin/bash".into()],
            ..Facts::default()
        }
    }

    #[test]
    fn docker_says_the_name_beside_its_mounts() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("containers").join(ID);
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("config.v2.json"), r#"{"Name":"/web"}"#).unwrap();
        let mount =
            |source: PathBuf| json!({ "mounts": [{ "source": "proc" }, { "source": source }] });
        let hosts = mount(own.join("hosts"));
        assert_eq!(docker_name(ID, &hosts), Some("web".into()));
        assert_eq!(docker_name("0011", &hosts), None);
        assert_eq!(docker_name(ID, &mount(dir.path().join("hosts"))), None);
        // Whoever made it may have written anything.
        std::fs::write(own.join("config.v2.json"), r#"{"Name":"/../x"}"#).unwrap();
        assert_eq!(docker_name(ID, &hosts), None);
    }

    fn engine(facts: &Facts) -> Option<Engine> {
        owner(facts).map(|owned| owned.engine)
    }

    #[test]
    fn a_container_of_the_runtime_alone_is_nobodys() {
        assert_eq!(owner(&plain()), None);
        // Made from an image, by a user with a sense of order, beside engines.
        let facts = Facts {
            annotations: json!({"org.opencontainers.image.title": "web", "io.container.manager": "me"}),
            bundle: "/var/lib/containers/bundles/web".into(),
            root: "/run/ferry".into(),
            ..plain()
        };
        assert_eq!(owner(&facts), None);
    }

    #[test]
    fn annotations_tell() {
        let with = |annotations| Facts { annotations, ..plain() };
        let pod = json!({"io.container.manager": "libpod", "io.kubernetes.cri-o.ContainerType": "sandbox"});
        for (annotations, wanted, role, name) in [
            (json!({"io.container.manager": "libpod"}), Engine::Podman, EngineRole::Alone, None),
            (pod, Engine::Podman, EngineRole::Sandbox, None),
            (
                json!({"io.container.manager": "libpod", "io.kubernetes.cri-o.SandboxID": "f39233c1"}),
                Engine::Podman,
                EngineRole::Member,
                None,
            ),
            (
                json!({"io.podman.annotations.autoremove": "TRUE"}),
                Engine::Podman,
                EngineRole::Alone,
                None,
            ),
            (
                json!({"io.container.manager": "cri-o", "io.kubernetes.cri-o.ContainerType": "container",
                    "io.kubernetes.cri-o.Name": "k8s_srv_web_default_u1_0"}),
                Engine::CriO,
                EngineRole::Member,
                Some("k8s_srv_web_default_u1_0"),
            ),
            (
                json!({"io.kubernetes.cri.container-type": "sandbox",
                    "io.kubernetes.cri.sandbox-name": "web"}),
                Engine::Cri,
                EngineRole::Sandbox,
                Some("web"),
            ),
            (json!({"nerdctl/name": "web"}), Engine::Nerdctl, EngineRole::Alone, Some("web")),
        ] {
            let owned = owner(&with(annotations)).unwrap();
            assert_eq!((owned.engine, owned.role, owned.name.as_deref()), (wanted, role, name));
        }
    }

    #[test]
    fn the_bundles_place_tells() {
        let at = |bundle: String| engine(&Facts { bundle: bundle.into(), ..plain() });
        let task = "/run/containerd/io.containerd.runtime.v2.task";
        assert_eq!(at(format!("{task}/moby/{ID}")), Some(Engine::Docker));
        assert_eq!(at(format!("{task}/k8s.io/{ID}")), Some(Engine::Cri));
        assert_eq!(at(format!("{task}/default/{ID}")), Some(Engine::Containerd));
        let k3s = format!("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/{ID}");
        assert_eq!(at(k3s), Some(Engine::Cri));
        let store = "/var/lib/containers/storage";
        assert_eq!(at(format!("{store}/overlay-containers/{ID}/userdata")), Some(Engine::Podman));
        assert_eq!(at(format!("{store}/overlay-containers/other/userdata")), None);
        assert_eq!(at(format!("/srv/{ID}/userdata")), None);
    }

    #[test]
    fn the_runtimes_root_tells() {
        let at = |root: &str| engine(&Facts { root: root.into(), ..plain() });
        assert_eq!(at("/var/run/docker/runtime-runc/moby"), Some(Engine::Docker));
        assert_eq!(at("/run/docker/runtime-ferry/moby"), Some(Engine::Docker));
        assert_eq!(at("/run/containerd/runc/k8s.io"), Some(Engine::Cri));
        assert_eq!(at("/run/containerd/runc/moby"), Some(Engine::Docker));
        assert_eq!(at("/run/containerd/runc/default"), Some(Engine::Containerd));
        assert_eq!(at("/run/ferry"), None);
        assert_eq!(at("/run/dockers"), None);
    }

    #[test]
    fn the_control_group_tells_if_it_is_the_containers_own() {
        let at = |path: String| engine(&Facts { cgroup: path.into(), ..plain() });
        let top = "/sys/fs/cgroup";
        assert_eq!(at(format!("{top}/machine.slice/libpod-{ID}.scope")), Some(Engine::Podman));
        let divided = format!("{top}/machine.slice/libpod-{ID}.scope/container");
        assert_eq!(at(divided), Some(Engine::Podman));
        assert_eq!(at(format!("{top}/libpod_parent/libpod-{ID}")), Some(Engine::Podman));
        assert_eq!(at(format!("{top}/system.slice/docker-{ID}.scope")), Some(Engine::Docker));
        assert_eq!(at(format!("{top}/docker/{ID}")), Some(Engine::Docker));
        let pod = format!("{top}/kubepods.slice/kubepods-pod1.slice");
        assert_eq!(at(format!("{pod}/cri-containerd-{ID}.scope")), Some(Engine::Cri));
        assert_eq!(at(format!("{pod}/crio-{ID}.scope")), Some(Engine::CriO));
        // Ferry runs in a container itself.
        assert_eq!(at(format!("{top}/docker/0123456789abcdef/{ID}")), None);
        assert_eq!(at(format!("{top}/system.slice/docker-0123.scope/{ID}")), None);
    }

    #[test]
    fn whoever_minds_it_tells() {
        let under = |line: String| {
            let parent = line.split(' ').map(str::to_owned).collect();
            owner(&Facts { parent, ..plain() })
        };
        let conmon =
            under(format!("/usr/bin/conmon --api-version 1 -c {ID} -u {ID} -r ferry -n web"));
        let conmon = conmon.unwrap();
        assert_eq!((conmon.engine, conmon.name.as_deref()), (Engine::Podman, Some("web")));
        let infra = under(format!("/usr/bin/conmon -c {ID} -n 79c8a4b7fa57-infra")).unwrap();
        assert_eq!((conmon.role, infra.role), (EngineRole::Alone, EngineRole::Sandbox));
        let shim = "/usr/bin/containerd-shim-runc-v2";
        let engine = |line| under(line).map(|owned| owned.engine);
        assert_eq!(engine(format!("{shim} -namespace moby -id {ID}")), Some(Engine::Docker));
        assert_eq!(engine(format!("{shim} -namespace default -id {ID}")), Some(Engine::Containerd));
        // Whoever is minded there has started it by the runtime.
        assert_eq!(engine(format!("{shim} -namespace moby -id 0123")), None);
        assert_eq!(engine("/usr/bin/conmon -c 0123".into()), None);
    }
}
