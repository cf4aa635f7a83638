//! What suites that need hosts share: a lab, containers in it, a probe, and the question who has
//! the container.

pub mod container;
pub mod facts;
pub mod lab;
pub mod probe;
pub mod process;
pub mod suite;
pub mod wire;

/// How a trial ends; the text is what the reader of a failed run sees.
pub type Outcome<T = ()> = Result<T, String>;

/// Fails with the text unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        {
            let holds: bool = $condition;
            if !holds {
                return Err(format!($($text)+));
            }
        }
    };
}
pub(crate) use ensure;
