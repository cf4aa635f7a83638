//! Linux AIO: io_setup(2), which libaio wraps.
//!
//! CRIU makes the rings again in which requests are answered, not the requests: whoever waits for one
//! would wait for ever, and a write would reach the file here when the container has left. The kernel
//! tells nobody how many are under way. So a ring goes along if nothing was ever asked through it, as
//! with servers that make one at their start and then do without; that shows in the ring, whose
//! events the kernel writes and nobody clears. It is looked at again right before the commit: what
//! was first asked for shortly before the freeze has come by then, and the container runs on here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::problem::Problem;
use crate::sys::maps;
use crate::sys::process::{self, proc_text};

/// How the kernel names the mapping.
const NAME: &str = "/[aio]";
/// `struct aio_ring` of fs/aio.c: eight numbers of 32 bits; the events follow.
const HEADER: usize = 32;
/// `AIO_RING_MAGIC`
const MAGIC: u32 = 0xa10a_10a1;
/// Rings are as long as their events; the kernel allows 65,536 in all by default.
const MAX_RING: u64 = 64 << 20;

/// A ring, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AioRing {
    pid: i32,
    start: u64,
    length: u64,
}

/// The rings of these processes.
pub fn rings(pids: &[i32]) -> Vec<AioRing> {
    let mut found = Vec::new();
    for &pid in pids {
        // Whoever has ended meanwhile has none.
        let text = proc_text(pid, "maps").unwrap_or_default();
        let list = maps::parse(&text).filter(|m| is_ring(m.name));
        found.extend(list.map(|m| AioRing { pid, start: m.start, length: m.end - m.start }));
    }
    found
}

/// The file behind it has lost its name before anybody could open it.
fn is_ring(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|rest| matches!(rest, "" | " (deleted)"))
}

/// Returns what stands in the way: whose requests would be lost. Once, however many rings there are.
pub fn problem(rings: &[AioRing]) -> Option<Problem> {
    let used = rings.iter().find(|ring| !ring.is_unused())?;
    let name = proc_text(used.pid, "comm").unwrap_or_default();
    Some(
        Problem::new(
            "the container uses Linux AIO (io_setup, libaio)",
            format!(
                "requests of process {} ({}) that are under way can neither be seen nor carried",
                used.pid,
                name.trim()
            ),
        )
        .hint(
            "most programs do without by a setting of their own, as innodb_use_native_aio=0 for \
             MySQL and MariaDB, `aio off` for nginx; then start it again",
        ),
    )
}

impl AioRing {
    /// Tells whether no request was ever answered through it. One that cannot be read is not vouched for.
    fn is_unused(&self) -> bool {
        match self.read() {
            Ok(bytes) => is_unused(&bytes),
            // The task has ended, or its ring has.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => true,
            Err(_) => !process::lives(self.pid),
        }
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        if self.length > MAX_RING {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        let mut bytes = vec![0; self.length as usize];
        File::open(format!("/proc/{}/mem", self.pid))?.read_exact_at(&mut bytes, self.start)?;
        Ok(bytes)
    }
}

/// Judges by the ring's bytes: id, nr, head, tail, magic and three more; then the events.
fn is_unused(ring: &[u8]) -> bool {
    let Some((header, events)) = ring.split_at_checked(HEADER) else { return false };
    let word = |i: usize| header[i * 4..][..4].try_into().map_or(0, u32::from_ne_bytes);
    let (head, tail, magic) = (word(2), word(3), word(4));
    (head, tail, magic) == (0, 0, MAGIC) && events.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    use super::*;

    fn ring(head: u32, tail: u32) -> Vec<u8> {
        let header = [0, 127, head, tail, MAGIC, 1, 0, HEADER as u32];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.resize(4096, 0);
        bytes
    }

    #[test]
    fn only_a_ring_without_any_event_is_unused() {
        assert!(is_unused(&ring(0, 0)));
        assert!(!is_unused(&ring(3, 3)) && !is_unused(&ring(0, 1)));
        // Once round, and all were taken out.
        let mut round = ring(0, 0);
        round[HEADER + 8] = 1;
        assert!(!is_unused(&round));
        assert!(!is_unused(&[0; 4096]) && !is_unused(&[]), "not a ring that is known");
    }

    #[test]
    fn a_ring_is_told_by_its_whole_name() {
        assert!(is_ring("/[aio]") && is_ring("/[aio] (deleted)"));
        assert!(!is_ring("/x[aio]") && !is_ring("/[aio]x") && !is_ring("[aio]"));
    }

    /// A task that makes a ring, and asks for one write when it is told to.
    const PROGRAM: &str = r#"
        $| = 1;
        my ($setup, $submit, $getevents, $path) = @ARGV;
        my $context = pack("Q", 0);
        exit 1 if syscall($setup + 0, 8, $context) < 0;
        $context = unpack("Q", $context);
        print "ready\n"; <STDIN>;
        open(my $file, ">", $path) or die;
        my $data = "x";
        my $request = pack("QLLSsLPQqQLL", 1, 0, 0, 1, 0, fileno($file), $data, 1, 0, 0, 0, 0);
        my $list = pack("P", $request);
        syscall($submit + 0, $context, 1, $list) == 1 or die;
        my $events = "\0" x 32;
        syscall($getevents + 0, $context, 1, 1, $events, 0) == 1 or die;
        print "done\n"; <STDIN>;
    "#;

    #[test]
    fn a_ring_is_found_and_its_use_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = [libc::SYS_io_setup, libc::SYS_io_submit, libc::SYS_io_getevents];
        let mut child = Command::new("perl")
            .args(["-e", PROGRAM])
            .args(numbers.map(|n| n.to_string()))
            .arg(dir.path().join("file"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();

        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(Ok(_)) = output.next() else {
            // A kernel without it.
            assert_eq!(child.wait().unwrap().code(), Some(1));
            return;
        };

        let found = rings(&[child.id() as i32]);
        assert_eq!(found.len(), 1);
        assert_eq!(problem(&found), None, "nothing was asked for");
        writeln!(input, "go").unwrap();
        assert_eq!(output.next().unwrap().unwrap(), "done");
        let words = format!("process {} (perl)", child.id());
        let used = problem(&found);
        drop(input);
        child.wait().unwrap();
        assert!(used.is_some_and(|p| p.fatal && p.why.contains(&words) && !p.hint.is_empty()));
        assert_eq!(problem(&found), None, "it has ended");
    }
}
