//! Compression of memory on its way: which one, if any, makes the transfer shorter.
//!
//! A page takes `1 / speed + ratio / link` seconds a byte with a codec, and `1 / link` without. The
//! link's rate is what its writes took lately; speed and ratio are known from the pieces that were
//! compressed lately, and every now and then one is compressed to see.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How a piece of memory is packed on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    None = 0,
    /// LZ4 block format.
    Lz4 = 1,
    /// Zstandard, level 1.
    Zstd = 2,
}

impl Codec {
    /// By its number on the wire.
    ///
    /// # Errors
    /// When there is none of that number.
    pub fn from_wire(number: u8) -> Result<Codec> {
        Ok(match number {
            0 => Codec::None,
            1 => Codec::Lz4,
            2 => Codec::Zstd,
            _ => bail!("compression {number} is not known"),
        })
    }

    /// Packs `bytes` into `out`, which is emptied first. Nothing to be done for [`Codec::None`].
    ///
    /// # Errors
    /// When the library fails.
    pub fn pack(self, bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        match self {
            Codec::None => {}
            Codec::Lz4 => {
                out.resize(lz4_flex::block::get_maximum_output_size(bytes.len()), 0);
                let n = lz4_flex::block::compress_into(bytes, out).map_err(io::Error::other)?;
                out.truncate(n);
            }
            Codec::Zstd => {
                out.resize(zstd::zstd_safe::compress_bound(bytes.len()), 0);
                let n = zstd::bulk::compress_to_buffer(bytes, out, 1)?;
                out.truncate(n);
            }
        }
        Ok(())
    }

    /// Unpacks exactly `length` bytes, never more.
    ///
    /// # Errors
    /// When that is not what was packed.
    pub fn unpack(self, packed: &[u8], length: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; length];
        let n = match self {
            Codec::None => bail!("memory that is not packed"),
            Codec::Lz4 => lz4_flex::block::decompress_into(packed, &mut out)
                .context("memory that cannot be unpacked")?,
            Codec::Zstd => zstd::bulk::decompress_to_buffer(packed, &mut out)
                .context("memory that cannot be unpacked")?,
        };
        if n != length {
            bail!("memory that unpacks to {n} bytes instead of {length}");
        }
        Ok(out)
    }
}

/// What the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressOption {
    /// Whatever is fastest.
    #[default]
    Auto,
    /// This one.
    Always(Codec),
}

/// What is known of a codec.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CodecSpeed {
    /// Bytes a second that go in.
    pub speed: f64,
    /// What comes out, as a part of what goes in.
    pub ratio: f64,
}

/// Compression must promise at least this much, or none is used.
const GAIN: f64 = 0.9;

/// The codec with which a byte takes the shortest time, on a link of `link` bytes a second.
pub fn best(link: f64, known: &[(Codec, CodecSpeed)]) -> Codec {
    let mut best = (Codec::None, GAIN / link);
    for (codec, known) in known {
        let time = 1.0 / known.speed + known.ratio / link;
        // Not a number: nothing is known of it.
        if time < best.1 {
            best = (*codec, time);
        }
    }
    best.0
}

/// Sums whose older parts count less and less.
#[derive(Clone, Copy, Debug, Default)]
struct Lately {
    wire: f64,
    raw: f64,
    seconds: f64,
}

impl Lately {
    fn add(&mut self, raw: usize, wire: usize, took: Duration) {
        const FADE: f64 = 0.9;
        self.raw = self.raw * FADE + raw as f64;
        self.wire = self.wire * FADE + wire as f64;
        self.seconds = self.seconds * FADE + took.as_secs_f64();
    }
}

/// Chooses for each piece, and learns from each.
#[derive(Debug, Default)]
pub struct Chooser {
    wish: CompressOption,
    link: Lately,
    lz4: Lately,
    zstd: Lately,
    pieces: u64,
}

/// Every so many pieces (of 1 MiB) one is compressed to see what that would bring.
const LOOK: u64 = 24;

impl Chooser {
    /// Nothing is known yet.
    pub fn new(wish: CompressOption) -> Chooser {
        Chooser { wish, ..Chooser::default() }
    }

    /// Returns what the next piece is packed with.
    pub fn choose(&mut self) -> Codec {
        if let CompressOption::Always(codec) = self.wish {
            return codec;
        }
        self.pieces += 1;
        match self.pieces % LOOK {
            // The link first: what its buffers swallow says nothing.
            4 => return Codec::Lz4,
            8 => return Codec::Zstd,
            12 => return Codec::None,
            _ => {}
        }
        let known = |l: &Lately| CodecSpeed { speed: l.raw / l.seconds, ratio: l.wire / l.raw };
        let codecs = [(Codec::Lz4, known(&self.lz4)), (Codec::Zstd, known(&self.zstd))];
        best(self.link.wire / self.link.seconds, &codecs)
    }

