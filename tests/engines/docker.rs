//! docker's containers: what docker there knows of them afterwards, and here.

use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::container::ADDRESS;
use crate::common::lab::{Host, Lab, SHORT, tools};
use crate::common::probe::Probe;
use crate::common::process::until;
use crate::common::suite::{self, in_lab_of};
use crate::common::{Outcome, ensure};
use crate::{images, neighbours, networks, published, second};

const LIMIT: Duration = Duration::from_secs(180);
const HOSTS: &[&str] = &["a", "b", "client", "--engines"];
const CONNECTIONS: usize = 4;
/// So many that Ferry carries them itself.
const MANY: usize = 70;

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab_of(HOSTS, "docker::on_the_segment", LIMIT, on_the_segment),
        in_lab_of(HOSTS, "docker::with_the_hosts_network", LIMIT, with_the_hosts_network),
        in_lab_of(HOSTS, "docker::behind_a_bridge", LIMIT, behind_a_bridge),
        in_lab_of(HOSTS, "docker::among_neighbours", LIMIT, among_neighbours),
        in_lab_of(HOSTS, "docker::in_the_default_network", LIMIT, in_the_default_network),
        in_lab_of(HOSTS, "docker::no_second_copy", second::LIMIT, no_second_copy),
        in_lab_of(HOSTS, "docker::without_its_image", 2 * LIMIT, without_its_image),
        in_lab_of(HOSTS, "docker::without_its_network", 2 * LIMIT, without_its_network),
        in_lab_of(HOSTS, "docker::network_taken_back", 3 * LIMIT, network_taken_back),
        in_lab_of(HOSTS, "docker::refused", LIMIT, refused),
        in_lab_of(HOSTS, "docker::after_failures", 2 * LIMIT, after_failures),
        in_lab_of(HOSTS, "docker::without_ferry", LIMIT, without_ferry),
        in_lab_of(HOSTS, "docker::without_a_mark", LIMIT, without_a_mark),
    ]
}

/// Starts the daemon on a host, and waits until it answers.
fn start_daemon(host: &Host) -> Outcome {
    host.sh("setsid -f dockerd >>/var/log/dockerd.log 2>&1 </dev/null")?;
    until(
        "dockerd answers",
        SHORT,
        || Ok((host.exec(&["docker", "info"])?.code == 0).then_some(())),
    )
    .map_err(|e| format!("{e}: {}", host.sh("tail -n 20 /var/log/dockerd.log").unwrap_or_default()))
}

/// The daemon ends and comes again; its containers run on.
fn restart_daemon(host: &Host) -> Outcome {
    host.sh("kill $(cat /run/docker.pid)")?;
    until("dockerd has ended", SHORT, || {
        Ok(host.exec(&["test", "-e", "/run/docker.pid"])?.code.ne(&0).then_some(()))
    })?;
    start_daemon(host)
}

