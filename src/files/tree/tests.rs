//! Trees that are packed and unpacked again, and streams that no honest host sends.

use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::fuzz::{Random, Target};

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut stream = Vec::new();
    pack(from, &mut stream)?;
    unpack(to, &mut stream.as_slice())
}

#[test]
fn everything_comes_back() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (from.path(), to.path());
    fs::create_dir(a.join("d")).unwrap();
    fs::write(a.join("d/plain"), b"hello").unwrap();
    fs::hard_link(a.join("d/plain"), a.join("z-link")).unwrap();
    symlink("../nowhere", a.join("d/sym")).unwrap();

    let odd = OsStr::from_bytes(b"n\xff\n");
    fs::write(a.join(odd), vec![7; 600_000]).unwrap();
    let sparse = File::create(a.join("sparse")).unwrap();
    sparse.write_all_at(b"end", 10 << 20).unwrap();
    nix::unistd::mkfifo(&a.join("fifo"), Mode::from_bits_truncate(0o620)).unwrap();
    fs::set_permissions(a.join("d/plain"), fs::Permissions::from_mode(0o4755)).unwrap();

    let old = TimeSpec::new(1_000_000_000, 123_456_789);
    utimensat(AT_FDCWD, &a.join("d"), &old, &old, UtimensatFlags::NoFollowSymlink).unwrap();
    copy(a, b).unwrap();
    assert_eq!(fs::read(b.join("d/plain")).unwrap(), b"hello");
    assert_eq!(fs::read(b.join(odd)).unwrap(), vec![7; 600_000]);
    assert_eq!(fs::read_link(b.join("d/sym")).unwrap(), Path::new("../nowhere"));

    let (x, y) = (b.join("d/plain").metadata().unwrap(), b.join("z-link").metadata().unwrap());
    assert_eq!((x.ino(), x.nlink(), x.mode() & 0o7777), (y.ino(), 2, 0o4755));
    let s = b.join("sparse").metadata().unwrap();
    assert_eq!(s.size(), (10 << 20) + 3);
    assert!(s.blocks() * 512 < 1 << 20, "the hole is still one");
    assert!(b.join("fifo").metadata().unwrap().file_type().is_fifo());
    let d = b.join("d").metadata().unwrap();
    assert_eq!((d.mtime(), d.mtime_nsec()), (1_000_000_000, 123_456_789));
}

/// More extents than an entry could name, holes that are larger than any disk, and a path that no
/// system call takes.
#[test]
fn nothing_is_too_sparse_or_too_deep() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (from.path(), to.path());
    let holes = File::create(a.join("holes")).unwrap();
    for i in 0..60_000 {
        holes.write_all_at(b"x", i * 8192).unwrap();
    }

    let huge = File::create(a.join("huge")).unwrap();
    huge.set_len(8 << 40).unwrap();
    huge.write_all_at(b"middle", 4 << 40).unwrap();
    let last = crate::files::walk::deep(a, 25, 200);
    fs::write(reach(&last, OsStr::new("file")), b"deep").unwrap();
    copy(a, b).unwrap();
    assert_eq!(fs::read(b.join("holes")).unwrap(), fs::read(a.join("holes")).unwrap());

    let there = File::open(b.join("huge")).unwrap();
    let mut middle = [0; 6];
    there.read_exact_at(&mut middle, 4 << 40).unwrap();
    let there = there.metadata().unwrap();
    assert_eq!((&middle, there.size()), (b"middle", 8 << 40));
    assert!(there.blocks() < 100);

    let path = [format!("{}/", "d".repeat(200)).repeat(25), "file".into()].concat();
    let root = File::open(b).unwrap();
    let (parent, name) = place(&root, path.as_bytes()).unwrap();
    assert_eq!(fs::read(reach(&parent, name.as_os_str())).unwrap(), b"deep");
}

