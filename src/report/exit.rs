//! How a verb of ours ends: the exit code, and the error that goes with it.

/// The exit codes that scripts may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It is done.
    Done = 0,
    /// It failed, and the container runs on here as if nothing had happened.
    RunsOnHere = 1,
    /// The command line was wrong.
    Usage = 2,
    /// It was refused before anything was touched.
    Refused = 3,
    /// Which host owns the container is in doubt: `ferry resolve` is needed.
    InDoubt = 4,
}

impl Exit {
    /// Returns how a report calls it.
    pub fn word(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::RunsOnHere => "runs_on_here",
            Exit::Usage => "usage",
            Exit::Refused => "refused",
            Exit::InDoubt => "in_doubt",
        }
    }
}

impl From<Exit> for u8 {
    fn from(exit: Exit) -> Self {
        exit as u8
    }
}

/// Why a verb of ours did not do what it was asked, and how it must exit.
#[derive(Debug)]
pub struct Failed {
    /// What the caller's script is told.
    pub exit: Exit,
    /// What the user is told; see [`crate::report::log`] for how hints are written.
    pub error: anyhow::Error,
}

impl Failed {
    /// The command line was wrong.
    pub fn usage(error: anyhow::Error) -> Self {
        Failed { exit: Exit::Usage, error }
    }

    /// Refused before anything was touched.
    pub fn refused(error: anyhow::Error) -> Self {
        Failed { exit: Exit::Refused, error }
    }

    /// Nobody knows yet who owns the container.
    pub fn in_doubt(error: anyhow::Error) -> Self {
        Failed { exit: Exit::InDoubt, error }
    }
}

/// An error that the other host has been told in full, and tells its user.
#[derive(Debug)]
pub struct ToldError(pub anyhow::Error);

impl std::fmt::Display for ToldError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for ToldError {}

/// An error that nobody classified: the container runs on here.
impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Failed { exit: Exit::RunsOnHere, error }
    }
}
