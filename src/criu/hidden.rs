//! Which of a task's mappings CRIU is not shown, and how they are written down for it afterwards.
//!
//! CRIU learns of mappings from `/proc/PID/smaps` alone. To write that takes the kernel a walk over all
//! pages, and for each page that CRIU sees it moves a descriptor: 200 ms a GiB, in the freeze. Of plain
//! private anonymous memory Ferry knows all that CRIU would find out. So CRIU is given a file that lacks such
//! mappings, and their [records](Record) are [put into its image](super::mm) when it has dumped. So it is with
//! anonymous shared memory that Ferry has read before: of a segment CRIU sees all mappings or none, in whichever
//! tasks they are.
//!
//! What may be hidden is decided by what a mapping *is*: [`may_be_hidden`]. `maps`, which costs next to
//! nothing, tells its addresses, access and name in the freeze. Its flags only smaps has: those that it had
//! when it was [looked at before](KnownMappings) are taken, and [compared](Drawn::check) before anything
//! depends on them.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::ops::Range;

use super::mm::MappingRecord;
use super::vdso::{self, Foreign};
use crate::sys::maps::Mapping;
use crate::sys::memory::PAGE;
use crate::sys::smaps::{self, SmapsEntry};

/// Versions of CRIU with which it was tried that a dump without these mappings, and with them added,
/// restores to the same as one that has seen them.
const TRIED: [u32; 2] = [40_200, 40_201];

/// What the kernel does, CRIU does not write down, and no restore needs: access, which `maps` tells, and
/// what access could be had; accounting; soft-dirty bits; Ferry's own watching for writes; that there may
/// be guards, which CRIU looks for in all of a task's memory.
const OF_NO_INTEREST: [&str; 12] =
    ["rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "ac", "sd", "uw", "gu"];
/// Mapped without a reservation of swap space.
const UNRESERVED: &str = "nr";
/// Kept in memory: mlock(2).
const LOCKED: &str = "lo";
/// Advice that lasts, and its number: madvise(2).
const ADVICE: [(&str, i32); 8] = [
    ("sr", libc::MADV_SEQUENTIAL),
    ("rr", libc::MADV_RANDOM),
    ("dc", libc::MADV_DONTFORK),
    ("dd", libc::MADV_DONTDUMP),
    ("mg", libc::MADV_MERGEABLE),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
    ("wf", libc::MADV_WIPEONFORK),
];
const HEAP: &str = "[heap]";

/// Tells whether CRIU of this version (40201 for 4.2.1) was tried with mappings hidden from it.
pub fn was_tried(version: u32) -> bool {
    TRIED.contains(&version)
}

/// Tells whether CRIU need not see a mapping: private anonymous memory, of the heap or with whatever name the
/// task has given it, without a protection key, and with no flags but those that are known to mean advice. So
/// not what grows down, is locked, huge by itself, droppable, sealed, a shadow stack, a device's, the kernel's
/// own, or has a userfaultfd of the task's.
pub fn may_be_hidden(mapping: &Mapping, flags: &str, key: u32) -> bool {
    let plain = |name: &str| name.is_empty() || name == HEAP || name.starts_with("[anon:");
    mapping.is_anonymous()
        && !mapping.is_shared()
        && plain(mapping.name)
        && key == 0
        && relevant(flags).all(|flag| flag == UNRESERVED || ADVICE.iter().any(|a| a.0 == flag))
}

/// Tells whether CRIU need not see a mapping of anonymous shared memory of which it sees no other one: with no
/// flags but those that mean advice, or that it is locked.
fn shared_may_be_hidden(mapping: &Mapping, flags: &str, key: u32) -> bool {
    let known = |flag| matches!(flag, UNRESERVED | LOCKED) || ADVICE.iter().any(|a| a.0 == flag);
    mapping.is_nameless() && key == 0 && relevant(flags).all(known)
}

/// Flags that a dump has to keep, or that keep CRIU from being spared the mapping.
fn relevant(flags: &str) -> impl Iterator<Item = &str> {
    flags.split_ascii_whitespace().filter(|flag| !OF_NO_INTEREST.contains(flag))
}

fn advice(flags: &str) -> u64 {
    let bits = ADVICE.iter().filter(|(name, _)| relevant(flags).any(|flag| flag == *name));
    bits.fold(0, |all, (_, number)| all | 1 << number)
}

fn record(mapping: &Mapping, flags: &str) -> MappingRecord {
    let bits = [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)];
    let access = bits.iter().filter(|(letter, _)| mapping.perms.contains(*letter));
    MappingRecord {
        range: mapping.start..mapping.end,
        offset: mapping.offset,
        access: access.fold(0, |all, (_, bit)| all | *bit as u64),
        unreserved: relevant(flags).any(|flag| flag == UNRESERVED),
        locked: relevant(flags).any(|flag| flag == LOCKED),
        heap: mapping.name == HEAP,
        shared: mapping.is_shared().then_some(mapping.inode),
        advice: advice(flags),
    }
}

