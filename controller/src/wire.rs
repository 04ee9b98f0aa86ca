//! Where generated protobuf types become the controller's own and back. Nothing but conversions: fallible inward, total
//! outward.

pub mod agent;
pub mod desired;
pub mod job;
pub mod operator;
pub mod recovery;
pub mod replicas;
pub mod retention;

use jiff::Timestamp;
use walfleet_repository::postgres::Lsn;

/// A message that does not say what it must.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct WireError {
    /// Dotted path in the message.
    pub field: String,
    /// May end in one HINT.
    pub problem: String,
}

impl WireError {
    pub fn new(field: impl Into<String>, problem: impl std::fmt::Display) -> WireError {
        WireError { field: field.into(), problem: problem.to_string() }
    }

    /// The same, seen from the message around it.
    pub fn within(self, outer: &str) -> WireError {
        WireError { field: format!("{outer}.{}", self.field), ..self }
    }
}

/// Microseconds since the Unix epoch; 0: absent.
fn time_in(field: &str, micros: i64) -> Result<Option<Timestamp>, WireError> {
    if micros == 0 {
        return Ok(None);
    }
    Timestamp::from_microsecond(micros).map(Some).map_err(|_| WireError::new(field, "the time is out of range"))
}

fn required_time_in(field: &str, micros: i64) -> Result<Timestamp, WireError> {
    Timestamp::from_microsecond(micros).map_err(|_| WireError::new(field, "the time is out of range"))
}

fn time_out(at: Option<Timestamp>) -> i64 {
    at.map_or(0, Timestamp::as_microsecond)
}

/// Empty: absent.
fn lsn_in(field: &str, text: &str) -> Result<Option<Lsn>, WireError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|error| WireError::new(field, error))
}

fn required_lsn_in(field: &str, text: &str) -> Result<Lsn, WireError> {
    text.parse().map_err(|error| WireError::new(field, error))
}

fn lsn_out(lsn: Option<Lsn>) -> String {
    lsn.map(|lsn| lsn.to_string()).unwrap_or_default()
}

/// Texts from hosts are kept this long at most: enough for any message a person reads, and a bound for the state.
const MAX_TEXT: usize = 4096;

/// Cuts at a character's border.
fn bounded(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}
