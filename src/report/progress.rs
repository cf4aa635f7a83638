//! What the user sees of a migration: phases as they come, and the report at the end; as text on
//! standard error, or as one JSON event a line on standard output.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::forecast::Forecast;
use super::log;
use super::shown::{self, shown};
use crate::files::follow;
use crate::memory::converge::NextRound;
use crate::memory::rounds::{MemoryRoundStats, Tracking};
use crate::memory::serve::Served;
use crate::problem::Problem;
use crate::sys::process;
use crate::transport::codec::Codec;

/// Like `eprintln!`, which panics when nobody reads: a closed terminal must not stop a migration.
macro_rules! tell {
    ($($words:tt)*) => {
        let _ = writeln!(std::io::stderr(), "{}", shown(&format!($($words)*)));
    };
}

/// A moment of the hand-over.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// Name.
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
    /// Pages looked at, sent, zero, like others, unchanged.
    #[serde(flatten)]
    pub pages: MemoryRoundStats,
    /// Bytes of the pages sent with their contents.
    pub bytes: u64,
    /// Bytes that took on the link.
    pub wire_bytes: u64,
    /// Pages that were written to meanwhile; not known in the freeze.
    pub left: Option<u64>,
    /// What the latest piece was compressed with.
    pub compression: Codec,
    /// Milliseconds that it took.
    pub ms: f64,
}

impl Round {
    /// Bytes a second on the link, in MB.
    fn rate(&self) -> f64 {
        self.wire_bytes as f64 / 1000.0 / self.ms.max(0.001)
    }
}

/// One round over the files that are copied.
#[derive(Clone, Debug, Serialize)]
pub struct FilesRound {
    /// Whether the container was frozen.
    pub frozen: bool,
    /// Files looked at, changed, removed, and bytes of contents.
    #[serde(flatten)]
    pub files: follow::FileRoundStats,
    /// Milliseconds that it took, and before the freeze until it was on the other host's disk.
    pub ms: f64,
}

/// The layers of an overlay.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Layers {
    /// So many were on the other host.
    pub there: usize,
    /// So many were not.
    pub copied: usize,
}

/// The image that an engine's container was made of, where it is copied.
#[derive(Clone, Debug, Serialize)]
pub struct CopiedImage {
    /// As the container calls it.
    pub name: String,
    /// So many of its layers were on the other host.
    pub there: usize,
    /// So many were not.
    pub copied: usize,
    /// Bytes that have gone; of a check, that it has in all.
    pub bytes: u64,
}

impl CopiedImage {
    /// What will be done.
    pub fn words(&self) -> String {
        let (name, mb) = (&self.name, self.bytes as f64 / 1e6);
        let layers = self.there + self.copied;
        match self.there {
            0 => format!("the image {name} will be copied: {mb:.1} MB"),
            _ => format!(
                "the image {name} will be copied: {} of {layers} layers, {mb:.1} MB at most",
                self.copied
            ),
        }
    }
}

/// A network that the engine on the other host makes for the container.
#[derive(Clone, Debug, Serialize)]
pub struct NewNetwork {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub driver: String,
    /// What it has addresses of.
    pub subnets: Vec<String>,
}

impl NewNetwork {
    /// What will be done.
    pub fn words(&self) -> String {
        let NewNetwork { name, driver, subnets } = self;
        format!("the network {name} will be made: {driver} {}", subnets.join(" "))
    }
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
    /// Of these, CRIU's own work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub criu_ms: Option<CriuTimes>,
    /// Pages that CRIU was not shown, and Ferry knew of anyway; none where it was shown all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_pages: Option<u64>,
    /// From the command's beginning to its end.
    pub total_ms: f64,
    /// Bytes put on the link.
    pub wire_bytes: u64,
    /// Frames that came in during the freeze and were sent along.
    pub packets: u64,
    /// Frames that came in during the freeze, and for which the kernel had no room.
    pub packets_lost: u32,
    /// Connections that Ferry carried itself, as there were many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    /// The layers of its root file system, where that is an overlay and was copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// The image that its engine made it of, where that was copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<CopiedImage>,
    /// Networks that were made for it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NewNetwork>,
    /// Files, round by round, where they were copied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FilesRound>,
    /// Memory, round by round.
    pub rounds: Vec<Round>,
    /// Why the container was frozen then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settled: Option<NextRound>,
    /// Pages that followed after the resume.
    pub postcopy_pages: u64,
    /// With `--verify`: pages that were compared before the commit, and are the same on both hosts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_pages: Option<u64>,
    /// How the destination put pages into the tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served: Option<Served>,
    /// Most memory that Ferry itself had on the source, in KiB.
    pub peak_kib: u64,
    /// Of a dry run: what would go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
    /// Moments on the source.
    pub source: Vec<Mark>,
    /// Moments on the destination, milliseconds since it had all images.
    pub arrival: Vec<(String, f64)>,
    /// What is not as it was before, or may not be.
    pub changed: Vec<ChangedAspect>,
    /// What failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A [`Problem`] that did not stand in the way.
#[derive(Clone, Debug, Serialize)]
pub struct ChangedAspect {
    /// What it is.
    pub what: String,
    /// Whom or what it concerns.
    pub detail: String,
}

/// Milliseconds that CRIU took in the freeze: what no tool that uses it can be quicker than.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CriuTimes {
    /// From the frozen tasks to their images, without private memory.
    pub dump: f64,
    /// From the images to tasks that are held before their first instruction.
    pub restore: f64,
}

