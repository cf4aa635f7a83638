//! Whatever a container does to its files between rounds, and while one is made: the last round leaves a
//! copy that is equal, and nothing outside of it has changed.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::tests::{Pair, WINDOW, all};
use super::*;
use crate::files::follow::Follower;
use crate::files::inodes::Inodes;
use crate::files::root::Root;
use crate::fuzz::Random;
use crate::sys::memory::write_through_mapping;

/// A container that does anything to its files.
struct Container {
    root: PathBuf,
    random: Random,
    /// Files that it holds open, under whatever name.
    open: Vec<File>,
    /// Written to through a mapping, or held open: what the hand-over has compared.
    mapped: Inodes,
    /// What it has done, for people.
    done: String,
}

/// Where it lies, seen from within the copy. Beside the original there is nothing of that name, or it
/// would be changed by whoever follows a link there.
const CANARIES: &[&str] = &["../canary", "../../canary", "../../../canary"];

/// A POSIX ACL as the kernel has it in an attribute: rwx for the owner, r-x for group and others. acl(5)
const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255,
    255, 255, 255,
];

impl Container {
    /// One of few names, at one of few depths.
    fn name(&mut self) -> PathBuf {
        let mut path = self.root.clone();
        for _ in 0..=self.random.below(3) {
            path.push(self.random.of(&["a", "b", "a.b", "\u{fc}\n"]));
        }
        path
    }

    fn open(&mut self, path: &Path) -> io::Result<File> {
        // A FIFO would wait, and a device do something.
        let meta = fs::symlink_metadata(path)?;
        if !meta.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        File::options().read(true).write(true).open(path)
    }

    fn size(&mut self) -> u64 {
        let most = *self.random.of(&[1, 100, 5000, 3 << 20]);
        self.random.next() % most
    }

    /// Does something, if it can be done just now.
    fn step(&mut self) {
        let (one, two) = (self.name(), self.name());
        let (size, fill) = (self.size(), self.random.next() as u8);
        let what = self.random.below(30);
        let done: io::Result<()> = (|| match what {
            0..=2 => fs::create_dir_all(&one),
            3..=5 => match fs::symlink_metadata(&one) {
                Ok(meta) if !meta.is_file() => Err(io::ErrorKind::InvalidInput.into()),
                _ => fs::write(&one, vec![fill; size as usize]),
            },
            6 => self.open(&one)?.write_all_at(&[fill; 7000], size),
            7 => self.open(&one)?.set_len(size),
            8 => {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let at = self.random.next() % (3 << 20);
                Ok(fallocate(&self.open(&one)?, flags, at as i64, size as i64 + 1)?)
            }
            9 | 10 => fs::rename(&one, &two),
            11 => {
                let exchange = RenameFlags::RENAME_EXCHANGE;
                Ok(renameat2(AT_FDCWD, &one, AT_FDCWD, &two, exchange)?)
            }
            12 | 13 => fs::hard_link(&one, &two),
            14 => symlink(&one, &two),
            15 => fs::remove_file(&one),
            16 => fs::remove_dir(&one),
            17 if size % 3 == 0 => fs::remove_dir_all(&one),
            // Something else in the place of what was there.
            17..=20 => {
                if fs::symlink_metadata(&one).is_ok() {
                    fs::rename(&one, &two)?;
                }
                let mode = Mode::from_bits_truncate(0o640);
                match what {
                    17 => Ok(mknod(&one, SFlag::S_IFIFO, mode, 0)?),
                    18 => Ok(mknod(&one, SFlag::S_IFCHR, mode, 0x103 + u64::from(fill % 3))?),
                    19 => UnixListener::bind(&one).map(drop),
                    _ => symlink(self.random.of(CANARIES), &one),
                }
            }
            21 | 22 => {
                if fs::symlink_metadata(&one)?.is_symlink() {
                    lchown(&one, Some(fill.into()), Some(7))
                } else {
                    chown(&one, Some(fill.into()), Some(7))?;
                    let mode = *self.random.of(&[0o700, 0o4755, 0o1777, 0o000, 0o664]);
                    fs::set_permissions(&one, fs::Permissions::from_mode(mode))
                }
            }
            23 => xattr::set(&one, "trusted.note", &[fill; 30]),
            24 => xattr::set(&one, "system.posix_acl_default", ACL),
            25 => {
                for name in ["trusted.note", "system.posix_acl_default"] {
                    xattr::remove(&one, name)?;
                }
                Ok(())
            }
            26 => {
                let time = TimeSpec::new(1_000_000 + i64::from(fill), 77);
                Ok(utimensat(AT_FDCWD, &one, &time, &time, UtimensatFlags::NoFollowSymlink)?)
            }
            // Shared memory leaves no trace; such files are compared.
            27 => {
                let file = self.open(&one)?;
                let meta = file.metadata()?;
                let page = meta.len().checked_sub(4096).ok_or(io::ErrorKind::InvalidInput)?;
                self.mapped.insert((meta.dev(), meta.ino()));
                write_through_mapping(&file, (self.random.next() % (page + 1)) & !4095, fill)
            }
            28 => {
                let file = self.open(&one)?;
                let meta = file.metadata()?;
                self.mapped.insert((meta.dev(), meta.ino()));
                self.open.truncate(2);
                self.open.insert(0, file);
                Ok(())
            }
            _ => match self.open.first() {
                Some(file) => file.write_all_at(&[fill; 300], size),
                None => Err(io::ErrorKind::NotFound.into()),
            },
        })();

        // What fails may have been done in part.
        let (short, end) =
            (|path: &Path| format!("{:?}", path.strip_prefix(&self.root)), done.is_ok());
        let _ = write!(self.done, "{what}({}, {}, {size}) {end} ", short(&one), short(&two));
    }
}

