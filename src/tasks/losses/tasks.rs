//! What belongs to the tasks themselves: who traces and who judges them, and where they stand.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{Scene, field, named, who};
use crate::oci::bundle::Bundle;
use crate::problem::Problem;
use crate::sys::{inject, process};

/// Namespaces that CRIU carries only where the whole container has the same.
const WHOLE: [&str; 6] = ["user", "pid", "ipc", "uts", "cgroup", "time"];

/// Everything about tasks.
pub fn problems(scene: Scene<'_>, bundle: Option<&Bundle>) -> Vec<Problem> {
    let mut found = Vec::new();
    let threads = threads(scene.tasks);
    found.extend(traced(&threads));
    found.extend(user_namespace(scene));
    found.extend(nested(scene));
    found.extend(elsewhere(scene));
    if let Some(bundle) = bundle {
        found.extend(sandboxed(&threads, bundle));
        found.extend(supervised(bundle));
    }
    found.extend(memory_policy(&threads));
    found.extend(terminal(scene));
    found
}

/// Of each thread its process, itself, and its status.
type Threads = Vec<(i32, i32, String)>;

fn threads(pids: &[i32]) -> Threads {
    let mut found = Vec::new();
    for &pid in pids {
        // Whoever has ended meanwhile has none.
        for tid in inject::threads(pid).unwrap_or_default() {
            let status = process::proc_text(pid, &format!("task/{tid}/status"));
            found.extend(status.ok().map(|status| (pid, tid, status)));
        }
    }
    found
}

/// Whoever traces a task keeps CRIU out of it.
fn traced(threads: &Threads) -> Option<Problem> {
    let tracer = |status: &str| field(status, "TracerPid")?.parse().ok().filter(|pid| *pid != 0);
    let (pid, tracer) =
        threads.iter().find_map(|(pid, _, status)| Some((*pid, tracer(status)?)))?;
    Some(
        Problem::new(
            "a process of the container is being traced",
            format!("{} is, by {}; CRIU cannot work in it meanwhile", who(pid), who(tracer)),
        )
        .hint("end the debugger, strace or the like first"),
    )
}

fn namespace(pid: i32, kind: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

fn user_namespace(scene: Scene<'_>) -> Option<Problem> {
    let own = namespace(std::process::id() as i32, "user")?;
    let theirs = namespace(scene.init, "user")?;
    (own != theirs).then(|| {
        Problem::new(
            "the container has a user namespace of its own",
            "CRIU cannot restore one from what Ferry makes ready for it",
        )
        .hint("start it without one (linux.namespaces, uidMappings in config.json)")
    })
}

/// Namespaces that something in the container has made for itself.
fn nested(scene: Scene<'_>) -> Option<Problem> {
    let (pid, kind) = WHOLE.into_iter().find_map(|kind| {
        let first = namespace(scene.init, kind)?;
        let other = |pid: &&i32| namespace(**pid, kind).is_some_and(|ns| ns != first);
        scene.tasks.iter().find(other).map(|pid| (*pid, kind))
    })?;
    Some(
        Problem::new(
            format!("there is another {kind} namespace within the container"),
            format!("{} is in it; CRIU carries only one for all", who(pid)),
        )
        .hint("end it first: a nested container, or a sandbox of a program's own"),
    )
}

/// Processes of the container that are not in its first one's control group, nor below it.
fn elsewhere(scene: Scene<'_>) -> Option<Problem> {
    let own: HashSet<i32> = scene.tasks.iter().copied().collect();
    let numbers = fs::read_dir("/proc").ok()?.flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let parents: HashMap<i32, i32> = numbers.filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let left = descendants(scene.init, &parents).into_iter().filter(|pid| !own.contains(pid));

    // It may have been born, or have ended, since the group was listed.
    let first = group(scene.init)?;
    let pid = left
        .filter(|pid| process::lives(*pid))
        .find(|pid| group(*pid).is_some_and(|group| !group.starts_with(&first)))?;
    Some(
        Problem::new(
            "the container's processes are in several control groups side by side",
            format!(
                "{} is in {}, its first process in {}: only that one could be frozen",
                who(pid),
                group(pid).unwrap_or_default().display(),
                first.display()
            ),
        )
        .hint(
            "leave its first process in the topmost group (systemd as first process moves itself \
             to init.scope: run the service itself instead)",
        ),
    )
}

/// proc_pid_stat(5), field 4; the command's name in field 2 may hold blanks and parentheses.
fn parent(pid: i32) -> Option<i32> {
    let stat = process::proc_text(pid, "stat").ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// In the unified hierarchy.
fn group(pid: i32) -> Option<PathBuf> {
    let text = process::proc_text(pid, "cgroup").ok()?;
    text.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from)
}

fn descendants(init: i32, parents: &HashMap<i32, i32>) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    parents.iter().for_each(|(pid, parent)| children.entry(*parent).or_default().push(*pid));
    let (mut found, mut left) = (Vec::new(), vec![init]);
    while let Some(pid) = left.pop() {
        // Taken out, so that a circle of numbers that were used again has an end.
        let mut below = children.remove(&pid).unwrap_or_default();
        left.extend(&below);
        found.append(&mut below);
    }
    found.sort_unstable();
    found
}

