//! How the kernel schedules another task: on which CPUs, its input and output, and how late its timers
//! may be; asked and set from outside.

use std::{fs, io};

use super::process::proc_text;

/// Bytes for the CPUs of the largest machines: 8192.
const CPU_BYTES: usize = 1024;
/// Longest list of them: every other one, each with its number and a comma.
const MOST_LIST: usize = CPU_BYTES * 8 / 2 * 5;
const WHO_PROCESS: libc::c_int = 1;

/// The CPUs that a thread may run on, a bit each, without trailing zeros. sched_getaffinity(2)
///
/// # Errors
/// When it has ended.
pub fn cpus(tid: i32) -> io::Result<Vec<u8>> {
    let mut mask = [0u64; CPU_BYTES / 8];
    // SAFETY: the kernel writes at most as many bytes as the size that is passed into a live array.
    let n =
        unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, CPU_BYTES, mask.as_mut_ptr()) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // On a little-endian machine; Ferry knows no other.
    let bytes = mask.iter().flat_map(|word| word.to_le_bytes()).take(n as usize).collect();
    Ok(trimmed(bytes))
}

/// Lets a thread run on those CPUs that its group has, too.
///
/// # Errors
/// `EINVAL` when that is none of them.
pub fn set_cpus(tid: i32, cpus: &[u8]) -> io::Result<()> {
    if cpus.len() > CPU_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut mask = [0u8; CPU_BYTES];
    mask[..cpus.len()].copy_from_slice(cpus);
    // SAFETY: the kernel reads at most as many bytes as the size that is passed from a live array.
    let r = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, CPU_BYTES, mask.as_ptr()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn trimmed(mut bytes: Vec<u8>) -> Vec<u8> {
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(used);
    bytes
}

/// Reads a list of CPUs as the kernel writes it: `0-3,7`. cpuset(7)
///
/// Nothing comes of one that is longer than any of the kernel's, or not in order: whoever has written it
/// may have had us count for hours.
pub fn parse_cpus(list: &str) -> Option<Vec<u8>> {
    if list.len() > MOST_LIST {
        return None;
    }
    let mut bytes = vec![0; CPU_BYTES];
    let mut next = 0;
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first < next || last < first {
            return None;
        }
        next = last.saturating_add(1);
        for cpu in first..=last {
            *bytes.get_mut(cpu / 8)? |= 1 << (cpu % 8);
        }
    }
    Some(trimmed(bytes))
}

/// The same the other way round.
pub fn cpu_list(bytes: &[u8]) -> String {
    let is_in = |cpu: usize| bytes.get(cpu / 8).is_some_and(|byte| byte >> (cpu % 8) & 1 == 1);
    let mut parts = Vec::new();
    let mut cpu = 0;
    while cpu < bytes.len() * 8 {
        if !is_in(cpu) {
            cpu += 1;
            continue;
        }
        let first = cpu;
        while is_in(cpu + 1) {
            cpu += 1;
        }
        parts.push(if first == cpu { format!("{cpu}") } else { format!("{first}-{cpu}") });
        cpu += 1;
    }
    parts.join(",")
}

/// This host's CPUs, as the kernel lists them; nothing where it does not.
pub fn online_cpus() -> String {
    fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default().trim().to_owned()
}

/// A thread's priority for input and output: class and level as the kernel has them in one number.
/// ioprio_get(2)
///
/// # Errors
/// When it has ended.
pub fn io_priority(tid: i32) -> io::Result<i32> {
    // SAFETY: no pointers.
    let priority = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, tid) };
    if priority < 0 { Err(io::Error::last_os_error()) } else { Ok(priority as i32) }
}

/// See [`io_priority`].
///
/// # Errors
/// When it is none, or the thread has ended.
pub fn set_io_priority(tid: i32, priority: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, tid, priority) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Nanoseconds by which a thread's timers may be late; 0 is a real-time thread's, which has none.
/// proc_pid_timerslack_ns(5)
///
/// # Errors
/// When it has ended.
pub fn timer_slack(tid: i32) -> io::Result<u64> {
    let text = proc_text(tid, "timerslack_ns")?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// See [`timer_slack`].
///
/// # Errors
/// When it has ended.
pub fn set_timer_slack(tid: i32, slack: u64) -> io::Result<()> {
    fs::write(format!("/proc/{tid}/timerslack_ns"), slack.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_and_written() {
        for list in ["", "0", "1", "0-1", "0-3,7,9-10", "63-64", "8191"] {
            assert_eq!(cpu_list(&parse_cpus(list).unwrap()), list);
        }
        assert_eq!(parse_cpus("1\n").unwrap(), [2]);
        let long = "0-8191,".repeat(100_000);
        for wrong in ["x", "1-", "8192", "3,a", "3-1", "0-8191,0-8191", "4,4", &long] {
            assert_eq!(parse_cpus(wrong), None, "{:.20}", wrong);
        }
        let every_other: Vec<u8> = vec![0x55; CPU_BYTES];
        assert_eq!(parse_cpus(&cpu_list(&every_other)).unwrap(), every_other);
    }

    #[test]
    fn a_thread_has_what_it_is_given() {
        // On a thread of its own: that is changed.
        std::thread::spawn(|| {
            let tid = nix::unistd::gettid().as_raw();
            let all = cpus(tid).unwrap();
            let first = all.iter().position(|byte| *byte != 0).unwrap();
            let mut one = vec![0; first + 1];
            one[first] = 1 << all[first].trailing_zeros();
            set_cpus(tid, &one).unwrap();
            assert_eq!(cpus(tid).unwrap(), one);
            set_io_priority(tid, 2 << 13 | 7).unwrap();
            assert_eq!(io_priority(tid).unwrap(), 2 << 13 | 7);
            set_timer_slack(tid, 123_456).unwrap();
            assert_eq!(timer_slack(tid).unwrap(), 123_456);
            assert!(set_cpus(tid, &[]).is_err());
        })
        .join()
        .unwrap();
    }
}