/// docker with ferry as its runtime on both hosts, an image, and networks.
fn set_up(lab: &Lab) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let bin = a.path("/srv/shared/bin")?;
    std::fs::copy(tools().join("counter-server"), bin.join("counter-server"))
        .map_err(|e| format!("counter-server: {e}"))?;
    for host in [&a, &b] {
        host.sh("mkdir -p /etc/docker
cat >/etc/docker/daemon.json <<END
{
  \"runtimes\": { \"ferry\": { \"path\": \"/usr/local/bin/ferry\" } },
  \"default-runtime\": \"ferry\",
  \"live-restore\": true,
  \"storage-driver\": \"overlay2\",
  \"features\": { \"containerd-snapshotter\": false }
}
END")?;
        start_daemon(host)?;
    }

    a.sh("mkdir -p /tmp/image/tmp /tmp/image/data
          cp /srv/shared/bin/counter-server /srv/shared/bin/ferry-probe /tmp/image
          echo old >/tmp/image/changed
          tar -C /tmp/image -c . | docker import - app:1
          docker save --output /srv/shared/app.tar app:1")?;
    b.sh("docker load --input /srv/shared/app.tar")?;

    let net = lab.address(0);
    let net = net.trim_end_matches(".0");
    for host in [&a, &b] {
        host.sh(&format!(
            "docker network create --subnet 10.89.7.0/24 appnet
             docker network create --driver macvlan --opt parent=eth0 --subnet {net}.0/24 lan"
        ))?;
    }

    Ok(())
}

/// What runs in it.
const COMMAND: &str = "app:1 /counter-server --log-to-stdout --memory 8M --threads 2";

/// Starts it on `a`, with these options.
fn start(lab: &Lab, options: &str) -> Outcome {
    let a = lab.host("a");
    a.sh(&format!(
        "docker run --detach --name web --label tier=front --env COLOUR=blue --restart always {options} \
         {COMMAND}"
    ))?;
    // Something is changed of the image, and in memory that is shared.
    a.sh("docker exec web /ferry-probe --help >/dev/null
          root=$(docker inspect --format '{{.State.Pid}}' web)
          echo new >/proc/$root/root/changed
          rm /proc/$root/root/ferry-probe
          echo kept >/proc/$root/root/dev/shm/note")?;
    until("it says something", SHORT, || Ok((logs(&a)?.len() > 1).then_some(())))
}

fn inspect(host: &Host, name: &str) -> Outcome<Value> {
    let said = host.sh(&format!("docker container inspect {name}"))?;
    let all: Value = serde_json::from_str(&said).map_err(|e| format!("{e}: {said}"))?;
    Ok(all[0].clone())
}

fn pid(host: &Host) -> Outcome<String> {
    host.sh("docker inspect --format '{{.State.Pid}}' web")
}

fn logs(host: &Host) -> Outcome<Vec<String>> {
    Ok(host.sh("docker logs web 2>&1")?.lines().map(str::to_owned).collect())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, before: T, after: T) -> Outcome {
    ensure!(before == after, "{what}: {before:?} has become {after:?}");
    Ok(())
}

/// What docker there must know of it, and docker here.
fn owned_there(lab: &Lab, before: &Value, lines: &[String]) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let after = inspect(&b, "web")?;
    for field in ["Name", "Image", "Path", "Args"] {
        same(field, &before[field], &after[field])?;
    }

    for field in ["Image", "Labels", "Hostname", "Cmd", "Env", "Entrypoint", "WorkingDir"] {
        same(field, &before["Config"][field], &after["Config"][field])?;
    }
    for field in ["RestartPolicy", "NetworkMode", "PortBindings", "LogConfig", "Runtime"] {
        same(field, &before["HostConfig"][field], &after["HostConfig"][field])?;
    }

    for (name, network) in before["NetworkSettings"]["Networks"].as_object().into_iter().flatten() {
        let there = &after["NetworkSettings"]["Networks"][name];
        for field in ["IPAddress", "MacAddress", "IPPrefixLen"] {
            same(field, &network[field], &there[field])?;
        }
    }

    ensure!(after["State"]["Status"] == "running", "{}", after["State"]);
    for host in [&a, &b] {
        let said = host.ferry(&["migrations", "docker:web"])?.exits(0)?.out;
        ensure!(said.contains("  docker:web ("), "on {}: {said}", host.name);
    }

    same("RestartCount", &after["RestartCount"], &Value::from(0))?;

    // The log: old lines, each once, and new ones.
    let now = logs(&b)?;
    ensure!(now.starts_with(lines), "the log began with {lines:?}, and now {now:?}");
    until("the log goes on", SHORT, || Ok((logs(&b)?.len() > now.len() + 1).then_some(())))?;
    let numbers: Vec<u64> = logs(&b)?
        .iter()
        .filter_map(|line| line.split_whitespace().find_map(|word| word.parse().ok()))
        .collect();
    ensure!(
        numbers.len() > 3 && numbers.windows(2).all(|two| two[1] == two[0] + 1),
        "a line is missing, or is there twice: {numbers:?}"
    );

    // What it had changed, and what it shares.
    let root = format!("/proc/{}/root", after["State"]["Pid"]);
    let found =
        b.sh(&format!("cat {root}/changed {root}/dev/shm/note; ! ls {root}/ferry-probe 2>&1"))?;
    ensure!(found.starts_with("new\nkept\n"), "{found}");

    ended_here(&a)
}

/// It has ended, stays so, and is not to be started.
fn ended_here(a: &Host) -> Outcome {
    until("docker here sees it end", SHORT, || {
        let here = inspect(a, "web")?;
        let policy = here["HostConfig"]["RestartPolicy"]["Name"] == "no";
        Ok((here["State"]["Status"] == "exited" && policy).then_some(()))
    })?;
    let said = a.exec(&["docker", "start", "web"])?;
    ensure!(said.code != 0 && said.to_string().contains("was migrated to b"), "{said}");
    let here = inspect(a, "web")?;
    ensure!(here["State"]["Error"].to_string().contains("was migrated to b"), "{}", here["State"]);
    let left = a.sh("ip -br link show type veth | grep -vc '^eth0' || true
         nft list ruleset | grep -c 'dport 8080' || true")?;
    ensure!(
        left.split_whitespace().all(|n| n == "0"),
        "docker's rules or cables stay here: {left}"
    );
    Ok(())
}

/// It is docker's in all that is done with it afterwards, also if the daemons are started again.
fn obeys_there(lab: &Lab) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let pid = inspect(&b, "web")?["State"]["Pid"].clone();
    for host in [&a, &b] {
        restart_daemon(host)?;
    }
    same("its process", &pid, &inspect(&b, "web")?["State"]["Pid"])?;
    ensure!(inspect(&a, "web")?["State"]["Status"] == "exited", "it has come back here");

    let said = b.exec(&["docker", "exec", "web", "/counter-server", "--help"])?.ok()?;
    ensure!(said.contains("Usage"), "{said}");
    b.sh("docker top web >/dev/null")?;
    b.sh("docker stop --time 10 web >/dev/null")?;
    let state = inspect(&b, "web")?["State"].clone();
    ensure!(state["Status"] == "exited" && state["ExitCode"] == 0, "{state}");
    // A fresh one: its counting begins anew.
    let before = logs(&b)?.len();
    b.sh("docker start web")?;
    until("the fresh one counts from the beginning", SHORT, || {
        Ok(logs(&b)?[before..].iter().any(|line| line.starts_with("line 1 ")).then_some(()))
    })?;
    b.sh("docker rm --force web")?;
    clean(&b)
}

/// Nothing of a migration is left.
fn clean(host: &Host) -> Outcome {
    let left = host.sh("ls -A /run/ferry /run/ferry-expected 2>/dev/null | grep -v : || true
         ls -A /var/lib/docker/overlay2 | grep ferry || true
         nft list tables | grep ferry || true
         docker ps --all | grep ferry- || true
         ls -A /var/lib/docker/volumes | grep ferry || true")?;
    ensure!(left.trim().is_empty(), "on {}: {left}", host.name);
    Ok(())
}

/// Nothing of the container is on `b`, and it runs on `a` as if nothing had happened.
fn stayed(lab: &Lab, before: &Value) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let after = inspect(&a, "web")?;
    same("its process", &before["State"]["Pid"], &after["State"]["Pid"])?;
    same(
        "its policy",
        &before["HostConfig"]["RestartPolicy"],
        &after["HostConfig"]["RestartPolicy"],
    )?;
    ensure!(after["State"]["Status"] == "running", "{}", after["State"]);
    until("nothing is left there", SHORT, || {
        let left = b.sh("docker ps --all --quiet; docker volume ls --quiet; \
                  ls /run/docker/runtime-*/moby 2>/dev/null || true; ip netns")?;
        Ok(left.trim().is_empty().then_some(()))
    })?;
    clean(&b)
}

/// On a macvlan, with a volume: clients' connections go on.
fn on_the_segment(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    a.sh("docker volume create --label of=web data")?;
    start(lab, &format!("--network lan --ip {address} --volume data:/data"))?;
    a.sh("echo precious >/var/lib/docker/volumes/data/_data/file")?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), MANY)?;
    let before = inspect(&a, "web")?;
    let lines = logs(&a)?;

    let said = a.ferry(&["check", "docker:web", "b"])?.exits(0)?;
    let said = said.to_string();
    ensure!(said.contains("can go to b") && !said.contains("copied"), "{said}");
    a.ferry(&["migrate", "docker:web", "b"])?.exits(0)?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)?;
    let b = lab.host("b");
    let volume = b.sh("docker volume inspect data; cat /var/lib/docker/volumes/data/_data/file")?;
    ensure!(volume.contains("\"of\": \"web\"") && volume.ends_with("precious\n"), "{volume}");
    obeys_there(lab)
}

