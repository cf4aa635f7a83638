//! Both ends against each other: whatever happens to a tree happens to its copy.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;
use crate::files::follow::{FileRoundStats, Follower};
use crate::files::inodes::Inodes;
use crate::files::root::Root;
use crate::files::walk::measure;

/// Everything that there is to compare of a tree, by path.
pub(super) fn all(root: &Path) -> Vec<String> {
    fn level(root: &Path, at: &Path, out: &mut Vec<String>, inodes: &mut Vec<u64>) {
        let mut names: Vec<_> = fs::read_dir(at).unwrap().map(|e| e.unwrap().path()).collect();
        names.sort();
        for path in names {
            let m = fs::symlink_metadata(&path).unwrap();
            let seen = inodes.iter().position(|i| *i == m.ino()).unwrap_or_else(|| {
                inodes.push(m.ino());
                inodes.len() - 1
            });
            let kind = m.file_type();
            let contents = if kind.is_file() {
                format!("{:x}", xxhash_rust::xxh3::xxh3_64(&fs::read(&path).unwrap()))
            } else if kind.is_symlink() {
                format!("{:?}", fs::read_link(&path).unwrap())
            } else {
                String::new()
            };

            let attributes: Vec<_> = xattr::list(&path)
                .unwrap()
                .map(|n| (n.clone(), xattr::get(&path, n).unwrap()))
                .collect();
            out.push(format!(
                "{:?} {:o} {} {} {} {}.{} {} {} {seen} {contents} {attributes:?}",
                path.strip_prefix(root).unwrap(),
                m.mode(),
                m.uid(),
                m.gid(),
                if kind.is_dir() { 0 } else { m.size() },
                m.mtime(),
                m.mtime_nsec(),
                m.rdev(),
                if kind.is_dir() { 0 } else { m.nlink() },
            ));

            if kind.is_dir() {
                level(root, &path, out, inodes);
            }
        }
    }

    let mut out = Vec::new();
    let m = fs::metadata(root).unwrap();
    out.push(format!("{:o} {}.{}", m.mode(), m.mtime(), m.mtime_nsec()));
    level(root, root, &mut out, &mut Vec::new());

    out
}

pub(super) struct Pair {
    pub(super) from: tempfile::TempDir,
    pub(super) to: tempfile::TempDir,
    pub(super) follower: Follower,
}

impl Pair {
    /// One whose changes are looked for, and one whose changes the kernel tells.
    pub(super) fn both() -> [Pair; 2] {
        [false, true].map(|listen| Pair::new(tempfile::tempdir().unwrap(), listen))
    }

    fn new(from: tempfile::TempDir, listen: bool) -> Pair {
        let roots = vec![Root::open(from.path()).unwrap()];
        let follower = Follower::with_window(roots, listen, WINDOW);
        Pair { from, to: tempfile::tempdir().unwrap(), follower }
    }

    /// A round; how many bytes of contents went.
    pub(super) fn round(&mut self) -> u64 {
        self.round_with(&Inodes::new())
    }

    pub(super) fn round_with(&mut self, mapped: &Inodes) -> u64 {
        self.stats_of_round(mapped).bytes
    }

    fn stats_of_round(&mut self, mapped: &Inodes) -> FileRoundStats {
        self.round_while(mapped, &mut |_| {})
    }

    /// A round in which something happens whenever some contents have been sent.
    pub(super) fn round_while(
        &mut self,
        mapped: &Inodes,
        meanwhile: &mut dyn FnMut(u64),
    ) -> FileRoundStats {
        let mut stream = Vec::new();
        let stats = self.follower.round(mapped, false, &mut stream, meanwhile).unwrap();
        let size = measure(self.from.path()).unwrap();
        let (tell, heard) = channel();
        let roots = [(self.to.path().to_owned(), size)];
        let applying = Applying::start(&roots, move |a| tell.send(a).unwrap()).unwrap();
        for piece in stream.chunks(100_000) {
            applying.feed(piece).unwrap();
        }
        drop(applying);
        match heard.recv().unwrap() {
            Applied::Round(_) => {}
            Applied::Failed(e) => panic!("{e}"),
        }
        stats
    }

    pub(super) fn same(&self) {
        assert_eq!(all(self.from.path()), all(self.to.path()));
    }
}

/// Enough for the file systems of tests, and quick.
pub(super) const WINDOW: Duration = Duration::from_millis(20);

