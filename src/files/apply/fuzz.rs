//! Steps that no honest source sends: nothing outside the trees is touched, whatever they say.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use super::*;
use crate::files::follow::Follower;
use crate::files::inodes::Inodes;
use crate::files::root::Root;
use crate::fuzz::{Random, Target};

/// Returns what a source says about a tree that changes once.
fn sample() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut follower = Follower::with_window(
        vec![Root::open(dir.path()).unwrap()],
        false,
        Duration::from_millis(1),
    );

    let mut stream = Vec::new();
    let mut round = |last| {
        std::thread::sleep(Duration::from_millis(5));
        follower.round(&Inodes::new(), last, &mut stream, &mut |_| {}).unwrap();
    };

    fs::create_dir(at("d")).unwrap();
    fs::write(at("d/f"), "some contents").unwrap();
    fs::hard_link(at("d/f"), at("g")).unwrap();
    symlink("../canary", at("l")).unwrap();
    symlink("d", at("to-d")).unwrap();
    round(false);
    fs::write(at("d/f"), "other contents").unwrap();
    fs::rename(at("d"), at("e")).unwrap();
    fs::remove_file(at("l")).unwrap();
    fs::write(at("l"), "a file").unwrap();
    round(true);

    stream
}

/// Steps, each with the data behind it.
fn split(mut bytes: &[u8]) -> Option<Vec<(FileStep, Vec<u8>)>> {
    let mut all = Vec::new();
    while let Some(step) = ops::read(&mut bytes).ok()? {
        let length = if let FileStep::Data(_, length) = step { length as usize } else { 0 };
        let (data, rest) = bytes.split_at_checked(length)?;
        all.push((step, data.to_vec()));
        bytes = rest;
    }
    Some(all)
}

/// Names that lead elsewhere, or nowhere.
const PATHS: &[&[u8]] = &[
    b"",
    b".",
    b"..",
    b"../canary",
    b"/etc/hostname",
    b"d",
    b"d/f",
    b"g",
    b"l",
    b"l/x",
    b"to-d",
    b"to-d/f",
    b"to-d/new",
    b"e",
    b"e/f",
    b"e/..",
    b"d/../../canary",
    b"a\0b",
    b"d/",
    b"//",
    b"e/e/e",
];

/// Changes what steps say, or their order, so that they are steps still.
fn lie(bytes: &mut Vec<u8>, random: &mut Random) {
    let Some(mut all) = split(bytes).filter(|all| !all.is_empty()) else { return };
    for _ in 0..=random.below(3) {
        let at = random.below(all.len());
        let path = random.of(PATHS).to_vec();
        let other = random.of(PATHS).to_vec();
        match random.below(9) {
            0 => {
                let to = random.below(all.len());
                all.swap(at, to);
            }
            1 => drop(all.remove(at)),
            2 => all.insert(at, (FileStep::Remove(path), Vec::new())),
            3 => all.insert(at, (FileStep::Rename(path, other), Vec::new())),
            4 => all.insert(
                at,
                (
                    FileStep::Hole(
                        random.next() >> random.below(64),
                        random.next() >> random.below(64),
                    ),
                    Vec::new(),
                ),
            ),
            5 => all.insert(at, (FileStep::Tree(random.below(3) as u32), Vec::new())),
            _ => match &mut all[at].0 {
                FileStep::Make(entry) | FileStep::Change(entry, _) => match random.below(4) {
                    0 => entry.path = path,
                    1 => entry.kind = FileKind::Link(path),
                    2 => entry.kind = FileKind::Symlink(path),
                    _ => {
                        entry.path = path;
                        entry.kind = match random.below(4) {
                            0 => FileKind::Directory,
                            1 => FileKind::Fifo,
                            2 => FileKind::File(random.next() >> random.below(64)),
                            _ => FileKind::Character(random.next()),
                        };
                    }
                },
                FileStep::Data(offset, _) => *offset = random.next() >> random.below(64),
                FileStep::Remove(old) | FileStep::Rename(_, old) => *old = path,
                _ => {}
            },
        }

        if all.is_empty() {
            return;
        }
    }

    bytes.clear();
    for (step, data) in all {
        ops::write(bytes, &step).unwrap();
        bytes.extend(data);
    }
}

/// Where nothing was announced, nothing is taken.
#[test]
fn steps_of_no_tree_are_refused() {
    let mut work =
        ApplyWork { trees: Vec::new(), current: 0, file: None, directories: HashMap::new() };
    let failed = work.all(&mut &sample()[..], &|_| {}).unwrap_err();
    assert_eq!(failed.to_string(), UNKNOWN);
    // Without the step that names a tree, too.
    let mut bytes = Vec::new();
    ops::write(&mut bytes, &FileStep::Remove(b"d".to_vec())).unwrap();
    let failed = work.all(&mut &bytes[..], &|_| {}).unwrap_err();
    assert_eq!(failed.to_string(), UNKNOWN);
}

#[test]
fn fuzz_steps() {
    let outer = tempfile::tempdir().unwrap();
    let canary = outer.path().join("canary");
    fs::write(&canary, "alive").unwrap();
    fs::set_permissions(&canary, fs::Permissions::from_mode(0o640)).unwrap();
    let look = || {
        let meta = fs::symlink_metadata(&canary).unwrap();
        let names = fs::read_dir(outer.path()).unwrap().count();
        (fs::read(&canary).unwrap(), meta.mode(), meta.uid(), meta.mtime(), meta.nlink(), names)
    };

    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    let before = look();
    let left = Size { bytes: 1 << 20, entries: 100 };
    let target = Target::new("steps").sample(sample()).repair(lie).cost(60).room(2 << 20);
    target.run(|bytes| {
        let tree = AppliedTree { root: File::open(&root)?, left, budget: left };
        let mut work =
            ApplyWork { trees: vec![tree], current: 0, file: None, directories: HashMap::new() };
        let done = work.all(&mut &bytes[..], &|_| {});
        drop(work);
        assert_eq!(look(), before, "something outside has changed");
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))?;
        fs::remove_dir_all(&root)?;
        fs::create_dir(&root)?;
        done
    });
}
