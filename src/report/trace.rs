//! `--debug`: what our own verbs say of their doings, on stderr, or in the file of `--log` as
//! runc would write it. Without the flag only warnings and errors that nobody else tells.
//!
//! `ferry migrate --debug` asks the other host's Ferry for the same.
//!
//! Never set up in the pass-through: there runc has the word.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::log::ErrorLog;
use super::shown::shown;

/// Sets it up for the rest of the process; a second call changes nothing. `who` stands before each
/// line on stderr: the lines of two hosts come together where one of them is reached through ssh.
pub fn start(debug: bool, log: ErrorLog, who: String) {
    let most = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let lines = EventLines { log, who, began: Instant::now() };
    let _ = tracing_subscriber::registry().with(lines.with_filter(most)).try_init();
}

/// One line an event.
struct EventLines {
    log: ErrorLog,
    who: String,
    began: Instant,
}

impl<S: Subscriber> Layer<S> for EventLines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = name(*event.metadata().level());
        if self.log.line(level, &text.0) {
            return;
        }
        let ms = self.began.elapsed().as_secs_f64() * 1000.0;
        // One write, and none that could panic: nobody may read it.
        let line = format!("{}: {level}: {ms:>8.1} ms  {}\n", self.who, shown(&text.0));
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// As logrus calls the levels.
fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// The message, then the other fields as `name=value`.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0.insert_str(0, &format!("{value:?}"));
        } else {
            let _ = write!(self.0, " {}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::log::Format;

    #[test]
    fn lines_go_to_the_log_in_its_form() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        for (debug, format) in [(false, Format::Text), (true, Format::Json)] {
            let log = ErrorLog { file: Some(file.clone()), format };
            let most = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
            let lines = EventLines { log, who: "ferry".into(), began: Instant::now() };
            let subscriber = tracing_subscriber::registry().with(lines.with_filter(most));
            tracing::subscriber::with_default(subscriber, || {
                tracing::debug!(pid = 7, "started {}", "criu");
                tracing::warn!("odd");
            });
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].ends_with("level=warning msg=odd"), "{text}");
        let json: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!((&json["level"], &json["msg"]), (&"debug".into(), &"started criu pid=7".into()));
        assert!(lines[2].contains("\"warning\""), "{text}");
    }
}
