//! What stands in the way, said so that it can be mended.
//!
//! What to do about an error is a field of it and never part of its text: text may hold names that a
//! container or another host has chosen, and none of these may pass for advice.

use std::fmt;

/// Something that stands in the way: what, why, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Problem {
    /// What cannot be done or is not as it must be.
    pub what: String,
    /// The reason, as far as it is known.
    pub why: String,
    /// What the operator can do; empty if nothing is known.
    pub hint: String,
    /// `false`: worth telling, but the migration may well succeed.
    pub fatal: bool,
}

impl Problem {
    /// A problem that stops the migration.
    pub fn new(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { what: what.into(), why: why.to_string(), hint: String::new(), fatal: true }
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Makes a warning of it.
    pub fn warning(mut self) -> Self {
        self.fatal = false;
        self
    }
}

/// What and why; the hint is told apart.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl std::error::Error for Problem {}

/// All that stands in the way, as one error.
#[derive(Debug)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join("; "))
    }
}

impl std::error::Error for Problems {}

/// An error of any kind, with what to do about it.
#[derive(Debug)]
pub struct Advice {
    what: String,
    hints: Vec<String>,
    source: Option<anyhow::Error>,
}

impl Advice {
    /// Returns what to do about it.
    pub fn hints(&self) -> &[String] {
        &self.hints
    }

    /// Returns what another error means, which knows what to do about it.
    pub fn over(why: anyhow::Error, source: anyhow::Error) -> anyhow::Error {
        match why.downcast::<Advice>() {
            Ok(advice) => Advice { source: Some(source), ..advice }.into(),
            Err(why) => source.context(why),
        }
    }

    /// An error with hints that have come along with it.
    pub fn with(what: impl Into<String>, hints: Vec<String>) -> anyhow::Error {
        Advice { what: what.into(), hints, source: None }.into()
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Advice {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.source.as_ref()?;
        Some(source.as_ref())
    }
}

/// An error, and what to do about it.
pub fn advice(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Advice::with(what, vec![hint.into()])
}

/// Adds to an error what it means, and what to do about it.
pub trait Advise<T> {
    /// As [`anyhow::Context::context`], with a hint.
    ///
    /// # Errors
    /// The same, with more words.
    fn advise(self, what: impl Into<String>, hint: impl Into<String>) -> Result<T, anyhow::Error>;
}

impl<T, E: Into<anyhow::Error>> Advise<T> for Result<T, E> {
    fn advise(self, what: impl Into<String>, hint: impl Into<String>) -> Result<T, anyhow::Error> {
        self.map_err(|e| {
            let (what, hints, source) = (what.into(), vec![hint.into()], Some(e.into()));
            Advice { what, hints, source }.into()
        })
    }
}

/// Says what was tried when it fails.
pub(crate) trait Trying<T> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, Problem>;
}

impl<T, E: fmt::Display> Trying<T> for Result<T, E> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, Problem> {
        self.map_err(|e| Problem::new(what(), e))
    }
}
