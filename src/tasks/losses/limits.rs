//! The control group: who has made it, and what was set there since.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::oci::bundle::Bundle;
use crate::oci::cgroup::Cgroup;
use crate::problem::Problem;

/// Whether systemd has made the control group for the runtime (`--systemd-cgroup`): from
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
    let Ok(Cgroup::V2(path)) = Cgroup::of_process(init) else { return None };
    let read = |name: &str| {
        let text = fs::read_to_string(path.join(name)).ok()?;
        Some(text.trim().to_owned())
    };
    let words = compare(&bundle.config["linux"]["resources"], read);
    (!words.is_empty()).then(|| {
        Problem::new(
            "limits of the container are not carried that were changed since it was started",
            format!("config.json says otherwise of {}", words.join(", ")),
        )
        .hint("`ferry update` over there, or write them into config.json on both hosts")
        .warning()
    })
}

/// Which limits differ, of those that the configuration names.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        assert!(compare(&json!({}), |_| Some("7".into())).is_empty(), "nothing is said of it");
        assert!(compare(&json!({"pids": {"limit": -1}}), |_| Some("max".into())).is_empty());
        assert!(compare(&config, |_| None).is_empty());
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
