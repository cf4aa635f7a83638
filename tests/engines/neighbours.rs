//! Containers of one user-made network: one moves, the others stay, and what they say to each other goes on.

use crate::common::lab::{Host, Lab, SHORT};
use crate::common::probe::Probe;
use crate::common::process::until;
use crate::common::{Outcome, ensure};
use crate::published;

/// Connections from one that stays to the one that moves, and the other way round.
const CONNECTIONS: usize = 4;
/// The address of `web`, which moves, and of `app`, which stays.
const WEB: &str = "10.89.7.20";
const APP: &str = "10.89.7.30";

fn pid(host: &Host, engine: &str, name: &str) -> Outcome<String> {
    let said = host.sh(&format!("{engine} inspect --format '{{{{.State.Pid}}}}' {name}"))?;
    Ok(said.trim().to_owned())
}

fn check(host: &Host, arguments: &[&str], code: i32, words: &str) -> Outcome {
    let said = host.ferry(&[&["check"], arguments].concat())?;
    ensure!(said.code == code && said.to_string().contains(words), "wanted {words:?}: {said}");
    Ok(())
}

/// `web` runs on `a` in `appnet` with its address.
pub fn reach_each_other(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let run = |host: &Host, what: &str| host.sh(&format!("{engine} run --detach {what}")).map(drop);
    let serve = "app:1 /counter-server";
    run(&a, &format!("--name app --network appnet --ip {APP} {serve}"))?;
    let app = pid(&a, engine, "app")?;
    let mut held = Probe::within(&a, &app, &format!("{WEB}:7000"), CONNECTIONS)?;

    check(&a, &["--forward", "never", "web", "b"], 3, "container app, which stays here")?;
    run(&b, &format!("--name other --network appnet --ip {APP} {serve}"))?;
    check(&a, &["web", "b"], 3, "other on b has the address of app")?;
    b.sh(&format!("{engine} rm --force other"))?;
    check(&a, &["web", "b"], 0, "app stays here")?;
    a.ferry(&["migrate", "web", "b"])?.exits(0)?;
    held.is_content()?;

    // Who has forgotten where it is asks, and finds it; and so does what has moved.
    let inside = |pid: &str| format!("nsenter --net=/proc/{pid}/ns/net");
    a.sh(&format!("{} ip neigh flush all", inside(&app)))?;
    let mut fresh = Probe::within(&a, &app, &format!("{WEB}:7000"), CONNECTIONS)?;
    let web = pid(&b, engine, "web")?;
    let mut back = Probe::within(&b, &web, &format!("{APP}:7000"), 1)?;
    for probe in [&mut held, &mut fresh, &mut back] {
        probe.is_content()?;
    }

    drop((held, fresh, back));

    a.ferry(&["resolve", "--no-forward", "web"])?.exits(0)?;
    [&a, &b].into_iter().try_for_each(published::gone)?;
    let told = b.sh(&format!("{} ip neigh show nud permanent", inside(&web)))?;
    ensure!(!told.contains(APP), "it has still: {told}");

    Ok(())
}

/// What a container that moves has begun itself goes on: `app` is there.
pub fn goes_on_asking(lab: &Lab, engine: &str) -> Outcome {
    let (a, b) = (lab.host("a"), lab.host("b"));
    let asks = format!("/ferry-probe --to {APP}:7000 --connections {CONNECTIONS} --for 1h");
    a.sh(&format!("{engine} run --detach --name asks --network appnet app:1 {asks}"))?;
    let app = pid(&a, engine, "app")?;
    let list = |what: &str| {
        let ss = format!("ss -Htn{what} state established sport = :7000");
        a.sh(&format!("nsenter --net=/proc/{app}/ns/net {ss}"))
    };
    let open = || -> Outcome<Vec<String>> {
        let peer = |line: &str| line.split_whitespace().nth(3).map(str::to_owned);
        let mut peers: Vec<String> = list("")?.lines().filter_map(peer).collect();
        peers.sort();
        Ok(peers)
    };

    let asked = || -> Outcome<u64> {
        let count = |word: &str| word.strip_prefix("bytes_received:")?.parse::<u64>().ok();
        Ok(list("i")?.split_whitespace().filter_map(count).sum())
    };
    until("it has connected", SHORT, || Ok((open()?.len() == CONNECTIONS).then_some(())))?;
    let before = open()?;
    a.ferry(&["migrate", "asks", "b"])?.exits(0)?;

    let after = open()?;
    ensure!(before == after, "{before:?} have become {after:?}");
    let so_far = asked()?;
    until("it goes on asking", SHORT, || Ok((asked()? > so_far).then_some(())))?;

    // It ends well only if no connection was lost, and no answer wrong.
    b.sh(&format!("{engine} stop --time 10 asks"))?;
    let code = b.sh(&format!("{engine} inspect --format '{{{{.State.ExitCode}}}}' asks"))?;
    ensure!(code.trim() == "0", "{code}: {}", b.sh(&format!("{engine} logs asks 2>&1"))?);

    Ok(())
}
