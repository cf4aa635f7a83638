//! Whose a container is that the runtime does not know: people call containers by the names that their
//! engines know, or by the beginning of an ID, and engines keep their own below other roots.
//!
//! The daemons of podman and docker are asked, where they listen. For those that do not, and for
//! containerd and CRI-O, which speak gRPC, it is looked at what they leave on the disk:
//!
//! ```text
//! podman, CRI-O  STORE/DRIVER-containers/containers.json: [{"id", "names"}]    containers/storage
//! docker         /var/lib/docker/containers/ID/config.v2.json: {"Name"}         moby
//! containerd     /run/containerd/RUNTIME/NAMESPACE/ID: the runtime's own
//! nerdctl        /var/lib/nerdctl/ADDRESS/names/NAMESPACE/NAME holds the ID     pkg/namestore
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::owner::{Facts, owner};
use super::{Engine, EngineRole, Owned, socket};
use crate::oci::bundle::Bundle;
use crate::problem::Problem;

/// The largest list of containers that is read.
const MAX_LIST: u64 = 16 << 20;
/// Directory entries that are looked at in one place.
const MAX_ENTRIES: usize = 10_000;
/// Fewer characters are no beginning of an ID: too many words would be one.
const MIN_PREFIX: usize = 4;

/// What is known of a name.
#[derive(Debug, Default)]
pub(crate) struct FoundName {
    /// Who has a container of that name or ID.
    owned: Vec<Owned>,
    /// Daemons that are there and do not answer.
    silent: Vec<Engine>,
}

impl FoundName {
    /// Looks for a name, an ID, or the beginning of one, which must be a possible ID.
    pub fn of(wanted: &str) -> FoundName {
        FoundName::below(Path::new("/"), wanted)
    }

    fn below(top: &Path, wanted: &str) -> FoundName {
        let mut found = FoundName::default();
        for (engine, place) in
            [(Engine::Podman, "run/podman/podman.sock"), (Engine::Docker, "run/docker.sock")]
        {
            match socket::get(&top.join(place), &format!("/containers/{wanted}/json")) {
                Ok(answer) => found.extend(answer.and_then(|answer| of_daemon(engine, &answer))),
                Err(e)
                    if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
                Err(e) => {
                    tracing::debug!("{engine} does not answer: {e}");
                    found.silent.push(engine);
                }
            }
        }
        for store in stores(top) {
            found.extend(in_store(&store, wanted));
        }
        found.extend(in_docker(&top.join("var/lib/docker/containers"), wanted));
        let names = in_nerdctl(&top.join("var/lib/nerdctl"), wanted);
        found.extend(in_containerd(&top.join("run/containerd"), wanted, &names));
        found
    }

    fn extend(&mut self, more: impl IntoIterator<Item = Owned>) {
        for owned in more {
            if self.owned.iter().all(|known| known.id != owned.id) {
                self.owned.push(owned);
            }
        }
    }

    /// The only one of that name that can be handed over: the runtime's ID, and the `--root` that its
    /// engine gives the runtime, where that is another one.
    pub fn one(&self) -> Option<(&str, Option<PathBuf>)> {
        match self.owned.as_slice() {
            [one] => one.handover().map(|engine| (&*one.id, engine.root(&one.id))),
            _ => None,
        }
    }

    /// Returns what an engine has of it, and no other.
    pub fn only(mut self, engine: Engine) -> FoundName {
        self.owned.retain(|owned| owned.engine == engine);
        self.silent.retain(|silent| *silent == engine);
        self
    }

    /// Returns why it is not carried, if somebody has it.
    pub fn refusal(&self, asked: &str) -> Option<Problem> {
        let list = |owned: &Owned| {
            let name = owned.name.as_deref().unwrap_or("-");
            format!("{} has {name} ({})", owned.engine, owned.id.get(..12).unwrap_or(&owned.id))
        };
        match self.owned.as_slice() {
            [] => None,
            [one] => Some(one.refusal(asked)),
            [first, ..] => {
                let all: Vec<_> = self.owned.iter().take(5).map(list).collect();
                let what = format!("{asked} is a container of an engine, or several");
                Some(Problem { what, why: all.join(", "), ..first.refusal(asked) })
            }
        }
    }

    /// The daemons that might have it, in words.
    pub fn silent(&self) -> Option<String> {
        let names: Vec<_> = self.silent.iter().map(Engine::to_string).collect();
        (!names.is_empty()).then(|| format!("{} did not say within a second", names.join(", ")))
    }
}

/// Tells whether an ID is the one that is wanted.
fn fits(id: &str, wanted: &str) -> bool {
    id == wanted || wanted.len() >= MIN_PREFIX && id.starts_with(wanted)
}

