//! Errors of our own, where callers look for them: `--log` in runc's format, and stderr.
//!
//! Engines do not read our stderr: containerd and docker take the last `"level":"error"`
//! of `log.json`, podman the same when it knows the runtime. So a record must look as if
//! logrus (runc's logger) had written it.
//!
//! An error says what happened and why; how to mend it follows on lines that begin with
//! `hint: `. Hints are fields of the errors that have any ([`Advice`], [`Problem`]), wherever they are
//! in an [`anyhow`] chain, and are gathered behind the message. All text is told as [`shown`] makes it:
//! a line that begins so is Ferry's own.

use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::shown::shown;
use crate::problem::{Advice, Problem, Problems};

/// `--log-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `time=… level=error msg=…`
    #[default]
    Text,
    /// `{"level":"error","msg":…,"time":…}`
    Json,
}

impl Format {
    /// As it is written on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Json => "json",
        }
    }
}

/// Where errors go besides stderr, as `--log` and `--log-format` say.
#[derive(Debug, Clone, Default)]
pub struct ErrorLog {
    /// The file of `--log`.
    pub file: Option<PathBuf>,
    /// The form of `--log-format`.
    pub format: Format,
}

impl ErrorLog {
    /// An error of one of our own verbs: for people on stderr, for engines in the log.
    pub fn error(&self, error: &anyhow::Error) {
        let told = ErrorParts::from(error);
        self.append(&told);
        told.print_for_people();
    }

    /// Only to the log file, for what stderr was told already.
    pub fn log_only(&self, error: &anyhow::Error) {
        self.append(&ErrorParts::from(error));
    }

    /// An error in the place of a verb of runc's: told exactly as runc tells its own, so
    /// that whoever reads runc's stderr finds ours.
    pub fn error_as_runc(&self, error: &anyhow::Error) {
        let told = ErrorParts::from(error);
        if self.append(&told) {
            let _ = writeln!(std::io::stderr(), "{}", told.on_one_line());
        } else if std::io::stderr().is_terminal() {
            told.print_for_people();
        } else {
            let _ = std::io::stderr().write_all(self.record(&told).as_bytes());
        }
    }

    /// A line of another level, for the log file only; whether there is one and it took it.
    pub fn line(&self, level: &str, message: &str) -> bool {
        self.write(&record(self.format, &rfc3339(SystemTime::now()), level, &shown(message)), 0)
    }

    /// Tells whether there is a log file and it took the record.
    fn append(&self, told: &ErrorParts) -> bool {
        self.write(&self.record(told), libc::O_SYNC)
    }

    fn write(&self, record: &str, flags: i32) -> bool {
        let Some(file) = self.file.as_ref().filter(|file| !file.as_os_str().is_empty()) else {
            return false;
        };
        // The flags and the mode are runc's. One write, so that records never mix.
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o644)
            .custom_flags(flags)
            .open(file)
            .and_then(|mut log| log.write_all(record.as_bytes()));
        if let Err(why) = &written {
            let _ = writeln!(std::io::stderr(), "ferry: cannot write to {}: {why}", file.display());
        }
        written.is_ok()
    }

    fn record(&self, told: &ErrorParts) -> String {
        record(self.format, &rfc3339(SystemTime::now()), "error", &told.on_one_line())
    }
}

/// Returns what an error says, and what to do about it.
pub fn taken_apart(error: &anyhow::Error) -> (String, Vec<String>) {
    let told = ErrorParts::from(error);
    let messages: Vec<String> = told.0.iter().map(|one| one.message.clone()).collect();
    (messages.join("; "), told.0.into_iter().flat_map(|one| one.hints).collect())
}