/// So that a change time says something.
pub(super) fn later() {
    std::thread::sleep(Duration::from_millis(30));
}

#[test]
fn all_kinds_of_changes_arrive() {
    for mut pair in Pair::both() {
        let a = pair.from.path().to_owned();
        fs::create_dir_all(a.join("d/e")).unwrap();
        fs::write(a.join("d/plain"), b"hello").unwrap();
        fs::hard_link(a.join("d/plain"), a.join("z-link")).unwrap();
        fs::write(a.join(OsStr::from_bytes(b"n\xff\n")), vec![7; 600_000]).unwrap();
        fs::write(a.join("big"), vec![1; 5 << 20]).unwrap();
        symlink("../nowhere", a.join("d/sym")).unwrap();
        nix::unistd::mkfifo(&a.join("fifo"), Mode::from_bits_truncate(0o620)).unwrap();
        fs::set_permissions(a.join("d/plain"), fs::Permissions::from_mode(0o4755)).unwrap();

        drop(std::os::unix::net::UnixListener::bind(a.join("socket")).unwrap());
        let sparse = File::create(a.join("sparse")).unwrap();
        sparse.write_all_at(b"end", 10 << 20).unwrap();
        xattr::set(a.join("d"), "user.note", b"x").unwrap();
        later();
        pair.round();
        pair.same();

        let blocks = pair.to.path().join("sparse").metadata().unwrap().blocks();
        assert!(blocks * 512 < 1 << 20, "the hole is still one");
        assert!(pair.to.path().join("socket").metadata().unwrap().file_type().is_socket());
        assert_eq!(pair.round(), 0, "nothing has changed");

        // One block of many; a file that gets shorter and longer; holes and the end of holes.
        let big = File::options().write(true).open(a.join("big")).unwrap();
        big.write_all_at(b"changed", 3 << 20).unwrap();
        sparse.write_all_at(b"middle", 5 << 20).unwrap();
        fs::write(a.join("d/plain"), b"hell").unwrap();
        xattr::remove(a.join("d"), "user.note").unwrap();
        later();

        let bytes = pair.round();
        assert!(bytes < 5 * 4096, "{bytes}");
        pair.same();
        big.set_len(4 << 20).unwrap();
        sparse.set_len(0).unwrap();
        sparse.set_len(6 << 20).unwrap();
        later();
        pair.round();
        pair.same();

        // Names that move, appear and go; a directory where a file was, and the reverse.
        fs::rename(a.join("d/e"), a.join("e2")).unwrap();
        fs::rename(a.join("z-link"), a.join("a-link")).unwrap();
        fs::hard_link(a.join("a-link"), a.join("e2/third")).unwrap();
        fs::remove_file(a.join("fifo")).unwrap();
        fs::create_dir(a.join("fifo")).unwrap();
        fs::write(a.join("fifo/in"), b"in").unwrap();
        fs::remove_file(a.join("d/sym")).unwrap();
        fs::write(a.join("d/sym"), b"a file now").unwrap();

        later();
        pair.round();
        pair.same();
        fs::remove_dir_all(a.join("fifo")).unwrap();
        fs::write(a.join("fifo"), b"a file again").unwrap();

        // Replaced as an editor does it, under two names.
        fs::write(a.join("new"), b"replaced").unwrap();
        fs::rename(a.join("new"), a.join("d/plain")).unwrap();
        later();
        pair.round();
        pair.same();

        // Links that lead elsewhere under the same inode number, or with a directory in their place.
        symlink("one", a.join("l")).unwrap();
        symlink("one", a.join("l2")).unwrap();
        later();
        pair.round();
        for name in ["l", "l2"] {
            fs::remove_file(a.join(name)).unwrap();
            symlink("two", a.join(name)).unwrap();
        }

        later();
        pair.round();
        pair.same();
        fs::rename(a.join("d"), a.join("d.old")).unwrap();
        symlink("e2", a.join("d")).unwrap();
        later();
        pair.round();
        pair.same();
        fs::remove_file(a.join("d")).unwrap();

        fs::create_dir(a.join("d")).unwrap();
        fs::write(a.join("d/plain"), b"another").unwrap();
        later();
        pair.round();
        pair.same();
        fs::remove_dir_all(a.join("d")).unwrap();
        later();
        pair.round();
        pair.same();
    }
}