/// Programs that have sandboxed themselves, as far as it shows: the kernel tells nobody of Landlock.
fn sandboxed(threads: &Threads, bundle: &Bundle) -> Option<Problem> {
    let given = bundle.config["process"]["noNewPrivileges"].as_bool().unwrap_or(false);
    let kernel = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    // Where it cannot be seen, it may be there.
    let landlock = kernel.is_empty() || kernel.trim().split(',').any(|name| name == "landlock");
    if given || !landlock {
        return None;
    }
    let mut pids: Vec<i32> = threads.iter().filter(|t| by_itself(&t.2)).map(|t| t.0).collect();
    pids.dedup();
    let first = *pids.first()?;
    Some(
        Problem::new(
            "a Landlock sandbox would not come along",
            format!(
                "{} has given up privileges by itself (no_new_privs), as programs do that sandbox \
                 themselves. Whether it has one, the kernel does not tell; CRIU does not carry it",
                who(first)
            ),
        )
        .hint("if it has, start it anew over there instead; a seccomp filter goes along")
        .warning(),
    )
}

/// Without a filter, which would be another reason.
fn by_itself(status: &str) -> bool {
    field(status, "NoNewPrivs") == Some("1") && field(status, "Seccomp") == Some("0")
}

/// Returns where memory is to come from: NUMA nodes, by threads and by mappings. set_mempolicy(2), mbind(2)
fn memory_policy(threads: &Threads) -> Option<Problem> {
    // Looking at all mappings takes as long as looking at all of their pages.
    let nodes = fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
    let several = !["0", ""].contains(&nodes.trim());
    let mut words: Vec<String> = Vec::new();
    for (pid, tid, _) in threads {
        let whole = several && pid == tid;
        let text = head(&format!("/proc/{pid}/task/{tid}/numa_maps"), whole);
        words.extend(policy(&text).map(|policy| format!("{} has {policy}", who(*pid))));
        words.dedup();
    }
    (!words.is_empty()).then(|| {
        Problem::new("where memory comes from (NUMA policy) is not carried", named(&words))
            .hint("over there: cpuset.mems in config.json; or start it anew with numactl")
            .warning()
    })
}

/// The first line of a file of the kernel's, or all of them.
fn head(path: &str, whole: bool) -> String {
    use std::io::Read;
    let limit = if whole { 64 << 20 } else { 512 };
    let mut bytes = Vec::new();
    // Whoever has ended meanwhile has none.
    let _ = fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if whole { text } else { text.lines().next().unwrap_or_default().to_owned() }
}

/// The first policy that is not the usual one, in lines of `numa_maps`: `ADDRESS POLICY …`. numa(7)
fn policy(text: &str) -> Option<&str> {
    let policies = text.lines().filter_map(|line| line.split(' ').nth(1));
    policies.into_iter().find(|policy| !["default", ""].contains(policy))
}

