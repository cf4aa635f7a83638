//! What the probe has seen, and the report made of it.
//!
//! A connection's *pause* is the longest time between two successive answers
//! received on it. A window starts at a mark and ends at the report; it counts
//! every gap that ends within it, in full even where the gap began before the
//! mark, and the gap still in progress at its end. Nothing is subtracted: the
//! interval between two questions and the network's round trip are part of it.

use std::time::Duration;

use serde::Serialize;

/// Nanoseconds on CLOCK_MONOTONIC.
pub type Nanos = u64;

/// How many descriptions of wrong answers a report quotes.
const QUOTED: usize = 10;

/// An answer that came.
#[derive(Clone, Copy)]
pub struct Answered {
    /// When it was read.
    pub at: Nanos,
    /// How long after its question.
    pub latency: Nanos,
}

/// All that is known of one connection.
pub struct Track {
    /// When it was opened: the start of its first gap.
    pub opened: Nanos,
    /// In order of time.
    pub answers: Vec<Answered>,
    /// When and why an answer was found wrong.
    pub wrong: Vec<(Nanos, String)>,
    /// When and why it ended before we wanted.
    pub lost: Option<(Nanos, String)>,
}

impl Track {
    /// A connection opened now.
    pub fn new(opened: Nanos) -> Self {
        Self { opened, answers: Vec::new(), wrong: Vec::new(), lost: None }
    }

    /// Its answers within a window, and when the gap before the first of them began.
    fn within(&self, since: Nanos) -> (Nanos, &[Answered]) {
        let first = self.answers.partition_point(|answer| answer.at < since);
        let before = first.checked_sub(1).map_or(self.opened, |index| self.answers[index].at);
        (before, &self.answers[first..])
    }

    /// The longest gap of a window, with the time when it began.
    fn worst(&self, since: Nanos, until: Nanos) -> (Nanos, Nanos) {
        let (mut before, answers) = self.within(since);
        let end = self.lost.as_ref().map_or(until, |(at, _)| *at);
        let mut worst = (0, before);
        for at in answers.iter().map(|answer| answer.at).chain([end]) {
            worst = worst.max((at.saturating_sub(before), before));
            before = at;
        }
        worst
    }
}

/// A window's summary, as it is printed and written.
#[derive(Serialize)]
pub struct Report {
    /// The mark that began the window.
    pub since: String,
    /// Its length.
    pub window_ms: f64,
    /// The longest pause of any connection …
    pub worst_pause_ms: f64,
    /// … and when it began, counted from the mark (negative: before it).
    pub worst_pause_began_ms: f64,
    /// How many connections were opened at the start.
    pub connections: usize,
    /// How many of them have ended, at any time until now.
    pub connections_lost: usize,
    /// Which, when and why.
    pub lost: Vec<Lost>,
    /// How many answers of this window were wrong.
    pub wrong_answers: usize,
    /// The first of them.
    pub wrong: Vec<String>,
    /// How many answers came in this window.
    pub answers: usize,
    /// The longest pause of each connection.
    pub per_connection_worst_ms: Vec<f64>,
    /// From question to answer.
    pub latency_ms: Latency,
    /// How late the probe itself was, at worst: a pause of about this length may be its own.
    pub probe_late_ms: f64,
}

/// A connection that ended.
#[derive(Serialize)]
pub struct Lost {
    connection: usize,
    after_ms: f64,
    cause: String,
}

/// Quantiles.
#[derive(Serialize)]
pub struct Latency {
    p50: f64,
    p99: f64,
    max: f64,
}