/// A file system that this thread alone sees: the kernel tells of everything on a file system, and
/// a queue that others fill, as tests do that run beside this one, tells of nothing.
struct OwnFileSystem(tempfile::TempDir);

impl OwnFileSystem {
    fn mount() -> OwnFileSystem {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};

        let none = None::<&str>;
        let dir = tempfile::tempdir().unwrap();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(none, dir.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        OwnFileSystem(dir)
    }
}

impl Drop for OwnFileSystem {
    fn drop(&mut self) {
        nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn only_what_the_kernel_tells_of_is_looked_at() {
    let own = OwnFileSystem::mount();
    let from = tempfile::tempdir_in(own.0.path()).unwrap();
    let mut pair = Pair::new(from, true);
    let a = pair.from.path().to_owned();
    fs::create_dir(a.join("many")).unwrap();
    for i in 0..1000 {
        fs::write(a.join(format!("many/{i}")), b"x").unwrap();
    }

    pair.round();
    fs::write(a.join("many/7"), b"y").unwrap();
    let stats = pair.stats_of_round(&Inodes::new());
    // The directory, too, if it was looked at soon after it had changed.
    assert!(stats.told && stats.entries < 5 && matches!(stats.changed, 1 | 2), "{stats:?}");
    pair.same();

    // A large file that has another name is not sent again.
    fs::write(a.join("log"), vec![3; 5 << 20]).unwrap();
    pair.round();
    fs::rename(a.join("log"), a.join("many/old")).unwrap();
    assert_eq!(pair.round(), 0);
    pair.same();

    // What happens below a directory that was moved is told under its new name.
    fs::rename(a.join("many"), a.join("all")).unwrap();
    pair.round();
    fs::write(a.join("all/8"), b"z").unwrap();
    let stats = pair.stats_of_round(&Inodes::new());
    assert!(stats.told && stats.entries < 5, "{stats:?}");
    pair.same();
}

/// The container's root cannot have files of the host copied by swapping a directory for a link.
#[test]
fn a_link_in_the_place_of_a_directory_leads_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    for mut pair in Pair::both() {
        let a = pair.from.path().to_owned();
        fs::create_dir_all(a.join("d")).unwrap();
        fs::write(a.join("d/secret"), b"harmless").unwrap();
        let (swapped, there) = (a.clone(), outside.path().to_owned());
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let swapping = std::thread::spawn(move || {
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(swapped.join("d"), swapped.join("e")).unwrap();
                symlink(&there, swapped.join("d")).unwrap();
                fs::remove_file(swapped.join("d")).unwrap();
                fs::rename(swapped.join("e"), swapped.join("d")).unwrap();
            }
        });

        for _ in 0..MAX_ROUNDS - 4 {
            pair.round();
            for name in ["d", "e"] {
                let path = pair.to.path().join(name);
                if fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir())
                    && let Ok(text) = fs::read(path.join("secret"))
                {
                    assert_eq!(text, b"harmless");
                }
            }
        }

        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        swapping.join().unwrap();
        later();
        pair.round();
        pair.same();
    }
}

/// A large file under two names, one after the other, in one round and the next.
#[test]
fn sums_of_a_moved_file_say_nothing_of_its_other_copy() {
    for mut pair in Pair::both() {
        let a = pair.from.path().to_owned();
        fs::write(a.join("m"), vec![1; 3 << 20]).unwrap();
        later();
        pair.round();
        let file = File::options().write(true).open(a.join("m")).unwrap();
        for (i, (from, to)) in [("m", "z"), ("z", "a"), ("a", "m")].into_iter().enumerate() {
            file.write_all_at(b"changed", (i as u64) << 20).unwrap();
            fs::rename(a.join(from), a.join(to)).unwrap();
            fs::hard_link(a.join(to), a.join("q")).unwrap();
            later();
            pair.round();
            pair.same();
            fs::remove_file(a.join("q")).unwrap();
        }
    }
}

#[test]
fn a_change_that_came_too_soon_after_the_look_is_not_missed() {
    for mut pair in Pair::both() {
        let a = pair.from.path().to_owned();
        for i in 0..50u8 {
            fs::write(a.join("f"), [i; 100]).unwrap();
            pair.round();
            assert_eq!(fs::read(pair.to.path().join("f")).unwrap(), [i; 100]);
        }
    }
}

