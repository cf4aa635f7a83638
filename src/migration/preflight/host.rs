//! What this host is: kernel, CPU, CRIU, identity. Both sides ask themselves, the destination
//! compares.

use std::fs;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::criu::hidden;
use crate::problem::Problem;
use crate::sys::memory::{self, PAGE};
use crate::{connections, network, oci};

/// The oldest CRIU that works: its lazy dump and its page maps are what this Ferry was built on.
pub const CRIU_OLDEST: u32 = 40_200;
/// The oldest kernel with what the lazy restore needs.
pub const KERNEL_OLDEST: (u32, u32) = (5, 11);

/// The fewest descriptors that do: each of CRIU's messages about a task's files brings up to 251 of them,
/// and Ferry has some hundred of its own.
const FEWEST_DESCRIPTORS: RawFd = 1024;

/// The kernel's release.
pub fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// `uname -m`.
pub fn machine() -> String {
    std::env::consts::ARCH.to_owned()
}

/// Returns what the CPU can do: the flags of proc_cpuinfo(5).
pub fn cpu_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|l| {
            let (name, value) = l.split_once(':')?;
            matches!(name.trim(), "flags" | "Features")
                .then(|| value.split_whitespace().map(str::to_owned).collect())
        })
        .unwrap_or_default()
}

/// Flags that say how the kernel or hypervisor deals with the CPU, not what a program may use.
const NOT_FOR_PROGRAMS: &[&str] = &[
    "constant_tsc",
    "nonstop_tsc",
    "tsc_reliable",
    "tsc_known_freq",
    "arch_perfmon",
    "rep_good",
    "nopl",
    "xtopology",
    "cpuid",
    "cpuid_fault",
    "aperfmperf",
    "hypervisor",
    "pti",
    "ssbd",
    "ibrs",
    "ibpb",
    "stibp",
    "ibrs_enhanced",
    "tpr_shadow",
    "vnmi",
    "flexpriority",
    "ept",
    "vpid",
    "ept_ad",
    "tsc_adjust",
    "arch_capabilities",
    "md_clear",
    "flush_l1d",
    "invpcid_single",
    "ida",
    "arat",
    "pln",
    "pts",
    "hwp",
    "dtherm",
    "epb",
    "pebs",
    "bts",
    "acpi",
    "ht",
    "tm",
    "pbe",
    "vmx",
    "svm",
    "npt",
    "lbrv",
    "svm_lock",
    "nrip_save",
    "tsc_scale",
    "vmcb_clean",
    "pausefilter",
    "pfthreshold",
    "v_vmsave_vmload",
    "vgif",
    "spec_ctrl",
    "intel_stibp",
    "amd_ibrs",
    "retpoline",
    "rsb_ctxsw",
    "x2apic",
    "apic",
    "mtrr",
    "mce",
    "mca",
    "tsc_deadline_timer",
    "user_shstk",
    "bhi_ctrl",
    "arch_lbr",
    "perfctr_core",
    "perfctr_nb",
    "topoext",
    "monitor",
    "cat_l3",
    "cdp_l3",
    "mba",
    "rdt_a",
    "cqm",
    "cqm_llc",
    "cqm_occup_llc",
    "cqm_mbm_total",
    "cqm_mbm_local",
];

/// Returns what the source's CPU has and this one lacks.
pub fn missing_cpu_flags(source: &[String]) -> Vec<String> {
    let here = cpu_flags();
    source
        .iter()
        .filter(|f| !here.contains(f) && !NOT_FOR_PROGRAMS.contains(&f.as_str()))
        .cloned()
        .collect()
}

