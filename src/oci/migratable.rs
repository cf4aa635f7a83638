//! Containers that are made so that they can be migrated: what CRIU cannot carry, and programs do
//! without where they are told that there is none, is denied to them from the beginning.
//!
//! That is io_uring, by rules of the container's seccomp filter (ENOSYS, as from a kernel without it),
//! and Multipath TCP, by the sysctl of its network namespace. Both are parts of `config.json`, and only
//! what stands there is known to the runtime, to engines, and to whoever looks at the container later:
//! so the file itself is changed, as other wrappers of runtimes do (nvidia-container-runtime), before the
//! runtime reads it. It is replaced as a whole, keeps its mode and owner, and is left alone where it says
//! all of this already.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use crate::problem::Advise;

/// The annotation in `config.json` that asks for it, `"true"`, or forbids it, `"false"`.
pub const ANNOTATION: &str = "org.ferry.migratable";
/// What to do about a container that uses what a migratable one is denied.
pub const CURE: &str = "new containers are denied it by `migratable = true` in Ferry's configuration, or by \
                        the annotation org.ferry.migratable=true";
/// io_uring(7)
const CALLS: [&str; 3] = ["io_uring_setup", "io_uring_enter", "io_uring_register"];
/// Kernel: Documentation/networking/mptcp-sysctl.rst
const MPTCP: &str = "net.mptcp.enabled";
/// "Function not implemented"
const ENOSYS: i32 = libc::ENOSYS;

/// Makes a configuration one of a migratable container, where its annotation or `by_default` asks for it.
/// What is no configuration is the runtime's to complain of.
///
/// # Errors
/// When the annotation is neither, or the file cannot be changed.
pub fn make(file: &Path, by_default: bool) -> Result<()> {
    let Ok(bytes) = fs::read(file) else { return Ok(()) };
    // Most say nothing of it, and need not be read any further.
    let annotated = bytes.windows(ANNOTATION.len()).any(|part| part == ANNOTATION.as_bytes());
    if !by_default && !annotated {
        return Ok(());
    }

    let Ok(mut config) = serde_json::from_slice::<Value>(&bytes) else { return Ok(()) };
    if !is_wanted(&config, by_default)? {
        return Ok(());
    }

    let mptcp = Path::new("/proc/sys/net/mptcp/enabled").exists() && has_own_network(&config);
    if !restrict(&mut config, mptcp) {
        return Ok(());
    }
    let many_lines = bytes.contains(&b'\n');

    let text =
        if many_lines { serde_json::to_vec_pretty(&config)? } else { serde_json::to_vec(&config)? };
    replace(file, &text).advise(
        format!("cannot make the container migratable: {} cannot be changed", file.display()),
        format!(
            "let it be written to, or do without: `migratable = false` in Ferry's configuration, or the \
             annotation {ANNOTATION}=false"
        ),
    )
}

fn is_wanted(config: &Value, by_default: bool) -> Result<bool> {
    match &config["annotations"][ANNOTATION] {
        Value::Null => Ok(by_default),
        Value::String(word) if word == "true" => Ok(true),
        Value::String(word) if word == "false" => Ok(false),
        _ => bail!("the annotation {ANNOTATION} in config.json must be \"true\" or \"false\""),
    }
}

/// Tells whether two configurations are the same but for what makes a container migratable.
pub fn same(one: &Value, other: &Value) -> bool {
    let restricted = |config: &Value| {
        let mut config = config.clone();
        restrict(&mut config, true);
        config
    };
    one == other || restricted(one) == restricted(other)
}

/// Tells whether the container has a network namespace that the runtime sets parameters of: one that is not the
/// host's. A user namespace may not own it.
fn has_own_network(config: &Value) -> bool {
    let list = config["linux"]["namespaces"].as_array().map(Vec::as_slice).unwrap_or_default();
    let entry = |kind: &str| list.iter().find(|entry| entry["type"] == kind);
    let inode = |path: &str| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let Some(network) = entry("network").filter(|_| entry("user").is_none()) else { return false };
    match network["path"].as_str().filter(|path| !path.is_empty()) {
        None => true,
        Some(path) => inode(path).is_some_and(|there| Some(there) != inode("/proc/self/ns/net")),
    }
}

