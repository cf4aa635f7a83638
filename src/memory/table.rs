//! One small value for every page of every task: 4 KiB a table of 512 pages and eight bytes, where
//! a hash map would take forty bytes a page.

use std::collections::HashMap;

/// Pages in one chunk: 2 MiB of a task's memory.
const CHUNK: usize = 512;

/// Values by the container's number of the task and the page's number.
#[derive(Debug)]
pub struct PageTable<T> {
    chunks: HashMap<(i32, u64), Box<[T; CHUNK]>>,
    blank: T,
}

impl<T: Copy> PageTable<T> {
    /// An empty table: every page has the value `blank`.
    pub fn new(blank: T) -> PageTable<T> {
        PageTable { chunks: HashMap::new(), blank }
    }

    /// The value of a page.
    pub fn get(&self, task: i32, page: u64) -> T {
        let chunk = self.chunks.get(&(task, page / CHUNK as u64));
        chunk.map_or(self.blank, |c| c[page as usize % CHUNK])
    }

    /// The values of `pages` neighbours, piece by piece, as a container has millions: how many pages, and
    /// their values; none where all are blank.
    pub fn values(
        &self,
        task: i32,
        first: u64,
        pages: u64,
    ) -> impl Iterator<Item = (u64, Option<&[T]>)> {
        let end = first.saturating_add(pages);
        let chunks = first / CHUNK as u64..end.div_ceil(CHUNK as u64);
        chunks.filter(move |_| first < end).map(move |number| {
            let start = number * CHUNK as u64;
            let from = first.saturating_sub(start) as usize;
            let to = (end - start).min(CHUNK as u64) as usize;
            let chunk = self.chunks.get(&(task, number));
            ((to - from) as u64, chunk.map(|chunk| &chunk[from..to]))
        })
    }

    /// The pages of a task that have another value than this one, rising.
    pub fn others(&self, task: i32, value: T) -> Vec<u64>
    where
        T: PartialEq,
    {
        let chunks = self.chunks.iter().filter(|((of, _), _)| *of == task);
        let pages = chunks.flat_map(|((_, number), chunk)| {
            let first = number * CHUNK as u64;
            let other = (first..).zip(chunk.iter()).filter(|(_, one)| **one != value);
            other.map(|(page, _)| page)
        });
        let mut found: Vec<u64> = pages.collect();
        found.sort_unstable();
        found
    }

    /// The value of a page, to change it.
    pub fn at(&mut self, task: i32, page: u64) -> &mut T {
        let blank = self.blank;
        let chunk = self
            .chunks
            .entry((task, page / CHUNK as u64))
            .or_insert_with(|| Box::new([blank; CHUNK]));
        &mut chunk[page as usize % CHUNK]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_its_own_value() {
        let mut table = PageTable::new(0u32);
        for page in [0, 511, 512, 1 << 40] {
            *table.at(7, page) = page as u32 | 1;
        }
        assert_eq!(table.get(7, 511), 511);
        assert_eq!(table.get(7, 512), 513);
        assert_eq!((table.get(7, 1), table.get(8, 511)), (0, 0));
        *table.at(7, 3 * 512) = 9;
        let values: Vec<u32> = table
            .values(7, 510, 2 * 512 + 3)
            .flat_map(|(n, some)| some.map_or(vec![0; n as usize], <[u32]>::to_vec))
            .collect();
        let expected: Vec<u32> = (510..).take(values.len()).map(|p| table.get(7, p)).collect();
        assert_eq!((values.len(), values), (2 * 512 + 3, expected));
        assert_eq!(table.values(7, 512, 0).count(), 0);
        assert_eq!(table.others(7, 0), [0, 511, 512, 3 * 512, 1 << 40]);
        assert!(table.others(8, 0).is_empty());
    }
}