/// With an address of the host's that moves along, and docker's own first process.
fn with_the_hosts_network(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    a.sh(&format!("ip address add {address}/24 dev eth0"))?;
    start(lab, "--network host --init")?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let before = inspect(&a, "web")?;
    let lines = logs(&a)?;
    let moves = format!("--move-address={address}/24@eth0");
    a.ferry(&["migrate", &moves, "web", "b"])?.exits(0)?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)?;
    obeys_there(lab)
}

/// On a bridge of docker's, with a published port: what is connected to it goes on, also when Ferry is killed
/// right after the commit.
fn behind_a_bridge(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    start(lab, "--network appnet --ip 10.89.7.20 --publish 8080:7000")?;
    let mut clients = published::connect(lab)?;
    let before = inspect(&a, "web")?;
    published::stays(lab, &mut clients)?;
    stayed(lab, &before)?;
    let lines = logs(&a)?;
    a.exec(&["env", "FERRY_FAULT=source.committed:kill", "ferry", "migrate", "web", "b"])?;
    clients.go_on(lab, pid)?;
    owned_there(lab, &before, &lines)?;
    clients.end(lab, "b", &["web"], pid)?;
    obeys_there(lab)
}

/// In docker's default network, where another container has its address there: connections keep it, and
/// nobody else sees that.
fn in_the_default_network(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    b.sh(&format!("docker run --detach --name other {COMMAND}"))?;
    start(lab, "--publish 8080:7000")?;
    let own = |host: &Host, name: &str| -> Outcome<Value> {
        Ok(inspect(host, name)?["NetworkSettings"]["Networks"]["bridge"].clone())
    };
    let before = own(&a, "web")?;
    same("the other's address", &before["IPAddress"], &own(&b, "other")?["IPAddress"])?;

    let mut clients = published::connect(lab)?;
    let said = a.ferry(&["check", "web", "b"])?.exits(0)?.to_string();
    ensure!(said.contains("may be another address there"), "{said}");

    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    clients.go_on(lab, pid)?;
    let after = own(&b, "web")?;
    ensure!(before["IPAddress"] != after["IPAddress"], "{before} has become {after}");
    same("its hardware address", &before["MacAddress"], &after["MacAddress"])?;
    let other = format!("{}:7000", before["IPAddress"].as_str().unwrap_or_default());
    let other =
        ["/srv/shared/bin/ferry-probe", "--to", &other, "--connections", "1", "--for", "1s"];
    b.exec(&other)?.ok()?;

    let inside = format!("nsenter --net=/proc/{}/ns/net ip address show dev lo", pid(&b)?.trim());
    let old = before["IPAddress"].as_str().unwrap_or_default();
    ensure!(b.sh(&inside)?.contains(old), "it has lost {old}");

    clients.end(lab, "a", &["web"], pid)?;
    ensure!(!b.sh(&inside)?.contains(old), "it keeps {old}");
    ended_here(&a)?;

    // From there it goes on as from anywhere.
    a.sh("docker rm web")?;
    b.ferry(&["migrate", "web", "a"])?.exits(0)?;

    Probe::to(lab, &format!("{}:8080", lab.address(11)), 1)?.is_content()
}

