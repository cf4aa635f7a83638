//! Engines (podman, docker, containerd, CRI-O, whoever stands behind a Kubernetes node): which of them
//! a container belongs to, and which has one of a name.
//!
//! As a runtime Ferry is runc to them. To carry a container away is another matter: the engine would
//! go on owning what is not here any more, and the other host's would know nothing of what has come.
//!
//! ```text
//! owner     whose a container is that the runtime knows: rules over facts
//! lookup    whose a container is that the runtime does not know: by name, or by the beginning of its ID
//! property  what is an engine's though the container is not: namespaces, stores
//! socket    a question to an engine's daemon
//! handover  what is asked of an engine so that the other host's comes to own the container
//! papers    what goes from one host to the other about it
//! image     what the container was made of, where the other host lacks it
//! networks  what it is in, where the other host lacks one
//! calls     the engine's call of its runtime, which is expected
//! podman    one that can be asked, by its own command
//! docker    another one, by its daemon
//! json_log  its log
//! common    what engines have in common
//! ```

mod archive;
pub(crate) mod calls;
pub(crate) mod command;
mod common;
mod docker;
pub(crate) mod handover;
pub(crate) mod image;
pub(crate) mod json_log;
pub(crate) mod lookup;
pub(crate) mod networks;
pub(crate) mod owner;
pub(crate) mod papers;
mod podman;
pub(crate) mod property;
mod socket;

use std::fmt;

use crate::oci::container_id::valid_id;
use crate::problem::Problem;

/// An engine.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// podman, and whatever else uses libpod.
    Podman,
    /// docker.
    Docker,
    /// containerd itself (`ctr`).
    Containerd,
    /// nerdctl, on containerd.
    Nerdctl,
    /// containerd for a kubelet.
    Cri,
    /// CRI-O.
    CriO,
}

impl Engine {
    /// The one that a user means by a word.
    pub(crate) fn of_word(word: &str) -> Option<Engine> {
        Some(match word {
            "podman" => Engine::Podman,
            "docker" => Engine::Docker,
            "containerd" => Engine::Containerd,
            "nerdctl" => Engine::Nerdctl,
            "cri" => Engine::Cri,
            "cri-o" => Engine::CriO,
            _ => return None,
        })
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Podman => "podman",
            Engine::Docker => "docker",
            Engine::Containerd | Engine::Cri => "containerd",
            Engine::Nerdctl => "nerdctl",
            Engine::CriO => "CRI-O",
        })
    }
}

/// What a container is to its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EngineRole {
    /// A container by itself.
    Alone,
    /// One of several in a pod.
    Member,
    /// What holds a pod's namespaces: pause, infra.
    Sandbox,
}

/// A container of an engine's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    /// Engine that has it.
    pub engine: Engine,
    /// What it is there.
    pub role: EngineRole,
    /// As the runtime calls it.
    pub id: String,
    /// As the engine calls it, where that is known.
    pub name: Option<String>,
}

/// What an ID is cut to, as engines show it.
const SHORT: usize = 12;

impl Owned {
    fn new(engine: Engine, role: EngineRole, id: &str, name: Option<&str>) -> Owned {
        // Whoever made it may have written anything there.
        let name = name.filter(|name| valid_id(name.as_ref()) && name.len() <= 256);
        // podman says of what holds a pod nothing but its name.
        let infra = engine == Engine::Podman && name.is_some_and(|name| name.ends_with("-infra"));
        let role = if infra { EngineRole::Sandbox } else { role };
        Owned { engine, role, id: id.to_owned(), name: name.map(str::to_owned) }
    }