#[test]
fn what_is_written_through_a_mapping_is_compared() {
    for mut pair in Pair::both() {
        let path = pair.from.path().join("mapped");
        fs::write(&path, vec![1; 3 << 20]).unwrap();
        later();
        pair.round();
        // As a mapping does it: the contents change, the times do not.
        let before = path.metadata().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"secretly", 1 << 20).unwrap();
        let key = b"mapped".to_vec();
        let now = path.metadata().unwrap();
        let known = pair.follower.known_for_test(0, &key);
        *known = Some((now.ctime(), now.ctime_nsec(), before.size()));
        later();
        assert_eq!(pair.round(), 0);
        let mapped = Inodes::from([(before.dev(), before.ino())]);
        assert_eq!(pair.round_with(&mapped), 4096);
        pair.same();
    }
}

#[test]
fn a_stream_cannot_lead_outside_or_beyond_what_was_announced() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    let entry = |path: &str, kind| FileEntry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        mtime: (0, 0),
        attributes: Vec::new(),
    };

    let apply = |steps: Vec<FileStep>| {
        let mut stream = Vec::new();
        for step in steps {
            ops::write(&mut stream, &step).unwrap();
            if let FileStep::Data(_, n) = step {
                stream.extend(vec![1; n as usize]);
            }
        }

        let (tell, heard) = channel();
        let roots = [(root.clone(), Size::default())];
        let applying = Applying::start(&roots, move |a| drop(tell.send(a))).unwrap();
        let _ = applying.feed(&stream);
        drop(applying);
        heard.iter().any(|a| matches!(a, Applied::Failed(_)))
    };

    let file = |size| FileKind::File(size);
    for bad in ["../out", "/out", "a/../../out"] {
        assert!(apply(vec![FileStep::Make(entry(bad, file(0)))]), "{bad}");
        assert!(apply(vec![FileStep::Remove(bad.into())]), "{bad}");
        assert!(apply(vec![FileStep::Rename(bad.into(), b"in".to_vec())]), "{bad}");
        let dir = FileStep::Make(entry("d", FileKind::Directory));
        assert!(apply(vec![dir, FileStep::Rename(b"d".to_vec(), bad.into())]), "{bad}");
        assert!(apply(vec![FileStep::Change(entry(bad, FileKind::Directory), false)]), "{bad}");
        assert!(apply(vec![FileStep::Make(entry("l", FileKind::Link(bad.into())))]), "{bad}");
    }

    assert!(apply(vec![
        FileStep::Make(entry("s", FileKind::Symlink(b"..".to_vec()))),
        FileStep::Make(entry("s/out", file(0))),
    ]));
    symlink("/", root.join("t")).unwrap();
    assert!(apply(vec![FileStep::Change(entry("t", file(0)), true)]));
    assert!(apply(vec![FileStep::Make(entry("f", file(1))), FileStep::Data(1, 1)]));
    assert!(apply(vec![FileStep::Data(0, 1)]));
    assert!(apply(vec![FileStep::Tree(1)]));

    let mut much = vec![FileStep::Make(entry("big", file(2 << 30)))];
    much.extend((0..8193).map(|i| FileStep::Data(i * BLOCK as u64, BLOCK as u32)));
    assert!(apply(much));
    let mut many = Vec::new();
    for i in 0..100_001 {
        many.push(FileStep::Make(entry(&format!("n{}", i % 7), FileKind::Fifo)));
    }
    assert!(apply(many));
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
}

/// Nobody tells of a file under a name that is gone again, but that it had one.
#[test]
fn what_is_written_under_a_name_that_is_gone_is_not_missed() {
    for mut pair in Pair::both() {
        let a = pair.from.path().to_owned();
        fs::write(a.join("f"), b"before").unwrap();
        later();
        pair.round();
        fs::hard_link(a.join("f"), a.join("g")).unwrap();
        fs::write(a.join("g"), b"behind").unwrap();
        fs::remove_file(a.join("g")).unwrap();
        later();
        pair.round();
        pair.same();
    }
}

/// Two names change places, as renameat2(2) does it.
fn exchange(one: &Path, two: &Path) {
    let at = nix::fcntl::AT_FDCWD;
    nix::fcntl::renameat2(at, one, at, two, nix::fcntl::RenameFlags::RENAME_EXCHANGE).unwrap();
}

