//! docker, by the API of its daemon: what that does goes on if Ferry is killed.
//!
//! The container comes into being there as any other: by a request to create it, which is what docker here
//! answers when it is asked about the container. docker gives it an ID of its own, and calls its
//! runtime twice: to create the container, which restores it, and, when it has made the network in the
//! namespace of what is restored and held, to start it. Nothing of it is in docker's records: a later start
//! is one as any other.
//!
//! Here docker sees the container end, and must not start it again: its restart policy is answered by
//! the away-mark, and taken off when it has ended.
//!
//! Seen with docker 28.5. Its API: docs.docker.com/reference/api/engine; daemon/start.go and
//! libnetwork/osl there.

mod api;
mod found;
mod images;
mod judge;
mod networks;
mod there;

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde_json::{Value, json};

use self::api::{DELETE, GET, POST, ask};
use super::Engine;
use super::calls::EngineVerb;
use super::command::{LIMIT, Running, run};
use super::common::{ports, short, text};
use super::handover::Handover;
use super::image::{self, ImageStore};
use super::papers::{EngineCourse, EngineImage, EngineStore, EngineWants, Made, Papers};
use crate::problem::Problem;
use crate::sys::{fault, process};

/// Until it has taken a container away; whoever still works with it comes first.
const REMOVE_LIMIT: Duration = Duration::from_secs(20);
/// Between one look and the next.
const PAUSE: Duration = Duration::from_millis(50);
/// Until it has started one: the runtime's call waits for the source.
const START_LIMIT: Duration = Duration::from_secs(600);

/// Until the monitor of a container that has ended has ended, too.
const MONITOR_LIMIT: Duration = Duration::from_secs(1);

/// docker as the engine of a container, over its API's socket.
pub(super) struct Docker;

/// What docker makes anew in every container, and fills.
const OWN: [&str; 5] =
    ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/sbin/docker-init"];

/// How its runtime has to be set up.
const SET_UP: &str = "make ferry a runtime in /etc/docker/daemon.json, as docs/engines.md has it";

/// Below it docker has its runtimes' states: `--exec-root`, in docker's own words.
const EXEC_ROOT: &str = "/var/run/docker";

