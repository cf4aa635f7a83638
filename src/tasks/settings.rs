//! What tasks have set for themselves with the kernel, and CRIU does not carry: looked at on the source,
//! and set in the restored tasks before any of them runs.
//!
//! Of each thread: the CPUs that it may run on, its priority for input and output, and its timer slack. They
//! are seen, and set, from outside. Of each process: that it denies itself memory that can be written and
//! executed (MDWE), and that all memory it gets is locked (`MCL_FUTURE`). Of those the kernel tells nobody
//! but the process, which is made to ask while it runs, just before the freeze.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::freezer::{native, of_first_space};
use super::losses::field;
use super::losses::memory::first_is_locked;
use super::losses::tasks::allowed_cpus;
use crate::memory::pages::Task;
use crate::problem::Problem;
use crate::sys::process::{self, proc_text};
use crate::sys::stopped::{Stopped, instruction};
use crate::sys::{arch, fd_inject, inject, protection, sched};

/// Most of one container, threads and processes.
pub const MOST: usize = 20_000;
/// Most of them that are seen from outside: a process may be asked for two more.
const MOST_SEEN: usize = MOST / 2;
/// Most different lists of CPUs that threads are bound to.
pub const MOST_LISTS: usize = 1000;
/// Most bytes of all lists of CPUs, each thread's counted: they go into one message.
const MOST_OF_LISTS: usize = 512 << 10;
const LACKS_CPUS: &str = "the destination lacks CPUs that threads are bound to";
const CPUS_HINT: &str = "over there: taskset, or cpuset in the container's config.json";
/// What every thread has that nobody has changed. proc_pid_timerslack_ns(5)
const TIMER_SLACK: u64 = 50_000;
const PAGE: u64 = crate::sys::memory::PAGE as u64;

/// What a thread or its process has set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The process, as the container numbers it.
    pub vpid: i32,
    /// The thread, as the container numbers it.
    pub vtid: i32,
    /// What it is.
    pub value: SettingValue,
}

/// See [`Setting`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SettingValue {
    /// The only CPUs that the thread may run on, as the kernel lists them: `0-3,7`.
    Cpus(String),
    /// Its I/O priority.
    Io(i32),
    /// Its timer slack, in nanoseconds.
    Slack(u64),
    /// The process's flags of `PR_SET_MDWE`.
    Mdwe(u64),
    /// The process's flags of mlockall(2).
    Lock(u64),
}

/// Looks at what can be seen from outside, running or frozen.
///
/// # Errors
/// When it is more than can go along.
pub fn look(init: i32, pids: &[i32]) -> Result<Vec<Setting>> {
    let (mut found, mut count) = (Vec::new(), Count::default());
    // What all have who change nothing.
    let allowed = allowed_cpus(init).unwrap_or_else(sched::online_cpus);
    let allowed = sched::parse_cpus(&allowed);
    for task in of_first_space(pids)? {
        // Whoever has ended meanwhile has set nothing.
        for tid in inject::threads(task.pid).unwrap_or_default() {
            let values = of_thread(tid, allowed.as_deref());
            if values.is_empty() {
                continue;
            }
            let Some(vtid) = inside(task.pid, tid) else { continue };
            let values = values.into_iter().map(|value| Setting { vpid: task.vpid, vtid, value });
            count.add(values, &mut found, MOST_SEEN)?;
        }
    }
    Ok(found)
}

/// Counts them as they come.
#[derive(Debug, Default)]
struct Count {
    lists: HashSet<String>,
    bytes: usize,
}

impl Count {
    fn add(
        &mut self,
        some: impl Iterator<Item = Setting>,
        to: &mut Vec<Setting>,
        most: usize,
    ) -> Result<(), Problem> {
        for setting in some {
            if let SettingValue::Cpus(list) = &setting.value {
                self.bytes += list.len();
                if !self.lists.contains(list) {
                    self.lists.insert(list.clone());
                }
            }

            if self.lists.len() > MOST_LISTS || self.bytes > MOST_OF_LISTS {
                let what = "the container's threads are bound to too many different CPUs";
                let why = format!(
                    "more than {MOST_LISTS} lists of CPUs, or {} KiB of them",
                    MOST_OF_LISTS >> 10
                );
                return Err(Problem::new(what, why).hint(CPUS_HINT));
            }

            if to.len() >= most {
                let what = format!("the container's threads have set more than {most} things");
                let why = "CPUs, I/O priorities, timer slacks, memory: each is set in the freeze";
                return Err(Problem::new(what, why).hint("have fewer threads set their own"));
            }
            to.push(setting);
        }

        Ok(())
    }
}