/// It is not made again here when it has left.
fn no_second_copy(lab: &Lab) -> Outcome {
    set_up(lab)?;
    second::is_held_back(
        lab,
        "docker",
        &[
            "docker rm web; docker run --detach --name web COMMAND",
            "docker create --name new_web COMMAND; docker rm --force web; docker rename new_web web; docker start web",
        ],
    )
}

/// In a network with others, which stay: they and it go on to reach each other.
fn among_neighbours(lab: &Lab) -> Outcome {
    set_up(lab)?;
    start(lab, "--network appnet --ip 10.89.7.20")?;
    neighbours::reach_each_other(lab, "docker")?;
    neighbours::goes_on_asking(lab, "docker")
}

/// The image is not there, but for a layer of it: it goes along, and comes back from nowhere.
fn without_its_image(lab: &Lab) -> Outcome {
    set_up(lab)?;
    images::lacks_a_layer(lab, "docker")?;
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address}"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let before = inspect(&lab.host("a"), "web")?;
    images::is_told(lab, "docker")?;
    wrapper(lab)?;
    images::is_taken_back(lab, "docker", "/srv/shared/bin/faulty")?;
    probe.is_content()?;
    stayed(lab, &before)?;

    let lines = logs(&lab.host("a"))?;
    images::goes(lab, "docker")?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)?;
    obeys_there(lab)
}

