//! Decoders under inputs that nobody honest would write, on stable Rust and within the unit tests.
//!
//! Whatever a peer or a container writes is read by code that must neither panic nor overflow, nor take
//! memory or time out of proportion. Each such decoder has a test named `fuzz_…` beside it, which hands
//! valid samples to a [`Target`]. They are mutated by a generator that is seeded: the same seed and number
//! of executions give the same inputs. An input on which the decoder says something that it has not said
//! before is kept, and mutated further: that leads deeper, as coverage would, and needs no instrumented
//! build.
//!
//! `contrib/fuzz` runs them longer. What was found once lies in `tests/fuzz/TARGET/` and is tried first.
//!
//! From the environment: `FERRY_FUZZ_EXECUTIONS` for each target, `FERRY_FUZZ_SEED`,
//! `FERRY_FUZZ_OUT`, where failing inputs and the number of executions are written.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use xxhash_rust::xxh3::xxh3_64;

use crate::sys::allocated::{cpu_time, peak_of};
use crate::sys::panics::words_of;

/// Executions of each target where nothing else is said: enough for a decoder that fails at once.
const EXECUTIONS: u64 = 200;
/// Longest input.
const LONGEST: usize = 64 << 10;
/// Most inputs that are mutated further.
const POOL: usize = 1024;
/// CPU time that one input may take, in an unoptimized build.
const PATIENCE: Duration = Duration::from_secs(2);
/// After this long a decoder hangs.
const HANGS: Duration = Duration::from_secs(120);
/// Bytes of memory that a decoder may take for each byte of input: a `serde_json::Value` has 32 for the
/// two of `0,`, in a list that doubles.
const FACTOR: usize = 64;

/// A decoder, and what it is fed with.
pub(crate) struct Target {
    name: &'static str,
    samples: Vec<Vec<u8>>,
    words: Vec<&'static [u8]>,
    repair: fn(&mut Vec<u8>, &mut Random),
    cost: u64,
    room: usize,
}

impl Target {
    /// Nothing is known of it but its name, that of its directory in `tests/fuzz/`.
    pub(crate) fn new(name: &'static str) -> Target {
        Target {
            name,
            samples: Vec::new(),
            words: Vec::new(),
            repair: |_, _| {},
            cost: 1,
            room: 64 << 10,
        }
    }

    /// A valid input.
    pub(crate) fn sample(mut self, bytes: impl Into<Vec<u8>>) -> Target {
        self.samples.push(bytes.into());
        self
    }