    /// The engine, if it can be asked to hand this one over: a container by itself.
    pub fn handover(&self) -> Option<&'static dyn handover::Handover> {
        handover::of(self.engine).filter(|_| self.role == EngineRole::Alone)
    }

    /// Returns why it is not carried, in the words of whoever asked for it by `asked`.
    pub fn refusal(&self, asked: &str) -> Problem {
        let engine = self.engine;
        let kind = match self.role {
            EngineRole::Alone => "container",
            EngineRole::Member => "container, one of a pod,",
            EngineRole::Sandbox => "pod sandbox",
        };

        let short = self.id.get(..SHORT).unwrap_or(&self.id);
        let called = match &self.name {
            _ if !self.id.starts_with(asked) => format!(" {short}"),
            Some(name) => format!(" {name} ({short})"),
            None if short.len() > asked.len() => format!(" {short}"),
            None => String::new(),
        };

        let who = if asked == self.id { short } else { asked };
        let pod = match self.role {
            EngineRole::Alone => "",
            EngineRole::Member => {
                "; and what it shares with the others of its pod would be torn apart"
            }
            EngineRole::Sandbox => {
                "; and the pod's containers would be left without their namespaces"
            }
        };

        let there = match engine {
            Engine::Cri | Engine::CriO => "let Kubernetes start the pod there",
            _ => "stop it, and start it with the engine there",
        };
        let what = format!("{who} is {engine}'s {kind}{called}");
        if self.handover().is_some() {
            let why = format!("{engine} has it, and the runtime does not know it: it does not run");
            let runtime = match engine {
                Engine::Docker => "docker inspect --format '{{.HostConfig.Runtime}}'",
                _ => "podman inspect --format '{{.OCIRuntime}}'",
            };
            let hint = format!(
                "there is no state to keep: start it there; or another runtime than Ferry's runs it \
                 (`{runtime}`)"
            );
            return Problem::new(what, why).hint(hint);
        }

        Problem::new(
            what,
            format!(
                "Ferry does not move such a container yet: {engine} on the other host would not \
                 know of it, and here its network rules, published ports, storage and restart policy \
                 would stay behind{pod}"
            ),
        )
        .hint(format!(
            "{there}; what is to move while it runs, start by `ferry run` from a bundle. Moves \
             together with the engine are planned"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_it_is_and_what_can_be_done() {
        let id = "ab12cd34ef567890";
        let web = Owned::new(Engine::Nerdctl, EngineRole::Alone, id, Some("web"));
        for (asked, words) in [
            ("web", "web is nerdctl's container ab12cd34ef56"),
            ("ab12", "ab12 is nerdctl's container web (ab12cd34ef56)"),
            (id, "ab12cd34ef56 is nerdctl's container web (ab12cd34ef56)"),
        ] {
            let problem = web.refusal(asked);
            assert_eq!(problem.what, words);
            assert!(problem.fatal && problem.why.contains("nerdctl on the other host"));
            assert!(problem.hint.contains("planned"), "{problem}");
        }
        let ended = Owned::new(Engine::Podman, EngineRole::Alone, id, Some("web")).refusal("web");
        assert_eq!(ended.what, "web is podman's container ab12cd34ef56");
        assert!(ended.why.contains("does not run"), "{ended}");
        let ended = Owned::new(Engine::Docker, EngineRole::Alone, id, Some("web")).refusal("web");
        assert!(ended.hint.contains("docker inspect"), "{ended}");
        let member = Owned::new(Engine::Podman, EngineRole::Member, id, Some("web")).refusal("web");
        assert!(member.why.contains("torn apart"), "{member}");
        let pause = Owned::new(Engine::Cri, EngineRole::Sandbox, id, None).refusal(id);
        assert_eq!(pause.what, "ab12cd34ef56 is containerd's pod sandbox");
        assert!(pause.hint.contains("Kubernetes") && pause.why.contains("namespaces"));
    }

    #[test]
    fn a_name_that_is_none_is_not_repeated() {
        let odd = Owned::new(Engine::Docker, EngineRole::Alone, "ab", Some("a\u{1b}[31m\nb"));
        assert_eq!(odd.name, None);
    }
}
