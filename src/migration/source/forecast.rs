//! What a migration would do, before anything is done: what is copied, how much that is, and about
//! how long it takes on this link.

use std::time::{Duration, Instant};

use anyhow::Result;
use xxhash_rust::xxh3::xxh3_64;

use super::inputs::SourceInput;
use super::negotiate::Accepted;
use crate::migration::protocol::Message;
use crate::migration::protocol::session::FromPeer;
use crate::network::Floating;
use crate::report::forecast::{Forecast, TreeForecast};

/// Time that the link is tried out.
const TRIAL: Duration = Duration::from_millis(300);
/// Bytes that go at once, and at most: no more than that stands between us and the other host.
const PIECE: usize = 256 << 10;
const MOST: u64 = 64 << 20;
/// Files that a disk makes in a second, and bytes that it takes: a modest one's.
const FILES_RATE: f64 = 15_000.0;
const DISK_RATE: f64 = 300e6;

/// Tries the link out, and reckons; no more than `limit` bytes a second will go over it.
///
/// # Errors
/// When it breaks.
pub(super) fn forecast(accepted: &mut Accepted, limit: Option<u64>) -> Result<Forecast> {
    let rate = try_link(accepted)?.min(limit.map_or(f64::INFINITY, |limit| limit as f64));
    let plan = &accepted.subject.plan;
    let tree = |(i, what): (usize, &String)| {
        let copied = accepted.subject.sizes.iter().find(|(number, _)| *number == i).map(|s| s.1);
        let copy_s = copied.map_or(0.0, |size| {
            let bytes = size.bytes as f64 / rate.min(DISK_RATE);
            bytes.max(size.entries as f64 / FILES_RATE)
        });
        TreeForecast { what: what.clone(), copied, copy_s }
    };
    let files = plan.probes.iter().map(|p| &p.what).enumerate().map(tree).collect();
    let memory_bytes = plan.resident_bytes;
    let addresses = plan.floating.as_ref().map_or_else(Vec::new, Floating::lines);
    Ok(Forecast {
        addresses,
        link_bytes_per_s: rate,
        files,
        memory_bytes,
        memory_s: memory_bytes as f64 / rate,
    })
}

/// Bytes a second.
fn try_link(accepted: &mut Accepted) -> Result<f64> {
    // ssh may compress.
    let words = (0..PIECE as u64 / 16).map(|i| format!("{:016x}", xxh3_64(&i.to_le_bytes())));
    let text: String = words.collect();
    let began = Instant::now();
    let mut sent = 0;
    while began.elapsed() < TRIAL && sent < MOST {
        accepted.peer.send(&Message::BandwidthProbe { text: text.clone() })?;
        sent += PIECE as u64;
    }
    accepted.peer.send(&Message::Echo { number: 1 })?;
    while !matches!(
        accepted.inputs.next()?,
        SourceInput::FromPeer(FromPeer::Message(Message::Echo { number: 1 }))
    ) {}
    Ok(sent as f64 / began.elapsed().as_secs_f64())
}