    /// Takes what means something in these inputs: magic numbers, names of fields.
    pub(crate) fn words(mut self, words: &[&'static [u8]]) -> Target {
        self.words.extend(words);
        self
    }

    /// Makes a mutated input pass what stands before the decoder: a checksum, a length.
    pub(crate) fn repair(mut self, repair: fn(&mut Vec<u8>, &mut Random)) -> Target {
        self.repair = repair;
        self
    }

    /// One execution costs as much as so many of others': so many times fewer are made.
    pub(crate) fn cost(mut self, cost: u64) -> Target {
        self.cost = cost;
        self
    }

    /// Bytes that it may take whatever the input is, beside [`FACTOR`] for each byte of it.
    pub(crate) fn room(mut self, bytes: usize) -> Target {
        self.room = bytes;
        self
    }

    /// Feeds the decoder.
    ///
    /// # Panics
    /// Tells what the decoder did wrong, and the file that has the input.
    pub(crate) fn run(self, mut decode: impl FnMut(&[u8]) -> Result<()>) {
        let executions = (number("FERRY_FUZZ_EXECUTIONS", EXECUTIONS) / self.cost).max(1);
        let seed = number("FERRY_FUZZ_SEED", 1);
        let out = std::env::var_os("FERRY_FUZZ_OUT").map(PathBuf::from);
        let mut trial = Trial::start(&self, out.clone(), seed);
        let mut pool = Vec::new();
        let mut said = HashSet::new();
        for input in regressions(self.name).into_iter().chain(self.samples.iter().cloned()) {
            said.insert(trial.one(&input, &mut decode));
            pool.push(input);
        }

        assert!(!pool.is_empty(), "{} has no sample", self.name);

        let mut random = Random(seed ^ xxh3_64(self.name.as_bytes()));
        for _ in 0..executions {
            let mut input = pool[random.below(pool.len())].clone();
            for _ in 0..1 << random.below(4) {
                mutate(&mut input, &pool, &self.words, &mut random);
            }
            input.truncate(LONGEST);

            // Now and then it is as the mutation has left it.
            if random.below(8) > 0 {
                (self.repair)(&mut input, &mut random);
            }
            if said.insert(trial.one(&input, &mut decode)) {
                if pool.len() == POOL {
                    pool.swap_remove(random.below(POOL));
                }
                pool.push(input);
            }
        }

        drop(trial);
        let kinds = said.len();
        println!("fuzz {}: {executions} executions, seed {seed}, {kinds} outcomes", self.name);

        if let Some(out) = out {
            let text = format!("{executions} {kinds}\n");
            fs::write(out.join(format!("{}.done", self.name)), text).expect("FERRY_FUZZ_OUT");
        }
    }
}

/// Returns what a decoder says that finds something, or nothing, and no error: how much of what.
pub(crate) fn found(counts: &[usize]) -> Result<()> {
    let word = |count: &usize| "n".repeat(1 + *count.min(&20));
    Err(anyhow!("{}", counts.iter().map(word).collect::<Vec<_>>().join(" ")))
}

fn number(name: &str, otherwise: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => otherwise,
    }
}

/// Inputs that were found once.
fn regressions(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(name);
    let list = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = list.map(|entry| entry.path()).collect();
    files.sort();
    files.iter().map(|path| fs::read(path).expect("a file of tests/fuzz")).collect()
}

/// Runs inputs one by one, and watches over each.
struct Trial<'a> {
    target: &'a Target,
    seed: u64,
    out: PathBuf,
    /// The input that is under way, its length before it: for whoever finds this process dead.
    now: (PathBuf, File),
    /// How many were begun; whether it is over.
    begun: Arc<(AtomicU64, AtomicBool)>,
}

impl Trial<'_> {
    fn start(target: &Target, out: Option<PathBuf>, seed: u64) -> Trial<'_> {
        let out = out.unwrap_or_else(std::env::temp_dir);
        let path = out.join(format!("{}.{}.now", target.name, std::process::id()));
        let file = File::create(&path).expect("a place for the input");
        let begun = Arc::new((AtomicU64::new(0), AtomicBool::new(false)));
        let (name, watched, place) = (target.name, begun.clone(), path.clone());
        std::thread::spawn(move || {
            let (mut last, mut waited) = (0, Duration::ZERO);
            while !watched.1.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_secs(1));
                let now = watched.0.load(Ordering::Relaxed);
                waited = if now == last { waited + Duration::from_secs(1) } else { Duration::ZERO };
                last = now;
                if waited > HANGS {
                    eprintln!("fuzz {name}: hangs at input {now}, which is in {}", place.display());
                    std::process::abort();
                }
            }
        });
        Trial { target, seed, out, now: (path, file), begun }
    }

    /// One input. Gives a number that stands for what the decoder has said.
    fn one(&mut self, input: &[u8], decode: &mut dyn FnMut(&[u8]) -> Result<()>) -> u64 {
        let framed = [&(input.len() as u64).to_le_bytes(), input].concat();
        self.now.1.write_all_at(&framed, 0).expect("the input is written down");
        self.begun.0.fetch_add(1, Ordering::Relaxed);
        match judge(input, self.target.room, decode) {
            Ok(said) => said,
            Err(why) => {
                let small = smaller(input, self.target.room, decode);
                let name = format!("{}-{:016x}", self.target.name, xxh3_64(&small));
                let path = self.out.join(name);
                fs::write(&path, &small).expect("the input is kept");
                panic!(
                    "fuzz {}: {why}: seed {}, {} bytes in {}; keep it in tests/fuzz/{}/",
                    self.target.name,
                    self.seed,
                    small.len(),
                    path.display(),
                    self.target.name
                );
            }
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.begun.1.store(true, Ordering::Relaxed);
        let _ = fs::remove_file(&self.now.0);
    }
}

