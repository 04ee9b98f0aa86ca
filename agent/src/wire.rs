//! The door to the controller and to other agents: the only place of this crate that names generated protobuf types.
//!
//! Conversions are fallible inward and total outward. Nothing here decides.

mod enrolment;
mod facts;
mod found;
mod job;
mod link;
mod outcome;
mod past;
mod spool;

pub use enrolment::{Enrolled, Enrolment, JoinAsk, Met, who_am_i};
pub use link::{Attached, attach};
pub use spool::{Acknowledged, Incoming, bring, service as spool_service};

/// A message of the controller that does not read as one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    #[error("{message} without {field}")]
    Missing { message: &'static str, field: &'static str },
    #[error("{message} with {field} {found}: {problem}")]
    Value { message: &'static str, field: &'static str, found: String, problem: String },
}

/// Closes over a message's name, so that each field's error names both.
#[derive(Clone, Copy)]
struct Reader {
    message: &'static str,
}

impl Reader {
    fn missing(self, field: &'static str) -> WireError {
        WireError::Missing { message: self.message, field }
    }

    fn value(self, field: &'static str, found: impl std::fmt::Debug, problem: impl std::fmt::Display) -> WireError {
        WireError::Value { message: self.message, field, found: format!("{found:?}"), problem: problem.to_string() }
    }

    fn parse<T>(self, field: &'static str, text: &str) -> Result<T, WireError>
    where
        T: std::str::FromStr,
        T::Err: std::fmt::Display,
    {
        text.parse().map_err(|error: T::Err| self.value(field, text, error))
    }

    /// Empty is absent.
    fn parse_optional<T>(self, field: &'static str, text: &str) -> Result<Option<T>, WireError>
    where
        T: std::str::FromStr,
        T::Err: std::fmt::Display,
    {
        if text.is_empty() { Ok(None) } else { self.parse(field, text).map(Some) }
    }

    fn text(self, field: &'static str, text: String) -> Result<String, WireError> {
        if text.is_empty() { Err(self.missing(field)) } else { Ok(text) }
    }

    fn bytes32(self, field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
        bytes.try_into().map_err(|_| self.value(field, format!("{} bytes", bytes.len()), "it has 32 bytes"))
    }
}

fn text_of(value: &Option<impl ToString>) -> String {
    value.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn path_text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}
