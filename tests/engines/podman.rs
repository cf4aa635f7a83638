//! podman's containers: what podman there knows of them afterwards, and here.

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
        in_lab_of(HOSTS, "podman::on_the_segment", LIMIT, on_the_segment),
        in_lab_of(HOSTS, "podman::with_the_hosts_network", LIMIT, with_the_hosts_network),
        in_lab_of(HOSTS, "podman::behind_a_bridge", LIMIT, behind_a_bridge),
        in_lab_of(HOSTS, "podman::among_neighbours", LIMIT, among_neighbours),
        in_lab_of(HOSTS, "podman::no_second_copy", second::LIMIT, no_second_copy),
        in_lab_of(HOSTS, "podman::without_its_image", 2 * LIMIT, without_its_image),
        in_lab_of(HOSTS, "podman::without_its_network", 2 * LIMIT, without_its_network),
        in_lab_of(HOSTS, "podman::network_taken_back", 3 * LIMIT, network_taken_back),
        in_lab_of(HOSTS, "podman::refused", 2 * LIMIT, refused),
        in_lab_of(HOSTS, "podman::after_failures", 3 * LIMIT, after_failures),
        in_lab_of(HOSTS, "podman::without_ferry", LIMIT, without_ferry),
    ]
}

/// podman with ferry as its runtime on both hosts, an image, and networks.
fn set_up(lab: &Lab) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let bin = a.path("/srv/shared/bin")?;
    std::fs::copy(tools().join("counter-server"), bin.join("counter-server"))
        .map_err(|e| format!("counter-server: {e}"))?;
    for host in [&a, &b] {
        // These hosts' control groups have no controllers.
        host.sh("cat >/etc/containers/containers.conf <<END
[engine]
runtime = \"ferry\"
runtime_supports_json = [\"crun\", \"runc\", \"ferry\"]
[engine.runtimes]
ferry = [\"/usr/local/bin/ferry\"]
[containers]
pids_limit = 0
END")?;
    }

    a.sh("mkdir -p /tmp/image/tmp /tmp/image/data
          cp /srv/shared/bin/counter-server /srv/shared/bin/ferry-probe /tmp/image
          echo old >/tmp/image/changed
          tar -C /tmp/image -c . | podman import - app:1
          podman save --output /srv/shared/app.tar app:1")?;
    b.sh("podman load --input /srv/shared/app.tar")?;

    let net = lab.address(0);
    let net = net.trim_end_matches(".0");
    for host in [&a, &b] {
        host.sh(&format!(
            "podman network create --subnet 10.89.7.0/24 appnet
             podman network create --driver macvlan --opt parent=eth0 --subnet {net}.0/24 lan"
        ))?;
    }

    Ok(())
}

/// What runs in it.
const COMMAND: &str = "app:1 /counter-server --log-to-stdout --memory 8M --threads 2";

/// Starts it on `a`, with these options.
fn start(lab: &Lab, options: &str) -> Outcome<String> {
    let a = lab.host("a");
    let id = a.sh(&format!(
        "podman run --detach --name web --label tier=front --env COLOUR=blue --restart always {options} \
         {COMMAND}"
    ))?;
    let id = id.trim().to_owned();
    // Something is changed of the image, and in memory that is shared.
    a.sh("podman exec web /ferry-probe --help >/dev/null
          root=$(podman inspect --format '{{.State.Pid}}' web)
          echo new >/proc/$root/root/changed
          rm /proc/$root/root/ferry-probe
          echo kept >/proc/$root/root/dev/shm/note")?;
    until("it says something", SHORT, || Ok((logs(&a)?.len() > 1).then_some(())))?;
    Ok(id)
}

fn inspect(host: &Host, name: &str) -> Outcome<Value> {
    let said = host.sh(&format!("podman container inspect {name}"))?;
    let all: Value = serde_json::from_str(&said).map_err(|e| format!("{e}: {said}"))?;
    Ok(all[0].clone())
}

fn pid(host: &Host) -> Outcome<String> {
    host.sh("podman inspect --format '{{.State.Pid}}' web")
}

fn logs(host: &Host) -> Outcome<Vec<String>> {
    Ok(host.sh("podman logs web 2>&1")?.lines().map(str::to_owned).collect())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, before: T, after: T) -> Outcome {
    ensure!(before == after, "{what}: {before:?} has become {after:?}");
    Ok(())
}

/// What podman there must know of it, and podman here.
fn owned_there(lab: &Lab, before: &Value, lines: &[String]) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let after = inspect(&b, "web")?;
    for field in ["Id", "Name", "Image", "ImageName", "Path", "Args", "OCIRuntime"] {
        same(field, &before[field], &after[field])?;
    }

    for field in ["Labels", "Hostname", "Cmd", "StopSignal", "CreateCommand"] {
        same(field, &before["Config"][field], &after["Config"][field])?;
    }

    // podman's import writes down what it had only told the runtime before, such as HOSTNAME.
    let environment = |of: &Value| of["Config"]["Env"].as_array().cloned().unwrap_or_default();
    let (had, has) = (environment(before), environment(&after));
    ensure!(had.iter().all(|one| has.contains(one)), "{had:?} has become {has:?}");
    for field in ["RestartPolicy", "NetworkMode", "PortBindings", "LogConfig"] {
        same(field, &before["HostConfig"][field], &after["HostConfig"][field])?;
    }

    for (name, network) in before["NetworkSettings"]["Networks"].as_object().into_iter().flatten() {
        let there = &after["NetworkSettings"]["Networks"][name];
        for field in ["IPAddress", "MacAddress", "IPPrefixLen"] {
            same(field, &network[field], &there[field])?;
        }
    }

    ensure!(after["State"]["Status"] == "running", "{}", after["State"]);

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

    // Here it has ended, stays so, and is not to be started.
    until("podman here sees it end", SHORT, || {
        Ok((inspect(&a, "web")?["State"]["Status"] == "exited").then_some(()))
    })?;
    let here = inspect(&a, "web")?;
    ensure!(here["RestartCount"] == 0, "it was started again here: {here}");

    let said = a.exec(&["podman", "start", "web"])?;
    ensure!(said.code != 0 && said.to_string().contains("was migrated to b"), "{said}");
    let left = a.sh(
        "nft list ruleset | grep -c 'dport 8080' || true; ip -br link show type veth | grep -vc '^eth0' || true",
    )?;

    ensure!(
        left.split_whitespace().all(|n| n == "0"),
        "podman's rules or cables stay here: {left}"
    );

    Ok(())
}

/// It is podman's in all that is done with it afterwards.
fn obeys_there(lab: &Lab) -> Outcome {
    let b = lab.host("b");
    let said = b.exec(&["podman", "exec", "web", "/counter-server", "--help"])?.ok()?;
    ensure!(said.contains("Usage"), "{said}");
    b.sh("podman top web >/dev/null")?;
    b.sh("podman stop --time 10 web >/dev/null")?;
    let state = inspect(&b, "web")?["State"].clone();
    ensure!(state["Status"] == "exited" && state["ExitCode"] == 0, "{state}");
    // A fresh one: its counting begins anew.
    let before = logs(&b)?.len();
    b.sh("podman start web")?;
    until("the fresh one counts from the beginning", SHORT, || {
        Ok(logs(&b)?[before..].iter().any(|line| line.starts_with("line 1 ")).then_some(()))
    })?;
    // Seen once: podman itself was killed by it, on a busy machine.
    until("podman has removed it", SHORT, || {
        let gone = b.exec(&["podman", "rm", "--force", "--ignore", "--time", "0", "web"])?;
        Ok((gone.code == 0).then_some(()))
    })?;
    clean(&b)
}

/// Nothing of a migration is left.
fn clean(host: &Host) -> Outcome {
    let left = host.sh("ls -A /run/ferry /run/ferry-expected 2>/dev/null | grep -v : || true
         ls /var/lib/containers/storage/overlay | grep ferry || true
         nft list tables | grep ferry || true
         ls -A /var/lib/containers/storage/volumes 2>/dev/null | grep ferry || true")?;
    ensure!(left.trim().is_empty(), "on {}: {left}", host.name);
    Ok(())
}

/// Nothing of the container is on `b`, and it runs on `a` as if nothing had happened.
fn stayed(lab: &Lab, before: &Value) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let after = inspect(&a, "web")?;
    same("its process", &before["State"]["Pid"], &after["State"]["Pid"])?;
    ensure!(after["State"]["Status"] == "running", "{}", after["State"]);
    until("nothing is left there", SHORT, || {
        let left = b.sh("podman ps --all --quiet; podman volume ls --quiet; \
                  test ! -d /run/runc || runc list --quiet; ip netns")?;
        Ok(left.trim().is_empty().then_some(()))
    })?;
    clean(&b)
}

/// On a macvlan, with a volume: clients' connections go on.
fn on_the_segment(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    a.sh("podman volume create --label of=web data")?;
    start(lab, &format!("--network lan --ip {address} --volume data:/data"))?;
    a.sh("echo precious >/var/lib/containers/storage/volumes/data/_data/file")?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), MANY)?;
    let before = inspect(&a, "web")?;
    let lines = logs(&a)?;

    let said = a.ferry(&["check", "podman:web", "b"])?.exits(0)?;
    ensure!(said.to_string().contains("can go to b"), "{said}");
    a.ferry(&["migrate", "podman:web", "b"])?.exits(0)?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)?;
    let b = lab.host("b");
    let volume = b.sh(
        "podman volume inspect data; cat /var/lib/containers/storage/volumes/data/_data/file",
    )?;
    ensure!(volume.contains("\"of\": \"web\"") && volume.ends_with("precious\n"), "{volume}");
    obeys_there(lab)
}

