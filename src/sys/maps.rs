//! A process's mappings as the kernel lists them: proc_pid_maps(5).
//!
//! The names in the list are the container's choice: a file may be called `/x[vdso]`. So a line is
//! taken apart field by field, and what the kernel itself has mapped is told by having no inode.

use super::memory;

/// The kernel's name for anonymous shared memory, and those of what CRIU makes of it: by its older way, and by
/// that which keeps what it saw of the name.
const NAMELESS: [&str; 3] =
    ["/dev/zero (deleted)", "/memfd: (deleted)", "/memfd:/dev/zero (deleted)"];

/// A line of `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Four letters: `r`, `w`, `x`, and `s` for shared or `p` for private.
    pub perms: &'a str,
    /// Where in the file its first byte is.
    pub offset: u64,
    /// Of the file; 00:00 where there is none.
    pub device: &'a str,
    /// Of the file; 0 where there is none.
    pub inode: u64,
    /// The file's path, something in brackets, or nothing.
    pub name: &'a str,
}

impl<'a> Mapping<'a> {
    /// Reads a line; nothing where it is none.
    pub fn parse(line: &'a str) -> Option<Mapping<'a>> {
        // address perms offset device inode [name]; only the last may hold spaces.
        let mut parts = line.splitn(6, ' ');
        let (start, end) = parts.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        let perms = parts.next().filter(|perms| perms.len() == 4)?;
        let offset = number(parts.next()?)?;
        let device = parts.next()?;
        let inode = parts.next()?.parse().ok()?;
        let name = parts.next().unwrap_or_default().trim_start_matches(' ');
        (start < end).then_some(Mapping { start, end, perms, offset, device, inode, name })
    }

    /// Tells whether it is the kernel's own, of that name in brackets.
    pub fn is_special(&self, name: &str) -> bool {
        self.inode == 0 && self.name == name
    }

    /// Tells whether there is no file behind it. Some file systems number files from 0.
    pub fn is_anonymous(&self) -> bool {
        self.inode == 0 && self.device.bytes().all(|b| matches!(b, b'0' | b':'))
    }

    /// Tells whether others see what is written to it.
    pub fn is_shared(&self) -> bool {
        self.perms.ends_with('s')
    }

    /// Tells whether it is of shared memory that nobody has given a name: anonymous, or a memfd called as CRIU
    /// calls what it makes of such. Files may be called so, too, and are on another device.
    pub fn is_nameless(&self) -> bool {
        let shared = || memory::shared_device().ok();
        self.is_shared()
            && self.inode != 0
            && NAMELESS.contains(&self.name)
            && self.device_number().is_some_and(|device| Some(device) == shared())
    }

    fn device_number(&self) -> Option<u64> {
        let (major, minor) = self.device.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(libc::makedev(number(major)?, number(minor)?))
    }
}

/// The mappings in the text of a `maps` file.
pub fn parse(text: &str) -> impl Iterator<Item = Mapping<'_>> {
    text.lines().filter_map(Mapping::parse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    #[test]
    fn fields_are_told_apart_whatever_the_name_is() {
        let text = "\
            10000-90000 r--s 00000000 08:01 77 /z[vdso]\n\
            a0000-b0000 r-xp 00000000 08:01 78 /a  b [vdso]\n\
            c0000-d0000 rw-p 00000000 00:00 0 \n\
            d0000-e0000 rw-p 00000000 00:00 0      [anon:x [vdso]]\n\
            7ffd000-7fff000 r-xp 00000000 00:00 0                          [vdso]\n\
            nonsense\n\
            20-10 r--p 0 0:0 0\n";
        let list: Vec<_> = parse(text).collect();

        let names: Vec<_> = list.iter().map(|m| (m.inode, m.name)).collect();
        let wanted = [
            (77, "/z[vdso]"),
            (78, "/a  b [vdso]"),
            (0, ""),
            (0, "[anon:x [vdso]]"),
            (0, "[vdso]"),
        ];

        assert_eq!(names, wanted);
        let special: Vec<_> = list.iter().filter(|m| m.is_special("[vdso]")).collect();
        assert_eq!(special.len(), 1);
        assert_eq!((special[0].start, special[0].end), (0x7ff_d000, 0x7ff_f000));
        assert!(list[0].is_shared() && !list[1].is_shared());
        let first = Mapping::parse("1000-2000 rw-p 00000000 00:2f 0 /on/fuse").unwrap();
        assert!(list[2].is_anonymous() && !list[1].is_anonymous() && !first.is_anonymous());
    }

    #[test]
    fn our_own_are_read_whole() {
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert_eq!(parse(&text).count(), text.lines().count());
    }

    #[test]
    fn fuzz_maps() {
        let own = std::fs::read_to_string("/proc/self/maps").unwrap();
        let some: Vec<&str> = own.lines().step_by(7).take(8).collect();
        let target = Target::new("maps").sample(some.join("\n"));
        target.sample("10-20 r--s 0 8:1 77 /z[vdso]\n").words(&[b"[vdso]", b"-", b" "]).run(
            |bytes| {
                let text = String::from_utf8_lossy(bytes);
                let list: Vec<_> = parse(&text).collect();
                let ordered = |m: &&Mapping| m.start < m.end && m.perms.len() == 4;
                assert!(list.iter().all(|m| ordered(&m)));
                let special = list.iter().filter(|m| m.is_special("[vdso]")).count();
                found(&[list.len(), special, list.iter().filter(|m| m.is_shared()).count()])
            },
        );
    }
}
