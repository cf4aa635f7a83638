//! The mark of a vDSO that CRIU has moved.
//!
//! Where a kernel's vDSO is another one than the task knows, CRIU leaves the task its old one, in plain anonymous
//! memory, with jumps in it to the kernel's own. That is moved to wherever there is room, and gets a mark over
//! its ELF header: five numbers of 64 bits, `CRIUvDSO`, the address of the old vDSO, 3 (a version), the address of the
//! old vvar, and that of the kernel's vvar. When CRIU dumps the task, it looks for the mark, writes down the old pair
//! as a vDSO, and leaves the kernel's out. Source: CRIU criu/include/parasite-vdso.h, criu/vdso.c.
//!
//! A task may write such a mark by itself. CRIU takes it for true, and so nothing but what CRIU does follows from it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::sys::maps;

const SIGNATURE: u64 = u64::from_le_bytes(*b"CRIUvDSO");
const VERSION: u64 = 3;

/// The names of the kernel's own mappings that CRIU leaves out of the image where there is a mark.
pub const LEFT_OUT: [&str; 3] = ["[vdso]", "[vvar]", "[vvar_vclock]"];

/// What a task has of another kernel: CRIU must see it, though it looks like memory of the task's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Where the old vDSO begins.
    pub vdso: u64,
    /// Where the old vvar begins.
    pub vvar: u64,
}

impl Foreign {
    /// Looks for the mark in a task; nothing where there is none, or the task has ended. `maps` is the text of its
    /// `maps` or `smaps` file.
    pub fn of(pid: i32, maps: &str) -> Option<Foreign> {
        let own = maps::parse(maps).find(|mapping| mapping.is_special("[vdso]"))?;
        let mut mark = [0; 40];
        let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
        memory.read_exact_at(&mut mark, own.start).ok()?;
        Foreign::parse(&mark)
    }

    fn parse(mark: &[u8; 40]) -> Option<Foreign> {
        let mut numbers = mark.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n));
        let mut next = || numbers.next();
        let (signature, vdso, version, vvar) = (next()?, next()?, next()?, next()?);
        (signature == SIGNATURE && version == VERSION).then_some(Foreign { vdso, vvar })
    }

    /// Whether a mapping that begins there is of the old vDSO or vvar.
    pub fn begins_at(&self, start: u64) -> bool {
        start == self.vdso || start == self.vvar
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(signature: &[u8; 8], version: u64) -> [u8; 40] {
        let numbers = [u64::from_le_bytes(*signature), 0x7000, version, 0x3000, 0x10000];
        numbers.map(u64::to_le_bytes).concat().try_into().unwrap()
    }

    #[test]
    fn a_mark_says_where_the_old_one_is() {
        let found = Foreign::parse(&mark(b"CRIUvDSO", 3)).unwrap();
        assert_eq!(found, Foreign { vdso: 0x7000, vvar: 0x3000 });
        assert!(found.begins_at(0x7000) && found.begins_at(0x3000) && !found.begins_at(0x10000));
        assert_eq!(Foreign::parse(&mark(b"CRIUvDSO", 2)), None);
        assert_eq!(Foreign::parse(&mark(b"\x7fELF\x02\x01\x01\0", 3)), None);
    }

    #[test]
    fn a_kernels_own_has_none() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.contains("[vdso]"));
        assert_eq!(Foreign::of(std::process::id() as i32, &maps), None);
    }
}
