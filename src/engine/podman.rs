//! podman, by its own program: that needs no daemon, and what it does goes on if Ferry is killed.
//!
//! The container comes into being there by podman's own import of a checkpoint, whose description
//! podman here has exported, and whose memory is none: `restore` of its runtime is answered by the
//! migration. So the container keeps its ID and everything that podman knows of it. The description
//! (`config.dump`, `spec.dump`) is podman's private format: both hosts must have the same version.
//!
//! Seen with podman 5.8; libpod/container_internal_common.go and pkg/checkpoint there.

mod found;
mod images;
mod judge;
mod networks;
mod there;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::calls::{self, EngineVerb};
use super::command::{LIMIT, Running, ask, run};
use super::common::{ports, short, text};
use super::handover::Handover;
use super::image::{self, ImageStore};
use super::papers::{EngineCourse, EngineImage, EngineStore, EngineWants, Made, Papers};
use super::{Engine, archive};
use crate::problem::Problem;

const PODMAN: &str = "podman";
/// In a work directory.
const ARCHIVE: &str = "engine.tar";
/// Until it has taken a container away; whoever still works with it comes first.
const REMOVE_LIMIT: Duration = Duration::from_secs(60);

/// podman as the engine of a container, over its API's socket.
pub(super) struct Podman;

/// What podman makes anew in every container, and fills.
const OWN: [&str; 5] =
    ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/shm"];

/// How its runtime has to be set up.
const SET_UP: &str =
    "make ferry the runtime in /etc/containers/containers.conf, as docs/engines.md has it";

impl Handover for Podman {
    fn root(&self, _id: &str) -> Option<PathBuf> {
        None
    }

    fn wanted(&self, id: &str, config: &Value) -> Result<EngineWants, Vec<Problem>> {
        let looked = (|| {
            let found = ask(PODMAN, &["container", "inspect", id])?;
            let found = found.ok_or_else(|| anyhow!("podman does not know it"))?;
            anyhow::Ok((found, info()?))
        })();

        let (found, info) = looked.map_err(|e| {
            let what =
                format!("{} is podman's container, and podman does not tell of it", short(id));
            vec![Problem::new(what, format!("{e:#}")).hint("see `podman container inspect`")]
        })?;

        let mut problems = found::refusals(&found);
        if !is_ferry(&info, text(&found["OCIRuntime"])) {
            problems.push(
                Problem::new(
                    format!("podman runs it by {}, and not by ferry", text(&found["OCIRuntime"])),
                    "podman would not tell Ferry what it knows of it",
                )
                .hint(format!("{SET_UP}, and make the container anew")),
            );
        }

        let store = store(&info);
        let own = found::own(id, &store, config, &mut problems);
        let (networks, neighbours) = found::networks(id, &found, &mut problems);
        let volumes = found::volumes(&found, &mut problems);
        let image = EngineImage {
            id: text(&found["Image"]).to_owned(),
            name: text(&found["ImageName"]).to_owned(),
            ..EngineImage::default()
        };
        let image = image::described(self.images(), image, &mut problems);
        if !problems.is_empty() {
            return Err(problems);
        }

        let log = &found["HostConfig"]["LogConfig"];
        let file = matches!(text(&log["Type"]), "k8s-file" | "json-file");
        let log_path = file.then(|| PathBuf::from(text(&log["Path"])));
        let log = log_path.as_ref().map(|path| fs::metadata(path).map_or(0, |meta| meta.len()));

        Ok(EngineWants {
            engine: Engine::Podman,
            version: text(&info["version"]["Version"]).to_owned(),
            name: text(&found["Name"]).to_owned(),
            runtime: text(&found["OCIRuntime"]).to_owned(),
            store,
            image,
            volumes,
            networks,
            given: Vec::new(),
            ports: ports(&found),
            neighbours,
            own,
            log,
            log_path,
        })
    }

    fn papers(&self, id: &str, root: &Path, work: &Path) -> Result<Papers> {
        let file = work.join(ARCHIVE);
        let place = work.join("engine");

        // Its runtime is asked for a checkpoint, which nobody needs.
        let _expected = calls::expect(EngineVerb::Describe, id, root, work, LIMIT)?;
        let to = file.to_str().ok_or_else(|| anyhow!("a directory that is not UTF-8"))?;
        let said = run(
            PODMAN,
            &[
                "container",
                "checkpoint",
                "--leave-running",
                "--tcp-established",
                "--ignore-rootfs",
                "--ignore-volumes",
                "--compress",
                "none",
                "--export",
                to,
                id,
            ],
            LIMIT,
        )?;

        if !said.success {
            bail!("podman does not describe the container: {}", said.why());
        }
        fs::create_dir(&place)?;
        let names = ["config.dump", "spec.dump", "network.status"];
        let there = place.to_str().unwrap_or_default();
        let mut arguments = vec!["-C", there, "-xf", to];
        arguments.extend(names);
        if !run("tar", &arguments, LIMIT)?.success {
            bail!("podman does not describe the container");
        }

        let read = |name: &str| -> Result<Value> {
            let bytes = fs::read(place.join(name))?;
            serde_json::from_slice(&bytes).with_context(|| format!("podman's {name}"))
        };
        let papers =
            Papers { config: read(names[0])?, spec: read(names[1])?, network: read(names[2])? };
        let _ = (fs::remove_file(&file), fs::remove_dir_all(&place));

        Ok(papers)
    }

