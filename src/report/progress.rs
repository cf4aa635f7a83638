//! What the user sees of a migration: phases as they come, and the report at the end; as text on
//! standard error, or as one JSON event a line on standard output.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::memory::rounds::{RoundStats, Tracking};
use crate::network::problem::Problem;

/// Like `eprintln!`, which panics when nobody reads: a closed terminal must not stop a migration.
macro_rules! tell {
    ($($words:tt)*) => {
        let _ = writeln!(std::io::stderr(), $($words)*);
    };
}

/// A moment of the hand-over.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// Which.
    pub name: String,
    /// Milliseconds since the command began.
    pub at_ms: f64,
}

/// One round over the memory.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// Whether the container was frozen.
    pub frozen: bool,
    /// How it was found out what changed.
    pub tracking: Tracking,
    /// Pages looked at, sent, zero.
    #[serde(flatten)]
    pub pages: RoundStats,
    /// Milliseconds that it took.
    pub ms: f64,
}

/// The whole story.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The migration's ID.
    pub migration: String,
    /// The container's.
    pub container: String,
    /// Where it went.
    pub destination: String,
    /// `migrated`, `runs_on_here`, `refused`, `in_doubt`.
    pub result: String,
    /// Milliseconds from the beginning of the freeze on the source until the destination said
    /// that the tasks run: the downtime as the source can measure it. It contains the message
    /// that says so, and lacks what clients wait for the network.
    pub frozen_ms: Option<f64>,
    /// From the command's beginning to its end.
    pub total_ms: f64,
    /// Bytes put on the link.
    pub wire_bytes: u64,
    /// Frames that came in during the freeze and were sent along.
    pub packets: u64,
    /// Memory, round by round.
    pub rounds: Vec<Round>,
    /// Moments on the source.
    pub source: Vec<Mark>,
    /// Moments on the destination, milliseconds since it had all images.
    pub arrival: Vec<(String, f64)>,
    /// What failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Takes moments down and shows them.
#[derive(Debug)]
pub struct Reporter {
    json: bool,
    quiet: bool,
    began: Instant,
    /// The report as it grows.
    pub report: Report,
    /// What was worth telling.
    pub warnings: Vec<Problem>,
}

impl Reporter {
    /// Time counts from here.
    pub fn new(json: bool) -> Reporter {
        let report = Report::default();
        Reporter { json, quiet: false, began: Instant::now(), report, warnings: Vec::new() }
    }

    /// One that only takes down.
    pub fn quiet() -> Reporter {
        Reporter { quiet: true, ..Reporter::new(false) }
    }

    /// Milliseconds since the beginning.
    pub fn ms(&self, at: Instant) -> f64 {
        round(at.saturating_duration_since(self.began).as_secs_f64() * 1000.0)
    }

    /// Takes a moment down, silently: inside the freeze nothing is printed.
    pub fn mark(&mut self, name: &str) {
        self.mark_at(name, Instant::now());
    }

    /// The same for a moment that has passed.
    pub fn mark_at(&mut self, name: &str, at: Instant) {
        let at_ms = self.ms(at);
        self.report.source.push(Mark { name: name.into(), at_ms });
    }

    /// A phase begins: shown at once.
    pub fn phase(&mut self, name: &str, words: &str) {
        self.mark(name);
        let at_ms = self.ms(Instant::now());
        if self.quiet {
        } else if self.json {
            self.event(&serde_json::json!({"event": "phase", "name": name, "at_ms": at_ms}));
        } else {
            tell!("{:>9.1} ms  {words}", at_ms);
        }
    }

    /// A problem that is no obstacle.
    pub fn problem(&mut self, problem: Problem) {
        if !self.quiet {
            self.warning(&problem.to_string());
        }
        self.warnings.push(problem);
    }

    /// Something worth telling that is no obstacle.
    pub fn warning(&mut self, text: &str) {
        if self.json {
            self.event(&serde_json::json!({"event": "warning", "message": text}));
        } else {
            tell!("warning: {text}");
        }
    }

    fn event(&self, value: &serde_json::Value) {
        // A reader that went away is no reason to stop a migration.
        let _ = writeln!(std::io::stdout(), "{value}");
    }

    /// The end: prints the report and writes it to `file`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&mut self, result: &str, file: Option<&Path>) -> Result<()> {
        self.report.result = result.into();
        self.report.total_ms = self.ms(Instant::now());
        if self.json {
            let mut value = serde_json::to_value(&self.report)?;
            value["event"] = "report".into();
            self.event(&value);
        } else if result == "migrated" {
            self.print_timeline();
        }
        if let Some(path) = file {
            std::fs::write(path, serde_json::to_vec_pretty(&self.report)?)
                .with_context(|| format!("cannot write the report {}", path.display()))?;
        }
        Ok(())
    }

    fn print_timeline(&self) {
        let report = &self.report;
        let sent: u64 = report.rounds.iter().map(|r| r.pages.sent).sum();
        tell!(
            "{} runs on {}: frozen for {:.1} ms, {:.1} ms in all, {:.1} MiB on the link \
             ({sent} pages in {} rounds, {} packets kept)",
            report.container,
            report.destination,
            report.frozen_ms.unwrap_or(0.0),
            report.total_ms,
            report.wire_bytes as f64 / f64::from(1 << 20),
            report.rounds.len(),
            report.packets,
        );
        let Some(freeze) = report.source.iter().find(|m| m.name == "freeze") else { return };
        tell!("  source, ms since the freeze:");
        for mark in report.source.iter().filter(|m| m.at_ms >= freeze.at_ms) {
            tell!("    {:>8.1}  {}", mark.at_ms - freeze.at_ms, mark.name);
        }
        tell!("  destination, ms since it had the images:");
        for (name, ms) in &report.arrival {
            tell!("    {ms:>8.1}  {name}");
        }
    }
}

fn round(ms: f64) -> f64 {
    (ms * 1000.0).round() / 1000.0
}