/// Everything about what lies beside the copy.
fn outside(outer: &Path, copy: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in walk_all(outer, copy) {
        let meta = fs::symlink_metadata(&entry).unwrap();
        let contents = if meta.is_file() { fs::read(&entry).unwrap() } else { Vec::new() };
        let (mtime, attributes) = (meta.mtime_nsec(), xattr::list(&entry).unwrap().count());
        let (mode, owner, names) = (meta.mode(), meta.uid(), meta.nlink());
        found.push(format!("{entry:?} {mode:o} {owner} {names} {mtime} {attributes} {contents:?}"));
    }
    found
}

fn walk_all(at: &Path, but: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(at).unwrap().map(|entry| entry.unwrap()) {
        if entry.path() != but {
            if entry.file_type().unwrap().is_dir() {
                found.extend(walk_all(&entry.path(), but));
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

fn sequence(seed: u64, listen: bool) {
    // The kernel tells more of some file systems than of others.
    let memory = Path::new("/dev/shm");
    let base = if seed.is_multiple_of(2) && memory.is_dir() {
        memory.into()
    } else {
        std::env::temp_dir()
    };

    let outer = tempfile::tempdir_in(&base).unwrap();
    let canary = outer.path().join("canary");
    fs::create_dir(&canary).unwrap();
    for name in ["a", "b"] {
        fs::write(canary.join(name), "alive").unwrap();
    }

    let from = tempfile::tempdir_in(&base).unwrap();
    let to = tempfile::tempdir_in(outer.path()).unwrap();
    let follower = Follower::with_window(vec![Root::open(from.path()).unwrap()], listen, WINDOW);
    let mut pair = Pair { from, to, follower };
    let before = outside(outer.path(), pair.to.path());
    let mut container = Container {
        root: pair.from.path().to_owned(),
        random: Random(seed),
        open: Vec::new(),
        mapped: Inodes::new(),
        done: String::new(),
    };

    let rounds = 3 + container.random.below(4);
    for round in 0..rounds {
        for _ in 0..container.random.below(40) {
            container.step();
        }

        // Nothing happens any more while the last one is made.
        let last = round == rounds - 1;
        let mapped = container.mapped.clone();
        container.done.push_str(if last { "\nlast " } else { "\nround " });
        let mut meanwhile = |_| {
            if !last && container.random.below(2) == 0 {
                container.step();
            }
        };

        pair.round_while(&mapped, &mut meanwhile);
        let now = outside(outer.path(), pair.to.path());
        assert_eq!(now, before, "seed {seed}, {listen}: {}", container.done);
    }

    let (was, is) = (all(pair.from.path()), all(pair.to.path()));
    let wrong: Vec<_> = was.iter().zip(&is).filter(|(a, b)| a != b).take(4).collect();
    let lengths = (was.len(), is.len());
    assert!(
        wrong.is_empty() && lengths.0 == lengths.1,
        "seed {seed}, {listen}: {wrong:#?} {lengths:?} {}",
        container.done
    );
}

#[test]
fn any_sequence_of_changes_arrives_and_nothing_else_changes() {
    let most = if std::env::var_os("FERRY_FULL").is_some() { 600 } else { 16 };
    for seed in 0..most {
        for listen in [false, true] {
            sequence(seed, listen);
        }
    }
}
