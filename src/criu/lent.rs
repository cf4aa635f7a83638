//! Files that a restore is lent, in the place of memory that CRIU has not dumped.
//!
//! A segment of shared memory that the dump was not shown is written down as a file that tasks have mapped. What
//! file that is, CRIU is told by a descriptor that it inherits, whose key is the file's name in the images
//! (criu/files-reg.c, `open_path`). So its contents may be there before CRIU begins, and it copies nothing.
//!
//! `files.img`: see [`unix_names`](super::unix_names). Of a regular file it has a record `file_entry {1: type, 2: id,
//! 3: reg}`, in which that is `reg_file_entry {1: id, 2: flags, 3: pos, 5: fown, 6: name}` and fown is
//! `{1: uid, 2: euid, 3: signum, 4: pid_type, 5: pid}`. Source: CRIU images/fdinfo.proto, regfile.proto, fown.proto.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use protobuf::CodedOutputStream;
use serde::{Deserialize, Serialize};

use super::images::{after_magics, fields, take_record};
use super::unix_names::FILES;

/// The name under which the list of them goes along with the images.
pub const LIST: &str = "shared.json";
/// Longest such list.
pub const LONGEST_LIST: u64 = 64 << 10;
/// Most of them.
pub const MOST: u32 = 64;
/// Identifiers of files from here on are Ferry's; CRIU counts its own from 1.
const FIRST: u32 = 0x4000_0000;
/// One past the largest file that the kernel can have mapped.
const LONGEST: u64 = 1 << 47;
/// `FD_TYPES__REG`
const REGULAR: u64 = 1;

/// A file that stands for a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentFile {
    /// From 1 on.
    pub number: u32,
    /// Its length.
    pub bytes: u64,
}

impl LentFile {
    /// By which the images call the file, and CRIU its descriptor. No path has two strokes together: it is no file
    /// of the container's.
    pub fn key(&self) -> String {
        format!("ferry//shared//{}", self.number)
    }
}

/// The identifier of a file in the images.
pub fn id(number: u32) -> u32 {
    FIRST + number
}

/// The list of them, as it goes along.
///
/// # Errors
/// When it cannot be written.
pub fn list(files: &[LentFile]) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(files)?)
}

/// Reads such a list.
///
/// # Errors
/// When it is none, or one that no source makes.
pub fn parse_list(bytes: &[u8]) -> Result<Vec<LentFile>> {
    let files: Vec<LentFile> = serde_json::from_slice(bytes)?;
    let mut before = 0;
    for file in &files {
        if file.number <= before || file.number > MOST || file.bytes >= LONGEST {
            bail!("shared memory {}, {} bytes", file.number, file.bytes);
        }
        before = file.number;
    }
    Ok(files)
}

/// Reads the list among the images in that directory; none where there is no such file.
///
/// # Errors
/// As [`parse_list`]; when it cannot be read.
pub fn read_list(images: &Path) -> Result<Vec<LentFile>> {
    let place = images.join(LIST);
    let file = match File::open(&place) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let mut bytes = Vec::new();
    file.take(LONGEST_LIST).read_to_end(&mut bytes)?;
    parse_list(&bytes).with_context(|| place.display().to_string())
}

/// The image of all files, with these.
///
/// # Errors
/// When it is no such image, or cut short, or has one of them.
pub fn with_files(image: &[u8], lent: &[LentFile]) -> Result<Vec<u8>> {
    let mut rest = after_magics(image, FILES)?;
    while !rest.is_empty() {
        let id = fields(take_record(&mut rest)?)?.iter().find(|field| field.0 == 2).map(|f| f.1);
        let id = id.ok_or_else(|| anyhow!("a file without a number"))?;
        if id > u64::from(FIRST) {
            bail!("CRIU has a file with the number {id}");
        }
    }

    let mut whole = image.to_vec();
    for file in lent {
        let record = record(file)?;
        whole.extend(u32::try_from(record.len())?.to_le_bytes());
        whole.extend(record);
    }
    Ok(whole)
}

fn record(file: &LentFile) -> Result<Vec<u8>> {
    let id = u64::from(id(file.number));
    let message = |write: &dyn Fn(&mut CodedOutputStream) -> protobuf::Result<()>| {
        let mut bytes = Vec::new();
        let mut out = CodedOutputStream::vec(&mut bytes);
        write(&mut out)?;
        out.flush()?;
        drop(out);
        Ok::<_, protobuf::Error>(bytes)
    };
    let nobody = message(&|out| (1..=5).try_for_each(|field| out.write_uint64(field, 0)))?;
    let regular = message(&|out| {
        out.write_uint64(1, id)?;
        out.write_uint64(2, libc::O_RDWR as u64)?;
        out.write_uint64(3, 0)?;
        out.write_bytes(5, &nobody)?;
        // CRIU takes the first stroke off.
        out.write_string(6, &format!("/{}", file.key()))
    })?;
    Ok(message(&|out| {
        out.write_uint64(1, REGULAR)?;
        out.write_uint64(2, id)?;
        out.write_bytes(3, &regular)
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    const EMPTY: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56];

    #[test]
    fn what_is_lent_follows_what_criu_has_seen() {
        let seen = [&EMPTY[..], &[6, 0, 0, 0, 8, 1, 16, 3, 0x1a, 0]].concat();
        let lent = [LentFile { number: 1, bytes: 4096 }, LentFile { number: 3, bytes: 8192 }];
        let whole = with_files(&seen, &lent).unwrap();
        assert!(whole.starts_with(&seen));
        let mut rest = &whole[seen.len()..];
        let first = take_record(&mut rest).unwrap();
        assert_eq!(fields(first).unwrap(), [(1, 1), (2, 0x4000_0001)]);
        let name = b"/ferry//shared//1";
        assert!(first.windows(name.len()).any(|part| part == name));
        take_record(&mut rest).unwrap();
        assert!(rest.is_empty());
        // Not twice.
        assert!(with_files(&whole, &lent).is_err());
        assert!(with_files(&seen[..12], &[]).is_err());
    }

    #[test]
    fn a_list_is_what_a_source_makes() {
        let lent = [LentFile { number: 1, bytes: 4096 }, LentFile { number: 3, bytes: 8192 }];
        assert_eq!(parse_list(&list(&lent).unwrap()).unwrap(), lent);
        for wrong in [
            [LentFile { number: 1, bytes: 1 }, LentFile { number: 1, bytes: 1 }],
            [LentFile { number: 0, bytes: 1 }, LentFile { number: 1, bytes: 1 }],
            [LentFile { number: 1, bytes: 1 }, LentFile { number: 65, bytes: 1 }],
            [LentFile { number: 1, bytes: u64::MAX }, LentFile { number: 2, bytes: 1 }],
        ] {
            assert!(parse_list(&list(&wrong).unwrap()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn fuzz_lent_files() {
        let sample = list(&[LentFile { number: 2, bytes: 4096 }]).unwrap();
        let image = with_files(&EMPTY, &[LentFile { number: 7, bytes: 1 }]).unwrap();
        Target::new("lent-files").sample(sample).sample(image).run(|bytes| {
            if let Ok(files) = parse_list(bytes) {
                assert!(files.len() <= MOST as usize);
                return found(&[files.len()]);
            }
            let one = LentFile { number: 5, bytes: 1 };
            let whole = with_files(bytes, &[one])?;
            assert!(whole.len() > bytes.len());
            found(&[bytes.len()])
        });
    }
}
