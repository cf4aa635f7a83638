//! The control group: who has made it, and what was set there since.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::problem::Problem;

/// Tells whether systemd has made the control group for the runtime (`--systemd-cgroup`): from
/// `SLICE:PREFIX:NAME` in the configuration it makes a scope, a directory's name is taken as it is.
pub fn by_systemd(cgroup: &Cgroup, bundle: &Bundle) -> bool {
    let (Cgroup::V2(path) | Cgroup::V1(path)) = cgroup;
    let wanted = bundle.config["linux"]["cgroupsPath"].as_str();
    path.extension().is_some_and(|kind| kind == "scope")
        && wanted.is_none_or(|wanted| wanted.split(':').count() == 3)
}

/// On the destination: whether there is a systemd to do the same. sd_booted(3)
pub fn missing_systemd(wanted: bool) -> Option<Problem> {
    (wanted && !Path::new("/run/systemd/system").exists()).then(|| {
        Problem::new(
            "the container's control group is systemd's, and the destination runs without systemd",
            "there is no /run/systemd/system",
        )
        .hint(
            "start the container with a cgroupsPath that is a directory, without --systemd-cgroup",
        )
    })
}

/// Limits that are not what the configuration says: changed by `update`, or by hand.
pub fn changed(init: i32, bundle: &Bundle) -> Option<Problem> {
    let unified = match Cgroup::of_process(init) {
        Ok(Cgroup::V2(path)) => Some(path),
        _ => None,
    };
    let read = |path: &Path| Some(fs::read_to_string(path).ok()?.trim().to_owned());
    let old =
        |controller: &str, name: &str| read(&Cgroup::of_controller(init, controller)?.join(name));
    // Where both versions are, the controllers may be in the old one.
    let read = |name: &str| {
        let new = unified.as_ref().and_then(|path| read(&path.join(name)));
        new.or_else(|| of_version_1(name, old))
    };
    let mut words = compare(&bundle.config["linux"]["resources"], read);
    let systemds = Cgroup::of_process(init).is_ok_and(|cgroup| by_systemd(&cgroup, bundle));
    words.extend(new(&bundle.config["linux"]["resources"], systemds, read));
    (!words.is_empty()).then(|| {
        Problem::new(
            "limits of the container are not carried that were changed since it was started",
            format!("config.json says otherwise of {}", words.join(", ")),
        )
        .hint("`ferry update` over there, or write them into config.json on both hosts")
        .warning()
    })
}

/// Memory that would not find room in the container's own control group over there: KiB that its processes
/// will have.
pub fn too_small(init: i32, bundle: &Bundle, kib: u64) -> Option<Problem> {
    let Ok(Cgroup::V2(path)) = Cgroup::of_process(init) else { return None };
    let stat = fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
    let shared = stat.lines().find_map(|line| line.strip_prefix("shmem ")?.parse().ok());
    let needed = kib.saturating_mul(1024).saturating_add(shared.unwrap_or(0));
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let swap = swaps.lines().count() > 1;
    let most = most_memory(&bundle.config["linux"]["resources"]["memory"], swap)?;
    (needed > most).then(|| {
        Problem::new(
            "the container's memory limit over there is less than it will have",
            format!(
                "config.json allows {} MiB, and {} MiB come along: what its processes share by fork \
                 counts for each of them there, and what `update` has changed since does not count",
                most >> 20,
                needed >> 20
            ),
        )
        .hint("a higher limit in config.json on both hosts; or fewer workers")
    })
}

/// Bytes of memory, and of swap where hosts like this one have some, that a configuration allows, if it sets a
/// limit.
fn most_memory(memory: &Value, swap: bool) -> Option<u64> {
    let bytes = |name: &str| memory[name].as_u64().filter(|bytes| *bytes > 0);
    let limit = bytes("limit")?;
    if !swap {
        return Some(limit);
    }
    // Memory and swap together; where it is not set, there may be any amount of swap.
    bytes("swap").map(|both| both.max(limit))
}

