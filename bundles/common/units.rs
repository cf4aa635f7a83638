//! Sizes and durations as the command lines of this project write them: `64M`, `2ms`.

use std::time::Duration;

/// Parses `4096`, `64K`, `64M`, `2G` (powers of 1024; a trailing `B` or `iB` is allowed).
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor: u64 = match unit.trim_end_matches('B').trim_end_matches('i') {
        "" => 1,
        "k" | "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err(format!("unknown unit {unit:?}; write 4096, 64K, 64M or 2G")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size like 64M"))?;
    number.checked_mul(factor).ok_or_else(|| format!("{text:?} is too much"))
}

/// Parses `500us`, `2ms`, `10s`, `1.5s`, `5m`; a number without a unit is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}; write 500us, 2ms, 10s or 5m")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is not a duration like 2ms"))?;
    Duration::try_from_secs_f64(number * factor).map_err(|error| error.to_string())
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}