/// The network is not there: it is made as it is here, and the container has its address in it.
fn without_its_network(lab: &Lab) -> Outcome {
    set_up(lab)?;
    networks::is_lacking(lab, "docker")?;
    start(lab, "--network appnet --ip 10.89.7.20 --publish 8080:7000")?;
    let a = lab.host("a");
    let before = inspect(&a, "web")?;
    networks::is_told(lab, "docker")?;
    stayed(lab, &before)?;

    let mut clients = published::connect(lab)?;
    let lines = logs(&a)?;
    networks::is_made(lab, "docker")?;
    clients.go_on(lab, pid)?;
    clients.end(lab, "a", &["--when-idle=1s", "web"], pid)?;
    owned_there(lab, &before, &lines)?;
    obeys_there(lab)
}

/// The network is not there, and after each failure is not there either.
fn network_taken_back(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address}"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let (before, lines) = (inspect(&a, "web")?, logs(&a)?);
    wrapper(lab)?;
    networks::is_taken_back(lab, "docker", "/srv/shared/bin/faulty")?;
    probe.is_content()?;
    stayed(lab, &before)?;

    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)
}

/// What cannot go is told by name, and nothing is touched.
fn refused(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    let refuse = |words: &str| -> Outcome {
        let said = a.ferry(&["check", "web", "b"])?;
        ensure!(said.code == 3 && said.to_string().contains(words), "wanted {words:?}: {said}");
        Ok(())
    };

    a.sh("docker volume create parts; mkdir /var/lib/docker/volumes/parts/_data/one")?;
    let part = "--network none --mount type=volume,source=parts,target=/p,volume-subpath=one";
    a.sh("docker network create --ipv6 --subnet 10.89.8.0/24 --subnet fd89:8::/64 six")?;
    for (options, words) in [
        (part, "it has a part of a volume"),
        ("--network six", "it has an IPv6 address in docker's network six"),
        ("--rm --network none", "(--rm)"),
        ("--tty --network none", "it has a terminal"),
        ("--network none --log-driver local", "its log goes to local"),
        ("--network none --runtime runc", "docker runs it by runc"),
    ] {
        a.sh(&format!("docker run --detach --name web {options} {COMMAND} >/dev/null </dev/null"))?;
        refuse(words)?;
        a.sh("docker rm --force web")?;
    }

    a.sh("docker volume rm parts")?;

    start(lab, "--network appnet --ip 10.89.7.20 --publish 8080:7000 --volume data:/data")?;
    let before = inspect(&a, "web")?;
    a.ferry(&["check", "web", "b"])?.exits(0)?;
    for (there, words, back) in [
        ("docker volume create data", "has a volume data already", "docker volume rm data"),
        ("docker create --name web app:1 x", "has a container web already", "docker rm web"),
        (
            "docker network rm appnet; docker network create --subnet 10.89.9.0/24 appnet",
            "appnet on b is another one",
            "docker network rm appnet; docker network create --subnet 10.89.7.0/24 appnet",
        ),
    ] {
        b.sh(there)?;
        refuse(words)?;
        b.sh(back)?;
    }

    let taken = b.start(&["/srv/shared/bin/counter-server", "--listen", "0.0.0.0:8080"])?;
    until("the port is taken", SHORT, || {
        Ok(b.sh("ss -Hltn sport = :8080")?.contains("8080").then_some(()))
    })?;
    refuse("the port 8080/tcp cannot be published")?;
    drop(taken);

    stayed(lab, &before)
}

