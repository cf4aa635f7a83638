//! Trees that are changed at random, between rounds and while one is made.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};

use super::tests::{Pair, later};
use super::*;
use crate::files::inodes::Inodes;

/// Whatever is done between two rounds, or while one is made, the last one brings the rest.
#[test]
fn anything_may_happen_at_any_time() {
    for seed in 0..6u64 {
        for mut pair in Pair::both() {
            let a = pair.from.path().to_owned();
            let mut random = Random(seed * 2 + 1);
            for _ in 0..30 {
                random.change(&a);
            }
            for _ in 0..6 {
                let (there, mut other) = (a.clone(), Random(random.next() | 1));
                let changing = std::thread::spawn(move || {
                    for _ in 0..30 {
                        other.change(&there);
                    }
                });
                pair.round();
                changing.join().unwrap();
            }
            pair.round();
            pair.same();
        }
    }
}

/// Written to in every way, a page here and there, while it is read.
#[test]
fn a_very_large_file_is_the_same_in_the_end() {
    const SIZE: u64 = 70 << 20;
    for mut pair in Pair::both() {
        let path = pair.from.path().join("large");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let piece: Vec<u8> = (0..1 << 20).map(|i: u32| (i ^ (i >> 8)) as u8).collect();
        for i in 0..70 {
            file.write_all_at(&piece, i << 20).unwrap();
        }

        let meta = file.metadata().unwrap();
        let mapped = Inodes::from([(meta.dev(), meta.ino())]);
        let mut random = Random(7);
        pair.round();
        for round in 0..8 {
            let (changed, mut other) = (path.clone(), Random(random.next() | 1));
            let changing = std::thread::spawn(move || {
                for _ in 0..100 {
                    change_in(&changed, &mut other, SIZE, round > 4);
                }
            });
            pair.round_with(&mapped);
            changing.join().unwrap();
        }

        pair.round_with(&mapped);
        pair.same();
    }
}

/// Directories that change places all the time, and between two rounds only.
#[test]
fn directories_may_change_places_at_any_time() {
    for seed in 0..4u64 {
        for mut pair in Pair::both() {
            let a = pair.from.path().to_owned();
            let mut random = Random(seed * 2 + 1);
            for i in 0..60 {
                random.change_place(&a, i);
            }

            for round in 0..10 {
                let (there, mut other) = (a.clone(), Random(random.next() | 1));
                let changing = std::thread::spawn(move || {
                    for i in 0..20 {
                        other.change_place(&there, 100 + round * 20 + i);
                    }
                });

                if round % 2 == 0 {
                    changing.join().unwrap();
                    later();
                    pair.round();
                    pair.same();
                } else {
                    pair.round();
                    changing.join().unwrap();
                }
            }

            pair.round();
            pair.same();
        }
    }
}

fn change_in(path: &Path, random: &mut Random, size: u64, layout: bool) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let at = random.next() % (size - 8192);
    let page = at & !4095;
    let fill = random.next() as u8;

    match random.next() % if layout { 8 } else { 4 } {
        0 => file.write_all_at(&[fill; 10], at).unwrap(),
        1 => {
            file.write_all_at(&[fill; 5000], at).unwrap();
            file.sync_data().unwrap();
        }
        2 if layout => {
            let direct = File::options().write(true).custom_flags(libc::O_DIRECT).open(path);
            #[repr(align(4096))]
            struct Page([u8; 4096]);
            // Not every file system can.
            if let Ok(file) = direct {
                let _ = file.write_all_at(&Page([fill; 4096]).0, page);
            }
        }
        2 | 3 => {
            crate::sys::memory::write_through_mapping(&file, page, fill).unwrap();
        }
        4 => {
            let _ = fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, page as i64, 8192);
        }
        5 => {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(&file, punch, at as i64, 7000);
        }
        6 => {
            let (collapse, insert) =
                (FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, FallocateFlags::FALLOC_FL_INSERT_RANGE);
            if fallocate(&file, collapse, page as i64, 4096).is_ok() {
                fallocate(&file, insert, 0, 4096).unwrap();
            }
        }
        _ => {
            file.set_len(size - random.next() % 100_000).unwrap();
            file.set_len(size).unwrap();
        }
    }
}

/// xorshift64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    /// One of few names, at one of few depths.
    fn path(&mut self, root: &Path) -> PathBuf {
        let mut path = root.to_owned();
        for _ in 0..=self.next() % 3 {
            path.push(["a", "b", "a.b", "c"][self.next() as usize % 4]);
        }
        path
    }

    /// Does something, if it can be done just now.
    fn change(&mut self, root: &Path) {
        let (one, two) = (self.path(root), self.path(root));
        let size = if self.next().is_multiple_of(4) { 3 << 20 } else { 100 };
        let _ = match self.next() % 10 {
            0 | 1 => fs::create_dir_all(&one),
            2 => fs::write(&one, vec![self.next() as u8; size]),
            3 => fs::rename(&one, &two),
            4 => fs::hard_link(&one, &two),
            5 => fs::remove_file(&one),
            6 if self.next().is_multiple_of(3) => fs::remove_dir_all(&one),
            7 => symlink(&one, &two),
            8 => File::options()
                .write(true)
                .open(&one)
                .and_then(|f| f.write_all_at(&[self.next() as u8; 10], self.next() % (4 << 20))),
            _ => File::options()
                .write(true)
                .open(&one)
                .and_then(|f| f.set_len(self.next() % (4 << 20))),
        };
    }

    /// Makes, moves, fills or removes directories, if it can be done just now.
    fn change_place(&mut self, root: &Path, number: u64) {
        let (one, two) = (self.path(root), self.path(root));
        let at = nix::fcntl::AT_FDCWD;
        let _ = match self.next() % 12 {
            0 | 1 => fs::create_dir_all(&one),
            2 | 3 => fs::write(one.join(format!("f{number}")), number.to_string()),
            4..=6 => fs::rename(&one, &two),
            7 | 8 => {
                let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                nix::fcntl::renameat2(at, &one, at, &two, exchange).map_err(io::Error::from)
            }
            9 => {
                fs::hard_link(one.join(format!("f{}", number.saturating_sub(1))), two.join("link"))
            }
            10 => fs::remove_dir_all(&one),
            _ => fs::write(&one, vec![7; 2 << 20]),
        };
    }
}