/// Refuses what no honest source sends.
///
/// # Errors
/// Says what is wrong.
pub fn validate(settings: &[Setting]) -> Result<()> {
    if settings.len() > MOST {
        bail!("{} settings, more than {MOST}", settings.len());
    }
    let lists = settings.iter().filter_map(|setting| match &setting.value {
        SettingValue::Cpus(list) => Some(list.len()),
        _ => None,
    });
    if lists.sum::<usize>() > MOST_OF_LISTS {
        bail!("lists of CPUs of more than {} KiB", MOST_OF_LISTS >> 10);
    }
    Ok(())
}

fn of_thread(tid: i32, allowed: Option<&[u8]>) -> Vec<SettingValue> {
    let mut values = Vec::new();
    let cpus = sched::cpus(tid).ok().filter(|cpus| allowed.is_some_and(|all| all != cpus));
    values.extend(cpus.map(|cpus| SettingValue::Cpus(sched::cpu_list(&cpus))));
    // Without a class it is derived from the niceness, which is carried.
    let io = sched::io_priority(tid).ok().filter(|priority| priority >> 13 != 0);
    values.extend(io.map(SettingValue::Io));
    let slack = sched::timer_slack(tid).ok().filter(|slack| ![0, TIMER_SLACK].contains(slack));
    values.extend(slack.map(SettingValue::Slack));
    values
}

/// A thread's number in the container.
fn inside(pid: i32, tid: i32) -> Option<i32> {
    let status = proc_text(pid, &format!("task/{tid}/status")).ok()?;
    field(&status, "NSpid")?.split_ascii_whitespace().last()?.parse().ok()
}

/// Has each process ask the kernel for what only it is told: one of its threads is stopped for a moment.
/// None must be frozen.
///
/// # Errors
/// When a process cannot be asked: what it denies itself would be lost.
pub fn ask(pids: &[i32]) -> Result<Vec<Setting>> {
    // On a thread that ends: see `Stopped::within`.
    let pids = pids.to_vec();
    std::thread::spawn(move || {
        let known = protection::known();
        let (mut found, mut count) = (Vec::new(), Count::default());
        for task in of_first_space(&pids)? {
            let locks = locks_all(task.pid);
            if !known && !locks || !native(task.pid) {
                continue;
            }
            let values = match ask_one(task, known, locks) {
                Err(_) if !process::lives(task.pid) => continue,
                values => values.with_context(|| {
                    format!("process {} cannot be asked what memory it denies itself", task.vpid)
                })?,
            };

            let (vpid, vtid) = (task.vpid, task.vpid);
            let values = values.into_iter().map(|value| Setting { vpid, vtid, value });
            count.add(values, &mut found, MOST - MOST_SEEN)?;
        }
        Ok(found)
    })
    .join()
    .unwrap_or_else(|_| bail!("the thread has died"))
}

fn ask_one(task: Task, mdwe: bool, locks: bool) -> io::Result<Vec<SettingValue>> {
    let at = instruction(task.pid)?;
    let mut thread = fd_inject::first_thread(task.pid)?;
    let mut values = Vec::new();
    if mdwe {
        let flags = thread.call(at, libc::SYS_prctl, protection::ASK)? as u64;
        values.extend((flags != 0).then_some(SettingValue::Mdwe(flags)));
    }
    if locks && gets_locked(task.pid, &mut thread, at)? {
        let later = if first_is_locked(task.pid, "lf") { libc::MCL_ONFAULT } else { 0 };
        values.push(SettingValue::Lock((libc::MCL_FUTURE | later) as u64));
    }
    Ok(values)
}

/// Tells whether what the process maps is locked: a page, for a moment, shows it.
fn gets_locked(pid: i32, thread: &mut Stopped, at: u64) -> io::Result<bool> {
    let locked = || {
        let status = proc_text(pid, "status")?;
        Ok::<_, io::Error>(field(&status, "VmLck").map(str::to_owned))
    };
    let before = locked()?;
    let kind = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let access = libc::PROT_NONE as u64;
    let page = match thread.call(at, libc::SYS_mmap, [0, PAGE, access, kind, u64::MAX, 0]) {
        // No more may be locked.
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(true),
        other => other? as u64,
    };
    let after = locked();
    thread.call(at, libc::SYS_munmap, [page, PAGE])?;
    Ok(after? != before)
}

/// Tells whether a process has locked all that it has, which is where `MCL_FUTURE` is to be looked for.
fn locks_all(pid: i32) -> bool {
    let status = proc_text(pid, "status").unwrap_or_default();
    let kib = |name| field(&status, name).and_then(|text| text.split(' ').next()?.parse().ok());
    kib("VmLck").is_some_and(|kib: u64| kib > 0) && first_is_locked(pid, "lo")
}