/// Denies what cannot be carried; whether that changed anything. What the configuration denies already it
/// goes on denying in its own way.
fn restrict(config: &mut Value, mptcp: bool) -> bool {
    let before = config.clone();
    let Some(config) = config.as_object_mut() else { return false };
    let linux = config.entry("linux").or_insert_with(|| json!({}));
    if let Some(linux) = linux.as_object_mut() {
        match linux.get_mut("seccomp") {
            None | Some(Value::Null) => drop(linux.insert("seccomp".into(), new_filter())),
            Some(Value::Object(filter)) => deny_calls(filter),
            Some(_) => {}
        }
        if mptcp {
            switch_off_mptcp(linux);
        }
    }
    before.as_object() != Some(config)
}

/// Allows everything but those calls.
fn new_filter() -> Value {
    let mut filter = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denial(&CALLS)]});
    // Calls of architectures that are not named are answered by death.
    let architectures: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &[],
    };
    if !architectures.is_empty() {
        filter["architectures"] = json!(architectures);
    }
    filter
}

fn denial(calls: &[&str]) -> Value {
    json!({"names": calls, "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
}

/// Merges the denial into a filter that is there. seccomp_rule_add(3)
fn deny_calls(filter: &mut Map<String, Value>) {
    let by_default = filter.get("defaultAction").and_then(Value::as_str).unwrap_or_default();
    let answers = match by_default {
        "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG" => true,
        "SCMP_ACT_ERRNO" => filter.get("defaultErrnoRet") != Some(&json!(ENOSYS)),
        // Death, a signal or a tracer: the filter is stricter than ours.
        _ => false,
    };

    let rules = filter.entry("syscalls").or_insert_with(|| json!([]));
    if rules.is_null() {
        *rules = json!([]);
    }
    let Some(rules) = rules.as_array_mut() else { return };

    let is_ours = |name: &Value| CALLS.iter().any(|call| name == call);
    let (mut denied, mut allowed) = (Vec::<Value>::new(), Vec::<Value>::new());
    rules.retain_mut(|rule| {
        let action = rule["action"].as_str().unwrap_or_default();
        let allows = matches!(action, "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG");

        // One that is about some of their arguments only leaves the others open.
        let some = rule["args"].as_array().is_some_and(|args| !args.is_empty());
        let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) else { return true };
        if !names.iter().any(is_ours) {
            return true;
        }

        let (ours, others) = names.iter().cloned().partition(is_ours);
        if allows || some {
            allowed.extend::<Vec<Value>>(ours);
            *names = others;
            return !names.is_empty();
        }

        denied.extend::<Vec<Value>>(ours);
        true
    });

    let is_open = |call: &&str| {
        let call = json!(call);
        !denied.contains(&call) && (answers || allowed.contains(&call))
    };
    let open: Vec<&str> = CALLS.into_iter().filter(is_open).collect();

    if !open.is_empty() {
        rules.push(denial(&open));
    }
}

/// Unless somebody has set it.
fn switch_off_mptcp(linux: &mut Map<String, Value>) {
    let parameters = linux.entry("sysctl").or_insert_with(|| json!({}));
    if parameters.is_null() {
        *parameters = json!({});
    }
    if let Some(parameters) = parameters.as_object_mut() {
        parameters.entry(MPTCP).or_insert_with(|| json!("0"));
    }
}

/// Puts another text in the place of a file, at once and for good, under the same owner and mode.
fn replace(file: &Path, text: &[u8]) -> Result<()> {
    // Where the name leads, and not the name.
    let file: PathBuf = fs::canonicalize(file)?;
    let old = fs::metadata(&file)?;
    let new = file.with_extension(format!("ferry-{}", std::process::id()));
    let write = || -> Result<()> {
        let mut out: File = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
        out.write_all(text)?;
        fchown(&out, Some(old.uid()), Some(old.gid()))?;
        out.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
        out.sync_all()?;
        Ok(fs::rename(&new, &file)?)
    };
    write().inspect_err(|_| drop(fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restricted(mut config: Value) -> Value {
        assert!(restrict(&mut config, true));
        let again = config.clone();
        assert!(!restrict(&mut config, true), "once is enough: {again}");
        config
    }

    fn rules(config: &Value) -> &Value {
        &config["linux"]["seccomp"]["syscalls"]
    }

    #[test]
    fn without_a_filter_everything_else_is_allowed() {
        for config in [json!({}), json!({"linux": {"seccomp": null, "sysctl": null}})] {
            let config = restricted(config);
            assert_eq!(config["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ALLOW");
            assert_eq!(*rules(&config), json!([denial(&CALLS)]));
            assert_eq!(config["linux"]["sysctl"], json!({"net.mptcp.enabled": "0"}));
        }
        let mut odd = json!([1]);
        assert!(!restrict(&mut odd, true));
    }

    /// As docker's and podman's: a list of what is allowed, an error for the rest.
    #[test]
    fn what_a_list_allows_it_allows_no_more() {
        let list = json!({"linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "syscalls": [
                {"names": ["read", "io_uring_setup", "io_uring_enter"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["io_uring_register"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0}]},
                {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 22, "args": [{"index": 0}]}
            ]
        }}});
        let config = restricted(list);
        assert_eq!(
            *rules(&config),
            json!([
                {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 22, "args": [{"index": 0}]},
                denial(&CALLS)
            ])
        );
    }

    #[test]
    fn what_is_denied_stays_so_in_its_own_way() {
        let filter = |action: &str, default: &str| {
            json!({"linux": {"sysctl": {"net.mptcp.enabled": "1"}, "seccomp": {
                "defaultAction": default,
                "syscalls": [{"names": ["io_uring_setup", "ptrace"], "action": action}]
            }}})
        };
        let config = restricted(filter("SCMP_ACT_KILL_PROCESS", "SCMP_ACT_ALLOW"));
        assert_eq!(rules(&config)[0]["names"], json!(["io_uring_setup", "ptrace"]));
        assert_eq!(rules(&config)[1], denial(&["io_uring_enter", "io_uring_register"]));
        assert_eq!(config["linux"]["sysctl"]["net.mptcp.enabled"], "1", "somebody wants it");
        // Where death is the answer to all others, it stays the answer to what was not allowed.
        let config = restricted(filter("SCMP_ACT_ALLOW", "SCMP_ACT_KILL"));
        let ptrace = json!({"names": ["ptrace"], "action": "SCMP_ACT_ALLOW"});
        assert_eq!(*rules(&config), json!([ptrace, denial(&["io_uring_setup"])]));
        let mut strict = json!({"linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": []
        }}});
        assert!(!restrict(&mut strict, false), "there is nothing to add");
    }

    #[test]
    fn the_network_is_the_containers_own() {
        let with = |list: Value| has_own_network(&json!({"linux": {"namespaces": list}}));
        assert!(with(json!([{"type": "pid"}, {"type": "network"}])));
        assert!(!with(json!([{"type": "pid"}])), "the host's");
        assert!(!with(json!([{"type": "network", "path": "/proc/self/ns/net"}])), "the same");
        assert!(!with(json!([{"type": "network", "path": "/nowhere"}])));
        assert!(!with(json!([{"type": "network"}, {"type": "user"}])));
    }

    #[test]
    fn only_who_asks_for_it_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let changed = |text: &str, by_default: bool| {
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
            make(&file, by_default).map(|()| fs::read_to_string(&file).unwrap() != text)
        };

        let annotated = |word: &str| format!("{{\"annotations\":{{\"{ANNOTATION}\":{word}}}}}");
        assert!(!changed("{}", false).unwrap() && changed("{}", true).unwrap());
        assert!(changed(&annotated("\"true\""), false).unwrap());
        assert!(!changed(&annotated("\"false\""), true).unwrap());
        assert!(changed(&annotated("true"), true).is_err());
        assert!(!changed("{", true).unwrap(), "the runtime says what it thinks of that");
        make(&dir.path().join("none"), true).unwrap();

        // Through a link, and with nothing left beside it.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("config.json", &link).unwrap();
        fs::write(&file, "{\n}\n").unwrap();
        make(&link, true).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::read_to_string(&file).unwrap().contains("\n  \"linux\""));
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_two_hosts_files_may_differ_in_that() {
        let plain = json!({"process": {"args": ["a"]}});
        let mut other = plain.clone();
        assert!(restrict(&mut other, false));
        assert!(same(&plain, &other) && same(&other, &plain) && same(&plain, &plain));
        other["process"]["args"] = json!(["b"]);
        assert!(!same(&plain, &other));
    }
}
