//! A panic on a thread of its own, told as an error.
//!
//! Nobody else hears of it: the process goes on, without that thread. And as it unwinds it closes what the
//! thread had open, such as the userfaultfds that restored tasks wait on, which would read zeros then.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Result;

/// Returns what the work says, or that it panicked. What it had borrowed may be half done: end, and use no more
/// of it than has to be given back.
///
/// # Errors
/// Those of the work, and a panic.
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(Panicked(words_of(&*panic).to_owned()).into()))
}

/// A fault of Ferry's own.
#[derive(Debug)]
pub struct Panicked(String);

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a fault of Ferry's own: {}", self.0)
    }
}

impl Error for Panicked {}

/// Returns what a panic says.
pub fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without words")
}