/// With an address of the host's that moves along.
fn with_the_hosts_network(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    a.sh(&format!("ip address add {address}/24 dev eth0"))?;
    start(lab, "--network host")?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let before = inspect(&a, "web")?;
    let lines = logs(&a)?;
    let moves = format!("--move-address={address}/24@eth0");
    a.ferry(&["migrate", &moves, "web", "b"])?.exits(0)?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)?;
    obeys_there(lab)
}

/// On a bridge of podman's, with a published port: what is connected to it goes on, until it is idle.
fn behind_a_bridge(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    start(lab, "--network appnet --ip 10.89.7.20 --publish 8080:7000")?;
    let mut clients = published::connect(lab)?;
    let before = inspect(&a, "web")?;
    let lines = logs(&a)?;
    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    clients.go_on(lab, pid)?;
    // Until then podman here would want the port that Ferry holds, and would not come to be refused.
    clients.end(lab, "a", &["--when-idle=1s", "web"], pid)?;
    owned_there(lab, &before, &lines)?;
    obeys_there(lab)
}

/// It is not made again here when it has left.
fn no_second_copy(lab: &Lab) -> Outcome {
    set_up(lab)?;
    second::is_held_back(
        lab,
        "podman",
        &[
            "podman run --replace --detach --name web COMMAND",
            "podman create --replace --name web COMMAND; podman start web",
        ],
    )
}

