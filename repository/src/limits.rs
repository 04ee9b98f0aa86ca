//! What a host grants to backups, restores and verifications together, as people write it: "50%", "200MB/s".
//!
//! Values only: controller and agent read the same texts and pass the same quantities. Whoever does the work holds itself
//! to them; here only the store's side of it has its hook ([`crate::store::Pace`]).

use std::fmt;
use std::str::FromStr;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Absent: no limit.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsSpec {
    /// Of all the cores that the host has for its programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuShare>,
    /// Of data directories.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<ByteRate>,
    /// Into directories that are restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<ByteRate>,
    /// To repositories.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload: Option<ByteRate>,
    /// From repositories.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub download: Option<ByteRate>,
}

impl LimitsSpec {
    pub const NONE: LimitsSpec = LimitsSpec { cpu: None, read: None, write: None, upload: None, download: None };

    /// Both hold: of each pair the lower one.
    #[must_use]
    pub fn and(self, other: LimitsSpec) -> LimitsSpec {
        fn lower<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
            one.into_iter().chain(other).min()
        }
        LimitsSpec {
            cpu: lower(self.cpu, other.cpu),
            read: lower(self.read, other.read),
            write: lower(self.write, other.write),
            upload: lower(self.upload, other.upload),
            download: lower(self.download, other.download),
        }
    }
}

/// 1 to 100 percent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CpuShare(u8);

/// Bytes a second.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ByteRate(u64);

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("\"{text}\" is not a share of the cores\nHINT: write a whole number of percent: 1% to 100%.")]
pub struct CpuShareError {
    text: String,
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{text}\" is not a rate\nHINT: write a whole number and a unit, in bytes: 500kB/s, 50MB/s, 200MiB/s or 1GB/s, at least 100kB/s and at most 1000GB/s."
)]
pub struct ByteRateError {
    text: String,
}

const UNITS: [(&str, u64); 6] = [
    ("GB/s", 1_000_000_000),
    ("GiB/s", 1 << 30),
    ("MB/s", 1_000_000),
    ("MiB/s", 1 << 20),
    ("kB/s", 1_000),
    ("KiB/s", 1 << 10),
];

/// Below it a pack of 32 MiB takes minutes, and no backup of note would ever end: such a number is a slip of the unit.
const LEAST: u64 = 100_000;
/// Far from overflow in whatever is computed with it.
const MOST: u64 = 1_000_000_000_000;

impl CpuShare {
    /// `None` outside of 1 to 100.
    pub fn from_percent(percent: u32) -> Option<CpuShare> {
        u8::try_from(percent).ok().filter(|percent| (1..=100).contains(percent)).map(CpuShare)
    }

    pub const fn percent(self) -> u8 {
        self.0
    }
}

impl ByteRate {
    /// `None` outside of what a text may say.
    pub fn from_bytes_per_second(rate: u64) -> Option<ByteRate> {
        (LEAST..=MOST).contains(&rate).then_some(ByteRate(rate))
    }

    pub const fn bytes_per_second(self) -> u64 {
        self.0
    }
}

fn number(digits: &str) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| is_plain)
}

impl FromStr for CpuShare {
    type Err = CpuShareError;

    fn from_str(text: &str) -> Result<CpuShare, CpuShareError> {
        let percent = text.strip_suffix('%').and_then(number).and_then(|percent| u32::try_from(percent).ok());
        percent.and_then(CpuShare::from_percent).ok_or_else(|| CpuShareError { text: text.to_owned() })
    }
}

impl FromStr for ByteRate {
    type Err = ByteRateError;

    fn from_str(text: &str) -> Result<ByteRate, ByteRateError> {
        let scaled = |(unit, scale): &(&str, u64)| number(text.strip_suffix(unit)?.trim_end())?.checked_mul(*scale);
        let rate = UNITS.iter().find_map(scaled).and_then(ByteRate::from_bytes_per_second);
        rate.ok_or_else(|| ByteRateError { text: text.to_owned() })
    }
}

impl fmt::Display for CpuShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl fmt::Display for ByteRate {
    /// In the unit that makes the smallest whole number, which is most often the one it was written in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS.iter().filter(|(_, scale)| self.0.is_multiple_of(*scale)).max_by_key(|(_, scale)| *scale);
        match whole {
            Some((unit, scale)) => write!(f, "{}{unit}", self.0 / scale),
            None => write!(f, "{}B/s", self.0),
        }
    }
}

/// A plain number is a text that lacks its unit: it gets the same answer, with the hint.
struct TextOrNumber;

impl Visitor<'_> for TextOrNumber {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text such as \"50%\" or \"50MB/s\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<String, E> {
        Ok(number.to_string())
    }
}

macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(TextOrNumber)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

as_text!(CpuShare);
as_text!(ByteRate);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_shares_read_back_as_written_and_slips_are_refused() {
        let rates = [("200MB/s", 200_000_000), ("50MiB/s", 50 << 20), ("1GB/s", 1_000_000_000), ("500kB/s", 500_000)];
        for (text, bytes) in rates {
            let rate: ByteRate = text.parse().unwrap();
            assert_eq!((rate.bytes_per_second(), rate.to_string().as_str()), (bytes, text));
        }
        assert_eq!("50 MB/s".parse(), "50MB/s".parse::<ByteRate>());
        for bad in ["", "50", "MB/s", "50MB", "50Mb/s", "50mb/s", "1.5GB/s", "-1MB/s", "+1MB/s", "99kB/s", "0MB/s"] {
            assert!(bad.parse::<ByteRate>().is_err(), "{bad}");
        }
        assert!("1001GB/s".parse::<ByteRate>().is_err() && "99999999999999999999GB/s".parse::<ByteRate>().is_err());
        assert_eq!("50%".parse::<CpuShare>().unwrap().to_string(), "50%");
        for bad in ["", "%", "50", "0%", "101%", "5.5%", "-5%", "300%"] {
            assert!(bad.parse::<CpuShare>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_number_without_its_unit_is_refused_with_a_hint() {
        for text in [r#"{"cpu": 50}"#, r#"{"cpu": 0.5}"#, r#"{"upload": 50000000}"#, r#"{"read": "50"}"#] {
            let error = serde_json::from_str::<LimitsSpec>(text).unwrap_err().to_string();
            assert!(error.contains("HINT"), "{error}");
        }
        let spec = LimitsSpec { cpu: CpuShare::from_percent(50), ..LimitsSpec::NONE };
        assert_eq!(serde_json::to_string(&spec).unwrap(), r#"{"cpu":"50%"}"#);
    }

    #[test]
    fn of_two_limits_the_lower_holds() {
        let one = LimitsSpec {
            cpu: CpuShare::from_percent(50),
            upload: ByteRate::from_bytes_per_second(1 << 20),
            ..LimitsSpec::NONE
        };
        let other = LimitsSpec {
            cpu: CpuShare::from_percent(25),
            read: ByteRate::from_bytes_per_second(1 << 20),
            ..LimitsSpec::NONE
        };
        let both = LimitsSpec { cpu: other.cpu, read: other.read, upload: one.upload, ..LimitsSpec::NONE };
        assert_eq!((one.and(other), other.and(one)), (both, both));
    }
}
