//! What can be wrong with a network, said so that it can be mended.

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

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)?;
        if !self.hint.is_empty() {
            write!(f, "\nhint: {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// Says what was tried when it fails.
pub(crate) trait Trying<T> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, Problem>;
}

impl<T, E: fmt::Display> Trying<T> for Result<T, E> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, Problem> {
        self.map_err(|e| Problem::new(what(), e))
    }
}