/// The answer to `GET /containers/NAME/json`, of docker's API, which podman has, too.
fn of_daemon(engine: Engine, answer: &Value) -> Option<Owned> {
    let name = answer["Name"].as_str().map(|name| name.trim_start_matches('/'));
    Some(Owned::new(engine, EngineRole::Alone, answer["Id"].as_str()?, name))
}

/// Returns where containers/storage is: by its configuration, or by default. containers-storage.conf(5)
fn stores(top: &Path) -> Vec<PathBuf> {
    #[derive(Deserialize)]
    struct Storage {
        graphroot: Option<PathBuf>,
    }
    #[derive(Deserialize)]
    struct File {
        storage: Option<Storage>,
    }
    let named = ["etc/containers/storage.conf", "usr/share/containers/storage.conf"];
    let named = named.iter().find_map(|file| {
        let file: File = toml::from_str(&text(&top.join(file))?).ok()?;
        file.storage?.graphroot
    });
    let mut all = vec![top.join("var/lib/containers/storage")];
    let named = named.map(|place| top.join(place.strip_prefix("/").unwrap_or(&place)));
    all.extend(named.filter(|place| *place != all[0]));
    all
}

/// podman's, or CRI-O's: their configuration says which.
fn in_store(store: &Path, wanted: &str) -> Vec<Owned> {
    #[derive(Deserialize)]
    struct StorageEntry {
        id: String,
        #[serde(default)]
        names: Vec<String>,
    }
    let mut found = Vec::new();
    let drivers = entries(store).into_iter();
    for driver in drivers.filter(|path| path.to_string_lossy().ends_with("-containers")) {
        for list in ["containers.json", "volatile-containers.json"] {
            let list = text(&driver.join(list)).unwrap_or_default();
            let list: Vec<StorageEntry> = serde_json::from_str(&list).unwrap_or_default();
            let wanted =
                |e: &StorageEntry| fits(&e.id, wanted) || e.names.iter().any(|n| n == wanted);
            for entry in list.into_iter().filter(wanted) {
                let bundle = driver.join(&entry.id).join("userdata");
                let name = entry.names.first().map(String::as_str);
                found.extend(owned(&entry.id, &bundle, name));
            }
        }
    }
    found
}

fn in_docker(containers: &Path, wanted: &str) -> Vec<Owned> {
    let of = |path: PathBuf| {
        let id = path.file_name()?.to_str()?;
        let config: Value = serde_json::from_str(&text(&path.join("config.v2.json"))?).ok()?;
        let name = config["Name"].as_str().map(|name| name.trim_start_matches('/'));
        let wanted = fits(id, wanted) || name == Some(wanted);
        wanted.then(|| Owned::new(Engine::Docker, EngineRole::Alone, id, name))
    };
    entries(containers).into_iter().filter_map(of).collect()
}

/// The IDs of nerdctl's containers of that name.
fn in_nerdctl(state: &Path, wanted: &str) -> Vec<String> {
    let below = |place: PathBuf| entries(&place);
    let addresses = entries(state).into_iter().map(|address| address.join("names"));
    let spaces = addresses.flat_map(below);
    spaces.filter_map(|space| Some(text(&space.join(wanted))?.trim().to_owned())).collect()
}

/// containerd's, of all of its namespaces.
fn in_containerd(state: &Path, wanted: &str, names: &[String]) -> Vec<Owned> {
    let tasks = state.join("io.containerd.runtime.v2.task");
    let mut found = Vec::new();
    let spaces = entries(state).into_iter().flat_map(|runtime| entries(&runtime));
    for place in spaces.flat_map(|space| entries(&space)) {
        let (Some(id), Some(space)) = (
            place.file_name().and_then(|id| id.to_str()),
            place.parent().and_then(Path::file_name),
        ) else {
            continue;
        };
        let named = names.iter().any(|name| name == id);
        if fits(id, wanted) || named {
            let bundle = tasks.join(space).join(id);
            found.extend(owned(id, &bundle, named.then_some(wanted)));
        }
    }
    found
}

/// Returns whose it is, by its bundle.
fn owned(id: &str, bundle: &Path, name: Option<&str>) -> Option<Owned> {
    let config = Bundle::load(bundle).ok().map(|bundle| bundle.config);
    let annotations = config.map(|mut config| config["annotations"].take()).unwrap_or_default();
    let facts = Facts { id: id.into(), bundle: bundle.into(), annotations, ..Facts::default() };
    let owned = owner(&facts)?;
    Some(Owned::new(owned.engine, owned.role, id, name.or(owned.name.as_deref())))
}

/// Returns what is in a directory; nothing if there is none.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let list = fs::read_dir(directory).into_iter().flatten();
    list.take(MAX_ENTRIES).flatten().map(|entry| entry.path()).collect()
}

