//! To and fro, again and again, with memory and files that change: nothing grows on either host.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde::Deserialize;

use super::kinds::PATIENT;
use crate::common::container::Container;
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, Lab};
use crate::common::probe::Probe;
use crate::common::process::until;
use crate::common::suite::{full, in_lab};
use crate::common::{Outcome, ensure};

/// After so many everything is there that stays.
const FIRST: u32 = 10;
/// How many journals of what is over a host keeps.
const KEPT: u64 = 1000;
/// By how much the memory of all that stays on both hosts may differ between two looks, in KiB: what
/// allocators keep, and pages of programs' files that happen to be mapped.
const MEMORY: u64 = 4096;

/// Counted over all processes.
const OF_PROCESSES: [&str; 7] =
    ["processes", "threads", "descriptors", "rss_kib", "mappings", "namespaces", "mounts"];

/// The suite.
pub fn trials() -> Vec<Trial> {
    let asked = std::env::var("FERRY_SOAK").ok().and_then(|n| n.parse().ok());
    let times = asked.unwrap_or(if full() { 1000 } else { 30 });
    let limit = Duration::from_secs(120 + 60 * u64::from(times));
    vec![in_lab(format!("matrix::soak::{times}_times"), limit, move |lab| soak(lab, times))]
}

/// What is on a host.
#[derive(Debug, Deserialize)]
struct Count {
    numbers: BTreeMap<String, u64>,
    /// Journals that are kept.
    over: u64,
}

fn count(host: &Host) -> Outcome<Count> {
    let text = host.exec(&["python3", "-c", include_str!("soak.py")])?.ok()?;
    serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
}

impl Count {
    /// What is not as it was. Of processes and what is theirs, what is more: who was there for a moment when
    /// it was counted first may have gone.
    fn changed_since(&self, before: &Count) -> Vec<String> {
        let changed = self.numbers.iter().filter_map(|(what, number)| {
            let was = before.numbers.get(what).copied().unwrap_or(0);
            let room = if what == "rss_kib" { MEMORY } else { 0 };
            let less = *number < was && !OF_PROCESSES.contains(&what.as_str());
            let other = less || *number > was + room;
            other.then(|| format!("{what}: {was} before, {number} now"))
        });
        changed.collect()
    }
}

/// What stays: two looks that agree, one after the other. Who has just been asked, or has just told the
/// end, is still there for a moment.
fn settled(host: &Host) -> Outcome<Count> {
    let mut last = count(host)?;
    until("nothing comes or goes", Duration::from_secs(20), || {
        let now = count(host)?;
        let same = now.changed_since(&last).is_empty() && last.changed_since(&now).is_empty();
        let before = std::mem::replace(&mut last, now);
        Ok(same.then_some(before))
    })
}

fn soak(lab: &Lab, times: u32) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::networked("connections")
        .with(&["--arg", "--dirty", "--arg", "500"])
        .with(&["--arg", "--files", "--arg", "/data", "--arg", "--files-size", "--arg", "1M"])
        .at("/srv/local/box");
    container.start(lab, &a)?;

    let mut probe = Probe::every(lab, &container, 3, "10ms")?;
    let (mut here, mut there) = (&a, &b);
    let mut first = None;
    let began = Instant::now();
    for i in 1..=times {
        let said = here.start(&["ferry", "migrate", "box", there.name])?.end(PATIENT)?;
        ensure!(said.code == 0, "migration {i}: {said}");
        (here, there) = (there, here);
        if i == FIRST || i == times || i % 100 == 0 {
            let step = |e: String| format!("after {i}: {e}");
            exactly_one_copy(&container, here, there).map_err(step)?;
            probe.is_content().map_err(step)?;
            if i == FIRST {
                first = Some([settled(&a)?, settled(&b)?]);
            }

            if i % 100 == 0 {
                eprintln!(
                    "{i} migrations in {:?}: {:?} {:?}",
                    began.elapsed(),
                    count(&a)?,
                    count(&b)?
                );
            }
        }
    }

    // On the same host as then.
    if (times - FIRST) % 2 == 1 {
        here.ferry(&["migrate", "box", there.name])?.exits(0)?;
        exactly_one_copy(&container, there, here)?;
    }

    let first = first.ok_or("too few")?;
    for (host, before) in [&a, &b].into_iter().zip(&first) {
        let mut now = count(host)?;
        let gone = until("what is over is gone", Duration::from_secs(20), || {
            now = count(host)?;
            Ok(now.changed_since(before).is_empty().then_some(()))
        });
        gone.map_err(|e| {
            let more = now.changed_since(before).join("; ");
            format!("{e}: {}, after {times} migrations instead of {FIRST}: {more}", host.name)
        })?;
        ensure!(now.over <= KEPT, "{} journals are kept on {}", now.over, host.name);
    }

    Ok(())
}
