//! hostile-tricks: a container that wants to get out of itself by being migrated.
//!
//! Each argument is a trick, which goes on until the program ends. When all are under way it makes the
//! file `/ready`.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// What a terminal would obey, and what looks like Ferry's own words.
const FORGED: &str = "a\x1b]0;OWNED\x07\u{9b}31m\rferry: fine\nhint: run rm";

fn main() -> ExitCode {
    for trick in std::env::args_os().skip(1) {
        if let Err(error) = play(&trick) {
            let _ = fs::write("/failed", format!("{}: {error}", trick.to_string_lossy()));
            return ExitCode::FAILURE;
        }
    }
    let ready = fs::write("/ready", "");
    if ready.is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn play(trick: &OsStr) -> io::Result<()> {
    match trick.as_bytes() {
        b"sparse" => sparse(),
        b"deep" => deep(Path::new("/")).and_then(|()| deep(Path::new("/dev/shm"))),
        b"bottomless" => {
            File::create("/dev/shm/shallow")?;
            descend(Path::new("/dev/shm"), 300, 1)
        }
        b"extents" => extents(),
        b"names" => names(),
        b"nameless" => nameless(),
        b"shared" => shared_memory(),
        b"swaps" => swaps(),
        b"devices" => devices(),
        b"log" => log(),
        b"maps" => maps(),
        b"volume" => volume(),
        b"volume-race" => exchange_for_ever("/v/sub", "/v/link", || symlink("/etc", "/v/link")),
        _ => Err(io::Error::other("no such trick")),
    }
}

/// A hole that is larger than most disks.
fn sparse() -> io::Result<()> {
    let file = File::create("/sparse")?;
    file.set_len(8 << 40)?;
    file.write_all_at(b"middle", 4 << 40)
}

/// A path that no system call takes.
fn deep(root: &Path) -> io::Result<()> {
    descend(root, 25, 200)
}

/// Directories in each other, with a file in the last.
fn descend(root: &Path, levels: usize, length: usize) -> io::Result<()> {
    std::env::set_current_dir(root)?;
    let name = "d".repeat(length);
    for _ in 0..levels {
        fs::create_dir(&name)?;
        std::env::set_current_dir(&name)?;
    }
    fs::write("file", "deep")?;
    std::env::set_current_dir("/")
}

/// Many pieces of data with holes between them, in memory.
fn extents() -> io::Result<()> {
    let file = File::create("/tmp/extents")?;
    for i in 0..3000_u64 {
        file.write_all_at(&i.to_le_bytes(), i * 8192)?;
    }
    Ok(())
}

/// Names that are no text, or too much of one.
fn names() -> io::Result<()> {
    fs::create_dir("/names")?;
    let at = |name: &str| Path::new("/names").join(name);
    fs::write(at(FORGED), "x")?;
    fs::write(Path::new("/names").join(OsStr::from_bytes(b"n\xff")), "y")?;
    symlink("/etc/shadow", at("shadow"))?;
    symlink("../../../../../../etc", at("up"))?;
    fs::hard_link(at(FORGED), at("other"))
}

/// A large file that has lost its name, which is told to whoever migrates.
fn nameless() -> io::Result<()> {
    let path = Path::new("/").join(FORGED.replace('/', ""));
    let file = File::create(&path)?;
    file.set_len(65 << 20)?;
    fs::remove_file(&path)?;
    // Open until the end.
    let _ = file.into_raw_fd();
    Ok(())
}

/// Memory that is shared and has no name: CRIU puts it among its images.
fn shared_memory() -> io::Result<()> {
    let length = 96 << 20;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, nowhere in particular.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for page in (0..length).step_by(4096) {
        // SAFETY: within the mapping, which stays.
        unsafe { at.cast::<u8>().add(page).write(page as u8 | 1) };
    }
    Ok(())
}

/// Exchanges two names as fast as it can; `make` makes the second one. renameat2(2)
fn exchange_for_ever(
    one: &'static str,
    other: &'static str,
    make: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    make()?;
    std::thread::spawn(move || {
        let (one, other) = (CString::new(one).unwrap(), CString::new(other).unwrap());
        loop {
            // SAFETY: both are C strings, which the kernel only reads.
            unsafe {
                libc::renameat2(
                    libc::AT_FDCWD,
                    one.as_ptr(),
                    libc::AT_FDCWD,
                    other.as_ptr(),
                    libc::RENAME_EXCHANGE,
                );
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    Ok(())
}

/// Files and directories that are something else a moment later.
fn swaps() -> io::Result<()> {
    fs::create_dir_all("/swaps/directory")?;
    fs::write("/swaps/directory/passwd", "mine")?;
    exchange_for_ever("/swaps/directory", "/swaps/etc", || symlink("/etc", "/swaps/etc"))?;
    for (name, other) in [("file", "link"), ("one", "fifo"), ("first", "second")] {
        let at = |name: &str| -> &'static str { format!("/swaps/{name}").leak() };
        fs::write(at(name), vec![b'x'; 100_000])?;
        exchange_for_ever(at(name), at(other), || match other {
            "link" => symlink("/etc/passwd", at(other)),
            "fifo" => node(at(other), libc::S_IFIFO | 0o600, 0),
            _ => fs::write("/swaps/third", "z")
                .and_then(|()| fs::hard_link("/swaps/third", at(other))),
        })?;
    }
    Ok(())
}

/// The same with a device, which would do something if it were opened.
fn devices() -> io::Result<()> {
    fs::write("/swaps/plain", vec![b'x'; 100_000])?;
    exchange_for_ever("/swaps/plain", "/swaps/device", || {
        // Controlling terminal and watchdog have consequences; this one waits for a writer.
        node("/swaps/device", libc::S_IFCHR | 0o600, libc::makedev(1, 8))
    })
}

fn node(path: &str, mode: libc::mode_t, device: libc::dev_t) -> io::Result<()> {
    let path = CString::new(path)?;
    // SAFETY: a C string, which the kernel only reads.
    match unsafe { libc::mknod(path.as_ptr(), mode, device) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Standard output is a file of its own that seems to be one of the host, changes its name all the time,
/// and would make whoever runs it root.
fn log() -> io::Result<()> {
    fs::create_dir_all("/usr/local/bin")?;
    let file = File::create("/usr/local/bin/owned")?;
    file.set_permissions(Permissions::from_mode(0o4755))?;
    for stream in [1, 2] {
        // SAFETY: both descriptors are ours, and nobody holds the second in a Rust type.
        unsafe { libc::dup2(file.as_raw_fd(), stream) };
    }
    let other = "/usr/local/bin/other";
    exchange_for_ever("/usr/local/bin/owned", other, || {
        fs::write(other, "#!/bin/sh\ntouch /pwned\n")
    })
}

/// Files that are called as the kernel calls other mappings, and a socket with a line of its own.
fn maps() -> io::Result<()> {
    fs::create_dir("/maps")?;
    for (i, name) in [
        "x[vdso]",
        "x (deleted)",
        "x[heap]",
        "x\n7f0000000000-7f0000001000 r-xp 0 00:00 0 [vdso]",
        FORGED,
    ]
    .iter()
    .enumerate()
    {
        let path = PathBuf::from("/maps").join(name);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(1 << 30)?;
        file.write_all_at(b"mapped", 0)?;

        // Below all others, so that it comes first.
        let at = (0x1000_0000 + i * (1 << 30)) as *mut libc::c_void;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;

        // SAFETY: where nothing is mapped yet.
        let mapped = unsafe {
            libc::mmap(at, 1 << 30, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd(), 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }

    let mut name = OsString::from("/maps/socket\n");
    name.push("0000000000000000: 00000002 00000000 00010000 0001 01 1 name");
    let _ = UnixListener::bind(name)?.into_raw_fd();

    Ok(())
}

/// A symbolic link in the place of a volume that is below another one.
fn volume() -> io::Result<()> {
    fs::rename("/v/sub", "/v/away")?;
    symlink("/etc", "/v/sub")
}