/// In a network with others, which stay: they and it go on to reach each other.
fn among_neighbours(lab: &Lab) -> Outcome {
    set_up(lab)?;
    start(lab, "--network appnet --ip 10.89.7.20")?;
    neighbours::reach_each_other(lab, "podman")?;
    neighbours::goes_on_asking(lab, "podman")
}

/// The image is not there, but for a layer of it: it goes along, and comes back from nowhere.
fn without_its_image(lab: &Lab) -> Outcome {
    set_up(lab)?;
    images::lacks_a_layer(lab, "podman")?;
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address}"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let before = inspect(&lab.host("a"), "web")?;
    images::is_told(lab, "podman")?;
    wrapper(lab)?;
    images::is_taken_back(lab, "podman", "/srv/shared/bin/faulty")?;
    probe.is_content()?;
    stayed(lab, &before)?;

    let lines = logs(&lab.host("a"))?;
    images::goes(lab, "podman")?;
    probe.is_content()?;
    owned_there(lab, &before, &lines)?;
    obeys_there(lab)
}

/// The network is not there: it is made as it is here, and the container has its address in it.
fn without_its_network(lab: &Lab) -> Outcome {
    set_up(lab)?;
    networks::is_lacking(lab, "podman")?;
    start(lab, "--network appnet --ip 10.89.7.20 --publish 8080:7000")?;
    let a = lab.host("a");
    let before = inspect(&a, "web")?;
    networks::is_told(lab, "podman")?;
    stayed(lab, &before)?;

    let mut clients = published::connect(lab)?;
    let lines = logs(&a)?;
    networks::is_made(lab, "podman")?;
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
    networks::is_taken_back(lab, "podman", "/srv/shared/bin/faulty")?;
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

    for (options, words) in [
        ("--rm", "(--rm)"),
        ("--tty", "it has a terminal"),
        ("--label PODMAN_SYSTEMD_UNIT=web.service", "the unit web.service owns it"),
    ] {
        a.sh(&format!("podman run --detach --name web {options} {COMMAND} >/dev/null </dev/null"))?;
        refuse(words)?;
        a.sh("podman rm --force --time 0 web")?;
    }

    let pod = "podman pod create --name p >/dev/null; podman run --detach --pod p --name web";
    if a.exec(&["sh", "-c", &format!("{pod} {COMMAND}")])?.code == 0 {
        refuse("pod")?;
    }
    a.sh("podman pod rm --force --time 0 p || true")?;

    start(lab, "--network appnet --ip 10.89.7.20 --publish 8080:7000 --volume data:/data")?;
    let before = inspect(&a, "web")?;
    a.ferry(&["check", "web", "b"])?.exits(0)?;
    for (there, words, back) in [
        ("podman volume create data", "has a volume data already", "podman volume rm data"),
        ("podman create --name web app:1 x", "has a container web already", "podman rm web"),
        (
            "podman network rm appnet; podman network create --driver macvlan --subnet 10.89.7.0/24 appnet",
            "appnet on b is another one",
            "podman network rm appnet; podman network create --subnet 10.89.7.0/24 appnet",
        ),
        (
            "sed -i s/^runtime/#runtime/ /etc/containers/containers.conf",
            "and not ferry",
            "sed -i s/^#runtime/runtime/ /etc/containers/containers.conf",
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

/// Fails at places before the commit: it runs on here, and podman there has nothing of it.
fn after_failures(lab: &Lab) -> Outcome {
    set_up(lab)?;
    let a = lab.host("a");
    let address = lab.address(ADDRESS);
    start(lab, &format!("--network lan --ip {address} --volume data:/data"))?;
    let mut probe = Probe::to(lab, &format!("{address}:7000"), CONNECTIONS)?;
    let before = inspect(&a, "web")?;
    let mut deeds = vec![
        ("source", "source.papers:error"),
        ("source", "source.commit:error"),
        ("destination", "destination.restored:error"),
        ("destination", "destination.ready:kill"),
    ];

    if suite::full() {
        deeds.extend([
            ("source", "source.freeze:error"),
            ("source", "source.commit:kill"),
            ("destination", "destination.prepared:error"),
            ("destination", "destination.restore:kill"),
            ("destination", "destination.engaged:error"),
            ("destination", "destination.engaged:kill"),
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

/// `ferry receive` is killed right after the commit: the container runs, and podman has it.
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
    until("podman there has it", SHORT, || {
        Ok(lab
            .host("b")
            .exec(&["podman", "inspect", "--format", "{{.State.Status}}", "web"])?
            .out
            .contains("running")
            .then_some(()))
    })?;
    owned_there(lab, &before, &lines)
}