#[test]
fn what_is_in_a_renamed_directory_does_not_go_again() {
    for mut pair in Pair::both() {
        let a = pair.from.path().to_owned();
        for (dir, fill) in [("one", 1), ("two", 2), ("three", 3), ("p/q/r", 4)] {
            fs::create_dir_all(a.join(dir).join("sub/deep")).unwrap();
            for i in 0..20 {
                fs::write(a.join(dir).join(format!("f{i}")), vec![fill; 9000]).unwrap();
                fs::write(a.join(dir).join(format!("sub/deep/f{i}")), vec![fill; 500]).unwrap();
            }
            let sub = a.join(dir).join("sub");
            fs::hard_link(sub.join("deep/f1"), sub.join("other")).unwrap();
        }

        later();
        pair.round();
        let mut free = |what: &str| {
            later();
            assert_eq!(pair.round(), 0, "{what}");
            pair.same();
        };

        let mv = |from: &str, to: &str| fs::rename(a.join(from), a.join(to)).unwrap();
        mv("one", "uno");
        free("another name");
        mv("uno", "p/uno");
        free("another place");
        mv("p/uno", "zzz");
        free("back, behind all");
        exchange(&a.join("zzz"), &a.join("two"));
        free("two that change places");

        exchange(&a.join("three"), &a.join("two/sub"));
        free("at different depths");
        mv("p/q/r", "r");
        mv("p", "r/p");
        free("inside out");

        // Rotated, as logs and backups are.
        mv("two", "three.old");
        mv("zzz", "two");
        fs::create_dir(a.join("zzz")).unwrap();
        free("one makes room for the next");

        // Out of a directory that goes.
        mv("r/sub", "saved");
        fs::remove_dir_all(a.join("r")).unwrap();
        free("what is left of one that is gone");

        // A file where it was, and a directory where a file was.
        mv("saved", "kept");
        fs::write(a.join("saved"), b"").unwrap();
        fs::remove_file(a.join("two/f3")).unwrap();
        mv("kept/deep", "two/f3");
        free("kinds that change");

        // And with all that, changes in them.
        mv("two", "new");
        fs::write(a.join("new/f4"), b"changed").unwrap();
        fs::remove_file(a.join("new/f5")).unwrap();
        fs::write(a.join("new/added"), b"added").unwrap();
        fs::remove_file(a.join("new/f3/f2")).unwrap();
        xattr::set(a.join("new"), "user.note", b"x").unwrap();
        later();

        let bytes = pair.round();
        assert!(bytes <= 100, "{bytes}");
        pair.same();

        // In the place of what is known under its name, which is gone for good.
        fs::remove_dir_all(a.join("three.old")).unwrap();
        fs::rename(a.join("new"), a.join("three.old")).unwrap();
        later();
        assert_eq!(pair.round(), 0);
        pair.same();
        assert!(all(pair.to.path()).iter().all(|l| !l.contains(".ferry-")));
    }
}

#[test]
fn a_single_file_is_a_tree_too() {
    for listen in [false, true] {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hosts = here.path().join("hosts");
        fs::write(&hosts, b"127.0.0.1 localhost").unwrap();
        fs::set_permissions(&hosts, fs::Permissions::from_mode(0o4640)).unwrap();
        fs::write(here.path().join("other"), b"is not asked for").unwrap();
        let size = measure(&hosts).unwrap();
        assert_eq!(size.entries, 1);

        let mut follower = Follower::with_window(vec![Root::open(&hosts).unwrap()], listen, WINDOW);
        let (tell, heard) = channel();
        let roots = [(there.path().to_owned(), size)];
        let applying = Applying::start(&roots, move |a| tell.send(a).unwrap()).unwrap();
        let mut round = |last| {
            let mut stream = Vec::new();
            let result = follower.round(&Inodes::new(), last, &mut stream, &mut |_| {});
            if result.is_ok() {
                applying.feed(&stream).unwrap();
                assert!(matches!(heard.recv().unwrap(), Applied::Round(_)));
            }
            result.map(|stats| stats.bytes)
        };

        let copy = there.path().join("file");
        let mode = there.path().metadata().unwrap().mode();
        later();
        assert_eq!(round(false).unwrap(), 19);
        assert_eq!(round(false).unwrap(), 0);

        // The copy has another name by now.
        let place = here.path().join("place");
        fs::hard_link(&copy, &place).unwrap();
        fs::write(&hosts, b"::1 localhost").unwrap();
        xattr::set(&hosts, "user.note", b"x").unwrap();
        later();
        assert_eq!(round(true).unwrap(), 13);
        assert_eq!(fs::read(&place).unwrap(), b"::1 localhost");

        let (one, two) = (hosts.metadata().unwrap(), place.metadata().unwrap());
        assert_eq!((one.mode(), one.mtime_nsec()), (two.mode(), two.mtime_nsec()));
        assert_eq!(xattr::get(&place, "user.note").unwrap().unwrap(), b"x");
        assert_eq!(fs::read_dir(there.path()).unwrap().count(), 1);
        assert_eq!(there.path().metadata().unwrap().mode(), mode, "its directory is not copied");

        // As an editor does it: the container does not have what is at the path now.
        fs::write(here.path().join("new"), b"another").unwrap();
        fs::rename(here.path().join("new"), &hosts).unwrap();
        let e = round(true).unwrap_err();
        assert!(e.to_string().contains("hosts was replaced"), "{e:#}");
        fs::remove_file(&hosts).unwrap();
        assert!(round(true).is_err());
    }
}