/// Returns what a file of version 2 would say, by those of version 1: `old` reads one of a controller's.
/// Documentation/admin-guide/cgroup-v1
fn of_version_1(name: &str, old: impl Fn(&str, &str) -> Option<String>) -> Option<String> {
    match name {
        "memory.max" => {
            let bytes = old("memory", "memory.limit_in_bytes")?;
            // The most that fits into its counter of pages is no limit.
            let most = bytes.parse::<u64>().ok()? >= i64::MAX as u64 & !0xffff;
            Some(if most { "max".to_owned() } else { bytes })
        }
        "pids.max" => old("pids", name),
        "cpu.max" => {
            let (quota, period) =
                (old("cpu", "cpu.cfs_quota_us")?, old("cpu", "cpu.cfs_period_us")?);
            let quota = if quota.starts_with('-') { "max" } else { &quota };
            Some(format!("{quota} {period}"))
        }
        _ => None,
    }
}

/// Returns which limits differ, of those that the configuration names.
fn compare(resources: &Value, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    // What is not positive is no limit.
    let limit =
        |value: &Value| value.as_i64().map(|v| if v > 0 { v.to_string() } else { "max".into() });
    let pages = |value: &Value| {
        let bytes = value.as_i64()?;
        Some(if bytes > 0 { (bytes & !0xfff).to_string() } else { "max".to_owned() })
    };

    let cpu = &resources["cpu"];
    let quota = limit(&cpu["quota"])
        .map(|quota| format!("{quota} {}", cpu["period"].as_u64().unwrap_or(100_000)));
    let wanted = [
        ("memory.max", pages(&resources["memory"]["limit"])),
        ("pids.max", limit(&resources["pids"]["limit"])),
        ("cpu.max", quota),
    ];

    let differs = |(name, wanted): (&str, Option<String>)| {
        let (wanted, now) = (wanted?, read(name)?);
        let same = match name {
            // The kernel rounds to its own pages.
            "memory.max" => match (wanted.parse::<i64>(), now.parse::<i64>()) {
                (Ok(wanted), Ok(now)) => wanted.abs_diff(now) < 1 << 16,
                _ => wanted == now,
            },
            _ => wanted == now,
        };
        (!same).then(|| format!("{name} ({now}, not {wanted})"))
    };

    wanted.into_iter().filter_map(differs).collect()
}

