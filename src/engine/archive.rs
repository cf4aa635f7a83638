//! Small tar archives, in GNU's form: that has no limit for a file's size.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tar::{EntryType, Header};

const BLOCK: u64 = 512;

/// Makes a file for one, which nobody else reads.
///
/// # Errors
/// When there is one already, or it cannot be made.
pub(super) fn create(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Writes files, each with its name, which has at most 100 bytes, and the end; a name that ends with `/` is
/// a directory.
///
/// # Errors
/// When they cannot be written.
pub(super) fn write(out: &mut impl Write, files: &[(&str, &[u8])]) -> io::Result<()> {
    for (name, bytes) in files {
        let length = bytes.len() as u64;
        begin(out, name, length)?;
        out.write_all(bytes)?;
        end(out, length)?;
    }
    out.write_all(&[0; 2 * BLOCK as usize])
}

/// Writes what stands before a file of so many bytes.
///
/// # Errors
/// When it cannot be written.
pub(super) fn begin(out: &mut impl Write, name: &str, bytes: u64) -> io::Result<()> {
    let directory = name.ends_with('/');
    let mut header = Header::new_gnu();
    header.set_path(name)?;
    header.set_entry_type(if directory { EntryType::Directory } else { EntryType::Regular });
    header.set_mode(if directory { 0o700 } else { 0o600 });
    header.set_size(bytes);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    out.write_all(header.as_bytes())
}

/// Writes what stands behind it.
///
/// # Errors
/// When it cannot be written.
pub(super) fn end(out: &mut impl Write, bytes: u64) -> io::Result<()> {
    let rest = (bytes.next_multiple_of(BLOCK) - bytes) as usize;
    out.write_all(&[0; BLOCK as usize][..rest])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("a.tar");
        let text = vec![b'x'; 700];
        let files: [(&str, &[u8]); 3] =
            [("config.dump", b"{}"), ("checkpoint/", b""), ("checkpoint/inventory.img", &text)];
        write(&mut create(&at).unwrap(), &files).unwrap();
        let mut tar = std::process::Command::new("tar");
        let done = tar.arg("-C").arg(directory.path()).arg("-xf").arg(&at).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!(read("config.dump"), b"{}");
        assert_eq!(read("checkpoint/inventory.img"), text);
    }
}
