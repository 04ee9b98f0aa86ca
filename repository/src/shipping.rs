//! How a cluster's WAL is shipped, as people write it in policies and in an agent's configuration. Values only.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

mod let_go;
mod peer_name;

pub use let_go::{LetGoAt, LetGoAtError};
pub use peer_name::{PeerName, PeerNameError};

/// Absent: as the other place says, or the default.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShippingSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streaming: Option<Streaming>,
    /// Between two pieces of an unfinished segment, while there is traffic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub piece_interval: Option<PieceInterval>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synchronous: Option<Synchronous>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Where WAL that cannot be stored is no longer kept for it, lest the server stop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub let_go_at: Option<LetGoAt>,
    /// Which agent's spool keeps what the repository may lack. Absent: the controller chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spool_peer: Option<PeerName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub without_peer: Option<WithoutPeer>,
}

impl ShippingSpec {
    pub const NONE: ShippingSpec = ShippingSpec {
        streaming: None,
        piece_interval: None,
        synchronous: None,
        compression: None,
        let_go_at: None,
        spool_peer: None,
        without_peer: None,
    };

    /// What this says, and where it says nothing what the other does.
    #[must_use]
    pub fn or(self, other: ShippingSpec) -> ShippingSpec {
        ShippingSpec {
            streaming: self.streaming.or(other.streaming),
            piece_interval: self.piece_interval.or(other.piece_interval),
            synchronous: self.synchronous.or(other.synchronous),
            compression: self.compression.or(other.compression),
            let_go_at: self.let_go_at.or(other.let_go_at),
            spool_peer: self.spool_peer.or(other.spool_peer),
            without_peer: self.without_peer.or(other.without_peer),
        }
    }

    /// What it costs where it matters: requests that store pieces, of a cluster that is never idle.
    pub fn pieces_a_month(self) -> u64 {
        let interval = match self.synchronous {
            Some(Synchronous::Repository) => ONE_PUT,
            _ => self.piece_interval.unwrap_or_default().duration(),
        };
        (30 * 86_400_000) / u64::try_from(interval.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// The choice, and its price beside it.
    pub fn in_words(self) -> String {
        if self.streaming == Some(Streaming::Off) {
            return "archive_command alone".to_owned();
        }
        let cents = (self.pieces_a_month() * CENTS_A_MILLION + 500_000) / 1_000_000;
        let price = if cents < 100 { format!("{cents} cents") } else { format!("{} dollars", (cents + 50) / 100) };
        let price = format!("at most {price} a month for pieces, at 5 dollars a million requests");
        let interval = self.piece_interval.unwrap_or_default();
        match self.synchronous.unwrap_or_default() {
            Synchronous::Off => format!("pieces every {interval} ({price})"),
            Synchronous::Repository => {
                format!(
                    "pieces as fast as the repository takes them ({price}, if each takes {} ms)",
                    ONE_PUT.as_millis()
                )
            }
            Synchronous::Spool => format!("pieces every {interval}, and at once to two hosts' spools ({price})"),
        }
    }
}

/// Of a request that stores a piece, as object stores take it.
const ONE_PUT: Duration = Duration::from_millis(50);
/// What large providers ask for requests that store.
const CENTS_A_MILLION: u64 = 500;

/// Whether WAL is received over the replication protocol.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum Streaming {
    /// Where the role and the server allow it.
    #[default]
    Auto,
    /// Where it cannot be, that is a problem of the cluster.
    On,
    Off,
}

/// What a commit on the server may wait for (synchronous_standby_names).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum Synchronous {
    /// Nothing of ours: pieces leave on the timer.
    #[default]
    Off,
    /// The repository has it: the next piece leaves when the last returns.
    Repository,
    /// This host's spool and another's have it synced to disk: the next piece leaves when the last is.
    Spool,
}

/// What a commit that waits for two spools waits for while the other one is away.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum WithoutPeer {
    /// That the repository has it: nothing is lost, commits take longer.
    #[default]
    Repository,
    /// This host's spool: what the repository lacks is lost with the host.
    Alone,
    /// That the other one is back, or the repository has it by the timer.
    Wait,
}

/// How hard segments are compressed.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub enum Compression {
    /// At the level for backups, and lightly while a backlog waits.
    #[default]
    Adaptive,
    /// At the level for backups.
    Fixed,
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("\"{text}\" is not {expected}")]
pub struct WordError {
    text: String,
    expected: &'static str,
}

