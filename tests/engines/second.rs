//! No second copy: what has moved away is not made again on the host that it left, under whichever ID.

use std::time::Duration;

use crate::common::lab::{Host, Lab};
use crate::common::{Outcome, ensure};

/// What every trial's container runs.
const COMMAND: &str = "--network none app:1 /counter-server --log-to-stdout --memory 8M";
const NAME: &str = "--name web";
pub const LIMIT: Duration = Duration::from_secs(240);

/// It is refused, as it would be a second copy.
fn refused(host: &Host, line: &str) -> Outcome {
    let said = host.exec(&["sh", "-c", line])?;
    let text = said.to_string();
    ensure!(said.code != 0 && text.contains("was migrated to b"), "{line}: {text}");
    Ok(())
}

fn status(host: &Host, engine: &str, name: &str) -> Outcome<String> {
    let line = format!("{engine} inspect --format '{{{{.State.Status}}}}' {name}");
    Ok(host.sh(&line)?.trim().to_owned())
}

/// `web` goes from `a` to `b` and comes back. `replaces`: how the engine makes another one in its place, as
/// `--replace`, a unit or `docker compose up --force-recreate` has it done.
pub fn is_held_back(lab: &Lab, engine: &str, replaces: &[&str]) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.sh(&format!("{engine} run --detach {NAME} {COMMAND}"))?;
    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    refused(&a, &format!("{engine} start web"))?;
    refused(&a, &format!("{engine} restart web"))?;
    for replace in replaces {
        refused(&a, &replace.replace("COMMAND", COMMAND))?;
    }

    // Another name is nobody's concern; and it runs there.
    a.sh(&format!("{engine} run --detach --name other {COMMAND}"))?;
    ensure!(status(&b, engine, "web")? == "running", "it does not run there");

    // It comes back, and is at home again: also when it is made anew.
    a.sh(&format!("{engine} rm --force web"))?;
    b.ferry(&["migrate", "web", "a"])?.exits(0)?;
    a.sh(&format!("{engine} restart --time 1 web"))?;
    a.sh(&format!("{engine} rm --force web; {engine} run --detach {NAME} {COMMAND}"))?;

    // Whoever says so has a second one.
    b.sh(&format!("{engine} rm --force web"))?;
    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    a.sh(&format!("{engine} rm --force web"))?;
    let again = format!("{engine} run --detach {NAME} {COMMAND}");
    let said = a.exec(&["sh", "-c", &again])?.to_string();
    let hint = said.split('`').find(|part| part.ends_with(" --keep"));
    let hint = hint.ok_or_else(|| format!("nobody says how: {said}"))?.to_owned();
    a.sh(&hint)?;
    a.sh(&format!("{engine} rm --force web >/dev/null 2>&1 || true; {again}"))?;
    ensure!(status(&a, engine, "web")? == "running", "it does not run");

    Ok(())
}
