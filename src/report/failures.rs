//! Errors of steps that must not keep later steps from being tried.

use anyhow::Result;

/// A step on a state: what it does, for whoever reads that it has failed, and how. It is told what has
/// failed before.
pub type NamedStep<S> = (&'static str, fn(&mut S, &Failures) -> Result<()>);

/// Collects errors of steps that must not keep later steps from being tried.
#[derive(Debug, Default)]
pub struct Failures(Vec<String>);

impl Failures {
    /// Notes the error of a step.
    pub fn note<T, E: std::fmt::Display>(&mut self, step: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.0.push(format!("{step}: {e:#}"))).ok()
    }

    /// Takes all steps in their order, whatever becomes of each.
    pub fn try_all<S>(&mut self, steps: &[NamedStep<S>], state: &mut S) {
        for (name, step) in steps {
            let done = step(state, self);
            self.note(name, done);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A step that fails keeps no later one from being tried, and each is told of those before it.
    #[test]
    fn all_steps_are_tried() {
        let good: NamedStep<Vec<bool>> = ("good", |seen, before| {
            seen.push(before.is_empty());
            Ok(())
        });
        let bad: NamedStep<Vec<bool>> = ("bad", |seen, before| {
            seen.push(before.is_empty());
            anyhow::bail!("no")
        });
        let (mut failures, mut seen) = (Failures::default(), Vec::new());
        failures.try_all(&[good, bad, good, bad, good], &mut seen);
        assert_eq!(seen, [true, true, false, false, false]);
        assert_eq!(failures.into_result().unwrap_err().to_string(), "bad: no; bad: no");
    }
}