/// The real criu: its path and its version as 40201 for 4.2.1.
///
/// # Errors
/// Says what to install.
pub fn criu() -> Result<(PathBuf, u32), Problem> {
    let path = oci::find_program("criu").ok_or_else(|| {
        Problem::new("CRIU is not installed", "no `criu` in PATH")
            .hint("install CRIU 4.2 or newer (Debian: apt install criu)")
    })?;
    let output = Command::new(&path).arg("--version").stdin(Stdio::null()).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let version = text
        .lines()
        .find_map(|l| l.strip_prefix("Version:"))
        .map(|v| {
            let mut parts = v.trim().split(['.', '-']).map(|p| p.parse::<u32>().unwrap_or(0));
            let mut next = || parts.next().unwrap_or(0).min(99);
            next() * 10_000 + next() * 100 + next()
        })
        .unwrap_or(0);
    if version < CRIU_OLDEST {
        return Err(Problem::new(
            "CRIU is too old",
            format!("{} is version {}", path.display(), text.lines().next().unwrap_or("unknown")),
        )
        .hint("install CRIU 4.2 or newer: older ones fail on Linux 6.13 and later"));
    }

    tracing::debug!("CRIU {} is {}", criu_words(version), path.display());
    Ok((path, version))
}

/// Returns what is slower with this CRIU than with others.
pub fn slow_criu(version: u32) -> Option<Problem> {
    let tried = hidden::was_tried(version);
    let problem = Problem::new(
        "memory lengthens the pause of what leaves this host",
        format!("CRIU {} was not tried with memory hidden from its dump", criu_words(version)),
    );
    (!tried).then(|| at_home(problem).hint("CRIU 4.2.1 was: 200 ms less for each GiB").warning())
}

/// CRIU's version as people write it: 4.2 for 40200, 4.2.1 for 40201.
pub fn criu_words(version: u32) -> String {
    let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
    match patch {
        0 => format!("{major}.{minor}"),
        patch => format!("{major}.{minor}.{patch}"),
    }
}

/// Says which host has the problem: two of them are looked at, and both are told of in one place.
fn at_home(problem: Problem) -> Problem {
    Problem { what: format!("{}: {}", crate::sys::host::name(), problem.what), ..problem }
}

/// Kernel release as (major, minor).
pub fn kernel_version(release: &str) -> (u32, u32) {
    let mut parts = release.split(['.', '-']).map(|p| p.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// Bytes of memory that can be had. proc_meminfo(5), `MemAvailable`.
///
/// # Errors
/// When it cannot be read.
pub fn memory_available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|l| l.trim().strip_suffix("kB"))
        .and_then(|l| l.trim().parse().ok())
        .context("no MemAvailable in /proc/meminfo")?;
    Ok(kib * 1024)
}

/// Everything about this host alone that could stop a migration, in either role.
pub fn problems() -> Vec<Problem> {
    look().into_iter().map(at_home).collect()
}

/// The same for what only the destination needs: its kernel must be able to fill a container's
/// memory from outside and, for one with an address (`networked`), to keep and replay its packets.
pub fn receiving_problems(networked: bool) -> Vec<Problem> {
    let mut found = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        // All of it is root's, and somebody else tells.
        return found;
    }
    if let Err(e) = memory::uffd_for_restore() {
        found.push(no_userfaultfd(&e));
    }
    if networked {
        let began = Instant::now();
        found.extend(network::usable::missing());
        tracing::debug!("tried tun, tc and nf_tables out in {:.1?}", began.elapsed());
    }
    found.into_iter().map(at_home).collect()
}

fn no_userfaultfd(error: &std::io::Error) -> Problem {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel needs CONFIG_USERFAULTFD",
        Some(libc::EPERM | libc::EACCES) => {
            "give Ferry CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd=1; a seccomp \
             profile may forbid it too"
        }
        _ => "CRIU needs a kernel whose userfaultfd tells of forks, moves and unmappings",
    };
    Problem::new("userfaultfd cannot be used", error).hint(hint)
}

/// Where whoever runs it is not root: nothing else need be tried then.
pub fn not_root() -> Option<Problem> {
    let problem = Problem::new("Ferry needs root", "checkpoint, restore and namespaces are root's")
        .hint("run it with sudo, or log in as root on the other host");
    (!nix::unistd::geteuid().is_root()).then_some(problem)
}