/// Programs whose system calls somebody outside judges, by the configuration. The kernel tells of no
/// listener but by its descriptor. seccomp_unotify(2)
fn supervised(bundle: &Bundle) -> Option<Problem> {
    let filter = &bundle.config["linux"]["seccomp"];
    let asks = |action: &serde_json::Value| action == "SCMP_ACT_NOTIFY";
    let rules = filter["syscalls"].as_array().into_iter().flatten();
    let asked = asks(&filter["defaultAction"]) || rules.into_iter().any(|r| asks(&r["action"]));
    asked.then(|| {
        Problem::new(
            "the container's system calls are supervised from outside (seccomp notification)",
            "its supervisor would hear of none over there, and the calls would fail",
        )
        .hint("linux.seccomp in config.json, without SCMP_ACT_NOTIFY")
    })
}

/// Keys of the session keyring that the runtime has made for the container. keyrings(7)
pub fn session_keys(container: &str) -> Option<Problem> {
    // Those that we may see: ours, as root.
    let text = fs::read_to_string("/proc/keys").unwrap_or_default();
    let count = keys_in(&text, &format!("_ses.{container}"))?;
    Some(
        Problem::new(
            "keys of the container's session keyring do not come along",
            format!("there are {count} in it; over there it is a new one"),
        )
        .hint("have the program add them again over there")
        .warning(),
    )
}

/// Returns how many keys there are in a keyring, if any, by the text of `/proc/keys`.
fn keys_in(text: &str, name: &str) -> Option<u64> {
    let list = text.lines().filter_map(|line| {
        // Serial, flags, uses, expiry, permissions, owner, group, type, description: that of a key is
        // anybody's choice.
        let mut fields = line.split_ascii_whitespace();
        let is_keyring = fields.nth(7)? == "keyring";
        let is_named = fields.next()?.strip_suffix(':') == Some(name);
        let count = fields.next()?.parse().ok()?;
        (is_keyring && is_named).then_some(count)
    });
    list.filter(|count| *count > 0).max()
}

/// The CPUs that a task of the container has by itself: its group's, or all.
pub(crate) fn allowed_cpus(init: i32) -> Option<String> {
    let read = |path: &Path| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let group = group(init)?;
    let inside = Path::new("/sys/fs/cgroup").join(group.strip_prefix("/").ok()?);
    let mut at = inside.as_path();
    loop {
        if let Some(cpus) = read(&at.join("cpuset.cpus.effective")).filter(|cpus| !cpus.is_empty())
        {
            return Some(cpus);
        }
        at = at.parent().filter(|above| above.starts_with("/sys/fs/cgroup"))?;
    }
}

/// Returns who has a controlling terminal. proc_pid_stat(5), field 7
fn terminal(scene: Scene<'_>) -> Option<Problem> {
    let has = |pid: &i32| {
        let stat = process::proc_text(*pid, "stat").ok()?;
        let number: i64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(4)?.parse().ok()?;
        (number != 0).then_some(*pid)
    };
    let pids: Vec<String> = scene.tasks.iter().filter_map(has).map(who).collect();
    (!pids.is_empty()).then(|| {
        Problem::new(
            "a program in a terminal may find no /dev/tty over there",
            format!(
                "{}: CRIU gives the controlling terminal back to the leader of a session alone",
                named(&pids)
            ),
        )
        .hint("programs that ask there for a password, or page, are to be started anew")
        .warning()
    })
}

/// The AppArmor profiles of these processes, which the destination must have. apparmor(7)
pub fn apparmor_profiles(pids: &[i32]) -> Vec<String> {
    let current = |pid: &i32| {
        let own = process::proc_text(*pid, "attr/apparmor/current");
        own.ok().map(|text| profiles(&text)).unwrap_or_default()
    };
    let mut found: Vec<String> = pids.iter().flat_map(current).collect();
    found.sort();
    found.dedup();
    found
}