/// A task's mappings when it was last looked at.
#[derive(Debug, Default)]
pub struct KnownMappings {
    all: Vec<(Range<u64>, SmapsAttributes)>,
    by_line: HashMap<String, usize>,
    foreign: Option<Foreign>,
}

/// What only smaps tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SmapsAttributes {
    flags: String,
    key: u32,
}

/// How sure it is that a mapping has the attributes that are taken for its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sure {
    /// It had them then.
    Known,
    /// All that was there then had them: it has grown, shrunk or come apart since. What has others does not
    /// become one with it.
    Likely,
    /// It is new.
    No,
}

impl KnownMappings {
    /// From the text of a `smaps` file; nothing where that is not understood.
    pub fn parse(text: &str) -> Option<KnownMappings> {
        let mut known = KnownMappings::default();
        for SmapsEntry { line, mapping, flags, key } in smaps::parse(text)? {
            known.by_line.insert(line.to_owned(), known.all.len());
            let attributes = SmapsAttributes { flags: flags.to_owned(), key };
            known.all.push((mapping.start..mapping.end, attributes));
        }
        Some(known)
    }

    /// The same of a task that may have another kernel's vDSO, which CRIU must see.
    pub fn with_vdso(self, foreign: Option<Foreign>) -> KnownMappings {
        KnownMappings { foreign, ..self }
    }

    /// Tells whether these are the same mappings, as far as `maps` tells.
    pub fn is_of(&self, maps: &str) -> bool {
        let mut lines = 0;
        let known = maps.lines().all(|line| {
            lines += 1;
            self.by_line.contains_key(line)
        });
        known && lines == self.all.len()
    }

    fn attributes(&self, line: &str, range: Range<u64>) -> (SmapsAttributes, Sure) {
        if let Some(index) = self.by_line.get(line) {
            return (self.all[*index].1.clone(), Sure::Known);
        }
        let first = self.all.partition_point(|(known, _)| known.end <= range.start);
        let mut there = self.all[first..].iter().take_while(|(known, _)| known.start < range.end);
        match there.next() {
            Some((_, one)) if there.all(|(_, other)| same(one, other)) => {
                (one.clone(), Sure::Likely)
            }
            _ => (SmapsAttributes::default(), Sure::No),
        }
    }

    /// Returns what CRIU is shown of these mappings, the text of a `maps` file, and what not; `stacks` are the
    /// threads' stack pointers, whose pages CRIU wants in its images: of a mapping that may be hidden it is
    /// shown those pages alone. Of `shared`, inodes, it is shown what has such a page, or must be seen.
    /// Nothing where it must see a mapping of which not all is known.
    pub fn draw(&self, maps: &str, stacks: &[u64], shared: &HashSet<u64>) -> Option<Drawn> {
        let mut drawn = Drawn { foreign: self.foreign.is_some(), ..Drawn::default() };
        for line in maps.lines() {
            let mapping = Mapping::parse(line)?;
            let range = mapping.start..mapping.end;
            let (SmapsAttributes { flags, key }, sure) = self.attributes(line, range.clone());
            let segment = mapping.is_nameless() && shared.contains(&mapping.inode);
            let hidden = if segment {
                let has_stack = stacks.iter().any(|pointer| range.contains(pointer));
                let may = shared_may_be_hidden(&mapping, &flags, key);
                let hidden = sure != Sure::No && may && !has_stack;
                let seen = if hidden { &mut drawn.unseen } else { &mut drawn.seen };
                seen.insert(mapping.inode);
                hidden
            } else {
                let foreign = self.foreign.is_some_and(|vdso| vdso.begins_at(range.start));
                !foreign && may_be_hidden(&mapping, &flags, key)
            };

            if hidden {
                drawn.hidden.push(record(&mapping, &flags));
                drawn.unsure |= sure == Sure::No;
                for page in pages_of(stacks, &range) {
                    let after = line.split_once(' ').map_or("", |(_, rest)| rest);
                    let Range { start, end } = page;
                    // Writing to a string does not fail.
                    let _ = writeln!(drawn.text, "{start:08x}-{end:08x} {after}\nVmFlags: {flags}");
                    drawn.shown.push(page);
                }
            } else if sure == Sure::No {
                return None;
            } else {
                let _ = writeln!(drawn.text, "{line}\nVmFlags: {flags}");
            }
            drawn.all.push(ExpectedMapping { line: line.to_owned(), range, flags, key, hidden });
        }

        Some(drawn)
    }
}