/// Has the restored tasks, which CRIU holds and none of which has run, set what they had set. What this host
/// cannot, to be told.
///
/// # Errors
/// When a process cannot be made to deny itself what it did.
pub fn set(pids: &[i32], settings: &[Setting]) -> Result<Vec<Problem>> {
    if settings.is_empty() {
        return Ok(Vec::new());
    }
    let mut threads = HashMap::new();
    for task in of_first_space(pids)? {
        for tid in inject::threads(task.pid)? {
            let vtid = inside(task.pid, tid).with_context(|| format!("thread {tid} is gone"))?;
            threads.insert((task.vpid, vtid), (task, tid));
        }
    }

    let mut changed = Vec::new();
    for Setting { vpid, vtid, value } in settings {
        // Whoever has ended, or was put into the container from outside, did not come along.
        let Some(&(task, tid)) = threads.get(&(*vpid, *vtid)) else { continue };
        let whose = || who(task, *vtid);
        match value {
            SettingValue::Cpus(cpus) => changed.extend(pin(tid, cpus, whose)),
            SettingValue::Io(priority) => {
                if let Err(e) = sched::set_io_priority(tid, *priority) {
                    changed.push(lost("an I/O priority is not what it was", whose(), &e));
                }
            }
            SettingValue::Slack(slack) => {
                if let Err(e) = sched::set_timer_slack(tid, *slack) {
                    changed.push(lost("a timer slack is not what it was", whose(), &e));
                }
            }
            SettingValue::Mdwe(flags) => call(task, protection::deny(*flags), libc::SYS_prctl)
                .with_context(|| format!("{} cannot deny itself memory (MDWE)", whose()))?,
            SettingValue::Lock(flags) => {
                if let Err(e) = call(task, [*flags], libc::SYS_mlockall) {
                    let what = "memory that the container gets later is not locked any more";
                    changed.push(lost(what, whose(), &e));
                }
            }
        }
    }

    Ok(changed)
}

fn who(task: Task, vtid: i32) -> String {
    let name = proc_text(task.pid, "comm").unwrap_or_default();
    let name = name.trim_end_matches('\n').escape_debug().to_string();
    if vtid == task.vpid {
        format!("process {vtid} ({name})")
    } else {
        format!("thread {vtid} of process {} ({name})", task.vpid)
    }
}

fn lost(what: &str, whose: String, e: &io::Error) -> Problem {
    Problem::new(what, format!("{whose}: {e}")).warning()
}

fn pin(tid: i32, wanted: &str, whose: impl Fn() -> String) -> Option<Problem> {
    let set = sched::parse_cpus(wanted).ok_or_else(|| io::ErrorKind::InvalidInput.into());
    let set = set.and_then(|cpus| sched::set_cpus(tid, &cpus)).and_then(|()| sched::cpus(tid));
    let why = match set.map(|has| sched::cpu_list(&has)) {
        Ok(has) if has == wanted => return None,
        Ok(has) => format!("{} may run on {has}, not on {wanted}", whose()),
        Err(e) => format!("{} cannot be kept to {wanted}: {e}", whose()),
    };
    Some(Problem::new(LACKS_CPUS, why).hint(CPUS_HINT).warning())
}

fn call<const N: usize>(task: Task, arguments: [u64; N], number: i64) -> io::Result<()> {
    let at = instruction(task.pid)?;
    fd_inject::first_thread(task.pid)?.call(at, number, arguments).map(drop)
}

/// Returns which CPUs threads are bound to: each list once.
pub fn bound_cpus(settings: &[Setting]) -> Vec<String> {
    let lists = settings.iter().filter_map(|setting| match &setting.value {
        SettingValue::Cpus(list) => Some(list.as_str()),
        _ => None,
    });
    let lists: BTreeSet<&str> = lists.collect();
    lists.into_iter().map(str::to_owned).collect()
}

/// Returns what this host, whose CPUs are `online`, lacks of those.
pub fn lacking(bound: &[String], online: &str) -> Option<Problem> {
    let online = sched::parse_cpus(online)?;
    let lacks = |list: &&String| {
        let here = |i: usize| online.get(i).copied().unwrap_or(0);
        let cpus = sched::parse_cpus(list);
        cpus.is_none_or(|cpus| cpus.iter().enumerate().any(|(i, byte)| byte & !here(i) != 0))
    };
    let first = bound.iter().find(lacks)?;
    let why = format!("some are bound to {}, which are not all here", first.escape_debug());
    Some(Problem::new(LACKS_CPUS, why).hint(CPUS_HINT).warning())
}

