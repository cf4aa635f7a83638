//! What is in a container's way on the destination, or missing there.

use anyhow::Result;

use super::api::{GET, ask};
use super::found::neighbours;
use super::images::DockerImages;
use super::networks::DockerNetworks;
use super::{SET_UP, info, is_ferry, store, store_problem};
use crate::engine::Engine;
use crate::engine::common;
use crate::engine::papers::{EngineCourse, EngineWants};
use crate::engine::{image, networks};
use crate::problem::Problem;
use crate::sys::host;

pub(super) fn problems(wanted: &EngineWants, course: &mut EngineCourse) -> Vec<Problem> {
    let here = host::name();
    let info = match info() {
        Ok(info) => info,
        Err(e) => {
            let what = format!("docker does not work on {here}");
            return vec![
                Problem::new(what, format!("{e:#}")).hint("docker 25 or newer must run there"),
            ];
        }
    };

    let mut problems = Vec::new();
    let own = store(&info);
    problems.extend(store_problem(&own));
    if own != wanted.store {
        problems.push(
            Problem::new(
                format!("docker keeps its storage elsewhere on {here}"),
                format!(
                    "in {} by {}, and not in {} by {}",
                    own.root.display(),
                    own.driver,
                    wanted.store.root.display(),
                    wanted.store.driver
                ),
            )
            .hint("set data-root and storage-driver alike in /etc/docker/daemon.json"),
        );
    }

    if !is_ferry(&info, &wanted.runtime) {
        problems.push(
            Problem::new(
                format!("docker on {here} has no runtime {} that is ferry", wanted.runtime),
                "the container could not be handed to docker",
            )
            .hint(SET_UP),
        );
    }

    let mut answers = vec![taken("container", &wanted.name, &here)];
    answers.extend(wanted.volumes.iter().map(|volume| taken("volume", &volume.name, &here)));
    let mut answers: Vec<Result<Vec<Problem>>> =
        answers.into_iter().map(|one| Ok(one?.into_iter().collect())).collect();
    answers.push(networks::look(&DockerNetworks, wanted).map(|(made, found)| {
        course.networks = made;
        found
    }));
    answers.push(image::look(&DockerImages, wanted).map(|(of_image, found)| {
        course.image = of_image;
        found
    }));
    answers
        .push(neighbours("", &wanted.networks).map(|found| common::doubles(wanted, &found, &here)));
    for answer in answers {
        problems.extend(answer.unwrap_or_else(|e| {
            vec![Problem::new(format!("docker does not work on {here}"), format!("{e:#}"))]
        }));
    }

    problems.extend(wanted.ports.iter().filter_map(|port| common::port_free(port, &here)));
    problems.dedup();
    problems
}

/// A name that is taken here.
fn taken(kind: &str, name: &str, here: &str) -> Result<Option<Problem>> {
    let at = match kind {
        "container" => format!("/containers/{name}/json"),
        _ => format!("/volumes/{name}"),
    };
    let there = ask(GET, &at, None)?.is_some();
    Ok(there.then(|| common::taken(Engine::Docker, kind, name, here)))
}
