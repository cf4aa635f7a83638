//! A container's image that the other host lacks, and what becomes of it.

use std::fs;

use serde_json::Value;

use crate::common::lab::{Host, Lab, SHORT};
use crate::common::process::until;
use crate::common::{Outcome, ensure};

/// What the upper layer holds at least.
const UPPER: u64 = 2_000_000;

/// The image gets a second layer on `a`; `b` has the first one alone, by another name.
pub fn lacks_a_layer(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.sh(&format!(
        "head -c {UPPER} /dev/urandom >/tmp/second
         id=$({engine} create app:1 x)
         {engine} cp /tmp/second $id:/second
         {engine} commit $id app:1
         {engine} rm $id"
    ))?;
    b.sh(&format!("{engine} tag app:1 base:1; {engine} rmi app:1")).map(drop)
}

fn images(host: &Host, engine: &str) -> Outcome<String> {
    host.sh(&format!(
        "{engine} images --all --no-trunc --format '{{{{.ID}}}} {{{{.Repository}}}}:{{{{.Tag}}}}' | sort"
    ))
}

/// It is told beforehand; nobody's name is taken away, and nothing goes that is not to.
pub fn is_told(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let said = a.ferry(&["check", "web", "b"])?.exits(0)?.to_string();
    ensure!(said.contains("will be copied: 1 of 2 layers"), "{said}");
    let said = a.ferry(&["check", "--image", "never", "web", "b"])?.exits(3)?.to_string();
    ensure!(said.contains("has no image"), "{said}");

    b.sh(&format!("{engine} tag base:1 app:1"))?;
    let before = images(&b, engine)?;
    let said = a.ferry(&["migrate", "web", "b"])?.exits(3)?.to_string();
    ensure!(said.contains("has another image by the name"), "{said}");
    ensure!(images(&b, engine)? == before, "{before} has become {}", images(&b, engine)?);
    b.sh(&format!("{engine} rmi app:1")).map(drop)
}

/// Fails when the image is noted, and when it is there: the other host has what it had. `faulty` is a ferry that
/// fails as `/srv/shared/deed` says.
pub fn is_taken_back(lab: &Lab, engine: &str, faulty: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let before = images(&b, engine)?;
    for deed in ["destination.image:kill", "destination.image-taken:error"] {
        a.sh(&format!("echo {deed} >/srv/shared/deed"))?;
        let said = a.ferry(&["migrate", "--remote-ferry", faulty, "web", "b"])?;
        ensure!(said.code == 1, "{deed}: {said}");
        until("the image is gone again", SHORT, || {
            Ok((images(&b, engine)? == before).then_some(()))
        })
        .map_err(|e| format!("{deed}: {e}"))?;
    }
    Ok(())
}

/// It goes with the container: the same, by its name, and no more of it than is lacking.
pub fn goes(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.ferry(&["migrate", "--report", "/srv/shared/report", "web", "b"])?.exits(0)?;
    let report = fs::read(a.path("/srv/shared/report")?).map_err(|e| e.to_string())?;
    let report: Value = serde_json::from_slice(&report).map_err(|e| e.to_string())?;
    let image = &report["image"];
    ensure!(image["there"] == 1 && image["copied"] == 1, "{image}");
    let bytes = image["bytes"].as_u64().unwrap_or(0);
    ensure!((UPPER..UPPER + 100_000).contains(&bytes), "{image}");

    let id = |host: &Host| host.sh(&format!("{engine} image inspect --format '{{{{.Id}}}}' app:1"));
    ensure!(id(&a)? == id(&b)?, "{} has become {}", id(&a)?, id(&b)?);
    let left = b.sh(&format!("{engine} images; find /var/lib -name 'ferry-*.image'"))?;
    ensure!(left.contains("base") && !left.contains(".image"), "{left}");
    Ok(())
}