    /// A piece was packed.
    pub fn packed(&mut self, codec: Codec, raw: usize, wire: usize, took: Duration) {
        match codec {
            Codec::None => {}
            Codec::Lz4 => self.lz4.add(raw, wire, took),
            Codec::Zstd => self.zstd.add(raw, wire, took),
        }
    }

    /// A piece was written to the link.
    pub fn written(&mut self, wire: usize, took: Duration) {
        self.link.add(wire, wire, took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Target;

    const LZ4: (Codec, CodecSpeed) = (Codec::Lz4, CodecSpeed { speed: 1e9, ratio: 0.5 });
    const ZSTD: (Codec, CodecSpeed) = (Codec::Zstd, CodecSpeed { speed: 3e8, ratio: 0.3 });

    #[test]
    fn the_slower_the_link_the_harder_it_is_packed() {
        assert_eq!(best(12.5e6, &[LZ4, ZSTD]), Codec::Zstd);
        assert_eq!(best(250e6, &[LZ4, ZSTD]), Codec::Lz4);
        assert_eq!(best(4e9, &[LZ4, ZSTD]), Codec::None);
    }

    #[test]
    fn what_cannot_be_packed_goes_as_it_is() {
        let random = CodecSpeed { speed: 2e9, ratio: 1.004 };
        assert_eq!(best(12.5e6, &[(Codec::Lz4, random), (Codec::Zstd, random)]), Codec::None);
        let unknown = CodecSpeed { speed: f64::NAN, ratio: f64::NAN };
        assert_eq!(best(12.5e6, &[(Codec::Lz4, unknown)]), Codec::None);
    }

    #[test]
    fn a_wish_is_kept() {
        let mut chooser = Chooser::new(CompressOption::Always(Codec::Zstd));
        chooser.written(1 << 20, Duration::from_nanos(1));
        assert_eq!(chooser.choose(), Codec::Zstd);
    }

    #[test]
    fn it_learns_what_helps_on_a_slow_link() {
        let mut chooser = Chooser::new(CompressOption::Auto);
        let mut packed = 0;
        for _ in 0..200 {
            let codec = chooser.choose();
            let wire = if codec == Codec::None { 1 << 20 } else { 200 << 10 };
            packed += u32::from(codec != Codec::None);
            chooser.packed(codec, 1 << 20, wire, Duration::from_millis(2));
            chooser.written(wire, Duration::from_secs_f64(wire as f64 / 12.5e6));
        }
        assert!(packed > 150, "{packed}");
    }

    #[test]
    fn packed_memory_comes_back_and_damaged_does_not() {
        let bytes: Vec<u8> = (0..65536u32).map(|i| (i / 100) as u8).collect();
        for codec in [Codec::Lz4, Codec::Zstd] {
            let mut packed = Vec::new();
            codec.pack(&bytes, &mut packed).unwrap();
            assert!(packed.len() < bytes.len() / 2);
            assert_eq!(codec.unpack(&packed, bytes.len()).unwrap(), bytes);
            assert!(codec.unpack(&packed, bytes.len() - 1).is_err(), "no more than announced");
            assert!(codec.unpack(&packed, bytes.len() + 1).is_err());
            assert!(codec.unpack(&packed[..packed.len() / 2], bytes.len()).is_err());
        }
    }

    #[test]
    fn fuzz_codecs() {
        let bytes: Vec<u8> = (0..4096_u32).map(|i| (i / 7 % 251) as u8).collect();
        let mut target = Target::new("codecs").words(&[&[0x28, 0xb5, 0x2f, 0xfd]]);
        for (number, codec) in [(1, Codec::Lz4), (2, Codec::Zstd)] {
            let mut packed = Vec::new();
            codec.pack(&bytes, &mut packed).unwrap();
            target = target.sample([vec![number, 0, 16], packed].concat());
        }
        target.room(2 << 20).run(|input| {
            let [number, low, high, packed @ ..] = input else { bail!("too short") };
            let length = usize::from(u16::from_le_bytes([*low, *high])) * 16;
            let unpacked = Codec::from_wire(*number)?.unpack(packed, length)?;
            assert_eq!(unpacked.len(), length);
            Ok(())
        });
    }
}