/// Which limits there are that the configuration does not name. In a scope systemd limits the number of tasks by
/// itself.
fn new(resources: &Value, systemds: bool, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let free = [
        ("memory.max", &resources["memory"]["limit"], "max"),
        ("memory.swap.max", &resources["memory"]["swap"], "max"),
        ("memory.high", &Value::Null, "max"),
        ("memory.low", &resources["memory"]["reservation"], "0"),
        ("pids.max", &resources["pids"]["limit"], "max"),
        ("cpu.max", &resources["cpu"]["quota"], "max"),
        ("cpu.weight", &resources["cpu"]["shares"], "100"),
        ("cpuset.cpus", &resources["cpu"]["cpus"], ""),
    ];
    let is_new = |(name, named, free): (&str, &Value, &str)| {
        // Of cpu.max the second word is a period.
        let now = read(name)?;
        let limited = now.split(' ').next() != Some(free);
        let silent = named.is_null() && resources["unified"][name].is_null();
        (limited && silent && !(systemds && name == "pids.max"))
            .then(|| format!("{name} ({now}, and no limit)"))
    };
    free.into_iter().filter_map(is_new).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn swap_counts_where_there_is_any() {
        let memory = json!({"limit": 100, "swap": 150});
        assert_eq!(
            (most_memory(&memory, false), most_memory(&memory, true)),
            (Some(100), Some(150))
        );
        assert_eq!(most_memory(&json!({"limit": 100}), true), None);
        assert_eq!(most_memory(&json!({"limit": -1, "swap": -1}), false), None);
    }

    #[test]
    fn only_what_was_changed_is_told() {
        let config = json!({
            "memory": {"limit": 67108864}, "pids": {"limit": 40},
            "cpu": {"quota": 50000, "period": 100000}
        });
        let told = |memory: &str, pids: &str, cpu: &str| {
            let read = |name: &str| {
                Some(
                    match name {
                        "memory.max" => memory,
                        "pids.max" => pids,
                        _ => cpu,
                    }
                    .to_owned(),
                )
            };
            compare(&config, read).join(", ")
        };

        assert_eq!(told("67108864", "40", "50000 100000"), "");
        assert_eq!(told("99999744", "40", "50000 100000"), "memory.max (99999744, not 67108864)");
        assert_eq!(told("67108864", "33", "max 100000").matches(" (").count(), 2);
        assert!(compare(&json!({}), |_| Some("7".into())).is_empty(), "see what is new");
        assert!(compare(&json!({"pids": {"limit": -1}}), |_| Some("max".into())).is_empty());
        assert!(compare(&config, |_| None).is_empty());
    }

    #[test]
    fn what_no_configuration_names_is_told() {
        let told = |config: Value, systemds: bool, name: &'static str, now: &str| {
            let read = |asked: &str| (asked == name).then(|| now.to_owned());
            new(&config, systemds, read).join(", ")
        };
        let none = || json!({});
        assert_eq!(
            told(none(), false, "memory.max", "99999744"),
            "memory.max (99999744, and no limit)"
        );
        for (name, free, limit) in [
            ("memory.max", "max", "4096"),
            ("memory.swap.max", "max", "0"),
            ("memory.high", "max", "4096"),
            ("memory.low", "0", "4096"),
            ("pids.max", "max", "33"),
            ("cpu.max", "max 100000", "70000 100000"),
            ("cpu.weight", "100", "59"),
            ("cpuset.cpus", "", "0-1"),
        ] {
            assert_eq!(told(none(), false, name, free), "", "{name}");
            assert!(told(none(), false, name, limit).starts_with(name), "{name}");
            let unified = json!({"unified": {name: limit}});
            assert_eq!(told(unified, false, name, limit), "", "{name}");
        }
        assert_eq!(told(none(), true, "pids.max", "4915"), "", "systemd's own");
        assert_eq!(told(json!({"pids": {"limit": 40}}), false, "pids.max", "33"), "", "compared");
    }

    #[test]
    fn version_1_says_the_same_in_other_files() {
        let config = json!({
            "memory": {"limit": 67108864}, "pids": {"limit": 40},
            "cpu": {"quota": 50000, "period": 100000}
        });
        let told = |memory: &str, pids: &str, quota: &str| {
            let old = |controller: &str, name: &str| {
                let value = match (controller, name) {
                    ("memory", "memory.limit_in_bytes") => memory,
                    ("pids", "pids.max") => pids,
                    ("cpu", "cpu.cfs_quota_us") => quota,
                    ("cpu", "cpu.cfs_period_us") => "100000",
                    _ => return None,
                };
                Some(value.to_owned())
            };
            compare(&config, |name| of_version_1(name, old)).join(", ")
        };
        assert_eq!(told("67108864", "40", "50000"), "");
        assert_eq!(
            told("9223372036854771712", "max", "-1"),
            "memory.max (max, not 67108864), pids.max (max, not 40), cpu.max (max 100000, not 50000 100000)"
        );
    }

    #[test]
    fn a_scope_is_systemds() {
        let is = |path: &str, wanted: Value| {
            let config = json!({"linux": {"cgroupsPath": wanted}});
            by_systemd(&Cgroup::V2(path.into()), &Bundle { path: "/b".into(), config })
        };
        assert!(is("/sys/fs/cgroup/system.slice/ferry-sy.scope", json!("system.slice:ferry:sy")));
        assert!(is("/sys/fs/cgroup/system.slice/runc-sy.scope", Value::Null));
        assert!(!is("/sys/fs/cgroup/my.scope", json!("/my.scope")));
        assert!(!is(
            "/sys/fs/cgroup/system.slice/system.slice:ferry:sy",
            json!("system.slice:ferry:sy")
        ));
        assert_eq!(missing_systemd(false), None);
    }
}
