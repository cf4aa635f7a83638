use std::collections::BTreeMap;
use std::sync::Mutex;

use super::definition::GivenPart;
use super::*;

fn network(driver: &str, subnet: &str) -> EngineNetwork {
    let range = AddressRange {
        subnet: subnet.parse().unwrap(),
        gateway: None,
        given: None,
        reserved: BTreeMap::new(),
    };
    EngineNetwork {
        name: "appnet".into(),
        driver: driver.into(),
        subnets: vec![subnet.into()],
        definition: Ok(NetworkDefinition { ranges: vec![range], ..NetworkDefinition::default() }),
    }
}

fn defined(network: &mut EngineNetwork) -> &mut NetworkDefinition {
    network.definition.as_mut().unwrap()
}

/// A host with one link.
fn links() -> HostLinks {
    HostLinks {
        names: vec!["lo".into(), "eth0".into()],
        subnets: vec![("eth0".into(), "10.77.0.11/24".parse().unwrap())],
    }
}

fn found(name: &str, driver: &str, subnet: &str) -> FoundNetwork {
    let network = EngineNetwork { name: name.into(), ..network(driver, subnet) };
    FoundNetwork { id: format!("id-of-{name}"), network }
}

fn course(
    engine: Engine,
    wanted: &EngineNetwork,
    there: &[FoundNetwork],
) -> Result<NetworkCourse, String> {
    decide(engine, wanted, there, &links(), "host2")
        .map_err(|problem| format!("{}: {}", problem.what, problem.why))
}

#[test]
fn one_that_is_lacking_is_made_and_another_one_is_refused() {
    let (docker, podman) = (Engine::Docker, Engine::Podman);
    let own = network("bridge", "10.89.7.0/24");
    let has = |there: FoundNetwork| course(docker, &own, &[there]);
    assert_eq!(course(docker, &own, &[]), Ok(NetworkCourse::Made));
    assert_eq!(has(found("appnet", "bridge", "10.89.7.0/24")), Ok(NetworkCourse::There));
    for other in
        [found("appnet", "bridge", "10.89.8.0/24"), found("appnet", "macvlan", "10.89.7.0/24")]
    {
        assert!(has(other).unwrap_err().contains("is another one"));
    }

    // In the engines' words, and those of the host's own links in ours.
    let wide = found("wide", "bridge", "10.89.0.0/16");
    for (engine, words) in [(docker, "Pool overlaps"), (podman, "already used on the host")] {
        let why = course(engine, &own, std::slice::from_ref(&wide)).unwrap_err();
        assert!(why.contains(words) && why.contains("wide has 10.89.0.0/16"), "{why}");
        let why = course(engine, &network("bridge", "10.77.0.0/16"), &[]).unwrap_err();
        assert!(why.contains("eth0 has 10.77.0.11/24"), "{why}");
        // Where a macvlan is to be.
        let lan = network("macvlan", "10.77.0.0/24");
        assert_eq!(course(engine, &lan, &[]), Ok(NetworkCourse::Made));
    }
    let other = [found("other", "macvlan", "10.89.7.0/24")];
    let lan = network("macvlan", "10.89.7.0/24");
    assert!(course(docker, &lan, &other).is_err());
    assert_eq!(course(podman, &lan, &other), Ok(NetworkCourse::Made));

    // Addresses are not asked for there.
    let default = EngineNetwork { name: "bridge".into(), ..own };
    let there = [found("bridge", "bridge", "172.17.0.0/16")];
    assert_eq!(course(docker, &default, &there), Ok(NetworkCourse::There));
    assert!(course(docker, &default, &[]).unwrap_err().contains("by itself"));
}

#[test]
fn of_a_peer_only_what_is_in_the_lists_is_asked_for() {
    let refused = |engine: Engine, driver: &str, change: &dyn Fn(&mut NetworkDefinition)| {
        let mut odd = network(driver, "10.89.7.0/24");
        change(defined(&mut odd));
        let valid = odd.definition.as_ref().unwrap().validate();
        valid.is_err() || course(engine, &odd, &[]).is_err()
    };
    let option = |key: &'static str, value: &'static str| {
        move |of: &mut NetworkDefinition| drop(of.options.insert(key.into(), value.into()))
    };
    let link = |name: &'static str| move |of: &mut NetworkDefinition| of.interface = name.into();
    let (docker, podman) = (Engine::Docker, Engine::Podman);

    for (engine, driver, key, value) in [
        (docker, "bridge", "com.docker.network.driver.mtu", "1400"),
        (docker, "bridge", "com.docker.network.bridge.enable_icc", "false"),
        (docker, "macvlan", "macvlan_mode", "private"),
        (podman, "bridge", "isolate", "strict"),
        (podman, "macvlan", "mode", "vepa"),
    ] {
        assert!(!refused(engine, driver, &option(key, value)), "{key}={value}");
    }
    for (engine, driver, key, value) in [
        (docker, "bridge", "com.docker.network.driver.mtu", "1400 --x"),
        (docker, "bridge", "com.docker.network.bridge.host_binding_ipv4", "10.0.0.1"),
        (docker, "bridge", "com.docker.network.bridge.trusted_host_interfaces", "eth0"),
        (docker, "bridge", "parent", "eth0"),
        (docker, "macvlan", "parent", "eth0"),
        (docker, "macvlan", "macvlan_mode", "passthru"),
        (podman, "bridge", "vrf", "red"),
        (podman, "bridge", "mode", "unmanaged"),
        (podman, "macvlan", "parent", "eth0"),
        (podman, "macvlan", "mode", "passthru"),
    ] {
        assert!(refused(engine, driver, &option(key, value)), "{key}={value}");
    }

    // A parent is there, a bridge is not.
    for engine in [docker, podman] {
        assert!(
            !refused(engine, "macvlan", &link("eth0")) && !refused(engine, "bridge", &link("br-x"))
        );
        assert!(
            refused(engine, "macvlan", &link("eth7")) && refused(engine, "bridge", &link("eth0"))
        );
        for odd in ["-x", "../x", "a b", "sixteen-letters-"] {
            assert!(refused(engine, "bridge", &link(odd)), "{odd}");
        }
        assert!(refused(engine, "ipvlan", &|_| {}) && refused(engine, "overlay", &|_| {}));
        assert!(refused(engine, "bridge", &|of| of.ranges.clear()));
        assert!(refused(engine, "bridge", &|of| drop(of.labels.insert("a=b".into(), "".into()))));
        assert!(refused(engine, "bridge", &|of| drop(of.labels.insert("a".into(), "\0".into()))));
    }

    let mut never = network("bridge", "10.89.7.0/24");
    never.definition = Err("none is made: --network-create never".into());
    assert!(
        course(docker, &never, &[]).unwrap_err().contains("has no network appnet: none is made")
    );
}