/// Each page of a mapping to which one of these points, rising.
fn pages_of(stacks: &[u64], range: &Range<u64>) -> Vec<Range<u64>> {
    let page = PAGE as u64;
    let pointers = stacks.iter().filter(|pointer| range.contains(pointer));
    let mut found: Vec<u64> = pointers.map(|pointer| pointer / page * page).collect();
    found.sort_unstable();
    found.dedup();
    found.into_iter().map(|start| start..start + page).collect()
}

fn same(one: &SmapsAttributes, other: &SmapsAttributes) -> bool {
    one.key == other.key && relevant(&one.flags).eq(relevant(&other.flags))
}

/// What CRIU is shown of a task, and what not.
#[derive(Debug, Default)]
pub struct Drawn {
    /// As a `smaps` file has it.
    pub text: String,
    /// Those that are not in it.
    pub hidden: Vec<MappingRecord>,
    /// Pages of theirs that are in it all the same, as mappings of their own.
    pub shown: Vec<Range<u64>>,
    /// Shared memory that is hidden, and such that could have been: inodes.
    pub unseen: HashSet<u64>,
    /// See [`Drawn::unseen`].
    pub seen: HashSet<u64>,
    /// Something was hidden of which only its name and access are known: it must be checked before the
    /// records count.
    pub unsure: bool,
    /// CRIU writes down another kernel's vDSO, and not this one's.
    foreign: bool,
    all: Vec<ExpectedMapping>,
}

#[derive(Debug)]
struct ExpectedMapping {
    line: String,
    range: Range<u64>,
    flags: String,
    key: u32,
    hidden: bool,
}

/// Another advice than was taken for a mapping's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdviceChange {
    /// Of one that CRIU has not seen: this is its record.
    Hidden(MappingRecord),
    /// Of one that it has seen, which begins there.
    Seen(u64, u64),
}

impl Drawn {
    /// The addresses of all that must be in CRIU's image when what is hidden was added: each once.
    /// The kernel's own are left out that CRIU does not always write down: at fixed addresses, and behind
    /// another kernel's vDSO.
    pub fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        let behind: &[&str] = if self.foreign { &vdso::LEFT_OUT } else { &[] };
        let left_out = move |line: &str| {
            Mapping::parse(line).is_none_or(|m| {
                let fixed = ["[vsyscall]", "[vectors]", "[uprobes]"];
                fixed.iter().chain(behind).any(|name| m.is_special(name))
            })
        };
        self.all.iter().filter(move |one| !left_out(&one.line)).map(|one| &one.range)
    }

    /// Compares what was taken for true with what smaps says of the frozen task. Mappings of CRIU's own may
    /// be there, too, and neighbours may have become one, as CRIU makes all of them readable.
    ///
    /// # Errors
    /// What is such that CRIU should have seen, or not have seen it, in words.
    pub fn check(&self, now: &[SmapsEntry]) -> Result<Vec<AdviceChange>, String> {
        let mut changes = Vec::new();
        for one in &self.all {
            let first = now.partition_point(|entry| entry.mapping.end <= one.range.start);
            let there = now[first..].iter().take_while(|entry| entry.mapping.start < one.range.end);
            let mut at = one.range.start;
            for entry in there {
                let told = Mapping::parse(&one.line);
                let (Some(told), true) = (told, entry.mapping.start <= at) else { break };
                at = entry.mapping.end;
                changes.extend(one.compare(&told, entry)?);
            }
            if at < one.range.end {
                return Err(format!("the mapping {} is gone", one.line));
            }
        }
        changes.dedup();
        Ok(changes)
    }
}