#[test]
fn a_stream_cannot_lead_outside() {
    let to = tempfile::tempdir().unwrap();
    let root = to.path().join("root");
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

    let stream = |list: Vec<FileEntry>| {
        let mut out = Vec::new();
        for e in list {
            let json = serde_json::to_vec(&e).unwrap();
            out.extend((json.len() as u32).to_le_bytes());
            out.extend(json);
        }
        out
    };

    let file = || FileKind::File(0);
    for bad in ["../out", "/out", "a/../../out", "a/./../../out"] {
        let s = stream(vec![entry("a", FileKind::Directory), entry(bad, file())]);
        assert!(unpack(&root, &mut s.as_slice()).is_err(), "{bad}");
        fs::remove_dir_all(&root).unwrap();
        fs::create_dir(&root).unwrap();
    }

    let through =
        stream(vec![entry("s", FileKind::Symlink(b"..".to_vec())), entry("s/out", file())]);
    assert!(unpack(&root, &mut through.as_slice()).is_err());
    let link = stream(vec![entry("l", FileKind::Link(b"../x".to_vec()))]);
    assert!(unpack(&root, &mut link.as_slice()).is_err());
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
}

#[test]
fn a_cut_stream_is_an_error() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(from.path().join("f"), b"contents").unwrap();
    let mut stream = Vec::new();
    pack(from.path(), &mut stream).unwrap();
    stream.truncate(stream.len() - 3);
    assert!(unpack(to.path(), &mut stream.as_slice()).is_err());
}

/// Nothing outside the root is touched, whatever the stream says.
#[test]
fn fuzz_trees() {
    let outer = tempfile::tempdir().unwrap();
    let canary = outer.path().join("canary");
    fs::write(&canary, "alive").unwrap();
    fs::set_permissions(&canary, fs::Permissions::from_mode(0o640)).unwrap();
    let look = || {
        let meta = fs::symlink_metadata(&canary).unwrap();
        let names: Vec<_> =
            fs::read_dir(outer.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        (
            fs::read(&canary).unwrap(),
            meta.mode(),
            meta.uid(),
            meta.mtime(),
            meta.nlink(),
            names.len(),
        )
    };

    let from = outer.path().join("from");
    fs::create_dir(&from).unwrap();
    fs::create_dir(from.join("d")).unwrap();
    fs::write(from.join("d/f"), "some contents").unwrap();
    fs::hard_link(from.join("d/f"), from.join("g")).unwrap();
    symlink("../canary", from.join("l")).unwrap();

    let mut packed = Vec::new();
    pack(&from, &mut packed).unwrap();
    fs::remove_dir_all(&from).unwrap();
    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    let before = look();

    // Lengths of entries are right where there is something that may be one.
    let frame = |bytes: &mut Vec<u8>, _: &mut Random| {
        let starts: Vec<usize> = bytes
            .windows(8)
            .enumerate()
            .filter(|(_, w)| w == b"{\"path\":")
            .map(|(i, _)| i)
            .collect();
        for start in starts.into_iter().filter(|start| *start >= 4) {
            let open = |depth: i32, b: &u8| depth + i32::from(*b == b'{') - i32::from(*b == b'}');
            let depths = bytes[start..].iter().scan(0, |depth, b| {
                *depth = open(*depth, b);
                Some(*depth)
            });
            if let Some(end) = depths.enumerate().find(|(_, depth)| *depth == 0).map(|(i, _)| i) {
                bytes[start - 4..start].copy_from_slice(&(end as u32 + 1).to_le_bytes());
            }
        }
    };

    let words = [
        // `..`, `../canary`, `l/x`
        &b"[46,46]"[..],
        b"[46,46,47,99,97,110,97,114,121]",
        b"[108,47,120]",
        b"[108]",
        b"[]",
        b"[47]",
        b"\"directory\"",
        b"\"fifo\"",
        b"\"socket\"",
        b"{\"character\":259}",
        b"{\"link\":[108]}",
        b"{\"file\":5}",
        b"{\"symlink\":[46,46]}",
    ];

    let target = Target::new("trees").sample(packed).words(&words).repair(frame);
    target.cost(40).room((1 << 20) + 2 * PIECE).run(|bytes| {
        let done = unpack(&root, &mut &bytes[..]);
        assert_eq!(look(), before, "something outside has changed");
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))?;
        fs::remove_dir_all(&root)?;
        fs::create_dir(&root)?;
        done
    });
}
