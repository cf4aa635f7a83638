//! What no program is likely to do to a file, and a file system allows: it arrives as it is.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::tests::{Pair, later};
use super::*;
use crate::files::tree::Extents;
use crate::files::walk::{deep, place, reach};

/// Carries what somebody makes, by each of the ways in which changes are found; then what he makes of it.
fn carried(make: impl Fn(&Path), change: impl Fn(&Path)) -> [Pair; 2] {
    Pair::both().map(|mut pair| {
        make(pair.from.path());
        pair.round();
        pair.same();
        later();
        change(pair.from.path());
        pair.round();
        pair.same();
        pair
    })
}

#[test]
fn names_of_255_bytes_arrive() {
    // Every byte that a name may have, and those of which nothing is text.
    let bytes: Vec<u8> = (1..=255).filter(|b| *b != b'/').collect();
    let names = [bytes.clone(), vec![0xff; 255], b"\n".repeat(255), "\u{fc}".repeat(127).into()];
    let at = |root: &Path, name: &[u8]| root.join(OsStr::from_bytes(name));
    let make = |root: &Path| {
        for name in &names {
            fs::create_dir(at(root, name)).unwrap();
            for inner in &names {
                fs::write(at(&at(root, name), inner), inner).unwrap();
            }
        }
        // As long as a link can be; it leads nowhere.
        symlink("x/".repeat(2047) + "y", root.join("link")).unwrap();
    };
    let change = |root: &Path| {
        let (first, second) = (at(root, &names[0]), at(root, &names[1]));
        fs::rename(at(&first, &names[0]), at(&second, &bytes[..254])).unwrap();
        fs::remove_dir_all(at(root, &names[2])).unwrap();
        fs::rename(&second, at(root, &[b'z'; 255])).unwrap();
    };
    carried(make, change);
}

#[test]
fn a_path_longer_than_any_call_takes_arrives() {
    for mut pair in Pair::both() {
        let (names, length) = (200, 100);
        let last = deep(pair.from.path(), names, length);
        let file = |dir: &File| reach(dir, OsStr::new("file"));
        fs::write(file(&last), b"x").unwrap();
        pair.round();
        later();
        fs::write(file(&last), b"something else").unwrap();
        pair.round();
        let path = format!("{}/", "d".repeat(length)).repeat(names) + "file";
        let to = File::open(pair.to.path()).unwrap();
        let (parent, name) = place(&to, path.as_bytes()).unwrap();
        assert_eq!(fs::read(reach(&parent, name.as_os_str())).unwrap(), b"something else");
    }
}

#[test]
fn nothing_and_a_tebibyte_of_it_arrive() {
    const SIZE: u64 = 1 << 40;
    let at = [0, 4096 * 12345, SIZE / 2 + 7, SIZE - 1];
    for mut pair in Pair::both() {
        let (from, to) = (pair.from.path().join("huge"), pair.to.path().join("huge"));
        fs::write(pair.from.path().join("empty"), b"").unwrap();
        let file = File::create(&from).unwrap();
        at.iter().for_each(|at| file.write_all_at(b"x", *at).unwrap());
        for grown in [false, true] {
            if grown {
                later();
                file.set_len(2 * SIZE).unwrap();
                file.write_all_at(b"more", SIZE / 4).unwrap();
            }

            pair.round();
            assert_eq!(fs::read(pair.to.path().join("empty")).unwrap(), b"");
            let copy = File::open(&to).unwrap();
            let size = file.metadata().unwrap().size();
            let extents = |file| Extents::of(file, size).map(Result::unwrap).collect::<Vec<_>>();
            let original = File::open(&from).unwrap();
            assert_eq!(copy.metadata().unwrap().size(), size);
            assert_eq!(extents(&copy), extents(&original));
            for (offset, length) in extents(&copy) {
                let read = |file: &File| {
                    let mut bytes = vec![0; length as usize];
                    file.read_exact_at(&mut bytes, offset).unwrap();
                    bytes
                };
                assert!(read(&copy) == read(&original), "at {offset}");
            }
        }
    }
}

