//! A network of the container's that the other host lacks, and what becomes of it.

use std::fs;

use serde_json::Value;

use crate::common::lab::{Host, Lab, SHORT};
use crate::common::process::until;
use crate::common::{Outcome, ensure};

/// As compose makes one, with a part of it to give, and an option.
const OPTIONS: &str = "--subnet 10.89.7.0/24 --gateway 10.89.7.1 --ip-range 10.89.7.0/25 \
    --label com.docker.compose.project=shop --label com.docker.compose.network=appnet \
    --label words='a b=c,d'";

/// The network of that name has more than a subnet on `a`; `b` has none.
pub fn is_lacking(lab: &Lab, engine: &str) -> Outcome {
    let mtu = if engine == "docker" { "com.docker.network.driver.mtu" } else { "mtu" };
    lab.host("a").sh(&format!(
        "{engine} network rm appnet; {engine} network create {OPTIONS} --opt {mtu}=1400 appnet"
    ))?;
    lab.host("b").sh(&format!("{engine} network rm appnet")).map(drop)
}

fn networks(host: &Host, engine: &str) -> Outcome<String> {
    host.sh(&format!("{engine} network ls --no-trunc --format '{{{{.ID}}}} {{{{.Name}}}}' | sort"))
}

fn inspect(host: &Host, engine: &str) -> Outcome<Value> {
    let said = host.sh(&format!("{engine} network inspect appnet"))?;
    let all: Value = serde_json::from_str(&said).map_err(|e| format!("{e}: {said}"))?;
    Ok(all[0].clone())
}

/// It is told beforehand; nothing is made where another one is in the way.
pub fn is_told(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let said = a.ferry(&["check", "web", "b"])?.exits(0)?.to_string();
    ensure!(said.contains("the network appnet will be made: bridge 10.89.7.0/24"), "{said}");

    let refuse = |arguments: &[&str], words: &str| -> Outcome {
        let before = networks(&b, engine)?;
        let said = a.ferry(&[&["migrate"], arguments].concat())?.exits(3)?.to_string();
        ensure!(said.contains(words), "wanted {words:?}: {said}");
        let after = networks(&b, engine)?;
        ensure!(before == after, "{before} has become {after}");
        Ok(())
    };
    refuse(&["--network-create", "never", "web", "b"], "has no network appnet")?;
    let overlaps = match engine {
        "docker" => "Pool overlaps with other one on this address space",
        _ => "subnet 10.89.7.0/24 is already used on the host or by another config",
    };
    for (name, subnet, words) in [
        ("appnet", "10.89.8.0/24", "appnet on b is another one"),
        ("wide", "10.89.0.0/16", overlaps),
    ] {
        let create = format!("{engine} network create --subnet {subnet}");
        b.sh(&format!("{create} {name}"))?;
        refuse(&["web", "b"], words)?;
        if name == "wide" {
            // It is what the engine says.
            let said = b.exec(&["sh", "-c", &format!("{create} appnet 2>&1")])?;
            ensure!(said.code != 0, "{said}");
            let said = b.exec(&[
                "sh",
                "-c",
                &format!("{engine} network create --subnet 10.89.7.0/24 appnet"),
            ])?;
            ensure!(said.to_string().contains(words), "wanted {words:?}: {said}");
        }
        b.sh(&format!("{engine} network rm {name}"))?;
    }
    Ok(())
}

/// It is made, as it is on `a`.
pub fn is_made(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.ferry(&["migrate", "--report", "/srv/shared/report", "web", "b"])?.exits(0)?;
    let report = fs::read(a.path("/srv/shared/report")?).map_err(|e| e.to_string())?;
    let report: Value = serde_json::from_slice(&report).map_err(|e| e.to_string())?;
    ensure!(report["networks"][0]["name"] == "appnet", "{}", report["networks"]);

    let (before, after) = (inspect(&a, engine)?, inspect(&b, engine)?);
    let fields: &[&str] = match engine {
        "docker" => {
            &["Driver", "IPAM", "Options", "Labels", "Internal", "EnableIPv6", "Attachable"]
        }
        _ => &["driver", "subnets", "labels", "options", "dns_enabled", "internal", "ipv6_enabled"],
    };
    for field in fields {
        ensure!(
            before[*field] == after[*field],
            "{field}: {} has become {}",
            before[*field],
            after[*field]
        );
    }
    Ok(())
}

/// Fails when it is asked for, when it is there, and later: `b` has what it had. `faulty` is a ferry that fails as
/// `/srv/shared/deed` says.
pub fn is_taken_back(lab: &Lab, engine: &str, faulty: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    b.sh(&format!("{engine} network rm lan"))?;
    let before = networks(&b, engine)?;
    for deed in [
        "destination.network-asked:kill",
        "destination.network-made:kill",
        "destination.network-made:error",
        "destination.restored:error",
        "destination.ready:kill",
    ] {
        let step = |e: String| format!("{deed}: {e}");
        a.sh(&format!("echo {deed} >/srv/shared/deed"))?;
        let said = a.ferry(&["migrate", "--remote-ferry", faulty, "web", "b"])?;
        ensure!(said.code == 1, "{deed}: {said}");
        // Where there was no guard yet.
        b.ferry(&["resolve", "--all"])?;
        until("the network is gone again", SHORT, || {
            Ok((networks(&b, engine)? == before).then_some(()))
        })
        .map_err(step)?;
        until("it runs on", SHORT, || {
            Ok(a.exec(&["ferry", "check", "web", "b"])?.code.eq(&0).then_some(()))
        })
        .map_err(step)?;
    }
    Ok(())
}