impl Report {
    fn criu(&self) -> Option<CriuTimes> {
        let here = |name| self.source.iter().find(|m| m.name == name).map(|m| m.at_ms);
        let there = |name| self.arrival.iter().find(|(n, _)| n == name).map(|(_, ms)| *ms);
        // CRIU waits until connections that are not its business are out of its way.
        let begins = here("connections are taken out").or(here("frozen, fence closed"));
        Some(CriuTimes {
            dump: here("dumped")? - begins?,
            restore: there("restored")? - there("restore begins")?,
        })
    }
}

/// Takes moments down and shows them.
#[derive(Debug)]
pub struct Reporter {
    json: bool,
    quiet: bool,
    began: Instant,
    bar: Option<ProgressBar>,
    /// When progress was last told as an event.
    told: Option<Instant>,
    /// The report as it grows.
    pub report: Report,
    /// What was worth telling.
    pub warnings: Vec<Problem>,
}

impl Reporter {
    /// Time counts from here.
    pub fn new(json: bool) -> Reporter {
        let report = Report::default();
        let began = Instant::now();
        Reporter { json, quiet: false, began, bar: None, told: None, report, warnings: Vec::new() }
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

    /// A round over the memory is over.
    pub fn round(&mut self, round: Round) {
        // In the freeze nothing is shown.
        if self.json && !round.frozen {
            let mut value = serde_json::to_value(&round).unwrap_or_default();
            value["event"] = "round".into();
            value["at_ms"] = self.ms(Instant::now()).into();
            self.event(&value);
        }
        self.report.rounds.push(round);
    }

    /// A round over the files is over.
    pub fn files_round(&mut self, round: FilesRound) {
        if self.json && !round.frozen {
            let mut value = serde_json::to_value(&round).unwrap_or_default();
            value["event"] = "files".into();
            value["at_ms"] = self.ms(Instant::now()).into();
            self.event(&value);
        }
        self.report.files.push(round);
    }

    /// So many bytes of files have gone.
    pub fn files_progress(&mut self, bytes: u64) {
        self.bytes_progress("files", "file_bytes", bytes);
    }

    /// So many bytes of an engine's image have gone.
    pub fn image_progress(&mut self, bytes: u64) {
        self.bytes_progress("image", "image_bytes", bytes);
    }

    fn bytes_progress(&mut self, what: &str, field: &str, bytes: u64) {
        if self.quiet || self.report.source.iter().any(|m| m.name == "freeze") {
            return;
        }
        if self.json {
            if self.told.is_none_or(|t| t.elapsed() > Duration::from_secs(1)) {
                self.told = Some(Instant::now());
                let at_ms = self.ms(Instant::now());
                self.event(&serde_json::json!({"event": "progress", "at_ms": at_ms,
                    field: bytes}));
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let words = format!("               {what} {{spinner}} {{bytes}} ({{bytes_per_sec}})");
            ProgressBar::new_spinner().with_style(
                ProgressStyle::with_template(&words).unwrap_or(ProgressStyle::default_spinner()),
            )
        });
        bar.set_position(bytes);
    }

    /// So many bytes of the image have gone, and that was all.
    pub fn image_sent(&mut self, bytes: u64) {
        if let Some(image) = &mut self.report.image {
            image.bytes = bytes;
        }
        self.files_settled_as("the image is sent");
    }

    /// All files are over there, and what comes is memory.
    pub fn files_settled(&mut self) {
        self.files_settled_as("files are copied");
    }

    fn files_settled_as(&mut self, name: &str) {
        self.mark(name);
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// The rounds are over: what comes is the freeze.
    pub fn settled(&mut self, next: NextRound) {
        self.mark("memory is copied");
        self.report.settled = Some(next);
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }

        if self.quiet || self.json {
            return;
        }
        let rest = |report: &Report| report.rounds.last().and_then(|r| r.left).unwrap_or(0) * 4;

        match next {
            NextRound::FreezeAnyway => {
                let rest = rest(&self.report);
                tell!(
                    "warning: it writes faster than memory gets away: {rest} KiB are left and go \
                       in the freeze"
                );
            }
            NextRound::PostCopy if !self.report.rounds.is_empty() => {
                let rest = rest(&self.report);
                tell!(
                    "{:>9.1} ms  {rest} KiB do not get less: they follow when it runs there",
                    self.ms(Instant::now())
                );
            }
            _ => {}
        }
    }

    /// So many bytes of memory were handed on, so many went on the link, of about `total`.
    pub fn progress(&mut self, raw: u64, wire: u64, total: u64) {
        if self.quiet || self.report.source.iter().any(|m| m.name == "freeze") {
            return;
        }
        if self.json {
            if self.told.is_none_or(|t| t.elapsed() > Duration::from_secs(1)) {
                self.told = Some(Instant::now());
                let at_ms = self.ms(Instant::now());
                self.event(&serde_json::json!({"event": "progress", "at_ms": at_ms,
                    "memory_bytes": raw, "wire_bytes": wire, "resident_bytes": total}));
            }
            return;
        }

        let bar = self.bar.get_or_insert_with(|| {
            // Hidden where standard error is no terminal.
            let bar = ProgressBar::new(total);
            let words = "              memory {bar:30} {bytes}/{total_bytes} {msg}";
            bar.set_style(
                ProgressStyle::with_template(words).unwrap_or(ProgressStyle::default_bar()),
            );
            bar
        });

        bar.set_length(total.max(raw));
        bar.set_position(raw);
        bar.set_message(format!("({:.1} MiB on the link)", wire as f64 / f64::from(1 << 20)));
    }

    /// A problem that is no obstacle.
    pub fn problem(&mut self, problem: Problem) {
        if !self.quiet {
            self.warn(&problem.to_string(), &problem.hint);
        }
        let Problem { what, why, .. } = &problem;
        self.report.changed.push(ChangedAspect { what: what.clone(), detail: why.clone() });
        self.warnings.push(problem);
    }

    /// Something worth telling that is no obstacle.
    pub fn warning(&mut self, text: &str) {
        self.warn(text, "");
    }

    fn warn(&mut self, text: &str, hint: &str) {
        if !self.json {
            return log::warn(text, [hint]);
        }
        let mut value = serde_json::json!({"event": "warning", "message": text});
        if !hint.is_empty() {
            value["hint"] = hint.into();
        }
        self.event(&value);
    }

    fn event(&self, value: &serde_json::Value) {
        // A reader that went away is no reason to stop a migration.
        let _ = writeln!(std::io::stdout(), "{}", shown::json(value));
    }

    /// The end: prints the report and writes it to `file`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&mut self, result: &str, file: Option<&Path>) -> Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.report.result = result.into();
        self.report.criu_ms = self.report.criu();
        self.report.peak_kib = process::peak_kib();
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
        let criu = report.criu_ms.map_or(String::new(), |c| {
            format!(" (CRIU: dump {:.1}, restore {:.1})", c.dump, c.restore)
        });

        tell!(
            "{} runs on {}: frozen for {:.1} ms{criu}, {:.1} ms in all, {:.1} MiB on the link \
             ({sent} pages in {} rounds, {} packets kept)",
            report.container,
            report.destination,
            report.frozen_ms.unwrap_or(0.0),
            report.total_ms,
            report.wire_bytes as f64 / f64::from(1 << 20),
            report.rounds.len(),
            report.packets,
        );

        for (i, round) in report.rounds.iter().enumerate() {
            let left = round.left.map_or(String::new(), |n| format!(", {n} written to meanwhile"));
            tell!(
                "  round {}{}: {:.1} ms, {} pages ({} zero, {} like others, {} unchanged), {:.1} MiB \
                 on the link at {:.0} MB/s{left}",
                i + 1,
                if round.frozen { " (frozen)" } else { "" },
                round.ms,
                round.pages.sent,
                round.pages.zero,
                round.pages.same,
                round.pages.unchanged,
                round.wire_bytes as f64 / f64::from(1 << 20),
                round.rate(),
            );
        }

        if let Some(pages) = report.verified_pages {
            tell!("  {pages} pages of memory compared: the same on both hosts");
        }
        if let Some(served) = report.served.filter(|s| s.faults > 0) {
            tell!(
                "  {} pages waited for over there, {:.2} ms each, {:.1} ms at most; {} pages fetched \
                 after the resume",
                served.faults,
                served.faults_us as f64 / 1000.0 / served.faults as f64,
                served.worst_fault_us as f64 / 1000.0,
                served.fetched,
            );
        }

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
