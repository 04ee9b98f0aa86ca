//! How an operation that a person or a job asked for can end badly: one shape, mapped to exit codes in one place.
//!
//! Modules keep their own error types; they become a [`Failure`] where a command or a job ends.

use std::fmt;

/// What the caller should do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remedy {
    /// Trying again may help: the store, the network or Postgres was not ready.
    Retry,
    /// It fails the same way until a person changes something.
    Operator,
}

/// The documented exit codes (docs/command-line.md).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitCode {
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Refused = 4,
    Unreachable = 5,
    TimedOut = 6,
    NotRecoverable = 7,
}

/// The end of an operation, as people and the controller see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Stable, dotted: "restore.directory_not_empty".
    pub code: &'static str,
    /// For people; may end in one `HINT: …` line.
    pub message: String,
    pub exit: ExitCode,
    pub remedy: Remedy,
}

impl Failure {
    pub fn new(code: &'static str, exit: ExitCode, remedy: Remedy, message: impl fmt::Display) -> Failure {
        Failure { code, message: message.to_string(), exit, remedy }
    }

    /// The operation was told to stop; never logged as an error.
    pub fn cancelled() -> Failure {
        Failure::new("cancelled", ExitCode::Failed, Remedy::Operator, "cancelled")
    }

    pub fn is_cancelled(&self) -> bool {
        self.code == "cancelled"
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