/// A file, if it is there and not longer than any of these is.
pub(super) fn text(file: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(file).ok().filter(|file| file.metadata().is_ok_and(|m| m.is_file()))?;
    file.take(MAX_LIST).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    const ID: &str = "465b65bd374bd919fb3d179886b21f24";

    fn file(top: &Path, name: &str, text: &str) {
        let path = top.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Returns who has it, by all the names that it has.
    fn told(top: &Path, names: &[&str]) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        for name in names {
            let found = FoundName::below(top, name);
            all.extend(found.refusal(name).map(|problem| problem.what));
        }
        all
    }

    #[test]
    fn each_engines_containers_are_found_without_its_daemon() {
        let all = |engine: &str| {
            vec![
                format!("web is {engine}'s container 465b65bd374b"),
                format!("465b65 is {engine}'s container web (465b65bd374b)"),
            ]
        };

        let names = &["web", "465b65", "465", "other", "we"];

        // As podman 5.8 leaves it.
        let top = tempfile::tempdir().unwrap();
        file(top.path(), "etc/containers/storage.conf", "[storage]\ngraphroot = \"/srv/store\"\n");
        let list = format!(r#"[{{"id":"{ID}","names":["web"],"layer":"8f85","flags":{{}}}}]"#);
        file(top.path(), "srv/store/vfs-containers/containers.json", &list);
        assert_eq!(told(top.path(), names), all("podman"));

        // The same, but CRI-O's.
        let config = r#"{"annotations":{"io.container.manager":"cri-o"}}"#;
        let bundle = format!("srv/store/vfs-containers/{ID}/userdata/config.json");
        file(top.path(), &bundle, config);
        assert_eq!(told(top.path(), names), all("CRI-O"));

        // docker 28, seen.
        let top = tempfile::tempdir().unwrap();
        let config = format!("var/lib/docker/containers/{ID}/config.v2.json");
        file(top.path(), &config, r#"{"ID":"465b","Name":"/web"}"#);
        assert_eq!(told(top.path(), names), all("docker"));

        // containerd 2, seen, with a name of nerdctl's.
        let top = tempfile::tempdir().unwrap();
        file(top.path(), &format!("run/containerd/runc/default/{ID}/state.json"), "{}");
        file(top.path(), "var/lib/nerdctl/1935db59/names/default/web", ID);
        let task = format!("run/containerd/io.containerd.runtime.v2.task/default/{ID}/config.json");
        file(top.path(), &task, r#"{"annotations":{"nerdctl/name":"web"}}"#);
        assert_eq!(told(top.path(), names), all("nerdctl"));
    }

    #[test]
    fn two_of_one_name_are_both_named() {
        let top = tempfile::tempdir().unwrap();
        file(top.path(), "var/lib/docker/containers/4f5e/config.v2.json", r#"{"Name":"/web"}"#);
        let list = r#"[{"id":"ab12","names":["web"]}]"#;
        file(top.path(), "var/lib/containers/storage/overlay-containers/containers.json", list);
        let problem = FoundName::below(top.path(), "web").refusal("web").unwrap();
        assert!(problem.why.contains("podman has web (ab12), docker has web (4f5e)"), "{problem}");
    }

    #[test]
    fn a_daemon_is_asked_and_one_that_hangs_is_named() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("run/podman")).unwrap();
        let docker = UnixListener::bind(top.path().join("run/docker.sock")).unwrap();
        let _podman = UnixListener::bind(top.path().join("run/podman/podman.sock")).unwrap();
        let daemon = std::thread::spawn(move || {
            let (mut stream, _) = docker.accept().unwrap();
            let _ = stream.read(&mut [0; 1000]);
            let answer = format!("HTTP/1.0 200 OK\r\n\r\n{{\"Id\":\"{ID}\",\"Name\":\"/web\"}}");
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let found = FoundName::below(top.path(), "web");
        daemon.join().unwrap();
        assert_eq!(found.refusal("web").unwrap().what, "web is docker's container 465b65bd374b");
        assert!(found.silent().unwrap().starts_with("podman did not say"));
    }

    #[test]
    fn rubbish_is_no_container() {
        let top = tempfile::tempdir().unwrap();
        file(top.path(), "var/lib/docker/containers/465b65/config.v2.json", "{");
        file(top.path(), "var/lib/containers/storage/vfs-containers/containers.json", "[{}]");
        file(top.path(), "run/containerd/runc/default", "a file");
        file(top.path(), "etc/containers/storage.conf", "storage = 1");
        assert_eq!(told(top.path(), &["web", "465b65"]), Vec::<String>::new());
    }
}