impl Handover for Docker {
    fn root(&self, id: &str) -> Option<PathBuf> {
        let runtimes = fs::read_dir(EXEC_ROOT).into_iter().flatten().flatten();
        let mut roots = runtimes
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("runtime-"))
            .map(|entry| Path::new(EXEC_ROOT).join(entry.file_name()).join("moby"));
        roots.find(|root| root.join(id).exists())
    }

    fn wanted(&self, id: &str, config: &Value) -> Result<EngineWants, Vec<Problem>> {
        let looked = (|| {
            let found = ask(GET, &format!("/containers/{id}/json"), None)?;
            let found = found.ok_or_else(|| anyhow!("docker does not know it"))?;
            anyhow::Ok((found, info()?))
        })();

        let (found, info) = looked.map_err(|e| {
            let what =
                format!("{} is docker's container, and docker does not tell of it", short(id));
            vec![Problem::new(what, format!("{e:#}")).hint("see `docker inspect`")]
        })?;

        let mut problems = found::refusals(&found);
        let runtime = text(&found["HostConfig"]["Runtime"]);
        if !is_ferry(&info, runtime) {
            problems.push(
                Problem::new(
                    format!("docker runs it by {runtime}, and that is not ferry"),
                    "docker would not tell Ferry what it knows of it",
                )
                .hint(format!("{SET_UP}, and make the container anew")),
            );
        }

        let store = store(&info);
        problems.extend(store_problem(&store));
        let own = found::own(id, &store, config, &mut problems);
        let networks = found::networks(&found, &mut problems);
        let volumes = found::volumes(&found, &mut problems);
        let neighbours = found::neighbours(id, &networks).unwrap_or_else(|e| {
            problems.push(Problem::new("docker does not tell of a network", format!("{e:#}")));
            Vec::new()
        });

        let image = EngineImage {
            id: text(&found["Image"]).to_owned(),
            name: text(&found["Config"]["Image"]).to_owned(),
            ..EngineImage::default()
        };
        let image = image::described(self.images(), image, &mut problems);
        if !problems.is_empty() {
            return Err(problems);
        }
        let log_path = PathBuf::from(text(&found["LogPath"]));
        let log_path = Some(log_path).filter(|path| path.is_absolute());
        let log = log_path.as_ref().map(|path| fs::metadata(path).map_or(0, |meta| meta.len()));

        Ok(EngineWants {
            engine: Engine::Docker,
            version: text(&info["ServerVersion"]).to_owned(),
            name: text(&found["Name"]).trim_start_matches('/').to_owned(),
            runtime: runtime.to_owned(),
            store,
            image,
            volumes,
            networks,
            given: found::given(&found),
            ports: ports(&found),
            neighbours,
            own,
            log,
            log_path,
        })
    }

    fn papers(&self, id: &str, _root: &Path, _work: &Path) -> Result<Papers> {
        let found = ask(GET, &format!("/containers/{id}/json"), None)?;
        let found = found.ok_or_else(|| anyhow!("docker does not know it"))?;
        let config = found::request(&found)?;
        Ok(Papers { config, spec: Value::Null, network: Value::Null })
    }

    fn images(&self) -> &dyn ImageStore {
        &images::DockerImages
    }

    fn problems(&self, _id: &str, wanted: &EngineWants, course: &mut EngineCourse) -> Vec<Problem> {
        there::problems(wanted, course)
    }

    fn make(&self, wanted: &EngineWants, made: &Made) -> Result<()> {
        super::networks::make(&networks::DockerNetworks, wanted, made)?;
        for name in &made.volumes {
            let volume = wanted.volumes.iter().find(|volume| volume.name == *name);
            let labels = volume.map(|volume| &volume.labels);
            let body = json!({ "Name": name, "Driver": "local", "Labels": labels });
            ask(POST, "/volumes/create", Some(&body))?;
            made.note_volume(name)?;
        }
        Ok(())
    }

    fn create(
        &self,
        wanted: &EngineWants,
        made: &Made,
        papers: &Papers,
        _work: &Path,
    ) -> Result<String> {
        judge::judge(wanted, papers)?;
        // By a name that nobody else has, until it is noted which it is.
        let at = format!("/containers/create?name={}", passing_name(made)?);
        let mut config = papers.config.clone();
        config["Image"] = image::word(self.images(), &wanted.image)?.into();
        let said = ask(POST, &at, Some(&config))?;
        let said = said.ok_or_else(|| anyhow!("docker does not have what the container needs"))?;
        let id = text(&said["Id"]);
        made.note_container(id)?;
        let renamed = ask(POST, &format!("/containers/{id}/rename?name={}", wanted.name), None)?;
        renamed.ok_or_else(|| anyhow!("docker does not have it any more"))?;
        Ok(id.to_owned())
    }

    fn verb(&self) -> EngineVerb {
        EngineVerb::Create
    }

    fn log(&self, wanted: &EngineWants, id: &str) -> Option<PathBuf> {
        Some(wanted.store.root.join("containers").join(id).join(format!("{id}-json.log")))
    }

    fn start(&self, id: &str, _work: &Path) -> Result<Running> {
        let at = format!("/containers/{id}/start");
        Running::request(move || {
            let said = api::ask_for(POST, &at, None, START_LIMIT)?;
            said.map(drop).ok_or_else(|| anyhow!("docker does not have it any more"))
        })
    }

    fn discard(&self, made: &Made) -> Result<()> {
        let mut stays = Vec::new();
        let id = made.id_here().map(String::from);
        id.iter().for_each(|id| end_monitor(id));
        let names = id.into_iter().chain([passing_name(made)?]);
        for name in names {
            if let Err(e) = remove(&name) {
                stays.push(format!("the container {name}: {e:#}"));
            }
        }
        for name in made.made_volumes() {
            if let Err(e) = ask(DELETE, &format!("/volumes/{name}"), None) {
                stays.push(format!("the volume {name}: {e:#}"));
            }
        }
        if stays.is_empty() {
            // Until then the container is in it.
            stays = super::networks::discard(&networks::DockerNetworks, made)?;
        }
        if let Err(e) = image::discard(self.images(), made) {
            stays.push(format!("the image: {e:#}"));
        }
        let _ = (fs::remove_dir_all(&made.upper), fs::remove_file(&made.log));
        if !stays.is_empty() {
            bail!("docker keeps {}", stays.join(", "));
        }
        let _ = fs::remove_file(&made.noted);
        Ok(())
    }

    fn is_told(&self) -> bool {
        false
    }

    fn let_go(&self, id: &str, _work: &Path) -> Result<Running> {
        let at = format!("/containers/{id}");
        Running::request(move || {
            let wait = format!("{at}/wait?condition=next-exit");
            api::ask_for(POST, &wait, None, START_LIMIT)?;
            // The away-mark refuses what its restart policy tries now; nor need it be tried at every boot.
            await_rest(&at)?;
            fault::point("docker.let-go")?;
            let never = json!({ "RestartPolicy": { "Name": "no" } });
            ask(POST, &format!("{at}/update"), Some(&never)).map(drop)
        })
    }
}

