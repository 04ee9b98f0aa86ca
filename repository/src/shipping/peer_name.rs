//! The name of the agent that keeps another's WAL, as policies write it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const MOST_BYTES: usize = 63;

/// 1 to 63 of a-z, 0-9, '-', '.' and '_'. Held in place, so that what it is part of stays a plain value.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerName {
    bytes: [u8; MOST_BYTES],
    length: u8,
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not an agent's name: 1 to 63 of a-z, 0-9, '-', '.' and '_'")]
pub struct PeerNameError(String);

impl PeerName {
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).expect("it was made of ASCII")
    }
}

impl FromStr for PeerName {
    type Err = PeerNameError;

    fn from_str(text: &str) -> Result<PeerName, PeerNameError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_');
        let fits = (1..=MOST_BYTES).contains(&text.len()) && text.bytes().all(allowed);
        if !fits {
            return Err(PeerNameError(text.to_owned()));
        }
        let mut bytes = [0; MOST_BYTES];
        bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        Ok(PeerName { bytes, length: text.len() as u8 })
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerName({self})")
    }
}

impl Serialize for PeerName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for PeerName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PeerName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_as_they_print() {
        let long = "x".repeat(63);
        for name in ["db2", "a.b-c_d", long.as_str()] {
            assert_eq!(name.parse::<PeerName>().unwrap().to_string(), name);
        }
        for bad in ["", "DB2", "a b", "../x", &"x".repeat(64)] {
            assert!(bad.parse::<PeerName>().is_err(), "{bad}");
        }
    }
}