/// Fails at places before the commit: it runs on here, and docker there has nothing of it.
fn after_failures(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address} --volume data:/data"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let before = inspect(&a, "web")?;
    let mut deeds = vec![
        ("source", "source.papers:error"),
        ("destination", "destination.engaged:error"),
        ("destination", "destination.started:error"),
        ("destination", "destination.ready:kill"),
    ];

    if suite::full() {
        deeds.extend([
            ("source", "source.freeze:error"),
            ("source", "source.commit:error"),
            ("source", "source.commit:kill"),
            ("destination", "destination.prepared:error"),
            ("destination", "destination.restore:kill"),
            ("destination", "destination.restored:error"),
            ("destination", "destination.engaged:kill"),
            ("destination", "destination.started:kill"),
        ]);
    }

    wrapper(lab)?;
    for (role, deed) in deeds {
        let step = |e: String| format!("{deed}: {e}");
        let variable = format!("FERRY_FAULT={deed}");
        let said = match role {
            "source" => a.exec(&["env", &variable, "ferry", "migrate", "web", "b"])?,
            _ => {
                a.sh(&format!("echo {deed} >/srv/shared/deed"))?;
                a.ferry(&["migrate", "--remote-ferry", "/srv/shared/bin/faulty", "web", "b"])?
            }
        };

        ensure!(said.code != 0, "{deed}: {said}");
        until("it runs on", SHORT, || {
            Ok(a.exec(&["ferry", "check", "web", "b"])?.code.eq(&0).then_some(()))
        })
        .map_err(step)?;
        probe.is_content().map_err(step)?;
        stayed(lab, &before).map_err(step)?;
    }

    // And then it goes.
    let lines = logs(&a)?;
    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    probe.is_content()?;

    owned_there(lab, &before, &lines)
}

/// A ferry that fails as `/srv/shared/deed` says.
fn wrapper(lab: &Lab) -> Outcome {
    let path = lab.host("a").path("/srv/shared/bin/faulty")?;
    crate::common::process::write_script(
        &path,
        "#!/bin/sh\nFERRY_FAULT=$(cat /srv/shared/deed) exec ferry \"$@\"\n",
    )
}

/// `ferry receive` is killed right after the commit: the container runs, and docker has it.
fn without_ferry(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address}"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let (before, lines) = (inspect(&a, "web")?, logs(&a)?);
    wrapper(lab)?;
    a.sh("echo destination.committed:kill >/srv/shared/deed")?;
    // Its guard goes on, and is asked.
    a.ferry(&["migrate", "--remote-ferry", "/srv/shared/bin/faulty", "web", "b"])?;
    probe.is_content()?;
    until("docker there has it", SHORT, || {
        Ok(lab
            .host("b")
            .exec(&["docker", "inspect", "--format", "{{.State.Status}}", "web"])?
            .out
            .contains("running")
            .then_some(()))
    })?;
    owned_there(lab, &before, &lines)
}

/// Where no away-mark is wanted, docker starts no second copy either: it has taken the restart policy off; or,
/// where it has not, the mark stays.
fn without_a_mark(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address}"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let marks = |host: &Host| host.sh("find /var/lib/ferry/away -type f | wc -l");
    let policy = |host: &Host| -> Outcome<Value> {
        Ok(inspect(host, "web")?["HostConfig"]["RestartPolicy"]["Name"].clone())
    };

    // A daemon that is started starts what is to run always.
    let stays_away = |host: &Host| -> Outcome {
        restart_daemon(host)?;
        let state = inspect(host, "web")?["State"].clone();
        ensure!(
            state["Running"] == false && state["Restarting"] == false,
            "a second copy: {state}"
        );
        Ok(())
    };

    a.ferry(&["migrate", "--no-mark", "web", "b"])?.exits(0)?;
    probe.is_content()?;
    ensure!(marks(&a)?.trim() == "0", "a mark was left");
    ensure!(policy(&a)? == "no" && policy(&b)? == "always", "{} {}", policy(&a)?, policy(&b)?);
    stays_away(&a)?;
    a.sh("docker rm web")?;

    let fault = "FERRY_FAULT=docker.let-go:error";
    let said = b.exec(&["env", fault, "ferry", "migrate", "--no-mark", "web", "a"])?;
    probe.is_content()?;

    // By its ID, and by its name.
    ensure!(policy(&b)? == "always" && marks(&b)?.trim() == "2", "{said}");
    ensure!(said.err.contains("the away-mark stays"), "{said}");
    stays_away(&b)?;

    probe.is_content()
}