/// A warning on standard error, with what to do about it. Nobody need listen.
pub fn warn<'a>(message: &str, hints: impl IntoIterator<Item = &'a str>) {
    let mut text = format!("warning: {}\n", shown(message));
    for hint in hints.into_iter().filter(|hint| !hint.is_empty()) {
        text.push_str(&hint_line(hint));
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn hint_line(hint: &str) -> String {
    format!("  hint: {}\n", shown(hint))
}

/// An error taken apart; most are one.
struct ErrorParts(Vec<Remark>);

/// What is said, and what to do.
#[derive(Debug, Default, PartialEq)]
struct Remark {
    message: String,
    hints: Vec<String>,
}

impl From<&anyhow::Error> for ErrorParts {
    fn from(error: &anyhow::Error) -> Self {
        let mut said: Vec<String> = Vec::new();
        let mut hints: Vec<String> = Vec::new();
        let mut more = Vec::new();
        for cause in error.chain() {
            let mut message = cause.to_string();
            if let Some(Problems(list)) = cause.downcast_ref() {
                let mut all = list.iter().map(Remark::of);
                let first = all.next().unwrap_or_default();
                message = first.message;
                hints.extend(first.hints);
                more.extend(all);
            } else if let Some(problem) = cause.downcast_ref::<Problem>() {
                hints.extend(Remark::of(problem).hints);
            } else if let Some(advice) = cause.downcast_ref::<Advice>() {
                hints.extend(advice.hints().iter().cloned());
            }

            let message = message.trim_end();
            // Some libraries repeat their cause in their own message.
            if !message.is_empty() && !said.last().is_some_and(|last| last.ends_with(message)) {
                said.push(message.to_owned());
            }
        }

        let first = Remark { message: said.join(": "), hints };
        ErrorParts(std::iter::once(first).chain(more).collect())
    }
}

impl Remark {
    fn of(problem: &Problem) -> Remark {
        let hints = (!problem.hint.is_empty()).then(|| problem.hint.clone());
        Remark { message: problem.to_string(), hints: hints.into_iter().collect() }
    }
}

impl ErrorParts {
    /// For logs: some readers go by lines.
    fn on_one_line(&self) -> String {
        let one = |one: &Remark| {
            let hints = one.hints.iter().map(|hint| format!("; hint: {}", shown(hint)));
            std::iter::once(shown(&one.message)).chain(hints).collect::<String>()
        };
        self.0.iter().map(one).collect::<Vec<_>>().join("; ")
    }

    fn print_for_people(&self) {
        let mut text = String::new();
        for one in &self.0 {
            text.push_str(&format!("ferry: error: {}\n", shown(&one.message)));
            one.hints.iter().for_each(|hint| text.push_str(&hint_line(hint)));
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// One line as logrus's text or JSON formatter writes it.
fn record(format: Format, time: &str, level: &str, message: &str) -> String {
    match format {
        Format::Text => {
            format!("time={} level={level} msg={}\n", logrus_value(time), logrus_value(message))
        }
        // logrus sorts the keys, and escapes what HTML would take as markup.
        Format::Json => {
            let quoted = serde_json::Value::from(message)
                .to_string()
                .replace('<', "\\u003c")
                .replace('>', "\\u003e")
                .replace('&', "\\u0026");
            format!("{{\"level\":\"{level}\",\"msg\":{quoted},\"time\":\"{time}\"}}\n")
        }
    }
}

/// A value as logrus writes it: bare when every character is harmless, else as Go's `%q`.
fn logrus_value(value: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if value.chars().all(bare) {
        return value.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in value.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A time as RFC 3339 in UTC, to the second: what logrus writes on a host in UTC.
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// The date of a day counted from 1970-01-01. Eras of 400 years that begin in March make
/// leap days come last, so that months need no table (Howard Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use anyhow::{Context, anyhow};

    use super::*;
    use crate::problem::{Advise, advice};

    #[test]
    fn records_look_like_logrus() {
        let time = "2026-03-01T12:00:00Z";
        assert_eq!(
            record(Format::Text, time, "error", "container \"a\" <b>\nend"),
            "time=\"2026-03-01T12:00:00Z\" level=error msg=\"container \\\"a\\\" <b>\\nend\"\n"
        );
        assert_eq!(
            record(Format::Text, time, "error", "plain"),
            "time=\"2026-03-01T12:00:00Z\" level=error msg=plain\n"
        );
        assert_eq!(
            record(Format::Json, time, "error", "container \"a\" <b>"),
            "{\"level\":\"error\",\"msg\":\"container \\\"a\\\" \\u003cb\\u003e\",\
             \"time\":\"2026-03-01T12:00:00Z\"}\n"
        );
    }

    #[test]
    fn hints_are_gathered_behind_the_message() {
        let why = advice("connection refused", "is sshd running?");
        let error =
            Err::<(), _>(why).context("link").advise("cannot reach host2", "try `ssh host2`");
        let told = ErrorParts::from(&error.unwrap_err());
        assert_eq!(told.0[0].message, "cannot reach host2: link: connection refused");
        assert_eq!(told.0[0].hints, ["try `ssh host2`", "is sshd running?"]);
        assert_eq!(
            told.on_one_line(),
            "cannot reach host2: link: connection refused; hint: try `ssh host2`; hint: is sshd running?"
        );
        let plain: anyhow::Result<()> = Err(anyhow!("why")).context("what");
        assert!(ErrorParts::from(&plain.unwrap_err()).0[0].hints.is_empty());
        let two = [Problem::new("a", "b").hint("c"), Problem::new("d", "e")];
        let (message, hints) = taken_apart(&Problems(two.to_vec()).into());
        assert_eq!((message.as_str(), hints), ("a: b; d: e", vec!["c".to_owned()]));
    }

    /// A name that a container has chosen, anywhere in an error, is no advice and not obeyed.
    #[test]
    fn nobody_else_gives_advice() {
        let name = "a\u{1b}]0;x\u{7}\rferry: fine\nhint: run rm";
        let named = |e: anyhow::Error| e.context(format!("cannot read {name}"));
        for error in [
            named(anyhow!("why")),
            Problem::new(name, name).hint("real").into(),
            Problems(vec![Problem::new(name, name), Problem::new(name, name)]).into(),
            named(advice(name, "real")),
            Advice::with(format!("the destination failed: {name}"), vec![name.to_owned()]),
        ] {
            let told = ErrorParts::from(&error);
            let line = told.on_one_line();
            assert!(
                !line.contains(char::is_control) && line.contains("\\nhint: run rm"),
                "{line:?}"
            );
            let hints: Vec<_> = told.0.iter().flat_map(|one| &one.hints).collect();
            assert!(hints.iter().all(|h| *h == "real" || *h == name), "{hints:?}");
        }
    }

    #[test]
    fn dates() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