/// `NAME (MODE)`, or `unconfined`; several that hold together stand as `A//&B`.
fn profiles(text: &str) -> Vec<String> {
    let text = text.trim_end_matches(['\n', '\0']);
    let names = text.rsplit_once(" (").map_or(text, |(names, _)| names);
    let own = |name: &&str| !name.is_empty() && *name != "unconfined" && !name.starts_with(':');
    names.split("//&").filter(own).map(str::to_owned).collect()
}

/// Returns which of the container's profiles this host has not loaded. The kernel lists them one a line, as
/// `NAME (MODE)`.
pub fn missing_profiles(wanted: &[String]) -> Option<Problem> {
    if wanted.is_empty() {
        return None;
    }
    let loaded = fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default();
    let missing = missing(wanted, &loaded);
    (!missing.is_empty()).then(|| {
        Problem::new(
            "the destination lacks the container's AppArmor profile",
            format!("{} is not loaded there", named(&missing)),
        )
        .hint("load it there, too: `apparmor_parser -r FILE`")
    })
}

fn missing(wanted: &[String], loaded: &str) -> Vec<String> {
    let loaded: HashSet<&str> =
        loaded.lines().filter_map(|line| Some(line.rsplit_once(" (")?.0)).collect();
    wanted.iter().filter(|name| !loaded.contains(name.as_str())).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_compared_by_name() {
        assert_eq!(profiles("unconfined\n"), Vec::<String>::new());
        assert_eq!(profiles("docker-default (enforce)\n"), ["docker-default"]);
        assert_eq!(profiles("a (b)//&c (complain)"), ["a (b)", "c"]);
        let wanted = ["a (b)".to_owned(), "c".to_owned()];
        assert_eq!(missing(&wanted, "a (b) (enforce)\nd (complain)\n"), ["c"]);
        assert_eq!(missing_profiles(&[]), None);
        assert!(missing_profiles(&["no-such-profile".to_owned()]).is_some_and(|p| p.fatal));
    }

    #[test]
    fn policies_and_keys_are_read() {
        let usual = "55d0 default file=/x mapped=2 N0=2\n7f00 default anon=1\n";
        assert_eq!(policy(usual), None);
        assert_eq!(policy(&format!("{usual}7f10 bind:0-1 anon=1 bind:2\n")), Some("bind:0-1"));
        assert_eq!(policy(""), None);
        let keys = "\
            1c2d3e4f I--Q---     3 perm 3f030000     0     0 keyring   _ses.box: 2\n\
            1c2d3e50 I--Q---     3 perm 3f030000     0     0 keyring   _ses.bo: empty\n\
            1c2d3e51 I--Q---     1 perm 3f010000     0     0 user      a keyring _ses.b: 3\n";
        assert_eq!(keys_in(keys, "_ses.box"), Some(2));
        assert_eq!((keys_in(keys, "_ses.bo"), keys_in(keys, "_ses.b")), (None, None));
    }

    #[test]
    fn descendants_are_found_whoever_begot_them() {
        let parents = HashMap::from([(10, 1), (11, 10), (12, 11), (20, 1), (30, 31), (31, 30)]);
        assert_eq!(descendants(10, &parents), [11, 12]);
        assert_eq!(descendants(30, &parents).len(), 2, "a circle ends");
    }

    #[test]
    fn who_is_traced_or_sandboxed_is_seen() {
        let own = std::process::id() as i32;
        let status = |text: &str| vec![(own, own, text.to_owned())];
        assert_eq!(traced(&status("TracerPid:\t0\n")), None);
        let found = traced(&status(&format!("TracerPid:\t{own}\n"))).unwrap();
        assert!(found.fatal && found.why.contains(&format!("process {own} ")), "{found}");
        assert!(by_itself("NoNewPrivs:\t1\nSeccomp:\t0\n"));
        assert!(
            !by_itself("NoNewPrivs:\t1\nSeccomp:\t2\n")
                && !by_itself("NoNewPrivs:\t0\nSeccomp:\t0\n")
        );
    }
}
