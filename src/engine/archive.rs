//! A small tar archive: POSIX.1-1988 (ustar).

use std::io::{self, Write};

const BLOCK: usize = 512;

/// Writes files, each with its name, which has at most 100 bytes; a name that ends with `/` is a
/// directory.
///
/// # Errors
/// When they cannot be written.
pub(super) fn write(out: &mut impl Write, files: &[(&str, &[u8])]) -> io::Result<()> {
    for (name, bytes) in files {
        out.write_all(&header(name, bytes.len()))?;
        out.write_all(bytes)?;
        out.write_all(&vec![0; bytes.len().next_multiple_of(BLOCK) - bytes.len()])?;
    }
    out.write_all(&[0; 2 * BLOCK])
}

fn header(name: &str, size: usize) -> [u8; BLOCK] {
    let directory = name.ends_with('/');
    let mut header = [0; BLOCK];
    let mut put =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, if directory { "0000700" } else { "0000600" });
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    // The sum is that of a header with blanks in its place.
    put(148, "        ");
    put(156, if directory { "5" } else { "0" });
    put(257, "ustar");
    put(263, "00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
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
        write(&mut std::fs::File::create(&at).unwrap(), &files).unwrap();
        let mut tar = std::process::Command::new("tar");
        let done = tar.arg("-C").arg(directory.path()).arg("-xf").arg(&at).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!(read("config.dump"), b"{}");
        assert_eq!(read("checkpoint/inventory.img"), text);
    }
}
