//! Lengths of time as people write them in documents: "90s", "15m", "26h", "7d".

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Whole seconds. A day is 24 hours: nothing here follows a calendar.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(u64);

/// A text that is no length of time.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{text}\" is not a length of time\nHINT: write a whole number and a unit: 90s, 15m, 26h or 7d, at most 3650d."
)]
pub struct SpanError {
    text: String,
}

const UNITS: [(char, u64); 4] = [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];
/// Ten years: beyond it a number is a slip of the unit, and time arithmetic stays far from overflow.
const MAX_SECONDS: u64 = 3_650 * 86_400;

impl Span {
    pub const ZERO: Span = Span(0);

    pub const fn seconds(seconds: u64) -> Span {
        Span(seconds)
    }

    pub const fn minutes(minutes: u64) -> Span {
        Span(minutes * 60)
    }

    pub const fn hours(hours: u64) -> Span {
        Span(hours * 3_600)
    }

    pub const fn as_seconds(self) -> u64 {
        self.0
    }

    pub const fn as_duration(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Span, SpanError> {
        let bad = || SpanError { text: text.to_owned() };
        let unit = text.chars().next_back().ok_or_else(bad)?;
        let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
        let digits = text.strip_suffix(unit).unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let seconds = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(*scale)).ok_or_else(bad)?;
        if seconds > MAX_SECONDS { Err(bad()) } else { Ok(Span(seconds)) }
    }
}

impl TryFrom<String> for Span {
    type Error = SpanError;

    fn try_from(text: String) -> Result<Span, SpanError> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> String {
        span.to_string()
    }
}

impl fmt::Display for Span {
    /// In the largest unit that divides it, so that what was written is what is read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, scale) =
            UNITS.into_iter().find(|(_, scale)| self.0 > 0 && self.0.is_multiple_of(*scale)).unwrap_or(('s', 1));
        write!(f, "{}{unit}", self.0 / scale)
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_read_back_as_written_and_slips_are_refused() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("15m", 900), ("26h", 93_600), ("7d", 604_800)] {
            let span: Span = text.parse().expect(text);
            assert_eq!(span.as_seconds(), seconds);
            assert_eq!(span.to_string(), text);
        }
        assert_eq!("120s".parse::<Span>().map(|span| span.to_string()), Ok("2m".to_owned()));
        for bad in ["", "s", "15", "15 m", "-1s", "+1s", "1.5h", "1h30m", "4000d", "99999999999999999999d", "١s", "5µ"]
        {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