#[test]
fn the_ends_of_time_arrive() {
    let times = [(i32::MIN.into(), 0), (-1, 999_999_999), (0, 0), (0, 1), (15_032_385_535, 1)];
    let set = |path: &Path, (seconds, nanoseconds): (i64, i64)| {
        let time = TimeSpec::new(seconds, nanoseconds);
        utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
    };
    let all = |root: &Path, shift: usize| {
        for (number, _) in times.iter().enumerate() {
            let time = times[(number + shift) % times.len()];
            for kind in ["file", "link", "directory"] {
                set(&root.join(format!("{kind}{number}")), time);
            }
        }
        set(root, times[shift]);
    };

    let make = |root: &Path| {
        for number in 0..times.len() {
            let at = |kind| root.join(format!("{kind}{number}"));
            fs::write(at("file"), b"x").unwrap();
            symlink("x", at("link")).unwrap();
            fs::create_dir(at("directory")).unwrap();
        }
        all(root, 0);
    };
    carried(make, |root| all(root, 1));
}

/// As root only: others may not own what they give away.
#[test]
fn every_mode_and_odd_owners_arrive() {
    const OWNERS: [u32; 5] = [0, 1, 65_534, 1 << 31, u32::MAX - 1];
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };

    // The owner first: to give a file away takes set-user-ID from it.
    let all = |root: &Path, shift: u32| {
        for bits in 0..0o10_000 {
            let owner = |n: u32| Some(OWNERS[(n + shift) as usize % OWNERS.len()]);
            let file = root.join(format!("file{bits:o}"));
            chown(&file, owner(bits), owner(bits / 5)).unwrap();
            mode(&file, (bits + shift) % 0o10_000);
            if bits % 61 == 0 {
                let directory = root.join(format!("directory{bits:o}"));
                chown(&directory, owner(bits / 5), owner(bits)).unwrap();
                mode(&directory, (bits + shift) % 0o10_000);
                lchown(root.join(format!("link{bits:o}")), owner(bits), owner(bits + 1)).unwrap();
            }
        }
    };

    let make = |root: &Path| {
        for bits in 0..0o10_000 {
            fs::write(root.join(format!("file{bits:o}")), b"").unwrap();
            if bits % 61 == 0 {
                fs::create_dir(root.join(format!("directory{bits:o}"))).unwrap();
                symlink("x", root.join(format!("link{bits:o}"))).unwrap();
            }
        }
        all(root, 0);
    };
    carried(make, |root| all(root, 1));
}

#[test]
fn devices_of_every_number_arrive() {
    let numbers = [(0, 0), (1, 3), (4095, 1_048_575), (4095, 0), (0, 1_048_575)];
    let make = |root: &Path| {
        for (major, minor) in numbers {
            for (kind, name) in [(SFlag::S_IFCHR, "c"), (SFlag::S_IFBLK, "b")] {
                let path = root.join(format!("{name}{major}.{minor}"));
                mknod(&path, kind, Mode::S_IRUSR, makedev(major, minor)).unwrap();
            }
        }
    };
    carried(make, |root| fs::rename(root.join("c1.3"), root.join("b1.3")).unwrap());
}

/// As many as go into the one block that ext4 has for those of a file.
#[test]
fn many_attributes_and_names_arrive() {
    let set = |path: &Path, number: usize, value: &[u8]| {
        let name = format!("user.{}{number}", "n".repeat(number % 20));
        xattr::set(path, name, value).unwrap();
    };
    let make = |root: &Path| {
        let file = root.join("file");
        fs::write(&file, b"x").unwrap();
        (0..60).for_each(|number| set(&file, number, &[number as u8; 16]));
        let other = root.join("other");
        fs::create_dir(&other).unwrap();
        xattr::set(&other, format!("user.{}", "x".repeat(250)), &[0xff; 3000]).unwrap();
        xattr::set(&other, "trusted.empty", b"").unwrap();
        for number in 0..1000 {
            fs::hard_link(&file, root.join(format!("name{number}"))).unwrap();
        }
    };

    let change = |root: &Path| {
        let file = root.join("name500");
        (0..30).for_each(|number| set(&file, number, b""));
        xattr::remove(root.join("other"), "trusted.empty").unwrap();
        for number in 0..500 {
            fs::remove_file(root.join(format!("name{number}"))).unwrap();
        }
    };
    carried(make, change);
}