    fn images(&self) -> &dyn ImageStore {
        &images::PodmanImages
    }

    fn problems(&self, id: &str, wanted: &EngineWants, course: &mut EngineCourse) -> Vec<Problem> {
        there::problems(id, wanted, course)
    }

    fn make(&self, wanted: &EngineWants, made: &Made) -> Result<()> {
        super::networks::make(&networks::PodmanNetworks, wanted, made)?;
        for name in &made.volumes {
            let volume = wanted.volumes.iter().find(|volume| volume.name == *name);
            let labels: Vec<String> = volume
                .iter()
                .flat_map(|v| &v.labels)
                .map(|(k, v)| format!("--label={k}={v}"))
                .collect();
            let mut arguments = vec!["volume", "create"];
            arguments.extend(labels.iter().map(String::as_str));
            arguments.push(name);
            let said = run(PODMAN, &arguments, LIMIT)?;
            if !said.success {
                bail!("podman does not make the volume {name}: {}", said.why());
            }
            made.note_volume(name)?;
        }
        Ok(())
    }

    fn create(
        &self,
        wanted: &EngineWants,
        made: &Made,
        papers: &Papers,
        work: &Path,
    ) -> Result<String> {
        judge::judge(wanted, &made.container, papers)?;
        let mut config = papers.config.clone();
        config["rootfsImageName"] = image::word(self.images(), &wanted.image)?.into();
        let json = |value: &Value| serde_json::to_vec(value);
        archive::write(
            &mut File::create(work.join(ARCHIVE))?,
            &[
                ("config.dump", &json(&config)?),
                ("spec.dump", &json(&papers.spec)?),
                ("network.status", &json(&papers.network)?),
                ("checkpoint/", &[]),
                ("checkpoint/inventory.img", &[]),
            ],
        )?;
        Ok(made.container.clone())
    }

    fn verb(&self) -> EngineVerb {
        EngineVerb::Restore
    }

    fn log(&self, _wanted: &EngineWants, _id: &str) -> Option<PathBuf> {
        None
    }

    fn start(&self, _id: &str, work: &Path) -> Result<Running> {
        let from = format!("--import={}", work.join(ARCHIVE).display());
        let arguments = [
            "container",
            "restore",
            "--tcp-established",
            "--ignore-rootfs",
            "--ignore-volumes",
            &from,
        ];
        Running::start(PODMAN, &arguments, &work.join("engine.log"))
    }

    fn discard(&self, made: &Made) -> Result<()> {
        let id = made.container.as_str();
        // Whoever still makes it has its lock.
        let said = run(PODMAN, &["rm", "--force", "--time", "0", "--ignore", id], REMOVE_LIMIT)?;
        let mut stays = Vec::new();
        if !said.success {
            stays.push(format!("the container {id}: {}", said.why()));
        }
        for name in made.made_volumes() {
            if run(PODMAN, &["volume", "exists", name], LIMIT)?.success {
                let said = run(PODMAN, &["volume", "rm", name], LIMIT)?;
                if !said.success {
                    stays.push(format!("the volume {name}: {}", said.why()));
                }
            }
        }
        if stays.is_empty() {
            // Until then the container is in it.
            stays = super::networks::discard(&networks::PodmanNetworks, made)?;
        }
        if let Err(e) = image::discard(self.images(), made) {
            stays.push(format!("the image: {e:#}"));
        }
        let _ = (fs::remove_dir_all(&made.upper), fs::remove_file(&made.log));
        if !stays.is_empty() {
            bail!("podman keeps {}", stays.join(", "));
        }
        let _ = fs::remove_file(&made.noted);
        Ok(())
    }

    fn is_told(&self) -> bool {
        true
    }

    fn let_go(&self, id: &str, work: &Path) -> Result<Running> {
        let arguments = ["container", "checkpoint", "--tcp-established", id];
        Running::start(PODMAN, &arguments, &work.join("engine.log"))
    }
}

fn info() -> Result<Value> {
    ask(PODMAN, &["info", "--format", "json"])?.ok_or_else(|| anyhow!("podman says nothing"))
}

fn store(info: &Value) -> EngineStore {
    let store = &info["store"];
    EngineStore {
        root: text(&store["graphRoot"]).into(),
        run: text(&store["runRoot"]).into(),
        volumes: text(&store["volumePath"]).into(),
        driver: text(&store["graphDriverName"]).to_owned(),
    }
}

/// Tells whether the runtime that podman has by this name is Ferry.
fn is_ferry(info: &Value, name: &str) -> bool {
    let runtime = &info["host"]["ociRuntime"];
    let ours = text(&runtime["version"]).lines().any(|line| line.starts_with("ferry: "));
    text(&runtime["name"]) == name && ours
}
