//! Whether restored tasks still wait in CRIU's code, when CRIU has ended.
//!
//! At the end of each stage a restored task waits until CRIU has begun the next one: on a number in memory that
//! all of them share, in code of CRIU's. That code is left, by all of them, when CRIU has written the last number.
//! CRIU gone, nobody writes it any more: where one task waits while the number is still what it waits on, none of
//! them has run an instruction of its own, nor will. Source: CRIU criu/include/restorer.h (`restore_finish_stage`),
//! criu/cr-restore.c; proc_pid_syscall(5), futex(2).

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::mm;
use crate::sys::memory::read_process;
use crate::sys::process::{self, proc_text};

/// How long a task may be on its way to the end of a stage. What is longer on its way is taken for one that runs.
const PATIENCE: Duration = Duration::from_millis(500);

/// A system call in which a task waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waits {
    call: i64,
    arguments: [u64; 3],
    /// Where its code is.
    code: u64,
}

impl Waits {
    /// `nr arg1 … arg6 sp pc`, all but the first in hexadecimal; `running`, or `-1 sp pc`, of one that does not.
    fn parse(text: &str) -> Option<Waits> {
        let mut words = text.split_whitespace();
        let call = words.next()?.parse().ok()?;
        let numbers = words.map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        match numbers.collect::<Option<Vec<u64>>>()?[..] {
            [a, b, c, _, _, _, _, code] => Some(Waits { call, arguments: [a, b, c], code }),
            _ => None,
        }
    }

    /// The number on which a task of CRIU's waits, and what it is while it waits.
    fn at_barrier(&self) -> Option<(u64, u32)> {
        let [word, operation, value] = self.arguments;
        let waits = self.call == libc::SYS_futex && operation == libc::FUTEX_WAIT as u64;
        waits.then_some((word, value as u32))
    }
}

/// Whether this restored task, and with it all others, waits for a CRIU that has ended. `images`: out of which
/// it was made. False where that is not certain.
pub fn is_kept(pid: i32, images: &Path) -> bool {
    let until = Instant::now() + PATIENCE;
    let Some(own) = mappings(pid, images) else { return false };
    loop {
        let text = proc_text(pid, "syscall").unwrap_or_default();
        match Waits::parse(&text) {
            // Code of its own.
            Some(waits) if own.covers(waits.code) => return false,
            Some(waits) if waits.at_barrier().is_some_and(|(word, is)| reads(pid, word, is)) => {
                return true;
            }
            _ if Instant::now() > until || !process::lives(pid) => return false,
            _ => std::thread::park_timeout(Duration::from_millis(1)),
        }
    }
}

/// What it has of its own, as far as CRIU knows.
fn mappings(pid: i32, images: &Path) -> Option<mm::MmImage> {
    let status = proc_text(pid, "status").ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let inside: i32 = numbers.split_whitespace().next_back()?.parse().ok()?;
    mm::MmImage::parse(&fs::read(images.join(format!("mm-{inside}.img"))).ok()?).ok()
}

fn reads(pid: i32, word: u64, expected: u32) -> bool {
    let mut bytes = [0; 4];
    let read = read_process(pid, &[(word, bytes.len())], &mut bytes);
    read.is_ok_and(|n| n == bytes.len()) && u32::from_ne_bytes(bytes) == expected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_of_crius_is_known() {
        let text = "202 0x7f1000 0x0 0x5 0x0 0x0 0x0 0x7ffe10 0x10020\n";
        let waits = Waits::parse(text).unwrap();
        assert_eq!(waits.code, 0x10020);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(waits.at_barrier(), Some((0x7f1000, 5)));
        // A mutex of the C library's.
        let private = Waits { arguments: [0x7f1000, 128, 5], ..waits };
        assert_eq!(private.at_barrier(), None);
        assert_eq!(Waits { call: 0, ..waits }.at_barrier(), None);
        for other in ["running\n", "-1 0x7ffe10 0x10020\n", "", "202 0x1\n"] {
            assert_eq!(Waits::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_number_that_has_changed_lets_go() {
        let number = 6_u32;
        let at = &raw const number as u64;
        let own = std::process::id() as i32;
        assert!(reads(own, at, 6) && !reads(own, at, 5));
        assert!(!reads(own, 8, 0), "nothing is there");
    }
}
