//! What is in a container's way on the destination, or missing there.

use anyhow::{Result, anyhow};

use super::found::network;
use super::images::PodmanImages;
use super::networks::PodmanNetworks;
use super::{PODMAN, SET_UP, info, is_ferry, store};
use crate::engine::Engine;
use crate::engine::command::{LIMIT, run};
use crate::engine::common::{self, text};
use crate::engine::papers::{EngineCourse, EngineNetwork, EngineWants};
use crate::engine::{image, networks};
use crate::problem::Problem;
use crate::sys::host;

pub(super) fn problems(id: &str, wanted: &EngineWants, course: &mut EngineCourse) -> Vec<Problem> {
    let here = host::name();
    let info = match info() {
        Ok(info) => info,
        Err(e) => {
            let what = format!("podman does not work on {here}");
            return vec![Problem::new(what, format!("{e:#}")).hint("install podman there")];
        }
    };

    let mut problems = Vec::new();
    let version = text(&info["version"]["Version"]);
    if minor(version) != minor(&wanted.version) {
        problems.push(
            Problem::new(
                "podman is not the same version on both hosts",
                format!(
                    "{} there, {version} on {here}: how it describes a container may differ",
                    wanted.version
                ),
            )
            .hint("install the same version on both"),
        );
    }

    if store(&info) != wanted.store {
        problems.push(
            Problem::new(
                format!("podman keeps its storage elsewhere on {here}"),
                format!(
                    "in {} by {}, and not in {} by {}",
                    store(&info).root.display(),
                    store(&info).driver,
                    wanted.store.root.display(),
                    wanted.store.driver
                ),
            )
            .hint("set graphroot, runroot and driver alike in /etc/containers/storage.conf"),
        );
    }

    if !is_ferry(&info, &wanted.runtime) {
        let runtime = text(&info["host"]["ociRuntime"]["name"]);
        problems.push(
            Problem::new(
                format!(
                    "podman's runtime on {here} is {runtime}, and not ferry under the name {}",
                    wanted.runtime
                ),
                "the container could not be handed to podman",
            )
            .hint(SET_UP),
        );
    }

    // Each is a program that takes its tenth of a second.
    let answers: Vec<Result<Vec<Problem>>> = std::thread::scope(|scope| {
        let here = here.as_str();
        let EngineCourse { image: of_image, networks: made } = course;
        let mut asked = vec![
            scope.spawn(|| taken("container", &wanted.name, here)),
            scope.spawn(|| taken("container", id, here)),
            scope.spawn(|| {
                let (course, problems) = image::look(&PodmanImages, wanted)?;
                *of_image = course;
                Ok(problems)
            }),
            scope.spawn(|| {
                let (names, problems) = networks::look(&PodmanNetworks, wanted)?;
                *made = names;
                Ok(problems)
            }),
        ];

        asked.extend(wanted.volumes.iter().map(|v| scope.spawn(|| taken("volume", &v.name, here))));
        asked.extend(wanted.networks.iter().map(|n| scope.spawn(|| doubles(wanted, n, here))));
        let died = |_| Err(anyhow!("a question to it died"));
        asked.into_iter().map(|one| one.join().unwrap_or_else(died)).collect()
    });

    for answer in answers {
        problems.extend(answer.unwrap_or_else(|e| {
            vec![Problem::new(format!("podman does not work on {here}"), format!("{e:#}"))]
        }));
    }

    problems.extend(wanted.ports.iter().filter_map(|port| common::port_free(port, &here)));
    problems.dedup();
    problems
}

/// A name that is taken here.
fn taken(kind: &str, name: &str, here: &str) -> Result<Vec<Problem>> {
    let there = run(PODMAN, &[kind, "exists", name], LIMIT)?.success;
    Ok(there.then(|| common::taken(Engine::Podman, kind, name, here)).into_iter().collect())
}

/// Others in a network that are not to be told apart from those which stay.
fn doubles(wanted: &EngineWants, one: &EngineNetwork, here: &str) -> Result<Vec<Problem>> {
    let (_, others) = network(&one.name)?.unzip();
    let others: Vec<_> = others.unwrap_or_default().into_iter().map(|other| other.1).collect();
    Ok(common::doubles(wanted, &others, here))
}

/// The first two numbers of a version.
fn minor(version: &str) -> Vec<&str> {
    version.split('.').take(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_two_numbers() {
        assert_eq!(minor("5.8.6"), minor("5.8.1"));
        assert_ne!(minor("5.8.6"), minor("5.7.6"));
    }
}