/// Returns what processes deny themselves, where they cannot be asked: they are of another kind than we.
pub fn problem(pids: &[i32]) -> Option<Problem> {
    if !protection::known() {
        return None;
    }
    let pid = pids.iter().find(|pid| !arch::SUPPORTED || !native(**pid))?;
    let name = proc_text(*pid, "comm").unwrap_or_default();
    let name = name.trim_end_matches('\n').escape_debug().to_string();
    let why = format!("process {pid} ({name}) cannot be asked whether it has, nor made to do it");
    let what = "memory that a process denies itself (PR_SET_MDWE), or locks, it would not any more";
    Some(Problem::new(what, why).warning())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn lists_are_told_once() {
        let setting =
            |list: &str| Setting { vpid: 1, vtid: 1, value: SettingValue::Cpus(list.into()) };
        assert_eq!(bound_cpus(&[setting("1"), setting("0"), setting("1")]), ["0", "1"]);
        assert_eq!(lacking(&["0-1".into(), "1".into()], "0-3\n"), None);
        assert!(lacking(&["0-1".into()], "0").is_some() && lacking(&["x".into()], "0").is_some());
    }

    /// A shell that waits.
    fn idle() -> (Child, i32) {
        let mut command = Command::new("sh");
        command.args(["-c", "echo; read line"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = child.id() as i32;
        (child, pid)
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_one_has_set_another_gets() {
        let (one, first) = idle();
        let (other, second) = idle();
        let all = sched::cpus(first).unwrap();
        let byte = all.iter().rposition(|byte| *byte != 0).unwrap();
        let mut cpus = vec![0; byte + 1];
        cpus[byte] = 1 << all[byte].ilog2();
        sched::set_cpus(first, &cpus).unwrap();
        sched::set_io_priority(first, 3 << 13).unwrap();
        sched::set_timer_slack(first, 77_000).unwrap();

        let list = sched::cpu_list(&cpus);
        let wanted = [
            SettingValue::Cpus(list.clone()),
            SettingValue::Io(3 << 13),
            SettingValue::Slack(77_000),
        ];

        let other_than_all = if cpus == all { &wanted[1..] } else { &wanted };
        assert_eq!(of_thread(first, Some(&all)), other_than_all);
        let vpid = inside(second, second).unwrap();
        let setting = |value: &SettingValue| Setting { vpid, vtid: vpid, value: value.clone() };
        assert_eq!(set(&[second], &wanted.each_ref().map(setting)).unwrap(), []);
        assert_eq!(of_thread(second, Some(&[])), wanted);

        // No machine has that many.
        let told = set(&[second], &[setting(&SettingValue::Cpus("8000".into()))]).unwrap();
        assert!(told.len() == 1 && !told[0].fatal, "{told:?}");
        let told = set(&[second], &[setting(&SettingValue::Cpus("x".into()))]).unwrap();
        assert!(told.len() == 1 && !told[0].fatal, "{told:?}");
        let settings = wanted.each_ref().map(setting);
        assert_eq!(bound_cpus(&settings), std::slice::from_ref(&list));

        let online = sched::cpu_list(&all);
        assert_eq!(lacking(std::slice::from_ref(&list), &online), None);
        let lacks = lacking(&[list, "8000".into()], &online).unwrap();
        assert!(!lacks.fatal && lacks.why.contains("8000"), "{lacks}");
        let nobody = Setting { vtid: vpid + 1, ..setting(&wanted[2]) };
        assert_eq!(set(&[second], &[nobody]).unwrap(), []);
        end(one);
        end(other);
    }

    #[test]
    fn what_a_process_denies_itself_another_does() {
        if !protection::known() {
            eprintln!("skipped: this needs Linux 6.3");
            return;
        }
        let (one, first) = idle();
        let own = Task { pid: first, vpid: first };
        call(own, protection::deny(1), libc::SYS_prctl).unwrap();

        let (other, second) = idle();
        let vpid = inside(second, second).unwrap();
        let values = |pid| -> Vec<SettingValue> {
            ask(&[pid]).unwrap().into_iter().map(|setting| setting.value).collect()
        };

        assert_eq!(values(first), [SettingValue::Mdwe(1)]);
        assert_eq!(values(second), []);
        let settings = [SettingValue::Mdwe(1), SettingValue::Lock(libc::MCL_FUTURE as u64)];
        let settings = settings.map(|value| Setting { vpid, vtid: vpid, value });
        assert_eq!(set(&[second], &settings).unwrap(), []);

        // What it has is not locked, so that nobody looks.
        assert_eq!(values(second), [SettingValue::Mdwe(1)]);
        let task = Task { pid: second, vpid };
        let asked = ask_one(task, true, true).unwrap();
        assert_eq!(asked, [SettingValue::Mdwe(1), SettingValue::Lock(libc::MCL_FUTURE as u64)]);
        end(one);
        end(other);
    }
}
