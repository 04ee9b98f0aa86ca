//! At which point the server goes before the archive: `never`, `90%` or `20GiB`.

use std::fmt;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Word;

/// When WAL that the repository cannot take is let go of.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum LetGoAt {
    /// It is held on to, until the server stops for want of space.
    #[default]
    Never,
    /// Percent of the file system of `pg_wal` that are in use: 50 to 99.
    Used(u8),
    /// Bytes that the slot keeps: 64 MiB to 1 PiB.
    Kept(u64),
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{text}\" is not when WAL is let go of\nHINT: write never, 50% to 99% of the file system of pg_wal, or what the slot may keep, 64MiB to 1PiB: 90%, 20GiB."
)]
pub struct LetGoAtError {
    text: String,
}

const UNITS: [(&str, u32); 4] = [("MiB", 20), ("GiB", 30), ("TiB", 40), ("PiB", 50)];

impl LetGoAt {
    const LEAST_KEPT: u64 = 64 << 20;
    const MOST_KEPT: u64 = 1 << 50;

    fn parse(text: &str) -> Option<LetGoAt> {
        if text == "never" {
            return Some(LetGoAt::Never);
        }
        let whole = |digits: &str| {
            digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten()
        };
        if let Some(digits) = text.strip_suffix('%') {
            let percent = u8::try_from(whole(digits)?).ok()?;
            return (50..=99).contains(&percent).then_some(LetGoAt::Used(percent));
        }
        let (digits, shift) = UNITS.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))?;
        let bytes = whole(digits)?.checked_mul(1 << shift)?;
        (Self::LEAST_KEPT..=Self::MOST_KEPT).contains(&bytes).then_some(LetGoAt::Kept(bytes))
    }
}

impl FromStr for LetGoAt {
    type Err = LetGoAtError;

    fn from_str(text: &str) -> Result<LetGoAt, LetGoAtError> {
        LetGoAt::parse(text).ok_or_else(|| LetGoAtError { text: text.to_owned() })
    }
}

impl fmt::Display for LetGoAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LetGoAt::Never => f.write_str("never"),
            LetGoAt::Used(percent) => write!(f, "{percent}%"),
            LetGoAt::Kept(bytes) => {
                let fits = |(_, shift): &&(&str, u32)| bytes.is_multiple_of(1 << shift);
                let (unit, shift) = UNITS.iter().rev().find(fits).unwrap_or(&UNITS[0]);
                write!(f, "{}{unit}", bytes >> shift)
            }
        }
    }
}

impl Serialize for LetGoAt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LetGoAt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LetGoAt, D::Error> {
        deserializer.deserialize_str(Word)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_read_as_they_print_and_nonsense_does_not() {
        let known = [
            ("never", LetGoAt::Never),
            ("90%", LetGoAt::Used(90)),
            ("64MiB", LetGoAt::Kept(64 << 20)),
            ("20GiB", LetGoAt::Kept(20 << 30)),
            ("1PiB", LetGoAt::Kept(1 << 50)),
        ];
        for (text, limit) in known {
            assert_eq!(text.parse::<LetGoAt>(), Ok(limit));
            assert_eq!(limit.to_string(), text);
        }
        for bad in
            ["", "%", "49%", "100%", "-90%", "9.5%", "63MiB", "2PiB", "20GB", "20", "always", "99999999999999999TiB"]
        {
            assert!(bad.parse::<LetGoAt>().is_err(), "{bad}");
        }
    }
}