/// Where a process gets no descriptors from number `most` on: Ferry or CRIU would find it out when the
/// container stands still.
fn few_descriptors(most: RawFd) -> Option<Problem> {
    let problem = || {
        Problem::new(
            format!("no more than {most} files may be open at once"),
            format!("Ferry and CRIU need {FEWEST_DESCRIPTORS}, and more for many connections"),
        )
        .hint("`ulimit -Hn` says so: raise it, for a service with LimitNOFILE=")
    };
    (most < FEWEST_DESCRIPTORS).then(problem)
}

fn look() -> Vec<Problem> {
    let mut found = Vec::new();
    if let Some(problem) = not_root() {
        return vec![problem];
    }
    found.extend(connections::raise_limit().ok().and_then(few_descriptors));
    let release = kernel();
    if kernel_version(&release) < KERNEL_OLDEST {
        let (major, minor) = KERNEL_OLDEST;
        found.push(
            Problem::new("the kernel is too old", format!("this is Linux {release}"))
                .hint(format!("Ferry needs Linux {major}.{minor} or newer")),
        );
    }

    if nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE) != Ok(Some(PAGE as i64)) {
        found.push(Problem::new("the kernel's pages are not 4 KiB", "Ferry cannot carry others"));
    }
    match criu() {
        Err(problem) => found.push(problem),
        Ok((path, _)) => {
            let began = Instant::now();
            let check = Command::new(&path).arg("check").stdin(Stdio::null()).output();
            tracing::debug!("`criu check` took {:.1?}", began.elapsed());
            match check {
                Ok(output) if output.status.success() => {}
                Ok(output) => found.push(
                    Problem::new(
                        "`criu check` fails",
                        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                    )
                    .hint("the kernel lacks something that CRIU needs: see `criu check --all`"),
                ),
                Err(e) => found.push(Problem::new("criu cannot be run", e)),
            }
        }
    }

    if !fs::exists("/proc/self/pagemap").unwrap_or(false) {
        found.push(
            Problem::new("the kernel has no /proc/PID/pagemap", "CONFIG_PROC_PAGE_MONITOR is off")
                .hint("Ferry finds a container's pages with it"),
        );
    }

    if !has_capability(24) {
        found.push(
            Problem::new(
                "CAP_SYS_RESOURCE is missing",
                "CRIU can then only checkpoint processes of its own user",
            )
            .hint("give Ferry all of root's capabilities; a container whose tasks run as uid 0 may do")
            .warning(),
        );
    }

    found
}

/// Tells whether this process has a capability in its effective set, by number (linux/capability.h).
fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .is_some_and(|set| set >> number & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_compared_with_itself_lacks_nothing() {
        assert!(missing_cpu_flags(&cpu_flags()).is_empty());
        let odd = ["avx999".to_owned(), "hypervisor".to_owned()];
        assert_eq!(missing_cpu_flags(&odd), ["avx999"]);
    }

    #[test]
    fn few_descriptors_are_told_of() {
        assert!(few_descriptors(1023).is_some_and(|p| p.fatal));
        assert!(few_descriptors(1024).is_none());
    }

    #[test]
    fn versions_are_written_as_people_do() {
        assert_eq!([40_200, 40_201, 41_000].map(criu_words), ["4.2", "4.2.1", "4.10"]);
    }

    #[test]
    fn a_missing_userfaultfd_says_what_to_do() {
        let hint = |errno| no_userfaultfd(&std::io::Error::from_raw_os_error(errno)).hint;
        assert!(hint(libc::ENOSYS).contains("CONFIG_USERFAULTFD"));
        assert!(hint(libc::EPERM).contains("CAP_SYS_PTRACE"));
        assert!(hint(libc::EINVAL).contains("forks"));
    }

    #[test]
    fn kernel_releases_are_ordered() {
        assert_eq!(kernel_version("6.18.44-fc"), (6, 18));
        assert!(kernel_version("5.4.0-1-amd64") < KERNEL_OLDEST);
    }
}