/// What the window from `since` to `until` shows. `late` are the probe's own delays.
pub fn report(
    name: &str,
    (since, until): (Nanos, Nanos),
    tracks: &[&Track],
    late: &[(Nanos, Nanos)],
) -> Report {
    let worst: Vec<_> = tracks.iter().map(|track| track.worst(since, until)).collect();
    let (worst_pause, began) = worst.iter().copied().max().unwrap_or((0, since));
    let mut latencies: Vec<Nanos> = tracks
        .iter()
        .flat_map(|track| track.within(since).1)
        .map(|answer| answer.latency)
        .collect();
    latencies.sort_unstable();
    let quantile = |part: f64| {
        let last = latencies.len().saturating_sub(1) as f64;
        latencies.get((last * part).round() as usize).map_or(0.0, |nanos| ms(*nanos))
    };
    let wrong: Vec<_> = tracks
        .iter()
        .flat_map(|track| &track.wrong)
        .filter(|(at, _)| *at >= since)
        .map(|(_, why)| why)
        .collect();
    let lost: Vec<_> = tracks
        .iter()
        .enumerate()
        .filter_map(|(connection, track)| {
            let (at, cause) = track.lost.as_ref()?;
            let after_ms = signed_ms(*at, since);
            Some(Lost { connection, after_ms, cause: cause.clone() })
        })
        .collect();
    Report {
        since: name.to_owned(),
        window_ms: ms(until - since),
        worst_pause_ms: ms(worst_pause),
        worst_pause_began_ms: signed_ms(began, since),
        connections: tracks.len(),
        connections_lost: lost.len(),
        lost,
        wrong_answers: wrong.len(),
        wrong: wrong.into_iter().take(QUOTED).cloned().collect(),
        answers: latencies.len(),
        per_connection_worst_ms: worst.iter().map(|(gap, _)| ms(*gap)).collect(),
        latency_ms: Latency { p50: quantile(0.5), p99: quantile(0.99), max: quantile(1.0) },
        probe_late_ms: ms(late
            .iter()
            .filter(|(at, _)| *at >= since)
            .map(|(_, late)| *late)
            .max()
            .unwrap_or(0)),
    }
}

impl Report {
    /// The same in words.
    pub fn summary(&self) -> String {
        let mut text = format!(
            "{} answers on {} connections in {:.1} s\n\
             worst pause {:.2} ms (the probe itself was late by up to {:.2} ms)\n\
             latency p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms\n\
             connections lost: {}, wrong answers: {}",
            self.answers,
            self.connections,
            self.window_ms / 1e3,
            self.worst_pause_ms,
            self.probe_late_ms,
            self.latency_ms.p50,
            self.latency_ms.p99,
            self.latency_ms.max,
            self.connections_lost,
            self.wrong_answers,
        );
        for lost in self.lost.iter().take(QUOTED) {
            let Lost { connection, after_ms, cause } = lost;
            text += &format!("\n  connection {connection} lost at {after_ms:.1} ms: {cause}");
        }
        for wrong in &self.wrong {
            text += &format!("\n  wrong: {wrong}");
        }
        text
    }

    /// Whether nothing was lost and nothing wrong.
    pub fn is_clean(&self) -> bool {
        self.connections_lost == 0 && self.wrong_answers == 0
    }
}

/// Milliseconds to the microsecond: more digits would only be noise.
fn ms(nanos: Nanos) -> f64 {
    (Duration::from_nanos(nanos).as_secs_f64() * 1e6).round() / 1e3
}

fn signed_ms(at: Nanos, since: Nanos) -> f64 {
    if at >= since { ms(at - since) } else { -ms(since - at) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    fn track(times: &[Nanos]) -> Track {
        let answers = times.iter().map(|at| Answered { at: at * MS, latency: MS / 10 }).collect();
        Track { answers, ..Track::new(0) }
    }

    #[test]
    fn a_gap_that_began_before_the_mark_counts_in_full() {
        let made = report("m", (10 * MS, 42 * MS), &[&track(&[2, 4, 34, 36, 40])], &[]);
        assert_eq!((made.worst_pause_ms, made.worst_pause_began_ms), (30.0, -6.0));
        assert_eq!(made.answers, 3);
    }

    #[test]
    fn a_gap_that_ended_before_the_mark_does_not() {
        let made = report("m", (35 * MS, 42 * MS), &[&track(&[2, 34, 36, 40])], &[]);
        assert_eq!(made.worst_pause_ms, 4.0);
    }

    #[test]
    fn the_gap_in_progress_counts_and_the_worst_connection_decides() {
        let made = report("m", (0, 90 * MS), &[&track(&[2, 40]), &track(&[2, 30, 60, 88])], &[]);
        assert_eq!(made.per_connection_worst_ms, [50.0, 30.0]);
        assert_eq!(made.worst_pause_ms, 50.0);
    }

    #[test]
    fn a_lost_connection_stops_its_clock_and_is_named() {
        let mut lost = track(&[2, 4]);
        lost.lost = Some((9 * MS, "reset".to_owned()));
        let made = report("m", (0, 90 * MS), &[&lost], &[]);
        assert_eq!((made.worst_pause_ms, made.connections_lost), (5.0, 1));
        assert!(!made.is_clean());
    }
}
