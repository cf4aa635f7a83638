//! Unix sockets in the image of all files.
//!
//! `files.img`: u32 LE magics `0x54564319`, `0x56303138`, then records of a u32 length and a protobuf message
//! `file_entry`, whose field 16 is a `unix_sk_entry {11: name, 15: deleted}`. The name has a zero at its
//! end, or not. Source: CRIU images/fdinfo.proto, images/sk-unix.proto, criu/include/magic.h.
//!
//! CRIU calls a socket deleted when the very directory entry is gone that it was bound to, whatever other
//! names its file has, and removes its name when it has bound it anew (criu/sk-unix.c).

use anyhow::{Result, anyhow};
use protobuf::{CodedInputStream, rt::WireType};

use super::images::{after_magics, take_bytes, take_record};

pub(super) const FILES: u32 = 0x5630_3138;
const UNIX_SOCKET: u32 = 16;
const NAME: u32 = 11;
const DELETED: u32 = 15;

/// Has CRIU leave these names where it binds them. Says how many sockets it had called deleted.
///
/// # Errors
/// When it is no such image, or cut short.
pub fn keep(image: &mut [u8], names: &[&[u8]]) -> Result<usize> {
    let mut marks = Vec::new();
    let mut rest = after_magics(image, FILES)?;
    while !rest.is_empty() {
        let record = take_record(&mut rest)?;
        let begin = image.len() - rest.len() - record.len();
        marks.extend(mark_of(record, names)?.map(|at| begin + at));
    }
    for &at in &marks {
        image[at] = 0;
    }
    Ok(marks.len())
}

/// Returns where in a record it says that one of these is deleted.
fn mark_of(record: &[u8], names: &[&[u8]]) -> Result<Option<usize>> {
    let mut input = CodedInputStream::from_bytes(record);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        if (tag >> 3, tag & 7) != (UNIX_SOCKET, 2) {
            skip(&mut input, tag & 7)?;
            continue;
        }
        let socket = take_bytes(&mut input, record)?;
        let begin = input.pos() as usize - socket.len();
        return Ok(mark_in(socket, names)?.map(|at| begin + at));
    }
    Ok(None)
}

fn mark_in(socket: &[u8], names: &[&[u8]]) -> Result<Option<usize>> {
    let mut input = CodedInputStream::from_bytes(socket);
    let (mut wanted, mut mark) = (false, None);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match (tag >> 3, tag & 7) {
            (NAME, 2) => {
                let name = take_bytes(&mut input, socket)?;
                wanted = names.contains(&name.strip_suffix(b"\0").unwrap_or(name));
            }
            (DELETED, 0) => {
                let at = input.pos() as usize;
                mark = (input.read_raw_varint64()? == 1).then_some(at);
            }
            (_, wire) => skip(&mut input, wire)?,
        }
    }
    Ok(mark.filter(|_| wanted))
}

fn skip(input: &mut CodedInputStream<'_>, wire: u32) -> Result<()> {
    let wire = WireType::new(wire).ok_or_else(|| anyhow!("bad wire type"))?;
    Ok(input.skip_field(wire)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    /// A record of a socket: its type, its number, and `usk {1: 7, 11: name, 15: deleted}`.
    fn socket(name: &[u8], deleted: u8) -> Vec<u8> {
        let mut entry = vec![8, 7, 0x5a, name.len() as u8];
        entry.extend(name);
        entry.extend([0x78, deleted]);
        let mut record = vec![8, 5, 16, 9, 0x82, 1, entry.len() as u8];
        record.extend(entry);
        [&(record.len() as u32).to_le_bytes()[..], &record].concat()
    }

    fn image(sockets: &[(&[u8], u8)]) -> Vec<u8> {
        let mut bytes = [0x5456_4319, FILES].map(u32::to_le_bytes).concat();
        // A regular file before them.
        bytes.extend([6, 0, 0, 0, 8, 1, 16, 3, 0x1a, 0]);
        bytes.extend(sockets.iter().flat_map(|(name, deleted)| socket(name, *deleted)));
        bytes
    }

    #[test]
    fn only_those_that_were_named_are_kept() {
        let mut bytes = image(&[(b"/run/a.1\0", 1), (b"/b.1", 1), (b"/c.1\0", 1), (b"/d.1\0", 0)]);
        assert_eq!(keep(&mut bytes, &[b"/run/a.1", b"/b.1", b"/d.1"]).unwrap(), 2);
        let wanted = image(&[(b"/run/a.1\0", 0), (b"/b.1", 0), (b"/c.1\0", 1), (b"/d.1\0", 0)]);
        assert_eq!(bytes, wanted);
        assert_eq!(keep(&mut bytes, &[b"/run/a.1"]).unwrap(), 0, "it has been done");
        keep(&mut bytes[..40], &[]).unwrap_err();
        keep(&mut [0; 8], &[]).unwrap_err();
    }

    #[test]
    fn fuzz_unix_names() {
        let sample = image(&[(b"/run/a.1\0", 1), (b"/b.1", 1), (b"/c.1\0", 0)]);
        Target::new("unix-names").sample(sample).words(&[b"/b.1", &[0x78, 1]]).run(|bytes| {
            let mut image = bytes.to_vec();
            let kept = keep(&mut image, &[b"/b.1", b"/run/a.1"])?;
            let changed = image.iter().zip(bytes).filter(|(a, b)| a != b).count();
            assert_eq!((kept, image.len()), (changed, bytes.len()));
            found(&[kept])
        });
    }
}