/// "500ms", "1s", "2m": 100 ms to one hour.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PieceInterval(Duration);

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{text}\" is not a time between two pieces\nHINT: write a whole number and a unit, 100ms to 1h: 500ms, 1s, 30s, 1m."
)]
pub struct PieceIntervalError {
    text: String,
}

/// Longest suffix first.
const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

impl PieceInterval {
    const LEAST_MS: u64 = 100;
    const MOST_MS: u64 = 3_600_000;

    pub fn from_millis(millis: u64) -> Option<PieceInterval> {
        (Self::LEAST_MS..=Self::MOST_MS).contains(&millis).then(|| PieceInterval(Duration::from_millis(millis)))
    }

    pub fn duration(self) -> Duration {
        self.0
    }

    pub fn as_millis(self) -> u64 {
        // At most an hour.
        self.0.as_millis() as u64
    }
}

impl Default for PieceInterval {
    fn default() -> PieceInterval {
        PieceInterval(Duration::from_secs(1))
    }
}

impl FromStr for PieceInterval {
    type Err = PieceIntervalError;

    fn from_str(text: &str) -> Result<PieceInterval, PieceIntervalError> {
        let (digits, scale) =
            UNITS.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale))).unwrap_or((text, 0));
        let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let millis = digits.parse::<u64>().ok().filter(|_| is_plain).and_then(|number| number.checked_mul(scale));
        millis.and_then(PieceInterval::from_millis).ok_or_else(|| PieceIntervalError { text: text.to_owned() })
    }
}

impl fmt::Display for PieceInterval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.as_millis();
        let (unit, scale) = UNITS.iter().rev().find(|(_, scale)| millis.is_multiple_of(*scale)).unwrap_or(&UNITS[0]);
        write!(f, "{}{unit}", millis / scale)
    }
}

macro_rules! words {
    ($name:ident, $expected:literal, $($variant:ident = $word:literal),+) => {
        impl $name {
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = WordError;

            fn from_str(text: &str) -> Result<$name, WordError> {
                match text {
                    $($word => Ok($name::$variant),)+
                    _ => Err(WordError { text: text.to_owned(), expected: $expected }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                deserializer.deserialize_any(Word)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

words!(Streaming, "auto, on or off", Auto = "auto", On = "on", Off = "off");
words!(Compression, "adaptive or fixed", Adaptive = "adaptive", Fixed = "fixed");
words!(Synchronous, "off, repository or spool", Off = "off", Repository = "repository", Spool = "spool");
words!(WithoutPeer, "repository, alone or wait", Repository = "repository", Alone = "alone", Wait = "wait");

/// A word, though YAML 1.1 takes `on` and `off` for truth values.
struct Word;

impl Visitor<'_> for Word {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a word")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<String, E> {
        Ok(if value { "on" } else { "off" }.to_owned())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }
}

impl Serialize for PieceInterval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PieceInterval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PieceInterval, D::Error> {
        deserializer.deserialize_str(Word)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_read_as_they_print() {
        for (text, millis) in [("100ms", 100), ("1s", 1_000), ("1500ms", 1_500), ("1m", 60_000), ("1h", 3_600_000)] {
            let interval: PieceInterval = text.parse().unwrap();
            assert_eq!((interval.as_millis(), interval.to_string().as_str()), (millis, text));
        }
        for bad in ["", "1", "s", "99ms", "0s", "-1s", "1.5s", "61m", "1d", "99999999999999999999s", "1 s"] {
            assert!(bad.parse::<PieceInterval>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_piece_a_second_is_what_the_price_says() {
        let spec = |text: &str| ShippingSpec { piece_interval: text.parse().ok(), ..ShippingSpec::NONE };
        // At 5 dollars a million requests that store.
        assert_eq!(ShippingSpec::NONE.pieces_a_month() * 5 / 1_000_000, 12);
        assert_eq!(spec("1m").pieces_a_month(), 43_200);
        let price = "a month for pieces, at 5 dollars a million requests";
        assert_eq!(ShippingSpec::NONE.in_words(), format!("pieces every 1s (at most 13 dollars {price})"));
        assert_eq!(spec("1m").in_words(), format!("pieces every 1m (at most 22 cents {price})"));
        let waits = ShippingSpec { synchronous: Some(Synchronous::Repository), ..ShippingSpec::NONE };
        assert!(waits.in_words().contains("259 dollars"), "{}", waits.in_words());
    }
}
