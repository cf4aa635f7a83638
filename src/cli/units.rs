//! Durations, sizes and rates as people write them: `100ms`, `64M`, `100Mbit`.
//!
//! A number without a unit is refused where it could mean two things.

use std::time::Duration;

/// A duration: `100ms`, `2s`, `1.5m`, `1h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "" => return Err(format!("{text:?} has no unit: write {text}s or {text}ms")),
        _ => return Err(format!("{unit:?} is no unit of time: use us, ms, s, m or h")),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|why| format!("{text:?}: {why}"))
}

/// A size in bytes: `4096`, `64K`, `1.5G`; K, M, G and T are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let short = unit.strip_suffix("iB").or(unit.strip_suffix('B')).unwrap_or(unit);
    let factor = match short {
        "" => 1.0,
        "K" | "k" => f64::from(1 << 10),
        "M" => f64::from(1 << 20),
        "G" => f64::from(1 << 30),
        "T" => (1u64 << 40) as f64,
        _ => return Err(format!("{unit:?} is no unit of size: use K, M, G or T")),
    };
    whole(number * factor, text)
}

/// A rate in bytes a second: `100Mbit`, `1Gbit` (powers of 1000, as networks count) or
/// `10MB`, `10M` (as [`size`] has it); `/s` may follow.
pub fn rate(text: &str) -> Result<u64, String> {
    let bare = text.strip_suffix("/s").unwrap_or(text);
    let Some(bits) = bare.strip_suffix("bit") else {
        let (_, unit) = split(bare)?;
        if unit.is_empty() {
            return Err(format!("{text:?} has no unit: write {bare}Mbit or {bare}M"));
        }
        return size(bare).map_err(|why| why + ", or Mbit, Gbit");
    };
    let (number, unit) = split(bits)?;
    let factor = match unit {
        "" => 1.0,
        "K" | "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        _ => return Err(format!("\"{unit}bit\" is no unit of rate: use kbit, Mbit or Gbit")),
    };
    whole(number * factor / 8.0, text)
}

fn split(text: &str) -> Result<(f64, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number =
        text[..end].parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    Ok((number, text[end..].trim_start()))
}

fn whole(value: f64, text: &str) -> Result<u64, String> {
    // Beyond 2^53 the arithmetic above is no longer exact, and nothing real is that big.
    if value >= (1u64 << 53) as f64 {
        Err(format!("{text:?} is too big"))
    } else {
        Ok(value as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("1.5 m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250us"), Ok(Duration::from_micros(250)));
        for bad in ["", "s", "5", "5x", "-1s", "1e3s", "..s", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("64MiB"), size("64MB"));
        assert_eq!(size("1.5G"), Ok(3 << 29));
        for bad in ["", "M", "1X", "-1", "1iB2", "99999999999T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(rate("100Mbit"), Ok(12_500_000));
        assert_eq!(rate("1Gbit/s"), Ok(125_000_000));
        assert_eq!(rate("10MB"), Ok(10 << 20));
        assert_eq!(rate("10M/s"), Ok(10 << 20));
        for bad in ["", "10", "bit", "10Xbit", "10/s", "fastbit"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }

    /// Whatever is written out is read back.
    #[test]
    fn round_trips() {
        for n in (0..60).map(|shift| 0x9e37_79b9_7f4a_7c15u64 >> (shift + 4)) {
            let kept = n % (1 << 42);
            assert_eq!(size(&kept.to_string()), Ok(kept));
            assert_eq!(size(&format!("{}K", kept >> 10)), Ok(kept >> 10 << 10));
            let ms = n % 1_000_000_000;
            assert_eq!(duration(&format!("{ms}ms")).unwrap().as_millis(), u128::from(ms));
        }
    }
}