/// Waits until a container that has ended is not about to be started again any more.
fn await_rest(at: &str) -> Result<()> {
    let until = Instant::now() + REMOVE_LIMIT;
    while Instant::now() < until {
        let found = ask(GET, &format!("{at}/json"), None)?.unwrap_or_default();
        if found["State"]["Running"] != true {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    bail!("docker starts it again and again")
}

/// Removes a container. One that is being started is gone in the middle of that for docker, which finds
/// no process to end.
fn remove(name: &str) -> Result<()> {
    let until = Instant::now() + REMOVE_LIMIT;
    loop {
        let at = format!("/containers/{name}?force=true");
        match api::ask_for(DELETE, &at, None, REMOVE_LIMIT) {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() > until => return Err(e),
            Err(e) => tracing::debug!("{name} once more: {e:#}"),
        }
        std::thread::sleep(PAUSE);
    }
}

/// Ends the monitor of a container that has ended itself, if it does not end: it waits for a process that
/// somebody else has heard the last of, and docker, which is starting the container, for it.
fn end_monitor(id: &str) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let minds = |pid: &i32| {
        let line = process::proc_text(*pid, "cmdline").unwrap_or_default();
        let words: Vec<&str> = line.split('\0').collect();
        words.first().is_some_and(|program| program.contains("containerd-shim-"))
            && words.windows(2).any(|two| two == ["-namespace", "moby"])
            && words.windows(2).any(|two| two == ["-id", id])
    };
    for pidfd in pids.filter(minds).filter_map(|pid| process::pidfd_open(pid).ok()) {
        let until = Instant::now() + MONITOR_LIMIT;
        if process::wait_readable(&[pidfd.as_fd()], Some(until)).is_err() {
            tracing::debug!("the monitor of {id} waits for what has ended");
            let _ = process::pidfd_kill(&pidfd, libc::SIGKILL);
        }
    }
}

/// Returns what docker calls the container until it is noted.
fn passing_name(made: &Made) -> Result<String> {
    let name = made.upper.file_name().and_then(|name| name.to_str());
    Ok(name.ok_or_else(|| anyhow!("a migration without a place"))?.to_owned())
}

fn info() -> Result<Value> {
    ask(GET, "/info", None)?.ok_or_else(|| anyhow!("docker says nothing"))
}

fn store(info: &Value) -> EngineStore {
    let root = PathBuf::from(text(&info["DockerRootDir"]));
    EngineStore {
        run: EXEC_ROOT.into(),
        volumes: root.join("volumes"),
        root,
        driver: text(&info["Driver"]).to_owned(),
    }
}

/// Returns why what a container has changed of its image cannot be told.
fn store_problem(store: &EngineStore) -> Option<Problem> {
    (store.driver != "overlay2").then(|| {
        Problem::new(
            format!("docker's storage driver is {}", store.driver.escape_debug()),
            "Ferry knows overlay2, and not the containerd image store",
        )
        .hint(
            "in /etc/docker/daemon.json: \"storage-driver\": \"overlay2\", and \"features\": \
             {\"containerd-snapshotter\": false}; images have to be pulled again",
        )
    })
}

/// Tells whether the runtime that docker has by this name is Ferry.
fn is_ferry(info: &Value, name: &str) -> bool {
    let path = text(&info["Runtimes"][name]["path"]);
    let said = (!path.is_empty()).then(|| run(path, &["--version"], LIMIT).ok()).flatten();
    said.is_some_and(|said| {
        String::from_utf8_lossy(&said.out).lines().any(|line| line.starts_with("ferry: "))
    })
}
