//! Memory whose every page is a pure function of (content, seed, index, generation).
//!
//! That is what makes a lost, stale or misplaced page visible from outside: a
//! client that is told index and generation knows what the 4096 bytes must be,
//! and a page that went back in time does not match the generation table, nor
//! the table the running total of rewrites.

use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a page: the unit that is rewritten and checked.
pub const PAGE: usize = 4096;

/// A page in its place: aligned, so that one page here is one page of the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page([u8; PAGE]);

/// What pages are filled with, which decides what compression and zero detection can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Content {
    /// Incompressible.
    Random,
    /// Four pages of five are zeros, written and so present; the rest is incompressible.
    Zero,
    /// English-looking words, compressible about 3:1.
    Text,
}

impl Content {
    /// The number that stands for it on the wire.
    pub fn code(self) -> u64 {
        self as u64
    }

    /// The inverse of [`Content::code`].
    pub fn from_code(code: u64) -> Option<Self> {
        [Self::Random, Self::Zero, Self::Text].into_iter().find(|c| c.code() == code)
    }
}

/// A small generator with 64 bits of state; good enough to be incompressible.
#[derive(Clone)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.0;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

const WORDS: [&str; 32] = [
    "harbour", "rope", "the", "a", "ship", "of", "tide", "and", "crew", "lantern", "to", "cargo",
    "north", "wind", "sail", "under", "bridge", "captain", "with", "slow", "river", "quay", "over",
    "anchor", "salt", "from", "morning", "bell", "deep", "water", "gull", "home",
];

impl Page {
    /// What page `index` must hold in its `generation`.
    pub fn expected(content: Content, seed: u64, index: u64, generation: u64) -> Self {
        let mut page = Self([0; PAGE]);
        page.fill(content, seed, index, generation);
        page
    }

    /// Rewrites the whole page in place.
    fn fill(&mut self, content: Content, seed: u64, index: u64, generation: u64) {
        // Each input goes through the generator by itself, so that (index 1, generation 0) and
        // (index 0, generation 1) have nothing in common.
        let start = SplitMix(SplitMix(SplitMix(seed).next() ^ index).next() ^ generation).next();
        let mut random = SplitMix(start);
        match content {
            Content::Zero if !start.is_multiple_of(5) => self.0.fill(0),
            Content::Zero | Content::Random => {
                for word in self.0.as_chunks_mut::<8>().0 {
                    *word = random.next().to_le_bytes();
                }
            }
            Content::Text => {
                let head = format!("{seed:x}/{index}/{generation}");
                let mut at = put(&mut self.0, 0, &head);
                while at < PAGE {
                    at = put(&mut self.0, at, WORDS[random.below(WORDS.len())]);
                }
            }
        }
    }

    /// The checksum that goes over the wire.
    pub fn hash(&self) -> u64 {
        xxh3_64(&self.0)
    }
}

/// Writes `word` and a space at `at`, as far as there is room, and returns where it ended.
fn put(to: &mut [u8; PAGE], at: usize, word: &str) -> usize {
    let end = (at + word.len()).min(PAGE);
    to[at..end].copy_from_slice(&word.as_bytes()[..end - at]);
    if end < PAGE {
        to[end] = b' ';
    }
    (end + 1).min(PAGE)
}

/// A block of such pages, with the generation of each.
pub struct Memory {
    /// What the pages are filled with.
    pub content: Content,
    /// The first input of the formula.
    pub seed: u64,
    /// How many rewrites there were; always the sum of all generations.
    pub rewrites: u64,
    /// For as long as the program runs.
    pages: &'static mut [Page],
    generations: Vec<u64>,
}

impl Memory {
    /// `count` pages in generation 0, all of them touched.
    pub fn new(content: Content, seed: u64, count: usize) -> Self {
        let pages: Vec<Page> =
            (0..count).map(|index| Page::expected(content, seed, index as u64, 0)).collect();
        Self { content, seed, rewrites: 0, pages: pages.leak(), generations: vec![0; count] }
    }

    /// The same in memory that children would share.
    ///
    /// # Errors
    /// When there is none.
    pub fn shared(content: Content, seed: u64, count: usize) -> std::io::Result<Self> {
        let (access, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel finds room, of zeros, which are pages, and for good.
        let pages: &'static mut [Page] = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), count * PAGE, access, flags, -1, 0);
            if at == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            std::slice::from_raw_parts_mut(at.cast(), count)
        };
        for (index, page) in pages.iter_mut().enumerate() {
            page.fill(content, seed, index as u64, 0);
        }
        Ok(Self { content, seed, rewrites: 0, pages, generations: vec![0; count] })
    }

    /// The number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Writes page `index` anew, one generation on.
    pub fn rewrite(&mut self, index: usize) {
        let generation = self.generations[index] + 1;
        self.pages[index].fill(self.content, self.seed, index as u64, generation);
        self.generations[index] = generation;
        self.rewrites += 1;
    }

    /// The generation of a page, and the checksum of what it really holds.
    pub fn look(&self, index: usize) -> (u64, u64) {
        (self.generations[index], self.pages[index].hash())
    }

    /// How many of these pages do not hold what the formula says.
    pub fn bad_pages(&self, range: std::ops::Range<usize>) -> u64 {
        let is_bad = |&index: &usize| {
            let generation = self.generations[index];
            self.pages[index] != Page::expected(self.content, self.seed, index as u64, generation)
        };
        range.filter(is_bad).count() as u64
    }

    /// Whether the generation table is whole: a page of the table that went back in time shows
    /// here, though it and an equally old data page would agree with each other.
    pub fn table_is_whole(&self) -> bool {
        self.generations.iter().sum::<u64>() == self.rewrites
    }
}
