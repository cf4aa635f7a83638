//! Much memory read and hashed, by one thread or by several.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};

use super::digest::{BATCH, batches, read_padded};
use crate::sys::memory::PAGE;

/// Who reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// The caller.
    One,
    /// As many threads as there are processors, up to [`MOST`], if there is much to read.
    Several,
}

/// Most threads: more gain nothing, as memory is slower.
const MOST: usize = 4;
/// Pieces below which threads are not worth their beginning.
const FEW: usize = 16;

/// What takes pieces: the number of the first page, the bytes, and a hash for each page. Pieces come in any order.
pub type Take<'a> = &'a mut dyn FnMut(u64, &[u8], &[u64]) -> Result<()>;

/// What was read.
type Piece = (u64, Vec<u8>, Vec<u64>);

/// Reads ranges of a file, whole pages, and hashes each page.
///
/// # Errors
/// When it cannot be read, or whoever takes the pieces fails.
pub fn read(
    file: &File,
    ranges: &[(u64, u64)],
    readers: Readers,
    hash: impl Fn(&[u8]) -> u64 + Sync,
    take: Take,
) -> Result<()> {
    let pieces: Vec<_> = ranges.iter().flat_map(|(start, end)| batches(*start, *end)).collect();
    let threads = match readers {
        Readers::Several if pieces.len() >= FEW => {
            std::thread::available_parallelism().map_or(1, usize::from).min(MOST)
        }
        _ => 1,
    };
    let look = |(at, pages): (u64, usize), bytes: &mut Vec<u8>, hashes: &mut Vec<u64>| {
        bytes.resize(pages * PAGE, 0);
        read_padded(file, bytes, at)?;
        hashes.clear();
        hashes.extend(bytes.chunks_exact(PAGE).map(&hash));
        Ok::<_, std::io::Error>(at / PAGE as u64)
    };

    if threads == 1 {
        let (mut bytes, mut hashes) = (Vec::with_capacity(BATCH * PAGE), Vec::new());
        return pieces.into_iter().try_for_each(|piece| {
            let first = look(piece, &mut bytes, &mut hashes)?;
            take(first, &bytes, &hashes)
        });
    }

    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let spare: Mutex<Vec<(Vec<u8>, Vec<u64>)>> = Mutex::default();
    let spare = || spare.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        // Each has one in hand and one on its way: the caches hold no more.
        let (tell, told) = sync_channel::<std::io::Result<Piece>>(threads);
        for _ in 0..threads {
            let tell = tell.clone();
            scope.spawn(|| {
                let tell = tell;
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed))
                    && !stop.load(Ordering::Relaxed)
                {
                    let (mut bytes, mut hashes) = spare().pop().unwrap_or_default();
                    let read = look(*piece, &mut bytes, &mut hashes);
                    if tell.send(read.map(|first| (first, bytes, hashes))).is_err() {
                        return;
                    }
                }
            });
        }

        drop(tell);
        let mut left = pieces.len();
        let done = told.iter().try_for_each(|read| {
            let (first, bytes, hashes) = read?;
            take(first, &bytes, &hashes)?;
            spare().push((bytes, hashes));
            left -= 1;
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        drop(told);
        match done {
            Ok(()) if left > 0 => Err(anyhow!("a thread that read memory has died")),
            done => done,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::memory::memory_file;

    #[test]
    fn one_or_several_read_each_page_once() {
        let file = memory_file(c"readers").unwrap();
        let pages = 40 * BATCH as u64 + 7;
        for page in 0..pages {
            file.write_all_at(&page.to_le_bytes(), page * PAGE as u64).unwrap();
        }
        // The last is behind the end of what was written to, in part.
        let ranges = [(0, 3 * PAGE as u64), (9 * PAGE as u64, pages * PAGE as u64)];
        let hash = |page: &[u8]| u64::from_le_bytes(page[..8].try_into().unwrap()) + 1;
        for readers in [Readers::One, Readers::Several] {
            let mut seen = vec![0; pages as usize];
            read(&file, &ranges, readers, hash, &mut |first, bytes, hashes| {
                assert_eq!(bytes.len(), hashes.len() * PAGE);
                for (page, hash) in (first..).zip(hashes) {
                    assert_eq!(*hash, page + 1);
                    seen[page as usize] += 1;
                }
                Ok(())
            })
            .unwrap();
            let wanted = |page: u64| i32::from(!(3..9).contains(&page));
            assert!((0..pages).all(|page| seen[page as usize] == wanted(page)), "{readers:?}");

            // Whoever takes them may fail, and nobody waits for him.
            let mut taken = 0;
            let failed = read(&file, &ranges, readers, hash, &mut |_, _, _| {
                taken += 1;
                if taken == 3 { Err(anyhow!("enough")) } else { Ok(()) }
            });
            assert!(failed.is_err() && taken == 3, "{readers:?}");
        }
    }
}