impl ExpectedMapping {
    fn compare(&self, told: &Mapping, now: &SmapsEntry) -> Result<Option<AdviceChange>, String> {
        let is_advice = |flag: &&str| ADVICE.iter().any(|a| a.0 == *flag);
        if now.key == self.key && relevant(&self.flags).eq(relevant(now.flags)) {
            return Ok(None);
        }
        let whole = now.mapping.start <= self.range.start && now.mapping.end >= self.range.end;
        let may = if told.is_shared() { shared_may_be_hidden } else { may_be_hidden };
        if whole && self.hidden && may(told, now.flags, now.key) {
            return Ok(Some(AdviceChange::Hidden(record(told, now.flags))));
        }
        let rest = |flags| relevant(flags).filter(|flag| !is_advice(flag));
        if whole && !self.hidden && now.key == self.key && rest(&self.flags).eq(rest(now.flags)) {
            return Ok(Some(AdviceChange::Seen(self.range.start, advice(now.flags))));
        }
        Err(format!("the mapping {} was {:?} and is {:?}", self.line, self.flags, now.flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory;

    const PLAIN: &str = "rd wr mr mw me ac sd";

    fn line(range: &str, perms: &str, rest: &str) -> String {
        format!("{range} {perms} 00000000 {rest}")
    }

    fn hides(perms: &str, rest: &str, flags: &str, key: u32) -> bool {
        let line = line("10000-20000", perms, rest);
        may_be_hidden(&Mapping::parse(&line).unwrap(), flags, key)
    }

    #[test]
    fn what_a_mapping_is_decides_whether_it_may_be_hidden() {
        for (perms, rest, flags) in [
            ("rw-p", "00:00 0 ", PLAIN),
            ("rw-p", "00:00 0 [heap]", PLAIN),
            ("rw-p", "00:00 0 [anon:a stack]", PLAIN),
            ("---p", "00:00 0 ", "mr mw me nr sd"),
            ("rwxp", "00:00 0 ", "rd wr ex mr mw me ac"),
            ("rw-p", "00:00 0 ", "rd wr mr mw me ac dc wf dd hg sr uw sd gu"),
            ("r--p", "00:00 0 ", "rd mr mw me ac mg nh rr sd"),
        ] {
            assert!(hides(perms, rest, flags, 0), "{perms} {rest} {flags}");
            assert!(!hides(perms, rest, flags, 1), "{perms} {rest} {flags} with a key");
        }

        for (perms, rest, flags) in [
            ("rw-s", "00:00 0 ", "rd wr sh mr mw me ms sd"),
            ("rw-p", "00:00 77 ", PLAIN),
            ("rw-p", "00:2f 0 /on/fuse", PLAIN),
            ("rw-p", "08:01 78 /lib/x", PLAIN),
            ("rw-p", "00:00 0 [stack]", "rd wr mr mw me gd ac"),
            ("r-xp", "00:00 0 [vdso]", "rd ex mr mw me de sd"),
            ("r--p", "00:00 0 [vvar]", "rd mr pf io de dd"),
            ("--xp", "00:00 0 [uprobes]", "ex"),
            ("rw-p", "00:00 0 [made up]", PLAIN),
        ] {
            assert!(!hides(perms, rest, flags, 0), "{perms} {rest} {flags}");
        }

        // Locked, grows down, huge, droppable, a shadow stack, a device's, sealed, watched, or not known.
        for flag in ["lo", "gd", "ht", "dp", "ss", "io", "pf", "sl", "um", "ui", "mt", "xx"] {
            assert!(!hides("rw-p", "00:00 0 ", &format!("{PLAIN} {flag}"), 0), "{flag}");
        }
    }

    fn smaps(entries: &[(&str, &str)]) -> String {
        entries
            .iter()
            .map(|(line, flags)| format!("{line}\nSize: 4 kB\nVmFlags: {flags} \n"))
            .collect()
    }

    fn maps(entries: &[(&str, &str)]) -> String {
        entries.iter().map(|(line, _)| format!("{line}\n")).collect()
    }

    const CODE: (&str, &str) = ("1000-2000 r-xp 00000000 08:01 77 /bin/x", "rd ex mr mw me");
    const HEAP: (&str, &str) = ("3000-5000 rw-p 00000000 00:00 0 [heap]", PLAIN);
    const BIG: (&str, &str) = ("6000-9000 rw-p 00000000 00:00 0 ", "rd wr mr mw me ac hg");
    const THREAD: (&str, &str) = ("a000-c000 rw-p 00000000 00:00 0 ", PLAIN);
    const STACK: (&str, &str) = ("e000-f000 rw-p 00000000 00:00 0 [stack]", "rd wr mr mw me gd ac");
    const HEAP_ABOVE: (&str, &str) = ("10000-12000 rw-p 00000000 00:00 0 [heap]", PLAIN);
    const ALL: [(&str, &str); 5] = [CODE, HEAP, BIG, THREAD, STACK];

    fn ranges(drawn: &Drawn) -> Vec<Range<u64>> {
        drawn.hidden.iter().map(|record| record.range.clone()).collect()
    }

    #[test]
    fn criu_is_shown_the_rest_and_stacks() {
        let known = KnownMappings::parse(&smaps(&ALL)).unwrap();
        assert!(known.is_of(&maps(&ALL)) && !known.is_of(&maps(&ALL[1..])));
        let drawn = known.draw(&maps(&ALL), &[0xb123, 0xe800], &HashSet::new()).unwrap();
        assert_eq!(ranges(&drawn), [0x3000..0x5000, 0x6000..0x9000, 0xa000..0xc000]);
        assert!(drawn.hidden[0].heap && drawn.hidden[1].advice == 1 << libc::MADV_HUGEPAGE);
        let shown = KnownMappings::parse(&drawn.text).unwrap();
        let page = ("0000b000-0000c000 rw-p 00000000 00:00 0 ", PLAIN);
        assert!(shown.is_of(&maps(&[CODE, page, STACK])), "{}", drawn.text);
        assert_eq!((drawn.shown.len(), &drawn.shown[0]), (1, &(0xb000..0xc000)));
        let two =
            known.draw(&maps(&ALL), &[0xa008, 0xb123, 0xb124, 0xc000], &HashSet::new()).unwrap();
        assert_eq!(two.shown, [0xa000..0xb000, 0xb000..0xc000]);
        assert!(!drawn.unsure);
        assert_eq!(drawn.check(&smaps::parse(&smaps(&ALL)).unwrap()), Ok(vec![]));
        assert_eq!(drawn.ranges().count(), 5);
    }

    #[test]
    fn what_has_grown_or_come_apart_is_what_it_was() {
        let known = KnownMappings::parse(&smaps(&ALL)).unwrap();
        let now = [
            ("3000-6000 rw-p 00000000 00:00 0 [heap]", PLAIN),
            ("6000-7000 r--p 00000000 00:00 0 ", "rd mr mw me ac hg"),
            ("8000-9000 rw-p 00000000 00:00 0 ", "rd wr mr mw me ac hg"),
        ];
        let drawn = known.draw(&maps(&now), &[], &HashSet::new()).unwrap();
        assert!(!drawn.unsure);
        assert_eq!(drawn.hidden[1].access, libc::PROT_READ as u64);
        assert_eq!(drawn.hidden[2].advice, 1 << libc::MADV_HUGEPAGE);
        // Two that differ have become one: nobody knows which of them it is like.
        let one = [("3000-9000 rw-p 00000000 00:00 0 ", PLAIN)];
        assert!(known.draw(&maps(&one), &[], &HashSet::new()).unwrap().unsure);
    }

    #[test]
    fn what_is_new_waits_for_the_check_or_is_looked_at() {
        let known = KnownMappings::parse(&smaps(&ALL)).unwrap();
        let new = ("c000-d000 rw-p 00000000 00:00 0 ", "rd wr mr mw me ac nr dd");
        let drawn = known.draw(&maps(&[CODE, new]), &[], &HashSet::new()).unwrap();
        assert!(drawn.unsure);
        let changes = drawn.check(&smaps::parse(&smaps(&[CODE, new])).unwrap()).unwrap();
        let [AdviceChange::Hidden(record)] = &changes[..] else { panic!("{changes:?}") };
        assert!(record.unreserved && record.advice == 1 << libc::MADV_DONTDUMP);
        let locked = (new.0, "rd wr mr mw me lo ac");
        assert!(drawn.check(&smaps::parse(&smaps(&[CODE, locked])).unwrap()).is_err());
        let library = ("c000-d000 r-xp 00000000 08:01 79 /lib/new", "rd ex mr mw me");
        assert!(known.draw(&maps(&[CODE, library]), &[], &HashSet::new()).is_none());
        // The stack of a new thread.
        let drawn = known.draw(&maps(&[CODE, new]), &[0xc800], &HashSet::new()).unwrap();
        assert!(drawn.unsure && drawn.shown.len() == 1);
        assert!(known.draw("nonsense", &[], &HashSet::new()).is_none());
    }

    #[test]
    fn of_shared_memory_all_is_hidden_or_nothing() {
        let flags = "rd wr sh mr mw me ms";
        let device = memory::shared_device().unwrap();
        let device = format!("{:02x}:{:02x}", libc::major(device), libc::minor(device));
        let line = |range: &str, rest: &str| format!("{range} {}", rest.replace("DEV", &device));
        let text = [
            line("1000-5000", "rw-s 00000000 DEV 77 /dev/zero (deleted)"),
            line("6000-7000", "r--s 00002000 DEV 78 /memfd: (deleted)"),
            line("8000-9000", "rw-s 00000000 DEV 79 /memfd:other (deleted)"),
            line("a000-b000", "rw-s 00000000 DEV 80 /SYSV00000000 (deleted)"),
            line("b000-c000", "rw-s 00000000 ff:77 78 /memfd: (deleted)"),
            line("c000-d000", "rw-s 00000000 DEV 81 /dev/zero (deleted)"),
        ];

        let all: Vec<_> = text[..5].iter().map(|line| (&line[..], flags)).collect();
        let known = KnownMappings::parse(&smaps(&all)).unwrap();
        let draw = |stacks: &[u64], shared: &[u64]| {
            known.draw(&maps(&all), stacks, &shared.iter().copied().collect()).unwrap()
        };

        assert_eq!(draw(&[], &[]).hidden.len(), 0);
        let both = draw(&[], &[77, 78, 79, 80]);
        assert_eq!(ranges(&both), [0x1000..0x5000, 0x6000..0x7000]);
        assert_eq!((both.hidden[1].shared, both.hidden[1].offset), (Some(78), 0x2000));
        assert_eq!((both.unseen, both.seen), ([77, 78].into(), [].into()));

        // A thread's stack is in one of them.
        let one = draw(&[0x1234], &[77, 78]);
        assert_eq!((ranges(&one).len(), one.unseen, one.seen), (1, [78].into(), [77].into()));
        assert!(one.shown.is_empty());

        let locked = [(all[0].0, "rd wr sh mr mw me ms lo")];
        let known = KnownMappings::parse(&smaps(&locked)).unwrap();
        let drawn = known.draw(&maps(&locked), &[], &[77].into()).unwrap();
        assert!(drawn.hidden[0].locked && !both.hidden[0].locked);

        // Locked at first touch.
        let later = [(all[0].0, "rd wr sh mr mw me ms lo lf")];
        let known = KnownMappings::parse(&smaps(&later)).unwrap();
        let drawn = known.draw(&maps(&later), &[], &[77].into()).unwrap();
        assert_eq!((drawn.hidden.len(), drawn.seen), (0, [77].into()));
        let free =
            KnownMappings::parse(&smaps(&all)).unwrap().draw(&maps(&all[..1]), &[], &[77].into());
        assert!(free.unwrap().check(&smaps::parse(&smaps(&later)).unwrap()).is_err());

        // Of one that has come since nobody knows the flags.
        let new = (&text[5][..], flags);
        assert!(known.draw(&maps(&[new]), &[], &[81].into()).is_none());
    }

    #[test]
    fn a_changed_flag_is_seen_whoever_has_the_mapping() {
        let known = KnownMappings::parse(&smaps(&ALL)).unwrap();
        let drawn = known.draw(&maps(&ALL), &[], &HashSet::new()).unwrap();
        let with = |i: usize, flags: &'static str| {
            let mut all = ALL;
            all[i].1 = flags;
            let text = smaps(&all);
            drawn.check(&smaps::parse(&text).unwrap())
        };
        let record = |i: usize, advice| MappingRecord { advice, ..drawn.hidden[i].clone() };
        let fork = 1 << libc::MADV_DONTFORK;
        assert_eq!(
            with(1, "rd wr mr mw me ac dc"),
            Ok(vec![AdviceChange::Hidden(record(0, fork))])
        );
        assert_eq!(with(2, PLAIN), Ok(vec![AdviceChange::Hidden(record(1, 0))]));
        assert_eq!(with(0, "rd ex mr mw me dc"), Ok(vec![AdviceChange::Seen(0x1000, fork)]));
        assert!(with(1, "rd wr mr mw me ac lo").is_err());
        assert!(with(0, "rd ex mr mw me lo").is_err());
        assert_eq!(with(1, "rd mr mw me"), Ok(vec![]), "access, of which maps tells");
    }

    #[test]
    fn criu_may_have_its_own_there_and_make_two_of_the_same_one() {
        let two = [
            ("1000-2000 ---p 00000000 00:00 0 ", "mr mw me"),
            ("2000-3000 rw-p 00000000 00:00 0 ", PLAIN),
        ];
        let drawn = KnownMappings::parse(&smaps(&two))
            .unwrap()
            .draw(&maps(&two), &[], &HashSet::new())
            .unwrap();
        let check = |now: &[(&str, &str)]| drawn.check(&smaps::parse(&smaps(now)).unwrap());
        let parasite = ("800-900 r-xs 00000000 00:01 9 /memfd:CRIUMFD", "rd ex sh mr mw me ms");
        assert_eq!(check(&[parasite, ("1000-3000 rw-p 00000000 00:00 0 ", PLAIN)]), Ok(vec![]));
        assert!(check(&[two[0]]).is_err());
        assert!(check(&[("1000-3000 rw-p 00000000 00:00 0 ", "rd wr lo")]).is_err());
        assert!(check(&[("1000-1800 rw-p 00000000 00:00 0 ", PLAIN), two[1]]).is_err());
    }

    #[test]
    fn another_kernels_vdso_is_seen_and_this_ones_left_out() {
        let all = [
            ("1000-5000 r--p 00000000 00:00 0                          [vvar]", "rd mr io de dd"),
            (
                "5000-7000 r--p 00000000 00:00 0                          [vvar_vclock]",
                "rd mr pf io",
            ),
            (
                "7000-9000 r-xp 00000000 00:00 0                          [vdso]",
                "rd ex mr mw me de",
            ),
            HEAP_ABOVE,
            ("30000-34000 r--p 00000000 00:00 0 ", "rd mr mw me dd sd"),
            ("34000-36000 r-xp 00000000 00:00 0 ", "rd ex mr mw me ac sd"),
        ];
        let known = || KnownMappings::parse(&smaps(&all)).unwrap();
        let before = known().draw(&maps(&all), &[], &HashSet::new()).unwrap();
        assert_eq!((ranges(&before).len(), before.ranges().count()), (3, 6));
        let known = known().with_vdso(Some(Foreign { vdso: 0x34000, vvar: 0x30000 }));
        let drawn = known.draw(&maps(&all), &[], &HashSet::new()).unwrap();
        let heap = 0x10000..0x12000;
        assert_eq!(ranges(&drawn), [heap]);
        assert!(drawn.text.contains(all[4].0) && drawn.text.contains(all[5].0), "{}", drawn.text);
        assert_eq!(
            drawn.ranges().map(|range| range.start).collect::<Vec<_>>(),
            [0x10000, 0x30000, 0x34000]
        );
    }

    #[test]
    fn our_own_mappings_are_drawn_whole() {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let known = KnownMappings::parse(&text).unwrap();
        let lines: String =
            smaps::parse(&text).unwrap().iter().map(|e| format!("{}\n", e.line)).collect();
        let drawn = known.draw(&lines, &[], &HashSet::new()).unwrap();
        assert!(!drawn.hidden.is_empty() && !drawn.unsure);
        let shown = KnownMappings::parse(&drawn.text).unwrap();
        assert_eq!(shown.all.len() + drawn.hidden.len(), known.all.len());
    }
}