/// Returns what is wrong with what the decoder does; else a number for what it says.
fn judge(input: &[u8], room: usize, decode: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<u64> {
    let before = cpu_time();
    let (result, bytes) = peak_of(|| catch_unwind(AssertUnwindSafe(|| decode(input))));
    let took = cpu_time().saturating_sub(before);
    let result = result.map_err(|panic| anyhow!("it panicked: {}", words_of(&*panic)))?;
    let most = room + FACTOR * input.len();
    if bytes > most {
        return Err(anyhow!("it took {bytes} bytes of memory, more than {most}"));
    }
    if took > PATIENCE {
        return Err(anyhow!("it took {took:?}"));
    }
    Ok(match result {
        Ok(()) => 0,
        Err(e) => xxh3_64(kind_of(&format!("{e:#}")).as_bytes()),
    })
}

/// An error's words without what is only about this input: numbers, names, paths.
fn kind_of(error: &str) -> String {
    // What is quoted is somebody's.
    let error: String = error.split('"').step_by(2).collect();
    let plain = |word: &&str| word.chars().all(|c| c.is_ascii_alphabetic() || ",:.'-".contains(c));
    error.split(' ').filter(plain).take(24).collect::<Vec<_>>().join(" ")
}

/// A shorter input that fails, too, if there is one: pieces are left out as long as that helps.
fn smaller(input: &[u8], room: usize, decode: &mut dyn FnMut(&[u8]) -> Result<()>) -> Vec<u8> {
    let mut best = input.to_vec();
    let (mut piece, mut tries) = (best.len() / 2, 0);
    while piece > 0 {
        let mut at = 0;
        while at < best.len() && tries < 500 {
            let end = (at + piece).min(best.len());
            let shorter = [&best[..at], &best[end..]].concat();
            tries += 1;
            if judge(&shorter, room, decode).is_err() {
                best = shorter;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    best
}

/// Numbers that follow from a seed: splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below this one, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Picks one.
    pub(crate) fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Numbers at which arithmetic goes wrong.
const NUMBERS: &[u64] = &[
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x100,
    0xfff,
    0x1000,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    1 << 20,
    (1 << 20) + 1,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_f000,
    (1 << 57) - 4096,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_f000,
    0xffff_ffff_ffff_ffff,
];
/// The same as text, and what else may stand for a number.
const TEXTS: &[&str] = &[
    "",
    "-1",
    "0",
    "00",
    "4095",
    "65536",
    "2147483648",
    "-2147483649",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "0.5",
    "ffffffffffffffff",
    "ffffffffffffffffff",
    "+7",
    "null",
    "[]",
    "{}",
    "\"\"",
];

/// Changes an input a little, as a liar or a bad disk would.
fn mutate(bytes: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&[u8]], random: &mut Random) {
    let length = bytes.len();
    let place = random.below(length + 1);

    // A stretch of it, rather short.
    let most = if random.below(4) == 0 { length + 1 } else { 16 };
    let end = (place + random.below(most)).min(length);

    match random.below(13) {
        0 if length > 0 => bytes[place % length] ^= 1 << random.below(8),
        1 if length > 0 => bytes[place % length] = random.next() as u8,
        2 => bytes.truncate(place),
        3 => drop(bytes.drain(place..end)),
        4 => {
            let copy = bytes[place..end].to_vec();
            let at = random.below(length + 1);
            bytes.splice(at..at, copy);
        }
        5 => {
            let new: Vec<u8> = (0..random.below(16)).map(|_| random.next() as u8).collect();
            bytes.splice(place..place, new);
        }
        // The beginning of one, the end of another.
        6 => {
            let other = random.of(pool);
            let from = random.below(other.len() + 1);
            bytes.truncate(place);
            bytes.extend(&other[from..]);
        }
        7 => {
            let other = random.of(pool);
            let from = random.below(other.len() + 1);
            let to = (from + random.below(64)).min(other.len());
            bytes.splice(place..end, other[from..to].iter().copied());
        }
        // Lengths, counts, addresses.
        8 | 9 => {
            let near = random.of(NUMBERS).wrapping_add(random.below(5) as u64).wrapping_sub(2);
            let size = 1 << random.below(4);
            let mut number = near.to_le_bytes()[..size].to_vec();
            if random.below(2) == 0 {
                number.reverse();
            }
            let to = (place + size).min(length);
            bytes.splice(place..to, number);
        }
        10 if !words.is_empty() => {
            let to = if random.below(2) == 0 { end } else { place };
            bytes.splice(place..to, random.of(words).iter().copied());
        }
        // A number in text becomes another one.
        11 => {
            let is_digit = |b: &u8| b.is_ascii_hexdigit();
            let Some(start) = bytes[place..].iter().position(|b| b.is_ascii_digit()) else {
                return;
            };
            let start = place + start;
            let digits = bytes[start..].iter().take_while(|b| is_digit(b)).count();
            let new = random.of(TEXTS).bytes();
            bytes.splice(start..start + digits, new);
        }
        // Very much of one thing.
        _ => {
            let copy = bytes[place..end].to_vec();
            let times = (4096 / copy.len().max(1)).min(512);
            bytes.splice(place..place, copy.repeat(random.below(times + 1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(input: &[u8], decode: &mut dyn FnMut(&[u8]) -> Result<()>) -> String {
        judge(input, 1 << 10, decode).unwrap_err().to_string()
    }

    #[test]
    fn what_a_decoder_may_not_do_is_noticed() {
        let panics = fails(b"x", &mut |bytes| {
            let i = bytes.len();
            std::hint::black_box(bytes[i]);
            Ok(())
        });
        assert!(panics.contains("panicked: index out of bounds"), "{panics}");
        let takes = fails(b"x", &mut |_| {
            std::hint::black_box(Vec::<u8>::with_capacity(1 << 20));
            Ok(())
        });
        assert!(takes.contains("bytes of memory"), "{takes}");
        let slow = fails(b"x", &mut |_| {
            let before = cpu_time();
            while cpu_time() - before <= PATIENCE {}
            Ok(())
        });
        assert!(slow.starts_with("it took 2"), "{slow}");
        assert!(judge(b"x", 1 << 20, &mut |_| Err(anyhow!("no"))).is_ok());
    }

    #[test]
    fn what_fails_is_made_short() {
        let mut long = vec![b'.'; 1000];
        long[700..703].copy_from_slice(b"bad");
        let mut decode = |bytes: &[u8]| {
            assert!(!bytes.windows(3).any(|three| three == b"bad"));
            Ok(())
        };
        assert_eq!(smaller(&long, 1 << 10, &mut decode), b"bad");
    }

    /// A decoder that fails for few inputs only: one that says how far it came is led there.
    #[test]
    fn what_is_said_leads_on() {
        let found = std::cell::Cell::new(0);
        let target = Target::new("none").sample(*b"........").words(&[b"GO"]);
        target.run(|bytes| {
            let text = std::str::from_utf8(bytes)?;
            let rest = text.strip_prefix("GO").ok_or_else(|| anyhow!("begins in another way"))?;
            found.set(found.get() + 1);
            rest.strip_prefix("GO").ok_or_else(|| anyhow!("goes on in another way"))?;
            Ok(())
        });
        assert!(found.get() > 5, "{}", found.get());
    }

    #[test]
    fn a_seed_gives_the_same_inputs_again() {
        let inputs = || {
            let mut random = Random(7);
            let mut bytes = b"a sample 123 of something".to_vec();
            let mut all = Vec::new();
            for _ in 0..100 {
                mutate(&mut bytes, &[b"other".to_vec()], &[b"word"], &mut random);
                all.push(bytes.clone());
            }
            all
        };
        assert_eq!(inputs(), inputs());
    }
}