#[test]
fn a_definition_is_read_as_it_was_written() {
    let mut network = network("bridge", "10.89.7.0/24");
    let definition = defined(&mut network);
    definition.ranges[0].given = Some(GivenPart::Within("10.89.7.128/25".parse().unwrap()));
    definition.ranges[0].reserved.insert("host".into(), "10.89.7.5".parse().unwrap());
    let text = serde_json::to_string(&network).unwrap();
    assert_eq!(serde_json::from_str::<EngineNetwork>(&text).unwrap(), network);
    let odd = text.replace("10.89.7.128/25", "10.89.7.128/99");
    assert!(serde_json::from_str::<EngineNetwork>(&odd).is_err());
}

/// An engine with networks.
#[derive(Default)]
struct Networks {
    found: Mutex<Vec<FoundNetwork>>,
    users: Vec<String>,
    refuses: bool,
    /// It makes one, and is not heard.
    silent: bool,
}

impl NetworkStore for Networks {
    fn all(&self) -> Result<Vec<FoundNetwork>> {
        Ok(self.found.lock().unwrap().clone())
    }
    fn create(&self, network: &EngineNetwork, _: &NetworkDefinition) -> Result<NetworkAnswer> {
        if self.refuses {
            return Ok(NetworkAnswer::Refused("no".into()));
        }
        let one = FoundNetwork { id: "new".into(), network: network.clone() };
        self.found.lock().unwrap().push(one);
        if self.silent {
            bail!("no answer");
        }
        Ok(NetworkAnswer::Made("new".into()))
    }
    fn outcome(&self, name: &str) -> Result<Option<FoundNetwork>> {
        Ok(self.all()?.into_iter().find(|found| found.network.name == name))
    }
    fn users(&self, _: &FoundNetwork) -> Result<Vec<String>> {
        Ok(self.users.clone())
    }
    fn remove(&self, id: &str) -> Result<()> {
        self.found.lock().unwrap().retain(|found| found.id != id);
        Ok(())
    }
}

/// Only what was made goes, and only if nobody else has come to use it.
#[test]
fn what_was_made_is_taken_away_and_nothing_else() {
    let own = || network("bridge", "198.51.100.0/24");
    let run = |store: &Networks, meanwhile: &dyn Fn(&mut Vec<FoundNetwork>)| {
        let dir = tempfile::tempdir().unwrap();
        let wanted: EngineWants = serde_json::from_value(serde_json::json!({
            "engine": "docker", "version": "28.5.2", "name": "web", "runtime": "ferry",
            "store": { "root": "/d", "run": "/r", "volumes": "/v", "driver": "overlay2" },
            "image": { "id": "", "name": "app:1" }, "volumes": [], "networks": [own()],
            "ports": [], "own": [], "log": null,
        }))
        .unwrap();
        let made = Made {
            networks: made(&wanted, &["appnet".to_owned()]),
            noted: dir.path().join("noted"),
            ..Made::nothing(&wanted, "c")
        };
        let done = make(store, &wanted, &made);
        meanwhile(&mut store.found.lock().unwrap());
        assert_eq!(discard(store, &made).unwrap(), Vec::<String>::new());
        // And once more: it may have been done before.
        discard(store, &made).unwrap();
        let left: Vec<String> = store.all().unwrap().into_iter().map(|found| found.id).collect();
        (done.is_ok(), left.join(" "))
    };

    let nothing = |_: &mut Vec<FoundNetwork>| {};
    assert_eq!(run(&Networks::default(), &nothing), (true, String::new()));
    let used = Networks { users: vec!["other".into()], ..Networks::default() };
    assert_eq!(run(&used, &nothing), (true, "new".into()));

    // Nobody has heard that it was made.
    let silent = || Networks { silent: true, ..Networks::default() };
    assert_eq!(run(&silent(), &nothing), (false, String::new()));
    let another = |all: &mut Vec<FoundNetwork>| {
        *all = vec![found("appnet", "bridge", "198.51.0.0/16")];
    };
    assert_eq!(run(&silent(), &another), (false, "id-of-appnet".into()));

    // Somebody else has made one before, or since.
    let before = Networks::default();
    before.found.lock().unwrap().push(found("appnet", "bridge", "198.51.100.0/24"));
    assert_eq!(run(&before, &nothing), (false, "id-of-appnet".into()));
    let since = |all: &mut Vec<FoundNetwork>| {
        *all = vec![found("appnet", "bridge", "198.51.100.0/24")];
    };
    assert_eq!(run(&Networks::default(), &since), (true, "id-of-appnet".into()));
    let refuses = Networks { refuses: true, ..Networks::default() };
    assert_eq!(run(&refuses, &since), (false, "id-of-appnet".into()));
}
