//! A process's mappings with all that the kernel knows of them: `/proc/PID/smaps`, proc_pid_smaps(5).
//!
//! To read it takes the kernel a walk over all pages, 15 to 30 ms a GiB, in which nobody can map or unmap
//! memory of that process.

use super::maps::Mapping;

/// What smaps says of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmapsEntry<'a> {
    /// Its first line, which `maps` has, too.
    pub line: &'a str,
    /// What that says.
    pub mapping: Mapping<'a>,
    /// The words after `VmFlags:`, each of two letters.
    pub flags: &'a str,
    /// `ProtectionKey:`, pkeys(7); 0 where there is none.
    pub key: u32,
}

/// Reads the text of a `smaps` file; nothing where a line of it is not understood.
pub fn parse(text: &str) -> Option<Vec<SmapsEntry<'_>>> {
    let mut all: Vec<SmapsEntry> = Vec::new();
    let mut has_flags = true;
    for line in text.lines() {
        if let Some(mapping) = Mapping::parse(line) {
            if !std::mem::replace(&mut has_flags, false) {
                return None;
            }
            all.push(SmapsEntry { line, mapping, flags: "", key: 0 });
            continue;
        }

        let (name, value) = line.split_once(':')?;
        let entry = all.last_mut()?;
        match name {
            "VmFlags" if !has_flags => {
                entry.flags = value.trim();
                has_flags = true;
            }
            "ProtectionKey" => entry.key = value.trim().parse().ok()?,
            // Sizes, and whatever newer kernels tell. A mapping's line never looks like that.
            _ if name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && name != "VmFlags" => {}
            _ => return None,
        }
    }

    has_flags.then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    const TEXT: &str = "\
7f2a-7f2b rw-p 00000000 00:00 0          [anon:a: b]
Size:                  4 kB
VmFlags: rd wr mr mw me ac sd 
7f2b-7f2c r-xp 00001000 08:01 77         /x: y
Size:                  4 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd ex mr mw me 
";

    #[test]
    fn entries_have_flags_and_keys() {
        let all = parse(TEXT).unwrap();
        let told: Vec<_> = all.iter().map(|e| (e.mapping.start, e.flags, e.key)).collect();
        assert_eq!(told, [(0x7f2a, "rd wr mr mw me ac sd", 0), (0x7f2b, "rd ex mr mw me", 3)]);
        assert_eq!(all[0].mapping.name, "[anon:a: b]");
        let maps: Vec<&str> = TEXT.lines().filter(|l| l.contains("-7f2")).collect();
        assert_eq!(all.iter().map(|e| e.line).collect::<Vec<_>>(), maps);
    }

    #[test]
    fn what_is_not_understood_is_not_guessed_at() {
        for (old, new) in [
            ("VmFlags: rd wr mr mw me ac sd \n", ""),
            ("VmFlags: rd ex mr mw me \n", ""),
            ("Size: ", "No size "),
            ("Size: ", "A strange: "),
            ("ProtectionKey:         3", "ProtectionKey: many"),
            ("7f2a-7f2b rw-p", "7f2a-7f2b"),
            ("THPeligible:           0", "VmFlags: rd\nVmFlags: wr"),
        ] {
            assert_eq!(parse(&TEXT.replacen(old, new, 1)), None, "{new:?}");
        }
    }

    #[test]
    fn our_own_are_those_of_maps() {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let all = parse(&text).unwrap();
        assert!(all.len() > 10 && all.iter().all(|e| !e.flags.is_empty()));
    }

    #[test]
    fn fuzz_smaps() {
        Target::new("smaps").sample(TEXT).words(&[b"VmFlags:", b"-", b"\n", b"[heap]"]).run(
            |bytes| {
                let text = String::from_utf8_lossy(bytes);
                let all = parse(&text).unwrap_or_default();
                assert!(all.iter().all(|e| e.mapping.start < e.mapping.end));
                found(&[all.len()])
            },
        );
    }
}
