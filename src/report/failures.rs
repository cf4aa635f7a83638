//! Errors of steps that must not keep later steps from being tried.

use anyhow::Result;

/// Collects errors of steps that must not keep later steps from being tried.
#[derive(Debug, Default)]
pub struct Failures(Vec<String>);

impl Failures {
    /// Notes the error of a step.
    pub fn note<T, E: std::fmt::Display>(&mut self, step: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.0.push(format!("{step}: {e:#}"))).ok()
    }

    /// Tells whether nothing has failed so far.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of it, or nothing.
    ///
    /// # Errors
    /// When any step failed.
    pub fn into_result(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(anyhow::anyhow!(self.0.join("; "))) }
    }
}