/// Holes cost nothing: neither time, nor memory, nor a word on the link.
#[test]
fn a_hole_of_many_terabytes_is_nothing() {
    for mut pair in Pair::both() {
        let path = pair.from.path().join("huge");
        let file = File::create(&path).unwrap();
        file.set_len(8 << 40).unwrap();
        file.write_all_at(&[1; 10_000], 3 << 40).unwrap();
        later();
        let first = pair.stats_of_round(&Inodes::new());
        assert!(first.bytes <= 12_288 && first.read <= 12_288, "{first:?}");

        let there = File::open(pair.to.path().join("huge")).unwrap();
        let look = |at, expected: u8| {
            let mut byte = [7];
            there.read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte, [expected], "at {at}");
        };

        look((3 << 40) + 9_999, 1);
        // Data in other places, and a hole where there was some.
        file.write_all_at(b"x", 1 << 40).unwrap();
        file.write_all_at(b"y", (5 << 40) + 1).unwrap();
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, (3 << 40) + 4096, 4096).unwrap();
        later();

        let second = pair.stats_of_round(&Inodes::new());
        assert!(second.bytes <= 2 * 4096, "{second:?}");
        for (at, byte) in
            [(1 << 40, b'x'), ((5 << 40) + 1, b'y'), (3 << 40, 1), ((3 << 40) + 5000, 0)]
        {
            look(at, byte);
        }

        assert!(there.metadata().unwrap().blocks() < 100);
        later();
        pair.round();
        assert_eq!(pair.round(), 0);
    }
}

/// As many pieces as a file may have, each of which is to be remembered.
#[test]
fn many_pieces_are_told_apart() {
    for mut pair in Pair::both() {
        let file = File::create(pair.from.path().join("pieces")).unwrap();
        for i in 0..2000_u64 {
            file.write_all_at(&i.to_le_bytes(), i * 12_288).unwrap();
        }
        later();
        pair.round();
        pair.same();
        file.write_all_at(b"changed", 1000 * 12_288).unwrap();
        file.write_all_at(b"new", 1500 * 12_288 + 8192).unwrap();
        later();
        assert_eq!(pair.round(), 2 * 4096);
        pair.same();
        file.set_len(900 * 12_288 + 3).unwrap();
        later();
        assert!(pair.round() <= 4096);
        pair.same();
    }
}

#[test]
fn a_path_that_no_system_call_takes_arrives() {
    for mut pair in Pair::both() {
        let last = crate::files::walk::deep(pair.from.path(), 25, 200);
        fs::write(crate::files::walk::reach(&last, OsStr::new("file")), b"deep").unwrap();
        later();
        pair.round();
        fs::write(crate::files::walk::reach(&last, OsStr::new("file")), b"deeper").unwrap();
        later();
        assert_eq!(pair.round(), 6);
        let path = [format!("{}/", "d".repeat(200)).repeat(25), "file".into()].concat();
        let root = File::open(pair.to.path()).unwrap();
        let (parent, name) = crate::files::walk::place(&root, path.as_bytes()).unwrap();
        let there = crate::files::walk::reach(&parent, name.as_os_str());
        assert_eq!(fs::read(there).unwrap(), b"deeper");
        fs::remove_dir_all(pair.from.path().join("d".repeat(200))).unwrap();
        later();
        pair.round();
        assert_eq!(fs::read_dir(pair.to.path()).unwrap().count(), 0);
    }
}
